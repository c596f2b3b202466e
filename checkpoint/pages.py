"""Manifests of any size as objects of at most 4 MiB: one that is larger lies in pages, and its name holds their list.

What does not fit one object is cut into pages, in order, ``manifests/<point>/pages/<label>-<index>``; under the name
itself lies the list, a sealed map (codec.py):

    v       2
    bytes   of the whole
    sha256  of the whole, 32 bytes
    pages   [[name relative to the run, bytes, sha256 (32 bytes)]...]

An object that is no such map is the whole by itself: every manifest that fits, and those of versions before this one,
which wrote up to 64 MiB under one name. Order of calls: ``write`` creates the pages, then the list, so that whoever
finds the name finds everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from checkpoint import codec, keys
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.store.base import Store

VERSION = 2
PAGE_BYTES = 4 << 20
ONE_OBJECT_BYTES = 64 << 20
"""Of a manifest in one object, as older versions wrote them."""
WHOLE_BYTES = 2 << 30
"""Of a whole manifest: about five trillion parameters."""
_LIST_HEAD = b"\x85\xa5bytes"  # a sealed map of four entries, the first of them ``bytes``


class TooLarge(CheckpointError):
    """A checkpoint whose manifest has no place: its layout must have larger blocks."""

    exit_code = 78


def write(store: Store, run: str, name: str, data: Iterable[codec.Data] | bytes, label: str) -> tuple[bytes, bool]:
    """Create the object of this name (relative to the run), with pages where it needs them. ``data``: the whole, or its
    pieces one after the other, of which a page is held at a time.

    What lies under the name, and whether it is ours: False where another one, of other bytes, was there first. The
    ``label`` (letters, digits and dashes) makes the pages' names this writer's own, or those of all that write the
    same bytes. Raises Damaged where a page of its name has other bytes.
    """
    whole, total = hashlib.sha256(), 0
    rows: list[list[object]] = []
    root = b""
    for page, last in _cut((data,) if isinstance(data, bytes) else data):
        total += len(page)
        if total > WHOLE_BYTES:
            raise TooLarge(f"manifest {name} has more than {WHOLE_BYTES} bytes: report this as a bug")
        if last and not rows:
            root = page
            break
        digest = hashlib.sha256(page).digest()
        whole.update(page)
        own = keys.page_name(name, label, len(rows))
        if not store.create(keys.run_key(run, own), page, sha256=digest):
            raise Damaged(f"page {own} of manifest {name} is there with other bytes")
        rows.append([own, len(page), digest])
    if rows:
        root = codec.seal({"v": VERSION, "bytes": total, "sha256": whole.digest(), "pages": rows})
    return root, store.create(keys.run_key(run, name), root)


def _cut(pieces: Iterable[codec.Data]) -> Iterator[tuple[bytes, bool]]:
    """Pages, full but for the last one, and whether it is that."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) > PAGE_BYTES:
            page = bytes(held[:PAGE_BYTES])
            del held[:PAGE_BYTES]
            yield page, False
    yield bytes(held), True


def read(store: Store, run: str, name: str, what: str, *, size: int | None = None, sha256: str | None = None) -> bytes:
    """The whole that lies under this name. ``size`` and ``sha256`` (hex): of the object itself, where they are known.

    NotFound where there is no such object; Damaged where anything of it is not what it should be.
    """
    limit = ONE_OBJECT_BYTES if size is None else min(size, ONE_OBJECT_BYTES)
    root = store.get(keys.run_key(run, name), max_bytes=limit)
    if (size is not None and len(root) != size) or (sha256 is not None and hashlib.sha256(root).hexdigest() != sha256):
        raise Damaged(f"{what}: its bytes are not those that the log names")
    if not is_list(root):
        return root
    total, digest, rows = _parse(root, what)
    held: list[bytes] = []
    for page, length, own in rows:
        try:
            data = store.get(keys.run_key(run, page), max_bytes=length)
        except NotFound as error:
            raise Damaged(f"{what}: its page {page} is gone") from error
        if len(data) != length or hashlib.sha256(data).digest() != own:
            raise Damaged(f"{what}: its page {page} has other bytes than its list says")
        held.append(data)
    whole = b"".join(held)
    del held
    if len(whole) != total or hashlib.sha256(whole).digest() != digest:
        raise Damaged(f"{what}: its pages together are not what its list says")
    return whole


def check_list(root: bytes, what: str) -> bool:
    """Whether these bytes are a list of pages; Damaged or OtherVersion where they are one that does not hold."""
    if is_list(root):
        _parse(root, what)
    return is_list(root)


def is_list(root: bytes) -> bool:
    """Whether these bytes are a list of pages, not a manifest."""
    return root.startswith(_LIST_HEAD)


def _parse(root: bytes, what: str) -> tuple[int, bytes, list[tuple[str, int, bytes]]]:
    """(bytes, SHA-256, pages) of a hostile list."""
    f = codec.Fields(codec.unseal(root, what, max_bytes=PAGE_BYTES), what)
    f.version(VERSION)
    total, digest, rows = f.integer("bytes", 1, WHOLE_BYTES), f.raw("sha256", 32), []
    for row in f.array("pages", WHOLE_BYTES // PAGE_BYTES):
        if not (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and type(row[1]) is int
            and 0 < row[1] <= PAGE_BYTES
            and isinstance(row[2], bytes)
            and len(row[2]) == 32
        ):
            raise Damaged(f"{what}: a row of 'pages' is not a name, 1 to {PAGE_BYTES} bytes and a SHA-256")
        rows.append((keys.check_relative(row[0], "manifests", what), row[1], row[2]))
    f.done()
    if sum(length for _, length, _ in rows) != total:
        raise Damaged(f"{what}: its pages have other lengths than its whole")
    return total, digest, rows
