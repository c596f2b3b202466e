"""Sources of a corpus, by the kind that ``data.source`` names: a file each.

``base`` says what they all give, ``files`` and ``objects`` where bytes come from, ``paths`` what a pattern means.
"""

from __future__ import annotations

from collections.abc import Iterator

from flows.data.sources.base import Borne, CorpusSource, Document, Entry
from flows.data.sources.code import CodeSource, StdlibSource
from flows.data.sources.jsonl import JsonSource
from flows.data.sources.tables import HubSource, ParquetSource
from flows.data.sources.talk import ChatForm, TalkReader
from flows.data.sources.text import TextSource
from trainer.errors import DatasetError
from trainer.spec import DataSpec

__all__ = ["Borne", "CorpusSource", "Document", "Entry", "documents", "open_source", "stdlib_documents"]

KINDS = "python-stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, code:FOLDER, hf:DATASET and dataset:DIGEST"


def open_source(spec: DataSpec, form: ChatForm | None = None) -> CorpusSource:
    """The source that a spec names; ``form``: how its conversations are written, which reading them needs. SpecError
    where what reads it is not installed."""
    source, kind = spec.source, spec.source.partition(":")[0]
    more = spec.filter.columns if spec.filter is not None else ()
    talk = None if spec.messages is None else TalkReader(spec.messages, form)
    if source == "python-stdlib":
        return StdlibSource()
    if kind == "text":
        return TextSource(source)
    if kind == "jsonl":
        return JsonSource(source, spec.field, spec.prompt_field, more is None or bool(more), talk)
    if kind == "parquet":
        return ParquetSource(source, spec.field, spec.prompt_field, more, talk)
    if kind == "code":
        return CodeSource(source)
    if kind == "hf":
        return HubSource(source, spec.field, spec.prompt_field, more, talk)
    raise DatasetError(f"data.source is {source!r}; known are {KINDS}")


def documents(spec: DataSpec | str, form: ChatForm | None = None) -> Iterator[Document]:
    """The documents of a spec's source, in order. Raises DatasetError (exit 65) for what cannot be read."""
    if isinstance(spec, str):
        spec = DataSpec.model_construct(source=spec, field="text", prompt_field=None, messages=None, filter=None)
    source, borne = open_source(spec, form), Borne()
    for entry in source.look():
        yield from source.read(entry, 0, -1, borne)
    borne.tell()


def stdlib_documents() -> Iterator[Document]:
    """The standard library of the running interpreter: real text that every machine has."""
    return documents("python-stdlib")
