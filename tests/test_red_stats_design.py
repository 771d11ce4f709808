"""Execute the claims of red_stats_design.md: what is tested is the text of the document itself."""

import json
import re
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
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
from red_stats_postgresql import POSTGRESQL, Cluster, Database, postgresql_binaries

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


def test_the_sizes_on_the_first_page_are_those_of_the_load_model() -> None:
    first_page = TEXT.partition("\n### ")[0]
    rows = re.findall(r"^\| (\w+) \| ([\d |]+) \| .* \|$", first_page, re.MULTILINE)
    assert [size for size, _ in rows] == list(NAMES["SIZES"])
    for size, row in rows:
        rate, clients, servers, dollars = (
            int(cell.replace(" ", "")) for cell in row.split(" | ")
        )
        assert (rate, clients) == (NAMES["SIZES"][size], NAMES["CLIENTS"][size])
        if size == "start":
            assert dollars == NAMES["START_DOLLARS"]
        else:
            assert servers == sum(NAMES["servers"](NAMES["loads"][size]).values())
            assert dollars == pytest.approx(sum(NAMES["dollars"](size)), rel=0.01)


@pytest.mark.parametrize("size", ["popular", "internet"])
def test_no_server_of_the_load_model_carries_more_than_it_is_said_to(size: str) -> None:
    load, servers = NAMES["loads"][size], NAMES["servers"](NAMES["loads"][size])
    for kind, what, times, carried, least, of_one in NAMES["CARRIES"]:
        units = servers[kind] // of_one
        assert units >= least and times * load[what] <= units * carried


INTERNET = NAMES["servers"](NAMES["loads"]["internet"])
CAPACITY = {(kind, what): one for kind, what, _, one, _, _ in NAMES["CARRIES"]}
EACH = NAMES["load"](
    1, 4
)  # of one image a second, with the clients of the popular size
DISK = "TB of them in 400 days, 1 copy"


@pytest.mark.parametrize(
    ("sentence", "figure"),
    [
        ("POSTs ({} PostgreSQL pairs", INTERNET["PostgreSQL"] // 2),
        (", {} deliverers)", INTERNET["deliverer"]),
        ("events ({} ClickHouse pairs)", INTERNET["ClickHouse"] // 2),
        (
            "mean above {} images/s, or disk above 70 %",
            CAPACITY["ClickHouse", DISK] / EACH[DISK] // 100 * 100,
        ),
        (
            "mean above {} images/s | 2 000 POSTs/s at peak",
            2_000 / EACH["webhook POSTs/s, peak"] // 1_000 * 1_000,
        ),
        ("500 × 259 200 s × 118 B = {} GB", 500 * 72 * 3600 * NAMES["MESSAGE"] / 1e9),
        ("345.6 million × 194 B = {} GB", 10 * 400 * 86_400 * 194 / 1e9),
        ("100 images/s for a week | {} GB in 400 days", 100 * 400 * 86_400 * 194 / 1e9),
        ("would be {} cores", 20 * 10_000 * 3_600 / NAMES["SCAN"]),
        ("one every {} s is what the limit allows", 36e6 / NAMES["SCAN"] / 2),
        ("writes {} entries a minute instead", 1_000 + 2 * 60),
        ("takes {} times as many", 100 / 0.2 * 60 / 1_120),
        ("within [{} hours]", sum(NAMES["RETRY_S"]) / 3600),
        ("as {} billion members in memory", 5_000 * 400 * 86_400 / 1e9),
        (
            "at the start and {} million at popular",
            5_000 * NAMES["NOTIFIED"] * NAMES["FAN_OUT"] * 30 * 86_400 / 1e6,
        ),
        ("4 TB are about ${} a month", round(2 * (8 * 218 + 3.8 * 51), -2)),
        ("([{} from the other server", NAMES["restore_h"](14, 1_000_000 / 55, 1e9, 0)),
        (", {} from a backup]", NAMES["restore_h"](14, 1_000_000 / 55, 0.5e9, 24)),
    ],
)
def test_the_figures_of_the_text_follow_from_the_model(
    sentence: str, figure: float
) -> None:
    shown = f"{round(figure):,}".replace(",", " ")
    assert sentence.format(shown) in " ".join(TEXT.split())


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
    before = engine.run("checksum", day=START)
    engine.query("OPTIMIZE TABLE events FINAL")
    merged = engine.run("checksum", day=START)
    engine.query(
        "INSERT INTO events SELECT client_id, at, image_id, red_bp + 1 FROM events"
        " WHERE toDate(at) = '2026-03-01' AND red_bp < 10000 LIMIT 1"
    )
    changed = engine.run("checksum", day=START)
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


def mixed_log(random: Random) -> list[tuple[int, Image | Change]]:
    """(arrival, image or change); some changes are repeated."""
    log: list[tuple[int, Image | Change]] = []
    versions: dict[tuple[int, str], list[Change]] = {}
    for arrived, image in make_log(random, make_images(random, 600, days=10)):
        log.append((arrived, image))
        if random.random() < 0.2:
            client, subscription = random.choice((81, 1, 2)), random.choice("abc")
            history = versions.setdefault((client, subscription), [])
            if history and (random.random() < 0.2 or history[-1].threshold is None):
                log.append((arrived, random.choice(history)))  # the outbox repeats it
                continue
            deleted = bool(history) and random.random() < 0.05
            threshold = None if deleted else random.choice(EDGES[:-1])
            asked = arrived - random.randrange(-500, 5000)
            history.append(
                Change(client, subscription, len(history) + 1, threshold, asked)
            )
            log.append((arrived, history[-1]))
    return log


@pytest.mark.parametrize("seed", range(5))
def test_the_matcher_notifies_the_versions_in_force_at_the_time_of_the_image(
    seed: int,
) -> None:
    matcher = NAMES["Matcher"]()
    # (client, subscription) -> the promise: [(active_from, threshold), ...]
    promised: dict[tuple[int, str], list[tuple[int, int | None]]] = {}
    notified: list[list[str]] = []
    expected: list[list[str]] = []
    for arrived, message in mixed_log(Random(seed)):
        if isinstance(message, Change):
            client, subscription, version, threshold, _ = message
            active_from = matcher.change(*message)
            versions = promised.setdefault((client, subscription), [])
            if version > len(versions):
                versions.append((active_from, threshold))
            continue
        notified.append(
            sorted(matcher.image(message.client, message.at, message.red, arrived))
        )
        expected.append([])
        for (client, subscription), versions in sorted(promised.items()):
            position = bisect_right(
                [active_from for active_from, _ in versions], message.at
            )
            in_force = versions[position - 1][1] if position else None
            if (
                client == message.client
                and message.at >= arrived - 7 * DAY
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
    for arrived, message in mixed_log(Random(7)):
        if isinstance(message, Change):
            if message.threshold is not None:
                matcher.change(*message)
            continue
        passed = set(matcher.image(message.client, message.at, message.red, arrived))
        differing += judged.setdefault(message, passed) != passed
    assert differing == 0


def test_a_new_subscription_sees_no_image_that_came_before_it_even_if_it_is_late() -> (
    None
):
    matcher = NAMES["Matcher"]()
    matcher.image(81, START, 9_000, START)
    matcher.change(81, "s", 1, 4_200, START - 500)
    assert [
        matcher.image(81, at, 9_000, START + 1) for at in (START, START - HOUR)
    ] == [
        [],
        [],
    ]


@pytest.mark.parametrize(("late", "notified"), [(7 * DAY, ["s"]), (7 * DAY + 1, [])])
def test_an_image_that_arrives_more_than_seven_days_late_notifies_nobody(
    late: int, notified: list[str]
) -> None:
    matcher = NAMES["Matcher"]()
    matcher.change(81, "s", 1, 4_200, START - DAY)
    assert matcher.image(81, START, 9_000, START + late) == notified


@pytest.mark.parametrize("seed", range(5))
def test_of_versions_in_any_order_the_newest_holds_in_the_end(seed: int) -> None:
    random = Random(seed)
    changes = [Change(81, "s", n, 1000 * n, START + n) for n in range(1, 8)]
    shuffled = random.choices(changes, k=20) + changes[-1:]
    matcher = NAMES["Matcher"]()
    newest = 0
    for step, change in enumerate(shuffled):
        active_from = matcher.change(*change)
        assert active_from is not None or change.version < newest
        newest = max(newest, change.version)
        at = START + 100 * (step + 1)
        passed = [matcher.image(81, at, 1000 * newest + more, at) for more in (0, 1)]
        assert passed == [[], ["s"]]


def test_a_change_that_the_outbox_repeats_after_a_deletion_does_not_bring_it_back() -> (
    None
):
    matcher = NAMES["Matcher"]()
    matcher.change(81, "s", 1, 4_200, START)
    matcher.change(81, "s", 2, None, START + 1)
    matcher.change(81, "s", 1, 4_200, START)
    assert [matcher.image(81, START + n, 9_000, START) for n in (0, 2)] == [[], []]


def test_an_erased_client_is_notified_of_nothing() -> None:
    matcher = NAMES["Matcher"]()
    matcher.change(81, "s", 1, 4_200, START)
    matcher.erase(81)
    assert [matcher.image(81, START + n, 9_000, START) for n in (-1, 0)] == [[], []]


def test_a_partition_that_inherits_a_version_keeps_its_active_from() -> None:
    matcher = NAMES["Matcher"](highest=START + HOUR)
    assert matcher.change(81, "s", 3, 4_200, START, active_from=START + 5) == START + 5
    assert matcher.image(81, START + 5, 9_000, START) == ["s"]


def test_active_from_is_never_before_the_request() -> None:
    matcher = NAMES["Matcher"](highest=START)
    assert matcher.change(81, "s", 1, 4_200, START + 700) == START + 700


# --- PostgreSQL -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    binaries = postgresql_binaries()
    if binaries is None or shutil.which("psql") is None:
        pytest.skip("PostgreSQL's initdb and psql are not installed")
    cluster = Cluster(binaries)
    cluster.start()
    cluster.run("postgres", "CREATE DATABASE document")
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


@pytest.fixture(scope="session")
def template(cluster: Cluster, executed: dict[int, str]) -> str:
    """The name of the database that the document's blocks made, with a clock for tests."""
    assert not any(executed.values())
    cluster.run(
        "document",
        "CREATE OR REPLACE FUNCTION today() RETURNS date LANGUAGE sql AS"
        " $$ SELECT current_setting('test.today')::date $$;"
        "SELECT open_day('images', date '2026-03-17' + n) FROM generate_series(0, 3) AS n"
        " UNION ALL SELECT open_day(parent, date '2026-03-11' + n) FROM generate_series(0, 9)"
        " AS n, unnest(array['notifications', 'deliveries', 'attempts']) AS parent \\g /dev/null",
    )
    return "document"


@pytest.fixture(scope="session")
def make_database(cluster: Cluster, template: str) -> Iterator[Callable[[], Database]]:
    """Makes copies of the database that the document's blocks made."""
    made: list[Database] = []

    def make() -> Database:
        name = f"test_{len(made)}"
        cluster.run(
            "postgres",
            f"CREATE DATABASE {name} TEMPLATE {template};"
            f"ALTER DATABASE {name} SET test.today = '2026-03-01'",
        )
        made.append(Database(cluster, name))
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture(scope="session")
def shared_database(make_database: Callable[[], Database]) -> Database:
    return make_database()


@pytest.fixture
def database(shared_database: Database) -> Database:
    """The document's tables, empty. For tests that do not change the schema."""
    rows = shared_database(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition AND relname <> 'subscriptions';"
    )
    tables = ["subscriptions", *(name for (name,) in rows)]
    shared_database("".join(f"DELETE FROM {table};" for table in tables))
    shared_database(on(1))
    return shared_database


@pytest.mark.parametrize("line", [block.line for block in POSTGRESQL])
def test_every_postgresql_block_runs(executed: dict[int, str], line: int) -> None:
    assert executed[line] == ""


def uuid(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012x}"


def passing(client: int, number: int, *subscriptions: int) -> str:
    """SQL of image `number`, 10 ms after the one before, which passed `subscriptions`."""
    time = f"timestamptz '2026-03-01Z' + interval '{10 * number} ms'"
    passed = ",".join(f"'{uuid(s)}'" for s in subscriptions or (1,))
    return f"({client}, {time}, '{uuid(number)}', 5, array[{passed}]::uuid[])::passing"


def append(client: int, numbers: Iterable[int], *subscriptions: int) -> str:
    """SQL that appends these images as one batch."""
    batch = ",".join(passing(client, n, *subscriptions) for n in numbers)
    return f"SELECT feed_append(array[{batch}]::passing[]);"


def on(day: int) -> str:
    """SQL that sets the clock to that day of March."""
    return f"SET test.today = '2026-03-{day:02}';"


URL = "https://hooks.example.com/red"


def subscribe(client: int, subscription: int = 1, webhook: bool = False) -> str:
    sql = f"INSERT INTO feeds VALUES ({client}) ON CONFLICT DO NOTHING;"
    sql += f"INSERT INTO subscriptions VALUES ('{uuid(subscription)}', {client});"
    return sql + (add_webhook(subscription) if webhook else "")


def add_webhook(subscription: int) -> str:
    """SQL that makes a webhook and has it pass its test."""
    add = f"SELECT add_webhook('{uuid(subscription)}', '{URL}', 'one') \\g /dev/null\n"
    return add + report_test(subscription, "true, 200")


def report_test(subscription: int, outcome: str, url: str = URL) -> str:
    return f"EXECUTE tested('{uuid(subscription)}', '{url}', {outcome}, NULL);"


def numbers(rows: list[list[str]]) -> list[int]:
    """The `seq` of what was pulled; nothing of a row without an entry."""
    return [int(row[1]) for row in rows if row[1]]


# --- The feed


def test_an_image_appended_again_stays_one_entry_and_uses_no_number(
    database: Database,
) -> None:
    database(subscribe(81))
    appended = database(append(81, [1, 1]) + append(81, [1]) + append(81, [1, 2]))
    assert appended == [["1"], ["0"], ["1"]]
    assert numbers(database("EXECUTE pull(81, 0, 10);")) == [1, 2]


def test_an_image_appended_again_a_week_later_stays_one_entry(
    database: Database,
) -> None:
    database(subscribe(81) + append(81, [1]))
    assert database(on(8) + append(81, [1])) == [["0"]]


def test_a_batch_is_numbered_in_its_own_order_for_each_client(
    database: Database,
) -> None:
    database(subscribe(81) + subscribe(82, 2))
    batch = ",".join(passing(c, n) for c, n in ((81, 9), (82, 5), (81, 3), (82, 4)))
    database(f"SELECT feed_append(array[{batch}]);")
    pulled = [database(f"EXECUTE pull({client}, 0, 9);") for client in (81, 82)]
    assert [[(int(r[1]), r[2]) for r in rows] for rows in pulled] == [
        [(1, uuid(9)), (2, uuid(3))],
        [(1, uuid(5)), (2, uuid(4))],
    ]


def test_concurrent_writers_number_a_feed_without_a_gap_or_a_double(
    database: Database,
) -> None:
    database(subscribe(81))
    writers = [range(300), range(150, 450), range(300, 600)]
    database.together(
        *(
            "".join(append(81, writer[n : n + 10]) for n in range(0, 300, 10))
            for writer in writers
        )
    )
    assert numbers(database("EXECUTE pull(81, 0, 1000);")) == list(range(1, 601))


def test_writers_of_the_same_clients_in_opposite_orders_do_not_deadlock(
    database: Database,
) -> None:
    database("".join(subscribe(client, client) for client in range(1, 21)))

    def script(clients: Sequence[int], first: int) -> str:
        batches = (
            ",".join(passing(client, n, client) for client in clients)
            for n in range(first, first + 40)
        )
        return "".join(f"SELECT feed_append(array[{batch}]);" for batch in batches)

    database.together(script(range(1, 21), 0), script(range(20, 0, -1), 100))
    assert database("SELECT DISTINCT last_seq FROM feeds;") == [["80"]]


def test_a_puller_gets_what_follows_its_cursor_and_nothing_of_other_clients(
    database: Database,
) -> None:
    database(subscribe(81) + subscribe(82, 2))
    database(append(81, range(5)) + append(82, range(5)))
    pulled = database("EXECUTE pull(81, 2, 2);")
    assert [(row[1], row[2]) for row in pulled] == [("3", uuid(2)), ("4", uuid(3))]


def test_a_puller_learns_with_the_entries_which_of_them_are_gone(
    make_database: Callable[[], Database],
) -> None:
    database = make_database()
    database(subscribe(81) + append(81, [1, 2]) + on(2) + append(81, [3]))
    database(on(9) + "SELECT retire_feed_day('2026-03-01');")
    assert [row[:2] for row in database("EXECUTE pull(81, 0, 1);")] == [["2", "1"]]
    database("SELECT drop_feed_day('2026-03-01');")
    assert [row[:2] for row in database("EXECUTE pull(81, 0, 9);")] == [["2", "3"]]
    assert [row[:2] for row in database("EXECUTE pull(81, 3, 9);")] == [["2", ""]]


def test_an_entry_can_be_pulled_for_a_week_however_old_its_image_is(
    database: Database,
) -> None:
    database(subscribe(81) + on(8) + append(81, [1]))  # an image of March 1st
    assert "is not a week old" in database.error(
        on(15) + "SELECT retire_feed_day('2026-03-08');"
    )
    assert numbers(database(on(15) + "EXECUTE pull(81, 0, 9);")) == [1]
    database(on(16) + "SELECT retire_feed_day('2026-03-08');")
    assert database("SELECT purged_to FROM feeds;") == [["1"]]


def test_readers_beside_writers_and_a_purge_miss_no_entry_without_being_told(
    database: Database,
) -> None:
    database(subscribe(81) + append(81, range(500)) + on(2) + append(81, [500]))
    write = on(9) + "".join(append(81, [n]) for n in range(501, 700))
    purge = on(9) + "SELECT retire_feed_day('2026-03-01');"
    read = "EXECUTE pull(81, 0, 600); SELECT 'end';" * 60
    *_, rows = database.together(write, purge, read)
    pages: list[list[list[str]]] = [[]]
    for row in rows:
        if row == ["end"]:
            pages.append([])
        else:
            pages[-1].append(row)
    found = [(int(page[0][0]), numbers(page)) for page in pages[:-1]]
    assert len(found) == 60
    for purged_to, seen in found:
        assert purged_to in (0, 500)
        assert seen == list(range(1, len(seen) + 1))


# --- More entries than anybody reads


def test_of_a_minute_only_so_many_images_get_entries_and_the_others_share_one(
    database: Database,
) -> None:
    database(subscribe(81) + "UPDATE feeds SET entries_a_minute = 3;")
    database(append(81, [1, 2]) + append(81, [3, 4, 5, 6], 2) + append(81, [7]))
    rows = database(
        "SELECT seq, image_id, images, extract(epoch FROM last_at - first_at) * 100,"
        " subscription_ids FROM notifications ORDER BY seq;"
    )
    assert [(row[0], row[1], row[2], round(float(row[3]))) for row in rows] == [
        ("1", uuid(1), "1", 0),
        ("2", uuid(2), "1", 0),
        ("3", uuid(3), "1", 0),
        ("4", uuid(4), "3", 2),  # 4, 5, 6
        ("5", uuid(7), "1", 0),  # beyond the limit, too, but alone
    ]
    assert rows[3][4] == "{" + uuid(2) + "}"


def test_a_digest_names_every_subscription_of_its_images(database: Database) -> None:
    database(subscribe(81) + "UPDATE feeds SET entries_a_minute = 0;")
    batch = ",".join([passing(81, 1, 1), passing(81, 2, 2, 3), passing(81, 3, 1)])
    database(f"SELECT feed_append(array[{batch}]);")
    ((ids,),) = database(
        "SELECT array_to_string(subscription_ids, ' ') FROM notifications;"
    )
    assert ids.split() == [uuid(1), uuid(2), uuid(3)]


def test_the_limit_goes_by_the_minute_of_the_image_and_by_client(
    database: Database,
) -> None:
    database(
        subscribe(81) + subscribe(82, 2) + "UPDATE feeds SET entries_a_minute = 2;"
    )
    minutes = [1, 2, 6001, 6002, 12001, 12002]  # ten milliseconds each: three minutes
    database(append(81, minutes) + append(82, minutes))
    assert database(
        "SELECT DISTINCT images, count(*) FROM notifications GROUP BY 1;"
    ) == [["1", "12"]]


@pytest.mark.parametrize("seed", range(3))
def test_every_image_that_passes_is_an_entry_or_counted_in_a_digest(
    database: Database, seed: int
) -> None:
    random = Random(seed)
    database(subscribe(81) + "UPDATE feeds SET entries_a_minute = 20;")
    images = random.sample(range(30_000), 300)  # five minutes
    while images:
        size = random.randrange(1, 60)
        database(append(81, images[:size]))
        images = images[size:]
    rows = database("SELECT seq, images, at FROM notifications ORDER BY seq;")
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(int(row[1]) for row in rows) == 300
    singles = Counter(row[2][:16] for row in rows if row[1] == "1")
    assert len(singles) == 5 and min(singles.values()) >= 20 and len(rows) < 150


# --- Subscriptions and matchers


def test_concurrent_changes_enter_the_outbox_in_the_order_of_their_versions(
    database: Database,
) -> None:
    change = f"SELECT request_change(81, '{uuid(1)}', 5::smallint, now(), '{{3}}');"
    database.together(*[change * 50] * 3)
    rows = database("SELECT change->>'version' FROM outbox ORDER BY id;")
    assert [int(version) for (version,) in rows] == list(range(1, 151))


def test_a_subscription_is_shown_as_active_once_every_matcher_has_taken_it_over(
    database: Database,
) -> None:
    subscription = f"'{uuid(1)}'"
    database(
        f"SELECT request_change(81, {subscription}, 5::smallint, now(), '{{3,7}}');"
    )
    shown = []
    for take_over in (
        "",
        f"EXECUTE take_over(3, {subscription}, 1, '2026-03-02Z');",
        f"EXECUTE take_over(7, {subscription}, 1, '2026-03-01Z');" * 2,
    ):
        shown += database(take_over + f"EXECUTE shown({subscription});")
    assert shown == [
        ["1", "5", ""],
        ["1", "5", ""],
        ["1", "5", "2026-03-02 00:00:00+00"],
    ]


def test_a_deletion_is_the_last_version_and_takes_the_webhook_with_it(
    database: Database,
) -> None:
    subscription = f"'{uuid(1)}'"
    change = f"SELECT request_change(81, {subscription}, {{}}::smallint, now(), '{{{{3}}}}');"
    webhook = f"SELECT add_webhook({subscription}, 'https://a.example', 'one');"
    database(change.format(5) + webhook)
    assert database(change.format("NULL") + change.format(6)) == [["2"], [""]]
    assert database("SELECT version, threshold_bp FROM thresholds ORDER BY 1;") == [
        ["1", "5"],
        ["2", ""],
    ]
    assert database("SELECT count(*) FROM webhooks;") == [["0"]]


def test_a_takeover_of_an_erased_subscription_is_passed_over(
    database: Database,
) -> None:
    assert database(f"EXECUTE take_over(3, '{uuid(1)}', 1, '2026-03-02Z');") == []


def test_a_second_matcher_on_the_same_partition_moves_nothing(
    database: Database,
) -> None:
    database("INSERT INTO matchers VALUES (3, 100, '2026-03-01Z');")
    advance = "EXECUTE advance(3, 100, 150, '2026-03-02Z');"
    assert database(advance + advance) == [["3"]]


class MatcherProcess:
    """A matcher of the document whose state is in PostgreSQL, and which may crash at any step."""

    def __init__(self, database: Database, partition: int) -> None:
        self.database = database
        self.partition = partition
        self.start()

    def start(self) -> None:
        ((offset, highest),) = self.database(
            "SELECT next_offset, to_char(highest_at, 'YYYY-MM-DD HH24:MI:SS.MS')"
            f" FROM matchers WHERE partition = {self.partition};"
        )
        self.next_offset = int(offset)
        self.matcher = NAMES["Matcher"](milliseconds(highest))
        for row in self.database(f"EXECUTE load({self.partition});"):
            client, subscription, version, threshold, active_from = row
            self.matcher.restore(
                int(client),
                subscription,
                int(version),
                int(threshold) if threshold else None,
                milliseconds(active_from.removesuffix("+00")),
            )

    def step(
        self, log: list[tuple[int, Image | Change]], size: int, crash: bool
    ) -> None:
        """Take a batch in one transaction; a crash rolls it back and forgets everything."""
        batch = log[self.next_offset : self.next_offset + size]
        entries, takeovers = [], []
        for arrived, message in batch:
            if isinstance(message, Change):
                active_from = self.matcher.change(*message)
                if active_from is not None:
                    takeovers.append(
                        f"EXECUTE take_over({self.partition}, '{message.subscription}',"
                        f" {message.version}, '{rfc3339(active_from)}');"
                    )
            elif passed := self.matcher.image(
                message.client, message.at, message.red, arrived
            ):
                ids = ",".join(f"'{s}'" for s in passed)
                entries.append(
                    f"({message.client}, '{rfc3339(message.at)}', '{message.image_id}',"
                    f" {message.red}, array[{ids}]::uuid[])::passing"
                )
        end = self.next_offset + len(batch)
        highest = rfc3339(self.matcher.highest)
        advanced = self.database(
            f"BEGIN; SELECT feed_append(array[{','.join(entries)}]::passing[]);"
            f"{''.join(takeovers)} EXECUTE advance({self.partition}, {self.next_offset},"
            f" {end}, '{highest}'); {'ROLLBACK' if crash else 'COMMIT'};"
        )
        if crash:
            self.start()
        else:
            assert advanced[-1] == [str(self.partition)]
            self.next_offset = end


@pytest.mark.parametrize("seed", range(4))
def test_a_matcher_that_crashes_at_random_writes_the_feed_of_one_that_does_not(
    database: Database, seed: int
) -> None:
    random = Random(seed)
    log = [
        (
            arrived,
            message._replace(
                subscription=uuid(
                    message.client * 3 + "abc".index(message.subscription)
                )
            )
            if isinstance(message, Change)
            else message,
        )
        for arrived, message in mixed_log(Random(seed))
    ]
    changes = [m for _, m in log if isinstance(m, Change)]
    script = "".join(f"INSERT INTO feeds VALUES ({c});" for c in (81, 1, 2, 2**53 - 1))
    for client, subscription in sorted({c[:2] for c in changes}):
        script += f"INSERT INTO subscriptions VALUES ('{subscription}', {client}) ON CONFLICT DO NOTHING;"
    script += "INSERT INTO matchers VALUES (3, 0, '1970-01-01Z');"
    for change in sorted(set(changes)):
        threshold = "NULL" if change.threshold is None else change.threshold
        script += (
            f"INSERT INTO thresholds VALUES ('{change.subscription}', {change.version},"
            f" {threshold}, now(), '{{3}}') ON CONFLICT DO NOTHING;"
        )
    database(script)
    process = MatcherProcess(database, 3)
    while process.next_offset < len(log):
        process.step(log, random.randint(1, 60), crash=random.random() < 0.4)
    matcher = NAMES["Matcher"]()
    expected: dict[str, set[str]] = {}
    for arrived, message in log:
        if isinstance(message, Change):
            matcher.change(*message)
        elif passed := matcher.image(message.client, message.at, message.red, arrived):
            expected.setdefault(message.image_id, set(passed))
    rows = database(
        "SELECT image_id, array_to_string(subscription_ids, ' ') FROM notifications;"
    )
    assert {image: set(ids.split()) for image, ids in rows} == expected
    assert len(expected) > 50


# --- Webhooks


def claim(database: Database, number: int = 10) -> list[tuple[str, int, int, int]]:
    """(subscription, end of the batch, attempt, missed) of what is claimed."""
    rows = database(f"EXECUTE claim({number});")
    return [(row[0], int(row[1]), int(row[2]), int(row[3])) for row in rows]


def failed(batch_to: int, delay: str = "interval '0'") -> str:
    return f"EXECUTE failed('{uuid(1)}', {batch_to}, {delay}, 503, 'unavailable');"


def delivered(batch_to: int, missed: int = 0) -> str:
    return f"EXECUTE delivered('{uuid(1)}', {batch_to}, {missed}, 200);"


def state(database: Database) -> list[list[str]]:
    return database("SELECT state, acked_seq, due_at IS NULL FROM webhooks;")


def test_a_claimed_webhook_is_not_claimed_again_while_its_lease_lasts(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    assert claim(database) + claim(database) == [(uuid(1), 1, 0, 0)]


def test_deliverers_at_the_same_time_claim_different_webhooks(
    database: Database,
) -> None:
    clients = range(1, 41)
    database(
        "".join(subscribe(n, n, webhook=True) + append(n, [n], n) for n in clients)
    )
    first, second = database.together(*["EXECUTE claim(20);"] * 2)
    assert (len(first + second), len({row[0] for row in first + second})) == (40, 40)


def test_a_batch_ends_where_it_ended_at_the_first_attempt(database: Database) -> None:
    database(subscribe(81, webhook=True) + append(81, [1, 2]))
    attempts = claim(database)
    database(failed(2) + append(81, [3]))
    assert attempts + claim(database) == [(uuid(1), 2, 0, 0), (uuid(1), 2, 1, 0)]
    rows = database(f"EXECUTE batch('{uuid(1)}');")
    assert [row[:2] for row in rows] == [["1", uuid(1)], ["2", uuid(2)]]


def test_a_batch_holds_at_most_100_entries_of_its_own_subscription(
    database: Database,
) -> None:
    database(subscribe(81, 1, webhook=True) + subscribe(81, 2, webhook=True))
    database("".join(append(81, [n], 1 + n % 2) for n in range(300)))
    ends = {row[0]: row[1] for row in claim(database)}
    assert ends == {uuid(1): 199, uuid(2): 200}
    assert len(database(f"EXECUTE batch('{uuid(1)}');")) == 100


def test_a_webhook_of_an_old_subscription_begins_at_the_end_of_the_feed(
    database: Database,
) -> None:
    database(subscribe(81) + append(81, [1, 2]))
    database(add_webhook(1))
    assert claim(database) == []
    database(append(81, [3]))
    assert claim(database) == [(uuid(1), 3, 0, 0)]
    assert [row[0] for row in database(f"EXECUTE batch('{uuid(1)}');")] == ["3"]


def test_after_the_last_attempt_a_webhook_is_suspended_where_it_stood(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    claim(database)
    database(failed(1, "NULL") + append(81, [2]))
    assert claim(database) == []
    assert state(database)[0][:2] == ["suspended", "0"]


@pytest.mark.parametrize("before", ["pending", "suspended"])
def test_a_test_message_that_succeeds_takes_a_webhook_up_where_it_stood(
    database: Database, before: str
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    database(f"UPDATE webhooks SET state = '{before}', attempt = 10;")
    assert claim(database) == []
    database(f"EXECUTE ask_test('{uuid(1)}');")
    ((_, url),) = database("EXECUTE claim_tests(9); EXECUTE claim_tests(9);")
    database(report_test(1, "false, 500", url))
    assert (state(database)[0][0], claim(database)) == (before, [])
    database(report_test(1, "true, 204", url))
    assert claim(database) == [(uuid(1), 1, 0, 0)]


def test_a_test_message_leaves_an_active_webhook_as_it_is(database: Database) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    claim(database)
    database(failed(1, "interval '1 hour'"))
    before = database("SELECT state, attempt, due_at, acked_seq FROM webhooks;")
    database(f"EXECUTE ask_test('{uuid(1)}'); EXECUTE claim_tests(9);")
    database(report_test(1, "true, 200"))
    assert database("SELECT state, attempt, due_at, acked_seq FROM webhooks;") == before


def test_a_test_of_the_old_url_does_not_make_the_new_one_active(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    database(f"EXECUTE change_webhook('{uuid(1)}', 'https://new.example', NULL);")
    database(report_test(1, "true, 200", URL))
    assert (state(database)[0][0], claim(database)) == ("pending", [])


def test_a_new_secret_signs_beside_the_old_one_for_a_day(database: Database) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    database(f"EXECUTE change_webhook('{uuid(1)}', NULL, 'two');")
    database(f"EXECUTE change_webhook('{uuid(1)}', NULL, 'three');")
    ((*_, both),) = database("EXECUTE claim(1);")
    due = "UPDATE webhooks SET due_at = now(), old_until = now(); EXECUTE claim(1);"
    ((*_, one),) = database(due)
    three, two = (rf"\\x{word.encode().hex()}" for word in ("three", "two"))
    assert both == f'{{"{three}","{two}"}}'
    assert one == f'{{"{three}"}}'


def test_every_attempt_and_every_test_is_in_the_log_with_its_status(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    claim(database)
    database(failed(1))
    claim(database)
    database(delivered(1))
    rows = database(
        "SELECT batch_to, attempt, status, error FROM attempts ORDER BY at;"
    )
    assert rows == [
        ["", "1", "200", ""],
        ["1", "1", "503", "unavailable"],
        ["1", "2", "200", ""],
    ]


def test_what_was_delivered_is_sent_again_on_request_and_not_what_is_gone(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]) + on(2) + append(81, [2, 3]))
    claim(database)
    database(delivered(3))
    database(on(9) + "SELECT retire_feed_day('2026-03-01');")
    resend = f"EXECUTE resend('{uuid(1)}', {{}});"
    assert database(resend.format(0) + resend.format(3) + resend.format(1)) == [["1"]]
    assert claim(database) == [(uuid(1), 3, 0, 0)]
    assert [row[0] for row in database(f"EXECUTE batch('{uuid(1)}');")] == ["2", "3"]


def test_a_webhook_is_told_how_many_of_its_own_entries_were_deleted_unsent(
    make_database: Callable[[], Database],
) -> None:
    database = make_database()
    database(subscribe(81, webhook=True) + append(81, [1, 2]) + on(2) + append(81, [3]))
    claim(database)
    database(failed(3) + on(9) + "SELECT retire_feed_day('2026-03-01');")
    database("SELECT drop_feed_day('2026-03-01');")
    assert claim(database) == [(uuid(1), 3, 1, 2)]
    assert [row[0] for row in database(f"EXECUTE batch('{uuid(1)}');")] == ["3"]
    database(delivered(3, missed=2) + append(81, [4]))
    assert claim(database) == [(uuid(1), 4, 0, 0)]


def test_what_is_settled_while_a_day_waits_to_be_retired_is_not_counted_as_missed(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, range(150)) + on(9))
    claim(database)
    database("BEGIN;" + delivered(100))  # not committed yet
    retire = on(9) + "SELECT retire_feed_day('2026-03-01');"
    with database.cluster.popen(database.name, retire) as process:
        blocked = (
            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%retire_feed_day%'"
        )
        database(
            f"DO $$ BEGIN WHILE NOT EXISTS ({blocked}) LOOP"
            " PERFORM pg_stat_clear_snapshot(), pg_sleep(0.001); END LOOP; END $$; COMMIT;"
        )
        process.communicate()
    assert database("SELECT acked_seq, missed FROM webhooks;") == [["150", "50"]]


def test_entries_of_other_subscriptions_that_are_deleted_raise_no_alarm(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    claim(database)
    database(delivered(1) + append(81, range(2, 50), 2))
    database(on(9) + "SELECT retire_feed_day('2026-03-01');" + append(81, [50]))
    assert claim(database) == [(uuid(1), 50, 0, 0)]


def test_a_webhook_whose_whole_batch_is_deleted_has_nothing_to_send(
    database: Database,
) -> None:
    database(subscribe(81, webhook=True) + append(81, [1]))
    claim(database)
    database(failed(1) + on(9) + "SELECT retire_feed_day('2026-03-01');")
    assert (claim(database), state(database)) == ([], [["active", "1", "t"]])
    database(delivered(1) + append(81, [2]))  # its answer comes too late to count
    assert claim(database) == [(uuid(1), 2, 0, 1)]


def test_a_quiet_subscription_is_claimed_without_reading_the_others_entries(
    database: Database,
) -> None:
    database(
        subscribe(81, 1, webhook=True) + "UPDATE feeds SET entries_a_minute = 9999;"
    )
    database(append(81, range(5_000), 2) + append(81, [5_000]) + "ANALYZE;")
    explained = "EXPLAIN (ANALYZE, BUFFERS, FORMAT json) EXECUTE claim(1);"
    (plan,) = json.loads("\n".join("\t".join(row) for row in database(explained)))
    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 100


@pytest.mark.parametrize("seed", range(3))
def test_webhooks_that_fail_at_random_get_every_entry_in_order(
    database: Database, seed: int
) -> None:
    random = Random(seed)
    database(subscribe(81, webhook=True))
    received: list[int] = []
    for round_ in range(40):
        database(append(81, range(10 * round_, 10 * round_ + random.randrange(4))))
        for subscription, batch_to, _, missed in claim(database):
            outcome = random.choice(("delivered", "failed", "lost answer"))
            if outcome != "failed":
                rows = database(f"EXECUTE batch('{subscription}');")
                received += [int(r[0]) for r in rows if int(r[0]) not in received]
            settle = {
                "delivered": delivered(batch_to, missed),
                "failed": failed(batch_to),
                "lost answer": "UPDATE webhooks SET due_at = now();",  # the lease ran out
            }
            database(settle[outcome])
    ((acked,),) = database("SELECT acked_seq FROM webhooks;")
    assert received[: int(acked)] == list(range(1, int(acked) + 1)) != []


def test_an_append_beside_a_settlement_is_not_forgotten(database: Database) -> None:
    database(subscribe(81, webhook=True))
    writer = "".join(append(81, [n]) for n in range(150))
    deliverer = (
        "EXECUTE claim(1); SELECT coalesce(batch_to, 0) AS batch FROM webhooks \\gset\n"
        f"EXECUTE delivered('{uuid(1)}', :batch, 0, 200);\n"
    )
    database.together(writer, deliverer * 100)
    ((head, acked, idle),) = database(
        "SELECT head_seq, acked_seq, due_at IS NULL FROM webhooks;"
    )
    assert (head, idle) == ("150", "t" if acked == head else "f")


class FeedModel:
    """What the document promises about one feed, its webhook and a puller, in plain Python."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.day = 1
        self.entries: list[tuple[int, bool]] = []  # day, whether it is the webhook's
        self.images = self.purged_to = self.acked = self.missed = self.cursor = 0
        self.state, self.attempt, self.batch = "active", 0, 0
        self.received: set[int] = set()
        database(subscribe(81, webhook=True) + subscribe(82, 2))

    def own(self, after: int, up_to: int | None = None) -> list[int]:
        """The webhook's entries with `seq` in that range that are not retired."""
        return [
            seq
            for seq, (day, own) in enumerate(self.entries, 1)
            if own and day > self.day - 8 and after < seq <= (up_to or seq)
        ]

    def append(self, random: Random) -> None:
        numbers = range(self.images, self.images + random.randrange(1, 60))
        subscription = random.choice((1, 1, 2))
        self.database(append(81, [*numbers, *numbers[:2]], subscription))
        self.images = numbers.stop
        self.entries += [(self.day, subscription == 1)] * len(numbers)

    def deliver(self, random: Random) -> None:
        self.database("UPDATE webhooks SET due_at = now() WHERE due_at IS NOT NULL;")
        claimed = claim(self.database)
        pending = self.own(self.acked)
        if self.state != "active" or not pending:
            assert claimed == []
            return
        batch_to = self.batch or pending[:100][-1]
        assert claimed == [(uuid(1), batch_to, self.attempt, self.missed)]
        rows = self.database(f"EXECUTE batch('{uuid(1)}');")
        assert [int(row[0]) for row in rows] == self.own(self.acked, batch_to)
        self.batch = batch_to
        outcome = random.choice(("2xx", "2xx", "lost", "503", "last"))
        if outcome in ("2xx", "lost"):
            self.received.update(int(row[0]) for row in rows)
        if outcome == "2xx":
            self.database(delivered(batch_to, self.missed))
            self.acked, self.missed, self.attempt, self.batch = batch_to, 0, 0, 0
        elif outcome in ("503", "last"):
            self.database(failed(batch_to, "NULL" if outcome == "last" else "'0'"))
            self.attempt += 1
            self.state = "suspended" if outcome == "last" else "active"

    def take_up(self, random: Random) -> None:
        self.database(report_test(1, "true, 200"))
        self.attempt = self.attempt if self.state == "active" else 0
        self.state = "active"

    def resend(self, random: Random) -> None:
        after = random.randrange(len(self.entries) + 1)
        allowed = self.state == "active" and self.purged_to <= after < self.acked
        rows = self.database(f"EXECUTE resend('{uuid(1)}', {after});")
        assert rows == ([[str(after)]] if allowed else [])
        if allowed:
            self.acked, self.attempt, self.batch = after, 0, 0

    def pass_day(self, random: Random) -> None:
        self.day += 1
        old = self.day - 8
        sql = on(self.day)
        if old >= 1:
            sql += f"SELECT retire_feed_day('2026-03-{old:02}') \\g /dev/null\n"
            gone = [n for n, (day, _) in enumerate(self.entries, 1) if day == old]
            unsent = [n for n in gone if self.entries[n - 1][1] and n > self.acked]
            self.purged_to = max([self.purged_to, *gone])
            self.missed += len(unsent)
            self.acked = max([self.acked, *unsent])
            if self.batch and self.batch <= self.acked:
                self.attempt = self.batch = 0
        self.database(sql)

    def pull(self, random: Random) -> None:
        rows = self.database(f"EXECUTE pull(81, {self.cursor}, 50);")
        purged_to = int(rows[0][0])
        assert purged_to == self.purged_to
        self.cursor = max(self.cursor, purged_to)  # 410 says so
        seen = [n for n in numbers(rows) if n > self.cursor]
        assert seen == list(range(self.cursor + 1, self.cursor + 1 + len(seen)))
        self.cursor += len(seen)


@pytest.mark.parametrize("seed", range(8))
def test_a_feed_its_webhook_and_its_puller_do_what_a_model_of_the_promises_does(
    database: Database, seed: int
) -> None:
    random = Random(seed)
    model = FeedModel(database)
    steps = (model.append, model.deliver, model.deliver, model.pull, model.take_up)
    for _ in range(90):
        random.choice((*steps, model.resend, model.pass_day))(random)
        if model.day == 20:
            break
    rows = database("SELECT state, acked_seq, missed FROM webhooks;")
    assert rows == [[model.state, str(model.acked), str(model.missed)]]
    assert model.received and model.entries


# --- Moving a feed

MOVED = ("feeds", "subscriptions", "thresholds", "takeovers", "webhooks")


def copy_feed(source: Database, target: Database, tables: Iterable[str]) -> None:
    """Copy rows of client 81 that the target does not have."""
    for table in tables:
        path = source.cluster.folder / f"{table}.copy"
        of_client = (
            "client_id = 81"
            if "client_id" in columns(source, table)
            else "subscription_id IN (SELECT subscription_id FROM subscriptions WHERE client_id = 81)"
        )
        source(f"\\copy (SELECT * FROM {table} WHERE {of_client}) TO '{path}'\n")
        target(
            f"CREATE TEMPORARY TABLE copied (LIKE {table});\n\\copy copied FROM '{path}'\n"
            f"INSERT INTO {table} SELECT * FROM copied ON CONFLICT DO NOTHING; DROP TABLE copied;"
        )


def columns(database: Database, table: str) -> set[str]:
    rows = database(
        "SELECT column_name FROM information_schema.columns"
        f" WHERE table_schema = 'public' AND table_name = '{table}';"
    )
    return {name for (name,) in rows}


def test_a_feed_moves_to_another_pair_without_losing_or_renumbering_an_entry(
    make_database: Callable[[], Database],
) -> None:
    old, new = make_database(), make_database()
    old(subscribe(81, webhook=True) + subscribe(82, 2) + append(81, range(10)))
    entries = ("notifications", "deliveries")
    copy_feed(old, new, entries)  # while it is in use:
    old(append(81, range(10, 20)))
    old("UPDATE feeds SET moved_to = 'pair 2' WHERE client_id = 81;")
    assert "moved: {81}" in old.error(append(81, [20]))
    assert "moved: {81}" in old.error(
        f"SELECT request_change(81, '{uuid(1)}', 5::smallint, now(), '{{3}}');"
    )
    assert (claim(old), old(append(82, [20], 2))) == ([], [["1"]])
    copy_feed(old, new, (*entries, *MOVED))
    new("UPDATE feeds SET moved_to = NULL;")
    new(append(81, range(15, 25)))  # the log again, from before the move
    assert claim(new) == [(uuid(1), 25, 0, 0)]
    rows = new("EXECUTE pull(81, 0, 99);")
    assert [(row[1], row[2]) for row in rows] == [
        (str(n + 1), uuid(n)) for n in range(25)
    ]


# --- The start with one PostgreSQL ----------------------------------------------------


def take(image: Image, arrived: int | None = None) -> str:
    values = f"{image.client}, '{rfc3339(image.at)}', '{image.image_id}', {image.red}::smallint"
    return f"SELECT take({values}, '{rfc3339(arrived or image.at)}');"


def test_the_start_version_counts_as_brute_force_does(database: Database) -> None:
    random = Random(11)
    log = make_log(random, make_images(random, 1000, days=3))
    database("BEGIN;" + "".join(take(image) for _, image in log) + "COMMIT;")
    questions = random_questions(random, 150, days=3)
    asked = "".join(
        f"EXECUTE statistics({client}, '{rfc3339(since)}', '{rfc3339(until)}', {above});"
        for client, since, until, above in questions
    )
    answers = [(int(images), int(redder)) for images, redder in database(asked)]
    assert answers == [
        brute_force({i for _, i in log}, *question) for question in questions
    ]


def test_the_start_version_notifies_as_the_matcher_does(database: Database) -> None:
    random = Random(12)
    subscriptions = {name: uuid(number) for number, name in enumerate("abc")}
    script: list[str] = []
    expected: dict[str, set[str]] = {}
    # Its order is per client, where a matcher's is per partition: one matcher for each client.
    matchers = {
        client: NAMES["Matcher"](highest=-1) for client in (81, 1, 2, 2**53 - 1)
    }
    for arrived, message in mixed_log(random):
        if isinstance(message, Image):
            matcher = matchers[message.client]
            passed = matcher.image(message.client, message.at, message.red, arrived)
            script.append(take(message, arrived))
            if passed:
                expected.setdefault(
                    message.image_id, {subscriptions[s] for s in passed}
                )
        elif message.client == 81:
            name = message.subscription
            known = len(matchers[81].history.get(81, {}).get(name, []))
            if message.version != known + 1:
                continue
            matchers[81].change(*message)
            threshold = "NULL" if message.threshold is None else message.threshold
            time = rfc3339(message.requested_at)
            values = f"81, '{subscriptions[name]}', {threshold}::smallint, '{time}'"
            script.append(f"SELECT set_threshold({values});")
    database("BEGIN;" + "".join(script) + "COMMIT;")
    rows = database(
        "SELECT image_id, array_to_string(subscription_ids, ' ') FROM notifications;"
    )
    assert {image: set(ids.split()) for image, ids in rows} == expected != {}


def test_batches_of_the_start_version_in_the_order_of_clients_do_not_deadlock(
    database: Database,
) -> None:
    images = [Image(client, START + client, uuid(client), 5) for client in range(40)]
    batch = "BEGIN;" + "".join(map(take, images)) + "COMMIT;"
    database.together(*[batch * 5] * 3)
    assert database("SELECT count(*), sum(images) FROM day_counts;") == [["40", "40"]]


@pytest.mark.parametrize("late", [7 * DAY, 7 * DAY + 1])
def test_at_the_start_an_image_a_week_late_is_counted_and_notifies_a_quiet_client_or_not(
    database: Database, late: int
) -> None:
    database("SELECT set_threshold(81, gen_random_uuid(), 5::smallint, '2026-02-28Z');")
    image = Image(81, START, uuid(1), 9000)
    assert database(take(image, START + late)) == [["1" if late == 7 * DAY else "0"]]
    counted = "EXECUTE statistics(81, '2026-03-01Z', '2026-03-02Z', 0);"
    assert database(counted) == [["1", "1"]]


def test_changes_of_the_start_version_are_in_the_outbox_and_change_nothing_again(
    database: Database,
) -> None:
    change = f"SELECT set_threshold(81, '{uuid(1)}', {{}}::smallint, '2026-02-28Z');"
    database(change.format(5) + change.format(6))
    rows = database("SELECT change->>'version' FROM outbox ORDER BY id;")
    assert rows == [["1"], ["2"]]
    again = f"SELECT coalesce(activate(81, '{uuid(1)}', {{}})::text, 'known');"
    assert database(again.format(1) + again.format(2)) == [["known"], ["known"]]


@pytest.mark.parametrize("seed", range(2))
def test_a_switch_from_the_start_version_to_matchers_loses_no_change_and_no_entry(
    database: Database, seed: int
) -> None:
    log = mixed_log(Random(seed))
    log = [(t, m) for t, m in log if m.client == 81]
    subscriptions = {name: uuid(number) for number, name in enumerate("abc")}
    step_1, step_5 = len(log) // 3, 2 * len(log) // 3
    script = ["BEGIN;"]
    known: Counter[str] = Counter()
    for position, (arrived, message) in enumerate(log[:step_5]):
        if isinstance(message, Image):
            script.append(take(message, arrived))
            continue
        name = message.subscription
        threshold = "NULL" if message.threshold is None else message.threshold
        values = f"81, '{subscriptions[name]}', {threshold}::smallint, '{rfc3339(message.requested_at)}'"
        if message.version > known[name]:
            known[name] = message.version
            if position < step_1:
                script.append(f"SELECT set_threshold({values});")
                continue
            script.append(f"SELECT request_change({values}, '{{3}}');")
        script.append(
            f"SELECT activate(81, '{subscriptions[name]}', {message.version});"
        )
    script.append("INSERT INTO matchers SELECT 3, 0, highest_at FROM feeds; COMMIT;")
    database("\n".join(script))
    rest = []
    for arrived, message in log[step_5:]:
        if isinstance(message, Change):
            name = message.subscription
            message = message._replace(subscription=subscriptions[name])
            if message.version > known[name]:
                known[name] = message.version
                threshold = "NULL" if message.threshold is None else message.threshold
                database(
                    f"SELECT request_change(81, '{message.subscription}',"
                    f" {threshold}::smallint, now(), '{{3}}');"
                )
        rest.append((arrived, message))
    process = MatcherProcess(database, 3)
    while process.next_offset < len(rest):
        process.step(rest, 20, crash=False)
    rows = database(
        "SELECT subscription_id, version, max(active_from) FROM takeovers GROUP BY 1, 2;"
    )
    active = {(s, int(v)): milliseconds(at.removesuffix("+00")) for s, v, at in rows}
    promised: dict[str, list[tuple[int, int | None]]] = {s: [] for s in "abc"}
    expected: dict[str, set[str]] = {}
    for arrived, message in log:
        if isinstance(message, Change):
            versions = promised[message.subscription]
            if message.version > len(versions):
                key = subscriptions[message.subscription], message.version
                versions.append((active[key], message.threshold))
            continue
        passed = set()
        for name, versions in promised.items():
            in_force = [value for since, value in versions if since <= message.at]
            holds = in_force[-1] if in_force else None
            deleted = bool(versions) and versions[-1][1] is None
            if holds is not None and not deleted and message.red > holds:
                passed.add(subscriptions[name])
        if passed and message.at >= arrived - 7 * DAY:
            expected.setdefault(message.image_id, passed)
    rows = database(
        "SELECT image_id, array_to_string(subscription_ids, ' ') FROM notifications;"
    )
    assert {image: set(ids.split()) for image, ids in rows} == expected
    assert len(active) > 10 and len(expected) > 50


def test_the_start_version_refuses_an_erased_client_also_while_it_is_being_erased(
    database: Database,
) -> None:
    images = [
        Image(client, START + n, uuid(n), 9) for client in (81, 1) for n in (1, 2)
    ]
    database("".join(take(image) for image in images))
    news = "".join(take(Image(81, START + n, uuid(n), 9)) for n in range(2, 300))
    erase = "SELECT pg_sleep(0); SELECT erase_client(81);"
    database.together(news, erase, news)
    change = f"SELECT set_threshold(81, '{uuid(1)}', 5::smallint, now());"
    assert database(take(images[0]) + change) == [[""], [""]]
    tables = ("images", "day_counts", "feeds", "notifications")
    counts = "".join(f"SELECT count(*) FROM {t} WHERE client_id = 81;" for t in tables)
    assert database(counts) == [["0"]] * 4
    whole = "EXECUTE statistics(1, '2026-03-01Z', '2026-03-02Z', 0);"
    assert database(whole) == [["2", "2"]]


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


SUBSCRIPTION = {
    "subscription_id": "5b0f7a52-8d1e-4d0e-9a55-0c8f6f7d2a10",
    "version": 1,
    "threshold_bp": 5,
    "active_from": None,
}


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        ("NewSubscription", {"threshold_bp": 10_000}),
        ("NewSubscription", {"threshold_bp": 42.17}),
        *(
            ("NewSubscription", {"threshold_bp": 5, "webhook": webhook})
            for webhook in (
                {"url": "http://example.com", "secret": "whsec_" + 32 * "a"},
                {"url": "https://example.com", "secret": "whsec_tooshort"},
                {"url": "https://example.com"},
            )
        ),
        ("Subscription", {**SUBSCRIPTION, "webhook": {"secret": "whsec_" + 32 * "a"}}),
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
