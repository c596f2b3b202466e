"""One run of a place: hosts, agents, engines, drivers over its store, and who witnesses it.

The witness looks at every write as it lands, and keeps what it finds by kind: ``lost`` (the run cannot go on),
``unloadable`` (the log names a checkpoint that is not whole, or does not load), ``silent`` (a step was lost, or another
state taken for it, and nobody said so).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint import keys
from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.gang import Gang as GangOf
from checkpoint.amendments import NONE, Amendments
from checkpoint.claims import Place
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError
from checkpoint.layout import PlanLayout
from checkpoint.log import AttemptInfo, CheckpointInfo, Record, RunLog, RunState
from checkpoint.read import StateReader, load_manifest
from flows.drive.events import Outcome
from flows.drive.run import Prepared, opened_again
from tests.support.protocol.agent import Agent
from tests.support.protocol.driver import Driver
from tests.support.protocol.engine import Engine, Gang, Rank
from tests.support.protocol.hub import Process
from tests.support.protocol.others import Reader
from tests.support.protocol.runs import layout_of
from tests.support.protocol.state import TENSORS, Course, truth
from trainer.failures import Failure

if TYPE_CHECKING:
    from tests.support.protocol.place import Place as Where


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

    def terminate(self) -> None:
        """SIGTERM: its ranks save one step and go, and its agent with them."""
        agent = self.agent
        if agent is not None and agent.alive:
            self.world.hub.at(0.0, agent, lambda: agent.hear(ev.Terminate()))

    def processes(self) -> list[Process]:
        return [p for p in (self.agent, self.engine) if p is not None and p.alive]


class World:
    """``layouts``: the run in the layouts that its drivers may be started with, the first driver with ``first``;
    ``twin``: a second host comes for each node, as a pod of the same index or an agent of another folder might;
    ``parent``: of a run that begins from another's checkpoint.
    """

    def __init__(self, place: Where, layouts: Sequence[Prepared], *, first: int = 0, drivers: int = 1,
                 twin: bool = False, parent: World | None = None) -> None:  # fmt: skip
        self.place, self.hub, self.shared, self.work = place, place.hub, place.shared, place.work
        self.opened, self.tables, self.found = place.opened, place.tables, place.found
        self.layouts, self.run, self.twin = layouts, layouts[0].run, twin
        self.steps, self.seed = layouts[0].spec.train.steps, layouts[0].spec.train.seed
        rng = self.hub.rng
        self.persists = rng.choice((1, 1, 2))
        """Of so many snapshots one goes to the store."""
        self.explodes = {rng.randrange(4, 24)} if rng.random() < 0.5 else set[int]()
        """Batches behind which the loss stays high, where they are read at the whole rate; and"""
        self.cursed = {rng.randrange(2, 20)} if rng.random() < 0.15 else set[int]()
        """such as give no numbers."""
        self.hosts: dict[str, list[Host]] = {}
        self.plans: dict[str, tuple[PlanLayout, Path]] = {}
        self.gangs: dict[int, Gang] = {}
        self.strange: dict[int, AttemptInfo] = {}
        """Attempts that run and are not in the log."""
        self.lines: dict[int, list[dict[str, Any]]] = {}
        self.starts: dict[tuple[int, int], str] = {}
        self.state = RunState(self.run)
        self.line: dict[int, int] = {}
        """By what happened alone: records of the checkpoints that lead here, and their steps."""
        self.ordered: int | None = None
        """The step of an order that no attempt follows yet."""
        self.asked: tuple[int, Mapping[str, Any] | None, Mapping[str, Any]] = (0, None, {})
        """The newest order: its record, its How, its amendments."""
        self.gone_back_to: set[int] = set()
        """Steps from which the driver went on after an explosion, since a person's last word."""
        self.amends: list[Amendments] = [NONE]
        """The amendments that held, one after the other."""
        self.parent, self.begins, self.began = parent, 0, 0
        """Where it began: the run, the step and the record of its checkpoint."""
        self.before: Course | None = None
        self.persons: list[Process] = []
        """Who will still ask something of the run."""
        self.spoilt: set[int] = set()
        """Checkpoints of which bytes have changed in the store."""
        self.outcome: str | None = None
        self.drivers = [Driver(self, layouts[first]) for _ in range(drivers)]
        self.readers = [Reader(self)] if place.collects else []

    def silent(self, why: str) -> None:
        self.found["silent"].append(f"{self.run}: {why}")

    def left(self, outcome: Outcome) -> None:
        """A driver has left. A run that was opened meanwhile gets another one, as does what was stopped."""
        ended = self.state.ended
        if ended is not None and not opened_again(self.state) and not any(p.alive for p in self.persons):
            self.outcome = ended.outcome

    def keep(self) -> None:
        """Drivers are started again, by whoever: with a layout of his own, or with the run as the store has it."""
        for i, driver in enumerate(self.drivers):
            if not driver.alive:
                own = self.hub.rng.random() < 0.5 or not self.state.attempts
                self.drivers[i] = Driver(self, self.hub.rng.choice(self.layouts) if own else None)
        for i, reader in enumerate(self.readers):
            if not reader.alive:
                self.readers[i] = Reader(self)

    # --- what is trained ----------------------------------------------------------------------------------

    def course(self, amended: Amendments) -> Course:
        return Course(amended, self.seed, self.begins, self.before)

    def course_of(self, state: RunState, info: CheckpointInfo) -> Course:
        """By which a checkpoint was trained."""
        attempt = state.attempt(info.epoch)
        return self.course(attempt.amendments if attempt else NONE)

    def diverges(self, amended: Amendments, step: int) -> bool:
        return amended.batch(step) in self.cursed

    def exploded(self, amended: Amendments, step: int) -> bool:
        """Whether the loss is high after this step."""
        return any(
            amended.batch(s) in self.explodes and amended.factor(s) > 0.5 for s in range(self.begins + 1, step + 1)
        )

    def said(self, gang: Gang, step: int) -> None:
        """A step's line."""
        loss = 90.0 if self.exploded(gang.amended, step) else 3.0
        line = {"event": "step", "epoch": gang.epoch, "step": step, "loss": loss, "grad_norm": 1.0}
        self.lines.setdefault(gang.epoch, []).append(line)

    # --- what strikes -------------------------------------------------------------------------------------

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
        prefix, objects = keys.run_key(self.run, "chunks") + "/", self.shared._objects
        mine = [k for k in sorted(objects) if k.startswith(prefix) and self._point(k) == (info.step, info.epoch)]
        if mine:
            self.spoilt.add(info.n)
            key = self.hub.rng.choice(mine)
            objects[key] = bytes([objects[key][0] ^ 1]) + objects[key][1:]

    def strike_engine(self, engine: Engine, what: str, rank: Rank | None = None) -> bool:
        """Whether something dies here."""
        how = self.place.comes(f"engine {what}")
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

    # --- the gang -----------------------------------------------------------------------------------------

    def gang(self, epoch: int) -> Gang:
        if epoch not in self.gangs:
            attempt = self.state.attempt(epoch) or self.strange[epoch]
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
            self.strange[gang.epoch] = gang.attempt
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
        if not key.startswith(keys.log_prefix(self.run)):
            return
        n = int(key.rpartition("/")[2])
        record = Record.parse(data, n)
        if n != self.state.n + 1:
            self.silent(f"log record {n} comes after record {self.state.n}")
            return
        before, self.state = self.state, self.state.apply(record)
        self._follow(record)
        self._ask(record)
        if record.kind == "attempt":
            self._attempt(before, self.state)
        elif record.kind == "checkpoint":
            info = self.state.checkpoint(n)
            if info is None:
                return  # void
            if record.epoch != before.epoch:
                self.silent(f"record {n} is of attempt {record.epoch}, which attempt {before.epoch} has fenced")
            self.check(info)
        elif record.kind == "ended":
            self._ended(record)
        elif record.kind == "damaged" and record.body["checkpoint"] not in self.spoilt:
            self.silent(f"record {record.body['checkpoint']} is marked damaged: {record.body['reason']}")

    def _follow(self, record: Record) -> None:
        """Is the line that leads here the one that the log tells?"""
        if record.body.get("kind") == "parent":
            return
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

    def _ask(self, record: Record) -> None:
        """What is asked of the run from here on: does it leave what was trained as it is?"""
        body = record.body
        if record.kind != "intervention":
            return
        amended = Amendments.parse(body.get("amendments"), "a record")
        if body["kind"] == "parent":
            return self._fork(body, amended)
        start = (body.get("checkpoint"), body["step"]) if "step" in body else None
        if start is None and amended != self.amends[-1]:
            self.silent(f"order {record.n} amends, and does not say from where")
        if start is not None:
            info = self.state.checkpoint(start[0]) if start[0] else None
            trained = self.course_of(self.state, info) if info else self.course(self.amends[0])
            if any(self.course(amended).mark(s) != trained.mark(s) for s in range(1, start[1] + 1)):
                self.silent(f"order {record.n} changes what was trained before step {start[1]}")
        if not body.get("own"):
            self.gone_back_to.clear()
        else:
            self._own(record, amended)
            if self.asked[1] not in (None, body["how"]):
                self.silent(f"order {record.n} is the driver's, and asks for another layout")
        self.asked = record.n, body["how"], dict(body.get("amendments") or {})
        self.amends.append(amended)

    def _own(self, record: Record, amended: Amendments) -> None:
        """Has the driver reason to go back by itself?"""
        attempt, body = self.state.attempts[-1], record.body
        last = int(body["cause"]["step"] or 0)
        if body["via"] == "recovery.on_explosion":
            if not self.exploded(attempt.amendments, last):
                self.silent(f"order {record.n}: the loss of attempt {attempt.n} did not explode up to step {last}")
            elif (
                self.exploded(attempt.amendments, body["step"])
                and body["step"] in self.gone_back_to
                and any(info.step not in self.gone_back_to for info in self.state.restore_candidates())
            ):
                self.silent(f"order {record.n} goes on from step {body['step']} again, where the loss was high")
            self.gone_back_to.add(body["step"])
        elif not any(attempt.amendments.batch(s) in self.cursed for s in range(body["step"] + 1, self.steps + 99)):
            self.silent(f"order {record.n}: nothing of attempt {attempt.n} diverges")

    def _fork(self, body: Mapping[str, Any], amended: Amendments) -> None:
        """The run begins: from what, and what of its parent's amendments does it keep?"""
        assert self.parent is not None
        parent, self.begins, self.began = self.parent, int(body["step"]), int(body["checkpoint"])
        info = parent.state.checkpoint(self.began)
        if info is None or info.step != self.begins:
            self.silent(f"it begins from record {self.began} of {parent.run}, which is no checkpoint of its step")
            return
        self.before = parent.course_of(parent.state, info)
        same, rates = self.seed == parent.seed, [told.rate for told in parent.amends]
        if amended.skip not in ([told.skip for told in parent.amends] if same else [()]) or amended.rate not in rates:
            self.silent(f"it keeps {amended}, where {parent.run} had {parent.amends}")
        if same and amended.batch(self.begins) != self.before.amended.batch(self.begins):
            self.silent(f"its step {self.begins + 1} does not read the batch behind those of step {self.begins}")
        self.amends = [amended]
        self.asked = 0, None, dict(body.get("amendments") or {})

    def _ended(self, record: Record) -> None:
        if record.body["outcome"] == "gave_up" and record.body.get("class") == Failure.NUMERIC:
            self.silent(f"the run gives up for its numbers: {record.body['reason']}")

    def _attempt(self, before: RunState, after: RunState) -> None:
        """Does it go back behind what was saved? Is it what was asked for last?"""
        attempt = after.attempts[-1]
        self.plans[attempt.plan] = layout_of(attempt, self.layouts[0]), self.work / "plan"
        order, how, amended = self.asked
        if (attempt.order, dict(attempt.body.get("amendments") or {})) != (order, amended):
            self.silent(
                f"attempt {attempt.n} follows order {attempt.order} and trains by {attempt.amendments}; {order}"
            )
        if how is not None and attempt.how != how:
            self.silent(f"attempt {attempt.n} has not the layout of order {order}")
        if how is None and before.attempts and attempt.how != before.attempts[-1].how:
            self.silent(f"attempt {attempt.n} has another layout, and nobody ordered that")
        if attempt.step < self.begins:
            self.silent(f"attempt {attempt.n} begins at step {attempt.step}, before the run does")
        best = before.restore_candidates()[:1]
        if best and attempt.step < best[0].step:
            self.silent(f"attempt {attempt.n} begins at step {attempt.step}, and step {best[0].step} was saved")

    def deleted(self, key: str) -> None:
        """An object is gone: it was of nothing that anybody may still want."""
        point = self._point(key)
        if point is None:
            self.silent(f"{key} is deleted, which is no checkpoint's")
            return
        info, newest = self.state.find(*point), self.state.newest_attempt
        if info is None:
            if point[1] == self.state.epoch and point not in self.state.abandoned:
                self.found["unloadable"].append(f"{key} is deleted, and its step may still be committed")
            return
        named = newest is not None and newest.checkpoint == info.n
        child = next((w.run for w in self.place.worlds if w.parent is self and w.began == info.n), None)
        if child is not None:
            self.found["unloadable"].append(f"{key} is deleted, of record {info.n}, from which {child} begins")
        if info.n not in self.state.buried or named or info.n in self.state.pins.values():
            self.found["unloadable"].append(f"{key} is deleted, of record {info.n}, which is not given up")

    def check(self, info: CheckpointInfo, course: Course | None = None) -> None:
        """Everything that this record names is there, and is the state of its step."""
        course = self.course_of(self.state, info) if course is None else course
        try:
            reader = StateReader(self.shared, load_manifest(self.shared, self.run, info))
            for number, tensor in enumerate(TENSORS):
                for kind in range(len(KINDS)):
                    if bytes(reader.read(tensor.name, kind)) != truth(number, kind, info.step, course):
                        self.silent(f"record {info.n}: tensor {tensor.name} is not that of step {info.step}")
        except CheckpointError as error:
            self.found["unloadable"].append(f"record {info.n}, step {info.step}: {error}")

    def last_look(self) -> None:
        """After the end: what the log says is read again by somebody who knows nothing."""
        state = RunLog(self.shared, self.run).fold()
        if state != self.state:
            self.silent("the log reads otherwise than its records were written")
        for info in state.checkpoints:
            if state.usable(info) and info.n not in self.spoilt:
                self.check(info)
        spoilt = self.spoilt or (self.parent is not None and self.began in self.parent.spoilt)
        if state.ended and state.ended.failure == Failure.RESTORE and not state.restore_candidates() and spoilt:
            return  # that it cannot go on is so
        if self.outcome != "succeeded":
            words = state.ended.reason if state.ended else self.stuck()
            self.found["lost"].append(f"{self.run} has come to {self.outcome or 'no end'}: {words}")
            return
        if opened_again(state):
            return  # an order that landed when its writer was dead and the run had ended: whoever resumes goes on
        best = state.at_step()
        total = state.amendments.total(self.steps)
        if best is None or best.step < total:
            self.silent(f"the run ended well at step {best.step if best else 0} of {total}")
        elif best.n not in self.spoilt:
            self.check(best, self.course(self.amends[-1]))

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

    def _point(self, key: str) -> tuple[int, int] | None:
        return keys.point_of(key.removeprefix(keys.run_key(self.run) + "/"))
