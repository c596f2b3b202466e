"""Datasets: from a corpus to token shards in the store, content-addressed.

``paths`` finds files, ``sources`` reads documents, ``tokenizer`` trains or checks one, ``shards`` is the dataset in the
store, ``prepare`` goes through all four. Knows nothing of Prefect; ``flows/flow.py`` wraps it in tasks.
"""

from flows.data.prepare import interpreter_note, prepare
from flows.data.shards import load_dataset, load_tokenizer, tokenizer_json
from flows.data.sources import Document, documents, stdlib_documents
from flows.data.tokenizer import parse_tokenizer

__all__ = [
    "Document",
    "documents",
    "interpreter_note",
    "load_dataset",
    "load_tokenizer",
    "parse_tokenizer",
    "prepare",
    "stdlib_documents",
    "tokenizer_json",
]
