"""The driver's mind: plain data in, one decision out. D1 to D8 but for D5 (launches)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flows.drive.causes import diagnose, rank_class
from flows.drive.decide import judge as decide
from flows.drive.history import avoided
from flows.drive.views import (
    AttemptView,
    Cause,
    CheckpointView,
    End,
    Finished,
    LogView,
    MarkDamaged,
    NodeView,
    OrderView,
    Phase,
    RankView,
    Restore,
    StartAttempt,
    Watch,
)
from tests.flows.drive.decisions import LOST, POLICY, attempt, ended, log, nodes_of, running, started
from trainer.failures import FAILURES, Failure
from trainer.wire import EXITS


def test_a_new_run_starts_from_the_start() -> None:
    decision = decide(LogView(), [], POLICY)
    assert isinstance(decision, StartAttempt)
    assert (decision.restore.checkpoint, decision.restore.step, decision.reason) == (None, 0, "start")


def test_a_healthy_gang_is_left_alone() -> None:
    assert decide(log(), running(), POLICY) == Watch(Phase.TRAINING, "")


def test_a_log_with_an_end_ends_the_driver() -> None:
    assert decide(log(end="cancelled"), running(), POLICY) == Finished("cancelled")


def test_the_log_outranks_hints() -> None:  # D1
    saved = (CheckpointView(2, 100, 1),)
    decision = decide(log(saved=saved), [ended(0, signal=9), ended(1, code=75)], POLICY)
    assert isinstance(decision, End)
    assert decision.outcome == "succeeded"


@pytest.mark.parametrize("nodes", [[], [NodeView(0), NodeView(1)], [replace(n, alive=None) for n in running()]])
def test_silence_is_unknown_and_never_failure(nodes: list[NodeView]) -> None:  # D2
    assert isinstance(decide(log(), nodes, POLICY), Watch)


def test_a_heartbeat_that_stopped_alone_ends_nothing() -> None:  # D2
    nodes = [replace(n, age_s=1e6, step_age_s=1e6) for n in running()]
    assert isinstance(decide(log(), nodes, POLICY), Watch)


def test_no_step_while_every_node_answers_is_a_stall() -> None:
    nodes = [replace(n, age_s=0.1, step_age_s=31.0) for n in running()]
    decision = decide(log(), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert decision.cause.cls == "stall"


def test_the_cause_is_the_most_causal_of_all_ranks() -> None:  # D3
    ranks = [RankView(0, code=75, step=7), RankView(1, signal=11, step=7), RankView(2, code=75, step=7)]
    cause = diagnose(ranks)
    assert cause is not None
    assert (cause.rank, cause.cls) == (1, "signal")


def test_what_was_not_finite_first_is_in_the_cause() -> None:  # D3
    why = "step 7: loss nan: not finite; the first is in microbatch 3: stage 1, forward, layer 2, y of linear_fwd"
    words = {"why": why, "step": 7, "microbatch": 3, "pass": "F", "layer": 2, "kernel": "linear_fwd", "operand": "y"}
    cause = diagnose([RankView(0, code=87, step=6, words=words), RankView(1, code=75, step=7)])
    assert cause is not None
    assert why in cause.said()
    assert cause.to_map()["words"] == words


@pytest.mark.parametrize("code", sorted(code for code in EXITS if code not in (0, 75, 143)))
def test_a_lost_peer_never_outranks(code: int) -> None:  # D3
    cause = diagnose([RankView(0, code=75, step=1), RankView(1, code=143, step=1), RankView(2, code=code, step=9)])
    assert cause is not None
    assert cause.rank == 2


def test_nodes_that_wait_for_one_without_room_are_no_failure() -> None:  # D5
    early = replace(ended(0, code=75), ranks=(RankView(0, code=75, words={"error": "no address of node 1"}),))
    nodes = [early, NodeView(1)]
    assert decide(log(), nodes, POLICY, waiting="1 of 2 pods run") == Watch(Phase.WAITING, "1 of 2 pods run")
    decision = decide(log(), nodes, POLICY)  # there is room now
    assert isinstance(decision, StartAttempt)
    assert not decision.renew
    began = [ended(0, code=75), NodeView(1)]  # its ranks ran: whatever ended them is told
    assert isinstance(decide(log(), began, POLICY, waiting="1 of 2 pods run"), StartAttempt)


def test_a_rank_that_the_kernel_killed_for_memory_starts_again_in_place_once() -> None:
    policy = replace(POLICY, node_bytes=300 << 20)
    nodes = [ended(0, code=75), ended(1, signal=9, memory=256 << 20)]
    decision = decide(log(), nodes, policy)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.renew) == ("memory", 1, False)
    assert "killed for memory (OOM)" in decision.cause.text
    assert "the plan needs 300 MiB for the ranks of its node, the limit is 256 MiB" in decision.cause.text
    assert "launch.resources.memory" in decision.cause.mend
    again = decide(log(attempt(), attempt(2, cause=decision.cause.to_map())), nodes_of(2, nodes), policy)
    assert isinstance(again, End)
    assert (again.outcome, again.cause and again.cause.cls) == ("gave_up", "memory")


def test_ranks_that_never_meet_are_told_of_what_may_lie_between_them() -> None:
    """A NetworkPolicy that denies all: eight attempts said that no rank took a channel, and nothing to do about it."""
    why = {"why": "the gang is not complete after 4000 ms: rank 1 does not take channel 2; last: no answer to connect"}
    cause = diagnose([RankView(0, code=86, words=why), RankView(1, signal=9, killed=True)])
    assert cause is not None
    assert "a NetworkPolicy or a mesh" in cause.mend
    for ranks in (
        [RankView(0, code=86, words={**why, "action": 3, "peer": 1})],  # it waits for a message
        [RankView(0, code=86)],
        [RankView(0, code=75, words=why)],
    ):
        met = diagnose(ranks)
        assert met is not None
        assert met.mend == FAILURES[met.cls].mend


def test_the_end_of_a_run_that_gave_up_says_its_cause_s_own_mend() -> None:
    """That of a class is said by whoever tells of the end; what a cluster's diagnosis said reached nobody."""
    own = Cause(Failure.CONFIG, "pod x cannot start", "correct launch.image (`hotstage logs RUN`)")
    assert End("gave_up", "8 times", own).said("a-1") == "config: 8 times; correct launch.image (`hotstage logs a-1`)"
    general = replace(own, mend=FAILURES[Failure.CONFIG].mend)
    assert End("gave_up", "8 times", general).said("a-1") == "config: 8 times"
    assert End("succeeded", "step 3 is saved").said("a-1") == "step 3 is saved"


def test_killed_for_memory_where_nothing_limits_the_container() -> None:
    cause = diagnose([RankView(0, signal=9, memory=0)])
    assert cause is not None
    assert "no limit but the machine's" in cause.text


@pytest.mark.parametrize("end", [{"code": 86}, {"code": 70}, {"signal": 7}, {"code": 88}])
def test_what_the_driver_says_of_a_device_is_the_cause(end: dict[str, int]) -> None:  # D3
    """However the rank ended; its machine is left out. A fault of a program says nothing of the device."""
    cause = diagnose([RankView(0, code=75, step=3), RankView(1, step=3, xid=79, **end)])
    assert cause is not None
    assert (cause.cls, cause.rank) == ("sick", 1)
    assert cause.text.endswith("; NVIDIA's driver says of its device: Xid 79: the device has fallen off the bus")
    ours = diagnose([RankView(1, step=3, xid=31, code=70)])
    assert ours is not None
    assert ours.cls == "bug"
    assert "Xid 31: a kernel touched memory that is not its own" in ours.text
    unknown = diagnose([RankView(1, step=3, xid=31999, code=70)])
    assert unknown is not None
    assert "Xid 31999, which NVIDIA's catalogue explains" in unknown.text


def test_what_a_supervisor_killed_is_no_cause() -> None:  # D3
    cause = diagnose([RankView(0, signal=9, step=3, killed=True), RankView(1, code=86, step=3)])
    assert cause is not None
    assert (cause.rank, cause.cls) == (1, "stall")


def test_a_kill_resumes_from_the_newest_checkpoint() -> None:
    saved = (CheckpointView(2, 40, 1), CheckpointView(3, 50, 1))
    decision = decide(log(saved=saved), [ended(0, signal=9), ended(1, code=75)], POLICY)
    assert isinstance(decision, StartAttempt)
    assert (decision.restore.checkpoint, decision.restore.step, decision.restore.slots) == (3, 50, None)


def test_slots_that_every_node_holds_are_newer() -> None:
    saved = (CheckpointView(2, 40, 1),)
    nodes = [
        ended(0, signal=9, slots=frozenset({(44, 1), (42, 1)})),
        ended(1, code=75, slots=frozenset({(42, 1), (40, 1)})),
    ]
    decision = decide(log(saved=saved), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert (decision.restore.step, decision.restore.slots) == (42, (42, 1))
    assert decision.slot_epochs == (1,)


def test_slots_that_are_as_new_as_the_checkpoint_spare_reading_it() -> None:
    saved = (CheckpointView(2, 40, 1),)
    nodes = [ended(n, code=75, slots=frozenset({(40, 1), (32, 1)})) for n in range(2)]
    decision = decide(log(saved=saved), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    restore = decision.restore
    assert (restore.checkpoint, restore.step, restore.slots) == (
        2,
        40,
        (40, 1),
    )  # the checkpoint, should a slot be gone


def test_slots_of_a_strange_epoch_or_launch_are_not_used() -> None:
    nodes = [ended(n, code=75, slots=frozenset({(60, 7)})) for n in range(2)]
    assert decide(log(), nodes, POLICY).restore.slots is None  # type: ignore[union-attr]
    held = [ended(n, code=75, slots=frozenset({(60, 1)})) for n in range(2)]
    other = decide(log(), held, replace(POLICY, launch="m"))
    assert isinstance(other, StartAttempt)
    assert other.restore.slots is None


def test_a_damaged_slot_is_not_used_again() -> None:
    first = attempt(3, restore_step=42, restore_slots=(42, 1), slot_epochs=(1,))
    nodes = [ended(n, epoch=3, code=76, slots=frozenset({(42, 1)})) for n in range(2)]
    decision = decide(log(attempt(), first, saved=(CheckpointView(2, 40, 1),)), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert (decision.restore.step, decision.restore.slots, decision.slot_epochs) == (40, None, ())


def test_a_damaged_checkpoint_is_marked_then_the_one_before_it_is_used() -> None:
    saved = (CheckpointView(2, 40, 1), CheckpointView(3, 50, 1))
    second = attempt(4, restore_step=50, restore_checkpoint=3)
    nodes = [ended(0, epoch=4, code=76), ended(1, epoch=4, code=75)]
    again = started(decide(log(attempt(), second, saved=saved), nodes, POLICY))
    assert (again.restore.checkpoint, again.restore.slots, again.renew) == (3, None, False)  # one reading is no proof
    assert again.cause is not None
    third = attempt(5, restore_step=50, restore_checkpoint=3, cause=again.cause.to_map())
    nodes = nodes_of(5, nodes)
    assert decide(log(attempt(), second, third, saved=saved), nodes, POLICY) == MarkDamaged(3, diagnose_text(nodes))
    after = LogView((attempt(), second, third), saved, (saved[0],), damaged=(3,))
    assert started(decide(after, nodes, POLICY)).restore.checkpoint == 2


def test_a_second_reading_is_by_another_machine_where_machines_have_names() -> None:  # D7
    saved = (CheckpointView(2, 40, 1),)
    second = attempt(4, restore_step=40, restore_checkpoint=2)
    nodes = [replace(ended(0, epoch=4, code=76), place="a"), replace(ended(1, epoch=4, code=75), place="b")]
    again = started(decide(log(attempt(), second, saved=saved), nodes, POLICY))
    assert (again.restore.checkpoint, again.renew, again.same_plan) == (2, True, False)
    assert again.cause is not None
    third = attempt(5, launch="l2", restore_step=40, restore_checkpoint=2, cause=again.cause.to_map())
    assert avoided(log(attempt(), second, third, saved=saved), "l2", 2) == ("a",)
    # there is no other machine: it is let off, and its second reading counts
    policy = replace(POLICY, launch="l2")
    full = log(attempt(), second, third, saved=saved)
    assert decide(full, [NodeView(0), NodeView(1)], policy, waiting="no room", waited_s=299.0).phase is Phase.WAITING  # type: ignore[union-attr]
    pardon = started(decide(full, [NodeView(0), NodeView(1)], policy, waiting="no room", waited_s=300.0))
    assert (pardon.pardon, pardon.renew) == (("a",), True)
    assert pardon.cause is not None
    fourth = attempt(6, launch="l3", restore_step=40, restore_checkpoint=2, cause=pardon.cause.to_map(), pardon=("a",))
    last = log(attempt(), second, third, fourth, saved=saved)
    assert avoided(last, "l3", 2) == ()
    assert isinstance(decide(last, nodes_of(6, nodes), replace(POLICY, launch="l3")), MarkDamaged)


def test_a_checkpoint_that_was_read_well_in_between_is_not_suspected_any_more() -> None:  # D7
    saved = (CheckpointView(2, 40, 1),)
    bad = {"class": "restore", "step": -1, "text": "damaged"}
    attempts = [
        attempt(),
        attempt(3, restore_step=40, restore_checkpoint=2),
        attempt(4, restore_step=40, restore_checkpoint=2, cause=bad),  # reads it, trains to step 44, crashes
        attempt(5, restore_step=40, restore_checkpoint=2, cause={"class": "signal", "step": 44, "text": ""}),
    ]
    nodes = [ended(0, epoch=5, code=76, step=-1), ended(1, epoch=5, code=75, step=-1)]
    assert started(decide(log(*attempts, saved=saved), nodes, POLICY)).restore.checkpoint == 2


@pytest.mark.parametrize("parent", [None, ("other", 7, 20)])
def test_a_run_that_has_saved_never_goes_back_to_its_beginning_by_itself(parent: tuple[str, int, int] | None) -> None:
    """D7; a forked run's beginning is its parent's checkpoint."""
    saved = (CheckpointView(2, 40, 1),)
    bad = {"class": "restore", "step": -1, "text": "damaged"}
    attempts = (
        attempt(),
        attempt(3, restore_step=40, restore_checkpoint=2),
        attempt(4, restore_step=40, restore_checkpoint=2, cause=bad),
    )
    nodes = [ended(0, epoch=4, code=76), ended(1, epoch=4, code=75)]
    gone = LogView(attempts, saved, (), parent=parent, damaged=(2,))
    end = decide(gone, nodes, POLICY)
    assert isinstance(end, End)
    assert (end.outcome, end.cause and end.cause.cls) == ("gave_up", "restore")
    assert "log records 2" in end.reason
    assert end.cause is not None
    for word in ("ckpt verify", "runs fork", "--begin-anew"):
        assert word in end.cause.mend
    # nor does the next command, unless it says so
    ended_log = replace(gone, ended="gave_up", ended_n=6)
    again = replace(ended_log, orders=(OrderView(7, {}, again=True),))
    assert isinstance(decide(again, nodes, POLICY), End)
    anew = replace(ended_log, orders=(OrderView(7, {}, again=True, anew=True),))
    restore = started(decide(anew, nodes, POLICY)).restore
    assert restore == (Restore(None, 20, parent=("other", 7)) if parent else Restore(None, 0))


def test_a_fork_whose_parent_s_checkpoint_is_damaged_ends_with_its_name() -> None:  # D7
    forked = LogView((attempt(2, restore_step=20),), parent=("other", 7, 20))
    nodes = [ended(0, epoch=2, code=76, step=-1), ended(1, epoch=2, code=75, step=-1)]
    again = started(decide(forked, nodes, POLICY))
    assert again.restore.parent == ("other", 7)
    assert again.cause is not None
    twice = replace(forked, attempts=(*forked.attempts, attempt(3, restore_step=20, cause=again.cause.to_map())))
    end = decide(twice, nodes_of(3, nodes), POLICY)
    assert isinstance(end, End)
    assert end.reason.startswith("record 7 of other")
    assert end.cause is not None
    assert end.cause.cls == "restore"


def diagnose_text(nodes: list[NodeView]) -> str:
    cause = diagnose([r for n in nodes for r in n.ranks])
    assert cause is not None
    return cause.text


@pytest.mark.parametrize(("code", "cls"), [(78, "config"), (65, "data")])
def test_what_cannot_get_better_stops_at_once(code: int, cls: str) -> None:  # D4
    decision = decide(log(), [ended(0, code=code), ended(1, code=75)], POLICY)
    assert isinstance(decision, End)
    assert decision.outcome == "gave_up"
    assert decision.cause is not None
    assert (decision.cause.cls, bool(decision.cause.mend)) == (cls, True)


def test_a_crash_at_the_same_step_twice_stops() -> None:  # D4
    again = attempt(2, cause={"class": "signal", "step": 5, "text": "crashed"})
    nodes = [ended(0, epoch=2, signal=11), ended(1, epoch=2, code=75)]
    decision = decide(log(attempt(), again), nodes, POLICY)
    assert isinstance(decision, End)
    assert "2 times at step 5" in decision.reason
    assert isinstance(decide(log(), [ended(0, signal=11), ended(1, code=75)], POLICY), StartAttempt)


def test_infrastructure_has_no_budget_while_there_is_progress() -> None:  # D4
    attempts = [attempt(n, restore_step=10 * n, cause={"class": "infra", "step": 0, "text": ""}) for n in range(1, 30)]
    saved = (CheckpointView(30, 300, 29),)
    nodes = [ended(n, epoch=29, code=75, step=310) for n in range(2)]
    decision = decide(LogView(tuple(attempts), saved, saved), nodes, replace(POLICY, steps=1000))
    assert isinstance(decision, StartAttempt)
    assert decision.delay_s == 0


def test_without_progress_it_backs_off_and_then_stops() -> None:  # D4
    nodes = [ended(n, epoch=3, code=75) for n in range(2)]
    three = [attempt(n) for n in (1, 2, 3)]
    decision = decide(log(*three), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.delay_s == 2 * POLICY.backoff_s
    many = [attempt(n, cause=LOST.to_map() if n > 1 else None) for n in range(1, 9)]
    stop = decide(log(*many), [replace(n, epoch=8) for n in nodes], POLICY)
    assert isinstance(stop, End)
    # those that found no room have not failed: a smaller layout has no cause, and struck machines are pardoned (D5)
    for way in ({"cause": None}, {"cause": LOST.to_map(), "pardon": ("b",)}):
        left = [attempt(n, cause=LOST.to_map()) for n in range(1, 9)]
        left[4] = replace(left[4], **way)
        assert isinstance(decide(log(*left), [replace(n, epoch=8) for n in nodes], POLICY), StartAttempt)


def test_it_waits_until_every_rank_is_gone_or_had_its_time() -> None:
    half = [ended(0, signal=9), running()[1]]
    assert decide(log(), half, POLICY) == Watch(Phase.DRAINING, "rank 0 was killed (signal 9)")
    # an agent that is silent for seconds is busy or slow: what its ranks may still save is waited for (D2)
    for silent in (3.0, 9.9):
        assert isinstance(decide(log(), [half[0], replace(half[1], age_s=silent)], POLICY), Watch)
    late = [half[0], replace(half[1], age_s=10.0)]  # no wait inside a rank lasts longer
    assert isinstance(decide(log(), late, POLICY), StartAttempt)
    stuck = [half[0], replace(half[1], step_age_s=POLICY.stall_s + POLICY.commit_s)]
    assert isinstance(decide(log(), stuck, POLICY), StartAttempt)


def test_a_node_that_is_gone_is_a_cause() -> None:
    nodes = [running()[0], replace(running()[1], alive=False)]
    assert decide(log(), nodes, POLICY) == Watch(Phase.DRAINING, "node 1 is gone")  # its peer will notice
    nodes[0] = ended(0, code=75)
    decision = decide(log(), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert decision.cause.text == "node 1 is gone"


def test_a_node_whose_supervisor_is_not_started_yet_has_lost_nothing() -> None:
    """A driver was killed between the agent's start and the supervisor's."""
    node = NodeView(0, False, 1, "restoring", (RankView(0), RankView(1)))
    assert isinstance(decide(log(), [node, replace(node, node=1)], POLICY), Watch)


def test_every_exit_code_has_a_class_that_the_driver_knows() -> None:
    for code in EXITS:
        assert rank_class(RankView(0, code=code)) == EXITS[code].cls


def test_no_observation_makes_it_raise() -> None:
    """Seeded nonsense: whatever the hints say, there is a decision, and a healthy gang gets no new attempt."""
    rng = random.Random(7)
    for _ in range(3000):
        nodes = [
            NodeView(
                node=n,
                alive=rng.choice([True, False, None]),
                epoch=rng.choice([0, 1, 2, 3]),
                phase=rng.choice(["none", "idle", "restoring", "starting", "running", "ended", "?"]),
                ranks=tuple(
                    RankView(
                        r,
                        code=rng.choice([None, None, 0, 75, 99]),
                        signal=rng.choice([None, None, 9]),
                        step=rng.randrange(-1, 9),
                    )
                    for r in range(rng.randrange(3))
                ),
                slots=frozenset((rng.randrange(9), rng.randrange(4)) for _ in range(rng.randrange(3))),
                age_s=rng.random() * 100,
                step_age_s=rng.random() * 100,
            )
            for n in range(rng.randrange(3))
        ]
        decision = decide(log(attempt(1), attempt(2)), nodes, POLICY)
        assert isinstance(decision, StartAttempt | MarkDamaged | End | Watch | Finished)
        known_bad = any(n.alive is False or r.ended for n in nodes if n.epoch == 2 for r in n.ranks or (RankView(0),))
        if isinstance(decision, StartAttempt) and not known_bad:
            assert decision.cause is not None
            assert decision.cause.cls == "stall"


# --- D6: orders ---------------------------------------------------------------------------------------------


def ordered(*orders: OrderView, attempts: tuple[AttemptView, ...] = ()) -> LogView:
    return replace(log(*attempts), orders=orders)


ONE, TWO = {"parallel": {"stages": 1}}, {"parallel": {"stages": 2}}


def test_an_order_is_followed_once() -> None:
    first = attempt(1, how=ONE)
    order = OrderView(2, TWO, "ann@a (runs resume)")
    begin = started(decide(ordered(order, attempts=(first,)), running(), POLICY))
    assert (begin.reason, begin.restore.slots, begin.same_plan) == ("ordered by ann@a (runs resume)", None, False)
    second = attempt(3, how=TWO, order=2, plan="another")
    assert isinstance(decide(ordered(order, attempts=(first, second)), running(3), POLICY), Watch)


def test_the_newest_order_wins_and_one_that_changes_nothing_disturbs_nobody() -> None:
    first = attempt(1, how=ONE)
    back = ordered(OrderView(2, TWO), OrderView(3, ONE), attempts=(first,))
    assert isinstance(decide(back, running(), POLICY), Watch)


def test_plans_are_never_compared() -> None:
    """Two versions compile the same How to different plans: neither has a reason for another attempt."""
    first = attempt(1, how=ONE, plan="of another version")
    assert isinstance(decide(log(first), running(), POLICY), Watch)
    held = [ended(n, code=75, slots=frozenset({(6, 1)})) for n in range(2)]
    again = started(decide(log(first), held, POLICY))
    assert (again.same_plan, again.restore.slots) == (True, (6, 1))  # in place: the plan that the gang has


def test_an_attempt_that_had_to_fall_back_follows_its_order() -> None:
    order = OrderView(1, TWO)
    fallen = attempt(3, how=ONE, order=1)
    assert isinstance(
        decide(ordered(order, attempts=(attempt(2, how=TWO, order=1), fallen)), running(3), POLICY), Watch
    )


def test_what_had_ended_goes_on_by_an_order_alone() -> None:
    over = replace(ordered(OrderView(2, ONE), attempts=(attempt(1, how=ONE),)), ended="gave_up", ended_n=3)
    assert decide(over, running(), POLICY) == Finished("gave_up")  # the order is older
    late = replace(over, orders=(OrderView(4, ONE),))
    assert decide(late, running(), POLICY) == Finished("gave_up")  # it does not ask for that
    again = replace(over, orders=(OrderView(4, ONE, "ann@a (runs resume)", again=True),))
    assert started(decide(again, running(), POLICY)).reason == "resumed by ann@a (runs resume)"
    assert decide(replace(again, ended="succeeded"), running(), POLICY) == Finished("succeeded")
