"""Rates out of traces: those that made the times come back, and a step is simulated with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.plans import GPT2, small_plan
from trainer.errors import PlanError
from trainer.plan.calibrate import fitted, programs_seconds
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.plan.timeline import Timeline

MADE = CostModel(flops_per_s=3e9, memory_bytes_per_s=40e9, link_latency_s=1e-4, call_s=3e-6)
GUESS = CostModel(flops_per_s=60e9, memory_bytes_per_s=5e9, link_latency_s=1e-4, call_s=1e-6)
PARALLEL = {"stages": 4, "chunks": 2, "schedule": "zb-v"}


def test_the_rates_that_made_the_times_come_back() -> None:
    plan = small_plan(parallel=PARALLEL, model=GPT2 | {"layers": 4, "width": 128, "heads": 4}, batch=8, microbatch=2)
    step = simulate(from_plan(plan, MADE), MADE).timeline
    found = fitted(plan, [step, step], GUESS)
    assert found.flops_per_s == pytest.approx(MADE.flops_per_s, rel=0.05)
    assert found.call_s == pytest.approx(MADE.call_s, rel=0.15)
    assert found.link_latency_s == GUESS.link_latency_s
    again = simulate(from_plan(plan, found), found)
    assert again.step_seconds == pytest.approx(step.seconds, rel=0.02)
    wrong = simulate(from_plan(plan, GUESS), GUESS)
    assert abs(wrong.step_seconds / step.seconds - 1) > 0.3


def test_what_a_busy_machine_s_yardstick_says_moves_nothing() -> None:
    """A descent that began at its rates ended where every call waits for memory, 11 % away."""
    slow = CostModel(flops_per_s=1e8, memory_bytes_per_s=1e9, call_s=4e-6)
    plan = small_plan(
        parallel={"stages": 1}, model=GPT2 | {"layers": 4, "width": 64, "heads": 4}, batch=8, microbatch=2
    )
    step = simulate(from_plan(plan, slow), slow).timeline
    again = fitted(plan, [step], replace(slow, flops_per_s=26e10, memory_bytes_per_s=3e9))
    assert again == fitted(plan, [step], replace(slow, flops_per_s=6e9, memory_bytes_per_s=5e10))
    assert simulate(from_plan(plan, again), again).step_seconds == pytest.approx(step.seconds, rel=0.01)


def test_a_sleep_is_no_rate() -> None:
    plan = small_plan(parallel=PARALLEL, model=GPT2 | {"layers": 4}, batch=8, delays={"F": 0.01, "I": 0.02, "W": 0.0})
    step = simulate(from_plan(plan, MADE), MADE).timeline
    again = fitted(plan, [step], GUESS)
    assert simulate(from_plan(plan, again), again).step_seconds == pytest.approx(step.seconds, rel=0.01)


def test_programs_by_text() -> None:
    plan = small_plan(parallel=PARALLEL, model=GPT2 | {"layers": 4}, batch=8)
    seen = programs_seconds([simulate(from_plan(plan, MADE), MADE).timeline])
    assert {text for rank, text in seen if rank == 0 and text[0].isdigit() and "_" not in text} == {
        "0F",
        "0B",
        "3F",
        "3I",
        "3W",
    }


def test_traces_of_another_plan_are_refused() -> None:
    with pytest.raises(PlanError, match="the traces show no program of this plan; measure a run of the same spec"):
        fitted(small_plan(), [Timeline((), 1)], GUESS)
