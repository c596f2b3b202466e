"""What this machine can do, measured in a moment: the yardstick of MFU and of the plan's time on the CPU.

MFU here = model FLOP/s / (FLOP/s of NumPy's fp32 matrix product on the cores this process may use). Model FLOPs are
those of ``trainer/plan/flops.py``: a token's are 6 * weights in matrix products + 6 * layers * (sequence + 1) * width
(causal attention).

The product is timed in CPU time of single-threaded workers that run side by side, one a core: so the yardstick is what
the cores do while they work, also on a machine that is busy with other things, and it does not move with its load.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import lru_cache

import numpy as np

from trainer.cores import usable_cpus

_WORKERS = 16  # at most; what one core does stands for the others above that
_PROGRAM = """
import sys, time
import numpy as np
size, seconds = int(sys.argv[1]), float(sys.argv[2])
a = np.ones((size, size), dtype=np.float32)
b, c = a.copy(), a.copy()
best, end = 0.0, time.perf_counter() + seconds
while best == 0.0 or time.perf_counter() < end:
    start = time.thread_time()
    np.matmul(a, b, out=c)
    spent = time.thread_time() - start
    best = max(best, 2.0 * size**3 / spent) if spent > 0 else best
sys.stdout.write(f"{best!r}")
"""


@lru_cache(maxsize=1)
def measured_peak(seconds: float = 0.4, size: int = 768) -> float:
    """FLOP/s of fp32 products of size x size matrices on every CPU that this process may use, summed."""
    cores = usable_cpus()
    workers = min(cores, _WORKERS)
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP", "BLIS")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(size), str(seconds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command; these end by themselves
            env={**os.environ, **one_thread},
        )
        for _ in range(workers)
    ]
    return sum(float(worker.communicate()[0]) for worker in running) * cores / workers


@lru_cache(maxsize=1)
def measured_bandwidth(size: int = 64 << 20) -> float:
    """Bytes a second of a large copy (read and written), best of three."""
    source = np.ones(size // 8, dtype=np.float64)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2.0 * size / (time.perf_counter() - start))
    return best
