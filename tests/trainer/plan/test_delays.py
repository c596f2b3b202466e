"""Set times: a sleep ends every program of an operation, and the simulator knows how long it is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.plans import GPT2, small_plan
from trainer.errors import PlanError
from trainer.plan.places import Pipeline
from trainer.plan.schedules import rows_for
from trainer.plan.simulate import CostModel, from_plan, simulate

FREE = CostModel(1e18, 1e18, 1e18, 0.0, 0.0)


def test_every_program_of_an_operation_ends_with_its_delay() -> None:
    plan = small_plan(stages=2, batch=8, delays={"F": 0.25, "I": 0.5, "W": 0.125})
    asked = {"F": (250_000_000,), "B": (625_000_000,), "B first": (625_000_000,)}
    for position in plan.positions:
        last = {name: program.calls[-1] for name, program in position.programs.items()}
        assert {n: c.dim for n, c in last.items() if c.kernel == "delay"} == asked
    done = simulate(from_plan(plan, FREE), FREE)
    m, p = 4, 2
    assert done.step_seconds == pytest.approx((m + p - 1) * 0.875)
    plain = small_plan(stages=2, batch=8)
    assert small_plan(stages=2, batch=8, delays={"F": 0.0}).to_bytes() == plain.to_bytes()
    assert plan.digest != plain.digest


def test_v_half_is_made_for_the_delays() -> None:
    """Not for the operations of the model, which are next to nothing beside them."""
    parallel = {"stages": 8, "chunks": 2, "schedule": "v-half"}
    sizes: dict[str, Any] = {"parallel": parallel, "model": GPT2 | {"layers": 8}, "batch": 32}
    like, unlike = ({"F": 0.01, "I": i, "W": 0.02 - i} for i in (0.01, 0.012))
    for delays in (like, unlike):
        times = [tuple(round(24 * delays[op] / 0.03) for op in "FIW")] * 8
        plan = small_plan(delays=delays, **sizes)
        rows = rows_for("v-half", Pipeline.there_and_back(8, 4), 16, times)  # type: ignore[arg-type]
        assert [[a for a in row if a.is_compute] for row in plan.schedule] == [list(row) for row in rows]
    assert small_plan(delays=like, **sizes).schedule != small_plan(delays=unlike, **sizes).schedule


@pytest.mark.parametrize("delays", [{"O": 1.0}, {"F": -1.0}, {"F": 11.0}, {"F": float("nan")}])
def test_what_is_no_delay_is_refused(delays: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=r"delays: '[OF]' of .* s; they are of F, I, W, B, from 0 to 10 s each"):
        small_plan(delays=delays)
