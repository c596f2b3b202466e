"""Compiles the plan of a very long pipeline, in a process of its own: CPU seconds and peak memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

from trainer.dataset import DatasetRef
from trainer.plan import compile_plan
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.spec import parse_spec, what_digest

STAGES, MICROBATCHES = 1000, 4000


def compile_one(schedule: str, simulated: bool) -> dict[str, float]:
    """Compiles, writes and names one plan in this process; CPU seconds, and the process's peak in bytes."""
    data = DatasetRef("ab" * 32, 300, 2, (10_000_000,), "cd" * 32)
    model = {"family": "gpt2", "layers": STAGES, "width": 32, "heads": 4, "context": 64}
    train = {"steps": 10, "batch": MICROBATCHES, "microbatch": 1, "sequence": 16}
    parallel = {"stages": STAGES, "schedule": schedule}
    spec = parse_spec({"name": "long", "model": model, "train": train, "parallel": parallel}).resolve(data)
    what = what_digest(spec, data)
    began = time.process_time()
    plan = compile_plan(spec, data, what)
    size = len(plan.to_bytes())
    assert len(plan.digest) == 64
    out = {"seconds": time.process_time() - began, "file_bytes": size}
    out["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if simulated:
        began = time.process_time()
        cost = CostModel(1e12, 1e11)
        assert simulate(from_plan(plan, cost), cost).step_seconds > 0
        out["simulation_seconds"] = time.process_time() - began
    return out


def measure(schedule: str, simulated: bool = False) -> dict[str, float]:
    """``compile_one`` in a process of its own."""
    program = f"""\
import json
from tests.bench.bench_plan import compile_one
print(json.dumps(compile_one({schedule!r}, {simulated})))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))
