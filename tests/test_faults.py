"""The image scripts on a bad network, and with untrusted data."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_server import TRANSIENT, Fault, FaultServer, Shares
from helpers import PATIENCE, ROOT, names_in, read_report, running_script
from PIL import Image, ImageOps

import mirror_images
import upload_images

SCRIPTS = {"mirrored": mirror_images.main, "uploaded": upload_images.main}


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_images, "FIRST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(upload_images, "MAX_BACKOFF_SECONDS", 0.01)


class Task:
    """Tiny images for one of the scripts to process.

    `verb` says how: "mirrored" or "uploaded".
    """

    def __init__(self, verb: str, folder: Path, count: int) -> None:
        self.verb = verb
        self.server_folder = folder / "server"
        self.source = self.server_folder if verb == "mirrored" else folder / "photos"
        self.report_file = folder / "report"
        self.server_folder.mkdir()
        self.source.mkdir(exist_ok=True)
        self.prefix = "mirrored_" if verb == "mirrored" else ""
        self.names = [f"{number:03}.png" for number in range(count)]
        for number, name in enumerate(self.names):  # no two images are alike
            image = Image.new("RGB", (7, 5), (90, number % 256, number // 256))
            image.putpixel((0, 0), (255, 0, 0))
            image.save(self.source / name)

    def arguments(self, url: str, *options: str, concurrency: int = 4) -> list[str]:
        mirrored = self.verb == "mirrored"
        where = [url] if mirrored else [str(self.source), "--url", url]
        option = "--chains" if mirrored else "--connections"
        report = ["--report", str(self.report_file)]
        return [*where, option, str(concurrency), *report, *options]

    def run(self, url: str, *options: str, concurrency: int = 4) -> int:
        return SCRIPTS[self.verb](
            self.arguments(url, *options, concurrency=concurrency)
        )

    def arrived(self, name: str) -> bool:
        """Whether the right result for image `name` is on the server, undamaged."""
        with Image.open(self.source / name) as image:
            wanted = ImageOps.mirror(image) if self.verb == "mirrored" else image
            pixels = wanted.tobytes()
        result = self.server_folder / (self.prefix + name)
        if not result.exists():
            return False
        with Image.open(result) as image:
            return image.tobytes() == pixels

    def is_complete(self) -> bool:
        """Whether the server has every result, and nothing unexpected."""
        wanted = {self.prefix + name for name in self.names}
        if self.verb == "mirrored":
            wanted.update(self.names)
        return names_in(self.server_folder) == wanted and all(
            map(self.arrived, self.names)
        )

    def statuses(self) -> dict[str, str]:
        report = read_report(self.report_file)
        return {name: line["status"] for name, line in report.items()}


both_scripts = pytest.mark.parametrize("verb", SCRIPTS)

# ---- faults ----------------------------------------------------------------

# Not detected: extra bytes after the end of a response.
MENDED = [f for f in TRANSIENT if f not in (Fault.TWICE, Fault.TOO_SHORT)]


@both_scripts
def test_every_image_arrives_despite_all_transient_faults(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 100)
    server = FaultServer(task.server_folder, Shares(dict.fromkeys(MENDED, 0.05), 1))
    with server.running() as url:
        options = "--retries", "40", "--timeout", "0.4"
        assert task.run(url, *options, concurrency=32) == 0
    assert all(server.faults[fault] for fault in MENDED)
    assert task.is_complete()
    assert task.statuses() == dict.fromkeys(task.names, verb)


BROKEN = "the connection broke (Connection reset by peer)"
REASONS = {
    Fault.RESET_BEFORE: BROKEN,
    Fault.RESET_DURING: BROKEN,
    Fault.RESET_AFTER: BROKEN,
    Fault.STALL: "no response within 0.3 s",
    Fault.TOO_LONG: "no response within 0.3 s",
    Fault.TOO_MANY: "429 Too Many Requests: slow down",
    Fault.ERROR: "500 Internal Server Error: out of order",
    Fault.SHORT: "invalid response (peer closed connection without sending complete",
    Fault.GARBAGE: "invalid response (illegal status line",
    Fault.REDIRECT: "302 Found: redirects to http://127.0.0.1:9/elsewhere are not",
}


def test_each_persistent_fault_is_reported_and_fails_one_image(tmp_path: Path) -> None:
    task = Task("uploaded", tmp_path, len(REASONS) + 2)
    spoiled, good = task.names[: len(REASONS)], task.names[len(REASONS) :]
    faults = dict(zip(spoiled, REASONS, strict=True))
    server = FaultServer(task.server_folder, lambda request: faults.get(request.name))
    with server.running() as url:
        assert task.run(url, "--retries", "0", "--timeout", "0.3") == 1
    report = read_report(task.report_file)
    for name in spoiled:
        assert report[name]["error"].startswith(REASONS[faults[name]])
    assert all(map(task.arrived, good))
    assert task.statuses() == dict.fromkeys(spoiled, "failed") | dict.fromkeys(
        good, "uploaded"
    )


# ---- kill -9 ---------------------------------------------------------------


@both_scripts
def test_a_run_that_is_killed_repeatedly_finishes_the_remaining_images(
    tmp_path: Path, verb: str
) -> None:
    task = Task(verb, tmp_path, 30)
    options = ["--skip-existing"] if verb == "uploaded" else []
    rng = random.Random(verb)
    server = FaultServer(task.server_folder)
    with server.running() as url:
        for kills in range(40):
            enough = server.saved.total() + rng.randint(7, 11)
            arguments = task.arguments(url, *options)
            script = "mirror_images.py" if verb == "mirrored" else "upload_images.py"
            with running_script(script, *arguments) as process:

                def kill_in_time(name: str) -> None:
                    if server.saved.total() >= enough:  # noqa: B023
                        process.kill()

                server.on_saved = kill_in_time
                _, error = process.communicate(timeout=PATIENCE)
            if process.returncode != -signal.SIGKILL:
                break
    assert (process.returncode, error) == (0, "")
    assert kills >= 2
    assert task.is_complete()
    # Again at most what was in flight.
    assert server.saved.total() <= 30 + 4 * kills
    downloads = [
        n for (method, name), n in server.requests.items() if method == "GET" and name
    ]
    assert sum(downloads) <= 30 + 4 * kills


# ---- a server that is gone -------------------------------------------------


def kill(server: "subprocess.Popen[str]") -> None:
    server.kill()
    server.wait()


def stop(server: "subprocess.Popen[str]") -> None:
    """Let the server accept connections, but never respond again."""
    server.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)


@pytest.mark.parametrize(("verb", "end"), [("mirrored", stop), ("uploaded", kill)])
def test_a_server_that_never_comes_back_ends_the_run(
    tmp_path: Path,
    verb: str,
    end: Callable[["subprocess.Popen[str]"], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = Task(verb, tmp_path, 60)
    record = upload_images.Run.record

    def end_server_in_mid_run(
        run: upload_images.Run, outcome: upload_images.Outcome
    ) -> None:
        record(run, outcome)
        if sum(run.counts.values()) == 10:
            end(server)

    monkeypatch.setattr(upload_images.Run, "record", end_server_in_mid_run)
    serve = ["--serve", str(task.server_folder), "--port", "0"]
    with running_script("mirror_images.py", *serve) as server:
        assert server.stdout
        match = re.search("http://[^ ]+", server.stdout.readline())
        assert match
        options = ["--retries", "1", "--timeout", "0.3", "--give-up-after", "7"]
        assert task.run(match[0], *options) == 1
    output, error = capsys.readouterr()
    assert "giving up: 7 requests in a row failed; the last error: " in error
    counts = {text: int(n) for n, text in re.findall(r"(\d+) ([a-z ]+),", output)}
    assert counts[verb] in range(10, 14)
    assert counts["failed"] in range(7, 11)
    assert counts["not tried"] == 60 - counts[verb] - counts["failed"]
    statuses = list(task.statuses().values())
    assert statuses.count("failed") == counts["failed"]
    assert statuses.count(verb) == counts[verb]


# ---- untrusted bytes -------------------------------------------------------


def test_damaged_images_are_mirrored_or_refused() -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz_mirror.py"), "1", "3000"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, (result.stdout[-10:], result.stderr[-1000:])
    mirrored, refused = map(int, re.findall("[0-9]+", result.stdout.splitlines()[-1]))
    assert mirrored + refused >= 3000
    assert mirrored > 300
