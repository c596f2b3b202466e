"""Steps computed again: the same bits in any layout and while the run trains, and a flipped bit found by one replay."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.log import RunLog, RunState
from checkpoint.store import Store, open_store
from flows.replay.again import Stopped
from flows.replay.compare import Verdict
from flows.replay.replay import EXIT_DIFFERS, replay_run
from flows.replay.words import replay_lines
from tests.engine.engine_build import build_flipping
from tests.support.place import SPEC, Place, finish
from tests.support.undisturbed import undisturbed_run
from tests.support.wait import wait_for
from trainer.errors import SpecError


@dataclass(frozen=True)
class Trained:
    """A run that has ended, of 60 steps with a checkpoint each fourth."""

    folder: Path
    store: Store
    run: str


@pytest.fixture
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, run, _ = undisturbed_run(tmp_path_factory)
    return Trained(folder, open_store((folder / "store").as_uri()), run)


def objects(store: Path) -> dict[str, int]:
    return {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("first", "last", "sets", "digest"),
    [
        (20, 28, ("parallel.stages=2", "parallel.replicas=2"), True),
        (0, 3, (), False),
    ],
    ids=["other-layout", "from-the-start"],
)
def test_the_same_bits_again(
    trained: Trained, tmp_path: Path, first: int, last: int, sets: tuple[str, ...], digest: bool
) -> None:
    """Every loss that was recorded, and the digest where there is a checkpoint; of the run nothing stays but records of
    a pin that is gone."""
    before = objects(trained.folder / "store")
    report = replay_run(trained.store, trained.run, first, last, out=tmp_path, sets=sets)
    assert (report.verdict, report.exit_code) == (Verdict.SAME, 0), report
    assert (report.compared, report.missing, report.digest is not None) == (last - first, 0, digest)
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
]
FLIP_SPEC = SPEC.replace("steps = 60", "steps = 8").replace("stages = 2", 'stages = 2\noptimizer = "checked"')


@pytest.mark.parametrize("flip", FLIPS, ids=lambda f: f.kernel.lower())
def test_a_flipped_bit_is_found_by_one_replay(flip: Flipped, tmp_path: Path) -> None:
    """A kernel of one rank was wrong once, by a bit: the step, what differs first, and who computed it."""
    engine = build_flipping(flip.kernel, flip.step, flip.rank)
    place = Place(tmp_path / "p", FLIP_SPEC, env={"HOTSTAGE_ENGINE": str(engine)})
    try:
        run = place.train()["run"]
    finally:
        place.stop_all()
    store = open_store((place.folder / "store").as_uri())
    report = replay_run(store, run, 4, 8, out=tmp_path)
    said = "\n".join(replay_lines(report))
    assert (report.verdict, report.exit_code) == (Verdict.RUN, EXIT_DIFFERS), said
    assert report.difference is not None
    assert report.suspects is not None
    assert (report.difference.step, report.difference.what) == (flip.step, flip.what), said
    assert report.difference.same_before == flip.step - 5 + (flip.what == "state digest")
    assert (report.suspects.nodes, report.suspects.places) == ((0,), {0: f"host {os.uname().nodename}"})
    if flip.kernel == "ADAMW":
        assert report.suspects.ranks == (flip.rank,), said


def test_a_run_that_trains_on(tmp_path: Path) -> None:
    """By the command, while the run trains, in its own store: the run ends as it would have."""
    place = Place(tmp_path / "p", SPEC.replace("steps = 60", "steps = 9000"))
    try:
        process = place.start_train("parallel.stages=1")
        run = wait_for(lambda: next(iter(saved(place, 12)), None), "a later checkpoint", 60)
        told = json.loads(place.run("replay", run, "--from", "4", "--to", "8", "--json", "--set", "parallel.stages=2"))
        assert (told["verdict"], told["compared"]) == ("same", 4)
        assert process.poll() is None, "the run had ended: nothing was shown"
        process.send_signal(signal.SIGINT)
        assert finish(process).code == 85
        place.all_gone()
    finally:
        place.stop_all()


def saved(place: Place, step: int) -> list[str]:
    """The runs that have a checkpoint of this step."""
    return [p.parts[-4] for p in place.folder.glob(f"store/runs/*/manifests/{step:012d}-*/manifest")]


def test_a_replay_that_is_killed_leaves_no_process(trained: Trained, tmp_path: Path) -> None:
    place = Place.again(trained.folder)
    out = tmp_path / "out"
    process = place.start("replay", trained.run, "--from", "0", "--to", "60", "--out", str(out))
    try:
        wait_for(lambda: list(out.glob("replay/*/1/out/runs/*/*/node0/supervisor.pid")), "the gang", 30)
        process.kill()
        process.communicate()
        wait_for(lambda: not below(out), f"its processes to leave: {below(out)}", 30)
    finally:
        for pid in below(out):
            os.kill(pid, signal.SIGKILL)
    place.run("replay", trained.run, "--from", "56", "--to", "57", "--out", str(out))
    assert not list(out.iterdir()), "what the killed one left is swept"
    RunLog(trained.store, trained.run, writer="test").transact(unpinned)


def unpinned(state: RunState) -> tuple[str, dict[str, str]] | None:
    return next((("unpin", {"name": name}) for name in state.pins), None)


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
        (7, 8, (), "no usable checkpoint at step 7 to begin from; --from takes one of 0, 4, 8"),
        (8, 8, (), "--to 8 is not after --from 8"),
        (56, 61, (), "steps up to 60 so far; take --to 60 or less"),
        (4, 8, ("train.seed=4",), "computes what the run computed"),
        (4, 8, ("launch.kernel_path=ref",), "kernels of the family cpu; those of the family ref have other bits"),
    ],
)
def test_what_cannot_be_asked(
    trained: Trained, tmp_path: Path, first: int, last: int, sets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        replay_run(trained.store, trained.run, first, last, out=tmp_path, sets=sets)


def test_a_wish_to_stop_is_heard(trained: Trained, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="nothing of the run was touched"):
        replay_run(trained.store, trained.run, 4, 60, out=tmp_path, stop=stop)
    assert not list(tmp_path.iterdir())


def test_bits_of_another_version_are_not_compared(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.replay.replay.NUMERICS_VERSION", 2)
    with pytest.raises(SpecError, match=r"numerics version 1, this program has version 2: .* other bits by right"):
        replay_run(trained.store, trained.run, 4, 8, out=tmp_path)
