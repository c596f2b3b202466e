"""What checkpoints cost the one who trains: how long a snapshot holds a rank up, how soon a rank that was killed has
its state back from memory, and how much slower steps are while the agent stores.

`snapshots`: ``bench_checkpoint.c``, the engine's own code over 1.5 GB in slots as the agent makes them, in turns with a
plain copy. `interference`: GPT-2 124M on two stages by the real node, a checkpoint each 24 steps; what one costs is
what its steps, from its snapshot to 16 later, take beyond as many usual ones. With a checkpoint a minute training has
60 / (60 + cost) of its speed. The usual steps are those before the snapshot; on a busy machine all of the run's
sessions have a higher priority than the rest (where this is root), with the distances between them as they are.

``python -m tests.bench checkpoint``
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import keys
from tests.engine.engine_build import ROOT, build_folder
from tests.support.agents import Run, make_run
from tests.support.s3_server import S3Server, s3_server
from tests.support.wait import wait_for
from trainer.launch import Launch
from trainer.local_launch import LocalLauncher
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec

MIB = 1500
EVERY, STORED, AFTER = 24, 3, 16
"""Steps between checkpoints, how many are looked at, and steps by which one's upload is over."""


def program(folder: Path) -> Path:
    built = build_folder("cc", "")
    made = folder / "bench_checkpoint"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread", f"-I{ROOT / 'trainer' / 'engine'}"]
    source = str(Path(__file__).with_suffix(".c"))
    subprocess.run(["cc", *flags, "-o", str(made), source, str(built / "libhotstage.a"), "-lm", "-ldl"], check=True)
    return made


def snapshots(rounds: int, threads: int, *, huge: bool = True) -> dict[str, float]:
    """Medians in seconds: save, copy, restore, first; and the median of the rounds' ratios of save to copy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(program(Path(folder))), str(MIB), str(threads), str(rounds), str(int(huge))]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    told = [json.loads(line) for line in lines]
    found = {name: statistics.median(row[name] for row in told) / 1e9 for name in ("save", "copy", "restore", "first")}
    return found | {"ratio": statistics.median(row["save"] / row["copy"] for row in told)}


@dataclass(frozen=True)
class Cost:
    """Of one checkpoint, medians in seconds: wall time of the steps beyond the usual, and of it the snapshot itself;
    processor time of the agent and of the store's server; a usual step."""

    lost: float
    stall: float
    agent: float
    server: float
    step: float

    def speed(self, cores: int) -> float:
        """Of training with a checkpoint a minute, to training with none; without what the server takes."""
        return 60.0 / (60.0 + max(0.0, self.lost - self.server / cores))

    def least(self, cores: int) -> float:
        """The same where all that the agent and the snapshot take of the processors is taken from the ranks."""
        return 1.0 - (self.agent / cores + self.stall) / 60.0


def spec_124m() -> RunSpec:
    sets = ["train.batch=4", "train.microbatch=4", "train.sequence=64", "train.schedule.warmup=0"]
    sets += [f"train.steps={EVERY * STORED + AFTER}", "parallel.stages=2", "parallel.threads=1", "model.vocab=50304"]
    return parse_spec(tomllib.loads(PRESETS["gpt2-124m"]), [*sets, f"checkpoint.every={EVERY}"])


@contextmanager
def stores() -> Iterator[dict[str, tuple[str | None, S3Server | None]]]:
    """Name -> (address, its server); None: a folder beside the run."""
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "server") as server:
        before = dict(os.environ)
        os.environ.update(server.environment("trainer"))
        try:
            yield {"file://": (None, None), "S3": (server.url("bench"), server)}
        finally:
            os.environ.clear()
            os.environ.update(before)


def interference(url: str | None, server: S3Server | None) -> Cost:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_124m()
        run, plan = make_run(Path(folder), spec, url)
        launch = Launch(run.name, run.launch, 1, run.store.url, Path(folder) / "out")
        launcher = LocalLauncher(Path(folder) / "out")
        before = cpu_of(server.pid) if server else 0.0
        try:
            launcher.ensure(launch)
            epoch = run.attempt(spec, plan)
            last = spec.train.steps
            status = wait_for(lambda: started(run), "the ranks", 120)
            agent = cpu_of(status["pid"])
            lift([status["pid"], status["supervisor"], *([server.pid] if server else [])])
            wait_for(lambda: any(c.step == last for c in run.fold().checkpoints), "the last checkpoint", 1800)
            steps = wait_for(lambda: (found := lines_of(run, epoch)) and found[-1]["step"] == last and found, "metrics")
            agent = cpu_of(status["pid"]) - agent
        finally:
            launcher.stop(launch.launch_id, 0)
        stored = len(run.fold().checkpoints)
        spent = (cpu_of(server.pid) - before) / stored if server else 0.0
    lost, stall, step = cost_of([s["step_us"] / 1e6 for s in steps], [s["us"]["snapshot"] / 1e6 for s in steps])
    return Cost(lost, stall, agent / stored, spent, step)


def started(run: Run) -> dict[str, Any] | None:
    """The node's status, once both ranks are in it."""
    status = run.status()
    pids = [rank["pid"] for rank in status["ranks"].values()] if status else []
    return status if len(pids) == 2 and all(pids) else None


def cost_of(seconds: list[float], stalls: list[float]) -> tuple[float, float, float]:
    """Lost, stall and a usual step, by the steps of a run; ``seconds[i]`` is step i + 1's."""
    usual, lost, stall = [], [], []
    for n in range(1, STORED + 1):
        saved = n * EVERY - 1
        usual.append(statistics.median(seconds[saved - (EVERY - AFTER) + 1 : saved]))
        lost.append(sum(seconds[saved : saved + AFTER]) - AFTER * usual[-1])
        stall.append(stalls[saved])
    return statistics.median(lost), statistics.median(stall), statistics.median(usual)


def lift(pids: Iterable[int]) -> None:
    """Sessions of these above the rest of a busy machine, and as far from one another as they were. For root."""
    for pid in pids:
        with contextlib.suppress(OSError):
            group = Path(f"/proc/{pid}/autogroup")
            nice = int(group.read_text().split()[-1])
            if nice >= 0:
                group.write_text(str(nice - 20))


def lines_of(run: Run, epoch: int) -> list[dict[str, Any]]:
    data = b"".join(run.store.get(found.key) for found in run.store.list(keys.metrics_prefix(run.name, epoch)))
    told = (json.loads(line) for line in data.splitlines())
    return [line for line in told if line["event"] == "step"]


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
