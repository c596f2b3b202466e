"""An object that is too large for memory, created in parts: seen whole, when its last request is answered, or never.

For exports, by who calls the command; runs themselves never need it. Each part comes with its SHA-256, and the last
request says ``If-None-Match: *``. An upload that fails is aborted; where this identity may not (or the process is
killed), its parts stay invisible until the bucket's rule for incomplete uploads removes them.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from checkpoint.errors import NotFound, StoreError, StoreRefused, StoreUnavailable
from checkpoint.store.s3 import S3Store

log = logging.getLogger(__name__)

Pieces = Iterable[bytes | bytearray | memoryview]
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
MAX_BYTES = 5 << 40
THREADS = 3
"""Parts that are on their way while the next is put together: (THREADS + 2) x a part's bytes of memory."""


def create_in_parts(store: S3Store, key: str, pieces: Pieces, size: int, state: str) -> bool:
    """Create the object of ``size`` bytes. False where another one is there: nothing is changed.

    ``state``: what the bytes were made from; an object of this size and state that is there already is taken for this
    one, and ``pieces`` is not asked for.
    """
    if size > MAX_BYTES:
        raise StoreRefused(f"object {key!r} would have {size} bytes, S3 takes {MAX_BYTES}: cut it into several files")
    there = _told(store, key)
    if there is not None:
        return there[:2] == (size, state)
    token = secrets.token_hex(8)
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS + 1 >> 20) << 20)
    meta = {"hotstage-state": state, "hotstage-upload": token}
    made = store.request(
        "create_multipart_upload",
        f"beginning {key!r}",
        key,
        Metadata=meta,
        ChecksumAlgorithm="SHA256",
        **store.encryption,
    )
    upload = str(made["UploadId"])
    try:
        parts = _send(store, key, upload, _cut(pieces, part_bytes))
        return _complete(store, key, upload, parts, token)
    except BaseException:
        with suppress(StoreError):
            store.request("abort_multipart_upload", f"giving up {key!r}", key, UploadId=upload)
        raise


def _cut(pieces: Pieces, part_bytes: int) -> Iterator[bytearray]:
    """The same bytes in parts of one size, the last one shorter; one at least."""
    part = bytearray()
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while rest:
            take = min(part_bytes - len(part), rest.nbytes)
            part += rest[:take]
            rest = rest[take:]
            if len(part) == part_bytes:
                yield part
                part = bytearray()
    yield part


def _send(store: S3Store, key: str, upload: str, parts: Iterator[bytearray]) -> list[dict[str, object]]:
    sent: list[dict[str, object]] = []
    waiting: deque[Future[dict[str, object]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="parts") as pool:
        try:
            for number, part in enumerate(parts, 1):
                if number > 1 and not part:
                    break
                waiting.append(pool.submit(_part, store, key, upload, number, part))
                if len(waiting) > THREADS:
                    sent.append(waiting.popleft().result())
            sent.extend(future.result() for future in waiting)
        finally:
            for future in waiting:
                future.cancel()
    return sent


def _part(store: S3Store, key: str, upload: str, number: int, data: bytearray) -> dict[str, object]:
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    answer = store.request(
        "upload_part",
        f"writing part {number} of {key!r}",
        key,
        UploadId=upload,
        PartNumber=number,
        Body=data,
        ChecksumSHA256=checksum,
    )
    return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}


def _complete(store: S3Store, key: str, upload: str, parts: list[dict[str, object]], token: str) -> bool:
    try:
        store.request(
            "complete_multipart_upload",
            f"creating {key!r}",
            key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            IfNoneMatch="*",
        )
    except (StoreRefused, StoreUnavailable, NotFound) as unclear:
        there = _told(store, key)  # a second try of what was done is answered as if there were no upload
        if there is None:
            raise unclear from None
        if there[2] != token:
            store.request("abort_multipart_upload", f"giving up {key!r}", key, UploadId=upload)
            return False
    return True


def _told(store: S3Store, key: str) -> tuple[int, str, str] | None:
    """Of the object that is there: its size, what it was made from, by which upload."""
    try:
        answer = store.request("head_object", f"looking at {key!r}", key)
    except NotFound:
        return None
    meta = answer.get("Metadata", {})
    return int(answer["ContentLength"]), str(meta.get("hotstage-state", "")), str(meta.get("hotstage-upload", ""))
