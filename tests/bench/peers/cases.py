"""What is trained beside PyTorch and JAX, under the names that others read in out/bench.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.workloads import OPTIMIZER, Samples, Workload, gpt2, plan_with, samples, spec_of
from trainer.plan import flops_per_token
from trainer.plan.compiled import Plan
from trainer.spec import RunSpec

GPT2_124M = gpt2(12, 768, 12)
LLAMA_SMALL = {
    "family": "llama", "layers": 8, "width": 512, "heads": 8, "kv_heads": 2, "hidden": 1536, "vocab": 32000,
    "context": 512, "tied": True, "rope_base": 10000.0,
}  # fmt: skip
SAMPLES = 4
"""Batches of the data, which the peers go through again and again."""
CHUNK = 256
"""Rows that the head takes at a time, as in the preset of this model, with which memory is measured."""


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
class Training(Workload):
    """Whole training steps: forward, backward, clipping, AdamW; a step is one microbatch."""

    precision: str = field(kw_only=True)

    @property
    def shape(self) -> str:
        return f"b{self.batch}t{self.sequence}"

    @property
    def case(self) -> str:
        """The name of its row."""
        return f"train/{self.name}/{self.precision}/{self.shape}"

    @property
    def operations(self) -> float:
        """Floating-point operations of a step: products of the mathematics, in attention those of causal pairs."""
        return flops_per_token(self.spec(1, 1).model, self.sequence) * self.tokens

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All ways in which the peers might do it best."""
        ways = ("fp32",) if self.precision == "fp32" else ("autocast", "pure")
        torch = tuple(Variant("torch", way, compiled) for way in ways for compiled in (False, True))
        return (*torch, *(Variant("jax", self.precision, unrolled=unrolled) for unrolled in (False, True)))

    def spec(self, steps: int, threads: int) -> RunSpec:
        """Ours: the same model and optimizer at a constant rate, samples in order."""
        return spec_of(self, self.precision, steps, threads=threads, shuffled=False, classifier_chunk=CHUNK)

    def plan(self, steps: int, threads: int, folder: Path, tokens: Samples | None = None) -> Plan:
        """The plan, and its tokens in ``folder/data``: these or random ones."""
        given = samples(self, steps) if tokens is None else tokens
        return plan_with(self, self.spec(steps, threads), given, folder)

    def for_peer(self, variant: Variant, threads: int, data: Path) -> dict[str, Any]:
        """All that a peer's script needs to know."""
        case = {"model": self.model, "sequence": self.sequence, "optimizer": OPTIMIZER, "data": str(data)}
        case |= {"threads": threads, "variant": variant.numbers}
        return case | {"compiled": variant.compiled, "unrolled": variant.unrolled}

    def write_data(self, path: Path) -> None:
        """The peers' tokens: ``SAMPLES`` batches."""
        np.save(path, samples(self, SAMPLES).reshape(SAMPLES, self.batch, self.sequence + 1))


TRAININGS = (
    Training("gpt2-124m", GPT2_124M, 64, 4, 4, steps=6, precision="bf16"),
    Training("gpt2-124m", GPT2_124M, 1024, 1, 1, steps=3, precision="bf16"),
    Training("gpt2-124m", GPT2_124M, 64, 4, 4, steps=6, precision="fp32"),
    Training("gpt2-124m", GPT2_124M, 1024, 1, 1, steps=3, precision="fp32"),
    Training("llama-small", LLAMA_SMALL, 512, 1, 1, steps=6, precision="bf16"),
)
FP32 = {training.shape: training for training in TRAININGS if training.precision == "fp32"}
START = {"start/gpt2-124m": TRAININGS[0], "start/gpt2-124m/fp32": FP32["b4t64"]}
"""The first as the model's preset trains it."""
MEMORY = {f"memory/gpt2-124m/{shape}": training for shape, training in FP32.items()}
GEMM_GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
"""(outputs, inputs) of a layer's linear maps."""
GEMM_HEAD = (GPT2_124M["vocab"], GPT2_124M["width"])
GEMM_ROWS = (256, 1024)


def gemm_name(precision: str, variant: str, m: int, n: int, k: int) -> str:
    """Of its row."""
    return f"gemm/{precision}/{variant}/{m}x{n}x{k}"


@cache
def gemms() -> dict[str, tuple[str, str, int, int, int]]:
    """By row: precision, variant and sizes of every product of GPT-2 124M's steps at both shapes. NT is forward, NN
    the gradient of inputs, TN that of weights. The head's have as many rows as our classifier takes at a time.
    """
    found = {}
    for precision in ("fp32", "bf16"):
        maps = [(rows, *sizes) for rows in GEMM_ROWS for sizes in GEMM_GPT2]
        maps += [(min(rows, CHUNK), *GEMM_HEAD) for rows in GEMM_ROWS]
        for rows, out, into in maps:
            for variant, m, n, k in (("nt", rows, out, into), ("nn", rows, into, out), ("tn", out, into, rows)):
                found[gemm_name(precision, variant, m, n, k)] = (precision, variant, m, n, k)
    return found


CURVE = "curve/gpt2-124m/fp32/b1t1024"
"""Runs only where it is asked for: half an hour."""


def names() -> tuple[str, ...]:
    """Of all cases, in the order in which they run."""
    return (*(training.case for training in TRAININGS), *START, *MEMORY, *gemms())


def chosen(wanted: Sequence[str]) -> tuple[str, ...]:
    """The cases whose names begin with one of these; all where there are none."""
    known = (*names(), CURVE)
    found = tuple(name for name in known if name.startswith(tuple(wanted))) if wanted else names()
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in known):
            raise SystemExit(f"no case begins with {prefix}; there are {', '.join(known)}")
    return found
