"""Which steps are computed again, and that nothing is where there is no room for it, which is said once."""

from __future__ import annotations

import functools
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from checkpoint.keys import replays_key
from checkpoint.log import RunLog
from checkpoint.store.memory import MemoryStore
from flows.drive.events import Event
from flows.drive.replays import Kept, Replays, next_range, spare_cores
from flows.show.lines import Lines
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.place import SPEC
from tests.support.wait import wait_for
from trainer.spec import RunSpec, how_map, parse_spec

RUN = "demo-0a1b2c"


def spec(*sets: str) -> RunSpec:
    return parse_spec(tomllib.loads(SPEC), sets)


def test_one_step_in_so_many_over_a_long_run() -> None:
    """Whatever the cadence of checkpoints, and however late the driver looks: never more, and not much less."""
    rng = random.Random(5)
    for every in (1, 3, 10, 64, 500):
        for cadence in (1, 7, 100):
            saved, upto, reached, again = [0], 0, 0, 0
            while reached < 20_000:
                reached += rng.randrange(1, 150)
                saved = list(range(0, reached + 1, cadence))[-40:]
                if (found := next_range(every, saved, reached, upto)) is not None:
                    first, last = found
                    assert first in saved
                    assert upto <= first < last <= reached
                    again, upto = again + last - first, reached
            assert 0.3 / every < again / reached <= 1 / every, (every, cadence, again)


@pytest.mark.parametrize(
    ("sets", "cpus", "elsewhere", "spare"),
    [
        (("parallel.threads=0",), 8, False, 0),
        (("parallel.threads=2", "parallel.stages=2"), 8, False, 4),
        (("parallel.threads=2", "parallel.stages=2"), 3, False, 0),
        (("parallel.threads=0",), 3, True, 3),
        (("parallel.threads=1", "parallel.device=cuda"), 8, False, 0),
    ],
)
def test_cores_that_no_rank_uses(sets: tuple[str, ...], cpus: int, elsewhere: bool, spare: int) -> None:
    assert spare_cores(spec(*sets), cpus, elsewhere=elsewhere) == spare


def test_without_a_core_to_spare_that_is_said_once(tmp_path: Path) -> None:
    store = MemoryStore()
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    told: list[Any] = []
    replays = Replays(store, RUN, tmp_path, elsewhere=False, tell=lambda *fact: told.append(fact), cpus=4)
    for reached in (9, 10, 11, 50):
        replays.look(spec("recovery.replay_every=10", "parallel.threads=0"), state, reached)
    ((found, facts),) = told
    assert found == "none"
    assert "all 4 cores of it compute the run" in facts["text"]
    assert f"hotstage replay {RUN}" in facts["text"]


def test_a_process_that_fails_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    store = MemoryStore()
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    for step in (4, 8, 12):
        state = log.append("checkpoint", point_body(step, state.epoch), state, epoch=state.epoch)
    told: list[Any] = []
    replays = Replays(
        store, RUN, tmp_path, elsewhere=True, tell=lambda *fact: told.append(fact), command=("false",), cpus=1
    )
    wanted = spec("recovery.replay_every=1")
    for number, reached in enumerate((5, 9, 13), 1):
        end = functools.partial(lambda n, step: replays.look(wanted, state, step) or len(told) == n, number, reached)
        wait_for(end, "its end")
    assert "could not be computed again: the process ended with 1" in told[0][1]["text"]
    assert [text["text"].endswith("it is not tried again") for _, text in told] == [False, False, True]
    replays.look(wanted, state, 99)
    assert replays._child is None
    assert Kept.load(store, RUN).steps == 0


def test_a_checkpoint_that_the_collector_took_meanwhile_is_no_failure(tmp_path: Path) -> None:
    """The steps are computed again from another one, and nothing is said."""
    store = MemoryStore()
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    state = log.append("checkpoint", point_body(4, state.epoch), state, epoch=state.epoch)
    told: list[Any] = []
    refuses = ("sh", "-c", "exit 78")
    replays = Replays(store, RUN, tmp_path, elsewhere=True, tell=lambda *f: told.append(f), command=refuses, cpus=1)
    wanted = spec("recovery.replay_every=1")
    replays.look(wanted, state, 5)
    assert replays._child is not None
    replays._child.process.process.wait(60)
    gone = log.append("tombstone", {"checkpoint": state.checkpoints[-1].n}, state)
    replays.look(wanted, gone, 5)
    assert replays._child is None
    assert not told
    assert replays._failures == 0


@pytest.mark.parametrize(
    "raw", [b"", b"\xc0", b"\x81\xa1v\x01", b"\x84\xa1v\x01\xa4upto\xa1x\xa5steps\x00\xa6differ\x91\x01"]
)
def test_a_hint_that_does_not_hold_is_nothing(raw: bytes) -> None:
    store = MemoryStore()
    store.put(replays_key(RUN), raw)
    assert Kept.load(store, RUN) == Kept()


def test_a_how_without_it_is_written_as_before() -> None:
    assert "replay_every" not in how_map(spec())["recovery"]
    assert how_map(spec("recovery.replay_every=7"))["recovery"]["replay_every"] == 7


def test_what_differs_is_a_warning_and_what_is_the_same_no_word() -> None:
    said: list[str] = []
    shown = Lines(said.append, 100)
    shown.tell(Event("replay", {"found": "same", "text": "", "steps": 3}))
    assert said == []
    shown.tell(Event("replay", {"found": "none", "text": "recovery.replay_every: no room"}))
    shown.tell(Event("replay", {"found": "differs", "text": "DIFFERS at step 6, the loss"}))
    assert said == [
        "recovery.replay_every: no room",
        "WARNING: a step computed again differs\nDIFFERS at step 6, the loss",
    ]
