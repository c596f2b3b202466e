"""The store as one process of a world sees it: each request takes time, may be struck, and may land late.

A point is a request by its process, thread, verb and kind of object (``agent upload create chunk``), or an instant in
an engine's life (``engine fill``). What strikes there is a ``Fault``: its process dies before or after the request is
done, or dies while the request is under way and lands later; the answer is lost; the request lands long after its
answer was given up; the store is away from here on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from checkpoint import codec
from checkpoint.errors import StoreUnavailable
from checkpoint.store.base import PAID, Data, Info, fill, ignored
from checkpoint.store.memory import MemoryStore
from tests.support.protocol.hub import Dead, Process

if TYPE_CHECKING:
    from tests.support.protocol.place import Place
    from tests.support.protocol.world import World

WRITES = ("create", "put", "delete")
KILLS = ("before", "after", "late")
"""The process is killed before the request, after it, or while it is under way: it lands when nobody waits for it."""
LOSSES = ("lost answer", "late write", "away")
"""Done, but nobody is told; told to have failed, done later; the store answers nobody for a while, from here on."""

_KINDS = (
    (re.compile(r"/log/"), "record"),
    (re.compile(r"/chunks/"), "chunk"),
    (re.compile(r"/parts/"), "part"),
    (re.compile(r"/groups/"), "group's part"),
    (re.compile(r"/manifests/[^/]+/manifest"), "manifest"),
    (re.compile(r"/manifests/"), "page"),
    (re.compile(r"/live/fold$"), "condensed state"),
    (re.compile(r"/live/nodes/"), "status"),
    (re.compile(r"/live/collected$"), "collected"),
    (re.compile(r"/live/\d+/node/"), "claim"),
    (re.compile(r"/live/\d+/addr"), "address"),
    (re.compile(r"/live/\d+/upload/"), "choice"),
    (re.compile(r"/folds/"), "folded state"),
    (re.compile(r"/spec$"), "spec"),
    (re.compile(r"/plans/"), "plan"),
    (re.compile(r"/metrics/"), "lines"),
)


@lru_cache(maxsize=1 << 14)
def kind_of(key: str) -> str:
    return next((kind for pattern, kind in _KINDS if pattern.search(key)), key.partition("/")[0])


def record_kind(data: Data) -> str:
    """Of the sealed bytes of a record."""
    value = codec.unseal(bytes(data), "a record", max_bytes=1 << 20, max_depth=codec.RECORD_DEPTH)
    return str(value["kind"])


@dataclass(frozen=True)
class Fault:
    point: str
    nth: int
    """Time that the point comes."""
    how: str

    def __str__(self) -> str:
        return f"{self.how} {self.point} ({self.nth})"


class Gate:
    """A ``Store``."""

    pace = PAID
    url = "memory:"

    def __init__(self, place: Place, process: Process, world: World | None = None) -> None:
        """``world``: of the process, where it is one of a run."""
        self.place, self.process, self.world = place, process, world

    def describe(self) -> str:
        return "a store in memory"

    # --- the verbs ----------------------------------------------------------------------------------------

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        body, shared = bytes(data), self.place.shared
        name = f"{record_kind(body)} record" if "/log/" in key else None

        def call() -> bool:
            there = key in shared._objects
            made = MemoryStore.create(shared, key, body, sha256=sha256)
            if not there:
                self.place.wrote(key, body)
            return made

        return bool(self._ask("create", key, call, name))

    def put(self, key: str, data: Data) -> None:
        body = bytes(data)
        self._ask("put", key, lambda: self.place.shared.put(key, body))

    def get(self, key: str, **more: Any) -> bytes:
        return bytes(self._ask("get", key, lambda: self.place.shared.get(key, **more)))

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        fill(out, self.get(key, first=first, length=sum(view.nbytes for view in out)), filled)

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        body = bytes(data)
        return bool(self._ask("head", key, lambda: self.place.shared.holds(key, body, sha256=sha256)))

    def limit(self, bytes_per_s: float | None) -> None:
        pass

    def head(self, key: str) -> Info | None:
        found: Info | None = self._ask("head", key, lambda: self.place.shared.head(key))
        return found

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        return iter(self._ask("list", prefix, lambda: list(self.place.shared.list(prefix, start_after))))

    def delete(self, key: str) -> bool:
        def call() -> None:
            if key in self.place.shared._objects:
                self.place.shared.delete(key)
                self.place.deleted(key)

        self._ask("delete", key, call)
        return False

    def local_path(self, key: str) -> None:
        return None

    # --- a request ----------------------------------------------------------------------------------------

    def _struck(self, point: str, writes: bool) -> str:
        place, how = self.place, self.place.comes(point)
        if how == "away":
            place.away_until = place.hub.now + place.hub.rng.choice((2.0, 30.0, 200.0))
        elif how == "late write" and not writes:
            how = "lost answer"
        elif how in ("frozen", "cut off"):
            if self.world is not None:
                self.world.leave_alone(self.process, how)
            else:
                self.process.freeze(place.hub.rng.choice((3.0, 15.0, 40.0, 90.0)))
        return how

    def _ask(self, verb: str, key: str, call: Callable[[], Any], kind: str | None = None) -> Any:
        place, process, hub = self.place, self.process, self.place.hub
        thread = hub.current
        if hub.over or thread is None:
            raise Dead
        assert process.alive, "a dead process asks"
        how = self._struck(f"{process.kind} {thread.name} {verb} {kind or kind_of(key)}", verb in WRITES)
        away, rng = hub.now < place.away_until, hub.rng
        go, back = rng.random() * 0.04, rng.random() * 0.04
        if rng.random() < 0.02:
            go += rng.random() * 3.0
        if how in ("before", "late"):
            process.kill()
        if how in ("late", "late write"):
            hub.at(rng.choice((0.1, 2.0, 20.0)) * (0.5 + rng.random()), None, call)
        if not process.alive:
            hub.wait()  # for ever
        if away or how == "late write":
            hub.resume(thread, 0.5, error=StoreUnavailable(f"{verb} {key}: no answer"))
            return hub.wait()

        def arrive() -> None:
            value, error = None, None
            try:
                value = call()
            except Exception as raised:
                error = raised
            if how == "after":
                process.kill()
            elif how == "lost answer":
                error = StoreUnavailable(f"{verb} {key}: the answer was lost")
            hub.resume(thread, back, value, error)

        hub.at(go, None, arrive)
        return hub.wait()
