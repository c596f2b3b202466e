"""Verify: a torn or flipped byte in any object of a run is found, and the checkpoint before it is used, loudly."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint import keys
from checkpoint.chunks import ChunkPlan, Piece, chunk_pieces
from checkpoint.errors import Damaged, NotFound, OtherVersion, StoreRefused
from checkpoint.log import FOLD_EVERY, Record, RunLog, RunState
from checkpoint.manifest import Manifest
from checkpoint.read import StateReader, load_manifest, refuse_newer
from checkpoint.store import Store, open_store
from checkpoint.store.memory import MemoryStore
from checkpoint.verify import is_plan, verify_checkpoint, verify_run
from tests.checkpoint import samples
from tests.checkpoint.samples import attempt_body, digest, save, write_dataset
from tests.support.s3_server import BUCKET, S3Server
from trainer import wire
from trainer.wire.plan import sections_of

RUN = "demo-0a1b2c"
SPEC = b"a spec"


def plan_file(version: int = wire.PLAN_VERSION) -> tuple[str, bytes]:
    """The smallest bytes that are a plan's."""
    header = wire.PlanHeader()
    header.magic[:] = wire.PLAN_MAGIC
    header.version, header.sections = version, sections_of(version)
    header.file_bytes = len(bytes(header)) + 64
    digest = hashlib.sha256(bytes(header)[64:] + bytes(64)).digest()
    header.digest[:] = digest
    return digest.hex(), bytes(header) + bytes(64)


def a_run(store: Store, checkpoints: int = 2) -> tuple[RunLog, RunState]:
    """A run with a spec, a plan and checkpoints of two nodes, steps 5, 10, …"""
    log = RunLog(store, RUN, writer="test")
    plan, data = plan_file()
    write_dataset(store)
    store.create(keys.spec_key(RUN), SPEC)
    store.create(keys.plan_key(RUN, plan), data)
    body = attempt_body(plan=plan, what=hashlib.sha256(SPEC).hexdigest())
    state = log.append("attempt", body, log.fold())
    for number in range(checkpoints):
        state, _ = save(store, log, state, seed=number, step=5 + 5 * number, owners=[[0, 1], [2, 3, 4]])
    return log, state


def file_of(store: Store, key: str, request: pytest.FixtureRequest) -> Path:
    """Where a real store keeps the object's bytes: the hand that flips them."""
    path = store.local_path(key)
    if path is None:
        server: S3Server = request.getfixturevalue("server")
        prefix = store.url.split("?")[0].removeprefix(f"s3://{BUCKET}/")
        path = server.data / BUCKET / prefix / key
    assert path.is_file()
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_sound_run_has_no_problems(store: Store) -> None:
    _, state = a_run(store)
    for level in ("quick", "full"):
        report = verify_run(store, RUN, level)  # type: ignore[arg-type]
        assert report.ok
        assert report.problems == ()
        assert (report.records, report.checkpoints) == (3, 2)
    assert report.bytes > 2 * 12_000_000
    assert [c.state_digest for c in state.checkpoints] == [digest(0, 5).hex(), digest(1, 10).hex()]


@pytest.mark.parametrize("harm", [flip, tear], ids=["flipped", "torn"])
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_any_damaged_object_is_found(
    kind: str, harm: Callable[[Path], None], files: Store, request: pytest.FixtureRequest
) -> None:
    """One object after the other is damaged, verified, and put right again."""
    store = files
    if kind == "s3":
        server: S3Server = request.getfixturevalue("server")
        with server.identity("trainer"):
            store = open_store(server.url(f"verify-{harm.__name__}"))
    a_run(store, checkpoints=1)
    objects = [i.key for i in store.list("")]
    assert len(objects) == 19  # 2 records, spec, plan, manifest, 2 parts, 9 chunks; 3 of the dataset
    for key in objects:
        path = file_of(store, key, request)
        before = path.read_bytes()
        harm(path)
        report = verify_run(store, RUN, "full")
        assert [p.key for p in report.problems] == [key], key
        path.write_bytes(before)
    assert verify_run(store, RUN, "full").ok


def test_blocks_that_were_summed_as_others_than_were_written(files: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and manifest are what they say, and do not belong together."""

    def summed(plan: ChunkPlan, data: bytes) -> tuple[Piece, ...]:
        return chunk_pieces(plan, data[:-1] + bytes([data[-1] ^ 16]) if plan.index == 1 else data)

    monkeypatch.setattr(samples, "chunk_pieces", summed)
    a_run(files, checkpoints=1)
    assert verify_run(files, RUN, "quick").ok
    found = verify_run(files, RUN, "full").problems
    assert len(found) == 2  # one of each node
    assert all(p.key.endswith("-000001") and p.reason.endswith("give another state digest") for p in found)


def test_the_quick_level_finds_what_needs_no_hashing_of_chunks(files: Store, request: pytest.FixtureRequest) -> None:
    a_run(files, checkpoints=1)
    for info in list(files.list("")):
        path = file_of(files, info.key, request)
        before = path.read_bytes()
        tear(path)
        assert [p.key for p in verify_run(files, RUN, "quick").problems] == [info.key]
        path.write_bytes(before)
        path.unlink()
        if info.key != keys.log_key(RUN, 1):
            found = {p.key for p in verify_run(files, RUN, "quick").problems}
            assert found == (set() if info.key == keys.log_key(RUN, 2) else {info.key})  # the last record has no next
        path.write_bytes(before)


def test_the_checkpoint_before_a_damaged_one_is_used(files: Store, request: pytest.FixtureRequest) -> None:
    log, state = a_run(files, checkpoints=3)
    chunks = [i.key for i in files.list(f"runs/{RUN}/chunks/{keys.point(15, 1)}/")]
    flip(file_of(files, chunks[2], request))
    [problem] = verify_checkpoint(files, RUN, state.checkpoints[2])
    assert problem.key == chunks[2]
    assert problem.checkpoint == state.checkpoints[2].n
    state = log.append("damaged", {"checkpoint": state.checkpoints[2].n, "reason": problem.reason}, state)
    assert [c.step for c in state.restore_candidates()] == [10, 5]


def read_all(store: Store, manifest: Manifest) -> None:
    for tensor in manifest.tensors:
        for kind in range(3):
            StateReader(store, manifest).read(tensor.name, kind)


def test_a_reader_finds_a_flipped_byte_in_whatever_it_reads(files: Store, request: pytest.FixtureRequest) -> None:
    _, state = a_run(files, checkpoints=1)
    manifest = load_manifest(files, RUN, state.checkpoints[0])
    for chunk in manifest.chunks:
        path = file_of(files, keys.run_key(RUN, chunk.name), request)
        before = path.read_bytes()
        flip(path)
        with pytest.raises(Damaged, match="not what was saved"):
            read_all(files, manifest)
        path.unlink()
        with pytest.raises(Damaged, match="it is gone"):
            read_all(files, manifest)
        path.write_bytes(before)


def test_a_fork_without_a_checkpoint_of_its_own_needs_its_parent_s(tmp_path: Path) -> None:
    """A fork that gave up for that is told to verify itself: it was all as written."""
    store = open_store(tmp_path.as_uri())
    _, parent = a_run(store)
    info = parent.checkpoints[0]
    child = RunLog(store, "child-0a1b2c", writer="test")
    body = {"kind": "parent", "run": RUN, "checkpoint": info.n, "step": info.step, "state_digest": info.state_digest}
    state = child.append("intervention", body, child.fold())
    assert verify_run(store, child.run, "full").ok
    key = keys.run_key(RUN, info.manifest)
    file = store.local_path(key)
    assert file is not None
    file.unlink()
    assert [(p.key, p.checkpoint) for p in verify_run(store, child.run).problems] == [(key, None)]
    RunLog(store, RUN, writer="test").append("tombstone", {"checkpoint": info.n}, parent)
    (problem,) = verify_run(store, child.run).problems
    assert (problem.key, problem.reason.startswith("given up to the collector (log record ")) == (key, True)
    shutil.rmtree(tmp_path / "runs" / RUN)
    (problem,) = verify_run(store, child.run).problems
    assert problem.key == keys.log_key(RUN, info.n)
    _, _ = save(
        store, child, child.append("attempt", attempt_body(), state), seed=3, step=15, owners=[[0, 1], [2, 3, 4]]
    )
    assert not any(RUN in p.key for p in verify_run(store, child.run).problems)  # it has one of its own now


def test_a_run_that_was_renamed_by_hand_is_not_damaged(tmp_path: Path) -> None:
    """Each of its checkpoints was marked as damaged in its log, for good."""
    store = open_store(tmp_path.as_uri())
    _, state = a_run(store)
    (tmp_path / "runs" / RUN).rename(tmp_path / "runs" / "mine-0a1b2c")
    for look in (
        lambda: load_manifest(store, "mine-0a1b2c", state.checkpoints[0]),
        lambda: refuse_newer(store, "mine-0a1b2c", state.checkpoints[0]),
        lambda: verify_run(store, "mine-0a1b2c"),
    ):
        with pytest.raises(StoreRefused, match=rf"it is whole, and of run {RUN}: .* rename it back \(runs/{RUN}/"):
            look()
    (tmp_path / "runs" / "mine-0a1b2c").rename(tmp_path / "runs" / RUN)
    assert verify_run(store, RUN, "full").ok


def test_folds_are_checked_against_the_records(tmp_path: Path) -> None:
    store = MemoryStore()
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    while state.n < FOLD_EVERY - 1:
        state = log.append("intervention", {"kind": "x"}, state)
    store.create(keys.spec_key(RUN), SPEC)
    good = MemoryStore()
    for info in store.list(""):
        good.create(info.key, store.get(info.key))
    RunLog(good, RUN).append("intervention", {"kind": "y"}, state)
    clean = [p for p in verify_run(good, RUN).problems if "/folds/" in p.key]
    assert clean == []
    lie = RunLog(store, RUN)
    body = lie._store_state(RunState(RUN, n=state.n))
    store.create(keys.log_key(RUN, FOLD_EVERY), Record(FOLD_EVERY, "fold", 1, "w:0", 0.0, body).to_bytes())
    [problem] = [p for p in verify_run(store, RUN).problems if "/folds/" in p.key]
    assert "something else than the 255 records before it" in problem.reason


def test_a_run_that_is_not_there() -> None:
    with pytest.raises(NotFound):
        verify_run(MemoryStore(), RUN)


def test_plans_are_known_by_their_digest() -> None:
    name, data = plan_file()
    assert is_plan(data, name)
    for at in range(len(data)):
        torn = bytearray(data)
        torn[at] ^= 1
        newer = wire.PlanHeader.from_buffer_copy(torn).version > wire.PLAN_VERSION
        with pytest.raises(OtherVersion) if newer else contextlib.nullcontext():
            assert not is_plan(bytes(torn), name), at
    assert not is_plan(data[:-1], name)
    assert not is_plan(b"", name)
    old, data = plan_file(1)  # which nobody runs any more, and is what its run's log names
    assert is_plan(data, old)
    assert not is_plan(data[:-1] + b"x", old)
