"""Snapshot slots: shared memory that a rank fills between steps and the agent reads while training goes on.

``trainer/engine/wire/slot.h`` is the manual: layout, who writes what, the order of a save. This module creates slots
(sealed memfds, pre-faulted), reads their headers, reads their data under ``hold``, and fills one for a restore.

Who fills a slot writes checksums, who reads it verifies them: the agent holds the slot, reads, compares with the
checksums of the rank, and looks at the generation again. So a bit that flips in memory never gets into the store.

The two processes agree on order by fences, because the data cannot be verified here: see `fence`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from checkpoint.hashes import crc32
from trainer import wire

from ..layout import RankLayout
from .memory_pages import take_pages

_HEADER_CRC = (slice(24, 136), slice(140, 156))
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_LOCK = threading.Lock()
_LIBC = ctypes.CDLL(None, use_errno=True)
_ORDERED = platform.machine() in ("x86_64", "AMD64")
_SYS_MEMBARRIER = 324 if _ORDERED else 283  # the number of all newer processors
_GLOBAL_EXPEDITED = 2


def membarrier() -> None:
    """A full fence by the kernel: membarrier(2) orders the caller's memory before and after it. Raises OSError."""
    if _LIBC.syscall(_SYS_MEMBARRIER, _GLOBAL_EXPEDITED, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(
            code,
            f"membarrier(2) is refused ({os.strerror(code)}); on {platform.machine()} snapshots cannot be read safely "
            "without it: allow it in the container's seccomp profile",
        )


def fence() -> None:
    """Everything before is visible to the rank, and seen by us, before anything after it (``wire/slot.h``).

    Stores and loads keep their order on x86-64 except that a load may pass an earlier store, and the locked instruction
    of a lock keeps that too. Elsewhere the kernel does it; Python itself has no fence. Raises OSError where it cannot.
    """
    if _ORDERED:
        with _LOCK:
            pass
    else:
        membarrier()


@dataclass(frozen=True)
class Seen:
    """What a slot's header said at one moment."""

    index: int
    state: int
    generation: int
    step: int
    epoch: int
    final: bool
    persist: bool
    """To be stored, and not for a start from memory alone."""
    claim: bool = field(default=False, compare=False)
    """The rank may fill it any moment: it is not to be had."""

    @property
    def ready(self) -> bool:
        return self.state == wire.SLOT_READY


class SlotChanged(Exception):
    """The rank refilled the slot while it was read, or its header does not hold: what was read is void."""


class Slot:
    """One slot of one rank, mapped. The descriptor is its own from the first moment on: it is closed once, also where
    the slot cannot be made.
    """

    def __init__(self, fd: int, layout: RankLayout) -> None:
        self.fd, self.layout = fd, layout
        self._closing = threading.Lock()  # prefault runs in a thread of its own
        self._filling = threading.Lock()
        self._missing: list[int] = []  # bytes of each chunk, of the fill that is going on
        self._sums: list[int | None] = []  # of the chunks of which none are missing
        try:
            self._open()
        except BaseException:
            os.close(fd)
            raise

    def _open(self) -> None:
        fd, layout = self.fd, self.layout
        size = os.fstat(fd).st_size
        if size != layout.slot_bytes:
            raise SlotChanged(
                f"a slot of position {layout.position} has {size} bytes, the plan says {layout.slot_bytes}"
            )
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED)
        self._header = wire.SlotHeader.from_buffer(self._map)

    @classmethod
    def create(cls, layout: RankLayout, plan_digest: bytes, what_digest: bytes) -> Slot:
        """A new, empty slot. Its pages are not there yet: see `prefault`."""
        fd = os.memfd_create(f"hotstage-slot-{layout.position}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, layout.slot_bytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        slot = cls(fd, layout)
        h = slot._header
        h.magic[:] = wire.SLOT_MAGIC
        h.version, h.position, h.replica = wire.SLOT_VERSION, layout.position, layout.replica
        h.data_offset, h.data_bytes, h.chunks = layout.data_offset, layout.data_bytes, layout.chunks
        h.plan_digest[:], h.what_digest[:] = plan_digest, what_digest
        return slot

    @classmethod
    def adopt(cls, fd: int, layout: RankLayout, plan_digest: bytes) -> Slot:
        """A slot that a rank hands back to a restarted agent. Raises SlotChanged where it is not this plan's."""
        try:
            if fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS != _SEALS:
                raise SlotChanged("a slot handed back is not sealed")
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise SlotChanged(f"what was handed back is not a slot: {error}") from error
            raise
        slot = cls(fd, layout)
        if not slot._fits(plan_digest):
            slot.close()
            raise SlotChanged(
                f"a slot handed back for position {layout.position} of replica {layout.replica} is of another plan, "
                "position or replica"
            )
        slot.release()
        return slot

    def _own(self) -> bool:
        h, layout = self._header, self.layout
        named = bytes(h.magic) == wire.SLOT_MAGIC and h.version == wire.SLOT_VERSION
        return named and (h.position, h.replica) == (layout.position, layout.replica)

    def _fits(self, plan_digest: bytes) -> bool:
        h, layout = self._header, self.layout
        return (
            self._own()
            and bytes(h.plan_digest) == plan_digest
            and (h.data_offset, h.data_bytes, h.chunks) == (layout.data_offset, layout.data_bytes, layout.chunks)
        )

    def prefault(self) -> None:
        """Make every page present, so that a save never runs out of memory. Raises OSError (ENOSPC, ENOMEM).

        On a descriptor of its own: a slot that is closed meanwhile has given its number to who knows what.
        """
        with self._closing:
            if self._map.closed:
                return
            fd = os.dup(self.fd)
        try:
            take_pages(fd, self.layout.slot_bytes, lambda: not self._map.closed)
        finally:
            os.close(fd)

    def close(self) -> bool:
        """Unmap and close. False where somebody still reads: try again later."""
        with self._closing:
            if self._map.closed:
                return True
            header, self._header = self._header, wire.SlotHeader()
            del header
            try:
                self._map.close()
            except BufferError:
                self._header = wire.SlotHeader.from_buffer(self._map)
                return False
            os.close(self.fd)
            return True

    def look(self, index: int) -> Seen:
        """The header as it stands; nothing is held by it."""
        h = self._header
        return Seen(index, h.state, h.generation, h.step, h.epoch, bool(h.final), bool(h.persist), bool(h.claim))

    def hold(self, expected: Seen) -> None:
        """Keep the rank from refilling this slot. Raises SlotChanged where it no longer holds what was seen, or the
        rank has claimed it.
        """
        h = self._header
        h.hold = 1
        fence()  # the hold is visible before we look: the rank sees it, or we see that it has begun to fill
        seen = self.look(expected.index)
        if seen.claim or seen != expected:
            h.hold = 0
            raise SlotChanged(
                f"slot {expected.index} of position {self.layout.position} was refilled before it was held"
            )
        if h.header_crc != self._crc() or not self._own():
            h.hold = 0
            raise SlotChanged(
                f"the header of slot {expected.index} of position {self.layout.position} is not what was saved"
            )
        fence()  # the data is read after that look

    def check(self, expected: Seen) -> None:
        """After reading: still the same generation, else SlotChanged."""
        fence()  # the data was read before this look
        if self.look(expected.index) != expected:
            raise SlotChanged(
                f"slot {expected.index} of position {self.layout.position} was refilled while it was read"
            )

    def verify(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These bytes [first, end) of the data, which were read before, have the checksums that came with them, else
        SlotChanged. What shares a chunk with them is read too.
        """
        size = wire.SLOT_CHUNK
        with self.data() as data:
            for n in sorted({n for first, end in ranges for n in range(first // size, -(-end // size))}):
                (wanted,) = struct.unpack_from("<Q", self._map, wire.SLOT_HEADER_BYTES + 8 * n)
                if _sum(data[n * size : (n + 1) * size]) != wanted:
                    raise SlotChanged(f"bytes from {n * size} on of a slot are not what was saved (checksum)")

    def release(self) -> None:
        self._header.hold = 0

    def unclaim(self) -> None:
        """A claim of a rank that is gone. Only while no rank runs."""
        self._header.claim = 0

    @property
    def held(self) -> bool:
        return bool(self._header.hold)

    def data(self) -> memoryview:
        """The state's bytes, live. Release every view before `close`."""
        return memoryview(self._map)[self.layout.data_offset : self.layout.data_offset + self.layout.data_bytes]

    def clear(self) -> None:
        """Empty the slot. Only while no rank has it mapped for writing."""
        h = self._header
        h.hold, h.claim, h.final = 0, 0, 0
        h.state = wire.SLOT_EMPTY

    def begin_fill(self) -> memoryview:
        """Open the slot for a restore and give its data to be written. Only while no rank runs."""
        h = self._header
        h.hold, h.claim, h.state = 0, 0, wire.SLOT_FILLING
        h.generation += 1
        size = wire.SLOT_CHUNK
        self._missing = [min(size, self.layout.data_bytes - at) for at in range(0, self.layout.data_bytes, size)]
        self._sums = [None] * len(self._missing)
        return self.data()

    def filled(self, first: int, end: int) -> None:
        """Bytes [first, end) of the data are there for good (told once of each): chunks that are whole by it are summed
        now, while others come, and need not be in ``finish_fill``.
        """
        size, whole = wire.SLOT_CHUNK, []
        with self._filling:
            for n in range(first // size, -(-end // size)):
                self._missing[n] -= min(end, (n + 1) * size) - max(first, n * size)
                if not self._missing[n]:
                    whole.append(n)
        with self.data() as data:
            for n in whole:
                self._sums[n] = _sum(data[n * size : (n + 1) * size])

    def finish_fill(self, step: int, epoch: int, pool: Executor) -> None:
        """Checksums, header, READY: the slot now holds ``step`` for a rank to restore from."""
        h, data = self._header, self.data()
        size = wire.SLOT_CHUNK
        rest = [n for n, found in enumerate(self._sums) if found is None]
        try:
            for n, found in zip(rest, pool.map(_sum, [data[n * size : (n + 1) * size] for n in rest]), strict=True):
                self._sums[n] = found
        finally:
            data.release()
        struct.pack_into(f"<{len(self._sums)}Q", self._map, wire.SLOT_HEADER_BYTES, *self._sums)
        h.step, h.epoch, h.final, h.persist, h.checksum_kind = step, epoch, 0, 1, wire.SUM_CRC32
        h.header_crc = self._crc()
        h.state = wire.SLOT_READY

    def _crc(self) -> int:
        table = wire.SLOT_HEADER_BYTES
        crc = 0
        for part in (*_HEADER_CRC, slice(table, table + 8 * self.layout.chunks)):
            crc = crc32(self._map[part], crc)
        return crc


def _sum(chunk: memoryview) -> int:
    with chunk:
        return crc32(chunk)


class SlotTable:
    """The slots of a node's ranks for one plan: ``slots[rank][index]``."""

    def __init__(self, layouts: dict[int, RankLayout], plan_digest: bytes, what_digest: bytes, count: int) -> None:
        self.layouts, self.plan_digest, self.what_digest, self.count = layouts, plan_digest, what_digest, count
        self.slots: dict[int, list[Slot]] = {}

    def create(self, rank: int) -> None:
        """Make this rank's slots, where it has none yet."""
        if rank not in self.slots:
            with contextlib.ExitStack() as made:  # all, or none is left
                slots = []
                for _ in range(self.count):
                    slots.append(Slot.create(self.layouts[rank], self.plan_digest, self.what_digest))
                    made.callback(slots[-1].close)
                made.pop_all()
            self.slots[rank] = slots

    def adopt(self, rank: int, fds: Iterable[int]) -> None:
        """Take slots that a rank hands back. Raises SlotChanged, with every descriptor closed."""
        rest: list[int] = list(fds)
        taken: list[Slot] = []
        try:
            if len(rest) != self.count:
                raise SlotChanged(f"rank {rank} handed back {len(rest)} slots, the plan says {self.count}")
            while rest:
                taken.append(Slot.adopt(rest.pop(0), self.layouts[rank], self.plan_digest))
        except BaseException:
            for fd in rest:
                os.close(fd)
            for slot in taken:
                slot.close()
            raise
        self.slots[rank] = taken

    @property
    def total_bytes(self) -> int:
        """Memory of all slots of the node."""
        return sum(layout.slot_bytes for layout in self.layouts.values()) * self.count

    def clear(self) -> None:
        """Empty every slot. Only while no rank runs."""
        for slots in self.slots.values():
            for slot in slots:
                slot.clear()

    def keep_up_to(self, point: tuple[int, int]) -> None:
        """Empty every slot that is not ready, or holds something newer than ``point``. Only while no rank runs."""
        for slots in self.slots.values():
            for slot in slots:
                seen = slot.look(0)
                if not seen.ready or (seen.step >= point[0] and (seen.step, seen.epoch) != point):
                    slot.clear()
                else:
                    slot.release()
                    slot.unclaim()

    def close(self) -> bool:
        """Unmap and close all. False where somebody still reads: try again later."""
        closed = [slot.close() for slots in self.slots.values() for slot in slots]
        return all(closed)

    def look(self, rank: int) -> list[Seen]:
        return [slot.look(i) for i, slot in enumerate(self.slots.get(rank, []))]

    def held_by_all(self) -> dict[tuple[int, int], dict[int, Seen]]:
        """(step, epoch) -> rank -> slot, for what every rank of the node holds READY."""
        found: dict[tuple[int, int], dict[int, Seen]] = {}
        for rank in self.layouts:
            for seen in self.look(rank):
                if seen.ready:
                    found.setdefault((seen.step, seen.epoch), {})[rank] = seen
        return {key: by_rank for key, by_rank in found.items() if len(by_rank) == len(self.layouts)}

    def prefault(self) -> None:
        """Make all pages present. Raises OSError where the memory is not there."""
        for slots in list(self.slots.values()):
            for slot in slots:
                slot.prefault()
