"""The state that folding a log gives: a value; what it says of attempts and checkpoints; its sealed bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any

from checkpoint import codec
from checkpoint.amendments import NONE, Amendments
from checkpoint.errors import Damaged, OtherVersion
from checkpoint.log.points import Line, Points
from checkpoint.log.records import (
    MAX_STATE_BYTES,
    AttemptInfo,
    CheckpointInfo,
    EndedInfo,
    FoldTarget,
    Intervention,
    Record,
    StartPoint,
    ended_map,
    fold_target,
    known_version,
    parse_attempt,
    parse_checkpoint,
    parse_ended,
    parse_intervention,
)

STATE_VERSION = 3
"""1 had all rows in one object; 3 is 2 with ``needs``, and is written where there are such needs alone."""
MAX_STEP = (1 << 63) - 1
Load = Callable[[int, FoldTarget | None], "RunState"]


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything the log says up to record ``n``. A value: folding gives a new one.

    What is asked of it by number, epoch or step is found without looking at the rest.
    """

    run: str
    n: int = 0
    attempts: tuple[AttemptInfo, ...] = ()
    checkpoints: Points = field(default_factory=Points)  # valid when written, in order of record
    void: Points = field(default_factory=Points)  # fenced off, or a second record of the same checkpoint
    damaged: Mapping[int, str] = field(default_factory=dict)  # checkpoint record -> why
    pins: Mapping[str, int] = field(default_factory=dict)  # name -> checkpoint record
    buried: Mapping[int, int] = field(default_factory=dict)  # checkpoint record -> the tombstone's record
    abandoned: Mapping[tuple[int, int], int] = field(default_factory=dict)  # step and epoch -> the tombstone's record
    interventions: tuple[Intervention, ...] = ()
    ended: EndedInfo | None = None
    needs: Mapping[str, int] = field(default_factory=dict)  # kind -> newest version of its records, where that is not 1
    unreadable: str | None = None  # why record n + 1 cannot be read; set: no writer may write
    newer: bool = False  # it is of a newer version

    def __post_init__(self) -> None:
        for name in ("checkpoints", "void"):  # any rows will do: they are kept as columns
            if not isinstance(rows := getattr(self, name), Points):
                object.__setattr__(self, name, Points(rows))

    @property
    def newest_attempt(self) -> AttemptInfo | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def orders(self) -> tuple[Intervention, ...]:
        """What people asked of the run's How, oldest first: the last one stands."""
        return tuple(i for i in self.interventions if i.body["kind"] == "order")

    @property
    def asked_how(self) -> Mapping[str, Any] | None:
        """The How that a person asked for last: the newest order's; without orders the newest attempt's whose layout no
        driver had to change by itself. None before the first attempt.
        """
        if self.orders:
            how: Mapping[str, Any] = self.orders[-1].body["how"]
            return how
        return next((a.how for a in reversed(self.attempts) if not a.fell_back), None)

    @property
    def amendments(self) -> Amendments:
        """What a run's next steps are trained by beside its What (docs/adr/0015): the newest order says all of it."""
        return next((i.amendments for i in reversed(self.interventions) if i.body["kind"] in ("order", "parent")), NONE)

    @property
    def start(self) -> StartPoint | None:
        """Where an order has the run go on that no attempt follows yet: the run's line ends there."""
        return _start(self.interventions, self.epoch)

    @property
    def epoch(self) -> int:
        """Of the newest attempt; 0 before the first."""
        return self.attempts[-1].n if self.attempts else 0

    @property
    def tombstones(self) -> Set[int]:
        """Checkpoint records whose objects may go."""
        return self.buried.keys()

    def attempt(self, epoch: int) -> AttemptInfo | None:
        at = bisect_left(self.attempts, epoch, key=_number)
        return self.attempts[at] if at < len(self.attempts) and self.attempts[at].n == epoch else None

    @property
    def parent(self) -> Mapping[str, Any] | None:
        """What a fork's log says of the run that it is of (flows/drive/fork.py): run, checkpoint record and step."""
        return next((i.body for i in self.interventions if i.body.get("kind") == "parent"), None)

    def listed(self) -> list[CheckpointInfo]:
        """The valid checkpoints as people see them, newest last: by attempt, then step (uploads end in any order)."""
        return sorted(self.checkpoints, key=lambda c: (c.epoch, c.step))

    def checkpoint(self, n: int) -> CheckpointInfo | None:
        """The valid checkpoint of this record number."""
        row = self.checkpoints.row_of(n)
        return None if row is None else self.checkpoints[row]

    def usable(self, info: CheckpointInfo) -> bool:
        """Valid, and neither marked damaged nor given up to the collector."""
        return info.n not in self.damaged and info.n not in self.buried

    def numerics(self, info: CheckpointInfo) -> int:
        """What the bits of this checkpoint mean: what those of its attempt's steps do."""
        attempt = self.attempt(info.epoch)
        return attempt.numerics if attempt else 1

    def find(self, step: int, epoch: int) -> CheckpointInfo | None:
        """The valid checkpoint of this step and epoch: has somebody committed it?"""
        row = self.checkpoints.row_at(step, epoch)
        return None if row is None else self.checkpoints[row]

    def at_step(self, step: int | None = None) -> CheckpointInfo | None:
        """The usable checkpoint of this step on the line that leads here, or the newest; None where there is none."""
        points, damaged, buried = self.checkpoints, self.damaged, self.buried
        for rows in self._line():
            for row in rows:
                n = points.n[row]
                if (step is None or points.step[row] == step) and n not in damaged and n not in buried:
                    return points[row]
        return None

    def restore_candidates(self) -> Line:
        """What the next attempt may start from, best first; empty: only from scratch.

        First the checkpoints written after the newest attempt record, by step; then the one which that record names;
        then, for when these are damaged, what came before that one on its own line (earlier steps of its epoch, in
        whatever order they were recorded, then the one that its attempt names, and so on). So a second crash right
        after a rollback goes back to the rollback's point, and what the rollback left behind is never picked again.
        Where an order that no attempt follows yet names a checkpoint, that one is first.
        """
        numbers, damaged, buried = self.checkpoints.n, self.damaged, self.buried
        rows = self.lineage().rows
        if damaged or buried:
            rows = [row for row in rows if numbers[row] not in damaged and numbers[row] not in buried]
        return Line(self.checkpoints, rows)

    def lineage(self) -> Line:
        """As ``restore_candidates``, with the damaged and the buried ones."""
        return Line(self.checkpoints, list(chain.from_iterable(self._line())))

    def _line(self) -> Iterator[Sequence[int]]:
        """Rows of the lineage, best first, an attempt's together; an order that nobody follows yet says from where."""
        points, attempt, steps = self.checkpoints, self.newest_attempt, self.checkpoints.step
        end: int | None = None  # a step that is beyond the line
        if (start := self.start) is not None:
            row = None if start.checkpoint is None else points.row_of(start.checkpoint)
            if row is None:
                return
            yield (row,)
            attempt, end = self.attempt(points.epoch[row]), steps[row]
        while attempt is not None:
            own = sorted(points.rows_of(attempt.n), key=steps.__getitem__)
            yield own[: None if end is None else bisect_left(own, end, key=steps.__getitem__)][::-1]
            named = None if attempt.checkpoint is None else points.row_of(attempt.checkpoint)
            if named is None:
                return
            yield (named,)
            attempt, end = self.attempt(points.epoch[named]), steps[named]

    def upto(self, n: int) -> RunState:
        """Attempts, checkpoints and interventions up to record ``n``; what is no row of a record stays as it is now."""
        return replace(
            self,
            n=n,
            attempts=self.attempts[: bisect_right(self.attempts, n, key=_number)],
            checkpoints=self.checkpoints.upto(n),
            void=self.void.upto(n),
            buried={c: by for c, by in self.buried.items() if by <= n},
            interventions=self.interventions[: bisect_right(self.interventions, n, key=_number)],
        )

    def of_this_version(self) -> RunState:
        """Itself; OtherVersion, with both, where a newer hotstage wrote what comes next: nobody acts without it."""
        if self.newer:
            raise OtherVersion(f"run {self.run}: {self.unreadable}")
        return self

    # --- the fold, one record at a time -------------------------------------------------------------------

    def apply(self, record: Record) -> RunState:
        """The state after this record, number n + 1; Damaged where its body is not what its kind needs."""
        return Fold(self).add(record).freeze()

    # --- bytes --------------------------------------------------------------------------------------------

    def to_bytes(self, base: int = 0, target: FoldTarget | None = None) -> bytes:
        """Sealed bytes: the rows of records after ``base``, the number of a fold record whose state has the others (0:
        all rows), and what is no row: pins, marks of damage, the end. So what one object holds is bounded.
        ``target``: what that fold record names, where the writer knows. Who may not read a record of its log may not
        read the state either: ``needs`` says what there is, and an older reader finds a state of version 3.
        """
        attempts = self.attempts[bisect_right(self.attempts, base, key=_number) :]
        interventions = self.interventions[bisect_right(self.interventions, base, key=_number) :]
        return codec.seal(
            {
                "v": STATE_VERSION if self.needs else 2,
                **({"needs": dict(self.needs)} if self.needs else {}),
                "run": self.run,
                "n": self.n,
                "base": base,
                "target": None if target is None else target._asdict(),
                "attempts": [[a.n, a.time, a.body] for a in attempts],
                "checkpoints": self.checkpoints.after(base).to_map(),
                "void": self.void.after(base).to_map(),
                "damaged": [[n, self.damaged[n]] for n in sorted(self.damaged)],
                "pins": dict(self.pins),
                "tombstones": [
                    *([c, by] for c, by in self.buried.items() if by > base),
                    *([*point, by] for point, by in self.abandoned.items()),  # no row of a record: always whole
                ],
                "interventions": [[i.n, i.epoch, i.time, i.body] for i in interventions],
                "ended": None
                if self.ended is None
                else [self.ended.n, self.ended.epoch, self.ended.time, ended_map(self.ended)],
            },
            codec.RECORD_DEPTH + 2,
        )

    @classmethod
    def parse(cls, data: bytes, run: str, n: int, load: Load | None = None) -> RunState:
        """The state of these bytes, which must be of this run and number; Damaged for anything else.

        ``load``: gives the state that a fold record names, by its number and what it names, if known. Version 1 had all
        rows in one object.
        """
        what = f"folded state {n} of run {run}"
        f = codec.Fields(codec.unseal(data, what, max_bytes=MAX_STATE_BYTES, max_depth=codec.RECORD_DEPTH + 2), what)
        version = f.version(STATE_VERSION)
        needs = f.map("needs") if version > 2 else {}
        _check_needs(needs, what)
        if f.text("run", 200) != run or f.integer("n", 0) != n:
            raise Damaged(f"{what}: of another run or number")
        base = f.integer("base", 0, n) if version > 1 else 0
        if base and load is None:
            raise Damaged(f"{what}: its first {base} records are in other objects")
        target = FoldTarget.parse(f.map("target"), f"{what}, target") if f.has("target") else None
        below = load(base, target) if base and load is not None else cls(run)

        def rows(key: str, width: int) -> Iterator[list[Any]]:
            for row in f.array(key, n):
                if not isinstance(row, list) or len(row) != width or type(row[0]) is not int or not 0 < row[0] <= n:
                    raise Damaged(f"{what}: a row of {key!r} is not {width} entries that start with a record's number")
                yield row

        def header(row: list[Any], key: str) -> tuple[int, int, float, Any]:
            g = codec.Fields({"epoch": row[1], "time": row[2]}, f"{what}, {key} {row[0]}")
            return row[0], g.integer("epoch", 0, n), g.real("time"), row[3]

        def points(key: str) -> Points:
            if version == 1:
                found = Points(parse_checkpoint(*header(row, key)) for row in rows(key, 4))
                return Points.parse(found.to_map(), f"{what}, {key}", 0, n, grouped=key == "checkpoints")
            found = Points.parse(f.map(key), f"{what}, {key}", base, n, grouped=key == "checkpoints")
            whole: Points = getattr(below, key).copy()
            whole.extend(found)
            return whole

        attempts = [
            parse_attempt(row[0], codec.Fields({"t": row[1]}, what).real("t"), row[2]) for row in rows("attempts", 3)
        ]
        interventions = [parse_intervention(*header(row, "intervention")) for row in rows("interventions", 4)]
        for key, found in (("attempts", attempts), ("interventions", interventions)):
            numbers = [base, *(x.n for x in found)]
            if not all(a < b for a, b in pairwise(numbers)):
                raise Damaged(f"{what}: {key} are not in order, or not after record {base}")
        ended = None
        if f.has("ended"):
            row = f.array("ended", 4)
            if len(row) != 4 or not isinstance(row[0], int):
                raise Damaged(f"{what}: 'ended' is not 4 entries")
            ended = parse_ended(*header(row, "ended"))
        pins = f.map("pins")
        if not all(isinstance(number, int) for number in pins.values()):
            raise Damaged(f"{what}: a pin names no record")
        stones: Sequence[Any] = f.array("tombstones", n)
        if version == 1:  # it did not say which record buried one: at the latest this, so no fold below leaves it out
            stones = [[c, n] for c in stones]
        buried, abandoned = _graves(stones, base, n, version, what)
        state = cls(
            run=run,
            n=n,
            attempts=(*below.attempts, *attempts),
            checkpoints=points("checkpoints"),
            void=points("void"),
            damaged=MappingProxyType({number: str(why) for number, why in rows("damaged", 2)}),
            pins=MappingProxyType(pins),
            buried=MappingProxyType({**below.buried, **buried}),
            abandoned=MappingProxyType(abandoned),
            interventions=(*below.interventions, *interventions),
            ended=ended,
            needs=MappingProxyType(_newest(below.needs, needs)),
        )
        f.done()
        return state


def _number(row: AttemptInfo | Intervention) -> int:
    return row.n


def _start(interventions: Sequence[Intervention], epoch: int) -> StartPoint | None:
    """Of the last order behind this attempt that names one."""
    for found in reversed(interventions):
        if found.n < epoch:
            break
        if found.start is not None:
            return found.start
    return None


def _check_needs(needs: Mapping[str, Any], what: str) -> None:
    """OtherVersion where this hotstage cannot read a record that the state was folded from."""
    for kind, needed in needs.items():
        if type(needed) is not int or needed < 2:
            raise Damaged(f"{what}: 'needs' must be versions from 2 on, by kind of record")
        if needed > known_version(kind):
            raise OtherVersion(
                f"{what}: holds a record of kind {kind[:40]!r} and version {needed}, this hotstage "
                f"reads version {known_version(kind)}: use the hotstage that wrote it, or a newer one"
            )


def _graves(
    stones: Sequence[Any], base: int, n: int, version: int, what: str
) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """``buried`` and ``abandoned`` of a state with the records after ``base`` up to ``n``."""
    buried: dict[int, int] = {}
    abandoned: dict[tuple[int, int], int] = {}
    for stone in stones:
        match stone:
            case [int(c), int(by)] if base < by <= n and 0 < c <= n:
                buried[c] = by
            case [int(step), int(epoch), int(by)] if version > 2 and step >= 0 and 0 < epoch < by <= n:
                abandoned[step, epoch] = by
            case _:
                raise Damaged(f"{what}: a tombstone names no record, or no step of an attempt")
    return buried, abandoned


def _newest(some: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """Of both, by kind."""
    return {kind: max(some.get(kind, 0), others.get(kind, 0)) for kind in sorted({*some, *others})}


class Fold:
    """The state being folded, open for change. ``freeze`` gives it away: nothing is added after."""

    def __init__(self, state: RunState) -> None:
        self.base = state
        self.n = state.n
        self.attempts = list(state.attempts)
        self.checkpoints = state.checkpoints.copy()
        self.void = state.void.copy()
        self.damaged = dict(state.damaged)
        self.pins = dict(state.pins)
        self.buried = dict(state.buried)
        self.abandoned = dict(state.abandoned)
        self.interventions = list(state.interventions)
        self.ended = state.ended
        self.needs = state.needs
        self.steps: set[int] | None = None  # saved by the newest attempt, once it is asked

    def freeze(self, unreadable: str | None = None, *, newer: bool = False) -> RunState:
        return RunState(
            run=self.base.run,
            n=self.n,
            attempts=tuple(self.attempts),
            checkpoints=self.checkpoints,
            void=self.void,
            damaged=MappingProxyType(self.damaged),
            pins=MappingProxyType(self.pins),
            buried=MappingProxyType(self.buried),
            abandoned=MappingProxyType(self.abandoned),
            interventions=tuple(self.interventions),
            ended=self.ended,
            needs=self.needs,
            unreadable=unreadable,
            newer=newer,
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
                if attempt.checkpoint is not None and self.checkpoints.row_of(attempt.checkpoint) is None:
                    raise Damaged(f"{what}: restores from record {attempt.checkpoint}, which is no valid checkpoint")
                self.attempts.append(attempt)
                self.ended, self.steps, self.abandoned = None, set(), {}
            case "checkpoint":
                info = parse_checkpoint(r.n, r.epoch, r.time, r.body)
                late = (info.step, info.epoch) in self.abandoned
                if r.epoch != newest or newest == 0 or info.step in self._saved(newest) or late:
                    self.void.add(info)
                else:
                    self.checkpoints.add(info)
                    self._saved(newest).add(info.step)
            case "damaged":
                number, why = self._known(f), f.text("reason")
                self.damaged.setdefault(number, why)
            case "pin":
                number, name = self._known(f), f.text("name", 200)
                if number not in self.buried:  # too late: the collector may be at work
                    self.pins[name] = number
            case "unpin":
                self.pins.pop(f.text("name", 200), None)
            case "tombstone" if not f.has("checkpoint"):  # of a step that is not committed, and now never will be
                step, epoch = f.integer("step", 0, MAX_STEP), f.integer("epoch", 1, self.n)
                if epoch == newest and step not in self._saved(newest):
                    self.abandoned.setdefault((step, epoch), r.n)
            case "tombstone":
                number = self._known(f)
                start = _start(self.interventions, newest)
                named = {p.checkpoint for p in (*self.attempts[-1:], start) if p is not None}
                if number not in named and number not in self.pins.values():
                    self.buried.setdefault(number, r.n)
            case "intervention":
                found = parse_intervention(r.n, r.epoch, r.time, r.body)
                if found.start is not None and found.start.checkpoint is not None:
                    self._known(f)
                self.interventions.append(found)
            case "ended":
                self.ended = parse_ended(r.n, r.epoch, r.time, r.body)
            case "fold":
                fold_target(r)
        if r.v > 1:
            self.needs = MappingProxyType(_newest(self.needs, {r.kind: r.v}))
        self.n = r.n
        return self

    def _saved(self, epoch: int) -> set[int]:
        if self.steps is None:
            self.steps = set(self.checkpoints.steps_of(epoch))
        return self.steps

    def _known(self, f: codec.Fields) -> int:
        number = f.integer("checkpoint", 1, self.n)
        if self.checkpoints.row_of(number) is None:
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
