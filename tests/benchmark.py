"""Measure the figures that README.md quotes.

    python tests/benchmark.py [SECTION...]

Prints one table: what was measured, the figure and its goal. A figure is a ratio of two things that were timed in
turn in the same run, so that a slow or busy machine is slow for both; the median of several rounds counts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Row(NamedTuple):
    what: str
    measured: str
    goal: str


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_ratio(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7
) -> float:
    """Time both in turn, `rounds` times; return the median of the rounds' ratios ours / theirs."""
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))


# One day of a million events: 800 000 of client 1, the rest of 1 000 others. An id is a
# UUIDv7 whose time is `at`.
RED_STATS_DAY = """
INSERT INTO staged
SELECT if(number % 5 < 4, 1, 2 + rand(1) % 1000),
    fromUnixTimestamp64Milli({start:Int64} + rand(2) % 86400000, 'UTC') AS at,
    reinterpret(bitOr(
        bitShiftLeft(toUInt128(bitOr(bitShiftLeft(2::UInt64, 62), bitShiftRight(rand64(3), 2))), 64),
        toUInt128(toUInt64(toUnixTimestamp64Milli(at)) * 65536 + 0x7000 + rand(4) % 4096)
    ), 'UUID'),
    toUInt16(10000 * pow(rand(5) / 4294967296, 2))
FROM numbers(1000000)"""
RED_STATS_RAW = """
SELECT count(), countIf(red_bp > {above:UInt16})
FROM events FINAL
WHERE client_id = 1 AND at >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
  AND at < fromUnixTimestamp64Milli({until:Int64}, 'UTC')"""
RED_STATS_MINUTES = """
INSERT INTO minutes
SELECT 'hour', client_id, toStartOfMinute(at) AS start, count(),
    sumMap(map(red_bp, toUInt64(1))), 1
FROM events FINAL
GROUP BY client_id, start"""
RED_STATS_MINUTE_SCAN = """
SELECT sum(images), sum(arraySum(mapValues(mapFilter((red, n) -> red > {above:UInt16}, counts))))
FROM minutes FINAL
WHERE client_id = 1"""
RED_STATS_BYTES = """
SELECT table, column, sum(rows), sum(column_data_compressed_bytes)
FROM system.parts_columns
WHERE database = 'rolled' AND active AND table != 'progress'
GROUP BY table, column"""


def red_stats() -> Iterator[Row]:
    """The tables of red_stats_design.md with 30 million events, 24 million of them one client's."""
    try:
        from chdb.session import Session
    except ImportError:
        yield Row("red_stats", "skipped", "chDB is not installed")
        return
    from red_stats_document import ClickHouse

    with tempfile.TemporaryDirectory() as folder:
        session: Any = Session
        engine = ClickHouse(session(folder))
        yield from red_stats_insert(engine)
        engine.query("INSERT INTO events SELECT * FROM events WHERE rand() % 100 = 0")
        engine.query("CREATE TABLE minutes AS histograms")
        engine.query(RED_STATS_MINUTES)
        yield from red_stats_query(engine, "1 % repeats, unmerged")
        for table in ("events", "histograms", "minutes"):
            engine.query(f"OPTIMIZE TABLE {table} FINAL")
        yield from red_stats_query(engine, "days merged")
        yield from red_stats_bytes(engine)
    yield from red_stats_matcher()


MARCH = 1_772_323_200_000
HOUR = 3_600_000
DAY = 24 * HOUR


def red_stats_insert(engine: Any) -> Iterator[Row]:
    """Thirty days hour by hour into two servers, one of which rolls up; days alternate."""
    for database in ("plain", "rolled"):
        engine.fresh(database)

    def take(database: str, roll_up: bool, day: int) -> None:
        engine.query(f"USE {database}")
        for hour in range(day, day + DAY, HOUR):
            engine.query(
                "INSERT INTO events SELECT * FROM rolled.staged"
                f" WHERE toStartOfHour(at) = toDateTime({hour // 1000}, 'UTC')"
            )
            if roll_up:
                engine.run("rebuild_hour", start=hour, clients=[], built=1)
        if roll_up:
            engine.run("rebuild_day", start=day, clients=[], built=1)

    ratios, rates = [], []
    for day in range(MARCH, MARCH + 30 * DAY, DAY):
        engine.query("USE rolled")
        engine.query("CREATE OR REPLACE TABLE staged AS events ENGINE = Memory")
        engine.query(RED_STATS_DAY, start=str(day))
        plain = partial(take, "plain", False, day)
        rolled = partial(take, "rolled", True, day)
        first, second = (plain, rolled) if day // DAY % 2 else (rolled, plain)
        timed = {first: seconds(first), second: seconds(second)}
        ratios.append(timed[rolled] / timed[plain])
        rates.append(1_000_000 / timed[rolled])
        engine.query("TRUNCATE TABLE plain.events")
    end = MARCH + 30 * DAY
    engine.query("USE rolled")
    engine.run("save", partition=0, next_offset=0, done=end, as_of=end, built=2)
    yield Row("insert with roll-up / without", f"{statistics.median(ratios):.2f}", "")
    yield Row("events/s with roll-up", f"{statistics.median(rates):,.0f}", ">= 100,000")


def red_stats_query(engine: Any, state: str) -> Iterator[Row]:
    """A month of the busy client, its ends in mid-minute, asked in three ways."""
    random = Random(1)
    timed: dict[str, list[float]] = {"raw": [], "query": [], "minutes": []}
    for _ in range(15):
        since = MARCH + random.randrange(DAY)
        until = MARCH + 29 * DAY + random.randrange(DAY)
        above = random.randrange(10_000)
        texts = {"since": str(since), "until": str(until), "above": str(above)}
        raw = partial(engine.query, RED_STATS_RAW, **texts)
        query = partial(engine.count, 1, since, until, above)
        minutes = partial(engine.query, RED_STATS_MINUTE_SCAN, above=str(above))
        ((images, redder),) = raw()
        assert query() == (int(images), int(redder))
        for name, work in (("raw", raw), ("query", query), ("minutes", minutes)):
            timed[name].append(seconds(work))
    middle = {name: statistics.median(times) for name, times in timed.items()}
    pairs = list(zip(timed["raw"], timed["query"], timed["minutes"], strict=True))
    ratio = statistics.median(raw / query for raw, query, _ in pairs)
    yield Row(f"a month, {state}: raw scan / statistics query", f"{ratio:.1f}", "> 5")
    yield Row(f"a month, {state}: raw scan, ms", f"{middle['raw'] * 1000:.0f}", "")
    yield Row(
        f"a month, {state}: statistics query, ms", f"{middle['query'] * 1000:.0f}", ""
    )
    ratio = statistics.median(minutes / raw for raw, _, minutes in pairs)
    yield Row(f"a month, {state}: minute tier / raw scan", f"{ratio:.1f}", "")


def red_stats_bytes(engine: Any) -> Iterator[Row]:
    """What an event and a row of the roll-up take, the latter also for small clients alone."""
    engine.query("CREATE TABLE small AS histograms")
    engine.query("INSERT INTO small SELECT * FROM histograms FINAL WHERE client_id > 1")
    engine.query("OPTIMIZE TABLE small FINAL")
    tables: dict[str, dict[str, tuple[int, int]]] = {}
    for table, column, rows, size in engine.query(RED_STATS_BYTES):
        tables.setdefault(table, {})[column] = int(rows), int(size)
    rows_of = {table: columns["client_id"][0] for table, columns in tables.items()}
    size_of = {
        table: sum(s for _, s in columns.values()) for table, columns in tables.items()
    }
    ((small,),) = engine.query("SELECT count() FROM events FINAL WHERE client_id > 1")
    events = rows_of["events"]
    yield Row("bytes on disk per event", f"{size_of['events'] / events:.1f}", "")
    of_ids = tables["events"]["image_id"][1] / size_of["events"]
    yield Row("  of which image_id", f"{of_ids:.0%}", "")
    for table, what, counted in (
        ("histograms", "roll-up", events),
        ("small", "roll-up of clients with 200 images a day", int(small)),
        ("minutes", "minute tier (rejected)", events),
    ):
        per_row, per_event = size_of[table] / rows_of[table], size_of[table] / counted
        yield Row(
            f"{what}: rows per 1000 events",
            f"{1000 * rows_of[table] / counted:.1f}",
            "",
        )
        yield Row(f"{what}: bytes on disk per row", f"{per_row:.1f}", "")
        yield Row(f"{what}: bytes on disk per event", f"{per_event:.2f}", "")


def red_stats_matcher() -> Iterator[Row]:
    """The document's matcher: what an image costs with many subscriptions of its client."""
    from red_stats_document import run_python

    names, _ = run_python()
    random = Random(1)
    reds = [random.randrange(9_100) for _ in range(100_000)]

    def images(subscriptions: int) -> Callable[[], object]:
        matcher = names["Matcher"]()
        for number in range(subscriptions):
            matcher.change(1, number, 1, 9_000 + number % 1_000, 0)
        return lambda: [matcher.image(1, 10, red) for red in reds]

    ratio = median_ratio(images(1_000), images(10))
    yield Row(
        "an image against 1 000 subscriptions / against 10", f"{ratio:.2f}", "< 2"
    )


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"red_stats": red_stats}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the figures that README.md quotes."
    )
    parser.add_argument(
        "section", nargs="*", help=f"which to run (default: all): {', '.join(SECTIONS)}"
    )
    chosen = parser.parse_args(argv).section or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    print(f"{'what':74} {'measured':>12}  goal")
    for name in chosen:
        for row in SECTIONS[name]():
            print(f"{row.what:74} {row.measured:>12}  {row.goal}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
