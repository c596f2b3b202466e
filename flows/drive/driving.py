"""Who drives a run, as its drivers tell it: ``runs/<run>/live/drivers/<token>``, a hint a driver.

Nothing is safe because of it: two drivers beside each other are harmless (who loses a log record decides again). It
says which runs want a driver: those whose drivers' processes are gone, or were not heard for `SILENT_S`, unless a
person's last word was to stop. Nobody's clock is compared with another's: a process of this machine is looked for by
its number and start time; of another one its beats count, by the looker's own monotonic clock.

msgpack map, written every `BEAT_S`, and when its driver leaves in order:

    v                       1
    host, boot, space       the machine, its boot, its space of process numbers (checkpoint/claims.py)
    pid, started            the process, and when it began, which no later process of that number shares
    out                     the folder that it works in, and
    at                      Unix seconds, for people and between words of drivers that left at one record of the log
    seq                     counts up with every write
    n                       records of the log that it knew
    left                    how it left in order: stopped (a person wants no more of it now), detached, failed, or the
                            run's outcome; "" while it drives
    api, flow_run           its page: the Prefect server and the flow run; "" where it has none
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from checkpoint import codec, keys
from checkpoint.claims import of_this_machine, process_space, seen_from_here
from checkpoint.errors import Damaged, NotFound, StoreError, StoreFull
from checkpoint.store import Store
from trainer.local_launch import ProcessMark
from trainer.wire.boot import boot_id

VERSION = 1
MAX_BYTES = 16 << 10
BEAT_S = 3.0
SILENT_S = 10.0
"""Without a beat of a driver that is not a process of this machine, it is gone. With a look of the reconciler in
between that is less than the 15 s within which a run is taken over.
"""
LEAVE_S = 1.0
STOPPED = "stopped"
_TEXTS = ("host", "boot", "space", "out", "left", "api", "flow_run")
_NUMBERS = ("pid", "started", "seq", "n")


@dataclass(frozen=True)
class DriverNote:
    """What a driver said last. ``token`` names it among the run's drivers."""

    token: str
    host: str
    boot: str
    space: str
    pid: int
    started: int
    out: str
    at: float = 0.0
    seq: int = 0
    n: int = 0
    left: str = ""
    api: str = ""
    flow_run: str = ""

    @classmethod
    def of_process(cls, out: Path, pid: int | None = None) -> DriverNote:
        """The first word of a driver in this process, or in another one of this machine."""
        pid = os.getpid() if pid is None else pid
        mark = ProcessMark.of(pid) or ProcessMark(pid, 0)
        folder = os.fsencode(out.absolute()).decode(errors="replace")
        return cls(
            secrets.token_hex(8), socket.gethostname(), boot_id(), process_space(), mark.pid, mark.started, folder
        )

    @property
    def mark(self) -> str:
        """Which process of which machine it is, as a word for others to keep."""
        return f"hotstage {self.host} {self.boot} {self.space} {self.pid} {self.started}"

    @classmethod
    def of_mark(cls, mark: str) -> DriverNote | None:
        """Who that is; None where it is no such word."""
        words = mark.split(" ")
        if len(words) != 6 or words[0] != "hotstage" or not (words[4].isdecimal() and words[5].isdecimal()):
            return None
        return cls("", words[1], words[2], words[3], int(words[4][:18]), int(words[5][:18]), "")

    @property
    def here(self) -> bool:
        """Whether its process would be seen from this one."""
        return seen_from_here(self.boot, self.space)

    @property
    def same_machine(self) -> bool:
        """Whether it was on this machine by name, maybe before its last boot."""
        return of_this_machine(self.host, self.boot, self.space)

    @property
    def runs(self) -> bool:
        """Whether its process lives; asked of a driver that is ``here``."""
        return ProcessMark(self.pid, self.started).alive()

    def describe(self) -> str:
        return f"process {self.pid} on {self.host}"

    def to_bytes(self) -> bytes:
        value = {name: getattr(self, name) for name in (*_TEXTS, *_NUMBERS, "at")}
        return codec.pack_hint({"v": VERSION, **value})

    @classmethod
    def parse(cls, token: str, data: bytes) -> DriverNote | None:
        """None where it does not hold, or is of a newer version: a hint."""
        try:
            value: Any = codec.unpack_hint(data, "a driver's hint", max_bytes=MAX_BYTES)
        except Damaged:
            return None
        if not isinstance(value, dict) or value.get("v") != VERSION:
            return None
        texts, numbers, at = [value.get(k) for k in _TEXTS], [value.get(k) for k in _NUMBERS], value.get("at")
        if not all(isinstance(t, str) for t in texts) or not isinstance(at, float):
            return None
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 62 for i in numbers):
            return None
        more = dict(zip((*_TEXTS, *_NUMBERS), (*texts, *numbers), strict=True))
        return cls(token, at=at, **cast(dict[str, Any], more))


@dataclass
class Driving:
    """The word of one driver, for as long as it drives. A store that does not take it is no trouble."""

    store: Store
    run: str
    out: Path
    page: Callable[[], tuple[str, str]] = lambda: ("", "")
    """Its page on Prefect: the server's API and the flow run, as soon as there is one."""
    clock: Callable[[], float] = time.monotonic
    told: DriverNote = field(init=False)
    full: str = ""
    """Why its last word was not taken, where the store has no room: what others have to say comes from nobody then."""
    _at: float | None = None
    _first: int | None = None  # how many records it knew at its first beat
    _began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.told = DriverNote.of_process(self.out)

    def stopped_beside(self, epoch: int) -> DriverNote | None:
        """Another driver that a person stopped in this attempt, since this one began: it knew more records of the log,
        or as many and a later time.
        """
        first = (self._first or 0, self._began)
        others = (told for told in Ears(self.store, self.run).known() if told.token != self.told.token)
        return next(
            (told for told in others if told.left == STOPPED and told.n >= epoch and (told.n, told.at) >= first), None
        )

    def beat(self, n: int) -> None:
        """It drives, and knows so many records of the log. Written at most every `BEAT_S`, a new page at once."""
        now, (api, flow_run) = self.clock(), self.page()
        self._first = n if self._first is None else self._first
        if self._at is not None and now - self._at < BEAT_S and flow_run == self.told.flow_run:
            return
        self._at = now
        self._write(replace(self.told, n=n, api=api, flow_run=flow_run))

    def leave(self, how: str, n: int | None = None) -> None:
        """It drives no more, and knew so many records of the log (None: as many as it told); the first word stays.
        Nobody waits long for a store that does not answer.
        """
        if not self.told.left:
            told = replace(self.told, left=how[:40], n=self.told.n if n is None else n)
            last = threading.Thread(target=self._write, args=[told], daemon=True)
            last.start()
            last.join(LEAVE_S)

    def _write(self, told: DriverNote) -> None:
        self.told = replace(told, seq=self.told.seq + 1, at=time.time())
        full = ""
        try:
            self.store.put(keys.driver_key(self.run, self.told.token), self.told.to_bytes())
        except StoreFull as error:
            full = str(error)
        except StoreError:
            pass
        self.full = full


@dataclass(frozen=True)
class Word:
    """What is known of a run's drivers: ``driven``, one lives; ``stopped``, a person's last word was to stop it;
    ``gone``, those that died without a word; ``newest``, who spoke last.
    """

    driven: bool = False
    stopped: bool = False
    gone: tuple[DriverNote, ...] = ()
    newest: DriverNote | None = None


@dataclass
class Ears:
    """Listens to the drivers of one run, for as long as it is open. A look is one request, and one more for each driver
    that has not left.
    """

    store: Store
    run: str
    clock: Callable[[], float] = time.monotonic
    _left: dict[str, DriverNote | None] = field(default_factory=dict)  # tokens that will not speak any more
    _heard: dict[str, tuple[int, float]] = field(default_factory=dict)  # token -> beat, and since when it is that one

    def listen(self) -> Word:
        """Raises StoreUnavailable."""
        known = self.known()
        alive = [told for told in known if not told.left and self._lives(told)]
        newest = max(known, key=lambda t: (t.n, t.at), default=None)
        gone = tuple(t for t in known if not t.left and t not in alive)
        stopped = newest is not None and newest.left == STOPPED
        return Word(bool(alive), stopped, gone, newest)

    def known(self) -> list[DriverNote]:
        """What each driver said last."""
        prefix, found = keys.drivers_prefix(self.run), []
        for token in [info.key.removeprefix(prefix) for info in self.store.list(prefix)]:
            told = self._left[token] if token in self._left else self._read(token)
            if told is None or told.left:
                self._left[token] = told
            if told is not None:
                found.append(told)
        return found

    def _read(self, token: str) -> DriverNote | None:
        try:
            return DriverNote.parse(token, self.store.get(keys.driver_key(self.run, token), max_bytes=MAX_BYTES))
        except (NotFound, Damaged):
            return None

    def _lives(self, told: DriverNote) -> bool:
        if told.here:
            return told.runs
        now = self.clock()
        beat, since = self._heard.get(told.token, (-1, now))
        if beat != told.seq:
            since = now
        self._heard[told.token] = (told.seq, since)
        return now - since < SILENT_S


def gone_words(gone: Sequence[DriverNote]) -> str:
    """For people."""
    return ", ".join(told.describe() for told in gone[:3]) or "nobody"
