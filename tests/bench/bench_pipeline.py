"""Schedules measured against the simulator: four ranks on this machine whose programs last a set time (kernel
``delay``, which sleeps), so that ranks do not wait for cores.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.engine_runs import train, write_samples
from trainer.plan import Plan, compile_plan
from trainer.plan.places import Rank
from trainer.plan.schedules import V
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.plan.timeline import Timeline, from_chrome
from trainer.spec import parse_spec, what_digest

POSITIONS, MICROBATCHES, STEPS = 4, 8, 6
UNIT_S = 0.012
"""What F, I and W of a position's whole work on a microbatch last."""
SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half")
PREFIX: tuple[str, ...] = ()
TWO = ("interleaved-1f1b", *V)
COST = CostModel(flops_per_s=20e9, memory_bytes_per_s=5e9, link_bytes_per_s=1e9, link_latency_s=60e-6, call_s=0.5e-6)
"""Of the rest: a tiny model on a busy core, sockets on loopback."""


@dataclass(frozen=True)
class Measured:
    """Of a step: seconds and the share that the ranks idle, as measured and as simulated."""

    seconds: float
    bubble: float
    simulated_seconds: float
    simulated_bubble: float


def plan_of(schedule: str, folder: Path) -> Plan:
    """Eight layers on four ranks; the same whole work a rank under every schedule."""
    chunks = 2 if schedule in TWO else 1
    tree: dict[str, Any] = {
        "name": "delays",
        "model": {"family": "gpt2", "layers": 8, "width": 16, "heads": 2, "context": 16, "vocab": 256},
        "train": {"steps": STEPS, "batch": MICROBATCHES, "microbatch": 1, "sequence": 8},
        "parallel": {"stages": POSITIONS * chunks, "chunks": chunks, "schedule": schedule, "threads": 1},
        "checkpoint": {"every": 0},
    }
    samples = np.random.default_rng(0).integers(0, 256, (MICROBATCHES, 9)).astype(np.int64)
    dataset = write_samples(folder / "data", samples, 256)
    spec = parse_spec(tree).resolve(dataset)
    return compile_plan(spec, dataset, what_digest(spec, dataset), delays=dict.fromkeys("FIW", UNIT_S / chunks))


def traced(folder: Path, step: int) -> Timeline:
    """A step as the ranks traced it."""
    traces = {Rank(rank): next(folder.glob(f"*trace*{rank}*")).read_text() for rank in range(POSITIONS)}
    return from_chrome(traces, step)


def measure(schedule: str) -> Measured:
    """The median of the steps of a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_of(schedule, folder)
        gang = train(plan, folder / "data", folder / "run", dump=False, trace=True, prefix=PREFIX)
        seconds = statistics.median(float(step["step_us"]) for step in gang.steps[1:]) * 1e-6
        idle = [float(np.mean(traced(folder / "run", n).bubble)) for n in range(2, STEPS)]
    told = simulate(from_plan(plan, COST), COST)
    return Measured(seconds, statistics.median(idle), told.step_seconds, float(np.mean(told.bubble)))
