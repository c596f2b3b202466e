"""Texts in columns of tables: Parquet files (by pyarrow), and what Hugging Face's ``datasets`` gives.

``parquet:GLOB``; ``hf:FOLDER`` (of ``save_to_disk``), ``hf:OWNER/NAME[?name=…&split=…&revision=…]``. Both libraries are
optional. Null is no text: such a row is refused, with its number.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flows.data.sources.base import (
    A_TALK,
    BESIDE,
    TALKS,
    Borne,
    Document,
    Entry,
    look_beside,
    no_prompt,
    optional_module,
    whole_pairs,
)
from flows.data.sources.files import GZIP, PACKED, Opened, look_at_files, opened_file, refuse_formats
from flows.data.sources.objects import is_object
from flows.data.sources.talk import TALK_BESIDE, TalkReader
from trainer.errors import DatasetError, SpecError
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

_TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi", "metadata/*.metadata.json": "Iceberg"}
"""What lies in a table's folder, by which it is known."""
_ROWS = 256  # that are in memory at a time, where they are not of more bytes than that:
_BYTES = 16 << 20


@dataclass
class _Rows:
    """What is read of each row. ``more``: columns that a filter looks at; None: all. ``talk``: reads a conversation in
    place of the text.
    """

    source: str
    field: str
    prompt: str | None
    more: Sequence[str] | None
    talk: TalkReader | None = None

    def documents(self, rows: Sequence[Mapping[str, Any]], name: str, first: int, borne: Borne) -> Iterator[Document]:
        if self.talk is None:
            yield from _texts(rows, self.field, self.prompt, name, first, borne)
            return
        whole = self.more is None or bool(self.more)
        for number, row in enumerate(rows, first + 1):
            yield from self.talk.documents(row, functools.partial(_place, name, number), borne, whole)


@dataclass
class ParquetSource(_Rows):
    """``parquet:GLOB``; its row groups are read alone."""

    _seen: set[str] = dataclasses.field(default_factory=set, init=False)  # columns that a file before has

    def __post_init__(self) -> None:
        optional_module("pyarrow.parquet", "pyarrow", "parquet:")

    def look(self) -> list[Entry]:
        entries = look_at_files(self.source)
        for folder, kind in sorted(_versioned(entry.name for entry in entries).items()):
            log.warning(
                "%s is a table of %s, and rows that were deleted or replaced since stay in its files: all are read; "
                "write what it holds now as Parquet of its own",
                shown(folder),
                kind,
            )
        return entries

    def divides(self, entry: Entry) -> bool:
        return True

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        """``first`` and ``last`` are of bytes: a row group is of the range in which it begins."""
        with opened_file(entry) as file, _table(file, entry) as table:
            if self.talk is not None:
                self._check_talk(table, entry, self.talk.key)
            else:
                self._check(table, entry, self.field)
            if self.prompt is not None:
                self._check(table, entry, self.prompt)
            columns = self._columns(table)
            row, groups = 0, table.metadata.num_row_groups
            for number in range(groups):
                group = table.metadata.row_group(number)
                begin = _begin(group) if number else 0
                if first <= begin and (last < 0 or begin < last):
                    rows = max(1, min(_ROWS, _BYTES * group.num_rows // max(1, _bytes_of(group, columns))))
                    for batch in table.iter_batches(rows, [number], columns, use_threads=False):
                        held = _listed(batch, entry.name, row)
                        yield from self.documents(held, entry.name, row, borne)
                        row += batch.num_rows
                else:
                    row += group.num_rows

    def _check(self, table: Any, entry: Entry, field: str) -> None:
        schema, key = table.schema_arrow, "data.prompt_field" if field == self.prompt else "data.field"
        if field not in schema.names:
            if field in self._seen:
                shown = ", ".join(map(repr, schema.names[:8])) or "none"
                raise DatasetError(
                    f"{entry.name} has no column {field!r}, as the files before it have; its columns are {shown}: "
                    "name it so there, or leave the file out of data.source"
                )
            mine = (self.field, self.prompt)
            texts = [name for name in schema.names if name not in mine and _is_text(schema.field(name).type)]
            raise DatasetError(_no_column(entry.name, field, schema.names, texts, key))
        if schema.names.count(field) > 1:
            raise DatasetError(f"{entry.name} has two columns {field!r}; rename one")
        kind = schema.field(field).type
        if not _is_text(kind):
            texts = [name for name in schema.names if _is_text(schema.field(name).type)]
            mend = (
                f"; columns of text are {', '.join(texts[:5])} ({key})"
                if texts and not _spoken(kind)
                else _cast(kind, entry.name)
            )
            raise DatasetError(f"{entry.name}: its column {field!r} is of type {kind}, not of text{mend}")
        self._seen.add(field)

    def _check_talk(self, table: Any, entry: Entry, key: str) -> None:
        schema = table.schema_arrow
        if key not in schema.names or schema.names.count(key) > 1 or not _spoken(schema.field(key).type):
            kind = schema.field(key).type if schema.names.count(key) == 1 else None
            talks = [one.name for one in schema if _spoken(one.type)]
            raise _no_talk(entry.name, key, schema.names, kind, talks)

    def _columns(self, table: Any) -> list[str] | None:
        if self.more is None:
            return None
        schema, more = table.schema_arrow, self.more
        if self.talk is not None:
            return _columns_of(schema.names, self.talk.key, None, (*more, *TALK_BESIDE))
        if self.prompt is not None:
            more = (
                *more,
                *(name for name in BESIDE if schema.names.count(name) == 1 and _is_text(schema.field(name).type)),
            )
        return _columns_of(schema.names, self.field, self.prompt, more)


def _versioned(names: Iterable[str]) -> dict[str, str]:
    """The folders on the way to these files that are tables whose files hold former rows too, and of what kind."""
    found: dict[str, str] = {}
    seen = {"/"}
    for name in names:
        folder = "/" if is_object(name) else os.path.dirname(name) or "."
        while folder not in seen:
            seen.add(folder)
            for mark, kind in _TABLES.items():
                if glob.glob(os.path.join(glob.escape(folder), mark)):
                    found[folder] = kind
            folder = os.path.dirname(folder) or ("/" if folder == "." else ".")
    return found


def _listed(batch: Any, name: str, first: int) -> Sequence[Mapping[str, Any]]:
    """Rows of a batch as Python's values. DatasetError, with the column, where those have no room for one."""
    try:
        rows: Sequence[Mapping[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (ArithmeticError, LookupError, ValueError):  # dates, times and spans of time beyond Python's, zones
        for column in batch.schema.names:
            try:
                batch.column(column).to_pylist()
            except (ArithmeticError, LookupError, ValueError) as error:
                raise DatasetError(
                    f"{name}, rows {first + 1:,} to {first + batch.num_rows:,}: the column {column!r} of type "
                    f"{batch.schema.field(column).type} holds what Python has no value for ({error}), and "
                    "data.filter.predicate is given all columns: write it as text or numbers, or leave it out of the "
                    "file"
                ) from error
        raise
    return rows


def _cast(kind: Any, name: str) -> str:
    """How a column becomes one of text."""
    types = optional_module("pyarrow.types", "pyarrow", "parquet:")
    if types.is_null(kind):
        return f"; all of it is null: leave {name} out of data.source"
    if _spoken(kind):
        return f": it is a conversation, {A_TALK}"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return '; write it as one: table.column(…).cast("string"), by who wrote the file'
    return "; write its texts as a column of their own, or as JSON lines (jsonl:GLOB)"


def _spoken(kind: Any) -> bool:
    """Whether a column's type is that of conversations."""
    return re.search(r"\b(role|from)\b", str(kind)) is not None


def _is_text(kind: Any) -> bool:
    types = optional_module("pyarrow.types", "pyarrow", "parquet:")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view")


def _columns_of(names: Sequence[str], field: str, prompt: str | None, more: Sequence[str]) -> list[str]:
    """Those that are read."""
    must = [field] if prompt is None else [field, prompt]
    return [*must, *(name for name in more if name in names and name not in must)]


def _no_column(where: str, field: str, names: Sequence[str], texts: Sequence[str], key: str = "data.field") -> str:
    shown = ", ".join(map(repr, list(names)[:8])) or "none"
    what = "its text" if key == "data.field" else "its prompt"
    mend = f'name the one of {what}: {key} = "{texts[0]}"' if texts else "no other one is of text"
    talk = next((name for name in names if name in TALKS), None)
    if talk is not None:
        mend = f"{talk!r} is a conversation: {A_TALK}"
    return f"{where} has no column {field!r}; its columns are {shown}: {mend}"


def _no_talk(where: str, key: str, names: Sequence[str], kind: object, talks: Sequence[str]) -> DatasetError:
    what = f"its column {key!r} is of type {kind}, not of conversations" if kind is not None else f"no column {key!r}"
    if names.count(key) > 1:
        what = f"two columns {key!r}"
    mend = f'name one of conversations: data.messages = "{talks[0]}"' if talks else "no column is of conversations"
    shown = ", ".join(map(repr, list(names)[:8])) or "none"
    return DatasetError(f"{where}: {what} (its columns are {shown}); {mend}: lists of messages with role and content")


def _bytes_of(group: Any, columns: Sequence[str] | None) -> int:
    """Of these columns of a row group, unpacked."""
    found = (group.column(number) for number in range(group.num_columns))
    return sum(
        int(one.total_uncompressed_size)
        for one in found
        if columns is None or one.path_in_schema.partition(".")[0] in columns
    )


def _begin(group: Any) -> int:
    """The byte of the file at which a row group begins."""
    column = group.column(0)
    at = column.dictionary_page_offset
    return int(column.data_page_offset if at is None else min(at, column.data_page_offset))


@contextmanager
def _table(file: Opened, entry: Entry) -> Iterator[Any]:
    """An open Parquet file; what pyarrow raises while it is used becomes DatasetError."""
    arrow = optional_module("pyarrow", "pyarrow", "parquet:")
    parquet = optional_module("pyarrow.parquet", "pyarrow", "parquet:")
    head, tail = file.read(0, 512), file.read(max(0, entry.size - 4), 4)
    if not head.startswith(b"PAR1"):
        raise _no_parquet(entry.name, head)
    if tail != b"PAR1":
        raise DatasetError(f"{entry.name} is a Parquet file that was cut short (its end is missing); fetch it anew")
    try:
        source = arrow.PythonFile(_Seekable(file, entry.size), mode="r")
        with parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
            yield table
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{entry.name} holds text that is no UTF-8 (byte 0x{error.object[error.start]:02X}); write it anew"
        ) from error
    except (arrow.ArrowException, OSError) as error:
        mend = "fetch it anew, or leave it out of data.source"
        if os.path.basename(entry.name).startswith("_"):
            mend = "files of such names hold no rows of their own: name those beside it, parquet:FOLDER/*.parquet"
        elif "decrypt" in str(error):
            mend = "its columns are encrypted: write it without"
        raise DatasetError(f"{entry.name} does not read as Parquet: {str(error)[:200]}; {mend}") from error


def _no_parquet(name: str, head: bytes) -> DatasetError:
    kinds = "if it lies beside Parquet files, name those: parquet:FOLDER/*.parquet"
    if not head:
        return DatasetError(f"{name} is no Parquet file: it is empty; fetch it anew, or {kinds}")
    if head.startswith(PACKED):
        unpack = "gunzip" if head.startswith(GZIP) else "unzstd"
        return DatasetError(f"{name} is no Parquet file: it is packed once more; unpack it: {unpack} -k {name!r}")
    refuse_formats(name, head, "a Parquet file")
    if head.lstrip().startswith(b"{"):
        return DatasetError(f"{name} is no Parquet file: it begins as JSON; read it with jsonl:GLOB")
    return DatasetError(f"{name} is no Parquet file: it begins with {head[:4]!r}, not with b'PAR1'; {kinds}")


class _Seekable(io.RawIOBase):
    """A file for pyarrow."""

    def __init__(self, file: Opened, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _texts(
    rows: Sequence[Mapping[str, Any]],
    field: str,
    prompt_field: str | None,
    name: str,
    first: int,
    borne: Borne,
) -> Iterator[Document]:
    for number, row in enumerate(rows, first + 1):
        where = functools.partial(_place, name, number)
        text = row[field]
        if not isinstance(text, str):
            what = "null" if text is None else f"of type {type(text).__name__}"
            raise DatasetError(
                f"{where()} has no text: its {field} is {what}; leave such rows out when the file is written, or name "
                "another column (data.field)"
            )
        prompt = None
        if prompt_field is not None:
            prompt = row[prompt_field]
            if not isinstance(prompt, str):
                raise no_prompt(where, f"its {prompt_field} is {'null' if prompt is None else type(prompt).__name__}")
            prompt = whole_pairs(_lines_of(prompt), where, borne)
            look_beside(row, (field, prompt_field), where, borne)
        more = {k: v for k, v in row.items() if k not in (field, prompt_field)}
        yield Document(where, whole_pairs(_lines_of(text), where, borne), more, prompt=prompt)


def _lines_of(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _place(name: str, number: int) -> str:
    return f"{name}, row {number:,}"


class HubSource(_Rows):
    """``hf:…``; rows are read alone. Each worker opens it for itself, from the library's cache."""

    def look(self) -> list[Entry]:
        _hub.cache_clear()  # there may be another one by now
        table = _hub(self.source)
        names = table.column_names
        if self.talk is not None and not _spoken(table.features.get(self.talk.key, "")):
            key, talks = self.talk.key, [name for name in names if _spoken(table.features[name])]
            kind = _kind_of(table, key) if key in names else None
            raise _no_talk(f"data.source {self.source!r}", key, names, kind, talks)
        for field, key in ((self.field, "data.field"), (self.prompt, "data.prompt_field")):
            if field is None or self.talk is not None:
                continue
            texts = [name for name in names if _kind_of(table, name) in _TEXTS]
            if field not in names:
                others = [name for name in texts if name not in (self.field, self.prompt)]
                raise DatasetError(_no_column(f"data.source {self.source!r}", field, names, others, key))
            if field not in texts:
                mend = f"; columns of text are {', '.join(texts[:5])} ({key})" if texts else "; write its texts as one"
                mend = f": it is a conversation, {A_TALK}" if _spoken(table.features[field]) else mend
                raise DatasetError(
                    f"data.source {self.source!r}: its column {field!r} is of type {_kind_of(table, field)}, not of "
                    f"text{mend}"
                )
        if not len(table):
            raise DatasetError(f"data.source {self.source!r} has no rows; the corpus is empty")
        size = sum(int(file["size"]) for file in _files(table)) or len(table) * 1024
        return [Entry(self.source, size, f"{table._fingerprint} {len(table)}")]

    def divides(self, entry: Entry) -> bool:
        return True

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        """``first`` and ``last`` are of bytes as far as the look could tell: rows are taken in proportion."""
        table = _hub(self.source)
        if f"{table._fingerprint} {len(table)}" != entry.mark:
            raise DatasetError(f"{self.source} changed while it was read; start again when nobody writes there")
        rows = len(table)
        begin, end = rows * first // entry.size, rows if last < 0 else rows * last // entry.size
        if self.more is not None:
            beside = BESIDE if self.prompt is not None else ()
            more = (*self.more, *(n for n in beside if n in table.column_names and _kind_of(table, n) in _TEXTS))
            if self.talk is not None:
                more = (*self.more, *TALK_BESIDE)
            must = self.field if self.talk is None else self.talk.key
            table = table.select_columns(_columns_of(table.column_names, must, self.prompt, more))
        step = max(1, min(_ROWS, _BYTES * rows // entry.size))
        for at in range(begin, end, step):
            with _by_datasets(f"{self.source}, rows {at + 1:,} to {min(at + step, end):,} cannot be read"):
                columns = table[at : min(at + step, end)]
            batch = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            yield from self.documents(batch, self.source, at, borne)


_TEXTS = ("string", "large_string", "string_view")


def _kind_of(table: Any, name: str) -> str:
    """The type of a column, as the library calls it."""
    feature = table.features[name]
    return str(getattr(feature, "dtype", type(feature).__name__))


def _files(table: Any) -> list[dict[str, Any]]:
    """Its Arrow files, with their sizes."""
    return [{"size": os.path.getsize(f["filename"])} for f in table.cache_files if os.path.exists(f["filename"])]


@contextmanager
def _by_datasets(what: str) -> Iterator[None]:
    """What the library raises as DatasetError."""
    try:
        yield
    except Exception as error:  # its own, its file systems', its downloads', of columns that it unpacks: dozens
        said = error
        while str(said).startswith("An error occurred while generating") and isinstance(said.__cause__, Exception):
            said = said.__cause__  # which says what
        why = " ".join(str(said).split())[:300] or type(said).__name__
        mend = "; name one of them, hf:…?name=…" if why.startswith("Config name is missing") else ""
        if "cast" in why.lower():
            mend = "; its files differ in their columns: jsonl:GLOB and parquet:GLOB read the column of the text alone"
        if why.startswith("Dataset scripts are no longer supported"):
            mend = (
                "; take the script out of the folder, or read its files by parquet:GLOB or jsonl:GLOB; of one on the "
                "Hub take the copy without it: hf:NAME?revision=refs/convert/parquet"
            )
        if why.startswith("Unable to find"):
            why = why.partition(" with any supported extension")[0]
            mend = "; its README.md names it (configs, data_files): correct that, or read its files by parquet:GLOB"
        if "on the Hub" in why:
            mend = "; there is no such folder here, so it was looked for there"
        raise DatasetError(f"{what} by datasets: {why}{mend}") from error


@functools.lru_cache(maxsize=2)
def _hub(source: str) -> Any:
    datasets = optional_module("datasets", "Hugging Face's datasets", "hf:")
    path, _, query = source.partition(":")[2].partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"name", "split", "revision"})
    if unknown:
        raise SpecError(f"data.source {source!r}: unknown option {unknown[0]!r}; there are name, split and revision")
    folder = os.path.expanduser(path)
    split = options.pop("split", None)
    datasets.disable_progress_bars()
    saved = any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
    if saved and options:
        raise SpecError(f"data.source {source!r}: what save_to_disk wrote has no {next(iter(options))}; leave that out")
    with _by_datasets(f"data.source {source!r} cannot be opened"):
        if saved:
            found = datasets.load_from_disk(folder)
        else:
            found = datasets.load_dataset(folder if os.path.isdir(folder) else path, **options)
    if isinstance(found, Mapping):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            named = f"no split {split!r}" if split else "several splits"
            raise DatasetError(
                f"data.source {source!r} has {named}; it has {', '.join(map(str, found))}: name one, "
                f"hf:{path}?split={next(iter(found), 'train')}"
            )
        found = found[split]
    elif split not in (None, str(found.split)):
        raise DatasetError(
            f"data.source {source!r} has no split {split!r}: it is one table, all of whose rows are read; leave "
            "?split= out, or save the rows that are meant as a dataset of their own"
        )
    return found.with_format(None)  # it may have been saved as torch's, NumPy's, or with some of its columns alone
