"""A store that does not answer, or refuses from now on: the driver hears a wish to stop, and a gang is never ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import CredentialsRefused, StoreRefused, StoreUnavailable
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.drive.aside import Aside, TurnedAway
from flows.drive.begin import prepare_run
from flows.drive.driving import STOPPED, Driving
from flows.drive.events import Event, Outcome
from flows.drive.loop import Driver
from flows.drive.run import Prepared
from tests.checkpoint.samples import point_body
from tests.flows.drive.test_orders import Nodes
from trainer.launch import Launch, LaunchedNode, LaunchView, nothing
from trainer.spec import RunSpec


class Gate:
    """A real store behind a gate: ``before`` is called ahead of each call, and may wait or raise."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.before: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found) or name == "describe":
            return found

        def call(*args: Any, **more: Any) -> Any:
            self.before()
            return found(*args, **more)

        return call


class Sink:
    """Keeps what it is told; ``on`` is called for each event."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.on: Callable[[Event], None] = lambda _: None

    def tell(self, event: Event) -> None:
        self.told.append(event)
        self.on(event)


def begun(ground: tuple[Store, RunSpec], name: str) -> tuple[Gate, Prepared, Driver, Sink]:
    """A driver that has begun its run, in a thread of its own; its store is behind the gate."""
    store, spec = ground
    prepared = prepare_run(spec, store, suffix=name)
    gate, sink = Gate(store), Sink()

    def launch(ready: Prepared, launch_id: str, avoid: tuple[str, ...]) -> Launch:
        return Launch(ready.run, launch_id, ready.nodes, store.url, Path("out"), avoid=avoid)

    return gate, prepared, Driver(prepared, gate, Stopping(), launch, sink=sink, last_s=0.0), sink  # type: ignore[arg-type]


class Stopping(Nodes):
    """Nodes that note what is asked to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped: list[str] = []

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        self.stopped.append(launch_id)
        asked()


class Beside(Nodes):
    """Nodes that another driver may have stopped: then they have left."""

    over = ""

    def observe(self, launch_id: str) -> LaunchView:
        if launch_id == self.over:
            return LaunchView(launch_id, "done", (LaunchedNode(0, None, None, "stopped", "", False),))
        return super().observe(launch_id)


def in_thread(driver: Driver) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []

    def work() -> None:
        try:
            out.append(driver.run())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, out


@pytest.mark.parametrize("how", ["hangs", "is away"])
def test_a_wish_to_stop_is_heard_while_the_store_does_not_answer(
    ground: tuple[Store, RunSpec],
    how: str,
) -> None:
    gate, prepared, driver, sink = begun(ground, "h" + how.replace(" ", ""))
    shut, stuck, opened = threading.Event(), threading.Event(), threading.Event()

    def before() -> None:
        if shut.is_set():
            stuck.set()
            if how == "hangs":
                opened.wait(60)
            raise StoreUnavailable("the store is away")

    gate.before = before
    sink.on = lambda event: shut.set() if event.kind == "attempt" else None
    thread, out = in_thread(driver)
    try:
        assert stuck.wait(30)
        driver.stop.set()
        thread.join(30)  # the gate is shut all the while
        assert not thread.is_alive()
    finally:
        opened.set()
    (outcome,) = out
    assert isinstance(outcome, Outcome)
    assert (outcome.outcome, outcome.exit_code) == ("stopped", 85)
    assert "the store does not answer" in outcome.reason
    launcher: Any = driver.launcher
    assert launcher.stopped == [f"{prepared.run}-l1"]
    assert len(RunLog(ground[0], prepared.run).fold().attempts) == 1


def test_a_refusal_in_the_middle_of_a_run_is_told_and_borne(ground: tuple[Store, RunSpec]) -> None:
    """Rotated credentials: the gang trains on, the store takes the new ones at a later call."""
    gate, _, driver, sink = begun(ground, "refused")
    said = "the key of AWS_ACCESS_KEY_ID is not known (environment; renew it there)"
    refusing = threading.Event()

    def before() -> None:
        if refusing.is_set():
            raise CredentialsRefused(said)

    def on(event: Event) -> None:
        if event.kind == "attempt":
            refusing.set()
        if event.facts.get("phase") == "warning":
            refusing.clear()  # renewed
            driver.stop.set()

    gate.before, sink.on = before, on
    thread, out = in_thread(driver)
    thread.join(60)
    assert isinstance(out[0], Outcome), out
    assert out[0].outcome == "stopped"
    (text,) = [str(e.facts["text"]) for e in sink.told if e.facts.get("phase") == "warning"]
    assert said in text
    assert "the gang trains on" in text


def test_a_refusal_at_the_start_is_one(ground: tuple[Store, RunSpec]) -> None:
    gate, _, driver, _ = begun(ground, "atstart")

    def before() -> None:
        raise StoreRefused("no rights")

    gate.before = before
    with pytest.raises(StoreRefused):
        driver.run()


def test_what_was_turned_away_from_acts_no_more() -> None:
    stop, held, after = threading.Event(), threading.Event(), threading.Event()
    aside, acted = Aside(), []

    def work() -> None:
        held.wait(30)
        try:
            aside.go_on()
            acted.append(True)
        finally:
            after.set()

    stop.set()
    with pytest.raises(TurnedAway):
        aside.call(work, stop, 0.0)
    held.set()
    assert after.wait(30)
    assert acted == []


def test_who_stops_a_run_from_one_terminal_stops_it_in_all(ground: tuple[Store, RunSpec]) -> None:
    """Also a driver that only watched how the gang left, and it knows what the gang saved then; one that begins later
    goes on.
    """
    store = ground[0]
    gate, prepared, driver, sink = begun(ground, "beside")
    nodes = driver.launcher = Beside()
    log = RunLog(store, prepared.run, writer="agent")

    def stopped_there(event: Event) -> None:
        if event.kind == "attempt":
            state = log.fold()
            Driving(store, prepared.run, Path("there")).leave(STOPPED, state.n)
            log.append("checkpoint", point_body(1, state.epoch), state, epoch=state.epoch)  # seen before it leaves too
            nodes.over = f"{prepared.run}-l1"

    sink.on, driver.driving = stopped_there, Driving(store, prepared.run, Path("here"))
    outcome = driver.run()
    assert (outcome.outcome, outcome.exit_code, outcome.attempts) == ("stopped", 85, 1)
    assert outcome.reason.startswith("state saved")
    assert "stopped from another terminal (process" in "".join(str(e.facts.get("text")) for e in sink.told)

    again = Driver(prepared, gate, nodes, driver.make_launch, sink=sink, last_s=0.0)  # type: ignore[arg-type]
    again.driving = Driving(store, prepared.run, Path("again"))
    sink.on = lambda event: again.stop.set() if event.kind == "attempt" else None
    assert again.run().attempts == 2
