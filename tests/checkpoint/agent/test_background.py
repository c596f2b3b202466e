"""Where the agent's threads run that hash and copy: on cores that no rank uses, where there are such."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from checkpoint.agent.background import Background, cores_in_use, spare
from checkpoint.agent.gang import Gang
from tests.support.agent_world import attempt_info


def gang_of(nodes: int = 1, **how: Any) -> Gang:
    """The first node's ranks, two of them."""
    parallel, launch = {"threads": how.get("threads", 0)}, {"target": how.get("target", "local")}
    info = attempt_info(1, nodes=nodes, how={"parallel": parallel, "launch": launch})
    return Gang(info, 0, info.ranks // nodes)


@pytest.mark.parametrize(
    ("cores", "used", "kept"),
    [(range(8), 6, [6, 7]), (range(8), 8, list(range(8))), (range(8), 9, list(range(8))), ([3, 9, 5], 1, [5, 9])],
)
def test_what_ranks_leave_is_kept_to(cores: Any, used: int, kept: list[int]) -> None:
    assert spare(cores, used) == kept
    assert spare(cores, 0) == sorted(cores)  # ranks take what there is: all of them


def test_local_nodes_share_a_machine_and_pods_do_not() -> None:
    ranks = gang_of(2).attempt.ranks
    assert cores_in_use(gang_of(2, threads=3)) == 3 * ranks
    assert cores_in_use(gang_of(2, threads=3, target="kubernetes")) == 3 * ranks // 2
    assert cores_in_use(gang_of(2)) == 0


def test_threads_go_where_they_are_told_also_those_that_come_later() -> None:
    there = sorted(os.sched_getaffinity(0))
    background = Background()

    def placed(_: int) -> tuple[set[int], int]:
        return os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    early, late = (ThreadPoolExecutor(1, initializer=background.enter) for _ in range(2))
    with early, late:
        assert early.submit(placed, 0).result() == (set(there), 10)
        background.beside(Gang(gang_of(threads=1, target="kubernetes").attempt, 0, 1))
        wanted = set(spare(there, 1))
        assert len(wanted) == max(1, len(there) - 1)
        assert early.submit(placed, 0).result()[0] == wanted
        assert late.submit(placed, 0).result()[0] == wanted
    assert os.sched_getaffinity(0) == set(there)  # nobody else's
