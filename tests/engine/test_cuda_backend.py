"""The CUDA backend's table (``trainer/engine/backend/cuda``), call by call, on the emulated CUDA: graphs, queries,
pinned memory, the check of a device, failures, and every reason why a device is not opened. What runs a plan on it:
``test_device.py`` and ``test_executor.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.native import build_program
from tests.engine.plans import GPT2, LLAMA
from tests.engine.test_device import MakeRuns, emulated, engine, library, runs
from tests.support.compilers import find
from trainer import wire

__all__ = ["emulated", "engine", "library", "runs"]  # fixtures

UNSUPPORTED, MEMORY, BUG, SICK, DEVICE = 78, 78, 70, 88, 88
GIB = 1 << 30
WORKSPACE = 40 << 20


def drive(scenario: str, *more: int, **switches: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HS_EMULATED_KERNELS": "cuda"} | {f"HS_EMULATED_{k}": v for k, v in switches.items()}
    command = [build_program("device_drive"), scenario, *map(str, more)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def told(scenario: str, *more: int, **switches: str) -> list[str]:
    """What a scenario that ends well prints, but the device."""
    done = drive(scenario, *more, **switches)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def refused(code: int, scenario: str, *more: int, **switches: str) -> str:
    done = drive(scenario, *more, **switches)
    assert done.returncode == code, done.stderr
    return next(line for line in done.stderr.splitlines() if not line.startswith("{"))


# --- open -------------------------------------------------------------------------------------------------------


def test_an_open_device_says_what_it_is() -> None:
    done = drive("open", 1, wire.PATHS["cuda-exact"], DEVICES="2", FREE=str(5 * GIB))
    assert done.stdout.splitlines()[0] == (
        "cuda-exact, Emulated 9.0, GPU-10111213-1415-1617-1819-1a1b1c1d1e1f, 0000:e1:00, 90, 13000, 13000, "
        f"{5 * GIB} of {8 * GIB}"
    )
    assert drive("open").stdout.startswith("cuda, ")  # auto


REFUSALS: dict[str, tuple[tuple[int, ...], dict[str, str], str]] = {
    "no-driver": (
        (),
        {"DRIVER": "0"},
        "UNSUPPORTED: there is no NVIDIA driver here: run on a machine that has one (nvidia-smi shows it; in a "
        'container, nvidia.com/gpu asks for it), or set parallel.device = "cpu"',
    ),
    "old-driver": (
        (),
        {"DRIVER": "12040"},
        "UNSUPPORTED: the NVIDIA driver here is for CUDA 12.4, this hotstage needs 13.0: update the driver, or set "
        'parallel.device = "cpu"',
    ),
    "no-device": (
        (),
        {"DEVICES": "0"},
        "UNSUPPORTED: there is an NVIDIA driver but no CUDA device: look at nvidia-smi and at CUDA_VISIBLE_DEVICES, or "
        'set parallel.device = "cpu"',
    ),
    "no-such-device": (
        (2,),
        {"DEVICES": "2"},
        "UNSUPPORTED: there is no CUDA device 2: this machine shows 2 (numbered from 0); look at HOTSTAGE_DEVICES and "
        "CUDA_VISIBLE_DEVICES",
    ),
    "too-old": (
        (),
        {"CAPABILITY": "70"},
        "UNSUPPORTED: CUDA device 0 (Emulated 7.0) has compute capability 7.0; hotstage needs 8.0 (an A100) or newer",
    ),
    "path-of-the-cpu": (
        (0, wire.PATHS["avx2"]),
        {},
        "UNSUPPORTED: kernel path avx2 runs on the CPU, and this rank runs on a CUDA device; choose launch.kernel_path "
        "auto, cuda or cuda-exact, or run on the CPU",
    ),
    "another-process-has-it": (
        (),
        {"MODE": "3"},
        "UNSUPPORTED: CUDA device 0 (Emulated 9.0) is in compute mode exclusive-process: another process has it, a "
        "rank of this run perhaps; give each rank a device of its own (HOTSTAGE_DEVICES), or set the mode to default "
        "(nvidia-smi -i GPU-00010203-0405-0607-0809-0a0b0c0d0e0f -c DEFAULT)",
    ),
    "no-process-may-have-it": (
        (),
        {"MODE": "2"},
        "UNSUPPORTED: CUDA device 0 (Emulated 9.0) is in compute mode prohibited: use another device "
        "(HOTSTAGE_DEVICES), or set the mode to default "
        "(nvidia-smi -i GPU-00010203-0405-0607-0809-0a0b0c0d0e0f -c DEFAULT)",
    ),
    "little-memory": (
        (0, 0, 3 * GIB),
        {"FREE": str(2 * GIB)},
        "MEMORY: CUDA device 0 (Emulated 9.0) has 2.00 GiB free of 8.00 GiB, and this rank needs 3.04 GiB (its plan "
        "3.00, its workspace 0.04): free the device (nvidia-smi shows who is on it), take more stages "
        "(parallel.stages) or a smaller train.microbatch",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str) -> None:
    more, switches, words = REFUSALS[name]
    assert refused(78, "open", *more, **switches) == words


def test_memory_is_enough_to_the_byte() -> None:
    assert drive("open", 0, 0, 2 * GIB - WORKSPACE, FREE=str(2 * GIB)).returncode == 0
    assert refused(MEMORY, "open", 0, 0, 2 * GIB - WORKSPACE + 1, FREE=str(2 * GIB)).startswith("MEMORY: ")


def test_memory_that_goes_meanwhile() -> None:
    """What open was not told of, and alloc finds missing; the launch after it would find no failure left behind."""
    words = refused(MEMORY, "open", FREE=str(WORKSPACE + (1 << 20)))
    assert words == (
        "MEMORY: CUDA device 0 (Emulated 9.0), memory of the device: 65536 bytes are not to be had; the device has "
        f"{1 << 20} free of {8 * GIB}"
    )


def test_a_library_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSTAGE_CUDA", str(tmp_path / "libhs_cuda.so"))
    assert str(tmp_path / "libhs_cuda.so") in refused(UNSUPPORTED, "open")
    other = build_other(tmp_path, "int hs_other(void) { return 0; }")
    monkeypatch.setenv("HOTSTAGE_CUDA", str(other))
    assert refused(UNSUPPORTED, "open") == (
        f"UNSUPPORTED: {other} is not a CUDA backend of hotstage: it has no hs_cuda_backend"
    )
    other = build_other(tmp_path, "static int table = 1; const void *hs_cuda_backend(void) { return &table; }")
    monkeypatch.setenv("HOTSTAGE_CUDA", str(other))
    words = refused(UNSUPPORTED, "open")
    assert re.search(r"is a CUDA backend of version 1, this hotstage-engine needs version \d+: install both", words)


def build_other(folder: Path, source: str) -> Path:
    made = folder / f"other-{len(list(folder.iterdir()))}.so"
    command = [find("cc"), "-shared", "-fPIC", "-x", "c", "-", "-o", str(made)]
    subprocess.run(command, input=source, text=True, check=True)
    return made


# --- calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["0", "7", "31"])
def test_a_graph_is_the_calls_that_it_was_made_of(order: str) -> None:
    assert told("graph", ORDER=order) == ["equal 3"]


@pytest.mark.parametrize("what", ["kernel", "event", "follow", "capture", "memory", "copy", "query", "wait"])
def test_what_a_capture_does_not_hold(what: str) -> None:
    assert refused(BUG, f"rule-{what}").startswith("BUG: ")


def test_what_fails_in_a_capture_says_why() -> None:
    """The device cannot be asked then whether it failed."""
    assert refused(BUG, "rule-product") == (
        "BUG: a product of 4 x 8 x 8 was never asked for, so that it has no algorithm"
    )


def test_other_streams_go_on_beside_a_capture() -> None:
    assert told("rule-none") == []


def test_queries() -> None:
    assert told("query") == ["never recorded 1", "asked several times"]


REFUSED_BY_CUDA = {0: 400, 1: 400, 2: 400, 3: 1, 4: 1, 5: 712}
"""What hs_test_refused (cuda_lib.cc) asks for, and what a driver says."""


def test_what_cuda_itself_refuses(library: Path) -> None:
    """A thread works with its own device's streams and events, a copy with host memory that is pinned whole or not at
    all, and what is pinned are pages: where the emulator takes more, a GPU shows it first."""
    code = "import ctypes, sys; c = ctypes.CDLL(sys.argv[1]); print(*(c.hs_test_refused(n) for n in range(6)))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)],
        env=os.environ | {"HS_EMULATED_DEVICES": "2"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert dict(enumerate(map(int, done.stdout.split()))) == REFUSED_BY_CUDA


def test_memory_of_others_is_pinned_until_close() -> None:
    done = drive("pin", COUNTS="1")
    assert done.returncode == BUG
    assert "equal 1" in done.stdout
    first, last = done.stderr.splitlines()
    assert json.loads(first)["emulated"]["unpinned"] == 0
    assert "(cudaErrorHostMemoryAlreadyRegistered)" in last


@pytest.mark.parametrize("error", ["2", "304", "801"])
def test_a_host_that_lets_no_memory_be_pinned(error: str) -> None:
    """Whatever a driver calls it, the device goes on: copies keep the host waiting, and are right."""
    done = drive("pin", COUNTS="1", PIN=error)
    assert done.returncode == MEMORY
    refusal, equal = done.stdout.splitlines()[1:]
    assert refusal.startswith("the system does not pin 4096 bytes of memory for CUDA device 0: ")
    assert "raise the memory limit" in refusal
    assert equal == "equal 1"
    assert json.loads(done.stderr.splitlines()[0])["emulated"]["unpinned"] > 0


def test_the_check_of_a_device() -> None:
    assert told("check") == ["zeros 64, timed"]


def test_a_device_that_computes_wrongly() -> None:
    """A bit of a product, after the kernel that makes it; of memory, between writing and reading."""
    after_the_sums = 4 * (16 * 512 + 64 * 512) + 8 * 128  # of backend/cuda/check.cu: x, w, places; then the products
    words = refused(SICK, "check", FLIP=f"1 2 {after_the_sums + 4096 + 8}")
    assert re.fullmatch(
        r"SICK: CUDA device 0 \(Emulated 9\.0\) computes wrong numbers: multiprocessor 0 has a product with checksum "
        r"[0-9a-f]{8} instead of 40f61a46; take the device out of service and test it",
        words,
    )
    assert refused(SICK, "check", FLIP="2 1 808") == (
        "SICK: CUDA device 0 (Emulated 9.0): its memory does not hold: word 101 of the arena is not what was written; "
        "take the device out of service and test it"
    )


def test_the_first_failure_stays() -> None:
    done = drive("fails", FAIL="5 214")
    assert done.returncode == DEVICE
    assert done.stdout.splitlines()[1:] == ["same 4"]
    assert done.stderr.splitlines()[-1] == (
        "DEVICE: CUDA device 0 (Emulated 9.0), waited for (stream out, last given a copy to the host): uncorrectable "
        "ECC error encountered (cudaErrorECCUncorrectable)"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((code, UNSUPPORTED) for code in (200, 222, 223, 805, 807, 808, 809)),
        *((code, BUG) for code in (714, 800, 904, 907)),
        *((code, DEVICE) for code in (226, 999)),
    ],
)
def test_whose_fault_it_is(error: int, code: int) -> None:
    """An exit code of 88 leaves the machine out of later launches: neither a fault of ours nor a driver that does not
    fit does that."""
    assert "(cudaError" in refused(code, "fails", FAIL=f"5 {error}")


def test_a_library_is_refused_by_a_device_that_failed() -> None:
    """The library has a runtime of its own, and says no more than that it failed."""
    assert refused(DEVICE, "library") == (
        "DEVICE: CUDA device 0 (Emulated 9.0), giving it work (stream compute, last given kernel linear_fwd): "
        "uncorrectable ECC error encountered (cudaErrorECCUncorrectable)"
    )


def test_one_call_at_a_time_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSTAGE_CUDA_SYNC", "1")
    assert "giving it work (stream compute, last given kernel gelu_fwd)" in refused(BUG, "fails", FAIL="5")


# --- whole trainings --------------------------------------------------------------------------------------------

ALL: list[dict[str, Any]] = [{"precision": "fp32"}, {"precision": "bf16"}]


@pytest.mark.parametrize("train", ALL, ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_trainings_are_made_of_graphs(runs: MakeRuns, model: dict[str, Any], train: dict[str, Any]) -> None:
    """The CPU's bits, with its kernels: most runs of a program are replays, and no copy keeps the host waiting."""
    some = runs(model=model, stages=2, batch=8, steps=3, **train)
    sound = some.state("cpu")
    assert some.state("cuda", ORDER="31") == sound
    (captures, replays, unpinned) = (some.counts(what)[0] for what in ("captures", "replays", "unpinned"))
    assert 0 < 2 * captures <= replays
    assert unpinned == 0
