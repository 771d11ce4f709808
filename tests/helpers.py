"""Helpers for several test modules: files, reports, terminals, processes, HTTP."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0  # seconds to wait for something that should happen soon


def write(folder: Path, *names: str, content: bytes = b"pixels") -> None:
    """Write files with the same content; create their folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a report by name; there must be one line per name."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_name = {line["name"]: line for line in lines}
    assert len(by_name) == len(lines), "a name has several lines"
    return by_name


# ---- terminals and processes -----------------------------------------------


class Terminal:
    """A pseudo-terminal, or a pipe.

    Everything written to `stream` until the block ends is collected in `output`.
    """

    def __init__(self, *, tty: bool = True) -> None:
        self.reader, writer = pty.openpty() if tty else os.pipe()
        self.stream = os.fdopen(writer, "w")
        self.output = ""
        self.written = threading.Condition()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        with contextlib.suppress(OSError):  # Linux, once the terminal is closed
            while data := os.read(self.reader, 1 << 16):
                with self.written:
                    self.output += data.decode()
                    self.written.notify_all()

    def wait_for(self, pattern: str) -> None:
        with self.written:
            assert self.written.wait_for(
                lambda: re.search(pattern, self.output), PATIENCE
            ), self.output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        self.thread.join()
        os.close(self.reader)


# A shell that runs the tests in the background makes its children ignore SIGINT.
LAUNCHER = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script_command(script: str, *arguments: str | Path) -> list[str]:
    """The command that runs a script in such a way that SIGINT interrupts it."""
    path = str(ROOT / script)
    return [sys.executable, "-c", LAUNCHER, path, *map(str, arguments)]


@contextlib.contextmanager
def running_script(
    script: str, *arguments: str | Path, **options: Any
) -> Iterator["subprocess.Popen[str]"]:
    """Run a script in its own process, its output piped, until the block ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = script_command(script, *arguments)
    with subprocess.Popen(command, **pipes | options) as process:
        try:
            yield process
        finally:
            process.kill()


# ---- raw HTTP --------------------------------------------------------------


def response(status: str, body: str | bytes = b"", *headers: str) -> bytes:
    """The bytes of an HTTP response."""
    body = body.encode() if isinstance(body, str) else body
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1") + body
