"""A compiled plan: its records, its file, its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from trainer import wire
from trainer.dataset import Mixture
from trainer.models.base import Tensor
from trainer.plan.binary import to_bytes
from trainer.plan.places import Ranks
from trainer.plan.records import Channel, Config, PositionPlan
from trainer.plan.rows import Row


@dataclass(frozen=True)
class Plan:
    """A compiled plan. ``schedule``: each position's computations and messages of a step, without the optimizer's."""

    config: Config
    tensors: tuple[Tensor, ...]
    shards: tuple[int, ...]
    positions: tuple[PositionPlan, ...]
    channels: tuple[Channel, ...]
    schedule: tuple[Row, ...] = field(default=())
    mix: Mixture | None = None

    @cached_property
    def _bytes(self) -> bytes:
        return to_bytes(self.config, self.tensors, self.shards, self.positions, self.channels, self.mix)

    def to_bytes(self) -> bytes:
        """The plan file."""
        return self._bytes

    @property
    def digest(self) -> str:
        """Hex digits of the file's digest: SHA-256 of its bytes from 64 on, as its header has it."""
        first = wire.PlanHeader.digest.offset
        return self._bytes[first : first + 32].hex()

    @property
    def ranks(self) -> Ranks:
        """The processes that run it."""
        return Ranks(self.config.positions, self.config.replicas)

    def on_nodes(self, nodes: int) -> list[list[PositionPlan]]:
        """By node, what each of its ranks runs."""
        ranks = self.ranks
        return [[self.positions[ranks.position(r)] for r in ranks.on_node(node, nodes)] for node in range(nodes)]

    @property
    def heads(self) -> int:
        """How many positions compute the head, or a part of it."""
        return max(1, sum(position.targets_offset is not None for position in self.positions))

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)
