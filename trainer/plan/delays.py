"""Set times for programs: a sleep at the end of each, so that a schedule can be measured where ranks share cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trainer import wire
from trainer.errors import PlanError
from trainer.plan.records import ActionList, BoundCall, PositionPlan
from trainer.plan.rows import COMPUTE

MOST_S = 10.0


def with_delays(positions: Sequence[PositionPlan], delays: Mapping[str, float]) -> tuple[PositionPlan, ...]:
    """The positions with kernel ``delay`` at the end of every program of an operation in ``delays`` (seconds by
    operation; B, where it is not there, I and W)."""
    for op, seconds in delays.items():
        if op not in COMPUTE or not 0 <= seconds <= MOST_S:
            raise PlanError(
                f"delays: {op!r} of {seconds} s; they are of {', '.join(COMPUTE)}, from 0 to {MOST_S:g} s each"
            )
    whole = delays.get("B", delays.get("I", 0.0) + delays.get("W", 0.0))
    seconds_of = {**delays, "B": whole}
    out = []
    for position in positions:
        programs = dict(position.programs)
        ops = {a.program: a.op for a in ActionList.of(position.step).patterns if a.kind == wire.A_RUN}
        for name, op in ops.items():
            ns = round(1e9 * seconds_of.get(op, 0.0))
            if name is not None and ns:
                sleep = BoundCall("delay", wire.F32, (None,), (ns,), (), None, "O")
                programs[name] = replace(programs[name], calls=(*programs[name].calls, sleep))
        out.append(replace(position, programs=programs))
    return tuple(out)
