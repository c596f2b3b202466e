"""What a plan's writes may lie over, and plans damaged at random: refused, or run inside their memory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engine.native import build_program
from tests.engine.plans import GPT2, LLAMA, mixture, replicated, small_plan


def counted(path: Path, plan: bytes, *mode: str) -> dict[str, int]:
    """What ``programs/plan_fuzz.c`` counted: of planted writes ("plant"), or of mutations (their number and seed)."""
    path.write_bytes(plan)
    command = [build_program("plan_fuzz"), path, *mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_every_write_in_pieces_over_what_it_must_not_touch_is_refused(tmp_path: Path) -> None:
    assert counted(tmp_path / "plan", replicated(), "plant")["actions"] > 100


def test_mutated_plans_of_replicas_are_refused_or_run_inside_their_memory(tmp_path: Path) -> None:
    found = counted(tmp_path / "plan", replicated(), "40", "5")
    assert found["refused"] > 15
    assert found["run"] > 2


@pytest.mark.parametrize("shared", [1, 2])
def test_plans_of_a_head_in_blocks_are_refused_or_run_like_others(tmp_path: Path, shared: int) -> None:
    plan = small_plan(stages=2, parallel={"vocab_stages": shared}, vocab_blocks=2).to_bytes()
    counted(tmp_path / "plan", plan, "plant")
    found = counted(tmp_path / "plan", plan, "400", "7")
    assert found["refused"] > 150
    assert found["run"] > 5


@pytest.mark.parametrize(
    ("precision", "model", "stages"),
    [
        # by day every precision with each model and with each number of stages
        pytest.param(
            precision,
            model,
            stages,
            id=f"{precision}-{name}-{stages}",
            marks=[pytest.mark.slow] * ((i + j + stages) % 2),
        )
        for i, precision in enumerate(("fp32", "bf16", "fp8"))
        for j, (name, model) in enumerate((("gpt2", GPT2), ("llama", LLAMA)))
        for stages in (1, 2)
    ],
)
def test_every_write_over_what_it_must_not_touch_is_refused(
    tmp_path: Path, precision: str, model: dict[str, Any], stages: int
) -> None:
    """Each written operand, message and report, laid over each other operand, tokens, targets, control block, norms
    and state tensors, in both spaces that reach them."""
    optimizer = "optimistic" if stages == 2 else "checked"
    plan = small_plan(stages=stages, model=model, precision=precision, parallel={"optimizer": optimizer})
    found = counted(tmp_path / "plan", plan.to_bytes(), "plant")
    assert found["calls"] > 500
    assert found["actions"] > 20


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_mutated_plans_are_refused_or_run_inside_their_memory(tmp_path: Path, stages: int, precision: str) -> None:
    for model, seed in ((GPT2, 1), (LLAMA, 2)):
        optimizer = "optimistic" if model == LLAMA else "checked"
        plan = small_plan(stages=stages, model=model, precision=precision, parallel={"optimizer": optimizer})
        found = counted(tmp_path / "plan", plan.to_bytes(), "1000", str(seed))
        assert found["refused"] > 500
        assert found["run"] > 20


def test_mutated_plans_of_a_mixture_are_refused_or_run(tmp_path: Path) -> None:
    found = counted(tmp_path / "plan", mixture(), "300", "3")
    assert found["refused"] > 100
    assert found["run"] > 10
