"""RunSpec: the three ways in, the two halves, and every refusal with value, limit and mend."""

from __future__ import annotations

import io
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.presets import PRESETS
from trainer.spec import (
    MAX_HOW_BYTES,
    RunSpec,
    _standard_input,
    how_map,
    load_spec,
    parse_spec,
    run_id,
    what_bytes,
    what_digest,
    what_map,
    with_how,
)
from trainer.spec_layouts import other_hows
from trainer.wire.packed import RECORD_DEPTH, pack

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
            with pytest.raises(SpecError, match="standard input: name is missing"):
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


def test_only_the_what_half_makes_the_identity() -> None:
    spec = parse_spec(tree())
    assert run_id(spec, DATA) == f"small-{what_digest(spec, DATA).hex()[:6]}"
    for same in ("parallel.stages=4", "checkpoint.every=1", "launch.trace=true", "recovery.backoff_s=2", "threads=2"):
        assert what_bytes(parse_spec(tree(), [same]), DATA) == what_bytes(spec, DATA)
    for other in ("train.steps=11", "train.lr=1e-3", "model.tied=false", "data.shuffled=false", "train.seed=1"):
        assert what_bytes(parse_spec(tree(), [other]), DATA) != what_bytes(spec, DATA)
    assert what_bytes(parse_spec(tree(), ["model.vocab=300"]), DATA) == what_bytes(spec, DATA)
    assert set(how_map(spec)) == {"parallel", "checkpoint", "launch", "recovery"}


def test_what_bytes_are_canonical() -> None:
    turned = dict(reversed(list(tree().items())))
    turned["model"] = dict(reversed(list(tree()["model"].items())))
    assert what_bytes(parse_spec(turned), DATA) == what_bytes(parse_spec(tree()), DATA)


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


def test_a_how_is_written_as_before_where_a_newer_key_is_not_used() -> None:
    """So that an older version reads it, and that a record's How still equals that of its spec."""
    assert set(how_map(parse_spec(tree()))["checkpoint"]) == {"every", "slots", "deadline_s", "commit_s"}
    used = parse_spec(tree(), ["checkpoint.snapshot_every=10"])
    assert how_map(used)["checkpoint"]["snapshot_every"] == 10
    assert parse_spec(tree() | how_map(used)) == used


def test_what_a_node_keeps_of_the_data_is_no_part_of_a_runs_name_and_follows_a_how() -> None:
    plain, cached = parse_spec(tree()), parse_spec(tree(), ["data.cache_gib=0.5"])
    assert run_id(plain, DATA) == run_id(cached, DATA)
    assert "data" not in how_map(plain)
    assert how_map(cached)["data"] == {"cache_gib": 0.5}
    what = {**plain.model_dump(mode="json"), "data": {"source": "text:x", "cache_gib": 7.0}}
    assert parse_spec(with_how(what, how_map(cached))).data.cache_gib == 0.5
    asked = parse_spec(with_how(what, how_map(plain)))
    assert (asked.data.cache_gib, asked.data.source) == (0.0, "text:x")
    several = parse_spec(tree(recovery={"allowed_stages": [1]}), ["data.cache_gib=0.5", "parallel.stages=2"])
    assert [how["data"] for how in other_hows(how_map(several))] == [{"cache_gib": 0.5}]


def test_a_key_that_is_gone_is_still_read() -> None:
    """Specs, the How of a log's records and Prefect's deployments of an older version hold it; it had no effect."""
    old = parse_spec(tree(recovery__max_rollbacks=3, recovery__backoff_s=2.0))
    assert old == parse_spec(tree(recovery__backoff_s=2.0))
    assert "max_rollbacks" not in how_map(old)["recovery"]
    with pytest.raises(SpecError, match=r"there is no key recovery\.max_rollbacks"):
        parse_spec(tree(), ["recovery.max_rollbacks=1"])


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


def test_a_key_that_came_later_is_not_written_at_its_default() -> None:
    """So the How of a spec without it has the bytes that an older version gives it."""
    plain, kept = parse_spec(tree()), parse_spec(tree(), ["checkpoint.keep.last=3", "checkpoint.keep.every_steps=1000"])
    assert "keep" not in how_map(plain)["checkpoint"]
    how = how_map(kept)
    assert how["checkpoint"]["keep"] == {"last": 3, "every_steps": 1000, "every_s": 0.0, "best": 0, "grace_s": 3600.0}
    assert parse_spec({**tree(), **how}) == kept
    assert parse_spec({**tree(), **how}, ["checkpoint.keep=all"]) == plain
    assert parse_spec({**tree(), **how}, ["checkpoint.keep=all", "checkpoint.keep.best=1"]).checkpoint.keep is not None
    assert parse_spec(tree(), ["checkpoint.keep={last=4}"]).checkpoint.keep == kept.checkpoint.keep.model_copy(  # type: ignore[union-attr]
        update={"last": 4, "every_steps": 0}
    )


def test_schema_describes_every_key() -> None:
    schema = RunSpec.model_json_schema()
    assert schema["additionalProperties"] is False
    assert {"model", "data", "train", "parallel", "checkpoint", "launch", "recovery"} <= set(schema["properties"])


def test_a_dumped_spec_reads_back() -> None:
    recompute = {"kind": "attention", "layers": [1]}
    spec = parse_spec(tree(launch__pod_patch={"spec": {"nodeName": "a"}}, parallel__recompute=recompute))
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


PATCH: dict[str, Any] = {
    "spec": {
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]},
                        {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n7"]}]},
                    ]
                }
            },
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": {
                            "labelSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["x"]}]},
                            "topologyKey": "kubernetes.io/hostname",
                        },
                    }
                ]
            },
        },
        "containers": [
            {
                "name": "engine",
                "env": [
                    {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
                    {"name": "B", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                ],
                "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(A)"}],
            }
        ],
        "volumes": [
            {
                "name": "v",
                "projected": {
                    "sources": [
                        {"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}}
                    ]
                },
            }
        ],
    }
}


def test_a_pods_whole_patch_is_taken() -> None:
    spec = parse_spec(tree(launch__pod_patch=PATCH))
    assert how_map(spec)["launch"]["pod_patch"] == PATCH


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"launch__pod_patch": nested(21)}, ["launch.pod_patch.a.a", "nested deeper than 20 levels", "flatten it"]),
        ({"launch__pod_patch": nested(3000)}, ["nested too deep"]),
        ({"launch__pod_patch": nested(200)}, ["nested deeper than 20 levels"]),
        ({"launch__pod_patch": {"x": "y" * MAX_HOW_BYTES}}, ["launch.pod_patch has 24", "24576", "shorten it"]),
        ({"launch__tolerations": [{"key": "k" * 100, "v": "x"}] * 300}, ["launch.tolerations has", "shorten it"]),
        ({"launch__node_selector": {f"label{n}": "x" * 60 for n in range(500)}}, ["launch.node_selector has"]),
        ({"launch__pod_patch": {"a": [1, float("nan")]}}, ["launch.pod_patch.a[1] nan is not a finite number"]),
        ({"launch__pod_patch": {"a": {"b": 1 << 64}}}, ["launch.pod_patch.a.b 18446744073709551616", "64 bits"]),
        ({"launch__pod_patch": {"a": "\ud800"}}, ["launch.pod_patch.a", "UTF-8"]),
        ({"launch__pod_patch": {"\udcff": 1}}, ["launch.pod_patch has the key", "UTF-8"]),
        ({"launch__tolerations": [{"since": tomllib.loads("v = 2026-01-01")["v"]}]}, ["is a date", "text in quotes"]),
    ],
)
def test_what_a_record_cannot_hold_is_refused_in_the_spec(over: dict[str, Any], words: list[str]) -> None:
    said = refusal(tree(**over))
    for word in words:
        assert word in said
    assert len(said) < 600


def test_values_too_deep_for_a_reader_are_refused(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    assert "nested" in refusal(tree(), (f"launch.pod_patch.a={deep}",))
    assert "nested" in refusal(tree(), ("launch.pod_patch" + ".a" * 3000 + "=1",))
    file = tmp_path / "deep.toml"
    file.write_text(f"[launch.pod_patch]\na = {deep}\n")
    with pytest.raises(SpecError, match="nested"):
        load_spec(file)


def test_the_largest_how_is_within_its_limit() -> None:
    spec = parse_spec(tree(launch__pod_patch={"x": "y" * 20_000}))
    assert len(pack(how_map(spec), RECORD_DEPTH)) <= MAX_HOW_BYTES


@pytest.mark.parametrize(("batch", "groups"), [(2, 1), (6, 1), (8, 4), (12, 2), (16, 8), (96, 8)])
def test_groups_are_eight_where_the_microbatches_allow(batch: int, groups: int) -> None:
    """And the What says how many, so that a later default changes no run."""
    spec = parse_spec(tree(train__batch=batch))
    assert spec.train.groups == groups
    assert what_map(spec, DATA)["train"]["reduction_groups"] == groups
    explicit = parse_spec(tree(train__batch=batch, train__reduction_groups=groups))
    assert run_id(spec, DATA) == run_id(explicit, DATA)
    assert spec.resolve(DATA).resolve(DATA) == spec.resolve(DATA)


def test_documents_apart_need_a_token_that_ends_them() -> None:
    """Windows and packing are What; where documents have no end, a spec that says nothing has the name of old (the
    digest below)."""
    apart, open_ = parse_spec(tree(data__packing="within")), parse_spec(tree())
    assert what_map(open_, DATA)["data"]["packing"] == "across"
    with pytest.raises(SpecError, match=r"without a token that ends one: .*data\.end_token.*packing = \"across\""):
        apart.resolve(DATA)
    ended = replace(DATA, eot=7)
    assert run_id(apart, ended) == run_id(open_, ended) != run_id(parse_spec(tree(data__packing="across")), ended)
    assert open_.resolve(ended).resolve(ended).data.packing == "within"
    words = refusal(tree(data__packing="within", data__end_token="", data__tokenizer="t.json"))
    assert 'data.packing "within" finds documents by the token' in words
    assert "'inside' is unknown; take one of 'across' or 'within'" in refusal(tree(data__packing="inside"))
    assert "window 9: family gpt2 reads all that came before" in refusal(tree(model__window=9))
    assert "model.window -1 must be at least 0" in refusal(tree(model__family="mistral", model__window=-1))
    windows = [parse_spec(tree(model__family="mistral", model__window=w)) for w in (0, 9)]
    assert "window" not in what_map(windows[0], DATA)["model"]
    assert what_map(windows[1], DATA)["model"]["window"] == 9


def test_one_group_and_a_limit_of_tokens_keep_the_names_of_old() -> None:
    """Digest of a What as it was before there were groups; the limit refuses, and is no part of what is trained."""
    old = parse_spec(tree(train__reduction_groups=1, train__max_batch_tokens=128))
    assert what_digest(old, DATA).hex() == "d608b1ad4af3daa1afb7423f04a675523b3ba898867fdaf5587d06ed845b40e3"
    assert run_id(parse_spec(tree()), DATA) != run_id(old, DATA)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ranks_are_positions_in_every_replica(replicas: int) -> None:
    spec = parse_spec(tree(parallel__replicas=replicas, parallel__stages=2, launch__nodes=replicas))
    assert spec.parallel.ranks == 2 * replicas
