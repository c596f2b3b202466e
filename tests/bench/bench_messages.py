"""What messages cost a pipeline on two processes: a step beside what it would take if messages took no time.

GPT-2 124M, tied, two stages, with the shapes of examples/gpt2-124m.toml but for the sequence, which is short: so
messages weigh more than they do there. Both times come from one run's traces: of each action what it took, less what
moved of messages in it, played over the plan's lists with messages that cost nothing.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.engine_runs import Gang, train, write_samples
from trainer import wire
from trainer.dataset import DatasetRef
from trainer.plan.compile import compile_plan
from trainer.plan.compiled import Plan
from trainer.plan.simulate import CostModel, Instruction, simulate
from trainer.presets import PRESETS
from trainer.spec import parse_spec, what_digest

MICROBATCHES, MICROBATCH, SEQUENCE = 8, 4, 64
STEPS = 3  # the first warms up
TIED = ("TIED_GRAD", "TIED_WEIGHT")
FREE = CostModel(flops_per_s=1.0, memory_bytes_per_s=1.0, link_bytes_per_s=1e30, link_latency_s=0.0)

Event = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Seconds a step: as measured; with messages that take no time; at the rank that has most of it, of the tied
    weight's exchange where a rank began it or waited for it, and of whatever moved while kernels ran."""

    step: float
    compute: float
    tied: float
    moved: float

    @property
    def lost(self) -> float:
        """The part of a step that goes to messages."""
        return 1 - self.compute / self.step


def plan_124m(folder: Path, precision: str = "fp32", stages: int = 2) -> Plan:
    """The plan; its shards are written to ``folder/data``."""
    batch = MICROBATCHES * MICROBATCH
    sets = [f"train.batch={batch}", f"train.microbatch={MICROBATCH}", f"train.sequence={SEQUENCE}", "model.vocab=50304"]
    sets += [f"train.steps={STEPS}", "train.schedule.warmup=0", f'train.precision="{precision}"']
    sets += [
        "train.reduction_groups=1",
        f"parallel.stages={stages}",
        "parallel.threads=1",
        'parallel.optimizer="checked"',
    ]
    spec = parse_spec(tomllib.loads(PRESETS["gpt2-124m"]), sets)
    samples = np.random.default_rng(0).integers(0, 50257, (batch, SEQUENCE + 1)).astype(np.int64)
    dataset: DatasetRef = write_samples(folder / "data", samples, 50257)
    spec = spec.resolve(dataset)
    return compile_plan(spec, dataset, what_digest(spec, dataset))


def _events(gang: Gang, rank: int) -> list[Event]:
    events: list[Event] = json.loads((gang.folder / f"trace-{rank}.json").read_text())["traceEvents"]
    return [event for event in events if event["args"]["step"] > 1]


def _instructions(plan: Plan, rank: int, events: Sequence[Event]) -> Iterator[Instruction]:
    """What the rank did, with what its actions took themselves."""
    actions = list(plan.positions[rank].step)
    done = [event for event in events if "wait" not in event["args"]]
    assert len(done) == (STEPS - 1) * len(actions), "the trace holds every step but the first"
    for event, action in zip(done, actions * (STEPS - 1), strict=True):
        if action.channel is not None:
            kind = "send" if action.kind == wire.A_SEND else "recv"
            yield Instruction(kind, kind, 0.0, action.channel)
        else:
            yield Instruction(event["name"], "other", (event["dur"] - event["args"].get("moved_us", 0.0)) / 1e6)


def cost_of(gang: Gang) -> Cost:
    """Of the steps of a run but the first."""
    ranks = [_events(gang, rank) for rank in range(len(gang.plan.positions))]
    ends = max(event["ts"] + event["dur"] for events in ranks for event in events)
    step = (ends - min(event["ts"] for events in ranks for event in events)) / 1e6 / (STEPS - 1)
    played = simulate([list(_instructions(gang.plan, rank, events)) for rank, events in enumerate(ranks)], FREE)
    tied = max(sum(e["dur"] for e in events if any(kind in e["name"] for kind in TIED)) for events in ranks)
    moved = max(sum(e["args"].get("moved_us", 0.0) for e in events) for events in ranks)
    return Cost(step, played.step_seconds / (STEPS - 1), tied / 1e6 / (STEPS - 1), moved / 1e6 / (STEPS - 1))


def measure(engine: Path | None = None, precision: str = "fp32") -> Cost:
    """One run. ``engine``: another binary than the installed one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_124m(folder, precision)
        return cost_of(
            train(plan, folder / "data", folder / "run", dump=False, trace=True, engine=engine, deadline_s=600.0)
        )
