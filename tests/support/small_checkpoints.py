"""Whole checkpoints of a few hundred bytes, as agents write them, and a store that something can happen to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from checkpoint import keys
from checkpoint.agent.commit import commit
from checkpoint.chunks import Chunk, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.digest import KINDS
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.manifest import PartManifest
from checkpoint.store import Data, Info, Store
from checkpoint.store.memory import MemoryStore
from checkpoint.verify import verify_checkpoint
from tests.checkpoint.samples import WHAT, attempt_body

RUN = "small-0a1b2c"


class Clock:
    """Seconds that pass when the test says so."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Watched(MemoryStore):
    """``before`` and ``after`` hear of each request; what they raise is what the caller gets. Not asked from inside."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock=clock)
        self.requests = 0
        self.before: Callable[[str, str], None] = lambda _verb, _key: None
        self.after: Callable[[str, str], None] = lambda _verb, _key: None
        self._inside = False

    def _told(self, verb: str, key: str, work: Callable[[], Any]) -> Any:
        if self._inside:
            return work()
        self._inside = True
        try:
            self.requests += 1
            self.before(verb, key)
            try:
                return work()
            finally:
                self.after(verb, key)
        finally:
            self._inside = False

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        made: bool = self._told("create", key, lambda: MemoryStore.create(self, key, data, sha256=sha256))
        return made

    def put(self, key: str, data: Data) -> None:
        self._told("put", key, lambda: MemoryStore.put(self, key, data))

    def get(self, key: str, **more: Any) -> bytes:
        found: bytes = self._told("get", key, lambda: MemoryStore.get(self, key, **more))
        return found

    def head(self, key: str) -> Info | None:
        found: Info | None = self._told("head", key, lambda: MemoryStore.head(self, key))
        return found

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        found: list[Info] = self._told("list", prefix, lambda: list(MemoryStore.list(self, prefix, start_after)))
        return iter(found)

    def delete(self, key: str) -> bool:
        return bool(self._told("delete", key, lambda: MemoryStore.delete(self, key)))


def upload(store: Store, run: str, step: int, epoch: int, node: int, nodes: int, incarnation: str = "i1") -> None:
    """A node's chunks and its part."""
    rng = random.Random(f"{step} {epoch} {node}")
    tensors = [Tensor(f"w{n}", (4,)) for n in range(nodes)]
    segments = [Segment(node, kind, 0, 4, 64 * kind) for kind in range(len(KINDS))]
    saved = []
    for plan in plan_chunks(segments):
        data = rng.randbytes(plan.bytes)
        chunk = Chunk.of(keys.chunk_name(step, epoch, node, incarnation, plan.index), data)
        store.create(keys.run_key(run, chunk.name), data)
        saved.append((chunk, chunk_pieces(plan, data)))
    part = PartManifest.build(
        run=run, step=step, epoch=epoch, samples=step * 8, what=WHAT, part=node, parts=nodes, tensors=tensors,
        saved=saved,
    )  # fmt: skip
    store.create(keys.run_key(run, keys.part_name(step, epoch, node)), part.to_bytes())


def begin(log: RunLog, state: RunState, how: dict[str, Any] | None = None, **more: Any) -> RunState:
    """The next attempt, from the best checkpoint."""
    best = state.restore_candidates()[:1]
    body = attempt_body(best[0].n if best else None, best[0].step if best else 0, nodes=2)
    return log.append("attempt", {**body, "how": how or body["how"], **more}, state)


def save(store: Store, log: RunLog, state: RunState, step: int, nodes: int = 2) -> RunState:
    """A whole checkpoint of the newest attempt, committed by the agents' own code."""
    for node in range(nodes):
        upload(store, log.run, step, state.epoch, node, nodes)
    made = commit(log, nodes, step, state.epoch, log.fold(state))
    assert made is not None
    return made


def whole(store: Store, run: str, info: CheckpointInfo) -> list[str]:
    """What is wrong with a checkpoint, every byte of it read."""
    return [f"step {info.step}: {p.key}: {p.reason}" for p in verify_checkpoint(store, run, info)]


def names(store: Store, run: str, *folders: str) -> list[str]:
    """What is there, relative to the run."""
    prefix = keys.run_key(run) + "/"
    return [i.key.removeprefix(prefix) for folder in folders or ("",) for i in store.list(prefix + folder)]
