"""``make bench``: the project's figures, into out/bench.json as [{name, value, unit, peer, peer_value, ratio}].

What is compared lies side by side in one run on one machine; a figure without a rival carries its target as the peer. A
calibrated fma peak of the moment stands beside every product, because machines are noisy. Times are medians.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.store import open_store
from flows.drive.begin import prepare_run
from flows.drive.events import Event
from flows.drive.live import StatusReader
from flows.drive.run import Prepared
from flows.drive.train import make_driver
from tests.bench import (
    bench_checkpoint,
    bench_data,
    bench_demo,
    bench_executor,
    bench_kernels,
    bench_log,
    bench_losses,
    bench_messages,
    bench_pipeline,
    bench_plan,
    bench_show,
    bench_start,
    bench_step,
    bench_store,
    bench_transfer,
    bench_watch,
)
from tests.bench.results import entry, say, write
from tests.e2e.engine_runs import Gang, write_samples
from tests.e2e.engine_runs import train as run_engine
from tests.engine.kernel_lib import fastest_path
from trainer.plan import compile_plan
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec, what_digest

ROUNDS = int(os.environ.get("HOTSTAGE_BENCH_ROUNDS", "3"))


def gpt2_124m(*sets: str) -> RunSpec:
    """The 124M spec at B 4, T 64 in one microbatch."""
    return parse_spec(
        tomllib.loads(PRESETS["gpt2-124m"]),
        [
            "train.batch=4",
            "train.microbatch=4",
            "train.sequence=64",
            "model.vocab=50304",
            "train.schedule.warmup=0",
            *sets,
        ],
    )


def engine_124m(folder: Path, stages: int, steps: int, precision: str = "fp32") -> Gang:
    spec = gpt2_124m(f"parallel.stages={stages}", f"train.steps={steps}", f'train.precision="{precision}"')
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 50257, (4 * steps, 65)).astype(np.int64)
    dataset = write_samples(folder / "data", samples, 50257)
    spec = spec.resolve(dataset)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    return run_engine(plan, folder / "data", folder / "run", dump=False)


def throughput(precision: str) -> dict[str, Any]:
    """Tokens a second of whole steps on one stage, beside the calibrated peak's bound (6 N FLOPs a token)."""
    with tempfile.TemporaryDirectory() as folder:
        gang = engine_124m(Path(folder), 1, 6, precision)
    seconds = statistics.median(float(e["step_us"]) for e in gang.steps[1:]) / 1e6
    from flows.show.peak import measured_peak
    from trainer.plan import flops_per_token

    bound = measured_peak() / flops_per_token(gpt2_124m().model, 64)
    return entry(
        f"tokens a second, GPT-2 124M, {precision}, B 4 T 64", 256 / seconds, "tok/s", "fp32 peak allows", bound
    )


def memory() -> Iterator[dict[str, Any]]:
    """Peak resident bytes of each rank against the plan's account, without slots (no agent here)."""
    for stages in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            gang = engine_124m(Path(folder), stages, 2)
            planned = gang.plan.positions[0].total_bytes - gang.plan.positions[0].bytes_by_kind["slots"]
            seen = max(int(e["rss_bytes"]) for e in gang.steps)
            yield entry(
                f"peak memory of rank 0, GPT-2 124M, {stages} stage(s)", seen / 2**20, "MiB", "plan", planned / 2**20
            )


# --- recovery ---------------------------------------------------------------------------------------------


class _Kill:
    """Kills the last rank at a step, and takes the times that recovery is made of."""

    def __init__(self, prepared: Prepared, store: Any, at: int) -> None:
        self.prepared, self.store, self.at = prepared, store, at
        self.killed: float | None = None
        self.recovered: float | None = None
        self.done = threading.Event()

    def tell(self, event: Event) -> None:
        if event.kind != "step":
            return
        step, epoch = int(event.facts["step"]), int(event.facts["epoch"])
        if self.killed is None and step >= self.at:
            launch = f"{self.prepared.run}-l1"
            for node in StatusReader(self.store, self.prepared.run, launch).poll(1, {}):
                pids = [r.pid for r in node.ranks if r.pid]
                if pids:
                    self.epoch = epoch
                    self.killed = time.time()
                    os.kill(pids[-1], signal.SIGKILL)
        elif self.killed is not None and self.recovered is None and epoch > self.epoch:
            self.recovered = float(event.facts.get("time", time.time()))
            self.done.set()


def restored_s(folder: Path) -> float:
    """What the slowest rank of the last attempt took to have its state back from memory, by its own word."""
    lines = [line for path in folder.rglob("*") if path.is_file() for line in path.read_bytes().splitlines()]
    told = [json.loads(line) for line in lines if b'"restored"' in line]
    last = max(int(line["epoch"]) for line in told)
    return max(float(line["us"]) for line in told if int(line["epoch"]) == last) / 1e6


def recovery() -> Iterator[dict[str, Any]]:
    """SIGKILL of a stage to the end of the next attempt's first step, and of it the state's way back from memory: 124M,
    two stages (1.5 GB together)."""
    times, restores = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            corpus = root / "a.txt"
            corpus.write_text("the quick brown fox jumps over the lazy dog " * 4000)
            spec = gpt2_124m(
                "parallel.stages=2",
                "train.steps=40",
                "checkpoint.every=8",
                f'data.source="text:{corpus}"',
                "data.vocab_size=300",
            )
            store = open_store(f"file://{root / 'store'}")
            prepared = prepare_run(spec, store)
            kill = _Kill(prepared, store, 14)  # between two snapshots, the last upload done
            driver = make_driver(prepared, store, sink=kill, out=root / "out")
            thread = threading.Thread(target=driver.run, daemon=True)
            thread.start()
            if not kill.done.wait(300) or kill.killed is None or kill.recovered is None:
                raise SystemExit("the run did not recover")
            times.append(kill.recovered - kill.killed)
            restores.append(restored_s(root))
            from flows.drive.train import cancel

            cancel(store, prepared.run)
            thread.join(60)
    yield entry("SIGKILL of a stage to the next step, GPT-2 124M, local", statistics.median(times), "s", "target", 3.0)
    name = "checkpoint/memory-restore, after the SIGKILL of one of two ranks, 1.5 GB together"
    yield entry(name, statistics.median(restores), "s", "target", 1.0)


def kernels() -> Iterator[dict[str, Any]]:
    path = fastest_path()
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for row in bench_kernels.measure(path, threads):
            yield entry(row["name"], row["value"], row["unit"], row["peer"], row["peer_value"])


def step() -> Iterator[dict[str, Any]]:
    """Where a step of the peers' cases in bf16 goes: what the calls of each kernel take of it."""
    cases = [case for case in bench_step.TRAININGS if case.precision == "bf16"]
    for found, peak, copy in bench_step.measure(cases, len(os.sched_getaffinity(0))):
        for line in bench_step.lines(found, peak.all["bf16"], copy):
            say(line)
        for cost in found.costs:
            yield entry(f"step/{found.case}/{cost.kernel}", 1e3 * cost.seconds, "ms", "step", 1e3 * found.step)
        yield entry(f"step/{found.case}/between calls", 1e3 * found.between, "ms", "step", 1e3 * found.step)


def executor() -> Iterator[dict[str, Any]]:
    """Of a step outside kernels, on one core, beside a fiftieth of the step that 0.58 M tok/s (an H100) would be."""
    told = bench_executor.measure()
    most = 0.02 * bench_executor.TOKENS / 0.58
    kernels = f"{told['programs']:.0f} programs of {told['kernels']:.0f} kernels"
    yield entry(f"executor/step-us, GPT-2 124M, {kernels}, as graphs", told["graphs"], "us", "target", most)
    yield entry(f"executor/step-us, GPT-2 124M, {kernels}, plain", told["plain"], "us", "graphs", told["graphs"])


def messages() -> Iterator[dict[str, Any]]:
    """What messages cost a step of two stages on this machine's loopback; see ``bench_messages.py``."""
    costs = [bench_messages.measure() for _ in range(ROUNDS)]
    shape = f"GPT-2 124M, 2 stages, {bench_messages.MICROBATCHES} microbatches of {bench_messages.MICROBATCH} x "
    shape += f"{bench_messages.SEQUENCE}"
    lost = statistics.median(cost.lost for cost in costs)
    yield entry(f"pipeline/messages-percent-of-step, {shape}", 100 * lost, "%", "target", 3.0)
    tied = statistics.median(cost.tied for cost in costs)
    moved = statistics.median(cost.moved for cost in costs)
    yield entry("pipeline/tied-exchange-ms, begun or waited for", 1e3 * tied, "ms", "moved behind kernels", 1e3 * moved)


def watch() -> Iterator[dict[str, Any]]:
    """CPU time of the process that watches a gang of 1,000 pods, the API server in another process."""
    for weather, (used, requests) in bench_watch.measure().items():
        gang = f"watching {bench_watch.PODS_OF_THE_GANG} pods, {weather}"
        yield entry(gang, 100 * used, "% of core", "target", 2.0)
        if weather != "steady":
            yield entry(f"{gang}: requests", requests, "1/s", "target", 2.0)


def plan() -> Iterator[dict[str, Any]]:
    """CPU time of the slower of both schedules, from the spec to the file's digest; memory beside the file's bytes."""
    runs = [bench_plan.measure("gpipe"), bench_plan.measure("1f1b", simulated=True)]
    yield entry("plan/compile-1000-stages-s", max(run["seconds"] for run in runs), "s", "target", 10.0)
    peak, size = (max(run[key] for run in runs) / 2**20 for key in ("peak_bytes", "file_bytes"))
    yield entry("plan/compile-1000-stages-mib", peak, "MiB", "plan file", size)
    yield entry("plan/simulate-1000-stages-s", runs[1]["simulation_seconds"], "s", "target", 60.0)


def pipeline() -> Iterator[dict[str, Any]]:
    """Schedules on four ranks that sleep, rounds interleaved: the measured step over the simulated one, and the bubble,
    of many steps in a row (zb-v: optimistic ones, and checked ones).
    Then the demo's own step, simulated with the rates that its programs had, and as foretold from the yardstick."""
    ways = {name: (name, "auto") for name in bench_pipeline.SCHEDULES} | {"zb-v, checked": ("zb-v", "checked")}
    rounds = [{name: bench_pipeline.measure(*way) for name, way in ways.items()} for _ in range(ROUNDS)]
    for name in ways:
        seen, told = [turn[name][0] for turn in rounds], rounds[0][name][1]
        ratio = statistics.median(m.seconds for m in seen) / told.seconds
        yield entry(f"pipeline/{name}/step-vs-simulated", ratio, "1", "target", 1.03)
        yield entry(f"pipeline/{name}/bubble", statistics.median(m.idle for m in seen), "1", "simulated", told.idle)
        within = statistics.median(m.within for m in seen)
        yield entry(f"pipeline/{name}/bubble-between-first-and-last", within, "1", "simulated", told.within)
    demos = [bench_pipeline.demo() for _ in range(ROUNDS)]
    yield entry("pipeline/demo/step-vs-simulated", statistics.median(m / s for m, s, _ in demos), "1", "target", 1.08)
    yield entry("pipeline/demo/step-vs-yardstick", statistics.median(m / f for m, _, f in demos), "1", "target", 1.08)


def fp8() -> Iterator[dict[str, Any]]:
    """The loss of fp8 against bf16's after 1,000 steps: within 0.25 %."""
    yield from _losses("fp8/loss-1000-steps", ("bf16", "fp8"), bench_losses.STEPS)


def bf16() -> Iterator[dict[str, Any]]:
    """The loss of bf16 against fp32's after 500 steps: within 0.5 %."""
    yield from _losses("bf16/loss-500-steps", ("fp32", "bf16"), 500)


def _losses(name: str, pair: tuple[str, str], steps: int) -> Iterator[dict[str, Any]]:
    """A row a seed, means over orders of the sums; then one over all, of differences in percent."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        pairs = list(bench_losses.measure(bench_losses.corpus(data), data, steps=steps, pair=pair))
    for seed in bench_losses.SEEDS:
        own = [p for p in pairs if p.seed == seed]
        say(f"  seed {seed}: " + ", ".join(f"{p.one:.4f} {p.other:.4f} ({100 * p.apart:+.2f} %)" for p in own))
        one, other = (statistics.fmean(each) for each in zip(*((p.one, p.other) for p in own), strict=True))
        yield entry(f"{name}/seed-{seed}", other, "nats", pair[0], one)
    mean, error = bench_losses.mean_apart(pairs)
    say(f"  all: {100 * mean:+.2f} %, standard error {100 * error:.2f}")
    yield entry(f"{name}/percent-apart", 100 * mean, "%", "standard error", 100 * error)


def muon() -> Iterator[dict[str, Any]]:
    """The loss of Muon against AdamW's after 300 steps, at AdamW's learning rate: below."""
    with tempfile.TemporaryDirectory() as folder:
        data, key = Path(folder) / "data", "train.optimizer.name"
        pair, only = ("adamw", "muon"), (1,)
        runs = bench_losses.measure(bench_losses.corpus(data), data, steps=300, key=key, pair=pair, orders=only)
        for run in runs:
            yield entry(f"muon/loss-300-steps/seed-{run.seed}", run.other, "nats", "adamw", run.one)


def demo() -> Iterator[dict[str, Any]]:
    """`make demo` after `make setup`."""
    say(
        "  cold: data, plan, store, Prefect's home and database; warm: environment and engine, as the setup leaves them"
    )
    seconds = bench_demo.measure()
    yield entry("demo/first-step-s", seconds["first_step"], "s", "target", 20.0)
    yield entry("demo/seconds", seconds["all"], "s", "target", 120.0)


def log() -> Iterator[dict[str, Any]]:
    """A log of 500 attempts and 20,000 checkpoints in a folder."""
    told = bench_log.measure()
    yield entry("log/fold-idle-us", told["idle_us"], "us", "target", 200.0)
    yield entry("driver/first-decision-s", told["decision_s"], "s", "target", 1.0)
    on_s3 = told["decision_s"] + told["requests"] * bench_log.S3_REQUEST_S
    yield entry("driver/first-decision-requests", told["requests"], "requests", "seconds on S3", on_s3)
    yield entry("log/lineage-500-attempts-ms", told["lineage_ms"], "ms", "target", 20.0)
    yield entry("log/folds-written-mib", told["folds_mib"], "MiB", "largest", told["fold_mib"])


def checkpoint() -> Iterator[dict[str, Any]]:
    """What checkpoints cost the one who trains."""
    cores = len(os.sched_getaffinity(0))
    for threads in sorted({1, cores}):
        told = bench_checkpoint.snapshots(max(5, ROUNDS), threads)
        name = f"checkpoint/stall, 1.5 GB, {threads} threads"
        yield entry(name, told["save"], "s", "plain copy", told["copy"])
        yield entry(f"{name}: to a plain copy, by round", told["ratio"], "1", "target", 1.1)
        yield entry(f"{name}: the first into a slot", told["first"], "s", "plain copy", told["copy"])
        yield entry(f"checkpoint/memory-restore, 1.5 GB, {threads} threads", told["restore"], "s", "target", 1.0)
    with bench_checkpoint.stores() as stores:
        for name, where in stores.items():
            cost = bench_checkpoint.interference(*where)
            say(f"  {name}: a step {cost.step:.3f} s, a snapshot {cost.stall:.3f} s, a checkpoint {cost.lost:.2f} s")
            yield entry(f"checkpoint/interference, one a minute, {name}", cost.speed(cores), "1", "target", 0.98)
            least = cost.least(cores)
            yield entry(
                f"checkpoint/interference, {name}: if no rank ever waits", least, "1", "measured", cost.speed(cores)
            )


def show() -> Iterator[dict[str, Any]]:
    """`hotstage ckpt show` of 70 billion parameters, from the start of its process to its end."""
    took, core, size = bench_show.measure(max(ROUNDS, 3))
    say(f"  {size:.0f} MB of manifest; it takes {core:.2f} s of a core")
    yield entry("checkpoint/show-70b", took, "s", "target", 2.0)


def store() -> Iterator[dict[str, Any]]:
    """Requests: of an idle agent (the worse of one whose gang trains and one that waits), of a driver that watches; of
    a checkpoint and of a start of 1,000 nodes.
    """
    asked, many = bench_store.idle(), bench_store.many_nodes()
    agent = max(asked["agent trains"], asked["agent waits"])
    yield entry("store/idle-requests-per-s", agent, "1/s", "target", 1.0)
    yield entry("store/watching-driver-requests-per-s", asked["driver"], "1/s", "idle agent", agent)
    yield entry("store/requests-per-checkpoint-node", many["checkpoint"], "1", "target", 6.0)
    yield entry("store/requests-per-start-node", many["start"], "1", "checkpoint", many["checkpoint"])


def transfer() -> Iterator[dict[str, Any]]:
    """Upload and restore of 1.5 GB beside a bare client's, and what more of a processor they take."""
    for what, value, client, bare, more in bench_transfer.measure(ROUNDS):
        yield entry(f"checkpoint/{what}", value, "GB/s", client, bare)
        if client == "bare client":
            yield entry(f"checkpoint/{what}: processor", more, "s/GB more", "target", 0.6)


def reshard() -> Iterator[dict[str, Any]]:
    """Restores between all pairs of layouts of {1, 2, 4, 8} stages and replicas, beside the same layout's."""
    seconds = bench_transfer.reshard(ROUNDS)
    (source, target), worst = max(seconds.items(), key=lambda item: item[1] / seconds[item[0][1], item[0][1]])
    pair = f"{source[0]} x {source[1]} into {target[0]} x {target[1]}"
    same = seconds[target, target]
    yield entry(f"checkpoint/reshard: the worst of {len(seconds)} pairs, {pair}", worst, "s", "same layout", same)
    middle = statistics.median(t / seconds[into, into] for (_, into), t in seconds.items())
    yield entry("checkpoint/reshard: the middle one, to the same layout's time", middle, "1", "target", 1.5)


def transfer_vs_dcp() -> Iterator[dict[str, Any]]:
    """The same beside PyTorch's Distributed Checkpoint, to the same server."""
    for what, value, other in bench_transfer.versus_torch(ROUNDS):
        yield entry(f"checkpoint/{what}", value, "s", "PyTorch DCP", other)


def data() -> Iterator[dict[str, Any]]:
    """A corpus of what the machine has, prepared, beside the tokenizer's library alone."""
    text, ours, peer = bench_data.compare(int(os.environ.get("HOTSTAGE_BENCH_DATA_MB", "1000")) * 1_000_000)
    yield entry("data/prepare-bytes-per-s", text / ours.wall_s, "B/s", "tokenizers alone", text / peer.wall_s)
    yield entry("data/prepare: of a processor", text / ours.cpu_s, "B/s", "tokenizers alone", text / peer.cpu_s)
    yield entry("data/peak-mib", ours.peak_mib, "MiB", "limit", 600.0)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    say(what)
    yield
    say(f"  ({time.monotonic() - began:.0f} s)")


def main() -> int:
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernels": lambda: list(kernels()),
        "start": lambda: list(bench_start.start_rows(ROUNDS)),
        "throughput": lambda: [throughput("fp32"), throughput("bf16")],
        "memory": lambda: list(memory()),
        "recovery": lambda: list(recovery()),
        "executor": lambda: list(executor()),
        "step": lambda: list(step()),
        "watch": lambda: list(watch()),
        "data": lambda: list(data()),
        "plan": lambda: list(plan()),
        "pipeline": lambda: list(pipeline()),
        "messages": lambda: list(messages()),
        "log": lambda: list(log()),
        "checkpoint": lambda: list(checkpoint()),
        "show": lambda: list(show()),
        "store": lambda: list(store()),
        "transfer": lambda: list(transfer()),
        "reshard": lambda: list(reshard()),
        "transfer-vs-dcp": lambda: list(transfer_vs_dcp()),
        "demo": lambda: list(demo()),
        "fp8": lambda: list(fp8()),
        "muon": lambda: list(muon()),
        "bf16": lambda: list(bf16()),
    }
    wanted = sys.argv[1:] or list(parts)
    rows: list[dict[str, Any]] = []
    for name in wanted:
        with timed(name):
            rows += parts[name]()
    write(rows, whole=not sys.argv[1:])  # a part alone replaces its own rows
    return 0


if __name__ == "__main__":
    assert shutil.which("cc"), "the kernels' bench needs a C compiler"
    sys.exit(main())
