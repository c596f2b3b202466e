"""Debian's chromium, headless, driven by its own chromedriver over the W3C WebDriver protocol: plain JSON by HTTP.

Owns the two processes and their folder. Judges nothing; ``text()`` is what a person can read.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.prefect_server import free_port

NEEDED = ("chromium", "chromedriver")


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in NEEDED if shutil.which(name) is None]


@dataclass
class Browser:
    """``folder`` holds the profile and the logs. Every page is opened at ``width`` x ``height``."""

    folder: Path
    width: int = 1280
    height: int = 1000
    driver: subprocess.Popen[bytes] | None = None
    session: str = ""
    port: int = 0

    def start(self) -> Browser:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        with open(self.folder / "chromedriver.log", "ab") as out:
            self.driver = subprocess.Popen(
                ["chromedriver", f"--port={self.port}"], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._wait_ready()
        args = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--force-prefers-reduced-motion",
            "--hide-scrollbars",
            f"--window-size={self.width},{self.height}",
            f"--user-data-dir={self.folder / 'profile'}",
        ]
        wants = {"browserName": "chrome", "goog:chromeOptions": {"args": args}}
        self.session = str(self._post("session", {"capabilities": {"alwaysMatch": wants}})["sessionId"])
        return self

    def stop(self) -> None:
        if self.driver is None:
            return
        if self.session:
            self._ask("DELETE", f"session/{self.session}")
        self.driver.terminate()
        self.driver.wait(20)

    # --- a page -------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._do("url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """What a JavaScript function body returns in the page."""
        return self._do("execute/sync", {"script": script, "args": list(args)})

    def text(self) -> str:
        """The page's visible text."""
        return str(self.run("return document.body ? document.body.innerText : ''"))

    def click(self, words: str) -> None:
        """Click the innermost visible element that says exactly these words."""
        found = self.run(
            "const want = arguments[0];"
            "const all = [...document.querySelectorAll('body *')]"
            ".filter(e => e.innerText && e.innerText.trim() === want && e.offsetParent !== null);"
            "if (!all.length) return false;"
            "const e = all[all.length - 1];"
            "e.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));"  # tabs listen to it
            "e.click(); return true",
            words,
        )
        assert found, f"nothing to click says {words!r}:\n{self.text()}"

    def wait_for(self, *words: str, seconds: float = 60) -> str:
        """Wait until the page's visible text has all of these; the text then."""
        return self.wait(lambda: all(w in self.text() for w in words), f"{words} on the page", seconds) or self.text()

    def wait(self, seen: Callable[[], Any], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not seen():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds:.0f} s for {what}; the page says:\n{self.text()}")
            time.sleep(0.2)

    def size(self, width: int, height: int) -> None:
        self._do("window/rect", {"width": width, "height": height})

    def screenshot(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._ask("GET", f"session/{self.session}/screenshot")))
        return path

    # --- the protocol -------------------------------------------------------------------------------------

    def _do(self, command: str, body: dict[str, Any]) -> Any:
        return self._post(f"session/{self.session}/{command}", body)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the browser refuses {path}: {error.read().decode()[:2000]}") from None

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if self._ask("GET", "status")["ready"]:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "chromedriver.log").read_text()[-2000:])
