"""How long devices have worked for a run, how much of that was lost, and how long failures held it up: by its log and
its index of metrics. Pure.

An attempt counts from its record to its newest step, by as many devices as it has ranks: also its start-up, and steps
that are done twice. One that did no step counts nothing: it waited, or nobody knows. So does the time in which the
machines slept: a step's own time is by a clock that stands still then. Times are by several machines' clocks; what is
below nothing is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpoint.curve import AttemptRow, Curve
from checkpoint.log import AttemptInfo

HOUR = 3600.0
SLEPT_S = 60.0
"""So much more than twice what its steps took is a time between two points in which nobody worked."""


@dataclass(frozen=True)
class Hours:
    """Device hours: in all, and of those the ones that gave no step which stayed."""

    used: float = 0.0
    lost: float = 0.0


def worked(attempts: Sequence[AttemptInfo], curve: Curve, back: Mapping[int, int]) -> Hours:
    """Of these attempts, oldest first. ``back``: steps to which orders sent attempts back, by epoch (what lies behind
    them was not lost by a failure).
    """
    used = lost = 0.0
    reached = 0
    slept = _slept(curve)
    for attempt in attempts:
        reached = back.get(attempt.epoch, reached)
        row = curve.rows.get(attempt.epoch)
        if row is None:
            continue
        began, trained = max(0.0, row.first.time - attempt.time), _trained(row, slept)
        steps = row.last.step - row.first.step
        step_s = trained / steps if steps > 0 else 0.0
        twice = max(0, min(reached, row.last.step) - attempt.step)
        used += attempt.ranks * (began + trained) / HOUR
        lost += attempt.ranks * (began + min(trained, twice * step_s)) / HOUR
        reached = max(reached, row.last.step)
    return Hours(used, lost)


def recoveries(attempts: Sequence[AttemptInfo], rows: Mapping[int, AttemptRow]) -> dict[int, float]:
    """By the epoch of an attempt that a failure caused (nobody waited for one that a person asked for), the seconds
    from the last step before it to its first. ``rows``: of the index of metrics, by epoch.
    """
    found: dict[int, float] = {}
    last: float | None = None
    for attempt in attempts:
        if (row := rows.get(attempt.epoch)) is None:
            continue
        if last is not None and attempt.body.get("cause"):
            found[attempt.epoch] = max(0.0, row.first.time - last)
        last = row.last.time
    return found


def _trained(row: AttemptRow, slept: Mapping[int, float]) -> float:
    return max(0.0, row.last.time - row.first.time - slept.get(row.last.epoch, 0.0))


def _slept(curve: Curve) -> dict[int, float]:
    """By epoch, the seconds between points of an attempt that its steps do not account for."""
    points = {epoch: {row.first.step: row.first, row.last.step: row.last} for epoch, row in curve.rows.items()}
    for point in curve.points.values():
        points.setdefault(point.epoch, {})[point.step] = point
    found: dict[int, float] = {}
    for epoch, by_step in points.items():
        for one, other in pairwise(by_step[step] for step in sorted(by_step)):
            own = (other.step - one.step) * max(one.step_us, other.step_us) / 1e6
            gap = other.time - one.time
            if own > 0 and gap > 2 * own + SLEPT_S:
                found[epoch] = found.get(epoch, 0.0) + gap - own
    return found
