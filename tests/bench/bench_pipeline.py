"""Schedules measured against the simulator: four ranks on this machine whose programs last a set time (kernel
``delay``, which sleeps), so that ranks do not wait for cores. And the demo's step, which computes.

Ranks run with real-time priority where this user may give it: what else the machine does is no part of a schedule.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flows.show.foretell import yardstick
from tests.e2e.engine_runs import train, write_samples
from tests.trainer.plan.formulas import TWO
from trainer.plan import Plan, compile_plan
from trainer.plan.calibrate import fitted
from trainer.plan.places import Rank
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.plan.steady import steady
from trainer.plan.timeline import COMPUTE_KINDS, Timeline, from_chrome
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec, what_digest

POSITIONS, MICROBATCHES, STEPS = 4, 8, 9
UNIT_S = 0.020
"""What F, I and W of a position's whole work on a microbatch last."""
SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half")
COST = CostModel(flops_per_s=20e9, memory_bytes_per_s=5e9, link_bytes_per_s=1e9, link_latency_s=60e-6, call_s=0.5e-6)
"""Of the rest: a tiny model on a busy core, sockets on loopback."""


@dataclass(frozen=True)
class Measured:
    """Of a step: seconds; the part that the ranks idle; that between each one's first and last computation."""

    seconds: float
    idle: float
    within: float


def real_time() -> tuple[str, ...]:
    """The command that gives it; empty where this user may not."""
    return _real_time()


@lru_cache(maxsize=1)
def _real_time() -> tuple[str, ...]:
    command = ("chrt", "-f", "1")
    able = shutil.which("chrt") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if able else ()


def compiled(tree: dict[str, Any], sets: Sequence[str], folder: Path, delays: dict[str, float] | None) -> Plan:
    """The plan of a spec on samples drawn at random, which it writes."""
    spec: RunSpec = parse_spec(tree, list(sets))
    shape = spec.train.batch, spec.train.sequence + 1
    samples = np.random.default_rng(0).integers(0, spec.model.vocab, shape).astype(np.int64)
    dataset = write_samples(folder / "data", samples, spec.model.vocab)
    spec = spec.resolve(dataset)
    return compile_plan(spec, dataset, what_digest(spec, dataset), delays=delays)


def plan_of(schedule: str, optimizer: str, folder: Path) -> Plan:
    """Eight layers on four ranks; the same whole work a rank under every schedule."""
    chunks = 2 if schedule in TWO else 1
    tree: dict[str, Any] = {
        "name": "delays",
        "model": {"family": "gpt2", "layers": 8, "width": 16, "heads": 2, "context": 16, "vocab": 256},
        "train": {
            "steps": STEPS,
            "batch": MICROBATCHES,
            "microbatch": 1,
            "sequence": 8,
            "optimizer": {"clip": 1e9},  # a step that is clipped runs the beginning of the next one twice
        },
        "parallel": {
            "stages": POSITIONS * chunks,
            "chunks": chunks,
            "schedule": schedule,
            "threads": 1,
            "optimizer": optimizer,
        },
        "checkpoint": {"every": 0},
    }
    return compiled(tree, (), folder, dict.fromkeys("FIW", UNIT_S / chunks))


def within(timeline: Timeline) -> float:
    """The part that a rank idles between its first and its last computation; the mean over ranks."""
    idle = []
    for row in timeline.rows:
        work = [event for event in row if event.kind in COMPUTE_KINDS]
        idle.append(1 - sum(e.seconds for e in work) / (work[-1].end - work[0].start))
    return float(np.mean(idle))


def traced(folder: Path, ranks: int, steps: int) -> Iterator[Timeline]:
    """The last steps, as the ranks traced them."""
    traces = {Rank(rank): next(folder.glob(f"*trace*{rank}*")).read_text() for rank in range(ranks)}
    for step in range(2, steps):
        try:
            yield from_chrome(traces, step)
        except ValueError:
            continue


def run(plan: Plan, folder: Path) -> tuple[float, list[Timeline]]:
    """Seconds from the end of a step to that of the next (the median, without the first two and the last), and steps as
    they were traced."""
    gang = train(plan, folder / "data", folder / "run", dump=False, trace=True, prefix=real_time())
    ends = [float(step["time"]) for step in gang.steps[1:-1]]
    seconds = statistics.median(b - a for a, b in pairwise(ends))
    return seconds, list(traced(folder / "run", len(plan.ranks), len(gang.steps)))


def measure(schedule: str, optimizer: str = "auto") -> tuple[Measured, Measured]:
    """A run's steps, and the simulated ones: of many steps in a row, and of one by itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_of(schedule, optimizer, folder)
        seconds, steps = run(plan, folder)
        busy = [[timeline.busy(rank) for rank in range(POSITIONS)] for timeline in steps]
        idle = 1 - float(np.median(np.array(busy), axis=0).mean()) / seconds
        one, many = simulate(from_plan(plan, COST), COST), steady(plan, COST)
        told = Measured(many.step_seconds, float(np.mean(many.bubble)), within(one.timeline))
        return Measured(seconds, idle, statistics.median(map(within, steps))), told


def demo() -> tuple[float, float, float]:
    """Seconds of the demo's step: measured; simulated with the rates that its programs had; foretold before."""
    sets = ("train.steps=40", "model.vocab=2048", "train.schedule.warmup=0", "checkpoint.every=0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = compiled(tomllib.loads(PRESETS["gpt2-demo"]), sets, folder, None)
        seconds, steps = run(plan, folder)
        before = yardstick(len(plan.ranks))
        after = fitted(plan, steps, before)
        told = [steady(plan, cost).step_seconds for cost in (after, before)]
        return seconds, told[0], told[1]
