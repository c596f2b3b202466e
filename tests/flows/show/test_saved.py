"""`ckpt ls`: a line a checkpoint, with size, age, pins, damage and what a rollback left behind."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

from checkpoint.manifest import Manifest
from checkpoint.store import MemoryStore, open_store
from flows.show.export import checkpoint_at
from flows.show.facts import details, summaries
from flows.show.saved import checkpoint_lines
from tests.flows.conftest import Trained


def row(step: int, epoch: int, **more: Any) -> dict[str, Any]:
    base = {"step": step, "epoch": epoch, "attempt": epoch, "time": 1000.0, "bytes": 1_490_000_000, "damaged": "",
            "state_digest": "d" * 64, "left": False, "pins": [], "given_up": False}  # fmt: skip
    return base | more


def test_lines_say_what_matters() -> None:
    rows = [
        row(10, 1, given_up=True),
        row(20, 1, pins=["export-1f", "keep"]),
        row(40, 1, left=True),
        row(30, 7, damaged="chunk x is gone", attempt=None),
        row(40, 7, time=4400.0),
    ]
    digest = "d" * 64
    assert checkpoint_lines(rows, 4600.0) == [
        "4 checkpoint(s) of 1.5 GB each",
        f"step       20  attempt   1   60 min ago  {digest}  pinned: export-1f, keep",
        f"step       40  attempt   1   60 min ago  {digest}  left behind by a rollback",
        f"step       30  attempt   -   60 min ago  {digest}  DAMAGED: chunk x is gone",
        f"step       40  attempt   7    3 min ago  {digest}",
        "and 1 that the rules of the run gave up",
    ]
    assert checkpoint_lines([row(10, 1, given_up=True)], 0.0) == ["and 1 that the rules of the run gave up"]
    assert checkpoint_lines([], 0.0) == []


def test_the_size_is_that_of_the_manifest(trained: Trained) -> None:
    store = open_store(f"file://{trained.place.folder / 'store'}")
    manifest: Manifest = checkpoint_at(store, trained.run, None)[1]
    assert {c["bytes"] for c in details(store, trained.run)["checkpoints"]} == {manifest.total_bytes}
    said = trained.place.said("ckpt", "ls", trained.run)
    assert "MB each" in said
    assert trained.digest in said
    shown = json.loads(trained.place.said("ckpt", "show", trained.run, "--json"))
    assert (shown["bytes"], shown["pins"]) == (manifest.total_bytes, [])
    assert re.search(" ago|just now", trained.place.said("ckpt", "show", trained.run))


def test_several_runs_are_asked_for_at_a_time() -> None:
    """Of a store in which a request takes its time a thousand runs would take minutes."""
    names = [f"r{number}-0a1b2c" for number in range(4)]
    together = threading.Barrier(len(names))

    class Slow(MemoryStore):
        def get(self, key: str, **more: Any) -> bytes:
            if key.endswith("/spec"):
                together.wait(60)
            return super().get(key, **more)

    rows = summaries(Slow(), names)
    assert [(row["run"], row["state"]) for row in rows] == [(name, "gone") for name in names]
