"""Checkpoint records of a run, as columns of numbers: what is asked of twenty thousand of them is asked of arrays.

A row becomes a `CheckpointInfo` when it is asked for. Rows are in order of record; among a log's valid checkpoints
those of an attempt lie together, because a record of another epoch than the newest attempt's is void.
"""

from __future__ import annotations

import math
import operator
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, overload

from checkpoint import codec, keys
from checkpoint.errors import Damaged
from checkpoint.log.records import CheckpointInfo

# column -> least value; the most is what 8 bytes hold
_NUMBERS = {"n": 1, "epoch": 0, "step": 0, "bytes": 1, "parts": 1, "data_position": 0}
MOST_PARTS = 1 << 20


class _Rows(Sequence[CheckpointInfo]):
    """Equal to any sequence of the same checkpoints."""

    @overload
    def __getitem__(self, index: int) -> CheckpointInfo: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[CheckpointInfo, ...]: ...

    def __getitem__(self, index: int | slice) -> CheckpointInfo | tuple[CheckpointInfo, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._row(range(len(self))[index])

    def _row(self, index: int) -> CheckpointInfo:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self))


class Points(_Rows):
    """Rows in order of record. A value once it is in a `RunState`: only a fold that made a copy adds to it."""

    __slots__ = ("bytes", "data_position", "digests", "epoch", "n", "names", "parts", "step", "time")

    def __init__(self, infos: Iterable[CheckpointInfo] = ()) -> None:
        self.n, self.epoch, self.step = array("q"), array("q"), array("q")
        self.bytes, self.parts, self.data_position = array("q"), array("q"), array("q")
        self.time = array("d")
        self.digests = bytearray()  # of each row the manifest's SHA-256 and the state digest
        self.names: dict[int, str] = {}  # row -> name of its manifest, where it is not the usual one
        for info in infos:
            self.add(info)

    def add(self, info: CheckpointInfo) -> None:
        """One more row at the end. For whoever made this object, before anybody else has it."""
        if info.manifest != keys.manifest_name(info.step, info.epoch):
            self.names[len(self.n)] = info.manifest
        for name in _NUMBERS:
            getattr(self, name).append(getattr(info, name))
        self.time.append(info.time)
        self.digests += bytes.fromhex(info.sha256 + info.state_digest)

    def upto(self, n: int) -> Points:
        """A copy of the rows of records up to ``n``."""
        return self._cut(0, bisect_right(self.n, n))

    def after(self, n: int) -> Points:
        """A copy of the rows of records after ``n``."""
        return self._cut(bisect_right(self.n, n), len(self))

    def copy(self) -> Points:
        return self._cut(0, len(self))

    def _cut(self, low: int, high: int) -> Points:
        out = Points()
        for name in (*_NUMBERS, "time"):
            setattr(out, name, getattr(self, name)[low:high])
        out.digests = self.digests[64 * low : 64 * high]
        out.names = {row - low: name for row, name in self.names.items() if low <= row < high}
        return out

    def extend(self, other: Points) -> None:
        """The other's rows at the end; as `add`."""
        self.names |= {row + len(self): name for row, name in other.names.items()}
        for name in (*_NUMBERS, "time", "digests"):
            getattr(self, name).extend(getattr(other, name))

    # --- looking ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.n)

    def _row(self, index: int) -> CheckpointInfo:
        digests = bytes(self.digests[64 * index : 64 * index + 64]).hex()
        step, epoch = self.step[index], self.epoch[index]
        return CheckpointInfo(
            n=self.n[index],
            epoch=epoch,
            time=self.time[index],
            step=step,
            manifest=self.names.get(index) or keys.manifest_name(step, epoch),
            bytes=self.bytes[index],
            sha256=digests[:64],
            state_digest=digests[64:],
            parts=self.parts[index],
            data_position=self.data_position[index],
        )

    def row_of(self, n: int) -> int | None:
        """The row of this record's number."""
        at = bisect_left(self.n, n)
        return at if at < len(self.n) and self.n[at] == n else None

    def rows_of(self, epoch: int) -> range:
        """The rows of an attempt. For valid checkpoints alone."""
        return range(bisect_left(self.epoch, epoch), bisect_right(self.epoch, epoch))

    def steps_of(self, epoch: int) -> Sequence[int]:
        """The steps that an attempt saved, in order of record. For valid checkpoints alone."""
        rows = self.rows_of(epoch)
        return self.step[rows.start : rows.stop]

    def row_at(self, step: int, epoch: int) -> int | None:
        """The row of this step of an attempt. For valid checkpoints alone."""
        rows = self.rows_of(epoch)
        try:
            return self.step.index(step, rows.start, rows.stop)
        except ValueError:
            return None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Points):
            return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)
        return super().__eq__(other)

    __hash__ = None

    # --- bytes --------------------------------------------------------------------------------------------

    def to_map(self) -> dict[str, Any]:
        """Columns as bytes: signed numbers and float64 of 8 bytes, little endian, and 64 bytes of digests a row."""
        out: dict[str, Any] = {name: _little(getattr(self, name)) for name in (*_NUMBERS, "time")}
        return {**out, "digests": bytes(self.digests), "names": [[row, name] for row, name in self.names.items()]}

    @classmethod
    def parse(cls, value: Any, what: str, after: int, most: int, *, grouped: bool) -> Points:
        """The rows of this map, whose records are numbered ``after`` + 1 to ``most``; Damaged for anything else.

        ``grouped``: those of an attempt lie together, attempts in order.
        """
        f, out = codec.Fields(value, what), cls()
        for name in (*_NUMBERS, "time"):
            column = getattr(out, name)
            raw = f.raw(name)
            if len(raw) % 8:
                raise Damaged(f"{what}: {name!r} is not whole numbers of 8 bytes")
            column.frombytes(raw)
            if sys.byteorder == "big":
                column.byteswap()
        out.digests = bytearray(f.raw("digests", 64 * len(out.n)))
        for name in (*_NUMBERS, "time"):
            if len(getattr(out, name)) != len(out.n):
                raise Damaged(f"{what}: {name!r} has another length than 'n'")
        for row in f.array("names", len(out.n)):
            if not (isinstance(row, list) and len(row) == 2 and type(row[0]) is int and isinstance(row[1], str)):
                raise Damaged(f"{what}: a name is not a row's number and a text")
            if not 0 <= row[0] < len(out.n):
                raise Damaged(f"{what}: a name of row {row[0]} of {len(out.n)}")
            out.names[row[0]] = keys.check_relative(row[1], "manifests", what)
        f.done()
        for name, least in _NUMBERS.items():
            if out.n and min(getattr(out, name)) < least:
                raise Damaged(f"{what}: {name!r} is below {least}")
        in_order = all(map(operator.lt, out.n, islice(out.n, 1, None)))
        together = not grouped or all(map(operator.le, out.epoch, islice(out.epoch, 1, None)))
        if out.n and not (in_order and together and after < out.n[0] and out.n[-1] <= most):
            raise Damaged(f"{what}: records are not in order, or not of {after + 1} to {most}")
        if not all(map(math.isfinite, out.time)) or not all(map(operator.le, out.epoch, out.n)):
            raise Damaged(f"{what}: a time is not finite, or an epoch is above its record's number")
        if out.n and max(out.parts) > MOST_PARTS:
            raise Damaged(f"{what}: a checkpoint of more than {MOST_PARTS} parts")
        return out


def _little(column: array[Any]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


class Line(_Rows):
    """Chosen rows of some checkpoints, in an order of their own."""

    __slots__ = ("points", "rows")

    def __init__(self, points: Points, rows: Sequence[int]) -> None:
        self.points, self.rows = points, rows

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, index: int) -> CheckpointInfo:
        return self.points[self.rows[index]]

    def column(self, name: str) -> list[int]:
        """Of each row, in this order, the number of this name."""
        return list(map(getattr(self.points, name).__getitem__, self.rows))
