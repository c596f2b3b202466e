"""`hotstage ckpt show` of a checkpoint of 70 billion parameters: its manifest alone is there, no data is."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoint import keys, pages
from checkpoint.log import RunLog
from checkpoint.manifest import checkpoint_body, merge_read, read_part
from checkpoint.store import open_store
from tests.checkpoint.samples import attempt_body
from tests.checkpoint.test_pages import RUN, synthetic

PARAMETERS, NODES = 70_000_000_000, 60


def measure(rounds: int) -> tuple[float, float, float]:
    """Seconds of the command (the best of so many rounds: what else the machine does is no property of it), those of a
    core that it takes, and megabytes of manifest.
    """
    with tempfile.TemporaryDirectory() as name:
        store = open_store(Path(name).as_uri())
        log = RunLog(store, RUN, writer="bench")
        state = log.append("attempt", attempt_body(), log.fold())
        store.create(keys.index_key(RUN), b"")
        parts = [
            read_part(keys.part_name(5, 1, part.part), part.to_bytes())
            for part in synthetic(NODES, PARAMETERS, bytes(range(32)))
        ]
        manifest = merge_read(parts)
        root, _ = pages.write(store, RUN, keys.manifest_name(5, 1), manifest.stream(), "all")
        log.append("checkpoint", checkpoint_body(manifest, root), state, epoch=1)
        size = sum(info.bytes for info in store.list(f"runs/{RUN}/manifests/")) / 1e6
        show = [sys.executable, "-m", "flows.cli", "ckpt", "show", RUN, "--store", store.url]
        took = [_took(show) for _ in range(rounds)]
        return min(wall for wall, _ in took), min(cpu for _, cpu in took), size


def _took(command: list[str]) -> tuple[float, float]:
    """Seconds of this command, and of a core."""
    before, began = _children(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, _children() - before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
