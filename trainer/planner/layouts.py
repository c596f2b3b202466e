"""A layout of a run over devices, in the words of a spec, and what of it this engine runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from trainer.spec_how import THERE_AND_BACK, RecomputeKind

Recompute = RecomputeKind
MARK = "modelled, not run by this engine"
RECOMPUTES: tuple[Recompute, ...] = get_args(RecomputeKind)
"""The least first."""
APART = ("zb-h1", *THERE_AND_BACK)
"""Schedules that put weight gradients off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """What a planner may choose. ``context`` and ``tensor`` split a microbatch's tokens and a layer's matrices over
    devices; ``sharded``: weights and gradients in so many pieces, gathered where they are used (1: they are whole)."""

    positions: int
    chunks: int
    replicas: int
    schedule: str
    microbatch: int
    microbatches: int
    """Of one replica."""
    recompute: Recompute = "none"
    tensor: int = 1
    context: int = 1
    sharded: int = 1
    groups: int = 1
    """train.reduction_groups."""
    blocks: int = 1
    """train.vocab_blocks."""
    head: int = 1
    """Positions that share the head (parallel.vocab_stages)."""
    fp8: bool = False
    """The layers' products take FP8 although the spec says bf16."""
    pipeline_first: bool = field(default=True, compare=False)
    """Positions of a replica lie side by side, else the replicas of a position do."""
    packed: bool = field(default=False, compare=False)
    """Only tensor pieces stay within a rack; context pieces lie across racks where that leaves no device idle."""

    @property
    def stages(self) -> int:
        """parallel.stages."""
        return self.positions * self.chunks

    @property
    def devices(self) -> int:
        """One a rank and piece of it."""
        return self.positions * self.replicas * self.tensor * self.context

    @property
    def sequences(self) -> int:
        """A step's batch."""
        return self.microbatch * self.microbatches * self.replicas

    @property
    def modelled(self) -> tuple[str, ...]:
        """The axes that this engine does not run."""
        axes = {"tensor": self.tensor > 1, "context": self.context > 1, "sharded": self.sharded > 1, "fp8": self.fp8}
        return tuple(name for name, used in axes.items() if used)

    @property
    def foreign(self) -> bool:
        """Whether it has an axis that this engine does not run."""
        return self.tensor > 1 or self.context > 1 or self.sharded > 1 or self.fp8

    def refusal(self) -> str:
        """Why this engine would not run it; empty where it would."""
        return f"{' + '.join(self.modelled)}: {MARK}" if self.foreign else ""

    def to_json(self) -> dict[str, Any]:
        """As ``hotstage plan --json`` tells it; microbatches are of one replica."""
        return {
            "stages": self.stages,
            "replicas": self.replicas,
            "schedule": self.schedule,
            "chunks": self.chunks,
            "microbatch": self.microbatch,
            "microbatches": self.microbatches,
            "recompute": self.recompute,
            "tensor": self.tensor,
            "context": self.context,
            "sharded": self.sharded,
            "reduction_groups": self.groups,
            "vocab_stages": self.head,
            "fp8": self.fp8,
        }

    def words(self) -> str:
        """In a line.

        >>> Arrangement(positions=4, chunks=2, replicas=8, schedule="zb-v", microbatch=1, microbatches=16).words()
        '4 positions x 2 chunks x 8 replicas, zb-v, 16 microbatches of 1'
        """
        again = f", recompute {self.recompute}" if self.recompute != "none" else ""
        shared = f", head shared by {self.head}" if self.head > 1 else ""
        return f"{self.grid()}, {self.schedule}, {self.filling()}{again}{shared}"

    def grid(self) -> str:
        """What ranks are made of."""
        axes = [f"{self.positions} position{'s' * (self.positions > 1)}"]
        axes += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        axes += [f"{name} {getattr(self, name)}" for name in self.modelled if name != "fp8"]
        return " x ".join([*axes, f"{self.replicas} replica{'s' * (self.replicas > 1)}"]) + ", FP8" * self.fp8

    def filling(self) -> str:
        """What a replica's pipeline is filled with."""
        return f"{self.microbatches} microbatch{'es' * (self.microbatches > 1)} of {self.microbatch}"
