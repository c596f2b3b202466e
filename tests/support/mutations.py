"""Hostile bytes out of good ones: values changed in every way that msgpack can say, bombs, and flipped bytes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from checkpoint import codec
from checkpoint.errors import Damaged, OtherVersion

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63 - 1,
    2**64 - 1,
    1.5,
    "",
    "x" * 300,
    b"",
    b"y" * 40,
    [],
    {},
    [[1, 2]],
    {"a": {}},
    "../x",
    "chunks/../../x",
    "/etc/passwd",
    "manifests/a/\0",
)


def mutate(rng: random.Random, value: Any) -> Any:
    """The same value with something in it changed, of another type, gone, added or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        choice = rng.random()
        if choice < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if choice < 0.2:
            return {**value, "odd": rng.choice(ODD)}
        return {**value, key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.1:
            return value[:at] + value[at + 1 :]
        if choice < 0.2:
            return [*value, value[at]]
        if choice < 0.25:
            return [*value[:at], value[rng.randrange(len(value))], *value[at + 1 :]]
        return [*value[:at], mutate(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return min(max(value + rng.choice([-1, 1, 1 << 20, 1 << 40]), -(1 << 63)), (1 << 64) - 1)
    if isinstance(value, bytes) and value and rng.random() < 0.3:
        return value[: rng.randrange(len(value))]
    if rng.random() < 0.02:
        return nested(rng.choice([9, 40, 400]))
    return rng.choice(ODD)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def flipped(rng: random.Random, data: bytes) -> bytes:
    """With a few bytes changed, cut off, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(4):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                out += out[at:]
    return bytes(out)


def bombs() -> Iterator[bytes]:
    """msgpack that claims more than there is, goes deep, or holds what this program never writes."""
    for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):
        yield head + b"\xff" * 4
        yield head + b"\x7f\xff\xff\xff" + b"\x01" * 50
    yield b"\xdc\xff\xff" * 1000  # lists in lists, each of 65,535
    yield b"\x91" * 200_000
    yield b"\x81\xa1a" * 60_000
    yield b"\x9f" * 50_000
    yield b"\xd7\xff" + b"\0" * 8  # a timestamp
    yield b"\xd4\x05\0"  # another extension
    yield b"\xc1"
    yield b"\x81\xc0\x01"  # a key that is no text
    yield b"\x82\xa1a\x01\xa1a\x02"  # a key twice
    yield b"\xcb\x7f\xf8" + b"\0" * 6  # not a number
    yield b"\xa2\xff\xfe"  # not UTF-8


def sealed(entries: int, plain: bytes) -> bytes:
    """A sealed map of so many entries, whose bytes these are: the digest is right."""
    whole = bytes([0x80 + entries]) + plain
    return bytes([0x81 + entries]) + plain + b"\xa6digest\xc4\x20" + hashlib.sha256(whole).digest()


def survives(parse: Callable[[bytes], object], value: dict[str, Any], rng: random.Random) -> bool:
    """Parse the sealed value with one or two mutations: True where it passed; only these two errors may come out."""
    changed = value
    for _ in range(rng.randrange(1, 3)):
        changed = mutate(rng, changed)
    if not isinstance(changed, dict) or len(changed) > 14:
        return False
    try:
        data = codec.seal(changed, 500)
    except ValueError:  # a number or text that nobody can write
        return False
    try:
        parse(data)
    except (Damaged, OtherVersion):
        return False
    return True
