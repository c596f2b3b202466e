"""Tiny models trained in many layouts by the real engine, and two such runs compared for equality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang
from trainer.plan.compile import compile_plan
from trainer.spec import parse_spec, what_digest


def train_in(folder: Path, model: Mapping[str, Any], how: Any, *, ranks: int | None = None, **train: Any) -> Gang:
    """A run on random tokens, in this layout (a dataclass of ``parallel``'s keys); ``train``: more of its keys;
    ``ranks``: how many its plan must have.
    """
    tree = {
        "name": "layouts",
        "model": {"context": 32, **model},
        "data": {"block": 2, "window": 3},
        "train": {"microbatch": 1, "seed": 11, **train},
        "parallel": {"threads": 1, **vars(how)},
        "checkpoint": {"every": 0},
    }
    tokens = np.random.default_rng(7).integers(0, model["vocab"], (5, train["sequence"] * 3 + 1))
    spec = parse_spec(tree)
    dataset = engine_runs.write_samples(folder / "data", tokens, model["vocab"])
    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset))
    assert ranks is None or len(plan.ranks) == ranks
    return engine_runs.train(plan, folder / "data", folder / "run")


def assert_equal_runs(ours: Gang, theirs: Gang, steps: int, told: Sequence[str]) -> None:
    """What each step told, every gradient and every weight."""
    for key in told:
        assert [event[key] for event in ours.steps] == [event[key] for event in theirs.steps]
    assert len(ours.steps) == steps
    for step in range(1, steps + 1):
        for what in ("grads", "weights"):
            mine, other = getattr(ours, what)(step), getattr(theirs, what)(step)
            assert mine.keys() == other.keys()
            for name, value in other.items():
                np.testing.assert_array_equal(mine[name], value, f"step {step}, {what}: {name}")
