"""What FP8 costs in loss: the demo's model and text, in bf16 and in fp8 from the same weights on the same batches; and
any other two values of a key of the spec, such as AdamW and Muon.

The figure of a seed is the mean loss of the last tenth of the steps, fp8's against bf16's. docs/numerics.md has the
last result; `measure` with few steps and text of its own is the short form in `make test`.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from checkpoint import keys
from checkpoint.store import open_store
from flows.data.prepare import prepare
from tests.e2e import engine_runs
from trainer.dataset import DatasetRef
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest

ROOT = Path(__file__).resolve().parents[2]
SEEDS, STEPS, LIMIT = (1, 2, 3), 1000, 0.0025


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
        "train.reduction_groups=1",
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


def measure(
    dataset: DatasetRef,
    data: Path,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    *sets: str,
    key: str = "train.precision",
    pair: tuple[str, str] = ("bf16", "fp8"),
) -> Iterator[tuple[int, float, float]]:
    """By seed, the mean loss of the last tenth of the steps with either value of the key."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs = [losses(dataset, data, Path(folder), key, p, seed, steps, *sets) for p in pair]
        one, other = (float(np.mean(run[-max(1, steps // 10) :])) for run in runs)
        yield seed, one, other
