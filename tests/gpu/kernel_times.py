"""Time of a step outside kernels: the engine trains with CUPTI looking on (kernel_times.c), and the union of all times
in which a kernel ran is taken from the time of whole steps. Needs CUPTI's headers and library, of the toolkit or of
PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from k8s.images.cuda import kernel_name
from tests.gpu import box

SKIPPED = 2  # first steps, in which graphs are made
OPTIMIZER = "adamw"  # the last kernels of a step


class NoCupti(Exception):
    """What is missing."""


def cupti() -> tuple[list[str], Path]:
    """(folders of headers, the library)."""
    includes, libraries = [], []
    for kit in box.toolkits():
        includes += [kit / "include", kit / "extras" / "CUPTI" / "include", *kit.glob("targets/*/include")]
        libraries += [kit / "lib64", kit / "lib", kit / "extras" / "CUPTI" / "lib64", *kit.glob("targets/*/lib")]
    for site in box.site_folders():
        includes += [site / "cuda_cupti" / "include", *site.glob("cu1*/include"), *site.glob("cuda_runtime/include")]
        libraries += [site / "cuda_cupti" / "lib", *site.glob("cu1*/lib")]
    needed = ("cupti.h", "cuda.h", "crt/host_defines.h")
    found = {name: next((p for p in includes if (p / name).exists()), None) for name in needed}
    library = next((lib for p in libraries for lib in sorted(p.glob("libcupti.so*"))), None)
    lost = [*(name for name, p in found.items() if p is None), *(["libcupti.so"] if library is None else [])]
    if library is None or lost:
        raise NoCupti(f"there is no {', '.join(lost)}: the CUDA toolkit has them (extras/CUPTI), or PyTorch's wheels")
    return list(dict.fromkeys(str(p) for p in found.values())), library


def newest_record(header: str) -> str:
    """The kernel record's name in a text of cupti_activity.h."""
    numbers = [int(n or 0) for n in re.findall(r"\} CUpti_ActivityKernel(\d*);", header)]
    if not numbers:
        raise NoCupti("cupti_activity.h has no CUpti_ActivityKernel")
    return f"CUpti_ActivityKernel{max(numbers)}"


def command(target: Path, includes: Sequence[str], library: Path) -> list[str]:
    """How the injected library is compiled."""
    record = newest_record((Path(includes[0]) / "cupti_activity.h").read_text(errors="replace"))
    source = Path(__file__).with_suffix(".c")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", f"-DHS_KERNEL_RECORD={record}"]
    flags += [f"-isystem{p}" for p in includes]
    return ["gcc", *flags, "-o", str(target), str(source), str(library), f"-Wl,-rpath,{library.parent}"]


def read(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, kernel) of each line, in the order of their begin."""
    found = []
    for line in text.splitlines():
        begin, end, name = line.split(" ", 2)
        found.append((int(begin), int(end), name))
    return sorted(found)


def union(times: Iterable[tuple[int, int, str]]) -> int:
    """Nanoseconds in which at least one ran; times in the order of their begin."""
    busy, until = 0, 0
    for begin, end, _ in times:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy


def readable(name: str) -> str:
    """A kernel's name without the types of its operands; CUPTI gives it as the linker knows it."""
    with contextlib.suppress(ValueError, IndexError):  # a library's are what they are
        name = kernel_name(name)
    return re.sub(r"[(].*", "", name.removeprefix("void "))[:80]


def outside(times: Sequence[tuple[int, int, str]], steps: int) -> dict[str, Any]:
    """What part of whole steps no kernel ran in, and the kernels that took most. A step ends with its last update."""
    updates = sorted(end for _, end, name in times if OPTIMIZER in name)
    if steps <= SKIPPED + 1 or not updates or len(updates) % steps:
        raise AssertionError(f"{len(updates)} updates ({OPTIMIZER}) were seen in {steps} steps")
    each = len(updates) // steps
    ends = [updates[each * (n + 1) - 1] for n in range(steps)]
    first, last = ends[SKIPPED - 1], ends[-1]
    inside = [t for t in times if t[0] >= first and t[1] <= last]
    busy = union(inside)
    by_name: Counter[str] = Counter()
    for begin, end, name in inside:
        by_name[readable(name)] += end - begin
    whole = steps - SKIPPED
    return {
        "outside": 1 - busy / (last - first),
        "step_ms": (last - first) / whole / 1e6,
        "kernels_ms": busy / whole / 1e6,
        "kernels_a_step": len(inside) / whole,
        "longest": {name: ns / whole / 1e3 for name, ns in by_name.most_common(12)},
    }


def measure(model: str, tiny: bool) -> dict[str, Any]:
    """The stage: figures of a workload's steps."""
    from tests.gpu.ours import gang_of
    from tests.gpu.stages import Cannot, run
    from tests.gpu.workloads import plan_of, workload

    w = workload(model, tiny)
    steps = w.warm + w.steps
    with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
        folder = Path(scratch)
        try:
            includes, library = cupti()
            looking = folder / "kernel_times.so"
            if run(command(looking, includes, library)).returncode != 0:
                raise NoCupti("kernel_times.c does not compile with the CUPTI that is here; see the log")
        except NoCupti as error:
            raise Cannot(str(error)) from error
        told = folder / "kernel-times"
        os.environ |= {"CUDA_INJECTION64_PATH": str(looking), "HS_KERNEL_TIMES": str(told)}
        try:
            gang_of(plan_of(w, "bf16", steps, folder), folder)
        finally:
            del os.environ["CUDA_INJECTION64_PATH"], os.environ["HS_KERNEL_TIMES"]
        if not told.exists() or not told.read_text().strip():
            raise Cannot(
                "CUPTI saw no kernel: profiling is not allowed on this machine, or the library was not injected"
            )
        found = outside(read(told.read_text()), steps)
    longest = [f"{us:9.1f} us a step  {name}" for name, us in found["longest"].items()]
    part = f"{100 * found['outside']:.2f} % of {found['step_ms']:.2f} ms a step is outside kernels"
    return {"figures": found, "notes": [part, *longest]}
