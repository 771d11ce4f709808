"""Measure the figures that README.md quotes.

    python tests/benchmark.py [SECTION...]

Prints one table: what was measured, the figure and its goal. A figure is a ratio of two things that were timed in
turn in the same run, so that a slow or busy machine is slow for both; the median of several rounds counts.
"""

import argparse
import statistics
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


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {}


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
