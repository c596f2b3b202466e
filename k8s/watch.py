"""What is in the cluster now: list, then watch, kept for readers who never wait. ``WatchMachine`` is pure.

Invariants
  W1  No hot loop: every failure, and every stream that ends at once, waits before the next request, doubling
      with jitter up to ``backoff_max_s`` (after a 410, whose answer is a whole list, fourfold); the count starts again
      only after a stream that held for ``stable_s``.
  W2  A stream is never trusted alone: the whole is listed anew each ``relist_s``, and after a 410.
  W3  A half-open connection is noticed: the server ends a stream after ``watch_s``, the socket after ``idle_s``.
  W4  "Does not answer" is unknown: what was known stays, ``failing_s`` says for how long nobody has answered.
  W5  A sight is made anew only where something changed (``changes`` counts): readers that ask often cost nothing.
  W6  Objects that vanished are remembered (``gone``, the last sight of each), so that an exit code outlives its pod.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from k8s.api import Json, Resource
from k8s.errors import ApiUnavailable, Expired
from trainer.errors import LaunchError, LaunchRefused

log = logging.getLogger(__name__)

T = TypeVar("T")
PAGE = 500
GONE_MOST = 8192


@dataclass(frozen=True)
class WatchPace:
    """Times of a watcher, in seconds."""

    watch_s: float = 50.0
    idle_s: float = 75.0
    relist_s: float = 300.0
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    stable_s: float = 5.0


PACE = WatchPace()


@dataclass(frozen=True)
class List:
    """List everything."""


@dataclass(frozen=True)
class WatchRequest:
    """Watch from ``version`` for ``timeout_s``."""

    version: str
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """Do nothing for ``seconds``."""

    seconds: float


@dataclass
class WatchMachine:
    """When to list, watch and wait. Pure: times come in, actions go out.

    Example::

        machine = WatchMachine(WatchPace(), random.Random(1))
        machine.next(0.0)                  # List()
        machine.listed(0.1, "41")
        machine.next(0.1)                  # WatchRequest(version="41", timeout_s=50.0)
    """

    pace: WatchPace
    rng: random.Random
    version: str | None = None
    failures: int = 0
    failing_since: float | None = None
    synced: bool = False
    _not_before: float = 0.0
    _relist_at: float = 0.0
    _opened: float | None = None

    def next(self, now: float) -> List | WatchRequest | Wait:
        if now < self._not_before:
            return Wait(self._not_before - now)
        if self.version is None or now >= self._relist_at:
            return List()
        return WatchRequest(self.version, max(1.0, min(self.pace.watch_s, self._relist_at - now)))

    def listed(self, now: float, version: str) -> None:
        """A list was answered. Does not end a backoff: a server that lists and refuses to watch is not well (W1)."""
        self.version, self.synced, self.failing_since, self._opened = version, True, None, None
        # jitter, so that a thousand drivers do not list together
        self._relist_at = now + self.pace.relist_s * self.rng.uniform(0.9, 1.1)

    def opened(self, now: float) -> None:
        """A watch was asked for."""
        self._opened = now

    def seen(self, now: float, version: str | None) -> None:
        """An event or a bookmark came."""
        if version:
            self.version = version
        self.failing_since = None

    def closed(self, now: float) -> None:
        """The server ended a stream without an error."""
        self.failing_since = None
        if self._held(now):
            self.failures = 0
        else:
            self._back_off(now, None)
        self._opened = None

    def failed(self, now: float, error: LaunchError) -> None:
        """A list or a watch failed, or its stream broke."""
        if self._held(now):
            self.failures = 0
        if isinstance(error, Expired):  # it answers, and only a new list is due
            self.version, self.failing_since = None, None
        elif self.failing_since is None:
            self.failing_since = now
        at_least_s = error.retry_after_s if isinstance(error, ApiUnavailable) else None
        self._back_off(now, at_least_s, growth=4.0 if isinstance(error, Expired) else 2.0)
        self._opened = None

    def _held(self, now: float) -> bool:
        return self._opened is not None and now - self._opened >= self.pace.stable_s

    def _back_off(self, now: float, at_least_s: float | None, growth: float = 2.0) -> None:
        self.failures += 1
        pause = min(self.pace.backoff_max_s, self.pace.backoff_s * growth ** min(self.failures - 1, 16))
        self._not_before = now + max(at_least_s or 0.0, pause * self.rng.uniform(0.5, 1.0))


class WatchedApi(Protocol):
    """What a watcher needs of ``k8s.api.Api``."""

    def get(self, path: str, query: Mapping[str, str] | None = None, read_s: float = 20.0) -> Json: ...

    def watch(self, path: str, query: Mapping[str, str], timeout_s: int, idle_s: float) -> Iterator[Json]: ...


@dataclass(frozen=True)
class Sight(Generic[T]):
    """What a watcher knows. ``failing_s``: for how long nobody has answered; ``synced``: was anything ever listed;
    ``changes``: the same number, the same objects.
    """

    objects: Mapping[str, T]
    gone: Mapping[str, T]
    synced: bool
    failing_s: float
    error: str = ""
    changes: int = 0


@dataclass
class ObjectWatcher(Generic[T]):
    """Keeps the objects of a kind with a label selector. ``reduce`` turns a raw object into what readers need."""

    source: WatchedApi
    resource: Resource
    namespace: str
    selector: str
    reduce: Callable[[Json], T]
    pace: WatchPace = PACE
    seed: int | None = None
    clock: Callable[[], float] = time.monotonic
    _objects: dict[str, T] = field(default_factory=dict)
    _gone: dict[str, T] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _error: str = ""
    _changes: int = 0
    _copied: tuple[int, dict[str, T], dict[str, T]] = field(default_factory=lambda: (0, {}, {}))
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._machine = WatchMachine(self.pace, random.Random(self.seed))

    def start(self) -> None:
        """Begin to watch, in a daemon thread. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"watch-{self.resource.plural}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The thread leaves at its next event or time-out; nothing more is kept."""
        self._stopped.set()

    def wait_synced(self, timeout_s: float) -> bool:
        """True once anything was listed; False where that is refused, or takes longer."""
        self._answered.wait(timeout_s)
        return self._machine.synced

    def sight(self) -> Sight[T]:
        """A copy of what is known, shared by who asks until something changes; never waits for the network."""
        with self._lock:
            since = self._machine.failing_since
            failing = 0.0 if since is None else max(0.0, self.clock() - since)
            if self._copied[0] != self._changes:
                self._copied = (self._changes, dict(self._objects), dict(self._gone))
            changes, objects, gone = self._copied
            return Sight(objects, gone, self._machine.synced, failing, self._error, changes)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.is_set():
            action = self._machine.next(self.clock())
            try:
                match action:
                    case Wait(seconds):
                        self._stopped.wait(seconds)
                    case List():
                        self._list()
                    case WatchRequest(version, timeout_s):
                        self._watch(version, timeout_s)
            except LaunchError as error:
                self._failed(error)
            except Exception as error:
                # an answer of another form, or a bug: a thread that ended would show what was there for ever (W4)
                text = f"watching {self.resource.plural}: an answer cannot be read: {error!r}"
                if self._error != text:
                    log.exception("watching %s: an answer cannot be read", self.resource.plural)
                self._failed(ApiUnavailable(text))

    def _failed(self, error: LaunchError) -> None:
        with self._lock:
            self._machine.failed(self.clock(), error)
            if self._error != str(error):
                log.info("watching %s: %s", self.resource.plural, error)
            self._error = str(error)
        if isinstance(error, LaunchRefused):
            self._answered.set()

    def _list(self) -> None:
        path, found = self.resource.path(self.namespace), {}
        query = {"labelSelector": self.selector, "limit": str(PAGE)}
        while True:
            page = self.source.get(path, query)
            for item in page.get("items") or ():
                found[item["metadata"]["name"]] = self.reduce(item)
            more = page["metadata"].get("continue")
            if not more:
                break
            query["continue"] = more
        with self._lock:
            for name in self._objects.keys() - found.keys():
                self._bury(name)
            if self._objects != found:
                self._objects, self._changes = found, self._changes + 1
            self._machine.listed(self.clock(), str(page["metadata"].get("resourceVersion", "")))
            self._error = ""
        self._answered.set()

    def _watch(self, version: str, timeout_s: float) -> None:
        self._machine.opened(self.clock())
        query = {"labelSelector": self.selector, "resourceVersion": version}
        path = self.resource.path(self.namespace)
        for event in self.source.watch(path, query, max(1, int(timeout_s)), self.pace.idle_s):
            if self._stopped.is_set():
                return
            self._take(event)
        with self._lock:
            self._machine.closed(self.clock())
            self._error = ""

    def _take(self, event: Json) -> None:
        kind, item = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            text = f"watch of {self.resource.plural}: {item.get('message', 'an error')}"
            raise Expired(text) if item.get("code") == 410 else ApiUnavailable(text)
        meta = item.get("metadata") or {}
        with self._lock:
            if kind in ("ADDED", "MODIFIED"):
                seen = self.reduce(item)
                if self._objects.get(meta["name"]) != seen:
                    self._objects[meta["name"]] = seen
                    self._changes += 1
            elif kind == "DELETED":
                # the last sight has the final statuses
                self._objects[meta["name"]] = self.reduce(item)
                self._bury(meta["name"])
            self._machine.seen(self.clock(), meta.get("resourceVersion"))

    def _bury(self, name: str) -> None:
        self._changes += 1
        self._gone[name] = self._objects.pop(name)
        while len(self._gone) > GONE_MOST:
            del self._gone[next(iter(self._gone))]
