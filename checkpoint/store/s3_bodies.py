"""Bodies of S3 requests, without copies: slices of the caller's memory go out, what comes in is written where it is
wanted. The SDK would read a body in pieces of 16 KiB, after a copy; ``hand_over`` puts an iterator in its place.

A slice is sent under a time-out of its own (a socket's time-out is of one whole ``sendall``), and the request as a
whole under ``limits.Progress``.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import botocore.config

from checkpoint.store.limits import SLICE_BYTES, Progress, Rate

READ_BYTES = 256 << 10


class Outgoing:
    """A body as the SDK takes it for a file, and as the connection takes it: iterated, once each time that it is sent.

    With a file for a body the SDK asks the server first (``Expect: 100-continue``): an object whose name is taken is
    then refused before its bytes are sent.
    """

    def __init__(self, data: memoryview, rate: Rate | None, grace_s: float) -> None:
        self.view = data.cast("B")
        self._rate, self._grace_s = rate, grace_s

    def read(self, _: int = -1) -> bytes:
        raise AssertionError("hand_over has the connection iterate it")

    def slices(self) -> Iterator[memoryview]:
        progress = Progress(self._grace_s)
        for at in range(0, self.view.nbytes, SLICE_BYTES):
            piece = self.view[at : at + SLICE_BYTES]
            progress.moved(0, self._rate.take(piece.nbytes) if self._rate is not None else 0.0)
            yield piece
            progress.moved(piece.nbytes)


class _Slices:
    """Without ``read``, which the connection would prefer, in pieces of its own."""

    def __init__(self, body: Outgoing) -> None:
        self._body = body

    def __iter__(self) -> Iterator[memoryview]:
        return self._body.slices()


def hand_over(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    """``before-call`` of PutObject: the real body, and its length, which nobody else can tell.

    Its SHA-256 is in a header, which is signed and which the server checks: the SDK need not hash it once more.
    """
    body = params.get("body")
    if isinstance(body, Outgoing):
        params["body"] = _Slices(body)
        params["headers"]["Content-Length"] = str(body.view.nbytes)
        own = context["client_config"]
        unsigned = botocore.config.Config(s3={**(own.s3 or {}), "payload_signing_enabled": False})
        context["client_config"] = own.merge(unsigned)


def _reads(body: Any) -> Callable[[int], bytes]:
    """One read of the socket each, not as many as fill what is asked for: the SDK would wait as long as bytes come."""
    stream = getattr(body, "_raw_stream", None)
    read: Callable[[int], bytes] = getattr(stream, "read1", None) or body.read
    return read


def read_all(body: Any, most: int | None, grace_s: float) -> bytes:
    """An answer's body (``StreamingBody``) to its end, but not beyond ``most``."""
    progress, read = Progress(grace_s), _reads(body)
    pieces: list[bytes] = []
    have = 0
    while most is None or have < most:
        piece = read(READ_BYTES if most is None else min(READ_BYTES, most - have))
        if not piece:
            break
        pieces.append(piece)
        have += len(piece)
        progress.moved(len(piece))
    return b"".join(pieces)


def _receives(body: Any) -> Callable[[memoryview], int] | None:
    """One receive of the socket each, straight into memory. None where the body is not a plain one, or the SDK's answer
    is made otherwise than today: it is then read and copied.
    """
    stream: Any = getattr(body, "_raw_stream", None)
    answer = getattr(stream, "_fp", None)
    if not isinstance(answer, http.client.HTTPResponse) or answer.chunked or answer.length is None:
        return None
    receive = getattr(answer.fp, "readinto1", None)
    left = getattr(stream, "length_remaining", None)
    if receive is None or left != answer.length or answer.headers.get("Content-Encoding"):
        return None

    def some(out: memoryview) -> int:
        assert answer.length is not None
        came: int = receive(out[: answer.length]) if answer.length else 0
        answer.length -= came
        stream.length_remaining = answer.length
        if answer.length == 0:
            stream.read()  # the end: the connection goes back
        return came

    return some


def read_into(body: Any, out: Sequence[memoryview], grace_s: float, filled: Callable[[int], None]) -> int:
    """An answer's body into these, in order; how many bytes came until it ended or all are full."""
    progress, read, receive = Progress(grace_s), _reads(body), _receives(body)

    def some(room: memoryview) -> int:
        if receive is not None:
            return receive(room)  # as much as has come
        piece = read(min(READ_BYTES, room.nbytes))
        room[: len(piece)] = piece
        return len(piece)

    have = 0
    for number, view in enumerate(out):
        at = 0
        while at < view.nbytes:
            came = some(view[at:])
            if not came:
                return have
            at += came
            have += came
            progress.moved(came)
        filled(number)
    return have
