"""What the command writes to: streams that take every text, and say so when nobody can take it any more.

A terminal or a file may know fewer characters than our texts (Latin-1, ASCII): dashes, dots and arrows are written with
what it has, other characters as ``?``. A stream that was closed becomes /dev/null. Where writing fails (the reader has
gone, the disk is full) ``OutputLost`` ends the command: it is no bug, and a pipe that closes is no news either. But
nothing that is driven ends because of a full disk: from ``go_on`` on such lines are lost, and the exit code says so.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import io
import os
import signal
import stat
import sys
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

from trainer.errors import TrainerError

_ERRORS, _ASCII = "hotstage-terminal", "hotstage-ascii"
_PLAIN = {
    "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "·": ".", "•": "*",
    "‘": "'", "’": "'", "“": '"', "”": '"', "µ": "u", "≈": "~", "°": "deg",
    "│": "|", "─": "-", "█": "#", "▌": "#", "░": ".", "▒": ":", "▓": "#", "✓": "ok", "✗": "x",
}  # fmt: skip
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
"""Names of files may hold them; line ends and tabs are ours."""
PIPE_CLOSED = 141
HUNG_UP = 128 + signal.SIGHUP


class OutputLost(TrainerError):
    """Standard output cannot be written any more. ``gone``: nobody is there who would read it."""

    def __init__(self, error: OSError) -> None:
        closed = error.errno == errno.EIO and _is_device()  # a terminal: its SIGHUP comes a moment later
        self.gone = closed or error.errno in (errno.EPIPE, errno.EBADF)
        self.exit_code = HUNG_UP if closed else PIPE_CLOSED if self.gone else 78
        text = f"standard output cannot be written: {error.strerror}; free space, or write it elsewhere"
        super().__init__("" if self.gone else text)


class _Out(io.FileIO):
    """A descriptor of ours whose failure is told apart from that of any other file."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            found = OutputLost(error)
            if not _work.goes_on or found.gone:
                raise found from error
            first, _work.lost = _work.lost is None, found
            if first and self.fileno() == 1:
                tell(f"hotstage: {found}; the work goes on", event="error")
            return len(data)


@dataclass
class _Work:
    """``goes_on``: whatever happens to the output; ``lost``: what happened to it last; ``in_json``: what is told."""

    goes_on: bool = False
    lost: OutputLost | None = None
    in_json: bool = False


_work = _Work()


def go_on() -> None:
    """From here on this process drives something: that does not end because its lines find a disk that is full."""
    _work.goes_on = True


def speak_json(wanted: bool) -> None:
    """Whether this command was asked for JSON: then each line that it tells is an object of JSON."""
    _work.in_json = wanted


def speaks_json() -> bool:
    return _work.in_json


def _is_device() -> bool:
    """Whether standard output is a terminal, which answers EIO from when it was closed."""
    with contextlib.suppress(OSError):
        return stat.S_ISCHR(os.fstat(1).st_mode)
    return False


def prepare_streams() -> None:
    """Make the standard streams fit for what follows; once, before anything is written."""
    register()
    for number in (0, 1, 2):  # a file that is opened later must not become one of these
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def register() -> str:
    """Make our way to write what an encoding lacks known; its name, for ``errors=``."""
    codecs.register_error(_ERRORS, _instead)
    codecs.register(_codec)
    return _ERRORS


def finish(code: int) -> int:
    """Write out what is left of standard output; the exit code, which is another one where that fails."""
    try:
        sys.stdout.flush()
    except OutputLost as error:
        code = lost(error)
    except (OSError, ValueError):
        pass
    try:
        sys.stderr.flush()
    except (OutputLost, OSError, ValueError):
        _silence(2)
    if _work.lost is not None and code == 0:
        code = _work.lost.exit_code
    return code


def end(code: int) -> NoReturn:
    """End the process with this code, as Python does. But where a daemon thread works (the one of Prefect's page waits
    for a server that does not answer), without Python's own end: that throws such a thread out of whatever it does, and
    out of Rust or C++ it ends in an abort, and in another code.
    """
    code = finish(code)
    if any(thread.daemon for thread in threading.enumerate()):
        threading._shutdown()  # type: ignore[attr-defined]  # others are waited for, as ever
        atexit._run_exitfuncs()
        os._exit(finish(code))
    sys.exit(code)


def lost(error: OutputLost) -> int:
    """Say it where there is something to say, and let the interpreter end in peace; the exit code."""
    _silence(1)
    if str(error):
        tell(f"hotstage: {error}", event="error", exit_code=error.exit_code)
    return error.exit_code


def _silence(number: int) -> None:
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), number)


def tell(text: str, *, event: str = "line", **facts: Any) -> None:
    """A line on standard error, where that can be written; controls of a terminal are written as ``\\x1b``. Of JSON
    where that was asked for: then with what kind of line it is, and the facts.
    """
    if _work.in_json:
        from flows.show.lines import json_line

        text = json_line({"event": event, "text": text, **facts})
    try:
        sys.stderr.write(text.translate(_CONTROLS) + "\n")
        sys.stderr.flush()
    except (OutputLost, OSError, ValueError):
        pass


def _stream(stream: Any, number: int) -> Any:
    """The stream with our way to write what it cannot; the same object where it is not the process's own."""
    if stream is None:
        return open(number, "w", encoding="utf-8", closefd=False)
    try:
        if stream.fileno() != number:
            return stream
    except (AttributeError, OSError, ValueError):
        return stream
    encoding = _ASCII if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding
    raw = _Out(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=_ERRORS, line_buffering=number == 2 or stream.line_buffering
    )


def _instead(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for characters that the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff" and not error.encoding.replace("_", "-").startswith(("utf-16", "utf-32")):
        return bytes([ord(letter) & 0xFF]), error.start + 1  # a byte of a name that was no text: as it was
    return _PLAIN.get(letter, "?"), error.start + 1


def _codec(name: str) -> codecs.CodecInfo | None:
    """ASCII under a name of ours: click writes UTF-8 to what it knows as ASCII."""
    if name.replace("_", "-") != _ASCII:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        name=_ASCII,
        encode=ascii_codec.encode,
        decode=ascii_codec.decode,
        incrementalencoder=ascii_codec.incrementalencoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        streamreader=ascii_codec.streamreader,
        streamwriter=ascii_codec.streamwriter,
    )
