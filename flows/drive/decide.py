"""The driver's mind: ``decide(folded log, observation, policy, memory) -> decision, memory``. Pure; no clock, no I/O.

The driver keeps nothing. Everything it knows is the folded log (truth), an observation (hints that may be late or
missing), and a memory of since when it has seen some of it; so it can be killed at any instruction, and the next one
decides the same, or waits longer. ``flows/drive/loop.py`` is the thin
loop that observes, asks here, and acts; nobody acts on a gang before the log record that orders it is won. The data is
in ``flows/drive/views.py``, what the past means in ``flows/drive/history.py``, D11 and D12 in ``policies.py``.

Rules:
  D1  The log outranks every hint: a recorded checkpoint of the last step is success, whatever the hints say.
  D2  "Does not answer" is unknown, never failure. A healthy gang is ended only on positive evidence: an exit that its
      supervisor reported, a node that its launcher knows to be gone, or no step within the stall limit while the node's
      own heartbeat goes on.
  D3  An attempt's cause is the most causal of all its ranks; 75 and 143 (a peer was lost, asked to stop) never outrank.
  D4  Infrastructure failures resume without a budget while there is progress; what repeats at the same step does not.
      Failures count since progress, or since a person's last word.
  D5  A launch that lost a node for good is left, and the next attempt takes a new one, once every rank that may still
      save has ended. A machine in ``strikes`` failures is left out of later launches. Waiting for room is no failure.
  D6  Another layout is begun only because an order in the log is newer than the one that the newest attempt follows,
      and asks for another How. No driver compares a plan of its own with the attempt's.
  D7  A checkpoint is damaged when two readings in a row say so. A run that has had a checkpoint never goes back to its
      beginning by itself.
  D8  What a driver remembers from look to look is a value (`Memory`): times since when, which only make it wait. The
      same log, look and memory are the same decision.
  D9  Where a launch cannot be had, the run takes the next layout of its spec's list that fits what there is; no gang
      that trains is ended for that, nor to have more nodes again: the next launch is for the layout that was asked for.
  D10 Where numbers diverge for good, and the spec says skip, the driver gives an order of its own: back to the newest
      checkpoint and past what was read from there on, a few times since a person's last word. All else that changes
      bits, but for D11, is a person's order (docs/adr/0015).
  D11 A loss that explodes is a hint: it is told. Where the spec says so (recovery.on_explosion) it is acted on, while
      the gang of that attempt trains: the run goes back to a checkpoint from before it, past the batches or at half the
      rate, as often as D10 does, each time further; or gives up. Nothing is thrown away for it that is not saved:
      without such a checkpoint it is told alone.
  D12 A run that has used its device hours saves its state, leaves, and ends parked; only a person's order opens it.
  D13 A gang of which a part has room keeps it from others, who may have the rest and wait for it in their turn. After
      ``capacity_s``, later each time and by a share of its own, it gives its room back and asks anew a little later.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from flows.drive.causes import cause_of, explained, rank_class, stalled
from flows.drive.history import avoided, backoff, give_up, recent, struck, suspected
from flows.drive.policies import healed, often, own_orders, parked
from flows.drive.views import (
    AttemptView,
    AwaitStop,
    Cause,
    Decision,
    End,
    Fallback,
    Finished,
    Leave,
    LogView,
    Look,
    MarkDamaged,
    Memory,
    NodeView,
    OwnOrder,
    Phase,
    Policy,
    Restore,
    RunLayout,
    Saves,
    StartAttempt,
    Watch,
)
from trainer.failures import FAILURES, Failure
from trainer.wire import ATTEMPT_SKIPS_MAX

K = TypeVar("K")
GIVEN_FOR = 0.3
"""Of ``capacity_s``: for how long what was given back is left to others. A Job asks a quota again once a minute."""


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
    if newest.launch != policy.launch:
        return base
    held = frozenset.intersection(*(n.slots for n in nodes)) if nodes else frozenset()
    usable = [(step, epoch) for step, epoch in held if epoch in allowed and step >= base.step]
    if not usable:
        return base
    step, epoch = max(usable)
    return Restore(base.checkpoint, step, (step, epoch), base.parent)


def decide(log: LogView, seen: Look, policy: Policy, memory: Memory) -> tuple[Decision, Memory]:
    """What to do next, and what to remember of it until the next look."""
    memory = _remembered(log, seen, policy, memory)
    if seen.finishing and not log.ended:
        return AwaitStop(), memory
    if seen.stop and not log.ended:
        return leaving(seen, detaches=policy.detaches), memory
    decision = judge(
        log,
        seen.nodes,
        policy,
        lost=seen.lost,
        waiting=seen.waiting,
        room=seen.room,
        waited_s=_age(memory.waiting, seen),
        left_s=_age(memory.leaving, seen),
    )
    decision = parked(log, seen, policy, decision) or healed(log, seen, policy, decision) or decision
    if isinstance(decision, Watch):
        if memory.given is not None and decision.phase is Phase.LAUNCHING:
            return Watch(Phase.WAITING, "its room is left to others for a while", ensure=False), memory
        return replace(decision, ensure=seen.lost is None), memory
    if isinstance(decision, StartAttempt) and decision.gives_way:
        return decision, replace(memory, given=(policy.launch, seen.now_s))
    if isinstance(decision, StartAttempt) and decision.delay_s > 0:
        memory = replace(memory, holding=memory.holding or (log.attempts[-1].epoch, seen.now_s))
        if _age(memory.holding, seen) < decision.delay_s:
            return Watch(Phase.BACKOFF, f"next attempt in {decision.delay_s:.0f} s", ensure=False), memory
    if isinstance(decision, StartAttempt) and log.ended:
        decision = replace(decision, renew=True)  # its nodes have left, or are about to
    return decision, memory


def leaving(seen: Look | None, *, detaches: bool) -> Leave:
    """How a driver leaves, by its last look: what is out of reach trains on, and so do nodes that outlive a driver."""
    return Leave(detaches or (seen is not None and not seen.reached))


def _remembered(log: LogView, seen: Look, policy: Policy, memory: Memory) -> Memory:
    """The memory as of this look: what goes on keeps its beginning, what is over is forgotten."""
    epoch = log.attempts[-1].epoch if log.attempts else 0
    ranks = [r for n in seen.nodes if n.epoch == epoch for r in n.ranks if r.ended]
    left = epoch if any(rank_class(r) is Failure.PREEMPTED for r in ranks) else None
    return Memory(
        waiting=_since(memory.waiting, policy.launch if seen.waiting else None, seen.now_s),
        leaving=_since(memory.leaving, left, seen.now_s),
        holding=memory.holding if memory.holding and memory.holding[0] == epoch else None,
        given=memory.given if _age(memory.given, seen) < GIVEN_FOR * policy.capacity_s else None,
    )


def _since(before: tuple[K, float] | None, key: K | None, now_s: float) -> tuple[K, float] | None:
    if key is None:
        return None
    return before if before is not None and before[0] == key else (key, now_s)


def _age(since: tuple[object, float] | None, seen: Look) -> float:
    return seen.now_s - since[1] if since is not None else 0.0


def launch_to_use(log: LogView, wanted: RunLayout, *, detaches: bool, over: bool) -> str | None:
    """The newest attempt's launch where its layout fits and it has not ended for good; None: a new one.

    ``over``: that launch has done its work and left.
    """
    newest = log.attempts[-1] if log.attempts else None
    if newest is None or (newest.nodes, newest.ranks) != (wanted.nodes, wanted.ranks):
        return None
    # what a cluster was told of its pods may not be what they must be now
    if detaches and superseded(log) and any(wanted.how[k] != newest.how.get(k) for k in ("launch", "parallel")):
        return None
    here = (newest.how.get("launch") or {}).get("target") == wanted.how["launch"]["target"]
    return newest.launch if here and (log.ended or not over) else None


def judge(
    log: LogView,
    nodes: Sequence[NodeView],
    policy: Policy,
    *,
    lost: Cause | None = None,
    waiting: str = "",
    room: int = 0,
    waited_s: float = 0.0,
    left_s: float = 0.0,
) -> Decision:
    """What the log and the nodes ask for, whatever this driver itself should do. ``nodes``, ``lost``, ``waiting``,
    ``room``: as in `Look`; ``waited_s``: for how long the launch has waited; ``left_s``: since a rank of the newest
    attempt was first seen to have left on request.
    """
    settled = _settled(log, policy)
    if settled is not None:
        return settled
    newest = log.attempts[-1]
    mine = [n for n in nodes if n.epoch == newest.epoch]
    trains = any(r.pid and not r.ended for n in mine for r in n.ranks)  # whatever its launcher says: it is not ended
    if waiting and lost is None and waited_s >= policy.capacity_s and not trains:
        relief = _without_room(log, policy, waiting, room, waited_s)
        if relief is not None:
            return relief
    cause, leave = cause_of(newest, nodes, mine, lost, policy), lost is not None
    began = any(r.pid for n in mine for r in n.ranks)
    if cause is not None and cause.cls == Failure.INFRA and waiting and not leave and not began:
        return Watch(Phase.WAITING, waiting)  # nodes that are there gave up on those that have no room yet (D5)
    if cause is None:
        cause = stalled(mine, newest, policy)
        if cause is None:
            return Watch(Phase.WAITING, waiting) if waiting else Watch(*_phase(mine, policy))
    elif not _drained(nodes, newest, policy, leaving=leave):
        return Watch(Phase.DRAINING, cause.said())
    decision = _recover(log, nodes, policy, explained(cause, mine, leave=leave), leave=leave)
    if isinstance(decision, StartAttempt) and not decision.renew and cause.cls == Failure.PREEMPTED:
        # ranks that saved and left on request are mostly on a node that leaves with them, and its launcher shows that a
        # moment later: an attempt in that launch would only be lost with it
        return Watch(Phase.DRAINING, cause.said()) if policy.detaches and left_s < policy.leaving_s else decision
    return decision


def superseded(log: LogView) -> bool:
    """Whether an order is newer than the one that the newest attempt follows, and asks for another How (D6), or for
    other bits: then it says where from.
    """
    if not log.attempts:
        return False
    newest = log.attempts[-1]
    later = [order for order in log.orders if order.n > newest.order]
    return bool(later) and (later[-1].how != newest.how or any(o.start is not None for o in later))


def opened(log: LogView) -> bool:
    """Whether a run that had ended goes on by an order that came after its end; one that had succeeded, where the order
    says from where.
    """
    later = [order for order in log.orders if order.n > log.ended_n]
    return any(o.start is not None or (o.again and log.ended != "succeeded") for o in later)


def _settled(log: LogView, policy: Policy) -> Decision | None:
    """What the log alone decides: an end, a success (D1), a first attempt, an order (D6), another launch."""
    order = log.order
    by = f" by {order.by}" if order is not None and order.by else ""
    if log.ended and not opened(log):
        return Finished(log.ended)
    if max(Saves.of(log.candidates).step, default=-1) >= policy.steps:
        return End("succeeded", f"step {policy.steps} is saved")
    if not log.attempts:
        return _begin(log, policy, "start")
    if log.ended:
        return _begin(log, policy, f"resumed{by}")
    if superseded(log):
        return _begin(log, policy, f"ordered{by}")
    if log.attempts[-1].launch != policy.launch:
        return _begin(log, policy, "another launch", _asked(policy))
    return None


def _begin(log: LogView, policy: Policy, reason: str, layout: RunLayout | None = None) -> Decision:
    """An attempt that nothing in memory can serve."""
    restore = choose_restore(log, (), policy, use_slots=False)
    begin = StartAttempt(restore, (), reason, renew=layout is not None, layout=layout)
    return _no_way_back(log, restore) or begin


def _no_way_back(log: LogView, restore: Restore) -> End | None:
    """The end, where this restore point would throw away all that was ever saved (D7) and nobody ordered that."""
    if restore.checkpoint is not None or restore.slots is not None or not log.checkpoints:
        return None
    from_start = [o.n for o in log.orders if o.anew or (o.start is not None and o.start[0] is None)]
    if from_start and log.checkpoints[-1].epoch < from_start[-1]:
        return None
    records = ", ".join(map(str, log.damaged)) or "none"
    where = f"step {restore.step} of {restore.parent[0]}" if restore.parent else "step 0"
    text = f"no checkpoint can be used any more (damaged: log records {records}), and a run does not go back to {where}"
    cause = Cause(Failure.RESTORE, f"{text} by itself", FAILURES[Failure.RESTORE].mend, None)
    return End("gave_up", cause.text, cause)


def _without_room(log: LogView, policy: Policy, waiting: str, room: int, waited_s: float) -> Decision | None:
    """For a launch that has waited long enough: another layout, where the spec allows one (D9), else the machines that
    were left out, once more; else what it holds of others' room is given back (D13).
    """
    newest = log.attempts[-1]
    if room >= newest.nodes:
        return None  # it does not wait for machines
    layout = _smaller(policy, room)
    if layout is not None:
        fallback = Fallback("capacity", layout, policy.layouts[policy.layout], waiting)
        told = fallback.to_map()
        reason = f"fewer nodes: {told['layout']} instead of {told['before']}; {waiting}"[:500]
        restore = choose_restore(log, (), policy, use_slots=False)
        begin = StartAttempt(restore, (), reason, renew=True, layout=layout, fallback=fallback)
        return _no_way_back(log, restore) or begin
    out = avoided(log, newest.launch, policy.strikes)
    if not out:
        return _gives_way(log, policy, waiting, room, waited_s)
    text = f"no room without {', '.join(out)}, left out for earlier failures: {waiting}"
    cause = Cause(Failure.INFRA, text, FAILURES[Failure.INFRA].mend)
    why = give_up(log, cause, policy)
    if why:
        return End("gave_up", why, cause)
    restore = choose_restore(log, (), policy, use_slots=False)
    return _no_way_back(log, restore) or StartAttempt(restore, (), "recover", cause, renew=True, pardon=out)


def _gives_way(log: LogView, policy: Policy, waiting: str, room: int, waited_s: float) -> Decision | None:
    """A new launch, made a little later, for one that has held room for a part of its nodes long enough (D13)."""
    newest = log.attempts[-1]
    share = zlib.crc32(policy.launch.encode()) / 2**32  # two gangs that began together do not give way together
    if room == 0 or waited_s < policy.capacity_s * (len(recent(log)) + share):
        return None
    restore = choose_restore(log, (), policy, use_slots=False)
    reason = f"gave back what {room} of its {newest.nodes} nodes had, which another gang may wait for; {waiting}"[:500]
    return _no_way_back(log, restore) or StartAttempt(
        restore, (), reason, renew=True, layout=_asked(policy), gives_way=True
    )


def _smaller(policy: Policy, room: int) -> RunLayout | None:
    """The next layout of the list that there are machines for; where nobody knows how many there are, the next one."""
    later = policy.layouts[policy.layout + 1 :]
    return next((layout for layout in later if not room or layout.nodes <= room), None)


def _asked(policy: Policy) -> RunLayout | None:
    """The layout that was asked for, where the run has another."""
    return policy.layouts[0] if policy.layout else None


def _recover(log: LogView, nodes: Sequence[NodeView], policy: Policy, cause: Cause, *, leave: bool) -> Decision:
    """After an attempt that is over: give up (D4), mark its restore point (D7), or the next attempt (``leave``: D5)."""
    newest = log.attempts[-1]
    why = give_up(log, cause, policy)
    if why:
        return _skipped(log, cause, policy) or End("gave_up", why, cause)
    again = False
    if cause.cls == Failure.RESTORE and newest.restore_slots is None:
        tried = newest.restore_checkpoint
        usable = tried in Saves.of(log.candidates).n
        if not suspected(log, tried):
            again = usable or tried is None
        elif usable and tried is not None:
            return MarkDamaged(tried, cause.said())
        elif tried is None and log.parent:
            run, record, _ = log.parent
            return End(
                "gave_up", f"record {record} of {run}, which this fork begins from: {cause.said()}; twice", cause
            )
    unfit = struck(log, policy.strikes, cause)
    # a second reading is by another machine, where machines have names
    renew = leave or any(n.place in unfit for n in nodes) or (again and bool(cause.place))
    # a damaged slot or diverging numbers: not from memory again
    use_slots = FAILURES[cause.cls].from_memory and not renew
    restore = choose_restore(log, nodes, policy, use_slots=use_slots)
    epochs = (*newest.slot_epochs, newest.epoch)[-16:] if use_slots else ()
    reason = "read the checkpoint again" if again else "recover"
    layout = _asked(policy) if renew else None
    return _no_way_back(log, restore) or StartAttempt(
        restore, epochs, reason, cause, backoff(log, policy), renew, same_plan=not renew, layout=layout
    )


def _skipped(log: LogView, cause: Cause, policy: Policy) -> Decision | None:
    """Numbers that diverge at this step whenever it is done: past what was read since the newest checkpoint (D10)."""
    step = (cause.words or {}).get("step")
    if cause.cls != Failure.NUMERIC or not policy.skips_diverged or not isinstance(step, int):
        return None
    restore, amended = choose_restore(log, (), policy, use_slots=False), log.amendments
    tried = own_orders(log)
    if step <= restore.step or _no_way_back(log, restore):
        return None
    skipping = amended.skipping(amended.batch(restore.step + 1), amended.batch(step))
    if tried >= policy.max_skips or len(skipping.skip) > ATTEMPT_SKIPS_MAX:
        why = f"{cause.said()}; to skip batches, {often(tried)} (recovery.max_skips), did not help"
        return End("gave_up", why, cause)
    return OwnOrder((restore.checkpoint, restore.step), skipping, cause)


def _drained(nodes: Sequence[NodeView], newest: AttemptView, policy: Policy, *, leaving: bool) -> bool:
    """True when every node of the attempt has no rank left, is known to be gone, or must be over by now.

    Every wait inside a rank has a deadline: ``stall_s`` in a step, ``commit_s`` for its last commit. Silence is unknown
    (D2): an agent that is busy or slow has ranks that may still save, so it is borne for as long.
    ``leaving``: the nodes will not come again, and what they may still save is worth waiting for.
    """
    broken = any(n.alive is False for n in nodes)
    for node in nodes:
        if node.alive is False or node.epoch != newest.epoch or all(r.ended for r in node.ranks):
            continue
        if leaving and node.alive is None:  # its launcher knows of its launch, and of no engine: it has not started
            continue
        # nothing that all agree on can be saved any more where a node is gone: its peers may wait for it for long
        if leaving and broken and node.step_age_s >= policy.drain_s:
            continue
        if node.age_s < policy.stall_s and node.step_age_s < policy.stall_s + policy.commit_s:
            return False
    return True


STARTING_WORDS = {
    "idle": "the nodes read the attempt",
    "restoring": "restoring the state",
    "starting": "the ranks check the machine and connect",
}


def _phase(mine: Sequence[NodeView], policy: Policy) -> tuple[Phase, str]:
    if len(mine) < policy.nodes:
        return Phase.LAUNCHING, f"{len(mine)} of {policy.nodes} nodes have begun"
    if any(n.phase in ("restoring", "idle", "starting") for n in mine):
        return Phase.STARTING, ", ".join(sorted({STARTING_WORDS.get(n.phase, n.phase) for n in mine}))
    ranks = [r for n in mine for r in n.ranks]
    if ranks and all(r.ended for r in ranks):
        return Phase.DRAINING, "waiting for the last checkpoint's record"
    return Phase.TRAINING, ""
