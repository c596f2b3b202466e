"""Orders: what a person asks of a run's How is a record, the newest wins, and every driver follows it or leaves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.log import RunLog, RunState
from checkpoint.store import Store, open_store
from flows.drive.begin import prepare_run
from flows.drive.events import Event, Outcome
from flows.drive.loop import Driver
from flows.drive.orders import Asked, changes, describe, place_order
from flows.drive.persons import who
from flows.drive.run import (
    Prepared,
    attempt_body,
    fallback_body,
    layouts_of,
    ruling_how,
    under,
)
from flows.drive.train import cancel
from flows.drive.views import Restore, StartAttempt
from tests.checkpoint.samples import point_body
from tests.flows.conftest import Trained
from tests.support.place import LEARNT, Place, finish
from tests.support.wait import wait_for
from trainer.errors import SpecError
from trainer.launch import Launch, LaunchView, nothing
from trainer.plan import compile_plan
from trainer.spec import RunSpec, how_map, parse_spec
from trainer.spec_layouts import same_layout

# --- two real drivers ---------------------------------------------------------------------------------------


def held(at: Place) -> int:
    """The gang's only rank, stopped after its first checkpoint: the run cannot end before somebody acts."""
    store = at.folder / "store"
    wait_for(lambda: list(store.glob("runs/*/manifests/*/manifest")), "the first checkpoint", 60)
    (pid,) = wait_for(at.rank_pids, "the rank")
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_the_newest_order_wins_and_the_other_driver_follows(tmp_path: Path, trained: Trained) -> None:
    """Two terminals: one stage in the first, `runs resume --set parallel.stages=2` in the second."""
    at = Place(tmp_path / "p", LEARNT)
    try:
        _two_terminals(at, trained)
    finally:
        at.stop_all()


def _two_terminals(at: Place, trained: Trained) -> None:
    first = at.start("train", "spec.toml", "--no-prefect", "--json", "--set", "parallel.stages=1")
    held(at)
    second = at.start("runs", "resume", trained.run, "--set", "parallel.stages=2", "--no-prefect", "--json")
    told: list[dict[str, Any]] = []
    for process in (second, first):
        done = finish(process)
        assert done.code == 0, done.out + done.err
        told.append(json.loads(done.out))
    assert [t["state_digest"] for t in told] == [trained.digest] * 2
    state = RunLog(open_store((at.folder / "store").as_uri()), trained.run).fold()
    assert [a.ranks for a in state.attempts] == [1, 2]
    at.all_gone()


def test_a_command_that_cannot_serve_an_order_leaves_with_a_word(tmp_path: Path) -> None:
    at = Place(tmp_path / "p", LEARNT)
    try:
        process = at.start("train", "spec.toml", "--no-prefect", "--set", "parallel.stages=1")
        pid = held(at)
        (run,) = [path.name for path in (at.folder / "store" / "runs").iterdir()]
        log = RunLog(open_store((at.folder / "store").as_uri()), run, writer="ann")
        how = log.fold().attempts[-1].how
        cluster = {**how, "launch": {**how["launch"], "target": "kubernetes"}}
        order = {"kind": "order", "how": cluster, "by": "ann@b", "via": "runs resume"}
        log.transact(lambda state: None if state.orders else ("intervention", order))
        done = finish(process)
        assert done.code == 78, done.out + done.err
        (line,) = [line for line in done.err.splitlines() if line.startswith("hotstage: ")]
        for word in ("ann@b (runs resume)", "launch.target kubernetes", f"runs resume {run} --set launch.target=local"):
            assert word in line
        os.kill(pid, 0)  # the gang is not this command's to end
    finally:
        at.stop_all()


# --- one driver, its launcher written by the test -----------------------------------------------------------


@dataclass
class Nodes:
    """A launcher whose nodes run as soon as they are asked for, and never say anything."""

    detaches: bool = False
    ensured: list[Launch] = field(default_factory=list)

    def ensure(self, launch: Launch) -> None:
        self.ensured.append(launch)

    def observe(self, launch_id: str) -> LaunchView:
        return LaunchView(launch_id, "running" if any(x.launch_id == launch_id for x in self.ensured) else "absent")

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        asked()


@pytest.fixture
def small(ground: tuple[Store, RunSpec], request: pytest.FixtureRequest) -> tuple[Store, Prepared]:
    """A run of the test's own in a store that they share: its data are made once."""
    store, spec = ground
    return store, prepare_run(spec, store, suffix=f"t{abs(hash(request.node.name)) % 10**6}")


def another(store: Store, prepared: Prepared, *sets: str) -> Prepared:
    """The same run as another person's spec has it."""
    spec = prepared.spec.model_dump(mode="json")
    return prepare_run(parse_spec(spec, sets), store, suffix=prepared.run.rsplit("-", 1)[1])


def driven(store: Store, prepared: Prepared, nodes: Nodes, looks: int = 3) -> tuple[Outcome, list[Event]]:
    """A driver that is stopped after so many looks; what it ended with, and what it told."""
    driver: Driver
    told: list[Event] = []
    left = iter(range(looks))

    def launch(ready: Prepared, name: str, avoid: tuple[str, ...]) -> Launch:
        if next(left, None) is None:
            driver.stop.set()
        return Launch(ready.run, name, ready.nodes, store.url, Path("out"), how=how_map(ready.spec), avoid=avoid)

    class Sink:
        def tell(self, event: Event) -> None:
            told.append(event)

    driver = Driver(prepared, store, nodes, launch, sink=Sink())
    return driver.run(), told


def state_of(store: Store, prepared: Prepared) -> RunState:
    return RunLog(store, prepared.run).fold()


def test_a_second_train_with_another_layout_is_an_order_and_the_first_driver_follows(
    small: tuple[Store, Prepared],
) -> None:
    store, prepared = small
    driven(store, place_order(store, prepared, Asked("train")), nodes := Nodes())
    assert [i.body["kind"] for i in state_of(store, prepared).interventions] == []  # nothing stood before it
    two = another(store, prepared, "parallel.stages=2")
    assert two.run == prepared.run
    place_order(store, two, Asked("train"))
    place_order(store, two, Asked("train"))  # the same once more is nothing new
    assert len(state_of(store, prepared).orders) == 1
    _, told = driven(store, prepared, nodes)  # the first command's driver, with its own idea of the layout
    state = state_of(store, prepared)
    assert [(a.ranks, a.order) for a in state.attempts] == [(1, 0), (2, state.orders[0].n)]
    assert nodes.ensured[-1].how["parallel"]["stages"] == 2
    (text,) = [str(e.facts["text"]) for e in told if e.facts.get("phase") == "order"]
    assert f"(train), log record {state.orders[0].n}: parallel.stages 1 -> 2; this command goes on with that" in text
    # one that nobody asked for, an hour later: it writes no order and follows
    driven(store, prepared, nodes)
    assert state_of(store, prepared).n == state.n


def test_versions_whose_plans_differ_do_not_answer_each_other(
    small: tuple[Store, Prepared],
) -> None:
    store, prepared = small
    driven(store, prepared, nodes := Nodes())
    before = state_of(store, prepared)
    other = replace(prepared, plan=compile_plan(another(store, prepared, "checkpoint.slots=4").spec, prepared.dataset,
                                                prepared.what))  # fmt: skip
    assert other.plan.digest != prepared.plan.digest
    place_order(store, other, Asked("train"))
    driven(store, other, nodes)
    driven(store, prepared, nodes)
    assert state_of(store, prepared).n == before.n


def test_a_how_that_this_version_cannot_read_or_serve_is_left_with_a_word(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    driven(store, prepared, nodes := Nodes())
    log = RunLog(store, prepared.run, writer="user")
    how = how_map(prepared.spec)
    newer = {
        "kind": "order",
        "how": {**how, "parallel": {**how["parallel"], "rings": 3}},
        "by": "ann@b",
        "via": "train",
    }
    state = log.append("intervention", newer, log.fold())
    outcome, _ = driven(store, prepared, nodes)
    assert (outcome.outcome, outcome.exit_code) == ("superseded", 78)
    for word in ("ann@b (train)", f"log record {state.n}", "rings", "hotstage train SPEC"):
        assert word in outcome.reason, outcome.reason
    assert state_of(store, prepared).n == state.n  # it wrote nothing
    # the way out that it names
    place_order(store, prepared, Asked("train"))
    assert driven(store, prepared, nodes)[0].outcome == "stopped"
    cluster = {**how, "launch": {**how["launch"], "target": "kubernetes"}}
    state = log.append("intervention", {"kind": "order", "how": cluster, "by": "ann@b", "via": "train"}, log.fold())
    outcome, _ = driven(store, prepared, nodes)
    assert (outcome.outcome, outcome.exit_code) == ("superseded", 78)
    assert f"hotstage runs resume {prepared.run} --set launch.target=local" in outcome.reason


def test_resume_opens_what_had_ended_and_forgives_and_train_does_not(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    driven(store, prepared, nodes := Nodes())
    place_order(store, prepared, Asked("runs resume", again=True))  # it trains: nothing to open, nothing to forgive
    assert state_of(store, prepared).orders == ()
    cancel(store, prepared.run)
    two = another(store, prepared, "parallel.stages=2")
    place_order(store, two, Asked("train"))
    assert state_of(store, prepared).orders == ()
    nodes.ensured.clear()  # they leave by themselves
    assert driven(store, two, nodes)[0].outcome == "cancelled"
    place_order(store, prepared, Asked("runs resume", again=True))
    assert driven(store, prepared, nodes)[0].outcome == "stopped"
    state = state_of(store, prepared)
    assert (state.ended, len(state.attempts)) == (None, 2)
    assert state.attempts[-1].reason.startswith("resumed by ")
    RunLog(store, prepared.run, writer="agent").append("checkpoint", point_body(2), state, epoch=state.epoch)
    with pytest.raises(SpecError, match="usable checkpoint at step 2"):
        place_order(store, prepared, Asked("runs resume", again=True, anew=True))


def test_what_was_asked_is_not_what_a_driver_had_to_make_of_it(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    log = RunLog(store, prepared.run, writer="driver")
    wide = another(store, prepared, "parallel.stages=2", "launch.nodes=2")
    how = how_map(wide.spec)
    fewer = under(
        wide, store, {**how, "parallel": {**how["parallel"], "stages": 1}, "launch": {**how["launch"], "nodes": 1}}
    )
    restore = {"checkpoint": None, "step": 0, "slots": None}
    asked = attempt_body(wide, "l1", restore, reason="start", cause=None)
    state = log.append("attempt", asked, log.fold())
    old = attempt_body(fewer, "l2", restore, reason="fewer nodes: 1 stages instead of 2; no room", cause=None)
    for body in (old, {**old, "reason": "x", "fallback": {"kind": "capacity", "stages": 1, "was": 2, "why": ""}}):
        state = log.append("attempt", body, state)
        assert ruling_how(state) == how_map(fewer.spec)
        assert state.asked_how == asked["how"]
        # a rank that ends in that layout changes nothing of what was asked
        again = StartAttempt(Restore(None, 0), (), "recover")
        body = attempt_body(fewer, "l2", restore, reason="recover", fallback=fallback_body(state, again))
        state = log.append("attempt", body, state)
        assert state.asked_how == asked["how"]
        assert [same_layout(r.how, asked["how"]) for r in layouts_of(fewer, state)] == [True]


def test_orders_are_told(small: tuple[Store, Prepared]) -> None:
    store, prepared = small
    driven(store, prepared, Nodes())
    place_order(store, another(store, prepared, "parallel.stages=2", "checkpoint.every=7"), Asked("train"))
    (told,) = describe(state_of(store, prepared))
    assert told["text"] == "checkpoint.every 100 -> 7, parallel.stages 1 -> 2"
    assert (told["via"], told["by"]) == ("train", who())


def test_a_key_that_is_gone_is_no_change() -> None:
    """Between the How of an older version's record, which holds it, and one of today."""
    old = {"recovery": {"max_rollbacks": 3, "backoff_s": 1.0}, "launch": {"nodes": 1}}
    new = {"recovery": {"backoff_s": 2.0}, "launch": {"nodes": 1}}
    assert changes(old, new) == "recovery.backoff_s 1.0 -> 2.0"
    assert changes(old, old | {"recovery": {"backoff_s": 1.0}}) == "the same layout"


def test_layouts_are_told_without_what_they_leave_as_it_is() -> None:
    rows = [{"nodes": None, "stages": 2, "replicas": 1}, {"nodes": None, "stages": 1, "replicas": None}]
    told = changes({"recovery": {"layouts": []}}, {"recovery": {"layouts": rows}})
    assert told == "recovery.layouts [] -> [{stages = 2, replicas = 1}, {stages = 1}]"


def test_a_key_that_an_older_version_did_not_have_is_its_default() -> None:
    old = {"parallel": {"stages": 2}, "recovery": {"backoff_s": 1.0}}
    new = {"parallel": {"stages": 2, "replicas": 1}, "recovery": {"backoff_s": 1.0, "layouts": []}}
    assert changes(old, new) == changes(new, old) == "the same layout"
    assert changes(old, {**new, "parallel": {"stages": 2, "replicas": 2}}) == "parallel.replicas 1 -> 2"
