"""Pass 3: stages and a schedule into positions: every buffer placed, every operand bound, every message in its list.

Words of ``places.py``: a position is lowered once and runs as a rank in every replica. Which position has the first
stage (embedding, owner of a tied one) and which the last (head, losses) is the pipeline's; position 0 combines the
reports, whatever its stage is. A position has one stage here: ``lower`` refuses several.

A position's arena, in order (all offsets multiples of 64):

    reports, norms and control block | rotary tables | master weights | compute copies | moments | gradients
    | gradient that is sent back (last stage) | scratch of the running program | activation slots | microbatches' tokens

What a slot of activations holds: all that lives from a microbatch's forward to its backward, and what is received and
sent (``Stage.kept``). Scratch is shared by the programs, which never run at once; inside a program buffers share it by
lifetime. A step list is: data, computations with their messages, tied gradient, norms, reports, control, optimizer,
tied weights, snapshot. Every message appears; nothing is decided by the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.errors import PlanError
from trainer.models.base import Call, Given, Normal, Operand, RopeTable, Tensor, View, Weight
from trainer.plan import memory
from trainer.plan.check import check_placement
from trainer.plan.edges import Channels, check_messages
from trainer.plan.expand import StagePrograms
from trainer.plan.memory import align
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Layout, Pipeline, Position, Stage
from trainer.plan.records import ActionList, BoundAction, BoundCall, Channel, PositionPlan, Program, Ref, State
from trainer.plan.rows import OPS, Row
from trainer.plan.schedules import GENERATORS
from trainer.plan.slots import assign_slots, check_hazards
from trainer.spec import RunSpec

COMBINES = Position(0)
"""The position that adds up the reports and decides for the gang."""
REPORT_BYTES, CONTROL_BYTES = 64, 96

_TAKES = {name: (kernel.ptrs, kernel.dims, kernel.reals) for name, kernel in wire.KERNELS.items()}

# Kernels whose arithmetic is f32 whatever the precision of activations: none of their operands is of that
_F32_KERNELS = {name for name, k in wire.KERNELS.items() if all(o.kind != "dt" for o in k.operands)}


@dataclass(frozen=True)
class Job:
    """What all positions of a plan share."""

    spec: RunSpec
    tensors: tuple[Tensor, ...]
    stages: tuple[StagePrograms, ...]
    layout: Layout
    infer: bool = False

    @cached_property
    def dtype(self) -> int:
        """``wire.F32`` or ``wire.BF16``."""
        return wire.BF16 if self.spec.train.precision == "bf16" else wire.F32

    @cached_property
    def dt_bytes(self) -> int:
        """Bytes of an activation's element."""
        return wire.DTYPE_BYTES[self.dtype]

    @cached_property
    def number(self) -> Mapping[str, int]:
        """Numbers of the tensors by name."""
        return {tensor.name: number for number, tensor in enumerate(self.tensors)}

    @cached_property
    def tied_tensor(self) -> int | None:
        """The embedding, where it is the head's weight too."""
        calls = (call for stage in self.stages for call in (*stage.forward, *stage.backward))
        heads = {w.tensor for call in calls for w in _weights(call) if w.use == "head"}
        return min((self.number[name] for name in heads), default=None)

    @cached_property
    def owned(self) -> tuple[tuple[int, ...], ...]:
        """By position, the tensors whose state it keeps, in the table's order."""
        return self.layout.owned(self.tensors)


def _weights(call: Call) -> Iterable[Weight]:
    return (p for p in call.ptr if isinstance(p, Weight))


class _Arena:
    """Hands out bytes from the start, 64 apart, and counts them by kind."""

    def __init__(self) -> None:
        self.end = 0
        self.by_kind = dict.fromkeys(wire.MEMORY_KINDS, 0)

    def take(self, size: int, kind: str) -> int:
        at = self.end
        self.end += align(size)
        self.by_kind[kind] += align(size)
        return at

    def ref(self, size: int, kind: str) -> Ref:
        return Ref(wire.SPACE_STATIC, self.take(size, kind), size)


class _Lowering:
    """Places the memory of one position, then binds its programs and writes its lists."""

    def __init__(self, job: Job, position: Position, stage: StagePrograms, channels: Channels, row: Row) -> None:
        self.job, self.position, self.stage, self.channels, self.row = job, position, stage, channels, row
        self.train = job.spec.train
        self.rows = 4 * self.train.rows
        self.arena = _Arena()
        self.pipeline = job.layout.pipeline
        self.first, self.last = stage.first, stage.last  # stages: with the embedding, with the head
        self.tied = job.tied_tensor
        self.owned = job.owned[position]
        self.tables: dict[RopeTable, Ref] = {}
        self.masters: dict[int, Ref] = {}
        self.copies: dict[int, Ref] = {}
        self.moments: dict[int, tuple[Ref, Ref]] = {}
        self.gradients: dict[int, Ref] = {}
        self.given: dict[str, Ref] = {}
        self.buffers: dict[str, Ref] = {}
        self.head_weight: Ref | None = None
        self.head_gradient: Ref | None = None
        self.tied_received: Ref | None = None
        self._place()

    # memory

    def _place(self) -> None:
        job, arena = self.job, self.arena
        report = REPORT_BYTES + 8 * len(job.tensors)
        count = self.pipeline.positions if self.position == COMBINES else 1
        if not job.infer:
            self.reports = arena.ref(count * report, "other")
            self.report = replace(self.reports, bytes=report)
            self.sumsq = arena.ref(8 * len(job.tensors), "other")
            self.control = arena.ref(CONTROL_BYTES, "other")
        for table in self._rope_tables():
            self.tables[table] = arena.ref(4 * table.rows * table.size, "other")
        for n in self.owned:
            self.masters[n] = arena.ref(4 * job.tensors[n].elements, "weights")
        for n in self.owned:
            if job.dtype != wire.F32 and job.tensors[n].decay:
                self.copies[n] = arena.ref(job.dt_bytes * job.tensors[n].elements, "weights")
        if self.tied is not None and self.last:
            alone = self.first
            size = job.dt_bytes * job.tensors[self.tied].elements
            self.head_weight = self._compute(self.tied) if alone else arena.ref(size, "weights")
        if not job.infer:
            self._place_training(arena)
        self._place_scratch(arena)
        self._place_slots(arena)

    def _place_training(self, arena: _Arena) -> None:
        tensors = self.job.tensors
        for n in self.owned:
            size = 4 * tensors[n].elements
            self.moments[n] = (arena.ref(size, "moments"), arena.ref(size, "moments"))
        for n in self.owned:
            self.gradients[n] = arena.ref(4 * tensors[n].elements, "gradients")
        if self.tied is not None and self.last:
            self.head_gradient = arena.ref(4 * tensors[self.tied].elements, "gradients")
        sent = self.stage.gradient_sent
        if sent is not None and sent.buffer not in self.stage.kept:
            self.buffers[sent.buffer] = arena.ref(self._size(sent.buffer), "activations")

    def _place_scratch(self, arena: _Arena) -> None:
        kept = self.stage.kept
        sizes = {name: self._size(name) for name in self.stage.buffers if name not in kept and name not in self.buffers}
        places: dict[str, int] = {}
        most = 0
        for calls in (self.stage.forward, self.stage.backward):
            offsets, end = memory.place(memory.lifetimes(calls, sizes))
            places |= offsets
            most = max(most, end)
        received = 0
        if not self.job.infer:
            if self.tied is not None and self.first and not self.last:
                received = align(4 * self.job.tensors[self.tied].elements)
            largest = max((self.job.tensors[n].elements for n in self.owned), default=0)
            partials = 8 * -(-largest // wire.SUMSQ_BLOCK)
            most = max(most, received + partials)
        base = arena.take(most, "scratch")
        for name, offset in places.items():
            self.buffers[name] = Ref(wire.SPACE_STATIC, base + offset, sizes[name])
        if received:
            assert self.tied is not None
            self.tied_received = Ref(wire.SPACE_STATIC, base, 4 * self.job.tensors[self.tied].elements)
        self.partials = base + received

    def _place_slots(self, arena: _Arena) -> None:
        offset = 0
        kept = self.stage.kept
        for name in self.stage.buffers:
            if name in kept:
                size = self._size(name)
                self.buffers[name] = Ref(wire.SPACE_ACT, offset, size)
                offset += align(size)
        self.slots, self.slot_of = assign_slots(self.row)
        self.act_stride, self.act_slots = offset, self.slots if offset else 0
        self.act_offset = arena.take(offset * self.act_slots, "activations")
        stride = 0
        if self.first or self.job.infer:
            self.given["tokens"], stride = Ref(wire.SPACE_MB, stride, self.rows), stride + align(self.rows)
        if self.last and not self.job.infer:
            for name in ("targets", "loss"):
                self.given[name], stride = Ref(wire.SPACE_MB, stride, self.rows), stride + align(self.rows)
        self.mb_stride, self.mb_count = stride, self.train.microbatches
        self.mb_offset = arena.take(stride * self.mb_count, "activations")
        if self.job.infer:
            size = self.rows * self.job.spec.model.vocab
            self.given["logits"] = arena.ref(size, "activations")

    def _rope_tables(self) -> list[RopeTable]:
        calls = (*self.stage.forward, *self.stage.backward)
        return list(dict.fromkeys(p for call in calls for p in call.ptr if isinstance(p, RopeTable)))

    def _size(self, name: str) -> int:
        buffer = self.stage.buffers[name]
        return buffer.elements * (self.job.dt_bytes if buffer.kind == "dt" else 4)

    # operands

    def _compute(self, n: int) -> Ref:
        """What kernels read of a tensor: its copy in the precision of activations, else its master."""
        return self.copies.get(n, self.masters[n])

    def _bind(self, operand: Operand) -> Ref | None:
        if operand is None:
            return None
        if isinstance(operand, View):
            buffer, ref = self.stage.buffers[operand.buffer], self.buffers[operand.buffer]
            size = self.job.dt_bytes if buffer.kind == "dt" else 4
            return Ref(ref.space, ref.offset + operand.first * size, operand.extent * size)
        if isinstance(operand, Given):
            return self.given[operand.name]
        if isinstance(operand, RopeTable):
            return self.tables[operand]
        return self._weight(operand)

    def _weight(self, weight: Weight) -> Ref:
        n = self.job.number[weight.tensor]
        if weight.use == "weight":
            return self._compute(n)
        if weight.use == "gradient":
            return self.gradients[n]
        found = self.head_weight if weight.use == "head" else self.head_gradient
        assert found is not None
        return found

    def _call(
        self,
        kernel: str,
        ptr: tuple[Ref | None, ...],
        dim: tuple[int, ...],
        *real: float,
        dtype: int | None = None,
        layer: int | None = None,
        part: str = "O",
    ) -> BoundCall:
        chosen = wire.F32 if kernel in _F32_KERNELS else self.job.dtype if dtype is None else dtype
        takes = _TAKES[kernel]
        if (len(ptr), len(dim), len(real)) != takes:
            raise PlanError(
                f"{kernel} takes {takes[0]} operands, {takes[1]} dims, {takes[2]} reals; it was given "
                f"{len(ptr)}, {len(dim)}, {len(real)}"
            )
        return BoundCall(kernel, chosen, ptr, dim, real, layer, part)

    # programs

    def programs(self) -> dict[str, Program]:
        """All programs of the position; empty ones are left out."""
        named = {"F": self._bound(self.stage.forward), "B": self._bound(self.stage.backward), "load": self._load()}
        if not self.job.infer:
            named |= {"init": self._init(), "sumsq": self._sumsq(), "adamw": self._adamw()}
        return {name: Program(name, tuple(calls)) for name, calls in named.items() if calls}

    def _bound(self, calls: Iterable[Call]) -> list[BoundCall]:
        return [
            self._call(c.kernel, tuple(self._bind(p) for p in c.ptr), c.dim, *c.real, layer=c.layer, part=c.part)
            for c in calls
        ]

    def _init(self) -> list[BoundCall]:
        calls = []
        for n in self.owned:
            tensor = self.job.tensors[n]
            if isinstance(tensor.init, Normal):
                dim = (tensor.elements, n, self.train.seed)
                calls.append(self._call("init_normal", (self.masters[n],), dim, 0.0, tensor.init.std))
            else:
                calls.append(self._call("init_const", (self.masters[n],), (tensor.elements,), tensor.init.value))
        return calls

    def _load(self) -> list[BoundCall]:
        calls = [
            self._call("rope_table", (ref,), (table.rows, table.size), table.base) for table, ref in self.tables.items()
        ]
        for n, copy in self.copies.items():
            calls.append(self._call("cast", (copy, self.masters[n]), (self.job.tensors[n].elements,)))
        return calls

    def _sumsq(self) -> list[BoundCall]:
        """The head's share of a tied gradient is added, then every tensor's squared norm taken, in table order."""
        calls = []
        if self.tied is not None and self.first:
            share = self.head_gradient if self.last else self.tied_received
            assert share is not None
            elements = self.job.tensors[self.tied].elements
            calls.append(self._call("add_acc", (self.gradients[self.tied], share), (elements,)))
        for n in self.owned:
            elements = self.job.tensors[n].elements
            out = Ref(wire.SPACE_STATIC, self.sumsq.offset + 8 * n, 8)
            partials = Ref(wire.SPACE_STATIC, self.partials, 8 * -(-elements // wire.SUMSQ_BLOCK))
            calls.append(self._call("sumsq", (out, self.gradients[n], partials), (elements,)))
        return calls

    def _adamw(self) -> list[BoundCall]:
        o = self.train.optimizer
        calls = []
        for n in self.owned:
            tensor, (m, v) = self.job.tensors[n], self.moments[n]
            ptr = (self.masters[n], m, v, self.gradients[n], self.copies.get(n), self.control)
            dtype = self.job.dtype if n in self.copies else wire.F32
            decay = o.weight_decay if tensor.decay else 0.0
            real = (o.beta1, o.beta2, o.eps, decay)
            calls.append(self._call("adamw", ptr, (tensor.elements, 1), *real, dtype=dtype))
        if self.head_gradient is not None:
            calls.append(self._call("zero", (self.head_gradient,), (self.head_gradient.bytes,)))
        return calls

    # lists

    def plan(self) -> PositionPlan:
        """The position, complete."""
        programs = self.programs()
        states, data_bytes = self._states()
        spec, infer = self.job.spec, self.job.infer
        self.arena.end = align(self.arena.end, memory.PAGE)
        by_kind = dict(self.arena.by_kind)
        size = 0 if infer else memory.slot_bytes(data_bytes)
        by_kind["slots"] = 0 if infer else size * spec.checkpoint.slots
        by_kind["other"] += memory.RUNTIME_BYTES + memory.workspace_bytes(spec.parallel.threads)
        steps, load = self._step(programs), self._load_list(programs)

        def given(name: str) -> int | None:
            return self.given[name].offset if name in self.given else None

        return PositionPlan(
            position=self.position,
            chunks=self.pipeline.chunks[self.position],
            arena_bytes=self.arena.end,
            act_offset=self.act_offset,
            act_stride=self.act_stride,
            act_slots=self.act_slots,
            mb_offset=self.mb_offset,
            mb_stride=self.mb_stride,
            mb_count=self.mb_count,
            tokens_offset=given("tokens"),
            targets_offset=given("targets"),
            loss_offset=given("loss"),
            sumsq_offset=None if infer else self.sumsq.offset,
            control_offset=None if infer else self.control.offset,
            logits_offset=given("logits"),
            slot_bytes=size,
            states=states,
            programs=programs,
            init=(BoundAction(wire.A_RUN, program="init"),) if "init" in programs else (),
            load=load,
            step=steps,
            bytes_by_kind=by_kind,
        )

    def _states(self) -> tuple[tuple[State, ...], int]:
        states, offset = [], 0
        for n in self.owned:
            if self.job.infer:
                states.append(State(n, self.masters[n].offset, None, None, None, 0))
                continue
            m, v = self.moments[n]
            states.append(State(n, self.masters[n].offset, m.offset, v.offset, self.gradients[n].offset, offset))
            offset += 3 * align(4 * self.job.tensors[n].elements)
        return tuple(states), offset

    def _send(
        self, target: Position, kind: int, ref: Ref | None, op: str = "O", stage: Stage | None = None
    ) -> BoundAction:
        assert ref is not None
        channel = self.channels.of(self.position, target, kind)
        return BoundAction(wire.A_SEND, op, None, channel, ref=ref, stage=stage)

    def _receive(
        self, source: Position, kind: int, ref: Ref | None, op: str = "O", stage: Stage | None = None
    ) -> BoundAction:
        assert ref is not None
        channel = self.channels.of(source, self.position, kind)
        return BoundAction(wire.A_RECV, op, None, channel, ref=ref, stage=stage)

    def _load_list(self, programs: Mapping[str, Program]) -> tuple[BoundAction, ...]:
        run = [BoundAction(wire.A_RUN, program="load")] if "load" in programs else []
        return (*run, *self._tied_weights())

    def _tied_weights(self) -> list[BoundAction]:
        if self.tied is None or self.first == self.last:
            return []
        if self.first:
            return [self._send(self.pipeline.last, wire.CH_TIED_WEIGHT, self._compute(self.tied))]
        return [self._receive(self.pipeline.first, wire.CH_TIED_WEIGHT, self.head_weight)] if self.last else []

    def _tied_gradient(self) -> list[BoundAction]:
        if self.tied is None or self.first == self.last:
            return []
        if self.first:
            return [self._receive(self.pipeline.last, wire.CH_TIED_GRAD, self.tied_received)]
        return [self._send(self.pipeline.first, wire.CH_TIED_GRAD, self.head_gradient)] if self.last else []

    def _step(self, programs: Mapping[str, Program]) -> Sequence[BoundAction]:
        if self.job.infer:
            return (BoundAction(wire.A_RUN, "F", "F", microbatch=0, stage=self.stage.index),)
        data = [BoundAction(wire.A_DATA)] if self.given else []
        end = [
            *self._tied_gradient(),
            BoundAction(wire.A_RUN, "O", "sumsq"),
            BoundAction(wire.A_REPORT, ref=self.report),
            *self._reports(),
            BoundAction(wire.A_APPLY, ref=self.control),
            BoundAction(wire.A_RUN, "O", "adamw"),
            *self._tied_weights(),
            BoundAction(wire.A_SNAPSHOT),
        ]
        return self._listed(data, end)

    def _listed(self, data: Sequence[BoundAction], end: Sequence[BoundAction]) -> ActionList:
        """``data``, the scheduled row, ``end``: what is scheduled differs by operation, microbatch and slot alone."""
        ops, firsts = np.unique(self.row.op, return_index=True)
        scheduled = {int(op): self._scheduled(OPS[op]) for op in ops[np.argsort(firsts)]}
        around = ActionList.of([*data, *end, *scheduled.values()])
        by_op = np.zeros(len(OPS), np.uint16)
        by_op[list(scheduled)] = around.which[len(data) + len(end) :]
        none = np.full(len(data) + len(end), -1, np.int32)
        slot = self.slot_of[self.row.microbatch] if self.act_slots else np.full(len(self.row), -1, np.int32)

        def join(edge: NDArray[Any], middle: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([edge[: len(data)], middle, edge[len(data) : len(data) + len(end)]])

        which = join(around.which, by_op[self.row.op])
        return ActionList(around.patterns, which, join(none, self.row.microbatch), join(none, slot))

    def _reports(self) -> list[BoundAction]:
        if self.position != COMBINES:
            return [
                self._send(COMBINES, wire.CH_REPORT, self.report, "-"),
                self._receive(COMBINES, wire.CH_CONTROL, self.control, "-"),
            ]
        others = [Position(p) for p in range(self.pipeline.positions) if p != COMBINES]
        size = self.report.bytes
        return [
            *(
                self._receive(p, wire.CH_REPORT, Ref(wire.SPACE_STATIC, self.reports.offset + p * size, size), "-")
                for p in others
            ),
            BoundAction(wire.A_COMBINE, ref=self.reports),
            *(self._send(p, wire.CH_CONTROL, self.control, "-") for p in others),
        ]

    def _scheduled(self, op: str) -> BoundAction:
        """What an operation of the schedule is here, without microbatch and slot."""
        stage, here = self.stage, self.stage.index

        def at(other: int) -> Position:
            return self.pipeline.position(Stage(other))

        if op == "SEND_F":
            return self._send(at(here + 1), wire.CH_FORWARD, self._bind(stage.sent), "F", here)
        if op == "RECV_F":
            return self._receive(at(here - 1), wire.CH_FORWARD, self._bind(stage.received), "F", here)
        if op == "SEND_B":
            return self._send(at(here - 1), wire.CH_BACKWARD, self._bind(stage.gradient_sent), "B", here)
        if op == "RECV_B":
            return self._receive(at(here + 1), wire.CH_BACKWARD, self._bind(stage.gradient_received), "B", here)
        return BoundAction(wire.A_RUN, op, op, stage=here)


def lower(job: Job) -> tuple[tuple[PositionPlan, ...], tuple[Channel, ...], tuple[Row, ...]]:
    """All positions, channels and the scheduled rows of a job."""
    spec, pipeline = job.spec, job.layout.pipeline
    stages = [job.stages[stage] for stage in _one_stage_each(pipeline)]
    if job.infer:
        rows = [Row.of([])]
    else:
        by_stage = GENERATORS[spec.parallel.schedule](pipeline.stages, spec.train.microbatches)
        computations = [by_stage[stage.index] for stage in stages]
        rows = free_slots_early(insert_messages(computations, pipeline.stages))
        check_placement(rows)  # the messages themselves: check_messages, with the optimizer's
        for row, stage in zip(rows, stages, strict=True):
            check_hazards(row, stage)
    activation = spec.train.rows * spec.model.width * job.dt_bytes
    tied = 0 if job.tied_tensor is None else job.tensors[job.tied_tensor].elements
    channels = Channels(
        {
            wire.CH_FORWARD: activation,
            wire.CH_BACKWARD: activation,
            wire.CH_TIED_GRAD: 4 * tied,
            wire.CH_TIED_WEIGHT: job.dt_bytes * tied,
            wire.CH_REPORT: REPORT_BYTES + 8 * len(job.tensors),
            wire.CH_CONTROL: CONTROL_BYTES,
        }
    )
    positions = [
        _Lowering(job, Position(position), stage, channels, row).plan()
        for position, (stage, row) in enumerate(zip(stages, rows, strict=True))
    ]
    positions = [
        replace(p, bytes_by_kind={**p.bytes_by_kind, "channels": channels.ends[p.position] * memory.CHANNEL_BYTES})
        for p in positions
    ]
    check_messages(positions, channels.all)
    return tuple(positions), channels.all, tuple(rows)


def _one_stage_each(pipeline: Pipeline) -> list[Stage]:
    """By position its stage. The programs, slots and lists below are of one stage a position."""
    for position, chunks in enumerate(pipeline.chunks):
        if len(chunks) != 1:
            holds = f"stages {', '.join(map(str, chunks))}" if chunks else "no stage"
            raise PlanError(
                f"position {position} holds {holds}; this version lowers exactly one stage a position: "
                f"take as many positions as stages ({pipeline.stages})"
            )
    return [chunks[0] for chunks in pipeline.chunks]
