"""The image scripts on a bad network, and among strangers."""

import collections
import contextlib
import fcntl
import gzip
import http
import http.client
import io
import itertools
import json
import os
import pty
import random
import re
import resource
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
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
    """Short waits."""
    monkeypatch.setattr(upload_images, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(upload_images, "LONGEST_BACKOFF", 0.01)


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
        arguments = self.arguments(url, *options, width=width)
        if self.verb == "mirrored":
            return mirror_images.main(arguments)
        return upload_images.main(arguments)

    def start(
        self, url: str, *options: str, stderr: int = subprocess.STDOUT
    ) -> "subprocess.Popen[str]":
        """Run the script in a process of its own."""
        script = ROOT / SCRIPTS[self.verb]
        command = [sys.executable, str(script), *self.arguments(url, *options)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True
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
            return image.tobytes() == pixels

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
    options = ["--retries", "0", "--timeout", "0.3", "--max-bytes", "100000"]
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
        assert task.run(url, "--retries", "0", "--timeout", "0.3") == 1
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


# ---- kill -9 ---------------------------------------------------------------


@both_scripts
def test_a_run_that_is_killed_again_and_again_finishes_what_is_left(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 30)
    options = ["--skip-existing"] if verb == "uploaded" else []
    rng = random.Random(verb)
    server = FaultServer(task.server_folder)
    with server.running() as url:
        for kills in range(40):
            enough = server.saved.total() + rng.randint(2, 9)
            process = task.start(url, *options)

            def kill_in_time(name: str) -> None:
                if server.saved.total() >= enough:  # noqa: B023
                    process.kill()  # noqa: B023

            server.on_saved = kill_in_time
            output, _ = process.communicate(timeout=60)
            if process.returncode != -signal.SIGKILL:
                break
    assert process.returncode == 0, output
    assert kills >= 2
    assert task.is_complete()
    # Again at most what was in flight.
    assert server.saved.total() <= 30 + 4 * kills
    downloads = [
        n for (method, name), n in server.requests.items() if method == "GET" and name
    ]
    assert sum(downloads) <= 30 + 4 * kills


class ServerProcess:
    """`mirror_images.py --serve` in a process of its own, at one port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        script = str(ROOT / "mirror_images.py")
        arguments = ["--serve", str(self.folder), "--port", str(self.port)]
        self.errors = self.folder.with_suffix(".stderr")
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, script, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:([0-9]+)/images/", line)
        assert match, line
        self.url = match[0]
        self.port = int(match[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def stop(self) -> None:
        """It accepts connections, but never answers again."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)


@contextlib.contextmanager
def server_process(folder: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(folder)
    try:
        yield server
    finally:
        server.kill()


def when_finished(
    monkeypatch: pytest.MonkeyPatch, moments: set[int], act: Callable[[], None]
) -> None:
    """Call `act` in mid-run, when so many images are finished."""
    finish = upload_images.Batch.finish

    def finish_and_act(
        batch: upload_images.Batch, outcome: upload_images.Outcome
    ) -> None:
        finish(batch, outcome)
        if sum(batch.counts.values()) in moments:
            act()

    monkeypatch.setattr(upload_images.Batch, "finish", finish_and_act)


@both_scripts
def test_a_server_killed_in_mid_upload_and_restarted_has_nothing_damaged(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(verb, tmp_path, 20)
    noise = random.Random(1)
    for name in task.names[::2]:  # so large that the kill comes in the middle of some
        Image.frombytes("RGB", (400, 400), noise.randbytes(480_000)).save(
            task.source / name
        )
    with server_process(task.server_folder) as server:

        def restart() -> None:
            server.kill()
            server.start()

        when_finished(monkeypatch, {3, 8, 14}, restart)
        assert task.run(server.url, width=6) == 0
    assert task.is_complete()
    assert task.statuses() == dict.fromkeys(task.names, verb)


# ---- a server that is gone -------------------------------------------------


def counted(summary: str) -> dict[str, int]:
    """The numbers in the summary, by the words behind them."""
    return {words: int(n) for n, words in re.findall(r"(\d+) ([a-z ]+),", summary)}


@both_scripts
@pytest.mark.parametrize("end", [ServerProcess.kill, ServerProcess.stop])
def test_a_server_that_is_gone_for_good_ends_the_run(
    tmp_path: Path,
    verb: str,
    end: Callable[[ServerProcess], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = Task(verb, tmp_path, 60)
    with server_process(task.server_folder) as server:
        when_finished(monkeypatch, {10}, lambda: end(server))
        options = ["--retries", "1", "--timeout", "0.3", "--give-up-after", "7"]
        assert task.run(server.url, *options) == 1
    streams = capsys.readouterr()
    counts = counted(streams.out)
    assert "giving up: the last 7 images got no answer" in streams.err
    assert counts[verb] in range(10, 14)
    assert counts["failed"] in range(7, 11)
    assert counts["not tried"] == 60 - counts[verb] - counts["failed"]
    failed = [line for line in task.report().values() if line["status"] == "failed"]
    assert len(task.report()) == counts[verb] + counts["failed"]
    assert len(failed) == counts["failed"]


@both_scripts
def test_with_give_up_after_0_every_image_is_tried(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(verb, tmp_path, 80)
    with server_process(task.server_folder) as server:
        when_finished(monkeypatch, {10}, server.kill)
        options = ["--retries", "0", "--give-up-after", "0"]
        assert task.run(server.url, *options) == 1
    assert sorted(task.report()) == task.names


@both_scripts
def test_answers_that_break_off_are_no_reason_to_give_up(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 20)

    def plan(request: Request) -> Fault | None:
        return Fault.SHORT if request.name else None

    with FaultServer(task.server_folder, plan).running() as url:
        assert task.run(url, "--retries", "0", "--give-up-after", "3") == 1
    assert sorted(task.report()) == task.names


@both_scripts
def test_one_image_that_arrives_starts_the_count_anew(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 20)
    hit = {*task.results} - {*task.results[::4]}
    plan = always("POST", hit, Fault.RESET_BEFORE)
    with FaultServer(task.server_folder, plan).running() as url:
        assert task.run(url, "--retries", "0", "--give-up-after", "4", width=1) == 1
    assert sorted(task.report()) == task.names


# ---- nobody reads, nothing can be written ----------------------------------


@both_scripts
@pytest.mark.parametrize(
    "command",
    [
        "$RUN 2>&-",
        "$RUN <&- >&- 2>&-",
        "$RUN >/dev/full 2>/dev/full",
        "{ $RUN; echo $? >status; } | head -0; exit $(cat status)",
        "{ $RUN 2>&1 >&3; echo $? >status; } 3>&1 | head -0; exit $(cat status)",
    ],
)
def test_a_run_whose_output_nobody_reads_is_as_good_as_any(
    tmp_path: Path, verb: str, command: str
) -> None:
    task = Task(verb, tmp_path, 4)
    (task.source / "bad.png").write_bytes(b"")
    run = [sys.executable, str(ROOT / SCRIPTS[verb])]
    with FaultServer(task.server_folder).running() as url:
        run += task.arguments(url, "-v", "--retries", "0")
        result = subprocess.run(
            ["sh", "-c", command.replace("$RUN", shlex.join(run))],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert all(map(task.arrived, task.names))
    assert task.statuses() == dict.fromkeys(task.names, verb) | {"bad.png": "failed"}


@both_scripts
def test_a_full_disk_under_the_report_is_told_and_stops_nothing(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task(verb, tmp_path, 4)
    with FaultServer(task.server_folder).running() as url:
        assert task.run(url, "--report", "/dev/full") == 1
    error = capsys.readouterr().err
    assert error.count("the report is incomplete: No space left on device") == 1
    assert task.is_complete()


@both_scripts
def test_a_report_that_cannot_be_made_is_told_before_anything_is_sent(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task(verb, tmp_path, 4)
    server = FaultServer(task.server_folder)
    with server.running() as url:
        assert task.run(url, "--report", str(tmp_path / "none" / "report")) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert not server.requests


def test_a_full_disk_at_the_server_fails_what_does_not_fit(tmp_path: Path) -> None:
    task = Task("uploaded", tmp_path, 4)
    noise = random.Random(1).randbytes(30_000)
    Image.frombytes("RGB", (100, 100), noise).save(task.source / "001.png")
    with server_process(task.server_folder) as server:
        limit = (10_000, 10_000)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
        assert task.run(server.url) == 1
    error = task.report()["001.png"]["error"]
    assert error == "507 Insufficient Storage: cannot be saved: File too large"
    assert [task.arrived(name) for name in task.names] == [True, False, True, True]
    assert len(list(task.server_folder.iterdir())) == 3


@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_under_the_scratch_file_is_not_blamed_on_the_image(
    room: int,
) -> None:
    file = io.BytesIO()
    noise = random.Random(1).randbytes(30_000)
    Image.frombytes("RGB", (100, 100), noise).save(file, "JPEG")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(mirror_images.ImageError, match="^the result cannot be"):
            mirror_images.mirror(file.getvalue())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Terminal:
    """A terminal, and all that was written to it."""

    def __init__(self) -> None:
        self.screen, self.end = pty.openpty()
        self.written = b""
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        with contextlib.suppress(OSError):  # nobody has it open any more
            while block := os.read(self.screen, 1 << 16):
                self.written += block

    def resize(self, columns: int) -> None:
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        os.close(self.end)
        self.reader.join()
        os.close(self.screen)


@both_scripts
def test_a_terminal_of_any_size_shows_whole_lines_and_no_more(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 30)
    (task.source / "bad.png").write_bytes(b"")
    terminal = Terminal()
    server = FaultServer(task.server_folder)
    widths = itertools.cycle([0, 1, 2, 7, 20, 65535])
    server.on_saved = lambda name: terminal.resize(next(widths))
    terminal.resize(20)
    with server.running() as url:
        with task.start(url, stderr=terminal.end) as process:
            output, _ = process.communicate(timeout=60)
        terminal.close()
    assert process.returncode == 1, output
    assert "30 " in output
    assert b"Traceback" not in terminal.written
    # The line begins where nothing is, or what was is erased.
    assert re.search(rb"(^|\n|\r\x1b\[K)ERROR bad\.png: .*\r\n", terminal.written)


@both_scripts
def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path, verb: str) -> None:
    task = Task(verb, tmp_path, 30)
    (task.source / "bad.png").write_bytes(b"")
    screen, end = pty.openpty()
    server = FaultServer(task.server_folder)
    hung_up = threading.Event()

    def hang_up(name: str) -> None:
        if not hung_up.is_set():
            hung_up.set()
            os.close(screen)

    server.on_saved = hang_up
    with server.running() as url, task.start(url, "-v", stderr=end) as process:
        os.close(end)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert task.statuses() == dict.fromkeys(task.names, verb) | {"bad.png": "failed"}


# ---- bytes from strangers --------------------------------------------------


def test_damaged_images_come_back_as_images_or_are_refused() -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz_mirror.py"), "1", "3000"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, (result.stdout[-10:], result.stderr[-1000:])
    mirrored, refused = map(int, re.findall("[0-9]+", result.stdout.splitlines()[-1]))
    assert mirrored + refused >= 3000
    assert mirrored > 300


HOSTILE_NAMES = [
    *("/etc/passwd", "../secret.png", "..\\secret.png", "a/b.png", "a\\b.png"),
    *(".", "..", "./a.png", "http://127.0.0.1:9/x.png", "//127.0.0.1:9/x.png"),
    *("\0.png", "a\0b.png", "\x1b[2J.png", "a\rb.png", "a\tb.png", "\x85.png"),
    *("x" * 70_000, "\N{SNOWMAN}" * 12_000),
]
STRANGE_NAMES = [  # and yet names
    *(
        "%2e%2e%2fa.png",
        "..%5ca.png",
        "?a=b",
        "#a",
        "a b.png",
        " ",
        "a;b",
        "a&b",
        "-rf",
    ),
    *("$(id).png", "`id`.png", "'\"", "~", "CON", "...", "..a", "\ufeffa.png", "a "),
    *("\u202egnp.exe", "\u2028", "\N{SNOWMAN}" * 80, "x" * 300, "None", "{}", "%s"),
]


def test_a_list_of_hostile_names_leads_nowhere_but_to_images(tmp_path: Path) -> None:
    task = Task("mirrored", tmp_path, 2)
    names = [*HOSTILE_NAMES, *task.names, *STRANGE_NAMES, *HOSTILE_NAMES[:3], "", "\r"]
    text = "".join(f"{name}\n" for name in names)
    plan = always("GET", {""}, answer("200 OK", text, "Content-Type: text/plain"))
    server = FaultServer(task.server_folder, plan)
    with server.running() as url:
        assert task.run(url) == 1
    asked = {name for method, name in server.requests if method == "GET"}
    allowed = {name for name in STRANGE_NAMES if name.strip()}
    assert asked == {"", *task.names, *allowed}
    report = task.statuses()
    good = dict.fromkeys(task.names, "mirrored")
    assert report == dict.fromkeys([*HOSTILE_NAMES, *allowed], "failed") | good
    assert task.is_complete()


# ---- hostile requests ------------------------------------------------------


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server in a process of its own, with one image in its folder."""
    folder = tmp_path_factory.mktemp("serving") / "images"
    with server_process(folder) as server:
        Image.new("L", (3, 2)).save(folder / "there.png")
        yield server


def exchange(port: int, request: bytes) -> bytes:
    """Send `request`, and then nothing more; all that comes back until the end."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
        contextlib.suppress(ConnectionError),  # the server may end it first
    ):
        connection.sendall(request)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(1 << 16):
            received += block
    return received


def form(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST request with the parts `body` of a form whose boundary is B."""
    length = len(body) if length is None else length
    head = [
        "POST /images/ HTTP/1.1",
        "Host: x",
        f"Content-Length: {length}",
        "Content-Type: multipart/form-data; boundary=B",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def part(name: bytes, content: bytes = b"x") -> bytes:
    disposition = b'Content-Disposition: form-data; name="file"; filename="%s"' % name
    return b"--B\r\n" + disposition + b"\r\n\r\n" + content + b"\r\n--B--\r\n"


def raw(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


POST = "POST /images/ HTTP/1.1\nHost: x\n"
NAMED = POST + 'Content-Disposition: attachment; filename="bad.png"\n'
WHOLE = part(b"bad.png", b"x" * 1000)
OTHER_TYPE = form(WHOLE).replace(b"multipart/form-data; boundary=B", b"%s", 1)
# What is sent, and the status of the last answer; none where there is nobody to hear it
HOSTILE_REQUESTS: dict[str, tuple[bytes, int | None]] = {
    # broken forms
    "no part": (form(b""), 400),
    "no boundary in the body": (form(b"x" * 70_000), 400),
    "only the last boundary": (form(b"--B--\r\n"), 400),
    "no boundary given": (OTHER_TYPE % b"multipart/form-data", 400),
    "an empty boundary": (OTHER_TYPE % b'multipart/form-data; boundary=""', 400),
    "a boundary in UTF-8": (
        OTHER_TYPE % b"multipart/form-data; boundary*=utf-8''%E2%98%83",
        400,
    ),
    "a boundary in no charset": (
        OTHER_TYPE % b"multipart/form-data; boundary*=no-such''%FF",
        400,
    ),
    "a huge boundary": (
        OTHER_TYPE % (b"multipart/form-data; boundary=" + b"B" * 60_000),
        400,
    ),
    "another type": (OTHER_TYPE % b"text/plain", 415),
    "no type": (OTHER_TYPE % b"", 415),
    "a part without an end": (form(WHOLE[:-9]), 400),
    "a part without a beginning": (form(WHOLE[5:]), 400),
    "a part that ends in its headers": (form(WHOLE[:40]), 400),
    "no filename": (form(WHOLE.replace(b"filename", b"other")), 400),
    "a header of a part that never ends": (form(b"--B\r\n" + b"x" * 99_999), 400),
    "thousands of headers of a part": (form(b"--B\r\n" + b"x: y\r\n" * 9999), 400),
    "one bad part among good ones": (
        form(part(b"bad.png")[:-6] + b"\r\n" + part(b"../bad.png")),
        400,
    ),
    # names
    **{
        f"the name {name!r}": (form(part(name)), 400)
        for name in (
            *(b"", b".", b"..", b"../bad.png", b"/etc/bad.png", b"a/../../bad.png"),
            *(b"..\\\\bad.png", b"C:\\\\bad.png", b"bad\0.png", b"\0", b"x" * 256),
            *(b".upload-bad.png", b"..%2f".replace(b"%2f", b"/"), b"\xff" * 200),
        )
    },
    "an extended name": (
        form(part(b"bad.png").replace(b'filename="bad', b"filename*=utf-8''..%2Fbad")),
        400,
    ),
    "a raw body named by a path": (
        raw(NAMED.replace("bad", "../bad") + "Content-Length: 1", b"x"),
        400,
    ),
    # lengths
    "no length": (raw(NAMED + "X: y"), 411),
    "a negative length": (raw(NAMED + "Content-Length: -1"), 400),
    "a length that is none": (raw(NAMED + "Content-Length: 1e3"), 400),
    "a signed length": (raw(NAMED + "Content-Length: +5", b"xxxxx"), 400),
    "two lengths": (raw(NAMED + "Content-Length: 5, 5", b"xxxxx"), 400),
    "a huge length": (raw(NAMED + "Content-Length: 999999999999"), 413),
    "a length beyond all numbers": (raw(NAMED + "Content-Length: " + "9" * 5000), 400),
    "chunks": (raw(NAMED + "Transfer-Encoding: chunked", b"1\r\nx\r\n0\r\n\r\n"), 411),
    "chunks and a length": (
        raw(NAMED + "Content-Length: 1\nTransfer-Encoding: x, chunked", b"x"),
        411,
    ),
    "less than the length": (raw(NAMED + "Content-Length: 9", b"xxx"), None),
    "a form of less than the length": (form(WHOLE, length=5000), None),
    "half a form": (form(WHOLE)[:-500], None),
    "half of the headers": (form(WHOLE)[:60], None),
    # paths
    "a path that leaves the folder": (raw("GET /images/../x.png HTTP/1.1"), 400),
    "an escaped path": (raw("GET /images/..%2f..%2fetc%2fpasswd HTTP/1.1"), 400),
    "a path with backslashes": (raw("GET /images/..%5cx.png HTTP/1.1"), 400),
    "a path with a NUL": (raw("GET /images/%00 HTTP/1.1"), 400),
    "a path with a bare NUL": (raw("GET /images/a\0b HTTP/1.1"), 400),
    "a path elsewhere": (raw("GET /etc/passwd HTTP/1.1"), 404),
    "an absolute URL": (raw("GET http://127.0.0.1/etc/passwd HTTP/1.1"), 404),
    "a path of 60 kB": (raw(f"GET /images/{'x' * 60_000} HTTP/1.1"), 400),
    "a path of 70 kB": (raw(f"GET /images/{'x' * 70_000} HTTP/1.1"), 414),
    "a path that is no UTF-8": (raw("GET /images/%FF%FE.png HTTP/1.1"), 404),
    "an unfinished upload": (raw("GET /images/.upload-1 HTTP/1.1"), 400),
    "a POST elsewhere": (raw("POST /etc/ HTTP/1.1\nContent-Length: 1", b"x"), 404),
    # no HTTP, or hardly
    "nothing": (b"", None),
    "NULs": (bytes(5000), None),
    "line breaks": (b"\r\n" * 5000, None),
    "a TLS handshake": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99), None),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", None),
    "no version": (b"GET /images/there.png\r\n\r\n", None),
    "a version that is none": (raw("GET /images/ HTTP/x.y"), None),
    "another method": (raw("DELETE /images/there.png HTTP/1.1"), 501),
    "a method that is none": (raw("__class__ /images/ HTTP/1.1"), 501),
    "thousands of headers": (raw("GET /images/ HTTP/1.1\n" + "X: y\n" * 5000), None),
    "a header of 70 kB": (raw("GET /images/ HTTP/1.1\nX: " + "y" * 70_000), None),
    "headers that are none": (raw("GET /images/ HTTP/1.1\n:\n \n\0: \0\nx\n  y"), 200),
    "an absurd range": (
        raw("GET /images/there.png HTTP/1.1\nRange: bytes=9-1,-,0-" + "9" * 999),
        200,
    ),
    "garbage behind a request": (raw("GET /images/ HTTP/1.1", bytes(99)), 200),
    "a body that a GET should not have": (
        raw("GET /images/ HTTP/1.1\nContent-Length: 3", b"x\r\n"),
        None,
    ),
    "an expectation": (raw(NAMED + "Content-Length: -1\nExpect: 100-continue"), 400),
}


def is_fine(port: int) -> bool:
    """Whether the server lists, delivers and saves, and has nothing left over."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Disposition": 'attachment; filename="sent.png"'}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return b"%d " % response.status + response.read()

    with contextlib.closing(connection):
        return (
            ask("POST", "/images/", b"content") == b"200 saved sent.png\n"
            and ask("GET", "/images/") == b"200 sent.png\nthere.png\n"
            and ask("GET", "/images/sent.png") == b"200 content"
        )


@pytest.mark.parametrize(
    ("request_bytes", "status"), HOSTILE_REQUESTS.values(), ids=HOSTILE_REQUESTS
)
def test_the_server_outlives_a_hostile_request(
    serving: ServerProcess, request_bytes: bytes, status: int | None
) -> None:
    reply = exchange(serving.port, request_bytes)
    statuses = re.findall(rb"^HTTP/1\.[01] ([0-9]+) ", reply, re.MULTILINE)
    assert status is None or int(statuses[-1]) == status, reply
    assert is_fine(serving.port)
    names = sorted(path.name for path in serving.folder.iterdir())
    assert names == ["sent.png", "there.png"]
    assert sorted(serving.folder.parent.iterdir()) == [serving.folder, serving.errors]
    assert serving.errors.read_text() == ""


def test_the_server_outlives_hundreds_of_idle_and_half_requests(
    serving: ServerProcess,
) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(200):
            address = ("127.0.0.1", serving.port)
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(form(WHOLE)[: number * 3])
        assert is_fine(serving.port)
    assert serving.errors.read_text() == ""


def test_an_upload_is_not_there_before_it_is_complete(serving: ServerProcess) -> None:
    request = raw(
        'POST /images/ HTTP/1.1\nContent-Disposition: attachment; filename="late.png"\n'
        "Content-Length: 10\nExpect: 100-continue\nConnection: close"
    )
    with socket.create_connection(("127.0.0.1", serving.port), 20) as connection:
        connection.sendall(request)
        assert b" 100 " in connection.recv(1 << 16)
        connection.sendall(b"12345")
        assert is_fine(serving.port)  # and the list is as it was
        connection.sendall(b"67890")
        assert b" 200 " in connection.recv(1 << 16)
    late = serving.folder / "late.png"
    assert late.read_bytes() == b"1234567890"
    late.unlink()


def test_a_slow_sender_is_told_so_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_images.ImageHandler, "timeout", 0.2)
    server = mirror_images.ImageServer(tmp_path)
    with server.running():
        address = ("127.0.0.1", server.server_port)
        with socket.create_connection(address, 20) as connection:
            connection.sendall(form(WHOLE, length=5000))
            reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"408 Request Timeout" in reply
    assert not list(tmp_path.iterdir())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An image of so many bytes that the system cannot buffer them all."""
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(1 << 26)
    return path


def test_a_slow_reader_gets_no_error_in_the_middle_of_an_image(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave_up, room = threading.Event(), threading.Event()
    refuse = mirror_images.ImageHandler.refuse

    def refuse_when_there_is_room(
        handler: mirror_images.ImageHandler, status: http.HTTPStatus, words: str
    ) -> None:
        gave_up.set()
        assert room.wait(20)
        refuse(handler, status, words)

    monkeypatch.setattr(mirror_images.ImageHandler, "timeout", 0.2)
    monkeypatch.setattr(mirror_images.ImageHandler, "refuse", refuse_when_there_is_room)
    server = mirror_images.ImageServer(tmp_path)
    reply = b""
    with server.running():
        address = ("127.0.0.1", server.server_port)
        with socket.create_connection(address, 20) as connection:
            connection.sendall(raw("GET /images/large.png HTTP/1.1"))
            assert gave_up.wait(20)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while block := connection.recv(1 << 20):
                    reply += block
            connection.settimeout(20)
            room.set()
            reply += b"".join(iter(lambda: connection.recv(1 << 20), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % large.stat().st_size in head
    assert body == bytes(len(body))


def test_an_image_that_shrinks_while_it_is_sent_ends_the_connection(
    tmp_path: Path, large: Path
) -> None:
    server = mirror_images.ImageServer(tmp_path)
    with server.running():
        address = ("127.0.0.1", server.server_port)
        with socket.create_connection(address, 20) as connection:
            connection.sendall(raw("GET /images/large.png HTTP/1.1"))
            reply = connection.recv(1000)
            os.truncate(large, 1000)
            reply += b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert len(reply) < 1 << 26


def test_a_link_to_itself_does_not_spoil_the_list(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "there.png").write_bytes(b"content")
    server = mirror_images.ImageServer(tmp_path)
    with server.running():
        request = raw("GET /images/ HTTP/1.1\nConnection: close")
        assert exchange(server.server_port, request).endswith(b"\r\n\r\nthere.png\n")
