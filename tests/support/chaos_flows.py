"""Real processes of flows, killed again and again: ``make chaos-flows N=100 SEED=1``.

A Prefect server, a ``hotstage schedule`` of short runs, and whoever drives them, on a folder store. At seeded moments
the driver, the schedule's process or the server gets SIGKILL or SIGTERM; what an init system would start again is
started again. No rank, supervisor or agent is ever touched: so a run with a second attempt is one whose healthy gang
was killed. At the end every run has ended, with the digest of an undisturbed one, nothing of it is left running, and
Prefect shows no flow run as going on.

Uses what ``tests/support/chaos.py`` sees of processes from outside.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store, open_store
from flows.drive.driving import Ears
from flows.drive.run import run_names
from flows.prefect_api import OPEN_STATES
from flows.prefect_server import PrefectServer
from tests.support.chaos import pids_below
from tests.support.place import LASTING, ROOT, Place
from tests.support.prefect import Api
from tests.support.wait import wait_for

VICTIMS = ("driver", "schedule", "server", "driver", "schedule", "driver")  # four kills are of all three
PATIENCE_S = 120.0
LOOK_S = 0.1  # a look folds every log, or asks the server
SETTINGS = {"PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "1"}


@dataclass
class Campaign:
    """What came of it."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    adopted_s: list[float] = field(default_factory=list)
    """After a kill, until the run that went on had a driver again; looked at from outside, on a busy machine."""
    runs: int = 0
    found: dict[str, list[str]] = field(
        default_factory=lambda: {kind: [] for kind in ("duplicates", "orphans", "killed", "differ")}
    )

    def line(self) -> str:
        n = {kind: len(found) for kind, found in self.found.items()}
        return (
            f"{self.kills.total()} kills, {n['duplicates']} duplicates, {n['orphans']} orphans, "
            f"{n['killed']} healthy gangs killed, {n['differ']} digests differ"
        )

    @property
    def good(self) -> bool:
        return not any(self.found.values())


class Scene:
    """The processes, and what is seen of them from outside."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.campaign, self.rng = Campaign(seed), random.Random(seed)
        self.server = PrefectServer(folder / "prefect", settings=SETTINGS)
        self._serve()
        env = {**self.server.environment(), "PREFECT_HOME": str(folder / "client")}
        self.place = Place(folder / "p", LASTING, env=env)
        self.store: Store = open_store(f"file://{self.place.folder / 'store'}")
        self.log = (folder / "schedule.log").open("ab")
        self.schedule: subprocess.Popen[bytes] | None = None
        self.over = threading.Event()
        self._twice: set[str] = set()
        self.watcher = threading.Thread(target=self._watch, name="witness", daemon=True)
        self.watcher.start()

    def close(self) -> None:
        self.over.set()
        self.watcher.join()
        for process in (self.schedule, self.server.process):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self.place.stop_all()
        self.server.stop()
        self.log.close()

    def _serve(self) -> None:
        self.server.start()
        assert self.server.wait(180), (self.server.home or Path()) / "server.log"

    def hotstage(self, *args: str) -> subprocess.Popen[bytes]:
        env = self.place.env | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            self.place.command(*args), cwd=self.place.folder, env=env, stdout=self.log, stderr=self.log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start_schedule(self) -> None:
        sets = ["--set", "parallel.stages=1", "--set", "name='often'"]
        self.schedule = self.hotstage("schedule", "spec.toml", "--interval", "2", *sets)

    def keep_schedule(self) -> None:
        """As an init system does: one that came while the server was away has refused to begin."""
        if self.schedule is not None and self.schedule.poll() is not None:
            self.start_schedule()

    # --- what is seen ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Two supervisors of one node, at any moment."""
        while not self.over.wait(0.25):
            homes = Counter[str]()
            for pid, args in pids_below(self.place.folder):
                if args[1:2] == ["node"]:
                    try:
                        homes[os.readlink(f"/proc/{pid}/cwd")] += 1
                    except OSError:
                        continue
            self._twice |= {home for home, count in homes.items() if count > 1}

    def states(self) -> dict[str, RunState]:
        found = {}
        for name in run_names(self.store):
            try:
                found[name] = RunLog(self.store, name).fold()
            except CheckpointError:
                continue
        return found

    def going(self) -> str | None:
        """A run that has begun to train and has not ended."""
        for name, state in self.states().items():
            if state.attempts and state.ended is None and any(self.place.run_folder(name).glob("live/*/metrics/*")):
                return name
        return None

    def driver_of(self, run: str) -> int | None:
        """Of a run's drivers one that lives."""
        ears = Ears(self.store, run)
        word = ears.listen()
        if not word.driven:
            return None
        alive = [note for note in ears.known() if not note.left and note.runs]
        return max(alive, key=lambda note: note.at).pid if alive else None

    def open_flow_runs(self) -> list[str]:
        rows = Api(self.server).flow_runs(state={"type": {"any_": list(OPEN_STATES)}})
        return [f"{row['name']} ({row['state_type']})" for row in rows]

    # --- kills ----------------------------------------------------------------------------------------------

    def kill_one(self, victim: str) -> None:
        rng = self.rng

        def trains() -> bool:
            self.keep_schedule()
            return self.going() is not None

        wait_for(trains, "a run that trains", PATIENCE_S, LOOK_S)
        time.sleep(rng.uniform(0.0, 1.5))
        run = self.going()
        how = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        assert self.schedule is not None
        if victim == "server":
            self._kill_server(how)
        elif victim == "driver" and run is not None:
            pid = self.driver_of(run)
            if pid is None or pid == self.schedule.pid or not _signalled(pid, how):
                victim = "schedule"
        if victim == "schedule":
            self._kill_schedule(how)
        self.campaign.kills[f"{victim} {how.name}"] += 1
        if run is not None and victim != "server":
            self._adopted(run)

    def _kill_schedule(self, how: signal.Signals) -> None:
        assert self.schedule is not None
        self.schedule.send_signal(how)
        try:
            self.schedule.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.campaign.found["orphans"].append("the schedule does not end on SIGTERM")
            self.schedule.kill()
        self.start_schedule()

    def _kill_server(self, how: signal.Signals) -> None:
        process = self.server.process
        assert process is not None
        os.killpg(process.pid, how)  # a session of its own
        process.wait()
        time.sleep(self.rng.uniform(0.0, 2.0))
        self._serve()

    def _adopted(self, run: str) -> None:
        began = time.monotonic()

        def driven() -> bool:
            self.keep_schedule()
            ended = RunLog(self.store, run).fold().ended
            return ended is not None or self.driver_of(run) is not None

        try:
            wait_for(driven, f"a driver of {run}", PATIENCE_S, LOOK_S)
        except AssertionError as error:
            self.campaign.found["orphans"].append(str(error))
        self.campaign.adopted_s.append(time.monotonic() - began)

    def evidence(self) -> str:
        """For whoever asks why it came to a standstill: its folder goes with it."""
        runs = {
            name: (len(state.attempts), state.ended and state.ended.outcome) for name, state in self.states().items()
        }
        said = Path(self.log.name).read_text(errors="replace").splitlines()
        said = [line for line in said if not line.startswith("skipped ")][-60:]  # one in two seconds
        open_ones = Api(self.server).flow_runs(state={"type": {"any_": list(OPEN_STATES)}})
        told = [
            *(f"flow run {row['name']}: {row['state_type']}, of {row['infrastructure_pid']}" for row in open_ones),
            f"kills: {dict(self.campaign.kills)}",
            f"runs, attempts and ends: {runs}",
            f"they run: {self.place.left()}",
        ]
        return "\n".join([*told, "what the schedule and its drivers said last:", *said])

    # --- the end --------------------------------------------------------------------------------------------

    def end(self, digest: str) -> None:
        campaign, found = self.campaign, self.campaign.found
        assert self.schedule is not None
        self.schedule.terminate()
        self.schedule.wait(PATIENCE_S)
        care = self.hotstage("reconcile", "--every", "0.5")
        try:
            for what, left in (
                ("a run goes on for ever", lambda: [n for n, s in self.states().items() if s.attempts and not s.ended]),
                ("Prefect shows it as going on", self.open_flow_runs),
            ):
                try:
                    wait_for(lambda left=left: not left(), what, PATIENCE_S, LOOK_S)  # type: ignore[misc]
                except AssertionError:
                    found["orphans"] += [f"{what}: {one}" for one in left()]
        finally:
            care.terminate()
            care.wait(PATIENCE_S)
        try:
            self.place.all_gone(30)
        except AssertionError:
            found["orphans"] += [f"it runs on: {line[:160]}" for line in self.place.left().values()]
        found["duplicates"] += [f"two supervisors in {home}" for home in sorted(self._twice)]
        for name, state in self.states().items():
            if not state.attempts:
                continue
            campaign.runs += 1
            found["killed"] += [
                f"{name}, attempt {a.epoch}: {a.reason} {a.body.get('cause')}" for a in state.attempts[1:]
            ]
            ended = state.ended
            if ended is not None and (ended.outcome, ended.state_digest) != ("succeeded", digest):
                found["differ"].append(f"{name}: {ended.outcome} {ended.reason[:120]} {ended.state_digest}")


def _signalled(pid: int, how: signal.Signals) -> bool:
    """Whether it was still there: a driver may have ended by itself since it was seen."""
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return False
    return True


def run(kills: int, seed: int, folder: Path, digest: str) -> Campaign:
    """So many kills, one after the other. ``digest``: of the same spec, undisturbed."""
    scene = Scene(folder, seed)
    try:
        scene.start_schedule()
        victims = [VICTIMS[i % len(VICTIMS)] for i in range(kills)]
        scene.rng.shuffle(victims)
        for victim in victims:
            scene.kill_one(victim)
        scene.end(digest)
    except AssertionError:
        print(scene.evidence(), file=sys.stderr)
        raise
    finally:
        scene.close()
    return scene.campaign


def report(campaign: Campaign) -> str:
    """For people; the last line is the one that others read."""
    kills = ", ".join(f"{count} {what}" for what, count in sorted(campaign.kills.items()))
    waits = sorted(campaign.adopted_s) or [0.0]
    lines = [
        f"seed {campaign.seed}: {campaign.runs} runs; {kills}; a driver again after {waits[len(waits) // 2]:.1f} s "
        f"({waits[-1]:.1f} s at most)"
    ]
    for kind, found in campaign.found.items():
        lines += [f"{kind}: {text}" for text in found[:20]]
    return "\n".join([*lines, campaign.line()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos-flows", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "undisturbed", LASTING)
        digest = str(place.train("parallel.stages=1")["state_digest"])
        campaign = run(asked.kills, asked.seed, Path(folder) / "scene", digest)
        print(report(campaign), flush=True)
    return 0 if campaign.good else 1


if __name__ == "__main__":
    sys.exit(main())
