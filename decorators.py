"""Find the slow functions of a program when all you get is its log.

Standard library only: copy this one file to the server.

1. Sample everything. In the program's main:

    import logging
    from decorators import start_sampling

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start_sampling()              # look at all threads 100 times per second

2. Decorate what the samples point to:

    @timeit                       # a line per call: seconds, processor time, exception
    def load(path): ...

    @timeit(slower_than=0.1)      # only the calls that took 0.1 s or more
    async def fetch(url): ...

    @timeit(every=60)             # for hot functions: a line per minute
    def parse(line): ...

    @cache_profile(maxsize=1000)  # would functools.lru_cache(maxsize=1000) pay off?
    def price(article, country): ...

    @profile(slower_than=1.0)     # cProfile around the call, the whole profile in the log
    async def handle(request): ...

3. Read the logs:

    python decorators.py app.log app.log.1 app.log.2.gz
    python decorators.py --collapsed out.txt app.log   # for flamegraph.pl, speedscope
    python decorators.py --pstats profiles app.log     # for pstats, snakeviz, gprof2dot
    python decorators.py --demo                        # all of this on a small program

The lines go to the logger named after this module, at level INFO. Each is `KIND {json}`
in ASCII, is shorter than 4 KB, and never contains the value of an argument.

The decorators work on functions, methods, class and static methods, coroutines,
generators and asynchronous generators. They preserve results, exceptions, cancellation,
signature and kind. Three differences are visible: a call takes a few more stack frames;
wrong arguments for a generator or coroutine raise at its first step; a generator into
which GeneratorExit is thrown is closed.

Counts (timeit(every=), cache_profile, sampling) are logged once per interval and at exit,
by the sampling thread or by the first call after the interval; each line takes about
0.2 ms. A killed process logs nothing at exit: call flush() where a server handles SIGTERM.

Forked and spawned children count for themselves. As always with logging in several
threads, a child that is forked while another thread writes a line may hang when it logs.

DECORATORS=off in the environment switches everything off.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import cProfile
import functools
import gc
import gzip
import inspect
import io
import json
import logging
import marshal
import math
import os
import pstats
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, cast, overload

logger = logging.getLogger(__name__)

MAX_LINE_LENGTH = 3500  # under 4 KB with the application's own prefix
MAX_TEXT_LENGTH = 400  # of a name or a path, in JSON
BATCH_SIZE = 1024  # calls that are counted together
UNBOUNDED = 1 << 16  # argument sets that the model of an unbounded cache remembers
MAX_DEPTH = 80  # frames of a sampled stack
MAX_STACKS = 5000  # different stacks per interval
MAX_LOGGED_STACKS = 300
MAX_PROFILE_SIZE = 1 << 24  # bytes, unpacked; a log is untrusted input
MAX_READ_SIZE = 1 << 16  # bytes of a line of a log

OFF = os.environ.get("DECORATORS") == "off"

Function = Callable[..., Any]
F = TypeVar("F", bound="Function | classmethod[Any, ..., Any]")
P = ParamSpec("P")
Record = dict[str, Any]


# --- the decorators -------------------------------------------------------------------


class Decorator(Protocol[P]):
    """Is used with or without options, and keeps the type of what it decorates."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Callable[[F], F]: ...
    @overload
    def __call__(self, func: F, /) -> F: ...


def _decorator(wrap: Callable[Concatenate[Function, P], Function]) -> Decorator[P]:
    @functools.wraps(wrap)
    def decorate(func: Any = None, /, **options: Any) -> Any:
        if func is None:
            return functools.partial(decorate, **options)
        if isinstance(func, (classmethod, staticmethod)):
            return type(func)(decorate(func.__func__, **options))
        if isinstance(func, type) or not callable(func):
            kind = type(func).__name__
            raise TypeError(f"decorate functions and methods, not a {kind} object")
        return func if OFF else cast(Any, wrap)(func, **options)

    return cast("Decorator[P]", decorate)


@_decorator
def timeit(
    func: Function,
    /,
    *,
    slower_than: float = 0.0,
    every: float | None = None,
    logger: logging.Logger | None = None,
    level: int | str = logging.INFO,
) -> Function:
    """Log how long the calls of a function take.

    slower_than: seconds; faster calls are not logged, and the reader's table says so.
    every: seconds; log one line per interval instead of one per call, in constant memory:
        calls, errors, total, mean, p50, p95, p99, max and a histogram. There is no `cpu`,
        because reading that clock takes longer than everything else together.
    logger, level: where the lines go. Without `every`, nothing is measured while that
        logger is disabled for that level.

    The line of a call has `seconds`, the time its caller waited; `inside`, the part of it
    in which the call's own code ran (and blocked the event loop, if there is one); `cpu`,
    the processor time of that part, far below `inside` if the code blocks; and `raised`,
    the name of an exception or null. The caller of a coroutine waits until it has finished,
    that of a generator waits for each item. Recursive calls each count in full.

    Raises ValueError for invalid options, TypeError for anything but a function.
    """
    if not slower_than >= 0 or (slower_than and every is not None):
        raise ValueError("slower_than= must be 0 or more seconds, and not with every=")
    log = Log("timeit", func, logger, level)
    if every is not None:
        return _time_in_batches(func, TimeTally(log, every))
    limit = {"slower_than": slower_than} if slower_than else {}

    def begin(args: object, kwargs: object) -> Call | None:
        return Call(record, thread_time_ns) if log.enabled() else None

    def record(call: Call, raised: str | None) -> None:
        seconds, inside, cpu = call.waited / 1e9, call.inside / 1e9, call.cpu / 1e9
        if seconds >= slower_than:
            log(seconds=seconds, inside=inside, cpu=cpu, raised=raised, **limit)

    return _wrap(func, begin)


def _time_in_batches(func: Function, tally: TimeTally) -> Function:
    pending, append = tally.pending, tally.pending.append

    def begin(args: object, kwargs: object) -> Call:
        return Call(record)

    def record(call: Call, raised: str | None) -> None:
        tally.add((call.waited, call.inside, raised is not None))

    def plain(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter_ns()
        try:
            result = func(*args, **kwargs)
        except BaseException:
            tally.add((perf_counter_ns() - start, 0, True))
            raise
        now = perf_counter_ns()
        append(now - start)
        if now >= tally.due or len(pending) >= BATCH_SIZE:
            _flush_due(now)
        return result

    return _wrap(func, begin, tally, plain)


@_decorator
def cache_profile(
    func: Function,
    /,
    *,
    maxsize: int | None = 128,
    key: Function | None = None,
    every: float = 60.0,
    logger: logging.Logger | None = None,
    level: int | str = logging.INFO,
) -> Function:
    """Log whether functools.lru_cache(maxsize=...) would pay off. Nothing is cached.

    maxsize: the size of the cache; None stands for 65,536.
    key: a function that takes the call's arguments and returns the cache key. By default,
        the key is all arguments, including a method's `self`, as in lru_cache.
    every: seconds between two lines.
    logger, level: where the lines go.

    A line counts, since the one before it, `calls`; `unhashable`, calls that would fail
    with lru_cache; `distinct`, argument sets not seen before; `hits` and `hits_unbounded`,
    the hits of a cache of this size and of an unbounded one (calls that raise are never
    hits); `total`, the seconds spent in calls; and `saved`, those spent in hits.

    The hash of the arguments is looked up in an lru_cache when the call has ended. So the
    second of two concurrent equal calls is a hit, the recursive calls inside a hit also
    count, and arguments with equal hashes, such as -1 and -2, are the same.

    Raises ValueError for invalid options, TypeError for anything but a function.
    """
    tally = CacheTally(Log("cache_profile", func, logger, level), every, maxsize)

    def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if _own.busy:
            return None
        hashed = None
        # __hash__ and `key` may raise, and may call decorated functions.
        _own.busy = True
        try:
            hashed = hash(key(*args, **kwargs) if key else (args, *kwargs.items()))
        except Exception:  # noqa: BLE001, S110 - it counts as unhashable
            pass
        finally:
            _own.busy = False
        return Call(functools.partial(record, hashed))

    def record(hashed: int | None, call: Call, raised: str | None) -> None:
        tally.add((hashed, call.waited, raised is None))

    return _wrap(func, begin, tally)


@_decorator
def profile(
    func: Function,
    /,
    *,
    slower_than: float = 0.0,
    every: float = 0.0,
    logger: logging.Logger | None = None,
    level: int | str = logging.INFO,
) -> Function:
    """Run calls of a function under cProfile, and log each profile in full.

    slower_than: seconds; profiles of faster calls are discarded.
    every: seconds without profiling after a call whose profile is logged. Logging one of
        350 functions takes the caller about 10 ms, and up to 25 KB of the log.
    logger, level: where the lines go. Nothing is profiled while that logger is disabled
        for that level.

    The numbered lines of a profile contain the table of pstats as JSON, compressed with
    zlib and encoded in base64. A coroutine or generator is profiled only while its own code
    runs, so other tasks do not appear in its profile. Decorated functions that it calls
    appear with the code of their decorators.

    A process profiles one call at a time. Calls that begin meanwhile, or while another
    profiler is active, are not profiled; a line per minute counts them. Since Python 3.12,
    cProfile also records other threads, and starting it inside a profiled call raises
    ValueError.

    Raises ValueError for invalid options, TypeError for anything but a function.
    """
    if not slower_than >= 0 or not every >= 0:
        raise ValueError("slower_than= and every= must be 0 or more seconds")
    log = Log("profile", func, logger, level)
    skipped = SkipTally(log, 60.0)
    next_due = -math.inf

    def begin(args: object, kwargs: object) -> Call | None:
        if not log.enabled() or perf_counter_ns() < next_due:
            return None
        if not (lock := _profiling).acquire(blocking=False):
            skipped.add("another call was being profiled")
            return None
        return ProfiledCall(functools.partial(record, lock))

    def record(lock: threading.Lock, call: ProfiledCall, raised: str | None) -> None:
        nonlocal next_due
        slow = call.profiled and call.waited >= slower_than * 1e9
        if slow:  # before another thread can begin to profile
            next_due = perf_counter_ns() + every * 1e9
        lock.release()
        if slow:
            _log_profile(log, call.waited / 1e9, call.profiler)
        elif not call.profiled:
            skipped.add("another profiler was active")

    return _wrap(func, begin, skipped)


_profiling = threading.Lock()  # held while a call is profiled


def _log_profile(log: Log, seconds: float, profiler: cProfile.Profile) -> None:
    # pstats' own format is marshal, which is unsafe to load from a log.
    stats: dict[Any, Any] = cast(Any, pstats.Stats(profiler)).stats
    table = [
        [*function, *times, [[*caller, *their] for caller, their in callers.items()]]
        for function, (*times, callers) in stats.items()
    ]
    data = base64.b64encode(zlib.compress(json.dumps(table).encode())).decode()
    head = {"id": os.urandom(6).hex(), "seconds": seconds}
    size = MAX_LINE_LENGTH - len(log.text(**head, part=10**6, parts=10**6, data=""))
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    for number, part in enumerate(parts, start=1):
        log(**head, part=number, parts=len(parts), data=part)


# --- one call, of any kind of function ------------------------------------------------


class Call:
    """One call, measured in ns: `waited` by the caller, `inside` and `cpu` of its code.

    The code of a coroutine or generator is suspended while it awaits something, or while
    its caller uses an item. So each of its `steps` is measured: `await` and `yield from`
    forward send(), throw() and close() to this object (PEP 380).
    """

    steps: Any = None
    delivers = False  # does each step give the caller an item?
    waited = inside = cpu = 0
    resumed = 0  # when the code began to run
    requested = 0  # when the caller began to wait; 0 if it does not

    def __init__(
        self,
        record: Callable[[Any, str | None], None] = lambda call, raised: None,
        cpu_clock: Callable[[], int] = int,  # int() is 0
    ) -> None:
        """`record` gets the finished call and the name of its exception."""
        self.record, self.cpu_clock = record, cpu_clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.deliver()
        # GeneratorExit means that the caller needs no more items: no error.
        failed = kind is not None and kind is not GeneratorExit
        self.record(self, _short(kind.__name__) if kind and failed else None)

    def __iter__(self) -> Self:
        return self

    __await__ = __iter__

    def __next__(self) -> Any:
        return self.step(self.steps.send, None)

    def send(self, value: Any) -> Any:
        return self.step(self.steps.send, value)

    def throw(self, *error: Any) -> Any:
        try:
            return self.step(self.steps.throw, *error)
        finally:
            del error  # as in step()

    def close(self) -> None:
        self.step(self.steps.close)

    def step(self, run: Function, *args: Any, **kwargs: Any) -> Any:
        self.resume()
        try:
            return run(*args, **kwargs)
        except BaseException:
            self.steps = None
            raise
        finally:
            self.suspend()
            if self.delivers:
                self.deliver()
            # An exception's traceback refers to this frame: avoid a reference cycle.
            del run, args, kwargs

    def resume(self) -> None:
        self.cpu -= self.cpu_clock()
        self.resumed = perf_counter_ns()
        self.requested = self.requested or self.resumed

    def suspend(self) -> None:
        self.inside += perf_counter_ns() - self.resumed
        self.cpu += self.cpu_clock()

    def deliver(self) -> None:
        """The caller gets its item or its result."""
        if self.requested:
            self.waited += perf_counter_ns() - self.requested
            self.requested = 0


class ProfiledCall(Call):
    """Runs cProfile while the code runs, unless another profiler is active."""

    profiled = False

    def __init__(self, record: Callable[[Any, str | None], None]) -> None:
        super().__init__(record)
        self.profiler = cProfile.Profile()

    def resume(self) -> None:
        super().resume()
        self.suspend = int  # type: ignore[method-assign, assignment] # does nothing
        # Up to 3.11 cProfile would replace another profiler; from 3.12 on it raises.
        if sys.getprofile() is None:
            try:
                self.profiler.enable()
            except ValueError:
                return
            self.profiled = True
            # The bound method itself: a function of ours would appear in the profile.
            self.suspend = self.profiler.disable  # type: ignore[method-assign]


def _wrap(
    func: Function,
    begin: Callable[[tuple[Any, ...], dict[str, Any]], Call | None],
    tally: Tally | None = None,
    plain: Function | None = None,
) -> Function:
    """Return a function of the same kind as `func` whose calls are measured.

    `begin` returns None for calls that are not measured. `plain` is a faster wrapper for
    plain functions.
    """

    def function(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        with call:
            return call.step(func, *args, **kwargs)

    def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with begin(args, kwargs) or Call() as call:
            call.steps, call.delivers = func(*args, **kwargs), True
            del args, kwargs  # so that the function can release them
            return (yield from call)

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) or Call() as call:
            call.steps = func(*args, **kwargs).__await__()
            del args, kwargs
            return await call

    async def async_generator(*args: Any, **kwargs: Any) -> Any:
        items = func(*args, **kwargs)
        with begin(args, kwargs) or Call() as call:
            del args, kwargs
            call.steps = items.asend(None)
            while True:
                try:
                    # In a list, to keep no reference while the caller uses it.
                    item = [await call]
                except StopAsyncIteration:
                    return
                call.deliver()
                try:
                    call.steps = items.asend((yield item.pop()))
                except BaseException as error:  # noqa: BLE001 - aclose(), too
                    call.steps = items.athrow(error)

    wrapper: Function = plain or function
    if inspect.iscoroutinefunction(func):
        wrapper = coroutine
    elif inspect.isasyncgenfunction(func):
        wrapper = async_generator
    elif inspect.isgeneratorfunction(func):
        wrapper = generator
        if _innermost(func).__code__.co_flags & inspect.CO_ITERABLE_COROUTINE:
            wrapper = types.coroutine(generator)
    functools.update_wrapper(wrapper, func)
    if tally:
        weakref.finalize(wrapper, tally.retire)
    for name in ("cache_clear", "cache_info", "cache_parameters"):
        if hasattr(func, name):
            setattr(wrapper, name, getattr(func, name))
    return wrapper


# --- counts that are logged once per interval -----------------------------------------


class Tally:
    """What has been counted since the last line.

    Calls append to `pending`, which needs no lock. The call that fills a batch, or finds
    that a line is due, counts and logs.
    """

    def __init__(self, log: Log, every: float) -> None:
        if not every > 0:
            raise ValueError("every= must be a number of seconds greater than 0")
        self.log, self.every = log, every
        self.pending: list[Any] = []
        self.restart()
        _tallies.append(self)

    def restart(self) -> None:
        """Start at zero, as a forked child does: its parent logs the calls before."""
        self.lock = threading.Lock()
        self.due = perf_counter_ns() + int(self.every * 1e9)
        self.pending.clear()
        self.clear()

    def clear(self) -> None:
        self.counts: Counter[Any] = Counter()

    def count(self, batch: list[Any]) -> None:
        self.counts.update(batch)

    def lines(self) -> Iterable[Record]:
        raise NotImplementedError

    def add(self, item: object) -> None:
        self.pending.append(item)
        now = perf_counter_ns()
        if now >= self.due or len(self.pending) >= BATCH_SIZE:
            _flush_due(now)

    def flush(self, now: float) -> None:
        # Another thread is flushing, or this thread is, further up the stack.
        if _own.busy or not self.lock.acquire(blocking=False):
            return
        lines: list[Record] = []
        try:
            batch = self.pending[:]
            del self.pending[: len(batch)]
            if batch:
                self.count(batch)
            if now >= self.due:
                self.due = perf_counter_ns() + int(self.every * 1e9)
                lines.extend(self.lines())
                self.clear()
        finally:
            self.lock.release()
        for line in lines:
            self.log(**line)

    def retire(self) -> None:
        """Log the remaining counts of a function that is garbage collected."""
        _tallies.remove(self)
        self.flush(math.inf)


_tallies: list[Tally] = []


def _flush_due(now: float) -> None:
    # All of them: the next call of a rarely called function may be hours away.
    for tally in _tallies[:]:
        if now >= tally.due or len(tally.pending) >= BATCH_SIZE:
            tally.flush(now)


class TimeTally(Tally):
    """Counts (ns, ns inside, did it raise?), or only ns for a plain call that returned."""

    def clear(self) -> None:
        self.times = Times()

    def count(self, batch: list[int | tuple[int, int, bool]]) -> None:
        # Many calls of a hot function take equally long.
        for item, n in Counter(batch).items():
            ns, inside, raised = item if isinstance(item, tuple) else (item, 0, False)
            self.times.add(ns, n, n * raised)
            self.times.inside += n * inside

    def lines(self) -> Iterator[Record]:
        if self.times.calls:
            yield self.times.line()


CACHE_COUNTS = ("calls", "unhashable", "distinct", "hits", "hits_unbounded")
CACHE_TIMES = ("total", "saved")


class CacheTally(Tally):
    """Counts (hash of the arguments or None, ns, did it return?)."""

    def __init__(self, log: Log, every: float, maxsize: int | None) -> None:
        self.maxsize = maxsize
        size = UNBOUNDED if maxsize is None else maxsize
        self.missed: list[int] = []
        self.bounded = functools.lru_cache(size)(self.missed.append)
        self.unbounded = functools.lru_cache(max(size, UNBOUNDED))(self.missed.append)
        super().__init__(log, every)

    def count(self, batch: list[tuple[int | None, int, bool]]) -> None:
        counts = self.counts
        for hashed, ns, returned in batch:
            counts["calls"] += 1
            counts["total"] += ns
            if hashed is None:
                counts["unhashable"] += 1
            elif returned:
                if self.is_hit(self.bounded, hashed):
                    counts["hits"] += 1
                    counts["saved"] += ns
                known = self.is_hit(self.unbounded, hashed)
                counts["hits_unbounded" if known else "distinct"] += 1

    def is_hit(self, cache: Callable[[int], None], hashed: int) -> bool:
        self.missed.clear()
        cache(hashed)
        return not self.missed

    def lines(self) -> Iterator[Record]:
        counts = {key: self.counts[key] for key in CACHE_COUNTS}
        if counts["calls"]:
            times = {key: self.counts[key] / 1e9 for key in CACHE_TIMES}
            yield {"maxsize": self.maxsize, **counts, **times}


class SkipTally(Tally):
    """Counts the reasons why calls were not profiled."""

    def lines(self) -> Iterator[Record]:
        for reason, calls in self.counts.items():
            yield {"skipped": reason, "calls": calls}


class Times:
    """How long calls took, in ns and in constant memory.

    The histogram has 8 logarithmic buckets per power of two: 278 from 128 ns to an hour,
    which fit into a line. So a quantile is at most 4.5 % off, and adding histograms loses
    nothing, as in Masson, Rim, Lee, "DDSketch" (VLDB 2019). Number, sum and maximum are
    exact.
    """

    def __init__(self) -> None:
        self.calls = self.errors = self.total = self.max = 0
        self.buckets: Counter[int] = Counter()
        self.cpu = self.inside = 0  # parts of the total
        self.with_cpu = self.with_inside = 0  # the total of the calls that have them
        self.partly = False  # calls faster than slower_than= are missing

    def add(self, ns: int, calls: int = 1, errors: int = 0) -> None:
        """Add calls that took equally long."""
        self.calls += calls
        self.errors += errors
        self.total += calls * ns
        self.max = max(self.max, ns)
        self.buckets[int(8 * math.log2(max(128, ns)))] += calls

    def quantile(self, q: float) -> float:
        """The ns that a share `q` of the calls did not exceed."""
        rank = math.ceil(q * self.calls)
        for bucket, n in sorted(self.buckets.items()):
            rank -= n
            if rank <= 0:
                return min(2 ** ((bucket + 0.5) / 8), self.max)
        return self.max

    def figures(self) -> Record:
        """Times in seconds."""
        return {
            "calls": self.calls,
            "errors": self.errors,
            "total": self.total / 1e9,
            "mean": self.total / max(self.calls, 1) / 1e9,
            **{f"p{q}": self.quantile(q / 100) / 1e9 for q in (50, 95, 99)},
            "max": self.max / 1e9,
        }

    def line(self) -> Record:
        """What timeit(every=) logs. `histogram` is [first bucket, calls in it, ...]."""
        first, last = min(self.buckets), max(self.buckets)
        histogram = [first, *(self.buckets[b] for b in range(first, last + 1))]
        inside = {"inside": self.inside / 1e9} if self.inside else {}
        return {**self.figures(), **inside, "histogram": histogram}

    def add_line(self, line: Record) -> None:
        """Add a line of timeit. Raises one of DAMAGE."""
        cpu, inside = _ns(line.get("cpu", 0)), _ns(line.get("inside", 0))
        if "histogram" in line:
            first, *counts = map(_number, line["histogram"])
            calls, errors = _number(line["calls"]), _number(line["errors"])
            total, longest = _ns(line["total"]), _ns(line["max"])
            if sum(counts) != calls or first + len(counts) > 512:
                raise ValueError("the histogram does not fit the number of calls")
            self.calls += calls
            self.errors += errors
            self.total += total
            self.max = max(self.max, longest)
            self.buckets.update(dict(enumerate(counts, first)))
        else:
            total = _ns(line["seconds"])
            self.add(total, errors=int(line["raised"] is not None))
        self.cpu += cpu
        self.inside += inside
        self.with_cpu += total * ("cpu" in line)
        self.with_inside += total * ("inside" in line)
        self.partly |= "slower_than" in line

    def row(self) -> Record:
        """A row of the reader's table of functions."""
        cpu = min(self.cpu / self.with_cpu, 1.0) if self.with_cpu else None
        inside = min(self.inside / self.with_inside, 1.0) if self.with_inside else None
        shares = {"cpu_share": cpu, "inside_share": inside}
        return {**self.figures(), **shares, "partly": self.partly}


# --- exit and fork --------------------------------------------------------------------

_sampler_lock = threading.RLock()  # held while samples are taken and logged


def flush() -> None:
    """Log what has been counted so far, without waiting for the interval to end."""
    # Otherwise exiting would end the sampling thread in the middle of its lines.
    _pause_sampling()
    try:
        _flush_due(math.inf)
    finally:
        _resume_sampling()


def _pause_sampling() -> None:
    # At most a second: the logging handler in the sampling thread may be waiting for a
    # lock that this thread holds, or for a server.
    _sampler_lock.acquire(timeout=1)


def _resume_sampling() -> None:
    with contextlib.suppress(RuntimeError):  # it was not paused in time
        _sampler_lock.release()


def _after_fork() -> None:
    global _profiling, _sampler_lock
    # New ones: a thread that does not exist here may hold the old ones.
    _profiling, _sampler_lock = threading.Lock(), threading.RLock()
    with _sampler_lock:  # the sampling thread starts here, and must not flush yet
        for tally in _tallies[:]:
            tally.restart()
    _flush_at_exit()


def _flush_at_exit() -> None:
    # multiprocessing ends its processes with os._exit(), which skips atexit. When they
    # start, they clear their finalizers and then call what is registered after a fork.
    if util := sys.modules.get("multiprocessing.util"):
        finalize = functools.partial(util.Finalize, None, flush, exitpriority=0)
        finalize()
        util.register_after_fork(flush, lambda _: finalize())


atexit.register(flush)
_flush_at_exit()
if hasattr(os, "register_at_fork"):
    # Paused, so that no lock of a logging handler stays locked in the child.
    os.register_at_fork(
        before=_pause_sampling,
        after_in_parent=_resume_sampling,
        after_in_child=_after_fork,
    )


# --- sampling -------------------------------------------------------------------------

# Innermost frames of threads that only wait.
WAITING = re.compile(
    r"\b(select \(selectors|(wait|join|_wait_for_tstate_lock) \(threading"
    r"|_worker \(concurrent/futures/thread|(accept|readinto) \(socket|read \(ssl"
    r"|_try_wait \(subprocess|_recv \(multiprocessing/connection)\.py:"
)
Stack = tuple[bool, tuple[str, ...]]  # is it waiting?; the innermost frame first


def start_sampling(
    interval: float = 0.01,
    every: float = 60.0,
    *,
    logger: logging.Logger | None = None,
    level: int | str = logging.INFO,
) -> None:
    """Log what all threads of the process are doing.

    interval: seconds between two samples.
    every: seconds between two reports.
    logger, level: where the lines go. Nothing is sampled while that logger is disabled for
        that level.

    A daemon thread counts the stacks (function, file and line of each frame) of all other
    threads, up to 5,000 different ones. The first line of a report has the number of
    `samples`; how many of them were `missed` because the interpreter was not released in
    time, and repeat the next one; the `cpu` seconds of the daemon thread; and `rest`, the
    number of stacks that are not among the 300 most frequent ones in the lines that follow.

    A thread is waiting if it is in a function of WAITING or, on Linux, if it has used less
    than a tenth of the time since the previous sample. So short waits between computations
    count as running; waiting for the global interpreter lock, and what a new thread does in
    its first tenth of an interval, count as waiting. An asyncio program shows the running
    task with its chain of coroutines, but no suspended task. C code appears as the line
    that calls it. Samples are taken when the interpreter switches threads, so they are
    biased towards places where a thread waits; to switch sooner, sys.setswitchinterval() is
    lowered to a twentieth of the interval.

    A forked child samples itself. Python 3.12 and later warn about forking with several
    threads, including this one. Where gevent has patched threading, the thread is a
    greenlet and sees only itself. A second call does nothing. Raises ValueError for invalid
    options.
    """
    global _sampler
    if not interval > 0:
        raise ValueError("interval= must be a number of seconds greater than 0")
    if _sampler is None and not OFF:
        log = Log("sampling", start_sampling, logger, level)
        _sampler = Sampler(log, every, interval)
        sys.setswitchinterval(min(sys.getswitchinterval(), interval / 20))


SAMPLING = ("samples", "missed", "rest", "seconds", "cpu")  # first line of a report


class Sampler(Tally):
    """Counts stacks."""

    def __init__(self, log: Log, every: float, interval: float) -> None:
        self.interval = interval
        super().__init__(log, every)

    def restart(self) -> None:
        super().restart()
        # Processor time (ns) and stack of each thread in the previous sample.
        self.before: dict[int, tuple[int, Stack]] = {}
        self.native_ids: dict[int | None, int | None] = {}
        # No thread survives a fork.
        threading.Thread(target=self.run, name="sampling", daemon=True).start()

    def clear(self) -> None:
        super().clear()
        self.frames: dict[tuple[int, int], tuple[types.CodeType, str]] = {}
        self.costs: dict[str, float] = dict.fromkeys(SAMPLING, 0)

    def run(self) -> None:
        due = time.monotonic()
        while True:
            # Two samples close together would make threads look idle.
            time.sleep(max(due - time.monotonic(), self.interval / 2))
            missed = int((time.monotonic() - due) / self.interval)
            due += (missed + 1) * self.interval
            if self.log.enabled():
                missed = min(missed, 100)  # a suspended computer
                start = time.thread_time()
                with _sampler_lock:
                    self.sample(1 + missed)
                self.costs["cpu"] += time.thread_time() - start
                self.costs["missed"] += missed

    def sample(self, weight: int) -> None:
        # Before Python 3.12, a garbage collection while a thread creates frame objects for
        # the others can hang or crash the program (python/cpython#106883).
        collecting = sys.version_info < (3, 12) and gc.isenabled()
        if collecting:
            gc.disable()
        try:
            self.add_stacks(weight)
        finally:
            if collecting:
                gc.enable()
        self.costs["samples"] += weight
        _flush_due(perf_counter_ns())

    def add_stacks(self, weight: int) -> None:
        frames, own = sys._current_frames(), threading.get_ident()
        if frames.keys() != self.before.keys() | {own}:
            # Threads have started or ended.
            self.native_ids = {t.ident: t.native_id for t in threading.enumerate()}
        busy = weight * self.interval * 1e8  # ns, a tenth of the time
        after: dict[int, tuple[int, Stack]] = {}
        for ident, frame in frames.items():
            if ident == own:
                continue
            cpu = _cpu_time(self.native_ids.get(ident))
            cpu_before, stack = self.before.get(ident, (0, None))
            if stack is None or cpu is None or cpu != cpu_before:
                idle = cpu is not None and cpu - cpu_before < busy
                stack = self.stack(frame, idle)
            elif not stack[0]:  # it has not run, so it is where it was
                stack = (True, stack[1])
            after[ident] = cpu or 0, stack
            self.pending += [stack] * weight
        self.before = after

    def stack(self, frame: types.FrameType | None, idle: bool) -> Stack:
        texts: list[str] = []
        known = self.frames
        while frame is not None and len(texts) < MAX_DEPTH:
            code = frame.f_code
            # Computing a frame's line takes 1 us, looking it up 0.1 us. The reference to
            # the code keeps its id from being reused.
            key = id(code), frame.f_lasti
            if key in known:
                text = known[key][1]
            else:
                text = _frame_text(frame)
                known[key] = code, text
            texts.append(text)
            frame = frame.f_back
        return idle or WAITING.search(texts[0]) is not None, tuple(texts)

    def count(self, batch: list[Stack]) -> None:
        # Most occur many times, and hashing one takes 1 us.
        stacks = {id(stack): stack for stack in batch}
        for number, n in Counter(map(id, batch)).items():
            if stacks[number] in self.counts or len(self.counts) < MAX_STACKS:
                self.counts[stacks[number]] += n
            else:
                self.costs["rest"] += n

    def lines(self) -> Iterator[Record]:
        stacks, costs = self.counts.most_common(), self.costs
        if stacks:
            costs["rest"] += sum(n for _, n in stacks[MAX_LOGGED_STACKS:])
            costs["seconds"] = costs["samples"] * self.interval
            yield costs
            room = MAX_LINE_LENGTH - len(self.log.text())
            yield from _pack_stacks(stacks[:MAX_LOGGED_STACKS], room)


_sampler: Sampler | None = None


def _cpu_time(native_id: int | None) -> int | None:
    """Processor time (ns) of a thread, or None."""
    # Linux's clock of a thread, CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED. The function for it,
    # pthread_getcpuclockid(), crashes if the thread has ended.
    try:
        return None if native_id is None else time.clock_gettime_ns(~native_id << 3 | 6)
    except (AttributeError, OSError):
        return None


def _pack_stacks(stacks: Sequence[tuple[Stack, int]], room: int) -> Iterator[Record]:
    """Records with frames, and with stacks as [number, waiting, outermost frame, ...].

    The JSON of each takes at most `room` characters.
    """
    texts: dict[str, int] = {}
    rows = [
        [n, int(waiting)]
        + [texts.setdefault(text, len(texts)) for text in reversed(frames)]
        for (waiting, frames), n in stacks
    ]
    record = {"frames": [*texts], "stacks": rows}
    half = len(stacks) // 2
    if len(json.dumps(record)) <= room:
        yield record
    elif half:
        yield from _pack_stacks(stacks[:half], room)
        yield from _pack_stacks(stacks[half:], room)
    else:  # a single stack: drop the outer half of its frames
        ((waiting, frames), n) = stacks[0]
        yield from _pack_stacks([((waiting, frames[: len(frames) // 2]), n)], room)


def _frame_text(frame: types.FrameType) -> str:
    """In py-spy's format, with the file relative to its entry of sys.path."""
    file = frame.f_code.co_filename
    for folder in sorted(sys.path, key=len, reverse=True):
        if folder and file.startswith(folder + os.sep):
            file = file[len(folder) + 1 :].replace(os.sep, "/")
            break
    return f"{_short(frame.f_code.co_qualname)} ({_short(file)}:{frame.f_lineno})"


# --- how lines are written ------------------------------------------------------------


class Log:
    """Writes the lines of one decorated function."""

    def __init__(
        self, kind: str, func: Function, to: logging.Logger | None, level: int | str
    ) -> None:
        self.kind = kind
        self.logger = to or logger
        self.level = logging.NullHandler(level).level  # takes names and numbers
        self.head = _identity(func)

    def enabled(self) -> bool:
        return self.logger.isEnabledFor(self.level)

    def text(self, **fields: object) -> str:
        return json.dumps({**self.head, "pid": os.getpid(), **fields})

    def __call__(self, **fields: object) -> None:
        """Log a line. Exceptions of the program's filters and handlers are ignored."""
        # A handler may be decorated itself.
        if _own.busy:
            return
        _own.busy = True
        try:
            self.logger.log(self.level, "%s %s", self.kind, self.text(**fields))
        except Exception:  # noqa: BLE001, S110
            pass
        finally:
            _own.busy = False


class _Own(threading.local):
    """Whether this thread runs code of the program on behalf of a decorator."""

    busy = False


_own = _Own()


def _identity(func: Function) -> Record:
    """Name, file and line of a callable; "" and 0 for what is not written in Python."""
    inner = _innermost(func)
    code = getattr(inner, "__code__", None)
    file, line = (code.co_filename, code.co_firstlineno) if code else ("", 0)
    module = getattr(inner, "__module__", None) or "builtins"
    if module == "__main__":
        module = Path(file).stem or module
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return {"name": _short(f"{module}.{name}"), "file": _short(file), "line": line}


def _innermost(func: Function) -> Any:
    inner = inspect.unwrap(func)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner


def _short(text: str) -> str:
    """The end of a text, as much as fits into MAX_TEXT_LENGTH characters of JSON."""
    text = text[-MAX_TEXT_LENGTH:]
    while len(json.dumps(text)) > MAX_TEXT_LENGTH:
        text = text[len(text) // 4 + 1 :]
    return text


# --- the reader -----------------------------------------------------------------------

KINDS = {
    f"{kind} ".encode(): kind
    for kind in ("timeit", "cache_profile", "profile", "sampling")
}
# In a log that is itself JSON, the line is inside a string, with its quotes escaped.
START = re.compile(rb'{\\*"name\\*": ')
TIME_OF_DAY = re.compile(rb"(?:\d{4}-\d\d-\d\d[ T])?\d\d:\d\d:\d\d")
DECODER = json.JSONDecoder()
# What damaged and hostile lines raise.
DAMAGE = (ValueError, TypeError, LookupError, RecursionError, zlib.error)

Place = tuple[str, str, int]
PLACE = ("name", "file", "line")


def read_log(path: str) -> Iterator[bytes]:
    """The lines of a log, plain or gzip. Raises OSError, EOFError or zlib.error."""
    with open(0 if path == "-" else path, "rb", closefd=path != "-") as plain:
        packed = plain.peek(2)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=plain) if packed else plain
        yield from iter(functools.partial(stream.readline, MAX_READ_SIZE), b"")


def parse(line: bytes) -> Iterator[tuple[str, Record | None]]:
    """What was logged in a line of a log, as (kind, record); damaged records are None.

    Usually there is at most one; there are more if a write was cut off.
    """
    for match in START.finditer(line):
        for prefix, kind in KINDS.items():
            if line.endswith(prefix, 0, match.start()):
                break
        else:
            continue
        text = line[match.start() :].decode("ascii", "replace")
        try:
            while text.startswith("{\\"):
                text, _ = DECODER.raw_decode('"' + text)
            record, _ = DECODER.raw_decode(text)
        except DAMAGE:
            record = None
        # Without "pid" it is a line of something else.
        if record is None or "pid" in record:
            yield kind, record


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("not a text")


def _number(value: Any) -> Any:
    if type(value) in (int, float) and 0 <= value < 1e15:
        return value
    raise ValueError("not a number, or out of range")


def _ns(seconds: object) -> int:
    return round(float(_number(seconds)) * 1e9)


class Report:
    """The sums of the lines of logs, which may come in any order."""

    def __init__(self, folder: Path | None) -> None:
        """Complete profiles are written to `folder`. Raises OSError."""
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self.damaged = 0
        self.times: dict[Place, Times] = {}
        self.sums: dict[str, dict[tuple[Any, ...], Counter[str]]] = defaultdict(dict)
        self.profiles: dict[tuple[Place, str], Record] = {}
        self.parts: dict[tuple[Place, str], dict[int, str]] = defaultdict(dict)
        self.stacks: Counter[tuple[bool, tuple[str, ...]]] = Counter()

    def read(self, line: bytes) -> None:
        """Raises OSError if a profile cannot be written."""
        for kind, record in parse(line):
            try:  # an empty record is damaged, too
                self.add(kind, record or {}, line)
            except DAMAGE:
                self.damaged += 1

    def add(self, kind: str, record: Record, line: bytes) -> None:
        place = _text(record["name"]), _text(record["file"]), _number(record["line"])
        if kind == "timeit":
            times = self.times.get(place) or Times()
            times.add_line(record)
            self.times[place] = times
        elif kind == "cache_profile":
            maxsize = record["maxsize"] and _number(record["maxsize"])
            self.sum("caches", (*place, maxsize), record, *CACHE_COUNTS, *CACHE_TIMES)
        elif "skipped" in record:
            self.sum("skipped", (*place, _text(record["skipped"])), record, "calls")
        elif "samples" in record:
            self.sum("sampling", (), record, *SAMPLING)
        elif kind == "sampling":
            frames = [*map(_text, record["frames"])]
            for n, waiting, *stack in record["stacks"]:
                texts = tuple(frames[_number(number)] for number in stack)
                self.stacks[bool(waiting), texts or ("?",)] += _number(n)
        else:
            self.add_profile((place, _text(record["id"])), record, line)

    def sum(
        self, table: str, key: tuple[Any, ...], record: Record, *names: str
    ) -> None:
        counts = Counter({name: _number(record[name]) for name in names})
        self.sums[table].setdefault(key, Counter()).update(counts)

    def add_profile(self, key: tuple[Place, str], record: Record, line: bytes) -> None:
        number, data = _number(record["part"]), _text(record["data"])
        seconds = _number(record["seconds"])
        new = {"complete": False, "slowest": [], "seconds": seconds}
        row = self.profiles.setdefault(key, new)
        if row["complete"]:
            return
        parts = self.parts[key]
        parts[number] = data
        if match := TIME_OF_DAY.search(line):
            row["time"] = match[0].decode()
        if len(parts) == _number(record["parts"]):
            stats = _unpack("".join(part for _, part in sorted(parts.items())))
            slowest = sorted(stats.items(), key=lambda item: -item[1][2])[:3]
            row["slowest"] = [
                [_located(name, file, line), times[2]]
                for (file, line, name), times in slowest
            ]
            row["complete"] = True
            del self.parts[key]
            if self.folder:
                # The name comes from a log: keep the file in the folder.
                name = re.sub(
                    r"[^A-Za-z0-9_.-]", "_", f"{key[0][0][:100]}-{key[1][:20]}"
                )
                path = self.folder / f"{name}.pstats"
                path.write_bytes(marshal.dumps(stats))

    def figures(self, sort: str, top: int | None) -> dict[str, list[Record]]:
        """What --json prints. A table without the column `sort` has its default order."""

        def rows(table: str, *keys: str) -> list[Record]:
            rows = self.sums[table].items()
            return [{**dict(zip(keys, key)), **counts} for key, counts in rows]

        figures = {
            "sampling": rows("sampling"),
            "sampled_functions": self.shares(
                lambda line: line.rpartition(":")[0] + ")"
            ),
            "sampled_lines": self.shares(str),
            "functions": [
                {**dict(zip(PLACE, key)), **times.row()}
                for key, times in self.times.items()
            ],
            "caches": rows("caches", *PLACE, "maxsize"),
            "profiles": [
                {**dict(zip(PLACE, key)), "id": profile_id, **row}
                for (key, profile_id), row in self.profiles.items()
            ],
            "skipped": rows("skipped", *PLACE, "reason"),
        }
        for row in figures["caches"]:
            for key in ("hits", "hits_unbounded"):
                row[f"{key}_share"] = row[key] / max(row["calls"], 1)
        for name, (usual, _) in TABLES.items():
            keys = (sort, f"{sort}_share", usual)
            figures[name].sort(key=lambda row: -next(row[k] for k in keys if k in row))
            figures[name] = figures[name][:top]
        return figures

    def shares(self, part_of: Callable[[str], str]) -> list[Record]:
        """The share of samples in which a thread was in a function or line."""
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        for (waiting, stack), n in self.stacks.items():
            parts = [*map(part_of, stack)]
            for part in dict.fromkeys(parts):
                rows[part]["waiting" if waiting else "total"] += n
            rows[parts[-1]]["own"] += 0 if waiting else n
        samples = self.sums["sampling"].get((), Counter())["samples"] or math.inf
        keys = ("own", "total", "waiting")
        return [
            {f"{key}_share": counts[key] / samples for key in keys} | {"frame": frame}
            for frame, counts in rows.items()
        ]

    def collapsed(self) -> str:
        """The input of flamegraph.pl; waiting threads are under a frame `(waiting)`."""
        return "".join(
            _printable(";".join(["(waiting)"] * waiting + [*stack])) + f" {n}\n"
            for (waiting, stack), n in self.stacks.items()
        )


def _unpack(data: str) -> dict[Any, Any]:
    """The table of a profile. Damaged data raises one of DAMAGE."""
    packed = base64.b64decode(data, validate=True)
    table = json.loads(zlib.decompressobj().decompress(packed, MAX_PROFILE_SIZE))
    return {
        (file, line, name): (*times, {tuple(c[:3]): tuple(c[3:]) for c in callers})
        for file, line, name, *times, callers in table
    }


# --- tables ---------------------------------------------------------------------------

SHARES = "own_share total_share waiting_share frame"
CACHES = "calls distinct unhashable hits_share hits_unbounded_share total saved"
TIMES = "calls total mean p50 p95 max errors cpu_share inside_share"
TABLES = {  # name: (sorted by, columns)
    "sampled_functions": ("own_share", SHARES),
    "sampled_lines": ("own_share", SHARES),
    "functions": ("total", f"{TIMES} function"),
    "caches": ("saved", f"{CACHES} maxsize function"),
    "profiles": ("seconds", "id time seconds function"),
    "skipped": ("calls", "calls reason function"),
}


def tables(figures: dict[str, list[Record]]) -> Iterator[str]:
    """The figures as text."""
    for row in figures["sampling"]:
        yield (
            f"{row['samples']:,} samples in {_cell(row['seconds'])}, {row['missed']:,} "
            f"missed, {row['rest']:,} rare stacks left out; they took "
            f"{row['cpu'] / max(row['seconds'], 0.01):.2%} of a processor\n"
        )
    for name, (_, columns) in TABLES.items():
        if not figures[name]:
            continue
        rows = [[column.removesuffix("_share") for column in columns.split()]]
        for row in figures[name]:
            if "name" in row:
                row = row | {"function": _label(row)}
            rows.append([_cell(row.get(key), key) for key in columns.split()])
        widths = [max(map(len, column)) for column in zip(*rows)][:-1]
        yield f"== {name.replace('_', ' ')}"
        for cells in rows:
            yield "  ".join([*map(str.rjust, cells, widths), cells[-1]])
        yield ""
        if any(row.get("partly") for row in figures[name]):
            yield "* without the calls that were faster than slower_than=\n"


def _label(row: Record) -> str:
    label = _located(*(row[key] for key in PLACE))
    if row.get("partly"):
        label += " *"
    if "slowest" in row:
        slowest = [f"{_cell(seconds)} {name}" for name, seconds in row["slowest"]]
        label += ": " + (", ".join(slowest) or "damaged or incomplete")
    return label


def _located(name: str, file: str, line: int) -> str:
    # What is not written in Python has no line.
    return f"{name} ({Path(file).name}:{line})" if line else name


def _cell(value: Any, key: str = "") -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key.endswith("_share") else _duration(value)
    return "-" if value is None else _printable(str(value))


def _duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 1:
            break
    return f"{seconds * scale:.{3 if seconds < 1000 else 7}g} {unit}"  # no exponent


def _printable(text: str) -> str:
    """A text from a log, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- the command line -----------------------------------------------------------------

DEMO = """\
import asyncio
import logging
import time

from decorators import cache_profile, profile, start_sampling, timeit


@timeit
@cache_profile(maxsize=16)
def exchange_rate(currency):
    time.sleep(0.004)  # a slow service, called with the same few arguments
    return {"EUR": 1.0, "USD": 1.1, "JPY": 160.0}[currency]


@timeit(every=60)
def tax(cents):
    return cents * 19 // 100  # fast, but called very often


@timeit(slower_than=0.03)
async def ship(order):
    await asyncio.sleep(0.002 if order % 20 else 0.04)  # sometimes slow


@profile(slower_than=0.04, every=0.5)
async def handle(order):
    exchange_rate(("EUR", "USD", "JPY")[order % 3])
    sum(tax(cents) for cents in range(order * 100))
    await ship(order)


async def main():
    start_sampling()
    for order in range(1, 61):
        await handle(order)


logging.basicConfig(filename="shop.log", level="INFO", format="%(asctime)s %(message)s")
asyncio.run(main())
"""


def run_demo() -> str:
    """Run DEMO beside a copy of this file; return the path of its log."""
    folder = Path(tempfile.mkdtemp(prefix="decorators-demo-"))
    shutil.copy(__file__, folder / "decorators.py")
    (folder / "shop.py").write_text(DEMO, encoding="utf-8")
    # In a session of its own it does not receive Ctrl-C; run() kills it.
    command = [sys.executable, "shop.py"]
    subprocess.run(command, cwd=folder, check=True, start_new_session=True)
    _print_error(f"ran {folder / 'shop.py'}, reading {folder / 'shop.log'}:")
    return str(folder / "shop.log")


def _print_error(text: str) -> None:
    print(f"decorators.py: {_printable(text)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Find the slow functions in what sampling, timeit, cache_profile "
        "and profile have logged.",
        epilog="exit status: 0 something was found, 1 nothing was, 2 bad arguments or "
        "a file that could not be read or written, 130 interrupted",
    )
    add = parser.add_argument
    add("log", nargs="*", metavar="LOG", help="plain or gzip; - for standard input")
    orders = ["own", "total", "waiting", "mean", "p95", "max", "calls", "saved"]
    usual = "samples by own, functions by total, caches by saved, profiles by seconds"
    add("--sort", choices=orders, default="", help=f"default: {usual}")
    add("--json", action="store_true", help="for machines, times in seconds")
    add("--pstats", type=Path, metavar="FOLDER", help="write the profiles there")
    add("--collapsed", type=Path, metavar="FILE", help="write the sampled stacks there")
    add("--top", type=int, metavar="N", help="rows of a table (default: 20)")
    add("--demo", action="store_true", help="decorate, run and report a small program")
    args = parser.parse_args(argv)
    if bool(args.log) == args.demo:
        parser.error("give one or more logs, or --demo alone")
    if args.top is not None and args.top < 1:
        parser.error("--top must be 1 or more")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _report(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, subprocess.SubprocessError) as error:
        # Otherwise flushing the rest of the buffer would fail again at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # such as `| head`
            return 0
        _print_error(str(error))
        return 2


def _report(args: argparse.Namespace) -> int:
    status = 0
    report = Report(args.pstats)
    for log in [run_demo()] if args.demo else args.log:
        try:
            for line in read_log(log):
                report.read(line)
        except (OSError, EOFError, zlib.error) as error:
            _print_error(f"{log}: {getattr(error, 'strerror', None) or error}")
            status = 2
    if report.damaged:
        _print_error(f"damaged lines left out: {report.damaged}")
    if args.collapsed:
        args.collapsed.write_text(report.collapsed(), encoding="utf-8")
    figures = report.figures(args.sort, args.top or (None if args.json else 20))
    if args.json:
        print(json.dumps(figures, indent=2), flush=True)
    else:
        print(*tables(figures), sep="\n", end="", flush=True)
    if not any(figures.values()):
        _print_error("no lines from timeit, cache_profile, profile or sampling found")
        return status or 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
