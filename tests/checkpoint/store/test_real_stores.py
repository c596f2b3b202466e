"""Real S3 servers of other makers: what the doctor found of each when docs/stores.md was written, found again.

They are built by the first nightly run (minutes); `make test` takes those that are in the cache already and start fast.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.doctor import Effort
from checkpoint.errors import StoreRefused
from checkpoint.probe import probe
from checkpoint.store import open_store
from tests.support.real_stores import SERVERS, NotHere, diagnose, environment, running

BAD: dict[str, set[str]] = {
    "s3s-fs": {"races", "names", "checksums"},
    "gofakes3": set(),
    "minio": set(),
    "seaweedfs": set(),
    "moto": set(),
    "garage": {"races", "conditions"},
}
"""What is bad of each, by name of the check."""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BAD))
def test_what_docs_say_of_a_store_is_found_again(name: str, tmp_path: Path) -> None:
    try:
        found = diagnose(SERVERS[name], tmp_path / name, Effort(data_bytes=8 << 20))
    except NotHere as error:
        pytest.skip(str(error))
    assert {f.name for f in found.findings if f.verdict == "bad"} == BAD[name], found
    assert found.verdict("unknown") == "unknown"
    assert {f.name for f in found.findings if f.verdict == "unknown"} == set()


@pytest.mark.parametrize("name", ["s3s-fs", pytest.param("garage", marks=pytest.mark.slow)])
def test_a_real_store_that_breaks_the_contract_is_refused(name: str, tmp_path: Path) -> None:
    """As a run's first write does it; where the server is in the cache (the nightly tests build it)."""
    if not SERVERS[name].built:
        pytest.skip(f"{name} is built by `make nightly`")
    with (
        running(SERVERS[name], tmp_path / name) as server,
        environment(server.environment),
        pytest.raises(StoreRefused, match=r"cannot order writers: .* racing creators of one object were told"),
    ):
        probe(open_store(server.url), rounds=40)
