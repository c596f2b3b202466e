"""What the spec's policies make of a decision to go on: hours that are used up (D12), a loss that explodes (D11).

Pure; part of `decide`.
"""

from __future__ import annotations

from flows.drive.history import spoken
from flows.drive.views import (
    AwaitStop,
    Cause,
    Decision,
    End,
    LogView,
    Look,
    OwnOrder,
    Phase,
    Policy,
    Saves,
    StartAttempt,
    Watch,
)
from trainer.failures import FAILURES, Failure
from trainer.wire import ATTEMPT_RATES_MAX, ATTEMPT_SKIPS_MAX


def parked(log: LogView, seen: Look, policy: Policy, decision: Decision) -> Decision | None:
    """Instead of going on where the hours are used (D12): first the gang saves and leaves."""
    if (
        not 0.0 < policy.device_hours <= seen.hours
        or not isinstance(decision, Watch | StartAttempt)
        or not log.attempts
    ):
        return None
    newest = log.attempts[-1]
    trains = any(r.pid and not r.ended for n in seen.nodes if n.epoch == newest.epoch for r in n.ranks)
    why = f"{seen.hours:.4g} of limits.device_hours {policy.device_hours:g} are used"
    if trains and isinstance(decision, Watch):
        return AwaitStop(f"{why}: the run saves its state and is parked")
    if isinstance(decision, Watch) and decision.phase is Phase.DRAINING:
        return None
    return End("preempted", f"{why}; `hotstage runs resume RUN --set limits.device_hours=…` goes on")


def healed(log: LogView, seen: Look, policy: Policy, decision: Decision) -> Decision | None:
    """What the spec's policy does where the loss explodes (D11), for a gang that trains."""
    ill = seen.exploded
    if ill is None or policy.on_explosion == "warn" or not isinstance(decision, Watch):
        return None
    if decision.phase is not Phase.TRAINING or not log.attempts or log.attempts[-1].epoch != ill.epoch:
        return None
    cause = Cause(Failure.NUMERIC, ill.text, FAILURES[Failure.NUMERIC].mend, step=ill.last)
    if policy.on_explosion == "stop":
        return End("gave_up", f"{ill.text} (recovery.on_explosion)", cause)
    saves = Saves.of(log.candidates)
    before = [(n, step) for n, step in zip(saves.n, saves.step, strict=True) if step < ill.step]
    if not before:
        return None
    # where it went back to did not help, or the loss is high from there on: it may have been when that was saved
    tried = {order.start for order in log.orders if order.own and order.n > spoken(log)}
    sound = next((point for point in before if point not in tried), before[0])
    if own_orders(log) >= policy.max_skips:
        return End(
            "gave_up", f"{ill.text}; going back {often(own_orders(log))} (recovery.max_skips) did not help", cause
        )
    amended, first = log.amendments, sound[1] + 1
    if policy.on_explosion == "lower":
        amended = amended.rated(first, amended.factor(first) / 2)
    else:
        amended = amended.skipping(amended.batch(first), amended.batch(ill.last))
    if len(amended.skip) > ATTEMPT_SKIPS_MAX or len(amended.rate) > ATTEMPT_RATES_MAX:
        return None
    return OwnOrder(sound, amended, cause, "recovery.on_explosion")


def own_orders(log: LogView) -> int:
    """Orders of the driver's own since a person's last word."""
    return sum(order.own and order.n > spoken(log) for order in log.orders)


def often(times: int) -> str:
    return "once" if times == 1 else f"{times} times"
