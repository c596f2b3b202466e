"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.leftover import expect_none
from tests.support.place import LONG, SPEC, Place
from tests.support.undisturbed import undisturbed_run


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A fresh place; nothing of it runs afterwards, and what the end of a run should have ended has ended by itself."""
    yield from _place(tmp_path, SPEC)


@pytest.fixture
def long_place(tmp_path: Path) -> Iterator[Place]:
    """The same, its spec with more steps."""
    yield from _place(tmp_path, LONG)


def _place(tmp_path: Path, spec: str) -> Iterator[Place]:
    made = Place(tmp_path / "p", spec)
    try:
        yield made
        expect_none(made.folder, of_ended=True)
    finally:
        made.stop_all()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the places' spec on one stage, without a fault."""
    _, run, digest = undisturbed_run(tmp_path_factory)
    return run, digest


@pytest.fixture(scope="session")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same of the long places' spec."""
    _, run, digest = undisturbed_run(tmp_path_factory, LONG)
    return run, digest
