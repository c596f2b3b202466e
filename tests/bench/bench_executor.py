"""What the engine itself does in a step of GPT-2 124M, beside a device that has nothing to do
(``tests/engine/programs/idle_device.c``): read tokens, issue programs, add losses, decide, tell.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import tomllib
from pathlib import Path

import numpy as np

from tests.e2e.engine_runs import train, write_samples
from tests.engine.engine_build import build_idle_device
from trainer import wire
from trainer.plan import compile_plan
from trainer.presets import PRESETS
from trainer.spec import parse_spec, what_digest

STEPS, BATCH, MICROBATCH, SEQUENCE = 40, 32, 4, 1024
TOKENS = BATCH * SEQUENCE


def measure() -> dict[str, float]:
    """Microseconds of a step with graphs and without; how many programs and kernels that is."""
    sets = [f"train.batch={BATCH}", f"train.microbatch={MICROBATCH}", f"train.sequence={SEQUENCE}"]
    sets += [
        f"train.steps={STEPS}",
        'train.precision="bf16"',
        "model.vocab=50304",
        "parallel.stages=1",
        "train.schedule.warmup=0",
    ]
    spec = parse_spec(tomllib.loads(PRESETS["gpt2-124m"]), sets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = np.random.default_rng(0).integers(0, 50257, (BATCH, SEQUENCE + 1)).astype(np.int64)
        dataset = write_samples(folder / "data", samples, 50257)
        spec = spec.resolve(dataset)
        plan = compile_plan(spec, dataset, what_digest(spec, dataset))
        (position,) = plan.positions
        programs = [position.programs[str(a.program)] for a in position.step if a.kind == wire.A_RUN]
        found = {"programs": float(len(programs)), "kernels": float(sum(len(p.calls) for p in programs))}
        for way, plain in (("graphs", ""), ("plain", "1")):
            os.environ["HOTSTAGE_CUDA"] = str(build_idle_device())
            os.environ.pop("HS_IDLE_PLAIN", None)
            if plain:
                os.environ["HS_IDLE_PLAIN"] = plain
            gang = train(plan, folder / "data", folder / way, device="cuda", dump=False)
            found[way] = statistics.median(float(step["step_us"]) for step in gang.steps[5:])
        for name in ("HOTSTAGE_CUDA", "HS_IDLE_PLAIN"):
            os.environ.pop(name, None)
        return found
