"""The memory of a position: where everything lies in its arena, and which bytes an operand is.

The order in the arena (all offsets multiples of 64):

    reports, norms and control block | rotary tables | master weights | compute copies | moments | gradients
    | gradient that is sent back (last stage) | scratch of the running program | activation slots | microbatches' tokens

What a slot of activations holds: all that lives from a microbatch's forward to its backward, and what is received and
sent (``StagePrograms.kept``). Scratch is shared by the programs, which never run at once; inside a program buffers
share it by lifetime.
"""

from __future__ import annotations

from dataclasses import replace

from trainer import wire
from trainer.models.base import Given, Operand, RopeTable, View, Weight
from trainer.plan import memory
from trainer.plan.expand import StagePrograms
from trainer.plan.job import Job
from trainer.plan.memory import align
from trainer.plan.places import Position
from trainer.plan.records import Ref
from trainer.plan.rows import Row
from trainer.plan.slots import assign_slots

COMBINES = Position(0)
"""The position that adds up the reports and decides for the gang."""
REPORT_BYTES, CONTROL_BYTES = 64, 96


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


class PositionMemory:
    """Places all that a position keeps, then finds what operands are bound to."""

    def __init__(self, job: Job, position: Position, stage: StagePrograms, row: Row) -> None:
        self.job, self.position, self.stage, self.row = job, position, stage, row
        self.train = job.spec.train
        self.rows = 4 * self.train.rows
        self.arena = _Arena()
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

    def _place(self) -> None:
        job, arena = self.job, self.arena
        report = REPORT_BYTES + 8 * len(job.tensors)
        count = self.job.layout.pipeline.positions if self.position == COMBINES else 1
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
            self.head_weight = self.compute(self.tied) if alone else arena.ref(size, "weights")
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

    def compute(self, n: int) -> Ref:
        """What kernels read of a tensor: its copy in the precision of activations, else its master."""
        return self.copies.get(n, self.masters[n])

    def bind(self, operand: Operand) -> Ref | None:
        """Where an operand lies; None: the call goes without it."""
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
            return self.compute(n)
        if weight.use == "gradient":
            return self.gradients[n]
        found = self.head_weight if weight.use == "head" else self.head_gradient
        assert found is not None
        return found
