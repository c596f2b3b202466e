"""What a compiled plan is made of, as Python sees it: frozen records, one to one with ``engine/wire/plan.h``.

The compiler makes them, ``binary.py`` writes and reads them, the simulator, the drawings and the memory table look at
them. Holds data and no decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from trainer.plan.places import Position, Stage
from trainer.wire import NUMERICS_F32


@dataclass(frozen=True, slots=True)
class Ref:
    """Bytes of a position's memory: ``space`` is ``wire.SPACE_*``; the offset counts from the space's start.

    ``across``: of a PIECE, whose (``wire.SPACE_PIECE``).
    """

    space: int
    offset: int
    bytes: int
    across: int = 0


@dataclass(frozen=True, slots=True)
class BoundCall:
    """A kernel call with its operands bound to memory. ``part``: F, I or W; R: F once more; O: the optimizer's."""

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
    """Calls that run as one. Names of a position's: F, B (of its stage), init, load, sumsq, adamw."""

    name: str
    calls: tuple[BoundCall, ...]


@dataclass(frozen=True, slots=True)
class BoundAction:
    """One entry of an action list. ``kind`` is ``wire.A_*``, ``program`` a name of this position's programs.

    ``stage``: whose computation or message of the schedule it is; None for what the position does as a whole.
    """

    kind: int
    op: str = "-"
    program: str | None = None
    channel: int | None = None
    microbatch: int | None = None
    slot: int | None = None
    ref: Ref | None = None
    stage: Stage | None = None
    sender: Stage | None = None
    """Of a message whose sender is not the stage next to its receiver: whose result it is."""


class ActionList(Sequence[BoundAction]):
    """A list of actions as columns, read as a sequence of ``BoundAction``.

    Few actions of a list differ by more than microbatch and slot: ``patterns`` are the different ones without either,
    ``which`` says which pattern an action has. -1 in ``microbatch`` or ``slot``: none.
    """

    __slots__ = ("microbatch", "patterns", "slot", "which")

    def __init__(
        self,
        patterns: tuple[BoundAction, ...],
        which: NDArray[np.uint16],
        microbatch: NDArray[np.int32],
        slot: NDArray[np.int32],
    ) -> None:
        self.patterns, self.which, self.microbatch, self.slot = patterns, which, microbatch, slot

    @classmethod
    def of(cls, actions: Sequence[BoundAction]) -> ActionList:
        """The same actions as columns; a list of columns stays as it is."""
        if isinstance(actions, ActionList):
            return actions
        patterns: dict[BoundAction, int] = {}
        which = [patterns.setdefault(replace(a, microbatch=None, slot=None), len(patterns)) for a in actions]
        numbers = [[-1 if n is None else n for n in column] for column in
                   ([a.microbatch for a in actions], [a.slot for a in actions])]  # fmt: skip
        return cls(tuple(patterns), np.array(which, np.uint16), *(np.array(n, np.int32) for n in numbers))

    @classmethod
    def joined(cls, lists: Sequence[ActionList]) -> ActionList:
        """One after the other."""
        patterns: dict[BoundAction, int] = {}
        which = [np.zeros(0, np.uint16)]
        for part in lists:
            numbers = [patterns.setdefault(pattern, len(patterns)) for pattern in part.patterns]
            which.append(np.array(numbers, np.uint16)[part.which])
        none = np.zeros(0, np.int32)
        columns = ([none, *(part.microbatch for part in lists)], [none, *(part.slot for part in lists)])
        return cls(tuple(patterns), np.concatenate(which), *map(np.concatenate, columns))

    def take(self, places: NDArray[Any]) -> ActionList:
        """The actions at ``places``: indices or a mask."""
        return ActionList(self.patterns, self.which[places], self.microbatch[places], self.slot[places])

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> BoundAction: ...
    @overload
    def __getitem__(self, place: slice) -> ActionList: ...
    def __getitem__(self, place: int | slice) -> BoundAction | ActionList:
        if isinstance(place, slice):
            return ActionList(self.patterns, self.which[place], self.microbatch[place], self.slot[place])
        return self._one(self.which[place], int(self.microbatch[place]), int(self.slot[place]))

    def __iter__(self) -> Iterator[BoundAction]:
        return map(self._one, self.which.tolist(), self.microbatch.tolist(), self.slot.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(BoundAction.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment] # lists are compared, never keys

    def _one(self, which: int, microbatch: int, slot: int) -> BoundAction:
        p = self.patterns[which]
        if microbatch < 0 and slot < 0:
            return p
        numbers = (None if microbatch < 0 else microbatch, None if slot < 0 else slot)
        return BoundAction(p.kind, p.op, p.program, p.channel, *numbers, p.ref, p.stage, p.sender)


@dataclass(frozen=True, slots=True)
class Channel:
    """A directed edge between positions and kind (``wire.CH_*``). Every message on it has ``bytes`` bytes.

    ``across`` k: between replica r and r ^ k, both ways, of one position.
    """

    source: Position
    target: Position
    kind: int
    bytes: int
    across: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """A state tensor at its owner: byte offsets in the arena and in a slot's data. None: not kept (inference; v, where
    Muon takes the tensor).

    ``pieces``: 1, whole in every replica, or as many as there are replicas, each with its own.
    """

    tensor: int
    master: int
    m: int | None
    v: int | None
    grad: int | None
    slot: int
    pieces: int = 1

    @property
    def kinds(self) -> int:
        """What a slot has of it: master and moments."""
        return 2 if self.v is None else 3


@dataclass(frozen=True)
class PositionPlan:
    """What every rank at one position has: its memory, programs and action lists."""

    position: Position
    chunks: tuple[Stage, ...]
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
    init: Sequence[BoundAction]
    load: Sequence[BoundAction]
    step: Sequence[BoundAction]
    bytes_by_kind: Mapping[str, int]
    redo: Sequence[BoundAction] = ()
    step_prefix: int = 0
    step_checks: int = 0
    """Of an optimistic step's list, how many actions lead it, and how many then check the step before."""

    @property
    def total_bytes(self) -> int:
        """Bytes that a rank here and its slots take together."""
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
    reduction_groups: int = 1
    numerics_version: int = NUMERICS_F32
    persist_every: int = 0
    lr_start: int = 0
