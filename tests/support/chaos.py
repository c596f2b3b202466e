"""The chaos harness: kills one process of a real run at a named place, seen from outside. Nothing in the product helps.

A place inside a rank is read from the page of shared memory in which every rank says what it does
(``core/rank_page.h``, found through /proc); a place of the agent from the objects that are in the store. A watcher
process spins until it sees the place, then sends SIGKILL. Faults are plain data drawn from a seed and printed, so that
a failure replays: ``Fault.parse("forward rank=1 step=7")``.

    python -m tests.support.chaos FAULT RUN_FOLDER WORK_FOLDER    # the watcher
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support.wait import wait_for
from trainer import wire
from trainer.priority import set_session_nice

T = TypeVar("T")
PLACES = ("forward", "backward", "send", "receive", "report", "snapshot", "upload", "commit", "agent", "supervisor")
"""Of a node: what kills one of its ranks, its agent or its supervisor. Besides them ``driver`` and ``store``."""
_KINDS = {
    "forward": (wire.A_RUN, "F"),
    "backward": (wire.A_RUN, "B"),
    "send": (wire.A_SEND, None),
    "receive": (wire.A_RECV, None),
    "report": (wire.A_REPORT, None),
    "snapshot": (wire.A_SNAPSHOT, None),
    "again": (wire.A_RUN, "F"),
}
"""``report``: a slot is claimed, the gang has not decided; ``again``: in an optimistic step's prefix, the second time,
under a schedule that has all forwards there.
"""
_PAGE = struct.Struct("<QqIIIII")  # hs_rank_page
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Fault:
    """One SIGKILL. ``rank`` is a rank, or ignored for what is not in a rank; ``step`` the step in which it happens."""

    place: str
    rank: int
    step: int

    def __str__(self) -> str:
        return f"{self.place} rank={self.rank} step={self.step}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        place, rank, step = text.split()
        return cls(place, int(rank.removeprefix("rank=")), int(step.removeprefix("step=")))


def draw(seed: int, places: tuple[str, ...], ranks: int, steps: range) -> list[Fault]:
    """One fault a place, at seeded ranks and steps; the same seed gives the same faults."""
    rng = random.Random(seed)
    return [Fault(place, rng.randrange(ranks), rng.choice(steps)) for place in places]


@contextlib.contextmanager
def unleashed(
    fault: Fault, run_folder: Path, work: Path, *, gang: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The watcher at work beside what the block does; it is gone afterwards. Its exit code is 0 once it has killed.
    Where it is late, or has no processor, the gang (below ``gang``; None: ``work``) waits for it.
    """
    print(f"fault: {fault}")
    watcher = subprocess.Popen([sys.executable, "-m", "tests.support.chaos", str(fault), str(run_folder), str(work)])
    try:
        with standing_still(gang or work, lambda: watcher.poll() is None, step=fault.step):
            yield watcher
    finally:
        if watcher.poll() is None:
            watcher.kill()
        watcher.wait()


@contextlib.contextmanager
def frozen(work: Path, rank: int) -> Iterator[None]:
    """One rank below the folder is stopped (SIGSTOP) inside the block, so that the run cannot end meanwhile."""
    pid = rank_pid(work, rank)
    assert pid is not None, f"rank {rank} does not run"
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def standing_still(work: Path, due: Callable[[], bool], *, step: int = 0, but: Collection[int] = ()) -> Iterator[Held]:
    """While something is due rank 0 below the folder stands still now and then, from a step on: who looks seldom sees
    it train. ``but``: ranks of an attempt that is over.
    """
    over, held = threading.Event(), Held(work, step, but)

    def hold() -> None:
        while not over.wait(0.005) and due():
            held.look()
        held.release()

    holder = threading.Thread(target=hold, name="holder")
    holder.start()
    try:
        yield held
    finally:
        over.set()
        holder.join()


@contextlib.contextmanager
def caught(
    work: Path,
    look: Callable[[], T | None],
    what: str,
    seconds: float = 60,
    *,
    step: int = 0,
    but: Collection[int] = (),
) -> Iterator[T]:
    """`wait_for`, of a gang below the folder that does not end meanwhile (`standing_still`). Inside the block its rank
    0 stands still: the run cannot end before the test has acted, however late it is.
    """
    with standing_still(work, lambda: True, step=step, but=but) as held:
        found = wait_for(look, what, seconds)
        held.keep()
        yield found


def hurried(work: Path, look: Callable[[], T]) -> T:
    """The look, and an ordinary share of the processors for the replay that a driver has begun below the folder: below
    everybody else's, on a machine that is busy with other tests, it would not be through in hours.
    """
    for pid, args in pids_below(work):
        if args[1:4] == ["-P", "-m", "flows.cli"] and "replay" in args:
            set_session_nice(pid, 0)
            with contextlib.suppress(PermissionError):  # within the session it is alone
                os.setpriority(os.PRIO_PROCESS, pid, 0)
    return look()


def ask_to_stop(process: subprocess.Popen[bytes], number: int, work: Path) -> None:
    """A signal to the command that drives the gang below the folder. Rank 0 stands still until its supervisor has been
    asked to stop: the run cannot end before that.
    """

    def asked() -> bool:
        logs = sorted(work.glob("runs/*/*/node0/supervisor.log"), key=lambda path: path.stat().st_mtime)
        return "asked to stop" in logs[-1].read_text()

    with frozen(work, 0):
        process.send_signal(number)
        wait_for(asked, "the supervisor to be asked to stop", 60)


def spoil_arenas(work: Path) -> int:
    """Fill what a supervisor below the folder keeps for its ranks with ones (NaN as a number); none of them may run."""
    supervisor = _of_kind(work, "supervisor")
    assert supervisor is not None, "no supervisor runs"
    spoiled = 0
    for entry in Path(f"/proc/{supervisor}/fd").iterdir():
        try:
            if "hotstage-arena" not in os.readlink(entry):
                continue
        except FileNotFoundError:
            continue  # the supervisor works on, and has closed it since the listing
        size = entry.stat().st_size
        entry.write_bytes(b"\xff" * size)
        spoiled += size
    return spoiled


def spoil_slots(work: Path) -> int:
    """One bit flipped in the data of every snapshot in memory of the agent below the folder, but one that it holds: it
    may have summed what it is just writing. How many there were. None of its ranks may run.
    """
    agent = _of_kind(work, "agent")
    assert agent is not None, "no agent runs"
    spoiled = set()
    for entry in Path(f"/proc/{agent}/fd").iterdir():
        if "memfd:hotstage-slot" not in os.readlink(entry) or (inode := entry.stat().st_ino) in spoiled:
            continue
        with entry.open("r+b", buffering=0) as slot:
            header = wire.SlotHeader.from_buffer_copy(os.pread(slot.fileno(), ctypes.sizeof(wire.SlotHeader), 0))
            if header.state == wire.SLOT_READY and not header.hold:
                at = header.data_offset + header.data_bytes // 2
                os.pwrite(slot.fileno(), bytes([os.pread(slot.fileno(), 1, at)[0] ^ 16]), at)
                spoiled.add(inode)
    return len(spoiled)


def kill_between_attempts(work: Path, rank: int, during: Callable[[], None], *, ahead: int = 0) -> None:
    """SIGKILL of a rank; ``during`` runs when no rank is left, before the agent hears of it. ``ahead``: steps that the
    gang does meanwhile, whose snapshots are in memory alone. A rank 0 that stands still goes on.
    """
    agent, pid = _of_kind(work, "agent"), rank_pid(work, rank)
    assert agent is not None, "no agent runs"
    assert pid is not None, f"rank {rank} does not run"
    os.kill(agent, signal.SIGSTOP)
    try:
        end = (step_of(pid) or 0) + ahead
        if (first := rank_pid(work, 0)) is not None:
            os.kill(first, signal.SIGCONT)
        wait_for(lambda: (step_of(pid) or 0) >= end, f"step {end}", 30)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(args[1:2] == ["rank"] for _, args in pids_below(work)), "the ranks to end", 30)
        during()
    finally:
        os.kill(agent, signal.SIGCONT)


# --- the watcher ------------------------------------------------------------------------------------------


def pids_below(work: Path, strangers: Collection[int] = (), word: str = "") -> Iterator[tuple[int, list[str]]]:
    """Processes that work below a folder, with their arguments, which hold ``word``. ``strangers``: they are not
    looked at.
    """
    folder, wanted = str(work), word.encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in strangers:
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb", buffering=0) as file:
                line = file.read()
            if wanted not in line:  # a test looks at every process again and again: most end here
                continue
            args = line.decode(errors="replace").split("\0")
            if folder in line.decode(errors="replace") or folder in os.readlink(f"/proc/{name}/cwd"):
                yield int(name), args
        except OSError:
            continue


def rank_pid(work: Path, rank: int, strangers: Collection[int] = ()) -> int | None:
    """The process of a rank below this folder; None where it does not run."""
    for pid, args in pids_below(work, strangers, "--rank"):
        if "rank" in args[1:2] and args[args.index("--rank") + 1] == str(rank):
            return pid
    return None


def _page_of(pid: int) -> int | None:
    """A descriptor of the rank's page, opened through its own table."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        for entry in folder.iterdir():
            if "hotstage-rank-page" in os.readlink(entry):
                return os.open(entry, os.O_RDONLY)
    except OSError:
        return None
    return None


def step_of(pid: int) -> int | None:
    """The step that a rank's process is in, from its own page; None where it is gone."""
    page = _page_of(pid)
    if page is None:
        return None
    try:
        return int(_PAGE.unpack(os.pread(page, _PAGE.size, 0))[1])
    except OSError:
        return None
    finally:
        os.close(page)


def rank_step(work: Path, rank: int) -> int | None:
    """The same of a rank below this folder; None where it does not run."""
    pid = rank_pid(work, rank)
    return step_of(pid) if pid else None


def _kill(pid: int) -> bool:
    """Whether it was there to be killed."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class _Checked:
    """Whether the step before the newest one has been checked since that began: its optimizer ran behind forwards."""

    def __init__(self) -> None:
        self.newest, self.yes = 0, False

    def see(self, step: int, kind: int) -> None:
        if step > self.newest:
            self.newest, self.yes = step, False
        elif step < self.newest and kind != wire.A_SEND:  # a report leaves later
            self.yes = True


def _in_rank(fault: Fault, work: Path, deadline: float) -> bool:
    """Look at the rank's page until it is at the place in that step (or a later one: a short one may be missed); from
    the step before that on without a pause.
    """
    kind, op = _KINDS[fault.place]
    checked = _Checked()
    strangers = _strangers(work)
    while time.monotonic() < deadline:
        pid = rank_pid(work, fault.rank, strangers)
        page = _page_of(pid) if pid else None
        if pid is None or page is None:
            time.sleep(0.005)
            continue
        try:
            while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
                for _ in range(2000):
                    _, step, _, now, letter, _, _ = _PAGE.unpack(os.pread(page, _PAGE.size, 0))
                    checked.see(step, now)
                    there = step >= fault.step and now == kind and (op is None or letter == ord(op))
                    if there and (fault.place != "again" or checked.yes) and _kill(pid):
                        return True
                    if step < fault.step - 1:
                        time.sleep(0.0005)
                        break
        except OSError:
            pass
        finally:
            os.close(page)
    return False


def _strangers(work: Path) -> set[int]:
    """What runs now and does not work below the folder: it need not be looked at again."""
    all_of_now = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # before: what begins meanwhile is none
    return all_of_now - {pid for pid, _ in pids_below(work)}


def _of_kind(work: Path, word: str) -> int | None:
    for pid, args in pids_below(work):
        if word == "agent" and "checkpoint.agent" in args:
            return pid
        if word == "supervisor" and args[1:2] == ["node"]:
            return pid
        if word == "driver" and "flows.cli" in args:
            return pid
        if word == "store" and "--versioning-dir" in args:
            return pid
    return None


class Held:
    """Rank 0 below a folder, which stands still for a while each few steps from one on: what its node and its driver do
    of that step has time to be seen, and the run does not end before. Each time for twice as long: also a run of few
    steps takes minutes, which nobody needs but on a machine that is very busy."""

    STEPS, S, MOST_S = 8, 0.25, 15.0
    """There is a snapshot that goes to the store in so many steps."""

    def __init__(self, work: Path, step: int, but: Collection[int] = ()) -> None:
        self._work, self._strangers, self._next = work, {*_strangers(work), *but}, step + self.STEPS
        self._rank: int | None = None  # where it was found: a look at all processes takes longer than a few steps
        self._pid: int | None = None
        self._until, self._s = 0.0, self.S
        self._kept = self._stands = False

    def look(self) -> None:
        now = time.monotonic()
        if self._pid is not None and now > self._until and not self._kept:
            self.release()
        if self._pid is None:
            step = step_of(self._rank) if self._rank is not None else None
            if step is None:
                self._rank = rank_pid(self._work, 0, self._strangers)
                step = step_of(self._rank) if self._rank is not None else None
            pid = self._rank
            if pid is not None and step is not None and (self._kept or step > self._next):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    self._pid, self._until, self._next = pid, now + self._s, step + self.STEPS
                    self._s = min(2 * self._s, self.MOST_S)
        self._stands = self._kept and self._pid is not None

    def keep(self) -> None:
        """From here on it stands still until it is released; somebody else looks."""
        self._kept = True
        wait_for(lambda: self._stands, "rank 0 to run and to stand still", 60)

    def release(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGCONT)
            self._pid = None


def _outside(fault: Fault, run_folder: Path, work: Path, deadline: float) -> bool:
    """Kill agent, supervisor, driver or store when the store shows the place: a chunk (upload, store), a part without
    its record (commit), a manifest that is being told (driver).
    """
    word = "agent" if fault.place in ("upload", "commit") else fault.place
    pattern = {
        "upload": "chunks/*/*",
        "commit": "manifests/*/parts/*",
        "agent": "live/*/metrics/*",
        "supervisor": "live/*/metrics/*",
        "driver": "manifests/*/manifest",
        "store": "chunks/*/*",
    }[fault.place]
    while time.monotonic() < deadline:
        for found in run_folder.glob(pattern):
            if "live" not in pattern:
                step = int(found.relative_to(run_folder).parts[1].split("-")[0])
                there = step >= fault.step
            else:
                there = _last_step(found) >= fault.step
            pid = _of_kind(work, word) if there else None
            if pid is not None and _kill(pid):
                return True
        time.sleep(0.002)
    return False


def _last_step(segment: Path) -> int:
    try:
        return max((json.loads(line).get("step", 0) for line in segment.read_bytes().splitlines()), default=0)
    except (OSError, ValueError):
        return 0


def main() -> int:
    fault, run_folder, work = Fault.parse(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    deadline = time.monotonic() + _PATIENCE_S
    struck = _in_rank(fault, work, deadline) if fault.place in _KINDS else _outside(fault, run_folder, work, deadline)
    return 0 if struck else 1


if __name__ == "__main__":
    sys.exit(main())
