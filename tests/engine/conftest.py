"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from tests.engine.kernel_lib import KernelLib, build


@pytest.fixture(scope="session")
def kernels() -> KernelLib:
    """The engine's kernels, built from the sources as they are now (kept while they do not change)."""
    return KernelLib(build())
