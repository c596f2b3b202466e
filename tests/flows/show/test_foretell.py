"""What is foretold of a plan before it runs."""

from __future__ import annotations

import pytest

from flows.show import foretell
from trainer.plan import flops_per_token
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


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_mfu_here_is_of_the_machine_that_its_ranks_share(
    stages: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretell, "measured_peak", lambda: 1e11)
    monkeypatch.setattr(foretell, "measured_bandwidth", lambda: 1e10)
    tree = {
        "name": "shared",
        "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 2, "context": 32, "vocab": 300},
        "train": {"steps": 2, "batch": 8, "microbatch": 1, "sequence": 32},
        "parallel": {"stages": stages, "replicas": replicas, "optimizer": "checked"},
    }
    plan, spec, _ = foretell.compile_for(parse_spec(tree), None)
    told = foretell.simulate(plan)
    trained = spec.train.tokens / told.step_seconds * flops_per_token(spec.model, spec.train.sequence)
    assert told.mfu == pytest.approx(trained / 1e11, rel=0.01)
    assert told.mfu < 1
    line, where = foretell.headline(plan, spec), foretell.foretold_line(plan, spec, told, "this machine")
    assert f"{spec.train.tokens / told.step_seconds:,.0f} tokens/s" in where
    assert ("8 microbatches of 1 x 32 tokens" + f" ({8 // replicas} a replica)" * (replicas > 1) + ",") in line
    assert where.count("%") == stages + 1, "what replicas idle is said once"


def test_documents_apart_are_planned_where_no_data_are_prepared() -> None:
    """An upper bound of the operations: borders are in the data. Within a window they are counted as they are."""
    tree = {
        "name": "apart",
        "model": {"family": "mistral", "layers": 3, "width": 32, "heads": 2, "context": 32, "vocab": 300},
        "train": {"steps": 2, "batch": 4, "microbatch": 1, "sequence": 32},
        "parallel": {"stages": 3},
    }
    across, within, window = (
        foretell.compile_for(parse_spec(tree, [f"data.packing={packing}", f"model.window={width}"]), None)
        for packing, width in (("across", 0), ("within", 0), ("across", 4))
    )
    assert [p.tokens_offset is None for p in across[0].positions] == [False, True, True]
    assert all(p.tokens_offset is not None for p in within[0].positions)
    counted = [flops_per_token(spec.model, 32) for _, spec, _ in (across, within, window)]
    assert counted[0] == counted[1]
    # three products of 2 x 2 keys and values a pair: 32 * 33 / 2 of them, or 4 a token but for the first three
    assert (counted[0] - counted[2]) * 32 == 3 * 3 * 4 * 32 * (32 * 33 / 2 - (4 * 32 - 6))
