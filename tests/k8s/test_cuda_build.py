"""`make cuda`: what the compiler said becomes the table, a spill fails, and the table that was made last has its form.
The build itself runs in CI."""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from k8s.images import cuda
from k8s.images.cuda import ARCHITECTURES, OUT, ROOMS, Resources, faults, kernel_name, uses_of
from k8s.images.static import ROOT
from tests.engine.engine_build import engine
from trainer.engine_path import CUDA_WHEELS

__all__ = ["engine"]

TOLD = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z12attention_dqIfEv5shape7operandIT_ES1_IKS2_ES5_S5_S5_PKfS7_' for 'sm_90a'
ptxas info    : Function properties for _Z12attention_dqIfEv5shape7operandIT_ES1_IKS2_ES5_S5_S5_PKfS7_
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 24960 bytes smem
ptxas info    : Compile time = 120.5 ms
ptxas info    : Compiling entry function '_Z10init_constPflfb' for 'sm_100f'
ptxas info    : Function properties for _Z10init_constPflfb
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_what_the_compiler_says_becomes_the_table() -> None:
    assert list(uses_of(TOLD)) == [
        ("attention_dq<float>", "sm_90a", Resources(registers=128, spill_bytes=20, stack_bytes=8, shared_bytes=24960)),
        ("init_const", "sm_100f", Resources(registers=12, spill_bytes=0, stack_bytes=0, shared_bytes=0)),
    ]


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z9gemm_tileI13__nv_bfloat16fEv4gemmIT_T0_El", "gemm_tile<bf16, float>"),
        ("_Z9gemm_tileI13__nv_bfloat16S0_Ev4gemmIT_T0_El", "gemm_tile<bf16, bf16>"),
        ("_Z9gemm_tileIffEv4gemmIT_T0_El", "gemm_tile<float, float>"),
        ("_Z4zeroPhlb", "zero"),
        ("_Z16embed_wgrad_rowsI13__nv_bfloat168place_ofEvPfPKT_T0_llb", "embed_wgrad_rows<bf16, place_of>"),
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
    (fault,) = faults({"a": dict.fromkeys(ARCHITECTURES, sound) | {"sm_80": Resources(32, 0, 1024, 0)}})
    assert "a has an array in local memory (1024 bytes on sm_80)" in fault
    (fault,) = faults({"a": {"sm_80": sound, "sm_90a": sound}})
    assert fault == "a was not compiled for sm_100f"
    monkeypatch.setitem(cuda.SPILLS, "a", "it may")
    assert faults({"a": dict.fromkeys(ARCHITECTURES, spilling)}) == []
    (fault,) = faults({"a": dict.fromkeys(ARCHITECTURES, sound)})
    assert "no longer spills" in fault


TORN = """\
.visible .entry _Z4zeroPhlb(
	ld.global.u32 	%r1, [%rd1];
	ld.global.u32 	%r2, [%rd1+4];
$L__BB0_2:
	ld.global.u32 	%r3, [%rd1+8];
	ld.global.u32 	%r4, [%rd1+12];
.visible .entry _Z4castIfEv5callsI8narrowedIT_EE(
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd2];
	st.global.f32 	[%rd3+16], %f1;
	st.global.f32 	[%rd3+20], %f2;
	st.global.f32 	[%rd3+24], %f3;
	st.global.f32 	[%rd3+28], %f4;
"""


def test_sixteen_bytes_as_four_words_are_found() -> None:
    (found,) = cuda.torn(TORN)
    assert kernel_name(found) == "cast<float>"
    assert cuda.torn(TORN.replace("+20", "+48")) == []


def test_where_the_compilers_cannot_be_had_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert cuda.main() == cuda.CANNOT
    assert "cuda: the compilers cannot be had: " in capsys.readouterr().err


def test_without_a_driver_the_engine_says_so(engine: Path) -> None:
    """With the library that was made last: the runtime inside it looks for the driver at the first call."""
    path = OUT / "libhs_cuda.so"
    if not path.exists():
        pytest.skip("make cuda has not run here: no out/cuda/libhs_cuda.so")
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has a driver")
    environment = os.environ | {"HOTSTAGE_CUDA": str(path)}
    done = subprocess.run([engine, "devices"], env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["devices"] == []
    assert told["why"].startswith("there is no NVIDIA driver here: run on a machine that has one"), (
        "run make cuda again"
    )


def test_the_table_that_was_made_last() -> None:
    path = OUT / "kernels.json"
    if not path.exists():
        pytest.skip("make cuda has not run here: no out/cuda/kernels.json")
    told = json.loads(path.read_text())
    assert told["version"] == 1
    assert told["architectures"] == list(ARCHITECTURES), "run make cuda again"
    assert told["spills"] == cuda.SPILLS
    for name, uses in told["kernels"].items():
        assert list(uses) == list(ARCHITECTURES), name
        for use in uses.values():
            assert set(use) == {"registers", "spill_bytes", "stack_bytes", "shared_bytes"}
            assert 0 < use["registers"] <= 255
            assert use["spill_bytes"] == 0 or name in cuda.SPILLS
            assert use["shared_bytes"] <= 48 << 10
    source = "".join(p.read_text() for room in ROOMS for p in sorted(room.glob("*.*")) if p.suffix in (".cu", ".h"))
    written = set(re.findall(r"__global__ void __launch_bounds__\([^;{]*?\)\s+(\w+)\(", source))
    assert {name.partition("<")[0] for name in told["kernels"]} == written, "run make cuda again"


def arguments(text: str, at: int) -> list[str]:
    """Of a call whose first argument begins at ``at``."""
    depth, found = 0, [""]
    for c in text[at:]:
        depth += (c in "({<") - (c in ")}>")
        if depth < 0:
            break
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [" ".join(word.split()) for word in found]


def test_a_launch_has_the_threads_that_its_kernel_is_compiled_for() -> None:
    """A GPU refuses more; the emulator knows no launch bounds. Rows that are staged take some warps of a block's."""
    files = [
        p for room in ROOMS for p in sorted(room.iterdir()) if p.suffix in (".cu", ".h") and "emulate" not in p.name
    ]
    texts = {p.name: p.read_text().replace("->", "  ") for p in files}
    kernel = re.compile(r"__global__ void __launch_bounds__\(((?:[^()]|\([^()]*\))*)\)\s+(\w+)\(")
    bounds = {
        (where, name): arguments(f"{bound})", 0)[0]
        for where, text in texts.items()
        for bound, name in kernel.findall(text)
    }
    of_name = {name: bound for (_, name), bound in bounds.items()}
    assert len(of_name) == len(bounds), "two kernels of one name"
    launched = set()
    for where, text in texts.items():
        aliases = dict(re.findall(r"const auto (\w+)\s*=\s*(\w+)<", text))
        for call in re.finditer(r"(?<!define )HS_LAUNCH(?:_SHARED)?\(", text):
            what, _, block, *_ = arguments(text, call.end())
            name = re.sub(r"^\(?(\w+).*", r"\1", what)
            name = aliases.get(name, name)
            assert block == of_name[name] or (block, of_name[name]) == ("staged * LANES", "STAGE_THREADS"), (
                where,
                what,
            )
            launched.add(name)
    assert launched == set(of_name)


def test_the_extra_and_the_image_have_the_same_libraries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {line.partition(";")[0] for line in project["optional-dependencies"]["cuda"]}
    lines = (ROOT / "k8s" / "images" / "engine-cuda.requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == extra
    recipe = (ROOT / "k8s" / "images" / "engine-cuda.Containerfile").read_text()
    (folders,) = re.findall(r"HOTSTAGE_CUDA_LIBRARIES=(\S+)", recipe)
    assert {Path(f).relative_to("/opt/packages/nvidia").parts[0] for f in folders.split(":")} == set(CUDA_WHEELS)
