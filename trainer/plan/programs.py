"""The programs of a position: kernel calls of its stages, of its optimizer and of its loads, bound to its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from trainer import wire
from trainer.errors import PlanError
from trainer.models.base import Call, Normal
from trainer.plan.arena import PositionMemory
from trainer.plan.head_messages import HeadMessages
from trainer.plan.job import Job
from trainer.plan.places import Stage
from trainer.plan.records import BoundCall, Program, Ref
from trainer.plan.reduce import Reduction, joined, own_piece
from trainer.plan.rows import B, Row, W

_TAKES = {name: (kernel.ptrs, kernel.dims, kernel.reals) for name, kernel in wire.KERNELS.items()}

# Kernels whose arithmetic is f32 whatever the precision of activations: none of their operands is of that
_F32_KERNELS = {name for name, k in wire.KERNELS.items() if all(o.kind != "dt" for o in k.operands)}


class Programs:
    """Of one position. ``reduction`` is told of every backward."""

    def __init__(self, job: Job, mem: PositionMemory, row: Row, reduction: Reduction, head: HeadMessages) -> None:
        self.job, self.mem, self.row, self.reduction, self.head = job, mem, row, reduction, head
        self.train, self.tied, self.owned = job.spec.train, job.tied_tensor, job.owned[mem.position]
        self.summed: set[int] = set()
        """Tensors whose squared norm a backward takes."""

    def bound(self) -> dict[str, Program]:
        """All programs of the position; empty ones are left out."""
        made: dict[str, Program] = {}
        last = self.job.groups.microbatches - 1

        def add(name: str, calls: Sequence[BoundCall]) -> None:
            if calls:
                made[name] = Program(name, tuple(calls))

        for number, stage in self.mem.stages.items():
            ops = {"F"} if self.job.infer else self.row.computations(number)
            for op, calls in stage.programs(ops).items():
                name, bound = self.name(number, op), self._bound(number, calls, op != "F")
                if op == "F":
                    add(name, bound)
                else:
                    begins, ends = op in self.row.ops_of(number, 0), op == self.row.last_of(number, last, (B, W))
                    if ends and self.job.norms_at_once:
                        bound = self._with_norms(bound)
                    self.reduction.add(number, op, name, bound, begins, ends)
                    made |= self.reduction.programs
        add("load", self._load())
        if not self.job.infer:
            self.reduction.finish(lambda size: self.mem.arena.take(size, "gradients"))
            add("init", self._init())
            add("sumsq", self._sumsq())
            add("norms", self._norms())
            add("adamw", self._adamw())
        if self.job.optimistic:
            add("foresee", self._foresee())
            add("codes", self._quantised())
        return made | self.reduction.programs

    def name(self, stage: Stage, op: str) -> str:
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
            tensor, pieces = self.job.tensors[n], n in self.mem.pieces
            whole = self.mem.gradients[n] if pieces else self.mem.masters[n]
            if isinstance(tensor.init, Normal):
                dim = (tensor.elements, n, self.train.seed)
                calls.append(self._call("init_normal", (whole,), dim, 0.0, tensor.init.std))
            else:
                calls.append(self._call("init_const", (whole,), (tensor.elements,), tensor.init.value))
            if pieces:
                ptr = (self.mem.masters[n], self.mem.own(whole, n))
                calls.append(self._call("cast", ptr, (self.mem.kept(n),), dtype=wire.F32))
                calls.append(self._call("zero", (whole,), (whole.bytes,)))
        return calls

    def _load(self) -> list[BoundCall]:
        calls = [
            self._call("rope_table", (ref,), (table.rows, table.size), table.base)
            for table, ref in self.mem.tables.items()
        ]
        for n, copy in self.mem.copies.items():
            ptr = (self.mem.own(copy, n), self.mem.masters[n])
            calls.append(self._call("cast", ptr, (self.mem.kept(n),), dtype=self.mem.copy_dtype(n)))
        return calls + self._quantised()

    def _quantised(self) -> list[BoundCall]:
        """The weights that kernels read as FP8, out of their masters."""
        return [self._quantise(n, self.mem.masters[n]) for n in self.mem.codes]

    def _quantise(self, n: int, weight: Ref) -> BoundCall:
        part = Ref(wire.SPACE_STATIC, self.mem.partials, 4 * wire.QUANTISE_PARTS)
        rows, columns = self.job.tensors[n].shape
        return self._call("quantise", (*self.mem.codes[n], weight, part), (rows, columns, columns, 0), dtype=wire.F32)

    def _sumsq(self) -> list[BoundCall]:
        """The head's share of a tied gradient is added, where it is apart, then every tensor's squared norm taken, in
        table order."""
        calls = []
        if self.tied is not None and self.tied in self.owned and not self.job.joined:
            calls += [self._call("add_acc", ptr, (ptr[1].bytes // 4,)) for ptr in self.head.shares(self.tied)]
        for n in self.owned:
            elements = self.mem.kept(n)
            if n in self.mem.norm_parts:
                part = own_piece(self.mem.norm_parts[n], 8 * elements // wire.SUMSQ_BLOCK)
                calls.append(self._call("sumsq_parts", (part, self.mem.own(self.mem.gradients[n], n)), (elements,)))
            elif n not in self.summed:
                calls.append(self._sumsq_of(n))
        return calls

    def _sumsq_of(self, n: int) -> BoundCall:
        elements = self.mem.kept(n)
        return self._call("sumsq", (self._norm(n), self.mem.gradients[n], self.mem.blocks[n]), (elements,))

    def _with_norms(self, calls: Sequence[BoundCall]) -> list[BoundCall]:
        """The last backward of a step's only microbatch: a gradient's squared norm is taken right behind the call that
        completes it, while caches hold it. Where a tied tensor's other share comes later, its norm does too."""
        places = {self.mem.gradients[n].offset: n for n in self.owned if n != self.tied or self.job.joined}
        completes = {
            places[ref.offset]: at
            for at, call in enumerate(calls)
            for ref in call.ptr
            if ref is not None and ref.space == wire.SPACE_STATIC and ref.offset in places
        }
        self.summed |= completes.keys()
        behind: dict[int, list[BoundCall]] = {}
        for n, at in completes.items():
            behind.setdefault(at, []).append(self._sumsq_of(n))
        return [one for at, call in enumerate(calls) for one in (call, *behind.get(at, ()))]

    def _norm(self, n: int) -> Ref:
        return Ref(wire.SPACE_STATIC, self.mem.sumsq.offset + 8 * n, 8)

    def _norms(self) -> list[BoundCall]:
        """The squared norms of tensors in pieces, when every replica has all parts."""
        calls = []
        for n, parts in self.mem.norm_parts.items():
            blocks = -(-self.job.tensors[n].elements // wire.SUMSQ_BLOCK)
            ptr = (self._norm(n), replace(parts, bytes=8 * blocks), self.mem.blocks[n])
            calls.append(self._call("sum", ptr, (blocks,)))
        return calls

    def _reals(self, n: int) -> tuple[float, ...]:
        o = self.train.optimizer
        return o.beta1, o.beta2, o.eps, o.weight_decay if self.job.tensors[n].decay else 0.0

    def _muon(self, n: int, control: Ref, copy: Ref | None, dtype: int, *, ahead: bool) -> list[BoundCall]:
        """A step of a tensor that Muon takes, matrix by matrix; ``ahead``: only the copy that it will leave."""
        o, decay = self.train.optimizer, self.train.optimizer.weight_decay
        whole, calls = (self.mem.masters[n], self.mem.moments[n][0], self.mem.gradients[n]), list[BoundCall]()
        for first, place in self.mem.matrices(n, self.mem.orthogonal):
            share = partial(_elements, of=self.job.tensors[n].elements, first=first, count=place.elements)
            w, m, g = map(share, whole)
            wc, dim = None if copy is None else share(copy), (place.elements,)
            made, step = place.orthogonal(m, g, control, o.momentum)
            calls += made
            if ahead:
                calls.append(self._call("muon_copy", (wc, w, step, control), dim, place.scale, decay, dtype=dtype))
            else:
                real = (o.momentum, place.scale, decay)
                calls.append(self._call("muon", (w, m, g, step, wc, control), dim, *real, dtype=dtype))
        return calls

    def _adamw(self) -> list[BoundCall]:
        calls = []
        for n in self.owned:
            if n in self.job.muon:
                whole = self.mem.copies.get(n)
                dtype = wire.F32 if whole is None else self.mem.copy_dtype(n)
                calls += self._muon(n, self.mem.control, whole, dtype, ahead=False)
                continue
            m, v = self.mem.moments[n]
            copy, gradient = self.mem.copies.get(n), self.mem.own(self.mem.gradients[n], n)
            own = None if copy is None else self.mem.own(copy, n)
            ptr = (self.mem.masters[n], m, v, gradient, own, self.mem.control)
            dtype = wire.F32 if copy is None else self.mem.copy_dtype(n)
            written = self.mem.gradients[n] in self.reduction.written
            dim = (self.mem.kept(n), 0 if n in self.mem.pieces or written else 1)
            calls.append(self._call("adamw", ptr, dim, *self._reals(n), dtype=dtype))
        spent = [self.mem.gradients[n] for n in self.owned if n in self.mem.pieces]
        if self.mem.head_gradient is not None and not self.job.joined:
            spent.append(self.mem.head_gradient)
        added = joined(ref for ref in spent if ref not in self.reduction.written)
        calls += [self._call("zero", (ref,), (ref.bytes,)) for ref in added]
        return calls if self.job.optimistic else calls + self._quantised()

    def _foresee(self) -> list[BoundCall]:
        """What kernels read of the weights, as AdamW will leave it where nothing is clipped."""
        calls = []
        for n in self.owned:
            m, v = self.mem.moments[n]
            whole = Ref(wire.SPACE_STATIC, self.mem.whole, 4 * self.job.tensors[n].elements)
            copy = whole if n in self.mem.codes else self.mem.own(self.mem.copies[n], n)
            dtype = wire.F32 if n in self.mem.codes else self.mem.copy_dtype(n)
            if n in self.job.muon:
                calls += self._muon(n, self.mem.foreseen, copy, dtype, ahead=True)
            else:
                ptr = (copy, self.mem.masters[n], m, v, self.mem.own(self.mem.gradients[n], n), self.mem.foreseen)
                calls.append(self._call("adamw_copy", ptr, (self.mem.kept(n),), *self._reals(n), dtype=dtype))
            if n in self.mem.codes:
                calls.append(self._quantise(n, whole))
        return calls

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


def _elements(whole: Ref, *, of: int, first: int, count: int) -> Ref:
    """Some of a buffer that has ``of`` elements."""
    item = whole.bytes // of
    return replace(whole, offset=whole.offset + item * first, bytes=item * count)
