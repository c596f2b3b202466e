"""The most memory that training takes: `hotstage train` with all its processes, and a peer's one process.

Both by VmHWM, the kernel's own word of the most that was ever resident of a process; ours is the sum of driver, agent,
supervisor and rank after some steps. A peer's script saves nothing, so the slots, which hold snapshots while they are
stored, are not counted: of the agent, who fills them with zeros at the start, what it has beside shared memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.peers import cases
from tests.bench.peers.cases import Training, Variant
from tests.bench.peers.sides import peer
from tests.bench.results import entry, say
from tests.support.chaos import step_of
from tests.support.place import Place
from tests.support.wait import wait_for
from trainer.presets import PRESETS

STEPS = 4
DEADLINE_S = 300.0
KINDS = {"hotstage-engine rank": "rank", "hotstage-engine node": "supervisor", "checkpoint.agent": "agent"}


def told(pid: int, what: str) -> float:
    """MiB that /proc tells of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:")), 0.0)


def most_resident(pid: int) -> float:
    """MiB of a process, at most so far."""
    return told(pid, "VmHWM")


def kind_of(line: str) -> str:
    """Which of our processes has this command line."""
    return next((name for words, name in KINDS.items() if words in line), "driver")


def ours(training: Training, threads: int) -> dict[str, float]:
    """MiB by process, once ``STEPS`` steps are done."""
    with tempfile.TemporaryDirectory(prefix="hotstage-peers-") as folder:
        place = Place(Path(folder).resolve() / "place", PRESETS["gpt2-124m"])
        sets = (
            "data.source=text:corpus/*.txt", "data.vocab_size=300", "train.steps=100000",
            f"train.batch={training.batch}", f"train.microbatch={training.batch}",
            f"train.sequence={training.sequence}", f'train.precision="{training.precision}"',
            f"parallel.threads={threads}", "parallel.stages=1", "checkpoint.every=0",
        )  # fmt: skip
        place.run("data", "prepare", "spec.toml", *(word for s in sets for word in ("--set", s)))
        agent = 0.0
        with place.start_train(*sets) as driver:

            def stepped() -> bool:
                nonlocal agent
                assert driver.poll() is None, f"hotstage train ended with {driver.returncode}"
                for pid, line in place.left().items():
                    if kind_of(line) == "agent":
                        agent = max(agent, told(pid, "RssAnon") + told(pid, "RssFile"))
                return any((step_of(pid) or 0) > STEPS for pid in place.rank_pids())

            try:
                wait_for(stepped, f"hotstage train to make {STEPS} steps", DEADLINE_S, 0.05)
                found: dict[str, float] = {}
                for pid, line in place.left().items():
                    found[kind_of(line)] = found.get(kind_of(line), 0.0) + most_resident(pid)
            finally:
                place.stop_all()
    return found | {"agent": agent}


def memory_rows(name: str, threads: int) -> Iterator[dict[str, Any]]:
    """fp32, each peer as it comes; of its variants the one that takes the least."""
    training = cases.MEMORY[name]
    mine = ours(training, threads)
    say("    ours: " + ", ".join(f"{kind} {mib:.0f}" for kind, mib in mine.items()) + " MiB")
    theirs: dict[Variant, float] = {}
    for variant in training.variants:
        with peer(training, variant, threads, plain=True) as process:
            process.sample(STEPS - 1)
            theirs[variant] = most_resident(process.process.pid)
            say(f"    {variant.name}: {theirs[variant]:.0f} MiB")
    total = sum(mine.values())
    for which in dict.fromkeys(variant.peer for variant in theirs):
        least = min((v for v in theirs if v.peer == which), key=lambda v: theirs[v])
        row = entry(name, total, "MiB", which, theirs[least])
        yield row | {"ratio": theirs[least] / total, "variant": least.name, "processes": mine}
