"""Whole training steps on this machine's CPUs beside PyTorch and JAX: ``make bench-peers``.

``CASES="train gemm/bf16"``: what names of cases begin with; ``ROUNDS=5``. Into out/bench.json, a row a case and peer:
``ratio`` above 1 means that ours is better; of ``calibrated-peak`` it is the fraction of it.

A case's sides take turns, and between them it is measured what the cores can do at that moment (``calibrate.c``),
because it changes under the bench. The peers' processes stay and wait in between; our engine starts anew for each
sample, and its first step does not count. Of a peer's variants (eager, compiled; autocast, bf16 weights; scanned,
unrolled) one sample is taken, those within ``NEAR`` of the best stay for the rounds, and the best of these is the peer.
A ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.bench_start import start_of_ours, touch_memory
from tests.bench.peers import cases
from tests.bench.peers.calibrate import Calibration, Peak, calibration
from tests.bench.peers.cases import Training, Variant
from tests.bench.peers.curve import curve_rows
from tests.bench.peers.gemm import gemm_rows
from tests.bench.peers.memory import memory_rows
from tests.bench.peers.sides import Ours, Sample, peer, python_of
from tests.bench.results import entry, say, write
from trainer.cores import usable_cpus

NEAR = 1.2
WHOLE_CORES = 0.9
"""A round counts as one with whole cores where all threads were worth this share of as many single ones."""
MINUTES = {
    "train/gpt2": (5.0, 1.0),
    "train/llama": (3.0, 0.4),
    "start/gpt2-124m/fp32": (0.5, 1.0),
    "start": (0.5, 2.0),
    "memory": (3.0, 0.0),
    "gemm": (0.0, 0.025),
    "curve": (30.0, 0.0),
}
"""By case: about so many, and so many more a round, on two idle cores."""

Row = dict[str, Any]


@dataclass
class Rounds:
    """By side, a sample a round; what the cores could do around each."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    peaks: dict[str, list[Peak]] = field(default_factory=dict)

    def add(self, side: str, sample: Sample, before: Peak, after: Peak) -> None:
        self.samples.setdefault(side, []).append(sample)
        self.peaks.setdefault(side, []).append(max(before, after, key=lambda peak: peak.all["fp32"]))

    def speed(self, side: str) -> float:
        """Steps a second, median."""
        return 1 / statistics.median(sample.seconds for sample in self.samples[side])

    def ratios(self, ours: str, other: str) -> list[float]:
        """By round, above 1 where ours is faster."""
        pairs = zip(self.samples[ours], self.samples[other], strict=True)
        return [theirs.seconds / mine.seconds for mine, theirs in pairs]

    def cores(self, *sides: str) -> list[float]:
        """By round, the least cores' worth of the threads around these samples."""
        return [min(p.cores for p in peaks) for peaks in zip(*(self.peaks[side] for side in sides), strict=True)]


def on_whole_cores(ratios: Sequence[float], cores: Sequence[float], threads: int) -> float | None:
    """The median ratio of the rounds in which each thread had a core of its own; None: there was none."""
    held = [ratio for ratio, worth in zip(ratios, cores, strict=True) if worth >= WHOLE_CORES * threads]
    return statistics.median(held) if held else None


def with_near(found: dict[Variant, float]) -> list[Variant]:
    """Of each peer the fastest variants, by seconds a step."""
    best = {name: min(s for v, s in found.items() if v.peer == name) for name in {v.peer for v in found}}
    return [v for v, seconds in found.items() if seconds <= NEAR * best[v.peer]]


def train_rows(training: Training, rounds: int, threads: int, now: Callable[[], Peak]) -> Iterator[Row]:
    """Ours beside each variant of the peers that may be the fastest."""
    measured = Rounds()
    with tempfile.TemporaryDirectory(prefix="hotstage-peers-") as folder, ExitStack() as held:
        ours = Ours(training, threads, Path(folder))
        running, first = {}, {}
        for variant in training.variants:
            with ExitStack() as this:
                process = this.enter_context(peer(training, variant, threads))
                first[variant] = process.sample(training.steps).seconds
                say(f"    {variant.name:<28} {training.tokens / first[variant]:7.1f} tok/s, {process.version}")
                if variant in with_near(first):
                    running[variant] = process
                    held.push(this.pop_all())
        stay = with_near(first)
        for variant, process in running.items():
            if variant not in stay:
                process.close()
        sides: dict[str, Callable[[], Sample]] = {"ours": ours.sample}
        sides |= {v.name: partial(running[v].sample, training.steps) for v in stay}
        for number in range(rounds):
            order = list(sides)
            before = now()
            for side in order[number % len(order) :] + order[: number % len(order)]:
                sample = sides[side]()
                after = now()
                measured.add(side, sample, before, after)
                before = after
            speeds = ", ".join(f"{side} {training.tokens / measured.samples[side][-1].seconds:.0f}" for side in order)
            say(f"    round {number + 1}: {speeds} tok/s; {before.cores:.2f} cores")
    for name in dict.fromkeys(v.peer for v in stay):
        best = max((v for v in stay if v.peer == name), key=lambda v: measured.speed(v.name))
        ratios = measured.ratios("ours", best.name)
        ratio = statistics.median(ratios)
        value = training.tokens * measured.speed("ours")
        row = entry(training.case, value, "tok/s", name, value / ratio)
        cores = measured.cores("ours", best.name)
        row |= {
            "variant": best.name,
            "rounds": ratios,
            "cores": cores,
            "peer_median": training.tokens * measured.speed(best.name),
        }
        yield row | {"ratio_on_whole_cores": on_whole_cores(ratios, cores, threads)}
    operations = training.operations
    pairs = list(zip(measured.samples["ours"], measured.peaks["ours"], strict=True))
    shares = [operations / s.seconds / peak.all[training.precision] for s, peak in pairs]
    value, share = operations * measured.speed("ours") / 1e9, statistics.median(shares)
    yield entry(training.case, value, "GFLOP/s", "calibrated-peak", value / share) | {"rounds": shares}


def start_of_peer(training: Training, variant: Variant, threads: int) -> float:
    """Seconds from before the process to the end of its first step."""
    touch_memory()
    with peer(training, variant, threads, cold=True, plain=True) as process:
        return process.started


def start_rows(name: str, rounds: int, threads: int) -> Iterator[Row]:
    """From before the process to the end of its first step, 124M, B 4, T 64; page cache and memory warm. Of a peer's
    variants the one that starts soonest.
    """
    training = cases.START[name]
    ours: list[float] = []
    theirs: dict[Variant, list[float]] = {}
    for number in range(rounds + 1):  # the first one reads files
        took = start_of_ours(training, threads)
        if number:
            ours.append(took)
        for variant in training.variants:
            if variant.unrolled or (variant.compiled and not number):
                continue
            took = start_of_peer(training, variant, threads)
            if number:
                theirs.setdefault(variant, []).append(took)
    mine = statistics.median(ours)
    for who in dict.fromkeys((v.peer, v.compiled) for v in theirs):
        best = min((v for v in theirs if (v.peer, v.compiled) == who), key=lambda v: statistics.median(theirs[v]))
        ratios = [other / own for own, other in zip(ours, theirs[best], strict=True)]
        ratio = statistics.median(ratios)
        row = entry(f"{name}/compiled" if best.compiled else name, mine, "s", best.peer, mine * ratio)
        yield row | {"ratio": ratio, "rounds": ratios, "variant": best.name}


def minutes(names: Sequence[str], rounds: int) -> float:
    """About how long these cases take."""
    costs = [next(cost for prefix, cost in MINUTES.items() if name.startswith(prefix)) for name in names]
    return sum(fixed + each * rounds for fixed, each in costs)


def rows_of(names: Sequence[str], rounds: int, steps: int, threads: int, calibrated: Calibration) -> Iterator[Row]:
    """Of these cases, in turn."""
    trainings = {training.case: training for training in cases.TRAININGS}
    for name in names:
        began = time.monotonic()
        if name in trainings:
            yield from train_rows(trainings[name], rounds, threads, calibrated.now)
        elif name in cases.START:
            yield from start_rows(name, rounds, threads)
        elif name in cases.MEMORY:
            yield from memory_rows(name, threads)
        elif name == cases.CURVE:
            yield from curve_rows(name, steps, threads)
        else:
            continue
        say(f"  {name}: {time.monotonic() - began:.0f} s")
    gemms = [name for name in names if name in cases.gemms()]
    if gemms:
        yield from gemm_rows(gemms, rounds, calibrated.now)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="what names of cases begin with; all where there is none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of the loss curve")
    options = parser.parse_args()
    names, threads = cases.chosen(options.cases), usable_cpus()
    for which in ("torch", "jax"):
        python_of(which)
    about = f"about {minutes(names, options.rounds):.0f} minutes on two idle cores"
    say(f"{len(names)} cases, {options.rounds} rounds, {threads} threads: {about}")
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="hotstage-peers-") as folder,
        calibration(Path(folder), threads) as calibrated,
    ):
        for row in rows_of(names, options.rounds, options.steps, threads, calibrated):
            rows.append(row)
            write([row])
    say(f"\n{'case':<36} {'peer':<16} {'ours':>9} {'theirs':>9} {'ratio':>6}  (on whole cores), variant")
    for row in rows:
        held = row.get("ratio_on_whole_cores")
        more = f"({held:.2f})" if held else ""
        figures = f"{row['value']:>9.1f} {row['peer_value']:>9.1f} {row['ratio']:>6.2f}"
        say(f"{row['name']:<36} {row['peer']:<16} {figures}  {more:<7} {row['unit']}, {row.get('variant', '')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
