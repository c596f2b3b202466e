"""KubernetesLauncher against an API server in this process: order, adoption, strangers, silence (K1..K4)."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import Configuration, V1Job, V1Secret, V1Service

from flows.show.foretell import stand_in
from k8s.api import Api
from k8s.errors import ApiUnavailable, ForeignObject, Invalid, NotAllowed, QuotaFull
from k8s.kubeconfig import Access
from k8s.labels import LAUNCH, SPEC_DIGEST
from k8s.launcher import KubernetesLauncher, run_of
from k8s.watch import WatchPace
from tests.k8s.api_server import ApiServer
from tests.k8s.test_render import TINY
from tests.k8s.test_watch import until
from trainer.errors import LaunchRefused
from trainer.launch import Launch
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest

QUICK = WatchPace(watch_s=2.0, idle_s=5.0, backoff_s=0.05, backoff_max_s=0.4, stable_s=0.3)
AT = "/apis/batch/v1/namespaces/train/jobs"
PODS_AT = "/api/v1/namespaces/train/pods"
NAME = "tiny-0a1b2c-k1"


def launch_named(name: str = NAME, **launch: Any) -> Launch:
    spec = parse_spec({**TINY, "launch": {**TINY["launch"], **launch}})  # type: ignore[dict-item]
    data = stand_in(spec)
    spec = spec.resolve(data)
    plan = compile_plan(spec, data, what_digest(spec, data))
    return Launch("tiny-0a1b2c", name, 2, "s3://b/p", Path("out"), spec=spec, plan=plan)


LAUNCH_OF = launch_named()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


def connect(server: ApiServer) -> KubernetesLauncher:
    configuration = Configuration()
    configuration.host = server.url
    return KubernetesLauncher(Api(Access(configuration)), "train", pace=QUICK)


@pytest.fixture
def launcher(server: ApiServer) -> Iterator[KubernetesLauncher]:
    made = connect(server)
    yield made
    made.close()


def state_of(launcher: KubernetesLauncher, name: str = NAME) -> str:
    return launcher.observe(name).state


def run_pods(server: ApiServer, **status: Any) -> list[str]:
    return server.make_pods("train", server.named("jobs")[NAME], **status)


def test_a_launch_is_made_in_order_and_starts_only_when_whole(server: ApiServer, launcher: KubernetesLauncher) -> None:
    assert state_of(launcher) == "absent"
    launcher.ensure(LAUNCH_OF)
    job, service = server.named("jobs")[NAME], server.named("services")[NAME]
    secret = server.named("secrets")[f"{NAME}-key"]
    for item in (secret, service):
        assert item["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    writes = [(b["kind"], b.get("spec", {}).get("suspend")) for _, _, b in server.bodies]
    assert writes == [("Job", True), ("Secret", None), ("Service", None), ("Job", False)]
    assert len(base64.b64decode(secret["data"]["launch.key"])) == 32
    V1Job.model_validate(server.bodies[0][2])
    V1Secret.model_validate(server.bodies[1][2])
    V1Service.model_validate(server.bodies[2][2])
    assert state_of(launcher) == "waiting"
    run_pods(server)
    until(lambda: state_of(launcher) == "running", "the pods to run")
    assert [n.place for n in launcher.observe(NAME).nodes] == ["machine-0", "machine-1"]


def test_ensure_again_asks_nothing(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    until(lambda: state_of(launcher) == "waiting", "the Job to be seen")
    before = sum(n for (_, kind, _), n in server.requests.items() if kind in ("write", "get"))
    for _ in range(50):
        launcher.ensure(LAUNCH_OF)
    assert sum(n for (_, kind, _), n in server.requests.items() if kind in ("write", "get")) == before


def test_the_launch_key_is_made_once_and_never_logged(
    server: ApiServer, launcher: KubernetesLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    launcher.ensure(LAUNCH_OF)
    key = server.named("secrets")[f"{NAME}-key"]["data"]["launch.key"]
    second = connect(server)  # another driver
    second.ensure(LAUNCH_OF)
    second.close()
    assert server.named("secrets")[f"{NAME}-key"]["data"]["launch.key"] == key
    assert key not in caplog.text


@pytest.mark.parametrize("dies_before", ["secrets", "services", "jobs"])
def test_a_driver_that_died_halfway_is_continued(
    server: ApiServer, launcher: KubernetesLauncher, dies_before: str
) -> None:
    """Where the first driver could not write ``dies_before`` (its second write, for the Job), the next one goes on."""
    verb = {"secrets": "create", "services": "create", "jobs": "patch"}[dies_before]
    if dies_before == "jobs":
        launcher.ensure(LAUNCH_OF)
        job = server.named("jobs")[NAME]
        server.put(AT, {**job, "spec": {**job["spec"], "suspend": True}})
    else:
        server.denied.add((verb, dies_before))
        with pytest.raises(NotAllowed, match="hotstage-launcher"):
            launcher.ensure(LAUNCH_OF)
        server.denied.clear()
    second = connect(server)
    second.ensure(LAUNCH_OF)
    second.close()
    assert server.named("jobs")[NAME]["spec"]["suspend"] is False
    assert set(server.named("secrets")) == {f"{NAME}-key"}
    assert set(server.named("services")) == {NAME}


@pytest.mark.parametrize("plural", ["jobs", "secrets", "services"])
def test_an_object_of_somebody_else_is_never_touched(
    server: ApiServer, launcher: KubernetesLauncher, plural: str
) -> None:
    name = f"{NAME}-key" if plural == "secrets" else NAME
    path = AT if plural == "jobs" else f"/api/v1/namespaces/train/{plural}"
    theirs = server.put(path, {"metadata": {"name": name, "labels": {"app": "theirs"}}, "data": {"x": "eQ=="}})
    with pytest.raises(ForeignObject, match="left alone") as refused:
        launcher.ensure(LAUNCH_OF)
    assert refused.value.exit_code == 78
    assert server.named(plural)[name] == theirs
    launcher.stop(NAME, 0.0)
    assert server.named(plural).get(name) == theirs


def test_a_job_of_another_launch_behind_the_same_name_is_somebody_elses(
    server: ApiServer, launcher: KubernetesLauncher
) -> None:
    launcher.ensure(LAUNCH_OF)
    job = server.named("jobs")[NAME]
    job["metadata"]["labels"][LAUNCH] = "another"
    server.put(AT, job)
    second = connect(server)
    with pytest.raises(ForeignObject):
        second.ensure(LAUNCH_OF)
    second.close()


def test_another_rendering_of_the_same_launch_is_adopted_with_a_warning(
    server: ApiServer, launcher: KubernetesLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    launcher.ensure(LAUNCH_OF)
    was = server.named("jobs")[NAME]["metadata"]["annotations"][SPEC_DIGEST]
    second = connect(server)
    second.ensure(launch_named(image="other:2"))
    second.close()
    assert "another spec or version" in caplog.text
    assert server.named("jobs")[NAME]["metadata"]["annotations"][SPEC_DIGEST] == was


def test_a_queue_leaves_the_job_suspended_for_kueue(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(launch_named(queue="team"))
    job = server.named("jobs")[NAME]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["suspend"] is True
    until(lambda: "queue team" in launcher.observe(NAME).detail, "it to be told")
    assert state_of(launcher) == "waiting"


def test_a_job_that_has_just_been_made_is_not_held_back_by_anybody(server: ApiServer) -> None:
    """The watch shows it suspended for a moment, as it was made; each start told of Kueue."""
    now = [100.0]
    configuration = Configuration()
    configuration.host = server.url
    launcher = KubernetesLauncher(Api(Access(configuration)), "train", pace=QUICK, clock=lambda: now[0])
    launcher.ensure(LAUNCH_OF)
    job = server.named("jobs")[NAME]
    server.put(AT, {**job, "spec": {**job["spec"], "suspend": True}})
    until(lambda: launcher.observe(NAME).detail == "its Job has just been made", "what a start looks like")
    now[0] += 11.0
    assert "kubectl patch job" in launcher.observe(NAME).detail
    launcher.close()


def test_machines_with_strikes_are_left_out(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(replace(LAUNCH_OF, avoid=("b", "a")))
    affinity = server.named("jobs")[NAME]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(f["operator"], f["values"]) for f in term["matchFields"]] == [("NotIn", ["a"]), ("NotIn", ["b"])]


def test_a_lost_pod_is_a_lost_launch(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    names = run_pods(server)
    until(lambda: state_of(launcher) == "running", "the pods to run")
    server.remove(PODS_AT, names[1])
    until(lambda: state_of(launcher) == "lost", "the loss")
    view = launcher.observe(NAME)
    assert view.loss is not None
    assert (view.loss.cls, view.loss.node, view.loss.place) == ("infra", 1, "machine-1")
    assert [n.alive for n in view.nodes] == [True, False]


def test_quota_is_told_from_the_jobs_events(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    server.put(
        "/api/v1/namespaces/train/events",
        {
            "metadata": {"name": "e1"},
            "involvedObject": {"kind": "Job", "name": NAME},
            "reason": "FailedCreate",
            "type": "Warning",
            "message": "pods is forbidden: exceeded quota: small, requested: cpu=4",
        },
    )
    second = connect(server)  # whose first look at the events is not behind it
    until(lambda: "exceeded quota: small" in second.observe(NAME).detail, "the event")
    assert "raise the quota" in second.observe(NAME).detail
    for _ in range(50):
        second.observe(NAME)
    second.close()
    assert server.count("GET", "list", "events") <= 2


def test_events_that_may_not_be_read_are_told_with_what_it_waits_for(
    server: ApiServer, launcher: KubernetesLauncher
) -> None:
    server.denied.add(("list", "events"))
    launcher.ensure(LAUNCH_OF)
    words = "its pods are not created yet (its events cannot be read: "
    until(lambda: words in launcher.observe(NAME).detail, "what it waits for to be told")
    detail = launcher.observe(NAME).detail
    assert "apply the Role `hotstage-launcher`" in detail


def test_a_deleted_job_is_a_loss(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    run_pods(server)
    until(lambda: state_of(launcher) == "running", "the pods to run")
    server.remove(AT, NAME)
    until(lambda: state_of(launcher) == "lost", "the loss")
    assert server.named("secrets") == {}  # owned


def test_stop_deletes_by_uid(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    run_pods(server)
    uid = server.named("jobs")[NAME]["metadata"]["uid"]
    launcher.stop(NAME, 5.0)
    assert server.named("jobs") == server.named("pods") == server.named("secrets") == server.named("services") == {}
    assert [b["preconditions"] for m, _, b in server.bodies if m == "DELETE"] == [{"uid": uid}]
    launcher.stop(NAME, 0.0)  # again: nothing there


def test_an_api_server_that_is_away_is_unknown(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = connect(server)
    monkeypatch.setattr("k8s.launcher.UNKNOWN_S", 0.2)
    monkeypatch.setattr("k8s.launcher.SYNC_S", 0.2)
    launcher.ensure(LAUNCH_OF)
    run_pods(server)
    until(lambda: state_of(launcher) == "running", "the pods to run")
    for kind in ("list", "watch", "get", "write"):
        server.storms[kind] = (500, "etcd is away")
    server.compact()
    until(lambda: state_of(launcher) == "unknown", "it to be unknown")
    assert "etcd is away" in launcher.observe(NAME).detail
    launcher.ensure(LAUNCH_OF)  # nothing to ask
    with pytest.raises(ApiUnavailable):
        launcher.ensure(launch_named("tiny-0a1b2c-k2"))
    server.storms.clear()
    until(lambda: state_of(launcher) == "running", "it to be back")
    launcher.close()
    stranger = KubernetesLauncher(Api(Access(_nowhere())), "train", pace=QUICK)
    assert stranger.observe("other-k1").state == "unknown"
    stranger.close()


def _nowhere() -> Configuration:
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:9"
    return configuration


def test_a_view_is_made_anew_only_where_something_changed(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    names = run_pods(server)
    until(lambda: state_of(launcher) == "running", "the pods to run")
    view = launcher.observe(NAME)
    assert launcher.observe(NAME) is view
    server.put(PODS_AT, server.named("pods")[names[0]])  # a new version of the object, and nothing new in it
    server.change(PODS_AT, names[1], phase="Failed")
    until(lambda: launcher.observe(NAME) is not view, "the change")
    assert launcher.observe(NAME).state == "lost"


def test_a_thousand_nodes(server: ApiServer, launcher: KubernetesLauncher) -> None:
    launcher.ensure(LAUNCH_OF)
    job = server.named("jobs")[NAME]
    job["spec"]["completions"] = job["spec"]["parallelism"] = 1000
    server.put(AT, job)
    names = run_pods(server)
    until(lambda: state_of(launcher) == "running", "a thousand pods", 60.0)
    asked = server.count("GET", "list", "pods")
    server.change(PODS_AT, names[617], phase="Failed")
    until(lambda: state_of(launcher) == "lost", "one of them")
    loss = launcher.observe(NAME).loss
    assert loss is not None
    assert loss.node == 617
    assert server.count("GET", "list", "pods") == asked


def test_names() -> None:
    assert run_of("tiny-0a1b2c-k12") == "tiny-0a1b2c"
    assert run_of("odd") == "odd"


def test_a_quota_without_room_is_waited_for_and_one_that_never_has_any_is_not(
    server: ApiServer, launcher: KubernetesLauncher
) -> None:
    said = (
        "jobs.batch is forbidden: exceeded quota: q, requested: count/jobs.batch=1, used: count/jobs.batch=3, limited: "
    )
    server.storms["write"] = (403, f"{said}count/jobs.batch=3")
    with pytest.raises(QuotaFull, match="raise the quota, end what uses it"):
        launcher.ensure(LAUNCH_OF)
    server.storms["write"] = (403, f"{said}count/jobs.batch=0")
    with pytest.raises(
        Invalid, match=r"it never fits: 1 of count/jobs.batch is asked for at once, the whole quota is 0"
    ):
        launcher.ensure(LAUNCH_OF)
    server.storms.clear()
    launcher.ensure(LAUNCH_OF)
    assert set(server.named("jobs")) == {NAME}


def test_a_fabric_that_is_not_run_is_refused_before_anything_is_made(
    server: ApiServer, launcher: KubernetesLauncher
) -> None:
    with pytest.raises(
        LaunchRefused, match=r"launch\.fabric = 'efa' is for ranks on GPUs alone; set launch\.fabric = 'tcp'"
    ):
        launcher.ensure(launch_named(fabric="efa"))
    assert server.count("PATCH", "write", "jobs") == 0


def test_a_namespace_that_is_not_there_is_refused_with_its_command(
    server: ApiServer, launcher: KubernetesLauncher
) -> None:
    server.storms["write"] = (404, 'namespaces "train" not found')
    with pytest.raises(Invalid, match=r"create it \(kubectl create namespace train\), or correct launch\.namespace"):
        launcher.ensure(LAUNCH_OF)
