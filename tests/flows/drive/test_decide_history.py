"""What a driver still counts of earlier failures, and what it has forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.drive.decide import judge as decide
from flows.drive.history import STRIKE_FADES, struck
from flows.drive.views import Cause, CheckpointView, Decision, End, LogView, OrderView, StartAttempt
from tests.flows.drive.decisions import LOST, POLICY, attempt, ended, log, nodes_of, started, steps


def decision_after(cause: dict[str, object], code: dict[str, int], *, saved: bool, word: bool) -> Decision:
    """The second failure of a kind: after progress, after a person's word, or after neither."""
    nodes = [ended(0, epoch=2, code=75), ended(1, epoch=2, **code)]
    attempts = (attempt(1), attempt(2, cause=cause))
    points = steps((3, 40)) if saved else ()
    orders = (OrderView(3, {}, again=True),) if word else ()
    return decide(LogView(attempts, points, points, orders=orders), nodes, POLICY)


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        ({"class": "memory", "step": 5, "text": ""}, {"signal": 9, "memory": 1 << 20}),
        ({"class": "bug", "step": 5, "text": ""}, {"code": 70}),
        ({"class": "numeric", "step": 5, "text": ""}, {"code": 87}),
        ({"class": "signal", "step": 5, "text": "", "signal": 11}, {"signal": 11}),
    ],
    ids=lambda value: str(value.get("class", "")),
)
def test_what_failed_before_progress_or_a_person_s_word_does_not_count(
    cause: dict[str, object], code: dict[str, int]
) -> None:
    assert isinstance(decision_after(cause, code, saved=False, word=False), End)
    assert isinstance(decision_after(cause, code, saved=True, word=False), StartAttempt)
    assert isinstance(decision_after(cause, code, saved=False, word=True), StartAttempt)


def test_the_budget_begins_anew_with_a_person_s_word_and_with_a_checkpoint_of_the_last_attempt() -> None:
    many = tuple(attempt(n, cause=LOST.to_map() if n > 1 else None) for n in range(1, 9))
    nodes = [ended(n, epoch=8, code=75) for n in range(2)]
    assert isinstance(decide(LogView(many), nodes, POLICY), End)
    spoken = LogView(many, orders=(OrderView(9, {}, again=True),))
    assert started(decide(spoken, nodes, POLICY)).delay_s == 0.0
    saved = steps((9, 4))  # what the eighth saved is progress
    assert started(decide(LogView(many, saved, saved), nodes, POLICY)).delay_s == 0.0
    # the same step saved once more is none
    stale = steps((3, 4), (9, 4))
    assert isinstance(decide(LogView(many, stale, stale), [replace(n) for n in nodes], POLICY), StartAttempt)
    worn = LogView((*many, *(attempt(n, restore_step=4, cause=LOST.to_map()) for n in range(10, 18))), stale, stale)
    assert isinstance(decide(worn, nodes_of(17, nodes), POLICY), End)


def test_what_found_out_about_damage_is_no_part_of_the_budget() -> None:
    """More damaged checkpoints than the budget has attempts, and a sound one before them."""
    saved = steps(*((n, 10 * n) for n in range(2, 12)))
    attempts = [attempt(1)]
    for number, point in enumerate(reversed(saved[1:])):
        for again in range(2):
            cause = {"class": "restore", "step": -1, "text": "damaged"}
            attempts.append(
                attempt(20 + 2 * number + again, restore_step=point.step, restore_checkpoint=point.n, cause=cause)
            )
    nodes = [ended(0, epoch=attempts[-1].epoch, code=76, step=-1), ended(1, epoch=attempts[-1].epoch, code=75, step=-1)]
    full = LogView(tuple(attempts), saved, saved[:1], damaged=tuple(c.n for c in saved[1:]))
    policy = replace(POLICY, steps=1000)
    last = started(decide(full, nodes, policy))
    assert (last.restore.checkpoint, last.delay_s) == (2, 0.0)


def test_a_strike_fades_with_checkpoints_a_word_and_a_pardon_a_sick_machine_not_with_checkpoints() -> None:
    strike = {"class": "signal", "place": "b", "step": 1}
    attempts = (attempt(1), attempt(2, cause=strike), attempt(3, cause=strike))
    assert struck(log(*attempts), 2) == {"b"}
    almost = steps(*((10 + n, 10 * n) for n in range(1, STRIKE_FADES)))
    assert struck(log(*attempts, saved=almost), 2) == {"b"}
    enough = (*almost, CheckpointView(40, 400, 1))
    assert struck(log(*attempts, saved=enough), 2) == frozenset()
    assert struck(replace(log(*attempts), orders=(OrderView(4, {}),)), 2) == frozenset()
    assert struck(log(*attempts, attempt(4, pardon=("b",))), 2) == frozenset()
    sick = attempt(3, cause={"class": "sick", "place": "c", "step": 0})
    assert struck(log(attempt(1), sick, saved=enough), 2) == {"c"}
    assert struck(replace(log(attempt(1), sick), orders=(OrderView(4, {}),)), 2) == frozenset()


def test_a_kill_from_outside_is_told_by_its_number_not_by_words() -> None:
    def after(cause: dict[str, object], **end: int) -> Decision:
        attempts = (attempt(1), attempt(2, cause=cause))
        return decide(log(*attempts), [ended(0, epoch=2, **end), ended(1, epoch=2, code=75)], POLICY)

    words = {"class": "signal", "step": 5, "text": "rank 0 was killed (signal 9)"}
    assert isinstance(after(words, signal=9), StartAttempt)
    assert isinstance(after(words, signal=11), End)


def test_that_the_state_was_saved_is_told_once() -> None:
    saved = [ended(0, code=85), ended(1, code=85)]
    for lost, text in (
        (Cause("preempted", "pod x-1 is being deleted"), "pod x-1 is being deleted; state saved"),
        (Cause("preempted", "pod x-1 ended with 85: stopped on request, state saved", code=85), ""),
    ):
        decision = started(decide(log(), saved, POLICY, lost=lost))
        assert decision.cause is not None
        assert decision.cause.to_map()["text"] == (text or lost.text)
