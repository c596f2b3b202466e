"""A driver that comes to a run of 20,000 checkpoints decides with the work of one that comes to 2,000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoint.log import RunLog
from flows.drive.begin import prepare_run
from flows.drive.decide import decide
from flows.drive.history import raises
from flows.drive.loop import Driver
from flows.drive.run import Prepared, attempt_body, fold_view
from flows.drive.train import make_driver
from flows.drive.views import Cause, CheckpointView, LogView, Look, Memory, StartAttempt
from tests.flows.drive.test_takeover_cost import Counted, Decided
from tests.support.long_log import calls, long_log
from trainer.failures import Failure
from trainer.spec import parse_spec

ATTEMPTS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Counted, Prepared]]:
    """Of 2,000 and of 20,000 checkpoints."""
    folder: Path = tmp_path_factory.mktemp("long")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    model = {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16}
    train = {"steps": 1_000_000, "batch": 4, "microbatch": 2, "sequence": 16}
    data = {"vocab_size": 300, "source": f"text:{folder}/a.txt"}
    spec, made = parse_spec({"name": "long", "model": model, "train": train, "data": data}), []
    for each in (100, 1000):
        store = Counted()
        prepared = prepare_run(spec, store)

        def body(checkpoint: int | None, step: int, ready: Prepared = prepared) -> dict[str, Any]:
            restore = {"checkpoint": checkpoint, "step": step, "slots": None}
            return attempt_body(ready, f"{ready.run}-l1", restore, reason="x", cause=None)

        long_log(store, prepared.run, ATTEMPTS, each, body)
        made.append((store, prepared))
    return made


def looking(store: Counted, prepared: Prepared, out: Path) -> Driver:
    driver = make_driver(prepared, store, out=out)

    def decided(_: object) -> None:
        raise Decided

    driver.launcher.ensure = decided  # type: ignore[method-assign]
    return driver


def test_the_first_decision_takes_as_much_work(runs: list[tuple[Counted, Prepared]], tmp_path: Path) -> None:
    asked, work = [], []
    for n, (store, prepared) in enumerate(runs):
        warm, driver = (looking(store, prepared, tmp_path / f"{n}{which}") for which in "ab")
        with pytest.raises(Decided):
            warm._look()
        store.asked.clear()

        def look(driver: Driver = driver) -> None:
            with pytest.raises(Decided):
                driver._look()

        work.append(calls(look))
        asked.append(len([a for a in store.asked if not a.startswith("put")]))
    assert asked[1] <= asked[0] + 3 <= 20, asked
    assert work[1] <= 1.2 * work[0], work


def test_a_decision_after_a_failure_takes_as_much_work(runs: list[tuple[Counted, Prepared]]) -> None:
    work = []
    for store, prepared in runs:
        state = RunLog(store, prepared.run).fold(quick=True)
        view, policy = fold_view(state), prepared.policy(f"{prepared.run}-l1")
        lost, found = Cause(Failure.INFRA, "gone", place="m1"), []
        work.append(calls(lambda: found.append(decide(view, Look(0.0, lost=lost), policy, Memory()))))  # noqa: B023
        ((decision, _),) = found
        assert isinstance(decision, StartAttempt)
        assert decision.restore.step == state.checkpoints[-1].step
    assert work[1] <= 1.2 * work[0], work


def test_where_a_run_came_further_is_found_in_columns_as_in_rows() -> None:
    rows = (CheckpointView(2, 10, 1), CheckpointView(3, 30, 1), CheckpointView(4, 20, 1), CheckpointView(7, 25, 6))
    assert raises(LogView(checkpoints=rows)) == [2, 3]
