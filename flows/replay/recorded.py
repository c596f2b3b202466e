"""What a run's metrics recorded of its steps: loss and gradient norm, bit for bit.

The engine writes both with 17 digits, from which the very same double is read. Metrics are hints: lines may be missing,
and then there is nothing to compare at that step. A step may have been computed by several attempts; the one that
counts is the last that began before it, since what comes later was computed from its state.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from checkpoint.keys import segment_key
from checkpoint.log import AttemptInfo
from checkpoint.store import Store
from flows.drive.hints import step_line
from flows.drive.live import newest_segment, read_segment


class StepLine(NamedTuple):
    """What was said of a step, by the attempt of that epoch.

    ``sums``: of the gradient by groups of tensors; ``sent``: of the messages of each position of its first replica, in
    the layout that it had (``engine/run/metrics.h``). Hex; empty where the engine did not say it.
    """

    step: int
    epoch: int
    loss: float
    norm: float
    sums: str = ""
    sent: str = ""


def bits(value: float) -> str:
    """A double as it is compared.

    >>> bits(1.0), bits(-0.0) == bits(0.0)
    ('3ff0000000000000', False)
    """
    return struct.pack(">d", value).hex()


def computed_by(attempts: Sequence[AttemptInfo], step: int) -> AttemptInfo | None:
    """The attempt whose computing of this step counts: the last that began before it."""
    return next((a for a in reversed(attempts) if a.step < step), None)


def read_recorded(
    store: Store, run: str, attempts: Sequence[AttemptInfo], first: int, last: int
) -> dict[int, StepLine]:
    """The lines of steps ``first`` to ``last`` that are there, each of the attempt that counts.

    ``attempts``: of the line of the run that leads to ``last``, oldest first. Asks for few objects, however long the
    run is.
    """
    found: dict[int, StepLine] = {}
    wanted = {step: a.epoch for step in range(first, last + 1) if (a := computed_by(attempts, step)) is not None}
    for epoch in sorted(set(wanted.values())):
        steps = [step for step, by in wanted.items() if by == epoch]
        for line in read_lines(store, run, epoch, min(steps), max(steps)):
            if wanted.get(line.step) == epoch:
                found[line.step] = line
    return found


def newest_step(store: Store, run: str, attempts: Sequence[AttemptInfo]) -> int:
    """The last step that the newest attempt is known to have computed; where it began, if it has said nothing."""
    for attempt in reversed(attempts[-1:]):
        for number in range(newest_segment(store, run, attempt.epoch), -1, -1):
            if steps := [line.step for line in _lines(store, run, attempt.epoch, number)]:
                return max(steps)
        return attempt.step
    return 0


def read_lines(store: Store, run: str, epoch: int, first: int, last: int) -> Iterator[StepLine]:
    """An attempt's lines of these steps. Its objects are in order of step: the first one is looked for by halves."""
    newest = newest_segment(store, run, epoch)
    low, high = 0, newest + 1
    while high - low > 1:
        middle = (low + high) // 2
        begins = next((line.step for n in range(middle, high) for line in _lines(store, run, epoch, n)), None)
        low, high = (low, middle) if begins is None or begins > first else (middle, high)
    for number in range(low, newest + 1):
        lines = _lines(store, run, epoch, number)
        yield from (line for line in lines if first <= line.step <= last)
        if any(line.step > last for line in lines):
            return


def _lines(store: Store, run: str, epoch: int, number: int) -> list[StepLine]:
    lines = []
    for said in filter(None, map(step_line, read_segment(store, segment_key(run, epoch, number)) or ())):
        if said["epoch"] == epoch:
            more = _hex(said.get("sums")), _hex(said.get("sent"))
            lines.append(StepLine(said["step"], epoch, said["loss"], said["grad_norm"], *more))
    return lines


def _hex(value: object) -> str:
    good = isinstance(value, str) and len(value) <= 4096 and not set(value) - set("0123456789abcdef")
    return str(value) if good else ""
