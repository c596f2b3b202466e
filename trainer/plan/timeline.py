"""A timeline: who did what from when to when. The simulator makes planned ones, the engine's traces measured ones.

Both have the same form, so one set of drawings serves both and the two lie side by side. Times are seconds from the
start of the timeline.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from trainer.plan.places import Rank

COMPUTE_KINDS = ("F", "I", "W", "B")
KINDS = {
    "F": "forward",
    "I": "input gradient",
    "W": "weight gradient",
    "B": "backward",
    "O": "optimizer",
    "send": "send",
    "recv": "receive and wait",
    "other": "data, reports, snapshot",
}
"""Kind of an event to its name in legends. ``recv`` includes the wait for the sender."""


@dataclass(frozen=True, slots=True)
class Span:
    """One action of a rank; ``action`` is its text, such as ``2F0`` or ``SEND_F``; ``start <= end``, in seconds."""

    rank: Rank
    action: str
    kind: str
    start: float
    end: float
    microbatch: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Label:
    """What events have in common. ``numbered``: an event's text is ``action`` and its microbatch's number."""

    action: str
    kind: str
    numbered: bool = False


class EventRow(Sequence[Span]):
    """One rank's events by start, as columns, read as a sequence of ``Span``. -1 in ``microbatch``: none."""

    __slots__ = ("end", "labels", "microbatch", "rank", "start", "which")

    def __init__(
        self,
        rank: Rank,
        labels: Sequence[Label],
        which: NDArray[np.uint32],
        microbatch: NDArray[np.int32],
        start: NDArray[np.float64],
        end: NDArray[np.float64],
    ) -> None:
        self.rank, self.labels, self.which, self.microbatch = rank, labels, which, microbatch
        self.start, self.end = start, end

    @classmethod
    def of(cls, rank: Rank, events: Iterable[Span]) -> EventRow:
        """The events of a rank, sorted by start."""
        listed = sorted(events, key=lambda event: event.start)
        labels: dict[Label, int] = {}
        which = [labels.setdefault(Label(event.action, event.kind), len(labels)) for event in listed]
        microbatch = [-1 if event.microbatch is None else event.microbatch for event in listed]
        times = [np.array([getattr(event, name) for event in listed], np.float64) for name in ("start", "end")]
        return cls(rank, tuple(labels), np.array(which, np.uint32), np.array(microbatch, np.int32), *times)

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, place: int) -> Span: ...
    @overload
    def __getitem__(self, place: slice) -> EventRow: ...
    def __getitem__(self, place: int | slice) -> Span | EventRow:
        if isinstance(place, slice):
            columns = self.which[place], self.microbatch[place], self.start[place], self.end[place]
            return EventRow(self.rank, self.labels, *columns)
        microbatch, times = int(self.microbatch[place]), (float(self.start[place]), float(self.end[place]))
        return self._one(int(self.which[place]), microbatch, *times)

    def __iter__(self) -> Iterator[Span]:
        return map(self._one, self.which.tolist(), self.microbatch.tolist(), self.start.tolist(), self.end.tolist())

    def _one(self, which: int, microbatch: int, start: float, end: float) -> Span:
        label, number = self.labels[which], None if microbatch < 0 else microbatch
        text = f"{label.action}{number}" if label.numbered and number is not None else label.action
        return Span(self.rank, text, label.kind, start, end, number)

    def seconds(self, kinds: Collection[str]) -> float:
        """Seconds of all events of ``kinds``."""
        wanted = np.array([label.kind in kinds for label in self.labels], np.bool_)
        chosen = wanted[self.which] if len(self) else np.zeros(0, np.bool_)
        return float((self.end[chosen] - self.start[chosen]).sum())


class EventList(Sequence[Span]):
    """The events of all ranks, rank by rank."""

    __slots__ = ("ends", "rows")

    def __init__(self, rows: Sequence[EventRow]) -> None:
        self.rows = tuple(rows)
        self.ends = list(accumulate(map(len, self.rows)))  # by row, the events up to its end

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, place: int) -> Span: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Span]: ...
    def __getitem__(self, place: int | slice) -> Span | Sequence[Span]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        number = place if place >= 0 else place + len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"event {place} of {len(self)}")
        row = bisect_right(self.ends, number)
        return self.rows[row][number - self.ends[row]]

    def __iter__(self) -> Iterator[Span]:
        return chain.from_iterable(self.rows)


@dataclass(frozen=True)
class Timeline:
    """Events of ``ranks`` ranks, each rank's ascending and without overlap."""

    events: Sequence[Span]
    ranks: int
    title: str = ""

    @cached_property
    def rows(self) -> tuple[EventRow, ...]:
        """Events by rank, by start."""
        if isinstance(self.events, EventList):
            return self.events.rows
        rows: list[list[Span]] = [[] for _ in range(self.ranks)]
        for event in self.events:
            rows[event.rank].append(event)
        return tuple(EventRow.of(Rank(rank), row) for rank, row in enumerate(rows))

    @cached_property
    def seconds(self) -> float:
        """From 0 to the last end."""
        return max((float(row.end.max()) for row in self.rows if len(row)), default=0.0)

    def busy(self, rank: int, kinds: Iterable[str] = (*COMPUTE_KINDS, "O")) -> float:
        """Seconds that a rank spends in ``kinds``."""
        return self.rows[rank].seconds(frozenset(kinds))

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """Of each rank, the part of the time in which it neither computes nor updates weights: 0 to 1."""
        if self.seconds == 0.0:
            return (0.0,) * self.ranks
        return tuple(1.0 - self.busy(rank) / self.seconds for rank in range(self.ranks))


_OPTIMIZER = ("O", "fold", "sum", "sumsq", "adamw", "foresee", "codes")
"""Programs behind the backward, by name: gradients joined, norms, the optimizer."""


def kind_of(name: str) -> str:
    """The kind of an event by its name in a trace: ``2F0`` is F, ``SEND_F`` and ``3SEND_F1`` are send.

    >>> [kind_of(n) for n in ("2F0", "12B7", "B", "1RECV_B4", "SEND", "adamw", "data")]
    ['F', 'B', 'B', 'recv', 'send', 'O', 'other']
    """
    bare = name.strip("0123456789")
    if bare in COMPUTE_KINDS:
        return bare
    if bare.startswith("SEND"):
        return "send"
    if bare.startswith("RECV"):
        return "recv"
    return "O" if bare in _OPTIMIZER else "other"


def to_chrome(timelines: Timeline | Sequence[Timeline]) -> str:
    """Timelines as one Chrome trace (Perfetto opens it), in microseconds: each a process of its title, a rank a thread.
    All begin at 0, so that a planned and a measured step lie one below the other."""
    events: list[dict[str, object]] = []
    for pid, timeline in enumerate([timelines] if isinstance(timelines, Timeline) else timelines):
        about = {"ph": "M", "pid": pid}
        events.append({"name": "process_name", **about, "tid": 0, "args": {"name": timeline.title or "step"}})
        events.append({"name": "process_sort_index", **about, "tid": 0, "args": {"sort_index": pid}})
        for rank in range(timeline.ranks):
            events.append({"name": "thread_name", **about, "tid": rank, "args": {"name": f"rank {rank}"}})
        for event in timeline.events:
            events.append(
                {
                    "name": event.action,
                    "cat": event.kind,
                    "ph": "X",
                    "ts": event.start * 1e6,
                    "dur": event.seconds * 1e6,
                    "pid": pid,
                    "tid": event.rank,
                    "args": {} if event.microbatch is None else {"mb": event.microbatch},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def from_chrome(traces: Mapping[Rank, str], step: int | None = None, title: str = "measured") -> Timeline:
    """The timeline of one step from the traces that ranks wrote (rank to JSON text).

    ``step`` None takes the last step that every rank has. The ranks of one machine share a clock; the timeline starts
    with the step's first event. Raises ValueError where a trace cannot be read or no step is common to all.
    """
    rows: dict[Rank, dict[int, list[Span]]] = {}
    for rank, text in traces.items():
        steps = rows.setdefault(rank, {})
        try:
            for item in json.loads(text)["traceEvents"]:
                if item.get("ph") != "X":
                    continue
                args = item.get("args", {})
                microbatch = int(args.get("mb", -1))
                start, length = float(item["ts"]) * 1e-6, float(item["dur"]) * 1e-6
                name, place = str(item["name"]), microbatch if microbatch >= 0 else None
                event = Span(rank, name, kind_of(name), start, start + length, place)
                steps.setdefault(int(args.get("step", 0)), []).append(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the trace of rank {rank} is not a Chrome trace: {error}") from error
    common = set.intersection(*(set(steps) for steps in rows.values())) if rows else set()
    if step is not None:
        common &= {step}
    if not common:
        raise ValueError(f"no step is in every trace (ranks {sorted(rows)}, step wanted: {step or 'any'})")
    chosen = max(common)
    events = [event for steps in rows.values() for event in steps[chosen]]
    zero = min(event.start for event in events)
    moved = tuple(
        Span(e.rank, e.action, e.kind, e.start - zero, e.end - zero, e.microbatch)
        for e in sorted(events, key=lambda event: (event.rank, event.start))
    )
    return Timeline(moved, max(rows) + 1, f"{title}, step {chosen}")
