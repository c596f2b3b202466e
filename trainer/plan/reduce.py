"""How a step's gradients are added up: over the groups of microbatches of one replica, then over the replicas.

A step has G groups of consecutive microbatches (``train.reduction_groups``). A group's gradients are added microbatch
by microbatch, the groups in a balanced tree of neighbours: ((0 + 1) + (2 + 3)) + ... With D replicas, each has G / D
whole neighbours, so what a replica adds up by itself and what the replicas then exchange are the lower and the upper
levels of one tree, and the sum has the same bits for every D (docs/numerics.md, docs/adr/0012).

In one replica group j is added up in buffer ``popcount(j)``. After its last microbatch buffer i is added to buffer
i - 1 and made zero, as often as j ends on ones in binary (the carry of a counter); after the last group all is in
buffer 0.

Over replicas, after a stage's last backward of a step:

    sharded tensors  replica r gets its piece of every other replica's gradient, and adds them up in the order of r ^ k,
                     which is the tree's, since the two operands of an addition may change places
    whole tensors    log2 D rounds: what is there goes to replica r ^ 2^i and is added to what comes from it

The last backward is cut by layer, so that a layer's messages are under way while the next layer's backward runs:
messages of layers are listed at once, their additions a layer later.

The first call of a step that a gradient matrix is the whole result of writes it (ACCUM 0): the programs of a stage's
first microbatch are a variant of their own. Such a gradient is never made zero, and what is left in it from the step
before is not read. The other buffers of groups are zero again after each addition. What no such call begins (vectors,
embeddings, FP8's gradients, which are scaled before they are added) is added to from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.plan.edges import Channels
from trainer.plan.places import Position, Stage
from trainer.plan.records import BoundAction, BoundCall, Program, Ref
from trainer.wire.kernels import KERNELS


def in_pieces(elements: int, replicas: int) -> bool:
    """Whether replicas share a tensor in pieces: it has blocks for more than half of them.

    >>> [in_pieces(3 * 262144, replicas) for replicas in (1, 2, 4, 8)]
    [False, True, True, False]
    """
    blocks = -(-elements // wire.PIECE_BLOCK)
    return replicas > 1 and blocks > 1 and 2 * blocks > replicas


def own_piece(base: Ref, size: int, across: int = 0) -> Ref:
    """This replica's piece of a buffer of pieces of ``size`` bytes; with ``across`` that of another."""
    return Ref(wire.SPACE_PIECE, base.offset, size, across)


def call(kernel: str, ptr: tuple[Ref | None, ...], *dim: int) -> BoundCall:
    """A call in f32 that is the optimizer's part of a step."""
    return BoundCall(kernel, wire.F32, ptr, dim, (), None, "O")


@dataclass(frozen=True)
class Variant:
    """What is special about the backward of some microbatches: the buffer, buffers folded after, last and first of the
    step."""

    buffer: int = 0
    folds: int = 0
    last: bool = False
    first: bool = False


@dataclass(frozen=True)
class Groups:
    """The groups of one replica: ``count`` of them share its ``microbatches`` evenly.

    >>> Groups(4, 4).variants
    (Variant(buffer=0, folds=0, last=False, first=True), Variant(buffer=1, folds=1, last=False, first=False), \
Variant(buffer=1, folds=0, last=False, first=False), Variant(buffer=2, folds=2, last=True, first=False))
    """

    microbatches: int
    count: int

    @property
    def buffers(self) -> int:
        """How many gradients of one tensor there are at once."""
        return self.count.bit_length()

    @cached_property
    def _variants(self) -> tuple[tuple[Variant, ...], NDArray[np.int32]]:
        each, found = self.microbatches // self.count, dict[Variant, int]()
        numbers = np.zeros(self.microbatches, np.int32)
        for group in range(self.count):
            buffer = group.bit_count()
            inside, ends = Variant(buffer), (group ^ (group + 1)).bit_length() - 1
            end = Variant(buffer, ends, group == self.count - 1)
            start, last = group * each, (group + 1) * each - 1
            if group == 0:
                first = replace(inside if each > 1 else end, first=True)
                numbers[0], start = found.setdefault(first, len(found)), 1
            if start < last:
                numbers[start:last] = found.setdefault(inside, len(found))
            if start <= last:
                numbers[last] = found.setdefault(end, len(found))
        return tuple(found), numbers

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The different ones."""
        return self._variants[0]

    @property
    def variant_of(self) -> NDArray[np.int32]:
        """By microbatch, the number of its variant."""
        return self._variants[1]


@dataclass(frozen=True)
class Gradient:
    """A gradient that programs of a stage add to. ``piece``: elements of one, 0 where the tensor is whole."""

    stage: Stage
    ref: Ref
    piece: int = 0


@dataclass(frozen=True)
class GradientMemory:
    """Where the gradients of a position lie: ``buffers`` areas alike, ``stride`` bytes apart from ``start``."""

    targets: tuple[Gradient, ...]
    start: int
    stride: int
    buffers: int

    def made_by(self, calls: Iterable[BoundCall]) -> tuple[Gradient, ...]:
        """The gradients that calls add to."""
        touched = {ref.offset for one in calls for ref in one.ptr if ref is not None and ref.space == wire.SPACE_STATIC}
        found = sorted(number for offset in touched for number in self._at.get(offset, ()))
        return tuple(self.targets[number] for number in found)

    @cached_property
    def _at(self) -> dict[int, list[int]]:
        """By offset, the numbers of the targets there: a position of many layers asks once a call."""
        at: dict[int, list[int]] = {}
        for number, target in enumerate(self.targets):
            at.setdefault(target.ref.offset, []).append(number)
        return at

    def into(self, calls: Sequence[BoundCall], buffer: int) -> tuple[BoundCall, ...]:
        """The calls with their gradients in another buffer."""
        if not buffer:
            return tuple(calls)

        def moved(ref: Ref | None) -> Ref | None:
            inside = (
                ref is not None
                and ref.space == wire.SPACE_STATIC
                and self.start <= ref.offset < self.start + self.stride
            )
            return replace(ref, offset=ref.offset + buffer * self.stride) if ref is not None and inside else ref

        return tuple(replace(one, ptr=tuple(map(moved, one.ptr))) for one in calls)


def joined(refs: Iterable[Ref]) -> list[Ref]:
    """Refs to the same space in order, neighbours as one: what lies between the 64 bytes' grid is zero."""
    out: list[Ref] = []
    for ref in sorted(refs, key=lambda r: r.offset):
        if out and -(-(out[-1].offset + out[-1].bytes) // 64) * 64 == ref.offset:
            out[-1] = replace(out[-1], bytes=ref.offset + ref.bytes - out[-1].offset)
        else:
            out.append(ref)
    return out


@dataclass(frozen=True)
class Last:
    """The last backward of a stage: its calls in parts, each with the gradients that are complete then."""

    stage: Stage
    op: str
    name: str
    variant: Variant
    number: int
    parts: tuple[tuple[BoundCall, ...], ...]
    early: tuple[Gradient, ...]
    """Complete before."""
    complete: tuple[tuple[Gradient, ...], ...]
    whole: tuple[Gradient, ...]

    @property
    def units(self) -> tuple[tuple[Gradient, ...], ...]:
        """What is exchanged together, in order."""
        return tuple(tuple(t for t in some if t.piece) for some in (self.early, *self.complete))


@dataclass
class Reduction:
    """Makes the programs and action sequences of a position's backward operations: ``add`` each, then ``finish``."""

    position: Position
    replicas: int
    groups: Groups
    memory: GradientMemory
    channels: Channels
    programs: dict[str, Program] = field(default_factory=dict)
    sequences: dict[tuple[Stage, str, int], tuple[BoundAction, ...]] = field(default_factory=dict)
    """By stage, operation and number of the variant, what is run; not there: the operation's program alone."""
    tails: dict[Stage, tuple[BoundAction, ...]] = field(default_factory=dict)
    """By stage, what follows its last backward of a step, or the message that this makes."""
    lasts: list[Last] = field(default_factory=list)
    base: int = 0
    """Where what others send is received, if there is no second buffer of gradients."""
    second: int = 0
    """And every other time."""
    begun: set[Gradient] = field(default_factory=set)
    """What the first microbatch has added to so far, and"""
    written: set[Ref] = field(default_factory=set)
    """what it has written instead."""

    def add(self, stage: Stage, op: str, name: str, calls: Sequence[BoundCall], begins: bool, ends: bool) -> None:
        """The programs of an operation, a variant each; I before W. ``begins``: the first microbatch has it; ``ends``:
        with its last microbatch the stage's gradients are complete."""
        made = self.memory.made_by(calls)
        writing = self._writing(calls) if begins else calls
        for number, variant in enumerate(self.groups.variants):
            mine = writing if variant.first else calls
            bound = self.memory.into(mine, variant.buffer)
            if variant.last and ends and self.replicas > 1:
                self.lasts.append(self._cut(stage, op, name, variant, number, mine))
                continue
            key = f"{name}.{variant.buffer}" if variant.buffer else name
            if mine != calls and len(self.groups.variants) > 1:
                key += " first"
            self.programs.setdefault(key, Program(name, bound))
            run = BoundAction(wire.A_RUN, op, key, stage=stage)
            self.sequences[stage, op, number] = (run, *self._folds(made, f"{name} fold", variant))

    def _writing(self, calls: Sequence[BoundCall]) -> Sequence[BoundCall]:
        """Calls of the first microbatch: those that are the first to make a gradient matrix write it."""
        out = []
        for one in calls:
            kernel, made = KERNELS[one.kernel], self.memory.made_by([one])
            dims, names = kernel.dim_names.split(), [operand.name for operand in kernel.operands]
            dw = one.ptr[names.index("dw")] if "dw" in names and "ACCUM" in dims else None
            if dw is not None and any(target.ref == dw and target not in self.begun for target in made):
                self.written.add(dw)
                one = replace(one, dim=tuple(0 if d == "ACCUM" else n for d, n in zip(dims, one.dim, strict=True)))
            self.begun |= set(made)
            out.append(one)
        return out

    def finish(self, take: Callable[[int], int]) -> None:
        """The last backwards, when all are known; ``take`` gives memory for what other replicas send."""
        if self.lasts and self.memory.buffers == 1:
            sizes = [[self._bytes(unit) for unit in last.units] for last in self.lasts]
            first, second = (max((max(s[n::2], default=0) for s in sizes), default=0) for n in (0, 1))
            whole = max(_span(last.whole) for last in self.lasts)
            self.base = take(max(first + second, whole))
            self.second = self.base + first
        for last in self.lasts:
            parts, self.tails[last.stage] = self._last(last)
            self.sequences[last.stage, last.op, last.number] = parts

    @property
    def waits(self) -> bool:
        """Whether a tail may wait while another stage's last backward runs."""
        return self.memory.buffers > 1 or len(self.lasts) == 1

    def _run(self, name: str, calls: Sequence[BoundCall], text: str = "fold") -> list[BoundAction]:
        """A program of calls at the end of a step's backward, and its action; nothing where there are none."""
        if not calls:
            return []
        self.programs.setdefault(name, Program(text, tuple(calls)))
        return [BoundAction(wire.A_RUN, "O", name)]

    def _folds(self, targets: Sequence[Gradient], name: str, variant: Variant) -> list[BoundAction]:
        calls = []
        for buffer in range(variant.buffer, variant.buffer - variant.folds, -1):
            for ref in joined(target.ref for target in targets):
                above = replace(ref, offset=ref.offset + buffer * self.memory.stride)
                below = replace(above, offset=above.offset - self.memory.stride)
                calls.append(call("fold", (below, above), ref.bytes // 4))
        return self._run(f"{name} {variant.buffer}.{variant.folds}", calls)

    # over replicas

    def _cut(self, stage: Stage, op: str, name: str, variant: Variant, number: int, calls: Sequence[BoundCall]) -> Last:
        parts = self._parts(calls)
        made = [self.memory.made_by(part) for part in parts]
        mine = [target for target in self.memory.targets if target.stage == stage]
        return Last(
            stage,
            op,
            name,
            variant,
            number,
            tuple(self.memory.into(part, variant.buffer) for part in parts),
            tuple(t for t in mine if not any(t in some for some in made)),
            tuple(
                tuple(t for t in some if not any(t in later for later in made[place + 1 :]))
                for place, some in enumerate(made)
            ),
            tuple(t for t in mine if not t.piece),
        )

    def _parts(self, calls: Sequence[BoundCall]) -> list[list[BoundCall]]:
        """Calls cut between layers, wherever a gradient that is in pieces is complete."""
        layers = [list(part) for _, part in groupby(calls, key=lambda one: one.layer)]
        parts: list[list[BoundCall]] = [[]]
        later = {t for t in self.memory.made_by(calls) if t.piece}
        for number, layer in enumerate(layers):
            parts[-1] += layer
            still = {t for t in self.memory.made_by(one for rest in layers[number + 1 :] for one in rest) if t.piece}
            if still != later and number + 1 < len(layers):
                parts.append([])
            later = still
        return parts

    def _last(self, last: Last) -> tuple[tuple[BoundAction, ...], tuple[BoundAction, ...]]:
        """The parts, with the messages and additions of their gradients; what then is left."""
        name, units = last.name, last.units
        out, waits = self._exchange(units[0], self.base)
        for number, part in enumerate(last.parts):
            key = f"{name} part {number}"
            self.programs[key] = Program(name, part)
            out.append(BoundAction(wire.A_RUN, last.op, key, stage=last.stage))
            out += self._folds(last.complete[number], f"{name} fold {number}", last.variant)
            messages, additions = self._exchange(units[number + 1], self.base if number % 2 else self.second)
            out += [*messages, *self._run(f"{name} sum {number}", waits, "sum")]
            waits = additions
        return tuple(out), (*self._run(f"{name} sum", waits, "sum"), *self._whole(last.whole, name))

    def _bytes(self, unit: Sequence[Gradient]) -> int:
        """What others send of a unit's gradients."""
        return sum(4 * target.piece * (self.replicas - 1) for target in unit)

    def _exchange(self, targets: Sequence[Gradient], base: int) -> tuple[list[BoundAction], list[BoundCall]]:
        """The messages of gradients in pieces, and the calls that add up what comes."""
        actions: list[BoundAction] = []
        calls: list[BoundCall] = []
        for target in targets:
            size = 4 * target.piece
            first = base if self.memory.buffers == 1 else target.ref.offset + self.memory.stride
            base += self._bytes([target])
            places = [own_piece(target.ref, size)]
            for across in range(1, self.replicas):
                place = Ref(wire.SPACE_STATIC, first + (across - 1) * size, size)
                places.append(place)
                actions += self.swap(wire.CH_REDUCE, across, own_piece(target.ref, size, across), place)
            step = 1
            while step < self.replicas:
                for at in range(0, self.replicas, 2 * step):
                    calls.append(call("fold", (places[at], places[at + step]), target.piece))
                step *= 2
        return actions, calls

    def _whole(self, targets: Sequence[Gradient], name: str) -> list[BoundAction]:
        """The exchanges of a stage's whole gradients, which lie together."""
        if not targets:
            return []
        first = min(target.ref.offset for target in targets)
        mine = Ref(wire.SPACE_STATIC, first, _span(targets))
        theirs = replace(mine, offset=self.base if self.memory.buffers == 1 else first + self.memory.stride)
        out: list[BoundAction] = []
        step = 1
        while step < self.replicas:
            out += self.swap(wire.CH_REDUCE, step, mine, theirs)
            out += self._run(f"{name} add", [call("fold", (mine, theirs), mine.bytes // 4)], "sum")
            step *= 2
        return out

    def swap(self, kind: int, across: int, mine: Ref, theirs: Ref) -> tuple[BoundAction, BoundAction]:
        """An exchange with the same position of another replica."""
        channel = self.channels.across(self.position, kind, across, mine.bytes)
        send = BoundAction(wire.A_SEND, "O", None, channel, ref=mine)
        return send, BoundAction(wire.A_RECV, "O", None, channel, ref=theirs)

    def gather(self, kind: int, base: Ref, size: int) -> list[BoundAction]:
        """Every replica's piece of a buffer to every other."""
        pairs = (
            self.swap(kind, across, own_piece(base, size), own_piece(base, size, across))
            for across in range(1, self.replicas)
        )
        return [action for pair in pairs for action in pair]


def _span(targets: Sequence[Gradient]) -> int:
    """Bytes from the first of some gradients to the end of the last."""
    if not targets:
        return 0
    return max(t.ref.offset + t.ref.bytes for t in targets) - min(t.ref.offset for t in targets)


def expanded(
    kinds: NDArray[np.unsignedinteger[Any]],
    sequences: Mapping[int, Sequence[tuple[int, bool]]],
    microbatch: NDArray[np.int32],
    slot: NDArray[np.int32],
) -> tuple[NDArray[np.uint16], NDArray[np.int32], NDArray[np.int32]]:
    """Columns of a list (pattern, microbatch, slot) in which an action of a kind stands for a sequence of patterns,
    each with the action's microbatch and slot, or without."""
    size = 1 + max(sequences)
    lengths, firsts = np.zeros(size, np.int64), np.zeros(size, np.int64)
    patterns: list[int] = []
    carries: list[bool] = []
    for kind, sequence in sequences.items():
        lengths[kind], firsts[kind] = len(sequence), len(patterns)
        patterns += [pattern for pattern, _ in sequence]
        carries += [carry for _, carry in sequence]
    which, keeps = np.array(patterns, np.uint16), np.array(carries, np.bool_)
    if lengths[kinds].max(initial=0) <= 1 and keeps.all():
        return which[firsts[kinds]], microbatch, slot
    counts = lengths[kinds]
    source = np.repeat(np.arange(len(kinds)), counts)
    inside = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = firsts[kinds][source] + inside
    none = np.int32(-1)
    return (
        which[at],
        np.where(keeps[at], microbatch[source], none).astype(np.int32),
        np.where(keeps[at], slot[source], none).astype(np.int32),
    )
