"""The passes over a piece whose documents are known: texts to train the tokenizer on, and tokens.

What is kept, a part after about a piece's text:

    keep/<piece>            a byte a document: 0 out, 1 of the dataset, 2 of its validation part; missing: all are 1
    sample/<piece>          blocks of text to train on: sizes (bytes, u32 each), text
    tokens/<piece>.<part>   tokens of the dataset, masked where it has prompts; held/... of its validation part
    encode/<piece>.<part>   how many: tokens, held; texts (without the ends of documents), unknown,
                            letters (that are unknown), twice (texts that end with the end token already)
    encode/<piece>          the same of the piece, and parts
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flows.data.job import DataJob, Task
from flows.data.sources import Borne, Document, Entry
from flows.data.sources.base import changed
from flows.data.sources.talk import Spans, counting
from flows.data.tokenizer import (
    EOT,
    SAFE_CUT,
    EncodedText,
    GivenTokenizer,
    checked_tokenizer,
    encode,
    parse_tokenizer,
    special_tokens,
    vocab_of,
)
from flows.data.work import piece_name
from trainer.dataset import mask_of, token_bytes_for

SAMPLE_LETTERS = 64 << 20
"""Text that the tokenizer is trained on: all of it up to so much, of more a part that its content chooses."""
_BATCH_BLOCKS, _BATCH_LETTERS = 4096, 1 << 20
TRAIN, HELD = 1, 2
COUNTS = ("texts", "unknown", "letters", "twice")


def sample_piece(task: Task, share: float) -> dict[str, Any]:
    """Keep the blocks of a piece that the tokenizer is trained on: those whose hash is below ``share`` of all."""
    work, name = task.job.work, piece_name(task.piece.number)
    if work.there("sample", name):
        return {"cached": True}
    limit = int(share * (1 << 64))
    sizes, held = [], bytearray()
    for document, verdict in _verdicts(task):
        if verdict != TRAIN:
            continue
        for block, _ in document.stretches(SAFE_CUT):
            data = block.encode("utf-8", "surrogatepass")
            if share >= 1 or int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < limit:
                sizes.append(len(data))
                held += data
    work.put_map({"v": 1, "sizes": np.asarray(sizes, "<u4").tobytes(), "text": bytes(held)}, "sample", name)
    return {"cached": False}


def sampled(job: DataJob, pieces: int) -> Iterator[str]:
    """All blocks to train on, in order."""
    for number in range(pieces):
        held = job.work.get_map("sample", piece_name(number))
        text, at = memoryview(held["text"]), 0
        for size in np.frombuffer(held["sizes"], "<u4").tolist():
            yield str(text[at : at + size], "utf-8", "surrogatepass")
            at += size


@dataclass
class Encoder:
    """The tokenizer of a job, as the workers have it from the store."""

    tokenizer: Tokenizer
    given: GivenTokenizer | None
    eot: int | None
    begin: int | None
    room: bool
    vocab: int = field(init=False)
    kind: Any = field(init=False)
    """Of a stored token."""

    def __post_init__(self) -> None:
        self.vocab = vocab_of(self.tokenizer) if self.given is None else self.given.vocab
        self.kind = np.dtype(f"<u{token_bytes_for(self.vocab, self.room)}")
        self.cut = SAFE_CUT if self.given is None else self.given.cut
        self.special = frozenset(map(self.tokenizer.token_to_id, special_tokens(self.tokenizer)))

    @staticmethod
    def of(job: DataJob, data: bytes) -> Encoder:
        if job.spec.tokenizer is None:
            tokenizer = parse_tokenizer(data, "the tokenizer that was trained")
            return Encoder(tokenizer, None, tokenizer.token_to_id(EOT), None, job.room)
        given = checked_tokenizer(job.spec, data)
        eot = None if given.end is None else given.tokenizer.token_to_id(given.end)
        begin = None if given.begin is None else given.tokenizer.token_to_id(given.begin)
        return Encoder(given.tokenizer, given, eot, begin, job.room)


@functools.lru_cache(maxsize=2)
def encoder_of(job: DataJob) -> Encoder:
    """That of a job whose tokenizer is there."""
    return Encoder.of(job, job.work.get("tokenizer.json"))


@dataclass
class _Block:
    where: Document
    text: str
    verdict: int
    begins: bool
    ends: bool
    """Whether the document begins, or ends, with it."""
    counts: bool
    """Whether the prediction of its tokens does; that of the document's end does in any case."""


def encode_piece(task: Task) -> dict[str, Any]:
    """Encode a piece, or find that it was encoded; gives what stands in ``encode/<piece>``."""
    work, name = task.job.work, piece_name(task.piece.number)
    found = work.find_map("encode", name)
    if found is not None:
        return {**found, "cached": True}
    encoder = encoder_of(task.job)
    total: dict[str, Any] = {"v": 1, "tokens": [], "held": [], **dict.fromkeys(COUNTS, 0)}
    for number, batches in enumerate(_parts(_blocks(task, encoder), task.job.piece_letters)):
        row = work.find_map("encode", piece_name(task.piece.number, number))
        if row is None:
            row = _encode_part(task, encoder, number, batches)
        for _ in batches:  # of a part that is there already: its text is passed over
            pass
        for key in ("tokens", "held"):
            total[key].append(row[key])
        for key in COUNTS:
            total[key] += row.get(key, 0)  # a version before has kept fewer
    work.put_map(total, "encode", name)
    return {**total, "cached": False}


def _encode_part(task: Task, encoder: Encoder, number: int, batches: Iterator[list[_Block]]) -> dict[str, Any]:
    work, name = task.job.work, piece_name(task.piece.number, number)
    out = {TRAIN: bytearray(), HELD: bytearray()}
    mask = mask_of(encoder.kind.itemsize)
    row: dict[str, Any] = {"v": 1, **dict.fromkeys(COUNTS, 0)}
    for batch in batches:
        blocks = [block for block in batch if block.verdict]
        flat: dict[int, list[int]] = {TRAIN: [], HELD: []}
        texts = [Document(block.where.where, block.text) for block in blocks]
        talks = task.job.form is not None
        for block, encoded in zip(blocks, encode(encoder.given, encoder.tokenizer, texts, talks), strict=True):
            ids = encoded.ids
            row["texts"] += len(ids)
            row["unknown"] += encoded.unknown
            row["letters"] += encoded.letters
            if talks:
                flat[block.verdict] += _talk(encoder, encoded, block.where.counted or (), mask)
                continue
            if encoder.begin is not None and block.begins and ids[:1] != [encoder.begin]:  # as rendered chats do
                ids = [encoder.begin, *ids]
            flat[block.verdict] += ids if block.counts else [token | mask for token in ids]
            if encoder.eot is not None and block.ends:
                row["twice"] += ids[-1:] == [encoder.eot]
                flat[block.verdict].append(encoder.eot)
        for verdict, ids in flat.items():
            out[verdict] += np.asarray(ids, encoder.kind).tobytes()
    row["tokens"], row["held"] = (len(out[verdict]) // encoder.kind.itemsize for verdict in (TRAIN, HELD))
    work.put(out[TRAIN], "tokens", name)
    if row["held"]:
        work.put(out[HELD], "held", name)
    work.put_map(row, "encode", name)
    return row


def _talk(encoder: Encoder, encoded: EncodedText, spans: Spans, mask: int) -> list[int]:
    """A conversation's tokens. The one that ends the document counts where it is what ends an answer: where that has no
    special token of its own."""
    ids, counts = encoded.ids, counting(encoded.offsets, spans)
    made: list[int] = np.where(counts, ids, np.bitwise_or(ids, mask)).tolist() if ids else []
    if encoder.begin is not None and ids[:1] != [encoder.begin]:
        made.insert(0, encoder.begin | mask)
    if encoder.eot is not None and ids[-1:] != [encoder.eot]:
        ends = bool(ids) and bool(counts[-1]) and ids[-1] not in encoder.special
        made.append(encoder.eot if ends else encoder.eot | mask)
    return made


def _blocks(task: Task, encoder: Encoder) -> Iterator[_Block]:
    for document, verdict in _verdicts(task):
        before: tuple[str, bool] | None = None
        begins = True
        for block in document.stretches(encoder.cut):
            if before is not None:
                yield _Block(document, before[0], verdict, begins, False, before[1])
                begins = False
            before = block
        text, counts = before or ("", True)
        yield _Block(document, text, verdict, begins, True, counts)


def _parts(blocks: Iterator[_Block], letters: int) -> Iterator[Iterator[list[_Block]]]:
    """Batches of blocks, in parts of so much text. A part must be gone through before the next is asked for."""
    rest: list[_Block] = []
    over = False

    def part() -> Iterator[list[_Block]]:
        nonlocal rest, over
        seen, batch, size = 0, [], 0  # type: int, list[_Block], int
        while True:
            block = rest.pop() if rest else next(blocks, None)
            if block is None:
                over = True
                break
            batch.append(block)
            size += len(block.text)
            seen += len(block.text)
            if seen >= letters:
                following = next(blocks, None)
                over = following is None
                rest = [] if following is None else [following]
                break
            if len(batch) == _BATCH_BLOCKS or size >= _BATCH_LETTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    while not over:
        yield part()


def _verdicts(task: Task) -> Iterator[tuple[Document, int]]:
    """The documents of a piece with what becomes of each. DatasetError where one is not what the first pass read."""
    work, number = task.job.work, task.piece.number
    parts = int(work.get_map("read", piece_name(number))["parts"])
    keep = work.get("keep", piece_name(number)) if work.there("keep", piece_name(number)) else None
    sums = _sums(task, parts)
    entry: Entry | None = None
    for at, (entry, document) in enumerate(task.documents(Borne())):
        summing = _Summed(document)
        yield summing.document, TRAIN if keep is None else keep[at] if at < len(keep) else 0
        if summing.digest() != next(sums, b""):
            raise changed(entry.name)
    if next(sums, None) is not None:
        raise changed(entry.name if entry is not None else task.job.spec.source)


def _sums(task: Task, parts: int) -> Iterator[bytes]:
    for part in range(parts):
        held = task.job.work.get_map("read", piece_name(task.piece.number, part))["sums"]
        for at in range(0, len(held), 32):
            yield held[at : at + 32]


class _Summed:
    """A document, and the digest of its text; a long one is summed as its parts are read."""

    def __init__(self, document: Document) -> None:
        self._hash = hashlib.sha256(document.digested)
        self._parts = document.parts
        self._read = False
        if document.parts is None:
            self.document = document
            self._hash.update(document.text.encode("utf-8", "surrogatepass"))
        else:
            self.document = Document(document.where, "", document.fields, self._summing)

    def _summing(self) -> Iterator[str]:
        assert self._parts is not None
        self._read = True
        for part in self._parts():
            self._hash.update(part.encode("utf-8", "surrogatepass"))
            yield part

    def digest(self) -> bytes:
        if self._parts is not None and not self._read:
            for _ in self._summing():  # nobody looked at it: it is out
                pass
        return self._hash.digest()
