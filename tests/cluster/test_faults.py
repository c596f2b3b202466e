"""The table of faults on a real cluster: the diagnosis, the attempts, the lost steps, and always the same bits.

Each row goes to out/faults.json, which is begun anew by every session.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k8s.render import DEFAULT_AGENT_IMAGE, DEFAULT_IMAGE
from tests.cluster.cluster import Cluster
from tests.cluster.control import HOST, compact
from tests.cluster.gang import SPEC, STEPS, Gang, Table, ended, fill_memory, gang, secret, send, step_of, until
from tests.support.place import Place
from tests.support.s3_server import S3Server, s3_server
from tests.support.shared import once

AWAY_S = 120.0
PATCH = "launch.pod_patch="


@pytest.fixture(scope="session")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state digest of the same What, trained on this machine without a fault."""

    def make(work: Path) -> str:
        place = Place(work / "p", SPEC)
        try:
            result = place.train("launch.target=local", "launch.nodes=1", "parallel.stages=2")
        finally:
            place.stop_all()
        assert (result["outcome"], result["step"]) == ("succeeded", STEPS)
        return str(result["state_digest"])

    return once(tmp_path_factory, "local-gang", make)


@dataclass(frozen=True)
class Judge:
    """Knows the undisturbed run's bits, and writes the rows."""

    digest: str
    table: Table

    def row(self, one: Gang, fault: str, diagnosis: str, result: dict[str, Any]) -> dict[str, Any]:
        """A row of the table; the run has succeeded with the undisturbed run's bits."""
        self.table.add(fault, diagnosis, one, result, self.digest)
        assert (result["outcome"], result["step"]) == ("succeeded", STEPS), result
        assert result["state_digest"] == self.digest
        return result

    def finish(self, one: Gang, driver: subprocess.Popen[bytes], fault: str, seconds: float = 150.0) -> dict[str, Any]:
        """The same once the driver has ended; the diagnosis is the last cause in the log."""
        result = ended(driver, seconds)
        told = causes(one)
        return self.row(one, fault, told[-1]["text"] if told else "", result)


@pytest.fixture(scope="session")
def judge(digest: str, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    once(tmp_path_factory, "faults-table", Table.begin)
    return Judge(digest, Table())


@pytest.fixture
def one(cluster: Cluster, s3: S3Server, tmp_path: Path) -> Iterator[Gang]:
    with gang(cluster, tmp_path / "p", s3) as made:
        yield made


def causes(one: Gang) -> list[dict[str, Any]]:
    return [a.body["cause"] for a in one.state().attempts if a.body.get("cause")]


@pytest.mark.parametrize(("nodes", "stages"), [(2, 4), (4, 4)])
def test_a_run_without_a_fault_has_the_bits_of_the_local_one(one: Gang, judge: Judge, nodes: int, stages: int) -> None:
    one.sets += [f"launch.nodes={nodes}", f"parallel.stages={stages}"]
    driver = one.start()
    one.reached(4)
    assert len({p["spec"]["nodeName"] for p in one.pods()}) == 2
    result = judge.finish(one, driver, f"none, {nodes} pods")
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


def rank_out_of_memory(one: Gang) -> None:
    fill_memory(one.rank(3))


# fault -> what it does, class of its cause ("": no attempt is lost), whether a new launch is made
STRIKES: dict[str, tuple[Callable[[Gang], None], str, bool]] = {
    "rank killed (9)": (rank_killed, "signal", False),
    "rank crashed (11)": (rank_crashed, "signal", False),
    "rank killed for memory (OOM)": (rank_out_of_memory, "memory", False),
    "pod deleted": (pod_deleted, "preempted", True),
    # its processes are asked to stop, with little time: the gang may save even so
    "pod deleted by force": (pod_deleted_by_force, "infra preempted", True),
    "supervisor killed": (supervisor_killed, "infra", True),
    "supervisor terminated (SIGTERM with grace)": (supervisor_terminated, "preempted", True),
    "agent killed": (agent_killed, "", False),
    "stage stopped (SIGSTOP)": (stage_stopped, "stall", False),
}


@pytest.mark.parametrize("fault", STRIKES)
def test_what_strikes_while_it_trains(one: Gang, judge: Judge, fault: str) -> None:
    strike, cls, anew = STRIKES[fault]
    if cls == "stall":
        one.sets.append("launch.stall_s=8")
    driver = one.start()
    one.reached(20)
    one.strike(strike)
    result = judge.finish(one, driver, fault)
    told = causes(one)
    assert len(told) == bool(cls), told
    assert all(c["class"] in cls.split() for c in told), told
    assert result["attempts"] == 1 + bool(cls)
    if cls == "memory":
        assert re.match(r"rank [23] was killed for memory \(OOM\): the plan needs \d+ MiB for", told[0]["text"]), told
        assert re.search(r"of its node, the limit is \d+ MiB$", told[0]["text"]), told
    launches = [a.launch[-2:] for a in one.state().attempts]
    assert launches == (["k1", "k2"] if anew else ["k1"] * result["attempts"])


MATCH = 'topologyKey = "kubernetes.io/hostname", labelSelector.matchLabels."app.kubernetes.io/managed-by" = "hotstage"'
APART = f"{{ affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution = [{{ {MATCH} }}] }}"
"""Each pod on a machine of its own."""
# of any namespace: a machine has room for one such pod
LONELY = 'namespaceSelector = {}, labelSelector.matchLabels.lonely = "yes"'


def test_two_replicas_lose_a_rank_a_pod_and_a_machine(one: Gang, judge: Judge) -> None:
    """2 stages x 2 replicas in two pods, each on a machine of its own; when one machine is gone for good, 1 replica."""
    label, machines = f"{one.namespace}-room", one.cluster.nodes
    one.sets += ["parallel.stages=2", "parallel.replicas=2", "recovery.layouts=[{ replicas = 1 }]"]
    one.sets += ["recovery.capacity_s=4", f'launch.node_selector={{ "{label}" = "yes" }}', PATCH + APART]
    try:
        for name in machines:
            one.cluster.kubectl("label", "node", name, f"{label}=yes")
        driver = one.start()
        one.reached(20)
        assert len({p["spec"]["nodeName"] for p in one.pods()}) == 2
        one.strike(rank_killed)
        until(lambda: one.attempts() == 2, "the attempt after the rank", 60.0, one.picture)
        one.reached(60)
        one.strike(pod_deleted)
        until(lambda: one.attempts() == 3, "the attempt after the pod", 60.0, one.picture)
        one.reached(100)
        one.cluster.kubectl("label", "node", one.pod(1)["spec"]["nodeName"], f"{label}-")
        one.strike(pod_deleted)
        result = judge.finish(one, driver, "rank killed, pod deleted, then its machine gone for good")
    finally:
        for name in machines:
            one.cluster.kubectl("label", "node", name, f"{label}-")
    told = one.state().attempts
    assert [(a.launch[-2:], a.nodes, a.ranks) for a in told] == [
        ("k1", 2, 4), ("k1", 2, 4), ("k2", 2, 4), ("k3", 2, 4), ("k4", 1, 2),
    ]  # fmt: skip
    assert "no machine fits" in told[-1].body["fallback"]["why"]
    assert "2 stages x 1 replica on 1 node" in one.call("runs", "show", result["run"]).out


@pytest.mark.alone
def test_two_minutes_without_the_api_server_and_without_the_store(
    cluster: Cluster, s3: S3Server, tmp_path: Path, judge: Judge
) -> None:
    """Two runs at once: one keeps its store and loses the API server with the history of its watches, the other loses
    both.
    """
    patient = ["launch.toleration_s=120"]  # nodes come back one after the other: no pod is sent away for that
    with (
        s3_server(tmp_path / "s3", HOST) as store,
        gang(cluster, tmp_path / "a", s3, patient) as watched,
        gang(cluster, tmp_path / "b", store, patient) as stored,
    ):
        both = (watched, stored)
        drivers = [watched.start("-v"), stored.start()]
        for each in both:
            each.reached(4)
            each.slow()
        ranks = [each.rank(0) for each in both]
        with cluster.away("apiserver"):
            began, before = time.monotonic(), [step_of(pid) for pid in ranks]
            saved = len(watched.state().checkpoints)
            store.kill()
            compact("hotstage-test/compacted")
            until(lambda: all(step_of(pid) > step + 8 for pid, step in zip(ranks, before, strict=True)), "8 steps")
            until(lambda: len(watched.state().checkpoints) > saved, "a checkpoint without the API server", AWAY_S)
            time.sleep(max(0.0, began + AWAY_S - time.monotonic()))  # how long they are away is the fault itself
            reached = [step_of(pid) for pid in ranks]
            assert all(0 < step < STEPS for step in reached), "they train on, and there is something left to do"
            store.restart()
        # they would ask again only half a minute later, and so would pods' ends be seen: not what is shown here
        cluster.restart("controller-manager", "scheduler")
        stored.full_speed()
        until(lambda: stored.state().at_step() and stored.state().at_step().step >= reached[1], "checkpoints again")
        until(lambda: "too old resource version" in watched.said(drivers[0]), "the watch that is told 410", 60.0)
        watched.full_speed()
        for each, driver, fault in (
            (watched, drivers[0], f"API server down for {AWAY_S:.0f} s, watch history compacted"),
            (stored, drivers[1], f"store down for {AWAY_S:.0f} s"),
        ):
            result = ended(driver)
            told = [json.loads(line).get("said", "") for line in each.said(driver).splitlines() if line.startswith("{")]
            unknown = [text for text in told if text.startswith("unknown: ")]
            judge.row(each, fault, unknown[0] if unknown else "", result)
            assert unknown, each.said(driver)
            assert result["attempts"] == 1


@pytest.mark.alone  # its pod's controller is away meanwhile
def test_one_index_started_twice(one: Gang, judge: Judge) -> None:
    driver = one.start()
    one.reached(20)
    one.slow()
    first = one.pod(1)
    meta, spec = first["metadata"], {k: v for k, v in first["spec"].items() if k != "nodeName"}
    same = {key: meta[key] for key in ("namespace", "labels", "annotations")}
    twin = {"apiVersion": "v1", "kind": "Pod", "metadata": {**same, "name": f"{meta['name']}-twin"}, "spec": spec}
    with one.cluster.away("controller-manager"):  # it would delete the second one
        one.cluster.apply(twin)
        told = ""

        def stands_by() -> bool:
            nonlocal told
            said = one.kubectl("logs", f"{meta['name']}-twin", "-c", "agent", check=False)
            told = next((line for line in said.splitlines() if "this second one" in line), "")
            return bool(told)

        until(stands_by, "the second pod to stand by", 60.0, one.picture)
        both = [p for p in one.pods() if p["metadata"]["name"].startswith(meta["name"])]
        ranks = [[a for a in one.processes_of(p).values() if a[1:2] == ["rank"]] for p in both]
        assert sorted(map(len, ranks)) == [0, 2]
        one.full_speed()
        result = ended(driver)
    judge.row(one, "one index started twice", json.loads(told)["text"], result)
    assert result["attempts"] == 1


def test_a_volume_that_is_full(one: Gang, judge: Judge) -> None:
    volume = '{{ volumes = [{{ name = "work", emptyDir = {{ medium = "Memory", sizeLimit = "{}" }} }}] }}'
    one.sets.append(PATCH + volume.format("64Ki"))
    result = ended(one.start())
    told = result["reason"]
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78), result
    assert re.search(r"/var/lib/hotstage has too little room, \d+ of its 64 KiB are free", told), told
    assert "sizeLimit of its volume `work` (launch.pod_patch)" in told
    # enough to begin with; what fills it later costs nothing, nor does a rank that dies then
    driver = one.resume(result["run"], PATCH + volume.format("8Mi"))
    one.reached(20)
    work = Path(f"/proc/{one.agent(1)}/root/var/lib/hotstage")
    with pytest.raises(OSError, match="No space left on device"):
        (work / "ballast").write_bytes(bytes(16 << 20))
    one.strike(rank_killed)
    judge.row(one, "a full emptyDir", told, ended(driver))


# --- drivers --------------------------------------------------------------------------------------------------


def test_a_driver_may_be_killed_at_any_state(one: Gang, judge: Judge) -> None:
    states: dict[str, Callable[[], object]] = {
        "the attempt's record": lambda: one.attempts() == 1,
        "the Job": one.jobs,
        "its pods": one.pods,
        "training": lambda: one.step() >= 1,
    }
    for what, there in states.items():
        driver = one.start()
        until(there, what, 60.0, one.picture)
        if what == "training":
            one.slow()
        driver.kill()
        driver.wait()
    one.full_speed()
    result = judge.finish(one, one.start(), "driver killed in four states")
    assert result["attempts"] == 1


def test_two_drivers_are_as_good_as_one(one: Gang, judge: Judge) -> None:
    first, second = one.start(), one.start()
    one.reached(20)
    one.strike(rank_killed)
    result = judge.finish(one, first, "two drivers, and a rank killed")
    assert ended(second)["state_digest"] == judge.digest
    assert result["attempts"] == 2


# --- what keeps it from starting ------------------------------------------------------------------------------


def test_an_image_that_is_nowhere(one: Gang, judge: Judge) -> None:
    patch = PATCH + '{ containers = [{ name = "engine", image = "nowhere:1", imagePullPolicy = "Never" }] }'
    one.sets.append(patch)
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78)
    assert "ErrImageNeverPull" in result["reason"]
    judge.row(one, "image missing", result["reason"], ended(one.resume(result["run"], PATCH + "{}")))


def test_images_that_were_swapped(one: Gang, judge: Judge) -> None:
    one.sets += [f"launch.image={DEFAULT_AGENT_IMAGE}", f"launch.agent_image={DEFAULT_IMAGE}"]
    done = ended(one.start())
    assert (done["outcome"], done["exit_code"]) == ("gave_up", 78), done
    assert "cannot run its agent" in done["reason"]
    right = (f"launch.image={DEFAULT_IMAGE}", f"launch.agent_image={DEFAULT_AGENT_IMAGE}")
    judge.row(one, "images swapped", done["reason"], ended(one.resume(done["run"], *right)))


def test_a_container_of_somebody_elses_that_fails_before_the_engine(one: Gang, judge: Judge) -> None:
    """As a mesh's or a vault's does, which a webhook puts there: no machine is left out for it."""
    own = "{ allowPrivilegeEscalation = false, capabilities = { drop = ['ALL'] } }"
    other = f"name = 'vault-agent-init', image = '{DEFAULT_IMAGE}', args = ['nonsense'], securityContext = {own}"
    one.sets.append(f"{PATCH}{{ initContainers = [{{ {other} }}] }}")
    done = ended(one.start())
    assert (done["outcome"], done["exit_code"]) == ("gave_up", 75), done
    assert "failed with its container vault-agent-init, which ended with 64" in done["reason"]
    judge.row(one, "somebody else's container fails", done["reason"], ended(one.resume(done["run"], PATCH + "{}")))


def test_wrong_credentials_of_the_store(one: Gang, judge: Judge) -> None:
    wrong = {**one.s3.environment("trainer"), "AWS_SECRET_ACCESS_KEY": "wrong-wrong-wrong-wrong"}
    secret(one.cluster, one.namespace, "store", wrong)
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78), result
    assert "agent that refuses" in result["reason"]
    secret(one.cluster, one.namespace, "store", one.s3.environment("trainer"))
    judge.row(one, "wrong S3 credentials", result["reason"], ended(one.resume(result["run"])))


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


def test_a_quota_that_is_too_small(one: Gang, judge: Judge) -> None:
    meta = {"name": "small", "namespace": one.namespace}
    one.cluster.put({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": {"pods": "1"}}})
    driver = one.start()
    until(lambda: "exceeded quota" in one.said(driver), "a word of the quota", 60.0, one.picture)
    told = next(line for line in one.said(driver).splitlines() if "exceeded quota" in line)
    assert "raise the quota" in told
    one.kubectl("delete", "resourcequota", "small")
    assert judge.row(one, "quota too small", told, ended(driver))["attempts"] == 1


def test_a_quota_on_what_the_pods_do_not_say(one: Gang, judge: Judge) -> None:
    """The doctor's finding, the same from the run itself, and a run that its mend makes whole."""
    meta, hard = {"name": "counted", "namespace": one.namespace}, {"limits.cpu": "4", "pods": "1e3"}
    one.cluster.put({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": {"hard": hard}})
    mend = 'set launch.resources."limits.cpu" and launch.agent_resources."limits.cpu"'
    done = one.call("k8s", "doctor", "spec.toml", *one.arguments)
    # its account may not see limit ranges, which could say it for the pods: a warning
    assert done.code == 0, done.out
    assert "quota counted counts limits.cpu and containers agent, engine set none" in done.out
    assert mend in done.out
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78), result
    assert "must specify limits.cpu for: agent,engine" in result["reason"]
    driver = one.resume(result["run"], 'launch.resources."limits.cpu"="1"', 'launch.agent_resources."limits.cpu"="1"')
    judge.row(one, "quota on what pods do not say", result["reason"], ended(driver))


def test_no_machine_fits(one: Gang, judge: Judge) -> None:
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
    assert judge.row(one, "unschedulable", told, result)["attempts"] == 1


def test_two_gangs_that_hold_half_of_what_each_needs(
    one: Gang, cluster: Cluster, s3: S3Server, tmp_path: Path, judge: Judge
) -> None:
    """Each has a pod on one machine and waits for the other's; each would for ever."""
    apart = APART.replace('labelSelector.matchLabels."app.kubernetes.io/managed-by" = "hotstage"', LONELY)
    with gang(cluster, tmp_path / "other", s3) as other:
        both = {f"{each.namespace}-room": each for each in (one, other)}
        try:
            for node, (label, each) in zip(cluster.nodes, both.items(), strict=True):
                cluster.kubectl("label", "node", node, f"{label}=yes")
                each.sets += [f'launch.node_selector={{ "{label}" = "yes" }}', PATCH + apart]
                each.sets += ['launch.labels={ lonely = "yes" }', "recovery.capacity_s=6", "launch.connect_s=10"]
            drivers = [each.start() for each in both.values()]
            for each in both.values():
                until(lambda p=each.pods: any(pod["spec"].get("nodeName") for pod in p()), "half", 60.0, each.picture)
            for label in both:
                cluster.kubectl("label", "node", "--all", f"{label}=yes", "--overwrite")
            results = [ended(driver, 240.0) for driver in drivers]
        finally:
            for label in both:
                cluster.kubectl("label", "node", "--all", f"{label}-")
    why = [a.reason for a in one.state().attempts] + [a.reason for a in other.state().attempts]
    told = next(reason for reason in why if reason.startswith("gave back what 1 of its 2 nodes had"))
    for each, result in zip((one, other), results, strict=True):
        judge.row(each, "two gangs hold half of the machines each", told, result)


def test_a_plan_that_needs_more_memory_than_its_limit(one: Gang, judge: Judge) -> None:
    small = ("--set", "launch.resources.memory=64Mi")
    done = one.call("train", "spec.toml", "--no-prefect", "--json", *one.arguments, *small)
    assert done.code == 78, done.err
    assert re.search(r"launch\.resources\.memory = 64Mi is less than the \d+Mi that the plan needs; raise it", done.err)
    assert one.jobs() == []
    told = next(line for line in done.err.splitlines() if "64Mi" in line)
    judge.row(one, "needs more memory than the limit", told, ended(one.start()))


def test_pods_that_the_namespace_does_not_admit(one: Gang) -> None:
    one.sets.append(PATCH + '{ volumes = [{ name = "host", hostPath = { path = "/srv" } }] }')
    result = ended(one.start())
    assert (result["outcome"], result["exit_code"]) == ("gave_up", 78)
    assert "violates PodSecurity" in result["reason"]
    assert "hostPath" in result["reason"]


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
    assert one.cluster.get("jobs", name, n=one.namespace)["spec"]["suspend"] is True


@pytest.mark.alone
def test_a_machine_that_falls_silent_is_fenced_and_its_zombies_harm_nobody(one: Gang, judge: Judge) -> None:
    driver = one.start()
    one.reached(20)
    index = next(i for i in (0, 1) if one.pod(i)["spec"]["nodeName"].endswith("2"))
    machine = one.pod(index)["spec"]["nodeName"]
    frozen = one.processes(index)
    ranks = [pid for pid, args in frozen.items() if args[1:2] == ["rank"]]
    assert len(ranks) == 2

    def freeze(_: Gang) -> None:
        for pid in frozen:
            send(pid, signal.SIGSTOP)

    def begun() -> bool:
        names = [p["metadata"]["name"] for p in one.pods() if p["status"].get("phase") == "Running"]
        return all(any(f"-k2-{index}-" in name for name in names) for index in range(2))

    with one.cluster.away(f"kubelet-{machine}"):
        one.strike(freeze)
        try:
            until(lambda: one.attempts() == 2, "the next attempt", 90.0, one.picture)
            until(begun, "the pods of the next launch", 60.0, one.picture)
            one.reached(1)
            one.slow()
            assert one.state().ended is None  # it is still there when they come again
        finally:
            for pid in frozen:
                with contextlib.suppress(ProcessLookupError):
                    send(pid, signal.SIGCONT)
        # they go on where they were, of an epoch that is over, and leave by themselves: no kubelet is there to end them
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "the zombies to leave", 60.0)
        one.full_speed()
        result = judge.finish(one, driver, "kubelet stopped, node gone; its zombies are let go again", 240.0)
    (cause,) = causes(one)
    # what is seen first: the machine's silence, the taint manager's word to go, or that the peers wait for it in vain
    assert cause["class"] in ("infra", "preempted", "stall")
    assert cause["place"] == machine
    assert result["attempts"] == 2
