"""Slots of activations: which microbatch lies in which, and whether a message's memory is free when it is written."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.expand import StagePrograms
from trainer.plan.rows import RECV_B, SEND_B, SEND_F, B, Row, W
from trainer.plan.rules import first_of_each


def assign_slots(row: Row) -> tuple[int, NDArray[np.int32]]:
    """How many slots a row of one stage needs, and which each microbatch takes: the lowest that is free.

    A slot is taken when the activation is received (on the first stage: at F) and free after the last of B and SEND_B.
    """
    count, never = 1 + int(row.microbatch.max(initial=-1)), len(row)
    taken = first_of_each(row.microbatch.astype(np.int64), np.arange(never), count, never)
    places = np.flatnonzero((row.op == B) | (row.op == W) | (row.op == SEND_B))
    freed = np.full(count, never)
    freed[row.microbatch[places]] = places  # the last of each stays
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


def check_hazards(row: Row, stage: StagePrograms) -> None:
    """Refuses rows of one stage in which a message's memory would be written before the message is gone."""
    count, never = 1 + int(row.microbatch.max(initial=-1)), len(row)
    marks: list[tuple[int, str]] = []

    def first(op: int) -> NDArray[np.intp]:
        places = np.flatnonzero(row.op == op)
        return first_of_each(row.microbatch[places].astype(np.int64), places, count, never)

    receives = np.flatnonzero(row.op == RECV_B)
    for place in receives[first(SEND_F)[row.microbatch[receives]] > receives][:1]:
        marks.append((int(place), "its gradient would be received over an activation that is not sent yet"))
    if stage.gradient_sent is not None and stage.gradient_sent.buffer not in stage.kept:  # one for all microbatches
        makes = np.flatnonzero(row.op == B)
        sent = first(SEND_B)[row.microbatch[makes[:-1]]]
        for late in np.flatnonzero((sent < makes[:-1]) | (sent > makes[1:]))[:1]:
            owed = row.microbatch[makes[late]]
            marks.append((int(makes[late + 1]), f"the gradient of microbatch {owed} is not sent yet"))
    if marks:
        place, text = min(marks)
        raise PlanError(f"stage {stage.index}, action {place}, {row[place]}: {text}")
