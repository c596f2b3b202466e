"""Actions, and rows of them as columns. Owns what an action is and its text; knows no schedule and no rule.

An action is (stage, operation, microbatch). A row is one position's list of actions: three columns that read as a
sequence of ``Action``. A plan of 1,000 stages and 4,000 microbatches has 24 million actions; a pass over a row is a few
operations on its columns, and its bytes are five an action.

The text of an action, ``2F0`` or ``3SEND_F1``, is that of PyTorch's pipelining.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.places import Stage

COMPUTE = ("F", "I", "W", "B")
"""Forward, input gradient, weight gradient, and B = I then W."""

MESSAGES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
"""The stage named is the one that acts: ``SEND_F`` goes up to stage + 1, ``SEND_B`` down to stage - 1."""

HEAD = ("SPREAD", "SHARE", "JOIN")
"""Messages of a head in parts (``head_rows.py``), each among all positions that have one: the head's input to the
parts, their sums to one another, their shares of its gradient back to the last stage."""

OPS = COMPUTE + MESSAGES + HEAD
F, I, W, B, SEND_F, RECV_F, SEND_B, RECV_B, SPREAD, SHARE, JOIN = range(11)  # noqa: E741 (I is the operation's name)
"""An operation in a column: its place in OPS."""

MOST = (1 << 31) - 1
"""The highest stage and microbatch that a column holds."""

_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|I|W|B)(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a position's list. ``stage`` and ``microbatch`` count from 0; ``op`` is in COMPUTE or MESSAGES.

    >>> str(Action(3, "SEND_F", 1))
    '3SEND_F1'
    """

    stage: Stage
    op: str
    microbatch: int

    def __post_init__(self) -> None:
        if not (0 <= self.stage <= MOST and 0 <= self.microbatch <= MOST and self.op in OPS):
            raise PlanError(
                f"no such action: stage {self.stage}, operation {self.op!r}, microbatch {self.microbatch}; stage and "
                f"microbatch count from 0 to {MOST} and the operation is one of {', '.join(OPS)}"
            )

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @property
    def is_compute(self) -> bool:
        return self.op in COMPUTE

    @property
    def is_send(self) -> bool:
        return self.op in ("SEND_F", "SEND_B")

    @property
    def edge(self) -> tuple[Stage, Stage]:
        """(stage that sends, stage that receives) of a message."""
        step = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}[self.op]
        other = Stage(self.stage + step)
        return (self.stage, other) if self.is_send else (other, self.stage)


def parse_action(text: str) -> Action:
    """The action that ``text`` names.

    >>> parse_action("2RECV_B4")
    Action(stage=2, op='RECV_B', microbatch=4)
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise PlanError(
            f"cannot read the action {text!r}: write stage, operation, microbatch, such as 2F0 or 3SEND_F1; "
            f"operations are {', '.join(OPS)}"
        )
    return Action(Stage(int(found[1])), found[2], int(found[3]))


class Row(Sequence[Action]):
    """One position's actions as three columns of one length: ``op`` (places in OPS), ``stage`` and ``microbatch``.

    >>> Row.of([Action(0, "F", 0), Action(0, "B", 0)])[1]
    Action(stage=0, op='B', microbatch=0)
    """

    __slots__ = ("microbatch", "op", "stage")

    def __init__(self, op: NDArray[np.uint8], stage: NDArray[np.int32], microbatch: NDArray[np.int32]) -> None:
        self.op, self.stage, self.microbatch = op, stage, microbatch

    @classmethod
    def of(cls, actions: Iterable[Action]) -> Row:
        """The same actions as columns; a row stays as it is."""
        if isinstance(actions, Row):
            return actions
        listed = list(actions)
        return cls(
            np.array([OPS.index(action.op) for action in listed], np.uint8),
            np.array([action.stage for action in listed], np.int32),
            np.array([action.microbatch for action in listed], np.int32),
        )

    @classmethod
    def of_stage(cls, stage: Stage, op: NDArray[np.uint8], microbatch: NDArray[np.int32]) -> Row:
        """A row of one stage: its column takes no memory."""
        return cls(op, np.broadcast_to(np.int32(stage), op.shape), microbatch)

    def __len__(self) -> int:
        return len(self.op)

    @overload
    def __getitem__(self, place: int) -> Action: ...
    @overload
    def __getitem__(self, place: slice) -> Row: ...
    def __getitem__(self, place: int | slice) -> Action | Row:
        if isinstance(place, slice):
            return self.take(place)
        return Action(Stage(int(self.stage[place])), OPS[self.op[place]], int(self.microbatch[place]))

    def __iter__(self) -> Iterator[Action]:
        columns = self.stage.tolist(), self.op.tolist(), self.microbatch.tolist()
        return (Action(Stage(stage), OPS[op], microbatch) for stage, op, microbatch in zip(*columns, strict=True))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Row):
            return len(self) == len(other) and all(
                np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__slots__
            )
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # rows are compared, never keys

    def __repr__(self) -> str:
        return f"Row({' '.join(map(str, self))})"

    def take(self, places: slice | NDArray[Any]) -> Row:
        """The actions at ``places``: a slice, indices or a mask."""
        return Row(self.op[places], self.stage[places], self.microbatch[places])

    def of_one(self, stage: Stage) -> Row:
        """The actions of one stage."""
        if self.only_stage == stage:
            return self
        return self.take(np.flatnonzero(self.stage == stage))

    @property
    def compute(self) -> NDArray[np.bool_]:
        """Where its computations are."""
        return np.less(self.op, SEND_F)

    @property
    def only_stage(self) -> Stage | None:
        """The stage of all its actions; None where there are several, or none."""
        if not len(self):
            return None
        first = self.stage[0]
        alone = self.stage.strides == (0,) or (self.stage[-1] == first and self.stage.min() == self.stage.max())
        return Stage(int(first)) if alone else None

    def stages(self) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
        """Its stages, ascending, and where each comes first."""
        if self.only_stage is not None:
            return self.stage[:1], np.zeros(1, np.intp)
        return np.unique(self.stage, return_index=True)

    def computations(self, stage: Stage) -> frozenset[str]:
        """Which of COMPUTE it does for a stage."""
        found = self.of_one(stage).op
        return frozenset(op for number, op in enumerate(COMPUTE) if (found == number).any())

    def ops_of(self, stage: Stage, microbatch: int) -> frozenset[str]:
        """Which of OPS it does for a stage's microbatch."""
        row = self.of_one(stage)
        return frozenset(OPS[op] for op in row.op[row.microbatch == microbatch].tolist())

    def last_of(self, stage: Stage, microbatch: int, ops: Sequence[int]) -> str:
        """Which of these operations it does last for a stage's microbatch."""
        row = self.of_one(stage)
        return OPS[int(row.op[(row.microbatch == microbatch) & np.isin(row.op, ops)][-1])]

    def by_stage(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Its stages, ascending, and of every action the place of its stage among them."""
        if self.only_stage is not None:
            return self.stage[:1], np.broadcast_to(np.int32(0), self.stage.shape)
        names, places = np.unique(self.stage, return_inverse=True)
        return names, places.astype(np.int32)


Rows = Sequence[Sequence[Action]]
"""One list of actions a position: rows of columns, or any sequences."""


def split_stages(rows: Rows) -> frozenset[Stage]:
    """The stages whose weight gradients are a program of their own: for some microbatch it is W."""
    found = (np.unique(row.stage[row.op == W]).tolist() for row in columns(rows))
    return frozenset(Stage(stage) for stages in found for stage in stages)


def columns(rows: Rows) -> list[Row]:
    """All rows as columns."""
    return [Row.of(row) for row in rows]
