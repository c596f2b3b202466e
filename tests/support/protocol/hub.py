"""A simulated clock, processes that may be killed or frozen at any instant, and their threads.

A thread is a greenlet: it runs until it waits (``sleep``, ``park``, a request of the store), so one seed gives one
order of events. A killed process runs nothing more, not even ``finally``: its threads are kept, paused, until the
world is over.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any

from greenlet import getcurrent, greenlet


class Dead(BaseException):
    """The world is over: whoever still waits leaves."""


class Process:
    """What is killed as one. ``kind``: of the points in it."""

    def __init__(self, hub: Hub, kind: str, name: str) -> None:
        self.hub, self.kind, self.name = hub, kind, name
        self.alive, self.frozen_until = True, 0.0

    def kill(self) -> None:
        self.alive = False

    def freeze(self, seconds: float) -> None:
        """SIGSTOP, or a machine that nobody reaches: it goes on later, and knows nothing of it."""
        self.frozen_until = max(self.frozen_until, self.hub.now + seconds)


class Thread:
    def __init__(self, process: Process, name: str) -> None:
        self.process, self.name = process, name
        self.greenlet: greenlet | None = None


class Signal:
    """Wakes the thread that waits for it; kept where nobody does."""

    def __init__(self) -> None:
        self.raised, self.waiter = False, None

    def notify(self) -> None:
        self.raised = True
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter()


class Event:
    """``threading.Event`` on the simulated clock."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._set = hub, False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def wait(self, seconds: float) -> bool:
        if not self._set:
            self._hub.sleep(seconds)
        return self._set


class Hub:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now, self.over = 0.0, False
        self._events: list[tuple[float, int, Process | None, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._main = getcurrent()
        self._threads: list[Thread] = []
        self.current: Thread | None = None
        self.events = 0

    def clock(self) -> float:
        return self.now

    def token(self) -> str:
        return f"{next(self._numbers):016x}"

    def number(self) -> int:
        return next(self._numbers)

    def at(self, delay: float, process: Process | None, call: Callable[[], None]) -> None:
        """After so long call this, where the process still lives; not before it is thawed."""
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), process, call))

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Whether ``until`` came true before the clock passed the limit."""
        while not until():
            if not self._events or self._events[0][0] > limit_s:
                return False
            self.now, _, process, call = heapq.heappop(self._events)
            if process is not None:
                if not process.alive:
                    continue
                if process.frozen_until > self.now:
                    self.at(process.frozen_until - self.now, process, call)
                    continue
            self.events += 1
            call()
        return True

    def close(self) -> None:
        """Every thread leaves, whatever it does."""
        self.over = True
        for thread in self._threads:
            if thread.greenlet:  # begun, and not at its end
                thread.greenlet.throw(Dead)

    # --- threads ------------------------------------------------------------------------------------------

    def spawn(self, process: Process, name: str, work: Callable[[], None]) -> None:
        thread = Thread(process, name)

        def body(_: object = None) -> None:
            with suppress(Dead):
                work()

        thread.greenlet = greenlet(body, self._main)
        self._threads.append(thread)
        self.at(0.0, process, lambda: self._go(thread))

    def _go(self, thread: Thread, value: Any = None, error: BaseException | None = None) -> None:
        self.current = thread
        assert thread.greenlet is not None
        if error is not None:
            thread.greenlet.throw(error)
        else:
            thread.greenlet.switch(value)
        self.current = None

    def wait(self) -> Any:
        """In a thread: until ``resume`` is called for it. Never where its process is dead."""
        if self.over:
            raise Dead
        return self._main.switch()

    def resume(self, thread: Thread, delay: float, value: Any = None, error: BaseException | None = None) -> None:
        self.at(delay, thread.process, lambda: self._go(thread, value, error))

    def sleep(self, seconds: float) -> None:
        assert self.current is not None
        self.resume(self.current, seconds)
        self.wait()

    def park(self, signal: Signal, seconds: float | None = None) -> None:
        """Until the signal, or for so long."""
        thread, woken = self.current, False
        assert thread is not None

        def wake() -> None:
            nonlocal woken
            if not woken:
                woken = True
                self._go(thread)

        if not signal.raised:
            signal.waiter = lambda: self.at(0.0, thread.process, wake)
            if seconds is not None:
                self.at(seconds, thread.process, wake)
            self.wait()
            signal.waiter = None
        signal.raised = False


class Serial(Executor):
    """One after the other, in the thread that submits."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **more))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


@contextmanager
def serial() -> Iterator[None]:
    """Inside, what the checkpoint service does in pools of threads it does in a row."""
    import concurrent.futures

    whole = concurrent.futures.ThreadPoolExecutor
    found = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key.startswith(("checkpoint.", "flows."))
        for name, value in list(vars(module).items())
        if value is whole
    ]
    for module, name in found:
        setattr(module, name, Serial)
    try:
        yield
    finally:
        for module, name in found:
            setattr(module, name, whole)


@contextmanager
def quiet() -> Iterator[None]:
    """`serial`, and without the warnings of what is struck by the thousand."""
    logging.disable(logging.CRITICAL)
    try:
        with serial():
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def swapped(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


@contextmanager
def folds_every(records: int) -> Iterator[None]:
    """Inside, the log has a folded state so often, not every 256 records."""
    from checkpoint.log import FOLD_EVERY

    found = [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("checkpoint.") and getattr(module, "FOLD_EVERY", None) == FOLD_EVERY
    ]
    for module in found:
        module.FOLD_EVERY = records  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in found:
            module.FOLD_EVERY = FOLD_EVERY  # type: ignore[attr-defined]
