"""Bubbles and memory of the schedules, simulated, beside the literature's formulas; the table of docs/schedules.md.

    python -m tests.trainer.plan.formulas

F, I and W last one unit each of a position's work on a microbatch, messages take no time; with two stages a position
each lasts half as long. A step is 3 m units of work and what is idle. Memory is in microbatches of a whole position.

    GPipe, 1F1B   3 (p - 1) idle units                    Huang et al. 2019, Narayanan et al. 2019
    interleaved   3 (p - 1) / chunks                      Narayanan et al. 2021; m a multiple of p
    ZB-H1         (p - 1) (F + I - W)                     Qi et al. 2024, arXiv 2401.10241; m >= p
    ZB-V          (p - 1) / 2, the start alone: no position idles between its first and last action; m >= 2 p - 1
                  (m = p: p - 1)
    V-Half        (3 p - 5) / 2, odd p (3 p - 4) / 2: half of 1F1B's, as Qi et al. 2024, arXiv 2405.15362, say
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainer.plan.messages import insert_messages
from trainer.plan.schedules import held_at_once, pipeline_for, rows_for
from trainer.plan.simulate import CostModel, from_rows, simulate
from trainer.spec_how import THERE_AND_BACK

NAMES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half")
TWO = ("interleaved-1f1b", *THERE_AND_BACK)
"""Schedules that have two stages a position here."""


@dataclass(frozen=True)
class Figures:
    """Of a step: idle units of the longest row of actions, start included; the same between a position's first and
    last action; microbatches held at once, at the position with the most."""

    idle: float
    within: float
    held: float


def formula(name: str, p: int, m: int) -> Figures:
    """What the literature says, for m = p, 2 p, …"""
    idle = {
        "gpipe": 3 * (p - 1),
        "1f1b": 3 * (p - 1),
        "interleaved-1f1b": 3 * (p - 1) / 2,
        "zb-h1": p - 1,
        "zb-v": p - 1 - min(m - p, p - 1) / 2,
        "v-half": max(0, 3 * p - 5 + p % 2) / 2,
    }[name]
    held = {
        "gpipe": m,
        "interleaved-1f1b": min(m, (3 * p - 1) / 2),
        "v-half": (p + 2 - p % 2) / 2,
    }.get(name, p)
    return Figures(idle, idle if name != "zb-v" or m < 2 * p - 1 else 0, held)


def simulated(name: str, p: int, m: int) -> Figures:
    """What the simulator says of the generator's rows, their messages put in."""
    chunks = 2 if name in TWO else 1
    pipeline = pipeline_for(name, chunks * p, p)
    rows = rows_for(name, pipeline, m)
    times = dict.fromkeys("FIW", 1 / chunks)
    done = simulate(from_rows(insert_messages(rows, chunks * p), times), CostModel(1.0, 1.0, 1e18, 0.0, 0.0))
    within = 0.0
    for row in done.timeline.rows:
        work = [event for event in row if event.kind in "FIWB"]
        within = max(within, work[-1].end - work[0].start - 3 * m)
    return Figures(done.step_seconds - 3 * m, within, max(held_at_once(rows)) / chunks)


SIZES = [(p, n * p) for p in (2, 4, 8, 16, 32, 64) for n in (1, 2, 4, 8)]


def lines(sizes: Iterable[tuple[int, int]]) -> Iterator[str]:
    """The table: by the simulator, the part of a step that a position is idle, and the microbatches that it holds."""
    yield "| positions p | microbatches m | " + " | ".join(NAMES) + " |"
    yield "|---" * (2 + len(NAMES)) + "|"
    for p, m in sizes:
        found = [simulated(name, p, m) for name in NAMES]
        cells = [f"{f.idle / (3 * m + f.idle):.1%}, {f.held:g}" for f in found]
        yield f"| {p} | {m} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for line in lines(SIZES):
        print(line, flush=True)
