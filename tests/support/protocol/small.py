"""The actors and worlds that `search` visits whole: nodes that restore, save and commit, drivers that suspect them.

A node's thread of saving does what it does without hearing of anything else, so each one is also a zombie: fenced or
not, it goes on until the store tells it. A driver suspects the attempt that it finds, rightly or not, and starts
another one by the shipped ``decide``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import keys
from checkpoint.agent.commit import Committer
from checkpoint.agent.gang import Gang, Options
from checkpoint.agent.meet import claim
from checkpoint.agent.slots import Seen, SlotChanged
from checkpoint.agent.upload import Source, Uploader
from checkpoint.claims import Place
from checkpoint.errors import Conflict, Damaged, StoreError
from checkpoint.layout import RankLayout
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.restore import restore_slots
from checkpoint.store.base import PAID
from checkpoint.store.memory import MemoryStore
from flows.drive.decide import decide, launch_to_use
from flows.drive.run import fold_view, ruling_how
from flows.drive.views import Cause, Look, Memory, NodeView, Policy, RankView, RunLayout, StartAttempt
from tests.support.protocol.driver import attempt_body, ranks_of
from tests.support.protocol.hub import Serial, quiet
from tests.support.protocol.search import Body, Budget, End, Line, Objects, Search, Small
from tests.support.protocol.state import (
    RUN,
    WHAT,
    State,
    advanced,
    first_state,
    how_of,
    plan_of,
    read_state,
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


@dataclass(frozen=True)
class Where:
    """A node of a launch, on a host; ``incarnation``: of the process. Two with one host are two processes of it."""

    launch: str
    node: int
    nodes: int
    host: str = "host"
    incarnation: str = "i1"
    claims: bool = False
    restores: bool = True
    known: RunState | None = None
    """The log as its agent had read it when its ranks began; else it reads it from the beginning."""


def node(where: Where) -> Body:
    """From the attempt's record to the end of its next checkpoint."""

    def body(line: Line) -> None:
        log = RunLog(line, RUN, writer=line.name, clock=line.clock, token=line.token)
        state = where.known or RunState(RUN)
        while where.known is None:
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
    holder = claim(line, options, Gang.of(attempt, where.node), Never(line))  # type: ignore[arg-type]
    if holder is None or not holder.same(place):
        return False
    line.note("starts", attempt.n, where.node, where.host)
    return True


def _save(line: Line, where: Where, log: RunLog, state: RunState, attempt: AttemptInfo) -> None:
    layout = plan_of(attempt.ranks, STEPS)
    mine = {rank: layout.rank(rank) for rank in Gang.of(attempt, where.node).local}
    table = Table(mine)
    if where.restores and not _restored(line, table, state, attempt):
        return
    step = attempt.step + EVERY
    for rank, own in mine.items():
        slot = table.slots[rank][0]
        if attempt.checkpoint is not None and where.restores:
            with slot.data() as data:
                found: State = read_state(own, data)
        else:
            found = first_state(own)
            for at in range(1, attempt.step + 1):
                found = {key: advanced(data, at) for key, data in found.items()}
        line.note("begins", attempt.n, attempt.step, wrong(found, attempt.step))
        for at in range(attempt.step + 1, step + 1):
            found = {key: advanced(data, at) for key, data in found.items()}
        with slot.data() as data:
            write_state(own, data, found)
        slot.finish_fill(step, attempt.n)
    parts: list[int] = []

    def committed(newer: RunState, at: int) -> None:
        if newer.find(at, attempt.n) is not None:
            line.note("told", at, attempt.n)

    uploader = Uploader(
        line, RUN, where.node, where.nodes, where.incarnation, pool=Serial(), post=_now,
        on_part=lambda at, _: parts.append(at), on_idle=_nothing, on_error=_nothing, clock=line.clock, rest=line.tick,
    )  # fmt: skip
    uploader.begin(Source(attempt.n, layout, table, 600.0))  # type: ignore[arg-type]
    uploader.pump()
    committer = Committer(
        log, where.node, where.nodes, post=_now, on_commit=committed, on_idle=_nothing, on_error=_nothing,
        poll_s=PAID.look_s, clock=line.clock,
    )  # fmt: skip
    committer.begin(attempt.n, layout.ranks, 600.0)
    for at in parts:
        committer.add(at, state)
    while (due := committer.pump()) is not None:
        for other in range(where.nodes):  # to look again before would find the same
            line.until(keys.run_key(RUN, keys.part_name(step, attempt.n, other)))
        line.tick(due - line.now)


def _restored(line: Line, table: Table, state: RunState, attempt: AttemptInfo) -> bool:
    if attempt.checkpoint is None:
        return True
    info = state.checkpoint(attempt.checkpoint)
    assert info is not None
    targets = {rank: slots[0] for rank, slots in table.slots.items()}
    while True:
        try:
            restore_slots(
                line, RUN, info, plan_of(attempt.ranks, STEPS), targets, epoch=attempt.n, pool=Serial(), same_what=True,
                go_on=lambda: None,
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


def driver(ranks: int, *, order: int = 0) -> Body:
    """Finds no attempt, or one that it believes to be lost; ``ranks``: of the layout that it was started with."""

    def body(line: Line) -> None:
        log = RunLog(line, RUN, writer=line.name, clock=line.clock, token=line.token)
        state, memory, suspect = RunState(RUN), Memory(), None
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
                assert isinstance(decision, StartAttempt), decision
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


NOTHING = Budget()

# --- worlds -------------------------------------------------------------------------------------------------


def began(ranks: int, step: int = 0) -> Objects:
    """A run with its first attempt; and, where ``step``, a checkpoint of it in the log and in the store."""
    store, numbers = MemoryStore(), itertools.count()
    log = RunLog(store, RUN, writer="first", clock=lambda: 0.0, token=lambda: f"t{next(numbers)}")
    start = {"checkpoint": None, "step": 0, "slots": None}
    body: dict[str, Any] = {
        "launch": "l1", "nodes": ranks, "ranks": ranks, "how": dict(how_of(ranks)), "plan": "ab" * 32,
        "what": WHAT.hex(), "restore": start, "reason": "start", "cause": None,
    }  # fmt: skip
    log.append("attempt", {**body, "plan": plan_of(ranks, STEPS).digest.hex()}, RunState(RUN))
    objects = dict(store._objects)
    for _ in range(step // EVERY):
        assert step == EVERY, "one checkpoint is enough"
        objects = grown(objects, {f"n{n}": node(Where("l1", n, ranks)) for n in range(ranks)})
    return objects


def grown(objects: Objects, actors: Mapping[str, Body]) -> Objects:
    """What is in the store after these have run, one as far as it can, then the next."""
    with quiet():
        return _grown(objects, actors)


def _grown(objects: Objects, actors: Mapping[str, Body]) -> Objects:
    one = Search(Small("grown", actors, dict(objects)), 10**6)
    nodes = [actor.root for actor in one.actors]
    held = dict(objects)
    moved = True
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


def committed_once(end: End) -> str:
    """Where nobody died and nothing was fenced, the step is in the log."""
    fenced = len(end.log.attempts) > 1
    if not fenced and not end.dead and not end.log.checkpoints:
        return f"every part is there, and the step is not committed; blocked: {', '.join(sorted(end.blocked))}"
    return ""


def nodes_of(launch: str, ranks: int, **more: Any) -> dict[str, Body]:
    return {
        f"{launch}-node-{n}": node(Where(launch, n, ranks, incarnation=f"{launch}x{n}", **more)) for n in range(ranks)
    }


def commit_races(ranks: int = 3, budget: Budget = NOTHING) -> Small:
    """The ranks of an attempt commit its first checkpoint, each as fast or slow as it likes."""
    objects = began(ranks)
    return Small(f"{ranks} ranks commit", nodes_of("l1", ranks, known=folded(objects)), objects, budget, committed_once)


def suspicion(ranks: int = 2, drivers: int = 2, budget: Budget = NOTHING) -> Small:
    """They commit while drivers believe that the attempt is lost, and begin others."""
    objects = began(ranks)
    actors = {**nodes_of("l1", ranks, known=folded(objects)), **{f"driver-{n}": driver(ranks) for n in range(drivers)}}
    return Small(f"{ranks} ranks commit, {drivers} drivers suspect them", actors, objects, budget, committed_once)
