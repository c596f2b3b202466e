"""Is everything that a run has written still what was written?

    quick   every record, fold, spec, plan, manifest and part is read and checked; every chunk and shard exists with
            its size
    full    and every chunk's bytes are hashed, whole and block by block, so that the state digest is worked out
            again; every shard's too

A problem is a finding, not an exception; a store that does not answer (StoreUnavailable) and an object of a newer
version (OtherVersion) are exceptions, since they say nothing about the bytes. Reads only. Memory: one chunk (64 MiB)
and one manifest at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from checkpoint import keys, pages
from checkpoint.chunks import MAX_CHUNK_BYTES, Chunk, Piece
from checkpoint.dataset import load_dataset_manifest
from checkpoint.digest import wrong_block_of
from checkpoint.errors import Damaged, NotFound, OtherVersion, StoreRefused
from checkpoint.log import FOLD_EVERY, CheckpointInfo, Record, RunLog, RunState, fold_target
from checkpoint.manifest import Manifest, merge
from checkpoint.read import load_manifest
from checkpoint.store.base import Store
from trainer.wire.plan import checked_digest
from trainer.wire.unreadable import NewerVersion, Unreadable

Level = Literal["quick", "full"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One object that is not what it should be."""

    key: str
    reason: str
    checkpoint: int | None = None  # record number of the checkpoint that it spoils


@dataclass(frozen=True, slots=True)
class Report:
    """What was looked at and what was found."""

    run: str
    level: Level
    records: int
    checkpoints: int
    objects: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


class _Tally:
    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        self.problems: list[Problem] = []
        self.datasets: set[str] = set()

    def saw(self, size: int) -> None:
        self.objects += 1
        self.bytes += size

    def found(self, key: str, reason: str, checkpoint: int | None = None) -> None:
        self.problems.append(Problem(key, reason, checkpoint))


def verify_checkpoint(store: Store, run: str, info: CheckpointInfo, level: Level = "full") -> tuple[Problem, ...]:
    """What is wrong with one checkpoint; empty where nothing is."""
    tally = _Tally()
    _checkpoint(store, run, info, level, tally)
    return tuple(tally.problems)


def verify_run(
    store: Store, run: str, level: Level = "quick", *, progress: Callable[[str], None] | None = None
) -> Report:
    """Check everything of a run: its log, folds, spec, plans and all checkpoints that should be there. One that the
    collector takes meanwhile is no problem: it needs no pin.
    """
    tally = _Tally()
    state = _log(store, run, tally)
    _spec_and_plans(store, run, state, tally)
    wanted = [c for c in state.checkpoints if c.n not in state.tombstones]
    for info in wanted:
        if progress is not None:
            progress(f"step {info.step}, record {info.n}")
        _checkpoint(store, run, info, level, tally)
    for digest in sorted(tally.datasets):
        _dataset(store, digest, level, tally)
    if any(problem.checkpoint is not None for problem in tally.problems):
        gone = RunLog(store, run).fold(state).tombstones - state.tombstones  # the collector was here meanwhile
        wanted = [c for c in wanted if c.n not in gone]
        tally.problems = [p for p in tally.problems if p.checkpoint not in gone]
    _beginning(store, state, level, tally)
    return Report(run, level, state.n, len(wanted), tally.objects, tally.bytes, tuple(tally.problems))


# --- inside -----------------------------------------------------------------------------------------------


def _log(store: Store, run: str, tally: _Tally) -> RunState:
    """Every record, from the first; the state up to the first that cannot be read."""
    log = RunLog(store, run, writer="verify")
    state, whole, expected = RunState(run), True, 1
    for entry in store.list(keys.log_prefix(run)):
        name = entry.key.rpartition("/")[2]
        if len(name) != 20 or not name.isdigit():
            tally.found(entry.key, "not a log record's name")
            continue
        n = int(name)
        if n != expected:
            tally.found(keys.log_key(run, expected), f"missing: the next record is {n}")
            whole = False
        expected = n + 1
        tally.saw(entry.bytes)
        try:
            record = log.read(n)
            if record.kind == "fold":
                _fold(store, run, record, state if whole else None, tally)
            if whole:
                state = state.apply(record)
        except (Damaged, NotFound) as error:
            tally.found(entry.key, str(error))
            whole = False
    if expected == 1:
        if next(iter(store.list(keys.run_key(run, "chunks") + "/")), None) is None:
            raise NotFound(keys.log_key(run, 1), store.describe())
        tally.found(keys.log_key(run, 1), "missing, and the run has state: a copy of a store that is not whole?")
    return state


def _fold(store: Store, run: str, record: Record, state: RunState | None, tally: _Tally) -> None:
    """The folded state that a fold record names is there, and is what folding gives."""
    name, size, sha256 = fold_target(record)
    key = keys.run_key(run, name)
    try:
        data = store.get(key, max_bytes=size)
        tally.saw(len(data))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Damaged(f"not the bytes that log record {record.n} names")
        known = state or RunState(run)  # the folds below it were compared before
        found = RunState.parse(data, run, record.n - 1, lambda base, _: known.upto(base))
    except (Damaged, NotFound) as error:
        tally.found(key, str(error))
        return
    if state is not None and found != state:
        tally.found(
            key, f"says something else than the {record.n - 1} records before it (a fold comes every {FOLD_EVERY})"
        )


def _beginning(store: Store, state: RunState, level: Level, tally: _Tally) -> None:
    """The parent's checkpoint that a fork begins from, where it has nothing of its own to go on from."""
    parent = state.parent
    if parent is None or state.restore_candidates():
        return
    run, number = str(parent["run"]), int(parent["checkpoint"])
    theirs = RunLog(store, run, writer="verify").fold(quick=True)
    info = theirs.checkpoint(number)
    if info is None:
        tally.found(keys.log_key(run, number), f"no checkpoint's record: {state.run} begins from there")
    elif number in theirs.buried:
        why = f"given up to the collector (log record {theirs.buried[number]}): {state.run} begins from there"
        tally.found(keys.run_key(run, info.manifest), why)
    else:
        for problem in verify_checkpoint(store, run, info, level):
            tally.found(problem.key, problem.reason)


def _spec_and_plans(store: Store, run: str, state: RunState, tally: _Tally) -> None:
    for what in sorted({a.what for a in state.attempts}):
        _check(store, keys.spec_key(run), tally, lambda data, what=what: hashlib.sha256(data).hexdigest() == what)  # type: ignore[misc]
    for plan in sorted({a.plan for a in state.attempts}):
        _check(store, keys.plan_key(run, plan), tally, lambda data, plan=plan: is_plan(data, plan))  # type: ignore[misc]


def is_plan(data: bytes, digest: str) -> bool:
    """Whether these are a plan file's bytes with this digest, also of an older version; OtherVersion of a newer one."""
    try:
        return checked_digest(data) == digest
    except NewerVersion as error:
        raise OtherVersion(str(error)) from error
    except Unreadable:
        return False


def _check(store: Store, key: str, tally: _Tally, good: Callable[[bytes], bool]) -> None:
    try:
        data = store.get(key)
    except NotFound:
        tally.found(key, "gone, but attempt records name it")
        return
    tally.saw(len(data))
    if not good(data):
        tally.found(key, "its bytes do not have the digest that attempt records name")


def _checkpoint(store: Store, run: str, info: CheckpointInfo, level: Level, tally: _Tally) -> None:
    try:
        manifest = load_manifest(store, run, info)
    except Damaged as error:
        tally.found(keys.run_key(run, info.manifest), str(error), info.n)
        return
    tally.saw(info.bytes)
    if (dataset := manifest.meta.get("dataset")) is not None:
        tally.datasets.add(dataset)
    parts: list[tuple[str, bytes]] = []
    for source in manifest.sources:
        read = partial(pages.read, store, run, source.name, f"part manifest {source.name}")
        data = _named(read, run, source, info, tally)
        if data is not None:
            parts.append((source.name, data))
    if len(parts) == len(manifest.sources):
        try:
            if merge(parts) != manifest:
                raise Damaged("says something else than its parts")
        except Damaged as error:
            tally.found(keys.run_key(run, info.manifest), str(error), info.n)
    del parts
    for number, (chunk, pieces) in enumerate(_by_chunk(manifest)):
        if level == "quick":
            _size(store, run, chunk, info, tally)
            continue
        read = partial(store.get, keys.run_key(run, chunk.name), max_bytes=min(chunk.bytes, MAX_CHUNK_BYTES))
        found = _named(read, run, chunk, info, tally)
        if found is None:
            continue
        if wrong_block_of(found, [(p.bytes, p.leaves) for p in pieces]) is not None:
            tally.found(keys.run_key(run, chunk.name), f"chunk {number}: its blocks give another state digest", info.n)


def _dataset(store: Store, digest: str, level: Level, tally: _Tally) -> None:
    """The dataset that the checkpoints were trained on: its manifest, tokenizer and shards."""
    try:
        manifest = load_dataset_manifest(store, digest)
    except (Damaged, NotFound, StoreRefused) as error:
        tally.found(keys.dataset_manifest_key(digest), str(error))
        return
    tally.saw(manifest.bytes)
    wanted: list[tuple[str, int | None, str]] = [(keys.tokenizer_key(digest), None, manifest.tokenizer_sha256)]
    for number, shard in enumerate(manifest.shards):
        wanted.append((keys.dataset_key(digest, keys.shard_name(number)), shard.bytes, shard.sha256))
    for key, size, sha256 in wanted:
        seen = store.head(key)
        if seen is None or (size is not None and seen.bytes != size):
            tally.found(key, "gone" if seen is None else f"has {seen.bytes} bytes, the dataset's manifest says {size}")
        elif level == "full" or size is None:
            tally.saw(seen.bytes)
            if hashlib.sha256(store.get(key)).hexdigest() != sha256:
                tally.found(key, "its bytes do not have the digest that the dataset's manifest names")
        else:
            tally.saw(0)


def _by_chunk(manifest: Manifest) -> Iterator[tuple[Chunk, list[Piece]]]:
    """Each chunk with its pieces, as they fill it."""
    held: list[list[Piece]] = [[] for _ in manifest.chunks]
    for piece in sorted(manifest.pieces, key=lambda piece: piece.offset):
        held[piece.chunk].append(piece)
    yield from zip(manifest.chunks, held, strict=True)


def _size(store: Store, run: str, chunk: Chunk, info: CheckpointInfo, tally: _Tally) -> None:
    key = keys.run_key(run, chunk.name)
    seen = store.head(key)
    if seen is None:
        tally.found(key, "gone, but the manifest names it", info.n)
        return
    tally.saw(0)
    if seen.bytes != chunk.bytes:
        tally.found(key, f"has {seen.bytes} bytes, the manifest says {chunk.bytes}", info.n)


def _named(get: Callable[[], bytes], run: str, chunk: Chunk, info: CheckpointInfo, tally: _Tally) -> bytes | None:
    """The bytes of an object that a manifest names, read by ``get``, where they are what it says."""
    key = keys.run_key(run, chunk.name)
    try:
        data = get()
    except (NotFound, Damaged) as error:
        tally.found(key, str(error), info.n)
        return None
    tally.saw(len(data))
    if len(data) != chunk.bytes or hashlib.sha256(data).digest() != chunk.sha256:
        tally.found(key, f"has {len(data)} bytes that are not those that the manifest names", info.n)
        return None
    return data
