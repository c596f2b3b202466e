"""The real command, driver, agents and engines through KubernetesLauncher: one run, and every kind of loss on its way.

The cluster is the API server of this process with kubelets that make pods out of processes; ``tests/cluster`` has the
same on a real one.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from tests.k8s.api_server import ApiServer
from tests.k8s.conftest import STEPS
from tests.k8s.kubelet import Kubelet, Pod
from tests.k8s.test_watch import until
from tests.support.chaos import caught, rank_pid, rank_step
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


def held(pod: Pod, step: int) -> AbstractContextManager[object]:
    """The gang stands still inside the block once rank 0, which is the pod's, is at this step."""
    return caught(pod.folder, lambda: (rank_step(pod.folder, 0) or 0) >= step, f"step {step}", step=step)


def test_a_run_through_every_loss_ends_with_the_bits_of_the_local_one(
    place: Place, server: ApiServer, kubelet: Kubelet, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    driver = train(place)
    until(lambda: len([p for p in kubelet.pods.values() if p.engine]) == 2, "two pods", 60.0)
    first = kubelet.of(0)

    # a rank dies: again in place, no pod made anew
    with held(first, 8):
        pid = rank_pid(kubelet.of(1).folder, 3)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    # the driver dies, and another one adopts what runs
    with held(first, 16):
        assert (len(kubelet.pods), len(log_of(place, run).attempts)) == (2, 2)
        driver.kill()
        driver.wait()
        # the API server is away meanwhile: that alone changes nothing
        for kind in ("list", "watch", "get", "write"):
            server.storms[kind] = (503, "away")
        asked = sum(server.requests.values())
        driver = train(place)
        until(lambda: sum(server.requests.values()) > asked, "the second driver to ask")
    with held(first, 24):
        server.storms.clear()
        assert (len(kubelet.pods), len(log_of(place, run).attempts)) == (2, 2)

        # a pod is told to go: its gang saves, and the next attempt is in a new launch
        leaves, old = kubelet.of(1), rank_pid(first.folder, 0)
        kubelet.delete(leaves)
        until(lambda: "asked to stop" in (leaves.folder / "engine.log").read_text(), "its engine to hear of it")
    assert old is not None

    def again() -> bool:
        attempts = log_of(place, run).attempts
        pods = {p.index: p for p in kubelet.pods.values() if p.job != first.job and p.engine is not None}
        return len(pods) == 2 and (rank_step(pods[0].folder, 0) or 0) >= attempts[-1].step + 4

    # a machine goes, with everything on it
    with caught(first.folder.parent, again, "the third attempt", 120, but=[old]):
        state = log_of(place, run)
        assert state.attempts[2].launch == f"{run}-k2"
        assert state.attempts[2].body["cause"]["class"] == "preempted"
        assert "state saved" in state.attempts[2].body["cause"]["text"]
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
    with held(kubelet.of(0), 8):
        driver.send_signal(signal.SIGINT)
        done = finish(driver)
        step = rank_step(kubelet.of(0).folder, 0)
    assert done.code == 85, done.err
    left = json.loads(done.out)
    assert (left["outcome"], left["reason"]) == ("stopped", "the gang trains on")
    assert "detaching: the gang trains on in the cluster" in done.err
    assert f"`hotstage runs resume {run}` attaches again, `hotstage runs cancel {run}` ends it" in done.err
    assert "saves" not in done.err
    assert step is not None
    with held(kubelet.of(0), step + 8):
        again = train(place)
    done = finish(again, 120.0)
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
