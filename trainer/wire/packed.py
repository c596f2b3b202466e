"""msgpack, written and read here alone.

Canonical: map keys are strings in ascending byte order, integers and lengths take their shortest form, text is UTF-8,
floats are finite float64, no extension types. Equal values therefore have equal bytes, and equal digests. Specs,
records and manifests are canonical. Hints, which are safe to lose (claims, a node's status, curves), are any msgpack
of the same types, since older versions wrote their keys in any order; they are read as hostile all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgpack

from trainer.wire.unreadable import Unreadable

MAX_DEPTH = 8
_LARGE = 1 << 20
RECORD_DEPTH = 32
"""Of maps and lists in each other in a log record: one holds a pod's whole patch (a spec allows 20 levels of it)."""


def pack(value: object, max_depth: int = MAX_DEPTH) -> bytes:
    """Canonical bytes of a value made of None, bool, int, finite float, str, bytes, lists and maps with str keys.

    >>> pack({"b": 1, "a": [None, b"x"]}).hex()
    '82a16192c0c40178a16201'
    """
    return cast(bytes, msgpack.packb(_canonical(value, max_depth), use_bin_type=True))


def array_head(entries: int) -> bytes:
    """What stands before a list of so many values, in its shortest form."""
    return cast(bytes, msgpack.Packer(autoreset=True).pack_array_header(entries))


def bin_head(size: int) -> bytes:
    """What stands before so many bytes, in its shortest form."""
    for tag, width in ((b"\xc4", 1), (b"\xc5", 2), (b"\xc6", 4)):
        if size < 1 << 8 * width:
            return tag + size.to_bytes(width, "big")
    raise ValueError(f"{size} bytes in one value")


def pack_hint(value: object) -> bytes:
    """Bytes of a hint: the same types, floats that are not finite too, keys in the order in which they come."""
    return cast(bytes, msgpack.packb(value, use_bin_type=True))


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


def unpack(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """The value of canonical bytes; Unreadable for anything else."""
    value = _parse(data, max_bytes, max_depth, _in_order)
    try:
        canonical = _packs_to(value, data)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Unreadable(f"holds a value that has no canonical form ({error})") from error
    if not canonical:
        raise Unreadable("msgpack in a form that is not the canonical one")
    return value


def _packs_to(value: Any, data: bytes) -> bool:
    """Whether these are the bytes of the value that was read from them.

    Of a large map an entry at a time, and without its bytes: where everything before them and their own head is in
    canonical form, what was read as these bytes is what stands there.
    """
    if len(data) < _LARGE or not isinstance(value, dict) or len(value) > 15:
        return bool(msgpack.packb(value, use_bin_type=True) == data)
    if data[0] != 0x80 + len(value):
        return False
    at = 1
    for key, entry in value.items():
        raw = isinstance(entry, bytes)
        head = pack_hint(key) + (bin_head(len(entry)) if raw else pack_hint(entry))
        if data[at : at + len(head)] != head:
            return False
        at += len(head) + (len(entry) if raw else 0)
    return at == len(data)


def unpack_hint(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a hint's bytes; Unreadable for anything else."""
    return _parse(data, max_bytes, max_depth, _any_order)


def _parse(data: bytes, max_bytes: int, max_depth: int, pairs: Any) -> Any:
    if len(data) > max_bytes:
        raise Unreadable(f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=True,
            timestamp=0,
            max_ext_len=0,
            object_pairs_hook=pairs,
            ext_hook=_no_ext,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise Unreadable(
            f"not msgpack that this program writes ({type(error).__name__}: {str(error)[:120]})"
        ) from error
    _check(value, max_depth, finite=pairs is _in_order)
    return value


def _in_order(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    before: bytes | None = None
    for key, _ in pairs:
        now = _text(key).encode()
        if before is not None and now <= before:
            raise ValueError("keys are not in ascending order, or one comes twice")
        before = now
    return dict(pairs)


def _any_order(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {_text(key): value for key, value in pairs}


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError("a key is not text")
    return key


def _no_ext(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


def _check(value: object, max_depth: int, *, finite: bool) -> None:
    """Depth and types, without recursion: the parser has already bounded the work by the size of the input."""
    level: list[object] = [value]
    for depth in range(max_depth + 2):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif finite and isinstance(item, float) and not math.isfinite(item):
                raise Unreadable("a number is not finite")
            elif not (item is None or isinstance(item, bool | int | float | str | bytes)):
                raise Unreadable(f"a value of type {type(item).__name__}")
        if not deeper:
            return
        level = deeper
        if depth >= max_depth:
            break
    raise Unreadable(f"nested deeper than {max_depth}")
