"""Snapshot slots: shared memory that a rank fills between steps and the agent reads while training goes on.

``trainer/engine/wire/slot.h`` is the manual: layout, who writes what, the order of a save. This module creates slots
(sealed memfds, pre-faulted), reads their headers, reads their data under ``hold``, and fills one for a restore.

The checksums of the data are the engine's business when a rank wrote them (CRC-32C is slow in Python): the agent
checks the header's CRC, holds the slot, and reads the generation again when it is done, and what it uploads carries
SHA-256. A slot that the agent fills carries SHA-256 prefixes (``SUM_SHA256``), which both sides compute fast.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

from trainer import wire

from ..layout import PositionLayout

_HEADER_CRC_FIRST, _HEADER_CRC_END = 24, 136
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_FENCE = threading.Lock()


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C = _crc32c_table()


def crc32c(*parts: bytes) -> int:
    """CRC-32C of the parts in a row. About 10 MB/s: for headers and attempt files, never for state.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc, table = 0xFFFFFFFF, _CRC32C
    for part in parts:
        for byte in part:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class Seen:
    """What a slot's header said at one moment."""

    index: int
    state: int
    generation: int
    step: int
    epoch: int
    final: bool

    @property
    def ready(self) -> bool:
        return self.state == wire.SLOT_READY


class SlotChanged(Exception):
    """The rank refilled the slot while it was read, or its header does not hold: what was read is void."""


class Slot:
    """One slot of one rank, mapped. The descriptor is owned and closed with it."""

    def __init__(self, fd: int, layout: PositionLayout) -> None:
        self.fd, self.layout = fd, layout
        size = os.fstat(fd).st_size
        if size != layout.slot_bytes:
            raise SlotChanged(
                f"a slot of position {layout.position} has {size} bytes, the plan says {layout.slot_bytes}"
            )
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED)
        self._header = wire.SlotHeader.from_buffer(self._map)

    @classmethod
    def create(cls, layout: PositionLayout, plan_digest: bytes, what_digest: bytes) -> Slot:
        """A new, empty slot. Its pages are not there yet: see `prefault`."""
        fd = os.memfd_create(f"hotstage-slot-{layout.position}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, layout.slot_bytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
            slot = cls(fd, layout)
        except BaseException:
            os.close(fd)
            raise
        h = slot._header
        h.magic[:] = wire.SLOT_MAGIC
        h.version, h.position = wire.SLOT_VERSION, layout.position
        h.data_offset, h.data_bytes, h.chunks = layout.data_offset, layout.data_bytes, layout.chunks
        h.plan_digest[:], h.what_digest[:] = plan_digest, what_digest
        return slot

    @classmethod
    def adopt(cls, fd: int, layout: PositionLayout, plan_digest: bytes) -> Slot:
        """A slot that a rank hands back to a restarted agent. Raises SlotChanged where it is not this plan's."""
        if fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS != _SEALS:
            raise SlotChanged("a slot handed back is not sealed")
        slot = cls(fd, layout)
        h = slot._header
        if (
            bytes(h.magic) != wire.SLOT_MAGIC
            or h.version != wire.SLOT_VERSION
            or h.position != layout.position
            or bytes(h.plan_digest) != plan_digest
            or (h.data_offset, h.data_bytes, h.chunks) != (layout.data_offset, layout.data_bytes, layout.chunks)
        ):
            slot.close()
            raise SlotChanged(f"a slot handed back for position {layout.position} is of another plan or position")
        h.hold = 0
        return slot

    def prefault(self) -> None:
        """Make every page present, so that a save never runs out of memory. Raises OSError (ENOSPC, ENOMEM)."""
        step = 64 << 20
        for at in range(0, self.layout.slot_bytes, step):
            os.posix_fallocate(self.fd, at, min(step, self.layout.slot_bytes - at))

    def close(self) -> bool:
        """Unmap and close. False where somebody still reads: try again later."""
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
        return Seen(index, h.state, h.generation, h.step, h.epoch, bool(h.final))

    def hold(self, expected: Seen) -> None:
        """Keep the rank from refilling this slot. Raises SlotChanged where it no longer holds what was seen."""
        h = self._header
        h.hold = 1
        with (
            _FENCE
        ):  # a locked instruction: the store above is visible before the loads below (slot.h, order of a save)
            pass
        if self.look(expected.index) != expected or h.header_crc != self._crc():
            h.hold = 0
            raise SlotChanged(
                f"slot {expected.index} of position {self.layout.position} was refilled before it was held"
            )

    def check(self, expected: Seen) -> None:
        """After reading: still the same generation, else SlotChanged."""
        if self.look(expected.index) != expected:
            raise SlotChanged(
                f"slot {expected.index} of position {self.layout.position} was refilled while it was read"
            )

    def release(self) -> None:
        self._header.hold = 0

    @property
    def held(self) -> bool:
        return bool(self._header.hold)

    def data(self) -> memoryview:
        """The state's bytes, live. Release every view before `close`."""
        return memoryview(self._map)[self.layout.data_offset : self.layout.data_offset + self.layout.data_bytes]

    def clear(self) -> None:
        """Empty the slot. Only while no rank has it mapped for writing."""
        h = self._header
        h.hold, h.final = 0, 0
        h.state = wire.SLOT_EMPTY

    def begin_fill(self) -> memoryview:
        """Open the slot for a restore and give its data to be written. Only while no rank runs."""
        h = self._header
        h.hold, h.state = 0, wire.SLOT_FILLING
        h.generation += 1
        return self.data()

    def finish_fill(self, step: int, epoch: int, pool: Executor) -> None:
        """Checksums, header, READY: the slot now holds ``step`` for a rank to restore from."""
        h, data = self._header, self.data()
        size = wire.SLOT_CHUNK
        try:
            sums = list(pool.map(_prefix, (data[at : at + size] for at in range(0, len(data), size))))
        finally:
            data.release()
        struct.pack_into(f"<{len(sums)}Q", self._map, wire.SLOT_HEADER_BYTES, *sums)
        h.step, h.epoch, h.final, h.checksum_kind = step, epoch, 0, wire.SUM_SHA256
        h.header_crc = self._crc()
        h.state = wire.SLOT_READY

    def _crc(self) -> int:
        table = wire.SLOT_HEADER_BYTES
        return crc32c(self._map[_HEADER_CRC_FIRST:_HEADER_CRC_END], self._map[table : table + 8 * self.layout.chunks])


def _prefix(chunk: memoryview) -> int:
    with chunk:
        return int.from_bytes(hashlib.sha256(chunk).digest()[:8], "little")


class SlotTable:
    """The slots of a node's ranks for one plan: ``slots[rank][index]``."""

    def __init__(self, layouts: dict[int, PositionLayout], plan_digest: bytes, what_digest: bytes, count: int) -> None:
        self.layouts, self.plan_digest, self.what_digest, self.count = layouts, plan_digest, what_digest, count
        self.slots: dict[int, list[Slot]] = {}

    def create(self, rank: int) -> None:
        """Make this rank's slots, where it has none yet."""
        if rank not in self.slots:
            layout = self.layouts[rank]
            self.slots[rank] = [Slot.create(layout, self.plan_digest, self.what_digest) for _ in range(self.count)]

    def adopt(self, rank: int, fds: Iterable[int]) -> None:
        """Take slots that a rank hands back. Raises SlotChanged, with every descriptor closed."""
        rest, taken = list(fds), []
        try:
            while rest:
                taken.append(Slot.adopt(rest[0], self.layouts[rank], self.plan_digest))
                rest.pop(0)
        except SlotChanged:
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
