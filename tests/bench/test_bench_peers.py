"""The names that others read in out/bench.json; and that the peers get what we train. The bench itself is no test."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest

from k8s.images.static import ROOT
from tests.bench.peers import cases, curve
from tests.bench.peers.cases import Training, Variant
from tests.bench.peers.memory import most_resident
from tests.bench.peers.sides import peer_on
from tests.bench.results import merged
from tests.e2e.engine_runs import train, weights_file
from tests.gpu.workloads import OPTIMIZER, gpt2, samples

NAMED = [
    "train/gpt2-124m/bf16/b4t64",
    "train/gpt2-124m/bf16/b1t1024",
    "train/gpt2-124m/fp32/b4t64",
    "train/gpt2-124m/fp32/b1t1024",
    "train/llama-small/bf16/b1t512",
    "start/gpt2-124m",
    "start/gpt2-124m/fp32",
    "memory/gpt2-124m/b4t64",
    "memory/gpt2-124m/b1t1024",
]


def test_names_of_cases() -> None:
    assert [name for name in cases.names() if not name.startswith("gemm/")] == NAMED
    assert len(cases.gemms()) == 2 * 3 * (2 * 4 + 1)
    for training in cases.TRAININGS[:4]:
        precision, rows = training.precision, training.spec(1, 1).train.classifier_chunk
        assert cases.gemms()[f"gemm/{precision}/nn/{rows}x768x50304"] == (precision, "nn", rows, 768, 50304)
    assert cases.gemms()["gemm/bf16/tn/3072x768x256"] == ("bf16", "tn", 3072, 768, 256)
    assert cases.chosen(["memory", "start"]) == (*NAMED[5:],)
    with pytest.raises(SystemExit, match="no case begins with trian"):
        cases.chosen(["trian"])


def test_what_our_side_trains() -> None:
    for training in cases.TRAININGS:
        spec = training.spec(steps=3, threads=2)
        assert (spec.train.batch, spec.train.sequence, spec.train.precision) == (
            training.batch,
            training.sequence,
            training.precision,
        )
        assert spec.train.optimizer.clip == cases.OPTIMIZER["clip"]
        assert not spec.data.shuffled


def test_operations_of_a_step_are_causal() -> None:
    """By hand: 6 a weight and token; of attention's two products, thrice, what T (T + 1) / 2 pairs have."""
    layers, width, tokens = 12, 768, 1024
    weights = layers * 12 * width**2 + 50304 * width
    pairs = tokens * (tokens + 1) // 2
    training = cases.FP32["b1t1024"]
    assert training.operations == 6 * weights * tokens + 3 * layers * 2 * 2 * width * pairs
    assert cases.FP32["b4t64"].operations == 4 * (6 * weights * 64 + 3 * layers * 2 * 2 * width * 64 * 65 // 2)


def test_the_most_memory_of_a_process() -> None:
    block = np.ones(8 << 20)  # 64 MiB
    most = most_resident(os.getpid())
    assert most > block.nbytes / 2**20
    del block
    assert most_resident(os.getpid()) > 0.99 * most  # also when it is given back; the kernel counts in batches
    assert most_resident(1 << 30) == 0


@pytest.mark.slow
def test_the_peers_train_what_we_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, at rates at which it would show if one decayed biases and norms, or clipped elsewhere."""
    monkeypatch.setitem(OPTIMIZER, "lr", 1e-2)
    monkeypatch.setitem(OPTIMIZER, "weight_decay", 3.0)
    layers, steps = 2, 12
    training = Training("tiny", gpt2(layers, 64, 2, 208, 32), 32, 2, 2, steps=steps, precision="fp32")
    tokens = samples(training, steps)
    plan = training.plan(steps, 1, tmp_path, tokens)
    begin = curve.weights(plan)
    in_engine = weights_file(plan, begin, tmp_path / "weights")
    ours = train(plan, tmp_path / "data", tmp_path / "run", dump=False, weights=in_engine).losses
    np.save(tmp_path / "data.npy", tokens.reshape(steps, training.batch, -1))
    of_peers = {
        "torch": {curve.name_in_torch(name): value for name, value in begin.items()},
        "jax": curve.in_jax(begin, layers),
    }
    for name, given in of_peers.items():
        np.savez(tmp_path / "weights.npz", **given)  # type: ignore[arg-type]
        with peer_on(
            training, Variant(name, "fp32"), 1, tmp_path / "data.npy", {}, tmp_path / "weights.npz"
        ) as process:
            theirs = [process.first_loss, *process.sample(steps - 1).losses]
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, err_msg=name)


def test_jax_has_the_optimizer_of_the_workloads() -> None:
    told = ast.parse((ROOT / "tests" / "gpu" / "peers" / "jax_train.py").read_text())
    (found,) = (s.value for s in told.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "OPTIMIZER")
    assert ast.literal_eval(found) == OPTIMIZER


def test_rows_take_the_place_of_their_name_and_peer() -> None:
    old = [{"name": "a", "peer": "torch", "value": 1}, {"name": "a", "peer": "jax", "value": 2}]
    new = [{"name": "a", "peer": "jax", "value": 3}]
    assert merged(old, new) == [old[0], new[0]]
