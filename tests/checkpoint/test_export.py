"""Export: the file opens in the safetensors library with the saved bits, memory stays small, no half file stays."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from checkpoint import keys
from checkpoint.chunks import Chunk, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.errors import Damaged, StoreRefused, StoreUnavailable
from checkpoint.export import Buffer, ExportTensor, Read, export_safetensors, safetensors_header, whole
from checkpoint.log import RunLog
from checkpoint.manifest import Manifest, PartManifest, merge
from checkpoint.store import Store
from checkpoint.store.file import FileStore
from tests.checkpoint.samples import TENSORS, WHAT, attempt_body, save, state_bytes

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
    path = export_safetensors(
        store,
        manifest,
        tensors,
        tmp_path / "out",
        texts={"config.json": "{}", "tokenizer.json": b"[]"},
        metadata={"k": "v"},
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
        export_safetensors(store, manifest, [ExportTensor("b", (8,), whole("b"))], tmp_path / "o", texts={})
    assert list((tmp_path / "o").iterdir()) == []
    with pytest.raises(ValueError, match="does not stand in the folder"):
        export_safetensors(store, manifest, [], tmp_path / "o", texts={"../x": "y"})


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
            files, manifest, [ExportTensor(t.name, t.shape, whole(t.name)) for t in TENSORS], tmp_path / "o", texts={}
        )
    assert list((tmp_path / "o").iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = saved
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreRefused, match="choose a folder"):
        export_safetensors(store, manifest, [], tmp_path / "file", texts={})
    if os.path.exists("/dev/full"):

        def full(_: Read) -> Iterator[Buffer]:
            raise OSError(28, "No space left on device")
            yield b""

        with pytest.raises(StoreUnavailable, match="nothing was left half written"):
            export_safetensors(store, manifest, [ExportTensor("a", (1,), full)], tmp_path / "o", texts={})


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
        path = export_safetensors(store, manifest, tensors, tmp_path / "o", texts={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 240_000_000
    assert peak < 48 << 20
