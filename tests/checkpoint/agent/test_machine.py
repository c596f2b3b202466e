"""The agent's pure machine: its phases walked, and seeded campaigns after each event of which the invariants hold."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import MOVES, NodePhase
from checkpoint.agent.course import ADOPT_S, END_S, KILL_S, LAST_RANKS_S, LOST_S, Life
from checkpoint.agent.events import Timer
from checkpoint.agent.rules import Broken
from checkpoint.agent.status import RankStatus
from tests.checkpoint.agent.walk import Walk
from tests.support.agent_world import HERE, THERE, World, checkpoint_info
from trainer import wire

SEQUENCES = int(os.environ.get("HOTSTAGE_MACHINE_SEQUENCES", "1200"))
AGENT = Path(__file__).resolve().parents[3] / "checkpoint" / "agent"


def test_the_machine_and_what_it_is_made_of_are_pure() -> None:
    """No thread, socket, clock, store or file: what they import says so."""
    allowed = {"__future__", "collections", "dataclasses", "enum", "json", "logging", "struct", "typing"}
    inside = {"attempt", "course", "devices", "effects", "events", "gang", "machine", "rules", "status"}
    for name in ("machine", "course", "attempt", "events", "effects", "rules"):
        for node in ast.walk(ast.parse((AGENT / f"{name}.py").read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in found:
                ours = module.startswith(("checkpoint.log", "checkpoint.claims", "checkpoint.amendments", "trainer"))
                ours |= module == "checkpoint.agent" or module.removeprefix("checkpoint.agent.") in inside
                assert ours or module.split(".")[0] in allowed, f"{name}.py imports {module}"


def test_nothing_in_the_package_is_over_400_lines() -> None:
    assert {p.name: n for p in AGENT.glob("*.py") if (n := len(p.read_text().splitlines())) > 400} == {}


def test_from_the_first_record_to_the_end_of_the_run() -> None:
    walk = Walk()
    assert walk.log() == []
    assert walk.names(ev.SupervisorHello(1, 100, 0, 0)) == []
    assert walk.log(1) == ["Begin", "Recall"]
    assert walk.names(ev.Recalled(1, False)) == ["Claim", "Prepare"]
    assert (walk.phase, walk.machine.phase, walk.machine.speaks(None)) == (NodePhase.PREPARE, "restoring", False)
    assert walk.names(ev.Claimed(1, HERE)) == []
    assert walk.machine.speaks(None)
    assert walk.names(ev.Provided(1, {0: 0, 1: 2}, 3)) == ["Use", "PREPARE"]
    assert walk.names(ev.Ports(1, 1, b"\1\0\2\0")) == ["Mark"]
    start, remember, upload = walk.on(ev.Marked(1))
    assert isinstance(start, do.Start)
    assert isinstance(remember, do.Remember)
    assert upload == do.Upload(1, 600.0, None, 3)  # what came from the store does not go there again
    assert (walk.phase, walk.machine.phase) == (NodePhase.RUN, "starting")
    assert walk.on(ev.RankHello(2, 1, 0, 7)) == [do.GiveSlots(2, 1, 0, 0)]
    assert walk.on(ev.RankHello(3, 1, 1, 8)) == [do.GiveSlots(3, 1, 1, 2)]
    assert walk.machine.phase == "running"
    assert walk.names(ev.RankSaid("METRICS", 1, 0, b'{"step": 3}')) == ["Publish"]
    assert walk.names(ev.Ready(1, 0, 4, True)) == ["LookForSnapshots"]
    assert walk.names(ev.PartStored(1, 4)) == ["Commit"]
    assert walk.log(1, n=2, checkpoints=(checkpoint_info(2, 1, 4),)) == ["COMMITTED"]  # to the rank that waits for it
    assert walk.machine.durable == 4
    assert walk.log(1, n=2, ended="succeeded", checkpoints=(checkpoint_info(2, 1, 4),)) == ["COMMITTED"]
    assert walk.machine.life is Life.LAST_RANKS  # they leave by themselves
    for rank in (0, 1):
        assert walk.names(ev.RankExit(1, 1, rank, 0, 7 + rank, wire.ENDED_ITSELF, 0)) == ["Remember"]
    walk.busy = True
    assert walk.names(ev.EngineIdle(1, 1)) == ["Cancel", "Remember", "END", "AskDrained"]
    assert (walk.phase, walk.machine.phase, walk.machine.exit) == (NodePhase.IDLE, "ended", None)
    assert walk.names(ev.Drained(True)) == ["Cancel", "END", "MarkDone"]
    assert walk.machine.exit == 0


def test_a_newer_attempt_waits_for_the_ranks_of_the_older_one() -> None:
    walk = Walk().to(NodePhase.RUN)
    assert walk.log(1, 2) == ["Begin", "Claim", "KILL"]
    assert walk.names(ev.RankExit(1, 1, 0, -9, 1, wire.ENDED_BY_SUPERVISOR, 0)) == []  # of no interest any more
    assert walk.names(ev.EngineIdle(1, 1)) == ["Prepare"]
    assert Timer.KILL not in walk.machine.timers
    assert walk.names(ev.Provided(2)) == ["Use"]
    assert walk.names(ev.Claimed(2, HERE)) == ["PREPARE"]
    assert walk.names(ev.Ports(1, 1, b"\1\0\2\0")) == []  # late
    assert walk.names(ev.Ports(1, 2, b"\1\0")) == ["Cancel", "Remember"]  # a rank too few
    assert walk.machine.attempt is not None
    assert walk.machine.attempt.ranks[0].code == 70


def test_a_supervisor_that_does_not_reap_ends_the_attempt_here() -> None:
    walk = Walk().to(NodePhase.KILL)
    assert walk.later(KILL_S) == ["Cancel", "Remember"]
    assert walk.machine.attempt is not None
    assert walk.machine.attempt.ranks[0].code == 75


def test_ranks_may_live_on_beside_a_supervisor_that_went_away() -> None:
    """A3: a newer attempt does not write into their slots before the supervisor is given up."""
    walk = Walk().to(NodePhase.RUN)
    walk.on(ev.PeerGone(1))
    assert walk.log(1, 2) == ["Begin", "Claim"]
    assert walk.phase is NodePhase.KILL
    assert walk.later(LOST_S) == ["Prepare"]
    # it was only slow: what is being prepared will not hold
    assert walk.names(ev.SupervisorHello(4, 100, 1, 2)) == ["KILL"]
    assert walk.names(ev.Provided(2)) == []
    assert walk.names(ev.EngineIdle(4, 1)) == ["Prepare"]
    assert walk.names(ev.Provided(2)) == ["Use"]


def test_one_preparation_at_a_time() -> None:
    """A3: two that fill the same slots would mix two states under one checksum."""
    walk = Walk().to(NodePhase.IDLE)
    assert walk.log(1, 2) == ["Begin", "Claim", "Prepare"]
    assert walk.log(1, 2, 3) == ["Begin", "Claim"]
    assert [e.gang.epoch for e in walk.on(ev.Provided(2))] == [3]
    assert walk.names(ev.Failed(3, ev.Work.PREPARE, 76, "damaged")) == ["Cancel", "Remember"]


def test_a_second_place_stands_by_in_silence() -> None:
    walk = Walk()
    walk.log()
    walk.on(ev.SupervisorHello(1, 100, 0, 0))
    walk.log(1)
    walk.on(ev.Recalled(1, False))
    assert walk.names(ev.Provided(1)) == ["Use"]
    assert walk.names(ev.Claimed(1, THERE)) == ["Cancel", "Remember"]
    assert (walk.phase, walk.machine.speaks("the log cannot be read")) == (NodePhase.IDLE, False)


def test_ports_that_an_agent_before_asked_for_are_not_used() -> None:
    """A6: the claim of this one is not known yet."""
    walk = Walk()
    walk.log(1)
    walk.on(ev.Recalled(1, False))
    walk.on(ev.Provided(1))
    walk.on(ev.SupervisorHello(1, 100, 1, 0))
    assert walk.names(ev.Ports(1, 1, b"\1\0\2\0")) == []
    assert walk.names(ev.Claimed(1, HERE)) == ["PREPARE"]
    assert walk.names(ev.Ports(1, 1, b"\1\0\2\0")) == ["Mark"]


def test_a_start_that_its_supervisor_never_got_is_noticed() -> None:
    """A7: it came again, has no ranks of the attempt and does not say that they ended."""
    walk = Walk().to(NodePhase.RUN)
    walk.on(ev.PeerGone(1))
    walk.on(ev.SupervisorHello(2, 100, 1, 0))
    walk.on(ev.Ports(2, 1, b"\1\0\2\0"))
    assert walk.phase is NodePhase.RUN
    assert walk.later(LOST_S) == ["Cancel", "Remember"]
    assert walk.phase is NodePhase.IDLE


@pytest.mark.parametrize("lost_s", [0.0, LOST_S])
def test_a_supervisor_may_come_back(lost_s: float) -> None:
    walk = Walk().to(NodePhase.RUN)
    walk.on(ev.PeerGone(1))
    walk.later(lost_s)
    walk.on(ev.SupervisorHello(2, 100, 1, 2))
    assert walk.phase is (NodePhase.IDLE if lost_s else NodePhase.RUN)


def test_addresses_of_a_supervisor_that_is_gone_are_not_used() -> None:
    walk = Walk(nodes=2).to(NodePhase.PEERS)
    walk.on(ev.PeerGone(1))
    stale = ev.Met(1, {0: ev.Address("h", [1, 2]), 1: ev.Address("i", [3, 4])})
    assert walk.names(stale) == []
    assert walk.names(ev.SupervisorHello(2, 101, 0, 0)) == ["PREPARE"]
    assert walk.names(ev.Ports(2, 1, b"\5\0\6\0")) == ["Meet"]
    assert walk.names(stale) == []
    assert walk.names(ev.Met(1, {0: ev.Address("h", [5, 6]), 1: ev.Address("i", [3, 4])})) == ["Mark"]
    assert walk.names(ev.SupervisorHello(3, 102, 7, 1)) == ["Drop", "KILL"]
    assert walk.phase is NodePhase.KILL


@pytest.mark.parametrize("phase", [NodePhase.RUN, NodePhase.ADOPT])
def test_a_failure_of_the_store_ends_no_rank(phase: NodePhase) -> None:
    walk = Walk(nodes=2).to(phase)
    for work in (ev.Work.MEET, ev.Work.MARK):
        assert walk.names(ev.Failed(1, work, 75, "the store is away")) == []
    assert walk.phase is phase


def test_an_agent_that_finds_the_mark_adopts() -> None:
    walk = Walk()
    walk.log(1)
    before = {0: RankStatus(pid=7, step=3), 1: RankStatus(pid=8, code=1)}
    assert walk.names(ev.Recalled(1, True, False, before)) == ["Upload"]
    assert walk.names(ev.SupervisorHello(1, 100, 1, 1)) == []
    assert walk.on(ev.RankHello(2, 1, 0, 7, handed=3)) == [do.TakeSlots(1, 0)]
    assert walk.names(ev.SlotsTaken(1, 0, 4)) == ["LookForSnapshots"]
    assert (walk.phase, walk.machine.phase, walk.machine.attempt.ranks[1].code) == (NodePhase.RUN, "running", 1)  # type: ignore[union-attr]
    assert walk.log(1, n=2, checkpoints=(checkpoint_info(2, 1, 4),)) == ["COMMITTED"]


def test_an_engine_that_does_not_come_to_a_restarted_agent_is_lost() -> None:
    walk = Walk().to(NodePhase.ADOPT)
    assert walk.later(ADOPT_S) == ["Cancel", "Remember"]
    over = Walk()
    over.log(1)
    assert over.names(ev.Recalled(1, True, over=True)) == ["Cancel", "Remember"]


@pytest.mark.parametrize("first", ["rank", "supervisor"])
def test_ranks_whose_slots_died_with_their_agent_are_ended(first: str) -> None:
    walk = Walk().to(NodePhase.ADOPT)
    both = [ev.RankHello(2, 1, 0, 7), ev.SupervisorHello(1, 100, 1, 2)]
    one, other = both if first == "rank" else both[::-1]
    assert walk.names(one) == []
    assert walk.names(other) == ["KILL"]


@pytest.mark.parametrize("phase", [phase for phase in NodePhase if phase is not NodePhase.RECALL])  # below
def test_asked_to_leave_in_each_phase(phase: NodePhase) -> None:
    """Ranks that run save first; else it leaves at once. While the store is slow nothing is begun any more (A8)."""
    walk = Walk(nodes=2).to(phase)
    walk.busy = True
    adopts = phase is NodePhase.ADOPT
    assert walk.names(ev.Terminate())[0] == ("STOP" if phase is NodePhase.RUN else "AskDrained")
    for event in [
        ev.Claimed(1, HERE),
        ev.SupervisorHello(2, 100, 1 if adopts else 0, 2 if adopts else 0),
        ev.EngineIdle(2, 1),
        ev.Provided(1),
        ev.Ports(2, 1, b"\1\0\2\0"),
        ev.Met(1, {0: ev.Address("h", [1, 2]), 1: ev.Address("i", [3, 4])}),
        ev.Marked(1),
    ]:
        walk.on(event)  # the rules are asserted after each
    assert walk.machine.exit is None
    walk.busy = False
    walk.on(ev.EngineIdle(2, 1))
    walk.on(ev.Drained(True))
    assert walk.machine.exit == 0


def test_asked_to_leave_before_it_knows_what_runs_here() -> None:
    """An agent in the place of one that died: the ranks of the attempt are about to save, or have."""
    walk = Walk()
    assert walk.names(ev.Terminate()) == ["AskDrained"]
    assert walk.machine.exit is None
    assert walk.log(1) == ["Begin", "Recall"]
    assert walk.names(ev.Recalled(1, True)) == ["Upload"]
    assert walk.names(ev.SupervisorHello(1, 100, 1, 2)) == ["STOP"]
    assert walk.on(ev.RankHello(2, 1, 0, 7, handed=3)) == [do.TakeSlots(1, 0)]
    assert walk.names(ev.SlotsTaken(1, 0, 4)) == ["LookForSnapshots"]
    assert walk.log(1, n=2, checkpoints=(checkpoint_info(2, 1, 4),)) == ["COMMITTED", "AskDrained"]
    assert walk.later(KILL_S) == []  # commit_s more
    assert walk.machine.exit is None
    walk.on(ev.EngineIdle(1, 1))
    assert walk.machine.exit == 0


@pytest.mark.parametrize("attempts", [(), (1,)])
def test_asked_to_leave_where_nothing_was_begun(attempts: tuple[int, ...]) -> None:
    walk = Walk()
    walk.on(ev.Terminate())
    walk.log(*attempts)
    if attempts:
        assert walk.names(ev.Recalled(1, False)) == []
    assert walk.machine.exit == 0
    away = Walk()
    away.on(ev.Terminate())
    away.later(KILL_S)  # the log cannot be read
    assert away.machine.exit == 0


@pytest.mark.parametrize("phase", [NodePhase.PORTS, NodePhase.PEERS])
def test_asked_to_leave_with_its_supervisor_there(phase: NodePhase) -> None:
    walk = Walk(nodes=2).to(phase)
    walk.busy = True
    walk.on(ev.Terminate())
    for event in (
        ev.Claimed(1, HERE),
        ev.Ports(1, 1, b"\1\0\2\0"),
        ev.Met(1, {0: ev.Address("h", [1, 2]), 1: ev.Address("i", [3, 4])}),
    ):
        assert walk.names(event) == []
    assert walk.names(ev.Terminate()) == []  # asked again, by whoever takes the run over
    assert walk.machine.exit is None
    walk.busy = False
    walk.on(ev.EngineIdle(2, 1))
    walk.on(ev.Drained(True))
    assert walk.machine.exit == 0


def test_leaving_has_an_end_though_the_store_is_away() -> None:
    walk = Walk().to(NodePhase.RUN)
    walk.busy = True
    walk.on(ev.Terminate())
    walk.later(120.0 + KILL_S)
    assert walk.machine.exit == 0
    walk = Walk().to(NodePhase.RUN)
    walk.busy = True
    assert walk.log(1, ended="succeeded") == []
    assert walk.later(LAST_RANKS_S) == ["END", "AskDrained"]
    assert walk.later(END_S) == ["Cancel", "END", "MarkDone"]


def test_a_run_that_has_ended_begins_nothing() -> None:
    walk = Walk().to(NodePhase.RUN)
    walk.busy = True
    assert walk.log(1, ended="cancelled") == ["END", "AskDrained"]
    assert walk.log(1, 3) == []
    assert walk.names(ev.SupervisorHello(5, 101, 0, 0)) == ["Drop", "END", "Cancel", "Remember"]


def test_another_launch_fences_this_one() -> None:
    walk = Walk().to(NodePhase.RUN)
    assert walk.log(1, launch="launch-2") == ["Cancel", "END", "MarkDone"]
    assert walk.machine.exit == 75


def test_a_log_that_cannot_be_read_halts() -> None:
    walk = Walk().to(NodePhase.RUN)
    assert walk.log(1, 2, unreadable="record 3 is damaged") == []
    assert walk.names(ev.PartStored(1, 4)) == []
    assert walk.log(1, 2) == ["Begin", "Claim", "KILL"]


def test_a_late_part_of_an_older_attempt_is_not_committed() -> None:
    """A4: the run was resumed and ended again before this agent heard of it."""
    walk = Walk().to(NodePhase.RUN)
    walk.busy = True
    walk.log(1, 2, ended="cancelled")
    assert walk.names(ev.PartStored(1, 4)) == []


def test_the_rules_find_a_broken_machine() -> None:
    walk = Walk().to(NodePhase.RUN)
    walk.machine.timers.clear()
    walk.machine.engine.peer = None
    with pytest.raises(Broken, match="A7: RUN waits for nothing"):
        walk.on(ev.Drained(True))


def test_campaign() -> None:
    """Lost supervisors, late and repeated messages, lost claims, slow uploads, restarts, orders to leave, at random:
    the rules hold after every event, no sequence ends where nothing comes any more, and every move is made.
    """
    moves: set[tuple[NodePhase, NodePhase]] = set()
    for seed in range(SEQUENCES):
        world = World(seed)
        try:
            for _ in range(world.rng.choice((20, 60, 120))):
                if world.machine.exit is not None:
                    break
                world.act()
            assert world.settle(), "nothing comes any more, and the attempt is neither over nor does it run"
        except BaseException:
            print(f"seed {seed}", *world.trace[-80:], sep="\n")
            raise
        moves |= world.moves
    rare = {
        (NodePhase.PEERS, NodePhase.KILL),
        (NodePhase.RECALL, NodePhase.KILL),
    }  # walked above, and by `to(NodePhase.KILL)`
    assert {(before, after) for before, afters in MOVES.items() for after in afters} - moves <= rare


def test_a_rank_hears_the_run_s_algorithms() -> None:
    walk = Walk().to(NodePhase.RUN)
    walk.on(ev.RankHello(7, 1, 0, 100))
    assert walk.on(ev.Proposed(7, 1, 0, b"mine")) == [do.Agree(7, 1, 0, b"mine")]
    assert walk.on(ev.Agreed(7, 1, 0, 0, b"the run's")) == [do.Send(7, "ALGORITHMS", 1, 0, 0, b"the run's")]
    walk.on(ev.RankHello(8, 1, 0, 100))  # connected again, it proposes again
    assert walk.on(ev.Agreed(7, 1, 0, 0, b"the run's")) == []
    assert walk.on(ev.Proposed(8, 2, 0, b"mine")) == [], "of another attempt"


def test_ranks_hear_of_their_data_when_they_may_soon_wait_for_it() -> None:
    """Whoever knows that the next steps' data is there is left alone, however much comes."""
    walk = Walk().to(NodePhase.RUN)

    def told(event: ev.Event) -> list[tuple[int, int, int, int]]:
        effects = walk.on(event)
        return [(e.peer, e.rank, e.a, e.b) for e in effects if isinstance(e, do.Send) and e.name == "DATA"]

    assert told(ev.DataThere(1, 5, 0, "")) == []  # nobody has asked
    for peer, rank in ((7, 0), (8, 1)):
        walk.on(ev.RankHello(peer, 1, rank, 100 + rank))
    assert told(ev.DataRead(7, 1, 0, 4, 4)) == [(7, 0, 5, 0)]
    assert told(ev.DataThere(1, 6, 0, "")) == [(7, 0, 6, 0)]  # it knows of 5, the one that it reads next
    assert told(ev.DataThere(1, 900, 0, "")) == []  # it knows of the one after that too
    assert told(ev.DataRead(7, 1, 0, 5, 6)) == [(7, 0, 900, 0)]
    assert told(ev.DataThere(1, 1000, 0, "")) == []
    assert told(ev.DataThere(1, 1000, 75, "the store is away")) == [(7, 0, 1000, 75)]  # once a reason
    assert told(ev.DataThere(1, 1000, 75, "still")) == []
    assert told(ev.DataThere(1, 1001, 0, "")) == [(7, 0, 1001, 0)]
    assert told(ev.DataRead(9, 1, 0, 6, 900)) == []  # of a connection that is not its
    assert told(ev.DataThere(2, 5, 0, "")) == []  # of another attempt
    walk.on(ev.PeerGone(7))
    assert told(ev.DataThere(1, 2000, 75, "")) == []
