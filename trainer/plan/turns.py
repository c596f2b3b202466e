"""The order in which a position runs the parts of its step list, from the first step of an attempt to its last.

A checked step is its list. An optimistic one's list (``optimistic.py``) is in the order of most steps: the prefix, the
check of the step before, the rest.

    first step          prefix, rest
    each later one      prefix, check of the step before, rest
    where that clips    prefix, check of the step before, redo, prefix again, rest
    at the end          report, check of the last step

A prefix that runs again leaves out DATA, which is there, and the report, which is of the step before; the first one has
no report to send, and the end sends nothing else. ``run/steps.c`` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer import wire
from trainer.plan.records import ActionList, Channel, PositionPlan


@dataclass(frozen=True)
class Turns:
    """The parts of a position's step list. Checked at its end, it is all ``rest``."""

    first: ActionList
    """The prefix of an attempt's first step."""
    ahead: ActionList
    """The prefix of a later one."""
    again: ActionList
    """The prefix, where it runs a second time."""
    end: ActionList
    """What the end sends."""
    check: ActionList
    rest: ActionList
    redo: ActionList

    @classmethod
    def of(cls, position: PositionPlan, channels: Sequence[Channel]) -> Turns:
        """Those of a position; ``channels``: the plan's."""
        step, prefix, checked = ActionList.of(position.step), position.step_prefix, position.step_checks
        ahead = step[:prefix]
        told = [p.kind == wire.A_SEND and _reports(channels, p.channel) for p in step.patterns]
        data = [p.kind == wire.A_DATA for p in step.patterns]
        reports, given = np.array(told, np.bool_)[ahead.which], np.array(data, np.bool_)[ahead.which]
        return cls(
            ahead.take(~reports),
            ahead,
            ahead.take(~reports & ~given),
            ahead.take(reports),
            step[prefix : prefix + checked],
            step[prefix + checked :],
            ActionList.of(position.redo),
        )

    def steps(self, count: int) -> list[ActionList]:
        """What an attempt of so many steps runs, step by step up to the end of its check, where nothing is clipped."""
        between = ActionList.joined([self.rest, self.ahead, self.check])
        end = ActionList.joined([self.rest, self.end, self.check])
        steps = [*[between] * (count - 1), end]
        return [ActionList.joined([self.first, steps[0]]), *steps[1:]]

    def closed(self) -> dict[str, ActionList]:
        """Parts that have both ends of all their messages, by name. An attempt is a sequence of them: where each can
        run to its end, any sequence can."""
        if not len(self.check):
            return {"step": self.rest}
        parts = {
            "prefix": [self.first],
            "step": [self.rest, self.ahead, self.check],
            "redo": [self.redo, self.again],
            "last step": [self.rest, self.end, self.check],
        }
        return {name: ActionList.joined(lists) for name, lists in parts.items()}


def _reports(channels: Sequence[Channel], number: int | None) -> bool:
    """Whether a channel takes reports to position 0 of the same replica."""
    return number is not None and channels[number].kind == wire.CH_REPORT and not channels[number].across
