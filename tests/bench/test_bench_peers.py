"""The names that others read in out/bench.json; and that the peers get what we train. The bench itself is no test."""

from __future__ import annotations

import pytest

from tests.bench.peers import cases
from tests.bench.results import merged

NAMED = [
    "train/gpt2-124m/bf16/b4t64",
    "train/gpt2-124m/bf16/b1t1024",
    "train/gpt2-124m/fp32/b4t64",
    "train/gpt2-124m/fp32/b1t1024",
    "train/llama-small/bf16/b1t512",
    "start/gpt2-124m",
    "memory/gpt2-124m/b4t64",
    "memory/gpt2-124m/b1t1024",
]


def test_names_of_cases() -> None:
    assert [name for name in cases.names() if not name.startswith("gemm/")] == NAMED
    assert len(cases.gemms()) == 48
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


def test_rows_take_the_place_of_their_name_and_peer() -> None:
    old = [{"name": "a", "peer": "torch", "value": 1}, {"name": "a", "peer": "jax", "value": 2}]
    new = [{"name": "a", "peer": "jax", "value": 3}]
    assert merged(old, new) == [old[0], new[0]]
