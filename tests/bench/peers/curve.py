"""The loss curve of GPT-2 124M on the demo's text beside PyTorch's: the same weights and batches, fp32, T 1024."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bench.bench_losses import corpus
from tests.bench.peers.cases import FP32, Training, Variant
from tests.bench.peers.sides import peer_on
from tests.bench.results import entry, say
from tests.e2e.engine_runs import train, weights_file
from tests.support.shards import read_shard
from trainer.plan.compiled import Plan

DEADLINE_S = 6 * 3600.0
LIMIT = 0.01
"""Nats, at every tenth step."""
IN_TORCH = {
    "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "up", "mlp.c_proj": "down",
    "ln_1": "n1", "ln_2": "n2",
}  # fmt: skip
IN_JAX = {
    "attn.c_attn": ("qkv", "b_qkv"), "attn.c_proj": ("out", "b_out"), "mlp.c_fc": ("up", "b_up"),
    "mlp.c_proj": ("down", "b_down"), "ln_1": ("n1", "b1"), "ln_2": ("n2", "b2"),
}  # fmt: skip
WHOLE = {"transformer.wte": "tokens", "transformer.wpe": "places", "transformer.ln_f": "norm"}


def name_in_torch(name: str) -> str:
    """Of our tensor in the model of tests/gpu/peers/torch_train.py; shapes are the same."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blocks.{layer}.{IN_TORCH[part]}.{kind}"


def in_jax(own: Mapping[str, NDArray[np.float32]], layers: int) -> dict[str, NDArray[np.float32]]:
    """Our tensors for tests/gpu/peers/jax_train.py: matrices [in, out], those of layers stacked."""
    kinds = {"wte": ("tokens", ""), "wpe": ("places", ""), "ln_f": ("norm", "b_norm")}
    found = {}
    for stem, names in kinds.items():
        for kind, name in zip(("weight", "bias"), names, strict=True):
            if name:
                found[name] = own[f"transformer.{stem}.{kind}"]
    for part, names in IN_JAX.items():
        for kind, name in zip(("weight", "bias"), names, strict=True):
            each = [own[f"transformer.h.{layer}.{part}.{kind}"] for layer in range(layers)]
            found[f"layers.{name}"] = np.stack([value.T for value in each])
    return found


def weights(plan: Plan) -> Mapping[str, NDArray[np.float32]]:
    """Normal ones for matrices, biases of zero, norms of one."""
    rng = np.random.default_rng(1)

    def make(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(shape) == 2:
            return rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)

    return {tensor.name: make(tensor.name, tuple(tensor.shape)) for tensor in plan.tensors}


def text(folder: Path, training: Training, steps: int) -> NDArray[np.int64]:
    """The demo's text in samples of T + 1 tokens, in drawn order. A step is one sample: where all of a manual is
    followed by all of a dictionary, a loss that had fallen to 6.3 rises to 12.6, and with it what rounding does.
    """
    corpus(folder)
    tokens = np.concatenate([read_shard(path) for path in sorted(folder.iterdir())])
    count, length = steps * training.batch, training.sequence
    places = np.random.default_rng(1).permutation((len(tokens) - 1) // length)
    starts = places[np.arange(count) % len(places)] * length
    return np.stack([tokens[at : at + length + 1] for at in starts]).astype(np.int64)


def curve_rows(name: str, steps: int, threads: int) -> Iterator[dict[str, Any]]:
    """A row: the largest difference of the two losses at every tenth step, in nats. Both train at the same time, on
    half of the threads each.
    """
    threads = max(1, threads // 2)
    with tempfile.TemporaryDirectory(prefix="hotstage-peers-") as scratch, ThreadPoolExecutor(1) as beside:
        folder = Path(scratch)
        training = replace(FP32["b1t1024"], steps=steps)
        samples = text(folder / "text", training, steps)
        plan = training.plan(steps, threads, folder, samples)
        begin = weights(plan)
        np.savez(folder / "weights.npz", **{name_in_torch(own): value for own, value in begin.items()})
        np.save(folder / "data.npy", samples.reshape(steps, training.batch, -1))
        of_engine = weights_file(plan, begin, folder / "weights")
        running = beside.submit(
            train, plan, folder / "data", folder / "run", dump=False, weights=of_engine, deadline_s=DEADLINE_S
        )
        with peer_on(
            training, Variant("torch", "fp32"), threads, folder / "data.npy", {}, folder / "weights.npz"
        ) as process:
            theirs = [process.first_loss]
            for upto in sorted({*range(10, steps, 10), steps} - {1}):
                theirs += process.sample(upto - len(theirs)).losses
                say(f"    step {upto:4}: torch {theirs[-1]:.6f}")
        run = running.result()
        apart = [abs(a - b) for a, b in zip(run.losses, theirs, strict=True)]
        shown = sorted({1, *range(10, steps + 1, 10), steps})
        for step in shown:
            own, other = run.losses[step - 1], theirs[step - 1]
            say(f"    step {step:4}: {own:.6f}, torch {other:.6f}, apart {apart[step - 1]:.1e}")
        most = max(apart[step - 1] for step in shown)
        row = entry(name, most, "nats apart", "torch", LIMIT)
        yield row | {"ratio": LIMIT / most if most else None, "steps": steps, "last": [run.losses[-1], theirs[-1]]}
