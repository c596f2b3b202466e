"""Attempts that run, of one node and of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoint.agent.started import Started, start


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Started]:
    with ExitStack() as stack:
        yield start(tmp_path, 1, stack)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Started]:
    with ExitStack() as stack:
        yield start(tmp_path, 2, stack)
