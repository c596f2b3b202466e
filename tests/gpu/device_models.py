"""Tiny models and the golden ones trained on the device: the CPU's losses, and equal bits over stages, schedules
and run to run. One body for a GPU and for the emulated library.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import engine_runs
from tests.e2e.golden_runs import assert_agrees, compile_golden, model_of, spec_of
from tests.engine.plans import GPT2, LLAMA, small_plan
from tests.gpu.ours import gang_of
from tests.gpu.snapshot import rank_with_slots, slots
from tests.reference.golden import CASES, Golden

ENGINE = Path(os.environ.get("HOTSTAGE_ENGINE", ""))
MODELS = {"gpt2": GPT2, "llama": LLAMA}
FEW = os.environ.get("HOTSTAGE_GPU_CASES", "all") != "all"  # the rehearsal: what differs, once
LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"stages": 1},
    "2": {"stages": 2},
    "2-gpipe": {"stages": 2, "schedule": "gpipe"},
    "2x2": {"stages": 4, "chunks": 2, "schedule": "interleaved-1f1b"},
}
LOSSES = {"cuda-exact": 1e-5, "cuda": 2e-2}  # against the CPU's; tensor cores round other sums


class Runs:
    """What training gives by (model, precision, layout), each trained once, or again where that is asked for."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.path, self.count = folder, path, 0

    def state(self, model: str, precision: str, layout: str, *, device: bool = True) -> dict[str, Any]:
        """Losses, norms and the last step's weights."""
        self.count += 1
        folder = self.folder / str(self.count)
        sizes = MODELS[model] | {"layers": 2 if FEW else 4}
        plan = small_plan(
            folder, model=sizes, parallel=LAYOUTS[layout], batch=4 if FEW else 8, steps=3, precision=precision
        )
        if device:
            choice = self.folder / f"algorithms-{model}-{precision}"
            gang = gang_of(plan, folder, kernel_path=self.path, dump=True, algorithms=choice)
        else:
            gang = engine_runs.train(plan, folder / "data", folder / "run", engine=ENGINE)
        weights = gang.weights(3)
        tensors = {name: weights[name].tobytes() for name in sorted(weights)}
        return {"losses": gang.losses, "norms": gang.norms} | tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, path: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("models"), path)


@pytest.mark.parametrize("precision", ["bf16"] if FEW else ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["llama"] if FEW else sorted(MODELS))
def test_one_bit_pattern(runs: Runs, model: str, precision: str) -> None:
    """Run to run, over stages and schedules; and the CPU's losses."""
    first = runs.state(model, precision, "1")
    here = runs.state(model, precision, "1", device=False)
    assert first["losses"] == pytest.approx(here["losses"], rel=LOSSES[runs.path])
    for layout in ("2",) if FEW else ("1", "2", "2-gpipe", "2x2"):
        again = runs.state(model, precision, layout)
        differs = [name for name in first if first[name] != again[name]]
        assert not differs, f"layout {layout} gives other {', '.join(differs)}"


def test_resume(tmp_path: Path, path: str) -> None:
    """Four steps, and two and then two from the slot: the same bits."""
    plan = small_plan(tmp_path, steps=4, schedule={"kind": "constant"})
    choice: list[bytes] = []

    def dumped(name: str, fds: tuple[int, ...], start: int, stop: int) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        with rank_with_slots(plan, folder, fds, kernel_path=path, start=start, stop=stop, dump=True, algorithms=choice):
            return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".grads", ".weights")}

    with slots(2, 1 << 20) as fds:
        whole = dumped("whole", fds, -1, 4)
    with slots(2, 1 << 20) as fds:
        parts = dumped("first", fds, -1, 2) | dumped("second", fds, 2, 4)
    assert len(whole) == 8
    assert parts == whole


@pytest.mark.skipif(FEW, reason="the rehearsal is short")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stages", [1, 2])
def test_golden(path: str, tmp_path: Path, case: str, stages: int) -> None:
    """Hugging Face's losses, norms, gradients and weights, in fp32, within the bounds that the CPU keeps."""
    golden = Golden(case)
    spec = spec_of(golden, stages)
    plan = compile_golden(golden, spec, tmp_path)
    weights = engine_runs.weights_file(plan, engine_runs.from_hf(spec.model, golden.weights32), tmp_path / "weights")
    gang = gang_of(plan, tmp_path, kernel_path=path, dump=True, weights=weights)
    assert_agrees(golden, gang, model_of(golden))
