"""The agent's loop: hears the socket, the log and its own threads, asks the machine, and has done what that says.

``machine.py`` decides and lists the invariants, ``actions.py`` does what it says. One thread owns all state;
whatever may block runs elsewhere and posts its result.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable

from checkpoint.agent import events as ev
from checkpoint.agent.actions import Actions
from checkpoint.agent.decode import event_of
from checkpoint.agent.gang import Options
from checkpoint.agent.link import Arrival, Link, Peer
from checkpoint.agent.machine import Machine
from checkpoint.agent.metrics import Gauge
from checkpoint.agent.output import BEAT_S
from checkpoint.agent.status import NodeStatus
from checkpoint.agent.watch import Watcher
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store

log = logging.getLogger(__name__)

EXIT_REFUSED = 78
_EARLY = 10_000  # messages kept until the log was read for the first time


class Service:
    """One agent. ``run`` returns the process's exit code."""

    def __init__(self, options: Options, store: Store, link: Link, incarnation: str) -> None:
        self.options, self.link = options, link
        self.machine = Machine(options)
        self.status = NodeStatus(options.node, options.launch, incarnation)
        self.gauge = Gauge()
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._early: list[Arrival] = []
        self._refused = False
        self._store_error: str | None = None
        self._log_error: str | None = None
        self._last_beat = 0.0
        run_log = RunLog(store, options.run, writer=f"agent-{options.node}-{incarnation}")
        self.actions = Actions(
            options,
            store,
            run_log,
            link,
            incarnation,
            post=self.post,
            feed=self._feed,
            on_commit=self._on_commit,
            on_error=self._on_store,
            gauge=self.gauge,
        )
        self.watcher = Watcher(
            run_log,
            options.log_poll_s,
            post=self.post,
            on_state=self._on_state,
            on_error=self._on_log_error,
            on_refused=self._on_refused,
        )

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.post(lambda: self._feed(ev.Terminate())))
        self.watcher.start()
        try:
            while (code := self._exit()) is None:
                for arrival in self.link.poll(self._wait_s()):
                    self._on_arrival(arrival)
                while not self._posted.empty():
                    self._posted.get()()
                self._tick()
        finally:
            self.actions.stop()
            self.watcher.close()
            self.status.left = (self.options.work / "done").exists()
            self._beat()
            self.actions.close()
            self.link.flush(1.0)
        return code

    def post(self, call: Callable[[], None]) -> None:
        """From any thread: have the loop call this."""
        self._posted.put(call)
        self.link.wake()

    def _feed(self, event: ev.Event) -> None:
        """Hear an event, do what the machine says; what is answered at once is heard before anything else."""
        events = deque([event])
        while events:
            for effect in self.machine.on(time.monotonic(), events.popleft()):
                answer = self.actions.run(effect)
                if answer is not None:
                    events.append(answer)

    def _exit(self) -> int | None:
        return EXIT_REFUSED if self._refused else self.machine.exit

    def _wait_s(self) -> float:
        due = [*self.machine.timers.values(), self._last_beat + BEAT_S]
        return 0.0 if self.machine.changed else max(0.0, min(due) - time.monotonic())

    def _tick(self) -> None:
        now = time.monotonic()
        for timer in self.machine.due(now):
            self._feed(ev.Due(timer))
        if self.machine.changed or now - self._last_beat >= BEAT_S:
            self._beat()
        self.actions.tidy()

    def _beat(self) -> None:
        """The node's status, as it stands."""
        machine, status, actions, attempt = self.machine, self.status, self.actions, self.machine.attempt
        self._last_beat = time.monotonic()
        machine.changed = False
        if attempt is not None:
            self._feed(ev.SlotsSeen(attempt.epoch, actions.finals(attempt.epoch, attempt.gang.local)))
            status.epoch, status.ranks = attempt.epoch, attempt.ranks
            status.devices, status.gpus = attempt.devices.told, attempt.devices.names
        status.supervisor, status.phase, status.durable = machine.engine.pid, machine.phase, machine.durable
        status.error = self._log_error or self._store_error or machine.slot_error or actions.hints.error
        status.slots = actions.held()
        fetched, _, cached = actions.preparer.figures
        uploader, held = actions.uploader, status.slots[0][0] if status.slots else -1
        self.gauge.tell(
            epoch=status.epoch,
            step=max((rank.step for rank in status.ranks.values()), default=0),
            held=held,
            committed=machine.durable,
            slots=actions.slots_by_state(),
            stored_bytes=uploader.stored_bytes,
            stored_parts=uploader.stored_parts,
            given_up=uploader.given_up,
            retries=actions.store.retries,
            failing=status.error is not None,
            data_fetched=fetched,
            data_held=cached,
        )
        if machine.speaks(self._log_error) and actions.hints.beat(status):
            self.watcher.expect()  # who reads that may answer by a record

    # --- what is heard ------------------------------------------------------------------------------------

    def _on_arrival(self, arrival: Arrival) -> None:
        """What comes before the log was read for the first time waits: only the log says whose it is."""
        peer, message = arrival.peer, arrival.message
        if self.machine.state is None:
            self._early.append(arrival)
            if len(self._early) > _EARLY:
                log.error(
                    "the log cannot be read, and %d messages wait: a connection is closed, its peer will connect again",
                    _EARLY,
                )
                self.link.drop(peer)
            return
        if message is None:
            self._feed(ev.PeerGone(peer.number))
            return
        self.actions.handed = message.fds
        try:
            if message.name == "HELLO":
                peer.rank = message.rank
            if peer.rank is None:
                log.error("a peer sent %s before HELLO: its connection is closed", message.name)
                self.link.drop(peer)
                return
            event = event_of(peer.number, message, rival=self._rival(peer))
            if event is not None:
                self._feed(event)
        finally:
            for fd in self.actions.handed:
                os.close(fd)
            self.actions.handed = ()

    def _rival(self, peer: Peer) -> bool:
        """Whether another supervisor that lives has the node."""
        before = self.actions.peer(self.machine.engine.peer)
        return before is not None and before.pid not in (0, peer.pid) and _alive(before.pid)

    def _on_refused(self) -> None:
        self._refused = True

    def _on_log_error(self, text: str | None) -> None:
        self._log_error, self.machine.changed = text, True

    def _on_store(self, text: str | None) -> None:
        self._store_error, self.machine.changed = text, True

    def _on_state(self, state: RunState) -> None:
        """A newer state of the run, from the watcher or from a commit of our own."""
        if self.machine.state is None or state.n >= self.machine.state.n:
            self._log_error = state.unreadable
            self.actions.committer.state(state)
            self._feed(ev.LogRead(state))
        early, self._early = self._early, []
        for arrival in early:
            self._on_arrival(arrival)

    def _on_commit(self, state: RunState, step: int) -> None:
        log.info("checkpoint of step %d is durable", step)
        self._on_state(state)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
