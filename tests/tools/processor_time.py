"""What the tests take of the processors, by file: ``make test PYTEST="-p tests.tools.processor_time"``.

``make test`` may take so many minutes on two cores that are both busy, so what counts is not how long a test waits but
what it and the processes that it started and waited for computed. A fixture of several tests counts for the first.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator

import pytest

SHOWN = 60
NAME = "processor seconds"
_seen = [0.0]


def _spent() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def pytest_collection_finish() -> None:
    _seen[0] = _spent()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    now = _spent()
    report.user_properties.append((NAME, now - _seen[0]))
    _seen[0] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    by_file: dict[str, float] = defaultdict(float)
    by_test: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent = sum(float(str(value)) for name, value in report.user_properties if name == NAME)
                by_file[report.nodeid.partition("::")[0]] += spent
                by_test[report.nodeid] += spent
    for what, table in (("file", by_file), ("test", by_test)):
        terminalreporter.section(f"processor seconds by {what}, {sum(table.values()):.0f} in all")
        for name, seconds in sorted(table.items(), key=lambda row: -row[1])[:SHOWN]:
            terminalreporter.line(f"{seconds:8.1f} s  {name}")
