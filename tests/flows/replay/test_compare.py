"""The first difference in order of step, and what two computations say of each other."""

from __future__ import annotations

import math

import pytest

from flows.replay.compare import Difference, Suspects, Verdict, first_difference, verdict, whom
from flows.replay.recorded import StepLine

STEPS = {step: StepLine(step, 1, 4.0 - step / 7, 1.0 + step / 3) for step in range(5, 9)}
NEXT = math.nextafter(STEPS[6].loss, 9.0)


@pytest.mark.parametrize(
    ("step", "change", "what", "before"),
    [
        (6, {"loss": NEXT}, "loss", 1),
        (8, {"norm": 0.0}, "gradient norm", 3),
        (5, {"loss": NEXT, "norm": 0.0}, "loss", 0),
    ],
)
def test_the_first_thing_that_differs(step: int, change: dict[str, float], what: str, before: int) -> None:
    """By one bit; later ones are not looked at."""
    again = {at: line._replace(norm=7.0) if at > step else line for at, line in STEPS.items()}
    again[step] = again[step]._replace(**change)
    found = first_difference(STEPS, again, 8, "aa", "bb")
    assert found is not None
    assert (found.step, found.what, found.same_before) == (step, what, before)
    assert found.values is not None
    assert found.values[0] != found.values[1]


def test_the_digest_comes_last_and_only_where_both_have_one() -> None:
    found = first_difference(STEPS, STEPS, 8, "aa", "bb")
    assert found == Difference(8, "state digest", "aa", "bb", None, 4)
    assert first_difference(STEPS, STEPS, 8, None, "bb") is first_difference(STEPS, STEPS, 8, "aa", "aa") is None


def test_steps_without_a_line_are_not_compared() -> None:
    recorded = {5: STEPS[5], 8: STEPS[8]}
    found = first_difference(recorded, STEPS | {8: STEPS[8]._replace(loss=1.0)}, 8)
    assert found is not None
    assert (found.step, found.same_before) == (8, 1)


def test_two_that_agree_outvote_the_third() -> None:
    one, two = (Difference(6, "loss", "a", text, None, 1) for text in "bc")
    assert verdict(None, None, None) is Verdict.SAME
    assert verdict(one, one, None) is Verdict.RUN
    assert verdict(one, None, one) is Verdict.HERE
    assert verdict(one, two, two) is Verdict.UNCLEAR


def test_who_it_was_in_words() -> None:
    few = Suspects(3, (5,), (2,), {2: "host a7"}, "only what it keeps differs (w)")
    assert whom(few, 2) == "it was rank 5 on node 2 (host a7), attempt 2: only what it keeps differs (w)"
    many = Suspects(3, tuple(range(40)), tuple(range(10)), {0: "host a"})
    assert whom(many, 1).startswith("computed by ranks 0 to 39 on node 0 (host a), node 1, ")
    assert whom(many, 1).endswith("node 7 and 2 more, attempt 1; which of them cannot be told")
