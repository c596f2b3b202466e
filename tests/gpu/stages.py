"""What a session does, a function a stage; the list of them in the order of what tells most for least time.

    python -m tests.gpu.stages NAME FOLDER RESULT    one stage, in a process of its own (session.py)

A stage hands back JSON: ``tests`` (name, outcome, what it said), ``figures`` (numbers for report.py), ``notes``. It
ends with 0 where nothing failed, with 1 where something did, with 69 and ``why`` where it cannot be done here. What is
run is printed with its command, into the session's log.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu import box
from tests.gpu.session import CANNOT, ROOT, Stage
from tests.gpu.under_pytest import under_pytest
from trainer.wire.files import write_file

Told = dict[str, Any]
HERE = Path(__file__).resolve().parent
BUILT = ".built.json"  # where the build's files are, for the stages after it
PEERS = ("torch", "jax")
MODELS = ("gpt2-124m", "llama-1b", "gpt2-1.5b")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


_result: list[Path] = []  # where this process hands over what its stage found


def so_far(told: Told) -> None:
    """What the stage has by now, kept where it is ended before its end."""
    for path in _result:
        write_file(path, json.dumps(told).encode(), 0o644)


class Cannot(Exception):
    """A stage cannot be done here, and why."""


def tiny() -> bool:
    """Whether sizes are those of the rehearsal."""
    return os.environ.get("HOTSTAGE_GPU_TINY") == "1"


# --- the list -------------------------------------------------------------------------------------------------


def stages() -> list[Stage]:
    """In their order."""
    one, more, build = ("device",), ("device", "nvcc", "compilers"), ("build",)
    fast = (*one, "products")  # kernel path cuda
    sanitizer_ = ("compute-sanitizer",)
    small, llama, large = (f"train-{model}" for model in MODELS)
    found = [
        Stage("build", "engine, library and the tests' way to a device", 300, 60, more),
        Stage("probe", "what only a device can say, a question a process", 120, 20, one, build),
        Stage("facts", "the device as the backend opens it, copy rates, a large product", 90, 20, fast, build),
        Stage(small, "GPT-2 124M, bf16: tokens a second, start, memory", 120, 30, fast, build),
        Stage("kernels-exact", "odd shapes on cuda-exact: the CPU's bits, the oracle's bounds", 240, 40, one, build),
        Stage("kernels-cuda", "odd shapes on cuda: the oracle's bounds, one bit pattern", 240, 40, fast, build),
        Stage("models-exact", "tiny and golden models on cuda-exact", 240, 45, one, build),
        Stage("models-cuda", "tiny and golden models on cuda", 240, 45, fast, build),
        Stage("torch-gpt2-124m", "GPT-2 124M beside PyTorch", 330, 150, (*one, "torch"), (small,)),
        Stage("roofline-gpt2-124m", "each kernel call of GPT-2 124M beside the probes", 120, 40, one, (small,)),
        Stage("timeline-gpt2-124m", "time of a step outside kernels", 90, 30, ("gpu",), (small,)),
        Stage("channels", "two ranks on one device: one rank's bits", 120, 30, one, (small,)),
        Stage("large-exact", "kernels at real sizes on cuda-exact", 300, 90, one, build),
        Stage("large-cuda", "kernels at real sizes on cuda", 300, 90, fast, build),
        Stage("memcheck", "compute-sanitizer on the small kernel cases", 300, 90, sanitizer_, build),
        Stage(llama, "a llama of 1B, T 4096, bf16", 120, 40, fast, build),
        Stage("torch-llama-1b", "the llama beside PyTorch", 420, 170, (*one, "torch"), (llama,)),
        Stage(large, "GPT-2 1.5B-shaped, bf16", 150, 45, fast, build),
        Stage("torch-gpt2-1.5b", "GPT-2 1.5B-shaped beside PyTorch", 480, 220, (*one, "torch"), (large,)),
        Stage("snapshot", "what a snapshot of a large state costs the steps around it", 150, 60, one, (llama,)),
        Stage("fp8-llama-1b", "the llama in FP8 beside bf16", 200, 60, (*one, "fp8"), (llama,)),
        Stage("roofline-llama-1b", "each kernel call of the llama beside the probes", 120, 50, one, (llama,)),
        Stage("racecheck", "compute-sanitizer: races in shared memory", 240, 60, sanitizer_, build),
        Stage("initcheck", "compute-sanitizer: memory read before it was written", 240, 60, sanitizer_, build),
        Stage("synccheck", "compute-sanitizer: barriers", 240, 60, sanitizer_, build),
        Stage("jax-gpt2-124m", "GPT-2 124M beside JAX", 300, 120, (*one, "jax"), (small,)),
        Stage("jax-llama-1b", "the llama beside JAX", 400, 150, (*one, "jax"), (llama,)),
        Stage("jax-gpt2-1.5b", "GPT-2 1.5B-shaped beside JAX", 480, 200, (*one, "jax"), (large,)),
    ]
    if tiny():  # nothing in the rehearsal takes long
        found = [Stage(s.name, s.about, 300, 1, s.needs, s.after) for s in found]
    return found


# --- what stages share ----------------------------------------------------------------------------------------


def run(
    command: Sequence[str | Path], *, more: dict[str, str] | None = None, limit_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with its output, both in the log."""
    words = [str(word) for word in command]
    told = " ".join(f"{k}={shlex.quote(v)}" for k, v in (more or {}).items())
    print(f"$ {told}{' ' if told else ''}{shlex.join(words)}", flush=True)
    began = time.monotonic()
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | (more or {}), cwd=ROOT, check=False, timeout=limit_s
    )
    print(
        f"{done.stdout[-20000:]}{done.stderr[-20000:]}\n-> {done.returncode}, {time.monotonic() - began:.1f} s",
        flush=True,
    )
    return done


def one_test(name: str, passed: bool, why: str = "") -> Told:
    """A check of ours in pytest's form."""
    return {"name": name, "outcome": "passed" if passed else "failed", "seconds": 0.0, "why": "" if passed else why}


def peer(name: str, model: str, *arguments: str) -> Told:
    """What a peer's script says of a workload."""
    from tests.gpu.workloads import workload

    w = workload(model, tiny())
    command = [sys.executable, str(HERE / "peers" / f"{name}_train.py"), json.dumps(w.for_peers()), *arguments]
    done = run(command)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        return {"error": done.stderr.strip()[-400:] or f"ended with {done.returncode}"}
    return dict(json.loads(lines[-1]))


# --- stages ---------------------------------------------------------------------------------------------------


def build_all(folder: Path) -> Told:
    from tests.gpu.build import BuildFailed, build

    try:
        built = build(Path(os.environ.get("HOTSTAGE_GPU_BUILD", str(ROOT / "out" / "gpu-build"))))
    except BuildFailed as error:
        return {"why": str(error)[-1500:], "failed": True}
    where = {"engine": str(built.engine), "library": str(built.library), "way": str(built.way)}
    (folder / BUILT).write_text(json.dumps(where))
    return {
        "figures": {"seconds": built.seconds, "slowest": built.slowest},
        "notes": [f"{k}: {v}" for k, v in where.items()],
    }


def probe(folder: Path) -> Told:
    from tests.gpu.probe import asked

    return asked(so_far)


def facts(folder: Path) -> Told:
    from tests.gpu.roofline import probes

    if shutil.which("nvidia-smi") and box.devices():
        run(["nvidia-smi"])
    with opened("cuda", arena=1 << 20 if tiny() else 1 << 32, window=1 << 16 if tiny() else 1 << 28) as lib:
        found = lib.facts()
        rates = probes(lib, tiny())
    notes = [
        f"{found.device}, capability {found.capability}, kernels {found.kernels}, scratch {found.scratch_bytes} bytes"
    ]
    notes += [f"{name}: {value / 1e12:.3f} T/s" for name, value in rates.items()]
    after = box.devices()
    return {
        "figures": {"box": box.facts(), "probes": rates, "device": found.device, "clocks": after[:1]},
        "notes": notes,
    }


class opened:
    """The device through its library, closed at the end."""

    def __init__(self, path: str, arena: int, window: int) -> None:
        self.path, self.arena, self.window = path, arena, window

    def __enter__(self) -> Any:
        from tests.gpu.device_lib import DeviceLib

        way, library = Path(os.environ["HOTSTAGE_GPU_WAY"]), Path(os.environ["HOTSTAGE_CUDA"])
        self.lib = DeviceLib(way, library, self.path, arena=self.arena, window=self.window)
        return self.lib

    def __exit__(self, *_: object) -> None:
        self.lib.close()


def kernels(path: str) -> Told:
    cases = {"HOTSTAGE_GPU_CASES": "one" if tiny() else "odd"}
    return under_pytest("device_kernels.py", path, cases, quiet_s=60, so_far=so_far)


def large(path: str) -> Told:
    cases = {"HOTSTAGE_GPU_CASES": "one-large" if tiny() else "large"}
    return under_pytest("device_kernels.py", path, cases, so_far=so_far)


def models(path: str) -> Told:
    return under_pytest("device_models.py", path, {"HOTSTAGE_GPU_CASES": "one"} if tiny() else {}, so_far=so_far)


def looking(program: str, tool: str) -> list[str]:
    """compute-sanitizer under a tool. memcheck tells calls that fail too, unless it is told not to: a library asks a
    driver for what a newer one has, and our backend looks at every status itself."""
    calls = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *calls]


def sanitizer(tool: str) -> Told:
    """The small cases under one tool of compute-sanitizer, both paths; of a library's products none: their kernels are
    its own, and large to look into."""
    program = box.tool("compute-sanitizer")
    if program is None:
        raise Cannot("compute-sanitizer is not installed")
    told: Told = {"tests": []}
    cases = "few" if tool == "memcheck" else "one"  # the others take long
    for path in ("cuda-exact", "cuda"):
        more = {"HOTSTAGE_GPU_CASES": cases} | ({"HOTSTAGE_GPU_OURS": "1"} if path == "cuda" else {})
        found = under_pytest("device_kernels.py", path, more, looking(program, tool))
        cannot = re.search(r".*(?:Device not supported|Unable to).*", found["said"])
        if cannot:
            raise Cannot(f"compute-sanitizer cannot work on this machine: {cannot[0][:300]}")
        summary = re.findall(r"={3,} (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", found["said"])
        clean = found["code"] == 0
        told["tests"].append(one_test(f"{tool}[{path}]", clean, "\n".join(summary) or found["said"][-1500:]))
        told.setdefault("notes", []).extend(f"{path}: {line}" for line in summary)
    wrong = [test for test in told["tests"] if test["outcome"] == "failed"]
    if wrong:
        told |= {"failed": True, "why": f"{wrong[0]['name']}: {wrong[0]['why'][:300]}"}
    return told


def train(model: str, folder: Path) -> Told:
    from tests.gpu.ours import trained
    from tests.gpu.workloads import workload

    w = workload(model, tiny())
    choice = folder / f".algorithms-{model}"
    choice.unlink(missing_ok=True)
    first = trained(w, "bf16", algorithms=choice)
    so_far({"figures": {"ours": first.told(w) | {"first_start_s": first.start_s}}})
    again = trained(w, "bf16", algorithms=choice)
    equal = again.losses == first.losses
    ours = again.told(w) | {"first_start_s": first.start_s}
    told: Told = {"figures": {"ours": ours}, "tests": [one_test(f"two runs of {model} give equal losses", equal)]}
    if not equal:
        told |= {"failed": True, "why": "two runs of the same training have other losses"}
    return told


def beside(name: str, model: str, folder: Path) -> Told:
    """Ours, the peer's variants, ours again: one run, so that what drifts drifts for both."""
    from tests.gpu.ours import trained, watched
    from tests.gpu.workloads import workload

    w = workload(model, tiny())
    choice = folder / f".algorithms-{model}"
    before = trained(w, "bf16", algorithms=choice).told(w)
    variants = ("autocast", "pure") if name == "torch" else ("",)
    found: dict[str, Told] = {}
    so_far({"figures": {"ours": before}})
    for variant in variants:
        arguments = [variant] if variant else []
        if name == "torch" and box.emulated():
            arguments += ["--device", "cpu", "--eager"]
        with watched() as memory:
            said = peer(name, model, *arguments)
        # what JAX sets aside is not what it needs: it tells its own peak
        said["memory_mib"] = said.get("jax_peak_mib") or memory.mib or said.get("torch_reserved_mib")
        found[variant or name] = said
        so_far({"figures": {"ours": before, name: found}})
    after = trained(w, "bf16", algorithms=choice).told(w)
    speeds = [said["tokens_per_s"] for said in found.values() if "tokens_per_s" in said]
    told: Told = {"figures": {"ours": before, "again": after, name: found}}
    if not speeds:
        told |= {"failed": True, "why": f"{name} did not run: {next(iter(found.values())).get('error', '')[-300:]}"}
    return told


def fp8(model: str) -> Told:
    from tests.gpu.ours import trained
    from tests.gpu.workloads import spec_of, workload
    from trainer.errors import SpecError

    w = workload(model, tiny())
    try:
        spec_of(w, "fp8", 1)
    except SpecError as error:
        raise Cannot(f"this version has no FP8: {str(error)[:200]}") from error
    before, here, after = trained(w, "bf16"), trained(w, "fp8"), trained(w, "bf16")
    return {"figures": {"ours": here.told(w), "bf16": before.told(w), "again": after.told(w)}}


def roofline(model: str) -> Told:
    from tests.gpu.roofline import LONG_S, Timed, probes, timed
    from tests.gpu.workloads import plan_of, workload

    w = workload(model, tiny())
    with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
        plan = plan_of(w, "bf16", 1, Path(scratch))
    with opened("cuda", arena=1 << 22 if tiny() else 6 << 30, window=1 << 16 if tiny() else 1 << 28) as lib:
        rates = probes(lib, tiny())

        def told_of(found: Sequence[Timed]) -> Told:
            rows = [one.told(rates["copy on device"], rates["product bf16"]) for one in found]
            whole = sum(one.seconds * one.count for one in found)
            return {"kernels": rows, "probes": rates, "sum_ms": whole * 1e3}

        found, left_out = timed(lib, plan, 0 if tiny() else LONG_S, lambda some: so_far({"figures": told_of(some)}))
    figures = told_of(found)
    for row in figures["kernels"]:
        print(json.dumps(row))
    notes = [
        f"the calls of a step, timed alone, take {figures['sum_ms']:.2f} ms",
        *(f"left out: {text}" for text in left_out),
    ]
    return {"figures": figures, "notes": notes}


def timeline(model: str) -> Told:
    from tests.gpu.kernel_times import measure

    return measure(model, tiny())


def channels(folder: Path) -> Told:
    from tests.gpu.channels import measure

    return measure(tiny(), folder)


def snapshot(folder: Path) -> Told:
    from tests.gpu.snapshot import measure

    return measure(tiny())


def function_of(name: str) -> Callable[[Path], Told]:
    """What a stage of the list does."""
    alone = {"build": build_all, "probe": probe, "facts": facts, "channels": channels, "snapshot": snapshot}
    if name in alone:
        return alone[name]
    if name in TOOLS:
        return lambda _: sanitizer(name)
    what, _, which = name.partition("-")
    paths = {"exact": "cuda-exact", "cuda": "cuda"}
    if what in ("kernels", "large", "models"):
        return lambda _: {"kernels": kernels, "large": large, "models": models}[what](paths[which])
    if what in PEERS:
        return lambda folder: beside(what, which, folder)
    if what == "train":
        return lambda folder: train(which, folder)
    return lambda _: {"fp8": fp8, "roofline": roofline, "timeline": timeline}[what](which)


def main() -> int:
    name, folder, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if name != "build":
        built = json.loads((folder / BUILT).read_text())
        os.environ |= {
            "HOTSTAGE_ENGINE": built["engine"],
            "HOTSTAGE_CUDA": built["library"],
            "HOTSTAGE_GPU_WAY": built["way"],
        }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _result.append(result)
    code = 0
    try:
        told = function_of(name)(folder)
        code = 1 if told.pop("failed", False) else 0
    except Cannot as error:
        told, code = {"why": str(error)}, CANNOT
    except Exception as error:  # whatever a device does: it is this stage's result, and the next one goes on
        traceback.print_exc()
        sys.stderr.flush()
        told, code = {"why": f"{type(error).__name__}: {str(error)[-1200:]}"}, 1
    for line in told.get("notes", []):
        print(line, flush=True)
    result.write_text(json.dumps(told))
    return code


if __name__ == "__main__":
    sys.exit(main())
