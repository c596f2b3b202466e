"""Runs as they go: a row a run from the store alone, as a table and as lines, until they end."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from rich.console import Console

from checkpoint import codec
from checkpoint.keys import log_key, run_key, spec_key
from checkpoint.log import ended_body
from flows.show.watching import RunRow, Watched, WatchedRuns, row_line, rows_table
from tests.flows.conftest import Trained
from tests.flows.tracking.world import RUN, World


def world() -> World:
    made = World()
    made.store.create(spec_key(RUN), codec.pack({"train": {"steps": 100}}))
    return made


def test_a_run_from_its_beginning_to_its_end() -> None:
    made, now = world(), 1e9
    watched = Watched(made.store, RUN, clock=lambda: now)
    assert watched.look() == RunRow(RUN, "planned", steps=100)
    made.attempt()
    assert watched.look().state == "open"
    made.steps(1, 8)
    made.save(5)
    made.evaluated(5, loss=2.5)
    now = 1e9 + 10
    watched._looks = 0  # evaluations are looked for now and then
    row = watched.look()
    assert (row.state, row.step, row.loss, row.tokens_per_s, row.saved_step, row.attempts) == (
        "training",
        8,
        1.25,
        1000.0,
        5,
        1,
    )
    assert (row.scores, row.evaluated, row.quiet_s) == ((("validation/loss", 2.5),), 5, 2.0)
    assert row.left_s == (100 - 8) * 0.002
    now = 1e9 + 400
    assert (watched.look().state, watched.look().left_s) == ("quiet", None)
    made.steps(9, 9)
    row = watched.look()
    assert (row.state, row.quiet_s) == ("training", 0.0)  # a node whose clock is minutes behind
    made.back_to(5)
    made.steps(6, 6)
    now = 1e9 + 7
    assert (watched.look().step, watched.look().attempts) == (6, 2)
    made.state = made.log.append("ended", ended_body(made.log.fold(), "succeeded", ""), made.log.fold())
    row = watched.look()
    assert (row.state, row.ended) == ("succeeded", True)


def test_of_a_store_those_that_are_open() -> None:
    made = world()
    made.attempt()
    made.steps(1, 2)
    made.store.create(log_key("unread", 1), b"no record")
    made.store.create(run_key("cut", "chunks/x"), b"of a copy that was cut short")
    board = WatchedRuns(made.store, lambda: [RUN, "removed", "unread", "cut"], only_open=True)
    assert [row.run for row in board.look()] == [RUN, "unread", "cut"]
    assert board.look()[1].state == "unreadable"  # it is shown, and the other one is watched all the same
    made.log.append("ended", ended_body(made.log.fold(), "gave_up", "why"), made.log.fold())
    assert board.look()[0].state == "gave up"  # once more, so that its end is seen
    assert [row.run for row in board.look()] == ["unread", "cut"]
    assert Watched(made.store, "removed").look().ended


def test_as_a_table_and_as_a_line() -> None:
    scores = (("validation/loss", 2.53125), ("eval/bench/acc", 0.25))
    rows = [
        RunRow("demo-0a1b2c", "training", 40, 100, 3.25, 12345.6, 61.0, 30, 2, scores, 30, 1.0),
        RunRow("other-0a1b2c", "quiet", 7, 100, 9.0, 10.0, None, -1, 1, (), -1, 3700.0),
        RunRow("new-0a1b2c", "planned", steps=10),
    ]
    drawn = {}
    for width in (140, 70):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(rows_table(rows, width))
        drawn[width] = console.export_text()
        console.file.close()
    for text in ("40/100 40%", "3.2500", "12,346", "1:01", "validation 2.531  bench/acc 0.25", "quiet 1:01:40"):
        assert text in drawn[140], text
    assert "40/100 40%" in drawn[70]
    assert all(len(line) <= 70 for line in drawn[70].splitlines())
    assert row_line(rows[0]) == (
        "demo-0a1b2c  training  step 40/100  loss 3.2500  12,346 tok/s  ETA 1:01  saved 30  attempt 2  "
        "validation 2.53125  bench/acc 0.25"
    )
    assert row_line(rows[1]).endswith("nothing saved  attempt 1  no step for 1:01:40")


def test_the_command_tells_a_run_that_has_ended_and_leaves(trained: Trained) -> None:
    place = trained.place
    (line,) = place.said("runs", "watch", trained.run, "--every", "0.2").splitlines()
    assert line.startswith(f"{trained.run}  succeeded  step 60/60  loss ")
    told = json.loads(place.said("runs", "watch", trained.run, "--json"))
    assert (told["state"], told["step"], told["steps"]) == ("succeeded", 60, 60)
    assert "no run is open" in place.said("runs", "watch", "--all", "--once")
    assert "give a RUN, or --all" in place.here("runs", "watch").err


def test_one_that_is_going_is_followed_to_its_end(tmp_path: Path) -> None:
    """Line by line, from a thread of its own; each thing is told once."""
    from flows.cli import watch

    made, said, stop = world(), list[str](), threading.Event()
    made.attempt()
    made.steps(1, 3)
    board = WatchedRuns(made.store, lambda: [RUN])
    looks = iter([lambda: made.steps(4, 5), lambda: None, lambda: made.log.append(
        "ended", ended_body(made.log.fold(), "cancelled", "by me"), made.log.fold())])  # fmt: skip

    def look(*, real: object = board.look) -> list[RunRow]:
        rows = WatchedRuns.look(board)
        next(looks, lambda: None)()
        return rows

    board.look = look  # type: ignore[method-assign]
    before, watch.say = watch.say, said.append
    try:
        watch._watch(board, stop, 0.01, False, leaves=True, where="here")
    finally:
        watch.say = before
    assert [line.split("  ")[1:3] for line in said] == [
        ["quiet", "step 3/100"],
        ["training", "step 5/100"],
        ["cancelled", "step 5/100"],
    ]
