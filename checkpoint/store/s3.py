"""S3 and what speaks it, through boto3 (addresses: ``s3_address.py``).

create = PutObject with ``If-None-Match: *`` and the SHA-256 of the body, which the server verifies. The SDK's own
retries are off: after an unclear answer a blind retry of one's own success looks like a loss, so the retries are here,
and whenever the answer is unclear the object is read back and compared (``base.Store.create``).

Credentials come from where boto3 finds them (environment, profile, web identity, instance role), never from the
address; they are not logged and not in any error. Where the server says that they have expired or are unknown they are
looked for again (``_renew``): a file, a credential process or a role may have newer ones. The rest of boto3's
configuration (region, endpoint, addressing style, CA bundle, checksums) holds too where the address says nothing else;
time-outs and retries are ours. Every exception of the SDK becomes one of ours in ``s3_answers.translate``.

Servers between here and S3 answer oddly: sizes that are not told are found out (``_size``), a Range that is ignored is
cut out here, a page of HTML is never taken for an answer.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import botocore.config
import botocore.exceptions
import botocore.parsers

from checkpoint.errors import (
    CredentialsExpired,
    CredentialsRefused,
    Damaged,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.store import s3_settings
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
)
from checkpoint.store.limits import PACED_BYTES, Rate
from checkpoint.store.s3_answers import CREDENTIALS, FOREIGN, NOT_S3, Retry, translate
from checkpoint.store.s3_bodies import Outgoing, hand_over, read_all, read_into

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PART = re.compile(r"bytes (\d{1,19})-(\d{1,19})/")


class S3Store:
    """Objects under a prefix of a bucket.

    ``path_style``: whether the bucket stands in the path; None: as boto3 is configured (its own: where the endpoint is
    a number). ``sse``, ``kms_key``: how the server shall encrypt each object; None: as the bucket says.
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
        retry: Retry | None = None,
        connect_s: float = 10.0,
        read_s: float = 30.0,
        renew_s: float = 5.0,
    ) -> None:
        self._bucket, self._root = bucket, prefix + "/" if prefix else ""
        self._retry = retry if retry is not None else Retry()
        style = None if path_style is None or (path_style and endpoint) else str(int(path_style))
        query = {"endpoint": endpoint, "region": region, "path_style": style, "sse": sse, "kms_key": kms_key}
        plain = {k: v for k, v in query.items() if v is not None}
        encrypt = {"ServerSideEncryption": sse, "SSEKMSKeyId": kms_key}
        self._encrypt = {name: value for name, value in encrypt.items() if value is not None}
        self._url = f"s3://{bucket}/{quote(prefix)}".rstrip("/") + (f"?{urlencode(plain, safe=':/')}" if plain else "")
        self._options: dict[str, Any] = {"endpoint_url": endpoint, "region_name": region}
        self._config = botocore.config.Config(
            connect_timeout=connect_s,
            read_timeout=read_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            signature_version="s3v4",
            max_pool_connections=32,
            tcp_keepalive=True,
            user_agent_extra="hotstage",
        )
        self._read_s, self._rate = read_s, None  # type: float, Rate | None
        self._path_style = path_style
        self._renew_s, self._renewed_at = renew_s, -math.inf
        self._lock = threading.Lock()
        self.client, self._session = self._open()

    def _open(self) -> tuple[Any, Any]:
        """A client with the credentials of now, and the session that found them."""
        try:
            made = s3_settings.session()
            config = self._config.merge(botocore.config.Config(**s3_settings.unless_configured(made, self._path_style)))
            client: Any = made.client("s3", config=config, **self._options)
            s3_settings.check_bundle(made, str(client.meta.endpoint_url))
            client.meta.events.register_last("before-call.s3.PutObject", hand_over)
            return client, made
        except FOREIGN as error:
            if isinstance(error, CREDENTIALS):
                raise translate(error, f"opening {self._url}", self._url) from error
            raise StoreRefused(
                f"opening {self._url}: {error}{s3_settings.mend(error, self._options['region_name'])}"
            ) from error

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
        what = f"listing {prefix!r}"
        more = {"StartAfter": self._root + start_after} if start_after else {}
        while True:
            ask = partial(self._ask, "list_objects_v2", what, prefix, Prefix=self._root + prefix, **more)
            page = self._retry.run(what, ask)
            for entry in page.get("Contents", ()):
                key = str(entry["Key"])[len(self._root) :]
                if key > start_after:
                    yield Info(key, int(entry["Size"]), _when(entry))
            if not page.get("IsTruncated"):
                return
            if not page.get("NextContinuationToken"):
                raise StoreUnavailable(f"{what}: {self._url} cut the listing and did not say how to go on")
            more = {"ContinuationToken": str(page["NextContinuationToken"])}

    def delete(self, key: str) -> None:
        check_key(key)
        try:
            self._retry.run(
                f"deleting {key!r}", lambda: self._ask("delete_object", f"deleting {key!r}", key, Key=self._root + key)
            )
        except NotFound:
            return

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
            if self._renew(client):
                return self._answer(self.client, operation, what, key, **arguments)
            raise type(error)(f"{error}; {self._source()}") from error

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

    def _renew(self, failed: Any) -> bool:
        """Look for credentials again after the server refused those of ``failed``; whether there are others now.

        Not more often than every ``renew_s``: a credential process is not started for each call that fails.
        """
        with self._lock:
            if self.client is not failed:
                return True  # another thread has found them
            now = self._retry.clock()
            if now - self._renewed_at < self._renew_s:
                return False
            self._renewed_at = now
            try:
                client, session = self._open()
                found = _frozen(session)
                if not found or found == _frozen(self._session):
                    return False
            except (StoreError, *FOREIGN) as error:
                logger.warning("%s: looking for newer credentials: %s: %s", self._url, type(error).__name__, error)
                return False
            self.client, self._session = client, session
            logger.warning("%s: the credentials had expired or changed; going on with those of now", self._url)
            return True

    def _source(self) -> str:
        """Where the credentials come from and how they are renewed, for people; never their values."""
        try:
            found = self._session.get_credentials()
            method = "" if found is None else str(found.method)
            profile = self._session.profile_name
        except FOREIGN:
            method, profile = "", "default"
        if method == "env":
            names = [n for n in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN") if os.environ.get(n)]
            return (
                f"they come from {' and '.join(names)} in this process's environment, which cannot change while it "
                "runs: stop it, set new ones, and start it again (it goes on from what is saved). Credentials of a "
                "profile (AWS_PROFILE, with a file that is rewritten or a credential_process) or of a role are read "
                "again without a restart"
            )
        if method in ("shared-credentials-file", "config-file"):
            name = "AWS_SHARED_CREDENTIALS_FILE" if method.startswith("shared") else "AWS_CONFIG_FILE"
            path = os.environ.get(name) or ("~/.aws/credentials" if method.startswith("shared") else "~/.aws/config")
            return f"they are those of profile {profile!r} in {path}: write new ones there, the file is read again"
        if method == "custom-process":
            return f"they come from the credential_process of profile {profile!r}: it gave the same ones again"
        if method:
            return f"they come from {method} (profile {profile!r}), which gave no newer ones: log in again or mend it"
        return "no others were found: set AWS_PROFILE, or give the pod a role"

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


def _frozen(session: Any) -> tuple[Any, ...]:
    """A session's credentials as they are now, to compare."""
    found = session.get_credentials()
    return () if found is None else tuple(found.get_frozen_credentials())


_MISMATCH = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "InvalidDigest"}


class _Lost(Exception):
    """412: another object has the name."""


class _Mismatch(Exception):
    """The server's digest of the body differs from the one that was sent."""
