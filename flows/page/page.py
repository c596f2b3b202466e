"""A run on Prefect's page, kept true from a thread of its own: flow run, task runs, log, progress, loss, attempts.

Owns what Prefect shows of a run; decides nothing, and nobody waits for it. ``tell``, ``line`` and ``task`` put into a
bounded queue and return. The thread keeps a small picture of the run and brings the server to it, again and again: a
server that is away, hangs, refuses or has lost its database is told all of it when it takes it.

  P1. What the page shows of attempts comes from the log of the run, whoever drove them.
  P2. Memory is bounded: the newest ``LINES`` lines, ``POINTS`` points of the curve, a task run an attempt.
  P3. Whatever Prefect answers, nothing is raised to who tells: the first failure of a kind is said once.
  P4. Who cancels the flow run on the page cancels the run; nothing else that Prefect does or says ends it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.driving import Ears
from flows.drive.events import WARNS, Event, Outcome
from flows.drive.hours import recoveries
from flows.drive.line import ordered_back
from flows.drive.live import load_curve, on_line
from flows.drive.scores import line_evaluations, score_markdown
from flows.drive.train import cancel
from flows.page.artifacts import attempts_table, files_markdown
from flows.page.curve import loss_image, loss_markdown, loss_words, thinned
from flows.page.ends import END_STATES, attempt_end, end_message
from flows.page.left_open import close_gone, marked_gone, own_mark
from flows.prefect_api import BUSY_PAUSE_S, OPEN_STATES, Busy, Client, Gone, Lost, NoPrefect, Refused, artifact_key

log = logging.getLogger(__name__)

LINES = 2000
POINTS = 4000
QUEUE = 4000
EVERY_S = 1.0
PROGRESS_EVERY_S = 2.0
FULL_EVERY_S = 10.0
RETRY_S = 1.0
BUSY_TRIES = 20
RETRY_MOST_S = 15.0
LEASE_EVERY_S = 60.0
LOOK_EVERY_S = 3.0


@dataclass
class TaskRow:
    """One task run: its states so far, each (type, name, message, Unix seconds)."""

    key: str
    name: str
    began: float
    states: list[tuple[str, str, str, float]] = field(default_factory=list)
    told: int = 0

    @property
    def ended(self) -> bool:
        return self.states[-1][0] != "RUNNING"


@dataclass
class Page:
    """``connect`` gives a client once Prefect can be reached (None: not yet; it may take as long as it likes).

    ``flow_run``: the flow run that Prefect itself started, whose states Prefect's engine sets; without one the page
    makes its own flow run and sets its states. ``warn`` hears what a person should know, from the page's thread.
    """

    connect: Callable[[], Client | None]
    store: Store
    steps: int = 0
    name: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    flow_run: str | None = None
    warn: Callable[[str], None] = log.warning
    shown: Callable[[str], None] | None = None
    cancelled: Callable[[], None] | None = None
    """Called where the flow run is cancelled on the page; None: the run is cancelled."""
    adopted: Sequence[str] = ()
    """Flow runs of drivers that are gone, the newest first: the first that is still open is gone on with."""
    keeps: Callable[[], bool] = lambda: True
    """Whether the server outlives this process."""
    report: str = ""
    every_s: float = EVERY_S
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    alone: bool = False  # there is no Prefect, and whoever looked for it has said so

    def __post_init__(self) -> None:
        self._engine = self.flow_run is not None
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=QUEUE)
        self._client: Client | None = None
        self._run = ""
        self._named = ""
        self._begun = False
        self._state: RunState | None = None
        self._tasks: dict[str, TaskRow] = {}
        self._lines: deque[tuple[float, int, str]] = deque(maxlen=LINES)
        self._lines_told = 0
        self._lines_seen = 0
        self._curve: dict[int, float] = {}
        self._spans: dict[int, tuple[int, int]] = {}
        self._back: dict[int, float] = {}
        self._durable = -1
        self._news = True
        self._log_news = False
        self._artifacts: dict[str, str] = {}
        self._tables: dict[str, tuple[list[dict[str, Any]], str]] = {}
        self._told: dict[str, Any] = {}
        self._outcome: Outcome | None = None
        self._failed: str = ""
        self._closing = threading.Event()
        self._done = self._resting = False
        self._marked: str | None = None
        self._ears: Ears | None = None
        self._gone: set[str] = set()
        self._said: set[str] = set()
        self._check = False
        self._busy = 0
        self._retry_s, self._retry_at = RETRY_S, 0.0
        self._heard = -math.inf
        self._at = dict.fromkeys(("progress", "full", "lease", "look"), -1e9)
        self._thread = threading.Thread(target=self._work, name="prefect-page", daemon=True)

    # --- told by anybody, never waits ---------------------------------------------------------------------

    def start(self) -> Page:
        self._thread.start()
        return self

    def tell(self, event: Event) -> None:
        self._put("event", event)

    def line(self, text: str) -> None:
        """A line of the driver, for the flow run's log, which has a level of its own for what begins with ``WARNS``."""
        said = text.removeprefix(WARNS)
        self._put("line", (time.time(), logging.INFO if said == text else logging.WARNING, said))

    def run_is(self, run: str, steps: int) -> None:
        """From here on the run has a name and a log."""
        self._put("run", (run, steps))

    def table(self, key: str, rows: list[dict[str, Any]], text: str) -> None:
        """A table of its own, in place of what it was before."""
        self._put("table", (key, rows, text))

    @contextlib.contextmanager
    def task(self, key: str, name: str) -> Iterator[Callable[[str], None]]:
        """A task run around a block; what the block gives to the function is its last message."""
        message: list[str] = [""]
        self._put("task", (key, name, "RUNNING", "Running", "", time.time()))
        try:
            yield lambda text: message.__setitem__(0, text)
        except BaseException as error:
            self._put("task", (key, name, "FAILED", "Failed", str(error)[:2000] or type(error).__name__, time.time()))
            raise
        self._put("task", (key, name, "COMPLETED", "Completed", message[0], time.time()))

    @property
    def awaited(self) -> bool:
        """Nothing is on the page yet, and nothing has failed: the server is on its way up, or silent."""
        return self.flow_run is None and not self.failures and not self.alone

    def close(
        self, outcome: Outcome | None, failed: str = "", patience_s: float = 10.0, answering_s: float = 0.0
    ) -> bool:
        """Tell the end, for at most so long, or to a server that goes on answering ``answering_s`` where that is
        longer; True where Prefect has all of it. ``failed``: why there is no outcome."""
        self._outcome, self._failed = outcome, failed
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(("wake", None))
        began = self.clock()
        while self._thread.is_alive():
            if self.clock() >= max(began + patience_s, min(self._heard + patience_s, began + answering_s)):
                break
            if self.flow_run is None and self.failures and self._heard == -math.inf:
                break  # it has never answered: what it would be told now it has not asked for
            self._thread.join(0.1)
        return self._done

    def where(self) -> tuple[str, str]:
        """The server's API and the flow run, for who goes on with it where this process dies; empty: there is none."""
        client, flow_run = self._client, self.flow_run
        return (client.url, flow_run) if client is not None and flow_run is not None and self.keeps() else ("", "")

    def rest(self) -> None:
        """No more is told from here, and the flow run stays as it is: somebody goes on with it."""
        self._resting = True

    def _put(self, kind: str, value: Any) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((kind, value))

    # --- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._resting:
            closing = self._closing.is_set()
            with contextlib.suppress(queue.Empty):
                self._take(*self._queue.get(timeout=0.1 if closing else self.every_s))
                while True:
                    self._take(*self._queue.get_nowait())
            if self.clock() < self._retry_at and not (closing and self._retry_s == RETRY_S):
                continue
            try:
                if self._sync(closing):
                    self._done = True
                    return
                self._retry_s, self._busy = RETRY_S, 0
            except NoPrefect:
                self.alone = True
                return
            except Gone as error:
                if isinstance(error, Busy) and self._busy < BUSY_TRIES:
                    self._busy += 1
                    self._check = True
                    self._retry_at = self.clock() + BUSY_PAUSE_S
                    continue
                self._fail(error, f"Prefect is not reached ({error}); the run goes on, its page is brought up later")
            except Refused as error:
                self._fail(error, f"Prefect refuses ({error}); the run goes on without its page")
            except CheckpointError as error:
                log.info("the run's log is not read for Prefect's page now: %s", error)
                self._retry_at = self.clock() + self._retry_s
            except Exception as error:  # whatever Prefect's client raises: it must not end the thread
                self._fail(error, f"Prefect's page is not written ({type(error).__name__}: {error}); the run goes on")

    def _hear(self) -> None:
        self._heard = self.clock()

    def _fail(self, error: Exception, text: str) -> None:
        self.failures += 1
        self._check = True
        self._retry_at = self.clock() + max(self._retry_s, error.after_s if isinstance(error, Gone) else 0.0)
        self._retry_s = min(self._retry_s * 2, RETRY_MOST_S)
        kind = type(error).__name__ + (str(error)[:24] if isinstance(error, Refused) else "")
        if kind not in self._said:
            self._said.add(kind)
            self.warn(text)
        log.info("%s", text)

    def _take(self, kind: str, value: Any) -> None:
        if kind == "event":
            self._take_event(value)
        elif kind == "line":
            self._lines.append(value)
            self._lines_seen += 1
        elif kind == "run":
            self._run, self.steps = value
            self._log_news = self._news = True
        elif kind == "table":
            key, rows, text = value
            self._tables[key] = (rows, text)
        elif kind == "task":
            key, name, state, state_name, message, at = value
            row = self._tasks.setdefault(key, TaskRow(key, name, at))
            row.states.append((state, state_name, message, at))

    def _take_event(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "step":
            step, epoch = int(facts["step"]), int(facts.get("epoch", 0))
            self._curve[step] = float(facts["loss"])
            low, high = self._spans.get(epoch, (step, step))
            self._spans[epoch] = (min(low, step), max(high, step))
            if len(self._curve) > 2 * POINTS:
                self._curve = thinned(self._curve, POINTS)
        elif event.kind == "checkpoint":
            self._durable = max(self._durable, int(facts["step"]))
        elif event.kind in ("known", "attempt"):
            self.steps = int(facts.get("steps") or self.steps)
            if facts.get("back"):  # by an order: what came after that step is not the run's any more
                self._curve = {step: loss for step, loss in self._curve.items() if step <= facts["step"]}
                self._durable = min(self._durable, int(facts["step"]))
        elif event.kind == "recovered":
            self._back[int(facts["epoch"])] = float(facts["seconds"])
        if event.kind in ("known", "attempt", "recovered", "checkpoint", "damaged", "evaluated", "ended"):
            self._log_news = self._news = True

    # --- bringing the server to it ------------------------------------------------------------------------

    def _sync(self, closing: bool) -> bool:
        """One round; True once all is told and the run has ended."""
        if self._client is None:
            self._client = self.connect()
            if self._client is None:
                return False
            self._client.heard = self._hear
        if self._check and self.flow_run is not None and not self._client.has_flow_run(self.flow_run):
            self.warn("Prefect has lost this flow run: it is written anew")
            self._forget()
        self._check = False
        self._ensure_flow_run()
        self._close_gone(closing)
        now = self.clock()
        if self._log_news and self._run:
            self._read_log()
            self._log_news = False
        self._tell_tasks()
        self._tell_lines()
        for key, (rows, text) in self._tables.items():
            self._artifact(key, "table", json.dumps(rows), text)
        if closing or now - self._at["progress"] >= PROGRESS_EVERY_S:
            self._tell_progress()
            self._at["progress"] = now
        if closing or (self._news and now - self._at["full"] >= FULL_EVERY_S):
            self._tell_full()
            self._news = False
            self._at["full"] = now
        if not closing and (self._run or self.cancelled) and now - self._at["look"] >= LOOK_EVERY_S:
            self._look_for_cancel()
            self._at["look"] = now
        if self._engine and self.flow_run and now - self._at["lease"] >= LEASE_EVERY_S:
            self._client.renew_lease(self.flow_run)
            self._at["lease"] = now
        if closing:
            self._tell_end()
        return closing

    def _look_for_cancel(self) -> None:
        assert self._client is not None
        assert self.flow_run is not None
        if self._client.state_of(self.flow_run) not in ("CANCELLING", "CANCELLED"):
            return
        if self.cancelled is not None:
            self.cancelled()
        else:
            cancel(self.store, self._run, "cancelled on Prefect's page")

    def _ensure_flow_run(self) -> None:
        assert self._client is not None
        name = self._run or self.name
        if self.flow_run is None:
            self._adopt()
        if self.flow_run is None:
            self.flow_run = self._client.create_flow_run(name, {**self.parameters, "run": self._run or None})
            self._named, self._begun = name, False
        elif self._named != name and not self._engine:
            self._client.rename_flow_run(self.flow_run, name, {**self.parameters, "run": self._run or None})
            self._named = name
        if not self._begun and not self._engine:
            self._begun = True
            if self.shown is not None and (self.keeps() or not self._closing.is_set()):
                self.shown(self._client.page_of(self.flow_run))

    def _adopt(self) -> None:
        """Go on with a flow run whose process is gone; not with one that has ended."""
        assert self._client is not None
        while self.adopted and self.flow_run is None:
            first, self.adopted = self.adopted[0], self.adopted[1:]
            with contextlib.suppress(Lost):
                if self._client.state_of(first) in OPEN_STATES:
                    self.flow_run, self._named = first, self._run or self.name

    def _close_gone(self, closing: bool) -> None:
        """Say whose process is behind the flow run; once, and at the end, close those of drivers that are gone."""
        assert self._client is not None
        assert self.flow_run is not None
        if self._marked != self.flow_run:
            self._client.mark(self.flow_run, own_mark())
            self._marked = self.flow_run
        if not self._run or (self._ears is not None and not closing):
            return
        self._ears = self._ears or Ears(self.store, self._run)
        gone = {
            note.flow_run: note.describe()
            for note in self._ears.listen().gone
            if note.flow_run and note.api == self._client.url
        }
        if closing:  # and of those that died before they told the store of it
            gone |= {flow_run: who for flow_run, (_, who) in marked_gone(self._client, self._run).items()}
        for flow_run, who in gone.items():
            if flow_run not in (self.flow_run, *self._gone):
                close_gone(self._client, flow_run, who, f"flow run {self.flow_run} goes on with the run")
                self._gone.add(flow_run)

    def _forget(self) -> None:
        """The server knows nothing of this flow run: all of it is to be told again."""
        self.flow_run, self._engine = None, False
        self._artifacts.clear()
        self._told.clear()
        self._lines_told = self._lines_seen - len(self._lines)
        for row in self._tasks.values():
            row.told = 0
        self._news = True

    def _read_log(self) -> None:
        """Attempts as task runs, from the run's own log (P1)."""
        begun = self._state is not None
        self._state = state = RunLog(self.store, self._run).fold(self._state)
        if not begun:
            self._take_index(state)
        for number, attempt in enumerate(state.attempts, 1):
            key = f"attempt-{number}"
            row = self._tasks.get(key)
            if row is None:
                row = self._tasks[key] = TaskRow(key, f"attempt {number}", attempt.time)
                origin = "memory" if attempt.slots else "a checkpoint" if attempt.checkpoint else "the start"
                row.states.append(("RUNNING", "Running", f"from step {attempt.step}, from {origin}", attempt.time))
            end = None if row.ended else attempt_end(state, number)
            if end is not None:
                row.states.append(end)
                if end[0] in ("CRASHED", "FAILED"):
                    row.name = f"attempt {number}: {end[2][:60]}"
        newest = state.at_step()
        self._durable = max(self._durable, newest.step if newest else -1)

    def _take_index(self, state: RunState) -> None:
        """What the run had done before this page began, from the index of its metrics: one request."""
        index = load_curve(self.store, self._run)
        if index is None:
            return
        points = on_line(index.curve(), ordered_back(state))
        self._curve = {**{step: point.loss for step, point in points.items()}, **self._curve}
        self._back = recoveries(state.attempts, index.rows) | self._back
        for epoch, row in index.rows.items():
            low, high = self._spans.get(epoch, (row.first.step, row.last.step))
            self._spans[epoch] = (min(low, row.first.step), max(high, row.last.step))

    def _tell_tasks(self) -> None:
        assert self._client is not None
        assert self.flow_run is not None
        if self._closing.is_set() and self._outcome is not None and self._outcome.outcome in ("stopped", "superseded"):
            for row in self._tasks.values():  # the run has no end in the log: this driver's part of it has
                if not row.ended:
                    row.states.append(("CANCELLED", "Cancelled", self._outcome.reason, time.time()))
        events = [
            event
            for row in self._tasks.values()
            for event in self._client.task_events(
                self.flow_run, task_id(self.flow_run, row.key), row.key, row.name, row.states, row.told
            )
        ]
        if events:
            self._client.post_events(events)
        for row in self._tasks.values():
            row.told = len(row.states)

    def _tell_lines(self) -> None:
        assert self._client is not None
        assert self.flow_run is not None
        while self._lines_told < self._lines_seen:
            waiting = min(self._lines_seen - self._lines_told, len(self._lines))
            batch = list(self._lines)[-waiting:][:200]
            self._client.create_logs(self.flow_run, batch)
            self._lines_told = self._lines_seen - waiting + len(batch)

    def _tell_progress(self) -> None:
        if not self._run:
            return
        step = max([0, self._durable, *self._curve])
        saved = f"step {self._durable} saved" if self._durable >= 0 else "nothing saved yet"
        percent = min(100.0, 100.0 * step / max(self.steps, 1))
        self._artifact(self._run, "progress", percent, f"step {step} of {self.steps}, {saved}")

    def _tell_full(self) -> None:
        if not self._run:
            return
        steps = sorted(self._curve)
        text = "no steps yet"
        if steps:
            text = loss_words(self._curve)
        self._artifact(f"{self._run}-loss", "markdown", loss_markdown(self._run, self._curve), text)
        if len(steps) > 1:
            self._artifact(f"{self._run}-curve", "image", loss_image(self._curve), text)
        if self._state and self._state.attempts:
            rows = attempts_table(self._state, self._spans, self._back)
            text = "1 attempt" if len(rows) == 1 else f"{len(rows)} attempts"
            self._artifact(f"{self._run}-attempts", "table", json.dumps(rows), text)
        scores = score_markdown(line_evaluations(self.store, self._state)) if self._state else ""
        if scores:
            self._artifact(f"{self._run}-evaluations", "markdown", scores, "what evaluations of its checkpoints gave")
        files = files_markdown(self._run, self.store, self.report, self._state)
        self._artifact(f"{self._run}-files", "markdown", files, "where report and checkpoints are")

    def _artifact(self, key: str, kind: str, data: Any, text: str) -> None:
        """Made once, then changed in place; nothing is sent where nothing changed."""
        assert self._client is not None
        assert self.flow_run is not None
        key = artifact_key(key)
        if self._told.get(key) == (data, text):
            return
        known = self._artifacts.get(key)
        if known is None:
            self._artifacts[key] = self._client.create_artifact(self.flow_run, key, kind, data, text)
        else:
            try:
                self._client.update_artifact(known, data, text)
            except Lost:
                del self._artifacts[key]
                raise
        self._told[key] = (data, text)

    def _tell_end(self) -> None:
        """The flow run's own end, where Prefect's engine does not set it."""
        assert self._client is not None
        assert self.flow_run is not None
        if self._engine:
            return
        if self._outcome is None:
            self._client.set_state(self.flow_run, "CRASHED", "Crashed", self._failed)
            return
        kind, word = END_STATES[self._outcome.outcome]
        self._client.set_state(self.flow_run, kind, word, end_message(self._outcome, self.store.url))


def task_id(flow_run: str, key: str) -> UUID:
    """Of a task run: the same one, whichever process tells it."""
    return uuid5(UUID(flow_run), key)
