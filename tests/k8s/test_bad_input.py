"""What a person can get wrong about a cluster: `hotstage train` says the value, the limit and the mend, and leaves."""

from __future__ import annotations

import pytest

from tests.k8s.api_server import ApiServer
from tests.k8s.test_gang import SETS, train
from tests.k8s.test_watch import until
from tests.support.place import Place

REFUSED = 78
JOBS_AT = "/apis/batch/v1/namespaces/train/jobs"


def refused(place: Place, *sets: str) -> str:
    """What it says; one line of an error, no trace of the code."""
    more = [item for text in sets for item in ("--set", text)]
    done = place.here("train", "spec.toml", "--no-prefect", "--json", *SETS, *more)
    assert done.code == REFUSED, done.err
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (
            ["name=A_label"],
            ["name 'A_label' is no name; take lower-case letters, digits and inner dashes, a letter first"],
        ),
        ([f"name={'x' * 41}"], ["x" * 41, "at most 40"]),
        (
            ["launch.namespace=Team_A"],
            ["launch.namespace 'Team_A' is no name; take lower-case letters", "at most 63"],
        ),
        (
            ["launch.resources.cpu=many"],
            ["launch.resources.cpu = 'many' is no quantity; write for example 4, 500m, 16Gi"],
        ),
        (["launch.agent_resources.memory=8Mi"], ["launch.agent_resources.memory = 8Mi is less than the"]),
        (['launch.resources.cpu="-1"'], ["launch.resources.cpu = '-1' is below 0; write for example 4, 500m, 16Gi"]),
        (['launch.resources."nvidia.com/gpu"="0.5"'], ["launch.resources.nvidia.com/gpu = '0.5': devices are whole"]),
        (
            ['launch.resources.cpu="4"', 'launch.resources."limits.cpu"="2"'],
            ["launch.resources requests 4 of cpu, more than its limit of 2; lower launch.resources.cpu, or raise"],
        ),
        (
            ["launch.fabric=infiniband"],
            ["launch.fabric = 'infiniband' is for ranks on GPUs alone; set launch.fabric = 'tcp'"],
        ),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else None,
)
def test_a_spec_that_does_not_hold(place: Place, server: ApiServer, sets: list[str], said: list[str]) -> None:
    err = refused(place, *sets)
    for words in said:
        assert words in err
    assert server.named("jobs") == {}


def test_a_namespace_without_rights(place: Place, server: ApiServer) -> None:
    """tests/cluster/test_rights.py has every right of the Role."""
    server.denied.add(("create", "jobs"))
    err = refused(place)
    assert 'cannot create resource "jobs"' in err.replace('\\"', '"')  # as a JSON line quotes it
    assert "apply the Role `hotstage-launcher` of k8s/base/rbac.yaml" in err


def test_a_cluster_that_is_too_old(place: Place, server: ApiServer) -> None:
    server.documents["/version"] = {"gitVersion": "v1.28.15-eks-1"}
    err = refused(place)
    assert "Kubernetes v1.28.15-eks-1 is older than 1.29; upgrade the cluster to 1.29 or later" in err
    assert server.named("jobs") == {}


def test_credentials_that_have_expired(place: Place, server: ApiServer) -> None:
    server.expired = True
    err = refused(place)
    assert "the kubeconfig's credentials are unknown or have expired: log in again" in err
    assert "HOTSTAGE_KUBECONFIG" in err


def test_a_kubeconfig_that_is_not_there(place: Place) -> None:
    place.env["HOTSTAGE_KUBECONFIG"] = str(place.folder / "none")
    err = refused(place)
    assert "set HOTSTAGE_KUBECONFIG or KUBECONFIG to a kubeconfig file" in err


def test_an_object_of_the_same_name_made_by_someone_else(place: Place, server: ApiServer) -> None:
    driver = train(place)
    until(lambda: server.named("services"), "the launch", 60.0)  # to learn the names
    (name,) = server.named("jobs")
    driver.kill()
    driver.wait()
    server.remove(JOBS_AT, name)
    theirs = {"metadata": {"name": name, "labels": {"team": "other"}}, "spec": {"suspend": True}}
    made = server.put(JOBS_AT, theirs)
    err = refused(place)
    assert f"there is a Job {name} in namespace train that is not of launch" in err
    assert "it is left alone: delete it, or give the spec another name" in err
    assert server.objects[JOBS_AT, name] == made


def test_a_pods_store_needs_no_profile_of_who_renders(place: Place) -> None:
    place.env["AWS_PROFILE"] = "of-nobody"
    done = place.here("k8s", "render", "spec.toml", *SETS, "--store", "s3://bucket/p")
    assert (done.code, "s3://bucket/p" in done.out) == (0, True)


def test_an_address_with_credentials_is_not_rendered(place: Place, server: ApiServer) -> None:
    """They were in the arguments of each pod, for everybody who may look at pods."""
    url = "s3://bucket/p?endpoint=http://me:a-secret@host"
    for words in (("k8s", "render", "spec.toml", "--json"), ("k8s", "apply", "spec.toml", "--dry-run")):
        done = place.here(*words, *SETS, "--store", url)
        assert (done.code, done.out) == (REFUSED, "")
        assert "an address holds no credentials" in done.err
        assert "a-secret" not in done.err
    assert not server.bodies


def test_a_fabric_that_is_not_run_is_still_rendered(place: Place, server: ApiServer) -> None:
    fabric = ("--set", "launch.fabric=infiniband")
    done = place.here("k8s", "render", "spec.toml", *SETS, *fabric)
    assert done.code == 0, done.err
    assert "IPC_LOCK" in done.out
    assert "launch.fabric = 'infiniband' is rendered, not run" in done.err
    for how in ((), ("--dry-run",)):
        done = place.here("k8s", "apply", "spec.toml", *SETS, *fabric, *how)
        assert done.code == REFUSED
        assert "launch.fabric = 'infiniband' is for ranks on GPUs alone; set launch.fabric = 'tcp'" in done.err
    assert not server.bodies
    assert not (place.folder / "store" / "index").exists()
