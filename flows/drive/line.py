"""What of a run's past is its own line: where it began, and what its orders left behind. Pure, on the folded log."""

from __future__ import annotations

from checkpoint.log import RunState, StartPoint


def beginning_of(state: RunState) -> StartPoint:
    """Where the run began: at the step of its parent's checkpoint, or at 0."""
    parent = state.parent
    return StartPoint(None, int(parent["step"]) if parent else 0)


def ordered_back(state: RunState) -> list[tuple[int, int]]:
    """(epoch, step) of the attempts that an order sent back: what older ones did after that step is not the run's. Of
    an order that none follows (yet, or because the run ends where it goes back to) the epoch is one to come."""
    found, before = [], 0
    for attempt in state.attempts:
        if any(before < order.n <= attempt.order and order.start is not None for order in state.orders):
            found.append((attempt.epoch, attempt.step))
        before = attempt.order
    waiting = [order.start.step for order in state.orders if order.n > before and order.start is not None]
    return [*found, (state.n + 1, waiting[-1])] if waiting else found
