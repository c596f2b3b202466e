"""A gang of many agents in one process and one simulated clock: what they ask of the store, request by request.

The real ``Committer``, ``Meeting``, ``agreed`` and ``RunLog`` over one store in memory; nothing waits, and no thread
runs but those that read side by side. Each agent looks at the log as often as an idle one does on S3. An agent may be
killed at a request. Judges nothing.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from checkpoint import keys, pages
from checkpoint.agent.commit import Committer
from checkpoint.agent.devices import ON_CPU, Devices
from checkpoint.agent.events import Address
from checkpoint.agent.gang import CannotStart, Gang, Options
from checkpoint.agent.meet import Meeting
from checkpoint.agent.send import agreed
from checkpoint.chunks import Tensor
from checkpoint.claims import Place
from checkpoint.log import AttemptInfo, RunLog, RunState
from checkpoint.manifest import PartManifest
from checkpoint.store.base import PAID, Data, Info
from checkpoint.store.memory import MemoryStore

RUN = "many-0a1b2c"
EPOCH = 1
LISTED = 1000
"""Names in one answer to a listing."""

Strike = Callable[[int, str, str], str]
"""From node, verb and key: ``before`` or ``after`` where the node dies at this request, else nothing."""


class Dead(BaseException):
    """The agent was killed here."""


class Asked:
    """Requests by verb and kind of object; shared by all agents."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def add(self, verb: str, key: str) -> None:
        kinds = ("/parts", "/groups", "/manifest", "/pages/", "/log/", "/upload/", "/addresses", "/addr", "/live/fold")
        kind = next((kind for kind in kinds if kind in key.removeprefix(f"runs/{RUN}/manifests")), "other")
        with self.lock:
            self.counts[f"{verb} {kind.strip('/')}"] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class OneOf(MemoryStore):
    """The store as one agent sees it: what all see, counted, at the pace of a store that is paid for."""

    def __init__(self, shared: MemoryStore, asked: Asked, node: int, strike: Strike) -> None:
        super().__init__(PAID)
        self._objects, self._written, self._lock = shared._objects, shared._written, shared._lock
        self._asked, self._node, self._strike = asked, node, strike
        self.dead = False
        self.looking = False  # at the log, as idle agents do: a record that is not there yet is not counted

    def _request(self, verb: str, key: str) -> bool:
        """Count it; whether the agent dies once it is done. Raises Dead where it dies before."""
        if self.dead:
            raise Dead
        when = self._strike(self._node, verb, key)
        self.dead = bool(when)
        if when == "before":
            raise Dead
        if not (self.looking and verb == "get" and key not in self._objects):
            self._asked.add(verb, key)
        return when == "after"

    def _done(self, dies: bool) -> None:
        if dies:
            raise Dead

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        dies = self._request("create", key)
        made = super().create(key, data, sha256=sha256)
        self._done(dies)
        return made

    def put(self, key: str, data: Data) -> None:
        dies = self._request("put", key)
        super().put(key, data)
        self._done(dies)

    def get(self, key: str, **more: Any) -> bytes:
        self._done(self._request("get", key))
        return super().get(key, **more)

    def head(self, key: str) -> Info | None:
        self._done(self._request("head", key))
        return super().head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        found = list(super().list(prefix, start_after))
        for _ in range(max(1, -(-len(found) // LISTED))):
            self._done(self._request("list", prefix))
        return iter(found)


def part(node: int, nodes: int, step: int) -> bytes:
    """A node's part manifest; of the one tensor that the whole has, node 0 has all."""
    from checkpoint.chunks import Chunk, Segment, chunk_pieces, plan_chunks
    from checkpoint.digest import KINDS

    tensor, saved = Tensor("w", (8,)), []
    if node == 0:
        segments = [Segment(0, kind, 0, 8, 64 * kind) for kind in range(len(KINDS))]
        for plan in plan_chunks(segments):
            data = bytes(plan.bytes)
            saved.append((Chunk.of(keys.chunk_name(step, EPOCH, 0, "i1", plan.index), data), chunk_pieces(plan, data)))
    return PartManifest.build(
        run=RUN, step=step, epoch=EPOCH, samples=step, what=bytes(32), part=node, parts=nodes, tensors=[tensor],
        saved=saved,
    ).to_bytes()  # fmt: skip


@dataclass
class Agent:
    """What is simulated of one: its committer, and the state of the log that it knows."""

    store: OneOf
    log: RunLog
    committer: Committer
    state: RunState
    errors: list[str] = field(default_factory=list)


class ManyAgents:
    """``run`` the events of a step's checkpoint, or of an attempt's start, to their end."""

    def __init__(
        self, nodes: int, *, strike: Strike = lambda *_: "", deadline_s: float = 600.0, local: int = 1
    ) -> None:
        self.nodes, self.local, self.now, self.asked = nodes, local, 0.0, Asked()
        self.shared = MemoryStore()
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.last = 0.0  # when an agent heard of the record, or found its peers
        self._strike = strike
        self._done: set[int] = set()  # nodes whose part is there
        body = {
            "launch": "l", "nodes": nodes, "ranks": nodes, "how": {}, "plan": "ab" * 32, "what": bytes(32).hex(),
            "restore": {"checkpoint": None, "step": 0, "slots": None}, "reason": "start", "cause": None,
        }  # fmt: skip
        log = RunLog(self.shared, RUN, writer="driver")
        self.state = log.append("attempt", body, log.fold())
        self.agents = [self._agent(node, deadline_s) for node in range(nodes)]

    def _agent(self, node: int, deadline_s: float) -> Agent:
        store = OneOf(self.shared, self.asked, node, self._strike)
        log = RunLog(store, RUN, writer=f"agent-{node}")
        committer = Committer(
            log, node, self.nodes, post=lambda call: call(), on_commit=lambda state, _: self._heard(agent, state),
            on_idle=lambda: None, on_error=lambda text: agent.errors.append(text or ""), poll_s=PAID.look_s,
            clock=lambda: self.now,
        )  # fmt: skip
        committer.begin(EPOCH, self.nodes * self.local, deadline_s)
        agent = Agent(store, log, committer, self.state)
        return agent

    def _heard(self, agent: Agent, state: RunState) -> None:
        if state.n > agent.state.n:
            agent.state, self.last = state, self.now
        agent.committer.state(state)

    def _at(self, when: float, node: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), node, call))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, node, call = heapq.heappop(self._events)
            if not self.agents[node].store.dead:
                try:
                    call()
                except Dead:
                    self.agents[node].store.dead = True

    @property
    def alive(self) -> list[Agent]:
        return [agent for agent in self.agents if not agent.store.dead]

    # --- a checkpoint -------------------------------------------------------------------------------------

    def checkpoint(self, step: int, uploaded: Mapping[int, float], seed: int = 0) -> None:
        """Every node uploads its part of the step at its time, and looks at the log until it has heard of the record
        or has given up.
        """
        rng = random.Random(seed)
        for node, when in uploaded.items():
            self._at(when, node, lambda node=node: self._upload(node, step))  # type: ignore[misc]
            self._at(rng.random() * PAID.idle_s, node, lambda node=node: self._look(node, step))  # type: ignore[misc]
        self.run()

    def _upload(self, node: int, step: int) -> None:
        agent = self.agents[node]
        assert agreed(agent.store, RUN, EPOCH, [step]) == step
        pages.write(agent.store, RUN, keys.part_name(step, EPOCH, node), part(node, self.nodes, step), f"{node:05d}")
        agent.committer.add(step, agent.state)
        self._done.add(node)
        self._pump(node)

    def _pump(self, node: int) -> None:
        due = self.agents[node].committer.pump()
        if due is not None:
            self._at(max(due, self.now), node, lambda: self._pump(node))

    def _look(self, node: int, step: int) -> None:
        """As the log's watcher does."""
        agent = self.agents[node]
        agent.store.looking = True
        state = agent.log.fold(agent.state)
        agent.store.looking = False
        if state.n > agent.state.n:
            self._heard(agent, state)
            self._pump(node)
        over = (
            state.find(step, EPOCH) is not None or state.epoch != EPOCH or (node in self._done and agent.committer.idle)
        )
        if not over:
            self._at(self.now + PAID.idle_s, node, lambda: self._look(node, step))

    # --- a start ------------------------------------------------------------------------------------------

    def meet(
        self,
        ready: Mapping[int, float],
        how: Mapping[str, Any] | None = None,
        devices: Mapping[int, Devices] | None = None,
    ) -> dict[int, Any]:
        """Every node has its ports at its time; by node, whom it found, or why it cannot start."""
        ended: dict[int, dict[int, Address] | str] = {}
        attempt: AttemptInfo = self.state.attempts[-1]
        if how is not None:
            object.__setattr__(attempt, "body", MappingProxyType({**attempt.body, "how": how}))

        def begin(node: int) -> None:
            gang = Gang(attempt, node, 1)
            folder = Path("/nowhere")
            place = Place("h", "b", "s", str(folder), f"{node}")
            options = Options(
                RUN, "l", node, self.nodes, folder, folder, b"", place, f"10.0.{node // 250}.{node % 250 + 1}", "", 0,
                PAID.look_s,
            )  # fmt: skip
            address = Address(options.host, [20000 + node % 1000], (devices or {}).get(node, ON_CPU))
            look(node, Meeting(self.agents[node].store, options, gang, address, lambda: self.now))

        def look(node: int, meeting: Meeting) -> None:
            try:
                found = meeting.look()
            except CannotStart as error:
                ended[node] = str(error)
                return
            if found is not None:
                ended[node], self.last = found, self.now
            else:
                self._at(self.now + meeting.pause_s, node, lambda: look(node, meeting))

        for node, when in ready.items():
            self._at(when, node, lambda node=node: begin(node))  # type: ignore[misc]
        self.run()
        return ended
