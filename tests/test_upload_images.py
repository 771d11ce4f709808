"""Tests of upload_images.py.

Requests go over real sockets, to the embedded server of mirror_images.py or to a Sink,
which keeps raw requests and can interfere with them; respx provides responses that a
real server will not give on demand. Waits before retries are recorded, not slept.
"""

import asyncio
import contextlib
import email
import email.message
import http.server
import itertools
import math
import os
import random
import re
import resource
import shlex
import signal
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import respx
from helpers import (
    PATIENCE,
    Terminal,
    names_in,
    read_report,
    response,
    running_script,
    script_command,
    write,
)
from httpx import Response

import upload_images
from upload_images import Client, ImageError, Outcome, RequestError

pytestmark = pytest.mark.usefixtures("waits")
table = pytest.mark.parametrize

URL = "http://images.test/images/"
PROG = "upload_images.py: error: "
SUMMARY = r"{} uploaded, {} failed, {} skipped, [0-9.]+ (bytes|kB) in [0-9]+\.[0-9] s\n"
ONE_BY_ONE = ["--connections", "1", "--retries", "0"]


class Result(NamedTuple):
    status: int
    output: str
    error: str


Upload = Callable[..., Result]


@pytest.fixture
def upload(folder: Path, capsys: pytest.CaptureFixture[str]) -> Upload:
    """Call main() with the folder and other arguments."""

    def call(*arguments: str | Path) -> Result:
        try:
            status: Any = upload_images.main([str(folder), *map(str, arguments)])
        except SystemExit as exit:  # argparse
            status = exit.code
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def upload_to(folder: Path, upload: Upload) -> Upload:
    """Upload a.png to a server that sends some responses, repeating the last one."""

    def call(*responses: Response | Exception, options: Iterable[str] = ()) -> Result:
        write(folder, "a.png")
        endless = itertools.chain(responses, itertools.repeat(responses[-1]))
        with respx.mock:
            respx.post(URL).mock(side_effect=endless)
            return upload("--url", URL, *options)

    return call


class Sink(http.server.ThreadingHTTPServer):
    """A server that keeps the headers and the body of each request, and responds 200.

    `before_body` is called with the number of the request, from 1 on, after its headers
    are read but before its body is. `respond` returns the pieces of its response.
    Bodies larger than 1 MB are not kept.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SinkHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.before_body: Callable[[int], object] = lambda number: None
        self.respond: Callable[[int], Iterable[bytes]] = lambda n: [response("200 OK")]
        self.numbers = itertools.count(1)
        self.requests: list[tuple[email.message.Message, bytes]] = []
        self.connections = 0

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class SinkHandler(http.server.BaseHTTPRequestHandler):
    server: Sink
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        number = next(self.server.numbers)
        self.server.before_body(number)
        length = remaining = int(self.headers["Content-Length"])
        body = b""
        while remaining:
            data = self.rfile.read(min(remaining, 1 << 20))
            if not data:
                raise ConnectionError("the body is too short")
            remaining -= len(data)
            if length <= 1_000_000:
                body += data
        self.server.requests.append((self.headers, body))
        self.close_connection = True  # if there is no response
        for piece in self.server.respond(number):
            self.connection.sendall(piece)
            self.close_connection = False

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ---- which files -----------------------------------------------------------

IMAGES = ["a.jpg", "a.JPEG", "a.jfif", "a.jp2", "a.j2k", "a.png", "a.gif", "a.webp"]
IMAGES += ["a.tif", "a.bmp", "a.pfm", "a.svg", "two.dots.png"]
OTHERS = ["notes.txt", "film.mp4", "photo.png.gz", "photo.png~", "png", ".png", ""]


def test_a_file_is_an_image_if_its_name_says_so() -> None:
    types = {name: upload_images.media_type(name) for name in IMAGES + OTHERS}
    assert [name for name in types if types[name].startswith("image/")] == IMAGES


def test_every_image_arrives_byte_for_byte(
    folder: Path, received: Path, url: str, upload: Upload
) -> None:
    images = {f"{i}.png": random.Random(i).randbytes(i * 1000 + 1) for i in range(40)}
    for name, content in images.items():
        write(folder, name, content=content)
    write(folder, "notes.txt", "Makefile")
    result = upload("--url", url)
    assert (result.status, result.error) == (0, "")
    assert re.fullmatch(SUMMARY.format(40, 0, 2), result.output)
    assert {path.name: path.read_bytes() for path in received.iterdir()} == images


@table(
    ("options", "names"),
    [
        ([], {"a.png"}),
        (["--recursive"], {"a.png", "b.png", "c.png"}),
        (["--recursive", "--join-path"], {"a.png", "sub_b.png", "sub_x.png_c.png"}),
    ],
)
def test_subfolders_are_included_with_recursive(
    options: list[str],
    names: set[str],
    folder: Path,
    received: Path,
    url: str,
    upload: Upload,
) -> None:
    write(folder, "a.png", "sub/b.png", "sub/x.png/c.png", "sub/notes.txt", "notes.txt")
    assert upload("--url", url, *options).status == 0
    assert names_in(received) == names


@table(
    ("names", "options", "pair"),
    [
        (["1/a.png", "2/a.png"], [], "1/a.png and 2/a.png; --join-path tells .*"),
        (['1/a".png', "2/a%22.png"], [], '1/a".png and 2/a%22.png; --join-path .*'),
        (["1/a.png", "1_a.png"], ["--join-path"], "1_a.png and 1/a.png"),
    ],
)
def test_two_images_with_the_same_name_are_refused_before_anything_is_sent(
    names: list[str], options: list[str], pair: str, folder: Path, upload: Upload
) -> None:
    write(folder, "0.png", *names)
    result = upload("--recursive", *options)
    message = f"{PROG}the same name would be uploaded twice: {pair}\n"
    assert result.status == 2
    assert re.fullmatch(message, result.error)


def test_the_first_ten_pairs_of_equal_names_are_listed_and_the_others_counted(
    folder: Path, upload: Upload
) -> None:
    write(folder, *(f"{sub}/{n:02}.png" for sub in "ab" for n in range(13)))
    error = upload("--recursive").error
    assert re.findall("b/([0-9]+).png", error) == [f"{n:02}" for n in range(10)]
    assert ", and 3 more pairs" in error


def test_a_subfolder_that_cannot_be_read_fails_and_the_others_arrive(
    folder: Path, received: Path, url: str, upload: Upload, monkeypatch: Any
) -> None:
    write(folder, "a.png", "closed/b.png", "open/c.png")
    scandir = os.scandir

    def guarded_scandir(path: str) -> Any:
        if path == str(folder / "closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded_scandir)  # root may read everything
    result = upload("--url", url, "--recursive")
    assert (result.status, result.error) == (1, "ERROR closed: Permission denied\n")
    assert names_in(received) == {"a.png", "c.png"}


def test_a_folder_without_images_is_not_an_error(folder: Path, upload: Upload) -> None:
    write(folder, "sub/a.png")
    status, output, error = upload()
    assert status == 0
    assert re.fullmatch(SUMMARY.format(0, 0, 0), output)
    hint = "; --recursive includes subfolders"
    assert error == f"WARNING there are no images in {folder}{hint}\n"


def test_shards_are_disjoint_and_complete_and_count_only_their_own_files(
    folder: Path, received: Path, url: str, upload: Upload, tmp_path: Path
) -> None:
    names = {f"{i}.{extension}" for i in range(40) for extension in ("png", "txt")}
    names.add("ü \udcff.png")
    write(folder, *names)
    reports = []
    for part in ("1/3", "2/3", "3/3"):
        upload("--url", url, "--shard", part, "--report", tmp_path / "report")
        reports.append(read_report(tmp_path / "report").keys())
    assert all(reports)
    assert sum(map(len, reports)) == len(names)
    assert set().union(*reports) == names
    assert names_in(received) == {name for name in names if name.endswith(".png")}


# ---- the request -----------------------------------------------------------


def test_names_arrive_intact(
    folder: Path, received: Path, url: str, upload: Upload
) -> None:
    names = {
        *("with spaces .png", 'a "quoted" name.png', "it's.png", "line\nbreak.png"),
        *("both\r\n.png", "tab\tand bell\a.png", "größe ☃ 日本 🖼.jpg", "50%20%.png"),
        *("undecodable \udcff\udcfe.png", "semi;colon=x.png", "--boundary--.png"),
    }
    write(folder, *names)
    assert upload("--url", url).status == 0
    assert names_in(received) == names


# HTML standard, "multipart/form-data encoding algorithm"
@table(
    ("name", "escaped"),
    [
        *(("a b.png", b"a b.png"), ('".png', b"%22.png"), ("\\.png", b"\\.png")),
        *(("\r\n.png", b"%0D%0A.png"), ("%22.png", b"%22.png")),
        *(("é.png", "é.png".encode()), ("\udcff.png", b"\xff.png")),
    ],
)
def test_names_are_escaped_as_browsers_do(
    name: str, escaped: bytes, folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, name)
    upload("--url", sink.url, "--field", 'Größe "x"')
    [(_, body)] = sink.requests
    field = 'name="Größe %22x%22"'.encode()
    expected = b'form-data; %s; filename="%s"' % (field, escaped)
    assert body.split(b"\r\n")[1] == b"Content-Disposition: " + expected


@table("size", [1, 32_767, 32_768, 32_769, 200_000])
def test_the_body_is_a_form_with_one_file_and_its_length_is_known(
    size: int, folder: Path, sink: Sink, upload: Upload
) -> None:
    content = random.Random(size).randbytes(size)
    write(folder, "a.png", content=content)
    upload("--url", sink.url)
    [(headers, body)] = sink.requests
    head = b"Content-Type: %s\r\n\r\n" % headers["Content-Type"].encode()
    form = email.message_from_bytes(head + body)  # an independent parser
    [_, part] = form.walk()
    assert headers.get_content_type() == "multipart/form-data"
    assert headers.get_all("Content-Length") == [str(len(body))]
    assert "Transfer-Encoding" not in headers
    assert not form.defects
    assert part.get_content_disposition() == "form-data"
    assert part.get_param("name", header="Content-Disposition") == "file"
    assert part.get_filename() == "a.png"
    assert part.get_content_type() == "image/png"
    start, end = body.index(b"\r\n\r\n") + 4, body.rindex(b"\r\n--")
    assert body[start:end] == content


def test_each_form_has_its_own_boundary(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(5)))
    upload("--url", sink.url)
    assert len({headers.get_boundary() for headers, _ in sink.requests}) == 5


def test_a_large_file_is_streamed_in_pieces_of_32_kb(
    folder: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a.png")
    os.truncate(folder / "a.png", 20_000_000)
    sizes = []

    async def receive(_: object, request: httpx.Request) -> Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for piece in request.stream:
            sizes.append(len(piece))
        return Response(200, stream=httpx.ByteStream(b""))

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", receive)
    tracemalloc.start()
    try:
        assert upload("--url", URL).status == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 20_000_000
    assert max(sizes) < 33_000
    assert peak < 5_000_000


def test_headers_are_sent_but_cannot_spoil_the_form(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "a.png")
    fields = ["X-One: 1", "X-Two:2", "X-One: eins", "User-Agent: me"]
    fields += ["Content-Length: 1", "Content-Type: text/html"]
    upload("--url", sink.url, *(f"--header={field}" for field in fields))
    [(headers, body)] = sink.requests
    assert headers.get_all("X-One") == ["1", "eins"]
    assert headers.get_all("X-Two") == ["2"]
    assert headers.get_all("User-Agent") == ["me"]  # in place of httpx's own
    assert headers.get_all("Content-Length") == [str(len(body))]
    assert headers.get_content_type() == "multipart/form-data"


@respx.mock
@table(
    ("variable", "options", "expected"),
    [
        ("", [], "http://127.0.0.1:8000/images/"),
        ("http://variable.test/", [], "http://variable.test/"),
        ("http://variable.test/", [f"--url={URL}?to=here"], f"{URL}?to=here"),
    ],
)
def test_the_url_comes_from_the_option_then_the_variable_then_a_default(
    variable: str,
    options: list[str],
    expected: str,
    folder: Path,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv("IMAGES_URL", variable)
    route = respx.post(expected).respond(200)
    assert upload(*options).status == 0
    assert route.call_count == 1


# ---- connections and time-outs ---------------------------------------------


@respx.mock
@table(("options", "concurrency"), [([], 8), (["--connections=3"], 3)])
def test_connections_sets_how_many_images_are_uploaded_at_once(
    options: list[str], concurrency: int, folder: Path, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(3 * concurrency)))
    at_once: list[int] = [0]
    full = asyncio.Event()

    async def respond(request: httpx.Request) -> Response:
        at_once.append(at_once[-1] + 1)
        if at_once[-1] == concurrency:
            full.set()
        await asyncio.wait_for(full.wait(), PATIENCE)
        at_once.append(at_once[-1] - 1)
        return Response(200)

    respx.post(URL).mock(side_effect=respond)
    assert upload("--url", URL, *options).status == 0
    assert max(at_once) == concurrency


def test_a_connection_is_reused_for_the_next_image(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    upload("--url", sink.url, "--connections", "1")
    assert (len(sink.requests), sink.connections) == (10, 1)


def test_more_connections_than_the_soft_limit_of_open_files_are_possible(
    folder: Path, received: Path, url: str, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(60)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    some = len(os.listdir("/proc/self/fd")) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (some, hard))
    try:
        result = upload("--url", url, "--connections", "60", "--retries", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result.status == 0
    assert len(names_in(received)) == 60


def test_another_host_is_reached_through_the_proxy_set_in_the_environment(
    folder: Path, sink: Sink, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv("HTTP_PROXY", sink.url.removeprefix("http://"))
    assert upload("--url", URL).status == 0
    [(headers, _)] = sink.requests
    assert headers["Host"] == "images.test"
    monkeypatch.setenv("NO_PROXY", "images.test")
    assert upload("--url", URL).status == 2


def test_a_password_in_the_url_is_sent_as_basic_authentication(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "a.png")
    assert upload("--url", sink.url.replace("//", "//me:p%40ss@")).status == 0
    [(headers, _)] = sink.requests
    assert headers["Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss


def test_no_proxy_is_used_for_this_machines_own_addresses(
    folder: Path, url: str, upload: Upload, monkeypatch: Any, closed_port: int
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    assert upload("--url", url).status == 0


@respx.mock
@table(("options", "seconds"), [([], 30.0), (["--timeout=0.5"], 0.5)])
def test_timeout_applies_to_connecting_sending_and_receiving(
    options: list[str], seconds: float, folder: Path, upload: Upload
) -> None:
    write(folder, "a.png")
    route = respx.post(URL).respond(200)
    upload("--url", URL, *options)
    timeout = route.calls.last.request.extensions["timeout"]
    assert {timeout["connect"], timeout["read"], timeout["write"]} == {seconds}


def test_an_attempt_ends_however_slowly_bytes_trickle_in(
    folder: Path, sink: Sink, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(start: bytes, piece: bytes) -> Iterator[bytes]:
        yield start
        while True:
            time.sleep(0.001)
            yield piece

    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless = [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (chunked, b"1\r\nx\r\n"),
    ]
    sink.respond = lambda number: drip(*endless[number - 1])
    limits = []
    timeout = asyncio.timeout

    def shorter_timeout(seconds: float) -> asyncio.Timeout:
        limits.append(round(seconds))
        return timeout(seconds / 100)

    monkeypatch.setattr(asyncio, "timeout", shorter_timeout)
    write(folder, "a.png", "b.png", "c.png", content=b"x" * 100_000)
    result = upload("--url", sink.url, "--retries", "0", "--timeout", "3")
    assert result.error.count(": the response took too long\n") == 3
    assert limits == [40] * 3  # 10 times --timeout, and 10 kB/s


# ---- --skip-existing and the list ------------------------------------------


@table(("options", "there"), [(["--skip-existing"], b"old"), ([], b"new")])
def test_an_image_on_the_server_is_replaced_or_with_skip_existing_skipped(
    options: list[str],
    there: bytes,
    folder: Path,
    received: Path,
    url: str,
    upload: Upload,
) -> None:
    write(folder, "a.png", "b ü.png", "notes.txt", content=b"new")
    write(received, "b ü.png", content=b"old")
    result = upload("--url", url, *options)
    counts = (1, 0, 2) if options else (2, 0, 1)
    assert re.fullmatch(SUMMARY.format(*counts), result.output)
    assert names_in(received) == {"a.png", "b ü.png"}
    assert (received / "b ü.png").read_bytes() == there


@respx.mock
def test_names_with_the_same_escaped_form_are_the_same(
    folder: Path, upload: Upload
) -> None:
    write(folder, 'a"b.png')
    respx.get(URL).respond(text="a%22b.png\n")
    assert "1 skipped" in upload("--url", URL, "--skip-existing").output


@pytest.mark.anyio
@respx.mock
@table(
    ("content", "names"),
    [
        (b"", []),
        (b"a.png", ["a.png"]),
        (b"\xef\xbb\xbfa.png\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"\n\na.png\n  \n\nb.png\n\n", ["a.png", "b.png"]),
        (b"b.png\na.png\nb.png\n", ["b.png", "a.png"]),
        (b" spaces .png \n", [" spaces .png "]),
        ("ü.png\n日本.png\n".encode(), ["ü.png", "日本.png"]),
        ("line\u2028separator\x85.png\n".encode(), ["line\u2028separator\x85.png"]),
        (b"x" * 4096 + b"\n", ["x" * 4096]),
    ],
)
async def test_a_list_has_one_name_per_line(content: bytes, names: list[str]) -> None:
    content_type = {"Content-Type": "text/plain; charset=utf-8"}
    respx.get(URL).respond(200, content=content, headers=content_type)
    async with Client(URL) as client:
        assert await client.list() == names


NO_LIST = "cannot get the list of images (plain text, one name per line)"


@respx.mock
@table(
    ("headers", "content", "reason"),
    [
        ({"Content-Type": "text/html"}, b"<p>Hello", "the response is text/html"),
        (
            {"Content-Type": "application/json"},
            b'["a.png"]',
            "the response is application/json",
        ),
        (
            {"Content-Type": "text/plain"},
            b"\n <!DOCTYPE html>",
            "the response is an HTML or XML page",
        ),
        (
            {},
            b"\xef\xbb\xbf<?xml version='1.0'?>",
            "the response is an HTML or XML page",
        ),
        ({}, b"\x89PNG\r\n\x1a\n\xff", "the response is not UTF-8"),
        ({}, b"a\n" + b"x" * 4097, "a line has more than 4096 characters"),
        ({"Content-Encoding": "gzip"}, b"", "the response is compressed (gzip)"),
    ],
)
def test_a_response_that_is_not_a_list_is_described(
    headers: dict[str, str], content: bytes, reason: str, folder: Path, upload: Upload
) -> None:
    write(folder, "a.png")
    respx.get(URL).respond(200, content=content, headers=headers)
    message = f"{PROG}{URL}: {NO_LIST}: {reason}\n"
    assert upload("--url", URL, "--skip-existing") == (2, "", message)


COMPRESSED = Response(200, headers={"Content-Encoding": "gzip"})


@respx.mock
@table(
    ("list_response", "reason"),
    [
        (Response(404, text="no list here"), "404 Not Found: no list here"),
        (Response(200, text="a.png\n" * 20), "larger than 100 bytes"),
        (COMPRESSED, "the response is compressed (gzip)"),
        (Response(302, headers={"Location": "http://xn--/"}), "302 Found: redirects "),
    ],
)
def test_a_run_cannot_start_without_the_list(
    list_response: Response,
    reason: str,
    folder: Path,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert upload_images.MAX_LIST_SIZE == 64_000_000
    monkeypatch.setattr(upload_images, "MAX_LIST_SIZE", 100)
    write(folder, "a.png")
    respx.get(URL).mock(return_value=list_response)
    message = f"{PROG}{URL}: {NO_LIST}: {reason}"
    status, output, error = upload("--url", URL, "--skip-existing")
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(message)


@respx.mock
def test_a_list_is_retried_like_an_upload(
    folder: Path, upload: Upload, waits: list[float]
) -> None:
    write(folder, "a.png")
    busy = Response(503, headers={"Retry-After": "3"})
    respx.get(URL).mock(side_effect=[busy, Response(200, text="a.png\n")])
    assert upload("--url", URL, "--skip-existing").status == 0
    assert [int(seconds) for seconds in waits] == [3]


# ---- downloads, which only mirror_images.py makes --------------------------


class Endless(httpx.AsyncByteStream):
    """The body of a response that never ends."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"blah " * 1000
        raise AssertionError("somebody reads to the end")


@pytest.mark.anyio
@respx.mock
@table(
    ("download", "reason"),
    [
        (Response(200, content=b"x" * 1001), "larger than 1.0 kB"),
        (Response(200, stream=Endless()), "larger than 1.0 kB"),
        (Response(206, content=b"x"), "206 Partial Content: x"),
        (COMPRESSED, "the response is compressed (gzip)"),
    ],
)
async def test_a_download_that_is_too_large_or_not_the_image_fails(
    download: Response, reason: str
) -> None:
    respx.get(URL + "a.png").mock(return_value=download)
    async with Client(URL) as client:
        with pytest.raises((ImageError, RequestError), match=f"^{re.escape(reason)}$"):
            await client.get("a.png", 1000, Outcome("a.png"))


@pytest.mark.anyio
@respx.mock
async def test_a_download_that_breaks_off_is_retried() -> None:
    route = respx.get("http://images.test/up/a%2Fb%20%C3%BC.png?key=1")
    route.side_effect = [Response(200, stream=Broken()), Response(200, content=b"xx")]
    outcome = Outcome("a.png")
    async with Client("http://images.test/up?key=1") as client:
        assert await client.get("a/b ü.png", 1000, outcome) == b"xx"
    assert (outcome.attempts, outcome.bytes_in) == (2, 2)


# ---- responses and retries -------------------------------------------------


@table(
    "success",
    [Response(200, text="saved"), Response(201), Response(204), COMPRESSED]
    + [Response(200, stream=Endless())],
)
def test_an_image_is_uploaded_if_the_status_is_a_success(
    success: Response, upload_to: Upload
) -> None:
    assert upload_to(success, options=["--retries=0"]).status == 0


@table("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_transient_status_is_retried(
    status: int, upload_to: Upload, waits: list[float]
) -> None:
    assert upload_to(Response(status), Response(200)).status == 0
    assert len(waits) == 1


FINAL = [202, 203, 206, 304, 400, 401, 403, 404, 405, 409, 411, 413, 415, 422, 499, 501]


@table("status", [*FINAL, 505, 507])
def test_any_other_status_fails_at_once(
    status: int, upload_to: Upload, waits: list[float]
) -> None:
    error = upload_to(Response(status)).error
    assert re.fullmatch(f"ERROR a.png: {status}( [A-Z][A-Za-z -]+)?\n", error)
    assert waits == []


@table(
    ("error", "reason"),
    [
        (httpx.ReadTimeout(""), "no response within 30 s"),
        (httpx.WriteTimeout(""), "no response within 30 s"),
        (httpx.ReadError(""), "the connection broke (ReadError)"),
        (httpx.WriteError("gone"), "the connection broke (gone)"),
        (httpx.RemoteProtocolError("odd"), "invalid response (odd)"),
        (ssl.SSLError(1, "BAD_RECORD_MAC"), "invalid response (BAD_RECORD_MAC)"),
    ],
)
def test_an_attempt_without_a_response_is_retried_and_the_log_names_the_image(
    error: Exception, reason: str, upload_to: Upload, waits: list[float]
) -> None:
    result = upload_to(error, Response(200), options=["-v"])
    retry = f"INFO a.png: {reason}; retry 1 of 4 in {waits[0]:.1f} s\n"
    assert result.error == retry + "INFO a.png: uploaded\n"


def test_an_upload_whose_connection_breaks_is_retried_from_the_start(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    content = random.Random(1).randbytes(500_000)
    write(folder, "a.png", content=content)

    def break_the_first(number: int) -> None:
        if number == 1:
            raise ConnectionError

    sink.before_body = break_the_first
    assert upload("--url", sink.url).status == 0
    [(_, body)] = sink.requests
    assert content in body


def test_a_refused_connection_is_retried_once_the_server_has_responded(
    folder: Path, upload_to: Upload
) -> None:
    write(folder, "b.png")
    refused = httpx.ConnectError("refused")
    responses = [Response(200), refused, refused, Response(200)]
    assert upload_to(*responses, options=["--connections=1"]).status == 0


@table(
    ("options", "attempts", "note"),
    [
        ([], 5, " (5 attempts)"),
        (["--retries=2"], 3, " (3 attempts)"),
        (["--retries=0"], 1, ""),
    ],
)
def test_retries_are_the_attempts_after_the_first(
    options: list[str], attempts: int, note: str, upload_to: Upload, waits: list[float]
) -> None:
    result = upload_to(Response(503, text="busy"), options=options)
    assert result.error == f"ERROR a.png: 503 Service Unavailable: busy{note}\n"
    assert len(waits) == attempts - 1


def test_backoff_is_exponential_up_to_a_limit_with_jitter() -> None:
    for attempt, most in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], 1):
        waits = [upload_images.backoff(attempt) for _ in range(100)]
        assert most / 2 <= min(waits) < max(waits) <= most
    assert upload_images.backoff(5000) <= 30.0


class Noon(datetime):
    """A clock stopped at noon UTC on 2026-01-01."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Noon":
        return cls(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone in which mistaking local time for UTC shows."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ-5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
@table(
    ("value", "seconds"),
    [
        *(("", 0.0), ("0", 0.0), ("7", 7.0), (" 7 ", 7.0), ("-7", 0.0), ("soon", 0.0)),
        ("9" * 400, math.inf),
        ("Thu, 01 Jan 2026 12:01:30 GMT", 90.0),
        ("Thursday, 01-Jan-26 12:01:30 GMT", 90.0),
        ("Thu Jan  1 12:01:30 2026", 90.0),
        ("Thu, 01 Jan 2026 13:01:30 +0100", 90.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 99999999999999999999 11:00:00 GMT", 0.0),
        ("Thu, 99 Jan 2026 11:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(
    value: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_images, "datetime", Noon)
    headers = httpx.Headers({"Retry-After": value})
    assert upload_images.retry_after(headers) == seconds


def test_a_retry_waits_for_retry_after_and_the_usual_backoff(
    upload_to: Upload, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", max)
    busy = Response(429, headers={"Retry-After": "90"})
    assert upload_to(busy, busy, Response(200)).status == 0
    assert waits == [90.5, 91.0]  # chains that failed together retry at different times


def test_a_retry_after_that_is_too_long_fails_at_once(
    upload_to: Upload, waits: list[float]
) -> None:
    result = upload_to(Response(503, headers={"Retry-After": "3600"}))
    reason = "503 Service Unavailable (the server says to wait 3600 s)"
    assert (result.error, waits) == (f"ERROR a.png: {reason}\n", [])


@table("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_reported_and_not_followed(
    status: int, upload_to: Upload
) -> None:
    target = "https://elsewhere.test/pictures/"
    result = upload_to(Response(status, headers={"Location": target}))
    assert result.error.endswith(f": redirects to {target} are not followed\n")


class Broken(httpx.AsyncByteStream):
    """The body of a response that breaks off."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"some words"
        raise httpx.ReadError("gone")


HTML = Response(403, html="<!DOCTYPE html><p>Not yours")


@table(
    ("failure", "message"),
    [
        (Response(403, content=b"disk quota exceeded\n"), ": disk quota exceeded"),
        (Response(403, content=b" two\r\n\tlines \n"), ": two lines"),
        (Response(403, content=b" \n"), ""),
        (Response(403, content=b"x" * 1000), ": " + "x" * 200),
        # No escape sequence reaches the terminal.
        (Response(403, content=b"\x1b[31mred\0"), r": \\x1b\[31mred\\x00"),
        (Response(403, content=b"\xff\xfe"), ": \ufffd\ufffd"),
        (Response(403, content=b'{"error": 1 < 2}'), ': {"error": 1 < 2}'),
        (Response(403, stream=Endless()), ": blah.*"),
        (Response(403, stream=Broken()), "(: some words)?"),
        (HTML, ""),
    ],
)
def test_a_failure_shows_the_beginning_of_the_servers_message(
    failure: Response, message: str, upload_to: Upload
) -> None:
    error = upload_to(failure).error
    assert re.fullmatch(f"ERROR a.png: 403 Forbidden{message}\n", error)


def test_cookies_are_not_kept(folder: Path, sink: Sink, upload: Upload) -> None:
    write(folder, "a.png", "b.png")
    sink.respond = lambda number: [response("200 OK", b"", "Set-Cookie: a=ü; Path=/")]
    assert upload("--url", sink.url, "--connections", "1").status == 0
    assert [headers["Cookie"] for headers, _ in sink.requests] == [None, None]


# ---- giving up -------------------------------------------------------------


@table(
    ("failure", "reason"),
    [
        ([response("401 Unauthorized", "expired")], "401 Unauthorized: expired"),
        ([response("507 Insufficient Storage")], "507 Insufficient Storage"),
        ([], "invalid response (Server disconnected without sending a response.)"),
    ],
)
@table(("limit", "tried"), [("3", 3), ("0", 10)])
def test_the_run_ends_after_a_number_of_failed_requests_in_a_row(
    failure: list[bytes],
    reason: str,
    limit: str,
    tried: int,
    folder: Path,
    sink: Sink,
    upload: Upload,
) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    sink.respond = lambda number: failure
    result = upload("--url", sink.url, "--give-up-after", limit, *ONE_BY_ONE)
    assert (result.status, len(sink.requests)) == (1, tried)
    assert result.output.startswith(f"0 uploaded, {tried} failed, 0 skipped, ")
    assert (", 7 not tried, " in result.output) is (tried == 3)
    message = "giving up: 3 requests in a row failed; the last error:"
    assert result.error.endswith(f"ERROR {message} {reason}\n") is (tried == 3)


def test_a_bad_file_is_not_a_failed_request_and_a_success_resets_the_count(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    write(folder, "2.png", "5.png", content=b"")
    failure = response("404 Not Found")
    sink.respond = lambda number: [response("200 OK") if number == 3 else failure]
    upload("--url", sink.url, "--give-up-after", "3", *ONE_BY_ONE)
    assert len(sink.requests) == 6


# ---- one image fails, the others arrive ------------------------------------


@table(
    ("spoil", "reason"),
    [
        (lambda path: path.touch(), "the file is empty"),
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
        (lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_a_file_that_cannot_be_sent_fails_and_the_others_arrive(
    spoil: Callable[[Path], None],
    reason: str,
    folder: Path,
    received: Path,
    url: str,
    upload: Upload,
) -> None:
    write(folder, "a.png", "c.png")
    spoil(folder / "b.png")
    result = upload("--url", url)
    assert (result.status, result.error) == (1, f"ERROR b.png: {reason}\n")
    assert re.fullmatch(SUMMARY.format(2, 1, 0), result.output)
    assert names_in(received) == {"a.png", "c.png"}


LARGE = 32_000_000  # bytes; more than fits between two processes on one machine


@table("size", [0, LARGE - 1, LARGE + 1])
def test_a_file_whose_size_changes_while_it_is_sent_fails_and_the_others_arrive(
    size: int, folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    os.truncate(folder / "b.png", LARGE)

    def change(number: int) -> None:
        if number == 2:
            os.truncate(folder / "b.png", size)

    sink.before_body = change
    result = upload("--url", sink.url, "--connections", "1")
    error = "the file changed size while it was being sent"
    assert result.error == f"ERROR b.png: {error}\n"
    sent = [re.findall(b'filename="(.*)"', body) for _, body in sink.requests]
    assert sent == [[b"a.png"], [b"c.png"]]


def test_a_file_that_vanishes_fails_unless_it_is_already_being_sent(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "a.png", "b.png", "c.png")

    def vanish(number: int) -> None:
        for name in ("a.png", "b.png"):
            (folder / name).unlink(missing_ok=True)

    sink.before_body = vanish
    result = upload("--url", sink.url, "--connections", "1")
    assert result.error == "ERROR b.png: No such file or directory\n"
    assert all(b"pixels" in body for _, body in sink.requests)


@table(
    ("odd", "reason"),
    [
        (Response(302, headers={"Location": "http://xn--/"}), "302 Found: .*xn--.*"),
        (RuntimeError("a surprise"), "RuntimeError: a surprise"),
        (KeyError(7), "KeyError: 7"),
    ],
)
def test_an_unexpected_error_with_one_image_does_not_stop_the_others(
    odd: Response | Exception, reason: str, folder: Path, upload_to: Upload
) -> None:
    write(folder, "b.png", "c.png")
    result = upload_to(Response(200), odd, Response(200), options=ONE_BY_ONE)
    assert re.fullmatch(f"ERROR b.png: {reason}\n", result.error)
    assert re.fullmatch(SUMMARY.format(2, 1, 0), result.output)


# ---- log and report --------------------------------------------------------


@table(
    ("size", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (74_249, "74.2 kB")),
        *((4_200_000, "4.2 MB"), (1_073_741_824, "1.1 GB"), (5e12, "5000.0 GB")),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(size: float, text: str) -> None:
    assert upload_images.size_text(size) == text


@table("options", [[], ["-q"], ["-v"]])
def test_failures_are_logged_and_v_logs_every_image(
    options: list[str], folder: Path, upload_to: Upload
) -> None:
    write(folder, "notes.txt")
    write(folder, "b.png", content=b"")
    result = upload_to(Response(200), options=[*ONE_BY_ONE, *options])
    failed = "ERROR b.png: the file is empty\n"
    skipped = "INFO notes.txt: not an image, judging by its name\n"
    every = f"INFO a.png: uploaded\n{failed}{skipped}"
    assert result.error == (every if options == ["-v"] else failed)


def test_a_name_cannot_forge_lines_of_the_log(folder: Path, upload: Upload) -> None:
    write(folder, "a\nERROR b.png: \x1b[2J\udcff.png", content=b"")
    name = r"a\nERROR b.png: \x1b[2J\udcff.png"
    assert upload("--url", URL).error == f"ERROR {name}: the file is empty\n"


@respx.mock
def test_the_report_has_an_object_for_every_file(
    folder: Path, upload: Upload, tmp_path: Path
) -> None:
    write(folder, "a ü.png", "notes.txt", "there.png", "sub/failed.png")
    write(folder, "sub/b\udcff.png", content=b"")
    respx.get(URL).respond(text="there.png\n")
    respx.post(URL).mock(side_effect=[Response(200), Response(404)])
    report = ["--report", tmp_path / "report"]
    upload("--url", URL, "--recursive", "--skip-existing", *report, *ONE_BY_ONE)
    lines = read_report(tmp_path / "report").values()
    seconds = [line.pop("seconds") for line in lines]
    assert all(isinstance(value, float) for value in seconds)
    fields = ("name", "status", "bytes_in", "bytes_out", "attempts", "error")
    assert [*map(tuple, lines)] == [fields] * 5
    assert [tuple(line.values()) for line in lines] == [
        ("a ü.png", "uploaded", 6, 6, 1, None),
        ("sub/b\udcff.png", "failed", 0, 0, 0, "the file is empty"),
        ("sub/failed.png", "failed", 6, 0, 1, "404 Not Found"),
        ("notes.txt", "skipped", 0, 0, 0, "not an image, judging by its name"),
        ("there.png", "skipped", 0, 0, 0, "already on the server"),
    ]


def test_the_report_is_written_as_images_finish(
    folder: Path, sink: Sink, upload: Upload, tmp_path: Path
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    report = tmp_path / "report"
    seen: list[list[str]] = []
    sink.before_body = lambda number: seen.append(sorted(read_report(report)))
    upload("--url", sink.url, "--connections", "1", "--report", report)
    assert seen == [[], ["a.png"], ["a.png", "b.png"]]


OLD_REPORT = "something longer than the new report\n" * 100


@table("names", [["a.png"], []])
def test_a_report_replaces_an_earlier_one(
    names: list[str], folder: Path, url: str, upload: Upload, tmp_path: Path
) -> None:
    write(folder, *names)
    report = tmp_path / "report"
    report.write_text(OLD_REPORT)
    assert upload("--url", url, "--report", report).status == 0
    assert list(read_report(report)) == names


@table("option", ["--url=ftp://a.test", "--url=http://127.0.0.1:9", "--retries=-1"])
def test_a_run_that_cannot_start_leaves_an_earlier_report_alone(
    option: str, folder: Path, upload: Upload, tmp_path: Path
) -> None:
    write(folder, "a.png")
    report = tmp_path / "report"
    report.write_text(OLD_REPORT)
    assert upload("--report", report, option).status == 2
    assert report.read_text() == OLD_REPORT


def test_a_report_on_standard_output_has_the_summary_on_standard_error(
    folder: Path, url: str, upload: Upload
) -> None:
    write(folder, "a.png")
    _, output, error = upload("--url", url, "--report", "-")
    assert re.fullmatch(r'\{"name": "a.png", "status": "uploaded", .*\}\n', output)
    assert re.fullmatch(SUMMARY.format(1, 0, 0), error)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_failing_report_is_logged_once_and_the_images_arrive(
    folder: Path, received: Path, url: str, upload: Upload
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    result = upload("--url", url, "--report", "/dev/full")
    message = "ERROR the report is incomplete: No space left on device\n"
    assert (result.status, result.error) == (1, message)
    assert names_in(received) == {"a.png", "b.png", "c.png"}


# ---- progress --------------------------------------------------------------

PROGRESS = r"2/4, 1 failed, [0-9]+\.[0-9]/s, [0-9]+:[0-9]{2}:[0-9]{2} remaining"


@pytest.fixture
def fast_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers of the event loop that fire almost at once."""
    call_later = asyncio.BaseEventLoop.call_later

    def call_soon(loop: Any, delay: float, *args: Any) -> asyncio.TimerHandle:
        return call_later(loop, min(delay, 0.001), *args)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_later", call_soon)


@pytest.mark.usefixtures("fast_timers")
@table("tty", [True, False], ids=["terminal", "pipe"])
def test_progress_shows_done_failed_rate_and_time_remaining(
    tty: bool, folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "b.png", "c.png", "d.png")
    write(folder, "a.png", content=b"")
    with Terminal(tty=tty) as terminal, contextlib.redirect_stderr(terminal.stream):
        # The second image to be sent waits for the progress of the two before.
        sink.before_body = lambda n: terminal.wait_for(PROGRESS if n == 2 else "")
        assert upload("--url", sink.url, "--connections", "1").status == 1
    lines = re.split("\r?\n", terminal.output)
    if tty:  # Each piece erases the one before it; in the end only the log remains.
        visible = [line.rpartition("\r\x1b[K")[2] for line in lines]
        assert visible == ["ERROR a.png: the file is empty", ""]
    else:
        assert lines[0] == "ERROR a.png: the file is empty"
        assert any(re.fullmatch(PROGRESS, line) for line in lines)


def test_on_a_terminal_progress_is_frequent_and_shorter_than_the_line(
    folder: Path, sink: Sink, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a.png", "b.png")
    monkeypatch.setenv("COLUMNS", "20")
    with Terminal() as terminal, contextlib.redirect_stderr(terminal.stream):
        sink.before_body = lambda n: terminal.wait_for(
            "1/2, 0 failed" if n == 2 else ""
        )
        assert upload("--url", sink.url, "--connections", "1").status == 0
    assert max(map(len, terminal.output.split("\r\x1b[K"))) == 19


@pytest.mark.usefixtures("fast_timers")
def test_q_hides_the_progress(folder: Path, url: str, upload: Upload) -> None:
    write(folder, *(f"{i}.png" for i in range(20)))
    assert upload("--url", url, "-q").error == ""


# ---- what cannot run: one line, exit status 2 ------------------------------


def assert_unusable(result: Result, message: str) -> None:
    """Assert that the only output is an error, on the last line, after any usage."""
    assert (result.status, result.output) == (2, "")
    pattern = rf"(usage: (.*\n)+)?{PROG}.*{re.escape(message)}.*\n"
    assert re.fullmatch(pattern, result.error)


UNUSABLE = {
    "is not an http or https URL such as": [
        *("--url=ftp://a.test/", "--url=a.test/up/", "--url=/up/", "--url=http://"),
        *("--url=http://a.test/#b", "--url=http://[::1", "--url=http://a.test:port/"),
        *("--url=http://xn--/", "--url=http://a:65536/", "--url=http://a.test:0/"),
        "--url=http://a.test:-1/",
    ],
    "is not a header field such as 'Name: value'": [
        *("--header=X-One 1", "--header=: 1", "--header=X One: 1", "--header=Ü: 1"),
        "--header=X: 1\r\nY: 2",
    ],
    "is not an integer from 1 to": [
        *("--connections=0", "--connections=two", "--connections=1.5"),
        *("--connections=²", "--connections=" + "9" * 5000),
    ],
    "is not an integer from 0 to": ["--retries=-1", "--give-up-after=-1"],
    "invalid seconds value": [
        f"--timeout={value}" for value in ("0", "-1", "nan", "inf", "1e9", "soon")
    ],
    "is not K/N with K from 1 to N": [
        f"--shard={value}" for value in ("0/2", "3/2", "1/0", "1", "a/b")
    ],
    "cannot write '/': Is a directory": ["--report=/"],
    "unrecognized arguments: --nonsense": ["--nonsense"],
}


@table(
    ("argument", "message"),
    [(argument, message) for message in UNUSABLE for argument in UNUSABLE[message]],
)
def test_an_unusable_argument_is_named_in_one_line(
    argument: str, message: str, folder: Path, upload: Upload
) -> None:
    write(folder, "a.png")
    assert_unusable(upload(argument), message)


@table(
    ("name", "reason"),
    [
        ("nowhere", "nowhere: No such file or directory"),
        ("a.png", "a.png: Not a directory"),
        ("new\nline", r"new\nline: No such file or directory"),
    ],
)
def test_an_unusable_folder_is_named_in_one_line(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.png")
    status = upload_images.main([str(tmp_path / name)])
    message = f"{reason}; give the path of a folder with images"
    assert_unusable(Result(status, *capsys.readouterr()), message)


ENVIRONMENT = "cannot use the certificates or proxies set in the environment: "


@table(
    ("variable", "value", "message"),
    [
        ("IMAGES_URL", "images", "$IMAGES_URL: 'images' is not an http or https URL"),
        ("IMAGES_URL", "http://[::1", "$IMAGES_URL: 'http://[::1' is not an http"),
        ("IMAGES_URL", "ftp://me:secret@a.test/", "$IMAGES_URL: '...@a.test/' is not"),
        ("HTTP_PROXY", "strange://", ENVIRONMENT),
        ("ALL_PROXY", "http://[::1", ENVIRONMENT),
        ("SSL_CERT_FILE", "/nowhere", ENVIRONMENT),
        ("SSL_CERT_FILE", __file__, ENVIRONMENT),
    ],
)
def test_an_unusable_environment_is_named_in_one_line(
    variable: str,
    value: str,
    message: str,
    folder: Path,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv(variable, value)
    # This machine's own addresses are not reached through a proxy.
    options = [] if variable == "IMAGES_URL" else ["--url", URL]
    assert_unusable(upload(*options), message)


@table("options", [[], ["--skip-existing"], ["--retries=0"]])
def test_if_nothing_listens_the_run_ends_with_a_hint(
    options: list[str], folder: Path, closed_port: int, upload: Upload
) -> None:
    write(folder, *(f"{i}.png" for i in range(20)))
    address = f"127.0.0.1:{closed_port}/images/"
    reason = f"{PROG}http://{address}: cannot connect (Connection refused)"
    hint = "to try it out, start python mirror_images.py --serve received/"
    result = upload("--url", f"http://user:secret@{address}", *options)
    assert result == (2, "", f"{reason}; {hint}\n")


def test_there_is_no_such_hint_for_another_machine(
    folder: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    write(folder, "a.png")
    reason = "cannot connect (Name or service not known)"
    assert upload("--url", URL) == (2, "", f"{PROG}{URL}: {reason}\n")


def test_a_server_that_does_not_speak_tls_is_reported(
    folder: Path, sink: Sink, upload: Upload
) -> None:
    write(folder, "a.png")
    result = upload("--url", sink.url.replace("http:", "https:"))
    assert result.status == 2
    assert re.search(r": cannot connect \(\[SSL.*\)", result.error)


def test_help_shows_every_option_and_the_exit_statuses(upload: Upload) -> None:
    text = " ".join(upload("--help").output.split())
    assert set(re.findall(r"--[a-z-]+", text)) == {
        *("--help", "--url", "--recursive", "--join-path", "--skip-existing"),
        *("--field", "--header", "--connections", "--retries", "--timeout"),
        *("--give-up-after", "--shard", "--report"),
    }
    assert re.search("Exit status: 0 .*; 1 .*; 2 .*; 130 interrupted; 143 term", text)


# ---- as a process ----------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@table(
    "command",
    [
        "$RUN >/dev/full 2>/dev/full",
        "{ $RUN --report -; echo $? >status; } | head -0; exit $(cat status)",
        "{ $RUN 2>&1 >&3; echo $? >status; } 3>&1 | head -0; exit $(cat status)",
    ],
)
def test_unwritable_output_does_not_stop_the_run_or_show_a_traceback(
    command: str, folder: Path, received: Path, url: str, tmp_path: Path
) -> None:
    write(folder, "a.png", "c.png")
    write(folder, "b.png", content=b"")
    run = shlex.join(script_command("upload_images.py", folder, "--url", url, "-v"))
    shell = ["sh", "-c", command.replace("$RUN", run)]
    done = subprocess.run(shell, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stdout + done.stderr
    assert names_in(received) == {"a.png", "c.png"}


@table(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_summary_and_its_exit_status(
    signal_number: int, status: int, folder: Path, sink: Sink, tmp_path: Path
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    stuck, over = threading.Event(), threading.Event()

    def get_stuck(number: int) -> None:
        if number == 2:
            stuck.set()
            over.wait(PATIENCE)

    sink.before_body = get_stuck
    report = tmp_path / "report"
    options = ["--url", sink.url, "--connections", "1", "--report", str(report)]
    with running_script("upload_images.py", folder, *options) as process:
        assert stuck.wait(PATIENCE)
        process.send_signal(signal_number)
        output, error = process.communicate(timeout=PATIENCE)
    over.set()
    expected = r"1 uploaded, 0 failed, 0 skipped, 2 not tried, 6 bytes in [0-9.]+ s\n"
    assert (process.returncode, error) == (status, "")
    assert re.fullmatch(expected, output)
    assert list(read_report(report)) == ["a.png"]
