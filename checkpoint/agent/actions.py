"""Does what the machine says: an effect (``effects.py``), a method. Decides nothing.

What may block runs in a thread and is answered by an event: the claim and the preparation of an attempt, the exchange
of addresses, uploads, commits, hints. Owns the node's slots and all that was prepared for the attempt.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from checkpoint import keys
from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.adopt import attempt_path, found_devices, found_plan, recall, remember
from checkpoint.agent.ahead import There
from checkpoint.agent.algorithms import answer, bring
from checkpoint.agent.attempt_file import attempt_bytes
from checkpoint.agent.background import Background, behind
from checkpoint.agent.commit import Committer
from checkpoint.agent.events import Work
from checkpoint.agent.fetch import room_words
from checkpoint.agent.gang import CannotStart, Gang, Options, layouts
from checkpoint.agent.kernel_log import first_xid, kernel_lines, xids
from checkpoint.agent.link import Link, Peer
from checkpoint.agent.meet import claim, meet
from checkpoint.agent.metrics import Gauge
from checkpoint.agent.output import Hints
from checkpoint.agent.prepare import PREFAULT_FIRST_BYTES, Preparer, Provisions, exit_of
from checkpoint.agent.send import WORKERS
from checkpoint.agent.slots import SlotChanged, SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from trainer import wire
from trainer.wire.files import write_file

log = logging.getLogger(__name__)

_CLOCKS_S = 1.0  # the clock of the kernel's log is not quite ours
_SLOT_STATES = {wire.SLOT_EMPTY: "empty", wire.SLOT_FILLING: "filling", wire.SLOT_READY: "ready"}


class Actions:
    """``post`` has the loop call something, from any thread; ``feed`` has the machine hear an event, in the loop."""

    def __init__(
        self,
        options: Options,
        store: Store,
        run_log: RunLog,
        link: Link,
        incarnation: str,
        *,
        post: Callable[[Callable[[], None]], None],
        feed: Callable[[ev.Event], None],
        on_commit: Callable[[RunState, int], None],
        on_error: Callable[[str | None], None],
        gauge: Gauge,
    ) -> None:
        self._gauge = gauge
        self.options, self.store, self.link, self._post, self._feed = options, store, link, post, feed
        self.handed: tuple[int, ...] = ()
        """Descriptors of the HELLO that is being heard; who takes them leaves none."""
        self._has: Provisions | None = None  # the present attempt's
        self._recalled = 0  # the epoch of an attempt that another agent had begun here
        self._found: dict[int, Provisions] = {}  # by epoch, until they are used
        self._retired: list[SlotTable] = []
        self._cancelled = threading.Event()  # what is done to start the attempt is of no use any more
        self._superseded = threading.Event()  # nor is its claim
        self._remet = threading.Event()  # nor are the ports that are being exchanged
        self._background = Background()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="chunks", initializer=self._background.enter)
        self.preparer = Preparer(store, options, self._pool, self._data_there)
        run, node = options.run, options.node
        self.hints = Hints(store, run, keys.status_key(run, options.launch, node))
        self.committer = Committer(
            run_log,
            node,
            options.nodes,
            post=post,
            on_commit=on_commit,
            on_idle=lambda: feed(self._drained()),
            on_error=on_error,
            poll_s=options.log_poll_s,
        )
        self.uploader = Uploader(
            store,
            run,
            node,
            options.nodes,
            incarnation,
            pool=self._pool,
            post=post,
            on_part=lambda step, epoch: feed(ev.PartStored(epoch, step)),
            on_idle=lambda: feed(self._drained()),
            on_error=on_error,
        )

    def run(self, effect: do.Effect) -> ev.Event | None:
        """Do it; the event that answers it at once, where there is one."""
        return _EFFECTS[type(effect)](self, effect)

    def tidy(self) -> None:
        """Slots that nobody uses any more go, as soon as nobody reads them."""
        self._retired = [table for table in self._retired if not table.close()]

    def stop(self) -> None:
        """Whoever works for an attempt may leave."""
        self._cancel()
        self._superseded.set()

    def close(self) -> None:
        self.uploader.close()
        self.committer.close()
        self.hints.close()

    def finals(self, epoch: int, ranks: Sequence[int]) -> dict[int, int]:
        """Rank -> step of its last snapshot of this attempt, where it is ready."""
        table = self._has.table if self._has is not None else None
        return {
            rank: seen.step
            for rank in ranks
            for seen in (table.look(rank) if table is not None else ())
            if seen.ready and seen.final and seen.epoch == epoch
        }

    def held(self) -> list[tuple[int, int]]:
        """(step, epoch) of what every rank of the node holds ready, newest first."""
        return sorted(self._has.table.held_by_all(), reverse=True) if self._has is not None else []

    def slots_by_state(self) -> dict[str, int]:
        """How many slots of the node's ranks are empty, being filled, or hold a snapshot."""
        table = self._has.table if self._has is not None else None
        counts = dict.fromkeys(_SLOT_STATES.values(), 0)
        for rank in table.layouts if table is not None else ():
            for seen in table.look(rank) if table is not None else ():
                counts[_SLOT_STATES.get(seen.state, "filling")] += 1
        return counts

    def peer(self, number: int | None) -> Peer | None:
        """The connection of this number, while it lasts."""
        return next((peer for peer in self.link.peers if peer.number == number), None)

    # --- the engine --------------------------------------------------------------------------------------

    def _send(self, e: do.Send) -> None:
        peer = self.peer(e.peer)
        if peer is not None:
            self.link.send(peer, e.name, rank=e.rank, epoch=e.epoch, a=e.a, b=e.b, payload=e.payload)

    def _start(self, e: do.Start) -> None:
        peer, gang, has = self.peer(e.peer), e.gang, self._has
        assert has is not None
        if peer is not None:
            paths = attempt_path(self.options.work, gang.epoch), has.plan_path
            payload = b"".join(os.fsencode(path) + b"\0" for path in paths)
            self.link.send(peer, "START", epoch=gang.epoch, a=gang.first, b=gang.count, payload=payload)
        if has.table.total_bytes > PREFAULT_FIRST_BYTES:
            self._thread("prefault", self._prefault, gang, has.table)

    def _give_slots(self, e: do.GiveSlots) -> None:
        peer = self.peer(e.peer)
        if peer is not None and self._has is not None:
            fds = tuple(slot.fd for slot in self._has.table.slots[e.rank])
            self.link.send(peer, "SLOTS", rank=e.rank, epoch=e.epoch, a=len(fds), b=e.restore, fds=fds)

    def _take_slots(self, e: do.TakeSlots) -> ev.Event:
        assert self._has is not None
        fds, self.handed = self.handed, ()
        try:
            self._has.table.adopt(e.rank, fds)
        except (SlotChanged, OSError) as error:
            return ev.SlotsLost(e.epoch, e.rank, str(error))
        return ev.SlotsTaken(e.epoch, e.rank, self.finals(e.epoch, [e.rank]).get(e.rank))

    def _drop(self, e: do.Drop) -> None:
        peer = self.peer(e.peer)
        if peer is not None:
            peer.rank = None
            self.link.drop(peer)

    # --- an attempt --------------------------------------------------------------------------------------

    def _begin(self, e: do.Begin) -> None:
        self.stop()
        self._cancelled, self._superseded = threading.Event(), threading.Event()
        self.uploader.cancel()
        self.committer.cancel()
        self._background.beside(e.gang)
        self.hints.begin(e.gang.epoch)

    def _cancel(self, _: object = None) -> None:
        self._cancelled.set()
        self._remet.set()
        if self.preparer.ahead is not None:
            self.preparer.ahead.stop()

    def _recall(self, e: do.Recall) -> ev.Event:
        gang, work = e.gang, self.options.work
        if not attempt_path(work, gang.epoch).exists():
            return ev.Recalled(gang.epoch, False)
        self._recalled = gang.epoch
        over, ranks = recall(work, gang.epoch)
        try:
            layout, path = found_plan(work, gang.attempt.plan)
        except CannotStart as error:
            return ev.Recalled(gang.epoch, True, over, ranks, (error.code, str(error)))
        self.preparer.layouts[gang.attempt.plan] = layout, path
        table = SlotTable(layouts(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
        ahead = None if over else self.preparer.bring_ahead(gang, layout, None)
        self._has = Provisions(layout, path, table, ahead=ahead)
        if ahead is not None:
            ahead.start()
        return ev.Recalled(gang.epoch, True, over, ranks, devices=found_devices(work, gang.epoch, gang.local))

    def _claim(self, e: do.Claim) -> None:
        self._thread("claim", self._claim_thread, e.gang, self._superseded)

    def _claim_thread(self, gang: Gang, superseded: threading.Event) -> ev.Event | None:
        holder = claim(self.store, self.options, gang, superseded)
        return None if holder is None else ev.Claimed(gang.epoch, holder)

    def _prepare(self, e: do.Prepare) -> None:
        unused, self._found = self._found, {}  # another one is prepared: nobody waits for these any more
        for provisions in unused.values():
            self._retire(provisions.table)
        table = self._has.table if self._has is not None else None
        self._thread("prepare", self._prepare_thread, e.gang, e.state, table, self._cancelled)

    def _prepare_thread(
        self, gang: Gang, state: RunState, table: SlotTable | None, cancelled: threading.Event
    ) -> ev.Event:
        try:
            found = self.preparer.prepare(gang, state, table, cancelled)
        except (CannotStart, CheckpointError, OSError) as error:
            return ev.Failed(gang.epoch, Work.PREPARE, *exit_of(error, self.options.work))
        self._post(lambda: self._keep(gang, found))
        return ev.Provided(gang.epoch, found.restore, found.start_step, found.from_slot)

    def _keep(self, gang: Gang, found: Provisions) -> None:
        self._found[gang.epoch] = found

    def _use(self, e: do.Use) -> None:
        before, self._has = self._has, self._found.pop(e.gang.epoch)
        if before is not None:
            self._retire(before.table)

    def _retire(self, table: SlotTable) -> None:
        """The slots go, where nobody uses them any more."""
        if all(provisions.table is not table for provisions in (self._has, *self._found.values()) if provisions):
            self._retired.append(table)

    def _meet(self, e: do.Meet) -> None:
        self._remet.set()  # of a supervisor that was lost: its ports must not be put together as this node's
        self._remet = threading.Event()
        self._thread("peers", self._meet_thread, e.gang, e.address, self._remet)

    def _meet_thread(self, gang: Gang, address: ev.Address, cancelled: threading.Event) -> ev.Event | None:
        options = self.options
        try:
            alone = options.nodes == 1
            nodes = {0: address} if alone else meet(self.store, options, gang, address, cancelled)
            if address.devices.kind != "cpu":
                bring(self.store, options.run, options.work, cancelled)
        except (CannotStart, CheckpointError, OSError) as error:
            return ev.Failed(gang.epoch, Work.MEET, *exit_of(error, options.work))
        return None if nodes is None or cancelled.is_set() else ev.Met(gang.epoch, nodes)

    def _mark(self, e: do.Mark) -> ev.Event:
        assert self._has is not None
        work, epoch = self.options.work, e.gang.epoch
        path = attempt_path(work, epoch)
        for old in work.glob("attempt-*"):
            old.unlink(missing_ok=True)
        try:
            write_file(path, attempt_bytes(self.options, e.gang, self._has, e.nodes))
        except OSError as error:
            words = f"the attempt file {path} cannot be written: {room_words(error, work)}"
            return ev.Failed(epoch, Work.MARK, 78, words)
        return ev.Marked(epoch)

    def _ask_kernel(self, e: do.AskKernel) -> ev.Event | None:
        try:
            found = first_xid(xids(kernel_lines()), e.since_s - _CLOCKS_S, e.buses)
        except OSError as error:  # as in most containers
            log.info("the kernel's log cannot be read: %s", error)
            return None
        return None if found is None else ev.KernelSaid(e.epoch, e.rank, found.number, found.line)

    def _remember(self, e: do.Remember) -> None:
        remember(self.options.work, e.epoch, e.over, e.ranks)

    def _prefault(self, gang: Gang, table: SlotTable) -> ev.Event | None:
        behind()
        try:
            table.prefault()
        except OSError as error:
            return ev.NoMemory(
                gang.epoch,
                f"the memory of this node does not hold {table.total_bytes} bytes of snapshot slots: {error}; "
                "lower checkpoint.slots",
            )
        return None

    def _thread(self, name: str, work: Callable[..., ev.Event | None], *args: object) -> None:
        """Run what may block; the event that it returns is heard."""

        def call() -> None:
            event = work(*args)
            if event is not None:
                self._post(lambda: self._feed(event))

        threading.Thread(target=call, name=name, daemon=True).start()

    # --- the store ---------------------------------------------------------------------------------------

    def _upload(self, e: do.Upload) -> None:
        assert self._has is not None
        layout, table = self._has.layout, self._has.table
        self.store.limit(e.bytes_per_s or None)
        resumed = e.epoch == self._recalled
        self.uploader.begin(Source(e.epoch, layout, table, e.deadline_s, e.point, e.stored, e.amended, resumed))
        self.committer.begin(e.epoch, layout.ranks, e.deadline_s)

    def _look(self, _: do.LookForSnapshots) -> None:
        self.uploader.wake()

    def _commit(self, e: do.Commit) -> None:
        self.committer.add(e.step, e.state, self.uploader.deadline(e.epoch, e.step))

    def _agree(self, e: do.Agree) -> None:
        self._thread("algorithms", self._agree_thread, e, self._superseded)

    def _agree_thread(self, e: do.Agree, cancelled: threading.Event) -> ev.Event | None:
        heard = answer(self.store, self.options.run, e.table, cancelled)
        return None if heard is None else ev.Agreed(e.peer, e.epoch, e.rank, *heard)

    def _has_read(self, e: do.HasRead) -> None:
        if self._has is not None and self._has.ahead is not None:
            self._has.ahead.read(e.rank, e.step, e.told)

    def _data_there(self, epoch: int, there: There) -> None:
        """In a thread of the data's."""
        self._post(lambda: self._feed(ev.DataThere(epoch, there.step, there.code, there.words)))

    def _drained(self, _: object = None) -> ev.Drained:
        return ev.Drained(self.uploader.idle and self.committer.idle)

    def _publish(self, e: do.Publish) -> None:
        if e.kind == "METRICS":
            self.hints.metrics(e.payload)
            self._gauge.line(e.payload)
        elif e.kind == "OUTPUT":
            self.hints.output(e.rank, e.payload)
        else:
            # the engine must not have the agent publish what only the agent may read: a file of this folder, no other
            name = os.path.basename(os.fsdecode(e.payload.rstrip(b"\0")))
            self.hints.trace(e.rank, self.options.work / name)

    def _mark_done(self, e: do.MarkDone) -> None:
        try:
            write_file(self.options.work / "done", e.why.encode(), 0o644)
        except OSError as error:
            log.warning("the mark that this node is done cannot be written: %s", error)


_EFFECTS: dict[type, Callable[[Actions, Any], ev.Event | None]] = {
    do.Send: Actions._send,
    do.Start: Actions._start,
    do.GiveSlots: Actions._give_slots,
    do.TakeSlots: Actions._take_slots,
    do.Drop: Actions._drop,
    do.Begin: Actions._begin,
    do.Recall: Actions._recall,
    do.Claim: Actions._claim,
    do.Prepare: Actions._prepare,
    do.Use: Actions._use,
    do.Meet: Actions._meet,
    do.Mark: Actions._mark,
    do.AskKernel: Actions._ask_kernel,
    do.Remember: Actions._remember,
    do.Cancel: Actions._cancel,
    do.Upload: Actions._upload,
    do.LookForSnapshots: Actions._look,
    do.Commit: Actions._commit,
    do.Agree: Actions._agree,
    do.HasRead: Actions._has_read,
    do.AskDrained: Actions._drained,
    do.Publish: Actions._publish,
    do.MarkDone: Actions._mark_done,
}
