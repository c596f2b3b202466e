"""A store that no run is in yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path / 'store'}")
