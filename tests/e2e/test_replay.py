"""Steps computed again: the same bits in any layout and while the run trains, and a flipped bit found by one replay."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.keys import algorithms_key
from checkpoint.log import RunLog
from checkpoint.store import OverlayStore, Store, open_store
from flows.drive.replays import EXIT_DIFFERS, Kept, Replays
from flows.drive.run import load_spec_of
from flows.replay import again
from flows.replay.again import DATA, FOLDER, Stopped
from flows.replay.compare import Verdict
from flows.replay.replay import replay_run
from flows.replay.words import replay_lines
from tests.engine.engine_build import build_flipping
from tests.support.chaos import caught, hurried
from tests.support.place import LONG, SPEC, Place, finish
from tests.support.s3_server import S3Server, s3_server
from tests.support.shared import once
from tests.support.undisturbed import undisturbed_run
from tests.support.wait import wait_for
from trainer.cores import usable_cpus
from trainer.engine_path import engine_binary
from trainer.errors import SpecError


@dataclass(frozen=True)
class Trained:
    """A run that has ended, of 60 steps that were snapshots each fourth time. ``saved``: those of them that the store
    has (an upload that takes longer than they do leaves some out), from 0 on.
    """

    folder: Path
    store: Store
    run: str
    saved: tuple[int, ...]


@pytest.fixture
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A copy of its own for each test: of what is never changed the files are the same."""
    made, run, _ = undisturbed_run(tmp_path_factory)
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(made / "store", folder / "store", copy_function=os.link)
    store = open_store((folder / "store").as_uri())
    return Trained(folder, store, run, (0, *sorted({c.step for c in RunLog(store, run).fold().checkpoints})))


def objects(store: Path) -> dict[str, int]:
    return {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "sets", [("parallel.stages=2", "parallel.replicas=2"), ()], ids=["other-layout", "from-the-start"]
)
def test_the_same_bits_again(trained: Trained, tmp_path: Path, sets: tuple[str, ...]) -> None:
    """Every loss that was recorded, and the digest where there is a checkpoint; of the run nothing stays but records of
    a pin that is gone."""
    before = objects(trained.folder / "store")
    first, last = trained.saved[1:3] if sets else (0, 3)
    report = replay_run(trained.store, trained.run, first, last, out=tmp_path, sets=sets)
    assert (report.verdict, report.exit_code) == (Verdict.SAME, 0), report
    assert (report.compared, report.missing, report.digest is not None) == (last - first, 0, last in trained.saved)
    new = {name for name in objects(trained.folder / "store") if name not in before}
    assert all("/log/" in name or name.endswith("/live/fold") for name in new), new
    assert not RunLog(trained.store, trained.run).fold().pins
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Flipped:
    kernel: str
    rank: int
    step: int
    what: str


FLIPS = [
    Flipped("GELU_FWD", 0, 6, "loss"),
    Flipped("ADAMW", 1, 8, "state digest"),
    pytest.param(Flipped("LINEAR_WGRAD", 0, 6, "gradient norm"), marks=pytest.mark.slow),
    pytest.param(Flipped("LINEAR_IGRAD", 1, 6, "gradient norm"), marks=pytest.mark.slow),
    pytest.param(Flipped("CLASSIFIER_GRAD", 1, 6, "loss"), marks=pytest.mark.slow),
]
FLIP_SPEC = (
    SPEC.replace("steps = 60", "steps = 8")
    .replace("stages = 2", 'stages = 2\noptimizer = "checked"')
    .replace("[recovery]", "[launch]\nnodes = 2\n[recovery]")
)
"""A rank a node."""


def flipped(factory: pytest.TempPathFactory, flip: Flipped) -> tuple[Store, str]:
    """A run of 8 steps in which that happened, made once."""

    def make(work: Path) -> tuple[str, str]:
        engine = build_flipping(flip.kernel, flip.step, flip.rank)
        place = Place(work / "p", FLIP_SPEC, env={"HOTSTAGE_ENGINE": str(engine)})
        try:
            return (place.folder / "store").as_uri(), place.train()["run"]
        finally:
            place.stop_all()

    url, run = once(factory, f"flipped-{flip.kernel.lower()}", make)
    return open_store(url), run


@pytest.mark.parametrize("flip", FLIPS, ids=lambda f: f.kernel.lower())
def test_a_flipped_bit_is_found_by_one_replay(
    flip: Flipped, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A kernel of one rank was wrong once, by a bit: the step, what differs first, and who computed it."""
    store, run = flipped(tmp_path_factory, flip)
    report = replay_run(store, run, 0, 8, out=tmp_path)
    said = "\n".join(replay_lines(report))
    assert (report.verdict, report.exit_code) == (Verdict.RUN, EXIT_DIFFERS), said
    assert report.difference is not None
    assert report.suspects is not None
    assert (report.difference.step, report.difference.what) == (flip.step, flip.what), said
    assert report.difference.same_before == flip.step - 1 + (flip.what == "state digest")
    assert (report.suspects.ranks, report.suspects.nodes) == ((flip.rank,), (flip.rank,)), said
    assert report.suspects.places == {flip.rank: f"host {os.uname().nodename}"}


def test_where_this_machine_was_wrong_the_run_is_not_blamed(trained: Trained, tmp_path: Path) -> None:
    """The first computation here has the flip, the second has not: it gives what the run recorded."""
    once_wrong = tmp_path / "engine"
    wrong = build_flipping("GELU_FWD", 6, 0)
    once_wrong.write_text(
        f'#!/bin/sh\nmkdir {tmp_path}/used 2> /dev/null && exec {wrong} "$@"\nexec {engine_binary()} "$@"\n'
    )
    once_wrong.chmod(0o755)
    report = replay_run(trained.store, trained.run, 0, 8, out=tmp_path / "out", engine=once_wrong)
    assert (report.verdict, report.exit_code, report.suspects) == (Verdict.HERE, EXIT_DIFFERS, None)
    assert report.difference is not None
    assert (report.difference.step, report.difference.what) == (6, "loss")
    assert "this machine computed wrongly the first time" in "\n".join(replay_lines(report))


def test_a_driver_tells_and_keeps_what_differs(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """As above, by ``recovery.replay_every``: told once, and kept for whoever looks at the run later."""
    store, run = flipped(tmp_path_factory, FLIPS[0])
    state = replace(RunLog(store, run).fold(), ended=None)
    spec, _ = load_spec_of(store, run, {}, ["recovery.replay_every=4"])
    told: list[tuple[str, Any]] = []
    replays = Replays(store, run, tmp_path, elsewhere=True, tell=lambda *fact: told.append(fact), cpus=1)
    wait_for(
        lambda: hurried(tmp_path, lambda: replays.look(spec, state, 8) or told), "what came of it", 180, every_s=0.2
    )
    ((found, facts),) = told
    assert (found, facts["difference"]["step"], facts["suspects"]["nodes"]) == ("differs", 6, [0]), facts
    replays.look(spec, state, 11)
    assert len(told) == 1, "fewer than replay_every steps are new"
    kept = Kept.load(store, run)
    assert (kept.upto, kept.steps, len(kept.differ)) == (8, facts["steps"], 1)
    assert "DIFFERS at step 6" in kept.differ[0]["said"]
    other = Replays(store, run, tmp_path, elsewhere=True, tell=lambda *fact: told.append(fact), cpus=1)
    other.look(spec, state, 11)
    other.close()
    assert len(told) == 1, "another driver goes on where this one was"


@pytest.mark.skipif(usable_cpus() < 2, reason="without a core to spare nothing is computed again")
def test_steps_are_computed_again_beside_a_run_that_trains(tmp_path: Path) -> None:
    """``recovery.replay_every``, by the driver. The run's rank stands still meanwhile, to leave this machine free, and
    is not taken for stalled: the next attempt would end the run, and with it the replay."""
    place, log = Place(tmp_path / "p", LONG), tmp_path / "told"
    place.hide_queue()
    keys = ("parallel.stages=1", "recovery.replay_every=6", "launch.stall_s=600")
    sets = [word for key in keys for word in ("--set", key)]
    try:
        with log.open("wb") as err:
            process = place.start("train", "spec.toml", "--no-prefect", "--json", *sets, err=err)
        with caught(place.folder / "out", lambda: saved(place, 12), "a checkpoint"):
            (told,) = wait_for(
                lambda: hurried(place.folder, lambda: events(log, "replay")[:1]),
                "steps that were computed again",
                180,
                every_s=0.2,
            )
        assert (told["found"], told["verdict"]) == ("same", "same"), told
        assert (told["first"] % 4, told["last"] - told["first"], told["steps"]) == (0, told["steps"], told["steps"])
        process.send_signal(signal.SIGINT)
        assert finish(process).code == 85
        place.all_gone()
        (run,) = saved(place, 12)
        shown = json.loads(place.said("runs", "show", run, "--json"))["replays"]
        assert (shown["steps"] >= told["steps"], shown["differ"]) == (True, [])
    finally:
        place.stop_all()


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    """What a command with --json told of this kind."""
    lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["event"] == kind]


def saved(place: Place, step: int) -> list[str]:
    """The runs that have a checkpoint of this step or a later one."""
    found = place.folder.glob("store/runs/*/manifests/*/manifest")
    return sorted({p.parts[-4] for p in found if int(p.parts[-2].partition("-")[0]) >= step})


def test_a_replay_that_is_killed_leaves_no_process(trained: Trained, tmp_path: Path) -> None:
    place = Place.again(trained.folder)
    out = tmp_path / "out"
    process = place.start("replay", trained.run, "--from", "0", "--to", "60", "--out", str(out))
    try:
        wait_for(lambda: list(out.glob("replay/*/1/out/runs/*/*/node0/supervisor.pid")), "the gang")
        process.kill()
        process.communicate()
        wait_for(lambda: not below(out), f"its processes to leave: {below(out)}")
    finally:
        for pid in below(out):
            os.kill(pid, signal.SIGKILL)
    first = trained.saved[-2]
    place.run("replay", trained.run, "--from", str(first), "--to", str(first + 1), "--out", str(out))
    assert not list(out.iterdir()), "what the killed one left is swept"


def below(folder: Path) -> list[int]:
    """Processes that work there."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(f"{folder}/"):
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("first", "last", "sets", "words"),
    [
        (7, 8, (), "no usable checkpoint at step 7 to begin from; --from takes one of 0, "),
        (8, 8, (), "--to 8 is not after --from 8"),
        (0, 61, (), "steps up to 60 so far; take --to 60 or less"),
        (0, 8, ("train.seed=4",), "computes what the run computed"),
        (0, 8, ("launch.kernel_path=ref",), "kernels of the family cpu; those of the family ref have other bits"),
    ],
)
def test_what_cannot_be_asked(
    trained: Trained, tmp_path: Path, first: int, last: int, sets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        replay_run(trained.store, trained.run, first, last, out=tmp_path, sets=sets)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as running:
        yield running


def test_who_may_only_read_a_bucket_computes_again_too(
    trained: Trained, server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unpinned, which is said; nothing is written there, and the tokens are fetched once for all replays."""
    first, second, *later = trained.saved[1:]
    with server.identity("root"):
        there = open_store(server.url("replayed"))
        for path in (p for p in (trained.folder / "store").rglob("*") if p.is_file()):
            key = str(path.relative_to(trained.folder / "store"))
            point = re.search(r"/(?:chunks|manifests)/(\d+)-", key)
            if (point is None or int(point[1]) not in later) and not re.search("/live/fold|probe", key):
                (there.put if "/live/" in key else there.create)(key, path.read_bytes())
        before = {info.key for prefix in ("runs/", "data/") for info in there.list(prefix)}
    with server.identity("reader"):
        for last in (second, first + 2):
            report = replay_run(open_store(server.url("replayed")), trained.run, first, last, out=tmp_path)
            assert (report.verdict, report.compared) == (Verdict.SAME, last - first)
    assert "is read without a pin" in caplog.text
    assert {info.key for prefix in ("runs/", "data/") for info in there.list(prefix)} == before
    shards = list((tmp_path / FOLDER / DATA).rglob("*.bin"))
    assert len(shards) == 1, "kept for the next one"
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == [DATA]


def test_a_wish_to_stop_is_heard(trained: Trained, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="nothing of the run was touched"):
        replay_run(trained.store, trained.run, 0, 60, out=tmp_path, stop=stop)
    assert not list(tmp_path.iterdir())


def test_bits_of_another_version_are_not_compared(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.wire.NUMERICS_F32", 2)
    with pytest.raises(SpecError, match=r"numerics version 1, this program has version 2: .* other bits by right"):
        replay_run(trained.store, trained.run, 0, 8, out=tmp_path)


def test_where_it_does_not_fit_nothing_is_begun(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, free in (("free", 1 << 20), ("swap", 0)):
        monkeypatch.setattr(f"flows.drive.room.{kind}_bytes", lambda n=free: n)
    words = r"the plan needs \d+\.\d MiB of memory, and 1\.0 MiB are free on this machine: take another machine"
    with pytest.raises(SpecError, match=words):
        replay_run(trained.store, trained.run, 0, 8, out=tmp_path)


def test_products_that_were_chosen_anew_are_not_compared() -> None:
    """The tables of algorithms that the run has are the gang's; one more says that this machine is of another kind."""
    store = open_store("memory:")
    for number in range(2):
        store.create(algorithms_key("run-0a1b2c", number), bytes([number]))
    own = OverlayStore("replay-1", open_store("memory:"), store)
    assert again._take_algorithms(own, "run-0a1b2c", "replay-1") == 2
    again._check_algorithms(own, "replay-1", 2)
    own.create(algorithms_key("replay-1", 2), b"more")
    with pytest.raises(SpecError, match="on a machine of the same kind"):
        again._check_algorithms(own, "replay-1", 2)
    again._check_algorithms(own, "replay-1", 0)
