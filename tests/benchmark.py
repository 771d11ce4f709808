"""Measure the figures that README.md quotes.

    python tests/benchmark.py [SECTION...]

Prints one table: what was measured, the figure and its goal. Most figures are ratios of
two things that were timed in turn in the same run, so that a slow or busy machine is
slow for both; the median of several rounds counts.
"""

import argparse
import asyncio
import cProfile
import functools
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageOps, JpegImagePlugin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import wrap_everything

import decorators
import json_compare
import mirror_images
import upload_images


class Row(NamedTuple):
    what: str
    measured: str
    goal: str


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_ratio(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7
) -> float:
    """Time both in turn; return the median of the rounds' ratios ours / theirs."""
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))


# ---- json ------------------------------------------------------------------


def api_response(chance: random.Random, records: int) -> Any:
    words = ["alpha", "beta", "gamma", "delta", "épsilon", "zeta", "eta", "theta"]

    def record(number: int) -> Any:
        return {
            "id": number,
            "uuid": f"{chance.getrandbits(128):032x}",
            "name": " ".join(chance.choices(words, k=3)),
            "price": round(chance.uniform(1, 1000), 2),
            "rating": chance.uniform(0, 5),
            "active": chance.random() < 0.5,
            "parent": chance.choice([None, chance.randrange(10**9)]),
            "tags": chance.choices(words, k=3),
            "address": {
                "street": f"{chance.randrange(500)} {chance.choice(words)} street",
                "geo": {"lat": chance.uniform(-90, 90), "lng": chance.uniform(0, 180)},
            },
            "updated_at": f"2024-05-{chance.randrange(1, 31):02}T12:00:00Z",
        }

    return {"status": "ok", "items": [record(number) for number in range(records)]}


def geojson(chance: random.Random, polygons: int) -> Any:
    def feature(number: int) -> Any:
        ring = [[chance.uniform(0, 180), chance.uniform(-90, 90)] for _ in range(300)]
        return {
            "type": "Feature",
            "properties": {"name": f"area {number}", "size": chance.random()},
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        }

    features = [feature(number) for number in range(polygons)]
    return {"type": "FeatureCollection", "features": features}


def deep_tree(chance: random.Random, branches: int) -> Any:
    def branch() -> Any:
        node: Any = {"size": chance.random(), "children": []}
        for level in range(80):
            node = {"name": f"node {level}", "size": level, "children": [node]}
        return node

    return [branch() for _ in range(branches)]


def one_leaf_in_a_hundred_changed(document: Any, chance: random.Random) -> Any:
    def change(leaf: Any) -> Any:
        if chance.random() >= 0.01:
            return leaf
        return leaf + 1 if isinstance(leaf, float) else "changed"

    return with_leaves(change, document)


def all_floats_a_little_off(document: Any) -> Any:
    return with_leaves(
        lambda leaf: leaf + 1e-9 if isinstance(leaf, float) else leaf, document
    )


def with_leaves(change: Callable[[Any], Any], document: Any) -> Any:
    if isinstance(document, dict):
        return {key: with_leaves(change, value) for key, value in document.items()}
    if isinstance(document, list):
        return [with_leaves(change, value) for value in document]
    return change(document)


Generate = Callable[[random.Random, int], Any]


def json_documents() -> Iterator[Row]:
    yield from against_loads("API response", api_response, 10_000, "<= 1.5")
    yield from against_loads("GeoJSON", geojson, 400, "<= 1.0")
    yield from against_loads("deep tree", deep_tree, 1000, "<= 1.5")
    yield from shifted_records()
    if importlib.util.find_spec("deepdiff") is None:
        yield Row("json: deepdiff is not installed", "-", ">= 100")
        return
    # Small documents: deepdiff takes 10 s for the large ones, and hours for the tree.
    yield from against_deepdiff("API response", api_response, 1000)
    yield from against_deepdiff("GeoJSON", geojson, 40)
    yield from against_deepdiff("deep tree", deep_tree, 2)


def against_loads(name: str, generate: Generate, size: int, goal: str) -> Iterator[Row]:
    text = json.dumps(generate(random.Random(1), size))
    title = f"json: {name}, {len(text) / 1e6:.1f} MB"
    left, right = json.loads(text), json.loads(text)
    loads = functools.partial(json.loads, text)
    ratio = median_ratio(functools.partial(json_compare.compare, left, right), loads)
    yield Row(f"{title}, compare / json.loads", f"{ratio:.2f}", goal)
    right = all_floats_a_little_off(right)
    ratio = median_ratio(functools.partial(json_compare.compare, left, right), loads)
    yield Row(f"{title}, compare, floats off / json.loads", f"{ratio:.2f}", goal)
    right = one_leaf_in_a_hundred_changed(right, random.Random(2))
    ratio = median_ratio(functools.partial(list_all, left, right), loads)
    yield Row(f"{title}, 1 % differ / json.loads", f"{ratio:.2f}", "<= 2.5")


def shifted_records() -> Iterator[Row]:
    records = api_response(random.Random(1), 10_000)["items"]
    text = json.dumps(records)
    loads = functools.partial(json.loads, text)
    left, right = json.loads(text), [records[-1], *json.loads(text)]
    assert list_all(left, right) == 1
    ratio = median_ratio(functools.partial(list_all, left, right), loads)
    yield Row("json: a record put in first / json.loads", f"{ratio:.2f}", "<= 2.5")
    right = random.Random(2).sample(right[1:], len(left))
    shuffled = functools.partial(list_all, left, right, match={"": "id"})
    assert shuffled() == 0
    ratio = median_ratio(shuffled, loads)
    yield Row("json: records shuffled, matched / json.loads", f"{ratio:.2f}", "<= 2.5")


def against_deepdiff(name: str, generate: Generate, size: int) -> Iterator[Row]:
    deepdiff = importlib.import_module("deepdiff").DeepDiff
    text = json.dumps(generate(random.Random(1), size))
    title = f"json: {name}, {len(text) / 1e6:.2f} MB"
    left, right = json.loads(text), json.loads(text)
    theirs = functools.partial(deepdiff, left, right, significant_digits=5)
    ours = functools.partial(
        repeat, 10, functools.partial(json_compare.compare, left, right)
    )
    ratio = 10 * median_ratio(theirs, ours)
    yield Row(f"{title}, deepdiff / compare", f"{ratio:.0f}", ">= 100")
    right = one_leaf_in_a_hundred_changed(right, random.Random(2))
    theirs = functools.partial(deepdiff, left, right, significant_digits=5)
    ours = functools.partial(repeat, 10, functools.partial(list_all, left, right))
    ratio = 10 * median_ratio(theirs, ours)
    yield Row(f"{title}, deepdiff / 1 % differ", f"{ratio:.0f}", ">= 100")


def list_all(left: Any, right: Any, match: dict[str, str] | None = None) -> int:
    return sum(1 for _ in json_compare.differences(left, right, match=match))


def repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


# ---- images ----------------------------------------------------------------


def photo(size: tuple[int, int]) -> Image.Image:
    """Noise at every scale, as much as makes photos: 0.2 bytes a pixel at quality 85."""
    shared = octaves(size)
    return Image.merge("RGB", [Image.blend(shared, octaves(size), 0.3) for _ in "RGB"])


def octaves(size: tuple[int, int]) -> Image.Image:
    image = Image.new("L", size, 128)
    for step, share in {256: 0.5, 64: 0.5, 16: 0.5, 4: 0.15, 1: 0.14}.items():
        small = (size[0] // step + 2, size[1] // step + 2)
        noise = Image.effect_noise(small, 60).resize(size, Image.Resampling.BICUBIC)
        image = Image.blend(image, noise, share)
    return image


def fill(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write `count` photos into a new folder; few are drawn, the others are copies."""
    folder.mkdir()
    drawn = []
    for _ in range(min(count, 4)):
        file = io.BytesIO()
        photo(size).save(file, "JPEG", quality=85)
        drawn.append(file.getvalue())
    for number in range(count):
        (folder / f"photo_{number:05}.jpg").write_bytes(drawn[number % len(drawn)])
    return folder


@contextmanager
def server_of(folder: Path) -> Iterator[str]:
    """The embedded server in a process of its own; its URL."""
    script = str(ROOT / "mirror_images.py")
    command = [sys.executable, script, "--serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split(" at ")[1].split()[0]
        process.terminate()


def mirrored(url: str, *options: str) -> None:
    """Run mirror_images.py in this process, without its words."""
    with redirect_stdout(io.StringIO()):
        assert mirror_images.main([url, "--again", "-q", *options]) == 0


def pillow_alone(path: Path) -> int:
    """The pixel work of one JPEG and nothing else."""
    with Image.open(path) as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        result = io.BytesIO()
        flipped.save(
            result,
            "JPEG",
            qtables=image.quantization,
            subsampling=JpegImagePlugin.get_sampling(image),
        )
    return result.tell()


async def usual_solution(url: str) -> None:
    """What one finds when one looks for this task."""
    aiohttp = importlib.import_module("aiohttp")
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as answer:
            names = (await answer.text()).split()

        async def one(name: str) -> None:
            async with session.get(url + name) as answer:
                data = await answer.read()
            result = io.BytesIO()
            ImageOps.mirror(Image.open(io.BytesIO(data))).save(result, "JPEG")
            form = aiohttp.FormData()
            form.add_field("file", result.getvalue(), filename=f"mirrored_{name}")
            async with session.post(url, data=form) as answer:
                assert answer.status == 200

        await asyncio.gather(*map(one, (n for n in names if n.startswith("photo"))))


def psnr(image: Image.Image, truth: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB, over all samples."""
    histogram = ImageChops.difference(image, truth).histogram()
    squares = sum((i % 256) ** 2 * count for i, count in enumerate(histogram))
    return 10 * math.log10(255**2 * sum(histogram) / max(squares, 1))


def fidelity() -> tuple[float, float]:
    """Median PSNR against the true flip: ours, and the default save's."""
    ours, default = [], []
    for _ in range(5):
        source, plain = io.BytesIO(), io.BytesIO()
        photo((1000, 750)).save(source, "JPEG", quality=90)
        with Image.open(source) as image:
            truth = ImageOps.mirror(image)
        truth.save(plain, "JPEG")
        with Image.open(io.BytesIO(mirror_images.mirror(source.getvalue()))) as image:
            ours.append(psnr(image, truth))
        with Image.open(plain) as image:
            default.append(psnr(image, truth))
    return statistics.median(ours), statistics.median(default)


def peak_memory(url: str) -> int:
    """Peak resident set size of mirror_images.py in a process of its own."""
    command = [sys.executable, str(ROOT / "mirror_images.py"), url, "--again", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


def uploaded(folder: Path, url: str) -> None:
    with redirect_stdout(io.StringIO()):
        assert upload_images.main([str(folder), "--url", url, "-q"]) == 0


def curled(folder: Path, url: str) -> None:
    curl = f"curl -sf -o /dev/null -F file=@{{}} {url}"
    names = "\n".join(str(path) for path in folder.iterdir())
    command = ["xargs", "-P", "8", "-I{}", "sh", "-c", curl]
    subprocess.run(command, input=names, text=True, check=True)


class DistantHandler(mirror_images.ImageHandler):
    """Answers as if it stood 100 ms away."""

    def parse_request(self) -> bool:
        time.sleep(0.1)
        return super().parse_request()


def serve_from_afar(folder: Path, pipe: Connection) -> None:
    server = mirror_images.ImageServer(folder)
    server.RequestHandlerClass = DistantHandler
    pipe.send(server.url)
    server.serve_forever()


@contextmanager
def distant_server_of(folder: Path) -> Iterator[str]:
    """The embedded server 100 ms away, in a process of its own; its URL."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve_from_afar, args=(folder, theirs))
    process.start()
    yield ours.recv()
    process.terminate()
    process.join()


def against_pillow(
    scratch: Path, megapixels: str, size: tuple[int, int], count: int, goal: str
) -> Iterator[Row]:
    folder = fill(scratch / megapixels, count, size)
    paths = sorted(folder.iterdir())
    title = f"{megapixels}-megapixel JPEGs: speed / "
    with (
        ProcessPoolExecutor(mirror_images.PROCESSORS) as pool,
        server_of(folder) as url,
    ):

        def limit() -> list[int]:
            return list(pool.map(pillow_alone, paths))

        limit()  # starts the processes
        ratio = median_ratio(limit, lambda: mirrored(url))
        yield Row(title + "Pillow's on all processors", f"{ratio:.2f}", goal)
        if importlib.util.find_spec("aiohttp"):
            ratio = median_ratio(
                lambda: asyncio.run(usual_solution(url)), lambda: mirrored(url)
            )
            goal = ">= 1.4" if megapixels == "3" else ""
            yield Row(title + "the usual solution's (aiohttp)", f"{ratio:.2f}", goal)


def many_chains(scratch: Path) -> Iterator[Row]:
    with server_of(fill(scratch / "small", 1000, (360, 270))) as url:
        ratio = median_ratio(
            lambda: mirrored(url, "--chains", "8"),
            lambda: mirrored(url, "--chains", "64"),
        )
        yield Row("20 kB JPEGs: speed with 64 chains / 8", f"{ratio:.2f}", ">= 0.90")
    with distant_server_of(fill(scratch / "distant", 512, (64, 48))) as url:
        for chains, goal in (64, "about 4"), (256, "16, or the processor's limit"):
            ratio = median_ratio(
                functools.partial(mirrored, url, "--chains", "16"),
                functools.partial(mirrored, url, "--chains", str(chains)),
                rounds=3,
            )
            title = f"a server 100 ms away: speed with {chains} chains / 16"
            yield Row(title, f"{ratio:.1f}", goal)


def memory(scratch: Path) -> Iterator[Row]:
    peaks = []
    for count in (100, 10_000):
        with server_of(fill(scratch / str(count), count, (160, 120))) as url:
            peaks.append(peak_memory(url))
    ratio = peaks[1] / peaks[0]
    yield Row("peak memory: 10 000 images / 100", f"{ratio:.2f}", "<= 1.2")


def uploads(scratch: Path) -> Iterator[Row]:
    files = fill(scratch / "files", 2000, (360, 270))
    (scratch / "received").mkdir()
    with server_of(scratch / "received") as url:
        ratio = median_ratio(
            lambda: curled(files, url), lambda: uploaded(files, url), rounds=3
        )
    title = "upload of 2000 files of 20 kB: speed / curl's under xargs -P 8"
    yield Row(title, f"{ratio:.1f}", ">= 1.5")


def images() -> Iterator[Row]:
    """mirror_images.py and upload_images.py, the server in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        yield from against_pillow(scratch, "3", (2000, 1500), 60, ">= 0.70")
        yield from against_pillow(scratch, "0.75", (1000, 750), 200, ">= 0.50")
        yield from against_pillow(scratch, "0.03", (200, 150), 800, ">= 0.22")
        yield from many_chains(scratch)
        yield from memory(scratch)
        yield from uploads(scratch)
    ours, default = fidelity()
    yield Row("JPEG against the true flip, dB", f"{ours:.1f}", ">= 45")
    yield Row("the same with Pillow's default save, dB", f"{default:.1f}", "")


# ---- decorators ------------------------------------------------------------


def slow_functions() -> Iterator[Row]:
    quiet = logging.getLogger("benchmark.quiet")
    quiet.setLevel(logging.CRITICAL)
    loud = logging.getLogger("benchmark.loud")
    loud.setLevel(logging.INFO)
    loud.propagate = False
    loud.addHandler(logging.NullHandler())

    def function(x: int) -> int:
        return x

    def by_hand(func: Callable[[int], int]) -> Callable[[int], int]:
        calls = total = 0

        @functools.wraps(func)
        def wrapper(*args: int, **kwargs: int) -> int:
            nonlocal calls, total
            start = time.perf_counter_ns()
            try:
                return func(*args, **kwargs)
            finally:
                total += time.perf_counter_ns() - start
                calls += 1

        return wrapper

    def a_call(func: Callable[[int], int], calls: int = 20_000) -> float:
        def work() -> None:
            for x in range(calls):
                func(x)

        return seconds(work) / calls

    functions = {
        "by hand": by_hand(function),
        "every": decorators.timeit(every=60, logger=loud)(function),
        "disabled": decorators.timeit(logger=quiet)(function),
        "a line": decorators.timeit(logger=loud)(function),
        "cache": decorators.cache_profile(logger=loud)(function),
    }
    bare: list[float] = []
    took: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(40):
        bare.append(a_call(function))
        for name, decorated in functions.items():
            took[name].append(a_call(decorated))
    ratio = statistics.median(
        (ours - nothing) / (theirs - nothing)
        for ours, theirs, nothing in zip(took["every"], took["by hand"], bare)
    )
    # These are no ratios, so the least disturbed round counts.
    us = {name: (min(times) - min(bare)) * 1e6 for name, times in took.items()}
    yield Row(
        "timeit(every=60) adds to a call / a hand-written decorator adds",
        f"{ratio:.2f} x",
        "<= 1.5 x",
    )
    yield Row(
        "timeit with a disabled logger adds to a call",
        f"{us['disabled']:.2f} us",
        "<= 0.5 us",
    )
    yield Row("timeit adds to a call (a NullHandler)", f"{us['a line']:.1f} us", "-")
    yield Row("cache_profile adds to a call", f"{us['cache']:.1f} us", "-")

    def request() -> int:
        return sum(function(x) for x in range(200_000))

    ratio = median_ratio(
        lambda: decorators.profile(logger=loud)(request)(),
        lambda: cProfile.Profile().runcall(request),
    )
    yield Row("profile / bare cProfile, 0.1 s", f"{ratio:.2f} x", "<= 1.1 x")
    yield from logging_a_profile(loud)
    yield from sampling()

    with tempfile.TemporaryDirectory() as folder:
        for what, share in (("a line of ours in five", 5), ("nothing but ours", 1)):
            small, large = Path(folder, "small.log"), Path(folder, "large.log")
            write_log(small, 1_000_000, share)
            write_log(large, 100_000_000, share)
            (_, before), (passed, after) = (
                read_in_process(small),
                read_in_process(large),
            )
            speed = large.stat().st_size / 1e6 / passed
            yield Row(f"reading 100 MB, {what}", f"{speed:.0f} MB/s", "> 20 MB/s")
            yield Row(
                f"memory for 100 MB / for 1 MB, {what}",
                f"{after / before:.2f} x",
                "1 x",
            )


def logging_a_profile(logger: logging.Logger) -> Iterator[Row]:
    """What a profile of some 350 functions costs its caller and its log."""
    scope: dict[str, Any] = {}
    for number in range(350):
        exec(f"def function_{number}(): pass", scope)  # noqa: S102
    functions = [value for name, value in scope.items() if "function" in name]
    written: list[int] = []

    class Counting(logging.NullHandler):
        def handle(self, record: logging.LogRecord) -> bool:
            written.append(len(record.getMessage()))
            return True

    def request() -> None:
        for function in functions:
            function()

    bare = [seconds(lambda: cProfile.Profile().runcall(request)) for _ in range(9)]
    profiled = decorators.profile(logger=logger)(request)
    took = [seconds(profiled) for _ in range(9)]
    ms = (statistics.median(took) - statistics.median(bare)) * 1e3
    yield Row("to log a profile of 350 functions takes", f"{ms:.1f} ms", "-")
    logger.addHandler(Counting())
    profiled()
    yield Row("and so much of the log", f"{sum(written) / 1000:.0f} KB", "-")


# Half of the threads wait, the others work 10 times a second each, 15 calls deep.
TWENTY_THREADS = """
import logging, sys, threading, time
sys.path.insert(0, sys.argv[1])
import decorators

def work(depth):
    if depth:
        return work(depth - 1)
    sum(range(1000))
    time.sleep(0.1)

def loop():
    while True:
        work(15)

logging.basicConfig(filename=sys.argv[2], level=logging.INFO, format="%(message)s")
for _ in range(10):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
if sys.argv[3] == "sampled":
    decorators.start_sampling()
start = time.process_time()
time.sleep(5)
print(time.process_time() - start)
"""
# Known shares: 4, 2 and 1 of 7, in pieces of some 20 ms, beside two waiting threads.
SHARES = """
import logging, sys, threading, time
sys.path.insert(0, sys.argv[1])
import decorators

def spin(n):
    while n:
        n -= 1

def four():
    spin(800_000)

def two():
    spin(400_000)

def one():
    spin(200_000)

logging.basicConfig(filename=sys.argv[2], level=logging.INFO, format="%(message)s")
decorators.start_sampling()
for _ in range(2):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
end = time.monotonic() + 15
while time.monotonic() < end:
    four(), two(), one()
"""


def sampling() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")

        def processor_seconds(how: str) -> float:
            command = [sys.executable, "-c", TWENTY_THREADS, str(ROOT), str(log), how]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return float(done.stdout) / 5

        costs = [
            processor_seconds("sampled") - processor_seconds("bare") for _ in "123"
        ]
        share = f"{statistics.median(costs):.2%}"
        yield Row("sampling 20 threads takes of a processor", share, "<= 2 %")
        yield Row(
            "and logs a minute", f"{log.stat().st_size / 3 * 12 / 1000:.0f} KB", "-"
        )

        if spy := shutil.which("py-spy"):
            log.unlink()
            program = [sys.executable, "-c", SHARES, str(ROOT), str(log)]
            out = Path(folder, "spy")
            options = ["--format", "raw", "--rate", "100", "--output", str(out)]
            command = [spy, "record", *options, "--", *program]
            subprocess.run(command, capture_output=True, check=True)
            report = decorators.Report(None)
            for line in decorators.read_log(str(log)):
                report.read(line)
            ours = [
                line for line in report.collapsed().splitlines() if "(wait" not in line
            ]
            for name, share_of in (("four", 4 / 7), ("two", 2 / 7), ("one", 1 / 7)):
                shares = [
                    total(stacks, f"{name} (") / total(stacks, "spin (")
                    for stacks in (ours, out.read_text().splitlines())
                ]
                what = (
                    f"of the samples in {name}(), truly {share_of:.1%}: ours / py-spy"
                )
                yield Row(what, " / ".join(f"{share:.1%}" for share in shares), "-")


def total(stacks: list[str], part: str) -> int:
    """Samples of those collapsed stacks that contain it."""
    return sum(int(stack.rpartition(" ")[2]) for stack in stacks if part in stack)


def wrapped_library() -> Iterator[Row]:
    """The tests of h11, every function of which is decorated."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", ":all:", "--dest", folder]
        subprocess.run([*pip, "download", *options, "h11==0.16.0"], check=True)
        (sdist,) = Path(folder).iterdir()
        shutil.unpack_archive(sdist, folder)
        library = Path(folder, "h11-0.16.0")
        for decorator in ("", *wrap_everything.DECORATORS):
            plugin = ["-p", "wrap_everything"] if decorator else []
            tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            paths = os.pathsep.join([str(library), str(ROOT / "tests")])
            names = {"LIBRARY": "h11", "DECORATOR": decorator, "PYTHONPATH": paths}
            done = subprocess.run(
                [*tests, *plugin, str(library)],
                env={**os.environ, **names},
                check=False,
                capture_output=True,
                text=True,
            )
            result = done.stdout.splitlines()[-1].partition(" in ")[0]
            yield Row(f"tests of h11, {decorator or 'bare'}", result, "all passed")


def write_log(path: Path, size: int, share: int) -> None:
    """A log of `size` bytes in which one line of `share` is a line of timeit."""
    ours = (
        '2026-01-01 12:00:00,000 INFO MainThread timeit {{"name": "shop.f{}", '
        '"file": "/srv/shop.py", "line": 14, "pid": 4711, "seconds": {:.9f}, '
        '"cpu": 0.000071, "raised": null}}\n'
    )
    theirs = "2026-01-01 12:00:00,000 INFO MainThread order {} of customer {} is done\n"
    with path.open("w") as log:
        written = number = 0
        while written < size:
            number += 1
            written += log.write(ours.format(number % 20, number % 99_991 / 1e6))
            for _ in range(share - 1):
                written += log.write(theirs.format(number, number % 977))


def read_in_process(path: Path) -> tuple[float, int]:
    """Processor time (s) of main() reading a log, and the memory of its process."""
    program = (
        "import resource, sys, time; sys.path.insert(0, sys.argv[1]); import decorators"
        "; start = time.process_time(); decorators.main([sys.argv[2]])"
        "; print(time.process_time() - start"
        ", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, sys.path[0], str(path)]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    took, memory = last.splitlines()[-1].split()
    return float(took), int(memory)


# ---- RED_STATS -------------------------------------------------------------


# One day of a million events: 800 000 of client 1, the rest of 1 000 others. An id is a
# UUIDv7 whose time is `at`.
RED_STATS_DAY = """
INSERT INTO staged
SELECT if(number % 5 < 4, 1, 2 + rand(1) % 1000),
    fromUnixTimestamp64Milli({start:Int64} + rand(2) % 86400000, 'UTC') AS at,
    reinterpret(bitOr(
        bitShiftLeft(toUInt128(bitOr(bitShiftLeft(2::UInt64, 62), bitShiftRight(rand64(3), 2))), 64),
        toUInt128(toUInt64(toUnixTimestamp64Milli(at)) * 65536 + 0x7000 + rand(4) % 4096)
    ), 'UUID'),
    toUInt16(10000 * pow(rand(5) / 4294967296, 2))
FROM numbers(1000000)"""
RED_STATS_RAW = """
SELECT count(), countIf(red_bp > {above:UInt16})
FROM events FINAL
WHERE client_id = 1 AND at >= fromUnixTimestamp64Milli({since:Int64}, 'UTC')
  AND at < fromUnixTimestamp64Milli({until:Int64}, 'UTC')"""
RED_STATS_MINUTES = """
INSERT INTO minutes
SELECT 'hour', client_id, toStartOfMinute(at) AS start, count(),
    sumMap(map(red_bp, toUInt64(1))), 1
FROM events FINAL
GROUP BY client_id, start"""
RED_STATS_MINUTE_SCAN = """
SELECT sum(images), sum(arraySum(mapValues(mapFilter((red, n) -> red > {above:UInt16}, counts))))
FROM minutes FINAL
WHERE client_id = 1"""
RED_STATS_BYTES = """
SELECT table, column, sum(rows), sum(column_data_compressed_bytes)
FROM system.parts_columns
WHERE database = 'rolled' AND active AND table != 'progress'
GROUP BY table, column"""


def red_stats() -> Iterator[Row]:
    """The tables of red_stats_design.md with 30 million events, 24 million of them one client's."""
    if importlib.util.find_spec("chdb") is None:
        yield Row("red_stats", "skipped", "chDB is not installed")
        return
    from red_stats_document import ClickHouse

    with tempfile.TemporaryDirectory() as folder:
        session = importlib.import_module("chdb.session").Session(folder)
        engine = ClickHouse(session)
        yield from red_stats_insert(engine)
        engine.query("INSERT INTO events SELECT * FROM events WHERE rand() % 100 = 0")
        engine.query("CREATE TABLE minutes AS histograms")
        engine.query(RED_STATS_MINUTES)
        yield from red_stats_query(engine, "1 % repeats, unmerged")
        for table in ("events", "histograms", "minutes"):
            engine.query(f"OPTIMIZE TABLE {table} FINAL")
        yield from red_stats_query(engine, "days merged")
        yield from red_stats_bytes(engine)
    yield from red_stats_matcher()
    yield from red_stats_feed()


MARCH = 1_772_323_200_000
HOUR = 3_600_000
DAY = 24 * HOUR


def red_stats_insert(engine: Any) -> Iterator[Row]:
    """Thirty days hour by hour into two servers, one of which rolls up; days alternate."""
    for database in ("plain", "rolled"):
        engine.fresh(database)

    def take(database: str, roll_up: bool, day: int) -> None:
        engine.query(f"USE {database}")
        for hour in range(day, day + DAY, HOUR):
            engine.query(
                "INSERT INTO events SELECT * FROM rolled.staged"
                f" WHERE toStartOfHour(at) = toDateTime({hour // 1000}, 'UTC')"
            )
            if roll_up:
                engine.run("rebuild_hour", start=hour, clients=[], built=1)
        if roll_up:
            engine.run("rebuild_day", start=day, clients=[], built=1)

    ratios, rates = [], []
    for day in range(MARCH, MARCH + 30 * DAY, DAY):
        engine.query("USE rolled")
        engine.query("CREATE OR REPLACE TABLE staged AS events ENGINE = Memory")
        engine.query(RED_STATS_DAY, start=str(day))
        plain = functools.partial(take, "plain", False, day)
        rolled = functools.partial(take, "rolled", True, day)
        first, second = (plain, rolled) if day // DAY % 2 else (rolled, plain)
        timed = {first: seconds(first), second: seconds(second)}
        ratios.append(timed[rolled] / timed[plain])
        rates.append(1_000_000 / timed[rolled])
        engine.query("TRUNCATE TABLE plain.events")
    end = MARCH + 30 * DAY
    engine.query("USE rolled")
    engine.run("save", partition=0, next_offset=0, done=end, as_of=end, built=2)
    yield Row("insert with roll-up / without", f"{statistics.median(ratios):.2f}", "")
    yield Row("events/s with roll-up", f"{statistics.median(rates):,.0f}", ">= 100,000")


def red_stats_query(engine: Any, state: str) -> Iterator[Row]:
    """A month of the busy client, its ends in mid-minute, asked in three ways."""
    chance = random.Random(1)
    timed: dict[str, list[float]] = {"raw": [], "query": [], "minutes": []}
    for _ in range(15):
        since = MARCH + chance.randrange(DAY)
        until = MARCH + 29 * DAY + chance.randrange(DAY)
        above = chance.randrange(10_000)
        texts = {"since": str(since), "until": str(until), "above": str(above)}
        raw = functools.partial(engine.query, RED_STATS_RAW, **texts)
        query = functools.partial(engine.count, 1, since, until, above)
        minutes = functools.partial(
            engine.query, RED_STATS_MINUTE_SCAN, above=str(above)
        )
        ((images, redder),) = raw()
        assert query() == (int(images), int(redder))
        for name, work in (("raw", raw), ("query", query), ("minutes", minutes)):
            timed[name].append(seconds(work))
    middle = {name: statistics.median(times) for name, times in timed.items()}
    pairs = list(zip(timed["raw"], timed["query"], timed["minutes"], strict=True))
    ratio = statistics.median(raw / query for raw, query, _ in pairs)
    yield Row(f"a month, {state}: raw scan / statistics query", f"{ratio:.1f}", "> 5")
    yield Row(f"a month, {state}: raw scan, ms", f"{middle['raw'] * 1000:.0f}", "")
    yield Row(
        f"a month, {state}: statistics query, ms", f"{middle['query'] * 1000:.0f}", ""
    )
    ratio = statistics.median(minutes / raw for raw, _, minutes in pairs)
    yield Row(f"a month, {state}: minute tier / raw scan", f"{ratio:.1f}", "")


def red_stats_bytes(engine: Any) -> Iterator[Row]:
    """What an event and a row of the roll-up take, the latter also for small clients alone."""
    engine.query("CREATE TABLE small AS histograms")
    engine.query("INSERT INTO small SELECT * FROM histograms FINAL WHERE client_id > 1")
    engine.query("OPTIMIZE TABLE small FINAL")
    tables: dict[str, dict[str, tuple[int, int]]] = {}
    for table, column, rows, size in engine.query(RED_STATS_BYTES):
        tables.setdefault(table, {})[column] = int(rows), int(size)
    rows_of = {table: columns["client_id"][0] for table, columns in tables.items()}
    size_of = {
        table: sum(s for _, s in columns.values()) for table, columns in tables.items()
    }
    ((small,),) = engine.query("SELECT count() FROM events FINAL WHERE client_id > 1")
    events = rows_of["events"]
    yield Row("bytes on disk per event", f"{size_of['events'] / events:.1f}", "")
    of_ids = tables["events"]["image_id"][1] / size_of["events"]
    yield Row("  of which image_id", f"{of_ids:.0%}", "")
    for table, what, counted in (
        ("histograms", "roll-up", events),
        ("small", "roll-up of clients with 200 images a day", int(small)),
        ("minutes", "minute tier (rejected)", events),
    ):
        per_row, per_event = size_of[table] / rows_of[table], size_of[table] / counted
        yield Row(
            f"{what}: rows per 1000 events",
            f"{1000 * rows_of[table] / counted:.1f}",
            "",
        )
        yield Row(f"{what}: bytes on disk per row", f"{per_row:.1f}", "")
        yield Row(f"{what}: bytes on disk per event", f"{per_event:.2f}", "")


def red_stats_matcher() -> Iterator[Row]:
    """The document's matcher: what an image costs with many subscriptions of its client."""
    from red_stats_document import run_python

    names, _ = run_python()
    chance = random.Random(1)
    reds = [chance.randrange(9_100) for _ in range(100_000)]

    def images(subscriptions: int) -> Callable[[], object]:
        matcher = names["Matcher"]()
        for number in range(subscriptions):
            matcher.change(1, number, 1, 9_000 + number % 1_000, 0)
        return lambda: [matcher.image(1, 10, red, 10) for red in reds]

    ratio = median_ratio(images(1_000), images(10))
    yield Row(
        "an image against 1 000 subscriptions / against 10", f"{ratio:.2f}", "< 2"
    )


RED_STATS_FEED = """
SELECT open_day('images', today());
SELECT open_day(parent, today()) FROM unnest(ARRAY['notifications', 'deliveries', 'attempts']) AS parent;
CREATE FUNCTION subscription(client bigint) RETURNS uuid LANGUAGE sql AS $$ SELECT lpad(client::text, 32, '0')::uuid $$;
SELECT set_threshold(client, subscription(client), 8820::smallint, now()) FROM generate_series(1, 1000) AS client;
SELECT add_webhook(subscription(client), 'https://hooks.example.com/red', 'one') FROM generate_series(1, 1000) AS client;
CREATE FUNCTION one_set(number bigint, clients integer, images integer) RETURNS bigint LANGUAGE sql AS $$
    SELECT feed_append(array_agg((client, timestamptz '2026-03-01Z' + (number * images + n) * interval '1 ms', gen_random_uuid(), 9000,
        ARRAY[subscription(client)])::passing))
    FROM (SELECT n, 1 + (number * 37 + n) % clients AS client FROM generate_series(1, images) AS n) AS image $$;
CREATE FUNCTION take_many(clients integer) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    FOR n IN 1..1000 LOOP
        PERFORM take(1 + n * 7919 % clients, date_trunc('milliseconds', now()) + n * interval '1 ms', gen_random_uuid(), (n * 37 % 9000)::smallint);
    END LOOP; END $$;
"""
RED_STATS_SIZES = """
SELECT sum(pg_total_relation_size(pg_class.oid)) FROM pg_inherits JOIN pg_class ON inhrelid = oid WHERE inhparent = '{0}'::regclass"""


def red_stats_feed() -> Iterator[Row]:
    """The feed and the start version in one session on PostgreSQL, without fsync."""
    from red_stats_postgresql import POSTGRESQL, Cluster, Database, postgresql_binaries

    binaries = postgresql_binaries()
    if binaries is None:
        yield Row("feed", "skipped", "PostgreSQL is not installed")
        return
    cluster = Cluster(binaries)
    cluster.start()
    try:
        cluster.run("postgres", "CREATE DATABASE feed")
        blocks = "".join(block.code for block in POSTGRESQL)
        cluster.run("feed", f"\\o /dev/null\n{blocks}{RED_STATS_FEED}")
        database = Database(cluster, "feed")
        number = itertools.count()

        def a_set(clients: int, images: int) -> float:
            sql = f"SELECT one_set({next(number)}, {clients}, {images});"
            return images / seconds(functools.partial(database, sql))

        rate = statistics.median(a_set(1_000, 100) for _ in range(300))
        yield Row(
            "feed: entries/s, sets of 100 of as many clients", f"{rate:,.0f}", "> 2,000"
        )
        ((rows,),) = database("SELECT count(*) FROM notifications;")
        database(
            f"INSERT INTO attempts SELECT gen_random_uuid(), now(), 1, 1, 200, NULL, today() FROM generate_series(1, {rows});"
        )
        for table in ("notifications", "deliveries", "attempts"):
            ((size,),) = database(RED_STATS_SIZES.format(table) + ";")
            yield Row(
                f"feed: bytes on disk per row of {table}",
                f"{int(size) / int(rows):.0f}",
                "",
            )
        database("UPDATE feeds SET entries_a_minute = 1000000;")
        rate = statistics.median(a_set(1, 4_000) for _ in range(9))
        yield Row("feed: entries/s, sets of 4,000 of one client", f"{rate:,.0f}", "")
        database("UPDATE feeds SET entries_a_minute = 0;")
        rate = statistics.median(a_set(1, 4_000) for _ in range(9))
        yield Row(
            "feed: images/s of one client beyond its limit", f"{rate:,.0f}", "> 2,500"
        )
        rate = 1_000 / statistics.median(
            seconds(functools.partial(database, "SELECT take_many(50);"))
            for _ in range(9)
        )
        yield Row(
            "start: images/s through take, 1,000 a transaction", f"{rate:,.0f}", "> 300"
        )
        database.close()
    finally:
        cluster.stop()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "json": json_documents,
    "images": images,
    "decorators": slow_functions,
    "wrapped": wrapped_library,
    "red_stats": red_stats,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the figures that README.md quotes."
    )
    parser.add_argument(
        "section", nargs="*", help=f"which to run (default: all): {', '.join(SECTIONS)}"
    )
    chosen = parser.parse_args(argv).section or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    print(f"{'what':74} {'measured':>12}  goal")
    for name in chosen:
        for row in SECTIONS[name]():
            print(f"{row.what:74} {row.measured:>12}  {row.goal}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
