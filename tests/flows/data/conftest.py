"""A folder to work in, pieces of few bytes, and a real S3 server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.data import pieces
from flows.data.sources import base
from tests.checkpoint.conftest import server

__all__ = ["server"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pieces of so many bytes, and blocks of 40 characters."""
    monkeypatch.setattr(base, "BLOCK_LETTERS", 40)

    def set_size(size: int) -> None:
        monkeypatch.setattr(pieces, "MIB", size)

    return set_size


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c").mkdir()
    return tmp_path
