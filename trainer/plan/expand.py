"""Pass 0: a family's calls into the forward and backward programs of a stage.

Every kernel declares its own gradients in its row of the table (``wire/kernels.h``): which kernel gives the gradient of
its inputs (part ``I``), which the gradient of its weights (part ``W``), and, by the names of their operands and dims,
what they are given. Backward is that in reverse order, each W right after the I of the same op, because residual
gradients are updated in place. Knows nothing of precision, addresses, slots or messages.

The gradient of the residual stream is one buffer: ``linear``'s residual operand passes it on unchanged, and the norms
add to it in place. On a stage that sends its output on, that buffer is the output itself: the output is not needed once
sent, and the gradient that comes back has its shape.

A stage that is ``split`` has two programs in place of one backward: the weight gradients that are matrix products are
put off into ``weights`` (W), everything else stays in ``backward`` (I), as do those of a layer that is computed again
(``recompute.py``). What a call that is put off reads keeps its bytes: a norm that would add to it in place writes the
sum elsewhere (operand ``old``), and the gradient lies there from then on. Where no kernel can, the call is not put off
after all. The calls of both programs are those of the whole backward, a weight's in the same order, so that its bits
are equal.

Invariants, asserted while expanding:

I1  a forward value that backward reads is never overwritten before that read
I2  a gradient is read only when all of its columns are written, and written again only by adding
I3  a value has one gradient buffer at a time
I4  what a call that is put off reads is not written after its place in the whole backward
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from trainer.errors import PlanError
from trainer.models.base import (
    Buffer,
    BufferKind,
    Builder,
    Call,
    Family,
    Given,
    Operand,
    Tensors,
    View,
    Weight,
    quantise,
)
from trainer.plan.places import Stage
from trainer.plan.recompute import run_again, without_idle
from trainer.spec import ModelSpec
from trainer.spec_how import RecomputeKind
from trainer.spec_sections import vocab_block
from trainer.wire.kernels import KERNELS, Kernel, product
from trainer.wire.kernels import Operand as KernelOperand

JOINS = {"embed_wgrad": "embed_wgrad_tied"}
"""By the kernel of a weight's gradient, the one that adds it to a gradient of the same weight that is complete."""
OWN_SHARE, OTHER_SHARES = "head share", "head shares"
"""Buffers of a last stage whose head is in parts begin so: shares of the gradient of the head's input."""


@dataclass(frozen=True)
class StagePrograms:
    """The programs of one stage for one microbatch, with symbolic operands.

    ``received`` and ``sent`` are the activation that comes from and goes to the neighbours, ``gradient_received`` and
    ``gradient_sent`` likewise on the way back; None where there is no neighbour (or nothing goes back: inference).
    ``weights``: what is put off of a stage that is split; else none, and ``backward`` is whole.
    """

    index: Stage
    layers: range
    first: bool
    last: bool
    buffers: dict[str, Buffer]
    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    received: View | None
    sent: View | None
    gradient_received: View | None
    gradient_sent: View | None
    weights: tuple[Call, ...] = ()

    def programs(self, ops: Collection[str]) -> dict[str, tuple[Call, ...]]:
        """What runs for each of these operations of a schedule."""
        of = {"F": self.forward, "I": self.backward, "W": self.weights, "B": self.backward + self.weights}
        return {op: calls for op, calls in of.items() if op in ops}

    @cached_property
    def kept(self) -> frozenset[str]:
        """Buffers that live from one program to another, or meet a message: those of a slot."""
        programs = (self.forward, self.backward, self.weights)
        users = Counter(name for calls in programs for name in {view.buffer for c in calls for view in c.views()})
        messages = {view.buffer for view in (self.received, self.sent, self.gradient_received) if view is not None}
        return frozenset({name for name, count in users.items() if count > 1} | messages)


def expand_stage(
    family: Family,
    model: ModelSpec,
    tensors: Tensors,
    layers: range,
    microbatch: int,
    sequence: int,
    classifier_chunk: int,
    scale: float,
    infer: bool = False,
    fp8: bool = False,
    split: bool = False,
    recompute: RecomputeKind = "none",
    again: int = 0,
    blocks: int = 1,
    losses: bool = False,
    parts: int = 1,
    end: int | None = None,
    once: bool = False,
) -> StagePrograms:
    """The stage that holds ``layers``, with the embedding if it holds the first and the head if it holds the last.

    ``scale`` multiplies every loss before its gradient is taken: 1 / tokens of the global batch. With ``infer`` there
    is no backward and the head gives logits, or ``losses``. With ``fp8`` the layers' linear layers take FP8. With
    ``split`` matrices' gradients are a program of their own. The first ``again`` of the layers ``recompute``
    (``recompute.py``).
    ``blocks``: of the vocabulary, whose sums join in a tree. ``parts``: stages that share the head (``head.py``); with
    several the last stage ends with the head's input, and its backward begins with adding up their shares. ``end``: the
    token that ends a document, where documents are apart: each stage finds their borders itself, from the tokens.
    ``once``: this is a step's only microbatch; where the stage has both uses of a tied embedding, their gradients then
    need no memory of two.
    """
    first, last = layers.start == 0, layers.stop == model.layers
    apart = last and parts > 1 and not infer
    b = Builder(model, tensors, microbatch, sequence, ("forward" if infer else "train") if fp8 else "")
    received = None if first else b.value("input", model.width)
    if end is not None:
        b.borders(end)
    x = family.embed(b) if received is None else received
    for number in layers:
        b.layer = number
        x = family.layer(b, x)
    b.layer = None
    head: Call | None = None
    if last:
        family.head(b, x)
        head = b.calls.pop()
        taken = _view(head.ptr[1])
        if head.kernel != "classifier_fwd":
            raise PlanError(f"family {family.name}: head() ends with {head.kernel}; it must end with classify()")
    forward = list(b.calls)
    if infer:
        assert head is not None
        forward.append(_with_losses(b, head, classifier_chunk) if losses else _with_logits(head))
        return StagePrograms(Stage(0), layers, first, last, b.buffers, tuple(forward), (), None, None, None, None)
    chosen = layers[:again] if recompute != "none" else range(0)
    sent = taken if apart else None if last else x
    twice = run_again(b, forward, recompute, chosen, (received, sent))
    put_off = PutOff(split, chosen)
    chunk = min(classifier_chunk, b.rows)
    tied = _head_of(head) if once and not apart else None
    tape = Tape(b, twice.seen, received, sent, chunk, scale, put_off, blocks, tied)
    joined = tape.join(taken, parts) if apart else None
    backward = without_idle(tape.run(None if apart else head, twice.calls), put_off.calls)
    return StagePrograms(
        index=Stage(0),
        layers=layers,
        first=first,
        last=last,
        buffers=b.buffers,
        forward=tuple(twice.forward),
        backward=tuple(backward),
        received=received,
        sent=sent,
        gradient_received=joined if joined is not None else None if sent is None else tape.gradient(sent),
        gradient_sent=None if received is None else tape.gradient(received),
        weights=tuple(put_off.calls),
    )


def _head_of(head: Call | None) -> str | None:
    """The tied tensor that a stage's head multiplies with; None: there is no such."""
    operands = () if head is None else head.ptr
    return next((p.tensor for p in operands if isinstance(p, Weight) and p.use == "head"), None)


def _with_logits(head: Call) -> Call:
    return replace(head, kernel="logits", ptr=(Given("logits"), *head.ptr[1:3]))


def _with_losses(b: Builder, head: Call, classifier_chunk: int) -> Call:
    """The head as it is, its logits in chunks of rows that are scratch."""
    rows = min(classifier_chunk, b.rows)
    vocab = head.dim[2]
    b.buffers["logits"] = Buffer("logits", rows * vocab, "acc")
    logits = View("logits", 0, 1, rows * vocab, rows * vocab)
    return replace(head, ptr=(*head.ptr[:4], logits), dim=(*head.dim, rows))


class PutOff:
    """The weight gradients of a stage that is split, and which bytes they still need (I4). ``at_once``: layers that do
    theirs in I."""

    def __init__(self, split: bool, at_once: Collection[int]) -> None:
        self.split, self.at_once = split, at_once
        self.calls: list[Call] = []
        self.reads: dict[str, list[tuple[View, Call]]] = {}

    def takes(self, kernel: str, forward: Call) -> bool:
        """Whether a gradient of this forward call is put off: a matrix product that gives no other gradient."""
        if not self.split or forward.layer in self.at_once:
            return False
        return kernel not in ("", KERNELS[forward.kernel].input_gradient) and KERNELS[kernel].products != "0"

    def add(self, call: Call) -> None:
        """Puts a call off."""
        self.calls.append(call)
        for view, operand in zip(call.ptr, KERNELS[call.kernel].operands, strict=True):
            if isinstance(view, View) and operand.role == "read":
                self.reads.setdefault(view.buffer, []).append((view, call))

    def readers(self, view: View) -> list[Call]:
        """Those that need bytes of a view."""
        return [call for other, call in self.reads.get(view.buffer, ()) if _overlap(view, other)]

    def no_more(self, calls: Collection[Call]) -> None:
        """These are not put off after all."""
        gone = set(map(id, calls))
        self.calls = [call for call in self.calls if id(call) not in gone]
        self.reads = {
            name: [(view, call) for view, call in readers if id(call) not in gone]
            for name, readers in self.reads.items()
        }

    def check(self, call: Call) -> None:
        """I4, of a call that is not put off."""
        for view, operand in zip(call.ptr, KERNELS[call.kernel].operands, strict=True):
            if isinstance(view, View) and operand.role != "read" and (readers := self.readers(view)):
                raise PlanError(f"{call.kernel} writes {view.buffer}, which {readers[0].kernel} is still to read")


class Tape:
    """Derives backward calls from the table of kernels. ``tied``: the tensor that has the head's gradient, complete,
    when the embedding's comes to it."""

    def __init__(
        self,
        b: Builder,
        forward: list[Call],
        received: View | None,
        sent: View | None,
        chunk: int,
        scale: float,
        put_off: PutOff,
        blocks: int = 1,
        tied: str | None = None,
    ) -> None:
        self.b, self.forward, self.received, self.chunk, self.scale = b, forward, received, chunk, scale
        self.put_off, self.blocks, self.tied = put_off, blocks, tied
        self.calls: list[Call] = []
        self.layer: int | None = None
        self.gradient_codes: dict[str, Operand] = {}  # of the call that is derived
        self.readers = Counter(view for call in forward for view in {p for p in call.ptr[1:] if isinstance(p, View)})
        self.home: dict[str, str] = {}  # value's buffer -> its gradient's buffer
        self.written: dict[str, set[tuple[int, int]]] = {}  # value's buffer -> columns of its gradient that are set
        self.lost: set[str] = set()  # forward values that a gradient has replaced
        if sent is not None:
            self.home[sent.buffer] = sent.buffer
            self.written[sent.buffer] = {(sent.first, sent.cols)}
            self.lost.add(sent.buffer)

    def run(self, head: Call | None, again: Mapping[int, Sequence[Call]]) -> list[Call]:
        """All backward calls, in order; ``again``: by layer, the forward calls that come first."""
        for call in ([] if head is None else [head]) + self.forward[::-1]:
            if call.layer is not None and call.layer != self.layer:
                for once_more in again.get(call.layer, ()):
                    self._do(once_more)
            self.layer = call.layer
            if call is head and self.blocks > 1:
                self.head_in_blocks(call)
            elif call.kernel not in ("quantise", "borders"):  # who reads codes gives the gradient of the value itself
                self.derive(call)
        if self.received is not None:  # the stage below may change it in place
            self._hurry(self.gradient(self.received))
        return self.calls

    def derive(self, call: Call) -> None:
        """The calls that give the gradients of one forward call's operands, as its row says."""
        row = KERNELS.get(call.kernel)
        if row is None or not row.derived:
            raise PlanError(f"kernel {call.kernel} declares no gradient; its row of trainer/engine/wire/kernels.h must")
        self.gradient_codes = {}
        self._emit("I", row.input_gradient, call)
        if row.weight_gradient != row.input_gradient:
            joins = any(isinstance(p, Weight) and p.tensor == self.tied for p in call.ptr)
            kernel = row.weight_gradient
            self._emit("W", JOINS.get(kernel, kernel) if joins else kernel, call)
        passed = self._named(row, call).get(row.passes)
        if passed is not None:
            self.share(_view(passed), self.gradient(_view(call.ptr[0])))

    def join(self, x: View, parts: int) -> View:
        """Adds up the parts' shares of the gradient of the head's input, in a balanced tree; where part 0's lies."""
        size = x.rows * x.cols
        own, others = self._new(OWN_SHARE, size, "acc"), self._new(OTHER_SHARES, (parts - 1) * size, "acc")
        shares = [own, *(View(others.buffer, n * size, 1, size, size) for n in range(parts - 1))]
        step = 1
        while step < parts:
            for n in range(0, parts - step, 2 * step):
                self._do(Call("add_acc", (shares[n], shares[n + step]), (size,), (), None, "I"))
            step *= 2
        whole = replace(self.gradient(x), rows=1, cols=size, ld=size)
        self._do(Call("cast", (whole, own), (size,), (), None, "I"))
        return own

    def head_in_blocks(self, head: Call) -> None:
        """The head's loss and gradients, its vocabulary in blocks (``kernels/vocabulary.h``)."""
        loss, x, weight, targets, _ = head.ptr
        rows, width, vocab = head.dim
        value, chunk, blocks = _view(x), self.chunk, self.blocks
        scratch = (
            self._new("logits", chunk * vocab, "acc"),
            self._new("dlogits", chunk * vocab, "dt"),
            self._new("parts", blocks * chunk * width, "acc"),
        )
        ptr = (loss, self.only(value), self.weight_gradient(weight), self.keep(value), weight, targets, *scratch)
        dim = (rows, width, vocab, chunk, blocks, vocab_block(vocab, blocks), 1)
        self._do(Call("vocab_head", ptr, dim, (self.scale,), None, "I"))

    def _emit(self, part: Literal["I", "W"], kernel: str, call: Call) -> None:
        if not kernel:
            return
        row, forward = KERNELS[kernel], self._named(KERNELS[call.kernel], call)
        dims = KERNELS[call.kernel].named(call.dim) | {"CHUNK": self.chunk, "ACCUM": 1}
        reals = {"scale": self.scale} | dict(zip(KERNELS[call.kernel].real_names.split(), call.real, strict=True))
        given: dict[str, Operand] = {}
        for operand in row.operands:  # what is read first: a gradient may take the place of a value
            if operand.role == "read":
                alone = operand.note.startswith("with d") and forward[operand.note.removeprefix("with d")] is None
                given[operand.name] = None if alone or operand.name == "old" else self._read(operand.name, forward)
        for operand in row.operands:
            if operand.role != "read":
                given[operand.name] = self._written(row, operand, forward, given, dims)
        for name, view in given.items():
            if isinstance(view, View):
                dims[f"ld{name}"] = view.ld
            elif view is None:
                dims[f"ld{name}"] = 0
        ptr = tuple(given[operand.name] for operand in row.operands)
        dim = tuple(dims[name] for name in row.dim_names.split())
        made = Call(kernel, ptr, dim, tuple(reals[name] for name in row.real_names.split()), self.layer, part)
        if part == "W" and self.put_off.takes(kernel, call):
            self.put_off.add(made)
        else:
            self._do(made)

    def _do(self, call: Call) -> None:
        self.put_off.check(call)
        self.calls.append(call)

    def _hurry(self, view: View) -> None:
        """What is put off and reads bytes that are about to change is done now."""
        readers = self.put_off.readers(view)
        if readers:
            self.put_off.no_more(readers)
            self.calls += readers

    def _read(self, name: str, forward: Mapping[str, Operand]) -> Operand:
        if name not in forward:
            own = name.removeprefix("d")
            return self.gradient(_view(forward[own])) if own in forward else self._codes(name, forward)
        value = forward[name]
        return self.keep(value) if isinstance(value, View) else value

    def _named(self, row: Kernel, call: Call) -> dict[str, Operand]:
        """A forward call's operands by name; beside codes ``<v>8`` the value ``<v>`` and their transpose ``<v>8t``."""
        named: dict[str, Operand] = dict(zip((operand.name for operand in row.operands), call.ptr, strict=True))
        for name, codes in list(named.items()):
            if name.endswith("8"):
                if isinstance(codes, Weight):
                    found: tuple[Operand, Operand] = (replace(codes, use="weight"), replace(codes, use="fp8_turned"))
                else:
                    found = self.b.sources[_view(codes)]
                named |= {name.removesuffix("8"): found[0], f"{name}t": found[1]}
        return named

    def _codes(self, name: str, forward: Mapping[str, Operand]) -> Operand:
        """``d<v>8``, ``d<v>8t`` or ``d<v>s``: the gradient of a value in E5M2, made once for both gradient kernels."""
        if name not in self.gradient_codes:
            value = next(v for v in forward if name in (f"d{v}8", f"d{v}8t", f"d{v}s"))
            view = self.gradient(_view(forward[value]))
            call, made = quantise(self._new, view, True, self.layer, e5m2=True, part="I")
            self._do(call)
            self.gradient_codes |= zip((f"d{value}8", f"d{value}8t", f"d{value}s"), made, strict=True)
        return self.gradient_codes[name]

    def _written(
        self,
        row: Kernel,
        operand: KernelOperand,
        forward: Mapping[str, Operand],
        given: dict[str, Operand],
        dims: dict[str, int],
    ) -> Operand:
        name = operand.name
        if operand.role == "scratch":
            elements = product(operand.rows, dims) * product(operand.columns, dims)
            kinds: dict[str, BufferKind] = {"dt": "dt", "places": "places"}
            return self._new(name, elements, kinds.get(operand.kind, "acc"))
        if name in forward:
            value = forward[name]
            if operand.role == "update":
                value = self.gradient(_view(value))
                self._hurry(value)
            return value
        value, other = forward[name[1:]], operand.note.removeprefix("may be ")
        if not isinstance(value, View):
            return self.weight_gradient(value)
        if other in forward:
            return self.overwrite(value) or self.only(value)
        if other in given and not self.put_off.readers(_view(given[other])):  # no other reader
            return self.share(value, _view(given[other]))
        if operand.role == "write" or "ACCUM" not in row.dim_names.split():
            return self.only(value)
        target, dims["ACCUM"] = self.into(value)
        if not dims["ACCUM"] or not self.put_off.readers(target):
            return target
        if "old" in given and self._whole(value):
            given["old"] = target
            return self.apart(value)
        self._hurry(target)
        return target

    # what a value's gradient may be

    def keep(self, view: View) -> View:
        """A forward value, read in backward (I1)."""
        if view.buffer in self.lost:
            raise PlanError(f"{view.buffer} is needed in backward, but a gradient has taken its place")
        return view

    def gradient(self, view: View) -> View:
        """The finished gradient of a value, to be read or to be changed in place (I2)."""
        end, at = view.first + view.cols, view.first
        for first, cols in sorted(self.written.get(view.buffer, ())):
            if first <= at < first + cols:
                at = first + cols
        if at < end:
            raise PlanError(f"columns {at}..{end} of {view.buffer} have no gradient; something computes them in vain")
        return replace(view, buffer=self.home[view.buffer])

    def into(self, view: View) -> tuple[View, int]:
        """Where the gradient of a value goes, and ACCUM: 1 if something is there already (I2)."""
        if view.buffer not in self.home:
            like = self.b.buffers[view.buffer]
            self._settle(view, self._new(f"d.{view.buffer}", like.elements, "dt").buffer)
        return replace(view, buffer=self.home[view.buffer]), self._mark(view)

    def only(self, view: View) -> View:
        """Like ``into``, for kernels that cannot add."""
        target, accum = self.into(view)
        if accum:
            raise PlanError(f"{view.buffer} has a gradient already, and the kernel that gives another cannot add")
        return target

    def apart(self, view: View) -> View:
        """Other memory for a gradient that is about to change: what it was so far is still to be read (I4)."""
        like = self.b.buffers[view.buffer]
        self.home[view.buffer] = self._new(f"d.{view.buffer}", like.elements, "dt").buffer
        return replace(view, buffer=self.home[view.buffer])

    def _whole(self, view: View) -> bool:
        return view.first == 0 and view.cols == view.ld and view.extent == self.b.buffers[view.buffer].elements

    def share(self, view: View, gradient: View) -> View:
        """The value's gradient starts out as (and in the buffer of) a gradient that is there already."""
        if view.buffer in self.home:
            raise PlanError(f"{view.buffer} has a gradient already; it can not take over that of another value too")
        self._settle(view, gradient.buffer)
        self._mark(view)
        return replace(view, buffer=gradient.buffer)

    def overwrite(self, view: View) -> View | None:
        """The value's own memory for its gradient, if no other op reads the value in backward; else None."""
        if self.readers[view] != 1 or view.buffer in self.home or self.put_off.readers(view):
            return None
        self._settle(view, view.buffer)
        self._mark(view)
        self.lost.add(view.buffer)
        return view

    def weight_gradient(self, weight: Operand) -> Weight | None:
        """The gradient of a weight; None for an operand that is absent."""
        if weight is None:
            return None
        assert isinstance(weight, Weight)
        return replace(weight, use="head_gradient" if weight.use == "head" else "gradient")

    # bookkeeping

    def _new(self, name: str, elements: int, kind: BufferKind) -> View:
        unique = f"{name}.{len(self.b.buffers)}"
        self.b.buffers[unique] = Buffer(unique, elements, kind)
        return View(unique, 0, 1, elements, elements)

    def _settle(self, view: View, home: str) -> None:
        self.home[view.buffer] = home
        self.written.setdefault(view.buffer, set())

    def _mark(self, view: View) -> int:
        done, mine = self.written[view.buffer], (view.first, view.cols)
        if mine in done:
            return 1
        if any(view.first < first + cols and first < view.first + view.cols for first, cols in done):
            raise PlanError(f"the gradients of overlapping columns of {view.buffer} cannot be joined")
        done.add(mine)
        return 0


def _overlap(a: View, b: View) -> bool:
    """Of views of one buffer."""
    if a.ld != b.ld or 1 in (a.rows, b.rows):
        return a.first < b.first + b.extent and b.first < a.first + a.extent
    first, other = a.first % a.ld, b.first % a.ld
    return first < other + b.cols and other < first + a.cols


def _view(operand: Operand) -> View:
    assert isinstance(operand, View)
    return operand
