"""Workers that want digests at the same time get each its own."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint.agent.send import Hashing
from checkpoint.chunks import ChunkPlan, Digests, Segment, chunk_digests
from checkpoint.digest import BLOCK_ELEMENTS
from tests.support.wait import wait_for


def chunk(index: int, elements: int) -> tuple[ChunkPlan, memoryview]:
    segments = (Segment(index, 0, 0, elements, 0), Segment(index, 1, 0, 3, 4 * elements))
    return ChunkPlan(index, segments), memoryview(random.Random(index).randbytes(4 * elements + 12))


@pytest.mark.parametrize("threads", [1, 2])
def test_each_worker_gets_its_own(threads: int) -> None:
    hashing, together = Hashing(threads), threading.Barrier(4)
    chunks = [chunk(index, 1000 + BLOCK_ELEMENTS * (index % 3)) for index in range(24)]

    def wanted(at: int) -> Digests:
        together.wait(60)
        return hashing.digests(*chunks[at])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wanted, range(24))) == [chunk_digests(*own) for own in chunks]


def test_of_two_at_once_each_is_told_its_own_failure_and_the_next_is_hashed() -> None:
    hashing, (plan, view) = Hashing(0), chunk(0, 1000)
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(hashing.digests, plan, view[:8]), pool.submit(hashing.digests, plan, view)
        wait_for(lambda: len(hashing._waiting) == 2, "both to wait")
        with hashing._changed:
            hashing._idle = 1
            hashing._changed.notify_all()
        with pytest.raises(ValueError, match="its plan says 4012"):
            bad.result()
        assert good.result() == chunk_digests(plan, view)
    assert hashing.digests(plan, view) == chunk_digests(plan, view)
