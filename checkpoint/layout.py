"""What the checkpoint side needs of a plan file: which position owns which tensor, and where it lies in a slot.

The plan compiler writes the file (``trainer/engine/wire/plan.h``), the engine runs it; this module only reads it, as
hostile input: sizes before records, the digest before anything, every index and offset against its table. It depends
on the standard library and ``trainer.wire`` alone, because the agent's image carries nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from typing import TypeVar

from trainer import wire

from .errors import CheckpointError

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""The three f32 arrays of a tensor's state, in the order in which a slot holds them."""

_ALIGN = 64
_Record = TypeVar("_Record", bound=ctypes.Structure)


class PlanRefused(CheckpointError):
    """The plan file does not hold what its header says, or is not the one that was asked for."""


@dataclass(frozen=True)
class TensorInfo:
    """A state tensor in global terms. ``elements`` is the product of ``shape``."""

    name: str
    shape: tuple[int, ...]
    elements: int


@dataclass(frozen=True)
class StateSlot:
    """Where a position keeps one tensor in its slot: byte ``offset`` of the master weights from the data's start."""

    tensor: int
    offset: int
    elements: int

    def kind_offset(self, kind: int) -> int:
        """Byte offset of KINDS[kind] from the start of the slot's data."""
        return self.offset + kind * round_up(4 * self.elements, _ALIGN)


@dataclass(frozen=True)
class PositionLayout:
    """A position's part of the state and the size of its slots, in bytes."""

    position: int
    slot_bytes: int
    data_bytes: int
    states: tuple[StateSlot, ...]

    @property
    def chunks(self) -> int:
        """Checksummed chunks of a slot's data (``slot.h``)."""
        return -(-self.data_bytes // wire.SLOT_CHUNK)

    @property
    def data_offset(self) -> int:
        """Where the data starts in the slot: after the header and the table of checksums."""
        return wire.SLOT_HEADER_BYTES + round_up(8 * self.chunks, wire.SLOT_HEADER_BYTES)


@dataclass(frozen=True)
class PlanLayout:
    """A plan, as far as checkpoints care. Digests are raw 32 bytes."""

    digest: bytes
    what_digest: bytes
    dataset_digest: bytes
    replicas: int
    steps: int
    slots: int
    batch: int
    """Samples of an optimizer step: microbatches x microbatch."""
    shards: tuple[int, ...]
    """Tokens of each shard, in order."""
    token_bytes: int
    tensors: tuple[TensorInfo, ...]
    positions: tuple[PositionLayout, ...]


def round_up(value: int, to: int) -> int:
    """The least multiple of ``to`` that is not below ``value``."""
    return -(-value // to) * to


def read_plan(data: bytes, *, digest: bytes | None = None) -> PlanLayout:
    """Read a plan file; with ``digest`` refuse any other plan.

    Raises PlanRefused, naming what fails first.
    """
    if len(data) < ctypes.sizeof(wire.PlanHeader):
        raise PlanRefused(f"the plan has {len(data)} bytes, fewer than its header; write it anew from the spec")
    header = wire.PlanHeader.from_buffer_copy(data)
    if bytes(header.magic) != wire.PLAN_MAGIC or header.version != wire.PLAN_VERSION:
        raise PlanRefused(
            f"not a plan of version {wire.PLAN_VERSION}: magic {bytes(header.magic)!r}, version {header.version}; "
            "compile it anew with this version of hotstage"
        )
    if header.file_bytes != len(data) or header.sections != len(wire.SECTIONS):
        raise PlanRefused(f"the plan says {header.file_bytes} bytes and has {len(data)}: it was cut or appended to")
    actual = hashlib.sha256(memoryview(data)[64:]).digest()
    if actual != bytes(header.digest):
        raise PlanRefused(f"the plan's digest is {actual.hex()}, its header says {bytes(header.digest).hex()}")
    if digest is not None and actual != digest:
        raise PlanRefused(f"the plan has digest {actual.hex()}, the attempt names {digest.hex()}")

    config = _records(data, header, "config", wire.PlanConfig)
    if len(config) != 1:
        raise PlanRefused(f"the plan has {len(config)} configurations, not one")
    strings = _section(data, header, "strings", 1)
    tensors = tuple(_tensor(t, strings) for t in _records(data, header, "tensors", wire.PlanTensor))
    states = _records(data, header, "states", wire.PlanState)
    positions = tuple(
        _position(number, p, states, tensors)
        for number, p in enumerate(_records(data, header, "positions", wire.PlanPosition))
    )
    owned = [s.tensor for p in positions for s in p.states]
    if sorted(owned) != list(range(len(tensors))):
        raise PlanRefused("the plan does not give every tensor exactly one owner")
    c = config[0]
    if c.positions != len(positions) or not positions:
        raise PlanRefused(f"the plan has {len(positions)} positions, its configuration says {c.positions}")
    return PlanLayout(
        digest=actual,
        what_digest=bytes(c.what_digest),
        dataset_digest=bytes(c.dataset_digest),
        replicas=c.replicas,
        steps=c.steps,
        slots=c.slots,
        batch=c.microbatches * c.microbatch,
        shards=tuple(s.tokens for s in _records(data, header, "shards", wire.PlanShard)),
        token_bytes=c.token_bytes,
        tensors=tensors,
        positions=positions,
    )


def _section(data: bytes, header: wire.PlanHeader, name: str, size: int) -> bytes:
    section = header.section[wire.SECTIONS.index(name)]
    end = section.offset + section.count * size
    if section.offset < ctypes.sizeof(wire.PlanHeader) or section.offset > len(data) or end > len(data):
        raise PlanRefused(f"the plan's section {name} lies outside the file")
    return data[section.offset : end]


def _records(data: bytes, header: wire.PlanHeader, name: str, record: type[_Record]) -> list[_Record]:
    raw, size = _section(data, header, name, ctypes.sizeof(record)), ctypes.sizeof(record)
    return [record.from_buffer_copy(raw, at) for at in range(0, len(raw), size)]


def _tensor(t: wire.PlanTensor, strings: bytes) -> TensorInfo:
    if t.name_offset + t.name_length > len(strings) or not 1 <= t.rank <= 4:
        raise PlanRefused("the plan's table of tensors points outside its strings")
    shape = tuple(t.shape)[: t.rank]
    elements = 1
    for extent in shape:
        if extent < 1:
            raise PlanRefused(f"a tensor of the plan has shape {shape}")
        elements *= extent
    if elements != t.elements or elements > 1 << 48:
        raise PlanRefused(f"a tensor of shape {shape} cannot have {t.elements} elements")
    try:
        name = strings[t.name_offset : t.name_offset + t.name_length].decode()
    except UnicodeDecodeError:
        raise PlanRefused("a tensor's name in the plan is not UTF-8") from None
    return TensorInfo(name, shape, elements)


def _position(
    number: int, p: wire.PlanPosition, states: list[wire.PlanState], tensors: tuple[TensorInfo, ...]
) -> PositionLayout:
    if p.first_state + p.states > len(states):
        raise PlanRefused(f"position {number} of the plan owns states beyond the table")
    owned, data_bytes = [], 0
    for s in states[p.first_state : p.first_state + p.states]:
        if s.tensor >= len(tensors):
            raise PlanRefused(f"position {number} of the plan owns tensor {s.tensor} of {len(tensors)}")
        slot = StateSlot(s.tensor, s.slot_offset, tensors[s.tensor].elements)
        data_bytes = max(data_bytes, slot.kind_offset(3))
        owned.append(slot)
    layout = PositionLayout(number, p.slot_bytes, data_bytes, tuple(owned))
    if layout.data_offset + data_bytes > p.slot_bytes:
        raise PlanRefused(
            f"a slot of position {number} has {p.slot_bytes} bytes; its state needs {layout.data_offset + data_bytes}"
        )
    return layout
