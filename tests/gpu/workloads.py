"""The models that are trained for figures, and how: ours, PyTorch's and JAX's get the same. ``tiny`` ones take their
place in the rehearsal, which times nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.e2e.engine_runs import write_samples
from trainer.plan import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import RunSpec, parse_spec, what_digest

OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0}
Samples = NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """A model's training. ``batch``: sequences a step; ``steps``: of a measurement, after ``warm`` ones;
    ``head_rows``: train.classifier_chunk."""

    name: str
    model: dict[str, Any]
    sequence: int
    batch: int
    microbatch: int
    steps: int = 20
    warm: int = 5
    head_rows: int = 64

    @property
    def tokens(self) -> int:
        """A step."""
        return self.batch * self.sequence

    def row(self, precision: str) -> str:
        """The name of its figure."""
        return f"train/{self.name}/{precision}/t{self.sequence}"

    def for_peers(self) -> dict[str, Any]:
        """All that a peer's script needs to know."""
        return asdict(self)


def gpt2(layers: int, width: int, heads: int, vocab: int = 50304, context: int = 1024) -> dict[str, Any]:
    return {"family": "gpt2", "layers": layers, "width": width, "heads": heads, "vocab": vocab, "context": context}


def _llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, context: int) -> dict[str, Any]:
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    return {"family": "llama", **sizes, "vocab": vocab, "context": context, "tied": True, "rope_base": 500000.0}


# The head reads its matrix twice, and reads and writes its gradient, once for so many rows: 0.46 GB at GPT-2's sizes,
# 0.14 ms on an H100. Of 64 rows that is 70 ms a step of 32,768 tokens, more than all else; of 4,096 it is 1.1.
HEAD_ROWS = 4096
REAL = {
    w.name: w
    for w in (
        Workload("gpt2-124m", gpt2(12, 768, 12), 1024, 32, 32, head_rows=HEAD_ROWS),
        Workload("gpt2-1.5b", gpt2(48, 1600, 25), 1024, 16, 8, steps=8, warm=3, head_rows=HEAD_ROWS),
        # the sizes of Llama 3.2 1B, with a vocabulary of 32,000: heads that every peer can hold whole
        Workload(
            "llama-1b", _llama(16, 2048, 32, 8, 8192, 32000, 4096), 4096, 4, 4, steps=8, warm=3, head_rows=HEAD_ROWS
        ),
    )
}
TINY = {
    "gpt2-124m": Workload("gpt2-124m", gpt2(2, 32, 2, 64, 16), 16, 4, 2, steps=3, warm=1),
    "gpt2-1.5b": Workload("gpt2-1.5b", gpt2(3, 48, 3, 64, 16), 16, 4, 2, steps=3, warm=1),
    "llama-1b": Workload("llama-1b", _llama(2, 32, 2, 1, 48, 64, 16), 16, 4, 2, steps=3, warm=1),
}


def workload(name: str, tiny: bool) -> Workload:
    """By name."""
    return (TINY if tiny else REAL)[name]


def spec_of(
    w: Workload,
    precision: str,
    steps: int,
    stages: int = 1,
    every: int = 0,
    *,
    threads: int = 0,
    shuffled: bool = True,
    **train: Any,
) -> RunSpec:
    """What is trained: AdamW with clipping at a constant rate, as the peers do it. ``train``: more of that section."""
    return parse_spec(
        {
            "name": "figures",
            "model": w.model,
            "data": {"shuffled": shuffled},
            "train": {
                "steps": steps,
                "batch": w.batch,
                "microbatch": w.microbatch,
                "sequence": w.sequence,
                "precision": precision,
                "classifier_chunk": w.head_rows,
                "seed": 1,
                "optimizer": OPTIMIZER,
                "schedule": {"kind": "constant"},
                **train,
            },
            "parallel": {"stages": stages, "threads": threads},
            "checkpoint": {"every": every},
        }
    )


def samples(w: Workload, steps: int) -> Samples:
    """Random tokens, the same ones each time: [steps * batch, sequence + 1]."""
    shape = (w.batch * steps, w.sequence + 1)
    return np.random.default_rng(0).integers(0, w.model["vocab"], shape).astype(np.int64)


def plan_with(w: Workload, spec: RunSpec, tokens: Samples, folder: Path) -> Plan:
    """The plan, with these tokens in ``folder/data``."""
    dataset = write_samples(folder / "data", tokens, w.model["vocab"])
    spec = spec.resolve(dataset)
    return compile_plan(spec, dataset, what_digest(spec, dataset))


def plan_of(w: Workload, precision: str, steps: int, folder: Path, *, stages: int = 1, every: int = 0) -> Plan:
    """The plan, with random tokens in ``folder/data``."""
    return plan_with(w, spec_of(w, precision, steps, stages, every), samples(w, steps), folder)
