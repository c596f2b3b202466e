"""Pass 3: stages and a schedule into positions: every buffer placed, every operand bound, every message in its list.

Words of ``places.py``: a position is lowered once and runs as a rank in every replica. Which position has the first
stage (embedding, owner of a tied one) and which the last (head, losses) is the pipeline's; position 0 combines the
reports, whatever its stage is. A position has one stage here: ``lower`` refuses several.

A step list is: data, computations with their messages, tied gradient, norms, reports, control, optimizer,
tied weights, snapshot. Every message appears; nothing is decided by the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.errors import PlanError
from trainer.models.base import Call, Normal
from trainer.plan import memory
from trainer.plan.arena import COMBINES, CONTROL_BYTES, REPORT_BYTES, PositionMemory
from trainer.plan.check import check_placement
from trainer.plan.edges import Channels, check_messages
from trainer.plan.job import Job
from trainer.plan.memory import align
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Position, Stage
from trainer.plan.records import ActionList, BoundAction, BoundCall, Channel, PositionPlan, Program, Ref, State
from trainer.plan.rows import OPS, Row
from trainer.plan.slots import check_hazards

_TAKES = {name: (kernel.ptrs, kernel.dims, kernel.reals) for name, kernel in wire.KERNELS.items()}

# Kernels whose arithmetic is f32 whatever the precision of activations: none of their operands is of that
_F32_KERNELS = {name for name, k in wire.KERNELS.items() if all(o.kind != "dt" for o in k.operands)}


class _Lowering:
    """Binds the programs of one position to its memory, and writes its lists."""

    def __init__(self, job: Job, position: Position, channels: Channels, row: Row) -> None:
        self.job, self.position, self.channels, self.row = job, position, channels, row
        self.mem = PositionMemory(job, position, row)
        self.train, self.pipeline = job.spec.train, job.layout.pipeline
        self.first, self.last = self.mem.first, self.mem.last  # stages: with the embedding, with the head
        self.tied, self.owned = job.tied_tensor, job.owned[position]

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
        named = {}
        for number, stage in self.mem.stages.items():
            ops = {"F"} if self.job.infer else self.row.computations(number)
            for op, calls in stage.programs(ops).items():
                named[self._program(number, op)] = self._bound(number, calls, op != "F")
        named["load"] = self._load()
        if not self.job.infer:
            named |= {"init": self._init(), "sumsq": self._sumsq(), "adamw": self._adamw()}
        return {name: Program(name, tuple(calls)) for name, calls in named.items() if calls}

    def _program(self, stage: Stage, op: str) -> str:
        """A program's name: the operation, after its stage where there are several."""
        return op if len(self.mem.stages) == 1 else f"{stage}{op}"

    def _bound(self, stage: Stage, calls: Iterable[Call], backward: bool = False) -> list[BoundCall]:
        bind = partial(self.mem.bind, stage, backward=backward)
        return [
            self._call(c.kernel, tuple(map(bind, c.ptr)), c.dim, *c.real, layer=c.layer, part=c.part) for c in calls
        ]

    def _init(self) -> list[BoundCall]:
        calls = []
        for n in self.owned:
            tensor = self.job.tensors[n]
            if isinstance(tensor.init, Normal):
                dim = (tensor.elements, n, self.train.seed)
                calls.append(self._call("init_normal", (self.mem.masters[n],), dim, 0.0, tensor.init.std))
            else:
                calls.append(self._call("init_const", (self.mem.masters[n],), (tensor.elements,), tensor.init.value))
        return calls

    def _load(self) -> list[BoundCall]:
        calls = [
            self._call("rope_table", (ref,), (table.rows, table.size), table.base)
            for table, ref in self.mem.tables.items()
        ]
        for n, copy in self.mem.copies.items():
            calls.append(self._call("cast", (copy, self.mem.masters[n]), (self.job.tensors[n].elements,)))
        return calls + self._quantised()

    def _quantised(self) -> list[BoundCall]:
        """The weights that kernels read as FP8, out of their masters."""
        part = Ref(wire.SPACE_STATIC, self.mem.partials, 4 * wire.QUANTISE_PARTS)
        calls = []
        for n, codes in self.mem.codes.items():
            rows, columns = self.job.tensors[n].shape
            ptr = (*codes, self.mem.masters[n], part)
            calls.append(self._call("quantise", ptr, (rows, columns, columns, 0), dtype=wire.F32))
        return calls

    def _sumsq(self) -> list[BoundCall]:
        """The head's share of a tied gradient is added, then every tensor's squared norm taken, in table order."""
        calls = []
        if self.tied is not None and self.first:
            share = self.mem.head_gradient if self.last else self.mem.tied_received
            assert share is not None
            elements = self.job.tensors[self.tied].elements
            calls.append(self._call("add_acc", (self.mem.gradients[self.tied], share), (elements,)))
        for n in self.owned:
            elements = self.job.tensors[n].elements
            out = Ref(wire.SPACE_STATIC, self.mem.sumsq.offset + 8 * n, 8)
            partials = Ref(wire.SPACE_STATIC, self.mem.partials, 8 * -(-elements // wire.SUMSQ_BLOCK))
            calls.append(self._call("sumsq", (out, self.mem.gradients[n], partials), (elements,)))
        return calls

    def _adamw(self) -> list[BoundCall]:
        o = self.train.optimizer
        calls = []
        for n in self.owned:
            tensor, (m, v) = self.job.tensors[n], self.mem.moments[n]
            ptr = (self.mem.masters[n], m, v, self.mem.gradients[n], self.mem.copies.get(n), self.mem.control)
            dtype = self.job.dtype if n in self.mem.copies else wire.F32
            decay = o.weight_decay if tensor.decay else 0.0
            real = (o.beta1, o.beta2, o.eps, decay)
            calls.append(self._call("adamw", ptr, (tensor.elements, 1), *real, dtype=dtype))
        if self.mem.head_gradient is not None:
            calls.append(self._call("zero", (self.mem.head_gradient,), (self.mem.head_gradient.bytes,)))
        return calls + self._quantised()

    # lists

    def plan(self) -> PositionPlan:
        """The position, complete."""
        programs = self.programs()
        states, data_bytes = self._states()
        spec, infer = self.job.spec, self.job.infer
        self.mem.arena.end = align(self.mem.arena.end, memory.PAGE)
        by_kind = dict(self.mem.arena.by_kind)
        size = 0 if infer else memory.slot_bytes(data_bytes)
        by_kind["slots"] = 0 if infer else size * spec.checkpoint.slots
        by_kind["other"] += memory.RUNTIME_BYTES + memory.workspace_bytes(spec.parallel.threads)
        steps, load = self._step(programs), self._load_list(programs)

        def given(name: str) -> int | None:
            return self.mem.given[name].offset if name in self.mem.given else None

        return PositionPlan(
            position=self.position,
            chunks=self.pipeline.chunks[self.position],
            arena_bytes=self.mem.arena.end,
            act_offset=self.mem.act_offset,
            act_stride=self.mem.act_stride,
            act_slots=self.mem.act_slots,
            mb_offset=self.mem.mb_offset,
            mb_stride=self.mem.mb_stride,
            mb_count=self.mem.mb_count,
            tokens_offset=given("tokens"),
            targets_offset=given("targets"),
            loss_offset=given("loss"),
            sumsq_offset=None if infer else self.mem.sumsq.offset,
            control_offset=None if infer else self.mem.control.offset,
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
                states.append(State(n, self.mem.masters[n].offset, None, None, None, 0))
                continue
            m, v = self.mem.moments[n]
            states.append(
                State(n, self.mem.masters[n].offset, m.offset, v.offset, self.mem.gradients[n].offset, offset)
            )
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
            return [self._send(self.pipeline.last, wire.CH_TIED_WEIGHT, self.mem.compute(self.tied))]
        return [self._receive(self.pipeline.first, wire.CH_TIED_WEIGHT, self.mem.head_weight)] if self.last else []

    def _tied_gradient(self) -> list[BoundAction]:
        if self.tied is None or self.first == self.last:
            return []
        if self.first:
            return [self._receive(self.pipeline.last, wire.CH_TIED_GRAD, self.mem.tied_received)]
        return [self._send(self.pipeline.first, wire.CH_TIED_GRAD, self.mem.head_gradient)] if self.last else []

    def _step(self, programs: Mapping[str, Program]) -> Sequence[BoundAction]:
        if self.job.infer:
            (stage,) = self.mem.stages
            return (BoundAction(wire.A_RUN, "F", "F", microbatch=0, stage=stage),)
        data = [BoundAction(wire.A_DATA)] if self.mem.given else []
        end = [
            *self._tied_gradient(),
            BoundAction(wire.A_RUN, "O", "sumsq"),
            BoundAction(wire.A_REPORT, ref=self.mem.report),
            *self._reports(),
            BoundAction(wire.A_APPLY, ref=self.mem.control),
            BoundAction(wire.A_RUN, "O", "adamw"),
            *self._tied_weights(),
            BoundAction(wire.A_SNAPSHOT),
        ]
        return self._listed(data, end)

    def _listed(self, data: Sequence[BoundAction], end: Sequence[BoundAction]) -> ActionList:
        """``data``, the scheduled row, ``end``: what is scheduled differs by stage, operation, microbatch and slot."""
        names, local = self.row.by_stage()
        kinds = self.row.op if len(names) == 1 else (local * len(OPS) + self.row.op).astype(np.uint16)
        found, firsts = np.unique(kinds, return_index=True)
        scheduled = {
            int(kind): self._scheduled(Stage(int(names[kind // len(OPS)])), OPS[kind % len(OPS)])
            for kind in found[np.argsort(firsts)]
        }
        around = ActionList.of([*data, *end, *scheduled.values()])
        by_kind = np.zeros(1 + max(scheduled), np.uint16)
        by_kind[list(scheduled)] = around.which[len(data) + len(end) :]
        none = np.full(len(data) + len(end), -1, np.int32)
        slot = self.mem.slot_of if self.mem.act_slots else np.full(len(self.row), -1, np.int32)

        def join(edge: NDArray[Any], middle: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([edge[: len(data)], middle, edge[len(data) : len(data) + len(end)]])

        which = join(around.which, by_kind[kinds])
        return ActionList(around.patterns, which, join(none, self.row.microbatch), join(none, slot))

    def _reports(self) -> list[BoundAction]:
        if self.position != COMBINES:
            return [
                self._send(COMBINES, wire.CH_REPORT, self.mem.report, "-"),
                self._receive(COMBINES, wire.CH_CONTROL, self.mem.control, "-"),
            ]
        others = [Position(p) for p in range(self.pipeline.positions) if p != COMBINES]
        size = self.mem.report.bytes
        return [
            *(
                self._receive(p, wire.CH_REPORT, Ref(wire.SPACE_STATIC, self.mem.reports.offset + p * size, size), "-")
                for p in others
            ),
            BoundAction(wire.A_COMBINE, ref=self.mem.reports),
            BoundAction(wire.A_DECIDE, ref=self.mem.report),
            *(self._send(p, wire.CH_CONTROL, self.mem.control, "-") for p in others),
        ]

    def _scheduled(self, here: Stage, op: str) -> BoundAction:
        """What an operation of the schedule on a stage is here, without microbatch and slot."""
        stage = self.mem.stages[here]

        def at(other: int) -> Position:
            return self.pipeline.position(Stage(other))

        if op == "SEND_F":
            return self._send(at(here + 1), wire.CH_FORWARD, self.mem.bind(here, stage.sent), "F", here)
        if op == "RECV_F":
            return self._receive(at(here - 1), wire.CH_FORWARD, self.mem.bind(here, stage.received), "F", here)
        if op == "SEND_B":
            return self._send(at(here - 1), wire.CH_BACKWARD, self.mem.bind(here, stage.gradient_sent, True), "B", here)
        if op == "RECV_B":
            return self._receive(
                at(here + 1), wire.CH_BACKWARD, self.mem.bind(here, stage.gradient_received, True), "B", here
            )
        return BoundAction(wire.A_RUN, op, self._program(here, op), stage=here)


def lower(job: Job) -> tuple[tuple[PositionPlan, ...], tuple[Channel, ...], tuple[Row, ...]]:
    """All positions, channels and the scheduled rows of a job."""
    spec, pipeline = job.spec, job.layout.pipeline
    if job.infer:
        rows = [Row.of([])]
    else:
        rows = free_slots_early(insert_messages(job.rows, pipeline.stages))
        check_placement(rows)  # the messages themselves: check_messages, with the optimizer's
        for row, stages in zip(rows, pipeline.chunks, strict=True):
            for stage in stages:
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
    positions = [_Lowering(job, Position(position), channels, row).plan() for position, row in enumerate(rows)]
    positions = [
        replace(p, bytes_by_kind={**p.bytes_by_kind, "channels": channels.ends[p.position] * memory.CHANNEL_BYTES})
        for p in positions
    ]
    check_messages(positions, channels.all)
    return tuple(positions), channels.all, tuple(rows)
