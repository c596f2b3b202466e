"""Datasets: from a corpus to token shards in the store, content-addressed.

``sources`` looks at a corpus and reads its documents, ``pieces`` cuts it, ``reading`` and ``encoding`` work on a piece,
``duplicates`` sees the whole, ``tokenizer`` trains or checks one, ``shards`` is the dataset in the store, ``prepare``
goes through all of it. Knows nothing of Prefect but in ``tasks``, which has pieces worked on by Prefect's tasks.
"""

from flows.data.prepare import interpreter_note, prepare
from flows.data.shards import PreparedData, load_dataset, load_tokenizer, tokenizer_json, validation_of
from flows.data.sources import Document, documents, stdlib_documents
from flows.data.tokenizer import may_end, parse_tokenizer, unseen, vocab_of

__all__ = [
    "Document",
    "PreparedData",
    "documents",
    "interpreter_note",
    "load_dataset",
    "load_tokenizer",
    "may_end",
    "parse_tokenizer",
    "prepare",
    "stdlib_documents",
    "tokenizer_json",
    "unseen",
    "validation_of",
    "vocab_of",
]
