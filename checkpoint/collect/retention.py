"""What a run keeps: a pure function of its log. A checkpoint stays if one of the rules says so (a union).

Rules  R1  the newest ``last`` usable ones on the line that leads here (``RunState.restore_candidates``), two at least;
       R2  of every ``every_steps`` steps the first one on that line;
       R3  of every ``every_s`` seconds the first one on that line, by the times that its records tell;
       R4  the ``best`` ones by loss on that line. Where one of them has a validation loss it is that one: as many stay
           of those newer than the newest that has one, since theirs may come; older ones without were passed over. Else
           it is the training loss, the mean of the points that the index of metrics has since the checkpoint before;
           one whose loss is not known stays;
       R5  what a pin names, damaged or not;
       R6  what the newest attempt began from, and what an order names that no attempt follows yet.

R2 and R3 take the first of each bucket, so a checkpoint that comes later never takes the place of one that was kept,
and what was once given up is never wanted again as the line grows. A clock that was set back or forth makes more
buckets, and so keeps more.
Checkpoints that a rollback left behind and damaged ones count for no rule but R5 and R6; but while fewer than two on
the line can be used, nothing is given up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

from checkpoint import codec
from checkpoint.curve import Curve
from checkpoint.errors import Damaged
from checkpoint.evaluated import Evaluations
from checkpoint.log import RunState

LEAST = 2
"""Of ``last``: with one alone a damaged object would cost the run."""
GRACE_S = 3600.0
_KEYS = ("last", "every_steps", "every_s", "best", "grace_s")


@dataclass(frozen=True, slots=True)
class Rules:
    """``checkpoint.keep`` of a run's How (trainer/spec_how.py). 0: no such rule.

    ``grace_s``: from a tombstone to the first deletion, by the store's clock.
    """

    last: int = LEAST
    every_steps: int = 0
    every_s: float = 0.0
    best: int = 0
    grace_s: float = GRACE_S

    @classmethod
    def of_how(cls, how: Mapping[str, Any] | None) -> Rules | None:
        """The rules of a How as a record has it; None where everything is kept.

        Damaged where they are none of this version's: nobody may delete by rules that he does not know.
        """
        section = (how or {}).get("checkpoint") or {}
        keep = section.get("keep") if isinstance(section, Mapping) else None
        if keep is None:
            return None
        what = "checkpoint.keep"
        f = codec.Fields(dict(keep) if isinstance(keep, Mapping) else keep, what)
        unknown = sorted(set(keep) - set(_KEYS))
        if unknown:
            raise Damaged(f"{what} has the rule {str(unknown[0])[:40]!r}, which this version does not know")
        found = cls(
            last=f.integer("last", LEAST) if f.has("last") else LEAST,
            every_steps=f.integer("every_steps", 0) if f.has("every_steps") else 0,
            every_s=f.real("every_s") if f.has("every_s") else 0.0,
            best=f.integer("best", 0) if f.has("best") else 0,
            grace_s=f.real("grace_s") if f.has("grace_s") else GRACE_S,
        )
        if not (0 <= found.every_s < inf and 0 <= found.grace_s < inf):
            raise Damaged(f"{what}: every_s or grace_s is below 0, or no finite number")
        return found


def spared(state: RunState) -> dict[int, str]:
    """Checkpoint records that no rule gives up (R5, R6), with why."""
    found = {n: f"pinned as {name}" for name, n in sorted(state.pins.items(), reverse=True)}
    newest = state.newest_attempt
    if newest is not None and newest.checkpoint is not None:
        found[newest.checkpoint] = "the newest attempt began from it"
    if state.start is not None and state.start.checkpoint is not None:
        found[state.start.checkpoint] = "an order names it that no attempt follows yet"
    return found


def keep(
    state: RunState,
    rules: Rules | None,
    losses: Mapping[int, float] | None = None,
    validated: Mapping[int, float] | None = None,
) -> dict[int, str]:
    """The records of the checkpoints that stay, with why. ``losses``, ``validated``: by record, for R4; `losses_of` and
    `validated_of` make them.
    """
    kept = {n: why for n, why in spared(state).items() if n not in state.buried}
    line = state.restore_candidates()
    if (
        rules is None or len(line) < LEAST
    ):  # where nearly all is damaged or left behind a person may still want the rest
        why = "everything is kept" if rules is None else f"fewer than {LEAST} can be used"
        return {n: kept.get(n, why) for n in state.checkpoints.n if n not in state.buried}
    numbers, steps = line.column("n"), line.column("step")  # the newest first
    times = [state.checkpoints.time[row] for row in line.rows]
    if rules.best and (tried := [n for n in numbers if n in (validated or {})]):
        found = {n: inf if isnan(loss) else loss for n, loss in (validated or {}).items()}
        best = sorted(tried, key=lambda n: (found[n], -n))[: rules.best]
        kept |= dict.fromkeys(best, f"one of the best {rules.best} by validation loss")
        newer = numbers[: numbers.index(tried[0])][: rules.best]
        kept |= dict.fromkeys(newer, "its validation loss may come")
    elif rules.best:
        known = {n: inf if isnan(loss) else loss for n, loss in (losses or {}).items()}
        ranked = sorted((n for n in numbers if n in known), key=lambda n: (known[n], -n))
        kept |= dict.fromkeys(ranked[: rules.best], f"one of the best {rules.best} by training loss")
        kept |= {n: "its loss is not known" for n in numbers if n not in known}
    if rules.every_s:
        firsts = {time // rules.every_s: n for n, time in zip(numbers, times, strict=True)}  # the oldest is the last
        kept |= dict.fromkeys(firsts.values(), f"the first of {rules.every_s:g} s")
    if rules.every_steps:
        first_of = {step // rules.every_steps: n for n, step in zip(numbers, steps, strict=True)}
        kept |= dict.fromkeys(first_of.values(), f"the first of {rules.every_steps} steps")
    kept |= dict.fromkeys(numbers[: max(rules.last, LEAST)], f"one of the newest {max(rules.last, LEAST)}")
    return kept


def given_up(state: RunState, kept: Mapping[int, str]) -> list[int]:
    """The checkpoints that neither stay nor have a tombstone, oldest first."""
    return [n for n in state.checkpoints.n if n not in kept and n not in state.buried]


def validated_of(state: RunState, evaluations: Evaluations) -> dict[int, float]:
    """Of the checkpoints on the line the validation loss, as far as it is known: of those that were validated on what
    the newest of them was, since others are no measure of it.
    """
    line = state.restore_candidates()
    rows = {
        n: evaluations.rows[step, epoch]
        for n, step, epoch in zip(line.column("n"), line.column("step"), line.column("epoch"), strict=True)
        if (step, epoch) in evaluations.rows
    }
    found = {n: row for n, row in rows.items() if row.loss is not None}
    newest = next(iter(found.values()), None)
    same = None if newest is None else (newest.data, newest.windows)
    return {n: row.loss for n, row in found.items() if row.loss is not None and (row.data, row.windows) == same}


def losses_of(state: RunState, curve: Curve) -> dict[int, float]:
    """Of the checkpoints on the line the mean training loss since the one before, as far as the index of metrics tells:
    of its points in between, or of the last one before where there is none.
    """
    points = curve.curve()
    steps, values = list(points), [point.loss for point in points.values()]
    line = state.restore_candidates()
    found: dict[int, float] = {}
    before = 0
    for n, step in zip(reversed(line.column("n")), reversed(line.column("step")), strict=True):
        low, high = bisect_right(steps, before), bisect_right(steps, step)
        window = values[low:high] or values[high - 1 : high]
        if window:
            found[n] = sum(window) / len(window)
        before = step
    return found
