"""The images: small, static where they claim it, the same when built again, and the engine of the same bits."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from k8s.images.base import VERSION
from k8s.images.build import ENGINE_LIMIT, HERE, Image, build, image_id, version
from k8s.images.builder import ImageBuilder, machine
from k8s.images.static import ROOT, glibc_engine, static_engine
from k8s.images.store import store_server
from tests.cluster.cluster import Cluster
from tests.cluster.test_cluster import CONFINED
from tests.support.go import cache, go
from tests.support.place import Place
from trainer.engine_path import engine_binary


def configuration(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as tar:
        config = tar.extractfile("manifest.json")
        assert config is not None
        content = tar.extractfile(json.load(config)[0]["Config"])
        assert content is not None
        return dict(json.load(content))


def files(archive: Path) -> dict[str, tarfile.TarInfo]:
    """Everything in the image's layers, by path."""
    found: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(archive) as tar:
        manifest = tar.extractfile("manifest.json")
        assert manifest is not None
        for layer in json.load(manifest)[0]["Layers"]:
            content = tar.extractfile(layer)
            assert content is not None
            with tarfile.open(fileobj=io.BytesIO(content.read())) as inner:
                found |= {member.name.strip("/"): member for member in inner.getmembers()}
    return found


def run_in_pod(cluster: Cluster, image: str, *command: str, seconds: int = 90) -> str:
    """What a confined pod of this image says."""
    container = {
        "name": "one",
        "image": image,
        "imagePullPolicy": "Never",
        "securityContext": {key: value for key, value in CONFINED.items() if key != "runAsUser"},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        ("args" if image.startswith("hotstage-engine") else "command"): list(command),
    }
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}
    with cluster.namespace("image") as namespace:
        cluster.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}, args=["-n", namespace]
        )

        def phase() -> str:
            return str(cluster.get("pods", "one", n=namespace)["status"].get("phase"))

        def words() -> str:
            return cluster.kubectl("-n", namespace, "logs", "one", check=False)

        cluster.until(lambda: phase() in ("Succeeded", "Failed"), f"the pod of {image}", seconds, words)
        assert phase() == "Succeeded", words()
        return words()


def test_the_engine_is_alone_in_its_image_and_static(images: dict[str, Image]) -> None:
    image = images["engine"]
    assert image.archive.stat().st_size <= ENGINE_LIMIT
    inside = files(image.archive)
    assert {n for n, m in inside.items() if m.isfile()} == {"hotstage-engine", "usr/share/doc/hotstage/sbom.spdx.json"}
    assert inside["hotstage-engine"].mode & stat.S_IXOTH
    headers = subprocess.run(["readelf", "-lW", str(static_engine(image.arch))], capture_output=True, text=True)
    assert headers.returncode == 0
    assert "INTERP" not in headers.stdout


def test_the_engine_for_gpus_opens_libraries_and_the_static_one_says_that_it_cannot(tmp_path: Path) -> None:
    """The image itself holds 1 GB of NVIDIA's libraries: it is built by name, and by no test."""
    env = {"HOTSTAGE_CUDA": str(tmp_path / "none.so")}
    said = {}
    for name, engine in (("glibc", glibc_engine()), ("static", static_engine(machine()))):
        done = subprocess.run([str(engine), "devices"], env=env, capture_output=True, text=True, check=True)
        said[name] = json.loads(done.stdout)["why"]
    assert "none.so: cannot open shared object file" in said["glibc"]
    assert "built without dynamic loading" in said["static"]


@pytest.mark.parametrize("name", ["engine", "agent"])
def test_an_image_names_itself_and_runs_as_nobody(images: dict[str, Image], name: str) -> None:
    config = configuration(images[name].archive)
    labels = config["config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == f"hotstage-{name}"
    assert labels["org.opencontainers.image.version"] == version()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["config"]["User"] == "65532:65532"
    assert config["created"].startswith("1970-01-01")


@pytest.mark.parametrize("name", ["engine", "agent"])
def test_the_same_sources_give_the_same_image(
    images: dict[str, Image], builder: ImageBuilder, base: str, tmp_path: Path, name: str
) -> None:
    again = build(name, base=base, python=VERSION, out=tmp_path, builder=builder, revision="test")
    assert again.digest == images[name].digest


def test_the_stores_server_is_static() -> None:
    headers = subprocess.run(["readelf", "-lW", str(store_server(go))], capture_output=True, text=True)
    assert headers.returncode == 0
    assert "INTERP" not in headers.stdout


BUILD = """
import sys
from pathlib import Path
from k8s.images.build import build
from k8s.images.builder import ImageBuilder
from tests.support.go import cache
builder = ImageBuilder.find(storage=cache() / "storage")
print(build("engine", out=Path(sys.argv[1]), builder=builder, revision=sys.argv[2]).digest)
"""


def test_two_builds_at_once_both_give_what_they_were_asked_for(builder: ImageBuilder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = {
        revision: subprocess.Popen(
            [sys.executable, "-c", BUILD, str(out), revision], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for revision in ("first", "second")
    }
    digests = {revision: process.communicate(timeout=300)[0].strip() for revision, process in both.items()}
    assert [process.returncode for process in both.values()] == [0, 0]
    assert digests["first"] != digests["second"]
    (archive,) = out.glob("*.tar")
    assert {path.name for path in out.iterdir()} == {archive.name, f"{archive.stem}.key", f"{archive.stem}.spdx.json"}
    # whichever was last left its own archive, whole, under its own key
    labels = configuration(archive)["config"]["Labels"]
    last = labels["org.opencontainers.image.revision"]
    assert image_id(archive) == digests[last]
    before = archive.stat()
    assert build("engine", out=out, builder=builder, revision=last).digest == digests[last]
    assert archive.stat() == before


def test_the_agent_has_what_it_needs_and_no_more(images: dict[str, Image]) -> None:
    inside = files(images["agent"].archive)
    own = {n.removeprefix("opt/hotstage/") for n in inside if n.startswith("opt/hotstage/") and n.endswith(".py")}
    wire = {
        f"trainer/wire/{n}.py"
        for n in ("__init__", "boot", "files", "kernels", "order", "packed", "plan", "unreadable")
    }
    assert {n for n in own if n.startswith("trainer/")} == {"trainer/__init__.py"} | wire
    assert {n.split("/")[0] for n in own} == {"checkpoint", "trainer"}
    pins = (HERE / "agent.requirements.txt").read_text().split()
    packages = {n.split("/")[2].split("-")[0] for n in inside if n.startswith("opt/packages/") and ".dist-info" in n}
    assert {p.replace("-", "_").split("==")[0] for p in pins} == packages


def test_the_bill_lists_every_pinned_package(images: dict[str, Image]) -> None:
    bill = json.loads(images["agent"].archive.with_name(f"agent-{images['agent'].arch}.spdx.json").read_text())
    assert bill["spdxVersion"] == "SPDX-2.3"
    listed = {f"{p['name'].lower()}=={p['versionInfo']}" for p in bill["packages"]}
    assert set((HERE / "agent.requirements.txt").read_text().split()) <= listed
    ids = [p["SPDXID"] for p in bill["packages"]]
    assert len(ids) == len(set(ids))
    for relation in bill["relationships"]:
        assert {relation["spdxElementId"], relation["relatedSpdxElement"]} <= {*ids, "SPDXRef-DOCUMENT"}


def test_the_pins_hold_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (HERE / "flows.requirements.txt").read_text().split())
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for each in map(Requirement, wanted):
        assert each.specifier.contains(pins[each.name.lower()]), f"{each} against {pins[each.name.lower()]}"
    agent = dict(line.split("==") for line in (HERE / "agent.requirements.txt").read_text().split())
    assert agent.items() <= pins.items()


@pytest.mark.parametrize(("precision", "path"), [("fp32", "auto"), ("bf16", "auto"), ("fp32", "portable")])
def test_the_static_engine_has_the_bits_of_the_dynamic_one(tmp_path: Path, precision: str, path: str) -> None:
    digests = {}
    for kind, engine in (("dynamic", engine_binary()), ("static", static_engine(machine()))):
        place = Place(tmp_path / kind, env={"HOTSTAGE_ENGINE": str(engine)})
        try:
            result = place.train("train.steps=8", f"train.precision={precision}", f"launch.kernel_path={path}")
        finally:
            place.stop_all()
        digests[kind] = result["state_digest"]
    assert digests["static"] == digests["dynamic"] is not None


def test_engine_and_agent_start_in_a_confined_pod(cluster: Cluster, images: dict[str, Image]) -> None:
    assert version() in run_in_pod(cluster, images["engine"].tag, "version")
    said = run_in_pod(cluster, images["agent"].tag, "python3", "-m", "checkpoint.agent", "--help")
    assert "--key-file" in said


@pytest.mark.slow
def test_the_flows_start_in_a_confined_pod(cluster: Cluster, builder: ImageBuilder, base: str) -> None:
    image = build("flows", base=base, python=VERSION, out=cache() / "images" / "test", builder=builder, revision="test")
    cluster.load_image(image.archive)
    assert "train" in run_in_pod(cluster, image.tag, "hotstage", "--help")
    assert "3.8" in run_in_pod(cluster, image.tag, "prefect", "--version")


@pytest.mark.slow
def test_the_engine_for_arm64(builder: ImageBuilder, tmp_path: Path) -> None:
    """Built from the same sources; it runs where the machine can run such programs."""
    image = build("engine", arch="arm64", out=tmp_path, builder=builder, revision="test")
    assert image.archive.stat().st_size <= ENGINE_LIMIT
    assert configuration(image.archive)["architecture"] == "arm64"
    for emulator in ("qemu-aarch64-static", "qemu-aarch64"):
        if (done := _run(emulator, str(static_engine("arm64")), "version")) is not None:
            assert version() in done
            return
    pytest.skip("the image is there; no qemu-user here to run its engine")


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return None
