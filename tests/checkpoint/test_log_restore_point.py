"""Which checkpoint a log says to go on from, whatever its story."""

from __future__ import annotations

from checkpoint.log import RunLog
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import RUN, attempt_body, point_body


class Story:
    """A log told step by step."""

    def __init__(self) -> None:
        self.log = RunLog(MemoryStore(), RUN, writer="driver")
        self.state = self.log.fold()

    def attempt(self, checkpoint: int | None = None) -> int:
        named = None if checkpoint is None else self.state.checkpoint(checkpoint)
        self.state = self.log.append(
            "attempt", attempt_body(checkpoint, 0 if named is None else named.step), self.state
        )
        return self.state.n

    def save(self, step: int) -> int:
        self.state = self.log.append(
            "checkpoint", point_body(step, self.state.epoch), self.state, epoch=self.state.epoch
        )
        return self.state.n

    def mark(self, kind: str, checkpoint: int, **more: str) -> None:
        self.state = self.log.append(kind, {"checkpoint": checkpoint, **more}, self.state)

    @property
    def steps(self) -> list[int]:
        return [c.step for c in self.state.restore_candidates()]


def test_restore_the_newest_after_the_newest_attempt() -> None:
    s = Story()
    s.attempt()
    assert s.steps == []
    s.save(10)
    s.save(20)
    s.save(30)
    assert s.steps == [30, 20, 10]


def test_a_late_commit_of_an_earlier_step_does_not_pass_a_later_one() -> None:
    s = Story()
    s.attempt()
    s.save(20)
    s.save(10)
    assert s.steps == [20, 10]


def test_a_rollback_ends_the_line_at_its_step_in_whatever_order_steps_were_recorded() -> None:
    """A step that was committed late was followed by all that had been committed before it: an order back to it had the
    driver end a run whose new last step one of those had reached."""
    s = Story()
    s.attempt()
    four = s.save(4)
    s.save(240)
    eight, six = s.save(8), s.save(6)
    body = {"kind": "order", "how": {}, "by": "me", "via": "runs order", "checkpoint": eight, "step": 8}
    s.state = s.log.append("intervention", body, s.state)
    assert s.steps == [8, 6, 4]
    s.attempt(eight)
    assert s.steps == [8, 6, 4]
    s.attempt(six)
    assert s.steps == [6, 4]
    s.attempt(four)
    assert s.steps == [4]


def test_a_second_crash_right_after_a_rollback_goes_back_to_the_rollbacks_point() -> None:
    s = Story()
    s.attempt()
    ten = s.save(10)
    s.save(20)
    s.save(30)
    s.attempt(ten)
    assert s.steps == [10]  # not 30, though its record is newer than 10's
    s.attempt(ten)
    assert s.steps == [10]
    s.save(20)
    assert s.steps == [20, 10]


def test_what_a_rollback_left_behind_is_never_picked_even_after_damage() -> None:
    s = Story()
    s.attempt()
    ten, twenty = s.save(10), s.save(20)
    s.save(30)
    s.attempt(twenty)
    fresh = s.save(25)
    assert s.steps == [25, 20, 10]
    s.mark("damaged", fresh, reason="torn")
    assert s.steps == [20, 10]
    s.mark("damaged", twenty, reason="torn")
    assert s.steps == [10]
    s.mark("damaged", ten, reason="torn")
    assert s.steps == []
    assert [c.step for c in s.state.lineage()] == [25, 20, 10]


def test_a_rollback_to_the_very_beginning_forgets_everything() -> None:
    s = Story()
    s.attempt()
    s.save(10)
    s.attempt(None)
    assert s.steps == []
    s.save(5)
    assert s.steps == [5]


def test_candidates_by_step() -> None:
    s = Story()
    s.attempt()
    s.save(10)
    s.save(20)
    found = s.state.at_step(10)
    assert found is not None
    assert found.step == 10
    newest = s.state.at_step()
    assert newest is not None
    assert newest.step == 20
    assert s.state.at_step(15) is None


def test_tombstones_are_void_for_what_is_pinned_or_named() -> None:
    s = Story()
    s.attempt()
    ten, twenty, thirty = s.save(10), s.save(20), s.save(30)
    s.mark("pin", ten, name="release")
    s.attempt(thirty)
    for checkpoint in (ten, twenty, thirty):
        s.mark("tombstone", checkpoint)
    assert s.state.tombstones == {twenty}
    assert s.steps == [30, 10]
    s.mark("pin", twenty, name="late")  # the collector may be at work: too late
    assert dict(s.state.pins) == {"release": ten}
    s.state = s.log.append("unpin", {"name": "release"}, s.state)
    s.mark("tombstone", ten)
    assert s.state.tombstones == {ten, twenty}
    assert s.steps == [30]
