"""From all nodes' parts to a checkpoint: the manifest object, then the log record that names it.

Any agent that sees all parts commits; all compute the same bytes, so creating the manifest twice is creating it once,
and the log lets one record in. A loser reads what is there. N agents that read N parts each would be N x N requests a
checkpoint: one has the first turn, the next one a while later, and so on until the log has the record; each reads a
part once, however often it looks whether the others are there. The log itself keeps a fenced agent out: its record is
refused (Halted) once a newer attempt is there, and would be void.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpoint import keys, pages
from checkpoint.errors import Conflict, Damaged, Halted, NotFound, OtherVersion, StoreError
from checkpoint.layout import PlanLayout
from checkpoint.log import RunLog, RunState
from checkpoint.manifest import checkpoint_body, merge
from checkpoint.pages import TooLarge

log = logging.getLogger(__name__)

TURN_S = 2.0
"""Between the turns of two agents to commit the same step."""
READINGS = 3
"""Of parts that do not fit together, before the step is given up."""


@dataclass
class _Pending:
    """A step whose part of this node is in the store; ``turn``: when this agent may commit it."""

    step: int
    deadline: float
    turn: float
    damaged: int = 0
    parts: dict[int, bytes] = field(default_factory=dict)


class Committer:
    """The commit thread. Callbacks are posted to the agent's loop."""

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
    ) -> None:
        self._log, self._node, self._nodes, self._post = run_log, node, nodes, post
        self._on_commit, self._on_idle, self._on_error, self._poll_s = on_commit, on_idle, on_error, poll_s
        self._wake = threading.Condition()
        self._epoch = 0
        self._deadline_s = 0.0
        self._pending: list[_Pending] = []
        self._state: RunState | None = None
        self._working = False
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="commit", daemon=True)
        self._thread.start()

    # --- called by the agent's loop -----------------------------------------------------------------------

    def begin(self, epoch: int, layout: PlanLayout, deadline_s: float) -> None:
        """What is added from here on belongs to this attempt."""
        with self._wake:
            self._epoch, self._deadline_s, self._pending = epoch, deadline_s, []

    def cancel(self) -> None:
        """The attempt is fenced."""
        with self._wake:
            self._epoch, self._pending = 0, []
            self._wake.notify_all()

    def state(self, state: RunState) -> None:
        """A newer state of the log: what it has committed is done."""
        with self._wake:
            if self._state is None or state.n >= self._state.n:
                self._state = state
                self._wake.notify_all()

    def add(self, step: int, state: RunState) -> None:
        """This node's part of ``step`` is in the store."""
        with self._wake:
            if self._state is None or state.n > self._state.n:
                self._state = state
            now, place = time.monotonic(), (self._node - step) % self._nodes
            self._pending.append(_Pending(step, now + self._deadline_s, now + TURN_S * place))
            self._wake.notify_all()

    @property
    def idle(self) -> bool:
        with self._wake:
            return not self._pending and not self._working

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=5)

    # --- the thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or bool(self._pending))
                if self._closing:
                    return
                self._working = True
                epoch, state = self._epoch, self._state
                pending = sorted(self._pending, key=lambda p: -p.step)
            assert state is not None
            if state.unreadable is None:
                for item in pending:
                    state = self._try(item, epoch, state)
            with self._wake:
                self._working = False
                idle = not self._pending
                if not idle and not self._closing:
                    self._wake.wait(self._poll_s)
            if idle:
                self._post(self._on_idle)

    def _try(self, item: _Pending, epoch: int, state: RunState) -> RunState:
        """Look once whether this step can be committed, or was; the state of the log after it."""
        done = True
        try:
            found = state.find(item.step, epoch)
            if found is None:
                newer = None
                if time.monotonic() >= item.turn:
                    newer = commit(self._log, self._nodes, item.step, epoch, state, item.parts)
                done = newer is not None
                state = newer or state
            if done:
                self._post(lambda: self._on_error(None))
                self._post(lambda said=state: self._on_commit(said, item.step))  # type: ignore[misc]
        except Halted as error:
            log.warning("step %d is not committed: %s", item.step, error)
        except (Damaged, OtherVersion, TooLarge) as error:
            # what one reading says is read again: parts are small, and a sick read is no sick part
            item.damaged, item.parts = item.damaged + 1, {}
            done = not isinstance(error, Damaged) or item.damaged >= READINGS
            log.error("step %d cannot be committed: %s", item.step, error)
            text = str(error)
            self._post(lambda: self._on_error(text))
        except StoreError as error:
            done = False
            text = f"the checkpoint of step {item.step} cannot be committed: {error}"
            log.warning("%s", text)
            self._post(lambda: self._on_error(text))
        if not done and time.monotonic() > item.deadline:
            gone = f"the commit of step {item.step} is given up: not every node's part came in time"
            log.error("%s", gone)
            self._post(lambda: self._on_error(gone))
            done = True
        newest = max((c.step for c in state.checkpoints if c.epoch == epoch), default=-1)
        with self._wake:
            if self._epoch == epoch:
                self._pending = [
                    p for p in self._pending if not (p is item and done) and p.step > min(newest, item.step - 1)
                ]
        return state


def commit(
    run_log: RunLog, nodes: int, step: int, epoch: int, state: RunState, known: dict[int, bytes] | None = None
) -> RunState | None:
    """Commit the checkpoint of this step if every part is there; None where one is missing.

    ``known``: the parts that were read before, to which those found now are added. Returns a state of the log in which
    the checkpoint is, whoever wrote it. Raises Halted where a newer attempt holds the run, Damaged where the parts do
    not fit together, StoreError.
    """
    run, store = run_log.run, run_log.store
    parts = {} if known is None else known
    for node in reversed(range(nodes)):
        if node not in parts:
            name = keys.part_name(step, epoch, node)
            try:
                parts[node] = pages.read(store, run, name, f"part manifest {name}")
            except NotFound:
                return None
    manifest = merge([(keys.part_name(step, epoch, node), data) for node, data in parts.items()])
    name = keys.manifest_name(step, epoch)
    root, ours = pages.write(store, run, name, manifest.to_bytes(), "all")
    if not ours:
        raise Damaged(f"manifest {keys.run_key(run, name)} is there with other bytes than its parts give")
    body = checkpoint_body(manifest, root)
    while state.find(step, epoch) is None:
        try:
            state = run_log.append("checkpoint", body, state, epoch=epoch)
        except Conflict as conflict:
            state = conflict.state
        else:
            break
    return state
