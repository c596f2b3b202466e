"""Schedules as data: what is computed at a position, in which order. Owns the generators, those whose backward has two
parts in ``zero_bubble.py``.

A schedule is one row of actions a position, which the position's rank of every replica follows. An action is (stage,
operation, microbatch), and its text is that of PyTorch's pipelining (where a row is called a rank): ``2F0`` is stage
2's forward of microbatch 0, ``3SEND_F1`` sends stage 3's output of microbatch 1 to stage 4, ``2RECV_B4`` receives from
stage 3 the gradient of stage 2's output for microbatch 4.

Generators give compute-only rows; ``messages.insert_messages`` adds the messages. Nothing here knows a model, a buffer
or a channel.

Invariant of every generator: on a stage, backward passes (``B``, ``I``, ``W``) ascend in the microbatch. The sum of a
weight's gradient over microbatches therefore has one order, whatever the schedule, and equal bits follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from trainer.errors import PlanError
from trainer.plan.places import Pipeline, Position, Stage
from trainer.plan.rows import RECV_F, B, F, I, Row, Rows, W, columns
from trainer.plan.zero_bubble import Times, v_half, zb_h1, zb_v
from trainer.spec_how import ONE_STAGE, THERE_AND_BACK


def _sizes(stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise PlanError(
            f"a schedule needs at least 1 stage and 1 microbatch, got {stages} stages and {microbatches} microbatches"
        )


def gpipe(stages: int, microbatches: int) -> list[Row]:
    """All forwards, then all backwards, both ascending. In flight on every stage: all microbatches.

    >>> [str(a) for a in gpipe(2, 2)[1]]
    ['1F0', '1F1', '1B0', '1B1']
    """
    _sizes(stages, microbatches)
    op = np.repeat(np.array([F, B], np.uint8), microbatches)
    microbatch = np.tile(np.arange(microbatches, dtype=np.int32), 2)
    return [Row.of_stage(Stage(stage), op, microbatch) for stage in range(stages)]


def one_f_one_b(stages: int, microbatches: int) -> list[Row]:
    """Stage s runs P - s - 1 forwards to warm up, then one forward and one backward in turn, then the backwards left.

    In flight on stage s: min(P - s, M) microbatches.

    >>> [str(a) for a in one_f_one_b(2, 3)[0]]
    ['0F0', '0F1', '0B0', '0F2', '0B1', '0B2']
    """
    _sizes(stages, microbatches)
    every = np.arange(microbatches, dtype=np.int32)
    rows: list[Row] = []
    for stage in range(stages):
        warm = min(stages - stage - 1, microbatches)
        end = 2 * microbatches - warm  # of the turns
        op, microbatch = np.empty(2 * microbatches, np.uint8), np.empty(2 * microbatches, np.int32)
        for places, what, which in (
            (slice(warm), F, every[:warm]),
            (slice(warm, end, 2), F, every[warm:]),
            (slice(warm + 1, end, 2), B, every[: microbatches - warm]),
            (slice(end, None), B, every[microbatches - warm :]),
        ):
            op[places], microbatch[places] = what, which
        rows.append(Row.of_stage(Stage(stage), op, microbatch))
    return rows


def interleaved(positions: int, chunks: int, microbatches: int) -> list[Row]:
    """1F1B with several stages a position, in turn (position p has the stages p, p + P, …): a smaller bubble.

    The microbatches go in rounds of about P: a position does a round's forwards of its first stage, then of its next,
    and so on; the backwards likewise from its last. Position p runs (chunks - 1) rounds and 2 (P - p - 1) forwards to
    warm up, then one forward and one backward in turn. Rounds are equal: M is below 2 P, or a multiple of M // P.

    >>> [str(a) for a in interleaved(2, 2, 2)[1]]
    ['1F0', '1F1', '3F0', '3B0', '3F1', '3B1', '1B0', '1B1']
    """
    _sizes(positions * chunks, microbatches)
    rounds = max(1, microbatches // positions)
    if microbatches % rounds:
        less = max(m for m in range(1, microbatches) if not m % max(1, m // positions))
        more = min(m for m in range(microbatches, 2 * microbatches + positions) if not m % max(1, m // positions))
        raise PlanError(
            f"schedule interleaved-1f1b: {microbatches} microbatches on {positions} positions make {rounds} rounds "
            f"that are not equal; take {less} or {more} microbatches (train.batch / train.microbatch / "
            "parallel.replicas), or 1f1b or gpipe"
        )
    each, total = microbatches // rounds, chunks * microbatches
    step = np.arange(total, dtype=np.int32)
    turn, microbatch = step // each % chunks, step // (each * chunks) * each + step % each
    rows: list[Row] = []
    for position in range(positions):
        warm = min((chunks - 1) * each + 2 * (positions - position - 1), total)
        end = 2 * total - warm  # of the turns
        op, stage, which = np.empty(2 * total, np.uint8), np.empty(2 * total, np.int32), np.empty(2 * total, np.int32)
        forward, backward = position + positions * turn, position + positions * (chunks - 1 - turn)
        for places, what, whose, part in (
            (slice(warm), F, forward, slice(warm)),
            (slice(warm, end, 2), F, forward, slice(warm, None)),
            (slice(warm + 1, end, 2), B, backward, slice(total - warm)),
            (slice(end, None), B, backward, slice(total - warm, None)),
        ):
            op[places], stage[places], which[places] = what, whose[part], microbatch[part]
        rows.append(Row(op, stage, which))
    return rows


GENERATORS = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""By the name that a spec uses: a position has one stage, in the stages' order, and does its backward whole."""

ZERO_BUBBLE = {"zb-h1": zb_h1, "zb-v": zb_v, "v-half": v_half}
"""By the name that a spec uses: the backward has two parts. ``THERE_AND_BACK`` take two stages a position."""

TIMED = ("v-half",)
"""Schedules whose order depends on what F, I and W of the stages last."""


def pipeline_for(name: str, stages: int, positions: int) -> Pipeline:
    """Where a spec's stages are under a schedule that it names."""
    return (Pipeline.there_and_back if name in THERE_AND_BACK else Pipeline.in_turn)(stages, positions)


def rows_for(name: str, pipeline: Pipeline, microbatches: int, times: Times | None = None) -> list[Row]:
    """What is computed, by position: the schedule that a spec names, for stages that are where ``pipeline`` says.

    ``times``: what F, I and W of each stage last; for ``TIMED``, which are made for them."""
    most = max(map(len, pipeline.chunks))
    _sizes(pipeline.stages, microbatches)
    if name in THERE_AND_BACK:
        if pipeline != Pipeline.there_and_back(2 * pipeline.positions, pipeline.positions):
            raise PlanError(
                f"schedule {name}: {pipeline.stages} stages are placed at {pipeline.positions} positions as "
                f"{list(pipeline.of_stage)}; it takes two at each, there and back: set parallel.chunks = 2 and "
                f"parallel.stages = {2 * pipeline.positions}"
            )
        if name in TIMED:
            return v_half(pipeline.positions, microbatches, times)
        return ZERO_BUBBLE[name](pipeline.positions, microbatches)
    if name == "interleaved-1f1b":
        if pipeline != Pipeline.in_turn(pipeline.stages, pipeline.positions) or pipeline.stages % pipeline.positions:
            raise PlanError(
                f"schedule interleaved-1f1b: {pipeline.stages} stages are placed at {pipeline.positions} positions as "
                f"{list(pipeline.of_stage)}; it takes them in turn, as many at each: make parallel.stages a multiple "
                "of parallel.chunks"
            )
        return interleaved(pipeline.positions, most, microbatches)
    if name in ONE_STAGE and most > 1:
        raise PlanError(
            f"schedule {name} takes 1 stage a position, parallel.chunks is {most}; take {ONE_STAGE[name]}, or "
            "chunks = 1"
        )
    by_stage = {**GENERATORS, **ZERO_BUBBLE}[name](pipeline.stages, microbatches)
    if most == 1:
        return [by_stage[stage] for (stage,) in pipeline.chunks]
    return [_one_after_another(by_stage, stages, microbatches) for stages in pipeline.chunks]


def _one_after_another(by_stage: Sequence[Row], stages: Sequence[Stage], microbatches: int) -> Row:
    """GPipe with several stages a position: forwards stage by stage, then the backwards from the last stage back."""
    half = slice(microbatches), slice(microbatches, None)
    parts = [by_stage[s].take(half[0]) for s in stages] + [by_stage[s].take(half[1]) for s in reversed(stages)]
    return Row(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("op", "stage", "microbatch")))


class Say(Protocol):
    """Names a position's row, or a place in it, to people."""

    def __call__(self, position: Position, place: int | None = None) -> str: ...


def in_words(position: Position, place: int | None = None) -> str:
    """A place in a schedule that has no file."""
    return f"position {position}" if place is None else f"position {position}, action {place}"


def stage_positions(rows: Rows, say: Say | None = None) -> dict[Stage, Position]:
    """Which stage is at which position, by the rows' own account. PlanError where a stage is at two of them."""
    positions: dict[Stage, Position] = {}
    for number, row in enumerate(columns(rows)):
        position, (names, firsts) = Position(number), row.stages()
        for place, stage in sorted(zip(firsts.tolist(), names.tolist(), strict=True)):
            if positions.setdefault(stage, position) != position:
                where = f"position {position}" if say is None else say(position, place)
                raise PlanError(
                    f"{where}, {row[place]}: stage {stage} already runs at position {positions[stage]}; "
                    "a stage has one position"
                )
    return positions


def in_flight(rows: Rows) -> list[int]:
    """For every stage, in order, the most microbatches whose activations it holds at once.

    A microbatch is held from its ``RECV_F`` (else its ``F``) to its ``B`` or ``W``, whichever ends it.

    >>> in_flight(one_f_one_b(4, 8))
    [4, 3, 2, 1]
    """
    peak: dict[int, int] = {}
    for row in columns(rows):
        names, local = row.by_stage()
        for number, stage in enumerate(names.tolist()):
            mine = row.take(np.flatnonzero(local == number))
            peak[stage] = _most_held(mine)
    return [peak.get(stage, 0) for stage in range(max(peak, default=-1) + 1)]


def held_at_once(rows: Rows) -> list[int]:
    """At every position, the most activations of a stage and microbatch that it holds at once.

    >>> held_at_once(zb_v(4, 8))
    [8, 8, 8, 8]
    """
    held = []
    for row in columns(rows):
        _, local = row.by_stage()
        each = 1 + int(row.microbatch.max(initial=-1))
        held.append(_most_held(Row.of_stage(Stage(0), row.op, (local * each + row.microbatch).astype(np.int32))))
    return held


def _most_held(row: Row) -> int:
    """The most microbatches that a row of one stage holds at once."""
    names, microbatch = np.unique(row.microbatch, return_inverse=True)
    taken, freed = np.full(len(names), len(row)), np.full(len(names), len(row))
    takes = np.flatnonzero((row.op == RECV_F) | (row.op == F))
    frees = np.flatnonzero((row.op == B) | (row.op == I) | (row.op == W))
    taken[microbatch[takes[::-1]]] = takes[::-1]  # the first of each stays
    freed[microbatch[frees]] = frees  # the last of each stays
    change = np.zeros(len(row) + 1, np.int64)
    change[taken] += 1  # no place takes two
    change[freed[taken < freed]] -= 1
    return int(change[:-1].cumsum().max(initial=0))
