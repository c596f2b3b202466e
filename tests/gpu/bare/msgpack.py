"""Stands in for msgpack on a machine that has none (a GPU session's): writes what a spec's digest is taken of, in the
same bytes (the rehearsal compares them), and reads nothing."""

from __future__ import annotations

import struct
from typing import Any


class UnpackException(Exception):
    """Never raised here."""


def packb(value: Any, use_bin_type: bool = True) -> bytes:
    """The shortest form of each value; maps in the order in which they come."""
    out = bytearray()
    _pack(value, out)
    return bytes(out)


def unpackb(*_: Any, **__: Any) -> Any:
    raise UnpackException("msgpack is not installed; what stands in for it only writes")


def _head(out: bytearray, n: int, small: int | None, room: int, codes: tuple[int, ...]) -> None:
    """A length: in the type's own byte where it is small, else as 8 (where there is such a code), 16 or 32 bits."""
    if small is not None and n < room:
        out.append(small | n)
    elif len(codes) == 3 and n < 1 << 8:
        out += struct.pack(">BB", codes[0], n)
    elif n < 1 << 16:
        out += struct.pack(">BH", codes[-2], n)
    else:
        out += struct.pack(">BI", codes[-1], n)


def _integer(value: int, out: bytearray) -> None:
    if 0 <= value < 128:
        out.append(value)
    elif -32 <= value < 0:
        out += struct.pack("b", value)
    elif value >= 0:
        for code, form, bits in ((0xCC, ">BB", 8), (0xCD, ">BH", 16), (0xCE, ">BI", 32), (0xCF, ">BQ", 64)):
            if value < 1 << bits:
                out += struct.pack(form, code, value)
                return
    else:
        for code, form, bits in ((0xD0, ">Bb", 8), (0xD1, ">Bh", 16), (0xD2, ">Bi", 32), (0xD3, ">Bq", 64)):
            if value >= -(1 << (bits - 1)):
                out += struct.pack(form, code, value)
                return


def _pack(value: Any, out: bytearray) -> None:
    if value is None:
        out.append(0xC0)
    elif isinstance(value, bool):
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, int):
        _integer(value, out)
    elif isinstance(value, float):
        out += struct.pack(">Bd", 0xCB, value)
    elif isinstance(value, str):
        data = value.encode()
        _head(out, len(data), 0xA0, 32, (0xD9, 0xDA, 0xDB))
        out += data
    elif isinstance(value, bytes):
        _head(out, len(value), None, 0, (0xC4, 0xC5, 0xC6))
        out += value
    elif isinstance(value, list | tuple):
        _head(out, len(value), 0x90, 16, (0xDC, 0xDD))
        for item in value:
            _pack(item, out)
    elif isinstance(value, dict):
        _head(out, len(value), 0x80, 16, (0xDE, 0xDF))
        for key, item in value.items():
            _pack(key, out)
            _pack(item, out)
    else:
        raise TypeError(f"can not serialize {type(value).__name__}")
