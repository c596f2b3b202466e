"""What a newer version wrote is refused where a person meets it: both versions named, exit 78, and nothing is written.

The version before this one is what the golden bytes, and the runs of every other test, are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint import codec, dataset, keys, manifest, pages
from checkpoint.log import Record, RunLog, condensed_key
from checkpoint.probe import ensure_probed
from checkpoint.store import open_store
from flows.drive.reconcile import Reconciler
from tests.flows.conftest import Trained
from tests.support.agents import Run, agent, wait_for
from tests.support.calls import called
from trainer import wire
from trainer.engine_path import engine_binary

CAP = 64 << 20


class Planted:
    """A copy of a run that has ended, with objects of a later version in it; every digest on the way holds."""

    def __init__(self, folder: Path, run: str) -> None:
        self.root, self.run = folder, run
        (folder / "runs" / run / "live" / "fold").unlink(missing_ok=True)
        self.log = RunLog(open_store(f"file://{folder}"), run)
        state = self.log.fold()
        self.saved = state.restore_candidates()[0]
        self.attempt = state.attempts[-1]

    def objects(self) -> dict[str, bytes]:
        """All but what a look at a corpus has seen, which no version shares."""
        found = {str(p.relative_to(self.root)): p for p in sorted(self.root.rglob("*")) if p.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if not name.startswith("data/seen/")}

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def manifest(self) -> None:
        self._manifest(lambda value: value | {"v": manifest.VERSION + 1})

    def part(self) -> None:
        def named(value: dict[str, Any]) -> dict[str, Any]:
            name = value["sources"][0][0]
            part = codec.unseal(self.get(keys.run_key(self.run, name)), name, max_bytes=CAP)
            data = codec.seal(part | {"v": manifest.VERSION + 1})
            self.put(keys.run_key(self.run, name), data)
            return value | {"sources": [[name, len(data), hashlib.sha256(data).digest()], *value["sources"][1:]]}

        self._manifest(named)

    def pages(self) -> None:
        rows = [[self.saved.manifest, 1, bytes(32)]]
        self._manifest(lambda _: {"v": pages.VERSION + 1, "bytes": 1, "sha256": bytes(32), "pages": rows})

    def plan(self) -> None:
        key = keys.plan_key(self.run, self.attempt.plan)
        data = bytearray(self.get(key))
        data[wire.PlanHeader.version.offset] = wire.PLAN_VERSION + 1
        self.put(key, bytes(data))

    def record(self) -> None:
        n = self.log.fold().n + 1
        body = {"v": 2, "n": n, "kind": "note", "body": {}}  # what else it holds is its own affair
        self.put(keys.log_key(self.run, n), codec.seal(body))

    def dataset(self) -> None:
        what = codec.unpack(self.get(keys.spec_key(self.run)), "", max_bytes=CAP)
        digest = what["data"]["digest"]
        named = [key for key in (self.root / "data" / "inputs").iterdir() if key.read_text() == digest]
        value = codec.unpack(self.get(keys.dataset_manifest_key(digest)), "", max_bytes=CAP)
        data = codec.pack(value | {"v": dataset.MASK_VERSION + 1})
        newer = hashlib.sha256(data).hexdigest()
        shutil.copytree(self.root / "data" / digest, self.root / "data" / newer)
        self.put(keys.dataset_manifest_key(newer), data)
        for key in named:
            self.put(f"data/inputs/{key.name}", newer.encode())
        shutil.rmtree(self.root / "data" / "seen", ignore_errors=True)  # names the one of before

    def _manifest(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        key = keys.run_key(self.run, self.saved.manifest)
        data = codec.seal(change(codec.unseal(self.get(key), key, max_bytes=CAP)))
        self.put(key, data)
        record = keys.log_key(self.run, self.saved.n)
        before = Record.parse(self.get(record), self.saved.n)
        named = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        fields = {name: getattr(before, name) for name in ("n", "kind", "epoch", "writer", "time")}
        self.put(record, Record(**fields, body={**before.body, **named}).to_bytes())


@pytest.fixture
def planted(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith(("PREFECT", "AWS", "HOTSTAGE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOTSTAGE_STORE", str(tmp_path / "store"))
    shutil.copytree(trained.place.folder / "store", tmp_path / "store")
    shutil.copy(trained.place.folder / "spec.toml", tmp_path)
    shutil.copytree(trained.place.folder / "corpus", tmp_path / "corpus")
    ensure_probed(open_store((tmp_path / "store").as_uri()))
    return Planted(tmp_path / "store", trained.run)


TRAIN = ("train", "spec.toml", "--no-prefect", "--set", "parallel.stages=1")
GOES_ON = (
    TRAIN,
    ("runs", "resume", "RUN", "--no-prefect"),
    ("runs", "fork", "RUN", "--no-prefect"),
    ("ckpt", "export", "RUN", "-o", "model"),
    ("report", "RUN", "-o", "report.html"),
)
VERIFY = ("ckpt", "verify", "RUN")


@pytest.mark.parametrize(
    ("what", "newer", "reads", "commands"),
    [
        ("manifest", 3, "versions 1 to 2", (VERIFY, *GOES_ON)),
        ("part", 3, "versions 1 to 2", (VERIFY,)),
        ("pages", 3, "versions 1 to 2", (VERIFY, *GOES_ON)),
        ("plan", wire.PLAN_VERSION + 1, f"version {wire.PLAN_VERSION}", (VERIFY, TRAIN)),
        ("dataset", 4, "versions 1 to 3", (TRAIN, ("data", "prepare", "spec.toml"))),
    ],
)
def test_a_newer_version_is_refused(
    planted: Planted, what: str, newer: int, reads: str, commands: tuple[tuple[str, ...], ...]
) -> None:
    getattr(planted, what)()
    before = planted.objects()
    for command in commands:
        code, said = called([planted.run if word == "RUN" else word for word in command])
        assert code == 78, (command, said)
        assert f"version {newer}, this hotstage reads {reads}: use the hotstage that " in said, (command, said)
        assert planted.objects() == before, command
    code, said = called(["runs", "show", planted.run])
    assert (code, planted.objects()) == (0, before), said  # the log is of this version, and can be read


NEWER_RECORD = "version 2, this hotstage reads version 1: use the hotstage that wrote it, or a newer one"


@pytest.mark.parametrize("ended", [True, False])
def test_a_log_that_a_newer_version_went_on_with_is_left_to_it(planted: Planted, ended: bool) -> None:
    if not ended:  # a run that is open, and this version's driver would go on with it
        planted.log.append("attempt", dict(planted.attempt.body), planted.log.fold())
        (planted.root / condensed_key(planted.run)).unlink(missing_ok=True)
    planted.record()
    before = planted.objects()
    show, cancel = ("runs", "show", "RUN"), ("runs", "cancel", "RUN")
    relaid = tuple((*command, "--set", "parallel.threads=2") for command in GOES_ON[:3])  # another plan
    for command in (show, VERIFY, *GOES_ON, *relaid, *([] if ended else [cancel])):
        code, said = called([planted.run if word == "RUN" else word for word in command])
        assert code == 78, (command, said)
        assert NEWER_RECORD in said, (command, said)
        assert planted.objects() == before, command
    told: list[str] = []
    assert Reconciler(planted.log.store, say=told.append).look() == []
    assert len(told) == 1
    assert NEWER_RECORD in told[0]
    assert planted.objects() == before
    code, said = called(["runs", "ls"])
    assert (code, planted.objects()) == (0, before), said  # of all runs, also those that others go on with


def test_an_agent_starts_nothing_behind_a_newer_record(planted: Planted, tmp_path: Path) -> None:
    planted.log.append("attempt", dict(planted.attempt.body), planted.log.fold())
    planted.record()
    before = planted.objects()
    run = Run(planted.log.store, planted.run, launch=planted.attempt.launch)
    with agent(run, tmp_path / "nodes", more=("--log-poll", "0.01")):
        assert NEWER_RECORD in wait_for(lambda: (run.status() or {}).get("error"), "the agent's status")
    left = {key: data for key, data in planted.objects().items() if "/live/" not in key}
    assert left == {key: data for key, data in before.items() if "/live/" not in key}


def test_the_engine_refuses_a_newer_plan(planted: Planted) -> None:
    planted.plan()
    path = planted.root / keys.plan_key(planted.run, planted.attempt.plan)
    done = subprocess.run([engine_binary(), "check-plan", path], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert (
        f"version {wire.PLAN_VERSION + 1}, this engine reads {wire.PLAN_PLAIN} and {wire.PLAN_VERSION}"
        in done.stderr + done.stdout
    )
