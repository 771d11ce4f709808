"""The image scripts on a bad network, and among strangers."""

import collections
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fault_server import TRANSIENT, Fault, FaultServer, Plan, Request, Shares, answer
from PIL import Image, ImageOps

import mirror_images
import upload_images

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"mirrored": "mirror_images.py", "uploaded": "upload_images.py"}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and nothing from the environment."""
    monkeypatch.setattr(upload_images, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(upload_images, "LONGEST_BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("IMAGES_URL", raising=False)


class Task:
    """Tiny images, and what one of the scripts is to do with them.

    `verb` says which: "mirrored" or "uploaded".
    """

    def __init__(self, verb: str, folder: Path, count: int) -> None:
        self.verb = verb
        self.server_folder = folder / "server"
        self.source = self.server_folder if verb == "mirrored" else folder / "photos"
        self.report_file = folder / "report"
        self.server_folder.mkdir()
        self.source.mkdir(exist_ok=True)
        self.names = [f"{number:03}.png" for number in range(count)]
        self.results = [
            f"mirrored_{name}" if verb == "mirrored" else name for name in self.names
        ]
        for number, name in enumerate(self.names):  # no two images are alike
            image = Image.new("RGB", (7, 5), (90, number % 256, number // 256))
            image.putpixel((0, 0), (255, 0, 0))
            image.save(self.source / name)

    def arguments(self, url: str, *options: str, width: int = 4) -> list[str]:
        mirrored = self.verb == "mirrored"
        where = [url] if mirrored else [str(self.source), "--url", url]
        option = "--chains" if mirrored else "--connections"
        report = ["--report", str(self.report_file)]
        return [*where, option, str(width), *report, *options]

    def run(self, url: str, *options: str, width: int = 4) -> int:
        module = mirror_images if self.verb == "mirrored" else upload_images
        return int(module.main(self.arguments(url, *options, width=width)))

    def start(self, url: str, *options: str) -> "subprocess.Popen[str]":
        script = ROOT / SCRIPTS[self.verb]
        command = [sys.executable, str(script), *self.arguments(url, *options)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def arrived(self, name: str) -> bool:
        """Whether the right result for image `name` is on the server, undamaged."""
        with Image.open(self.source / name) as image:
            wanted = ImageOps.mirror(image) if self.verb == "mirrored" else image
            pixels = wanted.tobytes()
        result = self.server_folder / self.results[self.names.index(name)]
        if not result.exists():
            return False
        with Image.open(result) as image:
            return bool(image.tobytes() == pixels)

    def is_complete(self) -> bool:
        """Whether the server has every result, and nothing else of ours."""
        wanted = {*self.results}
        if self.verb == "mirrored":
            wanted.update(self.names)
        there = {path.name for path in self.server_folder.iterdir()}
        return there == wanted and all(map(self.arrived, self.names))

    def report(self) -> dict[str, dict[str, object]]:
        """The lines of the report by name: one for each."""
        lines = [json.loads(line) for line in self.report_file.read_text().splitlines()]
        counts = collections.Counter(line["name"] for line in lines)
        assert set(counts.values()) <= {1}
        return {line["name"]: line for line in lines}

    def statuses(self) -> dict[str, object]:
        return {name: line["status"] for name, line in self.report().items()}


both_scripts = pytest.mark.parametrize("verb", SCRIPTS)

# ---- faults ----------------------------------------------------------------


@both_scripts
def test_every_image_arrives_through_all_transient_faults(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 500)
    plan = Shares(dict.fromkeys(TRANSIENT, 0.05), seed=1)
    server = FaultServer(task.server_folder, plan)
    with server.running() as url:
        options = "--retries", "40", "--timeout", "0.4"
        assert task.run(url, *options, width=64) == 0
    assert min(server.faults[fault] for fault in TRANSIENT) > 15
    assert task.is_complete()
    assert task.statuses() == dict.fromkeys(task.names, verb)


def always(method: str, hit: set[str], fault: Fault | bytes) -> Plan:
    """A plan that hits the same images with the same fault every time."""

    def plan(request: Request) -> Fault | bytes | None:
        return fault if request.method == method and request.name in hit else None

    return plan


BROKEN = "the connection broke (Connection reset by peer)"
# The reasons for both a GET and a POST
REASONS = {
    Fault.RESET_BEFORE: BROKEN,
    Fault.RESET_DURING: BROKEN,
    Fault.STALL: "no answer within 0.3 s",
    Fault.TOO_MANY: "429 Too Many Requests: slow down",
    Fault.ERROR: "500 Internal Server Error: out of order",
    Fault.BUSY: "503 Service Unavailable: come back later",
    Fault.SHORT: "closed connection without sending complete message body",
    Fault.TOO_LONG: "no answer within 0.3 s",
    Fault.REDIRECT: "302 Found: the server points to http://127.0.0.1:9/elsewhere;",
    Fault.GARBAGE: "no proper answer (illegal status line",
    answer("404 Not Found", "never heard of it"): "404 Not Found: never heard of it",
}
DOWNLOAD_REASONS = REASONS | {
    Fault.TOO_SHORT: "more bytes came than the answer announced",
    Fault.TWICE: "more bytes came than the answer announced",
    Fault.PAGE: "not an image that can be mirrored, but an HTML page",
    answer("200 OK", ""): "nothing at all (0 bytes)",
    answer("206 Partial Content", "half of it"): "206 Partial Content",
    answer("200 OK", "x", "Content-Encoding: gzip, gzip"): "gzip, gzip, which was not",
    answer("200 OK", "xxxx", "Content-Encoding: gzip"): "no proper answer (Error -3",
    answer("200 OK", "", "Content-Length: 1"): "no proper answer (conflicting",
    answer("200 OK", "x" * 100_001): "larger than 100.0 kB",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n": "larger than 100.0 kB",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n": "no proper answer (bad Content",
}
UPLOAD_REASONS = REASONS | {Fault.RESET_AFTER: BROKEN}


@pytest.mark.parametrize(("fault", "reason"), DOWNLOAD_REASONS.items(), ids=str)
def test_a_download_that_always_fails_says_why_and_stops_no_other(
    tmp_path: Path, fault: Fault | bytes, reason: str
) -> None:
    task = Task("mirrored", tmp_path, 9)
    hit = {"003.png", "004.png"}
    options = ["--retries", "1", "--timeout", "0.3", "--max-bytes", "100000"]
    server = FaultServer(task.server_folder, always("GET", hit, fault))
    with server.running() as url:
        assert task.run(url, *options) == 1
    report = task.report()
    assert sorted(report) == task.names
    for name, line in report.items():
        assert line["status"] == ("failed" if name in hit else "mirrored")
        assert reason in str(line["error"]) or name not in hit
        assert task.arrived(name) == (name not in hit)


@both_scripts
@pytest.mark.parametrize(("fault", "reason"), UPLOAD_REASONS.items(), ids=str)
def test_an_upload_that_always_fails_says_why_and_stops_no_other(
    tmp_path: Path, verb: str, fault: Fault | bytes, reason: str
) -> None:
    task = Task(verb, tmp_path, 9)
    hit = set(task.results[3:5])
    server = FaultServer(task.server_folder, always("POST", hit, fault))
    with server.running() as url:
        assert task.run(url, "--retries", "1", "--timeout", "0.3") == 1
    report = task.report()
    assert sorted(report) == task.names
    for name, result in zip(task.names, task.results, strict=True):
        line = report[name]
        assert line["status"] == ("failed" if result in hit else verb)
        assert reason in str(line["error"]) or result not in hit
        assert task.arrived(name) or result in hit


@pytest.mark.parametrize("fault", [Fault.TWICE, Fault.TOO_SHORT], ids=str)
def test_surplus_bytes_are_never_the_answer_to_the_next_upload(
    tmp_path: Path, fault: Fault
) -> None:
    # Every image but the first is refused; surplus bytes might say otherwise.
    def plan(request: Request) -> Fault | bytes:
        refusal = answer("403 Forbidden", "no more")
        return fault if request.name == "000.png" else refusal

    task = Task("uploaded", tmp_path, 5)
    with FaultServer(task.server_folder, plan).running() as url:
        assert task.run(url, width=1) == 1
    assert list(task.statuses().values()) == ["uploaded"] + ["failed"] * 4


def test_a_compressed_download_is_decoded(tmp_path: Path) -> None:
    task = Task("mirrored", tmp_path, 1)
    content = gzip.compress((task.source / "000.png").read_bytes())
    zipped = answer("200 OK", content, "Content-Encoding: gzip")
    plan = always("GET", {"000.png"}, zipped)
    with FaultServer(task.server_folder, plan).running() as url:
        assert task.run(url) == 0
    assert task.is_complete()


def test_what_a_server_says_does_not_reach_the_terminal_as_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task("uploaded", tmp_path, 1)
    words = answer("503 Service Unavailable", "\x1b[2J\x1b]0;title\a \x9b2J")
    plan = always("POST", {"000.png"}, words)
    with FaultServer(task.server_folder, plan).running() as url:
        assert task.run(url, "-v", "--retries", "1") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x80-\x9f]", capsys.readouterr().err)
