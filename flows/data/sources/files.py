"""Bytes of a corpus: local files and objects of S3 behind one seam, and what is compressed (gzip, Zstandard).

A file is what it was when it was looked at: its size and times are compared before and after it is read, an object is
asked for by its ETag. Nothing is held but the chunk in hand.
"""

from __future__ import annotations

import logging
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from flows.data.sources.base import Entry, changed, optional_module, vanished
from flows.data.sources.objects import is_object, look_at_objects, open_object
from flows.data.sources.paths import files_of
from trainer.errors import DatasetError
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((first, 0x2A, 0x4D, 0x18)) for first in range(0x50, 0x60)))
"""A frame, or one that is skipped: pzstd and seekable files begin with those."""
PACKED = (GZIP, *ZSTD)
_ZSTD_WINDOW = 1 << 27
_ZSTD_STEP = 1 << 10
"""Bytes that are unpacked at a time: four of them may stand for 128 KiB."""
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "bzip2", "unpack it: bunzip2 -k"),
    (b"\xfd7zXZ\0", "xz", "unpack it: unxz -k"),
    (b"\x1f\x9d", "packed by compress", "unpack it: gzip -dc"),
    (b"\x04\x22\x4d\x18", "LZ4", "unpack it: lz4 -d"),
    (b"\x02\x21\x4c\x18", "LZ4", "unpack it: lz4 -d"),
    (b"\x5d\0\0", "packed by lzma", "unpack it: unlzma -k"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "unpack it: unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PAR1", "Parquet", "read it with parquet:GLOB"),
    (b"PARE", "Parquet, encrypted", "write it without its encryption"),
    (b"ARROW1", "Arrow", "write its texts as Parquet (parquet:GLOB) or JSON lines"),
    (b"FEA1", "Feather, version 1", "write its texts as Parquet (parquet:GLOB) or JSON lines"),
    (b"\xff\xff\xff\xff", "a stream of Arrow", "write its texts as Parquet (parquet:GLOB) or JSON lines"),
    (b"MMIDIDX\0", "the index of Megatron's tokens", "name the texts that they were made of"),
    (b"\x88\xd8\x34\x01", "a file of llm.c's tokens", "name the texts that they were made of"),
    (b"\xa1\xd9\x34\x01", "a file of llm.c's tokens", "name the texts that they were made of"),
    (b"WARC/1.", "an archive of web pages (WARC)", "write its texts as JSON lines first"),
    (b"<mediawiki ", "a dump of MediaWiki", "write its texts as JSON lines first: wikiextractor --json"),
    (b"%PDF-", "PDF", "extract its text: pdftotext"),
    (b"SQLite format 3\0", "an SQLite database", "write its texts as JSON lines first"),
    (b"\x89HDF\r\n", "HDF5", "write its texts as JSON lines first"),
    (b"\x93NUMPY", "a NumPy array", "write its texts as JSON lines first"),
    (b"Obj\x01", "Avro", "write its texts as JSON lines first"),
    (b"ORC", "ORC", "write its texts as JSON lines first"),
    (b"\xff\x06\0\0sNaPpY", "packed by Snappy", "unpack it: snzip -dk"),
    (b"LZIP", "packed by lzip", "unpack it: lzip -dk"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x"),
    (b"{\\rtf", "RTF", "extract its text: unrtf --text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document", "save it as plain text"),
    *((bytes((128, n)), "a Python pickle", "write its texts as JSON lines first") for n in (2, 3, 4, 5)),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS, not the file", "fetch that: git lfs pull"),
    (b"\x89PNG\r\n", "a PNG image", "narrow the pattern"),
    (b"\xff\xd8\xff", "a JPEG image", "narrow the pattern"),
    (b"\x7fELF", "a program", "narrow the pattern"),
    (b"\xff\xfe\0\0", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\0\0\xfe\xff", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
)


class Opened(Protocol):
    """A file that is being read."""

    def read(self, first: int, length: int) -> bytes:
        """These bytes; fewer at the end."""

    def check(self) -> None:
        """DatasetError where the file is another one by now."""


def look_at_files(source: str) -> list[Entry]:
    """The files of ``kind:PATTERN``, in the order of their names; the pattern may be of an S3 bucket."""
    if is_object(source.partition(":")[2]):
        return look_at_objects(source)
    names = files_of(source)
    there = set(names)
    twice = [name for name in names if name.endswith((".gz", ".zst")) and name.rpartition(".")[0] in there]
    if twice:
        log.warning(
            "data.source %s: %d file(s) are there packed and unpacked, such as %s and %s, and both are read: narrow "
            "the pattern, or remove one",
            shown(source),
            len(twice),
            shown(twice[0].rpartition(".")[0]),
            shown(twice[0]),
        )
    return [entry_of(name) for name in names]


def entry_of(name: str) -> Entry:
    try:
        return _entry(name, os.stat(name))
    except FileNotFoundError:
        raise vanished(name) from None
    except OSError as error:
        raise _unreadable(name, error) from error


def _entry(name: str, status: os.stat_result) -> Entry:
    mark = f"{status.st_mtime_ns} {status.st_ctime_ns}"  # no inode: mounted buckets number a file anew at each look
    return Entry(name, status.st_size, mark, max(status.st_mtime, status.st_ctime))


@contextmanager
def opened_file(entry: Entry) -> Iterator[Opened]:
    """The entry's bytes. DatasetError where it cannot be read, or is not what the look saw: at the end too."""
    if is_object(entry.name):
        yield open_object(entry)
        return
    try:
        descriptor = os.open(entry.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise vanished(entry.name) from None
    except OSError as error:
        raise _unreadable(entry.name, error) from error
    try:
        file = _Local(entry, descriptor)
        file.check()
        try:
            yield file
        except DatasetError:
            file.check()  # what was found wrong is of neither file where somebody has written meanwhile
            raise
        file.check()
    finally:
        os.close(descriptor)


class _Local:
    def __init__(self, entry: Entry, descriptor: int) -> None:
        self._entry, self._descriptor = entry, descriptor

    def read(self, first: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, first)
        except OSError as error:
            raise _unreadable(self._entry.name, error) from error

    def check(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{self._entry.name} is no regular file any more; start again when nobody writes there")
        if _entry(self._entry.name, status) != self._entry:
            raise changed(self._entry.name)


def _unreadable(name: str, error: OSError) -> DatasetError:
    return DatasetError(f"{name} cannot be read: {error.strerror}; mend its rights or narrow data.source")


def is_packed(file: Opened) -> bool:
    """Whether its bytes can be read from the beginning alone."""
    return file.read(0, 4).startswith(PACKED)


def chunks_of(file: Opened, name: str, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The bytes of a file in that range, unpacked where it is packed (the range is of the unpacked ones then).

    DatasetError where it is of a format that holds no plain text, or a packed one is cut short or damaged.
    """
    head = file.read(0, 512)
    plain = _plain(file, first, last) if not head.startswith(PACKED) else None
    if plain is not None:
        if first == 0:
            refuse_formats(name, head)
        yield from plain
        return
    at, begun = 0, False
    for data in (_gunzip if head.startswith(GZIP) else _unzstd)(file, name):
        if not begun:
            refuse_formats(name, data[:512])
            if data.startswith(PACKED):
                raise DatasetError(f"{name} is packed twice; unpack it once, or leave it out of data.source")
            begun = True
        begin, end = max(first - at, 0), len(data) if last is None else min(last - at, len(data))
        if begin < end:
            yield data[begin:end]
        at += len(data)
        if last is not None and at >= last:
            return


def _plain(file: Opened, first: int, last: int | None) -> Iterator[bytes]:
    while last is None or first < last:
        data = file.read(first, CHUNK if last is None else min(CHUNK, last - first))
        if not data:
            return
        yield data
        first += len(data)


def refuse_formats(name: str, head: bytes, wanted: str = "text in UTF-8") -> None:
    """DatasetError where a file that begins so is of a format that is not what is ``wanted``."""
    what, mend = format_of(head)
    if what:
        path = f" {name!r}" if ":" in mend and "GLOB" not in mend else ""
        raise DatasetError(f"{name} is {what}, not {wanted}; {mend}{path}")


def format_of(head: bytes) -> tuple[str, str]:
    """What a file is that begins so, and what makes text of it; empty where that is not known.

    >>> format_of(b"%PDF-1.7")
    ('PDF', 'extract its text: pdftotext')
    """
    for magic, what, mend in _MAGIC:
        if head.startswith(magic) and (magic != b"BZh" or head[3:4].isdigit()):
            return what, mend
    return ("a tar archive", "unpack it: tar xf") if head[257:262] == b"ustar" else ("", "")


def _cut_short(name: str, what: str, at: int) -> DatasetError:
    return DatasetError(
        f"{name} ends in the middle of its {what} data (after {at:,} bytes of text): it was cut short; fetch it anew, "
        "or leave it out of data.source"
    )


def _broken(name: str, what: str, at: int, error: Exception) -> DatasetError:
    if "ictionary" in str(error):
        return DatasetError(f"{name} was packed with a dictionary (zstd -D), which is not here; pack it again without")
    return DatasetError(
        f"{name} holds {what} data that do not unpack (after {at:,} bytes of text: {error}); fetch it anew, or leave "
        "it out of data.source"
    )


def _gunzip(file: Opened, name: str) -> Iterator[bytes]:
    """All members of a gzip file, one after the other."""
    unpack, done, inside = zlib.decompressobj(wbits=31), 0, False
    for data in _plain(file, 0, None):
        while data:
            if not inside:
                data = data.lstrip(b"\0")  # padding between members and at the end
                if not data:
                    break
            inside = True
            try:
                out = unpack.decompress(data, CHUNK)
            except zlib.error as error:
                raise _broken(name, "gzip", done, error) from error
            data = unpack.unconsumed_tail
            if out:
                done += len(out)
                yield out
            if unpack.eof:
                data, inside = unpack.unused_data, False
                unpack = zlib.decompressobj(wbits=31)
        while inside and (out := unpack.decompress(b"", CHUNK)):
            done += len(out)
            yield out
        if unpack.eof:
            unpack, inside = zlib.decompressobj(wbits=31), False
    if inside:
        raise _cut_short(name, "gzip", done)


def _unzstd(file: Opened, name: str) -> Iterator[bytes]:
    """All frames of a Zstandard file, one after the other."""
    zstandard = optional_module("zstandard", "zstandard", name)
    done, inside, unpack = 0, False, None
    for whole in _plain(file, 0, None):
        data = whole
        while data:
            if unpack is None:
                unpack, inside = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(), True
            piece, data = data[:_ZSTD_STEP], data[_ZSTD_STEP:]
            try:
                out = unpack.decompress(piece)
            except zstandard.ZstdError as error:
                if "memory" in str(error):
                    raise DatasetError(
                        f"{name} was packed with a window above {_ZSTD_WINDOW >> 20} MiB (zstd --long or --ultra); "
                        "pack it again without"
                    ) from error
                raise _broken(name, "Zstandard", done, error) from error
            if out:
                done += len(out)
                yield out
            if unpack.eof:
                data, unpack, inside = unpack.unused_data + data, None, False
    if inside:
        raise _cut_short(name, "Zstandard", done)
