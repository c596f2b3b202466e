"""A run's checkpoints for people: a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def age_words(seconds: float) -> str:
    """How long ago, in one unit; a clock that is behind the writer's says ``just now``.

    >>> [age_words(s) for s in (-5, 59, 3600, 3 * 86400 - 1)]
    ['just now', '59 s ago', '60 min ago', '71 h ago']
    """
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 96)):
        if seconds < most * size:
            return f"{int(seconds / size)} {unit} ago" if seconds >= 1 else "just now"
    return f"{int(seconds / 86400)} days ago"


def size_words(count: int) -> str:
    """
    >>> [size_words(n) for n in (900, 6_700_000, 1_490_000_000, 840 * 10**9)]
    ['0.9 kB', '6.7 MB', '1.5 GB', '840.0 GB']
    """
    unit, size = next(((u, s) for u, s in (("kB", 10**3), ("MB", 10**6)) if count < 1000 * s), ("GB", 10**9))
    return f"{count / size:.1f} {unit}"


def checkpoint_lines(rows: Sequence[Mapping[str, Any]], now: float) -> list[str]:
    """The rows of ``facts.details`` in their order; of those that were given up only how many."""
    there = [row for row in rows if not row["given_up"]]
    lines = [f"{len(there)} checkpoint(s) of {size_words(there[-1]['bytes'])} each"] if there else []
    for row in there:
        notes = [f"DAMAGED: {row['damaged']}"] if row["damaged"] else []
        notes += ["left behind by a rollback"] if row["left"] else []
        notes += [f"pinned: {', '.join(row['pins'])}"] if row["pins"] else []
        attempt = row["attempt"] if row["attempt"] is not None else "-"
        lines.append(
            f"step {row['step']:>8}  attempt {attempt:>3}  {age_words(now - row['time']):>11}  {row['state_digest']}"
            + "".join(f"  {note}" for note in notes)
        )
    if gone := len(rows) - len(there):
        lines.append(f"and {gone} that the rules of the run gave up")
    return lines
