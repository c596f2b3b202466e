"""Objects of a launch, as the API shows them, to a ``LaunchView`` with a cause and a mend. Pure.

Rules
  G1  A pod that waits (for a place, an image that may still come, quota, Kueue) is waiting: neither failed nor stalled.
  G2  What can never start as it is written (an image that does not exist, a refused configuration) is a loss of class
      ``config`` at once: waiting longer would not mend it.
  G3  A pod that ended, is being deleted, or whose machine is gone makes the launch ``lost``: pods are never made anew
      inside a launch. Its node is ``alive`` until its engine is known to have ended, so that it can save its state.
  G4  Exit codes count from the engine's container alone. 137 without OOMKilled is a kill, not a verdict on memory;
      OOMKilled with another code is what a rank died of long ago, and its gang went on in the pod.
  G5  The machine counts as gone when the control plane says so (deletion by the taint manager, NodeLost), or when a pod
      that must go has not gone: nobody waits for a dead machine.
  G6  What Kubernetes says in words alone (whether an image exists, whose limit an eviction was) is looked for in its
      words, here and in ``refusal.py``. Our own words are for people, and nothing reads them back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from k8s.labels import AGENT, ENGINE
from k8s.refusal import refusal
from k8s.views import ContainerView, EventView, JobView, PodView
from trainer.failures import (
    CANNOT_RUN,
    CAUSAL,
    NOT_OURS,
    POD_REASONS,
    SIGKILL,
    TURNED_AWAY,
    Failure,
    from_elsewhere,
    of_supervisor,
)
from trainer.launch import Finding, LaunchedNode, LaunchView
from trainer.wire import EXITS

MIB = 1 << 20

_NEVER_STARTS = {
    "ErrImageNeverPull": "load the image onto the machines, or set launch.image to one that a registry serves",
    "InvalidImageName": "correct launch.image or launch.agent_image",
    "ImageInspectError": "the image is damaged on the machine: push it again under another tag",
    "CreateContainerConfigError": "create what the message names (a Secret: launch.store_secret), then resume the run",
}
_NO_IMAGE = re.compile(
    r"not found|manifest unknown|no such (?!host)|does not exist|unauthorized|authentication required|denied|forbidden"
    r"|no basic auth credentials|no user/password",
    re.I,
)
"""A registry whose name is not known now (``no such host``) may be again: name servers have outages."""
_NUMA = (
    "its Topology Manager finds no NUMA node with all that the pod asks for, which the scheduler does not look at: ask "
    "for less a pod (launch.resources, launch.agent_resources, more launch.nodes), or take machines without that "
    "policy (launch.node_selector)"
)
_NO_ADDRESS = "the machine's network has no addresses left: use other machines, or tell whoever runs the cluster"
_SHORT = {
    "Insufficient cpu": "lower launch.resources.cpu, or add machines",
    "Insufficient memory": "lower the plan's memory (more stages, smaller microbatches), or add bigger machines",
    "Insufficient": "the machines lack that resource: correct launch.resources or launch.fabric",
    "untolerated taint": "add a toleration (launch.tolerations), or use other machines",
    "node affinity": "correct launch.node_selector; machines with two strikes are left out (`hotstage runs show RUN`)",
    "were unschedulable": "machines are cordoned: `kubectl uncordon` them, or add others",
    "Too many pods": "machines hold as many pods as they may: add others",
    "ReadWriteOncePod": "such a claim is for one pod: take one of ReadWriteMany, or a volume of each pod's own",
    "Multi-Attach": "such a claim is for one machine: take one of ReadWriteMany, or a volume of each pod's own",
    "assign an IP address": _NO_ADDRESS,  # AWS
    "no IP addresses available": _NO_ADDRESS,
    "unbound": "a volume of launch.pod_patch has no storage behind it: create its claim",
}

_COMING, _NOT_COMING = ("TriggeredScaleUp", "Nominated"), ("NotTriggerScaleUp", "FailedScaleUp")
"""Reasons of an autoscaler's events about a pod. Karpenter says FailedScheduling, as the scheduler does."""


@dataclass(frozen=True)
class Limits:
    """What the plan needs beside what the containers may use, in bytes, for the words about memory."""

    engine_needs: int = 0
    engine_limit: int = 0
    agent_needs: int = 0
    agent_limit: int = 0


NO_LIMITS = Limits()


def launch_view(
    launch_id: str,
    job: JobView | None,
    pods: Sequence[PodView],
    gone: Sequence[PodView] = (),
    events: Sequence[EventView] = (),
    limits: Limits = NO_LIMITS,
) -> LaunchView:
    """Everything together. ``pods`` are there now, ``gone`` were seen before; those of other Jobs are left out."""
    if job is None:
        return LaunchView(launch_id, "absent", detail="no such Job")
    mine = [p for p in pods if p.job_uid == job.uid]
    was = [p for p in gone if p.job_uid == job.uid]
    chosen, last = _choose(job.completions, mine), _choose(job.completions, was)
    nodes = tuple(_node(index, chosen[index], last[index], job) for index in range(job.completions))
    if job.is_("Complete"):
        return LaunchView(launch_id, "done", nodes, "every pod has ended well")
    if all(p is not None and p.phase == "Succeeded" for p in chosen.values()):
        return LaunchView(launch_id, "done", nodes, "every pod has ended well")

    found = [(p, f) for index, p in chosen.items() if p is not None and (f := pod_loss(p, index, limits))]
    found += [(p, _vanished(p, index, limits)) for index, p in last.items() if p is not None and chosen[index] is None]
    losses = [f for p, f in found if not _told_to_go(p, f)]
    if not losses or all(f.cls == Failure.INFRA for f in losses):
        losses += job_loss(job, events)
    ended = bool(found) or any(p is not None and p.deleting for p in chosen.values())
    if job.suspended and ended and all(f.cls in (Failure.PREEMPTED, Failure.INFRA) for f in losses):
        losses = [_suspended(job)]
    if not losses:  # how a pod ends that was told to go explains nothing where another made the Job end them all
        losses = [f for _, f in found]
    if not losses:
        losses = [_leaving(p, index) for index, p in chosen.items() if p is not None and p.deleting]
    if losses:
        # a pod that left because it had lost a peer is explained by any other one, however late both are looked at
        loss = min(losses, key=lambda f: (CAUSAL[f.cls], f.node is None or from_elsewhere(f.code)))
        return LaunchView(launch_id, "lost", nodes, loss.text, loss)
    if job.deleting:
        gone_job = Finding(
            Failure.INFRA, f"Job {job.name} is being deleted", "somebody deleted it; a new launch is made"
        )
        return LaunchView(launch_id, "lost", nodes, gone_job.text, gone_job)
    pending = [p for p in chosen.values() if p is None or _engine(p).state != "running"]
    pending = [p for p in pending if p is None or p.phase != "Succeeded"]
    if pending:
        up = job.completions - len(pending)
        why = waiting_for(job, [p for p in pending if p is not None], events)
        return LaunchView(launch_id, "waiting", nodes, f"{up} of {job.completions} pods run: {why}")
    if any(p is not None and p.phase == "Succeeded" for p in chosen.values()):
        return LaunchView(launch_id, "partial", nodes)
    return LaunchView(launch_id, "running", nodes)


# --- pods ---------------------------------------------------------------------------------------------------


def pod_loss(pod: PodView, node: int, limits: Limits = NO_LIMITS) -> Finding | None:
    """Why this pod will not train (again), or None."""

    def found(cls: Failure, text: str, mend: str = "") -> Finding:
        return Finding(cls, f"pod {pod.name}{_on(pod)} {text}", mend, node, pod.place)

    engine, agent = _engine(pod), pod.containers.get(AGENT, ContainerView())
    if pod.phase == "Succeeded":
        return None
    for name, container in ((ENGINE, engine), (AGENT, agent)):
        never = _never_starts(container)
        if never is not None:
            return found(POD_REASONS[container.reason], f"cannot start its {name}: {never[0]}", never[1])
    if pod.reason == "Evicted":
        own = re.search(r"exceeds|limit", pod.message, re.I) is not None
        mend = (
            "raise that limit (launch.pod_patch)"
            if own
            else "the machine ran out of a resource; request what the run needs (launch.resources)"
        )
        return found(Failure.MEMORY if own else POD_REASONS[pod.reason], f"was evicted: {pod.message}", mend)
    if pod.reason in TURNED_AWAY:
        text = f"was rejected by its machine: {pod.message or pod.reason}"
        return found(POD_REASONS[pod.reason], text, _NUMA if pod.reason == "TopologyAffinityError" else "")
    if _machine_gone(pod):
        return found(Failure.INFRA, "is on a machine that no longer answers the control plane")
    disruption = pod.conditions.get("DisruptionTarget")
    if engine.reason == "OOMKilled" and engine.exit_code == 137:
        return found(POD_REASONS[engine.reason], *_memory("the engine", limits.engine_needs, limits.engine_limit))
    if agent.reason == "OOMKilled" or (agent.last_reason == "OOMKilled" and agent.state != "running"):
        return found(Failure.MEMORY, *_memory("the agent", limits.agent_needs, limits.agent_limit))
    if disruption is not None and disruption.status == "True":
        return found(
            POD_REASONS["DisruptionTarget"],
            f"was told to go ({_why_disrupted(disruption.reason)}): {disruption.message}",
        )
    # twice, because rights may come a little after the pod
    if agent.state != "running" and agent.last_code == 78 and agent.restarts > 0:
        said = _last_line(agent.last_message) or "see `kubectl logs` of its agent"
        return found(
            Failure.CONFIG, f"has an agent that refuses to start: {said}", "correct launch.store_secret or the store"
        )
    if (
        agent.state != "running"
        and agent.restarts > 0
        and _cannot_run(agent.last_code, agent.last_reason, agent.last_message)
    ):
        said = _last_line(agent.last_message) or f"it ends with {agent.last_code}"
        return found(Failure.CONFIG, f"cannot run its agent: {said}", _image_mend("launch.agent_image", "agent", said))
    if engine.state == "terminated":
        return replace(found(*_exit_words(engine)), code=engine.exit_code)
    if pod.phase == "Failed":
        other = _other_end(pod)
        if other is not None:  # on whatever machine: what the container is for, and not where it ran
            return replace(found(Failure.INFRA, *other), place="")
        return found(Failure.INFRA, f"failed: {pod.message or pod.reason or 'no reason given'}")
    return None


def _other_end(pod: PodView) -> tuple[str, str] | None:
    """How a container that is none of hotstage's failed and took the pod with it before the engine began, with the
    mend; None where there is none. A mesh, a vault, a policy or ``launch.pod_patch`` put it there.
    """
    for name, container in pod.containers.items():
        if name not in (ENGINE, AGENT) and container.state == "terminated" and container.exit_code:
            said = _last_line(container.message) or container.reason or "without a word"
            return (
                f"failed with its container {name}, which ended with {container.exit_code}: {said}",
                f"`kubectl logs POD -c {name}` of a pod that is still there has its words; it comes from "
                "launch.pod_patch or from a webhook of the cluster, which a label or an annotation may tell to stay "
                "away (launch.labels, launch.annotations)",
            )
    return None


def _told_to_go(pod: PodView, finding: Finding) -> bool:
    """Whether this end is only what a plain deletion makes of a pod."""
    return (
        pod.deleting and finding.cls in (Failure.PREEMPTED, Failure.INFRA) and "DisruptionTarget" not in pod.conditions
    )


def _leaving(pod: PodView, node: int) -> Finding:
    return Finding(Failure.PREEMPTED, f"pod {pod.name}{_on(pod)} is being deleted", "", node, pod.place)


def _on(pod: PodView) -> str:
    return f" on {pod.place}" if pod.place else ""


def _exit_words(engine: ContainerView) -> tuple[Failure, str, str]:
    code = engine.exit_code if engine.exit_code is not None else -1
    said = _last_line(engine.message)
    said = f"; its last words: {said}" if said else ""
    cls, known = of_supervisor(code), EXITS.get(code)
    if code == 0:
        return cls, f"left before the run's end{said}", ""
    if known is not None:
        return cls, f"ended with {code}: {known.text}{said}", ""
    if cls is Failure.SIGNAL:
        return cls, f"lost its supervisor: signal {code - 128}{said}", "`hotstage logs RUN` has the last words"
    if code == 128 + SIGKILL:
        return cls, f"lost its supervisor: killed ({code}){said}", ""
    if _cannot_run(code, engine.reason, engine.message):
        text = f"cannot run its engine: {_last_line(engine.message) or f'it ended with {code}'}"
        return Failure.CONFIG, text, _image_mend("launch.image", "engine", engine.message)
    return cls, f"ended with {code}{said}", ""


_OTHER_PROCESSOR = ("no match for platform", "exec format error")
"""How a registry says it, and a kernel."""
_ITS_PROCESSORS = (
    "the image is not made for that machine's processors: take one of theirs, or other machines "
    '(launch.node_selector."kubernetes.io/arch")'
)


def _cannot_run(code: int | None, reason: str, message: str) -> bool:
    """Whether a container's end says that its image does not hold what it is to run. 64: a command line that another
    program did not understand.
    """
    return code in (*NOT_OURS, 64) or reason in CANNOT_RUN or _OTHER_PROCESSOR[1] in message


def _image_mend(key: str, what: str, message: str) -> str:
    if any(words in message for words in _OTHER_PROCESSOR):
        return _ITS_PROCESSORS
    return f"correct {key}: it does not hold the {what}, or that of another version"


def _memory(who: str, needs: int, limit: int) -> tuple[str, str]:
    beside = f"; the plan needs {needs // MIB} MiB and its limit is {limit // MIB} MiB" if limit else ""
    mend = "raise the limit (launch.resources.memory, launch.agent_resources.memory), or take more stages"
    return f"was killed for memory: {who} used more than its limit{beside}", mend


def _why_disrupted(reason: str) -> str:
    return {
        "PreemptionByScheduler": "a pod of higher priority takes its place",
        "EvictionByEvictionAPI": "its machine is drained",
        "DeletionByTaintManager": "its machine is tainted",
        "DeletionByPodGC": "its machine is gone",
        "TerminationByKubelet": "its machine is shutting down or ran out of a resource",
    }.get(reason, reason or "no reason given")


def _machine_gone(pod: PodView) -> bool:
    disruption = pod.conditions.get("DisruptionTarget")
    told = disruption is not None and disruption.status == "True"
    if pod.reason == "NodeLost" or pod.phase == "Unknown" or (told and disruption and "PodGC" in disruption.reason):
        return True
    ready = pod.conditions.get("Ready")
    # the node controller marks pods of a silent machine not ready while their containers are still written as running
    silent = ready is not None and ready.status != "True" and _engine(pod).state == "running"
    return bool(told and disruption and disruption.reason == "DeletionByTaintManager" and silent)


def _vanished(pod: PodView, node: int, limits: Limits) -> Finding:
    known = pod_loss(pod, node, limits)
    if known is not None and known.cls != "preempted":
        return known
    return Finding(Failure.INFRA, f"pod {pod.name}{_on(pod)} was deleted", "", node, pod.place)


def _never_starts(container: ContainerView) -> tuple[str, str] | None:
    if container.state != "waiting":
        return None
    if container.reason in _NEVER_STARTS:
        return f"{container.reason}: {container.message}", _NEVER_STARTS[container.reason]
    if container.reason in ("ErrImagePull", "ImagePullBackOff") and _NO_IMAGE.search(container.message):
        mend = "correct launch.image or launch.agent_image, or add imagePullSecrets (launch.pod_patch)"
        if _OTHER_PROCESSOR[0] in container.message:
            mend = _ITS_PROCESSORS
        return f"{container.reason}: {container.message}", mend
    return None


def _engine(pod: PodView) -> ContainerView:
    return pod.containers.get(ENGINE, ContainerView())


def _choose(count: int, pods: Sequence[PodView]) -> dict[int, PodView | None]:
    """A pod an index: the newest that is not on its way out, else the newest (an index may be started twice)."""
    chosen: dict[int, PodView | None] = dict.fromkeys(range(count))
    for pod in sorted(pods, key=lambda p: (not p.deleting, p.phase != "Failed", p.created, p.name)):
        if pod.index in chosen:
            chosen[pod.index] = pod
    return chosen


def _node(index: int, pod: PodView | None, last: PodView | None, job: JobView) -> LaunchedNode:
    if pod is None:
        over = last is not None or job.is_("Failed") or job.is_("FailureTarget")
        words = _words(last) if last is not None else ""
        return LaunchedNode(index, None, None, None, words, False if over else None, last.place if last else "")
    engine = _engine(pod)
    if pod.phase == "Succeeded":
        return LaunchedNode(index, None, None, "ended", _words(pod), False, pod.place)
    if pod.phase == "Failed" or engine.state == "terminated" or _machine_gone(pod):
        return LaunchedNode(index, None, None, None, _words(pod), False, pod.place)
    alive = True if engine.state == "running" else None
    return LaunchedNode(index, None, None, None, "", alive, pod.place)


def _words(pod: PodView) -> str:
    return _engine(pod).message or pod.message


def _last_line(text: str) -> str:
    """The last line that tells something: plain text, or the words of a log line that is a warning or worse."""
    for line in reversed(text.strip().splitlines()):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if '":' in line and line.rstrip().endswith("}"):
                continue  # a log line whose beginning was cut off
            return line.strip()[-400:]
        if isinstance(value, dict) and value.get("level") not in ("info", "debug"):
            said = value.get("text") or value.get("error") or value.get("event") or ""
            return str(said)[:400]
    return ""


# --- Jobs and what waits ------------------------------------------------------------------------------------


def job_loss(job: JobView, events: Sequence[EventView] = ()) -> list[Finding]:
    """What the Job itself says: its failure, or pods that the API server will never take."""
    found: list[Finding] = []
    for name in ("FailureTarget", "Failed"):  # FailureTarget comes first; Failed waits for dead machines
        if job.is_(name):
            said = job.conditions[name]
            found.append(Finding(Failure.INFRA, f"Job {job.name} failed: {said.reason}: {said.message}"))
            break
    for event in events:
        if event.about == job.name and event.reason == "FailedCreate":
            refused = refusal(event.message)
            if refused is not None and not refused.waits:
                found.append(
                    Finding(Failure.CONFIG, f"Job {job.name} cannot create its pods: {event.message}", refused.mend)
                )
    return found


def _suspended(job: JobView) -> Finding:
    """What suspends a Job ends its pods."""
    text = f"Job {job.name} was suspended, which ends its pods"
    if job.queue:
        return Finding(Failure.PREEMPTED, f"{text}: Kueue took its place (queue {job.queue})")
    return Finding(Failure.PREEMPTED, text, _held_back(job))


def _held_back(job: JobView) -> str:
    """What to do about a Job that hotstage did not suspend."""
    return (
        "Kueue holds it back, which may manage Jobs without a queue too: set launch.queue to a LocalQueue of the "
        f'namespace; or a person did: kubectl patch job {job.name} -p \'{{"spec": {{"suspend": false}}}}\''
    )


def waiting_for(job: JobView, pods: Sequence[PodView], events: Sequence[EventView] = ()) -> str:
    """What a launch that is not whole waits for, with the mend; never empty."""
    if job.suspended:
        if job.queue:
            told = next((e for e in reversed(events) if e.about == job.name and _of_kueue(e)), None)
            why = f": {told.reason}: {told.message}" if told else ""
            return (
                f"suspended, Kueue has not admitted it (queue {job.queue}){why}; "
                f"`kubectl get workloads` shows it, `kubectl describe workload` says why"
            )
        return f"suspended; where it stays so, {_held_back(job)}"
    for pod in pods:
        scheduled = pod.conditions.get("PodScheduled")
        if scheduled is not None and scheduled.status == "False" and scheduled.reason != "SchedulingGated":
            return _no_machine(pod, scheduled.message, events)
        if scheduled is not None and scheduled.status == "False":
            return f"{pod.name} is held by a scheduling gate"
    for pod in pods:
        agent, engine = pod.containers.get(AGENT, ContainerView()), _engine(pod)
        for name, container in ((AGENT, agent), (ENGINE, engine)):
            if container.state == "waiting" and container.reason in ("ErrImagePull", "ImagePullBackOff"):
                return f"{pod.name} pulls the image of its {name}: {container.message}"
        if agent.last_code is not None and agent.state != "running":
            said = _last_line(agent.last_message)
            return f"the agent of {pod.name} ended with {agent.last_code} and starts again{f': {said}' if said else ''}"
    names = {p.name for p in pods}
    for event in reversed(events):
        if event.about == job.name and event.reason == "FailedCreate":
            refused = refusal(event.message)
            mend = f"; {refused.mend}" if refused else ""
            return f"the API server rejects its pods: {event.message}{mend}"
        if event.about in names and event.type == "Warning":
            return f"{event.about}: {event.reason}: {event.message}{_mend(event.message)}"
    if not pods:
        return "its pods are not created yet"
    return ", ".join(sorted({_waits_for(pod) for pod in pods}))


def _no_machine(pod: PodView, why: str, events: Sequence[EventView]) -> str:
    """What the scheduler says, and after it what an autoscaler (the cluster's own, Karpenter) makes of that."""
    for event in reversed(events):
        if event.about != pod.name:
            continue
        if event.reason in _COMING:
            return f"no machine fits {pod.name} yet: an autoscaler makes one ({event.message})"
        if event.reason in _NOT_COMING or (event.reason == "FailedScheduling" and "nodepool" in event.message.lower()):
            full = "max node group size" in event.message or "limit" in event.message
            mend = "; raise that limit, or end what uses its machines" if full else _mend(why)
            return f"no machine fits {pod.name}, and an autoscaler makes none: {event.message}{mend}"
    return f"no machine fits {pod.name}: {why}{_mend(why)}"


def _of_kueue(event: EventView) -> bool:
    """Whether it says why Kueue holds a Job back; the others tell that it does."""
    return event.type == "Warning" or event.reason == "Stopped"


def _waits_for(pod: PodView) -> str:
    if not pod.place:
        return "waiting for the scheduler"
    return "waiting for the agent" if AGENT in pod.containers else "containers are being created"


def _mend(message: str) -> str:
    for key, mend in _SHORT.items():
        if key in message:
            return f"; {mend}"
    return ""
