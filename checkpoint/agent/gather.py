"""What N nodes wrote, read once: by one of them, with the next one in order should it die.

N nodes that each read what N nodes wrote would ask N x N times. So the nodes have an order, another one each time: the
node at place 0 reads, as the objects come, and makes one object or record of them, which is all that the others look
for. The one at place k looks every k turns (and more seldom the longer it takes), by a listing, whether the whole is
there. Where it is, and k turns later the one thing that everybody waits for is still not, those before it are dead or
slow, and it does their work.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from checkpoint.errors import NotFound
from checkpoint.store import Pace, Store

T = TypeVar("T")

TURN_S, TURN_NODE_S = 1.0, 0.02
"""Of a turn, beside a look; what each node adds to it: to read its object, and to make it part of the whole."""
_AT_ONCE = 16


def turn_s(place: int, nodes: int, pace: Pace) -> float:
    """The turns of the node at this place; 0 for the first one, which looks as the objects come."""
    return place * (TURN_S + pace.idle_s + TURN_NODE_S * nodes)


def next_look_s(turn: float, whole: bool, waited_s: float, pace: Pace, look_s: float) -> float:
    """From this look to the next of a node with this ``turn``, which began to wait so long ago."""
    if not turn:
        return pace.pause_s(waited_s, look_s)
    return turn if whole else max(turn, waited_s / 4)


class Gathered(dict[int, T]):
    """What was read so far, by number; ``tables``: of tensors, each checked once (``manifest.PartManifest.parse``)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []


def present(store: Store, prefix: str, nodes: int, first: int = 0) -> set[int]:
    """The nodes whose object, named by the node's number after the prefix, is there; from ``first`` on, where numbers
    have five digits, no name before or much behind is listed.
    """
    found = set[int]()
    for info in store.list(prefix, f"{prefix}{first - 1:05d}" if first else ""):
        name = info.key.removeprefix(prefix)
        if name.isdecimal() and first <= int(name) < nodes:
            found.add(int(name))
        elif first and name.isdecimal():
            break
    return found


def gather(
    there: Callable[[], set[int]],
    nodes: int,
    known: MutableMapping[int, T],
    read: Callable[[int], T],
) -> bool:
    """Read of what is ``there`` all that is not ``known`` yet, into it; whether all of it is known now.

    Raises what ``read`` raises, after the rest was read. The caller's deadline is theirs (``limits.until``).
    """
    if len(known) == nodes:
        return True
    new = sorted(there() - known.keys())
    if not new:
        return False
    failure: Exception | None = None
    with ThreadPoolExecutor(min(_AT_ONCE, len(new)), thread_name_prefix="gather") as pool:
        for node, answer in [(node, pool.submit(copy_context().run, read, node)) for node in new]:
            try:
                known[node] = answer.result()
            except NotFound:
                pass
            except Exception as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return len(known) == nodes
