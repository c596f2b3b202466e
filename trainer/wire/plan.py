"""The one reader of a plan file in Python (``engine/wire/plan.h`` is its manual; the engine has its own).

Hostile: sizes, then version, then the digest, then the sections' places; what the records of a section mean, and
whether they fit together, is checked by whoever reads them (``checkpoint/layout.py``).
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from typing import TypeVar

from trainer import wire
from trainer.wire.unreadable import NewerVersion, Unreadable

Record = TypeVar("Record", bound=ctypes.LittleEndianStructure)
RECORDS: dict[str, type[ctypes.LittleEndianStructure]] = {
    "config": wire.PlanConfig,
    "tensors": wire.PlanTensor,
    "shards": wire.PlanShard,
    "positions": wire.PlanPosition,
    "states": wire.PlanState,
    "programs": wire.PlanProgram,
    "calls": wire.PlanCall,
    "actions": wire.PlanAction,
    "channels": wire.PlanChannel,
    "parts": wire.PlanPart,
    "weights": wire.PlanWeight,
}
"""What a section holds; ``strings`` has bytes."""


def piece_elements(elements: int, pieces: int) -> int:
    """Elements of a piece of a tensor: as many whole blocks for each, so that the last ones may be cut short, or empty
    (``engine/wire/plan.h``, hs_plan_state)."""
    return elements if pieces == 1 else -(-elements // wire.PIECE_BLOCK // pieces) * wire.PIECE_BLOCK


@dataclass(frozen=True)
class PlanFile:
    """A plan file's sections. ``digest``: the hex digest that the header holds and the bytes have."""

    digest: str
    _sections: dict[str, bytes]

    @property
    def config(self) -> wire.PlanConfig:
        found = self.records("config", wire.PlanConfig)
        if len(found) != 1:
            raise Unreadable(f"the plan has {len(found)} configurations, not one; compile it again")
        return found[0]

    def records(self, name: str, kind: type[Record]) -> tuple[Record, ...]:
        """A section's records."""
        assert RECORDS[name] is kind, f"the section {name} has other records"
        raw = self._sections[name]
        return tuple(kind.from_buffer_copy(raw, at) for at in range(0, len(raw), ctypes.sizeof(kind)))

    def name(self, record: wire.PlanTensor | wire.PlanProgram) -> str:
        """The name of a tensor or program."""
        strings, end = self._sections["strings"], record.name_offset + record.name_length
        if end > len(strings):
            raise Unreadable("a name of the plan lies outside its strings; compile it again")
        try:
            return strings[record.name_offset : end].decode()
        except UnicodeDecodeError:
            raise Unreadable("a name in the plan is not UTF-8; compile it again") from None


def checked_digest(data: bytes) -> str:
    """The hex digest of a plan file, also of an older version, whose header and bytes agree; Unreadable (NewerVersion)
    names the first thing that does not hold.
    """
    size = ctypes.sizeof(wire.PlanHeader)
    if len(data) < size:
        raise Unreadable(f"the plan has {len(data)} bytes, fewer than its header of {size}; compile it again")
    header = wire.PlanHeader.from_buffer_copy(data)
    if bytes(header.magic) != wire.PLAN_MAGIC:
        raise Unreadable(f"not a plan: it begins with {bytes(header.magic)!r}; compile it again")
    if header.version < 1:
        raise Unreadable("the plan has version 0, and there is none; compile it again")
    if header.version > wire.PLAN_VERSION:
        raise NewerVersion(
            f"the plan has version {header.version}, this hotstage reads version {wire.PLAN_VERSION}: use the hotstage "
            "that compiled it, or compile it again with this one"
        )
    if header.sections != sections_of(header.version) or header.reserved:
        raise Unreadable("the plan's header has other sections than its version; compile it again")
    if header.file_bytes != len(data):
        raise Unreadable(
            f"the plan says {header.file_bytes} bytes and has {len(data)}: it was cut or appended to; compile it again"
        )
    actual, named = hashlib.sha256(memoryview(data)[64:]).hexdigest(), bytes(header.digest).hex()
    if actual != named:
        raise Unreadable(f"the plan's digest is {actual}, its header says {named}; compile it again")
    return actual


def sections_of(version: int) -> int:
    """How many sections a plan of this version has."""
    return len(wire.SECTIONS) if version == wire.PLAN_VERSION else wire.SECTIONS_PLAIN


def version_of(head: bytes) -> int:
    """The version that a plan file's first bytes say; 0 where they are no plan's."""
    at = wire.PlanHeader.version.offset
    return int.from_bytes(head[at : at + 4], "little") if head[: len(wire.PLAN_MAGIC)] == wire.PLAN_MAGIC else 0


def parse(data: bytes) -> PlanFile:
    """A plan file's sections; Unreadable (NewerVersion) names the first thing that does not hold."""
    actual, header = checked_digest(data), wire.PlanHeader.from_buffer_copy(data)
    if header.version < wire.PLAN_PLAIN:
        raise Unreadable(
            f"the plan has version {header.version}, this hotstage reads {wire.PLAN_PLAIN} and {wire.PLAN_VERSION}; "
            "compile it again"
        )
    sections, count = dict.fromkeys(wire.SECTIONS, b""), sections_of(header.version)
    end = wire.PlanHeader.section.offset + count * ctypes.sizeof(wire.PlanSection)
    for name, section in zip(wire.SECTIONS[:count], header.section, strict=False):
        stop = section.offset + section.count * (ctypes.sizeof(RECORDS[name]) if name in RECORDS else 1)
        if section.count and (section.offset % 64 or section.offset < end or stop > len(data)):
            raise Unreadable(f"the plan's section {name} lies outside the file or over another; compile it again")
        sections[name], end = data[section.offset : stop], max(end, stop)
    return PlanFile(actual, sections)
