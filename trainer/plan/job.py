"""What all positions of a plan share while it is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trainer import wire
from trainer.models.base import Tensor, Weight
from trainer.plan.expand import JOINS, StagePrograms
from trainer.plan.head import share
from trainer.plan.head_rows import HeadParts
from trainer.plan.places import Layout, Position, Stage
from trainer.plan.reduce import Groups, in_pieces
from trainer.plan.rows import Row
from trainer.spec import RunSpec
from trainer.wire.plan import piece_elements


@dataclass(frozen=True)
class HeadUse:
    """A stage that computes with rows of the head's matrix, which its position may not own."""

    position: Position
    stage: Stage
    first: int
    rows: int


@dataclass(frozen=True)
class Job:
    """What all positions of a plan share."""

    spec: RunSpec
    tensors: tuple[Tensor, ...]
    stages: tuple[StagePrograms, ...]
    layout: Layout
    infer: bool = False
    losses: bool = False
    """Of inference: it ends with losses, not with logits."""
    rows: tuple[Row, ...] = ()
    """What is computed, by position."""
    optimistic: bool = False
    """The next step begins before this one is checked (``optimistic.py``)."""
    parts: HeadParts | None = None
    """Where the head's parts are, if it has several; their stages stand behind the model's in ``stages``."""

    @cached_property
    def dtype(self) -> int:
        """Of activations: ``wire.F32`` or ``wire.BF16``."""
        return wire.F32 if self.spec.train.precision == "fp32" else wire.BF16

    @cached_property
    def plan_dtype(self) -> int:
        """What the plan says: ``wire.FP8`` where the layers' products take it."""
        return wire.FP8 if self.spec.train.precision == "fp8" else self.dtype

    @cached_property
    def quantised(self) -> frozenset[int]:
        """The weights that kernels read as FP8 alone."""
        operands = (p for stage in self.stages for call in stage.forward for p in call.ptr)
        return frozenset(self.number[p.tensor] for p in operands if isinstance(p, Weight) and p.use == "fp8")

    @cached_property
    def muon(self) -> frozenset[int]:
        """The tensors that Muon takes; AdamW takes the others."""
        optimizer = self.spec.train.optimizer
        return frozenset(number for number, tensor in enumerate(self.tensors) if optimizer.takes(tensor))

    @cached_property
    def dt_bytes(self) -> int:
        """Bytes of an activation's element."""
        return wire.DTYPE_BYTES[self.dtype]

    @property
    def replicas(self) -> int:
        """How many share a step's microbatches."""
        return self.spec.parallel.replicas

    @cached_property
    def groups(self) -> Groups:
        """Groups of microbatches of one replica."""
        train = self.spec.train
        return Groups(train.microbatches // self.replicas, train.groups // self.replicas)

    @property
    def norms_at_once(self) -> bool:
        """Whether a backward takes the squared norms of the gradients that it makes: a step is one microbatch, whose
        gradients are complete when they are made."""
        return not self.infer and self.replicas == 1 and self.groups.microbatches == 1

    @cached_property
    def pieces(self) -> Mapping[int, int]:
        """Elements of a piece, of the tensors of which every replica keeps one; not there: whole in every replica.

        Pieces are whole blocks: where tensors have so few that most replicas would get none, whole ones take less."""
        return {
            number: piece_elements(tensor.elements, self.replicas)
            for number, tensor in enumerate(self.tensors)
            if number not in self.quantised | self.muon and in_pieces(tensor.elements, self.replicas)
        }

    @cached_property
    def number(self) -> Mapping[str, int]:
        """Numbers of the tensors by name."""
        return {tensor.name: number for number, tensor in enumerate(self.tensors)}

    @cached_property
    def tied_tensor(self) -> int | None:
        """The head's matrix, where its owner is not who computes with it, or not alone: the embedding, where it is the
        head's weight too; any, where the head is in parts."""
        calls = (call for stage in self.stages for call in (*stage.forward, *stage.backward))
        heads = {p.tensor for call in calls for p in call.ptr if isinstance(p, Weight) and p.use == "head"}
        return min((self.number[name] for name in heads), default=None)

    @cached_property
    def joined(self) -> bool:
        """Whether both uses of a tied embedding have one gradient (``expand.JOINS``)."""
        return any(call.kernel in JOINS.values() for stage in self.stages for call in stage.backward)

    @cached_property
    def head_uses(self) -> tuple[HeadUse, ...]:
        """Who computes with ``tied_tensor`` as the head's matrix, and with which rows of it."""
        if self.tied_tensor is None:
            return ()
        vocab = self.spec.model.vocab
        if self.parts is None:
            return (HeadUse(self.layout.pipeline.last, Stage(len(self.layout.layers) - 1), 0, vocab),)
        count = len(self.parts.positions)
        shares = [share(vocab, self.spec.train.vocab_blocks, count, part) for part in range(count)]
        return tuple(
            HeadUse(position, self.parts.stage(part), mine.first, mine.rows)
            for part, (position, mine) in enumerate(zip(self.parts.positions, shares, strict=True))
        )

    @cached_property
    def owned(self) -> tuple[tuple[int, ...], ...]:
        """By position, the tensors whose state it keeps, in the table's order."""
        return self.layout.owned(self.tensors)
