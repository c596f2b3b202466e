"""What evaluations gave: kept within bounds, joined whoever writes, read as hostile."""

from __future__ import annotations

import math
import random

import pytest

from checkpoint import codec
from checkpoint.errors import Damaged
from checkpoint.evaluated import (
    MAX_BYTES,
    MAX_NAME,
    MAX_NUMBERS,
    MAX_ROWS,
    MAX_TEXT,
    SAMPLES_KEPT,
    Evaluation,
    Evaluations,
    Ran,
    kept_numbers,
)


def row(step: int, **more: object) -> Evaluation:
    return Evaluation(step, 3, time=float(step), **more)  # type: ignore[arg-type]


def test_what_was_written_is_read() -> None:
    ran = {"bench": Ran({"acc": 0.25}, 1.5), "bad": Ran({}, 2.0, "it exited with 1")}
    whole = Evaluations()
    whole.add(row(10, loss=3.5, windows=4, tokens=64, data="ab" * 32, prompt="a", sample="a b", commands=ran))
    whole.add(row(20, loss=math.inf))
    again = Evaluations.parse(whole.to_bytes())
    assert again.rows == whole.rows
    assert again.rows[10, 3].numbers() == {"validation/loss": 3.5, "eval/bench/acc": 0.25}


def test_two_writers_lose_nothing_of_each_other() -> None:
    """The validation is one process's, the commands another's: whatever their order, the row has both."""
    loss, ran = row(10, loss=2.0, windows=1, sample="s"), Evaluation(10, 3, 11.0, commands={"a": Ran({"x": 1.0})})
    for first, second in ((loss, ran), (ran, loss)):
        one, other = Evaluations(), Evaluations()
        one.add(first)
        other.add(second)
        other.merge(one)
        (found,) = other.rows.values()
        assert (found.loss, found.sample, set(found.commands), found.time) == (2.0, "s", {"a"}, 11.0)
    later = Evaluation(10, 3, 12.0, commands={"a": Ran({}, 1.0, "failed")})
    assert ran.joined(later).commands["a"].why == later.joined(ran).commands["a"].why == "failed"


def test_bounded_and_the_best_stay() -> None:
    dice = random.Random(4)
    whole = Evaluations()
    losses = {step: dice.random() for step in range(1, 3 * MAX_ROWS)}
    numbers = {f"{'n' * (MAX_NAME - 3)}{k:03}": float(k) for k in range(MAX_NUMBERS)}
    ran = {f"{k:040}": Ran(numbers, 1.0, "y" * MAX_TEXT) for k in range(8)}  # as many as a spec may have
    for step, loss in losses.items():
        whole.add(row(step, loss=loss, sample="x" * MAX_TEXT, commands=ran))
    data = whole.to_bytes()
    assert len(data) < MAX_BYTES
    kept = Evaluations.parse(data)
    assert MAX_ROWS - 64 <= len(kept.rows) <= MAX_ROWS
    assert kept.rows[max(losses), 3].commands == ran
    assert {(step, 3) for step in sorted(losses, key=lambda s: losses[s])[:64]} <= kept.rows.keys()
    assert (max(losses), 3) in kept.rows
    assert sum(bool(r.sample) for r in kept.rows.values()) == SAMPLES_KEPT


def test_numbers_are_numbers_and_few() -> None:
    found = {"a": 1, "b": True, "c": "2", "d": math.nan, "e": 10**400, "f" * 500: 0.5} | {f"n{k}": k for k in range(99)}
    kept = kept_numbers(found)
    assert len(kept) == MAX_NUMBERS
    assert kept["a"] == 1.0
    assert not kept.keys() & {"b", "c", "d", "e"}
    assert max(map(len, kept)) == MAX_NAME


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"v": 2, "rows": []},
        {"v": 1, "rows": [{}]},
        {"v": 1, "rows": [{**Evaluation(1, 1).to_map(), "step": -1}]},
        {"v": 1, "rows": [{**Evaluation(1, 1).to_map(), "commands": [1]}]},
        {"v": 1, "rows": [{**Evaluation(1, 1).to_map(), "sample": 7}]},
        {"v": 1, "rows": [Evaluation(1, 1).to_map()] * (MAX_ROWS + 1)},
        [1],
    ],
)
def test_what_does_not_hold_is_damaged(value: object) -> None:
    with pytest.raises(Damaged):
        Evaluations.parse(codec.pack_hint(value))
