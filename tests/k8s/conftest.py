"""Fixtures that are shared with the end-to-end tests."""

from __future__ import annotations

import pytest

from tests.support.place import SPEC as PLACES
from tests.support.place import STEPS as FEW
from tests.support.place import Place

# long enough for every fault to strike before the end, on a fast machine too
STEPS = 300
SPEC = PLACES.replace(f"steps = {FEW}", f"steps = {STEPS}").replace("every = 4", "every = 10")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the places' spec on one stage of this machine, without a fault."""
    place = Place(tmp_path_factory.mktemp("undisturbed") / "p", SPEC)
    try:
        result = place.train("parallel.stages=1")
    finally:
        place.stop_all()
    assert (result["outcome"], result["attempts"], result["step"]) == ("succeeded", 1, STEPS)
    return result["run"], result["state_digest"]
