"""`make cuda`: what the compiler said becomes the table, a spill fails, and the table that was made last has its form.
The build itself runs in CI."""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from k8s.images import cuda
from k8s.images.cuda import ARCHITECTURES, OUT, SOURCES, Resources, faults, kernel_name, uses_of
from k8s.images.static import ROOT
from trainer import wire
from trainer.engine_path import CUDA_WHEELS

BUG, CONFIG = -3, -6  # core/status.h

TOLD = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z12attention_dqIfEv5shape7operandIT_ES1_IKS2_ES5_S5_S5_PKfS7_' for 'sm_90a'
ptxas info    : Function properties for _Z12attention_dqIfEv5shape7operandIT_ES1_IKS2_ES5_S5_S5_PKfS7_
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 24960 bytes smem
ptxas info    : Compile time = 120.5 ms
ptxas info    : Compiling entry function '_Z10init_constPflfb' for 'sm_100a'
ptxas info    : Function properties for _Z10init_constPflfb
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_what_the_compiler_says_becomes_the_table() -> None:
    assert list(uses_of(TOLD)) == [
        ("attention_dq<float>", "sm_90a", Resources(registers=128, spill_bytes=20, stack_bytes=8, shared_bytes=24960)),
        ("init_const", "sm_100a", Resources(registers=12, spill_bytes=0, stack_bytes=0, shared_bytes=0)),
    ]


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z9gemm_tileI13__nv_bfloat16fEv4gemmIT_T0_El", "gemm_tile<bf16, float>"),
        ("_Z9gemm_tileI13__nv_bfloat16S0_Ev4gemmIT_T0_El", "gemm_tile<bf16, bf16>"),
        ("_Z9gemm_tileIffEv4gemmIT_T0_El", "gemm_tile<float, float>"),
        ("_Z4zeroPhlb", "zero"),
        ("plain", "plain"),
    ],
)
def test_names(mangled: str, name: str) -> None:
    assert kernel_name(mangled) == name


def test_a_spill_fails_the_build_unless_it_is_answered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, spilling = Resources(32, 0, 0, 0), Resources(255, 24, 16, 0)
    assert faults({"a": dict.fromkeys(ARCHITECTURES, sound)}) == []
    (fault,) = faults({"a": dict.fromkeys(ARCHITECTURES, sound) | {"sm_80": spilling}})
    assert "a spills registers (24 bytes on sm_80)" in fault
    (fault,) = faults({"a": {"sm_80": sound, "sm_90a": sound}})
    assert fault == "a was not compiled for sm_100a"
    monkeypatch.setitem(cuda.SPILLS, "a", "it may")
    assert faults({"a": dict.fromkeys(ARCHITECTURES, spilling)}) == []
    (fault,) = faults({"a": dict.fromkeys(ARCHITECTURES, sound)})
    assert "no longer spills" in fault


def test_where_the_compilers_cannot_be_had_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert cuda.main() == cuda.CANNOT
    assert "cuda: the compilers cannot be had: " in capsys.readouterr().err


def test_without_a_driver_a_launch_answers_and_nothing_else_happens() -> None:
    """Of the library that was made last: the runtime inside it opens the driver at the first call, or not."""
    path = OUT / "libhs_cuda.so"
    if not path.exists():
        pytest.skip("make cuda has not run here: no out/cuda/libhs_cuda.so")
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has a driver")
    library = ctypes.CDLL(str(path))
    library.hs_cuda_kernels.restype = ctypes.c_void_p
    version, count = (ctypes.c_uint32 * 2).from_address(library.hs_cuda_kernels())
    assert (version, count) == (1, 1 + len(wire.KERNELS))
    functions = (ctypes.c_void_p * count).from_address(library.hs_cuda_kernels() + 8)
    gelu = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(functions[wire.KERNELS["gelu_fwd"].number])
    stream = ctypes.c_void_p()
    words = (ctypes.c_uint64 * (wire.CALL_PTRS + wire.CALL_DIMS + wire.CALL_REALS + 1))()
    words[wire.CALL_PTRS], words[-1] = 1, wire.F32  # one element, of nowhere
    assert gelu(ctypes.addressof(stream), ctypes.addressof(words)) == BUG
    words[-1] = wire.F64
    assert gelu(ctypes.addressof(stream), ctypes.addressof(words)) == CONFIG


def test_the_table_that_was_made_last() -> None:
    path = OUT / "kernels.json"
    if not path.exists():
        pytest.skip("make cuda has not run here: no out/cuda/kernels.json")
    told = json.loads(path.read_text())
    assert told["version"] == 1
    assert told["architectures"] == list(ARCHITECTURES)
    assert told["spills"] == cuda.SPILLS
    for name, uses in told["kernels"].items():
        assert list(uses) == list(ARCHITECTURES), name
        for use in uses.values():
            assert set(use) == {"registers", "spill_bytes", "stack_bytes", "shared_bytes"}
            assert 0 < use["registers"] <= 255
            assert use["spill_bytes"] == 0 or name in cuda.SPILLS
            assert use["shared_bytes"] <= 48 << 10
    source = "".join(p.read_text() for p in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.h")))
    written = set(re.findall(r"__global__ void __launch_bounds__\([^;{]*?\)\s+(\w+)\(", source))
    assert {name.partition("<")[0] for name in told["kernels"]} == written, "run make cuda again"


def test_the_extra_and_the_image_have_the_same_libraries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {line.partition(";")[0] for line in project["optional-dependencies"]["cuda"]}
    lines = (ROOT / "k8s" / "images" / "engine-cuda.requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == extra
    recipe = (ROOT / "k8s" / "images" / "engine-cuda.Containerfile").read_text()
    (folders,) = re.findall(r"HOTSTAGE_CUDA_LIBRARIES=(\S+)", recipe)
    assert {Path(f).relative_to("/opt/packages/nvidia").parts[0] for f in folders.split(":")} <= {"cu13", *CUDA_WHEELS}
