"""The section ``data`` of a spec: where the text comes from, what of it stays, in which order its samples are read."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from trainer.spec_fields import Section, shown, size
from trainer.spec_mix import MixPart, check_phases, phases_of
from trainer.wire import PARTS_MAX
from trainer.wire.order import MixPhase

MAX_VOCAB_SIZE = 1 << 24
DEFAULT_SOURCE = "python-stdlib"
SOURCE_KINDS = ("text", "jsonl", "parquet", "code", "hf")


_BY_END = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "parquet": "parquet", "txt": "text", "md": "text"}


def _meant(source: str) -> str:
    """What a source without a kind, or of a kind that there is not, probably means: words that end in a blank."""
    near = source.strip().partition(":")
    if near[0].strip().lower() in SOURCE_KINDS and near[2].strip():
        return f"if {near[0].strip().lower()}:{near[2].strip()[:200]} is meant, write that; else "
    kind, colon, rest = source.partition(":")
    if colon and rest.startswith("//"):
        return "it is an address, and files of this machine or of a bucket (jsonl:s3://…) are read: fetch it first, or "
    if colon and kind in ("csv", "tsv", "xml", "arrow", "tfrecord"):
        return f"{kind} is not read, so write its texts as JSON lines first, or "
    path = rest if colon and kind in ("file", "json", "txt", "ndjson", "path") else source
    found = re.search(r"\.(\w+)(\.gz|\.zst)?$", path)
    end = _BY_END.get(found[1]) if found else None
    return f"if {end}:{path[:200]} is meant, write that; else " if end and not path.startswith(":") else ""


class FilterSpec(Section):
    """Which documents stay."""

    min_length: int = size(0, low=0, text="characters that a document has at least")
    max_length: int | None = size(None, text="characters that it has at most; unset: any number")
    language: tuple[str, ...] = Field(
        (), description='language tags that stay: "en" takes en, en-GB, EN_us; empty: any'
    )
    language_field: str = Field("language", min_length=1, description="key or column that holds a document's tag")
    predicate: str | None = Field(
        None, description='"package.module:function" of a document (text, name, fields) that answers True or False'
    )

    @model_validator(mode="after")
    def _check(self) -> FilterSpec:
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"max_length {self.max_length} is below min_length {self.min_length}: no document would stay; raise it"
            )
        if self.predicate is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.predicate):
            raise ValueError(f"predicate {shown(self.predicate)} is no import path; write package.module:function")
        return self

    @property
    def columns(self) -> tuple[str, ...] | None:
        """What is looked at beside a document's text; None: everything."""
        if self.predicate is not None:
            return None
        return (self.language_field,) if self.language else ()


class DedupeSpec(Section):
    """Documents that were there before are left out; the first one in the corpus's order stays."""

    exact: bool = Field(True, description="the same text twice")
    near: float | None = Field(
        None, ge=0.5, le=0.95, description="texts whose five-word phrases are so much the same (Jaccard); unset: any"
    )


class DataSpec(Section):
    """Where the text comes from and in which order its samples are read."""

    source: str = Field(
        DEFAULT_SOURCE,
        description='"python-stdlib", "text:<glob>", "jsonl:<glob>", "parquet:<glob>", "code:<folder>", "hf:<dataset>" '
        'or "dataset:<digest>"; a glob may be s3://bucket/...',
    )
    field: str = Field("text", min_length=1, description="key or column that holds the text (jsonl, parquet, hf)")
    prompt_field: str | None = Field(
        None,
        min_length=1,
        description="key or column that holds what the text answers (jsonl, parquet, hf): its tokens are read before "
        "the text's, and only the prediction of the text and of the document's end counts; unset: all counts",
    )
    messages: str | None = Field(
        None,
        min_length=1,
        description="key or column that holds a conversation (jsonl, parquet, hf): a chat template makes a text of it, "
        "of which what the assistant says counts; unset: texts",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description='file of the Jinja template that conversations are written by, or "chatml"; unset: the one beside '
        "data.tokenizer",
    )
    filter: FilterSpec | None = Field(None, description="which documents stay; unset: all")
    dedupe: DedupeSpec | None = Field(None, description="which documents are taken once; unset: none")
    validation: float = Field(
        0.0, ge=0, le=0.5, description="share of the documents, chosen by their content, that is a dataset of its own"
    )
    piece_mib: int = size(32, low=1, high=4096, text="MiB of text that are worked on at a time; changes no bit")
    vocab_size: int = size(4096, low=257, high=MAX_VOCAB_SIZE, text="vocabulary of the tokenizer to train")
    tokenizer: str | None = Field(None, description="path of a tokenizer.json; unset: train a byte-level BPE")
    end_token: str | None = Field(
        None, description='token of data.tokenizer that ends a document; unset: <|endoftext|>; "": none'
    )
    begin_token: str | None = Field(
        None,
        description="token of data.tokenizer that each document begins with, as its model was trained; unset: none",
    )
    shuffled: bool = Field(True, description="keyed permutation of blocks and samples; false: in order")
    block: int = size(64, text="samples a block of the shuffle")
    window: int = size(64, text="blocks a window of the shuffle")
    shard_tokens: int = size(1 << 24, low=2, text="tokens a shard file")
    cache_gib: float = Field(
        0.0,
        ge=0,
        le=1 << 20,
        description="most that a node keeps of the data, GiB: it fetches what its ranks read next and gives back what "
        "they have read; 0: all shards, before the first step. No part of a run's name",
    )
    packing: Literal["across", "within"] | None = Field(
        None,
        description="documents share a sequence: attention crosses their borders, or stays within one and positions "
        "count from its beginning; unset: within, where the data have a token that ends a document",
    )
    mix: tuple[MixPart, ...] = Field(
        (),
        max_length=PARTS_MAX,
        description="corpora that are mixed by weights, in place of source: tables of source, weight, steps",
    )

    def part(self, number: int) -> DataSpec:
        """What a part of the mixture is prepared from, but for its tokenizer."""
        entry = self.mix[number]
        made: dict[str, Any] = {"filter": None, "dedupe": None} if entry.source.startswith("dataset:") else {}
        values = {key: getattr(self, key) for key in type(self).model_fields}
        own = {key: getattr(entry, key) for key in ("source", "field", "prompt_field", "messages")}
        if entry.messages is None:
            own["chat_template"] = None
        return DataSpec.model_validate(values | made | {"mix": ()} | own)

    @property
    def masks(self) -> bool:
        """Whether not all of its text counts."""
        return self.prompt_field is not None or self.messages is not None

    def packing_of(self, end: int | None) -> Literal["across", "within"]:
        """``packing``, or what it is where it is unset. ``end``: the token that ends a document of the data."""
        return self.packing or ("across" if end is None else "within")

    @property
    def phases(self) -> tuple[MixPhase, ...]:
        """The mixture's weights as a step function."""
        return phases_of(self.mix)

    def _check_mix(self) -> None:
        if self.source != DEFAULT_SOURCE:
            raise ValueError(
                f"source {shown(self.source)} and mix: a mixture's parts have sources of their own; leave source out, "
                "or make it a part"
            )
        if self.validation:
            raise ValueError(
                f"validation {self.validation} with mix: of which part it would be is not said; leave it out, and name "
                "data of its own in [validation]"
            )
        for key, what in (("prompt_field", "prompts"), ("messages", "conversations")):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} {shown(getattr(self, key))} with mix: which part has {what} is not said; name it in the "
                    "tables of those parts"
                )
        for number in range(len(self.mix)):
            try:
                self.part(number)
            except ValidationError as error:
                why = error.errors(include_url=False)[0]
                raise ValueError(f"mix[{number}].{why.get('ctx', {}).get('error', why['msg'])}") from error
        check_phases(self.phases)

    def _check_messages(self, kind: str) -> None:
        if self.chat_template is not None and self.messages is None and not any(p.messages for p in self.mix):
            raise ValueError(
                f"chat_template {shown(self.chat_template)} is for conversations, and no key of them is named: name it "
                "(messages), or leave the template out"
            )
        if self.messages is None:
            return
        if kind not in ("jsonl", "parquet", "hf"):
            raise ValueError(
                f"messages {shown(self.messages)} is a key of records, and source {shown(self.source)} has no keys: "
                "take jsonl:, parquet: or hf:, or leave it out"
            )
        default = type(self).model_fields["field"].default
        other = "prompt_field" if self.prompt_field is not None else "field" if self.field != default else None
        if other is not None:
            raise ValueError(
                f"{other} {shown(getattr(self, other))} with messages {shown(self.messages)}: a conversation is the "
                "whole text; leave one of them out"
            )

    @model_validator(mode="after")
    def _check(self) -> DataSpec:
        if self.end_token is not None and self.tokenizer is None:
            raise ValueError(
                f"end_token {shown(self.end_token)} is for a tokenizer that is given with data.tokenizer; the one "
                "that is trained here ends documents with <|endoftext|>: leave it out"
            )
        if self.begin_token and self.tokenizer is None:
            raise ValueError(
                f"begin_token {shown(self.begin_token)} is for a tokenizer that is given with data.tokenizer; the one "
                "that is trained here has none: leave it out"
            )
        if self.begin_token and self.begin_token == self.end_token:
            raise ValueError(
                f"begin_token and end_token are both {shown(self.begin_token)}: one stands between two documents; "
                "leave begin_token out"
            )
        if self.packing == "within" and self.end_token == "":
            raise ValueError(
                'packing "within" finds documents by the token that ends them, and end_token "" says that none does: '
                'name one that data.tokenizer has, or take packing = "across"'
            )
        if self.mix:
            self._check_mix()
        kind, _, rest = self.source.partition(":")
        if self.prompt_field is not None and kind not in ("jsonl", "parquet", "hf"):
            raise ValueError(
                f"prompt_field {shown(self.prompt_field)} is a key beside that of the text, and source "
                f"{shown(self.source)} has no keys: take jsonl:, parquet: or hf:, or leave it out"
            )
        self._check_messages(kind)
        if self.prompt_field == self.field:
            raise ValueError(
                f"prompt_field and field are both {shown(self.field)}: name the key of the prompt, and that of the "
                "text which answers it"
            )
        if kind == "dataset" and re.fullmatch(r"[0-9a-f]{64}", rest):
            made = [key for key in ("filter", "dedupe", "validation") if getattr(self, key)]
            if made:
                raise ValueError(
                    f"{made[0]} is for a corpus that is prepared, and source {shown(self.source)} is prepared already: "
                    "leave it out, or name the corpus"
                )
            return self
        if self.source != DEFAULT_SOURCE and not (kind in SOURCE_KINDS and rest):
            raise ValueError(
                f"source {shown(self.source)} is unknown; {_meant(self.source)}take 'python-stdlib', 'text:<glob>', "
                "'jsonl:<glob>', 'parquet:<glob>', 'code:<folder>', 'hf:<dataset>' or 'dataset:<64 hex digits>'"
            )
        if self.filter is not None and self.filter.language and kind == "text":
            raise ValueError(
                "filter.language looks at a document's tag, and plain text has none: take another kind of source"
            )
        return self
