"""Drivers of a world: the shipped loop with all that it calls, over a store, a launcher and a clock that may fail, tell
old things, stand still or jump. A driver may be killed at any request of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.errors import NotFound, StoreUnavailable
from checkpoint.keys import live_key
from checkpoint.log import RunLog
from checkpoint.store.base import PAID, Info
from flows.drive.events import Outcome
from flows.drive.loop import Driver
from flows.drive.train import launch_for
from tests.support.protocol.hub import Process
from tests.support.simulated import model
from trainer.errors import LaunchUnknown
from trainer.launch import Launch, LaunchView, nothing

if TYPE_CHECKING:
    from tests.support.simulated.world import World


class Killed(BaseException):
    """SIGKILL, in the middle of a look."""


class SimulatedDriver(Process):
    def __init__(self, world: World) -> None:
        super().__init__(world.hub, "driver", f"driver {world.hub.number()}")
        self.world, self.began = world, world.hub.now
        self.ahead = 0.0
        """Of its monotonic clock before the world's, and"""
        self.wall = 0.0
        """of its wall clock."""
        self.store_away_until = self.late_until = self.lost_until = self.mixed_until = self.lags_until = 0.0
        self.late_s = 0.0
        self.armed = 0
        """Requests until it is killed; 0: it is not."""
        self.launcher = SeenCluster(self)
        store = SeenStore(self)
        prepared = world.prepared
        self.driver = Driver(
            prepared, store, self.launcher, partial(launch_for, "memory:", Path("out")),  # type: ignore[arg-type]
            clock=self.clock, sleep=self.skip,
        )  # fmt: skip
        self.driver._log = RunLog(store, world.run, writer="driver", clock=lambda: self.clock() + self.wall)  # type: ignore[arg-type]
        self._next = -1.0
        self.look_soon()

    def clock(self) -> float:
        return self.world.hub.now + self.ahead

    def skip(self, seconds: float) -> None:
        self.ahead += seconds

    def request(self) -> None:
        """Before each request of store or launcher."""
        if self.armed:
            self.armed -= 1
            if not self.armed:
                raise Killed

    # --- looks ----------------------------------------------------------------------------------------------

    def look_soon(self) -> None:
        """Something changed: the next look is one of those that come every other second anyhow."""
        self.look_within(self.world.hub.rng.uniform(*model.LOOK_S))

    def look_within(self, seconds: float) -> None:
        now = self.world.hub.now
        if now <= self._next <= now + seconds:
            return
        self._next = now + seconds
        self.world.hub.at(seconds, self, partial(self._look, self._next))

    def _look(self, due: float) -> None:
        if due != self._next or not self.alive:
            return
        self._next = -1.0
        try:
            found = self.driver.round(lambda look: look())
        except Killed:
            self.die()
            return
        if isinstance(found, Outcome):
            self.alive = False
            return
        self.look_within(self._pause())

    def _pause(self) -> float:
        """In a calm minute one look; where something is due, one every two seconds."""
        gang, rng = self.world.newest, self.world.hub.rng
        calm = gang is not None and gang.runs and gang.struck is None
        odd = self.world.hub.now < max(self.late_until, self.lost_until, self.mixed_until)
        waits = self.world.given_up_at is not None
        return (
            rng.uniform(20.0, 60.0)
            if (calm and not odd) or waits
            else rng.uniform(*((2.0, 6.0) if odd else (1.0, 2.0)))
        )

    def die(self) -> None:
        """SIGKILL; another one takes over."""
        self.alive = False
        self.world.drivers = [d for d in self.world.drivers if d is not self]
        self.world.after(self.world.hub.rng.uniform(3.0, 15.0), self._replaced)

    def _replaced(self) -> None:
        if not self.world.outcome and not any(d.alive for d in self.world.drivers):
            self.world.drivers.append(SimulatedDriver(self.world))


class SeenStore:
    """The store as a driver sees it."""

    pace = PAID
    url = "memory:"

    def __init__(self, owner: SimulatedDriver) -> None:
        self.owner, self.world = owner, owner.world
        self._status = live_key(owner.world.run, "nodes") + "/"
        self._live = live_key(owner.world.run) + "/"

    def describe(self) -> str:
        return "the simulated store"

    def _asked(self, what: str) -> None:
        self.owner.request()
        if self.world.hub.now < max(self.owner.store_away_until, self.world.store_away_until):
            raise StoreUnavailable(f"{what}: no answer")

    def create(self, key: str, data: bytes, *, sha256: bytes | None = None) -> bool:
        from tests.support.simulated.world import Landing

        self._asked(f"create {key}")
        made = Landing(self.world).create(key, data, sha256=sha256)
        if "/log/" in key and self.world.hub.rng.random() < 0.02:
            raise StoreUnavailable(f"create {key}: the answer was lost")
        self.owner.request()
        return made

    def put(self, key: str, data: bytes) -> None:
        self._asked(f"put {key}")
        self.world.shared.put(key, data)

    def get(self, key: str, **more: Any) -> bytes:
        self._asked(f"get {key}")
        if key.startswith(self._status):
            return self._told(key)
        return self.world.shared.get(key, **more)

    def _told(self, key: str) -> bytes:
        """A node's status: fresh, late, lost, or now this one and now that."""
        owner, now, rng = self.owner, self.world.hub.now, self.world.hub.rng
        launch, _, node = key.removeprefix(self._status).partition("/")
        at = now - 1.0
        if now < owner.lost_until:
            if rng.random() < 0.4:
                raise NotFound(key, "the simulated store")
            if rng.random() < 0.2:
                return b"\xc1 no status"
        if now < owner.mixed_until:
            at -= rng.choice((0.0, 0.0, 20.0, 45.0))  # a second time, or an older one after a newer
        elif now < owner.late_until:
            at -= owner.late_s
        found = self.world.launches.get(launch)
        index = int(node)
        data = found.pods[index].status(at) if found is not None and index < found.nodes else None
        if data is None:
            raise NotFound(key, "the simulated store")
        return data

    def head(self, key: str) -> Info | None:
        self._asked(f"head {key}")
        return self.world.shared.head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        self._asked(f"list {prefix}")
        return iter(()) if prefix.startswith(self._live) else self.world.shared.list(prefix, start_after)

    def read_into(self, key: str, out: Sequence[memoryview], *, first: int = 0) -> None:
        self.world.shared.read_into(key, out, first=first)

    def local_path(self, key: str) -> None:
        return None


class SeenCluster:
    """The launcher as a driver has it."""

    detaches = True

    def __init__(self, owner: SimulatedDriver) -> None:
        self.owner, self.world = owner, owner.world
        self._seen: dict[str, tuple[int, LaunchView]] = {}

    @property
    def _away(self) -> bool:
        return self.world.hub.now < self.world.api_away_until

    def _ask(self, work: Callable[[], None]) -> None:
        self.owner.request()
        if self._away:
            raise LaunchUnknown("the cluster does not answer")
        work()
        self.owner.request()

    def ensure(self, launch: Launch) -> None:
        if launch.launch_id not in self.world.launches:
            self._ask(lambda: self.world.ensure(launch.launch_id, launch.nodes, launch.avoid))

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        self._ask(lambda: self.world.stop(launch_id))
        asked()

    def observe(self, launch_id: str) -> LaunchView:
        if self._away:
            return LaunchView(launch_id, "unknown", detail="the cluster does not answer")
        known = self._seen.get(launch_id)
        late = self.world.hub.now < self.owner.lags_until and known is not None
        if known is None or (known[0] != self.world.version and not late):
            known = self._seen[launch_id] = self.world.version, self.world.view(launch_id, self.owner.began)
        return known[1]

    def close(self) -> None:
        return None
