"""The local launcher with the real agent and engine: nodes outlive their starter, are adopted, mended, stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import ROOT, Run, make_run, put_dataset, tiny_spec, wait_for
from tests.support.leftover import alive_below, expect_none
from trainer.engine_path import engine_binary
from trainer.errors import LaunchError, LaunchRefused
from trainer.launch import Launch, LaunchedNode
from trainer.local_launch import NODE_FOLDER_MOST, LocalLauncher, ProcessMark, _is_full, ready_to_launch
from trainer.spec import how_map
from trainer.wire.boot import boot_id


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[LocalLauncher, Launch, Run, str]]:
    """A launch of one node that runs, without an attempt yet; stopped at the end, however the test ends."""
    run, plan = make_run(tmp_path, tiny_spec(parallel__stages=2))
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out")
    launcher = LocalLauncher(tmp_path / "out")
    try:
        launcher.ensure(launch)
        yield launcher, launch, run, plan
    finally:
        launcher.stop(launch.launch_id, 0)


def node_of(launcher: LocalLauncher, launch: Launch) -> LaunchedNode:
    (node,) = launcher.observe(launch.launch_id).nodes
    return node


def test_a_run_through_the_launcher(started: tuple[LocalLauncher, Launch, Run, str], tmp_path: Path) -> None:
    launcher, launch, run, plan = started
    epoch = run.attempt(tiny_spec(parallel__stages=2), plan)
    last = wait_for(lambda: next((c for c in run.fold().checkpoints if c.step == 12), None), "the last checkpoint", 60)
    assert last.epoch == epoch
    status = wait_for(lambda: (s := run.status()) and s["phase"] == "idle" and s, "the ranks to leave")
    assert {r["code"] for r in status["ranks"].values()} == {0}
    run.log.append(
        "ended", {"outcome": "succeeded", "reason": "", "step": 12, "state_digest": last.state_digest}, run.fold()
    )
    view = wait_for(lambda: (v := launcher.observe(launch.launch_id)).state == "done" and v, "the node to leave")
    assert view.nodes[0].done == "ended"
    launcher.ensure(launch)  # what has left for good is not started again
    assert launcher.observe(launch.launch_id).state == "done"
    assert (tmp_path / "out" / "runs" / run.name / launch.launch_id / "launch.key").stat().st_mode & 0o777 == 0o600


def test_what_ranks_print_is_the_agents_to_keep(
    started: tuple[LocalLauncher, Launch, Run, str], tmp_path: Path
) -> None:
    launcher, launch, run, plan = started
    epoch = run.attempt(tiny_spec(parallel__stages=2), plan)
    wait_for(lambda: (s := run.status()) and s["phase"] == "idle" and s, "the ranks to leave", 60)
    launcher.stop(launch.launch_id, 20)
    prefix = f"runs/{run.name}/live/{epoch}/logs"
    kept = b"".join(run.store.get(info.key) for rank in range(2) for info in run.store.list(f"{prefix}/{rank}/"))
    assert kept.count(b'"event":"step"') >= 12
    log = (tmp_path / "out" / "runs" / run.name / launch.launch_id / "node0" / "supervisor.log").read_text()
    assert log.count('"event":"rank ended"') == 2
    assert '"event":"step"' not in log


@pytest.mark.parametrize("which", ["agent", "supervisor"])
def test_a_log_does_not_grow_without_end(
    started: tuple[LocalLauncher, Launch, Run, str], tmp_path: Path, which: str
) -> None:
    launcher, launch, run, _ = started
    path = tmp_path / "out" / "runs" / launch.run / launch.launch_id / "node0" / f"{which}.log"
    wait_for(lambda: (s := run.status()) and s["supervisor"], "both, which listen to signals by then")
    lines = [f"line {n} of a store that was away for a year" for n in range(200_000)]
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")
    assert path.stat().st_size > 8 << 20
    launcher.ensure(launch)
    assert path.stat().st_size <= 4 << 20
    launcher.stop(launch.launch_id, 20)
    after = path.read_text().splitlines()
    assert after[: after.index(lines[-1]) + 1] == lines[-(after.index(lines[-1]) + 1) :]  # cut at the start of a line
    assert "asked to" in "".join(after[after.index(lines[-1]) :])  # its writer goes on behind what was kept


def test_ranks_listen_where_the_spec_says(tmp_path: Path) -> None:
    spec = tiny_spec(parallel__stages=2, launch__host="127.0.0.2")
    run, plan = make_run(tmp_path, spec)
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out", how=how_map(spec))
    launcher = LocalLauncher(tmp_path / "out")
    try:
        launcher.ensure(launch)
        run.attempt(spec, plan)
        wait_for(lambda: any(c.step == 12 for c in run.fold().checkpoints), "the last checkpoint", 60)
        [told] = (tmp_path / "out").rglob("attempt-*")
        assert told.read_bytes().count(b"127.0.0.2\0") == 2  # where its two ranks found each other
    finally:
        launcher.stop(launch.launch_id, 0)


def test_a_node_has_the_share_of_the_processors_of_who_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel does not share processors by session")
    monkeypatch.setattr("trainer.local_launch.session_nice", lambda: 7)
    run, _ = make_run(tmp_path, tiny_spec())
    launcher = LocalLauncher(tmp_path / "out")
    try:
        launcher.ensure(Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out"))
        [node] = launcher.observe(run.launch).nodes
        for pid in (node.agent_pid, node.supervisor_pid):
            assert Path(f"/proc/{pid}/autogroup").read_text().split()[-1] == "7"
    finally:
        launcher.stop(run.launch, 0)


def test_a_run_in_the_deepest_folder_that_ranks_can_be_told(tmp_path: Path) -> None:
    """Sockets, of which a name may have 107 bytes, are met by names within it."""
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    below = len(os.fsencode(Path("runs", run.name, run.launch, "node1"))) + 2
    out = tmp_path.joinpath("x" * 150, "y" * 100)
    out /= "z" * (NODE_FOLDER_MOST - below - len(os.fsencode(out)))
    launch = Launch(run.name, run.launch, 1, run.store.url, out)
    launcher = LocalLauncher(out)
    try:
        launcher.ensure(launch)
        run.attempt(spec, plan)
        wait_for(lambda: any(c.step == 12 for c in run.fold().checkpoints), "the last checkpoint", 60)
    finally:
        launcher.stop(launch.launch_id, 0)


def test_a_store_too_deep_to_tell_ranks_of_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec()
    run, plan = make_run(tmp_path.joinpath(*["x" * 100] * 5), spec)
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out")
    launcher = LocalLauncher(tmp_path / "out")
    try:
        launcher.ensure(launch)
        run.attempt(spec, plan)
        status = wait_for(lambda: (s := run.status()) and s["ranks"].get("0", {}).get("code") and s, "the refusal", 60)
        assert status["ranks"]["0"]["code"] == 78
        assert "ranks are told names of at most 511: have the store in a folder" in status["ranks"]["0"]["words"]
    finally:
        launcher.stop(launch.launch_id, 0)


def test_ensure_starts_a_node_once_and_adopts_it(started: tuple[LocalLauncher, Launch, Run, str]) -> None:
    launcher, launch, _, _ = started
    before = wait_for(lambda: (n := node_of(launcher, launch)).agent_pid and n, "the agent")
    launcher.ensure(launch)
    another = LocalLauncher(launch.work_root)  # a driver that was started anew
    another.ensure(launch)
    assert node_of(another, launch) == before
    assert os.getsid(before.agent_pid or 0) == before.agent_pid
    assert os.getsid(before.supervisor_pid or 0) == before.supervisor_pid


def test_nodes_survive_their_starter(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tiny_spec())
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out")
    text = (
        "from pathlib import Path; from trainer.launch import Launch; from trainer.local_launch import LocalLauncher;"
        f"launch = Launch({run.name!r}, {run.launch!r}, 1, {run.store.url!r}, Path('out'));"
        f"LocalLauncher({str(tmp_path / 'out')!r}).ensure(launch)"
    )
    launcher = LocalLauncher(tmp_path / "out")
    try:
        subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)
        assert launcher.observe(launch.launch_id).state == "running"
    finally:
        launcher.stop(launch.launch_id, 0)
    assert launcher.observe(launch.launch_id).state == "done"


@pytest.mark.parametrize("which", ["agent", "supervisor"])
def test_a_dead_process_is_started_anew(started: tuple[LocalLauncher, Launch, Run, str], which: str) -> None:
    launcher, launch, run, _ = started
    wait_for(lambda: (s := run.status()) and s["supervisor"], "the supervisor at the agent")
    before = node_of(launcher, launch)
    victim = getattr(before, f"{which}_pid")
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: getattr(node_of(launcher, launch), f"{which}_pid") is None, "its death to be seen")
    assert launcher.observe(launch.launch_id).state == "partial"
    launcher.ensure(launch)
    after = wait_for(lambda: (n := node_of(launcher, launch)).agent_pid and n.supervisor_pid and n, "it to be back")
    assert getattr(after, f"{which}_pid") != victim
    wait_for(
        lambda: (s := run.status()) and s["supervisor"] == after.supervisor_pid and s["pid"] == after.agent_pid,
        "both to have met again",
    )


def test_the_engine_gets_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do not pass on")
    monkeypatch.setenv("SOME_TOKEN", "do not pass on")
    monkeypatch.setenv("PATH", "")  # and none of them is looked for along it
    run, _ = make_run(tmp_path, tiny_spec())
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out")
    launcher = LocalLauncher(tmp_path / "out")
    try:
        launcher.ensure(launch)
        node = node_of(launcher, launch)
        engine = wait_for(Path(f"/proc/{node.supervisor_pid}/environ").read_bytes, "the engine's environment")
        assert b"PATH=" in engine
        assert b"do not pass on" not in engine
        wait_for(lambda: b"do not pass on" in Path(f"/proc/{node.agent_pid}/environ").read_bytes(), "the agent's own")
    finally:
        launcher.stop(launch.launch_id, 0)


def test_stop_saves_what_runs(started: tuple[LocalLauncher, Launch, Run, str]) -> None:
    launcher, launch, run, _ = started
    spec = tiny_spec(parallel__stages=2, train__steps=1_000_000, checkpoint__every=0)
    long = run.add_plan(spec, put_dataset(run.store))
    epoch = run.attempt(spec, long)
    wait_for(lambda: (s := run.status()) and s["epoch"] == epoch and s["ranks"]["0"]["step"] > 3, "a few steps", 60)
    launcher.stop(launch.launch_id, 30)
    (saved,) = run.fold().checkpoints
    assert saved.step > 3
    assert launcher.observe(launch.launch_id).state == "done"


def test_who_stops_it_again_waits_for_what_is_being_saved(started: tuple[LocalLauncher, Launch, Run, str]) -> None:
    """A command that was stopping the run is left, and the next one does its part over again."""
    launcher, launch, run, _ = started
    spec = tiny_spec(parallel__stages=2, train__steps=1_000_000, checkpoint__every=0)
    epoch = run.attempt(spec, run.add_plan(spec, put_dataset(run.store)))
    wait_for(lambda: (s := run.status()) and s["epoch"] == epoch and s["ranks"]["0"]["step"] > 3, "a few steps", 60)
    node = launcher.observe(launch.launch_id).nodes[0]
    assert node.agent_pid is not None
    assert node.supervisor_pid is not None
    os.kill(node.supervisor_pid, signal.SIGSTOP)  # nothing is saved before the second one has asked
    os.kill(node.agent_pid, signal.SIGTERM)
    log = launch.work_root / "runs" / launch.run / launch.launch_id / "node0" / "agent.log"
    wait_for(lambda: b"asked to leave" in log.read_bytes(), "the agent hears it")
    os.kill(node.agent_pid, signal.SIGTERM)
    wait_for(lambda: b"asked to leave again" in log.read_bytes(), "the agent hears the second one")
    os.kill(node.supervisor_pid, signal.SIGCONT)
    launcher.stop(launch.launch_id, 30)
    (saved,) = run.fold().checkpoints
    assert saved.step > 3


def test_what_was_asked_to_stop_ends_without_its_asker(started: tuple[LocalLauncher, Launch, Run, str]) -> None:
    """As where a second Ctrl-C follows: the state is stored, and nothing of the node remains."""
    launcher, launch, run, _ = started
    spec = tiny_spec(parallel__stages=2, train__steps=1_000_000, checkpoint__every=0)
    epoch = run.attempt(spec, run.add_plan(spec, put_dataset(run.store)))
    wait_for(lambda: (s := run.status()) and s["epoch"] == epoch and s["ranks"]["0"]["step"] > 3, "a few steps", 60)

    class Left(Exception):
        pass

    def leave() -> None:
        raise Left

    with pytest.raises(Left):
        launcher.stop(launch.launch_id, 30, leave)
    wait_for(lambda: launcher.observe(launch.launch_id).state == "done", "agent and supervisor to leave", 60)
    (saved,) = run.fold().checkpoints
    assert saved.step > 3


def test_an_agent_that_is_asked_while_it_starts_takes_the_last_save(
    started: tuple[LocalLauncher, Launch, Run, str],
) -> None:
    """It is in the place of one that died, and knows nothing yet: neither the log nor its ranks."""
    launcher, launch, run, _ = started
    spec = tiny_spec(parallel__stages=2, train__steps=1_000_000, checkpoint__every=0)
    epoch = run.attempt(spec, run.add_plan(spec, put_dataset(run.store)))
    wait_for(lambda: (s := run.status()) and s["epoch"] == epoch and s["ranks"]["0"]["step"] > 3, "a few steps", 60)
    before = launcher.observe(launch.launch_id).nodes[0].agent_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: launcher.observe(launch.launch_id).nodes[0].agent_pid is None, "the agent to be gone")
    launcher.ensure(launch)
    launcher.stop(launch.launch_id, 30)
    (saved,) = run.fold().checkpoints
    assert saved.step > 3
    assert launcher.observe(launch.launch_id).state == "done"


def test_refusals_say_what_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LocalLauncher(tmp_path)
    with pytest.raises(LaunchError, match="no plain name"):
        launcher.ensure(Launch("run", "../up", 1, "memory:", tmp_path))
    with pytest.raises(LaunchError, match="at least 1"):
        launcher.ensure(Launch("run", "a", 0, "memory:", tmp_path))
    for name, why in (("\udce9", "is not text in UTF-8"), ("x" * 300, "File name too long")):
        with pytest.raises(LaunchRefused, match=f"{why}.*--out"):
            LocalLauncher(tmp_path / name).ensure(Launch("run", "a", 1, "memory:", tmp_path))
    deep = tmp_path.joinpath(*["x" * 100] * 5)
    with pytest.raises(LaunchRefused, match=rf"have names of 5\d\d bytes, and .* at most {NODE_FOLDER_MOST}: .*--out"):
        LocalLauncher(deep).ensure(Launch("run", "a", 1, "memory:", deep))
    assert not deep.exists()
    assert launcher.observe("nothing").state == "absent"
    launcher.stop("nothing", 0)
    monkeypatch.setenv("HOTSTAGE_ENGINE", str(tmp_path / "no-engine"))
    with pytest.raises(LaunchRefused, match="HOTSTAGE_ENGINE"):
        engine_binary()
    (tmp_path / "no-engine").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "no-engine").chmod(0o755)
    with pytest.raises(LaunchRefused, match=r"no-engine does not run \(Exec format error\): it is of another kind"):
        launcher.ensure(Launch("run", "a", 1, "memory:", tmp_path))
    monkeypatch.setenv("HOTSTAGE_ENGINE", "/bin/false")
    with pytest.raises(LaunchRefused, match=r"/bin/false does not run \(it left with 1\)"):
        ready_to_launch(tmp_path)


def test_a_limit_of_processor_time_is_told_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It kills ranks and their driver, which is a loss without a cause then."""
    limits = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (1 << 30, limits[1]))
    try:
        ready_to_launch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, limits)
    assert "killed after 1073741824 s of processor time (ulimit -t)" in caplog.text


def ensure_again(launcher: LocalLauncher, launch: Launch) -> None:
    """As a driver does, of a launch of which something dies each time."""
    for _ in range(200):
        launcher.ensure(launch)
        wait_for(lambda: launcher.observe("a").state in ("gone", "partial"), "one of them to die")


def test_a_node_that_cannot_live_is_given_up_with_its_words(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path / "out", engine=Path("/bin/false"))
    launch = Launch("tiny-0", "a", 1, "s3://", tmp_path / "out")  # no bucket: the agent refuses it

    try:
        with pytest.raises(LaunchError, match=r"died .* times"):
            ensure_again(launcher, launch)
    finally:
        launcher.stop("a", 0)


def test_an_agent_that_is_refused_is_a_refusal(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path / "out")
    launch = Launch("tiny-0", "a", 1, "s3://", tmp_path / "out")
    try:
        with pytest.raises(
            LaunchRefused, match=r"the agent of .* died .* times.* last words: the agent cannot start: "
        ):
            ensure_again(launcher, launch)
    finally:
        launcher.stop("a", 0)


def test_what_lives_of_a_node_that_is_given_up_is_ended(tmp_path: Path) -> None:
    """Its agent stayed for ever, waiting for a supervisor that nobody would start."""
    store = tmp_path / "store"
    (store / "runs").mkdir(parents=True)
    launcher = LocalLauncher(tmp_path / "out", engine=Path("/bin/false"))
    launch = Launch("tiny-0", "a", 1, store.as_uri(), tmp_path / "out")

    try:
        with pytest.raises(LaunchError, match=r"the supervisor of .* died 8 times"):
            ensure_again(launcher, launch)
        assert launcher.observe("a").state == "gone"
    finally:
        launcher.stop("a", 0)


def test_a_folder_that_is_gone_is_not_full(tmp_path: Path) -> None:
    """Who tells why a node died must not die of it."""
    assert not _is_full(tmp_path / "gone")


def test_a_reused_process_number_is_not_mistaken(tmp_path: Path) -> None:
    mark = ProcessMark.of(os.getpid())
    assert mark is not None
    assert mark.alive()
    assert not ProcessMark(mark.pid, mark.started + 1).alive()
    path = tmp_path / "x.pid"
    path.write_text(json.dumps({"pid": mark.pid, "started": mark.started}))
    assert ProcessMark.read(path) == mark
    path.write_text(json.dumps({"pid": 1}))
    assert ProcessMark.read(path) is None


def test_a_process_of_the_boot_before_is_not_mistaken_though_number_and_time_are_the_same(
    started: tuple[LocalLauncher, Launch, Run, str],
) -> None:
    """It was signalled with the node, and killed: somebody else's."""
    _, launch, _, _ = started
    folder = launch.work_root / "runs" / launch.run / launch.launch_id / "node0"
    for which in ("agent", "supervisor"):
        path = folder / f"{which}.pid"
        named = json.loads(path.read_bytes())
        assert named["boot"] == boot_id() != ""
        assert ProcessMark.read(path) is not None
        path.write_text(json.dumps(named | {"boot": "another"}))
        assert ProcessMark.read(path) is None
        path.write_text(json.dumps(named))


def test_a_node_whose_agent_and_folder_are_gone_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver starts the agent again: supervisor and ranks leave, with words."""
    monkeypatch.setenv("HOTSTAGE_ENGINE_AGENT_AWAY_S", "2")
    spec = tiny_spec(parallel__stages=2, train__steps=1_000_000)
    run, plan = make_run(tmp_path, spec)
    launch = Launch(run.name, run.launch, 1, run.store.url, tmp_path / "out")
    launcher = LocalLauncher(tmp_path / "out")
    home = tmp_path / "out" / "runs" / run.name / launch.launch_id / "node0"
    try:
        launcher.ensure(launch)
        run.attempt(spec, plan)

        def stepping() -> bool:
            launcher.ensure(launch)  # a supervisor that did not wait for a slow agent is started again
            status = run.status()
            return bool(status) and status["ranks"].get("0", {"step": 0})["step"] > 3

        wait_for(stepping, "the first steps", 60)
        agent = node_of(launcher, launch).agent_pid
        assert agent is not None
        assert len(alive_below(home)) == 4, "agent, supervisor, two ranks"
        with (home / "supervisor.log").open() as log:
            os.kill(agent, signal.SIGKILL)
            shutil.rmtree(home)
            expect_none(home)
            said = log.read()
        assert '"event":"no agent: this node ends"' in said
        assert '"live_ranks":2' in said
        assert '"event":"supervisor leaves","code":75' in said
    finally:
        launcher.stop(launch.launch_id, 0)


def test_a_launch_is_stopped_also_where_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "out" / "runs" / "r" / "r-l1"
    (folder / "node0").mkdir(parents=True)
    (folder / "launch.json").write_text('{"run": "r", "nodes": 1}')
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    mark = ProcessMark.of(child.pid)
    assert mark is not None
    (folder / "node0" / "agent.pid").write_text(json.dumps({"pid": mark.pid, "started": mark.started}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file takes a byte
    try:
        LocalLauncher(tmp_path / "out").stop("r-l1", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert child.wait(60) == -signal.SIGTERM
    assert "was stopped cannot be written: File too large" in caplog.text
