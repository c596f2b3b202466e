"""``recovery.replay_every``: beside a run one step in so many is computed again, by a process of its own.

`next_range` says which (pure), `spare_cores` whether there is room (pure); `Replays` starts ``hotstage replay`` for one
range after another, below everybody else's priority, and hears what came of it. It never waits for anything, and
nothing that it finds decides anything: two computations that differ are told, with who computed them, and kept as a
hint for ``runs show``. Where there is no room, or no engine, that is said once, and no step is computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from checkpoint import codec
from checkpoint.codec import short
from checkpoint.errors import Damaged, NotFound, StoreError
from checkpoint.keys import replays_key
from checkpoint.log import RunState
from checkpoint.store import Store
from flows.drive.child import ChildProcess
from trainer.cores import usable_cpus
from trainer.engine_path import engine_binary
from trainer.errors import LaunchError
from trainer.spec import RunSpec

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 256 << 10
MOST_KEPT = 16
CANDIDATES = 64
EXIT_DIFFERS, EXIT_REFUSED = 88, 78
"""Of ``hotstage replay``."""
MOST_FAILURES = 3
ONE_RANK = ("parallel.stages=1", "parallel.chunks=1", "parallel.replicas=1", "parallel.schedule=1f1b")
"""The layout that needs fewest processes; its bits are those of any other."""


@dataclass(frozen=True)
class Kept:
    """What a run's replays have come to, as its store holds it (``runs/<run>/live/replays``, a hint).

    ``upto``: steps that were considered; ``steps``: how many were computed again; ``differ``: the newest findings.
    """

    upto: int = 0
    steps: int = 0
    differ: tuple[Mapping[str, Any], ...] = ()

    def to_bytes(self) -> bytes:
        value = {"v": VERSION, "upto": self.upto, "steps": self.steps, "differ": [dict(d) for d in self.differ]}
        return codec.pack_hint(value)

    @classmethod
    def load(cls, store: Store, run: str) -> Kept:
        """Nothing where there is none, or it does not hold."""
        try:
            value = codec.unpack_hint(store.get(replays_key(run), max_bytes=MAX_BYTES), "replays", max_bytes=MAX_BYTES)
            if value["v"] != VERSION or not all(isinstance(d, dict) for d in value["differ"]):
                return cls()
            return cls(int(value["upto"]), int(value["steps"]), tuple(value["differ"])[-MOST_KEPT:])
        except (NotFound, Damaged, KeyError, TypeError, ValueError):
            return cls()


def next_range(every: int, saved: Sequence[int], reached: int, upto: int) -> tuple[int, int] | None:
    """The steps to compute again now, as (from, to): of those after ``upto``, the last that was considered, one in
    ``every``; None while there are too few, or no checkpoint to begin from.

    ``saved``: steps of checkpoints; ``reached``: the last step that the run has computed. From the newest checkpoint
    that as many steps follow; up to a later checkpoint where one falls into them, so that the digest is compared too.

    >>> next_range(100, [0, 50, 100, 150], 160, 0)
    (150, 151)
    >>> next_range(5, [0, 50, 100, 150], 160, 40)
    (100, 124)
    >>> next_range(1, [0, 50, 100], 160, 100)
    (100, 160)
    """
    count = (reached - upto) // every
    begins = [step for step in saved if upto <= step < reached]
    if count < 1 or not begins:
        return None
    first = max((step for step in begins if step + count <= reached), default=min(begins))
    last = min(first + count, reached)
    return first, max((step for step in saved if first < step <= last), default=last)


def spare_cores(spec: RunSpec, cpus: int, *, elsewhere: bool) -> int:
    """Of this machine's cores those that no rank of the run uses. ``elsewhere``: its ranks run on other machines."""
    if elsewhere:
        return cpus
    if spec.parallel.on_cuda(spec.launch.kernel_path) or spec.parallel.threads == 0:
        return 0
    return max(0, cpus - spec.parallel.ranks * spec.parallel.threads)


@dataclass
class _Child:
    process: ChildProcess
    first: int
    last: int
    reached: int


@dataclass
class Replays:
    """Of one run and one driver. ``look`` again and again, from one thread; ``close`` at the end.

    ``tell`` gets an event's facts: what was computed again, or why nothing is. ``command``: what computes.
    """

    store: Store
    run: str
    out: Path
    elsewhere: bool
    tell: Callable[[str, Mapping[str, Any]], None] = lambda *_: None
    command: Sequence[str] = (sys.executable, "-P", "-m", "flows.cli", "replay")
    cpus: int = field(default_factory=usable_cpus)
    _kept: Kept | None = None
    _child: _Child | None = None
    _failures: int = 0
    _said: set[str] = field(default_factory=set)
    _tried: int = -1  # the log's newest record when there was no checkpoint to begin from

    def look(self, spec: RunSpec, state: RunState, reached: int) -> None:
        """``reached``: the last step that the newest attempt is known to have computed."""
        if self._child is not None:
            self._hear(self._child, state)
        every = spec.recovery.replay_every
        if every < 1 or self._child is not None or self._failures >= MOST_FAILURES or state.ended:
            return
        if self._kept is None:
            self._kept = Kept.load(self.store, self.run)
        if reached - self._kept.upto < every or state.n == self._tried or not self._room(spec):
            return
        saved = sorted(info.step for info in islice(iter(state.restore_candidates()), CANDIDATES))
        found = next_range(every, saved, reached, self._kept.upto)
        if found is None:
            self._tried = state.n
        else:
            self._start(spec, *found, reached)

    def close(self) -> None:
        """End what computes; nothing is waited for."""
        child, self._child = self._child, None
        if child is not None:
            child.process.end()

    def _room(self, spec: RunSpec) -> bool:
        if spare_cores(spec, self.cpus, elsewhere=self.elsewhere) < 1:
            cores = "its core computes" if self.cpus == 1 else f"all {self.cpus} cores of it compute"
            self._say_once(
                f"no step is computed again on this machine: {cores} the run. Leave some free (parallel.threads), or "
                f"run `hotstage replay {self.run}` on another machine"
            )
            return False
        try:
            engine_binary()
        except LaunchError as error:
            self._say_once(f"no step is computed again where this driver runs: {error}")
            return False
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.tell("none", {"text": f"recovery.replay_every: {text}"})

    def _start(self, spec: RunSpec, first: int, last: int, reached: int) -> None:
        sets = [*ONE_RANK, f"parallel.threads={spare_cores(spec, self.cpus, elsewhere=self.elsewhere)}"]
        command = [*self.command, self.run, "--from", str(first)]
        command += ["--to", str(last), "--json", "--store", self.store.url, "--out", str(self.out)]
        command += [word for text in sets for word in ("--set", text)]
        self._child = _Child(ChildProcess.begin(command), first, last, reached)

    def _hear(self, child: _Child, state: RunState) -> None:
        code = child.process.ended()
        if code is None:
            return
        self._child = None
        text = child.process.said()
        kept = self._kept or Kept()
        if code in (0, EXIT_DIFFERS):
            self._failures = 0
            told = _result(text)
            finding = {key: told.get(key) for key in ("first", "last", "verdict", "attempt", "difference", "suspects")}
            said = "\n".join(str(line) for line in told.get("said", ()))
            differ = (*kept.differ, {**finding, "said": short(said, 4000)})[-MOST_KEPT:] if code else kept.differ
            kept = Kept(max(kept.upto, child.reached), kept.steps + child.last - child.first, differ)
            self.tell("same" if code == 0 else "differs", {**finding, "steps": kept.steps, "text": said})
        elif code == EXIT_REFUSED and child.first and child.first not in {i.step for i in state.restore_candidates()}:
            return  # the checkpoint was given up to the collector before it was pinned; from another one, then
        else:  # those steps are not computed again; the next ones may
            self._failures += 1 if code != EXIT_REFUSED else MOST_FAILURES
            kept = Kept(max(kept.upto, child.reached), kept.steps, kept.differ)
            more = "; it is not tried again" if self._failures >= MOST_FAILURES else ""
            last = text.strip().splitlines()[-1:] or [f"the process ended with {code}"]
            with contextlib.suppress(ValueError, KeyError, TypeError):
                last = [str(json.loads(last[0])["text"])]
            why = short(last[0].removeprefix("hotstage: "), 1000)
            those = f"steps {child.first + 1} to {child.last}" if child.last > child.first + 1 else f"step {child.last}"
            what = f"{those} could not be computed again"
            self.tell("none", {"text": f"recovery.replay_every: {what}: {why}{more}"})
        self._kept = kept
        try:
            self.store.put(replays_key(self.run), kept.to_bytes())
        except StoreError as error:  # a hint
            log.debug("what was computed again is not kept: %s", error)


def _result(text: str) -> dict[str, Any]:
    """The JSON object that the command printed; what it said before on stderr stands in front of it."""
    at = text.find("{\n")
    try:
        value = json.loads(text[at:])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
