"""Files gone wrong: a valid file's bytes, changed by a random number generator.

A change is one of bytes (flipped, cut, repeated, hostile ones put in), of lines, or of a value
somewhere in JSON: a whole document, one of many lines, or the header of a safetensors file.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

BYTES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\r", b" ", b"\t", b"{", b"}", b"[",
    b"]", b'"', b"\\", b"\\ud800", b"\xed\xa0\x80", b"::", b"|", b",", b":", b"-1", b"0", b"NaN",
    b"Infinity", b"1e999", b"9" * 5000, b"9" * 30, b"null", b"true", b"../x", b"/etc/passwd",
    b"{{", b"}}", b"{%", b"%}", b"[" * 100_000, b'{"a":' * 50_000, b"x" * 100_000, b"\xc2\x85",
    b"\xe2\x80\xa8", b"\x7f", b"\x93NUMPY", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x95",
)  # fmt: skip

# What json.dumps cannot write stands behind a name and is put into the text.
RAW = {
    "<deep list>": "[" * 100_000 + "]" * 100_000,
    "<deep object>": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "<long number>": "9" * 5000,
    "<1e999>": "1e999",
    "<same key>": '{"a": 1, "a": 2}',
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53 + 1, 10**30, -(10**30), 10**400, 0.5, 1e308,
    float("nan"), float("inf"), "", " ", "a", "0", "x" * 5000, "\ud800", "a\nb", "\x00", "\x1b[31m",
    "../x", "../../x", "/etc/passwd", "C:\\x", "a/b", "none", "null", "٣", "9" * 5000, [], {}, [[]],
    [{}], [None], [1, "a"], {"a": 1}, {"": None}, {"\ud800": 1}, {"a\nb": 1}, ["a", "a"], *RAW,
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice((_in_json, _in_json, _in_lines, _in_bytes))(data, rng)
    return data[:1_000_000]


def _in_bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randint(0, len(data)), rng.choice((1, 2, 4, 8, 50))
    new = rng.choice(BYTES)
    return rng.choice(
        (
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:at] + data[at + size :],
            lambda: data[:at] + data[at : at + size] * 2 + data[at + size :],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + new + data[at:],
            lambda: data[:at] + new + data[at + len(new) :],
            lambda: new,
        )
    )()


def _in_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    return rng.choice(
        (
            lambda: b"\n".join([*lines[:i], *lines[i + 1 :]]),
            lambda: b"\n".join([*lines[:i], lines[j], *lines[i:]]),
            lambda: b"\n".join([*lines[:i], _in_bytes(lines[i], rng), *lines[i + 1 :]]),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: data.replace(b"\n", b""),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode("utf-8", "replace").encode("utf-16"),
        )
    )()


def _in_json(data: bytes, rng: random.Random) -> bytes:
    for part in (_header, _document, _line):
        found = part(data, rng)
        if found is not None:
            return found
    return _in_bytes(data, rng)


def _header(data: bytes, rng: random.Random) -> bytes | None:
    """A change in the header of a safetensors file, whose length is made to fit."""
    if len(data) < 10 or data[8:9] != b"{":
        return None
    (size,) = struct.unpack("<Q", data[:8])
    changed = _document(data[8 : 8 + size], rng)
    return None if changed is None else struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def _line(data: bytes, rng: random.Random) -> bytes | None:
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    changed = _document(lines[i], rng)
    return None if changed is None else b"\n".join([*lines[:i], changed, *lines[i + 1 :]])


def _document(data: bytes, rng: random.Random) -> bytes | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places([document]))
    holder, key = rng.choice(places)
    _change(holder, key, rng, places)
    text = json.dumps(places[0][0][0])
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key or index) in a document."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


def _change(holder: Any, key: Any, rng: random.Random, places: list[tuple[Any, Any]]) -> None:
    value = rng.choice(VALUES)
    other, other_key = rng.choice(places)
    inner = holder[key]
    changes: list[Callable[[], Any]] = [
        lambda: holder.__setitem__(key, value),
        lambda: holder.__setitem__(key, [inner]),
        lambda: holder.__setitem__(key, {"a": inner}),
        lambda: holder.__setitem__(key, str(inner)),
        lambda: holder.__setitem__(key, json.loads(json.dumps(other[other_key]))),
    ]
    if isinstance(inner, list) and inner:
        changes += [
            lambda: inner.append(value),
            lambda: inner.extend(list(inner)),
            lambda: inner.pop(rng.randrange(len(inner))),
        ]
    if isinstance(inner, dict) and inner:
        name = rng.choice(list(inner))
        changes += [
            lambda: inner.pop(name),
            lambda: inner.__setitem__(str(value)[:40], inner.pop(name)),
        ]
    if isinstance(inner, (int, float)) and not isinstance(inner, bool):
        changes += [lambda: holder.__setitem__(key, inner + rng.choice((-1, 1, -inner, 1000)))]
    rng.choice(changes)()
