"""Shards as files, and the order of samples as arithmetic."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.sample_order import SampleOrder
from tests.support.shards import masked_shard, read_shard
from trainer.dataset import HEADER_BYTES, DatasetRef, write_shard
from trainer.engine_path import engine_binary
from trainer.errors import DatasetError
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest


def ref(*shards: int, vocab: int = 300) -> DatasetRef:
    return DatasetRef("ab" * 32, vocab, 2 if vocab <= 65536 else 4, shards, "cd" * 32)


@pytest.mark.parametrize(("vocab", "size"), [(300, 2), (65536, 2), (65537, 4)])
def test_a_shard_reads_back(tmp_path: Path, vocab: int, size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab, 1000)
    tokens[0] = vocab - 1
    path = tmp_path / "00000.bin"
    write_shard(path, tokens, vocab)
    assert path.stat().st_size == HEADER_BYTES + size * 1000
    assert (read_shard(path) == tokens).all()


@pytest.mark.parametrize(("vocab", "size"), [(300, 2), (32768, 2), (32769, 4), (65537, 4)])
def test_a_mask_reads_back(tmp_path: Path, vocab: int, size: int) -> None:
    """It has room beside the largest token."""
    rng = np.random.default_rng(0)
    tokens, counts = rng.integers(0, vocab, 1000), rng.random(1000) < 0.5
    tokens[:2], counts[:2] = vocab - 1, (True, False)
    path = tmp_path / "00000.bin"
    write_shard(path, tokens, vocab, counts)
    assert path.stat().st_size == HEADER_BYTES + size * 1000
    found = masked_shard(path)
    assert (found[0] == tokens).all()
    assert (found[1] == counts).all()


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"token 300 of shard x.bin is outside the vocabulary 0\.\.299") as caught:
        write_shard(tmp_path / "x.bin", np.array([1, 300]), 300)
    assert caught.value.exit_code == 65
    with pytest.raises(DatasetError, match="token -1"):
        write_shard(tmp_path / "x.bin", np.array([-1]), 300)
    with pytest.raises(DatasetError, match="no token"):
        write_shard(tmp_path / "x.bin", np.array([], dtype=np.int64), 300)


def test_a_ref_is_checked() -> None:
    one = ref(10, 20)
    assert (one.tokens, one.samples(3)) == (30, 3 + 6)
    for field, value in (("digest", "xy"), ("vocab", 0), ("token_bytes", 3), ("shards", ()), ("eot", 300)):
        with pytest.raises(DatasetError):
            replace(one, **{field: value})
    with pytest.raises(DatasetError, match="cannot hold a vocabulary"):
        DatasetRef("ab" * 32, 65537, 2, (3,), "cd" * 32)
    with pytest.raises(DatasetError, match="no room for a mask beside a vocabulary of 32769"):
        DatasetRef("ab" * 32, 32769, 2, (3,), "cd" * 32, counted=1)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    sequence=st.integers(1, 5),
    block=st.integers(1, 9),
    window=st.integers(1, 4),
    seed=st.integers(0, 1 << 63),
)
def test_a_pass_visits_every_sample_of_its_blocks_once(
    shards: list[int], sequence: int, block: int, window: int, seed: int
) -> None:
    data = ref(*shards)
    total = data.samples(sequence)
    if total == 0:
        with pytest.raises(DatasetError, match="no shard holds a sample"):
            SampleOrder(data, sequence, seed)
        return
    order = SampleOrder(data, sequence, seed, True, block, window)
    usable = total // min(block, total) * min(block, total)
    for epoch in range(2):
        seen = [order.sample(epoch * usable + j) for j in range(usable)]
        assert len(set(seen)) == usable
        assert all(0 <= sample < total for sample in seen)
    in_order = SampleOrder(data, sequence, seed, False)
    assert [in_order.sample(i) for i in range(total + 1)] == [*range(total), 0]
    for sample in range(total):
        shard, token = order.locate(sample)
        assert token % sequence == 0
        assert token + sequence < data.shards[shard]


def test_a_window_keeps_its_samples_together() -> None:
    order = SampleOrder(ref(10_001), 10, 7, True, 8, 4)
    window = [order.sample(i) // 8 for i in range(32)]
    assert len(set(window)) == 4


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_engine_has_the_same_order(tmp_path: Path, shuffled: bool) -> None:
    data = ref(1000, 3, 777, 5000)
    spec = parse_spec(
        {
            "name": "order",
            "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 2, "context": 16},
            "data": {"shuffled": shuffled, "block": 7, "window": 3},
            "train": {"steps": 1, "batch": 1, "microbatch": 1, "sequence": 9, "seed": 12345678901},
        }
    ).resolve(data)
    path = tmp_path / "plan"
    path.write_bytes(compile_plan(spec, data, what_digest(spec, data)).to_bytes())
    order = SampleOrder(data, 9, 12345678901, shuffled, 7, 3)
    for first in (0, 700, 10**9):
        command = [engine_binary(), "order", "--plan", path, "--first", str(first), "--count", "900"]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert [int(line) for line in out.split()] == [order.sample(first + i) for i in range(900)]
