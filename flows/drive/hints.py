"""Hints read as hostile: a node's status and a step's line, from bytes that anybody may have written or cut.

Pure. What a decision or a person needs must hold (else there is no view: unknown, D2); what only adds to it is left
out where it does not. Nothing here raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from checkpoint.codec import short, unpack_hint
from checkpoint.errors import Damaged
from flows.drive.views import NodeView, RankView

MOST = 1 << 53
MAX_RANKS = 1 << 20
MAX_GPUS = 1024
MAX_TEXT = 900
MAX_WORDS = 24
MAX_BYTES = 1 << 20
"""Of a node's status."""


def _whole(value: Any, low: int, high: int = MOST) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def step_line(line: Mapping[str, Any]) -> dict[str, Any] | None:
    """A step's line with its numbers as numbers; None where it is none, or epoch, step, loss or norm do not hold."""
    if line.get("event") != "step":
        return None
    out = dict(line)
    must = {
        "epoch": _whole(line.get("epoch"), 1),
        "step": _whole(line.get("step"), 0),
        "loss": _real(line.get("loss")),
        "grad_norm": _real(line.get("grad_norm")),
    }
    if any(value is None for value in must.values()):
        return None
    for key in ("tokens_per_s", "step_us", "time"):
        value = _real(out.pop(key, None))
        if value is not None and value >= 0:
            out[key] = value
    counted = _whole(out.pop("counted", None), 0)
    return {**out, **must} if counted is None else {**out, **must, "counted": counted}


def words_of(text: Any) -> dict[str, Any] | None:
    """Last words: a JSON object, or plain text under ``error``. A log record can hold what is left of them."""
    if not isinstance(text, str) or not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return {"error": short(text, MAX_TEXT)}
    out: dict[str, Any] = {}
    for key, item in list(value.items())[:MAX_WORDS]:
        if isinstance(item, str):
            out[short(key, 40)] = short(item, MAX_TEXT)
        elif (
            isinstance(item, bool)
            or _whole(item, -MOST) is not None
            or (isinstance(item, float) and math.isfinite(item))
        ):
            out[short(key, 40)] = item
    return out


def node_status(node: int, data: bytes) -> tuple[NodeView, int] | None:
    """A node's status (checkpoint/agent/status.py) as a view without ages, and its beat; None if it does not hold."""
    try:
        return _node(node, unpack_hint(data, "a node's status", max_bytes=MAX_BYTES))
    except Damaged:
        return None


def _node(node: int, status: Any) -> tuple[NodeView, int] | None:
    if not isinstance(status, dict):
        return None
    epoch, beat, phase = _whole(status.get("epoch"), 0), _whole(status.get("seq"), 0), status.get("phase")
    ranks = status.get("ranks")
    if epoch is None or beat is None or not isinstance(phase, str) or not isinstance(ranks, dict):
        return None
    views = []
    for name, value in ranks.items():
        rank = _rank(name, value)
        if rank is None:
            return None
        views.append(rank)
    error, devices, gpus = status.get("error"), status.get("devices"), status.get("gpus")
    view = NodeView(
        node=node,
        epoch=epoch,
        phase=phase,
        ranks=tuple(sorted(views, key=lambda r: r.rank)),
        slots=_slots(status.get("slots")),
        error=short(error, MAX_TEXT) if isinstance(error, str) and error else None,
        devices=short(devices, MAX_TEXT) if isinstance(devices, str) else "",
        gpus=tuple(short(name, 128) for name in gpus[:MAX_GPUS] if isinstance(name, str))
        if isinstance(gpus, list)
        else (),
    )
    return view, beat


def _rank(name: Any, value: Any) -> RankView | None:
    """How it ended must hold: a rank is never taken for alive or dead because of a field that says neither."""
    rank = int(name) if isinstance(name, str) and name.isdecimal() and len(name) < 8 else None
    if rank is None or rank >= MAX_RANKS or not isinstance(value, dict):
        return None
    code, signal = value.get("code"), value.get("signal")
    if code is not None and _whole(code, 0, 255) is None:
        return None
    if signal is not None and _whole(signal, 1, 128) is None:
        return None
    step = value.get("step")
    return RankView(
        rank=rank,
        pid=_whole(value.get("pid"), 1),
        code=code,
        signal=signal,
        step=-1 if (found := _whole(step, -1)) is None else found,
        words=words_of(value.get("words")),
        killed=value.get("killed") is True,
        memory=_whole(value.get("memory"), 0, 1 << 62),
        xid=_whole(value.get("xid"), 0, 1 << 16),
    )


def _slots(value: Any) -> frozenset[tuple[int, int]]:
    found = set()
    for slot in value if isinstance(value, list) else ():
        if isinstance(slot, dict):
            step, epoch = _whole(slot.get("step"), 0), _whole(slot.get("epoch"), 1)
            if step is not None and epoch is not None:
                found.add((step, epoch))
    return frozenset(found)
