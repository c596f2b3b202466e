"""The policies of docs/policies on a real S3 server: each identity may do its work, and nothing that is another's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.commit import commit
from checkpoint.collect.collector import Collected, collect
from checkpoint.collect.pins import pin, unpin
from checkpoint.errors import StoreRefused
from checkpoint.log import RunLog
from checkpoint.probe import ensure_probed
from checkpoint.store import Store, open_store
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_address import open_s3
from checkpoint.verify import verify_run
from flows.drive.begin import prepare_run
from flows.show.collected import collected_lines
from tests.reference.golden import FOLDER
from tests.support.s3_server import BUCKET, POLICIES, ROLES, S3Server
from tests.support.small_checkpoints import RUN, begin, names, upload
from tests.support.wait import wait_for
from trainer.models import family
from trainer.models.hf_config import read_config
from trainer.spec import parse_spec

_numbers = itertools.count()
SAMPLES = {
    "data": "data/{0:064d}/00000.bin",
    "work": "data/work/{0:064d}/read/000000",
    "index": "index/r-{0}",
    "probe": "probe/{0:016x}/0000",
    "spec": "runs/r{0}/spec",
    "plan": "runs/r{0}/plans/{0:064d}",
    "algorithms": "runs/r{0}/algorithms/000001",
    "log": "runs/r{0}/log/{0:020d}",
    "folds": "runs/r{0}/folds/{0:020d}-aa",
    "manifests": "runs/r{0}/manifests/000000000001-00000001/manifest",
    "chunks": "runs/r{0}/chunks/000000000001-00000001/000000-i1-000000",
    "weights": "runs/r-import-{0}/chunks/000000000000-00000001/000000-import-000000",
    "their manifest": "runs/r-import-{0}/manifests/000000000000-00000001/parts/00000",
    "live": "runs/r{0}/live/1/node/0",
    "output": "runs/r{0}/live/1/logs/0/00",
    "trace": "runs/r{0}/live/1/trace/0",
}
IMPORTED = ("weights", "their manifest")
MAY = {
    # role: what it may create, what it may delete, what it may not read
    "agent": (
        {"algorithms", "log", "folds", "manifests", "chunks", "live", "output", "trace", *IMPORTED},
        set(),
        {"index", "probe"},
    ),
    "driver": (
        {"data", "work", "index", "probe", "spec", "plan", "log", "folds", "live", "output", "trace", *IMPORTED},
        {"work"},
        set(),
    ),
    "collector": (
        {"log", "folds", "live", "output", "trace"},
        {"manifests", "chunks", "output", "trace", "probe", *IMPORTED},
        {"data", "work", "probe", "spec", "plan", "algorithms", "chunks", "weights"},
    ),
    "reader": (set(), set(), set()),
}


@pytest.fixture(scope="module")
def stores(server: S3Server) -> dict[str, Store]:
    """The same store, as each identity sees it."""
    prefix, found = f"roles-{next(_numbers)}", {}
    for role in ("root", *ROLES):
        with server.identity(role):
            found[role] = open_store(server.url(prefix))
    return found


@pytest.mark.parametrize("role", ROLES)
def test_each_identity_may_do_its_part_and_no_other(stores: dict[str, Store], role: str) -> None:
    creates, deletes, unread = MAY[role]
    for number, (kind, name) in enumerate(SAMPLES.items(), 1):
        there, new = name.format(number + 100), name.format(number + 200 + 20 * ROLES.index(role))
        stores["root"].create(there, b"there")
        assert _may(stores[role].create, new, b"new") == (kind in creates), kind
        assert _may(stores[role].delete, there) == (kind in deletes), kind
        assert stores["root"].head(there) is None or kind not in deletes
        if kind not in deletes:
            assert _may(stores[role].get, there) == (kind not in unread), kind
    assert list(stores[role].list("index/"))


def _may(work: Callable[..., Any], *given: Any) -> bool:
    try:
        work(*given)
    except StoreRefused as error:
        return "AccessDenied" not in str(error)
    return True


def test_a_checkpoints_life_under_three_identities(stores: dict[str, Store]) -> None:
    """The driver begins, the agents save, the collector gives up and deletes; a person with a driver's rights pins."""
    driver, agent, collector = (RunLog(stores[role], RUN, writer=role) for role in ("driver", "agent", "collector"))
    ensure_probed(stores["driver"])
    how = {"parallel": {}, "checkpoint": {"keep": {"last": 2, "grace_s": 0.0}}}
    state = begin(driver, driver.fold(), how)
    for step in (10, 20, 30, 40):
        for node in range(2):
            upload(stores["agent"], RUN, step, state.epoch, node, 2)
        made = commit(agent, 2, step, state.epoch, agent.fold(state))
        assert made is not None
        state = made
    info = state.at_step(10)
    assert info is not None
    pin(driver, info, "mine")
    with pytest.raises(StoreRefused, match="AccessDenied"):
        stores["agent"].delete(keys.run_key(RUN, info.manifest))
    collect(stores["collector"], RUN)
    unpin(driver, "mine")

    def gone() -> bool:
        collect(stores["collector"], RUN)
        found = {keys.point_of(name) for name in names(stores["reader"], RUN, "chunks/", "manifests/")}
        return found == {(30, 1), (40, 1)}

    wait_for(gone, "step 10 and 20 to be gone")
    assert set(collector.fold().buried) == {2, 3}


def test_what_a_bucket_with_versions_keeps_is_told(server: S3Server) -> None:
    with server.identity("root"):
        plain, store = open_s3(server.url("told")), open_s3(server.url("told").replace(f"/{BUCKET}/", "/versions/"))
    store.client.create_bucket(Bucket="versions")
    store.client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    for at, keeps in ((plain, False), (store, True)):
        log = RunLog(at, RUN)
        upload(at, RUN, 10, begin(log, log.fold()).epoch, 0, 2)
        begin(log, log.fold())  # what that attempt left half written goes
        found: list[Collected] = []

        def done(at: S3Store = at, found: list[Collected] = found) -> bool:
            found.append(collect(at, RUN, grace_s=0.0))
            return bool(found[-1].deleted)

        wait_for(done, "the half of step 10 to go")
        assert found[-1].versions == keeps
        assert any("keeps old versions" in line for line in collected_lines(found[-1])) == keeps
        assert not names(at, RUN, "chunks/", "manifests/")


def test_a_driver_stores_weights_that_a_run_begins_from(stores: dict[str, Store]) -> None:
    folder = FOLDER / "import" / "qwen3-odd-f16"
    model = family("qwen3").from_hf_config(read_config(folder)).model_dump(mode="json") | {"init": f"hf:{folder}"}
    train = {"steps": 1, "batch": 1, "microbatch": 1, "sequence": 16}
    spec = {"name": "taken", "model": model, "train": train, "data": {"source": f"text:{FOLDER}/README.md"}}
    run = prepare_run(parse_spec(spec), stores["driver"])
    began = RunLog(stores["reader"], run.run).fold().parent
    assert began is not None
    assert verify_run(stores["reader"], str(began["run"]), "full").ok


def test_a_driver_that_collects_without_the_right_says_which_it_lacks(stores: dict[str, Store]) -> None:
    with pytest.raises(StoreRefused, match=r"docs/policies"):
        stores["driver"].delete("probe/x")


def test_the_files_are_policies_as_iam_takes_them() -> None:
    for role in ROLES:
        policy = json.loads((POLICIES / f"{role}.json").read_text())
        assert policy["Version"] == "2012-10-17"
        for statement in policy["Statement"]:
            assert set(statement) == {"Sid", "Effect", "Action", "Resource"}
            assert statement["Effect"] == "Allow"
            assert all(name.startswith("arn:aws:s3:::EXAMPLE-bucket") for name in statement["Resource"])
    assert {p.stem for p in POLICIES.glob("*.json")} == set(ROLES)
