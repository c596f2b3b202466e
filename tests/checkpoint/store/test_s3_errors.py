"""The boundary: every exception of the SDK and every answer of a server comes out as an error of ours."""

from __future__ import annotations

import http.client
import inspect
import io
import re

import boto3.exceptions
import botocore.exceptions
import botocore.parsers
import pytest
import urllib3
import urllib3.exceptions

from checkpoint.errors import (
    CheckpointError,
    CredentialsExpired,
    CredentialsRefused,
    Damaged,
    NotFound,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.store.s3_answers import FOREIGN, translate
from tests.support.hostile_s3 import HostileS3, client

KEY = "runs/r/log/00000000000000000001"


def made(kind: type[BaseException]) -> BaseException:
    """An exception of this class, whatever arguments it wants."""
    if issubclass(kind, botocore.exceptions.ClientError):
        return kind({"Error": {"Code": "Odd", "Message": "m"}}, "PutObject")
    if issubclass(kind, botocore.exceptions.HTTPClientError):
        return kind(error=OSError("below it"), endpoint_url="http://there", proxy_url="http://between")
    if kind is http.client.IncompleteRead:
        return kind(b"", 5)
    if kind is urllib3.exceptions.IncompleteRead:
        return kind(0, 5)
    if kind is urllib3.exceptions.InvalidChunkLength:
        return kind(urllib3.HTTPResponse(io.BytesIO()), b"zz")
    return kind.__new__(kind)


def sdk_exceptions() -> list[type[BaseException]]:
    found: list[type[BaseException]] = [botocore.parsers.ResponseParserError]
    for module in (botocore.exceptions, boto3.exceptions, urllib3.exceptions):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Exception) and not issubclass(kind, Warning):
                found.append(kind)
    return sorted(set(found), key=lambda kind: (kind.__module__, kind.__name__))


@pytest.mark.parametrize("kind", sdk_exceptions(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_no_exception_of_the_sdk_is_left_out(kind: type[Exception]) -> None:
    assert issubclass(kind, FOREIGN), "would pass the boundary"
    assert isinstance(translate(made(kind), "reading 'k'", "s3://b", "k"), CheckpointError)


def test_what_the_sdk_raises_inside_a_call_comes_out_as_ours(peer: HostileS3) -> None:
    store = client(peer, attempts=1, renew_s=3600.0)  # newer credentials are looked for once
    raised: list[BaseException] = []

    def fail(**_: object) -> None:
        raise raised[0]

    store.client.meta.events.register("before-send.s3", fail)
    for kind in sdk_exceptions():
        raised[:] = [made(kind)]
        for call in (
            lambda: store.create(KEY, b"x"),
            lambda: store.get(KEY),
            lambda: store.head(KEY),
            lambda: list(store.list("runs/")),
            lambda: store.put("runs/r/live/x", b"x"),
        ):
            with pytest.raises(CheckpointError):
                call()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchBucket", StoreRefused),
        (403, "AccessDenied", StoreRefused),
        (403, "ExpiredToken", CredentialsExpired),
        (400, "ExpiredToken", CredentialsExpired),
        (403, "InvalidAccessKeyId", CredentialsRefused),
        (403, "SignatureDoesNotMatch", CredentialsRefused),
        (400, "InvalidToken", CredentialsRefused),
        (401, "401", StoreRefused),
        (301, "301", StoreRefused),
        (403, "RequestTimeTooSkewed", StoreRefused),
        (400, "RequestTimeout", StoreUnavailable),
        (409, "OperationAborted", StoreUnavailable),
        (416, "InvalidRange", Damaged),
        (429, "TooManyRequests", StoreUnavailable),
        (500, "InternalError", StoreUnavailable),
        (501, "NotImplemented", StoreRefused),
        (502, "502", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
        (520, "520", StoreUnavailable),
        (413, "413", StoreRefused),
        (400, "400", StoreRefused),
        (507, "InsufficientStorage", StoreFull),
        (301, "PermanentRedirect", StoreRefused),
        (400, "InvalidArgument", StoreRefused),
    ],
)
def test_answers_are_told_apart(status: int, code: str, kind: type[CheckpointError]) -> None:
    answer = {
        "Error": {"Code": code, "Message": "m"},
        "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "R7"},
    }
    error = translate(botocore.exceptions.ClientError(answer, "PutObject"), "creating 'k'", "s3://b", "k")  # type: ignore[arg-type]
    assert type(error) is kind
    if kind is not NotFound:
        assert code in str(error)
        assert "R7" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "QuotaExceeded", ""),  # Ceph
        (400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded"),
        (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
        (403, "AccessDenied", "Cannot upload files, storage cap exceeded."),  # B2
        (403, "AccessDenied", "Cannot upload files, transaction (Class B) cap exceeded."),
        (403, "AccessDenied", "Forbidden: Object quota is reached"),  # Garage
    ],
)
def test_a_store_that_is_full_is_waited_for(status: int, code: str, message: str) -> None:
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translate(botocore.exceptions.ClientError(answer, "PutObject"), "creating 'k'", "s3://b", "k")
    assert isinstance(error, StoreUnavailable)
    assert "full, or over its quota or cap; nothing that was there is lost: free space, or raise the" in str(error)


def test_a_cap_on_what_is_read_in_a_day_is_waited_for() -> None:
    message = "Cannot download file, download bandwidth or transaction (Class B) cap exceeded."
    answer = {"Error": {"Code": "AccessDenied", "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    error = translate(botocore.exceptions.ClientError(answer, "GetObject"), "reading 'k'", "s3://b", "k")
    assert isinstance(error, StoreUnavailable)


@pytest.mark.parametrize(
    ("status", "code", "message", "says"),
    [
        (403, "InvalidObjectState", "not valid for the object's storage class", "moved into an archive: restore it"),
        (400, "KMS.DisabledException", "arn:… is disabled.", "it must be there and enabled"),
        (
            403,
            "AccessDenied",
            "… is not authorized to perform: kms:Decrypt on …",
            "needs kms:GenerateDataKey and kms:D",
        ),
        (
            403,
            "AccessDenied",
            "… is not authorized to perform: s3:PutObject on … with an explicit deny in a resource-based policy",
            "asks for encryption (?sse=aws:kms&kms_key=… or ?sse=AES256 in the address)",
        ),
        (417, "417", "", "name the server in NO_PROXY"),
        (407, "407", "", "name and password belong to HTTP_PROXY"),
        (501, "501", "", "the server lacks what hotstage needs"),
    ],
)
def test_what_a_person_can_mend_is_told(status: int, code: str, message: str, says: str) -> None:
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translate(botocore.exceptions.ClientError(answer, "GetObject"), "reading 'k'", "s3://b", "k")
    assert isinstance(error, StoreRefused)
    assert says in str(error)


@pytest.mark.parametrize(
    ("status", "code", "headers", "says"),
    [
        (308, "308", {"location": "https://user:pass@s3.example/my.b/k"}, "on to https://s3.example: write that"),
        (307, "307", {"location": "https://my.bucket.example/sign-in/my.b"}, "is it a login page or a web console?"),
        (307, "307", {"location": "https://[s3.example/my.b/k"}, "is it a login page or a web console?"),
        (301, "PermanentRedirect", {"x-amz-bucket-region": "eu-central-1"}, "add ?region=eu-central-1 to the address"),
        (301, "PermanentRedirect", {}, "in another region: add ?region=…"),
        (307, "307", {"location": "https://login.example/oauth2?to=b"}, "is it a login page or a web console?"),
        (308, "308", {"location": "https://my.b.s3.example:9000/k"}, "on to https://s3.example:9000: write that"),
    ],
)
def test_a_server_that_sends_its_callers_on(status: int, code: str, headers: dict[str, str], says: str) -> None:
    told = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": told}
    error = translate(botocore.exceptions.ClientError(answer, "GetObject"), "reading 'k'", "s3://my.b/p", "k")  # type: ignore[arg-type]
    assert isinstance(error, StoreRefused)
    assert says in str(error)


def test_a_header_that_a_server_does_not_take_is_what_it_lacks() -> None:
    message = "Unsupported header 'x-amz-checksum-sha256' received for this API call."
    answer = {"Error": {"Code": "InvalidArgument", "Message": message}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = translate(botocore.exceptions.ClientError(answer, "PutObject"), "creating 'k'", "s3://b", "k")
    assert isinstance(error, StoreRefused)
    assert "lacks what hotstage needs (conditional writes, with a SHA-256): use another one" in str(error)


@pytest.mark.parametrize(
    ("status", "says"),
    [(413, "of up to 64 MiB .nginx: client_max_body_size"), (400, "is the endpoint to begin with https://"),
     (403, "check AWS_ACCESS_KEY_ID")],
)  # fmt: skip
def test_a_page_of_html_is_known_by_its_status(status: int, says: str) -> None:
    answer = {"Error": {"Code": "", "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translate(botocore.exceptions.ClientError(answer, "PutObject"), "creating 'k'", "s3://b", "k")  # type: ignore[arg-type]
    assert isinstance(error, StoreRefused)
    assert re.search(says, str(error))
