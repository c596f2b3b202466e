"""A head that positions share, as the planner counts it: where its parts are, what they take, keep and hold.

The same as the compiler does (``plan/head_rows.py``, ``plan/arena.py``), but for the microbatches that are held: it
counts the most that the compiler may choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.plan.head_rows import AHEAD, HELD, HeadParts
from trainer.plan.layout import split_with
from trainer.plan.schedules import pipeline_for
from trainer.planner.costs import ModelCosts
from trainer.planner.layouts import Arrangement
from trainer.planner.pipelines import Filled
from trainer.planner.times import Parts
from trainer.spec_how import SHARES_HEAD


def choices(a: Arrangement) -> list[Arrangement]:
    """A layout with its head at one position, and shared by 2, 4, ... of them where its schedule allows it."""
    most = min(a.blocks, a.positions) if a.schedule in SHARES_HEAD and not a.foreign else 1
    return [replace(a, head=1 << n) for n in range(most.bit_length())]


def head_positions(a: Arrangement) -> tuple[int, ...]:
    """The positions of the parts, the last stage's first."""
    return HeadParts.of(a.head, pipeline_for(a.schedule, a.stages, a.positions)).positions


def split(a: Arrangement, layers: int, head: int) -> tuple[int, ...]:
    """Layers of each stage; ``head``: its cost, of a layer 1,000."""
    of_stage, there = pipeline_for(a.schedule, a.stages, a.positions).of_stage, set(head_positions(a))
    extras = [head // a.head // a.chunks if position in there else 0 for position in of_stage]
    return tuple(len(part) for part in split_with([1000] * layers, extras))


def with_parts_of(a: Arrangement, stages: Sequence[Parts], head: Parts) -> list[Parts]:
    """Seconds of the stages, each with what its position's part takes: a share of it for each of its stages."""
    of_stage, there = pipeline_for(a.schedule, a.stages, a.positions).of_stage, set(head_positions(a))
    part = head * (1 / a.head / a.chunks)
    return [stage + part if p in there else stage for stage, p in zip(stages, of_stage, strict=True)]


def filled_with(a: Arrangement, filled: Filled, head: Parts, hop: float) -> Filled:
    """A pipeline whose parts were counted as stages' own work: those do not wait for one another to begin and to end,
    and of the last stage's B two rounds of messages are not covered at the end."""
    part = head.whole / a.head
    return replace(filled, seconds=max(filled.busiest, filled.seconds + (3 - a.head) * part + 2 * hop))


def weights(a: Arrangement, c: ModelCosts, position: int, owner: int, buffered: float) -> tuple[float, float]:
    """Bytes that a position has beside its tensors' own: of weights, and of gradients with ``buffered`` buffers."""
    share, mine = c.matrix / a.head, position in head_positions(a)
    copy = share * c.dt_bytes if mine and position != owner else 0.0
    gradients = 4 * share * buffered * mine
    if position == owner:
        gradients += 4 * share * (a.head - mine)
        gradients -= 0 if c.tied else 4 * c.matrix * (buffered - 1)  # nobody adds to it there
    return copy, gradients


def activations(a: Arrangement, c: ModelCosts, position: int, last: int, slot: float, ahead: float) -> float:
    """Bytes of the slots of a position, and of what comes to the last stage; ``slot`` of its stages, ``ahead`` held."""
    ahead = min(ahead + max(AHEAD), a.microbatches)
    if position not in head_positions(a):
        return ahead * slot
    stream, numbers = c.rows * c.width, 4 * c.rows
    part = numbers * (c.sizes.model.vocab / a.head + 3 * a.head + c.width + a.blocks / a.head)
    if position == last:
        return ahead * (slot + part) + 4 * (a.head - 1) * stream
    return (ahead + min(HELD - 1, a.microbatches)) * max(slot, part + stream * c.dt_bytes)
