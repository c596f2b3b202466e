"""The local launcher: a node is a group of processes of this machine.

Agent and supervisor have a session each, so that they survive whoever started them.

A launch works in one folder of one machine, and is claimed in the run's store before anything of it starts
(``Claims``). Who comes second from another folder works in the first one's, where this machine can reach it; else it
starts nothing, says where the launch is, and leaves it once it is known to be over: the next attempt then takes a new
launch. What lies in the folder without a claim in the store is of another store's run of that name: it is put aside,
and where it still runs nothing is started.

Files of a local launch, under ``<work_root>/runs/<run>/<launch>/``: ``launch.json``, ``place.id`` (the folder's
token), ``launch.key`` (0600, the key from which the attempts' keys derive), and for each node ``node<i>/`` with
``start.lock`` (held while somebody starts this node), ``agent.lock`` (held by the agent while it lives), ``agent.pid``
and ``supervisor.pid`` (with its start time and boot, so that a reused number is never mistaken), ``agent.sock``,
``agent.log``, ``supervisor.log``, and ``done`` once the node has left for good. The logs are the two processes' own, a
few lines an attempt and a checkpoint, and `ensure` cuts their beginning before they grow large; what the ranks print
is the agent's to keep (``hotstage logs``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trainer import wire
from trainer.engine_path import cuda_environment, ready_engine
from trainer.errors import LaunchError, LaunchRefused, LaunchUnknown
from trainer.failures import Failure
from trainer.launch import Finding, Launch, LaunchedNode, LaunchView, nothing
from trainer.priority import session_nice, set_session_nice
from trainer.wire.boot import boot_id
from trainer.wire.files import create_file

log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
NODE_FOLDER_MOST = wire.FOLDER_MOST - len(f"/data-cache/{'0' * 64}")
"""Bytes of a node's folder's name: ranks are told where their data are, which may lie below it."""
_ENGINE_ENV = re.compile(
    r"(PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|(A|L|UB|T)SAN_OPTIONS|HOTSTAGE_ENGINE_\w+|"
    r"HOTSTAGE_(CUDA|CUDA_LIBRARIES|DEVICES)|(CUDA|NVIDIA|NCCL|CUBLAS|CUBLASLT|CUDNN|HS_EMULATED)_\w+)\Z"
)
"""All that the engine inherits: it holds no credentials and needs no other variable. The last line is CUDA's: which
devices are seen, how its libraries behave.
"""
_NAMES_FILE = re.compile(
    r"(AWS_(SHARED_CREDENTIALS_FILE|CONFIG_FILE|\w+_TOKEN_FILE)|(AWS|REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_(FILE|DIR))\Z"
)
"""Of what names a file for a store's client: relative to where the command works, and the agent works elsewhere."""
_TAIL_BYTES = 2000
_LOG_BYTES = 4 << 20  # of a process's own log; beyond it, its last quarter is kept
_LOCK_S = 10.0  # for a starting agent to write its number, or a killed one to let go of its lock
_MARK_S = 5.0
_START_S = 5.0  # for a starting agent to listen to signals
# The process itself writes its mark before it becomes the program, and holds the node's lock (its standard input) until
# then: a driver that is killed in the middle of a start never leaves a process that the next one does not know.
_MARK_THEN_EXEC = """
mark=$1; shift
read -r boot < /proc/sys/kernel/random/boot_id || boot=
started=$(command -p cut -d' ' -f22 /proc/$$/stat) &&
printf '{"pid": %d, "started": %d, "boot": "%s"}' $$ "$started" "$boot" > "$mark.new" &&
command -p mv "$mark.new" "$mark" || exit 71
exec < /dev/null
exec "$@"
"""
_NO_PLACE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST),
}
_RESTARTS, _RESTART_WINDOW_S = 8, 60.0
_LEAVE_S = 10.0
"""For the rest of a launch of which one process does not stay: the agents upload what is saved."""


@dataclass(frozen=True)
class Held:
    """Who holds a launch of local nodes.

    ``folder``: where it works, if this machine reaches it; else None. ``words``: where that is, for people. ``left``:
    all its nodes have left for good. ``over``: why nothing of it can run any more; empty where something may.
    """

    folder: Path | None
    words: str
    left: bool = False
    over: str = ""


class Claims(Protocol):
    """Who holds which launch of a run: kept in its store, created once. Raises LaunchUnknown where that is away."""

    def where(self, launch_id: str, own: Path | None) -> Held | None:
        """Who holds the launch; None: nobody. ``own``: where the asker has begun it, or would."""

    def take(self, launch_id: str, folder: Path, nodes: int) -> Held:
        """Claim the launch for a folder that is there; whoever was first has it."""

    def is_free(self, launch_id: str) -> bool:
        """Whether nobody holds the launch, as the store says at this moment."""


@dataclass(frozen=True)
class ProcessMark:
    """A process that was started: its number, and its start time, which no later process of that number and this boot
    shares.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessMark | None:
        """The running process of this number; None where there is none or it is only waiting to be reaped."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 2 :].split()
        if fields[0] in (b"Z", b"X"):
            return None
        return cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return ProcessMark.of(self.pid) == self

    @classmethod
    def read(cls, path: Path) -> ProcessMark | None:
        """What the file names, running or not; None where it is missing or cut, or of a boot before this one."""
        try:
            value = json.loads(path.read_bytes())
            mark, boot = cls(int(value["pid"]), int(value["started"])), value.get("boot")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mark if not boot or boot == boot_id() else None


def ready_to_launch(work_root: Path) -> None:
    """See before hours of other work that the engine runs, and that the folder which launches work below, made here,
    can be written. LaunchRefused otherwise, or LaunchError."""
    ready_engine()
    if (most := resource.getrlimit(resource.RLIMIT_CPU)[0]) != resource.RLIM_INFINITY:
        log.warning(
            "each process here is killed after %d s of processor time (ulimit -t), ranks and this command too: raise "
            "it, or train where there is no such limit",
            most,
        )
    folder = work_root.absolute() / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".ready-", dir=folder))
    except OSError as error:
        raise _no_place("nothing can", folder, error) from error


def _no_place(what: str, folder: Path, error: OSError) -> LaunchError:
    kind = LaunchRefused if error.errno in _NO_PLACE else LaunchError
    return kind(
        f"{what} be started under {folder}: {error.strerror}; make it a folder that can be written, with room, or "
        "choose another with --out"
    )


class LocalLauncher:
    """Nodes as processes of this machine. See the module's text for files and order.

    ``claims``: of the run that is launched; without them every launch is taken for this work root's own. ``python`` and
    ``engine`` are the programs to run; ``clock`` and ``sleep`` may be injected. ``with_parent``: what is started ends
    with the thread of this process that started it, instead of surviving it.
    """

    detaches = False

    def __init__(
        self,
        work_root: Path | str = "out",
        *,
        claims: Claims | None = None,
        python: str = sys.executable,
        engine: Path | None = None,
        agent_args: Sequence[str] = (),
        with_parent: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = Path(work_root).absolute()
        self._claims = claims
        self._python, self._engine, self._agent_args = python, engine, tuple(agent_args)
        self._tied = ("--with-parent", str(os.getpid())) if with_parent else ()
        self._clock, self._sleep = clock, sleep
        self._children: dict[subprocess.Popen[bytes], Path] = {}
        self._left_with: dict[Path, int] = {}
        self._starts: dict[Path, list[float]] = {}

    # --- the seam -----------------------------------------------------------------------------------------

    def ensure(self, launch: Launch) -> None:
        for name, value in (("run", launch.run), ("launch", launch.launch_id)):
            if not _NAME.match(value):
                raise LaunchError(
                    f"{name} {value!r} is no plain name; take letters, digits, '.', '_', '-', at most 100"
                )
        if launch.nodes < 1:
            raise LaunchError(f"a launch of {launch.nodes} nodes; it needs at least 1")
        folder = self._root / "runs" / launch.run / launch.launch_id
        held = self._claims.where(launch.launch_id, folder) if self._claims is not None else None
        if held is not None:
            if held.folder is None:
                return  # ``observe`` says where it is
            folder = held.folder
        if any(0xD800 <= ord(c) < 0xE000 for c in str(folder)):
            raise LaunchRefused(
                f"the folder {str(folder)!a} has a name that is not text in UTF-8, as its nodes are told it: choose "
                "another with --out"
            )
        if (long := len(os.fsencode(folder / f"node{launch.nodes}"))) > NODE_FOLDER_MOST:
            raise LaunchRefused(
                f"the nodes' folders below {folder} have names of {long} bytes, and ranks are told names of at most "
                f"{NODE_FOLDER_MOST}: choose a shorter one with --out"
            )
        try:
            if held is None and self._claims is not None and _claimed_in(folder):
                self._make_way(self._claims, launch.launch_id, folder)
            folder.mkdir(parents=True, exist_ok=True)
            if held is None and self._claims is not None:
                held = self._claims.take(launch.launch_id, folder, launch.nodes)
                if held.folder is None:
                    return
                folder = held.folder
            key = _launch_key(folder)
            said = {"run": launch.run, "nodes": launch.nodes}
            if self._claims is not None:
                said["store"] = launch.store_url
            create_file(folder / "launch.json", json.dumps(said).encode(), 0o644)
            for node in range(launch.nodes):
                self._ensure_node(launch, node, folder / f"node{node}", key)
        except OSError as error:
            raise _no_place(f"the launch {launch.launch_id} cannot", folder, error) from error

    def observe(self, launch_id: str) -> LaunchView:
        self._reap()
        try:
            folder, held = self._find(launch_id)
        except LaunchUnknown as error:
            return LaunchView(launch_id, "unknown", detail=str(error))
        if held is not None and held.folder is None:
            return _elsewhere(launch_id, held)
        if folder is None:
            return LaunchView(launch_id, "absent", detail=f"no launch {launch_id} under {self._root}")
        nodes = tuple(_view(node, folder / f"node{node}") for node in range(_nodes(folder)))
        up = sum(n.agent_pid is not None and n.supervisor_pid is not None for n in nodes)
        any_up = any(n.agent_pid is not None or n.supervisor_pid is not None for n in nodes)
        state: Literal["running", "partial", "gone", "done"]
        if nodes and all(n.done is not None for n in nodes) and not any_up:
            state = "done"
        elif up == len(nodes):
            state = "running"
        else:
            state = "partial" if any_up else "gone"
        note = (
            ""
            if folder.resolve().is_relative_to(self._root.resolve())
            else f"this run works in {folder}, started from there"
        )
        return LaunchView(launch_id, state, nodes, note=note if state != "done" else "")

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        folder, _ = self._find(launch_id)
        if folder is None:
            return asked()
        nodes = [folder / f"node{node}" for node in range(_nodes(folder))]
        for node in nodes:
            if node.is_dir() and not (node / "done").exists():
                try:
                    _write_done(node, "stopped")
                except OSError as error:  # a full disk: it is stopped all the same
                    log.warning(
                        "the mark that %s was stopped cannot be written: %s; another driver of this run may start it "
                        "again",
                        node,
                        error.strerror,
                    )
        self._end(nodes, grace_s, asked)

    # --- inside -------------------------------------------------------------------------------------------

    def _end(self, nodes: Sequence[Path], grace_s: float, asked: Callable[[], None] = nothing) -> None:
        """Their processes; who looks after the nodes may start them again."""
        deadline = self._clock() + grace_s
        if grace_s > 0:
            # both, so that nothing has to follow: the agent stores what the ranks save, and leaves behind them
            engines, agents = self._marks(nodes, "supervisor"), self._marks(nodes, "agent")
            for mark in engines:
                _signal(mark, signal.SIGTERM)
            patience = min(deadline, self._clock() + _START_S)
            self._await(lambda: any(_starts(mark) for mark in agents), patience)
            for mark in agents:
                _signal(mark, signal.SIGTERM)
            asked()
            self._await_end([*engines, *agents], deadline)
        else:
            asked()
        for which in ("supervisor", "agent"):
            marks = self._marks(nodes, which)
            for mark in marks:
                _signal(mark, signal.SIGKILL, group=True)
            self._await_end(marks, self._clock() + 10)

    def _find(self, launch_id: str) -> tuple[Path | None, Held | None]:
        """The launch's folder where this machine has one that holds it, and who has claimed it."""
        if not _NAME.match(launch_id):
            return None, None
        found = sorted(self._root.glob(f"runs/*/{launch_id}/launch.json"))
        own = found[0].parent if found else None
        if self._claims is None:
            return own, None
        held = self._claims.where(launch_id, own)
        if held is None:  # it was begun here by an older version, or for another store
            return (None if own is None or _claimed_in(own) else own), None
        if held.folder is None:
            return None, held
        # claimed, but not begun: its starter is about to, or is gone
        return (held.folder if (held.folder / "launch.json").exists() else None), held

    def _ensure_node(self, launch: Launch, node: int, folder: Path, key: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._reap()
        with _locked(folder / "start.lock") as lock:
            if (folder / "done").exists():
                return
            for which in ("agent", "supervisor"):
                _bound(folder / f"{which}.log")
            agent_lives, supervisor = self._agent_lives(folder), _alive(folder / "supervisor.pid")
            if agent_lives and supervisor is not None:
                return
            engine = self._engine or ready_engine()  # before an agent that would wait for it
            if not agent_lives:
                root = str(Path(__file__).resolve().parent.parent)
                env = _from_anywhere(os.environ)
                env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
                args = [self._python, "-m", "checkpoint.agent", "--store", launch.store_url, "--run", launch.run]
                args += ["--launch", launch.launch_id, "--node", str(node), "--nodes", str(launch.nodes)]
                args += ["--socket", "agent.sock", "--work", str(folder), "--key-file", str(key)]
                if launch.how:
                    args += ["--host", launch.how["launch"]["host"]]
                args += [*self._agent_args, *self._tied]
                self._start(args, env, folder, "agent", lock)
            if supervisor is None:
                env = {name: value for name, value in os.environ.items() if _ENGINE_ENV.match(name)}
                env |= cuda_environment()
                args = [str(engine), "node", "--agent", "agent.sock", *self._tied]
                self._start(args, env, folder, "supervisor", lock)

    def _make_way(self, claims: Claims, launch_id: str, folder: Path) -> None:
        """Put aside what the same launch of another store, or of one that is gone, has left in the folder: of this
        store's nothing can be there, since it is claimed first. The lock: nobody puts aside what another begins."""
        with _locked(folder.with_name("move.lock")):
            store = _claimed_in(folder)
            if not store or not claims.is_free(launch_id):
                return
            views = [_view(node, folder / f"node{node}") for node in range(_nodes(folder))]
            running = [pid for view in views for pid in (view.agent_pid, view.supervisor_pid) if pid is not None]
            if running:
                raise LaunchRefused(
                    f"in {folder} the same run still trains for the store {store} (pid "
                    f"{', '.join(map(str, running))}): choose another folder with --out, or stop that one first"
                )
            folder.rename(folder.with_name(f"{folder.name}.of-{secrets.token_hex(4)}"))

    def _agent_lives(self, folder: Path) -> bool:
        """By its number; else by its lock, which stays for a moment after a kill, and is all there is of an agent whose
        starter died before the number was written."""
        deadline = self._clock() + _LOCK_S
        while _alive(folder / "agent.pid") is None:
            if not _is_locked(folder / "agent.lock"):
                return False
            if self._clock() > deadline:
                raise LaunchError(
                    f"{folder / 'agent.lock'} is held by a process that agent.pid there does not name; end it"
                )
            self._sleep(0.01)
            self._reap()
        return True

    def _start(self, args: Sequence[str], env: Mapping[str, str], folder: Path, which: str, lock: int) -> None:
        pid_file, log_file = folder / f"{which}.pid", folder / f"{which}.log"
        starts = [t for t in self._starts.get(pid_file, []) if self._clock() - t < _RESTART_WINDOW_S]
        if len(starts) >= _RESTARTS:
            full = _is_full(folder)
            words = _last_error(log_file) or _tail(log_file) or "none"
            # what still lives of the launch would wait for this one, which nobody starts
            self._end([folder.parent / f"node{node}" for node in range(_nodes(folder.parent))], _LEAVE_S)
            refused = self._left_with.get(pid_file) == LaunchRefused.exit_code
            raise (LaunchRefused if refused else LaunchError)(
                f"the {which} of {folder} died {len(starts)} times within {_RESTART_WINDOW_S:.0f} s; its last words: "
                f"{words}" + ("; that folder's disk is full: free space, or choose another with --out" if full else "")
            )
        self._starts[pid_file] = [*starts, self._clock()]
        with open(log_file, "ab") as log:
            # relative to the node's folder: a socket's name may have only 107 bytes
            child = subprocess.Popen(
                ["/bin/sh", "-c", _MARK_THEN_EXEC, which, str(pid_file), *args],
                env=dict(env),
                cwd=folder,
                stdin=lock,
                # the supervisor repeats what its ranks print, a line a step, for who reads a pod's output: here nobody
                stdout=log if which == "agent" else subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self._children[child] = pid_file
        if nice := session_nice():  # what computes steps again below everybody's priority has its gang there too
            set_session_nice(child.pid, nice)
        deadline = self._clock() + _MARK_S
        while child.poll() is None and self._clock() < deadline:
            mark = ProcessMark.read(pid_file)
            if mark is not None and mark.pid == child.pid:
                return
            self._sleep(0.001)

    def _reap(self) -> None:
        for child in [child for child in self._children if child.poll() is not None]:
            self._left_with[self._children.pop(child)] = child.returncode

    @staticmethod
    def _marks(nodes: Sequence[Path], which: str) -> list[ProcessMark]:
        marks = (_alive(node / f"{which}.pid") for node in nodes)
        return [mark for mark in marks if mark is not None]

    def _await_end(self, marks: Sequence[ProcessMark], deadline: float) -> None:
        self._await(lambda: any(mark.alive() for mark in marks), deadline)

    def _await(self, goes_on: Callable[[], bool], deadline: float) -> None:
        while goes_on() and self._clock() < deadline:
            self._sleep(0.01)
            self._reap()
        self._reap()


def _elsewhere(launch_id: str, held: Held) -> LaunchView:
    """A launch that this machine does not reach."""
    if held.left:
        return LaunchView(launch_id, "done", detail=f"it worked on {held.words}, and has left")
    if held.over:
        text = f"launch {launch_id} worked on {held.words}: {held.over}"
        return LaunchView(
            launch_id, "lost", detail=text, loss=Finding(Failure.INFRA, text, "a new launch is made here")
        )
    note = (
        f"this run works on {held.words}; nothing is started here, this command watches. To go on here, stop it there "
        "(Ctrl-C in its terminal), or `hotstage runs cancel` it and `hotstage runs resume` it here"
    )
    return LaunchView(launch_id, "elsewhere", detail=note, note=note)


def _signal(mark: ProcessMark, number: signal.Signals, *, group: bool = False) -> None:
    if mark.alive():
        with contextlib.suppress(ProcessLookupError):
            # started in a session of its own, so the group is this process and what it forked
            (os.killpg if group else os.kill)(mark.pid, number)


def _starts(agent: ProcessMark) -> bool:
    """Whether an agent does not take SIGTERM yet. It would die of it, and nobody would store the last save."""
    try:
        status = Path(f"/proc/{agent.pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return agent.alive() and not int(caught, 16) >> (signal.SIGTERM - 1) & 1


def _alive(pid_file: Path) -> ProcessMark | None:
    mark = ProcessMark.read(pid_file)
    return mark if mark is not None and mark.alive() else None


def _nodes(folder: Path) -> int:
    try:
        return int(json.loads((folder / "launch.json").read_bytes())["nodes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"{folder / 'launch.json'} cannot be read: {error}; remove the folder if nothing runs"
        ) from error


def _claimed_in(folder: Path) -> str:
    """The store in which the launch that lies in the folder was claimed before it began; empty: none, or an older
    version's, which claimed nothing."""
    try:
        return str(json.loads((folder / "launch.json").read_bytes())["store"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _view(node: int, folder: Path) -> LaunchedNode:
    agent, supervisor = _alive(folder / "agent.pid"), _alive(folder / "supervisor.pid")
    try:
        done: str | None = (folder / "done").read_text()
    except OSError:
        done = None
    gone = [which for which, mark in (("agent", agent), ("supervisor", supervisor)) if mark is None]
    words = "\n".join(filter(None, (_tail(folder / f"{which}.log") for which in gone)))
    # a node without its supervisor has lost its ranks (PDEATHSIG)
    lives = supervisor is not None
    return LaunchedNode(node, agent.pid if agent else None, supervisor.pid if supervisor else None, done, words, lives)


def _is_full(folder: Path) -> bool:
    try:
        return not os.statvfs(folder).f_bavail
    except OSError:  # it is gone
        return False


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _last_error(path: Path) -> str:
    """The last error of a log of JSON lines; empty where it has none."""
    for line in reversed(_tail(path).splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            if told["level"] == "error":
                return str(told["text"])
    return ""


def _from_anywhere(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that works in another folder."""
    files = {k: v for k, v in environment.items() if _NAMES_FILE.match(k) and v and v[0] not in "~/"}
    return {**environment, **{name: os.path.abspath(value) for name, value in files.items()}}


def _bound(path: Path) -> None:
    """Cut a log that has grown large to its end, under the process that writes it: that one appends."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LOG_BYTES:
            file.seek(size - _LOG_BYTES // 4)
            kept = file.read().partition(b"\n")[2]
            file.truncate(0)
            with open(path, "ab") as end:
                end.write(kept)


def _launch_key(folder: Path) -> Path:
    path = folder / "launch.key"
    if not path.exists():
        create_file(path, secrets.token_bytes(32), 0o600)
    return path


def _write_done(folder: Path, reason: str) -> None:
    create_file(folder / "done", reason.encode(), 0o644)


def _is_locked(path: Path) -> bool:
    """Whether somebody holds this lock: an agent whose starter died before it wrote the number down."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
