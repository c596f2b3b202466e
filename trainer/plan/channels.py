"""Proves that messages meet: every send has its receive, in order on its channel, and rendezvous does not deadlock.

A channel has one sending and one receiving position. Rendezvous: a send completes only when its receive is posted, and
a position does one thing at a time. That is the strictest channel there is; lists that pass under it run on every
channel that keeps the order of messages. What holds for the positions holds for the ranks of every replica.

The proof plays the messages in rounds: in each, all positions whose peers stand at the other end of the same channel
pass. Whoever can pass in some round can pass in any later one, so the order of play decides nothing. A round is a few
operations on one column of all positions; there are about as many as the longest row has messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.places import Position


@dataclass(frozen=True, slots=True)
class Ends:
    """One position's ends of messages, in its order, as columns. ``label`` is the same at both ends of a message."""

    channel: NDArray[np.int32]
    is_send: NDArray[np.bool_]
    label: NDArray[np.signedinteger]


def check_ends(
    rows: Sequence[Ends],
    channels: int,
    text: Callable[[Position, int], str],
    name: Callable[[int], object] = lambda channel: channel,
) -> None:
    """Refuses messages that do not meet, by PlanError. ``channels``: how many; each is a number below.

    ``text(position, place)`` tells a message to people, ``name(channel)`` a channel.
    """
    where = _Where(rows, text)
    ends = [_End() for _ in range(2 * channels)]
    for position, row in enumerate(rows):
        _note_ends(Position(position), row, ends, where, name)
    _check_order(rows, ends, where, name)
    _check_rendezvous(rows, ends, where)


class _Where:
    """Where a message stands: its position, and its place among that position's; by its number among all. Its text."""

    def __init__(self, rows: Sequence[Ends], text: Callable[[Position, int], str]) -> None:
        self.starts = np.cumsum([0, *(len(row.channel) for row in rows)])
        self.text = text

    def say(self, position: Position, place: int) -> str:
        return f"position {position}, message {place}, {self.text(position, place)}"


class _End:
    """An end of a channel: the position there, and the labels of its messages in order. Its number is twice the
    channel's, and 1 more for the sending end."""

    __slots__ = ("labels", "position")

    def __init__(self) -> None:
        self.position = Position(-1)
        self.labels: NDArray[np.signedinteger] = np.zeros(0, np.int32)


def _numbers(row: Ends) -> NDArray[np.int32]:
    return 2 * row.channel + row.is_send


def _note_ends(
    position: Position, row: Ends, ends: Sequence[_End], where: _Where, name: Callable[[int], object]
) -> None:
    """Whose each end is, and which labels pass it."""
    numbers = _numbers(row)
    keys = numbers.astype(np.uint16) if len(ends) <= 1 << 16 else numbers  # sorting short keys takes linear time
    order = np.argsort(keys, kind="stable")
    labels, ordered = row.label[order], numbers[order]
    cuts = np.flatnonzero(np.diff(ordered, prepend=-1))
    clashes = []
    for first, mine in zip(cuts, np.split(labels, cuts[1:]), strict=False):
        number = int(ordered[first])
        if ends[number].position >= 0:
            clashes.append((int(order[first]), number, ends[number].position))
        ends[number].position, ends[number].labels = position, mine
    if clashes:
        place, number, holder = min(clashes)
        raise PlanError(
            f"{where.say(position, place)}: the {'sending' if number % 2 else 'receiving'} end of channel "
            f"{name(number // 2)} belongs to position {holder}; a channel has one position at each end"
        )


def _check_order(rows: Sequence[Ends], ends: Sequence[_End], where: _Where, name: Callable[[int], object]) -> None:
    """The n-th send of a channel and its n-th receive have one label, and there are as many of each."""
    wrong = []
    for number, mine in enumerate(ends):
        theirs = ends[number ^ 1]
        if not np.array_equal(mine.labels, theirs.labels):
            shared = min(len(mine.labels), len(theirs.labels))
            differ = np.flatnonzero(mine.labels[:shared] != theirs.labels[:shared])
            nth = int(differ[0]) if len(differ) else shared
            if nth < len(mine.labels):
                wrong.append((mine.position, _place(rows[mine.position], number, nth), number, nth))
    if not wrong:
        return
    position, place, number, nth = min(wrong)
    other, channel = ends[number ^ 1], name(number // 2)
    if nth >= len(other.labels):
        want = "receive" if number % 2 else "send"
        raise PlanError(
            f"{where.say(position, place)}: no {want} matches it: channel {channel} has {len(other.labels)} of them"
        )
    there = _place(rows[other.position], number ^ 1, nth)
    raise PlanError(
        f"{where.say(position, place)}: is number {nth} on channel {channel}, where position {other.position} (message "
        f"{there}) has {where.text(other.position, there)}; both ends of a channel must keep one order"
    )


def _place(row: Ends, number: int, nth: int) -> int:
    """Where the n-th message of an end stands in its position's row."""
    return int(np.flatnonzero(_numbers(row) == number)[nth])


def _check_rendezvous(rows: Sequence[Ends], ends: Sequence[_End], where: _Where) -> None:
    """Plays all messages in rounds."""
    starts, lanes = where.starts, len(rows)
    done = len(ends)  # stands after each position's last message; no peer stands at done + 1
    closed = np.array([done], np.int32)
    at = np.concatenate([part for row in rows for part in (_numbers(row), closed)]) if rows else closed
    peer = np.array([*(ends[number ^ 1].position for number in range(done)), 0], np.int32)
    place = starts[:-1] + np.arange(lanes)
    last = starts[1:] + np.arange(lanes)
    while True:
        mine = at[place]
        meets = mine[peer[mine]] == mine ^ 1
        if not meets.any():
            break
        place += meets
    waiting = np.flatnonzero(place < last)
    if not len(waiting):
        return
    stands = place - starts[:-1] - np.arange(lanes)
    other = peer[at[place]]
    for position in map(Position, waiting[other[waiting] == waiting][:1].tolist()):
        raise PlanError(f"{where.say(position, int(stands[position]))}: a position sends to itself; both ends block")
    position, passed = Position(int(waiting[0])), dict[Position, int]()
    while position not in passed:
        passed[position] = len(passed)
        position = Position(int(other[position]))
    cycle = [
        f"position {r} at message {stands[r]}, {where.text(r, int(stands[r]))}, waits for position {other[r]}"
        for r in list(passed)[passed[position] :]
    ]
    raise PlanError("deadlock under rendezvous-only channels: " + "; ".join(cycle))
