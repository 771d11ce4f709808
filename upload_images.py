# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx~=0.28.1", "sniffio~=1.3"]
# ///
"""Upload the images in a folder to an image service.

    python upload_images.py FOLDER [--url URL] [--recursive] [--skip-existing] ...

Each file whose name is that of an image is sent in its own POST request, as
multipart/form-data (RFC 7578), several at once. The request body is built here and
streamed from disk; httpx is only the transport.

mirror_images.py also uses `Run`, which processes many images at once, counts and
reports, and its `Client`, which talks to the service and retries.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import logging
import mimetypes
import os
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Self, TextIO, TypeVar

import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000/images/"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}

# The retry policy. Any other status would just recur.
# 202 does not mean that an image is saved (RFC 9110), and 206 is only a part of one.
SUCCESS = {"GET": {200}, "POST": {200, 201, 204}}
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
MAX_RETRY_AFTER_SECONDS = 120.0

# The write time-out applies to each chunk: a slow uplink must send one in that time.
CHUNK_SIZE = 32 * 1024  # bytes
MIN_BYTES_PER_SECOND = 10_000  # slower attempts are abandoned
MAX_LIST_SIZE = 64_000_000  # bytes of the list of images
MAX_NAME_LENGTH = 4096  # characters in a line of that list
MAX_RESPONSE_SIZE = 1 << 16  # bytes of the response to a POST

# Missing on some systems.
mimetypes.add_type("image/jpeg", ".jfif")
mimetypes.add_type("image/jp2", ".jp2")
mimetypes.add_type("image/jp2", ".j2k")
mimetypes.add_type("image/webp", ".webp")
mimetypes.add_type("image/x-portable-floatmap", ".pfm")


class FatalError(Exception):
    """The script cannot run; the message is shown to the user."""


class ImageError(ValueError):
    """An image cannot be processed; the message says why."""


class RequestError(Exception):
    """A request failed; the message says why.

    `retry_after` is the number of seconds to wait before a retry: 0 if the server does
    not say, None if a retry would not help.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


# ---- what the script does --------------------------------------------------


async def upload_folder(run: Run, arguments: argparse.Namespace) -> None:
    """Upload the images in a folder."""
    folder: Path = arguments.folder
    images, others = find_files(folder, arguments.recursive)
    names = upload_names(images, arguments.join_path)
    if not images:
        hint = "" if arguments.recursive else "; --recursive includes subfolders"
        logger.warning("there are no images in %s%s", folder, hint)
    existing: set[str] = set()
    if arguments.skip_existing:
        existing.update(form_escape(name) for name in await run.client.list())
    remaining = []
    for path in images:
        if form_escape(names[path]) in existing:
            others.append(Outcome(path, "skipped", error="already on the server"))
        elif run.in_shard(path):
            remaining.append(path)

    async def upload(outcome: Outcome) -> None:
        with open_regular_file(folder / outcome.name) as file:
            outcome.bytes_in = os.fstat(file.fileno()).st_size
            await run.client.post(names[outcome.name], file, outcome)

    await run.chains(remaining, upload, arguments.connections)
    for outcome in others:
        if run.in_shard(outcome.name):
            run.record(outcome)


# ---- files -----------------------------------------------------------------


def media_type(name: str) -> str:
    """The media type of a file, judged by its name."""
    guess, encoding = mimetypes.guess_type(name, strict=False)
    return guess if guess and not encoding else "application/octet-stream"


def find_files(folder: Path, recursive: bool) -> tuple[list[str], list[Outcome]]:
    """The images in a folder, as paths below it.

    Also returns the outcomes of files that are not images and of subfolders that cannot
    be read. Raises FatalError if `folder` itself cannot be read.
    """
    images: list[str] = []
    others: list[Outcome] = []

    def on_error(error: OSError) -> None:
        if error.filename == str(folder):
            hint = "give the path of a folder with images"
            raise FatalError(f"{folder}: {error.strerror}; {hint}") from error
        path = os.path.relpath(error.filename, folder)
        others.append(Outcome(path, "failed", error=error.strerror))

    for parent, subfolders, names in os.walk(folder, onerror=on_error):
        subfolders[:] = sorted(subfolders) if recursive else []
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), folder)
            if media_type(name).startswith("image/"):
                images.append(path)
            else:
                why = "not an image, judging by its name"
                others.append(Outcome(path, "skipped", error=why))
    return images, others


def upload_names(paths: Iterable[str], join_path: bool) -> dict[str, str]:
    """The name to upload each file under; FatalError if two clash."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    clashes: list[str] = []
    for path in paths:
        names[path] = "_".join(Path(path).parts) if join_path else Path(path).name
        other = first.setdefault(form_escape(names[path]), path)
        if other != path:
            clashes.append(f"{other} and {path}")
    if clashes:
        shown = ", ".join(clashes[:10])
        if len(clashes) > 10:
            shown += f", and {len(clashes) - 10} more pairs"
        hint = "" if join_path else "; --join-path tells subfolders apart"
        raise FatalError(f"the same name would be uploaded twice: {shown}{hint}")
    return names


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading; ImageError if it is not regular, as a pipe would block."""
    if path.is_symlink() and not path.exists():
        raise ImageError("a broken link")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ImageError("not a regular file")
    return path.open("rb")


# ---- the request body ------------------------------------------------------


def form_escape(name: str) -> str:
    """A name the way browsers send it (WHATWG HTML, "multipart/form-data encoding")."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


class Form:
    """A form with one file, streamed from disk: multipart/form-data (RFC 7578).

    Raises ImageError if the file is empty. Iteration raises it before the end of the
    body if the file has changed size, so that the server gets an incomplete request
    instead of an incomplete file.
    """

    def __init__(self, field: str, name: str, file: BinaryIO) -> None:
        self.file = file
        self.file_size = file.seek(0, os.SEEK_END)
        if not self.file_size:
            raise ImageError("the file is empty")
        boundary = secrets.token_hex(16)
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="{form_escape(field)}"; '
            f'filename="{form_escape(name)}"\r\n'
            f"Content-Type: {media_type(name)}\r\n\r\n"
        )
        self.head = head.encode("utf-8", "surrogateescape")
        self.tail = f"\r\n--{boundary}--\r\n".encode()
        self.size = len(self.head) + self.file_size + len(self.tail)
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(self.size),
        }

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.file.seek(0)
        piece, sent = self.head, 0
        while (chunk := self.file.read(CHUNK_SIZE)) and sent <= self.file_size:
            sent += len(chunk)
            if len(piece) >= CHUNK_SIZE:
                yield piece
                piece = b""
            piece += chunk  # a small image is sent in one piece with head and tail
        if sent != self.file_size:
            raise ImageError("the file changed size while it was being sent")
        yield piece + self.tail


# ---- the image service -----------------------------------------------------


@dataclasses.dataclass
class Client:
    """A client of the image service at `url`, with retries, for many concurrent chains.

    The methods raise RequestError if a request still fails after its retries, and
    FatalError if nothing has ever responded at the URL. `outcome` counts the attempts.
    """

    url: str
    field: str = "file"  # the name of the form field
    headers: Sequence[tuple[bytes, bytes]] = ()  # sent with each request
    timeout: float = 30.0  # seconds without progress after which an attempt fails
    retries: int = 4  # attempts after the first

    def __post_init__(self) -> None:
        url = httpx.URL(self.url)
        self._url = url.copy_with(userinfo=b"")
        self._timeout = httpx.Timeout(self.timeout).as_dict()
        self._headers = httpx.Headers({"Accept": "*/*", "Accept-Encoding": "identity"})
        self._headers["User-Agent"] = f"python-httpx/{httpx.__version__}"
        if url.userinfo:  # RFC 7617
            credentials = f"{url.username}:{url.password}".encode()
            token = base64.b64encode(credentials).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._headers.update(list(self.headers))
        self._responded = False
        try:
            self._tls = httpx.create_ssl_context()  # takes 20 ms, so only once
            self._idle = [self._connection()]
        except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
            settings = "certificates or proxies set in the environment"
            raise FatalError(f"cannot use the {settings}: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for connection in self._idle:
            await connection.aclose()

    async def list(self) -> list[str]:
        """GET the list of images, UTF-8 text with one name per line, without duplicates.

        Raises FatalError if there is no such list.
        """
        outcome = Outcome("the list of images")
        try:
            response = await self._send(outcome, "GET", self._url, MAX_LIST_SIZE)
            return parse_list(*response)
        except FatalError:
            raise
        except Exception as error:
            what = "the list of images (plain text, one name per line)"
            message = f"{self._url}: cannot get {what}: {reason(error)}"
            raise FatalError(message) from error

    async def get(self, name: str, max_size: int, outcome: Outcome) -> bytes:
        """GET the image `name`; ImageError if it is larger than `max_size` bytes."""
        base, mark, query = str(self._url).partition("?")
        quoted = urllib.parse.quote(name, safe="")
        url = f"{base.removesuffix('/')}/{quoted}{mark}{query}"
        _, content = await self._send(outcome, "GET", url, max_size)
        outcome.bytes_in = len(content)
        return content

    async def post(self, name: str, file: BinaryIO, outcome: Outcome) -> None:
        """POST an image, streamed from `file`; ImageError if it is empty or changes."""
        form = Form(self.field, name, file)
        await self._send(outcome, "POST", self._url, form=form)
        outcome.bytes_out = form.file_size

    async def _send(
        self,
        outcome: Outcome,
        method: str,
        url: httpx.URL | str,
        max_size: int = 0,
        form: Form | None = None,
    ) -> tuple[httpx.Headers, bytes]:
        """Send a request, with retries where they can help."""
        attempt = 0
        while True:
            attempt += 1
            outcome.attempts += 1
            try:
                return await self._attempt(method, url, max_size, form)
            except RequestError as error:
                if error.retry_after is None:
                    raise
                if error.retry_after > MAX_RETRY_AFTER_SECONDS:
                    asked = f"the server says to wait {error.retry_after:.0f} s"
                    raise RequestError(f"{error} ({asked})") from error
                if attempt > self.retries:
                    attempts = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise RequestError(f"{error}{attempts}") from error
                wait = error.retry_after + backoff(attempt)
                retry = f"retry {attempt} of {self.retries} in {wait:.1f} s"
                logger.info("%s: %s; %s", outcome.name, error, retry)
                await asyncio.sleep(wait)

    async def _attempt(
        self, method: str, url: httpx.URL | str, max_size: int, form: Form | None
    ) -> tuple[httpx.Headers, bytes]:
        """Send a request once; return the headers and the content of the response."""
        connection = self._idle.pop() if self._idle else self._connection()
        # `timeout` limits a single read or write; bytes could still trickle in forever.
        seconds = 10 * self.timeout
        fields = self._headers.copy()
        if form:
            seconds += form.size / MIN_BYTES_PER_SECOND
            fields.update(form.headers)
        try:
            async with asyncio.timeout(seconds) as deadline:
                request = httpx.Request(
                    method,
                    url,
                    headers=fields,
                    content=form,
                    extensions={"timeout": self._timeout},
                )
                response = await connection.handle_async_request(request)
                self._responded = True
                try:
                    if response.status_code not in SUCCESS[method]:
                        raise await status_error(response)
                    content = b""
                    if method == "GET":
                        content = await read_content(response, max_size, deadline)
                    else:
                        await discard_content(response)
                finally:
                    await response.aclose()
        except BaseException as error:
            await connection.aclose()
            unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if unreachable and not self._responded:
                message = f"{self._url}: {error_text(error, self.timeout)}"
                if self._url.scheme == "http" and self._url.host in LOOPBACK:
                    hint = "python mirror_images.py --serve received/"
                    message += f"; to try it out, start {hint}"
                raise FatalError(message) from error
            if isinstance(error, httpx.RequestError | ssl.SSLError | TimeoutError):
                raise RequestError(error_text(error, self.timeout), 0.0) from error
            raise
        self._idle.append(connection)
        return response.headers, content

    def _connection(self) -> httpx.AsyncHTTPTransport:
        """A single connection, through the proxy set in the environment, if any.

        httpcore scans all connections of a pool for each request: with 100 of them, a
        request costs seven times the processor time (encode/httpcore#1035). An
        AsyncClient on top, for cookies and redirects, would cost 15 % more.
        """
        url = self._url
        # A proxy could not reach this machine's own loopback addresses.
        direct = url.host in LOOPBACK or urllib.request.proxy_bypass(url.host)
        proxies = {} if direct else urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if proxy and "://" not in proxy:
            proxy = f"http://{proxy}"
        limits = httpx.Limits(max_connections=1)
        return httpx.AsyncHTTPTransport(verify=self._tls, limits=limits, proxy=proxy)


async def read_content(
    response: httpx.Response, max_size: int, deadline: asyncio.Timeout
) -> bytes:
    """Read a body, extending the deadline; ImageError if it exceeds `max_size` bytes."""
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise RequestError(f"the response is compressed ({encoding[:80]})")
    content = bytearray()
    if int(response.headers.get("Content-Length", 0)) <= max_size:
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > max_size:
                break
            extension = len(chunk) / MIN_BYTES_PER_SECOND
            deadline.reschedule((deadline.when() or 0.0) + extension)
        else:
            return bytes(content)
    raise ImageError(f"larger than {size_text(max_size)}")


async def discard_content(response: httpx.Response) -> None:
    """Read a short body to its end, so that the connection can be reused."""
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MAX_RESPONSE_SIZE:
            break


async def status_error(response: httpx.Response) -> RequestError:
    """A RequestError with the status and the beginning of the message."""
    status = f"{response.status_code} {response.reason_phrase[:80]}".strip()
    if "Location" in response.headers and response.is_redirect:
        location = response.headers["Location"][:200]
        return RequestError(f"{status}: redirects to {location} are not followed")
    beginning = b""
    if "html" not in response.headers.get("Content-Type", ""):
        with contextlib.suppress(httpx.RequestError):  # the status is known anyway
            async for beginning in response.aiter_raw(10_000):
                break
    message = " ".join(beginning.decode("utf-8", "replace").split())
    reason = f"{status}: {message[:200]}" if message else status
    if response.status_code not in RETRYABLE:
        return RequestError(reason)
    return RequestError(reason, retry_after(response.headers))


def retry_after(headers: httpx.Headers) -> float:
    """The seconds to wait according to Retry-After (RFC 9110, section 10.2.3), or 0."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return 0.0
    date = date.replace(tzinfo=date.tzinfo or UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def backoff(attempt: int) -> float:
    """Seconds to wait after an attempt: exponential, with jitter.

    Jitter keeps chains that failed together from retrying together.
    """
    # The exponent is limited because 2.0 ** 1024 overflows.
    seconds = FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 99)
    return min(MAX_BACKOFF_SECONDS, seconds) * random.uniform(0.5, 1.0)


def error_text(error: BaseException, timeout: float) -> str:
    """Why there was no response."""
    if isinstance(error, httpx.TimeoutException):
        return f"no response within {timeout:g} s"
    if isinstance(error, TimeoutError):
        return "the response took too long"
    detail = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:  # the operating system's error is the clearest
        if isinstance(cause, ssl.SSLError | socket.gaierror):  # not a real errno
            detail = cause.strerror or detail
        elif isinstance(cause, OSError) and cause.errno:
            detail = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect ({detail})"
    if isinstance(error, httpx.NetworkError):
        return f"the connection broke ({detail})"
    return f"invalid response ({detail})"


def parse_list(headers: httpx.Headers, content: bytes) -> list[str]:
    """The names in a list of images; RequestError if it is not one."""
    content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type not in ("", "text/plain", "application/octet-stream"):
        raise RequestError(f"the response is {content_type}")
    beginning = content[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise RequestError("the response is an HTML or XML page")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError("the response is not UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if max(map(len, lines)) > MAX_NAME_LENGTH:
        raise RequestError(f"a line has more than {MAX_NAME_LENGTH} characters")
    return list(dict.fromkeys(line for line in lines if line.strip()))


# ---- a run over many images ------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """The result for one image: a line of the report."""

    name: str  # in the server's list, or the path below the folder
    status: str = "failed"  # or "skipped", or the run's verb: "uploaded", "mirrored"
    bytes_in: int = 0  # read from disk or downloaded
    bytes_out: int = 0  # accepted by the server
    seconds: float = 0.0
    attempts: int = 0  # requests, retries included
    error: str | None = None  # why it failed or was skipped


@dataclasses.dataclass
class Run:
    """A run over many images: its chains, counts, progress, report and summary."""

    verb: str  # the status of an image that succeeded
    client: Client
    report: TextIO | None  # for JSON lines, replacing its earlier content
    shard: tuple[int, int]  # (K, N): the K-th of N parts
    give_up_after: int  # failed requests in a row; 0: never

    def __post_init__(self) -> None:
        self.counts = {self.verb: 0, "failed": 0, "skipped": 0}
        self.remaining = 0
        self.bytes_out = 0
        self.start = time.monotonic()
        self.exit_status = 0
        self._failed_requests = 0  # in a row
        self._task: asyncio.Task[None] | None = None

    def in_shard(self, name: str) -> bool:
        """Whether `name` is in this run's shard, which depends on the name alone."""
        part, parts = self.shard
        data = name.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(digest, "big") % parts == part - 1

    async def chains(
        self,
        names: Sequence[str],
        chain: Callable[[Outcome], Awaitable[None]],
        concurrency: int,
    ) -> None:
        """Await `chain(Outcome(name))` for each name, `concurrency` at a time.

        Each coroutine takes the next name when it is free, so memory grows with
        `concurrency`, not with the number of names.
        """
        self.remaining = len(names)
        source = iter(names)
        # A chain may have a connection and a file open; workers have some as well.
        if concurrency > (most := open_files_limit() // 3):
            logger.warning("only %d at a time: the limit on open files is low", most)
            concurrency = most

        async def run_chains() -> None:
            for name in source:
                await self._run_chain(chain, Outcome(name))

        coroutines = [run_chains() for _ in range(min(concurrency, len(names)))]
        await asyncio.gather(*coroutines)

    async def _run_chain(
        self, chain: Callable[[Outcome], Awaitable[None]], outcome: Outcome
    ) -> None:
        """Await a chain; any error in it, except FatalError, fails that image alone."""
        start = time.monotonic()
        request_failed = False
        try:
            await chain(outcome)
            outcome.status = self.verb
        except FatalError:
            raise
        except Exception as error:
            outcome.error = reason(error)
            request_failed = not isinstance(error, ImageError | OSError)
            logger.debug("%s", outcome.name, exc_info=True)
        outcome.seconds = round(time.monotonic() - start, 3)
        self.remaining -= 1
        self.record(outcome)
        if request_failed:
            self._failed_requests += 1
        elif outcome.attempts:  # without a request, nothing was learnt about the server
            self._failed_requests = 0
        if request_failed and self._failed_requests == self.give_up_after:
            message = "giving up: %d requests in a row failed; the last error: %s"
            logger.error(message, self._failed_requests, outcome.error)
            self._cancel(1)

    def record(self, outcome: Outcome) -> None:
        """Count an outcome, log it and report it."""
        self._empty_report()
        self.counts[outcome.status] += 1
        self.bytes_out += outcome.bytes_out
        level = logging.ERROR if outcome.status == "failed" else logging.INFO
        logger.log(level, "%s: %s", outcome.name, outcome.error or outcome.status)
        if self.report is None:
            return
        line = json.dumps(dataclasses.asdict(outcome))
        try:
            print(line, file=self.report, flush=True)
        except OSError as error:
            logger.error("the report is incomplete: %s", error.strerror)
            self._close_report()
            self.exit_status = 1

    def execute(self, work: Callable[[], Awaitable[None]]) -> int:
        """Await `work()`, print the summary, return the exit status.

        Ctrl-C, SIGTERM and giving up cancel it.
        """

        async def supervised() -> None:
            self._task = asyncio.current_task()
            loop = asyncio.get_running_loop()
            # asyncio.run() would raise KeyboardInterrupt anywhere at the second Ctrl-C.
            for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
                if signal.getsignal(number) != signal.SIG_IGN:  # as after nohup or &
                    with contextlib.suppress(NotImplementedError):  # Windows
                        loop.add_signal_handler(number, self._cancel, status)
            if logger.isEnabledFor(logging.WARNING):
                self._show_progress()
            async with self.client:
                await work()
            self._empty_report()

        stream = sys.stderr if self.report is sys.stdout else sys.stdout
        try:
            asyncio.run(supervised())
        except KeyboardInterrupt:  # Windows
            self.exit_status = 130
        except asyncio.CancelledError:
            pass  # by _cancel()
        finally:
            self._close_report()
            print_line(erase_line(), sys.stderr, end="")
        print_line(self.summary(), stream)
        return self.exit_status or int(bool(self.counts["failed"]))

    def _empty_report(self) -> None:
        """Truncate an earlier run's report, before the first outcome of this run."""
        if self.report not in (None, sys.stdout) and not any(self.counts.values()):
            with contextlib.suppress(OSError):  # a pipe
                self.report.truncate(0)

    def _close_report(self) -> None:
        if self.report not in (None, sys.stdout):
            with contextlib.suppress(OSError):
                self.report.close()
        self.report = None

    def _cancel(self, exit_status: int) -> None:
        self.exit_status = exit_status
        if self._task:
            self._task.cancel()

    def summary(self) -> str:
        """What happened, in one line."""
        parts = [f"{count} {status}" for status, count in self.counts.items()]
        if self.remaining:
            parts.append(f"{self.remaining} not tried")
        seconds = time.monotonic() - self.start
        return f"{', '.join(parts)}, {size_text(self.bytes_out)} in {seconds:.1f} s"

    def _show_progress(self) -> None:
        """Show the progress: in place on a terminal, otherwise a line every 10 seconds."""
        done = self.counts[self.verb] + self.counts["failed"]
        rate = done / max(time.monotonic() - self.start, 1e-6)
        line = f"{done}/{done + self.remaining}, {self.counts['failed']} failed"
        if done:
            seconds = timedelta(seconds=round(self.remaining / rate))
            line += f", {rate:.1f}/s, {seconds} remaining"
        if erase := erase_line():
            line = erase + line[: shutil.get_terminal_size().columns - 1]
        if done:
            print_line(line, sys.stderr, end="" if erase else "\n")
        interval = 0.2 if erase else 10.0  # seconds
        asyncio.get_running_loop().call_later(interval, self._show_progress)


def open_files_limit() -> int:
    """Raise the limit on open files as far as allowed; return it."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, min(hard, 10_240))  # macOS accepts no more
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def reason(error: Exception) -> str:
    """Why an image failed."""
    if isinstance(error, ImageError | RequestError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


# ---- text ------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with control and other non-printable characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def size_text(size: float) -> str:
    """A human-readable number of bytes: 4.2 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def print_line(line: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print a line, unless the stream is closed or cannot be written to.

    Such a stream is redirected, with what it has buffered: Python flushes it again
    before it forks and at exit, and would fail again.
    """
    if stream is not None:
        try:
            print(line, file=stream, end=end, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def erase_line() -> str:
    """The sequence that erases the progress line (ECMA-48, EL); empty off a terminal."""
    return "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""


class LogFormatter(logging.Formatter):
    """Formats a record as a single line that replaces the progress line."""

    def format(self, record: logging.LogRecord) -> str:
        return erase_line() + printable(super().format(record))


# ---- the command line ------------------------------------------------------


def service_url(argument: str | None) -> str:
    """`argument`, $IMAGES_URL or DEFAULT_URL; FatalError if it is unusable."""
    text = argument or os.environ.get("IMAGES_URL") or DEFAULT_URL
    try:
        url = httpx.URL(text)
        usable = url.scheme in ("http", "https") and url.host and not url.fragment
        usable = usable and (url.port is None or url.port in range(1, 65536))
    except (httpx.InvalidURL, UnicodeError):
        usable = False
    if not usable:
        source = "" if argument else "$IMAGES_URL: "
        shown = re.sub(".*@", "...@", text, flags=re.DOTALL)  # a password is secret
        message = f"{shown!r} is not an http or https URL such as {DEFAULT_URL}"
        raise FatalError(source + message)
    return text


def header_field(text: str) -> tuple[bytes, bytes]:
    """Argument type: a header field, 'Name: value' (RFC 9110, section 5)."""
    name, colon, value = text.partition(":")
    token = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
    if not (colon and re.fullmatch(token, name)) or re.search(r"[\0-\x1f\x7f]", value):
        message = f"{text!r} is not a header field such as 'Name: value'"
        raise argparse.ArgumentTypeError(message)
    return name.encode(), value.strip().encode("utf-8", "surrogateescape")


def integer(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Argument type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
            message = f"{text!r} is not an integer from {least} to {most}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Argument type: a positive number of seconds."""
    if not 0 < float(text) < 1e6:
        raise ValueError
    return float(text)


def shard(text: str) -> tuple[int, int]:
    """Argument type: K/N, the K-th of N parts."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        message = f"{text!r} is not K/N with K from 1 to N, such as 1/4"
        raise argparse.ArgumentTypeError(message)
    return int(match[1]), int(match[2])


def open_report(path: str | None) -> TextIO | None:
    """Open the --report file for appending; FatalError if that fails."""
    if path is None:
        return None
    try:
        return sys.stdout if path == "-" else open(path, "a")
    except OSError as error:
        raise FatalError(f"cannot write {path!r}: {error.strerror}") from error


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both image scripts have, and the exit statuses."""
    parser.epilog = (
        "Exit status: 0 all went well; 1 some images failed or were not tried; 2 the "
        "script could not run: bad arguments, unreadable input, nothing listens at the "
        "URL; 130 interrupted; 143 terminated."
    )
    add = parser.add_argument
    add("--field", default="file", help="name of the form field (default: file)")
    text = "header field 'NAME: VALUE' to send with each request; may be repeated"
    add("--header", type=header_field, action="append", default=[], help=text)
    text = "retries after a broken connection, a time-out or a status like 503 (default: 4)"
    add("--retries", type=integer(0), default=4, metavar="N", help=text)
    text = "seconds without progress after which an attempt fails (default: 30)"
    add("--timeout", type=seconds, default=30.0, metavar="SECONDS", help=text)
    text = "give up after N failed requests in a row (default: 50; 0: never)"
    add("--give-up-after", type=integer(0), default=50, metavar="N", help=text)
    text = "process only the K-th of N disjoint parts, chosen by a hash of the name"
    add("--shard", type=shard, default=(1, 1), metavar="K/N", help=text)
    text = "write a report, one JSON object per image and line; '-' is standard output"
    add("--report", metavar="FILE", help=text)
    verbosity = parser.add_mutually_exclusive_group()
    text = "log each image and each retry"
    verbosity.add_argument(
        "-v", dest="log_level", action="store_const", const="INFO", help=text
    )
    text = "no progress; log errors only"
    verbosity.add_argument(
        "-q", dest="log_level", action="store_const", const="ERROR", help=text
    )
    parser.set_defaults(log_level="WARNING")


def run_images(
    verb: str,
    arguments: argparse.Namespace,
    work: Callable[[Run, argparse.Namespace], Awaitable[None]],
) -> int:
    """Await `work(run, arguments)`; return the exit status of the run."""
    a = arguments
    client = Client(service_url(a.url), a.field, a.header, a.timeout, a.retries)
    run = Run(verb, client, open_report(a.report), a.shard, a.give_up_after)
    return run.execute(lambda: work(run, arguments))


def run_main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    script: Callable[[argparse.Namespace], int],
) -> int:
    """Parse `argv` with the shared options, run the script, return the exit status.

    The log goes to standard error. FatalError becomes one line and the exit status 2.
    """
    add_shared_options(parser)
    arguments = parser.parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    root = logging.getLogger()
    old_level = root.level
    root.addHandler(handler)
    root.setLevel(arguments.log_level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return script(arguments)
    except FatalError as error:
        print_line(f"{parser.prog}: error: {printable(str(error))}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        root.removeHandler(handler)
        root.setLevel(old_level)
        for stream in (sys.stdout, sys.stderr):
            print_line("", stream, end="")  # flushes it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with the arguments `argv`; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="upload_images.py",
        description="Upload the images in a folder to an image service.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    text = f"where to POST (default: $IMAGES_URL, or {DEFAULT_URL})"
    add("--url", help=text)
    add("--recursive", action="store_true", help="include subfolders")
    text = "upload SUBFOLDER/NAME as SUBFOLDER_NAME instead of NAME"
    add("--join-path", action="store_true", help=text)
    text = "skip images already in the server's list"
    add("--skip-existing", action="store_true", help=text)
    text = "images to upload at the same time (default: 8)"
    add("--connections", type=integer(1), default=8, metavar="N", help=text)
    return run_main(parser, argv, lambda a: run_images("uploaded", a, upload_folder))


if __name__ == "__main__":
    raise SystemExit(main())
