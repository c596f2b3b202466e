"""Where the runs of a world are: one store, one clock, and what strikes there; a run that is forked joins them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import keys
from checkpoint.agent.slots import Slot, SlotTable
from checkpoint.log import Record
from checkpoint.store.memory import MemoryStore
from flows.drive.run import Prepared, load_run
from tests.support.protocol.gate import Fault
from tests.support.protocol.hub import Hub, Process
from tests.support.protocol.others import Collector
from tests.support.protocol.runs import with_layout
from tests.support.protocol.state import OWNERS
from trainer.spec import how_map

if TYPE_CHECKING:
    from tests.support.protocol.world import World


class Place:
    """``collects``: checkpoints that no rule keeps are collected meanwhile, and somebody reads some under a pin."""

    def __init__(self, seed: int, work: Path, base: MemoryStore, *, collects: bool) -> None:
        self.hub, self.work, self.collects = Hub(seed), work, collects
        self.shared = MemoryStore(clock=self.hub.clock)
        self.shared._objects, self.shared._written = dict(base._objects), dict(base._written)
        self.worlds: list[World] = []
        self.opened: list[Slot] = []
        self.tables: list[SlotTable] = []
        self.points: Counter[str] = Counter()
        self.armed: dict[str, Fault] = {}
        self.struck: list[Fault] = []
        self.most = 0
        """Strikes, all in all."""
        self.away_until = 0.0
        self.asking = 0
        """Persons who have not forked yet."""
        self.found: dict[str, list[str]] = {"lost": [], "unloadable": [], "silent": []}
        self.others: list[Process] = [Collector(self)] if collects else []
        self.hub.at(1.0, None, self._keep)

    @property
    def over(self) -> bool:
        return not self.asking and all(world.outcome is not None for world in self.worlds)

    @property
    def everybody(self) -> list[Process]:
        """Who may be killed at any instant."""
        hosts = [h for world in self.worlds for launch in list(world.hosts.values())[-1:] for h in launch]
        found = [p for host in hosts for p in host.processes()]
        return found + [p for world in self.worlds for p in (*world.drivers, *world.readers) if p.alive] + self.others

    def close(self) -> None:
        self.hub.close()
        for slot in self.opened:
            slot.close()
        for table in self.tables:
            table.close()

    def _keep(self) -> None:
        for i, other in enumerate(self.others):
            if not other.alive:
                self.others[i] = Collector(self)
        for world in self.worlds:
            if world.outcome is None:
                world.keep()
        self.hub.at(1.0 + self.hub.rng.random(), None, self._keep)

    def comes(self, name: str) -> str:
        """How the armed fault strikes at this point; empty where it does not."""
        self.points[name] += 1
        fault = self.armed.pop(name, None) if len(self.struck) < self.most else None
        if fault is None:
            return ""
        if fault.nth > 1:
            self.armed[name] = Fault(name, fault.nth - 1, fault.how)
            return ""
        self.struck.append(fault)
        return fault.how

    # --- what lands in the store --------------------------------------------------------------------------

    def wrote(self, key: str, data: bytes) -> None:
        """An object has come to be."""
        run = _run_of(key)
        world = self._world(run)
        if key == keys.index_key(run) and keys.log_key(run, 1) not in self.shared._objects:
            self.found["silent"].append(f"{run} is in the list of runs, and does not begin from its parent yet")
        if world is not None:
            world.wrote(key, data)
        elif keys.is_run(run) and {keys.log_key(run, 1), keys.index_key(run)} <= self.shared._objects.keys():
            self._join(run)

    def deleted(self, key: str) -> None:
        """An object is gone."""
        world = self._world(_run_of(key))
        if world is None:
            self.found["silent"].append(f"{key} is deleted, which is no checkpoint's")
        else:
            world.deleted(key)

    def _world(self, run: str) -> World | None:
        return next((world for world in self.worlds if world.run == run), None)

    def _join(self, run: str) -> None:
        """A run has begun from another's checkpoint."""
        from tests.support.protocol.world import World

        key = keys.log_key(run, 1)
        record = Record.parse(self.shared._objects[key], 1)
        parent = self._world(str(record.body.get("run")))
        if record.body.get("kind") != "parent" or parent is None:
            self.found["silent"].append(f"{run} begins with a {record.kind} record that names no run")
            return
        mine, how = load_run(self.shared, run), how_map(parent.layouts[0].spec)
        layouts = [with_layout(mine, n, checkpoint=how["checkpoint"], recovery=how["recovery"]) for n in OWNERS]
        world = World(self, layouts, parent=parent)
        self.worlds.append(world)
        world.wrote(key, self.shared._objects[key])


def layouts_of(prepared: Prepared) -> list[Prepared]:
    """A run in all layouts that drivers may be started with."""
    return [with_layout(prepared, ranks) for ranks in OWNERS]


def _run_of(key: str) -> str:
    """Of an object's key, also of its entry in the list of runs."""
    if key.startswith(keys.INDEX):
        return key.removeprefix(keys.INDEX)
    head, _, rest = key.partition("/")
    return rest.partition("/")[0] if head == "runs" else ""
