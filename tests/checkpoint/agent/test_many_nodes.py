"""What a checkpoint and a start of many nodes ask of the store, counted, and that nobody is needed for either.

The real committers, meetings and logs on a simulated clock (tests/support/gangs.py); no test waits for anything.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.devices import Devices
from checkpoint.agent.events import Address
from checkpoint.agent.gather import turn_s
from checkpoint.agent.groups import NodeGroups
from checkpoint.log import RunLog
from checkpoint.read import load_manifest
from checkpoint.store.base import PAID
from tests.support.gangs import EPOCH, RUN, ManyAgents, Strike

STEP = 7000
"""Of any number of nodes here the one at place 0 is (place + STEP) % nodes."""


def spread(nodes: int, seconds: float, seed: int = 0) -> dict[int, float]:
    """When each node's part is uploaded, or its ports are known."""
    rng = random.Random(seed)
    return {node: rng.random() * seconds for node in range(nodes)}


def node_at(place: int, nodes: int) -> int:
    return (STEP + place) % nodes


@pytest.mark.parametrize("nodes", [8, 64, 1000])
@pytest.mark.parametrize("late_s", [0.0, 60.0])
def test_a_checkpoint_costs_six_requests_a_node(nodes: int, late_s: float) -> None:
    """Uploads within seconds; or one node, the worst to wait for, comes a minute after the others."""
    agents = ManyAgents(nodes)
    times = spread(nodes, 5.0)
    if late_s:
        times[node_at(nodes - 1, nodes)] = late_s
    agents.checkpoint(STEP, times)
    assert all(agent.state.find(STEP, EPOCH) for agent in agents.agents)
    assert not any(agent.errors and agent.errors[-1] for agent in agents.agents)
    assert agents.asked.counts["create parts"] == nodes
    assert agents.asked.counts["get parts"] == nodes
    # in a small gang the time that it waits shows: less than a look a second, of all nodes together
    assert agents.asked.total <= 6 * nodes + (late_s if nodes < 1000 else 0), agents.asked.counts


STAGES = ("listing", "first part", "last part", "manifest made", "manifest there", "record made", "record there")


def struck(stage: str, victims: set[int]) -> Strike:
    """Each victim dies at this stage of its own commit."""
    read: dict[int, int] = {}

    def strike(node: int, verb: str, key: str) -> str:
        if node not in victims:
            return ""
        if verb == "get" and "/parts/" in key:
            read[node] = read.get(node, 0) + 1
        here = {
            "listing": verb == "list" and key.endswith("/parts/"),
            "first part": read.get(node) == 1,
            "last part": read.get(node) == 8,
            "manifest made": verb == "create" and key.endswith("/manifest"),
            "manifest there": verb == "create" and key.endswith("/manifest"),
            "record made": verb == "create" and "/log/" in key,
            "record there": verb == "create" and "/log/" in key,
        }
        return ("after" if stage.endswith("there") else "before") if here[stage] else ""

    return strike


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("deaths", [1, 2, 7])
def test_a_committer_that_dies_anywhere_is_followed_by_the_next(stage: str, deaths: int) -> None:
    """As long as one agent is left there is one record, a turn for each death after all parts were there."""
    nodes = 8
    victims = {node_at(place, nodes) for place in range(deaths)}
    agents = ManyAgents(nodes, strike=struck(stage, victims))
    agents.checkpoint(STEP, spread(nodes, 5.0))
    state = RunLog(agents.shared, RUN).fold()
    assert [(c.step, c.epoch) for c in state.checkpoints] == [(STEP, EPOCH)]
    assert state.void == ()
    assert all(agent.state.find(STEP, EPOCH) for agent in agents.alive)
    if stage == "record there":  # the others read it: the next one has nothing to do
        assert len(agents.alive) == nodes - 1
    else:
        assert len(agents.alive) == nodes - deaths
    assert agents.last <= 5.0 + 2 * turn_s(deaths, nodes, PAID) + PAID.idle_s
    assert agents.asked.total <= (7 + deaths) * nodes, agents.asked.counts


def test_a_death_in_a_thousand_costs_no_more_than_that() -> None:
    """Also where the part that comes last has been waited for for long."""
    nodes = 1000
    times = spread(nodes, 5.0)
    times[node_at(500, nodes)] = 60.0
    agents = ManyAgents(nodes, strike=struck("record made", {node_at(0, nodes)}))
    agents.checkpoint(STEP, times)
    assert all(agent.state.find(STEP, EPOCH) for agent in agents.alive)
    assert len(agents.alive) == nodes - 1
    assert agents.last <= 60.0 * 1.25 + 2 * turn_s(1, nodes, PAID) + PAID.idle_s
    assert agents.asked.counts["get parts"] == 2 * nodes
    assert agents.asked.total <= 6 * nodes, agents.asked.counts


@pytest.mark.parametrize("seed", range(20))
def test_agents_that_die_at_any_request(seed: int) -> None:
    """Whoever is left agrees: a record that names a whole checkpoint, or every one has given up with a word."""
    rng = random.Random(seed)
    nodes = rng.choice([5, 8, 13])
    victims = {node: rng.randrange(1, 30) for node in rng.sample(range(nodes), nodes - 1)}
    made: dict[int, int] = {}

    def strike(node: int, verb: str, key: str) -> str:
        made[node] = made.get(node, 0) + 1
        return rng.choice(["before", "after"]) if made[node] == victims.get(node) else ""

    agents = ManyAgents(nodes, strike=strike, deadline_s=120.0)
    agents.checkpoint(STEP, spread(nodes, 5.0, seed), seed)
    state = RunLog(agents.shared, RUN).fold()
    whole = len(list(agents.shared.list(keys.run_key(RUN, keys.parts_prefix(STEP, EPOCH))))) == nodes
    assert whole or not state.checkpoints
    assert len(state.checkpoints) <= 1
    assert state.void == ()
    assert agents.last <= 5.0 + 120.0 + 2 * PAID.idle_s
    for agent in agents.alive:
        if agent.state.find(STEP, EPOCH) is None:
            assert not state.checkpoints
            assert any("not every node's part came in time" in text for text in agent.errors)
    if whole and agents.alive:
        assert state.checkpoints


def test_a_fenced_gang_commits_nothing() -> None:
    """A newer attempt came while the parts did: the agents hear of it when they would have written."""
    nodes = 8
    agents = ManyAgents(nodes, deadline_s=30.0)
    log = RunLog(agents.shared, RUN, writer="driver")
    log.append("attempt", {**agents.state.attempts[-1].body, "launch": "l2"}, agents.state)
    agents.checkpoint(STEP, spread(nodes, 5.0))
    state = log.fold()
    assert len(state.attempts) == 2
    assert state.checkpoints == state.void == ()


@pytest.mark.parametrize(("nodes", "most"), [(2, 9), (4, 9), (8, 9), (64, 9), (250, 9)])
def test_a_start_costs_a_handful_of_requests_a_node(nodes: int, most: int) -> None:
    agents = ManyAgents(nodes)
    found = agents.meet(spread(nodes, 5.0))
    want = {node: Address(f"10.0.{node // 250}.{node % 250 + 1}", [20000 + node % 1000]) for node in range(nodes)}
    assert all(found[node] == want for node in range(nodes))
    assert agents.asked.total <= most * nodes, agents.asked.counts


def test_addresses_are_put_together_by_the_next_where_the_first_is_dead() -> None:
    nodes = 8
    first = EPOCH % nodes

    def strike(node: int, verb: str, key: str) -> str:
        return "before" if node == first and verb == "list" else ""

    agents = ManyAgents(nodes, strike=strike)
    found = agents.meet(spread(nodes, 1.0))
    assert sorted(found) == [node for node in range(nodes) if node != first]
    assert all(len(value) == nodes for value in found.values())
    assert agents.last <= 1.0 + 2 * (turn_s(1, nodes, PAID) + PAID.idle_s)


def test_who_did_not_come_is_said_by_everybody() -> None:
    nodes, away = 64, {3, 17}
    agents = ManyAgents(nodes)
    how: dict[str, Any] = {"launch": {"connect_s": 30.0}}
    found = agents.meet({n: t for n, t in spread(nodes, 1.0).items() if n not in away}, how)
    assert len(found) == nodes - len(away)
    assert set(found.values()) == {"no address of node 3, 17 came in time (launch.connect_s)"}
    assert agents.asked.total <= 40 * nodes


def test_an_agent_that_was_started_again_is_not_met_under_its_old_ports() -> None:
    nodes = 8
    agents = ManyAgents(nodes)
    agents.meet(spread(nodes, 1.0))
    again = (EPOCH + 3) % nodes
    agents.agents[again].store.put(f"runs/{RUN}/live/{EPOCH}/addr/{again}", b"\x82\xa4host\xa1x\xa5ports\x91\x01")
    stale = agents.meet(spread(nodes, 1.0, 1))
    assert all(stale[node][again] != Address("x", [1]) for node in range(nodes))


@pytest.mark.parametrize("nodes", [3, 8])
def test_everybody_learns_what_the_others_run_on(nodes: int) -> None:
    agents = ManyAgents(nodes)
    devices = {node: Devices("cuda", (node % 2,), "a note", ("NVIDIA H100 80GB HBM3",)) for node in range(1, nodes)}
    found = agents.meet(spread(nodes, 1.0), devices=devices)
    for node in range(nodes):
        assert {n: address.devices for n, address in found[node].items()} == {0: Devices(), **devices}


# --- groups of nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "local"), [(9, 128), (130, 8), (1001, 1)])
def test_above_a_thousand_ranks_parts_join_groups(nodes: int, local: int) -> None:
    """Nobody reads what all wrote: one of each group its nodes' parts, one of all the groups'; six requests a node."""
    agents = ManyAgents(nodes, local=local)
    groups = NodeGroups.of(nodes * local, nodes)
    assert (groups.size - 1) ** 2 < nodes <= groups.size**2
    agents.checkpoint(STEP, spread(nodes, 5.0))
    assert all(agent.state.find(STEP, EPOCH) for agent in agents.agents)
    assert not any(agent.errors and agent.errors[-1] for agent in agents.agents)
    counts = agents.asked.counts
    assert (counts["get parts"], counts["create groups"], counts["get groups"]) == (nodes, groups.count, groups.count)
    assert agents.asked.total <= 6 * nodes + 10, counts  # in a small gang the time that it waits shows
    (info,) = RunLog(agents.shared, RUN).fold().checkpoints
    assert info.parts == groups.count
    assert [s.name for s in load_manifest(agents.shared, RUN, info).sources] == [
        keys.group_name(STEP, EPOCH, group) for group in range(groups.count)
    ]
    assert max(len(agents.shared.get(i.key)) for i in agents.shared.list("")) <= 4 << 20


@pytest.mark.parametrize("seed", range(8))
def test_agents_of_groups_that_die_at_any_request(seed: int) -> None:
    """One agent of each group is left, and there is one record once all parts are there: deaths cost turns."""
    rng = random.Random(seed)
    nodes, local = rng.choice([(9, 200), (13, 100), (30, 40)])
    groups = NodeGroups.of(nodes * local, nodes)
    spared = {rng.choice(groups.members(group)) for group in range(groups.count)}
    victims = {node: rng.randrange(3, 30) for node in range(nodes) if node not in spared}
    made: dict[int, int] = {}

    def strike(node: int, verb: str, key: str) -> str:
        made[node] = made.get(node, 0) + 1
        return rng.choice(["before", "after"]) if made[node] == victims.get(node) else ""

    agents = ManyAgents(nodes, strike=strike, local=local)
    agents.checkpoint(STEP, spread(nodes, 5.0, seed), seed)
    state = RunLog(agents.shared, RUN).fold()
    whole = len(list(agents.shared.list(keys.run_key(RUN, keys.parts_prefix(STEP, EPOCH))))) == nodes
    assert [c.step for c in state.checkpoints] == ([STEP] if whole else [])
    assert state.void == ()
    if whole:
        assert all(agent.state.find(STEP, EPOCH) for agent in agents.alive)
        assert load_manifest(agents.shared, RUN, state.checkpoints[0]).step == STEP


def test_a_node_that_never_comes_is_said_by_every_group() -> None:
    agents = ManyAgents(9, local=200, deadline_s=60.0)
    agents.checkpoint(STEP, dict.fromkeys(range(8), 1.0))
    assert RunLog(agents.shared, RUN).fold().checkpoints == ()
    for agent in agents.agents[:8]:
        assert agent.errors[-1] == f"the commit of step {STEP} is given up: not every node's part came in time"


def test_a_groups_part_with_other_bytes_is_never_taken() -> None:
    """Of another version, say: who finds it says so, and commits nothing that its nodes' parts do not give."""
    agents = ManyAgents(9, local=200, deadline_s=60.0)
    agents.shared.create(keys.run_key(RUN, keys.group_name(STEP, EPOCH, 1)), b"other")
    agents.checkpoint(STEP, spread(9, 2.0))
    assert RunLog(agents.shared, RUN).fold().checkpoints == ()
    assert any("group" in text and "other bytes" in text for agent in agents.agents for text in agent.errors)
