"""From a spec's data to a dataset: documents, tokenizer, tokens, shards.

The same inputs give the same bytes on every machine: files are read in the order of their names, the tokenizer is
trained on one thread's order, and every object is created once under the digest of the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoint.store import Store
from flows.data.shards import known_dataset, load_dataset, write_dataset
from flows.data.sources import Document, documents
from flows.data.tokenizer import EOT, GivenTokenizer, encode, given_tokenizer, train_tokenizer, vocab_of
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec, too_short

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS, _BATCH_LETTERS = 256, 8 << 20
_MANY_UNKNOWN = 0.01  # share of unknown tokens that is worth a word
Say = Callable[[str], None]


def prepare(
    spec: DataSpec, store: Store, *, say: Say = log.info, again: bool = False, sequence: int | None = None
) -> DatasetRef:
    """Make the spec's dataset in the store, or find it there. ``again`` makes it anew, checks every object of it and
    replaces those that are not what they should be. ``sequence``: what the run needs a shard to hold; nothing is
    written where none does.

    Raises DatasetError for an empty corpus, a damaged dataset, or a tokenizer that does not fit; SpecError where no
    sample can be had; StoreError from the store.
    """
    if spec.source.startswith("dataset:"):
        return load_dataset(store, spec.source.removeprefix("dataset:"))
    docs = list(documents(spec.source))
    if not any(doc.text.strip() for doc in docs):
        raise DatasetError(f"data.source {spec.source!r} has no text in it; the corpus is empty")
    given = given_tokenizer(spec)
    inputs = _input_digest(docs, spec, given)
    known = None if again else known_dataset(store, inputs)
    if known is not None:
        say(f"data: {known.digest[:12]} is already there ({known.tokens:,} tokens)")
        _long_enough(known.shards, sequence)
        return known
    size = sum(len(doc.text) for doc in docs)
    say(f"data: {len(docs):,} documents, {size / 1e6:.1f} MB of text from {spec.source}")
    if given is None:
        say(f"data: training a byte-level BPE tokenizer of {spec.vocab_size:,} entries")
        tokenizer = _train(docs, size, spec.vocab_size, say)
    else:
        tokenizer = given.tokenizer
        if tokenizer.normalizer is not None:
            say(f"data: {given.what} changes the text before it encodes it ({type(tokenizer.normalizer).__name__})")
    end = EOT if given is None else given.end
    eot = None if end is None else tokenizer.token_to_id(end)
    tokens = _encode(docs, size, tokenizer, given, eot, say)
    pieces = [min(spec.shard_tokens, len(tokens) - first) for first in range(0, len(tokens), spec.shard_tokens)]
    _long_enough(pieces, sequence)
    dataset = write_dataset(
        store,
        tokens,
        tokenizer,
        vocab=vocab_of(tokenizer),
        eot=eot,
        shard_tokens=spec.shard_tokens,
        documents=len(docs),
        inputs=inputs,
        mend=again,
    )
    say(f"data: {len(tokens):,} tokens in {len(dataset.shards)} shard(s), dataset {dataset.digest[:12]}")
    return dataset


def _input_digest(docs: Sequence[Document], spec: DataSpec, given: GivenTokenizer | None) -> str:
    h = hashlib.sha256(b"hotstage dataset inputs v1\n")
    # without data.end_token a tokenizer that lacks EOT ended documents with nothing: that is end_token "" now
    end = EOT if given is None or (given.end is None and given.tokenizer.token_to_id(EOT) is None) else given.end
    settings = {"vocab_size": spec.vocab_size, "shard_tokens": spec.shard_tokens, "eot": end}
    h.update(json.dumps(settings, sort_keys=True).encode())
    h.update(given.digest if given else b"train")
    for doc in docs:  # not their names: where a corpus lies changes nothing
        h.update(hashlib.sha256(doc.text.encode("utf-8", "surrogatepass")).digest())
    return h.hexdigest()


def _long_enough(shards: Sequence[int], sequence: int | None) -> None:
    problem = None if sequence is None else too_short(shards, sequence)
    if problem is not None:
        raise SpecError(problem)


def _train(docs: Sequence[Document], size: int, vocab_size: int, say: Say) -> Tokenizer:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for doc in docs:
            yield doc.text
            read += len(doc.text)

    def where() -> str:
        return f"{read / max(size, 1):.0%} of the text read" if read < size else "the text is read, pairs are merged"

    with telling(say, lambda: f"data: training the tokenizer: {where()}"):
        return train_tokenizer(texts(), vocab_size)


def _encode(
    docs: Sequence[Document], size: int, tokenizer: Tokenizer, given: GivenTokenizer | None, eot: int | None, say: Say
) -> npt.NDArray[np.uint32]:
    """The tokens of all documents, each followed by ``eot`` where there is one."""
    parts: list[npt.NDArray[np.uint32]] = []
    done = texts = 0
    end = None if eot is None else np.asarray([eot], dtype=np.uint32)
    with telling(say, lambda: f"data: encoding: {done / max(size, 1):.0%} of the text"):
        for batch in _batches(docs):
            for ids in encode(given, tokenizer, batch):
                parts.append(np.asarray(ids, dtype=np.uint32))
                texts += len(ids)
                if end is not None:
                    parts.append(end)
            done += sum(len(doc.text) for doc in batch)
    if texts == 0:
        raise DatasetError(
            f"{given.what if given else 'the tokenizer'} cannot encode this corpus: {size:,} characters give no token; "
            "give a tokenizer that was made for such text"
        )
    tokens = np.concatenate(parts)
    _known_enough(tokens, texts, given)
    return tokens


def _batches(docs: Sequence[Document]) -> Iterator[Sequence[Document]]:
    batch: list[Document] = []
    letters = 0
    for doc in docs:
        batch.append(doc)
        letters += len(doc.text)
        if len(batch) == _BATCH_DOCUMENTS or letters >= _BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _known_enough(tokens: npt.NDArray[np.uint32], texts: int, given: GivenTokenizer | None) -> None:
    """Refuse a tokenizer that knows nothing of the text, and say where it knows little."""
    if given is None or (unknown := given.unknown) is None:
        return
    count = int((tokens == unknown).sum())
    if count >= texts:
        raise DatasetError(
            f"{given.what} cannot encode this corpus: every token of it is the unknown one; give a tokenizer that was "
            "made for such text"
        )
    if count > _MANY_UNKNOWN * texts:
        log.warning("%s: %.1f %% of the tokens are unknown to it (token %d)", given.what, 100 * count / texts, unknown)


@contextlib.contextmanager
def telling(say: Say, text: Callable[[], str], every_s: float = 10.0) -> Iterator[None]:
    """Say where a long call stands every ``every_s`` seconds, from a thread: the call may be one of a library."""
    done, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every_s):
            say(f"{text()} ({time.monotonic() - begin:.0f} s)")

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def interpreter_note() -> str:
    """What the default corpus is, for reports: it differs between versions of Python."""
    return f"the standard library of Python {sys.version.split()[0]}"
