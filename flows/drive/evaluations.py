"""``[validation]`` and ``[[eval]]``: stored checkpoints are evaluated beside training, by processes of their own.

`due` says which (pure); `Evaluating` starts ``hotstage evaluate`` for one checkpoint after another, below everybody
else's priority, at most one for the validation and one for the commands, and hears what came of it. It never waits,
decides nothing, and what fails is told once; each command's row says what became of it. What was found lies in the
store (``checkpoint/evaluated.py``), written by the process itself.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from checkpoint.codec import short
from checkpoint.errors import StoreError
from checkpoint.evaluated import Evaluation, Evaluations
from checkpoint.log import CheckpointInfo, RunState
from checkpoint.store import Store
from flows.drive.child import ChildProcess
from flows.drive.live import load_evaluations
from flows.drive.replays import EXIT_REFUSED, spare_cores
from trainer.cores import usable_cpus
from trainer.engine_path import engine_binary
from trainer.errors import LaunchError
from trainer.spec import DataSpec, RunSpec
from trainer.spec_watch import ValidationSpec

log = logging.getLogger(__name__)

VALIDATION = "validation"
NO_DATA = (
    "there is nothing to validate on: the run's dataset has no validation part (data.validation makes one); set "
    "validation.source, such as text:held-out/*.txt"
)
_OWN = ("source", "field", "prompt_field", "messages")
CANDIDATES = 64
MOST_FAILURES = 3
MORE_S = 600.0
"""Beyond what its parts may take, before a process is killed: the checkpoint is read and exported meanwhile."""
LOOK_S = 0.1


def due(every: int, step: int, stored_every: int, last: int) -> bool:
    """Whether the checkpoint of this step is one of every so many, by its step alone, or the run's last.

    >>> [step for step in (5, 10, 15, 20, 22) if due(2, step, 5, 22)]
    [10, 20, 22]
    """
    if every < 1:
        return False
    return step == last or not stored_every or (step % stored_every == 0 and step // stored_every % every == 0)


def lacking(spec: RunSpec, step: int, last: int, row: Evaluation | None) -> list[str]:
    """What of the spec this checkpoint still lacks: ``validation``, and names of commands."""
    stored = spec.checkpoint.in_store
    names = []
    if due(spec.validation.every, step, stored, last) and (row is None or row.loss is None):
        names.append(VALIDATION)
    return names + [
        e.name for e in spec.eval if due(e.every, step, stored, last) and (row is None or e.name not in row.commands)
    ]


def own_data(wanted: ValidationSpec) -> DataSpec:
    """What ``validation.source`` and the keys beside it name, as data."""
    return DataSpec.model_validate({key: getattr(wanted, key) for key in _OWN})


@dataclass
class _Lane:
    """What evaluates one kind of thing, one checkpoint after another, always the newest that lacks it."""

    names: tuple[str, ...]
    child: ChildProcess | None = None
    of: CheckpointInfo | None = None
    what: tuple[str, ...] = ()
    failures: int = 0
    tried: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Evaluating:
    """Of one run and one driver. ``look`` again and again, from one thread; ``close`` at the end.

    ``tell`` gets the facts of an event: what was found, or why nothing was. ``command``: what evaluates.
    """

    store: Store
    run: str
    elsewhere: bool = False
    """Its ranks run on other machines."""
    tell: Callable[[Mapping[str, Any]], None] = lambda _: None
    command: Sequence[str] = (sys.executable, "-P", "-m", "flows.cli", "evaluate")
    cpus: int = field(default_factory=usable_cpus)
    _lanes: tuple[_Lane, ...] = ()
    _low: bool = True
    _known: Evaluations | None = None
    _said: set[str] = field(default_factory=set)

    def look(self, spec: RunSpec, state: RunState, last: int) -> None:
        """``last``: the step at which the run ends."""
        names = tuple(e.name for e in spec.eval)
        if not self._lanes and (spec.validation.every or names):
            self._lanes = (_Lane((VALIDATION,)), _Lane(names))
        if self._lanes and self._lanes[1].names != names:  # an order has changed them: these were not tried yet
            self._lanes[1].names, self._lanes[1].tried, self._lanes[1].failures = names, set(), 0
        for lane in self._lanes:
            if lane.child is not None:
                self._hear(lane, lane.child)
            if lane.child is None:
                self._begin(lane, spec, state, last)

    @property
    def busy(self) -> bool:
        return any(lane.child is not None for lane in self._lanes)

    def finish(self, spec: RunSpec, state: RunState, last: int, stop: Callable[[], bool]) -> None:
        """The run has ended: what its last checkpoint still lacks is computed, at an ordinary priority, since nobody
        trains any more; what works on it below that, or on an older one, gives way. Bounded by the time limits of the
        spec; it ends early where ``stop`` says so.
        """
        for lane in self._lanes:
            if lane.child is not None and lane.of is not None:
                lane.child.end()
                lane.child, lane.of = None, None
            lane.tried.clear()
        self._low = False
        self.look(spec, state, last)
        while self.busy and not stop():
            time.sleep(LOOK_S)
            self.look(spec, state, last)

    def close(self) -> None:
        """End what evaluates; nothing is waited for."""
        for lane in self._lanes:
            child, lane.child = lane.child, None
            if child is not None:
                child.end()

    def _begin(self, lane: _Lane, spec: RunSpec, state: RunState, last: int) -> None:
        if lane.failures >= MOST_FAILURES:
            return
        found = self._next(lane, spec, state, last)
        if found is None or not self._engine(lane):
            return
        info, what = found
        if self._known is None:  # now that there is something to do: others may have done it
            self._known = load_evaluations(self.store, self.run)
            found = self._next(lane, spec, state, last)
            if found is None:
                return
            info, what = found
        lane.tried.add((info.step, info.epoch))
        most_s = MORE_S + sum(e.timeout_s for e in spec.eval if e.name in what)
        most_s += spec.validation.timeout_s if VALIDATION in what else 0.0
        command = [*self.command, self.run, "--step", str(info.step), "--json", "--with-parent"]
        threads = max(1, spare_cores(spec, self.cpus, elsewhere=self.elsewhere))  # else beside the ranks, one of them
        command += ["--store", self.store.url, "--threads", str(threads)]
        command += [word for name in what for word in ("--only", name)]
        lane.child, lane.of, lane.what = ChildProcess.begin(command, most_s=most_s, low=self._low), info, tuple(what)

    def _next(self, lane: _Lane, spec: RunSpec, state: RunState, last: int) -> tuple[CheckpointInfo, list[str]] | None:
        """The newest checkpoint at which something of the lane is due, where it still lacks that; never an older one:
        what was passed over while another one was evaluated is not made up for.
        """
        rows = self._known.rows if self._known is not None else {}
        for info in islice(iter(state.restore_candidates()), CANDIDATES):
            key = info.step, info.epoch
            if not set(lacking(spec, info.step, last, None)).intersection(lane.names):
                continue
            lacks = [name for name in lacking(spec, info.step, last, rows.get(key)) if name in lane.names]
            return (info, lacks) if lacks and key not in lane.tried else None
        return None

    def _engine(self, lane: _Lane) -> bool:
        if VALIDATION not in lane.names:
            return True
        try:
            engine_binary()
        except LaunchError as error:
            self._once(f"no validation where this driver runs: {error}")
            return False
        return True

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.tell({"found": "none", "text": text})

    def _hear(self, lane: _Lane, child: ChildProcess) -> None:
        code = child.ended()
        if code is None:
            return
        info, what = lane.of, lane.what
        lane.child = lane.of = None
        assert info is not None
        value = result_of(child.said())
        try:
            self._known = load_evaluations(self.store, self.run)
        except StoreError as error:
            log.debug("what was evaluated is not read now: %s", error)
        if code == 0 and isinstance(value.get("step"), int):
            lane.failures = 0
            self._tell_found(value)
            return
        if code == EXIT_REFUSED and "given up" in str(value.get("text")):
            return  # the collector was first; the next checkpoint, then
        lane.failures += 1
        why = short(str(value.get("text") or f"the process ended with {code}"), 1000).removeprefix("hotstage: ")
        more = "; it is not tried again" if lane.failures >= MOST_FAILURES else ""
        self._once(f"step {info.step} could not be evaluated ({', '.join(what)}): {why}{more}")

    def _tell_found(self, value: Mapping[str, Any]) -> None:
        facts = {key: value.get(key) for key in ("step", "epoch", "loss", "windows", "numbers", "sample", "prompt")}
        failed = {str(n): str(why) for n, why in dict(value.get("failed") or {}).items()}
        said = dict(value.get("said") or {})
        fresh = [n for n in failed if f"failed {n}" not in self._said]
        self._said.update(f"failed {n}" for n in failed)
        self._said.difference_update(f"failed {n}" for n in value.get("ran") or ())
        told = [str(line) for name, line in said.items() if name not in failed or name in fresh]  # a failure once
        self.tell({**facts, "found": "numbers", "failed": {n: failed[n] for n in fresh}, "text": "\n".join(told)})


def result_of(text: str) -> dict[str, Any]:
    """The JSON object on the last line that is one."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {}
