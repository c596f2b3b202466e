"""Nodes as pods: ``KubernetesLauncher`` makes one Indexed Job a launch, watches it, and never waits for the network to
say what it saw.

Order of ``ensure`` (any driver may die at any point, the next one goes on from what is there):
  1. the Job by server-side apply, suspended;
  2. its Secret with the launch key, made once, and its headless Service, both owned by the Job;
  3. the Job again, no longer suspended (with a queue that is Kueue's to do).

Invariants
  K1  An object of the wanted name that another made is never touched: ForeignObject.
  K2  What is deleted is deleted by its UID.
  K3  The launch key leaves this process only inside its Secret; it is never logged.
  K4  ``observe`` never raises for a server that is away: unknown.
"""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from k8s.api import EVENTS, JOBS, PODS, SECRETS, SERVICES, Json, Resource
from k8s.diagnosis import NO_LIMITS, Limits, launch_view
from k8s.errors import Exists, ForeignObject, Missing, NotAllowed
from k8s.labels import LAUNCH, MANAGED_BY, MANAGER, RUN, SPEC_DIGEST, label_value
from k8s.render import check_fabric, limits_of, owned, render_launch
from k8s.version import MEND, OLDEST, too_old
from k8s.views import EventView, JobView, PodView, event_view, job_view, pod_view
from k8s.watch import PACE, ObjectWatcher, Sight, WatchedApi, WatchPace
from trainer.errors import LaunchError, LaunchRefused, LaunchUnknown
from trainer.failures import Failure
from trainer.launch import Finding, Launch, LaunchView, nothing

log = logging.getLogger(__name__)

SYNC_S = 5.0
UNKNOWN_S = 15.0
EVENTS_S = 5.0
FRESH_S = 10.0  # for a watch to show what this process has just made
PODS_ASKED = 3  # whose events are read while a launch waits


class Cluster(WatchedApi, Protocol):
    """What the launcher needs of ``k8s.api.Api``."""

    def create(self, path: str, body: Json, *, dry_run: bool = False) -> Json: ...

    def apply(self, path: str, body: Json, *, force: bool = False, dry_run: bool = False) -> Json: ...

    def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None: ...


@dataclass
class _Known:
    """What this process knows of a launch beside the watch."""

    limits: Limits = NO_LIMITS
    uid: str = ""
    made_at: float = 0.0
    settled: bool = False
    warned: bool = False
    events: tuple[EventView, ...] = ()
    events_at: float = -1e9
    blind: str = ""  # why its events cannot be read
    view: LaunchView | None = None
    view_of: tuple[Any, ...] = ()  # what ``view`` was made of


@dataclass
class _Eyes:
    """The two watches of a run."""

    jobs: ObjectWatcher[JobView]
    pods: ObjectWatcher[PodView]


class KubernetesLauncher:
    """Launches in one namespace of one cluster. ``clock`` and ``sleep`` may be injected."""

    detaches = True
    """A driver that is stopped leaves the gang running: Ctrl-C detaches."""

    def __init__(
        self,
        api: Cluster,
        namespace: str,
        *,
        pace: WatchPace = PACE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api, self._namespace, self._pace = api, namespace, pace
        self._clock, self._sleep = clock, sleep
        self._eyes: dict[str, _Eyes] = {}
        self._known: dict[str, _Known] = {}

    # --- the seam -----------------------------------------------------------------------------------------

    def ensure(self, launch: Launch) -> None:
        if launch.spec is None or launch.plan is None:
            raise LaunchError(f"launch {launch.launch_id} has no spec and plan to render; this is a bug of its caller")
        known = self._known.setdefault(launch.launch_id, _Known())
        seen = self._job(launch.launch_id)
        fresh = self._clock() - known.made_at < FRESH_S
        if known.settled and (seen.uid == known.uid if seen is not None else fresh):
            return
        check_fabric(launch.spec)
        job, service, secret = render_launch(
            launch.spec,
            launch.plan,
            run=launch.run,
            store_url=launch.store_url,
            launch=launch.launch_id,
            avoid=launch.avoid,
        )
        known.limits = limits_of(launch.spec, launch.plan, job)
        name = job["metadata"]["name"]
        found = self._find(name)
        if found is None:
            self._check_version()
            found = job_view(self._api.apply(self._path(JOBS, name), job))
            log.info("Job %s is created", name)
        self._check_ours(found, launch.launch_id)
        same = found.digest == job["metadata"]["annotations"][SPEC_DIGEST]
        if not same and not known.warned:
            known.warned = True
            log.warning("Job %s was rendered from another spec or version; it is adopted as it is", name)
        known.uid, known.made_at = found.uid, self._clock()
        if found.deleting or found.is_("Failed") or found.is_("Complete"):
            return
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        self._create(SECRETS, {**owned(secret, name, found.uid), "data": {"launch.key": key}}, found.uid)
        self._create(SERVICES, owned(service, name, found.uid), found.uid)
        if found.suspended and not found.queue and same:
            self._api.apply(self._path(JOBS, name), {**job, "spec": {**job["spec"], "suspend": False}})
        known.settled, known.made_at = True, self._clock()

    def observe(self, launch_id: str) -> LaunchView:
        eyes = self._look(launch_id)
        jobs, pods = eyes.jobs.sight(), eyes.pods.sight()
        failing = max(jobs.failing_s, pods.failing_s)
        if not (jobs.synced and pods.synced) or failing > UNKNOWN_S:
            error = jobs.error or pods.error or "nothing has been listed yet"
            return LaunchView(launch_id, "unknown", detail=f"the cluster does not answer: {error}")
        job = self._job(launch_id)
        known = self._known.setdefault(launch_id, _Known())
        if job is None:
            was = next((j for j in jobs.gone.values() if j.launch == label_value(launch_id) and j.ours), None)
            other = was is None or (known.uid and was.uid != known.uid)
            if known.uid and other and self._clock() - known.made_at < FRESH_S:
                return LaunchView(launch_id, "waiting", detail="its Job has just been made")
            if was is not None:
                loss = Finding(Failure.INFRA, f"Job {was.name} was deleted", "a new launch is made")
                return LaunchView(launch_id, "lost", detail=loss.text, loss=loss)
            return LaunchView(launch_id, "absent", detail=f"no Job of launch {launch_id} in {self._namespace}")
        view = self._view(launch_id, known, job, pods)
        if view.state in ("waiting", "lost") and self._clock() - known.events_at > EVENTS_S:
            known.events_at = self._clock()
            known.events, known.blind = self._events(job, list(pods.objects.values()))
            view = self._view(launch_id, known, job, pods)
        made_now = known.settled and known.uid == job.uid and self._clock() - known.made_at < FRESH_S
        if view.state == "waiting" and job.suspended and not job.queue and made_now:
            return replace(view, detail="its Job has just been made")  # as this process made it; the watch lags behind
        if view.state == "waiting" and known.blind:
            return replace(view, detail=f"{view.detail} (its events cannot be read: {known.blind})")
        return view

    def _view(self, launch_id: str, known: _Known, job: JobView, pods: Sight[PodView]) -> LaunchView:
        """Made anew only where something that it is made of has changed: the driver asks many times a second."""
        made_of = (job, pods.changes, known.events, known.limits)
        if known.view is None or known.view_of != made_of:
            here, gone = list(pods.objects.values()), list(pods.gone.values())
            known.view = launch_view(launch_id, job, here, gone, known.events, known.limits)
            known.view_of = made_of
        return known.view

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        eyes = self._look(launch_id)
        listed = self._api.get(JOBS.path(self._namespace), {"labelSelector": f"{LAUNCH}={label_value(launch_id)}"})
        uids = set()
        for raw in listed.get("items") or ():
            job = job_view(raw)
            if not job.ours:
                continue
            uids.add(job.uid)
            try:
                self._api.delete(self._path(JOBS, job.name), uid=job.uid)
                log.info("Job %s is deleted", job.name)
            except (Missing, Exists):
                continue  # gone, or another by now
        asked()
        deadline = self._clock() + grace_s
        while self._clock() < deadline:
            if not any(p.job_uid in uids for p in eyes.pods.sight().objects.values()):
                return
            self._sleep(0.1)

    def close(self) -> None:
        """Stop watching; whoever asks again watches anew."""
        for eyes in self._eyes.values():
            eyes.jobs.stop()
            eyes.pods.stop()
        self._eyes.clear()

    # --- inside -------------------------------------------------------------------------------------------

    def _look(self, launch_id: str) -> _Eyes:
        run = run_of(launch_id)
        eyes = self._eyes.get(run)
        if eyes is None:
            selector = f"{MANAGED_BY}={MANAGER},{RUN}={label_value(run)}"
            eyes = _Eyes(
                ObjectWatcher(self._api, JOBS, self._namespace, selector, job_view, self._pace),
                ObjectWatcher(self._api, PODS, self._namespace, selector, pod_view, self._pace),
            )
            eyes.jobs.start()
            eyes.pods.start()
            self._eyes[run] = eyes
            eyes.jobs.wait_synced(SYNC_S)
            eyes.pods.wait_synced(SYNC_S)
        return eyes

    def _job(self, launch_id: str) -> JobView | None:
        wanted = label_value(launch_id)
        sight = self._look(launch_id).jobs.sight()
        fitting = [j for j in sight.objects.values() if j.launch == wanted and j.ours]
        return max(fitting, key=lambda j: j.created, default=None)

    def _find(self, name: str) -> JobView | None:
        listed = self._api.get(JOBS.path(self._namespace), {"fieldSelector": f"metadata.name={name}"})
        items = listed.get("items") or ()
        return job_view(items[0]) if items else None

    def _check_version(self) -> None:
        """An older API server would drop what makes the agent a sidecar, and the pods would wait for its end."""
        try:
            version = str(self._api.get("/version").get("gitVersion", ""))
        except (Missing, NotAllowed):  # not everybody may ask
            return
        if too_old(version):
            raise LaunchRefused(f"Kubernetes {version} is older than {'.'.join(map(str, OLDEST))}; {MEND}")

    def _check_ours(self, job: JobView, launch_id: str) -> None:
        if not job.ours or job.launch != label_value(launch_id):
            raise ForeignObject(
                f"there is a Job {job.name} in namespace {self._namespace} that is not of launch {launch_id}; it is "
                "left alone: delete it, or give the spec another name"
            )

    def _create(self, resource: Resource, body: Json, job_uid: str) -> None:
        name = body["metadata"]["name"]
        try:
            self._api.create(resource.path(self._namespace), body)
        except Exists:
            self._check_owned(resource, self._api.get(self._path(resource, name)), job_uid)

    def _check_owned(self, resource: Resource, raw: Mapping[str, Any], job_uid: str) -> None:
        """Ours, and of this very Job; one of a Job that was deleted goes by itself soon."""
        meta = raw.get("metadata") or {}
        if any(o.get("uid") == job_uid for o in meta.get("ownerReferences") or ()):
            return
        name = meta.get("name")
        if (meta.get("labels") or {}).get(MANAGED_BY) == MANAGER and meta.get("ownerReferences"):
            raise LaunchUnknown(f"{resource.kind} {name} still belongs to a Job that was deleted; waiting for its end")
        raise ForeignObject(
            f"there is a {resource.kind} {name} in namespace {self._namespace} that hotstage did not make; it is left "
            "alone: delete it, or give the spec another name"
        )

    def _events(self, job: JobView, pods: Sequence[PodView]) -> tuple[tuple[EventView, ...], str]:
        """The newest events of the Job and of a few pods that wait; where they cannot be read none, and why."""
        waiting = [p.name for p in pods if p.job_uid == job.uid and p.phase == "Pending"][:PODS_ASKED]
        found: list[EventView] = []
        for kind, name in (("Job", job.name), *(("Pod", n) for n in waiting)):
            query = {"fieldSelector": f"involvedObject.kind={kind},involvedObject.name={name}", "limit": "50"}
            try:
                items = self._api.get(EVENTS.path(self._namespace), query).get("items") or ()
            except LaunchError as error:
                return tuple(found), str(error)
            found += [event_view(raw) for raw in sorted(items, key=_when)]
        return tuple(found), ""

    def _path(self, resource: Resource, name: str) -> str:
        return resource.path(self._namespace, name)


def run_of(launch_id: str) -> str:
    """``<run>-k<number>`` -> the run."""
    run, mark, number = launch_id.rpartition("-k")
    return run if mark and number.isdigit() else launch_id


def _when(raw: Json) -> str:
    return str(raw.get("lastTimestamp") or raw.get("eventTime") or (raw.get("metadata") or {}).get("creationTimestamp"))
