"""A compiled plan as Python sees it: frozen records, one to one with ``engine/wire/plan.h``.

The compiler makes them, ``binary.py`` writes and reads them, the simulator, the drawings and the memory table look at
them. Holds data and no decisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from trainer.models.base import Tensor
from trainer.plan.draw import memory_text
from trainer.plan.schedules import Action


@dataclass(frozen=True, slots=True)
class Ref:
    """Bytes of a rank's memory: ``space`` is ``wire.SPACE_*``; the offset counts from the space's start."""

    space: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BoundCall:
    """A kernel call with its operands bound to memory. ``part``: F, I or W; "O" for what belongs to the optimizer."""

    kernel: str
    dtype: int
    ptr: tuple[Ref | None, ...]
    dim: tuple[int, ...]
    real: tuple[float, ...]
    layer: int | None
    part: str

    @property
    def bytes_touched(self) -> int:
        """Sum of its operands' bytes."""
        return sum(ref.bytes for ref in self.ptr if ref is not None)


@dataclass(frozen=True)
class Program:
    """Calls that run as one. Names of a stage's: F, B, init, load, sumsq, adamw."""

    name: str
    calls: tuple[BoundCall, ...]


@dataclass(frozen=True, slots=True)
class PlanAction:
    """One entry of an action list. ``kind`` is ``wire.A_*``, ``program`` a name of this position's programs."""

    kind: int
    op: str = "-"
    program: str | None = None
    channel: int | None = None
    microbatch: int | None = None
    slot: int | None = None
    ref: Ref | None = None


@dataclass(frozen=True, slots=True)
class Channel:
    """A directed edge and kind (``wire.CH_*``). Every message on it has ``bytes`` bytes."""

    source: int
    target: int
    kind: int
    bytes: int


@dataclass(frozen=True, slots=True)
class State:
    """A state tensor at its owner: byte offsets in the arena and in a slot's data. None: not kept (inference)."""

    tensor: int
    master: int
    m: int | None
    v: int | None
    grad: int | None
    slot: int


@dataclass(frozen=True)
class Position:
    """One pipeline position: its memory, programs and action lists."""

    stage: int
    layers: range
    arena_bytes: int
    act_offset: int
    act_stride: int
    act_slots: int
    mb_offset: int
    mb_stride: int
    mb_count: int
    tokens_offset: int | None
    targets_offset: int | None
    loss_offset: int | None
    sumsq_offset: int | None
    control_offset: int | None
    logits_offset: int | None
    slot_bytes: int
    states: tuple[State, ...]
    programs: Mapping[str, Program]
    init: tuple[PlanAction, ...]
    load: tuple[PlanAction, ...]
    step: tuple[PlanAction, ...]
    bytes_by_kind: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes that the rank and its slots take together."""
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True)
class Config:
    """What ``hs_plan_config`` holds, in its order."""

    mode: int
    dtype: int
    positions: int
    replicas: int
    microbatches: int
    microbatch: int
    sequence: int
    vocab: int
    token_bytes: int
    steps: int
    seed: int
    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    lr_schedule: int
    threads: int
    clip: float
    beta1: float
    beta2: float
    checkpoint_every: int
    slots: int
    data_shuffled: bool
    data_samples: int
    data_block: int
    data_window: int
    dataset_digest: bytes
    what_digest: bytes
    numerics_version: int = 1


@dataclass(frozen=True)
class Plan:
    """A compiled plan. ``schedule`` holds each rank's computations and messages of a step, without the optimizer's."""

    config: Config
    tensors: tuple[Tensor, ...]
    shards: tuple[int, ...]
    positions: tuple[Position, ...]
    channels: tuple[Channel, ...]
    schedule: tuple[tuple[Action, ...], ...] = field(default=())

    @cached_property
    def _bytes(self) -> bytes:
        from trainer.plan.binary import to_bytes

        return to_bytes(self)

    def to_bytes(self) -> bytes:
        """The plan file."""
        return self._bytes

    @property
    def digest(self) -> str:
        """Hex digits of the file's digest: SHA-256 of its bytes from 64 on."""
        return hashlib.sha256(self._bytes[64:]).hexdigest()

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    def memory_table(self) -> str:
        """Bytes of every rank by kind, as text."""
        return memory_text([position.bytes_by_kind for position in self.positions])
