"""Measure the figures that README.md quotes.

    python tests/benchmark.py [SECTION...]

Prints one table: what was measured, the figure and its goal. A figure is a ratio of two things that were timed in
turn in the same run, so that a slow or busy machine is slow for both; the median of several rounds counts.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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
    """Time both in turn, `rounds` times; return the median of the rounds' ratios ours / theirs."""
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))


def decorators_section() -> Iterator[Row]:
    import cProfile
    import functools
    import logging
    import tempfile

    from decorators import cache_profile, profile, timeit

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
        "every": timeit(every=60, logger=loud)(function),
        "disabled": timeit(logger=quiet)(function),
        "a line": timeit(logger=loud)(function),
        "cache": cache_profile(logger=loud)(function),
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
        lambda: profile(logger=loud)(request)(),
        lambda: cProfile.Profile().runcall(request),
    )
    yield Row("profile / bare cProfile, 0.1 s", f"{ratio:.2f} x", "<= 1.1 x")

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


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "decorators": decorators_section,
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
