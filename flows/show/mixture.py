"""What a run reads of each part of a mixture: foretold from its spec, and so far from where its data stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint.errors import CheckpointError
from checkpoint.store import Store
from flows.data import load_dataset
from trainer.dataset import samples_of
from trainer.errors import DatasetError
from trainer.spec import RunSpec
from trainer.wire.order import Order


def foretold(spec: RunSpec) -> list[str]:
    """A line a part: its weights, and how many tokens of it the run reads; none where nothing is mixed."""
    phases, train = spec.data.phases if spec.data.mix else (), spec.train
    ends = [*(phase.from_batch for phase in phases[1:]), train.steps + 1]
    lines = []
    for number, part in enumerate(spec.data.mix):
        weights, tokens = [], 0.0
        for phase, end in zip(phases, ends, strict=True):
            share = phase.weights[number] / phase.cycle
            steps = max(0, min(end, train.steps + 1) - phase.from_batch)
            weights.append(f"{share:.0%}" + f" from step {phase.from_batch} on" * (phase.from_batch > 1))
            tokens += steps * train.tokens * share
        shares = [word for n, word in enumerate(weights) if n == 0 or word.split()[0] != weights[n - 1].split()[0]]
        lines.append(f"mixed: {part.source}: {', '.join(shares)}; {tokens / 1e6:,.2f} M tokens in all")
    return lines


def read_so_far(store: Store, what: Mapping[str, Any], samples: int) -> list[dict[str, Any]]:
    """By part of a run's data, what lies behind so many samples: ``samples`` of it, and ``passes`` over it. Empty where
    nothing is mixed, or the dataset cannot be read.
    """
    data, train = what["data"], what["train"]
    try:
        dataset = load_dataset(store, data["digest"])
    except (DatasetError, CheckpointError):
        return []
    if dataset.mix is None:
        return []
    order = Order(
        parts=tuple(samples_of(own, train["sequence"]) for own in dataset.parts),
        phases=dataset.mix.phases,
        batch=train["batch"],
        seed=train["seed"],
        shuffled=data["shuffled"],
        block=data["block"],
        window=data["window"],
    )
    batches = samples // order.batch
    now = next(phase for phase in reversed(order.phases) if phase.from_batch <= max(1, batches))
    return [
        {
            "dataset": digest,
            "weight": now.weights[part],
            "of": now.cycle,
            "samples": taken,
            "passes": taken / order.used(part),
        }
        for part, ((digest, _), taken) in enumerate(zip(dataset.mix.parts, order.taken(batches), strict=True))
    ]
