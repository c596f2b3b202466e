"""Each product of a step on one thread: ours, and PyTorch's (oneDNN, MKL), as parts of what a core can do.

What differs: ours of NT adds a bias and a residual, of NN and TN adds to what is there, of TN in float32; PyTorch's
writes the product alone, in bf16 where the operands are. Operands of both lie in huge pages.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.bench_kernels import build
from tests.bench.peers.calibrate import Peak
from tests.bench.peers.cases import gemms
from tests.bench.peers.sides import KEEP_MEMORY, ROOT, python_of
from tests.bench.results import entry
from tests.engine.kernel_lib import fastest_path

KERNELS = {"nt": "linear_fwd", "nn": "linear_igrad", "tn": "linear_wgrad"}
REPEATS = 7


def our_name(precision: str, variant: str, m: int, n: int, k: int) -> str:
    """As bench_kernels.c calls it: by rows, outputs, inputs of the linear map."""
    rows, out, into = {"nt": (m, n, k), "nn": (m, k, n), "tn": (k, m, n)}[variant]
    return f"{KERNELS[variant]} {'bf16 ' if precision == 'bf16' else ''}{rows}x{out}x{into}"


def gemm_rows(names: Sequence[str], rounds: int, now: Callable[[], Peak]) -> Iterator[dict[str, Any]]:
    """Two rows a product: ``calibrated-peak`` (a fraction of it) and ``torch``; warm, by the processor's clock."""
    script = ROOT / "tests" / "bench" / "peers" / "torch_gemm.py"
    command = [str(python_of("torch")), str(script)]
    with (
        tempfile.TemporaryDirectory(prefix="hotstage-peers-") as folder,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **KEEP_MEMORY}
        ) as torch,
    ):
        assert torch.stdin is not None
        assert torch.stdout is not None
        program = build(fastest_path(), Path(folder))
        for name in names:
            precision, variant, m, n, k = gemms()[name]
            operations = 2.0 * m * n * k
            mine, theirs, peaks = [], [], []
            for _ in range(rounds):
                peaks.append(now().one[precision])
                told = subprocess.run(
                    [str(program), "1", str(REPEATS), our_name(precision, variant, m, n, k)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                mine.append(operations / json.loads(told.stdout)["warm"])
                torch.stdin.write(f"{precision} {variant} {m} {n} {k} {REPEATS}\n")
                torch.stdin.flush()
                theirs.append(operations / float(torch.stdout.readline()))
            peaks.append(now().one[precision])
            around = [max(pair) for pair in itertools.pairwise(peaks)]
            share = statistics.median(a / b for a, b in zip(mine, around, strict=True))
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            value = statistics.median(mine) / 1e9
            yield entry(name, value, "GFLOP/s", "calibrated-peak", value / share) | {"rounds": mine}
            yield entry(name, value, "GFLOP/s", "torch", value / ratio) | {"rounds": theirs}
        torch.stdin.close()
