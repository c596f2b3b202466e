"""Digests of state, as fast as the CPU has instructions for: the engine's own code (core/hash.c) as a library.

Two SHA-256 go side by side in about the time of one, and all digests of two chunks in two thirds of the time of one
after the other. Where the library is not there (an image of Python alone) hashlib and zlib give the same. The
interpreter's lock is not held meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trainer import wire

NAME = "libhs_hash.so"
VERSION = 1
"""HS_HASH_VERSION (core/hash_leaves.h): of the arguments and structures below."""
Data = bytes | bytearray | memoryview


class _Buffer(ctypes.Structure):
    """Py_buffer, as the interpreter's ABI has it."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class _Chunk(ctypes.Structure):
    """hs_sha256_chunk (core/hash_leaves.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("leaves", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
    )


@contextmanager
def _address(data: Data) -> Iterator[int]:
    """Where these bytes lie, for as long as it takes."""
    held = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(held), 0)
    try:
        yield held.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))


def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, and why one that is there is not used."""
    why = ""
    here = Path(wire.__file__).resolve().parents[1] / "bin"
    for folder in (here, *(Path(sysconfig.get_path(kind)) / "trainer" / "bin" for kind in ("platlib", "purelib"))):
        if (folder / NAME).is_file():
            try:
                library = ctypes.CDLL(str(folder / NAME))
                if (version := ctypes.c_uint32.in_dll(library, "hs_hash_version").value) != VERSION:
                    raise OSError(f"its version is {version}, not {VERSION}")
                library.hs_sha256_leaves.restype = None
                library.hs_sha256_leaves.argtypes = (
                    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
                )  # fmt: skip
                library.hs_sha256_two_chunks.restype = None
                library.hs_sha256_two_chunks.argtypes = ctypes.c_void_p, ctypes.c_size_t
                library.hs_crc32.restype = ctypes.c_uint32
                library.hs_crc32.argtypes = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t
            except (OSError, AttributeError, ValueError) as error:  # of another machine, or another version
                why = f"{folder / NAME} is not of this version and machine ({error})"
                continue
            return library, ""
    return None, why


_LIBRARY, UNFIT = _open()
"""``UNFIT``: empty, or what whoever stores much should tell: digests are Python's own then, which take longer."""


def sha256_leaves(data: Data, lengths: Sequence[int], block: int, *, whole: bool) -> tuple[bytes, bytes]:
    """The SHA-256 of each ``block`` bytes of pieces that lie in a row (the last of a piece may be shorter), in order;
    and that of everything, where it is asked for.
    """
    view = memoryview(data).cast("B")
    sizes, found, total = _memory(view, lengths, block)
    if _LIBRARY is None or not view.nbytes:
        return _plain(view, lengths, block, whole)
    with _address(view) as at:
        _LIBRARY.hs_sha256_leaves(at, sizes, len(lengths), block, found, total if whole else None)
    return found.raw, total.raw if whole else b""


def _memory(view: memoryview, lengths: Sequence[int], block: int) -> tuple[Any, Any, Any]:
    """Pieces' lengths as C takes them, and room for their leaves' digests and for the whole's. ValueError where the
    pieces are not all of the view."""
    if sum(lengths) != view.nbytes:
        raise ValueError(f"pieces of {sum(lengths)} bytes in {view.nbytes}")
    leaves = sum(-(-length // block) for length in lengths)
    sizes = (ctypes.c_uint64 * len(lengths))(*lengths)
    return sizes, ctypes.create_string_buffer(32 * leaves), ctypes.create_string_buffer(32)


def sha256_two_chunks(
    chunks: tuple[tuple[Data, Sequence[int]], tuple[Data, Sequence[int]]], block: int
) -> tuple[tuple[bytes, bytes], ...]:
    """What ``sha256_leaves`` tells of each of two chunks, bytes and their pieces' lengths, with their wholes."""
    views = [memoryview(data).cast("B") for data, _ in chunks]
    if _LIBRARY is None or not all(view.nbytes for view in views):
        return tuple(sha256_leaves(data, lengths, block, whole=True) for data, lengths in chunks)
    told, memory = (_Chunk * 2)(), []
    with ExitStack() as held:
        for to, view, (_, lengths) in zip(told, views, chunks, strict=True):
            memory.append(_memory(view, lengths, block))
            to.data, to.count = held.enter_context(_address(view)), len(lengths)
            to.lengths, to.leaves, to.whole = map(ctypes.addressof, memory[-1])
        _LIBRARY.hs_sha256_two_chunks(ctypes.addressof(told), block)
    return tuple((leaves.raw, whole.raw) for _, leaves, whole in memory)


def crc32(data: Data, crc: int = 0) -> int:
    """The CRC-32 of zlib, of ``data`` behind what gave ``crc``; where the library is there, at the speed of memory."""
    if _LIBRARY is None:
        return zlib.crc32(data, crc)
    with _address(data) as at:
        found: int = _LIBRARY.hs_crc32(crc, at, memoryview(data).nbytes)
    return found


def _plain(view: memoryview, lengths: Sequence[int], block: int, whole: bool) -> tuple[bytes, bytes]:
    found, at = bytearray(), 0
    for length in lengths:
        for first in range(at, at + length, block):
            found += hashlib.sha256(view[first : min(first + block, at + length)]).digest()
        at += length
    return bytes(found), hashlib.sha256(view).digest() if whole else b""
