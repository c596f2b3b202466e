"""No flow run is left Running for ever: who goes on with a run closes those of drivers that are gone, or takes one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.keys import driver_key
from checkpoint.store import Store
from flows.drive.driving import DriverNote
from flows.page.left_open import EVERY_S, GRACE_S, LeftOpen, own_mark
from flows.prefect_api import Client, Gone
from tests.flows.conftest import Api
from tests.flows.page.test_page import Told, assert_whole
from tests.support.front import Front
from tests.support.wait import wait_for

DEAD = replace(DriverNote.of_process(Path("out")), token="dead", pid=(1 << 22) + 1, n=1)


def patiently(work: Callable[[], Any]) -> Any:
    """A server that is busy (503) is asked again."""
    found: list[Any] = []

    def ask() -> bool:
        try:
            found.append(work())
        except Gone:
            return False
        return True

    wait_for(ask, "an answer", 60)
    return found[0]


def flow_run(client: Client, name: str, mark: str) -> str:
    made = str(patiently(lambda: client.create_flow_run(name, {})))
    patiently(lambda: client.mark(made, mark))
    return made


def state_of(api: Api, flow_run: str) -> tuple[str, str]:
    (found,) = api.flow_runs(id={"any_": [flow_run]})
    return str(found["state_type"]), str(found["state"]["message"] or "")


def test_who_looks_closes_what_nobody_goes_on_with(prefect: Api) -> None:
    now, said = [0.0], list[str]()
    looks = LeftOpen(said.append, lambda: now[0])
    with Client.open(prefect.server.api) as client:
        gone, mine, foreign, rebooted, taken = (
            flow_run(client, f"left-{word}", mark)
            for word, mark in (
                ("gone", DEAD.mark),
                ("mine", own_mark()),
                ("foreign", "worker-1:4711"),
                ("rebooted", replace(DEAD, boot="an-earlier-one").mark),
                ("taken", DEAD.mark),
            )
        )
        assert patiently(lambda: looks.look(client)) == []
        now[0] += GRACE_S - 1.0
        assert patiently(lambda: looks.look(client)) == []
        patiently(lambda: client.mark(taken, own_mark()))  # a driver goes on with it
        now[0] += EVERY_S
        closed = patiently(lambda: looks.look(client))
        # by this look, or by that of a schedule of another test, which looks at the same server
        every = (gone, mine, foreign, rebooted, taken)
        assert {at for at in every if state_of(prefect, at)[0] == "CRASHED"} == {gone, rebooted}
        assert not {mine, foreign, taken} & set(closed)
        for closing in (mine, foreign, taken):
            patiently(lambda at=closing: client.set_state(at, "COMPLETED", "Completed", ""))
    kind, message = state_of(prefect, gone)
    assert kind == "CRASHED"
    assert message.startswith(
        f"its process is gone (process {DEAD.pid} on {DEAD.host}); a gang that was running goes on"
    )
    assert any("flow run left-gone is Crashed" in text for text in said) == (gone in closed)


def test_a_page_goes_on_with_the_flow_run_of_a_driver_that_is_gone(prefect: Api, store: Store) -> None:
    """All of it is there as if one process had told it; the task runs are not there twice."""
    first = Told(store, lambda: Client.connect(prefect.server.api))
    first.begin()
    wait_for(
        lambda: len(prefect.task_runs(first.page.flow_run or "")) == 2 if first.page.flow_run else False,
        "its tasks",
        60,
    )
    first.page.rest()
    api, known = first.page.where()
    assert api == prefect.server.api

    second = Told(store, lambda: Client.connect(prefect.server.api), adopted=(known,))
    second.run, second.log, second.state = first.run, first.log, first.state
    second.page.run_is(first.run, 60)
    wait_for(lambda: second.page.where()[1] == known, "the flow run to be adopted", 60)
    for step in range(1, 31):
        second.step(step, second.state.attempts[-1].epoch)
    assert second.fail_and_end(), second.warned
    flow_run = assert_whole(prefect, second)
    assert flow_run["id"] == known
    assert len(prefect.named(first.run)) == 1


def test_what_has_ended_is_not_gone_on_with(prefect: Api, store: Store) -> None:
    with Client.open(prefect.server.api) as client:
        ended = flow_run(client, "left-ended", DEAD.mark)
        patiently(lambda: client.set_state(ended, "CRASHED", "Crashed", "by Prefect"))
    told = Told(
        store, lambda: Client.connect(prefect.server.api), adopted=(ended, "0" * 8 + "-0000-4000-8000-" + "0" * 12)
    )
    told.begin()
    # one that Prefect has never answered leaves at once at its end, and a server that is busy says 503
    wait_for(lambda: told.page.flow_run not in (None, ended), "a flow run of its own", 60)
    assert told.fail_and_end(), told.warned
    assert assert_whole(prefect, told)["id"] != ended


def test_another_command_of_the_run_closes_the_flow_run_of_one_that_was_killed(prefect: Api, store: Store) -> None:
    told = Told(store, lambda: Client.connect(prefect.server.api))
    with Client.open(prefect.server.api) as client:
        killed = flow_run(client, "left-killed", DEAD.mark)
        silent = flow_run(client, told.run, DEAD.mark)  # it died before it told the store of its flow run
        other = flow_run(client, "left-of-another-run", DEAD.mark)
    note = replace(DEAD, api=prefect.server.api, flow_run=killed)
    store.put(driver_key(told.run, note.token), note.to_bytes())
    told.begin()
    wait_for(lambda: state_of(prefect, killed)[0] == "CRASHED", "its end", 60)
    assert told.fail_and_end(), told.warned
    for closed in (killed, silent):
        assert f"flow run {told.page.flow_run} goes on with the run" in state_of(prefect, closed)[1]
    assert state_of(prefect, other)[0] == "RUNNING"


@pytest.mark.parametrize("lost", [False, True])
def test_prefect_is_away_for_an_hour(prefect: Api, store: Store, lost: bool) -> None:
    """By the page's own clock; with its database lost, too. What happened meanwhile is caught up, with its times."""
    now, front = [0.0], Front(prefect.server.api)
    try:
        told = Told(store, lambda: Client.connect(front.api), clock=lambda: now[0] + time.monotonic())
        told.begin()
        wait_for(lambda: prefect.named(told.run), "the flow run", 60)
        front.shut()
        before = prefect.named(told.run)[0]["id"]
        now[0] += 60.0
        wait_for(lambda: told.page.failures, "a try that fails: no question is on its way any more", 60)
        if lost:
            prefect.delete(f"flow_runs/{before}")
        for minute in range(60):
            now[0] += 60.0
            told.page.line(f"minute {minute}")
            if minute % 20 == 0:
                known = told.page.failures
                wait_for(lambda k=known: told.page.failures > k, "a try that fails", 60)
        assert len(told.warned) == 1
        assert told.page._thread.is_alive()
        front.open()
        now[0] += 60.0
        wait_for(lambda: told.page.flow_run and (told.page.flow_run == before) != lost, "its flow run", 60)
        assert told.fail_and_end(), told.warned
        flow_run = assert_whole(prefect, told)
        assert [f"minute {m}" for m in range(60)] == [t for t in prefect.logs(flow_run["id"]) if t.startswith("minute")]
    finally:
        front.close()
