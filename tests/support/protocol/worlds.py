"""The small worlds that are searched: who is in them, what may go wrong, what must have come to be at their ends."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import checkpoint.agent.groups as groups_module
from checkpoint.agent.groups import NodeGroups
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.store.memory import MemoryStore
from tests.support.protocol.hub import quiet, swapped
from tests.support.protocol.search import Budget, End, Search, Small
from tests.support.protocol.small import STEPS, Over, Where, collector, driver, goes_back, newcomer, node, reader
from tests.support.protocol.state import RUN, WHAT, how_of, plan_of
from tests.support.protocol.tree import Body, Objects, told

NOTHING, A_GRACE = Budget(), Budget(graces=1)


def began(ranks: int, saved: tuple[int, ...] = ()) -> Objects:
    """A run with its first attempt, and these checkpoints of it in the log and in the store."""
    store = MemoryStore()
    log = RunLog(store, RUN, writer="first", clock=lambda: 0.0, token=lambda: "t0")
    body: dict[str, Any] = {
        "launch": "l1",
        "nodes": ranks,
        "ranks": ranks,
        "how": dict(how_of(ranks)),
        "plan": plan_of(ranks, STEPS).digest.hex(),
        "what": WHAT.hex(),
        "restore": {"checkpoint": None, "step": 0, "slots": None},
        "reason": "start",
        "cause": None,
    }
    state = log.append("attempt", body, RunState(RUN))
    objects: Objects = dict(store._objects)
    if saved:
        objects = grown(objects, nodes_of("l1", ranks, known=state, begun=True, saves=saved))
        assert [c.step for c in folded(objects).checkpoints] == list(saved)
    return objects


def grown(objects: Objects, actors: Mapping[str, Body]) -> Objects:
    """What is in the store after these have run, one as far as it can, then the next."""
    with quiet(), told():
        one = Search(Small("grown", actors, objects), 10**6)
        nodes = [actor.root for actor in one.actors]
        held, moved = dict(objects), True
        while moved:
            moved = False
            for i, actor in enumerate(one.actors):
                while (question := nodes[i].question) is not None:
                    if question[0] == "until" and not any(key in held for key in question[2]):
                        break
                    held, answer = one._apply(held, question)
                    nodes[i], moved = actor.after(nodes[i], answer), True
        one.close()
        return held


def folded(objects: Objects) -> RunState:
    store = MemoryStore()
    for key, data in objects.items():
        store.create(key, data)
    return RunLog(store, RUN).fold()


def nodes_of(launch: str, ranks: int, **more: Any) -> dict[str, Body]:
    return {
        f"{launch}-node-{n}": node(Where(launch, n, ranks, incarnation=f"{launch}x{n}", **more)) for n in range(ranks)
    }


def committed(end: End) -> str:
    """Where every part of the newest attempt is there, and a node of it lives, its step is in the log."""
    newest = end.log.newest_attempt
    if newest is None:
        return "there is no attempt"
    mine = {name for name in end.notes if name.startswith(f"{newest.launch}-node-")}
    lives = len(mine) == newest.nodes and mine - end.dead and _joined(end, newest)
    if lives and not end.log.checkpoints.rows_of(newest.n) and (not end.dead or _whole(end, newest)):
        return f"attempt {newest.n} has saved nothing; blocked: {', '.join(sorted(end.blocked))}"
    return ""


def _joined(end: End, attempt: AttemptInfo) -> bool:
    """Whether every group's part is there, or one of its nodes lives; in a gang that has groups."""
    groups = NodeGroups.of(attempt.ranks, attempt.nodes)
    there = "".join(key for key in end.objects if f"-{attempt.n:08d}/groups/" in key)
    return groups.size == 1 or all(
        f"/groups/{group:05d}" in there
        or any(f"{attempt.launch}-node-{n}" not in end.dead for n in groups.members(group))
        for group in range(groups.count)
    )


def _whole(end: End, attempt: AttemptInfo) -> bool:
    parts = [key for key in end.objects if "/parts/" in key and f"-{attempt.n:08d}/" in key]
    return len(parts) == attempt.nodes


def commit_races(ranks: int = 3, budget: Budget = NOTHING) -> Small:
    """The ranks of an attempt commit its first checkpoint, each as fast or slow as it likes."""
    objects = began(ranks)
    actors = nodes_of("l1", ranks, known=folded(objects), begun=True)
    return Small(f"{ranks} ranks commit", actors, objects, budget, committed)


def joined_races(ranks: int = 3, budget: Budget = NOTHING) -> Small:
    """The same where parts join groups of two nodes first; inside `grouped`."""
    found = commit_races(ranks, budget)
    return replace(found, name=f"{ranks} ranks in groups commit")


def grouped() -> AbstractContextManager[None]:
    """Inside, a gang of two is one that is too large for one reader."""
    return swapped(groups_module, "GROUPED_ABOVE", 1)


def suspicion(ranks: int = 2, drivers: int = 2, budget: Budget = NOTHING) -> Small:
    """They commit while drivers believe that the attempt is lost, and begin others."""
    objects = began(ranks)
    actors = {
        **nodes_of("l1", ranks, known=folded(objects), begun=True),
        **{f"driver-{n}": driver(ranks) for n in range(drivers)},
    }
    return Small(f"{ranks} ranks commit, {drivers} drivers suspect them", actors, objects, budget, committed)


def takeover(ranks: int = 2, budget: Budget = NOTHING) -> Small:
    """A driver begins another attempt from the first checkpoint, or from the second one, which the gang before is about
    to commit, and goes on to commit as a zombie.
    """
    objects = began(ranks, (2,))
    known = folded(objects)
    actors = {
        **nodes_of("l1", ranks, known=known, begun=True, saves=(4,)),
        "driver": driver(ranks),
        **nodes_of("l2", ranks, known=known),
    }
    return Small(f"{ranks} ranks are taken over, and go on", actors, objects, budget, committed)


def layouts(one: int = 2, other: int = 1, budget: Budget = NOTHING) -> Small:
    """Two drivers begin a run, each with a layout of its own; nodes are there for both."""
    actors = {
        "driver-a": driver(one),
        "driver-b": driver(other),
        **{f"l1-a-node-{n}": node(Where("l1", n, one, incarnation=f"a{n}")) for n in range(one)},
        **{f"l1-b-node-{n}": node(Where("l1", n, other, incarnation=f"b{n}")) for n in range(other)},
    }

    def final(end: End) -> str:
        if len({attempt.ranks for attempt in end.log.attempts}) != 1:
            return f"attempts of {[attempt.ranks for attempt in end.log.attempts]} ranks"
        fenced = len(end.log.attempts) > 1  # by the driver that came late, and found the other's to suspect
        return "" if end.dead or fenced or end.log.checkpoints else "nothing is saved"

    return Small(f"two drivers, for {one} and for {other} ranks", actors, {}, budget, final)


def claims(budget: Budget = NOTHING) -> Small:
    """Two hosts claim one node; on the first of them two processes are the same rank's agent."""
    objects = began(2)
    known = folded(objects)

    def one(n: int, host: str, incarnation: str) -> Body:
        return node(Where("l1", n, 2, host, incarnation, claims=True, known=known, begun=True))

    actors = {
        "l1-0-host-a": one(0, "a", "a1"),
        "l1-0-host-a-again": one(0, "a", "a2"),
        "l1-0-host-b": one(0, "b", "b1"),
        "l1-1-host-c": one(1, "c", "c1"),
    }
    return Small("two hosts and a second process", actors, objects, budget, _once)


def _once(end: End) -> str:
    return "" if end.dead or len(end.log.checkpoints) == 1 else "nothing is saved"


def collected(ranks: int = 1, budget: Budget = A_GRACE) -> Small:
    """A collector gives up the oldest of three checkpoints, while two read it, one of them under a pin."""
    objects = began(ranks, (2, 4, 6))
    known = folded(objects)
    actors = {"collector": collector(2, known), "reader": reader(known), "pinned-reader": reader(known, pins=True)}
    return Small("a collector and two readers", actors, objects, budget)


def collected_twice(budget: Budget = A_GRACE) -> Small:
    """Two collectors give up the same and delete it."""
    objects = began(1, (2, 4, 6))
    known = folded(objects)
    actors = {"collector": collector(2, known), "other-collector": collector(2, known)}
    return Small("two collectors", actors, objects, budget)


def collected_beside(ranks: int = 1, budget: Budget = A_GRACE) -> Small:
    """A collector is at work while a gang saves, and while a driver fences it."""
    objects = began(ranks, (2, 4))
    known = folded(objects)
    actors = {
        "collector": collector(2, known),
        **nodes_of("l1", ranks, known=known, begun=True, saves=(6,)),
        "driver": driver(ranks),
    }
    return Small("a collector beside a gang that is fenced", actors, objects, budget, committed)


def collected_takeover(ranks: int = 1, budget: Budget = A_GRACE) -> Small:
    """A collector is at work while a driver begins from what was saved, and its gang restores that and goes on."""
    objects = began(ranks, (2, 4, 6))
    known = folded(objects)
    actors = {"collector": collector(2, known), "driver": driver(ranks), **nodes_of("l2", ranks, known=known)}
    return Small("a collector beside a takeover", actors, objects, budget, committed)


def over_wires(over: Over, ranks: int = 1, drivers: int = 2, budget: Budget = NOTHING) -> Small:
    """The ranks commit, and drivers suspect them, over a store that settles what it is not answered."""
    objects = began(ranks)
    actors = {
        **nodes_of("l1", ranks, known=folded(objects), begun=True, over=over),
        **{f"driver-{n}": driver(ranks, over) for n in range(drivers)},
    }
    name = f"{ranks} ranks commit, {drivers} drivers suspect them, over S3"
    return Small(name, actors, objects, budget, committed)


def at_folds(quick: bool, drivers: int = 1, budget: Budget = NOTHING) -> Small:
    """The same where the log has a folded state at every other record (inside `folds_every`), which builds on others;
    a newcomer reads it at any moment.
    """
    objects = began(1, (2,))
    known = folded(objects)
    actors = {
        **nodes_of("l1", 1, known=known, begun=True, saves=(4,)),
        **{f"driver-{n}": driver(1, known=known) for n in range(drivers)},
        "newcomer": newcomer(quick=quick),
    }
    return Small(f"{drivers} drivers and a commit, with folds", actors, objects, budget, committed)


def collected_rollback(budget: Budget = A_GRACE) -> Small:
    """A person has the run go back to the very checkpoint that a collector is about to give up."""
    objects = began(1, (2, 4, 6))
    known = folded(objects)
    actors = {
        "collector": collector(2, known),
        "person": goes_back(known, 2),
        "driver": driver(1, known=known),
        "next-node": node(Where("l1", 0, 1, incarnation="next", known=known, saves=())),
        "new-node": node(Where("l2", 0, 1, incarnation="new", known=known, saves=())),
    }
    return Small("a collector beside a rollback", actors, objects, budget)
