"""What an S3 address may say: ``s3://bucket/prefix[?endpoint=http://…&region=…&path_style=1&sse=aws:kms&kms_key=…]``.

It says where objects lie and how they are to be kept, never who asks. What it leaves out is boto3's own configuration:
the environment and the profile (``s3.S3Store``).
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from checkpoint.errors import StoreRefused
from checkpoint.store.base import check_key
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]\Z")
_HOST = re.compile(r"(?:(?P<bucket>.+)\.s3[.-](?:[a-z0-9-]+\.)*amazonaws\.com(?:\.cn)?|\d+\.\d+\.\d+\.\d+)\Z")
"""What is no bucket's name: AWS's own, and an address."""
_KMS_KEY = re.compile(r"[A-Za-z0-9:/_-]{1,256}\Z")
OPTIONS = ("endpoint", "region", "path_style", "sse", "kms_key", "anonymous", "requester_pays")
ENCRYPTION = ("AES256", "aws:kms", "aws:kms:dsse")


def open_s3(url: str, retry: Retry | None = None) -> S3Store:
    """The store at this address. StoreRefused as ``read_address`` and ``S3Store`` have it."""
    return S3Store(**read_address(url), retry=retry)


def read_address(url: str) -> dict[str, Any]:
    """What an address says, as ``S3Store`` takes it; StoreRefused for one that is none, with what is wrong."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreRefused(f"store s3://…: {error}; write s3://bucket/prefix") from error
    if "@" in parts.netloc or "@" in parts.query:
        raise StoreRefused(
            f"store s3://…{parts.path}: an address holds no credentials; take them out, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE instead (and change them: addresses end up in logs)"
        )
    shown = f"s3://{parts.netloc}{parts.path}"
    _check_bucket(parts, shown)
    prefix = _prefix(parts, shown)
    options = _options(parts.query, shown)
    endpoint = options.get("endpoint")
    if endpoint is not None:
        _check_endpoint(endpoint, shown)
    style = options.get("path_style", "1" if endpoint else None)
    if style not in ("0", "1", None):
        raise StoreRefused(f"store {shown}: path_style is 1 (bucket in the path) or 0 (in the host name)")
    for flag, what in (("anonymous", "for what everybody may read"), ("requester_pays", "where who reads pays")):
        if options.get(flag, "1") != "1":
            raise StoreRefused(f"store {shown}: {flag} is 1 ({what}), or left out")
    if {"anonymous", "requester_pays"} <= options.keys():
        raise StoreRefused(f"store {shown}: nobody pays for what nothing signs: leave anonymous or requester_pays out")
    sse, key = options.get("sse"), options.get("kms_key")
    _check_encryption(sse, key, shown)
    return {
        "bucket": parts.netloc,
        "prefix": prefix,
        "endpoint": endpoint,
        "region": options.get("region"),
        "path_style": None if style is None else style == "1",
        "sse": sse,
        "kms_key": key,
        "anonymous": "anonymous" in options,
        "requester_pays": "requester_pays" in options,
    }


def _check_bucket(parts: SplitResult, shown: str) -> None:
    if parts.netloc.startswith("arn:"):
        raise StoreRefused(
            f"store {shown}: a bucket is said by its name, an access point by its alias (which ends with -s3alias), "
            "not by an ARN: write s3://NAME/prefix"
        )
    if re.fullmatch(r".+:\d+", parts.netloc):
        raise StoreRefused(
            f"store {shown}: {parts.netloc} is a server's name and port, not a bucket's: write "
            f"s3://{parts.path.strip('/') or 'bucket/prefix'}?endpoint=http://{parts.netloc} (or https://)"
        )
    if parts.netloc.endswith("--x-s3"):
        raise StoreRefused(
            f"store {shown}: {parts.netloc} is a directory bucket: its listings have no order and cannot begin "
            "after a name, as a log needs it; use a general purpose bucket"
        )
    if parts.fragment or _BUCKET.match(parts.netloc) is None:
        raise StoreRefused(
            f"store {shown}: must be s3://bucket/prefix, the bucket of 3 to 63 letters, digits, dots and dashes"
        )
    if (host := _HOST.match(parts.netloc)) is not None:
        wanted = (
            f"s3://{host['bucket']}{parts.path}" if host["bucket"] else "s3://bucket/prefix?endpoint=http://host:port"
        )
        raise StoreRefused(f"store {shown}: {parts.netloc} is a server's name, not a bucket's: write {wanted}")


def _prefix(parts: SplitResult, shown: str) -> str:
    if "//" in parts.path:
        raise StoreRefused(
            f"store {shown}: a prefix has no empty part (//), which is one of a name to S3: write "
            f"s3://{'/'.join(filter(None, (parts.netloc, *parts.path.split('/'))))}"
        )
    prefix = parts.path.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except StoreRefused as error:
            raise StoreRefused(f"store {shown}: its prefix cannot be; {error}") from error
    return prefix


def _options(query: str, shown: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise StoreRefused(
            f"store {shown}: unknown option {unknown[0][:40]!r}; there are {', '.join(OPTIONS)} (credentials never)"
        )
    twice = next((name for name, value in pairs if not value or options[name] != value), None)
    if twice is not None:
        why = "has no value: write one, or leave it out" if not options[twice] else "stands twice: leave one of them"
        raise StoreRefused(f"store {shown}: option {twice} {why}")
    return options


def _check_endpoint(endpoint: str, shown: str) -> None:
    try:
        at = urlsplit(endpoint)
        _ = at.port
    except ValueError as error:
        raise StoreRefused(f"store {shown}: the endpoint must be http://host:port: {error}") from error
    if at.scheme not in ("http", "https") or not at.hostname or at.query or at.fragment:
        raise StoreRefused(f"store {shown}: the endpoint must be http://host:port or https://host:port")
    if at.path.strip("/"):
        raise StoreRefused(
            f"store {shown}: the endpoint has the path {at.path[:80]!r}, and servers of S3 answer at their root: "
            f"write {at.scheme}://{at.netloc}, without it; folders belong to s3://bucket/prefix"
        )


def _check_encryption(sse: str | None, key: str | None, shown: str) -> None:
    if sse is not None and sse not in ENCRYPTION:
        raise StoreRefused(
            f"store {shown}: sse is {', '.join(ENCRYPTION[:-1])} or {ENCRYPTION[-1]}, not {sse[:40]!r}; where it is "
            "left out the bucket's own encryption holds"
        )
    if key is not None and (sse in (None, "AES256") or _KMS_KEY.match(key) is None):
        raise StoreRefused(
            f"store {shown}: kms_key is the id, the alias or the ARN of a key, and needs sse=aws:kms beside it"
        )
