"""Mistakes that the shipped driver does not make, each made on purpose inside a block, for the campaign to find.

Each says what is wrong in it. They are put into the code from outside (docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import flows.drive.decide as decide_module
import flows.drive.history as history_module
import flows.drive.loop as loop_module
from flows.drive.views import AttemptView, Cause, LogView, NodeView, Policy, StartAttempt
from tests.support.protocol import mistakes as protocol
from tests.support.protocol.hub import swapped
from trainer.failures import Failure
from trainer.launch import LaunchView


@contextmanager
def silence_is_failure() -> Iterator[None]:
    """A node that tells nothing, while another one trains, is taken for gone."""
    known = decide_module.cause_of

    def hasty(newest: AttemptView, nodes: Sequence[NodeView], mine: Sequence[NodeView], lost: Cause | None,
              policy: Policy) -> Cause | None:  # fmt: skip
        if len(mine) < newest.nodes and any(n.phase == "running" for n in mine):
            return Cause(Failure.INFRA, "a node is silent")
        return known(newest, nodes, mine, lost, policy)

    with swapped(decide_module, "cause_of", hasty), swapped(decide_module, "_drained", lambda *_, **__: True):
        yield


@contextmanager
def unknown_is_gone() -> Iterator[None]:
    """A cluster that does not answer has lost the launch."""
    known = loop_module.loss_of

    def hasty(view: LaunchView, *more: Any) -> Cause | None:
        return Cause(Failure.INFRA, "no answer") if view.state == "unknown" else known(view, *more)

    with swapped(loop_module, "loss_of", hasty):
        yield


@contextmanager
def old_words_count() -> Iterator[None]:
    """What a node says of an attempt before is taken for the newest one's."""
    judge = decide_module.judge

    def confused(log: LogView, nodes: Sequence[NodeView], policy: Policy, **more: Any) -> Any:
        epoch = log.attempts[-1].epoch if log.attempts else 0
        return judge(log, [replace(n, epoch=epoch) if n.epoch else n for n in nodes], policy, **more)

    with swapped(decide_module, "judge", confused):
        yield


@contextmanager
def nothing_is_forgiven() -> Iterator[None]:
    """Failures count for ever, whatever was saved since."""
    with swapped(history_module, "recent", lambda log: log.attempts):
        yield


@contextmanager
def once_is_enough() -> Iterator[None]:
    """The first crash is taken for one that comes again."""
    known = decide_module.give_up

    def hasty(log: LogView, cause: Cause, policy: Policy) -> str | None:
        return cause.said() if cause.cls in (Failure.SIGNAL, Failure.BUG) else known(log, cause, policy)

    with swapped(decide_module, "give_up", hasty):
        yield


@contextmanager
def sick_machines_are_used_again() -> Iterator[None]:
    """Strikes are not counted."""
    with (
        swapped(decide_module, "struck", lambda *_: frozenset()),
        swapped(loop_module, "avoided", lambda *_: ()),
    ):
        yield


@contextmanager
def a_lost_launch_is_not_left() -> Iterator[None]:
    """The next attempt is in the launch that lost a node."""
    known = decide_module._recover

    def stays(*given: Any, leave: bool) -> Any:
        found = known(*given, leave=leave)
        return replace(found, renew=False) if isinstance(found, StartAttempt) else found

    with swapped(decide_module, "_recover", stays):
        yield


@contextmanager
def unwatched_time_counts() -> Iterator[None]:
    """A clock that jumps is believed."""
    with swapped(loop_module.Driver, "_watched", lambda self: self.clock()):
        yield


MISTAKES: dict[str, tuple[Callable[[], AbstractContextManager[None]], str]] = {
    "silence is failure": (silence_is_failure, "killed"),
    "unknown is gone": (unknown_is_gone, "killed"),
    "old words count": (old_words_count, "killed"),
    "no epoch fence": (protocol.no_fence, "duplicates"),
    "nothing is forgiven": (nothing_is_forgiven, "wrong"),
    "once is enough": (once_is_enough, "wrong"),
    "sick machines are used again": (sick_machines_are_used_again, "wrong orphans"),
    "a lost launch is not left": (a_lost_launch_is_not_left, "wrong orphans"),
    "unwatched time counts": (unwatched_time_counts, "killed"),
    "forgets what was saved since": (protocol.forgets_what_was_saved_since, "wrong orphans"),
}
"""Each with the kinds of findings by which it is found."""
