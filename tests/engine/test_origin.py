"""Numbers that are not finite: every rank names the first one, which is the same in every layout."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e import engine_runs
from tests.engine.engine_build import build_flipping, engine
from tests.engine.plans import GPT2, LLAMA, SEQUENCE, VOCAB, small_plan
from tests.engine.test_rank import Gang, last_words
from trainer.plan.compiled import Plan

__all__ = ["engine"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "checked": {"stages": 2, "optimizer": "checked"},
    "optimistic": {"stages": 2, "optimizer": "optimistic"},
    "two parts": {"stages": 2, "schedule": "zb-h1"},
    "two replicas": {"stages": 2, "replicas": 2},
    "muon": {"stages": 2, "train": {"optimizer": {"name": "muon"}}},
}
NAMES = ("microbatch", "stage", "pass", "layer", "kernel", "operand", "tensor")
Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture
def gang(engine: Path, tmp_path: Path) -> Iterator[Gang]:
    made = Gang(engine, tmp_path)
    yield made
    made.close()


def planned(
    folder: Path, layout: str, model: dict[str, Any] = GPT2, samples: NDArray[Any] | None = None, groups: int = 2
) -> Plan:
    """Two microbatches of two sequences."""
    if samples is None:
        samples = np.random.default_rng(5).integers(0, VOCAB - 1, (12, SEQUENCE + 1))
    dataset = engine_runs.write_samples(folder / "data", samples, VOCAB)
    how = dict(LAYOUTS[layout])
    stages, train = how.pop("stages", 1), how.pop("train", {})
    return small_plan(
        model=model, stages=stages, parallel=how, dataset=dataset, reduction_groups=groups, data={"shuffled": False},
        **train,
    )  # fmt: skip


def drawn(plan: Plan, scale: float = 0.02) -> Tensors:
    rng = np.random.default_rng(2)
    norms = ("ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight")
    return {
        t.name: np.ones(t.shape, np.float32)
        if t.name.endswith(norms)
        else rng.normal(0, scale, t.shape).astype(np.float32)
        for t in plan.tensors
    }


def first_of(gang: Gang, plan: Plan, tensors: Tensors) -> dict[str, Any]:
    """What the last words of all ranks name, in equal words."""
    ranks = list(plan.ranks.all)
    gang.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in ranks]
    gang.prepare(plan, ports=[s.getsockname()[1] for s in gang.sockets])
    weights = engine_runs.weights_file(plan, tensors, gang.folder / "weights")
    started = [gang.start(rank, "--weights", str(weights)) for rank in ranks]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [87] * len(ranks), said
    words = [last_words(err) for err in said]
    found = [{name: w[name] for name in NAMES if name in w} for w in words]
    assert all(one == found[0] for one in found)
    assert all((w["step"], w["status"]) == (1, "DIVERGED") for w in words)
    assert all("; nothing of this step was applied; the first is in " in w["why"] for w in words)
    return found[0]


def last_stage(layout: str) -> int:
    return int(LAYOUTS[layout].get("stages", 1)) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_value_of_the_forward_pass(gang: Gang, tmp_path: Path, layout: str) -> None:
    """And not the gradients, all of which it spoils."""
    plan = planned(tmp_path, layout)
    tensors = drawn(plan)
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = np.sign(tensors[name]) * np.float32(3e38)
    where = {"microbatch": 0, "stage": last_stage(layout), "pass": "F", "layer": 1}
    assert first_of(gang, plan, tensors) == where | {"kernel": "linear_fwd", "operand": "y"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_of_one_microbatch(gang: Gang, tmp_path: Path, layout: str) -> None:
    """The token 7 is in the second one alone, with a logit beyond float32; all others have it far below the rest."""
    samples = np.random.default_rng(5).integers(8, VOCAB - 1, (12, SEQUENCE + 1))
    samples[2, 3] = 7
    plan = planned(tmp_path, layout, LLAMA | {"tied": False}, samples)
    tensors = drawn(plan)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, 0] = -1
    embedding[7] = 0
    embedding[7, 0] = 10
    head[VOCAB - 1] = 0
    head[VOCAB - 1, 0] = 1.2e38
    where = {"microbatch": 1, "stage": last_stage(layout), "pass": "B"}
    assert first_of(gang, plan, tensors) == where | {"kernel": "classifier_grad", "operand": "loss"}


@pytest.mark.parametrize("layout", ["optimistic", "two parts"])
def test_a_gradient_of_a_weight(gang: Gang, tmp_path: Path, layout: str) -> None:
    """Logits are zero, losses finite; rows' gradients of the last norm's weight are finite, their sum is not."""
    plan = planned(tmp_path, layout, LLAMA | {"tied": False}, np.full((12, SEQUENCE + 1), 4))
    tensors = drawn(plan, 1.0)
    tensors["model.norm.weight"][:] = 0
    tensors["lm_head.weight"][:] = 3.3e38
    tensors["lm_head.weight"][4] = -3.3e38
    where = {"microbatch": 0, "stage": last_stage(layout), "pass": "B", "kernel": "rmsnorm_wgrad", "operand": "dw"}
    assert first_of(gang, plan, tensors) == where | {"tensor": "model.norm.weight"}


@pytest.mark.parametrize("layout", ["checked", "two replicas", "muon"])
def test_a_weight_that_was_not_finite_before(gang: Gang, tmp_path: Path, layout: str) -> None:
    plan = planned(tmp_path, layout)
    tensors = drawn(plan)
    tensors["transformer.h.1.attn.c_proj.bias"][5] = np.inf
    assert first_of(gang, plan, tensors) == {"operand": "weight", "tensor": "transformer.h.1.attn.c_proj.bias"}


def test_a_machine_that_computed_wrongly_once(tmp_path: Path) -> None:
    """The second look finds nothing: every rank says so."""
    gang = Gang(build_flipping("LINEAR_FWD", 2, 1, nan=True), tmp_path)
    try:
        gang.prepare(planned(tmp_path, "checked"))
        ranks = [gang.start(rank) for rank in range(2)]
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        gang.close()
    assert [rank.returncode for rank in ranks] == [87, 87], said
    for words in map(last_words, said):
        assert (words["step"], words["again"]) == (2, "finite")
        assert "computed again from the same state it is" in words["why"]
        assert "tensor" not in words
