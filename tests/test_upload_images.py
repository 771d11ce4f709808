"""Tests of upload_images.py.

What crosses a socket crosses a real one: to the embedded server of mirror_images.py, or
to a Sink, which keeps raw requests and can interfere with them. respx stands in for
what a server does not do on demand. Nothing waits for a clock: the naps between
attempts are noted instead of taken.
"""

import asyncio
import contextlib
import email
import email.message
import http.server
import itertools
import json
import logging
import math
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import respx

import mirror_images
import upload_images
from upload_images import Batch, Connection, Console, Failure, Outcome, Report, Server

SCRIPT = Path(upload_images.__file__)
URL = "http://images.test/images/"
SUMMARY = (
    r"{} uploaded, {} failed, {} skipped, [0-9.]+ (bytes|[kMG]B) in [0-9]+\.[0-9] s\n"
)


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that asyncio.sleep was asked for; it only yields to other tasks."""
    taken: list[float] = []
    sleep = asyncio.sleep

    async def nap(seconds: float) -> None:
        taken.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", nap)
    return taken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to upload from."""
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture
def received(tmp_path: Path) -> Path:
    """The embedded server's folder."""
    path = tmp_path / "received"
    path.mkdir()
    return path


@pytest.fixture
def url(received: Path) -> Iterator[str]:
    """The URL of the embedded server, which saves into `received`."""
    with mirror_images.ImageServer(received).running() as url:
        yield url


class Sink(http.server.ThreadingHTTPServer):
    """A server that keeps the requests' headers and bodies, and answers 200.

    `before_body` is called with the number of the request, from 1 on, when its headers
    are read and its body is not. Bodies larger than 1 MB are not kept.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SinkHandler)
        self.before_body: Callable[[int], None] = lambda number: None
        self.numbers = itertools.count(1)
        self.requests: list[tuple[email.message.Message, bytes]] = []
        self.connections = 0
        self.broken = 0  # requests that ended in mid-body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        self.broken += 1


class SinkHandler(http.server.BaseHTTPRequestHandler):
    server: Sink
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        self.server.before_body(next(self.server.numbers))
        length = left = int(self.headers["Content-Length"])
        body = b""
        while left:
            chunk = self.rfile.read(min(left, 1 << 20))
            if not chunk:
                raise ConnectionError("the body is too short")
            left -= len(chunk)
            if length <= 1_000_000:
                body += chunk
        self.server.requests.append((self.headers, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

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


def run(*arguments: str | Path) -> int:
    return upload_images.main([str(argument) for argument in arguments])


def write(folder: Path, *names: str, content: bytes = b"pixels") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a report, by name."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_name = {line["name"]: line for line in lines}
    assert len(by_name) == len(lines), "a name has two lines"
    return by_name


def answering(*answers: httpx.Response | Exception) -> respx.Route:
    """A route at URL that gives these answers in turn, the last one for ever."""
    return respx.post(URL).mock(
        side_effect=itertools.chain(answers, itertools.repeat(answers[-1]))
    )


# ---- which files -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo.jpg", True),
        ("photo.JPEG", True),
        ("photo.jfif", True),
        ("photo.jp2", True),
        ("photo.j2k", True),
        ("photo.png", True),
        ("photo.gif", True),
        ("photo.webp", True),
        ("photo.tif", True),
        ("photo.bmp", True),
        ("drawing.svg", True),
        ("two.dots.png", True),
        ("notes.txt", False),
        ("film.mp4", False),
        ("photo.png.gz", False),
        ("photo.png~", False),
        ("png", False),
        (".png", False),
        ("", False),
    ],
)
def test_an_image_is_what_its_name_says(name: str, expected: bool) -> None:
    assert upload_images.is_image(name) is expected


def test_every_image_arrives_byte_for_byte(
    folder: Path, received: Path, url: str
) -> None:
    images = {f"{i}.png": random.Random(i).randbytes(i * 1000 + 1) for i in range(20)}
    for name, content in images.items():
        (folder / name).write_bytes(content)
    assert run(folder, "--url", url) == 0
    assert {path.name: path.read_bytes() for path in received.iterdir()} == images


def test_other_files_are_skipped_and_counted(
    folder: Path, received: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "notes.txt", "Makefile")
    assert run(folder, "--url", url) == 0
    assert names_in(received) == {"a.png"}
    assert re.fullmatch(SUMMARY.format(1, 0, 2), capsys.readouterr().out)


def test_subfolders_are_left_alone_by_default(
    folder: Path, received: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "sub/b.png", "looks_like.png/c.png")
    assert run(folder, "--url", url) == 0
    assert names_in(received) == {"a.png"}
    assert re.fullmatch(SUMMARY.format(1, 0, 0), capsys.readouterr().out)


def test_recursive_goes_into_subfolders(folder: Path, received: Path, url: str) -> None:
    write(folder, "a.png", "sub/b.png", "sub/deeper/c.png")
    assert run(folder, "--url", url, "--recursive") == 0
    assert names_in(received) == {"a.png", "b.png", "c.png"}


def test_two_files_with_one_name_are_refused_before_anything_is_sent(
    folder: Path, received: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "one/same.png", "two/same.png")
    assert run(folder, "--url", url, "--recursive") == 2
    error = capsys.readouterr().err
    assert f"{folder / 'one/same.png'} and {folder / 'two/same.png'} would" in error
    assert names_in(received) == set()


def test_two_other_files_with_one_name_are_no_reason_to_refuse(
    folder: Path, received: Path, url: str
) -> None:
    write(folder, "one/a.png", "one/notes.txt", "two/b.png", "two/notes.txt")
    assert run(folder, "--url", url, "--recursive") == 0
    assert names_in(received) == {"a.png", "b.png"}


def test_a_subfolder_that_cannot_be_read_fails_and_the_others_arrive(
    folder: Path,
    received: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png", "closed/b.png", "open/c.png")
    scandir = os.scandir

    def guarded_scandir(path: str) -> Any:
        if path == str(folder / "closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded_scandir)  # root may read everything
    assert run(folder, "--url", url, "--recursive") == 1
    assert names_in(received) == {"a.png", "c.png"}
    assert f"{folder / 'closed'}: Permission denied" in capsys.readouterr().err


def test_an_empty_folder_is_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--url", URL) == 0
    assert re.fullmatch(SUMMARY.format(0, 0, 0), capsys.readouterr().out)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_are_disjoint_and_complete(parts: int) -> None:
    names = [f"{i}.png" for i in range(700)] + ["ü \udcff.png"]
    shards = [
        {name for name in names if upload_images.in_shard(name, (part, parts))}
        for part in range(1, parts + 1)
    ]
    assert sum(len(shard) for shard in shards) == len(names)
    assert set().union(*shards) == set(names)
    # A fair hash leaves a shard below half its share once in a million million runs.
    assert min(len(shard) for shard in shards) > 700 / parts / 2


def test_shard_uploads_and_counts_its_part_only(
    folder: Path, received: Path, url: str, tmp_path: Path
) -> None:
    names = {f"{i}.{kind}" for i in range(20) for kind in ("png", "txt")}
    write(folder, *names)
    reports = []
    for part in ("1/2", "2/2"):
        assert (
            run(folder, "--url", url, "--shard", part, "--report", tmp_path / "r") == 0
        )
        reports.append(read_report(tmp_path / "r").keys())
    assert reports[0] and reports[1]
    assert not reports[0] & reports[1]
    assert reports[0] | reports[1] == names
    assert names_in(received) == {name for name in names if name.endswith(".png")}


# ---- the request body ------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "plain.png",
        "with spaces .png",
        'a "quoted" name.png',
        "it's.png",
        "line\nbreak.png",
        "carriage\rreturn.png",
        "both\r\n.png",
        "tab\tand bell\a.png",
        "größe ☃ 日本 🖼.jpg",
        "undecodable \udcff\udcfe.png",
        "semi;colon=x.png",
        "50%20%.png",
        "--boundary--.png",
    ],
)
def test_names_arrive_intact(name: str, folder: Path, received: Path, url: str) -> None:
    write(folder, name)
    assert run(folder, "--url", url) == 0
    assert names_in(received) == {name}


# HTML standard, "multipart/form-data encoding algorithm"
@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a b.png", b"a b.png"),
        ('".png', b"%22.png"),
        ("\r\n.png", b"%0D%0A.png"),
        ("%22.png", b"%22.png"),
        ("\\.png", b"\\.png"),
        ("é.png", "é.png".encode()),
        ("\udcff.png", b"\xff.png"),
    ],
)
def test_names_are_escaped_as_browsers_do_it(name: str, escaped: bytes) -> None:
    _, head, _ = upload_images.form_parts("a field", name)
    line = head.split(b"\r\n")[1]
    expected = b'form-data; name="a field"; filename="%s"' % escaped
    assert line == b"Content-Disposition: " + expected


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_000])
def test_the_body_is_a_form_with_one_file(size: int, folder: Path, sink: Sink) -> None:
    content = random.Random(size).randbytes(size)
    write(folder, "a.png", content=content)
    assert run(folder, "--url", sink.url) == 0
    [(headers, body)] = sink.requests
    head = b"Content-Type: %s\r\n\r\n" % headers["Content-Type"].encode()
    form = email.message_from_bytes(head + body)  # a parser of somebody else's
    [_, part] = form.walk()
    assert headers.get_content_type() == "multipart/form-data"
    assert not form.defects
    assert part.get_content_disposition() == "form-data"
    assert part.get_content_type() == "image/png"
    assert part.get_filename() == "a.png"
    start, end = body.index(b"\r\n\r\n") + 4, body.rindex(b"\r\n--")
    assert body[start:end] == content


def test_the_length_is_known_in_advance(folder: Path, sink: Sink) -> None:
    write(folder, "a.png")
    assert run(folder, "--url", sink.url) == 0
    [(headers, body)] = sink.requests
    assert headers.get_all("Content-Length") == [str(len(body))]
    assert "Transfer-Encoding" not in headers


def test_each_form_has_a_boundary_of_its_own(folder: Path, sink: Sink) -> None:
    write(folder, *(f"{i}.png" for i in range(5)))
    assert run(folder, "--url", sink.url) == 0
    assert len({headers.get_boundary() for headers, _ in sink.requests}) == 5


PEAK = """
import re, sys, upload_images
status = upload_images.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1])
raise SystemExit(status)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_large_file_adds_less_than_30_mb_to_the_process(
    folder: Path, sink: Sink
) -> None:
    peaks = []  # kB; getrusage() would count what this process had when it forked
    for size in (1, 200_000_000):
        write(folder, "a.png")
        os.truncate(folder / "a.png", size)
        peak = subprocess.run(
            [sys.executable, "-c", PEAK, folder, "--url", sink.url],
            cwd=SCRIPT.parent,
            stdout=subprocess.PIPE,
            check=True,
        )
        peaks.append(int(peak.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 30_000


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], b'name="file"'),
        (["--field", "files"], b'name="files"'),
        (["--field", 'Größe "x"'], 'name="Größe %22x%22"'.encode()),
    ],
)
def test_field_names_the_form_field(
    options: list[str], name: bytes, folder: Path, sink: Sink
) -> None:
    write(folder, "a.png")
    assert run(folder, "--url", sink.url, *options) == 0
    [(_, body)] = sink.requests
    assert b"Content-Disposition: form-data; " + name + b"; filename=" in body


def test_header_repeats(folder: Path, sink: Sink) -> None:
    write(folder, "a.png")
    options = ["--header", "X-One: 1", "--header", "X-Two:2", "--header", "X-One: eins"]
    assert run(folder, "--url", sink.url, *options) == 0
    [(headers, _)] = sink.requests
    assert headers.get_all("X-One") == ["1", "eins"]
    assert headers.get_all("X-Two") == ["2"]


def test_header_replaces_what_the_script_would_send(folder: Path, sink: Sink) -> None:
    write(folder, "a.png")
    assert run(folder, "--url", sink.url, "--header", "User-Agent: me") == 0
    [(headers, _)] = sink.requests
    assert headers.get_all("User-Agent") == ["me"]


def test_header_cannot_spoil_the_form(folder: Path, sink: Sink) -> None:
    write(folder, "a.png")
    options = ["--header", "Content-Length: 1", "--header", "Content-Type: text/html"]
    assert run(folder, "--url", sink.url, *options) == 0
    [(headers, body)] = sink.requests
    assert headers.get_all("Content-Length") == [str(len(body))]
    assert headers.get_content_type() == "multipart/form-data"


# ---- where to, how many at once --------------------------------------------


@respx.mock
@pytest.mark.parametrize(
    ("variable", "options", "expected"),
    [
        (None, [], "http://127.0.0.1:8000/images/"),
        ("", [], "http://127.0.0.1:8000/images/"),
        ("http://variable.test/", [], "http://variable.test/"),
        ("http://variable.test/", ["--url", URL], URL),
        (
            None,
            ["--url", "https://a.test/upload?to=here"],
            "https://a.test/upload?to=here",
        ),
    ],
)
def test_the_url_is_the_option_then_the_variable_then_a_default(
    variable: str | None,
    options: list[str],
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(folder, "a.png")
    if variable is not None:
        monkeypatch.setenv("IMAGES_URL", variable)
    route = respx.route().respond(200)
    assert run(folder, *options) == 0
    [call] = route.calls
    assert (call.request.method, str(call.request.url)) == ("POST", expected)


@respx.mock
@pytest.mark.parametrize(
    ("options", "seconds"), [([], 30.0), (["--timeout", "0.5"], 0.5)]
)
def test_timeout_goes_for_connecting_sending_and_receiving(
    options: list[str], seconds: float, folder: Path
) -> None:
    write(folder, "a.png")
    route = answering(httpx.Response(200))
    assert run(folder, "--url", URL, *options) == 0
    timeout = route.calls.last.request.extensions["timeout"]
    assert {timeout["connect"], timeout["read"], timeout["write"]} == {seconds}


@respx.mock
@pytest.mark.parametrize(("options", "width"), [([], 8), (["--connections", "3"], 3)])
def test_connections_are_how_many_images_are_under_way_at_once(
    options: list[str], width: int, folder: Path
) -> None:
    write(folder, *(f"{i}.png" for i in range(3 * width)))
    under_way: list[int] = [0]
    full = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        under_way.append(under_way[-1] + 1)
        if under_way[-1] == width:
            full.set()
        await asyncio.wait_for(full.wait(), 10)
        under_way.append(under_way[-1] - 1)
        return httpx.Response(200)

    respx.post(URL).mock(side_effect=answer)
    assert run(folder, "--url", URL, *options) == 0
    assert max(under_way) == width


def test_a_connection_serves_image_after_image(folder: Path, sink: Sink) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    assert run(folder, "--url", sink.url, "--connections", "1") == 0
    assert (len(sink.requests), sink.connections) == (10, 1)


# ---- --skip-existing -------------------------------------------------------


def test_skip_existing_leaves_out_what_the_server_has(
    folder: Path, received: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "b ü.png", "notes.txt")
    write(received, "b ü.png", content=b"as it was")
    assert run(folder, "--url", url, "--skip-existing") == 0
    assert names_in(received) == {"a.png", "b ü.png"}
    assert (received / "b ü.png").read_bytes() == b"as it was"
    assert re.fullmatch(SUMMARY.format(1, 0, 2), capsys.readouterr().out)


def test_without_skip_existing_the_list_is_not_asked_for(
    folder: Path, received: Path, url: str
) -> None:
    write(folder, "a.png", content=b"new")
    write(received, "a.png", content=b"old")
    assert run(folder, "--url", url) == 0
    assert (received / "a.png").read_bytes() == b"new"


LIST = "text/plain; charset=utf-8"


@pytest.mark.anyio
@respx.mock
@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", []),
        (b"a.png", ["a.png"]),
        (b"a.png\nb.png\n", ["a.png", "b.png"]),
        (b"a.png\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"\xef\xbb\xbfa.png\n", ["a.png"]),
        (b"\n\na.png\n  \n\nb.png\n\n", ["a.png", "b.png"]),
        (b"b.png\na.png\nb.png\n", ["b.png", "a.png"]),
        (b" spaces .png \n", [" spaces .png "]),
        ("ü.png\n日本.png\n".encode(), ["ü.png", "日本.png"]),
        ("line\u2028separator\x85.png\n".encode(), ["line\u2028separator\x85.png"]),
    ],
)
async def test_a_list_is_one_name_a_line(content: bytes, names: list[str]) -> None:
    respx.get(URL).respond(200, content=content, headers={"Content-Type": LIST})
    assert await upload_images.image_list(Server(URL)) == names


@respx.mock
@pytest.mark.parametrize(
    ("kind", "content", "what"),
    [
        ("text/html", b"<p>Hello", "text/html"),
        ("application/json", b'["a.png"]', "application/json"),
        ("text/plain", b"\n <!DOCTYPE html><p>", "an HTML or XML page"),
        ("text/plain", b"\xef\xbb\xbf<html>", "an HTML or XML page"),
        ("", b"<?xml version='1.0'?>", "an HTML or XML page"),
        ("text/plain", b"\x89PNG\r\n\x1a\n\xff", "no text in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_told_from_what_was_expected(
    kind: str,
    content: bytes,
    what: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    respx.get(URL).respond(200, content=content, headers={"Content-Type": kind})
    assert run(folder, "--url", URL, "--skip-existing") == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"upload_images.py: {URL}: expected a list of images as plain text, "
        f"one name a line, but what came is {what}\n"
    )
    assert captured.out == ""


@respx.mock
def test_a_list_that_cannot_be_had_ends_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    respx.get(URL).respond(404, text="no list here")
    assert run(folder, "--url", URL, "--skip-existing") == 2
    reason = f"{URL}: cannot get the list of images: 404 Not Found: no list here"
    assert capsys.readouterr().err == f"upload_images.py: {reason}\n"


@respx.mock
def test_a_list_is_retried_like_an_upload(folder: Path, naps: list[float]) -> None:
    write(folder, "a.png")
    respx.get(URL).mock(
        side_effect=[
            httpx.Response(503, headers={"Retry-After": "3"}),
            httpx.Response(200, text="a.png\n"),
        ]
    )
    assert run(folder, "--url", URL, "--skip-existing") == 0
    assert [int(nap) for nap in naps] == [3]


# ---- attempts --------------------------------------------------------------


@respx.mock
@pytest.mark.parametrize("status", [200, 201, 204])
def test_an_answer_that_says_saved_is_a_success(status: int, folder: Path) -> None:
    write(folder, "a.png")
    answering(httpx.Response(status, text="saved"))
    assert run(folder, "--url", URL) == 0


@respx.mock
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_retried(
    status: int, folder: Path, tmp_path: Path, naps: list[float]
) -> None:
    write(folder, "a.png")
    answering(httpx.Response(status), httpx.Response(200))
    assert run(folder, "--url", URL, "--report", tmp_path / "r") == 0
    assert read_report(tmp_path / "r")["a.png"]["attempts"] == 2
    assert len(naps) == 1


@respx.mock
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (202, "202 Accepted"),
        (203, "203 Non-Authoritative Information"),
        (206, "206 Partial Content"),
        (304, "304 Not Modified"),
        (400, "400 Bad Request"),
        (401, "401 Unauthorized"),
        (403, "403 Forbidden"),
        (404, "404 Not Found"),
        (405, "405 Method Not Allowed"),
        (409, "409 Conflict"),
        (411, "411 Length Required"),
        (413, "413 Request Entity Too Large"),
        (415, "415 Unsupported Media Type"),
        (422, "422 Unprocessable Entity"),
        (499, "499"),
        (501, "501 Not Implemented"),
        (505, "505 HTTP Version Not Supported"),
        (507, "507 Insufficient Storage"),
    ],
)
def test_any_other_status_fails_at_once(
    status: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    route = answering(httpx.Response(status), httpx.Response(200))
    assert run(folder, "--url", URL) == 1
    assert capsys.readouterr().err == f"ERROR a.png: {words}\n"
    assert route.call_count == 1


@respx.mock
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ConnectTimeout(""), "no answer within 30 s"),
        (httpx.ReadTimeout(""), "no answer within 30 s"),
        (httpx.WriteTimeout(""), "no answer within 30 s"),
        (httpx.ReadError(""), "the connection broke (ReadError)"),
        (httpx.WriteError("gone"), "the connection broke (gone)"),
        (httpx.RemoteProtocolError("odd"), "no proper answer (odd)"),
    ],
)
def test_an_attempt_without_an_answer_is_retried(
    error: Exception,
    reason: str,
    folder: Path,
    naps: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    answering(error, httpx.Response(200))
    assert run(folder, "--url", URL, "-v") == 0
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"INFO {reason}; attempt 2 in {naps[0]:.1f} s"
    assert last == "INFO a.png: uploaded"


def test_a_connection_that_breaks_in_mid_body_is_retried_from_the_start(
    folder: Path, sink: Sink
) -> None:
    content = random.Random(1).randbytes(500_000)
    write(folder, "a.png", content=content)

    def break_the_first(number: int) -> None:
        if number == 1:
            raise ConnectionError

    sink.before_body = break_the_first
    assert run(folder, "--url", sink.url) == 0
    [(_, body)] = sink.requests
    assert content in body


@respx.mock
def test_a_refused_connection_is_retried_once_the_server_has_answered(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "b.png")
    refused = httpx.ConnectError("refused")
    answering(httpx.Response(200), refused, refused, httpx.Response(200))
    assert run(folder, "--url", URL, "--connections", "1") == 0
    assert capsys.readouterr().out.startswith("2 uploaded, 0 failed")


@respx.mock
@pytest.mark.parametrize(
    ("options", "attempts", "note"),
    [
        ([], 5, " (5 attempts)"),
        (["--retries", "2"], 3, " (3 attempts)"),
        (["--retries", "0"], 1, ""),
    ],
)
def test_retries_are_the_further_attempts(
    options: list[str], attempts: int, note: str, folder: Path, tmp_path: Path
) -> None:
    write(folder, "a.png")
    route = answering(httpx.Response(503, text="busy"))
    assert run(folder, "--url", URL, "--report", tmp_path / "r", *options) == 1
    line = read_report(tmp_path / "r")["a.png"]
    assert line["error"] == f"503 Service Unavailable: busy{note}"
    assert line["attempts"] == route.call_count == attempts


def test_backoff_is_exponential_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    waits = [upload_images.backoff(attempt) for attempt in range(1, 9)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_backoff_has_jitter() -> None:
    waits = [upload_images.backoff(3) for _ in range(100)]
    assert 1.0 <= min(waits) < max(waits) <= 2.0


def test_backoff_goes_on_for_thousands_of_attempts() -> None:
    assert 15.0 <= upload_images.backoff(5000) <= 30.0


class Noon(datetime):
    """Midday of 2026-01-01, in UTC, for ever."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Noon":
        return cls(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone in which local time for UTC is noticed."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XYZ-5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("9" * 400, math.inf),
        ("-7", 0.0),
        ("soon", 0.0),
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
    value: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_images, "datetime", Noon)
    headers = httpx.Headers({} if value is None else {"Retry-After": value})
    assert upload_images.retry_after(headers) == seconds


@respx.mock
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["90", "Thu, 01 Jan 2026 12:01:30 GMT"])
def test_retry_after_is_waited_for(
    status: int,
    value: str,
    folder: Path,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(folder, "a.png")
    monkeypatch.setattr(upload_images, "datetime", Noon)
    later = httpx.Response(status, headers={"Retry-After": value})
    answering(later, later, httpx.Response(200))
    monkeypatch.setattr("random.uniform", max)
    assert run(folder, "--url", URL) == 0
    # With the usual backoff on top, so that not all chains come back at once.
    assert naps == [90.5, 91.0]


@respx.mock
def test_a_retry_after_that_is_too_long_fails_at_once(
    folder: Path, naps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    answering(httpx.Response(503, headers={"Retry-After": "3600"}))
    assert run(folder, "--url", URL) == 1
    words = "503 Service Unavailable (the server asks to wait for 3600 s)"
    assert capsys.readouterr().err == f"ERROR a.png: {words}\n"
    assert naps == []


@respx.mock
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_but_named(
    status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    target = "https://elsewhere.test/pictures/"
    elsewhere = respx.route(host="elsewhere.test").respond(200)
    route = answering(httpx.Response(status, headers={"Location": target}))
    assert run(folder, "--url", URL) == 1
    words = f"the server points to {target}; redirects are not followed"
    assert f": {words}\n" in capsys.readouterr().err
    assert (route.call_count, elsewhere.call_count) == (1, 0)


@respx.mock
@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("text/plain", b"disk quota exceeded\n", ": disk quota exceeded"),
        ("text/plain", b" two\r\n\tlines \n", ": two lines"),
        ("text/plain", b"", ""),
        ("text/plain", b" \n", ""),
        ("text/plain", b"x" * 1000, ": " + "x" * 199 + "…"),
        ("text/plain", b"x" * 200, ": " + "x" * 200),
        ("text/plain", b"\x1b[31mred\0", ": \\x1b[31mred\\x00"),
        ("text/plain", b"\xff\xfe", ": \ufffd\ufffd"),
        ("text/plain", b"1 < 2", ": 1 < 2"),
        ("application/json", b'{"error": "no"}', ': {"error": "no"}'),
        (
            "text/html; charset=utf-8",
            b"<!DOCTYPE html><style>\np {}\n</style><p>Not &lt;yours&gt;</p>\n<br",
            ": Not <yours>",
        ),
        ("text/html", b"<script>" + b"x" * 20_000, ""),
    ],
)
def test_a_failure_shows_the_beginning_of_the_servers_words(
    kind: str,
    content: bytes,
    words: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    headers = {"Content-Type": kind}
    answering(httpx.Response(403, content=content, headers=headers))
    assert run(folder, "--url", URL) == 1
    assert capsys.readouterr().err == f"ERROR a.png: 403 Forbidden{words}\n"


class Broken(httpx.AsyncByteStream):
    """The body of an answer that does not come to its end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"some words"
        raise httpx.ReadError("gone")


@respx.mock
def test_a_status_counts_though_its_words_break_off(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    route = answering(httpx.Response(403, stream=Broken()))
    assert run(folder, "--url", URL) == 1
    assert capsys.readouterr().err == "ERROR a.png: 403 Forbidden\n"
    assert route.call_count == 1


class Endless(httpx.AsyncByteStream):
    """The body of an answer that goes on and on."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"blah " * 1000
        raise AssertionError("somebody listens to the end")


@respx.mock
@pytest.mark.parametrize(("status", "expected"), [(200, 0), (500, 1)])
def test_words_without_an_end_are_not_waited_for(
    status: int, expected: int, folder: Path
) -> None:
    write(folder, "a.png")
    answering(httpx.Response(status, stream=Endless()))
    assert run(folder, "--url", URL, "--retries", "0") == expected


@pytest.mark.anyio
@respx.mock
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"content": b"x" * 1001}, id="announced"),
        pytest.param({"stream": Endless()}, id="not announced"),
    ],
)
async def test_a_download_larger_than_its_limit_is_cut_off(
    answer: dict[str, Any],
) -> None:
    respx.get(URL).mock(return_value=httpx.Response(200, **answer))
    connection = Connection(Server(URL))
    async with connection.client:
        with pytest.raises(Failure, match=r"^larger than 1\.0 kB$"):
            await connection.get(URL, 1000)


@pytest.mark.anyio
@respx.mock
async def test_a_download_as_large_as_its_limit_arrives() -> None:
    headers = {"Content-Type": "IMAGE/PNG ; x=y"}
    respx.get(URL).respond(200, content=b"x" * 1000, headers=headers)
    connection = Connection(Server(URL))
    async with connection.client:
        assert await connection.get(URL, 1000) == ("image/png", b"x" * 1000)


@respx.mock
@pytest.mark.parametrize(("limit", "tried"), [("3", 3), ("0", 10)])
def test_give_up_after_ends_the_run_when_nothing_answers(
    limit: str, tried: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    route = answering(httpx.ReadTimeout(""))
    options = ["--give-up-after", limit, "--connections", "1", "--retries", "0"]
    assert run(folder, "--url", URL, *options) == 1
    captured = capsys.readouterr()
    assert route.call_count == tried
    assert captured.out.startswith(f"0 uploaded, {tried} failed, 0 skipped, ")
    assert (", 7 not tried, " in captured.out) is (tried == 3)
    told = "ERROR giving up: the last 3 images got no answer\n"
    assert (told in captured.err) is (tried == 3)


@respx.mock
def test_a_file_that_is_not_sent_changes_nothing_in_the_count_for_give_up_after(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, *(f"{number}.png" for number in range(9)))
    folder.joinpath("1.png").write_bytes(b"")
    answering(*[httpx.ReadTimeout("")] * 9)
    one_by_one = ["--connections", "1", "--retries", "0"]
    assert run(folder, "--url", URL, "--give-up-after", "3", *one_by_one) == 1
    assert "0 uploaded, 4 failed, 0 skipped, 5 not tried" in capsys.readouterr().out


@respx.mock
def test_any_answer_starts_the_count_for_give_up_after_anew(folder: Path) -> None:
    write(folder, *(f"{i}.png" for i in range(10)))
    silence, answer = httpx.ReadTimeout(""), httpx.Response(404)
    route = answering(silence, silence, answer, silence, silence, answer, silence)
    options = ["--give-up-after", "3", "--connections", "1", "--retries", "0"]
    assert run(folder, "--url", URL, *options) == 1
    assert route.call_count == 9


# ---- one image fails, the others arrive ------------------------------------


def close_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a file unreadable, even for root."""
    path_open = Path.open

    def guarded_open(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return path_open(self, *args, **kwargs)

    path.touch()
    monkeypatch.setattr(Path, "open", guarded_open)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(
            lambda path, monkeypatch: path.touch(), "the file is empty", id="empty"
        ),
        pytest.param(close_off, "Permission denied", id="unreadable"),
        pytest.param(
            lambda path, monkeypatch: path.symlink_to("nowhere"),
            "there is no such file, or it is not a regular one",
            id="dangling link",
        ),
        pytest.param(
            lambda path, monkeypatch: os.mkfifo(path),
            "there is no such file, or it is not a regular one",
            id="pipe",
        ),
    ],
)
def test_a_file_that_cannot_be_sent_fails_and_the_others_arrive(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    folder: Path,
    received: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png", "c.png")
    spoil(folder / "b.png", monkeypatch)
    assert run(folder, "--url", url) == 1
    captured = capsys.readouterr()
    assert captured.err == f"ERROR b.png: {reason}\n"
    assert re.fullmatch(SUMMARY.format(2, 1, 0), captured.out)
    assert names_in(received) == {"a.png", "c.png"}


LARGE = 64_000_000  # bytes; more than fits between two processes on one machine


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, r"the file shrank while it was sent, [0-9]+ bytes are missing"),
        (LARGE - 1, r"the file shrank while it was sent, 1 bytes are missing"),
        (LARGE + 1, r"the file grew while it was sent"),
    ],
)
def test_a_file_that_changes_its_size_while_it_is_sent_fails_and_the_others_arrive(
    size: int, reason: str, folder: Path, sink: Sink, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    os.truncate(folder / "b.png", LARGE)

    def change(number: int) -> None:
        if number == 2:
            os.truncate(folder / "b.png", size)

    sink.before_body = change
    assert run(folder, "--url", sink.url, "--connections", "1") == 1
    assert re.fullmatch(f"ERROR b.png: {reason}\n", capsys.readouterr().err)
    sent = [re.findall(b'filename="(.*)"', body) for _, body in sink.requests]
    assert sent == [[b"a.png"], [b"c.png"]]


def test_a_file_that_vanishes_fails_and_the_others_arrive(
    folder: Path, sink: Sink, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    sink.before_body = lambda number: (folder / "b.png").unlink(missing_ok=True)
    assert run(folder, "--url", sink.url, "--connections", "1") == 1
    assert capsys.readouterr().err.startswith("ERROR b.png: there is no such file")
    assert len(sink.requests) == 2


def test_a_file_that_vanishes_while_it_is_sent_still_arrives(
    folder: Path, sink: Sink
) -> None:
    write(folder, "a.png")
    sink.before_body = lambda number: (folder / "a.png").unlink()
    assert run(folder, "--url", sink.url) == 0
    [(_, body)] = sink.requests
    assert b"pixels" in body


# ---- what is told: summary, log, report ------------------------------------


def test_the_summary_is_one_line_on_standard_output(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, *(f"{i}.png" for i in range(12)), content=b"x" * 350_000)
    write(folder, "empty.png", content=b"")
    write(folder, "1.txt", "2.txt", "3.txt")
    assert run(folder, "--url", url) == 1
    summary = r"12 uploaded, 1 failed, 3 skipped, 4\.2 MB in [0-9]+\.[0-9] s\n"
    assert re.fullmatch(summary, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (74_249, "74.2 kB"),
        (4_200_000, "4.2 MB"),
        (1_073_741_824, "1.1 GB"),
        (5e12, "5000.0 GB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(size: float, text: str) -> None:
    assert upload_images.size_text(size) == text


@pytest.mark.parametrize(
    ("options", "log"),
    [
        ([], ["ERROR b.png: the file is empty"]),
        (["-q"], ["ERROR b.png: the file is empty"]),
        (
            ["-v"],
            [
                "INFO notes.txt: not an image by its name",
                "INFO a.png: uploaded",
                "ERROR b.png: the file is empty",
            ],
        ),
    ],
)
def test_each_failure_is_told_with_its_reason_and_with_v_every_image(
    options: list[str],
    log: list[str],
    folder: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The embedded server's own log, in the same process, is left out.
    monkeypatch.setattr(mirror_images.logger, "disabled", True)
    write(folder, "a.png", "notes.txt")
    write(folder, "b.png", content=b"")
    assert run(folder, "--url", url, "--connections", "1", *options) == 1
    assert capsys.readouterr().err.splitlines() == log


def test_a_name_cannot_forge_lines_of_the_log(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a\nERROR b.png: \x1b[2J\udcff.png", content=b"")
    assert run(folder, "--url", URL) == 1
    name = r"a\nERROR b.png: \x1b[2J\udcff.png"
    assert capsys.readouterr().err == f"ERROR {name}: the file is empty\n"


def test_the_report_has_an_object_for_every_file(
    folder: Path, received: Path, url: str, tmp_path: Path
) -> None:
    write(folder, "a ü.png", "notes.txt", "there.png")
    write(folder, "b\udcff.png", content=b"")
    write(received, "there.png")
    options = ["--skip-existing", "--report", str(tmp_path / "report")]
    assert run(folder, "--url", url, *options) == 1
    lines = read_report(tmp_path / "report")
    for line in lines.values():
        fields = ["name", "status", "bytes", "seconds", "attempts", "error"]
        assert list(line) == fields
        assert isinstance(line["seconds"], float)
    assert {
        name: (line["status"], line["bytes"], line["attempts"], line["error"])
        for name, line in lines.items()
    } == {
        "a ü.png": ("uploaded", 6, 1, None),
        "b\udcff.png": ("failed", 0, 0, "the file is empty"),
        "notes.txt": ("skipped", 0, 0, "not an image by its name"),
        "there.png": ("skipped", 0, 0, "already on the server"),
    }


def test_the_report_tells_how_long_an_image_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = Outcome("a.png", "uploaded", {"bytes": 1})
    times = iter([100.0, 101.23456])
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(times))
        with upload_images.recorded(outcome, Connection(Server(URL))):
            pass
    assert json.loads(outcome.json())["seconds"] == 1.235


def test_the_report_is_written_as_images_finish(
    folder: Path, sink: Sink, tmp_path: Path
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    report = tmp_path / "report"
    seen: list[list[str]] = []
    sink.before_body = lambda number: seen.append(sorted(read_report(report)))
    options = ["--connections", "1", "--report", str(report)]
    assert run(folder, "--url", sink.url, *options) == 0
    assert seen == [[], ["a.png"], ["a.png", "b.png"]]


def test_a_report_replaces_an_earlier_one(
    folder: Path, url: str, tmp_path: Path
) -> None:
    write(folder, "a.png")
    report = tmp_path / "report"
    report.write_text("something longer than the new report\n" * 100)
    assert run(folder, "--url", url, "--report", report) == 0
    assert list(read_report(report)) == ["a.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_report_that_breaks_off_is_told_once_and_the_images_arrive(
    folder: Path, received: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    assert run(folder, "--url", url, "--report", "/dev/full") == 1
    told = "ERROR the report is incomplete: No space left on device\n"
    assert capsys.readouterr().err == told
    assert names_in(received) == {"a.png", "b.png", "c.png"}


def test_a_report_line_that_is_written_in_part_counts_as_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(str(tmp_path / "report"))
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    report.write(Outcome("a.png", "uploaded", {"bytes": 1}))
    report.close()
    assert report.broken


# ---- progress --------------------------------------------------------------

PROGRESS = r"[0-9]+/[0-9]+, [0-9]+ failed, [0-9]+\.[0-9]/s(, [0-9]+:[0-9:]+ left)?"


class EagerConsole(Console):
    """A console that shows the progress whenever the event loop turns."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self.interval = 0.0


class Terminal:
    """A pseudo-terminal that is standard error while the block runs.

    After the block, `output` is all that was written to it.
    """

    def __init__(self, columns: int = 60) -> None:
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w")
        self.resize(columns)
        self.output = ""
        self.reader = threading.Thread(target=self.read)

    def resize(self, columns: int) -> None:
        termios.tcsetwinsize(self.master, (24, columns))

    def read(self) -> None:
        output = b""
        with contextlib.suppress(OSError):  # Linux' way to say that it is closed
            while block := os.read(self.master, 1 << 16):
                output += block
        self.output = output.decode()

    def __enter__(self) -> Self:
        self.reader.start()
        self.redirection = contextlib.redirect_stderr(self.stream)
        self.redirection.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.redirection.__exit__(None, None, None)
        self.stream.close()
        self.reader.join()
        os.close(self.master)


def screens(output: str, columns: int) -> list[list[str]]:
    """What a terminal shows after each piece of `output`, without empty lines."""
    lines, column, shown = [""], 0, []
    for piece in re.findall(r"\x1b\[K|[\r\n]|[^\x1b\r\n]", output):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            lines.append("")
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            if column == columns:
                lines.append("")
                column = 0
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + piece + line[column + 1 :]
            column += 1
        shown.append([line for line in lines if line])
    return shown


def test_on_a_terminal_the_progress_is_redrawn_in_place() -> None:
    with Terminal() as terminal:
        console = Console(quiet=False)
        for i in range(3):
            console.progress(f"{i}/3")
    assert terminal.output == "\r0/3\x1b[K\r1/3\x1b[K\r2/3\x1b[K"


def test_a_shorter_progress_line_leaves_nothing_of_the_longer_one() -> None:
    with Terminal() as terminal:
        console = Console(quiet=False)
        console.progress("a long line, as lines go")
        console.progress("short")
    assert screens(terminal.output, 60)[-1] == ["short"]


def test_log_lines_stand_above_the_progress_and_untorn() -> None:
    log = logging.getLogger("upload_images")
    with Terminal() as terminal, upload_images.console(verbosity=0) as console:
        console.progress("1/3")
        log.warning("one thing")
        log.warning("another thing")
        console.progress("2/3")
    shown = screens(terminal.output, 60)
    for progress in ("1/3", "2/3"):
        assert ["WARNING one thing", "WARNING another thing", progress] in shown


def test_nothing_of_the_progress_is_left_at_the_end() -> None:
    with Terminal() as terminal, upload_images.console(verbosity=0) as console:
        console.progress("1/3")
        logging.getLogger("upload_images").warning("one thing")
    assert screens(terminal.output, 60)[-1] == ["WARNING one thing"]


@pytest.mark.parametrize(("columns", "width"), [(20, 19), (2, 1), (0, 79)])
def test_the_progress_is_cut_off_before_it_fills_a_line(
    columns: int, width: int
) -> None:
    with Terminal(columns) as terminal:  # 0: some terminals do not know
        Console(quiet=False).progress("x" * 200)
    assert terminal.output == "\r" + "x" * width + "\x1b[K"


def test_the_progress_follows_the_terminals_size() -> None:
    with Terminal() as terminal:
        console = Console(quiet=False)
        for columns in (60, 10, 40):
            terminal.resize(columns)
            console.progress(f"{columns} " + "x" * 60)
    drawn = re.findall(r"\r([^\x1b]*)", terminal.output)
    assert [len(line) for line in drawn] == [59, 9, 39]


def test_a_run_on_a_terminal_shows_failures_and_progress(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_images, "Console", EagerConsole)
    write(folder, *(f"{i}.png" for i in range(10)))
    write(folder, "empty1.png", "empty2.png", content=b"")
    with Terminal() as terminal:
        assert run(folder, "--url", url) == 1
    shown = screens(terminal.output, 60)
    assert shown[-1] == [f"ERROR empty{i}.png: the file is empty" for i in (1, 2)]
    assert any(re.fullmatch(PROGRESS, lines[-1]) for lines in shown if lines)


def test_elsewhere_the_progress_is_a_line_now_and_then(
    folder: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(upload_images, "Console", EagerConsole)
    write(folder, "a.png", "b.png")
    assert run(folder, "--url", url) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(PROGRESS, line)] == []


def test_on_a_terminal_the_progress_comes_often_and_elsewhere_seldom() -> None:
    with Terminal():
        assert 0.05 <= Console(quiet=False).interval <= 0.5
    assert 2.0 <= Console(quiet=False).interval <= 10.0


def test_with_q_there_is_no_progress(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_images, "Console", EagerConsole)
    write(folder, "a.png", "b.png")
    with Terminal() as terminal:
        assert run(folder, "--url", url, "-q") == 0
    assert terminal.output == ""


def test_a_run_of_a_moment_shows_no_progress_in_a_log_file(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "a.png")
    assert run(folder, "--url", url) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.anyio
async def test_progress_is_shown_while_nothing_finishes() -> None:
    enough = asyncio.Event()
    shown: list[str] = []

    class Recorder(EagerConsole):
        def progress(self, line: str) -> None:
            shown.append(line)
            if len(shown) == 3:
                enough.set()

    batch = Batch("uploaded", Report(None), Recorder(quiet=False), 0)
    batch.total = 1
    with batch.progress_shown():
        await asyncio.wait_for(enough.wait(), 10)
    assert shown[0] == "0/1, 0 failed, 0.0/s"
    so_far = len(shown)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(shown) == so_far


@pytest.mark.parametrize(
    ("uploaded", "failed", "skipped", "seconds", "line"),
    [
        (0, 0, 0, 2.0, "0/10, 0 failed, 0.0/s"),
        (4, 1, 0, 2.0, "5/10, 1 failed, 2.5/s, 0:00:02 left"),
        (1, 0, 4, 3600.0, "5/10, 0 failed, 0.0/s, 5:00:00 left"),
        (10, 0, 0, 2.0, "10/10, 0 failed, 5.0/s, 0:00:00 left"),
        (1, 0, 0, 0.0, "1/10, 0 failed, 1000000.0/s, 0:00:00 left"),
    ],
)
def test_the_progress_tells_done_failed_rate_and_time_left(
    uploaded: int,
    failed: int,
    skipped: int,
    seconds: float,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = Batch("uploaded", Report(None), Console(quiet=True), 0)
    batch.total = 10
    batch.counts = {"uploaded": uploaded, "failed": failed, "skipped": skipped}
    monkeypatch.setattr(time, "monotonic", lambda: batch.start + seconds)
    assert batch.progress() == line


# ---- what cannot run: one line, exit status 2 ------------------------------


def told_in_one_line(captured: Any, words: str) -> bool:
    """Whether all that was printed is one line, with `words`, on standard error."""
    line = rf"upload_images\.py: .*{re.escape(words)}.*\n"
    return captured.out == "" and bool(re.fullmatch(line, captured.err))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required: FOLDER"),
        (["nowhere"], "nowhere: No such file or directory; give the path of a folder"),
        (["a.png"], "a.png: Not a directory; give the path of a folder"),
        ([""], "FOLDER: it is empty"),
        (["new\nline"], r"new\nline: No such file"),
        ([".", "."], "unrecognized arguments: ."),
        ([".", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([".", "--url"], "--url: expected one argument"),
        ([".", "-v", "-q"], "not allowed with"),
    ],
)
def test_arguments_that_make_no_sense_are_told_in_one_line(
    arguments: list[str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    monkeypatch.chdir(folder)
    assert run(*arguments) == 2
    assert told_in_one_line(capsys.readouterr(), words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--url", "ftp://a.test/", "'ftp://a.test/' is no http or https URL"),
        ("--url", "a.test/images/", "is no http or https URL"),
        ("--url", "/images/", "is no http or https URL"),
        ("--url", "http://", "is no http or https URL"),
        ("--url", "", "is no http or https URL"),
        ("--url", "http://[::1", "is no URL"),
        ("--url", "http://a.test:port/", "is no URL"),
        ("--url", "http://a.test:0/", "ports go from 1 to 65535"),
        ("--url", "http://a.test:65536/", "ports go from 1 to 65535"),
        ("--header", "X-One 1", "'X-One 1' is no header; write it as 'Name: value'"),
        ("--header", ": 1", "is no header"),
        ("--header", "X One: 1", "is no header"),
        ("--header", "Ü: 1", "is no header"),
        ("--header", "X-One: 1\r\nX-Two: 2", "no line breaks"),
        ("--connections", "0", "'0' is not a whole number from 1 on"),
        ("--connections", "two", "'two' is not a whole number"),
        ("--connections", "1.5", "'1.5' is not a whole number"),
        ("--connections", "²", "'²' is not a whole number"),
        ("--connections", "9" * 5000, "is not a whole number"),
        ("--retries", "-1", "'-1' is not a whole number from 0 on"),
        ("--give-up-after", "-1", "'-1' is not a whole number from 0 on"),
        ("--timeout", "0", "'0' is not a number of seconds above 0"),
        ("--timeout", "-1", "'-1' is not a number of seconds"),
        ("--timeout", "nan", "'nan' is not a number of seconds"),
        ("--timeout", "inf", "'inf' is not a number of seconds"),
        ("--timeout", "1e9", "'1e9' is not a number of seconds"),
        ("--timeout", "soon", "'soon' is not a number of seconds"),
        ("--shard", "0/2", "'0/2' is not K/N with K from 1 to N"),
        ("--shard", "3/2", "'3/2' is not K/N"),
        ("--shard", "1/0", "'1/0' is not K/N"),
        ("--shard", "1", "'1' is not K/N"),
        ("--shard", "a/b", "'a/b' is not K/N"),
        ("--report", "/", "cannot write the report /: Is a directory"),
        ("--report", "/nowhere/report", "report /nowhere/report: No such file"),
        ("--report", "", "cannot write the report : No such file"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_in_one_line(
    option: str,
    value: str,
    words: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    assert run(folder, option, value) == 2
    assert told_in_one_line(capsys.readouterr(), words)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port at which nothing listens, and nothing else will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("options", [[], ["--skip-existing"], ["--retries", "0"]])
def test_where_nothing_listens_the_error_says_how_to_try_it_out(
    options: list[str],
    folder: Path,
    silent_port: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    url = f"http://127.0.0.1:{silent_port}/images/"
    assert run(folder, "--url", url, *options) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"upload_images.py: {url}: cannot connect (Connection refused); "
        "to try it out, start python mirror_images.py --serve received/\n"
    )
    assert captured.out == ""


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("IMAGES_URL", "images", "'images' is no http or https URL"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "the proxy in the environment"),
        ("HTTP_PROXY", "strange://", "the proxy in the environment"),
        ("SSL_CERT_FILE", "/nowhere", "$SSL_CERT_FILE or $SSL_CERT_DIR"),
        ("SSL_CERT_FILE", str(SCRIPT), "$SSL_CERT_FILE or $SSL_CERT_DIR"),
    ],
)
def test_an_environment_that_cannot_work_is_told_in_one_line(
    variable: str,
    value: str,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv(variable, value)
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    # A proxy is not asked for this machine's own addresses.
    options = [] if variable == "IMAGES_URL" else ["--url", URL]
    assert run(folder, *options) == 2
    assert told_in_one_line(capsys.readouterr(), words)


def test_no_proxy_is_asked_for_this_machines_own_addresses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_port: int
) -> None:
    write(folder, "a.png")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{silent_port}")
    received = tmp_path / "received"
    received.mkdir()
    with mirror_images.ImageServer(received).running() as url:
        assert run(folder, "--url", url) == 0
    assert (received / "a.png").exists()


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("--help")
    assert exit.value.code == 0
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert shown == {
        *("--help", "--url", "--recursive", "--field", "--header", "--connections"),
        *("--retries", "--timeout", "--skip-existing", "--report", "--shard"),
        "--give-up-after",
    }


# ---- as a process ----------------------------------------------------------


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"],
)
def test_a_closed_or_full_output_changes_neither_uploads_nor_exit_status(
    redirection: str, folder: Path, received: Path, url: str
) -> None:
    write(folder, "a.png", "c.png")
    write(folder, "b.png", content=b"")
    command = f'exec "$0" "$@" {redirection}'
    arguments = [sys.executable, str(SCRIPT), str(folder), "--url", url]
    done = subprocess.run(["sh", "-c", command, *arguments], check=False)
    assert done.returncode == 1
    assert names_in(received) == {"a.png", "c.png"}


def test_an_output_that_nobody_reads_is_no_error(
    folder: Path, received: Path, url: str
) -> None:
    write(folder, "a.png")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), "--url", url],
            check=False,
            stdout=output,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert names_in(received) == {"a.png"}


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_error_that_cannot_be_told_still_makes_the_exit_status(
    redirection: str, tmp_path: Path
) -> None:
    command = f'exec "$0" "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, SCRIPT, tmp_path / "nowhere"],
        check=False,
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (2, b"")


# A shell that runs the tests in the background makes its children ignore SIGINT.
INTERRUPTIBLE = """
import signal, sys, upload_images
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(upload_images.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_the_run_within_two_seconds_with_a_summary(
    folder: Path, sink: Sink, tmp_path: Path
) -> None:
    write(folder, "a.png", "b.png", "c.png")
    stuck, over = threading.Event(), threading.Event()

    def get_stuck(number: int) -> None:
        if number == 2:
            stuck.set()
            over.wait(30)

    sink.before_body = get_stuck
    report = tmp_path / "report"
    options = ["--url", sink.url, "--connections", "1", "--report", str(report)]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, str(folder), *options],
        cwd=SCRIPT.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert stuck.wait(30)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=2)
        finally:
            process.kill()
            over.set()
    assert process.returncode == 130
    expected = r"1 uploaded, 0 failed, 0 skipped, 2 not tried, 6 bytes in [0-9.]+ s\n"
    assert re.fullmatch(expected, output)
    assert errors == ""
    assert list(read_report(report)) == ["a.png"]
