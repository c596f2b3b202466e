"""The Role is least: without any one of its pairs something fails, and says which verb is missing and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from k8s.api import PODS, Api
from k8s.doctor import RIGHTS, ROLE, RunNeeds, examine
from k8s.errors import Missing, NotAllowed
from k8s.launcher import KubernetesLauncher
from tests.cluster.cluster import Cluster
from tests.cluster.gang import until
from tests.k8s.test_launcher import launch_named
from trainer.launch import Launch

PAIRS = [(group, resource, verb) for group, resource, verbs in RIGHTS for verb in verbs]


@pytest.fixture(scope="module")
def namespace(standing: Cluster) -> Iterator[str]:
    with standing.namespace("least") as name:
        yield name


@pytest.fixture(scope="module")
def whole(standing: Cluster, namespace: str) -> Iterator[KubernetesLauncher]:
    """The launcher of an account that has the Role."""
    launcher, _ = connect(standing, namespace, "whole")
    yield launcher
    launcher.close()


def connect(cluster: Cluster, namespace: str, name: str, without: int | None = None) -> tuple[KubernetesLauncher, Api]:
    """An account with all pairs but one."""
    kept = [pair for number, pair in enumerate(PAIRS) if number != without]
    rules = [{"apiGroups": [group], "resources": [what], "verbs": [verb]} for group, what, verb in kept]
    api = Api.load(str(cluster.account(namespace, name, rules)))
    return KubernetesLauncher(api, namespace), api


# --- what needs a right: each gives what it says to a person --------------------------------------------------


def launches(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    launcher.ensure(launch)
    return ""


def adopts(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    whole.ensure(launch)
    launcher.ensure(launch)
    return ""


def stops(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    whole.ensure(launch)
    launcher.stop(launch.launch_id, 0.0)
    return ""


def sees(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    """What it says of a launch that waits; a watch that is refused is noticed after a while."""
    whole.ensure(launch)
    until(lambda: launcher.observe(launch.launch_id).detail, "a word")
    until(lambda: launcher.observe(launch.launch_id).state == "unknown", "it not to be seen")
    return launcher.observe(launch.launch_id).detail


def explains(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    whole.ensure(launch)
    until(lambda: launcher.observe(launch.launch_id).state == "waiting", "it to be seen")
    return launcher.observe(launch.launch_id).detail


def logs(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    try:
        api.text(PODS.path(launch.spec.launch.namespace, "none", "log"))  # type: ignore[union-attr]
    except Missing:
        return ""
    raise AssertionError("there is no such pod")


def examines(launcher: KubernetesLauncher, api: Api, launch: Launch, whole: KubernetesLauncher) -> str:
    found = examine(api, RunNeeds(launch.spec.launch.namespace))  # type: ignore[union-attr]
    return " ".join(c.text for c in found if c.name in ("namespace", "quota") and c.verdict == "unknown")


NEEDED_BY: dict[tuple[str, str], Callable[[KubernetesLauncher, Api, Launch, KubernetesLauncher], str]] = {
    ("jobs", "list"): launches,
    ("jobs", "watch"): sees,
    ("jobs", "create"): launches,
    ("jobs", "patch"): launches,
    ("jobs", "delete"): stops,
    ("pods", "list"): sees,
    ("pods", "watch"): sees,
    ("pods/log", "get"): logs,
    ("services", "create"): launches,
    ("services", "get"): adopts,
    ("secrets", "create"): launches,
    ("secrets", "get"): adopts,
    ("events", "list"): explains,
    ("resourcequotas", "list"): examines,
    ("namespaces", "get"): examines,
}


def test_every_pair_has_its_operation() -> None:
    assert set(NEEDED_BY) == {(resource, verb) for _, resource, verb in PAIRS}
    assert len(PAIRS) <= 15


def test_with_all_pairs_nothing_is_refused(namespace: str, whole: KubernetesLauncher, cluster: Cluster) -> None:
    launcher, api = connect(cluster, namespace, "another")
    launch = launch_named("tiny-0a1b2c-k100", namespace=namespace, queue="nobody")
    try:
        for operation in (launches, adopts, logs, examines, explains, stops):
            assert "forbidden" not in operation(launcher, api, launch, whole)
    finally:
        launcher.close()


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: f"{PAIRS[n][2]} {PAIRS[n][1]}")
def test_without_one_pair_something_says_so(
    cluster: Cluster, namespace: str, whole: KubernetesLauncher, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # how long silence is borne, shortened
    monkeypatch.setattr("k8s.launcher.UNKNOWN_S", 0.5)
    monkeypatch.setattr("k8s.launcher.SYNC_S", 1.0)
    _, resource, verb = PAIRS[number]
    launcher, api = connect(cluster, namespace, f"without-{number}", number)
    # suspended for a queue that is nobody's: no pod is made
    launch = launch_named(f"tiny-0a1b2c-k{number + 1}", namespace=namespace, queue="nobody")
    try:
        said = NEEDED_BY[resource, verb](launcher, api, launch, whole)
    except NotAllowed as error:
        said = str(error)
    finally:
        launcher.close()
    assert f'cannot {verb} resource "{resource}"' in said
    assert f"apply the Role `{ROLE}`" in said
