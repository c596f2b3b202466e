"""Runs that earlier versions left behind are read, verified, exported and gone on with, and end with their own bits.

``tests/golden/runs/<version>.tar.xz`` (``tests/golden/make_run.py`` makes one): a store, and what is expected of it.
An upgrade never strands a run: no file there is ever made anew.
"""

from __future__ import annotations

import json
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.log import FOLD_EVERY, RunLog, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.store import Store, open_store
from checkpoint.verify import verify_run
from tests.support.calls import called
from tests.support.place import Place

RUNS = sorted((Path(__file__).resolve().parents[1] / "golden" / "runs").glob("*.tar.xz"))


@dataclass(frozen=True)
class Golden:
    place: Place
    store: Store
    run: str
    records: int
    digests: dict[int, str]

    @property
    def log(self) -> RunLog:
        return RunLog(self.store, self.run)


@pytest.fixture(params=RUNS, ids=lambda path: path.name.removesuffix(".tar.xz"))
def golden(request: pytest.FixtureRequest, place: Place, monkeypatch: pytest.MonkeyPatch) -> Golden:
    with tarfile.open(request.param) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python has none
        tar.extractall(place.folder)
    expected = json.loads((place.folder / "expected.json").read_text())
    store = open_store((place.folder / "store").as_uri())
    monkeypatch.setenv("HOTSTAGE_STORE", store.url)
    digests = {int(step): digest for step, digest in expected["digests"].items()}
    return Golden(place, store, expected["run"], expected["records"], digests)


def test_there_is_one_of_every_version() -> None:
    """A release adds its own: ``make_run.py`` says how."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert f"{project['version']}.tar.xz" in {path.name for path in RUNS}


def test_a_run_of_another_version_is_read_verified_and_gone_on_with(golden: Golden) -> None:
    store, run = golden.store, golden.run
    state = golden.log.fold()
    assert (state.n, state.unreadable, state.ended) == (golden.records, None, None)
    whole = RunState(run)
    for record in golden.log.records():
        whole = whole.apply(record)
    assert whole == state, "what its folded state says is what its records say"
    assert state.n > FOLD_EVERY
    (info,) = state.restore_candidates()
    assert golden.digests[info.step] == info.state_digest
    manifest = load_manifest(store, run, info)
    assert manifest.state_digest.hex() == info.state_digest
    for tensor in manifest.tensors:
        assert len(StateReader(store, manifest).read(tensor.name)) == 4 * tensor.elements
    assert verify_run(store, run, "full").problems == ()
    for command in (["runs", "show", run], ["ckpt", "ls", run], ["ckpt", "show", run]):
        code, said = called(command)
        assert code == 0, said
        assert command[0] == "runs" or info.state_digest in said
    code, said = called(["ckpt", "export", run, "-o", str(golden.place.folder / "model")])
    assert code == 0, said
    resumed = golden.place.call("runs", "resume", run, "--no-prefect")
    assert resumed.code == 0, resumed.told
    after = golden.log.fold()
    assert after.ended is not None
    assert (after.ended.outcome, after.ended.step) == ("succeeded", 12)
    assert after.ended.state_digest == golden.digests[12], "other bits than the version that began it"
    assert [a.step for a in after.attempts] == [0, info.step]
    assert verify_run(store, run, "quick").problems == ()
