"""Pass 1: which layers go to which stage. By cost, not by count: contiguous ranges whose heaviest stage is lightest.

Cost is arithmetic of one microbatch's forward and backward, counted from the kernel calls of the expanded model
(``flops.call_cost``), so a family needs no cost model of its own. The embedding costs nothing (it is a copy), the head
counts with the last stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import gcd

import numpy as np

from trainer.errors import PlanError


def split_layers(costs: Sequence[int], head: int, stages: int) -> tuple[range, ...]:
    """Contiguous, non-empty ranges of layers, one a stage, minimising the heaviest stage; exact.

    ``costs`` of the layers in order, ``head`` on top of the last stage. Among equals the one whose stages differ least
    (sum of squares), then the one whose earlier stages have fewer layers: they hold more microbatches in flight.

    >>> split_layers([1, 1, 1, 1], 2, 2)
    (range(0, 3), range(3, 4))
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise PlanError(f"{stages} stages cannot share {count} layers; every stage needs one: take 1..{count} stages")
    limit = lightest(costs, head, stages)
    ends = even(count, costs[0], head, stages, limit) if len(set(costs)) == 1 else balanced(costs, head, stages, limit)
    return tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))


def lightest(costs: Sequence[int], head: int, stages: int) -> int:
    """The least that the heaviest stage can cost."""
    sums = [0, *accumulate(reversed((*costs[:-1], costs[-1] + head)))]  # from the last layer back
    low, high = max(costs[-1] + head, *costs), sums[-1]
    while low < high:
        limit, end, used = (low + high) // 2, 0, 0
        while end < len(costs) and used < stages:  # as many layers a stage as fit
            end, used = bisect_right(sums, sums[end] + limit) - 1, used + 1
        low, high = (low, limit) if end == len(costs) else (limit + 1, high)
    return low


def even(count: int, cost: int, head: int, stages: int, limit: int) -> tuple[int, ...]:
    """What ``balanced`` gives for layers of one cost: all but the last stage share evenly, shorter ones first."""
    found: tuple[int, int] | None = None  # sum of squares, layers of the last stage; of equals the most layers there
    for last in range(1, count - stages + 2) if stages > 1 else [count]:
        each, more = divmod(count - last, max(1, stages - 1))
        if last * cost + head <= limit and (each + bool(more)) * cost <= limit:
            squares = (stages - 1 - more) * (each * cost) ** 2 + more * ((each + 1) * cost) ** 2
            squares += (last * cost + head) ** 2
            found = (squares, last) if found is None or squares <= found[0] else found
    assert found is not None, "the limit is one that can be kept"
    each, more = divmod(count - found[1], max(1, stages - 1))
    return (*accumulate([each] * (stages - 1 - more) + [each + 1] * more), count)


def balanced(costs: Sequence[int], head: int, stages: int, limit: int) -> tuple[int, ...]:
    """Where the stages end so that none passes ``limit`` and the sum of their squares is least, earlier ends first.

    A stage's first layer lies between what the stages before it can reach and what those after it can bear, so few
    layers are looked at where the limit is tight.
    """
    count, unit = len(costs), gcd(head, *costs) or 1
    exact = stages * (limit // unit) ** 2 < 1 << 62  # else in Python's own integers
    sums = np.array([0, *accumulate(cost // unit for cost in costs)], np.int64 if exact else object)
    head, limit = head // unit, limit // unit
    far = np.searchsorted(sums, sums + limit, "right") - 1  # by first layer, the furthest end
    near = np.searchsorted(sums, sums - limit, "left")  # by end, the earliest first layer
    high, low = [0], [int(np.searchsorted(sums, sums[count] + head - limit, "left"))]
    for stage in range(1, stages):
        high.append(min(int(far[high[-1]]), count - stages + stage))
        low.append(max(int(near[low[-1]]), 0))
    low = [max(first, stage) for stage, first in enumerate(reversed(low))]
    firsts = np.arange(low[-1], high[-1] + 1)
    best, ends = (sums[count] + head - sums[firsts]) ** 2, []
    for stage in range(stages - 2, -1, -1):
        firsts = np.arange(low[stage], high[stage] + 1)
        value, end = np.full(len(firsts), -1, sums.dtype), np.zeros(len(firsts), np.int64)
        for width in range(1, int((far[firsts] - firsts).max()) + 1):
            at = firsts + width
            fits = np.flatnonzero((at >= low[stage + 1]) & (at <= high[stage + 1]) & (at <= far[firsts]))
            at = at[fits]
            squares = (sums[at] - sums[firsts[fits]]) ** 2 + best[at - low[stage + 1]]
            less = (squares < value[fits]) | (end[fits] == 0)
            value[fits[less]], end[fits[less]] = squares[less], at[less]
        best = value
        ends.append(end)
    out, first = [], 0
    for stage, end in enumerate(reversed(ends)):
        first = int(end[first - low[stage]])
        out.append(first)
    return (*out, count)


def split_with(costs: Sequence[int], extras: Sequence[int]) -> tuple[range, ...]:
    """As ``split_layers``, where each stage has a cost of its own on top (``extras``), as parts of a head are.

    >>> split_with([2, 2, 2, 2], [0, 3, 3])
    (range(0, 2), range(2, 3), range(3, 4))
    """
    count, stages = len(costs), len(extras)
    if not 1 <= stages <= count:
        raise PlanError(f"{stages} stages cannot share {count} layers; every stage needs one: take 1..{count} stages")
    sums = [0, *accumulate(costs)]
    # by stages so far and where they end: the heaviest, the sum of squares, where the last of them begins
    best: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, 0)}]
    for stage, extra in enumerate(extras):
        found: dict[int, tuple[int, int, int]] = {}
        for end in range(stage + 1, count - (stages - stage - 1) + 1):
            ways = (
                (max(heaviest, cost := sums[end] - sums[first] + extra), squares + cost * cost, first)
                for first, (heaviest, squares, _) in best[-1].items()
                if first < end
            )
            found[end] = min(ways)
        best.append(found)
    ends = [count]
    for stage in range(stages, 1, -1):
        ends.append(best[stage][ends[-1]][2])
    ends.reverse()
    return tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))
