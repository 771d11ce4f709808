import copy
import json
import math
import os
import random
import re
import signal
import sys
import tracemalloc
import unittest
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from decimal import Decimal
from enum import IntEnum
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import pytest
from helpers import running_script

import json_compare
from json_compare import Difference, assert_equal, compare, differences, load, main

NAN = float("nan")
INFINITY = float("inf")


class Point(NamedTuple):
    x: float
    y: float


class Level(IntEnum):
    LOW = 1


class Name(str):
    pass


# What is equal


EQUAL: dict[str, tuple[Any, Any]] = {
    "both empty objects": ({}, {}),
    "both empty arrays": ([], []),
    "null": (None, None),
    "true": (True, True),
    "the same text": ("é", "é"),
    "the same integer": (10**400, 10**400),
    "floats closer than half of the last place": (1.000001, 1.000002),
    "floats on both sides of a rounding edge": (1.0000049, 1.0000051),
    "an integer and a float": (1, 1.0),
    "an integer and a float close to it": (1, 1.000004),
    "zero and negative zero": (0.0, -0.0),
    "zero and a tiny number": (0, 5e-324),
    "NaN": (NAN, float("nan")),
    "infinities": (INFINITY, float("inf")),
    "NaN as float and as Decimal": (NAN, Decimal("NaN")),
    "an infinity as float and as Decimal": (-INFINITY, Decimal("-Infinity")),
    "Decimals": (Decimal("1.000001"), Decimal("1.000002")),
    "Decimals of more digits than the context has": (Decimal("1" + "0" * 50 + ".000001"), Decimal(10**50)),
    "a Decimal and a float": (Decimal("0.1"), 0.1),
    "a Decimal and an integer": (Decimal("7.000004"), 7),
    "a Decimal and a huge integer": (Decimal(10**400), 10**400),
    "the half, which rounds to the even 0": (Decimal("0.000005"), 0),
    "a huge float and the integer of the same value": (1e300, int(1e300)),
    "keys in another order": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    "an ordered dictionary": (OrderedDict(a=1, b=2), {"b": 2, "a": 1}),
    "ordered dictionaries in another order": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "a list and a tuple": ([1, [2.0]], (1, (2,))),
    "a named tuple": (Point(1, 2), [1.0, 2.0]),
    "an enumeration and its number": (Level.LOW, 1),
    "a subclass of str": (Name("a"), "a"),
    "a key of a subclass of str": ({Name("a"): 1}, {"a": 1}),
    "numbers inside": ({"a": [{"b": 1.000001}]}, {"a": [{"b": 1.000002}]}),
}  # fmt: skip

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "floats that differ in the last place": (1.00001, 1.00002),
    "an integer and a float": (1, 1.00001),
    "neighbours among huge integers": (10**400, 10**400 + 1),
    "neighbours among integers beyond the range of exact floats": (2**53, 2**53 + 1),
    "a huge integer and the largest float": (10**400, sys.float_info.max),
    "a huge integer and infinity": (10**400, INFINITY),
    "a huge integer and NaN": (10**400, NAN),
    "opposite floats whose difference overflows": (1e308, -1e308),
    "the infinities": (INFINITY, -INFINITY),
    "infinity and a number": (INFINITY, 1.0),
    "infinity as a Decimal and a number": (Decimal("Infinity"), 1.0),
    "NaN and a number": (NAN, 0.0),
    "NaN and infinity": (NAN, INFINITY),
    "NaN and null": (NAN, None),
    "Decimals": (Decimal("1.00001"), Decimal("1.00002")),
    "Decimals of extreme size": (Decimal("1e999999999"), Decimal("-1e999999999")),
    "a Decimal of extreme size and a small one": (Decimal("1e999999"), 1.5),
    "Decimals just beyond the half": (Decimal("0.0000050000000000000000000001"), 0),
    "Decimals just beyond the half, in 60 digits": (Decimal("5" + 60 * "0" + "1e-67"), 0),
    "true and 1": (True, 1),
    "true and 1.0": (True, 1.0),
    "true and 1 as a Decimal": (True, Decimal(1)),
    "false and 0": (False, 0),
    "false and null": (False, None),
    "true and false": (True, False),
    "null and 0": (None, 0),
    "null and the empty string": (None, ""),
    "a number and its text": (1, "1"),
    "strings": ("a", "b"),
    "Unicode normal forms": ("\u00e9", "e\u0301"),
    "null and a missing key": ({"a": None}, {}),
    "keys": ({"a": 1}, {"b": 1}),
    "an additional key": ({"a": 1, "b": 2}, {"a": 1}),
    "the value of a key": ({"a": 1}, {"a": 2}),
    "elements in another order": ([1, 2], [2, 1]),
    "an additional element": ([1, 2], [1]),
    "an additional null": ([None], []),
    "an empty array and an empty object": ([], {}),
    "an array and a string": (["a"], "a"),
    "an object and null": ({}, None),
    "true inside": ({"a": [True]}, {"a": [1]}),
}  # fmt: skip


def rows(table: dict[str, tuple[Any, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("left, right", table.values(), ids=table.keys())


@rows(EQUAL)
def test_these_are_equal_anywhere_in_a_document(left: Any, right: Any) -> None:
    for a, b in ((left, right), (right, left), (left, copy.deepcopy(left))):
        assert compare(a, b)
        assert compare({"a": [0, a]}, {"a": [0, b]})
        assert list(differences(a, b)) == []


@rows(DIFFERENT)
def test_these_differ_anywhere_in_a_document(left: Any, right: Any) -> None:
    for a, b in ((left, right), (right, left)):
        assert not compare(a, b)
        assert not compare({"a": [0, a]}, {"a": [0, b]})
        assert list(differences(a, b)) != []
        assert compare(a, copy.deepcopy(a))


@pytest.mark.parametrize(
    "left, right, places, equal",
    [
        (1.4, 1.0, 0, True), (1.6, 1.0, 0, False), (1.5, 1.0, 0, True), (1, 2, 0, False),
        (Decimal("1.5"), 1, 0, True), (1.01, 1.02, 1, True), (1.01, 1.02, 2, False),
        (1.00001, 1.00002, 4, True), (1e-12, 2e-12, 12, False), (0.5, 0.5, 10**30, True),
        (0.1 + 0.2, 0.3, 15, True), (0.1 + 0.2, 0.3, 17, False), (0.1 + 0.2, 0.3, 10**30, False),
        (0.5, Decimal("0.5"), 10**30, True), (0.1, Decimal("0.1"), 16, True),
        (0.1, Decimal("0.1"), 17, False), (0.1, Decimal("0.1"), 10**30, False),
        (0, math.nextafter(5e-6, 0), 5, True), (0, 5e-6, 5, False),  # 5e-6 is just above the half
    ],
)  # fmt: skip
def test_places_sets_how_many_decimal_places_count(
    left: Any, right: Any, places: int, equal: bool
) -> None:
    assert compare(left, right, places=places) is equal
    assert compare(right, left, places=places) is equal


def test_floats_are_equal_exactly_when_unittest_finds_them_almost_equal() -> None:
    chance = random.Random(1)
    verdicts = []
    for _ in range(5000):
        places = chance.randrange(12)
        left = chance.choice([0, 1, 7, 0.5, 1e9, 2**60, chance.uniform(-100, 100)])
        steps = [0, 0.4, 0.5, 0.6, chance.uniform(0, 1), chance.uniform(0, 3)]
        right = left + chance.choice(steps) * 10**-places
        try:
            unittest.TestCase().assertAlmostEqual(left, right, places)
            verdict = True
        except AssertionError:
            verdict = False
        # in a document without other differences, and in one with
        for b in (0, 1):
            found = list(differences([left, 0], [right, b], places=places))
            assert len(found) == b + (not verdict), (left, right, places)
        verdicts.append(verdict)
    assert 1000 < sum(verdicts) < 4000


# Where documents differ

X = "x" * 30

# left, right, arguments, and how each difference reads
FOUND: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "values": (1, 2.5, {}, ["1 != 2.5"]),
    "members": ({"price": 1.00001}, {"price": 1.00002}, {}, ["/price: 1.00001 != 1.00002"]),
    "values of other types": ([True, None], [1, "null"], {}, ["/0: true != 1", '/1: null != "null"']),
    "arrays and objects": ([[1, "a"], {}], {"b": [{}]}, {}, ['[[1, "a"], {}] != {"b": [{}]}']),
    "constants": ([NAN, -INFINITY], [0, "é"], {}, ["/0: NaN != 0", '/1: -Infinity != "é"']),
    "Decimals": (Decimal("1.50"), Decimal("-Infinity"), {}, ["1.50 != -Infinity"]),
    "subclasses": ([Level.LOW, Name("a")], [True, "b"], {}, ["/0: 1 != true", '/1: "a" != "b"']),
    "control characters": ({"a\n/\x1b": "\n"}, {"a\n/\x1b": '"'}, {}, [r'/a\n~1\u001b: "\n" != "\""']),
    "what is not JSON, inside": ({"a": [{1}]}, {}, {}, ['/a: only in left: ["{1}"]']),
    "what only the right object has comes last": (
        {"z": 1, "y": {"b": 1}, "x": 1}, {"new": 0, "x": 2, "y": {"a": [0], "b": 2}, "newer": None}, {},
        ["/z: only in left: 1", "/y/b: 1 != 2", "/y/a: only in right: [0]", "/x: 1 != 2",
         "/new: only in right: 0", "/newer: only in right: null"],
    ),
    "a long string": (X + X, 1, {}, [f'"{X}{X[1:]}… != 1']),
    "a string that just fits": (X + X[2:], 1, {}, [f'"{X}{X[2:]}" != 1']),
    "a long string inside": ([{"text": X * 4}], [], {}, ['/0: only in left: {"text": "' + X + "x" * 20 + "…"]),
    "a long array": ([[100] * 100], [], {}, ["/0: only in left: [100" + ", 100" * 11 + ",…"]),
    "strings that differ late": (X * 9 + "a" + X * 9, X * 9 + "b", {}, [f'…{X}a{X[1:]}… != …{X}b"']),
    "strings that differ just within sight": (
        X + X[2:] + "a" + X, X + X[2:] + "b", {}, [f'"{X}{X[2:]}a… != "{X}{X[2:]}b…'],
    ),
    "strings that differ just out of sight": (X + X[1:] + "a", X + X[1:] + "b", {}, [f'…{X}a" != …{X}b"']),
    "a deep array": (json.loads("[" * 61 + "]" * 61), 1, {}, ["[" * 60 + "… != 1"]),
    "strings one of which goes on": (X * 9 + "a", X * 9, {}, [f'…{X}a" != …{X}"']),
    "long integers": (10**99, 10**99 + 1, {}, ["…" + "0" * 31 + " != …" + "0" * 30 + "1"]),
    "integers too long for str()": (10**5000, 10**5000 + 1, {}, ["… != …"]),
    "an array with elements put in": ([1, 2, 3], [1, 8, 9, 2, 3], {}, ["/1: only in right: 8", "/2: only in right: 9"]),
    "an array with elements taken out": ([1, 8, 9, 2, 3], [1, 2, 3], {}, ["/1: only in left: 8", "/2: only in left: 9"]),
    "an array with elements at the end": ([1, 2], [1, 2, 3], {}, ["/2: only in right: 3"]),
    "an array that repeats itself": ([1, 2, 1, 2], [1, 2], {}, ["/2: only in left: 1", "/3: only in left: 2"]),
    "an array with two changes": ([1, 2, 3], [0, 1, 9, 2, 3], {}, ["/0: 1 != 0", "/1: only in right: 1", "/2: only in right: 9"]),
    "an array whose elements moved": ([1, 2, 3], [2, 3, 1], {}, ["/0: 1 != 2", "/1: 2 != 3", "/2: 3 != 1"]),
    "an array inside of one": ({"a": [[1], [3, 4]]}, {"a": [0, [1], [3, 4, 5]]}, {}, [
        "/a/0: [1] != 0", "/a/1/0: 3 != 1", "/a/1/1: only in left: 4", "/a/2: only in right: [3, 4, 5]",
    ]),
    "elements aligned by the rules": (
        [{"n": 1.000001, "at": 1}, {"n": 2}], [{"n": 0}, {"n": 1.000002, "at": 2}, {"n": 2.0, "at": 3}],
        {"ignore": ["/*/at"]}, ['/0: only in right: {"n": 0}'],
    ),
    "matched elements": (
        {"a": [{"id": 1, "n": 1}, {"id": "1"}, {"id": 3, "n": 3}]}, {"a": [{"id": 4}, {"id": 3, "n": 3}, {"id": 1, "n": 0}]},
        {"match": {"/a": "id"}}, ["/a/0/n: 1 != 0", '/a/1: only in left: {"id": "1"}', '/a/0: only in right: {"id": 4}'],
    ),
    "elements matched by the first pointer that fits": (
        {"a": [{"id": 1, "n": 1}, {"id": 2, "n": 2}]}, {"a": [{"id": 2, "n": 1}, {"id": 1, "n": 2}]},
        {"match": {"/*": "n", "/a": "id"}}, ["/a/0/id: 1 != 2", "/a/1/id: 2 != 1"],
    ),
    "matched elements, one ignored by its index on the left": (
        [{"id": 1, "n": 0}, {"id": 2, "n": 0}], [{"id": 2, "n": 1}, {"id": 1, "n": 1}],
        {"match": {"": "id"}, "ignore": ["/0"]}, ["/1/n: 0 != 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "left, right, arguments, lines", FOUND.values(), ids=FOUND.keys()
)
def test_each_difference_is_one_line_of_text(
    left: Any, right: Any, arguments: dict[str, Any], lines: list[str]
) -> None:
    assert [str(found) for found in differences(left, right, **arguments)] == lines


def test_a_difference_has_the_pointer_kind_and_both_values() -> None:
    left = {"a": [1, {"b": 2}], "only": None}
    right = {"a": [1, {"b": 3}, 4]}
    assert list(differences(left, right)) == [
        Difference("/a/1/b", "changed", 2, 3),
        Difference("/a/2", "only_right", None, 4),
        Difference("/only", "only_left", None, None),
    ]


@pytest.mark.parametrize(
    "key, pointer",
    [
        ("a", "/a"), ("", "/"), ("a/b", "/a~1b"), ("m~n", "/m~0n"), ("~1", "/~01"),
        ("*", "/*"), (" ", "/ "), ("0", "/0"), ("\n", "/\n"), ("é", "/é"),
    ],
)  # fmt: skip
def test_the_place_is_a_json_pointer(key: str, pointer: str) -> None:
    (found,) = differences({key: 1}, {key: 2})
    assert found.pointer == pointer
    assert list(differences({key: 1}, {key: 2}, ignore=[pointer])) == []


def test_differences_are_found_one_by_one() -> None:
    found = differences([1, object()], [2, object()])
    assert next(found).pointer == "/0"
    with pytest.raises(TypeError):
        next(found)


def test_documents_are_not_modified() -> None:
    left = defaultdict(list, {"a": [1, {"b": 1.5}], "c": []})
    right = defaultdict(list, {"a": [2, {"b": 2.5}, 3], "d": {}})
    before = copy.deepcopy((left, right))
    list(differences(left, right, ignore=["/a/*/b", "/e"]))
    assert (left, right) == before


@pytest.mark.parametrize(
    "pointer", ["/a/0/b", "/*/*/*", "/**/b", "/a/**", "/**", "/**/**"]
)
def test_patterns_choose_the_arrays_to_match(pointer: str) -> None:
    left = {"a": [{"b": [{"k": 1, "n": 1}, {"k": 2}], "k": 1}]}
    right = {"a": [{"b": [{"k": 2}, {"k": 1, "n": 2}], "k": 1}]}
    (found,) = differences(left, right, match={pointer: "k"})
    assert found.pointer == "/a/0/b/0/n"


@pytest.mark.parametrize(
    "element", [{"n": 1}, 5, {"id": 1.5}, {"id": True}, {"id": [1]}, {"id": 0, "n": 1}]
)
def test_elements_that_cannot_be_matched_are_an_error(element: Any) -> None:
    problem = "(no string or integer|the same) 'id' (to match|as element 0)"
    bad, good = {"a": [{"id": 0}, element]}, {"a": [{"id": 0}]}
    for left, right, side in ((bad, good, "left"), (good, bad, "right")):
        message = f"^/a/1 in the {side} document has {problem}$"
        with pytest.raises(ValueError, match=message):
            compare(left, right, match={"/a": "id"})
    assert compare(bad, copy.deepcopy(bad), match={"/a": "id"})


DIFFERING = ["/id", "/items/0/at", "/items/1/at", "/items/1/n", "/a~1b", "/new"]


@pytest.mark.parametrize(
    "ignore, ignored",
    [
        ([], []),
        (["/id"], ["/id"]),
        (["/new"], ["/new"]),
        (["/items", "/a~1b"], ["/items/0/at", "/items/1/at", "/items/1/n", "/a~1b"]),
        (["/items/1"], ["/items/1/at", "/items/1/n"]),
        (["/items/*/at"], ["/items/0/at", "/items/1/at"]),
        (["/*/*/at", "/id"], ["/id", "/items/0/at", "/items/1/at"]),
        (["/*/*"], ["/items/0/at", "/items/1/at", "/items/1/n"]),
        (["/*"], DIFFERING),
        ([""], DIFFERING),
        (["/**"], DIFFERING),
        (["/**/at"], ["/items/0/at", "/items/1/at"]),
        (["/**/items/**/n"], ["/items/1/n"]),
        (["/**/1"], ["/items/1/at", "/items/1/n"]),
        (["/items/**"], ["/items/0/at", "/items/1/at", "/items/1/n"]),
        (["/**/**/*/at"], ["/items/0/at", "/items/1/at"]),
        (["/**/x", "/", "/items/01", "/items/-", "/id/x", "/Items", "/a/b"], []),
    ],
)
def test_ignored_values_are_not_compared(ignore: list[str], ignored: list[str]) -> None:
    left = {"id": 1, "items": [{"at": 1, "n": 1}, {"at": 1, "n": 1}], "a/b": 1}
    right = {"id": 2, "items": [{"at": 2, "n": 1}, {"n": 2}], "a/b": 2, "new": 0}
    found = [each.pointer for each in differences(left, right, ignore=ignore)]
    assert found == [each for each in DIFFERING if each not in ignored]
    assert compare(left, right, ignore=iter(ignore)) is (not found)


def test_ignored_values_need_not_be_json() -> None:
    assert compare({"a": object(), "b": 1}, {"a": {1: 2}, "b": 1}, ignore=["/a"])


@pytest.mark.parametrize("function", [compare, differences, assert_equal])
def test_bad_arguments_are_refused_at_once(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="places must be 0 or more, not -1"):
        function({}, {}, places=-1)
    with pytest.raises(TypeError, match="a list of pointers, not a string: '/a'"):
        function({}, {}, ignore="/a")
    with pytest.raises(TypeError, match="match must map pointers to keys, but is 'id'"):
        function({}, {}, match="id")
    for pointer in ["a", "a/b", "#/a", "*", "/~", "/~2", "/a~/b"]:
        message = f"not a JSON Pointer .*: {re.escape(repr(pointer))}"
        with pytest.raises(ValueError, match=message):
            function({}, {}, ignore=["/good", pointer])
        with pytest.raises(ValueError, match=message):
            function({}, {}, match={pointer: "id"})


# Against a slow and obvious implementation


ABSENT: Any = object()
Found = tuple[str, str, Any, Any]


def reference(left: Any, right: Any, pointer: str = "") -> list[Found]:
    """Find the differences; the tables above test which scalars compare() finds equal."""

    def inside(key: str | int, a: Any, b: Any) -> list[Found]:
        segment = str(key).replace("~", "~0").replace("/", "~1")
        return reference(a, b, f"{pointer}/{segment}")

    def count_equal(members: Iterable[tuple[int, Any, Any]]) -> int:
        return len(list(takewhile(lambda member: not inside(*member), members)))

    if right is ABSENT:
        return [(pointer, "only_left", left, None)]
    if left is ABSENT:
        return [(pointer, "only_right", None, right)]
    members: list[tuple[str | int, Any, Any]]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        members = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys]
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        head = tail = 0
        if len(left) != len(right):
            indexes = range(len(left))
            head = count_equal(zip(indexes, left, right))
            backwards = zip(reversed(indexes), reversed(left), reversed(right))
            tail = count_equal(islice(backwards, min(len(left), len(right)) - head))
        lefts, rights = left[head : len(left) - tail], right[head : len(right) - tail]
        pairs = zip_longest(lefts, rights, fillvalue=ABSENT)
        members = [(index, a, b) for index, (a, b) in enumerate(pairs, head)]
    elif compare(left, right):
        return []
    else:
        return [(pointer, "changed", left, right)]
    return [found for member in members for found in inside(*member)]


SCALARS: list[Any] = [None, True, False, 0, 1, -1, 2**53, 2**53 + 1, 10**400]
SCALARS += ["", "a", "1", "\ud800", 0.0, -0.0, 1.0, 1.000004, 1.000008, 1.00001, 1.5]
SCALARS += [1e300, NAN, INFINITY, -INFINITY, Decimal("NaN"), Decimal(1)]
SCALARS += [Decimal("1.000004"), Decimal("1.000005")]
KEYS = ["a", "b", "", "~", "/", "~1", "*", "0", "é", "\ud800"]


def random_document(chance: random.Random, depth: int = 4) -> Any:
    if not depth or chance.random() < 0.3:
        return chance.choice(SCALARS)
    keys = chance.sample(KEYS, chance.randrange(5))
    members = [(key, random_document(chance, depth - 1)) for key in keys]
    if chance.random() < 0.5:
        return chance.choice([dict, OrderedDict])(members)
    return chance.choice([list, tuple])(value for _, value in members)


def random_change(chance: random.Random, document: Any) -> Any:
    """Return a copy with a few changes, most of them small."""
    if chance.random() < 0.05:
        return random_document(chance, 2)
    if not isinstance(document, (dict, list, tuple)):
        return document
    items: Any = document.items() if isinstance(document, dict) else enumerate(document)
    members = [(key, random_change(chance, value)) for key, value in items]
    if members and chance.random() < 0.1:
        members.pop(chance.randrange(len(members)))
    if chance.random() < 0.1:
        new = chance.choice(KEYS), random_document(chance, 1)
        members.insert(chance.randrange(len(members) + 1), new)
    if isinstance(document, dict):
        return type(document)(members)
    return type(document)(value for _, value in members)


def test_random_documents_differ_where_the_reference_says_they_do() -> None:
    chance = random.Random(3)
    verdicts = []
    for number in range(4000):
        left = random_document(chance)
        right = random_change(chance, left) if number % 5 else random_document(chance)
        expected = reference(left, right)
        assert [tuple(found) for found in differences(left, right)] == expected
        assert compare(left, right) is compare(right, left) is (not expected)
        verdicts.append(not expected)
    assert 1000 < sum(verdicts) < 3000


# Depth and size


def type_name(value: object) -> str:
    return type(value).__name__


def nested(levels: int, innermost: Any) -> Any:
    document = innermost
    for level in range(levels):
        document = [document] if level % 2 else {"a": document}
    return document


def test_a_hundred_thousand_levels_are_not_too_deep() -> None:
    levels = 100_000
    left, right = nested(levels, [1, 1]), nested(levels, [1.000001, 2])
    (found,) = differences(left, right)
    assert found.pointer == "/0/a" * (levels // 2) + "/1"
    line = str(Difference("", "changed", left, None))
    assert re.fullmatch(r'(\[{"a": )+.{0,6}… != null', line)


def test_aligning_nested_arrays_does_not_take_exponential_time() -> None:
    left: Any = [0]
    right: Any = [1]
    for _ in range(300):
        left, right = [left, 0], [right, 0, 0]
    assert len(list(differences(left, right))) == 301


def test_the_same_object_may_occur_in_several_places() -> None:
    shared, other = nested(2000, [1]), nested(2000, [2])
    assert len(list(differences([shared, shared], [other, other]))) == 2


def test_documents_that_contain_themselves_are_refused() -> None:
    left: list[Any] = []
    left.append({"a": left})
    right: list[Any] = []
    right.append({"a": right})
    message = "^(/0/a)+ in the left document contains itself$"
    with pytest.raises(ValueError, match=message):
        compare(left, right)
    assert not compare(left, [[]])


@pytest.mark.parametrize("alien", [{1}, b"a", 1j, object(), range(3)], ids=type_name)
@pytest.mark.parametrize(
    "left, right, place",
    [
        (lambda x: x, lambda x: x, "the document"),
        (lambda x: x, lambda x: 1, "the document"),
        (lambda x: [0, x], lambda x: [0, x], "/1"),
        (lambda x: {"a/b": [x]}, lambda x: {"a/b": [None]}, "/a~1b/0"),
        (lambda x: [x], lambda x: [], "/0"),
        (lambda x: {"a": x}, lambda x: {}, "/a"),
    ],
)
def test_other_types_are_refused_naming_their_place(
    alien: Any, left: Callable[[Any], Any], right: Callable[[Any], Any], place: str
) -> None:
    message = f"^{place} is of type {type_name(alien)}, which is not a JSON type$"
    for a, b in ((left(alien), right(alien)), (right(alien), left(alien))):
        with pytest.raises(TypeError, match=message):
            compare(a, b)


@pytest.mark.parametrize("key", [1, True, None, 1.5, (), b"a"], ids=repr)
def test_keys_that_are_not_strings_are_refused_naming_their_place(key: Any) -> None:
    bad, good = {"x": [{"a": 1, key: 1}]}, {"x": [{"a": 1}]}
    message = f"^/x/0 has a key of type {type_name(key)}, not str: "
    for left, right in ((bad, bad), (bad, good), (good, bad)):
        with pytest.raises(TypeError, match=message):
            compare(left, right)


@pytest.mark.parametrize("count", [1, 10, 11])
def test_an_assertion_error_lists_the_first_ten_differences(count: int) -> None:
    lines = [f"  /{index}: 0 != 1" for index in range(min(count, 10))]
    lines += ["  and more"] if count > 10 else []
    message = "\n".join(["the JSON documents differ:", *lines])
    with pytest.raises(AssertionError, match=f"^{message}$"):
        assert_equal([0] * count, [1] * count)


def test_nothing_is_raised_for_equal_documents() -> None:
    left = {"a": 1, "b": [{"id": 1}, {"id": 2}], "c": 1.1}
    right = {"a": 2, "b": [{"id": 2}, {"id": 1}], "c": 1.2}
    assert_equal(left, right, ignore=["/a"], match={"/b": "id"}, places=0)


# Reading


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]
ENCODINGS += ["utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "text",
    ['{"é": ["\\ud800", "😀"]}', "1", '"ĀĀ"', " 12", "[\n1]", "[NaN, Infinity, -Infinity]"],
)  # fmt: skip
def test_every_encoding_of_rfc_4627_is_read(
    encoding: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(encoding))
    for source in (path, path.read_bytes(), bytearray(path.read_bytes())):
        assert compare(load(source), json.loads(text))


def test_text_may_start_with_a_byte_order_mark() -> None:
    assert load("\ufeff[1]") == [1]


def test_a_key_may_occur_in_several_objects() -> None:
    text = '[{"a": {"a": 1}}, {"a": 2}]'
    assert load(text) == json.loads(text)


def test_the_error_for_a_file_name_passed_as_str_suggests_path() -> None:
    with pytest.raises(json.JSONDecodeError) as info:
        load("old.json")
    assert "pass a pathlib.Path" in "".join(info.value.__notes__)
    with pytest.raises(json.JSONDecodeError) as info:
        load(b"old.json")
    assert not hasattr(info.value, "__notes__")


def test_an_integer_too_long_for_int_is_read_exactly() -> None:
    digits = "9" * 5000
    assert load(f'{{"a": -{digits}}}') == {"a": -(10**5000 - 1)}
    assert compare(load(digits), 10**5000 - 1)
    assert not compare(load(digits), 10**5000)
    assert not compare(load(digits), load("9" * 4999 + "8"))
    assert not compare(load(digits), 1.5)
    assert not compare(load(digits), INFINITY)


DEEP = b"[" * 100_000

# content, what load() says, and what main() adds
BAD = {
    "nothing": (b"", "Expecting value", ": line 1 column 1"),
    "a blank": (b" \n", "Expecting value", ": line 2 column 1"),
    "no JSON": (b'{"a":\n tru}', "Expecting value", ": line 2 column 2"),
    "two documents": (b"{} {}", "Extra data", ": line 1 column 4"),
    "JSON Lines": (b"{}\n{}\n", "Extra data", ": line 2 column 1 (if these are JSON Lines, use --lines)"),
    "no end": (b'{"a": "', "Unterminated string starting at", ": line 1 column 7"),
    "a NUL": (b'["\0"]', "Invalid control character at", ": line 1 column 3"),
    "a bad byte": (b'["\xff"]', "'utf-8' codec can't decode byte 0xff in position 2: invalid start byte", ""),
    "half a character": (b'"a\xe2\x82', "'utf-8' codec can't decode bytes in position 2-3: unexpected end of data", ""),
    "half of a UTF-16 unit": (b"\0[\0]\0", "'utf-16-be' codec can't decode byte 0x00 in position 4: truncated data", ""),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', "'utf-8' codec can't decode byte 0xed in position 1: invalid continuation byte", ""),
    "a key twice": (b'{"a": 1,\n "b": {}, "a": 2}', 'key "a" occurs twice in one object', ""),
    "a key twice, once escaped": (b'[{"b": "a", "\\u0062" : 1}]', 'key "b" occurs twice in one object', ""),
    "a long key twice": (b'{"%s": 1, "%s": 2}' % (b"k" * 99, b"k" * 99), f'key "{"k" * 59}… occurs twice in one object', ""),
    "deep nesting": (DEEP + DEEP.replace(b"[", b"]"), "nested too deeply for the parser", ""),
    "deep nesting without end": (DEEP, "nested too deeply for the parser", ""),
}  # fmt: skip


@pytest.mark.parametrize("content, message, _", BAD.values(), ids=BAD.keys())
def test_a_bad_document_is_refused(content: bytes, message: str, _: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load(content)


# From a shell


class Shell:
    """Call main() with files of the given contents."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def __call__(
        self, left: str | bytes, right: str | bytes, *options: str
    ) -> tuple[int, list[str], list[str]]:
        """Return exit status, lines on standard output and on standard error."""
        status = main([self.file("left", left), self.file("right", right), *options])
        captured = self.capsys.readouterr()
        err = captured.err.replace(str(self.folder) + os.sep, "")
        return status, captured.out.splitlines(), err.splitlines()


@pytest.fixture
def shell(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    monkeypatch.setattr(sys, "argv", [json_compare.__file__])
    return Shell(tmp_path, capsys)


# left, right, options, exit status, lines of output
RUNS: dict[str, tuple[str, str, str, int, list[str]]] = {
    "equal": ('{"a": 1.000001}', '{"a": 1.000002}', "", 0, []),
    "different": ('{"a": 1.1, "b": [1, {"c": 4}]}', '{"a": 1.2, "b": [1]}', "", 1, ["/a: 1.1 != 1.2", '/b/1: only in left: {"c": 4}']),
    "quiet": ("1", "2", "-q", 1, []),
    "quiet and equal": ("1", "1", "--quiet", 0, []),
    "places": ("1.1", "1.2", "--places 0", 0, []),
    "ignore": ('{"a": 1, "b": 1, "c": 1}', '{"a": 2, "b": 2, "c": 2}', "--ignore /b --ignore=/c", 1, ["/a: 1 != 2"]),
    "match": (
        '{"a=": [{"id": 1}, {"id": 2}], "b": [{"c": [{"k": 1}, {"k": 2}]}]}',
        '{"a=": [{"id": 2}, {"id": 1}], "b": [{"c": [{"k": 2}, {"k": 1}]}]}', "--match /**/c=k --match=/a==id", 0, [],
    ),
    "json": ('{"a": 1, "b": [2], "é": null}', '{"a": NaN, "b": [2, "\\ud800"]}', "--json", 1, [
        '{"pointer": "/a", "kind": "changed", "left": 1, "right": NaN}',
        '{"pointer": "/b/1", "kind": "only_right", "right": "\\ud800"}',
        '{"pointer": "/\\u00e9", "kind": "only_left", "left": null}',
    ]),
    "json and equal": ("1", "1", "--json", 0, []),
    "an integer too long for int()": ("9" * 5000, "1", "--json", 1, [f'{{"pointer": "", "kind": "changed", "left": "{"9" * 5000}", "right": 1}}']),
    "lines": (
        '{"n": 1.0}\n{"id": 2}\n[3]\n4\n', '{"n": 1.000001}\n{"id": 3}\n[3, 4]\n5\n', "--lines", 1,
        ["line 2: /id: 2 != 3", "line 3: /1: only in right: 4", "line 4: 4 != 5"],
    ),
    "lines on the left only": ("1\n[2]\nnull\n", "1\n", "--lines", 1, ["line 2: only in left: [2]", "line 3: only in left: null"]),
    "lines on the right only": ("", "1", "--lines", 1, ["line 1: only in right: 1"]),
    "lines, pointers start in each": ('{"a": 1}\n' * 2, '{"a": 2}\n' * 2, "--lines --ignore /a", 0, []),
    "lines with and without a last line feed": ("1\n2\n", "1\n2", "--lines", 0, []),
    "lines that end as on Windows": ("1\n2\n", "1\r\n 2 \r\n", "--lines", 0, []),
    "lines with a byte order mark": ("1\n2\n", "\ufeff1\n2\n", "--lines", 0, []),
    "lines with other separators in them": ('"\u2028\x85"', '"\\u2028\\u0085"', "--lines", 0, []),
    "lines as json": ("1\n2\n", "1\n3\n", "--json --lines", 1, ['{"line": 2, "pointer": "", "kind": "changed", "left": 2, "right": 3}']),
}  # fmt: skip


@pytest.mark.parametrize(
    "left, right, options, status, lines", RUNS.values(), ids=RUNS.keys()
)
def test_the_status_and_the_output_show_the_differences(
    left: str, right: str, options: str, status: int, lines: list[str], shell: Shell
) -> None:
    assert shell(left, right, *options.split()) == (status, lines, [])


@pytest.mark.parametrize("content, message, place", BAD.values(), ids=BAD.keys())
def test_bad_input_gives_status_2_and_one_line(
    shell: Shell, content: bytes, message: str, place: str
) -> None:
    line = f"json_compare.py: right: {message}{place}"
    assert shell("{}", content) == (2, [], [line])
    assert shell(content, "{}") == (2, [], [line.replace("right", "left", 1)])


def test_an_impossible_match_gives_status_2_and_one_line(shell: Shell) -> None:
    message = "/0 in the right document has no string or integer 'id' to match"
    result = shell('[{"id": 1}]', "[1]", "--match", "=id")
    assert result == (2, [], [f"json_compare.py: {message}"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("left", "the following arguments are required: RIGHT"),
        ("left right --places x", "argument --places: invalid int value: 'x'"),
        ("left right --places -1", "places must be 0 or more, not -1"),
        ("left right --ignore a", "not a JSON Pointer (must start with /): 'a'"),
        ("left right --ignore /~", "not a JSON Pointer (write ~ as ~0): '/~'"),
        ("left right --match /a", "argument --match: not POINTER=KEY: '/a'"),
        ("left right --match /a=id --match /a=n", "argument --match: a pointer can have only one key"),
        ("left right --match a=id", "not a JSON Pointer (must start with /): 'a'"),
        ("- -", "only one of LEFT and RIGHT can be standard input"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_gives_status_2(
    arguments: str, message: str, shell: Shell
) -> None:
    with pytest.raises(SystemExit) as info:
        main(arguments.split())
    assert info.value.code == 2
    err = shell.capsys.readouterr().err
    assert err.startswith("usage: json_compare.py ")
    assert err.endswith(f"json_compare.py: error: {message}\n")


@pytest.mark.parametrize(
    "name, problem", [("none", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_gives_status_2_and_one_line(
    name: str, problem: str, shell: Shell
) -> None:
    path, good = str(shell.folder / name), shell.file("good", "{}")
    for arguments in ([path, good], [good, path], [path, path, "--lines"]):
        assert main(arguments) == 2
        error = f"json_compare.py: {path}: {problem}\n"
        assert shell.capsys.readouterr() == ("", error)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"1\n2\n\n4\n", "Expecting value: line 3 column 1"),
        (b"1\n2\n\n", "Expecting value: line 3 column 1"),
        (b"1\n2\n[3\n]\n", "Expecting ',' delimiter: line 3 column 3"),
        (b'1\n2\n{"a": 1, "a": 1}', 'key "a" occurs twice in one object: line 3'),
        (b"1\n2\n\xff]", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte: line 3"),
        (b"1\n2\n" + DEEP, "nested too deeply for the parser: line 3"),
    ],
)  # fmt: skip
def test_a_bad_line_gives_status_2_after_the_differences_before_it(
    content: bytes, message: str, shell: Shell
) -> None:
    assert shell("1\n3\n3\n4\n", content, "--lines") == (
        2,
        ["line 2: 3 != 2"],
        [f"json_compare.py: right: {message}"],
    )


def test_json_lines_are_read_one_record_at_a_time(shell: Shell) -> None:
    def peak(records: int) -> int:
        content = '{"id": 1, "text": "%s"}\n' % ("x" * 1000) * records
        arguments = [shell.file("left", content), shell.file("right", content)]
        tracemalloc.start()
        try:
            assert main([*arguments, "--lines"]) == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(1000) < peak(100) + 50_000


def test_a_closed_pipe_ends_the_output_silently_with_status_1(shell: Shell) -> None:
    left = shell.file("left", json.dumps([0] * 100_000))
    right = shell.file("right", json.dumps([1] * 100_000))
    with running_script("json_compare.py", left, right) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "/0: 0 != 1\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(
    "encoding, shown", [("utf-8", "日"), ("ascii", "\\u65e5"), ("cp1252", "\\u65e5")]
)
def test_characters_that_the_terminal_cannot_show_are_escaped(
    encoding: str, shown: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    left, right = shell.file("left", '"\\ud800 日"'), shell.file("right", "1")
    with running_script("json_compare.py", left, right) as process:
        assert process.communicate() == (f'"\\ud800 {shown}" != 1\n', "")
    assert process.returncode == 1


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_disk_gives_status_2_and_one_line(size: int, shell: Shell) -> None:
    left = shell.file("left", json.dumps([1] * size))
    right = shell.file("right", json.dumps([2] * size))
    with (
        open("/dev/full", "w") as full,
        running_script("json_compare.py", left, right, stdout=full) as process,
    ):
        _, err = process.communicate()
    assert err == "json_compare.py: standard output: No space left on device\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    "content, status, problem",
    [("1", 0, ""), ("2", 1, ""), ("[1 2]", 2, "-: Expecting ',' delimiter: line 1 column 4")],
)  # fmt: skip
def test_a_dash_is_standard_input(
    content: str, status: int, problem: str, shell: Shell
) -> None:
    file = shell.file("1.json", "1")
    for arguments in (["-", file], [file, "-"]):
        with running_script("json_compare.py", *arguments, stdin=PIPE) as process:
            _, err = process.communicate(content)
        assert err == (f"json_compare.py: {problem}\n" if problem else "")
        assert process.returncode == status


def test_ctrl_c_gives_status_130_and_ends_the_line(shell: Shell) -> None:
    pipe = shell.folder / "pipe"
    os.mkfifo(pipe)
    with (
        running_script("json_compare.py", pipe, shell.file("right", "1")) as process,
        open(pipe, "wb"),  # waits until the other end is open
    ):
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "\n")
    assert process.returncode == 130
