"""Why an attempt is over: the most causal of what its ranks, its nodes and its launcher say. Pure; part of `decide`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flows.drive.views import AttemptView, Cause, NodeView, Policy, RankView
from trainer.failures import CAUSAL, FAILURES, Failure, from_elsewhere, of_code, of_signal, of_xid, xid_text
from trainer.wire import EXITS

NO_WAY = (
    "where ranks never reach each other something between their machines takes the messages (a firewall; on a cluster "
    "a NetworkPolicy or a mesh): let their ports through, launch.port_base and on, of pods 7400 to 7655 where that is "
    "unset (k8s/base/network.yaml)"
)


def rank_class(rank: RankView) -> Failure:
    """The class of an ended rank. One that its own supervisor killed was lost with a peer: never a cause."""
    if rank.killed:
        return Failure.INFRA
    if (sick := of_xid(rank.xid)) is not None:
        return sick
    if rank.memory is not None:
        return Failure.MEMORY
    if rank.signal is not None:
        return of_signal(rank.signal)
    return Failure.BUG if rank.code is None else of_code(rank.code)


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
    driver = f"; NVIDIA's driver says of its device: {xid_text(rank.xid)}" if rank.xid is not None else ""
    return f"rank {rank.rank} {what}" + (f" ({said})" if said else "") + driver


def diagnose(ranks: Sequence[RankView], node_bytes: int = 0) -> Cause | None:
    """The most causal end among all ranks of an attempt (D3); None where none ended badly. ``node_bytes`` as in Policy,
    for the words about memory.
    """
    ended = [r for r in ranks if r.ended and rank_class(r) != Failure.DONE]
    if not ended:
        return None
    # the earliest step at equal class: a rank that fails drags the others on
    first = min(ended, key=lambda r: (CAUSAL[rank_class(r)], r.step, r.rank))
    cls = rank_class(first)
    # once it has met its peers a rank's last words say what it did, and whom it waited for (executor.h)
    apart = cls is Failure.STALL and first.words is not None and not {"action", "peer"} & first.words.keys()
    return Cause(
        cls,
        _describe(first, node_bytes),
        NO_WAY if apart else FAILURES[cls].mend,
        first.rank,
        max((r.step for r in ranks), default=-1),
        first.words,
        signal=first.signal,
        code=first.code,
    )


def cause_of(
    newest: AttemptView, nodes: Sequence[NodeView], mine: Sequence[NodeView], lost: Cause | None, policy: Policy
) -> Cause | None:
    """Why the attempt is over, on positive evidence (D2): its ranks' ends, a node that is gone, a launch that is lost.

    ``mine``: the nodes that know of the attempt.
    """
    ranks = [r for n in mine for r in n.ranks]
    cause = diagnose(ranks, policy.node_bytes)
    # a node whose ranks never began has lost nothing: the launcher starts what it lacks
    gone = [n for n in nodes if n.alive is False and n.epoch == newest.epoch and any(r.pid for r in n.ranks)]
    first = next((n for n in gone if not _lost_another(n, ranks)), None)
    if first is not None and (cause is None or cause.cls == Failure.INFRA):  # it explains the peers that lost it
        reached = max((r.step for r in ranks), default=-1)
        cause = Cause(Failure.INFRA, f"node {first.node} is gone", "", None, reached, place=first.place)
    if cause is not None and cause.rank is not None:
        # a rank that lost its peer tells of that peer's machine, which may be gone without a word
        lost_peer = cause.cls in (Failure.STALL, Failure.INFRA)
        blamed = _waited_for(cause.rank, ranks) if lost_peer else cause.rank
        node = next((n for n in mine if any(r.rank == blamed for r in n.ranks)), None)
        if lost_peer and any(r.rank == blamed and r.ended and r.words is None for r in ranks):
            # ended before it could say whom it waited for: a silent node, with ranks of which nobody knows
            silent = (n for n in mine if n.age_s >= policy.stall_s and not all(r.ended for r in n.ranks))
            node = next(silent, node)
        cause = replace(cause, place=node.place if node is not None else "")
    return cause if lost is None else _outranked(cause, lost, ranks, newest.ranks)


def _lost_another(node: NodeView, ranks: Sequence[RankView]) -> bool:
    """Whether this node left because of one elsewhere: all its ranks have said how they ended, and one of them whom it
    had waited for.
    """
    here = {r.rank for r in node.ranks}
    lost = [r.rank for r in node.ranks if r.ended and rank_class(r) is Failure.INFRA]
    return all(r.ended for r in node.ranks) and any(_waited_for(rank, ranks) not in here for rank in lost)


def _waited_for(rank: int, ranks: Sequence[RankView]) -> int:
    """At the end of who waits for whom, from the last words of a rank that stalled or lost its peer.

    Who ended because of it, or was ended, waited too: of a chain of ranks, any one's deadline may pass first.
    """
    waited = {r.rank: r for r in ranks if r.ended and rank_class(r) in (Failure.STALL, Failure.INFRA)}
    seen: set[int] = set()
    while rank in waited and rank not in seen:
        seen.add(rank)
        peer = (waited[rank].words or {}).get("peer")
        if not isinstance(peer, int):
            break
        rank = peer
    return rank


def explained(cause: Cause, mine: Sequence[NodeView], *, leave: bool) -> Cause:
    """The cause with what its nodes say beside it: an agent's trouble, or that all left on request."""
    told = {str(v) for v in (cause.words or {}).values()}
    trouble = next((n for n in mine if n.error and n.error not in told), None)
    if cause.cls == Failure.INFRA and trouble is not None:
        # what an agent could not store is why its ranks left with 75
        return replace(cause, trouble=f"node {trouble.node} says: {trouble.error}")
    ended = [r for n in mine for r in n.ranks if r.ended]
    if not leave and cause.cls == Failure.PREEMPTED and all(rank_class(r) == Failure.PREEMPTED for r in ended):
        return Cause(Failure.PREEMPTED, "stopped on request", "", None, cause.step, saved=True)
    return cause


def _outranked(cause: Cause | None, lost: Cause, ranks: Sequence[RankView], all_ranks: int) -> Cause:
    """What the launcher knows explains a peer that was lost or asked to stop; a rank's own end explains the rest."""
    step = max((r.step for r in ranks), default=-1)
    if cause is None:
        return replace(lost, step=step)
    if len(ranks) == all_ranks and all(r.ended and rank_class(r) == Failure.PREEMPTED for r in ranks):
        return replace(lost, cls=Failure.PREEMPTED, rank=None, step=step, saved=True)
    if cause.cls is lost.cls is Failure.INFRA and cause.place and (not lost.place or from_elsewhere(lost.code)):
        # a pod that left because it had lost a peer may be seen before the peer's own end: its ranks say which one
        return replace(cause, step=step) if lost.place else replace(lost, step=step, place=cause.place)
    if cause.cls in (Failure.INFRA, Failure.PREEMPTED) or CAUSAL[lost.cls] < CAUSAL[cause.cls]:
        return replace(lost, step=step)
    return cause


def stalled(mine: Sequence[NodeView], newest: AttemptView, policy: Policy) -> Cause | None:
    """No step for three stall limits while the nodes' own heartbeats go on: the engine's watchdog failed too (D2)."""
    running = [n for n in mine if n.phase in ("starting", "running")]
    if not running or len(running) < newest.nodes:
        return None
    limit = 3 * policy.stall_s + (policy.start_s if all(r.step < 0 for n in running for r in n.ranks) else 0)
    if all(n.step_age_s > limit and n.age_s < policy.stall_s for n in running):
        return Cause(Failure.STALL, f"no step for {limit:.0f} s although every node answers", "", None, -1)
    return None
