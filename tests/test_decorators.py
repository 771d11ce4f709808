"""The decorators are transparent, and the reader finds in a log what they wrote to it,
whatever else happened to the log."""

import asyncio
import base64
import contextlib
import cProfile
import functools
import gc
import gzip
import inspect
import io
import itertools
import json
import logging
import os
import pstats
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
import weakref
import zlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
from pytest import MonkeyPatch

import decorators
from decorators import cache_profile, main, profile, start_sampling, timeit

SCRIPT = Path(decorators.__file__)
MAX_LINE = 3600  # under 4 KB with the program's own prefix

pytestmark = pytest.mark.anyio

Func = Callable[..., Any]
Record = dict[str, Any]
Tables = dict[str, list[Record]]


class Lines(logging.Handler):
    """Keeps what was logged, as the reader would see it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def of(self, kind: str) -> list[Record]:
        heads = [message.split(" ", 1) for message in self.messages]
        return [json.loads(text) for name, text in heads if name == kind]

    def flushed(self, kind: str) -> list[Record]:
        decorators.flush()
        return self.of(kind)


@pytest.fixture(autouse=True)
def lines() -> Iterator[Lines]:
    """The lines of the decorators' own logger."""
    decorators.flush()  # what functions of earlier tests have counted
    handler = Lines()
    decorators.logger.addHandler(handler)
    decorators.logger.setLevel(logging.INFO)
    yield handler
    decorators.logger.removeHandler(handler)
    decorators.logger.setLevel(logging.NOTSET)


class Clock:
    """A clock that is set forward by hand."""

    def __init__(self) -> None:
        self.now = 10**12  # ns

    def __call__(self) -> int:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(decorators, "perf_counter_ns", clock)
    return clock


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Whatever is in a reference cycle stays alive."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(
    params=[timeit, timeit(every=60), cache_profile(), profile()],
    ids=["timeit", "timeit-every", "cache_profile", "profile"],
)
def decorator(request: pytest.FixtureRequest) -> Any:
    """Each decorator in turn."""
    return request.param


def function(act: Func = int) -> Any:
    """Call `act` twice."""
    act()
    return act()


async def coroutine(act: Func = int) -> Any:
    """Call `act` twice."""
    act()
    await asyncio.sleep(0)
    return act()


def generator(act: Func = int) -> Generator[Any, None, None]:
    """Call `act` twice."""
    yield act()
    yield act()


async def async_generator(act: Func = int) -> AsyncGenerator[Any, None]:
    """Call `act` twice."""
    yield act()
    await asyncio.sleep(0)
    yield act()


KINDS: list[Func] = [function, coroutine, generator, async_generator]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """A function of each kind in turn."""
    return request.param


async def items_of(result: Any) -> AsyncIterator[Any]:
    """What a call gives, of whatever kind the function is."""
    if inspect.isawaitable(result):
        yield await result
    elif inspect.isgenerator(result):
        for item in result:
            yield item
    elif inspect.isasyncgen(result):
        async for item in result:
            yield item
    else:
        yield result


async def result_of(func: Func, *args: Any, **kwargs: Any) -> list[Any]:
    return [item async for item in items_of(func(*args, **kwargs))]


def named(name: str, file: str = "odd.py") -> Func:
    """A function of that name in that file."""
    scope: dict[str, Any] = {"__name__": "odd"}
    exec(compile("def function(): return 1", file, "exec"), scope)  # noqa: S102
    scope["function"].__qualname__ = name
    result: Func = scope["function"]
    return result


class Failure(Exception):
    pass


def fail() -> NoReturn:
    raise Failure


def run_in_threads(func: Callable[[], object], count: int = 4) -> None:
    threads = [threading.Thread(target=func) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def records(log: Path) -> list[Record]:
    """The records in a log."""
    found = map(decorators.parse, log.read_bytes().splitlines())
    return [record for line in found for _, record in line if record]


PREAMBLE = """\
import logging, os, sys, threading, time
from decorators import cache_profile, profile, start_sampling, timeit
logging.basicConfig(filename="log", level="INFO", format="%(asctime)s %(message)s")
"""


def run_program(program: str, folder: Path, *arguments: str) -> list[Record]:
    """Run a program beside a copy of the decorators; return what it logged to `log`.

    It must print nothing.
    """
    shutil.copy(SCRIPT, folder)
    (folder / "program.py").write_text(PREAMBLE + textwrap.dedent(program))
    # Python 3.12 and later warn about a fork while there are several threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "program.py"]
    command += arguments
    done = subprocess.run(
        command, cwd=folder, capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    return records(folder / "log")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


Main = Callable[..., tuple[int, str, str]]
Read = Callable[..., tuple[int, Tables, str]]


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Call main(): exit status, standard output, standard error."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run_main


@pytest.fixture
def read(tmp_path: Path, run_main: Main) -> Read:
    """Write lines to a log and read it: exit status, tables, standard error."""

    def read(
        *lines: str, log: bytes = b"", options: Iterable[object] = ()
    ) -> tuple[int, Tables, str]:
        path = tmp_path / "app.log"
        path.write_bytes(log or "\n".join([*lines, ""]).encode())
        status, out, err = run_main(path, "--json", *options)
        return status, json.loads(out), err

    return read


# --- the decorators -------------------------------------------------------------------


def test_methods_of_all_kinds_are_bound_as_usual(decorator: Func) -> None:
    class Shop:
        method = decorator(lambda self: self)
        class_inside: Any = classmethod(decorator(lambda cls: cls))
        class_outside = decorator(classmethod(lambda cls: cls))
        static_inside = staticmethod(decorator(lambda value: value))
        static_outside = decorator(staticmethod(lambda value: value))

    class Branch(Shop):
        pass

    branch = Branch()
    assert branch.method() is branch
    assert branch.class_inside() is Branch.class_inside() is Branch
    assert branch.class_outside() is Branch.class_outside() is Branch
    assert branch.static_inside(7) == Branch.static_inside(7) == 7
    assert branch.static_outside(7) == Branch.static_outside(7) == 7


def test_callables_without_name_or_code_are_decorated_too(decorator: Func) -> None:
    class Negate:
        def __call__(self, value: int) -> int:
            return -value

    assert decorator(len)([1, 2]) == 2
    assert decorator(str.upper)("a") == "A"
    assert decorator(functools.partial(pow, 2))(5) == 32
    assert list(decorator(functools.partial(generator, str))()) == ["", ""]
    assert decorator(Negate())(5) == -5


@pytest.mark.parametrize("target", [int, property(lambda self: 1), 7, "name"])
def test_what_is_not_a_function_is_refused(decorator: Func, target: Any) -> None:
    with pytest.raises(TypeError, match="decorate functions and methods"):
        decorator(target)


def sampling(**options: Any) -> Func:
    return lambda _: start_sampling(**options)


@pytest.mark.parametrize(
    ("decorator", "options"),
    [
        (timeit, {"slower_than": -1}),
        (timeit, {"slower_than": float("nan")}),
        (timeit, {"slower_than": 1, "every": 60}),
        (timeit, {"every": 0}),
        (timeit, {"every": float("nan")}),
        (timeit, {"level": "LOUD"}),
        (cache_profile, {"every": -1}),
        (profile, {"slower_than": -1}),
        (profile, {"every": -1}),
        (sampling, {"interval": 0}),
        (sampling, {"every": -1}),
    ],
)
def test_invalid_options_are_refused(decorator: Func, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="=|LOUD"):
        decorator(**options)(function)


def test_the_environment_switches_everything_off(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("DECORATORS", "off")
    script = runpy.run_path(str(SCRIPT))

    assert script["timeit"](function) is function
    assert script["profile"](slower_than=1)(function) is function
    script["start_sampling"]()
    assert "sampling" not in [thread.name for thread in threading.enumerate()]


# --- timeit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "waited"),
    [(function, 3.0), (coroutine, 7.0), (generator, 3.0), (async_generator, 7.0)],
)
@pytest.mark.parametrize("options", [{}, {"every": 60}], ids=["each", "every"])
async def test_timeit_tells_the_callers_wait_from_the_time_and_cpu_inside(
    kind: Func,
    waited: float,
    options: dict[str, Any],
    lines: Lines,
    clock: Clock,
    monkeypatch: MonkeyPatch,
) -> None:
    cpu = Clock()
    monkeypatch.setattr(decorators, "thread_time_ns", cpu)

    def work(seconds: float) -> None:
        clock.tick(seconds)
        cpu.tick(seconds / 2)

    # Another task works while the function waits, and its caller between two items.
    asyncio.get_running_loop().call_soon(work, 4.0)
    async for _ in items_of(timeit(**options)(kind)(lambda: work(1.5))):
        work(10.0)

    (line,) = lines.flushed("timeit")
    assert line["total" if options else "seconds"] == waited
    assert line.get("inside", line.get("total")) == 3.0
    assert line.get("cpu") == (None if options else 1.5)


def test_timeit_names_the_exception(lines: Lines) -> None:
    with pytest.raises(Failure):
        timeit(fail)()

    assert timeit(function)() == 0
    assert [line["raised"] for line in lines.of("timeit")] == ["Failure", None]


@pytest.mark.parametrize("end", ["close", "drop"])
def test_an_unfinished_generator_has_not_failed(end: str, lines: Lines) -> None:
    steps = timeit(generator)()
    next(steps)
    if end == "close":
        steps.close()
    del steps

    assert [line["raised"] for line in lines.of("timeit")] == [None]


def test_slower_than_leaves_out_calls_and_says_so(lines: Lines, clock: Clock) -> None:
    timed = timeit(slower_than=0.125)(clock.tick)
    for seconds in (0.0625, 0.125, 0.0, 0.5):
        timed(seconds)

    assert [line["seconds"] for line in lines.of("timeit")] == [0.125, 0.5]
    assert {line["slower_than"] for line in lines.of("timeit")} == {0.125}


def test_timeit_reads_no_clock_for_a_disabled_logger(monkeypatch: MonkeyPatch) -> None:
    for name in ("perf_counter_ns", "thread_time_ns"):
        monkeypatch.setattr(decorators, name, fail)

    assert timeit(level="DEBUG")(function)() == 0


# --- cache_profile --------------------------------------------------------------------


@pytest.mark.parametrize("maxsize", [-1, 0, 1, 2, 7, 50, 1000, None])
def test_cache_profile_predicts_lru_cache(maxsize: int | None, lines: Lines) -> None:
    def work(a: int, *, b: int = 0) -> None:
        pass

    rng = random.Random(1)
    profiled = cache_profile(maxsize=maxsize)(work)
    cached = functools.lru_cache(maxsize=maxsize)(work)
    unbounded = functools.lru_cache(maxsize=None)(work)
    for _ in range(2000):
        kwargs = {"b": 1} if rng.random() < 0.3 else {}
        a = int(rng.expovariate(0.05))
        for one in (profiled, cached, unbounded):
            one(a, **kwargs)

    (line,) = lines.flushed("cache_profile")
    assert line["calls"] == 2000
    assert line["hits"] == cached.cache_info().hits
    assert line["hits_unbounded"] == unbounded.cache_info().hits
    assert line["distinct"] == unbounded.cache_info().currsize


def test_cache_profile_says_what_hits_would_save(lines: Lines, clock: Clock) -> None:
    profiled = cache_profile(clock.tick)
    for seconds in (1.0, 2.0, 1.0, 1.0):
        profiled(seconds)

    (line,) = lines.flushed("cache_profile")
    assert (line["total"], line["saved"]) == (5.0, 2.0)


class Argument:
    """Fails at whatever a careless decorator could do with it."""

    def __hash__(self) -> int:
        raise Failure

    def __eq__(self, other: object) -> bool:
        raise Failure

    def __repr__(self) -> str:
        raise Failure


class Shop:
    def price(self, article: int) -> int:
        return article


@pytest.mark.parametrize(
    ("func", "options", "calls", "counted"),
    [
        (id, {}, [1, [], {}, Argument(), 1], {"calls": 5, "unhashable": 3, "hits": 1}),
        (chr, {}, [-7, -7, 1, 1], {"calls": 4, "distinct": 1, "hits_unbounded": 1}),
        (len, {"key": tuple}, [["a"], ["a"]], {"distinct": 1, "hits": 1}),
        (Shop.price, {}, [(Shop(), 1), (Shop(), 1)], {"distinct": 2, "hits": 0}),
    ],
    ids=["unhashable", "raising", "a-key", "self"],
)
def test_cache_profile_counts_calls_by_their_key(
    func: Func,
    options: dict[str, Any],
    calls: list[Any],
    counted: dict[str, int],
    lines: Lines,
) -> None:
    profiled = cache_profile(**options)(func)
    for argument in calls:
        with contextlib.suppress(ValueError):
            profiled(*argument) if isinstance(argument, tuple) else profiled(argument)

    assert lines.flushed("cache_profile")[0].items() >= counted.items()


def test_a_hash_may_call_the_profiled_method_and_is_not_counted(lines: Lines) -> None:
    class Money:
        @cache_profile
        def key(self) -> int:
            return 7

        def __hash__(self) -> int:
            return hash(self.key())

    assert Money().key() == 7
    (line,) = lines.flushed("cache_profile")
    assert (line["calls"], line["unhashable"]) == (1, 0)


# --- profile --------------------------------------------------------------------------


Profilers = list[cProfile.Profile]


@pytest.fixture
def profilers(monkeypatch: MonkeyPatch) -> Profilers:
    """The profilers that were used, in order."""
    used: Profilers = []

    class Remembered(cProfile.Profile):
        def __init__(self) -> None:
            super().__init__()
            used.append(self)

    monkeypatch.setattr(cProfile, "Profile", Remembered)
    return used


def table(profile: cProfile.Profile | Path) -> dict[Any, Any]:
    """What pstats makes of it."""
    source: Any = str(profile) if isinstance(profile, Path) else profile
    stats: dict[Any, Any] = pstats.Stats(source).stats  # type: ignore[attr-defined]
    return stats


def fill(n: int) -> int:
    return len(sorted(random.Random(n).random() for _ in range(n)))


def busy() -> int:
    return sum(fill(n) for n in (10, 20, 30))


def test_the_profile_in_the_log_equals_what_cprofile_would_have_dumped(
    lines: Lines, profilers: Profilers, read: Read, tmp_path: Path
) -> None:
    profile(busy)()
    profilers[0].dump_stats(tmp_path / "dumped")
    read(*lines.messages, options=["--pstats", tmp_path / "out"])

    (written,) = (tmp_path / "out").iterdir()
    assert table(written) == table(tmp_path / "dumped")
    assert len(table(written)) > 5


def test_nothing_of_the_decorator_is_in_a_profile(profilers: Profilers) -> None:
    profile(busy)()

    assert str(SCRIPT) not in {file for file, _, _ in table(profilers[0])}


def test_a_large_profile_is_split_into_numbered_lines(lines: Lines) -> None:
    files = [f"{random.Random(n).getrandbits(64):x}.py" for n in range(1000)]
    functions = [named("odd", file) for file in files]
    profile(lambda: [function() for function in functions])()

    parts = lines.of("profile")
    assert len(parts) > 2
    assert [line["part"] for line in parts] == list(range(1, len(parts) + 1))
    assert {line["parts"] for line in parts} == {len(parts)}
    assert max(map(len, lines.messages)) <= MAX_LINE


def test_every_limits_the_rate_of_profiles(profilers: Profilers, clock: Clock) -> None:
    profiled = profile(every=60)(clock.tick)

    for seconds in (30.0, 30.0, 31.0, 1.0):
        profiled(seconds)
    assert len(profilers) == 2


def test_every_holds_for_calls_that_begin_while_a_profile_is_logged(
    profilers: list[cProfile.Profile],
) -> None:
    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            if len(profilers) == 1:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
            return True

    logger = logging.Logger("unregistered")  # noqa: LOG001
    logger.addHandler(Handler())
    work = profile(every=60, logger=logger)(function)
    work()
    assert len(profilers) == 1


def test_the_profile_of_a_fast_call_is_not_logged(lines: Lines, clock: Clock) -> None:
    profiled = profile(slower_than=0.125)(clock.tick)
    for seconds in (0.0625, 0.125, 0.0):
        profiled(seconds)

    assert [line["seconds"] for line in lines.of("profile")] == [0.125]


def test_nothing_is_profiled_for_a_disabled_logger(profilers: Profilers) -> None:
    assert profile(level="DEBUG")(fill)(3) == 3
    assert not profilers


def test_calls_inside_of_a_profiled_call_are_only_counted(
    lines: Lines, profilers: Profilers
) -> None:
    inner = profile(fill)

    @profile
    def outer() -> int:
        return inner(1) + inner(2)

    assert outer() == 3
    assert len(profilers) == 1
    skipped = lines.flushed("profile")[-1]
    assert skipped["name"] == f"{__name__}.fill"
    assert skipped["skipped"] == "another call was being profiled"
    assert skipped["calls"] == 2


def test_a_profiler_that_is_at_work_already_is_left_alone(lines: Lines) -> None:
    theirs, profiled = cProfile.Profile(), profile(busy)
    theirs.enable()
    profiled()
    profiled()
    busy()
    theirs.disable()

    calls = {name: times[1] for (_, _, name), times in table(theirs).items()}
    assert calls["busy"] == 3
    (line,) = lines.flushed("profile")
    assert (line["skipped"], line["calls"]) == ("another profiler was active", 2)
    profiled()
    assert "part" in lines.of("profile")[-1]


async def test_other_tasks_are_not_in_a_profile(profilers: Profilers) -> None:
    @profile
    async def handle() -> int:
        asyncio.get_running_loop().call_soon(fill, 3)
        await asyncio.sleep(0)
        return busy()

    assert await handle() == 60
    calls = {name: times[1] for (_, _, name), times in table(profilers[0]).items()}
    assert "handle" in calls
    assert calls["fill"] == 3  # those of busy()


async def test_one_of_several_concurrent_calls_is_profiled(
    lines: Lines, profilers: Profilers
) -> None:
    profiled = profile(coroutine)
    results = await asyncio.gather(
        *[profiled(functools.partial(int, n)) for n in range(5)]
    )

    assert results == [0, 1, 2, 3, 4]
    assert len(profilers) == 1
    assert lines.flushed("profile")[-1]["calls"] == 4


def test_a_call_that_raises_is_profiled_and_frees_the_profiler(lines: Lines) -> None:
    for _ in range(2):
        with pytest.raises(Failure):
            profile(fail)()

    assert len({line["id"] for line in lines.of("profile")}) == 2


@needs_fork
def test_a_child_forked_beside_a_profiled_call_can_be_profiled(tmp_path: Path) -> None:
    program = """
        @profile
        def work():
            started.set()
            forked.wait()

        @profile
        def in_child():
            pass

        started, forked = threading.Event(), threading.Event()
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        if os.fork():
            os.wait()
            forked.set()
        else:
            in_child()
    """
    found = run_program(program, tmp_path)

    assert {record["name"] for record in found} == {"program.work", "program.in_child"}
    # From Python 3.12 on, the profiler of the parent's thread is active in the child.
    skipped = [record.get("skipped") for record in found]
    assert "another call was being profiled" not in skipped


# --- one call, of whatever kind -------------------------------------------------------


async def test_the_results_of_a_call_are_the_same(decorator: Func, kind: Func) -> None:
    bare = await result_of(kind, act=itertools.count(7).__next__)

    assert await result_of(decorator(kind), act=itertools.count(7).__next__) == bare


async def test_an_exception_arrives_as_raised(decorator: Func, kind: Func) -> None:
    error = Failure()

    def raise_error() -> NoReturn:
        raise error

    with pytest.raises(Failure) as caught:
        await result_of(decorator(kind), raise_error)
    assert caught.value is error
    assert error.__context__ is error.__cause__ is None


def test_a_function_looks_the_same_to_inspect(decorator: Func, kind: Func) -> None:
    decorated = decorator(kind)

    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        assert getattr(decorated, attribute) == getattr(kind, attribute)
    assert inspect.signature(decorated) == inspect.signature(kind)
    assert inspect.get_annotations(decorated) == inspect.get_annotations(kind)
    for is_kind in (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ):
        assert is_kind(decorated) == is_kind(kind)


def recording() -> Generator[Any, Any, Any]:
    """Records what is sent and thrown."""
    try:
        EVENTS.append((yield "first"))
        EVENTS.append((yield "second"))
    except Failure:
        EVENTS.append((yield "after a failure"))
        raise KeyError(1) from None
    finally:
        EVENTS.append("finally")
    return "result"


async def awaiting() -> Any:
    return await types.coroutine(recording)()


async def async_recording() -> AsyncGenerator[Any, Any]:
    try:
        EVENTS.append((yield "first"))
        await asyncio.sleep(0)
        EVENTS.append((yield "second"))
    except Failure:
        EVENTS.append((yield "after a failure"))
        raise KeyError(1) from None
    finally:
        await asyncio.sleep(0)
        EVENTS.append("finally")


EVENTS: list[Any] = []
CLOSE: tuple[str] = ("close",)


async def run_steps(steps_of: Any, steps: list[tuple[Any, ...]]) -> list[Any]:
    """The result of each step, exceptions and their contexts included."""
    EVENTS.clear()
    results: list[Any] = []
    for verb, *arguments in steps:
        try:
            if inspect.isasyncgen(steps_of):
                results.append(await getattr(steps_of, f"a{verb}")(*arguments))
            else:
                results.append(getattr(steps_of, verb)(*arguments))
        except BaseException as error:  # noqa: BLE001
            context = type(error.__context__)
            results.append((type(error), str(error), context))
    return [*results, *EVENTS]


@pytest.mark.parametrize(
    "steps",
    [
        [("send", None), ("send", 1), ("send", 2), ("send", 3)],
        [("send", None), ("throw", Failure()), ("send", 1)],
        [("send", None), ("throw", Failure()), CLOSE, ("send", None)],
        [("send", None), ("throw", asyncio.CancelledError()), ("send", None)],
        [("send", None), ("throw", GeneratorExit()), ("send", None)],
        [("send", None), CLOSE, ("send", None)],
        [CLOSE, ("send", None)],
        [("throw", Failure())],
        [("send", 1), CLOSE],
    ],
)
@pytest.mark.parametrize("func", [recording, awaiting, async_recording])
async def test_send_throw_and_close_do_what_they_do_to_the_bare_function(
    decorator: Func, steps: list[Any], func: Func
) -> None:
    bare = await run_steps(func(), steps)

    assert await run_steps(decorator(func)(), steps) == bare


async def test_a_types_coroutine_can_be_awaited(decorator: Func) -> None:
    @decorator
    @types.coroutine
    def old_style() -> Generator[None, None, int]:
        yield
        return 7

    assert await old_style() == 7


class Thing(Exception):
    """Something whose lifetime is watched."""

    alive: ClassVar["weakref.WeakSet[Thing]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)


async def an_argument(decorator: Func) -> None:
    for kind in KINDS:
        await result_of(decorator(kind), functools.partial(id, Thing()))


async def what_a_generator_yields_and_catches(decorator: Func) -> None:
    steps = decorator(generator)(Thing)
    next(steps)
    assert not Thing.alive
    with contextlib.suppress(Thing):
        steps.throw(Thing())


async def what_an_async_generator_yields_and_catches(decorator: Func) -> None:
    steps = decorator(async_generator)(Thing)
    await anext(steps)
    assert not Thing.alive
    with contextlib.suppress(Thing):
        await steps.athrow(Thing())


async def the_exception_of_a_future(decorator: Func) -> None:
    @decorator
    async def wait(futures: list[asyncio.Future[None]]) -> None:
        await futures.pop()

    futures = [asyncio.get_running_loop().create_future()]
    futures[0].set_exception(Thing())
    with contextlib.suppress(Thing):
        await wait(futures)


@pytest.mark.parametrize(
    "use",
    [
        an_argument,
        what_a_generator_yields_and_catches,
        what_an_async_generator_yields_and_catches,
        the_exception_of_a_future,
    ],
)
async def test_nothing_is_kept_alive_after_its_last_use(
    decorator: Func, use: Func, no_gc: None
) -> None:
    await use(decorator)

    assert not Thing.alive


async def dropping_coroutine(thing: Thing) -> int:
    del thing
    return len(Thing.alive)


def dropping_generator(thing: Thing) -> Iterator[int]:
    del thing
    yield len(Thing.alive)


async def dropping_async_generator(thing: Thing) -> AsyncIterator[int]:
    del thing
    yield len(Thing.alive)


@pytest.mark.parametrize(
    "func", [dropping_coroutine, dropping_generator, dropping_async_generator]
)
async def test_a_call_can_release_its_arguments(decorator: Func, func: Func) -> None:
    alive = [n async for n in items_of(decorator(func)(Thing()))]

    assert alive == [0]


def test_an_argument_is_neither_compared_nor_printed(decorator: Func) -> None:
    argument = Argument()

    assert decorator(id)(argument) == id(argument)


def test_the_methods_of_an_lru_cache_below_stay(decorator: Func) -> None:
    decorated = decorator(functools.lru_cache(abs))

    decorated(-1)
    assert decorated.cache_info().currsize == 1
    decorated.cache_clear()
    assert decorated.cache_info().currsize == 0


def test_recursion_and_threads_do_not_disturb_each_other(decorator: Func) -> None:
    @decorator
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    results: list[int] = []
    run_in_threads(lambda: results.append(fibonacci(10)))

    assert results == [55] * 4


# --- counts that are logged once an interval ------------------------------------------


def test_a_line_is_logged_once_an_interval(lines: Lines, clock: Clock) -> None:
    timed = timeit(every=60)(clock.tick)
    for _ in range(130):
        timed(1.0)

    assert [line["calls"] for line in lines.of("timeit")] == [60, 60]
    assert [line["calls"] for line in lines.flushed("timeit")] == [60, 60, 10]


def test_the_lines_of_two_intervals_add_up(lines: Lines, clock: Clock) -> None:
    profiled = cache_profile(every=10)(clock.tick)
    for seconds in (6.0, 6.0, 6.0, 6.0, 1.0):
        profiled(seconds)

    written = lines.flushed("cache_profile")
    assert [line["calls"] for line in written] == [2, 2, 1]
    assert [line["distinct"] for line in written] == [1, 0, 1]
    assert [line["hits"] for line in written] == [1, 2, 0]


def test_a_due_line_flushes_all_that_are_due(lines: Lines, clock: Clock) -> None:
    rare, later = timeit(every=60)(abs), timeit(every=61)(abs)
    frequent = timeit(every=60)(clock.tick)
    rare(-1)
    later(-1)
    for _ in range(60):
        frequent(1.0)

    assert [line["calls"] for line in lines.of("timeit")] == [1, 60]


def test_what_is_left_is_logged_when_the_function_is_dropped(lines: Lines) -> None:
    timeit(every=60)(lambda: None)()

    assert [line["calls"] for line in lines.of("timeit")] == [1]


async def test_every_counts_all_calls_and_errors(kind: Func, lines: Lines) -> None:
    timed = timeit(every=60)(kind)
    for act in (int, fail, str, fail, list):
        with contextlib.suppress(Failure):
            await result_of(timed, act)

    (line,) = lines.flushed("timeit")
    assert (line["calls"], line["errors"]) == (5, 2)


def test_a_dropped_function_leaves_nothing_behind() -> None:
    logger = logging.Logger("unregistered")  # noqa: LOG001
    timeit(every=60, logger=logger)(function)()
    gone = weakref.ref(logger)
    del logger

    assert gone() is None


def test_no_call_of_many_threads_is_lost(lines: Lines) -> None:
    timed = timeit(every=3600)(function)

    def calls() -> None:
        for n in range(10_000):
            timed()

    run_in_threads(calls)

    (line,) = lines.flushed("timeit")
    assert line["calls"] == 40_000


@pytest.mark.parametrize("decorator", [timeit(every=3600), cache_profile(every=3600)])
def test_counting_takes_constant_memory(decorator: Func, no_gc: None) -> None:
    decorated = decorator(functools.partial(sum, range(100)))
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        decorated()

    assert sys.getallocatedblocks() - before < 5_000


def test_a_call_may_interrupt_counting(lines: Lines, monkeypatch: MonkeyPatch) -> None:
    # As a signal handler or a destructor may, which can come anywhere.
    class Interrupted(decorators.Times):
        def add(self, ns: int, calls: int = 1, errors: int = 0) -> None:
            while interruptions:
                interruptions.pop()()
            super().add(ns, calls, errors)

    monkeypatch.setattr(decorators, "Times", Interrupted)
    timed = timeit(every=3600)(function)
    interruptions = [decorators.flush, timed]
    timed()
    thread = threading.Thread(target=decorators.flush, daemon=True)
    thread.start()
    thread.join(10)

    assert not thread.is_alive()
    assert [line["calls"] for line in lines.flushed("timeit")] == [1, 1]


@needs_fork
@pytest.mark.parametrize("how", ["os.fork", "C", "fork", "forkserver", "spawn"])
def test_a_child_logs_its_own_calls_under_its_own_pid(how: str, tmp_path: Path) -> None:
    program = """
        import ctypes, multiprocessing

        @timeit(every=3600)
        @cache_profile
        def work(n):
            yield n

        def calls(count):
            for n in range(count):
                list(work(n))

        @profile
        def fork():
            return os.fork()

        if __name__ == "__main__":
            calls(2000)  # enough to be counted before the fork
            how = sys.argv[1]
            if how in ("os.fork", "C"):
                if how == "os.fork":
                    child = fork()
                elif (child := ctypes.PyDLL(None).fork()) == 0:  # as uWSGI does
                    ctypes.pythonapi.PyOS_AfterFork_Child()
                if child == 0:
                    calls(1)
                    sys.exit()
                os.wait()
            else:
                child = multiprocessing.get_context(how).Process(target=calls, args=[1])
                child.start()
                child.join()
            calls(3)
    """
    found = run_program(program, tmp_path, how)

    counts = [record for record in found if "calls" in record]
    assert sorted(record["calls"] for record in counts) == [1, 1, 2003, 2003]
    assert len({(record["pid"], record["calls"]) for record in counts}) == 2
    assert all(record.get("inside", 0) <= record["total"] for record in counts)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.uniform(0.001, 0.002),
        lambda rng: rng.lognormvariate(-9, 2),
        lambda rng: rng.gauss(0.001, 0.0001) + (rng.random() < 0.1),
        lambda rng: 0.25,
    ],
    ids=["uniform", "lognormal", "two-peaks", "one-value"],
)
@pytest.mark.parametrize("calls", [1, 2, 10, 1000])
def test_a_quantile_is_at_most_a_twentieth_off(
    draw: Func, calls: int, lines: Lines, clock: Clock
) -> None:
    rng = random.Random(calls)
    sample = sorted(round(draw(rng), 9) for _ in range(calls))
    timed = timeit(every=1e6)(clock.tick)
    for seconds in sample:
        timed(seconds)

    (line,) = lines.flushed("timeit")
    for percent in (50, 95, 99):
        true = sample[max(-int(-percent * calls // 100), 1) - 1]
        assert line[f"p{percent}"] == pytest.approx(true, rel=0.05)
    assert line["calls"] == calls
    assert line["total"] == pytest.approx(sum(sample))
    assert line["max"] == pytest.approx(sample[-1])


def test_a_histogram_of_many_buckets_fits_in_a_line(lines: Lines, clock: Clock) -> None:
    timed = timeit(every=1e15)(clock.tick)
    durations = [1e-7 * 1.02**n for n in range(1200) for _ in range(10)]
    for seconds in durations:
        timed(seconds)

    assert lines.flushed("timeit")[-1]["calls"] == len(durations)
    assert max(map(len, lines.messages)) <= MAX_LINE


# --- sampling -------------------------------------------------------------------------


SAMPLED = """
    import asyncio

    reports = []

    def spin():
        enough = len(reports) + 2
        while len(reports) < enough:
            pass

    class Reports(logging.Handler):
        def handle(self, record):
            if '"samples"' in record.getMessage():
                reports.append(record)

    def recurse(depth):
        return recurse(depth - 1) if depth else spin()

    def nest(depth):
        code = compile("nest(depth - 1)", f"{'x' * 99}{depth}.py", "exec")
        exec(code, globals(), {"depth": depth}) if depth else spin()

    def sleep():
        time.sleep(60)

    def wait():
        threading.Event().wait()

    async def inner():
        spin()

    async def outer():
        await inner()

    @timeit(every=0.05)
    def rare():
        pass

    if __name__ == "__main__":
        logging.getLogger().addHandler(Reports())
        start_sampling(every=0.1)
        start_sampling()
        assert [t.name for t in threading.enumerate()].count("sampling") == 1
        threading.Thread(target=sleep, daemon=True).start()
        threading.Thread(target=wait, daemon=True).start()
        rare()
        recurse(500)
        nest(50)
        asyncio.run(outer())
        if hasattr(os, "fork"):
            if os.fork() == 0:
                spin()
                sys.exit()
            os.wait()
        os._exit(0)
"""


@pytest.fixture(scope="module")
def sampled_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    run_program(SAMPLED, folder)
    return folder / "log"


@pytest.fixture
def sampled(sampled_log: Path, read: Read) -> Tables:
    return read(log=sampled_log.read_bytes())[1]


Stacks = list[list[str]]


@pytest.fixture
def sampled_stacks(sampled_log: Path) -> Stacks:
    """The names of the functions of each stack, the outermost first."""
    return [
        [record["frames"][n].split(" ")[0] for n in stack]
        for record in records(sampled_log)
        for _, _, *stack in record.get("stacks", [])
    ]


def test_samples_show_what_computes(sampled: Tables) -> None:
    rows = {row["frame"]: row for row in sampled["sampled_functions"]}

    assert next(iter(rows)) == "spin (program.py)"
    assert "Sampler.run (decorators.py)" not in rows
    assert rows["spin (program.py)"]["total_share"] > 0.3
    assert rows["<module> (program.py)"]["own_share"] < 0.1
    lines = {row["frame"] for row in sampled["sampled_lines"]}
    assert {"spin (program.py:11)", "spin (program.py:12)"} & lines


def test_samples_tell_threads_that_wait_from_those_that_run(sampled: Tables) -> None:
    rows = {row["frame"]: row for row in sampled["sampled_functions"]}

    names = ["wait (program.py)"]
    if sys.platform == "linux":
        names.append("sleep (program.py)")
    for name in names:
        assert rows[name]["waiting_share"] > 10 * rows[name]["total_share"]


def test_samples_show_coroutines_of_the_running_task(sampled_stacks: Stacks) -> None:
    assert ["outer", "inner", "spin"] in [stack[-3:] for stack in sampled_stacks]


def test_every_line_of_samples_is_shorter_than_4_kb(
    sampled_log: Path, sampled_stacks: Stacks
) -> None:
    lines = sampled_log.read_text().splitlines()

    assert max(map(len, lines)) <= 4096
    assert "x" * 99 in "".join(lines)
    assert 20 < max(map(len, sampled_stacks)) <= 80


def test_samples_say_what_they_cost(sampled: Tables) -> None:
    (row,) = sampled["sampling"]

    assert row["samples"] > 20
    assert row["seconds"] == pytest.approx(row["samples"] / 100)
    assert 0 < row["cpu"] < row["seconds"] / 2


@needs_fork
def test_a_forked_child_samples_itself(sampled_log: Path) -> None:
    pids = {record["pid"] for record in records(sampled_log) if "stacks" in record}

    assert len(pids) == 2


def test_sampling_logs_the_counts_of_rarely_called_functions(sampled: Tables) -> None:
    # The process was killed, without a line at exit.
    assert [row["name"] for row in sampled["functions"]] == ["program.rare"]


def test_a_report_has_300_stacks_and_counts_the_rest(tmp_path: Path) -> None:
    program = """
        class Reports(logging.Handler):
            def handle(self, record):
                at_end.set()

        at_end = threading.Event()
        for n in range(310):
            code = compile("at_end.wait()", f"{n}.py", "exec")
            threading.Thread(target=exec, args=[code, globals()], daemon=True).start()
        logging.getLogger().addHandler(Reports())
        start_sampling(every=0.05)
        at_end.wait()
    """
    costs, *found = run_program(program, tmp_path)

    report = itertools.takewhile(lambda record: "stacks" in record, found)
    assert len([stack for record in report for stack in record["stacks"]]) == 300
    assert costs["rest"] >= 10


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the defect is mended in 3.12")
@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_while_a_sample_is_taken(
    collecting: bool, tmp_path: Path
) -> None:
    # It could hang or crash the program (python/cpython#106883).
    program = f"""
        import gc

        def current_frames():
            seen.append(gc.isenabled())
            return original()

        seen, original = [], sys._current_frames
        sys._current_frames = current_frames
        if not {collecting}:
            gc.disable()
        start_sampling(interval=0.001)
        between = set()
        while len(seen) < 20:
            time.sleep(0.001)
            between.add(gc.isenabled())
        assert not any(seen)
        assert any(between) == {collecting}
    """
    run_program(program, tmp_path)


@needs_fork
def test_a_thread_that_holds_a_lock_of_the_handler_can_fork(tmp_path: Path) -> None:
    program = """
        class Handler(logging.Handler):
            def handle(self, record):
                at_work.set()
                with lock:
                    pass

        at_work, lock = threading.Event(), threading.Lock()
        logging.getLogger().handlers = [Handler()]
        with lock:
            start_sampling(every=0.05)
            at_work.wait()
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """
    run_program(program, tmp_path)


@needs_fork
def test_sampling_starts_in_a_child_when_all_counts_are_at_zero(tmp_path: Path) -> None:
    program = """
        start_sampling(interval=1e-6)
        decorated = [timeit(every=1e-6)(abs) for _ in range(1000)]
        for _ in range(10):
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """
    run_program(program, tmp_path)


def test_a_program_does_not_end_amid_the_lines_of_samples(tmp_path: Path) -> None:
    program = """
        class SlowHandler(logging.FileHandler):
            def handle(self, record):
                at_work.set()
                time.sleep(0.1)
                self.emit(record)

        at_work = threading.Event()
        logging.basicConfig(handlers=[SlowHandler("log")], level="INFO", force=True)
        start_sampling(every=0.05)
        at_work.wait()
    """
    found = run_program(program, tmp_path)

    assert [record for record in found if "stacks" in record]


# --- how lines are written ------------------------------------------------------------


def test_a_line_names_its_function_and_process(decorator: Func, lines: Lines) -> None:
    decorator(function)()
    decorators.flush()

    _, _, text = lines.messages[-1].partition(" ")
    assert list(json.loads(text).items())[:4] == [
        ("name", f"{__name__}.function"),
        ("file", __file__),
        ("line", inspect.getsourcelines(function)[1]),
        ("pid", os.getpid()),
    ]


def test_no_line_holds_an_argument(decorator: Func, lines: Lines) -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    with pytest.raises(ValueError, match="a secret"):
        decorator(refuse)("a secret")
    decorators.flush()

    assert lines.messages
    assert "secret" not in "".join(lines.messages)


def test_lines_go_to_the_logger_and_level_they_are_given(lines: Lines) -> None:
    other, handler = logging.getLogger("test.other"), Lines()
    other.addHandler(handler)
    other.setLevel(logging.DEBUG)

    timeit(logger=other, level="DEBUG")(function)()

    assert len(handler.of("timeit")) == 1
    assert not lines.messages


@pytest.mark.parametrize("name", ["a" * 9000, "é" * 9000, "\U0001f600" * 9000])
def test_a_line_is_short_and_ascii_whatever_the_name(
    decorator: Func, name: str, lines: Lines
) -> None:
    decorator(named(name, name))()
    decorators.flush()

    assert lines.messages
    for message in lines.messages:
        assert len(message) <= MAX_LINE and message.isascii()


@pytest.mark.parametrize("name", ["100%s", "{braces}", 'quo"ted', "back\\slash", "é\n"])
def test_odd_names_pass_through_the_log(name: str, lines: Lines, read: Read) -> None:
    timeit(named(name))()

    _, found, _ = read(*lines.messages)
    assert [row["name"] for row in found["functions"]] == [f"odd.{name}"]


def test_a_raising_filter_does_not_break_a_call(decorator: Func, lines: Lines) -> None:
    lines.addFilter(lambda record: fail())

    assert decorator(function)() == 0
    decorators.flush()


def test_a_handler_may_be_decorated_itself(
    decorator: Func, lines: Lines, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "emit", decorator(lines.emit))

    assert timeit(function)() == 0
    assert [line["name"] for line in lines.of("timeit")] == [f"{__name__}.function"]


def test_counts_that_are_due_while_a_line_is_logged_are_kept(
    lines: Lines, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "emit", timeit(every=1e-9)(lines.emit))
    for _ in range(5):
        timeit(function)()

    counts = [line.get("calls", 0) for line in lines.flushed("timeit")]
    assert sum(counts) >= 5


# --- the reader -----------------------------------------------------------------------


def log_line(kind: str, **fields: Any) -> str:
    head = {"name": "shop.pay", "file": "/srv/shop.py", "line": 3, "pid": 1}
    return f"{kind} {json.dumps(head | fields)}"


def timed_line(**fields: Any) -> str:
    return log_line("timeit", **{"seconds": 0.25, "cpu": 0.1, "raised": None} | fields)


def interval_line(**fields: Any) -> str:
    times = {"calls": 1, "errors": 0, "total": 1.0, "max": 1.0, "histogram": [200, 1]}
    return log_line("timeit", **times | fields)


def cache_line(**fields: Any) -> str:
    counts = {"maxsize": 16, "calls": 10, "unhashable": 1, "distinct": 4, "hits": 4}
    times = {"hits_unbounded": 5, "total": 2.0, "saved": 1.5}
    return log_line("cache_profile", **{"name": "shop.rate"} | counts | times | fields)


def skipped_line(reason: str, calls: int) -> str:
    return log_line("profile", skipped=reason, calls=calls)


def packed(*rows: Any) -> bytes:
    return zlib.compress(json.dumps(rows).encode())


HANDLE = ["/srv/shop.py", 1, "handle", 1, 1, 0.5, 0.5, []]


def profile_lines(data: bytes = packed(HANDLE), **fields: Any) -> list[str]:
    """A profile in three lines."""
    text = base64.b64encode(data).decode()
    size = -(-len(text) // 3)
    head = {"name": "shop.handle", "id": "0123456789ab", "seconds": 0.75, "parts": 3}
    return [
        log_line("profile", **head | {"part": n + 1, "data": part} | fields)
        for n in range(3)
        for part in [text[n * size : (n + 1) * size]]
    ]


def sampling_lines(*stacks: tuple[int, bool, str]) -> list[str]:
    """Stacks as (number, waiting, frames with "; " between them)."""
    frames = sorted({frame for _, _, stack in stacks for frame in stack.split("; ")})
    rows = [
        [n, int(waiting), *map(frames.index, stack.split("; "))]
        for n, waiting, stack in stacks
    ]
    costs = {"samples": 100, "missed": 1, "rest": 2, "seconds": 1.0, "cpu": 0.01}
    return [
        log_line("sampling", **costs),
        log_line("sampling", frames=frames, stacks=rows),
    ]


def test_the_json_has_the_keys_it_promises(read: Read) -> None:
    status, found, _ = read(
        timed_line(),
        cache_line(),
        skipped_line("another profiler was active", 1),
        *profile_lines(),
        *sampling_lines((1, False, "f (a.py:1)")),
    )

    assert status == 0
    place = {"name", "file", "line"}
    times = {"total", "mean", "p50", "p95", "p99", "max", "cpu_share", "inside_share"}
    hits = {"hits", "hits_unbounded", "hits_share", "hits_unbounded_share"}
    hits |= {"distinct", "unhashable"}
    shares = {"own_share", "total_share", "waiting_share", "frame"}
    assert {key: set(row) for key, (row,) in found.items()} == {
        "sampling": {"samples", "seconds", "missed", "cpu", "rest"},
        "sampled_functions": shares,
        "sampled_lines": shares,
        "functions": place | {"calls", "errors", "partly"} | times,
        "caches": place | hits | {"maxsize", "calls", "total", "saved"},
        "profiles": place | {"id", "seconds", "complete", "slowest"},
        "skipped": place | {"reason", "calls"},
    }


def test_calls_are_added_up_by_function_and_place(read: Read) -> None:
    _, found, _ = read(
        timed_line(seconds=0.25, cpu=0.25, slower_than=0.1),
        timed_line(seconds=0.75, cpu=0.25, raised="ValueError"),
        timed_line(line=7, seconds=0.25, cpu=0.26),
    )

    row, other = found["functions"]
    assert (row["line"], row["calls"], row["errors"]) == (3, 2, 1)
    assert (row["total"], row["mean"], row["max"]) == (1.0, 0.5, 0.75)
    assert row["cpu_share"] == 0.5
    assert row["p50"] == pytest.approx(0.25, rel=0.05)
    assert row["p95"] == pytest.approx(0.75, rel=0.05)
    # The clocks differ.
    assert (other["line"], other["cpu_share"]) == (7, 1.0)
    assert (row["partly"], other["partly"]) == (True, False)


def test_intervals_and_calls_add_up_alike(
    lines: Lines, clock: Clock, read: Read
) -> None:
    durations = [random.Random(n).lognormvariate(-3, 1) for n in range(500)]
    together, each = timeit(every=5)(clock.tick), timeit(clock.tick)
    for seconds in durations:
        together(seconds)
    decorators.flush()
    by_interval = lines.messages.copy()
    lines.messages.clear()
    for seconds in durations:
        each(seconds)

    assert 3 < len(by_interval) < 50
    (one,), (other,) = (
        read(*messages)[1]["functions"] for messages in (by_interval, lines.messages)
    )
    for row in (one, other):
        for key in ("name", "file", "cpu_share", "inside_share"):
            del row[key]
    assert one == pytest.approx(other, rel=1e-6)


def test_cache_lines_are_added_up_by_function_and_size(read: Read) -> None:
    _, found, _ = read(
        cache_line(), cache_line(), cache_line(maxsize=None), cache_line(name="b")
    )

    rows = {(row["name"], row["maxsize"]): row for row in found["caches"]}
    assert set(rows) == {("shop.rate", 16), ("shop.rate", None), ("b", 16)}
    row = rows["shop.rate", 16]
    assert (row["calls"], row["distinct"], row["total"], row["saved"]) == (20, 8, 4, 3)
    assert (row["hits_share"], row["hits_unbounded_share"]) == (0.4, 0.5)


def test_calls_that_were_not_profiled_are_something_found(read: Read) -> None:
    status, found, err = read(skipped_line("why", 2), skipped_line("why", 3))

    assert (status, err) == (0, "")
    (row,) = found["skipped"]
    assert (row["reason"], row["calls"]) == ("why", 5)


STACKS = [
    (30, False, "main (a.py:1); work (a.py:5)"),
    (20, False, "main (a.py:1); work (a.py:6)"),
    (10, False, "main (a.py:1); work (a.py:5); work (a.py:5)"),
    (90, True, "main (a.py:1); idle (b.py:3)"),
]


def test_stacks_are_written_for_flame_graphs(read: Read, tmp_path: Path) -> None:
    out = tmp_path / "collapsed"

    read(*sampling_lines(*STACKS) * 2, options=["--collapsed", out])
    assert sorted(out.read_text().splitlines()) == [
        "(waiting);main (a.py:1);idle (b.py:3) 180",
        "main (a.py:1);work (a.py:5) 60",
        "main (a.py:1);work (a.py:5);work (a.py:5) 20",
        "main (a.py:1);work (a.py:6) 40",
    ]


def in_json(line: str) -> str:
    return json.dumps({"log": line + "\n", "stream": "stdout"})


@pytest.mark.parametrize(
    "envelope",
    [
        "@",
        "2026-01-01 12:00:00,000 INFO MainThread @",
        "<13>1 2026-01-01T12:00:00Z host app 123 - - @",
        "Jan  1 12:00:00 host app[123]: INFO:decorators:@",
        "[{ odd } timeit { } profile] @",
        "@ request=4711",
        'shipper="x" msg=@ | {"more": 1}',
        "\x1b[32mINFO\x1b[0m @\x1b[0m",
        "\x1b[32m@\x1b[0m",
        "INFO\t@",
        "first line\n@",
        "é☃ @\r",
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_lines_are_found_whatever_surrounds_them(
    envelope: str, depth: int, read: Read
) -> None:
    lines = [timed_line(), cache_line(), *profile_lines()]
    lines = [envelope.replace("@", line) for line in lines]
    for _ in range(depth):
        lines = [in_json(line) for line in lines]

    status, found, err = read(*lines)

    assert (status, err) == (0, "")
    assert found["functions"][0]["calls"] == found["caches"][0]["calls"] / 10 == 1
    assert found["profiles"][0]["complete"]


def test_lines_of_other_origin_are_passed_over(read: Read) -> None:
    rng = random.Random(2)
    garbage = rng.randbytes(100_000) + b"\n" + b"x" * 300_000 + b"\n\0\xff\n"
    foreign = (
        b'timeit {"x": 1}\ntimeit {"name": "a"}\nuser_profile {"name": "a"}\n'
        b"profile {name}\ntimeit {}\n"
    )

    status, found, err = read(log=garbage + foreign + timed_line().encode())

    assert (status, err) == (0, "")
    assert len(found["functions"]) == 1


SAMPLES, FRAMES = sampling_lines((1, False, "f"))
DAMAGED_LINES: dict[str, str] = {
    "truncated": timed_line()[:70],
    "in-JSON-and-cut-off": in_json(timed_line())[:60],
    "text-for-a-number": timed_line(seconds="long"),
    "true-for-a-number": timed_line(seconds=True),
    "a-number-for-a-name": timed_line(name=7),
    "NaN": timed_line(seconds=float("nan")),
    "negative": timed_line(seconds=-1),
    "absurdly-large": timed_line(seconds=10**400),
    "more-digits-than-int()-takes": timed_line().replace("0.25", "9" * 5000),
    "nested-very-deep": 'timeit {"name": ' + "[" * 20_000,
    "text-for-the-last-number": interval_line(inside="long"),
    "calls-that-contradict-the-histogram": interval_line(calls=2),
    "a-bucket-of-text": interval_line(histogram=[200, 1, "a"]),
    "an-empty-histogram": interval_line(calls=0, histogram=[]),
    "a-bucket-beyond-all-time": interval_line(histogram=[8160, 1]),
    "cache-size-of-text": cache_line(maxsize="large"),
    "the-last-cache-count-of-text": cache_line(saved="much"),
    "part-of-text": profile_lines(part="1")[0],
    "a-part-of-too-many": profile_lines(parts=1)[2],
    "samples-of-text": SAMPLES.replace("100", '"many"'),
    "a-frame-that-is-missing": FRAMES.replace(", 0]", ", 9]"),
    "a-frame-from-the-end": FRAMES.replace(", 0]", ", -1]"),
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=[*DAMAGED_LINES])
def test_a_damaged_line_is_not_even_half_counted(line: str, read: Read) -> None:
    fine = [timed_line(), interval_line(), cache_line()]
    _, expected, _ = read(*fine)

    status, found, err = read(*fine, line)

    assert (status, err) == (0, "decorators.py: damaged lines left out: 1\n")
    for table in ("functions", "caches", "sampling", "sampled_lines"):
        assert found[table] == expected[table]
    _, alone, _ = read(line)
    assert alone["functions"] == alone["caches"] == []


def test_of_two_lines_that_ran_together_the_whole_one_counts(read: Read) -> None:
    _, found, err = read(timed_line()[:50] + timed_line(name="shop.other"))

    assert [row["name"] for row in found["functions"]] == ["shop.other"]
    assert "damaged lines left out: 1" in err


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_rotated_logs_can_be_read_in_any_order(
    order: list[int], tmp_path: Path, run_main: Main
) -> None:
    logs = [tmp_path / name for name in ("app.log", "app.log.1", "app.log.2.gz")]
    for log, part in zip(logs, profile_lines()):
        text = f"{timed_line()}\n{part}\n{cache_line()}\n".encode()
        log.write_bytes(gzip.compress(text) if log.suffix == ".gz" else text)

    status, out, _ = run_main(*[logs[n] for n in order], "--json")
    found = json.loads(out)
    assert status == 0
    assert found["functions"][0]["calls"] == 3
    assert found["caches"][0]["calls"] == 30
    assert found["profiles"][0]["complete"] is True


def test_profiles_are_sorted_by_seconds_and_limited_by_top(read: Read) -> None:
    lines = [
        line
        for seconds in (0.5, 2.0, 1.0)
        for line in profile_lines(id=f"{seconds}", seconds=seconds)
    ]

    _, found, _ = read(*lines, options=["--top", "2"])
    assert [row["seconds"] for row in found["profiles"]] == [2.0, 1.0]


def test_the_lines_of_two_profiles_may_be_mixed(read: Read) -> None:
    one, two = profile_lines(), profile_lines(name="shop.other", id="ba9876543210")
    mixed = [line for pair in zip(one, reversed(two)) for line in pair]

    _, found, err = read(*mixed)

    assert [row["complete"] for row in found["profiles"]] == [True, True]
    assert err == ""


def test_lines_of_a_profile_that_was_read_already_change_nothing(read: Read) -> None:
    status, found, err = read(*profile_lines(), *profile_lines(data=b"other"))

    assert (status, err) == (0, "")
    assert found["profiles"][0]["slowest"] == [["handle (shop.py:1)", 0.5]]


DAMAGED_PROFILES: dict[str, list[str]] = {
    "a-line-is-missing": profile_lines()[:-1],
    "data-changed": [line.replace('data": "', 'data": "A') for line in profile_lines()],
    "no-base64": [line.replace('data": "', 'data": "!') for line in profile_lines()],
    "not-packed": profile_lines(b"hello"),
    "no-JSON": profile_lines(zlib.compress(b"hello")),
    "no-table": profile_lines(packed(1, 2)),
    "rows-too-short": profile_lines(packed(["a", 1, "f", 1])),
    "time-is-text": profile_lines(packed(["a", 1, "f", 1, 1, "x", 0, []])),
    "cut-off": profile_lines(packed(HANDLE)[:-20]),
    "nested-very-deep": profile_lines(zlib.compress(b"[" * 100_000)),
    "unpacks-to-too-much": profile_lines(zlib.compress(b"[" + b" " * (1 << 24) + b"]")),
}


@pytest.mark.parametrize("damaged", DAMAGED_PROFILES.values(), ids=[*DAMAGED_PROFILES])
def test_a_damaged_profile_is_marked_and_not_written(
    damaged: list[str], read: Read, tmp_path: Path
) -> None:
    fine = profile_lines(name="shop.fine", id="ba9876543210")
    out = tmp_path / "out"
    status, found, _ = read(*damaged, *fine, options=["--pstats", out])

    assert status == 0
    complete = {row["name"]: row["complete"] for row in found["profiles"]}
    assert complete == {"shop.handle": False, "shop.fine": True}
    assert [*out.iterdir()] == [out / "shop.fine-ba9876543210.pstats"]


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "..", "a/b\\c", "nul\0l", "x" * 5000, "%s{}"]
)
def test_a_profile_stays_in_its_folder(name: str, read: Read, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"

    lines = profile_lines(name=name, id=f"../../{name}")
    status, _, _ = read(*lines, options=["--pstats", out])

    assert status == 0
    (file,) = out.iterdir()
    assert file.name.endswith(".pstats")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "app.log", tmp_path / "deep"]


def test_a_log_without_line_ends_is_read_in_pieces(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_bytes(bytes(1_000_000))

    pieces = list(decorators.read_log(str(log)))
    assert max(map(len, pieces)) < 100_000
    assert sum(map(len, pieces)) == 1_000_000


# --- tables ---------------------------------------------------------------------------


Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, run_main: Main) -> Show:
    """Write lines to a log and read it: what is printed for people."""

    def show(*lines: str, options: Iterable[object] = ()) -> str:
        log = tmp_path / "app.log"
        log.write_text("\n".join(lines))
        status, out, err = run_main(log, *options)
        assert (status, err) == (0, "")
        return out

    return show


def test_the_tables_round_and_align_the_figures(show: Show) -> None:
    lines = [
        timed_line(),
        timed_line(name="shop.ship", seconds=0.125, slower_than=0.1, inside=0.025),
        cache_line(),
        *(f"2026-11-21T21:19:18 INFO {line}" for line in profile_lines()),
        skipped_line("another profiler was active", 2),
    ]

    assert (
        show(*lines)
        == """\
== functions
calls   total    mean     p50     p95     max  errors    cpu  inside  function
    1  250 ms  250 ms  250 ms  250 ms  250 ms       0  40.0%       -  shop.pay (shop.py:3)
    1  125 ms  125 ms  125 ms  125 ms  125 ms       0  80.0%   20.0%  shop.ship (shop.py:3) *

* without the calls that were faster than slower_than=

== caches
calls  distinct  unhashable   hits  hits_unbounded  total  saved  maxsize  function
   10         4           1  40.0%           50.0%    2 s  1.5 s       16  shop.rate (shop.py:3)

== profiles
          id                 time  seconds  function
0123456789ab  2026-11-21T21:19:18   750 ms  shop.handle (shop.py:3): 500 ms handle (shop.py:1)

== skipped
calls                       reason  function
    2  another profiler was active  shop.pay (shop.py:3)
"""
    )


def test_samples_are_added_up_by_function_and_by_line(show: Show) -> None:
    assert (
        show(*sampling_lines(*STACKS))
        == """\
100 samples in 1 s, 1 missed, 2 rare stacks left out; they took 1.00% of a processor

== sampled functions
  own  total  waiting  frame
60.0%  60.0%     0.0%  work (a.py)
 0.0%  60.0%    90.0%  main (a.py)
 0.0%   0.0%    90.0%  idle (b.py)

== sampled lines
  own  total  waiting  frame
40.0%  40.0%     0.0%  work (a.py:5)
20.0%  20.0%     0.0%  work (a.py:6)
 0.0%  60.0%    90.0%  main (a.py:1)
 0.0%   0.0%    90.0%  idle (b.py:3)
"""
    )


@pytest.mark.parametrize(
    ("sort", "functions", "caches", "sampled"),
    [
        ("", "abc", "ab", "wmi"),
        ("total", "abc", "ba", "mwi"),
        ("waiting", "abc", "ab", "miw"),
        ("mean", "cab", "ab", "wmi"),
        ("calls", "bac", "ba", "wmi"),
        ("saved", "abc", "ab", "wmi"),
    ],
)
def test_rows_are_sorted_by_a_column_if_their_table_has_it(
    sort: str, functions: str, caches: str, sampled: str, read: Read
) -> None:
    lines = [timed_line(name="b", seconds=1.0)] * 3
    lines += [timed_line(name="a", seconds=2.0)] * 2
    lines += [timed_line(name="c", seconds=2.5), cache_line(name="a")]
    lines += [cache_line(name="b", calls=20, total=9.0, saved=1.0)]
    lines += sampling_lines(*STACKS, (1, False, "main (a.py:1)"))

    _, found, _ = read(*lines, options=["--sort", sort] if sort else [])
    assert "".join(row["name"] for row in found["functions"]) == functions
    assert "".join(row["name"] for row in found["caches"]) == caches
    assert "".join(row["frame"][0] for row in found["sampled_functions"]) == sampled


def test_a_table_has_20_rows_and_the_json_all(show: Show, read: Read) -> None:
    lines = [timed_line(name=f"shop.f{n}") for n in range(30)]

    assert show(*lines).count("shop.f") == 20
    assert show(*lines, options=["--top", 3]).count("shop.f") == 3
    assert len(read(*lines)[1]["functions"]) == 30


def test_a_name_cannot_control_the_terminal(show: Show, tmp_path: Path) -> None:
    name, collapsed = "\x1b[2Jevil\r\n", tmp_path / "collapsed"
    lines = [timed_line(name=name), profile_lines(name=name)[0]]
    lines += sampling_lines((1, False, f"{name} (a.py:1)"))

    shown = show(*lines, options=["--collapsed", collapsed])
    assert shown.count("?[2Jevil??") == 4
    assert "\x1b" not in shown
    assert collapsed.read_text() == "?[2Jevil?? (a.py:1) 1\n"


# --- the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["--demo", "app.log"], ["x", "--sort", "name"], ["x", "--top", "0"], ["--no"]],
)
def test_bad_arguments_give_exit_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)

    assert exit_.value.code == 2


def test_a_log_with_nothing_of_ours_gives_exit_status_1(read: Read) -> None:
    status, found, err = read("just", "some", "lines")

    assert (status, any(found.values())) == (1, False)
    assert "no lines from timeit, cache_profile, profile or sampling found" in err


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with one line."""
    path = tmp_path / "app.log"
    path.write_text(timed_line(name="shop.fine"))
    return path


PACKED = gzip.compress(timed_line().encode() * 1000)
UNREADABLE: dict[str, bytes] = {
    "cut-off.gz": PACKED[:-20],
    "changed.gz": PACKED[:200] + b"\xff" * 50 + PACKED[250:],
    "header-only.gz": b"\x1f\x8b\x08\0",
    "folder": b"",
    "missing": b"",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_log_gives_exit_status_2_and_others_are_read(
    name: str, log: Path, run_main: Main
) -> None:
    unreadable = log.parent / name
    if content := UNREADABLE[name]:
        unreadable.write_bytes(content)
    elif name == "folder":
        unreadable.mkdir()

    status, out, err = run_main(unreadable, log, "--json")
    assert status == 2
    assert "shop.fine" in [row["name"] for row in json.loads(out)["functions"]]
    assert err.startswith(f"decorators.py: {unreadable}: ")
    assert run_main(unreadable)[0] == 2
    assert len(err.splitlines()) <= 2


def test_an_unwritable_folder_gives_exit_status_2(log: Path, run_main: Main) -> None:
    status, _, err = run_main(log, "--pstats", log)

    assert (status, err) == (2, f"decorators.py: [Errno 17] File exists: '{log}'\n")


def test_a_reader_of_the_output_may_leave_early(log: Path, run_main: Main) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert run_main(log) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_gives_exit_status_2(log: Path, run_main: Main) -> None:
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        status, _, err = run_main(log)

    assert (status, err) == (2, "decorators.py: [Errno 28] No space left on device\n")


def test_names_that_the_terminal_cannot_show_are_escaped(show: Show) -> None:
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, "ascii")):
        show(timed_line(name="shop.größe"))
        assert rb"shop.gr\xf6\xdfe" in written.getvalue()


def test_an_interrupt_gives_exit_status_130(monkeypatch: MonkeyPatch) -> None:
    def interrupted(path: str) -> Iterator[bytes]:
        raise KeyboardInterrupt

    monkeypatch.setattr(decorators, "read_log", interrupted)

    assert main(["app.log"]) == 130


def test_the_demo_reports_every_call_of_a_program(
    tmp_path: Path, monkeypatch: MonkeyPatch, run_main: Main
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    status, out, err = run_main("--demo", "--json")
    (folder,) = tmp_path.iterdir()
    assert (status, str(folder / "shop.log") in err) == (0, True)
    found = json.loads(out)
    calls = {row["name"]: row["calls"] for row in found["functions"]}
    assert calls.pop("shop.ship") >= 3  # those that took 30 ms
    assert calls == {"shop.exchange_rate": 60, "shop.tax": 183_000}
    (cache,) = found["caches"]
    assert (cache["calls"], cache["distinct"], cache["hits"]) == (60, 3, 57)
    profiles = {(row["name"], row["complete"]) for row in found["profiles"]}
    assert profiles == {("shop.handle", True)}
    assert "main (shop.py)" in [row["frame"] for row in found["sampled_functions"]]


def test_the_script_needs_only_the_standard_library(tmp_path: Path) -> None:
    # Alone in a folder, with no site-packages.
    alone = shutil.copy(SCRIPT, tmp_path / "decorators.py")
    command = [sys.executable, "-I", "-S", "-W", "error", alone, "-"]
    log = gzip.compress(timed_line().encode())

    done = subprocess.run(command, input=log, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"shop.pay" in done.stdout
