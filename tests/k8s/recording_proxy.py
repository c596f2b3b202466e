"""An HTTP proxy in the tests' own process: keeps what it was asked, and takes plain requests to one server."""

from __future__ import annotations

import base64
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class RecordingProxy:
    """``seen``: (method, target) of each request. ``target``: the address that everything is taken to, by whatever
    name it was asked for. ``login``: whom it serves ("name:password"), else everybody.
    """

    def __init__(self, target: str, login: str = "") -> None:
        self.target, self.login = target, login
        self.seen: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.address = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> RecordingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: RecordingProxy

    def log_message(self, *_: object) -> None:
        return

    def do_CONNECT(self) -> None:
        """Refused: no test here needs a tunnel to lead anywhere."""
        self.proxy.seen.append(("CONNECT", self.path))
        self.send_error(502)

    def _pass(self) -> None:
        self.proxy.seen.append((self.command, self.path))
        given = self.headers.get("Proxy-Authorization", "")
        if self.proxy.login and given != "Basic " + base64.b64encode(self.proxy.login.encode()).decode():
            self.send_error(407)
            return
        at = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        talk = HTTPConnection(urlsplit(self.proxy.target).netloc, timeout=20)
        kept = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
        talk.request(self.command, at.path + (f"?{at.query}" if at.query else ""), body or None, kept)
        answer = talk.getresponse()
        data = answer.read()
        talk.close()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _pass
