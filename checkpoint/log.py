"""The run log: dense records, each created if absent, and the state that folding them gives.

Invariants
  L1  record n is ``runs/<run>/log/<n>``, created once, never changed, never deleted; numbers are dense from 1;
  L2  an attempt's epoch is its record's number, and that record is the fence: a checkpoint record of another epoch
      than the newest attempt's is void;
  L3  record n is a fold exactly where n is a multiple of 256; it names an object with the state folded up to n - 1;
  L4  nothing here compares clocks; ``time`` is for people;
  L5  a record that cannot be read halts every writer (readers keep what came before it).

Order of calls. Driver: ``fold``, decide, ``append("attempt", ...)``, act. Agents: ``fold``; see their attempt; upload;
``append("checkpoint", ..., epoch=theirs)``. Whoever loses a number gets Conflict with the newer state and decides again
(``transact`` is that loop); whoever finds a newer epoch than its own gets Halted and stops writing.

    log = RunLog(store, "demo-0a1b2c", writer="driver")
    state = log.fold()
    state = log.append("attempt", body, state)
    state = log.fold(state)                     # incremental: reads what is new
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time as _time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from checkpoint import codec, keys
from checkpoint.errors import Conflict, Damaged, Halted, NotFound, StoreError, StoreUnavailable
from checkpoint.store.base import Store

logger = logging.getLogger(__name__)

VERSION = 1
MAX_RECORD_BYTES = 64 << 10
MAX_STATE_BYTES = 256 << 20
FOLD_EVERY = 256
CONDENSE_EVERY = 4
KINDS = ("attempt", "checkpoint", "damaged", "intervention", "pin", "unpin", "tombstone", "ended", "fold")
# Nothing writes "unpin" and "tombstone" yet: retention will. Readers know them first, so that a log of a version that
# collects is read by this one.
OUTCOMES = ("succeeded", "cancelled", "gave_up", "preempted")
_WRITER = re.compile(r"[A-Za-z0-9._@-]{1,120}\Z")


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as read."""

    n: int
    kind: str
    epoch: int
    writer: str  # a name, a colon and a token of this one append: who won an unclear create
    time: float  # Unix seconds by the writer's clock; never compared
    body: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Sealed bytes; ValueError where they pass 64 KiB."""
        data = codec.seal(
            {
                "v": VERSION,
                "n": self.n,
                "kind": self.kind,
                "epoch": self.epoch,
                "writer": self.writer,
                "time": self.time,
                "body": self.body,
            },
            codec.RECORD_DEPTH,
        )
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(
                f"a {self.kind} record of {len(data)} bytes; the limit is {MAX_RECORD_BYTES}: "
                "put the bulk in an object and name it"
            )
        return data

    @classmethod
    def parse(cls, data: bytes, n: int) -> Record:
        """The record of these bytes, which lay at number ``n``; Damaged for anything else."""
        what = f"log record {n}"
        f = codec.Fields(codec.unseal(data, what, max_bytes=MAX_RECORD_BYTES, max_depth=codec.RECORD_DEPTH), what)
        version = f.integer("v", 1)
        if version != VERSION:
            raise Damaged(f"{what}: schema version {version}, this program reads {VERSION}: use a newer hotstage")
        found = f.integer("n", 1)
        if found != n:
            raise Damaged(f"{what}: it says that it is record {found}")
        kind = f.text("kind", 40)
        if kind not in KINDS:
            raise Damaged(f"{what}: unknown kind {kind!r}")
        if (kind == "fold") != (n % FOLD_EVERY == 0):
            raise Damaged(
                f"{what}: a {kind} where numbers that are multiples of {FOLD_EVERY}, and only those, are folds"
            )
        record = cls(
            n, kind, f.integer("epoch", 0, n), f.text("writer", 200), f.real("time"), MappingProxyType(f.map("body"))
        )
        f.done()
        return record


@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """An attempt record; its epoch is its number."""

    n: int
    time: float
    launch: str
    nodes: int
    ranks: int
    plan: str  # hex digest
    what: str  # hex digest
    checkpoint: int | None  # number of the checkpoint record that it restores
    step: int  # steps done at its restore point
    slots: Mapping[str, int] | None  # {"step", "epoch"}: newer state held in every agent's slots
    reason: str
    body: Mapping[str, Any]  # the whole body: how, cause, and what a driver adds
    order: int = 0  # number of the order that it follows; 0: of none

    @property
    def epoch(self) -> int:
        return self.n

    @property
    def how(self) -> Mapping[str, Any]:
        """Its layout: the How half of the spec."""
        how: Mapping[str, Any] = self.body["how"]
        return how


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint record."""

    n: int
    epoch: int
    time: float
    step: int
    manifest: str  # name relative to the run
    bytes: int  # of the manifest object
    sha256: str  # of the manifest object, hex
    state_digest: str  # hex
    parts: int
    data_position: int  # samples consumed

    def body(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {
            "step": self.step,
            "manifest": self.manifest,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "state_digest": self.state_digest,
            "parts": self.parts,
            "data_position": self.data_position,
        }


@dataclass(frozen=True, slots=True)
class EndedInfo:
    """How the run ended; an attempt after it opens the run again."""

    n: int
    epoch: int
    time: float
    outcome: str
    reason: str
    step: int
    state_digest: str | None
    cls: str = ""  # of the cause, where it gave up (wire/exit.h's table, ``signal``, ``memory``)


@dataclass(frozen=True, slots=True)
class Intervention:
    """A change that a person or the driver logged: ``body["kind"]`` says which.

    ``order``: what a person asked of the run's How (the whole map ``how``; ``by`` and ``via``: who, with which command;
    ``again``: the run goes on although it had ended; ``anew``: it may begin at its start again). The newest order wins.
    ``parent``: the checkpoint of another run that this one begins from.
    """

    n: int
    epoch: int
    time: float
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything the log says up to record ``n``. A value: folding gives a new one."""

    run: str
    n: int = 0
    attempts: tuple[AttemptInfo, ...] = ()
    checkpoints: tuple[CheckpointInfo, ...] = ()  # valid when written, in order of record
    void: tuple[CheckpointInfo, ...] = ()  # fenced off, or a second record of the same checkpoint
    damaged: Mapping[int, str] = field(default_factory=dict)  # checkpoint record -> why
    pins: Mapping[str, int] = field(default_factory=dict)  # name -> checkpoint record
    tombstones: frozenset[int] = frozenset()  # checkpoint records whose objects may go
    interventions: tuple[Intervention, ...] = ()
    ended: EndedInfo | None = None
    unreadable: str | None = None  # why record n + 1 cannot be read; set: no writer may write

    @property
    def newest_attempt(self) -> AttemptInfo | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def orders(self) -> tuple[Intervention, ...]:
        """What people asked of the run's How, oldest first: the last one stands."""
        return tuple(i for i in self.interventions if i.body["kind"] == "order")

    @property
    def epoch(self) -> int:
        """Of the newest attempt; 0 before the first."""
        return self.attempts[-1].n if self.attempts else 0

    def attempt(self, epoch: int) -> AttemptInfo | None:
        return next((a for a in reversed(self.attempts) if a.n == epoch), None)

    def checkpoint(self, n: int) -> CheckpointInfo | None:
        """The valid checkpoint of this record number."""
        return next((c for c in reversed(self.checkpoints) if c.n == n), None)

    def usable(self, info: CheckpointInfo) -> bool:
        """Valid, and neither marked damaged nor given up to the collector."""
        return info.n not in self.damaged and info.n not in self.tombstones

    def find(self, step: int, epoch: int) -> CheckpointInfo | None:
        """The valid checkpoint of this step and epoch: has somebody committed it?"""
        return next((c for c in reversed(self.checkpoints) if c.step == step and c.epoch == epoch), None)

    def at_step(self, step: int | None = None) -> CheckpointInfo | None:
        """The usable checkpoint of this step on the line that leads here, or the newest; None where there is none."""
        return next((c for c in self.restore_candidates() if step is None or c.step == step), None)

    def restore_candidates(self) -> tuple[CheckpointInfo, ...]:
        """What the next attempt may start from, best first; empty: only from scratch.

        First the checkpoints written after the newest attempt record, by step; then the one which that record names;
        then, for when these are damaged, what came before that one on its own line (earlier ones of its epoch,
        then the one that its attempt names, and so on). So a second crash right after a rollback goes back to the
        rollback's point, and what the rollback left behind is never picked again.
        """
        return tuple(c for c in self.lineage() if self.usable(c))

    def lineage(self) -> tuple[CheckpointInfo, ...]:
        """As ``restore_candidates``, with the damaged and the buried ones."""
        by_epoch: dict[int, list[CheckpointInfo]] = {}
        for info in self.checkpoints:
            by_epoch.setdefault(info.epoch, []).append(info)
        line: list[CheckpointInfo] = []
        attempt, limit = self.newest_attempt, self.n + 1
        while attempt is not None:
            own = [c for c in by_epoch.get(attempt.n, []) if c.n < limit]
            line.extend(sorted(own, key=lambda c: (c.step, c.n), reverse=True))
            named = None if attempt.checkpoint is None else self.checkpoint(attempt.checkpoint)
            if named is None:
                break
            line.append(named)
            attempt, limit = self.attempt(named.epoch), named.n
        return tuple(line)

    # --- the fold, one record at a time -------------------------------------------------------------------

    def apply(self, record: Record) -> RunState:
        """The state after this record, number n + 1; Damaged where its body is not what its kind needs."""
        return _Fold(self).add(record).freeze()

    def to_bytes(self) -> bytes:
        """Sealed bytes of the whole state: what a fold record names."""
        return codec.seal(
            {
                "v": VERSION,
                "run": self.run,
                "n": self.n,
                "attempts": [[a.n, a.time, a.body] for a in self.attempts],
                "checkpoints": [[c.n, c.epoch, c.time, c.body()] for c in self.checkpoints],
                "void": [[c.n, c.epoch, c.time, c.body()] for c in self.void],
                "damaged": [[n, self.damaged[n]] for n in sorted(self.damaged)],
                "pins": dict(self.pins),
                "tombstones": sorted(self.tombstones),
                "interventions": [[i.n, i.epoch, i.time, i.body] for i in self.interventions],
                "ended": None
                if self.ended is None
                else [self.ended.n, self.ended.epoch, self.ended.time, _ended_body(self.ended)],
            },
            codec.RECORD_DEPTH + 2,
        )

    @classmethod
    def parse(cls, data: bytes, run: str, n: int) -> RunState:
        """The state of these bytes, which must be of this run and number; Damaged for anything else."""
        what = f"folded state {n} of run {run}"
        f = codec.Fields(codec.unseal(data, what, max_bytes=MAX_STATE_BYTES, max_depth=codec.RECORD_DEPTH + 2), what)
        if f.integer("v", 1) != VERSION or f.text("run", 200) != run or f.integer("n", 0) != n:
            raise Damaged(f"{what}: of another version, run or number")

        def rows(key: str, width: int) -> Iterator[list[Any]]:
            for row in f.array(key, n):
                if (
                    not isinstance(row, list)
                    or len(row) != width
                    or not all(isinstance(x, int) and 0 < x <= n for x in row[:1])
                ):
                    raise Damaged(f"{what}: a row of {key!r} is not {width} entries that start with a record's number")
                yield row

        def header(row: list[Any], key: str) -> tuple[int, int, float, Any]:
            g = codec.Fields({"epoch": row[1], "time": row[2]}, f"{what}, {key} {row[0]}")
            return row[0], g.integer("epoch", 0, n), g.real("time"), row[3]

        def point(row: list[Any], key: str) -> CheckpointInfo:
            number, epoch, time, body = header(row, key)
            return _checkpoint(number, epoch, time, body)

        attempts = tuple(
            _attempt(row[0], codec.Fields({"t": row[1]}, what).real("t"), row[2]) for row in rows("attempts", 3)
        )
        ended = None
        if f.has("ended"):
            row = f.array("ended", 4)
            if len(row) != 4 or not isinstance(row[0], int):
                raise Damaged(f"{what}: 'ended' is not 4 entries")
            ended = _ended(*header(row, "ended"))
        pins: dict[str, int] = {}
        for name, number in f.map("pins").items():
            if not isinstance(number, int):
                raise Damaged(f"{what}: a pin names no record")
            pins[name] = number
        stones = f.array("tombstones", n)
        if not all(isinstance(x, int) for x in stones):
            raise Damaged(f"{what}: a tombstone names no record")
        damaged: dict[int, str] = {}
        for number, why in rows("damaged", 2):
            damaged[number] = str(why)
        interventions = []
        for row in rows("interventions", 4):
            number, epoch, time, body = header(row, "intervention")
            interventions.append(Intervention(number, epoch, time, _intervention(number, body)))
        state = cls(
            run=run,
            n=n,
            attempts=attempts,
            checkpoints=tuple(point(row, "checkpoint") for row in rows("checkpoints", 4)),
            void=tuple(point(row, "void") for row in rows("void", 4)),
            damaged=MappingProxyType(damaged),
            pins=MappingProxyType(pins),
            tombstones=frozenset(stones),
            interventions=tuple(interventions),
            ended=ended,
        )
        f.done()
        return state


class _Fold:
    """The state being folded, open for change."""

    def __init__(self, state: RunState) -> None:
        self.base = state
        self.n = state.n
        self.attempts = list(state.attempts)
        self.checkpoints = list(state.checkpoints)
        self.void = list(state.void)
        self.damaged = dict(state.damaged)
        self.pins = dict(state.pins)
        self.tombstones = set(state.tombstones)
        self.interventions = list(state.interventions)
        self.ended = state.ended
        self.numbers = {c.n: c for c in state.checkpoints}
        self.points = {(c.step, c.epoch) for c in state.checkpoints}

    def freeze(self, unreadable: str | None = None) -> RunState:
        return RunState(
            run=self.base.run,
            n=self.n,
            attempts=tuple(self.attempts),
            checkpoints=tuple(self.checkpoints),
            void=tuple(self.void),
            damaged=MappingProxyType(self.damaged),
            pins=MappingProxyType(self.pins),
            tombstones=frozenset(self.tombstones),
            interventions=tuple(self.interventions),
            ended=self.ended,
            unreadable=unreadable,
        )

    def add(self, r: Record) -> _Fold:
        """Fold one record in; nothing has changed where it raises."""
        if r.n != self.n + 1:
            raise Damaged(f"log record {r.n} after record {self.n}")
        newest = self.attempts[-1].n if self.attempts else 0
        what = f"log record {r.n} ({r.kind})"
        if r.epoch > newest and not (r.kind == "attempt" and r.epoch == r.n):
            raise Damaged(f"{what}: epoch {r.epoch}, but the newest attempt is {newest}")
        f = codec.Fields(dict(r.body), what)
        match r.kind:
            case "attempt":
                if r.epoch != r.n:
                    raise Damaged(f"{what}: epoch {r.epoch}; an attempt's epoch is its number")
                attempt = _attempt(r.n, r.time, r.body)
                if attempt.checkpoint is not None and attempt.checkpoint not in self.numbers:
                    raise Damaged(f"{what}: restores from record {attempt.checkpoint}, which is no valid checkpoint")
                self.attempts.append(attempt)
                self.ended = None
            case "checkpoint":
                info = _checkpoint(r.n, r.epoch, r.time, r.body)
                if r.epoch != newest or newest == 0 or (info.step, info.epoch) in self.points:
                    self.void.append(info)
                else:
                    self.checkpoints.append(info)
                    self.numbers[info.n] = info
                    self.points.add((info.step, info.epoch))
            case "damaged":
                number, why = self._known(f), f.text("reason")
                self.damaged.setdefault(number, why)
            case "pin":
                number, name = self._known(f), f.text("name", 200)
                if number not in self.tombstones:  # too late: the collector may be at work
                    self.pins[name] = number
            case "unpin":
                self.pins.pop(f.text("name", 200), None)
            case "tombstone":
                number = self._known(f)
                named = {c for a in self.attempts[-1:] if (c := a.checkpoint) is not None}
                if number not in named and number not in self.pins.values():
                    self.tombstones.add(number)
            case "intervention":
                self.interventions.append(Intervention(r.n, r.epoch, r.time, _intervention(r.n, r.body)))
            case "ended":
                self.ended = _ended(r.n, r.epoch, r.time, r.body)
            case "fold":
                fold_target(r)
        self.n = r.n
        return self

    def _known(self, f: codec.Fields) -> int:
        number = f.integer("checkpoint", 1, self.n)
        if number not in self.numbers:
            raise Damaged(f"log record {self.n + 1}: names checkpoint record {number}, which is none")
        return number


def _attempt(n: int, time: float, body: Any) -> AttemptInfo:
    what = f"log record {n} (attempt)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    r = codec.Fields(f.map("restore"), f"{what}, restore")
    slots: Mapping[str, int] | None = None
    if r.has("slots"):
        s = codec.Fields(r.map("slots"), f"{what}, restore.slots")
        slots = MappingProxyType({"step": s.integer("step", 0), "epoch": s.integer("epoch", 1, n - 1)})
    f.map("how")
    return AttemptInfo(
        n=n,
        time=time,
        launch=f.text("launch", 200),
        nodes=f.integer("nodes", 1, 1 << 20),
        ranks=f.integer("ranks", 1, 1 << 20),
        plan=f.hex("plan"),
        what=f.hex("what"),
        checkpoint=r.integer("checkpoint", 1, n - 1) if r.has("checkpoint") else None,
        step=r.integer("step", 0),
        slots=slots,
        reason=f.text("reason"),
        body=MappingProxyType(dict(body)),
        order=f.integer("order", 1, n - 1) if f.has("order") else 0,
    )


def _checkpoint(n: int, epoch: int, time: float, body: Any) -> CheckpointInfo:
    what = f"log record {n} (checkpoint)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    info = CheckpointInfo(
        n=n,
        epoch=epoch,
        time=time,
        step=f.integer("step", 0),
        manifest=keys.check_relative(f.text("manifest", 400), "manifests", what),
        bytes=f.integer("bytes", 1),
        sha256=f.hex("sha256"),
        state_digest=f.hex("state_digest"),
        parts=f.integer("parts", 1, 1 << 20),
        data_position=f.integer("data_position", 0),
    )
    f.done()
    return info


def _ended(n: int, epoch: int, time: float, body: Any) -> EndedInfo:
    what = f"log record {n} (ended)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    outcome = f.text("outcome", 40)
    if outcome not in OUTCOMES:
        raise Damaged(f"{what}: outcome {outcome!r} is none of {', '.join(OUTCOMES)}")
    digest = f.hex("state_digest") if f.has("state_digest") else None
    cls = f.text("class", 40) if f.has("class") else ""
    return EndedInfo(n, epoch, time, outcome, f.text("reason"), f.integer("step", 0), digest, cls)


def ended_body(state: RunState, outcome: str, reason: str, cls: str = "") -> dict[str, Any]:
    """The body of an ``ended`` record: the newest state that is saved, by step (a slower upload may come later)."""
    newest = state.at_step()
    body: dict[str, Any] = {
        "outcome": outcome,
        "reason": reason,
        "step": newest.step if newest else 0,
        "state_digest": newest.state_digest if newest else None,
    }
    return {**body, "class": cls} if cls else body


def _ended_body(ended: EndedInfo) -> dict[str, Any]:
    body = {"outcome": ended.outcome, "reason": ended.reason, "step": ended.step, "state_digest": ended.state_digest}
    return {**body, "class": ended.cls} if ended.cls else body


def _intervention(n: int, body: Any) -> Mapping[str, Any]:
    what = f"log record {n} (intervention)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    if f.text("kind", 80) == "order":
        f.map("how")
        f.text("by", 200)
        f.text("via", 200)
    return MappingProxyType(dict(body))


def fold_target(record: Record) -> tuple[str, int, str]:
    what = f"log record {record.n} (fold)"
    f = codec.Fields(dict(record.body), what)
    found = (
        keys.check_relative(f.text("state", 400), "folds", what),
        f.integer("bytes", 1, MAX_STATE_BYTES),
        f.hex("sha256"),
    )
    f.done()
    return found


def condensed_key(run: str) -> str:
    """Of the state that a writer leaves every few records: a hint, u64le number of its last record, that record's
    SHA-256, and the sealed state after it.
    """
    return keys.run_key(run, "live", "fold")


class RunLog:
    """The log of one run in one store. Safe to use from several threads; keeps no state of its own."""

    def __init__(
        self, store: Store, run: str, *, writer: str = "reader", clock: Callable[[], float] = _time.time
    ) -> None:
        if _WRITER.match(writer) is None:
            raise ValueError(f"writer {writer!r}: letters, digits and ._@- only, 120 at most")
        self.store = store
        self.run = keys.check_run(run)
        self._writer = writer
        self._clock = clock

    # --- reading ------------------------------------------------------------------------------------------

    def read(self, n: int) -> Record:
        """Record ``n``: NotFound where there is none yet, Damaged where it cannot be read."""
        return Record.parse(self.store.get(keys.log_key(self.run, n), max_bytes=MAX_RECORD_BYTES), n)

    def records(self, first: int = 1) -> Iterator[Record]:
        """The records from ``first`` on, until one is absent; Damaged at one that cannot be read."""
        n = first
        while True:
            try:
                yield self.read(n)
            except NotFound:
                return
            n += 1

    def exists(self) -> bool:
        """Whether the run has a record."""
        return self.store.head(keys.log_key(self.run, 1)) is not None

    def fold(self, since: RunState | None = None, *, quick: bool = False) -> RunState:
        """The state now. With the state from before: a request for each new record, and one to see that it is the last
        (``since`` itself where there is none).

        Without, it starts at the newest fold record (found by probing, not by listing) and looks once whether a
        record is missing in the middle. A record that cannot be read ends the fold: ``state.unreadable`` says why.

        ``quick``: without ``since``, start where a writer left the state lately, however long the log is: a handful
        of requests. Records before that point are not read again, as with a state from before.
        """
        state = since if since is not None else (self._condensed() if quick else None) or self._newest_fold()
        fold: _Fold | None = None  # made when there is something new: a look that finds nothing copies nothing
        while True:
            n = (fold or state).n + 1
            try:
                record = self.read(n)
                fold = fold or _Fold(state)
                fold.add(record)
            except NotFound:
                later = None if since is not None else self._after(n)
                if later is None:
                    break
                if self.store.head(keys.log_key(self.run, n)) is None:
                    why = f"log record {n} is missing, but {later} exists: a record was deleted"
                    return self._halted(fold or _Fold(state), why)
            except Damaged as error:
                return self._halted(fold or _Fold(state), str(error))
        if fold is not None:
            return fold.freeze()
        return state if state.unreadable is None else replace(state, unreadable=None)

    def _halted(self, fold: _Fold, why: str) -> RunState:
        logger.error("run %s: %s; nobody may write until it is mended (hotstage ckpt verify)", self.run, why)
        return fold.freeze(unreadable=why)

    def _after(self, n: int) -> str | None:
        """The name of a record later than ``n``, if there is one."""
        for info in self.store.list(keys.log_prefix(self.run), start_after=keys.log_key(self.run, n)):
            return info.key
        return None

    def _condensed(self) -> RunState | None:
        """The state that a writer left lately, where the record that it ends with is that of the log; else None."""
        try:
            raw = self.store.get(condensed_key(self.run), max_bytes=MAX_STATE_BYTES)
            n = int.from_bytes(raw[:8], "little")
            if not 0 < n < 1 << 62:
                return None
            record = self.store.get(keys.log_key(self.run, n), max_bytes=MAX_RECORD_BYTES)
            if hashlib.sha256(record).digest() != raw[8:40]:
                return None
            return RunState.parse(raw[40:], self.run, n)
        except (NotFound, Damaged) as error:
            logger.debug("run %s: no condensed state: %s", self.run, error)
            return None

    def _condense(self, state: RunState, record: bytes) -> None:
        head = state.n.to_bytes(8, "little") + hashlib.sha256(record).digest()
        try:
            self.store.put(condensed_key(self.run), head + state.to_bytes())
        except StoreError as error:  # it saves requests, nothing else
            logger.debug("run %s: the condensed state is not written: %s", self.run, error)

    def _newest_fold(self) -> RunState:
        """The state of the newest fold record that can be read: O(log n) looks at names, since records are dense."""

        def there(k: int) -> bool:
            return self.store.head(keys.log_key(self.run, k * FOLD_EVERY)) is not None

        low, high = 0, 1
        while there(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if there(middle) else (low, middle)
        for k in range(low, 0, -1):
            n = k * FOLD_EVERY
            try:
                record = self.read(n)
                name, size, sha256 = fold_target(record)
                data = self.store.get(keys.run_key(self.run, name), max_bytes=size)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise Damaged(f"folded state {name}: its bytes do not have the digest that log record {n} names")
                return RunState.parse(data, self.run, n - 1).apply(record)
            except (Damaged, NotFound) as error:
                logger.error("run %s: fold record %d is of no use, reading from an earlier one: %s", self.run, n, error)
        return RunState(self.run)

    # --- writing ------------------------------------------------------------------------------------------

    def append(self, kind: str, body: Mapping[str, Any], state: RunState, *, epoch: int | None = None) -> RunState:
        """Create record ``state.n + 1`` and return the state with it.

        ``epoch`` is the writer's own: an agent passes its attempt's, and gets Halted once a newer attempt is in the
        log. Without it the record is of the newest epoch (the driver, people). Conflict where another writer won the
        number: its ``state`` has that record folded in. ValueError or Damaged where the body is not what its kind
        needs: nothing is written then.
        """
        if kind == "fold" or kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS[:-1])}")
        if kind == "checkpoint" and epoch is None:
            raise ValueError("a checkpoint record needs the epoch of the attempt that made it")
        self._may_write(state, epoch)
        if (state.n + 1) % FOLD_EVERY == 0:
            state = self._create("fold", self._store_state(state), state, state.epoch, epoch)
        n = state.n + 1
        return self._create(
            kind, body, state, n if kind == "attempt" else state.epoch if epoch is None else epoch, epoch
        )

    def transact(
        self,
        decide: Callable[[RunState], tuple[str, Mapping[str, Any]] | None],
        state: RunState | None = None,
        *,
        epoch: int | None = None,
    ) -> RunState:
        """Fold, ask ``decide`` for a record, append it; on a conflict ask again. None: nothing to write (any more)."""
        state = self.fold(state)
        while (wanted := decide(state)) is not None:
            try:
                return self.append(*wanted, state, epoch=epoch)
            except Conflict as conflict:
                logger.info("run %s: %s", self.run, conflict)
                state = conflict.state
        return state

    def _may_write(self, state: RunState, epoch: int | None) -> None:
        if state.run != self.run:
            raise ValueError(f"state of run {state.run}, log of run {self.run}")
        if state.unreadable is not None:
            raise Halted(f"run {self.run}: {state.unreadable}; no record may follow one that cannot be read", state)
        if epoch is not None and state.epoch > epoch:
            raise Halted(
                f"run {self.run}: this writer belongs to attempt {epoch}, but attempt {state.epoch} holds the run",
                state,
            )

    def _create(
        self, kind: str, body: Mapping[str, Any], state: RunState, record_epoch: int, epoch: int | None
    ) -> RunState:
        n = state.n + 1
        record = Record(n, kind, record_epoch, f"{self._writer}:{secrets.token_hex(8)}", self._clock(), dict(body))
        data = record.to_bytes()
        after = state.apply(Record.parse(data, n))  # what readers will see, or Damaged before anything is written
        if self.store.create(keys.log_key(self.run, n), data):
            if n % CONDENSE_EVERY == 0:
                self._condense(after, data)
            logger.debug("run %s: log record %d, %s, epoch %d", self.run, n, kind, record_epoch)
            return after
        newer = self.fold(state)
        self._may_write(newer, epoch)
        if newer.n == state.n:
            raise StoreUnavailable(f"run {self.run}: the store has log record {n}, but does not show it; try again")
        raise Conflict(f"log record {n} was written by another: the log is at {newer.n}", newer)

    def _store_state(self, state: RunState) -> dict[str, Any]:
        data = replace(state, unreadable=None).to_bytes()
        name = keys.fold_name(state.n + 1, secrets.token_hex(8))
        digest = hashlib.sha256(data)
        self.store.create(keys.run_key(self.run, name), data, sha256=digest.digest())
        return {"state": name, "bytes": len(data), "sha256": digest.hexdigest()}
