"""A run driven in this process, with Prefect's page beside it: by the command, the demo, or a flow that Prefect runs.

The run's outcome is what counts. Work begins at once, whether Prefect answers, is on its way up or is nowhere; after
the run's own end Prefect gets ``PREFECT_PATIENCE_S`` to take it, longer while it answers.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.store import Store
from flows.drive.driving import Word
from flows.drive.events import Outcome, Sink, Sinks
from flows.drive.loop import Driver
from flows.drive.reconcile import driven_here
from flows.drive.run import Board, NoBoard, Prepared
from flows.drive.train import Run, make_driver
from flows.page import Page
from flows.prefect_api import Client, Configured, NoPrefect, PrefectSettingsError, answers, configured, without_api
from flows.prefect_server import PrefectServer
from flows.show.lines import Lines

log = logging.getLogger(__name__)

PREFECT_PATIENCE_S, ANSWERING_S = 10.0, 60.0
"""At a run's end, for a server that is silent, and for one that goes on answering."""
END_PATIENCE_S = 600.0
"""For a flow run that nobody waits for: its page has time to be brought up."""
LEAVING_PATIENCE_S = 2.0
SERVER_UP_S = 90.0


@dataclass
class Prefect:
    """How this process reaches Prefect: the server that Prefect's settings name, else one of its own while it runs.

    ``connect`` is called by a page's thread until it gives a client; a sweep's pages call it at once.
    """

    own: PrefectServer | None = None
    say: Callable[[str], None] = lambda _: None
    """Hears, from the page's thread, what a person should know."""
    _began: float | None = None
    _found: Configured | None = None
    _looked: bool = False
    _dead: bool = False
    _told: bool = False
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def connect(self) -> Client | None:
        with self._looking:
            if not self._looked and not self._dead:
                self._look()
        if self._dead:
            raise NoPrefect
        if self._found is not None:
            if not self._told and not answers():
                self._told = True
                self.say(
                    f"Prefect does not answer at {self._found.shown} ({self._found.source}){without_api(self._found)}: "
                    "going on without it (the log in the store has everything); its page is written where it comes back"
                )
            return Client.connect(None)
        assert self.own is not None
        self._began = self._began or time.monotonic()
        if self.own.up():
            return Client.connect(self.own.api)
        ended = self.own.process is None or self.own.process.poll() is not None
        if self._dead:
            return None  # closed meanwhile: it ended because this process leaves
        if ended or time.monotonic() - self._began > SERVER_UP_S:
            self._dead = True
            where = f"; its log is {self.own.log}" if self.own.log else ""
            self.say(f"Prefect's own server did not come up: going on without its page{where}{self.own.why_not_up()}")
        return None

    @property
    def while_it_runs(self) -> str:
        """What to add to the page's address, where its server ends with this process."""
        return " (while this command runs)" if self.own is not None else ""

    def _look(self) -> None:
        self._looked = True
        if self.own is not None:
            return
        try:
            self._found = configured()
        except PrefectSettingsError as error:
            self._dead = True
            self.say(f"{error}: going on without Prefect")
            return
        if self._found is None:
            self.own = PrefectServer(None)
            self.own.start()
            atexit.register(self.own.stop)

    def close(self) -> None:
        with self._looking:  # a server that is being started is stopped too
            self._dead = True
        if self.own is not None:
            self.own.stop()


@dataclass
class Hosted:
    """A run of this process and what shows it. ``page`` None: without Prefect. Use as a context: it leaves in order."""

    store: Store
    out: Path
    page: Page | None = None
    say: Callable[[str], None] = lambda _: None
    patience_s: float = PREFECT_PATIENCE_S
    stop: threading.Event = field(default_factory=threading.Event)
    _ended: bool = False

    def __enter__(self) -> Hosted:
        if self.page is not None:
            self.page.start()
            atexit.register(self._left)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._leave(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        atexit.unregister(self._left)

    @property
    def board(self) -> Board:
        return self.page if self.page is not None else NoBoard()

    def drive(self, prepared: Prepared, *sinks: Sink) -> Outcome:
        """The run to its end; Prefect is told of that, as long as it listens."""
        if self.page is not None:
            self.page.run_is(prepared.run, prepared.spec.train.steps)
            sinks = (*sinks, self.page)
        driver = make_driver(prepared, self.store, sink=Sinks(sinks), out=self.out, stop=self.stop)
        if self.page is not None and driver.driving is not None:
            driver.driving.page = self.page.where
        outcome = driver.run()
        self._ended = True
        if self.page is not None and self.page.awaited:
            self.say(
                f"waiting for Prefect, which has not answered yet, to take the run's end: {self.patience_s:g} s at most"
            )
        if self.page is not None and not self._told(outcome) and not self.page.alone:
            self.say(
                "Prefect did not take the end of the flow run; the run itself has ended, and the log in the store "
                "has everything"
            )
        return outcome

    def leave_in_peace(self) -> None:
        """There is no run to drive; the page is told what was said so far."""
        self._ended = True
        if self.page is not None:
            self._told(None)

    def _told(self, outcome: Outcome | None) -> bool:
        assert self.page is not None
        return self.page.close(outcome, patience_s=self.patience_s, answering_s=ANSWERING_S)

    def _leave(self, why: str) -> None:
        if self.page is not None and not self._ended:
            self._ended = True
            self.page.close(None, why, patience_s=LEAVING_PATIENCE_S)

    def _left(self) -> None:
        self._leave("the command left; where a gang was running it goes on by itself, and the same command attaches")


def taken_over(prepared: Prepared, store: Store, out: Path, word: Word, say: Callable[[str], None] = log.info) -> Run:
    """A driver of a run whose drivers are gone, in a thread of this process; it goes on with their page, where they had
    one on a server that is still there.
    """
    last = [word.newest] if word.newest is not None and word.newest.left else []
    known = sorted([*word.gone, *last], key=lambda note: -note.at)
    pages = [note for note in known if note.flow_run]
    if not pages:
        return driven_here(prepared, store, out, word)
    api = pages[0].api
    page = Page(
        lambda: Client.connect(api), store, name=prepared.run, parameters={"store": store.url}, warn=say,
        adopted=[note.flow_run for note in pages if note.api == api],
    )  # fmt: skip
    lines = Lines(page.line, prepared.spec.train.steps, every_s=10.0)
    driver = make_driver(prepared, store, sink=Sinks((lines, page)), out=out)
    if driver.driving is not None:
        driver.driving.page = page.where

    def host(driver: Driver) -> Outcome:
        page.start()
        page.run_is(prepared.run, prepared.spec.train.steps)
        try:
            outcome = driver.run()
        except BaseException:
            page.rest()  # the run goes on, and whoever drives it next goes on with its page
            raise
        page.close(outcome, patience_s=END_PATIENCE_S)
        return outcome

    return Run(prepared, store, driver, host).start()


def undisturbed(work: Callable[[], Any]) -> Any:
    """What ``work`` gives or raises, done in a thread of its own, so that nothing that Prefect does to the flow's own
    thread ends it: where a concurrency lease cannot be renewed, Prefect throws a CancelledError into that thread and
    calls the flow Crashed, while the gang trains on.

    Other exceptions here (TerminationSignal, KeyboardInterrupt) leave at once; the work ends with the process.
    """
    done = threading.Event()
    result: list[Any] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=target, name="driver", daemon=True).start()
    while not done.is_set():
        try:
            done.wait(0.5)
        except asyncio.CancelledError:
            log.warning("Prefect cancelled the flow's thread (it cannot renew a concurrency lease); the run goes on")
    if errors:
        raise errors[0]
    return result[0]
