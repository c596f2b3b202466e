"""A dataset in the store: ``data/<digest>/{manifest,tokenizer.json,00000.bin,…,leaves/00000.bin,…}``, and
``data/inputs/<input digest>``, which names the dataset that these inputs gave. Every object is created once, its bytes
follow from its name.

``data/inputs/…`` is 64 hex digits; where the corpus has a validation part it is a map, v 2: ``train`` and
``validation``, a digest each. Both have the same inputs and the same tokenizer.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.dataset import MASK_VERSION, VERSION, ShardLeaves, ShardRow, load_dataset_manifest
from checkpoint.errors import Damaged, NotFound
from checkpoint.store import Data, Store
from flows.data.job import DataJob, store_of
from flows.data.tokenizer import parse_tokenizer
from trainer import wire
from trainer.dataset import (
    HEADER_BYTES,
    DatasetRef,
    Mixture,
    check_tokens,
    counts_of,
    new_shard,
    shard_bytes,
    token_bytes_for,
    without_mask,
)
from trainer.errors import DatasetError
from trainer.wire.order import MixPhase
from trainer.wire.packed import unpack
from trainer.wire.unreadable import Unreadable

log = logging.getLogger(__name__)

TOKENIZER_CAP = 256 << 20
PAIR_VERSION = 2
_PAIR_CAP = 1024
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MEND = "it is damaged; `hotstage data prepare SPEC --again` writes it anew"


@dataclass(frozen=True)
class PreparedData:
    """What a corpus gave: the dataset to train on, and the one to validate on where the spec asks for one."""

    train: DatasetRef
    validation: DatasetRef | None = None


def load_dataset(store: Store, digest: str) -> DatasetRef:
    """The dataset of that digest. Raises DatasetError where it is missing or its manifest is not what its name says."""
    try:
        manifest = load_dataset_manifest(store, digest)
    except NotFound:
        raise DatasetError(
            f"dataset {digest[:12]}… is not in {store.describe()}; run `hotstage data prepare SPEC` there"
        ) from None
    except Damaged as error:
        raise DatasetError(f"{error}: {_MEND}") from error
    return DatasetRef(
        digest=digest,
        vocab=manifest.vocab,
        token_bytes=manifest.token_bytes,
        shards=tuple(shard.tokens for shard in manifest.shards),
        tokenizer_digest=manifest.tokenizer_sha256,
        eot=manifest.eot,
        begin=manifest.begin,
        counted=counted_of(manifest.shards),
        mix=Mixture(manifest.parts, tuple(MixPhase(*phase) for phase in manifest.phases)) if manifest.parts else None,
    )


def counted_of(rows: Sequence[ShardRow]) -> int | None:
    """Tokens whose prediction counts, in these shards; None where none of them has a mask."""
    if all(row.counted is None for row in rows):
        return None
    return sum(row.tokens if row.counted is None else row.counted for row in rows)


def validation_of(store: Store, dataset: DatasetRef) -> DatasetRef | None:
    """The validation part that was split off the corpus of a dataset; None where none was."""
    inputs = load_dataset_manifest(store, dataset.digest).inputs
    pair = None if inputs is None else _named(store, inputs)
    if pair is None or pair[1] is None or pair[0] != dataset.digest:
        return None
    return load_dataset(store, pair[1])


def tokenizer_json(store: Store, dataset: DatasetRef) -> bytes:
    """The tokenizer.json of a dataset, its digest checked."""
    try:
        data = store.get(keys.tokenizer_key(dataset.digest), max_bytes=TOKENIZER_CAP)
    except NotFound:
        raise DatasetError(f"the tokenizer of dataset {dataset.digest[:12]}… is missing: {_MEND}") from None
    if hashlib.sha256(data).hexdigest() != dataset.tokenizer_digest:
        raise DatasetError(f"the tokenizer of dataset {dataset.digest[:12]}… does not have its digest: {_MEND}")
    return data


def load_tokenizer(store: Store, dataset: DatasetRef) -> Tokenizer:
    """The tokenizer of a dataset, its digest checked."""
    return parse_tokenizer(tokenizer_json(store, dataset), f"the tokenizer of dataset {dataset.digest[:12]}…")


def known_dataset(store: Store, inputs: str) -> PreparedData | None:
    """What these inputs gave before; None where there is nothing, or where an object of it is missing."""
    pair = _named(store, inputs)
    if pair is None:
        return None
    found = [None if digest is None else _whole(store, digest) for digest in pair]
    if found[0] is None or (pair[1] is not None and found[1] is None):
        return None
    return PreparedData(found[0], found[1])


def _named(store: Store, inputs: str) -> tuple[str, str | None] | None:
    """The digests that these inputs gave: of the dataset, and of its validation part."""
    key = keys.inputs_key(inputs)
    try:
        data = store.get(key, max_bytes=_PAIR_CAP)
    except NotFound:
        return None
    if _HEX64.fullmatch(data.decode(errors="replace")):
        return data.decode(), None
    try:
        value = unpack(data, max_bytes=_PAIR_CAP)
    except Unreadable:
        value = None
    found = [str(value.get(name)) for name in ("train", "validation")] if isinstance(value, dict) else []
    if len(found) != 2 or not all(_HEX64.fullmatch(digest) for digest in found):
        raise DatasetError(f"{key} does not name a dataset: {_MEND}")
    return found[0], found[1]


def _whole(store: Store, digest: str) -> DatasetRef | None:
    if store.head(keys.dataset_manifest_key(digest)) is None:
        return None
    dataset = load_dataset(store, digest)
    for number, tokens in enumerate(dataset.shards):
        name = keys.dataset_key(digest, keys.shard_name(number))
        size = HEADER_BYTES + tokens * dataset.token_bytes
        info = store.head(name)
        if info is None:
            return None
        if info.bytes != size:
            raise DatasetError(f"{name} has {info.bytes} bytes, its manifest says {size}: {_MEND}")
    if store.head(keys.tokenizer_key(digest)) is None:
        return None
    load_tokenizer(store, dataset)
    return dataset


# --- made of pieces -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenSpan:
    """Tokens of a part: ``count`` from ``first`` on."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Shard:
    """A shard of a dataset, and where its tokens are; ``digest``: the dataset's, once it is known."""

    job: DataJob
    number: int
    stage: str
    spans: tuple[TokenSpan, ...]
    vocab: int
    digest: str = ""
    into: str = ""
    """Of the store of the dataset."""
    mend: bool = False

    @property
    def tokens(self) -> int:
        return sum(span.count for span in self.spans)


def spread(counts: Sequence[tuple[str, int]], shard_tokens: int) -> list[tuple[TokenSpan, ...]]:
    """Parts with so many tokens each, in order, over shards of ``shard_tokens``; pure.

    >>> [[(s.name, s.first, s.count) for s in spans] for spans in spread([("a", 3), ("b", 4)], 5)]
    [[('a', 0, 3), ('b', 0, 2)], [('b', 2, 2)]]
    """
    shards: list[tuple[TokenSpan, ...]] = []
    spans: list[TokenSpan] = []
    room = shard_tokens
    for name, count in counts:
        at = 0
        while at < count:
            take = min(room, count - at)
            spans.append(TokenSpan(name, at, take))
            at, room = at + take, room - take
            if not room:
                shards.append(tuple(spans))
                spans, room = [], shard_tokens
    return [*shards, tuple(spans)] if spans else shards


def sum_shard(shard: Shard) -> dict[str, Any]:
    """A shard's row of the manifest."""
    return _row(_shard_of(shard))


def put_shard(shard: Shard) -> dict[str, Any]:
    """Create a shard of the dataset."""
    _put_shard(store_of(shard.into), shard.digest, shard.number, _shard_of(shard), shard.mend)
    return {}


def _shard_of(shard: Shard) -> bytearray:
    size, at = token_bytes_for(shard.vocab, shard.job.room), 0
    whole, tokens = new_shard(shard.tokens, shard.vocab, size, shard.job.masked)
    for span in shard.spans:
        data = shard.job.work.get(shard.stage, span.name, first=span.first * size, length=span.count * size)
        tokens[at : at + span.count] = np.frombuffer(data, tokens.dtype)
        at += span.count
    check_tokens(without_mask(tokens) if shard.job.masked else tokens, shard.vocab, keys.shard_name(shard.number))
    return whole


def manifest_bytes(
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: bytes,
    vocab: int,
    token_bytes: int,
    eot: int | None,
    documents: int,
    inputs: str,
    begin: int | None = None,
    talk: Mapping[str, Any] | None = None,
) -> bytes:
    """The manifest of a dataset; its SHA-256 is the digest."""
    return pack(
        {
            "v": MASK_VERSION if any("counted" in row for row in rows) else VERSION,
            "inputs": inputs,
            "documents": documents,
            "vocab": vocab,
            "token_bytes": token_bytes,
            "eot": eot,
            **({} if begin is None else {"begin": begin}),
            **({} if talk is None else {"talk": dict(talk)}),
            "shards": list(rows),
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        }
    )


def commit_datasets(
    store: Store, manifests: Sequence[bytes], tokenizer: bytes, inputs: str, mend: bool
) -> Iterator[DatasetRef]:
    """Create what is left once all shards are there, and name the dataset (or the two) by the inputs."""
    digests = [hashlib.sha256(manifest).hexdigest() for manifest in manifests]
    for digest, manifest in zip(digests, manifests, strict=True):
        put(store, keys.tokenizer_key(digest), tokenizer, mend)
        put(store, keys.dataset_manifest_key(digest), manifest, mend)
    named = digests[0].encode()
    if len(digests) > 1:
        named = pack({"v": PAIR_VERSION, "train": digests[0], "validation": digests[1]})
    put(store, keys.inputs_key(inputs), named, mend)
    return (load_dataset(store, digest) for digest in digests)


def write_dataset(
    store: Store,
    tokens: npt.NDArray[Any],
    tokenizer: Tokenizer,
    *,
    vocab: int,
    eot: int | None,
    shard_tokens: int,
    documents: int,
    inputs: str,
    mend: bool,
) -> DatasetRef:
    """A dataset of tokens that are in memory. ``mend``: replace objects that are there with other bytes."""
    data = [
        shard_bytes(tokens[first : first + shard_tokens], vocab, keys.shard_name(number))
        for number, first in enumerate(range(0, len(tokens), shard_tokens))
    ]
    text = tokenizer.to_str().encode()
    rows = [_row(shard) for shard in data]
    size = token_bytes_for(vocab)
    manifest = manifest_bytes(
        rows, tokenizer=text, vocab=vocab, token_bytes=size, eot=eot, documents=documents, inputs=inputs
    )
    digest = hashlib.sha256(manifest).hexdigest()
    for number, shard in enumerate(data):
        _put_shard(store, digest, number, shard, mend)
    (dataset,) = commit_datasets(store, [manifest], text, inputs, mend)
    return dataset


def _put_shard(store: Store, digest: str, number: int, data: Data, mend: bool) -> None:
    put(store, keys.dataset_key(digest, keys.shard_name(number)), data, mend)
    put(store, keys.leaves_key(digest, number), ShardLeaves.of([memoryview(data)]).pack(), mend)


def _row(data: bytes | bytearray) -> dict[str, Any]:
    header, counted = wire.ShardHeader.from_buffer_copy(data), None
    if header.version == wire.SHARD_MASKED:
        tokens = np.frombuffer(data, f"<u{header.token_bytes}", offset=HEADER_BYTES)
        counted = int(counts_of(tokens).sum())
    return ShardRow(header.tokens, len(data), hashlib.sha256(data).hexdigest(), counted).to_map()


def put(store: Store, key: str, data: Data, mend: bool) -> None:
    """Create an object whose bytes follow from its key. Other bytes there are damage: told, or replaced (``mend``)."""
    if store.create(key, data):
        return
    if store.get(key) == data:
        return
    if not mend:
        raise DatasetError(f"{key} is not what it should be: {_MEND}")
    log.warning("%s was damaged and is written anew", key)
    store.delete(key)
    store.create(key, data)
