"""Execute the claims of red_stats_design.md: what is tested is the text of the document itself."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest
from red_stats_document import (
    TABLES,
    TEXT,
    ClickHouse,
    blocks,
    clickhouse_statements,
    milliseconds,
    rfc3339,
    run_python,
)
from red_stats_postgresql import POSTGRESQL, Cluster, Database, postgresql_binaries
from red_stats_scheduler import DAY, HOUR, START, Image, brute_force, uuid7

EDGES = (0, 4199, 4200, 4201, 9999, 10_000)  # many images lie exactly on a threshold
CLIENTS = (81, 1, 2, 2**53 - 1)

NAMES, COMPLAINTS = run_python()
doc = SimpleNamespace(**NAMES)  # what the document's Python defines


# --- The text -------------------------------------------------------------------------


def test_every_block_is_found_and_of_a_kind_that_is_executed_or_rendered() -> None:
    infos = re.findall(r"^```([^\n`]*)$", TEXT, re.MULTILINE)[::2]
    kinds = {"mermaid", "python", "http", "yaml", "sql postgresql", "sql clickhouse"}
    assert set(infos) == kinds
    assert sum(len(blocks(kind)) for kind in kinds) == len(infos)


@pytest.mark.parametrize("line", COMPLAINTS)
def test_every_python_block_runs_as_written(line: int) -> None:
    assert COMPLAINTS[line] == ""


def anchors() -> set[str]:
    """GitHub's anchors of the headings, and those that the text sets itself."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    slugs = (text.replace(" ", "-") for text in words)
    return {*slugs, *re.findall(r'<a id="([^"]+)">', prose)}


def test_every_internal_link_leads_somewhere() -> None:
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors()


# --- The sizes on the first page, and the load model ----------------------------------


def test_the_sizes_on_the_first_page_are_those_of_the_load_model() -> None:
    first_page = TEXT.partition("\n### ")[0]
    rows = re.findall(r"^\| (\w+) \| ([\d |]+) \| .* \|$", first_page, re.MULTILINE)
    assert [size for size, _ in rows] == list(doc.SIZES)
    for size, row in rows:
        rate, clients, servers, dollars = (
            int(cell.replace(" ", "")) for cell in row.split(" | ")
        )
        assert (rate, clients) == (doc.SIZES[size], doc.CLIENTS[size])
        if size == "start":
            assert dollars == doc.START_DOLLARS
        else:
            assert servers == sum(doc.servers(doc.loads[size]).values())
            assert dollars == pytest.approx(sum(doc.dollars(size)), rel=0.01)


@pytest.mark.parametrize("size", ["popular", "internet"])
def test_no_server_of_the_load_model_carries_more_than_it_is_said_to(size: str) -> None:
    load, servers = doc.loads[size], doc.servers(doc.loads[size])
    for kind, what, times, carried, least, of_one in doc.CARRIES:
        units = servers[kind] // of_one
        assert units >= least and times * load[what] <= units * carried


INTERNET = doc.servers(doc.loads["internet"])
CAPACITY = {(kind, what): one for kind, what, _, one, _, _ in doc.CARRIES}
EACH = doc.load(1, 4)  # of one image a second, with the clients of the popular size
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
        ("500 × 259 200 s × 118 B = {} GB", 500 * 72 * 3600 * doc.MESSAGE / 1e9),
        ("345.6 million × 194 B = {} GB", 10 * 400 * 86_400 * 194 / 1e9),
        ("100 images/s for a week | {} GB in 400 days", 100 * 400 * 86_400 * 194 / 1e9),
        ("would be {} cores", 20 * 10_000 * 3_600 / doc.SCAN),
        ("one every {} s is what the limit allows", 36e6 / doc.SCAN / 2),
        ("writes {} entries a minute instead", 1_000 + 2 * 60),
        ("takes {} times as many", 100 / 0.2 * 60 / 1_120),
        ("within [{} hours]", sum(doc.RETRY_S) / 3600),
        ("as {} billion members in memory", 5_000 * 400 * 86_400 / 1e9),
        (
            "at the start and {} million at popular",
            5_000 * doc.NOTIFIED * doc.FAN_OUT * 30 * 86_400 / 1e6,
        ),
        ("4 TB are about ${} a month", round(2 * (8 * 218 + 3.8 * 51), -2)),
        ("([{} from the other server", doc.restore_h(14, 1_000_000 / 55, 1e9, 0)),
        (", {} from a backup]", doc.restore_h(14, 1_000_000 / 55, 0.5e9, 24)),
    ],
)
def test_the_figures_of_the_text_follow_from_the_model(
    sentence: str, figure: float
) -> None:
    shown = f"{round(figure):,}".replace(",", " ")
    assert sentence.format(shown) in " ".join(TEXT.split())


# --- 2. The message from RED ----------------------------------------------------------


def test_a_rounded_up_share_is_more_than_a_threshold_exactly_if_the_share_is() -> None:
    random = Random(1)
    wrong = []
    for _ in range(20_000):
        whole = random.choice((7, 9_999, 10_000, 100_000, random.randint(1, 10**8)))
        red = random.choice((0, 1, whole, random.randint(0, whole)))
        rounded = doc.basis_points(red, whole)
        wrong += [
            (red, whole, threshold)
            for threshold in (rounded - 1, rounded, random.randint(0, 10_000))
            if (rounded > threshold) != (10_000 * red > threshold * whole)
        ]
    assert wrong == []


# --- 3. The interface, and its examples -----------------------------------------------

REQUEST = re.compile(r"(GET|POST|PATCH|DELETE) (\S+) HTTP/1\.1")
RESPONSE = re.compile(r"HTTP/1\.1 (\d{3}) ")


class Example(NamedTuple):
    """An HTTP message of the text. A response knows the request before it."""

    line: int
    status: str  # "" in a request
    method: str
    target: str
    headers: dict[str, str]
    body: str

    @property
    def media_type(self) -> str:
        return self.headers["content-type"]


def examples() -> Iterator[Example]:
    """The messages of the text; a block may hold several, each with its own head."""
    method = target = ""
    for block in blocks("http"):
        messages = re.split(r"^(?=[A-Z]+ /|HTTP/1)", block.code, flags=re.MULTILINE)
        for message in filter(None, messages):
            head, _, body = message.partition("\n\n")
            first, *lines = head.splitlines()
            pairs = (line.split(": ", 1) for line in lines)
            headers = {name.lower(): value for name, value in pairs}
            line = block.line + block.code[: block.code.index(message)].count("\n")
            status = ""
            if request := REQUEST.fullmatch(first):
                method, target = request[1], request[2]
            else:
                response = RESPONSE.match(first)
                assert response, f"line {line}: neither a request nor a response"
                status = response[1]
            yield Example(line, status, method, target, headers, body.strip("\n"))


EXAMPLES = list(examples())


@pytest.fixture(scope="session")
def interface() -> Any:
    """The OpenAPI description of the document."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (fragment,) = blocks("yaml")
    return yaml.safe_load(fragment.code)


Check = Callable[[Any, Any], None]


@pytest.fixture(scope="session")
def check(interface: Any) -> Check:
    """Hold an instance against a schema of the description, with its $refs and formats."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

    def validate(instance: Any, schema: Any) -> None:
        validator = jsonschema.Draft202012Validator(
            {**schema, "components": interface["components"]},
            format_checker=jsonschema.FormatChecker(),
        )
        assert [error.message for error in validator.iter_errors(instance)] == []

    return validate


def named(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}


def operation(interface: Any, example: Example) -> tuple[Any, dict[str, str]]:
    """The operation an example belongs to, and its parameters by name, as written."""
    url = urlsplit(example.target)
    values = dict(parse_qsl(url.query)) | example.headers
    if "webhook-id" in example.headers:
        return interface["webhooks"]["images.red"]["post"], values
    for path, item in interface["paths"].items():
        names = re.findall(r"\{(\w+)\}", path)
        if match := re.fullmatch(re.sub(r"\{\w+\}", "([^/]+)", path), url.path):
            in_path = dict(zip(names, match.groups(), strict=True))
            return item[example.method.lower()], values | in_path
    raise AssertionError(f"no operation {example.method} {url.path}")


def test_the_openapi_description_is_valid(interface: Any) -> None:
    validator = pytest.importorskip(
        "openapi_spec_validator", reason="openapi-spec-validator is not installed"
    )
    validator.validate(interface)


def at_line(example: Example) -> str:
    return f"line {example.line}"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.status], ids=at_line)
def test_every_example_request_fits_the_interface(
    interface: Any, check: Check, example: Example
) -> None:
    found, values = operation(interface, example)
    for parameter in found.get("parameters", []):
        name = parameter["name"]
        text = values.pop(name.lower() if parameter["in"] == "header" else name, None)
        assert text is not None or not parameter.get("required"), name
        if text is not None:
            schema = parameter["schema"]
            check(int(text) if schema.get("type") == "integer" else text, schema)
    allowed = {"content-type", "host", "subscription_id"}
    assert set(values) <= allowed, "a parameter that the interface does not have"
    if "requestBody" in found:
        content = found["requestBody"]["content"][example.media_type]
        check(json.loads(example.body), content["schema"])
    else:
        assert example.body == ""


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.status], ids=at_line)
def test_every_example_response_fits_the_interface(
    interface: Any, check: Check, example: Example
) -> None:
    responses = operation(interface, example)[0]["responses"]
    response = responses.get(example.status) or responses["default"]
    schema = response["content"][example.media_type]["schema"]
    if example.media_type != "text/event-stream":
        check(json.loads(example.body), schema)
        return
    event = re.fullmatch(r"id: (\d+)\nevent: notification\ndata: (.*)", example.body)
    assert event
    entry = json.loads(event[2])
    check(entry, named("FeedEntry"))
    assert entry["seq"] == int(event[1])


SECRET = "whsec_" + 32 * "a"
SUBSCRIPTION = {
    "subscription_id": "5b0f7a52-8d1e-4d0e-9a55-0c8f6f7d2a10",
    "version": 1,
    "threshold_bp": 5,
    "active_from": None,
}


def with_webhook(**webhook: str) -> dict[str, Any]:
    return {"threshold_bp": 5, "webhook": webhook}


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        ("NewSubscription", {"threshold_bp": 10_000}),
        ("NewSubscription", {"threshold_bp": 42.17}),
        ("NewSubscription", {"threshold_bp": 5, "thresold": 6}),
        ("NewSubscription", with_webhook(url="http://example.com", secret=SECRET)),
        ("NewSubscription", with_webhook(url="https://a.example", secret=SECRET[:-1])),
        ("NewSubscription", with_webhook(url="https://a.example")),
        ("SubscriptionChange", {"threshold_bp": -1}),
        ("Subscription", {**SUBSCRIPTION, "webhook": {"secret": SECRET}}),
        ("Time", "2026-03-01T00:00:00.0001Z"),
        ("Time", "2026-03-01T00:00:00"),
        ("BasisPoints", 10_001),
    ],
)
def test_the_interface_refuses_what_the_text_says_it_refuses(
    check: Check, schema: str, instance: Any
) -> None:
    with pytest.raises(AssertionError):
        check(instance, named(schema))


def test_the_example_message_has_the_time_that_is_inside_its_id(check: Check) -> None:
    (posted,) = [e for e in EXAMPLES if "messages" in e.target and not e.status]
    message = json.loads(posted.body)["messages"][0]
    check(message, named("Message"))
    inside = int(message["image_id"].replace("-", "")[:12], 16)
    assert rfc3339(inside) == message["at"]


def test_the_example_webhook_is_signed_with_the_example_secret() -> None:
    (webhook,) = [e for e in EXAMPLES if "webhook-signature" in e.headers]
    (secret,) = re.findall(r'"secret": "(whsec_[^"]+)"', TEXT)
    id_, timestamp, signature = (
        webhook.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")
    )
    assert doc.sign(secret, id_, int(timestamp), webhook.body.encode()) == signature


def test_a_signature_is_that_of_standard_webhooks_and_holds_for_five_minutes() -> None:
    # The example of the Standard Webhooks libraries.
    secret, id_ = (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
    )
    now = 1_614_265_330
    signed = secret, id_, now, b'{"test": 2432232314}'
    signature = doc.sign(*signed)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    good = [
        doc.verify(*signed, f"v1,old {signature}", now=now + late)
        for late in (-301, -300, 0, 300, 301)
    ]
    assert good == [False, True, True, True, False]
    assert not doc.verify(*signed, "v1,old", now=now)


PUBLIC = "93.184.215.14 2606:2800:21f:cb07:6820:80da:af6b:8b2c"
INTERNAL = (
    "10.1.2.3 169.254.169.254 100.64.0.1 224.0.0.1 ::1 fd00::1 fe80::1 ::ffff:10.0.0.1"
    " 64:ff9b::a00:1 2002:a00:1:: 2001:0:a00:1::"
)


@pytest.mark.parametrize("address", f"{PUBLIC} {INTERNAL}".split())
def test_a_webhook_may_connect_to_public_addresses_only(address: str) -> None:
    assert doc.public(address) == (address in PUBLIC.split())


# --- Messages for the tests below -----------------------------------------------------


class Change(NamedTuple):
    """A message about a subscription; without a threshold it is a deletion."""

    client: int
    subscription: str
    version: int
    threshold: int | None
    requested_at: int

    def sql(self, function: str, *more: str) -> str:
        """The call of `request_change` or `set_threshold` that asks for this change."""
        threshold = "NULL" if self.threshold is None else self.threshold
        values = f"{self.client}, '{self.subscription}', {threshold}::smallint"
        time = f"'{rfc3339(self.requested_at)}'"
        return f"SELECT {function}({', '.join([values, time, *more])});\n"


CHANGE = Change(81, uuid7(1), 1, 5, START - DAY)
Log = list[tuple[int, Image | Change]]  # (arrival, message) in order of arrival


def make_images(random: Random, number: int, days: int) -> list[Image]:
    """Images of four clients, one of them with half of all, in some hours of `days`."""
    hours = random.sample(range(24 * days), 6 * days)
    images = []
    for n in range(number):
        at = START + random.choice(hours) * HOUR + random.randrange(HOUR)
        red = random.choice((random.choice(EDGES), random.randint(0, 10_000)))
        images.append(Image(random.choice((81, 81, *CLIENTS)), at, uuid7(n, at), red))
    return images


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


def mixed_log(random: Random) -> Log:
    """Images of ten days, and changes of nine subscriptions, some of them repeated."""
    log: Log = []
    versions: dict[tuple[int, str], list[Change]] = {}
    for arrived, image in make_log(random, make_images(random, 600, days=10)):
        log.append((arrived, image))
        if random.random() < 0.2:
            client = random.choice((81, 1, 2))
            subscription = uuid7(3 * client + random.randrange(3))
            history = versions.setdefault((client, subscription), [])
            if history and (random.random() < 0.2 or history[-1].threshold is None):
                log.append((arrived, random.choice(history)))  # the outbox repeats it
                continue
            deleted = bool(history) and random.random() < 0.05
            threshold = None if deleted else random.choice(EDGES[:-1])
            asked = arrived - random.randrange(-500, 5000)
            version = len(history) + 1
            history.append(Change(client, subscription, version, threshold, asked))
            log.append((arrived, history[-1]))
    return log


def counted(
    images: Iterable[Image], client: int, since: int, until: int, above: int
) -> tuple[int, int]:
    """The two numbers by brute force."""
    own = {image for image in images if image.client == client}
    return brute_force(own, since, until, above, 0).get(0, (0, 0))


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


@pytest.mark.parametrize("line", [block.line for block in POSTGRESQL])
def test_every_postgresql_block_runs(executed: dict[int, str], line: int) -> None:
    assert executed[line] == ""


def on(day: int) -> str:
    """SQL that sets the clock to that day of March."""
    return f"SET test.today = '2026-03-{day:02}';"


# Back to March 1st, without what a test wrote, and with the days that it dropped. The
# order of tables does not matter, since what refers to a row is deleted with it.
EMPTY = f"""ROLLBACK; {on(1)}
SELECT format('DELETE FROM %I', relname) FROM pg_class WHERE relkind IN ('r', 'p')
    AND NOT relispartition AND relnamespace = 'public'::regnamespace \\gexec
SELECT open_day(parent, '2026-03-01') FROM unnest(ARRAY['notifications', 'deliveries',
    'attempts']) AS parent WHERE to_regclass(parent || '_20260301') IS NULL \\g /dev/null
"""


@pytest.fixture(scope="session")
def pairs(cluster: Cluster, executed: dict[int, str]) -> Iterator[list[Database]]:
    """Two databases that the document's blocks made, with a clock for tests."""
    assert not any(executed.values())
    cluster.run(
        "document",
        "CREATE OR REPLACE FUNCTION today() RETURNS date LANGUAGE sql AS"
        " $$ SELECT current_setting('test.today')::date $$;"
        "SELECT open_day('images', date '2026-03-17' + n) FROM generate_series(0, 3) AS n"
        " UNION ALL SELECT open_day(parent, date '2026-03-11' + n) FROM generate_series(0, 9)"
        " AS n, unnest(array['notifications', 'deliveries', 'attempts']) AS parent \\g /dev/null",
    )
    cluster.run("postgres", "CREATE DATABASE pair_2 TEMPLATE document")
    names = ("document", "pair_2")
    for name in names:  # for sessions of their own, too
        clock = f"ALTER DATABASE {name} SET test.today = '2026-03-01'"
        cluster.run("postgres", clock)
    databases = [Database(cluster, name) for name in names]
    yield databases
    for database in databases:
        database.close()


@pytest.fixture
def pg(pairs: list[Database]) -> Database:
    """The document's tables, empty, on March 1st."""
    pairs[0](EMPTY)
    return pairs[0]


def subscribe(client: int = 81, subscription: int = 1, webhook: bool = False) -> str:
    sql = f"INSERT INTO feeds VALUES ({client}) ON CONFLICT DO NOTHING;"
    sql += f"INSERT INTO subscriptions VALUES ('{uuid7(subscription)}', {client});"
    return sql + (add_webhook(subscription) if webhook else "")


def entries_a_minute(limit: int) -> str:
    return f"UPDATE feeds SET entries_a_minute = {limit};"


def passing(number: int, *subscriptions: int, client: int = 81) -> str:
    """SQL of image `number`, 10 ms after the one before, which passed `subscriptions`."""
    time = f"timestamptz '2026-03-01Z' + interval '{10 * number} ms'"
    passed = ",".join(f"'{uuid7(s)}'" for s in subscriptions or (1,))
    return f"({client}, {time}, '{uuid7(number)}', 5, array[{passed}]::uuid[])::passing"


def append_batch(*batch: str) -> str:
    return f"SELECT feed_append(array[{','.join(batch)}]::passing[]);"


def append(numbers: Iterable[int], *subscriptions: int, client: int = 81) -> str:
    """SQL that appends these images as one batch."""
    return append_batch(*(passing(n, *subscriptions, client=client) for n in numbers))


def retire(day: int) -> str:
    return f"SELECT retire_feed_day('2026-03-{day:02}') \\g /dev/null\n"


class Page(NamedTuple):
    """What `pull` returns."""

    purged_to: int
    seqs: list[int]
    images: list[str]


def page(rows: list[list[str]]) -> Page:
    entries = [row for row in rows if row[1]]
    seqs = [int(row[1]) for row in entries]
    return Page(int(rows[0][0]), seqs, [row[2] for row in entries])


def pull(pg: Database, after: int = 0, limit: int = 1000, client: int = 81) -> Page:
    return page(pg(f"EXECUTE pull({client}, {after}, {limit});"))


def notified(pg: Database) -> dict[str, set[str]]:
    """Image -> the subscriptions that its entry names."""
    ids = "array_to_string(subscription_ids, ' ')"
    rows = pg(f"SELECT image_id, {ids} FROM notifications;")
    return {image: set(subscriptions.split()) for image, subscriptions in rows}


# --- 2. Gaps in the numbers


def test_numbers_that_never_arrived_are_found_and_no_others(pg: Database) -> None:
    random = Random(3)
    arrived = ((0, 2, 39), (0, 41, 99), (1, 1, 76), (1, 78, 99), (2, 1, 99))
    batches = []
    for outbox, first, end in arrived:
        while first <= end:
            last = min(first + random.randrange(10), end)
            batches += [(uuid7(outbox), first, last)] * random.choice((1, 1, 2))
            first = last + 1
    random.shuffle(batches)
    pg("".join(f"EXECUTE receive('{o}', {a}, {b});" for o, a, b in batches))
    assert pg("EXECUTE missing;") == [
        [uuid7(0), "1", "1"],
        [uuid7(0), "40", "40"],
        [uuid7(1), "77", "77"],
    ]


# --- 3 and 4. The feed


def test_an_image_appended_again_uses_no_number_even_a_week_later(pg: Database) -> None:
    again = append([1, 1]) + append([1]) + append([1, 2]) + on(8) + append([1])
    assert pg(subscribe() + again) == [["1"], ["0"], ["1"], ["0"]]
    assert pull(pg).seqs == [1, 2]


def test_each_client_pulls_its_entries_in_the_order_of_the_log(pg: Database) -> None:
    batch = [(81, 9), (82, 5), (81, 3), (82, 4), (81, 6)]
    pg(subscribe() + subscribe(82, 2))
    pg(append_batch(*(passing(n, client=client) for client, n in batch)))
    assert pull(pg) == (0, [1, 2, 3], [uuid7(9), uuid7(3), uuid7(6)])
    assert pull(pg, client=82) == (0, [1, 2], [uuid7(5), uuid7(4)])
    assert pull(pg, after=1, limit=1).seqs == [2]


def test_concurrent_writers_number_a_feed_without_gaps(pg: Database) -> None:
    pg(subscribe())
    scripts = [
        "".join(append(range(n, n + 10)) for n in range(first, first + 300, 10))
        for first in (0, 150, 300)
    ]
    pg.together(*scripts)
    assert pull(pg).seqs == list(range(1, 601))


def test_writers_in_opposite_orders_of_clients_do_not_deadlock(pg: Database) -> None:
    pg("".join(subscribe(client, client) for client in range(1, 21)))

    def script(clients: Sequence[int], first: int) -> str:
        return "".join(
            append_batch(*(passing(n, client, client=client) for client in clients))
            for n in range(first, first + 40)
        )

    pg.together(script(range(1, 21), 0), script(range(20, 0, -1), 100))
    assert pg("SELECT DISTINCT last_seq FROM feeds;") == [["80"]]


def test_a_puller_learns_which_entries_are_gone(pg: Database) -> None:
    pg(subscribe() + append([1, 2]) + on(2) + append([3]) + on(9) + retire(1))
    assert pull(pg, limit=1)[:2] == (2, [1])
    pg("SELECT drop_feed_day('2026-03-01');")
    assert pull(pg)[:2] == (2, [3])
    assert pull(pg, after=3)[:2] == (2, [])


def test_an_entry_can_be_pulled_for_a_week_whatever_its_image(pg: Database) -> None:
    pg(subscribe() + on(8) + append([1]))  # an image of March 1st
    assert "is not a week old" in pg.error(on(15) + retire(8))
    pg(on(15))
    assert pull(pg)[:2] == (0, [1])
    pg(on(16) + retire(8))
    assert pull(pg).purged_to == 1


def test_readers_beside_writers_and_a_purge_miss_nothing_untold(pg: Database) -> None:
    pg(subscribe() + append(range(500)) + on(2) + append([500]))
    write = on(9) + "".join(append([n]) for n in range(501, 700))
    read = "EXECUTE pull(81, 0, 600); SELECT 'end';" * 60
    *_, rows = pg.together(write, on(9) + retire(1), read)
    pages = [list(group) for end, group in groupby(rows, ["end"].__eq__) if not end]
    assert len(pages) == 60
    for purged_to, seqs, _ in map(page, pages):
        assert purged_to in (0, 500)
        assert seqs == list(range(1, len(seqs) + 1))


# --- More entries than anybody reads


def test_images_beyond_the_limit_of_a_minute_share_an_entry(pg: Database) -> None:
    pg(subscribe() + entries_a_minute(3) + append([1, 2]))
    pg(append_batch(passing(3), passing(4, 2), passing(5, 2, 3), passing(6, 2)))
    pg(append([7]))
    rows = pg(
        "SELECT seq, image_id, images, round(extract(epoch FROM last_at - first_at) * 100),"
        " array_to_string(subscription_ids, ' ') FROM notifications ORDER BY seq;"
    )
    assert rows == [
        ["1", uuid7(1), "1", "0", uuid7(1)],
        ["2", uuid7(2), "1", "0", uuid7(1)],
        ["3", uuid7(3), "1", "0", uuid7(1)],
        ["4", uuid7(4), "3", "2", f"{uuid7(2)} {uuid7(3)}"],  # 4, 5, 6
        ["5", uuid7(7), "1", "0", uuid7(1)],  # beyond the limit, too, but alone
    ]


def test_the_limit_goes_by_the_minute_of_the_image_and_by_client(pg: Database) -> None:
    pg(subscribe() + subscribe(82, 2) + entries_a_minute(2))
    minutes = [1, 2, 6001, 6002, 12001, 12002]  # ten milliseconds each: three minutes
    pg(append(minutes) + append(minutes, client=82))
    assert pg("SELECT images, count(*) FROM notifications GROUP BY 1;") == [["1", "12"]]


@pytest.mark.parametrize("seed", range(3))
def test_every_image_is_an_entry_or_in_a_digest(pg: Database, seed: int) -> None:
    random = Random(seed)
    pg(subscribe() + entries_a_minute(20))
    images = random.sample(range(30_000), 300)  # five minutes
    while images:
        size = random.randrange(1, 60)
        pg(append(images[:size]))
        images = images[size:]
    rows = pg("SELECT seq, images, at FROM notifications ORDER BY seq;")
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(int(row[1]) for row in rows) == 300
    singles = Counter(row[2][:16] for row in rows if row[1] == "1")
    assert len(singles) == 5 and min(singles.values()) >= 20 and len(rows) < 150


# --- Webhooks

URL = "https://hooks.example.com/red"


def report_test(outcome: str, url: str = URL, subscription: int = 1) -> str:
    return f"EXECUTE tested('{uuid7(subscription)}', '{url}', {outcome}, NULL);"


def add_webhook(subscription: int = 1) -> str:
    """SQL that makes a webhook and has it pass its test."""
    add = f"SELECT add_webhook('{uuid7(subscription)}', '{URL}', 'one') \\g /dev/null\n"
    return add + report_test("true, 200", subscription=subscription)


def change_webhook(url: str, secret: str) -> str:
    return f"EXECUTE change_webhook('{uuid7(1)}', {url}, {secret});"


def claim(pg: Database, number: int = 10) -> list[tuple[str, int, int, int]]:
    """(subscription, end of the batch, attempt, missed) of what is claimed."""
    rows = pg(f"EXECUTE claim({number});")
    return [(row[0], int(row[1]), int(row[2]), int(row[3])) for row in rows]


def batch(pg: Database) -> list[int]:
    """The `seq` of what is sent."""
    return [int(row[0]) for row in pg(f"EXECUTE batch('{uuid7(1)}');")]


def failed(batch_to: int, delay: str = "'0'") -> str:
    return f"EXECUTE failed('{uuid7(1)}', {batch_to}, {delay}, 503, 'unavailable');"


def delivered(batch_to: int, missed: int = 0) -> str:
    return f"EXECUTE delivered('{uuid7(1)}', {batch_to}, {missed}, 200);"


def state(pg: Database) -> list[str]:
    return pg("SELECT state, attempt, acked_seq, missed, due_at FROM webhooks;")[0]


@pytest.fixture
def hook(pg: Database) -> Database:
    """The same with a webhook of client 81 that has an entry to send."""
    pg(subscribe(webhook=True) + append([1]))
    return pg


def test_a_claim_holds_against_others_at_the_time_and_later(pg: Database) -> None:
    clients = range(1, 41)
    pg("".join(subscribe(n, n, True) + append([n], n, client=n) for n in clients))
    first = pg("BEGIN; EXECUTE claim(20);")
    (second,) = pg.together("SET lock_timeout = '9s'; EXECUTE claim(20);")
    pg("COMMIT;")
    assert (len(first), len(second)) == (20, 20)
    assert len({row[0] for row in first + second}) == 40
    pg(append([99], client=1))
    assert claim(pg) == []


def test_a_webhook_of_an_old_subscription_begins_at_the_end(pg: Database) -> None:
    pg(subscribe() + append([1, 2]) + add_webhook())
    assert claim(pg) == []
    pg(append([3]))
    assert claim(pg) == [(uuid7(1), 3, 0, 0)]
    assert batch(pg) == [3]


@pytest.mark.parametrize("before", ["pending", "suspended"])
def test_only_a_passed_test_activates_a_webhook(hook: Database, before: str) -> None:
    hook(f"UPDATE webhooks SET state = '{before}', attempt = 10;")
    assert claim(hook) == []
    hook(f"EXECUTE ask_test('{uuid7(1)}');")
    ((_, url),) = hook("EXECUTE claim_tests(9); EXECUTE claim_tests(9);")
    hook(report_test("false, 500", url))
    assert (state(hook)[0], claim(hook)) == (before, [])
    hook(report_test("true, 204", url))
    assert claim(hook) == [(uuid7(1), 1, 0, 0)]


def test_a_test_message_leaves_an_active_webhook_as_it_is(hook: Database) -> None:
    claim(hook)
    hook(failed(1, "interval '1 hour'"))
    before = state(hook)
    hook(f"EXECUTE ask_test('{uuid7(1)}'); EXECUTE claim_tests(9);")
    hook(report_test("true, 200"))
    assert state(hook) == before


def test_a_test_of_the_old_url_does_not_make_the_new_one_active(hook: Database) -> None:
    hook(change_webhook("'https://new.example'", "NULL") + report_test("true, 200"))
    assert (state(hook)[0], claim(hook)) == ("pending", [])


def test_a_new_secret_signs_beside_the_old_one_for_a_day(hook: Database) -> None:
    hook(change_webhook("NULL", "'two'") + change_webhook("NULL", "'three'"))
    ((*_, both),) = hook("EXECUTE claim(1);")
    hook("UPDATE webhooks SET due_at = now(), old_until = now();")
    ((*_, one),) = hook("EXECUTE claim(1);")
    three, two = (rf"\\x{word.encode().hex()}" for word in ("three", "two"))
    assert (both, one) == (f'{{"{three}","{two}"}}', f'{{"{three}"}}')


def test_every_attempt_and_every_test_is_in_the_log(hook: Database) -> None:
    for settled in (failed(1), delivered(1)):
        claim(hook)
        hook(settled)
    rows = hook("SELECT batch_to, attempt, status, error FROM attempts ORDER BY at;")
    assert rows == [
        ["", "1", "200", ""],
        ["1", "1", "503", "unavailable"],
        ["1", "2", "200", ""],
    ]


def test_a_webhook_is_told_how_many_entries_were_deleted_unsent(hook: Database) -> None:
    hook(append([2]) + on(2) + append([3]))
    claim(hook)
    hook(failed(3) + on(9) + retire(1) + "SELECT drop_feed_day('2026-03-01');")
    assert claim(hook) == [(uuid7(1), 3, 1, 2)]
    assert batch(hook) == [3]
    hook(delivered(3, missed=1) + append([4]))  # it was told of one of them
    assert claim(hook) == [(uuid7(1), 4, 0, 1)]


def test_what_is_acknowledged_before_a_retirement_is_not_missed(pg: Database) -> None:
    pg(subscribe(webhook=True) + append(range(150)) + on(9))
    claim(pg)
    pg("BEGIN; SET LOCAL statement_timeout = '10s';" + delivered(100))
    with pg.cluster.popen(pg.name, on(9) + retire(1)) as process:
        blocked = (
            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%retire_feed_day%'"
        )
        pg(
            f"DO $$ BEGIN WHILE NOT EXISTS ({blocked}) LOOP"
            " PERFORM pg_stat_clear_snapshot(), pg_sleep(0.001); END LOOP; END $$; COMMIT;"
        )
        process.communicate()
    assert state(pg) == ["active", "0", "150", "50", ""]


def test_a_webhook_whose_batch_is_deleted_has_nothing_to_send(hook: Database) -> None:
    claim(hook)
    hook(failed(1) + on(9) + retire(1))
    assert (claim(hook), state(hook)) == ([], ["active", "0", "1", "1", ""])
    hook(delivered(1) + append([2]))  # its response comes too late to count
    assert claim(hook) == [(uuid7(1), 2, 0, 1)]


def test_a_quiet_subscription_is_claimed_without_a_scan(pg: Database) -> None:
    pg(subscribe(webhook=True) + entries_a_minute(9999))
    pg(append(range(5_000), 2) + append([5_000]) + "ANALYZE;")
    explained = "EXPLAIN (ANALYZE, BUFFERS, FORMAT json) EXECUTE claim(1);"
    (plan,) = json.loads("\n".join("\t".join(row) for row in pg(explained)))
    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 100


def test_an_append_beside_a_delivery_is_not_forgotten(pg: Database) -> None:
    pg(subscribe(webhook=True))
    writer = "".join(append([n]) for n in range(150))
    deliverer = (
        "EXECUTE claim(1); SELECT coalesce(batch_to, 0) AS batch FROM webhooks \\gset\n"
        f"EXECUTE delivered('{uuid7(1)}', :batch, 0, 200);\n"
    )
    pg.together(writer, deliverer * 100)
    ((head, acked, due),) = pg("SELECT head_seq, acked_seq, due_at FROM webhooks;")
    assert (head, due == "") == ("150", acked == head)


class FeedModel:
    """What the document promises about one feed, its webhook and a puller, in plain Python."""

    def __init__(self, pg: Database) -> None:
        self.pg = pg
        self.day = 1
        self.entries: list[tuple[int, bool]] = []  # day, whether it is the webhook's
        self.images = self.purged_to = self.acked = self.missed = self.cursor = 0
        self.state, self.attempt, self.batch = "active", 0, 0
        self.received: list[int] = []  # what the endpoint has seen, each entry once
        pg(subscribe(webhook=True) + subscribe(82, 2))

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
        self.pg(append([*numbers, *numbers[:2]], subscription))
        self.images = numbers.stop
        self.entries += [(self.day, subscription == 1)] * len(numbers)

    def deliver(self, random: Random) -> None:
        self.pg("UPDATE webhooks SET due_at = now() WHERE due_at IS NOT NULL;")
        claimed = claim(self.pg)
        pending = self.own(self.acked)
        if self.state != "active" or not pending:
            assert claimed == []
            return
        batch_to = self.batch or pending[:100][-1]
        assert claimed == [(uuid7(1), batch_to, self.attempt, self.missed)]
        sent = batch(self.pg)
        assert sent == self.own(self.acked, batch_to)
        self.batch = batch_to
        outcome = random.choice(("2xx", "2xx", "lost", "503", "last"))
        if outcome in ("2xx", "lost"):
            self.received += [seq for seq in sent if seq not in self.received]
        if outcome == "2xx":
            self.pg(delivered(batch_to, self.missed))
            self.acked, self.missed, self.attempt, self.batch = batch_to, 0, 0, 0
        elif outcome in ("503", "last"):
            self.pg(failed(batch_to, "NULL" if outcome == "last" else "'0'"))
            self.attempt += 1
            self.state = "suspended" if outcome == "last" else "active"

    def pass_test(self, random: Random) -> None:
        self.pg(report_test("true, 200"))
        self.attempt = self.attempt if self.state == "active" else 0
        self.state = "active"

    def resend(self, random: Random) -> None:
        after = random.randrange(len(self.entries) + 1)
        allowed = self.state == "active" and self.purged_to <= after < self.acked
        rows = self.pg(f"EXECUTE resend('{uuid7(1)}', {after});")
        assert rows == ([[str(after)]] if allowed else [])
        if allowed:
            self.acked, self.attempt, self.batch = after, 0, 0

    def pass_day(self, random: Random) -> None:
        self.day += 1
        old = self.day - 8
        self.pg(on(self.day) + (retire(old) if old >= 1 else ""))
        gone = [n for n, (day, _) in enumerate(self.entries, 1) if day == old]
        unsent = [n for n in gone if self.entries[n - 1][1] and n > self.acked]
        self.purged_to = max([self.purged_to, *gone])
        self.missed += len(unsent)
        self.acked = max([self.acked, *unsent])
        if self.batch <= self.acked:
            self.attempt = self.batch = 0

    def pull(self, random: Random) -> None:
        purged_to, seqs, _ = pull(self.pg, self.cursor, 50)
        assert purged_to == self.purged_to
        self.cursor = max(self.cursor, purged_to)  # 410 says so
        seen = [n for n in seqs if n > self.cursor]
        assert seen == list(range(self.cursor + 1, self.cursor + 1 + len(seen)))
        self.cursor += len(seen)


@pytest.mark.parametrize("seed", range(8))
def test_a_feed_and_its_readers_do_as_promised(pg: Database, seed: int) -> None:
    random = Random(seed)
    model = FeedModel(pg)
    steps = (model.append, model.deliver, model.deliver, model.pull, model.pass_test)
    for _ in range(90):
        random.choice((*steps, model.resend, model.pass_day))(random)
        if model.day == 20:
            break
    expected = [model.state, str(model.attempt), str(model.acked), str(model.missed)]
    assert state(pg)[:4] == expected
    assert model.received == sorted(model.received) != []


# --- Moving a feed

MOVED = ("feeds", "subscriptions", "thresholds", "takeovers", "webhooks")


def copy_feed(source: Database, target: Database, tables: Iterable[str]) -> None:
    """Copy rows of client 81 that the target does not have."""
    for table in tables:
        path = source.cluster.folder / f"{table}.copy"
        of_client = "client_id = 81"
        if table not in ("notifications", "feeds", "subscriptions", "webhooks"):
            of_client = f"subscription_id IN (SELECT subscription_id FROM subscriptions WHERE {of_client})"
        source(f"\\copy (SELECT * FROM {table} WHERE {of_client}) TO '{path}'\n")
        target(
            f"CREATE TEMPORARY TABLE copied (LIKE {table});\n\\copy copied FROM '{path}'\n"
            f"INSERT INTO {table} SELECT * FROM copied ON CONFLICT DO NOTHING; DROP TABLE copied;"
        )


def test_a_feed_moves_without_losing_or_renumbering_an_entry(
    pg: Database, pairs: list[Database]
) -> None:
    old, new = pg, pairs[1]
    new(EMPTY)
    old(subscribe(webhook=True) + subscribe(82, 2) + append(range(10)))
    entries = ("notifications", "deliveries")
    copy_feed(old, new, entries)  # while it is in use:
    old(append(range(10, 20)))
    old("UPDATE feeds SET moved_to = 'pair 2' WHERE client_id = 81;")
    for refused in (append([20]), CHANGE.sql("request_change", "'{3}'")):
        assert "moved: {81}" in old.error(refused)
    assert (claim(old), old(append([20], 2, client=82))) == ([], [["1"]])
    copy_feed(old, new, (*entries, *MOVED))
    new("UPDATE feeds SET moved_to = NULL;")
    new(append(range(15, 25)))  # the log again, from before the move
    assert claim(new) == [(uuid7(1), 25, 0, 0)]
    assert pull(new)[1:] == (list(range(1, 26)), [uuid7(n) for n in range(25)])


# --- 4. Events and roll-up: ClickHouse ------------------------------------------------


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    # In this process: chDB allows one session in it, and needs 2 s to be imported.
    module = pytest.importorskip("chdb.session", reason="chDB is not installed")
    session = module.Session(str(tmp_path_factory.mktemp("clickhouse")))
    yield ClickHouse(session)
    session.close()


@pytest.fixture
def ch(clickhouse_server: ClickHouse) -> ClickHouse:
    """A server with the document's empty tables."""
    clickhouse_server.emptied("red_stats")
    clickhouse_server.use("red_stats")
    return clickhouse_server


def image(number: int, at: int = START, client: int = 81) -> Image:
    return Image(client, at, uuid7(number, at), 5)


def insert(ch: ClickHouse, *images: Image) -> None:
    ch.run("insert", rows=[image.message() for image in images])


def save(ch: ClickHouse, done: int, built: int = 1, partition: int = 0) -> None:
    times: dict[str, Any] = {"done": done, "as_of": done}
    ch.run("save", partition=partition, next_offset=0, built=built, **times)


def roll_up_first_hour(ch: ClickHouse) -> None:
    ch.run("rebuild_hour", start=START, clients=[], built=1)


def first_counter(ch: ClickHouse) -> Any:
    """The document's counter on a server that has no progress yet."""
    save(ch, done=START, built=0)
    return doc.Counter(ch.run)


@pytest.fixture(scope="session")
def taken_days(clickhouse_server: ClickHouse) -> set[Image]:
    """Two days with repeats and late images, taken into the database `taken_days`."""
    random = Random(99)
    log = make_log(random, make_images(random, 600, days=2))
    clickhouse_server.fresh("taken_days")
    counter = first_counter(clickhouse_server)
    for first in range(0, len(log), 300):
        batch = log[first : first + 300]
        messages = [image.message() for _, image in batch]
        counter.take(0, first + len(batch), batch[-1][0], messages)
        counter.close()
    counter.save()
    return {image for _, image in log}


Days = tuple[ClickHouse, set[Image]]


@pytest.fixture
def two_days(clickhouse_server: ClickHouse, taken_days: set[Image]) -> Days:
    """A server that has taken two days, and what it has taken."""
    clickhouse_server.use("taken_days")
    return clickhouse_server, taken_days


@pytest.fixture
def copied_days(ch: ClickHouse, taken_days: set[Image]) -> Days:
    """The same, for tests that change it."""
    for table in TABLES:
        ch.copy(table, "taken_days", "red_stats")
    return ch, taken_days


def test_no_text_of_the_clickhouse_blocks_is_left_out() -> None:
    written = "".join(block.code for block in blocks("sql clickhouse"))
    executed = "".join(chain.from_iterable(clickhouse_statements().values()))
    without_names = re.sub(r"^-- \w+$|; *--.*$|;$", "", written, flags=re.MULTILINE)
    assert "".join(without_names.split()) == "".join(executed.split())


def test_every_clickhouse_statement_runs(clickhouse_server: ClickHouse) -> None:
    clickhouse_server.fresh("every_statement")
    parameters: dict[str, Any] = {
        **dict.fromkeys(("start", "day", "done", "as_of", "from"), START),
        **dict.fromkeys(("client", "above", "built", "partition", "next_offset"), 1),
        "to": START + 1,
        "clients": [81],
        "step": "all",
    }
    insert(clickhouse_server, image(1))
    for name in clickhouse_server.statements.keys() - {"schema", "insert"}:
        clickhouse_server.run(name, **parameters)


def test_a_counting_view_counts_a_repeat_twice(clickhouse_server: ClickHouse) -> None:
    clickhouse_server.fresh("counting_view")
    ((images, in_view),) = clickhouse_server.run("trap")
    assert (int(images), int(in_view)) == (1, 2)


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
        pytest.param(12 * HOUR + 61_001, 2 * DAY - 5, id="mid-minute to mid-minute"),
        pytest.param(-5 * DAY, 9 * DAY, id="more than there is"),
        pytest.param(5, 5, id="an empty interval"),
    ],
)
def test_an_interval_of_any_shape_is_counted_exactly(
    two_days: Days, since: int, until: int
) -> None:
    ch, images = two_days
    questions = [(81, START + since, START + until, above) for above in EDGES]
    answers = [ch.count(*question) for question in questions]
    assert answers == [counted(images, *question) for question in questions]


@pytest.mark.parametrize("width", [HOUR, DAY], ids=["hour", "day"])
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
    two_days: Days, width: int, since: int, until: int
) -> None:
    ch, images = two_days
    ((done, _),) = ch.run("watermark")
    first, end = START + since, START + until
    step = {HOUR: "hour", DAY: "day"}[width]
    question: dict[str, Any] = {"client": 81, "above": 4200, "step": step}
    question |= {"from": first, "to": end, "done": milliseconds(done)}
    bars = ch.run("statistics", **question)
    own = {image for image in images if image.client == 81}
    expected = brute_force(own, first, end, 4200, width)
    found = [(milliseconds(bar), (int(n), int(m))) for bar, n, m in bars]
    assert found == sorted(expected.items())


@pytest.mark.parametrize("first", [0, 1])
def test_an_hours_last_millisecond_belongs_to_it(ch: ClickHouse, first: int) -> None:
    images = [image(1, START + HOUR - 1)] * 2 + [image(2, START + 5 * HOUR)]
    insert(ch, *images[first:])
    roll_up_first_hour(ch)
    save(ch, done=START + HOUR)
    assert ch.count(81, START, START + HOUR, 0) == (1, 1)
    assert ch.count(81, START + HOUR - 1, START + 2 * HOUR, 0) == (1, 1)


@pytest.mark.parametrize("done", [None, START])
def test_hours_that_are_not_done_are_counted_from_the_events(
    ch: ClickHouse, done: int | None
) -> None:
    insert(ch, image(1), image(1))
    roll_up_first_hour(ch)
    if done:
        save(ch, done)
    insert(ch, image(2))
    assert ch.count(81, START, START + DAY, 4) == (2, 2)


def test_the_watermark_is_that_of_the_partition_furthest_behind(ch: ClickHouse) -> None:
    for partition, hours in enumerate((3, 1, 2)):
        save(ch, START + hours * HOUR, partition=partition)
    earliest = ["2026-03-01 01:00:00", "2026-03-01 01:00:00.000"]
    assert ch.run("watermark") == [earliest]


def test_a_dead_counters_statement_loses_against_its_successors(ch: ClickHouse) -> None:
    first, late = (image(n, START + n).message() for n in (1, 2))
    dead = first_counter(ch)
    dead.take(0, 1, START + 3 * HOUR, [first])
    number = dead.built()
    left = ch.selected("rebuild_hour", start=START, clients=[], built=number)
    successor = doc.Counter(ch.run)
    successor.take(0, 2, START + 3 * HOUR, [first, late])
    successor.close()
    successor.save()
    ch.query(f"INSERT INTO histograms FORMAT JSONCompactEachRow\n{json.dumps(left[0])}")
    assert ch.count(81, START, START + HOUR, 0) == (2, 2)


def test_a_counter_begins_after_every_generation_in_the_roll_up(ch: ClickHouse) -> None:
    row = f"'hour', 81, '2026-03-01', 1, map(5, 1), {7 << 32 | 9}"
    ch.query(f"INSERT INTO histograms VALUES ({row})")
    assert first_counter(ch).generation == 8


def test_retention_drops_the_day_it_names_and_no_other(ch: ClickHouse) -> None:
    days = [milliseconds(f"2025-01-{day} 12:00:00") for day in (24, 25, 26)]
    insert(ch, *(image(1, at) for at in days))
    ch.run("retain")
    left = [ch.count(81, at, at + 1, 0) for at in days]
    assert left == [(1, 1), (0, 0), (1, 1)]


def test_erasing_a_client_leaves_the_others_as_they_were(copied_days: Days) -> None:
    ch, images = copied_days
    questions = [(client, START, START + 2 * DAY, 4200) for client in (81, 1, 2)]
    ch.run("erase", client=81)
    kept = {image for image in images if image.client != 81}
    expected = [counted(kept, *question) for question in questions]
    hidden = [ch.count(*question) for question in questions]
    ch.run("purge")
    assert hidden == [ch.count(*question) for question in questions] == expected


def test_an_image_behind_the_erasure_of_its_client_is_dropped(ch: ClickHouse) -> None:
    counter = first_counter(ch)
    message = image(1).message()
    counter.take(0, 2, START, [message, {"client_id": 81, "erase": True}])
    counter.take(0, 3, START, [message])
    doc.Counter(ch.run).take(0, 4, START, [message])
    assert ch.query("SELECT count() FROM events") == [[0]]


def test_purging_removes_erased_rows_that_came_back_from_disk(ch: ClickHouse) -> None:
    ch.run("erase", client=81)
    insert(ch, image(1), image(1, client=1))
    roll_up_first_hour(ch)
    ch.run("purge")
    rows = ch.query(
        "SELECT table, sum(rows) FROM system.parts WHERE database = 'red_stats'"
        " AND table IN ('events', 'histograms') AND active GROUP BY table"
    )
    assert {table: int(n) for table, n in rows} == {"events": 1, "histograms": 1}


def test_repeats_and_late_images_pass_the_audit(two_days: Days) -> None:
    ch, _ = two_days
    for day in (START, START + DAY):
        assert ch.run("audit", day=day, done=START + 2 * DAY) == []


WRONG = (
    "INSERT INTO histograms SELECT tier, client_id, start, {}, built + 1 FROM histograms"
    " FINAL WHERE tier = '{{}}' AND client_id = 81 AND start < '2026-03-02' LIMIT 1"
)


@pytest.mark.parametrize("tier", ["hour", "day"])
@pytest.mark.parametrize(
    ("client", "change"),
    [
        (81, WRONG.format("images + 1, counts")),
        (81, WRONG.format("images, mapAdd(counts, map(4217, 1))")),
        (77, "INSERT INTO histograms VALUES ('{}', 77, '2026-03-01', 1, map(5, 1), 1)"),
        (1, "DELETE FROM histograms WHERE tier = '{}' AND client_id = 1"),
    ],
    ids=["wrong images", "wrong counts", "a row without events", "events without rows"],
)
def test_the_audit_finds_a_difference_in_either_tier(
    copied_days: Days, tier: str, client: int, change: str
) -> None:
    ch, _ = copied_days
    ch.query(change.format(tier))
    found = ch.run("audit", day=START, done=START + DAY)
    assert {(name, int(number)) for name, number, _ in found} == {(tier, client)}


def test_the_audit_passes_over_what_is_not_done(ch: ClickHouse) -> None:
    insert(ch, image(1))
    times = [START + hours * HOUR for hours in (0, 1, 23, 24)]
    audits = [ch.run("audit", day=START, done=done) for done in times]
    found = [[tier for tier, _, _ in audit] for audit in audits]
    assert found == [[], ["hour"], ["hour"], ["day", "hour"]]


def test_the_digests_of_two_servers_differ_if_one_image_does(copied_days: Days) -> None:
    ch, images = copied_days
    before = ch.run("checksum", day=START)
    insert(ch, *images)  # all of them again
    repeated = ch.run("checksum", day=START)
    ch.run("merge")
    assert before == repeated == ch.run("checksum", day=START)
    ch.query(
        "INSERT INTO events SELECT client_id, at, image_id, red_bp + 1 FROM events"
        " WHERE toDate(at) = '2026-03-01' AND red_bp < 10000 LIMIT 1"
    )
    assert ch.run("checksum", day=START) != before


# --- 5. Matching ----------------------------------------------------------------------


class Promise:
    """Whom an image notifies, by the table of section 6 and the times that clients were shown."""

    def __init__(self) -> None:
        # (client, subscription) -> [(active_from, threshold), ...], the newest version last
        self.versions: dict[tuple[int, str], list[tuple[int, int | None]]] = {}

    def change(self, change: Change, active_from: int) -> None:
        versions = self.versions.setdefault((change.client, change.subscription), [])
        if change.version > len(versions):
            assert not versions or versions[-1][0] <= active_from
            versions.append((active_from, change.threshold))

    def image(self, image: Image, arrived: int) -> set[str]:
        if image.at < arrived - 7 * DAY:
            return set()
        return {
            subscription
            for (client, subscription), versions in self.versions.items()
            if client == image.client and self.passes(versions, image)
        }

    @staticmethod
    def passes(versions: list[tuple[int, int | None]], image: Image) -> bool:
        in_force = [threshold for since, threshold in versions if since <= image.at]
        if not in_force or in_force[-1] is None or versions[-1][1] is None:
            return False
        return image.red > in_force[-1]


def match(matcher: Any, image: Image, arrived: int) -> set[str]:
    found = matcher.image(image.client, image.at, image.red, arrived)
    assert len(set(found)) == len(found)
    return set(found)


def matched(log: Log) -> dict[str, set[str]]:
    """Image -> whom it notifies first, by one matcher that never crashes."""
    matcher = doc.Matcher()
    expected: dict[str, set[str]] = {}
    for arrived, message in log:
        if isinstance(message, Change):
            matcher.change(*message)
        elif passed := match(matcher, message, arrived):
            expected.setdefault(message.image_id, passed)
    return expected


@pytest.mark.parametrize("seed", range(5))
def test_an_image_is_judged_by_the_versions_in_force_at_its_time(seed: int) -> None:
    matcher, promise = doc.Matcher(), Promise()
    found: list[set[str]] = []
    expected: list[set[str]] = []
    for arrived, message in mixed_log(Random(seed)):
        if isinstance(message, Change):
            promise.change(message, matcher.change(*message))
        else:
            found.append(match(matcher, message, arrived))
            expected.append(promise.image(message, arrived))
    assert found == expected
    assert sum(map(len, found)) > 100
    for (client, _), versions in promise.versions.items():
        for active_from, _ in versions:
            for at in (active_from - 1, active_from):
                image = Image(client, at, "", 4201)
                assert match(matcher, image, at) == promise.image(image, at)


def test_a_repeat_is_judged_as_the_first_time_whatever_has_changed() -> None:
    matcher = doc.Matcher()
    judged: dict[Image, set[str]] = {}
    for arrived, message in mixed_log(Random(7)):
        if isinstance(message, Image):
            passed = match(matcher, message, arrived)
            assert judged.setdefault(message, passed) == passed
        elif message.threshold is not None:
            matcher.change(*message)


def test_a_new_subscription_sees_no_image_from_before_it_however_late() -> None:
    matcher = doc.Matcher()
    matcher.image(81, START, 9_000, START)
    matcher.change(81, "s", 1, 4_200, START - 500)
    for at in (START, START - HOUR):
        assert matcher.image(81, at, 9_000, START + 1) == []


def test_active_from_is_never_before_the_request() -> None:
    matcher = doc.Matcher(highest=START)
    assert matcher.change(81, "s", 1, 4_200, START + 700) == START + 700


@pytest.mark.parametrize(("late", "notified"), [(7 * DAY, ["s"]), (7 * DAY + 1, [])])
def test_an_image_more_than_seven_days_late_notifies_nobody(
    late: int, notified: list[str]
) -> None:
    matcher = doc.Matcher()
    matcher.change(81, "s", 1, 4_200, START - DAY)
    assert matcher.image(81, START, 9_000, START + late) == notified


@pytest.mark.parametrize("seed", range(5))
def test_of_versions_in_any_order_the_newest_holds_in_the_end(seed: int) -> None:
    random = Random(seed)
    changes = [Change(81, "s", n, 1000 * n, START + n) for n in range(1, 8)]
    shuffled = random.choices(changes, k=20) + changes[-1:]
    matcher = doc.Matcher()
    newest = 0
    shown: dict[Change, int | None] = {}
    for step, change in enumerate(shuffled):
        active_from = matcher.change(*change)
        assert shown.setdefault(change, active_from) == active_from
        assert active_from is not None or change.version < newest
        newest = max(newest, change.version)
        at = START + 100 * (step + 1)
        passed = [matcher.image(81, at, 1000 * newest + more, at) for more in (0, 1)]
        assert passed == [[], ["s"]]


def test_an_erased_client_is_notified_of_nothing() -> None:
    matcher = doc.Matcher()
    matcher.change(81, "s", 1, 4_200, START)
    matcher.erase(81)
    for at in (START - 1, START):
        assert matcher.image(81, at, 9_000, START) == []


def test_a_partition_that_inherits_a_version_keeps_its_active_from() -> None:
    matcher = doc.Matcher(highest=START + HOUR)
    assert matcher.change(81, "s", 3, 4_200, START, active_from=START + 5) == START + 5
    assert matcher.image(81, START + 5, 9_000, START) == ["s"]


# --- Changes of subscriptions, and matchers that may crash


def take_over(partition: int, subscription: str, version: int, since: str) -> str:
    return f"EXECUTE take_over({partition}, '{subscription}', {version}, '{since}');"


def test_changes_at_the_same_time_are_ordered_by_version(pg: Database) -> None:
    pg.together(*[CHANGE.sql("request_change", "'{3}'") * 50] * 3)
    rows = pg("SELECT change->>'version' FROM outbox ORDER BY id;")
    assert [int(version) for (version,) in rows] == list(range(1, 151))


def test_a_version_is_active_once_every_matcher_has_taken_it_over(pg: Database) -> None:
    pg(CHANGE._replace(threshold=4).sql("request_change", "'{3,7}'"))
    pg(CHANGE.sql("request_change", "'{3,7}'"))
    shown = f"EXECUTE shown('{uuid7(1)}');"
    first, second = (
        take_over(partition, uuid7(1), 2, f"2026-03-{day:02}Z")
        for partition, day in ((3, 2), (7, 1))
    )
    assert pg(shown + first + shown + second * 2 + shown) == [
        ["2", "5", ""],
        ["2", "5", ""],
        ["2", "5", "2026-03-02 00:00:00+00"],
    ]


def test_a_deletion_is_the_last_version_and_ends_the_webhook(pg: Database) -> None:
    deletion = CHANGE._replace(threshold=None).sql("request_change", "'{3}'")
    change = CHANGE.sql("request_change", "'{3}'")
    assert pg(change + add_webhook() + deletion + change) == [["1"], ["2"], [""]]
    versions = pg("SELECT version, threshold_bp FROM thresholds ORDER BY version;")
    assert versions == [["1", "5"], ["2", ""]]
    assert pg("SELECT count(*) FROM webhooks;") == [["0"]]


def test_a_takeover_of_an_erased_subscription_is_passed_over(pg: Database) -> None:
    assert pg(take_over(3, uuid7(1), 1, "2026-03-02Z")) == []


def test_a_second_matcher_on_the_same_partition_moves_nothing(pg: Database) -> None:
    pg("INSERT INTO matchers VALUES (3, 100, '2026-03-01Z');")
    assert pg("EXECUTE advance(3, 100, 150, '2026-03-02Z');" * 2) == [["3"]]


class MatcherProcess:
    """The matcher of partition 3, whose state is in PostgreSQL, and which may crash at any step."""

    def __init__(self, pg: Database) -> None:
        self.pg = pg
        self.start()

    def start(self) -> None:
        ((offset, highest),) = self.pg("SELECT next_offset, highest_at FROM matchers;")
        self.next_offset = int(offset)
        self.matcher = doc.Matcher(since_1970(highest))
        for client, subscription, *numbers, since in self.pg("EXECUTE load(3);"):
            version, threshold = (int(text) if text else None for text in numbers)
            active_from = since_1970(since)
            self.matcher.restore(
                int(client), subscription, version, threshold, active_from
            )

    def step(self, log: Log, size: int, crash: bool) -> None:
        """Take a batch in one transaction; a crash rolls it back and forgets everything."""
        batch = log[self.next_offset : self.next_offset + size]
        entries, takeovers = [], []
        for arrived, message in batch:
            if isinstance(message, Change):
                since = self.matcher.change(*message)
                if since is not None:
                    which = 3, message.subscription, message.version
                    takeovers.append(take_over(*which, rfc3339(since)))
            elif passed := match(self.matcher, message, arrived):
                ids = ",".join(f"'{s}'" for s in passed)
                entries.append(
                    f"({message.client}, '{rfc3339(message.at)}', '{message.image_id}',"
                    f" {message.red}, array[{ids}]::uuid[])::passing"
                )
        end = self.next_offset + len(batch)
        highest = rfc3339(self.matcher.highest)
        advanced = self.pg(
            f"BEGIN; {append_batch(*entries)} {''.join(takeovers)}"
            f" EXECUTE advance(3, {self.next_offset}, {end}, '{highest}');"
            f" {'ROLLBACK' if crash else 'COMMIT'};"
        )
        if crash:
            self.start()
        else:
            assert advanced[-1] == ["3"]
            self.next_offset = end


def since_1970(text: str) -> int:
    """Milliseconds, of PostgreSQL's text for a time."""
    return milliseconds(text.removesuffix("+00"))


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_of_a_matcher_changes_no_notification(pg: Database, seed: int) -> None:
    random = Random(seed)
    log = mixed_log(Random(seed))
    changes = dict.fromkeys(m for _, m in log if isinstance(m, Change))
    pg("".join(change.sql("request_change", "'{3}'") for change in changes))
    pg("INSERT INTO matchers VALUES (3, 0, '1970-01-01Z');")
    process = MatcherProcess(pg)
    while process.next_offset < len(log):
        process.step(log, random.randint(1, 60), crash=random.random() < 0.4)
    expected = matched(log)
    assert notified(pg) == expected
    assert len(expected) > 50


# --- 7. The start version -------------------------------------------------------------


def take(image: Image, arrived: int | None = None) -> str:
    values = f"{image.client}, '{rfc3339(image.at)}', '{image.image_id}', {image.red}::smallint"
    return f"SELECT take({values}, '{rfc3339(arrived or image.at)}');\n"


def activate(change: Change) -> str:
    key = f"{change.client}, '{change.subscription}', {change.version}"
    return f"SELECT coalesce(activate({key})::text, 'known');\n"


def statistics(client: int, since: int, until: int, above: int) -> str:
    interval = f"'{rfc3339(since)}', '{rfc3339(until)}'"
    return f"EXECUTE statistics({client}, {interval}, {above});"


def test_the_start_version_counts_as_brute_force_does(pg: Database) -> None:
    random = Random(11)
    log = make_log(random, make_images(random, 1000, days=3))
    questions = []
    for _ in range(150):
        step = random.choice((1, 1, 60_000, HOUR, DAY))
        width = random.choice((2 * HOUR, DAY, 3 * DAY))
        since = START + random.randrange(3 * DAY) // step * step
        until = since + max(step, random.randrange(width) // step * step)
        above = random.choice((*EDGES, *EDGES, random.randint(0, 10_000)))
        questions.append((random.choice((*CLIENTS, 5)), since, until, above))
    pg("BEGIN;" + "".join(take(image) for _, image in log) + "COMMIT;")
    rows = pg("".join(statistics(*question) for question in questions))
    images = {image for _, image in log}
    expected = [counted(images, *question) for question in questions]
    assert [(int(number), int(redder)) for number, redder in rows] == expected


def test_the_start_version_notifies_as_a_matcher_does(pg: Database) -> None:
    log = mixed_log(Random(12))
    seen: set[Change] = set()
    script = []
    for arrived, message in log:
        if isinstance(message, Image):
            script.append(take(message, arrived))
        elif message not in seen:
            seen.add(message)
            script.append(message.sql("set_threshold"))
    pg("BEGIN;" + "".join(script) + "COMMIT;")
    expected: dict[str, set[str]] = {}
    for client in CLIENTS:  # its order is that of a client, not of a partition
        expected |= matched([(t, m) for t, m in log if m.client == client])
    assert notified(pg) == expected
    assert len(expected) > 50


def test_batches_of_the_start_version_at_the_same_time_count_once(pg: Database) -> None:
    images = [image(client, START + client, client) for client in range(40)]
    pg.together(*[("BEGIN;" + "".join(map(take, images)) + "COMMIT;") * 5] * 3)
    assert pg("SELECT count(*), sum(images) FROM day_counts;") == [["40", "40"]]


@pytest.mark.parametrize(("late", "entries"), [(7 * DAY, "1"), (7 * DAY + 1, "0")])
def test_at_the_start_an_image_a_week_late_is_counted_if_not_notified(
    pg: Database, late: int, entries: str
) -> None:
    pg(CHANGE._replace(threshold=4, requested_at=START).sql("set_threshold"))
    assert pg(take(image(1), START + late)) == [[entries]]
    assert pg(statistics(81, START, START + DAY, 4)) == [["1", "1"]]


def test_at_the_start_active_from_is_later_than_every_image(pg: Database) -> None:
    shown = pg(take(image(1)) + CHANGE.sql("set_threshold"))
    assert shown == [["0"], ["2026-03-01 00:00:00.001+00"]]


def test_at_the_start_a_deletion_holds_for_late_images_too(pg: Database) -> None:
    deletion = CHANGE._replace(threshold=None, requested_at=START + HOUR)
    pg(CHANGE._replace(threshold=4).sql("set_threshold"))
    pg(deletion.sql("set_threshold"))
    assert pg(take(image(1))) == [["0"]]


def test_a_version_of_the_start_is_not_activated_again(pg: Database) -> None:
    second = CHANGE._replace(version=2, threshold=6)
    pg(CHANGE.sql("set_threshold") + second.sql("set_threshold"))
    rows = pg("SELECT change->>'version' FROM outbox ORDER BY id;")
    assert rows == [["1"], ["2"]]
    assert pg(activate(CHANGE) + activate(second)) == [["known"], ["known"]]


@pytest.mark.parametrize("seed", range(2))
def test_a_switch_to_matchers_loses_no_change_or_entry(pg: Database, seed: int) -> None:
    log = [(t, m) for t, m in mixed_log(Random(seed)) if m.client == 81]
    # The steps are those of the migration in appendix K.
    step_1, step_5 = len(log) // 3, 2 * len(log) // 3
    seen: set[Change] = set()
    script = ["BEGIN;"]
    for position, (arrived, message) in enumerate(log):
        if position == step_5:
            script.append("INSERT INTO matchers SELECT 3, 0, highest_at FROM feeds;")
        if isinstance(message, Image):
            if position < step_5:
                script.append(take(message, arrived))
            continue
        if message not in seen and position < step_1:
            script.append(message.sql("set_threshold"))
        else:
            if message not in seen:
                script.append(message.sql("request_change", "'{3}'"))
            if position < step_5:
                script.append(activate(message))
        seen.add(message)
    pg("".join(script) + "COMMIT;")
    process = MatcherProcess(pg)
    while process.next_offset < len(log[step_5:]):
        process.step(log[step_5:], 20, crash=False)
    rows = pg(
        "SELECT subscription_id, version, max(active_from) FROM takeovers GROUP BY 1, 2;"
    )
    shown = {(s, int(version)): since_1970(since) for s, version, since in rows}
    promise = Promise()
    expected: dict[str, set[str]] = {}
    for arrived, message in log:
        if isinstance(message, Change):
            promise.change(message, shown[message.subscription, message.version])
        elif passed := promise.image(message, arrived):
            expected.setdefault(message.image_id, passed)
    assert notified(pg) == expected
    assert len(shown) > 10 and len(expected) > 50


def test_the_start_version_refuses_a_client_that_is_being_erased(pg: Database) -> None:
    images = [image(n, START + n, client) for client in (81, 1) for n in (1, 2)]
    pg("".join(map(take, images)))
    news = "".join(take(image(n, START + n)) for n in range(2, 300))
    erase = "SELECT pg_sleep(0); SELECT erase_client(81);"
    pg.together(news, erase, news)
    assert pg(take(images[0]) + CHANGE.sql("set_threshold")) == [[""], [""]]
    tables = ("images", "day_counts", "feeds", "notifications")
    counts = "".join(f"SELECT count(*) FROM {t} WHERE client_id = 81;" for t in tables)
    assert pg(counts) == [["0"]] * 4
    assert pg(statistics(1, START, START + DAY, 0)) == [["2", "2"]]


# --- 7. Partitions and hot clients ----------------------------------------------------


def test_a_hot_client_is_spread_from_the_new_epoch_on_and_not_before() -> None:
    ids = [uuid7(number) for number in range(1_000)]
    begin = doc.ROUTES.epochs[-1][0]
    before, after = (
        {doc.ROUTES.partition(81, id_, at) for id_ in ids} for at in (begin - 1, begin)
    )
    assert (before, after) == ({11}, {2, 18, 20, 23})


@pytest.mark.parametrize("seed", range(20))
def test_copies_of_the_routes_never_send_an_image_two_ways(seed: int) -> None:
    random = Random(seed)
    published = doc.Routes([(0, 3)], {}, valid_to=1_000)
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
        partition = random.choice(copies).partition(81, uuid7(number), at)
        if partition is not None:
            sent.setdefault((number, at), set()).add(partition)
    assert {len(partitions) for partitions in sent.values()} == {1}


def test_a_row_that_begins_before_valid_to_cannot_be_added_to_the_routes() -> None:
    with pytest.raises(AssertionError):
        doc.ROUTES.with_epoch(doc.ROUTES.valid_to - 1, 48)
