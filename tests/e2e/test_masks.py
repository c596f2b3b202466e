"""Masks: tokens whose prediction does not count. The engine, whole, against the float64 reference, and the same bits in
other layouts; a mask that counts everything is none. Bounds are those of the golden runs (golden_runs).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoint.store import open_store
from flows.drive.live import load_evaluations
from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang, from_hf, to_hf
from tests.e2e.golden_runs import GRADIENT, LOSS, WEIGHTS, model_of, spec_of, worst
from tests.e2e.layout_runs import assert_equal_runs
from tests.reference.golden import Golden
from tests.reference.model import train as train_reference
from tests.support.place import LEARNT, Place
from trainer.plan.compile import compile_plan
from trainer.spec import parse_spec, what_digest

STEPS, BATCH = 4, 4
TOLD = ("loss", "grad_norm", "counted", "sums")
LAYOUTS: list[dict[str, Any]] = [
    {"stages": 3, "schedule": "zb-h1", "threads": 2},
    {"stages": 3, "schedule": "zb-h1", "optimizer": "optimistic"},
    {"stages": 2, "schedule": "1f1b", "replicas": 2, "recompute": "layer"},
    {"stages": 2, "schedule": "1f1b", "vocab_stages": 2},
]


def batches_of(golden: Golden) -> NDArray[np.int64]:
    """Tokens [steps, B, T+1], B such that two replicas have as much."""
    samples = golden.batches.reshape(-1, golden.batches.shape[-1])
    return samples[: STEPS * BATCH].reshape(STEPS, BATCH, -1)


def counts_of(batches: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of the tokens [steps, B, T+1]: some in a row, in step 2 none of a sample, in step 3 none, in step 4 one."""
    counts = np.random.default_rng(5).random(batches.shape) < 0.4
    counts[1, 0] = False
    counts[2] = False
    counts[2, :, 0] = True  # the first token of a sample is nobody's target
    counts[3] = False
    counts[3, 1, 7] = True
    return counts


def train(folder: Path, counts: NDArray[np.bool_] | None, **parallel: Any) -> Gang:
    golden = Golden("gpt2-tied")
    tree = spec_of(golden, 1).model_dump(mode="json")
    tree["train"] |= {"steps": STEPS, "batch": BATCH, "schedule": {"kind": "constant"}, "vocab_blocks": 2}
    tree["parallel"] |= parallel
    batches = batches_of(golden)
    samples = batches.reshape(-1, batches.shape[-1])
    told = None if counts is None else counts.reshape(samples.shape)
    dataset = engine_runs.write_samples(folder / "data", samples, tree["model"]["vocab"], told)
    spec = parse_spec(tree).resolve(dataset)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    weights = engine_runs.weights_file(plan, from_hf(spec.model, golden.weights32), folder / "weights")
    return engine_runs.train(plan, folder / "data", folder / "run", weights=weights)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Gang]:
    """The masked run on one stage, once a process."""
    golden = Golden("gpt2-tied")
    return functools.cache(lambda: train(tmp_path_factory.mktemp("one"), counts_of(batches_of(golden))))


def test_what_counts_is_what_the_reference_counts(one: Callable[[], Gang]) -> None:
    golden, gang = Golden("gpt2-tied"), one()
    batches = batches_of(golden)
    counts = counts_of(batches)
    weights = golden.weights()
    losses, norms = train_reference(golden.config, weights, batches, golden.optimizer, counts)
    np.testing.assert_allclose(gang.losses, losses, rtol=LOSS)
    np.testing.assert_allclose(gang.norms, norms, rtol=GRADIENT)
    assert [event["counted"] for event in gang.steps] == counts[:, :, 1:].sum((1, 2)).tolist()
    assert (gang.losses[2], gang.norms[2]) == (0.0, 0.0)
    after = to_hf(model_of(golden), gang.weights(STEPS))
    for name, theirs in weights.items():
        ours = after[name]
        if name.endswith("attn.c_attn.bias"):  # of the keys' third rounding is all that there is (golden_runs)
            ours, theirs = (np.delete(x, np.s_[len(x) // 3 : 2 * len(x) // 3]) for x in (ours, theirs))
        assert worst(ours, theirs) < WEIGHTS, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_other_layouts_have_the_same_bits(one: Callable[[], Gang], layout: dict[str, Any], tmp_path: Path) -> None:
    many = train(tmp_path, counts_of(batches_of(Golden("gpt2-tied"))), **layout)
    assert_equal_runs(many, one(), STEPS, TOLD)


def test_a_mask_that_counts_everything_is_none(tmp_path: Path) -> None:
    shape = batches_of(Golden("gpt2-tied")).shape
    gangs = [train(tmp_path / str(n), counts) for n, counts in enumerate((None, np.ones(shape, bool)))]
    assert_equal_runs(gangs[1], gangs[0], STEPS, ("loss", "grad_norm", "sums", "tokens"))
    assert not any("counted" in event for gang in gangs for event in gang.steps)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "muon"), ("fp8", "adamw")], ids=lambda word: word
)
def test_a_step_in_which_nothing_counts_moves_no_weight(precision: str, optimizer: str, tmp_path: Path) -> None:
    """Also the first one, before there are moments; it is said once."""
    model = {"family": "gpt2", "layers": 2, "width": 32, "heads": 2, "context": 16, "vocab": 48}
    tree = engine_runs.bits_tree("masks", model, precision, STEPS, 16, {"threads": 1})
    tree["data"]["shuffled"] = False
    tree["train"]["optimizer"] |= {"name": optimizer, "weight_decay": 0.1}
    rng = np.random.default_rng(3)
    samples, counts = rng.integers(0, 48, (6 * STEPS, 17)), np.zeros((6 * STEPS, 17), bool)
    counts[6:18] = True
    dataset = engine_runs.write_samples(tmp_path / "data", samples, 48, counts)
    spec = parse_spec(tree).resolve(dataset)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    begun = {tensor.name: rng.normal(0, 0.1, tensor.shape).astype(np.float32) for tensor in plan.tensors}
    weights = engine_runs.weights_file(plan, begun, tmp_path / "weights")
    gang = engine_runs.train(plan, tmp_path / "data", tmp_path / "run", weights=weights)
    assert [event["loss"] > 0 for event in gang.steps] == [False, True, True, False]
    assert [event.get("counted") for event in gang.steps] == [0, None, None, 0]
    states = [gang.weights(step) for step in range(1, STEPS + 1)]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, begun[name], name)
        assert (states[1][name] != value).any()
        np.testing.assert_array_equal(states[3][name], states[2][name], name)
        assert np.isfinite(states[3][name]).all()
    words = (tmp_path / "run" / "stderr-0").read_text()
    assert words.count("no token of this step counts") == 1


@pytest.mark.slow
def test_a_run_of_prompts_and_answers(tmp_path: Path) -> None:
    """The command, from JSON lines to a validation loss: another layout, data that come ahead and steps computed again
    have its bits; it has learnt something of what counts."""
    ends = {}
    for name, sets in (("one", ()), ("many", ("parallel.stages=2", "parallel.replicas=2", "data.cache_gib=0.001"))):
        place = Place(tmp_path / name, LEARNT.replace("stages = 2\n", ""))
        chats = [{"q": f"what is {n} and {n}? " * (1 + n % 3), "a": f"{n} and {n} is {2 * n}."} for n in range(400)]
        (place.folder / "corpus" / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        data = ("source=jsonl:corpus/*.jsonl", "prompt_field=q", "field=a", "validation=0.1")
        try:
            ends[name] = place.train(*(f"data.{key}" for key in data), "validation.every=5", *sets)
            if name == "many":
                place.run("replay", ends[name]["run"], "--from", "20", "--to", "24")
        finally:
            place.stop_all()
    assert ends["one"]["run"] == ends["many"]["run"]
    assert ends["one"]["state_digest"] == ends["many"]["state_digest"]
    store = open_store((tmp_path / "many" / "store").as_uri())
    known = load_evaluations(store, ends["many"]["run"])
    newest = known.rows[max(known.rows)]
    assert newest.loss is not None
    assert newest.loss < math.log(300) - 0.5  # that of a guess, for the vocabulary of LEARNT
