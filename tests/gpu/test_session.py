"""The runner of a session, with stages that are small programs: what is done is not done again, a stage that fails or
hangs takes nothing with it, a call that ends or is killed is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.engine.compiled import linked
from tests.engine.kernel_lib import flags_of
from tests.gpu import box, build, kernel_times, report
from tests.gpu.__main__ import BARE, STAND_INS, missing_packages, python_path
from tests.gpu.bare import msgpack as bare_msgpack
from tests.gpu.bare.safetensors.numpy import load_file as bare_load_file
from tests.gpu.build import ENGINE, ROOMS, engine_units
from tests.gpu.roofline import calls_of
from tests.gpu.session import CANNOT, LOG, MORE, STATE, Session, Stage
from tests.gpu.snapshot import blocked_ms
from tests.gpu.stages import TOOLS, function_of, looking, stages
from tests.gpu.under_pytest import LOST, heard, under_pytest
from tests.support.wait import wait_for
from trainer.plan.records import BoundCall

KEY = {"tree": "t", "device": "d", "driver": "1"}
PROGRAMS = {
    "good": "write({'tests': [{'name': 'a', 'outcome': 'passed', 'seconds': 0, 'why': ''}], 'notes': ['fine']})",
    "bad": "write({'why': 'it is broken'}); sys.exit(1)",
    "cannot": "write({'why': 'no such tool'}); sys.exit(69)",
    "crash": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "print('begun', flush=True); time.sleep(600)",
    "half": (
        "write({'tests': [{'name': 'half-way', 'outcome': 'passed', 'seconds': 0, 'why': ''}], 'figures': {'ours': 1}})"
        "; time.sleep(600)"
    ),
}
HEAD = "import json, os, signal, sys, time\nwrite = lambda v: open(sys.argv[1], 'w').write(json.dumps(v))\n"


def command(stage: Stage, folder: Path, result: Path) -> list[str]:
    kind = stage.name.partition("-")[0]
    return [sys.executable, "-c", f"{HEAD}open({str(folder / 'ran')!r}, 'a').write('{stage.name} ')\n{PROGRAMS[kind]}",
            str(result)]  # fmt: skip


def session(folder: Path, names: Sequence[str | Stage], key: dict[str, str] | None = None, **lacks: str) -> Session:
    listed = [n if isinstance(n, Stage) else Stage(n, n, 20, 1) for n in names]
    return Session(folder, listed, key or KEY, lacks, lambda s: report.publish(s, None, True), None, command)


def outcomes(s: Session) -> dict[str, str]:
    return {name: done.outcome for name, done in s.done.items()}


def test_each_outcome_is_kept_and_the_next_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs, after = Stage("good-2", "", 20, 1, ("gpu",)), Stage("good-3", "", 20, 1, (), ("bad",))
    listed: list[str | Stage] = ["good", "bad", "crash", "cannot", needs, after, Stage("hang", "", 0.5, 0.1), "good-4"]
    s = session(tmp_path, listed, gpu="the device is emulated")
    assert s.run(60) == 1
    wanted = ["passed", "failed", "failed", "skipped", "skipped", "skipped", "failed", "passed"]
    assert list(outcomes(s).values()) == wanted
    assert list(outcomes(s)) == ["good", "bad", "crash", "cannot", "good-2", "good-3", "hang", "good-4"]
    assert s.done["bad"].why == "it is broken"
    assert s.done["crash"].why.startswith("ended with 139")
    assert s.done["cannot"].why == "no such tool"
    assert s.done["good-2"].why == "the device is emulated"
    assert s.done["good-3"].why == "bad failed"
    assert "longer than" in s.done["hang"].why
    assert "good-4" in capsys.readouterr().out
    told = (tmp_path / "summary.txt").read_text()
    assert "3 passed" not in told
    assert "2 passed, 3 failed, 3 skipped" in told
    assert "skipped" in told
    assert "it is broken" in told
    assert [t["stage"] for t in json.loads((tmp_path / "test.json").read_text())] == ["good", "good-4"]
    assert "$ " in (tmp_path / LOG).read_text()


def test_what_a_stage_had_when_it_was_ended_is_kept(tmp_path: Path) -> None:
    """And a stage that stands on its figures is done all the same."""
    after = Stage("good", "", 20, 1, (), ("half",))
    s = session(tmp_path, [Stage("half", "", 2, 0.1), after])
    assert s.run(60) == 1
    assert outcomes(s) == {"half": "failed", "good": "passed"}
    assert s.done["half"].told["figures"] == {"ours": 1}
    assert [t["name"] for t in json.loads((tmp_path / "test.json").read_text())] == ["half-way", "a"]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    assert session(tmp_path, ["good", "bad"]).run(60) == 1
    assert session(tmp_path, ["good", "bad", "good-2"]).run(60) == 1
    assert (tmp_path / "ran").read_text().split() == ["good", "bad", "good-2"]


def test_a_call_that_has_too_little_left_says_more(tmp_path: Path) -> None:
    """The small stage behind a large one still fits."""
    s = session(tmp_path, [Stage("good-1", "", 300, 200), "good-2"])
    assert s.run(60) == MORE
    assert outcomes(s) == {"good-2": "passed"}
    assert session(tmp_path, [Stage("good-1", "", 300, 0), "good-2"]).run(60) == 0


def test_a_stage_that_the_call_cuts_off_is_done_again(tmp_path: Path) -> None:
    s = session(tmp_path, [Stage("hang", "", 300, 0.1)])
    assert s.run(5.4) == MORE
    assert s.done["hang"].outcome == "cut off"
    assert session(tmp_path, [Stage("hang", "", 300, 0.1)]).run(5.4) == MORE
    s = session(tmp_path, [Stage("hang", "", 300, 0.1), "good"])
    assert s.run(60) == 1
    assert outcomes(s) == {"hang": "failed", "good": "passed"}


def test_a_killed_call_leaves_no_process_and_is_gone_on_with(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.gpu import test_session as t\n"
        f"t.session(Path({str(tmp_path)!r}), ['good', t.Stage('hang', '', 300, 1)]).run(600)"
    )
    root = Path(__file__).resolve().parents[2]
    call = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.DEVNULL)
    log = tmp_path / LOG
    try:
        wait_for(lambda: log.exists() and "\nbegun" in log.read_text(), "the hanging stage", 30)
    finally:
        call.kill()
        call.wait()
    held = json.loads((tmp_path / STATE).read_text())["stages"]
    assert {name: done["outcome"] for name, done in held.items()} == {"good": "passed", "hang": "cut off"}
    wait_for(lambda: not _mine(str(tmp_path)), "the end of what the call had started", 30)
    s = session(tmp_path, ["good", Stage("hang", "", 0.5, 0.1)])
    assert s.run(60) == 1
    assert s.done["hang"].tries == 2
    ran = (tmp_path / "ran").read_text().split()
    assert ran == ["good", "hang", "hang"][: max(len(ran), 1)]  # a loaded machine ends a try before its first word


def _mine(word: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue
            if word.encode() in line:
                found.append(int(entry.name))
    return found


def test_results_of_another_tree_or_device_are_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert session(tmp_path, ["good"]).run(60) == 0
    s = session(tmp_path, ["good"], KEY | {"device": "another"})
    assert s.done == {}
    assert "results of another device" in capsys.readouterr().out
    assert s.run(60) == 0
    assert json.loads((tmp_path / "before-1" / STATE).read_text())["key"] == KEY


def test_without_a_device_each_command_says_so(tmp_path: Path) -> None:
    """With 69, which is this house's for what a machine cannot do."""
    environment = {k: v for k, v in os.environ.items() if k != "HOTSTAGE_CUDA"} | {"PATH": "/nowhere"}
    for what in ("session", "test", "bench"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu", what, "--folder", str(tmp_path)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == CANNOT, done.stderr
        assert done.stdout.startswith("skipped: no GPU: there is no driver (libcuda.so.1 is not found).")
    assert list(tmp_path.iterdir()) == []


def test_an_older_python_is_told(tmp_path: Path) -> None:
    """Before anything is imported that it cannot read: containers of PyTorch's had 3.10 for long."""
    program = "import runpy, sys; sys.version_info, sys.version = (3, 10, 14, 'final', 0), '3.10.14 (main)'; "
    program += f"sys.argv = ['gpu', 'session', '--folder', {str(tmp_path)!r}]; "
    program += "runpy.run_module('tests.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == CANNOT, done.stderr
    assert "is Python 3.10.14, and 3.11 or newer is needed" in done.stdout


def test_a_home_that_cannot_be_written_costs_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is compiled into the user's cache: without one of their own, into the session's folder."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    assert box.cache(tmp_path / "cache") == {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert box.cache(tmp_path / "cache") == {}
    monkeypatch.setenv("HOME", "/proc/self")  # root may write into a folder of any rights, and not here
    assert box.cache(tmp_path / "cache") == {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_it_needs_nothing_but_numpy_pydantic_and_pytest() -> None:
    """Every module that a session runs, with all other packages of this environment out of reach."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    modules = [p.stem for p in files if not p.stem.startswith("test_")]
    assert len(modules) > 10
    own = {"trainer", "tests", "k8s", "checkpoint"}
    pydantic = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
    of_pytest = {"pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py"}
    allowed = {"numpy", *own, *pydantic, *of_pytest}
    program = f"""
import importlib.abc, importlib.util, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {allowed!r} or top in sys.stdlib_module_names or top.startswith(("_cython", "cython", "_sysconfig")):
            return None
        if top in ("msgpack", "safetensors"):
            sys.meta_path.remove(self)
            sys.path.insert(0, "tests/gpu/bare")
            try:
                return importlib.util.find_spec(name)
            finally:
                sys.path.pop(0)
                sys.meta_path.insert(0, self)
        raise ModuleNotFoundError(f"a bare machine has no {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(f"tests.gpu.{{name}}")
from trainer.spec import parse_spec
assert sys.modules["msgpack"].__file__.endswith("bare/msgpack.py")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_another_package_of_tests_is_not_in_the_way(tmp_path: Path) -> None:
    """A wheel that brings its own `tests`, as some do, is found behind this tree's."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tests.gpu", "session", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_stand_ins_do_what_the_packages_do() -> None:
    whole = [0, 127, 128, -1, -32, -33, 255, 256, 65535, 65536, 2**32, 2**63, -(2**15), -(2**31), -(2**63)]
    texts = ["", "é" * 40, "x" * 300, "y" * 70000, b"", b"z" * 300]
    values = [None, True, 1.5, *whole, *texts, list(range(20)), {"a": {"b": [1, {}]}}, {str(n): n for n in range(20)}]
    values.append(["w"] * 70000)
    for value in values:
        assert bare_msgpack.packb(value) == msgpack.packb(value, use_bin_type=True)
    for path in sorted(Path("tests/golden/gpt2-tied").glob("*.safetensors")):
        ours, theirs = bare_load_file(path), load_file(path)
        assert list(ours) == list(theirs) or set(ours) == set(theirs)
        assert all(
            np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs
        )


def test_a_bare_box_compiles_the_engine_that_cmake_compiles() -> None:
    text = (ENGINE / "CMakeLists.txt").read_text()
    listed = text.partition("CONFIGURE_DEPENDS")[2].partition(")")[0].split()
    cmake = {p for pattern in listed for p in ENGINE.glob(pattern)}
    ours = {source for source, _, _ in engine_units() if source.name != "all.c"}
    assert ours == cmake, f"tests/gpu/build.py has {ROOMS}"


def test_a_warning_of_another_compiler_costs_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The box's is whichever it has; what ours warns of fails the tests here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "warns.c"
    source.write_text("int twice(int x);\nint twice(int x) { int unused; return 2 * x; }\n")

    def build(strict: bool) -> Path:
        return linked("warns", ["cc"], [(source, flags_of(strict), [])], ["cc", "-shared"], ())

    with pytest.raises(AssertionError, match="unused variable"):
        build(strict=True)
    assert build(strict=False).exists()


def test_without_an_oracle_a_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*, strict: bool) -> Path:
        raise AssertionError(f"cc: no such flag, strict {strict}")

    monkeypatch.setattr(build, "build_oracle", fails)
    monkeypatch.setattr(build, "build_way_to_device", lambda builder: builder.folder)
    for name in ("HOTSTAGE_ENGINE", "HOTSTAGE_CUDA"):
        monkeypatch.setenv(name, "/given")
    assert build.build(tmp_path).way == tmp_path
    assert "no oracle: cc: no such flag, strict False" in capsys.readouterr().out


def test_every_stage_has_its_function_and_its_order() -> None:
    listed = stages()
    names = [stage.name for stage in listed]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(listed):
        assert callable(function_of(stage.name))
        assert stage.least_s <= stage.limit_s <= 535
        assert set(stage.after) <= set(names[:place]), "a stage comes before one that it stands on"
    assert set(TOOLS) <= set(names)
    assert names.index("train-gpt2-124m") < names.index("kernels-exact"), "does it run at all comes first"
    assert names.index("torch-gpt2-124m") < names.index("large-exact"), "the oracle of real sizes takes minutes"


def test_a_call_that_a_library_tries_in_vain_is_no_fault_of_memory() -> None:
    """A cuBLASLt of a newer release than the driver looks for what that does not have."""
    assert {tool: "--report-api-errors no" in " ".join(looking("compute-sanitizer", tool)) for tool in TOOLS} == {
        tool: tool == "memcheck" for tool in TOOLS
    }


def test_times_outside_kernels() -> None:
    """Overlap counts once; the first steps are left out."""
    times = []
    for step in range(4):
        at = step * 1000
        times += [
            (at, at + 400, "_Z7productIfEvPKT_"),
            (at + 300, at + 600, "norm"),
            (at + 700, at + 1000, "adamw(x)"),
        ]
    found = kernel_times.outside(sorted(times), 4)
    assert found["outside"] == pytest.approx(0.1)
    assert found["kernels_a_step"] == 3
    assert found["longest"]["product<float>"] == pytest.approx(0.4)
    with pytest.raises(AssertionError, match="updates"):
        kernel_times.outside(times[:-1], 4)
    text = "".join(f"{a} {b} {name}\n" for a, b, name in reversed(times))
    assert kernel_times.read(text) == sorted(times)
    assert kernel_times.newest_record("} CUpti_ActivityKernel9;\n} CUpti_ActivityKernel10;") == "CUpti_ActivityKernel10"


def test_calls_for_all_tensors_are_timed_in_parts_that_fit() -> None:
    """Of a model of 1B parameters AdamW's operands are 22 GB."""
    sizes, pointers = (900_000_000, 300_000_000, 40), (None,) * 6
    updates = [BoundCall("adamw", 1, pointers, (n, 0), (0.9, 0.95, 1e-8, 0.1), None, "O") for n in sizes]
    others = [BoundCall("gelu_fwd", 2, pointers, (8,), (), 0, "F")] * 3
    program = SimpleNamespace(calls=[*updates, *others])
    position = SimpleNamespace(step=[SimpleNamespace(program="p")], programs={"p": program})
    found = calls_of(SimpleNamespace(positions=[position]), {"adamw"})  # type: ignore[arg-type]
    assert {(key[0], key[2][0]): count for key, count in found.items()} == {
        ("adamw", -(-sum(sizes) // 9)): 9,
        ("gelu_fwd", 8): 3,
    }


def test_rows_have_the_form_of_the_bench() -> None:
    rows = [
        report.row("a", 3.0, "s", "target", 2.0, 1.0, least=False),
        report.row("b", 3.0, "tok/s", "torch", 2.0, 1.2),
    ]
    assert [r["met"] for r in rows] == [False, True]
    assert {"name", "value", "unit", "peer", "peer_value", "ratio"} <= set(rows[0])


DRIVER = r"""
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_SYSTEM_NOT_READY"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int room, int device) { strcpy(name, "NVIDIA H100"); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0x11, 16); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 80ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
"""
SMI = """#!/bin/sh
echo "0, NVIDIA T4, GPU-22222222-2222-2222-2222-222222222222, 580.1, 15360, 9, 7.5, [N/A], [N/A], [N/A], 70"
echo "1, NVIDIA H100, GPU-11111111-1111-1111-1111-111111111111, 580.1, 81559, 9, 9.0, [N/A], [N/A], [N/A], 700"
"""


@pytest.mark.parametrize("smi", [True, False], ids=["smi", "no smi"])
def test_the_first_gpu_is_cudas_own(tmp_path: Path, smi: bool) -> None:
    """Not the machine's: it may be hidden, in another order, or nobody but CUDA is there to ask."""
    found = _box(tmp_path, "0", SMI if smi else None)["facts"]["gpus"]
    assert [(g["name"], g["compute_cap"], g["driver_version"]) for g in found] == [
        ("NVIDIA H100", "9.0", "580.1" if smi else "CUDA 13.1")
    ]


def test_a_driver_that_refuses_says_why(tmp_path: Path) -> None:
    why = "no GPU: the driver refuses: cuInit: error 802 (CUDA_ERROR_SYSTEM_NOT_READY)"
    assert _box(tmp_path, "802", None)["lacks"]["device"] == why


@pytest.mark.parametrize(("release", "lacks"), [("12", True), ("13", False)])
def test_a_library_of_another_release_is_none(tmp_path: Path, release: str, lacks: bool) -> None:
    """What needs kernel path cuda is then left out, and says why."""
    (tmp_path / f"libcublasLt.so.{release}").touch()
    told = _box(tmp_path, "0", None, HOTSTAGE_CUDA_LIBRARIES=str(tmp_path))["lacks"]
    assert told.get("products", "").startswith("libcublasLt.so.13 is not found") is lacks
    assert {s.name for s in stages() if "products" in s.needs} >= {"train-gpt2-124m", "kernels-cuda", "models-cuda"}


def test_what_stands_in_comes_before_nothing_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH comes before installed packages, those of PyTorch's environment too."""
    assert missing_packages(STAND_INS) == []
    assert missing_packages(("msgpack", "no_such_package")) == ["no_such_package"]
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    assert python_path(False) == "/wheels"
    assert python_path(True) == f"/wheels:{BARE}"


def _box(folder: Path, init: str, smi: str | None, **more: str) -> dict[str, Any]:
    """What ``tests.gpu.box`` prints with this driver, and this nvidia-smi."""
    flags = ["-shared", "-fPIC", "-w", f"-DINIT={init}", "-x", "c", "-"]
    subprocess.run(["cc", *flags, "-o", folder / "libcuda.so.1"], input=DRIVER, text=True, check=True)
    path = os.environ["PATH"]
    if smi:
        (folder / "nvidia-smi").write_text(smi)
        (folder / "nvidia-smi").chmod(0o755)
        path = f"{folder}:{path}"
    environment = {k: v for k, v in os.environ.items() if k != "HOTSTAGE_CUDA"}
    environment |= {"LD_LIBRARY_PATH": str(folder), "PATH": path} | more
    command = [sys.executable, "-m", "tests.gpu.box"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=ENGINE.parents[1])
    return dict(json.loads(done.stdout))


def test_architectures() -> None:
    assert [box.architecture([{"compute_cap": c}]) for c in ("8.0", "8.9", "9.0", "10.0")] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100a",
    ]


TESTS = """
import os, signal, time
import pytest
@pytest.mark.parametrize("kind", ["good", "wrong", "hang", "abort", "lost", "skip", "good-2"])
def test_some(kind):
    if kind == "wrong": assert 1 == 2, "it is wrong"
    if kind == "hang": time.sleep(600)
    if kind == "abort": os.kill(os.getpid(), signal.SIGABRT)
    if kind == "skip": pytest.skip("not here")
    if kind == "lost" and not os.path.exists("{again}"):
        open("{again}", "w").close()
        pytest.skip("{lost}")
"""


def test_a_test_that_hangs_or_ends_its_process_costs_that_test(tmp_path: Path) -> None:
    """The others are done in other processes, and what is through is told meanwhile."""
    hooks = "pytest_collection_modifyitems", "pytest_collection_finish", "pytest_runtest_logstart"
    hooks += ("pytest_runtest_logreport",)
    (tmp_path / "conftest.py").write_text(f"from tests.gpu.conftest import {', '.join(hooks)}\n")
    text = TESTS.replace("{again}", str(tmp_path / "again")).replace("{lost}", LOST)
    (tmp_path / "test_some.py").write_text(text)
    half: list[int] = []
    told = under_pytest(
        str(tmp_path / "test_some.py"), "p", quiet_s=1.5, so_far=lambda told: half.append(len(told["tests"]))
    )
    found = {test["name"]: test for test in told["tests"]}
    outcomes = {name.removeprefix("test_some[").removesuffix("][p]"): test["outcome"] for name, test in found.items()}
    wanted = {"good": "passed", "wrong": "failed", "hang": "failed", "abort": "failed", "lost": "passed"}
    assert outcomes == wanted | {"skip": "skipped", "good-2": "passed"}
    assert len(found) == len(told["tests"])
    assert "told nothing for 2 s in this test" in found["test_some[hang][p]"]["why"]
    assert f"ended with {-signal.SIGABRT} in this test" in found["test_some[abort][p]"]["why"]
    assert "it is wrong" in found["test_some[wrong][p]"]["why"]
    assert told["failed"]
    assert "3 of 7 tests failed" in told["why"]
    assert half[-1] == 7
    assert any(0 < some < 7 for some in half)


def test_what_a_process_told() -> None:
    """As far as it came; the last line may be half of one."""
    lines = ['{"all": ["a", "b"]}', '{"begun": "a"}']
    for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed")):
        phase = {
            "name": "a",
            "when": when,
            "outcome": outcome,
            "seconds": 0.5,
            "why": "w" if outcome == "failed" else "",
        }
        lines.append(json.dumps(phase))
    told = heard([*lines, '{"begun": "b"}', '{"name": "b", "wh'])
    assert told.tests == [{"name": "a", "outcome": "failed", "seconds": 1.5, "why": "w"}]
    assert (told.every, told.inside) == (["a", "b"], "b")


def test_what_a_snapshot_blocks() -> None:
    lines = [{"step": n, "step_us": 1000 + 500 * (n % 4 == 0), "us": {"snapshot": 9}} for n in range(1, 13)]
    assert blocked_ms(lines)["blocks_ms"] == 0.5
