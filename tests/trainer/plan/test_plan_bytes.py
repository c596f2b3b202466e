"""Plan files stay equal, byte for byte: their digests against a table that was recorded once.

The table (tests/golden/plans.json) has one digest a spec. It covers the presets, the golden models and small specs with
1 to 8 stages, both schedules, 1 to 64 microbatches and both precisions. A digest here leaves out what the account of
memory calls "other", because that follows the kernels' workspace and the size of the process, which are measured.

A change that is meant to alter plans says so in CHANGELOG.md and records the table again:
``python -m tests.trainer.plan.test_plan_bytes``.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer import models, wire
from trainer.dataset import DatasetRef
from trainer.plan import Plan, compile_plan
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec

GOLDEN = Path(__file__).parents[2] / "golden"
TABLE = GOLDEN / "plans.json"
DATA = DatasetRef("ab" * 32, 300, 2, (100_000, 5_000), "cd" * 32)
MICROBATCHES = (1, 2, 3, 5, 8, 13, 16, 33, 64)
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 9, "width": 32, "heads": 4, "context": 64},
    "llama": {"family": "llama", "layers": 11, "width": 48, "heads": 6, "kv_heads": 2, "context": 64, "tied": False},
    "qwen3": {"family": "qwen3", "layers": 8, "width": 32, "heads": 4, "kv_heads": 2, "head_size": 16, "context": 64},
}


def small(
    model: str, stages: int, schedule: str, microbatches: int, precision: str, groups: int = 1, replicas: int = 1
) -> RunSpec:
    """A spec of tiny layers."""
    train = {"steps": 10, "batch": 2 * microbatches, "microbatch": 2, "sequence": 16, "precision": precision}
    train["reduction_groups"] = groups
    parallel = {"stages": stages, "schedule": schedule, "replicas": replicas}
    return parse_spec({"name": "small", "model": SMALL[model], "train": train, "parallel": parallel})


def cases(every: bool = False) -> Iterator[tuple[str, RunSpec, Literal["train", "infer"]]]:
    """Name, spec and mode of each row of the table; ``every``: all combinations, for a comparison by hand."""
    for name, text in PRESETS.items():
        yield f"preset {name}", parse_spec(tomllib.loads(text)), "train"
        for stages, precision in itertools.product((1, 2, 3), ("fp32", "bf16")):
            sets = (f"parallel.stages={stages}", f"train.precision={precision}", "launch.nodes=1")
            yield f"preset {name}, {stages}, {precision}", parse_spec(tomllib.loads(text), sets), "train"
    for folder in sorted(GOLDEN.iterdir()):
        if (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text())
            model = models.family(config["model_type"]).from_hf_config(config).model_dump()
            for stages in range(1, min(3, model["layers"]) + 1):
                train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16, "reduction_groups": 1}
                parallel = {"stages": stages, "threads": 1}
                tree = {"name": "golden", "model": model, "train": train, "parallel": parallel}
                yield f"golden {folder.name}, {stages}", parse_spec(tree), "train"
            yield f"golden {folder.name}, inference", parse_spec(tree), "infer"
    for name in SMALL:
        yield f"{name}, 3, 1f1b, 4, fp8", small(name, 3, "1f1b", 4, "fp8"), "train"
        yield f"{name}, fp8, inference", small(name, 1, "1f1b", 4, "fp8"), "infer"
        for groups, replicas in ((8, 1), (8, 2), (8, 8)):
            yield (
                f"{name}, 2, 1f1b, 16, bf16, {groups} groups, {replicas} replicas",
                small(name, 2, "1f1b", 16, "bf16", groups, replicas),
                "train",
            )
    grid = itertools.product(SMALL, range(1, 9), ("1f1b", "gpipe"), MICROBATCHES, ("fp32", "bf16"))
    for number, case in enumerate(grid):
        if every or number % 7 == 0:  # 7 divides none of the axes, so every value meets every other
            yield ", ".join(str(value) for value in case), small(*case), "train"


def compiled(spec: RunSpec, mode: Literal["train", "infer"]) -> Plan:
    """The plan of a spec on the outline of a dataset."""
    dataset = DATA if not spec.model.vocab else DatasetRef("ab" * 32, spec.model.vocab, 4, (100_000,), "cd" * 32)
    resolved = spec.resolve(dataset)
    return compile_plan(resolved, dataset, bytes(range(32)), mode)


def lasting(data: bytes) -> str:
    """Digest of a plan file without the measured part of its account and without its own digest."""
    out = bytearray(data)
    header = wire.PlanHeader.from_buffer(out)
    header.digest[:] = bytes(32)
    section = header.section[wire.SECTIONS.index("positions")]
    for number in range(section.count):
        position = wire.PlanPosition.from_buffer(out, section.offset + number * ctypes.sizeof(wire.PlanPosition))
        position.bytes_by_kind[wire.MEMORY_KINDS.index("other")] = 0
    return hashlib.sha256(out).hexdigest()[:16]


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    return dict(json.loads(TABLE.read_text()))


def test_plans_have_the_bytes_of_old(table: dict[str, str]) -> None:
    seen = {name: lasting(compiled(spec, mode).to_bytes()) for name, spec, mode in cases()}
    assert sorted(seen) == sorted(table)
    assert [name for name, digest in seen.items() if digest != table[name]] == []


if __name__ == "__main__":
    TABLE.write_text(json.dumps({n: lasting(compiled(s, m).to_bytes()) for n, s, m in cases()}, indent=0) + "\n")
