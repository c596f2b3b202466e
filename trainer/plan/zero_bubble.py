"""Schedules whose backward has two parts: the input gradient (I), which the stage below waits for, and the weight
gradient (W), for which nobody waits and which therefore fills what would be idle. Owns three generators; pure.

    zb-h1   one stage a position; memory of 1F1B's first stage at every position (Qi et al. 2024, arXiv 2401.10241)
    zb-v    two stages a position, placed there and back (a V); the same memory, no bubble where F, I and W last alike
    v-half  the same places; half of that memory, half of 1F1B's bubble (Qi et al. 2024, arXiv 2405.15362)

Each action is given a time of one pattern, and a row is its actions by time. On a stage, F, I and W ascend in the
microbatch. Where every I of a stage is directly followed by its own W and no stage waits for the gradient, both are B.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from trainer.plan.places import Stage
from trainer.plan.rows import B, F, I, Row, W

Parts = list[tuple[int, int, NDArray[np.integer], NDArray[np.integer]]]
"""Of a row: operation, stage, microbatches, and when each runs (any numbers that order them)."""

Times = Sequence[tuple[int, int, int]]
"""By stage, what F, I and W last, in some unit."""


def zb_h1(stages: int, microbatches: int) -> list[Row]:
    """1F1B, but W of stage s stays s microbatches behind I, so that gradients go down sooner and W fills the end.

    Stage s runs min(P - s, M) forwards to warm up, then I, W (once there is one s behind) and F in turn. From F to W it
    holds min(P, M) microbatches. With M >= P and stages alike a step takes M (F + I + W) + (P - 1) (F + I - W), where W
    is not longer than F nor I.

    >>> [str(a) for a in zb_h1(2, 3)[1]]
    ['1F0', '1I0', '1F1', '1I1', '1W0', '1F2', '1I2', '1W1', '1W2']
    >>> [str(a) for a in zb_h1(2, 3)[0]]
    ['0F0', '0F1', '0B0', '0F2', '0B1', '0B2']
    """
    every = np.arange(microbatches)
    rows = []
    for stage in range(stages):
        warm = min(stages - stage, microbatches)
        forward = np.where(every < warm, every - warm, 3 * (every - warm) + 2)
        rows.append(
            _row([(F, stage, every, forward), (I, stage, every, 3 * every), (W, stage, every, 3 * (every + stage) + 1)])
        )
    return rows


def zb_v(positions: int, microbatches: int) -> list[Row]:
    """Position p has stages p and 2P - 1 - p, and holds at most 2P of their microbatches: as much as 1F1B's first.

    Forwards of the lower stage until the upper one has something to do; pairs of forwards until its backward has; then
    F, I, W of both in turn. The last I of a position are ahead of their W by as many as it has positions below it, and
    these W fill its end: with M >= 2P - 1 and F, I, W alike no position is ever idle between its first and last action.

    >>> [str(a) for a in zb_v(1, 2)[0]]
    ['0F0', '1F0', '1I0', '1W0', '0F1', '0B0', '1F1', '1I1', '1W1', '0B1']
    """
    pipe = positions
    total = max(microbatches, 2 * pipe - 1)  # the pattern of fewer is that of these, cut off
    rows = []
    for here in range(positions):
        low, high = here, 2 * pipe - 1 - here
        first, turns, left = 2 * (pipe - here) - 1, total - pipe, pipe - here
        pairs, n, k, more = np.arange(here), np.arange(left), np.arange(turns), np.arange(pipe)
        at = np.cumsum([0, first, 2 * here, 3 * left, 6 * turns, 2 * here, 2 * left, here])
        parts: Parts = [
            (F, low, np.arange(first), np.arange(first)),
            (F, high, pairs, at[1] + 2 * pairs),
            (F, low, first + pairs, at[1] + 2 * pairs + 1),
            *((op, high, n + (here if op == F else 0), at[2] + 3 * n + turn) for turn, op in enumerate((F, I, W))),
            (F, low, first + here + k, at[3] + 6 * k),
            *((op, low, k, at[3] + 6 * k + turn) for turn, op in ((1, I), (2, W))),
            (F, high, pipe + k, at[3] + 6 * k + 3),
            *((op, high, left + k, at[3] + 6 * k + turn) for turn, op in ((4, I), (5, W))),
            (I, low, turns + pairs, at[4] + 2 * pairs),
            (I, high, left + turns + pairs, at[4] + 2 * pairs + 1),
            (I, low, turns + here + n, at[5] + 2 * n),
            (W, low, turns + more, np.where(more < left, at[5] + 2 * more + 1, at[7] + more)),
            (W, high, left + turns + pairs, at[6] + pairs),
        ]
        rows.append(_row(parts, microbatches))
    return rows


def v_half(positions: int, microbatches: int, times: Times | None = None) -> list[Row]:
    """Placed as ``zb_v``, with half as many microbatches held at once (P + 2 at most, P + 1 where P is odd).

    A microbatch's forward goes down the V by 2 a position and back by 1, its backward likewise, and every 6 the next
    one starts: in these times F and I of a position never meet, and two places of 6 are left for W. The beginning and
    the end of that have gaps, so it is played: a position does, of what is left of its row, the first that can run and
    that leaves room for all that the row still has before it, but W where nothing else can. The bubble of a step is
    then 3 P - 5 of 6 M + 3 P - 5 where F, I and W last alike (3 P - 4 where P is odd); 1F1B's, 6 (P - 1).

    ``times``: what they last, by stage; None: alike. With half of the memory a row has little slack, and an order that
    is made for other times has ranks wait for one another in every microbatch.

    >>> [str(a) for a in v_half(1, 2)[0]]
    ['0F0', '1F0', '1I0', '0I0', '1W0', '0F1', '0W0', '1F1', '1I1', '0I1', '1W1', '0W1']
    """
    return _Squeeze(positions, microbatches, times).rows()


class _Squeeze:
    """Plays the pattern of ``v_half``: whatever can run early does, within the pattern's memory.

    It comes to its end: of all that is left, what the pattern has first has all that it needs, stands first in its row,
    and has its memory. A W that runs early only frees memory.
    """

    def __init__(self, positions: int, microbatches: int, times: Times | None) -> None:
        self.positions, self.stages = positions, 2 * positions
        self.times = [(1, 1, 1)] * self.stages if times is None else times
        self.queues = [self._pattern(here, microbatches) for here in range(positions)]
        self.change = {F: 1, I: 0, W: -1}
        peaks = [max(self._held(queue)) for queue in self.queues]
        self.bound = max(peaks)
        self.done = np.full((2, self.stages, microbatches), -1)  # F and I: since when they are there
        self.held = [0] * positions

    def _pattern(self, here: int, microbatches: int) -> list[tuple[int, int, int]]:
        """A position's actions by the pattern's times; W in the first gaps after their I."""
        pipe, low, high = self.positions, here, self.stages - 1 - here
        late = 0 if pipe % 2 else 3  # else F and I of the two stages would meet
        starts = (
            (F, low, 2 * here),
            (F, high, 3 * pipe - here - 2),
            (I, high, 3 * pipe + late + 2 * here - 1),
            (I, low, 6 * pipe + late - here - 2),
        )
        at = {start + 6 * m: (op, stage, m) for op, stage, start in starts for m in range(microbatches)}
        queue: list[tuple[int, int, int]] = []
        waiting: list[tuple[int, int, int]] = []
        for time in range(max(at) + 1):
            if time in at:
                action = at[time]
                queue.append(action)
                if action[0] == I:
                    waiting.append((W, *action[1:]))
            elif waiting:
                queue.append(waiting.pop(0))
        return queue + waiting

    def _held(self, queue: list[tuple[int, int, int]]) -> list[int]:
        return np.cumsum([self.change[op] for op, _, _ in queue]).tolist()  # type: ignore[no-any-return]

    def _ready(self, action: tuple[int, int, int], now: int) -> bool:
        op, stage, m = action
        if op == W:
            return bool(0 <= self.done[1, stage, m] <= now)
        needs = [(0, stage - 1)] if op == F and stage else []
        if op == I:
            needs = [(0, stage), *([(1, stage + 1)] if stage + 1 < self.stages else [])]
        return all(0 <= self.done[half, other, m] <= now for half, other in needs)

    def _next(self, here: int, now: int) -> int | None:
        """What a position does now, by its place in what is left of its row. W where nothing else can run."""
        most, held = self.held[here], self.held[here]  # in the row up to a place
        passed, weights = set(), None  # F, I and W of a stage keep their order
        for place, action in enumerate(self.queues[here]):
            op, stage, _ = action
            room = op != F or place == 0 or most + 1 <= self.bound
            if room and (op, stage) not in passed and self._ready(action, now):
                if op != W:
                    return place
                weights = place if weights is None else weights
            passed.add((op, stage))
            if len(passed) == 6:
                break
            held += self.change[op]
            most = max(most, held)
        return weights

    def rows(self) -> list[Row]:
        """The rows as they were played. A position looks again when it is done, or something comes for it."""
        pipe = self.positions
        rows: list[list[tuple[int, int, int]]] = [[] for _ in range(pipe)]
        clocks = [0] * pipe
        events = [(0, here) for here in range(pipe)]
        while events:
            now, looks = events[0][0], set()
            while events and events[0][0] == now:
                looks.add(heappop(events)[1])
            for here in sorted(looks):
                place = self._next(here, now) if clocks[here] <= now else None
                if place is None:
                    continue
                op, stage, m = action = self.queues[here].pop(place)
                rows[here].append(action)
                self.held[here] += self.change[op]
                clocks[here] = end = now + self.times[stage][(F, I, W).index(op)]
                heappush(events, (end, here))
                if op != W:
                    self.done[0 if op == F else 1, stage, m] = end
                    to = min(max(stage + (1 if op == F else -1), 0), self.stages - 1)
                    heappush(events, (end, min(to, self.stages - 1 - to)))
        return [_merged(Row(*_columns(row))) for row in rows]


def _columns(row: list[tuple[int, int, int]]) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]:
    op, stage, microbatch = zip(*row, strict=True)
    return np.array(op, np.uint8), np.array(stage, np.int32), np.array(microbatch, np.int32)


def _row(parts: Parts, microbatches: int | None = None) -> Row:
    """The actions by time; those of microbatches beyond the last left out."""
    sizes = [len(which) for _, _, which, _ in parts]
    op = np.repeat(np.array([part[0] for part in parts], np.uint8), sizes)
    stage = np.repeat(np.array([part[1] for part in parts], np.int32), sizes)
    microbatch = np.concatenate([part[2] for part in parts]).astype(np.int32)
    order = np.argsort(np.concatenate([part[3] for part in parts]), kind="stable")
    if microbatches is not None:
        order = order[microbatch[order] < microbatches]
    alone = len({part[1] for part in parts}) == 1
    row = Row(op[order], stage[order], microbatch[order])
    return _merged(Row.of_stage(Stage(parts[0][1]), row.op, row.microbatch) if alone else row)


def _merged(row: Row) -> Row:
    """B for I and W of stage 0, for whose gradient nobody waits, where each W directly follows its I."""
    places = np.flatnonzero((row.op == I) & (row.stage == 0))
    after = np.minimum(places + 1, len(row) - 1)
    own = (row.op[after] == W) & (row.stage[after] == 0) & (row.microbatch[after] == row.microbatch[places])
    if not len(places) or not own.all():
        return row
    op = row.op.copy()
    op[places] = B
    left = np.ones(len(row), np.bool_)
    left[after] = False
    return Row(op, row.stage, row.microbatch).take(left)
