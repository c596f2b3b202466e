"""The memory of a position: where everything lies in its arena, and which bytes an operand is.

The order in the arena (all offsets multiples of 64):

    reports, norms and control block | rotary tables | master weights | compute copies | moments | gradients
    (as often as groups of microbatches are added up at once)
    | gradient that is sent back (last stage) | scratch of the running program | activation slots | microbatches' tokens
    | what other replicas send of their gradients, where it does not lie in a second buffer of gradients

What a slot of activations holds: all that lives from one program of a microbatch to another, and what is received and
sent (``slot_layout.py``). Scratch is shared by the programs, which never run at once; inside a program buffers share it
by lifetime.

Stages of one position that follow one another (a run) have one slot for a microbatch, and pass nothing on: the second
reads what the first made where it lies, and the first's backward works on the gradient where the second's left it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from trainer import wire
from trainer.models.base import Call, Given, Operand, RopeTable, View, Weight
from trainer.plan import memory
from trainer.plan.expand import OTHER_SHARES, StagePrograms
from trainer.plan.job import HeadUse, Job
from trainer.plan.memory import align
from trainer.plan.muon import HiddenMatrix
from trainer.plan.places import Position, Stage
from trainer.plan.records import Ref
from trainer.plan.reduce import Gradient, GradientMemory, own_piece
from trainer.plan.rows import Row
from trainer.plan.slot_layout import SlotLayout, lay_out
from trainer.plan.slots import assign_slots, holders, sent_at_once

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


class _Buffers:
    """Where the buffers of one stage lie."""

    def __init__(self, stage: StagePrograms, dt_bytes: int) -> None:
        self.stage, self.bytes = stage, {"dt": dt_bytes, "acc": 4, "byte": 1, "places": 4}
        self.places: dict[str, Ref] = {}
        self.back: dict[str, Ref] = {}
        """In its backward, where that is elsewhere: what the stage above left where it made it."""

    def size(self, name: str) -> int:
        """Bytes of a buffer."""
        buffer = self.stage.buffers[name]
        return buffer.elements * self.bytes[buffer.kind]

    def bind(self, view: View, backward: bool) -> Ref:
        """Where what a program sees lies."""
        kind = self.stage.buffers[view.buffer].kind
        ref = (backward and self.back.get(view.buffer)) or self.places[view.buffer]
        size = self.bytes[kind]
        return Ref(ref.space, ref.offset + view.first * size, view.extent * size)


class PositionMemory:
    """Places all that a position keeps, then finds what operands are bound to."""

    def __init__(self, job: Job, position: Position, row: Row) -> None:
        self.job, self.position, self.row = job, position, row
        self.runs = job.layout.pipeline.runs(position)
        self.part = None if job.parts is None else job.parts.at(position)
        if job.parts is not None and self.part is not None:
            here = job.parts.stage(self.part)  # part 0 follows the last stage
            self.runs = (*self.runs, (here,)) if self.part else (*self.runs[:-1], (*self.runs[-1], here))
        self.stages = {stage: job.stages[stage] for run in self.runs for stage in run}
        self.train = job.spec.train
        self.rows = 4 * self.train.rows
        self.arena = _Arena()
        self.first = any(stage.first for stage in self.stages.values())  # with the embedding
        self.last = any(stage.last for stage in self.stages.values())  # with the head
        self.tied = job.tied_tensor
        self.owned = job.owned[position]
        self.use = next((use for use in job.head_uses if use.position == position), None)
        self.tables: dict[RopeTable, Ref] = {}
        self.masters: dict[int, Ref] = {}
        self.copies: dict[int, Ref] = {}
        self.codes: dict[int, tuple[Ref, Ref | None, Ref]] = {}
        """By tensor, its FP8: codes, their transpose (for training), scale."""
        self.moments: dict[int, tuple[Ref, Ref | None]] = {}
        """By tensor: Muon has one."""
        self.gradients: dict[int, Ref] = {}
        self.gradient_memory = GradientMemory((), 0, 0, 1)
        self.pieces = job.pieces
        self.norm_parts: dict[int, Ref] = {}
        """By tensor in pieces, the sums of squares of its blocks, all pieces'."""
        self.blocks: dict[int, Ref] = {}
        """By tensor, sums of squares of its blocks: each has a place, so that a device may take all norms at once."""
        self.given: dict[str, Ref] = {}
        self.buffers = {number: _Buffers(stage, job.dt_bytes) for number, stage in self.stages.items()}
        self.apart: list[Stage] = []
        """Stages whose gradient to be sent lies in no slot."""
        self.layouts: list[SlotLayout] = []
        """By run, its slot."""
        self.head_weight: Ref | None = None
        self.head_gradient: Ref | None = None
        self.tied_received: dict[Position, Ref] = {}
        """By position, the share of the head's gradient that comes from there."""
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
            if job.optimistic:  # run/plan.h finds it there
                self.foreseen = arena.ref(CONTROL_BYTES, "other")
                assert self.foreseen.offset == self.control.offset + wire.FORESEEN
            if job.replicas > 1 and self.position == COMBINES:
                self.other_report = arena.ref(report, "other")
        for table in self._rope_tables():
            self.tables[table] = arena.ref(4 * table.rows * table.size, "other")
        for n in self.owned:
            self.masters[n] = arena.ref(4 * self.kept(n), "weights")
        for n in self.owned:
            if n in job.quantised:
                size = job.tensors[n].elements
                turned = None if job.infer else arena.ref(size, "weights")
                self.codes[n] = (arena.ref(size, "weights"), turned, arena.ref(4, "weights"))
            elif n in self.pieces or job.optimistic or (job.dtype != wire.F32 and job.tensors[n].decay):
                self.copies[n] = self._padded(n, wire.DTYPE_BYTES[self.copy_dtype(n)], "weights")
        if self.tied is not None and self.use is not None:
            alone = self.tied in self.owned
            size = job.dt_bytes * self.use.rows * job.tensors[self.tied].shape[1]
            self.head_weight = self.rows_of(self.compute(self.tied), self.use) if alone else arena.ref(size, "weights")
        if not job.infer:
            self._place_training(arena)
        self._lay_slots_out()
        self._place_scratch(arena)
        self._place_slots(arena)

    def rows_of(self, whole: Ref, use: HeadUse) -> Ref:
        """A stage's rows of the head's matrix, or of its gradient."""
        row = whole.bytes // self.job.spec.model.vocab
        return Ref(whole.space, whole.offset + use.first * row, use.rows * row)

    def kept(self, n: int) -> int:
        """Elements of a tensor whose state is kept here."""
        return self.pieces.get(n, self.job.tensors[n].elements)

    def copy_dtype(self, n: int) -> int:
        """Of what kernels read of a tensor."""
        return self.job.dtype if self.job.tensors[n].decay else wire.F32

    def own(self, base: Ref, n: int) -> Ref:
        """What is this replica's of a tensor's gradient or copy: its piece, or all."""
        if n not in self.pieces:
            return base
        return own_piece(base, base.bytes // self.job.tensors[n].elements * self.pieces[n])

    def _padded(self, n: int, item: int, kind: str) -> Ref:
        """A tensor of elements of ``item`` bytes, with room for all replicas' pieces."""
        size = item * self.job.tensors[n].elements
        room = max(size, item * self.pieces.get(n, 0) * self.job.replicas)
        return Ref(wire.SPACE_STATIC, self.arena.take(room, kind), size)

    def _place_gradients(self, arena: _Arena) -> None:
        """In several buffers where groups need them; where there are replicas, whole tensors of a stage together."""
        job, targets = self.job, list[Gradient]()
        start = arena.end
        parted = job.parts is not None
        only_shares = [n for n in self.owned if parted and n == self.tied and job.tensors[n].part == "head"]
        names = [
            (job.layout.stage(job.tensors[n]), n in self.pieces, n, False) for n in self.owned if n not in only_shares
        ]
        if self.tied is not None and self.use is not None and not job.joined:
            names.append((max(self.stages), self.tied in self.pieces and not parted, self.tied, True))
        for stage, pieces, n, head in sorted(names) if job.replicas > 1 else names:
            if head and parted and self.use is not None:
                ref = arena.ref(4 * self.use.rows * job.tensors[n].shape[1], "gradients")
            else:
                ref = self._padded(n, 4, "gradients")
            targets.append(Gradient(stage, ref, self.pieces[n] if pieces else 0))
            if head:
                self.head_gradient = ref
            else:
                self.gradients[n] = ref
        stride, buffers = arena.end - start, job.groups.buffers
        arena.take(stride * (buffers - 1), "gradients")
        for n in only_shares:  # no program here adds to it
            self.gradients[n] = self._padded(n, 4, "gradients")
        if self.tied is not None and job.joined:
            self.head_gradient = self.gradients[self.tied]
        self.gradient_memory = GradientMemory(tuple(targets), start, stride, buffers)

    def _place_training(self, arena: _Arena) -> None:
        for n in self.owned:
            size = 4 * self.kept(n)
            first = arena.ref(size, "moments")
            self.moments[n] = (first, None if n in self.job.muon else arena.ref(size, "moments"))
        self._place_gradients(arena)
        for n in self.owned:
            if n in self.pieces:
                blocks = self.pieces[n] * self.job.replicas // wire.SUMSQ_BLOCK
                self.norm_parts[n] = arena.ref(8 * blocks, "scratch")
        for number, stage in self.stages.items():
            for name in (name for name in stage.buffers if name.startswith(OTHER_SHARES)):
                self.buffers[number].places[name] = arena.ref(self.buffers[number].size(name), "activations")
        for number, stage in self.stages.items():
            sent, buffers = stage.gradient_sent, self.buffers[number]
            if sent is None or sent.buffer in stage.kept or number - 1 in self.stages:
                continue
            if sent_at_once(self.row, number):
                buffers.places[sent.buffer] = arena.ref(buffers.size(sent.buffer), "activations")
                self.apart.append(number)

    def _lay_slots_out(self) -> None:
        """Each run's slot."""
        elsewhere = {(number, name) for number, buffers in self.buffers.items() for name in buffers.places}

        def size(name: tuple[Stage, str]) -> int:
            return self.buffers[name[0]].size(name[1])

        self.layouts = [lay_out(run, self.stages, size, elsewhere) for run in self.runs]
        for layout in self.layouts:
            for (number, name), offset in layout.offsets.items():
                buffers = self.buffers[number]
                buffers.places[name] = Ref(wire.SPACE_ACT, offset, buffers.size(name))
        for run in self.runs:
            for below, above in pairwise(run):
                sent, received = self.stages[below].sent, self.stages[above].received
                assert sent is not None
                assert received is not None
                self.buffers[above].places[received.buffer] = self.buffers[below].bind(sent, False)
            for below, above in reversed(list(pairwise(run))):
                left, taken = self.stages[above].gradient_sent, self.stages[below].gradient_received
                if left is not None and taken is not None:
                    self.buffers[below].back[taken.buffer] = self.buffers[above].bind(left, True)

    def _place_scratch(self, arena: _Arena) -> None:
        places: dict[tuple[Stage, str], int] = {}
        most = beside = 0
        for number, stage in self.stages.items():
            buffers = self.buffers[number]
            sizes = {n: buffers.size(n) for n in stage.buffers if n not in buffers.places and n not in buffers.back}
            for calls in (stage.forward, stage.backward, stage.weights):
                offsets, end = memory.place_scratch(calls, sizes)
                places |= {(number, name): offset for name, offset in offsets.items()}
                most = max(most, end)
        if not self.job.infer:
            if self.tied is not None and self.tied in self.owned:  # comes while the last backward runs
                for use in (use for use in self.job.head_uses if use.position != self.position):
                    size = 4 * use.rows * self.job.tensors[self.tied].shape[1]
                    size = size if self.job.parts is not None else 4 * self.kept(self.tied)
                    self.tied_received[use.position] = arena.ref(size, "gradients")
            blocks = 0
            for n in self.owned:
                self.blocks[n] = Ref(
                    wire.SPACE_STATIC, blocks, 8 * -(-self.job.tensors[n].elements // wire.SUMSQ_BLOCK)
                )
                blocks += align(self.blocks[n].bytes)
            if self.job.norms_at_once:  # beside what the backward has
                beside = arena.take(blocks, "scratch")
            else:
                most = max(most, blocks)
        if self.codes:
            most = max(most, 4 * wire.QUANTISE_PARTS)
        whole = align(4 * wire.QUANTISE_PARTS)  # of a weight as AdamW will leave it, to be made codes
        if self.job.optimistic and self.codes:
            most = max(most, whole + 4 * max(self.job.tensors[n].elements for n in self.codes))
        orthogonal = align(most) if self.job.optimistic and self.codes else 0  # beside such a weight
        if not self.job.infer:
            made = [place.bytes for n in self.owned if n in self.job.muon for _, place in self.matrices(n)]
            most = max(most, orthogonal + max(made, default=0))
        base = arena.take(most, "scratch")
        for (number, name), offset in places.items():
            buffers = self.buffers[number]
            buffers.places[name] = Ref(wire.SPACE_STATIC, base + offset, buffers.size(name))
        self.partials, self.whole, self.orthogonal = base, base + whole, base + orthogonal
        start = beside if self.job.norms_at_once else base
        self.blocks = {n: replace(ref, offset=start + ref.offset) for n, ref in self.blocks.items()}

    def matrices(self, n: int, start: int = 0) -> list[tuple[int, HiddenMatrix]]:
        """The matrices that a tensor of Muon is made of: the first element, and where it is made orthogonal."""
        tensor = self.job.tensors[n]
        columns = tensor.shape[1]
        return [(first * columns, HiddenMatrix(rows, columns, start)) for first, rows in tensor.matrices]

    def _place_slots(self, arena: _Arena) -> None:
        offset = max((layout.bytes for layout in self.layouts), default=0)
        held = holders(self.row, self.runs)
        self.slots, slots = assign_slots(self.row, held, self.apart)
        self.slot_of = slots[held]
        self.act_stride, self.act_slots = offset, self.slots if offset else 0
        self.act_offset = arena.take(offset * self.act_slots, "activations")
        stride = 0
        if any(Given("tokens") in call.ptr for call in self._calls()):
            self.given["tokens"], stride = Ref(wire.SPACE_MB, stride, self.rows), stride + align(self.rows)
        shares = self.last or self.part is not None
        if shares and (not self.job.infer or self.job.losses):
            for name in ("targets", "loss") if self.last else ("targets",):
                self.given[name], stride = Ref(wire.SPACE_MB, stride, self.rows), stride + align(self.rows)
        self.mb_stride, self.mb_count = stride, self.job.groups.microbatches
        self.mb_offset = arena.take(stride * self.mb_count, "activations")
        if self.job.infer and not self.job.losses:
            size = self.rows * self.job.spec.model.vocab
            self.given["logits"] = arena.ref(size, "activations")

    def _calls(self) -> Iterable[Call]:
        stages = self.stages.values()
        return (call for stage in stages for call in (*stage.forward, *stage.backward, *stage.weights))

    def _rope_tables(self) -> list[RopeTable]:
        return list(dict.fromkeys(p for call in self._calls() for p in call.ptr if isinstance(p, RopeTable)))

    def compute(self, n: int) -> Ref:
        """What kernels read of a tensor: its copy in the precision of activations, else its master."""
        return self.copies.get(n, self.masters[n])

    def bind(self, number: Stage, operand: Operand, backward: bool = False) -> Ref | None:
        """Where an operand of a stage's program lies; None: the call goes without it."""
        if operand is None:
            return None
        if isinstance(operand, View):
            return self.buffers[number].bind(operand, backward)
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
        if n in self.codes and weight.use.startswith("fp8"):
            part = self.codes[n][("fp8", "fp8_turned", "fp8_scale").index(weight.use)]
            assert part is not None
            return part
        found = self.head_weight if weight.use == "head" else self.head_gradient
        assert found is not None
        return found
