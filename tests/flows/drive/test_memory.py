"""What a decision takes from look to look: a value. The same look with the same memory decides the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.drive.decide import decide, launch_to_use
from flows.drive.views import (
    AwaitStop,
    Cause,
    CheckpointView,
    Finished,
    Leave,
    LogView,
    Look,
    Memory,
    OrderView,
    Phase,
    RunLayout,
    StartAttempt,
    Watch,
)
from tests.flows.drive.decisions import POLICY, attempt, ended, layout, log, running
from trainer.failures import Failure

STUCK = log(
    attempt(1), attempt(2, cause={"class": "infra", "step": 5}), attempt(3, cause={"class": "infra", "step": 6})
)
CRASHED = tuple(ended(n, epoch=3, code=75) for n in range(2))


def test_a_next_attempt_is_held_back_and_begins_when_its_time_has_passed() -> None:
    held, memory = decide(STUCK, Look(100.0, CRASHED), POLICY, Memory())
    assert held == Watch(Phase.BACKOFF, "next attempt in 2 s", ensure=False)
    assert memory == Memory(holding=(3, 100.0))
    assert decide(STUCK, Look(101.9, CRASHED), POLICY, memory) == (held, memory)
    begun, memory = decide(STUCK, Look(102.0, CRASHED), POLICY, memory)
    assert isinstance(begun, StartAttempt)
    fourth = replace(STUCK, attempts=(*STUCK.attempts, attempt(4, cause={"class": "infra", "step": 7})))
    _, memory = decide(fourth, Look(103.0, tuple(running(epoch=4))), POLICY, memory)
    assert memory == Memory()  # held back after attempt 3: that is over
    again, _ = decide(STUCK, Look(102.0, CRASHED), POLICY, Memory())  # another driver waits anew
    assert again == held


def test_a_launch_waits_for_room_since_it_was_first_seen_to() -> None:
    policy = replace(POLICY, capacity_s=30.0, layouts=(layout(2), layout(1)))
    memory = Memory()
    for now in (10.0, 25.0, 39.9):
        waits, memory = decide(log(), Look(now, waiting="no machine fits"), policy, memory)
        assert waits == Watch(Phase.WAITING, "no machine fits")
        assert memory.waiting == ("l", 10.0)
    less, _ = decide(log(), Look(40.0, waiting="no machine fits"), policy, memory)
    assert isinstance(less, StartAttempt)
    assert less.fallback is not None
    _, memory = decide(log(), Look(39.0, tuple(running())), policy, memory)
    assert memory.waiting is None  # it ran: the next wait begins anew
    _, memory = decide(log(), Look(50.0, waiting="no machine fits"), replace(policy, launch="l2"), memory)
    assert memory.waiting == ("l2", 50.0)


def test_room_that_was_given_back_is_left_to_others_for_a_while() -> None:  # D13
    policy, gang = replace(POLICY, capacity_s=30.0), log()
    memory = decide(gang, Look(10.0, waiting="w", room=1), policy, Memory())[1]
    back, memory = decide(gang, Look(70.0, waiting="w", room=1), policy, memory)
    assert isinstance(back, StartAttempt)
    assert back.gives_way
    assert memory.given == ("l", 70.0)
    after, policy = log(attempt(), attempt(2, launch="l2")), replace(policy, launch="l2")
    left, memory = decide(after, Look(78.9), policy, memory)
    assert left == Watch(Phase.WAITING, "its room is left to others for a while", ensure=False)
    asks, memory = decide(after, Look(79.1), policy, memory)
    assert isinstance(asks, Watch)
    assert (asks.phase, asks.ensure, memory.given) == (Phase.LAUNCHING, True, None)


def test_ranks_that_left_on_request_are_given_time_to_show_why() -> None:
    policy, left = replace(POLICY, detaches=True), tuple(ended(n, code=85) for n in range(2))
    first, memory = decide(log(), Look(7.0, left), policy, Memory())
    assert isinstance(first, Watch)
    assert memory.leaving == (1, 7.0)
    assert isinstance(decide(log(), Look(11.9, left), policy, memory)[0], Watch)
    assert isinstance(decide(log(), Look(12.0, left), policy, memory)[0], StartAttempt)


@pytest.mark.parametrize(
    ("seen", "detaches", "wanted"),
    [
        (Look(0.0, stop=True), False, Leave(False)),
        (Look(0.0, stop=True), True, Leave(True)),
        (Look(0.0, stop=True, reached=False), False, Leave(True)),
        (Look(0.0, stop=True, finishing=True), False, AwaitStop()),
        (Look(0.0, finishing=True), False, AwaitStop()),
    ],
)
def test_a_wish_to_stop_is_a_decision(seen: Look, detaches: bool, wanted: object) -> None:
    policy = replace(POLICY, detaches=detaches)
    assert decide(log(), seen, policy, Memory()) == (wanted, Memory())
    assert decide(log(end="cancelled"), seen, policy, Memory())[0] == Finished("cancelled")


def test_a_launch_that_is_lost_is_not_kept_up() -> None:
    nodes = tuple(running())
    assert decide(log(), Look(0.0, nodes), POLICY, Memory())[0] == Watch(Phase.TRAINING)
    lost = Cause(Failure.INFRA, "pod x-1 was deleted")
    draining, _ = decide(log(), Look(0.0, nodes, lost=lost), POLICY, Memory())
    assert draining == Watch(Phase.DRAINING, "pod x-1 was deleted", ensure=False)


def test_a_run_that_is_opened_again_gets_new_nodes() -> None:
    order = OrderView(9, {}, "ann", again=True)
    opened = replace(log(saved=(CheckpointView(2, 50, 1),), end="gave_up"), ended_n=8, orders=(order,))
    begun, _ = decide(opened, Look(0.0), POLICY, Memory())
    assert isinstance(begun, StartAttempt)
    assert begun.renew


def test_the_launch_to_use() -> None:
    how = {"launch": {"target": "local"}, "parallel": {"stages": 2}}
    begun = log(attempt(how=how))
    wanted = RunLayout(2, 2, how)
    assert launch_to_use(begun, wanted, detaches=False, over=False) == "l"
    assert launch_to_use(begun, wanted, detaches=False, over=True) is None
    assert launch_to_use(replace(begun, ended="cancelled"), wanted, detaches=False, over=True) == "l"
    assert launch_to_use(begun, replace(wanted, nodes=1), detaches=False, over=False) is None
    assert (
        launch_to_use(begun, replace(wanted, how={"launch": {"target": "kubernetes"}}), detaches=True, over=False)
        is None
    )
    assert launch_to_use(LogView(), wanted, detaches=False, over=False) is None
    ordered = {**how, "parallel": {"stages": 2, "schedule": "gpipe"}}
    changed = replace(begun, orders=(OrderView(5, ordered),))
    assert launch_to_use(changed, replace(wanted, how=ordered), detaches=False, over=False) == "l"  # in place
    assert launch_to_use(changed, replace(wanted, how=ordered), detaches=True, over=False) is None  # other pods
