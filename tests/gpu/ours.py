"""Our side of the figures: the engine trains a workload on the device; what it took, from its own step lines."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang
from tests.gpu import box
from tests.gpu.workloads import Workload, plan_of
from trainer.plan.compiled import Plan

DEADLINE_S = 200.0
LOOK_S = 0.25


class Memory:
    """The most memory of the first device that was in use while somebody looked, less what was before, in MiB."""

    def __init__(self) -> None:
        self.before = self.used()
        self.most = self.before
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @staticmethod
    def used() -> float:
        smi, gpus = shutil.which("nvidia-smi"), box.driver().get("devices")
        if smi is None or not gpus:
            return 0.0
        command = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", f"GPU-{gpus[0]['uuid']}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout.strip()
        return float(said) if done.returncode == 0 and said.isdigit() else 0.0  # [N/A] where it does not say

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self.most = max(self.most, self.used())

    @property
    def mib(self) -> float | None:
        """None: nothing was seen (no nvidia-smi)."""
        return self.most - self.before if self.most > self.before else None


@contextmanager
def watched() -> Iterator[Memory]:
    """Looks at the device's memory meanwhile."""
    memory = Memory()
    memory._thread.start()
    try:
        yield memory
    finally:
        memory._over.set()
        memory._thread.join()


@dataclass(frozen=True)
class Trained:
    """What training took."""

    step_s: float  # median, without the warm-up
    spread: float  # of the steps: (slowest - fastest) / median
    start_s: float  # from before the process to the end of its first step
    memory_mib: float | None
    planned_mib: float
    losses: tuple[float, ...]

    def told(self, w: Workload) -> dict[str, Any]:
        """As it is kept."""
        return {
            "tokens_per_s": w.tokens / self.step_s,
            "step_ms": self.step_s * 1e3,
            "spread": self.spread,
            "start_s": self.start_s,
            "memory_mib": self.memory_mib,
            "planned_mib": self.planned_mib,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }


def gang_of(
    plan: Plan, folder: Path, *, kernel_path: str = "cuda", dump: bool = False, weights: Path | None = None,
    algorithms: Path | None = None,
) -> Gang:  # fmt: skip
    """The engine on the device, to the plan's end. ``algorithms``: the file of a run's choice (wire/algorithms.h),
    which the ranks of a gang without an agent keep in its folder: taken from there before, and put back afterwards.
    """
    engine, work = Path(os.environ["HOTSTAGE_ENGINE"]), folder / "run"
    work.mkdir(parents=True, exist_ok=True)
    if algorithms is not None and algorithms.exists():
        shutil.copyfile(algorithms, work / "algorithms")
    gang = engine_runs.train(
        plan, folder / "data", work, kernel_path=kernel_path, device="cuda", engine=engine, dump=dump, weights=weights,
        deadline_s=DEADLINE_S,
    )  # fmt: skip
    if algorithms is not None and (work / "algorithms").exists():
        shutil.copyfile(work / "algorithms", algorithms)
    return gang


def trained(w: Workload, precision: str, *, algorithms: Path | None = None) -> Trained:
    """One run of the workload; ``algorithms`` as for :func:`gang_of`."""
    with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
        folder = Path(scratch)
        plan = plan_of(w, precision, w.warm + w.steps, folder)
        with watched() as memory:
            began = time.time()
            gang = gang_of(plan, folder, algorithms=algorithms)
    steps = [float(event["step_us"]) / 1e6 for event in gang.steps[w.warm :]]
    middle = statistics.median(steps)
    position = plan.positions[0]
    return Trained(
        step_s=middle,
        spread=(max(steps) - min(steps)) / middle,
        start_s=float(gang.steps[0]["time"]) - began,
        memory_mib=memory.mib,
        planned_mib=(position.total_bytes - position.bytes_by_kind["slots"]) / 2**20,
        losses=tuple(gang.losses),
    )
