"""Quotas and limit ranges against a launch's pods, by the API server's rules; tests/cluster/test_quotas.py has the
same cases judged by a real one.
"""

from __future__ import annotations

from typing import Any

import pytest

from k8s.quota import QuotaProblem, charges, of_pod, quota_problems, range_problems, uses
from k8s.refusal import refusal
from tests.k8s.test_render import rendered

GPU = "nvidia.com/gpu"
BOTH = {"resources": {"cpu": "2", "limits.cpu": "4"}, "agent_resources": {"cpu": "500m", "limits.cpu": "1"}}


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    status = {"hard": hard, "used": used or dict.fromkeys(hard, "0")}
    return {"metadata": {"name": "team"}, "spec": {"hard": hard, **spec}, "status": status}


def limits(kind: str = "Container", **bounds: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"name": "bounds"}, "spec": {"limits": [{"type": kind, **bounds}]}}


def judged(item: dict[str, Any], *ranges: dict[str, Any], **launch: Any) -> list[QuotaProblem]:
    return quota_problems(item, rendered(**launch)[0], ranges)


def bounded(item: dict[str, Any], **launch: Any) -> list[QuotaProblem]:
    return range_problems(item, rendered(**launch)[0]["spec"]["template"]["spec"], [item])


# --- what a quota counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "names", "mend"),
    [
        ("limits.cpu", "engine", 'launch.resources."limits.cpu" and launch.agent_resources."limits.cpu"'),
        ("requests.cpu", "agent", "launch.resources.cpu and launch.agent_resources.cpu"),
        ("cpu", "agent", "launch.resources.cpu and launch.agent_resources.cpu"),
    ],
)
def test_what_pods_must_say_and_ours_do_not(key: str, names: str, mend: str) -> None:
    (problem,) = judged(quota({key: "100"}))
    assert problem.never
    assert f"quota team counts {key} and containers agent, engine set none" in problem.text
    assert f"set {mend}" in problem.mend
    assert judged(quota({key: "100"}), **BOTH) == []


def test_a_container_of_the_patch_must_say_it_too() -> None:
    patch = {"containers": [{"name": "watcher", "image": "w:1"}]}
    (problem,) = judged(quota({"limits.memory": "100Gi"}), pod_patch=patch)
    assert "container watcher sets none" in problem.text
    assert 'launch.pod_patch, container watcher: resources."limits.memory"' not in problem.mend
    assert "launch.pod_patch, container watcher: resources.memory" in problem.mend


@pytest.mark.parametrize(
    "key", ["limits.ephemeral-storage", "requests.ephemeral-storage", f"requests.{GPU}", "count/x.y"]
)
def test_what_nobody_has_to_say(key: str) -> None:
    assert judged(quota({key: "0"})) == []


def test_a_limit_range_says_it_for_them() -> None:
    default = limits(default={"cpu": "2"}, defaultRequest={"cpu": "1"})
    assert judged(quota({"limits.cpu": "8", "requests.cpu": "4"}), default) == []
    (problem,) = judged(quota({"limits.cpu": "7"}), default)
    assert "has 7 of limits.cpu in total, the run asks for 8" in problem.text


@pytest.mark.parametrize(
    ("hard", "used", "text", "mend", "never"),
    [
        ({"pods": "1e3"}, {}, "", "", False),
        ({"pods": "3"}, {"pods": "2"}, "leaves 1 of pods, the run asks for 2", "launch.nodes", False),
        ({"pods": "1"}, {}, "has 1 of pods in total, the run asks for 2", "launch.nodes", False),
        ({"pods": "0"}, {}, "has 0 of pods in total, and one pod asks for 1", "launch.nodes", True),
        ({"count/pods": "1"}, {}, "has 1 of count/pods in total", "launch.nodes", False),
        (
            {"count/jobs.batch": "1"},
            {"count/jobs.batch": "1"},
            "leaves 0 of count/jobs.batch",
            "end what uses it",
            False,
        ),
        ({"count/jobs.batch": "0"}, {}, "has 0 of count/jobs.batch in total, and one launch asks for 1", "raise", True),
        ({"services": "0"}, {}, "services in total", "raise the quota", True),
        ({"count/secrets": "5"}, {"count/secrets": "5"}, "leaves 0 of count/secrets", "raise the quota", False),
        ({"secrets": "5"}, {"secrets": "4"}, "", "", False),
        ({"limits.cpu": "9999m"}, {}, "has 9999m of limits.cpu in total, the run asks for 10", '"limits.cpu"', False),
        ({"limits.cpu": "1e1"}, {}, "", "", False),
        ({"limits.cpu": "10"}, {"limits.cpu": "1m"}, "leaves 9999m of limits.cpu", "end what uses it", False),
        ({"requests.cpu": "2.4"}, {}, "has 2400m of requests.cpu in total, and one pod asks for 2500m", "cpu", True),
        ({"requests.memory": "1Gi"}, {}, "1Gi of requests.memory", "launch.resources.memory", False),
        ({"memory": "1E"}, {}, "", "", False),
    ],
)
def test_room(hard: dict[str, str], used: dict[str, str], text: str, mend: str, never: bool) -> None:
    found = judged(quota(hard, {**dict.fromkeys(hard, "0"), **used}), **BOTH)
    assert len(found) == bool(text), found
    for problem in found:
        assert text in problem.text
        assert mend in problem.mend
        assert problem.never is never


def test_devices_and_storage_are_counted_where_they_are_asked_for() -> None:
    asked = {"resources": {GPU: "4", "ephemeral-storage": "10Gi", "limits.ephemeral-storage": "20Gi"}}
    for hard in (
        {f"requests.{GPU}": "7"},
        {"requests.ephemeral-storage": "19Gi"},
        {"limits.ephemeral-storage": "39Gi"},
    ):
        (problem,) = judged(quota(hard), **asked)
        assert next(iter(hard)) in problem.text
    ample = {f"requests.{GPU}": "8", "ephemeral-storage": "20Gi", "limits.ephemeral-storage": "40Gi"}
    assert judged(quota(ample), **asked) == []


def test_an_overdrawn_quota_of_what_is_not_asked_for_is_no_matter() -> None:
    assert judged(quota({f"requests.{GPU}": "1"}, {f"requests.{GPU}": "2"})) == []


def test_a_quota_whose_status_is_not_there_yet_counts_by_its_spec() -> None:
    item = quota({"pods": "1"})
    del item["status"]
    assert "has 1 of pods" in judged(item)[0].text


@pytest.mark.parametrize(
    ("spec", "launch", "counts"),
    [
        ({"scopes": ["NotTerminating"]}, {}, True),
        ({"scopes": ["Terminating"]}, {}, False),
        ({"scopes": ["Terminating"]}, {"pod_patch": {"activeDeadlineSeconds": 60}}, True),
        ({"scopes": ["BestEffort"]}, {}, False),
        ({"scopes": ["NotBestEffort", "NotTerminating"]}, {}, True),
        ({"scopes": ["NotBestEffort", "Terminating"]}, {}, False),
        ({"scopes": ["PriorityClass"]}, {}, False),
        ({"scopes": ["PriorityClass"]}, {"priority_class": "low"}, True),
        ({"scopes": ["CrossNamespacePodAffinity"]}, {}, False),
        ({"scopes": ["SomethingNew"]}, {}, False),
        *(
            ({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", **rule}]}}, launch, counts)
            for rule, launch, counts in (
                ({"operator": "In", "values": ["low", "high"]}, {"priority_class": "low"}, True),
                ({"operator": "In", "values": ["high"]}, {"priority_class": "low"}, False),
                ({"operator": "In", "values": ["high"]}, {}, False),
                ({"operator": "NotIn", "values": ["high"]}, {"priority_class": "low"}, True),
                ({"operator": "NotIn", "values": ["high"]}, {}, True),
                ({"operator": "DoesNotExist"}, {}, True),
                ({"operator": "Exists"}, {"priority_class": "low"}, True),
            )
        ),
    ],
)
def test_scopes(spec: dict[str, Any], launch: dict[str, Any], counts: bool) -> None:
    assert bool(judged(quota({"pods": "1"}, **spec), **launch)) is counts
    # objects beside the pods have no scope
    assert judged(quota({"count/jobs.batch": "0"}, **spec), **launch) == []


def test_a_plain_init_container_counts_beside_the_sidecars_only() -> None:
    pod = {
        "initContainers": [
            {"name": "agent", "restartPolicy": "Always", "resources": {"requests": {"cpu": "1"}}},
            {"name": "once", "resources": {"requests": {"cpu": "3"}, "limits": {"memory": "1Gi"}}},
        ],
        "containers": [{"name": "engine", "resources": {"requests": {"cpu": "2"}, "limits": {GPU: "1"}}}],
    }
    total = of_pod(uses(pod))
    assert total.requests == {"cpu": 4, "memory": 1 << 30, GPU: 1}
    assert charges(total)[f"requests.{GPU}"] == 1
    assert f"limits.{GPU}" not in charges(total)


def test_what_is_no_quantity_is_said() -> None:
    with pytest.raises(ValueError, match="'1x' is no quantity"):
        judged(quota({"pods": "1x"}))


# --- limit ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "launch", "texts"),
    [
        (limits(max={"cpu": "8"}), {}, ["8 cpu; container agent has no limit", "8 cpu; container engine has no limit"]),
        (limits(max={"cpu": "4"}), BOTH, []),
        (limits(max={"cpu": "3"}), BOTH, ["at most 3 cpu; container engine has a limit of 4"]),
        (limits(min={"cpu": "1"}), BOTH, ["at least 1 cpu; container agent requests 500m"]),
        (limits(min={"cpu": "1"}), {"resources": {"cpu": "1"}}, ["at least 1 cpu; container agent requests none"]),
        (limits(min={"cpu": "1.5"}), BOTH, ["container agent requests 500m"]),
        (limits(min={GPU: "1"}), {"resources": {GPU: "1"}}, ["container agent requests none"]),
        (limits(max={"memory": "2Ti"}, min={"memory": "1Mi"}), {}, []),
        (limits(maxLimitRequestRatio={"memory": "1"}), {}, []),
        (
            limits(maxLimitRequestRatio={"cpu": "1.5"}),
            BOTH,
            ["3/2 requests of cpu; container agent has 1 for 500m", "container engine has 4 for 2"],
        ),
        (limits(maxLimitRequestRatio={"cpu": "2"}), BOTH, []),
        (limits("Pod", max={"cpu": "5"}), BOTH, []),
        (limits("Pod", max={"cpu": "4.9"}), BOTH, ["at most 4900m cpu; the pod has a limit of 5"]),
        (limits("PersistentVolumeClaim", max={"storage": "1"}), {}, []),
        (limits(default={"cpu": "1"}), {}, []),
        (
            limits(default={"cpu": "1"}, defaultRequest={"cpu": "500m"}),
            {"resources": {"cpu": "2"}},
            ["limits container engine to 1 cpu, and it requests 2"],
        ),
    ],
)
def test_limit_ranges(item: dict[str, Any], launch: dict[str, Any], texts: list[str]) -> None:
    found = bounded(item, **launch)
    assert len(found) == len(texts), found
    for problem, text in zip(found, texts, strict=True):
        assert problem.never
        assert text in problem.text
        assert "launch." in problem.mend


# --- what is rendered -----------------------------------------------------------------------------------------


def test_a_plain_key_is_a_request_and_a_named_side_is_that_side() -> None:
    given = {"cpu": "2", "limits.cpu": "4", GPU: "8", "memory": "4Gi", "requests.memory": "3Gi", "hugepages-2Mi": "1Gi"}
    (engine,) = rendered(resources=given)[0]["spec"]["template"]["spec"]["containers"]
    assert engine["resources"] == {
        "requests": {"cpu": "2", GPU: "8", "memory": "3Gi", "hugepages-2Mi": "1Gi"},
        "limits": {"cpu": "4", GPU: "8", "memory": "4Gi", "hugepages-2Mi": "1Gi"},
    }


# --- the server's words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind", "waits", "mend"),
    [
        (
            'pods "x" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1',
            "quota", True, "raise the quota, end what uses it",
        ),
        (
            'pods "x" is forbidden: exceeded quota: q, requested: limits.cpu=5,requests.nvidia.com/gpu=1, '
            "used: limits.cpu=0,requests.nvidia.com/gpu=0, limited: limits.cpu=2500m,requests.nvidia.com/gpu=4",
            "quota", False, '5 of limits.cpu is asked for at once, the whole quota is 2500m; raise quota q or lower '
            'launch.resources."limits.cpu"',
        ),
        (
            'jobs.batch "x" is forbidden: exceeded quota: q, requested: count/jobs.batch=1, used: count/jobs.batch=0, '
            "limited: count/jobs.batch=0",
            "quota", False, "raise quota q",
        ),
        (
            'pods is forbidden: failed quota: q: must specify limits.cpu for: agent,engine; requests.cpu for: agent',
            "unset", False, 'launch.resources."limits.cpu" and launch.agent_resources."limits.cpu", '
            "launch.agent_resources.cpu",
        ),
        ('pods is forbidden: failed quota: q: must specify limits.cpu', "unset", False, "set limits.cpu in launch."),
        (
            'pods "x" is forbidden: [maximum cpu usage per Container is 1.  No limit is specified, minimum memory '
            "usage per Container is 1Gi, but request is 200Mi]",
            "range", False, 'at most 1, set launch.resources.memory and launch.agent_resources.memory to at least 1Gi',
        ),
        (
            'pods "x" is forbidden: cpu max limit to request ratio per Container is 2, but provided ratio is 8.000000',
            "range", False, "bring request and limit of cpu closer together",
        ),
        (
            'Pod "x" is invalid: spec.containers[0].resources.requests: Invalid value: "2": must be less than or equal '
            "to cpu limit of 1",
            "range", False, 'set launch.resources."limits.cpu" and launch.agent_resources."limits.cpu"',
        ),
        ('pods "x" is forbidden: no PriorityClass with name high was found', "admission", False,
         "create that PriorityClass, or correct launch.priority_class"),
        ('pods "x" is forbidden: pod rejected: RuntimeClass "nvidia" not found', "admission", False,
         "create that RuntimeClass, or correct launch.runtime_class"),
        ('pods "x" is forbidden: unable to validate against any security context constraint: [provider "anyuid": '
         "Forbidden: not usable by user or serviceaccount]", "security", False, "runAsGroup and fsGroup null"),
        ('pods "x" is forbidden: status unknown for quota: q, resources: pods', "admission", True, "it is asked again"),
        ('pods "x" is forbidden: unable to create new content in namespace a because it is being terminated',
         "admission", False, "the namespace is being deleted: take another one (launch.namespace)"),
        ("pods \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no latest tag",
         "admission", False, "the message says what to change"),
        ('pods "x" is forbidden: pod node label selector conflicts with its namespace node label selector',
         "admission", False, "the message says what to change"),
        ('Internal error occurred: failed calling webhook "validate.kyverno.svc-fail": failed to call webhook: Post '
         '"https://kyverno-svc.kyverno.svc:443/validate/fail?timeout=10s": no endpoints available', "admission", True,
         "a webhook of the cluster does not answer: tell whoever runs it"),
        ('pods "x" is forbidden: insufficient quota to match these scopes: [{PriorityClass In [high]}]', "unset", False,
         "ask for one"),
    ],
)  # fmt: skip
def test_the_servers_words_are_read_once(message: str, kind: str, waits: bool, mend: str) -> None:
    found = refusal(message)
    assert found is not None
    assert (found.kind, found.waits) == (kind, waits)
    assert mend in found.mend


def test_other_words_are_none_of_them() -> None:
    assert refusal('pods is forbidden: User "u" cannot create resource "pods"') is None
    assert refusal('pods "x" is forbidden: user "u" cannot create pods: RBAC: clusterrole "y" not found') is None
    assert refusal("") is None


def test_amounts_are_exact_to_the_thousandth_that_the_server_keeps() -> None:
    third = {"resources": {"cpu": "333333333n", "limits.cpu": "1"}, "agent_resources": {"cpu": "0"}}
    assert judged(quota({"requests.cpu": "668m"}), **third) == []
    assert judged(quota({"requests.cpu": "667m"}), **third) != []
