"""What every kind of source gives: entries (files, objects, tables) as one look saw them, and their documents.

A look is cheap: names, sizes, times. A document is read when its piece is worked on, by whoever works on it, and what
is not as the look saw it any more is refused: a dataset is of one moment.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.errors import DatasetError, SpecError

log = logging.getLogger(__name__)

BLOCK_LETTERS = 1 << 16
"""A document is handed on in blocks of about so many characters where nothing depends on where it is cut."""
WHOLE_LETTERS = 256 << 20
"""What is handed on as a whole, a document or a word of one, has at most so many characters (a line of JSON so many
bytes): a tokenizer takes some 65 bytes for each."""
LONG_LETTERS = 16 << 20
"""A file of more bytes than that is never held whole, but where a filter asks for its text."""
TALKS = ("messages", "conversations", "conversation")
A_TALK = "name it in data.messages, and it is written by a chat template"
BESIDE = ("input", "context", "system")
"""What records of instructions name beside prompt and answer, and the answer depends on."""
CONVERT = "convert it: iconv -f ENCODING -t UTF-8 (such as WINDOWS-1252, WINDOWS-1251, GB18030, SHIFT-JIS)"
_HALF = re.compile("[\ud800-\udfff]")
_TOLD = 3  # places of a kind that are named one by one


@dataclass(frozen=True)
class Entry:
    """A file, an object, a table as the look saw it."""

    name: str
    """Opens it again, and is what people read."""
    size: int
    """Bytes; rows of a table."""
    mark: str
    """Another one where its bytes are others, as far as names, sizes and times tell."""
    changed: float = 0.0
    """Seconds since 1970; 0: not known, and the mark is of the content itself."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus. A long one has no ``text``, but ``parts`` that give it from its beginning."""

    where: str | Callable[[], str]
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What a record holds beside its text."""
    parts: Callable[[], Iterator[str]] | None = None
    prompt: str | None = None
    """What the text answers, where the source has prompts; never of a document that comes in parts."""
    counted: tuple[tuple[int, int], ...] | None = None
    """Of a conversation: the characters of its text that count, in order; such a text is encoded whole."""

    @property
    def name(self) -> str:
        """For people: file, and line or row where it has several documents."""
        return self.where if isinstance(self.where, str) else self.where()

    def blocks(self, cut: re.Pattern[str] | None) -> Iterator[str]:
        """The text from its beginning, cut where ``cut`` matches after each ``BLOCK_LETTERS`` (what it takes is of no
        block; it looks at two characters at most); None: whole. DatasetError where a block is beyond reason."""
        if self.parts is None and len(self.text) <= BLOCK_LETTERS:
            yield self.text
            return
        held: list[str] = []  # of the block in hand, searched
        size, rest = 0, ""
        for part in self.parts() if self.parts is not None else (self.text,):
            rest, at = rest + part, 0
            while cut is not None and (begin := at + max(0, BLOCK_LETTERS - size)) < len(rest):
                found = cut.search(rest, begin)
                if found is None:
                    break
                yield "".join((*held, rest[at : found.start()]))
                held, size, at = [], 0, found.end()
            rest = rest[at:]
            if cut is None or size + len(rest) > BLOCK_LETTERS:
                held.append(rest[:-2])
                size, rest = size + len(held[-1]), rest[-2:]
            if size > WHOLE_LETTERS:
                raise DatasetError(
                    f"{self.name} has more than {WHOLE_LETTERS >> 20} MiB of text in a row that the tokenizer must see "
                    f"as a whole ({'a word without an end' if cut else 'it may look over any border of words'}); cut "
                    "the text into several, or leave it out of data.source"
                )
        yield "".join((*held, rest))

    def stretches(self, cut: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
        """The blocks of its prompt, if it has one, and of its text, each with whether it counts: none is of both. A
        conversation is one block, and its places say what counts."""
        if self.counted is not None:
            yield self.text, True
            return
        if self.prompt is not None:
            for block in Document(self.where, self.prompt).blocks(cut):
                yield block, False
        for block in self.blocks(cut):
            yield block, True

    @property
    def digested(self) -> bytes:
        """What comes before the text in the document's digest: its prompt, or the places that count; nothing where it
        has none."""
        if self.counted is not None:
            return f"{self.counted}".encode()
        if self.prompt is None:
            return b""
        data = self.prompt.encode("utf-8", "surrogatepass")
        return len(data).to_bytes(8, "little") + data

    def whole(self) -> str:
        """The text in memory."""
        return self.text if self.parts is None else "".join(self.parts())


class CorpusSource(Protocol):
    """A kind of source, opened for a spec. The calls are made in this order: ``look``, then ``read`` by any worker."""

    def look(self) -> list[Entry]:
        """What there is now, in the order of the corpus; DatasetError where that is nothing."""

    def divides(self, entry: Entry) -> bool:
        """Whether ranges of an entry (of bytes, of rows) can be read alone."""

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        """The documents that begin in that range, in order. DatasetError where the entry is not as it was seen."""


@dataclass
class Warnings:
    """Damage that is borne: the first few places are named, the others counted."""

    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, where: Callable[[], str]) -> None:
        self.count += 1
        if self.count <= _TOLD:
            self.places.append(where())

    def join(self, places: Sequence[str], count: int) -> None:
        """Take over what another reader has met."""
        self.places += list(places)[: max(0, _TOLD - len(self.places))]
        self.count += count

    def tell(self) -> None:
        for place in self.places:
            log.warning("%s: %s", place, self.what)
        if self.count > len(self.places):
            log.warning("%d more: %s", self.count - len(self.places), self.what)


class Borne:
    """All that is borne while a corpus is read."""

    def __init__(self) -> None:
        self.bytes = Warnings(
            f"bytes that are no UTF-8 were replaced by U+FFFD; if the file is in another encoding, {CONVERT}"
        )
        self.halves = Warnings("half a surrogate pair (\\ud800 to \\udfff) was replaced by U+FFFD")
        self.skipped = Warnings("left out: no text in UTF-8")
        self.beside = Warnings(
            f"{' or '.join(map(repr, BESIDE))} beside the prompt is not read, and the answer may depend on it: write "
            "it into the prompt, or leave it out of the file"
        )
        self.marks = Warnings(
            "a message spells a special token of the tokenizer out, and is read as that token: take it out of the text"
        )
        self.rewritten = Warnings(
            "the chat template writes answers otherwise once more is said (without their thinking, say): each such one "
            "counts in a document of its own, which ends with it"
        )
        self.unanswered = Warnings("left out: a conversation without an answer that counts")
        self.cut = Warnings(
            "the chat template leaves out a part of an answer, or what was thought before it, and nothing of that is "
            "learned: name one that writes it (data.chat_template)"
        )

    def of(self) -> tuple[Warnings, ...]:
        return (
            *(self.bytes, self.halves, self.skipped, self.beside),
            *(self.marks, self.rewritten, self.unanswered, self.cut),
        )

    def to_map(self) -> list[dict[str, Any]]:
        """What a store can keep: of a name that is no UTF-8 its bytes are written out."""
        return [
            {"count": w.count, "places": [place.encode(errors="backslashreplace").decode() for place in w.places]}
            for w in self.of()
        ]

    def join(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for warnings, row in zip(self.of(), rows, strict=False):  # a version before has kept fewer
            warnings.join(row["places"], row["count"])

    def tell(self) -> None:
        for warnings in self.of():
            warnings.tell()


def whole_pairs(text: str, where: Callable[[], str], borne: Borne) -> str:
    """The text with U+FFFD for each half of a surrogate pair that stands alone."""
    if not text.isascii() and _HALF.search(text):
        borne.halves.add(where)
        return _HALF.sub("\ufffd", text)
    return text


def is_talk(value: object) -> bool:
    """Whether a record's value is a conversation."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and not {"role", "from"}.isdisjoint(first)


def look_beside(record: Mapping[str, Any], read: Sequence[str | None], where: Callable[[], str], borne: Borne) -> None:
    """Tell what stands beside a prompt and the text that answers it (``read``), and is not read."""
    if any(isinstance(text := record.get(key), str) and text.strip() for key in BESIDE if key not in read):
        borne.beside.add(where)


def no_prompt(where: Callable[[], str], why: str) -> DatasetError:
    return DatasetError(
        f'{where()} has no prompt ({why}); where a document has none give it the prompt "", or leave data.prompt_field '
        "out if none has"
    )


def optional_module(module: str, package: str, what: str) -> Any:
    """A module that an optional package brings; SpecError (exit 78) with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise SpecError(f"{what} needs {package}, which does not load: {error}; install it anew") from error
        raise SpecError(f"{what} needs {package}: pip install 'hotstage[data]'") from error


def changed(name: str) -> DatasetError:
    return DatasetError(f"{name} changed while it was read; start again when nobody writes there")


def vanished(name: str) -> DatasetError:
    return DatasetError(f"{name} vanished while the corpus was read; start again when nobody writes there")
