"""What only a device can say, asked before anything stands on it: a question a process, so that none hides another, and
no answer fails the session. What comes back is in the session's notes and figures.

    python -m tests.gpu.probe QUESTION    one of them: a line of JSON with `answer` and `good`
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.kernel_lib import encode
from tests.gpu.device_lib import DeviceError, DeviceLib
from trainer import wire

Told = dict[str, Any]
LIMIT_S = 40.0  # of a question
EMULATED = os.environ.get("HOTSTAGE_GPU_TINY") == "1"


@contextlib.contextmanager
def opened(path: str = "cuda-exact", arena: int = 1 << 22) -> Iterator[DeviceLib]:
    lib = DeviceLib(Path(os.environ["HOTSTAGE_GPU_WAY"]), Path(os.environ["HOTSTAGE_CUDA"]), path, arena=arena)
    try:
        yield lib
    finally:
        lib.close()


def opening() -> Told:
    """How long a context takes, and how much of the device."""
    from tests.gpu.ours import Memory  # half a second of imports, which the other questions do without

    before, began = Memory.used(), time.monotonic()
    with opened() as lib:
        took, found = time.monotonic() - began, lib.facts()
        taken = max(0.0, Memory.used() - before - (lib.arena + found.scratch_bytes) / 2**20)
    answer = (
        f"{found.device}, {found.memory_bytes / 2**30:.1f} GiB; opened in {took:.2f} s, its context {taken:.0f} MiB"
    )
    return {"good": True, "answer": answer, "seconds": took, "context_mib": taken}


def rounding() -> Told:
    """Whether fma.rn.ftz takes a result for denormal after it is rounded, as x86 does (fma_flushed of lane.h)."""
    found = []
    with opened() as lib:
        for tiny in (2.0**-152, 2.0**-150):  # 2^-126 less it: rounds to 2^-126; is below it
            x, w = (np.array(pair, np.float32) for pair in ((-(2.0**-76), 2.0**-63), (tiny * 2.0**76, 2.0**-63)))
            y = encode(np.ones(1), wire.BF16)
            operands = [y, encode(x, wire.BF16), encode(w, wire.BF16), None, None]
            lib.call("linear_fwd", wire.BF16, operands, (1, 1, 2, 1, 2, 1))
            found.append(int(y.view(np.uint16)[0]))
    after = {(0x0080, 0): "after rounding, as x86: the bits are the CPU's",
             (0, 0): "before rounding: a sum that rounds up to 2^-126 is 0 here, and not on a CPU"}  # fmt: skip
    said = after.get((found[0], found[1] & 0x7FFF), f"in a way of its own: {found}")
    return {"good": found[0] == 0x0080, "answer": f"fma.rn.ftz finds denormal numbers {said}"}


def pinning() -> Told:
    """Whether slots in memory files can be pinned; where not, saving holds up the steps and says so."""
    with opened() as lib:
        began = time.monotonic()
        lib.pin(1 << 20 if EMULATED else 1 << 28)
    return {"good": True, "answer": f"a memory file is pinned ({time.monotonic() - began:.2f} s)"}


def graphs() -> Told:
    """Whether a captured kernel runs, and whether a thread may wait for a snapshot while another one makes a graph, as
    in a run's second step."""
    with opened() as lib:
        lib.put(np.ones(4096, np.float32), 0)
        seconds = lib.time("zero", wire.F32, [[0]], (16384,), (), 1 if EMULATED else 1000)
        told = f"graphs run; a kernel after another takes {seconds * 1e6:.2f} us"
        try:
            lib.beside()
        except DeviceError as error:
            return {"good": False, "answer": f"{told}; but none is made while another thread waits: {error}"}
    return {"good": True, "answer": f"{told}; another thread may wait while one is made"}


def products() -> Told:
    """What cuBLASLt has no algorithm of one sum for, of odd shapes and of FP8: a plain kernel computes it."""
    count = 0
    with opened("cuda", 1 << 26) as lib:
        for dtype in (wire.F32, wire.BF16):
            sizes = (
                ((3, 5, 7), (33, 17, 129)) if EMULATED else ((3, 5, 7), (33, 17, 129), (1000, 515, 33), (64, 768, 5027))
            )
            for rows, wide, deep in sizes:
                for kernel, dims in (
                    ("linear_fwd", (rows, wide, deep, wide, deep, wide)),
                    ("linear_igrad", (rows, wide, deep, deep, wide, 1)),
                    ("linear_wgrad", (rows, wide, deep, wide, deep, 1)),
                ):
                    lib.zeros(kernel, dtype, dims)
                    count += 1
        if lib.facts().capability >= 89:
            for rows, wide, deep in ((16, 32, 48),) if EMULATED else ((16, 32, 48), (2048, 3072, 768)):
                for kernel, dims in (
                    ("linear8_fwd", (rows, wide, deep, wide, wide)),
                    ("linear8_igrad", (rows, wide, deep, deep, 1)),
                    ("linear8_wgrad", (rows, wide, deep, wide)),
                ):
                    lib.zeros(kernel, wire.BF16, dims)
                    count += 1
        plain = lib.plain()
    answer = f"cuBLASLt has an algorithm of one sum for {count - len(plain)} of {count} products"
    return {"good": not plain, "answer": answer + "".join(f"; none for {line}" for line in plain), "plain": plain}


def sharing() -> Told:
    """Whether two processes share the device's memory, whether streams wait for values, and NCCL."""
    with opened() as lib:
        shares, library, missing = lib.links()
        if not shares:
            return {"good": False, "answer": f"memory is not shared: {missing}; NCCL {library}"}
        command = [sys.executable, "-m", "tests.gpu.probe", "reach", lib.share(4711).hex()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S / 2)
        reached = done.stdout.strip() == "4711"
        lib.value()
    said = "another process reads this one's device memory" if reached else f"it does not: {done.stderr.strip()[-300:]}"
    return {"good": reached, "answer": f"{said}; streams wait for values; NCCL {library} {missing}"}


QUESTIONS: dict[str, Callable[[], Told]] = {
    "opening": opening,
    "graphs": graphs,
    "products": products,
    "pinning": pinning,
    "rounding": rounding,
    "sharing": sharing,
}


def _ask(name: str) -> Told:
    """In a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.probe", name],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"good": False, "answer": f"no answer in {LIMIT_S:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        return {"good": False, "answer": f"the question ended with {done.returncode}: {done.stderr.strip()[-600:]}"}
    return dict(json.loads(lines[-1]))


def asked(so_far: Callable[[Told], None]) -> Told:
    """The stage: all of them, whatever they answer."""
    answers: dict[str, Told] = {}
    told: Told = {"figures": answers, "notes": []}
    for name in QUESTIONS:
        answers[name] = _ask(name)
        told["notes"].append(f"{name}: {'' if answers[name]['good'] else 'NOT AS HOPED: '}{answers[name]['answer']}")
        so_far(told)
    return told


def main() -> int:
    name = sys.argv[1]
    if name == "reach":
        with opened() as lib:
            sys.stdout.write(f"{lib.reach(bytes.fromhex(sys.argv[2]))}\n")
        return 0
    sys.stdout.write(json.dumps(QUESTIONS[name]()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
