"""What one value of a spec's key costs in loss beside another, from the same weights on the same batches of the demo's
model and text: fp8 beside bf16, bf16 beside fp32, Muon beside AdamW.

A run's figure is the mean loss of the last tenth of the steps. It has noise: a run whose gradients are only added in
another order (`train.reduction_groups`) takes another path after some hundred steps and ends up to half a percent
apart, more than what is looked for. So each seed runs in several orders, and what counts is the mean of the pairs'
differences, beside its standard error. docs/numerics.md has the last result; `measure` with few steps and text of its
own is the short form in `make test`.
"""

from __future__ import annotations

import math
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import keys
from checkpoint.store import open_store
from flows.data.prepare import prepare
from tests.e2e import engine_runs
from trainer.cores import usable_cpus
from trainer.dataset import DatasetRef
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest

ROOT = Path(__file__).resolve().parents[2]
SEEDS, STEPS, LIMIT = (1, 2, 3), 1000, 0.0025
ORDERS = (1, 2, 4, 8)
"""Groups of a step's microbatches whose gradients are added apart: the same sums in another order."""


def corpus(folder: Path) -> DatasetRef:
    """The demo's text as shards in ``folder``."""
    with tempfile.TemporaryDirectory() as place:
        store = open_store(f"file://{place}")
        dataset = prepare(parse_spec(tomllib.loads((ROOT / "examples" / "demo.toml").read_text())).data, store)
        folder.mkdir(parents=True)
        for number in range(len(dataset.shards)):
            name = keys.shard_name(number)
            (folder / name).write_bytes(store.get(keys.dataset_key(dataset.digest, name)))
    return dataset


def losses(
    dataset: DatasetRef, data: Path, folder: Path, key: str, value: str, seed: int, steps: int, *sets: str
) -> list[float]:
    """Of every step of a run whose spec has this value for this key."""
    sets = (
        f"train.steps={steps}",
        f'{key}="{value}"',
        f"train.seed={seed}",
        *sets,
    )
    spec = parse_spec(
        tomllib.loads((ROOT / "examples" / "demo.toml").read_text()), ["parallel.stages=1", "launch.trace=false", *sets]
    )
    spec = spec.resolve(dataset)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    return engine_runs.train(plan, data, folder / value, dump=False, deadline_s=3600).losses


@dataclass(frozen=True)
class Pair:
    """Mean losses of the last tenth of the steps, of two runs that differ in one key alone."""

    seed: int
    groups: int
    one: float
    other: float

    @property
    def apart(self) -> float:
        """Relative; above 0 where the second one's loss is higher."""
        return self.other / self.one - 1


def measure(
    dataset: DatasetRef,
    data: Path,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    *sets: str,
    key: str = "train.precision",
    pair: tuple[str, str] = ("bf16", "fp8"),
    orders: Sequence[int] = ORDERS,
) -> Iterator[Pair]:
    """Of each seed in each order of sums, as many runs at a time as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(usable_cpus()) as pool:

        def last(seed: int, groups: int, value: str) -> float:
            own = Path(folder) / f"{seed}-{groups}"
            run = losses(dataset, data, own, key, value, seed, steps, f"train.reduction_groups={groups}", *sets)
            return float(np.mean(run[-max(1, steps // 10) :]))

        told = [(s, g, *(pool.submit(last, s, g, v) for v in pair)) for s in seeds for g in orders]
        for seed, groups, one, other in told:
            yield Pair(seed, groups, one.result(), other.result())


def mean_apart(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The mean of the pairs' differences, and its standard error."""
    apart = [pair.apart for pair in pairs]
    error = float(np.std(apart, ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else math.nan
    return float(np.mean(apart)), error
