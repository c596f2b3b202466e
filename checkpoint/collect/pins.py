"""Pins: a checkpoint that the log names under a name is not given up, whatever the rules of its run say.

A command that reads a checkpoint for long pins it first, as ``<verb>-<token>``, and takes the pin away at its end. One
that was killed leaves its pin: ``hotstage ckpt ls`` shows it, ``ckpt unpin`` removes it. Others are names that a person
gave, and ``fork-<run>`` of a child that begins from here.

A pin that comes after the tombstone is void (``log/state.py``), so whoever pins learns whether it holds.

    with pinned(store, run, info, "export"):
        ...
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from checkpoint.errors import CheckpointError, Halted, PinRefused, StoreError
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.store.base import Store

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}\Z")


def pin(run_log: RunLog, info: CheckpointInfo, name: str, state: RunState | None = None) -> RunState:
    """Have the log name this checkpoint: from here on it is not given up. The state with it.

    PinRefused where it was given up before, or where the name is another checkpoint's.
    """
    if _NAME.match(name) is None:
        raise PinRefused(
            f"the pin {name[:60]!r} must be letters, digits and ._- (a letter or digit first, at most 150): rename it"
        )

    def decide(known: RunState) -> tuple[str, Mapping[str, Any]] | None:
        if info.n in known.buried:
            raise PinRefused(
                f"the checkpoint of step {info.step} of run {known.run} was given up (log record "
                f"{known.buried[info.n]}) and its objects may go at any moment: take another one of hotstage ckpt ls"
            )
        there = known.pins.get(name)
        if there == info.n:
            return None
        if there is not None:
            other = known.checkpoint(there)
            raise PinRefused(
                f"the pin {name!r} of run {known.run} holds the checkpoint of step {other.step if other else '?'}: "
                f"remove it first (hotstage ckpt unpin {known.run} {name}), or take another name"
            )
        return "pin", {"checkpoint": info.n, "name": name}

    return run_log.transact(decide, state)


def unpin(run_log: RunLog, name: str, state: RunState | None = None) -> RunState:
    """Take a pin away; no error where there is none."""
    return run_log.transact(lambda known: ("unpin", {"name": name}) if name in known.pins else None, state)


@contextmanager
def pinned(store: Store, run: str, info: CheckpointInfo, why: str) -> Iterator[str | None]:
    """The checkpoint is not given up while inside; gives the pin's name. ``why``: a verb, such as ``export``.

    PinRefused where it was given up before. Whoever may not write (a read-only identity, a full disk, a log that nobody
    may go on with) reads all the same, which is said, and gets None.
    """
    run_log, name = RunLog(store, run, writer=why), f"{why}-{secrets.token_hex(4)}"
    try:
        pin(run_log, info, name)
    except (StoreError, Halted) as error:
        log.warning(
            "run %s: the checkpoint of step %d is read without a pin, it may be collected meanwhile: %s",
            *(run, info.step, error),
        )
        yield None
        return
    try:
        yield name
    finally:
        try:
            unpin(run_log, name)
        except CheckpointError as error:
            log.warning("run %s: the pin %s stays (hotstage ckpt unpin %s %s): %s", run, name, run, name, error)
