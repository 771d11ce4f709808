"""Compare two JSON documents; floats are compared to 5 decimal places.

From a shell, like diff(1):

    python json_compare.py old.json new.json --ignore '/**/updated_at'

From other code:

    from json_compare import assert_equal, compare, differences, load

    compare({"price": 1.000001}, {"price": 1.000002})  # True

    for difference in differences(load(Path("old.json")), load(Path("new.json"))):
        print(difference)  # /price: 1.00001 != 1.00002

    assert_equal(response.json(), expected, ignore=["/items/*/updated_at"])

What counts as equal:

- Two integers, however large, if they are identical. Two other numbers (at least one
  of them a float or Decimal) if their difference rounds to zero at `places` decimal
  places, as in unittest.TestCase.assertAlmostEqual. NaN equals NaN, and an infinity
  equals only itself.
- Strings with the same code points. `true`, `false` and `null` equal only themselves;
  `true` is not `1`.
- Arrays of the same length with equal elements in the same order.
- Objects with the same keys, in any order, and equal values. A missing key is not
  `null`.

Documents are what json.loads returns: dict with str keys, list, str, int, float, bool
and None. Decimal, tuple and subclasses of all these types are also accepted. Documents
are never modified and may be nested to any depth.
"""

import argparse
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_UP, Context, Decimal, localcontext
from itertools import chain, islice, zip_longest
from math import isnan
from types import NoneType
from typing import Any, Literal, NamedTuple

PLACES = 5
MAX_LISTED = 10  # differences in an AssertionError
MAX_WIDTH = 60  # characters of a value in a line of output


def compare(
    left: Any,
    right: Any,
    *,
    places: int = PLACES,
    ignore: Iterable[str] = (),
    match: Mapping[str, str] | None = None,
) -> bool:
    """Return whether two documents are equal; see differences() for the arguments."""
    return not any(differences(left, right, places=places, ignore=ignore, match=match))


def assert_equal(
    left: Any,
    right: Any,
    *,
    places: int = PLACES,
    ignore: Iterable[str] = (),
    match: Mapping[str, str] | None = None,
) -> None:
    """Raise an AssertionError that lists the first differences, if there are any.

    For use in tests. See differences() for the arguments and other errors.
    """
    found = differences(left, right, places=places, ignore=ignore, match=match)
    lines = [str(difference) for difference in islice(found, MAX_LISTED)]
    if lines:
        if any(found):
            lines.append("and more")
        raise AssertionError("\n  ".join(["the JSON documents differ:", *lines]))


def differences(
    left: Any,
    right: Any,
    *,
    places: int = PLACES,
    ignore: Iterable[str] = (),
    match: Mapping[str, str] | None = None,
) -> Iterator["Difference"]:
    """Yield each place where two documents differ, as soon as it is found.

    The order is that of the left document, depth first; values that exist only on the
    right come at the end of their object or array. A value that exists on one side only
    is one difference, whatever it contains.

    If two arrays differ in length, equal elements are paired from both ends, and only
    those in between are compared by position. So an inserted or removed block is one
    difference per element. If there are several such blocks, or if elements have moved,
    everything from the first change to the last is compared by position.

    `places` is the number of decimal places that count, 0 or more.

    `ignore` holds JSON Pointers (RFC 6901) to values to ignore, whether they differ,
    are missing or are not JSON at all. A segment `*` stands for any one key or
    index, `**` for any number of them, including none; a key that is itself `*` or `**`
    cannot be singled out. An index is that of the left element, if there is one.

    `match` maps such pointers to keys: {"/items": "id"} pairs the elements
    of /items by the value of their "id" instead of by position. If several pointers fit
    an array, the first is used.

    Raises at once: ValueError for negative `places` or an invalid JSON Pointer,
    TypeError if `ignore` is a string or `match` is not a mapping. Raises on reaching
    the place named in the message: TypeError for a value or key that is not of a JSON
    type; ValueError if the left document contains itself, or if elements cannot be
    matched because one has no string or integer under the key, or two have the same
    one. Elements of identical arrays are not checked.
    """
    if places < 0:
        raise ValueError(f"places must be 0 or more, not {places}")
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a list of pointers, not a string: {ignore!r}")
    if match is not None and not isinstance(match, Mapping):
        raise TypeError(f"match must map pointers to keys, but is {match!r}")
    rules: _Rules = {}
    for pointer in ignore:
        _add_rule(rules, _segments(pointer), None)
    for pointer, key in (match or {}).items():
        _add_rule(rules, _segments(pointer), key)
    return _walk(iter([("", left, right)]), None, rules, places)


class Difference(NamedTuple):
    """A place where two documents differ; str() gives it as one line of text.

    `pointer` is a JSON Pointer (RFC 6901), "" for the whole document. It points into
    the left document, or into the right one if `kind` is "only_right". `left` and
    `right` are the two values, None for one that does not exist.
    """

    pointer: str
    kind: Literal["changed", "only_left", "only_right"]
    left: Any
    right: Any

    def __str__(self) -> str:
        left, right = _text(self.left), _text(self.right)
        if self.kind == "only_left":
            line = f"only in left: {_shorten(left)}"
        elif self.kind == "only_right":
            line = f"only in right: {_shorten(right)}"
        else:
            shared = len(os.path.commonprefix([left, right]))
            start = shared - MAX_WIDTH // 2 if shared >= MAX_WIDTH else 0
            line = f"{_shorten(left, start)} != {_shorten(right, start)}"
        # A key may contain a line feed, so escape it as in a JSON string.
        return f"{_text(self.pointer)[1:-1]}: {line}" if self.pointer else line


# Comparing

_Key = str | int
_Members = Iterator[tuple[_Key, Any, Any]]  # key or index, left value, right value
_Path = tuple["_Path", _Key] | None  # the path to the parent, and the key in it
# The remaining segments of each pattern that fits so far, and what to do at its end:
# match elements by this key, or if it is None, ignore the value.
_Rules = dict[tuple[str, ...], str | None]


class _Absent:
    """The type of the placeholder for a value that does not exist."""


_ABSENT: Any = _Absent()


def _walk(
    members: _Members, path: _Path, rules: _Rules, places: int, align: bool = True
) -> Iterator[Difference]:
    """Yield the differences in some members of the object or array at `path`."""
    near = float(f"4e-{places + 1}")
    unequal: set[int] = set()
    # Documents may be nested deeper than Python can recurse. Maps the id() of each
    # enclosing object or array on the left to the point to continue at after it.
    stack: dict[int, tuple[_Members, _Path, _Rules]] = {}
    while True:
        for key, a, b in members:
            if id(a) not in unequal and _is_plainly_equal(a, b, near, unequal):
                continue
            here = (path, key)
            inner = _advance(rules, key) if rules else rules
            if () in inner and inner[()] is None:
                continue
            kind, other = _json_type(a, here), _json_type(b, here)
            if b is _ABSENT:
                yield Difference(_pointer(here), "only_left", a, None)
            elif a is _ABSENT:
                yield Difference(_pointer(here), "only_right", None, b)
            elif kind == other and kind in ("object", "array"):
                if id(a) in stack:
                    place = _place(here)
                    raise ValueError(f"{place} in the left document contains itself")
                stack[id(a)] = members, path, rules
                path, rules = here, inner
                match = rules.get(())
                if kind == "object":
                    members = _pair_members(a, b, path)
                elif match is not None:
                    members = _pair_matching(a, b, path, match)
                else:
                    members = _pair_elements(a, b, path, rules, places, align)
                break
            elif kind != other or not _same_scalar(a, b, places):
                yield Difference(_pointer(here), "changed", a, b)
        else:
            if not stack:
                return
            _, (members, path, rules) = stack.popitem()


_PLAIN = frozenset([str, int, float, bool, NoneType])


def _is_plainly_equal(left: Any, right: Any, near: float, unequal: set[int]) -> bool:
    """Return whether two values are equal, False if it is hard to tell.

    Most values are equal, and _walk() takes several times as long to find out. Floats
    less than `near` apart are certainly equal. The id() of each left object or array
    for which the result is False is added to `unequal`, so that _walk() need not retry.
    """
    if type(left) is not type(right):
        return False
    if type(left) in _PLAIN:
        return left == right or (type(left) is float and abs(left - right) < near)
    members: Iterable[tuple[_Key, Any]]
    key_type: type
    if type(left) is list:
        members, key_type = enumerate(left), int
    elif type(left) is dict:
        members, key_type = left.items(), str
    else:
        return False
    if len(left) != len(right):
        return False
    try:
        for key, a in members:
            b = right[key]
            if type(a) is not type(b) or type(key) is not key_type:
                break
            if type(a) in _PLAIN:  # a call would cost 10 %
                if a != b and (type(a) is not float or not abs(a - b) < near):
                    break
            elif not _is_plainly_equal(a, b, near, unequal):
                break
        else:
            return True
    except (KeyError, RecursionError):
        pass
    unequal.add(id(left))
    return False


def _pair_members(
    left: Mapping[str, Any], right: Mapping[str, Any], path: _Path
) -> _Members:
    for key in chain(left, right):
        if not isinstance(key, str):
            name = f"{type(key).__name__}, not str: {key!r}"
            raise TypeError(f"{_place(path)} has a key of type {name}")
    for key, a in left.items():
        yield key, a, right.get(key, _ABSENT)
    for key, b in right.items():
        if key not in left:
            yield key, _ABSENT, b


def _pair_elements(
    left: Sequence[Any],
    right: Sequence[Any],
    path: _Path,
    rules: _Rules,
    places: int,
    align: bool,
) -> _Members:
    """Pair elements by position, after leaving out the equal ones at both ends."""

    def equal(index: int, b: Any) -> bool:
        # Aligning within elements could take exponential time, for the same result.
        member = iter([(index, left[index], b)])
        return not any(_walk(member, path, rules, places, align=False))

    start, end, other_end = 0, len(left), len(right)
    if align and end != other_end:
        while start < min(end, other_end) and equal(start, right[start]):
            start += 1
        while start < min(end, other_end) and equal(end - 1, right[other_end - 1]):
            end, other_end = end - 1, other_end - 1
    return zip_longest(
        range(start, max(end, other_end)),
        left[start:end],
        right[start:other_end],
        fillvalue=_ABSENT,
    )


def _pair_matching(
    left: Sequence[Any], right: Sequence[Any], path: _Path, key: str
) -> _Members:
    """Pair elements that have the same value under a key."""

    def indexes(elements: Sequence[Any], side: str) -> dict[_Key, int]:
        found: dict[_Key, int] = {}
        for index, element in enumerate(elements):
            value: Any = element.get(key) if isinstance(element, dict) else None
            if type(value) not in (str, int):
                problem = f"no string or integer {key!r} to match"
            elif value in found:
                problem = f"the same {key!r} as element {found[value]}"
            else:
                found[value] = index
                continue
            place = _place((path, index))
            raise ValueError(f"{place} in the {side} document has {problem}")
        return found

    lefts, rights = indexes(left, "left"), indexes(right, "right")
    for value, index in lefts.items():
        yield index, left[index], right[rights[value]] if value in rights else _ABSENT
    for value, index in rights.items():
        if value not in lefts:
            yield index, _ABSENT, right[index]


_JSON_TYPES: dict[type, str] = {
    dict: "object",
    list: "array",
    tuple: "array",
    str: "string",
    int: "number",
    float: "number",
    Decimal: "number",
    bool: "boolean",
    NoneType: "null",
    _Absent: "absent",
}


def _json_type(value: Any, path: _Path) -> str:
    for base in type(value).__mro__:  # in which bool comes before int
        if base in _JSON_TYPES:
            return _JSON_TYPES[base]
    name = type(value).__name__
    raise TypeError(f"{_place(path)} is of type {name}, which is not a JSON type")


# The difference of two Decimals may have more than 28 digits; rounding it up cannot
# take it across the limit, which has one digit. Without traps, a result out of range is
# infinite or NaN, and thus not within the limit.
_CONTEXT = Context(rounding=ROUND_UP, traps=[])


def _same_scalar(left: Any, right: Any, places: int) -> bool:
    """Return whether two scalars of the same JSON type are equal."""
    if left == right:
        return True
    if isinstance(left, str):
        return False
    if isinstance(left, Decimal) or isinstance(right, Decimal):
        with localcontext(_CONTEXT):
            a, b = Decimal(left), Decimal(right)  # exact even for int and float
            half = Decimal(5).scaleb(-places - 1)  # rounds to the even digit, 0
            return a.is_nan() and b.is_nan() or abs(a - b) <= half
    try:
        both_nan = isnan(left) and isnan(right)
        return both_nan or bool(round(abs(left - right), places) == 0)
    except OverflowError:  # an integer too large for a float
        return False


# Pointers and patterns


def _pointer(path: _Path) -> str:
    segments = []
    while path:
        path, key = path
        segments.append(str(key).replace("~", "~0").replace("/", "~1"))
    return "/".join(reversed(segments))


def _place(path: _Path) -> str:
    return _pointer(path) or "the document"


def _segments(pointer: str) -> tuple[str, ...]:
    """Split a JSON Pointer; the first segment, the whole document, is always empty."""
    if pointer and not pointer.startswith("/"):
        raise ValueError(f"not a JSON Pointer (must start with /): {pointer!r}")
    if re.search("~(?![01])", pointer):
        raise ValueError(f"not a JSON Pointer (write ~ as ~0): {pointer!r}")
    segments = pointer.split("/")
    return tuple(each.replace("~1", "/").replace("~0", "~") for each in segments)


def _add_rule(rules: _Rules, segments: tuple[str, ...], match: str | None) -> None:
    rules.setdefault(segments, match)
    if segments and segments[0] == "**":  # which may match no keys at all
        _add_rule(rules, segments[1:], match)


def _advance(rules: _Rules, key: _Key) -> _Rules:
    """Return the rules for the value under a key: () for itself, others below it."""
    inner: _Rules = {}
    for segments, match in rules.items():
        if segments and segments[0] in ("*", "**", str(key)):
            rest = segments if segments[0] == "**" else segments[1:]
            _add_rule(inner, rest, match)
    return inner


# Reading


def load(source: bytes | bytearray | str | os.PathLike[str]) -> Any:
    """Read one JSON document: from bytes, from text, or from the file at a path.

    A str is text; wrap a file name in pathlib.Path. Bytes are UTF-8, UTF-16 or UTF-32,
    with or without a byte order mark, detected as in RFC 4627, section 3.

    Returns what json.loads returns, including NaN and the infinities, except that an
    integer too long for int(), of more than 4300 digits, is a Decimal, which is exact.

    Raises OSError if the file cannot be read; json.JSONDecodeError, a ValueError, for
    text that is not JSON (RFC 8259); and ValueError for bytes that are not text, a key
    that occurs twice in one object, and nesting too deep for the standard library's
    parser (1000 levels in CPython 3.11).
    """
    if isinstance(source, os.PathLike):
        with open(source, "rb") as file:
            source = file.read()
    if isinstance(source, str):
        text = source
    else:
        text = source.decode(json.detect_encoding(source))
    try:
        return _DECODER.decode(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as exc:
        if isinstance(source, str):
            exc.add_note("A str is JSON text; to read a file, pass a pathlib.Path.")
        raise
    except RecursionError:
        raise ValueError("nested too deeply for the parser") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {_shorten(_text(key))} occurs twice in one object")
    return members


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # too long: int() takes quadratic time, Decimal() does not
        return Decimal(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


# Writing

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


def _text(value: Any) -> str:
    """Write a value as JSON; an array or object only as far as a line shows it."""
    if isinstance(value, Decimal):
        return str(value)
    try:
        return "".join(islice(_ENCODER.iterencode(value), MAX_WIDTH + 1))
    except ValueError:  # an integer too long for str(), or a value that contains itself
        return "…"


def _shorten(text: str, start: int = 0) -> str:
    end = start + MAX_WIDTH
    return ("…" if start else "") + text[start:end] + ("…" if len(text) > end else "")


# Command line


def _documents(name: str, by_line: bool) -> Iterator[Any]:
    """Yield the document in a file, or in each of its lines; errors name the file."""
    number = 1
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            if by_line:
                for number, line in enumerate(file, 1):
                    yield load(line.decode().rstrip("\r\n"))  # JSON Lines are UTF-8
            else:
                yield load(file.read())
    except json.JSONDecodeError as exc:
        hint = ""
        if exc.msg == "Extra data" and exc.lineno > 1:
            hint = " (if these are JSON Lines, use --lines)"
        place = f"line {exc.lineno + number - 1} column {exc.colno}"
        raise ValueError(f"{name}: {exc.msg}: {place}{hint}") from None
    except ValueError as exc:
        place = f": line {number}" if by_line else ""
        raise ValueError(f"{name}: {exc}{place}") from None
    except OSError as exc:
        raise ValueError(f"{name}: {exc.strerror}") from None


def _print_differences(args: argparse.Namespace, options: dict[str, Any]) -> int:
    status = 0
    lefts = _documents(args.left, args.lines)
    rights = _documents(args.right, args.lines)
    pairs = zip_longest(lefts, rights, fillvalue=_ABSENT)
    for number, (left, right) in enumerate(pairs, 1):
        for difference in differences(left, right, **options):
            status = 1
            if args.quiet:
                return status
            if args.json:
                record: dict[str, Any] = {"line": number} if args.lines else {}
                record |= difference._asdict()
                if difference.kind != "changed":
                    del record["right" if difference.kind == "only_left" else "left"]
                print(json.dumps(record, default=str))
            else:
                print(f"line {number}: {difference}" if args.lines else difference)
    sys.stdout.flush()  # while errors are still caught
    return status


def _pointer_and_key(text: str) -> tuple[str, str]:
    pointer, equals_sign, key = text.rpartition("=")
    if not equals_sign:
        raise argparse.ArgumentTypeError(f"not POINTER=KEY: {text!r}")
    return pointer, key


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare two JSON documents; floats to 5 decimal places.",
        epilog="POINTER is a JSON Pointer, in which * stands for any one key or index and "
        "** for any number of them, as in /**/updated_at; --ignore and --match "
        "may be repeated. Exit status: 0 equal, 1 different, 2 not compared (bad "
        "arguments or input), 130 interrupted.",
    )
    add = parser.add_argument
    add("left", metavar="LEFT", help="a JSON file; - is standard input")
    add("right", metavar="RIGHT", help="the file to compare it with")
    add("--places", type=int, default=PLACES, help="decimal places (default: 5)")
    add(
        "--ignore",
        metavar="POINTER",
        action="append",
        default=[],
        help="a value to ignore",
    )
    add(
        "--match",
        metavar="POINTER=KEY",
        type=_pointer_and_key,
        action="append",
        default=[],
        help="pair the elements of an array by the value of a key: /items=id",
    )
    add("--lines", action="store_true", help="compare JSON Lines, line by line")
    add("--json", action="store_true", help="print a JSON object per difference")
    add("-q", "--quiet", action="store_true", help="print nothing")
    args = parser.parse_args(argv)
    if args.left == args.right == "-":
        parser.error("only one of LEFT and RIGHT can be standard input")
    match = dict(args.match)
    if len(match) < len(args.match):
        parser.error("argument --match: a pointer can have only one key")
    options = {"places": args.places, "ignore": args.ignore, "match": match}
    try:
        differences(None, None, **options)  # only checks the options
    except ValueError as exc:
        parser.error(str(exc))
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _print_differences(args, options)
    except ValueError as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:  # from print(); at exit there would be another
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # such as from head(1)
            return 1
        print(f"{parser.prog}: standard output: {exc.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the terminal shows ^C without a line feed
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
