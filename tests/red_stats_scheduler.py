"""Deterministic simulation of red_stats_design.md: its own statements under seeded interleavings.

A seed decides everything: which images are sent, how often and how late; when the clocks of
brokers differ; when counters take, close, save and crash, between which two steps, and what
they leave running; who reads where. Every answer is compared with a count by brute force.

    python tests/red_stats_scheduler.py --seeds 2000 --jobs 2
"""

import argparse
import atexit
import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

from red_stats_document import (
    TABLES,
    TEXT,
    ClickHouse,
    clickhouse_statements,
    milliseconds,
    rfc3339,
    run_python,
)

START = 1_772_323_200_000  # 2026-03-01T00:00:00Z
HOUR = 3_600_000
DAY = 24 * HOUR
CLIENTS = (81, 7)
REDS = (0, 4199, 4200, 4201, 10_000)
STEPS = 25
FRAGILE = ("rebuild_hour", "rebuild_hour", "rebuild", "save", "insert", "resume")


class WrongError(Exception):
    """The design broke a promise."""


class CrashError(Exception):
    """A counter's process died; what it had asked the server for goes on."""


class Image(NamedTuple):
    client: int
    at: int
    image_id: str
    red: int

    def message(self) -> dict[str, Any]:
        """What RED sends about it."""
        return {
            "v": 1,
            "client_id": self.client,
            "image_id": self.image_id,
            "at": self.at,
            "red_bp": self.red,
        }


def uuid7(number: int, at: int = 0) -> str:
    return str(UUID(f"{at:012x}70008000{number:012x}"))


class Record(NamedTuple):
    """A message in the log. Time is true time, `stamp` what the broker's clock said."""

    time: int
    stamp: int
    message: dict[str, Any]


@dataclass
class Zombie:
    """A statement whose process is dead. `rows`: it has read already, and not yet written."""

    server: "Server"
    name: str
    parameters: dict[str, Any]
    rows: list[list[Any]] | None = None


@dataclass
class Process:
    """A counter and its two threads, one of which takes and saves while the other closes."""

    server: "Server"
    machine: int
    counter: Any = None
    dead: bool = False
    busy: set[str] = field(default_factory=set)


@dataclass
class Server:
    """A ClickHouse server: a database. Its log is that of its `partitions`."""

    database: str
    partitions: tuple[int, ...]
    process: Process | None = None
    watermark: tuple[int, int] | None = None
    backed_up: bool = False
    machine: int = 1  # what runs on a machine that is lost does not go on


class World:
    """Everything that one seed decides."""

    def __init__(self, seed: int, engine: ClickHouse, names: dict[str, Any]) -> None:
        self.random = Random(seed)
        self.engine = engine
        self.names = names
        self.now = START + DAY + self.random.randrange(22 * HOUR, 25 * HOUR)
        self.skew = 0
        self.depth = 0
        self.trace: list[str] = []
        self.used = ""
        # Every seed has its own mood, so that rare things come together in some of them,
        # around one statement above all.
        self.fragile = self.random.choice(FRAGILE)
        self.crashes = self.random.choice((0, 1, 1, 2, 3))
        self.most = self.random.choice((2, 5, 12))
        self.mingling = self.random.choice((0.02, 0.1))
        self.weights = [self.random.choice((1, 2, 4)) for _ in range(12)]
        self.zombies: list[Zombie] = []
        self.images: list[Image] = []
        self.erased: dict[int, int] = {}  # client -> when
        # One server; a pair with the same log; or one server for each half of the log.
        self.logs: dict[int, list[Record]] = {0: [], 1: []}
        shape = self.random.choice(("one", "one", "pair", "halves"))
        self.halves = shape == "halves"
        if self.halves:
            self.servers = [Server("a", (0,)), Server("b", (1,))]
        else:
            partitions = self.random.choice(((0,), (0,), (0, 1)))
            self.logs = {partition: [] for partition in partitions}
            names_of_servers = "a" if shape == "one" else "ab"
            self.servers = [Server(name, partitions) for name in names_of_servers]
        begin = self.now // HOUR * HOUR - HOUR
        # Late images come in few hours, so that what concerns the same hour meets.
        self.late_hours = (
            begin + self.random.randrange(HOUR),
            begin + self.random.randrange(HOUR),
            START + self.random.randrange(DAY),
        )
        for server in self.servers:
            engine.emptied(server.database)
            for partition in server.partitions:
                progress = {"done": begin, "as_of": self.now - HOUR, "built": 0}
                self.execute(
                    server, "save", partition=partition, next_offset=0, **progress
                )
        # RED's ingest nodes, the second of which may have an old copy of the routes.
        routes = names["Routes"](epochs=[(0, 1)], spread={}, valid_to=self.now + 60_000)
        self.routes = [routes, routes]

    # --- Running a statement ----------------------------------------------------------

    def use(self, server: Server, what: str) -> None:
        self.trace.append(f"{'  ' * self.depth}{server.database} {what}")
        if server.database != self.used:
            self.engine.use(server.database)
            self.used = server.database

    def execute(self, server: Server, name: str, /, **parameters: Any) -> Any:
        self.use(server, f"{name} {parameters}")
        return self.engine.run(name, **parameters)

    def read_first(self, zombie: Zombie) -> None:
        """The first half of an INSERT … SELECT."""
        self.use(zombie.server, f"reads for {zombie.name} {zombie.parameters}")
        zombie.rows = self.engine.selected(zombie.name, **zombie.parameters)

    def write_after(self, zombie: Zombie) -> None:
        """The second half."""
        self.use(zombie.server, f"writes for {zombie.name} {zombie.parameters}")
        if zombie.rows:
            lines = [json.dumps(row) for row in zombie.rows]
            into = "INSERT INTO histograms FORMAT JSONCompactEachRow"
            self.engine.query("\n".join([into, *lines]))

    def runner(self, process: Process) -> Callable[..., Any]:
        """What a counter gets as `run`: others act between its steps, and it may die there."""

        def pause(name: str, left: Zombie | None) -> None:
            fragile = name.startswith(self.fragile)
            self.others(0.7 if fragile else self.mingling)
            crashes = 0.5 if fragile else 0.03
            if not process.dead and self.crashes and self.random.random() < crashes:
                self.crashes -= 1
                process.dead = True
            if process.dead:
                if left and process.machine == process.server.machine:
                    self.zombies.append(left)
                raise CrashError

        def run(name: str, /, **parameters: Any) -> Any:
            statement = Zombie(process.server, name, parameters)
            writes = name not in ("resume", "erased")
            pause(name, statement if writes else None)
            if name.startswith("rebuild") and self.random.random() < 0.6:
                self.read_first(statement)
                pause(name, statement)
                self.write_after(statement)
                rows = []
            else:
                rows = self.execute(process.server, name, **parameters)
            pause(name, None)
            return rows

        return run

    # --- What may happen --------------------------------------------------------------

    def others(self, likely: float) -> None:
        """Between two steps of a counter, now and then somebody else does something."""
        while self.depth < 2 and self.random.random() < likely:
            self.depth += 1
            self.step()
            self.depth -= 1

    def step(self) -> None:
        actions: list[tuple[float, Callable[[], None]]] = [
            (3, self.wait),
            (4 if len(self.images) < self.most else 0, self.send),
            (4, self.take),
            (2, self.save),
            (2, self.close),
            (1, self.read),
            (0.5, self.continue_zombie),
            (0.5, self.crash),
            (0.5, self.change_leader),
            (2 if self.halves else 0, self.renew_routes),
            (0.1, self.erase),
            (0.2, self.back_up_or_restore),
        ]
        weights = [a * b for (a, _), b in zip(actions, self.weights, strict=True)]
        self.random.choices([action for _, action in actions], weights)[0]()

    def wait(self) -> None:
        self.now += self.random.choice((1, 700, 5_000, 70_000, 40 * 60_000))

    def send(self) -> None:
        """RED sends new images, late ones among them, or some that it had sent."""
        random = self.random
        for _ in range(random.randint(1, 3)):
            if self.images and random.random() < 0.3:
                image = random.choice(random.choice((self.images, self.images[-3:])))
            else:
                at = random.choice((self.now, self.now, *self.late_hours))
                if random.random() < 0.3:
                    at = at // HOUR * HOUR - random.choice((0, 1))
                image_id = uuid7(len(self.images), at)
                client = random.choice(CLIENTS)
                image = Image(client, at, image_id, random.choice(REDS))
            partition = random.choice(self.routes).partition(
                image.client, image.image_id, image.at
            )
            if partition is None:
                continue  # RED's relay tries again
            if image not in self.images:
                self.images.append(image)
            self.append(partition % len(self.logs), image.message())

    def append(self, partition: int, message: dict[str, Any]) -> None:
        record = Record(self.now, self.now + self.skew, message)
        self.logs[partition].append(record)

    def erase(self) -> None:
        client = self.random.choice(CLIENTS)
        for partition in self.logs:
            self.append(partition, {"client_id": client, "erase": True})
        self.erased.setdefault(client, self.now)

    def change_leader(self) -> None:
        """The broker that stamps the log fails over to one whose clock is different."""
        self.skew = self.random.randint(-999, 999)

    def renew_routes(self) -> None:
        """The table of routes grows; one ingest node or the other hears of it."""
        newest = max(self.routes, key=lambda routes: int(routes.valid_to))
        if self.random.random() < 0.7:
            count = 3 - newest.epochs[-1][1]
            newest = newest.with_epoch(newest.valid_to, count)
        newest = newest.extended(self.now + 60_000)
        self.routes[self.random.randrange(2)] = newest

    def act(self, thread: str, work: Callable[[Any, Server], None]) -> None:
        """Let a server's counter work, and die if it must; start one where there is none."""
        server = self.random.choice(self.servers)
        process = server.process
        if process is None:
            process = server.process = Process(server, server.machine)
            thread = "start"
        elif thread in process.busy or "start" in process.busy:
            return
        process.busy.add(thread)
        try:
            if thread == "start":
                process.counter = self.names["Counter"](self.runner(process))
            else:
                work(process.counter, server)
        except CrashError:
            process.dead = True
        process.busy.discard(thread)
        if process.dead and server.process is process:
            server.process = None

    def take(self) -> None:
        self.act("main", self.take_batch)

    def take_batch(self, counter: Any, server: Server) -> None:
        partition = self.random.choice(server.partitions)
        log = self.logs[partition]
        first = counter.taken[partition][0]
        batch = log[first : first + self.random.randint(1, 6)]
        end = first + len(batch)
        stamp = max((record.stamp for record in batch), default=0)
        if end == len(log):
            stamp = max(stamp, self.now + self.random.randint(-999, 999))
        counter.take(partition, end, stamp, [record.message for record in batch])

    def save(self) -> None:
        self.act("main", lambda counter, _: counter.save())

    def close(self) -> None:
        self.act("close", lambda counter, _: counter.close())

    def crash(self) -> None:
        process = self.random.choice(self.servers).process
        if process is not None:
            process.dead = True
            if not process.busy:
                process.server.process = None

    def back_up_or_restore(self) -> None:
        """Copy a server's tables while it works; or lose it, and begin with the copy."""
        server = self.random.choice(self.servers)
        backup = f"{server.database}_backup"
        if server.backed_up:
            self.use(server, "is lost and restored")
            server.machine += 1
            if server.process is not None:
                server.process.dead = True
                server.process = None
            self.zombies = [z for z in self.zombies if z.server is not server]
            server.watermark = None
            for table in TABLES:
                self.engine.copy(table, backup, server.database)
        elif self.depth < 2:
            self.engine.prepare(backup)
            self.used = ""
            for table in TABLES:
                self.others(0.5)
                self.use(server, f"is backed up: {table}")
                self.engine.copy(table, server.database, backup)
            server.backed_up = True

    def continue_zombie(self) -> None:
        if not self.zombies:
            return
        zombie = self.random.choice(self.zombies)
        if zombie.name.startswith("rebuild") and zombie.rows is None:
            self.read_first(zombie)
            return
        self.zombies.remove(zombie)
        if zombie.rows is None:
            self.execute(zombie.server, zombie.name, **zombie.parameters)
        else:
            self.write_after(zombie)

    # --- What must hold ---------------------------------------------------------------

    def arrived(self, client: int, by: int) -> set[Image]:
        """The client's images that were acknowledged by a true time."""
        return {
            Image(client, m["at"], m["image_id"], m["red_bp"])
            for log in self.logs.values()
            for time, _, m in log
            if time <= by and m["client_id"] == client and "erase" not in m
        }

    def read(self, exact: bool = False) -> None:
        """Ask one server of a pair, or sum over both pairs, and compare."""
        random = self.random
        asked = self.servers if self.halves else [random.choice(self.servers)]
        client = random.choice(CLIENTS)
        unit = random.choice((1, HOUR, DAY, None))
        since, until = START, self.now + DAY
        if unit:
            since = START - DAY + random.randrange(3 * DAY) // unit * unit
            until = since + random.randrange(4 * DAY) // unit * unit + unit
        above = random.choice((0, 4199, 4200, 9_999))
        step = random.choice(("all", "all", "hour", "day"))
        as_of = self.now
        answer: dict[int, tuple[int, int]] = {}
        for server in asked:
            if server.watermark is None or exact or random.random() < 0.5:
                ((done, known),) = self.execute(server, "watermark")
                server.watermark = milliseconds(done), milliseconds(known)
            as_of = min(as_of, server.watermark[1])
            question: dict[str, Any] = {"from": since, "to": until, "step": step}
            question |= {"client": client, "above": above, "done": server.watermark[0]}
            for bar, images, redder in self.execute(server, "statistics", **question):
                there = answer.get(milliseconds(bar), (0, 0))
                answer[milliseconds(bar)] = (
                    there[0] + int(images),
                    there[1] + int(redder),
                )
        if exact:
            as_of = self.now
        expected_low: dict[int, tuple[int, int]] = {}
        expected_high: dict[int, tuple[int, int]] = {}
        erased_at = self.erased.get(client, self.now + 1)
        if erased_at > as_of and (
            erased_at > self.now or any(map(any, answer.values()))
        ):
            width = {"all": 0, "hour": HOUR, "day": DAY}[step]
            expected_low, expected_high = (
                brute_force(self.arrived(client, by), since, until, above, width)
                for by in (as_of, self.now)
            )
        for bar in {*answer, *expected_high}:
            low, found, high = (
                counts.get(bar, (0, 0))
                for counts in (expected_low, answer, expected_high)
            )
            if not all(a <= b <= c for a, b, c in zip(low, found, high, strict=True)):
                raise WrongError(
                    f"client {client}, {rfc3339(since)} to {rfc3339(until)}, above {above},"
                    f" step {step}: {found}, not from {low} to {high}"
                )

    def finish(self) -> None:
        """Everybody catches up; what still runs ends; then everything must be exact."""
        self.depth = 2  # nobody acts in between any more
        self.now += 70 * 60_000
        self.skew = 0
        while self.zombies and self.random.random() < 0.5:
            self.continue_zombie()
        if not self.halves:
            self.servers = [self.random.choice(self.servers)]
        for server in self.servers:
            server.process = None
            counter = self.names["Counter"](self.plain_runner(server))
            for partition in server.partitions:
                log = [record.message for record in self.logs[partition]]
                first = counter.taken[partition][0]
                counter.take(partition, len(log), self.now, log[first:])
            counter.close()
            counter.save()
        while self.zombies:
            self.continue_zombie()
        self.read(exact=True)
        server = self.random.choice(self.servers)
        ((done, _),) = self.execute(server, "watermark")
        for day in (START, START + DAY):
            if found := self.execute(server, "audit", day=day, done=milliseconds(done)):
                raise WrongError(f"the audit of {server.database} finds {found}")
        self.check_erasure(server)

    def check_erasure(self, server: Server) -> None:
        """What was appended behind a client's erasure has not become a row."""
        before: set[str] = set()
        behind: set[str] = set()
        for partition in server.partitions:
            erased: set[int] = set()
            for _, _, message in self.logs[partition]:
                if message.get("erase"):
                    erased.add(message["client_id"])
                else:
                    gone = message["client_id"] in erased
                    (behind if gone else before).add(message["image_id"])
        if behind - before:
            self.use(server, "is looked at for images behind an erasure")
            rows = self.engine.query("SELECT image_id FROM events")
            if back := (behind - before) & {image_id for (image_id,) in rows}:
                raise WrongError(f"behind an erasure came {back}")

    def plain_runner(self, server: Server) -> Callable[..., Any]:
        return lambda name, /, **parameters: self.execute(server, name, **parameters)


def brute_force(
    images: set[Image], since: int, until: int, above: int, width: int
) -> dict[int, tuple[int, int]]:
    """Bar -> (images, of which redder); without a width one bar, 0."""
    bars: dict[int, tuple[int, int]] = {}
    for image in images:
        if since <= image.at < until:
            bar = image.at // width * width if width else 0
            number, redder = bars.get(bar, (0, 0))
            bars[bar] = number + 1, redder + (image.red > above)
    return bars


@dataclass
class Relay:
    """RED's relay, with a session of the start version and what it has to post in it."""

    run: Callable[[str], list[list[str]]]
    outbox: str
    images: list[Image] = field(default_factory=list)
    posted: int = 0
    batch: list[Image] | None = None  # in an open transaction
    taken: int = 0


class StartWorld:
    """The start version: transactions of two relays interleaved, an erasure, crashes.

    A session that has to wait for a lock gives up at once and is rolled back, as if its
    process had died; so one thread is enough, and a seed does the same each time.
    """

    def __init__(self, seed: int, sessions: list[Callable[[str], list[list[str]]]]):
        self.random = Random(seed)
        self.reader, *writers = sessions
        self.clients = tuple(10 * seed + n for n in (1, 2))
        self.counted: set[Image] = set()
        self.erased: set[int] = set()
        self.relays = [
            Relay(run, f"{seed:08x}-0000-4000-8000-{n:012x}")
            for n, run in enumerate(writers)
        ]
        for number in range(24):
            at = START + self.random.randrange(3 * DAY)
            if number % 4 == 0:
                at = at // DAY * DAY
            image_id = f"{seed:08x}-0000-7000-8000-{number:012x}"
            client, red = self.random.choice(self.clients), self.random.choice(REDS)
            relay = self.random.choice(self.relays)
            relay.images.append(Image(client, at, image_id, red))

    def step(self) -> None:
        relay = self.random.choice(self.relays)
        if self.random.random() < 0.02:
            self.erase(relay)
        elif relay.batch is None:
            first = relay.posted
            relay.batch = relay.images[first : first + self.random.randint(1, 5)]
            relay.taken = 0
            relay.run("BEGIN;")
        elif self.random.random() < 0.05:
            self.end(relay, "ROLLBACK")
        elif relay.taken < len(relay.batch):
            image = relay.batch[relay.taken]
            values = f"'{rfc3339(image.at)}', '{image.image_id}', {image.red}::smallint"
            self.write(relay, f"SELECT take({image.client}, {values});")
            relay.taken += 1
        else:
            self.acknowledge(relay, relay.batch)
        if self.random.random() < 0.3:
            self.read()

    def write(self, relay: Relay, sql: str) -> bool:
        """Whether it was executed. If not, the transaction is rolled back."""
        if relay.run(sql + "\n\\echo :ERROR")[-1] == ["false"]:
            return True
        self.end(relay, "ROLLBACK")
        return False

    def end(self, relay: Relay, how: str) -> None:
        relay.run(f"{how};")
        relay.batch = None

    def acknowledge(self, relay: Relay, batch: list[Image]) -> None:
        first = relay.posted + 1
        receipt = (
            f"EXECUTE receive('{relay.outbox}', {first}, {first + len(batch) - 1});"
        )
        if not batch or not self.write(relay, receipt):
            return
        self.end(relay, "COMMIT")
        self.counted |= {i for i in batch if i.client not in self.erased}
        if self.random.random() < 0.8:  # else the response is lost
            relay.posted += len(batch)

    def erase(self, relay: Relay) -> None:
        client = self.random.choice(self.clients)
        if relay.batch is None:
            relay.run("BEGIN;")
            if self.write(relay, f"SELECT erase_client({client});"):
                self.end(relay, "COMMIT")
                self.erased.add(client)
                self.counted = {i for i in self.counted if i.client != client}

    def read(self) -> None:
        client, above = self.random.choice(self.clients), self.random.choice(REDS)
        unit = self.random.choice((1, HOUR, DAY))
        since = START - DAY + self.random.randrange(3 * DAY) // unit * unit
        until = since + self.random.randrange(5 * DAY) // unit * unit + unit
        interval = f"'{rfc3339(since)}', '{rfc3339(until)}'"
        ((images, redder),) = self.reader(
            f"EXECUTE statistics({client}, {interval}, {above});"
        )
        own = {image for image in self.counted if image.client == client}
        expected = brute_force(own, since, until, above, 0).get(0, (0, 0))
        if (int(images), int(redder)) != expected:
            raise WrongError(f"client {client}, {interval}: {images}, not {expected}")

    def finish(self) -> None:
        while any(relay.posted < len(relay.images) for relay in self.relays):
            self.step()
        self.read()
        if missing := self.reader("EXECUTE missing;"):
            raise WrongError(f"missing numbers: {missing}")
        gone = ", ".join(map(str, self.erased)) or "0"
        for table in ("images", "day_counts", "feeds"):
            rows = self.reader(f"SELECT * FROM {table} WHERE client_id IN ({gone});")
            if rows:
                raise WrongError(f"{table} still has {rows} of an erased client")


def simulate_start(seed: int, sessions: list[Callable[[str], list[list[str]]]]) -> None:
    """Run one seed of the start version in three sessions of its database."""
    world = StartWorld(seed, sessions)
    try:
        world.finish()
    finally:
        for relay in world.relays:
            relay.run("ROLLBACK;")


def simulate(seed: int, engine: ClickHouse, names: dict[str, Any]) -> list[str]:
    """Run one seed; return what was executed, or raise WrongError if a promise was broken."""
    world = World(seed, engine, names)
    try:
        for _ in range(STEPS):
            world.step()
        world.finish()
    except WrongError as error:
        error.add_note("\n".join(world.trace))
        raise
    return world.trace


class Task(NamedTuple):
    """A seed; `without`: texts of the document that are replaced first."""

    seed: int
    without: tuple[tuple[str, str], ...] = ()
    trace: bool = False


class Worker:
    """A process of the pool: its engine, and the document's names and statements."""

    engine: ClickHouse
    names: dict[str, Any]
    without: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def run(cls, task: Task) -> str:
        """What went wrong; "" if nothing did. With `trace` the statements as well."""
        if cls.without is None:
            memory = Path("/dev/shm")  # where there is one, parts need no disk
            folder = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            session = importlib.import_module("chdb.session").Session(folder)
            cls.engine = ClickHouse(session)
            cls.engine.query("SET max_threads = 1")
        if task.without != cls.without:
            text = TEXT
            for old, new in task.without:
                assert old in text, old
                text = text.replace(old, new)
            cls.names, _ = run_python(text)
            cls.engine.statements = clickhouse_statements(text)
            cls.without = task.without
        try:
            executed = simulate(task.seed, cls.engine, cls.names)
            return "\n".join(executed) if task.trace else ""
        except WrongError as error:
            trace = "\n".join(error.__notes__) if task.trace else ""
            return f"{trace}\nseed {task.seed}: {error}".lstrip()


def pool(jobs: int) -> ProcessPoolExecutor:
    """chDB allows one session in a process, so each seed runs in one of these."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Run the design of RED_STATS under seeded interleavings.",
        epilog="Exit status: 0 every promise was kept, 1 a seed broke one.",
    )
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--trace", action="store_true", help="print what is executed")
    chosen = parser.parse_args(argv)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    tasks = [Task(seed, trace=chosen.trace) for seed in seeds]
    wrong = 0
    with pool(chosen.jobs) as workers:
        for result in workers.map(Worker.run, tasks):
            wrong += "seed " in result
            if result:
                print(result, flush=True)
    print(f"{len(seeds)} seeds, {wrong} of them broke a promise")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
