"""Step lines that nobody told a tracker: read from the store, of the run's own line alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.keys import segment_key
from checkpoint.log import RunState
from checkpoint.store import Store
from flows.drive.hints import step_line
from flows.drive.line import ordered_back
from flows.drive.live import load_curve, newest_segment, on_line, read_segment

MOST_OBJECTS = 4096
"""Of metrics, in one reading; what is older is taken from their index, which is bounded and so may be thin."""


def lines_between(store: Store, state: RunState, first: int, last: int | None = None) -> list[dict[str, Any]]:
    """The lines of the steps from ``first`` to ``last`` (None: the newest), by step, each once: bits are the same
    whichever attempt computed it, but for what an order left behind.
    """
    back, left = ordered_back(state), MOST_OBJECTS
    found: dict[int, dict[str, Any]] = {}
    for epoch in reversed([attempt.epoch for attempt in state.attempts]):
        if left <= 0 or (last is not None and len(found) > last - first):
            break
        lines, read = _of_attempt(store, state.run, epoch, first, last, left)
        left -= read
        for line in lines:
            if not any(epoch < later and line["step"] > begin for later, begin in back):
                found.setdefault(line["step"], line)
    if left <= 0:
        found = {**_from_index(store, state.run, first, min(found, default=None), back), **found}
    return [found[step] for step in sorted(found)]


def _of_attempt(
    store: Store, run: str, epoch: int, first: int, last: int | None, most: int
) -> tuple[list[dict[str, Any]], int]:
    """Its lines of these steps, and how many objects were read. Objects are dense, and hold steps in order."""
    newest = newest_segment(store, run, epoch)
    low, high, read = 0, newest, 0
    while low < high:  # the last object that begins at or before ``first``
        middle = (low + high + 1) // 2
        read += 1
        lines = _steps(store, run, epoch, middle)
        if lines and lines[0]["step"] <= first:
            low = middle
        else:
            high = middle - 1
    found: list[dict[str, Any]] = []
    for number in range(max(low, newest + 1 - most), newest + 1):
        lines = _steps(store, run, epoch, number)
        read += 1
        found += [line for line in lines if line["step"] >= first and (last is None or line["step"] <= last)]
        if last is not None and lines and lines[-1]["step"] > last:
            break
    return found, read


def _steps(store: Store, run: str, epoch: int, number: int) -> list[dict[str, Any]]:
    lines = read_segment(store, segment_key(run, epoch, number)) or ()
    return [line for line in map(step_line, lines) if line is not None]


def _from_index(
    store: Store, run: str, first: int, before: int | None, back: Sequence[tuple[int, int]]
) -> Mapping[int, dict[str, Any]]:
    index = load_curve(store, run)
    points = {} if index is None else on_line(index.curve(), back)
    return {step: point.line() for step, point in points.items() if step >= first and (before is None or step < before)}
