"""Inference through the engine: the logits agree with the training plan's losses, and bad requests are refused."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e import engine_runs
from tests.engine.engine_build import engine
from tests.engine.plans import GPT2, LLAMA, SAMPLES, SEQUENCE, VOCAB, small_plan
from trainer.plan.compiled import Plan

__all__ = ["engine"]


def weights(folder: Path, plan: Plan) -> Path:
    rng = np.random.default_rng(3)
    values = {t.name: rng.normal(0, 0.3, t.shape).astype(np.float32) for t in plan.tensors}
    return engine_runs.weights_file(plan, values, folder / "weights")


def infer(engine: Path, folder: Path, plan: Plan, requests: bytes) -> tuple[int, bytes, str]:
    (folder / "infer").write_bytes(plan.to_bytes())
    command = [engine, "infer", "--plan", folder / "infer", "--weights", weights(folder, plan)]
    done = subprocess.run(command, input=requests, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


def loss(logits: NDArray[Any], targets: NDArray[Any]) -> float:
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return float((total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean())


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_logits_give_the_loss_that_training_reports(engine: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    training = small_plan(tmp_path, model=model, steps=1, data={"shuffled": False})
    plan = small_plan(tmp_path, model=model, mode="infer")
    samples = np.random.default_rng(5).integers(0, VOCAB, (SAMPLES, SEQUENCE + 1))[:4]  # what small_plan wrote
    code, out, err = infer(engine, tmp_path, plan, samples[:, :-1].astype("<i4").tobytes())
    assert code == 0, err
    logits = np.frombuffer(out, "<f4").astype(np.float64).reshape(4, SEQUENCE, VOCAB)
    gang = engine_runs.train(
        training, tmp_path / "data", tmp_path / "run", weights=tmp_path / "weights", engine=engine, dump=False
    )
    assert gang.losses[0] == pytest.approx(loss(logits, samples[:, 1:]), rel=1e-5)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_losses_are_those_of_training(engine: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    """Bit for bit: their mean over the first batch is the loss of step 1. A token without a target has none."""
    training = small_plan(tmp_path, model=model, steps=1, data={"shuffled": False})
    plan = small_plan(tmp_path, model=model, mode="losses")
    samples = np.random.default_rng(5).integers(0, VOCAB, (SAMPLES, SEQUENCE + 1))[:4].astype("<i4")  # small_plan's
    requests = b"".join(s[:-1].tobytes() + s[1:].tobytes() for s in samples)
    none = samples[0][:-1].tobytes() + np.full(SEQUENCE, -1, "<i4").tobytes()
    code, out, err = infer(engine, tmp_path, plan, requests + none)
    assert code == 0, err
    losses = np.frombuffer(out, "<f4").reshape(5, SEQUENCE)
    assert not losses[4].any()
    gang = engine_runs.train(
        training, tmp_path / "data", tmp_path / "run", weights=tmp_path / "weights", engine=engine, dump=False
    )
    assert gang.losses[0] == math.fsum(losses[:4].ravel().astype(np.float64)) / (4 * SEQUENCE)


def test_targets_are_checked_as_tokens_are(engine: Path, tmp_path: Path) -> None:
    plan, fine = small_plan(mode="losses"), np.zeros(SEQUENCE, "<i4")
    for bad in (-2, VOCAB):
        targets = fine.copy()
        targets[2] = bad
        code, _, err = infer(engine, tmp_path, plan, fine.tobytes() + targets.tobytes())
        assert code == 65
        assert f"token {bad} of a request is outside -1..{VOCAB - 1}" in err
    code, _, err = infer(engine, tmp_path, plan, fine.tobytes())
    assert code == 65
    assert "it has no targets" in err


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(engine: Path, tmp_path: Path, token: int) -> None:
    request = np.zeros(SEQUENCE, "<i4")
    request[3] = token
    code, out, err = infer(engine, tmp_path, small_plan(mode="infer"), request.tobytes())
    assert (code, out) == (65, b"")
    assert f"token {token} of a request is outside 0..{VOCAB - 1}" in err


def test_a_request_cut_short_is_refused(engine: Path, tmp_path: Path) -> None:
    code, _, err = infer(engine, tmp_path, small_plan(mode="infer"), bytes(5))
    assert code == 65
    assert f"5 bytes of {4 * SEQUENCE}" in err


def test_a_training_plan_is_refused(engine: Path, tmp_path: Path) -> None:
    code, _, err = infer(engine, tmp_path, small_plan(), b"")
    assert code == 78
    assert "is for training" in err
