"""The command's log is a line a record, whatever a message holds: words for a person, JSON for a program."""

from __future__ import annotations

import importlib
import io
import json
import logging
import sys

import pytest

from flows.cli import terminal

main = importlib.import_module("flows.cli.main")  # flows.cli itself names its function main
MESSAGES = ['a "quoted" name', "back\\slash", "two\nlines\r\tand a tab", "\x00\x1b[31m", "ümlaut … 漢字", "\ud83d half"]


def line_of(message: str) -> str:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(main.LogLines())
    try:
        raise ValueError(message)
    except ValueError:
        record = logging.LogRecord("a.b", logging.WARNING, "x.py", 1, "said %s", (message,), sys.exc_info())
    handler.handle(record)
    (line,) = out.getvalue().removesuffix("\n").split("\n")
    return line


@pytest.mark.parametrize("pod", [False, True])
@pytest.mark.parametrize("message", MESSAGES, ids=ascii)
def test_a_line_is_json_for_a_program(message: str, pod: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_work", terminal._Work(in_json=not pod))
    if pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    told = json.loads(line_of(message))
    assert (told["level"], told["logger"], told["event"]) == ("WARNING", "a.b", f"said {message}")
    assert "ValueError" in told["trace"]


@pytest.mark.parametrize("message", MESSAGES, ids=ascii)
def test_a_line_is_words_for_a_person(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_work", terminal._Work())
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    line = line_of(message)
    assert line.startswith("WARNING: said ")
    assert line.isprintable()
