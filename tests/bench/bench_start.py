"""How long the engine takes from before its process to the end of its first optimizer step."""

from __future__ import annotations

import mmap
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.peers.cases import START, Training
from tests.bench.results import entry
from tests.e2e.engine_runs import train
from trainer.cores import usable_cpus

START_BYTES = 4 << 30
"""More than any side takes until its first step."""


def touch_memory() -> None:
    """Writes to as much memory as a side takes, and gives it back: in a virtual machine the first touch of a page that
    its host has taken away costs many times an ordinary one, and the side that comes next would pay for it. In huge
    pages, which whoever takes memory next gets again: small ones are joined behind all that is free.
    """
    with mmap.mmap(-1, START_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, START_BYTES, mmap.PAGESIZE):
            memory[at] = 1


def start_of_ours(training: Training, threads: int) -> float:
    """Seconds from before the process until it says that its only step is done: AdamW may wait beyond the line of a
    step, not beyond that. As of the peers, what is prepared before the process does not count.
    """
    with tempfile.TemporaryDirectory(prefix="hotstage-peers-") as name:
        folder = Path(name)
        plan = training.plan(1, threads, folder)
        touch_memory()
        return train(plan, folder / "data", folder / "run", dump=False).took_s


def start_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """GPT-2 124M, B 4, T 64, in bf16 and fp32."""
    for name, training in START.items():
        took = [start_of_ours(training, usable_cpus()) for _ in range(rounds + 1)]  # the first one reads files
        yield entry(name, statistics.median(took[1:]), "s", "target", 1.0)
