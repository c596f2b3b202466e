"""What a cluster shows, and what is made of it: rules G1..G5 of k8s/diagnosis.py as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k8s.diagnosis import Limits, launch_view
from k8s.labels import AGENT, ENGINE
from k8s.views import Condition, ContainerView, EventView, JobView, PodView, job_view, pod_view
from trainer.wire import EXITS

JOB = JobView("x-k1", "j1", "x-k1", completions=2)
UP = ContainerView("running")
LIMITS = Limits(400 << 20, 512 << 20, 100 << 20, 128 << 20)


def pod(index: int, engine: ContainerView = UP, agent: ContainerView = UP, **more: Any) -> PodView:
    fields: dict[str, Any] = {"phase": "Running", "place": f"m{index}", **more}
    return PodView(f"x-k1-{index}", f"u{index}", "j1", index, containers={ENGINE: engine, AGENT: agent}, **fields)


def disrupted(reason: str) -> dict[str, Condition]:
    return {"DisruptionTarget": Condition("True", reason, "because")}


def unscheduled(message: str, reason: str = "Unschedulable") -> PodView:
    return PodView("x-k1-1", "u1", "j1", 1, conditions={"PodScheduled": Condition("False", reason, message)})


def test_a_whole_gang_runs() -> None:
    view = launch_view("x-k1", JOB, [pod(0), pod(1)])
    assert (view.state, view.loss) == ("running", None)
    assert [(n.node, n.alive, n.place) for n in view.nodes] == [(0, True, "m0"), (1, True, "m1")]


WAITS: dict[str, tuple[PodView | None, list[EventView], str]] = {
    "not made yet": (None, [], "not created yet"),
    "no cpu": (unscheduled("0/2 nodes are available: 2 Insufficient cpu."), [], "lower launch.resources.cpu"),
    "no memory": (unscheduled("2 Insufficient memory"), [], "more stages"),
    "taint": (unscheduled("1 node(s) had untolerated taint"), [], "launch.tolerations"),
    "affinity": (unscheduled("didn't match Pod's node affinity/selector"), [], "two strikes"),
    "cordoned": (unscheduled("0/2 nodes are available: 2 node(s) were unschedulable."), [], "kubectl uncordon"),
    "full": (unscheduled("0/2 nodes are available: 2 Too many pods."), [], "as many pods as they may"),
    "gate": (unscheduled("", "SchedulingGated"), [], "scheduling gate"),
    "a machine that comes": (
        unscheduled("2 Insufficient cpu"),
        [EventView("x-k1-1", "TriggeredScaleUp", "pod triggered scale-up: [{pool-1 1->2 (max: 4)}]")],
        "fits x-k1-1 yet: an autoscaler makes one (pod triggered scale-up: [{pool-1 1->2 (max: 4)}])",
    ),
    "no more machines": (
        unscheduled("2 Insufficient cpu"),
        [
            EventView("x-k1-1", "TriggeredScaleUp", "pod triggered scale-up: [{pool-1 3->4 (max: 4)}]"),
            EventView("x-k1-1", "NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached"),
        ],
        "an autoscaler makes none: pod didn't trigger scale-up: 1 max node group size reached; raise that limit",
    ),
    "no such machine": (
        unscheduled("2 Insufficient cpu"),
        [EventView("x-k1-1", "FailedScheduling", 'incompatible with nodepool "default", no instance type', "Warning")],
        'none: incompatible with nodepool "default", no instance type; lower launch.resources.cpu',
    ),
    "another's machine": (
        unscheduled("2 Insufficient cpu"),
        [
            EventView("x-k1-0", "Nominated", "Pod should schedule on: nodeclaim/default-abc"),
            EventView("x-k1-1", "FailedScheduling", "0/2 nodes are available: 2 Insufficient cpu", "Warning"),
        ],
        "no machine fits x-k1-1: 2 Insufficient cpu; lower launch.resources.cpu",
    ),
    "pulling": (
        pod(1, ContainerView("waiting", "ErrImagePull", "lookup reg.example: no such host"), phase="Pending"),
        [],
        "pulls the image of its engine: lookup reg.example: no such host",
    ),
    "agent comes again": (
        pod(1, ContainerView(), ContainerView("waiting", "CrashLoopBackOff", last_code=75, last_message="a\nno route")),
        [],
        "ended with 75 and starts again: no route",
    ),
    "quota": (
        None,
        [EventView("x-k1", "FailedCreate", "pods is forbidden: exceeded quota: small", "Warning")],
        "raise the quota",
    ),
    "a claim of one machine": (
        replace(unscheduled(""), conditions={}),
        [EventView("x-k1-1", "FailedAttachVolume", 'Multi-Attach error for volume "pvc-1"', "Warning")],
        "take one of ReadWriteMany",
    ),
    "no addresses": (
        replace(unscheduled(""), conditions={}),
        [
            EventView(
                "x-k1-1", "FailedCreatePodSandBox", "add cmd: failed to assign an IP address to container", "Warning"
            )
        ],
        "has no addresses left",
    ),
    "mount": (
        replace(unscheduled(""), conditions={}),
        [EventView("x-k1-1", "FailedMount", 'secret "x-k1-key" not found', "Warning")],
        "FailedMount",
    ),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_is_neither_failed_nor_stalled(case: str) -> None:
    second, events, text = WAITS[case]
    view = launch_view("x-k1", JOB, [pod(0), *([second] if second else [])], events=events)
    assert (view.state, view.loss) == ("waiting", None)
    assert view.nodes[1].alive is None
    assert text in view.detail
    assert "1 of 2 pods run" in view.detail


def test_a_suspended_launch_waits_for_its_queue() -> None:
    view = launch_view("x-k1", replace(JOB, suspended=True, queue="team"), [])
    assert (view.state, view.loss) == ("waiting", None)
    assert "queue team" in view.detail
    told = [EventView("x-k1", "Stopped", "The workload is deactivated"), EventView("x-k1", "Suspended", "suspended")]
    view = launch_view("x-k1", replace(JOB, suspended=True, queue="team"), [], events=told)
    assert "(queue team): Stopped: The workload is deactivated; `kubectl get workloads`" in view.detail
    view = launch_view("x-k1", replace(JOB, suspended=True), [])  # by Kueue, which may manage what names no queue
    assert (view.state, view.loss) == ("waiting", None)
    assert "set launch.queue" in view.detail
    assert "kubectl patch job x-k1" in view.detail


@pytest.mark.parametrize("queue", ["", "team"])
@pytest.mark.parametrize("seen", ["leaving", "left", "gone"])
def test_a_job_that_is_suspended_loses_its_pods_by_that(queue: str, seen: str) -> None:
    """And not by their machines, which would be struck for it."""
    left = ContainerView("terminated", "Error", exit_code=143)
    pods = [pod(0, deleting=True), pod(1, deleting=True)]
    if seen == "left":
        pods = [pod(0, left, phase="Failed", deleting=True), pod(1, left, phase="Failed", deleting=True)]
    job = replace(JOB, suspended=True, queue=queue)
    view = launch_view("x-k1", job, [] if seen == "gone" else pods, [pod(0), pod(1)] if seen == "gone" else [])
    assert view.state == "lost"
    assert view.loss is not None
    assert (view.loss.cls, view.loss.place) == ("preempted", "")
    assert "was suspended, which ends its pods" in view.loss.text
    assert ("queue team" in view.loss.text, "set launch.queue" in view.loss.mend) == (bool(queue), not queue)


LOSSES: dict[str, tuple[PodView, str, str, str]] = {
    # what a pod shows -> class, part of the text, part of the mend
    "no image": (
        pod(1, ContainerView("waiting", "ErrImageNeverPull", "not present"), phase="Pending"),
        *("config", "cannot start its engine: ErrImageNeverPull", "load the image"),
    ),
    "image unknown to its registry": (
        pod(1, ContainerView("waiting", "ImagePullBackOff", "manifest unknown"), phase="Pending"),
        *("config", "manifest unknown", "launch.image"),
    ),
    "image behind a login": (
        pod(1, ContainerView("waiting", "ErrImagePull", "pull access: no basic auth credentials"), phase="Pending"),
        *("config", "no basic auth credentials", "imagePullSecrets"),
    ),
    "image of other processors": (
        pod(
            1, ContainerView("waiting", "ErrImagePull", "no match for platform in manifest: not found"), phase="Pending"
        ),
        *("config", "no match for platform", "is not made for that machine's processors"),
    ),
    "agent's image": (
        pod(1, ContainerView(), ContainerView("waiting", "InvalidImageName", "bad")),
        *("config", "its agent: InvalidImageName", "launch.agent_image"),
    ),
    "no such secret": (
        pod(1, ContainerView(), ContainerView("waiting", "CreateContainerConfigError", 'secret "s3" not found')),
        *("config", 'secret "s3" not found', "launch.store_secret"),
    ),
    "agent refused": (
        pod(
            1,
            ContainerView(),
            ContainerView("waiting", "CrashLoopBackOff", restarts=1, last_code=78, last_message="x\nforbidden"),
        ),
        *("config", "an agent that refuses to start: forbidden", "launch.store_secret"),
    ),
    "engine out of memory": (
        pod(1, ContainerView("terminated", "OOMKilled", exit_code=137), phase="Failed"),
        *("memory", "the plan needs 400 MiB and its limit is 512 MiB", "raise the limit"),
    ),
    "a rank was killed for memory once, the engine left on request": (
        pod(1, ContainerView("terminated", "OOMKilled", exit_code=85), phase="Failed"),
        *("preempted", "ended with 85", ""),
    ),
    "agent out of memory": (
        pod(1, UP, ContainerView("waiting", "CrashLoopBackOff", last_code=137, last_reason="OOMKilled")),
        *("memory", "the plan needs 100 MiB and its limit is 128 MiB", "launch.agent_resources.memory"),
    ),
    "137 is a kill, not a verdict": (
        pod(1, ContainerView("terminated", "Error", exit_code=137), phase="Failed"),
        *("infra", "lost its supervisor: killed (137)", ""),
    ),
    "crash of the supervisor": (
        pod(1, ContainerView("terminated", "Error", exit_code=139), phase="Failed"),
        *("signal", "signal 11", "hotstage logs"),
    ),
    "no engine in the image": (
        pod(1, ContainerView("terminated", "StartError", "exec: not found", exit_code=128), phase="Failed"),
        *("config", "cannot run its engine", "launch.image"),
    ),
    "another program in the engine's image": (
        pod(1, ContainerView("terminated", "Error", "agent: error: the following arguments …", 2), phase="Failed"),
        *("config", "cannot run its engine: agent: error", "launch.image: it does not hold the engine"),
    ),
    "an engine of other processors": (
        pod(1, ContainerView("terminated", "Error", "exec /hotstage-engine: exec format error", 255), phase="Failed"),
        *("config", "exec format error", "is not made for that machine's processors"),
    ),
    "a machine that has started again": (
        pod(1, ContainerView("terminated", "Unknown", exit_code=255), phase="Failed"),
        *("infra", "ended with 255", ""),
    ),
    "another program in the agent's image": (
        pod(1, ContainerView(), ContainerView("waiting", "CrashLoopBackOff", restarts=1, last_code=64)),
        *("config", "cannot run its agent: it ends with 64", "launch.agent_image: it does not hold the agent"),
    ),
    "no agent in the image": (
        pod(
            1,
            ContainerView(),
            ContainerView(
                "waiting",
                "CrashLoopBackOff",
                restarts=1,
                last_code=128,
                last_reason="StartError",
                last_message='exec: "--store": not found',
            ),
        ),
        *("config", 'cannot run its agent: exec: "--store": not found', "launch.agent_image"),
    ),
    "evicted by its own limit": (
        pod(1, phase="Failed", reason="Evicted", message='Usage of EmptyDir volume "work" exceeds the limit "1Mi"'),
        *("memory", "was evicted: Usage of EmptyDir", "raise that limit"),
    ),
    "evicted by its machine": (
        pod(1, phase="Failed", reason="Evicted", message="The node was low on resource: memory"),
        *("infra", "low on resource", "request what the run needs"),
    ),
    "turned away": (pod(1, phase="Failed", reason="OutOfcpu"), "infra", "was rejected", ""),
    "no NUMA node": (
        pod(1, phase="Failed", reason="TopologyAffinityError", message="Resources cannot be allocated with topology"),
        *("infra", "was rejected by its machine: Resources cannot", "launch.resources"),
    ),
    "machine silent": (
        pod(
            1,
            deleting=True,
            conditions={**disrupted("DeletionByTaintManager"), "Ready": Condition("False", "NodeNotReady")},
        ),
        *("infra", "no longer answers the control plane", ""),
    ),
    "machine gone": (
        pod(1, phase="Failed", conditions=disrupted("DeletionByPodGC")),
        *("infra", "no longer answers the control plane", ""),
    ),
    "preempted": (
        pod(1, deleting=True, conditions=disrupted("PreemptionByScheduler")),
        *("preempted", "a pod of higher priority", ""),
    ),
    "drained": (
        pod(1, deleting=True, conditions=disrupted("EvictionByEvictionAPI")),
        *("preempted", "its machine is drained", ""),
    ),
    "deleted": (pod(1, deleting=True), "preempted", "is being deleted", ""),
    "failed without a word": (pod(1, ContainerView(), phase="Failed"), "infra", "no reason given", ""),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_a_pod_shows_becomes_a_cause_and_a_mend(case: str) -> None:
    second, cls, text, mend = LOSSES[case]
    view = launch_view("x-k1", JOB, [pod(0), second], limits=LIMITS)
    assert view.state == "lost"
    assert view.loss is not None
    assert (view.loss.cls, view.loss.node) == (cls, 1)
    assert text in view.loss.text
    assert mend in view.loss.mend
    assert view.loss.place == second.place


@pytest.mark.parametrize("code", [code for code in EXITS if code])
def test_every_exit_code_of_the_engine_has_its_class(code: int) -> None:
    ended = pod(1, ContainerView("terminated", "Error", "first\nlast words", code), phase="Failed")
    view = launch_view("x-k1", JOB, [pod(0), ended])
    assert view.loss is not None
    assert view.loss.cls == EXITS[code].cls
    assert "last words" in view.loss.text
    assert view.nodes[1].alive is False


def test_a_container_of_somebody_elses_that_fails_is_named_and_its_machine_is_not_struck() -> None:
    """A mesh's or a vault's, put there by a webhook: where it fails everywhere no machine would be left."""
    started = ContainerView("waiting", "PodInitializing")
    before = ContainerView("terminated", "Error", "x\nno token for role trainer", exit_code=1)
    others = {"istio-validation": ContainerView("terminated", "Completed", exit_code=0), "vault-agent-init": before}
    failed = pod(1, started, started, phase="Failed")
    failed = replace(failed, containers={**others, **failed.containers})
    view = launch_view("x-k1", JOB, [pod(0), failed])
    assert view.state == "lost"
    assert view.loss is not None
    assert (view.loss.cls, view.loss.node, view.loss.place) == ("infra", 1, "")
    assert "on m1 failed with its container vault-agent-init, which ended with 1: no token for role" in view.loss.text
    assert "kubectl logs POD -c vault-agent-init" in view.loss.mend


def test_a_sidecars_end_is_not_the_engines() -> None:
    restarted = ContainerView("running", restarts=1, last_code=137, last_reason="OOMKilled")
    assert launch_view("x-k1", JOB, [pod(0), pod(1, UP, restarted)]).state == "running"


def test_a_pod_that_leaves_may_save_until_its_engine_has_ended() -> None:
    view = launch_view("x-k1", JOB, [pod(0), pod(1, deleting=True)])
    assert (view.state, view.nodes[1].alive) == ("lost", True)
    over = pod(1, ContainerView("terminated", exit_code=85), deleting=True)
    view = launch_view("x-k1", JOB, [pod(0), over])
    assert view.nodes[1].alive is False
    assert view.loss is not None
    assert view.loss.cls == "preempted"


def test_the_pod_that_failed_explains_those_that_its_job_then_ended() -> None:
    failed = replace(JOB, conditions={"FailureTarget": Condition("True", "PodFailurePolicy", "container engine 137")})
    killed = pod(1, ContainerView("terminated", "Error", exit_code=137), phase="Failed")
    view = launch_view("x-k1", failed, [pod(0, deleting=True), killed])
    assert view.loss is not None
    assert (view.loss.cls, view.loss.node) == ("infra", 1)


def test_pods_that_the_job_ends_after_a_loss_do_not_explain_it() -> None:
    failed = replace(JOB, conditions={"FailureTarget": Condition("True", "PodFailurePolicy", "x")})
    ended = pod(0, ContainerView("terminated", exit_code=85), deleting=True)
    view = launch_view("x-k1", failed, [ended], [pod(1)])
    assert view.loss is not None
    assert (view.loss.cls, view.loss.place) == ("infra", "m1")


LOST_PEER = ContainerView("terminated", "Error", exit_code=75)
LOOKS: dict[str, tuple[list[PodView], list[PodView]]] = {
    # machine 1 goes: what is there and what has vanished, from the first look to the last
    "its peer is there": ([pod(0)], [pod(1)]),
    "its peer ends": ([pod(0, LOST_PEER)], [pod(1)]),
    "its peer has failed": ([pod(0, LOST_PEER, phase="Failed")], [pod(1)]),
    "both are there": ([pod(0, LOST_PEER, phase="Failed"), pod(1, ContainerView("terminated", exit_code=137))], []),
    "its peer is ended by the Job": ([pod(0, LOST_PEER, deleting=True)], [pod(1)]),
    "its peer has vanished too": ([], [pod(0, LOST_PEER, phase="Failed"), pod(1)]),
    "its peer was ended by the Job": ([], [pod(0, LOST_PEER, deleting=True), pod(1)]),
    "its peer was stopped by the Job": ([], [pod(0, ContainerView("terminated", exit_code=143)), pod(1)]),
    "its peer was deleted before it had ended": ([], [pod(0, deleting=True), pod(1)]),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("failed", [{}, {"FailureTarget": Condition("True", "PodFailurePolicy", "x")}])
def test_a_pod_that_lost_its_peer_explains_nothing_however_late_the_look(
    look: str, failed: dict[str, Condition]
) -> None:
    there, gone = LOOKS[look]
    view = launch_view("x-k1", replace(JOB, conditions=failed), there, gone)
    assert view.loss is not None
    assert (view.state, view.loss.cls, view.loss.place) == ("lost", "infra", "m1")


def test_a_vanished_pod_is_known_by_its_last_sight() -> None:
    last = pod(1, ContainerView("terminated", "OOMKilled", exit_code=137), deleting=True)
    view = launch_view("x-k1", JOB, [pod(0)], [last], limits=LIMITS)
    assert view.loss is not None
    assert (view.state, view.loss.cls, view.nodes[1].alive) == ("lost", "memory", False)
    view = launch_view("x-k1", JOB, [pod(0)], [pod(1)])
    assert view.loss is not None
    assert "was deleted" in view.loss.text


def test_pods_of_another_job_do_not_count() -> None:
    strangers = [replace(pod(0), job_uid="j0"), replace(pod(1, phase="Failed"), job_uid="j0")]
    view = launch_view("x-k1", JOB, strangers, strangers)
    assert (view.state, view.loss) == ("waiting", None)


def test_an_index_that_was_started_twice_counts_once() -> None:
    old = replace(pod(1, deleting=True), name="x-k1-1-old", created="2026-01-01T00:00:00Z")
    new = replace(pod(1), name="x-k1-1-new", created="2026-01-01T00:00:09Z")
    assert launch_view("x-k1", JOB, [pod(0), old, new]).state == "running"


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "fabric that restricted allows"),
        ('error looking up service account train/me: serviceaccount "me" not found', "launch.service_account"),
        ('admission webhook "policy" denied the request: no', "admission refuses"),
        (
            'Error creating: pods "x-0" is forbidden: failed quota: team: must specify limits.cpu for: agent,engine',
            'set launch.resources."limits.cpu" and launch.agent_resources."limits.cpu"',
        ),
        (
            'pods "x" is forbidden: exceeded quota: q, requested: limits.cpu=5, used: cpu=0, limited: limits.cpu=4',
            "5 of limits.cpu is asked for at once, the whole quota is 4",
        ),
        ('pods "x" is forbidden: maximum cpu usage per Container is 1, but limit is 4', "LimitRange"),
    ],
)
def test_pods_that_are_never_admitted_are_a_refused_configuration(message: str, mend: str) -> None:
    view = launch_view("x-k1", JOB, [], events=[EventView("x-k1", "FailedCreate", message, "Warning")])
    assert view.state == "lost"
    assert view.loss is not None
    assert view.loss.cls == "config"
    assert mend in view.loss.mend


def test_the_end() -> None:
    done = [pod(n, ContainerView("terminated", exit_code=0), phase="Succeeded") for n in range(2)]
    assert launch_view("x-k1", JOB, done).state == "done"
    assert launch_view("x-k1", replace(JOB, conditions={"Complete": Condition("True")}), []).state == "done"
    assert launch_view("x-k1", JOB, [done[0], pod(1)]).state == "partial"
    assert launch_view("x-k1", None, []).state == "absent"


def test_views_tolerate_what_a_server_leaves_out() -> None:
    assert pod_view({"metadata": {"name": "p"}}) == PodView("p")
    assert job_view({"metadata": {"name": "j"}, "status": {"conditions": None}}).name == "j"
    raw = {"metadata": {"name": "p"}, "status": {"containerStatuses": [{"name": ENGINE, "state": {"running": {}}}]}}
    assert pod_view(raw).containers[ENGINE].state == "running"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first\nlast words", "last words"),
        ('t":"rank","event":"supervisor leaves","code":85}', ""),  # its beginning was cut off
        (
            '{"level":"error","event":"agent lost","text":"no such key"}\n{"level":"info","event":"leaves"}\n',
            "no such key",
        ),
        ('{"level":"info","event":"started"}', ""),
    ],
)
def test_last_words_are_those_that_tell_something(text: str, said: str) -> None:
    ended = pod(1, ContainerView("terminated", "Error", text, 70), phase="Failed")
    loss = launch_view("x-k1", JOB, [pod(0), ended]).loss
    assert loss is not None
    assert loss.text.endswith(f"its last words: {said}" if said else EXITS[70].text)
