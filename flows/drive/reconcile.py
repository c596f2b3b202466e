"""Take over what nobody drives: every open run that this process can drive, and whose drivers are gone, gets one here.

A driver keeps nothing, and two beside each other are harmless (who loses a log record decides again), so nothing
depends on knowing whether another one lives; ``driving.py`` tells it well enough to leave alone what is driven. Taken
over is a run that has begun and has not ended, unless a person's last word was to stop it:

  - on a cluster: where no driver was heard for a while, or ever;
  - of local processes: where its newest launch works in a folder of this machine, or its last driver did.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.keys import INDEX, log_key
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.claims import StoreClaims
from flows.drive.driving import Ears, Word, gone_words
from flows.drive.run import Prepared, load_run, opened_again, ruling_how
from flows.drive.train import OUT, Run, make_driver
from trainer.errors import TrainerError

log = logging.getLogger(__name__)

EVERY_S = 3.0
"""Between looks: with `driving.SILENT_S` less than the 15 s within which a run is taken over."""
ENDED_A_LOOK, IDLE_A_LOOK = 1, 16
"""Of the runs that have ended or are another machine's, and of those that have not begun: so many, in turn."""
NAMES_A_LOOK = 1000
"""Of the list of runs: a page of a store's answer. With more runs a new one is seen some looks later."""
AGAIN_S, AGAIN_MOST_S = 3.0, 300.0
"""Before a run whose driver ended with an error here, or could not be made, is tried again."""


def wants_driver(state: RunState) -> bool:
    """Whether a run has begun, and has not ended for good."""
    return not (state.newest_attempt is None or (state.ended and not opened_again(state)) or state.unreadable)


def target_of(state: RunState) -> str:
    """``local`` or ``kubernetes``, by the newest order."""
    return str(((ruling_how(state) or {}).get("launch") or {}).get("target"))


def driven_here(prepared: Prepared, store: Store, out: Path, word: Word) -> Run:
    """A driver in a thread of this process, without a page. ``word``: of those that drove it before."""
    return Run(prepared, store, make_driver(prepared, store, out=out)).start()


@dataclass
class Quiet:
    """Runs that want no driver, with the records of their logs that were read; a few are looked at again, in turn."""

    a_look: int
    known: dict[str, int] = field(default_factory=dict)
    _turn: deque[str] = field(default_factory=deque)

    def add(self, name: str, n: int) -> None:
        if name not in self.known:
            self._turn.append(name)
        self.known[name] = n

    def drop(self, name: str) -> None:
        if self.known.pop(name, None) is not None:
            self._turn.remove(name)

    def next(self) -> list[str]:
        """Those whose turn it is."""
        count = min(self.a_look, len(self._turn))
        asked = [self._turn[i] for i in range(count)]
        self._turn.rotate(-count)
        return asked


@dataclass
class Reconciler:
    """``look()`` starts drivers for open runs that nobody drives; ``say`` hears what it does. ``drive``: begins one.

    A look asks the store for a page of the list of runs, twice for each open run, and once for each of the quiet ones
    that are in turn: it does not grow with the runs that have ended.
    """

    store: Store
    out: Path = OUT
    say: Callable[[str], None] = log.info
    drive: Callable[[Prepared, Store, Path, Word], Run] = driven_here
    clock: Callable[[], float] = time.monotonic
    driven: dict[str, Run] = field(default_factory=dict)
    _after: str = ""  # where the list of runs goes on
    _fresh: dict[str, None] = field(default_factory=dict)  # to be read
    _open: dict[str, Ears] = field(default_factory=dict)  # may be driven here
    _idle: Quiet = field(default_factory=lambda: Quiet(IDLE_A_LOOK))  # not begun
    _over: Quiet = field(default_factory=lambda: Quiet(ENDED_A_LOOK))  # ended, or another machine's
    _again: dict[str, tuple[float, float]] = field(default_factory=dict)  # not before, and the pause after that
    _said: set[tuple[str, str]] = field(default_factory=set)

    def look(self) -> list[str]:
        """The runs that were taken over now. Raises StoreUnavailable."""
        for name, run in list(self.driven.items()):
            if run.wait(0.0):
                del self.driven[name]
                self._tell_end(run)
        self._list()
        taken = []
        for name in self._to_read():
            try:
                if self._consider(name):
                    taken.append(name)
            except StoreUnavailable:
                raise  # no run of it can be asked now
            except (CheckpointError, TrainerError) as error:
                self._put_off(name, f"run {name} cannot be taken over: {error}")
            except Exception as error:  # of this run; the others are looked after all the same
                log.exception("run %s cannot be taken over", name)
                self._put_off(name, f"run {name} cannot be taken over: {error!r}; a bug, see the log")
        return taken

    def _consider(self, name: str) -> bool:
        """Whether it was taken over."""
        word = self._open[name].listen() if name in self._open else None
        if word is not None and (word.driven or word.stopped):
            return False
        state = RunLog(self.store, name).fold(quick=True).of_this_version()
        self._forget(name)
        if not wants_driver(state):
            (self._over if state.ended is not None else self._idle).add(name, state.n)
            return False
        ears = self._open[name] = Ears(self.store, name, self.clock)
        word = word or ears.listen()
        out = self._place(state, word)
        if out is None:
            del self._open[name]
            self._over.add(name, state.n)
        if out is None or word.driven or word.stopped:
            return False
        prepared = load_run(self.store, name)
        self.driven[name] = self.drive(prepared, self.store, out, word)
        self.say(f"run {name} is driven from here" + (f": {gone_words(word.gone)} is gone" if word.gone else ""))
        return True

    def _place(self, state: RunState, word: Word) -> Path | None:
        """The folder in which this process drives it; None where it is another machine's."""
        if target_of(state) != "local":
            return self.out
        newest, last = state.newest_attempt, word.newest
        if last is None:
            return None  # an older version's, which did not say who stopped it
        held = StoreClaims(self.store, state.run).where(newest.launch, None) if newest is not None else None
        if held is not None and held.folder is not None:
            return held.folder.parents[2]  # <out>/runs/<run>/<launch>
        return Path(last.out) if held is None and last.same_machine else None  # it died before its launch was claimed

    def _list(self) -> None:
        """A page more of the list of runs."""
        page = [info.key for info in islice(self.store.list(INDEX, self._after), NAMES_A_LOOK)]
        for name in (key.removeprefix(INDEX) for key in page):
            if not any(name in known for known in (self._over.known, self._open, self._idle.known, self.driven)):
                self._fresh[name] = None
        self._after = page[-1] if len(page) == NAMES_A_LOOK else ""

    def _to_read(self) -> list[str]:
        quiet = [(name, kind.known[name]) for kind in (self._idle, self._over) for name in kind.next()]
        grown = [name for name, n in quiet if self.store.head(log_key(name, n + 1)) is not None]
        now = self.clock()
        names = dict.fromkeys([*self._fresh, *self._open, *grown])
        return [name for name in names if name not in self.driven and self._again.get(name, (0.0,))[0] <= now]

    def _forget(self, name: str) -> None:
        self._fresh.pop(name, None)
        self._open.pop(name, None)
        self._idle.drop(name)
        self._over.drop(name)

    def _put_off(self, name: str, why: str) -> None:
        """It is tried again later, and what is wrong with it is said once."""
        pause = min(2 * self._again.get(name, (0.0, AGAIN_S / 2))[1], AGAIN_MOST_S)
        self._again[name] = self.clock() + pause, pause
        if (name, why) not in self._said:
            self._said.add((name, why))
            self.say(why)

    def _tell_end(self, run: Run) -> None:
        if run.error is None:
            self._again.pop(run.name, None)
            return
        self._put_off(run.name, f"the driver of run {run.name} ended: {run.error}; the gang trains on")
        expected = isinstance(run.error, CheckpointError | TrainerError)
        log.error("the driver of run %s ended: %s", run.name, run.error, exc_info=None if expected else run.error)
