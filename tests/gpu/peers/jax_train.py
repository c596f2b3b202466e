"""JAX's side of the figures: the same model, batch and optimizer in one jitted step.

    python jax_train.py WORKLOAD [--steps N]

WORKLOAD: JSON of tests/gpu/workloads.py. bf16 products over fp32 masters, attention by ``jax.nn.dot_product_attention``
(cuDNN's where it takes the shapes), layers in a scan. Prints a line of JSON. Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from typing import Any

BEGAN = time.time()
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

BF16 = jnp.bfloat16
OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0}
"""As tests/gpu/workloads.py has it."""


def sizes(c: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, heads of keys, size of one."""
    return c["heads"], c.get("kv_heads") or c["heads"], c.get("head_size") or c["width"] // c["heads"]


def make(c: dict[str, Any]) -> dict[str, Any]:
    """fp32 weights; those of layers stacked."""
    rng = np.random.default_rng(0)
    heads, kv, size = sizes(c)
    n, w = c["layers"], c["width"]

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)

    qkv = (heads + 2 * kv) * size
    layers = {
        "qkv": normal(n, w, qkv),
        "out": normal(n, heads * size, w),
        "n1": jnp.ones((n, w)),
        "n2": jnp.ones((n, w)),
    }
    tree = {"tokens": normal(c["vocab"], w), "norm": jnp.ones(w)}
    if c["family"] == "gpt2":
        layers |= {"up": normal(n, w, 4 * w), "down": normal(n, 4 * w, w), "b_qkv": jnp.zeros((n, qkv))}
        layers |= {"b_out": jnp.zeros((n, w)), "b_up": jnp.zeros((n, 4 * w)), "b_down": jnp.zeros((n, w))}
        layers |= {"b1": jnp.zeros((n, w)), "b2": jnp.zeros((n, w))}
        tree |= {"places": normal(c["context"], w), "b_norm": jnp.zeros(w)}
    else:
        layers |= {"gate_up": normal(n, w, 2 * c["hidden"]), "down": normal(n, c["hidden"], w)}
    return tree | {"layers": layers}


def layernorm(x: Any, w: Any, b: Any) -> Any:
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return (y * w + b).astype(x.dtype)


def rmsnorm(x: Any, w: Any) -> Any:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5) * w).astype(x.dtype)


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


def loss_of(c: dict[str, Any], implementation: str | None, dtype: Any = BF16, unrolled: bool = False) -> Any:
    heads, kv, size = sizes(c)
    gpt2 = c["family"] == "gpt2"

    def attention(x: Any, p: dict[str, Any], rope: Any) -> Any:
        b, t, _ = x.shape
        y = x @ p["qkv"].astype(dtype)
        if gpt2:
            y = y + p["b_qkv"].astype(dtype)
        q, k, v = jnp.split(y, [heads * size, (heads + kv) * size], axis=-1)
        q, k, v = (z.reshape(b, t, -1, size) for z in (q, k, v))
        if rope is not None:
            q, k = (rotated(z, *rope) for z in (q, k))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        y = y.reshape(b, t, heads * size) @ p["out"].astype(dtype)
        return y + p["b_out"].astype(dtype) if gpt2 else y

    def layer(x: Any, p: dict[str, Any], rope: Any) -> Any:
        if gpt2:
            x = x + attention(layernorm(x, p["n1"], p["b1"]), p, rope)
            y = layernorm(x, p["n2"], p["b2"]) @ p["up"].astype(dtype) + p["b_up"].astype(dtype)
            return x + jax.nn.gelu(y) @ p["down"].astype(dtype) + p["b_down"].astype(dtype)
        x = x + attention(rmsnorm(x, p["n1"]), p, rope)
        gate, up = jnp.split(rmsnorm(x, p["n2"]) @ p["gate_up"].astype(dtype), 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ p["down"].astype(dtype)

    def loss(tree: dict[str, Any], tokens: Any, targets: Any) -> Any:
        t = tokens.shape[1]
        x = tree["tokens"].astype(dtype)[tokens]
        rope = None
        if gpt2:
            x = x + tree["places"].astype(dtype)[:t]
        else:
            angles = jnp.outer(jnp.arange(t), c["rope_base"] ** (-jnp.arange(0, size, 2) / size))[:, None, :]
            rope = jnp.cos(angles), jnp.sin(angles)
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p, rope), None), x, tree["layers"], unroll=unrolled)
        x = layernorm(x, tree["norm"], tree["b_norm"]) if gpt2 else rmsnorm(x, tree["norm"])
        logits = (x @ tree["tokens"].astype(dtype).T).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

    return loss


def decayed(tree: dict[str, Any]) -> dict[str, Any]:
    """Which weights decay: matrices and embeddings. Those of layers are stacked: there a bias has two dimensions."""
    own = {name: value.ndim >= 2 for name, value in tree.items() if name != "layers"}
    return own | {"layers": {name: value.ndim >= 3 for name, value in tree["layers"].items()}}


def step_of(
    c: dict[str, Any],
    parts: int,
    implementation: str | None,
    dtype: Any = BF16,
    unrolled: bool = False,
    optimizer: dict[str, float] | None = None,
) -> Any:
    """A jitted step of ``parts`` microbatches; products in ``dtype``."""
    o = optimizer or OPTIMIZER
    lr, beta1, beta2, decay = (o[name] for name in ("lr", "beta1", "beta2", "weight_decay"))
    loss = loss_of(c, implementation, dtype, unrolled)

    def step(tree: Any, m: Any, v: Any, n: Any, tokens: Any, targets: Any) -> Any:
        def one(carry: Any, batch: Any) -> Any:
            total, grads = carry
            value, more = jax.value_and_grad(loss)(tree, *batch)
            return (total + value / parts, jax.tree.map(lambda g, h: g + h / parts, grads, more)), None

        zero = jax.tree.map(jnp.zeros_like, tree)
        if parts == 1:
            total, grads = jax.value_and_grad(loss)(tree, tokens[0], targets[0])
        else:
            (total, grads), _ = jax.lax.scan(one, (jnp.zeros(()), zero), (tokens, targets))
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, o["clip"] / (norm + 1e-6))
        m = jax.tree.map(lambda a, g: beta1 * a + (1 - beta1) * g * scale, m, grads)
        v = jax.tree.map(lambda a, g: beta2 * a + (1 - beta2) * (g * scale) ** 2, v, grads)
        c1, c2 = 1 - beta1**n, 1 - beta2**n

        def moved(p: Any, a: Any, b: Any, decays: bool) -> Any:
            step = (a / c1) / (jnp.sqrt(b / c2) + 1e-8)
            return p - lr * (step + decay * p if decays else step)

        return jax.tree.map(moved, tree, m, v, decayed(tree)), m, v, total

    return jax.jit(step, donate_argnums=(0, 1, 2))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args()
    w: dict[str, Any] = json.loads(options.workload)
    c, steps = w["model"], options.steps or w["steps"]
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    parts, micro, t = w["batch"] // w["microbatch"], w["microbatch"], w["sequence"]
    data = np.random.default_rng(1).integers(0, c["vocab"], (parts, micro, t + 1), dtype=np.int32)
    tokens, targets = jnp.asarray(data[:, :, :-1]), jnp.asarray(data[:, :, 1:])
    why = ""
    for implementation in ("cudnn", None) if on_gpu else (None,):
        tree = make(c)
        m, v = (jax.tree.map(jnp.zeros_like, tree) for _ in range(2))
        step = step_of(c, parts, implementation)
        try:
            tree, m, v, loss = step(tree, m, v, 1.0, tokens, targets)
            first_loss = float(loss)
            break
        except Exception as error:  # cuDNN refuses shapes by several kinds of errors; then XLA's own is used
            if implementation is None:
                raise
            why = f"cuDNN: {str(error)[:200]}"
    first = time.time() - BEGAN
    took, last = [], math.nan
    for number in range(w["warm"] + steps):
        began = time.perf_counter()
        tree, m, v, loss = step(tree, m, v, float(number + 2), tokens, targets)
        last = float(loss)  # waits
        took.append(time.perf_counter() - began)
    measured = took[w["warm"] :]
    middle = statistics.median(measured)
    stats = device.memory_stats() or {}
    print(
        json.dumps(
            {
                "tokens_per_s": w["batch"] * t / middle,
                "step_ms": middle * 1e3,
                "spread": (max(measured) - min(measured)) / middle,
                "start_s": first,
                "jax_peak_mib": stats.get("peak_bytes_in_use", 0) / 2**20 or None,
                "attention": implementation or "xla",
                "attention_ms": {"why": why} if why else {},
                "first_loss": first_loss,
                "last_loss": last,
                "version": jax.__version__,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
