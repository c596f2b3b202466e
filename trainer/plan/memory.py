"""Memory: static placement of short-lived buffers, and the account of every byte that a rank takes.

The account follows the arena as it is laid out (``lower.py`` adds up what it placed), plus what lies outside it: the
snapshot slots, the channels' buffers, the kernels' workspace and the process itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer import wire
from trainer.amounts import bytes_text
from trainer.errors import PlanError
from trainer.models.base import Call, View
from trainer.plan.draw import memory_text
from trainer.plan.places import Position, Ranks
from trainer.plan.records import Channel, Config, PositionPlan
from trainer.spec import RunSpec
from trainer.wire.kernels import KERNELS

ALIGN = 64
PAGE = 4096
RUNTIME_BYTES = 3 << 20
"""The process beside its arena: code, stacks, tables of linked calls, log buffers (measured by tests/e2e)."""

WORKSPACE_BYTES_PER_THREAD = 5_681_664
"""The matrix kernels' workspace of a thread (``hs_kernels_scratch_bytes``)."""

CHANNEL_BYTES = 256 << 10
"""What the system keeps for one end of a TCP channel, beside the message that lies there."""


WINDOWS, WINDOW_BYTES = 2, 1 << 20
"""To the device, beside one from it; each at least so large (``run/spaces.c``)."""


def align(value: int, to: int = ALIGN) -> int:
    """The least multiple of ``to`` that is not below ``value``."""
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class Interval:
    """A buffer that lives from call ``first`` to call ``last``, both included."""

    name: str
    bytes: int
    first: int
    last: int


def workspace_bytes(threads: int) -> int:
    """The matrix kernels' workspace of a rank. ``threads`` 0 is its share of the CPUs, which the machine decides: the
    plan counts ``wire.THREADS_COUNTED`` of them, `more_threads_bytes` the others."""
    return min(threads or wire.THREADS_COUNTED, wire.THREADS_MAX) * WORKSPACE_BYTES_PER_THREAD


def rank_threads(spec: RunSpec, cpus: float) -> int:
    """Threads that the engine starts for a rank on a node where it may use ``cpus`` (``run/machine.c``)."""
    local = max(1, spec.parallel.ranks // spec.launch.nodes)
    return max(1, min(spec.parallel.threads or int(cpus) // local, wire.THREADS_MAX))


def more_threads_bytes(spec: RunSpec, cpus: float) -> int:
    """What a rank's threads take there beyond what the plan counts; below 0 where they are fewer."""
    return workspace_bytes(rank_threads(spec, cpus)) - workspace_bytes(spec.parallel.threads)


def lifetimes(calls: Sequence[Call], sizes: Mapping[str, int]) -> list[Interval]:
    """The buffers of ``sizes`` with the calls that touch them first and last; untouched ones are left out."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, call in enumerate(calls):
        for view in call.views():
            if view.buffer in sizes:
                first.setdefault(view.buffer, number)
                last[view.buffer] = number
    return [Interval(name, sizes[name], first[name], last[name]) for name in first]


def place(intervals: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """First-fit offsets, multiples of 64, such that buffers alive at once never overlap; and the bytes in all.

    Large buffers are placed first, so that the small ones fill the gaps.
    """
    offsets: dict[str, int] = {}
    taken: list[list[tuple[int, int]]] = [[] for _ in range(1 + max((item.last for item in intervals), default=-1))]
    end = 0  # taken: by call, the bytes of the buffers that are placed and alive in it
    for item in sorted(intervals, key=lambda i: (-i.bytes, i.first, i.name)):
        size, at, lives = align(item.bytes), 0, taken[item.first : item.last + 1]
        for low, high in sorted({span for spans in lives for span in spans}):
            if at + size <= low:
                break
            at = max(at, high)
        offsets[item.name] = at
        for spans in lives:
            spans.append((at, at + size))
        end = max(end, at + size)
    return offsets, end


def place_scratch(calls: Sequence[Call], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of the buffers of ``sizes`` that a program touches, and the bytes in all. Scratch that may be other
    scratch of its call is, where both have as many bytes."""
    same: dict[str, str] = {}
    for call in calls:
        operands = KERNELS[call.kernel].operands
        views = {o.name: view for o, view in zip(operands, call.ptr, strict=True) if isinstance(view, View)}
        for operand in (o for o in operands if o.role == "scratch" and o.name in views):
            mine, other = views[operand.name].buffer, views.get(operand.note.removeprefix("may be "))
            if other is not None and sizes[mine] == sizes[other.buffer]:
                same[mine] = other.buffer
    offsets, end = place(lifetimes(calls, {name: size for name, size in sizes.items() if name not in same}))
    return offsets | {name: offsets[other] for name, other in same.items()}, end


def channels_bytes(position: Position, channels: Sequence[Channel]) -> int:
    """The system's buffers for a position's ends of channels, as far as messages fill them; an exchange has both."""
    ends = [channel.bytes for channel in channels for end in (channel.source, channel.target) if end == position]
    return sum(CHANNEL_BYTES + min(size, wire.BUFFER_MOST) for size in ends)


def slot_bytes(data_bytes: int) -> int:
    """Bytes of a snapshot slot (``wire/slot.h``): header, checksums padded to a page, data, rounded to a page."""
    chunks = -(-data_bytes // wire.SLOT_CHUNK)
    return align(wire.SLOT_HEADER_BYTES + align(8 * chunks, PAGE) + data_bytes, PAGE)


def staging_bytes(config: Config, position: PositionPlan, channels: Sequence[Channel], tensors: int) -> int:
    """Pinned memory that a rank takes on a device whose memory is apart (``run/spaces.c``): a second place for what the
    host makes or reads (tokens, targets, losses, norms, reports, control), and three windows for messages.
    """
    rows = (position.tokens_offset, position.targets_offset, position.loss_offset)
    pieces = (
        position.mb_count * sum(offset is not None for offset in rows) * align(4 * config.microbatch * config.sequence)
    )
    if config.mode == wire.MODE_TRAIN:
        reports = config.positions if position.position == 0 else 1
        controls = 2 if position.step_checks else 1  # of an optimistic step, the one foreseen too
        pieces += align(8 * tensors) + controls * align(ctypes.sizeof(wire.StepControl))
        report = ctypes.sizeof(wire.StepReport) + 8 * tensors
        others = align(report) if position.position == 0 and config.replicas > 1 else 0  # another replica's
        pieces += align(reports * report) + others
    own = [c.bytes for c in channels if position.position in (c.source, c.target)]
    return pieces + (WINDOWS + 1) * align(max([WINDOW_BYTES, *own]))


def _threads_words(more_bytes: int) -> str:
    if more_bytes <= 0:
        return ""
    more = more_bytes // WORKSPACE_BYTES_PER_THREAD
    return (
        f"({more} threads a rank more, for this machine's CPUs, take {bytes_text(more_bytes)} of other; see "
        "parallel.threads)\n"
    )


def host_kinds(position: PositionPlan, on_cuda: bool) -> Mapping[str, int]:
    """Bytes by kind that a rank takes of its machine's own memory: on a CUDA device without its arena."""
    if not on_cuda:
        return position.bytes_by_kind
    kinds = position.bytes_by_kind
    return {"slots": kinds["slots"], "channels": kinds["channels"], "process": RUNTIME_BYTES}


def _with_threads(kinds: Mapping[str, int], more_bytes: int) -> Mapping[str, int]:
    return {**kinds, "other": kinds["other"] + more_bytes} if more_bytes else kinds


def check_budget(
    positions: Sequence[PositionPlan],
    nodes: int,
    budget_bytes: int,
    more_bytes: int = 0,
    replicas: int = 1,
    *,
    on_cuda: bool = False,
) -> None:
    """Refuses a plan whose ranks on one node take more than ``budget_bytes``; the text carries the table.

    ``more_bytes``: of each rank, beside what its position counts (`more_threads_bytes`). ``on_cuda``: ranks have their
    arenas on devices.
    """
    if budget_bytes <= 0:
        return
    ranks = Ranks(len(positions), replicas)
    kinds = [_with_threads(host_kinds(position, on_cuda), more_bytes) for position in positions]
    for node in range(nodes):
        total = sum(sum(kinds[ranks.position(rank)].values()) for rank in ranks.on_node(node, nodes))
        if total > budget_bytes:
            raise PlanError(
                f"node {node} needs {total} bytes ({bytes_text(total)}), its budget is {budget_bytes} "
                f"({bytes_text(budget_bytes)}); use more nodes, a smaller microbatch, or raise launch.memory_gib\n"
                f"{_threads_words(more_bytes)}"
                f"{memory_text(kinds, replicas=replicas)}"
            )
