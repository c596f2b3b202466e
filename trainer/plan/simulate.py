"""Times a plan before it runs: every instruction's seconds from a cost model, played over the ranks' lists.

Owns the cost model and the event simulation; ``flops.py`` counts operations. It reads lists of ``Instruction``, one a
rank: ``from_plan`` makes them from a compiled plan, ``from_rows`` from a bare schedule. The same code times two
processes and a cluster.

The model of a message: it starts when what makes it is done, wherever the list has its send;
the sender is busy for bytes / bandwidth; the receiver has it a latency after the sender is done, and waits from
where it asked. What replicas exchange leaves behind, one message after the other, while the rank computes, and is
waited for where it is read. With ``rendezvous`` the send stays at its place, and the sender of any other message also
waits until the receiver asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.errors import PlanError
from trainer.plan.compiled import Plan
from trainer.plan.flops import Dims, kernel_flops
from trainer.plan.places import Rank, Ranks, Replica, Stage
from trainer.plan.records import ActionList, BoundAction, BoundCall, PositionPlan, Ref
from trainer.plan.rows import OPS, Action, Rows, columns
from trainer.plan.schedules import stage_positions
from trainer.plan.timeline import COMPUTE_KINDS, EventList, EventRow, Label, Timeline, kind_of
from trainer.plan.turns import Turns


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a rank does next: compute for ``seconds``, or one end of a message of ``bytes`` on ``channel``.

    ``kind`` is one of ``timeline.KINDS``. Messages of a channel match in order; ``model_flops`` feeds MFU.
    """

    action: str
    kind: str
    seconds: float = 0.0
    channel: int | None = None
    bytes: int = 0
    microbatch: int | None = None
    model_flops: float = 0.0
    behind: bool = False
    """A send that leaves while its rank goes on, also where others wait for their receivers: one of an exchange."""


class InstructionList(Sequence[Instruction]):
    """A rank's instructions as columns, read as a sequence of ``Instruction``.

    Few instructions of a list differ by more than their microbatch: ``patterns`` are the different ones, ``which`` says
    which an instruction is. Where ``microbatch`` is not -1, it closes the action's text.
    """

    __slots__ = ("microbatch", "patterns", "which")

    def __init__(
        self, patterns: Sequence[Instruction], which: NDArray[np.unsignedinteger], microbatch: NDArray[np.int32]
    ) -> None:
        self.patterns, self.which, self.microbatch = patterns, which, microbatch

    @classmethod
    def of(cls, row: Sequence[Instruction]) -> InstructionList:
        """The same instructions as columns; a list of columns stays as it is."""
        if isinstance(row, InstructionList):
            return row
        return cls(row, np.arange(len(row), dtype=np.uint32), np.full(len(row), -1, np.int32))

    @classmethod
    def joined(cls, lists: Sequence[InstructionList]) -> InstructionList:
        """One after the other."""
        patterns: dict[Instruction, int] = {}
        which = [np.zeros(0, np.uint32)]
        for part in lists:
            numbers = [patterns.setdefault(pattern, len(patterns)) for pattern in part.patterns]
            which.append(np.array(numbers, np.uint32)[part.which])
        microbatch = [np.zeros(0, np.int32), *(part.microbatch for part in lists)]
        return cls(tuple(patterns), np.concatenate(which), np.concatenate(microbatch))

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> Instruction: ...
    @overload
    def __getitem__(self, place: slice) -> InstructionList: ...
    def __getitem__(self, place: int | slice) -> Instruction | InstructionList:
        if isinstance(place, slice):
            return InstructionList(self.patterns, self.which[place], self.microbatch[place])
        pattern, number = self.patterns[int(self.which[place])], int(self.microbatch[place])
        return pattern if number < 0 else replace(pattern, action=f"{pattern.action}{number}", microbatch=number)

    @property
    def numbers(self) -> NDArray[np.int32]:
        """Microbatches, those that the patterns have included; -1: none."""
        known = np.array([-1 if p.microbatch is None else p.microbatch for p in self.patterns], np.int32)
        return np.where(self.microbatch < 0, known[self.which], self.microbatch) if len(self) else self.microbatch

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many instructions each pattern has."""
        return np.bincount(self.which, minlength=len(self.patterns))


@dataclass(frozen=True)
class CostModel:
    """What things cost. Rates are of one rank with all its threads; seconds and bytes a second throughout."""

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float = 2e9
    link_latency_s: float = 30e-6
    call_s: float = 1e-6
    rendezvous: bool = False

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise PlanError(f"cost model: {name} is {getattr(self, name)}, it must be above 0")
        if self.link_latency_s < 0 or self.call_s < 0:
            raise PlanError(f"cost model: latency {self.link_latency_s} and call {self.call_s} must not be below 0")

    def call_seconds(self, kernel: str, dims: Dims, bytes_touched: int) -> float:
        """Seconds of one kernel call: the slower of its arithmetic and its memory traffic, plus a fixed cost."""
        if kernel == "delay":
            return self.call_s + dims[0] * 1e-9
        done = kernel_flops(kernel, dims).done
        return self.call_s + max(done / self.flops_per_s, bytes_touched / self.memory_bytes_per_s)

    def bound_seconds(self, call: BoundCall) -> float:
        """Seconds of a call of a plan."""
        return self.call_seconds(call.kernel, call.dim, call.bytes_touched)

    def program_seconds(self, calls: Sequence[BoundCall]) -> float:
        """Seconds of a program's calls."""
        return sum(self.bound_seconds(call) for call in calls)


@dataclass(frozen=True)
class Simulation:
    """What the simulator says of one step."""

    timeline: Timeline
    step_seconds: float
    bubble: tuple[float, ...]
    """Of each rank, 0 to 1: the part of the step in which it neither computes nor updates weights."""
    model_flops: float
    mfu: float
    """Model operations a second over what all ranks could do at ``peak_flops``."""
    link_bytes: Mapping[tuple[Rank, Rank], int]
    """Bytes of a step from rank to rank."""


def simulate(
    rows: Sequence[Sequence[Instruction]],
    cost: CostModel,
    *,
    peak_flops: float | None = None,
    title: str = "planned",
) -> Simulation:
    """Plays the ranks' lists of one step. PlanError where a message has no other end or the ranks block one another."""
    lists = [InstructionList.of(row) for row in rows]
    if not cost.rendezvous:
        lists = [sends_at_once(row) for row in lists]
    play = _Play(lists, cost)
    play.run()
    timeline = Timeline(EventList(play.events()), len(lists), title)
    flops = sum(p.model_flops * int(n) for row in lists for p, n in zip(row.patterns, row.counts, strict=True) if n)
    peak = (peak_flops if peak_flops is not None else cost.flops_per_s) * len(lists)
    seconds = timeline.seconds
    mfu = flops / (seconds * peak) if seconds > 0 else 0.0
    return Simulation(timeline, seconds, timeline.bubble, flops, mfu, play.link_bytes())


_MAKES = re.compile(r"(\d+)(SEND_)?([FIB])\d*")
"""The text of what makes a message between stages, and of its send; of I or B, the send is SEND_B."""


def sends_at_once(row: InstructionList) -> InstructionList:
    """The same instructions, each send between stages right behind what makes it; a channel keeps its order."""
    found = [_MAKES.fullmatch(p.action) for p in row.patterns]
    if not any(match and match[2] for match in found):
        return row
    made = np.array([2 * int(m[1]) + (m[3] != "F") if m else -1 for m in found], np.int64)[row.which]
    sends = np.flatnonzero(np.array([bool(m and m[2]) for m in found])[row.which])
    numbers = row.numbers
    keys = made * (1 + int(numbers.max(initial=0))) + numbers
    makes = np.flatnonzero(made >= 0)
    makes = np.setdiff1d(makes, sends, assume_unique=True)
    makes = makes[np.argsort(keys[makes], kind="stable")]
    place = 2 * np.arange(len(row), dtype=np.int64)
    width = len(row) + 1  # of several steps, what made it last
    last = np.searchsorted(keys[makes] * width + makes, keys[sends] * width + sends) - 1
    maker = makes[np.maximum(last, 0)] if len(makes) else sends
    known = (last >= 0) & (keys[maker] == keys[sends])
    early = np.where(known, 2 * maker + 1, place[sends])
    channel = np.array([-1 if p.channel is None else p.channel for p in row.patterns])[row.which[sends]]
    for name in np.unique(channel):
        mine = channel == name
        early[mine] = np.maximum.accumulate(early[mine])
    place[sends] = early
    order = np.argsort(place, kind="stable")
    return InstructionList(row.patterns, row.which[order], row.microbatch[order])


_OTHER, _SEND, _RECEIVE, _END = range(4)


class _Play:
    """Plays all ranks in rounds: in each, every rank that can do its next instruction does it, on columns of all ranks.

    A message's times depend on its two ranks alone, so the order of play decides nothing.
    """

    def __init__(self, lists: Sequence[InstructionList], cost: CostModel) -> None:
        self.lists, self.cost = lists, cost
        patterns = [pattern for row in lists for pattern in row.patterns]
        names = list(dict.fromkeys(p.channel for p in patterns if p.channel is not None))
        number = {name: n for n, name in enumerate(names)}
        none = len(names)  # the channel of what is no message
        # By pattern, all ranks' one after the other, and one that stands after each rank's last instruction
        kind = [_OTHER if p.channel is None else _RECEIVE if p.kind == "recv" else _SEND for p in patterns]
        self.kind = np.array([*kind, _END], np.uint8)
        self.channel = np.array([*(none if p.channel is None else number[p.channel] for p in patterns), none], np.int32)
        spent = [p.seconds if p.channel is None else p.bytes / cost.link_bytes_per_s for p in patterns]
        self.seconds = np.array([*spent, 0.0], np.float64)
        self.behind = np.array([*(p.behind for p in patterns), False], np.bool_)
        self.free = np.zeros(len(lists))  # by rank, when what it sends behind has left
        ends, sends = np.full((2, none + 1), -1, np.int32), np.zeros(none + 1, np.int64)
        bases = np.cumsum([0, *(len(row.patterns) for row in lists)])
        for rank, row in enumerate(lists):
            mine = slice(bases[rank], bases[rank + 1])
            for pattern, k, channel, count in zip(
                row.patterns, kind[mine], self.channel[mine].tolist(), row.counts.tolist(), strict=True
            ):
                if k == _OTHER:
                    continue
                if ends[k - _SEND, channel] not in (-1, rank):
                    raise PlanError(
                        f"rank {rank} at {pattern.action}: this end of channel {pattern.channel} belongs to rank "
                        f"{ends[k - _SEND, channel]}; a channel has one rank at each end"
                    )
                ends[k - _SEND, channel] = rank
                sends[channel] += count if k == _SEND else 0
        self.sender, self.receiver = ends
        # By instruction, each rank's row closed by the end
        self.starts = np.cumsum([0, *(len(row) + 1 for row in lists)])
        self.which = np.full(int(self.starts[-1]), len(patterns), np.int32)
        for rank, row in enumerate(lists):
            self.which[self.starts[rank] : self.starts[rank + 1] - 1] = row.which + bases[rank]
        self.start, self.end = np.zeros(len(self.which)), np.zeros(len(self.which))
        self.place, self.clock = self.starts[:-1].copy(), np.zeros(len(lists))
        # By channel: where its messages begin among all, how many are sent, how many received; when each is there
        self.first = np.cumsum(sends) - sends
        self.sent, self.received = np.zeros(none + 1, np.int64), np.zeros(none + 1, np.int64)
        self.there = np.zeros(int(sends.sum()) + 1)

    def run(self) -> None:
        """Until nothing moves. PlanError where that is before the end."""
        while True:
            which = self.which[self.place]
            kind, channel = self.kind[which], self.channel[which]
            waits = self.sent[channel] > self.received[channel]
            ready = (kind == _OTHER) | ((kind == _RECEIVE) & waits)
            sends = kind == _SEND
            begin = self.clock
            if self.cost.rendezvous:
                peer, behind = self.receiver[channel], self.behind[which]
                sends &= behind | ((kind[peer] == _RECEIVE) & (channel[peer] == channel) & ~waits & (peer >= 0))
                begin = np.where(sends & ~behind, np.maximum(self.clock, self.clock[peer]), self.clock)
            ranks = np.flatnonzero(ready | sends)
            if not len(ranks):
                break
            kind, channel, place, start = kind[ranks], channel[ranks], self.place[ranks], self.clock[ranks]
            behind, seconds = self.behind[which[ranks]], self.seconds[which[ranks]]
            end = begin[ranks] + np.where(behind, 0.0, seconds)
            left = np.where(behind, np.maximum(start, self.free[ranks]) + seconds, end)
            self.free[ranks] = np.where(behind, left, self.free[ranks])
            receives, sends = kind == _RECEIVE, sends[ranks]
            taken = channel[receives]
            end[receives] = np.maximum(start[receives], self.there[self.first[taken] + self.received[taken]])
            given = channel[sends]
            self.there[self.first[given] + self.sent[given]] = left[sends] + self.cost.link_latency_s
            self.received[taken] += 1
            self.sent[given] += 1
            self.start[place], self.end[place], self.clock[ranks], self.place[ranks] = start, end, end, place + 1
        stuck = []
        for rank, row in enumerate(self.lists):
            stands = int(self.place[rank] - self.starts[rank])
            if stands < len(row):
                stuck.append(f"rank {rank} at {row[stands].action} on channel {row[stands].channel}")
        if stuck:
            raise PlanError("the ranks block one another: " + "; ".join(stuck))

    def events(self) -> list[EventRow]:
        """What each rank did when."""
        rows = []
        for rank, row in enumerate(self.lists):
            labels = [Label(p.action, p.kind, p.microbatch is None) for p in row.patterns]
            mine = slice(self.starts[rank], self.starts[rank + 1] - 1)
            rows.append(EventRow(Rank(rank), labels, row.which, row.numbers, self.start[mine], self.end[mine]))
        return rows

    def link_bytes(self) -> dict[tuple[Rank, Rank], int]:
        """Bytes received, by sending and receiving rank."""
        found: dict[tuple[Rank, Rank], int] = {}
        channels = iter(self.channel.tolist())
        for rank, row in enumerate(self.lists):
            for pattern, count, channel in zip(row.patterns, row.counts.tolist(), channels, strict=False):
                if pattern.channel is not None and pattern.kind == "recv" and count:
                    link = (Rank(int(self.sender[channel])), Rank(rank))
                    found[link] = found.get(link, 0) + pattern.bytes * count
        return found


def from_rows(
    rows: Rows, seconds: Mapping[str, float], message_bytes: int = 0, replicas: int = 1
) -> list[InstructionList]:
    """Instructions of a bare schedule with its messages in, by rank: every replica follows the rows of the positions.

    ``seconds`` by operation (F, I, W, B; B defaults to I + W).

    >>> from trainer.plan.messages import insert_messages
    >>> from trainer.plan.schedules import one_f_one_b
    >>> cost = CostModel(1.0, 1.0, 1.0, 0.0, 0.0)
    >>> lists = from_rows(insert_messages(one_f_one_b(4, 8), 4), {"F": 1.0, "B": 2.0})
    >>> simulate(lists, cost).step_seconds  # (M + P - 1) (F + B)
    33.0
    """
    stage_positions(rows)
    channels: dict[tuple[Replica, str, tuple[Stage, Stage]], int] = {}
    ranks, listed = Ranks(len(rows), replicas), columns(rows)

    def one(rank: Rank, stage: Stage, op: str) -> Instruction:
        text = f"{stage}{op}"
        if op in COMPUTE_KINDS:
            estimate = seconds[op] if op in seconds else seconds["I"] + seconds["W"]
            return Instruction(text, op, estimate)
        channel = channels.setdefault((ranks.replica(rank), op[-1], Action(stage, op, 0).edge), len(channels))
        return Instruction(text, kind_of(text), 0.0, channel, message_bytes)

    lists = []
    for rank in ranks.all:
        row = listed[ranks.position(rank)]
        names, local = row.by_stage()
        kinds, which = np.unique(local * len(OPS) + row.op, return_inverse=True)
        patterns = [one(rank, Stage(int(names[kind // len(OPS)])), OPS[kind % len(OPS)]) for kind in kinds]
        lists.append(InstructionList(patterns, which.astype(np.uint16), row.microbatch))
    return lists


_MESSAGE_NAMES = {
    wire.CH_FORWARD: "F",
    wire.CH_BACKWARD: "B",
    wire.CH_TIED_GRAD: "TIED_GRAD",
    wire.CH_TIED_WEIGHT: "TIED_WEIGHT",
    wire.CH_REPORT: "REPORT",
    wire.CH_CONTROL: "CONTROL",
    wire.CH_REDUCE: "REDUCE",
    wire.CH_GATHER: "GATHER",
    wire.CH_NORMS: "NORMS",
}
_OTHER_NAMES = {
    wire.A_DATA: "data",
    wire.A_COMBINE: "combine",
    wire.A_REPORT: "report",
    wire.A_APPLY: "apply",
    wire.A_SNAPSHOT: "snapshot",
    wire.A_MERGE: "merge",
    wire.A_DECIDE: "decide",
    wire.A_CHECK: "check",
    wire.A_FORESEE: "foresee",
}


def run_text(position: PositionPlan, action: BoundAction) -> str:
    """A program's name in traces, without its microbatch: ``2F`` where it computes for a stage."""
    assert action.program is not None
    if action.op not in COMPUTE_KINDS:
        return position.programs[action.program].name
    return f"{position.position if action.stage is None else action.stage}{action.op}"


def from_plan(plan: Plan, cost: CostModel) -> list[InstructionList]:
    """Instructions of a compiled plan's step by itself, one list a rank; without snapshots, which few steps have."""
    return [rank[0] for rank in steps_of_plan(plan, cost, 1)]


def steps_of_plan(plan: Plan, cost: CostModel, steps: int) -> list[list[InstructionList]]:
    """Those of so many steps that follow one another, by rank and step; none of them clips."""
    lists = [Turns.of(position, plan.channels).steps(steps) for position in plan.positions]
    return timed(plan, cost, lists)


def timed(plan: Plan, cost: CostModel, lists: Sequence[Sequence[ActionList]]) -> list[list[InstructionList]]:
    """What lists of each position's actions take, by rank."""
    ordered: list[list[ActionList]] = []
    for position, mine in zip(plan.positions, lists, strict=True):
        known: dict[int, ActionList] = {}  # many steps are the same list
        for actions in mine:
            if id(actions) not in known:
                known[id(actions)] = actions.take(_order(plan, position, actions))
        ordered.append([known[id(actions)] for actions in mine])
    return [_of_rank(plan, cost, rank, ordered[plan.ranks.position(rank)]) for rank in plan.ranks.all]


def _order(plan: Plan, position: PositionPlan, step: ActionList) -> NDArray[np.int64]:
    """The places of a list as they happen: what another replica sends is waited for by the first that reads it."""
    across = np.array([p.channel is not None and plan.channels[p.channel].across > 0 for p in step.patterns], np.bool_)
    receives = np.array([p.kind == wire.A_RECV for p in step.patterns], np.bool_)
    place = 2 * np.arange(len(step), dtype=np.int64)
    if across.any():
        touched = [_touches(position, p) for p in step.patterns]
        which = step.which.tolist()
        for here in np.flatnonzero((across & receives)[step.which]).tolist():
            mine = touched[which[here]][0]
            rest = range(here + 1, len(which))
            later = (n for n in rest if any(_meet(mine, ref, plan.config.replicas) for ref in touched[which[n]]))
            place[here] = 2 * next(later, len(which)) - 1
    return np.argsort(place, kind="stable")


def _touches(position: PositionPlan, action: BoundAction) -> list[Ref]:
    """What an action touches outside of slots and microbatches."""
    refs = [action.ref]
    if action.program is not None:
        refs = [ref for call in position.programs[action.program].calls for ref in call.ptr]
    return [ref for ref in refs if ref is not None and ref.space in (wire.SPACE_STATIC, wire.SPACE_PIECE)]


def _meet(a: Ref, b: Ref, replicas: int) -> bool:
    """Whether two may share bytes in some replica."""
    if a.space == b.space == wire.SPACE_PIECE and (a.offset, a.bytes) == (b.offset, b.bytes):
        return a.across == b.across
    ends = [r.offset + r.bytes * (replicas if r.space == wire.SPACE_PIECE else 1) for r in (a, b)]
    return a.offset < ends[1] and b.offset < ends[0]


def _of_rank(plan: Plan, cost: CostModel, rank: Rank, lists: Sequence[ActionList]) -> list[InstructionList]:
    position, replica, replicas = (
        plan.positions[plan.ranks.position(rank)],
        plan.ranks.replica(rank),
        plan.config.replicas,
    )
    programs = {}
    for name, program in position.programs.items():
        seconds = cost.program_seconds(program.calls)
        flops = sum(kernel_flops(call.kernel, call.dim).model for call in program.calls if call.part not in ("R", "O"))
        programs[name] = (seconds, flops)

    def one(action: BoundAction) -> Instruction:
        number = position.position if action.stage is None else action.stage  # as the engine's traces name it
        if action.kind == wire.A_RUN:
            assert action.program is not None
            compute = action.op in COMPUTE_KINDS
            text = run_text(position, action)
            kind = action.op if compute else kind_of(text)
            estimate, flops = programs[action.program]
            return Instruction(text, kind, estimate, model_flops=flops)
        if action.channel is not None:
            channel = plan.channels[action.channel]
            verb = "SEND" if action.kind == wire.A_SEND else "RECV"
            text = f"{number}{verb}_{_MESSAGE_NAMES[channel.kind]}"
            sender, size = replica, channel.bytes
            if channel.across and action.ref is not None:
                sender = Replica(replica ^ channel.across) if verb == "RECV" else replica
                size = action.ref.bytes
            name, behind = action.channel * replicas + sender, channel.across > 0 and verb == "SEND"
            return Instruction(text, verb.lower(), 0.0, name, size, behind=behind)
        return Instruction(_OTHER_NAMES[action.kind], "other")

    patterns = {pattern: one(pattern) for actions in lists for pattern in actions.patterns}
    return [InstructionList([patterns[p] for p in step.patterns], step.which, step.microbatch) for step in lists]
