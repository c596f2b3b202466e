"""What every test may count on, however the test command itself was started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support.leftover import expect_none, newest_process

# nothing of the tests leaves the machine: what looks for a dataset on a hub is told so at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# else NumPy's products have a thread a core in each process of the tests, which look for work with whole cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# a shell that runs its commands in the background has them ignore Ctrl-C, and so would every process of the tests
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _heard() -> tuple[object, ...]:
    """What this process does about Ctrl-C and SIGTERM; a process that it starts inherits what is ignored or blocked."""
    return (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    )


@pytest.fixture(autouse=True)
def _signals_are_heard_after_a_test() -> Iterator[None]:
    before = _heard()
    yield
    assert _heard() == before


@pytest.fixture(autouse=True)
def _nothing_of_a_test_lives_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test and its fixtures are through, no engine and no agent works in its folder any more."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    before = newest_process()
    yield
    if folder is not None and newest_process() != before:
        expect_none(folder)


@pytest.fixture(autouse=True, scope="session")
def _nothing_of_the_tests_lives_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for what several tests share."""
    yield
    expect_none(tmp_path_factory.getbasetemp())
