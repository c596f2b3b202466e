"""Documents in one sequence, and windows: the engine, whole, against the float64 reference that has each document
alone, and the same bits in other layouts. Bounds are those of the golden runs (golden_runs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang, from_hf, to_hf
from tests.e2e.golden_runs import GRADIENT, LOGITS, LOSS, model_of, spec_of, worst
from tests.reference.golden import Golden
from tests.reference.model import Model
from trainer.dataset import DatasetRef
from trainer.plan.compile import compile_plan
from trainer.spec import RunSpec, parse_spec, what_digest

END = 2
CASES = {
    "learned positions": ("gpt2-tied", "within", {}),
    "rotary positions": ("qwen3-tied", "within", {}),
    "a window": ("llama-gqa-untied", "across", {"family": "mistral", "window": 5}),
    "both": ("llama-gqa-untied", "within", {"family": "mistral", "window": 4}),
}
LAYOUTS: list[dict[str, Any]] = [
    {"stages": 3, "schedule": "zb-h1", "threads": 2},
    {"stages": 3, "schedule": "1f1b", "replicas": 2, "recompute": "layer"},
    {"stages": 2, "chunks": 2, "schedule": "interleaved-1f1b"},
]


def batch_of(golden: Golden) -> NDArray[np.int64]:
    """The first batch, with ends of documents: in a row, at the first place and the last."""
    batch = golden.batches[0].copy()
    batch[batch == END] = END + 1
    batch[0, [0, 5, 6]] = END
    batch[1, [9, -2]] = END
    return batch


def spec_and_data(golden: Golden, case: str, folder: Path, **parallel: Any) -> tuple[RunSpec, DatasetRef]:
    _, packing, more = CASES[case]
    tree = spec_of(golden, 1).model_dump(mode="json")
    tree["model"] = model_of(golden).model_dump() | more
    tree["data"]["packing"] = packing
    tree["train"] |= {"steps": 1, "schedule": {"kind": "constant"}}
    tree["parallel"] |= parallel
    dataset = engine_runs.write_samples(folder / "data", batch_of(golden), tree["model"]["vocab"])
    dataset = replace(dataset, eot=END)
    return parse_spec(tree).resolve(dataset), dataset


def train(golden: Golden, case: str, folder: Path, **parallel: Any) -> Gang:
    spec, dataset = spec_and_data(golden, case, folder, **parallel)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    weights = engine_runs.weights_file(plan, from_hf(spec.model, golden.weights32), folder / "weights")
    return engine_runs.train(plan, folder / "data", folder / "run", weights=weights)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Gang]:
    """A case trained on one stage, once a process."""
    return functools.cache(lambda case: train(Golden(CASES[case][0]), case, tmp_path_factory.mktemp("one")))


def alone(golden: Golden, case: str, tokens: NDArray[np.int64]) -> Iterator[tuple[int, slice, Model]]:
    """Each document of a batch [B, T+1] as a sequence of its own: its row, its places, and the model on it."""
    _, packing, more = CASES[case]
    config = replace(golden.config, window=more.get("window", 0))
    for row, line in enumerate(tokens):
        ends = [int(t) + 1 for t in np.flatnonzero(line[:-1] == END)] if packing == "within" else []
        borders = sorted({0, *ends, len(line) - 1})
        for begin, stop in pairwise(borders):
            at = slice(begin, stop)
            yield row, at, Model(config, golden.weights(), line[None, at], line[None, begin + 1 : stop + 1])


@pytest.mark.parametrize("case", CASES)
def test_each_document_is_as_if_alone(one: Callable[[str], Gang], case: str, tmp_path: Path) -> None:
    golden = Golden(CASES[case][0])
    gang = one(case)
    batch = batch_of(golden)
    loss, grads = 0.0, {name: np.zeros_like(w) for name, w in golden.weights().items()}
    for _, at, model in alone(golden, case, batch):
        share = (at.stop - at.start) / batch[:, 1:].size
        loss += share * model.loss
        for name, grad in model.backward().items():
            grads[name] += share * grad
    assert gang.losses == [pytest.approx(loss, rel=LOSS)]
    assert gang.losses != [pytest.approx(Model(golden.config, golden.weights(), batch[:, :-1], batch[:, 1:]).loss)]
    ours = to_hf(spec_and_data(golden, case, tmp_path)[0].model, gang.grads(1))
    for name, theirs in grads.items():
        assert worst(ours[name], theirs) < GRADIENT, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_other_layouts_have_the_same_bits(one: Callable[[str], Gang], layout: dict[str, Any], tmp_path: Path) -> None:
    """Middle stages read tokens themselves: nothing of borders is sent."""
    case = "both" if "chunks" not in layout else "learned positions"
    first, many = one(case), train(Golden(CASES[case][0]), case, tmp_path, **layout)
    assert all(p.tokens_offset is not None for p in many.plan.positions)
    assert (many.losses, many.norms) == (first.losses, first.norms)
    for what in ("grads", "weights"):
        ours = getattr(many, what)(1)
        for name, value in getattr(first, what)(1).items():
            np.testing.assert_array_equal(ours[name], value, f"{what}: {name}")


@pytest.mark.parametrize("case", ["learned positions", "both"])
def test_inference_keeps_to_documents_and_windows(case: str, tmp_path: Path) -> None:
    golden = Golden(CASES[case][0])
    spec, dataset = spec_and_data(golden, case, tmp_path)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset), mode="infer")
    weights = engine_runs.weights_file(plan, from_hf(spec.model, golden.weights32), tmp_path / "weights")
    batch = batch_of(golden)
    logits = engine_runs.infer(plan, weights, batch[:, None, :-1], tmp_path)
    for row, at, model in alone(golden, case, batch):
        assert worst(logits[row, 0, at], model.logits[0]) < LOGITS
