"""Reads and writes of files past the page cache (``O_DIRECT``), as far as file system, disk and memory allow; else by
it. For ``file.py``, which decides what goes so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from typing import ParamSpec

PIECE_BYTES = 16 << 20  # of one read or write
_SECTOR = 4096
_GRAIN = 512  # on a border of so many bytes most disks begin to read
_BOUNCED = 4 << 20  # bytes of one read or write of memory that does not begin on a border
_AHEAD = 256 << 10  # such a read has so many at least: the next small one is among them

_LIBC = ctypes.CDLL(None, use_errno=True)
_OWN = threading.local()  # of each thread: a buffer that begins on a border
P = ParamSpec("P")


def _bounce(owner: object) -> memoryview:
    """This thread's. What it holds is the owner's until the next one asks for it."""
    _OWN.owner = owner
    buffer: memoryview | None = getattr(_OWN, "buffer", None)
    if buffer is None:
        buffer = _OWN.buffer = memoryview(mmap.mmap(-1, _BOUNCED))
    return buffer


def _by_first(ways: list[Callable[P, int]], *told: P.args, **named: P.kwargs) -> int | None:
    """What the first way tells that file system and memory take; those before it are not tried again."""
    while ways:
        try:
            return ways[0](*told, **named)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is: not with this memory, or not here
                raise
            del ways[0]
    return None


class DirectWrites:
    """Writes to the end of a file past the page cache, as far as file system, memory and length allow."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ways: list[Callable[[memoryview], int]] = (
            [self._straight, self._bounced] if _past_the_cache(descriptor, True) else []
        )

    def write(self, piece: memoryview) -> int:
        """How many bytes were written: some."""
        whole = piece[: piece.nbytes // _SECTOR * _SECTOR]
        some = _by_first(self._ways, whole) if whole else None
        if some is None:  # also for what comes behind this
            self._ways = []
            _past_the_cache(self._descriptor, False)
            some = os.write(self._descriptor, piece)
        return some

    def _straight(self, whole: memoryview) -> int:
        return os.write(self._descriptor, whole)

    def _bounced(self, whole: memoryview) -> int:
        buffer = _bounce(self)
        some = min(whole.nbytes, _BOUNCED)
        buffer[:some] = whole[:some]
        return os.write(self._descriptor, buffer[:some])


class Reads:
    """Reads of bytes [first, first + size) of a file, in order, by the page cache."""

    def __init__(self, descriptor: int, first: int, size: int) -> None:
        self._descriptor = descriptor
        os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_SEQUENTIAL)  # more comes ahead

    def read(self, out: memoryview, at: int) -> int:
        """How many bytes came from ``at`` on: some, or none at the file's end."""
        return os.preadv(self._descriptor, [out[:PIECE_BYTES]], at)


class DirectReads:
    """Reads of a file past the page cache, as far as file system and memory allow. By one thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = range(0)  # which bytes of the file this thread's buffer has, as long as it is ours
        self._ways: list[Callable[[memoryview, int], int]] = (
            [self._straight, self._bounced] if _past_the_cache(descriptor, True) else []
        )

    def read(self, out: memoryview, at: int) -> int:
        """As ``Reads.read``."""
        some = _by_first(self._ways, out, at)
        if some is None:
            _past_the_cache(self._descriptor, False)
            some = os.preadv(self._descriptor, [out[:PIECE_BYTES]], at)
        return some

    def _straight(self, out: memoryview, at: int) -> int:
        beyond, whole = at % _GRAIN, out.nbytes // _GRAIN * _GRAIN
        if beyond:  # from here on it may go straight
            return self._bounced(out[: _GRAIN - beyond], at)
        return os.preadv(self._descriptor, [out[: min(whole, PIECE_BYTES)]], at) if whole else self._bounced(out, at)

    def _bounced(self, out: memoryview, at: int) -> int:
        held = range(0) if getattr(_OWN, "owner", None) is not self else self._held
        buffer = _bounce(self)
        if at not in held:
            begin = at // _SECTOR * _SECTOR
            end = -(-max(at + out.nbytes, begin + _AHEAD) // _SECTOR) * _SECTOR
            self._held = range(0)
            came = os.preadv(self._descriptor, [buffer[: min(end - begin, _BOUNCED)]], begin)
            held = self._held = range(begin, begin + came)
        some = max(0, min(held.stop - at, out.nbytes))
        out[:some] = buffer[at - held.start : at - held.start + some]
        return some


def _past_the_cache(descriptor: int, on: bool) -> bool:
    """Whether the file is read and written so from here on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:  # a file system that has it not
        return False
    return True


def cached(descriptor: int, at: int) -> bool:
    """Whether the page cache has the file's bytes there; True too where this user is not told.

    A read that would not wait (``RWF_NOWAIT``) tells it too, but has them read.
    """
    held = ctypes.c_ubyte(1)
    page = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(descriptor, at - page + 1, access=mmap.ACCESS_COPY, offset=page) as mapped:
        there = ctypes.c_char.from_buffer(mapped, (at - page) // mmap.PAGESIZE * mmap.PAGESIZE)
        failed = _LIBC.mincore(ctypes.byref(there), 1, ctypes.byref(held))
        del there
    return bool(failed or held.value & 1)
