"""What a run's past means for what comes next: budgets, pauses, strikes, suspicions. Pure; read from the log alone.

Nothing counts for ever. Failures count since the run last saved something newer, or since it was last given an
order; a machine's strikes count until so many newer checkpoints are saved. Ages are counted in records and steps: no
clock orders anything.
"""

from __future__ import annotations

import operator
import sys
from bisect import bisect_left, bisect_right
from itertools import accumulate, compress

from flows.drive.views import AttemptView, Cause, LogView, Policy, Saves
from trainer.failures import FAILURES, SIGKILL, Again, Failure, Strike

STRIKE_FADES = 8
"""Newer checkpoints after which a strike is forgotten."""


def spoken(log: LogView) -> int:
    """The record of a person's last word; 0 where there was none."""
    return next((order.n for order in reversed(log.orders) if not order.own), 0)


def raises(log: LogView) -> list[int]:
    """The records by which the run came further than ever: a checkpoint of a later step, or an attempt that began from
    a later step (in memory). An order that takes it back sets the mark there.
    """
    back = _ordered_back(log)
    saved, best, at = Saves.of(log.checkpoints), -1, 0
    found: list[int] = []
    for epoch, restored in [*((a.epoch, a.restore_step) for a in log.attempts), (sys.maxsize, -1)]:
        end = bisect_left(saved.n, epoch)
        reached = list(accumulate(saved.step[at:end], max, initial=best))  # before the first, and after each
        found += compress(saved.n[at:end], map(operator.gt, reached[1:], reached))
        best, at = restored if epoch in back else reached[-1], end
        if restored > best:
            best = restored
            found.append(epoch)
    return found


def _ordered_back(log: LogView) -> set[int]:
    """The attempts that are the first to follow an order which says from where."""
    found: set[int] = set()
    before = 0
    for attempt in log.attempts if any(order.start is not None for order in log.orders) else ():
        if any(before < order.n <= attempt.order and order.start is not None for order in log.orders):
            found.add(attempt.epoch)
        before = attempt.order
    return found


def recent(log: LogView) -> tuple[AttemptView, ...]:
    """The attempts that began since the run came further, or since its last order; without those that only found
    out that a checkpoint is damaged: there are as many as checkpoints at most.
    """
    marks = raises(log)
    since = max(marks[-1] if marks else 0, log.orders[-1].n + 1 if log.orders else 0)
    return tuple(
        a for a in log.attempts if a.epoch >= since and (a.restore_slots or a.restore_checkpoint not in log.damaged)
    )


def give_up(log: LogView, cause: Cause, policy: Policy) -> str | None:
    """Why no further attempt makes sense, or None (D4)."""
    since = recent(log)
    causes = [a.cause for a in since if a.cause]
    match FAILURES[cause.cls].again:
        case Again.NEVER:
            return cause.said()
        case Again.ONCE if any(c.get("class") == cause.cls for c in causes):
            return f"{cause.said()}; twice"
        case Again.ONCE_A_PLACE if any(
            a.cause
            and a.epoch > spoken(log)
            and (a.cause.get("class"), a.cause.get("place", "")) == (cause.cls, cause.place)
            for a in log.attempts
        ):
            return f"{cause.said()}; twice, and there is no other machine"
        case Again.SAME_STEP:
            same = 1
            for earlier in reversed(causes):
                if earlier.get("class") != cause.cls or earlier.get("step") != cause.step:
                    break
                same += 1
            # a kill from outside may hit any step twice by chance; a crash of its own at one step twice is a fact
            limit = policy.max_same_step + (2 if cause.signal == SIGKILL else 0)
            if same >= limit:
                return f"{cause.said()}; {same} times at step {cause.step}"
    # one that was left because there was no room has not failed (D5): what came next has no cause, or a pardon
    failed = 1 + sum(bool(a.cause) and not a.pardon for a in since[1:])
    if failed >= policy.max_attempts_without_progress:
        return (
            f"{failed} attempts in a row started from step {since[-1].restore_step} and saved nothing newer; "
            f"last: {cause.said()}"
        )
    return None


def backoff(log: LogView, policy: Policy) -> float:
    """No wait after progress; else doubling from backoff_s."""
    stuck = len(recent(log)) - 1
    return 0.0 if stuck <= 0 else min(policy.backoff_s * 2.0 ** min(stuck - 1, 60), policy.backoff_max_s)


def struck(log: LogView, strikes: int, also: Cause | None = None) -> frozenset[str]:
    """Machines that were the place of so many failures that may have been theirs, or that are sick (D5).

    A strike fades with newer checkpoints, all of them with a person's word, those of a machine with its pardon; a sick
    machine stays out until a person's word or its pardon. ``also``: a failure that is not in the log yet.
    """
    if also is None and not any(a.cause and a.cause.get("place") for a in log.attempts):
        return frozenset()
    word, further = spoken(log), set(raises(log))
    saved = [n for n in Saves.of(log.checkpoints).n if n in further]
    pardoned: dict[str, int] = {}
    for a in log.attempts:
        pardoned.update(dict.fromkeys(a.pardon, a.epoch))
    found: list[tuple[str, Strike]] = []
    for a in log.attempts:
        place = str(a.cause.get("place") or "") if a.cause else ""
        if not a.cause or not place or a.epoch <= max(word, pardoned.get(place, 0)):
            continue
        strike = _strike(Failure.read(a.cause.get("class")))
        newer = len(saved) - bisect_right(saved, a.epoch)
        if strike is Strike.OUT or (strike is Strike.FADES and newer < STRIKE_FADES):
            found.append((place, strike))
    if also is not None and also.place:
        found.append((also.place, _strike(also.cls)))
    places = [place for place, strike in found if strike is Strike.FADES]
    return frozenset(place for place, strike in found if strike is Strike.OUT or places.count(place) >= strikes)


def _strike(cls: Failure | None) -> Strike:
    return FAILURES[cls].strike if cls is not None else Strike.NONE


def avoided(log: LogView, launch: str, strikes: int) -> tuple[str, ...]:
    """The machines that a launch must not use, by what the log said when it began: those with strikes, and the one
    whose reading of a checkpoint it is there to check.
    """
    first = next((a for a in log.attempts if a.launch == launch), None)
    if first is None:
        return tuple(sorted(struck(log, strikes)))
    then = LogView(
        attempts=tuple(a for a in log.attempts if a.epoch <= first.epoch),
        checkpoints=Saves.of(log.checkpoints).before(first.epoch),
        orders=tuple(o for o in log.orders if o.n < first.epoch),
    )
    out = set(struck(then, strikes))
    if first.cause and first.cause.get("class") == Failure.RESTORE and first.cause.get("place"):
        out.add(str(first.cause["place"]))
    return tuple(sorted(out))


def suspected(log: LogView, checkpoint: int | None) -> bool:
    """Whether the last attempt before the newest that read this checkpoint (None: the parent's) found it damaged."""
    for before, after in reversed(list(zip(log.attempts, log.attempts[1:], strict=False))):
        if before.restore_checkpoint != checkpoint or before.restore_slots is not None or not after.cause:
            continue
        if after.cause.get("class") == Failure.RESTORE:
            return True
        if int(after.cause.get("step", -1)) > before.restore_step:
            return False
    return False
