"""The actors of small worlds (`worlds.py`): nodes that restore, save and commit, drivers that suspect them, others.

A node's thread of saving does what it does without hearing of anything else, so each one is also a zombie: fenced or
not, it goes on until the store tells it. A driver suspects the attempt that it finds, rightly or not, and starts
another one by the shipped ``decide``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import keys
from checkpoint.agent.commit import Committer
from checkpoint.agent.gang import Gang, Options
from checkpoint.agent.groups import NodeGroups
from checkpoint.agent.meet import claim
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.claims import Place
from checkpoint.collect.collector import collect
from checkpoint.collect.pins import pinned
from checkpoint.collect.retention import Rules
from checkpoint.errors import Conflict, Damaged, PinRefused, StoreError
from checkpoint.layout import PlanLayout, RankLayout
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from checkpoint.store.base import PAID
from flows.drive.decide import decide, launch_to_use
from flows.drive.run import fold_view, ruling_how
from flows.drive.views import Cause, Look, Memory, NodeView, Policy, RankView, RunLayout, StartAttempt
from tests.support.protocol.hub import Serial
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
from tests.support.protocol.tree import Body, Line
from trainer.failures import Failure

STEPS, EVERY = 100, 2
NOWHERE = Path("/nowhere")


def ranks_of(how: Mapping[str, Any]) -> int:
    return int(how["parallel"]["stages"])


def attempt_body(
    order: StartAttempt, state: RunState, how: Mapping[str, Any], launch: str, steps: int
) -> dict[str, Any]:
    """As ``flows.drive.run.attempt_body`` of a prepared run."""
    ranks = ranks_of(how)
    plan = plan_of(ranks, steps).digest.hex()
    return {
        "launch": launch, "nodes": ranks, "ranks": ranks, "how": dict(how), "plan": plan, "what": WHAT.hex(),
        "restore": order.restore.to_map(), "reason": order.reason, "slot_epochs": list(order.slot_epochs),
        "cause": order.cause.to_map() if order.cause else None,
        **({"order": state.orders[-1].n} if state.orders else {}),
    }  # fmt: skip


OPENED: list[SlotTable] = []
"""Slots are real; they go at the end of the search."""


def slots_of(layouts: dict[int, RankLayout], plan: PlanLayout) -> SlotTable:
    table = SlotTable(layouts, plan.digest, plan.what_digest, 1)
    for rank in layouts:
        table.create(rank)
    OPENED.append(table)
    return table


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
            wanted = attempt is not None and (attempt.launch, attempt.nodes) == (where.launch, where.nodes)
            if wanted and state.epoch > (where.known.epoch if where.known else 0):
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
    begins = slots_of(mine, layout)
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
        table, step = slots_of(mine, layout), attempt.step + more
        for rank, own in mine.items():
            held[rank] = _advanced(held[rank], at, step)
            slot = table.slots[rank][0]
            with slot.begin_fill() as data:
                write_state(own, data, held[rank])
            slot.finish_fill(step, attempt.n, Serial())
        at = step
        uploader.begin(Source(attempt.n, layout, table, 600.0))
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


def _restored(line: Line, store: Store, table: SlotTable, state: RunState, attempt: AttemptInfo) -> bool:
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


def goes_back(known: RunState, step: int) -> Body:
    """A person orders the run to go on from the checkpoint of this step, if it can be used."""

    def order(state: RunState) -> tuple[str, dict[str, Any]] | None:
        found = state.at_step(step)
        if found is None or state.orders:
            return None
        how = {"kind": "order", "how": dict(how_of(1)), "by": "a test", "via": "a test"}
        return "intervention", {**how, "checkpoint": found.n, "step": found.step}

    def body(line: Line) -> None:
        while True:
            try:
                RunLog(line, RUN, writer="order").transact(order, known)
                return
            except StoreError:
                line.tick(1.0)

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
