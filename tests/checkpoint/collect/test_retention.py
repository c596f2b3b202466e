"""What a run keeps: each rule by itself, their union, and what holds of any log. Seeds are in the cases' names."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from typing import Any

import pytest

from checkpoint.collect.retention import LEAST, Rules, given_up, keep, losses_of, validated_of
from checkpoint.curve import Curve
from checkpoint.errors import Damaged
from checkpoint.evaluated import Evaluation, Evaluations
from checkpoint.log import RunState
from checkpoint.log.records import Record
from checkpoint.log.state import Fold
from tests.checkpoint.samples import attempt_body, point_body

RUN = "demo-0a1b2c"


class Log:
    """A log in memory, by records alone."""

    def __init__(self) -> None:
        self.state = RunState(RUN)
        self.time = 0.0

    def add(self, kind: str, body: dict[str, Any], epoch: int | None = None) -> Log:
        if (self.state.n + 1) % 256 == 0:
            self._put("fold", {"state": "folds/x", "bytes": 1, "sha256": "0" * 64}, self.state.epoch)
        return self._put(kind, body, self.state.epoch if epoch is None else epoch)

    def _put(self, kind: str, body: dict[str, Any], epoch: int) -> Log:
        fold, n = Fold(self.state), self.state.n + 1
        fold.add(Record(n, kind, n if kind == "attempt" else epoch, "w:0", self.time, body))
        self.state = fold.freeze()
        return self

    def attempt(self, checkpoint: int | None = None) -> Log:
        info = None if checkpoint is None else self.state.checkpoint(checkpoint)
        return self.add("attempt", attempt_body(checkpoint, info.step if info else 0))

    def save(self, step: int, time: float | None = None) -> Log:
        self.time = self.time if time is None else time
        return self.add("checkpoint", point_body(step, self.state.epoch))

    def steps(self, rules: Rules, **more: Any) -> list[int]:
        """Those that stay."""
        kept = keep(self.state, rules, **more)
        assert set(kept) <= set(self.state.checkpoints.n)
        return [c.step for c in self.state.checkpoints if c.n in kept]


def line(*steps: int) -> Log:
    log = Log().attempt()
    for step in steps:
        log.save(step)
    return log


def test_each_rule() -> None:
    log = line(*range(100, 1100, 100))
    assert log.steps(Rules(last=3)) == [800, 900, 1000]
    assert log.steps(Rules(every_steps=300)) == [100, 300, 600, 900, 1000]  # the first of each 300, and the newest two
    assert log.steps(Rules(every_steps=250)) == [100, 300, 500, 800, 900, 1000]
    assert log.steps(Rules(last=1)) == [900, 1000]  # never fewer than two
    assert keep(log.state, None).keys() == set(log.state.checkpoints.n)
    timed = Log().attempt()
    for number in range(10):
        timed.save(number + 1, time=1000.0 + 40 * number)
    assert timed.steps(Rules(every_s=100.0)) == [1, 4, 6, 9, 10]
    losses = {n: float(step % 700) for n, step in zip(log.state.checkpoints.n, range(100, 1100, 100), strict=True)}
    assert log.steps(Rules(best=2), losses=losses) == [700, 800, 900, 1000]  # the newer of equals


def test_a_step_that_was_skipped_does_not_leave_a_hole() -> None:
    """The store was away at step 1000: the first one after it stands for that thousand."""
    assert line(800, 900, 1100, 1200, 1300, 1400).steps(Rules(every_steps=1000)) == [800, 1100, 1300, 1400]


def test_a_clock_that_jumps_keeps_more_and_never_less() -> None:
    log = Log().attempt()
    for number, time in enumerate([0, 50, 100, 4e9, 150, 200, 250, -9e9, 300, 350]):
        log.save(number + 1, time=float(time))
    assert set(log.steps(Rules(every_s=100.0))) >= {1, 3, 6, 9} | {4, 8}


def test_an_unknown_loss_stays_and_one_that_is_no_number_is_the_worst() -> None:
    log = line(10, 20, 30, 40, 50)
    n = list(log.state.checkpoints.n)
    assert log.steps(Rules(best=1), losses={}) == [10, 20, 30, 40, 50]
    assert log.steps(Rules(best=1), losses={n[0]: math.nan, n[1]: 2.0, n[2]: 1.0, n[3]: 3.0, n[4]: 3.0}) == [30, 40, 50]


def test_losses_are_the_mean_since_the_checkpoint_before() -> None:
    curve = Curve()
    for step in range(1, 31):
        curve.add({"event": "step", "step": step, "epoch": 1, "time": 0, "loss": float(step)}, 0)
    log = line(10, 20, 30, 40)
    n = list(log.state.checkpoints.n)
    assert losses_of(log.state, curve) == {n[0]: 5.5, n[1]: 15.5, n[2]: 25.5, n[3]: 30.0}
    assert losses_of(log.state, Curve()) == {}
    late = Curve()
    late.add({"event": "step", "step": 25, "epoch": 1, "time": 0, "loss": 1.0}, 0)
    assert losses_of(log.state, late) == {n[2]: 1.0, n[3]: 1.0}  # of the first two nothing is known


def test_the_best_are_by_validation_loss_where_there_is_one() -> None:
    log = line(10, 20, 30, 40, 50, 60, 70)
    n = dict(zip(range(10, 80, 10), log.state.checkpoints.n, strict=True))
    training = {n[step]: float(step) for step in n}  # it says that 10 is the best

    def steps(best: int, validated: dict[int, float]) -> list[int]:
        return log.steps(Rules(best=best), losses=training, validated={n[s]: loss for s, loss in validated.items()})

    assert steps(1, {}) == [10, 60, 70]
    assert steps(1, {20: 3.0, 30: 1.0, 40: 2.0}) == [30, 60, 70]  # 10 was passed over; 60 and 70 are the newest two
    assert steps(3, {20: 3.0, 30: math.nan, 40: 2.0}) == [20, 30, 40, 50, 60, 70]  # theirs may come
    assert steps(2, {60: 2.0, 70: 2.0, 50: 1.0, 40: 5.0}) == [50, 60, 70]


def test_what_was_given_up_by_validation_is_never_wanted_again() -> None:
    """However slowly, and in whatever order, the losses come: the line only grows."""
    rng = random.Random(11)
    for _ in range(50):
        log, gone, known = Log().attempt(), set[int](), dict[int, float]()
        for step in range(10, 300, 10):
            log.save(step)
            numbers = log.state.checkpoints.n
            if rng.random() < 0.5:  # the newest of those that stay is evaluated
                known[numbers[-1 - rng.randrange(min(2, len(numbers)))]] = rng.random()
            known = {n: loss for n, loss in known.items() if n not in gone}
            kept = keep(log.state, Rules(best=2), validated=known)
            assert not gone & kept.keys()
            gone |= set(given_up(log.state, kept))


def test_validation_losses_on_other_data_are_no_measure() -> None:
    log = line(10, 20, 30, 40)
    n, there = list(log.state.checkpoints.n), Evaluations()
    for step, loss, data in ((10, 0.5, "old"), (20, 3.0, "new"), (30, 2.0, "new")):
        there.add(Evaluation(step, 1, loss=loss, windows=4, data=data))
    there.add(Evaluation(40, 1, windows=0))
    there.add(Evaluation(30, 9, loss=0.1, windows=4, data="new"))  # of an attempt that the line does not have
    assert validated_of(log.state, there) == {n[1]: 3.0, n[2]: 2.0}


def test_damaged_ones_and_what_a_rollback_left_behind_count_for_no_rule() -> None:
    log = line(10, 20, 30, 40)
    log.add("damaged", {"checkpoint": 5, "reason": "r"})
    assert log.steps(Rules(last=2)) == [20, 30]
    log.attempt(3)  # back to step 20
    log.save(25).save(35)
    assert log.steps(Rules(last=2)) == [20, 25, 35]  # 20: the attempt began from it
    assert log.steps(Rules(last=4)) == [10, 20, 25, 35]
    log.add("pin", {"checkpoint": 5, "name": "look"})
    assert log.steps(Rules(last=2)) == [20, 40, 25, 35]


def test_where_fewer_than_two_can_be_used_everything_stays() -> None:
    """All damaged, as two sick machines say: somebody may still want to look."""
    log = line(10, 20, 30, 40)
    for n in (3, 4, 5):
        log.add("damaged", {"checkpoint": n, "reason": "r"})
    assert log.steps(Rules()) == [10, 20, 30, 40]
    log.save(50)
    assert log.steps(Rules()) == [10, 50]


def test_an_order_that_names_a_checkpoint_holds_it_until_an_attempt_follows() -> None:
    log = line(10, 20, 30, 40)
    log.add("intervention", {"kind": "order", "how": {}, "by": "me", "via": "v", "checkpoint": 2, "step": 10})
    assert log.steps(Rules()) == [10, 20, 30, 40]  # the line ends there, with one: nothing is given up
    log.attempt(2).save(50).save(60).attempt(log.state.n)
    assert log.steps(Rules()) == [50, 60]


@pytest.mark.parametrize(
    ("keep_map", "why"),
    [
        ({"last": 1}, "last"), ({"last": "3"}, "last"), ({"every_steps": -1}, "every_steps"), ([1], "keep"),
        ({"every_s": -1.0}, "below 0"), ({"moon": 1}, "the rule 'moon'"), ({"grace_s": math.inf}, "grace_s"),
        ({1: 2}, "the rule '1'"),
    ],
)  # fmt: skip
def test_rules_that_are_none_are_refused(keep_map: Any, why: str) -> None:
    with pytest.raises(Damaged, match=why):
        Rules.of_how({"checkpoint": {"keep": keep_map}})


def test_rules_of_a_how() -> None:
    for how in (None, {}, {"checkpoint": {}}, {"checkpoint": {"keep": None}}):
        assert Rules.of_how(how) is None
    assert Rules.of_how({"checkpoint": {"keep": {}}}) == Rules()
    full = {"last": 5, "every_steps": 100, "every_s": 60, "best": 1, "grace_s": 5.0}
    assert Rules.of_how({"checkpoint": {"keep": full}}) == Rules(5, 100, 60.0, 1, 5.0)


def test_rules_are_the_keys_of_a_spec() -> None:
    from trainer.spec_how import KeepSpec

    assert KeepSpec().model_dump() == asdict(Rules())
    assert Rules.of_how({"checkpoint": {"keep": KeepSpec(every_steps=7, best=1).model_dump()}}) == Rules(2, 7, 0.0, 1)


def random_log(rng: random.Random) -> list[Log]:
    """A log, as it was after each of its records."""
    log, states, step = Log().attempt(), [], 0
    for _ in range(rng.randrange(5, 60)):
        log.time += rng.choice([1.0, 10.0, 100.0])
        usable = log.state.restore_candidates()
        match rng.choice(["save"] * 6 + ["again", "back", "pin", "unpin", "damaged"]):
            case "save":
                log.save(step := step + rng.choice([10, 10, 10, 30, 70]))
            case "again":
                log.attempt(usable[0].n if usable else None)
                step = usable[0].step if usable else 0
            case "back" if usable:
                info = rng.choice(usable)
                log.attempt(info.n)
                step = info.step
            case "pin" if usable:
                log.add("pin", {"checkpoint": rng.choice(usable).n, "name": f"p{rng.randrange(3)}"})
            case "unpin":
                log.add("unpin", {"name": f"p{rng.randrange(3)}"})
            case "damaged" if usable and rng.random() < 0.3:
                log.add("damaged", {"checkpoint": rng.choice(usable).n, "reason": "r"})
        now = Log()
        now.state, now.time = log.state, log.time
        states.append(now)
    return states


def random_rules(rng: random.Random) -> Rules:
    return Rules(
        last=rng.randrange(2, 5), every_steps=rng.choice([0, 50, 100]), every_s=rng.choice([0.0, 60.0, 300.0]),
        best=rng.choice([0, 1, 3]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(100))
def test_what_holds_of_any_log(seed: int) -> None:
    rng = random.Random(seed)
    states, rules = random_log(rng), random_rules(rng)
    for log in states:
        state = log.state
        losses = {n: rng.random() for n in state.checkpoints.n if rng.random() < 0.9}
        kept, line = set(keep(state, rules, losses)), state.restore_candidates()
        assert kept == set(keep(state, rules, losses))
        # the newest two, what is pinned and what the newest attempt began from stay; what was given up is all the rest
        assert {c.n for c in line[:LEAST]} <= kept
        assert set(state.pins.values()) <= kept
        assert state.attempts[-1].checkpoint in {None, *kept}
        assert sorted({*kept, *given_up(state, dict.fromkeys(kept, ""))}) == list(state.checkpoints.n)
        # a union: each rule alone keeps no more than all together
        parts = [Rules(rules.last), Rules(every_steps=rules.every_steps), Rules(every_s=rules.every_s)]
        alone = [set(keep(state, part, losses)) for part in [*parts, Rules(best=rules.best)]]
        assert set().union(*alone) == kept
        # more is kept by larger numbers
        more = Rules(rules.last + 1, rules.every_steps, rules.every_s, rules.best and rules.best + 1)
        assert kept <= set(keep(state, more, losses))


@pytest.mark.parametrize("seed", range(100, 160))
def test_what_was_given_up_is_never_wanted_again(seed: int) -> None:
    """Collected after each record or only at the end, along a line that grows: the same checkpoints stay."""
    rng = random.Random(seed)
    rules = Rules(rng.randrange(2, 5), rng.choice([0, 50, 100]), rng.choice([0.0, 60.0, 300.0]))
    often, step = Log().attempt(), 0
    seldom = Log().attempt()
    numbers: dict[int, int] = {}
    for _ in range(rng.randrange(5, 50)):
        step += rng.choice([10, 10, 30, 70])
        often.time = seldom.time = often.time + rng.choice([1.0, 10.0, 100.0, -500.0, 1e6])
        often.save(step)
        numbers[often.state.n] = step
        seldom.save(step)
        for n in given_up(often.state, keep(often.state, rules)):
            often.add("tombstone", {"checkpoint": n})
            assert n in often.state.buried
    assert often.steps(rules) == seldom.steps(rules)
