"""What a command says that was refused, or stopped: a readable message, an exit code of its own, a run that goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.support.chaos import ask_to_stop, caught
from tests.support.place import Done, Place, finish

USAGE, DATA, LOST, REFUSED, STOPPED = 2, 65, 75, 78, 85


def readable(done: Done) -> None:
    """What a person gets: no traceback, one message that starts with the command's name, not a wall of text."""
    assert "Traceback" not in done.err, done.err
    told = [line for line in done.told.splitlines() if line.startswith("hotstage: ")]
    assert len(told) == 1, done.out + done.err
    assert len(told[0]) < 900


def refused(done: Done, code: int, *words: str) -> None:
    readable(done)
    assert done.code == code, done.out + done.err
    for word in words:
        assert word in done.told, done.err


def resumed(place: Place, run: str, digest: str, *more: str) -> None:
    """Once mended, the run goes on to the bits of a run that nothing ever happened to."""
    told = place.call("runs", "resume", run, "--no-prefect", "--json", *more)
    assert told.code == 0, told.err
    assert (told.json()["outcome"], told.json()["state_digest"]) == ("succeeded", digest)


def stopped_after(place: Place, look: Callable[[], object], what: str) -> Done:
    """Start, wait for the moment, by which ranks train, and have the gang stop."""
    process = place.start_train()
    with caught(place.folder, look, what):
        ask_to_stop(process, signal.SIGTERM, place.folder / "out")
    return finish(process)
