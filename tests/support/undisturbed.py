"""The undisturbed run that others compare with: the places' spec on one stage, trained once a session."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest

from tests.support.place import SPEC, Place
from tests.support.shared import once


def undisturbed_run(factory: pytest.TempPathFactory, spec: str = SPEC) -> tuple[Path, str, str]:
    """(the place's folder, run, state digest)."""

    def make(work: Path) -> tuple[str, str, str]:
        place = Place(work / "p", spec)
        try:
            result = place.train("parallel.stages=1")
        finally:
            place.stop_all()
        steps = tomllib.loads(spec)["train"]["steps"]
        assert (result["outcome"], result["attempts"], result["step"]) == ("succeeded", 1, steps)
        return str(place.folder), result["run"], result["state_digest"]

    folder, run, digest = once(factory, f"undisturbed-{hashlib.sha256(spec.encode()).hexdigest()[:8]}", make)
    return Path(folder), run, digest
