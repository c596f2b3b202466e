"""Fixtures of the tests on a device: they run as a stage of a session (stages.py), on a GPU or on the emulated library,
and are collected where they are named alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.kernel_lib import KernelLib
from tests.engine.kernel_lib import build as build_kernels
from tests.gpu.device_lib import DeviceLib


def _tell(**told: Any) -> None:
    """A line for under_pytest.py, which has what was told however this process ends."""
    named = os.environ.get("HOTSTAGE_GPU_TOLD")
    if named:
        with open(named, "a") as file:
            file.write(json.dumps(told) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    _tell(all=[item.name for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell(begun=nodeid.partition("::")[2])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    why = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    name = report.nodeid.partition("::")[2]
    _tell(name=name, when=report.when, outcome=report.outcome, seconds=report.duration, why=why[-1500:])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``HOTSTAGE_GPU_ONLY`` names a file with the names of the tests that are wanted, one a line."""
    named = os.environ.get("HOTSTAGE_GPU_ONLY")
    if named:
        wanted = set(Path(named).read_text().splitlines())
        items[:] = [item for item in items if item.name in wanted]


@pytest.fixture(scope="session")
def kernels() -> KernelLib:
    """The CPU's kernels: the oracle, and the bits."""
    return KernelLib(build_kernels(strict=False))


@pytest.fixture(scope="session")
def path() -> str:
    """The kernel path under test."""
    return os.environ.get("HOTSTAGE_GPU_PATH", "cuda-exact")


@pytest.fixture(scope="session")
def device(path: str) -> Iterator[DeviceLib]:
    arenas = {"few": 4 << 20, "one": 4 << 20, "one-large": 16 << 20}
    arena = arenas.get(os.environ.get("HOTSTAGE_GPU_CASES", "all"), 1 << 30)  # the largest case's operands
    way, library = Path(os.environ["HOTSTAGE_GPU_WAY"]), Path(os.environ["HOTSTAGE_CUDA"])
    lib = DeviceLib(way, library, path, arena=arena)
    yield lib
    lib.close()
