"""`hotstage train` with `parallel.device`, end to end on the tests' emulated CUDA: the real launcher,
agent, supervisor and ranks. The CPU's kernels stand in for CUDA's; what those compute is test_kernels_cuda.py's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.agent.devices import NoDevice, choose, read_devices
from tests.engine import cuda_lib
from tests.support.chaos import ask_to_stop, caught
from tests.support.leftover import expect_none
from tests.support.place import Place, finish
from trainer.engine_path import engine_binary

SPEC = """
name = "onto-gpus"
[model]
family = "gpt2"
layers = 2
width = 32
heads = 2
context = 16
[data]
source = "text:corpus/*.txt"
vocab_size = 300
[train]
steps = 60
batch = 4
microbatch = 2
sequence = 16
[parallel]
stages = 2
threads = 1
[checkpoint]
every = 4
[recovery]
backoff_s = 0.05
"""


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_lib.build()


@pytest.fixture
def gpus(library: Path, tmp_path: Path) -> Iterator[Place]:
    """A place on a machine with two emulated devices."""
    env = {"HOTSTAGE_CUDA": str(library), "HS_EMULATED_DEVICES": "2", "HS_EMULATED_KERNELS": "cpu"}
    made = Place(tmp_path / "p", SPEC, env=env)
    try:
        yield made
        expect_none(made.folder, of_ended=True)
    finally:
        made.stop_all()


def test_a_run_on_gpus_survives_a_kill_with_the_bits_of_one_on_the_cpu(gpus: Place, tmp_path: Path) -> None:
    """Both attempts have the devices; what they run on is said once."""
    sets = ["--set", "parallel.device=cuda", "--set", "launch.kernel_path=cuda-exact"]
    process = gpus.start("train", "spec.toml", "--no-prefect", "--json", *sets)
    runs = gpus.folder / "store" / "runs"
    with caught(gpus.folder, lambda: any(runs.glob("*/manifests/*/manifest")), "a checkpoint"):
        os.kill(gpus.rank_pids()[0], signal.SIGKILL)
    told = finish(process)
    assert told.code == 0, told
    assert told.json()["attempts"] == 2
    assert told.told.count("node 0: on Emulated 9.0 (CUDA device 0, 1)") == 1
    run = told.json()["run"]
    show = json.loads(gpus.said("runs", "show", run, "--json"))
    assert len(show["attempts_list"]) == 2
    on_cpu = Place(tmp_path / "cpu", SPEC).train("parallel.device=cpu", "parallel.stages=1")
    assert (on_cpu["run"], on_cpu["state_digest"]) == (run, told.json()["state_digest"])


def refused(place: Place, words: str, *sets: str, **env: str) -> str:
    """What a run says that cannot begin: exit 78, one attempt, and the words once."""
    place.env.update(env)
    done = place.call("train", "spec.toml", "--no-prefect", "--json", *(w for s in sets for w in ("--set", s)))
    assert done.code == 78, done
    assert words in done.told, done.told
    assert "Traceback" not in done.told
    return done.told


def test_a_machine_that_has_not_what_was_asked_for_ends_the_run_with_the_mend(gpus: Place) -> None:
    cuda = "parallel.device=cuda"
    refused(
        gpus,
        "node 0: HOTSTAGE_DEVICES '0,7': there is no device 7; this node has 2 devices",
        cuda,
        HOTSTAGE_DEVICES="0,7",
    )
    del gpus.env["HOTSTAGE_DEVICES"]
    little = {"HS_EMULATED_DEVICES": "1", "HS_EMULATED_FREE": str(1 << 20)}
    told = refused(gpus, "CUDA device 0 (Emulated 9.0) has 0.00 GiB free of 8.00 GiB", cuda, "name=c", **little)
    assert "the plan in GiB: weights 0.00, moments 0.00, gradients 0.00, activations 0.00, scratch 0.00" in told


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"HOTSTAGE_CUDA": "/nowhere/libhs_cuda.so"},
            "`make cuda` builds it in a source tree, the image for CUDA has it",
        ),
        ({"HOTSTAGE_CUDA": "libc.so.6"}, "is not a CUDA backend of hotstage"),
        ({"HS_EMULATED_DRIVER": "0"}, "no NVIDIA driver"),
        ({"HS_EMULATED_DRIVER": "12040"}, "the NVIDIA driver here is for CUDA 12.4, this hotstage needs 13.0"),
        ({"HS_EMULATED_DEVICES": "0"}, "there is an NVIDIA driver but no CUDA device"),
        ({"HOTSTAGE_DEVICES": ""}, "HOTSTAGE_DEVICES is empty and names no device"),
    ],
)
def test_what_a_machine_lacks_is_said_in_one_line(library: Path, env: dict[str, str], words: str) -> None:
    """As the agent says it of what the engine found, and with the CPU as the mend."""
    told = subprocess.run(
        [str(engine_binary()), "devices"], env={"HOTSTAGE_CUDA": str(library), **env}, capture_output=True, check=True
    )
    with pytest.raises(NoDevice) as error:
        choose("cuda", 2, read_devices(told.stdout))
    said = str(error.value)
    assert words in said
    assert "\n" not in said
    assert ("cpu" in said) == ("HOTSTAGE_DEVICES" not in env)
    if "HOTSTAGE_DEVICES" not in env:
        assert choose("auto", 2, read_devices(told.stdout)).note.startswith("on the CPU: ")


def test_a_run_s_products_go_by_its_own_algorithms(library: Path, tmp_path: Path) -> None:
    """Kernel path cuda: stopped, and gone on with on one stage where another algorithm would be the fastest by now, a
    run has the bits of one that was never stopped.
    """

    def place(name: str) -> Place:
        env = {"HOTSTAGE_CUDA": str(library), "HS_EMULATED_DEVICES": "2", "HS_EMULATED_CUBLASLT": "fastest 0"}
        spec = SPEC
        for key, value in {
            "width": 16,
            "context": 8,
            "sequence": 8,
            "steps": 30,
            "batch": 2,
            "microbatch": 1,
            "every": 2,
        }.items():
            spec = re.sub(rf"^{key} = .*$", f"{key} = {value}", spec, flags=re.MULTILINE)
        return Place(tmp_path / name, spec, env=env)

    sets = ("parallel.device=cuda", "launch.kernel_path=cuda")
    stopped, whole = place("stopped"), place("whole")
    try:
        process = stopped.start_train(*sets)
        runs = stopped.folder / "store" / "runs"
        with caught(stopped.folder, lambda: any(runs.glob("*/manifests/*/manifest")), "a checkpoint"):
            ask_to_stop(process, signal.SIGTERM, stopped.folder / "out")
        assert finish(process).code == 85
        (kept,) = runs.glob("*/algorithms")
        before = {path.name: path.read_bytes() for path in kept.iterdir()}
        stopped.env["HS_EMULATED_CUBLASLT"] = "fastest 1"
        told = stopped.train(*sets, "parallel.stages=1")
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
        assert told["state_digest"] == whole.train(*sets)["state_digest"]
        expect_none(stopped.folder, of_ended=True)
    finally:
        stopped.stop_all()
        whole.stop_all()
