"""Who works on pieces: threads of this process here; tasks of Prefect in ``flows/preparing.py``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Function = Callable[..., dict[str, Any]]

THREADS = 1
"""Encoding, which is nine tenths of the work, uses all cores by itself; a second piece at a time would double the
memory and win nothing that could be measured."""


class Runner(Protocol):
    """Calls a function for each of many items."""

    @property
    def remote(self) -> bool:
        """Whether that may be in another process, which opens the store by its address."""

    def map(self, function: Function, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        """``function(item, *more)`` of each item, in their order, whoever ends first. An error of one ends all."""


class Threads:
    """In this process."""

    remote = False

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads

    def map(self, function: Function, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        if len(items) < 2 or self._threads < 2:
            yield from (function(item, *more) for item in items)
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="pieces")
        waiting: deque[Future[dict[str, Any]]] = deque()
        rest = iter(items)
        stop = threading.Event()

        def call(item: Any) -> dict[str, Any]:
            return {} if stop.is_set() else function(item, *more)

        try:
            for item in rest:
                waiting.append(pool.submit(call, item))
                if len(waiting) > 2 * self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
