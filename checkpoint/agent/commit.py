"""From all nodes' parts to a checkpoint: the manifest object, then the log record that names it.

Any agent that sees all parts commits; all compute the same bytes, so creating the manifest twice is creating it once,
and the log lets one record in. A loser reads what is there. The nodes have an order, another one each step: the first
one reads the parts, each once, and commits; the others hear of the record by the look at the log that they take anyway,
and take over in turn where it does not come (``gather.py``). In a large gang parts join a group first, by the same rule
(``groups.py``). The log itself keeps a fenced agent out: its record is
refused (Halted) once a newer attempt is there, and would be void.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint import keys, pages
from checkpoint.agent.gather import Gathered, next_look_s, present, turn_s
from checkpoint.agent.groups import NodeGroups, gather_parts, join_group, there
from checkpoint.errors import Conflict, Damaged, Halted, OtherVersion, StoreError
from checkpoint.log import RunLog, RunState
from checkpoint.manifest import ReadPart, checkpoint_body, merge_read
from checkpoint.pages import TooLarge
from checkpoint.store.limits import until

log = logging.getLogger(__name__)

LAST_S = 30.0
"""What the look at a checkpoint's deadline may take: its requests, retries and pauses end by then."""
READINGS = 3
"""Of parts that do not fit together, before the step is given up."""


@dataclass
class _Duty:
    """What one node makes of what several wrote. ``turn``: seconds between this node's looks (0: the first turn is its
    own); ``look``: when the next one is; ``whole``: all parts were there at the one before.
    """

    turn: float
    look: float
    whole: bool = False
    parts: Gathered[ReadPart] = field(default_factory=Gathered)

    def again(self, look: float) -> None:
        """Look at that time; what was read is read anew."""
        self.look, self.parts = look, Gathered()


@dataclass
class _Pending:
    """A step whose part of this node is in the store, since then. ``join``: until its group's part is there."""

    step: int
    since: float
    deadline: float
    commit: _Duty
    join: _Duty | None
    damaged: int = 0

    @property
    def duties(self) -> list[_Duty]:
        return [self.commit, self.join] if self.join else [self.commit]

    @property
    def due(self) -> float:
        return min(self.deadline, *(duty.look for duty in self.duties))


class Committer:
    """The commit thread. Callbacks are posted to the agent's loop.

    ``poll_s``: between looks for a part that is missing, at first. ``clock``: without a thread where it is given; then
    whoever made this calls ``pump``.
    """

    def __init__(
        self,
        run_log: RunLog,
        node: int,
        nodes: int,
        *,
        post: Callable[[Callable[[], None]], None],
        on_commit: Callable[[RunState, int], None],
        on_idle: Callable[[], None],
        on_error: Callable[[str | None], None],
        poll_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._log, self._node, self._nodes, self._post = run_log, node, nodes, post
        self._on_commit, self._on_idle, self._on_error, self._poll_s = on_commit, on_idle, on_error, poll_s
        self._clock = clock or time.monotonic
        self._wake = threading.Condition()
        self._epoch = 0
        self._groups = NodeGroups(nodes, 1)
        self._deadline_s = 0.0
        self._pending: list[_Pending] = []
        self._state: RunState | None = None
        self._news = False  # since the last round: it has to look what that changes
        self._working = False
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="commit", daemon=True) if clock is None else None
        if self._thread is not None:
            self._thread.start()

    # --- called by the agent's loop -----------------------------------------------------------------------

    def begin(self, epoch: int, ranks: int, deadline_s: float) -> None:
        """What is added from here on belongs to this attempt, of so many ranks."""
        with self._wake:
            self._epoch, self._deadline_s, self._pending = epoch, deadline_s, []
            self._groups = NodeGroups.of(ranks, self._nodes)

    def cancel(self) -> None:
        """The attempt is fenced."""
        with self._wake:
            self._epoch, self._pending = 0, []

    def state(self, state: RunState) -> None:
        """A newer state of the log: what it has committed is done."""
        with self._wake:
            if self._state is None or state.n >= self._state.n:
                self._state, self._news = state, True
                self._wake.notify_all()

    def add(self, step: int, state: RunState, deadline: float | None = None) -> None:
        """This node's part of ``step`` is in the store; the checkpoint as a whole has time until ``deadline``."""
        with self._wake:
            if self._state is None or state.n > self._state.n:
                self._state = state
            now, everybody, group = self._clock(), range(self._nodes), self._groups.of_node(self._node)
            deadline = now + self._deadline_s if deadline is None else deadline
            join = self._duty(self._groups.members(group), step, now) if self._groups.size > 1 else None
            self._pending.append(_Pending(step, now, deadline, self._duty(everybody, step, now), join))
            self._news = True
            self._wake.notify_all()

    @property
    def idle(self) -> bool:
        with self._wake:
            return not self._pending and not self._working

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)

    # --- the thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        while True:
            with self._wake:
                while not self._closing and not self._due():
                    wait_s = min((p.due for p in self._pending), default=None)
                    self._wake.wait(None if wait_s is None else max(0.0, wait_s - self._clock()))
                if self._closing:
                    return
            self.pump()

    def _duty(self, nodes: range, step: int, now: float) -> _Duty:
        """This node's part in what one of these nodes does."""
        turn = turn_s((self._node - nodes.start - step) % len(nodes), len(nodes), self._log.store.pace)
        return _Duty(turn, now + turn)

    def _due(self) -> bool:
        """Called under the lock."""
        return bool(self._pending) and (self._news or self._clock() >= min(p.due for p in self._pending))

    def pump(self) -> float | None:
        """One round: what the log has is done, what is due is looked at, the newest first. When the next one is due."""
        with self._wake:
            self._working, self._news = True, False
            epoch, state = self._epoch, self._state
            pending = sorted(self._pending, key=lambda p: -p.step)
        assert state is not None or not pending
        for item in pending:
            if state is not None and state.unreadable is None:
                with until(time.monotonic() + max(item.deadline - self._clock(), LAST_S)):
                    state = self._try(item, epoch, state)
            else:  # until a person has mended the log, whatever the deadline says
                look = self._clock() + self._poll_s
                for duty in item.duties:
                    duty.look = look
                item.deadline = max(item.deadline, look)
        with self._wake:
            self._working = False
            due = min((p.due for p in self._pending), default=None)
        if pending and due is None:
            self._post(self._on_idle)
        return due

    def _try(self, item: _Pending, epoch: int, state: RunState) -> RunState:
        """Look once whether this step was committed, or can be now, if it is due; the state of the log after it."""
        now, done = self._clock(), True
        pace = self._log.store.pace
        pause_s = pace.pause_s(now - item.since, self._poll_s)
        try:
            found = state.find(item.step, epoch)
            if found is None:
                done = False
                if item.join is not None and now >= min(item.join.look, item.deadline):
                    duty = item.join
                    if self._join(duty, item.step, epoch):
                        item.join = None
                    duty.look = now + next_look_s(duty.turn, duty.whole, now - item.since, pace, self._poll_s)
                duty = item.commit
                if now >= min(duty.look, item.deadline):
                    state, done = self._look(duty, item.step, epoch, state)
                    duty.look = now + next_look_s(duty.turn, duty.whole, now - item.since, pace, self._poll_s)
            if done:
                self._post(lambda: self._on_error(None))
                self._post(lambda said=state: self._on_commit(said, item.step))  # type: ignore[misc]
        except Halted as error:
            log.warning("step %d is not committed: %s", item.step, error)
            done = True
        except (Damaged, OtherVersion, TooLarge) as error:
            # what one reading says is read again: parts are small, and a sick read is no sick part
            item.damaged += 1
            for duty in item.duties:
                duty.again(now + pause_s)
            done = not isinstance(error, Damaged) or item.damaged >= READINGS
            log.error("step %d cannot be committed: %s", item.step, error)
            text = str(error)
            self._post(lambda: self._on_error(text))
        except StoreError as error:
            for duty in item.duties:
                duty.look = max(duty.look, now + pause_s)
            text = f"the checkpoint of step {item.step} cannot be committed: {error}"
            log.warning("%s", text)
            self._post(lambda: self._on_error(text))
        if not done and now >= item.deadline:
            gone = f"the commit of step {item.step} is given up: not every node's part came in time"
            log.error("%s", gone)
            self._post(lambda: self._on_error(gone))
            done = True
        newest = max(state.checkpoints.steps_of(epoch), default=-1)
        with self._wake:
            if self._epoch == epoch:
                self._pending = [
                    p for p in self._pending if not (p is item and done) and p.step > min(newest, item.step - 1)
                ]
        return state

    def _join(self, duty: _Duty, step: int, epoch: int) -> bool:
        """Make this node's group's part where all its nodes' are there; whether it is there."""
        store, run, groups = self._log.store, self._log.run, self._groups
        group = groups.of_node(self._node)
        if duty.turn and not duty.whole:
            duty.whole = len(there(store, run, groups, step, epoch, group)) == len(groups.members(group))
            return False
        if duty.turn and store.head(keys.run_key(run, keys.group_name(step, epoch, group))) is not None:
            return True
        return join_group(store, run, groups, step, epoch, group, duty.parts)

    def _look(self, duty: _Duty, step: int, epoch: int, state: RunState) -> tuple[RunState, bool]:
        """Commit the step where all its parts are there; the state of the log, and whether the step is in it."""
        groups = self._groups
        if duty.turn and not duty.whole:
            prefix = keys.run_key(self._log.run, groups.prefix(step, epoch))
            duty.whole = len(present(self._log.store, prefix, groups.count)) == groups.count
            return state, False
        if duty.turn:  # somebody else has, most likely
            state = self._log.fold(state)
            if state.epoch != epoch:
                raise Halted(f"attempt {state.epoch} holds the run", state)
            if state.unreadable is not None:
                return state, False
            if state.find(step, epoch) is not None:
                return state, True
        newer = commit(self._log, groups, step, epoch, state, duty.parts)
        return newer or state, newer is not None


def commit(
    run_log: RunLog,
    nodes: int | NodeGroups,
    step: int,
    epoch: int,
    state: RunState,
    known: Gathered[ReadPart] | None = None,
) -> RunState | None:
    """Commit the checkpoint of this step if every part is there, of the nodes or of the groups; None where one is
    missing.

    ``known``: the parts that were read before, to which those found now are added. Returns a state of the log in which
    the checkpoint is, whoever wrote it. Raises Halted where a newer attempt holds the run or the collector has given
    the step up, Damaged where the parts do not fit together, StoreError.
    """
    run, store = run_log.run, run_log.store
    parts = Gathered[ReadPart]() if known is None else known
    groups = nodes if isinstance(nodes, NodeGroups) else NodeGroups(nodes, 1)
    if not gather_parts(store, run, groups, step, epoch, parts):
        return None
    manifest = merge_read(list(parts.values()))
    name = keys.manifest_name(step, epoch)
    root, ours = pages.write(store, run, name, manifest.stream(), "all")
    if not ours:
        raise Damaged(f"manifest {keys.run_key(run, name)} is there with other bytes than its parts give")
    body = checkpoint_body(manifest, root)
    while state.find(step, epoch) is None:
        if (step, epoch) in state.abandoned:
            raise Halted(f"step {step} was given up by the collector: newer ones were committed before it", state)
        try:
            state = run_log.append("checkpoint", body, state, epoch=epoch)
        except Conflict as conflict:
            state = conflict.state
        else:
            break
    return state
