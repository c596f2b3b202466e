"""One run on the simulated cluster: its log, what is true of it, and who witnesses it.

The witness keeps what it finds by kind: ``killed`` (a gang that was well was ended, or a launch given up before its
time), ``wrong`` (a give-up, or a checkpoint called damaged, whose reason is not true), ``orphans`` (what runs on after
the run or its launch is over; a run that could go on and does not), ``duplicates`` (two gangs at once, a record that
counts of one that was fenced).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checkpoint import keys
from checkpoint.errors import CheckpointError, Conflict, Halted
from checkpoint.log import RunLog, RunState
from checkpoint.log.records import Record
from checkpoint.store.memory import MemoryStore
from flows.drive.orders import Asked, place_order
from flows.drive.run import Prepared
from k8s.diagnosis import launch_view
from tests.support.protocol.hub import Hub
from tests.support.simulated import model
from tests.support.simulated.cluster import Gang, Launch, Machine, Pod, Strike
from tests.support.simulated.drivers import SimulatedDriver
from trainer.failures import FAILURES, Again, Failure
from trainer.launch import Finding, LaunchView
from trainer.spec import how_map
from trainer.spec_layouts import other_hows

MACHINES = 6
STUCK_S = 4 * 3600.0
KINDS = ("killed", "wrong", "orphans", "duplicates")


class World:
    def __init__(self, seed: int, base: MemoryStore, prepared: Prepared, two: bool) -> None:
        self.hub = Hub(seed)
        self.seed, self.prepared, self.run = seed, prepared, prepared.run
        self.steps = prepared.spec.train.steps
        self.shared = MemoryStore(clock=self.hub.clock)
        self.shared._objects = dict(base._objects)
        self.shared._written = dict(base._written)
        self.state = RunState(self.run)
        self.machines = [Machine(f"m{n}") for n in range(MACHINES)]
        self.launches: dict[str, Launch] = {}
        self.gangs: dict[int, Gang] = {}
        self.found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.strikes: list[Strike] = []
        self.struck: dict[Failure, int] = {}
        self.account = model.Account()
        self.segments: list[tuple[int, int, float]] = []
        self.outcome = ""
        self.version = 0
        self.store_away_until = self.api_away_until = 0.0
        # what lasts until somebody mends it
        self.curses: list[tuple[Failure, int]] = []  # (class, step or batch)
        self.bad: set[int] = set()  # checkpoint records whose objects are damaged
        self.misreads = 0
        self.leaks = self.data_bad = self.image_bad = False
        self.given_up_at: float | None = None
        self.resumed_at = 0.0
        self.came_further_at = self.saved_at = 0.0
        self.best = 0
        self.give_ups: list[str] = []
        self.placing = False
        hows = [how_map(prepared.spec), *other_hows(how_map(prepared.spec))]
        self.least_nodes = min(int(how["launch"]["nodes"]) for how in hows)
        self.drivers = [SimulatedDriver(self) for _ in range(2 if two else 1)]
        self.after(60.0, self._measure)

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self.hub.at(delay, None, call)

    def find(self, kind: str, why: str) -> None:
        self.found[kind].append(f"hour {self.hub.now / 3600:.2f}: {why}")

    def changed(self) -> None:
        """Something that a driver may see."""
        self.version += 1
        for driver in self.drivers:
            driver.look_soon()

    @property
    def newest(self) -> Gang | None:
        return self.gangs.get(self.state.epoch)

    # --- the log --------------------------------------------------------------------------------------------

    def wrote(self, key: str, data: bytes) -> None:
        """A record landed."""
        n = self.state.n + 1
        if key != keys.log_key(self.run, n):
            return
        record, before = Record.parse(data, n), self.state
        state = self.state = before.apply(record)
        if record.kind == "attempt":
            self._attempt(before, state)
        elif record.kind == "checkpoint":
            self._checkpoint(before, state, record)
        elif record.kind == "damaged":
            self._damaged(state)
        elif record.kind == "ended":
            self._ended(state)
        for launch in self.launches.values():
            for pod in launch.pods:
                if not pod.gone:
                    self.after(self.hub.rng.uniform(*model.LOG_S), pod.hear)
        self.changed()

    def _attempt(self, before: RunState, state: RunState) -> None:
        newest = state.newest_attempt
        assert newest is not None
        old = self.gangs.get(before.epoch)
        if old is not None and old.struck is None and before.ended is None:
            launch = self.launches.get(old.launch)
            pods = launch.pods if launch is not None else []
            waited = self.hub.now - launch.waits_since if launch is not None else 0.0
            capacity_s = self.prepared.spec.recovery.capacity_s
            if any(pod.lost for pod in pods):
                pass  # it could not become whole
            elif pods and all(pod.machine is not None for pod in pods):
                self.find(
                    "killed", f"attempt {old.epoch} was well, and attempt {newest.epoch} ends it: {newest.reason}"
                )
            elif waited < 0.9 * capacity_s:
                self.find(
                    "killed", f"attempt {old.epoch} had waited {waited:.0f} s of {capacity_s:.0f}: {newest.reason}"
                )
        self.gangs[newest.epoch] = gang = Gang(self, newest)
        gang.state = state
        if newest.launch != (before.newest_attempt.launch if before.newest_attempt else ""):
            self.after(900.0, lambda: self._left_over(newest.launch))

    def _left_over(self, launch: str) -> None:
        """What of other launches still lives long after this one began, though it can be reached."""
        now = self.state.newest_attempt
        for other in self.launches.values():
            lives = [p for p in other.pods if p.lives and not p.cut and self.hub.now - p.back_at > 300.0]
            if now is not None and other.name not in (launch, now.launch) and lives:
                self.find("orphans", f"{len(lives)} pods of {other.name} live long after {launch} began")

    def _checkpoint(self, before: RunState, state: RunState, record: Record) -> None:
        if len(state.checkpoints) == len(before.checkpoints):
            return  # void
        if record.epoch != before.epoch:
            self.find("duplicates", f"a checkpoint of attempt {record.epoch} counts in attempt {before.epoch}")
        newest = state.checkpoints[-1]
        if newest.step > self.best:
            self.best, self.came_further_at, self.saved_at = newest.step, self.hub.now, self.hub.now

    def _damaged(self, state: RunState) -> None:
        for n in state.damaged:
            if n not in self.bad and self.misreads < 2:
                self.find("wrong", f"checkpoint {n} is called damaged, and is not")

    def _ended(self, state: RunState) -> None:
        ended = state.ended
        assert ended is not None
        gang = self.gangs.get(state.epoch)
        if ended.outcome == "gave_up":
            self.give_ups.append(ended.failure)
            wrong = self._untrue(ended.failure, ended.reason)
            if wrong:
                self.find("wrong", f"it gave up: {ended.reason[:160]} ({wrong})")
            if gang is not None and gang.struck is None and gang.runs:
                self.find("killed", f"attempt {gang.epoch} was well when the run gave up")
            self.given_up_at = self.hub.now
            self.after(model.PERSON_S, self._resume)
            return
        self.outcome = ended.outcome
        self.after(400.0, self._nothing_left)

    def _nothing_left(self) -> None:
        lives = [pod for launch in self.launches.values() for pod in launch.pods if pod.lives and not pod.cut]
        if lives:
            self.find("orphans", f"{len(lives)} pods live on after the run's end")

    def _untrue(self, cls: str, reason: str) -> str:
        """What speaks against this reason; empty where it is true."""
        failure = Failure.read(cls)
        if failure is None:
            return f"{cls!r} is no class"
        since = [s for s in self.strikes if s.at >= self.resumed_at]
        mine = [s for s in since if failure in s.classes]
        if not mine or (mine[-1].epoch != self.state.epoch and "attempts in a row" not in reason):
            return f"nothing of class {failure} struck attempt {self.state.epoch}"
        last = mine[-1]
        if "attempts in a row" in reason:
            tried = self.state.attempts
            after = [*tried[1:], None]
            failed = [
                a
                for a, b in zip(tried, after, strict=True)
                if b is None or (b.body["cause"] and not b.body.get("pardon"))
            ]
            epochs = [a.epoch for a in failed][-8:]
            unstruck = [e for e in epochs if not self._failed(e)]
            return f"attempts {unstruck} were not struck" if unstruck else ""
        match FAILURES[failure].again:
            case Again.NEVER:
                return ""
            case Again.ONCE:
                since_then = [s for s in mine if s.at >= self.saved_at - 2 * model.UPLOAD_S]  # one that was under way
                return "" if len(since_then) > 1 else "it was the first since progress"
            case Again.ONCE_A_PLACE:
                there = [s.epoch for s in mine if s.place == last.place]
                if len(there) < 2:
                    return "it was the first of that machine"
                used = any(
                    last.place in (a.body.get("pardon") or ()) for a in self.state.attempts if a.epoch > there[0]
                )
                return "" if used else "nothing was tried on other machines"
            case Again.SAME_STEP:
                same = sum(s.step == last.step for s in mine)
                return "" if last.lasting or same > 1 else "it would not come again"
            case Again.FREELY:
                return "" if failure is Failure.RESTORE and self.bad else "such failures are no reason to give up"
        return "?"

    def _failed(self, epoch: int) -> bool:
        """Whether something struck that attempt, or a machine of its launch had been lost before it."""
        launch = self.launches.get(self.gangs[epoch].launch)
        lost = launch is not None and any(pod.lost for pod in launch.pods)
        return lost or any(s.epoch == epoch for s in self.strikes)

    def _resume(self) -> None:
        """A person has mended what was wrong, and says so."""
        now = self.hub.now
        if now < self.store_away_until:
            self.after(60.0, self._resume)
            return
        self.curses.clear()
        self.leaks = self.data_bad = self.image_bad = False
        for machine in self.machines:
            machine.sick = False
        assert self.given_up_at is not None
        self.account.person_s += now - self.given_up_at
        self.given_up_at, self.resumed_at = None, now
        place_order(Landing(self), self.prepared, Asked("runs resume", again=True))  # type: ignore[arg-type]
        self.drivers = [d for d in self.drivers if d.alive] or [SimulatedDriver(self)]

    # --- gangs ----------------------------------------------------------------------------------------------

    def strike(self, gang: Gang, *classes: Failure, pod: Pod | None = None, lasting: bool = False) -> None:
        """From here on the gang is not well, and this is why."""
        place = pod.place if pod is not None else ""
        found = Strike(self.hub.now, gang.epoch, classes, place, gang.step(self.hub.now), lasting)
        self.strikes.append(found)
        self.struck[classes[0]] = self.struck.get(classes[0], 0) + 1
        gang.struck = gang.struck or found

    def refuses_to_start(self, gang: Gang, pod: Pod, held: bool) -> bool:
        """Whether something keeps its rank from starting."""
        machine = pod.machine
        reads = gang.slots is None and gang.checkpoint is not None
        if machine is not None and machine.sick:
            self.strike(gang, Failure.SICK, pod=pod, lasting=True)
            pod.end_rank(code=88, words='{"why": "the product of the check differs"}')
        elif not held:
            self.strike(gang, Failure.RESTORE, pod=pod)
            pod.end_rank(code=76, words='{"why": "the slot is not there"}')
        elif reads and gang.checkpoint in self.bad:
            self.strike(gang, Failure.RESTORE, pod=pod, lasting=True)
            pod.end_rank(code=76, words='{"why": "a chunk is damaged"}')
        elif reads and self.misreads == 1:
            self.misreads = 2 if self.hub.rng.random() < 0.02 else 0
            self.strike(gang, Failure.RESTORE, pod=pod)
            pod.end_rank(code=76, words='{"why": "a chunk was read wrongly"}')
        elif self.data_bad:
            self.strike(gang, Failure.DATA, pod=pod, lasting=True)
            pod.end_rank(code=65, words='{"why": "shard 3 has another digest"}')
        else:
            return False
        return True

    def lonely(self, gang: Gang) -> None:
        """Ranks that wait for peers give up."""
        if gang.since is None and gang.stood is None:
            for pod in self.launches[gang.launch].pods:
                pod.end_if(gang, code=75, words='{"why": "no connection"}')
            if gang.struck is None:
                self.strike(gang, Failure.INFRA)

    def starts(self, gang: Gang) -> None:
        for other in self.gangs.values():
            if other is not gang and other.runs and not other.cut:
                self.find("duplicates", f"attempts {other.epoch} and {gang.epoch} train at once")
        if gang.since is not None:
            self.find("duplicates", f"attempt {gang.epoch} starts twice")
        gang.since = self.hub.now
        for pod in self.launches[gang.launch].pods:
            if pod.gang is gang:
                pod.runs_now()
        for cls, at in self.curses:
            step = self._hits(gang, cls, at)
            if step is not None and gang.base < step <= self.steps:
                self.after(
                    gang.time_of(step) - self.hub.now + 0.1, lambda c=cls, s=step, a=at: self._cursed(gang, c, s, a)
                )
        if self.leaks:
            self.after(30.0, lambda: self._leak(gang))
        self._next_upload(gang, (gang.base // model.DURABLE_STEPS + 1) * model.DURABLE_STEPS)

    def _hits(self, gang: Gang, cls: Failure, at: int) -> int | None:
        """The step in which a lasting fault comes: of numbers it is a batch's, which an order may skip."""
        if cls is not Failure.NUMERIC:
            return at
        return next((s for s in range(at, max(0, at - 2000), -1) if gang.amendments.batch(s) == at), None)

    def _cursed(self, gang: Gang, cls: Failure, step: int, at: int) -> None:
        if (cls, at) in self.curses and gang.runs and gang.step(self.hub.now) >= step:
            pod = self.hub.rng.choice(self.launches[gang.launch].pods)
            self.strike(gang, cls, pod=pod, lasting=True)
            pod.end_rank(**ENDS[cls])

    def _leak(self, gang: Gang) -> None:
        if self.leaks and gang.runs:
            pod = self.hub.rng.choice(self.launches[gang.launch].pods)
            self.strike(gang, Failure.MEMORY, pod=pod, lasting=True)
            pod.end_rank(signal=9, memory=1 << 30)

    def _next_upload(self, gang: Gang, step: int) -> None:
        step = min(step, self.steps)
        when = gang.time_of(step) - self.hub.now + model.UPLOAD_S
        self.after(max(when, 0.0), lambda: self._upload(gang, step, self.hub.now))

    def _upload(self, gang: Gang, step: int, began: float) -> None:
        """A checkpoint's objects are there; its record."""
        now = self.hub.now
        pods = [pod for pod in self.launches[gang.launch].pods if pod.gang is gang]
        if gang.step(now) < step or len(pods) < gang.ranks or not all(pod.lives for pod in pods):
            return
        if now < self.store_away_until or gang.cut:
            if now - began < 600.0:
                self.after(20.0, lambda: self._upload(gang, step, began))
            elif step < self.steps:
                self._next_upload(gang, (gang.step(now) // model.DURABLE_STEPS + 1) * model.DURABLE_STEPS)
            return
        self.commit(gang, step)
        if step >= self.steps:
            for pod in pods:
                pod.end_if(gang, code=0)
        elif gang.runs:
            self._next_upload(gang, step + model.DURABLE_STEPS)

    def commit(self, gang: Gang, step: int) -> None:
        """Its agents append the record, by what they know of the log."""
        manifest = keys.manifest_name(step, gang.epoch)
        body = {"step": step, "manifest": manifest, "bytes": 1, "sha256": "0" * 64, "state_digest": "1" * 64,
                "parts": gang.ranks, "data_position": step * 8}  # fmt: skip
        log = RunLog(Landing(self), self.run, writer="agent", clock=self.hub.clock)  # type: ignore[arg-type]
        assert gang.state is not None
        for _ in range(40):
            try:
                gang.state = log.append("checkpoint", body, gang.state, epoch=gang.epoch)
                return
            except Conflict as conflict:
                gang.state = conflict.state
            except (Halted, CheckpointError):
                return

    def trained(self, gang: Gang, step: int) -> None:
        """A gang stands: what it did from its base on is the run's, until another goes on from before that."""
        self.segments = [(a, min(b, gang.base), s) for a, b, s in self.segments if a < gang.base]
        if step > gang.base:
            self.segments.append((gang.base, step, gang.ideal_s))

    def saves_and_leaves(self, gang: Gang) -> None:
        """All ranks save one agreed step and leave."""
        if not gang.runs:
            return
        gang.stop()
        step = gang.step(self.hub.now)
        for pod in self.launches[gang.launch].pods:
            if pod.gang is gang and pod.lives and pod.rank is not None and not pod.rank.gone:
                pod.rank.step, pod.rank.code, pod.phase = step, 85, "ended"
                pod.kept = [(step, gang.epoch), *pod.kept][:2]
                pod.note()
        pods = [pod for pod in self.launches[gang.launch].pods if pod.gang is gang]

        def stored() -> None:
            if all(pod.lives for pod in pods) and self.hub.now >= self.store_away_until:
                self.commit(gang, step)

        self.after(25.0, stored)

    # --- the launcher ---------------------------------------------------------------------------------------

    def ensure(self, name: str, nodes: int, avoid: tuple[str, ...]) -> None:
        if name not in self.launches:
            self.launches[name] = Launch(self, name, nodes, avoid)
            self.place_soon()
            self.changed()

    def place_soon(self) -> None:
        if not self.placing:
            self.placing = True
            self.after(self.hub.rng.uniform(1.0, 5.0), self._place)

    def _place(self) -> None:
        self.placing = False
        wants = [launch for launch in self.launches.values() if launch.deleted is None and not launch.failed]
        for launch in wants:
            for pod in launch.pods:
                free = [m for m in self.machines if m.free and m.name not in launch.avoid]
                if pod.machine is None and not pod.gone and not pod.deleting and free:
                    machine = self.hub.rng.choice(free)
                    machine.pod, pod.machine, pod.place = pod, machine, machine.name
                    self.changed()
                    self.after(self.hub.rng.uniform(*model.PLACED_S), lambda pod=pod: self._up(pod))
            if any(pod.machine is None and not pod.gone for pod in launch.pods):
                if not self.placing:
                    self.placing = True
                    self.after(15.0, self._place)
            else:
                launch.waits_since = self.hub.now

    def _up(self, pod: Pod) -> None:
        gang = self.newest
        if pod.gone or pod.deleting or pod.machine is None or not pod.machine.up:
            return
        if self.image_bad:
            pod.launch.broken_image = True
            if gang is not None and gang.launch == pod.launch.name and gang.struck is None:
                self.strike(gang, Failure.CONFIG, pod=pod, lasting=True)
            self.changed()
            return
        pod.running = True
        pod.note()
        pod.hear()

    def stop(self, name: str) -> None:
        """Its Job is deleted."""
        launch = self.launches.get(name)
        if launch is None or launch.deleted is not None:
            return
        gang = self.newest
        well = gang is not None and gang.launch == name and gang.struck is None and not any(p.lost for p in launch.pods)
        if gang is not None and well and self.state.ended is None:
            self.find("killed", f"launch {name} of attempt {gang.epoch} was stopped")
        launch.deleted = self.hub.now
        for pod in launch.pods:
            pod.deleting = True
            if not pod.cut:
                self.after(self.hub.rng.uniform(3.0, 10.0), pod.go)
        self.changed()

    def pod_failed(self, pod: Pod) -> None:
        """The Job ends with a pod of it."""
        launch = pod.launch
        if launch.failed or launch.deleted is not None:
            return
        launch.failed = True
        for other in launch.pods:
            if other is not pod:
                other.deleting = True
                self.after(self.hub.rng.uniform(4.0, 12.0), other.go)
        self.changed()

    def view(self, name: str, since: float) -> LaunchView:
        """By the shipped diagnosis. ``since``: when the looker began to watch."""
        launch = self.launches.get(name)
        if launch is None:
            return LaunchView(name, "absent", detail="no such Job")
        if launch.deleted is not None:
            if launch.deleted < since:
                return LaunchView(name, "absent", detail="no such Job")
            loss = Finding(Failure.INFRA, f"Job {name} was deleted", "a new launch is made")
            return LaunchView(name, "lost", detail=loss.text, loss=loss)
        vanished = [pod.view() for pod in launch.pods if pod.gone and pod.code is None]
        there = [pod.view() for pod in launch.pods if not (pod.gone and pod.code is None)]
        return launch_view(name, launch.job(), there, vanished)

    # --- measures -------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Each minute: whether there are machines, whether the run goes on, whether somebody drives it."""
        if not self.outcome:
            usable = sum(m.up and not m.taken for m in self.machines)
            if usable < self.least_nodes:
                self.account.no_machines_s += 60.0
                self.came_further_at += 60.0
            stuck = self.hub.now - max(self.came_further_at, self.resumed_at)
            if stuck > STUCK_S and self.given_up_at is None:
                self.find("orphans", f"the run does not come further since {stuck / 3600:.1f} hours")
                self.outcome = "stuck"
            self.after(60.0, self._measure)

    def finish(self) -> None:
        gang = self.newest
        if gang is not None and gang.runs:
            gang.stop()
        self.account.total_s = self.hub.now
        if self.given_up_at is not None:
            self.account.person_s += self.hub.now - self.given_up_at
        self.account.kept_s = sum((b - a) * s for a, b, s in self.segments)


ENDS: dict[Failure, dict[str, Any]] = {
    Failure.SIGNAL: {"signal": 11},
    Failure.BUG: {"code": 70, "words": '{"why": "an assertion"}'},
    Failure.NUMERIC: {"code": 87, "words": ""},
}


class Landing:
    """The store as who is never struck sees it; the witness hears of records."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.shared, name)

    def create(self, key: str, data: bytes, *, sha256: bytes | None = None) -> bool:
        there = key in self._world.shared._objects
        made = self._world.shared.create(key, data, sha256=sha256)
        if not there:
            self._world.wrote(key, bytes(data))
        return made
