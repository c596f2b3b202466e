"""TensorBoard's event files, by its own library: a folder a run, a file a driver.

No step stands there twice: a file begins with the mark (SessionLog.START) by which TensorBoard drops what older files
have from that step on, and so does what follows an order that sent the run back. What is held lies beside the files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.tracking.writers import About, Written
from trainer.wire.files import write_file

HELD = "hotstage.json"
_NUMBERS = itertools.count()


class EventFile:
    """A new event file, by the library's records: its own writer has a thread, which prints what it fails with. What is
    added is written by ``flush``; OSError from that, and it goes on where it stopped.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        began = time.time()
        name = f"events.out.tfevents.{int(began):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._rest, self._records = bytearray(), RecordWriter(self)
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (open until close)
        self.add(Event(wall_time=began, file_version="brain.Event:2"))
        try:
            self.flush()
        except OSError:
            self._file.close()
            (folder / name).unlink()
            raise

    def add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def write(self, data: bytes) -> None:
        """Of the library's records: a file is what they write to."""
        self._rest += data

    def flush(self) -> None:
        while self._rest:
            del self._rest[: self._file.write(self._rest)]

    def close(self) -> None:
        with self._file:
            self.flush()


class TensorBoardWriter:
    """``folder``: the one that TensorBoard is given (``--logdir``)."""

    name = "TensorBoard"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._files: EventFile | None = None
        self._run = self.folder

    def begin(self, about: About, held: Written | None) -> Written:
        with contextlib.suppress(OSError):  # of a disk that was full: what is not held is told again
            self._close()
        self._run = self.folder / about.run
        own = self._held()
        fresh = own is None
        own = own or Written(about.born, begins=about.born)
        if own.branch != about.branch and not fresh:
            own = Written(min(own.step, about.begins), about.branch, own.begins, _upto(own.done, about.begins))
        own.branch = about.branch
        self._files = EventFile(self._run)
        self._mark(own.step + 1)
        if fresh:
            self.text(about.born, time.time(), "run", _words(about))
        return own

    def numbers(self, step: int, time: float, values: Mapping[str, float], *, late: bool = False) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(wall_time=time, step=step, summary=Summary(value=found)))

    def text(self, step: int, time: float, name: str, text: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary import text_pb

        self._add(Event(wall_time=time, step=step, summary=text_pb(name, text)))

    def flush(self, held: Written) -> None:
        assert self._files is not None
        self._files.flush()
        write_file(self._run / HELD, json.dumps(held.to_map()).encode())

    def end(self, outcome: str) -> None:
        self._close()

    def _mark(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        started = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step, session_log=started))

    def _add(self, event: Any) -> None:
        assert self._files is not None
        self._files.add(event)

    def _held(self) -> Written | None:
        try:
            return Written.of_map(json.loads((self._run / HELD).read_text()))
        except (OSError, ValueError):
            return None

    def _close(self) -> None:
        files, self._files = self._files, None
        if files is not None:
            files.close()


def _upto(done: Mapping[str, list[str]], step: int) -> dict[str, list[str]]:
    return {key: names for key, names in done.items() if int(key.partition("-")[0]) <= step}


def _words(about: About) -> str:
    parent = f"\n\nA fork of `{about.parent[0]}` at step {about.parent[1]}." if about.parent else ""
    return f"`{about.run}` in `{about.store}`: `hotstage runs show {about.run}`.{parent}"
