"""Orders on a run's numbers, through the real command: the same orders are the same bits, whatever else happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpoint.log import RunLog, RunState, StartPoint
from checkpoint.store import open_store
from tests.support.chaos import caught, rank_pid, step_of
from tests.support.place import LONG, SPEC, STEPS, Place
from tests.support.place import finish as ended
from tests.support.undisturbed import undisturbed_run
from tests.support.wait import wait_for

AMENDS = ("--skip", "11-14", "--skip", "30-31", "--lr-scale", "0.5", "--from-step", "13")
LAST, BATCH = 120, 8
QUIET = ("--no-prefect", "--json")


def log_of(at: Place, run: str) -> RunState:
    return RunLog(open_store((at.folder / "store").as_uri()), run).fold()


def order_back(at: Place, run: str) -> tuple[int, tuple[str, ...]]:
    """The orders, and the step that they go back to: one of before what they amend, that the store has."""
    back = max((c.step for c in log_of(at, run).checkpoints if c.step <= 10), default=0)
    return back, ("--rollback-to", str(back), *AMENDS, "--steps", str(LAST))


@contextmanager
def held(at: Place, step: int, before: Collection[int] = ()) -> Iterator[list[int]]:
    """The gang stands still inside the block once one of its ranks, who are none of those ``before``, is at this step;
    all ranks so far.
    """

    def ranks() -> list[int]:
        return [pid for pid in at.rank_pids() if pid not in before]

    there = caught(
        at.folder, lambda: any((step_of(pid) or 0) >= step for pid in ranks()), f"step {step}", step=step, but=before
    )
    with there:
        yield [*before, *ranks()]


@pytest.fixture
def calm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same orders to the undisturbed run, after its end, on one stage: what they give without a fault."""
    folder, run, _ = undisturbed_run(tmp_path_factory, LONG)
    at = Place(tmp_path / "calm", LONG)
    shutil.copytree(folder / "store", at.folder / "store")
    back, order = order_back(at, run)
    try:
        told = at.call("runs", "resume", run, *order, *QUIET)
    finally:
        at.stop_all()
    assert told.code == 0, told.err
    state = log_of(at, run)
    assert state.attempts[-1].step == back, (told.out, told.told, state)
    newest = state.at_step()
    assert newest is not None
    # 6 batches of those that it has passed were skipped
    assert (newest.step, newest.data_position) == (LAST, (LAST + 6) * BATCH)
    begins = f"goes on from step {back}, skips batches 11-14, 30-31, rate x 0.5 from step 13, ends at step {LAST}"
    assert begins in told.told
    return {"run": run, **told.json()}


@pytest.mark.long_run
def test_the_same_orders_are_the_same_bits_in_every_layout_crash_and_resume(
    place: Place, calm: dict[str, Any], undisturbed: tuple[str, str]
) -> None:
    """Given while the gang trains on two stages; a rank is killed after that; then a third layout is ordered."""
    run, digest = undisturbed
    assert (calm["run"], calm["step"]) == (run, LAST)
    assert calm["state_digest"] != digest
    driver = place.start_train()
    with caught(place.folder, lambda: log_of(place, run).checkpoints, "a checkpoint"):
        ranks = place.rank_pids()
        back, told = order_back(place, run)
        assert "skips batches 11-14, 30-31" in place.said("runs", "order", run, *told)
        order = log_of(place, run).orders[-1].n
        with held(place, 15, ranks) as ranks:
            struck = rank_pid(place.folder, 1)
            assert struck is not None
            os.kill(struck, signal.SIGKILL)
    with held(place, 32, ranks):
        other = place.start("runs", "resume", run, "--set", "parallel.stages=4", *QUIET)
        wait_for(lambda: len(log_of(place, run).attempts) == 4, "the attempt on four stages", 60)
    for process in (other, driver):
        done = ended(process)
        assert done.code == 0, done.err
        assert json.loads(done.out)["state_digest"] == calm["state_digest"]
    state = log_of(place, run)
    assert [a.ranks for a in state.attempts if a.n > order] == [2, 2, 4]
    assert {a.amendments for a in state.attempts if a.n > order} == {state.orders[0].amendments}
    shown = place.said("runs", "show", run)
    assert f"order {order:>5}  by " in shown
    assert f"succeeded, step {LAST} of {LAST} saved" in shown
    again = place.call("replay", run, "--from", str(back), "--to", "14")
    assert again.code == 0, again.out + again.err
    # said once more it is refused, and nothing is written
    again = place.here("runs", "order", run, "--skip", "11-14")
    assert again.code == 78
    assert "batches 11-14 are skipped already" in again.err
    assert log_of(place, run).orders == state.orders


DIVERGES = (
    SPEC.replace(f"steps = {STEPS}", "steps = 24")
    .replace("seed = 3\n", "seed = 3\noptimizer = {lr = 10.0, weight_decay = 10.0, min_lr = 10.0}\n")
    .replace("stages = 2", "stages = 1")
    .replace("every = 4", "every = 24")
    .replace("[recovery]\n", '[recovery]\non_divergence = "skip"\nmax_skips = 1\n')
)
"""Weights are multiplied by -99 in each step, whatever is read. Nothing is saved before they diverge: what an attempt
would have saved by then depends on how fast its uploads are. A skip from a checkpoint on: flows/drive/test_amend.py.
"""


def test_divergence_is_skipped_so_often_and_an_order_of_a_lower_rate_gets_the_run_on(tmp_path: Path) -> None:
    at = Place(tmp_path / "p", DIVERGES)
    try:
        done = at.call("train", "spec.toml", *QUIET)
        assert done.code == 87, done.err
        (run,) = [path.name for path in (at.folder / "store" / "runs").iterdir()]
        state = log_of(at, run)
        assert state.ended is not None
        assert "to skip batches, once (recovery.max_skips), did not help" in state.ended.reason
        (own,) = state.orders
        assert own.body["own"]
        assert own.start == StartPoint(None, 0)
        failed = [int(a.body["cause"]["words"]["step"]) for a in state.attempts if a.body["cause"]]
        assert len(set(failed)) == 1  # the same step each time, whatever was read
        assert own.amendments.skip == ((1, failed[0]),)
        assert [(a.n > own.n, a.step) for a in state.attempts] == [(False, 0)] * 2 + [(True, 0)] * 2
        assert "because rank 0 exited with 87" in at.said("runs", "show", run)
        told = at.call("runs", "resume", run, "--rollback-to", "0", "--lr-scale", "0.0001", *QUIET)
        assert told.code == 0, told.err
        assert told.json()["step"] == 24
        newest = log_of(at, run).amendments
        assert (newest.skip, newest.rate) == (own.amendments.skip, ((1, 0.0001),))
    finally:
        at.stop_all()
