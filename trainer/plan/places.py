"""Who is where. Six words of one meaning each; the numbers have types of their own, so that none is taken for another.

    stage      a run of layers, numbered along the model
    chunk      a stage, as one of several at its position
    position   a place in the pipeline that one rank of each replica fills; it holds one or more chunks
    replica    a copy of the pipeline
    rank       a process: replica x positions + position
    owner      of a tensor: the position that keeps its master weights and moments

Whoever asks one of them for another asks here: ``Pipeline`` from stages to positions, ``Ranks`` from positions to
processes, ``Layout`` from layers and tensors to stages and owners.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.models.base import Tensor

Stage = NewType("Stage", int)
Position = NewType("Position", int)
Replica = NewType("Replica", int)
Rank = NewType("Rank", int)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: every replica fills every position once.

    >>> Ranks(3, 2).rank(Replica(1), Position(2))
    5
    """

    positions: int
    replicas: int = 1

    def __len__(self) -> int:
        return self.positions * self.replicas

    def rank(self, replica: Replica, position: Position) -> Rank:
        """The process that fills a position in a replica."""
        return Rank(replica * self.positions + position)

    def position(self, rank: Rank) -> Position:
        """The position that a process fills."""
        return Position(rank % self.positions)

    def replica(self, rank: Rank) -> Replica:
        """The replica that a process is part of."""
        return Replica(rank // self.positions)

    @property
    def all(self) -> Iterable[Rank]:
        """Every process, the first replica's first."""
        return map(Rank, range(len(self)))

    def on_node(self, node: int, nodes: int) -> Sequence[Rank]:
        """The processes of a node: as many on each, in order."""
        each = len(self) // nodes
        return [Rank(rank) for rank in range(node * each, (node + 1) * each)]


@dataclass(frozen=True)
class Pipeline:
    """The position of every stage.

    >>> v = Pipeline((Position(0), Position(1), Position(1), Position(0)), 2)
    >>> v.chunks[0], v.position(Stage(2))
    ((0, 3), 1)
    """

    of_stage: tuple[Position, ...]
    positions: int

    def __post_init__(self) -> None:
        for stage, position in enumerate(self.of_stage):
            if not 0 <= position < self.positions:
                raise PlanError(
                    f"stage {stage} is placed at position {position}; there are positions 0 to {self.positions - 1}"
                )

    @classmethod
    def in_turn(cls, stages: int, positions: int | None = None) -> Pipeline:
        """The stages in turn over the positions, round after round. None: a position for every stage.

        >>> Pipeline.in_turn(5, 2).chunks
        ((0, 2, 4), (1, 3))
        """
        count = stages if positions is None else positions
        return cls(tuple(Position(stage % count) for stage in range(stages)), count)

    @classmethod
    def there_and_back(cls, stages: int, positions: int) -> Pipeline:
        """The stages along the positions, back along them, and so on: a V where there are twice as many.

        >>> Pipeline.there_and_back(4, 2).chunks
        ((0, 3), (1, 2))
        """
        rounds = (divmod(stage, positions) for stage in range(stages))
        return cls(tuple(Position(positions - 1 - n if turn % 2 else n) for turn, n in rounds), positions)

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.of_stage)

    @property
    def first(self) -> Position:
        """Where the embedding is: the position of the first stage."""
        return self.of_stage[0]

    @property
    def last(self) -> Position:
        """Where the head is: the position of the last stage."""
        return self.of_stage[-1]

    def position(self, stage: Stage) -> Position:
        """Where a stage is."""
        return self.of_stage[stage]

    @cached_property
    def chunks(self) -> tuple[tuple[Stage, ...], ...]:
        """By position, its stages along the model."""
        found: list[list[Stage]] = [[] for _ in range(self.positions)]
        for stage, position in enumerate(self.of_stage):
            found[position].append(Stage(stage))
        return tuple(map(tuple, found))

    def runs(self, position: Position) -> tuple[tuple[Stage, ...], ...]:
        """The stages at a position, those that follow one another together: what passes between these stays there."""
        found: list[list[Stage]] = []
        for stage in self.chunks[position]:
            if found and found[-1][-1] == stage - 1:
                found[-1].append(stage)
            else:
                found.append([stage])
        return tuple(map(tuple, found))

    @cached_property
    def column(self) -> NDArray[np.int32]:
        """The positions by stage."""
        return np.array(self.of_stage, np.int32)


@dataclass(frozen=True)
class Layout:
    """Which layers are a stage, and where the stages are; so the stage and the owner of every tensor."""

    layers: tuple[range, ...]
    """By stage, ascending and without a gap."""
    pipeline: Pipeline

    def __post_init__(self) -> None:
        if len(self.layers) != self.pipeline.stages:
            raise PlanError(f"the layers make {len(self.layers)} stages, the pipeline places {self.pipeline.stages}")

    def stage(self, tensor: Tensor) -> Stage:
        """The stage that a tensor belongs to: its layer's; the first one's the embedding, the last one's the rest.

        A tied embedding is used by both ends of the model. It belongs to the first stage."""
        if tensor.layer is not None:
            return self._of_layer[tensor.layer]
        return Stage(0 if tensor.part == "embed" else len(self.layers) - 1)

    def owner(self, tensor: Tensor) -> Position:
        """The position that keeps a tensor's state."""
        return self.pipeline.position(self.stage(tensor))

    def owned(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """By position, the numbers of the tensors whose state it keeps, in the table's order."""
        found: list[list[int]] = [[] for _ in range(self.pipeline.positions)]
        for number, tensor in enumerate(tensors):
            found[self.owner(tensor)].append(number)
        return tuple(map(tuple, found))

    @cached_property
    def _of_layer(self) -> tuple[Stage, ...]:
        return tuple(Stage(stage) for stage, layers in enumerate(self.layers) for _ in layers)
