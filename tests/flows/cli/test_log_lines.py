"""The command's log is JSON, a line a record, whatever a message holds."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from flows.cli.main import JsonLines

MESSAGES = ['a "quoted" name', "back\\slash", "two\nlines\r\tand a tab", "\x00\x1b[31m", "ümlaut … 漢字", "\ud83d half"]


@pytest.mark.parametrize("message", MESSAGES, ids=ascii)
def test_a_line_is_json(message: str) -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    try:
        raise ValueError(message)
    except ValueError:
        record = logging.LogRecord("a.b", logging.WARNING, "x.py", 1, "said %s", (message,), sys.exc_info())
    handler.handle(record)
    (line,) = out.getvalue().removesuffix("\n").split("\n")
    told = json.loads(line)
    assert (told["level"], told["logger"], told["event"]) == ("WARNING", "a.b", f"said {message}")
    assert "ValueError" in told["trace"]
