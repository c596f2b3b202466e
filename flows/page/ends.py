"""How Prefect is told the end of a run and of each of its attempts: a state's type and name, and words. Pure."""

from __future__ import annotations

import shlex

from checkpoint.log import AttemptInfo, RunState
from flows.drive.events import Outcome
from trainer.failures import FAILURES, Failure

END_STATES = {
    "succeeded": ("COMPLETED", "Completed"),
    "gave_up": ("FAILED", "Failed"),
    "cancelled": ("CANCELLED", "Cancelled"),
    "stopped": ("CANCELLED", "Cancelled"),
    "superseded": ("CANCELLED", "Cancelled"),
    "parked": ("CANCELLED", "Cancelled"),
    "preempted": ("CANCELLED", "Cancelled"),  # as the log calls a run that is parked
}


def attempt_end(state: RunState, number: int) -> tuple[str, str, str, float] | None:
    """The last state of the attempt of this number, as (type, name, message, Unix seconds); None: it goes on."""
    if number < len(state.attempts):
        after: AttemptInfo = state.attempts[number]
        cause = after.body.get("cause")
        if not cause:  # it was left for an order, another layout, or to give room back
            return "CANCELLED", "Cancelled", after.reason, after.time
        cls = Failure.read(cause.get("class"))
        crashed = cls is None or FAILURES[cls].from_outside
        kind, word = ("CRASHED", "Crashed") if crashed else ("FAILED", "Failed")
        return kind, word, str(cause.get("text") or after.reason), after.time
    if state.ended is not None:
        return *END_STATES[state.ended.outcome], state.ended.reason, state.ended.time
    return None


def end_message(outcome: Outcome, store: str) -> str:
    """How a run ended, in a line; what goes on with it names the store, which others who read the page do not know."""
    if outcome.outcome == "succeeded":
        return f"run {outcome.run} succeeded: step {outcome.step}, state digest {outcome.state_digest}"
    if outcome.outcome == "gave_up":
        return f"run {outcome.run} gave up: {outcome.reason}{_no_retry(outcome, store)}"
    said = f"run {outcome.run} was {outcome.outcome} at step {outcome.step}: {outcome.reason}"
    return said + (_no_retry(outcome, store) if outcome.outcome == "cancelled" else "")


def _no_retry(outcome: Outcome, store: str) -> str:
    """The page has a button that does nothing for a run that has ended."""
    again = f"hotstage runs resume {outcome.run} --store {shlex.quote(store)}"
    return f"; Retry trains nothing here: `{again}` goes on with it"
