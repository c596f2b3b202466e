"""D5 and D9: launches that lose nodes, machines with strikes, waiting for room, and smaller layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.drive.decide import judge as decide
from flows.drive.history import struck
from flows.drive.launches import placed
from flows.drive.views import Cause, End, LogView, NodeView, Phase, Policy, RankView, StartAttempt, Watch
from tests.flows.drive.decisions import LOST, POLICY, attempt, ended, layout, log, running, started
from trainer.failures import Failure
from trainer.launch import LaunchedNode, LaunchView


def test_a_lost_launch_is_left_and_the_next_attempt_takes_a_new_one() -> None:
    nodes = [ended(0, code=75), replace(running()[1], alive=False, place="b")]
    decision = decide(log(), nodes, POLICY, lost=LOST)
    assert isinstance(decision, StartAttempt)
    assert decision.renew
    assert decision.restore.slots is None
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.text, decision.cause.place) == ("infra", LOST.text, "b")
    assert decision.cause.to_map()["place"] == "b"


def test_what_a_node_kept_in_memory_is_gone_with_all_its_processes() -> None:
    """As after a reboot: the attempt was begun from memory that nobody had, and a second one from the checkpoint."""
    kept = frozenset({(7, 1)})
    nodes = [replace(n, slots=kept) for n in running()]
    for agent, alive, left in ((5, False, kept), (None, True, kept), (None, None, kept), (None, False, frozenset())):
        view = LaunchView("l", "partial", tuple(LaunchedNode(n, agent, None, None, "", alive) for n in range(2)))
        assert [n.slots for n in placed(nodes, view, ())] == [left, left]


def test_a_pod_that_is_told_to_go_may_save_first() -> None:
    leaving = Cause("preempted", "pod x-1 is being deleted")
    assert decide(log(), running(), POLICY, lost=leaving) == Watch(Phase.DRAINING, leaving.text)
    # also where its heartbeat is late: what it saves is worth more than a second
    late = [replace(n, age_s=5.0) for n in running()]
    assert isinstance(decide(log(), late, POLICY, lost=leaving), Watch)
    saved = [ended(0, code=85), ended(1, code=85)]
    decision = decide(log(), saved, POLICY, lost=leaving)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert decision.cause.cls == "preempted"
    assert decision.cause.saved
    assert "state saved" in decision.cause.to_map()["text"]


def test_a_launch_that_can_never_start_is_the_end() -> None:
    image = Cause("config", "pod x-0 cannot start its engine: ErrImageNeverPull", "load the image")
    decision = decide(log(), [NodeView(0), NodeView(1)], POLICY, lost=image)
    assert isinstance(decision, End)
    assert (decision.outcome, decision.reason) == ("gave_up", image.text)


def test_a_silent_machine_is_fenced_not_waited_for() -> None:
    mine, gone = running()
    gone = replace(gone, alive=False, age_s=12.0, step_age_s=12.0, place="b")
    silent = replace(LOST, text="pod x-1 on b is on a machine that does not answer")
    decision = decide(log(), [replace(mine, step_age_s=12.0), gone], POLICY, lost=silent)
    assert isinstance(decision, StartAttempt)
    assert decision.renew
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.place) == ("infra", "b")


def test_agents_without_an_engine_are_not_waited_for() -> None:
    image = Cause("config", "pod x-0 cannot start its engine: ErrImageNeverPull", "load the image")
    agents = [replace(n, alive=None, phase="idle") for n in running()]
    assert isinstance(decide(log(), agents, POLICY, lost=image), End)


def test_memory_is_tried_twice() -> None:
    memory = Cause("memory", "pod x-0 was killed for memory", "raise the limit")
    first = decide(log(), [ended(0, code=75), ended(1, code=75)], POLICY, lost=memory)
    assert isinstance(first, StartAttempt)
    before = attempt(4, cause=memory.to_map())
    again = decide(log(before), [ended(0, epoch=4, code=75), ended(1, epoch=4, code=75)], POLICY, lost=memory)
    assert isinstance(again, End)
    assert again.cause is not None
    assert again.cause.mend == "raise the limit"


def test_a_crash_explains_the_launch_it_took_with_it() -> None:
    nodes = [ended(0, code=75), replace(ended(1, code=70), place="b")]
    decision = decide(log(), nodes, POLICY, lost=LOST)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.cause.place) == ("bug", 1, "b")


def test_waiting_for_room_is_no_failure() -> None:
    text = "0 of 2 pods run: no machine fits"
    assert decide(log(), [NodeView(0), NodeView(1)], POLICY, waiting=text) == Watch(Phase.WAITING, text)


def test_a_sick_machine_is_left_out_at_once_and_not_tried_for_ever() -> None:
    nodes = [replace(ended(0, code=75), place="a"), replace(ended(1, code=88), place="b")]
    decision = decide(log(), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.renew
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.cause.place) == ("sick", 1, "b")
    assert struck(log(), 2, decision.cause) == {"b"}
    # there is no other machine: it was launched there again
    again = decide(log(attempt(4, cause=decision.cause.to_map())), [replace(n, epoch=4) for n in nodes], POLICY)
    assert isinstance(again, End)
    assert again.outcome == "gave_up"
    assert again.reason.endswith("; twice, and there is no other machine")


def test_a_machine_is_sick_also_where_the_cluster_does_not_answer_just_then() -> None:
    """It was named in the look before; unnamed, it was used again at once, and the run gave up."""
    before = [replace(n, place=place) for n, place in zip(running(), ("a", "b"), strict=False)]
    silent = LaunchView("l", "unknown", detail="the cluster does not answer")
    assert [n.place for n in placed(list(running()), silent, before)] == [n.place for n in before]
    assert {n.place for n in placed(list(running()), LaunchView("l", "absent"), before)} == {""}


def test_a_stall_is_of_the_machine_that_is_waited_for() -> None:
    def waits(rank: int, peer: int) -> RankView:
        return RankView(rank, pid=1, code=86, step=3, words={"why": "a wait passed its deadline", "peer": peer})

    silent = NodeView(1, None, 1, "running", (RankView(1, pid=1, step=3),), place="b", age_s=99.0)
    nodes = [NodeView(0, True, 1, "running", (waits(0, 1),), place="a"), silent]
    decision = decide(log(), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.cause.place) == ("stall", 0, "b")
    # the first of a chain gave up first; what it waited for was ended by its supervisor, or saw it go, and waited too:
    # on a busy machine it is ended before it could say for whom
    killed = {"killed": True, "code": None, "signal": 9}
    for how in (killed, {**killed, "words": None}, {"code": 75}):
        chain = (waits(0, 1), replace(waits(1, 2), **how))
        nodes = [replace(nodes[0], ranks=chain), replace(silent, ranks=(RankView(2, pid=1, step=3),))]
        decision = decide(log(), nodes, POLICY)
        assert isinstance(decision, StartAttempt)
        assert decision.cause is not None
        assert (decision.cause.rank, decision.cause.place) == (0, "b")
    # nobody is left to blame but those who wait for each other
    each = [replace(nodes[0], ranks=(waits(0, 1),)), replace(silent, alive=True, ranks=(waits(1, 0),), age_s=0.0)]
    decision = decide(log(), each, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert decision.cause.cls == "stall"


def test_a_loss_is_of_the_machine_that_was_lost() -> None:
    """Also where its peer's end is seen before its own: a machine that goes says nothing."""
    lost = RankView(0, pid=1, code=75, step=3, words={"why": "rank 1 closed the connection", "peer": 1})
    gone = NodeView(1, None, 1, "running", (RankView(1, pid=1, step=3),), place="b", age_s=99.0)
    decision = decide(log(), [NodeView(0, True, 1, "running", (lost,), place="a"), gone], POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.cause.place) == ("infra", 0, "b")
    # who lost its agent or the store was not at a message
    alone = replace(lost, words={"why": "the agent is gone"})
    decision = decide(log(), [NodeView(0, True, 1, "running", (alone,), place="a"), gone], POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.rank, decision.cause.place) == (0, "a")


def test_the_machine_that_went_is_named_however_late_the_look() -> None:
    """Its peer's end, its peer's pod, and its own pod are seen in any order, and some of them never."""
    words = {"why": "rank 1 closed the connection", "peer": 1}
    up, over = RankView(0, pid=1, step=3), RankView(0, pid=1, code=75, step=3, words=words)
    first = Cause(Failure.INFRA, "pod x-0 on a ended with 75", place="a", code=75)
    second, job = replace(LOST, text="pod x-1 on b was deleted"), Cause(Failure.INFRA, "Job x failed: x: y")
    for alive, rank in ((True, up), (True, over), (False, over)):
        for there in (None, False):
            for lost in (None, second, job, first if rank is over else second):
                mine = NodeView(0, alive, 1, "running", (rank,), place="a")
                gone = NodeView(1, there, 1, "running", (RankView(1, pid=1, step=3),), place="b", age_s=99.0)
                if rank is up and there is None and lost in (None, job):
                    continue  # nobody knows yet
                decision = decide(log(), [mine, gone], POLICY, lost=lost)
                if isinstance(decision, Watch):
                    assert decision.phase is Phase.DRAINING
                    continue
                assert isinstance(decision, StartAttempt), (alive, rank, there, lost)
                assert decision.cause is not None
                assert (decision.cause.cls, decision.cause.place) == ("infra", "b"), (alive, rank, there, lost)
                assert decision.renew == (lost is not None)


def test_two_strikes_make_a_machine_unfit() -> None:
    causes = [None, LOST.to_map(), {"class": "signal", "place": "b"}, {"class": "config", "place": "a"}]
    attempts = [attempt(n + 1, cause=cause) for n, cause in enumerate(causes)]
    assert struck(log(*attempts), 2) == {"b"}
    assert struck(log(*attempts[:2]), 2) == frozenset()
    # a rank that dies a second time on the same machine: in another launch, without that machine
    once = attempt(4, cause={"class": "signal", "place": "b", "step": 1})
    nodes = [replace(ended(0, epoch=4, code=75), place="a"), replace(ended(1, epoch=4, signal=9), place="b")]
    decision = decide(log(once), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.renew
    # the first time: in place
    decision = decide(log(attempt(4)), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert not decision.renew


LADDER = replace(POLICY, nodes=4, layouts=(layout(4), layout(2), layout(2, 1), layout(1)), capacity_s=30.0)


def test_no_room_is_answered_by_the_spec_s_list() -> None:
    nodes = [NodeView(n) for n in range(4)]
    asked = log(replace(attempt(1), nodes=4))
    assert decide(asked, nodes, LADDER, waiting="no machine fits", waited_s=29.0) == Watch(
        Phase.WAITING, "no machine fits"
    )
    less = started(decide(asked, nodes, LADDER, waiting="no machine fits", waited_s=30.0))
    assert less.fallback is not None
    assert less.fallback.to_map() == {
        "kind": "capacity", "stages": 2, "was": 2, "why": "no machine fits", "nodes": 2, "ranks": 4,
        "layout": "2 stages x 2 replicas on 2 nodes", "before": "2 stages x 4 replicas on 4 nodes",
    }  # fmt: skip
    assert (less.renew, less.layout) == (True, LADDER.layouts[1])


@pytest.mark.parametrize(("now", "room", "taken"), [(0, 0, 1), (0, 3, 1), (0, 2, 1), (0, 1, 3), (1, 0, 2), (1, 1, 3)])
def test_the_layout_that_is_taken_fits_what_there_is(now: int, room: int, taken: int) -> None:
    """The best of those that come after the present one; with unknown room the next one, which may wait in its turn."""
    before = log(replace(attempt(1), nodes=LADDER.layouts[now].nodes))
    policy = replace(LADDER, layout=now, nodes=LADDER.layouts[now].nodes)
    less = started(decide(before, [], policy, waiting="no machine fits", waited_s=30.0, room=room))
    assert less.layout == LADDER.layouts[taken]


def test_nothing_smaller_or_no_want_of_machines_is_waited_for() -> None:
    waits = Watch(Phase.WAITING, "w")
    last = replace(LADDER, layout=3, nodes=1)
    assert decide(log(replace(attempt(1), nodes=1)), [], last, waiting="w", waited_s=99.0) == waits
    # every pod has its machine: an image is pulled, which fewer pods would pull no faster
    assert decide(log(replace(attempt(1), nodes=4)), [], LADDER, waiting="w", waited_s=99.0, room=4) == waits


def test_a_part_of_a_gang_gives_its_room_back_and_later_each_time() -> None:  # D13
    """One machine is there, and each layout that is left needs two."""
    two = replace(LADDER, layouts=(layout(4), layout(2)))
    asked = log(replace(attempt(1), nodes=4))
    waits = Watch(Phase.WAITING, "w")
    assert decide(asked, [], two, waiting="w", waited_s=30.0, room=1) == waits
    assert decide(asked, [], replace(two, layouts=()), waiting="w", waited_s=600.0, room=0) == waits  # it holds nothing
    back = started(decide(asked, [], two, waiting="w", waited_s=60.0, room=1))
    assert (back.gives_way, back.renew, back.cause, back.layout) == (True, True, None, None)
    assert back.reason.startswith("gave back what 1 of its 4 nodes had")
    times = {
        name: next(s for s in range(61) if started_by(asked, replace(two, launch=name), float(s)))
        for name in ("a-k1", "b-k1")
    }
    assert times["a-k1"] != times["b-k1"]  # two gangs that began together do not give way together
    again = log(replace(attempt(1), nodes=4), replace(attempt(2), nodes=4), replace(attempt(3), nodes=4))
    assert decide(again, [], two, waiting="w", waited_s=90.0, room=1) == waits
    assert started(decide(again, [], two, waiting="w", waited_s=120.0, room=1)).gives_way


def started_by(asked: LogView, policy: Policy, waited_s: float) -> bool:
    attempts = tuple(replace(a, launch=policy.launch) for a in asked.attempts)
    found = decide(replace(asked, attempts=attempts), [], policy, waiting="w", waited_s=waited_s, room=1)
    return isinstance(found, StartAttempt)


def test_a_gang_that_trains_is_not_ended_for_want_of_room() -> None:
    """Whatever a launcher that lags behind says of one of its pods."""
    nodes = [*running(), NodeView(2), NodeView(3)]
    asked = log(replace(attempt(1), nodes=4))
    assert isinstance(decide(asked, nodes, LADDER, waiting="3 of 4 pods run", waited_s=1e6, room=3), Watch)


def test_a_run_goes_back_up_with_its_next_launch_and_never_before() -> None:
    """No gang is ended for more nodes; a rank's end in place is answered in place; a launch that is lost, by the layout
    that was asked for."""
    policy = replace(LADDER, layout=1, nodes=2)
    assert isinstance(decide(log(), running(), policy), Watch)
    crashed = [ended(0, code=75), ended(1, signal=9)]
    again = started(decide(log(), crashed, policy))
    assert (again.renew, again.layout, again.same_plan) == (False, None, True)
    lost = Cause(Failure.INFRA, "pod x-1 was deleted", place="b")
    up = started(decide(log(), crashed, policy, lost=lost))
    assert (up.renew, up.layout, up.fallback, up.same_plan) == (True, LADDER.layouts[0], None, False)
    assert up.restore.slots is None
    other = started(decide(log(), [], replace(policy, launch="l2")))
    assert (other.reason, other.renew, other.layout) == ("another launch", True, LADDER.layouts[0])
    # as it was asked for: nothing to go back to
    asked = started(decide(log(), crashed, replace(LADDER, nodes=2), lost=lost))
    assert (asked.renew, asked.layout) == (True, None)


def test_a_gang_that_left_on_request_is_given_a_moment_on_a_cluster() -> None:
    nodes = [ended(n, code=85) for n in range(2)]
    policy = replace(POLICY, detaches=True)
    assert decide(log(), nodes, policy, left_s=4.9) == Watch(Phase.DRAINING, "rank 0 exited with 85: stopped on "
                                                             "request, state saved")  # fmt: skip
    assert isinstance(decide(log(), nodes, policy, left_s=5.0), StartAttempt)
    assert isinstance(decide(log(), nodes, POLICY), StartAttempt)
