"""RunSpec: the three ways in, the two halves, and every refusal with value, limit and mend."""

from __future__ import annotations

import io
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.presets import PRESETS, for_cuda
from trainer.spec import (
    RunSpec,
    _standard_input,
    load_spec,
    parse_spec,
    what_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = DatasetRef("ab" * 32, 300, 2, (10_000, 5_000), "cd" * 32)


def tree(**over: Any) -> dict[str, Any]:
    """A small valid spec as plain values; ``over`` replaces whole keys by dotted name with ``__``."""
    value: dict[str, Any] = {
        "name": "small",
        "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64},
        "train": {"steps": 10, "batch": 8, "microbatch": 2, "sequence": 16},
    }
    for key, item in over.items():
        node = value
        *sections, last = key.split("__")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = item
    return value


def refusal(value: dict[str, Any], sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(value, sets)
    assert caught.value.exit_code == 78
    return str(caught.value)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"checkpoint__keep": {"last": 1}}, ["checkpoint.keep.last", "1", "2"]),
        ({"checkpoint__keep": {"newest": 1}}, ["checkpoint.keep.newest"]),
        ({"model__widht": 3}, ["model.widht", "unknown key", "did you mean width?"]),
        ({"lr": 1.0}, ["unknown key", "train.optimizer.lr"]),
        ({"train__batch": -4}, ["train.batch -4", "at least 1", "raise it"]),
        ({"parallel__device": "gpu"}, ["parallel.device 'gpu'", "'auto'", "'cpu'", "'cuda'"]),
        (
            {"parallel__device": "cpu", "launch__kernel_path": "cuda-exact"},
            [
                "launch.kernel_path 'cuda-exact' does not run on parallel.device 'cpu'",
                "take kernel_path 'auto'",
                "'cuda'",
            ],
        ),
        (
            {"parallel__device": "cuda", "launch__kernel_path": "avx2"},
            ["'avx2' does not run on parallel.device 'cuda'", "one of cuda-exact, cuda", "device 'cpu'"],
        ),
        ({"train__sequence": 8.5}, ["train.sequence 8.5", "whole number"]),
        ({"train__sequence": "long"}, ["train.sequence 'long'", "whole number"]),
        ({"model__layers": True}, ["model.layers True", "whole number"]),
        ({"model__heads": 5}, ["heads 5", "width 32", "heads = 4"]),
        ({"model__layers": 10_001}, ["model.layers 10001", "at most 10000", "lower it"]),
        ({"launch__memory_gib": 1e300}, ["launch.memory_gib 1e+300", "at most 1048576", "lower it"]),
        ({"parallel__stages": 5}, ["parallel.stages 5", "model.layers 4", "at most 4 stages"]),
        ({"train__microbatch": 3}, ["batch 8", "microbatch 3", "microbatch = 2"]),
        ({"train__sequence": 65}, ["train.sequence 65", "model.context 64", "shorten"]),
        ({"model__family": "bert"}, ["'bert'", "gpt2, llama"]),
        ({"model__kv_heads": 2}, ["kv_heads 2", "as many", "llama"]),
        ({"model__family": "llama", "model__kv_heads": 3}, ["kv_heads 3", "divide heads 4"]),
        ({"model__family": "llama", "model__head_size": 7}, ["head size 7", "odd", "even"]),
        ({"model__tied": "yes please"}, ["model.tied 'yes please'", "true or false"]),
        ({"train__precision": "fp16"}, ["train.precision 'fp16'", "'fp32', 'bf16' or 'fp8'"]),
        (
            {"train__precision": "fp8", "model__width": 40},
            ['"fp8"', "multiples of 16", "transformer.h.{layer}.attn.c_attn.weight is 120 x 40", '"bf16"'],
        ),
        (
            {"train__precision": "fp8", "train__sequence": 19, "train__microbatch": 4},
            ['"fp8"', "multiple of 16", "microbatch 4 * sequence 19 is 76"],
        ),
        ({"train__optimizer": {"lr": 0}}, ["train.optimizer.lr 0", "above 0"]),
        ({"train__optimizer": {"lr": True}}, ["train.optimizer.lr True is not a number"]),
        ({"train__optimizer": {"lr": 1e-3, "clip": False}}, ["train.optimizer.clip False is not a number"]),
        ({"data__dedupe": {"near": True}}, ["data.dedupe.near True is not a number"]),
        ({"launch__resources": {"cpu": True}}, ["launch.resources.cpu True is not a string in quotes"]),
        ({"train__optimizer": {"lr": float("nan")}}, ["train.optimizer.lr", "finite"]),
        ({"train__optimizer": {"lr": 1e-3, "min_lr": 1e-2}}, ["min_lr 0.01", "above lr 0.001"]),
        ({"train__optimizer": {"momentum": 0.9}}, ["momentum 0.9 is muon's", "beta1", "name = 'muon'"]),
        ({"train__optimizer": {"name": "muon", "momentum": 1.0}}, ["momentum 1.0", "below 1"]),
        ({"train__optimizer": {"name": "lion"}}, ["name 'lion' is unknown", "'adamw' or 'muon'"]),
        ({"train__schedule": {"warmup": 11}}, ["warmup 11", "steps 10"]),
        ({"train__reduction_groups": 3}, ["reduction_groups 3", "no power of two", "take reduction_groups = 2"]),
        (
            {"train__reduction_groups": 8},
            ["reduction_groups 8", "divide the step's 4 microbatches", "reduction_groups = 4", "a multiple of 16"],
        ),
        (
            {"train__reduction_groups": 4, "train__batch": 12},
            ["reduction_groups 4", "divide the step's 6 microbatches", "reduction_groups = 2", "a multiple of 8"],
        ),
        ({"parallel__replicas": 3}, ["replicas 3", "no power of two", "take replicas = 2 or 4"]),
        (
            {"parallel__replicas": 4, "train__batch": 12},
            ["replicas 4", "divide the 6 microbatches", "replicas = 2", "multiple of 8"],
        ),
        (
            {"parallel__replicas": 4, "train__reduction_groups": 2},
            ["replicas 4", "the 2 groups", "replicas = 2", "reduction_groups = 4", "changes the bits"],
        ),
        ({"parallel__replicas": 2, "train__reduction_groups": 1}, ["replicas 2", "the 1 group of", "replicas = 1"]),
        ({"recovery__layouts": 3}, ["recovery.layouts 3 is not a list in brackets"]),
        (
            {"parallel__recompute": {"kind": "layer", "layers": "x"}},
            ["recompute.layers 'x' is not a whole number", "recompute.layers 'x' is not a list in brackets"],
        ),
        (
            {"train__max_batch_tokens": 100},
            ["batch 8 * sequence 16 is 128 tokens", "max_batch_tokens is 100", "batch = 6"],
        ),
        ({"parallel__recompute": "some"}, ["parallel.recompute.kind 'some'", "'none', 'elementwise'", "'layer'"]),
        ({"parallel__recompute": {"layers": 1}}, ['kind is "none"', "take a kind, or leave layers out"]),
        ({"parallel__recompute": {"kind": "layer", "layers": -1}}, ["layers -1", "from 0 to 10000"]),
        (
            {"parallel__recompute": {"kind": "layer", "layers": [1, 1]}},
            ["2 numbers", "there are 1 stages", "one for all"],
        ),
        (
            {
                "parallel": {"stages": 2, "recompute": {"kind": "layer", "layers": [1, 1]}},
                "recovery__layouts": [{"stages": 1}],
            },
            ["recovery.layouts[0] (1 stage ", "2 numbers"],
        ),
        ({"data__source": "ftp:x"}, ["'ftp:x'", "text:<glob>"]),
        ({"name": "Not A Label"}, ["name 'Not A Label'", "lower-case letters", "at most 40"]),
        ({"name": "a" * 41}, ["name"]),
        ({"launch__nodes": 3}, ["launch.nodes 3", "1 ranks", "take nodes = 1"]),
        ({"train": 3}, ["train 3", "section"]),
        ({"recovery__allowed_stages": [5]}, ["recovery.allowed_stages 5 (5 stages x 1", "at most 4 stages"]),
        (
            {"parallel__stages": 4, "recovery__layouts": [{"stages": 2}, {"stages": 2, "nodes": 4}]},
            [
                "recovery.layouts[1] (2 stages x 1 replica on 4 nodes)",
                "4 does not divide the 2 ranks",
                "take nodes = 2",
            ],
        ),
        (
            {"train__reduction_groups": 2, "recovery__layouts": [{"replicas": 4}]},
            ["recovery.layouts[0] (1 stage x 4 replicas on 4 nodes)", "the 2 groups", "changes the bits"],
        ),
        ({"recovery__layouts": [{"stags": 2}]}, ["recovery.layouts.0.stags", "did you mean stages?"]),
        ({"recovery__layouts": [{"stages": 0}]}, ["recovery.layouts.0.stages 0", "at least 1"]),
        ({"recovery": {"layouts": [{}], "allowed_stages": [1]}}, ["allowed_stages", "give one of the two"]),
    ],
)
def test_refusal_names_value_limit_and_mend(over: dict[str, Any], words: list[str]) -> None:
    text = refusal(tree(**over))
    for word in words:
        assert word in text, text


def test_every_problem_has_a_line() -> None:
    text = refusal(tree(model__widht=3, train__batch=-4, parallel__stages=0))
    assert len(text.splitlines()) == 3


def test_a_missing_section_is_named() -> None:
    value = tree()
    del value["train"]
    assert "train is missing" in refusal(value)


def test_sets_override_and_find_their_section() -> None:
    spec = parse_spec(tree(), ["train.steps=20", "train.lr=1e-2", "name=other", "data.shuffled=false", "stages=2"])
    assert (spec.train.steps, spec.train.optimizer.lr, spec.name) == (20, 1e-2, "other")
    assert spec.data.shuffled is False
    assert spec.parallel.stages == 2
    assert parse_spec(tree(), ["parallel.recompute='layer'"]).parallel.recompute.of_stage(0) is None
    layers = parse_spec(tree(), ["parallel.recompute=layer", "parallel.recompute.layers=[2]"]).parallel.recompute
    assert (layers.of_stage(0), RunSpec.model_validate(tree()).parallel.recompute.of_stage(0)) == (2, 0)
    assert parse_spec(tree(), ["launch.resources.cpu='4'"]).launch.resources == {"cpu": "4"}


def test_quantities_are_text_or_numbers_and_their_names_hold_dots() -> None:
    sets = ["launch.resources.cpu=2", "launch.resources.limits.cpu=+4", "launch.resources.nvidia.com/gpu=1"]
    launch = parse_spec(tree(), [*sets, "launch.agent_resources.cpu=0.5", "launch.node_selector.a.b/c=d"]).launch
    assert launch.resources == {"cpu": "2", "limits.cpu": "4", "nvidia.com/gpu": "1"}
    assert (launch.agent_resources, launch.node_selector) == ({"cpu": "0.5"}, {"a.b/c": "d"})
    assert parse_spec(tree(launch={"resources": {"memory": 1e3, "cpu": "500m"}})).launch.resources == {
        "memory": "1000.0",
        "cpu": "500m",
    }


def test_null_leaves_a_key_out() -> None:
    value = tree(data={"tokenizer": "t.json", "end_token": "x"}, checkpoint={"keep": {"last": 3}})
    spec = parse_spec(value, ["data.tokenizer=null", "data.end_token=null", "checkpoint.keep=null"])
    assert (spec.data.tokenizer, spec.checkpoint.keep) == (None, None)
    assert parse_spec(tree(), ['data.tokenizer="null"']).data.tokenizer == "null"
    assert "train.steps is missing" in refusal(tree(), ("train.steps=null",))


def test_minus_zero_is_zero() -> None:
    """A run's name is of the bytes, and -0.0 has others."""
    zero, minus = (parse_spec(tree(), [f"train.optimizer.weight_decay={text}"]) for text in ("0.0", "-0.0"))
    assert what_bytes(zero, DATA) == what_bytes(minus, DATA)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("model.widht=3", "did you mean model.width?"),  # and no key of another meaning
        ("nonsense", "section.key=value"),
        ("train.steps=3\ntrain.seed=4", "more follows the value of one key"),  # it was passed over
        ("train.seed=1979-05-27", "train.seed 1979-05-27 (a date or time) is not a whole number"),
        ('"train.stepz"=3', "did you mean train.steps"),
        ("zzz.qqq=1", "hotstage schema"),
    ],
)
def test_a_wrong_set_is_refused(text: str, words: str) -> None:
    assert words in refusal(tree(), (text,))


def test_sets_do_not_change_the_callers_tree() -> None:
    value = tree()
    parse_spec(value, ["train.steps=20"])
    assert value == tree()


def test_a_spec_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, as `plan` reads it: for the spec, and for its cluster."""
    text = PRESETS["gpt2-demo"].encode()
    for data in (b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), b""):
        _standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        if data:
            assert load_spec("-", ["train.steps=700"]) == load_spec("-", ["train.steps=700"])
        else:
            with pytest.raises(SpecError, match="standard input is empty, and '-' reads a spec from it"):
                load_spec("-")
    _standard_input.cache_clear()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        load_spec(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(SpecError, match="is not TOML"):
        load_spec(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="it is UTF-16, not text in UTF-8; save it as UTF-8; a spec is a TOML file"):
        load_spec(tmp_path / "binary.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    assert "#" in path.read_text()
    load_spec(path)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_load(name: str) -> None:
    spec = parse_spec(tomllib.loads(PRESETS[name]), origin=name)
    assert spec.train.steps > 0
    gpu = parse_spec(tomllib.loads(for_cuda(PRESETS[name])), origin=name)
    assert (gpu.parallel.device, gpu.train.classifier_chunk) == ("cuda", 4096)


def test_examples_are_the_presets_of_their_name() -> None:
    for file, preset in (("demo", "gpt2-demo"), ("gpt2-124m", "gpt2-124m"), ("llama-tiny", "llama-tiny")):
        assert (ROOT / "examples" / f"{file}.toml").read_text() == PRESETS[preset]


def test_resolve_fills_the_vocabulary_and_refuses_one_too_small() -> None:
    spec = parse_spec(tree())
    assert spec.resolve(DATA).model.vocab == 300
    assert spec.resolve(DATA).resolve(DATA) == spec.resolve(DATA)
    assert parse_spec(tree(model__vocab=512)).resolve(DATA).model.vocab == 512
    with pytest.raises(SpecError, match=r"model\.vocab 299 is smaller"):
        parse_spec(tree(model__vocab=299)).resolve(DATA)


def test_resolve_refuses_text_too_short_for_a_sample() -> None:
    short = DatasetRef("ab" * 32, 300, 2, (16, 16), "cd" * 32)
    with pytest.raises(SpecError, match="needs a shard of 17 tokens"):
        parse_spec(tree()).resolve(short)


def test_two_cadences_and_the_key_that_is_short_for_both() -> None:
    def cadences(*sets: str) -> tuple[int, int]:
        checkpoint = parse_spec(tree(), [f"checkpoint.{text}" for text in sets]).checkpoint
        return checkpoint.in_memory, checkpoint.in_store

    assert cadences("every=7") == (7, 7)
    assert cadences("snapshot_every=10") == (10, 100)
    assert cadences("snapshot_every=10", "persist_every=40") == (10, 40)
    assert cadences("every=0", "snapshot_every=10") == cadences("snapshot_every=10", "persist_every=0") == (10, 0)
    for sets, words in (
        (("snapshot_every=30",), "every 100 is no multiple of snapshot_every 30.*take persist_every = 90"),
        (("snapshot_every=30", "persist_every=40"), "persist_every 40 is no multiple.*take persist_every = 30"),
        (("persist_every=10",), "persist_every 10 is no multiple of snapshot_every 100.*take persist_every = 100"),
        (("snapshot_every=0",), "every 100 with snapshot_every 0.*take snapshot_every = 100, or persist_every = 0"),
    ):
        with pytest.raises(SpecError, match=f"checkpoint.*{words}"):
            cadences(*sets)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ('train.optimizer="muon"', r"train\.optimizer is a section; set a key of it: name, lr, "),
        ("checkpoint=5", r"checkpoint is a section; set a key of it: every, .*keep\.last"),
        ("train.optimizer.kind=1", r"no key train\.optimizer\.kind; did you mean .* \(train\.optimizer has name, lr, "),
        ("train.sed=1", r"no key train\.sed; did you mean train\.seed\?$"),
    ],
)
def test_a_wrong_set_tells_what_the_section_has(asked: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_spec(tree(), [asked])


def test_schema_describes_every_key() -> None:
    schema = RunSpec.model_json_schema()
    assert schema["additionalProperties"] is False
    assert {"model", "data", "train", "parallel", "checkpoint", "launch", "recovery"} <= set(schema["properties"])


def test_a_dumped_spec_reads_back() -> None:
    recompute = {"kind": "attention", "layers": [1]}
    spec = parse_spec(tree(launch__pod_patch={"spec": {"nodeName": "a"}}, parallel__recompute=recompute))
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ranks_are_positions_in_every_replica(replicas: int) -> None:
    spec = parse_spec(tree(parallel__replicas=replicas, parallel__stages=2, launch__nodes=replicas))
    assert spec.parallel.ranks == 2 * replicas
