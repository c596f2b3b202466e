"""What a person writes for a store, and the URL that it stands for.

A text that begins with ``file://``, ``file:/``, ``s3://`` or another scheme and ``://`` is a URL; ``memory:`` is the
store in memory; everything else is the path of a folder, taken literally whatever it holds, but for a ``~`` at the
beginning. What begins like an address and is none (``s3:/b``), with a blank, or has quotes around it is refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

from checkpoint.errors import StoreRefused

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|file:/|memory:\Z)", re.IGNORECASE)
_ALMOST = re.compile(r"[\s\"'<]*(?:s3[an]?|arn|gs|gcs|az|abfss?|https?|hdfs|file|memory):", re.IGNORECASE)
_WRAPPED = re.compile(r"\s|([\"']).+\1\Z", re.DOTALL)
"""Blanks before a path or quotes around it: a shell takes them off, a file of environment variables does not."""
_CONTROL = re.compile(r"[\0-\x20\x7f]")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def address(text: str) -> str:
    """The URL of what a person wrote. StoreRefused where it can be no store.

    >>> address("/data/a%41 #1")
    'file:///data/a%2541%20%231'
    >>> address("s3://bucket/prefix")
    's3://bucket/prefix'
    """
    if not text.strip():
        raise StoreRefused("the store's address is empty: give a folder, file:///… or s3://…, or leave --store out")
    if text.endswith(("\n", "\r")):
        raise StoreRefused(
            f"store {text.rpartition('@')[2]!r} ends with a line's end, as what is read from a file or a Secret may: "
            "take it out (a folder whose name really ends so is file:///…%0A)"
        )
    if _URL.match(text):
        return text
    if "\0" in text:
        raise StoreRefused(f"store {text!r}: a path holds no NUL byte; take it out")
    if _ALMOST.match(text):
        raise StoreRefused(
            f"store {text.rpartition('@')[2]!r} is no address, and begins like one: write s3://bucket/prefix or "
            "file:///absolute/path, without blanks or quotes around it; for a folder of that name put ./ before it"
        )
    if _WRAPPED.match(text):
        raise StoreRefused(
            f"store {text!r}: write the path without blanks before it or quotes around it; for a folder of that name "
            "put ./ before it"
        )
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise StoreRefused(
            f"store {text!r}: there is no home folder of {text.partition('/')[0]!r}; give an absolute path, or put ./ "
            "before it"
        )
    try:
        path = Path(os.path.abspath(os.path.expanduser(text)) if text.startswith("~") else _absolute(text))
    except OSError as error:
        raise StoreRefused(
            f"store {text!r}: it is taken from this process's folder, and that is gone ({error.strerror}): go to one "
            "that exists, or give an absolute path"
        ) from error
    if path == Path("/"):
        raise StoreRefused(f"store {text!r}: not the root folder; give a folder below it")
    return path.as_uri()


def endpoint_of(url: str) -> str | None:
    """The server of a store in S3, by its address, else by boto3's configuration; None: AWS's own, or no S3."""
    if not url.lower().startswith("s3:"):
        return None
    try:
        said = parse_qs(urlsplit(url).query).get("endpoint")
    except ValueError:  # opening it says what is wrong
        return None
    if said:
        return said[0]
    from checkpoint.store.s3_settings import endpoint  # boto3 takes 0.3 s to import, and such a store needs it

    return endpoint()


def _absolute(text: str) -> str:
    return text if text.startswith("/") else os.path.join(os.getcwd(), text)


def folder_of(url: str) -> Path:
    """The folder of a ``file:`` URL: percent-escapes are decoded, as in every URL. StoreRefused for another form."""
    rest = url.partition(":")[2]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    if slash != "/" or host not in ("", "localhost"):
        raise StoreRefused(
            f"store {url!r}: a file store is file:///absolute/path (three slashes), without host or query"
        )
    if "?" in path or "#" in path:
        raise StoreRefused(
            f"store {url!r}: a file store is file:///absolute/path, without host or query; in a URL a ? is written %3F "
            "and a # %23, or give the plain path"
        )
    if _CONTROL.search(path) or _PERCENT.search(path):
        raise StoreRefused(
            f"store {url!r}: in a URL a blank is written %20 and a % %25 (every % is followed by two hex digits); or "
            "give the plain path, which is taken as it is"
        )
    folder = os.fsdecode(b"/" + unquote_to_bytes(os.fsencode(path)))
    if "\0" in folder:
        raise StoreRefused(f"store {url!r}: a path holds no NUL byte (%00); take it out")
    if not folder.strip("/"):
        raise StoreRefused(f"store {url!r}: not the root folder; give a folder below it, file:///absolute/path")
    return Path(folder)
