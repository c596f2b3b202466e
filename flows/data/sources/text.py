"""Plain text: each file is a document. UTF-8, without a byte order mark, line ends ``\\n``; bytes that are no UTF-8
become U+FFFD with a warning. A file of any size is read through, never held.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
from collections.abc import Callable, Iterator

from flows.data.sources.base import CONVERT, LONG_LETTERS, Borne, Document, Entry
from flows.data.sources.files import BOM, chunks_of, is_packed, look_at_files, opened_file
from trainer.errors import DatasetError
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

NEWLINE = b"\n"
MOST_LOST = 3
"""A file of which more than this part of the characters is no UTF-8 is no text in it."""
_MARKED = {
    "jsonl|ndjson|jsonlines|json": ("JSON", "keys and braces; jsonl:GLOB reads the texts in lines of JSON"),
    "csv|tsv": ("tables", "columns and quotes; hf:FOLDER reads a column of such files (data.field)"),
    "html?|xhtml|xml": ("HTML or XML", "tags; take the text out of it first"),
}
"""What files are by the ends of their names, and what of them is no text."""


class TextSource:
    """``text:GLOB``."""

    def __init__(self, source: str) -> None:
        self._source = source

    def look(self) -> list[Entry]:
        entries = look_at_files(self._source)
        for ends, (what, marks) in _MARKED.items():
            end = re.compile(rf"\.({ends})(\.(gz|zst))?$", re.IGNORECASE)
            marked = [entry.name for entry in entries if end.search(entry.name)]
            if marked:
                log.warning(
                    "data.source %s: %d file(s) are %s by name, such as %s, and each becomes one text with all its %s",
                    shown(self._source),
                    len(marked),
                    what,
                    shown(marked[0]),
                    marks,
                )
        return entries

    def divides(self, entry: Entry) -> bool:
        return False

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        yield text_document(entry, borne)


def text_document(entry: Entry, borne: Borne) -> Document:
    """A file as one document; a long one is read when its parts are asked for, each time anew."""
    with opened_file(entry) as file:
        if entry.size <= LONG_LETTERS and not is_packed(file):
            text = "".join(decoded(chunks_of(file, entry.name), entry.name, borne))
            return Document(entry.name, text)
    told = [borne]

    def parts() -> Iterator[str]:
        with opened_file(entry) as file:  # what is borne is told once, however often it is read
            yield from decoded(chunks_of(file, entry.name), entry.name, told.pop() if told else Borne())

    return Document(entry.name, "", parts=parts)


def decoded(chunks: Iterator[bytes], name: str, borne: Borne) -> Iterator[str]:
    """Text of a file's bytes. DatasetError where there is a NUL byte, or where most of it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    strict, lines, head, size, lost = True, 1, b"", 0, 0

    def text_of(data: bytes, final: bool) -> str:
        nonlocal decoder, strict
        pending = decoder.getstate()[0]
        try:
            return decoder.decode(data, final)
        except UnicodeDecodeError as error:
            if not strict:
                raise
            whole, at = pending + data, error.start
            place = f"{name}:{lines + whole.count(NEWLINE, 0, at)} (byte 0x{whole[at]:02X})"
            borne.bytes.add(lambda: place)
            strict, decoder = False, codecs.getincrementaldecoder("utf-8")("replace")
            return decoder.decode(whole, final)

    def seen(text: str) -> str:
        nonlocal size, lost
        size += len(text)
        lost += 0 if strict else text.count("\ufffd")
        return text

    for data in chunks:
        if not head:
            head, data = data[:64], data.removeprefix(BOM)
        at = data.find(b"\0")
        if at >= 0:
            raise nul_byte(f"{name}:{lines + data.count(NEWLINE, 0, at)}", head)
        yield ends.decode(seen(text_of(data, False)))
        lines += data.count(NEWLINE)
    yield ends.decode(seen(text_of(b"", True)), final=True)
    if lost * MOST_LOST > size:
        raise DatasetError(
            f"{name} is no text in UTF-8: of {size:,} characters {lost:,} stand for other bytes; if it is text in "
            f"another encoding, {CONVERT}; else narrow data.source"
        )


def nul_byte(where: str, head: bytes) -> DatasetError:
    """``head``: the file's first bytes, by which UTF-16 is told: every second one of them is 0, the others are text."""
    zeros = [head[first::2].count(0) * 2 > len(head[first::2]) for first in (0, 1)]
    what = (
        "no text (a binary file, tokens, or one whose end was never written); texts are read, not tokens: narrow "
        "data.source, or mend the file"
    )
    if zeros[0] != zeros[1] and not any(0 < letter < 32 and letter not in b"\t\n\f\r" for letter in head):
        form = "UTF-16BE" if zeros[0] else "UTF-16LE"
        what = f"text in UTF-16 without its mark; convert it: iconv -f {form} -t UTF-8"
    return DatasetError(f"{where} holds a NUL byte: the file is {what}")


def line_at(chunks: Callable[[], Iterator[bytes]], offset: int) -> int:
    """The number of the line that begins at this byte of a file; line ends as in ``decoded``."""
    line, seen, last = 1, 0, b""
    for data in chunks():
        part = data[: max(0, offset - seen)]
        both = last + part
        line += part.count(b"\n") + part.count(b"\r") - both.count(b"\r\n")
        last, seen = part[-1:], seen + len(data)
        if seen >= offset:
            break
    return line
