"""A rank takes the memory that its plan says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import engine_runs
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest


@pytest.mark.parametrize(
    ("stages", "precision", "chunks", "schedule"),
    [
        (1, "fp32", 1, "1f1b"),
        (2, "fp32", 1, "1f1b"),
        (2, "bf16", 1, "1f1b"),
        (4, "fp32", 2, "interleaved-1f1b"),
        (1, "fp8", 1, "1f1b"),
    ],
)
def test_resident_memory_is_what_the_plan_foretold(
    tmp_path: Path, stages: int, precision: str, chunks: int, schedule: str
) -> None:
    """Also where a rank has two stages."""
    samples = np.random.default_rng(0).integers(0, 4000, (4, 65))
    data = engine_runs.write_samples(tmp_path / "data", samples, 4096)
    spec = parse_spec(
        {
            "name": "memory",
            "model": {"family": "gpt2", "layers": 4, "width": 256, "heads": 4, "context": 64},
            "train": {"steps": 2, "batch": 4, "microbatch": 1, "sequence": 64, "precision": precision},
            "parallel": {"stages": stages, "chunks": chunks, "schedule": schedule, "threads": 1},
            "checkpoint": {"every": 0},
        }
    ).resolve(data)
    plan = compile_plan(spec, data, what_digest(spec, data))
    gang = engine_runs.train(plan, tmp_path / "data", tmp_path / "run", dump=False)
    first = plan.positions[0]
    told = first.total_bytes - first.bytes_by_kind["slots"] - first.bytes_by_kind["channels"]  # no agent, no slots
    assert gang.steps[-1]["rss_bytes"] == pytest.approx(told, rel=0.05)
