"""The channels of a plan, and the proof that what its action lists send over them meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trainer import wire
from trainer.plan.channels import Ends, check_ends
from trainer.plan.places import Position
from trainer.plan.records import ActionList, BoundAction, Channel, PositionPlan


class Channels:
    """The channels of a plan, numbered as they are first named."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.sizes = sizes
        self.numbers: dict[Channel, int] = {}
        self.ends: Counter[Position] = Counter()
        """Channels that start or end at a position."""

    def of(self, source: Position, target: Position, kind: int) -> int:
        """Number of the channel."""
        channel = Channel(source, target, kind, self.sizes[kind])
        if channel not in self.numbers:
            self.numbers[channel] = len(self.numbers)
            self.ends.update({source, target})
        return self.numbers[channel]

    @property
    def all(self) -> tuple[Channel, ...]:
        """By number."""
        return tuple(self.numbers)


def check_messages(positions: Sequence[PositionPlan], channels: Sequence[Channel]) -> None:
    """Every message of load and step, the optimizer's too: matched in order, no deadlock under rendezvous."""
    several = any(len(p.chunks) > 1 for p in positions)
    for name in ("load", "step"):
        lists: list[ActionList] = [ActionList.of(getattr(p, name)) for p in positions]

        def text(position: Position, place: int, lists: list[ActionList] = lists) -> str:
            messages = (action for action in lists[position] if action.channel is not None)
            action = next(islice(messages, place, None))
            assert action.channel is not None
            verb = "SEND" if action.kind == wire.A_SEND else "RECV"
            return f"{verb} kind {channels[action.channel].kind} on channel {action.channel}"

        check_ends([_ends(actions, several) for actions in lists], len(channels), text)


def _ends(actions: ActionList, several: bool) -> Ends:
    """``several``: some position has more than one stage, and a message is told from others by its stage too."""
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
    if action.stage is None:
        return -1
    if action.kind == wire.A_SEND:
        return action.stage
    return action.stage - 1 if action.op == "F" else action.stage + 1
