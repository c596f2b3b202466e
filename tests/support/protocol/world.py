"""One run in one process: hosts, agents, engines, drivers over one store, what strikes them, and who witnesses it.

The witness looks at every write as it lands, and keeps what it finds by kind: ``lost`` (the run cannot go on),
``unloadable`` (the log names a checkpoint that is not whole, or does not load), ``silent`` (a step was lost, or another
state taken for it, and nobody said so).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import keys
from checkpoint.agent import effects as do
from checkpoint.agent.gang import Gang as GangOf
from checkpoint.agent.slots import Slot, SlotTable
from checkpoint.amendments import Amendments
from checkpoint.claims import Place
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError
from checkpoint.log import CheckpointInfo, Record, RunLog, RunState
from checkpoint.read import StateReader, load_manifest
from checkpoint.store.memory import MemoryStore
from flows.drive.views import Cause
from tests.support.protocol.agent import Agent
from tests.support.protocol.driver import Driver
from tests.support.protocol.engine import Engine, Gang, Rank
from tests.support.protocol.gate import Fault
from tests.support.protocol.hub import Hub, Process
from tests.support.protocol.others import Collector, Reader
from tests.support.protocol.state import DATASET, OWNERS, RUN, TENSORS, amended_of, plan_of, truth
from trainer.failures import Failure


class Host:
    """A node of a launch, on a machine."""

    def __init__(self, world: World, launch: str, node: int, nodes: int) -> None:
        self.world, self.launch, self.node, self.nodes = world, launch, node, nodes
        self.name = f"node {node} of {launch}"
        token = world.hub.token()
        self.place = Place(f"host-{token}", "boot", "space", "/work", token, "127.0.0.1", nodes)
        self.agent: Agent | None = None
        self.engine: Engine | None = None
        self.mark = 0
        self.notes: tuple[int, bool, dict[int, Any]] = (0, False, {})
        self.left: str | None = None
        self.gone = False
        """Its launcher gave it up: the machine is lost, or nobody reaches it."""

    def ensure(self) -> None:
        """What a launcher does for a node of its own machine."""
        if self.gone or self.left is not None:
            return
        fresh = False
        if self.engine is None or not self.engine.alive:
            self.engine, fresh = Engine(self.world, self), True
        if self.agent is None or not self.agent.alive:
            self.agent, fresh = Agent(self.world, self), True
            self.engine.peer = None
        if fresh:
            engine = self.engine
            self.world.hub.at(0.05, engine, engine.connect)

    def processes(self) -> list[Process]:
        return [p for p in (self.agent, self.engine) if p is not None and p.alive]


class World:
    """``twin``: a second host comes for each node, as a pod of the same index or an agent of another folder might;
    ``collects``: checkpoints that no rule keeps are collected meanwhile, and somebody reads some under a pin.
    """

    def __init__(self, seed: int, work: Path, *, ranks: int = 2, steps: int = 12, every: int = 2, drivers: int = 1,
                 twin: bool = False, collects: bool = False) -> None:  # fmt: skip
        self.hub = Hub(seed)
        self.work, self.steps, self.every, self.twin = work, steps, every, twin
        self.persists = every * self.hub.rng.choice((1, 1, 2))
        self.shared = MemoryStore(clock=self.hub.clock)
        self.hosts: dict[str, list[Host]] = {}
        self.plans = {plan_of(n, steps).digest.hex(): (plan_of(n, steps), work / "plan") for n in OWNERS}
        self.opened: list[Slot] = []
        self.tables: list[SlotTable] = []
        self.gangs: dict[int, Gang] = {}
        self.starts: dict[tuple[int, int], str] = {}
        self.points: Counter[str] = Counter()
        self.armed: dict[str, Fault] = {}
        self.struck: list[Fault] = []
        self.most = 0
        """Strikes, all in all."""
        self.away_until = 0.0
        self.state = RunState(RUN)
        self.line: dict[int, int] = {}
        """By what happened alone: records of the checkpoints that lead here, and their steps."""
        self.ordered: int | None = None
        """The step of an order that no attempt follows yet."""
        self.persons: list[Process] = []
        """Who will still ask something of the run."""
        self.spoilt: set[int] = set()
        """Checkpoints of which bytes have changed in the store."""
        self.found: dict[str, list[str]] = {"lost": [], "unloadable": [], "silent": []}
        self.outcome: str | None = None
        self.ranks = ranks
        self.drivers = [Driver(self, ranks, self._end) for _ in range(drivers)]
        self.others: list[Process] = [Collector(self), Reader(self)] if collects else []
        self.hub.at(1.0, None, self._keep)

    def close(self) -> None:
        self.hub.close()
        for slot in self.opened:
            slot.close()
        for table in self.tables:
            table.close()

    def silent(self, why: str) -> None:
        self.found["silent"].append(why)

    def _end(self, outcome: str) -> None:
        self.outcome = outcome

    def _keep(self) -> None:
        """Drivers are started again."""
        for i, driver in enumerate(self.drivers):
            if not driver.alive and self.outcome is None:
                # whoever takes over was started with a layout of its own
                self.drivers[i] = Driver(self, self.hub.rng.choice(tuple(OWNERS)), self._end)
        for i, other in enumerate(self.others):
            if not other.alive and self.outcome is None:
                self.others[i] = Collector(self) if isinstance(other, Collector) else Reader(self)
        self.hub.at(1.0 + self.hub.rng.random(), None, self._keep)

    # --- what strikes -------------------------------------------------------------------------------------

    def _comes(self, name: str) -> str:
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

    def strike(self, process: Process, name: str, writes: bool) -> str:
        how = self._comes(name)
        if how == "away":
            self.away_until = self.hub.now + self.hub.rng.choice((2.0, 30.0, 200.0))
        elif how == "late write" and not writes:
            how = "lost answer"
        elif how in ("frozen", "cut off"):
            self.leave_alone(process, how)
        return how

    def leave_alone(self, process: Process, how: str) -> None:
        """Stopped for a while; or given up by its launcher, while it goes on and knows nothing of it."""
        host = next((h for hosts in self.hosts.values() for h in hosts if process in (h.agent, h.engine)), None)
        if how == "cut off" and host is not None:
            host.gone = True
        if how == "frozen" or self.hub.rng.random() < 0.5:
            seconds = self.hub.rng.choice((3.0, 15.0, 40.0, 90.0))
            for one in host.processes() if host is not None and self.hub.rng.random() < 0.5 else [process]:
                one.freeze(seconds)

    def spoil(self) -> None:
        """Bytes of a checkpoint that may be gone on from change where they lie, as long as there is another one."""
        sound = [c for c in self.state.restore_candidates() if c.n not in self.spoilt]
        if len(sound) < 2:
            return
        info = self.hub.rng.choice(sound[:2])
        prefix, objects = keys.run_key(RUN, "chunks") + "/", self.shared._objects
        mine = [k for k in sorted(objects) if k.startswith(prefix) and _point(k) == (info.step, info.epoch)]
        if mine:
            self.spoilt.add(info.n)
            key = self.hub.rng.choice(mine)
            objects[key] = bytes([objects[key][0] ^ 1]) + objects[key][1:]

    def strike_engine(self, engine: Engine, what: str, rank: Rank | None = None) -> bool:
        """Whether something dies here."""
        how = self._comes(f"engine {what}")
        if not how:
            return False
        if how == "rank" and rank is not None:
            engine.exit(rank, -9)
        elif how in ("frozen", "cut off"):
            self.leave_alone(engine, how)
            return False
        elif how == "machine":
            engine.host.gone = True
            for process in engine.host.processes():
                process.kill()
        else:
            engine.kill()
        return True

    # --- the launcher -------------------------------------------------------------------------------------

    def ensure(self, launch: str, nodes: int) -> None:
        if launch not in self.hosts:
            self.hosts[launch] = [Host(self, launch, node, nodes) for node in range(nodes)]
            if self.twin:
                self.hosts[launch] += [Host(self, launch, node, nodes) for node in range(nodes)]
        for host in self.hosts[launch]:
            host.ensure()

    def alive(self, launch: str) -> dict[int, bool | None]:
        hosts = self.hosts.get(launch, [])[: self.hosts[launch][0].nodes if launch in self.hosts else 0]
        return {h.node: False if h.gone else (h.engine is not None and h.engine.alive) or None for h in hosts}

    def lost(self, launch: str) -> Cause | None:
        gone = next((h for h in self.hosts.get(launch, []) if h.gone), None)
        return None if gone is None else Cause(Failure.INFRA, f"node {gone.node} is gone")

    def launch_over(self, launch: str) -> bool:
        hosts = self.hosts.get(launch, [])
        return bool(hosts) and all(h.left is not None for h in hosts)

    # --- the gang -----------------------------------------------------------------------------------------

    def gang(self, epoch: int) -> Gang:
        if epoch not in self.gangs:
            attempt = self.state.attempt(epoch)
            assert attempt is not None
            self.gangs[epoch] = Gang(self, attempt)
        return self.gangs[epoch]

    def handed(self, rank: Rank | None) -> list[int]:
        return [os.dup(slot.fd) for slot in rank.slots] if rank is not None else []

    def started(self, host: Host, gang: GangOf) -> None:
        """START: who holds the node?"""
        who = self.starts.setdefault((gang.epoch, host.node), host.place.token)
        if who != host.place.token:
            self.silent(f"node {host.node} of attempt {gang.epoch} runs on two hosts")
        if self.state.attempt(gang.epoch) is None:
            self.silent(f"attempt {gang.epoch} runs without its record")

    def told(self, word: do.Send) -> None:
        """COMMITTED goes out: is it so?"""
        if self.state.find(word.a, word.epoch) is None:
            self.silent(f"rank {word.rank} hears that step {word.a} of attempt {word.epoch} is safe, and it is not")

    def believed(self, rank: Rank) -> None:
        pass

    # --- the witness --------------------------------------------------------------------------------------

    def wrote(self, key: str, data: bytes) -> None:
        """An object has come to be."""
        if not key.startswith(keys.log_prefix(RUN)):
            return
        n = int(key.rpartition("/")[2])
        record = Record.parse(data, n)
        if n != self.state.n + 1:
            self.silent(f"log record {n} comes after record {self.state.n}")
            return
        before, self.state = self.state, self.state.apply(record)
        self._follow(record)
        if record.kind == "attempt":
            self._attempt(before, self.state)
        elif record.kind == "checkpoint":
            info = self.state.checkpoint(n)
            if info is None:
                return  # void
            if record.epoch != before.epoch:
                self.silent(f"record {n} is of attempt {record.epoch}, which attempt {before.epoch} has fenced")
            self.check(info)
        elif record.kind == "damaged" and record.body["checkpoint"] not in self.spoilt:
            self.silent(f"record {record.body['checkpoint']} is marked damaged: {record.body['reason']}")

    def _follow(self, record: Record) -> None:
        """Is the line that leads here the one that the log tells?"""
        named: int | None = record.body.get("checkpoint")
        if record.kind == "attempt":
            named, self.ordered = self.state.attempts[-1].checkpoint, None
        elif record.kind == "checkpoint":
            info = self.state.checkpoint(record.n)
            if info is not None and (self.ordered is None or info.step < self.ordered):
                self.line[info.n] = info.step
        if record.kind == "intervention" and "step" in record.body:
            self.ordered = record.body["step"]
        elif record.kind != "attempt":
            named = -1
        if named != -1:
            end = (self.line[named], named) if named else (-1, 0)
            self.line = {n: step for n, step in self.line.items() if (step, n) <= end}
        gone = self.state.damaged.keys() | self.state.buried.keys()
        line = sorted(self.line.keys() - gone, key=lambda n: (self.line[n], n), reverse=True)
        told = [info.n for info in self.state.restore_candidates()]
        if told != line:
            self.silent(f"after record {record.n} the log leads back over {told}, what happened over {line}")

    def _attempt(self, before: RunState, after: RunState) -> None:
        """Does it go back behind what was saved?"""
        attempt = after.attempts[-1]
        best = before.restore_candidates()[:1]
        if best and attempt.step < best[0].step:
            self.silent(f"attempt {attempt.n} begins at step {attempt.step}, and step {best[0].step} was saved")

    def won(self, state: RunState) -> None:
        """A driver acts on the attempt that it believes to have won."""
        n = state.epoch
        mine = self.state.attempt(n)
        if mine is None or mine.body != state.attempts[-1].body:
            self.silent(f"a driver acts on attempt {n}, which is another's")

    def deleted(self, key: str) -> None:
        """An object is gone: it was of nothing that anybody may still want."""
        point = _point(key)
        if point is None:
            self.silent(f"{key} is deleted, which is no checkpoint's")
            return
        info, newest = self.state.find(*point), self.state.newest_attempt
        if info is None:
            if point[1] == self.state.epoch and point not in self.state.abandoned:
                self.found["unloadable"].append(f"{key} is deleted, and its step may still be committed")
            return
        named = newest is not None and newest.checkpoint == info.n
        if info.n not in self.state.buried or named or info.n in self.state.pins.values():
            self.found["unloadable"].append(f"{key} is deleted, of record {info.n}, which is not given up")

    def check(self, info: CheckpointInfo, amended: Amendments | None = None) -> None:
        """Everything that this record names is there, and is the state of its step."""
        amended = amended_of(self.state, info) if amended is None else amended
        try:
            reader = StateReader(self.shared, load_manifest(self.shared, RUN, info))
            for number, tensor in enumerate(TENSORS):
                for kind in range(len(KINDS)):
                    if bytes(reader.read(tensor.name, kind)) != truth(number, kind, info.step, amended):
                        self.silent(f"record {info.n}: tensor {tensor.name} is not that of step {info.step}")
        except CheckpointError as error:
            self.found["unloadable"].append(f"record {info.n}, step {info.step}: {error}")

    def last_look(self) -> None:
        """After the end: what the log says is read again by somebody who knows nothing."""
        state = RunLog(self.shared, RUN).fold()
        if state != self.state:
            self.silent("the log reads otherwise than its records were written")
        for info in state.checkpoints:
            if state.usable(info) and info.n not in self.spoilt:
                self.check(info)
        if state.ended and state.ended.failure == Failure.RESTORE and not state.restore_candidates() and self.spoilt:
            return  # that it cannot go on is so
        if self.outcome != "succeeded":
            words = state.ended.reason if state.ended else self.stuck()
            self.found["lost"].append(f"the run has come to {self.outcome or 'no end'}: {words}")
            return
        best = state.at_step()
        total = state.amendments.total(self.steps)
        if best is None or best.step < total:
            self.silent(f"the run ended well at step {best.step if best else 0} of {total}")
        elif best.n not in self.spoilt:
            self.check(best, state.amendments)

    def stuck(self) -> str:
        newest = self.state.newest_attempt
        hosts: Sequence[Host] = self.hosts.get(newest.launch, []) if newest else ()
        said = [
            f"{h.name}: {h.agent.machine.phase if h.agent else '-'}"
            f"{'' if h.agent and h.agent.alive else ', agent dead'}{', gone' if h.gone else ''}, left {h.left}, engine "
            f"{h.engine.at_ if h.engine else '-'}{'' if h.engine and h.engine.alive else ' dead'}"
            f" {h.agent.error if h.agent else ''} {h.agent.log_error if h.agent else ''}"
            for h in hosts
        ]
        return f"log at {self.state.n}, attempt {self.state.epoch}; " + "; ".join(said)


def _point(key: str) -> tuple[int, int] | None:
    return keys.point_of(key.removeprefix(keys.run_key(RUN) + "/"))


def dataset_there(work: Path) -> None:
    """As if this machine had the run's data."""
    folder = work / "data" / DATASET.hex()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verified").touch()
