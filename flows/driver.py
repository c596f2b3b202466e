"""The driver's mind: ``decide(folded log, observation, policy) -> decision``. Pure; no clock, no I/O.

The driver keeps nothing. Everything it knows is the folded log (truth) and an observation (hints that may be late or
missing), so it can be killed at any instruction and the next one decides the same. ``flows/loop.py`` is the thin loop
that observes, asks here, and acts; nobody acts on a gang before the log record that orders it is won.

Rules:
  D1  The log outranks every hint: a recorded checkpoint of the last step is success, whatever the hints say.
  D2  "Does not answer" is unknown, never failure. A healthy gang is ended only on positive evidence: an exit that its
      supervisor reported, a node that its launcher knows to be gone, or no step within the stall limit while the node's
      own heartbeat goes on.
  D3  An attempt's cause is the most causal of all its ranks; 75 and 143 (a peer was lost, asked to stop) never outrank.
  D4  Infrastructure failures resume without a budget while there is progress; what repeats at the same step does not.
  D5  A launch that lost a node for good is left, and the next attempt takes a new one, once every rank that may still
      save has ended. A machine in ``strikes`` failures is left out of later launches. Waiting for room is no failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from trainer.wire import EXITS


class Phase(Enum):
    """Where a run is, for people: derived anew each time, stored nowhere."""

    PLANNED = "planned"
    LAUNCHING = "launching"
    WAITING = "waiting"
    STARTING = "starting"
    TRAINING = "training"
    DRAINING = "draining"
    BACKOFF = "backoff"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    GAVE_UP = "gave up"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RankView:
    """One rank as its node's status tells it. ``code`` is an exit code of wire/exit.h; ``signal`` a signal's number;
    ``killed``: by its own supervisor after another rank's end, so never a cause; ``memory``: where the kernel killed it
    for memory, the bytes that its container may use (0: no limit).
    """

    rank: int
    pid: int | None = None
    code: int | None = None
    signal: int | None = None
    step: int = -1
    words: Mapping[str, Any] | None = None
    killed: bool = False
    memory: int | None = None

    @property
    def ended(self) -> bool:
        return self.code is not None or self.signal is not None


@dataclass(frozen=True)
class NodeView:
    """One node. ``alive``: True, False (known to be gone) or None (unknown: nobody answered).

    ``age_s`` counts since its heartbeat last changed, by the observer's own monotonic clock; ``step_age_s`` since any
    of its ranks last moved a step. ``slots`` are the (step, epoch) pairs held by all its ranks.
    """

    node: int
    alive: bool | None = None
    epoch: int = 0
    phase: str = "none"
    ranks: tuple[RankView, ...] = ()
    slots: frozenset[tuple[int, int]] = frozenset()
    age_s: float = 0.0
    step_age_s: float = 0.0
    error: str | None = None
    place: str = ""
    """The machine, by its cluster's name; empty on this one."""


@dataclass(frozen=True)
class AttemptView:
    """What the log says of an attempt: its epoch, its launch, the plan, where it restored from, why it was started."""

    epoch: int
    launch: str
    nodes: int
    ranks: int
    plan: str
    what: str
    restore_step: int
    restore_checkpoint: int | None
    restore_slots: tuple[int, int] | None
    slot_epochs: tuple[int, ...]
    cause: Mapping[str, Any] | None


@dataclass(frozen=True)
class CheckpointView:
    """A valid checkpoint record: its number in the log, its step, its epoch."""

    n: int
    step: int
    epoch: int


@dataclass(frozen=True)
class LogView:
    """The folded log, as far as decisions need it. ``candidates``: restore points, best first (checkpoint.log);
    ``parent``: (run, record, step) of the checkpoint that a forked run begins from.
    """

    attempts: tuple[AttemptView, ...] = ()
    checkpoints: tuple[CheckpointView, ...] = ()
    candidates: tuple[CheckpointView, ...] = ()
    ended: str | None = None
    parent: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Policy:
    """How to recover. Seconds; counts. ``steps`` is the run's last step."""

    steps: int
    plan: str
    what: str
    launch: str
    nodes: int
    ranks: int
    stall_s: float = 60.0
    start_s: float = 120.0
    drain_s: float = 2.0
    max_same_step: int = 2
    max_attempts_without_progress: int = 8
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    strikes: int = 2
    node_bytes: int = 0
    """What the ranks of the fullest node need by the plan, without their snapshot slots."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended: for people, and as the next attempt's ``cause`` in the log."""

    cls: str
    text: str
    mend: str = ""
    rank: int | None = None
    step: int = -1
    words: Mapping[str, Any] | None = field(default=None, compare=False)
    place: str = ""

    def to_map(self) -> dict[str, Any]:
        out: dict[str, Any] = {"class": self.cls, "text": self.text, "mend": self.mend, "step": self.step}
        if self.place:
            out["place"] = self.place
        if self.rank is not None:
            out["rank"] = self.rank
        if self.words:
            out["words"] = {k: v for k, v in self.words.items() if isinstance(v, str | int | float)}
        return out


@dataclass(frozen=True)
class Restore:
    """A restore point: the checkpoint record (None: from the start), and the slots where all nodes hold a step as new.

    ``parent``: (run, record) of the checkpoint that a forked run begins from, while it has none of its own.
    """

    checkpoint: int | None
    step: int
    slots: tuple[int, int] | None = None
    parent: tuple[str, int] | None = None

    def to_map(self) -> dict[str, Any]:
        slots = {"step": self.slots[0], "epoch": self.slots[1]} if self.slots else None
        parent = {"run": self.parent[0], "checkpoint": self.parent[1]} if self.parent else None
        return {"checkpoint": self.checkpoint, "step": self.step, "slots": slots, "parent": parent}


@dataclass(frozen=True)
class StartAttempt:
    """Win an attempt record (the fence); the nodes' agents do the rest. ``renew``: with a new launch of nodes."""

    restore: Restore
    slot_epochs: tuple[int, ...]
    reason: str
    cause: Cause | None = None
    delay_s: float = 0.0
    renew: bool = False


@dataclass(frozen=True)
class MarkDamaged:
    """Log that a checkpoint cannot be restored, so that nobody tries it again."""

    checkpoint: int
    why: str


@dataclass(frozen=True)
class End:
    """Win the ``ended`` record: outcome is succeeded, cancelled or gave_up."""

    outcome: str
    reason: str
    cause: Cause | None = None


@dataclass(frozen=True)
class Watch:
    """Nothing to order: keep the launch up (idempotent) and look again."""

    phase: Phase
    text: str = ""


@dataclass(frozen=True)
class Finished:
    """The log has an end; what runs will stop by itself."""

    outcome: str


Decision = StartAttempt | MarkDamaged | End | Watch | Finished

# D3: from the most to the least causal. A lower place outranks a higher one.
_CAUSAL = (
    "sick",
    "memory",
    "signal",
    "numeric",
    "data",
    "restore",
    "config",
    "bug",
    "stall",
    "preempted",
    "infra",
    "done",
)

_MENDS = {
    "config": "the message names the value and the limit; with those mended, `hotstage runs resume RUN` goes on (or "
    "start the corrected spec)",
    "infra": "look at the machine and the store (room, rights, network), then `hotstage runs resume RUN`",
    "data": "prepare the data again (`hotstage data prepare SPEC --again`), then `hotstage runs resume RUN`",
    "bug": "this is a bug of hotstage: `hotstage logs RUN` has the last words",
    "numeric": "lower the rate from an earlier checkpoint: `hotstage runs fork RUN --step N "
    "--set train.optimizer.lr=…`",
    "sick": "take the machine out of service and test it, then `hotstage runs resume RUN`",
    "restore": "an older checkpoint is used; `hotstage ckpt verify RUN` says what is damaged",
    "memory": "raise the limit (launch.resources.memory on a cluster), or take more stages or smaller microbatches; "
    "what else the container holds counts too (volumes of medium Memory)",
}


def mend_of(cls: str) -> str:
    """What a person should do about a cause of this class; empty where recovery mends it."""
    return _MENDS.get(cls, "")


def rank_class(rank: RankView) -> str:
    """The class of an ended rank: an exit code's by the table of wire/exit.h, ``signal`` for a kill or a crash."""
    if rank.killed:
        return "infra"
    if rank.memory is not None:
        return "memory"
    if rank.signal is not None:
        return "infra" if rank.signal == 15 else "signal"
    if rank.code == 143:
        return "infra"
    known = EXITS.get(rank.code if rank.code is not None else 70)
    return known.cls if known else "bug"


def _describe(rank: RankView, node_bytes: int) -> str:
    if rank.memory is not None:
        needs = f"the plan needs {node_bytes >> 20} MiB for the ranks of its node"
        limit = f"the limit is {rank.memory >> 20} MiB" if rank.memory else "no limit but the machine's was reached"
        what = f"was killed for memory (OOM): {needs}, {limit}"
    elif rank.signal is not None:
        names = {6: "aborted", 9: "killed", 11: "crashed", 15: "terminated"}
        what = (
            f"was {names[rank.signal]} (signal {rank.signal})"
            if rank.signal in names
            else f"died of signal {rank.signal}"
        )
    else:
        known = EXITS.get(rank.code if rank.code is not None else 70)
        what = f"exited with {rank.code}: {known.text if known else 'unknown code'}"
    said = (rank.words.get("why") or rank.words.get("error")) if rank.words else None
    return f"rank {rank.rank} {what}" + (f" ({said})" if said else "")


def diagnose(ranks: Sequence[RankView], node_bytes: int = 0) -> Cause | None:
    """The most causal end among all ranks of an attempt (D3); None where none ended badly. ``node_bytes`` as in Policy,
    for the words about memory.
    """
    ended = [r for r in ranks if r.ended and rank_class(r) != "done"]
    if not ended:
        return None
    # the earliest step at equal class: a rank that fails drags the others on
    first = min(ended, key=lambda r: (_CAUSAL.index(rank_class(r)), r.step, r.rank))
    cls = rank_class(first)
    return Cause(
        cls,
        _describe(first, node_bytes),
        _MENDS.get(cls, ""),
        first.rank,
        max((r.step for r in ranks), default=-1),
        first.words,
    )


def choose_restore(log: LogView, nodes: Sequence[NodeView], policy: Policy, *, use_slots: bool) -> Restore:
    """The best restore point: the log's first candidate, or slots of the same step or a newer one on every node."""
    if log.candidates:
        base = Restore(log.candidates[0].n, log.candidates[0].step)
    elif log.parent:
        base = Restore(None, log.parent[2], parent=log.parent[:2])
    else:
        base = Restore(None, 0)
    if not use_slots or not log.attempts or len(nodes) < policy.nodes:
        return base
    newest = log.attempts[-1]
    allowed = {*newest.slot_epochs, newest.epoch}
    if newest.plan != policy.plan or newest.launch != policy.launch:
        return base
    held = frozenset.intersection(*(n.slots for n in nodes)) if nodes else frozenset()
    usable = [(step, epoch) for step, epoch in held if epoch in allowed and step >= base.step]
    if not usable:
        return base
    step, epoch = max(usable)
    return Restore(base.checkpoint, step, (step, epoch), base.parent)


def _progress(log: LogView) -> list[int]:
    """The restore step of each attempt, in order: what had been saved when it began."""
    return [a.restore_step for a in log.attempts]


def _give_up(log: LogView, cause: Cause, policy: Policy) -> str | None:
    """Why no further attempt makes sense, or None (D4)."""
    if cause.cls in ("config", "data"):
        return cause.text
    if cause.cls == "memory" and any(a.cause and a.cause.get("class") == "memory" for a in log.attempts):
        return f"{cause.text}; twice"
    if cause.cls == "sick" and any(
        a.cause and (a.cause.get("class"), a.cause.get("place")) == ("sick", cause.place) for a in log.attempts
    ):
        return f"{cause.text}; twice, and there is no other machine"
    if cause.cls in ("bug", "signal", "numeric"):
        same = 1
        for earlier in reversed([a.cause for a in log.attempts if a.cause]):
            if earlier.get("class") != cause.cls or earlier.get("step") != cause.step:
                break
            same += 1
        # a kill from outside (9) may hit any step twice by chance; a crash of its own at one step twice is a fact
        limit = policy.max_same_step + (2 if "signal 9" in cause.text else 0)
        if same >= limit:
            return f"{cause.text}; {same} times at step {cause.step}"
    steps = _progress(log)
    recent = steps[-policy.max_attempts_without_progress :]
    if len(recent) == policy.max_attempts_without_progress and len(set(recent)) == 1 and steps:
        return (
            f"{len(recent)} attempts in a row started from step {recent[0]} and saved nothing newer; last: {cause.text}"
        )
    return None


def _backoff(log: LogView, policy: Policy) -> float:
    """No wait after progress; else doubling from backoff_s."""
    steps = _progress(log)
    stuck = 0
    while stuck + 1 < len(steps) and steps[-1 - stuck] == steps[-2 - stuck]:
        stuck += 1
    return 0.0 if stuck == 0 else min(policy.backoff_s * 2.0 ** (stuck - 1), policy.backoff_max_s)


_STRIKING = ("infra", "signal", "stall")


def struck(causes: Sequence[Mapping[str, Any] | None], strikes: int) -> frozenset[str]:
    """Machines that were the place of so many failures that may have been theirs, or that are sick (D5)."""
    found = [(str(c["place"]), c.get("class")) for c in causes if c and c.get("place")]
    places = [place for place, cls in found if cls in _STRIKING]
    sick = {place for place, cls in found if cls == "sick"}
    return frozenset(sick | {place for place in places if places.count(place) >= strikes})


def decide(
    log: LogView,
    nodes: Sequence[NodeView],
    policy: Policy,
    *,
    lost: Cause | None = None,
    waiting: str = "",
) -> Decision:
    """What to do next. ``nodes``: one view a node of the present launch, as far as any is known; ``lost``: why that
    launch cannot be made whole, by its launcher; ``waiting``: what it waits for, by its launcher.
    """
    settled = _settled(log, nodes, policy)
    if settled is not None:
        return settled
    newest = log.attempts[-1]
    mine = [n for n in nodes if n.epoch == newest.epoch]
    cause, leave = _cause(newest, nodes, mine, lost, policy), lost is not None
    began = any(r.pid for n in mine for r in n.ranks)
    if cause is not None and cause.cls == "infra" and waiting and not leave and not began:
        return Watch(Phase.WAITING, waiting)  # nodes that are there gave up on those that have no room yet (D5)
    if cause is None:
        cause = _stalled(mine, newest, policy)
        if cause is None:
            return Watch(Phase.WAITING, waiting) if waiting else Watch(*_phase(log, nodes, mine, policy))
    elif not _drained(nodes, newest, policy, leaving=leave):
        return Watch(Phase.DRAINING, cause.text)
    return _recover(log, nodes, policy, _explained(cause, mine, leave=leave), leave=leave)


def _settled(log: LogView, nodes: Sequence[NodeView], policy: Policy) -> Decision | None:
    """What the log alone decides: an end, a success (D1), a first attempt, an attempt of another layout or launch."""
    if log.ended:
        return Finished(log.ended)
    if any(c.step >= policy.steps for c in log.candidates):
        return End("succeeded", f"step {policy.steps} is saved")
    if not log.attempts:
        return StartAttempt(choose_restore(log, (), policy, use_slots=False), (), "start")
    newest = log.attempts[-1]
    if newest.plan != policy.plan or newest.launch != policy.launch:
        return StartAttempt(choose_restore(log, nodes, policy, use_slots=False), (), "another layout or launch")
    return None


def _cause(
    newest: AttemptView, nodes: Sequence[NodeView], mine: Sequence[NodeView], lost: Cause | None, policy: Policy
) -> Cause | None:
    """Why the attempt is over, on positive evidence (D2): its ranks' ends, a node that is gone, a launch that is lost.

    ``mine``: the nodes that know of the attempt.
    """
    ranks = [r for n in mine for r in n.ranks]
    cause = diagnose(ranks, policy.node_bytes)
    # a node whose ranks never began has lost nothing: the launcher starts what it lacks
    gone = [n for n in nodes if n.alive is False and any(r.pid for r in n.ranks)]
    if cause is None and gone and newest.epoch in {n.epoch for n in gone}:
        first = gone[0]
        reached = max((r.step for r in ranks), default=-1)
        cause = Cause("infra", f"node {first.node} is gone", "", None, reached, place=first.place)
    if cause is not None and cause.rank is not None:
        blamed = _waited_for(cause.rank, ranks) if cause.cls == "stall" else cause.rank
        place = next((n.place for n in mine if any(r.rank == blamed for r in n.ranks)), "")
        cause = replace(cause, place=place)
    return cause if lost is None else _outranked(cause, lost, ranks, newest.ranks)


def _waited_for(rank: int, ranks: Sequence[RankView]) -> int:
    """At the end of who waits for whom, from the last words of a rank that stalled: where the stall comes from."""
    stalled = {r.rank: r for r in ranks if r.ended and rank_class(r) == "stall"}
    seen: set[int] = set()
    while rank in stalled and rank not in seen:
        seen.add(rank)
        peer = (stalled[rank].words or {}).get("peer")
        if not isinstance(peer, int):
            break
        rank = peer
    return rank


def _explained(cause: Cause, mine: Sequence[NodeView], *, leave: bool) -> Cause:
    """The cause with what its nodes say beside it: an agent's trouble, or that all left on request."""
    trouble = next((n for n in mine if n.error and n.error not in cause.text), None)
    if cause.cls == "infra" and trouble is not None:  # what an agent could not store is why its ranks left with 75
        return replace(cause, text=f"{cause.text}; node {trouble.node} says: {trouble.error}")
    ended = [r for n in mine for r in n.ranks if r.ended]
    if not leave and cause.cls == "preempted" and all(rank_class(r) == "preempted" for r in ended):
        return Cause("preempted", "stopped on request, state saved", "", None, cause.step)
    return cause


def _recover(log: LogView, nodes: Sequence[NodeView], policy: Policy, cause: Cause, *, leave: bool) -> Decision:
    """After an attempt that is over: give up (D4), mark its restore point, or the next attempt (``leave``: D5)."""
    newest = log.attempts[-1]
    why = _give_up(log, cause, policy)
    if why:
        return End("gave_up", why, cause)
    tried = newest.restore_checkpoint if newest.restore_slots is None else None
    if cause.cls == "restore" and tried is not None and any(c.n == tried for c in log.candidates):
        return MarkDamaged(tried, cause.text)
    unfit = struck([*(a.cause for a in log.attempts), cause.to_map()], policy.strikes)
    renew = leave or any(n.place in unfit for n in nodes)
    # a damaged slot or diverging numbers: not from memory again
    use_slots = cause.cls not in ("restore", "numeric") and not renew
    restore = choose_restore(log, nodes, policy, use_slots=use_slots)
    epochs = (*newest.slot_epochs, newest.epoch)[-16:] if use_slots else ()
    return StartAttempt(restore, epochs, "recover", cause, _backoff(log, policy), renew)


def _outranked(cause: Cause | None, lost: Cause, ranks: Sequence[RankView], all_ranks: int) -> Cause:
    """What the launcher knows explains a peer that was lost or asked to stop; a rank's own end explains the rest."""
    step = max((r.step for r in ranks), default=-1)
    if cause is None:
        return replace(lost, step=step)
    if len(ranks) == all_ranks and all(r.ended and rank_class(r) == "preempted" for r in ranks):
        text = lost.text if "state saved" in lost.text else f"{lost.text}; state saved"
        return Cause("preempted", text, lost.mend, None, step, place=lost.place)
    if cause.cls in ("infra", "preempted") or _CAUSAL.index(lost.cls) < _CAUSAL.index(cause.cls):
        return replace(lost, step=step)
    return cause


def _drained(nodes: Sequence[NodeView], newest: AttemptView, policy: Policy, *, leaving: bool) -> bool:
    """True when every node of the attempt has no rank left, or is known to be gone, or had its time.

    ``leaving``: the nodes will not come again, and what they may still save is worth waiting for.
    """
    broken = any(n.alive is False for n in nodes)
    for node in nodes:
        if node.alive is False or node.epoch != newest.epoch:
            continue
        ended = [r for r in node.ranks if r.ended]
        if leaving and node.alive is None:  # its launcher knows of its launch, and of no engine: it has not started
            continue
        # nothing that all agree on can be saved any more where a node is gone: its peers may wait for it for long
        if leaving and broken and node.step_age_s >= policy.drain_s:
            continue
        if leaving and len(ended) < len(node.ranks) and node.age_s < policy.stall_s:
            return False
        if len(ended) < len(node.ranks) and node.age_s < policy.drain_s and node.step_age_s < policy.drain_s:
            return False
        if len(ended) < len(node.ranks) and node.age_s >= policy.drain_s:
            continue
        if len(ended) < len(node.ranks):
            return False
    return True


def _stalled(mine: Sequence[NodeView], newest: AttemptView, policy: Policy) -> Cause | None:
    """No step for three stall limits while the nodes' own heartbeats go on: the engine's watchdog failed too (D2)."""
    running = [n for n in mine if n.phase in ("starting", "running")]
    if not running or len(running) < newest.nodes:
        return None
    limit = 3 * policy.stall_s + (policy.start_s if all(r.step < 0 for n in running for r in n.ranks) else 0)
    if all(n.step_age_s > limit and n.age_s < policy.stall_s for n in running):
        return Cause("stall", f"no step for {limit:.0f} s although every node answers", "", None, -1)
    return None


def _phase(log: LogView, nodes: Sequence[NodeView], mine: Sequence[NodeView], policy: Policy) -> tuple[Phase, str]:
    if len(mine) < policy.nodes:
        return Phase.LAUNCHING, f"{len(mine)} of {policy.nodes} nodes know of the attempt"
    if any(n.phase in ("restoring", "idle", "starting") for n in mine):
        return Phase.STARTING, ", ".join(sorted({n.phase for n in mine}))
    ranks = [r for n in mine for r in n.ranks]
    if ranks and all(r.ended for r in ranks):
        return Phase.DRAINING, "waiting for the last checkpoint's record"
    return Phase.TRAINING, ""
