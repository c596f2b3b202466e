"""Data preparation: text -> byte-level BPE tokenizer -> token shards -> manifest, content-addressed in the store.

Owns ``<root>/data/``: ``inputs/<input digest>`` (names the dataset that these inputs gave, so that a second run skips
the work), ``<dataset digest>/{manifest,tokenizer.json,00000.bin,…}``. Knows nothing of Prefect; ``flows/flow.py``
wraps it in tasks. The same inputs give the same bytes on every machine: files are read in the order of their names,
the tokenizer is trained on one thread's order, and every object is created once under the digest of the whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint.codec import pack, unpack
from checkpoint.errors import NotFound
from checkpoint.store import Store
from trainer.dataset import HEADER_BYTES, DatasetRef, write_shard
from trainer.errors import DatasetError
from trainer.spec import DataSpec

log = logging.getLogger(__name__)

EOT = "<|endoftext|>"
# of the standard library: tests, what installers bring, and tables that a generator wrote
_SKIP_PARTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
_SKIP_FILES = {
    "topics.py",
    "_pydecimal.py",
    "_sysconfigdata",
    "pyodide",
    "stringprep.py",
    "entities.py",
    "keyword.py",
    "token.py",
}
MANIFEST_CAP = 16 << 20
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MEND = "it is damaged; `hotstage data prepare SPEC --again` writes it anew"


@dataclass(frozen=True)
class Document:
    """One text of the corpus: a name that is the same on every machine, and its text."""

    name: str
    text: str


def stdlib_documents() -> Iterator[Document]:
    """The standard library of the running interpreter: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIP_PARTS.intersection(relative.parts) or any(path.name.startswith(s) for s in _SKIP_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding
        if text.strip():
            yield Document(relative.as_posix(), text)


def documents(source: str) -> Iterator[Document]:
    """The documents of a spec's ``data.source``, in a fixed order.

    Raises DatasetError (exit 65) for an unknown kind, a pattern that matches nothing, or a line that is no JSON object
    with a text.
    """
    kind, _, pattern = source.partition(":")
    if source == "python-stdlib":
        yield from stdlib_documents()
        return
    if kind not in ("text", "jsonl"):
        raise DatasetError(
            f"data.source is {source!r}; known are python-stdlib, text:GLOB, jsonl:GLOB and dataset:DIGEST"
        )
    paths = sorted(p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if Path(p).is_file())
    if not paths:
        raise DatasetError(
            f"data.source {source!r} matches no file; check the pattern (it is taken from {os.getcwd()})"
        )
    for name in paths:
        if kind == "text":
            yield Document(name, Path(name).read_text(encoding="utf-8", errors="replace"))
            continue
        with open(name, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                yield Document(f"{name}:{number}", _text_of(line, f"{name}:{number}"))


def _text_of(line: str, where: str) -> str:
    """The text of a JSON line, or DatasetError."""
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError(f"its text is {type(text).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f'{where} is no JSON object with a "text"; mend the line or use text:GLOB') from error
    return text


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: 256 bytes, the end-of-text mark, and merges up to ``vocab_size`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _input_digest(docs: Sequence[Document], spec: DataSpec, tokenizer: bytes | None) -> str:
    h = hashlib.sha256(b"hotstage dataset inputs v1\n")
    settings = {"vocab_size": spec.vocab_size, "shard_tokens": spec.shard_tokens, "eot": EOT}
    h.update(json.dumps(settings, sort_keys=True).encode())
    h.update(hashlib.sha256(tokenizer).digest() if tokenizer else b"train")
    for doc in docs:  # not their names: where a corpus lies changes nothing
        h.update(hashlib.sha256(doc.text.encode("utf-8", "surrogatepass")).digest())
    return h.hexdigest()


def load_dataset(store: Store, digest: str) -> DatasetRef:
    """The dataset of that digest. Raises DatasetError where it is missing or its manifest is not what its name says."""
    try:
        data = store.get(f"data/{digest}/manifest", max_bytes=MANIFEST_CAP)
    except NotFound:
        raise DatasetError(
            f"dataset {digest[:12]}… is not in {store.describe()}; run `hotstage data prepare SPEC` there"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise DatasetError(f"the manifest of dataset {digest[:12]}… does not have its digest: {_MEND}")
    manifest = unpack(data, f"manifest of dataset {digest[:12]}", max_bytes=MANIFEST_CAP)
    return DatasetRef(
        digest=digest,
        vocab=manifest["vocab"],
        token_bytes=manifest["token_bytes"],
        shards=tuple(s["tokens"] for s in manifest["shards"]),
        tokenizer_digest=manifest["tokenizer_sha256"],
        eot=manifest["eot"],
    )


def tokenizer_json(store: Store, dataset: DatasetRef) -> bytes:
    """The tokenizer.json of a dataset, its digest checked."""
    try:
        data = store.get(f"data/{dataset.digest}/tokenizer.json", max_bytes=256 << 20)
    except NotFound:
        raise DatasetError(f"the tokenizer of dataset {dataset.digest[:12]}… is missing: {_MEND}") from None
    if hashlib.sha256(data).hexdigest() != dataset.tokenizer_digest:
        raise DatasetError(f"the tokenizer of dataset {dataset.digest[:12]}… does not have its digest: {_MEND}")
    return data


def load_tokenizer(store: Store, dataset: DatasetRef) -> Tokenizer:
    """The tokenizer of a dataset, its digest checked."""
    return Tokenizer.from_str(tokenizer_json(store, dataset).decode())


def prepare(
    spec: DataSpec,
    store: Store,
    *,
    say: Callable[[str], None] = log.info,
    again: bool = False,
) -> DatasetRef:
    """Make the spec's dataset in the store, or find it there. ``again`` makes it anew, checks every object of it and
    replaces those that are not what they should be.

    Raises DatasetError for an empty corpus, a damaged dataset, or a token beyond the vocabulary; StoreError from the
    store.
    """
    if spec.source.startswith("dataset:"):
        return load_dataset(store, spec.source.removeprefix("dataset:"))
    docs = list(documents(spec.source))
    if not any(doc.text.strip() for doc in docs):
        raise DatasetError(f"data.source {spec.source!r} has no text in it; the corpus is empty")
    given = _given_tokenizer(spec)
    inputs = _input_digest(docs, spec, given)
    known = None if again else _known(store, inputs)
    if known is not None:
        say(f"data: {known.digest[:12]} is already there ({known.tokens:,} tokens)")
        return known
    size = sum(len(doc.text) for doc in docs)
    say(f"data: {len(docs):,} documents, {size / 1e6:.1f} MB of text from {spec.source}")
    if given is None:
        say(f"data: training a byte-level BPE tokenizer of {spec.vocab_size:,} entries")
        tokenizer = train_tokenizer([doc.text for doc in docs], spec.vocab_size)
    else:
        tokenizer = _parse_tokenizer(given, f"data.tokenizer {spec.tokenizer!r}")
    return _shard(docs, tokenizer, spec, store, inputs, say, mend=again)


def _known(store: Store, inputs: str) -> DatasetRef | None:
    """The dataset that these inputs gave before; None where there is none, or where an object of it is missing."""
    key = f"data/inputs/{inputs}"
    try:
        digest = store.get(key, max_bytes=64).decode(errors="replace")
    except NotFound:
        return None
    if not _HEX64.fullmatch(digest):
        raise DatasetError(f"{key} does not name a dataset: {_MEND}")
    if store.head(f"data/{digest}/manifest") is None:
        return None
    dataset = load_dataset(store, digest)
    for number, tokens in enumerate(dataset.shards):
        name, size = f"data/{digest}/{number:05d}.bin", HEADER_BYTES + tokens * dataset.token_bytes
        info = store.head(name)
        if info is None:
            return None
        if info.bytes != size:
            raise DatasetError(f"{name} has {info.bytes} bytes, its manifest says {size}: {_MEND}")
    if store.head(f"data/{digest}/tokenizer.json") is None:
        return None
    load_tokenizer(store, dataset)
    return dataset


def _parse_tokenizer(data: bytes, what: str) -> Tokenizer:
    """A tokenizer from its JSON, without the truncation and padding that it may ask for."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception
        raise DatasetError(f"{what} does not load: {error}; give a tokenizer.json of the tokenizers library") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _given_tokenizer(spec: DataSpec) -> bytes | None:
    if spec.tokenizer is None:
        return None
    path = Path(os.path.expanduser(spec.tokenizer))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"data.tokenizer {spec.tokenizer!r} cannot be read: {error.strerror}; give a tokenizer.json"
        ) from error


def _shard(
    docs: Sequence[Document],
    tokenizer: Tokenizer,
    spec: DataSpec,
    store: Store,
    inputs: str,
    say: Callable[[str], None],
    *,
    mend: bool,
) -> DatasetRef:
    """Encode, cut into shards, and create every object under the digest of the manifest."""
    vocab = tokenizer.get_vocab_size()
    eot = tokenizer.token_to_id(EOT)
    parts: list[np.ndarray] = []
    for first in range(0, len(docs), 256):
        for encoding in tokenizer.encode_batch(
            [doc.text for doc in docs[first : first + 256]], add_special_tokens=False
        ):
            parts.append(np.asarray(encoding.ids, dtype=np.uint32))
            if eot is not None:
                parts.append(np.asarray([eot], dtype=np.uint32))
    tokens = np.concatenate(parts)
    if int(tokens.max()) >= vocab:
        raise DatasetError(
            f"token {int(tokens.max())} is beyond the vocabulary of {vocab}; the tokenizer is inconsistent"
        )
    token_bytes = 2 if vocab <= 1 << 16 else 4
    tokenizer_bytes = tokenizer.to_str().encode()
    with tempfile.TemporaryDirectory(prefix="hotstage-data-") as folder:
        shards = []
        for index, first in enumerate(range(0, len(tokens), spec.shard_tokens)):
            path = Path(folder) / f"{index:05d}.bin"
            piece = tokens[first : first + spec.shard_tokens].astype(np.uint16 if token_bytes == 2 else np.uint32)
            write_shard(path, piece, vocab)
            data = path.read_bytes()
            shards.append({"tokens": len(piece), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        manifest = pack(
            {
                "v": 1,
                "inputs": inputs,
                "documents": len(docs),
                "vocab": vocab,
                "token_bytes": token_bytes,
                "eot": eot,
                "shards": shards,
                "tokenizer_sha256": hashlib.sha256(tokenizer_bytes).hexdigest(),
            }
        )
        digest = hashlib.sha256(manifest).hexdigest()
        for index in range(len(shards)):
            _put(store, f"data/{digest}/{index:05d}.bin", (Path(folder) / f"{index:05d}.bin").read_bytes(), mend)
    _put(store, f"data/{digest}/tokenizer.json", tokenizer_bytes, mend)
    _put(store, f"data/{digest}/manifest", manifest, mend)
    _put(store, f"data/inputs/{inputs}", digest.encode(), mend)
    say(f"data: {len(tokens):,} tokens in {len(shards)} shard(s), dataset {digest[:12]}")
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


def interpreter_note() -> str:
    """What the default corpus is, for reports: it differs between versions of Python."""
    return f"the standard library of Python {sys.version.split()[0]}"
