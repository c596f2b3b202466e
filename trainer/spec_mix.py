"""A mixture of corpora in a spec: its parts, and their weights as a step function of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field, StrictInt, model_validator

from trainer.spec_fields import Section, shown
from trainer.wire import CYCLE_MAX, PHASES_MAX
from trainer.wire.order import MixPhase


class MixPart(Section):
    """A part of a mixture."""

    source: str = Field(min_length=1, description="as data.source")
    field: str = Field("text", min_length=1, description="as data.field")
    prompt_field: str | None = Field(None, min_length=1, description="as data.prompt_field")
    messages: str | None = Field(None, min_length=1, description="as data.messages")
    weight: StrictInt | tuple[StrictInt, ...] = Field(
        description="samples of each cycle, which has as many as all weights together; or a list: at first, and from "
        "each of steps on"
    )
    steps: tuple[StrictInt, ...] = Field(
        (), description="steps (from 2) from which on the next weight of the list holds"
    )

    @property
    def weights(self) -> tuple[int, ...]:
        return (self.weight,) if isinstance(self.weight, int) else self.weight

    def at(self, step: int) -> int:
        """Its weight at this step."""
        return self.weights[sum(first <= step for first in self.steps)]

    @model_validator(mode="after")
    def _check(self) -> MixPart:
        bad = [w for w in self.weights if not 0 <= w <= CYCLE_MAX]
        if bad:
            raise ValueError(
                f"weight {shown(bad[0])} must be a whole number from 0 to {CYCLE_MAX}; for shares of 0.7 and 0.3 write "
                "7 and 3"
            )
        if len(self.weights) != len(self.steps) + 1:
            raise ValueError(
                f"weight has {len(self.weights)} numbers and steps {len(self.steps)}; there is one weight more than "
                "steps: the first holds from step 1 on, the next from the first of steps on"
            )
        if any(b <= a for a, b in pairwise((1, *self.steps))) or max(self.steps, default=0) > 1 << 40:
            raise ValueError(f"steps {shown(list(self.steps))} must ascend from 2 to {1 << 40}")
        if not any(self.weights):
            raise ValueError("weight is 0 from the first to the last step: nothing of it would be read; leave it out")
        return self


def phases_of(parts: Sequence[MixPart]) -> tuple[MixPhase, ...]:
    """Their weights from the first step on, and from each at which one changes."""
    steps = sorted({1, *(step for part in parts for step in part.steps)})
    return tuple(MixPhase(step, tuple(part.at(step) for part in parts)) for step in steps)


def check_phases(phases: Sequence[MixPhase]) -> None:
    """ValueError where they are too many, or the weights of one are nothing or too much."""
    if len(phases) > PHASES_MAX:
        raise ValueError(f"mix: its weights change at {len(phases) - 1} steps, at most {PHASES_MAX - 1} may be")
    for phase in phases:
        if not 1 <= phase.cycle <= CYCLE_MAX:
            raise ValueError(
                f"mix: the weights from step {phase.from_batch} on are {phase.cycle} together; they must be 1 to "
                f"{CYCLE_MAX}: a cycle has so many samples"
            )
