"""S3 and what speaks it, through boto3 (addresses: ``s3_address.py``).

create = PutObject with ``If-None-Match: *`` and the SHA-256 of the body, which the server verifies. The SDK's own
retries are off: after an unclear answer a blind retry of one's own success looks like a loss, so the retries are here,
and whenever the answer is unclear the object is read back and compared (``base.Store.create``).

The client of the SDK and its credentials are in ``s3_session.py``. Every exception of the SDK becomes one of ours in
``s3_answers.translate``.

Servers between here and S3 answer oddly: sizes that are not told are found out (``_size``), a Range that is ignored is
cut out here, a page of HTML is never taken for an answer.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import botocore.exceptions
import botocore.parsers

from checkpoint.errors import (
    CredentialsExpired,
    CredentialsRefused,
    Damaged,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.store.base import (
    PAID,
    Data,
    Info,
    check_hint,
    check_key,
    check_prefix,
    check_sha256,
    check_size,
    fill,
    ignored,
    is_name,
)
from checkpoint.store.limits import PACED_BYTES, Rate
from checkpoint.store.s3_answers import FOREIGN, NOT_S3, Retry, translate
from checkpoint.store.s3_bodies import Outgoing, read_all, read_into
from checkpoint.store.s3_session import S3Session

T = TypeVar("T")

_PART = re.compile(r"bytes (\d{1,19})-(\d{1,19})/")


class S3Store:
    """Objects under a prefix of a bucket.

    ``path_style``: whether the bucket stands in the path; None: as boto3 is configured (its own: where the endpoint is
    a number). ``sse``, ``kms_key``: how the server shall encrypt each object; None: as the bucket says. ``anonymous``:
    nothing is signed, for what everybody may read. ``requester_pays``: whoever asks takes the costs.
    """

    pace = PAID

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
        sse: str | None = None,
        kms_key: str | None = None,
        anonymous: bool = False,
        requester_pays: bool = False,
        retry: Retry | None = None,
        connect_s: float = 10.0,
        read_s: float = 30.0,
        renew_s: float = 5.0,
    ) -> None:
        self._bucket, self._root = bucket, prefix + "/" if prefix else ""
        self._retry = retry if retry is not None else Retry()
        style = None if path_style is None or (path_style and endpoint) else str(int(path_style))
        query = {"endpoint": endpoint, "region": region, "path_style": style, "sse": sse, "kms_key": kms_key}
        query |= {"anonymous": "1" if anonymous else None, "requester_pays": "1" if requester_pays else None}
        plain = {k: v for k, v in query.items() if v is not None}
        encrypt = {"ServerSideEncryption": sse, "SSEKMSKeyId": kms_key}
        self._encrypt = {name: value for name, value in encrypt.items() if value is not None}
        self._url = f"s3://{bucket}/{prefix}".rstrip("/") + (f"?{urlencode(plain, safe=':/')}" if plain else "")
        self._read_s, self._rate = read_s, None  # type: float, Rate | None
        self.session = S3Session(
            self._url,
            endpoint=endpoint,
            region=region,
            path_style=path_style,
            anonymous=anonymous,
            requester_pays=requester_pays,
            connect_s=connect_s,
            read_s=read_s,
            renew_s=renew_s,
            clock=self._retry.clock,
        )

    @property
    def client(self) -> Any:
        """The SDK's, with the credentials of now."""
        return self.session.client

    @property
    def url(self) -> str:
        return self._url

    @property
    def retries(self) -> Mapping[str, int]:
        return dict(self._retry.causes)

    def describe(self) -> str:
        return self._url

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        check_key(key)
        check_size(key, data)
        body = memoryview(data).cast("B")
        digest = hashlib.sha256(body).digest() if sha256 is None else sha256
        checksum = base64.b64encode(digest).decode()

        def put() -> bool:
            try:
                answer = self._ask(
                    "put_object",
                    f"creating {key!r}",
                    key,
                    Key=self._root + key,
                    Body=self._body(body),
                    IfNoneMatch="*",
                    ChecksumSHA256=checksum,
                    **self._encrypt,
                )
            except _Lost:
                gone = StoreUnavailable(f"creating {key!r}: {self._url} has such an object, but does not show it")
                return self._made(key, body, digest, gone)
            except _Mismatch:
                check_sha256(key, body, sha256)  # ours to say, where the caller's digest is wrong
                raise StoreUnavailable(f"creating {key!r}: {self._url} received other bytes than were sent") from None
            except StoreUnavailable as unclear:
                return self._made(key, body, digest, unclear)
            if answer.get("ChecksumSHA256", checksum) != checksum:
                raise StoreUnavailable(f"creating {key!r}: {self._url} says that it stored other bytes than were sent")
            return True

        return self._retry.run(f"creating {key!r}", put)

    def put(self, key: str, data: Data) -> None:
        check_hint(key)
        check_size(key, data)
        body = bytes(data) if isinstance(data, memoryview) else data
        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()  # buckets with object lock insist on one
        what = f"writing {key!r}"
        sent = {"Key": self._root + key, "Body": body, "ChecksumSHA256": checksum, **self._encrypt}

        def replace() -> None:
            try:
                self._ask("put_object", what, key, **sent)
            except (_Lost, _Mismatch) as error:
                raise StoreUnavailable(f"{what}: {self._url} did not take it: {error.__cause__}") from error

        self._retry.run(what, replace)

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        check_key(key)
        begin = 0 if first is None else first
        if begin < 0 or (length is not None and length < 0):
            raise Damaged(f"object {key!r}: {length} bytes from byte {begin} on cannot be read")
        if max_bytes is not None and length is not None and length > max_bytes:
            raise Damaged(f"object {key!r}: {length} bytes asked for, the reader takes at most {max_bytes}")
        if length == 0 or (
            first is not None and length is None
        ):  # S3 has no range of nothing, and none that may be empty
            info = self.head(key)
            if info is None:
                raise NotFound(key, self._url)
            length = info.bytes - begin if length is None else length
            if length < 0 or begin + length > info.bytes:
                raise Damaged(
                    f"object {key!r} has {info.bytes} bytes, but byte {begin} and on was asked for: it was cut short"
                )
            if max_bytes is not None and length > max_bytes:
                raise Damaged(f"object {key!r} has {length} bytes to read, the reader takes at most {max_bytes}")
            if length == 0:
                return b""
        return self._retry.run(f"reading {key!r}", lambda: self._get(key, begin, length, max_bytes))

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        check_key(key)
        if first < 0:
            raise Damaged(f"object {key!r}: bytes from {first} on cannot be read")
        length = sum(view.nbytes for view in out)
        if length == 0:
            self.get(key, first=first, length=0)
        else:
            self._retry.run(f"reading {key!r}", lambda: self._read_into(key, first, length, out, filled))

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        check_key(key)
        body = memoryview(data).cast("B")
        try:
            return self._retry.run(f"looking at {key!r}", lambda: self._holds(key, body, sha256))
        except NotFound:
            return False

    def limit(self, bytes_per_s: float | None) -> None:
        self._rate = Rate(bytes_per_s) if bytes_per_s else None

    def head(self, key: str) -> Info | None:
        check_key(key)
        try:
            answer = self._retry.run(
                f"looking at {key!r}",
                lambda: self._ask("head_object", f"looking at {key!r}", key, Key=self._root + key),
            )
        except NotFound:
            return None
        return Info(key, self._size(key, answer), _when(answer))

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        check_prefix(prefix)
        more = {"StartAfter": self._root + start_after} if start_after else {}
        for entry in self.listed(self._root + prefix, **more):
            key = str(entry["Key"])[len(self._root) :]
            if key > start_after and all(map(is_name, key.split("/"))):  # no folder's mark, no copy of a tool
                yield Info(key, int(entry["Size"]), _when(entry))

    def delete(self, key: str) -> bool:
        check_key(key)
        try:
            answer = self._retry.run(
                f"deleting {key!r}", lambda: self._ask("delete_object", f"deleting {key!r}", key, Key=self._root + key)
            )
        except NotFound:
            return False
        return bool(answer.get("DeleteMarker")) and answer.get("VersionId") != "null"  # that: versions are suspended

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    # --- beyond the seam ----------------------------------------------------------------------------------

    @property
    def encryption(self) -> dict[str, str]:
        """How each object shall be encrypted, as arguments of the request that creates it."""
        return dict(self._encrypt)

    def request(self, operation: str, what: str, key: str, **arguments: Any) -> dict[str, Any]:
        """An operation on an object that the seam has not (``s3_parts.py``): its answer, or one of our errors."""
        check_key(key)
        return self._retry.run(what, lambda: self._ask(operation, what, key, Key=self._root + key, **arguments))

    def listed(self, begin: str, **more: str) -> Iterator[dict[str, Any]]:
        """``Key``, ``Size``, ``ETag`` and ``LastModified`` of what begins so in the whole bucket, page after page."""
        what = f"listing {begin!r}"
        token = ""
        while True:
            ask = partial(self._ask, "list_objects_v2", what, begin, Prefix=begin, **more)
            page = self._retry.run(what, ask)
            for entry in page.get("Contents", ()):
                if not str(entry["Key"]).startswith(begin):
                    raise StoreRefused(
                        f"{what}: {self._url} lists {str(entry['Key'])[:200]!r}, which does not begin so: this server, "
                        "or a proxy before it, cannot list names as hotstage needs it; use another one"
                    )
                yield entry
            if not page.get("IsTruncated"):
                return
            before, token = token, str(page.get("NextContinuationToken") or "")
            if token in ("", before):
                raise StoreRefused(
                    f"{what}: {self._url} lists {len(page.get('Contents', ()))} names, says that there are more, and "
                    f"{'not how to go on' if not token else 'shows the same page again'}: what follows cannot be "
                    "found on such a server; use another one"
                )
            more = {"ContinuationToken": token}

    def foreign(self, what: str, read: Callable[[Callable[..., dict[str, Any]], float], T]) -> T:
        """What ``read`` makes of the bucket (``s3_foreign.py``): it is given how to ask, and how long a body may take;
        tried again as every request is.
        """
        return self._retry.run(what, lambda: read(lambda name, **more: self._ask(name, what, "", **more), self._read_s))

    # --- inside -------------------------------------------------------------------------------------------

    def _ask(self, operation: str, what: str, key: str, **arguments: Any) -> dict[str, Any]:
        """One request: its answer, or one of our errors. Asked again where newer credentials were found."""
        client = self.client
        try:
            return self._answer(client, operation, what, key, **arguments)
        except (CredentialsExpired, CredentialsRefused) as error:
            if self.session.renew(client):
                return self._answer(self.client, operation, what, key, **arguments)
            raise type(error)(f"{error}; {self.session.source()}") from error

    def _answer(self, client: Any, operation: str, what: str, key: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(client, operation)(Bucket=self._bucket, **arguments)
        except FOREIGN as error:
            if isinstance(error, botocore.exceptions.ClientError):
                code = error.response.get("Error", {}).get("Code")
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if operation == "put_object":
                    if code == "PreconditionFailed" or status == 412:
                        raise _Lost from error
                    if code in _MISMATCH:
                        raise _Mismatch from error
                if operation == "head_object" and status in (301, 307, 400, 401, 403):  # a HEAD tells no reason: a GET
                    self._answer(client, "get_object", what, key, Range="bytes=0-0", **arguments)["Body"].close()
            raise translate(error, what, self._url, key) from error
        told = answer.get("ResponseMetadata", {})
        headers = told.get("HTTPHeaders", {}) if told.get("HTTPStatusCode") != 204 else {}  # that has no body to read
        page = str(headers.get("content-type", "")).startswith("text/html") and "etag" not in headers
        if page and operation != "get_object" and headers.get("content-length") != "0":
            raise StoreRefused(f"{what}: {self._url} answered with a page of HTML; {NOT_S3}")
        return answer

    def _size(self, key: str, answer: dict[str, Any]) -> int:
        """The size of an object that was asked for; from the listing where the answer does not tell it."""
        told = answer.get("ContentLength")
        if told is not None:
            return int(told)
        name = self._root + key
        page = self._ask("list_objects_v2", f"looking at {key!r}", key, Prefix=name, MaxKeys=1)
        for entry in page.get("Contents", ()):
            if entry["Key"] == name:
                return int(entry["Size"])
        raise StoreUnavailable(
            f"looking at {key!r}: {self._url} shows the object without its size (no Content-Length), and does not "
            "list it; a gateway that leaves both out cannot be used"
        )

    def _get(self, key: str, begin: int, length: int | None, max_bytes: int | None) -> bytes:
        what = f"reading {key!r}"
        some: dict[str, Any] = {} if length is None else {"Range": f"bytes={begin}-{begin + length - 1}"}
        answer = self._ask("get_object", what, key, Key=self._root + key, **some)
        body = answer["Body"]
        try:
            told = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            whole = length is None or (told == 200 and not answer.get("ContentRange"))  # a server may ignore Range
            size = None if answer.get("ContentLength") is None else int(answer["ContentLength"])
            if whole and length is None and max_bytes is not None and (size or 0) > max_bytes:
                raise Damaged(f"object {key!r} has {size} bytes to read, the reader takes at most {max_bytes}")
            if size is None and (part := _PART.match(str(answer.get("ContentRange", "")))):
                size = int(part[2]) - int(part[1]) + 1
            if not whole and size is not None and size != length:
                raise Damaged(
                    f"object {key!r}: {length} bytes from byte {begin} on were asked for, {size} came: it was cut short"
                )
            # without a size: to the end, but not beyond what the reader takes
            most = max_bytes + 1 if size is None and length is None and max_bytes else None
            data = read_all(body, most, self._read_s)
        except FOREIGN as error:
            raise translate(error, what, self._url, key) from error
        finally:
            body.close()
        if str(answer.get("ContentType", "")).startswith("text/html") and data[:64].lstrip()[:1] == b"<":
            raise StoreRefused(f"{what}: {self._url} answered with a page of HTML; {NOT_S3}")
        if size is None and length is None and max_bytes is not None and len(data) > max_bytes:
            raise Damaged(f"object {key!r} has more than the {max_bytes} bytes that the reader takes")
        promised = self._size(key, answer) if whole else length
        if len(data) != promised:
            raise StoreUnavailable(f"{what}: {self._url} promised {promised} bytes and sent {len(data)}")
        if whole and length is not None:
            if begin + length > len(data):
                raise Damaged(f"object {key!r} has {len(data)} bytes, {length} from {begin} on were asked for")
            return data[begin : begin + length]
        return data

    def _body(self, data: memoryview) -> bytes | Outgoing:
        """What the SDK sends: small data as it is, signed; large data without a copy, under its checksum (signed)."""
        return bytes(data) if data.nbytes < PACED_BYTES else Outgoing(data, self._rate, self._read_s)

    def _read_into(
        self, key: str, begin: int, length: int, out: Sequence[memoryview], filled: Callable[[int], None]
    ) -> None:
        what = f"reading {key!r}"
        span = f"bytes={begin}-{begin + length - 1}"
        answer = self._ask("get_object", what, key, Key=self._root + key, Range=span)
        body = answer["Body"]
        try:
            told = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            odd = told == 200 and not answer.get("ContentRange")  # a server that ignores Range, or a page of HTML
            size = None if answer.get("ContentLength") is None else int(answer["ContentLength"])
            if not odd and size is not None and size != length:
                raise Damaged(
                    f"object {key!r}: {length} bytes from byte {begin} on were asked for, {size} came: it was cut short"
                )
            have = 0 if odd else read_into(body, out, self._read_s, filled)
        except FOREIGN as error:
            raise translate(error, what, self._url, key) from error
        finally:
            body.close()
        if odd:
            fill(out, self._get(key, begin, length, None), filled)
        elif have != length:
            raise StoreUnavailable(f"{what}: {self._url} promised {length} bytes and sent {have}")

    def _holds(self, key: str, body: memoryview, sha256: bytes) -> bool:
        """Whether the object that is there has exactly these bytes; NotFound where there is none. A large one is not
        read where the store tells the SHA-256 that it had when it took it.
        """
        large = {"ChecksumMode": "ENABLED"} if body.nbytes >= PACED_BYTES else {}
        answer = self._ask("head_object", f"looking at {key!r}", key, Key=self._root + key, **large)
        if self._size(key, answer) != body.nbytes:
            return False
        kept = answer.get("ChecksumSHA256") if large else None
        if kept is not None:
            return str(kept) == base64.b64encode(sha256).decode()
        return self._get(key, 0, None, None) == body

    def _made(self, key: str, body: memoryview, sha256: bytes, unclear: StoreUnavailable) -> bool:
        """After an unclear answer: whether the object is ours; ``unclear`` where there is none: it is tried again."""
        try:
            return self._holds(key, body, sha256)
        except NotFound:
            raise unclear from None


def _when(answer: dict[str, Any]) -> float | None:
    """When the object was written, by the server's clock, as far as it says."""
    told = answer.get("LastModified")
    return told.timestamp() if isinstance(told, datetime) else None


_MISMATCH = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "InvalidDigest"}


class _Lost(Exception):
    """412: another object has the name."""


class _Mismatch(Exception):
    """The server's digest of the body differs from the one that was sent."""
