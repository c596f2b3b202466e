"""What a layer computes again at the start of its backward, so that it need not lie in a slot from the forward on.

A rewrite of a stage's forward calls before backward is derived. The calls that run again write buffers of their own
(``again.…``), and backward reads these: so what the forward made is scratch there. What more than one layer touches
(the residual stream between layers, a message) is kept and never made again. The same calls on the same bytes: the bits
are equal.

Where a stage's weight gradients are put off, those of a layer that computes again are not: they would need what it made
until W, in the same slot, and nothing would be saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.models.base import Builder, Call, View
from trainer.wire.kernels import KERNELS

if TYPE_CHECKING:
    from trainer.spec_how import RecomputeKind


@dataclass(frozen=True)
class Rewritten:
    """``forward``: the program; ``seen``: its calls as backward sees them; ``calls``: by layer, what runs again."""

    forward: list[Call]
    seen: list[Call]
    calls: Mapping[int, list[Call]]


def run_again(
    b: Builder, forward: list[Call], kind: RecomputeKind, layers: Collection[int], messages: Sequence[View | None]
) -> Rewritten:
    """Calls of ``layers`` that a kind makes run again; ``messages``: values that come from or go to another stage."""
    users: dict[str, set[int | None]] = {view.buffer: {-1, None} for view in messages if view is not None}
    for call in forward:
        for view in call.views():
            users.setdefault(view.buffer, set()).add(call.layer)
    made: dict[str, str] = {}
    calls: dict[int, list[Call]] = {}
    for call in forward:
        if call.layer is None or call.layer not in layers:
            continue
        outputs = {view.buffer for view in _outputs(call)}
        if any(len(users[name]) > 1 for name in outputs):
            continue
        if _wanted(call, kind) or outputs & made.keys():
            for name in outputs - made.keys():
                made[name] = f"again.{name}"
                b.buffers[made[name]] = replace(b.buffers[name], name=made[name])
            calls.setdefault(call.layer, []).append(replace(_renamed(call, made), part="R"))
    for codes, (value, turned) in list(b.sources.items()):
        if codes.buffer in made:
            b.sources[_of(codes, made)] = (_of(value, made), None if turned is None else _of(turned, made))
    return Rewritten([_ahead(call, made) for call in forward], [_renamed(call, made) for call in forward], calls)


def without_idle(calls: Sequence[Call], weights: Sequence[Call]) -> list[Call]:
    """Backward calls without those that run again although nothing reads what they make."""
    used = {view.buffer for call in weights for view in call.views()}
    needed: list[Call] = []
    for call in reversed(calls):
        if call.part != "R" or any(view.buffer in used for view in _outputs(call)):
            used |= {view.buffer for view in call.views()}
            needed.append(call)
    return needed[::-1]


def _wanted(call: Call, kind: RecomputeKind) -> bool:
    row = KERNELS[call.kernel]
    cheap = row.products == "0" and all(operand.role != "update" for operand in row.operands)
    return kind == "layer" or cheap or (kind == "attention" and call.kernel == "attention_fwd")


def _outputs(call: Call) -> list[View]:
    operands = KERNELS[call.kernel].operands
    return [p for p, operand in zip(call.ptr, operands, strict=True) if isinstance(p, View) and operand.role != "read"]


def _of(view: View, made: Mapping[str, str]) -> View:
    return replace(view, buffer=made.get(view.buffer, view.buffer))


def _renamed(call: Call, made: Mapping[str, str]) -> Call:
    return replace(call, ptr=tuple(_of(p, made) if isinstance(p, View) else p for p in call.ptr))


def _ahead(call: Call, made: Mapping[str, str]) -> Call:
    """In the forward program: without a transpose of codes, which backward alone reads."""
    codes = call.ptr[0]
    if call.kernel == "quantise" and isinstance(codes, View) and codes.buffer in made:
        return replace(call, ptr=(codes, None, *call.ptr[2:]))
    return call
