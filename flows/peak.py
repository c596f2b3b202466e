"""What this machine can do, measured in a moment: the yardstick of MFU and of the plan's time on the CPU.

MFU here = model FLOP/s / (FLOP/s of NumPy's fp32 matrix product on the same cores, measured when a run starts). Model FLOPs a
token: 6 * weights in matrix products + 6 * layers * sequence * width (causal attention).
"""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np

from trainer.spec import ModelSpec


def flops_per_token(model: ModelSpec, sequence: int) -> float:
    """Training FLOPs of a token, forward and backward, by the formula in the module's text."""
    heads, groups, size = model.heads, model.groups, model.size_of_head
    attention = model.width * size * (heads + 2 * groups) + heads * size * model.width
    mlp = (2 if model.family == "gpt2" else 3) * model.width * model.size_of_hidden
    weights = model.layers * (attention + mlp) + model.vocab * model.width
    return 6.0 * weights + 6.0 * model.layers * sequence * heads * size


@lru_cache(maxsize=1)
def measured_peak(seconds: float = 0.3, size: int = 1024) -> float:
    """FLOP/s of the best fp32 product of two size x size matrices within about so many seconds."""
    a = np.ones((size, size), dtype=np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


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
