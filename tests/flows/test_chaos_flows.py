"""Real processes of flows, killed at seeded moments (tests/support/chaos_flows.py, ``make chaos-flows``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import chaos_flows
from tests.support.place import LASTING
from tests.support.undisturbed import undisturbed_run


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(1000, 2, marks=pytest.mark.slow)]
)  # fmt: skip
def test_kills_of_driver_schedule_and_server(
    kills: int, seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No gang twice, none killed, nothing left, equal digests, no flow run left Running for ever."""
    _, _, digest = undisturbed_run(tmp_path_factory, LASTING)
    campaign = chaos_flows.run(kills, seed, tmp_path / "scene", digest)
    said = chaos_flows.report(campaign)
    print(said)
    line = f"{kills} kills, 0 duplicates, 0 orphans, 0 healthy gangs killed, 0 digests differ"
    assert said.splitlines()[-1] == line, said
    assert len({what.split()[0] for what in campaign.kills}) == 3, said
