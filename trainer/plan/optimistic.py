"""The optimizer step that does not refill the bubble: which part of a step may run before the step before is checked.

A checked step ends with a barrier: every position reports, position 0 decides (learning rate, clipping, whether all is
finite), every position waits for its word before AdamW, and the next step starts with all positions at once. An
optimistic one foresees that nothing is clipped, which is nearly always so: after its report a position makes the
weights' copies that AdamW will leave then (kernel ``adamw_copy``: the state itself stays), and runs the *prefix* of the
next step on them. Only then it takes the decision and runs AdamW, as a checked step does. Where the decision clips,
AdamW leaves other copies, and the prefix runs again.

What a prefix holds, by position: forwards and their messages, up to the first action that adds to a gradient or waits
for one. It is closed under messages: both ends of a message are in it, or neither. So a prefix that runs again repeats
the same messages at both ends, and between a step's prefix and the rest no message is on its way. Of all such cuts one
is the largest (the larger of two at each position is one too), which is taken.

A report leaves as soon as that cannot block anybody: after those actions of the prefix that position 0 needs for its
own. Under rendezvous an earlier send would wait for position 0, which waits for them.

Pure; rows of schedules with their messages in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.plan.places import Pipeline, Position
from trainer.plan.rows import RECV_F, SEND_F, F, Row


@dataclass(frozen=True, slots=True)
class Cut:
    """Of a position's row: ``prefix`` actions are the prefix, and its report leaves after ``report`` of them."""

    prefix: int
    report: int


@dataclass(frozen=True, slots=True)
class _Edge:
    """Forwards from a position to another: where its sends stand in one row, and their receives in the other."""

    source: Position
    target: Position
    sends: NDArray[np.intp]
    receives: NDArray[np.intp]

    def passed(self, ends: Sequence[int]) -> tuple[int, int]:
        """How many of its sends and of its receives stand before ``ends``."""
        return (
            int(np.searchsorted(self.sends, ends[self.source])),
            int(np.searchsorted(self.receives, ends[self.target])),
        )


def cuts(rows: Sequence[Row], pipeline: Pipeline, decides: Position) -> list[Cut]:
    """By position. ``decides``: the position that takes the reports.

    >>> from trainer.plan.messages import insert_messages
    >>> from trainer.plan.schedules import gpipe
    >>> cuts(insert_messages(gpipe(2, 3), 2), Pipeline.in_turn(2, 2), Position(0))
    [Cut(prefix=6, report=0), Cut(prefix=6, report=5)]
    """
    most = [_forwards(row) for row in rows]
    edges = _edges(rows, pipeline, most)
    prefix = _closed(edges, most)
    return [Cut(p, r) for p, r in zip(prefix, _needed(edges, prefix, decides), strict=True)]


def _forwards(row: Row) -> int:
    """The actions that lead a row and touch no gradient."""
    others = np.flatnonzero((row.op != F) & (row.op != SEND_F) & (row.op != RECV_F))
    return int(others[0]) if len(others) else len(row)


def _edges(rows: Sequence[Row], pipeline: Pipeline, most: Sequence[int]) -> list[_Edge]:
    """Those of the leading forwards. Messages from a position to another are in one order at both."""
    of_stage = pipeline.column
    sends: dict[tuple[int, int], NDArray[np.intp]] = {}
    receives: dict[tuple[int, int], NDArray[np.intp]] = {}
    for position, (row, end) in enumerate(zip(rows, most, strict=True)):
        op, stage = row.op[:end], row.stage[:end]
        for what, step, found in ((SEND_F, 1, sends), (RECV_F, -1, receives)):
            places = np.flatnonzero(op == what)
            others = of_stage[stage[places] + step]
            for other in np.unique(others).tolist():
                edge = (position, other) if step > 0 else (other, position)
                found[edge] = places[others == other]
    none = np.zeros(0, np.intp)
    return [
        _Edge(Position(a), Position(b), sends.get((a, b), none), receives.get((a, b), none))
        for a, b in sorted(sends.keys() | receives.keys())
    ]


def _closed(edges: Sequence[_Edge], most: Sequence[int]) -> list[int]:
    """The largest ends, none beyond ``most``, between which no message has one end alone."""
    ends, touching = list(most), _touching(edges, len(most))
    left = deque(edges)
    while left:
        edge = left.popleft()
        sent, received = edge.passed(ends)
        if sent == received:
            continue
        cut, places, both = (
            (edge.source, edge.sends, received) if sent > received else (edge.target, edge.receives, sent)
        )
        ends[cut] = int(places[both])
        left.extend(touching[cut])
    return ends


def _needed(edges: Sequence[_Edge], prefix: Sequence[int], whose: Position) -> list[int]:
    """How far each position has to come, so that ``whose`` prefix can end under rendezvous."""
    ends, touching = [0] * len(prefix), _touching(edges, len(prefix))
    ends[whose] = prefix[whose]
    left = deque(touching[whose])
    while left:
        edge = left.popleft()
        sent, received = edge.passed(ends)
        if sent == received:
            continue
        late, places, both = (
            (edge.source, edge.sends, received) if sent < received else (edge.target, edge.receives, sent)
        )
        ends[late] = int(places[both - 1]) + 1
        left.extend(touching[late])
    ends[whose] = 0
    return ends


def _touching(edges: Sequence[_Edge], positions: int) -> list[list[_Edge]]:
    out: list[list[_Edge]] = [[] for _ in range(positions)]
    for edge in edges:
        out[edge.source].append(edge)
        out[edge.target].append(edge)
    return out
