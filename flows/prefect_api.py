"""The one place that talks to Prefect's API from inside a run: artifacts, and a server of one's own.

Whatever Prefect answers, a run goes on: failures here are logged once and counted, never raised into the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

log = logging.getLogger(__name__)


def artifact_key(text: str) -> str:
    """Prefect takes lower-case letters, digits and dashes in an artifact's key."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@dataclass
class Artifacts:
    """Progress, markdown and table artifacts of the flow run in whose context it is called."""

    failures: int = 0
    _progress: dict[str, UUID] = field(default_factory=dict)

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever Prefect's client raises: it must not reach the run
            self.failures += 1
            if self.failures == 1:
                log.warning("Prefect does not take the %s (%s: %s); the run goes on", what, type(error).__name__, error)

    def progress(self, key: str, percent: float, text: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        with self._guard("progress"):
            known = self._progress.get(key)
            if known is None:
                made: Any = create_progress_artifact(progress=percent, key=artifact_key(key), description=text)
                self._progress[key] = made
            else:
                update_progress_artifact(known, progress=percent, description=text)

    def markdown(self, key: str, text: str) -> None:
        from prefect.artifacts import create_markdown_artifact

        with self._guard("markdown"):
            create_markdown_artifact(text, key=artifact_key(key))

    def table(self, key: str, rows: list[dict[str, Any]]) -> None:
        from prefect.artifacts import create_table_artifact

        with self._guard("table"):
            create_table_artifact(rows, key=artifact_key(key))


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """True where a Prefect API answers at this URL (…/api)."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def free_port() -> int:
    """A free port of loopback, by asking the system for one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class PrefectServer:
    """A Prefect server of one's own on loopback, with its embedded database under ``home``.

    ``start()`` returns at once; ``wait()`` until it answers. ``stop()`` ends it by process id.
    """

    home: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What a client process needs to find this server."""
        return {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLI_PROMPT": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        env = {**os.environ, **self.environment(), "PREFECT_SERVER_API_HOST": "127.0.0.1"}
        env.pop("PREFECT_API_URL", None)
        args = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.home / "server.log", "ab") as out:
            self.process = subprocess.Popen(
                [*args, "--no-services"] if os.environ.get("HOTSTAGE_PREFECT_NO_SERVICES") else args,
                env=env,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 90.0) -> bool:
        """True once it answers; False where it died or did not in time (its log is ``home/server.log``)."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                return False
            if answers(self.api, 1.0):
                return True
            time.sleep(0.1)
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
