"""Measure the figures that README.md quotes.

    python tests/benchmark.py [SECTION...]

Prints one table: what was measured, the figure and its goal. A figure is a ratio of two things that were timed in
turn in the same run, so that a slow or busy machine is slow for both; the median of several rounds counts.
"""

import argparse
import importlib
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json_compare


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


def json_section() -> Iterator[Row]:
    yield from against_loads("API response", api_response, 10_000)
    yield from against_loads("GeoJSON", geojson, 400)
    yield from against_loads("deep tree", deep_tree, 1000)
    if importlib.util.find_spec("deepdiff") is None:
        yield Row("json: deepdiff is not installed", "-", ">= 100")
        return
    # Small documents: deepdiff takes 10 s for the large ones, and hours for the tree.
    yield from against_deepdiff("API response", api_response, 1000)
    yield from against_deepdiff("GeoJSON", geojson, 40)
    yield from against_deepdiff("deep tree", deep_tree, 2)


def against_loads(name: str, generate: Generate, size: int) -> Iterator[Row]:
    text = json.dumps(generate(random.Random(1), size))
    title = f"json: {name}, {len(text) / 1e6:.1f} MB"
    left, right = json.loads(text), json.loads(text)
    loads = partial(json.loads, text)
    ratio = median_ratio(partial(json_compare.compare, left, right), loads)
    yield Row(f"{title}, compare / json.loads", f"{ratio:.2f}", "<= 1.0")
    right = all_floats_a_little_off(right)
    ratio = median_ratio(partial(json_compare.compare, left, right), loads)
    yield Row(f"{title}, compare, floats off / json.loads", f"{ratio:.2f}", "<= 1.0")
    right = one_leaf_in_a_hundred_changed(right, random.Random(2))
    ratio = median_ratio(partial(list_all, left, right), loads)
    yield Row(f"{title}, 1 % differ / json.loads", f"{ratio:.2f}", "<= 2.5")


def against_deepdiff(name: str, generate: Generate, size: int) -> Iterator[Row]:
    deepdiff = importlib.import_module("deepdiff").DeepDiff
    text = json.dumps(generate(random.Random(1), size))
    title = f"json: {name}, {len(text) / 1e6:.2f} MB"
    left, right = json.loads(text), json.loads(text)
    theirs = partial(deepdiff, left, right, significant_digits=5)
    ours = partial(repeat, 10, partial(json_compare.compare, left, right))
    ratio = 10 * median_ratio(theirs, ours)
    yield Row(f"{title}, deepdiff / compare", f"{ratio:.0f}", ">= 100")
    right = one_leaf_in_a_hundred_changed(right, random.Random(2))
    theirs = partial(deepdiff, left, right, significant_digits=5)
    ours = partial(repeat, 10, partial(list_all, left, right))
    ratio = 10 * median_ratio(theirs, ours)
    yield Row(f"{title}, deepdiff / 1 % differ", f"{ratio:.0f}", ">= 100")


def list_all(left: Any, right: Any) -> int:
    return sum(1 for _ in json_compare.differences(left, right))


def repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"json": json_section}


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
