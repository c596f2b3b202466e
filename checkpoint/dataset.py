"""The manifest of a prepared dataset: canonical msgpack under ``data/<digest>/manifest``, whose SHA-256 is the digest.

v 1
vocab, eot        size of the vocabulary; the token that ends a document, or None
token_bytes       of a stored token: 2 or 4
shards            [{tokens, bytes, sha256 (hex)}...] of ``00000.bin`` and on
tokenizer_sha256  of ``tokenizer.json`` (hex)
and what only says where it is from: inputs, documents (flows/data/shards.py writes it)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from checkpoint import codec, keys
from checkpoint.errors import Damaged
from checkpoint.store.base import Store

VERSION = 1
MAX_BYTES = 64 << 20
_MAX_SHARDS = 1 << 20


@dataclass(frozen=True)
class ShardRow:
    """A shard file: its tokens, its bytes with the header, their SHA-256 (hex)."""

    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetManifest:
    """What the manifest says, as far as it is used."""

    bytes: int
    """Of itself."""
    vocab: int
    token_bytes: int
    eot: int | None
    shards: tuple[ShardRow, ...]
    tokenizer_sha256: str


def load_dataset_manifest(store: Store, digest: str) -> DatasetManifest:
    """The manifest of the dataset of this digest. NotFound; Damaged where it does not hold; OtherVersion."""
    what = f"the manifest of dataset {digest[:12]}"
    data = store.get(keys.dataset_manifest_key(digest), max_bytes=MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise Damaged(f"{what} does not have the digest that names it")
    f = codec.Fields(codec.unpack(data, what, max_bytes=MAX_BYTES), what)
    f.version(VERSION)
    return DatasetManifest(
        bytes=len(data),
        vocab=f.integer("vocab", 1),
        token_bytes=f.integer("token_bytes", 1),
        eot=f.integer("eot", 0) if f.has("eot") else None,
        shards=tuple(
            _shard(row, f"{what}, shard {number}") for number, row in enumerate(f.array("shards", _MAX_SHARDS))
        ),
        tokenizer_sha256=f.hex("tokenizer_sha256"),
    )


def _shard(row: object, what: str) -> ShardRow:
    f = codec.Fields(row, what)
    return ShardRow(f.integer("tokens", 0), f.integer("bytes", 1), f.hex("sha256"))
