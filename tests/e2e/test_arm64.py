"""The engine for arm64 gives the bits of the one for amd64: both static, the former under qemu's user emulation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from k8s.images.builder import machine
from k8s.images.static import static_engine
from tests.e2e.engine_runs import train, write_samples
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest

STEPS = 4
FAMILIES = {
    "gpt2": {"family": "gpt2", "layers": 4, "width": 64, "heads": 4, "context": 32},
    "llama": {"family": "llama", "layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "context": 32},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is the arm64 engine."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("no qemu-user here (on Debian: apt-get install qemu-user-static)")
    program = tmp_path_factory.mktemp("arm64") / "hotstage-engine"
    program.write_text(f'#!/bin/sh\nexec {qemu} {static_engine("arm64")} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_both_processors_end_with_the_same_bits(tmp_path: Path, emulated: Path, family: str, precision: str) -> None:
    spec = parse_spec(
        {
            "name": "tiny",
            "model": FAMILIES[family],
            "train": {
                "steps": STEPS,
                "batch": 4,
                "microbatch": 2,
                "sequence": 32,
                "precision": precision,
                "schedule": {"warmup": 1},
            },
            "parallel": {"stages": 2},
            "checkpoint": {"every": 0},
        }
    )
    samples = np.random.default_rng(0).integers(0, 300, (4 * STEPS, 33)).astype(np.int64)
    data = write_samples(tmp_path / "data", samples, 300)
    resolved = spec.resolve(data)
    plan = compile_plan(resolved, data, what_digest(resolved, data))
    here = train(plan, tmp_path / "data", tmp_path / "here", engine=static_engine(machine()))
    there = train(plan, tmp_path / "data", tmp_path / "there", engine=emulated)
    assert len(here.steps) == STEPS
    assert (there.losses, there.norms) == (here.losses, here.norms)
    dumps = sorted(path.name for path in here.folder.glob("*-*.weights")) + sorted(
        path.name for path in here.folder.glob("*-*.grads")
    )
    assert f"{STEPS}-1.weights" in dumps
    for name in dumps:
        assert (there.folder / name).read_bytes() == (here.folder / name).read_bytes(), name
