"""A small HTTP server that speaks enough S3 to be misbehaved: the peer that a careful client must survive.

It keeps objects in memory and takes any signature. ``ignore_conditions`` makes it answer 200 to a conditional write
that must fail, as some servers do; ``faults`` are taken one a request (that ``applies``) before it answers properly;
``lies`` are what it does wrong all the time without saying so.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import BinaryIO, Literal
from urllib.parse import parse_qs, unquote, unquote_plus, urlsplit

from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry

SECRET = "hunter2hunter2hunter2"
"""Of the credentials that tests give; no message may hold it."""
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
    "cut",  # done, but the answer ends after ``cut_at`` bytes, its head counted: closed, or reset
    "cut-body",  # PUT: reset when ``cut_at`` bytes of the body are read
    "drip",  # a few bytes each ``drip_s``: of the answer to a GET, of a PUT's body
    "wrong-sum",  # PUT: done, but the answer tells another SHA-256
    "expired",  # the session token has expired (a HEAD has no body that says so)
]
Lie = Literal[
    "races",  # looks whether there is an object, and writes it some time after
    "changes",  # a create that it calls lost changes the object
    "unlisted",  # the newest object is not in listings yet
    "hidden",  # an object is shown from the second look on
    "order",  # lists without regard to letters' case
    "case",  # names without regard to letters' case
    "plus",  # a + in a name is a blank
    "ranges",  # one byte further
    "beyond",  # a range that does not fit is filled up with zeros
    "unchecked",  # does not compare digests
    "keeps",  # refuses what does not have its digest, and keeps it
    "stale",  # an object that was replaced is read as it was
    "ahead",  # its clock is an hour ahead
    "timeless",  # does not say when an object was written
    "undead",  # says that it has deleted
    "empty",  # keeps no object without bytes
    "flips",  # a bit of what is read is another one
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
        self.lies: set[Lie] = set()
        self.denies: set[str] = set()  # methods that answer AccessDenied, LIST among them
        self.old: dict[str, bytes] = {}  # what was replaced
        self.looked: set[str] = set()  # names that were asked for since they are there
        self.written: dict[str, float] = {}
        self.meeting = threading.Barrier(2)  # of writers of one object, where it lies about races, ...
        self.racing = "race"  # ... if its name holds this
        self.ignore_conditions = False
        self.length: Length = "told"  # of answers to GET and HEAD
        self.ignore_range = False
        self.lower_case = False  # names of headers
        self.etag = True
        self.lists = True
        self.any_prefix = False  # whether it lists the whole bucket, whatever is asked for
        self.page = 1000  # names that a listing shows at a time, ...
        self.goes_on: Literal["right", "again", "unsaid"] = "right"  # ... and what it does when it is asked for more
        self.tokens: set[str] | None = None  # session tokens that are taken; None: all
        self.faults: deque[Fault] = deque()
        self.applies: tuple[str, ...] = ("PUT",)
        self.cut_at, self.cut_resets = 0, True
        self.drip_s = 0.05
        self.sums = False  # whether a HEAD tells the SHA-256 that came with the object
        self.kept: dict[str, str] = {}
        self.requests: list[str] = []
        self.heads: list[dict[str, str]] = []  # of the requests, names in small letters
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.port = 0

    def url(self, prefix: str = "p") -> str:
        return f"s3://bucket/{prefix}?endpoint=http://127.0.0.1:{self.port}&region=us-east-1"


class _Cut:
    """A connection's writing end that takes so many bytes, then ends."""

    def __init__(self, inner: BinaryIO | BufferedIOBase, left: int, end: Callable[[], None]) -> None:
        self._inner, self._left, self._end = inner, left, end

    def write(self, data: bytes) -> int:
        if self._left >= 0:
            self._inner.write(data[: self._left])
            self._left -= len(data)
            if self._left < 0:
                self._end()
        return len(data)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._inner.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._inner.close()

    @property
    def closed(self) -> bool:
        return self._inner.closed


@contextlib.contextmanager
def hostile_s3(tls: ssl.SSLContext | None = None) -> Iterator[HostileS3]:
    """``tls``: it speaks https. Asked as a proxy it answers for every host."""
    state = HostileS3()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer's head and body are two writes

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
            if status == 204:
                pass  # it has no body, and so no length
            elif length in ("told", "wrong"):
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
                state.heads.append({name.lower(): value for name, value in self.headers.items()})
                return state.faults.popleft() if state.faults and self.command in state.applies else None

        def key(self) -> str:
            path = urlsplit(self.path).path
            key = (unquote_plus(path.replace("%2B", "+")) if "plus" in state.lies else unquote(path)).removeprefix(
                "/bucket/"
            )
            return key.lower() if "case" in state.lies else key

        def denied(self, what: str) -> bool:
            if what in state.denies:
                self.error(403, "AccessDenied")
            return what in state.denies

        def wrong_digest(self, body: bytes) -> bool:
            told = self.headers.get("x-amz-checksum-sha256")
            return (
                told is not None
                and "unchecked" not in state.lies
                and told != base64.b64encode(hashlib.sha256(body).digest()).decode()
            )

        def keep(self, key: str, body: bytes) -> None:
            """The object, and when it was written; the lock is held."""
            if "stale" in state.lies and key in state.objects:
                state.old[key] = state.objects[key]
            if "empty" in state.lies and not body:
                return
            state.objects[key] = body
            state.written[key] = time.time() + (3600 if "ahead" in state.lies else 0)

        def do_PUT(self) -> None:
            fault = self.next_fault()
            size = int(self.headers.get("Content-Length", "0"))
            if fault == "cut-body":
                self.rfile.read(min(size, state.cut_at))
                return self.reset()
            while fault == "drip" and not state.stopping.wait(state.drip_s):
                if not self.connection.recv(1):
                    self.close_connection = True
                    return None
            body = self.rfile.read(size)
            if fault == "cut":
                self.cut()
            if self.odd(fault) or self.denied("PUT"):
                return None
            if self.wrong_digest(body):
                if "keeps" in state.lies:
                    with state.lock:
                        self.keep(self.key(), body)
                return self.error(400, "BadDigest")
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
                    if "races" in state.lies and not lost and state.racing in self.key():
                        state.lock.release()
                        with contextlib.suppress(threading.BrokenBarrierError):
                            state.meeting.wait(5)
                        state.lock.acquire()
                    if not lost or "changes" in state.lies:
                        self.keep(self.key(), body)
                        state.kept[self.key()] = self.headers.get("x-amz-checksum-sha256", "")
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
            told = {"x-amz-checksum-sha256": base64.b64encode(bytes(32)).decode()} if fault == "wrong-sum" else {}
            self.answer(200, headers=self.tag(body) | told)
            return None

        def cut(self) -> None:
            """From here on what is answered ends after so many bytes."""
            self.wfile = _Cut(self.wfile, state.cut_at, self.reset if state.cut_resets else self.end)  # type: ignore[assignment]

        def end(self) -> None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def tag(self, body: bytes) -> dict[str, str]:
            return {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if state.etag else {}

        def do_GET(self) -> None:
            fault = self.next_fault()
            if self.odd(fault) or self.denied("LIST" if "list-type" in self.path else "GET"):
                return None
            if fault == "reset":
                return self.reset()
            if fault in ("500", "503"):
                return self.error(int(fault), "InternalError")
            query = parse_qs(urlsplit(self.path).query)
            with state.lock:
                if "list-type" in query:
                    prefix = "" if state.any_prefix else query.get("prefix", [""])[0]
                    shown = list(state.objects)[: -1 if "unlisted" in state.lies else None]
                    names = sorted(name for name in shown if name.startswith(prefix) and state.lists)
                    if "order" in state.lies:
                        names.sort(key=str.lower)
                    first = int(query.get("continuation-token", ["0"])[0]) if state.goes_on == "right" else 0
                    cut, names = len(names) > first + state.page, names[first : first + state.page]
                    token = f"<NextContinuationToken>{first + state.page}</NextContinuationToken>"
                    rows = "".join(
                        f"<Contents><Key>{n}</Key><Size>{len(state.objects[n])}</Size>{self.when(n)}</Contents>"
                        for n in names
                    )
                    more = token if cut and state.goes_on != "unsaid" else ""
                    said = f"<IsTruncated>{str(cut).lower()}</IsTruncated>{more}"
                    text = f"<ListBucketResult>{said}{rows}</ListBucketResult>"
                    return self.answer(200, text.encode(), {"Content-Type": "application/xml"})
                data = state.objects.get(self.key())
                if "stale" in state.lies:
                    data = state.old.pop(self.key(), data)
            if data is None:
                return self.error(404, "NoSuchKey")
            if "flips" in state.lies and len(data) > 1 << 16:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if fault == "cut":
                self.cut()
            if fault == "drip":
                self.answer(200, b"", promise=len(data))
                for at in range(len(data)):
                    if state.stopping.wait(state.drip_s):
                        break
                    try:
                        self.wfile.write(data[at : at + 1])
                    except OSError:
                        break
                self.close_connection = True
                return None
            if fault == "short":
                self.answer(200, data[: len(data) // 2], promise=len(data))
                self.close_connection = True
                return None
            wanted = self.headers.get("Range")
            if wanted is None or state.ignore_range:
                return self.answer(200, data, self.tag(data))
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            if "ranges" in state.lies:
                data = data[1:] + data[:1]
            if "beyond" in state.lies:
                data = data.ljust(last + 1, b"\0")
            if first >= len(data):
                return self.error(416, "InvalidRange")
            last = min(last, len(data) - 1)
            return self.answer(
                206, data[first : last + 1], self.tag(data) | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            )

        def when(self, key: str) -> str:
            if "timeless" in state.lies or key not in state.written:
                return ""
            at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(state.written[key]))
            return f"<LastModified>{at}</LastModified>"

        def do_DELETE(self) -> None:
            if self.odd(self.next_fault()) or self.denied("DELETE"):
                return None
            if "undead" not in state.lies:
                with state.lock:
                    state.objects.pop(self.key(), None)
            return self.answer(204, headers={"Content-Type": "text/html"})  # as some do: there is no body

        def do_HEAD(self) -> None:
            fault = self.next_fault()
            if self.odd(fault) or self.denied("GET"):
                return None
            if fault in ("500", "503"):
                return self.answer(int(fault))
            with state.lock:
                data = state.objects.get(self.key())
                if "hidden" in state.lies and data is not None and self.key() not in state.looked:
                    state.looked.add(self.key())
                    data = None
            if data is None:
                return self.answer(404)
            at = state.written.get(self.key())
            said = {} if at is None or "timeless" in state.lies else {"Last-Modified": formatdate(at, usegmt=True)}
            if state.sums and state.kept.get(self.key()):
                said = said | {"x-amz-checksum-sha256": state.kept[self.key()]}
            return self.answer(200, data, self.tag(data) | said)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
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


def client(peer: HostileS3, attempts: int = 4, renew_s: float = 0.0) -> S3Store:
    """A store against the peer that waits for nothing between its attempts, nor before it looks for credentials."""
    retry = Retry(attempts=attempts, sleep=lambda _: None, jitter=lambda: 0.0)
    endpoint = f"http://127.0.0.1:{peer.port}"
    return S3Store(
        "bucket", "p", endpoint=endpoint, region="us-east-1", path_style=True, retry=retry, read_s=0.5, renew_s=renew_s
    )
