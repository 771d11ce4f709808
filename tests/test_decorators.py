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
import json
import logging
import marshal
import os
import pstats
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import weakref
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import decorators
from decorators import cache_profile, main, profile, start_sampling, timeit

SCRIPT = Path(decorators.__file__)


class Lines(logging.Handler):
    """Keeps what was logged, as the reader would see it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def of(self, kind: str) -> list[dict[str, Any]]:
        heads = [message.split(" ", 1) for message in self.messages]
        return [json.loads(text) for name, text in heads if name == kind]


@contextlib.contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send the lines of the decorators' own logger to a handler."""
    decorators.flush()  # what functions of earlier tests have counted
    decorators.logger.addHandler(handler)
    decorators.logger.setLevel(logging.INFO)
    yield
    decorators.logger.removeHandler(handler)
    decorators.logger.setLevel(logging.NOTSET)


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The lines of the decorators' own logger."""
    handler = Lines()
    with logging_to(handler):
        yield handler


class Clock:
    """A clock that is set forward by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return round(self.now * 1e9)

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(decorators, "perf_counter_ns", clock)
    return clock


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(decorators, "thread_time_ns", clock)
    return clock


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Whatever is in a reference cycle stays alive."""
    gc.disable()
    yield
    gc.enable()


Decorator = Callable[..., Any]
DECORATORS: dict[str, Decorator] = {
    "timeit": timeit,
    "timeit(every=)": timeit(every=60),
    "cache_profile": cache_profile(),
    "profile": profile(),
}
every_decorator = pytest.mark.parametrize(
    "decorator", DECORATORS.values(), ids=DECORATORS.keys()
)


# --- transparency ---------------------------------------------------------------------


def function(a: int, *, b: str = "b") -> str:
    """A docstring."""
    return f"{a}{b}"


async def coroutine(a: int, *, b: str = "b") -> str:
    """A docstring."""
    await asyncio.sleep(0)
    return f"{a}{b}"


def generator(a: int, *, b: str = "b") -> Generator[str, None, str]:
    """A docstring."""
    yield f"{a}"
    return b


async def async_generator(a: int, *, b: str = "b") -> AsyncGenerator[str, None]:
    """A docstring."""
    yield f"{a}"
    await asyncio.sleep(0)
    yield b


KINDS: list[Callable[..., Any]] = [function, coroutine, generator, async_generator]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


async def result_of(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives in the end, of whatever kind the function is."""
    result = func(*args, **kwargs)
    if inspect.isawaitable(result):
        return await result
    if inspect.isgenerator(result):
        items = []
        while True:
            try:
                items.append(next(result))
            except StopIteration as stop:
                return [*items, stop.value]
    if inspect.isasyncgen(result):
        return [item async for item in result]
    return result


@every_decorator
@every_kind
@pytest.mark.anyio
async def test_a_decorated_call_gives_what_the_bare_call_gives(
    decorator: Decorator, kind: Callable[..., Any], lines: Lines
) -> None:
    bare = await result_of(kind, 1, b="x")

    assert await result_of(decorator(kind), 1, b="x") == bare


@every_decorator
@every_kind
def test_a_decorated_function_looks_like_the_bare_one(
    decorator: Decorator, kind: Callable[..., Any]
) -> None:
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


@every_decorator
def test_methods_of_all_kinds_are_bound_as_usual(decorator: Decorator) -> None:
    class Shop:
        @decorator
        def method(self) -> Any:
            return self

        @classmethod
        @decorator
        def class_inside(cls) -> Any:
            return cls

        @decorator
        @classmethod
        def class_outside(cls) -> Any:
            return cls

        @staticmethod
        @decorator
        def static_inside(value: int) -> int:
            return value

        @decorator
        @staticmethod
        def static_outside(value: int) -> int:
            return value

    class Branch(Shop):
        pass

    branch = Branch()
    assert branch.method() is branch
    assert branch.class_inside() is Branch.class_inside() is Branch
    assert branch.class_outside() is Branch.class_outside() is Branch
    assert branch.static_inside(7) == Branch.static_inside(7) == 7
    assert branch.static_outside(7) == Branch.static_outside(7) == 7


@every_decorator
@pytest.mark.parametrize("target", [int, property(lambda self: 1), 7, "name"])
def test_what_is_not_a_function_is_refused_at_once(
    decorator: Decorator, target: Any
) -> None:
    with pytest.raises(TypeError, match="decorate functions and methods"):
        decorator(target)


@every_decorator
def test_callables_without_a_name_or_code_are_decorated_too(
    decorator: Decorator, lines: Lines
) -> None:
    class Callable_:
        def __call__(self, value: int) -> int:
            return -value

    assert decorator(len)([1, 2]) == 2
    assert decorator(str.upper)("a") == "A"
    assert decorator(functools.partial(pow, 2))(5) == 32
    assert list(decorator(functools.partial(generator, 7))()) == ["7"]
    assert decorator(Callable_())(5) == -5


class Failure(Exception):
    pass


def fail_function(error: BaseException) -> None:
    raise error


async def fail_coroutine(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


def fail_generator(error: BaseException) -> Generator[int, None, None]:
    yield 1
    raise error


async def fail_async_generator(error: BaseException) -> AsyncGenerator[int, None]:
    yield 1
    raise error


@every_decorator
@pytest.mark.parametrize(
    "failing", [fail_function, fail_coroutine, fail_generator, fail_async_generator]
)
@pytest.mark.anyio
async def test_an_exception_arrives_as_it_was_raised(
    decorator: Decorator, failing: Callable[..., Any], lines: Lines
) -> None:
    error = Failure()

    with pytest.raises(Failure) as caught:
        await result_of(decorator(failing), error)

    assert caught.value is error
    assert error.__context__ is error.__cause__ is None


@every_decorator
@pytest.mark.anyio
async def test_cancellation_arrives_inside_and_comes_out(
    decorator: Decorator, lines: Lines
) -> None:
    cleaned_up = []

    @decorator
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(True)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned_up == [True]


def recording() -> Generator[Any, Any, Any]:
    """Records what is sent and thrown."""
    events: list[Any] = []
    try:
        events.append((yield "first"))
        events.append((yield list(events)))
    except Failure:
        events.append("a failure")
        try:
            yield list(events)
        except GeneratorExit:
            events.append("closed")
            raise
        raise KeyError(1) from None
    finally:
        events.append("finally")
        EVENTS.extend(events)
    return ["returned", *events]


def delegating() -> Generator[Any, Any, Any]:
    result = yield from recording()
    yield result
    raise RuntimeError("after all")


EVENTS: list[Any] = []
Step = tuple[str, Any]
STEP_SEQUENCES: list[list[Step]] = [
    [("send", None), ("send", 1), ("send", 2), ("send", 3)],
    [("send", None), ("throw", Failure()), ("send", 1)],
    [("send", None), ("throw", Failure()), ("close", None), ("send", None)],
    [("send", None), ("throw", ValueError()), ("send", None)],
    [("send", None), ("close", None), ("send", None)],
    [("send", None), ("throw", GeneratorExit()), ("send", None)],
    [("close", None), ("send", None)],
    [("throw", Failure())],
    [("send", 1)],
]


def run_steps(steps_of: Generator[Any, Any, Any], steps: list[Step]) -> list[Any]:
    """The result of each step, exceptions and their contexts included."""
    EVENTS.clear()
    results: list[Any] = []
    for verb, value in steps:
        try:
            method = getattr(steps_of, verb)
            results.append(method() if verb == "close" else method(value))
        except BaseException as error:  # noqa: BLE001
            context = error.__context__
            results.append((type(error), str(error), type(context)))
    return [*results, *EVENTS]


@every_decorator
@pytest.mark.parametrize("steps", STEP_SEQUENCES)
@pytest.mark.parametrize("func", [recording, delegating])
def test_a_decorated_generator_responds_like_the_bare_one(
    decorator: Decorator, steps: list[Step], func: Callable[..., Any], lines: Lines
) -> None:
    assert run_steps(decorator(func)(), steps) == run_steps(func(), steps)


async def async_recording() -> AsyncGenerator[Any, Any]:
    """Records what is sent and thrown."""
    events: list[Any] = []
    try:
        events.append((yield "first"))
        await asyncio.sleep(0)
        events.append((yield list(events)))
    except Failure:
        events.append("a failure")
        yield list(events)
        raise KeyError(1) from None
    finally:
        await asyncio.sleep(0)
        events.append("finally")
        EVENTS.extend(events)


async def async_run_steps(steps_of: Any, steps: list[Step]) -> list[Any]:
    EVENTS.clear()
    results: list[Any] = []
    for verb, value in steps:
        try:
            method = getattr(steps_of, "a" + verb)
            results.append(await (method() if verb == "close" else method(value)))
        except BaseException as error:  # noqa: BLE001
            context = error.__context__
            results.append((type(error), str(error), type(context)))
    return [*results, *EVENTS]


@every_decorator
@pytest.mark.parametrize("steps", STEP_SEQUENCES)
@pytest.mark.anyio
async def test_a_decorated_asynchronous_generator_responds_like_the_bare_one(
    decorator: Decorator, steps: list[Step], lines: Lines
) -> None:
    bare = await async_run_steps(async_recording(), steps)

    assert await async_run_steps(decorator(async_recording)(), steps) == bare


@every_decorator
def test_a_coroutine_made_by_types_coroutine_can_still_be_awaited(
    decorator: Decorator, lines: Lines
) -> None:
    import types

    @decorator
    @types.coroutine
    def old_style() -> Generator[None, None, int]:
        yield
        return 7

    async def program() -> Any:
        return await old_style()

    assert asyncio.run(program()) == 7


@every_decorator
def test_an_exception_thrown_into_a_generator_is_not_kept_alive(
    decorator: Decorator, lines: Lines, no_gc: None
) -> None:
    def throw_and_catch() -> "weakref.ref[Failure]":
        steps = decorator(generator)(1)
        next(steps)
        try:
            steps.throw(Failure())
        except Failure as error:
            gone = weakref.ref(error)
        return gone

    assert throw_and_catch()() is None


@every_decorator
@pytest.mark.anyio
async def test_nor_is_one_thrown_into_an_asynchronous_generator(
    decorator: Decorator, lines: Lines, no_gc: None
) -> None:
    async def throw_and_catch() -> "weakref.ref[Failure]":
        steps = decorator(fail_async_generator)(ValueError())
        await anext(steps)
        try:
            await steps.athrow(Failure())
        except Failure as error:
            gone = weakref.ref(error)
        return gone

    assert (await throw_and_catch())() is None


class Argument:
    """Fails at whatever a careless decorator could do with it."""

    def __init__(self, value: str = "") -> None:
        self.value = value

    def __hash__(self) -> int:
        raise Failure

    def __eq__(self, other: object) -> bool:
        raise Failure

    def __repr__(self) -> str:
        raise Failure


@every_decorator
@pytest.mark.parametrize(
    "argument", [Argument(), [], {}], ids=["nasty", "list", "dict"]
)
def test_an_argument_without_a_hash_is_passed_on(
    decorator: Decorator, argument: Any, lines: Lines
) -> None:
    assert decorator(id)(argument) == id(argument)


@every_decorator
@pytest.mark.parametrize("kind", ["handler", "filter"])
def test_a_raising_handler_or_filter_does_not_break_a_call(
    decorator: Decorator, kind: str
) -> None:
    def raising(record: logging.LogRecord) -> bool:
        raise Failure

    handler = Lines()
    if kind == "handler":
        handler.handle = raising  # type: ignore[method-assign]
    else:
        handler.addFilter(raising)
    with logging_to(handler):
        assert decorator(function)(1) == "1b"
        decorators.flush()


@every_decorator
def test_a_handler_may_be_decorated_itself(decorator: Decorator) -> None:
    class Decorated(Lines):
        emit = decorator(Lines.emit)

    handler = Decorated()
    with logging_to(handler):
        assert timeit(function)(1) == "1b"
    # Beside it there may be lines of functions of earlier tests.
    names = [line["name"] for line in handler.of("timeit")]
    assert names.count("test_decorators.function") == 1


@every_decorator
def test_an_argument_is_released_after_the_call(
    decorator: Decorator, lines: Lines
) -> None:
    class Big:
        pass

    decorated, big = decorator(lambda argument: None), Big()
    decorated(big)
    gone = weakref.ref(big)
    del big
    gc.collect()

    assert gone() is None


class Chunk:
    pass


async def chunks(count: int) -> AsyncGenerator[Chunk, None]:
    for _ in range(count):
        yield Chunk()


@every_decorator
def test_a_generator_releases_an_item_when_its_caller_does(
    decorator: Decorator, lines: Lines
) -> None:
    @decorator
    def chunks() -> Iterator[Chunk]:
        while True:
            yield Chunk()

    steps = chunks()
    gone = weakref.ref(next(steps))

    assert gone() is None


@every_decorator
@pytest.mark.anyio
async def test_so_does_an_asynchronous_generator(
    decorator: Decorator, lines: Lines
) -> None:
    steps = decorator(chunks)(2)
    gone = weakref.ref(await anext(steps))

    assert gone() is None
    await steps.aclose()


@every_decorator
@pytest.mark.anyio
async def test_a_failed_future_is_in_no_reference_cycle(
    decorator: Decorator, lines: Lines, no_gc: None
) -> None:
    @decorator
    async def wait(futures: list["asyncio.Future[None]"]) -> None:
        await futures.pop()

    def fail(future: "asyncio.Future[None]") -> "weakref.ref[Failure]":
        error = Failure()
        future.set_exception(error)
        return weakref.ref(error)

    async def program() -> "weakref.ref[Failure]":
        futures = [asyncio.get_running_loop().create_future()]
        tasks = [asyncio.create_task(wait(futures))]
        gone = fail(futures[0])
        with contextlib.suppress(Failure):
            await tasks.pop()
        await asyncio.sleep(0)  # until the event loop has forgotten it, too
        return gone

    assert (await program())() is None


@every_decorator
def test_no_line_holds_an_argument(decorator: Decorator, lines: Lines) -> None:
    decorator(function)(4711, b="a secret")
    decorators.flush()

    assert lines.messages
    assert not [line for line in lines.messages if "4711b" in line or "secret" in line]


@every_decorator
def test_the_methods_of_an_lru_cache_below_stay(
    decorator: Decorator, lines: Lines
) -> None:
    decorated = decorator(functools.lru_cache(abs))

    decorated(-1)
    assert decorated.cache_info().currsize == 1
    decorated.cache_clear()
    assert decorated.cache_info().currsize == 0


@every_decorator
def test_a_hash_that_calls_a_decorated_method_terminates(
    decorator: Decorator, lines: Lines
) -> None:
    class Money:
        @decorator
        def key(self) -> int:
            return 7

        def __hash__(self) -> int:
            return hash(self.key())

    assert Money().key() == 7
    assert {Money(): "seven"}


@every_decorator
def test_recursion_and_threads_do_not_disturb_each_other(
    decorator: Decorator, lines: Lines
) -> None:
    @decorator
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fibonacci(10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [55] * 4


def sampling(**options: Any) -> Callable[..., None]:
    return lambda _: start_sampling(**options)


@pytest.mark.parametrize(
    ("decorator", "options"),
    [
        (timeit, {"slower_than": -1}),
        (timeit, {"slower_than": float("nan")}),
        (timeit, {"slower_than": 1, "every": 60}),
        (timeit, {"every": 0}),
        (timeit, {"every": float("nan")}),
        (cache_profile, {"every": -1}),
        (profile, {"slower_than": -1}),
        (profile, {"every": -1}),
        (timeit, {"level": "LOUD"}),
        (sampling, {"interval": 0}),
        (sampling, {"every": -1}),
    ],
)
def test_invalid_options_raise_at_once(
    decorator: Decorator, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="=|LOUD"):
        decorator(**options)(function)


def test_decorators_are_switched_off_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decorators, "OFF", True)

    assert timeit(function) is function
    assert profile(slower_than=1)(function) is function
    start_sampling()
    assert "sampling" not in [thread.name for thread in threading.enumerate()]


# --- what every line says -------------------------------------------------------------


@every_decorator
def test_every_line_says_which_function_where_and_which_process(
    decorator: Decorator, lines: Lines
) -> None:
    decorator(function)(1)
    decorators.flush()

    written = [line for kind in KIND_NAMES for line in lines.of(kind)]
    line = inspect.getsourcelines(function)[1]
    assert written
    for record in written:
        assert list(record)[:4] == ["name", "file", "line", "pid"]
        assert record["name"] == f"{__name__}.function"
        assert record["file"] == __file__
        assert record["line"] == line
        assert record["pid"] == os.getpid()


KIND_NAMES = ("timeit", "cache_profile", "profile", "sampling")


def test_lines_go_to_the_logger_and_level_they_are_given(lines: Lines) -> None:
    other, handler = logging.getLogger("test.other"), Lines()
    other.addHandler(handler)
    other.setLevel(logging.DEBUG)

    timeit(logger=other, level="DEBUG")(function)(1)

    assert len(handler.of("timeit")) == 1
    assert not lines.messages


def named(name: str, file: str = "odd.py") -> Callable[..., Any]:
    """A function of that name in that file."""
    scope: dict[str, Any] = {"__name__": "odd"}
    exec(compile("def function(): return 1", file, "exec"), scope)  # noqa: S102
    scope["function"].__qualname__ = name
    result: Callable[..., Any] = scope["function"]
    return result


@pytest.mark.parametrize("name", ["a" * 9000, "é" * 9000, "\U0001f600" * 9000])
@every_decorator
def test_a_line_is_ascii_and_shorter_than_4_kb_whatever_the_name(
    decorator: Decorator, name: str, lines: Lines
) -> None:
    decorator(named(name, name))()
    decorators.flush()

    for message in lines.messages:
        assert len(message) <= decorators.MAX_LINE_LENGTH and message.isascii()


@pytest.mark.parametrize("name", ["100%s", "{braces}", 'quo"ted', "back\\slash", "é\n"])
def test_odd_names_survive_the_way_through_the_log(
    name: str,
    lines: Lines,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timeit(named(name))()
    (tmp_path / "log").write_text("\n".join(lines.messages))

    assert main([str(tmp_path / "log"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["functions"]
    assert row["name"] == f"odd.{name}"


# --- timeit ---------------------------------------------------------------------------


def test_timeit_separates_waiting_from_computing(
    lines: Lines, clock: Clock, cpu: Clock
) -> None:
    @timeit
    def work() -> None:
        clock.tick(2.0)
        cpu.tick(0.5)

    work()

    (line,) = lines.of("timeit")
    assert (line["seconds"], line["cpu"], line["raised"]) == (2.0, 0.5, None)


def test_timeit_names_the_exception(lines: Lines) -> None:
    with pytest.raises(Failure):
        timeit(fail_function)(Failure())

    assert lines.of("timeit")[0]["raised"] == "Failure"


@pytest.mark.parametrize(
    ("kind", "waited", "inside"),
    [("coroutine", 7, 3), ("generator", 3, 3), ("async_generator", 11, 3)],
)
@pytest.mark.parametrize("options", [{}, {"every": 60}])
@pytest.mark.anyio
async def test_timeit_separates_the_wait_of_the_caller_from_the_time_inside(
    kind: str,
    waited: float,
    inside: float,
    options: dict[str, Any],
    lines: Lines,
    clock: Clock,
) -> None:
    async def other_task() -> None:
        clock.tick(4.0)

    async def pause() -> None:
        task = asyncio.create_task(other_task())
        await asyncio.sleep(0)
        await task

    @timeit(**options)
    async def coroutine() -> None:
        clock.tick(1.0)
        await pause()
        clock.tick(2.0)

    @timeit(**options)
    def generator() -> Generator[int, None, None]:
        for n in (1, 2):
            clock.tick(n)
            yield n

    @timeit(**options)
    async def async_generator() -> AsyncGenerator[int, None]:
        for n in (1, 2):
            clock.tick(n)
            await pause()
            yield n

    if kind == "coroutine":
        await coroutine()
    elif kind == "generator":
        for _ in generator():
            clock.tick(10.0)
    else:
        async for _ in async_generator():
            clock.tick(10.0)
    decorators.flush()

    line = next(line for line in lines.of("timeit") if kind in line["name"])
    assert line["total" if options else "seconds"] == waited
    assert line["inside"] == inside


@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.anyio
async def test_slower_than_leaves_out_the_faster_calls_and_says_so(
    kind: str, lines: Lines, clock: Clock
) -> None:
    async def coroutine(seconds: float) -> None:
        clock.tick(seconds)

    timed = timeit(slower_than=0.1)(clock.tick if kind == "function" else coroutine)
    for seconds in (0.05, 0.125, 0.0625, 0.5):
        await result_of(timed, seconds)

    assert [line["seconds"] for line in lines.of("timeit")] == [0.125, 0.5]
    assert {line["slower_than"] for line in lines.of("timeit")} == {0.1}


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_generator_that_is_not_read_to_its_end_has_not_failed(
    end: str, lines: Lines
) -> None:
    steps = timeit(generator)(1)
    next(steps)
    if end == "close":
        steps.close()
    del steps
    gc.collect()

    assert [line["raised"] for line in lines.of("timeit")] == [None]


def test_while_its_logger_is_disabled_timeit_reads_no_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    for name in ("perf_counter_ns", "thread_time_ns"):
        monkeypatch.setattr(decorators, name, functools.partial(read.append, name))
    quiet = logging.getLogger("test.quiet")
    quiet.setLevel(logging.ERROR)

    assert timeit(logger=quiet)(function)(1) == "1b"
    assert read == []


def test_every_logs_one_line_an_interval(lines: Lines, clock: Clock) -> None:
    timed = timeit(every=60)(clock.tick)
    for _ in range(130):
        timed(1.0)

    assert [line["calls"] for line in lines.of("timeit")] == [60, 60]
    decorators.flush()
    assert [line["calls"] for line in lines.of("timeit")] == [60, 60, 10]


def test_every_logs_what_is_left_when_the_function_is_dropped(lines: Lines) -> None:
    timeit(every=60)(lambda: None)()
    gc.collect()

    assert [line["calls"] for line in lines.of("timeit")] == [1]


def test_a_line_that_is_due_flushes_all_others_that_are_due(
    lines: Lines, clock: Clock
) -> None:
    rare, frequent = timeit(every=60)(abs), timeit(every=60)(clock.tick)
    rare(-1)
    for _ in range(60):
        frequent(1.0)

    assert [line["calls"] for line in lines.of("timeit")] == [1, 60]


@pytest.mark.anyio
async def test_every_counts_all_kinds_of_calls(lines: Lines, clock: Clock) -> None:
    decorated = [timeit(every=60)(kind) for kind in KINDS]
    for one in decorated:
        await result_of(one, 1)
        await result_of(one, 2)
    decorators.flush()

    calls = {line["name"].split(".")[1]: line["calls"] for line in lines.of("timeit")}
    assert calls == dict.fromkeys([kind.__name__ for kind in KINDS], 2)


def test_every_counts_failed_calls(lines: Lines) -> None:
    @timeit(every=60)
    def work(error: Exception | None) -> None:
        if error:
            raise error

    for error in (None, Failure(), None, ValueError()):
        try:
            work(error)
        except (Failure, ValueError):
            pass
    decorators.flush()

    (line,) = lines.of("timeit")
    assert (line["calls"], line["errors"]) == (4, 2)


def test_every_loses_no_call_of_many_threads(lines: Lines) -> None:
    @timeit(every=3600)
    def work(n: int) -> None:
        pass

    def calls() -> None:
        for n in range(10_000):
            work(n)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decorators.flush()

    (line,) = lines.of("timeit")
    assert line["calls"] == 40_000


def test_counting_that_is_interrupted_by_a_call_does_not_wait_for_itself(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a signal handler or a destructor may, which can come anywhere.
    timed = timeit(every=3600)(abs)

    class Interrupted(decorators.Times):
        def add(self, ns: int, calls: int = 1, errors: int = 0) -> None:
            timed(-2)
            decorators.flush()
            super().add(ns, calls, errors)

    monkeypatch.setattr(decorators, "Times", Interrupted)
    timed = timeit(every=3600)(abs)
    timed(-1)
    thread = threading.Thread(target=decorators.flush, daemon=True)
    thread.start()
    thread.join(10)

    assert not thread.is_alive()
    assert lines.of("timeit")[0]["calls"] == 1


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda rng: rng.uniform(0.001, 0.002),
    "lognormal": lambda rng: rng.lognormvariate(-9, 2),
    "two peaks": lambda rng: rng.gauss(0.001, 0.0001) + (rng.random() < 0.1),
    "one value": lambda rng: 0.25,
}


@pytest.mark.parametrize(
    "draw",
    DISTRIBUTIONS.values(),
    ids=[name.replace(" ", "-") for name in DISTRIBUTIONS],
)
@pytest.mark.parametrize("calls", [1, 2, 10, 1000])
def test_a_quantile_is_no_more_than_a_twentieth_off(
    draw: Callable[[random.Random], float], calls: int
) -> None:
    rng = random.Random(calls)
    sample = sorted(round(abs(draw(rng)) * 1e9) for _ in range(calls))
    times = decorators.Times()
    for ns in sample:
        times.add(ns)

    for q in (0.5, 0.95, 0.99, 1.0):
        true = sample[max(-int(-q * calls // 1), 1) - 1]
        assert times.quantile(q) == pytest.approx(true, rel=0.05)
    assert times.calls == calls
    assert times.total == sum(sample)
    assert times.max == sample[-1]


def test_a_histogram_of_very_many_buckets_still_fits_into_a_line(
    lines: Lines, clock: Clock
) -> None:
    timed = timeit(every=1e15)(clock.tick)
    durations = [1e-7 * 1.02**n for n in range(1200) for _ in range(10)]
    for seconds in durations:
        clock.now = 0.0
        timed(seconds)
    decorators.flush()

    assert max(map(len, lines.messages)) <= decorators.MAX_LINE_LENGTH
    assert lines.of("timeit")[-1]["calls"] == len(durations)


# --- cache_profile --------------------------------------------------------------------


def last_cache_line(lines: Lines) -> dict[str, Any]:
    decorators.flush()
    return lines.of("cache_profile")[-1]


@pytest.mark.parametrize("maxsize", [-1, 0, 1, 2, 7, 50, 1000, None])
@pytest.mark.parametrize("seed", range(3))
def test_cache_profile_predicts_the_hits_of_lru_cache(
    maxsize: int | None, seed: int, lines: Lines
) -> None:
    def work(a: int, *, b: int = 0) -> None:
        pass

    rng = random.Random(seed)
    profiled = cache_profile(maxsize=maxsize)(work)
    cached = functools.lru_cache(maxsize=maxsize)(work)
    unbounded = functools.lru_cache(maxsize=None)(work)
    for _ in range(2000):
        kwargs = {"b": 1} if rng.random() < 0.3 else {}
        a = int(rng.expovariate(0.05))
        for one in (profiled, cached, unbounded):
            one(a, **kwargs)

    line = last_cache_line(lines)
    assert line["calls"] == 2000
    assert line["hits"] == cached.cache_info().hits
    assert line["hits_unbounded"] == unbounded.cache_info().hits
    assert line["distinct"] == unbounded.cache_info().currsize


def test_cache_profile_says_which_time_hits_would_have_saved(
    lines: Lines, clock: Clock
) -> None:
    profiled = cache_profile(clock.tick)
    for seconds in (1.0, 2.0, 1.0, 1.0):
        profiled(seconds)

    line = last_cache_line(lines)
    assert (line["total"], line["saved"]) == (5.0, 2.0)


class Shop:
    def price(self, article: int) -> int:
        return article


CACHED: list[tuple[Callable[..., Any], dict[str, Any], list[Any], dict[str, int]]] = [
    (id, {}, [1, [], {}, Argument(), 1], {"calls": 5, "unhashable": 3, "hits": 1}),
    (chr, {}, [-7, -7, 1, 1], {"calls": 4, "distinct": 1, "hits_unbounded": 1}),
    (len, {"key": tuple}, [["a"], ["a"]], {"distinct": 1, "hits": 1, "unhashable": 0}),
    (Shop.price, {}, [(Shop(), 1), (Shop(), 1)], {"distinct": 2, "hits": 0}),
]


@pytest.mark.parametrize(
    ("func", "options", "calls", "counted"),
    CACHED,
    ids=["unhashable", "raising", "a-key", "self"],
)
def test_cache_profile_counts_calls_by_their_key(
    func: Callable[..., Any],
    options: dict[str, Any],
    calls: list[Any],
    counted: dict[str, int],
    lines: Lines,
) -> None:
    profiled = cache_profile(**options)(func)
    for argument in calls:
        with contextlib.suppress(ValueError):
            profiled(*argument) if isinstance(argument, tuple) else profiled(argument)

    assert last_cache_line(lines).items() >= counted.items()


def test_the_lines_of_two_intervals_add_up(lines: Lines, clock: Clock) -> None:
    profiled = cache_profile(every=10)(clock.tick)
    for seconds in (6.0, 6.0, 6.0, 6.0, 1.0):
        profiled(seconds)
    decorators.flush()

    written = lines.of("cache_profile")
    assert [line["calls"] for line in written] == [2, 2, 1]
    assert [line["distinct"] for line in written] == [1, 0, 1]
    assert [line["hits"] for line in written] == [1, 2, 0]


# --- profile --------------------------------------------------------------------------


@pytest.fixture
def profilers(monkeypatch: pytest.MonkeyPatch) -> list[cProfile.Profile]:
    """The profilers that were used, in order."""
    used: list[cProfile.Profile] = []

    class Remembered(cProfile.Profile):
        def __init__(self) -> None:
            super().__init__()
            used.append(self)

    monkeypatch.setattr(cProfile, "Profile", Remembered)
    return used


def table(profiler: cProfile.Profile) -> dict[Any, Any]:
    """What pstats makes of it."""
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    return stats


def write(lines: Lines, path: Path) -> str:
    path.write_text("".join(f"INFO {message}\n" for message in lines.messages))
    return str(path)


def fill(n: int) -> int:
    return len(sorted(random.Random(n).random() for _ in range(n)))


def busy() -> int:
    return sum(fill(n) for n in (10, 20, 30))


def test_the_profile_in_the_log_is_the_one_that_cprofile_would_have_dumped(
    lines: Lines, profilers: list[cProfile.Profile], tmp_path: Path
) -> None:
    profile(busy)()
    profilers[0].dump_stats(tmp_path / "dumped")

    assert (
        main([write(lines, tmp_path / "log"), "--pstats", str(tmp_path / "out")]) == 0
    )
    (written,) = (tmp_path / "out").iterdir()
    ours, theirs = (
        pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
        for path in (written, tmp_path / "dumped")
    )
    assert ours == theirs
    assert len(ours) > 5
    assert marshal.loads(written.read_bytes()) == theirs


def test_nothing_of_the_decorator_is_in_the_profile_of_a_function(
    lines: Lines, profilers: list[cProfile.Profile]
) -> None:
    profile(busy)()

    files = {file for file, _, _ in table(profilers[0])}
    assert str(SCRIPT) not in files


def test_a_large_profile_comes_in_numbered_lines_shorter_than_4_kb(
    lines: Lines,
) -> None:
    scope: dict[str, Any] = {}
    rng = random.Random(5)
    names = [f"function_{rng.getrandbits(64):x}" for _ in range(1000)]
    for name in names:
        exec(f"def {name}(): pass", scope)  # noqa: S102

    @profile
    def work() -> None:
        for name in names:
            scope[name]()

    work()

    parts = [line for line in lines.of("profile") if "part" in line]
    assert len(parts) > 2
    assert [line["part"] for line in parts] == list(range(1, len(parts) + 1))
    assert {line["parts"] for line in parts} == {len(parts)}
    assert max(map(len, lines.messages)) < 4096


def test_every_limits_how_often_a_profile_is_logged(
    lines: Lines, profilers: list[cProfile.Profile], clock: Clock
) -> None:
    profiled = profile(every=60)(clock.tick)

    for seconds in (30.0, 30.0, 31.0, 1.0):
        profiled(seconds)
    assert len(profilers) == 2


def test_every_holds_for_calls_that_begin_while_a_profile_is_logged(
    profilers: list[cProfile.Profile],
) -> None:
    @profile(every=60)
    def work() -> None:
        pass

    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            if len(profilers) == 1:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
            return True

    with logging_to(Handler()):
        work()
    assert len(profilers) == 1


@pytest.mark.parametrize(
    "options", [{"slower_than": 1}, {"logger": logging.getLogger("test.quiet")}]
)
def test_the_profile_of_a_fast_call_or_for_a_disabled_logger_is_not_logged(
    options: dict[str, Any], lines: Lines
) -> None:
    logging.getLogger("test.quiet").setLevel(logging.ERROR)

    assert profile(**options)(fill)(3) == 3
    assert not lines.messages


def test_calls_inside_of_a_profiled_call_run_without_and_are_counted(
    lines: Lines, profilers: list[cProfile.Profile]
) -> None:
    inner = profile(fill)

    @profile
    def outer() -> int:
        return inner(1) + inner(2)

    assert outer() == 3
    decorators.flush()
    assert len(profilers) == 1
    skipped = [line for line in lines.of("profile") if "skipped" in line]
    assert [(line["name"], line["skipped"], line["calls"]) for line in skipped] == [
        (f"{__name__}.fill", "another call was being profiled", 2)
    ]


def test_a_profiler_that_is_at_work_already_is_left_alone(lines: Lines) -> None:
    theirs, profiled = cProfile.Profile(), profile(busy)
    theirs.enable()
    profiled()
    profiled()
    busy()
    theirs.disable()

    calls = {name: times[1] for (_, _, name), times in table(theirs).items()}
    assert calls["busy"] == 3
    decorators.flush()
    (line,) = lines.of("profile")
    assert (line["skipped"], line["calls"]) == ("another profiler was active", 2)
    profiled()
    assert [line for line in lines.of("profile") if "part" in line]


@pytest.mark.anyio
async def test_other_tasks_are_not_in_the_profile_of_a_coroutine(
    lines: Lines, profilers: list[cProfile.Profile]
) -> None:
    def unrelated() -> None:
        pass

    async def other_task() -> None:
        unrelated()

    @profile
    async def handle() -> int:
        task = asyncio.create_task(other_task())
        await asyncio.sleep(0)
        await task
        return fill(5)

    assert await handle() == 5
    names = {name for _, _, name in table(profilers[0])}
    assert {"handle", "fill"} <= names
    assert not {"unrelated", "other_task"} & names


@pytest.mark.anyio
async def test_concurrent_coroutines_all_finish_and_one_is_profiled(
    lines: Lines, profilers: list[cProfile.Profile]
) -> None:
    @profile
    async def handle(n: int) -> int:
        await asyncio.sleep(0)
        return n

    assert await asyncio.gather(*map(handle, range(5))) == [0, 1, 2, 3, 4]
    assert len(profilers) == 1
    decorators.flush()
    assert lines.of("profile")[-1]["calls"] == 4


def test_a_call_that_raises_is_profiled_and_frees_the_profiler(lines: Lines) -> None:
    for _ in range(2):
        with pytest.raises(Failure):
            profile(fail_function)(Failure())

    assert len({line["id"] for line in lines.of("profile")}) == 2


# --- sampling -------------------------------------------------------------------------


SAMPLED = """
    import asyncio, logging, os, sys, threading, time
    from decorators import start_sampling, timeit

    def spin(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def recurse(depth):
        return recurse(depth - 1) if depth else spin(0.3)

    def sleep():
        time.sleep(60)

    def wait():
        threading.Event().wait()

    async def inner():
        spin(0.3)

    async def outer():
        await inner()

    @timeit(every=0.2)
    def rare():
        pass

    if __name__ == "__main__":
        logging.basicConfig(filename="log", level=logging.INFO, format="%(message)s")
        start_sampling(every=0.3)
        start_sampling()
        threading.Thread(target=sleep, daemon=True).start()
        threading.Thread(target=wait, daemon=True).start()
        rare()
        spin(0.6)
        recurse(500)
        asyncio.run(outer())
        if hasattr(os, "fork"):
            if os.fork() == 0:
                spin(0.3)
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
def sampled(
    sampled_log: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, list[dict[str, Any]]]:
    assert main([str(sampled_log), "--json"]) == 0
    found: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    return found


def test_samples_show_what_computes(sampled: dict[str, Any]) -> None:
    rows = {row["frame"]: row for row in sampled["sampled_functions"]}

    assert max(rows.values(), key=lambda row: row["own_share"])["frame"] == (
        "spin (program.py)"
    )
    assert rows["spin (program.py)"]["total_share"] > 0.3
    assert rows["<module> (program.py)"]["own_share"] < 0.1
    lines = {row["frame"] for row in sampled["sampled_lines"]}
    assert {"spin (program.py:7)", "spin (program.py:8)"} & lines


def test_samples_tell_threads_that_wait_from_those_that_run(
    sampled: dict[str, Any],
) -> None:
    rows = {row["frame"]: row for row in sampled["sampled_functions"]}

    names = ["wait (program.py)"]
    if sys.platform == "linux":
        names.append("sleep (program.py)")
    for name in names:
        assert rows[name]["waiting_share"] > 10 * rows[name]["total_share"]


def test_samples_show_the_coroutines_of_the_running_task(sampled_log: Path) -> None:
    chains = [
        [record["frames"][n].split(" ")[0] for n in stack]
        for record in records(sampled_log)
        for _, _, *stack in record.get("stacks", [])
    ]
    assert [chain for chain in chains if chain[-3:] == ["outer", "inner", "spin"]]


def test_every_line_of_samples_is_shorter_than_4_kb(sampled_log: Path) -> None:
    lines = sampled_log.read_text().splitlines()
    deepest = max(
        len(stack)
        for record in records(sampled_log)
        for stack in record.get("stacks", [])
    )

    assert max(map(len, lines)) <= decorators.MAX_LINE_LENGTH
    assert 20 < deepest <= decorators.MAX_DEPTH + 2


def test_samples_say_what_they_cost(sampled: dict[str, Any]) -> None:
    (row,) = sampled["sampling"]

    assert 20 < row["samples"] <= row["seconds"] * 100 + 1
    assert 0 < row["cpu"] < row["seconds"] / 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_samples_itself(sampled_log: Path) -> None:
    pids = {record["pid"] for record in records(sampled_log) if "stacks" in record}

    assert len(pids) == 2


def test_sampling_logs_counts_of_functions_that_are_not_called_again(
    sampled: dict[str, Any],
) -> None:
    # The process was killed, without a line at exit.
    assert [row["name"] for row in sampled["functions"]] == ["program.rare"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the defect is mended in 3.12")
@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_collected_while_the_frames_of_other_threads_are_created(
    collecting: bool, tmp_path: Path
) -> None:
    # It could hang or crash the program (python/cpython#106883).
    program = f"""
        import gc, logging, sys, time
        from decorators import start_sampling

        def current_frames():
            seen.append(gc.isenabled())
            return original()

        seen, original = [], sys._current_frames
        sys._current_frames = current_frames
        if not {collecting}:
            gc.disable()
        logging.basicConfig(filename="log", level=logging.INFO)
        start_sampling(interval=0.001)
        between = set()
        while len(seen) < 20:
            time.sleep(0.001)
            between.add(gc.isenabled())
        assert not any(seen)
        assert any(between) == {collecting}
    """
    run_program(program, tmp_path)


STACKS = [
    (30, False, "main (a.py:1); work (a.py:5)"),
    (20, False, "main (a.py:1); work (a.py:6)"),
    (10, False, "main (a.py:1); work (a.py:5); work (a.py:5)"),
    (90, True, "main (a.py:1); idle (b.py:3)"),
]


@pytest.mark.parametrize(
    ("sort", "functions", "lines"),
    [
        (
            "own",
            [("work", 0.6, 0.6, 0), ("main", 0, 0.6, 0.9), ("idle", 0, 0, 0.9)],
            ["work (a.py:5)", "work (a.py:6)", "main (a.py:1)", "idle (b.py:3)"],
        ),
        (
            "waiting",
            [("main", 0, 0.6, 0.9), ("idle", 0, 0, 0.9), ("work", 0.6, 0.6, 0)],
            ["main (a.py:1)", "idle (b.py:3)", "work (a.py:5)", "work (a.py:6)"],
        ),
    ],
)
def test_samples_are_added_up_by_function_and_line(
    sort: str, functions: list[Any], lines: list[str], read: "Read"
) -> None:
    _, found, _ = read(*sampling_lines(*STACKS), options=("--sort", sort))

    rows = [
        (
            row["frame"].split()[0],
            row["own_share"],
            row["total_share"],
            row["waiting_share"],
        )
        for row in found["sampled_functions"]
    ]
    assert rows == functions
    assert [row["frame"] for row in found["sampled_lines"]] == lines


def test_stacks_are_written_for_flame_graphs(read: "Read", tmp_path: Path) -> None:
    out = tmp_path / "collapsed"

    read(*sampling_lines(*STACKS) * 2, options=("--collapsed", str(out)))
    assert sorted(out.read_text().splitlines()) == [
        "(waiting);main (a.py:1);idle (b.py:3) 180",
        "main (a.py:1);work (a.py:5) 60",
        "main (a.py:1);work (a.py:5);work (a.py:5) 20",
        "main (a.py:1);work (a.py:6) 40",
    ]


def test_the_tables_of_samples_are_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "app.log"
    log.write_text("\n".join(sampling_lines(*STACKS)))

    assert main([str(log), "--top", "2"]) == 0
    assert (
        capsys.readouterr().out
        == """\
100 samples in 1 s, 1 missed, 2 rare stacks left out; they took 1.00% of a processor

== sampled functions
  own  total  waiting  frame
60.0%  60.0%     0.0%  work (a.py)
 0.0%  60.0%    90.0%  main (a.py)

== sampled lines
  own  total  waiting  frame
40.0%  40.0%     0.0%  work (a.py:5)
20.0%  20.0%     0.0%  work (a.py:6)
"""
    )


# --- reading --------------------------------------------------------------------------


def timed_line(name: Any = "shop.pay", seconds: Any = 0.25, **more: Any) -> str:
    record = {"name": name, "file": "/srv/shop.py", "line": 3, "pid": 1}
    record.update(seconds=seconds, cpu=0.1, raised=None)
    return f"timeit {json.dumps({**record, **more})}"


def cache_line(name: str = "shop.rate", **more: Any) -> str:
    record: dict[str, Any] = {"name": name, "file": "/srv/shop.py", "line": 3, "pid": 1}
    record.update(maxsize=16, calls=10, unhashable=1, distinct=4, hits=4)
    record.update(hits_unbounded=5, total=2.0, saved=1.5)
    return f"cache_profile {json.dumps({**record, **more})}"


def profile_lines(
    name: str = "shop.handle",
    profile_id: str = "0123456789ab",
    packed: bytes | None = None,
    parts: int = 3,
) -> list[str]:
    if packed is None:
        packed = unpacked(["/srv/shop.py", 1, "handle", 1, 1, 0.5, 0.5, []])
    data = base64.b64encode(packed).decode()
    size = -(-len(data) // parts)
    head = {"name": name, "file": "/srv/shop.py", "line": 3, "pid": 1}
    head |= {"id": profile_id, "seconds": 0.75, "parts": parts}
    pieces = [data[n * size : (n + 1) * size] for n in range(parts)]
    return [
        f"profile {json.dumps({**head, 'part': n, 'data': piece})}"
        for n, piece in enumerate(pieces, start=1)
    ]


def unpacked(*rows: Any) -> bytes:
    return zlib.compress(json.dumps(rows).encode())


def sampling_lines(*stacks: tuple[int, bool, str], samples: int = 100) -> list[str]:
    """Stacks as (number, waiting, frames with a space between them)."""
    head = {"name": "shop.main", "file": "/srv/shop.py", "line": 3, "pid": 1}
    frames = sorted({frame for _, _, stack in stacks for frame in stack.split("; ")})
    rows = [
        [n, int(waiting), *map(frames.index, stack.split("; "))]
        for n, waiting, stack in stacks
    ]
    costs = {"missed": 1, "cpu": 0.01, "rest": 2}
    records = [
        {**head, "samples": samples, "seconds": samples / 100, **costs},
        {**head, "frames": frames, "stacks": rows},
    ]
    return [f"sampling {json.dumps(record)}" for record in records]


Read = Callable[..., tuple[int, dict[str, list[dict[str, Any]]], str]]


@pytest.fixture
def read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Read:
    """Write lines to a log and read it: exit status, JSON, standard error."""

    def read(
        *lines: str, log: bytes = b"", options: tuple[str, ...] = ()
    ) -> tuple[int, dict[str, list[dict[str, Any]]], str]:
        path = tmp_path / "app.log"
        path.write_bytes(log or "\n".join([*lines, ""]).encode())
        status = main([str(path), "--json", *options])
        out, err = capsys.readouterr()
        return status, json.loads(out), err

    return read


def test_the_json_has_the_keys_it_promises(read: Read) -> None:
    status, found, _ = read(
        timed_line(),
        cache_line(),
        *profile_lines(),
        *sampling_lines((1, False, "f (a.py:1)")),
    )

    assert status == 0
    place = ["name", "file", "line"]
    times = ["total", "mean", "p50", "p95", "p99", "max", "cpu_share", "inside_share"]
    hits = ["hits", "hits_unbounded", "hits_share", "hits_unbounded_share"]
    shares = ["own_share", "total_share", "waiting_share", "frame"]
    assert {key: sorted(rows[0]) for key, rows in found.items() if rows} == {
        "sampling": sorted(["samples", "seconds", "missed", "cpu", "rest"]),
        "sampled_functions": sorted(shares),
        "sampled_lines": sorted(shares),
        "functions": sorted([*place, "calls", "errors", *times, "partly"]),
        "caches": sorted(
            [*place, "maxsize", "calls", "distinct", "unhashable", *hits]
            + ["total", "saved"]
        ),
        "profiles": sorted([*place, "id", "seconds", "complete", "slowest"]),
    }


def test_calls_of_a_function_are_added_up(read: Read) -> None:
    _, found, _ = read(
        timed_line(seconds=0.25, cpu=0.25),
        timed_line(seconds=0.75, cpu=0.25, raised="ValueError"),
        timed_line("shop.clocks_differ", seconds=0.25, cpu=0.26),
    )

    row, other = found["functions"]
    assert other["cpu_share"] == 1.0
    assert (row["name"], row["calls"], row["errors"]) == ("shop.pay", 2, 1)
    assert (row["total"], row["mean"], row["max"]) == (1.0, 0.5, 0.75)
    assert row["cpu_share"] == 0.5
    assert row["p50"] == pytest.approx(0.25, rel=0.05)
    assert row["p95"] == pytest.approx(0.75, rel=0.05)


def test_functions_of_one_name_in_different_places_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: Read
) -> None:
    lines = [timed_line("shop._", line=3), timed_line("shop._", line=7)]

    assert [row["line"] for row in read(*lines)[1]["functions"]] == [3, 7]
    main([str(tmp_path / "app.log")])
    out = capsys.readouterr().out
    assert "shop._ (shop.py:3)" in out and "shop._ (shop.py:7)" in out


def test_lines_of_intervals_and_of_calls_are_added_up_alike(
    lines: Lines, clock: Clock, read: Read
) -> None:
    rng = random.Random(8)
    durations = [rng.lognormvariate(-3, 1) for _ in range(3000)]
    together, each = timeit(every=20)(clock.tick), timeit(clock.tick)
    for seconds in durations:
        together(seconds)
    decorators.flush()
    by_interval = list(lines.messages)
    lines.messages.clear()
    for seconds in durations:
        each(seconds)

    assert 3 < len(by_interval) < 100
    (one,), (other,) = (
        read(*messages)[1]["functions"] for messages in (by_interval, lines.messages)
    )
    for row in (one, other):
        for key in ("name", "file", "cpu_share", "inside_share"):
            del row[key]
    assert one == pytest.approx(other, rel=1e-6)


def test_cache_lines_are_added_up_by_function_and_size(read: Read) -> None:
    _, found, _ = read(
        cache_line(), cache_line(), cache_line(maxsize=None), cache_line("b")
    )

    rows = {(row["name"], row["maxsize"]): row for row in found["caches"]}
    assert set(rows) == {("shop.rate", 16), ("shop.rate", None), ("b", 16)}
    row = rows["shop.rate", 16]
    assert (row["calls"], row["distinct"], row["total"], row["saved"]) == (20, 8, 4, 3)
    assert (row["hits_share"], row["hits_unbounded_share"]) == (0.4, 0.5)


def in_json(line: str) -> str:
    return json.dumps({"log": line + "\n", "stream": "stdout"})


@pytest.mark.parametrize(
    "envelope",
    [
        "{}",
        "2026-01-01 12:00:00,000 INFO MainThread {}",
        "<13>1 2026-01-01T12:00:00Z host app 123 - - {}",
        "Jan  1 12:00:00 host app[123]: INFO:decorators:{}",
        "[{{ odd }} timeit { } profile] {}",
        "{} request=4711",
        'shipper="x" msg={} | {{"more": 1}}',
        "\x1b[32mINFO\x1b[0m {}\x1b[0m",
        "\x1b[32m{}\x1b[0m",
        "é☃ {}\r",
    ],
)
def test_the_prefix_does_not_matter(envelope: str, read: Read) -> None:
    before, after = envelope.replace("{{", "{").replace("}}", "}").rsplit("{}", 1)

    status, found, err = read(
        before + timed_line() + after, before + cache_line() + after
    )

    assert (status, err) == (0, "")
    assert found["functions"][0]["calls"] == found["caches"][0]["calls"] / 10 == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["", "INFO\t", "first line\n", "\x1b[32m"])
def test_lines_inside_of_json_logs_are_found(
    depth: int, prefix: str, read: Read
) -> None:
    lines = [prefix + line for line in (timed_line(), cache_line(), *profile_lines())]
    for _ in range(depth):
        lines = [in_json(line) for line in lines]

    status, found, err = read(*lines)

    assert (status, err) == (0, "")
    assert found["functions"] and found["caches"]
    assert found["profiles"][0]["complete"]


def test_of_two_lines_that_ran_into_each_other_the_whole_one_counts(read: Read) -> None:
    _, found, err = read(timed_line()[:50] + timed_line("shop.other"))

    assert [row["name"] for row in found["functions"]] == ["shop.other"]
    assert "damaged lines left out: 1" in err


def interval_line(**more: Any) -> str:
    fields = {"calls": 1, "errors": 0, "total": 1.0, "max": 1.0, "histogram": [200, 1]}
    return timed_line(**{**fields, **more})


DAMAGE: dict[str, str] = {
    "truncated": timed_line()[:70],
    "text for a number": timed_line(seconds="long"),
    "NaN": timed_line(seconds=float("nan")),
    "infinity": timed_line(seconds=float("inf")),
    "negative": timed_line(seconds=-1),
    "absurdly large": timed_line(seconds=10**400),
    "more digits than int() takes": timed_line().replace("0.25", "9" * 5000),
    "a list": timed_line(seconds=[1]),
    "true": timed_line(seconds=True),
    "a number for a name": timed_line(name=7),
    "nested very deep": 'timeit {"name": ' + "[" * 20_000,
    "calls that contradict the histogram": interval_line(calls=2),
    "half a bucket": interval_line(histogram=[200, 1, 1]),
    "an empty histogram": interval_line(calls=0, histogram=[]),
    "a bucket beyond all time": interval_line(histogram=[8160, 1]),
    "a histogram of text": interval_line(histogram="ab"),
    "cache size of text": cache_line(maxsize="large"),
    "cache calls of text": cache_line(calls="many"),
    "part of text": profile_lines()[0].replace('"part": 1', '"part": "1"'),
    "samples of text": sampling_lines((1, False, "f"))[0].replace("100", '"many"'),
    "a frame that is missing": sampling_lines((1, False, "f"))[1].replace(
        ", 0]", ", 9]"
    ),
    "a profile of too many parts": profile_lines()[2].replace(
        '"parts": 3', '"parts": 1'
    ),
    "in JSON and cut off": in_json(timed_line())[:60],
}


@pytest.mark.parametrize(
    "line", DAMAGE.values(), ids=[n.replace(" ", "-") for n in DAMAGE]
)
def test_a_damaged_line_is_reported_and_everything_else_read(
    line: str, read: Read
) -> None:
    status, found, err = read(line, timed_line("shop.fine"))

    assert [row["name"] for row in found["functions"]] == ["shop.fine"]
    assert found["caches"] == []
    assert "damaged lines left out: 1" in err
    assert status == 0


def test_lines_of_other_origin_are_passed_over(read: Read) -> None:
    rng = random.Random(2)
    garbage = rng.randbytes(100_000) + b"\n" + b"x" * 300_000 + b"\n\0\xff\n"
    foreign = (
        b'timeit {"x": 1}\nuser_profile {"name": "a"}\nprofile {name}\ntimeit {}\n'
    )

    status, found, err = read(log=garbage + foreign + timed_line().encode())

    assert (status, err) == (0, "")
    assert len(found["functions"]) == 1


def test_a_log_with_nothing_of_ours_gives_exit_status_1(read: Read) -> None:
    status, found, err = read("just", "some", "lines")

    assert (status, any(found.values())) == (1, False)
    assert "no lines from timeit, cache_profile, profile or sampling found" in err


def test_calls_that_were_not_profiled_are_something_found(read: Read) -> None:
    head = {"name": "shop.pay", "file": "/srv/shop.py", "line": 3, "pid": 1}
    line = json.dumps({**head, "skipped": "another profiler was active", "calls": 2})

    status, found, err = read(f"profile {line}", f"profile {line}")

    assert (status, err) == (0, "")
    (row,) = found["skipped"]
    assert (row["reason"], row["calls"]) == ("another profiler was active", 4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_rotated_logs_can_be_given_in_any_order(
    order: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = profile_lines()
    names = ["app.log", "app.log.1", "app.log.2.gz"]
    for name, part in zip(names, parts):
        text = f"{timed_line()}\n{part}\n{cache_line()}\n".encode()
        (tmp_path / name).write_bytes(
            gzip.compress(text) if name.endswith(".gz") else text
        )

    assert main([str(tmp_path / names[n]) for n in order] + ["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["functions"][0]["calls"] == 3
    assert found["caches"][0]["calls"] == 30
    assert found["profiles"][0]["complete"] is True


def test_the_lines_of_two_profiles_may_be_mixed(read: Read) -> None:
    one, two = profile_lines(), profile_lines("shop.other", "ba9876543210")
    mixed = [line for pair in zip(one, reversed(two)) for line in pair]

    _, found, err = read(*mixed)

    assert [row["complete"] for row in found["profiles"]] == [True, True]
    assert err == ""


def test_profiles_are_sorted_by_seconds_and_limited_by_top(read: Read) -> None:
    lines = [
        line.replace("0.75", str(seconds))
        for seconds in (0.5, 2.0, 1.0)
        for line in profile_lines(profile_id=f"{seconds}")
    ]

    _, found, _ = read(*lines, options=("--top", "2"))
    assert [row["seconds"] for row in found["profiles"]] == [2.0, 1.0]


PROFILE_DAMAGE: dict[str, list[str]] = {
    "a line is missing": profile_lines()[:-1],
    "data changed": [line.replace('data": "', 'data": "A') for line in profile_lines()],
    "no base64": [line.replace('data": "', 'data": "é!') for line in profile_lines()],
    "not packed": profile_lines(packed=b"hello"),
    "no JSON": profile_lines(packed=zlib.compress(b"hello")),
    "no table": profile_lines(packed=unpacked(1, 2)),
    "rows too short": profile_lines(packed=unpacked(["a", 1, "f", 1])),
    "time is text": profile_lines(packed=unpacked(["a", 1, "f", 1, 1, "x", 0, []])),
    "cut off": profile_lines(packed=unpacked([["a", 1, "f", 1, 1, 0, 0, []]])[:-5]),
    "nested very deep": profile_lines(packed=zlib.compress(b"[" * 100_000)),
}


@pytest.mark.parametrize(
    "damaged",
    PROFILE_DAMAGE.values(),
    ids=[n.replace(" ", "-") for n in PROFILE_DAMAGE],
)
def test_a_damaged_profile_is_marked_and_not_written(
    damaged: list[str], read: Read, tmp_path: Path
) -> None:
    fine = profile_lines("shop.fine", "ba9876543210")
    options = ("--pstats", str(tmp_path / "out"))
    status, found, _ = read(*damaged, *fine, options=options)

    assert status == 0
    complete = {row["name"]: row["complete"] for row in found["profiles"]}
    assert complete == {"shop.handle": False, "shop.fine": True}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "shop.fine-ba9876543210.pstats"
    ]


def test_a_profile_that_unpacks_to_too_much_is_damaged(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decorators, "MAX_PROFILE_SIZE", 10_000)
    bomb = zlib.compress(b"[" + b" " * 100_000 + b"]")

    _, found, _ = read(
        *profile_lines(packed=bomb), options=("--pstats", str(tmp_path / "out"))
    )

    assert found["profiles"][0]["complete"] is False


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "..", "a/b\\c", "nul\0l", "x" * 5000, "%s{}"]
)
@pytest.mark.parametrize("profile_id", ["0123456789ab", "../../../etc"])
def test_the_file_of_a_profile_stays_in_its_folder(
    name: str, profile_id: str, read: Read, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "er" / "out"

    lines = profile_lines(name, profile_id)
    status, _, _ = read(*lines, options=("--pstats", str(out)))

    assert status == 0
    (file,) = out.iterdir()
    assert file.name.endswith(".pstats")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "app.log", tmp_path / "deep"]


def test_a_folder_that_cannot_be_written_gives_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "app.log"
    log.write_text("\n".join(profile_lines()))

    assert main([str(log), "--pstats", str(log)]) == 2
    assert capsys.readouterr().err == (
        f"decorators.py: [Errno 17] File exists: '{log}'\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_gives_exit_status_2(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text(timed_line())
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(SCRIPT), str(log)]
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err == b"decorators.py: [Errno 28] No space left on device\n"


def broken_logs(tmp_path: Path) -> dict[str, Path]:
    packed = gzip.compress(timed_line().encode() * 1000)
    contents = {
        "cut-off.gz": packed[:-20],
        "changed.gz": packed[:200] + b"\xff" * 50 + packed[250:],
        "header-only.gz": b"\x1f\x8b\x08\0",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    return {name: tmp_path / name for name in [*contents, "folder", "missing"]}


@pytest.mark.parametrize(
    "name", ["cut-off.gz", "changed.gz", "header-only.gz", "folder", "missing"]
)
def test_a_log_that_cannot_be_read_gives_status_2_and_the_others_are_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_logs(tmp_path)[name]
    (tmp_path / "app.log").write_text(timed_line("shop.fine"))

    assert main([str(broken), str(tmp_path / "app.log"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert "shop.fine" in [row["name"] for row in json.loads(out)["functions"]]
    assert err.startswith(f"decorators.py: {broken}: ")
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    "arguments",
    [[], ["--demo", "app.log"], ["x", "--sort", "name"], ["x", "--top", "0"], ["--no"]],
)
def test_bad_arguments_give_exit_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)

    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("sort", "functions", "caches"),
    [
        ("", "abc", "ab"),
        ("total", "abc", "ba"),
        ("mean", "cab", "ab"),
        ("p95", "cab", "ab"),
        ("max", "cab", "ab"),
        ("calls", "bac", "ba"),
        ("saved", "abc", "ab"),
    ],
)
def test_rows_are_sorted_by_a_column_if_their_table_has_it(
    sort: str, functions: str, caches: str, read: Read
) -> None:
    lines = [timed_line("b", 1.0)] * 3 + [timed_line("a", 2.0)] * 2
    lines += [timed_line("c", 2.5), cache_line("a")]
    lines += [cache_line("b", calls=20, total=9.0, saved=1.0)]

    _, found, _ = read(*lines, options=("--sort", sort) if sort else ())
    assert "".join(row["name"] for row in found["functions"]) == functions
    assert "".join(row["name"] for row in found["caches"]) == caches


def test_the_tables_say_the_same_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "app.log"
    lines = [
        timed_line(),
        timed_line("shop.ship", 0.125, slower_than=0.1, inside=0.025),
        cache_line(),
        *(f"2026-11-21T21:19:18 INFO {line}" for line in profile_lines()),
    ]
    log.write_text("\n".join(lines))

    assert main([str(log)]) == 0
    assert (
        capsys.readouterr().out
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
"""
    )


def test_a_name_from_a_log_cannot_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "app.log"
    log.write_text(
        "\n".join([timed_line("\x1b[2Jevil\r\n"), profile_lines("\x1b[2Jp")[0], ""])
    )

    main([str(log)])
    out, err = capsys.readouterr()
    assert "?[2Jevil??" in out
    assert "\x1b" not in out + err


# --- in processes of their own --------------------------------------------------------


def run(
    *command: str | Path, stdin: bytes = b"", **more: Any
) -> subprocess.CompletedProcess[bytes]:
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(
        arguments, input=stdin, capture_output=True, check=False, **more
    )


def test_the_script_reads_standard_input_and_needs_only_the_standard_library(
    tmp_path: Path,
) -> None:
    # Alone in a folder, with no site-packages.
    alone = shutil.copy(SCRIPT, tmp_path / "decorators.py")
    log = gzip.compress(timed_line().encode())

    done = run("-I", "-S", "-W", "error", alone, "-", stdin=log)

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"shop.pay" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_of_the_output_may_leave_early(
    options: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "app.log"
    log.write_text("".join(timed_line(f"shop.f{n}") + "\n" for n in range(5000)))
    process = subprocess.Popen(
        [sys.executable, SCRIPT, log, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()

    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    done = run(
        SCRIPT,
        "-",
        stdin=timed_line("shop.größe").encode(),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )

    assert done.returncode == 0
    assert rb"shop.gr\xf6\xdfe" in done.stdout


PROGRAM = """
    import asyncio, logging, sys, threading
    from decorators import cache_profile, profile, timeit

    logging.basicConfig(
        filename="shop.log",
        level=logging.INFO,
        format="%(asctime)s %(process)d [%(levelname)s] %(name)s: %(message)s",
    )

    @timeit
    def load(n):
        if n % 10 == 0:
            raise ValueError(n)
        return n

    @timeit(every=3600)
    def parse(n):
        return n

    class Shop:
        @cache_profile(maxsize=4)
        def price(self, article):
            return article

    @timeit
    async def fetch(n):
        await asyncio.sleep(0)
        return parse(n)

    @profile
    async def handle():
        shop = Shop()
        for n in range(40):
            try:
                load(n)
            except ValueError:
                logging.warning("timeit is not what this line is from")
            shop.price(n % 5)
            shop.price(n % 5)
            await fetch(n)

    asyncio.run(handle())
"""


@pytest.fixture(scope="module")
def shop_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log that two processes of a program have written together."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copy(SCRIPT, folder)
    (folder / "shop.py").write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, "shop.py"]
    processes = [subprocess.Popen(command, cwd=folder) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    return folder / "shop.log"


def test_the_tables_match_the_calls_of_two_processes(
    shop_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(shop_log), "--json"]) == 0

    out, err = capsys.readouterr()
    found = json.loads(out)
    calls = {row["name"]: (row["calls"], row["errors"]) for row in found["functions"]}
    assert calls == {
        "shop.load": (80, 8),
        "shop.parse": (80, 0),
        "shop.fetch": (80, 0),
    }
    (cache,) = found["caches"]
    assert cache["name"] == "shop.Shop.price"
    assert (cache["calls"], cache["distinct"]) == (160, 10)
    # Five articles in turn are one too many for four places.
    assert (cache["hits_share"], cache["hits_unbounded_share"]) == (0.5, 150 / 160)
    assert [row["name"] for row in found["profiles"]] == ["shop.handle"] * 2
    assert all(row["complete"] for row in found["profiles"])
    assert err == ""


def test_pstats_and_gprof2dot_open_the_profile_of_a_log(
    shop_log: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gprof2dot")
    assert main([str(shop_log), "--pstats", str(tmp_path)]) == 0

    file, _ = sorted(tmp_path.iterdir())
    listed = run("-m", "pstats", file, stdin=b"sort cumulative\nstats 30\n")
    drawn = run("-m", "gprof2dot", "-f", "pstats", file)
    assert b"(handle)" in listed.stdout
    assert (drawn.returncode, drawn.stderr) == (0, b"")
    assert b"digraph" in drawn.stdout and b"handle" in drawn.stdout


CHILDREN = """
    import ctypes, logging, multiprocessing, os, sys
    from decorators import cache_profile, flush, timeit

    logging.basicConfig(filename="log", level=logging.INFO, format="%(message)s")

    @timeit(every=3600)
    @cache_profile
    def work(n):
        return n

    if __name__ == "__main__":
        work(1)
        how = sys.argv[1]
        if how in ("os.fork", "C"):
            if how == "os.fork":
                child = os.fork()
            elif (child := ctypes.PyDLL(None).fork()) == 0:  # as uWSGI does
                ctypes.pythonapi.PyOS_AfterFork_Child()
            if child == 0:
                work(2)
                sys.exit()
            os.wait()
        else:
            context = multiprocessing.get_context(how)
            child = context.Process(target=work, args=(2,))
            child.start()
            child.join()
        work(3)
"""


def records(log: Path) -> list[dict[str, Any]]:
    found = [decorators.parse(line) for line in log.read_bytes().splitlines()]
    return [record for line in found for _, record in line if record]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("how", ["os.fork", "C", "fork", "forkserver", "spawn"])
def test_a_child_logs_its_own_calls_under_its_own_pid(how: str, tmp_path: Path) -> None:
    run_program(CHILDREN, tmp_path, how)

    calls = [(record["pid"], record["calls"]) for record in records(tmp_path / "log")]
    assert sorted(n for _, n in calls) == [1, 1, 2, 2]
    assert len(set(calls)) == 2


FORKING_WHILE_PROFILED = """
    import logging, os, sys
    from decorators import profile

    logging.basicConfig(filename="log", level=logging.INFO, format="%(message)s")

    @profile
    def outer():
        if os.fork():
            os.wait()

    @profile
    def inner():
        pass

    outer()
    inner()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_in_a_profiled_call_can_be_profiled(tmp_path: Path) -> None:
    run_program(FORKING_WHILE_PROFILED, tmp_path)

    profiled = {
        (record["name"], record["pid"])
        for record in records(tmp_path / "log")
        if "id" in record
    }
    assert (
        sorted(name for name, _ in profiled)
        == ["program.inner"] * 2 + ["program.outer"] * 2
    )


def run_program(program: str, folder: Path, *arguments: str) -> None:
    """Run a program beside a copy of the decorators, which it must do in silence."""
    shutil.copy(SCRIPT, folder)
    (folder / "program.py").write_text(textwrap.dedent(program))
    # Python 3.12 and later warn about a fork while there are several threads.
    options = ("-W", "ignore::DeprecationWarning")
    done = run(*options, "program.py", *arguments, cwd=folder)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_thread_can_fork_that_holds_a_lock_of_the_logging_handler(
    tmp_path: Path,
) -> None:
    program = """
        import logging, os, signal, threading
        from decorators import start_sampling

        class Handler(logging.Handler):
            def handle(self, record):
                at_work.set()
                with lock:
                    pass

        signal.alarm(20)  # instead of a deadlock
        at_work, lock = threading.Event(), threading.Lock()
        logging.basicConfig(handlers=[Handler()], level=logging.INFO)
        with lock:
            start_sampling(every=0.05)
            at_work.wait()
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """
    run_program(program, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_sampling_starts_in_a_child_when_all_counts_are_at_zero(tmp_path: Path) -> None:
    program = """
        import logging, os
        from decorators import start_sampling, timeit

        logging.basicConfig(filename="log", level=logging.INFO)
        start_sampling(interval=1e-6)
        decorated = [timeit(every=1e-6)(abs) for _ in range(1000)]
        for _ in range(10):
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """
    run_program(program, tmp_path)


def test_a_program_does_not_end_in_the_middle_of_the_lines_of_samples(
    tmp_path: Path,
) -> None:
    program = """
        import logging, threading, time
        from decorators import start_sampling

        class SlowHandler(logging.Handler):
            def handle(self, record):
                at_work.set()
                time.sleep(0.1)
                with open("log", "a") as log:
                    print(record.getMessage(), file=log)

        at_work = threading.Event()
        logging.basicConfig(handlers=[SlowHandler()], level=logging.INFO)
        start_sampling(every=0.05)
        at_work.wait()
    """
    run_program(program, tmp_path)

    assert [record for record in records(tmp_path / "log") if "stacks" in record]


def test_the_demo_shows_the_way_of_working(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    assert main(["--demo"]) == 0
    out, err = capsys.readouterr()
    for name in ("exchange_rate", "tax", "ship", "handle"):
        assert f"shop.{name} (shop.py:" in out
    (folder,) = tmp_path.iterdir()
    assert str(folder / "shop.log") in err
    assert (folder / "shop.log").stat().st_size > 1000


def test_an_interrupt_gives_exit_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> Iterator[bytes]:
        raise KeyboardInterrupt

    monkeypatch.setattr(decorators, "read_log", interrupted)

    assert main(["app.log"]) == 130


def test_a_log_without_line_ends_is_not_taken_into_memory_at_once(
    tmp_path: Path,
) -> None:
    log = tmp_path / "app.log"
    log.write_bytes(bytes(1_000_000))

    pieces = list(decorators.read_log(str(log)))
    assert max(map(len, pieces)) == decorators.MAX_READ_SIZE
    assert sum(map(len, pieces)) == 1_000_000
