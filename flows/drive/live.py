"""What a run says while it lives: metrics, output and node status, read from the store's ``live/`` hints.

Hints may be late, missing or lost; nothing here decides anything. Readers keep their place, so polling is cheap, and
one that starts late sees all that is still kept.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from checkpoint.curve import MAX_BYTES, Curve, Point
from checkpoint.errors import Damaged, NotFound
from checkpoint.evaluated import MAX_BYTES as MAX_EVALUATED_BYTES
from checkpoint.evaluated import Evaluations
from checkpoint.keys import curve_key, evaluated_key, metrics_prefix, output_prefix, segment_key, status_key
from checkpoint.store import Store
from flows.drive.hints import node_status
from flows.drive.views import NodeView

log = logging.getLogger(__name__)

STATUS_CAP = 1 << 20
SEGMENT_CAP = 1 << 20
ATTACH_SEGMENTS = 2


@dataclass
class MetricsReader:
    """Step lines of a run, in the order of their epochs: ``poll()`` gives what is new since the last call.

    ``attach``: begin where the run is, with the newest lines alone, in a handful of requests however long it has been
    going on. Else everything that is kept is read. Once the newest attempt has lines, a store whose requests cost is
    asked for more at most twice for each time that they are written.
    """

    store: Store
    run: str
    attach: bool = False
    clock: Callable[[], float] = time.monotonic
    _places: dict[int, str] = field(default_factory=dict)
    _asked: float = -math.inf

    def poll(self, epochs: Iterator[int] | list[int], *, last: bool = False) -> list[dict[str, Any]]:
        """New lines of the given attempts, oldest first; damaged ones are left out (they are hints). ``last``: nobody
        will ask again.
        """
        lines: list[dict[str, Any]] = []
        known = list(epochs)
        now = self.clock()
        if not last and known and known[-1] in self._places and now - self._asked < self.store.pace.hint_s / 2:
            return []
        self._asked = now
        attaching, self.attach = self.attach, False
        if attaching:
            lines += self._attach(known)
        for epoch in known:
            if epoch in self._places and not attaching:
                lines += self._following(epoch)
                continue
            new = [info.key for info in self.store.list(metrics_prefix(self.run, epoch), self._places.get(epoch, ""))]
            for key in new[-ATTACH_SEGMENTS:] if attaching else new:
                self._places[epoch] = key
                lines += read_segment(self.store, key) or []
        return lines

    def _following(self, epoch: int) -> list[dict[str, Any]]:
        """What came behind the last object: its numbers are dense. A folder of a million names is not listed again."""
        lines: list[dict[str, Any]] = []
        while True:
            key = segment_key(self.run, epoch, _number(self._places[epoch]) + 1)
            found = read_segment(self.store, key)
            if found is None:
                return lines
            self._places[epoch] = key
            lines += found

    def _attach(self, epochs: list[int]) -> list[dict[str, Any]]:
        """Places at the end of each attempt, and its newest line as far as the index has it."""
        index = load_curve(self.store, self.run)
        lines = []
        for epoch in epochs:
            row = index.rows.get(epoch) if index is not None else None
            if row is not None:
                self._places[epoch] = segment_key(self.run, epoch, row.next - 1)
                lines.append(row.last.line())
            elif index is None or epoch < index.began:
                newest = newest_segment(self.store, self.run, epoch)
                if newest >= ATTACH_SEGMENTS:
                    self._places[epoch] = segment_key(self.run, epoch, newest - ATTACH_SEGMENTS)
        return lines


def newest_segment(store: Store, run: str, epoch: int) -> int:
    """Number of an attempt's newest object of metrics, by looking at names: they are dense. -1 where there is none."""

    def there(n: int) -> bool:
        return store.head(segment_key(run, epoch, n)) is not None

    low, high = -1, 0
    while there(high):
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if there(middle) else (low, middle)
    return low


def read_segment(store: Store, key: str) -> list[dict[str, Any]] | None:
    """The lines of one object of metrics; empty where it does not hold, None where there is none."""
    try:
        data = store.get(key, max_bytes=SEGMENT_CAP)
    except NotFound:
        return None
    except Damaged:
        return []
    lines = []
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def load_curve(store: Store, run: str) -> Curve | None:
    """The index of a run's metrics; None where there is none (an old run), or it does not hold."""
    try:
        return Curve.parse(store.get(curve_key(run), max_bytes=MAX_BYTES))
    except (NotFound, Damaged) as error:
        log.debug("run %s has no index of metrics: %s", run, error)
        return None


def load_evaluations(store: Store, run: str) -> Evaluations:
    """What the store has of a run; nothing where there is none, or it does not hold."""
    try:
        return Evaluations.parse(store.get(evaluated_key(run), max_bytes=MAX_EVALUATED_BYTES))
    except (NotFound, Damaged):
        return Evaluations()


def read_curve(store: Store, run: str, epochs: list[int], *, whole: bool = True, tails: int = 2) -> Curve:
    """The run's curve: the index, and what the newest ``tails`` attempts have said since it was written.

    ``whole``: also what an older version left without an index, object by object.
    """
    curve = load_curve(store, run) or Curve()
    old = [e for e in epochs if e not in curve.rows and (not curve.began or e < curve.began)] if whole else []
    more = Curve(curve.began)
    for epoch in epochs:
        row = curve.rows.get(epoch)
        end = row.next if row is not None else 0
        wanted: list[str] = []
        if row is not None and whole:
            wanted = [segment_key(run, epoch, n) for n in range(row.since)]
        behind = row is not None or 0 < curve.began <= epoch  # only what was said since the index was written
        if epoch in old or (behind and epoch in epochs[-tails:]):
            after = segment_key(run, epoch, end - 1) if end else ""
            wanted += [info.key for info in store.list(metrics_prefix(run, epoch), after)]
        for key in wanted:
            for line in read_segment(store, key) or ():
                more.add(line, _number(key))
    more.merge(curve)
    return more


def on_line(points: Mapping[int, Point], back: Sequence[tuple[int, int]]) -> dict[int, Point]:
    """Without the points that older attempts left behind a step that an order went back to. ``back``: (epoch, step) of
    the attempts that it sent there.
    """
    return {
        step: point
        for step, point in points.items()
        if not any(point.epoch < epoch and step > first for epoch, first in back)
    }


def _number(key: str) -> int:
    name = key.rpartition("/")[2]
    return int(name) if name.isdigit() else 0


def read_output(store: Store, run: str, epoch: int, rank: int) -> bytes:
    """The kept end (at most 4 MiB) of a rank's output in an attempt, oldest byte first; empty where none is kept."""
    segments: dict[int, bytes] = {}
    for info in store.list(output_prefix(run, epoch, rank)):
        try:
            data = store.get(info.key, max_bytes=SEGMENT_CAP)
        except NotFound:
            continue
        if len(data) >= 8:
            segments[int.from_bytes(data[:8], "little")] = data[8:]
    return b"".join(segments[n] for n in sorted(segments))


@dataclass
class OutputFollower:
    """``logs -f``: bytes of a rank's output that were not seen before. Of the 64 objects a look reads those that were
    written since the last one, as the listing says.
    """

    store: Store
    run: str
    epoch: int
    rank: int
    _seen: dict[int, int] = field(default_factory=dict)
    _read: dict[str, tuple[int, float | None]] = field(default_factory=dict)  # as they were listed when they were read

    def poll(self) -> bytes:
        """What came since the last call, in order."""
        fresh: dict[int, bytes] = {}
        for info in self.store.list(output_prefix(self.run, self.epoch, self.rank)):
            listed = info.bytes, info.modified
            if info.modified is not None and self._read.get(info.key) == listed:
                continue
            try:
                data = self.store.get(info.key, max_bytes=SEGMENT_CAP)
            except NotFound:
                continue
            self._read[info.key] = listed
            if len(data) < 8:
                continue
            number = int.from_bytes(data[:8], "little")
            seen = self._seen.get(number, 0)
            if len(data) - 8 > seen:
                fresh[number] = data[8 + seen :]
                self._seen[number] = len(data) - 8
        return b"".join(fresh[n] for n in sorted(fresh))


@dataclass
class StatusReader:
    """Node status hints as the driver's views. Heartbeats are aged by this process's own monotonic clock, and from when
    the next one was due: a status without news is not written each second where a store's requests cost.
    """

    store: Store
    run: str
    launch: str
    clock: Callable[[], float] = time.monotonic
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _steps: dict[int, tuple[tuple[int, tuple[int, ...]], float]] = field(default_factory=dict)

    def poll(self, nodes: int, alive: Mapping[int, bool | None]) -> list[NodeView]:
        """One view a node; a node that has said nothing yet has phase ``none``."""
        return [self._one(node, alive.get(node)) for node in range(nodes)]

    def _one(self, node: int, alive: bool | None) -> NodeView:
        now = self.clock()
        try:
            data = self.store.get(status_key(self.run, self.launch, node), max_bytes=STATUS_CAP)
        except (NotFound, Damaged):
            return NodeView(node, alive)
        found = node_status(node, data)
        if found is None:  # a hint that does not hold: unknown, never failure
            log.debug("status of node %d is not readable", node)
            return NodeView(node, alive)
        view, beat = found
        if self._beats.get(node, (None, 0.0))[0] != beat:
            self._beats[node] = (beat, now)
        place = (view.epoch, tuple(r.step for r in view.ranks))
        if self._steps.get(node, (None, 0.0))[0] != place:
            self._steps[node] = (place, now)
        due = now - self.store.pace.beat_s
        age_s, step_age_s = max(0.0, due - self._beats[node][1]), max(0.0, due - self._steps[node][1])
        return replace(view, alive=alive, age_s=age_s, step_age_s=step_age_s)
