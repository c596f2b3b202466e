"""Limits of a store's requests: the thread's deadline, the bandwidth cap, and how slowly a peer may move bytes."""

from __future__ import annotations

import math
import threading

import pytest
from greenlet import getcurrent, greenlet

from checkpoint.store.limits import LEAST_RATE, Progress, Rate, deadline, until


class Clock:
    """Time that passes where it is slept, or said."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_deadlines_nest_and_are_of_a_thread() -> None:
    seen: list[float] = []
    with until(50.0):
        with until(70.0):
            assert deadline() == 50.0
            thread = threading.Thread(target=lambda: seen.append(deadline()))
            thread.start()
            thread.join()
        with until(20.0):
            assert deadline() == 20.0
        assert deadline() == 50.0
    assert seen == [math.inf]
    assert deadline() == math.inf


def test_a_deadline_is_of_a_greenlet_and_leaves_nothing_behind() -> None:
    """The simulated threads of tests/support/protocol are greenlets of one thread, which do not end in order."""
    seen: list[float] = []

    def work(at: float) -> None:
        with until(at):
            getcurrent().parent.switch()
            seen.append(deadline())

    first, second = greenlet(work), greenlet(work)
    first.switch(50.0)
    second.switch(70.0)
    first.switch()
    second.switch()
    assert seen == [50.0, 70.0]
    assert deadline() == math.inf


def test_a_cap_holds_over_all_that_leaves() -> None:
    clock = Clock()
    rate = Rate(10e6, clock=clock, sleep=clock.sleep)
    waited = [rate.take(1 << 20) for _ in range(50)]
    assert waited[0] == 0.0
    assert clock.now - 100.0 == pytest.approx(49 * (1 << 20) / 10e6)
    clock.now += 1000.0  # nothing is saved up
    assert rate.take(10_000_000) == 0.0
    assert rate.take(1) == pytest.approx(1.0)


def test_a_cap_holds_over_threads() -> None:
    """Whoever comes waits behind what others took, whether or not they have sent it yet."""
    clock, slept = Clock(), []
    rate = Rate(1e6, clock=clock, sleep=slept.append)
    threads = [threading.Thread(target=rate.take, args=(500_000,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == pytest.approx([0.5 * n for n in range(1, 8)])


def test_a_cap_that_leaves_no_time_ends_the_request_at_once() -> None:
    clock = Clock()
    rate = Rate(1e6, clock=clock, sleep=clock.sleep)
    rate.take(10_000_000)
    with until(105.0), pytest.raises(TimeoutError, match="cap of 1 MB/s leaves it no time"):
        rate.take(1)
    assert clock.now == 100.0


def test_a_peer_that_drips_counts_as_lost() -> None:
    clock = Clock()
    progress = Progress(30.0, clock)
    for _ in range(30):
        clock.now += 1.0
        progress.moved(1)
    clock.now += 0.1
    with pytest.raises(TimeoutError, match=r"31 bytes in 30\.1 s.*counts as lost"):
        progress.moved(1)


def test_a_slow_peer_that_keeps_the_least_rate_is_waited_for() -> None:
    clock = Clock()
    progress = Progress(30.0, clock)
    for _ in range(1000):
        clock.now += 1.0
        progress.moved(LEAST_RATE)
    progress.moved(0, 0.0)
    clock.now += 500.0
    progress.moved(0, 500.0)  # our own cap made it wait


def test_moving_bytes_end_at_the_deadline() -> None:
    clock = Clock()
    with until(110.0):
        progress = Progress(30.0, clock)
    clock.now = 109.0
    progress.moved(1 << 20)
    clock.now = 110.0
    with pytest.raises(TimeoutError, match="deadline passed"):
        progress.moved(1 << 20)
