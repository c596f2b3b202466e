"""The collector: one pass over a run's objects, which may be killed at any instant and run beside another one.

Invariants
  C1  nothing is deleted before the log says that nobody may use it: a tombstone of a checkpoint, a tombstone of a step
      that was never committed, or the attempt record that fenced an older attempt off; and not before the grace is over
      since that record, by the store's clock;
  C2  whatever is there and is no name that this version gives (``keys.point_of``), or of an attempt that the log does
      not have, is told and stays. The log, folds, plans, the spec, metrics and claims stay;
  C3  no checkpoint is given up before those that stay in its place were seen to be there, names and sizes;
  C4  the log is folded again before each checkpoint's objects go: one that the newest attempt or a pin names stays.

What a manifest names lies in its own checkpoint's folder, so folders are all that has to be told apart. A pass asks for
what is there, not for what ever was: a listing of manifests and chunks, a look at the records whose grace may be over.

Of attempts before the newest eight the rings of output and the traces go too (the curve, the metrics and the log stay:
``runs show``, ``report`` and ``replay`` read them), where the run has rules at all.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from checkpoint import codec, keys
from checkpoint.collect.retention import LEAST, Rules, given_up, keep, losses_of, spared, validated_of
from checkpoint.curve import MAX_BYTES as MAX_CURVE_BYTES
from checkpoint.curve import Curve
from checkpoint.errors import Damaged, NotFound, StoreRefused
from checkpoint.evaluated import MAX_BYTES as MAX_EVALUATED_BYTES
from checkpoint.evaluated import Evaluations
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.manifest import Manifest
from checkpoint.read import load_manifest
from checkpoint.store.base import Info, Store

log = logging.getLogger(__name__)

RESOLUTION_S = 1.0
"""Of the times that S3 tells."""
KEPT_OUTPUTS = 8
"""Attempts whose output and traces stay; the report looks at as many traces (flows/show/facts.py)."""
OVERTAKEN = 2
"""Newer checkpoints of its attempt after which a step that was not committed is given up."""
OUTPUTS_A_PASS = 64
AT_ONCE = 8
TOLD = 20
VERSION = 1
Point = tuple[int, int]
"""Step and epoch."""


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Of one pass: objects that it deletes, tombstones that it writes."""

    objects: int = 10_000
    tombstones: int = 256


@dataclass(frozen=True, slots=True)
class Swept:
    """Objects of one checkpoint, or of one attempt's output (``step`` -1), and why they go."""

    step: int
    epoch: int
    objects: int
    bytes: int
    why: str
    wait_s: float = 0.0
    """Until they go, by the store's clock; 0 where they went, or go now."""


@dataclass
class Collected:
    """What a pass did; of a dry run: what it would do now. ``refused``: why nothing is given up."""

    run: str
    dry_run: bool
    rules: Rules | None = None
    grace_s: float = 0.0
    kept: dict[int, str] = field(default_factory=dict)  # checkpoint record -> why
    steps: dict[int, int] = field(default_factory=dict)  # checkpoint record -> step
    given_up: list[CheckpointInfo] = field(default_factory=list)
    abandoned: list[Point] = field(default_factory=list)
    deleted: list[Swept] = field(default_factory=list)
    waiting: list[Swept] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # names, `TOLD` of them at most
    unknowns: int = 0
    refused: str = ""
    more: bool = False  # a limit was met: the next pass goes on
    versions: bool = False  # the store keeps what was deleted, as old versions
    now: float | None = None  # by the store's clock

    @property
    def objects(self) -> int:
        return sum(swept.objects for swept in self.deleted)

    @property
    def bytes(self) -> int:
        return sum(swept.bytes for swept in self.deleted)


def collect(
    store: Store,
    run: str,
    *,
    rules: Rules | None = None,
    dry_run: bool = False,
    limits: PassLimits = PassLimits(),
    state: RunState | None = None,
    grace_s: float | None = None,
) -> Collected:
    """One pass over a run. ``rules`` and ``grace_s``: instead of those that the run was asked for; ``state``: of its
    log, from before.

    Raises StoreError where the store does not answer, does not let it or tells no times, OtherVersion and Damaged where
    what is there cannot be read: what is done by then is done, and the next pass goes on.
    """
    return _Pass(store, run, rules, dry_run, limits, state, grace_s).run()


@dataclass
class _There:
    """What the listing shows of one checkpoint's folders."""

    objects: int = 0
    bytes: int = 0
    names: list[Info] = field(default_factory=list)  # where they are needed


class _Pass:
    def __init__(
        self,
        store: Store,
        run: str,
        rules: Rules | None,
        dry_run: bool,
        limits: PassLimits,
        state: RunState | None,
        grace_s: float | None,
    ) -> None:
        self.store, self.name, self.limits = store, run, limits
        self.log = RunLog(store, run, writer="collector")
        self.state = self.log.fold(state).of_this_version()
        own = Rules.of_how(self.state.asked_how)
        self.rules = rules or own
        self.grace_s = (own or self.rules or Rules()).grace_s if grace_s is None else grace_s
        self.report = Collected(run, dry_run, self.rules, self.grace_s)
        self.there: dict[Point, _There] = {}
        self.now: float | None = None
        self.newest = -math.inf  # the newest time that the store told: no later than now
        self.times: dict[int, float | None] = {}
        self.left = limits.objects
        self.losses: Mapping[int, float] = {}
        self.validated: Mapping[int, float] = {}

    def run(self) -> Collected:
        report = self.report
        if self.state.unreadable is not None:
            report.refused = f"{self.state.unreadable}; nothing is deleted beside a log that cannot be read"
            return report
        if self.rules is not None and self.rules.best:
            self.losses = losses_of(self.state, self._curve())
            self.validated = validated_of(self.state, self._evaluations())
        report.kept = self._kept(self.state)
        report.steps = {info.n: info.step for info in self.state.checkpoints}
        wanted = given_up(self.state, report.kept)
        self._list(wanted)
        if not self.state.n:
            return report  # it has no log: nothing is known to be over, and what was moved away is not made anew
        before = self._before()
        self.now = report.now = self._clock(before)
        if self.now is None:
            raise StoreRefused(
                f"{self.store.describe()} does not say when objects were written (no Last-Modified), so nobody can "
                "tell when a grace is over: nothing is deleted; use a store that says it"
            )
        self._bury(wanted)
        self._abandon()
        for point in sorted(self.there):
            self._sweep(point)
        if self.rules is not None:
            before = self._outputs(before)
        if not report.dry_run:
            self._tell(before)
        return report

    # --- looking ------------------------------------------------------------------------------------------

    def _list(self, wanted: list[int]) -> None:
        """What is there. Names are kept of what may go, and of the checkpoints that take the others' place."""
        staying = {(c.step, c.epoch) for c in self._staying()} if wanted else set()
        doomed: dict[Point, bool] = {}
        held = 0
        for folder in ("manifests", "chunks"):
            prefix = keys.run_key(self.name, folder) + "/"
            for info in self.store.list(prefix):
                name = info.key.removeprefix(keys.run_key(self.name) + "/")
                self.newest = max(self.newest, info.modified or -math.inf)
                point = keys.point_of(name)
                if point is None or self.state.attempt(point[1]) is None:
                    self.report.unknowns += 1
                    self.report.unknown += [name] if len(self.report.unknown) < TOLD else []
                    continue
                there = self.there.setdefault(point, _There())
                there.objects, there.bytes = there.objects + 1, there.bytes + info.bytes
                if point not in doomed:
                    doomed[point] = self._doom(point) is not None
                if doomed[point] and held < self.left:
                    held += 1
                    there.names.append(info)
                elif point in staying:
                    there.names.append(info)

    def _staying(self) -> list[CheckpointInfo]:
        return list(self.state.restore_candidates()[:LEAST])

    def _doom(self, point: Point) -> tuple[int, str] | None:
        """The log record by which nobody may use this checkpoint any more, and what it says; None: it may be used."""
        state, (step, epoch) = self.state, point
        info = state.find(step, epoch)
        if info is not None:
            by = state.buried.get(info.n)
            return None if by is None or info.n in spared(state) else (by, "given up")
        if epoch < state.epoch and state.attempt(epoch) is not None:
            fence = state.attempts[bisect_right(state.attempts, epoch, key=lambda a: a.n)]
            return fence.n, "its attempt ended before it was committed"
        by = state.abandoned.get(point)
        return None if by is None else (by, "never committed")

    def _clock(self, before: int) -> float | None:
        """Now, by the store's clock; None where it tells no times. Of a dry run a time that is not later."""
        if self.report.dry_run:
            self._time_of(self.state.n)
            return self.newest if self.newest > -math.inf else None
        self._tell(before)
        info = self.store.head(keys.collected_key(self.name))
        return None if info is None else info.modified

    def _time_of(self, n: int) -> float | None:
        """When log record ``n`` was written, by the store's clock."""
        if n not in self.times:
            info = self.store.head(keys.log_key(self.name, n)) if n else None
            self.times[n] = None if info is None else info.modified
            self.newest = max(self.newest, self.times[n] or -math.inf)
        return self.times[n]

    def _wait_s(self, n: int) -> float:
        """Until the grace is over since record ``n``; 0 where it is."""
        assert self.now is not None
        then = self._time_of(n)
        return math.inf if then is None else max(0.0, then + self.grace_s + RESOLUTION_S - self.now)

    def _curve(self) -> Curve:
        try:
            return Curve.parse(self.store.get(keys.curve_key(self.name), max_bytes=MAX_CURVE_BYTES))
        except (NotFound, Damaged):
            return Curve()

    def _evaluations(self) -> Evaluations:
        try:
            return Evaluations.parse(self.store.get(keys.evaluated_key(self.name), max_bytes=MAX_EVALUATED_BYTES))
        except (NotFound, Damaged):
            return Evaluations()

    def _kept(self, state: RunState) -> dict[int, str]:
        return keep(state, self.rules, self.losses, self.validated)

    # --- giving up ----------------------------------------------------------------------------------------

    def _bury(self, wanted: list[int]) -> None:
        """A tombstone for each checkpoint that no rule keeps, once those in its place were seen (C3)."""
        report = self.report
        if not wanted:
            return
        why = self._lacking()
        if why:
            report.refused = why
            log.error("run %s: %s", self.name, why)
            return
        for n in wanted[: self.limits.tombstones]:
            info = self.state.checkpoint(n)
            assert info is not None
            if report.dry_run:
                report.given_up.append(info)
                continue
            self.state = self.log.transact(lambda known, n=n: self._tombstone(known, n), self.state)  # type: ignore[misc]
            if n in self.state.buried:
                report.given_up.append(info)
        report.more |= len(wanted) > self.limits.tombstones
        report.kept = self._kept(self.state)
        report.steps = {info.n: info.step for info in self.state.checkpoints}

    def _tombstone(self, known: RunState, n: int) -> tuple[str, Mapping[str, Any]] | None:
        """Asked again where somebody else wrote meanwhile: what was pinned, ordered or begun from since stays."""
        if n in known.buried or n in self._kept(known):
            return None
        return "tombstone", {"checkpoint": n}

    def _lacking(self) -> str:
        """What one of the newest checkpoints lacks of what its manifest names; empty where nothing."""
        for info in self._staying():
            try:
                manifest = load_manifest(self.store, self.name, info)
            except Damaged as error:
                return f"the checkpoint of step {info.step} stays, but cannot be read ({error}): nothing is given up"
            gone = _missing(manifest, self.there.get((info.step, info.epoch), _There()).names, self.name)
            if gone:
                return (
                    f"the checkpoint of step {info.step} stays, but its object {gone} is gone or cut short: nothing is "
                    f"given up (hotstage ckpt verify {self.name})"
                )
        return ""

    def _abandon(self) -> None:
        """A tombstone for steps of the newest attempt that were never committed and will not be: two newer ones were,
        or the run has ended for as long as the grace.
        """
        state, report = self.state, self.report
        committed = sorted(state.checkpoints.steps_of(state.epoch))
        over = state.ended is not None and self._wait_s(state.ended.n) == 0.0
        for point in sorted(self.there):
            step, epoch = point
            overtaken = len(committed) - bisect_right(committed, step) >= OVERTAKEN
            if epoch != state.epoch or not (overtaken or over) or self._doom(point) or state.find(*point):
                continue
            if len(report.abandoned) == self.limits.tombstones:
                report.more = True
                return
            report.abandoned.append(point)
            if not report.dry_run:
                self.state = self.log.transact(lambda known, point=point: _abandoned(known, point), self.state)  # type: ignore[misc]

    # --- deleting -----------------------------------------------------------------------------------------

    def _sweep(self, point: Point) -> None:
        """Delete one checkpoint's objects where they may go (C1, C4): first what says that it is whole."""
        there, report = self.there[point], self.report
        doom = self._doom(point)
        if doom is None:
            return
        wait_s = self._wait_s(doom[0])
        if wait_s or not there.names:  # those of what was given up in this pass were not kept
            report.waiting.append(Swept(*point, there.objects, there.bytes, doom[1], wait_s))
            report.more |= not wait_s
            return
        if not report.dry_run:
            self.state = self.log.fold(self.state)
            if self.state.unreadable is not None or self._doom(point) != doom:
                return
        report.more |= len(there.names) < there.objects
        report.deleted.append(
            Swept(*point, len(there.names), sum(i.bytes for i in there.names), doom[1]),
        )
        self._delete(sorted(there.names, key=lambda i: _order(i.key)))

    def _outputs(self, before: int) -> int:
        """Delete old attempts' rings of output and traces; the epoch before which there are none any more."""
        attempts = self.state.attempts
        old = [
            (a.epoch, fence.n)
            for a, fence in pairwise(attempts)
            if before <= a.epoch < attempts[max(0, len(attempts) - KEPT_OUTPUTS)].epoch
        ]
        for epoch, fence in old[:OUTPUTS_A_PASS]:
            if self._wait_s(fence):
                return epoch
            found = [
                info
                for prefix in (keys.outputs_prefix(self.name, epoch), keys.traces_prefix(self.name, epoch))
                for info in self.store.list(prefix)
            ]
            if len(found) > self.left:
                self.report.more = True
                return epoch
            if found:
                size = sum(info.bytes for info in found)
                self.report.deleted.append(Swept(-1, epoch, len(found), size, "output of an old attempt"))
                self._delete(found)
            before = epoch + 1
        self.report.more |= len(old) > OUTPUTS_A_PASS
        return before

    def _delete(self, found: list[Info]) -> None:
        self.left -= len(found)
        if self.report.dry_run:
            return
        log.info("run %s: deleting %d objects, %s first", self.name, len(found), found[0].key)
        self.report.versions |= delete_all(self.store, [info.key for info in found])

    # --- what a pass leaves -------------------------------------------------------------------------------

    def _before(self) -> int:
        """From the hint that the last pass left; 0 where there is none that holds: it is looked again."""
        try:
            raw = self.store.get(keys.collected_key(self.name), max_bytes=1 << 10)
            found = codec.unpack_hint(raw, "the collector's last pass", max_bytes=1 << 10)
            before = found["outputs_before"]
            return before if type(before) is int and found["v"] == VERSION else 0
        except (NotFound, Damaged, KeyError, TypeError):
            return 0

    def _tell(self, before: int) -> None:
        report = self.report
        value = {"v": VERSION, "outputs_before": before, "objects": report.objects, "bytes": report.bytes}
        self.store.put(keys.collected_key(self.name), codec.pack_hint(value))


def delete_all(store: Store, names: Iterable[str]) -> bool:
    """Where a request takes its time, several at once; the first one is gone before the others go. Whether the store
    keeps any as an old version.
    """
    first, *rest = list(names)
    kept = store.delete(first)
    if store.pace.look_s < 0.1:
        return any([kept, *map(store.delete, rest)])
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="collect") as pool:
        return any([kept, *pool.map(store.delete, rest)])


def _abandoned(known: RunState, point: Point) -> tuple[str, Mapping[str, Any]] | None:
    step, epoch = point
    if known.epoch != epoch or point in known.abandoned or known.find(step, epoch) is not None:
        return None
    return "tombstone", {"step": step, "epoch": epoch}


def _order(key: str) -> tuple[int, str]:
    """The manifest goes first, then the parts and pages, then the chunks."""
    return (0 if key.endswith("/manifest") else 1 if "/manifests/" in key else 2), key


def _missing(manifest: Manifest, there: Iterable[Info], run: str) -> str:
    """The first chunk that a manifest names and that is not there, or has another size, or the first part that is not
    there (a large one lies in pages); empty where there is none.
    """
    sizes = {info.key: info.bytes for info in there}
    short = (c.name for c in manifest.chunks if sizes.get(keys.run_key(run, c.name)) != c.bytes)
    gone = (c.name for c in manifest.sources if keys.run_key(run, c.name) not in sizes)
    return next(short, "") or next(gone, "")
