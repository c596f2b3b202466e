"""`hotstage doctor`: what programs and files of a machine with GPUs say becomes findings, each with its mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.show import machine
from flows.show.machine import Gpu, driver_version, examine_machine, gpus_of
from k8s.doctor import Check
from tests.support.calls import called

ROW = "0, NVIDIA H100 80GB HBM3, GPU-1a2b, 580.65.06, 81559, 12, Enabled, 0\n"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sun Jul 27 07:12:00 UTC 2025\nGCC version:  gcc 12\n"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a driver and a library; its nvidia-smi is a script that says what the file ``smi`` holds."""
    (tmp_path / "version").write_text(DRIVER.format("580.65.06"))
    (tmp_path / "smi").write_text(ROW)
    (tmp_path / "kmsg").write_text("6,1,1000000,-;nothing of NVIDIA")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/smi\nexit $(cat {tmp_path}/code 2>/dev/null)\n")
    program.chmod(0o755)
    (tmp_path / "libcublasLt.so.13").touch()
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("HOTSTAGE_CUDA", str(tmp_path / "none.so"))
    monkeypatch.setenv("HOTSTAGE_CUDA_LIBRARIES", str(tmp_path))
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    return tmp_path


def found(bench: Path) -> dict[str, list[Check]]:
    out: dict[str, list[Check]] = {}
    for check in examine_machine(str(bench / "kmsg")):
        out.setdefault(check.name, []).append(check)
    return out


def test_a_machine_in_order_but_for_the_backend(bench: Path) -> None:
    checks = found(bench)
    (devices,) = checks.pop("devices")
    assert (devices.verdict, "none.so: cannot open shared object file" in devices.text) == ("bad", True)
    assert {name: [check.verdict for check in of] for name, of in checks.items()} == {
        "engine": ["ok"], "driver": ["ok"], "backend": ["ok"], "health": ["ok"], "libraries": ["ok", "warn"],
        "kernel": ["ok"],
    }  # fmt: skip
    assert "nvidia-nccl-cu13" in checks["libraries"][1].mend


def test_a_backend_on_a_machine_without_gpus_is_no_fault(bench: Path) -> None:
    (bench / "version").unlink()
    checks = found(bench)
    assert sorted(checks) == ["backend", "devices", "engine"]
    assert checks["devices"][0].verdict == "warn"


def test_an_old_driver(bench: Path) -> None:
    (bench / "version").write_text(DRIVER.format("535.183.01"))
    (check,) = found(bench)["driver"]
    assert (check.verdict, check.text) == ("bad", "NVIDIA's driver 535.183.01 is older than 580, which CUDA 13 needs")
    assert check.mend == "install a driver 580 or later on this machine"
    (bench / "version").write_text("something else\n")
    assert found(bench)["driver"][0].verdict == "unknown"


def test_devices_that_are_ill_in_use_or_slow_to_start(bench: Path) -> None:
    (bench / "smi").write_text(
        "0, NVIDIA H100, GPU-1, 580.65.06, 81559, 70000, Disabled, 2\n"
        "1, NVIDIA H100, GPU-2, 580.65.06, 81559, 1, Enabled, [N/A]\n"
    )  # fmt: skip
    ecc, used, slow = found(bench)["health"]
    assert (ecc.verdict, ecc.text) == (
        "bad", "device 0 (NVIDIA H100) has 2 uncorrectable memory errors since its driver was loaded",
    )  # fmt: skip
    assert "nvidia-smi -r -i 0" in ecc.mend
    assert (used.verdict, used.text) == ("warn", "device 0 (NVIDIA H100): 70000 of 81559 MiB are another program's")
    assert (slow.verdict, "nvidia-smi -pm 1" in slow.mend) == ("warn", True)


def test_nvidia_smi_that_fails_or_says_nothing(bench: Path) -> None:
    (bench / "smi").write_text("Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.\n")
    (bench / "code").write_text("15")
    (check,) = found(bench)["health"]
    assert (check.verdict, check.text.endswith("GPU is lost.")) == ("bad", True)
    assert check.text.startswith("nvidia-smi ended with 15: Unable to determine")
    (bench / "code").write_text("0")
    (check,) = found(bench)["health"]
    assert check.verdict == "unknown"


def test_what_the_driver_wrote(bench: Path) -> None:
    line = "NVRM: Xid (PCI:0000:3b:00): {}, pid=1, words"
    (bench / "kmsg").write_text(f"3,1,1000000,-;{line.format(79)}")
    (check,) = found(bench)["kernel"]
    assert (check.verdict, check.text) == (
        "bad", f"device 0000:3b:00, Xid 79: the device has fallen off the bus: {line.format(79)}",
    )  # fmt: skip
    (bench / "kmsg").write_text(f"3,1,1000000,-;{line.format(31)}")
    assert found(bench)["kernel"][0].verdict == "warn"
    (bench / "kmsg").unlink()
    assert found(bench)["kernel"][0].verdict == "unknown"


def test_rows_of_nvidia_smi() -> None:
    assert gpus_of(ROW) == [Gpu(0, "NVIDIA H100 80GB HBM3", "GPU-1a2b", "580.65.06", 81559, 12, True, 0)]
    assert gpus_of("0, a, b, c, [N/A], [N/A], [N/A], [N/A]") == [Gpu(0, "a", "b", "c", None, None, None, None)]
    assert gpus_of("No devices were found\n") == gpus_of("1, 2, 3") == []


@given(st.text() | st.text(alphabet='0123, []N/A"\n\r\0'))
def test_whatever_nvidia_smi_and_the_driver_say_is_read_or_left_out(text: str) -> None:
    for gpu in gpus_of(text + ROW) + gpus_of(ROW + text):
        assert len(gpu.name) <= 200
    driver_version(text)
    driver_version(f"NVRM version: {text} 1.2 ")


def test_the_command(bench: Path) -> None:
    code, said = called(["doctor"])
    assert code == 78
    assert "BAD      devices    the CUDA backend cannot be opened" in said
    code, said = called(["doctor", "--json"])
    assert {"name", "verdict", "text", "mend"} == set(json.loads(said)[0])
