"""What a person asks of a run's numbers: which amendments that gives, and from where the run goes on, or why not.

Pure (docs/adr/0015). An order that amends or rolls back names a checkpoint; all that it amends comes after that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from checkpoint.amendments import MOST, NONE, Amendments
from checkpoint.log import CheckpointInfo, RunState, StartPoint
from flows.drive.views import some_steps
from trainer.errors import SpecError
from trainer.spec import RunSpec
from trainer.wire import ATTEMPT_RATES_MAX, ATTEMPT_SKIPS_MAX


@dataclass(frozen=True)
class Wish:
    """``rollback_to``: the step of a checkpoint; ``skip``: batches, first and last; ``lr_scale``: of the schedule's
    rate, from ``from_step`` on (unset: from where the run goes on); ``steps``: in all.
    """

    rollback_to: int | None = None
    skip: tuple[tuple[int, int], ...] = ()
    lr_scale: float | None = None
    from_step: int | None = None
    steps: int | None = None

    def __bool__(self) -> bool:
        return self != Wish()


def amend(state: RunState, spec: RunSpec, wish: Wish, begins: StartPoint) -> tuple[Amendments, StartPoint]:
    """What the run is trained by from ``begins`` on, where it began, or from the checkpoint that it goes back to.

    SpecError where that cannot be.
    """
    line = _Line(state, begins)
    start = line.start(wish.rollback_to)
    amended = state.amendments
    if wish.steps is not None:
        amended = replace(amended, steps=_steps(spec, amended, wish.steps, start, line))
    total = amended.total(spec.train.steps)
    for first, last in sorted(wish.skip):
        _check_skip(amended, first, last, start, total, line)
        amended = amended.skipping(first, last)
    if wish.from_step is not None and wish.lr_scale is None:
        raise SpecError(f"--from-step {wish.from_step} says from where --lr-scale holds; give that too")
    if wish.lr_scale is not None:
        amended = _rated(amended, wish.lr_scale, wish.from_step, start, total, line)
    if len(amended.skip) > ATTEMPT_SKIPS_MAX or len(amended.rate) > ATTEMPT_RATES_MAX:
        raise SpecError(
            f"the run would have {len(amended.skip)} ranges of skipped batches and {len(amended.rate)} changes of the "
            f"rate; a record holds {ATTEMPT_SKIPS_MAX} and {ATTEMPT_RATES_MAX}: go on in a fork with other data or "
            "another schedule"
        )
    return amended, start


class _Line:
    """The checkpoints that a run can go back to, and where it began."""

    def __init__(self, state: RunState, begins: StartPoint) -> None:
        self.state, self.begins = state, begins
        self.saved: Sequence[CheckpointInfo] = state.restore_candidates()

    def start(self, step: int | None) -> StartPoint:
        if step is None and self.saved:
            return StartPoint(self.saved[0].n, self.saved[0].step)
        if step is None or (step == self.begins.step and self.state.at_step(step) is None):
            return self.begins
        found = self.state.at_step(step)
        if found is not None:
            return StartPoint(found.n, found.step)
        lost = next((c for c in self.state.lineage() if c.step == step), None)
        why = ""
        if lost is not None and lost.n in self.state.buried:
            why = f": it was given up to the collector (log record {self.state.buried[lost.n]})"
        elif lost is not None:
            why = f": it is damaged ({self.state.damaged[lost.n]})"
        steps = sorted({self.begins.step, *(c.step for c in self.saved)})
        raise SpecError(
            f"--rollback-to {step}: {self.state.run} has no usable checkpoint of that step{why}; it can go back to "
            f"{some_steps(steps)}"
        )

    def before(self, amended: Amendments, batch: int) -> str:
        """Of the steps to go back to the newest that has not read this batch, as an option; empty where none has."""
        steps = [*(c.step for c in self.saved), self.begins.step]
        found = next((s for s in sorted(steps, reverse=True) if amended.batch(s) < batch), None)
        return "" if found is None else f"--rollback-to {found}"


def _check_skip(amended: Amendments, first: int, last: int, start: StartPoint, total: int, line: _Line) -> None:
    """SpecError where these batches cannot be skipped."""
    name = f"--skip {first}-{last}"
    if not 1 <= first <= last:
        raise SpecError(f"{name}: batches are numbered from 1, the first one not above the last; correct it")
    end = amended.batch(total)
    if last > end:
        raise SpecError(
            f"{name}: the run ends at step {total}, which reads batch {end}; take batches up to {end}, or more --steps"
        )
    both = [(max(first, a), min(last, b)) for a, b in amended.skip if a <= last and first <= b]
    if both:
        verb = "is" if both == [(both[0][0], both[0][0])] else "are"
        raise SpecError(f"{name}: {_batches(both)} {verb} skipped already; leave that out")
    read = amended.batch(start.step)
    if first <= read:
        back = line.before(amended, first)
        mend = f"go back before them ({back})" if back else "nothing that is saved is before them"
        raise SpecError(
            f"{name}: the run goes on from step {start.step}, which has read the batches up to {read}; {mend}, or take "
            "later ones"
        )


def _rated(
    amended: Amendments, factor: float, since: int | None, start: StartPoint, total: int, line: _Line
) -> Amendments:
    if not 0.0 < factor <= 1.0:
        raise SpecError(
            f"--lr-scale {factor:g}: an order lowers the rate; take a number above 0 and at most 1 (1: as the schedule "
            f"says). A higher rate is another run: hotstage runs fork {line.state.run} --set train.optimizer.lr=…"
        )
    step = start.step + 1 if since is None else since
    if step <= start.step:
        back = line.before(NONE, step)
        mend = f"go back before it ({back})" if back else "nothing that is saved is before it"
        raise SpecError(
            f"--from-step {step}: the run goes on from step {start.step}, and what it has trained keeps its rate; "
            f"{mend}, or take a step after {start.step}"
        )
    if step > total:
        raise SpecError(f"--from-step {step}: the run ends at step {total}; take a step up to there")
    return amended.rated(step, factor)


def _steps(spec: RunSpec, amended: Amendments, steps: int, start: StartPoint, line: _Line) -> int:
    """The new total, as it is kept (0: the spec's). SpecError where it cannot be, or would change what was trained."""
    train, was = spec.train, amended.total(spec.train.steps)
    if not max(1, start.step) <= steps <= MOST:
        back = line.before(NONE, steps + 1)
        limit = f"at least {max(1, start.step)}" if steps < MOST else f"at most {MOST}"
        saved = f"the run goes on from step {start.step}: " if 0 < steps < start.step else ""
        more = f", or go back first ({back})" if saved and back else ""
        raise SpecError(f"--steps {steps}: {saved}take {limit}{more}")
    schedule = train.schedule
    curve = schedule.decay or train.steps
    if schedule.kind == "cosine" and steps > max(was, curve) and train.optimizer.min_lr == 0.0:
        raise SpecError(
            f"--steps {steps}: the cosine's rate is 0 from step {curve} on (train.optimizer.min_lr 0), so that further "
            f"steps would change nothing, and an order does not bend a curve that was trained by: hotstage runs fork "
            f"{line.state.run} --set train.steps={steps}"
        )
    falls = min(was, steps) - schedule.decay
    if schedule.kind == "wsd" and schedule.decay and steps != was and start.step > falls:
        back = line.before(NONE, max(falls, 0) + 1)
        mend = f"go back before that ({back})" if back else "nothing that is saved is before that"
        raise SpecError(
            f"--steps {steps}: the final decay of the rate begins after step {falls}, and the run goes on from step "
            f"{start.step}; {mend}"
        )
    return 0 if steps == train.steps else steps


def amended_words(before: Amendments, after: Amendments, start: StartPoint | None, steps: int | None = None) -> str:
    """What an order changes, for people. ``steps``: the spec's.

    >>> amended_words(NONE, Amendments(200, ((3, 5),), ((101, 0.5),)), StartPoint(7, 100))
    'goes on from step 100, skips batches 3-5, rate x 0.5 from step 101, ends at step 200'
    """
    found = [] if start is None else [f"goes on from step {start.step}"]
    new = [r for r in after.skip if r not in before.skip]
    if new:
        found.append(f"skips {_batches(_apart(new, before))}")
    found += [f"rate x {factor:g} from step {step}" for step, factor in after.rate if (step, factor) not in before.rate]
    gone = [step for step, _ in before.rate if all(step != s for s, _ in after.rate)]
    if gone and len(after.rate) < len(before.rate):
        found.append(f"the rate's change at step {gone[0]} is taken back")
    if after.steps != before.steps:
        total = after.steps or steps
        found.append(f"ends at step {total}" if total else "ends where the spec says")
    return ", ".join(found)


def _apart(ranges: Iterable[tuple[int, int]], before: Amendments) -> list[tuple[int, int]]:
    """Of ranges that grew, what is new."""
    out: list[tuple[int, int]] = []
    for first, last in ranges:
        for a, b in before.skip:
            if first <= a and b <= last:
                if first < a:
                    out.append((first, a - 1))
                first = b + 1
        if first <= last:
            out.append((first, last))
    return out


def _batches(ranges: Sequence[tuple[int, int]]) -> str:
    """For people.

    >>> _batches([(2, 2)]), _batches([(2, 2), (5, 7)])
    ('batch 2', 'batches 2, 5-7')
    """
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"batch {told}" if told.isdecimal() else f"batches {told}"
