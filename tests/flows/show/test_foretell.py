"""What is foretold of a plan before it runs."""

from __future__ import annotations

import pytest

from flows.show import foretell
from trainer.plan.devices import SHEETS, cost_of
from trainer.plan.steady import steady
from trainer.spec import parse_spec


def test_an_optimistic_step_is_foretold_as_one_of_many() -> None:
    tree = {
        "name": "many",
        "model": {"family": "gpt2", "layers": 8, "width": 2048, "heads": 16, "context": 2048, "vocab": 5_000},
        "train": {"steps": 10, "batch": 64, "microbatch": 8, "sequence": 2048, "precision": "bf16"},
        "parallel": {"stages": 8, "chunks": 2, "schedule": "zb-v", "device": "cuda"},
    }
    sheet, steps = SHEETS["H100"], {}
    for optimizer in ("checked", "optimistic"):
        plan, spec, _ = foretell.compile_for(parse_spec(tree, [f"parallel.optimizer={optimizer}"]), None)
        told = foretell.facts(plan, spec, foretell.simulate_on(plan, spec, sheet))
        assert told["optimizer"] == optimizer
        many = steady(plan, cost_of(sheet, spec))
        assert told["step_seconds"] == pytest.approx(many.step_seconds, rel=0.01)
        assert told["bubble"] == pytest.approx(many.bubble, abs=0.01)
        steps[optimizer] = (told["step_seconds"], told["mfu"])
    assert steps["optimistic"][0] < steps["checked"][0]
    assert steps["optimistic"][1] > steps["checked"][1]
