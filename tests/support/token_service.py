"""A token service (STS) on loopback: gives credentials for a role to who shows the right web identity, or a key."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


class TokenService:
    """``identity``: the web identity token that it takes; ``gives``: the session token that it gives next."""

    def __init__(self) -> None:
        self.identity = "who-i-am"
        self.gives = "session-1"
        self.lives_s = 3600.0
        self.refuses: tuple[int, str] | None = None  # status and code of what it answers instead
        self.asked: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def token_service() -> Iterator[TokenService]:
    state = TokenService()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode())
            action = asked["Action"][0]
            state.asked.append(action)
            status, text = 200, self.credentials(action)
            wrong = action == "AssumeRoleWithWebIdentity" and asked["WebIdentityToken"] != [state.identity]
            refusal = state.refuses or ((400, "InvalidIdentityToken") if wrong else None)
            if refusal is not None:
                status, code = refusal
                text = f"<ErrorResponse><Error><Code>{code}</Code><Message>no</Message></Error></ErrorResponse>"
            self.send_response(status)
            self.send_header("Content-Type", "text/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def credentials(self, action: str) -> str:
            until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + state.lives_s))
            return (
                f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><Credentials>'
                f"<AccessKeyId>role-key</AccessKeyId><SecretAccessKey>role-secret</SecretAccessKey>"
                f"<SessionToken>{state.gives}</SessionToken><Expiration>{until}</Expiration></Credentials>"
                f"<AssumedRoleUser><Arn>arn:aws:sts::1:assumed-role/r/s</Arn><AssumedRoleId>i:s</AssumedRoleId>"
                f"</AssumedRoleUser></{action}Result></{action}Response>"
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
