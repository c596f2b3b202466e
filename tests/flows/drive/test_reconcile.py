"""Drivers for what nobody drives: what a look costs, what is told, and what is left when a driver ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.claims import Place
from checkpoint.codec import pack
from checkpoint.keys import driver_key, index_key, launch_key
from checkpoint.log import RunLog
from checkpoint.store import Info, MemoryStore
from flows.drive.begin import prepare_run
from flows.drive.driving import SILENT_S, STOPPED, DriverNote
from flows.drive.reconcile import AGAIN_S, ENDED_A_LOOK, IDLE_A_LOOK, NAMES_A_LOOK, Reconciler
from flows.drive.run import Prepared, attempt_body
from tests.support.wait import wait_for
from trainer.errors import LaunchRefused
from trainer.launch import Launch, LaunchView, nothing
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
        self.error, self.closed, self.left = error, False, False

    def ensure(self, launch: Launch) -> None:
        return None

    def observe(self, launch_id: str) -> LaunchView:
        if self.error is not None:
            raise self.error
        return LaunchView(launch_id, "absent" if self.left else "waiting", detail="no machine fits")

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        asked()

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


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


def cancel(reconciler: Reconciler) -> None:
    """The runs that it drives; their nodes have left."""
    for run in reconciler.driven.values():
        launcher = run.driver.launcher
        assert isinstance(launcher, Cluster)
        launcher.left = True
        run.cancel()
        assert run.wait(60)


def as_local(prepared: Prepared) -> Prepared:
    spec = parse_spec({**prepared.spec.model_dump(mode="json"), "launch": {"target": "local"}})
    return replace(prepared, spec=spec)


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
    local = as_local(prepared)
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
    clock = Clock()
    reconciler = Reconciler(store, say=said.append, clock=clock)
    assert reconciler.look() == [prepared.run]
    assert reconciler.driven[prepared.run].wait(60)
    wait_for(lambda: clusters[0].closed, "its launcher to be closed")
    assert reconciler.look() == []  # not at once, again and again
    clock.now += AGAIN_S
    assert reconciler.look() == [prepared.run]
    assert any("ended: pods are forbidden here" in text for text in said)
    cancel(reconciler)
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
    cancel(reconciler)


@pytest.fixture
def local(place: tuple[Counted, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    store, prepared = place
    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: Cluster())
    made = Local(store, as_local(prepared), tmp_path / "out")
    log = RunLog(store, prepared.run)
    restore = {"checkpoint": None, "step": 0, "slots": None}
    body = attempt_body(made.prepared, made.launch, restore, reason="start", cause=None)
    log.append("attempt", body, log.fold())
    return made


class Local:
    """A run of local processes that has begun in a folder, and what its drivers said."""

    def __init__(self, store: Counted, prepared: Prepared, out: Path) -> None:
        self.store, self.prepared, self.out, self.clock = store, prepared, out, Clock()
        self.launch, self.said = f"{prepared.run}-l1", list[str]()
        self.reconciler = self.another()

    def another(self) -> Reconciler:
        return Reconciler(self.store, self.out.parent / "other", self.said.append, clock=self.clock)

    def claim(self, **more: Any) -> None:
        folder = self.out / "runs" / self.prepared.run / self.launch
        folder.mkdir(parents=True)
        claim = replace(Place.of(folder), **more)
        self.store.create(launch_key(self.prepared.run, self.launch), claim.to_bytes())

    def drivers(self, *told: DriverNote) -> None:
        for one in told:
            self.store.put(driver_key(self.prepared.run, one.token), one.to_bytes())

    def dead(self, token: str = "dead", **more: Any) -> DriverNote:
        """Of a process of this machine that is no more."""
        return replace(DriverNote.of_process(self.out), token=token, pid=(1 << 22) + 1, n=1, **more)

    def end(self, *reconcilers: Reconciler) -> None:
        for reconciler in reconcilers or (self.reconciler,):
            cancel(reconciler)


def test_a_local_run_whose_driver_was_killed_goes_on_where_it_worked(local: Local) -> None:
    local.claim()
    local.drivers(local.dead())
    assert local.reconciler.look() == [local.prepared.run]
    driver = local.reconciler.driven[local.prepared.run].driver
    assert driver.make_launch(local.prepared, "x", ()).work_root == local.out
    assert any("is driven from here: process 4194305 on " in text for text in local.said)
    second = local.another()
    assert driver.driving is not None
    wait_for(lambda: driver.driving is not None and driver.driving.told.seq > 0, "its first word")
    assert second.look() == []  # it hears the first one
    local.end()


def test_a_local_run_that_died_before_its_launch_was_claimed_goes_on(local: Local) -> None:
    local.drivers(local.dead())
    assert local.reconciler.look() == [local.prepared.run]
    local.end()


@pytest.mark.parametrize("why", ["stopped", "driven", "never told", "another machine", "its folder is another's"])
def test_a_local_run_that_is_left_alone(local: Local, why: str) -> None:
    match why:
        case "stopped":
            local.claim()
            local.drivers(local.dead(), local.dead("later", left=STOPPED, at=1.0))
        case "driven":
            local.claim()
            local.drivers(local.dead(), replace(DriverNote.of_process(local.out), n=1))
        case "never told":
            local.claim()
        case "another machine":
            local.claim(host="elsewhere", boot="b", space="s")
            local.drivers(local.dead(host="elsewhere", boot="b", space="s"))
        case _:
            local.claim(token="0" * 32)
            local.drivers(local.dead())
    for _ in range(4):
        assert local.reconciler.look() == []
        local.clock.now += SILENT_S
    local.store.asked = 0
    assert local.reconciler.look() == []
    assert local.store.asked <= 5


def test_a_stopped_run_that_somebody_drives_again_is_looked_after_again(local: Local) -> None:
    local.claim()
    local.drivers(local.dead("first", left=STOPPED))
    assert local.reconciler.look() == []
    local.drivers(local.dead("second", at=2.0))
    assert local.reconciler.look() == [local.prepared.run]
    local.end()


def test_many_runs_are_listed_a_page_a_look(place: tuple[Counted, Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """And each of them is read, in turn."""
    store, _ = place
    monkeypatch.setattr("flows.drive.reconcile.NAMES_A_LOOK", 10)
    for n in range(35):
        store.create(index_key(f"run-{n:06x}"), pack({"v": 1, "run": f"run-{n:06x}", "name": "run"}))
    reconciler = Reconciler(store)
    for _ in range(4):
        assert reconciler.look() == []
    assert len(reconciler._idle.known) == 36
    store.asked = 0
    assert reconciler.look() == []
    assert store.asked == 1 + IDLE_A_LOOK
    assert NAMES_A_LOOK == 1000
