"""Execute the claims of red_stats_design.md: what is tested is the text of the document itself."""

import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest
from red_stats_document import (
    TEXT,
    Block,
    ClickHouse,
    blocks,
    clickhouse_statements,
    milliseconds,
    rfc3339,
    run_python,
)

START = 1_772_323_200_000  # 2026-03-01T00:00:00Z, where the document's examples begin
HOUR = 3_600_000
DAY = 24 * HOUR
EDGES = (0, 4199, 4200, 4201, 9999, 10_000)  # many images lie exactly on a threshold

NAMES, COMPLAINTS = run_python()


# --- Python ---------------------------------------------------------------------------


@pytest.mark.parametrize("line", COMPLAINTS)
def test_every_python_block_runs_as_written(line: int) -> None:
    assert COMPLAINTS[line] == ""


def test_a_signature_is_that_of_standard_webhooks_and_holds_for_five_minutes() -> None:
    secret, id_ = (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
    )
    signed = secret, id_, 1_614_265_330, b'{"test": 2432232314}'
    signature = NAMES["sign"](*signed)
    # The example of the Standard Webhooks libraries.
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    good = [
        NAMES["verify"](*signed, f"v1,old {signature}", now=1_614_265_330 + late)
        for late in (-301, -300, 0, 300, 301)
    ]
    assert good == [False, True, True, True, False]
    assert not NAMES["verify"](*signed, "v1,old", now=1_614_265_330)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fd00::1",
        "fe80::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "2001:0:a00:1::",
    ],
)
def test_a_webhook_may_not_connect_to_an_internal_address(address: str) -> None:
    assert not NAMES["public"](address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
)
def test_a_webhook_may_connect_to_a_public_address(address: str) -> None:
    assert NAMES["public"](address)


def test_a_hot_client_is_spread_from_the_new_epoch_on_and_not_before() -> None:
    ids = [f"019ca6b1-dc7b-747c-9980-0000{n:08x}" for n in range(1_000)]
    routes = NAMES["ROUTES"]
    begin = routes.epochs[-1][0]
    before, after = (
        {routes.partition(81, image, at) for image in ids} for at in (begin - 1, begin)
    )
    assert (before, after) == ({11}, {2, 18, 20, 23})


@pytest.mark.parametrize("seed", range(20))
def test_no_two_copies_of_the_routes_send_an_image_to_different_partitions(
    seed: int,
) -> None:
    random = Random(seed)
    published = NAMES["Routes"]([(0, 3)], {}, valid_to=1_000)
    copies = [published] * 4
    sent: dict[tuple[int, int], set[int]] = {}
    for now in range(500, 20_000, 50):
        if random.random() < 0.5:
            copies[random.randrange(4)] = published
        if random.random() < 0.3:
            published = published.extended(now + 1_000)
        if random.random() < 0.05:
            published = published.with_epoch(published.valid_to, random.randint(1, 9))
        number, at = random.choice([*sent, (now, now + random.randrange(-500, 3))])
        at_node = random.choice(copies).partition(81, f"{number:032x}", at)
        if at_node is not None:
            sent.setdefault((number, at), set()).add(at_node)
    assert {len(partitions) for partitions in sent.values()} == {1}


def test_a_row_that_begins_before_valid_to_cannot_be_added_to_the_routes() -> None:
    routes = NAMES["ROUTES"]
    with pytest.raises(AssertionError):
        routes.with_epoch(routes.valid_to - 1, 48)


def test_a_rounded_up_share_is_more_than_a_threshold_exactly_if_the_share_is() -> None:
    random = Random(1)
    wrong = []
    for _ in range(20_000):
        whole = random.choice((7, 9_999, 10_000, 100_000, random.randint(1, 10**8)))
        red = random.choice((0, 1, whole, random.randint(0, whole)))
        rounded = NAMES["basis_points"](red, whole)
        wrong += [
            (red, whole, threshold)
            for threshold in (rounded - 1, rounded, random.randint(0, 10_000))
            if (rounded > threshold) != (10_000 * red > threshold * whole)
        ]
    assert wrong == []


# --- Images, as RED would send them ---------------------------------------------------


class Image(NamedTuple):
    client: int
    at: int
    image_id: str
    red: int

    def message(self) -> dict[str, Any]:
        return {
            "v": 1,
            "client_id": self.client,
            "image_id": self.image_id,
            "at": self.at,
            "red_bp": self.red,
        }


def make_images(random: Random, number: int, days: int) -> list[Image]:
    """Images of four clients, one of them with half of all, in some hours of `days`."""
    hours = random.sample(range(24 * days), 6 * days)

    def one() -> Image:
        at = START + random.choice(hours) * HOUR + random.randrange(HOUR)
        bits = at << 80 | 7 << 76 | random.getrandbits(12) << 64 | 2 << 62
        digits = f"{bits | random.getrandbits(62):032x}"
        image_id = "-".join(
            digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
        )
        red = (
            random.choice(EDGES) if random.random() < 0.5 else random.randint(0, 10_000)
        )
        return Image(random.choice((81, 81, 81, 1, 2, 2**53 - 1)), at, image_id, red)

    return [one() for _ in range(number)]


def make_log(random: Random, images: list[Image]) -> list[tuple[int, Image]]:
    """(arrival, image) in order of arrival.

    Most images arrive within a second, one in twenty up to a day later, one in ten a
    second time up to a day later, and one batch in ten is posted twice.
    """
    arrivals = []
    for image in images:
        late = random.randrange(DAY) if random.random() < 0.05 else 0
        arrivals.append((image.at + late + random.randrange(1000), image))
        if random.random() < 0.1:
            arrivals.append((image.at + random.randrange(DAY), image))
    arrivals.sort()
    log: list[tuple[int, Image]] = []
    for first in range(0, len(arrivals), 50):
        batch = arrivals[first : first + 50]
        log += batch
        if random.random() < 0.1:
            log += [(batch[-1][0], image) for _, image in batch]
    return log


def brute_force(
    images: set[Image], client: int, since: int, until: int, above: int
) -> tuple[int, int]:
    reds = [i.red for i in images if i.client == client and since <= i.at < until]
    return len(reds), sum(red > above for red in reds)


def random_questions(
    random: Random, number: int, days: int
) -> list[tuple[int, int, int, int]]:
    """(client, since, until, above): mid-hour, mid-minute, whole hours, whole days, short."""
    questions = []
    for _ in range(number):
        step = random.choice((1, 1, 60_000, HOUR, DAY))
        width = random.choice((2 * HOUR, DAY, days * DAY))
        since = START + random.randrange(days * DAY) // step * step
        until = since + max(step, random.randrange(width) // step * step)
        above = (
            random.choice(EDGES) if random.random() < 0.7 else random.randint(0, 10_000)
        )
        questions.append((random.choice((81, 1, 2, 2**53 - 1, 5)), since, until, above))
    return questions


# --- ClickHouse -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    # In this process: chDB allows one session in it, and needs 2 s to be imported.
    module = pytest.importorskip("chdb.session", reason="chDB is not installed")
    session = module.Session(str(tmp_path_factory.mktemp("clickhouse")))
    yield ClickHouse(session)
    session.close()


@pytest.fixture
def clickhouse(clickhouse_server: ClickHouse) -> ClickHouse:
    """A server with the document's empty tables."""
    clickhouse_server.fresh("red_stats")
    return clickhouse_server


class Server:
    """A ClickHouse server with the document's counter, which may crash between any two steps."""

    def __init__(self, engine: ClickHouse, first_start: int) -> None:
        self.engine = engine
        times: dict[str, Any] = {"done": first_start, "as_of": 0}
        engine.run("save", partition=0, next_offset=0, built=0, **times)
        self.start()

    def start(self) -> None:
        self.counter = NAMES["Counter"](self.engine.run)

    @property
    def next_offset(self) -> int:
        offset: int = self.counter.taken[0][0]
        return offset

    def take(self, log: list[tuple[int, Image]], batch: int) -> None:
        taken = log[self.next_offset : self.next_offset + batch]
        messages = [image.message() for _, image in taken]
        end = self.next_offset + len(taken)
        self.counter.take(0, end, taken[-1][0], messages)
        self.counter.close()

    def save(self) -> None:
        self.counter.save()


@pytest.mark.parametrize("name", clickhouse_statements())
def test_every_clickhouse_statement_runs(clickhouse: ClickHouse, name: str) -> None:
    rows = [Image(81, START, "0" * 32, 5).message()]
    clickhouse.run("insert", rows=rows)
    if name == "schema":
        clickhouse.query("CREATE DATABASE IF NOT EXISTS empty")
        clickhouse.query("USE empty")
    parameters: dict[str, Any] = {
        **dict.fromkeys(("start", "day", "done", "as_of", "from"), START),
        **dict.fromkeys(("client", "above", "built", "partition", "next_offset"), 1),
        "to": START + 1,
        "clients": [81],
        "step": "all",
    }
    clickhouse.run(name, rows=rows if name == "insert" else [], **parameters)


def test_no_text_of_the_clickhouse_blocks_is_left_out() -> None:
    written = "".join(block.code for block in blocks("sql clickhouse"))
    executed = "".join(chain.from_iterable(clickhouse_statements().values()))
    without_names = re.sub(r"^-- \w+$|; *--.*$|;$", "", written, flags=re.MULTILINE)
    assert "".join(without_names.split()) == "".join(executed.split())


def test_a_counting_view_counts_a_repeated_image_twice_and_the_set_once(
    clickhouse: ClickHouse,
) -> None:
    ((images, counted),) = clickhouse.run("trap")
    assert (int(images), int(counted)) == (1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_those_of_a_brute_force_count_through_repeats_lateness_and_crashes(
    clickhouse: ClickHouse, seed: int
) -> None:
    random = Random(seed)
    log = make_log(random, make_images(random, 500, days=2))
    server = Server(clickhouse, first_start=START + 5 * HOUR)
    furthest = asked = 0
    wrong: list[object] = []
    while server.next_offset < len(log):
        for _ in range(random.randint(1, 3)):
            if server.next_offset < len(log):
                server.take(log, random.randint(1, 60))
        furthest = max(furthest, server.next_offset)
        if random.random() < 0.3:
            server.start()  # the counter died before it could save
            continue
        server.save()
        # While it catches up after a crash, what it had taken before may count already.
        by_now, at_most = (
            {image for _, image in log[:offset]}
            for offset in (server.next_offset, furthest)
        )
        for question in random_questions(random, 8, days=2):
            asked += 1
            answer = clickhouse.count(*question)
            low, high = brute_force(by_now, *question), brute_force(at_most, *question)
            if not all(a <= b <= c for a, b, c in zip(low, answer, high, strict=True)):
                wrong.append((question, low, answer, high))
    assert (wrong, by_now == at_most, asked >= 40) == ([], True, True)


@pytest.fixture(scope="session")
def taken_days(clickhouse_server: ClickHouse) -> set[Image]:
    """Two days with repeats and late images, taken into the database `taken_days`."""
    random = Random(99)
    log = make_log(random, make_images(random, 600, days=2))
    clickhouse_server.fresh("taken_days")
    server = Server(clickhouse_server, first_start=START)
    while server.next_offset < len(log):
        server.take(log, 300)
    server.save()
    return {image for _, image in log}


@pytest.fixture
def two_days(
    clickhouse_server: ClickHouse, taken_days: set[Image]
) -> tuple[ClickHouse, set[Image]]:
    """A server that has taken two days, and what it has taken."""
    clickhouse_server.query("USE taken_days")
    return clickhouse_server, taken_days


@pytest.fixture
def two_days_to_change(
    clickhouse: ClickHouse, taken_days: set[Image]
) -> tuple[ClickHouse, set[Image]]:
    """The same, for tests that change it."""
    for table in ("events", "histograms", "progress"):
        clickhouse.query(f"INSERT INTO {table} SELECT * FROM taken_days.{table}")
    return clickhouse, taken_days


@pytest.mark.parametrize(
    ("since", "until"),
    [
        pytest.param(0, DAY, id="a whole day"),
        pytest.param(HOUR, 2 * HOUR, id="a whole hour"),
        pytest.param(1, DAY - 1, id="all but a millisecond at each end"),
        pytest.param(90_500, 90_500 + 40_000, id="within a minute"),
        pytest.param(HOUR - 1, HOUR + 1, id="two milliseconds around an hour"),
        pytest.param(DAY - 1, DAY + 1, id="two milliseconds around midnight"),
        pytest.param(20 * HOUR + 7, 30 * HOUR + 7, id="over midnight, no whole day"),
        pytest.param(-2 * HOUR, DAY + 2 * HOUR, id="hours, a day, hours"),
        pytest.param(
            12 * HOUR + 61_001, 2 * DAY - 5, id="mid-minute, hours, a day, mid-minute"
        ),
        pytest.param(-5 * DAY, 9 * DAY, id="more than there is"),
        pytest.param(5, 5, id="an empty interval"),
    ],
)
@pytest.mark.parametrize("above", [0, 4199, 4200, 9_999, 10_000])
def test_an_interval_of_any_shape_is_counted_exactly(
    two_days: tuple[ClickHouse, set[Image]], since: int, until: int, above: int
) -> None:
    engine, images = two_days
    question = (81, START + since, START + until, above)
    assert engine.count(*question) == brute_force(images, *question)


def test_an_image_at_the_threshold_does_not_count_as_more_red(
    clickhouse: ClickHouse,
) -> None:
    clickhouse.run("insert", rows=[Image(81, START, "0" * 32, 4200).message()])
    clickhouse.run("rebuild_hour", start=START, clients=[], built=1)
    raw = [clickhouse.count(81, START, START + HOUR, above) for above in (4199, 4200)]
    clickhouse.run(
        "save", partition=0, next_offset=1, done=START + HOUR, as_of=START, built=1
    )
    rolled = [
        clickhouse.count(81, START, START + HOUR, above) for above in (4199, 4200)
    ]
    assert raw == rolled == [(1, 1), (1, 0)]


def test_without_progress_everything_is_counted_from_the_events(
    clickhouse: ClickHouse,
) -> None:
    clickhouse.run("insert", rows=[Image(81, START, "0" * 32, 5).message()] * 2)
    assert clickhouse.count(81, START, START + DAY, 4) == (1, 1)


def test_an_hour_is_not_taken_from_the_roll_up_before_it_is_done(
    clickhouse: ClickHouse,
) -> None:
    first, second = (Image(81, START + n, f"{n:032x}", 5) for n in (1, 2))
    clickhouse.run("insert", rows=[first.message()])
    clickhouse.run("rebuild_hour", start=START, clients=[], built=1)
    clickhouse.run("save", partition=0, next_offset=1, done=START, as_of=START, built=1)
    clickhouse.run("insert", rows=[second.message()])
    assert clickhouse.count(81, START, START + HOUR, 0) == (2, 2)


def test_the_saved_watermark_is_that_of_the_partition_furthest_behind(
    clickhouse: ClickHouse,
) -> None:
    for partition, hours in enumerate((3, 1, 2)):
        time = START + hours * HOUR
        clickhouse.run(
            "save",
            partition=partition,
            next_offset=1,
            done=time,
            as_of=time,
            built=hours,
        )
    assert clickhouse.run("watermark") == [
        ["2026-03-01 01:00:00", "2026-03-01 01:00:00.000"]
    ]


@pytest.mark.parametrize("day", [START, START + DAY], ids=["first", "second"])
def test_the_audit_finds_nothing_after_repeats_and_late_messages(
    two_days: tuple[ClickHouse, set[Image]], day: int
) -> None:
    engine, _ = two_days
    assert engine.run("audit", day=day, done=START + 2 * DAY) == []


@pytest.mark.parametrize(
    "row",
    [
        pytest.param("'hour', 77, '2026-03-01 03:00:00', 1, map(4217, 1)", id="hour"),
        pytest.param("'day', 77, '2026-03-01 00:00:00', 1, map(4217, 1)", id="day"),
    ],
)
def test_the_audit_finds_a_row_without_events(
    two_days_to_change: tuple[ClickHouse, set[Image]], row: str
) -> None:
    engine, _ = two_days_to_change
    engine.query(f"INSERT INTO histograms VALUES ({row}, 1)")
    ((tier, client, _),) = engine.run("audit", day=START, done=START + DAY)
    assert (f"'{tier}'", int(client)) == (row.split(",")[0], 77)


@pytest.mark.parametrize("tier", ["hour", "day"])
@pytest.mark.parametrize(
    "columns",
    [
        pytest.param("images + 1, counts", id="images"),
        pytest.param("images, mapAdd(counts, map(4217, 1))", id="counts"),
        pytest.param("images, map(4217, 0)", id="no counts"),
    ],
)
def test_the_audit_finds_a_wrong_column_in_either_tier(
    two_days_to_change: tuple[ClickHouse, set[Image]], tier: str, columns: str
) -> None:
    engine, _ = two_days_to_change
    engine.query(
        f"INSERT INTO histograms SELECT tier, client_id, start, {columns}, built + 1"
        f" FROM histograms FINAL WHERE tier = '{tier}' AND client_id = 81"
        f" AND toDate(start) = '2026-03-01' ORDER BY start LIMIT 1"
    )
    found = engine.run("audit", day=START, done=START + DAY)
    assert [(name, int(client)) for name, client, _ in found] == [(tier, 81)]


def test_the_audit_finds_a_row_that_is_missing(
    two_days_to_change: tuple[ClickHouse, set[Image]],
) -> None:
    engine, _ = two_days_to_change
    engine.query("DELETE FROM histograms WHERE tier = 'day' AND client_id = 1")
    found = engine.run("audit", day=START, done=START + DAY)
    assert [(tier, int(client)) for tier, client, _ in found] == [("day", 1)]


def test_the_digests_of_two_servers_differ_if_one_image_does(
    two_days_to_change: tuple[ClickHouse, set[Image]],
) -> None:
    engine, _ = two_days_to_change
    before = engine.run("digest", day=START)
    engine.query("OPTIMIZE TABLE events FINAL")
    merged = engine.run("digest", day=START)
    engine.query(
        "INSERT INTO events SELECT client_id, at, image_id, red_bp + 1 FROM events"
        " WHERE toDate(at) = '2026-03-01' AND red_bp < 10000 LIMIT 1"
    )
    changed = engine.run("digest", day=START)
    assert (before == merged, changed == before) == (True, False)


@pytest.mark.parametrize("step", ["hour", "day"])
@pytest.mark.parametrize(
    ("since", "until"),
    [
        pytest.param(-HOUR, 2 * DAY + HOUR, id="all"),
        pytest.param(5 * HOUR + 1, 30 * HOUR - 1, id="mid-hour to mid-hour"),
        pytest.param(0, DAY, id="a day"),
        pytest.param(7, 8, id="a millisecond"),
    ],
)
def test_a_series_has_the_counts_of_its_hours_or_days(
    two_days: tuple[ClickHouse, set[Image]], step: str, since: int, until: int
) -> None:
    engine, images = two_days
    width = {"hour": HOUR, "day": DAY}[step]
    ((done, _),) = engine.run("watermark")
    times: dict[str, Any] = {
        "from": START + since,
        "to": START + until,
        "done": milliseconds(done),
    }
    bars = engine.run("statistics", client=81, above=4200, step=step, **times)
    expected = []
    for bar in range(START - DAY, START + 3 * DAY, width):
        first, end = max(bar, times["from"]), min(bar + width, times["to"])
        if (counts := brute_force(images, 81, first, end, 4200))[0]:
            expected.append((bar, *counts))
    assert [(milliseconds(b), int(n), int(m)) for b, n, m in bars] == expected


@pytest.mark.parametrize("first", [0, 1])
def test_an_image_in_the_last_millisecond_of_an_hour_counts_in_that_hour(
    clickhouse: ClickHouse, first: int
) -> None:
    images = [Image(81, START + HOUR - 1, "0" * 32, 5)] * 2
    images.append(Image(81, START + 5 * HOUR, "0" * 32, 5))
    clickhouse.run("insert", rows=[image.message() for image in images[first:]])
    clickhouse.run("rebuild_hour", start=START, clients=[], built=1)
    times: dict[str, Any] = {"done": START + HOUR, "as_of": START + HOUR}
    clickhouse.run("save", partition=0, next_offset=1, built=1, **times)
    assert clickhouse.count(81, START, START + HOUR, 0) == (1, 1)
    assert clickhouse.count(81, START + HOUR - 1, START + 2 * HOUR, 0) == (1, 1)


def test_erasing_a_client_leaves_the_others_as_they_were(
    two_days_to_change: tuple[ClickHouse, set[Image]],
) -> None:
    engine, images = two_days_to_change
    questions = [(client, START, START + 2 * DAY, 4200) for client in (81, 1, 2)]
    engine.run("erase", client=81)
    kept = {image for image in images if image.client != 81}
    expected = [brute_force(kept, *question) for question in questions]
    hidden = [engine.count(*question) for question in questions]
    engine.run("purge")
    assert hidden == [engine.count(*question) for question in questions] == expected


def test_an_image_appended_behind_the_erasure_of_its_client_is_dropped(
    clickhouse: ClickHouse,
) -> None:
    server = Server(clickhouse, first_start=START)
    image = Image(81, START + 1, "0" * 32, 5).message()
    server.counter.take(0, 2, START, [image, {"client_id": 81, "erase": True}])
    server.counter.take(0, 3, START, [image])
    server.start()
    server.counter.take(0, 4, START, [image])
    assert clickhouse.query("SELECT count() FROM events") == [[0]]


def test_purging_removes_erased_rows_from_disk_also_those_that_came_back(
    clickhouse: ClickHouse,
) -> None:
    images = [Image(client, START, "0" * 32, 5) for client in (81, 1)]
    clickhouse.run("erase", client=81)
    clickhouse.run("insert", rows=[image.message() for image in images])
    clickhouse.run("rebuild_hour", start=START, clients=[], built=1)
    clickhouse.run("purge")
    rows = clickhouse.query(
        "SELECT table, sum(rows) FROM system.parts WHERE database = 'red_stats'"
        " AND table IN ('events', 'histograms') AND active GROUP BY table ORDER BY table"
    )
    assert [(table, int(number)) for table, number in rows] == [
        ("events", 1),
        ("histograms", 1),
    ]


def test_what_a_dead_counter_left_running_loses_against_its_successor(
    clickhouse: ClickHouse,
) -> None:
    first, late = (Image(81, START + n, f"{n:032x}", 5).message() for n in (1, 2))
    server = Server(clickhouse, first_start=START)
    server.counter.take(0, 1, START + 3 * HOUR, [first])
    number = server.counter.built()
    left = clickhouse.selected("rebuild_hour", start=START, clients=[], built=number)
    server.start()
    server.counter.take(0, 2, START + 3 * HOUR, [first, late])
    server.counter.close()
    server.save()
    clickhouse.query(
        "INSERT INTO histograms FORMAT JSONCompactEachRow\n" + json.dumps(left[0])
    )
    assert clickhouse.count(81, START, START + HOUR, 0) == (2, 2)


def test_a_counter_started_on_a_restored_server_begins_after_all_that_is_there(
    clickhouse: ClickHouse,
) -> None:
    clickhouse.query(
        "INSERT INTO histograms VALUES ('hour', 81, '2026-03-01', 1, map(5, 1),"
        f" {7 << 32 | 9})"
    )
    assert Server(clickhouse, first_start=START).counter.generation == 8


def test_retention_drops_the_day_it_names_and_no_other(clickhouse: ClickHouse) -> None:
    days = [milliseconds(f"2025-01-{day} 12:00:00") for day in (24, 25, 26)]
    clickhouse.run("insert", rows=[Image(81, at, "0" * 32, 5).message() for at in days])
    clickhouse.run("retain")
    assert [clickhouse.count(81, at, at + 1, 0) for at in days] == [
        (1, 1),
        (0, 0),
        (1, 1),
    ]


# --- Matching -------------------------------------------------------------------------


class Change(NamedTuple):
    """A message about a subscription; without a threshold it is a deletion."""

    client: int
    subscription: str
    version: int
    threshold: int | None
    requested_at: int


def mixed_log(random: Random) -> list[Image | Change]:
    """Images in order of arrival with changes in between, some of them repeated."""
    log: list[Image | Change] = []
    versions: dict[tuple[int, str], list[Change]] = {}
    for arrived, image in make_log(random, make_images(random, 600, days=10)):
        log.append(image)
        if random.random() < 0.2:
            client, subscription = random.choice((81, 1, 2)), random.choice("abc")
            history = versions.setdefault((client, subscription), [])
            if history and (random.random() < 0.2 or history[-1].threshold is None):
                log.append(random.choice(history))  # the outbox repeats itself
                continue
            deleted = bool(history) and random.random() < 0.05
            threshold = None if deleted else random.choice(EDGES[:-1])
            asked = arrived - random.randrange(-500, 5000)
            history.append(
                Change(client, subscription, len(history) + 1, threshold, asked)
            )
            log.append(history[-1])
    return log


@pytest.mark.parametrize("seed", range(5))
def test_the_matcher_notifies_exactly_the_versions_in_force_at_the_time_of_the_image(
    seed: int,
) -> None:
    matcher = NAMES["Matcher"]()
    # (client, subscription) -> the promise: [(active_from, threshold), ...]
    promised: dict[tuple[int, str], list[tuple[int, int | None]]] = {}
    newest = 0
    notified: list[list[str]] = []
    expected: list[list[str]] = []
    for message in mixed_log(Random(seed)):
        if isinstance(message, Change):
            client, subscription, version, threshold, _ = message
            active_from = matcher.change(*message)
            versions = promised.setdefault((client, subscription), [])
            if version > len(versions):
                versions.append((active_from, threshold))
            continue
        newest = max(newest, message.at)
        notified.append(sorted(matcher.image(message.client, message.at, message.red)))
        expected.append([])
        for (client, subscription), versions in sorted(promised.items()):
            position = bisect_right(
                [active_from for active_from, _ in versions], message.at
            )
            in_force = versions[position - 1][1] if position else None
            if (
                client == message.client
                and message.at >= newest - 7 * DAY
                and versions[-1][1] is not None
                and in_force is not None
                and message.red > in_force
            ):
                expected[-1].append(subscription)
    assert sum(map(len, notified)) > 100
    assert notified == expected


def test_a_repeat_is_judged_as_the_first_time_however_the_subscriptions_changed() -> (
    None
):
    matcher = NAMES["Matcher"]()
    judged: dict[Image, set[str]] = {}
    differing = 0
    for message in mixed_log(Random(7)):
        if isinstance(message, Change):
            if message.threshold is not None:
                matcher.change(*message)
            continue
        passed = set(matcher.image(message.client, message.at, message.red))
        differing += judged.setdefault(message, passed) != passed
    assert differing == 0


def test_a_new_subscription_sees_no_image_that_came_before_it_even_if_it_is_late() -> (
    None
):
    matcher = NAMES["Matcher"]()
    matcher.image(81, START, 9_000)
    matcher.change(81, "s", 1, 4_200, START - 500)
    assert (
        matcher.image(81, START, 9_000) == matcher.image(81, START - HOUR, 9_000) == []
    )


@pytest.mark.parametrize(("behind", "notified"), [(7 * DAY, ["s"]), (7 * DAY + 1, [])])
def test_an_image_more_than_seven_days_behind_the_newest_notifies_nobody(
    behind: int, notified: list[str]
) -> None:
    matcher = NAMES["Matcher"]()
    matcher.change(81, "s", 1, 4_200, START - 8 * DAY)
    matcher.image(1, START, 0)
    assert matcher.image(81, START - behind, 9_000) == notified


def test_a_change_that_the_outbox_repeats_after_a_deletion_does_not_bring_it_back() -> (
    None
):
    matcher = NAMES["Matcher"]()
    matcher.change(81, "s", 1, 4_200, START)
    matcher.change(81, "s", 2, None, START + 1)
    matcher.change(81, "s", 1, 4_200, START)
    assert matcher.image(81, START, 9_000) == matcher.image(81, START + 2, 9_000) == []


def test_active_from_is_never_before_the_request() -> None:
    matcher = NAMES["Matcher"](highest=START)
    assert matcher.change(81, "s", 1, 4_200, START + 700) == START + 700


# --- PostgreSQL -----------------------------------------------------------------------

POSTGRESQL = blocks("sql postgresql")
PREPARED = re.findall(
    r"^PREPARE .*?;$", "".join(b.code for b in POSTGRESQL), re.MULTILINE | re.DOTALL
)


def postgresql_binaries() -> Path | None:
    """The folder of initdb: on the path, or where Debian keeps it, newest version first."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max(
        (f.parent for f in folders), key=lambda f: int(f.parent.name), default=None
    )


class Cluster:
    """A throwaway PostgreSQL that listens on a socket in its own folder only."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        # Not below tmp_path: PostgreSQL refuses to run as root, and another user cannot
        # enter root's temporary folders.
        self.folder = Path(tempfile.mkdtemp(prefix="red-stats-"))
        self.user: str | None = None
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in known else "nobody"
            shutil.chown(self.folder, self.user)

    def command(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.binaries / program, "-D", self.folder / "data", *arguments],
            check=True,
            capture_output=True,
            cwd=self.folder,
            user=self.user,
        )

    def start(self) -> None:
        encoding = ("--locale=C", "--encoding=UTF8", "--auth=trust")
        self.command("initdb", *encoding, "--username=red", "--no-sync")
        settings = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        log = str(self.folder / "log")
        self.command(
            "pg_ctl", "start", "--wait", f"--options={settings}", f"--log={log}"
        )

    def stop(self) -> None:
        self.command("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(self.folder)

    def psql(self, database: str, sql: str) -> list[list[str]]:
        """Run `sql` in one session; return what it selects, values as text."""
        with self.popen(database, sql) as process:
            output, errors = process.communicate()
        assert not errors, errors
        assert process.returncode == 0
        return [line.split("\t") for line in output.splitlines()]

    def popen(self, database: str, sql: str) -> subprocess.Popen[str]:
        script = self.folder / f"{os.urandom(8).hex()}.sql"
        script.write_text(sql, encoding="utf-8")
        options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "red"]
        where = ["-h", str(self.folder), "-d", database]
        return subprocess.Popen(
            ["psql", *options, "-F", "\t", *where, "-f", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PGTZ": "UTC",
                "PGOPTIONS": "-c client_min_messages=error",
            },
        )


class Database:
    """One database of the cluster, with the document's tables, functions and statements."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def __call__(self, sql: str) -> list[list[str]]:
        return self.cluster.psql(self.name, "\n".join([*PREPARED, sql]))

    def together(self, *scripts: str) -> None:
        """Run the scripts in as many sessions at the same time."""
        running = [self.cluster.popen(self.name, script) for script in scripts]
        for process in running:
            with process:
                _, errors = process.communicate()
            assert not errors, errors
            assert process.returncode == 0


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    binaries = postgresql_binaries()
    if binaries is None or shutil.which("psql") is None:
        pytest.skip("PostgreSQL's initdb and psql are not installed")
    cluster = Cluster(binaries)
    cluster.start()
    cluster.psql("postgres", "CREATE DATABASE document")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def executed(cluster: Cluster) -> dict[int, str]:
    """Run the PostgreSQL blocks in one session, in order; block's line -> what went wrong."""
    script = "".join(
        f"\\echo ran {b.line}\n\\o /dev/null\n{b.code}\\o\n" for b in POSTGRESQL
    )
    with cluster.popen("document", script + "\\echo end\n") as process:
        output, errors = process.communicate()
    reached = output.splitlines()
    lines = [f"ran {b.line}" for b in POSTGRESQL] + ["end"]
    return {
        block.line: "" if following in reached else errors or "not reached"
        for block, following in zip(POSTGRESQL, lines[1:], strict=True)
    }


@pytest.fixture
def database(cluster: Cluster, executed: dict[int, str]) -> Iterator[Database]:
    """A copy of the database that the document's blocks made."""
    assert not any(executed.values())
    name = f"test_{os.urandom(4).hex()}"
    cluster.psql("postgres", f"CREATE DATABASE {name} TEMPLATE document")
    yield Database(cluster, name)
    cluster.psql("postgres", f"DROP DATABASE {name}")


@pytest.mark.parametrize("line", [block.line for block in POSTGRESQL])
def test_every_postgresql_block_runs(executed: dict[int, str], line: int) -> None:
    assert executed[line] == ""


def uuid(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012x}"


def append(client: int, number: int, subscription: int = 1) -> str:
    """SQL that appends image `number`, of that many seconds after the start."""
    time = f"timestamptz '2026-03-01Z' + interval '{number} seconds'"
    passed = f"array['{uuid(subscription)}']::uuid[]"
    return f"SELECT feed_append({client}, {time}, '{uuid(number)}', 5::smallint, {passed});"


def subscribe(client: int, subscription: int = 1, webhook: bool = False) -> str:
    sql = f"INSERT INTO feeds VALUES ({client}) ON CONFLICT DO NOTHING;"
    sql += f"INSERT INTO subscriptions VALUES ('{uuid(subscription)}', {client});"
    if webhook:
        columns = "subscription_id, client_id, url, secrets"
        values = (
            f"'{uuid(subscription)}', {client}, 'https://hooks.example.com/red', '{{}}'"
        )
        sql += f"INSERT INTO webhooks ({columns}) VALUES ({values});"
    return sql


def test_an_image_appended_again_stays_one_entry_and_uses_no_number(
    database: Database,
) -> None:
    database(subscribe(81))
    appended = database(append(81, 1) + append(81, 1) + append(81, 2))
    assert appended == [["1"], [""], ["2"]]
    assert [row[0] for row in database("EXECUTE pull(81, 0, 10);")] == ["1", "2"]


def test_concurrent_writers_number_a_feed_without_a_gap_or_a_double(
    database: Database,
) -> None:
    database(subscribe(81))
    writers = [range(300), range(150, 450), range(300, 600)]
    database.together(*("".join(append(81, n) for n in writer) for writer in writers))
    numbers = [int(row[0]) for row in database("EXECUTE pull(81, 0, 1000);")]
    assert numbers == list(range(1, 601))


def test_a_puller_gets_what_follows_its_cursor_and_nothing_of_other_clients(
    database: Database,
) -> None:
    database(subscribe(81) + subscribe(82, 2))
    database("".join(append(81, n) + append(82, n) for n in range(5)))
    pulled = database("EXECUTE pull(81, 2, 2);")
    assert [(row[0], row[1]) for row in pulled] == [("3", uuid(2)), ("4", uuid(3))]


def test_dropping_a_day_leaves_word_of_the_highest_number_gone(
    database: Database,
) -> None:
    database(subscribe(81) + append(81, 0) + append(81, 1) + append(81, 86_400))
    database("SELECT drop_feed_day('2026-03-01');")
    assert database("SELECT purged_to, last_seq FROM feeds;") == [["2", "3"]]
    assert [row[0] for row in database("EXECUTE pull(81, 2, 10);")] == ["3"]


def test_a_second_matcher_on_the_same_partition_moves_nothing(
    database: Database,
) -> None:
    database("INSERT INTO matchers VALUES (3, 100, '2026-03-01Z');")
    advance = "EXECUTE advance(3, 100, 150, '2026-03-02Z');"
    assert database(advance + advance) == [["3"]]


def test_a_matcher_cannot_take_back_how_far_a_dropped_day_moved_the_time(
    database: Database,
) -> None:
    database("INSERT INTO matchers VALUES (3, 100, '2026-03-01Z');")
    database("SELECT drop_feed_day('2026-03-01');")
    database("EXECUTE advance(3, 100, 150, '2026-03-02Z');")
    assert database("SELECT highest_at FROM matchers;") == [["2026-03-09 00:00:00+00"]]


def test_a_claimed_webhook_is_not_claimed_again_while_its_lease_lasts(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, 1))
    assert database("EXECUTE claim(10); EXECUTE claim(10);") == [
        [uuid(1), "1", "0", "0"]
    ]


def test_deliverers_at_the_same_time_claim_different_webhooks(
    database: Database,
) -> None:
    database(
        "".join(subscribe(n, n, webhook=True) + append(n, n, n) for n in range(1, 41))
    )
    claim = "\\o | cat >> {}\n" + "".join(PREPARED) + "EXECUTE claim(20);\n\\o\n"
    outputs = [database.cluster.folder / f"claimed-{n}" for n in (1, 2)]
    database.together(*(claim.format(output) for output in outputs))
    claimed = [line for output in outputs for line in output.read_text().splitlines()]
    assert (len(claimed), len({line.split("\t")[0] for line in claimed})) == (40, 40)


def test_a_batch_ends_where_it_ended_at_the_first_attempt(database: Database) -> None:
    database(subscribe(81, webhook=True) + append(81, 1) + append(81, 2))
    failed = f"EXECUTE failed('{uuid(1)}', 2, interval '0');"
    attempts = database(
        "EXECUTE claim(1);" + failed + append(81, 3) + "EXECUTE claim(1);"
    )
    assert attempts == [[uuid(1), "2", "0", "0"], ["3"], [uuid(1), "2", "1", "0"]]


def test_a_batch_holds_at_most_100_entries_of_its_own_subscription(
    database: Database,
) -> None:
    database(subscribe(81, 1, webhook=True) + subscribe(81, 2, webhook=True))
    database("".join(append(81, n, 1 + n % 2) for n in range(300)))
    ends = {row[0]: row[1] for row in database("EXECUTE claim(10);")}
    assert ends == {uuid(1): "199", uuid(2): "200"}


def test_after_the_last_attempt_a_webhook_is_suspended_where_it_stood(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, 1))
    database(f"EXECUTE claim(1); EXECUTE failed('{uuid(1)}', 1, NULL);" + append(81, 2))
    assert database("EXECUTE claim(1);") == []
    assert database("SELECT state, acked_seq FROM webhooks;") == [["suspended", "0"]]


def test_a_webhook_that_slept_through_a_purge_is_told_what_its_batch_follows_on(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, 1) + append(81, 86_400))
    database("SELECT drop_feed_day('2026-03-01');")
    assert database("EXECUTE claim(1);") == [[uuid(1), "2", "0", "1"]]


def test_webhooks_that_fail_at_random_get_every_entry_in_order(
    database: Database,
) -> None:
    random = Random(5)
    database(subscribe(81, webhook=True))
    received: list[int] = []
    for round_ in range(15):
        news = "".join(append(81, 10 * round_ + n) for n in range(random.randrange(4)))
        claimed = database(f"BEGIN; {news} COMMIT; SELECT 'claim'; EXECUTE claim(1);")
        for row in claimed[claimed.index(["claim"]) + 1 :]:
            batch_to, after = int(row[1]), int(row[3])
            outcome = random.choice(("delivered", "failed", "lost answer"))
            if outcome != "failed":
                new = range(max(after, *received[-1:], 0) + 1, batch_to + 1)
                received.extend(new)
            settle = {
                "delivered": f"EXECUTE delivered('{row[0]}', {batch_to});",
                "failed": f"EXECUTE failed('{row[0]}', {batch_to}, interval '0');",
                "lost answer": "UPDATE webhooks SET due_at = now();",  # the lease ran out
            }
            database(settle[outcome])
    ((acked,),) = database("SELECT acked_seq FROM webhooks;")
    assert received[: int(acked)] == list(range(1, int(acked) + 1)) != []


# --- The start with one PostgreSQL ----------------------------------------------------


def take(image: Image) -> str:
    values = f"{image.client}, '{rfc3339(image.at)}', '{image.image_id}', {image.red}::smallint"
    return f"SELECT coalesce(take({values}), 0);"


@pytest.fixture
def started(database: Database) -> Database:
    """The start version with days enough for the logs of these tests."""
    days = "SELECT open_day('{}', d::date) FROM generate_series({}, {}, '1 day') AS d;"
    first, last = "date '2026-03-17'", "date '2026-03-20'"
    database(
        days.format("images", first, last) + days.format("notifications", first, last)
    )
    return database


def test_the_start_version_counts_as_brute_force_does(started: Database) -> None:
    random = Random(11)
    log = make_log(random, make_images(random, 1000, days=3))
    started("BEGIN;" + "".join(take(image) for _, image in log) + "COMMIT;")
    questions = random_questions(random, 150, days=3)
    asked = "".join(
        f"EXECUTE statistics({client}, '{rfc3339(since)}', '{rfc3339(until)}', {above});"
        for client, since, until, above in questions
    )
    answers = [(int(images), int(redder)) for images, redder in started(asked)]
    assert answers == [
        brute_force({i for _, i in log}, *question) for question in questions
    ]


def test_the_start_version_notifies_as_the_matcher_does(started: Database) -> None:
    random = Random(12)
    subscriptions = {name: uuid(number) for number, name in enumerate("abc")}
    script: list[str] = []
    expected: dict[str, set[str]] = {}
    # Its order is per client, where a matcher's is per partition: one matcher for each client.
    matchers = {
        client: NAMES["Matcher"](highest=-1) for client in (81, 1, 2, 2**53 - 1)
    }
    for message in mixed_log(random):
        if isinstance(message, Image):
            matcher = matchers[message.client]
            passed = matcher.image(message.client, message.at, message.red)
            script.append(take(message))
            if passed:
                expected.setdefault(
                    message.image_id, {subscriptions[s] for s in passed}
                )
        elif message.threshold is not None and message.client == 81:
            name = message.subscription
            known = len(matchers[81].history.get(81, {}).get(name, []))
            if message.version != known + 1:
                continue
            matchers[81].change(*message)
            subscription = subscriptions[name]
            time = rfc3339(message.requested_at)
            values = f"81, '{subscription}', {message.threshold}::smallint, '{time}'"
            script.append(f"SELECT set_threshold({values});")
    started("BEGIN;" + "".join(script) + "COMMIT;")
    rows = started(
        "SELECT image_id, array_to_string(subscription_ids, ' ') FROM notifications;"
    )
    assert {image: set(ids.split()) for image, ids in rows} == expected != {}


def test_a_late_image_of_a_dropped_day_is_counted_but_notifies_nobody(
    started: Database,
) -> None:
    started("SELECT set_threshold(81, gen_random_uuid(), 5::smallint, '2026-02-28Z');")
    started("SELECT drop_feed_day('2026-03-01');")
    first, last = (Image(81, START + n, uuid(n), 9000) for n in (1, DAY))
    assert started(take(first) + take(last)) == [["0"], ["1"]]
    counted = "EXECUTE statistics(81, '2026-03-01Z', '2026-03-02Z', 0);"
    assert started(counted) == [["1", "1"]]


def test_the_start_version_refuses_an_erased_client_also_while_it_is_being_erased(
    started: Database,
) -> None:
    images = [
        Image(client, START + n, uuid(n), 9) for client in (81, 1) for n in (1, 2)
    ]
    started("".join(take(image) for image in images))
    news = "".join(take(Image(81, START + n, uuid(n), 9)) for n in range(2, 300))
    erase = "SELECT pg_sleep(0); SELECT erase_client(81);"
    started.together(news, erase, news)
    started(take(images[0]))
    tables = ("images", "day_counts", "feeds", "notifications")
    counts = "".join(f"SELECT count(*) FROM {t} WHERE client_id = 81;" for t in tables)
    assert started(counts) == [["0"]] * 4
    whole = "EXECUTE statistics(1, '2026-03-01Z', '2026-03-02Z', 0);"
    assert started(whole) == [["2", "2"]]


# --- What RED sent and what arrived ---------------------------------------------------


def test_numbers_that_never_arrived_are_found_and_no_others(database: Database) -> None:
    random = Random(3)
    outboxes = [uuid(number) for number in range(3)]
    lost = {(outboxes[0], 1), (outboxes[0], 40), (outboxes[1], 77)}
    batches = []
    for outbox in outboxes:
        first = 1
        while first < 100:
            end = first + random.randrange(10)
            batches += [(outbox, first, end)] * random.choice((1, 1, 2))
            first = end + 1
    random.shuffle(batches)
    for outbox, number in lost:
        batches = [
            part
            for name, first, end in batches
            for part in (
                [(name, first, number - 1), (name, number + 1, end)]
                if name == outbox and first <= number <= end
                else [(name, first, end)]
            )
            if part[1] <= part[2]
        ]
    database("".join(f"EXECUTE receive('{o}', {a}, {b});" for o, a, b in batches))
    found = database("EXECUTE missing;")
    assert {(outbox, int(first)) for outbox, first, _ in found} == lost
    assert all(first == last for _, first, last in found)


# --- The interface --------------------------------------------------------------------

REQUEST = re.compile(r"(GET|POST|PATCH|DELETE) (\S+) HTTP/1\.1")
ANSWER = re.compile(r"HTTP/1\.1 (\d{3}) ")


class Example(NamedTuple):
    """An example of the text. An answer knows the request before it."""

    line: int
    status: str  # "" in a request
    method: str
    target: str
    headers: dict[str, str]
    body: str


def examples() -> list[Example]:
    """The HTTP messages of the text; a block may hold several, each with its own head."""
    found: list[Example] = []
    for block in blocks("http"):
        messages = re.split(r"^(?=[A-Z]+ /|HTTP/1)", block.code, flags=re.MULTILINE)
        for message in filter(None, messages):
            head, _, body = message.partition("\n\n")
            first, *lines = head.splitlines()
            pairs = (line.split(": ", 1) for line in lines)
            headers = {name.lower(): value for name, value in pairs}
            line = block.line + block.code[: block.code.index(message)].count("\n")
            if request := REQUEST.fullmatch(first):
                method, target, status = request[1], request[2], ""
            else:
                answer = ANSWER.match(first)
                assert answer, f"line {line}: neither a request nor an answer"
                method, target, status = found[-1].method, found[-1].target, answer[1]
            body = body.strip("\n")
            found.append(Example(line, status, method, target, headers, body))
    return found


EXAMPLES = examples()


@pytest.fixture(scope="session")
def interface() -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (fragment,) = blocks("yaml")
    return yaml.safe_load(fragment.code)


@pytest.fixture(scope="session")
def check(interface: Any) -> Callable[[Any, Any], None]:
    """Hold an instance against a schema of the fragment, with its $refs and formats."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

    def validate(instance: Any, schema: Any) -> None:
        validator = jsonschema.Draft202012Validator(
            {**schema, "components": interface["components"]},
            format_checker=jsonschema.FormatChecker(),
        )
        assert [error.message for error in validator.iter_errors(instance)] == []

    return validate


def resolve(interface: Any, node: Any) -> Any:
    while "$ref" in node:
        found = interface
        for key in node["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        node = found
    return node


def operation(interface: Any, example: Example) -> tuple[Any, dict[str, str]]:
    """The operation an example belongs to, and its parameters by name, as written."""
    url = urlsplit(example.target)
    values = dict(parse_qsl(url.query)) | {k: v for k, v in example.headers.items()}
    if "webhook-id" in example.headers:
        return interface["webhooks"]["images.red"]["post"], values
    for path, item in interface["paths"].items():
        names = re.findall(r"\{(\w+)\}", path)
        if match := re.fullmatch(re.sub(r"\{\w+\}", "([^/]+)", path), url.path):
            return item[example.method.lower()], values | dict(
                zip(names, match.groups())
            )
    raise AssertionError(
        f"line {example.line}: no operation {example.method} {url.path}"
    )


def test_the_openapi_fragment_is_valid(interface: Any) -> None:
    validator = pytest.importorskip(
        "openapi_spec_validator", reason="openapi-spec-validator is not installed"
    )
    validator.validate(interface)


def at_line(example: Example) -> str:
    return f"line {example.line}"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.status], ids=at_line)
def test_every_example_request_fits_the_interface(
    interface: Any, check: Callable[[Any, Any], None], example: Example
) -> None:
    found, values = operation(interface, example)
    parameters = [resolve(interface, p) for p in found.get("parameters", [])]
    for parameter in parameters:
        text = values.pop(parameter["name"].lower(), None)
        if text is None:
            text = values.pop(parameter["name"], None)
        assert text is not None or not parameter.get("required"), parameter["name"]
        if text is not None:
            schema = resolve(interface, parameter["schema"])
            check(int(text) if schema.get("type") == "integer" else text, schema)
    allowed = {"content-type", "host", "subscription_id"}
    assert set(values) <= allowed, "a parameter that the interface does not have"
    if "requestBody" in found:
        content = found["requestBody"]["content"][example.headers["content-type"]]
        check(json.loads(example.body), content["schema"])
    else:
        assert example.body == ""


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.status], ids=at_line)
def test_every_example_answer_fits_the_interface(
    interface: Any, check: Callable[[Any, Any], None], example: Example
) -> None:
    found, _ = operation(interface, example)
    responses = found["responses"]
    answer = resolve(interface, responses.get(example.status) or responses["default"])
    content = answer["content"][example.headers["content-type"]]
    if example.headers["content-type"] == "text/event-stream":
        events = re.findall(
            r"^id: (\d+)\nevent: (\w+)\ndata: (.*)$", example.body, re.MULTILINE
        )
        assert [name for _, name, _ in events] == ["notification"]
        for id_, _, data in events:
            check(json.loads(data), {"$ref": "#/components/schemas/FeedEntry"})
            assert int(id_) == json.loads(data)["seq"]
    else:
        check(json.loads(example.body), content["schema"])


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        ("NewSubscription", {"threshold_bp": 10_000}),
        ("NewSubscription", {"threshold_bp": 42.17}),
        (
            "NewSubscription",
            {"threshold_bp": 5, "webhook": {"url": "http://example.com"}},
        ),
        ("NewSubscription", {"threshold_bp": 5, "thresold": 6}),
        ("SubscriptionChange", {"threshold_bp": -1}),
        ("Time", "2026-03-01T00:00:00.0001Z"),
        ("Time", "2026-03-01T00:00:00"),
        ("BasisPoints", 10_001),
    ],
)
def test_the_interface_refuses_what_the_text_says_it_refuses(
    check: Callable[[Any, Any], None], schema: str, instance: Any
) -> None:
    with pytest.raises(AssertionError):
        check(instance, {"$ref": f"#/components/schemas/{schema}"})


def test_the_example_webhook_is_signed_with_the_example_secret() -> None:
    (webhook,) = [e for e in EXAMPLES if "webhook-signature" in e.headers]
    (secret,) = re.findall(r'"secret": "(whsec_[^"]+)"', TEXT)
    timestamp = int(webhook.headers["webhook-timestamp"])
    signed = NAMES["sign"](
        secret, webhook.headers["webhook-id"], timestamp, webhook.body.strip().encode()
    )
    assert webhook.headers["webhook-signature"] == signed


def test_the_example_message_has_the_time_that_is_inside_its_id(
    check: Callable[[Any, Any], None],
) -> None:
    (posted,) = [e for e in EXAMPLES if "messages" in e.target and not e.status]
    message = json.loads(posted.body)["messages"][0]
    check(message, {"$ref": "#/components/schemas/Message"})
    inside = int(message["image_id"].replace("-", "")[:12], 16)
    assert rfc3339(inside) == message["at"]


# --- The text -------------------------------------------------------------------------


def anchors() -> set[str]:
    """GitHub's anchors of the headings, and those that the text sets itself."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    slugs = (
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    )
    return {*slugs, *re.findall(r'<a id="([^"]+)">', prose)}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(#([^)]*)\)", TEXT))))
def test_every_internal_link_leads_somewhere(target: str) -> None:
    assert target in anchors()


def test_every_block_is_of_a_kind_that_is_executed_or_rendered() -> None:
    infos = re.findall(r"^```([^\n`]*)$", TEXT, re.MULTILINE)[::2]
    assert set(infos) == {
        "mermaid",
        "python",
        "http",
        "yaml",
        "sql postgresql",
        "sql clickhouse",
    }


def test_the_blocks_found_are_all_the_blocks_there_are() -> None:
    infos = re.findall(r"^```([^\n`]*)$", TEXT, re.MULTILINE)[::2]
    found: list[Block] = [block for info in set(infos) for block in blocks(info)]
    assert len(found) == len(infos)
