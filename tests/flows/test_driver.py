"""The driver's mind: plain data in, one decision out. Every rule D1..D4 of flows/driver.py has its tests here."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flows.driver import (
    AttemptView,
    Cause,
    CheckpointView,
    End,
    Finished,
    LogView,
    MarkDamaged,
    NodeView,
    Phase,
    Policy,
    RankView,
    StartAttempt,
    Watch,
    decide,
    diagnose,
    rank_class,
    struck,
)
from trainer.wire import EXITS

POLICY = Policy(steps=100, plan="p", what="w", launch="l", nodes=2, ranks=2, stall_s=10.0)


def attempt(epoch: int = 1, **change: object) -> AttemptView:
    base = AttemptView(epoch, "l", 2, 2, "p", "w", 0, None, None, (), None)
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


@pytest.mark.parametrize("code", sorted(code for code in EXITS if code not in (0, 75)))
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


def test_slots_of_a_strange_epoch_or_plan_are_not_used() -> None:
    nodes = [ended(n, code=75, slots=frozenset({(60, 7)})) for n in range(2)]
    assert decide(log(), nodes, POLICY).restore.slots is None  # type: ignore[union-attr]
    held = [ended(n, code=75, slots=frozenset({(60, 1)})) for n in range(2)]
    other = decide(log(), held, replace(POLICY, plan="q"))
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
    assert decide(log(attempt(), second, saved=saved), nodes, POLICY) == MarkDamaged(3, diagnose_text(nodes))
    after = LogView((attempt(), second), saved, (saved[0],))
    decision = decide(after, nodes, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.restore.checkpoint == 2


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
    many = [attempt(n) for n in range(1, 9)]
    stop = decide(log(*many), [replace(n, epoch=8) for n in nodes], POLICY)
    assert isinstance(stop, End)


def test_it_waits_until_every_rank_is_gone_or_had_its_time() -> None:
    half = [ended(0, signal=9), running()[1]]
    assert decide(log(), half, POLICY) == Watch(Phase.DRAINING, "rank 0 was killed (signal 9)")
    late = [half[0], replace(half[1], age_s=3.0)]
    assert isinstance(decide(log(), late, POLICY), StartAttempt)


def test_a_node_that_is_gone_is_a_cause() -> None:
    nodes = [running()[0], replace(running()[1], alive=False)]
    nodes[0] = replace(nodes[0], age_s=9.0)
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
    assert "state saved" in decision.cause.text


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
    assert struck([decision.cause.to_map()], 2) == {"b"}
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
    # nobody is left to blame but those who wait for each other
    each = [replace(nodes[0], ranks=(waits(0, 1),)), replace(silent, alive=True, ranks=(waits(1, 0),), age_s=0.0)]
    decision = decide(log(), each, POLICY)
    assert isinstance(decision, StartAttempt)
    assert decision.cause is not None
    assert decision.cause.cls == "stall"


def test_two_strikes_make_a_machine_unfit() -> None:
    causes = [LOST.to_map(), {"class": "signal", "place": "b"}, {"class": "config", "place": "a"}, None]
    assert struck(causes, 2) == {"b"}
    assert struck(causes[:1], 2) == frozenset()
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
