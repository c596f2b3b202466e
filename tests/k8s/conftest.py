"""A place whose commands find an API server of this process, and the undisturbed run that others compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.api_server import ApiServer
from tests.support.place import SPEC as PLACES
from tests.support.place import STEPS as FEW
from tests.support.place import Place
from tests.support.undisturbed import undisturbed_run

# long enough for every fault to strike before the end, on a fast machine too
STEPS = 300
SPEC = PLACES.replace(f"steps = {FEW}", f"steps = {STEPS}").replace("every = 4", "every = 10")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the places' spec on one stage of this machine, without a fault."""
    _, run, digest = undisturbed_run(tmp_path_factory, SPEC)
    return run, digest


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "p", SPEC)
    try:
        yield made
    finally:
        made.stop_all()


@pytest.fixture
def server(place: Place) -> Iterator[ApiServer]:
    """What the place's commands find as their cluster."""
    with ApiServer() as made:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": made.url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        file = place.folder / "kubeconfig"
        file.write_text(json.dumps(config))
        place.env["HOTSTAGE_KUBECONFIG"] = str(file)
        yield made
