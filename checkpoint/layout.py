"""What the checkpoint side needs of a plan file: which position owns which tensor, and where it lies in a slot.

The plan compiler writes the file (``trainer/engine/wire/plan.h``), the engine runs it, ``trainer/wire/plan.py`` reads
its sections; here its records are read as hostile input, every index and offset against its table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from checkpoint.errors import CheckpointError
from trainer import wire
from trainer.wire.plan import parse
from trainer.wire.unreadable import Unreadable

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""The three f32 arrays of a tensor's state, in the order in which a slot holds them."""

_ALIGN = 64


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
    try:
        file = parse(data)
        c = file.config
        tensors = tuple(_tensor(t, file.name(t)) for t in file.records("tensors", wire.PlanTensor))
    except Unreadable as error:
        raise PlanRefused(str(error)) from error
    if digest is not None and file.digest != digest.hex():
        raise PlanRefused(f"the plan has digest {file.digest}, the attempt names {digest.hex()}")
    states = file.records("states", wire.PlanState)
    positions = tuple(
        _position(number, p, states, tensors) for number, p in enumerate(file.records("positions", wire.PlanPosition))
    )
    owned = [s.tensor for p in positions for s in p.states]
    if sorted(owned) != list(range(len(tensors))):
        raise PlanRefused("the plan does not give every tensor exactly one owner")
    if c.positions != len(positions) or not positions:
        raise PlanRefused(f"the plan has {len(positions)} positions, its configuration says {c.positions}")
    return PlanLayout(
        digest=bytes.fromhex(file.digest),
        what_digest=bytes(c.what_digest),
        dataset_digest=bytes(c.dataset_digest),
        replicas=c.replicas,
        steps=c.steps,
        slots=c.slots,
        batch=c.microbatches * c.microbatch,
        shards=tuple(s.tokens for s in file.records("shards", wire.PlanShard)),
        token_bytes=c.token_bytes,
        tensors=tensors,
        positions=positions,
    )


def _tensor(t: wire.PlanTensor, name: str) -> TensorInfo:
    if not 1 <= t.rank <= 4:
        raise PlanRefused(f"tensor {name} of the plan has {t.rank} dimensions, it must have 1 to 4")
    shape = tuple(t.shape)[: t.rank]
    if min(shape) < 1 or math.prod(shape) != t.elements or t.elements > 1 << 48:
        raise PlanRefused(f"tensor {name} of the plan, of shape {shape}, cannot have {t.elements} elements")
    return TensorInfo(name, shape, t.elements)


def _position(
    number: int, p: wire.PlanPosition, states: tuple[wire.PlanState, ...], tensors: tuple[TensorInfo, ...]
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
