"""A door in front of a real HTTP server that a test opens and shuts: it passes on, answers a code, hangs, is gone."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_OWN = ("host", "connection", "accept-encoding")  # what is passed on is read as it is


class Front:
    """``mode``: "pass", a number (the code of every answer), "hang", "html" (a gateway's page), "no server" (a proxy's
    own 404), or "moved" (301 to ``moves_to``, at first the server itself). ``message``: of what is a number. ``asked``
    counts; of ``busy_each`` answers one is 503 (0: none). ``lost``: the end of a path; the next answer to it is lost on
    the way, and the answers after it are 503.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.mode: str | int = "pass"
        self.moves_to, self.message = f"{parts.scheme}://{parts.netloc}", b'{"detail": "the door"}'
        self.asked = self.busy_each = 0
        self.lost = ""
        self.released = threading.Event()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                front.asked += 1
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                mode = 503 if front.busy_each and front.asked % front.busy_each == 0 else front.mode
                if mode == "hang":
                    front.released.wait(60)
                    self.close_connection = True
                    return
                if mode == "html":
                    return self._answer(200, {"content-type": "text/html"}, b"<html>please log in</html>")
                if mode == "no server":
                    return self._answer(404, {"content-type": "text/plain"}, b"404 page not found")
                if mode == "moved":
                    return self._answer(301, {"location": f"{front.moves_to}{self.path}"}, b"")
                if isinstance(mode, int):
                    return self._answer(mode, {"content-type": "application/json"}, front.message)
                inner = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _OWN}
                inner.request(self.command, self.path, body or None, headers)
                reply = inner.getresponse()
                if front.lost and self.path.endswith(front.lost):
                    front.lost, front.mode = "", 503
                    self.close_connection = True
                    return None
                kept = {k: v for k, v in reply.getheaders() if k.lower() in ("content-type", "location")}
                self._answer(reply.status, kept, reply.read())
                inner.close()

            def _answer(self, code: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(code)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("content-length", str(len(body)))
                self.send_header("connection", "close")  # a door that is shut has no connections left open
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _any

            def log_message(self, *_: Any) -> None:
                return

        self._handler = Handler
        self.server: ThreadingHTTPServer | None = None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        self.open()

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def open(self) -> None:
        """Listen again, on the same port."""
        for _ in range(100):
            try:
                self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
                break
            except OSError:  # its last connections are still closing
                time.sleep(0.05)
        assert self.server is not None
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def shut(self) -> None:
        """Connections are refused from now on."""
        assert self.server is not None
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.server = None

    def close(self) -> None:
        if self.server is not None:
            self.shut()
