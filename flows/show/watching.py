"""Runs as they go, read from their store alone: a row a run, for a live table or for lines.

Nothing here needs a driver, a terminal or Prefect. A look costs a handful of requests a run; what a run says is read
from where the last look left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.hints import step_line
from flows.drive.line import ordered_back
from flows.drive.live import MetricsReader
from flows.drive.run import is_gone, load_what
from flows.drive.scores import line_evaluations
from flows.show.facts import GONE, state_word
from trainer.amounts import clock
from trainer.errors import TrainerError

QUIET_S = 30.0
"""After that long without a step a run that is open is told as such."""
EVALUATIONS_EVERY = 5
"""Looks; they come with checkpoints."""


@dataclass(frozen=True)
class RunRow:
    """A run at one moment. ``quiet_s``: since its newest step was seen here (what was there at the first
    look: by its node's clock); None before the first."""

    run: str
    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    left_s: float | None = None
    saved_step: int = -1
    attempts: int = 0
    scores: tuple[tuple[str, float], ...] = ()
    evaluated: int = -1
    quiet_s: float | None = None

    @property
    def ended(self) -> bool:
        return self.state not in ("planned", "open", "training", "quiet", "unreadable")


@dataclass
class Watched:
    """One run. ``look`` again and again."""

    store: Store
    run: str
    clock: Callable[[], float] = time.time
    _state: RunState | None = None
    _steps: int = 0
    _line: dict[str, Any] | None = None
    _since: float | None = None
    _scores: tuple[int, tuple[tuple[str, float], ...]] = (-1, ())
    _looks: int = 0

    def __post_init__(self) -> None:
        self._log = RunLog(self.store, self.run)
        self._metrics = MetricsReader(self.store, self.run, attach=True)

    def look(self) -> RunRow:
        state = self._state = self._log.fold(self._state, quick=True)
        if not self._steps:
            if is_gone(self.store, self.run, state):
                return RunRow(self.run, GONE)
            self._steps = int(load_what(self.store, self.run)["train"]["steps"])
        epochs = [attempt.epoch for attempt in state.attempts[-2:]]
        back = ordered_back(state)
        for line in filter(None, map(step_line, self._metrics.poll(epochs))):
            if not any(line["epoch"] < later and line["step"] > first for later, first in back):
                self._line = line
                self._since = self.clock() if self._looks else line.get("time") or None  # nodes' clocks may be off
        if self._looks % EVALUATIONS_EVERY == 0:
            self._evaluated(state)
        self._looks += 1
        return self._row(state)

    def _evaluated(self, state: RunState) -> None:
        rows = line_evaluations(self.store, state)
        newest: dict[str, float] = {}
        for row in rows[-8:]:
            newest |= row.numbers()
        self._scores = (rows[-1].step if rows else -1, tuple(newest.items()))

    def _row(self, state: RunState) -> RunRow:
        word, line = state_word(state), self._line
        steps = state.amendments.total(self._steps)
        newest = state.at_step()
        quiet_s = None if self._since is None else max(0.0, self.clock() - self._since)
        step = int(line["step"]) if line is not None else (newest.step if newest else 0)
        seconds = line.get("step_us", 0.0) / 1e6 if line is not None else 0.0
        if word == "open" and quiet_s is not None:
            word = "training" if quiet_s < QUIET_S + 3 * seconds else "quiet"
        return RunRow(
            run=self.run,
            state=word,
            step=step,
            steps=steps,
            loss=line["loss"] if line is not None else None,
            tokens_per_s=line.get("tokens_per_s", 0.0) if line is not None else 0.0,
            left_s=(steps - step) * seconds if seconds and word == "training" else None,
            saved_step=newest.step if newest else -1,
            attempts=len(state.attempts),
            scores=self._scores[1],
            evaluated=self._scores[0],
            quiet_s=quiet_s,
        )


@dataclass
class WatchedRuns:
    """Several: those that are named, or all of a store that are open (``names`` gives what there is by now)."""

    store: Store
    names: Callable[[], Iterable[str]]
    only_open: bool = False
    _watched: dict[str, Watched] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def look(self) -> list[RunRow]:
        rows = []
        for name in self.names():
            if name in self._ended:
                continue
            watched = self._watched.setdefault(name, Watched(self.store, name))
            fresh = watched._looks == 0
            try:
                row = watched.look()
            except (CheckpointError, TrainerError):
                row = RunRow(name, "unreadable")
            if self.only_open and row.state == GONE:
                continue  # it may begin anew
            if self.only_open and row.ended:
                self._ended.add(name)
                self._watched.pop(name)
                if fresh:
                    continue  # it had ended before anybody looked
            rows.append(row)
        return rows


def row_line(row: RunRow) -> str:
    """A row as a line."""
    parts = [f"{row.run}  {row.state}  step {row.step}/{row.steps}"]
    parts += [f"loss {row.loss:.4f}"] if row.loss is not None else []
    parts += [f"{row.tokens_per_s:,.0f} tok/s"] if row.tokens_per_s and row.state == "training" else []
    parts += [f"ETA {clock(row.left_s)}"] if row.left_s is not None else []
    parts += [f"saved {row.saved_step}" if row.saved_step >= 0 else "nothing saved"]
    parts += [f"attempt {row.attempts}"]
    parts += [f"no step for {clock(row.quiet_s)}"] if row.state == "quiet" and row.quiet_s is not None else []
    parts += [f"{_name(name)} {value:.6g}" for name, value in row.scores]
    return "  ".join(parts)


def rows_table(rows: Iterable[RunRow], width: int = 120) -> Table:
    """The rows as a table for a terminal; narrow ones do without the last columns."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name, side in (("run", "left"), ("state", "left"), ("step", "right"), ("loss", "right"), ("tok/s", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    wide = width >= 100
    if wide:
        for name in ("ETA", "saved", "attempt"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("evaluated", no_wrap=True, overflow="ellipsis")
    for row in rows:
        percent = f" {row.step / row.steps:.0%}" if row.steps else ""
        state = f"quiet {clock(row.quiet_s)}" if row.state == "quiet" and row.quiet_s is not None else row.state
        cells = [row.run, state, f"{row.step}/{row.steps}{percent}", "–" if row.loss is None else f"{row.loss:.4f}"]
        cells.append(f"{row.tokens_per_s:,.0f}" if row.tokens_per_s and row.state == "training" else "–")
        if wide:
            cells += [
                "–" if row.left_s is None else clock(row.left_s),
                str(row.saved_step) if row.saved_step >= 0 else "–",
            ]
            cells.append(str(row.attempts))
            cells.append("  ".join(f"{_name(name)} {value:.4g}" for name, value in row.scores[:3]))
        table.add_row(*cells)
    return table


def _name(name: str) -> str:
    return "validation" if name == "validation/loss" else name.removeprefix("eval/")
