"""Steps of a run computed again: by a gang of its own, on this machine, in a folder of its own.

The gang is a run of another name with the same What, whose only attempt restores what the run's checkpoint holds and
leaves after the last step that is wanted. Its log, plan, checkpoint and metrics lie in a folder; data and chunks are
read from the run's store, where nothing is written (``checkpoint/store/overlay.py``). Its processes end
with this one, so that nothing stays where it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.amendments import Amendments
from checkpoint.errors import NotFound
from checkpoint.keys import algorithms_key, dataset_manifest_key
from checkpoint.log import CheckpointInfo, RunLog, RunState, ended_body
from checkpoint.manifest import Manifest
from checkpoint.read import load_manifest
from checkpoint.store import OverlayStore, Store, open_store
from flows.drive.causes import diagnose
from flows.drive.launches import alive_nodes
from flows.drive.live import StatusReader
from flows.drive.run import Prepared, attempt_body, publish_plan
from flows.drive.views import Restore
from flows.replay.recorded import StepLine, read_lines
from trainer.errors import LaunchError, LaunchRefused, SpecError, TrainerError
from trainer.failures import FAILURES
from trainer.launch import Launch
from trainer.local_launch import LocalLauncher
from trainer.spec import how_map

LOOK_S = 0.05
LEAVE_S = 20.0
FOLDER = "replay"
DATA = "data"
"""Below it: token shards of stores that are no folder here, kept for the next replay."""
_LOCK = "lock"


class Stopped(TrainerError):
    """Somebody asked to stop."""

    exit_code = 85


class GangFailed(TrainerError):
    """The gang that computes again ended by itself: of its cause, with that one's exit code."""


@dataclass(frozen=True)
class Computed:
    """``lines``: by step. ``info`` and ``manifest``: of its checkpoint after the last step, in ``store``."""

    lines: Mapping[int, StepLine]
    info: CheckpointInfo
    manifest: Manifest
    store: Store


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder below ``out`` for the time of a replay; what killed ones left there goes first."""
    root = out.absolute() / FOLDER
    try:
        for old in root.iterdir() if root.is_dir() else ():
            if old.name != DATA:
                _sweep(old)
        folder = root / secrets.token_hex(4)
        folder.mkdir(parents=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise LaunchRefused(
            f"steps cannot be computed again under {root}: {error.strerror}; choose another folder with --out"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        with contextlib.suppress(OSError):  # others work there
            root.rmdir()


def _sweep(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # it is being made, or it is none of ours
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def compute(
    store: Store,
    prepared: Prepared,
    restore: Restore,
    last: int,
    folder: Path,
    *,
    amendments: Amendments,
    stop: threading.Event,
    engine: Path | None = None,
    stepped: Callable[[int], None] = lambda _: None,
) -> Computed:
    """All steps after ``restore`` up to ``last``, by these amendments, in a folder below a `scratch` one.

    ``stepped`` hears how far it has come. ``engine``: another binary than this installation's.

    Raises Stopped, GangFailed, LaunchError, PlanError, StoreError.
    """
    run = f"replay-{secrets.token_hex(4)}"
    own = OverlayStore(run, open_store((folder / "store").as_uri()), store)
    mine = replace(prepared, run=run)
    publish_plan(own, run, mine.plan)
    chosen = _take_algorithms(own, prepared.run, run)
    log, launch_id = RunLog(own, run, writer="replay"), f"{run}-l1"
    how = how_map(mine.spec)
    how["launch"]["stop_after"] = last
    body = attempt_body(
        mine, launch_id, restore.to_map(), amendments=amendments, reason="computed again", cause=None
    ) | {"how": how}
    state = log.append("attempt", body, log.fold())
    if store.local_path(dataset_manifest_key(prepared.dataset.digest)) is None:
        _share_data(folder, run, launch_id, mine.nodes)
    launcher = LocalLauncher(folder / "out", with_parent=True, engine=engine)
    launch = Launch(
        run=run,
        launch_id=launch_id,
        nodes=mine.nodes,
        store_url=own.url,
        work_root=folder / "out",
        how=how,
    )
    try:
        state = _until_saved(log, state, last, launcher, launch, stop, stepped)
        log.append("ended", ended_body(state, "succeeded", "computed again"), state)
        _until_left(launcher, launch_id)
    finally:
        launcher.stop(launch_id, 0.0)
    _check_algorithms(own, run, chosen)
    info = state.find(last, state.epoch)
    assert info is not None
    lines = {line.step: line for line in read_lines(own, run, state.epoch, restore.step + 1, last)}
    return Computed(lines, info, load_manifest(own, run, info), own)


def _share_data(folder: Path, run: str, launch_id: str, nodes: int) -> None:
    """The nodes fetch their token shards to where an earlier replay left them: they are named by their content."""
    data = folder.parent.parent / DATA
    data.mkdir(exist_ok=True)
    for node in range(nodes):
        work = folder / "out" / "runs" / run / launch_id / f"node{node}"
        work.mkdir(parents=True)
        (work / DATA).symlink_to(data)


def _take_algorithms(own: Store, source: str, run: str) -> int:
    """What the run chose for its products on GPUs (ADR 9) is chosen for the gang too: so many tables."""
    number = 0
    with contextlib.suppress(NotFound):
        while True:
            own.create(algorithms_key(run, number), own.get(algorithms_key(source, number)))
            number += 1
    return number


def _check_algorithms(own: Store, run: str, chosen: int) -> None:
    """Where the gang had to choose more, its products may have other bits by right, and nothing is to be compared."""
    if chosen and own.head(algorithms_key(run, chosen)) is not None:
        raise SpecError(
            "the GPUs or the library of products of this machine are other ones than the run's: its products were "
            "chosen anew here, and have other bits by right. Replay on a machine of the same kind"
        )


def _until_saved(
    log: RunLog,
    state: RunState,
    last: int,
    launcher: LocalLauncher,
    launch: Launch,
    stop: threading.Event,
    stepped: Callable[[int], None],
) -> RunState:
    status, told = StatusReader(log.store, launch.run, launch.launch_id), -1
    while True:
        state = log.fold(state)
        if state.find(last, state.epoch) is not None:
            return state
        if stop.is_set():
            raise Stopped("stopped on request; nothing was compared, and nothing of the run was touched")
        launcher.ensure(launch)
        view = launcher.observe(launch.launch_id)
        nodes = status.poll(launch.nodes, alive_nodes(view))
        ranks = [rank for node in nodes for rank in node.ranks]
        if (cause := diagnose(ranks)) is not None:
            failed = GangFailed(f"the steps could not be computed again: {cause.text}")
            failed.exit_code = FAILURES[cause.cls].exit_code
            raise failed
        if view.state == "done":
            raise LaunchError(f"the gang that computes the steps again has left: {view.nodes[0].words or 'no word'}")
        reached = max((rank.step for rank in ranks), default=-1)
        if reached > told:
            told = reached
            stepped(reached)
        stop.wait(LOOK_S)


def _until_left(launcher: LocalLauncher, launch_id: str) -> None:
    """Its nodes leave on the log's word, and write their last lines as they go."""
    deadline = time.monotonic() + LEAVE_S
    while launcher.observe(launch_id).state not in ("done", "gone", "absent") and time.monotonic() < deadline:
        time.sleep(LOOK_S)
