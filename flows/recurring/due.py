"""Which of a schedule's firings start, and which are passed over. Pure: the time is an argument.

F1. A firing that a person asked for (Prefect's page, another program) always starts when there is room for it.
F2. Of planned firings that came due while nobody took them, the newest one starts; a backlog is not worked off.
F3. A firing that waits its turn (overlap "queue") is no backlog: it keeps its place, and no younger one starts before
    it (``flows/serve.py``).
F4. With ``late_s`` a planned firing that could not start within so many seconds of its time is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args
from uuid import UUID

Overlap = Literal["skip", "queue", "cancel"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


@dataclass(frozen=True)
class FiringPolicy:
    """``overlap``: of a firing whose time comes while an older one's run goes on: it is skipped, waits its turn, or
    cancels the older run. ``late_s``: F4; None: however late.
    """

    overlap: Overlap = "skip"
    late_s: float | None = None


@dataclass(frozen=True)
class DueFiring:
    """A flow run whose time has come. ``planned``: by its schedule, not by a person; ``waits``: it has been refused
    once, for want of room, and asks again.
    """

    id: UUID
    name: str
    at: datetime
    planned: bool = True
    waits: bool = False


@dataclass(frozen=True)
class Judged:
    """``start``: those to start, oldest first; ``skipped``: the others, each with why."""

    start: tuple[DueFiring, ...]
    skipped: tuple[tuple[DueFiring, str], ...]


def judge_firings(due: Sequence[DueFiring], policy: FiringPolicy, now: datetime, *, more: bool = False) -> Judged:
    """``more``: there are newer ones that were not read."""
    start: list[DueFiring] = []
    skipped: list[tuple[DueFiring, str]] = []
    ordered = sorted(due, key=lambda firing: (firing.at, str(firing.id)))
    planned = [firing for firing in ordered if firing.planned and not _keeps_its_turn(firing, policy)]
    newest = planned[-1] if planned and not more else None
    for firing in ordered:
        late = (now - firing.at).total_seconds()
        if firing.planned and policy.late_s is not None and late > policy.late_s:
            skipped.append((firing, f"late by {span(late)}, more than the {span(policy.late_s)} that it may be"))
        elif not firing.planned or _keeps_its_turn(firing, policy) or firing is newest:
            start.append(firing)
        else:
            skipped.append((firing, "missed: a newer firing's time has come before anybody could start this one"))
    return Judged(tuple(start), tuple(skipped))


def _keeps_its_turn(firing: DueFiring, policy: FiringPolicy) -> bool:
    return firing.waits and policy.overlap == "queue"


def span(seconds: float) -> str:
    """A stretch of time for people: 40 s, 3 min, 2.5 h, 4 days.

    >>> span(40), span(200), span(9000), span(360_000)
    ('40 s', '3 min', '2.5 h', '4.2 days')
    """
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            value = seconds / size
            return f"{value:.0f} {unit}" if unit != "h" else f"{value:.1f} h"
    return f"{seconds / 86_400:.1f} days"
