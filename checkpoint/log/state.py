"""The state that folding a log gives: a value; what it says of attempts and checkpoints; its sealed bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from checkpoint import codec
from checkpoint.errors import Damaged
from checkpoint.log.records import (
    MAX_STATE_BYTES,
    VERSION,
    AttemptInfo,
    CheckpointInfo,
    EndedInfo,
    Intervention,
    Record,
    ended_map,
    fold_target,
    parse_attempt,
    parse_checkpoint,
    parse_ended,
    parse_intervention,
)


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
        return Fold(self).add(record).freeze()

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
                else [self.ended.n, self.ended.epoch, self.ended.time, ended_map(self.ended)],
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
            return parse_checkpoint(number, epoch, time, body)

        attempts = tuple(
            parse_attempt(row[0], codec.Fields({"t": row[1]}, what).real("t"), row[2]) for row in rows("attempts", 3)
        )
        ended = None
        if f.has("ended"):
            row = f.array("ended", 4)
            if len(row) != 4 or not isinstance(row[0], int):
                raise Damaged(f"{what}: 'ended' is not 4 entries")
            ended = parse_ended(*header(row, "ended"))
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
            interventions.append(Intervention(number, epoch, time, parse_intervention(number, body)))
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


class Fold:
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

    def add(self, r: Record) -> Fold:
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
                attempt = parse_attempt(r.n, r.time, r.body)
                if attempt.checkpoint is not None and attempt.checkpoint not in self.numbers:
                    raise Damaged(f"{what}: restores from record {attempt.checkpoint}, which is no valid checkpoint")
                self.attempts.append(attempt)
                self.ended = None
            case "checkpoint":
                info = parse_checkpoint(r.n, r.epoch, r.time, r.body)
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
                self.interventions.append(Intervention(r.n, r.epoch, r.time, parse_intervention(r.n, r.body)))
            case "ended":
                self.ended = parse_ended(r.n, r.epoch, r.time, r.body)
            case "fold":
                fold_target(r)
        self.n = r.n
        return self

    def _known(self, f: codec.Fields) -> int:
        number = f.integer("checkpoint", 1, self.n)
        if number not in self.numbers:
            raise Damaged(f"log record {self.n + 1}: names checkpoint record {number}, which is none")
        return number


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
