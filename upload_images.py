# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx~=0.28.1", "sniffio~=1.3"]
# ///
"""Upload the images in a folder to an image service.

    python upload_images.py FOLDER [--url URL] [--recursive] [--skip-existing] ...

Every file whose name says that it is an image goes into a POST request of its own, as
multipart/form-data (RFC 7578), several at once. The request body is built here and
streamed from disk; httpx is only the transport.

mirror_images.py imports from here what both scripts need: connections with retries,
chains, reports, progress, options.

Exit status: 0 everything was uploaded, 1 some images failed, 2 it could not run,
130 interrupted.
"""

import argparse
import asyncio
import dataclasses
import email.utils
import errno
import hashlib
import html
import io
import itertools
import json
import logging
import math
import mimetypes
import os
import random
import re
import secrets
import ssl
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO, TypeVar

import httpx

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000/images/"
CHUNK = 1 << 18  # bytes read from disk and handed to the socket at a time
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MAX_LIST = 1 << 30  # bytes of a list of images
MAX_WORDS = 1 << 16  # bytes of what a server has to say to a POST
# Of RFC 9110's answers, those which say that the image is saved. 202 only promises it.
SAVED = {200, 201, 204}
# Not asked for, but decoded if they come; a thousandfold growth is the most they can
# do. Two of them, or Brotli, can make gigabytes of a few kilobytes.
CODINGS = {"identity", "gzip", "deflate"}
# These may pass; any other answer would only be given again.
PASSING = {408, 425, 429, 500, 502, 503, 504}
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0  # seconds
LONGEST_RETRY_AFTER = 120.0  # seconds; who asks for more than that is taken at his word

# What the tables of some systems lack.
mimetypes.add_type("image/jp2", ".jp2")
mimetypes.add_type("image/jp2", ".j2k")
mimetypes.add_type("image/jpeg", ".jfif")
mimetypes.add_type("image/webp", ".webp")
mimetypes.add_type("image/x-portable-floatmap", ".pfm")


class Trouble(Exception):
    """The script cannot run; the text is the line that the user reads."""


class Failure(Exception):
    """One image failed; the text is the reason.

    `unanswered` tells that no HTTP answer came, `wait` how many seconds another
    attempt should wait: None if it is of no use, 0 if nobody said.
    """

    def __init__(
        self, reason: str, wait: float | None = None, unanswered: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.unanswered = unanswered


# ---- words -----------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or cannot encode, as escape sequences."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def shorten(text: str, length: int) -> str:
    """At most `length` characters of `text`."""
    return text if len(text) <= length else text[: length - 1] + "…"


def size_text(size: float) -> str:
    """A number of bytes as people read it: 4.2 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            break
        size /= 1000
    else:
        unit = "GB"
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


# ---- which files -----------------------------------------------------------


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image (`mimetypes`, `image/*`)."""
    return media_type(name).startswith("image/")


def media_type(name: str) -> str:
    """The media type of a file, by its name."""
    guess, encoding = mimetypes.guess_type(name, strict=False)
    return guess if guess and not encoding else "application/octet-stream"


def find_files(
    folder: Path, recursive: bool = False
) -> tuple[list[Path], list[Path], list[tuple[str, str]]]:
    """Walk `folder`.

    Returns its images, its other files, and (path, reason) for each subfolder that
    cannot be read. Raises Trouble if `folder` itself cannot be read, or if two images
    would be uploaded under the same name.
    """
    images: list[Path] = []
    others: list[Path] = []
    unreadable: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        if error.filename == str(folder):
            hint = "give the path of a folder with images"
            raise Trouble(f"{folder}: {error.strerror}; {hint}") from error
        unreadable.append((str(error.filename), str(error.strerror)))

    for parent, subfolders, names in os.walk(folder, onerror=note):
        subfolders[:] = sorted(subfolders) if recursive else []
        for name in sorted(names):
            (images if is_image(name) else others).append(Path(parent, name))
    paths: dict[str, Path] = {}
    for path in images:
        if (twin := paths.setdefault(path.name, path)) is not path:
            raise Trouble(f"{twin} and {path} would be uploaded under the same name")
    return images, others, unreadable


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether `name` is in part K of N: always the same, whatever names there are."""
    part, parts = shard
    data = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") % parts == part - 1


# ---- the request body ------------------------------------------------------


def form_parts(field: str, name: str) -> tuple[str, bytes, bytes]:
    """A form with one file in it: its Content-Type, what precedes the file's content,
    and what follows.

    multipart/form-data (RFC 7578), names escaped as browsers do it (WHATWG HTML,
    "multipart/form-data encoding algorithm"): UTF-8, percent-encoded only where a
    quotation mark or a line break would end the name.
    """
    boundary = secrets.token_hex(16)
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="{form_escape(field)}"; '
        f'filename="{form_escape(name)}"\r\n'
        f"Content-Type: {media_type(name)}\r\n\r\n"
    )
    return (
        f"multipart/form-data; boundary={boundary}",
        head.encode("utf-8", "surrogateescape"),
        f"\r\n--{boundary}--\r\n".encode(),
    )


def form_escape(name: str) -> str:
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def file_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the content of `file`; Failure if it turns out to be not `size` bytes."""
    file.seek(0)
    left = size
    while left and (chunk := file.read(min(CHUNK, left))):
        left -= len(chunk)
        yield chunk
    if left:
        raise Failure(f"the file shrank while it was sent, {left} bytes are missing")
    if file.read(1):
        raise Failure("the file grew while it was sent")


# ---- the server ------------------------------------------------------------


def tls_context() -> ssl.SSLContext:
    """How to check certificates; Trouble if SSL_CERT_FILE or _DIR is of no use."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        message = f"$SSL_CERT_FILE or $SSL_CERT_DIR is of no use: {error}"
        raise Trouble(message) from error


@dataclasses.dataclass
class Server:
    """The image service, and how to talk to it."""

    url: str
    field: str = "file"
    headers: Sequence[tuple[bytes, bytes]] = ()
    retries: int = 4
    timeout: float = 30.0  # seconds without a byte
    # Making one takes 20 ms: too long for each connection.
    tls: ssl.SSLContext = dataclasses.field(default_factory=tls_context)
    answered: bool = False  # ever; until then, a refused connection ends the run

    @property
    def name(self) -> str:
        """The URL as it may be shown, without a password."""
        return str(httpx.URL(self.url).copy_with(userinfo=b""))


class Connection:
    """One kept-alive connection to the server, with retries. Each chain has its own.

    In a pool that all chains share, httpcore would look through all connections for
    every request: 100 of them cost nine times the processor time of 100 clients with
    a single one.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.attempts = 0  # requests made so far, retries included
        try:
            self.client = httpx.AsyncClient(
                headers=[(b"Accept-Encoding", b"identity"), *server.headers],
                limits=httpx.Limits(max_connections=1),
                timeout=server.timeout,
                # A proxy would not reach this machine's own loopback addresses.
                trust_env=httpx.URL(server.url).host not in LOOPBACK,
                verify=server.tls,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            message = f"the proxy in the environment is of no use: {error}"
            raise Trouble(message) from error

    async def get(self, url: str, limit: int) -> tuple[str, bytes]:
        """Download `url`: its media type, and its content of up to `limit` bytes.

        Raises Failure, after retries where they can help, and Trouble if nothing has
        ever answered there.
        """

        async def read(response: httpx.Response) -> tuple[str, bytes]:
            coding = response.headers.get("Content-Encoding", "identity").lower()
            if coding not in CODINGS:
                words = f"it comes with Content-Encoding {shorten(coding, 80)}"
                raise Failure(f"{words}, which was not asked for")
            announced = int(response.headers.get("Content-Length", 0))
            content = bytearray()
            if announced <= limit:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > limit:
                        break
                else:
                    if surplus(response):
                        words = "more bytes came than the answer announced"
                        raise Failure(words, wait=0.0)
                    kind = response.headers.get("Content-Type", "")
                    return kind.partition(";")[0].strip().lower(), bytes(content)
            raise Failure(f"larger than {size_text(limit)}")

        return await self._with_retries(
            lambda: self.client.build_request("GET", url), {200}, read
        )

    async def post(
        self, name: str, size: int, chunks: Callable[[], Iterable[bytes]]
    ) -> None:
        """Upload an image of `size` bytes, which each call of `chunks` yields anew.

        Raises what `get` raises, and what `chunks` does.
        """
        content_type, head, tail = form_parts(self.server.field, name)
        length = len(head) + size + len(tail)
        headers = {"Content-Type": content_type, "Content-Length": str(length)}

        async def body() -> AsyncIterator[bytes]:
            # A small image goes to the socket in one piece, instead of three.
            piece = head
            for chunk in chunks():
                if len(piece) + len(chunk) > 2 * CHUNK:
                    yield piece
                    piece = b""
                piece += chunk
            yield piece + tail

        async def read(response: httpx.Response) -> None:
            # Only after an answer that was read to its end, the connection stays.
            length = 0
            async for chunk in response.aiter_raw():
                length += len(chunk)
                if length > MAX_WORDS:
                    break

        await self._with_retries(
            lambda: self.client.build_request(
                "POST", self.server.url, headers=headers, content=body()
            ),
            SAVED,
            read,
        )

    async def _with_retries(
        self,
        request: Callable[[], httpx.Request],
        accepted: Collection[int],
        read: Callable[[httpx.Response], Awaitable[T]],
    ) -> T:
        for attempt in itertools.count(1):
            try:
                return await self._attempt(request(), accepted, read)
            except httpx.InvalidURL as error:  # of a very long name
                raise Failure(f"no URL can be made of it: {error}") from error
            except Failure as failure:
                wait, reason = failure.wait, str(failure)
                if wait is None:
                    raise
                if wait > LONGEST_RETRY_AFTER:
                    reason += f" (the server asks to wait for {wait:.0f} s)"
                    raise Failure(reason) from failure
                if attempt > self.server.retries:
                    reason += f" ({attempt} attempts)" if attempt > 1 else ""
                    raise Failure(reason, unanswered=failure.unanswered) from failure
                wait += backoff(attempt)  # also so that not all come back at once
                words = printable(reason)
                logger.info("%s; attempt %d in %.1f s", words, attempt + 1, wait)
                await asyncio.sleep(wait)
        raise AssertionError("count() does not end")

    async def _attempt(
        self,
        request: httpx.Request,
        accepted: Collection[int],
        read: Callable[[httpx.Response], Awaitable[T]],
    ) -> T:
        """Send `request` and `read` an accepted answer; all else is a Failure.

        Trouble if nothing listens there, and nothing ever did.
        """
        self.attempts += 1
        answered = False
        try:
            response = await self.client.send(request, stream=True)
            answered = self.server.answered = True
            try:
                if response.status_code in accepted:
                    return await read(response)
                words = await answer_text(response)
            finally:
                await response.aclose()
                if surplus(response):
                    await response.extensions["network_stream"].aclose()
            if response.status_code not in PASSING:
                raise Failure(words)
            raise Failure(words, wait=retry_after(response.headers))
        except httpx.RequestError as error:
            reason = error_text(error, self.server.timeout)
            if isinstance(error, httpx.ConnectError) and not self.server.answered:
                hint = "python mirror_images.py --serve received/"
                message = f"{self.server.name}: {reason}; to try it out, start {hint}"
                raise Trouble(message) from error
            raise Failure(reason, wait=0.0, unanswered=not answered) from error


def backoff(attempt: int) -> float:
    """Seconds to wait after the `attempt`-th attempt.

    Exponential, with jitter, so that chains that failed together return one by one.
    """
    # 2.0 ** 1024 would be too large for a float.
    longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(attempt - 1, 99))
    return longest * random.uniform(0.5, 1.0)


def retry_after(headers: httpx.Headers) -> float:
    """Seconds that Retry-After asks for (RFC 9110, section 10.2.3); 0 if nothing."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return 0.0
    date = date.replace(tzinfo=date.tzinfo or UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


async def answer_text(response: httpx.Response) -> str:
    """An answer that is no success: its status and the beginning of its words."""
    reason = shorten(response.reason_phrase, 80)
    status = f"{response.status_code} {reason}".strip()
    if response.has_redirect_location:
        location = shorten(response.headers["Location"], 200)
        return f"{status}: the server points to {location}; redirects are not followed"
    beginning = b""
    with suppress(httpx.RequestError):  # the status counts all the same
        async for beginning in response.aiter_raw(10_000):
            break
    text = beginning.decode("utf-8", "replace")
    if "html" in response.headers.get("Content-Type", ""):
        text = re.sub(r"(?is)<(script|style)\b.*?(</\1|$)[^>]*>?|<[^>]*>?", " ", text)
        text = html.unescape(text)
    words = " ".join(text.split())
    return f"{status}: {shorten(words, 200)}" if words else status


def surplus(response: httpx.Response) -> bytes:
    """What was received behind the end of an answer that was read.

    httpcore would take it for the beginning of the next answer on the connection, and
    from then on every answer for that of the request before. It has no public way to
    ask for it.
    """
    inner: Any = response.stream
    for name in ("_stream", "_httpcore_stream", "_stream", "_connection", "_h11_state"):
        inner = getattr(inner, name, None)
    return bytes(inner.trailing_data[0]) if inner else b""


def error_text(error: httpx.RequestError, timeout: float) -> str:
    """What went wrong on the way to the server or back, in words."""
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {timeout:g} s"
    detail = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            detail = cause.strerror
            if detail.startswith("Connect call failed"):  # asyncio's own words
                detail = os.strerror(cause.errno or 0)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect ({detail})"
    if isinstance(error, httpx.NetworkError):
        return f"the connection broke ({detail})"
    return f"no proper answer ({detail})"


async def image_list(server: Server) -> list[str]:
    """The names in the server's list of images, each once, in its order.

    Plain text in UTF-8, one name a line; a byte order mark, CRLF and blank lines are
    fine. Raises Trouble if the list cannot be had, or is something else.
    """
    connection = Connection(server)
    async with connection.client:
        try:
            kind, content = await connection.get(server.url, MAX_LIST)
        except Failure as failure:
            message = f"{server.name}: cannot get the list of images: {failure}"
            raise Trouble(message) from failure
    beginning = content[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "an HTML or XML page"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        kind = "no text in UTF-8"
    if kind not in ("", "text/plain", "application/octet-stream"):
        wanted = "expected a list of images as plain text, one name a line"
        raise Trouble(f"{server.name}: {wanted}, but what came is {kind}")
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return list(dict.fromkeys(line for line in lines if line.strip()))


# ---- outcomes --------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What became of one image: a line of the report."""

    name: str
    status: str  # "uploaded" or "mirrored", "failed", "skipped"
    sizes: dict[str, int]  # bytes; the last one is what the server received
    seconds: float = 0.0
    attempts: int = 0  # requests made, retries included
    error: str | None = None  # why it failed or was skipped
    unanswered: bool = False  # failed because nothing answers

    def json(self) -> str:
        """The outcome as one line of JSON."""
        head = {"name": self.name, "status": self.status, **self.sizes}
        seconds = round(self.seconds, 3)
        tail = {"seconds": seconds, "attempts": self.attempts, "error": self.error}
        return json.dumps(head | tail)


@contextmanager
def recorded(outcome: Outcome, connection: Connection) -> Iterator[None]:
    """Note in `outcome` how long the block took, its requests, and why it failed."""
    start = time.monotonic()
    connection.attempts = 0
    try:
        yield
    except (Failure, OSError, MemoryError) as error:
        outcome.status = "failed"
        words = getattr(error, "strerror", None) or str(error)
        outcome.error = words or "there is not enough memory"
        outcome.unanswered = getattr(error, "unanswered", False)
    finally:
        outcome.seconds = time.monotonic() - start
        outcome.attempts = connection.attempts


class Report:
    """A file with one JSON object a line for every image, written as it finishes."""

    def __init__(self, path: str | None) -> None:
        self.descriptor: int | None = None
        self.broken = False
        if path is not None:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                self.descriptor = os.open(path, flags, 0o666)
            except OSError as error:
                message = f"cannot write the report {path}: {error.strerror}"
                raise Trouble(message) from error

    def write(self, outcome: Outcome) -> None:
        """Add a line; if that fails, say so once and go on without the report."""
        if self.descriptor is None or self.broken:
            return
        line = outcome.json().encode() + b"\n"
        try:
            if os.write(self.descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.broken = True
            logger.error("the report is incomplete: %s", error.strerror)

    def close(self) -> None:
        if self.descriptor is not None:
            try:
                os.close(self.descriptor)
            except OSError:  # some file systems tell only now
                self.broken = True


class Console(logging.StreamHandler[TextIO]):
    """Log lines and the progress line on standard error, neither torn by the other.

    On a terminal the progress line is redrawn in place, elsewhere it is a line every
    few seconds.
    """

    def __init__(self, quiet: bool) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.interval = 0.1 if self.terminal else 5.0  # seconds
        self.shown = ""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        shown = self.shown
        self._draw("")
        super().emit(record)
        self._draw(shown)

    def progress(self, line: str) -> None:
        """Show `line` as the progress."""
        if self.quiet:
            return
        with self.lock or nullcontext():
            if self.terminal:
                self._draw(line)
            else:
                self._write(line + "\n")

    def end_progress(self) -> None:
        self._draw("")

    def _draw(self, line: str) -> None:
        if line != self.shown:
            try:
                columns = os.get_terminal_size(self.stream.fileno()).columns or 80
            except (OSError, ValueError):
                columns = 80
            self.shown = line
            self._write(f"\r{line[: columns - 1]}\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.quiet = True  # standard error is closed or full: nobody looks


@contextmanager
def console(verbosity: int) -> Iterator[Console]:
    """Send the log and the progress to standard error while the block runs.

    `verbosity`: -1 errors only and no progress, 0 warnings, 1 every image.
    """
    handler = Console(quiet=verbosity < 0)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel({-1: logging.ERROR, 0: logging.WARNING}.get(verbosity, logging.INFO))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield handler
    finally:
        handler.end_progress()
        root.removeHandler(handler)
        root.setLevel(level)


class GaveUp(Exception):
    """So many images in a row failed because nothing answers that the rest would."""


class Batch:
    """The count of a run over many images, and what is told of it on the way."""

    def __init__(
        self, verb: str, report: Report, console: Console, give_up_after: int
    ) -> None:
        self.verb = verb  # the status of an image that went well
        self.report = report
        self.console = console
        self.give_up_after = give_up_after
        self.total = 0
        self.counts = {verb: 0, "failed": 0, "skipped": 0}
        self.bytes = 0
        self.unanswered = 0  # failures in a row because nothing answers
        self.start = time.monotonic()

    def finish(self, outcome: Outcome) -> None:
        """Count an image that is done, and tell of it.

        Raises GaveUp when `give_up_after` images in a row got no answer.
        """
        self.counts[outcome.status] += 1
        self.report.write(outcome)
        if outcome.status == self.verb:
            self.bytes += list(outcome.sizes.values())[-1]
        level = logging.ERROR if outcome.status == "failed" else logging.INFO
        logger.log(level, "%s: %s", outcome.name, outcome.error or outcome.status)
        if outcome.unanswered:
            self.unanswered += 1
        elif outcome.attempts:  # what made no request says nothing of the server
            self.unanswered = 0
        if outcome.unanswered and self.unanswered == self.give_up_after:
            logger.error(
                "giving up: the last %d images got no answer", self.give_up_after
            )
            raise GaveUp

    @contextmanager
    def progress_shown(self) -> Iterator[None]:
        """Show the progress again and again while the block awaits something."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def show() -> None:
            nonlocal timer
            self.console.progress(self.progress())
            timer = loop.call_later(self.console.interval, show)

        timer = loop.call_later(self.console.interval, show)
        try:
            yield
        finally:
            timer.cancel()

    @property
    def left(self) -> int:
        return self.total - sum(self.counts.values())

    def progress(self) -> str:
        done = self.counts[self.verb] + self.counts["failed"]
        rate = done / max(time.monotonic() - self.start, 1e-6)
        line = f"{self.total - self.left}/{self.total}, "
        line += f"{self.counts['failed']} failed, {rate:.1f}/s"
        if rate:
            line += f", {timedelta(seconds=round(self.left / rate))} left"
        return line

    def summary(self) -> str:
        parts = [f"{count} {status}" for status, count in self.counts.items()]
        if self.left:
            parts.append(f"{self.left} not tried")
        seconds = time.monotonic() - self.start
        return f"{', '.join(parts)}, {size_text(self.bytes)} in {seconds:.1f} s"

    @property
    def exit_status(self) -> int:
        return int(bool(self.counts["failed"] or self.left or self.report.broken))


# ---- chains ----------------------------------------------------------------


async def run_chains(
    server: Server,
    width: int,
    items: Iterable[T],
    chain: Callable[[Connection, T], Awaitable[Outcome]],
    batch: Batch,
) -> None:
    """Await `chain(connection, item)` for every item, `width` at a time.

    The chains are one asyncio.gather. Each has its own connection and takes the next
    item when it is free, so that memory grows with `width`, not with the items.
    """
    source = iter(items)

    async def take_turns() -> None:
        connection = Connection(server)
        async with connection.client:
            for item in source:
                batch.finish(await chain(connection, item))

    with batch.progress_shown():
        await asyncio.gather(*(take_turns() for _ in range(width)))


async def upload(connection: Connection, path: Path) -> Outcome:
    """Send one file to the server, under the last part of its path.

    What goes wrong with it stands in the outcome.
    """
    outcome = Outcome(path.name, "uploaded", {"bytes": 0})
    with recorded(outcome, connection):
        if not path.is_file():  # a pipe would keep open() waiting
            raise Failure("there is no such file, or it is not a regular one")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise Failure("the file is empty")
            await connection.post(path.name, size, lambda: file_chunks(file, size))
        outcome.sizes["bytes"] = size
    return outcome


async def upload_all(
    server: Server, arguments: argparse.Namespace, batch: Batch
) -> None:
    """Upload the images in the folder, and count them in `batch`."""
    images, others, unreadable = find_files(arguments.folder, arguments.recursive)
    if not images:
        hint = "" if arguments.recursive else "; --recursive goes into subfolders"
        logger.warning("there are no images in %s%s", arguments.folder, hint)
    images = [path for path in images if in_shard(path.name, arguments.shard)]
    others = [path for path in others if in_shard(path.name, arguments.shard)]
    skipped = [(path.name, "not an image by its name") for path in others]
    if arguments.skip_existing:
        there = set(await image_list(server))
        skipped += [
            (p.name, "already on the server") for p in images if p.name in there
        ]
        images = [path for path in images if path.name not in there]
    batch.total = len(images) + len(skipped) + len(unreadable)
    for name, reason in skipped:
        batch.finish(Outcome(name, "skipped", {"bytes": 0}, error=reason))
    for name, reason in unreadable:
        batch.finish(Outcome(name, "failed", {"bytes": 0}, error=reason))
    await run_chains(
        server, min(arguments.connections, len(images)), images, upload, batch
    )


# ---- the command line ------------------------------------------------------


def http_url(text: str) -> str:
    """Argument type: an absolute http or https URL."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL: {error}") from error
    if url.port is not None and not 1 <= url.port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: ports go from 1 to 65535")
    if url.fragment:
        raise argparse.ArgumentTypeError(f"{text!r}: a fragment (#) is never sent")
    if url.scheme not in ("http", "https") or not url.host:
        message = f"{text!r} is no http or https URL, such as {DEFAULT_URL}"
        raise argparse.ArgumentTypeError(message)
    return text


def folder_path(text: str) -> Path:
    """Argument type: the path of a folder; Path("") would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def header_field(text: str) -> tuple[bytes, bytes]:
    """Argument type: a header field, 'Name: value' (RFC 9110, section 5)."""
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+", name):
        message = f"{text!r} is no header; write it as 'Name: value'"
        raise argparse.ArgumentTypeError(message)
    if re.search(r"[\0-\x08\n-\x1f\x7f]", value):
        message = f"{text!r}: a header's value has no line breaks or control characters"
        raise argparse.ArgumentTypeError(message)
    return name.encode(), value.strip().encode("utf-8", "surrogateescape")


def whole_number(least: int) -> Callable[[str], int]:
    """Argument type: a whole number, `least` or more."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            message = f"{text!r} is not a whole number from {least} on"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def duration(text: str) -> float:
    """Argument type: a time in seconds, more than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        message = f"{text!r} is not a number of seconds above 0"
        raise argparse.ArgumentTypeError(message)
    return value


def shard_number(text: str) -> tuple[int, int]:
    """Argument type: K/N, the K-th of N parts."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        message = f"{text!r} is not K/N with K from 1 to N, such as 1/4"
        raise argparse.ArgumentTypeError(message)
    return int(match[1]), int(match[2])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are Trouble: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise Trouble(f"{message} (--help shows the options)")


def add_shared_options(parser: Parser) -> None:
    """Add the options that both image scripts have."""
    add = parser.add_argument
    add("--field", default="file", help="name of the form field (default: file)")
    add(
        "--header",
        type=header_field,
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="header to send with every request; may be repeated",
    )
    add(
        "--retries",
        type=whole_number(0),
        default=4,
        metavar="N",
        help="further attempts after a failure that may pass (default: 4)",
    )
    add(
        "--timeout",
        type=duration,
        default=30.0,
        metavar="SECONDS",
        help="time without a byte after which an attempt has failed (default: 30)",
    )
    add(
        "--give-up-after",
        type=whole_number(0),
        default=50,
        metavar="N",
        help="end when N images in a row got no answer (default: 50; 0: never)",
    )
    add(
        "--shard",
        type=shard_number,
        default=(1, 1),
        metavar="K/N",
        help="only the K-th of N disjoint parts, by a hash of the name",
    )
    add("--report", metavar="FILE", help="write a line of JSON for every image")
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument(
        "-v",
        dest="verbosity",
        action="store_const",
        const=1,
        default=0,
        help="log every image and every further attempt",
    )
    verbosity.add_argument(
        "-q",
        dest="verbosity",
        action="store_const",
        const=-1,
        help="no progress, errors only",
    )


def server_at(url: str, arguments: argparse.Namespace) -> Server:
    """The server at `url`, to be talked to as the shared options say."""
    a = arguments
    return Server(url, a.field, a.header, a.retries, a.timeout)


def say(line: str) -> None:
    """Print a line of the result; nobody may be there to read it any more."""
    with suppress(OSError, ValueError):
        print(line, flush=True)


def settle(stream: TextIO) -> None:
    """Drop what `stream` could not write.

    Python would try once more at exit, and replace the exit status by 120.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_batch(
    verb: str,
    arguments: argparse.Namespace,
    work: Callable[[Batch], Coroutine[Any, Any, None]],
) -> int:
    """Run `work` over many images, with the shared options; return the exit status."""
    report = Report(arguments.report)
    with console(arguments.verbosity) as handler:
        batch = Batch(verb, report, handler, arguments.give_up_after)
        status = None
        try:
            asyncio.run(work(batch))
        except GaveUp:
            pass
        except KeyboardInterrupt:
            status = 130
        finally:
            report.close()
    say(batch.summary())
    return batch.exit_status if status is None else status


def fill_standard_streams() -> None:
    """Open the null device in place of standard streams that are closed (`2>&-`).

    Python has None for them, which cannot be written to; and what is opened next would
    get their number, be it a connection, and with it what C libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def guarded(name: str, script: Callable[[], int]) -> int:
    """Run a script's `main`; what stops it from running becomes one line and a 2."""
    fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return script()
    except Trouble as trouble:
        with suppress(OSError, ValueError):
            print(f"{name}: {printable(str(trouble))}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                settle(stream)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with the arguments `argv`; return its exit status."""
    return guarded("upload_images.py", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(description="Upload the images in a folder to an image service.")
    parser.add_argument("folder", type=folder_path, metavar="FOLDER")
    parser.add_argument(
        "--url",
        type=http_url,
        default=os.environ.get("IMAGES_URL") or DEFAULT_URL,
        help=f"where to POST (default: $IMAGES_URL, then {DEFAULT_URL})",
    )
    parser.add_argument("--recursive", action="store_true", help="subfolders too")
    parser.add_argument(
        "--connections",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="images under way at once (default: 8)",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out what the server's list already has",
    )
    add_shared_options(parser)
    arguments = parser.parse_args(argv)
    server = server_at(arguments.url, arguments)
    return run_batch(
        "uploaded", arguments, lambda batch: upload_all(server, arguments, batch)
    )


if __name__ == "__main__":
    raise SystemExit(main())
