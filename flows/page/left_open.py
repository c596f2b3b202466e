"""Flow runs whose processes are gone: Prefect shows those as Running for ever. Whoever looks closes them, truthfully.

A flow run of `train` says whose process is behind it, in Prefect's own field for that (``infrastructure_pid``): as a
driver says it in the store (`flows/drive/driving.py`). Where that process is not there any more, and nobody goes on
with the flow run within `GRACE_S` (a driver that takes the run over does), it is Crashed. What cannot be told from here
(another machine, another program's word) is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flows.drive.driving import DriverNote
from flows.prefect_api import OPEN_STATES, Client, Lost

EVERY_S = 3.0
GRACE_S = 20.0
GOES_ON = "a gang that was running goes on: hotstage runs resume, or hotstage reconcile"


def own_mark(pid: int | None = None) -> str:
    """Of this process, or of one that it has started."""
    return DriverNote.of_process(Path(), pid).mark


def close_gone(client: Client, flow_run: str, who: str, goes_on: str) -> bool:
    """Crash a flow run that is still open although its process is gone; False where somebody goes on with it.

    ``goes_on``: what became of the run, for people.
    """
    try:
        state, mark = client.state_of(flow_run), client.mark_of(flow_run)
    except Lost:
        return False
    note = DriverNote.of_mark(mark)
    if state not in OPEN_STATES or (note is not None and note.here and note.runs):
        return False
    client.set_state(flow_run, "CRASHED", "Crashed", f"its process is gone ({who}); {goes_on}")
    return True


def marked_gone(client: Client, run: str = "") -> dict[str, tuple[str, str]]:
    """Flow runs that are open although the process of this machine behind them is gone: name and process of each.

    ``run``: those of this name alone.
    """
    gone = {}
    for flow_run, name, mark in client.open_flow_runs(OPEN_STATES, run):
        note = DriverNote.of_mark(mark)
        if note is not None and note.same_machine and not (note.here and note.runs):
            gone[flow_run] = name, note.describe()
    return gone


@dataclass
class LeftOpen:
    """Looks again and again for those of this machine. ``say`` hears of each that is closed."""

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _at: float = -1e9
    _since: dict[str, float] = field(default_factory=dict)

    def look(self, client: Client) -> list[str]:
        """The flow runs that were closed now; at most a look in `EVERY_S`, a request where nothing is open."""
        now = self.clock()
        if now - self._at < EVERY_S:
            return []
        self._at = now
        gone = marked_gone(client)
        self._since = {flow_run: self._since.get(flow_run, now) for flow_run in gone}
        closed = []
        for flow_run, (name, who) in gone.items():
            if now - self._since[flow_run] < GRACE_S:
                continue
            if close_gone(client, flow_run, who, GOES_ON):
                closed.append(flow_run)
                self.say(f"Prefect: flow run {name} is Crashed, its process is gone ({who})")
        return closed
