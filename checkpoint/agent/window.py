"""Which leaves of a node's cache are held for which steps, and which go first. Pure: no file, store, thread or clock.

Steps are taken on in their order (``take``), each with the leaves that it reads, and are behind once no rank of the
node reads them any more (``passed``). A leaf that a step ahead needs stays; of the others those go first that were
needed longest ago.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """What a step asks for: leaves to be brought, and others that have to go before that."""

    bring: Sequence[int]
    drop: Sequence[int]


class Window:
    """``capacity``: bytes of all leaves that are there or on their way; ``size``: of one. ``found``: leaves that an
    agent before this one left, which nobody has looked at: they take room, and are brought before they are used.
    """

    def __init__(self, capacity: int, size: Callable[[int], int], found: Iterable[int] = ()) -> None:
        self.capacity, self._size = capacity, size
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(found)
        self._unseen = set(self._idle)
        self._held: dict[int, int] = {}  # leaf -> the last step that needs it
        self._steps: deque[tuple[int, Sequence[int]]] = deque()
        self.bytes = sum(map(size, self._idle))

    @property
    def ahead(self) -> int:
        """How many steps are taken on and not behind."""
        return len(self._steps)

    def take(self, step: int, leaves: Sequence[int], *, over: bool = False) -> Taken | None:
        """Take on the next step; None where there is no room for it yet. ``over``: whatever the room; nothing goes."""
        absent = [leaf for leaf in leaves if leaf not in self._held and leaf not in self._idle]
        drop, room = [], self.capacity - self.bytes - sum(map(self._size, absent))
        if room < 0 and not over:
            wanted = set(leaves)
            for leaf in self._idle:
                if leaf not in wanted:
                    drop.append(leaf)
                    room += self._size(leaf)
                    if room >= 0:
                        break
            else:
                return None
        for leaf in drop:
            self._forget(leaf)
        bring = absent + [leaf for leaf in leaves if leaf in self._unseen]
        self._unseen.difference_update(leaves)
        self.bytes += sum(map(self._size, absent))
        for leaf in leaves:
            self._idle.pop(leaf, None)
            self._held[leaf] = step
        self._steps.append((step, leaves))
        return Taken(bring, drop)

    def passed(self, step: int) -> None:
        """No rank of the node reads a step before this one any more."""
        while self._steps and self._steps[0][0] < step:
            done, leaves = self._steps.popleft()
            for leaf in leaves:
                if self._held.get(leaf) == done:
                    del self._held[leaf]
                    self._idle[leaf] = None

    def trim(self) -> list[int]:
        """Leaves that nobody needs and for which there is no room: found ones, where the cache has become smaller."""
        gone = []
        while self.bytes > self.capacity and self._idle:
            gone.append(next(iter(self._idle)))
            self._forget(gone[-1])
        return gone

    def _forget(self, leaf: int) -> None:
        del self._idle[leaf]
        self._unseen.discard(leaf)
        self.bytes -= self._size(leaf)
