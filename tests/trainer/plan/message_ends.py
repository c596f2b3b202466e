"""Messages written down one by one, for the proof that they meet (``trainer.plan.channels``, which takes columns)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.plan.channels import Ends, check_ends


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """One end of a message, as a position's list has it. ``label`` is the same at both ends; ``text`` is for people."""

    channel: Hashable
    is_send: bool
    label: Hashable
    text: str


def check_channels(rows: Sequence[Sequence[MessageEnd]]) -> None:
    """``check_ends`` of messages whose channels and labels are any values."""
    channels: dict[Hashable, int] = {}
    labels: dict[Hashable, int] = {}
    ends = [
        Ends(
            np.array([channels.setdefault(m.channel, len(channels)) for m in row], np.int32),
            np.array([m.is_send for m in row], np.bool_),
            np.array([labels.setdefault(m.label, len(labels)) for m in row], np.int32),
        )
        for row in rows
    ]
    names = list(channels)
    check_ends(ends, len(names), lambda position, place: rows[position][place].text, names.__getitem__)
