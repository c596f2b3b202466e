"""A rank takes the memory that its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import engine_runs
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("bf16", {"stages": 2}),
        ("fp8", {"stages": 1}),
        ("fp32", {"stages": 2, "schedule": "gpipe"}),
        ("fp32", {"stages": 2, "schedule": "gpipe", "recompute": "layer"}),
        ("fp32", {"stages": 4, "chunks": 2, "schedule": "interleaved-1f1b"}),
        ("fp32", {"stages": 2, "schedule": "zb-h1"}),
        ("fp32", {"stages": 4, "chunks": 2, "schedule": "zb-v"}),
        ("bf16", {"stages": 2, "replicas": 2}),
        ("fp32", {"stages": 1, "replicas": 8}),
    ],
    ids=lambda case: "-".join(map(str, case.values())) if isinstance(case, dict) else case,
)
def test_resident_memory_is_what_the_plan_foretold(tmp_path: Path, precision: str, parallel: dict[str, Any]) -> None:
    """Within 3 %: of the rank that tells it, the one with the most in flight under 1F1B. A rank's arena is whole from
    its start, so that what is resident after a step is the most that ever was.
    """
    samples = np.random.default_rng(0).integers(0, 4000, (8, 129))
    data = engine_runs.write_samples(tmp_path / "data", samples, 4096)
    spec = parse_spec(
        {
            "name": "memory",
            "model": {"family": "gpt2", "layers": 4, "width": 384, "heads": 4, "context": 128},
            "train": {"steps": 1, "batch": 8, "microbatch": 1, "sequence": 128, "precision": precision},
            "parallel": {"threads": 1} | parallel,
            "checkpoint": {"every": 0},
        }
    ).resolve(data)
    plan = compile_plan(spec, data, what_digest(spec, data))
    gang = engine_runs.train(plan, tmp_path / "data", tmp_path / "run", dump=False)
    first = plan.positions[0]
    told = first.total_bytes - first.bytes_by_kind["slots"] - first.bytes_by_kind["channels"]  # no agent, no slots
    assert gang.steps[-1]["rss_bytes"] == pytest.approx(told, rel=0.03)
