"""JAX's side of a case: a process that trains on the CPU, some steps whenever it is asked.

    PYTHONPATH=tests/gpu/peers python jax_peer.py CASE

CASE: JSON of ``cases.py``. Its model is that of ``tests/gpu/peers/jax_train.py``: one jitted step with donated buffers.
Asked as ``answering.py`` says. Imports nothing of this project else.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from answering import answer
from jax_train import make, step_of


def read(path: str) -> dict[str, Any]:
    """Weights that were written for it: those of layers, stacked, as ``layers.NAME``."""
    tree: dict[str, Any] = {"layers": {}}
    with np.load(path) as kept:
        for name in kept.files:
            folder, _, own = name.rpartition(".")
            (tree["layers"] if folder else tree)[own] = jnp.asarray(kept[name])
    return tree


def main() -> int:
    case: dict[str, Any] = json.loads(sys.argv[1])
    dtype = jnp.float32 if case["variant"] == "fp32" else jnp.bfloat16
    data = np.load(case["data"]).astype(np.int32)
    tree = read(case["weights"]) if case.get("weights") else make(case["model"])
    m, v = (jax.tree.map(jnp.zeros_like, tree) for _ in range(2))
    step = step_of(case["model"], 1, None, dtype, case["unrolled"], case["optimizer"])
    at = 0

    def one() -> float:
        nonlocal tree, m, v, at
        batch = data[at % len(data)][None]
        at += 1
        tree, m, v, loss = step(tree, m, v, float(at), batch[:, :, :-1], batch[:, :, 1:])
        jax.block_until_ready(tree)
        return float(loss)

    return answer(one, jax.__version__)


if __name__ == "__main__":
    sys.exit(main())
