"""A tokenizer without a corpus, as a dataset: what weights from elsewhere have until somebody trains on them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer

from checkpoint.store import Store
from flows.data.shards import write_dataset
from flows.data.tokenizer import parse_tokenizer, vocab_of
from trainer.dataset import DatasetRef


def tokenizer_alone(store: Store, tokenizer: Tokenizer, eot: int | None, sequence: int) -> DatasetRef:
    """A dataset of one sample, all of it the end token (or token 0); the same tokenizer gives the same one."""
    text = tokenizer.to_str()
    again = parse_tokenizer(text.encode(), "the tokenizer")
    settings = {"sequence": sequence, "eot": eot}
    inputs = hashlib.sha256(b"hotstage tokenizer alone v1\n" + json.dumps(settings, sort_keys=True).encode())
    inputs.update(text.encode())
    return write_dataset(
        store,
        np.full(sequence + 1, eot or 0, dtype=np.uint32),
        again,
        vocab=vocab_of(again),
        eot=eot,
        shard_tokens=sequence + 1,
        documents=0,
        inputs=inputs.hexdigest(),
        mend=False,
    )
