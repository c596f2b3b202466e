"""Maps that carry their own digest, and fields read one by one; the msgpack below them is ``trainer/wire/packed.py``.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

from checkpoint.errors import Damaged, OtherVersion
from trainer.wire import packed
from trainer.wire.unreadable import Unreadable, check_version

MAX_DEPTH, RECORD_DEPTH = packed.MAX_DEPTH, packed.RECORD_DEPTH
Data = bytes | memoryview
_TAIL = b"\xa6digest\xc4\x20"
_SEAL_BYTES = len(_TAIL) + 32
pack, pack_hint = packed.pack, packed.pack_hint


def short(text: str, most: int) -> str:
    """At most so many bytes of the text, as UTF-8 that every record can hold."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def unpack(data: bytes, what: str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """The value of canonical bytes; Damaged for anything else, with ``what`` naming the object."""
    try:
        return packed.unpack(data, max_bytes=max_bytes, max_depth=max_depth)
    except Unreadable as error:
        raise Damaged(f"{what}: {error}") from error


def unpack_hint(data: bytes, what: str, *, max_bytes: int) -> Any:
    """The value of a hint's bytes; Damaged for anything else."""
    try:
        return packed.unpack_hint(data, max_bytes=max_bytes)
    except Unreadable as error:
        raise Damaged(f"{what}: {error}") from error


def seal(value: Mapping[str, object], max_depth: int = MAX_DEPTH) -> bytes:
    """Canonical bytes of a map of at most 14 entries, with its digest as the last key."""
    if len(value) > 14 or "digest" in value:
        raise ValueError("a sealed map has at most 14 entries, and its digest is added here")
    plain = pack(value, max_depth)
    return bytes([plain[0] + 1]) + plain[1:] + _TAIL + hashlib.sha256(plain).digest()


def seal_stream(entries: Mapping[str, object], max_depth: int = MAX_DEPTH) -> Iterator[Data]:
    """The bytes of ``seal``, in pieces, of a map that is too large to be made whole. A value that is a `Stream` gives
    its canonical bytes itself.
    """
    if len(entries) > 14 or "digest" in entries:
        raise ValueError("a sealed map has at most 14 entries, and its digest is added here")
    digest = hashlib.sha256(bytes([0x80 + len(entries)]))
    yield bytes([0x81 + len(entries)])
    for key in sorted(entries, key=lambda key: key.encode()):
        value = entries[key]
        pieces = value.pieces if isinstance(value, Stream) else (pack(value, max_depth - 1),)
        for piece in chain((pack(key),), pieces):
            digest.update(piece)
            yield piece
    yield _TAIL + digest.digest()


class Stream:
    """Canonical bytes of a value, made piece by piece."""

    def __init__(self, pieces: Iterable[Data]) -> None:
        self.pieces = pieces

    @classmethod
    def rows(cls, rows: Sequence[Any], row: Callable[[Any], object], *, at_once: int = 1024) -> Stream:
        """A list, of what ``row`` makes of each of ``rows``."""

        def pieces() -> Iterator[Data]:
            yield packed.array_head(len(rows))
            for at in range(0, len(rows), at_once):
                yield b"".join([pack(row(item)) for item in rows[at : at + at_once]])

        return cls(pieces())

    @classmethod
    def raw(cls, size: int, parts: Iterable[Data]) -> Stream:
        """Bytes, so many of them, from ``parts``."""
        return cls(chain((packed.bin_head(size),), parts))


def unseal(data: bytes, what: str, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The map of sealed bytes, without its digest, which is checked before anything is parsed; Damaged otherwise."""
    if not _SEAL_BYTES < len(data) <= max_bytes:
        raise Damaged(f"{what}: {len(data)} bytes; it must have {_SEAL_BYTES + 1} to {max_bytes}")
    if not 0x81 <= data[0] <= 0x8F or data[-_SEAL_BYTES:-32] != _TAIL:
        raise Damaged(f"{what}: not a sealed map (cut short, or other bytes)")
    plain = b"".join((bytes([data[0] - 1]), memoryview(data)[1:-_SEAL_BYTES]))  # one copy: it may be large
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

    def version(self, known: int) -> int:
        """The version ``v``; OtherVersion, with both, where it is a newer one than ``known``, which we read."""
        found = self.integer("v", 1)
        check_version(self._what, found, known, OtherVersion)
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
