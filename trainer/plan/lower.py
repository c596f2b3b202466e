"""Pass 3: stages and a schedule into positions: every buffer placed, every operand bound, every message in its list.

Words of ``places.py``: a position is lowered once and runs as a rank in every replica. Which position has the first
stage (embedding, owner of a tied one) and which the last (head, losses) is the pipeline's; position 0 combines the
reports, whatever its stage is. A position has one stage here: ``lower`` refuses several.

A step list is: data, computations with their messages, tied gradient, norms (a step's only microbatch takes them in its
backward), reports, control, optimizer, tied weights, snapshot. Every message appears; nothing is decided by the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.plan import memory
from trainer.plan.arena import COMBINES, PositionMemory
from trainer.plan.check import check_placement
from trainer.plan.edges import Channels, OwnChannels, check_messages
from trainer.plan.flops import kernel_flops
from trainer.plan.head_messages import HeadMessages
from trainer.plan.head_rows import check_parts, with_parts
from trainer.plan.job import Job
from trainer.plan.memory import align
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.optimistic import Cut, cuts
from trainer.plan.places import Position, Stage
from trainer.plan.programs import Programs
from trainer.plan.records import ActionList, BoundAction, Channel, PositionPlan, Program, Ref, State
from trainer.plan.reduce import Reduction, expanded
from trainer.plan.rows import HEAD, JOIN, OPS, SEND_B, SEND_F, B, F, Row, W
from trainer.plan.slots import check_hazards


class _Lowering:
    """Writes the lists of one position, whose programs are bound to its memory (``programs.py``)."""

    def __init__(self, job: Job, position: Position, channels: Channels, row: Row, cut: Cut) -> None:
        self.job, self.position, self.channels, self.row, self.cut = job, position, channels, row, cut
        self.mem = PositionMemory(job, position, row)
        self.reduction = Reduction(position, job.replicas, job.groups, self.mem.gradient_memory, channels)
        self.own = OwnChannels(channels, position)
        self.head = HeadMessages(job, self.mem, self.own)
        self.programs = Programs(job, self.mem, row, self.reduction, self.head)
        self.pipeline, self.owned = job.layout.pipeline, job.owned[position]

    def plan(self) -> PositionPlan:
        """The position, complete."""
        programs = self.programs.bound()
        states, data_bytes = self._states()
        spec, infer = self.job.spec, self.job.infer
        self.mem.arena.end = align(self.mem.arena.end, memory.PAGE)
        by_kind = dict(self.mem.arena.by_kind)
        size = 0 if infer else memory.slot_bytes(data_bytes)
        by_kind["slots"] = 0 if infer else size * spec.checkpoint.slots
        by_kind["other"] += memory.RUNTIME_BYTES + memory.workspace_bytes(spec.parallel.threads)
        (steps, prefix, checks), load = self._step(programs), self._load_list(programs)

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
            redo=self._redo(programs) if self.job.optimistic else (),
            step_prefix=prefix,
            step_checks=checks,
        )

    def _states(self) -> tuple[tuple[State, ...], int]:
        states, offset = [], 0
        for n in self.owned:
            if self.job.infer:
                states.append(State(n, self.mem.masters[n].offset, None, None, None, 0))
                continue
            m, v = self.mem.moments[n]
            states.append(
                State(
                    tensor=n,
                    master=self.mem.masters[n].offset,
                    m=m.offset,
                    v=None if v is None else v.offset,
                    grad=self.mem.gradients[n].offset,
                    slot=offset,
                    pieces=self.job.replicas if n in self.mem.pieces else 1,
                )
            )
            offset += states[-1].kinds * align(4 * self.mem.kept(n))
        return tuple(states), offset

    def _load_list(self, programs: Mapping[str, Program]) -> tuple[BoundAction, ...]:
        run = [BoundAction(wire.A_RUN, program="load")] if "load" in programs else []
        return (*run, *self._gather(), *self.head.weights())

    def _gather(self) -> list[BoundAction]:
        """The other replicas' pieces of what kernels read of the tensors here."""
        return [
            action
            for n in self.owned
            if n in self.mem.pieces
            for action in self.reduction.gather(
                wire.CH_GATHER, self.mem.copies[n], self.mem.own(self.mem.copies[n], n).bytes
            )
        ]

    def _gather_norms(self) -> list[BoundAction]:
        exchanges = [
            action
            for n, parts in self.mem.norm_parts.items()
            for action in self.reduction.gather(wire.CH_NORMS, parts, 8 * self.mem.kept(n) // wire.SUMSQ_BLOCK)
        ]
        return [*exchanges, BoundAction(wire.A_RUN, "O", "norms")] if exchanges else []

    def _redo(self, programs: Mapping[str, Program]) -> tuple[BoundAction, ...]:
        """What AdamW's copies of the weights are sent on as, where others were foreseen."""
        run = [BoundAction(wire.A_RUN, "O", "codes")] if "codes" in programs else []
        return (*run, *self._gather(), *self.head.weights())

    def _step(self, programs: Mapping[str, Program]) -> tuple[Sequence[BoundAction], int, int]:
        """The list of a step; how many of its actions lead it, and how many then check the step before: 0 and 0, where
        it is checked at its own end."""
        if self.job.infer:
            (stage,) = self.mem.stages
            return (BoundAction(wire.A_RUN, "F", "F", microbatch=0, stage=stage),), 0, 0
        data = [BoundAction(wire.A_DATA)] if self.mem.given else []
        made = [
            *self.head.gradient(),
            *([BoundAction(wire.A_RUN, "O", "sumsq")] if "sumsq" in programs else []),
            *self._gather_norms(),
            BoundAction(wire.A_REPORT, ref=self.mem.report),
        ]
        tell, decide = self._reports()
        sent = [*self._gather(), *self.head.weights()]
        adamw, snapshot = BoundAction(wire.A_RUN, "O", "adamw"), BoundAction(wire.A_SNAPSHOT)
        if not self.job.optimistic:
            apply = BoundAction(wire.A_APPLY, ref=self.mem.control)
            end = [*made, *tell, *decide, apply, adamw, *sent, snapshot]
            return self._listed([data, slice(None), end]), 0, 0
        check = [*decide, BoundAction(wire.A_CHECK, ref=self.mem.control), adamw, snapshot]
        foresee = [BoundAction(wire.A_FORESEE, ref=self.mem.foreseen), BoundAction(wire.A_RUN, "O", "foresee")]
        told, prefix = self.cut.report, self.cut.prefix
        end = [*made, *foresee, *sent]
        listed = self._listed([data, slice(told), tell, slice(told, prefix), check, slice(prefix, None), end])
        return listed, len(data) + len(tell) + prefix, len(check)

    def _listed(self, parts: Sequence[Sequence[BoundAction] | slice]) -> ActionList:
        """Actions and slices of the scheduled row, one after the other: what is scheduled differs by stage, operation,
        microbatch and slot."""
        names, local = self.row.by_stage()
        kinds: NDArray[np.unsignedinteger[Any]] = self.row.op
        if len(names) > 1:
            kinds = (local * len(OPS) + self.row.op).astype(np.uint16)
        variants = len(self.job.groups.variants)
        if variants > 1:  # microbatches of different groups, and the last of each, have programs of their own
            backward = ((self.row.op != F) & (self.row.op < SEND_F)) | np.isin(self.row.op, (SEND_B, JOIN))
            number = np.where(backward, self.job.groups.variant_of[self.row.microbatch], 0)
            kinds = (kinds.astype(np.uint32) * variants + number).astype(np.uint32)
        found, firsts = np.unique(kinds, return_index=True)
        scheduled: dict[int, Sequence[BoundAction]] = {}
        for kind in found[np.argsort(firsts)].tolist():
            number, op = divmod(kind // variants, len(OPS))
            scheduled[kind] = self._sequence(Stage(int(names[number])), OPS[op], kind % variants)
        listed = [action for sequence in scheduled.values() for action in sequence]
        edges = [action for part in parts if not isinstance(part, slice) for action in part]
        around = ActionList.of([*edges, *listed])
        numbers = iter(around.which[len(edges) :].tolist())
        sequences = {
            kind: [(next(numbers), action.stage is not None) for action in sequence]
            for kind, sequence in scheduled.items()
        }
        none = np.full(len(edges), -1, np.int32)
        slot = self.mem.slot_of if self.mem.act_slots else np.full(len(self.row), -1, np.int32)

        def join(edge: NDArray[Any], middle: NDArray[Any]) -> NDArray[Any]:
            pieces, at = [], 0
            for part in parts:
                if isinstance(part, slice):
                    pieces.append(middle[part])
                else:
                    pieces.append(edge[at : at + len(part)])
                    at += len(part)
            return np.concatenate(pieces)

        which, microbatch, slot = expanded(kinds, sequences, self.row.microbatch, slot)
        return ActionList(
            around.patterns, join(around.which[: len(edges)], which), join(none, microbatch), join(none, slot)
        )

    def _sequence(self, stage: Stage, op: str, variant: int) -> Sequence[BoundAction]:
        """What an operation of the schedule on a stage is here: the actions of a stage are the microbatch's."""
        actions = self.reduction.sequences.get((stage, op, variant)) or (
            self.head.messages(stage, op) if op in HEAD else (self._scheduled(stage, op),)
        )
        if self.job.replicas == 1 or not self.job.groups.variants[variant].last or op != self._tail_after(stage):
            return actions
        return (*actions, *self.reduction.tails[stage])

    def _tail_after(self, stage: Stage) -> str:
        """The operation after which a stage's additions over replicas come to an end: its last backward, or, where that
        may wait, the message that it makes."""
        ops = (B, W, SEND_B, JOIN) if self.reduction.waits else (B, W)
        return self.row.last_of(stage, self.job.groups.microbatches - 1, ops)

    def _reports(self) -> tuple[list[BoundAction], list[BoundAction]]:
        """What tells position 0 of this position's report, and what brings the decision."""
        if self.position != COMBINES:
            return (
                [self.own.send(COMBINES, wire.CH_REPORT, self.mem.report, "-")],
                [self.own.receive(COMBINES, wire.CH_CONTROL, self.mem.control, "-")],
            )
        others = [Position(p) for p in range(self.pipeline.positions) if p != COMBINES]
        size = self.mem.report.bytes
        return [], [
            *(
                self.own.receive(
                    p,
                    wire.CH_REPORT,
                    Ref(wire.SPACE_STATIC, self.mem.reports.offset + p * size, size),
                    "-",
                )
                for p in others
            ),
            BoundAction(wire.A_COMBINE, ref=self.mem.reports),
            *self._merges(),
            BoundAction(wire.A_DECIDE, ref=self.mem.report),
            *(self.own.send(p, wire.CH_CONTROL, self.mem.control, "-") for p in others),
        ]

    def _merges(self) -> list[BoundAction]:
        """The other replicas' reports: after each exchange twice as many are joined."""
        actions: list[BoundAction] = []
        across = 1
        while across < self.job.replicas:
            swap = self.reduction.swap(wire.CH_REPORT, across, self.mem.report, self.mem.other_report)
            actions += [*(replace(half, op="-") for half in swap), BoundAction(wire.A_MERGE, ref=self.mem.other_report)]
            across *= 2
        return actions

    def _scheduled(self, here: Stage, op: str) -> BoundAction:
        """What an operation of the schedule on a stage is here, without microbatch and slot."""
        stage = self.mem.stages[here]

        def at(other: int) -> Position:
            return self.pipeline.position(Stage(other))

        if op == "SEND_F":
            return self.own.send(at(here + 1), wire.CH_FORWARD, self.mem.bind(here, stage.sent), "F", here)
        if op == "RECV_F":
            return self.own.receive(at(here - 1), wire.CH_FORWARD, self.mem.bind(here, stage.received), "F", here)
        if op == "SEND_B":
            return self.own.send(
                at(here - 1), wire.CH_BACKWARD, self.mem.bind(here, stage.gradient_sent, True), "B", here
            )
        if op == "RECV_B":
            return self.own.receive(
                at(here + 1),
                wire.CH_BACKWARD,
                self.mem.bind(here, stage.gradient_received, True),
                "B",
                here,
            )
        return BoundAction(wire.A_RUN, op, self.programs.name(here, op), stage=here)


def lower(job: Job) -> tuple[tuple[PositionPlan, ...], tuple[Channel, ...], tuple[Row, ...]]:
    """All positions, channels and the scheduled rows of a job."""
    pipeline = job.layout.pipeline
    if job.infer:
        rows = [Row.of([])]
    elif job.parts is not None:
        rows = list(with_parts(job.rows, pipeline, job.parts, _times(job)))
        check_parts(rows, job.parts)
    else:
        rows = free_slots_early(insert_messages(job.rows, pipeline.stages))
        check_placement(rows)  # the messages themselves: check_messages, with the optimizer's
    for row, stages in zip(rows, pipeline.chunks, strict=True) if not job.infer else ():
        for stage in stages:
            check_hazards(row, stage)
    channels = Channels()
    parts = cuts(rows, pipeline, COMBINES) if job.optimistic else [Cut(0, 0)] * len(rows)
    positions = [
        _Lowering(job, Position(position), channels, row, cut).plan()
        for position, (row, cut) in enumerate(zip(rows, parts, strict=True))
    ]
    positions = [
        replace(p, bytes_by_kind={**p.bytes_by_kind, "channels": memory.channels_bytes(p.position, channels.all)})
        for p in positions
    ]
    check_messages(positions, channels.all)
    return tuple(positions), channels.all, tuple(rows)


def _times(job: Job) -> dict[tuple[Stage, str], float]:
    """What each stage's operations last, by what they compute."""
    return {
        (stage.index, op): 1.0 + sum(kernel_flops(call.kernel, call.dim).done for call in calls)
        for stage in job.stages
        for op, calls in stage.programs("FIWB").items()
    }
