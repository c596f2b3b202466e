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
  A5  no failure of the store ends a rank.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from checkpoint import keys
from checkpoint.agent.commit import Committer
from checkpoint.agent.fetch import fetch_data, fetch_plan, write_file
from checkpoint.agent.link import Event, Link, Message, Peer
from checkpoint.agent.output import BEAT_S, Hints
from checkpoint.agent.slots import SlotChanged, SlotTable, crc32c
from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.agent.upload import Source, Uploader
from checkpoint.errors import CheckpointError, Damaged, NotFound, StoreError, StoreRefused
from checkpoint.layout import PlanLayout, PlanRefused, PositionLayout, read_plan
from checkpoint.log import AttemptInfo, CheckpointInfo, RunLog, RunState
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from trainer import wire

log = logging.getLogger(__name__)

EXIT_ENDED, EXIT_FENCED, EXIT_REFUSED = 0, 75, 78
_KILL_S = 10.0  # for a supervisor to reap ranks that were sent SIGKILL
_LOST_S = 2.0  # for a supervisor that went away to connect again (it tries each 50 ms)
_ADOPT_S = 5.0  # for a supervisor to find a restarted agent
_EARLY = 10_000  # messages kept until the log was read for the first time
_LAST_RANKS_S = 2.0  # for ranks to leave after their last commit
_END_S = 30.0  # for uploads when the run has ended
_PREFAULT_FIRST_BYTES = 64 << 20  # below this, pages are made before START, else while the ranks start


@dataclass(frozen=True)
class Options:
    """The command line (``__main__.py``)."""

    run: str
    launch: str
    node: int
    nodes: int
    socket: Path
    work: Path
    key: bytes
    host: str
    bind: str
    log_poll_s: float


@dataclass
class Gang:
    """One attempt, as this node runs it.

    ``phase``: kill (older ranks must go), prepare, ports, peers, run, adopt, idle (over, or never begun here).
    """

    attempt: AttemptInfo
    first: int
    count: int
    phase: str = "prepare"
    layout: PlanLayout | None = None
    plan_path: Path | None = None
    data_dir: Path | None = None
    table: SlotTable | None = None
    restore: dict[int, int] = field(default_factory=dict)
    """Rank -> index of the slot to restore from; empty on a fresh start."""
    start_step: int = -1
    preparing: bool = False
    found: Prepared | None = None
    """What the preparer found while ranks of an older attempt still had to go."""
    from_slot: tuple[int, int] | None = None
    """(step, epoch) of slots that this attempt started from: uploaded as its own checkpoint where not durable yet."""
    ranks: dict[int, RankStatus] = field(default_factory=dict)
    peers: dict[int, Peer] = field(default_factory=dict)
    committed_sent: set[int] = field(default_factory=set)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def epoch(self) -> int:
        return self.attempt.n

    @property
    def local(self) -> range:
        return range(self.first, self.first + self.count)

    def how(self, section: str, key: str, default: Any) -> Any:
        """A value of the How half in the attempt record."""
        how = self.attempt.body.get("how")
        found = how.get(section) if isinstance(how, Mapping) else None
        value = found.get(key) if isinstance(found, Mapping) else None
        return default if value is None else value


@dataclass(frozen=True)
class Prepared:
    """What the preparer found out."""

    layout: PlanLayout
    plan_path: Path
    data_dir: Path
    table: SlotTable
    restore: dict[int, int]
    start_step: int
    from_slot: tuple[int, int] | None


class CannotStart(Exception):
    """This node cannot start the attempt: exit code for its ranks, and why."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


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
        self._layouts: dict[str, tuple[PlanLayout, Path]] = {}
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
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="chunks", initializer=_behind_training)
        self.status = NodeStatus(options.node, options.launch, incarnation)
        self.hints = Hints(
            store, options.run, keys.run_key(options.run, "live", "nodes", options.launch, str(options.node))
        )
        self.committer = Committer(
            self.log,
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
        watcher = threading.Thread(target=self._watch, name="log", daemon=True)
        watcher.start()
        try:
            while self.exit is None:
                for event in self.link.poll(self._wait_s()):
                    self._on_event(event)
                while not self._posted.empty():
                    self._posted.get()()
                self._tick()
        finally:
            self._closing.set()
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
        self.hints.status(status.pack())

    # --- the log ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """The log's watcher thread: folds what is new and posts it; a store that does not answer is only said."""
        state: RunState | None = None
        told: str | None = None
        while not self._closing.is_set():
            pause = self.options.log_poll_s
            try:
                newer = self.log.fold(state)
            except StoreRefused as error:
                if state is None:  # not one look at the log was allowed: only a person mends that
                    log.error("the store refuses this agent: %s", error)
                    self.post(lambda: setattr(self, "exit", EXIT_REFUSED))
                    return
                log.warning("the log cannot be read now: %s", error)
                self.post(lambda text=str(error): self._on_log_error(text))  # type: ignore[misc]
                told, pause = str(error), max(pause, 2.0)
            except (StoreError, Damaged) as error:
                if told != str(error):
                    told = str(error)
                    log.warning("the log cannot be read now: %s", error)
                    self.post(lambda text=told: self._on_log_error(text))  # type: ignore[misc]
                pause = max(pause, 0.5)
            else:
                if told is not None:
                    told = None
                    self.post(lambda: self._on_log_error(None))
                if state is None or newer.n != state.n or newer.unreadable != state.unreadable:
                    state = newer
                    self.post(lambda found=newer: self._on_state(found))  # type: ignore[misc]
                if newer.unreadable is not None:
                    pause = max(pause, 2.0)
            self._closing.wait(pause)

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
        write_file(self.options.work / "done", why.encode(), 0o644)
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
        if before is None and self._attempt_file(gang.epoch).exists():
            self._adopt(gang)
        elif self.engine_epoch and self.supervisor is not None:
            self._kill(gang)
        else:
            self._prepare(gang)

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
            found = self._prepared(gang, state)
        except CannotStart as error:
            code, words = error.code, str(error)
        except CheckpointError as error:
            # 66 (no such object) is the store's word; a rank that cannot have what it needs is refused
            code, words = {66: 78, 70: 78}.get(error.exit_code, error.exit_code), str(error)
            code = 78 if isinstance(error, PlanRefused) else code
        except OSError as error:
            code, words = 78, f"this node cannot hold the attempt: {error}"
        else:
            self.post(lambda: self._on_prepared(gang, found))
            return
        self.post(lambda: self._cannot_start(gang, code, words))

    def _prepared(self, gang: Gang, state: RunState) -> Prepared:
        """Runs in a thread of its own, while no rank of the node runs."""
        attempt, options = gang.attempt, self.options
        if attempt.nodes != options.nodes:
            raise CannotStart(
                78, f"the attempt is for {attempt.nodes} nodes, this launch has {options.nodes}; launch anew"
            )
        if attempt.plan not in self._layouts:
            self._layouts[attempt.plan] = fetch_plan(self.store, options.run, attempt.plan, options.work)
        layout, plan_path = self._layouts[attempt.plan]
        if attempt.ranks != len(layout.positions) * layout.replicas or attempt.ranks % attempt.nodes:
            raise CannotStart(
                78,
                f"the attempt has {attempt.ranks} ranks on {attempt.nodes} nodes, its plan is for "
                f"{len(layout.positions) * layout.replicas}; the driver must write another attempt",
            )
        data_dir = fetch_data(self.store, layout, options.work / "data")
        table = self.table
        if table is None or table.plan_digest != layout.digest or set(table.layouts) != set(gang.local):
            table = SlotTable(_positions(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
        for rank in gang.local:
            table.create(rank)
        if table.total_bytes <= _PREFAULT_FIRST_BYTES:
            table.prefault()
        restore, start_step, from_slot = self._restore(gang, state, layout, table)
        return Prepared(layout, plan_path, data_dir, table, restore, start_step, from_slot)

    def _restore(
        self, gang: Gang, state: RunState, layout: PlanLayout, table: SlotTable
    ) -> tuple[dict[int, int], int, tuple[int, int] | None]:
        attempt = gang.attempt
        info = state.checkpoint(attempt.checkpoint) if attempt.checkpoint is not None else None
        source = self.options.run
        if attempt.slots is not None:
            point = attempt.slots["step"], attempt.slots["epoch"]
            held = table.held_by_all().get(point)
            if held is not None:
                table.keep_up_to(point)
                return {rank: seen.index for rank, seen in held.items()}, point[0], point
            if info is None or info.step != point[0]:
                raise CannotStart(
                    76,
                    f"this node does not hold step {point[0]} of attempt {point[1]} in its slots; the attempt names "
                    "no checkpoint of that step; restore from an older checkpoint",
                )
        table.clear()
        if info is None:
            if attempt.checkpoint is not None:
                raise CannotStart(76, f"record {attempt.checkpoint} is no valid checkpoint")
            info, source = self._parent(attempt)
            if info is None:
                return {}, -1, None
        slots = {rank: table.slots[rank][0] for rank in gang.local}
        same_what = source == self.options.run
        restore_slots(self.store, source, info, layout, slots, epoch=gang.epoch, pool=self._pool, same_what=same_what)
        return dict.fromkeys(gang.local, 0), info.step, None

    def _parent(self, attempt: AttemptInfo) -> tuple[CheckpointInfo | None, str]:
        """The checkpoint of another run that a forked run begins from, and that run's name; None: from the start."""
        named = attempt.body["restore"].get("parent")
        if not isinstance(named, Mapping):
            return None, self.options.run
        run, number = str(named.get("run")), named.get("checkpoint")
        info = RunLog(self.store, run).fold().checkpoint(number) if isinstance(number, int) else None
        if info is None:
            raise CannotStart(76, f"record {number} of run {run}, which this fork begins from, is no valid checkpoint")
        return info, run

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
        if self.supervisor is None:
            return  # its HELLO comes here again
        base = int(gang.how("launch", "port_base", 0))
        prepare = wire.MsgPrepare(gang.count, base + gang.first if base else 0, self.options.bind.encode())
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
            threading.Thread(target=self._meet, args=(gang, ports), name="peers", daemon=True).start()

    def _meet(self, gang: Gang, ports: list[int]) -> None:
        """Thread: say this node's addresses and wait for everybody's; hints, so the handshake decides who is who."""
        folder = keys.run_key(self.options.run, "live", str(gang.epoch), "addr")
        mine = msgpack.packb({"host": self.options.host, "ports": ports})
        deadline = time.monotonic() + float(gang.how("launch", "connect_s", 60.0))
        said, found = False, {self.options.node: (self.options.host, ports)}
        while not gang.cancelled.wait(self.options.log_poll_s if said else 0):
            try:
                if not said:
                    self.store.put(f"{folder}/{self.options.node}", mine)
                    said = True
                for node in range(self.options.nodes):
                    if node not in found:
                        found[node] = _address(self.store.get(f"{folder}/{node}", max_bytes=1 << 16), gang.count)
            except NotFound:
                pass
            except (StoreError, Damaged) as error:
                log.warning("the nodes' addresses cannot be exchanged now: %s", error)
                gang.cancelled.wait(0.5)
            if len(found) == self.options.nodes:
                self.post(lambda: self._start(gang, found))
                return
            if time.monotonic() > deadline:
                self.post(lambda: self._cannot_start(gang, 75, _missing(found, self.options.nodes)))
                return

    def _start(self, gang: Gang, nodes: Mapping[int, tuple[str, list[int]]]) -> None:
        if gang is not self.gang or gang.phase != "peers":
            return
        if self.supervisor is None:
            gang.phase = "ports"  # a new supervisor binds new ports
            return
        assert gang.plan_path is not None
        path = self._attempt_file(gang.epoch)
        for old in self.options.work.glob("attempt-*"):
            old.unlink(missing_ok=True)
        try:
            write_file(path, self._attempt_bytes(gang, nodes))
        except OSError as error:
            self._cannot_start(gang, 78, f"the attempt file {path} cannot be written: {error}")
            return
        gang.phase, self._changed = "run", True
        self.engine_epoch = gang.epoch
        payload = os.fsencode(path) + b"\0" + os.fsencode(gang.plan_path) + b"\0"
        self.link.send(self.supervisor, "START", epoch=gang.epoch, a=gang.first, b=gang.count, payload=payload)
        self._remember(gang)
        self._offer_uploads(gang)
        if gang.table is not None and gang.table.total_bytes > _PREFAULT_FIRST_BYTES:
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

    def _attempt_bytes(self, gang: Gang, nodes: Mapping[int, tuple[str, list[int]]]) -> bytes:
        assert gang.layout is not None
        assert gang.data_dir is not None
        key = hmac.new(self.options.key, struct.pack("<Q", gang.epoch), hashlib.sha256).digest()
        head = wire.Attempt()
        head.magic[:], head.version = wire.ATTEMPT_MAGIC, wire.ATTEMPT_VERSION
        head.run, head.epoch = self.options.run.encode(), gang.epoch
        head.plan_digest[:], head.key[:] = gang.layout.digest, key
        nonce = hmac.new(key, b"gang", hashlib.sha256).digest()[:16]  # the same on every node, without an exchange
        head.nonce[:] = nonce
        head.ranks = gang.attempt.ranks
        head.kernel_path = wire.PATHS[str(gang.how("launch", "kernel_path", "auto"))]
        head.start_step, head.stop_after = gang.start_step, int(gang.how("launch", "stop_after", -1))
        head.connect_ms = _ms(gang.how("launch", "connect_s", 60.0))
        head.stall_ms = _ms(gang.how("launch", "stall_s", 120.0))
        head.commit_ms = _ms(gang.how("checkpoint", "commit_s", 120.0))
        head.trace = int(bool(gang.how("launch", "trace", False)))
        head.data_dir, head.work_dir = os.fsencode(gang.data_dir), os.fsencode(self.options.work)
        ranks = b"".join(
            bytes(wire.AttemptRank(host.encode(), port, node))
            for node, (host, ports) in sorted(nodes.items())
            for port in ports
        )
        crc_at = wire.Attempt.crc.offset + ctypes.sizeof(wire.u32)
        head.crc = crc32c(bytes(head)[crc_at:], ranks)
        return bytes(head) + ranks

    def _attempt_file(self, epoch: int) -> Path:
        return self.options.work / f"attempt-{epoch}"

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
        self._remember(gang)
        if self._ending:
            self._end()
        if self._stopping:
            self._on_terminate()

    # --- an agent that was restarted ----------------------------------------------------------------------

    def _remember(self, gang: Gang) -> None:
        ranks = {str(rank): status.to_map() for rank, status in gang.ranks.items()}
        text = json.dumps({"epoch": gang.epoch, "over": gang.phase == "idle", "ranks": ranks})
        try:
            write_file(self.options.work / "agent.json", text.encode())
        except OSError as error:
            log.warning("the agent's notes cannot be written: %s", error)

    def _adopt(self, gang: Gang) -> None:
        """This attempt was started before this agent: take it over where its engine still runs."""
        over = False
        try:
            notes = json.loads((self.options.work / "agent.json").read_bytes())
            if notes["epoch"] == gang.epoch:
                gang.ranks.update({int(rank): RankStatus.from_map(value) for rank, value in notes["ranks"].items()})
                over = bool(notes["over"])
        except (OSError, ValueError, KeyError, TypeError):
            log.info("no notes of attempt %d: what its ranks said before is lost", gang.epoch)
        gang.plan_path = self.options.work / f"plan-{gang.attempt.plan}"
        try:
            gang.layout = read_plan(gang.plan_path.read_bytes(), digest=bytes.fromhex(gang.attempt.plan))
        except (OSError, PlanRefused) as error:
            self._cannot_start(gang, 75, f"the plan of the attempt that this agent found is gone: {error}")
            return
        self._layouts[gang.attempt.plan] = gang.layout, gang.plan_path
        layout = gang.layout
        gang.table = SlotTable(_positions(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
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
        self.hints.trace(message.rank, self.options.work / os.fsdecode(message.payload.rstrip(b"\0")))

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
        status.killed = bool(message.c)
        if message.a >= 0:
            status.code = int(message.a)
        else:
            status.signal = -int(message.a)
        log.info("rank %d of attempt %d is gone: %d", message.rank, gang.epoch, message.a)
        self._changed = True
        self._remember(gang)

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
        deadline_s = float(gang.how("checkpoint", "deadline_s", 600.0))
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
            commit_s = float(gang.how("checkpoint", "commit_s", 120.0)) if gang is not None else 0.0
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


def _positions(layout: PlanLayout, ranks: range) -> dict[int, PositionLayout]:
    return {rank: layout.positions[rank % len(layout.positions)] for rank in ranks}


def _ms(seconds: object) -> int:
    return max(1, min(0xFFFFFFFF, round(float(str(seconds)) * 1000)))


def _address(raw: bytes, count: int) -> tuple[str, list[int]]:
    """A node's address hint, as another agent wrote it; Damaged where it is not one."""
    try:
        value = msgpack.unpackb(raw)
        host, ports = str(value["host"]), [int(port) for port in value["ports"]]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise Damaged(f"a node's address is not one: {error!r}") from error
    if len(ports) != count or not all(0 < port < 65536 for port in ports) or len(host.encode()) > 255:
        raise Damaged(f"a node's address has {len(ports)} ports for {count} ranks, or a bad host or port")
    return host, ports


def _missing(found: Mapping[int, object], nodes: int) -> str:
    names = ", ".join(str(node) for node in range(nodes) if node not in found)
    return f"no address of node {names} came in time (launch.connect_s)"


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
