"""The channels of a plan, and the proof that what its action lists send over them meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.errors import PlanError
from trainer.plan.channels import Ends, check_ends
from trainer.plan.places import Position, Stage
from trainer.plan.records import ActionList, BoundAction, Channel, PositionPlan, Ref
from trainer.plan.turns import Turns


class Channels:
    """The channels of a plan, numbered as they are first named."""

    def __init__(self) -> None:
        self.numbers: dict[Channel, int] = {}  # of exchanges without their bytes
        self.largest: dict[int, int] = {}  # of exchanges, by number

    def of(self, source: Position, target: Position, kind: int, size: int) -> int:
        """Number of the channel; ``size``: bytes of each of its messages."""
        return self.numbers.setdefault(Channel(source, target, kind, size), len(self.numbers))

    def across(self, position: Position, kind: int, across: int, size: int) -> int:
        """Number of the channel between a position of replicas r and r ^ ``across``, both ways; ``size``: bytes of a
        message, of which the channel has the most."""
        number = self.numbers.setdefault(Channel(position, position, kind, 0, across), len(self.numbers))
        self.largest[number] = max(size, self.largest.get(number, 0))
        return number

    @property
    def all(self) -> tuple[Channel, ...]:
        """By number."""
        return tuple(replace(c, bytes=self.largest[n]) if c.across else c for c, n in self.numbers.items())


@dataclass(frozen=True)
class OwnChannels:
    """Those of one position: messages as its lists have them, all bytes of a ref each."""

    channels: Channels
    position: Position

    def send(
        self, target: Position, kind: int, ref: Ref | None, op: str = "O", stage: Stage | None = None
    ) -> BoundAction:
        assert ref is not None
        channel = self.channels.of(self.position, target, kind, ref.bytes)
        return BoundAction(wire.A_SEND, op, None, channel, ref=ref, stage=stage)

    def receive(
        self,
        source: Position,
        kind: int,
        ref: Ref | None,
        op: str = "O",
        stage: Stage | None = None,
        sender: Stage | None = None,
    ) -> BoundAction:
        """``sender``: the stage whose result it is, where that is not the one next to ``stage``."""
        assert ref is not None
        channel = self.channels.of(source, self.position, kind, ref.bytes)
        return BoundAction(wire.A_RECV, op, None, channel, ref=ref, stage=stage, sender=sender)


def check_messages(positions: Sequence[PositionPlan], channels: Sequence[Channel]) -> None:
    """Every message of load and step, the optimizer's too: matched in order, no deadlock under rendezvous.

    Exchanges between replicas need to be pairs, a send and at once the receive of its like, and nothing more. Proof:
    let the messages inside a replica pass, as they do, in some order, in which an exchange of a position stands where
    its list has it. All replicas have the same lists, so all can follow this one order in step. Where it comes to an
    exchange across k, each rank (r, p) stands at it, and so does its partner (r ^ k, p), whose partner it is: the two
    send and receive at once, and both go on.

    Of an optimistic step, each of the parts of which an attempt consists (``Turns.closed``). Each leaves no message on
    its way; whoever can pass in some order of play can pass in any; so what runs part by part, all positions in step,
    also runs where they are not.
    """
    several = any(len(p.chunks) > 1 for p in positions) or sum(p.targets_offset is not None for p in positions) > 1
    turns = [Turns.of(p, channels).closed() for p in positions]
    parts = {name: [part[name] for part in turns] for name in turns[0]}
    for given in ([ActionList.of(p.load) for p in positions], *parts.values()):
        lists = [_without_exchanges(part, p.position, channels) for p, part in zip(positions, given, strict=True)]

        def text(position: Position, place: int, lists: Sequence[ActionList] = lists) -> str:
            messages = (action for action in lists[position] if action.channel is not None)
            action = next(islice(messages, place, None))
            assert action.channel is not None
            verb = "SEND" if action.kind == wire.A_SEND else "RECV"
            return f"{verb} kind {channels[action.channel].kind} on channel {action.channel}"

        check_ends([_ends(actions, several) for actions in lists], len(channels), text)


def _without_exchanges(actions: ActionList, position: Position, channels: Sequence[Channel]) -> ActionList:
    """The rest of a list; PlanError where an exchange is no pair."""
    across = [p.channel is not None and channels[p.channel].across > 0 for p in actions.patterns]
    if not any(across):
        return actions
    there = np.array(across, np.bool_)[actions.which]
    places = np.flatnonzero(there)
    halves = [actions.patterns[which] for which in actions.which[places].tolist()]
    for number in range(0, len(halves), 2):
        send, receive = halves[number], halves[number + 1] if number + 1 < len(halves) else None
        at, pair = int(places[number]), receive is not None and places[number + 1] == places[number] + 1
        if not (receive is not None and pair and _is_exchange(send, receive)):
            kind = "SEND" if send.kind == wire.A_SEND else "RECV"
            raise PlanError(
                f"position {position}, action {at}, {kind} on channel {send.channel} to another replica: it is no pair "
                "of a send and at once the receive of as many bytes on that channel; replicas would wait for each other"
            )
    keep = ~there
    return ActionList(actions.patterns, actions.which[keep], actions.microbatch[keep], actions.slot[keep])


def _is_exchange(send: BoundAction, receive: BoundAction) -> bool:
    assert send.ref is not None
    return (
        (send.kind, receive.kind) == (wire.A_SEND, wire.A_RECV)
        and send.channel == receive.channel
        and receive.ref is not None
        and send.ref.bytes == receive.ref.bytes
    )


def _ends(actions: ActionList, several: bool) -> Ends:
    """``several``: some position has more than one stage (or part of the head), and a message is told from others by
    its stage too."""
    channel = np.array([-1 if p.channel is None else p.channel for p in actions.patterns], np.int32)
    sends = np.array([p.kind == wire.A_SEND for p in actions.patterns], np.bool_)
    messages = np.flatnonzero(channel[actions.which] >= 0)
    which = actions.which[messages]
    label: NDArray[np.signedinteger] = actions.microbatch[messages]
    if several:
        sender = np.array([_sender(p) for p in actions.patterns], np.int64)
        label = sender[which] * (1 << 32) + label
    return Ends(channel[which], sends[which], label)


def _sender(action: BoundAction) -> int:
    """The stage whose result a message is; -1 where it is no stage's."""
    if action.sender is not None:
        return action.sender
    if action.stage is None:
        return -1
    if action.kind == wire.A_SEND:
        return action.stage
    return action.stage - 1 if action.op == "F" else action.stage + 1
