"""What TensorBoard's own reader finds in the event files, whatever happened to the run and to its drivers."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.drive.events import Event
from flows.tracking.history import lines_between
from flows.tracking.tensorboard_files import HELD, TensorBoardWriter
from flows.tracking.tracker import Tracker
from flows.tracking.writers import About, Written
from tests.flows.tracking.world import RUN, World, line, tells
from tests.support.wait import wait_for


def tracker(world: World, folder: Path) -> Tracker:
    return Tracker(world.store, RUN, TensorBoardWriter(str(folder)), {"model.layers": 2})


def told(world: World, folder: Path, events: list[Event], outcome: str = "") -> None:
    """One driver's life."""
    tells(tracker(world, folder), events, outcome)


def shown(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / RUN), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return [(e.step, round(e.value, 4)) for e in found.Scalars(tag)] if tag in found.Tags()["scalars"] else []


def text(folder: Path, tag: str) -> list[str]:
    found = EventAccumulator(str(folder / RUN), size_guidance={"tensors": 0}).Reload()
    return [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)]


def want(*parts: tuple[int, int, int]) -> list[tuple[int, float]]:
    return [(s, round(line(s, 1, branch)["loss"], 4)) for branch, first, last in parts for s in range(first, last + 1)]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "tensorboard")  # it says what it drops


def test_a_run_and_all_that_is_told_of_it(tmp_path: Path) -> None:
    world = World()
    events = [world.attempt(), *world.steps(1, 5)]
    world.save(5)
    events += [world.evaluated(5, loss=3.25, sample="a b c"), *world.steps(6, 9)]
    told(world, tmp_path, events, "succeeded")
    assert shown(tmp_path) == want((0, 1, 9))
    assert shown(tmp_path, "train/lr") == [(step, 0.001) for step in range(1, 10)]
    assert shown(tmp_path, "speed/step_s")[0] == (1, 0.002)
    assert shown(tmp_path, "validation/loss") == [(5, 3.25)]
    assert text(tmp_path, "sample") == ["a b c"]
    assert f"hotstage runs show {RUN}" in text(tmp_path, "run")[0]


def test_a_crash_and_other_drivers_double_no_step(tmp_path: Path) -> None:
    """The gang dies and does steps again; a driver dies before it kept what it had; of some steps nobody told."""
    world = World()
    events = [world.attempt(), *world.steps(1, 8)]
    world.save(4)
    told(world, tmp_path, [*events, world.attempt(4, 2), *world.steps(5, 12)])
    first = shown(tmp_path)
    assert first == want((0, 1, 8), (0, 9, 12))
    (tmp_path / RUN / HELD).write_text(
        '{"v": 1, "step": 10, "branch": 0, "begins": 0, "done": {}}'
    )  # as of before it was killed
    world.steps(13, 20)
    told(world, tmp_path, world.steps(21, 22))
    assert shown(tmp_path) == want((0, 1, 8), (0, 9, 22))


def test_steps_that_an_order_left_behind_are_gone(tmp_path: Path) -> None:
    world = World()
    events = [world.attempt(), *world.steps(1, 4)]
    world.save(4)
    events += [world.evaluated(4, loss=4.0), *world.steps(5, 8)]
    world.save(8)
    events.append(world.evaluated(8, loss=3.0))
    late = line(9, world.state.epoch)  # of the old attempt, heard after the new one's first
    events += [world.back_to(4), *world.steps(5, 6), Event("step", late), *world.steps(7, 7)]
    told(world, tmp_path, events)
    assert shown(tmp_path) == want((0, 1, 4), (world.branch, 5, 7))
    assert shown(tmp_path, "validation/loss") == [(4, 4.0)]


def test_an_order_while_nobody_watched(tmp_path: Path) -> None:
    world = World()
    told(world, tmp_path, [world.attempt(), *world.steps(1, 6)])
    world.save(3)
    world.back_to(3)
    world.steps(4, 5)
    told(world, tmp_path, world.steps(6, 7))
    assert shown(tmp_path) == want((0, 1, 3), (world.branch, 4, 7))


def test_a_folder_that_is_gone_is_written_anew(tmp_path: Path) -> None:
    world = World()
    told(world, tmp_path / "a", [world.attempt(), *world.steps(1, 6)])
    told(world, tmp_path / "b", world.steps(7, 7))
    assert shown(tmp_path / "b") == want((0, 1, 7))


def test_a_fork_names_its_parent_and_begins_where_it_was(tmp_path: Path) -> None:
    world = World().fork_of("old-0a1b2c", 100)
    told(world, tmp_path, [world.attempt(100), *world.steps(101, 103)])
    assert [step for step, _ in shown(tmp_path)] == [101, 102, 103]
    assert "A fork of `old-0a1b2c` at step 100." in text(tmp_path, "run")[0]


class Counting(TensorBoardWriter):
    """It knows how often it was tried to begin, each time to its end."""

    tried = 0

    def begin(self, about: About, held: Written | None) -> Written:
        try:
            return super().begin(about, held)
        finally:
            self.tried += 1


def test_a_folder_that_cannot_be_written_is_told_once_and_caught_up(tmp_path: Path) -> None:
    world, folder = World(), tmp_path / "tb"
    folder.write_text("in the way")
    writer = Counting(str(folder))
    one = Tracker(world.store, RUN, writer, {}, retry_s=0.0)
    events = [world.attempt(), *world.steps(1, 5)]
    for event in events:
        one.tell(event)
    wait_for(lambda: writer.tried == len(events), "an attempt for each event")  # one amid `unlink` fails otherwise
    said = one.trouble.get(timeout=60)
    assert said.startswith("TensorBoard is not written (")
    folder.unlink()
    for event in world.steps(6, 8):
        one.tell(event)
    assert one.close(30)
    assert one.trouble.empty()
    assert shown(folder) == want((0, 1, 8))


def test_a_disk_that_is_full_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    """The library's own thread printed a traceback at each try, and left an empty file."""
    program = """
import resource, sys
from flows.tracking.tensorboard_files import TensorBoardWriter
from flows.tracking.writers import About
writer = TensorBoardWriter(sys.argv[1])
about = About(run=sys.argv[2], store="", branch=0, begins=0, born=0, parent=None, config={})
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (0, 600):  # for nothing; for the first record and a part of what follows
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        held = writer.begin(about, None)
        writer.text(0, 0.0, "long", "x" * 600)
        writer.flush(held)
    except OSError as error:
        print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
held = writer.begin(about, None)
writer.numbers(1, 0.0, {"train/loss": 2.0})
writer.flush(held)
writer.end("")
"""
    command = [sys.executable, "-c", program, str(tmp_path), RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("OSError\nOSError\n", "", 0)
    assert all(file.stat().st_size for file in (tmp_path / RUN).iterdir())
    assert shown(tmp_path) == [(1, 2.0)]


def test_what_nobody_told_is_read_wherever_it_lies() -> None:
    world = World()
    world.attempt()
    world.steps(1, 50, a_time=7)
    world.save(20)
    world.attempt(20, 2)
    world.steps(21, 60, a_time=1)
    world.save(30)
    world.back_to(30)
    world.steps(31, 40)
    state, store = world.log.fold(), world.store
    epochs = [a.epoch for a in state.attempts]

    def steps(first: int, last: int | None = None) -> list[tuple[int, int]]:
        return [(found["step"], found["epoch"]) for found in lines_between(store, state, first, last)]

    everything = steps(1)
    assert [step for step, _ in everything] == list(range(1, 41))
    assert dict(everything)[40] == epochs[2]
    assert dict(everything)[25] == epochs[1]
    assert dict(everything)[10] == epochs[0]
    for first, last in ((1, 1), (7, 9), (20, 21), (30, 31), (36, 40), (40, 90), (41, None)):
        assert steps(first, last) == [(s, e) for s, e in everything if s >= first and (last is None or s <= last)]


def test_hostile_lines_are_left_out(tmp_path: Path) -> None:
    world = World()
    events: list[Any] = [world.attempt(), *world.steps(1, 2)]
    bad = {**line(3, 1), "lr": "high", "tokens_per_s": None, "step_us": None}
    told(world, tmp_path, [*events, Event("step", bad)])
    assert [step for step, _ in shown(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in shown(tmp_path, "train/lr")] == [1, 2]
