"""The head shared by several positions: where its parts are, and when each is computed and its messages pass.

A part is some blocks of the vocabulary (``train.vocab_blocks``), at one position. It is a stage of its own, numbered
behind the model's: part 0 is stage S, at the last stage's position, part j stage S + j. For a microbatch

    F of the last stage    gives the head's input, which part 0 reads where it lies
    SPREAD                 takes it to the other parts
    F of a part            its logits and their sums
    SHARE                  every part's sums to every other (12 bytes a row)
    B of a part            its share of the gradients: of its rows of the matrix, and of the head's input
    JOIN                   the others' shares to the last stage, whose B (or I) begins with adding them up

``with_parts`` puts parts and messages into the rows of a schedule: it plays them on a clock, each position's own
computations in their order, a part's as soon as what it needs is there. What happens takes one place in a single order
of all that happens, messages and exchanges of several positions too, and a position's row is its share of that order;
so rendezvous channels cannot deadlock (``messages.py``). The last stage's B waits for two rounds of messages. Where
stages have done so many forwards more before their first backward (``forwards_first``), others compute meanwhile.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import PlanError
from trainer.plan.check import check_placement
from trainer.plan.places import Pipeline, Position, Stage
from trainer.plan.rows import JOIN, OPS, RECV_B, RECV_F, SEND_B, SEND_F, SHARE, SPREAD, B, F, I, Row
from trainer.plan.rules import check_rules

AHEAD = (0, 1, 2)
"""Forwards more that stages may do before their first backward: a round of messages takes one."""

HELD = max(AHEAD) + 1
"""Microbatches that parts may have begun and the last stage not used: a slot each."""

Times = Mapping[tuple[Stage, str], float]
"""What an operation on a stage lasts; only ratios matter, and only for speed, never for correctness."""


@dataclass(frozen=True)
class HeadParts:
    """The positions of the parts, part 0's first; ``stages``: of the model."""

    positions: tuple[Position, ...]
    stages: int

    @classmethod
    def of(cls, count: int, pipeline: Pipeline) -> HeadParts:
        """So many parts, at the last stage's position and at those nearest to it.

        >>> HeadParts.of(2, Pipeline.in_turn(4)).positions
        (3, 2)
        """
        near = sorted(map(Position, range(pipeline.positions)), key=lambda p: (abs(p - pipeline.last), p))
        return cls(tuple(near[:count]), pipeline.stages)

    @property
    def last(self) -> Stage:
        """The last stage of the model."""
        return Stage(self.stages - 1)

    def stage(self, part: int) -> Stage:
        """The number of a part as a stage."""
        return Stage(self.stages + part)

    def at(self, position: Position) -> int | None:
        """The part that a position has."""
        return self.positions.index(position) if position in self.positions else None


def forwards_first(row: Row, count: int) -> Row:
    """The same computations, ``count`` forwards more before the first backward.

    >>> from trainer.plan.schedules import one_f_one_b
    >>> " ".join(map(str, forwards_first(one_f_one_b(1, 4)[0], 1)))
    '0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3'
    """
    forward = np.equal(row.op, F)
    kinds = np.flatnonzero(forward)
    if not count or not len(kinds):
        return row
    early = np.concatenate([np.full(min(count, len(kinds)), -1), kinds[: -count or None]])[: len(kinds)]
    place = np.arange(len(row), dtype=np.float64)
    place[kinds] = early + np.linspace(0, 0.5, len(kinds))
    return row.take(np.argsort(place, kind="stable"))


def with_parts(rows: Sequence[Row], pipeline: Pipeline, parts: HeadParts, times: Times) -> tuple[Row, ...]:
    """The rows with parts and all messages: of those that AHEAD gives, the quickest (of two, the one with less in
    flight). PlanError where none can run."""
    best: tuple[float, tuple[Row, ...]] | None = None
    refused: PlanError | None = None
    for count in AHEAD:
        try:
            player = _Player([forwards_first(row, count) for row in rows], pipeline, parts, times)
            end = player.play()
        except PlanError as error:
            refused = error
            continue
        if best is None or end < best[0] * (1 - 1e-9):
            best = end, player.rows()
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def check_parts(rows: Sequence[Row], parts: HeadParts) -> None:
    """Refuses rows with parts whose computations come before what they need, or whose messages are not there."""
    check_rules(rows, parts.stages + len(parts.positions))
    own = [row.take(np.flatnonzero((row.stage < parts.stages) & (row.op < SPREAD))) for row in rows]
    check_placement(own)
    for number, row in enumerate(rows):
        position = Position(number)
        part = parts.at(position)
        place = {(a.stage, a.op, a.microbatch): at for at, a in enumerate(row)}
        for action in row:
            for before in _before(parts, part, action.stage, action.op, action.microbatch):
                at, needed = place[action.stage, action.op, action.microbatch], place.get(before, len(row))
                if needed > at:
                    what = f"{before[0]}{before[1]}{before[2]}"
                    raise PlanError(f"position {position}, action {at}, {action}: needs {what} before it")


def _before(parts: HeadParts, part: int | None, stage: Stage, op: str, microbatch: int) -> list[tuple[Stage, str, int]]:
    """What must stand before an action in the same row, for the head's sake."""
    last = parts.last
    if op in ("B", "I") and stage == last:
        return [(parts.stage(0), "B", microbatch), (last, "JOIN", microbatch)]
    if part is None or (stage, op) not in ((parts.stage(part), "F"), (parts.stage(part), "B")):
        return []
    if op == "F":
        return [(last, "F", microbatch) if part == 0 else (parts.stage(part), "SPREAD", microbatch)]
    sent = [(parts.stage(part), "F", microbatch), (parts.stage(part), "SHARE", microbatch)]
    return sent if part else [*sent, (last, "SPREAD", microbatch)]


class _Player:
    """Plays the computations of all positions, and writes down what each does."""

    def __init__(self, rows: Sequence[Row], pipeline: Pipeline, parts: HeadParts, times: Times) -> None:
        self.pipeline, self.parts, self.times = pipeline, parts, times
        self.base = [list(zip(r.op.tolist(), r.stage.tolist(), r.microbatch.tolist(), strict=True)) for r in rows]
        self.next = [0] * len(rows)
        self.clock = [0.0] * len(rows)
        self.done: dict[tuple[int, int, int], float] = {}  # forwards and input gradients: (F or B, stage, microbatch)
        self.sent: set[tuple[int, int, int]] = set()  # results that a message has brought, spread inputs, shares
        self.inputs: list[list[int]] = [[] for _ in parts.positions]  # by part, microbatches whose F is to come
        self.grads: list[list[int]] = [[] for _ in parts.positions]
        self.begun = [0] * len(parts.positions)  # by part, how many F it has done
        self.shared: list[int] = []  # microbatches whose shares wait for the last stage to take them
        self.joined = 0  # how many it has taken and used
        self.out: list[list[tuple[int, int, int]]] = [[] for _ in rows]
        self.order = 0
        self.events: list[tuple[float, int, tuple[int, int, int]]] = []  # results that leave when they are made

    def rows(self) -> tuple[Row, ...]:
        """What was written down."""
        columns = [np.array(row, np.int64).reshape(-1, 3).T for row in self.out]
        return tuple(Row(op.astype(np.uint8), st.astype(np.int32), mb.astype(np.int32)) for op, st, mb in columns)

    def play(self) -> float:
        """Until nothing is left; when that is."""
        positions = range(len(self.base))
        waiting = [(*found, p) for p in positions if (found := self._next(p)) is not None]
        heapq.heapify(waiting)
        while waiting or self.events:
            if self.events and (not waiting or self.events[0][0] <= waiting[0][0]):
                touched = self._leave(heapq.heappop(self.events)[2])
            else:
                start, _, what, position = heapq.heappop(waiting)
                if self._next(position) != (start, _, what):
                    continue  # something else came first
                touched = self._do(Position(position), what, start)
            for p in touched:
                found = self._next(p)
                if found is not None:
                    heapq.heappush(waiting, (*found, p))
        for position in positions:
            if self.next[position] < len(self.base[position]):
                op, stage, microbatch = self.base[position][self.next[position]]
                raise PlanError(
                    f"S5: position {position} can never start {stage}{OPS[op]}{microbatch}: with the head in parts "
                    "its schedule waits for itself; take parallel.vocab_stages = 1, or another schedule"
                )
        return max(self.clock)

    def _next(self, position: int) -> tuple[float, int, tuple[int, int, int]] | None:
        """When a position's next computation can start, how urgent it is among those of one time, and which it is."""
        found: list[tuple[float, int, tuple[int, int, int]]] = []
        clock, part = self.clock[position], self.parts.at(Position(position))
        if part is not None:
            stage = self.parts.stage(part)
            free = self.begun[part] < self.joined + HELD
            for urgency, op, list_ in ((0, B, self.grads[part]), (1, F, self.inputs[part] if free else [])):
                if list_:
                    made = self._made(op, list_[0])
                    found.append((max(clock, made), urgency, (op, stage, list_[0])))
        if self.next[position] < len(self.base[position]):
            op, stage, microbatch = self.base[position][self.next[position]]
            ready = self._ready(op, stage, microbatch)
            if ready is not None:
                found.append((max(clock, ready), 2, (op, stage, microbatch)))
        return min(found, default=None)

    def _made(self, op: int, microbatch: int) -> float:
        """When what a part needs is there, of a microbatch that it may do."""
        if op == F:
            return self.done[F, self.parts.last, microbatch]
        return max(self.done[F, self.parts.stage(n), microbatch] for n in range(len(self.parts.positions)))

    def _ready(self, op: int, stage: int, microbatch: int) -> float | None:
        """When what a stage's computation needs is there; None: not yet known."""
        if op == F:
            return 0.0 if stage == 0 else self.done.get((F, stage - 1, microbatch))
        if op not in (B, I):
            return 0.0
        if stage < self.parts.last:
            return self.done.get((B, stage + 1, microbatch))
        if self.joined >= len(self.shared) or self.shared[self.joined] != microbatch:
            return None
        return max(self.done[B, self.parts.stage(n), microbatch] for n in range(len(self.parts.positions)))

    def _do(self, position: Position, what: tuple[int, int, int], start: float) -> set[int]:
        """A computation, behind the messages that it needs; the positions for which something is new."""
        op, stage, microbatch = what
        parts = self.parts
        end = start + self.times[Stage(stage), OPS[op]]
        self.clock[position] = end
        if stage >= parts.stages:
            part = stage - parts.stages
            if op == F:
                self._spread(microbatch)
                self.inputs[part].pop(0)
                self.begun[part] += 1
            else:
                self.grads[part].pop(0)
        else:
            self.next[position] += 1
            if op == F and stage > 0:
                self._message(F, stage - 1, stage, microbatch)
        self.out[position].append(what)
        kind = F if op == F else B
        if op in (F, B, I):
            self.done[kind, stage, microbatch] = end
            self.order += 1
            heapq.heappush(self.events, (end, self.order, (kind, stage, microbatch)))
        touched = {int(position)}
        if stage == parts.last and op == F:
            for queue in self.inputs:
                queue.append(microbatch)
            touched |= set(parts.positions)
        elif stage == parts.last and op in (B, I):
            self.joined += 1
            self._join()
            touched |= set(parts.positions)
        elif stage < parts.last and op == F:
            touched.add(self.pipeline.position(Stage(stage + 1)))
        if op in (B, I) and 0 < stage < parts.stages:
            touched.add(self.pipeline.position(Stage(stage - 1)))
        return touched

    def _leave(self, result: tuple[int, int, int]) -> set[int]:
        """What is sent when a result is made: gradients, and sums and shares when the last of them is there. The
        positions for which something is new."""
        kind, stage, microbatch = result
        parts = self.parts
        if stage >= parts.stages:
            others = [(kind, parts.stage(n), microbatch) for n in range(len(parts.positions))]
            whole = (SHARE if kind == F else JOIN, -1, microbatch)
            if any(other not in self.done for other in others) or whole in self.sent:
                return set()
            if max(self.done[other] for other in others) > self.done[result]:
                return set()
            self.sent.add(whole)
            if kind == F:
                for n, position in enumerate(parts.positions):
                    self.out[position].append((SHARE, parts.stage(n), microbatch))
                    self.grads[n].append(microbatch)
                return set(parts.positions)
            self.shared.append(microbatch)
            self._join()
            return {parts.positions[0]}
        if kind == B and stage > 0:
            self._message(B, stage, stage - 1, microbatch)
        return set()

    def _join(self) -> None:
        """The next microbatch's shares go to the last stage, when it has used those before: they have one place."""
        parts = self.parts
        if self.joined >= len(self.shared) or (JOIN, self.joined, 0) in self.sent:
            return
        self.sent.add((JOIN, self.joined, 0))
        microbatch = self.shared[self.joined]
        for n, position in enumerate(parts.positions):
            self.out[position].append((JOIN, parts.stage(n) if n else parts.last, microbatch))

    def _spread(self, microbatch: int) -> None:
        """The head's input goes to the other parts, when the first of them is to compute."""
        parts = self.parts
        if (SPREAD, -1, microbatch) in self.sent:
            return
        self.sent.add((SPREAD, -1, microbatch))
        for n, position in enumerate(parts.positions):
            self.out[position].append((SPREAD, parts.stage(n) if n else parts.last, microbatch))

    def _message(self, kind: int, sender: int, receiver: int, microbatch: int) -> None:
        at, to = self.pipeline.position(Stage(sender)), self.pipeline.position(Stage(receiver))
        if at != to:
            self.out[at].append((SEND_F if kind == F else SEND_B, sender, microbatch))
            self.out[to].append((RECV_F if kind == F else RECV_B, receiver, microbatch))
