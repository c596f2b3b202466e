"""A small HTTP server that speaks enough S3 to be misbehaved: the peer that a careful client must survive.

It keeps objects in memory and takes any signature. ``ignore_conditions`` makes it answer 200 to a conditional write
that must fail, as some servers do; ``faults`` are taken one a request (that ``applies``) before it answers properly.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    "reset",  # the connection is reset before anything is done
    "done-reset",  # done, then reset: the answer is lost
    "done-500",  # done, but the answer says 500
    "done-409",
    "done-412",  # done, and a proxy's own retry answers 412
    "500",
    "503",
    "409",
    "hang",  # no answer until the client gives up
    "done-hang",
    "other-500",  # another writer gets in first, and the answer says 500
    "short",  # GET: fewer bytes than promised
    "bad-digest",  # says that other bytes arrived
    "no-xml",  # 502 with a page of a proxy
    "429",
    "301",  # the bucket is in another region
    "html",  # 200 with a page of HTML: a login page answers instead
    "expired",  # the session token has expired (a HEAD has no body that says so)
]
Length = Literal[
    "told",
    "chunked",  # no Content-Length: in chunks
    "close",  # neither: the end of the connection ends the body
    "wrong",  # GET: more promised than sent
]


class HostileS3:
    """Objects, and what goes wrong next."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.ignore_conditions = False
        self.length: Length = "told"  # of answers to GET and HEAD
        self.ignore_range = False
        self.lower_case = False  # names of headers
        self.etag = True
        self.lists = True
        self.tokens: set[str] | None = None  # session tokens that are taken; None: all
        self.faults: deque[Fault] = deque()
        self.applies: tuple[str, ...] = ("PUT",)
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.port = 0

    def url(self, prefix: str = "p") -> str:
        return f"s3://bucket/{prefix}?endpoint=http://127.0.0.1:{self.port}&region=us-east-1"


@contextlib.contextmanager
def hostile_s3() -> Iterator[HostileS3]:
    state = HostileS3()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def answer(
            self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, promise: int | None = None
        ) -> None:
            length = state.length if status in (200, 206) and self.command in ("GET", "HEAD") else "told"
            if length == "wrong" and self.command == "GET":
                promise = len(body) + 7
                self.close_connection = True
            said = dict(headers or {})
            if length in ("told", "wrong"):
                said["Content-Length"] = str(len(body) if promise is None else promise)
            elif length == "chunked":
                said["Transfer-Encoding"] = "chunked"
            else:
                said["Connection"] = "close"
                self.close_connection = True
            self.send_response(status)
            for name, value in said.items():
                self.send_header(name.lower() if state.lower_case else name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if length == "chunked":
                for first in range(0, len(body), 1000):
                    piece = body[first : first + 1000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.wfile.write(body)

        def odd(self, fault: Fault | None) -> bool:
            """Whether this request was answered by a fault that all methods know."""
            token = self.headers.get("x-amz-security-token", "")
            if fault == "expired" or (state.tokens is not None and token not in state.tokens):
                self.error(400, "ExpiredToken")
            elif fault == "429":
                self.answer(429, b"<html>slow down")
            elif fault == "301":
                self.error(301, "PermanentRedirect")
            elif fault == "html":
                self.answer(200, b"<!DOCTYPE html><title>Log in</title>", {"Content-Type": "text/html; charset=utf-8"})
            else:
                return False
            return True

        def error(self, status: int, code: str) -> None:
            self.answer(status, f"<Error><Code>{code}</Code><Message>said the test</Message></Error>".encode())

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def next_fault(self) -> Fault | None:
            with state.lock:
                state.requests.append(f"{self.command} {self.path}")
                return state.faults.popleft() if state.faults and self.command in state.applies else None

        def key(self) -> str:
            return unquote(urlsplit(self.path).path).removeprefix("/bucket/")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            fault = self.next_fault()
            if self.odd(fault):
                return None
            conditional = self.headers.get("If-None-Match") == "*" and not state.ignore_conditions
            if fault == "reset":
                return self.reset()
            if fault == "hang":
                state.stopping.wait(30)
                return self.reset()
            if fault in ("500", "503", "409"):
                code = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict"}[fault]
                return self.error(int(fault), code)
            if fault == "no-xml":
                return self.answer(502, b"<html>Bad Gateway")
            if fault == "bad-digest":
                return self.error(400, "BadDigest")
            with state.lock:
                if fault == "other-500":
                    state.objects.setdefault(self.key(), b"another's")
                    lost = False
                else:
                    lost = conditional and self.key() in state.objects
                    if not lost:
                        state.objects[self.key()] = body
            if fault == "done-reset":
                return self.reset()
            if fault == "done-hang":
                state.stopping.wait(30)
                return self.reset()
            if fault in ("done-500", "other-500"):
                return self.error(500, "InternalError")
            if fault == "done-409":
                return self.error(409, "ConditionalRequestConflict")
            if lost or fault == "done-412":
                return self.error(412, "PreconditionFailed")
            self.answer(200, headers=self.tag(body))
            return None

        def tag(self, body: bytes) -> dict[str, str]:
            return {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if state.etag else {}

        def do_GET(self) -> None:
            fault = self.next_fault()
            if self.odd(fault):
                return None
            if fault == "reset":
                return self.reset()
            if fault in ("500", "503"):
                return self.error(int(fault), "InternalError")
            query = parse_qs(urlsplit(self.path).query)
            with state.lock:
                if "list-type" in query:
                    prefix = query.get("prefix", [""])[0]
                    names = sorted(name for name in state.objects if name.startswith(prefix) and state.lists)
                    rows = "".join(
                        f"<Contents><Key>{n}</Key><Size>{len(state.objects[n])}</Size></Contents>" for n in names
                    )
                    text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
                    return self.answer(200, text.encode(), {"Content-Type": "application/xml"})
                data = state.objects.get(self.key())
            if data is None:
                return self.error(404, "NoSuchKey")
            if fault == "short":
                self.answer(200, data[: len(data) // 2], promise=len(data))
                self.close_connection = True
                return None
            wanted = self.headers.get("Range")
            if wanted is None or state.ignore_range:
                return self.answer(200, data, self.tag(data))
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.error(416, "InvalidRange")
            last = min(last, len(data) - 1)
            return self.answer(
                206, data[first : last + 1], self.tag(data) | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            )

        def do_HEAD(self) -> None:
            fault = self.next_fault()
            if self.odd(fault):
                return None
            if fault in ("500", "503"):
                return self.answer(int(fault))
            with state.lock:
                data = state.objects.get(self.key())
            return self.answer(404) if data is None else self.answer(200, data, self.tag(data))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        state.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
