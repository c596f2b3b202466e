"""How Prefect is told the end of an attempt."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoint.log import AttemptInfo, RunState
from flows.page.ends import attempt_end


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ({"class": "infra", "text": "pod x-1 was deleted"}, ("CRASHED", "Crashed", "pod x-1 was deleted")),
        ({"class": "numeric", "text": "loss is nan"}, ("FAILED", "Failed", "loss is nan")),
        # left for an order, another layout, or to give room back: nothing has failed
        (None, ("CANCELLED", "Cancelled", "ordered by ann")),
    ],
)
def test_an_attempt_that_was_left_without_a_failure_is_not_crashed(cause: Any, told: tuple[str, str, str]) -> None:
    first = AttemptInfo(1, 1.0, "x-k1", 2, 2, "p", "w", None, 0, None, "start", {})
    second = AttemptInfo(5, 9.0, "x-k2", 2, 2, "p", "w", None, 0, None, "ordered by ann", {"cause": cause})
    assert attempt_end(RunState("x", attempts=(first, second)), 1) == (*told, 9.0)
