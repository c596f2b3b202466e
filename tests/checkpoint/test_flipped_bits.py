"""Every bit of every object that a run has written, flipped: who reads the object says so (slots: test_snapshot.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from checkpoint import keys, pages
from checkpoint.errors import Damaged
from checkpoint.log import CheckpointInfo, RunLog
from checkpoint.manifest import Manifest, PartManifest
from checkpoint.read import StateReader, load_manifest
from checkpoint.store.memory import MemoryStore
from tests.support.small_checkpoints import RUN, begin, save


@pytest.fixture(scope="module")
def run() -> tuple[MemoryStore, CheckpointInfo]:
    """One attempt of two nodes and a checkpoint, committed by the agents' own code."""
    store = MemoryStore()
    log = RunLog(store, RUN)
    state = save(store, log, begin(log, log.fold()), 8)
    return store, state.checkpoints[-1]


def record(store: MemoryStore, key: str, info: CheckpointInfo) -> object:
    return RunLog(store, RUN).read(int(key.rpartition("/")[2]))


def manifest(store: MemoryStore, key: str, info: CheckpointInfo) -> Manifest:
    return load_manifest(store, RUN, info)


def part(store: MemoryStore, key: str, info: CheckpointInfo) -> PartManifest:
    name = key.removeprefix(keys.run_key(RUN, ""))
    return PartManifest.parse(pages.read(store, RUN, name, "part"))


READERS: dict[str, Callable[[MemoryStore, str, CheckpointInfo], object]] = {
    "log": record,
    "manifest": manifest,
    "part": part,
}


def kind_of(key: str) -> str:
    words = key.removeprefix(keys.run_key(RUN, "")).split("/")
    return words[0] if words[0] in ("log", "chunks") else "part" if "parts" in words else "manifest"


def unseen(store: MemoryStore, key: str, read: Callable[[], object]) -> list[str]:
    """Bits of this object whose flip nobody notices. The object is as it was afterwards."""
    whole, found = store.get(key), []
    read()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        store._objects[key] = bytes(flipped)
        try:
            read()
        except Damaged:
            continue
        found.append(f"{key}: byte {bit // 8}, bit {bit % 8}")
    store._objects[key] = whole
    read()
    return found


@pytest.mark.parametrize("kind", ["log", "manifest", "part"])
def test_every_flipped_bit_of_what_names_the_state_is_found(run: tuple[MemoryStore, CheckpointInfo], kind: str) -> None:
    store, info = run
    named = [found.key for found in store.list(keys.run_key(RUN) + "/") if kind_of(found.key) == kind]
    assert len(named) == {"log": 2, "manifest": 1, "part": 2}[kind]
    for key in named:
        assert not unseen(store, key, lambda key=key: READERS[kind](store, key, info))  # type: ignore[misc]


def test_every_flipped_bit_of_the_state_is_found(run: tuple[MemoryStore, CheckpointInfo]) -> None:
    store, info = run
    whole = load_manifest(store, RUN, info)
    reader = StateReader(store, whole)
    chunks = [found.key for found in store.list(keys.run_key(RUN, "chunks") + "/")]
    assert sorted(chunks) == sorted(keys.run_key(RUN, chunk.name) for chunk in whole.chunks)
    for key in chunks:
        assert not unseen(store, key, lambda: [reader.read(t.name, kind) for t in whole.tensors for kind in range(3)])
