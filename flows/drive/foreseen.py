"""What the plan foresees of a run's steps, for those who look at its health (``health.py``). Pure."""

from __future__ import annotations

from flows.drive.run import Prepared
from trainer.plan.simulate import CostModel, from_plan
from trainer.plan.timeline import COMPUTE_KINDS, kind_of

_ANY = CostModel(flops_per_s=1e11, memory_bytes_per_s=2e10)
"""Rates whose ratio is that of many devices: only the stages' shares are asked for."""


def pass_steps(prepared: Prepared) -> int:
    """Steps of one pass over the data; 0 for a mixture, whose parts are passed over each in its own time."""
    train, data = prepared.spec.train, prepared.dataset
    return 0 if data.mix is not None else data.samples(train.sequence) // train.batch


def plan_shares(prepared: Prepared) -> tuple[float, ...]:
    """How much of a step's computing each rank of the first replica has, in order; empty for one rank."""
    positions = len(prepared.plan.positions)
    if positions < 2:
        return ()
    rows = from_plan(prepared.plan, _ANY)[:positions]
    return tuple(sum(i.seconds for i in row if kind_of(i.action) in COMPUTE_KINDS) for row in rows)
