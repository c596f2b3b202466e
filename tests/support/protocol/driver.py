"""A driver of a world: the shipped log, views, ``decide`` and history; its launcher is the world. As ``loop.py`` goes
round, without threads and telling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from checkpoint.errors import Conflict, StoreError
from checkpoint.log import RunLog, RunState, ended_body
from flows.drive.decide import decide, launch_to_use
from flows.drive.live import StatusReader
from flows.drive.run import fold_view, ruling_how
from flows.drive.views import End, Finished, Look, MarkDamaged, Memory, Policy, RunLayout, StartAttempt, Watch
from tests.support.protocol.gate import Gate
from tests.support.protocol.hub import Process
from tests.support.protocol.state import RUN, WHAT, how_of, plan_of

if TYPE_CHECKING:
    from tests.support.protocol.world import World

LOOK_S = 1.0


def ranks_of(how: Mapping[str, Any]) -> int:
    return int(how["parallel"]["stages"])


def attempt_body(
    order: StartAttempt, state: RunState, how: Mapping[str, Any], launch: str, steps: int
) -> dict[str, Any]:
    """As ``flows.drive.run.attempt_body`` of a prepared run."""
    ranks = ranks_of(how)
    plan = plan_of(ranks, steps).digest.hex()
    more: dict[str, Any] = {"order": state.orders[-1].n} if state.orders else {}
    if state.amendments:
        more["amendments"] = state.amendments.to_map()
    return {
        "launch": launch, "nodes": ranks, "ranks": ranks, "how": dict(how), "plan": plan, "what": WHAT.hex(),
        "restore": order.restore.to_map(), "reason": order.reason, "slot_epochs": list(order.slot_epochs),
        "cause": order.cause.to_map() if order.cause else None, **more,
    }  # fmt: skip


class Driver(Process):
    """``ranks``: the layout that it was started with; the log's is what it follows."""

    def __init__(self, world: World, ranks: int, on_end: Callable[[str], None]) -> None:
        super().__init__(world.hub, "driver", f"driver {world.hub.number()}")
        self.world, self.ranks, self._on_end = world, ranks, on_end
        self.gate = Gate(world, self)
        self.log = RunLog(self.gate, RUN, writer="driver", clock=self.hub.clock, token=self.hub.token)
        self.state: RunState | None = None
        self.memory = Memory()
        self.reader: StatusReader | None = None
        self.hub.spawn(self, "loop", self._loop)

    def _loop(self) -> None:
        while True:
            try:
                if self._look():
                    return
            except Conflict as conflict:
                self.state = conflict.state
                continue
            except StoreError:
                self.hub.sleep(1.0)
            self.hub.sleep(LOOK_S)

    def _look(self) -> bool:
        world = self.world
        state = self.state = self.log.fold(self.state, quick=True).of_this_version()
        view, newest = fold_view(state), state.newest_attempt
        how = ruling_how(state) or how_of(self.ranks)
        ranks = ranks_of(how)
        over = newest is not None and world.launch_over(newest.launch)
        used = launch_to_use(view, RunLayout(ranks, ranks, how), detaches=False, over=over)
        launch = used or self._next(state)
        if self.reader is None or self.reader.launch != launch:
            self.reader = StatusReader(self.gate, RUN, launch, self.hub.clock)
        nodes = tuple(self.reader.poll(ranks, world.alive(launch)))
        policy = Policy(
            steps=state.amendments.total(world.steps), launch=launch, nodes=ranks, ranks=ranks, stall_s=15.0,
            commit_s=60.0, max_same_step=10**6, max_attempts_without_progress=10**6, backoff_s=0.2, backoff_max_s=2.0,
            strikes=10**6, layouts=(RunLayout(ranks, ranks, how),),
        )  # fmt: skip
        seen = Look(self.hub.now, nodes, lost=world.lost(launch))
        decision, self.memory = decide(view, seen, policy, self.memory)
        match decision:
            case Finished() if world.state.n > state.n or any(p.alive for p in world.persons):  # asked for more
                pass
            case Finished(outcome):
                self._on_end(outcome)
                return True
            case Watch(ensure=True):
                world.ensure(launch, ranks)
            case StartAttempt():
                name = self._next(state) if decision.renew else launch
                body = attempt_body(decision, state, how, name, world.steps)
                state = self.state = self.log.append("attempt", body, state)
                world.won(state)
                world.ensure(name, ranks)
            case MarkDamaged(checkpoint, why):
                self.log.append("damaged", {"checkpoint": checkpoint, "reason": why[:400]}, state)
            case End(outcome, reason, cause):
                self.log.append(
                    "ended", ended_body(state, outcome, reason[:400], str(cause.cls) if cause else ""), state
                )
        return False

    @staticmethod
    def _next(state: RunState) -> str:
        return f"{RUN}-l{len({a.launch for a in state.attempts}) + 1}"
