"""Compare two JSON documents; floats are compared to 5 decimal places.

From a shell, with an exit status like that of diff(1), 0 equal, 1 different, 2 trouble:

    python json_compare.py LEFT RIGHT [--places N] [--ignore POINTER]... [--lines] [-q]

From other code:

    from json_compare import assert_equal, compare, differences, load

    compare({"price": 1.000001}, {"price": 1.000002})  # True

    for difference in differences(load(Path("a.json")), load(Path("b.json"))):
        print(difference)  # /price: 1.00001 != 1.00002

    assert_equal(response.json(), expected, ignore=["/items/*/updated_at"])

What counts as equal:

- Two integers, however large, when they are the same. As soon as one of two numbers is
  a float or Decimal: when their difference rounds to zero at `places` decimal places,
  the definition of unittest.TestCase.assertAlmostEqual. NaN equals NaN, and an infinity
  equals only itself.
- Strings of the same code points. `true`, `false` and `null` equal only themselves;
  `true` is not `1`.
- Arrays of the same length with equal elements in the same order.
- Objects with the same keys, in whatever order, and equal values. A missing key is not
  `null`.

Documents are what json.loads returns: dict with str keys, list, str, int, float, bool
and None; Decimal, tuple and subclasses of any of these are welcome too. They are never
modified, and may be nested to any depth.
"""

import argparse
import codecs
import errno
import io
import json
import math
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from decimal import MAX_EMAX, MIN_EMIN, ROUND_UP, Context, Decimal, localcontext
from itertools import chain, islice, zip_longest
from typing import Any, BinaryIO, Literal, NamedTuple

PLACES = 5
LISTED = 10  # differences that an AssertionError lists
WIDTH = 60  # characters of a value that a line shows
CHUNK = 1 << 16  # bytes of a file that are read at a time
RECURSION = 1000  # levels; what is nested deeper takes a loop with a stack


# Reading


def load(source: bytes | bytearray | str | os.PathLike[str]) -> Any:
    """Read one JSON document: from bytes, from text, or from the file at a path.

    A str is text; wrap the name of a file in pathlib.Path. Bytes are UTF-8, UTF-16 or
    UTF-32, with or without byte order mark, told apart as in RFC 4627, section 3.

    Returns what json.loads returns (NaN and the infinities are read, too), but for an
    integer of more digits than int() takes, 4300: that is a Decimal, just as exact.

    Raises OSError for a path that cannot be read; json.JSONDecodeError, a ValueError
    with `msg`, `lineno` and `colno`, for bytes that are not text, text that is not JSON
    (RFC 8259), a key that occurs twice in one object, and nesting too deep for the
    parser of the standard library (1000 levels in CPython 3.11).
    """
    if isinstance(source, str):
        return _parse(source)
    if isinstance(source, os.PathLike):
        with open(source, "rb") as stream:
            return next(_values(stream, by_line=False))
    return next(_values(io.BytesIO(source), by_line=False))


def _values(stream: BinaryIO, by_line: bool) -> Iterator[Any]:
    """Yield the value of each line, holding one at a time, or that of the whole."""
    number = 1
    parts: list[str] = []  # of the line that is being read
    try:
        for text in _texts(stream):
            *ends, rest = text.split("\n") if by_line else [text]
            for end in ends:
                yield _parse("".join([*parts, end]))
                parts.clear()
                number += 1
            parts.append(rest)
        text = "".join(parts)
        if text or not by_line:
            yield _parse(text)
    except UnicodeDecodeError as exc:
        text = "".join(parts).removeprefix("\ufeff")
        what = f"not {exc.encoding.upper()} text ({exc.reason})"
        error = json.JSONDecodeError(what, text, len(text))
        error.lineno += number - 1
        raise error from None
    except json.JSONDecodeError as exc:
        exc.lineno += number - 1
        raise


def _texts(stream: BinaryIO) -> Iterator[str]:
    """Yield the text of a stream piece by piece.

    Raises UnicodeDecodeError once all the text in front of the bad byte is out, so that
    the caller knows its line and column.
    """
    data = stream.read(4)  # as many as RFC 4627 looks at
    decoder = codecs.getincrementaldecoder(json.detect_encoding(data))()
    while data:
        try:
            pieces: Iterable[str] = [decoder.decode(data)]
        except UnicodeDecodeError:
            pieces = (decoder.decode(bytes([byte])) for byte in data)
        yield from pieces
        data = stream.read(CHUNK)
    yield decoder.decode(b"", final=True)


class _RepeatedKey(Exception):
    """An object has a key twice. The parser does not say where."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _RepeatedKey
    return members


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # a limit, as int() takes quadratic time; Decimal() does not
        return Decimal(digits)


# Two decoders, because a call of _integer for each integer costs 6 %.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LONG_INTEGERS_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _parse(text: str) -> Any:
    text = text.removeprefix("\ufeff")  # RFC 8259, section 8.1 lets a parser ignore it
    try:
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer too long for int()
            return _LONG_INTEGERS_DECODER.decode(text)
    except _RepeatedKey:
        raise _locate_repeated_key(text) from None
    except RecursionError:
        raise _locate_deepest(text) from None


# Strings, together with the colon that makes one a key, and brackets. A string without
# end matches as well: else each quotation mark in it would be tried, in quadratic time.
_TOKEN = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*+"?)(?:[ \t\r\n]*(?P<colon>:))?'
    r"|(?P<opening>[\[{])|[\]}]",
    re.DOTALL,
)


def _locate_repeated_key(text: str) -> json.JSONDecodeError:
    keys: list[set[str]] = []  # of the objects around the token
    for token in _TOKEN.finditer(text):
        if token["opening"]:
            keys.append(set())
        elif not token["string"]:
            keys.pop()
        elif token["colon"]:
            key = json.loads(token["string"])
            if key in keys[-1]:
                what = f"key {_brief(key)} occurs twice in one object"
                return json.JSONDecodeError(what, text, token.start())
            keys[-1].add(key)
    raise AssertionError("no key is repeated")


def _locate_deepest(text: str) -> json.JSONDecodeError:
    depth = deepest = position = 0
    for token in _TOKEN.finditer(text):
        if token["opening"]:
            depth += 1
            if depth > deepest:
                deepest, position = depth, token.start()
        elif not token["string"]:
            depth -= 1
    what = f"nested {deepest} levels deep, too deep for the parser"
    return json.JSONDecodeError(what, text, position)


# Comparing


class Difference(NamedTuple):
    """A place where two documents differ; its str() is the line a shell user reads.

    `pointer` is the place, a JSON Pointer (RFC 6901), "" for the whole document. `kind`
    tells whether the value there has `changed` or is found `only_left` or `only_right`.
    `left` and `right` are the two values, None for the one that is not there.
    """

    pointer: str
    kind: Literal["changed", "only_left", "only_right"]
    left: Any
    right: Any

    def __str__(self) -> str:
        if self.kind == "only_left":
            line = f"only in left: {_brief(self.left)}"
        elif self.kind == "only_right":
            line = f"only in right: {_brief(self.right)}"
        else:
            start = _start(self.left, self.right)
            line = f"{_brief(self.left, start)} != {_brief(self.right, start)}"
        if self.pointer:
            # as a JSON string (RFC 6901, section 5): a key may hold a line feed
            line = f"{_quoted(self.pointer)[1:-1]}: {line}"
        # no UTF-8 terminal takes a lone surrogate
        return line.encode(errors="backslashreplace").decode()


def compare(
    left: Any, right: Any, *, places: int = PLACES, ignore: Iterable[str] = ()
) -> bool:
    """Tell whether two documents are equal. For arguments, errors: differences()."""
    found = differences(left, right, places=places, ignore=ignore)
    return next(found, None) is None


def assert_equal(
    left: Any, right: Any, *, places: int = PLACES, ignore: Iterable[str] = ()
) -> None:
    """Raise an AssertionError that lists the first differences, if there are any.

    For tests. For arguments and other errors: differences().
    """
    found = differences(left, right, places=places, ignore=ignore)
    lines = [str(difference) for difference in islice(found, LISTED)]
    if lines:
        if next(found, None) is not None:
            lines.append("and more")
        raise AssertionError("\n  ".join(["the JSON documents differ:", *lines]))


def differences(
    left: Any, right: Any, *, places: int = PLACES, ignore: Iterable[str] = ()
) -> Iterator[Difference]:
    """Yield each place where two documents differ, as soon as it is found.

    The order is that of the left document, depth first; members that only the right one
    has come at the end of their object or array, in the right one's order. A value that
    stands on one side only is one difference, whatever is in it.

    `places` is the number of decimal places that count, 0 or more. `ignore` holds JSON
    Pointers (RFC 6901) to what does not count, be it different, missing or no JSON at
    all, with everything in it. A segment `*` stands for any one key or index; there is
    no way to mean only a key that is itself `*`.

    Raises ValueError at once for negative `places` or a string in `ignore` that is not
    a JSON Pointer. Raises on the way, when it comes to the place that the message
    names, TypeError for a value or key of a type that JSON does not have, and
    ValueError for a left document that contains itself.
    """
    if places < 0:
        raise ValueError(f"places must be 0 or more, not {places}")
    ignored: _Patterns = {}
    for pointer in ignore:
        segments = _segments(pointer)
        ignored.setdefault(len(segments), []).append(segments)
    return _walk(left, right, places, ignored)


def _segments(pointer: str) -> list[str]:
    """Split a JSON Pointer; its first segment, the document's own, is always empty."""
    if pointer and not pointer.startswith("/"):
        raise ValueError(f"not a JSON Pointer, which starts with /: {pointer!r}")
    if re.search("~(?![01])", pointer):
        raise ValueError(f"not a JSON Pointer, where ~ is written ~0: {pointer!r}")
    return [
        segment.replace("~1", "/").replace("~0", "~") for segment in pointer.split("/")
    ]


class _Absent:
    """The type of what stands for a value that is not there."""


_ABSENT: Any = _Absent()
_Key = str | int
_Members = Iterator[tuple[_Key, Any, Any]]
_Patterns = dict[int, list[list[str]]]  # by number of segments


def _walk(
    left: Any, right: Any, places: int, ignored: _Patterns
) -> Iterator[Difference]:
    # What is surely near enough; _same_number() takes 7 times as long to decide.
    near = 0.49 * 10.0 ** -min(places, 400)
    # Recursion takes 0.6 of the time of the loop below.
    if _is_plainly_equal(left, right, near, RECURSION):
        return
    path: list[_Key] = []  # to the object or array whose members these are
    members: _Members = iter([("", left, right)])
    outer: list[_Members] = []  # what is left to do in those around it
    next_check = 1000
    while True:
        for key, a, b in members:
            if ignored and _is_ignored(ignored, path, key):
                continue
            enter = _MEMBERS.get(type(a)) if type(a) is type(b) else None
            if enter is None:
                kind, other = _kind(a), _kind(b)
                if kind is None or other is None:
                    name = type(a if kind is None else b).__name__
                    place = _place([*path, key])
                    raise TypeError(f"{place} is of type {name}, not known to JSON")
                if kind is other:
                    enter = _MEMBERS.get(kind)
            if enter is not None:
                outer.append(members)
                path.append(key)
                members = enter(a, b, path, near)
                if len(path) == next_check:
                    _refuse_cycle(left, path)
                    next_check *= 2
                break
            if kind is float and other is float:
                same = _same_number(a, b, places)
            else:
                same = kind is other and a == b
            if not same:
                yield _difference(_pointer([*path, key]), a, b)
        else:
            if not outer:
                return
            members = outer.pop()
            path.pop()


def _difference(pointer: str, left: Any, right: Any) -> Difference:
    if right is _ABSENT:
        return Difference(pointer, "only_left", left, None)
    if left is _ABSENT:
        return Difference(pointer, "only_right", None, right)
    return Difference(pointer, "changed", left, right)


# The types of most values. If both sides have the same of these, == knows all.
_PLAIN = frozenset([str, int, float, bool, type(None)])


def _is_plainly_equal(left: Any, right: Any, near: float, levels: int) -> bool:
    """Tell whether two objects or arrays are equal; if it takes any thought, say no.

    `levels` is how much nesting is allowed within them.
    """
    key_type: type
    members: Iterable[tuple[_Key, Any]]
    if type(left) is type(right) is list:
        key_type, members = int, enumerate(left)
    elif type(left) is type(right) is dict:
        key_type, members = str, left.items()
    else:
        return False
    if len(left) != len(right):
        return False
    try:
        for key, a in members:
            b = right[key]
            if type(key) is not key_type:
                return False
            if type(a) in _PLAIN:
                if type(a) is not type(b):
                    return False
                if a != b and (type(a) is not float or not abs(a - b) < near):
                    return False
            elif not levels or not _is_plainly_equal(a, b, near, levels - 1):
                return False
    except (KeyError, RecursionError):
        return False
    return True


def _object_members(
    left: dict[str, Any], right: dict[str, Any], path: list[_Key], near: float
) -> _Members:
    """Yield the members of two objects, but those that are plainly equal."""
    shared = len(left)
    for key, a in left.items():
        b = right.get(key, _ABSENT)
        if (
            type(key) is str
            and type(a) is type(b)
            and type(a) in _PLAIN
            and (a == b or (type(a) is float and abs(a - b) < near))
        ):
            continue
        _require_string(key, path)
        if b is _ABSENT:
            shared -= 1
        yield key, a, b
    if len(right) > shared:
        for key, b in right.items():
            if key not in left:
                _require_string(key, path)
                yield key, _ABSENT, b


def _require_string(key: object, path: list[_Key]) -> None:
    if not isinstance(key, str):
        name = type(key).__name__
        raise TypeError(f"{_place(path)} has a key of type {name}, not str: {key!r}")


def _array_members(
    left: Sequence[Any], right: Sequence[Any], path: list[_Key], near: float
) -> _Members:
    """Yield the elements of two arrays, but those that are plainly equal."""
    # A record or a pair of coordinates takes 0.7 of the time if it need not be yielded.
    # Below the first arrays, a second look at all that is nested would cost too much.
    levels = RECURSION if len(path) <= 2 else 0
    length = len(right)
    for index, a in enumerate(left):
        b = right[index] if index < length else _ABSENT
        if (
            type(a) is type(b)
            and type(a) in _PLAIN
            and (a == b or (type(a) is float and abs(a - b) < near))
        ):
            continue
        if (levels or type(a) is list) and _is_plainly_equal(a, b, near, levels):
            continue
        yield index, a, b
    for index in range(len(left), length):
        yield index, _ABSENT, right[index]


_MEMBERS: dict[type, Callable[[Any, Any, list[_Key], float], _Members]] = {
    dict: _object_members,
    list: _array_members,
}

# What JSON takes a Python type for, by the type that json.loads would use; bool stands
# before int, whose subclass it is.
_KINDS: dict[type, type] = {
    dict: dict,
    list: list,
    tuple: list,
    str: str,
    bool: bool,
    int: float,
    float: float,
    Decimal: float,
    type(None): type(None),
    _Absent: _Absent,
}


def _kind(value: Any) -> type | None:
    kind = _KINDS.get(type(value))
    if kind is None:
        kinds = (_KINDS[base] for base in _KINDS if isinstance(value, base))
        kind = next(kinds, None)
    return kind


def _same_number(left: Any, right: Any, places: int) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, Decimal) or isinstance(right, Decimal):
        return _same_decimal(left, right, places)
    if left == right:  # for the infinities
        return True
    try:
        both_nan = math.isnan(left) and math.isnan(right)
        return both_nan or round(abs(left - right), places) == 0
    except OverflowError:  # an integer that is too large to be near any float
        return False


# The difference of two Decimals may have more than 28 digits; rounding it up cannot
# take it across the limit, which has one digit. Without traps, what is out of range
# becomes NaN, and nothing is <= NaN.
_CONTEXT = Context(28, ROUND_UP, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


def _same_decimal(left: Any, right: Any, places: int) -> bool:
    with localcontext(_CONTEXT):
        a, b = Decimal(left), Decimal(right)  # exact, also for int and float
        if a == b or (a.is_nan() and b.is_nan()):  # the former for the infinities
            return True
        # a half rounds to the even digit, 0
        return abs(a - b) <= Decimal(5).scaleb(-places - 1)


def _is_ignored(ignored: _Patterns, path: list[_Key], key: _Key) -> bool:
    return any(
        all(segment in ("*", str(k)) for segment, k in zip(pattern, chain(path, [key])))
        for pattern in ignored.get(len(path) + 1, ())
    )


def _refuse_cycle(value: Any, path: list[_Key]) -> None:
    """Raise ValueError if an object or array on the path contains itself.

    Called at 1000, 2000, 4000... levels. Keeping a set of what is on the path instead
    makes the whole comparison a third slower.
    """
    seen = {id(value)}
    for depth, key in enumerate(path[1:], 2):
        value = value[key]
        if id(value) in seen:
            place = _place(path[:depth])
            raise ValueError(f"{place} in the left document contains itself")
        seen.add(id(value))


def _pointer(path: list[_Key]) -> str:
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _place(path: list[_Key]) -> str:
    return _pointer(path) or "the document"


# Reporting


def _brief(value: Any, start: int = 0, room: int = WIDTH) -> str:
    """Write a value as JSON in about `room` characters, at no more cost than these.

    A string or number is shown from the character `start` on.
    """
    if not isinstance(value, (dict, list, tuple)):
        text = _text(value)
        end = start + max(room, WIDTH // 3)  # "1000000000" should not end up as "1…"
        if len(text) > end:
            text = text[:end] + "…"
        if start:
            text = "…" + text[start:]
        return _quoted(text) if isinstance(value, str) else text
    members: Iterable[tuple[Any, ...]]
    if isinstance(value, dict):
        brackets, members = "{%s}", value.items()
    else:
        brackets, members = "[%s]", zip(value)
    parts: list[str] = []
    for member in members:
        if room <= 0:
            parts.append("…")
            break
        parts.append(": ".join(_brief(each, 0, room - 1) for each in member))
        room -= len(parts[-1]) + 2
    return brackets % ", ".join(parts)


def _text(scalar: Any) -> str:
    """Write a scalar as JSON, but a string without its quotation marks."""
    if isinstance(scalar, (str, Decimal)):
        return str(scalar)
    try:
        return json.dumps(scalar)
    except ValueError:  # an integer of more digits than str() gives, 4300
        return hex(scalar)
    except TypeError:  # not JSON: inside of what stands on one side only
        return repr(scalar)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _start(left: Any, right: Any) -> int:
    """Choose where to start showing two values, so that one sees the difference."""
    if isinstance(left, (dict, list, tuple)) or isinstance(right, (dict, list, tuple)):
        return 0
    a, b = _text(left), _text(right)
    ends = range(1, min(len(a), len(b)) + 1)
    shared = bisect_left(ends, True, key=lambda end: a[:end] != b[:end])
    return shared - WIDTH // 2 if shared >= WIDTH else 0


class _Trouble(Exception):
    """Why there is no answer: a line for standard error."""


def _documents(name: str, by_line: bool) -> Iterator[Any]:
    """Yield what is in a file; whatever is wrong with it is a _Trouble."""
    try:
        with _open(name) as stream:
            yield from _values(stream, by_line)
    except json.JSONDecodeError as exc:
        place = f"line {exc.lineno} column {exc.colno}"
        raise _Trouble(f"{name}: {exc.msg}: {place}") from None
    except OSError as exc:
        raise _Trouble(f"{name}: {exc.strerror}") from None
    except ValueError as exc:  # a name with a NUL character
        raise _Trouble(f"{name!r}: {exc}") from None


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    if name != "-":
        return open(name, "rb")
    if sys.stdin is None:  # the shell closed it: <&-
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return nullcontext(sys.stdin.buffer)


def _run(args: argparse.Namespace) -> int:
    if args.left == args.right == "-":
        raise _Trouble("only one of the two can be standard input")
    rules = {"places": args.places, "ignore": args.ignore}
    try:
        differences(None, None, **rules)
    except ValueError as exc:
        raise _Trouble(exc) from None
    status = 0
    lefts, rights = (_documents(name, args.lines) for name in (args.left, args.right))
    pairs = zip_longest(lefts, rights, fillvalue=_ABSENT)
    for number, (left, right) in enumerate(pairs, 1):
        for difference in differences(left, right, **rules):
            status = 1
            if args.quiet:
                return status
            print(
                f"line {number}: {difference}" if args.lines else difference, flush=True
            )
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="json_compare.py",
        description="Compare two JSON documents; floats to 5 decimal places.",
        epilog="Exit status: 0 equal, 1 different, 2 trouble, 130 interrupted.",
    )
    parser.add_argument(
        "left", metavar="LEFT", help="a JSON file; - is standard input, ./- a file"
    )
    parser.add_argument("right", metavar="RIGHT", help="the file to compare it with")
    parser.add_argument(
        "--places",
        metavar="N",
        type=int,
        default=PLACES,
        help="decimal places that count (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore",
        metavar="POINTER",
        action="append",
        default=[],
        help="JSON Pointer to what does not count, with * for any one key or index, "
        "as in /items/*/updated_at; can be repeated",
    )
    parser.add_argument(
        "--lines", action="store_true", help="compare JSON Lines, record by record"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print nothing, just exit"
    )
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(args)
    except _Trouble as exc:
        print(f"{parser.prog}: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:  # only print() is left to raise one
        # or the interpreter would try again, and complain, when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # head(1) has seen enough
            return 1
        print(f"{parser.prog}: standard output: {exc.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
