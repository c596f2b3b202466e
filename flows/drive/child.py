"""A process of the driver's beside training: below everybody else's priority, heard of without waiting, ended whole.

Its output goes to a file, its standard input is a pipe of this process: where it is to end with its driver it watches
for the end of that (``--with-parent``). It has a session of its own, so that a Ctrl-C at the terminal is the driver's,
and ``end`` is what follows from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.priority import set_session_nice

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 10.0
"""From the time that one is asked to leave until it is killed: it may have to end what it started in other sessions."""


@dataclass
class ChildProcess:
    """``begin`` starts one; ``ended`` tells its code once it has one, ``said`` then all that it wrote."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    until: float = float("inf")
    """Of the monotonic clock: one that has not ended by then is asked to, and killed `GRACE_S` later."""
    _asked: bool = False

    @classmethod
    def begin(cls, command: Sequence[str], *, most_s: float = float("inf"), low: bool = True) -> ChildProcess:
        """``low``: below everybody else's priority."""
        nice = shutil.which("nice") if low else None
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        output = tempfile.TemporaryFile()  # noqa: SIM115 (it is read when the process has ended)
        process = subprocess.Popen(
            [*([nice, "-n", "19"] if nice else []), *command],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        if low:
            set_session_nice(process.pid, 19)
        return cls(process, output, time.monotonic() + most_s)

    def ended(self) -> int | None:
        """Its code; None while it works."""
        late = time.monotonic() - self.until
        if late > 0 and not self._asked:
            self._asked = True
            self._ask()
        if late > GRACE_S:
            self.kill()
        return self.process.poll()

    def said(self) -> str:
        """All that it wrote, once it has ended; nothing can be read after that."""
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self._close()
        return text

    def end(self) -> None:
        """Ask it to leave; nothing is waited for."""
        self._ask()
        self._close()

    def _ask(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """It and whatever it started in its session's group."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _close(self) -> None:
        self.output.close()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
