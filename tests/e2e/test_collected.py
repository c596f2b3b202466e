"""Runs whose old checkpoints are collected while they train: the same bits, and a store that stays small.

On a real S3 server under three identities (docs/policies): the driver's, the agents', the collector's; in a folder by
the driver itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from checkpoint import keys
from checkpoint.collect.collector import Collected, collect
from checkpoint.log import RunLog
from checkpoint.store import Store, open_store
from checkpoint.verify import verify_run
from flows.drive.begin import prepare_run
from flows.drive.train import Run, make_driver
from tests.support.chaos import Fault, unleashed
from tests.support.place import LONG_STEPS, Place
from tests.support.s3_server import S3Server, s3_server
from tests.support.wait import wait_for
from trainer.spec import load_spec

KEEP = ("checkpoint.every=2", "checkpoint.keep.last=2", "checkpoint.keep.grace_s=0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as running:
        yield running


def points(store: Store, run: str) -> set[tuple[int, int] | None]:
    """The checkpoints of which anything is there."""
    prefix = keys.run_key(run) + "/"
    folders = (keys.run_key(run, folder) + "/" for folder in ("chunks", "manifests"))
    return {keys.point_of(info.key.removeprefix(prefix)) for folder in folders for info in store.list(folder)}


@pytest.mark.long_run
def test_killed_and_collected_under_three_identities(
    place: Place, server: S3Server, undisturbed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, digest = undisturbed
    url, out = server.url(place.folder.parent.name), place.folder / "out"
    stores = {}
    for role in ("driver", "collector", "reader"):
        with server.identity(role):
            stores[role] = open_store(url)
    monkeypatch.chdir(place.folder)
    prepared = prepare_run(load_spec(place.folder / "spec.toml", KEEP), stores["driver"])
    passes: list[Collected] = []
    with server.identity("agent"), unleashed(Fault("forward", 1, 21), place.folder, out) as watcher:
        run = Run(prepared, stores["driver"], make_driver(prepared, stores["driver"], out=out)).start()
        while not run.wait(0.1):
            if RunLog(stores["collector"], name).exists():
                passes.append(collect(stores["collector"], name))
        outcome = run.result()
        assert watcher.wait(60) == 0
    assert (outcome.run, outcome.outcome, outcome.state_digest) == (name, "succeeded", digest)
    assert outcome.attempts > 1
    assert sum(done.objects for done in passes) > 0  # while it trained
    collect(stores["collector"], name)
    state = RunLog(stores["reader"], name).fold()
    newest = {(c.step, c.epoch) for c in state.lineage()[:2]}
    staying = {(c.step, c.epoch) for c in state.checkpoints if c.n not in state.buried}
    assert len(state.checkpoints) > len(staying)
    assert (LONG_STEPS, state.epoch) in newest <= staying
    assert len(staying) <= 3  # and the one that the newest attempt began from

    def small() -> bool:  # the last second is over, which S3 does not tell apart
        passes.append(collect(stores["collector"], name))
        return points(stores["reader"], name) == staying

    wait_for(small, "the store to be small")
    assert [p for p in passes if p.refused or p.unknowns] == []
    assert verify_run(stores["reader"], name, "full").ok


@pytest.mark.long_run
def test_in_a_folder_the_driver_collects(place: Place, undisturbed: tuple[str, str]) -> None:
    name, digest = undisturbed
    result = place.train(*KEEP)
    assert (result["run"], result["state_digest"]) == (name, digest)
    state = RunLog(open_store((place.folder / "store").as_uri()), name).fold()
    assert state.buried  # nobody but the driver has looked yet
    store = open_store((place.folder / "store").as_uri())
    wait_for(lambda: collect(store, name) and len(points(store, name)) == 2, "the store to be small")
    rows = json.loads(place.said("ckpt", "ls", name, "--json"))
    newest = [info.step for info in state.lineage()[:2]]
    # in the order of their records: an earlier step may be committed behind a later one
    assert sorted(row["step"] for row in rows if not row["given_up"]) == newest[::-1]
    assert newest[0] == LONG_STEPS
    assert verify_run(store, name, "full").ok
