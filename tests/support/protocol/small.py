"""The actors and worlds that `search` visits whole: nodes that restore, save and commit, drivers that suspect them.

A node's thread of saving does what it does without hearing of anything else, so each one is also a zombie: fenced or
not, it goes on until the store tells it. A driver suspects the attempt that it finds, rightly or not, and starts
another one by the shipped ``decide``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoint.agent.groups as groups_module
from checkpoint import keys
from checkpoint.agent.commit import Committer
from checkpoint.agent.gang import Gang, Options
from checkpoint.agent.groups import NodeGroups
from checkpoint.agent.meet import claim
from checkpoint.agent.slots import Seen, SlotChanged
from checkpoint.agent.upload import Source, Uploader
from checkpoint.claims import Place
from checkpoint.collect.collector import collect
from checkpoint.collect.pins import pinned
from checkpoint.collect.retention import Rules
from checkpoint.errors import Conflict, Damaged, PinRefused, StoreError
from checkpoint.layout import RankLayout
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from checkpoint.store.base import PAID
from checkpoint.store.memory import MemoryStore
from flows.drive.decide import decide, launch_to_use
from flows.drive.run import fold_view, ruling_how
from flows.drive.views import Cause, Look, Memory, NodeView, Policy, RankView, RunLayout, StartAttempt
from tests.support.protocol.driver import attempt_body, ranks_of
from tests.support.protocol.hub import Serial, quiet, swapped
from tests.support.protocol.search import Body, Budget, End, Line, Objects, Search, Small, told
from tests.support.protocol.state import (
    RUN,
    TENSORS,
    WHAT,
    State,
    advanced,
    first_state,
    how_of,
    plan_of,
    read_state,
    truth,
    write_state,
    wrong,
)
from trainer import wire
from trainer.failures import Failure

STEPS, EVERY = 100, 2
NOWHERE = Path("/nowhere")


class Slot:
    """A slot of this process's memory, that nobody else writes."""

    def __init__(self, layout: RankLayout) -> None:
        self.layout, self._data = layout, bytearray(layout.data_bytes)
        self.seen = Seen(0, wire.SLOT_EMPTY, 0, -1, 0, final=False, persist=False)

    def look(self, _: int) -> Seen:
        return self.seen

    def hold(self, expected: Seen) -> None:
        self.check(expected)

    def check(self, expected: Seen) -> None:
        if self.seen != expected:
            raise SlotChanged("refilled")

    def release(self) -> None:
        pass

    def data(self) -> memoryview:
        return memoryview(self._data)

    begin_fill = data

    def finish_fill(self, step: int, epoch: int, pool: object = None) -> None:
        self.seen = Seen(0, wire.SLOT_READY, 1, step, epoch, final=False, persist=True)


class Table:
    def __init__(self, layouts: Mapping[int, RankLayout]) -> None:
        self.layouts = layouts
        self.slots = {rank: [Slot(layout)] for rank, layout in layouts.items()}

    def held_by_all(self) -> dict[tuple[int, int], dict[int, Seen]]:
        found: dict[tuple[int, int], dict[int, Seen]] = {}
        for rank, (slot,) in self.slots.items():
            if slot.seen.ready:
                found.setdefault((slot.seen.step, slot.seen.epoch), {})[rank] = slot.seen
        return {key: by_rank for key, by_rank in found.items() if len(by_rank) == len(self.layouts)}


class Never:
    """``threading.Event`` that nobody sets."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self._line.tick(seconds)
        return False


Over = Callable[[Line], Store]


def plain(line: Line) -> Store:
    return line


@dataclass(frozen=True)
class Where:
    """A node of a launch, on a host; ``incarnation``: of the process. Two with one host are two processes of it.

    ``known``: the log as its agent has read it; ``begun``: its ranks run the attempt that is the newest there, else it
    waits for one of its launch. ``saves``: the steps whose snapshots it stores, after the one that it begins from.
    ``over``: its store, of its line.
    """

    launch: str
    node: int
    nodes: int
    host: str = "host"
    incarnation: str = "i1"
    claims: bool = False
    known: RunState | None = None
    begun: bool = False
    saves: tuple[int, ...] = (2,)
    over: Over = plain


def node(where: Where) -> Body:
    """From the attempt's record to the end of its next checkpoint."""

    def body(line: Line) -> None:
        log = RunLog(where.over(line), RUN, writer=line.name)
        state = where.known or RunState(RUN)
        while not where.begun:
            try:
                line.until(keys.log_key(RUN, state.n + 1))
                state = log.fold(state)
            except StoreError:
                line.tick(1.0)
                continue
            attempt = state.newest_attempt
            if attempt is not None and (attempt.launch, attempt.nodes) == (where.launch, where.nodes):
                break
        attempt = state.newest_attempt
        assert attempt is not None
        if not where.claims or _claimed(line, where, attempt):
            _save(line, where, log, state, attempt)

    return body


def _claimed(line: Line, where: Where, attempt: AttemptInfo) -> bool:
    place = Place(where.host, "boot", "space", "/work", where.host, "127.0.0.1", where.nodes)
    options = Options(
        RUN, where.launch, where.node, where.nodes, NOWHERE, NOWHERE, b"", place, "127.0.0.1", "", 0, PAID.look_s
    )
    holder = claim(where.over(line), options, Gang.of(attempt, where.node), Never(line))  # type: ignore[arg-type]
    if holder is None or not holder.same(place):
        return False
    line.note("starts", attempt.n, where.node, where.host)
    return True


def _save(line: Line, where: Where, log: RunLog, state: RunState, attempt: AttemptInfo) -> None:
    layout = plan_of(attempt.ranks, STEPS)
    mine = {rank: layout.rank(rank) for rank in Gang.of(attempt, where.node).local}
    begins = Table(mine)
    if not where.begun and not _restored(line, log.store, begins, state, attempt):
        return
    held: dict[int, State] = {}
    for rank, own in mine.items():
        if attempt.checkpoint is None or where.begun:
            held[rank] = _advanced(first_state(own), 0, attempt.step)
        else:
            with begins.slots[rank][0].data() as data:
                held[rank] = read_state(own, data)
        line.note("begins", attempt.n, attempt.step, wrong(held[rank], attempt.step))
    parts: list[int] = []

    def committed(newer: RunState, at: int) -> None:
        if newer.find(at, attempt.n) is not None:
            line.note("told", at, attempt.n)

    uploader = Uploader(
        log.store,
        RUN,
        where.node,
        where.nodes,
        where.incarnation,
        pool=Serial(),
        post=_now,
        on_part=lambda at, _: parts.append(at),
        on_idle=_nothing,
        on_error=_nothing,
        clock=line.clock,
        rest=line.tick,
    )
    committer = Committer(
        log,
        where.node,
        where.nodes,
        post=_now,
        on_commit=committed,
        on_idle=_nothing,
        on_error=_nothing,
        poll_s=PAID.look_s,
        clock=line.clock,
    )
    committer.begin(attempt.n, layout.ranks, 600.0)
    at = attempt.step
    for more in where.saves:
        table, step = Table(mine), attempt.step + more
        for rank, own in mine.items():
            held[rank] = _advanced(held[rank], at, step)
            slot = table.slots[rank][0]
            with slot.data() as data:
                write_state(own, data, held[rank])
            slot.finish_fill(step, attempt.n)
        at = step
        uploader.begin(Source(attempt.n, layout, table, 600.0))  # type: ignore[arg-type]
        uploader.pump()
        for stored in parts:
            committer.add(stored, state)
        parts.clear()
        while (due := committer.pump()) is not None:
            for other in range(where.nodes):  # to look again before would find the same
                line.until(keys.run_key(RUN, keys.part_name(step, attempt.n, other)))
            groups = NodeGroups.of(attempt.ranks, where.nodes)
            if all(item.join is None for item in committer._pending):  # its own group's is there
                for group in range(groups.count if groups.size > 1 else 0):
                    line.until(keys.run_key(RUN, groups.name(step, attempt.n, group)))
            line.tick(due - line.now)


def _advanced(state: State, at: int, step: int) -> State:
    for each in range(at + 1, step + 1):
        state = {key: advanced(data, each) for key, data in state.items()}
    return state


def _restored(line: Line, store: Store, table: Table, state: RunState, attempt: AttemptInfo) -> bool:
    if attempt.checkpoint is None:
        return True
    info = state.checkpoint(attempt.checkpoint)
    assert info is not None
    targets = {rank: slots[0] for rank, slots in table.slots.items()}
    while True:
        try:
            restore_slots(
                store, RUN, info, plan_of(attempt.ranks, STEPS), targets, epoch=attempt.n, pool=Serial(),
                same_what=True, go_on=lambda: None,
            )  # type: ignore[arg-type]  # fmt: skip
            return True
        except Damaged as error:
            line.note("cannot restore", attempt.n, str(error))
            return False
        except StoreError:
            line.tick(1.0)


def _now(call: Callable[[], None]) -> None:
    call()


def _nothing(*_: object) -> None:
    pass


def driver(ranks: int, over: Over = plain, known: RunState | None = None) -> Body:
    """Finds no attempt, or one that it believes to be lost; ``ranks``: of the layout that it was started with."""

    def body(line: Line) -> None:
        log = RunLog(over(line), RUN, writer=line.name)
        state, memory, suspect = known or RunState(RUN), Memory(), None
        while True:
            try:
                state = log.fold(state)
                newest = state.newest_attempt
                suspect = state.epoch if suspect is None else suspect
                if state.epoch != suspect:
                    return  # another one runs by now, this driver's or not: nothing is known against it
                how = ruling_how(state) or how_of(ranks)
                wanted = RunLayout(ranks_of(how), ranks_of(how), how)
                view = fold_view(state)
                launch = launch_to_use(view, wanted, detaches=False, over=False) or _next(state)
                policy = Policy(
                    STEPS, launch, wanted.nodes, wanted.ranks, backoff_s=0.0, backoff_max_s=0.0, layouts=(wanted,),
                    max_same_step=100, max_attempts_without_progress=100, strikes=100,
                )  # fmt: skip
                lost = None if newest is None else Cause(Failure.INFRA, "the launch is gone")
                nodes = [] if newest is None else [
                    NodeView(n, False, newest.n, "running", (RankView(n, 1, step=0),)) for n in range(newest.nodes)
                ]  # fmt: skip
                decision, memory = decide(view, Look(line.now, tuple(nodes), lost=lost), policy, memory)
                if not isinstance(decision, StartAttempt):
                    line.note("wrong", f"it does not go on: {decision}")
                    return
                name = _next(state) if decision.renew else launch
                state = log.append("attempt", attempt_body(decision, state, how, name, STEPS), state)
                line.note("acts", state.epoch, name)
            except Conflict as conflict:
                state = conflict.state
            except StoreError:
                line.tick(1.0)

    return body


def _next(state: RunState) -> str:
    return f"l{len({a.launch for a in state.attempts}) + 1}"


GRACE_S = 100.0
"""The store's clock moves on by ten times that."""


def collector(passes: int, known: RunState) -> Body:
    def body(line: Line) -> None:
        left = passes
        while left:
            try:
                collect(line, RUN, rules=Rules(last=2, grace_s=GRACE_S), state=known)
                left -= 1
            except StoreError:
                line.tick(1.0)

    return body


def reader(known: RunState, *, pins: bool = False) -> Body:
    """Reads the oldest checkpoint that it finds: under a pin however long that takes, else within the grace."""

    def body(line: Line) -> None:
        line.note("read" if pins else "reads")
        candidates = RunLog(line, RUN).fold(known).restore_candidates()
        try:
            with pinned(line, RUN, candidates[-1], "read") if pins else nullcontext():
                found = StateReader(line, load_manifest(line, RUN, candidates[-1]))
                for number, tensor in enumerate(TENSORS):
                    if bytes(found.read(tensor.name, 0)) != truth(number, 0, candidates[-1].step):
                        line.note("wrong", f"tensor {tensor.name} is not what it was")
        except PinRefused:
            pass
        except Damaged as error:
            line.note("wrong", f"what it reads goes away: {error}")
        line.note("read")

    return body


def newcomer(*, quick: bool) -> Body:
    """Reads the log at any moment, and knows nothing of it."""

    def body(line: Line) -> None:
        try:
            state = RunLog(line, RUN).fold(quick=quick)
        except StoreError:
            return
        line.note("folded", state.n, state.unreadable, state.to_bytes())

    return body


# --- worlds -------------------------------------------------------------------------------------------------

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
        for actor in one.actors:
            actor.close()
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
