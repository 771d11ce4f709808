"""The embedded server with faults: what images meet on a bad network.

    plan = Shares({Fault.STALL: 0.05, Fault.BUSY: 0.05}, seed=1)
    with FaultServer(folder, plan).running() as url:
        mirror_images.main([url])

A plan is called with every request, and returns the fault that it shall meet, or the
very bytes of an answer, or None: all is well. It sees nothing but the method, the
image's name and how often this was asked for before, so that the same plan does the
same to an image however threads are timed.
"""

import collections
import enum
import hashlib
import http
import io
import os
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mirror_images import PATH, ImageHandler, ImageServer, file_name


class Fault(enum.Enum):
    """What happens to a request, and whether a POST's image is saved nevertheless."""

    RESET_BEFORE = "reset before the body is received or sent"  # not saved
    RESET_DURING = "reset in the middle of the body"  # not saved
    RESET_AFTER = "reset after the body; a POST gets no answer"  # saved
    STALL = "no answer, and the connection stays open"  # not saved
    TOO_MANY = "429 with Retry-After"  # not saved
    ERROR = "500"  # not saved
    BUSY = "503"  # not saved
    SHORT = "half of the answer's body, then the end"  # saved
    TOO_LONG = "a larger Content-Length than the body has"  # saved
    TOO_SHORT = "a smaller Content-Length than the body has"  # saved
    TWICE = "another answer right behind the answer"  # saved
    PAGE = "an HTML page with status 200"  # saved
    REDIRECT = "a redirect to another server"  # not saved
    GARBAGE = "something that is not HTTP"  # not saved
    CLOSED_IDLE = "no fault, but then the kept-alive connection is closed"  # saved


# What another attempt can mend. A redirect is an answer, and a page may be one.
TRANSIENT = [fault for fault in Fault if fault not in (Fault.PAGE, Fault.REDIRECT)]
STALL_LIMIT = 30.0  # seconds; a client with a shorter --timeout ends a stall


class Request(NamedTuple):
    method: str
    name: str  # of the image; "" for the list
    attempt: int  # 1, 2, ... for the same method and name


Plan = Callable[[Request], Fault | bytes | None]


class Shares:
    """A plan that hits the stated share of requests with each fault."""

    def __init__(self, shares: Mapping[Fault, float], seed: int = 0) -> None:
        self.shares = shares
        self.seed = seed

    def __call__(self, request: Request) -> Fault | None:
        key = f"{self.seed} {request}".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(key, digest_size=8).digest()
        point = int.from_bytes(digest, "big") / 2**64
        for fault, share in self.shares.items():
            point -= share
            if point < 0:
                return fault
        return None


def no_faults(request: Request) -> None:
    """The plan of a server that works."""


def answer(status: str, body: str | bytes, *headers: str) -> bytes:
    """The bytes of an HTTP answer."""
    body = body.encode() if isinstance(body, str) else body
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


# What is sent instead of the right answer, the request being ignored.
INSTEAD = {
    Fault.STALL: b"",
    Fault.TOO_MANY: answer("429 Too Many Requests", "slow down", "Retry-After: 0"),
    Fault.ERROR: answer("500 Internal Server Error", "out of order"),
    Fault.BUSY: answer("503 Service Unavailable", "come back later"),
    Fault.REDIRECT: answer("302 Found", "", "Location: http://127.0.0.1:9/elsewhere"),
    Fault.GARBAGE: b"\0\xff\xfe this is not HTTP\r\n\r\n",
}
PAGE = answer("200 OK", "<!doctype html><p>Log in</p>", "Content-Type: text/html")
CLOSING = {Fault.SHORT, Fault.GARBAGE, Fault.CLOSED_IDLE}


class FaultServer(ImageServer):
    """An ImageServer whose answers are spoiled as `plan` says.

    It counts what it does: `requests` by method and name, `faults` by kind, `saved` by
    name. `on_saved` is called with each name that was saved, before the client hears
    of it.
    """

    def __init__(self, folder: Path, plan: Plan = no_faults, port: int = 0) -> None:
        super().__init__(folder, port)
        self.RequestHandlerClass = FaultHandler
        self.plan = plan
        self.lock = threading.Lock()
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.faults: collections.Counter[Fault] = collections.Counter()
        self.saved: collections.Counter[str] = collections.Counter()
        self.on_saved: Callable[[str], None] = lambda name: None

    def next_fault(self, method: str, name: str) -> Fault | bytes | None:
        with self.lock:
            self.requests[method, name] += 1
            fault = self.plan(Request(method, name, self.requests[method, name]))
            if isinstance(fault, Fault):
                self.faults[fault] += 1
        return fault

    def note_saved(self, name: str) -> None:
        with self.lock:
            self.saved[name] += 1
        self.on_saved(name)


class FaultHandler(ImageHandler):
    server: FaultServer
    name = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = urllib.parse.unquote(path.removeprefix(PATH), errors="surrogateescape")
        self.spoil(name, super().do_GET)

    def do_POST(self) -> None:
        # The name is at the beginning of the form, and stays to be read there.
        assert isinstance(self.rfile, io.BufferedReader)
        self.name = file_name(self.rfile.peek()) or ""
        self.spoil(self.name, super().do_POST)

    def send_text(self, status: http.HTTPStatus, text: str) -> None:
        if self.command == "POST" and status == http.HTTPStatus.OK:
            self.server.note_saved(self.name)
        super().send_text(status, text)

    def spoil(self, name: str, work: Callable[[], None]) -> None:
        """Answer a request by `work`, but for the fault that the plan has for it."""
        fault = self.server.next_fault(self.command, name)
        if fault is None:
            return work()
        length = int(self.headers.get("Content-Length", 0))
        if fault is Fault.RESET_BEFORE:
            return self.reset()
        if fault is Fault.RESET_DURING and length:
            self.rfile.read(length // 2)
            return self.reset()
        if isinstance(fault, bytes) or fault in INSTEAD:
            self.rfile.read(length)
            spoiled = fault if isinstance(fault, bytes) else INSTEAD[fault]
        else:
            right = self.answer_of(work)
            untold = fault is Fault.RESET_AFTER and length
            spoiled = b"" if untold else spoiled_answer(fault, right)
        # In one piece: what belongs together arrives together.
        self.connection.sendall(spoiled)
        if fault in (Fault.RESET_DURING, Fault.RESET_AFTER):
            self.reset()
        elif fault is Fault.STALL:
            self.close_connection = True
            self.connection.settimeout(STALL_LIMIT)
            self.connection.recv(1)  # nothing comes, until the client goes away
        elif fault in CLOSING:
            self.close_connection = True
        return None

    def answer_of(self, work: Callable[[], None]) -> bytes:
        """What `work` would send."""
        wfile, self.wfile = self.wfile, io.BytesIO()
        try:
            work()
            return self.wfile.getvalue()
        finally:
            self.wfile = wfile

    def reset(self) -> None:
        """End the connection with an RST instead of a FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Not close(): that waits for rfile and wfile, behind a FIN.
        os.close(self.connection.detach())
        self.close_connection = True


def spoiled_answer(fault: Fault, right: bytes) -> bytes:
    """The bytes to send instead of the `right` answer."""
    head, _, body = right.partition(b"\r\n\r\n")
    match fault:
        case Fault.SHORT | Fault.RESET_DURING:
            return right[: -(len(body) // 2)]
        case Fault.TOO_LONG | Fault.TOO_SHORT:
            wrong = len(body) * 2 if fault is Fault.TOO_LONG else len(body) // 2
            length = b"Content-Length: %d"
            head = head.replace(length % len(body), length % wrong)
            return head + b"\r\n\r\n" + body
        case Fault.TWICE:
            return right + answer("200 OK", "This is another answer.")
        case Fault.PAGE:
            return PAGE
    return right
