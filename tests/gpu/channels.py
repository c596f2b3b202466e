"""Two ranks on one device: the same bits as one rank, by the way that the channels choose and by TCP, and how long each
takes a step."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.ours import gang_of
from tests.gpu.workloads import plan_of, workload


def measure(tiny: bool, kept: Path) -> dict[str, Any]:
    """The stage."""
    from tests.gpu.stages import one_test

    w = workload("gpt2-124m", tiny)
    steps = 4 if tiny else 8
    found: dict[str, Any] = {}
    choice = kept / ".algorithms-channels"
    choice.unlink(missing_ok=True)
    for name, stages in (("one rank", 1), ("two ranks", 2)):
        with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
            folder = Path(scratch)
            gang = gang_of(plan_of(w, "bf16", steps, folder, stages=stages), folder, algorithms=choice)
            said = "\n".join(p.read_text() for p in sorted((folder / "run").glob("stderr-*")))
        found[name] = {
            "losses": gang.losses,
            "norms": gang.norms,
            "step_ms": statistics.median(float(event["step_us"]) for event in gang.steps[2:]) / 1e3,
            "said": said[-1500:],
        }
    one, two = found["one rank"], found["two ranks"]
    equal = (one["losses"], one["norms"]) == (two["losses"], two["norms"])
    told: dict[str, Any] = {
        "tests": [
            one_test("two ranks on one device give one rank's bits", equal, f"{one['losses']} and {two['losses']}")
        ],
        "figures": {name: {"step_ms": value["step_ms"]} for name, value in found.items()},
        "notes": [f"{name}: {value['step_ms']:.2f} ms a step" for name, value in found.items()],
    }
    if not equal:
        told |= {"failed": True, "why": "two ranks on one device have other losses than one"}
    return told
