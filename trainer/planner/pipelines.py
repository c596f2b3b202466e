"""A pipeline's step in closed form, and the same played out instruction by instruction.

The formulas are the literature's (arXiv 2104.04473 for interleaved 1F1B, 2401.10241 for zero bubble, 2405.15362 for V
shapes; docs/planner.md has them with what the simulator says), for positions that take unlike times: the slowest works
without a pause, what the others take once is filling and emptying. ``play_out`` is exact: the engine's own
generators, with messages, timed by ``plan/simulate.py``; the planner plays what it proposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import PlanError
from trainer.plan.places import Pipeline
from trainer.plan.rows import OPS, B, F, I, Row, W, columns
from trainer.plan.schedules import pipeline_for, rows_for
from trainer.plan.simulate import CostModel, Instruction, InstructionList, Simulation, simulate
from trainer.planner.times import Parts
from trainer.spec_how import THERE_AND_BACK

MAX_PLAYED = 400_000
"""Computations that are played out; longer steps are played with fewer microbatches and carried on."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A step of a pipeline, without what follows it."""

    seconds: float
    busiest: float
    """Of which the slowest position computes."""
    mean: float
    """Of which a position computes, on average."""


def closed(schedule: str, microbatches: int, stages: Sequence[Parts], positions: Sequence[Parts], hop: float) -> Filled:
    """Seconds of all microbatches. What each stage takes for one, and each position with all its chunks; ``hop``: of
    a message to a neighbour.

    >>> one = [Parts(1.0, 1.0, 1.0)] * 4
    >>> [closed(name, 8, one, one, 0.0).seconds for name in ("1f1b", "zb-h1")]  # (M + P - 1) 3, 3 M + (P - 1)
    [33.0, 27.0]
    """
    p, m = len(positions), microbatches
    v = len(stages) // p
    works = [part.whole for part in positions]
    most, total = max(works), sum(works)
    others = total - most
    fill = 2 * (p - 1) * hop
    if schedule in ("1f1b", "zb-h1"):  # nothing is in flight that could cover a message there and back
        fill += 2 * max(0, m - 3) * hop
    slow = positions[works.index(most)]
    if schedule in ("gpipe", "1f1b"):
        seconds = m * most + others
    elif schedule == "interleaved-1f1b":
        # chunk after chunk all positions work on stages of one turn, at the pace of the slowest of them
        pace = sum(max(part.whole for part in stages[turn * p : turn * p + p]) for turn in range(v))
        seconds = max(m, p) * pace + (min(m, p) - 1) * others / max(1, p - 1) / v
        if m <= p or m % p == 0:  # a microbatch is wanted for its next chunk just when it comes
            fill = 2 * p * v * hop
    elif schedule == "zb-h1":
        passing = sum(part.f + part.i for part in positions) - slow.f - slow.i
        seconds = m * (slow.f + slow.i) + passing + max(1, m - p + 1) * slow.w
    elif schedule in THERE_AND_BACK:
        if schedule == "zb-v":  # no bubble where F = I = W and M is twice the positions; else what cannot be closed
            uneven = abs(slow.f - slow.i) + abs(slow.i - slow.w)
            seconds = m * most + 1.8 * (p - 1) * uneven + 0.45 * slow.f * max(0, 2 * p - m)
        else:
            seconds = m * most + 0.65 * (p - 1) * total / p
        fill *= 2
    else:
        raise PlanError(f"there is no formula for schedule {schedule!r}")
    return Filled(max(seconds, m * most) + (fill if p > 1 else 0.0), m * most, m * total / p)


def held(schedule: str, chunks: int, microbatches: int, positions: int, position: int) -> float:
    """Microbatches whose activations a position holds at once, each of all its layers.

    >>> [held("1f1b", 1, 8, 4, position) for position in range(4)]
    [4.0, 3.0, 2.0, 1.0]
    """
    p, m, v = positions, microbatches, chunks
    if schedule == "gpipe":
        most = float(m)
    elif schedule == "1f1b":
        most = float(p - position)
    elif schedule == "interleaved-1f1b":
        each = m // max(1, m // p)
        most = min(v * m, (v - 1) * each + 2 * (p - position - 1) + 1) / v
    elif schedule in ("zb-h1", "zb-v"):
        most = float(p)
    elif schedule == "v-half":
        most = float(p // 2 + 1)
    else:
        raise PlanError(f"there is no formula for schedule {schedule!r}")
    return min(most, float(m))


def play_out(schedule: str, positions: int, microbatches: int, stages: Sequence[Parts], hop: float) -> Simulation:
    """The step of one replica, from the schedule that the engine would run: a message is waited for by the computation
    that reads it (its receive is posted ahead), and is sent behind. ``stages``: seconds of a microbatch."""
    pipeline = pipeline_for(schedule, len(stages), positions)
    lists = [_instructions(row, pipeline, stages) for row in columns(rows_for(schedule, pipeline, microbatches))]
    return simulate(lists, CostModel(1.0, 1.0, 1.0, hop, 0.0), title="foretold")


def _instructions(row: Row, pipeline: Pipeline, stages: Sequence[Parts]) -> InstructionList:
    """A position's computations with their messages: each with what it waits for before it, what it sends after it."""
    names, local = row.by_stage()
    own = pipeline.of_stage[int(names[0])]
    patterns: list[Instruction] = []
    table = np.full((len(names), len(OPS), 3), -1, np.int32)  # receive, compute, send
    for number, stage in enumerate(names.tolist()):
        part = stages[stage]
        for op, seconds in ((F, part.f), (B, part.i + part.w), (I, part.i), (W, part.w)):
            name = OPS[op]
            step = 0 if op == W else 1 if op == F else -1  # where its output goes
            messages = []
            for side, other in (("RECV", stage - step), ("SEND", stage + step)):
                away = step and 0 <= other < len(stages) and pipeline.of_stage[other] != own
                direction = "F" if step > 0 else "B"
                edge = 2 * min(stage, other) + (step < 0)
                kind = "recv" if side == "RECV" else "send"
                messages.append(Instruction(f"{stage}{side}_{direction}", kind, 0.0, edge) if away else None)
            for place, item in enumerate((messages[0], Instruction(f"{stage}{name}", name, seconds), messages[1])):
                if item is not None:
                    table[number, op, place] = len(patterns)
                    patterns.append(item)
    which = table[local, row.op].reshape(-1)
    there = which >= 0
    return InstructionList(patterns, which[there].astype(np.uint16), np.repeat(row.microbatch, 3)[there])


def played(
    schedule: str, positions: int, microbatches: int, stages: Sequence[Parts], hop: float, most_played: int = MAX_PLAYED
) -> Filled:
    """``play_out``'s step; a long one is played with fewer microbatches, and carried on at the pace of the slowest."""
    works = [0.0] * positions
    for stage, position in enumerate(pipeline_for(schedule, len(stages), positions).of_stage):
        works[position] += stages[stage].whole
    most, mean = max(works), sum(works) / positions
    fits = max(2 * positions, most_played // (3 * len(stages)))
    short = microbatches
    while short > fits and short > 4 * positions:
        less = short // 2
        short = less - less % positions if less >= positions else less
    found = play_out(schedule, positions, short, stages, hop)
    seconds = found.timeline.seconds + (microbatches - short) * most
    return Filled(seconds, microbatches * most, microbatches * mean)
