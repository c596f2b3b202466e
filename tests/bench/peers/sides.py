"""Who trains in a case: a peer's process that waits between samples, and our engine, started for each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k8s.images.static import ROOT, cache, environment_of
from tests.bench.peers.cases import Training, Variant
from tests.e2e.engine_runs import train

# torch is served only as the build for GPUs: 0.5 GB and 3 GB of libraries that a CPU has no use for
PINS = {
    "torch": ("torch==2.15.0", "numpy==2.4.4", "setuptools==80.9.0"),
    "jax": ("jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.4"),
}
# what frees and takes the same memory each step keeps it, in huge pages: worth some percent to torch
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def python_of(peer: str) -> Path:
    """The interpreter of an environment of its own that has the peer; made on first use (minutes)."""
    return environment_of(f"peer-{peer}", PINS[peer]) / "bin" / "python"


@dataclass(frozen=True)
class Sample:
    """Of some steps in a row."""

    seconds: float  # a step, median
    losses: tuple[float, ...]


class Peer:
    """A process of PyTorch or JAX. ``started`` seconds from before the process to the end of its first step."""

    def __init__(
        self, training: Training, variant: Variant, threads: int, data: Path, environment: Mapping[str, str],
        weights: Path | None = None,
    ):  # fmt: skip
        self.variant = variant
        case = training.for_peer(variant, threads, data) | ({"weights": str(weights)} if weights else {})
        script = ROOT / "tests" / "bench" / "peers" / f"{variant.peer}_peer.py"
        command = [str(python_of(variant.peer)), str(script), json.dumps(case)]
        of_all = {"PYTHONPATH": str(ROOT / "tests" / "gpu" / "peers"), "PYTHONWARNINGS": "ignore"}
        of_all |= {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        began = time.monotonic()
        inherited = {**os.environ, **of_all, **environment}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited
        )
        first = self._line()
        self.started = time.monotonic() - began
        self.version, self.first_loss = str(first["version"]), float(first["losses"][0])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else sys.exit(f"{self.variant.name} ended; see above")
        return told

    def sample(self, steps: int) -> Sample:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        told = self._line()
        return Sample(statistics.median(told["seconds"]), tuple(told["losses"]))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def peer_on(
    training: Training, variant: Variant, threads: int, data: Path, environment: Mapping[str, str],
    weights: Path | None = None,
) -> Iterator[Peer]:  # fmt: skip
    """A peer that trains on these tokens, from these weights or its own."""
    found = Peer(training, variant, threads, data, environment, weights)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def peer(
    training: Training, variant: Variant, threads: int, *, cold: bool = False, plain: bool = False
) -> Iterator[Peer]:
    """``cold``: nothing that was compiled before is used. ``plain``: as the peer comes, memory kept as it likes."""
    with tempfile.TemporaryDirectory(prefix="hotstage-peer-") as name:
        data = Path(name) / "data.npy"
        training.write_data(data)
        kept = Path(name) if cold else cache() / "peers-compiled"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(kept), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0" if cold else "1"}
        with peer_on(training, variant, threads, data, environment | ({} if plain else KEEP_MEMORY)) as found:
            yield found


class Ours:
    """The engine, anew for each sample; its plan and data lie in ``folder``."""

    def __init__(self, training: Training, threads: int, folder: Path) -> None:
        self.folder = folder
        self.plan = training.plan(1 + training.steps, threads, folder)

    def sample(self) -> Sample:
        gang = train(self.plan, self.folder / "data", self.folder / "run", dump=False, deadline_s=600.0)
        seconds = statistics.median(float(step["step_us"]) for step in gang.steps[1:]) / 1e6
        return Sample(seconds, tuple(gang.losses))
