"""What is trained beside PyTorch and JAX, under the names that others read in out/bench.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.e2e.engine_runs import write_samples
from trainer.plan import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import RunSpec, parse_spec, what_digest

GPT2_124M = {"family": "gpt2", "layers": 12, "width": 768, "heads": 12, "vocab": 50304, "context": 1024}
LLAMA_SMALL = {
    "family": "llama", "layers": 8, "width": 512, "heads": 8, "kv_heads": 2, "hidden": 1536, "vocab": 32000,
    "context": 512, "tied": True, "rope_base": 10000.0,
}  # fmt: skip
Samples = NDArray[np.int64]
OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0}
SAMPLES = 4
"""Batches of the data, which the peers go through again and again."""


@dataclass(frozen=True)
class Variant:
    """A way in which a peer does it: ``numbers`` fp32, autocast, pure (bf16 weights), for JAX fp32 or bf16."""

    peer: str
    numbers: str
    compiled: bool = False
    unrolled: bool = False

    @property
    def name(self) -> str:
        """For people."""
        how = (
            "compiled" if self.compiled else "unrolled" if self.unrolled else "scan" if self.peer == "jax" else "eager"
        )
        return f"{self.peer} {self.numbers} {how}"


@dataclass(frozen=True)
class Training:
    """Whole training steps: forward, backward, clipping, AdamW. ``steps``: of a sample."""

    model_name: str
    model: dict[str, Any]
    precision: str
    batch: int
    sequence: int
    steps: int

    @property
    def shape(self) -> str:
        return f"b{self.batch}t{self.sequence}"

    @property
    def name(self) -> str:
        """Of its row."""
        return f"train/{self.model_name}/{self.precision}/{self.shape}"

    @property
    def tokens(self) -> int:
        """A step."""
        return self.batch * self.sequence

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All ways in which the peers might do it best."""
        ways = ("fp32",) if self.precision == "fp32" else ("autocast", "pure")
        torch = tuple(Variant("torch", way, compiled) for way in ways for compiled in (False, True))
        return (*torch, *(Variant("jax", self.precision, unrolled=unrolled) for unrolled in (False, True)))

    def spec(self, steps: int, threads: int) -> RunSpec:
        """Ours: the same model and optimizer at a constant rate, samples in order."""
        return parse_spec(
            {
                "name": "peers",
                "model": self.model,
                "data": {"shuffled": False},
                "train": {
                    "steps": steps,
                    "batch": self.batch,
                    "microbatch": self.batch,
                    "sequence": self.sequence,
                    "precision": self.precision,
                    "seed": 1,
                    "optimizer": OPTIMIZER,
                    "schedule": {"kind": "constant"},
                },
                "parallel": {"threads": threads},
                "checkpoint": {"every": 0},
            }
        )

    def samples(self, steps: int) -> Samples:
        """Random tokens, the same ones each time: [steps * batch, sequence + 1]."""
        shape = (steps * self.batch, self.sequence + 1)
        return np.random.default_rng(0).integers(0, self.model["vocab"], shape).astype(np.int64)

    def plan(self, steps: int, threads: int, folder: Path, samples: Samples | None = None) -> Plan:
        """The plan, and its tokens in ``folder/data``: these or random ones."""
        dataset = write_samples(
            folder / "data", self.samples(steps) if samples is None else samples, self.model["vocab"]
        )
        spec = self.spec(steps, threads).resolve(dataset)
        return compile_plan(spec, dataset, what_digest(spec, dataset))

    def for_peer(self, variant: Variant, threads: int, data: Path) -> dict[str, Any]:
        """All that a peer's script needs to know."""
        case = {"model": self.model, "sequence": self.sequence, "optimizer": OPTIMIZER, "data": str(data)}
        case |= {"threads": threads, "variant": variant.numbers}
        return case | {"compiled": variant.compiled, "unrolled": variant.unrolled}

    def write_data(self, path: Path) -> None:
        """The peers' tokens: ``SAMPLES`` batches."""
        np.save(path, self.samples(SAMPLES).reshape(SAMPLES, self.batch, self.sequence + 1))


TRAININGS = (
    Training("gpt2-124m", GPT2_124M, "bf16", 4, 64, steps=6),
    Training("gpt2-124m", GPT2_124M, "bf16", 1, 1024, steps=3),
    Training("gpt2-124m", GPT2_124M, "fp32", 4, 64, steps=6),
    Training("gpt2-124m", GPT2_124M, "fp32", 1, 1024, steps=3),
    Training("llama-small", LLAMA_SMALL, "bf16", 1, 512, steps=6),
)
FP32 = {training.shape: training for training in TRAININGS if training.precision == "fp32"}
START = "start/gpt2-124m"
MEMORY = {f"memory/gpt2-124m/{shape}": training for shape, training in FP32.items()}
GEMM_GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
"""(outputs, inputs) of a layer's linear maps."""
GEMM_ROWS = (256, 1024)


def gemm_name(precision: str, variant: str, m: int, n: int, k: int) -> str:
    """Of its row."""
    return f"gemm/{precision}/{variant}/{m}x{n}x{k}"


def gemms() -> dict[str, tuple[str, str, int, int, int]]:
    """By row: precision, variant and sizes of every product of GPT-2 124M's layers at both shapes. NT is forward, NN
    the gradient of inputs, TN that of weights.
    """
    found = {}
    for precision in ("fp32", "bf16"):
        for rows in GEMM_ROWS:
            for out, into in GEMM_GPT2:
                for variant, m, n, k in (("nt", rows, out, into), ("nn", rows, into, out), ("tn", out, into, rows)):
                    found[gemm_name(precision, variant, m, n, k)] = (precision, variant, m, n, k)
    return found


CURVE = "curve/gpt2-124m/fp32/b1t1024"
"""Runs only where it is asked for: half an hour."""


def names() -> tuple[str, ...]:
    """Of all cases, in the order in which they run."""
    return (*(training.name for training in TRAININGS), START, *MEMORY, *gemms())


def chosen(wanted: Sequence[str]) -> tuple[str, ...]:
    """The cases whose names begin with one of these; all where there are none."""
    known = (*names(), CURVE)
    found = tuple(name for name in known if name.startswith(tuple(wanted))) if wanted else names()
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in known):
            raise SystemExit(f"no case begins with {prefix}; there are {', '.join(known)}")
    return found
