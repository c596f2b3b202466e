"""Where a training step's time goes, kernel by kernel: ``python -m tests.bench.bench_step [CASE ...] [--threads 2]``.

Trains a case of ``tests/bench/peers/cases.py`` with a trace of kernel calls (``HS_TRACE_CALLS``) and adds up, for each
kernel, what its calls of a step took: medians over steps. Beside them operations to the peak of the same minute, and
bytes (every operand once, twice where it is read and written) to a copy's; what is left of a step lies between calls.
In a trace nothing waits (``kernels/deferred.h``): AdamW has its whole time here, of which other steps hide some.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import bench_kernels
from tests.bench.peers.calibrate import Peak, calibration
from tests.bench.peers.cases import TRAININGS, Training
from tests.e2e.engine_runs import train
from tests.engine.kernel_lib import fastest_path
from trainer import wire
from trainer.plan.compiled import Plan
from trainer.plan.flops import kernel_flops
from trainer.plan.records import BoundCall
from trainer.wire.kernels import KERNELS, product

ITEM = {"acc": 4, "f64": 8, "byte": 1}
TIMES = {"read": 1, "write": 1, "update": 2, "scratch": 0}
WARM = 2
"""Steps that are not counted: the first ones touch memory that nobody had."""


@dataclass(frozen=True)
class Cost:
    """Of all calls of a kernel in a step."""

    kernel: str
    calls: int
    seconds: float
    operations: float
    bytes: float


@dataclass(frozen=True)
class Profile:
    """Of a case: by kernel, the slowest first; ``step`` seconds of a whole one, ``between`` those of no call."""

    case: str
    costs: tuple[Cost, ...]
    step: float
    between: float


def moved(call: BoundCall) -> float:
    """Bytes of a call's operands; of a table of embeddings, the rows that it takes."""
    named, total = KERNELS[call.kernel].named(call.dim), 0.0
    for operand, ref in zip(KERNELS[call.kernel].operands, call.ptr, strict=True):
        if ref is None:
            continue
        rows = "R" if call.kernel.startswith("embed") and operand.rows == "V" else operand.rows
        item = wire.DTYPE_BYTES[call.dtype] if operand.kind == "dt" else ITEM.get(operand.kind, 4)
        total += TIMES[operand.role] * item * product(rows, named) * product(operand.columns, named)
    return total


def calls_of(plan: Plan) -> Sequence[BoundCall]:
    """The plan's table of calls, of a plan of one position."""
    (position,) = plan.positions
    return [call for program in position.programs.values() for call in program.calls]


def profile(case: Training, threads: int, steps: int = 6) -> Profile:
    """Trains the case, and reads its trace."""
    with tempfile.TemporaryDirectory(prefix="hotstage-step-") as name:
        folder = Path(name)
        plan = case.plan(WARM + steps, threads, folder)
        gang = train(plan, folder / "data", folder / "run", dump=False, trace=wire.TRACE_CALLS, deadline_s=600.0)
        events = json.loads((folder / "run" / "trace-0.json").read_text())["traceEvents"]
    calls, spent = calls_of(plan), dict[str, dict[int, float]]()
    counts, operations, sizes = (
        defaultdict[str, int](int),
        defaultdict[str, float](float),
        defaultdict[str, float](float),
    )
    seen = {e["args"]["step"] for e in events if "call" in e["args"]}
    counted = sorted(step for step in seen if step > WARM)
    for event in events:
        step, number = event["args"]["step"], event["args"].get("call")
        if number is None or step not in counted:
            continue
        call = calls[number]
        by_step = spent.setdefault(call.kernel, dict.fromkeys(counted, 0.0))
        by_step[step] += event["dur"] / 1e6
        if step == counted[0]:
            counts[call.kernel] += 1
            operations[call.kernel] += kernel_flops(call.kernel, call.dim).done
            sizes[call.kernel] += moved(call)
    costs = [
        Cost(kernel, counts[kernel], statistics.median(by_step.values()), operations[kernel], sizes[kernel])
        for kernel, by_step in spent.items()
    ]
    whole = [float(gang.steps[step - 1]["step_us"]) / 1e6 for step in counted]
    between = [
        seconds - sum(by_step[step] for by_step in spent.values()) for step, seconds in zip(counted, whole, strict=True)
    ]
    return Profile(
        case.case,
        tuple(sorted(costs, key=lambda cost: -cost.seconds)),
        statistics.median(whole),
        statistics.median(between),
    )


def copied(threads: int) -> float:
    """Bytes a second of a copy, in and out."""
    return 1e9 * bench_kernels.measure(fastest_path(), threads, 5, "sumsq")[0]["peer_value"]


def lines(found: Profile, peak: float, copy: float) -> Iterator[str]:
    """For people."""
    yield f"{found.case}: a step {1e3 * found.step:.1f} ms; peak {peak / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s"
    for cost in found.costs:
        rates = (cost.operations / cost.seconds, cost.bytes / cost.seconds)
        yield (
            f"  {cost.kernel:22} {cost.calls:4} calls {1e3 * cost.seconds:8.2f} ms {cost.seconds / found.step:6.1%}  "
            f"{rates[0] / 1e9:7.1f} GFLOP/s {rates[0] / peak:5.2f}  {rates[1] / 1e9:6.1f} GB/s {rates[1] / copy:5.2f}"
        )
    yield f"  {'between calls':22} {'':10} {1e3 * found.between:8.2f} ms {found.between / found.step:6.1%}"


def measure(cases: Sequence[Training], threads: int) -> Iterator[tuple[Profile, Peak, float]]:
    """Each case's profile, with the peak and the copy of its minute."""
    with tempfile.TemporaryDirectory() as folder, calibration(Path(folder), threads) as cores:
        for case in cases:
            before = cores.now()
            yield profile(case, threads), before, copied(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="what names begin with; none: all in bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    wanted = options.cases or [t.case for t in TRAININGS if t.precision == "bf16"]
    cases = [t for t in TRAININGS if any(t.case.startswith(name) for name in wanted)]
    for found, peak, copy in measure(cases, options.threads):
        precision = found.case.split("/")[2]
        print("\n".join(lines(found, peak.all[precision], copy)), flush=True)


if __name__ == "__main__":
    main()
