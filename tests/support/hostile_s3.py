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
]


class HostileS3:
    """Objects, and what goes wrong next."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.ignore_conditions = False
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
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if promise is None else promise))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

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
            self.answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

        def do_GET(self) -> None:
            fault = self.next_fault()
            if fault == "reset":
                return self.reset()
            if fault in ("500", "503"):
                return self.error(int(fault), "InternalError")
            query = parse_qs(urlsplit(self.path).query)
            with state.lock:
                if "list-type" in query:
                    prefix = query.get("prefix", [""])[0]
                    names = sorted(name for name in state.objects if name.startswith(prefix))
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
            if wanted is None:
                return self.answer(200, data)
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.error(416, "InvalidRange")
            return self.answer(206, data[first : last + 1])

        def do_HEAD(self) -> None:
            fault = self.next_fault()
            if fault in ("500", "503"):
                return self.answer(int(fault))
            with state.lock:
                data = state.objects.get(self.key())
            return self.answer(404) if data is None else self.answer(200, data)

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
