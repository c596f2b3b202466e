"""Times a plan before it runs: every instruction's seconds from a cost model, played over the ranks' lists.

Owns the count of floating-point operations a kernel call takes, the cost model and the event simulation. It reads
lists of ``Instruction``: ``from_plan`` makes them from a compiled plan, ``from_rows`` from a bare schedule. The same
code times two processes and a cluster.

The model of a message: the sender is busy for bytes / bandwidth; the receiver has it a latency after the sender is
done, and waits from where it asked. With ``rendezvous`` the sender also waits until the receiver asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from trainer import wire
from trainer.errors import PlanError
from trainer.plan.records import Plan, PlanAction
from trainer.plan.schedules import Action, Rows, stage_ranks
from trainer.plan.timeline import COMPUTE_KINDS, Event, Timeline, kind_of


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a call: ``model`` as MFU counts them (matrix products of the mathematics), ``done`` as executed."""

    model: float
    done: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.done + other.done)


def _both(count: float) -> Flops:
    return Flops(count, count)


def _only_done(count: float) -> Flops:
    return Flops(0.0, count)


Dims = Sequence[int]

# What a call costs, by kernel name; dims in the order of wire/kernels.h. Attention is causal: T (T + 1) / 2 pairs. The
# input gradient of attention computes the scores again (5 products where the mathematics has 4). Elementwise
# operations count as executed only, with a rounded number an element; memory traffic decides their time anyway.
_FLOPS: Mapping[str, Callable[[Dims], Flops]] = {
    "embed_fwd": lambda d: _only_done(d[0] * d[1]),
    "embed_wgrad": lambda d: _only_done(2 * d[0] * d[1]),
    "layernorm_fwd": lambda d: _only_done(8 * d[0] * d[1]),
    "layernorm_igrad": lambda d: _only_done(11 * d[0] * d[1]),
    "layernorm_wgrad": lambda d: _only_done(4 * d[0] * d[1]),
    "rmsnorm_fwd": lambda d: _only_done(4 * d[0] * d[1] * d[2]),
    "rmsnorm_igrad": lambda d: _only_done(7 * d[0] * d[1] * d[2]),
    "rmsnorm_wgrad": lambda d: _only_done(3 * d[0] * d[1] * d[2]),
    "linear_fwd": lambda d: _both(2 * d[0] * d[1] * d[2]),
    "linear_igrad": lambda d: _both(2 * d[0] * d[1] * d[2]),
    "linear_wgrad": lambda d: _both(2 * d[0] * d[1] * d[2]),
    "attention_fwd": lambda d: _both(2 * 2 * d[0] * d[2] * d[4] * (d[1] * (d[1] + 1) // 2)),
    "attention_igrad": lambda d: Flops(
        4 * 2 * d[0] * d[2] * d[4] * (d[1] * (d[1] + 1) // 2), 5 * 2 * d[0] * d[2] * d[4] * (d[1] * (d[1] + 1) // 2)
    ),
    "rope_table": lambda d: _only_done(20 * d[0] * d[1]),
    "rope_fwd": lambda d: _only_done(3 * d[0] * d[2] * d[3]),
    "rope_igrad": lambda d: _only_done(3 * d[0] * d[2] * d[3]),
    "gelu_fwd": lambda d: _only_done(20 * d[0]),
    "gelu_igrad": lambda d: _only_done(30 * d[0]),
    "swiglu_fwd": lambda d: _only_done(20 * d[0] * d[1]),
    "swiglu_igrad": lambda d: _only_done(30 * d[0] * d[1]),
    "classifier_fwd": lambda d: Flops(2 * d[0] * d[1] * d[2], 2 * d[0] * d[1] * d[2] + 20 * d[0] * d[2]),
    "classifier_grad": lambda d: Flops(6 * d[0] * d[1] * d[2], 6 * d[0] * d[1] * d[2] + 20 * d[0] * d[2]),
    "logits": lambda d: _both(2 * d[0] * d[1] * d[2]),
    "add_acc": lambda d: _only_done(d[0]),
    "sumsq": lambda d: _only_done(2 * d[0]),
    "adamw": lambda d: _only_done(14 * d[0]),
    "zero": lambda d: _only_done(0),
    "init_normal": lambda d: _only_done(60 * d[0]),
    "init_const": lambda d: _only_done(0),
    "cast": lambda d: _only_done(d[0]),
}


def kernel_flops(name: str, dims: Dims) -> Flops:
    """Operations of one call of kernel ``name`` (a key of ``trainer.wire.KERNELS``) with ``dims`` in the table's order.

    >>> kernel_flops("linear_fwd", [8, 16, 32]).model
    8192
    """
    try:
        return _FLOPS[name](dims)
    except KeyError:
        raise PlanError(f"the simulator does not know kernel {name!r}; add its operations to simulate.py") from None


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


@dataclass(frozen=True)
class CostModel:
    """What things cost. Rates are of one rank with all its threads; seconds and bytes a second throughout."""

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float = 2e9
    link_latency_s: float = 30e-6
    call_s: float = 1e-6
    rendezvous: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)
    """Seconds by action, in place of the sheet: ``2F`` is stage 2's forward, ``F`` any stage's, ``0adamw`` rank 0's."""

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise PlanError(f"cost model: {name} is {getattr(self, name)}, it must be above 0")
        if self.link_latency_s < 0 or self.call_s < 0:
            raise PlanError(f"cost model: latency {self.link_latency_s} and call {self.call_s} must not be below 0")

    @classmethod
    def from_sheet(
        cls,
        *,
        flops: float,
        bandwidth: float,
        link_bandwidth: float = 2e9,
        link_latency: float = 30e-6,
        efficiency: float = 0.6,
    ) -> CostModel:
        """From a hardware sheet: peak operations and bytes a second; kernels reach ``efficiency`` of each."""
        return cls(flops * efficiency, bandwidth * efficiency, link_bandwidth, link_latency)

    @classmethod
    def from_timeline(cls, timeline: Timeline, sheet: CostModel) -> CostModel:
        """``sheet``, with a measured timeline's median seconds of every (stage, operation) in place of estimates."""
        found: dict[str, list[float]] = {}
        for event in timeline.events:
            if event.kind in (*COMPUTE_KINDS, "O"):
                found.setdefault(_cost_key(event.action, event.kind, event.rank), []).append(event.seconds)
        measured = {key: median(values) for key, values in found.items()}
        return cls(
            sheet.flops_per_s,
            sheet.memory_bytes_per_s,
            sheet.link_bytes_per_s,
            sheet.link_latency_s,
            sheet.call_s,
            sheet.rendezvous,
            measured,
        )

    def call_seconds(self, kernel: str, dims: Dims, bytes_touched: int) -> float:
        """Seconds of one kernel call: the slower of its arithmetic and its memory traffic, plus a fixed cost."""
        done = kernel_flops(kernel, dims).done
        return self.call_s + max(done / self.flops_per_s, bytes_touched / self.memory_bytes_per_s)

    def action_seconds(self, action: str, kind: str, rank: int, estimate: float) -> float:
        """The measured seconds of an action where known, else ``estimate``."""
        exact = self.measured.get(_cost_key(action, kind, rank))
        return exact if exact is not None else self.measured.get(kind, estimate)


def _cost_key(action: str, kind: str, rank: int) -> str:
    if kind not in COMPUTE_KINDS:
        return f"{rank}{action}"
    return f"{action[: len(action) - len(action.lstrip('0123456789'))]}{kind}"


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
    link_bytes: Mapping[tuple[int, int], int]
    """Bytes of a step from rank to rank."""


def simulate(
    rows: Sequence[Sequence[Instruction]],
    cost: CostModel,
    *,
    peak_flops: float | None = None,
    title: str = "planned",
) -> Simulation:
    """Plays the ranks' lists of one step. PlanError where a message has no other end or the ranks block one another."""
    clock = [0.0] * len(rows)
    place = [0] * len(rows)
    events: list[Event] = []
    arrived: dict[int, list[tuple[int, float]]] = {}  # channel -> (sending rank, time at the receiver), in order
    link_bytes: dict[tuple[int, int], int] = {}
    receivers = {
        instruction.channel: rank
        for rank, row in enumerate(rows)
        for instruction in row
        if instruction.channel is not None and instruction.kind == "recv"
    }

    def ready(rank: int, instruction: Instruction) -> bool:
        if instruction.channel is None:
            return True
        if instruction.kind == "recv":
            return bool(arrived.get(instruction.channel))
        if not cost.rendezvous:
            return True
        peer = receivers.get(instruction.channel)
        if peer is None or place[peer] == len(rows[peer]):
            return False
        other = rows[peer][place[peer]]
        return other.channel == instruction.channel and other.kind == "recv"

    def run(rank: int, instruction: Instruction) -> None:
        start = clock[rank]
        if instruction.channel is None:
            end = start + instruction.seconds
        elif instruction.kind == "recv":
            sender, when = arrived[instruction.channel].pop(0)
            end = max(start, when)
            link_bytes[sender, rank] = link_bytes.get((sender, rank), 0) + instruction.bytes
        else:
            met = max(start, clock[receivers[instruction.channel]]) if cost.rendezvous else start
            end = met + instruction.bytes / cost.link_bytes_per_s
            arrived.setdefault(instruction.channel, []).append((rank, end + cost.link_latency_s))
        events.append(Event(rank, instruction.action, instruction.kind, start, end, instruction.microbatch))
        clock[rank] = end
        place[rank] += 1

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row) and ready(rank, row[place[rank]]):
                run(rank, row[place[rank]])
                moved = True
    stuck = [
        f"rank {rank} at {row[place[rank]].action} on channel {row[place[rank]].channel}"
        for rank, row in enumerate(rows)
        if place[rank] < len(row)
    ]
    if stuck:
        raise PlanError("the ranks block one another: " + "; ".join(stuck))
    timeline = Timeline(tuple(sorted(events, key=lambda e: (e.rank, e.start))), len(rows), title)
    flops = sum(instruction.model_flops for row in rows for instruction in row)
    peak = (peak_flops if peak_flops is not None else cost.flops_per_s) * len(rows)
    seconds = timeline.seconds
    return Simulation(
        timeline, seconds, timeline.bubble, flops, flops / (seconds * peak) if seconds > 0 else 0.0, link_bytes
    )


def from_rows(
    rows: Rows, cost: CostModel, seconds: Mapping[str, float], message_bytes: int = 0
) -> list[list[Instruction]]:
    """Instructions of a bare schedule with its messages in. ``seconds`` by operation (F, I, W, B; B defaults to I + W).

    >>> from trainer.plan.check import insert_messages
    >>> from trainer.plan.schedules import one_f_one_b
    >>> sheet = CostModel(1.0, 1.0, 1.0, 0.0, 0.0)
    >>> lists = from_rows(insert_messages(one_f_one_b(4, 8), 4), sheet, {"F": 1.0, "B": 2.0})
    >>> simulate(lists, sheet).step_seconds  # (M + P - 1) (F + B)
    33.0
    """
    stage_ranks(rows)
    channels: dict[tuple[str, tuple[int, int]], int] = {}

    def one(rank: int, action: Action) -> Instruction:
        text = str(action)
        if action.is_compute:
            estimate = seconds[action.op] if action.op in seconds else seconds["I"] + seconds["W"]
            spent = cost.action_seconds(text, action.op, rank, estimate)
            return Instruction(text, action.op, spent, microbatch=action.microbatch)
        channel = channels.setdefault((action.op[-1], action.edge), len(channels))
        return Instruction(text, kind_of(text), 0.0, channel, message_bytes, action.microbatch)

    return [[one(rank, action) for action in row] for rank, row in enumerate(rows)]


_MESSAGE_NAMES = {
    wire.CH_FORWARD: "F",
    wire.CH_BACKWARD: "B",
    wire.CH_TIED_GRAD: "TIED_GRAD",
    wire.CH_TIED_WEIGHT: "TIED_WEIGHT",
    wire.CH_REPORT: "REPORT",
    wire.CH_CONTROL: "CONTROL",
}
_OTHER_NAMES = {
    wire.A_DATA: "data",
    wire.A_COMBINE: "combine",
    wire.A_REPORT: "report",
    wire.A_APPLY: "apply",
    wire.A_SNAPSHOT: "snapshot",
}


def from_plan(plan: Plan, cost: CostModel) -> list[list[Instruction]]:
    """Instructions of one step of a compiled plan, one list a position; without snapshots, which few steps have."""
    lists: list[list[Instruction]] = []
    for position in plan.positions:
        programs = {}
        for name, program in position.programs.items():
            seconds = sum(cost.call_seconds(call.kernel, call.dim, call.bytes_touched) for call in program.calls)
            flops = sum(kernel_flops(call.kernel, call.dim).model for call in program.calls)
            programs[name] = (seconds, flops)

        def one(
            action: PlanAction, stage: int = position.stage, programs: Mapping[str, tuple[float, float]] = programs
        ) -> Instruction:
            place = "" if action.microbatch is None else str(action.microbatch)
            if action.kind == wire.A_RUN:
                assert action.program is not None
                compute = action.op in COMPUTE_KINDS
                text = f"{stage}{action.op}{place}" if compute else action.program
                kind = action.op if compute or action.op == "O" else kind_of(action.program)
                estimate, flops = programs[action.program]
                spent = cost.action_seconds(text, kind, stage, estimate)
                return Instruction(text, kind, spent, microbatch=action.microbatch, model_flops=flops)
            if action.channel is not None:
                channel = plan.channels[action.channel]
                verb = "SEND" if action.kind == wire.A_SEND else "RECV"
                text = f"{stage}{verb}_{_MESSAGE_NAMES[channel.kind]}{place}"
                return Instruction(text, verb.lower(), 0.0, action.channel, channel.bytes, action.microbatch)
            return Instruction(_OTHER_NAMES[action.kind], "other")

        lists.append([one(action) for action in position.step])
    return lists
