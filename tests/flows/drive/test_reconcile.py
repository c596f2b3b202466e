"""Drivers for what nobody drives: what a look costs, what is told, and what is left when a driver ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.codec import pack
from checkpoint.log import RunLog
from checkpoint.store import Info, MemoryStore
from flows.drive.begin import prepare_run
from flows.drive.reconcile import ENDED_A_LOOK, Reconciler
from flows.drive.run import Prepared, attempt_body
from tests.support.agents import wait_for
from trainer.errors import LaunchRefused
from trainer.launch import Launch, LaunchView
from trainer.spec import parse_spec

RUNS = 100


class Counted(MemoryStore):
    asked = 0

    def get(self, key: str, **more: Any) -> bytes:
        self.asked += 1
        return super().get(key, **more)

    def head(self, key: str) -> Info | None:
        self.asked += 1
        return super().head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        self.asked += 1
        return super().list(prefix, start_after)


class Cluster:
    """A launcher that fails as it is told to, and says whether it was closed."""

    detaches = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.closed = error, False

    def ensure(self, launch: Launch) -> None:
        return None

    def observe(self, launch_id: str) -> LaunchView:
        if self.error is not None:
            raise self.error
        return LaunchView(launch_id, "waiting", detail="no machine fits")

    def stop(self, launch_id: str, grace_s: float) -> None:
        return None

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def place(tmp_path: Path) -> tuple[Counted, Prepared]:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    spec = parse_spec(
        {
            "name": "cared",
            "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16},
            "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
            "data": {"vocab_size": 300, "source": f"text:{tmp_path}/a.txt"},
            "launch": {"target": "kubernetes"},
        }
    )
    store = Counted()
    return store, prepare_run(spec, store)


def begin(store: Counted, prepared: Prepared, run: str) -> None:
    log = RunLog(store, run)
    restore = {"checkpoint": None, "step": 0, "slots": None}
    log.append("attempt", attempt_body(prepared, f"{run}-k1", restore, reason="start", cause=None), log.fold())


def end(store: Counted, run: str) -> None:
    log = RunLog(store, run)
    log.append("ended", {"outcome": "cancelled", "reason": "", "step": 0, "state_digest": None}, log.fold())


def test_a_looks_cost_does_not_grow_with_the_runs_that_have_ended(
    place: tuple[Counted, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, prepared = place
    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: Cluster())
    names = [f"old-{n:06x}" for n in range(RUNS)]
    for name in names:
        begin(store, prepared, name)
        end(store, name)
        store.create(f"index/{name}", pack({"v": 1, "run": name, "name": "old"}))
    reconciler = Reconciler(store)
    assert reconciler.look() == []
    for _ in range(3):
        store.asked = 0
        assert reconciler.look() == []
        assert store.asked == 1 + 1 + ENDED_A_LOOK  # the names, the run that has not begun, some of the ended ones
    began = RunLog(store, names[50])
    restore = {"checkpoint": None, "step": 0, "slots": None}
    spec = parse_spec({**prepared.spec.model_dump(mode="json"), "launch": {"target": "local"}})
    local = Prepared(prepared.run, spec, prepared.dataset, prepared.what, prepared.plan)
    began.append("attempt", attempt_body(local, f"{names[50]}-l1", restore, reason="x", cause=None), began.fold())
    read = []
    monkeypatch.setattr("flows.drive.reconcile.wants_driver", lambda state: read.append(state.run))
    for _ in range(-(-RUNS // ENDED_A_LOOK)):
        reconciler.look()
    assert read == [names[50]]  # opened again: noticed within a round, and read once


def test_a_drivers_error_is_told_and_the_run_taken_over_again(
    place: tuple[Counted, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, prepared = place
    begin(store, prepared, prepared.run)
    clusters = [Cluster(LaunchRefused("pods are forbidden here")), Cluster()]
    given = iter(clusters)
    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: next(given))
    said: list[str] = []
    reconciler = Reconciler(store, say=said.append)
    assert reconciler.look() == [prepared.run]
    assert reconciler.driven[prepared.run].wait(30)
    wait_for(lambda: clusters[0].closed, "its launcher to be closed")
    assert reconciler.look() == [prepared.run]
    assert any("ended: pods are forbidden here" in text for text in said)
    run = reconciler.driven[prepared.run]
    run.cancel()
    assert run.wait(30)
    wait_for(lambda: clusters[1].closed, "its launcher to be closed")
    assert reconciler.look() == []
    assert reconciler.driven == {}


def test_a_run_that_cannot_be_taken_over_does_not_keep_others_from_it(
    place: tuple[Counted, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, prepared = place
    begin(store, prepared, prepared.run)
    begin(store, prepared, "a-broken-one")  # it has no spec
    store.create("index/a-broken-one", pack({"v": 1, "run": "a-broken-one", "name": "a"}))
    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: Cluster())
    said: list[str] = []
    reconciler = Reconciler(store, say=said.append)
    assert reconciler.look() == [prepared.run]
    assert any(text.startswith("run a-broken-one cannot be taken over: ") for text in said)
    run = reconciler.driven[prepared.run]
    run.cancel()
    assert run.wait(30)
