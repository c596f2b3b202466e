"""The driver's mind: plain data in, one decision out. Every rule D1..D9 of flows/drive/decide.py has its tests here."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flows.drive.causes import diagnose, rank_class
from flows.drive.decide import judge as decide
from flows.drive.history import STRIKE_FADES, avoided, struck
from flows.drive.views import (
    AttemptView,
    Cause,
    CheckpointView,
    Decision,
    End,
    Finished,
    LogView,
    MarkDamaged,
    NodeView,
    OrderView,
    Phase,
    Policy,
    RankView,
    Restore,
    RunLayout,
    StartAttempt,
    Watch,
)
from trainer.failures import Failure
from trainer.wire import EXITS

POLICY = Policy(steps=100, launch="l", nodes=2, ranks=2, stall_s=10.0)


def attempt(epoch: int = 1, **change: object) -> AttemptView:
    base = AttemptView(epoch, "l", 2, 2, "p", 0, None, None, (), None)
    return replace(base, **change)  # type: ignore[arg-type]


def running(epoch: int = 1, step: int = 5) -> list[NodeView]:
    return [NodeView(n, True, epoch, "running", (RankView(n, 100 + n, step=step),)) for n in range(2)]


def ended(node: int, *, epoch: int = 1, step: int = 5, slots: object = frozenset(), **rank: object) -> NodeView:
    view = replace(RankView(node, 100 + node, step=step), **rank)  # type: ignore[arg-type]
    return NodeView(node, True, epoch, "ended", (view,), slots)  # type: ignore[arg-type]


def log(*attempts: AttemptView, saved: tuple[CheckpointView, ...] = (), end: str | None = None) -> LogView:
    return LogView(attempts or (attempt(),), saved, tuple(reversed(saved)), end)


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


def nodes_of(epoch: int, nodes: list[NodeView]) -> list[NodeView]:
    return [replace(n, epoch=epoch) for n in nodes]


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


def started(decision: Decision) -> StartAttempt:
    assert isinstance(decision, StartAttempt), decision
    return decision


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


# --- D5: launches that lose nodes, machines with strikes, waiting ---------------------------------------------

LOST = Cause("infra", "pod x-1 on b was deleted", "", None, place="b")


def test_a_lost_launch_is_left_and_the_next_attempt_takes_a_new_one() -> None:
    nodes = [ended(0, code=75), replace(running()[1], alive=False, place="b")]
    decision = decide(log(), nodes, POLICY, lost=LOST)
    assert isinstance(decision, StartAttempt)
    assert decision.renew
    assert decision.restore.slots is None
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.text, decision.cause.place) == ("infra", LOST.text, "b")
    assert decision.cause.to_map()["place"] == "b"


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


def test_a_stall_is_of_the_machine_that_is_waited_for() -> None:
    def waits(rank: int, peer: int) -> RankView:
        return RankView(rank, pid=1, code=86, step=3, words={"why": "a wait passed its deadline", "peer": peer})

    silent = NodeView(1, None, 1, "running", (RankView(1, pid=1, step=3),), place="b", age_s=99.0)
    nodes = [NodeView(0, True, 1, "running", (waits(0, 1),), place="a"), silent]
    decision = decide(log(), nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert (decision.cause.cls, decision.cause.rank, decision.cause.place) == ("stall", 0, "b")
    # the first of a chain gave up first; what it waited for was ended by its supervisor, or saw it go, and waited too
    for how in ({"killed": True, "code": None, "signal": 9}, {"code": 75}):
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


def layout(nodes: int, stages: int = 2, replicas: int | None = None) -> RunLayout:
    """A layout of as many replicas as nodes, if nothing else is said."""
    count = nodes if replicas is None else replicas
    return RunLayout(
        nodes, stages * count, {"parallel": {"stages": stages, "replicas": count}, "launch": {"nodes": nodes}}
    )


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
    # one machine is there, and each layout that is left needs two
    two = replace(LADDER, layouts=(layout(4), layout(2)))
    assert decide(log(replace(attempt(1), nodes=4)), [], two, waiting="w", waited_s=99.0, room=1) == waits


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


# --- history fades ------------------------------------------------------------------------------------------


def steps(*records: tuple[int, int]) -> tuple[CheckpointView, ...]:
    return tuple(CheckpointView(n, step, 1) for n, step in records)


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
