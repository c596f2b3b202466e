"""The collector, killed at every request and beside others at work."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable

import pytest

from checkpoint.agent.commit import commit
from checkpoint.collect.collector import collect
from checkpoint.collect.pins import pin
from checkpoint.errors import Conflict, Halted, PinRefused
from checkpoint.log import RunLog
from tests.checkpoint.collect.world import GRACE_S, KEEP, World
from tests.support.small_checkpoints import RUN, Clock, Watched, begin, upload


class Killed(BaseException):
    """The collector's process is gone."""


def collect_until(world: World, at: int) -> None:
    """A pass whose process is killed before its request of this number, counted from 1; a shorter pass ends."""
    count = 0

    def strike(_verb: str, _key: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Killed

    world.store.before = strike
    try:
        collect(world.store, RUN)
    finally:
        world.store.before = lambda _verb, _key: None


def busy() -> World:
    """A run in which there is something of every sort to do, anew each time."""
    world = copy.copy(BUSY)
    world.clock = Clock()
    world.clock.now = BUSY.clock.now
    world.store = Watched(world.clock)
    world.store._objects, world.store._written = dict(BUSY.store._objects), dict(BUSY.store._written)
    world.log = RunLog(world.store, RUN, writer="driver")
    return world


def _busy() -> World:
    world = World().saved(10, 20)
    upload(world.store, RUN, 25, 1, 0, 2)
    upload(world.store, RUN, 30, 1, 1, 2)
    world.again().saved(30)
    upload(world.store, RUN, 35, world.state.epoch, 0, 2)
    world.saved(40, 50, 60).late()
    world.collect()
    upload(world.store, RUN, 65, world.state.epoch, 0, 2)
    world.saved(70, 80).late()
    return world


BUSY = _busy()


def requests_of_a_pass() -> int:
    world = busy()
    world.store.requests = 0
    collect(world.store, RUN)
    return world.store.requests


REQUESTS = requests_of_a_pass()


def test_killed_at_every_request_it_leaves_nothing_that_is_believed_and_not_whole() -> None:
    """Before a request is after the one before it."""
    quiet = busy()
    for _ in range(4):
        quiet.late().collect()
    for at in range(1, REQUESTS + 1):
        world = busy()
        with pytest.raises(Killed):
            collect_until(world, at)
        world.check()
        for _ in range(3):
            world.late().collect()
        world.check()
        assert world.points == quiet.points


def restart(world: World) -> str:
    """A driver begins the next attempt from what it thinks best."""
    log, state = RunLog(world.store, RUN, writer="driver2"), world.state
    while True:
        try:
            state = begin(log, state, KEEP)
        except Conflict as conflict:
            state = conflict.state
            continue
        return f"attempt {state.epoch}"


def hold(world: World) -> str:
    """A reader, or a fork, pins a checkpoint that the rules give up."""
    log, state = RunLog(world.store, RUN, writer="reader"), world.state
    try:
        pin(log, state.restore_candidates()[2], "reader", state)
    except PinRefused:
        return "refused"
    return "pinned"


def arrive(world: World) -> str:
    """An agent that was slow commits a step of the newest attempt whose upload is nearly there."""
    state = world.state
    upload(world.store, RUN, 65, state.epoch, 1, 2)
    log = RunLog(world.store, RUN, writer="agent")
    try:
        made = commit(log, 2, 65, state.epoch, state)
    except Halted:
        return "void"
    assert made is not None
    return "committed"


@pytest.mark.parametrize("other", [restart, hold, arrive])
def test_whatever_others_do_at_any_of_its_requests_what_they_use_is_whole(other: Callable[[World], str]) -> None:
    """The other one decides by a log that it read before the pass, and acts between any two requests of it."""
    said = set()
    for at in range(1, REQUESTS + 1):
        world, count = busy(), 0
        world.state = world.log.fold()

        def meet(_verb: str, _key: str, world: World = world, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                said.add(other(world))

        world.store.before = meet
        collect(world.store, RUN)
        world.store.before = lambda _verb, _key: None
        world.check()
        for _ in range(3):
            world.late().collect()
        world.check()
    assert len(said) > 1 or other is restart


@pytest.mark.parametrize("seed", range(8))
def test_a_random_life_beside_two_collectors(seed: int) -> None:
    """Steps, restarts, pins and passes in any order, each pass perhaps killed: what may be used is whole, and in the
    end the store has what the rules keep.
    """
    rng, world, step = random.Random(seed), World(), 0
    for _ in range(40):
        match rng.choice(["save", "save", "save", "part", "again", "pin", "unpin", "late", "gc", "gc"]):
            case "save":
                world.saved(step := step + 10)
            case "part":
                upload(world.store, RUN, step + 5, world.log.fold().epoch, 0, 2)
            case "again":
                world.again()
            case "pin" if line := world.log.fold().restore_candidates():
                pin(world.log, rng.choice(line), f"p{rng.randrange(10**9)}")
            case "unpin" if pins := sorted(world.log.fold().pins):
                world.log.append("unpin", {"name": rng.choice(pins)}, world.log.fold())
            case "late":
                world.late(rng.choice([1.0, GRACE_S, 3 * GRACE_S]))
            case "gc":
                with contextlib.suppress(Killed):
                    collect_until(world, rng.randrange(1, 60))
        world.check()
    for _ in range(4):
        world.late().collect()
    state = world.log.fold()
    expected = {(c.step, c.epoch) for c in state.checkpoints if c.n not in state.buried}
    kept = {*state.pins.values(), *(c.n for c in state.restore_candidates()[:2])}
    assert {c.n for c in state.checkpoints if c.n not in state.buried} <= {*kept, state.attempts[-1].checkpoint}
    assert expected <= set(world.points)
    assert {e for _, e in set(world.points) - expected} <= {state.epoch}  # its uploads under way
