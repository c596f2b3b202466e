"""The documents of a corpus: files to text, each refused with its name and line where it is not what it says.

Text is UTF-8; a byte order mark is left out, line ends become ``\\n``. In ``text:`` files bytes that are no UTF-8
become U+FFFD with a warning; JSON says UTF-8, so they are refused in ``jsonl:``. Half a surrogate pair in a JSON string
becomes U+FFFD with a warning too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.data.paths import files_of
from trainer.errors import DatasetError

log = logging.getLogger(__name__)

# of the standard library: tests, what installers bring, and tables that a generator wrote
_SKIP_PARTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
_SKIP_FILES = {
    "topics.py",
    "_pydecimal.py",
    "_sysconfigdata",
    "pyodide",
    "stringprep.py",
    "entities.py",
    "keyword.py",
    "token.py",
}
_BOM = b"\xef\xbb\xbf"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "unpack it: gunzip -k"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it: zstd -d"),
    (b"BZh", "bzip2", "unpack it: bunzip2 -k"),
    (b"\xfd7zXZ\0", "xz", "unpack it: unxz -k"),
    (b"\x04\x22\x4d\x18", "LZ4", "unpack it: lz4 -d"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "unpack it: unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PAR1", "Parquet", "write its texts as JSON lines first"),
    (b"ARROW1", "Arrow", "write its texts as JSON lines first"),
    (b"%PDF-", "PDF", "extract its text: pdftotext"),
    (b"SQLite format 3\0", "an SQLite database", "write its texts as JSON lines first"),
    (b"\x89HDF\r\n", "HDF5", "write its texts as JSON lines first"),
    (b"\x93NUMPY", "a NumPy array", "write its texts as JSON lines first"),
    (b"\x89PNG\r\n", "a PNG image", "narrow the pattern"),
    (b"\xff\xd8\xff", "a JPEG image", "narrow the pattern"),
    (b"\x7fELF", "a program", "narrow the pattern"),
    (b"\xff\xfe\0\0", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\0\0\xfe\xff", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
)
_HALF = re.compile("[\ud800-\udfff]")
_TOLD = 3  # places of a kind that are named one by one


@dataclass(frozen=True)
class Document:
    """One text of the corpus: a name that is the same on every machine, and its text."""

    name: str
    text: str


@dataclass
class _Warnings:
    """Damage that is borne: the first few places are named, the others counted."""

    what: str
    count: int = 0

    def add(self, where: str) -> None:
        self.count += 1
        if self.count <= _TOLD:
            log.warning("%s: %s", where, self.what)

    def close(self) -> None:
        if self.count > _TOLD:
            log.warning("%d more: %s", self.count - _TOLD, self.what)


@dataclass
class _Borne:
    bytes: _Warnings = field(
        default_factory=lambda: _Warnings("bytes that are no UTF-8 were replaced by U+FFFD; if the file is in another "
                                          "encoding, convert it: iconv -f WINDOWS-1252 -t UTF-8")
    )  # fmt: skip
    halves: _Warnings = field(
        default_factory=lambda: _Warnings("half a surrogate pair (\\ud800 to \\udfff) was replaced by U+FFFD")
    )

    def close(self) -> None:
        self.bytes.close()
        self.halves.close()


def stdlib_documents() -> Iterator[Document]:
    """The standard library of the running interpreter: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIP_PARTS.intersection(relative.parts) or any(path.name.startswith(s) for s in _SKIP_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding
        if text.strip():
            yield Document(relative.as_posix(), text)


def documents(source: str) -> Iterator[Document]:
    """The documents of a spec's ``data.source``, in a fixed order.

    Raises DatasetError (exit 65) for an unknown kind, a pattern that matches nothing, a file that cannot be read or is
    no text, or a line that is no JSON object with a text.
    """
    kind = source.partition(":")[0]
    if source == "python-stdlib":
        yield from stdlib_documents()
        return
    if kind not in ("text", "jsonl"):
        raise DatasetError(
            f"data.source is {source!r}; known are python-stdlib, text:GLOB, jsonl:GLOB and dataset:DIGEST"
        )
    borne = _Borne()
    for name in files_of(source):
        data = _contents(name)
        if kind == "text":
            yield Document(name, _plain_text(name, data, borne))
            continue
        for number, line in enumerate(_json_lines(name, data), 1):
            if line.strip():
                yield Document(f"{name}:{number}", _text_of(line, f"{name}:{number}", borne))
    borne.close()


def _contents(name: str) -> bytes:
    """A file's bytes without a byte order mark, as they were at one moment."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise DatasetError(f"{name} is no regular file any more; start again when nobody writes there")
            data = file.read()
            after = os.fstat(descriptor)
    except OSError as error:
        raise DatasetError(
            f"{name} cannot be read: {error.strerror}; mend its rights or narrow data.source"
            if not isinstance(error, FileNotFoundError)
            else f"{name} vanished while the corpus was read; start again when nobody writes there"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DatasetError(f"{name} changed while it was read; start again when nobody writes there")
    for magic, what, mend in _MAGIC:
        if data.startswith(magic) and (magic != b"BZh" or data[3:4].isdigit()):
            path = f" {name!r}" if ":" in mend else ""
            raise DatasetError(f"{name} is {what}, not text in UTF-8; {mend}{path}")
    if data[257:262] == b"ustar":
        raise DatasetError(f"{name} is a tar archive, not text; unpack it: tar xf {name!r}")
    return data.removeprefix(_BOM)


def _place(name: str, data: bytes, at: int) -> str:
    line = data.count(b"\n", 0, at) + 1
    return f"{name}:{line}"


def _no_nul(name: str, data: bytes) -> None:
    at = data.find(b"\0")
    if at >= 0:
        half = data[:64].count(0) * 2 >= min(len(data), 64) - 2 > 0
        what = "text in UTF-16 without its mark; convert it: iconv -f UTF-16LE -t UTF-8" if half else (
            "no text (a binary file, or one whose end was never written); narrow data.source, or mend the file"
        )  # fmt: skip
        raise DatasetError(f"{_place(name, data, at)} holds a NUL byte: the file is {what}")


def _universal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _plain_text(name: str, data: bytes, borne: _Borne) -> str:
    _no_nul(name, data)
    try:
        return _universal(data.decode())
    except UnicodeDecodeError as error:
        borne.bytes.add(f"{_place(name, data, error.start)} (byte 0x{data[error.start]:02X})")
        return _universal(data.decode(errors="replace"))


def _json_lines(name: str, data: bytes) -> list[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{_place(name, data, error.start)} holds the byte 0x{data[error.start]:02X}, which is no UTF-8, and JSON "
            f"is: if the file is in another encoding, convert it: iconv -f WINDOWS-1252 -t UTF-8 {name!r}"
        ) from error
    _no_nul(name, data)
    return _universal(text).split("\n")


def _text_of(line: str, where: str, borne: _Borne) -> str:
    """The text of a JSON line, or DatasetError."""
    value = _object(line, where)
    if not isinstance(value, dict):
        mend = "; an array is made into lines by: jq -c '.[]'" if isinstance(value, list) else ""
        raise _no_object(where, f"it is {_kind(value)}{mend}")
    if "text" not in value:
        keys = ", ".join(sorted(map(repr, value))[:5]).encode(errors="backslashreplace").decode()
        raise _no_object(where, f"its keys are {keys}" if value else "it is empty")
    text = value["text"]
    if not isinstance(text, str):
        raise _no_object(where, f"its text is {_kind(text)}")
    if line.count('"text"') > 1:
        last: list[tuple[str, Any]] = []

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            last[:] = found
            return dict(found)

        json.loads(line, object_pairs_hook=pairs, parse_int=str)
        if sum(key == "text" for key, _ in last) > 1:
            raise _no_object(where, 'it names "text" twice')
    if not text.isascii() and _HALF.search(text):
        borne.halves.add(where)
        return _HALF.sub("\ufffd", text)
    return text


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise _no_object(where, "it is nested too deep") from error
    except json.JSONDecodeError as error:
        cut = error.pos >= len(line.rstrip()) - 1 or error.msg.startswith("Unterminated")
        why = f"{error.msg} at column {error.colno}" + ("; was the line cut short?" if cut else "")
        raise _no_object(where, why) from error
    except ValueError:  # a whole number of more digits than Python reads
        return json.loads(line, parse_int=str)


def _no_object(where: str, why: str) -> DatasetError:
    return DatasetError(f'{where} is no JSON object with a "text" ({why}); mend the line or use text:GLOB')


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
