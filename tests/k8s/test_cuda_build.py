"""`make cuda`: what the compiler said becomes the table, a spill fails, and the table that was made last has its form.
The build itself runs in CI."""

from __future__ import annotations

import json
import re

import pytest

from k8s.images import cuda
from k8s.images.cuda import ARCHITECTURES, OUT, SOURCES, Resources, faults, kernel_name, uses_of

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
