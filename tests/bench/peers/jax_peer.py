"""JAX's side of a case: a process that trains on the CPU, some steps whenever it is asked.

    PYTHONPATH=tests/gpu/peers python jax_peer.py CASE

CASE: JSON of ``cases.py``. Its model is that of ``tests/gpu/peers/jax_train.py``: one jitted step with donated buffers.
A line of JSON when the first step is done; then, for each line ``N`` of stdin, one with what N steps took. Imports
nothing of this project else.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_train import make, step_of


def main() -> int:
    case: dict[str, Any] = json.loads(sys.argv[1])
    dtype = jnp.float32 if case["variant"] == "fp32" else jnp.bfloat16
    data = np.load(case["data"]).astype(np.int32)
    tree = make(case["model"])
    m, v = (jax.tree.map(jnp.zeros_like, tree) for _ in range(2))
    step = step_of(case["model"], 1, None, dtype, case["unrolled"])
    at = 0

    def one() -> float:
        nonlocal tree, m, v, at
        batch = data[at % len(data)][None]
        at += 1
        tree, m, v, loss = step(tree, m, v, float(at), batch[:, :, :-1], batch[:, :, 1:])
        jax.block_until_ready(tree)
        return float(loss)

    def say(**facts: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(facts | {"peak_mib": peak}), flush=True)

    say(losses=[one()], version=jax.__version__)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            began = time.perf_counter()
            losses.append(one())
            seconds.append(time.perf_counter() - began)
        say(losses=losses, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
