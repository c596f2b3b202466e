"""Steps that follow one another, timed before they run: how long one takes when many do, and how idle ranks are then.

A step by itself (``simulate``) has a bubble at its beginning and its end. Where the next one may begin before all are
done (``optimistic.py``), the two overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.plan.compiled import Plan
from trainer.plan.records import ActionList
from trainer.plan.simulate import CostModel, InstructionList, simulate, steps_of_plan, timed
from trainer.plan.timeline import COMPUTE_KINDS
from trainer.plan.turns import Turns

STEPS = 6
"""Enough for the first ones and the last, which differ, and two between."""
CLIPPED = 0.05
"""The part of the steps that ``quicker`` takes to be clipped."""
MOST_ACTIONS = 1 << 20
"""Of a plan's step lists, for ``quicker`` to play them."""
CPU = CostModel(flops_per_s=5e10, memory_bytes_per_s=1e10)
CUDA = CostModel(flops_per_s=4e14, memory_bytes_per_s=2.5e12, link_bytes_per_s=5e10, link_latency_s=1e-5, call_s=3e-6)
"""A rank's rates where no machine is known: enough to say which of two plans is quicker, the same everywhere."""


@dataclass(frozen=True)
class Steady:
    """One of many steps."""

    step_seconds: float
    bubble: tuple[float, ...]
    """Of each rank, the part of a step in which it neither computes nor updates weights."""


def steady(plan: Plan, cost: CostModel, steps: int = STEPS) -> Steady:
    """One of ``steps`` steps, neither among the first nor the last; nothing is clipped."""
    if steps < 4:
        raise ValueError(f"{steps} steps: the first two and the last are not like the others")
    listed = steps_of_plan(plan, cost, steps)
    joined = [InstructionList.joined(rank) for rank in listed]
    ends = [np.cumsum([len(step) for step in rank]) - 1 for rank in listed]
    timeline = simulate(joined, cost).timeline
    done = np.array([row.end[at] for row, at in zip(timeline.rows, ends, strict=True)])  # by rank and step
    first, last = steps // 2 - 1, steps - 2
    seconds = float((done[:, last] - done[:, first]).max()) / (last - first)
    busy = [_busy(rank[last]) for rank in listed]
    return Steady(seconds, tuple(1.0 - b / seconds if seconds else 0.0 for b in busy))


def _busy(step: InstructionList) -> float:
    seconds: NDArray[np.float64] = np.array(
        [p.seconds if p.kind in (*COMPUTE_KINDS, "O") else 0.0 for p in step.patterns], np.float64
    )
    return float((seconds * step.counts).sum())


def redo_seconds(plan: Plan, cost: CostModel) -> float:
    """What a clipped step of an optimistic plan takes longer than another, at most."""
    turns = [Turns.of(position, plan.channels) for position in plan.positions]
    lists = timed(plan, cost, [[ActionList.joined([t.redo, t.again])] for t in turns])
    return simulate([rank[0] for rank in lists], cost).step_seconds


def quicker(checked: Plan, optimistic: Plan, cost: CostModel) -> bool:
    """Whether the optimistic one is, by more than the steps cost that run their prefix twice."""
    if sum(len(position.step) for position in optimistic.positions) > MOST_ACTIONS:
        return False
    clipped = CLIPPED if checked.config.clip > 0 else 0.0
    gain = steady(checked, cost).step_seconds - steady(optimistic, cost).step_seconds
    return gain > clipped * redo_seconds(optimistic, cost)
