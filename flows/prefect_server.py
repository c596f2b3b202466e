"""A Prefect server of one's own, on loopback, for as long as a command runs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any

LINES = 50
"""Of what a server says, kept to tell why it did not come up."""


def free_port() -> int:
    """A free port of loopback, by asking the system for one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class PrefectServer:
    """A Prefect server of one's own on loopback, with its embedded database under ``home`` (None: Prefect's own home).

    ``start()`` returns at once; ``wait()`` until it answers. ``stop()`` ends it by process id; where the process that
    started it is killed, it ends by itself.
    """

    home: Path | None
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """More of Prefect's settings for it, as environment variables."""
    _said: deque[bytes] = field(default_factory=lambda: deque(maxlen=LINES))
    """The newest lines of one without a log."""
    _keeper: threading.Thread | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What a client process needs to find this server."""
        return {
            **({"PREFECT_HOME": str(self.home)} if self.home else {}),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLI_PROMPT": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self) -> None:
        if self.home:
            self.home.mkdir(parents=True, exist_ok=True)
            self.log = self.log or self.home / "server.log"
        self.port = self.port or free_port()
        env = {
            **os.environ,
            **self.environment(),
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            # what the page asks: port 4200 where nothing is said, whatever the server's own port is
            "PREFECT_SERVER_UI_API_URL": self.api,
            "PREFECT_UI_API_URL": self.api,
            **self.settings,
        }
        env.pop("PREFECT_API_URL", None)
        # -P: what lies in the current folder is no module of Python's
        args = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        args += ["--port", str(self.port)]
        if os.environ.get("HOTSTAGE_PREFECT_NO_SERVICES"):
            args.append("--no-services")
        if shutil.which("setpriv"):  # util-linux: nobody's server does not outlive a killed command
            args = ["setpriv", "--pdeathsig", "TERM", *args]
        begun: Future[None] = Future()
        self._keeper = threading.Thread(target=self._keep, args=(args, env, begun), name="prefect-server", daemon=True)
        self._keeper.start()
        begun.result()

    def _keep(self, args: Sequence[str], env: Mapping[str, str], begun: Future[None]) -> None:
        """The kernel ends the server with the thread that has started it, not with the process: so that is one that
        goes on as long as the server does."""
        try:
            with contextlib.ExitStack() as stack:
                out: Any = stack.enter_context(open(self.log, "ab")) if self.log else subprocess.PIPE
                self.process = process = subprocess.Popen(
                    args, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
        except BaseException as error:
            begun.set_exception(error)
            return
        begun.set_result(None)
        if process.stdout is not None:
            with process.stdout as words:
                self._said.extend(words)
        process.wait()

    def why_not_up(self) -> str:
        """What to say of a server that did not come up: its folder, its database, or its last word; empty where nobody
        knows.
        """
        if self._keeper is not None and self.process is not None and self.process.poll() is not None:
            self._keeper.join(1.0)
        lines = self.log.read_bytes().splitlines()[-LINES:] if self.log and self.log.exists() else list(self._said)
        text = [line.decode(errors="replace").strip() for line in lines]
        error = next((line for line in reversed(text) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
        if "Can't locate revision" in error:
            return (
                f"; its database in {self._home()} was made by a newer Prefect than this one ({version('prefect')}): "
                "install that, or name another folder with PREFECT_HOME"
            )
        named = os.environ.get("SSL_CERT_FILE")
        if named and not os.path.isfile(named):
            return f"; SSL_CERT_FILE is {named!r}, and there is no such file: name one with certificates, or unset it"
        return self._no_home() or (f"; its last word: {re.sub(r'://[^/@ ]*@', '://', error)[:300]}" if error else "")

    def _home(self) -> str:
        return str(self.home) if self.home else os.environ.get("PREFECT_HOME") or os.path.expanduser("~/.prefect")

    def _no_home(self) -> str:
        """What to say where it has no folder to write to; empty where it has one."""
        named = self._home()
        there = Path(named).absolute()
        while not there.exists():
            there = there.parent
        if os.access(there, os.W_OK):
            return ""
        return f"; it keeps its data in {named}, which cannot be written: name another folder with PREFECT_HOME"

    def wait(self, timeout_s: float = 90.0) -> bool:
        """True once it answers; False where it died or did not in time (its log is ``home/server.log``)."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                return False
            if self.up():
                return True
            time.sleep(0.1)
        return False

    def up(self) -> bool:
        """True where it answers now."""
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=1.0) as reply:
                return bool(reply.status == 200)
        except (OSError, ValueError, HTTPException):
            return False

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
