"""A run that has used its device hours saves its state and leaves; with more hours it goes on, with the same bits."""

from __future__ import annotations

import json

import pytest

from tests.support.chaos import standing_still
from tests.support.place import LONG_STEPS, Place, finish


@pytest.mark.long_run
def test_a_run_is_parked_and_goes_on(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    process = place.start_train("limits.device_hours=0.0001")
    with standing_still(place.folder, lambda: True):  # a driver looks each 2 s at least: the run would be over
        assert process.stderr is not None
        while b"the run saves its state and is parked" not in process.stderr.readline():
            assert process.poll() is None
    parked = finish(process)
    assert parked.code == 85, parked.err
    told = parked.json()
    assert (told["run"], told["outcome"]) == (run, "parked")
    assert 0 < told["step"] < LONG_STEPS
    assert f"`hotstage runs resume {run} --set limits.device_hours=…` goes on" in told["reason"]
    place.all_gone()
    rows = json.loads(place.said("runs", "ls", "--state", "parked", "--since", "1h", "--json"))
    assert [(row["run"], row["saved_step"], row["limit_hours"]) for row in rows] == [(run, told["step"], 0.0001)]
    assert rows[0]["device_hours"] > 0.0
    assert rows[0]["owner"]
    assert place.call("train", "spec.toml", "--no-prefect", "--set", "limits.device_hours=0.0001").code == 85
    resumed = place.call("runs", "resume", run, "--no-prefect", "--json", "--set", "limits.device_hours=9")
    assert resumed.code == 0, resumed.err
    assert (resumed.json()["outcome"], resumed.json()["state_digest"]) == ("succeeded", digest)
