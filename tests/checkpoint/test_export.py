"""Export: the file opens in the safetensors library with the saved bits, memory stays small, no half file stays."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import botocore.exceptions
import numpy as np
import pytest
from safetensors import safe_open

from checkpoint import keys
from checkpoint.chunks import Chunk, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.errors import Damaged, StoreRefused, StoreUnavailable
from checkpoint.export import ExportTensor, Read, export_safetensors, safetensors_header, shards, whole
from checkpoint.export_to import Bucket, Buffer, Folder, target
from checkpoint.log import RunLog
from checkpoint.manifest import Manifest, PartManifest, merge
from checkpoint.store import Store, open_store
from checkpoint.store.file import FileStore
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_parts import create_in_parts
from tests.checkpoint.samples import TENSORS, WHAT, attempt_body, save, state_bytes
from tests.support.s3_server import BUCKET, S3Server

RUN = "demo-0a1b2c"


@pytest.fixture
def saved(store: Store) -> tuple[Store, Manifest]:
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    _, manifest = save(store, log, state, seed=3, step=5, owners=[[0, 1], [2, 3, 4]])
    return store, manifest


def transposed(name: str, rows: int, columns: int) -> ExportTensor:
    def data(read: Read) -> Iterator[Buffer]:
        array = np.frombuffer(read(name), "<f4").reshape(rows, columns)
        yield np.ascontiguousarray(array.T).data.cast("B")

    return ExportTensor(f"model.{name}", (columns, rows), data)


def halves(name: str, shape: tuple[int, ...]) -> ExportTensor:
    """bfloat16 by cutting the lower half off."""

    def data(read: Read) -> Iterator[Buffer]:
        yield (np.frombuffer(read(name), "<u4") >> 16).astype("<u2").data.cast("B")

    return ExportTensor(f"half.{name}", shape, data, "BF16")


def test_the_file_opens_in_the_safetensors_library(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = saved
    state = state_bytes(3)
    tensors = [ExportTensor(f"t.{t.name}", t.shape, whole(t.name, 100_000)) for t in TENSORS]
    tensors += [transposed("h.0.weight", 600, 1000), halves("ln.weight", (8, 8))]
    path = Path(
        export_safetensors(
            store,
            manifest,
            tensors,
            Folder(tmp_path / "out"),
            texts={"config.json": "{}", "tokenizer.json": b"[]"},
            metadata={"k": "v"},
        )
    )
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == sorted(t.name for t in tensors)
        for number, t in enumerate(TENSORS):
            got = file.get_tensor(f"t.{t.name}")
            assert got.shape == t.shape
            assert got.dtype == np.float32
            assert got.tobytes() == state[number][0]
        turned = file.get_tensor("model.h.0.weight")
        assert turned.tobytes() == np.frombuffer(state[2][0], "<f4").reshape(600, 1000).T.tobytes()
        meta = file.metadata()
    assert meta["format"] == "pt"
    assert meta["hotstage_state_digest"] == manifest.state_digest.hex()
    assert (meta["hotstage_run"], meta["hotstage_step"], meta["k"]) == (RUN, "5", "v")
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_header_by_hand() -> None:
    data = safetensors_header([ExportTensor("a", (2, 3), whole("a")), ExportTensor("b", (), whole("b"), "BF16")], {})
    (size,) = struct.unpack("<Q", data[:8])
    assert len(data) == 8 + size
    assert size % 8 == 0
    assert json.loads(data[8:]) == {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }
    with pytest.raises(ValueError, match="exported twice"):
        safetensors_header([ExportTensor("a", (1,), whole("a"))] * 2, {})


def test_a_tensor_of_the_wrong_size_is_refused_and_nothing_stays(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = saved
    with pytest.raises(ValueError, match="came with 28 bytes"):
        export_safetensors(store, manifest, [ExportTensor("b", (8,), whole("b"))], Folder(tmp_path / "o"), texts={})
    assert list((tmp_path / "o").iterdir()) == []
    with pytest.raises(ValueError, match="does not stand in the folder"):
        export_safetensors(store, manifest, [], Folder(tmp_path / "o"), texts={"../x": "y"})


def test_a_damaged_checkpoint_is_not_exported(files: Store, tmp_path: Path) -> None:
    log = RunLog(files, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    _, manifest = save(files, log, state, seed=3, step=5)
    for chunk in manifest.chunks:
        path = files.local_path(keys.run_key(RUN, chunk.name))
        assert path is not None
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
    with pytest.raises(Damaged, match="not what was saved"):
        export_safetensors(
            files,
            manifest,
            [ExportTensor(t.name, t.shape, whole(t.name)) for t in TENSORS],
            Folder(tmp_path / "o"),
            texts={"config.json": "{}"},
        )
    assert list((tmp_path / "o").iterdir()) == []  # nothing that looks like a model


def test_a_folder_that_cannot_be_is_refused(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = saved
    (tmp_path / "file").write_bytes(b"")
    for folder, why in ((tmp_path / "file", "a file lies where"), (Path("/proc/none"), "No such file")):
        with pytest.raises(StoreRefused, match=f"{why}.*choose a folder"):
            export_safetensors(store, manifest, [], Folder(folder), texts={"a": ""})
    if os.path.exists("/dev/full"):

        def full(_: Read) -> Iterator[Buffer]:
            raise OSError(28, "No space left on device")
            yield b""

        with pytest.raises(StoreUnavailable, match="nothing was left half written"):
            export_safetensors(store, manifest, [ExportTensor("a", (1,), full)], Folder(tmp_path / "o"), texts={})


@pytest.mark.parametrize("theirs", ["a", "model.safetensors"])
def test_files_that_somebody_else_put_there_are_not_replaced(
    saved: tuple[Store, Manifest], tmp_path: Path, theirs: str
) -> None:
    store, manifest = saved
    out = tmp_path / "o"
    out.mkdir()
    (out / theirs).write_bytes(b"theirs")
    with pytest.raises(StoreRefused, match=f"{theirs} that no export of a run wrote, .*: choose an empty folder"):
        export_safetensors(store, manifest, [], Folder(out), texts={"a": "ours"})
    assert [path.read_bytes() for path in out.iterdir()] == [b"theirs"]
    (out / theirs).unlink()
    for text in ("one", "two"):  # an older export is replaced
        export_safetensors(store, manifest, [], Folder(out), texts={"a": text})
        assert (out / "a").read_text() == text


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """240 MB of weights go through less than 48 MB (a NumPy of a whole tensor would be 80)."""
    store = FileStore(tmp_path / "store")
    table = [Tensor(f"t{n}", (20_000_000,)) for n in range(3)]
    block, saved = bytes(80_000_000), []
    for number in range(3):
        for kind in range(3):
            for plan in plan_chunks([Segment(number, kind, 0, 20_000_000, 0)], 16 << 20):
                data = memoryview(block)[: plan.bytes]
                index = len(saved)
                chunk = Chunk.of(keys.chunk_name(1, 1, 0, "i", index), data)
                if kind == 0:  # the moments are not read
                    store.create(keys.run_key(RUN, chunk.name), data)
                saved.append((chunk, chunk_pieces(plan, data)))
    part = PartManifest.build(
        run=RUN, step=1, epoch=1, samples=1, what=WHAT, part=0, parts=1, tensors=table, saved=saved
    )
    manifest = merge([(keys.part_name(1, 1, 0), part.to_bytes())])
    del block, saved, part
    tracemalloc.start()
    try:
        tensors = [ExportTensor(t.name, t.shape, whole(t.name)) for t in table]
        path = Path(export_safetensors(store, manifest, tensors, Folder(tmp_path / "o"), texts={}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 240_000_000
    assert peak < 48 << 20


# --- several files -----------------------------------------------------------------------------------------


def test_where_files_are_cut() -> None:
    def sizes(limit: int, *elements: int) -> list[list[int]]:
        tensors = [ExportTensor(f"t{n}", (count,), whole("x")) for n, count in enumerate(elements)]
        found = shards(tensors, limit)
        assert [t for _, some in found for t in some] == tensors
        names = [name for name, _ in found]
        several = [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
        assert names == (several if len(names) > 1 else ["model.safetensors"])
        return [[t.bytes // 4 for t in some] for _, some in found]

    assert sizes(400, 50, 50) == [[50, 50]]
    assert sizes(400, 50, 51) == [[50], [51]]
    assert sizes(400, 10, 500, 10, 10) == [[10], [500], [10, 10]]  # one that is larger has its own
    assert sizes(400) == [[]]


def test_several_files_and_their_index_are_the_same_weights(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = saved
    tensors = [ExportTensor(f"t.{t.name}", t.shape, whole(t.name)) for t in TENSORS]
    folder = tmp_path / "o"
    texts = {"config.json": "{}"}
    where = export_safetensors(store, manifest, tensors, Folder(folder), texts=texts, shard_bytes=1 << 20)
    assert where == str(folder / "model.safetensors.index.json")
    index = json.loads(Path(where).read_text())
    assert index["metadata"] == {"total_size": sum(t.elements for t in TENSORS) * 4}
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert sorted(p.name for p in folder.iterdir()) == sorted(["config.json", "model.safetensors.index.json", *files])
    state = state_bytes(3)
    assert list(index["weight_map"]) == [t.name for t in tensors]
    for number, t in enumerate(TENSORS):
        with safe_open(folder / index["weight_map"][f"t.{t.name}"], "numpy") as file:
            assert file.get_tensor(f"t.{t.name}").tobytes() == state[number][0]
            assert file.metadata()["hotstage_state_digest"] == manifest.state_digest.hex()
    with pytest.raises(StoreRefused, match="of another export"):  # transformers would open the one file, or those
        export_safetensors(store, manifest, tensors, Folder(folder), texts={})
    again = export_safetensors(store, manifest, tensors, Folder(folder), texts={}, shard_bytes=1 << 20)
    assert again == where


def test_an_export_that_fails_leaves_the_older_one_whole(
    files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files of two checkpoints would open as one model."""
    log = RunLog(files, RUN, writer="test")
    _, manifest = save(files, log, log.append("attempt", attempt_body(), log.fold()), seed=3, step=5)
    out = tmp_path / "o"

    def export(step: int, fail: int = -1) -> dict[str, bytes]:
        class Full(Folder):
            written = 0

            def write(self, name: str, pieces: Iterable[Buffer], size: int, state: str) -> str:
                self.written += 1
                return super().write(name, broken(pieces) if self.written - 1 == fail else pieces, size, state)

        def broken(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
            yield next(iter(pieces))
            raise OSError(28, "No space left on device")

        def data(_: Read) -> Iterator[Buffer]:
            yield bytes([step]) * 400

        tensors = [ExportTensor(name, (100,), data) for name in "ab"]
        texts = {"config.json": str(step)}
        if fail < 0:
            export_safetensors(files, manifest, tensors, Full(out), texts=texts, shard_bytes=400)
        else:
            with pytest.raises(StoreUnavailable):
                export_safetensors(files, manifest, tensors, Full(out), texts=texts, shard_bytes=400)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    before = export(1)
    for text_files_and_index in range(4):
        assert export(2, text_files_and_index) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert export(2, 9) == {}, "or none of either"
    after = export(2)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after if name != "model.safetensors.index.json")


def test_an_adapter_in_the_folder_would_be_opened_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(StoreRefused, match=r"an adapter \(adapter_config.json\), .*: remove it, or choose"):
        Folder(tmp_path).begin(["config.json"], "model")


def bucket(server: S3Server, prefix: str) -> Bucket:
    with server.identity("root"):
        store = open_store(server.url(prefix))
    assert isinstance(store, S3Store)
    return Bucket(store)


def test_straight_into_a_bucket(server: S3Server, files: Store, tmp_path: Path) -> None:
    log = RunLog(files, RUN, writer="test")
    _, manifest = save(files, log, log.append("attempt", attempt_body(), log.fold()), seed=3, step=5)
    tensors = [ExportTensor(t.name, t.shape, whole(t.name)) for t in TENSORS]
    texts = {"config.json": "{}"}
    here = Path(export_safetensors(files, manifest, tensors, Folder(tmp_path / "o"), texts=texts))
    there = bucket(server, "export")
    where = export_safetensors(files, manifest, tensors, there, texts=texts)
    assert where.startswith(f"s3://{BUCKET}/export/model.safetensors?")
    assert there.store.get("model.safetensors") == here.read_bytes()
    assert there.store.get("config.json") == b"{}"
    assert export_safetensors(files, manifest, tensors, there, texts=texts) == where  # once more: as it is
    with pytest.raises(StoreRefused, match=r"has another config\.json.*choose an empty prefix"):
        export_safetensors(files, manifest, tensors, there, texts={"config.json": "{ }"})
    with pytest.raises(StoreRefused, match="of another export"):
        export_safetensors(files, manifest, tensors, there, texts={}, shard_bytes=1 << 20)


def pieces(size: int, fail: bool = False) -> Iterator[bytes]:
    for first in range(0, size, 7 << 20):
        yield bytes([first >> 20 & 255]) * min(7 << 20, size - first)
    if fail:
        raise Damaged("the checkpoint")


def test_a_large_object_in_parts(server: S3Server) -> None:
    store, size = bucket(server, "parts").store, 40_000_000
    assert create_in_parts(store, "large", pieces(size), size, "s1")
    assert store.get("large") == b"".join(pieces(size))
    assert create_in_parts(store, "large", iter(()), size, "s1"), "is there: nothing is read again"
    assert not create_in_parts(store, "large", pieces(size), size, "s2")
    assert not create_in_parts(store, "large", pieces(5), 5, "s1")
    assert create_in_parts(store, "empty", iter(()), 0, "s1")
    assert store.get("empty") == b""


def unfinished(store: S3Store) -> list[str]:
    found = store.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return [upload["Key"] for upload in found]


def test_parts_of_what_failed_are_taken_back(server: S3Server) -> None:
    store = bucket(server, "failed").store
    with pytest.raises(Damaged):
        create_in_parts(store, "large", pieces(20_000_000, fail=True), 20_000_000, "s1")
    assert store.head("large") is None
    assert unfinished(store) == []


def test_a_lost_answer_to_the_last_part_is_found_out(server: S3Server) -> None:
    """The server did it, the answer never came: a second try hears that there is no such upload."""
    store = bucket(server, "lost").store
    lost = []

    def lose(**_: object) -> None:
        if not lost:
            lost.append(True)
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="here")

    store.client.meta.events.register("after-call.s3.CompleteMultipartUpload", lose)
    assert create_in_parts(store, "large", pieces(100), 100, "s1")
    assert lost
    assert store.get("large") == b"".join(pieces(100))


def test_two_exports_into_one_place_have_one_winner(server: S3Server) -> None:
    store = bucket(server, "two").store

    def overtaken() -> Iterator[bytes]:
        yield b"1" * 100
        assert create_in_parts(store, "large", iter([b"2" * 100]), 100, "other")

    assert not create_in_parts(store, "large", overtaken(), 100, "s1")
    assert store.get("large") == b"2" * 100
    assert unfinished(store) == []


def test_where_an_export_can_go(tmp_path: Path) -> None:
    found = target(str(tmp_path / "a b"))
    assert isinstance(found, Folder)
    assert found.path == tmp_path / "a b"
    assert isinstance(target("s3://bucket/p?region=us-east-1"), Bucket)
    with pytest.raises(StoreRefused, match="choose a folder"):
        target(str(tmp_path / ("x" * 300))).begin(["a"], "model")
    for wrong in ("memory:", "gs://bucket/x", ""):
        with pytest.raises(StoreRefused):
            target(wrong)
