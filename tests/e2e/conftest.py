"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.leftover import expect_none
from tests.support.place import LONG, SPEC, Place
from tests.support.undisturbed import undisturbed_run


def spec_of(request: pytest.FixtureRequest) -> str:
    """Of the test's place: with ``long_run`` one of many steps, since a fast machine would be through the few of the
    other one before the test has acted."""
    return LONG if request.node.get_closest_marker("long_run") else SPEC


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A fresh place; nothing of it runs afterwards, and what the end of a run should have ended has ended by itself."""
    made = Place(tmp_path / "p", spec_of(request))
    try:
        yield made
        expect_none(made.folder, of_ended=True)
    finally:
        made.stop_all()


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the place's spec on one stage, without a fault."""
    _, run, digest = undisturbed_run(tmp_path_factory, spec_of(request))
    return run, digest
