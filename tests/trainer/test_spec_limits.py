"""What a spec may hold as it likes, such as a pod's patch: as much, as deep, of such values as a record takes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_spec import refusal, tree
from trainer.errors import SpecError
from trainer.spec import (
    MAX_HOW_BYTES,
    how_map,
    load_spec,
    parse_spec,
)
from trainer.wire.packed import RECORD_DEPTH, pack

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
