"""What strikes a world, and when: failures of every class of ``trainer/failures.py``, each as likely as any other, and
what is no failure of the gang. All of it follows from the seed.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from tests.support.simulated import model
from tests.support.simulated.cluster import Gang, Machine, Pod
from tests.support.simulated.drivers import SimulatedDriver
from trainer.failures import Failure

if TYPE_CHECKING:
    from tests.support.simulated.world import World

CLASSES = tuple(cls for cls in Failure if cls is not Failure.DONE)
LASTING = 0.12
"""Share of crashes that come again at their step whenever it is done."""


class Faults:
    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.disturbed: dict[str, int] = {}
        self.strikes = True
        """Whether anything comes by itself."""
        world.after(rng.expovariate(1 / model.FAILURE_EVERY_S), self._fail)
        world.after(rng.expovariate(1 / model.DISTURBED_EVERY_S), self._disturb)

    # --- failures -------------------------------------------------------------------------------------------

    def _fail(self) -> None:
        world, gang = self.world, self.world.newest
        if world.outcome or not self.strikes:
            return
        if gang is None or gang.struck is not None or world.state.ended is not None or not self._pods(gang):
            world.after(60.0, self._fail)  # there is nothing to strike
            return
        self._strike(gang, self.rng.choice(CLASSES))
        if self.rng.random() < 0.5:  # troubles come together
            world.after(self.rng.uniform(0.0, 240.0), self._disturb_once)
        world.after(self.rng.expovariate(1 / model.FAILURE_EVERY_S), self._fail)

    def _pods(self, gang: Gang) -> list[Pod]:
        launch = self.world.launches.get(gang.launch)
        return [p for p in launch.pods if p.gang is gang and p.lives and p.rank is not None] if launch else []

    def _strike(self, gang: Gang, cls: Failure) -> None:
        world, rng = self.world, self.rng
        pod = rng.choice(self._pods(gang))
        next_step = gang.step(world.hub.now) + 1
        match cls:
            case Failure.SICK:
                if pod.machine is not None and rng.random() < 0.8:
                    self._sick(pod.machine)
                world.strike(gang, cls, pod=pod)
                pod.end_rank(**rng.choice(({"code": 88}, {"signal": 11, "xid": 79})))
            case Failure.MEMORY:
                world.leaks = rng.random() < LASTING
                world.strike(gang, cls, pod=pod, lasting=world.leaks)
                pod.end_rank(signal=9, memory=1 << 30)
            case Failure.SIGNAL | Failure.BUG | Failure.NUMERIC:
                lasting = rng.random() < LASTING and gang.runs
                if lasting:
                    at = gang.amendments.batch(next_step) if cls is Failure.NUMERIC else next_step
                    world.curses.append((cls, at))
                world.strike(gang, cls, pod=pod, lasting=lasting)
                ends = {Failure.SIGNAL: {"signal": rng.choice((9, 11, 11)) if not lasting else 11},
                        Failure.BUG: {"code": 70}, Failure.NUMERIC: {"code": 87}}  # fmt: skip
                pod.end_rank(**ends[cls])
            case Failure.DATA:
                world.data_bad = True
                world.strike(gang, cls, pod=pod, lasting=True)
                pod.end_rank(code=65)
            case Failure.CONFIG:
                world.image_bad = True
                self._lose(gang, pod, Failure.INFRA, Failure.PREEMPTED, Failure.CONFIG)
            case Failure.RESTORE:
                saved = world.state.restore_candidates()
                if rng.random() < 0.5 and len(saved) > 1:
                    world.bad.add(saved[0].n)
                else:
                    world.misreads = 1
                self._lose(gang, pod, Failure.INFRA, Failure.PREEMPTED, Failure.RESTORE)
            case Failure.STALL:
                self._stall(gang, pod)
            case Failure.PREEMPTED:
                world.strike(gang, cls, pod=pod)
                pod.told_to_go(rng.choice(("EvictionByEvictionAPI", "PreemptionByScheduler", "")))
            case _:
                self._lose(gang, pod, Failure.INFRA, Failure.PREEMPTED)

    def _sick(self, machine: Machine) -> None:
        machine.sick = True
        self.world.after(12 * 3600.0, lambda: setattr(machine, "sick", False))

    def _stall(self, gang: Gang, pod: Pod) -> None:
        """A rank hangs: its watchdog ends it; or hangs with it, and the driver has to see it."""
        world = self.world
        world.strike(gang, Failure.STALL, pod=pod)
        gang.stop()
        if self.rng.random() < 0.7:
            world.after(model.STALL_S, lambda: pod.end_if(gang, code=86))

    def _lose(self, gang: Gang, pod: Pod, *classes: Failure) -> None:
        """A pod is lost, one way or another."""
        world, rng = self.world, self.rng
        how = rng.choice(("machine", "machine", "supervisor", "deleted", "network", "cut off"))
        if how == "network" and Failure.CONFIG not in classes and Failure.RESTORE not in classes:
            world.strike(gang, *classes, pod=pod)
            pod.end_rank(code=75, words='{"why": "connection reset"}')
        elif how == "machine":
            world.strike(gang, *classes, Failure.STALL, pod=pod)
            self._machine_dies(pod)
        elif how == "deleted":
            world.strike(gang, *classes, pod=pod)
            pod.told_to_go("")
        elif how == "cut off" and gang.runs:
            world.strike(gang, *classes, Failure.STALL, pod=pod)
            self._cut_off(gang)
        else:
            world.strike(gang, *classes, Failure.SIGNAL, pod=pod)
            pod.end_rank(signal=9)
            pod.go(137)
            world.after(1.0, lambda: world.pod_failed(pod))

    def _machine_dies(self, pod: Pod) -> None:
        """For good; another one comes in its place some time."""
        world, machine, gang = self.world, pod.machine, pod.gang
        assert machine is not None
        assert gang is not None
        machine.up, pod.silent_from = False, world.hub.now
        gang.stop()

        def seen(name: str, value: object) -> None:
            setattr(pod, name, value)
            world.changed()

        world.after(model.SILENT_S, lambda: seen("ready", False))
        world.after(model.TAINTED_S, lambda: seen("disruption", "DeletionByTaintManager"))
        world.after(model.GONE_S, pod.go)
        for peer in pod.launch.pods:
            if peer is not pod:
                words = f'{{"why": "no message", "peer": {pod.index}}}'
                end = partial(peer.end_if, gang, code=86, words=words)
                world.after(model.STALL_S + self.rng.random(), end)

        def replaced() -> None:
            machine.up, machine.sick = True, False
            world.place_soon()

        world.after(self.rng.uniform(2.0, 12.0) * 3600.0, replaced)

    def _cut_off(self, gang: Gang) -> None:
        """Nobody reaches the gang's machines for a while, neither the control plane nor the store; it trains on."""
        world = self.world
        gang.cut = True
        pods = self._pods(gang)
        for pod in pods:
            pod.cut, pod.silent_from = True, world.hub.now

        def lost() -> None:
            for pod in pods:
                pod.ready, pod.disruption = False, "DeletionByTaintManager"
            world.changed()

        def back() -> None:
            gang.cut = False
            for pod in pods:
                pod.cut, pod.silent_from, pod.back_at = False, 1e18, world.hub.now
                pod.note()
                # what its agents had stored meanwhile they try to have counted, before they read the log
                world.after(0.1, lambda: world.commit(gang, gang.step(world.hub.now) // 30 * 30))
                world.after(self.rng.uniform(0.5, 3.0), pod.hear)
                world.after(60.0, pod.go)

        world.after(model.TAINTED_S, lost)
        world.after(self.rng.uniform(200.0, 1200.0), back)

    # --- what is no failure ---------------------------------------------------------------------------------

    def _disturb(self) -> None:
        self._disturb_once()
        self.world.after(self.rng.expovariate(1 / model.DISTURBED_EVERY_S), self._disturb)

    def _disturb_once(self) -> None:
        world, rng = self.world, self.rng
        if world.outcome or not self.strikes:
            return
        alive = [d for d in world.drivers if d.alive]
        kinds = ["two drivers", "store away", "API away", "others take machines"]
        if alive:
            kinds += ["driver killed", "killed in a look", "killed in a look", "frozen", "clock ahead", "wall clock",
                      "late", "lost", "mixed", "watch lags", "its store away"]  # fmt: skip
        kind = rng.choice(kinds)
        self.disturbed[kind] = self.disturbed.get(kind, 0) + 1
        self.disturb(kind, rng.choice(alive) if alive else None)

    def disturb(self, kind: str, driver: SimulatedDriver | None) -> None:
        world, rng = self.world, self.rng
        until = world.hub.now + rng.choice((15.0, 60.0, 240.0, 900.0)) * rng.uniform(0.5, 1.5)
        match kind:
            case "store away":
                world.store_away_until = until
            case "API away":
                world.api_away_until = until
            case "others take machines":
                self._take(rng.uniform(600.0, 3600.0))
            case "two drivers":
                second = SimulatedDriver(world)
                world.drivers.append(second)
                world.after(rng.uniform(60.0, 3600.0), second.die)
        if driver is None:
            return
        match kind:
            case "driver killed":
                driver.die()
            case "killed in a look":
                driver.armed = rng.randrange(1, 25)
            case "frozen":
                driver.freeze(until - world.hub.now)
            case "clock ahead":
                self._jump(driver, rng.choice((90.0, 3600.0, 86400.0)))
            case "wall clock":
                driver.wall += rng.choice((-86400.0, -3600.0, 3600.0, 1e6))
            case "late":
                driver.late_until, driver.late_s = until, rng.choice((10.0, 60.0, 180.0))
            case "lost":
                driver.lost_until = until
            case "mixed":
                driver.mixed_until = until
            case "watch lags":
                driver.lags_until = min(until, world.hub.now + 60.0)
            case "its store away":
                driver.store_away_until = until
        driver.look_soon()

    def _jump(self, driver: SimulatedDriver, seconds: float) -> None:
        """Between two looks that lie close together: as far as they show, no step was done since."""
        driver.look_within(0.01)

        def jump() -> None:
            driver.ahead += seconds
            driver.look_within(1.2)

        self.world.after(0.02, jump)

    def _take(self, seconds: float) -> None:
        """Others have the machines that are free now, and those that get free."""
        taken = [m for m in self.world.machines if m.up and m.pod is None and not m.taken]
        for machine in taken:
            machine.taken = True

        def back() -> None:
            for machine in taken:
                machine.taken = False
            self.world.place_soon()

        self.world.after(seconds, back)
