"""Objects of a bucket that others wrote, under any names: ranges of one as it was seen.

Reading alone: a corpus lies in a bucket as it was put there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checkpoint.errors import StoreUnavailable
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import FOREIGN, translate
from checkpoint.store.s3_bodies import read_all

Ask = Callable[..., dict[str, Any]]


def part(store: S3Store, key: str, first: int, length: int, etag: str) -> bytes | None:
    """These bytes of an object; None where it is another one than that of the ETag. NotFound where it is gone."""
    what = f"reading {key!r}"

    def read(ask: Ask, read_s: float) -> bytes | None:
        answer = ask("get_object", Key=key, Range=f"bytes={first}-{first + length - 1}")
        body = answer["Body"]
        try:
            if str(answer.get("ETag", etag)) != etag:
                return None
            ignored = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 200 and not answer.get("ContentRange")
            data: bytes = read_all(body, first + length if ignored else length + 1, read_s)
        except FOREIGN as error:
            raise translate(error, what, store.url, key) from error
        finally:
            body.close()
        if ignored:
            data = data[first:]
        if len(data) != length:
            raise StoreUnavailable(f"{what}: {length} bytes from byte {first} on were asked for, {len(data)} came")
        return data

    return store.foreign(what, read)
