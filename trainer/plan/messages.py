"""Puts the messages between stages into a schedule of computations, so that rendezvous channels cannot deadlock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.places import Pipeline, Position
from trainer.plan.rows import OPS, RECV_B, RECV_F, SEND_B, SEND_F, F, Row, Rows, W, columns
from trainer.plan.rules import check_rules, needs
from trainer.plan.schedules import Say, in_words

UNIT_COST = {"F": 1, "I": 1, "W": 1, "B": 2}
"""Relative times that place the messages; only ratios matter, and only for speed, never for correctness."""

_NEVER = np.iinfo(np.int32).max


def insert_messages(rows: Rows, stages: int) -> list[Row]:
    """Compute-only rows with the messages between stages put in, so that rendezvous channels cannot deadlock.

    Every message takes one place in a single order of all that happens, and a position's row is its share of that
    order: the first message not yet passed always has both its ends waiting for it. The order comes from playing the
    schedule with UNIT_COST; of messages that could go at the same time, the one made first goes first. A receive stands
    right before the computation that needs it, so that no buffer is taken early. Where each position has one stage, a
    send stands right after the computation that made it, before the next one (GPipe and 1F1B always; a schedule whose
    rows make that impossible sends as soon as the receiver can take it). Where some position has several, neighbours
    are seldom free at once: a position that has something to compute goes on, and sends when the receiver comes to it.
    Stages at one position exchange no message.

    >>> from trainer.plan.schedules import one_f_one_b
    >>> [str(a) for a in insert_messages(one_f_one_b(2, 2), 2)[1]]
    ['1RECV_F0', '1F0', '1B0', '1RECV_F1', '1SEND_B0', '1F1', '1B1', '1SEND_B1']
    """
    listed = columns(rows)
    for position, row in enumerate(listed):
        for place in np.flatnonzero(~row.compute)[:1]:
            where = f"position {position}, action {place}, {row[int(place)]}"
            raise PlanError(f"{where}: insert_messages takes compute-only rows")
    return play(listed, check_rules(listed, stages))


def play(rows: Sequence[Row], pipeline: Pipeline, say: Say = in_words) -> list[Row]:
    """The rows with their messages, of compute-only rows that keep S1 to S4. PlanError (S5) where they cannot run.

    ``say`` names a place to people."""
    return _Player(rows, pipeline, say).play()


class _Player:
    """Plays compute-only rows on a clock of unit costs and writes down what each position does, messages included.

    What happens next is always the earliest that can: a message when both its positions have come to it, a computation
    when it has what it needs and its position owes no message (``eager``: or owes some). At one time messages go first,
    by when they were made, then by the receiving position. So all that happens at a time is played at once, on columns
    of all positions: first its messages, then its computations (they take time, so nothing that they make can happen at
    that time). Where every position owes, one computation goes ahead of its position's sends.

    Results are numbered, forwards by (stage, microbatch), then input gradients likewise; two more numbers stand for
    what is always there and what never comes.
    """

    def __init__(self, rows: Sequence[Row], pipeline: Pipeline, say: Say) -> None:
        self.rows, self.pipeline, self.say = rows, pipeline, say
        stages, lanes = pipeline.stages, len(rows)
        microbatches = 1 + max(int(row.microbatch.max(initial=-1)) for row in rows)
        count = 2 * stages * microbatches
        self.always, self.never = count, count + 1
        of_stage = pipeline.column
        self.made = np.full(count + 2, _NEVER, np.int32)  # by result: since when it exists
        self.here = np.zeros(count + 2, np.bool_)  # by result: its consumer has it
        self.here[self.always] = True
        # By computation, the positions' rows one after the other, each closed by one that never runs
        lengths = [len(row) + 1 for row in rows]
        self.starts = np.cumsum([0, *lengths[:-1]])
        total = sum(lengths)
        self.need = np.full(total, self.never, np.int32)
        self.source = np.zeros(total, np.int32)  # the position that makes what is needed; its own where nothing is
        self.gives = np.full(total, self.never, np.int32)
        self.goes = np.zeros(total, np.int8)  # the result: 1 to another position, 0 to nobody, -1 to a stage here
        self.op = np.zeros(total, np.uint8)
        self.stage, self.microbatch = np.zeros(total, np.int32), np.zeros(total, np.int32)
        length = np.zeros(lanes, np.int64)  # of the rows to write
        for position, row in enumerate(rows):
            mine = slice(self.starts[position], self.starts[position] + len(row))
            other, forward = needs(row, stages - 1)
            self.op[mine], self.stage[mine], self.microbatch[mine] = row.op, row.stage, row.microbatch
            half = np.where(forward, 0, stages)
            self.need[mine] = np.where(other < 0, self.always, (half + other) * microbatches + row.microbatch)
            self.source[mine] = np.where(other < 0, position, of_stage[other])
            self.gives[mine] = np.where(row.op == W, self.never, (half + row.stage) * microbatches + row.microbatch)
            to = np.where(forward, row.stage + 1, row.stage - 1)
            taken = (row.op != W) & (to >= 0) & (to < stages)
            away = of_stage[np.where(taken, to, 0)] != position
            self.goes[mine] = np.where(taken, np.where(away, 1, -1), 0)
            received = np.count_nonzero(self.source[mine] != position)
            length[position] = len(row) + received + np.count_nonzero(taken & away)
        # What the positions do, row after row: for which computation; 1 is the send that it needs, 2 the receive
        self.ends = np.cumsum(length)
        self.cursor = self.ends - length
        self.what, self.kind = np.zeros(int(length.sum()), np.int32), np.zeros(int(length.sum()), np.uint8)
        self.turn = np.full(lanes, lanes, np.int32)  # by position, its place in what is done at a time
        self.cost = np.array([UNIT_COST.get(op, 0) for op in OPS], np.int32)
        self.place = self.starts.copy()
        self.wants, self.whose = self.need[self.place], self.source[self.place]  # of each position's next computation
        self.clock = np.zeros(lanes, np.int32)
        self.eager = max(map(len, pipeline.chunks)) > 1  # a send waits for its receiver, not the position for it
        self.owes = np.zeros(lanes, np.int32)  # results made at a position, for another, not yet sent

    def play(self) -> list[Row]:
        while True:
            has, made = self.here[self.wants], self.made[self.wants]
            meets = np.maximum(self.clock, self.clock[self.whose])
            message = np.where(has | (made == _NEVER), _NEVER, meets)
            compute = np.where(has & ((self.owes == 0) | self.eager), self.clock, _NEVER)
            now = min(message.min(), compute.min())
            if now == _NEVER:
                ahead = np.where(has, self.clock, _NEVER)
                position = int(ahead.argmin())
                if ahead[position] == _NEVER:
                    break
                self._compute(np.array([position]))
                continue
            receivers = np.flatnonzero(message == now)
            if len(receivers):
                receivers = receivers[np.argsort(made[receivers], kind="stable")]
                self._send(receivers, self.whose[receivers], self.wants[receivers], now)
                has[receivers] = True
                compute = np.where(has & ((self.owes == 0) | self.eager), self.clock, _NEVER)
            ready = np.flatnonzero(compute == now)
            if len(ready):
                self._compute(ready)
        self._finished()
        return self._rows()

    def _compute(self, positions: NDArray[np.intp]) -> None:
        """Each of ``positions`` does its next computation."""
        place, at = self.place[positions], self.cursor[positions]
        self.what[at] = place
        clock = self.clock[positions] + self.cost[self.op[place]]
        self.cursor[positions], self.clock[positions], self.place[positions] = at + 1, clock, place + 1
        self.wants[positions], self.whose[positions] = self.need[place + 1], self.source[place + 1]
        gives, goes = self.gives[place], self.goes[place]
        self.made[gives] = clock
        self.made[self.never] = _NEVER
        self.owes[positions] += goes > 0
        self.here[gives[goes < 0]] = True

    def _send(
        self, receivers: NDArray[np.intp], senders: NDArray[np.int32], results: NDArray[np.int32], now: np.int32
    ) -> None:
        """Messages of one time, in order, each to the next computation of its receiver."""
        sends = np.bincount(senders, minlength=len(self.owes)).astype(np.int32)
        if sends.max() > 1:
            for wave in _waves(senders.tolist(), receivers.tolist()):
                self._send(receivers[wave], senders[wave], results[wave], now)
            return
        place, number = self.place[receivers], np.arange(len(receivers), dtype=np.int32)
        second = []  # of each end: whether its position stands at the other end of an earlier one of these messages
        ends: tuple[NDArray[np.signedinteger], ...] = (senders, receivers)
        for mine, others in (ends, ends[::-1]):
            self.turn[others] = number
            second.append(self.turn[mine] < number)
            self.turn[others] = len(self.turn)
        sent, received = self.cursor[senders] + second[0], self.cursor[receivers] + second[1]
        self.what[sent] = self.what[received] = place
        self.kind[sent], self.kind[received] = 1, 2
        self.clock[senders] = self.clock[receivers] = now
        self.cursor[senders] += 1
        self.cursor[receivers] += 1
        self.owes -= sends
        self.here[results] = True

    def _rows(self) -> list[Row]:
        """What was done, position by position."""
        del self.made, self.here, self.need, self.source, self.gives  # room for what follows
        rows = []
        first = 0
        for end in self.ends.tolist():
            what, kind = self.what[first:end], self.kind[first:end]
            op, stage, first = self.op[what], self.stage[what], end
            forward = op == F
            message = np.where(forward, SEND_F, SEND_B) + (kind == 2)
            sender = np.where(forward, stage - 1, stage + 1)
            op = np.where(kind == 0, op, message).astype(np.uint8)
            stage = np.where(kind == 1, sender, stage).astype(np.int32)
            rows.append(_own(Row(op, stage, self.microbatch[what])))
        return rows

    def _finished(self) -> None:
        stands = (self.place - self.starts).tolist()
        late = next((Position(p) for p, row in enumerate(self.rows) if stands[p] < len(row)), None)
        if late is None:
            return
        circle: list[Position] = []
        while late not in circle:
            circle.append(late)
            late = self._waits_for(late, stands)[1]
        texts = []
        for position in circle[circle.index(late) :]:
            what, other = self._waits_for(position, stands)
            action = f"{self.say(position, stands[position])}, {self.rows[position][stands[position]]}"
            texts.append(f"{action}, needs {what}, which is {self.say(other)}'s")
        position = circle[0]
        what, other = self._waits_for(position, stands)
        raise PlanError(
            f"S5: {self.say(position)} can never start {self.rows[position][stands[position]]} (computation "
            f"{stands[position]} of its row): it needs {what}, which {self.say(other)} does not reach; they wait for "
            f"one another: {'; '.join(texts)}"
        )

    def _waits_for(self, position: Position, stands: Sequence[int]) -> tuple[str, Position]:
        """What a position that cannot go on needs, and whose that is."""
        at = stands[position]
        action = self.rows[position][at]
        other = int(needs(self.rows[position].take(slice(at, at + 1)), self.pipeline.stages - 1)[0][0])
        part = "F" if action.op == "F" else "I"
        return f"{part} of stage {other}, microbatch {action.microbatch}", self.pipeline.of_stage[other]


def _waves(senders: Sequence[int], receivers: Sequence[int]) -> list[list[int]]:
    """The messages in as few groups as keep every position's order and have each sender once; all receivers differ."""
    waves: list[list[int]] = []
    touched, sent = dict[int, int](), dict[int, int]()  # by position, the wave of its last message, of its last send
    for number, (sender, receiver) in enumerate(zip(senders, receivers, strict=True)):
        wave = max(touched.get(sender, 0), touched.get(receiver, 0), sent.get(sender, -1) + 1)
        touched[sender] = touched[receiver] = sent[sender] = wave
        if wave == len(waves):
            waves.append([])
        waves[wave].append(number)
    return waves


def _own(row: Row) -> Row:
    """The same row, without memory for a column of one stage."""
    alone = row.only_stage
    return row if alone is None else Row.of_stage(alone, row.op, row.microbatch)


def free_slots_early(rows: Rows) -> list[Row]:
    """The same messages, but a gradient leaves before the next activation enters, so that one slot serves both.

    Where stage s has ``RECV_F, SEND_B`` side by side and stage s-1 the matching ``SEND_F, RECV_B``, both pairs change
    places at once: two messages between the same two positions, next to each other at both ends, always may.
    Under 1F1B stage s then needs min(P - s, M) slots.
    """
    listed = columns(rows)
    names = [row.stages()[0].tolist() for row in listed]
    positions = {stage: position for position, mine in enumerate(names) for stage in mine}
    microbatches = 1 + max((int(row.microbatch.max(initial=-1)) for row in listed), default=-1)
    sends = np.full((1 + max(positions, default=-1), microbatches), -1, np.int64)  # where a SEND_F stands in its row
    out = []
    for row in listed:
        places = np.flatnonzero(row.op == SEND_F)
        sends[row.stage[places], row.microbatch[places]] = places
        out.append(Row(row.op.copy(), row.stage, row.microbatch.copy()))
    moved = [np.flatnonzero(row.op == RECV_F) for row in out]
    while any(len(places) for places in moved):
        moved = [
            _swap(out, row, places, mine, positions, sends) for row, places, mine in zip(out, moved, names, strict=True)
        ]
    return out


def _swap(
    rows: Sequence[Row],
    row: Row,
    receives: NDArray[np.intp],
    stages: Sequence[int],
    positions: Mapping[int, int],
    sends: NDArray[np.int64],
) -> NDArray[np.intp]:
    """Lets each RECV_F at ``receives`` change places with the SEND_B after it where it may; where these then stand."""
    receives = receives[receives + 1 < len(row)]
    receives = receives[(row.op[receives + 1] == SEND_B) & (row.stage[receives] == row.stage[receives + 1])]
    moved = []
    for stage in stages:
        places = receives[row.stage[receives] == stage]
        if not len(places):
            continue
        below = rows[positions[stage - 1]]
        at = sends[stage - 1, row.microbatch[places]]
        last = at + 1 == len(below)
        after = np.where(last, at, at + 1)
        fits = ~last & (below.op[after] == RECV_B) & (below.stage[after] == stage - 1)
        fits &= below.microbatch[after] == row.microbatch[places + 1]
        places, at = places[fits], at[fits]
        sends[stage - 1, row.microbatch[places]] += 1
        for mine, first in ((row, places), (below, at)):
            for column in (mine.op, mine.microbatch):
                column[first], column[first + 1] = column[first + 1], column[first]
        moved.append(places + 1)
    return np.concatenate(moved) if moved else receives[:0]


assert (RECV_F, RECV_B) == (SEND_F + 1, SEND_B + 1)  # a receive comes after its send among operations
