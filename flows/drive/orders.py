"""Orders: what a person asks of a run becomes a log record, once, when that person's command starts: its How, and the
amendments of its numbers (``amend.py``, docs/adr/0015).

The newest order wins. Every driver follows it: the layout of the next attempt is the order's, and an attempt names the
order that it follows. Drivers that nobody asked for (reconcile, a flow run that Prefect executes again) write none.
Nothing is written where neither differs from what was asked before, unless the command opens a run that had ended, goes
back to an older checkpoint, or asks to count its failures anew. The driver itself gives an order where the spec's
policy says so (``recovery.on_divergence``, ``recovery.on_explosion``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from checkpoint.amendments import NONE, Amendments
from checkpoint.keys import run_key
from checkpoint.log import RunLog, RunState, StartPoint
from checkpoint.store import Store
from flows.drive.amend import Wish, amend, amended_words
from flows.drive.history import recent
from flows.drive.line import beginning_of
from flows.drive.persons import who
from flows.drive.run import (
    Prepared,
    asks_layout,
    compiled,
    fold_view,
    is_superseded,
    opened_again,
    order_view,
    publish_plan,
    ruling_how,
    spec_under,
)
from flows.drive.views import OwnOrder, some_steps
from trainer.errors import PlanError, SpecError
from trainer.spec import HOW_OF_WHAT, RETIRED, RunSpec, how_map

log = logging.getLogger(__name__)


SAME = "the same layout"


class CannotFollow(Exception):
    """The How that rules is not for this driver: it leaves, and the text says how to take the run over."""


@dataclass(frozen=True)
class Asked:
    """Who asks, and with which command; ``again``: to go on with a run that had ended or fails; ``anew``: from its
    start, where nothing else is left; ``wish``: what it asks of the run's numbers.
    """

    via: str
    again: bool = False
    anew: bool = False
    wish: Wish = field(default_factory=Wish)


def place_order(store: Store, prepared: Prepared, asked: Asked) -> Prepared:
    """Write the order that ``prepared.spec`` is, where there is one to write; the same prepared run."""
    how = how_map(prepared.spec)

    def wanted(state: RunState) -> tuple[str, Mapping[str, Any]] | None:
        body = order_of(state, prepared.spec, how, asked)
        if body is not None and (asked.anew or (asked.wish.rollback_to is not None and body["checkpoint"] is None)):
            _check_parent(store, state)
        return None if body is None else ("intervention", body)

    RunLog(store, prepared.run, writer="user").transact(wanted)
    return prepared


def order_of(state: RunState, spec: RunSpec, how: Mapping[str, Any], asked: Asked) -> dict[str, Any] | None:
    """The record's body, or None where it would change nothing. SpecError where what is asked cannot be."""
    usable = state.restore_candidates()
    if asked.anew and usable:
        raise SpecError(
            f"{state.run} has a usable checkpoint at step {usable[0].step} and goes on from there: leave --begin-anew "
            "out, or fork an earlier step"
        )
    stands, wish = state.asked_how, asked.wish
    if stands is None and wish:
        raise SpecError(f"{state.run} has not begun: what it is to do goes into its spec, and hotstage train begins it")
    over = state.ended is not None and not opened_again(state)
    if stands is None or (over and not wish and not _opens(state, asked)):
        return None
    amended, start = state.amendments, state.start  # what nobody follows yet still stands
    if wish:
        found, begins = amend(state, spec, wish, beginning_of(state))
        if found != amended or wish.rollback_to is not None:
            amended, start = found, begins
    same = _same(spec, stands)
    # what failed since the run came further is forgiven; a gang that trains is left alone
    forgives = _opens(state, asked) and (state.ended is not None or any(a.cause for a in recent(fold_view(state))))
    if same and not forgives and not asked.anew and (amended, start) == (state.amendments, state.start):
        return None
    body = {"kind": "order", "how": stands if same else how, "by": who(), "via": asked.via}
    flags = (("again", asked.again or over), ("anew", asked.anew))
    return body | _bits(amended, start) | {k: True for k, v in flags if v}


def _check_parent(store: Store, state: RunState) -> None:
    """SpecError where a fork would go back to its beginning, and its parent's checkpoint is no more: what it has saved
    since would be left for nothing.
    """
    parent = state.parent
    if parent is None:
        return
    theirs = RunLog(store, str(parent["run"])).fold(quick=True)
    info = theirs.checkpoint(int(parent["checkpoint"]))
    if info is not None and theirs.usable(info) and store.head(run_key(theirs.run, info.manifest)) is not None:
        return
    why = "is not there any more"
    if info is not None and info.n in theirs.buried:
        why = f"was given up to the collector (log record {theirs.buried[info.n]} of {theirs.run})"
    elif info is not None and info.n in theirs.damaged:
        why = f"is damaged ({theirs.damaged[info.n]})"
    steps = sorted({c.step for c in state.restore_candidates()})
    mend = f"it can go back to {some_steps(steps)}" if steps else "fork another checkpoint (hotstage runs fork)"
    raise SpecError(f"{state.run} begins from step {parent['step']} of {parent['run']}, whose checkpoint {why}; {mend}")


def _opens(state: RunState, asked: Asked) -> bool:
    """Whether the command itself goes on with a run that had ended: one that succeeded has nothing left to do."""
    return asked.again and not (state.ended and state.ended.outcome == "succeeded")


def _bits(amended: Amendments, start: StartPoint | None) -> dict[str, Any]:
    """What the body of an order says of a run's numbers."""
    body: dict[str, Any] = {"amendments": amended.to_map()} if amended else {}
    return body if start is None else body | {"checkpoint": start.checkpoint, "step": start.step}


def own_order(state: RunState, order: OwnOrder) -> dict[str, Any]:
    """The body of the driver's own order (``decide``, D10, D11)."""
    body = {"kind": "order", "how": state.asked_how, "by": "the driver", "via": order.via, "own": True}
    return body | _bits(order.amendments, StartPoint(*order.start)) | {"cause": order.cause.to_map()}


def _same(spec: RunSpec, stands: Mapping[str, Any]) -> bool:
    """Whether this version reads that How as the spec's own; what it cannot read is another."""
    try:
        return how_map(spec_under(spec, stands)) == how_map(spec)
    except SpecError:
        return False


def followed(store: Store, state: RunState, prepared: Prepared, say: Callable[..., None]) -> Prepared:
    """The run in the How that rules by the log; ``say`` hears of a change. CannotFollow where this driver cannot."""
    how = ruling_how(state)
    before = how_map(prepared.spec)
    if is_superseded(state):  # it is told also where this driver's layout stays
        for order in describe(state):
            if order["record"] > state.attempts[-1].order and order["amends"]:
                text = f"{order['by']} ({order['via']}), log record {order['record']}: {order['text']}"
                say("order", text, key=("order", order["record"]))
    if how is None or how == before:
        return prepared
    try:
        spec = spec_under(prepared.spec, how)
        if how_map(spec) == before:
            return prepared
        here, there = ((s.launch.target, s.launch.namespace) for s in (prepared.spec, spec))
        if here[0] != there[0] or (there[0] != "local" and here != there):
            raise CannotFollow(elsewhere(state, prepared, spec.launch.target))
        changed = compiled(prepared, spec)
    except (SpecError, PlanError) as error:
        raise CannotFollow(unreadable(state, prepared, error)) from error
    publish_plan(store, changed.run, changed.plan)
    by = who_ruled(state)
    log.info("the layout is %s: %s", by, changes(before, how))
    text = f"the layout is {by}: {changes(before, how)}; this command goes on with that"
    say("order", text, key=("order", by))
    return changed


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two Hows, key by key, for people; what an older version's lacks is its default."""
    found, defaults = [], _defaults()
    for section in sorted({*old, *new}):
        if isinstance(old.get(section) or new.get(section), list):  # [[eval]]
            a, b = ({section: how.get(section) or []} for how in (old, new))
        else:
            a, b = ({**defaults.get(section, {}), **(how.get(section) or {})} for how in (old, new))
        keys = sorted(k for k in {*a, *b}.difference(RETIRED.get(section, ())) if a.get(k) != b.get(k))
        names = {k: k if k == section else f"{section}.{k}" for k in keys}
        found += [f"{names[k]} {_said(a.get(k))} -> {_said(b.get(k))}"[:120] for k in keys]
    return ", ".join(found) or SAME


def _said(value: Any) -> str:
    """A value as a person would write it: of a table only the keys that say something.

    >>> _said([{"stages": 2, "replicas": None}, {"stages": 1, "replicas": None}]), _said("1f1b"), _said(None)
    ('[{stages = 2}, {stages = 1}]', '1f1b', 'None')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_said(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_said, value)) + "]"
    return str(value)


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    """Of the How's sections."""
    fields = RunSpec.model_fields
    sections = ("parallel", "checkpoint", "launch", "recovery", "validation", "track")
    found = {name: fields[name].default.model_dump(mode="json") for name in sections}
    for section, key in HOW_OF_WHAT:
        found.setdefault(section, {})[key] = getattr(fields[section].default, key)
    return found


def describe(state: RunState) -> list[dict[str, Any]]:
    """The orders of a run as `runs show` tells them: number of the record, who, by which command, what it changed."""
    out, before = [], next((a.how for a in state.attempts), {})
    was = next((i.amendments for i in state.interventions if i.body["kind"] == "parent"), NONE)
    for order in state.orders:
        body = order.body
        amends = amended_words(was, order.amendments, order.start)
        text = changes(before, body["how"]) if not amends or changes(before, body["how"]) != SAME else ""
        text = "; ".join(filter(None, (amends, text)))
        if why := (body.get("cause") or {}).get("text"):
            text += f"; because {why}"
        if body.get("again"):
            text += "; goes on again"
        if body.get("anew"):
            text += "; may begin at the start"
        told = {"record": order.n, "by": body["by"], "via": body["via"], "text": text, "time": order.time}
        out.append({**told, "amends": amends})
        before, was = body["how"], order.amendments
    return out


def elsewhere(state: RunState, prepared: Prepared, target: str) -> str:
    """Why a driver leaves a run that is ordered to another place, and how to take it over."""
    own = prepared.spec.launch
    key, value = ("target", own.target) if own.target != target else ("namespace", own.namespace)
    return (
        f"the layout of run {prepared.run} is {who_ruled(state)}: it runs elsewhere (launch.target {target}"
        f"{', another namespace' if own.target == target else ''}), where this command ({own.target}) cannot drive it; "
        f"it goes on there. To take it over: hotstage runs resume {prepared.run} --set launch.{key}={value}"
    )


def unreadable(state: RunState, prepared: Prepared, error: Exception) -> str:
    return (
        f"the layout of run {prepared.run} is {who_ruled(state)}, which this version of hotstage cannot serve "
        f"({'; '.join(str(error).splitlines())[:400]}); use the version that ordered it, or take the run over with "
        f"this one: hotstage train SPEC, whose layout is then the order"
    )


def who_ruled(state: RunState) -> str:
    """Whose the layout is that every driver follows now, for people."""
    newest = state.newest_attempt
    changed = newest is not None and not asks_layout(state) and newest.fell_back
    if state.orders and not changed:
        order = order_view(state.orders[-1])
        return f"the order of {order.by}, log record {order.n}"
    kept = newest.body.get("fallback") if changed and newest else None
    why = f" ({(kept or {}).get('why') or newest.reason})" if changed and newest else ""
    return f"that of attempt {newest.epoch}{why}" if newest else "the first attempt's"
