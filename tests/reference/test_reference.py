"""The float64 reference against the golden cases of transformers, and its gradients against finite differences.

GPT-2 agrees to rounding. In Llama and Qwen3 transformers computes RMSNorm, the softmax and the rotary table in float32
even in a float64 model, so agreement ends at float32's rounding there; finite differences carry the proof further.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.golden import CASES, Golden
from tests.reference.model import Model, train

# relative; (loss, logits, gradients and norms, weights after 10 steps)
EXACT = (1e-13, 1e-13, 1e-12, 1e-10)
FLOAT32_INSIDE = (2e-8, 1e-6, 3e-6, 1e-4)


def bounds(case: str) -> tuple[float, float, float, float]:
    return EXACT if case.startswith("gpt2") else FLOAT32_INSIDE


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest element."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_first_batch(case: str) -> None:
    golden = Golden(case)
    loss, logits, gradient, _ = bounds(case)
    batch = golden.batches[0]
    model = Model(golden.config, golden.weights(), batch[:, :-1], batch[:, 1:])
    assert model.loss == pytest.approx(golden.losses[0], rel=loss)
    assert worst(model.logits, golden.logits) < logits
    grads = model.backward()
    assert set(grads) == set(golden.grads)
    for name, theirs in golden.grads.items():
        assert worst(grads[name], theirs) < gradient, name


@pytest.mark.parametrize("case", CASES)
def test_ten_steps(case: str) -> None:
    golden = Golden(case)
    loss, _, gradient, after = bounds(case)
    weights = golden.weights()
    losses, norms = train(golden.config, weights, golden.batches, golden.optimizer)
    np.testing.assert_allclose(losses, golden.losses, rtol=loss)
    np.testing.assert_allclose(norms, golden.norms, rtol=gradient)
    for name, theirs in golden.after.items():
        assert worst(weights[name], theirs) < after, name


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(case: str) -> None:
    """Along one random direction in each tensor, central differences: every gradient, to float64's limits."""
    golden = Golden(case)
    weights = golden.weights()
    batch = golden.batches[0][:1, :14]
    tokens, targets = batch[:, :-1], batch[:, 1:]
    grads = Model(golden.config, weights, tokens, targets).backward()
    random = np.random.default_rng(1)
    for name, w in weights.items():
        direction = random.standard_normal(w.shape)
        direction /= np.linalg.norm(direction)
        slope, step, sides = float((grads[name] * direction).sum()), 1e-4, []
        for sign in (1, -1):
            moved = weights | {name: w + sign * step * direction}
            sides.append(Model(golden.config, moved, tokens, targets).loss)
        measured = (sides[0] - sides[1]) / (2 * step)
        assert measured == pytest.approx(slope, rel=1e-5, abs=2e-9), name
