"""JSON lines: each line is an object whose ``data.field`` is a text, and ``data.prompt_field``, where that is set, what
it answers. UTF-8 alone: JSON says so. Ranges of a file that
is not packed are read alone; a line is of the range in which it begins.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flows.data.sources.base import (
    A_TALK,
    CONVERT,
    TALKS,
    WHOLE_LETTERS,
    Borne,
    Document,
    Entry,
    is_talk,
    look_beside,
    no_prompt,
    whole_pairs,
)
from flows.data.sources.files import BOM, Opened, chunks_of, is_packed, look_at_files, opened_file
from flows.data.sources.talk import TalkReader
from flows.data.sources.text import line_at, nul_byte
from trainer.errors import DatasetError

_ENDS = re.compile(rb"[\r\n]")
_LINES = "objects are made into lines by: jq -c"


class JsonSource:
    """``jsonl:GLOB``."""

    def __init__(
        self, source: str, field: str, prompt: str | None, whole: bool, talk: TalkReader | None = None
    ) -> None:
        self._source, self._prompt, self._whole, self._talk = source, prompt, whole, talk
        self._key = _Key(field) if talk is None else _Key(talk.key, True)

    def look(self) -> list[Entry]:
        return look_at_files(self._source)

    def divides(self, entry: Entry) -> bool:
        with opened_file(entry) as file:
            return not is_packed(file)

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        with opened_file(entry) as file:
            if is_packed(file):
                first, last = 0, -1
            for at, line in _lines(file, entry, first, last):
                where = _Place(file, entry.name, at)
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise DatasetError(
                        f"{where()} holds the byte 0x{line[error.start]:02X}, which is no UTF-8, and JSON is: if the "
                        f"file is in another encoding, {CONVERT}"
                    ) from error
                if not text.strip():
                    continue
                record = _record(text, where, self._key)
                if self._talk is None:
                    yield self._document(record, text, where, borne)
                else:
                    yield from self._talk.documents(record, where, borne, self._whole)
                self._key.seen = True

    def _document(self, value: dict[str, Any], line: str, where: _Place, borne: Borne) -> Document:
        text = value.pop(self._key.name)
        if not isinstance(text, str):
            talk = f"; a conversation: {A_TALK}" if is_talk(text) else ""
            raise _no_object(where, f"its {self._key.name} is {_kind(text)}{talk}", self._key)
        prompt = None
        if self._prompt is not None:
            prompt = self._prompt_of(value, line, where, borne)
            look_beside(value, (), where, borne)
        return Document(where, whole_pairs(text, where, borne), value if self._whole else {}, prompt=prompt)

    def _prompt_of(self, value: dict[str, Any], line: str, where: _Place, borne: Borne) -> str:
        field = self._prompt
        assert field is not None
        if field not in value:
            raise no_prompt(where, f"it has no {field!r}")
        prompt = value.pop(field)
        if not isinstance(prompt, str):
            talk = f"; a conversation: {A_TALK}" if is_talk(prompt) else ""
            raise no_prompt(where, f"its {field} is {_kind(prompt)}{talk}")
        if line.count(_written(field)) > 1:
            _once(line, where, _Key(field))
        return whole_pairs(prompt, where, borne)


@dataclass
class _Key:
    """Of a line's text, or of its conversation."""

    name: str
    talk: bool = False
    seen: bool = False
    """A line before has one: the key is right, and what has none is not."""


def _record(line: str, where: Callable[[], str], key: _Key) -> dict[str, Any]:
    """The object of a line, which has the key once."""
    value = _object(line, where, key)
    if not isinstance(value, dict):
        mend = "; an array is made into lines by: jq -c '.[]'" if isinstance(value, list) else ""
        raise _no_object(where, f"it is {_kind(value)}{mend}", key)
    if key.name not in value:
        keys = ", ".join(sorted(map(repr, value))[:5]).encode(errors="backslashreplace").decode()
        raise _no_object(where, f"its keys are {keys}{_proposed(value, key)}" if value else "it is empty", key)
    if line.count(_written(key.name)) > 1:
        _once(line, where, key)
    return value


@functools.lru_cache
def _written(key: str) -> str:
    return json.dumps(key)


class _Place:
    """Where a line stands, found out when somebody asks: counting lines means reading what is before."""

    def __init__(self, file: Opened, name: str, at: int) -> None:
        self._file, self._name, self._at = file, name, at

    def __call__(self) -> str:
        return f"{self._name}:{line_at(lambda: chunks_of(self._file, self._name), self._at)}"


def _lines(file: Opened, entry: Entry, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a range of a file (``last`` -1: to its end), each with the byte that it begins at."""
    begin = max(0, first - 1)  # the byte before says whether a line begins at ``first``
    at, head = begin, b""
    held: list[bytes] = []  # of the line that begins at ``at``
    size, skip = 0, first > 0
    for chunk in chunks_of(file, entry.name, begin):
        data = chunk
        if not head and begin == 0:
            head = data[:64]
        if b"\0" in data:
            raise nul_byte(_Place(file, entry.name, at + size + data.index(b"\0"))(), head)
        found = _ENDS.search(data)
        if skip:
            if found is None:
                at += len(data)
                continue
            at, data, skip = at + found.end(), data[found.end() :], False
        elif found is not None:
            data, held, size = b"".join((*held, data)), [], 0
        lines = (data.replace(b"\r", b"\n") if b"\r" in data else data).split(b"\n") if found else [data]
        held.append(lines.pop())
        size += len(held[-1])
        for line in lines:
            if 0 <= last <= at:
                return
            if line:
                yield at, line.removeprefix(BOM)  # one begins each file of several that were joined
            at += len(line) + 1
        if 0 <= last <= at:
            return
        if size > WHOLE_LETTERS:
            raise DatasetError(
                f"{_Place(file, entry.name, at)()} has over {WHOLE_LETTERS >> 20} MiB without an end; is it one JSON "
                "array? It is made into lines by: jq -c '.[]'"
            )
    if size and not skip:
        yield at, b"".join(held).removeprefix(BOM)


def _proposed(value: dict[str, Any], wanted: _Key) -> str:
    """What is probably meant where an object has no text, or conversation, under the key."""
    if wanted.seen:
        return ""
    talks = [key for key in TALKS if isinstance(value.get(key), list)]
    if wanted.talk:
        return f'; data.messages = "{talks[0]}" is probably meant' if talks else ""
    if talks:
        return f"; {talks[0]!r} is a conversation: {A_TALK}"
    texts = sorted((key for key, item in value.items() if isinstance(item, str)), key=lambda key: -len(value[key]))
    if texts:
        return f'; the longest text is data.field = "{_shown(texts[0])}"'
    for key, item in value.items():
        inside = [name for name, text in item.items() if isinstance(text, str)] if isinstance(item, dict) else []
        if inside:
            return (
                f"; a text inside another object is taken out by: jq -c '{{text: .{_shown(key)}.{_shown(inside[0])}}}'"
            )
        if isinstance(item, list) and item and isinstance(item[0], dict):
            return f"; {_shown(key)!r} holds objects: join their texts into one, and write that as a line's text"
    return ""


def _shown(key: str) -> str:
    return key[:40].encode(errors="backslashreplace").decode()


def _once(line: str, where: Callable[[], str], field: _Key) -> None:
    last: list[tuple[str, Any]] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = found
        return dict(found)

    json.loads(line, object_pairs_hook=pairs, parse_int=str)
    if sum(key == field.name for key, _ in last) > 1:
        raise _no_object(where, f'it names "{field.name}" twice', field)


def _object(line: str, where: Callable[[], str], field: _Key) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise _no_object(where, "it is nested too deep", field) from error
    except json.JSONDecodeError as error:
        text, rest = line.strip(), line[error.pos :].strip()
        cut = len(rest) <= 1 or error.msg.startswith("Unterminated")
        mend = "; was the line cut short?" if cut else ""
        if error.msg == "Extra data":
            mend = "; a line holds one object: " + ("take the comma away" if rest == "," else _LINES)
        elif error.msg.startswith("Expecting property name") and rest.startswith("'"):
            mend = "; JSON has double quotes, this is Python's: write it by json.dumps"
        elif error.msg.startswith("Invalid control character"):
            mend = "; inside a text a tab is \\t, a line's end \\n"
        elif not rest and (text == "{" or text.endswith(",") or text.startswith("[")):
            mend = f"; an object stands on one line: {_LINES}" + (" '.[]'" if text.startswith("[") else "")
        elif error.pos == len(line) - len(line.lstrip()):
            mend = f"; it begins with {text[:30]!r}"
        why = f"{error.msg.removesuffix(' at')} at column {error.colno}{mend}"
        raise _no_object(where, why, field) from error
    except ValueError:  # a whole number of more digits than Python reads
        return json.loads(line, parse_int=str)


def _no_object(where: Callable[[], str], why: str, field: _Key) -> DatasetError:
    mend = "name the key of its text (data.field), or use text:GLOB"
    if field.talk:
        mend = "or name the key of its conversation (data.messages)"
    if field.seen:
        mend = "or leave it out"
    return DatasetError(f'{where()} is no JSON object with a "{field.name}" ({why}); mend the line, {mend}')


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
