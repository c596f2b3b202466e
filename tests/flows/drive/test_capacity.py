"""Fewer nodes than asked for: fewer stages from the spec's list; and drivers for what nobody drives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.keys import plan_key
from checkpoint.log import RunLog, RunState, ended_body
from checkpoint.store import open_store
from flows.drive.begin import prepare_run
from flows.drive.history import avoided
from flows.drive.launches import launch_of
from flows.drive.loop import Driver
from flows.drive.reconcile import Reconciler, target_of, wants_driver
from flows.drive.run import Prepared, attempt_body, fold_view, load_run, under
from flows.drive.views import Restore, StartAttempt
from flows.show.facts import details, report_facts
from trainer.errors import PlanError
from trainer.launch import Finding, Launch, LaunchedNode, LaunchView, nothing
from trainer.spec import how_map, parse_spec
from trainer.spec_layouts import other_hows
from trainer.wire import PLAN_PLAIN

SPEC: dict[str, Any] = {
    "name": "few",
    "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 16},
    "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
    "data": {"vocab_size": 300},
    "parallel": {"stages": 4},
    "launch": {"target": "kubernetes", "nodes": 2},
    "recovery": {"allowed_stages": [2], "capacity_s": 0.2},
}


class Cluster:
    """A launcher's view that a test writes; what is asked of it is kept."""

    detaches = True

    def __init__(self) -> None:
        self.views: dict[str, LaunchView] = {}
        self.ensured: list[Launch] = []
        self.stopped: list[str] = []

    def ensure(self, launch: Launch) -> None:
        self.ensured.append(launch)
        self.views.setdefault(launch.launch_id, LaunchView(launch.launch_id, "waiting", detail="no machine fits"))

    def observe(self, launch_id: str) -> LaunchView:
        return self.views.get(launch_id, LaunchView(launch_id, "absent"))

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        self.stopped.append(launch_id)
        asked()


@pytest.fixture
def place(tmp_path: Path) -> Any:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    store = open_store(f"file://{tmp_path}/store")
    spec = parse_spec({**SPEC, "data": {**SPEC["data"], "source": f"text:{tmp_path}/a.txt"}})
    return store, prepare_run(spec, store)


def drive(store: Any, prepared: Any, cluster: Cluster, until: Any) -> Driver:
    """A driver that is stopped once ``until`` holds; it looks again and again by itself."""
    driver: Driver

    class Sink:
        def tell(self, event: object) -> None:
            if until():
                driver.stop.set()

    def launch(ready: Any, name: str, avoid: tuple[str, ...]) -> Launch:
        if until():
            driver.stop.set()
        return Launch(
            ready.run, name, ready.nodes, store.url, Path("out"), spec=ready.spec, plan=ready.plan, avoid=avoid
        )

    driver = Driver(prepared, store, cluster, launch, sink=Sink())
    driver.run()
    return driver


def test_fewer_stages_where_there_is_no_room(place: Any) -> None:
    store, prepared = place
    cluster = Cluster()
    log = RunLog(store, prepared.run)
    driver = drive(store, prepared, cluster, lambda: len(log.fold().attempts) == 2)
    state = log.fold()
    assert [(a.launch[-2:], a.nodes, a.ranks) for a in state.attempts] == [("k1", 2, 4), ("k2", 1, 2)]
    few, many = "2 stages x 1 replica on 1 node", "4 stages x 1 replica on 2 nodes"
    assert state.attempts[1].reason.startswith(f"fewer nodes: {few} instead of {many}; no machine fits")
    assert dict(state.attempts[1].body["fallback"], why="") == {
        "kind": "capacity", "stages": 2, "was": 4, "why": "", "layout": few, "before": many, "nodes": 1, "ranks": 2,
    }  # fmt: skip
    assert cluster.stopped == [f"{prepared.run}-k1"]
    assert driver.prepared.spec.model == prepared.spec.model  # the What stays
    # another driver, from the same spec, goes on with what had to be
    again = drive(store, prepared, cluster, lambda: driver_nodes(cluster) == 1)
    assert again.prepared.nodes == 1
    assert len(log.fold().attempts) == 2


def test_back_to_what_was_asked_for_with_the_next_launch(place: Any) -> None:
    """The pod of the smaller layout is lost: its next launch is for all that was asked for, then smaller again."""
    store, prepared = place
    cluster, log = Cluster(), RunLog(store, prepared.run)
    drive(store, prepared, cluster, lambda: len(log.fold().attempts) == 2)
    small = f"{prepared.run}-k2"
    loss = Finding("infra", "pod x-0 was deleted", place="b")
    cluster.views[small] = LaunchView(small, "lost", (LaunchedNode(0, None, None, None, "", False, "b"),), loss=loss)
    drive(store, prepared, cluster, lambda: len(log.fold().attempts) == 4)
    told = details(store, prepared.run)["attempts_list"]
    wide, few = "4 stages x 1 replica on 2 nodes", "2 stages x 1 replica on 1 node"
    assert [(a["launch"][-2:], a["layout"]) for a in told] == [("k1", wide), ("k2", few), ("k3", wide), ("k4", few)]
    assert [bool(a["fallback"]) for a in told] == [False, True, False, True]
    assert log.fold().asked_how == how_map(prepared.spec)


def test_a_layout_that_makes_no_plan_is_refused_before_anything_runs(place: Any) -> None:
    store, prepared = place
    fits = max(sum(p.total_bytes for p in node) for node in prepared.plan.on_nodes(2))  # all four ranks take twice that
    small = {**SPEC, "launch": {**SPEC["launch"], "memory_gib": 1.5 * fits / (1 << 30)}}
    small |= {"data": {**SPEC["data"], "source": f"dataset:{prepared.dataset.digest}"}}
    assert prepare_run(parse_spec({**small, "recovery": {}}), store).nodes == 2
    with pytest.raises(PlanError) as refused:
        prepare_run(parse_spec({**small, "recovery": {"layouts": [{"stages": 4, "nodes": 1}]}}), store)
    assert "recovery.layouts[0] (4 stages x 1 replica on 1 node): " in str(refused.value)


@pytest.mark.parametrize("version", [PLAN_PLAIN - 1, PLAN_PLAIN])
def test_nodes_that_are_started_anew_get_a_plan_that_they_read(place: Any, version: int) -> None:
    """What the attempt before had, but where an older hotstage compiled it; a gang that lives on keeps its own."""
    store, prepared = place
    log = RunLog(store, prepared.run)
    old = bytearray(prepared.plan.to_bytes())
    old[8] = version
    store.create(plan_key(prepared.run, "0" * 64), bytes(old))
    body = attempt_body(prepared, "k1", {"checkpoint": None, "step": 0, "slots": None}, reason="start") | {
        "plan": "0" * 64
    }
    state = log.append("attempt", body, log.fold())
    driver = Driver(
        prepared, store, Cluster(), lambda ready, name, avoid: Launch(ready.run, name, 2, store.url, Path("out"))
    )
    launch = Launch(prepared.run, "k1", 2, store.url, Path("out"))
    driver._start(StartAttempt(Restore(None, 0), (), "recover", same_plan=True), state, launch)
    assert log.fold().attempts[-1].plan == ("0" * 64 if version == PLAN_PLAIN else prepared.plan.digest)
    held = StartAttempt(Restore(None, 4, (4, state.epoch)), (state.epoch,), "recover", same_plan=True)
    driver._start(held, state := log.fold(), launch)
    assert log.fold().attempts[-1].plan == state.attempts[-1].plan


def driver_nodes(cluster: Cluster) -> int:
    return cluster.ensured[-1].nodes if cluster.ensured else 0


def test_the_bits_do_not_know_of_it(place: Any) -> None:
    store, prepared = place
    (how,) = other_hows(how_map(prepared.spec))
    fewer = under(prepared, store, how)
    assert (fewer.run, fewer.what, fewer.nodes, fewer.ranks) == (prepared.run, prepared.what, 1, 2)
    assert store.head(f"runs/{prepared.run}/plans/{fewer.plan.digest}")


def lost_twice(log: RunLog, prepared: Prepared) -> RunState:
    """Three attempts in launches of their own, two of them begun because machine b was gone."""
    state = log.fold()
    strike = {"class": "infra", "text": "gone", "mend": "", "step": 1, "place": "b"}
    for number, cause in ((1, None), (2, strike), (3, strike)):
        body = attempt_body(
            prepared,
            f"{prepared.run}-k{number}",
            {"checkpoint": None, "step": 0, "slots": None},
            reason="x",
            cause=cause,
        )
        state = log.append("attempt", body, state)
    return state


def test_a_machine_with_two_strikes_is_left_out_of_later_launches_only(place: Any) -> None:
    store, prepared = place
    view = fold_view(lost_twice(RunLog(store, prepared.run), prepared))
    assert avoided(view, f"{prepared.run}-k2", 2) == ()
    assert avoided(view, f"{prepared.run}-k3", 2) == ("b",)
    assert avoided(view, f"{prepared.run}-k4", 2) == ("b",)


def test_machines_with_strikes_are_pardoned_where_nothing_else_is_left(place: Any) -> None:
    store, prepared = place
    spec = prepared.spec.model_copy(
        update={"recovery": prepared.spec.recovery.model_copy(update={"allowed_stages": ()})}
    )
    store_log, cluster = RunLog(store, prepared.run), Cluster()
    prepared = replace(prepared, spec=spec)
    lost_twice(store_log, prepared)
    drive(store, prepared, cluster, lambda: len(store_log.fold().attempts) == 4)
    last = store_log.fold().attempts[-1]
    assert last.launch.endswith("-k4")
    assert last.body["pardon"] == ["b"]
    assert "no room without b" in last.body["cause"]["text"]
    assert next((x.launch_id[-2:], x.avoid) for x in cluster.ensured if x.launch_id.endswith("k3")) == ("k3", ("b",))


def test_a_refused_image_ends_the_run(place: Any) -> None:
    store, prepared = place
    cluster = Cluster()
    loss = Finding("config", "pod x cannot start its engine: ErrImageNeverPull", "load the image")
    cluster.views[f"{prepared.run}-k1"] = LaunchView(
        f"{prepared.run}-k1", "lost", (LaunchedNode(0, None, None, None, ""),), loss=loss
    )
    outcome = Driver(
        prepared,
        store,
        cluster,
        lambda ready, name, avoid: Launch(ready.run, name, ready.nodes, store.url, Path("out")),
    ).run()
    assert (outcome.outcome, outcome.exit_code) == ("gave_up", 78)
    assert "ErrImageNeverPull" in outcome.reason
    assert report_facts(store, prepared.run).reason == outcome.reason


def test_open_runs_of_a_cluster_want_a_driver(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, prepared = place
    log = RunLog(store, prepared.run)
    assert not wants_driver(log.fold())
    cluster = Cluster()
    state = log.fold()
    name = launch_of(state, prepared, cluster)
    body = attempt_body(prepared, name, {"checkpoint": None, "step": 0, "slots": None}, reason="start", cause=None)
    log.append("attempt", body, state)
    assert wants_driver(log.fold())
    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: cluster)
    reconciler = Reconciler(store)
    assert reconciler.look() == [prepared.run]
    assert reconciler.look() == []  # it is driven
    run = reconciler.driven[prepared.run]
    assert load_run(store, prepared.run).nodes == 2
    run.cancel()
    cluster.views = {name: LaunchView(name, "done") for name in cluster.views}  # its nodes leave
    assert run.wait(60)
    assert not wants_driver(log.fold())


def test_an_order_for_a_cluster_wants_a_driver_also_where_its_command_died(place: Any) -> None:
    store, prepared = place
    local = prepared.spec.model_copy(update={"launch": prepared.spec.launch.model_copy(update={"target": "local"})})
    log = RunLog(store, prepared.run)
    restore = {"checkpoint": None, "step": 0, "slots": None}
    here = replace(prepared, spec=local)
    state = log.append("attempt", attempt_body(here, "x", restore, reason="start", cause=None), log.fold())
    assert target_of(state) == "local"
    how = attempt_body(prepared, "x", restore)["how"]
    order = {"kind": "order", "how": how, "by": "ann@a", "via": "runs resume", "again": True}
    state = log.append("intervention", order, state)
    assert (wants_driver(state), target_of(state)) == (True, "kubernetes")
    state = log.append("ended", ended_body(state, "cancelled", "by ann"), state)
    assert not wants_driver(state)
    assert wants_driver(log.append("intervention", order, state))


def test_a_run_of_older_numerics_goes_on_with_a_plan_of_this_one_and_says_so(
    place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgrade that changes bits strands no run: its record says from where on they are others. Those of
    versions 2 and 3 concern bf16 and fp8 alone.
    """
    store, of_f32 = place
    assert of_f32.plan.config.numerics_version == 1
    data = {**SPEC["data"], "source": of_f32.spec.data.source}
    spec = parse_spec({**SPEC, "train": {**SPEC["train"], "precision": "bf16"}, "data": data})
    prepared = prepare_run(spec, store)
    assert prepared.plan.config.numerics_version == 3
    log = RunLog(store, prepared.run)
    store.create(plan_key(prepared.run, "0" * 64), prepared.plan.to_bytes())
    body = attempt_body(prepared, "k1", {"checkpoint": None, "step": 0, "slots": None}, reason="start")
    state = log.append("attempt", body | {"plan": "0" * 64, "numerics": 2}, log.fold())
    driver = Driver(
        prepared, store, Cluster(), lambda ready, name, avoid: Launch(ready.run, name, 2, store.url, Path("out"))
    )
    launch = Launch(prepared.run, "k1", 2, store.url, Path("out"))
    driver._start(StartAttempt(Restore(None, 0), (), "recover", same_plan=True), state, launch)
    newest = log.fold().attempts[-1]
    assert (newest.plan, newest.numerics) == (prepared.plan.digest, 3)
    assert (
        "from step 1 on the run's bits are those of numerics version 3; up to there they are version 2's" in caplog.text
    )
