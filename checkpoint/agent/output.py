"""What people watch while a run goes: metrics, the end of each rank's output, traces, and this node's status.

All of it is hints under ``runs/<run>/live/``: written by one background thread, safe to lose, bounded in memory. A
store that does not answer costs the oldest lines, never the training. A bug in one kind of hint costs that kind alone:
it is said, and the status goes on, without which the driver would hold this node for silent.

    live/<epoch>/metrics/<10 digits>     JSON lines; a new object each 0.25 s or 64 KiB, in order, never rewritten
    live/<epoch>/logs/<rank>/<2 digits>  a ring of 64 segments a rank: u64le segment number, then up to 64 KiB of
                                         output; segment n lies at n % 64; the newest one is rewritten while it grows
    live/<epoch>/trace/<rank>            Chrome trace of the rank's last steps
    live/nodes/<launch>/<node>           the node's status (``status.py``), on every change and each second
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checkpoint.errors import StoreError
from checkpoint.store import Store

log = logging.getLogger(__name__)

FLUSH_S = 0.25
BEAT_S = 1.0
SEGMENT_BYTES = 64 << 10
RING = 64
_KEPT_METRICS = 4 << 20  # bytes kept while the store does not answer
_TRACE_BYTES = 64 << 20


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
    status: bytes | None


class Hints:
    """The thread that writes the hints. Every method may be called from the agent's loop; none blocks on the store."""

    def __init__(self, store: Store, run: str, status_key: str) -> None:
        self._store, self._live, self._status_key = store, f"runs/{run}/live", status_key
        self._wake = threading.Condition()
        self._epoch = 0
        self._metrics: deque[bytes] = deque()
        self._metrics_bytes = 0
        self._older: deque[_Work] = deque(maxlen=4)
        self._segments: dict[int, int] = {}  # epoch -> next segment; of the thread alone
        self._rings: dict[int, _Ring] = {}
        self._traces: dict[int, Path] = {}
        self._status: bytes | None = None
        self._status_new = False
        self._closing = False
        self._refused = False  # this and _bugs: of the thread alone
        self._bugs: dict[str, str] = {}  # kind of hint -> why it could not be written, until it is again
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
        self._thread.start()

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
            if self._metrics_bytes >= SEGMENT_BYTES:
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
        """The node's status as it is now; written at once."""
        with self._wake:
            self._status, self._status_new = packed, True
            self._wake.notify()

    def close(self) -> None:
        """Write what is left, once, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = 0.0
        while True:
            with self._wake:
                if not self._closing and not self._status_new:
                    self._wake.wait(FLUSH_S)
                closing = self._closing
                due = closing or time.monotonic() - last >= FLUSH_S or self._metrics_bytes >= SEGMENT_BYTES
                work = self._take() if due or self._status_new else None
                older = list(self._older)
                self._older.clear()
            for before in older:
                self._write(before)
            if work is not None:
                self._write(work)
                last = time.monotonic()
            if closing:
                return

    def _take(self) -> _Work:
        """Called under the lock: everything that waits, removed from the queues."""
        metrics = list(self._metrics)
        self._metrics.clear()
        self._metrics_bytes = 0
        traces, self._traces = self._traces, {}
        status = self._status if self._status_new else None
        self._status_new = False
        return _Work(self._epoch, metrics, dict(self._rings), traces, status)

    def _parts(self, work: _Work) -> Iterator[tuple[str, Callable[[], None]]]:
        """What a round writes, each kind by a name for people."""
        if work.metrics:
            yield "metrics", partial(self._write_metrics, work)
        for rank, ring in work.rings.items():
            yield f"output of rank {rank}", partial(self._write_ring, work.epoch, rank, ring)
        for rank, path in work.traces.items():
            yield f"trace of rank {rank}", partial(self._write_trace, work.epoch, rank, path)
        if work.status is not None:
            yield "status", partial(self._store.put, self._status_key, work.status)

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
            self._refused, self.error = True, str(error)
            with self._wake:
                if work.epoch == self._epoch:
                    self._metrics.extendleft(reversed(work.metrics))
                    self._metrics_bytes += sum(map(len, work.metrics))
                    while self._metrics_bytes > _KEPT_METRICS:
                        self._metrics_bytes -= len(self._metrics.popleft())
                for rank, path in work.traces.items():
                    self._traces.setdefault(rank, path)
                self._status_new = self._status_new or (work.status is not None and not self._closing)
                if self._status_new and not self._closing:
                    self._wake.wait(FLUSH_S)  # a store that refuses is not asked in a tight loop
        else:
            if self._refused:
                log.info("the store takes hints again")
            self._refused, self.error = False, next(iter(self._bugs.values()), None)

    def _write_metrics(self, work: _Work) -> None:
        while work.metrics:
            lines, size = 0, 0
            while lines < len(work.metrics) and (not lines or size + len(work.metrics[lines]) <= SEGMENT_BYTES):
                size += len(work.metrics[lines])
                lines += 1
            folder = f"{self._live}/{work.epoch}/metrics/"
            if work.epoch not in self._segments:
                keys = [info.key for info in self._store.list(folder)]  # an agent that was restarted goes on counting
                self._segments[work.epoch] = int(keys[-1].rpartition("/")[2]) + 1 if keys else 0
            self._store.put(f"{folder}{self._segments[work.epoch]:010d}", b"".join(work.metrics[:lines]))
            self._segments[work.epoch] += 1
            del work.metrics[:lines]

    def _write_ring(self, epoch: int, rank: int, ring: _Ring) -> None:
        folder = f"{self._live}/{epoch}/logs/{rank}/"
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
        self._store.put(f"{self._live}/{epoch}/trace/{rank}", data)
