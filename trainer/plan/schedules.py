"""Schedules as data: what a rank computes, in which order. Owns actions, their text and the generators.

A schedule is one list of actions a rank. An action is (stage, operation, microbatch), and its text and its CSV (one row
a rank) are those of PyTorch's pipelining, so that schedules can be exchanged and diffed: ``2F0`` is stage 2's forward
of microbatch 0, ``3SEND_F1`` sends stage 3's output of microbatch 1 to stage 4, ``2RECV_B4`` receives from stage 3 the
gradient of stage 2's output for microbatch 4. An empty CSV cell is a bubble and carries no meaning.

Generators give compute-only lists; ``check.insert_messages`` adds the messages. Nothing here knows a model, a buffer or
a channel.

Invariant of every generator: on a stage, backward passes (``B``, ``I``, ``W``) ascend in the microbatch. The sum of a
weight's gradient over microbatches therefore has one order, whatever the schedule, and equal bits follow.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.errors import PlanError

COMPUTE = ("F", "I", "W", "B")
"""Forward, input gradient, weight gradient, and B = I then W."""

MESSAGES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
"""The stage named is the one that acts: ``SEND_F`` goes up to stage + 1, ``SEND_B`` down to stage - 1."""

_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|I|W|B)(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list. ``stage`` and ``microbatch`` count from 0; ``op`` is in COMPUTE or MESSAGES.

    >>> str(Action(3, "SEND_F", 1))
    '3SEND_F1'
    """

    stage: int
    op: str
    microbatch: int

    def __post_init__(self) -> None:
        if self.stage < 0 or self.microbatch < 0 or not (self.op in COMPUTE or self.op in MESSAGES):
            raise PlanError(
                f"no such action: stage {self.stage}, operation {self.op!r}, microbatch {self.microbatch}; stage and "
                f"microbatch count from 0 and the operation is one of {', '.join(COMPUTE + MESSAGES)}"
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
    def edge(self) -> tuple[int, int]:
        """(stage that sends, stage that receives) of a message."""
        step = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}[self.op]
        other = self.stage + step
        return (self.stage, other) if self.is_send else (other, self.stage)


Rows = Sequence[Sequence[Action]]
"""One list of actions a rank."""


def parse_action(text: str) -> Action:
    """The action that ``text`` names.

    >>> parse_action("2RECV_B4")
    Action(stage=2, op='RECV_B', microbatch=4)
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise PlanError(
            f"cannot read the action {text!r}: write stage, operation, microbatch, such as 2F0 or 3SEND_F1; "
            f"operations are {', '.join(COMPUTE + MESSAGES)}"
        )
    return Action(int(found[1]), found[2], int(found[3]))


def to_csv(rows: Rows) -> str:
    """One row a rank, as PyTorch writes it.

    >>> to_csv(gpipe(2, 1))
    '0F0,0B0\\n1F0,1B0\\n'
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([str(action) for action in row])
    return out.getvalue()


def from_csv(text: str) -> list[list[Action]]:
    """The rows of a CSV; empty cells (bubbles) are dropped. PlanError names the row and cell that cannot be read."""
    rows: list[list[Action]] = []
    for number, cells in enumerate(csv.reader(io.StringIO(text))):
        row: list[Action] = []
        for place, cell in enumerate(cells):
            if not cell.strip():
                continue
            try:
                row.append(parse_action(cell))
            except PlanError as error:
                raise PlanError(f"row {number} (rank {number}), cell {place}: {error}") from error
        rows.append(row)
    return rows


def _sizes(stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise PlanError(
            f"a schedule needs at least 1 stage and 1 microbatch, got {stages} stages and {microbatches} microbatches"
        )


def gpipe(stages: int, microbatches: int) -> list[list[Action]]:
    """All forwards, then all backwards, both ascending. In flight on every stage: all microbatches.

    >>> [str(a) for a in gpipe(2, 2)[1]]
    ['1F0', '1F1', '1B0', '1B1']
    """
    _sizes(stages, microbatches)
    return [
        [Action(stage, op, microbatch) for op in ("F", "B") for microbatch in range(microbatches)]
        for stage in range(stages)
    ]


def one_f_one_b(stages: int, microbatches: int) -> list[list[Action]]:
    """Stage s runs P - s - 1 forwards to warm up, then one forward and one backward in turn, then the backwards left.

    In flight on stage s: min(P - s, M) microbatches.

    >>> [str(a) for a in one_f_one_b(2, 3)[0]]
    ['0F0', '0F1', '0B0', '0F2', '0B1', '0B2']
    """
    _sizes(stages, microbatches)
    rows: list[list[Action]] = []
    for stage in range(stages):
        warm = min(stages - stage - 1, microbatches)
        row = [Action(stage, "F", microbatch) for microbatch in range(warm)]
        for step in range(microbatches - warm):
            row += [Action(stage, "F", warm + step), Action(stage, "B", step)]
        row += [Action(stage, "B", microbatch) for microbatch in range(microbatches - warm, microbatches)]
        rows.append(row)
    return rows


GENERATORS = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""By the name that a spec uses."""


def stage_ranks(rows: Rows) -> dict[int, int]:
    """Which rank runs which stage, by the rows' own account. PlanError where a stage sits on two ranks."""
    ranks: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            if ranks.setdefault(action.stage, rank) != rank:
                raise PlanError(
                    f"rank {rank}, {action}: stage {action.stage} already runs on rank {ranks[action.stage]}; "
                    "a stage lives on one rank"
                )
    return ranks


def in_flight(rows: Rows) -> list[int]:
    """For every stage, in order, the most microbatches whose activations it holds at once.

    A microbatch is held from its ``RECV_F`` (else its ``F``) to its ``B`` or ``W``, whichever ends it.

    >>> in_flight(one_f_one_b(4, 8))
    [4, 3, 2, 1]
    """
    last: dict[tuple[int, int], int] = {}  # where a (stage, microbatch) ends, as a place in its rank's row
    for row in rows:
        for place, action in enumerate(row):
            if action.op in ("B", "I", "W"):
                last[action.stage, action.microbatch] = place
    peak: dict[int, int] = {}
    for row in rows:
        held: dict[int, set[int]] = {}
        for place, action in enumerate(row):
            mine = held.setdefault(action.stage, set())
            if action.op in ("RECV_F", "F"):
                mine.add(action.microbatch)
                peak[action.stage] = max(peak.get(action.stage, 0), len(mine))
            elif last.get((action.stage, action.microbatch)) == place:
                mine.discard(action.microbatch)
    return [peak.get(stage, 0) for stage in range(max(peak, default=-1) + 1)]


def strip_messages(rows: Iterable[Iterable[Action]]) -> list[list[Action]]:
    """The compute-only schedule inside a lowered one."""
    return [[action for action in row if action.is_compute] for row in rows]
