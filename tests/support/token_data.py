"""Datasets of random tokens, as they lie in a store: no text, no tokenizer's work; leaves as small as a test needs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from checkpoint import codec, keys
from checkpoint.dataset import LEAF_ALIGN, ShardLeaves, ShardRow
from checkpoint.store import Store
from trainer.dataset import DatasetRef, Mixture, write_shard
from trainer.wire.order import MixPhase

VOCAB = 300
TOKENIZER = b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


def put_tokens(
    store: Store,
    shards: Sequence[int],
    *,
    seed: int = 0,
    leaf_bytes: int | None = LEAF_ALIGN,
    vocab: int = VOCAB,
    share: float | None = None,
) -> DatasetRef:
    """Shards of so many tokens. ``leaf_bytes``: None for a dataset of before there were leaves. ``share``: of the
    tokens that count; None for a dataset without a mask.
    """
    rng = np.random.default_rng(seed)
    files, counted = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in shards:
            path = Path(folder) / "shard"
            tokens, counts = rng.integers(0, vocab, count), None if share is None else rng.random(count) < share
            write_shard(path, tokens, vocab, counts)
            counted.append(None if counts is None else int(counts.sum()))
            files.append(path.read_bytes())
    tokenizer = hashlib.sha256(TOKENIZER).hexdigest()
    rows = [
        ShardRow(count, len(data), hashlib.sha256(data).hexdigest(), told).to_map()
        for count, data, told in zip(shards, files, counted, strict=True)
    ]
    version = 1 if share is None else 3
    manifest = codec.pack(
        {"v": version, "vocab": vocab, "token_bytes": 2, "eot": None, "shards": rows, "tokenizer_sha256": tokenizer}
    )
    digest = hashlib.sha256(manifest).hexdigest()
    for number, data in enumerate(files):
        store.create(keys.dataset_key(digest, keys.shard_name(number)), data)
        if leaf_bytes is not None:
            store.create(keys.leaves_key(digest, number), ShardLeaves.of([data], leaf_bytes).pack())
    store.create(keys.tokenizer_key(digest), TOKENIZER)
    store.create(keys.dataset_manifest_key(digest), manifest)
    total = None if share is None else sum(told or 0 for told in counted)
    return DatasetRef(digest, vocab, 2, tuple(shards), tokenizer, counted=total)


def put_mixture(store: Store, parts: Sequence[DatasetRef], phases: Sequence[MixPhase]) -> DatasetRef:
    """Of datasets that are in the store."""
    first = parts[0]
    manifest = codec.pack(
        {
            "v": 3 if any(part.masked for part in parts) else 2,
            "vocab": first.vocab,
            "token_bytes": 2,
            "eot": None,
            "parts": [{"digest": part.digest, "shards": _rows(store, part.digest)} for part in parts],
            "phases": [{"from_batch": p.from_batch, "weights": list(p.weights)} for p in phases],
            "tokenizer_sha256": first.tokenizer_digest,
        }
    )
    digest = hashlib.sha256(manifest).hexdigest()
    store.create(keys.tokenizer_key(digest), TOKENIZER)
    store.create(keys.dataset_manifest_key(digest), manifest)
    mix = Mixture(tuple((p.digest, len(p.shards)) for p in parts), tuple(phases))
    counted = sum(p.tokens if p.counted is None else p.counted for p in parts)
    total = counted if any(p.masked for p in parts) else None
    return replace(first, digest=digest, shards=tuple(t for p in parts for t in p.shards), mix=mix, counted=total)


def _rows(store: Store, digest: str) -> list[dict[str, object]]:
    manifest = codec.unpack(store.get(keys.dataset_manifest_key(digest)), "it", max_bytes=1 << 20)
    return list(manifest["shards"])


def held_bytes(path: Path) -> int:
    """Of a sparse file, without its first 4 KiB (its header stays): as large as its extents; what the file system needs
    to find those is not of it."""
    found = 0
    with path.open("rb") as file:
        end, at = path.stat().st_size, 0
        while at < end:
            try:
                first = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # holes up to the end
                break
            at = os.lseek(file.fileno(), first, os.SEEK_HOLE)
            found += max(0, at - max(first, 4096))
    return found
