"""The shipped S3 store over an actor's line: what it makes of answers that do not come is searched too.

`Client` has the operations of boto3's that the store calls, each a question: a conditional PUT (``create-new``) says
whether it made the object, as 200 and 412 do.
"""

from __future__ import annotations

import copy
import io
from functools import lru_cache
from typing import Any

import botocore.exceptions

from checkpoint.store import Store
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry
from tests.support.protocol.tree import Line


def _error(status: int, code: str, operation: str) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, operation)


class Client:
    def __init__(self, line: Line) -> None:
        self._line = line

    def _ask(self, operation: str, *question: Any) -> Any:
        how, value = self._line.ask(question)
        if how == "unavailable":
            raise botocore.exceptions.ConnectionClosedError(endpoint_url="s3")
        if how != "ok":
            raise _error(404, "NoSuchKey", operation)
        return value

    def put_object(self, *, Key: str, Body: bytes, IfNoneMatch: str | None = None, **_: Any) -> dict[str, Any]:
        if IfNoneMatch is None:
            self._ask("PutObject", "put", Key, bytes(Body))
        elif not self._ask("PutObject", "create-new", Key, bytes(Body)):
            raise _error(412, "PreconditionFailed", "PutObject")
        return {"ResponseMetadata": {"HTTPStatusCode": 200}}

    def get_object(self, *, Key: str, Range: str | None = None, **_: Any) -> dict[str, Any]:
        first, length = None, None
        if Range is not None:
            low, high = Range.removeprefix("bytes=").split("-")
            first, length = int(low), int(high) - int(low) + 1
        data = self._ask("GetObject", "get", Key, None, first, length)
        told: dict[str, Any] = {"Body": io.BytesIO(data), "ContentLength": len(data)}
        if Range is not None:
            told["ContentRange"] = f"bytes {first}-{(first or 0) + len(data) - 1}/*"
        return {**told, "ResponseMetadata": {"HTTPStatusCode": 200 if Range is None else 206}}

    def head_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        found = self._ask("HeadObject", "head", Key)
        if found is None:
            raise _error(404, "404", "HeadObject")
        return {"ContentLength": found[1], "ResponseMetadata": {"HTTPStatusCode": 200}}

    def list_objects_v2(self, *, Prefix: str, StartAfter: str = "", **_: Any) -> dict[str, Any]:
        found = self._ask("ListObjectsV2", "list", Prefix, StartAfter)
        return {"Contents": [{"Key": key, "Size": size} for key, size, _ in found], "IsTruncated": False}


@lru_cache(maxsize=1)
def _store() -> S3Store:
    return S3Store("bucket", endpoint="http://127.0.0.1:1", region="us-east-1")


def over_s3(line: Line) -> Store:
    """The line as a store: tries each call twice."""
    store = copy.copy(_store())
    store.session = copy.copy(store.session)
    store.session.client = Client(line)
    store._retry = Retry(attempts=2, clock=line.clock, sleep=line.tick, jitter=lambda: 0.5)
    return store
