"""Checks of a schedule and of its messages, and the pass that puts the messages in. Decides nothing about memory.

Three doors, each pure, each raising PlanError that names the rank, the action and why:

- ``check_schedule``   compute-only or lowered rows: the numbered rules below
- ``insert_messages``  compute-only rows to rows with SEND and RECV
- ``check_lowered``    rows with messages: every send matched in order on its channel, no deadlock under rendezvous

Rules of a schedule, by number in the errors:

S1  a stage lives on one rank, and the stages are 0 .. P-1
S2  every stage has the microbatches 0 .. M-1, each with one F and either one B or one I and one W
S3  on a stage, F comes before I or B, and I before W, of the same microbatch
S4  on a stage, I or B ascend in the microbatch, and so do W or B: the sum of a gradient has one order
S5  the rows can run: following F up and B or I down the stages, no rank waits for ever
S6  no stage holds more microbatches than its bound

Rendezvous: a send completes only when its receive is posted, a rank does one thing at a time. That is the strictest
channel there is; lists that pass under it run on every channel that keeps the order of messages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import PlanError
from trainer.plan.schedules import Action, Rows, in_flight, stage_ranks

UNIT_COST = {"F": 1, "I": 1, "W": 1, "B": 2}
"""Relative times that place the messages; only ratios matter, and only for speed, never for correctness."""


def check_schedule(
    rows: Rows, stages: int | None = None, microbatches: int | None = None, bound: Sequence[int] | None = None
) -> None:
    """Refuses rows that break S1 to S6. ``bound[s]``: most microbatches that stage s may hold (None: no bound)."""
    ranks = stage_ranks(rows)
    count = stages if stages is not None else max(ranks, default=-1) + 1
    wrong = sorted(set(ranks) ^ set(range(count)))
    if count < 1 or wrong:
        has = "is missing" if wrong and wrong[0] < count else "is one too many"
        raise PlanError(f"S1: stage {wrong[0] if wrong else 0} {has}: the schedule must run stages 0 to {count - 1}")
    total = microbatches
    if total is None:
        total = max((action.microbatch for row in rows for action in row), default=-1) + 1
    for rank, row in enumerate(rows):
        _check_row(rank, row, total)
    _check_runs(rows, ranks)
    if bound is not None:
        for stage, peak in enumerate(in_flight(rows)):
            if peak > bound[stage]:
                raise PlanError(
                    f"S6: rank {ranks[stage]}, stage {stage}: {peak} microbatches in flight, the bound is "
                    f"{bound[stage]}; use 1f1b, or give the stage more memory"
                )


def _check_row(rank: int, row: Sequence[Action], microbatches: int) -> None:
    seen: dict[tuple[int, str, int], int] = {}
    newest: dict[tuple[int, str], int] = {}
    for place, action in enumerate(row):
        if not action.is_compute:
            continue
        stage, op, microbatch = action.stage, action.op, action.microbatch
        where = f"rank {rank}, action {place}, {action}"
        if microbatch >= microbatches:
            raise PlanError(f"S2: {where}: microbatch {microbatch} is beyond the last, {microbatches - 1}")
        for part in "IW" if op == "B" else op:
            if (stage, part, microbatch) in seen:
                raise PlanError(f"S2: {where}: {part} of stage {stage}, microbatch {microbatch} was already done")
            if part == "I" and (stage, "F", microbatch) not in seen:
                raise PlanError(f"S3: {where}: before its forward {stage}F{microbatch}")
            if part == "W" and (stage, "I", microbatch) not in seen:
                raise PlanError(f"S3: {where}: before its input gradient {stage}I{microbatch}")
            if part != "F":
                before = newest.get((stage, part), -1)
                if before > microbatch:
                    raise PlanError(f"S4: {where}: after microbatch {before}; backward microbatches ascend on a stage")
                newest[stage, part] = microbatch
            seen[stage, part, microbatch] = place
    for stage in sorted({action.stage for action in row}):
        for microbatch in range(microbatches):
            for part in "FIW":
                if (stage, part, microbatch) not in seen:
                    wanted = part if part == "F" else f"{part} (or B)"
                    raise PlanError(f"S2: rank {rank}: {wanted} of stage {stage}, microbatch {microbatch} is missing")


def _needs(action: Action, last_stage: int) -> tuple[int, str, int] | None:
    """What another stage must have done before this computation may start."""
    if action.op == "F" and action.stage > 0:
        return (action.stage - 1, "F", action.microbatch)
    if action.op in ("B", "I") and action.stage < last_stage:
        return (action.stage + 1, "I", action.microbatch)
    return None


def _check_runs(rows: Rows, ranks: Mapping[int, int]) -> None:
    last_stage = max(ranks)
    todo = [[action for action in row if action.is_compute] for row in rows]
    place = [0] * len(todo)
    done: set[tuple[int, str, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(todo):
            while place[rank] < len(row):
                action = row[place[rank]]
                need = _needs(action, last_stage)
                if need is not None and need not in done:
                    break
                done.add((action.stage, "I" if action.op == "B" else action.op, action.microbatch))
                place[rank] += 1
                moved = True
    for rank, row in enumerate(todo):
        if place[rank] < len(row):
            action = row[place[rank]]
            need = _needs(action, last_stage)
            assert need is not None
            raise PlanError(
                f"S5: rank {rank} can never start {action} (computation {place[rank]} of its row): it needs "
                f"{need[1]} of stage {need[0]}, microbatch {need[2]}, which rank {ranks[need[0]]} does not reach"
            )


def insert_messages(rows: Rows, stages: int) -> list[list[Action]]:
    """Compute-only rows with the messages between stages put in, so that rendezvous channels cannot deadlock.

    Every message takes one place in a single order of all that happens, and a rank's row is its share of that order:
    the first message not yet passed always has both its ends waiting for it. The order comes from playing the schedule
    with UNIT_COST; of messages that could go at the same time, the one made first goes first. A receive stands right
    before the computation that needs it, so that no buffer is taken early; a send stands right after the computation
    that made it, before the next one (GPipe and 1F1B always; a schedule whose rows make that impossible sends as soon
    as the receiver can take it). Stages on one rank exchange no message.

    >>> from trainer.plan.schedules import one_f_one_b
    >>> [str(a) for a in insert_messages(one_f_one_b(2, 2), 2)[1]]
    ['1RECV_F0', '1F0', '1B0', '1RECV_F1', '1SEND_B0', '1F1', '1B1', '1SEND_B1']
    """
    for rank, row in enumerate(rows):
        for place, action in enumerate(row):
            if not action.is_compute:
                raise PlanError(f"rank {rank}, action {place}, {action}: insert_messages takes compute-only rows")
    check_schedule(rows, stages)
    return _Player(rows, stages).play()


class _Player:
    """Plays compute-only rows on a clock of unit costs and writes down what each rank does, messages included."""

    def __init__(self, rows: Rows, stages: int) -> None:
        self.rows, self.last_stage, self.ranks = rows, stages - 1, stage_ranks(rows)
        self.place = [0] * len(rows)
        self.clock = [0] * len(rows)
        self.out: list[list[Action]] = [[] for _ in rows]
        self.made: dict[tuple[int, str, int], int] = {}  # results that exist, (stage, F or I, microbatch): since when
        self.here: set[tuple[int, str, int]] = set()  # results that their consumer has
        self.owed: list[set[tuple[int, str, int]]] = [set() for _ in rows]  # made on a rank and not yet sent

    def play(self) -> list[list[Action]]:
        while any(place < len(row) for place, row in zip(self.place, self.rows, strict=True)):
            best = self._choose(tight=True) or self._choose(tight=False)
            assert best is not None, "check_schedule lets through only what can run"
            _, is_compute, _, rank = best
            if is_compute:
                self._compute(rank)
            else:
                self._message(rank)
        return self.out

    def _choose(self, tight: bool) -> tuple[int, int, int, int] | None:
        """The earliest that can happen, messages first: (time, 1 for a computation, time of making, rank it is on)."""
        best: tuple[int, int, int, int] | None = None
        for rank, row in enumerate(self.rows):
            if self.place[rank] == len(row):
                continue
            need = _needs(row[self.place[rank]], self.last_stage)
            if need is None or need in self.here or (self.ranks[need[0]] == rank and need in self.made):
                option = None if tight and self.owed[rank] else (self.clock[rank], 1, 0, rank)
            elif need in self.made and self.ranks[need[0]] != rank:
                option = (max(self.clock[rank], self.clock[self.ranks[need[0]]]), 0, self.made[need], rank)
            else:
                option = None
            if option is not None and (best is None or option < best):
                best = option
        return best

    def _compute(self, rank: int) -> None:
        action = self.rows[rank][self.place[rank]]
        self.place[rank] += 1
        self.clock[rank] += UNIT_COST[action.op]
        self.out[rank].append(action)
        if action.op == "W":
            return
        key = (action.stage, "F" if action.op == "F" else "I", action.microbatch)
        self.made[key] = self.clock[rank]
        goes_to = action.stage + (1 if action.op == "F" else -1)
        if 0 <= goes_to <= self.last_stage and self.ranks[goes_to] != rank:
            self.owed[rank].add(key)

    def _message(self, receiver: int) -> None:
        action = self.rows[receiver][self.place[receiver]]
        need = _needs(action, self.last_stage)
        assert need is not None
        sender, kind = self.ranks[need[0]], "F" if need[1] == "F" else "B"
        self.out[sender].append(Action(need[0], f"SEND_{kind}", action.microbatch))
        self.out[receiver].append(Action(action.stage, f"RECV_{kind}", action.microbatch))
        self.clock[sender] = self.clock[receiver] = max(self.clock[sender], self.clock[receiver])
        self.owed[sender].discard(need)
        self.here.add(need)


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a message, as a rank's list has it. ``label`` is the same at both ends; ``text`` is for people."""

    channel: Hashable
    is_send: bool
    label: Hashable
    text: str


def check_channels(rows: Sequence[Sequence[Message]]) -> None:
    """Every send is matched by a receive of the same label, in order on its channel, and rendezvous does not deadlock.

    A channel has one sending and one receiving rank. Works on any messages, those of the optimizer step included: the
    lowering pass calls it on what it wrote into the plan.
    """
    ends: dict[tuple[Hashable, bool], int] = {}
    lists: dict[tuple[Hashable, bool], list[tuple[int, int, Message]]] = {}
    for rank, row in enumerate(rows):
        for place, message in enumerate(row):
            key = (message.channel, message.is_send)
            if ends.setdefault(key, rank) != rank:
                end = "sending" if message.is_send else "receiving"
                raise PlanError(
                    f"rank {rank}, message {place}, {message.text}: the {end} end of channel {message.channel} belongs "
                    f"to rank {ends[key]}; a channel has one rank at each end"
                )
            lists.setdefault(key, []).append((rank, place, message))
    for channel, is_send in lists:
        ours, theirs = lists[channel, is_send], lists.get((channel, not is_send), [])
        for number, (rank, place, message) in enumerate(ours):
            where = f"rank {rank}, message {place}, {message.text}"
            if number >= len(theirs):
                want = "receive" if is_send else "send"
                raise PlanError(f"{where}: no {want} matches it: channel {channel} has {len(theirs)} of them")
            other_rank, other_place, other = theirs[number]
            if other.label != message.label:
                raise PlanError(
                    f"{where}: is number {number} on channel {channel}, where rank {other_rank} (message "
                    f"{other_place}) has {other.text}; both ends of a channel must keep one order"
                )
    _rendezvous(rows, ends)


def _rendezvous(rows: Sequence[Sequence[Message]], ends: Mapping[tuple[Hashable, bool], int]) -> None:
    place = [0] * len(rows)
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(rows[rank]):
            mine = rows[rank][place[rank]]
            peer = ends[mine.channel, not mine.is_send]
            if peer == rank:
                raise PlanError(
                    f"rank {rank}, message {place[rank]}, {mine.text}: a rank sends to itself; both ends block"
                )
            if place[peer] == len(rows[peer]):
                break
            other = rows[peer][place[peer]]
            if other.channel != mine.channel or other.is_send == mine.is_send:
                break
            place[rank] += 1
            place[peer] += 1
            ready.append(peer)
    blocked = [
        f"rank {rank} at message {place[rank]}, {row[place[rank]].text}, waits for rank "
        f"{ends[row[place[rank]].channel, not row[place[rank]].is_send]}"
        for rank, row in enumerate(rows)
        if place[rank] < len(row)
    ]
    if blocked:
        raise PlanError("deadlock under rendezvous-only channels: " + "; ".join(blocked))


def check_lowered(rows: Rows) -> None:
    """The schedule with its messages: S1 to S5, then each message is where its computation needs it, then the channels.

    A channel is (kind, sending stage, receiving stage). Stages on one rank need no message, and may have none.
    """
    check_schedule(rows)
    ranks = stage_ranks(rows)
    last_stage = max(ranks)
    for rank, row in enumerate(rows):
        _check_placement(rank, row, ranks, last_stage)
    check_channels(
        [
            [
                Message((action.op[-1], *action.edge), action.is_send, action.microbatch, str(action))
                for action in row
                if not action.is_compute
            ]
            for row in rows
        ]
    )


def _check_placement(rank: int, row: Sequence[Action], ranks: Mapping[int, int], last_stage: int) -> None:
    done: set[Action] = set()
    for place, action in enumerate(row):
        where = f"rank {rank}, action {place}, {action}"
        if action in done:
            raise PlanError(f"{where}: was already done")
        if action.is_compute:
            need = _needs(action, last_stage)
            if need is not None and ranks[need[0]] != rank:
                receive = Action(action.stage, f"RECV_{'F' if need[1] == 'F' else 'B'}", action.microbatch)
                if receive not in done:
                    raise PlanError(f"{where}: needs {receive} before it")
        else:
            sender, receiver = action.edge
            other = receiver if action.is_send else sender
            if other not in ranks:
                raise PlanError(f"{where}: there is no stage {other}")
            if ranks[other] == rank:
                raise PlanError(f"{where}: stages {sender} and {receiver} share rank {rank}; they need no message")
            if action.op == "SEND_F" and Action(action.stage, "F", action.microbatch) not in done:
                raise PlanError(f"{where}: before {action.stage}F{action.microbatch} has made what it sends")
            made = {Action(action.stage, op, action.microbatch) for op in ("B", "I")}
            if action.op == "SEND_B" and not made & done:
                raise PlanError(f"{where}: before the backward of stage {action.stage} has made what it sends")
        done.add(action)
    for action in row:
        if action.op in ("F", "B", "I"):
            up = action.op == "F"
            other = action.stage + (1 if up else -1)
            send = Action(action.stage, "SEND_F" if up else "SEND_B", action.microbatch)
            if 0 <= other <= last_stage and ranks[other] != rank and send not in done:
                raise PlanError(f"rank {rank}: {action} is never sent on: {send} is missing")
