"""Pass 1: which layers go to which stage. By cost, not by count: contiguous ranges whose heaviest stage is lightest.

Cost is arithmetic of one token's forward and backward, counted from the kernel calls of the expanded model, so a family
needs no cost model of its own. The embedding costs nothing (it is a copy), the head counts with the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.errors import PlanError
from trainer.models.base import Call


def call_cost(call: Call) -> int:
    """Multiply-adds of a forward call with both its gradients; 0 where memory traffic decides."""
    d = call.dim
    if call.kernel == "linear_fwd":
        return 3 * d[0] * d[1] * d[2]
    if call.kernel == "attention_fwd":  # two products forward, five backward, half of the square each (causal)
        batch, sequence, heads, _, size = d[:5]
        return 7 * batch * heads * size * sequence * (sequence + 1) // 2
    if call.kernel in ("classifier_fwd", "logits"):
        return 3 * d[0] * d[1] * d[2]
    return 0


def split_layers(costs: Sequence[int], head: int, stages: int) -> tuple[range, ...]:
    """Contiguous, non-empty ranges of layers, one a stage, minimising the heaviest stage; exact (dynamic programme).

    ``costs`` of the layers in order, ``head`` on top of the last stage. Among equals the one whose stages differ least
    (sum of squares), then the one whose earlier stages have fewer layers: they hold more microbatches in flight.

    >>> split_layers([1, 1, 1, 1], 2, 2)
    (range(0, 3), range(3, 4))
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise PlanError(f"{stages} stages cannot share {count} layers; every stage needs one: take 1..{count} stages")
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    total = sums[count] + head
    heaviest = _cut(sums, head, stages, total, max)[0]
    ends = _cut(sums, head, stages, heaviest, lambda stage, rest: stage * stage + rest)[1]
    return tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))


def _cut(
    sums: Sequence[int], head: int, stages: int, limit: int, join: Callable[[int, int], int]
) -> tuple[int, tuple[int, ...]]:
    """The least ``join`` of all stages' costs where none passes ``limit``, and where the stages end.

    ``sums[n]`` is the cost of the first n layers; ``join(cost of a stage, join of the later ones)`` must not fall when
    either grows.
    """
    count = len(sums) - 1
    best: list[tuple[int, tuple[int, ...]] | None] = []  # by first layer, for the stages that are left
    for first in range(count + 1):
        last = sums[count] - sums[first] + head
        best.append((join(last, 0), (count,)) if first < count and last <= limit else None)
    for _ in range(stages - 1):
        now: list[tuple[int, tuple[int, ...]] | None] = []
        for first in range(count + 1):
            found: tuple[int, tuple[int, ...]] | None = None
            for end in range(first + 1, count):
                cost, rest = sums[end] - sums[first], best[end]
                if cost > limit:
                    break
                if rest is not None:
                    value = join(cost, rest[0])
                    if found is None or value < found[0]:
                        found = (value, (end, *rest[1]))
            now.append(found)
        best = now
    assert best[0] is not None, "one layer a stage always fits"
    return best[0]
