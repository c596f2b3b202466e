"""The real command, driver, agents and engines through KubernetesLauncher: one run, and every kind of loss on its way.

The cluster is the API server of this process with kubelets that make pods out of processes; ``tests/cluster`` has the
same on a real one.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from tests.k8s.api_server import ApiServer
from tests.k8s.conftest import STEPS
from tests.k8s.kubelet import Kubelet, Pod
from tests.k8s.test_watch import until
from tests.support.chaos import rank_pid, rank_step
from tests.support.place import Place, finish

SETS = [
    *("--set", "launch.target=kubernetes", "--set", "launch.nodes=2", "--set", "parallel.stages=4"),
    *("--set", "launch.namespace=train"),
]


@pytest.fixture
def kubelet(server: ApiServer, place: Place) -> Iterator[Kubelet]:
    with Kubelet(server, place.folder / "pods") as made:
        yield made


def train(place: Place) -> Any:
    return place.start("train", "spec.toml", "--no-prefect", "--json", *SETS)


def log_of(place: Place, run: str) -> Any:
    return RunLog(open_store(f"file://{place.folder}/store"), run).fold()


def reached(pod: Pod, rank: int, step: int) -> None:
    until(lambda: (rank_step(pod.folder, rank) or 0) >= step, f"step {step} on rank {rank}", 60.0)


def test_a_run_through_every_loss_ends_with_the_bits_of_the_local_one(
    place: Place, server: ApiServer, kubelet: Kubelet, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    driver = train(place)
    until(lambda: len([p for p in kubelet.pods.values() if p.engine]) == 2, "two pods", 60.0)
    first = kubelet.of(0)
    reached(first, 0, 8)

    # a rank dies: again in place, no pod made anew
    pid = rank_pid(kubelet.of(1).folder, 3)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(log_of(place, run).attempts) == 2, "the second attempt")
    reached(first, 0, 16)
    assert len(kubelet.pods) == 2

    # the driver dies, and another one adopts what runs
    driver.kill()
    driver.wait()
    driver = train(place)
    # the API server is away meanwhile: that alone changes nothing
    for kind in ("list", "watch", "get", "write"):
        server.storms[kind] = (503, "away")
    reached(first, 0, 24)
    server.storms.clear()
    assert (len(kubelet.pods), len(log_of(place, run).attempts)) == (2, 2)

    # a pod is told to go: its gang saves, and the next attempt is in a new launch
    kubelet.delete(kubelet.of(1))
    until(lambda: len(log_of(place, run).attempts) == 3, "the third attempt", 60.0)
    state = log_of(place, run)
    assert state.attempts[2].launch == f"{run}-k2"
    assert state.attempts[2].body["cause"]["class"] == "preempted"
    assert "state saved" in state.attempts[2].body["cause"]["text"]
    until(
        lambda: sum(p.job != first.job and p.engine is not None for p in kubelet.pods.values()) == 2, "its pods", 60.0
    )
    second = kubelet.of(0)
    reached(second, 0, state.attempts[2].step + 4)

    # a machine goes, with everything on it
    lost = kubelet.of(1)
    kubelet.kill(lost)
    server.remove(lost.collection, lost.name)
    until(lambda: len(log_of(place, run).attempts) == 4, "the fourth attempt", 60.0)

    done = finish(driver, 120.0)
    result = json.loads(done.out)
    assert (result["outcome"], result["step"], result["attempts"]) == ("succeeded", STEPS, 4), done.err
    assert result["state_digest"] == digest
    state = log_of(place, run)
    assert [a.launch[-2:] for a in state.attempts] == ["k1", "k1", "k2", "k3"]
    assert [(a.body["cause"] or {}).get("class") for a in state.attempts] == [None, "signal", "preempted", "infra"]
    assert state.attempts[3].body["cause"]["place"] == "machine-1"
    until(lambda: not server.named("secrets") or set(server.named("jobs")) == {f"{run}-k3"}, "old launches to go")


def test_ctrl_c_detaches_and_the_same_command_attaches(
    place: Place, kubelet: Kubelet, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    driver = train(place)
    until(lambda: len([p for p in kubelet.pods.values() if p.engine]) == 2, "two pods", 60.0)
    reached(kubelet.of(0), 0, 8)
    driver.send_signal(signal.SIGINT)
    done = finish(driver)
    assert done.code == 85, done.err
    left = json.loads(done.out)
    assert (left["outcome"], left["reason"]) == ("stopped", "the gang trains on")
    assert "detaching: the gang trains on in the cluster" in done.err
    assert f"`hotstage runs resume {run}` attaches again, `hotstage runs cancel {run}` ends it" in done.err
    assert "saves" not in done.err
    step = rank_step(kubelet.of(0).folder, 0)
    assert step is not None
    reached(kubelet.of(0), 0, step + 8)
    done = finish(train(place), 120.0)
    result = json.loads(done.out)
    assert (result["outcome"], result["attempts"], result["state_digest"]) == ("succeeded", 1, digest), done.err


def test_what_can_never_start_is_refused_with_the_mend(place: Place, server: ApiServer) -> None:
    driver = train(place)
    until(lambda: server.named("services"), "the launch", 60.0)
    (job,) = server.named("jobs").values()
    waiting = {"state": {"waiting": {"reason": "ErrImageNeverPull", "message": "image is not present"}}}
    server.make_pods(
        "train",
        job,
        phase="Pending",
        containerStatuses=[],
        initContainerStatuses=[{"name": "agent", "restartCount": 0, **waiting}],
    )
    done = finish(driver)
    assert done.code == 78, done.err
    assert "ErrImageNeverPull" in done.err or "ErrImageNeverPull" in done.out
    assert server.named("jobs") == {}
