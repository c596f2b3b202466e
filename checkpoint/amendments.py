"""Amendments: what orders changed of a run's numbers: batches that are passed over, the rate, the last step.

A run's bits at a step are a function of its What and its amendments (docs/adr/0015). Batch b is the samples that step b
reads where nothing is skipped; step s reads the s-th batch that is not skipped. The engine does the same sums
(``data/order.c``, ``run/step_math.c``); the bytes that it reads are ``wire/attempt.h``. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from checkpoint.codec import Fields
from checkpoint.errors import Damaged
from trainer.wire import ATTEMPT_RATES_MAX, ATTEMPT_SKIPS_MAX

MOST = 1 << 40
"""Of steps and batches, as a plan has it."""


@dataclass(frozen=True, slots=True)
class Amendments:
    """``steps``: in all (0: as the spec says); ``skip``: batches, first and last of each range, ascending and apart;
    ``rate``: (from this step on, factor of the schedule's rate), ascending, above 0 and at most 1.

    >>> Amendments(skip=((3, 4), (7, 7))).batch(2), Amendments(skip=((3, 4), (7, 7))).batch(5)
    (2, 8)
    """

    steps: int = 0
    skip: tuple[tuple[int, int], ...] = ()
    rate: tuple[tuple[int, float], ...] = ()

    def __bool__(self) -> bool:
        return self != NONE

    def total(self, steps: int) -> int:
        """The run's last step, where the spec says ``steps``."""
        return self.steps or steps

    def batch(self, step: int) -> int:
        """The batch that this step reads; of step 0 none, 0. So many batches lie behind a run that has done it."""
        found = step
        for first, last in self.skip:
            if step == 0 or first > found:
                break
            found += last - first + 1
        return found

    def step(self, batch: int) -> int:
        """The step that reads this batch, or the first one not skipped behind it."""
        return batch - sum(max(0, min(batch, last + 1) - first) for first, last in self.skip)

    def factor(self, step: int) -> float:
        """Of the schedule's rate at this step."""
        return next((factor for since, factor in reversed(self.rate) if since <= step), 1.0)

    def skipped(self, upto: int) -> int:
        """How many of the batches up to this one are skipped."""
        return sum(max(0, min(upto, last) - first + 1) for first, last in self.skip)

    def skipping(self, first: int, last: int) -> Amendments:
        """With these batches skipped too, whatever of them was skipped before."""
        joined: list[tuple[int, int]] = []
        for a, b in sorted((*self.skip, (first, last))):
            if joined and a <= joined[-1][1] + 1:  # what touches is one
                joined[-1] = joined[-1][0], max(joined[-1][1], b)
            else:
                joined.append((a, b))
        return replace(self, skip=tuple(joined))

    def rated(self, step: int, factor: float) -> Amendments:
        """With this factor from that step on, whatever was to come then."""
        before = tuple(r for r in self.rate if r[0] < step)
        return replace(self, rate=before if factor == (before[-1][1] if before else 1.0) else (*before, (step, factor)))

    def to_map(self) -> dict[str, Any]:
        """As it stands in records."""
        found = {"steps": self.steps, "skip": [list(r) for r in self.skip], "rate": [list(r) for r in self.rate]}
        return {key: value for key, value in found.items() if value}

    @classmethod
    def parse(cls, value: Mapping[str, Any] | None, what: str) -> Amendments:
        """Of a record's map, None where it has none; Damaged for anything else."""
        if value is None:
            return NONE
        f = Fields(dict(value) if isinstance(value, Mapping) else value, what)
        steps = f.integer("steps", 1, MOST) if f.has("steps") else 0
        skip = tuple(f.array("skip", ATTEMPT_SKIPS_MAX)) if f.has("skip") else ()
        rate = tuple(f.array("rate", ATTEMPT_RATES_MAX)) if f.has("rate") else ()
        f.done()
        if not all(_pair(r, int) and 1 <= r[0] <= r[1] <= MOST for r in skip):
            raise Damaged(f"{what}: an entry of 'skip' is not two batches from 1 to {MOST}, in order")
        if not all(_pair(r, float) and 1 <= r[0] <= MOST and 0.0 < r[1] <= 1.0 for r in rate):
            raise Damaged(f"{what}: an entry of 'rate' is not a step and a factor above 0 and at most 1")
        if not all(a[1] < b[0] for a, b in pairwise(skip)) or not all(a[0] < b[0] for a, b in pairwise(rate)):
            raise Damaged(f"{what}: the entries of 'skip' or 'rate' are not in order, or overlap")
        return cls(steps, tuple((a, b) for a, b in skip), tuple((a, b) for a, b in rate))


NONE = Amendments()


def _pair(value: Any, second: type) -> bool:
    return isinstance(value, list | tuple) and [type(x) for x in value] == [int, second]
