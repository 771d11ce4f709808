"""What red_stats_design.md holds for a machine: its blocks, and its ClickHouse statements.

Shared by test_red_stats_design.py and benchmark.py, so that what is written, what is tested
and what is measured is the same text.
"""

import doctest
import io
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

DOCUMENT = Path(__file__).resolve().parent.parent / "red_stats_design.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


# A backup copies progress first, so that it is behind what it describes.
TABLES = ("progress", "events", "histograms", "erased")


class Block(NamedTuple):
    """A fenced block; `line` is the document's number of the first line inside."""

    line: int
    info: str
    code: str


def blocks(info: str, text: str = TEXT) -> list[Block]:
    """The fenced blocks with exactly this info string, in document order."""
    fences = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = (Block(text.count("\n", 0, f.start(2)) + 1, f[1], f[2]) for f in fences)
    return [block for block in found if block.info == info]


def run_python(text: str = TEXT) -> tuple[dict[str, Any], dict[int, str]]:
    """Run the Python blocks as doctests with one namespace, in document order.

    Return the namespace, and for each block's line what doctest had to complain about.
    """
    names: dict[str, Any] = {}
    complaints = {}
    parser = doctest.DocTestParser()
    for block in blocks("python", text):
        # A name of its own: doctest looks up the source for a traceback by it.
        name = f"{DOCUMENT.name}:{block.line}"
        test = parser.get_doctest(block.code, names, name, None, 0)
        report = io.StringIO()
        doctest.DocTestRunner().run(test, out=report.write, clear_globs=False)
        names = test.globs
        complaints[block.line] = report.getvalue()
    return names, complaints


def clickhouse_statements(text: str = TEXT) -> dict[str, list[str]]:
    """Name -> statements; a comment line of one word names what follows it."""
    named: dict[str, list[str]] = {}
    for block in blocks("sql clickhouse", text):
        _, *parts = re.split(r"^-- (\w+)\n", block.code, flags=re.MULTILINE)
        for name, code in zip(parts[::2], parts[1::2], strict=True):
            statements = re.split(r";\s*(?:--.*)?\n", code)
            named[name] = [s.strip() for s in statements if s.strip()]
    return named


def utc(milliseconds: int) -> datetime:
    """Milliseconds since 1970, the document's unit of time, as a datetime."""
    seconds, rest = divmod(milliseconds, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


def milliseconds(text: str) -> int:
    """The reverse, out of ClickHouse's or PostgreSQL's text for a time in UTC."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def rfc3339(milliseconds: int) -> str:
    return f"{utc(milliseconds):%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03}Z"


def as_parameter(kind: str, value: Any) -> str:
    """The text of a ClickHouse query parameter of this type; times are milliseconds."""
    if kind.startswith("DateTime64"):
        return rfc3339(value).replace("T", " ").rstrip("Z")
    if kind.startswith("DateTime"):
        return f"{utc(value):%Y-%m-%d %H:%M:%S}"
    if kind == "Date":
        return f"{utc(value):%Y-%m-%d}"
    return str(value)


def as_texts(statement: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """The parameters that the statement declares."""
    declared = re.findall(r"\{(\w+):(\w+(?:\([^}]*\))?)\}", statement)
    return {name: as_parameter(kind, parameters[name]) for name, kind in declared}


class ClickHouse:
    """Runs the document's statements by name in a chDB session."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.statements = clickhouse_statements()
        self.made: set[str] = set()

    def query(self, sql: str, **parameters: str) -> list[list[Any]]:
        answer = self.session.query(sql, "JSONCompactEachRow", params=parameters)
        return [json.loads(line) for line in str(answer).splitlines()]

    def run(
        self, name: str, /, rows: Iterable[Mapping[str, Any]] = (), **parameters: Any
    ) -> list[list[Any]]:
        """Run what the document calls `name`; return the last statement's rows.

        `rows` are messages, `at` in milliseconds, for an INSERT that ends in FORMAT.
        """
        lines = [json.dumps({**row, "at": rfc3339(row["at"])}) for row in rows]
        answer: list[list[Any]] = []
        for statement in self.statements[name]:
            texts = as_texts(statement, parameters)
            answer = self.query("\n".join([statement, *lines]), **texts)
        return answer

    def selected(self, name: str, /, **parameters: Any) -> list[list[Any]]:
        """What the INSERT … SELECT `name` reads, without writing it."""
        (statement,) = self.statements[name]
        into, select = statement.split("\n", 1)
        assert into.startswith("INSERT INTO") and select.startswith("SELECT")
        return self.query(select, **as_texts(statement, parameters))

    def fresh(self, database: str) -> None:
        """Make `database` anew with the document's schema, and use it."""
        self.query(f"DROP DATABASE IF EXISTS {database} SYNC")
        self.query(f"CREATE DATABASE {database}")
        self.use(database)
        self.run("schema")

    def use(self, database: str) -> None:
        self.query(f"USE {database}")

    def prepare(self, database: str) -> None:
        """Make `database`, unless it is there."""
        if database not in self.made:
            self.fresh(database)
            self.made.add(database)

    def emptied(self, database: str) -> None:
        """`database` without rows, which is cheaper than a fresh one."""
        self.prepare(database)
        for table in TABLES:
            self.query(f"TRUNCATE TABLE {database}.{table}")

    def copy(self, table: str, source: str, target: str) -> None:
        """Make a table of `target` what it is in `source`."""
        self.query(f"TRUNCATE TABLE {target}.{table}")
        self.query(f"INSERT INTO {target}.{table} SELECT * FROM {source}.{table}")

    def count(self, client: int, since: int, until: int, above: int) -> tuple[int, int]:
        """The two numbers, asked for as the API does: watermark first, then statistics."""
        ((done, _),) = self.run("watermark")
        question: dict[str, Any] = {"from": since, "to": until, "step": "all"}
        question |= {"client": client, "above": above, "done": milliseconds(done)}
        rows = self.run("statistics", **question)
        ((_, images, redder),) = rows or [[None, 0, 0]]
        return int(images), int(redder)
