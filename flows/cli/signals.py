"""Ctrl-C, SIGTERM, Ctrl-\\ (SIGQUIT) and a terminal that closes (SIGHUP), of a command that works for long: nothing is
lost at any moment, and it says what goes on.

While something is prepared, nothing of a run works yet: the command leaves at once, and the same command goes on from
what is in the store. While a local run is driven, the first signal has the gang save one agreed step and leave. At a
terminal a second Ctrl-C within ``SECOND_S`` comes before that: the command leaves and the run goes on by itself. Later
a second signal leaves at once too; the gang saves and ends by itself then. A gang on a cluster trains on, whatever the
command does: the first signal detaches from it, a second one leaves at once. Where the terminal closes, and with
Ctrl-\\, nobody asked for the run's end: the command leaves at once, tells Prefect's page, and a run that works goes on
by itself. Where one of these two is ignored (``nohup``; a script's background) it stays so.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flows.cli import terminal

if TYPE_CHECKING:
    from flows.drive.events import Event

T = TypeVar("T")

EXIT_STOPPED = 85
SECOND_S = 1.0
BURST_S = 0.2
"""Signals of one kind that come closer than this are one: timeout(1) sends its own to the command and to its group."""
ASKED_S = 10.0
"""For the gang to be asked, once it was to be stopped, before a command that is to leave at once does."""
_LOOK_S = 0.1
_SHOW_CURSOR = b"\x1b[?25h"
_STOPPING = "stopping: the gang saves one agreed step and leaves"
_DETACHING = "detaching: the gang trains on {where}"
_ENDS_COMMAND = {signal.SIGHUP: "the terminal closed", signal.SIGQUIT: "left by Ctrl-\\ (SIGQUIT)"}
"""Signals that end a command and not its run, and how that is told."""
_PREPARING = "stopped while preparing: nothing runs, nothing is lost; the same command goes on"


class Signals:
    """From ``__init__`` on signals are taken; the work is done in a thread, so that they are heard whatever it does.

    ``stop`` is what the work should look at once it drives a run; ``driving`` is what it calls before that, and
    ``drives`` the context in which it does. A ``sweep`` drives several.
    """

    def __init__(self, say: Callable[[str], None] = terminal.tell, *, sweep: bool = False) -> None:
        self.say, self._sweep = say, sweep
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._driving = False
        self.detaches = False  # whether the gang that is driven trains on when its driver is stopped
        self.where = "in the cluster"  # it does so then
        self._gangs = threading.Condition()
        self._unasked = set[str]()  # runs that are driven and whose gangs were not asked to save and leave
        self._asked: list[int] = []
        self._asked_at = 0.0
        for number in heard():
            signal.signal(number, self._on_signal)
        if sys.stdout.isatty() and signal.getsignal(signal.SIGTSTP) is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, _pause)

    def _on_signal(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        once = number != signal.SIGINT or not sys.stdin.isatty()  # a person may be quick
        if once and self._asked[-1:] == [number] and now - self._asked_at < BURST_S:
            return
        self._asked.append(number)
        self._asked_at = now

    def driving(self, detaches: bool) -> bool:
        """From here on a run is driven. False where the command is leaving: do not begin.

        ``detaches``: the gang trains on where its driver is stopped.
        """
        with self._lock:
            self._driving, self.detaches = not self._asked, detaches
            terminal.go_on()
            return self._driving

    @contextlib.contextmanager
    def drives(self, run: str) -> Iterator[Reach]:
        """While this run is driven; its driver is to tell what is given."""
        with self._gangs:
            self._unasked.add(run)
        try:
            yield Reach(self, run)
        finally:
            self.asked(run)

    def asked(self, run: str) -> None:
        """Its gang was asked to save and leave, or it is driven no more."""
        with self._gangs:
            self._unasked.discard(run)
            self._gangs.notify_all()

    def works(self, where: str) -> None:
        """``here``, or ``elsewhere``: there the one run that is driven trains on without this command."""
        if not self._sweep:
            self.detaches, self.where = where == "elsewhere", "where it works"

    def run(self, work: Callable[[], T]) -> T:
        """The result of ``work``, or what it raised. May end the process instead, as the module's text says."""
        result: list[T] = []
        errors: list[BaseException] = []

        def target() -> None:
            try:
                result.append(work())
            except BaseException as error:
                errors.append(error)

        worker = threading.Thread(target=target, name="work", daemon=True)
        worker.start()
        seen, first_at = 0, 0.0
        while worker.is_alive():
            worker.join(_LOOK_S)
            self._leave_where_it_ends()
            if len(self._asked) > 1 and seen >= 1:
                self._second()
            elif self._asked and not seen:
                seen, first_at = 1, time.monotonic()
                again = not self.detaches and self._asked[0] == signal.SIGINT and sys.stdin.isatty()
                self.say(
                    (_DETACHING.format(where=self.where) if self.detaches else _STOPPING)
                    + (f" (Ctrl-C again within {SECOND_S:.0f} s: leave it running)" if again else "")
                )
                if not again:
                    self.stop.set()
            elif seen and not self.stop.is_set() and time.monotonic() - first_at >= SECOND_S:
                self.stop.set()
        if errors:  # of a closed terminal: it could not say what it did any more
            if isinstance(errors[0], terminal.OutputLost) and errors[0].exit_code == terminal.HUNG_UP:
                self._asked.append(signal.SIGHUP)
            self._leave_where_it_ends()
        for number in heard():
            signal.signal(number, signal.SIG_IGN)  # it is over: what is to be said is said whole
        if errors:
            raise errors[0]
        return result[0]

    def _leave_where_it_ends(self) -> None:
        """What ends the command alone does so, and so does any signal while something is prepared."""
        with self._lock:
            driving = self._driving
        for number, why in _ENDS_COMMAND.items():
            if number in self._asked:
                leave(128 + number, f"{why}: {self._goes_on() if driving else _PREPARING}", self.say)
        if not driving and self._asked:
            leave(EXIT_STOPPED, _PREPARING, self.say)

    def _goes_on(self) -> str:
        if self.detaches or not self.stop.is_set():
            return "its runs go on by themselves" if self._sweep else "the run goes on by itself"
        with self._gangs:
            self._gangs.wait_for(lambda: not self._unasked, ASKED_S)
            left = sorted(self._unasked)
        if left and self._sweep:
            goes = "goes on by itself" if len(left) == 1 else "go on by themselves"
            return f"{', '.join(left)} could not be asked to stop and {goes}; the others save and end"
        if left:
            return "the run goes on by itself: it could not be asked to stop"
        return (
            "the gangs save their states and end by themselves"
            if self._sweep
            else "the gang saves its state and ends by itself"
        )

    def _second(self) -> None:
        leave(
            128 + self._asked[1],
            f"leaving at once: {self._goes_on()}; the same command, or `hotstage runs resume RUN`, attaches",
            self.say,
        )


@dataclass(frozen=True)
class Reach:
    """A sink of one run: tells the signals whether its gang was asked to stop, and whether it trains on without this
    command, as one does that works elsewhere.
    """

    signals: Signals
    run: str

    def tell(self, event: Event) -> None:
        phase = event.facts.get("phase") if event.kind == "phase" else None
        if phase in ("elsewhere", "here"):
            self.signals.works(phase)
        if phase == "stopping":
            self.signals.asked(self.run)


def heard() -> tuple[int, ...]:
    """What ends a command that works for long; of ``_ENDS_COMMAND`` not what its starter has ignored."""
    taken = (number for number in _ENDS_COMMAND if signal.getsignal(number) is not signal.SIG_IGN)
    return (signal.SIGINT, signal.SIGTERM, *taken)


def _pause(_number: int, _frame: Any) -> None:
    """Ctrl-Z: the shell that comes to the front has the cursor that a live view hides."""
    with contextlib.suppress(OSError):
        os.write(1, _SHOW_CURSOR)
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)  # of this thread: what follows is done after `fg`
    signal.signal(signal.SIGTSTP, _pause)


def stopped_by_signals(stop: threading.Event, *, twice: bool = False) -> None:
    """Have these signals set ``stop``. ``twice``: a second one interrupts whatever is being done."""

    def on_signal(_number: int, _frame: Any) -> None:
        if twice and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in heard():
        signal.signal(number, on_signal)


@contextlib.contextmanager
def first_ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C ends what the model writes: the list has something from then on. A second one leaves at once."""
    heard: list[int] = []

    def on_signal(number: int, _frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def leave(code: int, text: str, say: Callable[[str], None]) -> None:
    """End the process now, whatever its threads do; temporary folders go first, and the terminal is left as it was."""
    with contextlib.suppress(terminal.OutputLost):  # the terminal may be gone
        say(text)
    atexit._run_exitfuncs()
    finished = terminal.finish(code)
    os._exit(code if code == terminal.HUNG_UP else finished)
