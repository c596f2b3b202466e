"""Serving a Prefect deployment of one of our flows from this process: runs that are due are started, each as a process.

Prefect's own runner ends after three seconds without its server, and ends the flows that it started. This one waits:
  S1. A server that does not answer is unknown, never a reason to end a run or the serving; it is asked again.
  S2. A run that was started is its own process in a session of its own; it outlives the serving.
  S3. Nothing starts before its time; which firings start is judged by ``flows.recurring.due``, and the server decides
      whether there is room when a run is proposed to become Pending.
  S4. A server that has lost its database is given the deployment again; one that a person took away ends the serving.
  S5. Nothing that this serving was to start is left planned when it ends: Prefect would call it Late for ever. What a
      killed one left is passed over by the next (F2).
  S6. What the server answers to a start may be lost on the way: it is asked again, so that no flow run that it counts
      as going on is nobody's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from flows.page.left_open import GOES_ON, GRACE_S, LeftOpen, close_gone, own_mark
from flows.prefect_api import BUSY_S, Client, Gone, Lost, Refused
from flows.recurring.deployments import Deployments, Registered, whose
from flows.recurring.due import DueFiring, FiringPolicy, judge_firings
from flows.recurring.state import pool_words

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

log = logging.getLogger(__name__)

EVERY_S = 1.0
KNOWN_EVERY_S = 5.0
END_LOOKS, END_TRIES = 4, 12
END_EVERY_S = 0.3
ROUND_BUSY_S = 3.0
"""How long a request of a round is made again where the server is busy: a round that began anew each time might never
get to the start of a firing.
"""
ENTRYPOINT = "flows.flow.train_flow"
SWEEP = "flows.flow.sweep_flow"
COLLECT = "flows.flow.collect_flow"
RECONCILE = "flows.flow.reconcile_flow"


@dataclass
class Server:
    """``make`` gives the deployment to register; ``say`` hears what a person should know.

    ``registered`` hears each time that the deployment was given to the server, with its id. ``logs``: the folder of a
    file for what each run's process says, so that nothing of this terminal is held by what outlives it; None: here.
    ``entrypoint``: the deployment's flow, which ``command`` runs (unset: Prefect's engine). ``now``: the time, for
    ``policy``.
    """

    make: Callable[[], RunnerDeployment]
    say: Callable[[str], None]
    registered: Callable[[Client, UUID], None] = lambda _client, _deployment: None
    stop: threading.Event = field(default_factory=threading.Event)
    logs: Path | None = None
    entrypoint: str = ENTRYPOINT
    command: Sequence[str] = ()
    every_s: float = EVERY_S
    policy: FiringPolicy = field(default_factory=FiringPolicy)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    children: dict[UUID, subprocess.Popen[bytes]] = field(default_factory=dict)
    _known: Registered | None = None
    _client: Client | None = None
    _known_at: float = -1e9
    _to_tell: bool = False
    _away: bool = False
    _ended: dict[UUID, tuple[str, float]] = field(default_factory=dict)
    _taking: DueFiring | None = None
    _unmarked: dict[UUID, str] = field(default_factory=dict)
    _told_to_end: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.left_open = LeftOpen(self.say)

    def run(self) -> None:
        """Serve until ``stop`` is set, or the deployment is taken away. Raises Refused where Prefect refuses before the
        deployment was registered, and where its name is another's.
        """
        while not self.stop.is_set():
            pause_s = self.every_s
            try:
                self._round()
                if self._away:
                    self._away = False
                    self.say("Prefect is back")
            except Refused as error:
                if self._known is None:
                    raise
                self._told_away(error)
            except Gone as error:
                self._known_at, pause_s = -1e9, max(self.every_s, error.after_s)
                self._told_away(error)
            self.stop.wait(pause_s)
        self._leave()

    def _told_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            self.say(f"Prefect is away ({error}): waiting for it; runs that were started go on")

    def _round(self) -> None:
        if self._client is None:
            self._client = Client.connect(None)
            self._client.patience_s = ROUND_BUSY_S
        client, served = self._client, Deployments(self._client)
        self._ensure_known(client, served)
        if self._known is None:
            return
        if self._to_tell:
            self.registered(client, self._known.deployment)
            self._to_tell = False
        self._go_on_starting(client)
        self._reap(client)
        self.left_open.look(client)
        due, more = served.due(self._known.deployment)
        judged = judge_firings(
            [firing for firing in due if firing.id not in self.children], self.policy, self.now(), more=more
        )
        for firing, why in judged.skipped:
            self._skip(client, firing, why)
        if judged.start and self.policy.overlap == "cancel" and self._older_go_on(served):
            return
        for firing in judged.start:
            if self.policy.overlap == "queue" and self._is_before(served, firing):
                return
            client.mark(str(firing.id), own_mark())  # until its own process says that it is that one's
            self._taking = firing
            taken = served.take(firing.id)
            self._taking = None
            if taken:
                self._start(firing.id, firing.name)
                self._mark_started(client)
            elif client.state_of(str(firing.id)) == "CANCELLED":  # for want of room; Prefect does not say who has it
                older = ", ".join(served.names_going_on(self._known.deployment))
                why = f"an older run of this schedule goes on: {older}"
                self._skip(client, firing, f"{why}; where its process is gone for good, cancel that one on the page")

    def _go_on_starting(self, client: Client) -> None:
        """S6: where the server went away while a firing was started."""
        self._mark_started(client)
        firing, mark = self._taking, own_mark()
        if firing is None:
            return
        with contextlib.suppress(Lost):
            if client.state_of(str(firing.id)) == "PENDING" and client.mark_of(str(firing.id)) == mark:
                self._start(firing.id, firing.name)
        self._taking = None
        self._mark_started(client)

    def _mark_started(self, client: Client) -> None:
        """Say whose the flow runs are; one whose process has ended meanwhile, so that it can be told as gone."""
        for flow_run, mark in list(self._unmarked.items()):
            with contextlib.suppress(Lost):
                client.mark(str(flow_run), mark)
            del self._unmarked[flow_run]

    def _skip(self, client: Client, firing: DueFiring, why: str) -> None:
        client.set_state(str(firing.id), "CANCELLED", "Cancelled", why)
        self.say(f"skipped {firing.name}: {why}")

    def _is_before(self, served: Deployments, firing: DueFiring) -> bool:
        """Whether there is room, and an older firing waits for it: that one asks again soon, and has its turn (F3)."""
        assert self._known is not None
        first = served.oldest_waiting(self._known.deployment)
        return first is not None and first < (firing.at, str(firing.id)) and not served.going_on(self._known.deployment)

    def _older_go_on(self, served: Deployments) -> bool:
        """Whether an older run is still there; each is told once to end."""
        assert self._known is not None
        going = served.going_on(self._known.deployment)
        for flow_run, state in going:
            if state != "CANCELLING" and flow_run not in self._told_to_end:
                self._told_to_end.add(flow_run)
                served.ask_cancel(flow_run, "cancelled: the time of the next firing has come")
                self.say("the time of the next firing has come: the older run is cancelled")
        self._told_to_end &= {flow_run for flow_run, _ in going}
        return bool(going)

    def _ensure_known(self, client: Client, served: Deployments) -> None:
        if self._known is not None:
            if time.monotonic() - self._known_at < KNOWN_EVERY_S:
                return
            there = served.whereabouts(self._known)
            if there == "there":
                self._known_at = time.monotonic()
                return
            if there == "removed":
                self.say("the deployment was taken away: this schedule ends")
                self._known = None
                self.stop.set()
                return
            self.say("Prefect has lost the deployment: it is registered again")
        self._register(client, served, self.make())

    def hand_over(self, pool: str) -> None:
        """Register the deployment for the workers of a pool, with the job variables of the deployment of its flow that
        prefect.yaml put there; serve nothing. Refused, or Gone.
        """
        with Client.open(None, patience_s=BUSY_S) as client:
            made, served = self.make(), Deployments(client)
            made.work_pool_name, found = pool, served.pool(pool)
            if found is None:
                raise Refused(
                    f"it has no work pool {pool}: make it with `prefect work-pool create {pool} --type process`"
                )
            beside = served.named(str(made.flow_name), str(made.flow_name))  # by prefect.yaml, with image and account
            if beside is not None and (beside["work_pool_name"], beside["entrypoint"]) == (pool, self.entrypoint):
                made.job_variables = dict(beside["job_variables"] or {})
            self._register(client, served, made)
            assert self._known is not None
            self.registered(client, self._known.deployment)
            row = served.read(self._known.deployment)
            for word in pool_words(found, made.job_variables, served.queue(found, row)):
                self.say(f"  {word}")

    def _register(self, client: Client, served: Deployments, made: RunnerDeployment) -> None:
        """Refused where its name is another's."""
        client.check()
        there_already = served.named(str(made.flow_name), made.name)
        problem = whose(there_already, self.entrypoint, made.parameters) if there_already else ""
        if problem:
            raise Refused(
                f"it has a deployment {made.flow_name}/{made.name} already, {problem}: take another --name, or remove "
                f"that one (`hotstage schedules rm {made.name}`, `prefect deployment delete`)"
            )
        self._known, self._to_tell = served.register(made), True
        self._known_at = time.monotonic()

    def _start(self, flow_run: UUID, name: str) -> None:
        env = {**os.environ, "PREFECT__FLOW_RUN_ID": str(flow_run), "PREFECT_LOGGING_LEVEL": "WARNING"}
        with contextlib.ExitStack() as stack:
            out, where = None, ""
            if self.logs is not None:
                self.logs.mkdir(parents=True, exist_ok=True)
                path = self.logs / f"{flow_run}.log"
                out, where = stack.enter_context(open(path, "ab")), f"; its lines: {path}"
            self.children[flow_run] = subprocess.Popen(
                self.command or [sys.executable, "-P", "-m", "prefect.flow_engine", self.entrypoint],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._unmarked[flow_run] = own_mark(self.children[flow_run].pid)
        self.say(f"started {name}{where}")

    def _reap(self, client: Client) -> None:
        """Where a run's process ended and Prefect was not told how, it is told that it crashed; not where somebody goes
        on with the flow run by then.
        """
        for flow_run, child in list(self.children.items()):
            code = child.poll()
            if code is not None:
                self._ended[flow_run] = f"signal {-code}" if code < 0 else f"code {code}", time.monotonic() + GRACE_S
                del self.children[flow_run]
        for flow_run, (how, at) in list(self._ended.items()):
            if time.monotonic() >= at:
                close_gone(client, str(flow_run), how, GOES_ON)
                del self._ended[flow_run]

    def _leave(self) -> None:
        """S5. The server's own planner may be at work on the same deployment: it is looked at more than once."""
        if self._client is None or self._known is None or not self.make().schedules:
            return
        self._client.patience_s = 0.0  # these are made again anyway
        served, looks, problem = Deployments(self._client), 0, None
        for _ in range(END_TRIES):
            try:
                if not looks:
                    served.stop_planning(self._known.deployment)
                served.clear(self._known.deployment)
                looks, problem = looks + 1, None
            except Lost:
                return
            except (Gone, Refused) as error:
                problem = error
            if looks == END_LOOKS:
                return
            time.sleep(END_EVERY_S)
        if problem is not None:
            self.say(
                f"Prefect does not take the end of this schedule ({problem}): its firings stay planned until the same "
                "schedule starts again, or `hotstage schedules rm` takes it away"
            )
