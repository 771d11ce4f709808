"""An image service with faults, as on a bad network.

    plan = Shares({Fault.STALL: 0.05, Fault.BUSY: 0.05}, seed=1)
    with FaultServer(folder, plan).running() as url:
        mirror_images.main([url])

A plan is called with every request, and returns the fault to apply, or the exact bytes
to respond with, or None for no fault. It sees only the method, the image's name and the
number of the attempt, so that the same plan treats an image the same way, whatever the
timing of threads.
"""

import collections
import contextlib
import enum
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from helpers import response


class Fault(enum.Enum):
    """What happens to a request, and whether the image of a POST is saved anyway."""

    RESET_BEFORE = "reset before the body is received or sent"  # not saved
    RESET_DURING = "reset in the middle of the body"  # not saved
    RESET_AFTER = "reset after the body; a POST gets no response"  # saved
    STALL = "no response, and the connection stays open"  # not saved
    TOO_MANY = "429 with Retry-After"  # not saved
    ERROR = "500"  # not saved
    BUSY = "503"  # not saved
    SHORT = "half of the response's body, then the end"  # saved
    TOO_LONG = "a larger Content-Length than the body has"  # saved
    TOO_SHORT = "a smaller Content-Length than the body has"  # saved
    TWICE = "another response right after the response"  # saved
    PAGE = "an HTML page with status 200"  # saved
    REDIRECT = "a redirect to another server"  # not saved
    GARBAGE = "something that is not HTTP"  # not saved
    CLOSED_IDLE = "no fault, but then the kept-alive connection is closed"  # saved


# Faults that a retry can overcome. A redirect is final, and a page may be valid.
TRANSIENT = [fault for fault in Fault if fault not in (Fault.PAGE, Fault.REDIRECT)]
STALL_LIMIT = 30.0  # seconds; a client with a shorter --timeout ends a stall


class Request(NamedTuple):
    method: str
    name: str  # of the image; "" for the list
    attempt: int  # 1, 2, ... for the same method and name


Plan = Callable[[Request], Fault | bytes | None]


class Shares:
    """A plan that applies each fault to a given share of the requests."""

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


# Sent instead of the right response; the request is ignored.
INSTEAD = {
    Fault.STALL: b"",
    Fault.TOO_MANY: response("429 Too Many Requests", "slow down", "Retry-After: 0"),
    Fault.ERROR: response("500 Internal Server Error", "out of order"),
    Fault.BUSY: response("503 Service Unavailable", "come back later"),
    Fault.REDIRECT: response("302 Found", "", "Location: http://127.0.0.1:9/elsewhere"),
    Fault.GARBAGE: b"\0\xff\xfe this is not HTTP\r\n\r\n",
}
PAGE = response("200 OK", "<!doctype html><p>Log in</p>", "Content-Type: text/html")
CLOSING = {Fault.SHORT, Fault.GARBAGE, Fault.CLOSED_IDLE}


class FaultServer(http.server.ThreadingHTTPServer):
    """An image service over a folder, with faults according to `plan`.

    It counts `requests` by method and name, `faults` by type, and `saved` images by
    name. `on_saved` is called with each saved name before the response is sent.
    """

    request_queue_size = 1024

    def __init__(self, folder: Path, plan: Plan = no_faults) -> None:
        super().__init__(("127.0.0.1", 0), FaultHandler)
        self.folder = folder
        self.plan = plan
        self.lock = threading.Lock()
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.faults: collections.Counter[Fault] = collections.Counter()
        self.saved: collections.Counter[str] = collections.Counter()
        self.on_saved: Callable[[str], None] = lambda name: None

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread while the block runs; yield the URL."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{self.server_port}/images/"
        finally:
            self.shutdown()
            self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing: connections are meant to break here."""

    def next_fault(self, method: str, name: str) -> Fault | bytes | None:
        with self.lock:
            self.requests[method, name] += 1
            fault = self.plan(Request(method, name, self.requests[method, name]))
            if isinstance(fault, Fault):
                self.faults[fault] += 1
        return fault

    def save(self, name: str, form: bytes) -> bytes:
        """Save the only file of a form; return the response."""
        content = form.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
        (self.folder / name).write_bytes(content)
        with self.lock:
            self.saved[name] += 1
        self.on_saved(name)
        return response("200 OK", f"saved {name}\n")

    def deliver(self, name: str) -> bytes:
        """The response with an image, or with the list if the name is empty."""
        if not name:
            names = sorted(path.name for path in self.folder.iterdir())
            text = "".join(f"{name}\n" for name in names)
            return response("200 OK", text, "Content-Type: text/plain; charset=utf-8")
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return response("404 Not Found", "no such image")
        return response("200 OK", content, "Content-Type: image/png")


class FaultHandler(http.server.BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"
    timeout = STALL_LIMIT
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/images/")
        self.respond(urllib.parse.unquote(path, errors="surrogateescape"))

    def do_POST(self) -> None:
        # Peek at the name at the beginning of the form, leaving it to be read later.
        match = re.search(rb'filename="(.*?)"', self.rfile.peek())  # type: ignore[attr-defined]
        assert match
        self.respond(match[1].decode("utf-8", "surrogateescape"))

    def respond(self, name: str) -> None:
        """Respond to a request, with the fault that the plan returns for it."""
        fault = self.server.next_fault(self.command, name)
        length = int(self.headers.get("Content-Length", 0))
        if fault is Fault.RESET_BEFORE:
            return self.reset()
        if fault is Fault.RESET_DURING and length:
            self.rfile.read(length // 2)
            return self.reset()
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client disconnected")
        if isinstance(fault, bytes):
            spoiled = fault
        elif fault in INSTEAD:
            spoiled = INSTEAD[fault]
        else:
            post = self.command == "POST"
            right = self.server.save(name, body) if post else self.server.deliver(name)
            unheard = fault is Fault.RESET_AFTER and post
            spoiled = b"" if unheard else spoil(fault, right)
        # In one piece, so that it also arrives in one piece.
        self.connection.sendall(spoiled)
        if fault in (Fault.RESET_DURING, Fault.RESET_AFTER):
            self.reset()
        elif fault is Fault.STALL:
            self.close_connection = True
            self.connection.recv(1)  # blocks until the client disconnects
        elif fault in CLOSING:
            self.close_connection = True
        return None

    def reset(self) -> None:
        """End the connection with an RST instead of a FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Not close(), which would wait for rfile and wfile and then send a FIN.
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def spoil(fault: Fault | None, right: bytes) -> bytes:
    """The bytes to send instead of the `right` response."""
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
            return right + response("200 OK", "This is another response.")
        case Fault.PAGE:
            return PAGE
    return right
