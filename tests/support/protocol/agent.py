"""An agent of a world: the shipped machine, watcher, uploader, committer, preparer, claims and meetings; its threads
are the real one's, as greenlets. What ``service.py`` and ``actions.py`` do between them stands here once more, without
sockets and files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint import keys
from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.commit import Committer
from checkpoint.agent.gang import CannotStart, Gang, Options, layouts
from checkpoint.agent.machine import Machine
from checkpoint.agent.meet import Meeting, claim
from checkpoint.agent.prepare import Preparer, Provisions, exit_of
from checkpoint.agent.slots import SlotChanged, SlotTable
from checkpoint.agent.status import NodeStatus
from checkpoint.agent.upload import Source, Uploader
from checkpoint.agent.watch import Watcher
from checkpoint.errors import CheckpointError, StoreError
from checkpoint.log import RunLog, RunState
from checkpoint.store.base import PAID
from tests.support.protocol.engine import WIRE_S
from tests.support.protocol.gate import Gate
from tests.support.protocol.hub import Event, Process, Serial, Signal

if TYPE_CHECKING:
    from tests.support.protocol.world import Host, World

BEAT_S = 1.0
_IGNORED = (do.Drop, do.Publish, do.AskKernel, do.Agree)


class Agent(Process):
    def __init__(self, world: World, host: Host) -> None:
        super().__init__(world.hub, "agent", f"agent of {host.name}")
        hub = world.hub
        self.world, self.host = world, host
        incarnation = f"i{hub.number()}"
        self.gate = Gate(world.place, self, world)
        self.options = Options(
            world.run, host.launch, host.node, host.nodes, world.work, world.work, b"k" * 32, host.place, "127.0.0.1",
            "127.0.0.1", 0, PAID.look_s,
        )  # fmt: skip
        self.machine = Machine(self.options)
        self.log = RunLog(
            self.gate, world.run, writer=f"agent-{host.node}-{incarnation}", clock=hub.clock, token=hub.token
        )  # fmt: skip
        self.preparer = Preparer(self.gate, self.options, Serial())
        self.preparer.layouts = world.plans
        self.committer = Committer(
            self.log, host.node, host.nodes, post=self.post, on_commit=lambda state, _: self.on_state(state),
            on_idle=lambda: self.feed(self.drained()), on_error=self.on_error, poll_s=PAID.look_s, clock=hub.clock,
        )  # fmt: skip
        self.uploader = Uploader(
            self.gate, world.run, host.node, host.nodes, incarnation, pool=Serial(), post=self.post,
            on_part=lambda step, epoch: self.feed(ev.PartStored(epoch, step)),
            on_idle=lambda: self.feed(self.drained()), on_error=self.on_error, clock=hub.clock, rest=hub.sleep,
        )  # fmt: skip
        self.watcher = Watcher(
            self.log, PAID.look_s, post=self.post, on_state=self.on_state, on_error=self.on_log_error,
            on_refused=self.kill, clock=hub.clock,
        )  # fmt: skip
        self.status = NodeStatus(host.node, host.launch, incarnation)
        self.has: Provisions | None = None
        self.found: dict[int, Provisions] = {}
        self.early: list[ev.Event] = []
        self.error: str | None = None
        self.log_error: str | None = None
        self.cancelled, self.superseded, self.remet = Event(hub), Event(hub), Event(hub)
        self.to_upload, self.to_commit, self.to_beat = Signal(), Signal(), Signal()
        for name, work in (
            ("watch", self._watch), ("upload", self._upload), ("commit", self._commit), ("beat", self._beat)
        ):  # fmt: skip
            hub.spawn(self, name, work)

    # --- the loop -----------------------------------------------------------------------------------------

    def post(self, call: Callable[[], None]) -> None:
        self.hub.at(0.0, self, call)

    def hear(self, event: ev.Event) -> None:
        if self.machine.state is None:
            self.early.append(event)
        else:
            self.feed(event)

    def feed(self, event: ev.Event) -> None:
        if self.machine.exit is not None:
            return
        events = deque([event])
        while events:
            for effect in self.machine.on(self.hub.now, events.popleft()):
                answer = self.run(effect)
                if answer is not None:
                    events.append(answer)
        for _timer, at in self.machine.timers.items():
            self.hub.at(max(0.0, at - self.hub.now), self, self._tick)
        if self.machine.changed:
            self.to_beat.notify()
        if self.machine.exit is not None:
            self.leave()

    def _tick(self) -> None:
        for timer in self.machine.due(self.hub.now):
            self.feed(ev.Due(timer))

    def leave(self) -> None:
        """The process ends by itself: with its last status, and with an engine that was told to."""
        self.status.left = self.host.left is not None
        self.to_beat.notify()
        self.hub.at(1.0, self, self.kill)

    def kill(self) -> None:
        super().kill()
        engine = self.host.engine
        if engine is not None and self.host.agent is self:
            engine.peer = None
            if self.machine.exit is not None:  # a node that has left leaves as a whole
                engine.kill()

    def on_state(self, state: RunState) -> None:
        if self.machine.state is None or state.n >= self.machine.state.n:
            self.log_error = state.unreadable
            self.committer.state(state)
            self.to_commit.notify()
            self.feed(ev.LogRead(state))
        early, self.early = self.early, []
        for event in early:
            self.hear(event)

    def on_error(self, text: str | None) -> None:
        self.error, self.machine.changed = text, True

    def on_log_error(self, text: str | None) -> None:
        self.log_error, self.machine.changed = text, True

    # --- threads ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while (least := self.watcher.look()) is not None:
            self.hub.sleep(max(least, self.watcher.pause_s()))

    def _upload(self) -> None:
        while True:
            self.uploader.pump()
            self.hub.park(self.to_upload)

    def _commit(self) -> None:
        while True:
            due = self.committer.pump()
            self.hub.park(self.to_commit, None if due is None else max(0.0, due - self.hub.now))

    def _beat(self) -> None:
        """``Service._beat``, and ``Hints.beat`` at the pace of a store that is paid for."""
        told, at = None, -1e9
        while True:
            machine, status, attempt = self.machine, self.status, self.machine.attempt
            machine.changed = False
            if attempt is not None:
                self.feed(ev.SlotsSeen(attempt.epoch, self.finals(attempt.epoch, attempt.gang.local)))
                status.epoch, status.ranks = attempt.epoch, attempt.ranks
            status.supervisor, status.phase, status.durable = machine.engine.pid, machine.phase, machine.durable
            status.error = self.log_error or self.error or machine.slot_error
            status.slots = sorted(self.has.table.held_by_all(), reverse=True) if self.has is not None else []
            if machine.speaks(self.log_error) and (status.news() != told or self.hub.now - at >= PAID.beat_s):
                news = status.news()
                try:
                    self.gate.put(keys.status_key(self.world.run, self.host.launch, self.host.node), status.pack())
                    if news != told:
                        self.watcher.expect()
                    told, at = news, self.hub.now
                except StoreError:
                    pass
            self.hub.park(self.to_beat, BEAT_S)

    # --- what the machine says (actions.py) ---------------------------------------------------------------

    def finals(self, epoch: int, ranks: range) -> dict[int, int]:
        table = self.has.table if self.has is not None else None
        return {
            rank: seen.step
            for rank in ranks
            for seen in (table.look(rank) if table is not None else ())
            if seen.ready and seen.final and seen.epoch == epoch
        }

    def drained(self) -> ev.Drained:
        return ev.Drained(self.uploader.idle and self.committer.idle)

    def run(self, effect: do.Effect) -> ev.Event | None:
        hub, host, engine = self.hub, self.host, self.host.engine
        match effect:
            case do.Send() | do.Start():
                if isinstance(effect, do.Send) and effect.name == "COMMITTED":
                    self.world.told(effect)
                if engine is not None and engine.alive:
                    ranks = {rank.peer: rank for rank in engine.ranks.values()}
                    if effect.peer == engine.peer or effect.peer in ranks:
                        hub.at(WIRE_S, engine, lambda: engine.hear(effect))
            case do.GiveSlots(peer=peer, rank=number, restore=restore):
                rank = engine.ranks.get(number) if engine is not None else None
                if engine is not None and rank is not None and rank.peer == peer and self.has is not None:
                    slots = self.has.table.slots[number]
                    hub.at(WIRE_S, engine, lambda: engine.give(rank, slots, restore) if rank.alive else None)
            case do.TakeSlots(epoch=epoch, rank=number):
                return self._take(epoch, number)
            case do.Begin():
                self._stop()
                self.cancelled, self.superseded = Event(hub), Event(hub)
                self.uploader.cancel()
                self.committer.cancel()
            case do.Cancel():
                self.cancelled.set()
                self.remet.set()
            case do.Recall(gang=gang):
                if host.mark != gang.epoch:
                    return ev.Recalled(gang.epoch, False)
                epoch, over, notes = host.notes
                layout, path = self.world.plans[gang.attempt.plan]
                table = self._table(gang)
                self.has = Provisions(layout, path, table)
                same = epoch == gang.epoch
                return ev.Recalled(gang.epoch, True, over and same, notes if same else {})
            case do.Claim(gang=gang):
                hub.spawn(self, "claim", lambda cancelled=self.superseded: self._claim(gang, cancelled))  # type: ignore[misc]
            case do.Prepare(gang=gang, state=state):
                self.found = {}
                table = self.has.table if self.has is not None else None
                hub.spawn(
                    self,
                    "prepare",
                    lambda c=self.cancelled: self._prepare(gang, state, table, c),  # type: ignore[misc]
                )
            case do.Use(gang=gang):
                self.has = self.found.pop(gang.epoch)
            case do.Meet(gang=gang, address=address):
                self.remet.set()
                self.remet = Event(hub)
                hub.spawn(self, "meet", lambda c=self.remet: self._meet(gang, address, c))  # type: ignore[misc]
            case do.Mark(gang=gang):
                host.mark = gang.epoch
                return ev.Marked(gang.epoch)
            case do.Remember():
                host.notes = effect.epoch, effect.over, dict(effect.ranks)
            case do.Upload(epoch=epoch, deadline_s=deadline_s, point=point, stored=stored, amended=amended):
                assert self.has is not None
                self.uploader.begin(Source(epoch, self.has.layout, self.has.table, deadline_s, point, stored, amended))
                self.committer.begin(epoch, self.has.layout.ranks, deadline_s)
                self.to_upload.notify()
            case do.LookForSnapshots():
                self.uploader.wake()
                self.to_upload.notify()
            case do.Commit(step=step, state=state):
                self.committer.add(step, state)
                self.to_commit.notify()
            case do.AskDrained():
                return self.drained()
            case do.MarkDone(why=why):
                host.left = why
            case _:
                assert isinstance(effect, _IGNORED), effect
        return None

    def _stop(self) -> None:
        self.cancelled.set()
        self.remet.set()
        self.superseded.set()

    def _table(self, gang: Gang) -> SlotTable:
        layout, _ = self.world.plans[gang.attempt.plan]
        table = SlotTable(layouts(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
        self.world.tables.append(table)
        return table

    def _take(self, epoch: int, number: int) -> ev.Event:
        assert self.has is not None
        engine = self.host.engine
        rank = engine.ranks.get(number) if engine is not None else None
        try:
            self.has.table.adopt(number, self.world.handed(rank))
        except SlotChanged as error:
            return ev.SlotsLost(epoch, number, str(error))
        return ev.SlotsTaken(epoch, number, self.finals(epoch, range(number, number + 1)).get(number))

    def _claim(self, gang: Gang, superseded: Event) -> None:
        holder = claim(self.gate, self.options, gang, superseded)  # type: ignore[arg-type]
        if holder is not None:
            self.post(lambda: self.feed(ev.Claimed(gang.epoch, holder)))

    def _prepare(self, gang: Gang, state: RunState, table: SlotTable | None, cancelled: Event) -> None:
        try:
            found = self.preparer.prepare(gang, state, table, cancelled)  # type: ignore[arg-type]
        except (CannotStart, CheckpointError, OSError) as error:
            code, words = exit_of(error, self.options.work)
            self.post(lambda: self.feed(ev.Failed(gang.epoch, ev.Work.PREPARE, code, words)))
            return
        self.world.tables.append(found.table)

        def provided() -> None:
            self.found[gang.epoch] = found
            self.feed(ev.Provided(gang.epoch, found.restore, found.start_step, found.from_slot))

        self.post(provided)

    def _meet(self, gang: Gang, address: ev.Address, cancelled: Event) -> None:
        meeting = Meeting(self.gate, self.options, gang, address, self.hub.clock)
        try:
            while not cancelled.wait(meeting.pause_s):
                if (found := meeting.look()) is not None:
                    self.post(lambda: self.feed(ev.Met(gang.epoch, found)))
                    return
        except CannotStart as error:
            code, words = exit_of(error, self.options.work)
            self.post(lambda: self.feed(ev.Failed(gang.epoch, ev.Work.MEET, code, words)))
