"""How long devices have worked for a run, and how much of that was lost: by its log and its index of metrics. Pure.

An attempt counts from its record to its newest step, by as many devices as it has ranks: also its start-up, and steps
that are done twice. One that did no step counts nothing: it waited, or nobody knows. Times are by several machines'
clocks; what is below nothing is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.curve import AttemptRow
from checkpoint.log import AttemptInfo

HOUR = 3600.0


@dataclass(frozen=True)
class Hours:
    """Device hours: in all, and of those the ones that gave no step which stayed."""

    used: float = 0.0
    lost: float = 0.0


def worked(attempts: Sequence[AttemptInfo], rows: Mapping[int, AttemptRow], back: Mapping[int, int]) -> Hours:
    """Of these attempts, oldest first. ``rows``: of the index, by epoch; ``back``: steps to which orders sent attempts
    back, by epoch (what lies behind them was not lost by a failure).
    """
    used = lost = 0.0
    reached = 0
    for attempt in attempts:
        reached = back.get(attempt.epoch, reached)
        row = rows.get(attempt.epoch)
        if row is None:
            continue
        began, ended = max(0.0, row.first.time - attempt.time), max(0.0, row.last.time - attempt.time)
        steps = row.last.step - row.first.step
        step_s = (row.last.time - row.first.time) / steps if steps > 0 else 0.0
        twice = max(0, min(reached, row.last.step) - attempt.step)
        used += attempt.ranks * max(began, ended) / HOUR
        lost += attempt.ranks * min(max(began, ended), began + twice * max(step_s, 0.0)) / HOUR
        reached = max(reached, row.last.step)
    return Hours(used, lost)
