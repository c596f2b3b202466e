"""What people watch while a run goes: metrics, the end of each rank's output, traces, and this node's status.

All of it is hints under ``runs/<run>/live/``: safe to lose, bounded in memory, written by two background threads. One
writes the status alone: it is the node's heartbeat, and must not wait for 64 MiB of a trace. A store that
does not answer costs the oldest lines, never the training. A bug in one kind of hint is said and costs that kind.

Where requests cost (``store.pace``) they are few, whatever the ranks print: the first come as fast as in a folder, and
so do those after the status had news (a rank's end); in the long run metrics are one each ``hint_s``, and so is the
rest, and what waits meanwhile goes together.

    live/<epoch>/metrics/<10 digits>     JSON lines; a new object each 0.25 s or 64 KiB, in order, never rewritten
    live/curve                           their index, of all attempts (``curve.py``); each 5 s while lines come
    live/<epoch>/logs/<rank>/<2 digits>  a ring of 64 segments a rank: u64le segment number, then up to 64 KiB of
                                         output; segment n lies at n % 64; the newest one is rewritten while it grows
    live/<epoch>/trace/<rank>            Chrome trace of the rank's last steps
    live/nodes/<launch>/<node>           the node's status (``status.py``): its news at once, else at the store's pace
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import keys
from checkpoint.agent.beat import FLUSH_S, Allowance, Beat
from checkpoint.agent.status import NodeStatus
from checkpoint.curve import MAX_BYTES as MAX_CURVE_BYTES
from checkpoint.curve import Curve
from checkpoint.errors import Damaged, NotFound, StoreError
from checkpoint.store import Store

log = logging.getLogger(__name__)

BEAT_S = 1.0
CURVE_S = 5.0
CURVE_REQUESTS = 12
"""The index of metrics is two requests; it is written at most each so many times ``hint_s``."""
SEGMENT_BYTES = 64 << 10
RING = 64
_KEPT_METRICS = 4 << 20  # bytes kept while the store does not answer
_TRACE_BYTES = 64 << 20
_CAUGHT_UP = 64  # objects of metrics


@dataclass
class _Ring:
    """A rank's output: segments that the store does not have yet, the last of them still growing."""

    number: int = 0
    based: bool = False  # numbers go on where an agent before this one stopped: known once the store was asked
    waiting: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=RING))
    growing: bytearray = field(default_factory=bytearray)
    dirty: bool = False

    def add(self, data: bytes) -> None:
        while data:
            room = SEGMENT_BYTES - len(self.growing)
            self.growing += data[:room]
            self.dirty = True
            data = data[room:]
            if len(self.growing) == SEGMENT_BYTES:
                self.waiting.append((self.number, bytes(self.growing)))
                self.number += 1
                self.growing.clear()
                self.dirty = False


@dataclass
class _Work:
    """What one round writes."""

    epoch: int
    metrics: list[bytes]
    rings: dict[int, _Ring]
    traces: dict[int, Path]
    last: bool = False
    """Nothing comes after it."""


class Hints:
    """The threads that write the hints. Every method may be called from the agent's loop; none blocks on the store.

    ``clock``: without a thread for all but the status where it is given; then whoever made this calls ``pump``.
    """

    def __init__(self, store: Store, run: str, status_key: str, clock: Callable[[], float] | None = None) -> None:
        self._store, self._run_name = store, run
        self._clock = clock or time.monotonic
        self._beat = Beat(store, status_key)
        self._news: tuple[Any, ...] | None = None
        self._beat_at = -math.inf
        self._for_lines, self._for_output = (Allowance(store.pace.hint_s, self._clock) for _ in range(2))
        self._hurry, self._flushed = False, -math.inf
        self._segment_bytes = SEGMENT_BYTES if store.pace.hint_s == 0 else 8 * SEGMENT_BYTES
        self._wake = threading.Condition()
        self._epoch = 0
        self._metrics: deque[bytes] = deque()
        self._metrics_bytes = 0
        self._older: deque[_Work] = deque(maxlen=4)
        self._segments: dict[int, int] = {}  # epoch -> next segment; this and the curve: of the thread alone
        self._curve: Curve | None = None
        self._curve_new, self._curve_at = False, -math.inf
        self._curve_s = max(CURVE_S, CURVE_REQUESTS * store.pace.hint_s)
        self._rings: dict[int, _Ring] = {}
        self._traces: dict[int, Path] = {}
        self._closing = False
        self._refused = False  # this and _bugs: of the thread alone
        self._bugs: dict[str, str] = {}  # kind of hint -> why it could not be written, until it is again
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True) if clock is None else None
        if self._thread is not None:
            self._thread.start()

    @property
    def error(self) -> str | None:
        """Why something cannot be written now."""
        return self._error or self._beat.error

    def begin(self, epoch: int) -> None:
        """What follows belongs to this attempt. What the one before left is written first, as far as the store lets."""
        with self._wake:
            if epoch == self._epoch:
                return
            self._older.append(self._take())
            self._epoch, self._rings = epoch, {}

    def metrics(self, line: bytes) -> None:
        """One JSON object; the newline is added."""
        with self._wake:
            self._metrics.append(line.rstrip(b"\n") + b"\n")
            self._metrics_bytes += len(line) + 1
            while self._metrics_bytes > _KEPT_METRICS:
                self._metrics_bytes -= len(self._metrics.popleft())
            if self._metrics_bytes >= self._segment_bytes:
                self._wake.notify()

    def output(self, rank: int, data: bytes) -> None:
        """Bytes that a rank wrote to stdout or stderr."""
        with self._wake:
            self._rings.setdefault(rank, _Ring()).add(data)

    def trace(self, rank: int, path: Path) -> None:
        """A trace file that a rank has finished."""
        with self._wake:
            self._traces[rank] = path

    def status(self, packed: bytes) -> None:
        """The node's status as it is now; written at once, whatever else is being written."""
        self._beat.status(packed)

    def beat(self, status: NodeStatus) -> bool:
        """Write the node's status if it has news, or if it is time again; whether it has."""
        news, now = status.news(), self._clock()
        new = news != self._news
        if new or now - self._beat_at >= self._store.pace.beat_s:
            self._news, self._beat_at = news, now
            self.status(status.pack())
        if new:
            with self._wake:  # what ranks said last is wanted as soon as that they have ended
                self._hurry = True
                self._wake.notify()
        return new

    def close(self) -> None:
        """Write what is left, once, and end the threads."""
        deadline = time.monotonic() + 30
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(deadline - time.monotonic())
        self._beat.close(max(1.0, deadline - time.monotonic()))

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                if not self._closing and not self._hurry:
                    self._wake.wait(FLUSH_S)
                closing = self._closing
            self.pump(last=closing)

    def pump(self, *, last: bool = False) -> None:
        """One round of what is due; the ``last`` one writes all."""
        with self._wake:
            now = last or self._hurry
            time_to = self._clock() - self._flushed >= FLUSH_S
            room = self._for_lines.room and (time_to or self._metrics_bytes >= self._segment_bytes)
            lines = now or room or self._metrics_bytes >= _KEPT_METRICS // 4
            output = now or (self._for_output.room and time_to)
            work = self._take(lines=lines, output=output) if lines or output else None
            self._hurry = False
            older = list(self._older)
            self._older.clear()
        for before in older:
            self._write(before)
        if work is not None:
            work.last = last
            self._write(work)
            self._flushed = self._clock()

    def _take(self, *, lines: bool = True, output: bool = True) -> _Work:
        """Called under the lock: what waits, removed from the queues."""
        work = _Work(self._epoch, [], {}, {})
        if lines:
            work.metrics = list(self._metrics)
            self._metrics.clear()
            self._metrics_bytes = 0
        if output:
            work.rings = dict(self._rings)
            work.traces, self._traces = self._traces, {}
        return work

    def _parts(self, work: _Work) -> Iterator[tuple[str, Callable[[], None]]]:
        """What a round writes, each kind by a name for people."""
        if work.metrics:
            yield "metrics", partial(self._write_metrics, work)
        if self._curve_new and (work.last or self._clock() - self._curve_at >= self._curve_s):
            yield "index of metrics", self._write_curve
        for rank, ring in work.rings.items():
            yield f"output of rank {rank}", partial(self._write_ring, work.epoch, rank, ring)
        for rank, path in work.traces.items():
            yield f"trace of rank {rank}", partial(self._write_trace, work.epoch, rank, path)

    def _write(self, work: _Work) -> None:
        try:
            for what, write in self._parts(work):
                try:
                    write()
                    self._bugs.pop(what, None)
                except StoreError:
                    raise
                except Exception as error:
                    # a bug must neither end the heartbeat nor pass unseen: these hints are lost, the others go on
                    text = f"the {what} cannot be written: {error!r}; a bug, see the agent's log"
                    if self._bugs.get(what) != text:
                        log.exception("the %s cannot be written: a bug", what)
                    self._bugs[what] = text
        except StoreError as error:
            if not self._refused:
                log.warning("the store does not take hints: %s", error)
            self._refused, self._error = True, str(error)
            with self._wake:
                if work.epoch == self._epoch:
                    self._metrics.extendleft(reversed(work.metrics))
                    self._metrics_bytes += sum(map(len, work.metrics))
                    while self._metrics_bytes > _KEPT_METRICS:
                        self._metrics_bytes -= len(self._metrics.popleft())
                for rank, path in work.traces.items():
                    self._traces.setdefault(rank, path)
        else:
            if self._refused:
                log.info("the store takes hints again")
            self._refused, self._error = False, next(iter(self._bugs.values()), None)

    def _write_metrics(self, work: _Work) -> None:
        while work.metrics:
            lines, size = 0, 0
            while lines < len(work.metrics) and (not lines or size + len(work.metrics[lines]) <= self._segment_bytes):
                size += len(work.metrics[lines])
                lines += 1
            number = self._next_segment(work.epoch)
            self._for_lines.spend()
            self._store.put(keys.segment_key(self._run_name, work.epoch, number), b"".join(work.metrics[:lines]))
            self._segments[work.epoch] = number + 1
            written = work.metrics[:lines]
            del work.metrics[:lines]
            self._index(written, number)

    def _next_segment(self, epoch: int) -> int:
        """An agent that was restarted goes on counting, from where the index is."""
        if self._curve is None:
            self._curve = self._stored_curve()
        if epoch not in self._segments:
            row = self._curve.rows.get(epoch)
            after = keys.segment_key(self._run_name, epoch, row.next - 1) if row else ""
            prefix = keys.metrics_prefix(self._run_name, epoch)
            found = [info.key for info in self._store.list(prefix, start_after=after)]
            number = row.next if row else 0
            for key in found[-_CAUGHT_UP:]:  # what the agent before this one did not get to index
                number = int(key.rpartition("/")[2]) + 1
                self._index(self._store.get(key, max_bytes=1 << 20).splitlines(), number - 1)
            self._segments[epoch] = number
        return self._segments[epoch]

    def _index(self, written: list[bytes], number: int) -> None:
        assert self._curve is not None
        for line in written:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                self._curve.add(value, number)
                self._curve_new = True

    def _stored_curve(self) -> Curve:
        try:
            return Curve.parse(self._store.get(keys.curve_key(self._run_name), max_bytes=MAX_CURVE_BYTES))
        except (NotFound, Damaged):
            return Curve()

    def _write_curve(self) -> None:
        """What is there joined with ours: an attempt that is over may still be written by its own agent."""
        assert self._curve is not None
        self._curve.merge(self._stored_curve())
        self._for_lines.spend(2)
        self._store.put(keys.curve_key(self._run_name), self._curve.to_bytes())
        self._curve_new, self._curve_at = False, self._clock()

    def _write_ring(self, epoch: int, rank: int, ring: _Ring) -> None:
        folder = keys.output_prefix(self._run_name, epoch, rank)
        if not ring.based:
            base = self._last_number(folder) + 1
            with self._wake:
                ring.waiting = deque(((base + n, data) for n, data in ring.waiting), maxlen=RING)
                ring.number += base
                ring.based = True
        while True:
            with self._wake:
                whole = ring.waiting[0] if ring.waiting else None
                growing = (ring.number, bytes(ring.growing)) if ring.dirty else None
                if whole is None:
                    ring.dirty = False
            segment = whole or growing
            if segment is None:
                return
            number, data = segment
            try:
                self._for_output.spend()
                self._store.put(f"{folder}{number % RING:02d}", struct.pack("<Q", number) + data)
            except BaseException:
                with self._wake:
                    ring.dirty = True
                raise
            if whole is None:
                return
            with self._wake:
                if ring.waiting and ring.waiting[0] is whole:
                    ring.waiting.popleft()

    def _last_number(self, folder: str) -> int:
        newest = -1
        for info in self._store.list(folder):
            head = self._store.get(info.key, first=0, length=8) if info.bytes >= 8 else b""
            newest = max(newest, struct.unpack("<Q", head)[0] if head else -1)
        return newest

    def _write_trace(self, epoch: int, rank: int, path: Path) -> None:
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                data = file.read(_TRACE_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a rank named no path
            log.warning("the trace of rank %d cannot be read: %s", rank, error)
            return
        if len(data) > _TRACE_BYTES:
            log.warning("the trace of rank %d has more than %d bytes and stays at %s", rank, _TRACE_BYTES, path)
            return
        self._for_output.spend()
        self._store.put(keys.trace_key(self._run_name, epoch, rank), data)
