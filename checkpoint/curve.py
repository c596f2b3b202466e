"""The index of a run's metrics: its curve in a bounded number of points, and where each attempt's lines lie.

    runs/<run>/live/curve     one object for all attempts, written again every few seconds while lines come

Metrics are many small objects (``agent/output.py``). Whoever comes later reads this one instead: a point a step up to
1,024 of them, then of every second step, every fourth and so on; and for each attempt its first and last step, and
which of its objects are in here. Like all of ``live/`` it is a hint: it may be behind, or missing in an old run.

Agents of two attempts may write it at once: each reads what is there and joins it with its own (``merge``), so what one
loses to the other comes back with the next write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from checkpoint import codec
from checkpoint.errors import Damaged

VERSION = 1
MAX_POINTS = 1024
MAX_ROWS = 4096
MAX_BYTES = 4 << 20


class Point(NamedTuple):
    """A step, as its line said it."""

    step: int
    epoch: int
    time: float
    loss: float
    grad_norm: float
    tokens_per_s: float
    step_us: float

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Point | None:
        """The point of a metrics line; None where it is no step's."""
        if line.get("event") != "step":
            return None
        try:
            rest = (float(line.get(name) or 0.0) for name in cls._fields[2:])
            return cls(int(line["step"]), int(line["epoch"]), *rest)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def line(self) -> dict[str, Any]:
        """As a metrics line, as far as it is kept."""
        return {"event": "step", **self._asdict()}


class AttemptRow(NamedTuple):
    """An attempt: the points of its first and last step, and its objects from ``since`` to before ``next`` in here."""

    first: Point
    last: Point
    since: int
    next: int


@dataclass
class Curve:
    """``began``: the attempt whose agent wrote the first index of this run; what is older may have lines that are not
    in here.
    """

    began: int = 0
    stride: int = 1
    points: dict[int, Point] = field(default_factory=dict)
    rows: dict[int, AttemptRow] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any], segment: int) -> None:
        """A line of this object of its attempt."""
        point = Point.of(line)
        if point is None:
            return
        self.began = self.began or point.epoch
        self._point(point)
        row = self.rows.get(point.epoch)
        self.rows[point.epoch] = (
            AttemptRow(point, point, segment, segment + 1)
            if row is None
            else row._replace(last=point, next=segment + 1)
        )
        self._thin()

    def merge(self, other: Curve) -> None:
        """Take what ``other`` has: of a step the newer attempt's point, of an attempt the first and last of both."""
        self.began = min(filter(None, (self.began, other.began)), default=0)
        if other.stride > self.stride:
            self._restride(other.stride)
        for point in other.points.values():
            self._point(point, equal=False)
        for epoch, row in other.rows.items():
            mine = self.rows.get(epoch, row)
            self.rows[epoch] = AttemptRow(
                min(mine.first, row.first, key=lambda p: p.step),
                max(mine.last, row.last, key=lambda p: p.step),
                min(mine.since, row.since),
                max(mine.next, row.next),
            )
        self._thin()

    def curve(self) -> dict[int, Point]:
        """The points by step, with the last one of each attempt."""
        found = dict(self.points)
        for row in self.rows.values():
            if row.last.step not in found or found[row.last.step].epoch <= row.last.epoch:
                found[row.last.step] = row.last
        return dict(sorted(found.items()))

    def to_bytes(self) -> bytes:
        rows = [[list(r.first), list(r.last), r.since, r.next] for r in self.rows.values()]
        points = [list(p) for p in self.points.values()]
        value = {"v": VERSION, "began": self.began, "stride": self.stride, "rows": rows, "points": points}
        return codec.pack_hint(value)

    @classmethod
    def parse(cls, raw: bytes) -> Curve:
        """Damaged for anything that is not one of this version: then it is as good as missing."""
        value = codec.unpack_hint(raw, "the index of metrics", max_bytes=MAX_BYTES)
        try:
            if value["v"] != VERSION:
                raise Damaged(f"the index of metrics has version {value['v']!r}, this program reads {VERSION}")
            points = [_point(p) for p in value["points"]]
            rows = [AttemptRow(_point(a), _point(b), int(since), int(after)) for a, b, since, after in value["rows"]]
            made = cls(int(value["began"]), int(value["stride"]))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise Damaged(f"the index of metrics is damaged: {error!r}") from error
        if made.stride < 1 or len(points) > MAX_POINTS or len(rows) > MAX_ROWS:
            raise Damaged("the index of metrics is damaged: it has more points or attempts than it may")
        made.points = {p.step: p for p in points}
        made.rows = {r.last.epoch: r for r in rows}
        return made

    def _point(self, point: Point, *, equal: bool = True) -> None:
        """Where it falls on the stride, and no newer attempt (nor this one, unless ``equal``) has that step."""
        there = self.points.get(point.step)
        wins = there is None or there.epoch < point.epoch or (equal and there.epoch == point.epoch)
        if point.step % self.stride == 0 and wins:
            self.points[point.step] = point

    def _thin(self) -> None:
        while len(self.points) > MAX_POINTS:
            self._restride(self.stride * 2)
        if len(self.rows) > MAX_ROWS:
            self.rows = dict(sorted(self.rows.items())[-MAX_ROWS:])

    def _restride(self, stride: int) -> None:
        self.stride = stride
        self.points = {step: p for step, p in self.points.items() if step % stride == 0}


def _point(value: Any) -> Point:
    step, epoch, *rest = value
    return Point(int(step), int(epoch), *(float(x) for x in rest))
