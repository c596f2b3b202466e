"""Who works on pieces: this thread here; tasks of Prefect in ``flows/preparing.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

Function = Callable[..., dict[str, Any]]


class Runner(Protocol):
    """Calls a function for each of many items."""

    @property
    def remote(self) -> bool:
        """Whether that may be in another process, which opens the store by its address."""

    def map(self, function: Function, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        """``function(item, *more)`` of each item, in their order, whoever ends first. An error of one ends all."""


class InTurn:
    """In this thread."""

    remote = False

    def map(self, function: Function, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        return (function(item, *more) for item in items)
