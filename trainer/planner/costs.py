"""What a layer, the embedding and the head do and keep for one microbatch, from the family's own kernel calls.

The compiler's passes write down the calls of short stages (with the embedding, plain, with the head), also with what is
computed again, and lay their slots out; what the ends have more than plain layers is the embedding's and the head's.
Operations are counted by the table of kernels (``plan/flops.py``), bytes by what each operand covers. Knows nothing of
devices, layouts or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from trainer import models
from trainer.models.base import Call, Tensor, View, Weight, tensor_table
from trainer.plan.devices import head_again
from trainer.plan.expand import StagePrograms, expand_stage
from trainer.plan.flops import work
from trainer.plan.memory import place_scratch
from trainer.plan.muon import HiddenMatrix
from trainer.plan.places import Stage
from trainer.plan.slot_layout import lay_out
from trainer.planner.layouts import Recompute
from trainer.spec import ModelSpec, RunSpec
from trainer.wire.kernels import KERNELS

FEW = 3
"""Layers of the stages whose slots are laid out."""


@dataclass(frozen=True, slots=True)
class CallWork:
    """A kernel call, as far as time is concerned. ``kind``: linear (of the layers), head, attention or other."""

    kind: str
    part: str
    """F, I or W."""
    products: int
    """Multiply-adds of matrix products, as executed."""
    bytes: int
    """Read and written, of activations and all else that grows with the tokens."""
    weight_bytes: int
    """Read and written of weights and their gradients."""
    sequence: int = 0
    """Of attention: tokens that look at one another."""


@dataclass(frozen=True)
class ModelPiece:
    """A layer, the embedding or the head."""

    calls: tuple[CallWork, ...]
    parameters: int
    tensors: tuple[tuple[int, bool], ...]
    """Elements of each tensor, and whether it has a compute copy."""
    scratch_bytes: int
    """Of the running program."""
    model_flops: int
    """As MFU counts them, forward and backward."""
    cost: int
    """The layout's weight of it (``flops.call_cost``)."""
    orthogonal: tuple[HiddenMatrix, ...] = ()
    """The matrices that Muon takes; none: AdamW takes all."""


@dataclass(frozen=True)
class Sizes:
    """What decides a model's pieces."""

    model: ModelSpec
    microbatch: int
    sequence: int
    chunk: int
    precision: str
    apart: bool = False
    """Whether attention stays within documents."""
    muon: bool = False
    """Which optimizer takes the layers' matrices."""


@dataclass(frozen=True)
class ModelCosts:
    """A model's pieces for microbatches of one size."""

    sizes: Sizes
    embed: ModelPiece
    layer: ModelPiece
    head: ModelPiece
    largest: int
    """Elements of the largest tensor of a layer."""
    shared: ModelPiece
    """The embedding where it is the head too, as a tensor of its own; without tensors where it is not."""

    @cached_property
    def layers(self) -> int:
        """Of the whole model."""
        return self.sizes.model.layers

    @cached_property
    def sequence(self) -> int:
        """Tokens of one."""
        return self.sizes.sequence

    @cached_property
    def rows(self) -> int:
        """Tokens of a microbatch."""
        return self.sizes.microbatch * self.sizes.sequence

    @cached_property
    def dt_bytes(self) -> int:
        """Bytes of an activation's element."""
        return 4 if self.sizes.precision == "fp32" else 2

    @cached_property
    def width(self) -> int:
        """Columns of the residual stream."""
        return self.sizes.model.width

    @cached_property
    def kv_width(self) -> int:
        """Columns of keys and values together."""
        return 2 * self.sizes.model.groups * self.sizes.model.size_of_head

    @property
    def matrix(self) -> int:
        """Elements of the head's matrix."""
        return self.sizes.model.vocab * self.width

    @property
    def tied(self) -> int:
        """Elements of the embedding where it is the head too, else 0."""
        return sum(elements for elements, _ in self.shared.tensors)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.embed.parameters + self.layers * self.layer.parameters + self.head.parameters

    @property
    def flops_token(self) -> float:
        """Training operations of a token, as MFU counts them."""
        pieces = self.layers * self.layer.model_flops + self.embed.model_flops + self.head.model_flops
        return pieces / self.rows

    def again(self, recompute: Recompute) -> ModelPiece:
        """A layer that computes a part of itself again."""
        return self.layer if recompute == "none" else layer_again(self.sizes, recompute)

    def slot(self, recompute: Recompute, apart: bool) -> tuple[int, tuple[int, ...]]:
        """Bytes of a microbatch that a layer keeps; and those that a stage keeps beside its layers: the first, one
        between, the last. ``apart``: weight gradients are put off."""
        return model_slot(self.sizes, recompute, apart)


def costs_of(spec: RunSpec, microbatch: int | None = None) -> ModelCosts:
    """The pieces of a spec's model. Its vocabulary, where it is the dataset's, is ``data.vocab_size``."""
    model, train = spec.model, spec.train
    if not model.vocab:
        model = model.model_copy(update={"vocab": spec.data.vocab_size})
    size = microbatch or train.microbatch
    end = None if spec.data.end_token == "" else 0  # of data that are not looked at: which token does not matter
    apart, muon = spec.data.packing_of(end) == "within", train.optimizer.name == "muon"
    return model_costs(Sizes(model, size, train.sequence, train.classifier_chunk, train.precision, apart, muon))


@lru_cache(64)
def model_costs(sizes: Sizes) -> ModelCosts:
    """The pieces of a model."""
    short = _Short(sizes)
    tensors = list(short.tensors.values())
    owned = [t for t in tensors if t.layer == 1]
    embed = [t for t in tensors if t.part == "embed"]
    head = [t for t in tensors if t.part == "head"]
    return ModelCosts(
        sizes,
        embed=short.piece(short.stage(0, 1), embed, None),
        layer=short.piece(short.stage(1, 2), owned, 1),
        head=short.piece(short.stage(3 * FEW - 1, 3 * FEW), head, None),
        largest=max(tensor.elements for tensor in owned),
        shared=ModelPiece((), 0, ((max(t.elements for t in embed), True),) if sizes.model.tied else (), 0, 0, 0),
    )


@lru_cache(256)
def layer_again(sizes: Sizes, recompute: Recompute) -> ModelPiece:
    """A layer that computes a part of itself again: its weight gradients are part of its input gradients' program."""
    short = _Short(sizes)
    owned = [t for t in short.tensors.values() if t.layer == 1]
    return short.piece(short.stage(1, 2, recompute), owned, 1)


@lru_cache(512)
def model_slot(sizes: Sizes, recompute: Recompute, apart: bool) -> tuple[int, tuple[int, ...]]:
    """Of a layer and of a stage's ends, as ``ModelCosts.slot`` says."""
    short = _Short(sizes)
    slots = [short.slot(short.stage(0, count, recompute, apart)) for count in (FEW, FEW + 1)]
    each = slots[1] - slots[0]  # layers in a row share what one gives to the other, and the room that backward gains
    ends = [slots[0], *(short.slot(short.stage(n * FEW, (n + 1) * FEW, recompute, apart)) for n in (1, 2))]
    return each, tuple(end - FEW * each for end in ends)


class _Short:
    """The model with few layers, and bytes of what its calls touch."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.family = sizes, models.family(sizes.model.family)
        self.model = sizes.model.model_copy(update={"layers": 3 * FEW})
        self.tensors: Mapping[str, Tensor] = {t.name: t for t in tensor_table(self.family, self.model)}
        self.size = {"dt": 4 if sizes.precision == "fp32" else 2, "acc": 4, "byte": 1, "places": 4}
        self.weight = {
            "fp8": 1,
            "fp8_turned": 1,
            "fp8_scale": 0,
            "gradient": 8,
            "head_gradient": 8,
        }  # gradients: += f32

    def stage(self, first: int, end: int, recompute: Recompute = "none", apart: bool = True) -> StagePrograms:
        """Programs of a stage."""
        s = self.sizes
        return expand_stage(
            self.family, self.model, self.tensors, range(first, end), s.microbatch, s.sequence, s.chunk, 1.0,
            fp8=s.precision == "fp8", split=apart and recompute == "none", recompute=recompute, again=end - first,
            end=0 if s.apart else None,
        )  # fmt: skip

    def buffers(self, stage: StagePrograms) -> dict[str, int]:
        """Bytes of each."""
        return {name: b.elements * self.size[b.kind] for name, b in stage.buffers.items()}

    def slot(self, stage: StagePrograms) -> int:
        """Bytes of a microbatch's slot."""
        sizes = self.buffers(stage)
        return lay_out([Stage(0)], {Stage(0): stage}, lambda name: sizes[name[1]]).bytes

    def work(self, call: Call, stage: StagePrograms, part: str) -> CallWork:
        """A call's work."""
        flows = weights = 0
        for operand in call.ptr:  # tokens, losses and rotary tables are small beside the rest
            if isinstance(operand, View):
                flows += operand.rows * operand.cols * self.size[stage.buffers[operand.buffer].kind]
            elif isinstance(operand, Weight) and not call.kernel.startswith("embed"):  # it touches rows of those
                weights += self.tensors[operand.tensor].elements * self.weight.get(operand.use, self.size["dt"])
        weights += head_again(call.kernel, call.dim, self.size["dt"])
        found = work(call.kernel, call.dim)
        kind = "attention" if call.kernel.startswith("attention") else "other"
        if found.products and kind == "other":
            kind = "head" if call.layer is None else "linear"
        sequence = KERNELS[call.kernel].named(call.dim)["T"] if kind == "attention" else 0
        return CallWork(kind, part, found.products + found.again, flows, weights, sequence)

    def piece(self, stage: StagePrograms, tensors: Sequence[Tensor], layer: int | None) -> ModelPiece:
        """The calls of one layer, or of those outside of layers."""
        programs = stage.programs(("F", "I", "W"))
        calls = [(part, call) for part, listed in programs.items() for call in listed if call.layer == layer]
        sizes = {name: size for name, size in self.buffers(stage).items() if name not in stage.kept}
        scratch = [place_scratch(program, sizes)[1] for program in programs.values()]
        found = [work(call.kernel, call.dim) for _, call in calls]
        return ModelPiece(
            calls=tuple(self.work(call, stage, part) for part, call in calls),
            parameters=sum(tensor.elements for tensor in tensors),
            tensors=tuple((tensor.elements, tensor.decay) for tensor in tensors),
            scratch_bytes=max(scratch, default=0),
            model_flops=sum(2 * one.products for one in found),
            cost=sum(one.products + one.again for one in found),
            orthogonal=tuple(
                HiddenMatrix(rows, tensor.shape[1])
                for tensor in tensors
                if self.sizes.muon and tensor.hidden
                for _, rows in tensor.matrices
            ),
        )
