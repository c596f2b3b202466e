"""A dataset in the store: ``data/<digest>/{manifest,tokenizer.json,00000.bin,…,leaves/00000.bin,…}``, and
``data/inputs/<input digest>``, which names the dataset that these inputs gave. Every object is created once, its bytes
follow from its name.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.dataset import VERSION, Leaves, load_dataset_manifest
from checkpoint.errors import Damaged, NotFound
from checkpoint.store import Store
from flows.data.tokenizer import parse_tokenizer
from trainer.dataset import HEADER_BYTES, DatasetRef, token_bytes_for, write_shard
from trainer.errors import DatasetError

log = logging.getLogger(__name__)

TOKENIZER_CAP = 256 << 20
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MEND = "it is damaged; `hotstage data prepare SPEC --again` writes it anew"


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
    )


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


def known_dataset(store: Store, inputs: str) -> DatasetRef | None:
    """The dataset that these inputs gave before; None where there is none, or where an object of it is missing."""
    key = keys.inputs_key(inputs)
    try:
        digest = store.get(key, max_bytes=64).decode(errors="replace")
    except NotFound:
        return None
    if not _HEX64.fullmatch(digest):
        raise DatasetError(f"{key} does not name a dataset: {_MEND}")
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


def write_dataset(
    store: Store,
    tokens: npt.NDArray[np.uint32],
    tokenizer: Tokenizer,
    *,
    vocab: int,
    eot: int | None,
    shard_tokens: int,
    documents: int,
    inputs: str,
    mend: bool,
) -> DatasetRef:
    """Cut the tokens into shards and create every object under the digest of the manifest. ``mend``: replace those that
    are there with other bytes."""
    size = token_bytes_for(vocab)
    tokenizer_bytes = tokenizer.to_str().encode()
    with tempfile.TemporaryDirectory(prefix="hotstage-data-") as folder:
        shards = []
        for index, first in enumerate(range(0, len(tokens), shard_tokens)):
            path = Path(folder) / keys.shard_name(index)
            piece = tokens[first : first + shard_tokens].astype(np.uint16 if size == 2 else np.uint32)
            write_shard(path, piece, vocab)
            data = path.read_bytes()
            shards.append({"tokens": len(piece), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        manifest = pack(
            {
                "v": VERSION,
                "inputs": inputs,
                "documents": documents,
                "vocab": vocab,
                "token_bytes": size,
                "eot": eot,
                "shards": shards,
                "tokenizer_sha256": hashlib.sha256(tokenizer_bytes).hexdigest(),
            }
        )
        digest = hashlib.sha256(manifest).hexdigest()
        for index in range(len(shards)):
            name = keys.shard_name(index)
            data = (Path(folder) / name).read_bytes()
            _put(store, keys.dataset_key(digest, name), data, mend)
            _put(store, keys.leaves_key(digest, index), Leaves.of([data]).pack(), mend)
    _put(store, keys.tokenizer_key(digest), tokenizer_bytes, mend)
    _put(store, keys.dataset_manifest_key(digest), manifest, mend)
    _put(store, keys.inputs_key(inputs), digest.encode(), mend)
    return load_dataset(store, digest)


def _put(store: Store, key: str, data: bytes, mend: bool) -> None:
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
