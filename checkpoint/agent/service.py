"""The agent's loop: the log orders, the socket reports, and this module turns both into the next message.

One thread owns all state here. Whatever may block runs elsewhere and posts its result: the log's watcher, the
preparation of an attempt, the exchange of addresses, the uploader, the hints. Order of an attempt, as in
``wire/agent.h``:

    watcher    a new attempt record of this launch            -> KILL what runs, wait for IDLE
    preparer   plan, data, slots, restore point               -> PREPARE
    engine     PORTS                                          -> addresses of all nodes, attempt file, START
    ranks      HELLO -> SLOTS; METRICS, OUTPUT, READY ...     -> hints; uploads; COMMITTED
    engine     EXIT of each rank, IDLE                        -> status; the driver decides what comes next

Invariants
  A1  ranks of at most one attempt run: START goes out after the supervisor's IDLE for the one before, or to a new one;
  A2  an attempt is started at most once on a node: its attempt file is the mark; an agent that finds it adopts it;
  A3  slots are written by the agent only while no rank of the node runs;
  A4  nothing of an epoch older than the newest attempt record is committed (also enforced by the log itself);
  A5  no failure of the store ends a rank;
  A6  an attempt's node is the place that claims it first: a second one, a pod of the same index or an agent of another
      folder, stands by, silent, for that attempt.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import struct
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from checkpoint import keys
from checkpoint.agent.adopt import attempt_path, found_plan, recall, remember
from checkpoint.agent.attempt_file import attempt_bytes
from checkpoint.agent.commit import Committer
from checkpoint.agent.fetch import room_words
from checkpoint.agent.gang import CannotStart, Gang, Options, Prepared, positions
from checkpoint.agent.link import Event, Link, Message, Peer
from checkpoint.agent.meet import Address, claim, meet
from checkpoint.agent.output import BEAT_S, Hints
from checkpoint.agent.prepare import PREFAULT_FIRST_BYTES, Preparer
from checkpoint.agent.slots import SlotChanged, SlotTable
from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.agent.upload import Source, Uploader
from checkpoint.agent.watch import Watcher
from checkpoint.claims import Place
from checkpoint.errors import CheckpointError
from checkpoint.layout import PlanRefused
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.store import Store
from trainer import wire
from trainer.wire.files import write_file

log = logging.getLogger(__name__)

EXIT_ENDED, EXIT_FENCED, EXIT_REFUSED = 0, 75, 78
_KILL_S = 10.0  # for a supervisor to reap ranks that were sent SIGKILL
_LOST_S = 2.0  # for a supervisor that went away to connect again (it tries each 50 ms)
_ADOPT_S = 5.0  # for a supervisor to find a restarted agent
_EARLY = 10_000  # messages kept until the log was read for the first time
_LAST_RANKS_S = 2.0  # for ranks to leave after their last commit
_END_S = 30.0  # for uploads when the run has ended


class Service:
    """One agent. ``run`` returns the process's exit code."""

    def __init__(self, options: Options, store: Store, link: Link, incarnation: str) -> None:
        self.options, self.store, self.link = options, store, link
        self.log = RunLog(store, options.run, writer=f"agent-{options.node}-{incarnation}")
        self.incarnation = incarnation
        self.exit: int | None = None
        self.state: RunState | None = None
        self.gang: Gang | None = None
        self.supervisor: Peer | None = None
        self.engine_epoch = 0  # of the attempt whose ranks the supervisor has, as far as it said
        self.table: SlotTable | None = None
        self._retired: list[SlotTable] = []
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._store_error: str | None = None
        self._log_error: str | None = None
        self._slot_error: str | None = None
        self._first_ended: int | None = None
        self._ending = False
        self._early: list[Event] = []
        self._terms = 0
        self._stopping = False
        self._changed = True
        self._last_beat = 0.0
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="chunks", initializer=_behind_training)
        self.preparer = Preparer(store, options, self._pool)
        self.status = NodeStatus(options.node, options.launch, incarnation)
        self.hints = Hints(store, options.run, keys.status_key(options.run, options.launch, options.node))
        self.watcher = Watcher(
            self.log,
            options.log_poll_s,
            post=self.post,
            on_state=self._on_state,
            on_error=self._on_log_error,
            on_refused=self._on_refused,
        )
        self.committer = Committer(
            self.log,
            options.node,
            options.nodes,
            post=self.post,
            on_commit=self._on_commit,
            on_idle=self._maybe_leave,
            on_error=self._on_store,
            poll_s=options.log_poll_s,
        )
        self.uploader = Uploader(
            store,
            options.run,
            options.node,
            options.nodes,
            incarnation,
            pool=self._pool,
            post=self.post,
            on_part=self._on_part,
            on_idle=self._on_upload_idle,
            on_error=self._on_store,
        )

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self.watcher.start()
        try:
            while self.exit is None:
                for event in self.link.poll(self._wait_s()):
                    self._on_event(event)
                while not self._posted.empty():
                    self._posted.get()()
                self._tick()
        finally:
            self.watcher.close()
            self.status.left = (self.options.work / "done").exists()
            self._beat()
            self.uploader.close()
            self.committer.close()
            self.hints.close()
            self.link.flush(1.0)
        return self.exit

    def _on_event(self, event: Event) -> None:
        """What comes before the log was read for the first time waits: only the log says whose it is."""
        if self.state is None:
            self._early.append(event)
            if len(self._early) > _EARLY:
                log.error("the log cannot be read, and %d messages wait: a peer is sent away to come again", _EARLY)
                self.link.drop(event.peer)
        elif event.message is None:
            self._on_gone(event.peer)
        else:
            self._on_message(event.peer, event.message)

    def post(self, call: Callable[[], None]) -> None:
        """From any thread: have the loop call this."""
        self._posted.put(call)
        self.link.wake()

    def _wait_s(self) -> float:
        now = time.monotonic()
        due = [at for at, _ in self._timers.values()] + [self._last_beat + BEAT_S]
        return 0.0 if self._changed else max(0.0, min(due) - now)

    def _tick(self) -> None:
        now = time.monotonic()
        for name, (at, call) in list(self._timers.items()):
            if at <= now:
                del self._timers[name]
                call()
        if self._terms:
            self._on_terminate()
        if self._changed or now - self._last_beat >= BEAT_S:
            self._changed = False
            self._beat()
        self._retired = [table for table in self._retired if not table.close()]

    def _after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        self._timers[name] = (time.monotonic() + seconds, call)

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        self._tell_committed()  # again: a rank that missed the word must not wait for its deadline
        status, gang = self.status, self.gang
        if self.supervisor is None:
            status.supervisor = None
        status.error = self._log_error or self._store_error or self._slot_error or self.hints.error
        if gang is not None:
            status.epoch, status.ranks = gang.epoch, gang.ranks
            if status.phase != "ended":
                status.phase = {
                    "kill": "restoring",
                    "prepare": "restoring",
                    "ports": "starting",
                    "peers": "starting",
                    "run": "running"
                    if len(gang.peers) == gang.count or any(r.step for r in gang.ranks.values())
                    else "starting",
                    "adopt": "running",
                    "idle": "idle",
                }[gang.phase]
        table = self.table
        status.slots = sorted(table.held_by_all(), reverse=True) if table is not None else ()
        if self.state is not None:
            candidates = self.state.restore_candidates()
            status.durable = candidates[0].step if candidates else -1
        if self._speaks():
            self.hints.status(status.pack())

    def _speaks(self) -> bool:
        """Whether this agent is known to be the node's (A6); one that cannot read the log has to say so."""
        if self.gang is None:
            return self.state is not None or self._log_error is not None
        return self.gang.held

    # --- the log ------------------------------------------------------------------------------------------

    def _on_refused(self) -> None:
        self.exit = EXIT_REFUSED

    def _on_log_error(self, text: str | None) -> None:
        self._log_error, self._changed = text, True

    def _on_state(self, state: RunState) -> None:
        """A newer state of the run, from the watcher or from a commit of our own."""
        if self.state is not None and state.n < self.state.n:
            return
        self._take_state(state)
        early, self._early = self._early, []
        for event in early:
            self._on_event(event)

    def _take_state(self, state: RunState) -> None:
        self.state, self._changed = state, True
        self._log_error = state.unreadable
        self.committer.state(state)
        if self._first_ended is None:
            self._first_ended = state.ended.n if state.ended else 0
        newest = state.newest_attempt
        mine = [a for a in state.attempts if a.launch == self.options.launch]
        if state.unreadable is not None:
            return  # halted: nothing is started, uploaded or committed until a person has mended the log
        if newest is not None and mine and newest.launch != self.options.launch:
            self._fenced(newest)
            return
        if state.ended is not None and (mine or state.ended.n > self._first_ended):
            self._on_ended(state.ended.outcome)
            return
        self._tell_committed()
        if mine and newest is not None and (self.gang is None or newest.n > self.gang.epoch):
            self._begin(newest)

    def _fenced(self, newest: AttemptInfo) -> None:
        log.warning("attempt %d of launch %s holds the run now: this launch ends", newest.n, newest.launch)
        self._leave("fenced", EXIT_FENCED)

    def _on_ended(self, outcome: str) -> None:
        if self._ending:
            return
        self._ending = True
        self._tell_committed()
        if outcome == "succeeded" and self.gang is not None and self.gang.phase == "run":
            # the ranks have just been told that their last state is safe: they leave by themselves
            self._after("end-ranks", _LAST_RANKS_S, self._end)
        else:
            self._end()

    def _end(self) -> None:
        if self.status.phase == "ended":
            return
        self._timers.pop("end-ranks", None)
        self.status.phase = "ended"
        if self.supervisor is not None:
            self.link.send(self.supervisor, "END")
        if self.uploader.idle and self.committer.idle:
            self._leave("ended", EXIT_ENDED)
        else:
            self._after("end", _END_S, lambda: self._leave("ended", EXIT_ENDED))

    def _leave(self, why: str, code: int) -> None:
        """For good: the launcher does not start this node again."""
        if self.exit is not None:
            return
        if self.gang is not None:
            self.gang.cancelled.set()
        self.status.phase = "ended"
        if self.supervisor is not None:
            self.link.send(self.supervisor, "END")
        try:
            write_file(self.options.work / "done", why.encode(), 0o644)
        except OSError as error:
            log.warning("the mark that this node is done cannot be written: %s", error)
        self.exit = code

    # --- an attempt, step by step -------------------------------------------------------------------------

    def _begin(self, attempt: AttemptInfo) -> None:
        before = self.gang
        if before is not None:
            before.cancelled.set()
        self.uploader.cancel()
        self.committer.cancel()
        per_node = attempt.ranks // attempt.nodes
        gang = Gang(attempt, self.options.node * per_node, per_node)
        gang.ranks = {rank: RankStatus(step=attempt.step) for rank in gang.local}
        self.gang = gang
        self.hints.begin(gang.epoch)
        self._slot_error = None
        for timer in ("kill", "lost", "adopt", "peers"):
            self._timers.pop(timer, None)
        log.info("attempt %d begins: %s", gang.epoch, attempt.reason, extra={"epoch": gang.epoch})
        if before is None and attempt_path(self.options.work, gang.epoch).exists():
            gang.held = True
            self._adopt(gang)
            return
        threading.Thread(target=self._claim_thread, args=(gang,), name="claim", daemon=True).start()
        if self.engine_epoch and self.supervisor is not None:
            self._kill(gang)
        else:
            self._prepare(gang)

    def _claim_thread(self, gang: Gang) -> None:
        """Beside the preparation: it is not waited for where the node is ours."""
        holder = claim(self.store, self.options, gang)
        if holder is not None:
            self.post(lambda: self._on_claim(gang, holder))

    def _on_claim(self, gang: Gang, holder: Place) -> None:
        if gang is not self.gang:
            return
        gang.held, self._changed = holder.same(self.options.place), True
        if not gang.held:
            log.error(
                "node %d of attempt %d is %s already (%s): this second one (%s) stands by, and starts no rank",
                self.options.node,
                gang.epoch,
                holder.address,
                holder.describe(),
                self.options.place.describe(),
            )
            self._over(gang)
        elif gang.phase == "ports":
            self._ask_ports(gang)

    def _kill(self, gang: Gang) -> None:
        """Ranks of an older attempt run: they go first."""
        assert self.supervisor is not None
        gang.phase = "kill"
        log.info("ranks of attempt %d are killed", self.engine_epoch)
        self.link.send(self.supervisor, "KILL", epoch=self.engine_epoch)
        self._after(
            "kill",
            _KILL_S,
            lambda: self._cannot_start(gang, 75, "the supervisor did not reap the ranks of the attempt before"),
        )

    def _prepare(self, gang: Gang) -> None:
        gang.phase, self._changed = "prepare", True
        self._timers.pop("kill", None)
        if gang.found is not None:
            self._on_prepared(gang, gang.found)
            return
        if gang.preparing:
            return
        gang.preparing = True
        thread = threading.Thread(target=self._prepare_thread, args=(gang, self.state), name="prepare", daemon=True)
        thread.start()

    def _prepare_thread(self, gang: Gang, state: RunState) -> None:
        try:
            found = self.preparer.prepare(gang, state, self.table)
        except CannotStart as error:
            code, words = error.code, str(error)
        except CheckpointError as error:
            # 66 (no such object) is the store's word; a rank that cannot have what it needs is refused
            code, words = {66: 78, 70: 78}.get(error.exit_code, error.exit_code), str(error)
            code = 78 if isinstance(error, PlanRefused) else code
        except OSError as error:
            code, words = 78, f"this node cannot hold the attempt: {room_words(error, self.options.work)}"
        else:
            self.post(lambda: self._on_prepared(gang, found))
            return
        self.post(lambda: self._cannot_start(gang, code, words))

    def _on_prepared(self, gang: Gang, found: Prepared) -> None:
        if gang is not self.gang:
            if found.table is not self.table:
                self._retired.append(found.table)
            return
        gang.found = found
        if gang.phase != "prepare":
            return
        gang.layout, gang.plan_path, gang.data_dir = found.layout, found.plan_path, found.data_dir
        gang.restore, gang.start_step, gang.from_slot = found.restore, found.start_step, found.from_slot
        self._use_table(found.table)
        gang.table = found.table
        gang.phase, self._changed = "ports", True
        self._ask_ports(gang)

    def _use_table(self, table: SlotTable) -> None:
        if self.table is not None and self.table is not table:
            self._retired.append(self.table)
        self.table = table

    def _ask_ports(self, gang: Gang) -> None:
        if self.supervisor is None or not gang.held:
            return  # its HELLO, or the claim, comes here again
        shared = int(gang.how("launch", "port_base"))  # by nodes of one machine: each has ports of its own
        base = self.options.port_base or (shared + gang.first if shared else 0)
        prepare = wire.MsgPrepare(gang.count, base, self.options.bind.encode())
        self.link.send(self.supervisor, "PREPARE", epoch=gang.epoch, payload=bytes(prepare))

    def _on_ports(self, gang: Gang, message: Message) -> None:
        if gang.phase != "ports" or message.epoch != gang.epoch:
            return
        if len(message.payload) != 2 * gang.count:
            self._cannot_start(
                gang, 70, f"the supervisor sent {len(message.payload)} bytes of ports for {gang.count} ranks"
            )
            return
        ports = list(struct.unpack(f"<{gang.count}H", message.payload))
        gang.phase, self._changed = "peers", True
        if self.options.nodes == 1:
            self._start(gang, {0: (self.options.host, ports)})
        else:
            threading.Thread(target=self._meet_thread, args=(gang, ports), name="peers", daemon=True).start()

    def _meet_thread(self, gang: Gang, ports: list[int]) -> None:
        try:
            nodes = meet(self.store, self.options, gang, ports)
        except CannotStart as error:
            code, words = error.code, str(error)
            self.post(lambda: self._cannot_start(gang, code, words))
        else:
            if nodes is not None:
                self.post(lambda: self._start(gang, nodes))

    def _start(self, gang: Gang, nodes: Mapping[int, Address]) -> None:
        if gang is not self.gang or gang.phase != "peers":
            return
        if self.supervisor is None:
            gang.phase = "ports"  # a new supervisor binds new ports
            return
        assert gang.plan_path is not None
        path = attempt_path(self.options.work, gang.epoch)
        for old in self.options.work.glob("attempt-*"):
            old.unlink(missing_ok=True)
        try:
            write_file(path, attempt_bytes(self.options, gang, nodes))
        except OSError as error:
            words = room_words(error, self.options.work)
            self._cannot_start(gang, 78, f"the attempt file {path} cannot be written: {words}")
            return
        gang.phase, self._changed = "run", True
        self.engine_epoch = gang.epoch
        payload = os.fsencode(path) + b"\0" + os.fsencode(gang.plan_path) + b"\0"
        self.link.send(self.supervisor, "START", epoch=gang.epoch, a=gang.first, b=gang.count, payload=payload)
        remember(self.options.work, gang)
        self._offer_uploads(gang)
        if gang.table is not None and gang.table.total_bytes > PREFAULT_FIRST_BYTES:
            threading.Thread(target=self._prefault, args=(gang, gang.table), name="prefault", daemon=True).start()

    def _prefault(self, gang: Gang, table: SlotTable) -> None:
        _behind_training()
        try:
            table.prefault()
        except OSError as error:
            text = (
                f"the memory of this node does not hold {table.total_bytes} bytes of snapshot slots: {error}; "
                "lower checkpoint.slots"
            )
            self.post(lambda: self._no_memory(gang, text))

    def _no_memory(self, gang: Gang, text: str) -> None:
        if gang is self.gang and gang.phase == "run" and self.supervisor is not None:
            for status in gang.ranks.values():
                status.words = text
            self._slot_error = text
            self.link.send(self.supervisor, "KILL", epoch=gang.epoch)

    def _cannot_start(self, gang: Gang, code: int, words: str) -> None:
        """The attempt is over on this node before it began, or its engine is gone: say so as if the ranks had."""
        if gang is not self.gang or gang.phase == "idle":
            return
        log.error("attempt %d cannot run here (%d): %s", gang.epoch, code, words, extra={"epoch": gang.epoch})
        for status in gang.ranks.values():
            if not status.gone:
                status.code = code
                status.words = status.words or words
        self._over(gang)

    def _over(self, gang: Gang) -> None:
        gang.phase, self._changed = "idle", True
        gang.cancelled.set()
        for timer in ("adopt", "lost", "kill"):
            self._timers.pop(timer, None)
        remember(self.options.work, gang)
        if self._ending:
            self._end()
        if self._stopping:
            self._on_terminate()

    # --- an agent that was restarted ----------------------------------------------------------------------

    def _adopt(self, gang: Gang) -> None:
        """This attempt was started before this agent: take it over where its engine still runs."""
        over = recall(self.options.work, gang)
        try:
            layout, path = found_plan(self.options.work, gang)
        except CannotStart as error:
            self._cannot_start(gang, error.code, str(error))
            return
        self.preparer.layouts[gang.attempt.plan] = layout, path
        gang.layout, gang.plan_path = layout, path
        gang.table = SlotTable(positions(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
        self._use_table(gang.table)
        if over:
            self._over(gang)
            return
        gang.phase = "adopt"
        log.info("attempt %d was running before this agent: waiting for its engine", gang.epoch)
        self._after("adopt", _ADOPT_S, lambda: self._lost(gang))
        self._offer_uploads(gang)

    def _adopt_engine(self, gang: Gang, known: int) -> None:
        if known == gang.epoch:
            gang.phase, self._changed = "run", True
            log.info("attempt %d goes on under this agent", gang.epoch)
            if not self.engine_epoch:  # its ranks are gone, and it says so now; or they were never started
                self._after("adopt", _LOST_S, lambda: self._lost(gang))
            else:
                self._timers.pop("adopt", None)
        else:
            self._lost(gang)

    def _lost(self, gang: Gang) -> None:
        self.engine_epoch = 0  # ranks die with their supervisor
        self._cannot_start(
            gang, 75, f"the supervisor of node {self.options.node} was lost, and the ranks of the attempt with it"
        )

    # --- messages -----------------------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: Message) -> None:
        if message.name == "HELLO":
            if message.rank < 0:
                self._on_supervisor(peer, message)
            else:
                self._on_rank(peer, message)
            return
        for fd in message.fds:
            os.close(fd)
        if peer.rank is None:
            log.error("a peer sent %s before HELLO and is turned away", message.name)
            self.link.drop(peer)
            return
        gang = self.gang
        if gang is None or (message.epoch != gang.epoch and message.name not in ("IDLE", "OUTPUT", "EXIT")):
            return
        handler = _HANDLERS.get(message.name)
        if handler is not None:
            handler(self, gang, message)

    def _on_supervisor(self, peer: Peer, message: Message) -> None:
        for fd in message.fds:
            os.close(fd)
        before = self.supervisor
        if before is not None and before is not peer:
            if before in self.link.peers and before.pid and before.pid != peer.pid and _alive(before.pid):
                log.error("a second supervisor (pid %d) is turned away; %d has the node", peer.pid, before.pid)
                self.link.send(peer, "END")
                self.link.drop(peer)
                return
            self.link.drop(before)
        peer.rank = -1
        self.supervisor, self._changed = peer, True
        self._timers.pop("lost", None)
        self.status.supervisor = int(message.a)
        self.engine_epoch = message.epoch if message.b > 0 else 0
        log.info("the supervisor is here, pid %d: %d ranks of attempt %d", peer.pid, message.b, message.epoch)
        gang = self.gang
        if self.status.phase == "ended":
            self.link.send(peer, "END")
        elif self._stopping:
            self.link.send(peer, "STOP")
        elif gang is None:
            return
        elif gang.phase == "adopt":
            self._adopt_engine(gang, message.epoch)
        elif gang.phase == "run":
            if message.epoch != gang.epoch:
                self._lost(gang)
        elif self.engine_epoch and gang.phase != "idle":
            self._kill(gang)
        elif gang.phase == "kill":
            self._prepare(gang)
        elif gang.phase in ("ports", "peers"):
            gang.phase = "ports"
            self._ask_ports(gang)

    def _on_gone(self, peer: Peer) -> None:
        self._changed = True
        gang = self.gang
        if peer is self.supervisor:
            self.supervisor = None
            log.warning("the supervisor's connection ended")
            if gang is not None and gang.phase == "kill":
                self.engine_epoch = 0
                self._after(
                    "lost", _LOST_S, lambda: self._prepare(gang) if gang is self.gang and gang.phase == "kill" else None
                )
            elif gang is not None and gang.phase == "run":
                self._after("lost", _LOST_S, lambda: self._lost(gang) if self.supervisor is None else None)
        elif gang is not None and peer.rank is not None and gang.peers.get(peer.rank) is peer:
            del gang.peers[peer.rank]

    def _on_rank(self, peer: Peer, message: Message) -> None:
        gang, rank = self.gang, message.rank
        fits = (
            gang is not None and message.epoch == gang.epoch and rank in gang.local and gang.phase in ("run", "adopt")
        )
        if gang is None or not fits or gang.table is None:
            log.warning("rank %d of attempt %d is turned away", rank, message.epoch)
            for fd in message.fds:
                os.close(fd)
            self.link.drop(peer)
            return
        peer.rank = rank
        gang.peers[rank] = peer
        gang.ranks[rank].pid = message.a
        self._changed = True
        table = gang.table
        if message.fds and rank in table.slots:
            for fd in message.fds:
                os.close(fd)
        elif message.fds:
            try:
                table.adopt(rank, message.fds)
            except (SlotChanged, OSError) as error:
                log.error("the slots of rank %d cannot be taken over: %s", rank, error)
                self._slot_error = str(error)
                return
            log.info("the slots of rank %d are taken over", rank)
            final = [seen for seen in table.look(rank) if seen.ready and seen.final and seen.epoch == gang.epoch]
            if final:
                gang.ranks[rank].final, gang.ranks[rank].step = True, final[0].step
            self.uploader.wake()
        elif rank in table.slots:
            slots = tuple(slot.fd for slot in table.slots[rank])
            self.link.send(
                peer, "SLOTS", rank=rank, epoch=gang.epoch, a=len(slots), b=gang.restore.get(rank, -1), fds=slots
            )
        elif self.supervisor is not None:
            # started, but without slots yet when the agent before this one died: its descriptors are gone
            log.error("rank %d has no slots and its agent died with them: the attempt ends", rank)
            gang.ranks[rank].words = "the agent died between START and SLOTS"
            self.link.send(self.supervisor, "KILL", epoch=gang.epoch)
        self._tell_committed()

    def _on_metrics(self, gang: Gang, message: Message) -> None:
        self.hints.metrics(message.payload)
        try:
            step = json.loads(message.payload).get("step")
        except (ValueError, AttributeError):
            return
        if isinstance(step, int) and message.rank in gang.ranks:
            gang.ranks[message.rank].step = step

    def _on_ready(self, gang: Gang, message: Message) -> None:
        status = gang.ranks.get(message.rank)
        if status is not None:
            status.step = max(status.step, message.b)
            status.final = status.final or bool(message.c)
        self._changed = True
        self.uploader.wake()
        self._tell_committed()

    def _on_words(self, gang: Gang, message: Message) -> None:
        if message.rank in gang.ranks:
            gang.ranks[message.rank].words = message.payload.decode(errors="replace")
            self._changed = True

    def _on_trace(self, gang: Gang, message: Message) -> None:
        # the engine must not have the agent publish what only the agent may read: a file of the node's folder, no other
        name = os.path.basename(os.fsdecode(message.payload.rstrip(b"\0")))
        self.hints.trace(message.rank, self.options.work / name)

    def _on_output(self, gang: Gang, message: Message) -> None:
        if message.epoch in (0, gang.epoch) and message.rank >= 0:
            self.hints.output(message.rank, message.payload)

    def _on_exit(self, gang: Gang, message: Message) -> None:
        if message.epoch not in (0, gang.epoch):
            return
        if message.rank < 0:
            text = message.payload.rstrip(b"\0").decode(errors="replace")
            self._cannot_start(gang, int(message.a), text or "the supervisor cannot prepare the attempt")
            return
        status = gang.ranks.get(message.rank)
        if status is None:
            return
        status.pid = message.b or status.pid
        status.killed = message.c == wire.ENDED_BY_SUPERVISOR
        if message.c == wire.ENDED_BY_OOM:
            status.memory = int.from_bytes(message.payload[:8], "little")
        if message.a >= 0:
            status.code = int(message.a)
        else:
            status.signal = -int(message.a)
        log.info("rank %d of attempt %d is gone: %d", message.rank, gang.epoch, message.a)
        self._changed = True
        remember(self.options.work, gang)

    def _on_idle(self, gang: Gang, message: Message) -> None:
        self.engine_epoch = 0
        if gang.phase == "kill":
            self._prepare(gang)
        elif gang.phase in ("run", "adopt") and message.epoch in (0, gang.epoch):
            for status in gang.ranks.values():
                if not status.gone:
                    status.code, status.words = 75, status.words or "the supervisor says that it is gone, not how"
            self._over(gang)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _offer_uploads(self, gang: Gang) -> None:
        """From here on the uploader takes the newest ready snapshot of this attempt by itself."""
        assert gang.layout is not None
        assert gang.table is not None
        deadline_s = float(gang.how("checkpoint", "deadline_s"))
        state, point = self.state, gang.from_slot
        if point is not None and state is not None:
            durable = state.restore_candidates()
            if durable and durable[0].step >= point[0]:
                point = None
        # slots that were filled from a checkpoint need not go up again (after an adoption this is not known: one goes)
        stored = gang.start_step if gang.start_step >= 0 and gang.from_slot is None else None
        self.uploader.begin(Source(gang.epoch, gang.layout, gang.table, deadline_s, point, stored))
        self.committer.begin(gang.epoch, gang.layout, deadline_s)

    def _on_part(self, step: int, epoch: int) -> None:
        """This node's part of a checkpoint is in the store."""
        if self.gang is not None and epoch == self.gang.epoch and self.state is not None and not self.state.unreadable:
            self.committer.add(step, self.state)
        self._changed = True

    def _on_upload_idle(self) -> None:
        self._changed = True
        self._maybe_leave()

    def _on_commit(self, state: RunState, step: int) -> None:
        log.info("checkpoint of step %d is durable", step)
        self._on_state(state)

    def _on_store(self, text: str | None) -> None:
        self._store_error, self._changed = text, True

    def _maybe_leave(self) -> None:
        if self.status.phase == "ended" and self.uploader.idle and self.committer.idle:
            self._leave("ended", EXIT_ENDED)
        elif self._stopping:
            self._on_terminate()

    def _tell_committed(self) -> None:
        """COMMITTED to every rank whose final snapshot is in the log."""
        gang, state = self.gang, self.state
        if gang is None or state is None or gang.table is None:
            return
        for rank, peer in gang.peers.items():
            for seen in gang.table.look(rank):
                if seen.ready and seen.final and seen.epoch == gang.epoch and state.find(seen.step, gang.epoch):
                    self.link.send(peer, "COMMITTED", rank=rank, epoch=gang.epoch, a=seen.step)

    # --- leaving on request -------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: object) -> None:
        self._terms += 1
        self.link.wake()

    def _on_terminate(self) -> None:
        """SIGTERM: have the ranks saved and gone, upload what they saved, leave; a second one leaves now."""
        gang = self.gang
        if self._terms >= 2:
            self.exit = EXIT_FENCED
            return
        self._terms = 0
        runs = gang is not None and gang.phase in ("run", "adopt", "peers", "ports", "prepare", "kill")
        if not self._stopping:
            self._stopping = True
            log.info("asked to leave")
            commit_s = float(gang.how("checkpoint", "commit_s")) if gang is not None else 0.0
            self._after("terminate", commit_s + _KILL_S, lambda: setattr(self, "exit", EXIT_ENDED))
            if self.supervisor is not None:
                self.link.send(self.supervisor, "STOP")
        if not (runs and self.supervisor is not None) and self.uploader.idle and self.committer.idle:
            self.exit = EXIT_ENDED


_HANDLERS: dict[str, Callable[[Service, Gang, Message], None]] = {
    "PORTS": Service._on_ports,
    "METRICS": Service._on_metrics,
    "READY": Service._on_ready,
    "WORDS": Service._on_words,
    "TRACE": Service._on_trace,
    "OUTPUT": Service._on_output,
    "EXIT": Service._on_exit,
    "IDLE": Service._on_idle,
}


def _behind_training() -> None:
    """This thread hashes and copies beside the ranks: it takes the processor time that they leave."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
