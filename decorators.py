"""Find the slow functions of a program when all you get is its log.

Standard library only: copy this one file to the server.

1. Hang decorators on the suspects, deploy, let the program run, fetch its logs:

    @timeit                       # a line a call: how long, computing or waiting, raised?
    def load(path): ...

    @timeit(slower_than=0.1)      # only the calls that took 0.1 s or more
    async def fetch(url): ...

    @timeit(every=60)             # a hot function: a line a minute instead of one a call
    def parse(line): ...

    @cache_profile(maxsize=1000)  # would functools.lru_cache(maxsize=1000) pay here?
    def price(article, country): ...

    @profile(slower_than=1.0)     # cProfile around the call, the whole profile in the log
    async def handle(request): ...

2. Turn the logs into answers, decorate what they point to, and deploy again:

    python decorators.py app.log app.log.1 app.log.2.gz
    python decorators.py --pstats profiles app.log   # for pstats, snakeviz, gprof2dot
    python decorators.py --demo                      # all of this on a small program

The lines go to the logger that is named like this module, at level INFO, which the
program's logging must let through: logging.getLogger("decorators").setLevel("INFO").
Each is `NAME {json}`, pure ASCII and shorter than 4 KB, with the function's name, file
and line and the process id, and never an argument's value.

All three decorate functions, methods, class and static methods, coroutines, generators
and asynchronous generators. They pass results and exceptions through, and whatever goes
wrong inside them costs a measurement, not a call. What they cannot hide: a decorated
call takes a few more frames, so a deep recursion meets its limit sooner; and the wrong
arguments for a generator or coroutine are noticed at its first step.

Exit status of the reader: 0 something was found, 1 nothing was, 2 bad arguments or a
file that could not be read or written, 130 interrupted.
"""

import argparse
import atexit
import base64
import contextlib
import cProfile
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import logging
import marshal
import math
import os
import pstats
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import types
import weakref
import zlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Self, TypeVar, overload

logger = logging.getLogger(__name__)

# Characters of a line of ours: with the application's own prefix it stays under 4 KB.
LINE = 3500
# Characters of it that a name, a file or a row of a profile may take.
TEXT = 400
# Calls that go to the histogram together, for 0.1 us each; alone it takes 1.2 us.
BATCH = 1024
# Hashes that estimate the number of distinct argument sets: 1.2 MB.
SAMPLE = 1 << 14
# Results that cache_profile(maxsize=None) has room for: 8 MB.
UNBOUNDED = 1 << 16
# Lines of one profile, 5 MB together; a profile of 700 functions takes 13.
PARTS = 2000
# Bytes of a profile unpacked: a log is data from strangers, and may hold a bomb.
PROFILE = 1 << 24
# Profiles with lines still to come that the reader keeps in memory.
OPEN_PROFILES = 64
# Bytes of a line of a log that are looked at together.
LONGEST_LINE = 1 << 16

Function = Callable[..., Any]
F = TypeVar("F", bound="Function | classmethod[Any, ..., Any]")
Stats = dict[tuple[str, int, str], Any]  # as pstats.Stats has them


# --- durations, for the decorators and for the reader ---------------------------------


class Durations:
    """Number, sum, maximum and quantiles of durations in seconds, in constant memory.

    The quantiles come from a histogram with log-linear buckets like HdrHistogram's, 32
    to each power of two, so that a quantile is at most 1/64 (1.6 %) off the true one:
    the relative-error guarantee of Masson, Rim, Lee, "DDSketch" (VLDB 2019). As there,
    merging loses nothing, and where a line has no room for all the buckets the lowest
    are put together. Number, sum and maximum are exact.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.total = 0.0
        self.max = 0.0
        self.halves: Counter[int] = Counter()

    def add(self, durations: Sequence[float]) -> None:
        # A float32 begins with sign, exponent and fraction: cut off behind the fifth
        # bit of the fraction, it is the number of its bucket. Its upper half has two
        # bits more. These are counted in C, in 0.1 us a call, and only buckets() cuts
        # them off; a loop over math.frexp would take 0.3 us.
        halves = memoryview(array("f", durations)).cast("B").cast("H")
        self.halves.update(halves[sys.byteorder == "little" :: 2])
        self.calls += len(durations)
        self.total += sum(durations)
        self.max = max(self.max, max(durations))

    def buckets(self) -> list[tuple[int, int]]:
        """(bucket, number), from the shortest durations to the longest."""
        buckets: Counter[int] = Counter()
        for half, n in self.halves.items():
            buckets[half >> 2] += n
        return sorted(buckets.items())

    def quantile(self, q: float) -> float:
        """The duration (s) that the share `q` of the calls did not exceed."""
        rank = math.ceil(q * self.calls)
        for bucket, n in self.buckets():
            rank -= n
            if rank <= 0:
                middle = (bucket << 18 | 1 << 17).to_bytes(4, "big")
                return min(float(*struct.unpack(">f", middle)), self.max)
        return self.max

    def figures(self) -> dict[str, float]:
        return {
            "total": self.total,
            "mean": self.total / max(self.calls, 1),
            "p50": self.quantile(0.50),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
            "max": self.max,
        }

    def packed(self, room: int) -> list[int]:
        """The buckets as [gap to the one before, number, gap, number, ...].

        That many characters of JSON are enough for it.
        """
        pairs = self.buckets()
        while True:
            gaps = itertools.pairwise([0, *(bucket for bucket, _ in pairs)])
            packed = [(b - a, n) for (a, b), (_, n) in zip(gaps, pairs)]
            numbers = [*itertools.chain(*packed)]
            if len(json.dumps(numbers)) <= room:
                return numbers
            low = len(pairs) // 4
            pairs[: low + 1] = [(pairs[low][0], sum(n for _, n in pairs[: low + 1]))]

    def merge(
        self, calls: int, total: float, longest: float, packed: list[int]
    ) -> None:
        """Add what another one logged. Raises ValueError if it contradicts itself."""
        buckets = list(itertools.accumulate(packed[::2]))
        # 255 is the exponent of float32's infinities and NaNs.
        if sum(packed[1::2]) != calls or len(packed) % 2 or max(buckets) >= 255 << 5:
            raise ValueError("the histogram does not fit the number of calls")
        self.calls += calls
        self.total += total
        self.max = max(self.max, longest)
        for bucket, n in zip(buckets, packed[1::2]):
            self.halves[bucket << 2] += n


# --- writing lines --------------------------------------------------------------------


class Log:
    """What the lines of one decorated function share: who it is, where they go."""

    def __init__(
        self, kind: str, func: Function, to: logging.Logger | None, level: int
    ) -> None:
        self.kind = kind
        self.logger = to or logger
        self.level = level
        self.name, file, line = _identity(func)
        self.head = {"name": self.name, "file": file, "line": line}
        self.enabled()  # what is no logger or level is to fail here, not in a call

    def enabled(self) -> bool:
        return self.logger.isEnabledFor(self.level)

    def text(self, **fields: object) -> str:
        return json.dumps({**self.head, "pid": os.getpid(), **fields})

    def __call__(self, **fields: object) -> None:
        """Log a line. Whatever the program's filters and handlers do stays here."""
        # One of them may be decorated itself.
        if getattr(_logging, "now", False):
            return
        _logging.now = True
        try:
            self.logger.log(self.level, "%s %s", self.kind, self.text(**fields))
        except Exception:  # noqa: BLE001, S110 - where could it be logged?
            pass
        finally:
            _logging.now = False


_logging = threading.local()


def _identity(func: Function) -> tuple[str, str, int]:
    """Name, file and line of a callable; "" and 0 for what is not written in Python."""
    inner = _innermost(func)
    code = getattr(inner, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else ("", 0)
    module = getattr(inner, "__module__", None) or "builtins"
    if module == "__main__":
        module = Path(file).stem or module
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return _short(f"{module}.{name}"), _short(file[::-1])[::-1], line


def _innermost(func: Function) -> Any:
    inner = inspect.unwrap(func)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner


def _short(text: str) -> str:
    """As much of a text as takes TEXT characters in JSON, where some take 6 or 12."""
    text = text[:TEXT]
    while len(json.dumps(text)) > TEXT:
        text = text[: len(text) * 3 // 4]
    return text


def _seconds(value: float) -> float:
    return round(value, 9)


# --- one call, of whatever kind -------------------------------------------------------


class Call:
    """One call under measurement. This one measures nothing.

    A plain function runs in one stretch. A coroutine or a generator runs in several;
    between two of them it waits for something, or its caller has the floor.
    """

    def resume(self) -> Callable[[], object] | None:
        """A stretch begins. Returns what is to be called when it ends, if anything."""
        return None

    def yielded(self) -> None:
        """A generator has handed out an item, and its caller goes to work."""

    def finish(self, raised: str | None) -> None:
        """The call is over. `raised` is the name of the exception, if there was one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: object
    ) -> None:
        # GeneratorExit ends a generator that nobody wants to read further: no error.
        failed = kind is not None and kind is not GeneratorExit
        with contextlib.suppress(Exception):
            self.finish(_short(kind.__name__) if kind and failed else None)


class TimedCall(Call):
    """Measures seconds: `waited` by the caller, `inside` of the call's own code."""

    def __init__(self) -> None:
        self.waited = self.inside = self.resumed = 0.0
        self.began: float | None = None
        self.asked: float | None = None

    def resume(self) -> Callable[[], object]:
        self.resumed = now = perf_counter()
        if self.began is None:
            self.began = now
        if self.asked is None:
            self.asked = now
        return self.suspend

    def suspend(self) -> None:
        self.inside += perf_counter() - self.resumed

    def yielded(self) -> None:
        if self.asked is not None:
            self.waited += perf_counter() - self.asked
            self.asked = None

    def finish(self, raised: str | None) -> None:
        self.yielded()


Begin = Callable[[tuple[Any, ...], dict[str, Any]], Call]


def _stretch(call: Call, run: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Run one stretch of a call's own code."""
    try:
        stop = call.resume()
    except Exception:  # noqa: BLE001 - a measurement is lost, not a call
        stop = None
    try:
        return run(*args, **kwargs)
    finally:
        # Not contextlib.suppress, which would appear in the profile that ends here.
        try:
            if stop:
                stop()
        except Exception:  # noqa: BLE001, S110 - as above
            pass
        # An exception thrown into a generator is in here, where its own traceback
        # would keep it alive.
        del run, args


def _stretches(call: Call, steps: Any, hands_out: bool) -> Generator[Any, Any, Any]:
    """What `yield from steps` does (PEP 380), each stretch measured."""
    run, value = steps.send, None
    try:
        while True:
            try:
                item = _stretch(call, run, value)
            except StopIteration as stop:
                return stop.value
            if hands_out:
                call.yielded()
            # The exception is thrown on outside of `except`, or else it would be
            # chained to what comes of it. close() arrives here too, as GeneratorExit.
            try:
                run, value = steps.send, (yield item)
            except BaseException as error:  # noqa: BLE001
                run, value = steps.throw, error
    finally:
        del steps, run, value  # as in _stretch


# The same generator function, which can from here on be awaited as well.
_awaitable: Function = types.coroutine(_stretches)


def _wrap(func: Function, begin: Begin, plain: Function | None = None) -> Function:
    """A function of the same kind as `func`, its calls between begin() and finish().

    A plain function is replaced by `plain`, if given: where every 0.1 us counts.
    """

    def function(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as call:
            return _stretch(call, func, *args, **kwargs)

    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        steps = func(*args, **kwargs)
        with begin(args, kwargs) as call:
            return (yield from _stretches(call, steps, True))

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        steps = func(*args, **kwargs)
        # A plain function can be marked as a coroutine function and return whatever.
        if not isinstance(steps, Coroutine):
            return await steps
        with begin(args, kwargs) as call:
            return await _awaitable(call, steps, False)

    async def async_generator(*args: Any, **kwargs: Any) -> Any:
        items = func(*args, **kwargs)
        step = items.asend(None)
        try:
            with begin(args, kwargs) as call:
                while True:
                    try:
                        item = await _awaitable(call, step, False)
                    except StopAsyncIteration:
                        return
                    call.yielded()
                    try:
                        step = items.asend((yield item))
                    except BaseException as error:  # noqa: BLE001 - as in _stretches
                        step = items.athrow(error)
        finally:
            del step  # as in _stretch

    wrapper: Function = plain or function
    if inspect.iscoroutinefunction(func):
        wrapper = coroutine
    elif inspect.isasyncgenfunction(func):
        wrapper = async_generator
    elif inspect.isgeneratorfunction(func):
        wrapper = generator
        if _innermost(func).__code__.co_flags & inspect.CO_ITERABLE_COROUTINE:
            wrapper = types.coroutine(generator)
    return functools.wraps(func)(wrapper)


def _apply(decorate: Callable[[Function], Function], target: Any) -> Any:
    """Decorate a function, or the one inside of a classmethod or staticmethod."""
    if isinstance(target, (classmethod, staticmethod)):
        return type(target)(decorate(target.__func__))
    if isinstance(target, type) or not callable(target):
        kind = type(target).__name__
        raise TypeError(f"decorate functions and methods, not a {kind} object")
    return decorate(target)


# --- counts that are logged once an interval ------------------------------------------


class Tally:
    """What a decorated function has counted since its last line.

    A line is due every `every` seconds and comes with the first call after that: no
    thread waits for it. What is left comes at exit, or when the decorated function is
    dropped. A forked child starts from nothing: what was there, its parent will log.
    """

    lock: Any

    def __init__(self, every: float, log: Log) -> None:
        if not every > 0:
            raise ValueError("every= must be a number of seconds greater than 0")
        self.every = every
        self.log = log
        self.due = perf_counter() + every
        self.restart()
        _tallies.add(self)

    def restart(self) -> None:
        raise NotImplementedError

    def fold(self) -> None:
        """Count what has come in."""

    def take(self) -> dict[str, object] | None:
        """What is to be logged, and counted from nothing again; None for nothing."""
        raise NotImplementedError

    def flush(self, now: float = math.inf) -> None:
        """Count, and log if a line is due. Never raises and never waits."""
        with contextlib.suppress(Exception):
            # Another thread is at it, or this one further down: it will do.
            if not self.lock.acquire(blocking=False):
                return
            fields = None
            try:
                self.fold()
                if now >= self.due:
                    self.due = perf_counter() + self.every
                    fields = self.take()
            finally:
                self.lock.release()
            if fields:
                self.log(**fields)

    def __del__(self) -> None:
        self.flush()


_tallies: weakref.WeakSet[Tally] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    for tally in list(_tallies):
        tally.flush()


def _after_fork() -> None:
    global _profiling
    for tally in list(_tallies):
        tally.restart()
    if _profiling.call:
        _profiling.call.give_up()
    _profiling = ProfilerInUse()
    # The processes of multiprocessing leave by os._exit(), past every atexit function.
    if util := sys.modules.get("multiprocessing.util"):
        util.register_after_fork(
            _flush_all, lambda flush: util.Finalize(None, flush, exitpriority=0)
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- timeit ---------------------------------------------------------------------------


@overload
def timeit(func: F, /) -> F: ...
@overload
def timeit(
    *,
    slower_than: float = 0.0,
    every: float | None = None,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Callable[[F], F]: ...
def timeit(
    func: Any = None,
    /,
    *,
    slower_than: float = 0.0,
    every: float | None = None,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Any:
    """Log how long the calls of a function take.

    slower_than: seconds; faster calls are not logged, as the reader's table will say.
    every: seconds; instead of a line a call, log a line an interval (with the first
        call after it) and one at exit, or when the function itself is dropped: calls,
        errors, total, mean, p50, p95, p99, max, and the histogram that they come
        from (see Durations), in constant memory. The processor time is missing there:
        to read its clock takes 0.5 us, more than all the rest.
    logger, level: where the lines go. While one for each call would not be logged
        there, nothing is measured.

    A call's line has `seconds`, the time that the caller waited; `raised`, the name of
    the exception or null; and for a plain function `cpu`, the seconds of processor time
    of its thread: close to `seconds` if it computes, far below if it waits. Coroutines
    and generators have instead `inside`, the seconds that their own code ran, and
    `finished`, those from the first step to the end. The caller waits for a coroutine
    until it has finished; for a generator, asynchronous or not, only from asking for an
    item to getting it. The calls of a recursion count each for itself, so their total
    counts the same time more than once.

    Raises ValueError for options that make no sense, TypeError for no function.
    """
    if not slower_than >= 0 or (slower_than and every is not None):
        raise ValueError("slower_than= must be 0 or more seconds, and not with every=")

    def decorate(func: Function) -> Function:
        log = Log("timeit", func, logger, level)
        if every is None:
            return _log_each(func, log, slower_than)
        return _log_together(func, TimeTally(every, log))

    return (
        functools.partial(_apply, decorate) if func is None else _apply(decorate, func)
    )


def _log_each(func: Function, log: Log, slower_than: float) -> Function:
    enabled = log.enabled
    limit = {"slower_than": slower_than} if slower_than else {}

    class LoggedCall(TimedCall):
        def finish(self, raised: str | None) -> None:
            super().finish(raised)
            if self.began is not None and self.waited >= slower_than:
                log(
                    seconds=_seconds(self.waited),
                    inside=_seconds(self.inside),
                    finished=_seconds(perf_counter() - self.began),
                    raised=raised,
                    **limit,
                )

    def begin(args: object, kwargs: object) -> Call:
        return LoggedCall() if enabled() else Call()

    def plain(*args: Any, **kwargs: Any) -> Any:
        if not enabled():
            return func(*args, **kwargs)
        raised = None
        cpu = thread_time()
        start = perf_counter()
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            raised = _short(type(error).__name__)
            raise
        finally:
            seconds = perf_counter() - start
            if seconds >= slower_than:
                cpu = thread_time() - cpu
                log(
                    seconds=_seconds(seconds),
                    cpu=_seconds(cpu),
                    raised=raised,
                    **limit,
                )

    return _wrap(func, begin, plain)


class TimeTally(Tally):
    """The durations of calls since the last line."""

    def __init__(self, every: float, log: Log) -> None:
        # To append to a list takes no lock, and the wrapper holds on to these two.
        self.pending: list[float] = []
        self.failed: list[None] = []
        super().__init__(every, log)

    def restart(self) -> None:
        self.lock = threading.Lock()
        self.pending.clear()
        self.failed.clear()
        self.durations = Durations()
        self.errors = 0

    def fold(self) -> None:
        if batch := self.pending[:]:
            del self.pending[: len(batch)]
            self.durations.add(batch)
        self.errors += (failed := len(self.failed))
        del self.failed[:failed]

    def take(self) -> dict[str, object] | None:
        durations, errors = self.durations, self.errors
        self.durations, self.errors = Durations(), 0
        if not durations.calls:
            return None
        times = {key: _seconds(value) for key, value in durations.figures().items()}
        fields = {"calls": durations.calls, "errors": errors, **times}
        room = LINE - len(self.log.text(**fields, buckets=[]))
        return {**fields, "buckets": durations.packed(room)}


def _log_together(func: Function, tally: TimeTally) -> Function:
    pending, append, failed = tally.pending, tally.pending.append, tally.failed

    class CountedCall(TimedCall):
        def finish(self, raised: str | None) -> None:
            super().finish(raised)
            if raised is not None:
                failed.append(None)
            append(self.waited)
            now = perf_counter()
            if now >= tally.due or len(pending) >= BATCH:
                tally.flush(now)

    def begin(args: object, kwargs: object) -> Call:
        return CountedCall()

    def plain(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            return func(*args, **kwargs)
        except BaseException:
            failed.append(None)
            raise
        finally:
            now = perf_counter()
            append(now - start)
            if now >= tally.due or len(pending) >= BATCH:
                tally.flush(now)

    return _wrap(func, begin, plain)


# --- cache_profile --------------------------------------------------------------------


@overload
def cache_profile(func: F, /) -> F: ...
@overload
def cache_profile(
    *,
    maxsize: int | None = 128,
    key: Function | None = None,
    every: float = 60.0,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Callable[[F], F]: ...
def cache_profile(
    func: Any = None,
    /,
    *,
    maxsize: int | None = 128,
    key: Function | None = None,
    every: float = 60.0,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Any:
    """Log whether functools.lru_cache(maxsize=...) would pay. Nothing is cached.

    maxsize: of the cache; None is replayed with room for 65,536 results.
    key: is called with the call's arguments and returns what the cache would go by;
        without it all of them, a method's `self` included, as lru_cache does it.
    every: seconds between two lines; one more comes at exit.
    logger, level: where the lines go.

    A line has, since the one before it: `calls`; `unhashable`, those that lru_cache
    would fail on; `distinct`, argument sets not seen before; `hits` and
    `hits_unbounded`, calls that a cache of this size and one without limit would have
    answered (none holds a call that raised); `total`, seconds spent in calls; `saved`,
    seconds of these spent in hits, each of which the cache itself would still take
    about 0.0000001 s for. A call inside of another one of the same function adds
    nothing to `total`, nor to `saved` if the outer one was a hit.

    No argument is kept, only hashes. So -1 and -2 count as the same, like their hashes,
    and beyond 16,384 distinct sets `distinct` and `hits_unbounded` are estimated from a
    sample, with a standard error of about 1 %: Flajolet, "On adaptive sampling"
    (Computing 43, 1990).

    Raises ValueError for options that make no sense, TypeError for no function.
    """

    def decorate(func: Function) -> Function:
        log = Log("cache_profile", func, logger, level)
        tally = CacheTally(every, log, None if maxsize is None else max(maxsize, 0))

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            try:
                what = key(*args, **kwargs) if key else (args, *kwargs.items())
                # The hash of a tuple is well mixed, that of a number is the number.
                return ReplayedCall(tally, hash((what,)))
            except Exception:  # noqa: BLE001 - a key= or __hash__ of the program's own
                return ReplayedCall(tally, None)

        return _wrap(func, begin)

    return (
        functools.partial(_apply, decorate) if func is None else _apply(decorate, func)
    )


class CacheTally(Tally):
    """The keys in an LRU cache, and what it would have been good for."""

    def __init__(self, every: float, log: Log, maxsize: int | None) -> None:
        self.maxsize = maxsize
        self.inside = threading.local()
        super().__init__(every, log)

    def restart(self) -> None:
        self.lock = threading.RLock()
        self.lru: OrderedDict[int, None] = OrderedDict()
        # The keys seen, and whether a call of theirs returned: first all of them, then
        # those that are a multiple of 2, of 4, ...
        self.seen: dict[int, bool] = {}
        self.step = 1
        self.returned = 0
        self.logged = (0, 0)
        self.counts: Counter[str] = Counter()
        self.total = self.saved = 0.0

    def look_up(self, key: int) -> bool:
        with self.lock:
            if found := key in self.lru:
                self.lru.move_to_end(key)
            return found

    def store(self, key: int, returned: bool) -> None:
        if key % self.step == 0:
            self.seen[key] = returned or self.seen.get(key, False)
            if len(self.seen) > SAMPLE:
                self.step *= 2
                self.seen = {k: r for k, r in self.seen.items() if k % self.step == 0}
        if returned:
            self.returned += 1
            self.lru[key] = None
            if len(self.lru) > (UNBOUNDED if self.maxsize is None else self.maxsize):
                self.lru.popitem(last=False)

    def take(self) -> dict[str, object] | None:
        counts, total, saved = self.counts, self.total, self.saved
        self.counts, self.total, self.saved = Counter(), 0.0, 0.0
        if not counts["calls"]:
            return None
        # Without limit, of the calls that returned each key's first is the only miss.
        distinct = len(self.seen) * self.step
        hits = self.returned - sum(self.seen.values()) * self.step
        before, self.logged = self.logged, (distinct, hits)
        return {
            "maxsize": self.maxsize,
            "calls": counts["calls"],
            "unhashable": counts["unhashable"],
            "distinct": distinct - before[0],
            "hits": counts["hits"],
            "hits_unbounded": hits - before[1],
            "total": _seconds(total),
            "saved": _seconds(saved),
        }


class ReplayedCall(TimedCall):
    """Looks its key up when it begins and stores it when it has returned."""

    # What this thread is inside of.
    NOTHING, A_MISS, A_HIT = range(3)

    def __init__(self, tally: CacheTally, key: int | None) -> None:
        """`key` is None for arguments that have no hash."""
        super().__init__()
        self.tally = tally
        self.key = key
        self.hit = key is not None and tally.look_up(key)
        self.outer = self.NOTHING

    def resume(self) -> Callable[[], object]:
        inside = self.tally.inside
        self.outer = getattr(inside, "what", self.NOTHING)
        inside.what = self.A_HIT if self.hit else max(self.outer, self.A_MISS)
        return super().resume()

    def suspend(self) -> None:
        super().suspend()
        self.tally.inside.what = self.outer

    def finish(self, raised: str | None) -> None:
        super().finish(raised)
        tally, hit = self.tally, self.hit and raised is None
        with tally.lock:
            tally.counts["calls"] += 1
            tally.counts["unhashable"] += self.key is None
            tally.counts["hits"] += hit
            if self.key is not None:
                tally.store(self.key, raised is None)
            if self.outer == self.NOTHING:
                tally.total += self.waited
            if hit and self.outer != self.A_HIT:
                tally.saved += self.waited
        if (now := perf_counter()) >= tally.due:
            tally.flush(now)


# --- profile --------------------------------------------------------------------------


@overload
def profile(func: F, /) -> F: ...
@overload
def profile(
    *,
    top: int = 20,
    slower_than: float = 0.0,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Callable[[F], F]: ...
def profile(
    func: Any = None,
    /,
    *,
    top: int = 20,
    slower_than: float = 0.0,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
) -> Any:
    """Run cProfile around the calls of a function, and log each profile completely.

    top: the number of functions logged as rows of text, those with the most cumulative
        time.
    slower_than: seconds; the profile of a faster call is thrown away.
    logger, level: where the lines go. While they would not be logged there, nothing is
        profiled.

    Behind the text come numbered lines with the profile itself, which `python
    decorators.py --pstats` puts together: the table of pstats in JSON, zlib and base64,
    with its SHA-256. A coroutine or generator is profiled only while its own code runs,
    so that other tasks are not blamed on it.

    In a process one call at a time is profiled. Calls that begin before it is over,
    inside of it or elsewhere, run without, and lines behind the profile say how many of
    which function. While a profiler of someone else is at work, calls run without, and
    one line says so. From Python 3.12 on, cProfile also records other threads, and
    raises ValueError when code inside of a profiled call starts it once more.

    Raises ValueError for options that make no sense, TypeError for no function.
    """
    if not slower_than >= 0 or top < 0:
        raise ValueError("top= and slower_than= must not be negative")

    def decorate(func: Function) -> Function:
        log = Log("profile", func, logger, level)
        told = False

        def begin(args: object, kwargs: object) -> Call:
            nonlocal told
            if not log.enabled():
                return Call()
            if not _profiling.lock.acquire(blocking=False):
                _profiling.skipped[log.name] += 1
                return Call()
            if _other_profiler():
                _profiling.lock.release()
                if not told:
                    log(skipped="another profiler is active")
                told = True
                return Call()
            return ProfiledCall(log, top, slower_than)

        return _wrap(func, begin)

    return (
        functools.partial(_apply, decorate) if func is None else _apply(decorate, func)
    )


class ProfilerInUse:
    """Locked while a call is profiled, with the calls that run without for that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.call: ProfiledCall | None = None
        self.skipped: Counter[str] = Counter()


_profiling = ProfilerInUse()


def _other_profiler() -> bool:
    # Up to 3.11 cProfile would push it aside, from 3.12 on it would raise ValueError.
    if sys.version_info >= (3, 12):
        tool = sys.monitoring.get_tool(sys.monitoring.PROFILER_ID)
    else:
        tool = None
    return tool is not None or sys.getprofile() is not None


class ProfiledCall(Call):
    def __init__(self, log: Log, top: int, slower_than: float) -> None:
        self.log = log
        self.top = top
        self.slower_than = slower_than
        self.profiler = cProfile.Profile()
        self.began: float | None = None
        self.in_use = _profiling
        self.in_use.call = self

    def resume(self) -> Callable[[], object] | None:
        if self.began is None:
            self.began = perf_counter()
        if _other_profiler():
            return None
        # The profiler's own method: one of ours would appear in the profile.
        stop = self.profiler.disable
        self.profiler.enable()
        return stop

    def give_up(self) -> None:
        self.slower_than = math.inf
        self.profiler.disable()

    def finish(self, raised: str | None) -> None:
        skipped, self.in_use.skipped = self.in_use.skipped, Counter()
        self.in_use.call = None
        self.in_use.lock.release()
        if self.began is None or perf_counter() - self.began < self.slower_than:
            return
        _log_profile(self.log, self.profiler, self.top)
        for name, calls in skipped.items():
            self.log(skipped=name, calls=calls)


def _log_profile(log: Log, profiler: cProfile.Profile, top: int) -> None:
    profile_id = os.urandom(6).hex()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(top)
    for row in text.getvalue().splitlines():
        if row.strip():
            log(id=profile_id, top=_short(row))
    profiler.create_stats()
    packed = _pack(profiler.stats)
    checksum = hashlib.sha256(packed).hexdigest()
    data = base64.b64encode(packed).decode()

    def part(number: int, count: int, data: str) -> dict[str, object]:
        numbers = {"part": number, "parts": count}
        return {"id": profile_id, **numbers, "sha256": checksum, "data": data}

    size = LINE - len(log.text(**part(PARTS, PARTS, "")))
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    if len(parts) > PARTS:
        log(id=profile_id, skipped="the profile is too large for a log")
        return
    for number, piece in enumerate(parts, start=1):
        log(**part(number, len(parts), piece))


def _pack(stats: Stats) -> bytes:
    """A profile as JSON: to unpack marshal, pstats' format, from a log is not safe."""
    number = {function: n for n, function in enumerate(stats)}
    rows = [
        [*function, *times, [[number[caller], *callers[caller]] for caller in callers]]
        for function, (*times, callers) in stats.items()
    ]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode())


def _unpack(packed: bytes) -> Stats:
    """The profile again. Raises ValueError, TypeError, IndexError or zlib.error."""
    # JSON of which something is missing is no JSON.
    rows = json.loads(zlib.decompressobj().decompress(packed, PROFILE))
    functions = [
        (_text(file), _count(line), _text(name)) for file, line, name, *_ in rows
    ]
    return {
        function: (
            *_times(*times),
            {functions[_count(n)]: _times(*theirs) for n, *theirs in callers},
        )
        for function, (_, _, _, *times, callers) in zip(functions, rows)
    }


def _times(
    calls: object, more: object, own: object, cumulative: object
) -> tuple[int, int, float, float]:
    return _count(calls), _count(more), _number(own), _number(cumulative)


# --- reading logs ---------------------------------------------------------------------

# In a log that is itself JSON, our line is in a string and has its quotes escaped.
MARK = re.compile(rb'(?<!\w)(timeit|cache_profile|profile) (?={\\*"name\\*": )')
DECODER = json.JSONDecoder()


def read_log(path: str) -> Iterator[bytes]:
    """The lines of a log, plain or gzip. Raises OSError, EOFError or zlib.error."""
    with open(0 if path == "-" else path, "rb", closefd=path != "-") as plain:
        packed = plain.peek(2)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=plain) if packed else plain
        yield from iter(functools.partial(stream.readline, LONGEST_LINE), b"")


def parse(line: bytes) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Our lines in a line of a log as (name, json), with None for damaged json.

    There is none or one, or more if lines ran into each other.
    """
    if b'{"name": ' not in line and b'"name\\' not in line:
        return
    for match in MARK.finditer(line):
        text = line[match.end() :].decode("ascii", "replace")
        try:
            while text.startswith("{\\"):
                text, _ = DECODER.raw_decode('"' + text)
            record, _ = DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            record = None
        yield match[1].decode(), record


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("not a text")


def _count(value: object, least: int = 0) -> int:
    if type(value) is int and least <= value < 10**15:
        return value
    raise ValueError("not a count, or an absurd one")


def _number(value: object) -> float:
    if isinstance(value, float) and 0 <= value < 1e15:
        return value
    return _count(value)


class Times:
    """The calls of one function, from lines of timeit."""

    def __init__(self) -> None:
        self.durations = Durations()
        self.pending: list[float] = []
        self.errors = 0
        self.cpu = 0.0
        self.cpu_of = 0.0  # the seconds of the calls that `cpu` is the time of
        self.partly = False

    def add(self, record: dict[str, Any]) -> None:
        if "buckets" in record:
            errors, packed = _count(record["errors"]), map(_count, record["buckets"])
            total, longest = _number(record["total"]), _number(record["max"])
            self.durations.merge(_count(record["calls"]), total, longest, list(packed))
            self.errors += errors
            return
        seconds, raised = _number(record["seconds"]), record["raised"]
        if "cpu" in record:
            self.cpu += _number(record["cpu"])
            self.cpu_of += seconds
        self.errors += raised is not None
        self.partly |= "slower_than" in record
        self.pending.append(seconds)
        if len(self.pending) >= BATCH:
            self.fold()

    def fold(self) -> None:
        if self.pending:
            self.durations.add(self.pending)
            self.pending.clear()

    def figures(self) -> dict[str, Any]:
        self.fold()
        counts = {"calls": self.durations.calls, "errors": self.errors}
        cpu = self.cpu if self.cpu_of else None
        return {**counts, **self.durations.figures(), "cpu": cpu}


@dataclass
class OpenProfile:
    """A profile of which lines are missing."""

    count: int
    sha256: str
    parts: dict[int, str] = field(default_factory=dict)


class Report:
    """What lines of any logs, in any order, say about functions, caches and profiles."""

    def __init__(self, folder: Path | None) -> None:
        """With a folder, complete profiles are written there. Raises OSError."""
        self.times: dict[str, Times] = {}
        self.caches: dict[tuple[str, int | None], Counter[str]] = {}
        self.profiles: dict[tuple[str, str], bool] = {}  # (name, id): is it complete?
        self.open: dict[tuple[str, str], OpenProfile] = {}
        self.written: dict[tuple[str, str], Path] = {}
        self.damaged = 0
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, line: bytes) -> None:
        """Raises OSError if a profile cannot be written."""
        for kind, record in parse(line):
            try:
                self.add(kind, record or {})
            except (ValueError, TypeError, KeyError):
                self.damaged += 1

    def add(self, kind: str, record: dict[str, Any]) -> None:
        name = _text(record["name"])
        if kind == "timeit":
            times = self.times.get(name) or Times()
            times.add(record)
            self.times[name] = times
        elif kind == "cache_profile":
            size = None if record["maxsize"] is None else _count(record["maxsize"])
            sums: dict[str, Any] = {k: _number(record[k]) for k in ("total", "saved")}
            for key in ("calls", "unhashable", "hits"):
                sums[key] = _count(record[key])
            for key in ("distinct", "hits_unbounded"):
                # The difference of two estimates may be negative.
                sums[key] = _count(record[key], least=-(10**15))
            self.caches.setdefault((name, size), Counter()).update(sums)
        elif "id" in record:
            self.add_profile((name, _text(record["id"])), record)

    def add_profile(self, key: tuple[str, str], record: dict[str, Any]) -> None:
        if not re.fullmatch("[0-9a-f]{12}", key[1]):
            raise ValueError("not an id")
        if self.profiles.setdefault(key, False) or "part" not in record:
            return
        part, count = _count(record["part"]), _count(record["parts"])
        sha256, data = _text(record["sha256"]), _text(record["data"])
        if not 1 <= part <= count <= PARTS or len(data) > LINE:
            raise ValueError("not a part of a profile")
        # Now it is the last; the first is the one that was silent for longest.
        profile = self.open.pop(key, None) or OpenProfile(count, sha256)
        self.open[key] = profile
        if (profile.count, profile.sha256) != (count, sha256):
            raise ValueError("not a part of this profile")
        profile.parts[part] = data
        if len(profile.parts) == count:
            del self.open[key]
            self.profiles[key] = self.complete(key, profile)
        elif len(self.open) > OPEN_PROFILES:
            del self.open[next(iter(self.open))]

    def complete(self, key: tuple[str, str], profile: OpenProfile) -> bool:
        """Check a profile and write it. Raises OSError."""
        data = "".join(data for _, data in sorted(profile.parts.items()))
        try:
            packed = base64.b64decode(data, validate=True)
            if hashlib.sha256(packed).hexdigest() != profile.sha256:
                return False
            stats = marshal.dumps(_unpack(packed)) if self.folder else b""
        except (ValueError, TypeError, IndexError, RecursionError, zlib.error):
            return False
        if self.folder:
            # The name comes from a log, and must not lead out of the folder.
            name = re.sub(r"[^A-Za-z0-9_.]", "_", key[0])[:100]
            self.written[key] = self.folder / f"{name}-{key[1]}.pstats"
            self.written[key].write_bytes(stats)
        return True

    def figures(self, sort: str, top: int | None) -> dict[str, list[Any]]:
        """What --json prints. A table without the figure `sort` has its usual order."""
        times = [
            {"name": name, **times.figures()} for name, times in self.times.items()
        ]
        caches: list[dict[str, Any]] = [
            {
                "name": name,
                "maxsize": size,
                "calls": sums["calls"],
                "distinct": sums["distinct"],
                "hit_ratio": sums["hits"] / max(sums["calls"], 1),
                "hit_ratio_unbounded": sums["hits_unbounded"] / max(sums["calls"], 1),
                "total": sums["total"],
                "saved": sums["saved"],
            }
            for (name, size), sums in self.caches.items()
        ]
        profiles = [
            {"name": name, "id": profile_id, "complete": complete}
            for (name, profile_id), complete in self.profiles.items()
        ]
        times.sort(key=lambda row: row.get(sort, row["total"]), reverse=True)
        caches.sort(key=lambda row: row.get(sort, row["saved"]), reverse=True)
        return {"functions": times[:top], "caches": caches[:top], "profiles": profiles}

    def tables(self, figures: dict[str, list[Any]]) -> Iterator[str]:
        """The same for people."""
        rows = [["calls", "total", "mean", "p50", "p95", "max", "errors", "CPU"]]
        rows[0].append("function")
        for row in figures["functions"]:
            times = self.times[row["name"]]
            keys: tuple[str, ...] = ("total", "mean", "p50", "p95", "max")
            cpu = f"{times.cpu / times.cpu_of:.0%}" if times.cpu_of else "-"
            name = _printable(row["name"]) + " *" * times.partly
            durations = (_duration(row[key]) for key in keys)
            rows.append([str(row["calls"]), *durations, str(row["errors"]), cpu, name])
        yield from _table("functions", rows)
        if any(self.times[row["name"]].partly for row in figures["functions"]):
            yield "* without the calls that were faster than slower_than=\n"

        rows = [["calls", "distinct", "unhashable", "hits", "unbounded", "total"]]
        rows[0] += ["saved", "maxsize", "function"]
        for row in figures["caches"]:
            unhashable = self.caches[row["name"], row["maxsize"]]["unhashable"]
            counts = (str(row["calls"]), str(row["distinct"]), str(unhashable))
            keys = ("hit_ratio", "hit_ratio_unbounded")
            ratios = (f"{row[key]:.1%}" for key in keys)
            times_ = (_duration(row["total"]), _duration(row["saved"]))
            name = _printable(row["name"])
            rows.append([*counts, *ratios, *times_, str(row["maxsize"]), name])
        yield from _table("cache candidates", rows)

        rows = [["id", "function"]]
        for row in figures["profiles"]:
            path = self.written.get((row["name"], row["id"]), "")
            state = path if row["complete"] else "(damaged or incomplete)"
            rows.append([row["id"], _printable(f"{row['name']}  {state}".rstrip())])
        yield from _table("profiles", rows)


def _table(title: str, rows: list[list[str]]) -> Iterator[str]:
    """Columns of figures, aligned to the right, and a last one of names."""
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows)][:-1]
        yield f"== {title}"
        for row in rows:
            yield "  ".join([*map(str.rjust, row, widths), row[-1]])
        yield ""


def _duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 1:
            break
    return f"{seconds * scale:.{3 if seconds < 1000 else 7}g} {unit}"


def _printable(text: str) -> str:
    """A text from a log, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- the command line -----------------------------------------------------------------

DEMO = '''\
"""A small shop with its suspects decorated."""

import asyncio
import logging
import time

from decorators import cache_profile, profile, timeit

form = "%(asctime)s %(levelname)s %(message)s"
logging.basicConfig(filename="shop.log", level=logging.INFO, format=form)


@timeit
@cache_profile(maxsize=16)
def exchange_rate(currency):
    """Asks a slow service about the same few currencies all the time."""
    time.sleep(0.004)
    return {"EUR": 1.0, "USD": 1.1, "JPY": 160.0}[currency]


@timeit(every=60)
def tax(cents):
    """Is quick, but called very often."""
    return cents * 19 // 100


@timeit
def invoice(order):
    """Computes rather than waits."""
    return sum(tax(cents) for cents in range(order * 100))


@timeit(slower_than=0.03)
async def ship(order):
    """Waits, and with every twentieth order for long."""
    await asyncio.sleep(0.002 if order % 20 else 0.04)


@profile(slower_than=0.04)
async def handle(order):
    exchange_rate(("EUR", "USD", "JPY")[order % 3])
    invoice(order)
    await ship(order)


async def main():
    for order in range(1, 61):
        logging.info("order %d", order)
        await handle(order)


asyncio.run(main())
'''


def run_demo() -> str:
    """Run DEMO beside a copy of this file, as on a server. Returns its log."""
    folder = Path(tempfile.mkdtemp(prefix="decorators-demo-"))
    shutil.copy(__file__, folder / "decorators.py")
    (folder / "shop.py").write_text(DEMO, encoding="utf-8")
    subprocess.run([sys.executable, "shop.py"], cwd=folder, check=True)
    _say(f"ran {folder / 'shop.py'}, this is what {folder / 'shop.log'} says:")
    return str(folder / "shop.log")


def _say(text: str) -> None:
    print(f"decorators.py: {_printable(text)}", file=sys.stderr)


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Find the slow functions in what timeit, cache_profile and profile "
        "have logged.",
        epilog="exit status: 0 something was found, 1 nothing was, 2 bad arguments or "
        "a file that could not be read or written, 130 interrupted",
    )
    add = parser.add_argument
    add("log", nargs="*", metavar="LOG", help="plain or gzip; - for standard input")
    sorts = ("total", "mean", "p95", "max", "calls", "saved")
    add(
        "--sort",
        choices=sorts,
        default="",
        help="default: functions by total, caches by saved",
    )
    add("--json", action="store_true", help="for machines, times in seconds")
    add("--pstats", type=Path, metavar="FOLDER", help="write the profiles there")
    add("--top", type=_positive, metavar="N", help="the first N functions and caches")
    add("--demo", action="store_true", help="decorate, run and report a small program")
    args = parser.parse_args(argv)
    if bool(args.log) == args.demo:
        parser.error("give one or more logs, or --demo alone")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _report(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `| head` has seen enough; the flush at exit must not fail once more.
        _discard_output()
        return 0
    except OSError as error:  # such as a full disk
        _discard_output()
        _say(f"standard output: {error.strerror}")
        return 2


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(args: argparse.Namespace) -> int:
    status = 0
    try:
        report = Report(args.pstats)
        logs = [run_demo()] if args.demo else args.log
    except (OSError, subprocess.SubprocessError) as error:
        _say(_reason(error))
        return 2
    for log in logs:
        try:
            for line in read_log(log):
                report.read(line)
        except (OSError, EOFError, zlib.error) as error:
            _say(f"{log}: {getattr(error, 'strerror', None) or error}")
            status = 2
    if report.damaged:
        _say(f"damaged lines left out: {report.damaged}")
    for (name, profile_id), complete in report.profiles.items():
        if not complete:
            _say(f"profile {profile_id} of {name} is damaged or incomplete")
    figures = report.figures(args.sort, args.top)
    if args.json:
        print(json.dumps(figures, indent=2), flush=True)
    else:
        print(*report.tables(figures), sep="\n", end="", flush=True)
    if not any(figures.values()):
        _say("nothing found of timeit, cache_profile or profile")
    return status or int(not any(figures.values()))


if __name__ == "__main__":
    raise SystemExit(main())
