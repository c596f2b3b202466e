"""Hosting the Prefect flow in a process of ours (the command, the demo): the run's outcome is what counts, Prefect is
told as long as it listens. A run never waits for Prefect longer than PREFECT_PATIENCE_S, and never fails because of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.loop import Outcome, Sink
from flows.run import Prepared


@dataclass
class Hosted:
    """What a process that hosts a flow gives it and gets from it: no parameters, because they are not data."""

    prepared: Prepared | None = None
    sink: Sink | None = None
    stop: threading.Event | None = None
    driving: bool = False
    outcome: Outcome | None = None


_hosted: ContextVar[Hosted | None] = ContextVar("hosted", default=None)


def current() -> Hosted:
    """What the host of this flow gave; nothing where Prefect itself started it."""
    return _hosted.get() or Hosted()


def prepared_for(run: str) -> Prepared | None:
    """The run that the host has made ready, with its spec's layout; None where it is another, or there is no host."""
    prepared = current().prepared
    return prepared if prepared is not None and prepared.run == run else None


PREFECT_PATIENCE_S = 10.0
"""After the run's own end, for Prefect to take the flow run's: its client retries for a minute where nobody answers."""


def run_flow(
    prepared: Prepared,
    store_url: str,
    out: Path,
    sink: Sink | None,
    stop: threading.Event | None,
    tell: Callable[[str], None],
    patience_s: float = PREFECT_PATIENCE_S,
) -> Outcome | None:
    """Drive a prepared run inside the flow; its outcome, or None where Prefect failed before the driver began.

    The flow runs in a thread of its own. Errors of the run itself (not Prefect's) are raised.
    """
    from flows import flow

    hosted = Hosted(prepared, sink, stop)
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            _hosted.set(hosted)
            flow.train_flow(store=store_url, run=prepared.run, out=str(out))
        except BaseException as error:  # the flow's own end is Prefect's; what counts is judged below
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="flow", daemon=True).start()
    told_at: float | None = None
    while not done.wait(0.1):
        if hosted.outcome is None:
            continue
        told_at = told_at or time.monotonic()
        if time.monotonic() - told_at > patience_s:
            tell("Prefect does not take the end of the flow run; the run itself has ended, see the log in the store")
            return hosted.outcome
    error = errors[0] if errors else None
    if hosted.outcome is not None:
        if error is not None and not flow.is_own_end(error):
            tell(f"Prefect did not take the end of the flow run ({_line(error)}); the run itself has ended")
        return hosted.outcome
    if hosted.driving:
        assert error is not None
        raise error
    tell(f"Prefect failed before the run began ({_line(error)}): going on without it")
    return None


def _line(error: Any) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
