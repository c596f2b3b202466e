"""Writes down each call of some functions, in every process of Python that finds this folder on its path.

``WALK_STATIONS``: a JSON list of [end of a file's path, qualified name]; ``WALK_OUT``: a file that gets a JSON line a
call: when it was called and returned, the types of what it took and gave, and both as text.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

TEXT = 4000
STATIONS = {name: path for path, name in json.loads(os.environ.get("WALK_STATIONS", "[]"))}


def station_of(code: CodeType) -> bool:
    path = STATIONS.get(code.co_qualname)
    return path is not None and code.co_filename.endswith(path)


def on_call(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
    code = frame.f_code
    if code.co_name not in NAMES or not station_of(code):
        return None
    called = time.time()
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    takes = [frame.f_locals[name] for name in names if name != "self"]
    frame.f_trace_lines = False

    def on_return(_: FrameType, event: str, gives: Any) -> None:
        if event == "return":
            line = {
                "station": code.co_qualname,
                "called": called,
                "returned": time.time(),
                "takes": [type(value).__name__ for value in takes],
                "gives": type(gives[0] if isinstance(gives, tuple) else gives).__name__,
                "text": repr((takes, gives))[:TEXT],
            }
            with open(os.environ["WALK_OUT"], "ab", buffering=0) as out:
                out.write(json.dumps(line).encode() + b"\n")

    return on_return


if STATIONS:
    NAMES = {name.rpartition(".")[2] for name in STATIONS}
    threading.settrace(on_call)
    sys.settrace(on_call)
