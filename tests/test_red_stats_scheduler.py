"""red_stats_design.md under seeded interleavings: as it is, and without its protections."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from shutil import which

import pytest
from red_stats_postgresql import POSTGRESQL, Cluster, Database, postgresql_binaries
from red_stats_scheduler import Task, Worker, WrongError, pool, simulate_start

SEEDS = int(os.environ.get("RED_STATS_SEEDS", "40"))

# What is taken out of the document, and a seed that then breaks a promise.
WITHOUT: dict[str, tuple[int, tuple[tuple[str, str], ...]]] = {
    "a generation that is saved before any work": (
        735,
        (
            (", 4294967296)", ", 1)"),
            ("self.generation << 32 | self.number", "self.generation + self.number"),
            ("for partition in self.taken:   ", "for partition in ():   "),
        ),
    ),
    "closing that moves first": (
        35,
        (("if hour < self.closing:", "if hour < self.done:"),),
    ),
    "recounting before the offsets are saved": (
        6,
        (
            ("...         self.recount()\n", ""),
            (
                "...     def save_partition(",
                "...         self.recount()\n...     def save_partition(",
            ),
        ),
    ),
    "an allowance for clocks": (91, (("CLOCKS = 1_000", "CLOCKS = 0"),)),
    "valid_to of the routes": (761, (("if at >= self.valid_to:", "if False:"),)),
    "a counter that filters erased clients": (
        23,
        (('if message["client_id"] not in self.erased', 'if "erase" not in message'),),
    ),
    "a query that reads the erased clients": (8, (("= 0 AS kept", ">= 0 AS kept"),)),
    "times of one type": (
        4,
        (
            (
                "at >= {start:DateTime64(3, 'UTC')} AND at < {start:DateTime64(3, 'UTC')}",
                "at >= {start:DateTime('UTC')} AND at < {start:DateTime('UTC')}",
            ),
        ),
    ),
}


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    if find_spec("chdb") is None:
        pytest.skip("chDB is not installed")
    with pool(os.cpu_count() or 1) as workers:
        yield workers


def test_no_interleaving_breaks_a_promise(workers: ProcessPoolExecutor) -> None:
    results = workers.map(Worker.run, [Task(seed) for seed in range(SEEDS)])
    assert [result for result in results if result] == []


@pytest.mark.parametrize("missing", WITHOUT)
def test_the_scheduler_notices_when_a_protection_is_missing(
    workers: ProcessPoolExecutor, missing: str
) -> None:
    seed, without = WITHOUT[missing]
    result = workers.submit(Worker.run, Task(seed, without)).result()
    assert result.startswith(f"seed {seed}: ")


def test_a_seed_does_the_same_each_time(workers: ProcessPoolExecutor) -> None:
    task = Task(3, trace=True)
    first, second = (workers.submit(Worker.run, task).result() for _ in range(2))
    assert first == second != ""


@pytest.fixture(scope="module")
def start_version() -> Iterator[list[Database]]:
    """Three sessions of the start version, which do not wait for each other's locks."""
    binaries = postgresql_binaries()
    if binaries is None or which("psql") is None:
        pytest.skip("PostgreSQL's initdb and psql are not installed")
    cluster = Cluster(binaries)
    cluster.start()
    cluster.run("postgres", "".join(block.code for block in POSTGRESQL))
    sessions = [Database(cluster, "postgres") for _ in range(3)]
    for session in sessions:
        session("\\set ON_ERROR_STOP off\nSET lock_timeout = '5ms';")
    yield sessions
    for session in sessions:
        session.close()
    cluster.stop()


def test_no_interleaving_breaks_a_promise_of_the_start_version(
    start_version: list[Database],
) -> None:
    wrong = []
    for seed in range(1, 1 + SEEDS // 5):
        try:
            simulate_start(seed, list(start_version))
        except WrongError as error:
            wrong.append(f"seed {seed}: {error}")
    assert wrong == []
