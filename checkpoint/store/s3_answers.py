"""What S3, and what stands before it, answers: which errors are tried again, and what each means to a person.

Every exception of the SDK becomes one of ours in ``translate``.
"""

from __future__ import annotations

import http.client
import logging
import os
import random
import re
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TypeVar
from urllib.parse import urlsplit

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import botocore.parsers
import urllib3.exceptions
from urllib3.util.ssl_match_hostname import CertificateError

from checkpoint.errors import (
    CredentialsExpired,
    CredentialsRefused,
    Damaged,
    NotFound,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.store.limits import deadline

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOREIGN = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.exceptions.MissingServiceIdError,  # these two are plain Exceptions
    botocore.exceptions.UndefinedModelAttributeError,
    botocore.parsers.ResponseParserError,  # an answer that is not S3's; a plain Exception too
    boto3.exceptions.Boto3Error,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
    RuntimeError,  # credentials that were fetched anew and are still past their end
)
"""What a call of the SDK can raise for a reason outside this program."""

_RETRY = (
    botocore.exceptions.HTTPClientError,  # connect, read and proxy errors, closed connections
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.MetadataRetrievalError,  # the credentials' service did not answer
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ChecksumError,
    botocore.exceptions.FlexibleChecksumError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)
_FILES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Of what the SDK reads here, before it asks anybody."""
_NO_RETRY = (botocore.exceptions.InvalidProxiesConfigError,)
_LOGINS: dict[type[Exception], str] = {
    botocore.exceptions.TokenRetrievalError: "aws sso login",
    botocore.exceptions.SSOError: "aws sso login",
    botocore.exceptions.LoginError: "aws login",
    botocore.exceptions.LoginTokenLoadError: "aws login",
}
"""What a person who has logged in once does again."""
CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
    *_LOGINS,
)
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_UNKNOWN_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
}
_ROLES = {"AssumeRoleWithWebIdentity", "AssumeRole"}
"""Asked of the token service, before anything is asked of the store."""
_RETRY_CODES = {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_FULL = re.compile(r"quota|StorageFull|InsufficientStorage", re.IGNORECASE)
"""In the code or the words of a store that takes no more: 400, 403, 409 and 507 say it, each maker in its own way."""
_CAP = re.compile(r"\bcap exceeded", re.IGNORECASE)
"""In the words of one that is paid by the day: of what it keeps, of requests or of what is read."""
_HEADER = re.compile(r"(unsupported|not supported|not implemented).*header|header .*not (supported|implemented)", re.I)
_RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 507}
_OF_PROXIES = 520
"""From here on a proxy on the way tells, in numbers of its own, that the server does not answer it."""
_RIGHTS = (
    "this identity has no right to do it; what the agent, the driver and the collector need is in docs/policies (a "
    "bucket whose readers pay refuses who does not say requester_pays=1 in the address)"
)
_NOT_EVERYBODY = "not everybody may do it: leave anonymous=1 out of the address, and give credentials"
_REGION = "the bucket is in another region: add ?region=… to the address"
_SIZE = (
    "the server, or a proxy before it, takes no objects of that size: hotstage writes such of up to 64 MiB (nginx: "
    "client_max_body_size)"
)
_OTHER = "check the address, the rights and what the server supports"
_LACKS = "the server lacks what hotstage needs (conditional writes, with a SHA-256): use another one"
_DENIED = (
    "a policy forbids it expressly, whatever rights this identity has: a bucket's often asks for encryption "
    "(?sse=aws:kms&kms_key=… or ?sse=AES256 in the address), for https or for a network; its Deny has the condition"
)
_KMS_KEY = (
    "it is about the KMS key that encrypts the object (?kms_key=…, or the bucket's): it must be there and enabled, and "
    "this identity needs kms:GenerateDataKey and kms:Decrypt, by its policy and by the key's"
)
_AS_FILES = (
    "the server keeps objects as files, and an object has the name of a folder that this store needs, or the other way "
    "round: remove it, or choose another prefix in the address"
)
_MEND = {
    "NoSuchBucket": "create the bucket, or correct its name in the address",
    "AccessDenied": _RIGHTS,
    "400": "what answers did not understand the request: is the endpoint to begin with https://, and is it one of S3?",
    "407": "the proxy on the way wants a login: name and password belong to HTTP_PROXY or HTTPS_PROXY",
    "413": _SIZE,
    "417": "a proxy on the way takes no `Expect: 100-continue`, which comes with large objects: name the server in "
    "NO_PROXY",
    "501": _LACKS,
    "EntityTooLarge": _SIZE,
    "403": f"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; {_RIGHTS}",
    "InvalidAccessKeyId": "the server does not know this access key: check AWS_ACCESS_KEY_ID and the endpoint",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: check AWS_SECRET_ACCESS_KEY; or a "
    "proxy on the way changes what was signed (Host with its port, the path): it is to hand that on as it came (nginx: "
    "proxy_set_header Host $http_host)",
    "RequestTimeTooSkewed": "the two clocks are more than 15 minutes apart: set the wrong one",
    "InvalidObjectState": "the object was moved into an archive: restore it (aws s3api restore-object), and let no "
    "lifecycle rule touch what is below the store's prefix",
    "NotImplemented": _LACKS,
    "InvalidToken": "the session token does not belong to the access key: check AWS_SESSION_TOKEN",
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "IncorrectEndpoint": _REGION,
    "301": _REGION,
    "302": "the endpoint sends its callers elsewhere: is it a login page or a web console? Check the endpoint",
    "307": _REGION,
    "308": _REGION,
    "401": "the server wants a login that is not S3's: check the endpoint, and AWS_ACCESS_KEY_ID",
    "ObjectParentIsFile": _AS_FILES,  # versitygw
    "XMinioParentIsObject": _AS_FILES,
    "ExistingObjectIsFile": _AS_FILES,  # SeaweedFS
    "ExistingObjectIsDirectory": _AS_FILES,
    "MethodNotAllowed": "the address does not lead to an S3 bucket",
}


NOT_S3 = "what answers there is not S3 (a proxy, a login page, a web console?): check the endpoint in the address"


_TIMEOUTS = (
    TimeoutError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
    urllib3.exceptions.TimeoutError,
)


@dataclass(frozen=True)
class Retry:
    """How often and how long one call is tried: at most ``attempts``, none begun after ``deadline_s`` or the thread's
    deadline (``limits.until``).
    """

    attempts: int = 6
    first_s: float = 0.1  # the wait before the second attempt is up to this, then twice as long each time ...
    most_s: float = 5.0  # ... up to this
    deadline_s: float = 60.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    jitter: Callable[[], float] = field(default=random.random, repr=False)
    causes: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    """How often calls were tried again, by cause: for people, who can bear one that two threads count as one."""

    def run(self, what: str, call: Callable[[], T]) -> T:
        """The call's result; StoreUnavailable of the last attempt where none succeeded."""
        last = deadline()
        if time.monotonic() >= last:
            raise StoreUnavailable(f"{what}: the time that this was given is over")
        end = min(self.clock() + self.deadline_s, last)
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except StoreUnavailable as error:
                wait = min(self.most_s, self.first_s * 2 ** (attempt - 1)) * (0.5 + 0.5 * self.jitter())
                if attempt == self.attempts or self.clock() + wait >= end:
                    raise
                logger.info("%s, attempt %d of %d: %s; again in %.2f s", what, attempt, self.attempts, error, wait)
                self.causes[error.word] += 1
            self.sleep(wait)
        raise AssertionError("unreachable")


def translate(error: BaseException, what: str, store: str, key: str = "") -> StoreError | Damaged:
    """The one place where an exception of the SDK, or below it, becomes one of ours."""
    found = _translated(error, what, store, key)
    if isinstance(found, StoreUnavailable):
        found.word = _word(error)
    return found


def _word(error: BaseException) -> str:
    """What the server answered, or what became of the connection."""
    if isinstance(error, botocore.exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", "?"))
        return code if code in _RETRY_CODES else str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return "timeout" if isinstance(error, _TIMEOUTS) else "connection"


def _translated(error: BaseException, what: str, store: str, key: str) -> StoreError | Damaged:
    if isinstance(error, botocore.exceptions.ClientError):
        return _answered(error, what, store, key)
    if (refused := _unsent(error, what, store)) is not None:
        return refused
    said = f"{what}: {store}: {type(error).__name__}: {_without_login(str(error))[:300]}"
    if isinstance(error, (botocore.exceptions.EndpointConnectionError, botocore.exceptions.ConnectTimeoutError)):
        said += (
            "; is the region right (?region=…, AWS_REGION), and does this machine reach AWS?"
            if ".amazonaws.com" in said
            else "; does the server run, and is the endpoint right (?endpoint=…, AWS_ENDPOINT_URL, the profile)?"
        )
        if (named := _socks()) is not None:
            said += f"; {named} names a SOCKS proxy, which is not used here; if need be give one of HTTP by HTTPS_PROXY"
    if isinstance(error, botocore.exceptions.ProxyConnectionError):
        if "://socks" in said.lower():
            return StoreRefused(f"{said}; HTTP_PROXY or HTTPS_PROXY names a SOCKS proxy: write it as http://host:port")
        said += "; look at HTTP_PROXY and HTTPS_PROXY (http://host:port, no SOCKS), or name the server in NO_PROXY"
    if isinstance(error, botocore.parsers.ResponseParserError):
        return StoreRefused(f"{said}; {NOT_S3}")
    if (login := next((login for kind, login in _LOGINS.items() if isinstance(error, kind)), "")) != "":
        profile = f" --profile {name}" if (name := os.environ.get("AWS_PROFILE")) else ""
        return CredentialsRefused(f"{said}; the profile's login has ended, or there was none: {login}{profile}")
    if isinstance(error, RuntimeError) and "expired" in str(error):
        return CredentialsExpired(said)
    if isinstance(error, CREDENTIALS):
        return CredentialsRefused(
            f"{said}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a role "
            "(never in the address); a bucket that everybody may read needs none with anonymous=1 in its address"
        )
    if isinstance(error, _FILES):
        return CredentialsRefused(
            f"{said}; look at the files that AWS_WEB_IDENTITY_TOKEN_FILE, AWS_SHARED_CREDENTIALS_FILE and "
            "AWS_CONFIG_FILE name: this process cannot read one of them"
        )
    if isinstance(error, botocore.exceptions.SSLError) and (why := _tls(error)):
        return StoreRefused(f"{said}; {why}")
    if isinstance(error, _RETRY) and not isinstance(error, _NO_RETRY):
        return StoreUnavailable(said)
    return StoreRefused(f"{said}; check the address, the credentials and boto3's configuration")


def _answered(error: botocore.exceptions.ClientError, what: str, store: str, key: str) -> StoreError | Damaged:
    """Of what the server said."""
    answer = error.response
    text = str(answer.get("Error", {}).get("Message", ""))[:300]
    meta = answer.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode", 0) or 0)
    code = str(answer.get("Error", {}).get("Code", "?")) or str(status)  # a page of HTML has none
    request = str(meta.get("RequestId", "") or "none")
    said = f"{what}: {store} answered {status} {code} ({text}; request {request})"
    if error.operation_name in _ROLES and code not in _RETRY_CODES and status not in _RETRY_STATUS:
        expired = code in _EXPIRED_CODES
        why = "the token that says who this is has expired" if expired else "no credentials were given"
        kind = CredentialsExpired if expired else CredentialsRefused
        return kind(
            f"{said}: {error.operation_name}: {why}; look at the role (AWS_ROLE_ARN, or the profile's role_arn), "
            "whom it trusts, and AWS_WEB_IDENTITY_TOKEN_FILE"
        )
    if code in ("NoSuchKey", "404", "NotFound"):
        if error.operation_name == "ListObjectsV2":
            return StoreRefused(f"{said}: there is no such bucket, or {NOT_S3}")
        return NotFound(key, store)
    if code == "InvalidRange" or status == 416:
        return Damaged(f"{said}: the object was cut short")
    if code in _EXPIRED_CODES:
        return CredentialsExpired(said)
    if code in _UNKNOWN_CODES:
        return CredentialsRefused(f"{said}: {_MEND.get(code, 'check the credentials')}")
    writes = error.operation_name.startswith(("Put", "Upload", "Create", "Complete"))
    if _CAP.search(text) or (writes and (_FULL.search(code) or _FULL.search(text))):
        return StoreFull(
            f"{said}: the store is full, or over its quota or cap; nothing that was there is lost: free space, or "
            "raise the limit, and it goes on"
        )
    if code in _RETRY_CODES or ((status in _RETRY_STATUS or status >= _OF_PROXIES) and code not in _MEND):
        return StoreUnavailable(said)
    mend = _LACKS if _HEADER.search(text) else _MEND.get(code, _OTHER)
    if mend in (_REGION, _MEND["302"]):
        mend = _elsewhere(meta.get("HTTPHeaders", {}), store) or mend
    if code == "AccessDenied" and "explicit deny" in text:
        mend = _DENIED
    if code in ("AccessDenied", "403") and "anonymous=1" in urlsplit(store).query.split("&"):
        mend = _NOT_EVERYBODY
    if code == "RequestTimeTooSkewed":
        said += f": it is {meta.get('HTTPHeaders', {}).get('date', '?')} there, {formatdate(usegmt=True)} here"
    if code.startswith("KMS.") or "kms:" in text:
        mend = _KMS_KEY
    return StoreRefused(f"{said}: {mend}")


def _elsewhere(headers: Mapping[str, str], store: str) -> str:
    """Where a server that answers by sending its callers on says to ask: S3 names the bucket's region, what stands
    before a server another address of the same path, or a login. Empty where it does not say.
    """
    if region := headers.get("x-amz-bucket-region"):
        return f"the bucket is in the region {region}: add ?region={region} to the address"
    bucket = urlsplit(store).netloc
    try:
        at = urlsplit(headers.get("location", ""))
    except ValueError:
        return _MEND["302"]
    host = at.netloc.rpartition("@")[2]
    if not host:
        return ""
    if not f"{at.path}/".startswith(f"/{bucket}/"):  # then it may stand in the host name
        if not host.startswith(f"{bucket}."):
            return _MEND["302"]
        host = host.removeprefix(f"{bucket}.")
    return f"the endpoint sends its callers on to {at.scheme or 'https'}://{host}: write that as the endpoint"


_OTHER_NAME, _OTHER_TIME = (62, 63, 64), (9, 10)
"""Of OpenSSL's verify_code."""


def _tls(error: BaseException) -> str:
    """Why no connection will be better than this one, with the mend; empty where another may be."""
    inner = error
    while not isinstance(inner, (ssl.SSLError, CertificateError)):
        told = getattr(inner, "kwargs", {}).get("error") or next(iter(inner.args), None)
        if not isinstance(told, BaseException):
            return ""
        inner = told
    if isinstance(inner, ssl.SSLError) and inner.reason == "WRONG_VERSION_NUMBER":
        return "the server speaks no TLS at that port: is the endpoint to begin with http://, or is the port another?"
    if not isinstance(inner, (ssl.SSLCertVerificationError, CertificateError)):
        return ""
    if isinstance(inner, CertificateError) or inner.verify_code in _OTHER_NAME:
        return (
            "the server's certificate is of another name: correct the endpoint; where the bucket stands in the host "
            "name (a bucket with dots, for one) add &path_style=1"
        )
    if inner.verify_code in _OTHER_TIME:
        return "the server's certificate does not hold today: have it renewed, or set this machine's clock"
    named = os.environ.get("AWS_CA_BUNDLE")
    now = f"it is {named!r} now" if named else "it is not set"
    return (
        "where the server's certificate is of an authority of your own, name a file with that authority's certificate "
        f"by AWS_CA_BUNDLE ({now}) or the profile's ca_bundle"
    )


def _without_login(text: str) -> str:
    """What a library says of an address, without the name and password of a proxy in it."""
    return re.sub(r"://[^/\s\"'@]*@", "://***@", text)


def _socks() -> str | None:
    """The variable that names a SOCKS proxy for everything, if one does."""
    found = (name for name in ("all_proxy", "ALL_PROXY") if os.environ.get(name, "").lower().startswith("socks"))
    return next(found, None)


def _unsent(error: BaseException, what: str, store: str) -> StoreRefused | None:
    """What never left this machine: an HTTP client did not take the credentials, or the name of a proxy."""
    told = getattr(error, "kwargs", {}) if isinstance(error, botocore.exceptions.HTTPClientError) else {}
    inner = told.get("error")
    if not isinstance(inner, ValueError):
        return None
    if "header value" in str(inner):  # which holds them
        return CredentialsRefused(
            f"{what}: {store}: the credentials hold what no header can, such as a line's end: take it out of "
            "AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN, or of the profile"
        )
    return StoreRefused(
        f"{what}: {store}: {_without_login(str(inner))[:300]}; look at HTTP_PROXY, HTTPS_PROXY and the endpoint: write "
        "them as http://host:port"
    )
