"""A gang of a thousand ranks on a real control plane: every pod is tracked. The nodes are kwok's, the rest is real."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from flows.drive.loop import POLL_S, calm_pause_s
from k8s.api import Api
from k8s.kubeconfig import Access
from k8s.launcher import KubernetesLauncher
from tests.cluster.cluster import Cluster
from tests.cluster.kwok import kwok
from tests.k8s.test_launcher import launch_named

RANKS = 1000
NAME = "tiny-0a1b2c-k1"


@pytest.fixture
def space(cluster: Cluster) -> Iterator[str]:
    with cluster.namespace("thousand") as name:
        yield name


@pytest.fixture
def launcher(cluster: Cluster, space: str) -> Iterator[KubernetesLauncher]:
    configuration = Configuration()
    load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    made = KubernetesLauncher(Api(Access(configuration)), space)
    yield made
    made.close()


@pytest.mark.slow
def test_a_thousand_pods_are_tracked_from_their_birth_to_their_end(
    cluster: Cluster, space: str, launcher: KubernetesLauncher, tmp_path: Path
) -> None:
    with kwok(cluster, nodes=20, scratch=tmp_path) as selector:
        launch = launch_named(NAME, namespace=space, node_selector=selector)
        launcher.ensure(launch)
        # as many pods as there would be with a plan of a thousand stages, which takes minutes to compile
        (job,) = cluster.get("jobs", n=space)["items"]
        many = json.dumps({"spec": {"completions": RANKS, "parallelism": RANKS}})
        cluster.kubectl("-n", space, "patch", "job", job["metadata"]["name"], "--type=merge", "-p", many)

        def state() -> str:
            return launcher.observe(NAME).state

        def whole() -> bool:
            view = launcher.observe(NAME)
            return view.state == "running" and sum(bool(node.alive) for node in view.nodes) == RANKS

        cluster.until(whole, "the gang to run", 300, lambda: launcher.observe(NAME).detail)
        view = launcher.observe(NAME)
        assert {node.node for node in view.nodes} == set(range(RANKS))
        assert all(node.place.startswith("kwok-") for node in view.nodes)

        began, used = time.monotonic(), time.process_time()
        while time.monotonic() - began < 20:  # as the driver does (flows/drive/loop.py)
            look = time.thread_time()
            launcher.observe(NAME)
            time.sleep(calm_pause_s(time.thread_time() - look, POLL_S))
        share = (time.process_time() - used) / (time.monotonic() - began)
        print(f"watching {RANKS} pods: {100 * share:.2f} % of a core")

        victim = cluster.get("pods", n=space, labels="batch.kubernetes.io/job-completion-index=617")["items"][0]
        cluster.kubectl("-n", space, "delete", "pod", victim["metadata"]["name"], "--wait=false")
        cluster.until(lambda: state() == "lost", "the loss to be seen", 60, lambda: launcher.observe(NAME).detail)
        assert victim["metadata"]["name"] in launcher.observe(NAME).detail

        launcher.stop(NAME, grace_s=60.0)
        cluster.until(lambda: not cluster.get("pods", n=space)["items"], "the pods to be gone", 180)
