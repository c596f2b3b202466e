"""The head with its vocabulary in blocks: right, and the same bits whatever holds the blocks.

A golden run agrees with transformers and with the float64 reference for every number of blocks; and of each number of
blocks all layouts give the losses, norms, gradients and weights of one process.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import engine_runs, test_resumes
from tests.e2e.engine_runs import Gang
from tests.e2e.golden_runs import assert_agrees, assert_agrees_with_reference, spec_of, train_golden
from tests.e2e.layout_runs import assert_equal_runs, train_in
from tests.reference.golden import CASES, Golden
from trainer.errors import SpecError
from trainer.plan.compile import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import parse_spec, what_digest

SEED = int(os.environ.get("HOTSTAGE_SEED", "11"))
BLOCKS = (2, 4, 8)
STEPS, SEQUENCE, BATCH, SAMPLE = 3, 16, 8, 12

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 tied, bf16": ("bf16", {"family": "gpt2", "width": 48, "heads": 4, "vocab": 250, "tied": True}),
    "llama untied, fp32": (
        "fp32",
        {"family": "llama", "width": 32, "heads": 4, "kv_heads": 2, "hidden": 64, "vocab": 250, "tied": False},
    ),
    # a head of ten blocks of the digest, in pieces where there are replicas
    "gpt2 tied, pieces": ("fp32", {"family": "gpt2", "width": 104, "heads": 4, "vocab": 10_403, "tied": True}),
}


@dataclass(frozen=True)
class How:
    """A layout."""

    stages: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    replicas: int = 1
    vocab_stages: int = 1

    def __str__(self) -> str:
        return f"{self.stages} stages {self.schedule}/{self.chunks} x {self.replicas}, head at {self.vocab_stages}"


def layouts() -> Iterator[How]:
    for schedule, chunks in (("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved-1f1b", 2), ("zb-v", 2)):
        for stages in (1, 2, 3, 4):
            for replicas in (1, 2, 4):
                for shared in (1, 2, 4):
                    if stages * chunks <= 4 and stages * replicas <= 8 and shared <= stages:
                        yield How(stages * chunks, schedule, chunks, replicas, shared)


def every() -> list[tuple[str, int, How]]:
    return [
        (model, blocks, how) for model in MODELS for blocks in BLOCKS for how in layouts() if how.vocab_stages <= blocks
    ]


def sampled() -> list[tuple[str, int, How]]:
    """A few of all, drawn until nothing is missing: every model, schedule, number of replicas and of parts."""
    source, everything = random.Random(SEED), every()

    def seen(drawn: list[tuple[str, int, How]]) -> set[object]:
        kinds = {(f, getattr(how, f)) for _, _, how in drawn for f in ("schedule", "replicas", "vocab_stages")}
        return {*kinds, *((model, how.replicas > 1, how.vocab_stages > 1) for model, _, how in drawn)}

    while len(seen(drawn := source.sample(everything, SAMPLE))) < len(seen(everything)) - 3:
        pass
    return sorted(drawn, key=str)


def train(folder: Path, model: str, blocks: int, how: How) -> Gang:
    precision, sizes = MODELS[model]
    return train_in(
        folder,
        {"layers": 4} | sizes,
        how,
        steps=STEPS,
        batch=BATCH,
        sequence=SEQUENCE,
        precision=precision,
        classifier_chunk=6,  # rows are not a multiple of it
        reduction_groups=4,
        vocab_blocks=blocks,
        optimizer={"lr": 3e-3, "clip": 0.5},
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process that all others must equal."""

    @cache
    def of(model: str, blocks: int) -> Gang:
        return train(tmp_path_factory.mktemp("one"), model, blocks, How())

    return of


def assert_same(one: Any, folder: Path, model: str, blocks: int, how: How) -> None:
    assert_equal_runs(train(folder, model, blocks, how), one(model, blocks), STEPS, ("loss", "grad_norm"))
    shutil.rmtree(folder)


@pytest.mark.parametrize(("model", "blocks", "how"), sampled(), ids=str)
def test_a_sample_of_layouts(one: Any, tmp_path: Path, model: str, blocks: int, how: How) -> None:
    assert_same(one, tmp_path, model, blocks, how)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "blocks", "how"), every(), ids=str)
def test_every_layout(one: Any, tmp_path: Path, model: str, blocks: int, how: How) -> None:
    assert_same(one, tmp_path, model, blocks, how)


class World(test_resumes.World):
    """Real runs of a head in four blocks, and their checkpoints."""

    def plan(self, how: Any) -> Plan:
        assert self.data
        vocab = test_resumes.VOCAB
        model = {"family": "gpt2", "layers": 4, "width": 16, "heads": 2, "context": 32, "vocab": vocab, "tied": False}
        tree = {
            "name": "resumes",
            "model": model,
            "train": {"steps": test_resumes.STEPS, "batch": 4, "microbatch": 1, "sequence": test_resumes.SEQUENCE}
            | {"reduction_groups": 4, "vocab_blocks": 4},
            "parallel": {"threads": 1, **vars(how)},
            "checkpoint": {"every": test_resumes.STEP},
        }
        spec = parse_spec(tree)
        return compile_plan(spec.resolve(self.dataset), self.dataset, what_digest(spec, self.dataset))


def test_a_resume_goes_from_each_head_into_each_other(tmp_path: Path) -> None:
    """At one rank, shared by all ranks, by some of them, in two replicas: one state."""
    world: Any = World(tmp_path)
    hows = [How(1), How(4, vocab_stages=4), How(3, "gpipe", vocab_stages=2), How(2, replicas=2, vocab_stages=2)]
    for source, target in zip(hows, [*hows[1:], hows[0]], strict=True):
        test_resumes.assert_equal(world, source, target)
        assert world.resume(source, target) == {test_resumes.STEPS: world.run(target)[test_resumes.STEPS]}
    assert len({world.checkpoint(how).state_digest for how in hows}) == 1


@pytest.mark.parametrize(("case", "blocks"), list(zip(CASES, (2, 4, 4, 8), strict=True)))
def test_training_agrees_with_transformers_and_the_reference(case: str, blocks: int, tmp_path: Path) -> None:
    golden = Golden(case)
    spec = spec_of(golden, stages=1)
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"vocab_blocks": blocks})})
    gang = train_golden(golden, spec, tmp_path)
    assert_agrees(golden, gang, spec.model)
    assert_agrees_with_reference(golden, gang, spec.model)


@pytest.mark.parametrize(
    ("blocks", "vocab", "told"),
    [
        (3, 250, "vocab_blocks 3 is no power of two; take vocab_blocks = 2 or 4"),
        (128, 250, "must be at most 64"),
        (8, 50, r"a vocabulary of 50 in blocks of multiples of 8 has fewer; take vocab_blocks = 4"),
    ],
)
def test_blocks_that_cannot_be_are_refused(blocks: int, vocab: int, told: str, tmp_path: Path) -> None:
    tree = {
        "name": "few",
        "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 8, "vocab": vocab},
        "train": {"steps": 1, "batch": 1, "microbatch": 1, "sequence": 8, "vocab_blocks": blocks},
    }
    tokens = np.zeros((1, 9), np.int64)
    dataset = engine_runs.write_samples(tmp_path, tokens, vocab)
    with pytest.raises(SpecError, match=told):
        parse_spec(tree).resolve(dataset)
