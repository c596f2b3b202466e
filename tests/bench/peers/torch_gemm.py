"""oneDNN's and MKL's side of the products, through PyTorch, on one thread.

    python torch_gemm.py

For a line ``PRECISION VARIANT M N K ROUNDS`` of stdin, a line with the median of its processor seconds, operands warm.
Variants are as a linear map has them: nt, x times the transposed weights; nn, the gradient of x; tn, that of the
weights.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch


def main() -> int:
    torch.set_num_threads(1)
    for line in sys.stdin:
        precision, variant, *sizes = line.split()
        m, n, k, rounds = map(int, sizes)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a = torch.randn(*((k, m) if variant == "tn" else (m, k)), dtype=dtype)
        b = torch.randn(*((n, k) if variant == "nt" else (k, n)), dtype=dtype)
        out = torch.empty(m, n, dtype=dtype)
        left, right = a.T if variant == "tn" else a, b.T if variant == "nt" else b
        took = []
        for _ in range(rounds + 1):
            began = time.thread_time()
            torch.mm(left, right, out=out)
            took.append(time.thread_time() - began)
        print(statistics.median(took[1:]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
