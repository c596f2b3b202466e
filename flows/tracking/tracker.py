"""A tracker kept true from a thread of its own, and all those of a run.

``tell`` puts into a bounded queue and returns. The thread writes what it hears; what nobody told it (a driver that was
killed, a queue that was full, a tracker that was away) it reads from the store, where all of it is.

  T1. A step is written once, in order, and none that an order left behind.
  T2. Memory is bounded, and nobody waits: what the queue cannot hold is read from the store later.
  T3. Whatever a tracker's library raises ends nothing: it is told once, and tried again after a while.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint import codec
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.keys import tracked_key
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.events import Event
from flows.drive.line import beginning_of, ordered_back
from flows.drive.live import load_evaluations
from flows.tracking.history import lines_between
from flows.tracking.mlflow_run import MlflowWriter
from flows.tracking.prometheus import PAGE, figures_of
from flows.tracking.tensorboard_files import TensorBoardWriter
from flows.tracking.wandb_run import WandbWriter
from flows.tracking.writers import About, Writer, Written, missing
from trainer.spec import RunSpec
from trainer.spec_watch import TrackSpec

log = logging.getLogger(__name__)

QUEUE = 8000
FLUSH_S = 2.0
RETRY_S, RETRY_MOST_S = 5.0, 600.0
HELD_BYTES = 1 << 20
SCALARS = {"loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr", "tokens_per_s": "speed/tokens_per_s"}
"""Of a step's line; and ``speed/step_s``."""


class Tracker:
    """One tracker of one run. ``trouble`` is what a person should hear of, each once."""

    def __init__(
        self, store: Store, run: str, writer: Writer, config: Mapping[str, Any], retry_s: float = RETRY_S
    ) -> None:
        self.store, self.run, self.writer, self.config = store, run, writer, config
        self.trouble: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._queue: queue.Queue[Event | None] = queue.Queue(maxsize=QUEUE)
        self._outcome = ""
        self._held: Written | None = None  # None: not open
        self._about: About | None = None
        self._state: RunState | None = None
        self._said: set[str] = set()
        self._retry_s, self._first_retry_s, self._retry_at = retry_s, retry_s, 0.0
        self._flushed, self._news = 0.0, False
        self._thread = threading.Thread(target=self._work, name=f"track-{writer.name}", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        if event.kind in ("step", "known", "attempt", "evaluated", "ended"):
            try:
                self._queue.put_nowait(event)
            except queue.Full:
                log.debug("%s is slow: what it is not told now it reads later", self.writer.name)

    def close(self, patience_s: float) -> bool:
        """Write what there is, for at most so long; True where all of it is written."""
        try:
            self._queue.put(None, timeout=patience_s)
        except queue.Full:
            return False
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                event = self._queue.get(timeout=FLUSH_S)
            except queue.Empty:
                self._guarded(self._flush)
                continue
            if event is None:
                break
            if event.kind == "ended":
                self._outcome = str(event.facts.get("outcome"))
            self._guarded(lambda event=event: self._take(event))  # type: ignore[misc]
            if time.monotonic() - self._flushed >= FLUSH_S:
                self._guarded(self._flush)
        if self._retry_at and self._retry_s <= self._first_retry_s * 2:
            self._retry_at = 0.0  # it failed lately: once more, since nobody will later
        self._guarded(self._finish)

    def _guarded(self, work: Callable[[], None]) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            work()
        except CheckpointError as error:
            log.info("%s waits for the run's store: %s", self.writer.name, error)
            self._close_for(RETRY_S)
        except ImportError as error:
            self._say(f"{error}; pip install 'hotstage[track]'")
            self._close_for(float("inf"))
        except Exception as error:  # whatever its library raises (T3)
            self._say(f"{type(error).__name__}: {str(error)[:300]}")
            self._close_for(self._retry_s)
            self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)

    def _close_for(self, seconds: float) -> None:
        self._held = None
        self._retry_at = time.monotonic() + seconds

    def _say(self, why: str) -> None:
        kind = why.partition(":")[0]
        if kind not in self._said:
            self._said.add(kind)
            self.trouble.put(f"{self.writer.name} is not written ({why}); the run goes on, and it is caught up later")

    def _take(self, event: Event) -> None:
        if self._held is None or (event.kind == "attempt" and event.facts.get("back")):
            self._open()
        assert self._held is not None
        if event.kind == "step":
            step = int(event.facts["step"])
            if step <= self._held.step or (self._about is not None and int(event.facts["epoch"]) < self._about.branch):
                return
            if step > self._held.step + 1:
                self._catch_up(step - 1)
            self._step(event.facts)
        elif event.kind in ("attempt", "ended"):
            self._catch_up(None)
        elif event.kind == "evaluated":
            self._evaluations()

    def _open(self) -> None:
        """From the run's own log: where its line begins, of whom it is a fork."""
        state = self._state = RunLog(self.store, self.run).fold(quick=True)
        back, parent = [sent for sent in ordered_back(state) if sent[0] <= state.n], state.parent
        branch, begins = back[-1] if back else (0, beginning_of(state).step)
        about = About(
            run=self.run,
            store=self.store.url,
            branch=branch,
            begins=begins,
            born=beginning_of(state).step,
            parent=(str(parent["run"]), int(parent["step"])) if parent else None,
            config=self.config,
        )
        self._about = about
        self._held = self.writer.begin(about, self._kept())
        self._catch_up(None)
        self._evaluations()
        self._flush()
        self._retry_s, self._retry_at = self._first_retry_s, 0.0

    def _catch_up(self, last: int | None) -> None:
        """What the store has and nobody told."""
        assert self._held is not None
        assert self._state is not None
        state = self._state = RunLog(self.store, self.run).fold(self._state)
        for line in lines_between(self.store, state, self._held.step + 1, last):
            self._step(line)

    def _step(self, line: Mapping[str, Any]) -> None:
        assert self._held is not None
        step = int(line["step"])
        if step <= self._held.step:
            return
        values = {tag: float(line[key]) for key, tag in SCALARS.items() if isinstance(line.get(key), int | float)}
        if line.get("step_us"):
            values["speed/step_s"] = float(line["step_us"]) / 1e6
        self.writer.numbers(step, float(line.get("time") or time.time()), values)
        self._held.step, self._news = step, True

    def _evaluations(self) -> None:
        """What evaluations gave of the line's checkpoints, and was not written yet."""
        assert self._held is not None
        assert self._state is not None
        state = self._state = RunLog(self.store, self.run).fold(self._state)
        line = state.lineage()
        steps, begins = line.column("step"), self._held.begins
        points = [p for p in zip(steps, line.column("epoch"), strict=True) if p[0] > begins]
        for row in load_evaluations(self.store, self.run).of(points):
            done = self._held.done.setdefault(f"{row.step}-{row.epoch}", [])
            values = {name: value for name, value in row.numbers().items() if name not in done}
            if values:
                self.writer.numbers(row.step, row.time, values, late=True)
            if row.sample and "sample" not in done:
                self.writer.text(row.step, row.time, "sample", row.sample)
                done.append("sample")
            done += values
            self._news = self._news or bool(values)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if self._held is not None and self._news:
            self.writer.flush(self._held)
            self.store.put(tracked_key(self.run, self.writer.name), codec.pack_hint(self._held.to_map()))
            self._news = False

    def _finish(self) -> None:
        if self._held is None:
            self._open()
        self._catch_up(None)
        self._evaluations()
        self._flush()
        self.writer.end(self._outcome)

    def _kept(self) -> Written | None:
        try:
            data = self.store.get(tracked_key(self.run, self.writer.name), max_bytes=HELD_BYTES)
            return Written.of_map(codec.unpack_hint(data, "what a tracker has", max_bytes=HELD_BYTES))
        except (NotFound, Damaged):
            return None


def writers_of(track: TrackSpec) -> list[Writer]:
    """Those that the spec names. Nothing of their libraries is imported yet."""
    found: list[Writer] = []
    if track.tensorboard:
        found.append(TensorBoardWriter(track.tensorboard))
    if track.wandb:
        found.append(WandbWriter(track.wandb))
    if track.mlflow:
        found.append(MlflowWriter(track.mlflow))
    return found


@dataclass
class Trackers:
    """Those of a run, as its spec names them now. A sink of the driver; ``look`` and ``close`` are its loop's."""

    store: Store
    run: str
    _of: TrackSpec = field(default_factory=TrackSpec)
    _all: list[Tracker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._figures, self._why = figures_of(self.run)

    def tell(self, event: Event) -> None:
        if self._figures is not None:
            self._figures.tell(event)
        for tracker in self._all:
            tracker.tell(event)

    def look(self, spec: RunSpec) -> list[str]:
        """Begin or end trackers where the spec says so by now; what a person should hear of, each once."""
        told, self._why = [self._why] if self._why else [], ""
        if spec.track != self._of:
            told += self.close(0.0) if self._all else []
            self._of = spec.track
            why = missing(spec.track)
            if why:
                told.append(f"{why}; the run goes on without its trackers")
            else:
                config = flat(spec)
                self._all = [Tracker(self.store, self.run, writer, config) for writer in writers_of(spec.track)]
        if self._figures is not None:
            PAGE.leave(self._figures)
        return told + self._trouble()

    def close(self, patience_s: float = 10.0) -> list[str]:
        """Write what there is, for at most so long in all; what a person should hear of that."""
        end = time.monotonic() + patience_s
        late = [t.writer.name for t in self._all if not t.close(max(0.0, end - time.monotonic()))]
        told = self._trouble()
        self._all = []
        if self._figures is not None:
            PAGE.leave(self._figures)
        return told + [f"{name} has not taken all of it in time: what it lacks is in the store" for name in late]

    def _trouble(self) -> list[str]:
        told = []
        for tracker in self._all:
            with contextlib.suppress(queue.Empty):
                while True:
                    told.append(tracker.trouble.get_nowait())
        return told


def flat(spec: RunSpec) -> dict[str, Any]:
    """What is trained and in which layout, by dotted keys."""
    found: dict[str, Any] = {}
    rest: list[tuple[str, Any]] = [
        (name, getattr(spec, name).model_dump(mode="json")) for name in ("model", "data", "train", "parallel")
    ]
    while rest:
        name, value = rest.pop(0)
        if isinstance(value, dict):
            rest += [(f"{name}.{key}", below) for key, below in value.items()]
        else:
            found[name] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return found
