"""Equal bits over layouts: stages x schedules x replicas, up to 16 processes, against one process.

Every loss, norm, gradient and weight of every step is compared for equality. `make test` takes a sample, drawn by SEED
(``HOTSTAGE_SEED`` in the environment draws another), with every number of stages, replicas and every schedule in it;
`make nightly` takes all. Tensors of more than 262,144 elements are in pieces, one for each replica; those of the third
model are codes in FP8, and whole, as are those that Muon takes.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine_runs import Gang
from tests.e2e.layout_runs import assert_equal_runs, train_in
from trainer.spec_how import SCHEDULES, THERE_AND_BACK

SEED = int(os.environ.get("HOTSTAGE_SEED", "11"))
SAMPLE, STEPS, SEQUENCE, BATCH, GROUPS, RANKS = 16, 3, 16, 16, 8, 16

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # an embedding of five blocks: pieces of 3, 2 and 1 blocks, the last ones short or empty
    "gpt2 tied, bf16": ("bf16", {"family": "gpt2", "width": 104, "heads": 4, "vocab": 10_403, "tied": True}),
    # a matrix of two blocks in each layer: in pieces for two replicas
    "llama untied, fp32": (
        "fp32",
        {"family": "llama", "width": 64, "heads": 4, "kv_heads": 2, "hidden": 2_080, "vocab": 203, "tied": False},
    ),
    "qwen3 tied, fp8": (
        "fp8",
        {"family": "qwen3", "width": 128, "heads": 4, "kv_heads": 2, "head_size": 32, "hidden": 1_040, "vocab": 203},
    ),
    # beside matrices that Muon takes, embedding and head of two blocks
    "qwen3 untied, bf16, muon": (
        "bf16",
        {"family": "qwen3", "width": 64, "heads": 4, "kv_heads": 2, "hidden": 176, "vocab": 4_203, "tied": False},
    ),
}


@dataclass(frozen=True)
class How:
    """A layout."""

    stages: int
    schedule: str
    chunks: int
    replicas: int
    optimizer: str = "checked"
    recompute: str = "none"

    def __str__(self) -> str:
        more = [word for word in (self.optimizer, self.recompute) if word not in ("checked", "none")]
        return ", ".join([f"{self.stages} stages {self.schedule}/{self.chunks} x {self.replicas}", *more])


def layouts() -> Iterator[How]:
    """All of them, of up to RANKS processes; two and four chunks a rank where a schedule takes several."""
    for schedule in SCHEDULES:
        for chunks in {"interleaved-1f1b": (2, 4), **dict.fromkeys(THERE_AND_BACK, (2,))}.get(schedule, (1,)):
            for stages in range(chunks, 9, chunks):
                for replicas in (1, 2, 4, 8):
                    positions, microbatches = stages // chunks, BATCH // replicas
                    rounds = -(-microbatches // positions)
                    even = microbatches % rounds == 0 or schedule != "interleaved-1f1b"
                    if positions * replicas <= RANKS and even:
                        yield How(stages, schedule, chunks, replicas)


def every() -> list[tuple[str, How]]:
    """Of each model, stepping both ways; the optimistic one computes attention again, where weight gradients are not
    put off."""
    whole = ("gpipe", "1f1b", "interleaved-1f1b")
    again = [
        replace(how, optimizer="optimistic", recompute="attention" if how.schedule in whole else "none")
        for how in layouts()
    ]
    return [(model, how) for model in MODELS for how in (*layouts(), *again)]


def sampled() -> list[tuple[str, How]]:
    """A few of all, drawn until nothing is missing: every number of stages, of replicas, schedule, step and model."""
    source, everything = random.Random(SEED), every()
    fields = ("stages", "schedule", "replicas", "optimizer")
    wanted = {(f, getattr(how, f)) for _, how in everything for f in fields}
    while True:
        drawn = source.sample(everything, SAMPLE)
        seen = {(f, getattr(how, f)) for _, how in drawn for f in fields}
        if seen == wanted and {(model, how.replicas > 1) for model, how in drawn} == {
            (model, several) for model in MODELS for several in (False, True)
        }:
            return sorted(drawn, key=str)


def train(folder: Path, model: str, how: How) -> Gang:
    precision, sizes = MODELS[model]
    return train_in(
        folder,
        {"layers": 8} | sizes,
        how,
        ranks=how.stages // how.chunks * how.replicas,
        steps=STEPS,
        batch=BATCH,
        sequence=SEQUENCE,
        precision=precision,
        classifier_chunk=8,
        reduction_groups=GROUPS,
        optimizer={
            "name": "muon" if "muon" in model else "adamw",
            "lr": 3e-3,
            "clip": 100.0 if "llama" in model else 0.5,  # never, and in each step
        },
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process that all others must equal."""

    @cache
    def of(model: str) -> Gang:
        return train(tmp_path_factory.mktemp("one"), model, How(1, "1f1b", 1, 1))

    return of


def assert_same(one: Any, folder: Path, model: str, how: How) -> None:
    """And the folder is gone, unless they differ: a dump of all ranks takes up to 200 MB."""
    assert_equal_runs(train(folder, model, how), one(model), STEPS, ("loss", "grad_norm", "lr", "tokens"))
    shutil.rmtree(folder)


@pytest.mark.parametrize(("model", "how"), sampled(), ids=str)
def test_a_sample_of_layouts(one: Any, tmp_path: Path, model: str, how: How) -> None:
    assert_same(one, tmp_path, model, how)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "how"), every(), ids=str)
def test_every_layout(one: Any, tmp_path: Path, model: str, how: How) -> None:
    assert_same(one, tmp_path, model, how)
