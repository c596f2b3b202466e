"""Who holds a launch: reached, out of reach, over; by a real store, real folders and real agents."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

import flows.drive.claims
from checkpoint import keys
from checkpoint.claims import Place
from checkpoint.errors import Damaged, StoreUnavailable
from checkpoint.keys import launch_key, node_key
from checkpoint.log import RunLog
from checkpoint.store import MemoryStore, open_store
from flows.drive.begin import prepare_run
from flows.drive.claims import SILENT_S, SILENT_SOON_S, UNWATCHED_S, StoreClaims
from flows.drive.run import attempt_body
from flows.drive.train import Run as Driven
from flows.drive.train import make_driver
from tests.support.agents import NodePeer, agent, make_run, tiny_spec, wait_for
from trainer.errors import LaunchRefused
from trainer.launch import Launch
from trainer.local_launch import LocalLauncher, ProcessMark
from trainer.spec import parse_spec

RUN, LAUNCH = "tiny-0a0a0a", "tiny-0a0a0a-l1"


class Shelf(MemoryStore):
    """A store that can be away."""

    away = False

    def get(self, key: str, **range_: Any) -> bytes:
        if self.away:
            raise StoreUnavailable("the store is away")
        return super().get(key, **range_)


class World:
    """A store, this machine's clock, and a launcher of a folder."""

    def __init__(self, folder: Path) -> None:
        self.store, self.now = Shelf(), 0.0
        self.folder = folder
        self.launcher = self.of("mine")

    def of(self, name: str) -> LocalLauncher:
        return LocalLauncher(self.folder / name, claims=StoreClaims(self.store, RUN, clock=lambda: self.now))

    def claimed_by(self, place: Place) -> None:
        assert self.store.create(launch_key(RUN, LAUNCH), place.to_bytes())

    def beat(self, seq: int, *, node: int = 0, left: bool = False) -> None:
        key = keys.run_key(RUN, "live", "nodes", LAUNCH, str(node))
        self.store.put(key, msgpack.packb({"incarnation": "x", "seq": seq, "left": left}))

    @property
    def state(self) -> str:
        return self.launcher.observe(LAUNCH).state

    def watch(self, seconds: float) -> str:
        """For so long, with a look each two seconds; the last one's state."""
        state, end = "", self.now + seconds
        while self.now < end:
            self.now = min(self.now + 2.0, end)
            state = self.state
        return state

    def ensure(self) -> None:
        self.launcher.ensure(Launch(RUN, LAUNCH, 1, "memory:", self.folder))

    def nothing_started(self) -> bool:
        return not list(self.folder.glob("mine/runs/*/*/node*"))


def begun_for_another_store(folder: Path, pid: int | None) -> Path:
    """The folder of a launch as a run of the same name has left it, or works in it as this process."""
    node = folder / "mine" / "runs" / RUN / LAUNCH / "node0"
    node.mkdir(parents=True)
    node.with_name("launch.json").write_text(json.dumps({"run": RUN, "nodes": 1, "store": "file:///other"}))
    if pid is None:
        (node / "done").write_text("{}")
    else:
        mark = ProcessMark.of(pid)
        assert mark is not None
        (node / "agent.pid").write_text(json.dumps({"pid": mark.pid, "started": mark.started}))
    return node


FAR = Place("far-away", "another boot", "pid:[1]", "/home/her/out/runs/x/y", "a" * 32, nodes=2)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_while_it_is_heard_nothing_is_started(world: World) -> None:
    world.claimed_by(FAR)
    for second in range(200):
        world.now = float(second)
        world.beat(second // 20, node=second % 2)  # each is heard every 20 s
        view = world.launcher.observe(LAUNCH)
        assert view.state == "elsewhere"
    assert "host far-away, folder /home/her/out/runs/x/y" in view.note
    assert "hotstage runs cancel" in view.note
    world.ensure()
    world.launcher.stop(LAUNCH, 0)
    assert world.nothing_started()


def test_silence_of_a_while_is_the_end(world: World) -> None:
    world.claimed_by(FAR)
    world.beat(1)
    assert world.state == "elsewhere"
    assert world.watch(SILENT_S - 1) == "elsewhere"
    assert world.watch(2) == "lost"
    loss = world.launcher.observe(LAUNCH).loss
    assert loss is not None
    assert (loss.cls, "no node of it was heard for 30 s" in loss.text) == ("infra", True)
    world.ensure()
    assert world.nothing_started()


def test_what_could_not_be_asked_is_not_silence(world: World) -> None:
    world.claimed_by(FAR)
    world.beat(1)
    assert world.state == "elsewhere"
    world.store.away, world.now = True, SILENT_S - 5
    assert world.state == "unknown"
    world.store.away, world.now = False, SILENT_S + 5
    assert world.state == "elsewhere"
    assert world.watch(SILENT_S) == "lost"


def test_time_in_which_nobody_looked_is_not_silence(world: World) -> None:
    """A machine that slept, with the nodes that are watched from it: they had no time to say anything."""
    world.claimed_by(FAR)
    world.beat(1)
    assert world.state == "elsewhere"
    world.now += 10 * SILENT_S
    assert world.state == "elsewhere"
    assert world.watch(SILENT_S - UNWATCHED_S - 1) == "elsewhere"
    assert world.watch(1) == "lost"


def test_a_launch_that_has_left_is_done_at_once(world: World) -> None:
    world.claimed_by(FAR)
    world.beat(7, node=0, left=True)
    assert world.state == "elsewhere"
    world.now += 2
    world.beat(9, node=1, left=True)
    assert world.state == "done"


def test_a_container_of_this_machine_is_out_of_reach(world: World) -> None:
    """The same kernel and a shared folder, but its processes have numbers of their own."""
    mine = Place.of(world.folder)
    world.claimed_by(replace(mine, host="container", space="pid:[7]"))
    assert world.state == "elsewhere"
    assert world.watch(SILENT_S) == "lost"


def test_after_a_boot_a_folder_that_is_gone_is_soon_over(world: World) -> None:
    world.claimed_by(replace(FAR, host=socket.gethostname()))
    assert world.state == "elsewhere"
    assert world.watch(SILENT_SOON_S) == "lost"


def test_after_a_boot_the_folder_is_taken_up_again(world: World) -> None:
    folder = world.folder / "theirs"
    folder.mkdir()
    (folder / "launch.json").write_text('{"run": "r", "nodes": 1}')
    world.claimed_by(replace(Place.of(folder), boot="the one before"))
    view = world.launcher.observe(LAUNCH)
    assert (view.state, str(folder) in view.note) == ("gone", True)


def test_a_folder_made_again_is_another_place(world: World) -> None:
    """Its path is the same; its token, and so what runs, is not."""
    folder = world.folder / "theirs"
    folder.mkdir()
    world.claimed_by(Place.of(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    Place.of(folder)
    assert world.state == "elsewhere"  # nothing of it is seen here; another user's might be about to start again
    assert world.watch(SILENT_SOON_S) == "lost"


def test_one_of_many_claims_a_launch(world: World) -> None:
    folders = [world.folder / f"f{n}" for n in range(8)]
    held: list[Path | None] = []

    def take(folder: Path) -> None:
        folder.mkdir()
        held.append(StoreClaims(world.store, RUN).take(LAUNCH, folder, 1).folder)

    threads = [threading.Thread(target=take, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 8
    assert len(set(held)) == 1
    assert held[0] in folders


def test_an_older_versions_launch_is_left_alone(world: World) -> None:
    """It has no claim; but its nodes are heard, and its folder is not here."""
    world.beat(1)
    view = world.launcher.observe(LAUNCH)
    assert (view.state, "an older version" in view.note) == ("elsewhere", True)
    assert world.watch(SILENT_S) == "lost"


def test_an_older_versions_claim_is_read(tmp_path: Path) -> None:
    old, new = Place.parse(b"10.0.0.7", "a claim"), Place.of(tmp_path, address="10.0.0.7")
    assert (old.address, old.token, old.describe()) == ("10.0.0.7", "", "10.0.0.7")
    assert old.same(new)
    assert new.same(old)
    assert not old.same(replace(new, address="10.0.0.8"))
    assert not old.here


@pytest.mark.parametrize(
    "value", [{"v": 2}, {"v": 1}, {"v": 1, **dict.fromkeys(("host", "boot", "space", "folder", "token"), 3)}]
)
def test_a_claim_that_is_none_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(Damaged, match="the claim"):
        Place.parse(msgpack.packb(value), "the claim")


def test_a_place_is_what_it_says() -> None:
    assert Place.parse(FAR.to_bytes(), "x") == FAR


def test_a_second_folder_of_this_machine_stands_by(tmp_path: Path) -> None:
    """Both agents listen at 127.0.0.1: the folder tells them apart."""
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    (tmp_path / "second").mkdir()
    with ExitStack() as stack:
        processes = [stack.enter_context(agent(run, folder)) for folder in (tmp_path, tmp_path / "second")]
        peers = [NodePeer(process.work) for process in processes]
        epoch = run.attempt(spec, plan)
        key = node_key(run.name, epoch, 0)
        wait_for(lambda: run.store.head(key), "the claim")
        first = Path(Place.parse(run.store.get(key), key).folder)
        loser, winner = sorted(processes, key=lambda p: p.work == first)
        wait_for(lambda: f"node 0 of attempt {epoch} is held by 127.0.0.1" in loser.log(), "the second to stand by")
        assert f"folder {first}" in loser.log()
        peers[processes.index(winner)].start()
        for peer in peers:
            peer.close()


def test_a_folder_that_was_deleted_under_its_agent(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tiny_spec())
    launcher = LocalLauncher(tmp_path / "mine", claims=StoreClaims(run.store, run.name))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with agent(run, theirs) as process:
        StoreClaims(run.store, run.name).take(run.launch, theirs, 1)
        wait_for(run.status, "the agent's first word")
        shutil.rmtree(theirs)
        view = launcher.observe(run.launch)
        assert view.state == "elsewhere"
        assert re.search(rf"its agents \(pid [^)]*\b{process.process.pid}\b[^)]*\) run on", view.note), view.note
        process.kill()
        wait_for(lambda: launcher.observe(run.launch).state == "lost", "the agent's end to be seen")
        view = launcher.observe(run.launch)
        assert view.loss is not None
        assert "its folder and its processes are gone" in view.loss.text


def test_a_stale_claim_is_taken_over_by_a_new_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine is not heard of: the next attempt takes a new launch, and nobody a second claim of the old one."""
    monkeypatch.setattr(flows.drive.claims, "SILENT_S", 0.5)
    monkeypatch.setattr(flows.drive.claims, "LOOK_S", 0.1)
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    spec = parse_spec(
        {
            "name": "taken",
            "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16},
            "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
            "data": {"vocab_size": 300, "source": f"text:{tmp_path}/a.txt"},
        }
    )
    store = open_store(f"file://{tmp_path}/store")
    prepared = prepare_run(spec, store)
    old = f"{prepared.run}-l1"
    log = RunLog(store, prepared.run)
    body = attempt_body(prepared, old, {"checkpoint": None, "step": 0, "slots": None}, reason="start", cause=None)
    log.append("attempt", body, log.fold())
    store.create(launch_key(prepared.run, old), FAR.to_bytes())
    run = Driven(prepared, store, make_driver(prepared, store, out=tmp_path / "out")).start()
    try:
        outcome = run.result()
    finally:
        run.stop()
    assert (outcome.outcome, outcome.step) == ("succeeded", 4)
    state = log.fold()
    assert [a.launch for a in state.attempts] == [old, f"{prepared.run}-l2"]
    cause = state.attempts[1].body["cause"]
    assert (cause["class"], "host far-away" in cause["text"]) == ("infra", True)
    assert Place.parse(store.get(launch_key(prepared.run, old)), "the claim") == FAR
    assert not list(tmp_path.glob(f"out/runs/*/{old}"))


def test_what_a_run_of_the_same_name_left_for_another_store_is_put_aside(world: World) -> None:
    """It counted as this run's own: a launch, and an attempt, was used up for each that had been there."""
    old = begun_for_another_store(world.folder, None)
    assert world.state == "absent"
    try:
        world.ensure()
        assert world.state != "absent"
        assert not (old / "done").exists()
        assert len(list(old.parents[1].glob(f"{LAUNCH}.of-*/node0/done"))) == 1
    finally:
        world.launcher.stop(LAUNCH, 0)


def test_a_gang_of_another_store_is_left_alone(world: World) -> None:
    """It was taken for this run's own, waited for, and stopped with this command."""
    old = begun_for_another_store(world.folder, os.getpid())
    assert world.state == "absent"
    with pytest.raises(LaunchRefused, match=r"still trains for the store file:///other \(pid \d+\): .*with --out"):
        world.ensure()
    world.launcher.stop(LAUNCH, 0)
    assert not (old / "done").exists()
    assert world.store.head(launch_key(RUN, LAUNCH)) is None
