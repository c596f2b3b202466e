"""The first pass over a piece: its documents are read, filtered and summed; nothing of their text is kept.

What is kept a part (of about a piece's text; a piece that cannot be divided has several):

    read/<piece>.<part>   of each document: sums (SHA-256, of a prompt too), codes (0: stays, else why not), sizes (u64)
    near/<piece>.<part>   where near duplicates are looked for: see near.py
    read/<piece>          parts, documents, letters, out (by reason), text (whether there is any), borne: all is read
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from flows.data.filters import REASONS, filter_of
from flows.data.job import Task, too_large
from flows.data.near import near_bytes, signature
from flows.data.sources import Borne, Document
from flows.data.tokenizer import SAFE_CUT
from flows.data.work import piece_name


class _Part:
    """The documents since the last part."""

    def __init__(self) -> None:
        self.sums, self.codes, self.sizes = bytearray(), bytearray(), []  # type: bytearray, bytearray, list[int]
        self.near: list[Any] = []
        self.letters = 0


def read_piece(task: Task) -> dict[str, Any]:
    """Read a piece, or find that it was read; gives what stands in ``read/<piece>``."""
    work, name = task.job.work, piece_name(task.piece.number)
    found = work.find_map("read", name)
    if found is not None:
        return {**found, "cached": True}
    keep, near, borne = filter_of(task.job.spec), near_wanted(task), Borne()
    total = {"v": 1, "parts": 0, "documents": 0, "letters": 0, "text": False, "out": [0] * len(REASONS)}
    part = _Part()
    for _entry, document in task.documents(borne):
        whole = _seen_whole(task, document, near or keep.predicate is not None)
        digest, letters, blank = _summed(whole)
        code = keep(whole, letters)
        total["text"] = total["text"] or (code == 0 and not blank)
        total["out"][code] += 1  # type: ignore[index]
        part.sums += digest
        part.codes.append(code)
        part.sizes.append(letters)
        part.letters += letters
        if near:
            text = whole.text if whole.prompt is None else f"{whole.prompt} {whole.text}"
            part.near.append(signature(text) if code == 0 else None)
        if part.letters >= task.job.piece_letters:
            _keep_part(task, part, total)
            part = _Part()
    if part.sizes or not total["parts"]:
        _keep_part(task, part, total)
    work.put_map({**total, "borne": borne.to_map()}, "read", name)
    return {**total, "borne": borne.to_map(), "cached": False}


def near_wanted(task: Task) -> bool:
    return task.job.spec.dedupe is not None and task.job.spec.dedupe.near is not None


def _seen_whole(task: Task, document: Document, needed: bool) -> Document:
    """The document with its text where somebody asks for it."""
    if not needed or document.parts is None:
        return document
    held, letters = [], 0
    for block in document.parts():
        letters += len(block)
        if letters > task.job.piece_letters:
            raise too_large(document, task.job.piece_letters, "data.filter.predicate or data.dedupe.near")
        held.append(block)
    return Document(document.where, "".join(held), document.fields)


def _summed(document: Document) -> tuple[bytes, int, bool]:
    """SHA-256 of a document's prompt and text, their characters, whether the text is blank."""
    h, letters, blank = hashlib.sha256(document.digested), len(document.prompt or ""), True
    if document.parts is None:
        text = document.text
        h.update(text.encode("utf-8", "surrogatepass"))
        return h.digest(), letters + len(text), not text.strip()
    for block in document.blocks(SAFE_CUT):
        h.update(block.encode("utf-8", "surrogatepass"))
        letters += len(block)
        blank = blank and not block.strip()
    return h.digest(), letters, blank


def _keep_part(task: Task, part: _Part, total: dict[str, Any]) -> None:
    name = piece_name(task.piece.number, total["parts"])
    total["parts"] += 1
    total["documents"] += len(part.sizes)
    total["letters"] += part.letters
    rows = {"v": 1, "sums": bytes(part.sums), "codes": bytes(part.codes)}
    task.job.work.put_map({**rows, "sizes": np.asarray(part.sizes, "<u8").tobytes()}, "read", name)
    if near_wanted(task):
        task.job.work.put(near_bytes(part.near, task.job.spec.dedupe.near), "near", name)  # type: ignore[union-attr,arg-type]
