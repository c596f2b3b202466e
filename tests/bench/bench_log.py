"""A log of 500 attempts and 20,000 checkpoints in a folder: what a look at it and a driver's first decision cost."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoint.log import RunLog, RunState
from checkpoint.store import MemoryStore, Store, open_store
from flows.drive.begin import prepare_run
from flows.drive.run import Prepared, attempt_body
from flows.drive.train import make_driver
from tests.support.long_log import long_log
from trainer.launch import Launch
from trainer.spec import parse_spec

ATTEMPTS, EACH = 500, 40
S3_REQUEST_S = 0.03
"""Of a small object from a bucket in the same region."""


class Decided(Exception):
    """The driver's first decision has come as far as an act."""


class Counted:
    """A store that counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        self.store, self.asked = store, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "head", "list", "create", "put"):
            self.asked[name] += 1
        return getattr(self.store, name)


def made(folder: Path) -> tuple[Store, Prepared, RunState]:
    """The run and its log."""
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    store = open_store((folder / "store").as_uri())
    model = {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16}
    train = {"steps": 1_000_000, "batch": 4, "microbatch": 2, "sequence": 16}
    data = {"vocab_size": 300, "source": f"text:{folder}/a.txt"}
    prepared = prepare_run(parse_spec({"name": "long", "model": model, "train": train, "data": data}), store)

    def body(checkpoint: int | None, step: int) -> dict[str, Any]:
        restore = {"checkpoint": checkpoint, "step": step, "slots": None}
        return attempt_body(prepared, f"{prepared.run}-l1", restore, reason="x", cause=None)

    memory = MemoryStore()
    state = long_log(memory, prepared.run, ATTEMPTS, EACH, body)
    for info in memory.list(""):  # as the store writes them, without a wait for the disk each time
        path = folder / "store" / info.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memory.get(info.key))
    return store, prepared, state


def first_decision(store: Any, prepared: Prepared, out: Path) -> float:
    """Seconds from a driver's beginning to the act that it decided on."""
    began = time.perf_counter()
    driver = make_driver(prepared, store, out=out)

    def decided(launch: Launch) -> None:
        raise Decided

    driver.launcher.ensure = decided  # type: ignore[method-assign]
    try:
        driver.run()
    except Decided:
        return time.perf_counter() - began
    raise AssertionError("the driver ended without an act")


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, prepared, state = made(folder)
        log, times = RunLog(store, prepared.run), []
        for _ in range(1000):
            began = time.perf_counter()
            assert log.fold(state) is state
            times.append(time.perf_counter() - began)
        decisions = [first_decision(store, prepared, folder / f"out{n}") for n in range(5)]
        counted = Counted(store)
        first_decision(counted, prepared, folder / "counted")
        began = time.process_time()
        assert len(state.lineage()) == ATTEMPTS * EACH
        lineage = time.process_time() - began
        written = sum(i.bytes for i in store.list(f"runs/{prepared.run}/folds/"))
        largest = max(i.bytes for i in store.list(f"runs/{prepared.run}/folds/"))
    return {
        "idle_us": 1e6 * statistics.median(times),
        "decision_s": statistics.median(decisions),
        "requests": sum(counted.asked.values()),
        "lineage_ms": 1e3 * lineage,
        "folds_mib": written / 2**20,
        "fold_mib": largest / 2**20,
    }
