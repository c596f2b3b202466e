"""The table of faults on a real cluster: the diagnosis, the attempts, the lost steps, and always the same bits.

Each row goes to out/faults.json.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.gang import SPEC, STEPS, Gang, ended, gang, record, secret, send, step_of, until
from tests.support.place import Place
from tests.support.s3_server import S3Server


@pytest.fixture(scope="session")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state digest of the same What, trained on this machine without a fault."""
    place = Place(tmp_path_factory.mktemp("local") / "p", SPEC)
    try:
        result = place.train("launch.target=local", "launch.nodes=1", "parallel.stages=2")
    finally:
        place.stop_all()
    assert (result["outcome"], result["step"]) == ("succeeded", STEPS)
    return str(result["state_digest"])


@pytest.fixture
def one(cluster: Cluster, s3: S3Server, tmp_path: Path) -> Iterator[Gang]:
    with gang(cluster, tmp_path / "p", s3) as made:
        yield made


def causes(one: Gang) -> list[dict[str, Any]]:
    return [a.body["cause"] for a in one.state().attempts if a.body.get("cause")]


def finished(one: Gang, driver: Any, digest: str, fault: str, seconds: float = 150.0) -> dict[str, Any]:
    """The run has succeeded with the undisturbed run's bits; its row is written."""
    result = ended(driver, seconds)
    told = causes(one)
    record(fault, told[-1]["text"] if told else "", result, digest)
    assert (result["outcome"], result["step"]) == ("succeeded", STEPS), result
    assert result["state_digest"] == digest
    return result


@pytest.mark.parametrize(("nodes", "stages"), [(2, 4), (4, 4)])
def test_a_run_without_a_fault_has_the_bits_of_the_local_one(one: Gang, digest: str, nodes: int, stages: int) -> None:
    one.sets += [f"launch.nodes={nodes}", f"parallel.stages={stages}"]
    driver = one.start()
    one.reached(4)
    assert len({p["spec"]["nodeName"] for p in one.pods()}) == 2
    result = finished(one, driver, digest, f"none, {nodes} pods")
    assert result["attempts"] == 1


# --- what strikes while it trains -----------------------------------------------------------------------------


def rank_killed(one: Gang) -> None:
    send(one.rank(3), signal.SIGKILL)


def rank_crashed(one: Gang) -> None:
    send(one.rank(2), signal.SIGSEGV)


def pod_deleted(one: Gang) -> None:
    one.kubectl("delete", "pod", one.pod(1)["metadata"]["name"], "--wait=false")


def supervisor_killed(one: Gang) -> None:
    send(one.supervisor(1), signal.SIGKILL)


def supervisor_terminated(one: Gang) -> None:
    send(one.supervisor(1), signal.SIGTERM)


def agent_killed(one: Gang) -> None:
    send(one.agent(1), signal.SIGKILL)


def stage_stopped(one: Gang) -> None:
    send(one.rank(1), signal.SIGSTOP)


def pod_deleted_by_force(one: Gang) -> None:
    one.kubectl("delete", "pod", one.pod(1)["metadata"]["name"], "--wait=false", "--grace-period=0", "--force")


def store_away(one: Gang) -> None:
    one.s3.kill()
    time.sleep(10.0)  # how long it is away is the fault itself
    one.s3.restart()


def api_away(one: Gang) -> None:
    pid = one.rank(0)
    with one.cluster.away("apiserver"):
        step = step_of(pid)
        until(lambda: step_of(pid) > step + 8, "it to train on")
    one.cluster.until(lambda: bool(one.kubectl("get", "pods", check=False)), "the API server")


# fault -> what it does, class of its cause ("": no attempt is lost), whether a new launch is made
STRIKES: dict[str, tuple[Callable[[Gang], None], str, bool]] = {
    "rank killed (9)": (rank_killed, "signal", False),
    "rank crashed (11)": (rank_crashed, "signal", False),
    "pod deleted": (pod_deleted, "preempted", True),
    # its processes are asked to stop, with little time: the gang may save even so
    "pod deleted by force": (pod_deleted_by_force, "infra preempted", True),
    "supervisor killed": (supervisor_killed, "infra", True),
    "supervisor terminated (SIGTERM with grace)": (supervisor_terminated, "preempted", True),
    "agent killed": (agent_killed, "", False),
    "stage stopped (SIGSTOP)": (stage_stopped, "stall", False),
    "store down for 10 s": (store_away, "", False),
    "API server down": (api_away, "", False),
}


@pytest.mark.parametrize("fault", STRIKES)
def test_what_strikes_while_it_trains(one: Gang, digest: str, fault: str) -> None:
    strike, cls, anew = STRIKES[fault]
    driver = one.start()
    one.reached(20)
    strike(one)
    result = finished(one, driver, digest, fault)
    told = causes(one)
    assert len(told) == bool(cls), told
    assert all(c["class"] in cls.split() for c in told), told
    assert result["attempts"] == 1 + bool(cls)
    launches = [a.launch[-2:] for a in one.state().attempts]
    assert launches == (["k1", "k2"] if anew else ["k1"] * result["attempts"])


# --- drivers --------------------------------------------------------------------------------------------------


def test_a_driver_may_be_killed_at_any_state(one: Gang, digest: str) -> None:
    for seconds in (1.0, 3.0, 5.0):
        driver = one.start()
        time.sleep(seconds)  # the state in which it is killed is what these differ in
        driver.kill()
        driver.wait()
    driver = one.start()
    one.reached(20)
    driver.kill()
    driver.wait()
    result = finished(one, one.start(), digest, "driver killed in four states")
    assert result["attempts"] == 1
    assert len(one.jobs()) == 1


def test_two_drivers_are_as_good_as_one(one: Gang, digest: str) -> None:
    first, second = one.start(), one.start()
    one.reached(20)
    send(one.rank(0), signal.SIGKILL)
    result = finished(one, first, digest, "two drivers, and a rank killed")
    assert ended(second)["state_digest"] == digest
    assert result["attempts"] == 2


# --- what keeps it from starting ------------------------------------------------------------------------------


def test_an_image_that_is_nowhere(one: Gang, digest: str) -> None:
    patch = 'launch.pod_patch={ containers = [{ name = "engine", image = "nowhere:1", imagePullPolicy = "Never" }] }'
    one.sets.append(patch)
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78)
    assert "ErrImageNeverPull" in result["reason"]
    run = result["run"]
    again = one.place.start("runs", "resume", run, "--no-prefect", "--json", "--set", "launch.pod_patch={}")
    one.drivers.append(again)
    row = ended(again)
    record("image missing", result["reason"], row, digest)
    assert row["state_digest"] == digest


def test_wrong_credentials_of_the_store(one: Gang, digest: str) -> None:
    wrong = {**one.s3.environment("trainer"), "AWS_SECRET_ACCESS_KEY": "wrong-wrong-wrong-wrong"}
    secret(one.cluster, one.namespace, "store", wrong)
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78), result
    assert "agent that refuses" in result["reason"]
    secret(one.cluster, one.namespace, "store", one.s3.environment("trainer"))
    again = one.place.start("runs", "resume", result["run"], "--no-prefect", "--json")
    one.drivers.append(again)
    row = ended(again)
    record("wrong S3 credentials", result["reason"], row, digest)
    assert row["state_digest"] == digest


def waits(one: Gang, part: str) -> str:
    """What `hotstage k8s logs` says that the run waits for, once it says this."""
    told = ""

    def says() -> bool:
        nonlocal told
        names = one.state().run
        told = one.call("k8s", "logs", names).out if names else ""
        return part in told

    until(says, part, 60.0, lambda: told + one.picture())
    return told.splitlines()[0]


def test_a_quota_that_is_too_small(one: Gang, digest: str) -> None:
    meta = {"name": "small", "namespace": one.namespace}
    one.cluster.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": {"pods": "1"}}})
    driver = one.start()
    told = waits(one, "exceeded quota")
    assert "raise the quota" in told
    one.kubectl("delete", "resourcequota", "small")
    result = ended(driver)
    record("quota too small", told, result, digest)
    assert (result["state_digest"], result["attempts"]) == (digest, 1)


def test_no_machine_fits(one: Gang, digest: str) -> None:
    one.sets.append('launch.node_selector={ fitting = "yes" }')
    driver = one.start()
    told = waits(one, "no machine fits")
    for name in one.cluster.nodes:
        one.cluster.kubectl("label", "node", name, "fitting=yes", "--overwrite")
    try:
        result = ended(driver)
    finally:
        for name in one.cluster.nodes:
            one.cluster.kubectl("label", "node", name, "fitting-")
    record("unschedulable", told, result, digest)
    assert (result["state_digest"], result["attempts"]) == (digest, 1)


def test_pods_that_the_namespace_does_not_admit(one: Gang) -> None:
    one.sets.append("launch.fabric=infiniband")
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78)
    assert "violates PodSecurity" in result["reason"]
    assert "IPC_LOCK" in result["reason"]


def test_an_account_without_rights(one: Gang) -> None:
    config = one.cluster.account(
        one.namespace, "nobody", [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    )
    one.place.env["HOTSTAGE_KUBECONFIG"] = str(config)
    done = one.call("train", "spec.toml", "--no-prefect", "--json", *one.arguments)
    assert done.code == 78
    assert "jobs" in done.err
    assert "hotstage-launcher" in done.err


def test_a_job_of_somebody_else(one: Gang) -> None:
    done = one.call("k8s", "render", "spec.toml", "--json", *one.arguments)
    assert done.code == 0, done.err
    driver = one.start()
    one.reached(1)
    driver.kill()
    driver.wait()
    (name,) = one.jobs()
    one.kubectl("delete", "job", name)
    until(lambda: not one.pods(), "its pods to go")
    container = {"name": "c", "image": "localhost/hotstage-pause:1"}
    theirs = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": one.namespace},
        "spec": {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    one.cluster.apply(theirs)
    # the run takes a new launch, because its old one ran and is gone; what stands there is left alone
    result = ended(one.start())
    assert result["outcome"] == "succeeded"
    assert one.cluster.get("-n", one.namespace, "job", name)["spec"]["suspend"] is True


def test_a_machine_that_falls_silent_is_fenced_and_its_zombies_harm_nobody(one: Gang, digest: str) -> None:
    driver = one.start()
    one.reached(20)
    index = next(i for i in (0, 1) if one.pod(i)["spec"]["nodeName"].endswith("2"))
    machine = one.pod(index)["spec"]["nodeName"]
    frozen = one.processes(index)
    with one.cluster.away(f"kubelet-{machine}"):
        for pid in frozen:
            send(pid, signal.SIGSTOP)
        try:
            until(lambda: one.attempts() == 2, "the next attempt", 90.0, one.picture)
            until(lambda: one.state().checkpoints[-1].epoch == one.state().attempts[-1].n, "its checkpoint", 90.0)
        finally:
            for pid in frozen:
                with contextlib.suppress(ProcessLookupError):
                    send(pid, signal.SIGCONT)
        # they go on where they were, of an epoch that is over
        result = finished(one, driver, digest, "kubelet stopped, node gone, zombies let go again", 240.0)
    (cause,) = causes(one)
    assert cause["class"] in ("infra", "preempted")  # silent, or told to go by the taint manager: what is seen first
    assert cause["place"] == machine
    assert result["attempts"] == 2
