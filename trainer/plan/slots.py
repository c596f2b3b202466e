"""Slots of activations: which microbatch lies in which, and whether a message's memory is free when it is written.

A position has one pool of slots, as large as the largest of its runs of stages needs (a run: stages that follow one
another). So the pool holds as many as are in flight at once, not as many as each stage would need at its own worst.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.places import Stage
from trainer.plan.rows import JOIN, RECV_B, SEND_B, SEND_F, B, I, Row, W
from trainer.plan.rules import first_of_each


def holders(row: Row, runs: Sequence[Sequence[Stage]]) -> NDArray[np.int64]:
    """What each action of a row needs in a slot, numbered: the microbatch, apart for each run of stages."""
    if len(runs) < 2:
        return row.microbatch.astype(np.int64)
    names = np.array([stage for run in runs for stage in run], np.int32)  # ascending
    numbers = np.array([number for number, run in enumerate(runs) for _ in run], np.int64)
    width = 1 + int(row.microbatch.max(initial=-1))
    return numbers[np.searchsorted(names, row.stage)] * width + row.microbatch.astype(np.int64)


def assign_slots(
    row: Row, held: NDArray[np.int64] | None = None, apart: Collection[Stage] = ()
) -> tuple[int, NDArray[np.int32]]:
    """How many slots a row needs, and which each of its ``holders`` has (None: the microbatches): of those that are
    free, the lowest is taken.

    A slot is taken when the activation is received (on the first stage: at F) and free after the last of B, W, SEND_B
    and JOIN. ``apart``: stages whose SEND_B is from another place.
    """
    held = holders(row, ()) if held is None else held
    count, never = 1 + int(held.max(initial=-1)), len(row)
    taken = first_of_each(held, np.arange(never), count, never)
    sends = (row.op == SEND_B) & ~np.isin(row.stage, list(apart)) if apart else row.op == SEND_B
    places = np.flatnonzero((row.op == B) | (row.op == W) | (row.op == JOIN) | sends)
    freed = np.full(count, never)
    freed[held[places]] = places  # the last of each stays
    change = np.zeros(never + 1, np.int64)
    change[taken] += 1
    change[freed] -= 1
    most = int(change[:-1].cumsum().max(initial=0))
    slots = in_turn(taken, freed, most)
    return most, _lowest_free(taken, freed, never) if slots is None else slots


def in_turn(taken: NDArray[np.intp], freed: NDArray[np.intp], most: int) -> NDArray[np.int32] | None:
    """Slots 0, 1 … ``most`` - 1 in turn, where that is the lowest free one for every microbatch; else None.

    It is, where microbatches are taken and freed in their order, and each finds its own slot free (the last microbatch
    that had it is gone) and all lower ones held (the oldest of those is still there).
    """
    count = len(taken)
    every = np.arange(count)
    if (np.diff(taken) < 0).any() or (np.diff(freed) < 0).any():
        return None
    lower = every % most != 0
    oldest = every - every % most
    if (freed[oldest[lower]] < taken[lower]).any() or (freed[: count - most] > taken[most:]).any():
        return None
    return (every % most).astype(np.int32)


def _lowest_free(taken: NDArray[np.intp], freed: NDArray[np.intp], never: int) -> NDArray[np.int32]:
    slots = np.full(len(taken), -1, np.int32)
    at, gone = np.full(never, -1), np.full(never, -1)  # by place, the microbatch that is taken, freed
    there = np.flatnonzero(taken < never)
    at[taken[there]] = there
    ends = there[freed[there] < never]
    gone[freed[ends]] = ends
    free: list[int] = []
    used = 0
    for arrives, leaves in zip(at.tolist(), gone.tolist(), strict=True):
        if arrives >= 0:
            if not free:
                heapq.heappush(free, used)
                used += 1
            slots[arrives] = heapq.heappop(free)
        if leaves >= 0:
            heapq.heappush(free, int(slots[leaves]))
    return slots


def check_hazards(row: Row, stage: Stage) -> None:
    """Refuses rows in which a gradient would be received over an activation that is not sent yet."""
    mine = row.of_one(stage)
    receives = np.flatnonzero(mine.op == RECV_B)
    for place in receives[_first(mine, SEND_F)[mine.microbatch[receives]] > receives][:1]:
        raise PlanError(
            f"stage {stage}, action {place}, {mine[place]}: its gradient would be received over an activation that is "
            "not sent yet"
        )


def sent_at_once(row: Row, stage: Stage) -> bool:
    """Whether a stage sends every gradient before it makes the next: one place then serves all microbatches."""
    mine = row.of_one(stage)
    makes = np.flatnonzero((mine.op == B) | (mine.op == I))
    sent = _first(mine, SEND_B)[mine.microbatch[makes[:-1]]]
    return bool(((sent > makes[:-1]) & (sent < makes[1:])).all())


def _first(row: Row, op: int) -> NDArray[np.intp]:
    """By microbatch, where an operation is in a row of one stage; else its length."""
    places = np.flatnonzero(row.op == op)
    count = 1 + int(row.microbatch.max(initial=-1))
    return first_of_each(row.microbatch[places].astype(np.int64), places, count, len(row))
