"""Pass 1: which layers go to which stage. By cost, not by count: contiguous ranges whose heaviest stage is lightest.

Cost is arithmetic of one token's forward and backward, counted from the kernel calls of the expanded model, so a family
needs no cost model of its own. The embedding costs nothing (it is a copy), the head counts with the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    ``costs`` of the layers in order, ``head`` on top of the last stage. Among equals the earlier stages take fewer
    layers' cost: they hold more microbatches in flight under 1F1B.

    >>> split_layers([1, 1, 1, 1], 2, 2)
    (range(0, 3), range(3, 4))
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise PlanError(f"{stages} stages cannot share {count} layers; every stage needs one: take 1..{count} stages")
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[s][n]: the lightest heaviest stage when the layers from n on go to the last s stages
    best: list[list[int | None]] = [[None] * (count + 1) for _ in range(stages + 1)]
    cut: list[list[int]] = [[0] * (count + 1) for _ in range(stages + 1)]
    for first in range(count):
        best[1][first], cut[1][first] = total[count] - total[first] + head, count
    for left in range(2, stages + 1):
        for first in range(count - left + 1):
            for end in range(first + 1, count - left + 2):
                rest = best[left - 1][end]
                assert rest is not None
                heaviest, known = max(total[end] - total[first], rest), best[left][first]
                if known is None or heaviest < known:
                    best[left][first], cut[left][first] = heaviest, end
    ranges: list[range] = []
    first = 0
    for left in range(stages, 0, -1):
        ranges.append(range(first, cut[left][first]))
        first = ranges[-1].stop
    return tuple(ranges)
