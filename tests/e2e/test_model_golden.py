"""The engine, whole: real processes train the golden models and agree with transformers and with the float64 reference.

How near is said in golden_runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import engine_runs
from tests.e2e.engine_runs import from_hf
from tests.e2e.golden_runs import (
    LOGITS,
    assert_agrees,
    assert_agrees_with_reference,
    compile_golden,
    spec_of,
    train_golden,
    worst,
)
from tests.reference.golden import CASES, Golden


@pytest.mark.parametrize("case", CASES)
def test_training_agrees_with_transformers(case: str, tmp_path: Path) -> None:
    golden = Golden(case)
    spec = spec_of(golden, stages=1)
    assert_agrees(golden, train_golden(golden, spec, tmp_path), spec.model)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_the_float64_reference(case: str, tmp_path: Path) -> None:
    """Gradients of the last batch too, at the weights that the engine itself had by then."""
    golden = Golden(case)
    spec = spec_of(golden, stages=1)
    assert_agrees_with_reference(golden, train_golden(golden, spec, tmp_path), spec.model)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case: str, tmp_path: Path) -> None:
    golden = Golden(case)
    spec = spec_of(golden, stages=1)
    plan = compile_golden(golden, spec, tmp_path, mode="infer")
    weights = engine_runs.weights_file(plan, from_hf(spec.model, golden.weights32), tmp_path / "weights")
    tokens = golden.batches[0][:, None, :-1]  # a request a sequence
    logits = engine_runs.infer(plan, weights, tokens, tmp_path)
    assert worst(logits[:, 0], golden.logits) < LOGITS


@pytest.mark.parametrize("case", CASES)
def test_more_stages_give_the_same_bits(case: str, tmp_path: Path) -> None:
    """Two and three stages, both schedules: losses, norms, every gradient and weight equal to the bit."""
    golden = Golden(case)
    one = train_golden(golden, spec_of(golden, stages=1), tmp_path / "1")
    for stages, schedule in ((2, "1f1b"), (3, "gpipe")):
        spec = spec_of(golden, stages, schedule, threads=2)
        many = train_golden(golden, spec, tmp_path / f"{stages}")
        assert many.losses == one.losses
        assert many.norms == one.norms
        for step in (1, len(one.losses)):
            for what in ("grads", "weights"):
                ours, theirs = getattr(many, what)(step), getattr(one, what)(step)
                for name, value in theirs.items():
                    np.testing.assert_array_equal(ours[name], value, f"{stages} stages, {what} {step}: {name}")


def test_the_oracle_s_kernels_agree_too(tmp_path: Path) -> None:
    golden = Golden("llama-gqa-untied")
    spec = spec_of(golden, stages=1)
    assert_agrees(golden, train_golden(golden, spec, tmp_path, kernel_path="ref"), spec.model)
