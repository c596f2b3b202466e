"""Rates of a machine out of a run's own traces, so that its step can be simulated with what its kernels do there.

A yardstick (a large product, a large copy) does not know what small kernels on cached data do. Three rates are fitted:
arithmetic, memory, and the fixed cost of a call; on every program that the ranks traced, by its median. Messages are
not fitted: what they cost is the simulator's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.errors import PlanError
from trainer.plan.compiled import Plan
from trainer.plan.flops import kernel_flops
from trainer.plan.places import Rank
from trainer.plan.records import ActionList, Program
from trainer.plan.simulate import CostModel, run_text
from trainer.plan.timeline import Timeline

_STEPS = (4.0, 1.6, 1.2, 1.05, 1.01)
_RATES = ("flops_per_s", "memory_bytes_per_s", "call_s")
_PARTS = (0.02, 0.2, 0.5, 0.8, 0.98)
"""Of a step's seconds, what arithmetic has where a descent begins."""


def programs_seconds(timelines: Sequence[Timeline]) -> dict[tuple[Rank, str], float]:
    """By rank and an action's text without its microbatch (``2F``, ``adamw``), the median of its seconds."""
    found: dict[tuple[Rank, str], list[float]] = {}
    for timeline in timelines:
        for row in timeline.rows:
            for event in row:
                text = event.action if event.microbatch is None else event.action.rstrip("0123456789")
                found.setdefault((event.rank, text), []).append(event.seconds)
    return {key: float(np.median(seconds)) for key, seconds in found.items()}


def fitted(plan: Plan, timelines: Sequence[Timeline], start: CostModel) -> CostModel:
    """``start`` with the rates that a run's traced steps show; its own rates play no part. PlanError where they show no
    program of the plan."""
    measured = programs_seconds(timelines)
    works, times, weights = [], [], []
    for rank in plan.ranks.all:
        position = plan.positions[plan.ranks.position(rank)]
        for text, (programs, count) in _runs(plan, rank).items():
            seconds = measured.get((rank, text))
            if seconds:
                works.append([_work(position.programs[name]) for name in programs])
                times.append(seconds)
                weights.append(seconds * count)
    if not times:
        raise PlanError("the traces show no program of this plan; measure a run of the same spec")
    found = (_descended(balance, works, times, weights) for balance in _balances(start, works, times))
    return min(found, key=lambda pair: pair[0])[1]


def _balances(
    start: CostModel, works: Sequence[Sequence[NDArray[np.float64]]], times: Sequence[float]
) -> Iterator[CostModel]:
    """Rates to begin at, from calls that all wait for arithmetic to calls that all wait for memory, each as fast as the
    times say: a descent from one side alone may end there, since a rate that no call waits for moves nothing.
    """
    calls = np.concatenate([work[:-1] for variants in works for work in variants])
    flops, touched = float(calls[:, 0].sum()), float(calls[:, 1].sum())
    seconds = sum(seconds * len(variants) for seconds, variants in zip(times, works, strict=True))
    for part in _PARTS:
        rates = (flops / (seconds * part), touched / (seconds * (1 - part)))
        yield replace(start, flops_per_s=max(rates[0], 1.0), memory_bytes_per_s=max(rates[1], 1.0))


def _descended(
    start: CostModel, works: Sequence[Sequence[NDArray[np.float64]]], times: Sequence[float], weights: Sequence[float]
) -> tuple[float, CostModel]:
    """The error that is left, and the rates, of which each was moved by turns for as long as that made it smaller."""
    best, error = start, _error(start, works, times, weights)
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for name in _RATES:
                for factor in (step, 1 / step):
                    tried = replace(best, **{name: max(getattr(best, name), 1e-9) * factor})
                    now = _error(tried, works, times, weights)
                    if now < error * (1 - 1e-9):
                        best, error, moved = tried, now, True
    return error, best


def _runs(plan: Plan, rank: Rank) -> Mapping[str, tuple[list[str], int]]:
    """By text, the programs that a rank's step runs under it, and how often."""
    position = plan.positions[plan.ranks.position(rank)]
    step = ActionList.of(position.step)
    found: dict[str, tuple[list[str], int]] = {}
    for pattern, count in zip(step.patterns, np.bincount(step.which, minlength=len(step.patterns)), strict=True):
        if pattern.kind == wire.A_RUN and pattern.program is not None:
            programs, known = found.setdefault(run_text(position, pattern), ([], 0))
            found[run_text(position, pattern)] = ([*programs, pattern.program], known + int(count))
    return found


def _work(program: Program) -> NDArray[np.float64]:
    """Operations and bytes of its calls, and the seconds that a sleep among them takes."""
    calls = [c for c in program.calls if c.kernel != "delay"]
    sleeps = sum(c.dim[0] * 1e-9 for c in program.calls if c.kernel == "delay")
    rows = [(kernel_flops(c.kernel, c.dim).done, c.bytes_touched, 0.0) for c in calls]
    return np.array([*rows, (0.0, 0.0, sleeps)], np.float64)


def _seconds(cost: CostModel, work: NDArray[np.float64]) -> float:
    """Of a program, as ``CostModel.call_seconds`` says of its calls."""
    flops, touched, sleeps = work.T
    busy = np.maximum(flops / cost.flops_per_s, touched / cost.memory_bytes_per_s)
    return float(busy.sum() + sleeps.sum() + cost.call_s * (len(work) - 1))


def _error(
    cost: CostModel, works: Sequence[Sequence[NDArray[np.float64]]], times: Sequence[float], weights: Sequence[float]
) -> float:
    told = [np.mean([_seconds(cost, work) for work in variants]) for variants in works]
    return float(np.average(np.log(np.array(told) / np.array(times)) ** 2, weights=weights))
