"""Canonical msgpack, written one way only and read as hostile.

Canonical: map keys are strings in ascending byte order, integers and lengths take their shortest form, text is UTF-8,
floats are finite float64, no extension types. Equal values therefore have equal bytes, and equal digests.

A sealed map (records, manifests) carries its own digest as its last key, outside the order of the others:

    offset        size   what
       0             1   0x80 + n + 1: a map of n + 1 entries (n <= 14)
       1           ...   the n entries, canonical
     size - 41       9   a6 "digest" c4 20: key "digest", 32 bytes follow
     size - 32      32   SHA-256 of the canonical map of the n entries alone (0x80 + n, then the entries)

so that a reader checks size and digest before it parses anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgpack

from checkpoint.errors import Damaged

MAX_DEPTH = 8
RECORD_DEPTH = 32
"""Of maps and lists in each other in a log record: one holds a pod's whole patch (trainer/spec.py allows 20 levels)."""
_TAIL = b"\xa6digest\xc4\x20"
_SEAL_BYTES = len(_TAIL) + 32


def pack(value: object, max_depth: int = MAX_DEPTH) -> bytes:
    """Canonical bytes of a value made of None, bool, int, finite float, str, bytes, lists and maps with str keys.

    >>> pack({"b": 1, "a": [None, b"x"]}).hex()
    '82a16192c0c40178a16201'
    """
    return cast(bytes, msgpack.packb(_canonical(value, max_depth), use_bin_type=True))


def _canonical(value: object, room: int) -> object:
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{value} does not fit 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no canonical form: write it as text")
        return float(value)
    if room == 0:
        raise ValueError("nested too deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys of a map must be text")
        return {key: _canonical(value[key], room - 1) for key in sorted(value, key=lambda key: key.encode())}
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Sequence):
        return [_canonical(item, room - 1) for item in value]
    raise ValueError(f"{type(value).__name__} has no canonical form")


def unpack(data: bytes, what: str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """The value of canonical bytes; Damaged for anything else, with ``what`` naming the object."""
    if len(data) > max_bytes:
        raise Damaged(f"{what}: {len(data)} bytes, the limit is {max_bytes}")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            timestamp=0,
            max_ext_len=0,
            object_pairs_hook=_pairs,
            ext_hook=_no_ext,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise Damaged(f"{what}: not canonical msgpack ({type(error).__name__}: {str(error)[:120]})") from error
    _check(value, what, max_depth)
    try:
        canonical = cast(bytes, msgpack.packb(value, use_bin_type=True))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{what}: holds a value that has no canonical form ({error})") from error
    if canonical != data:
        raise Damaged(f"{what}: msgpack in a form that is not the canonical one")
    return value


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    before: bytes | None = None
    for key, _ in pairs:
        if not isinstance(key, str):
            raise ValueError("a key is not text")
        now = key.encode()
        if before is not None and now <= before:
            raise ValueError("keys are not in ascending order, or one comes twice")
        before = now
    return dict(pairs)


def _no_ext(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


def _check(value: object, what: str, max_depth: int) -> None:
    """Depth and types, without recursion: the parser has already bounded the work by the size of the input."""
    level: list[object] = [value]
    for depth in range(max_depth + 2):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise Damaged(f"{what}: a number is not finite")
            elif not (item is None or isinstance(item, bool | int | str | bytes)):
                raise Damaged(f"{what}: a value of type {type(item).__name__}")
        if not deeper:
            return
        level = deeper
        if depth >= max_depth:
            break
    raise Damaged(f"{what}: nested deeper than {max_depth}")


def seal(value: Mapping[str, object], max_depth: int = MAX_DEPTH) -> bytes:
    """Canonical bytes of a map of at most 14 entries, with its digest as the last key."""
    if len(value) > 14 or "digest" in value:
        raise ValueError("a sealed map has at most 14 entries, and its digest is added here")
    plain = pack(value, max_depth)
    return bytes([plain[0] + 1]) + plain[1:] + _TAIL + hashlib.sha256(plain).digest()


def unseal(data: bytes, what: str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The map of sealed bytes, without its digest, which is checked before anything is parsed; Damaged otherwise."""
    if not _SEAL_BYTES < len(data) <= max_bytes:
        raise Damaged(f"{what}: {len(data)} bytes; it must have {_SEAL_BYTES + 1} to {max_bytes}")
    if not 0x81 <= data[0] <= 0x8F or data[-_SEAL_BYTES:-32] != _TAIL:
        raise Damaged(f"{what}: not a sealed map (cut short, or other bytes)")
    plain = bytes([data[0] - 1]) + data[1:-_SEAL_BYTES]
    if hashlib.sha256(plain).digest() != data[-32:]:
        raise Damaged(f"{what}: its bytes do not have the digest that it carries")
    return cast(dict[str, Any], unpack(plain, what, max_bytes=max_bytes, max_depth=max_depth))


class Fields:
    """Reads the entries of a hostile map one by one; every refusal is Damaged and names object, key and limit.

    >>> f = Fields({"n": 3}, "record 3"); n = f.integer("n", 1, 10); f.done(); n
    3
    """

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise Damaged(f"{what}: a map was expected, found {type(value).__name__}")
        self._value: dict[str, Any] = value
        self._what = what
        self._read: set[str] = set()

    def _get(self, key: str, kind: type) -> Any:
        if key not in self._value:
            raise Damaged(f"{self._what}: no {key!r}")
        self._read.add(key)
        found = self._value[key]
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise Damaged(f"{self._what}: {key!r} must be {kind.__name__}, found {type(found).__name__}")
        return found

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than None; marks it as read."""
        self._read.add(key)
        return self._value.get(key) is not None

    def integer(self, key: str, low: int, high: int = (1 << 63) - 1) -> int:
        found = cast(int, self._get(key, int))
        if not low <= found <= high:
            raise Damaged(f"{self._what}: {key!r} is {found}, must be {low} to {high}")
        return found

    def real(self, key: str) -> float:
        found = self._value.get(key)
        if isinstance(found, int) and not isinstance(found, bool):
            self._read.add(key)
            return float(found)
        return cast(float, self._get(key, float))

    def text(self, key: str, most: int = 4096) -> str:
        found = cast(str, self._get(key, str))
        if len(found.encode()) > most:
            raise Damaged(f"{self._what}: {key!r} is longer than {most} bytes")
        return found

    def hex(self, key: str, size: int = 32) -> str:
        """Lower-case hex digits of ``size`` bytes."""
        found = self.text(key, size * 2)
        if len(found) != size * 2 or any(c not in "0123456789abcdef" for c in found):
            raise Damaged(f"{self._what}: {key!r} must be {size * 2} lower-case hex digits")
        return found

    def raw(self, key: str, size: int | None = None) -> bytes:
        found = cast(bytes, self._get(key, bytes))
        if size is not None and len(found) != size:
            raise Damaged(f"{self._what}: {key!r} has {len(found)} bytes, must have {size}")
        return found

    def array(self, key: str, most: int) -> list[Any]:
        found = cast(list[Any], self._get(key, list))
        if len(found) > most:
            raise Damaged(f"{self._what}: {key!r} has {len(found)} entries, the limit is {most}")
        return found

    def map(self, key: str) -> dict[str, Any]:
        return cast(dict[str, Any], self._get(key, dict))

    def done(self) -> None:
        """Damaged where an entry was not read."""
        for key in self._value.keys() - self._read:
            raise Damaged(f"{self._what}: unknown entry {key[:80]!r}")
