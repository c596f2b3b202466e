"""Who is a node of an attempt, and where the ranks of a gang listen.

``runs/<run>/live/<epoch>/node/<node>`` is created by the first agent that comes, with its place
(checkpoint/claims.py): a second one, a pod of the same index or an agent of another folder, finds another's there.
Then each node says its addresses: hints, ``…/addr/<node>``, a map of ``host``, ``ports`` and, but on the CPU that was
asked for, ``devices`` (``devices.py``). In a small gang each reads
everybody's; in a larger one the first in order, another one each attempt, does and puts them together in
``…/addresses``, a list of these maps, which the others wait for (``gather.py``). Nothing trusts them; the handshake of
the engine decides who is who.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container
from typing import Any

from checkpoint import codec, keys
from checkpoint.agent.devices import from_map, to_map
from checkpoint.agent.events import Address
from checkpoint.agent.gang import CannotStart, Gang, Options
from checkpoint.agent.gather import gather, next_look_s, present, turn_s
from checkpoint.claims import MAX_BYTES, Place
from checkpoint.errors import Damaged, NotFound, StoreError
from checkpoint.store import Store

log = logging.getLogger(__name__)

SMALL = 4
"""Nodes that read each other's address: to have them put together would cost them a look more."""
MAX_TOGETHER = 64 << 20
_MAX_BYTES = 1 << 16
_NAMED = 20


def claim(store: Store, options: Options, gang: Gang, cancelled: threading.Event) -> Place | None:
    """The place that has this node of the attempt: our own where nobody was first; None where the attempt was
    cancelled.

    Blocks until the store answers, for a thread of its own.
    """
    key = keys.node_key(options.run, gang.epoch, options.node)
    while not cancelled.is_set():
        try:
            if store.create(key, options.place.to_bytes()):
                return options.place
            return Place.parse(store.get(key, max_bytes=MAX_BYTES), key)
        except (StoreError, Damaged) as error:
            log.warning("the node's place in attempt %d cannot be claimed now: %s", gang.epoch, error)
            cancelled.wait(0.5)
    return None


def meet(
    store: Store,
    options: Options,
    gang: Gang,
    address: Address,
    cancelled: threading.Event,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, Address] | None:
    """The address of every node, once all are there; None where the attempt was cancelled meanwhile.

    Blocks until then, for a thread of its own. Raises CannotStart after ``launch.connect_s``.
    """
    meeting = Meeting(store, options, gang, address, clock)
    while not cancelled.wait(meeting.pause_s):
        if (found := meeting.look()) is not None:
            return found
    return None


class Meeting:
    """One node's part in it: ``look`` again and again, each ``pause_s`` after the one before."""

    def __init__(
        self, store: Store, options: Options, gang: Gang, address: Address, clock: Callable[[], float]
    ) -> None:
        self._store, self._options, self._gang, self._clock = store, options, gang, clock
        self._mine = _address(_to_map(address), gang.count)  # as the others read it
        self._found: dict[int, Address] = {options.node: self._mine}
        self._said = False
        self._began = clock()
        place = (options.node - gang.epoch) % options.nodes
        self._turn = 0.0 if options.nodes <= SMALL else turn_s(place, options.nodes, store.pace)
        self._my_turn, self._whole = self._began + self._turn, not self._turn
        self.pause_s = 0.0

    def look(self) -> dict[int, Address] | None:
        """Everybody's address, where it is there by now. Raises CannotStart after the deadline."""
        now = self._clock()
        self.pause_s = self._store.pace.pause_s(now - self._began, self._options.log_poll_s)
        try:
            if not self._said:
                self._store.put(self._key(self._options.node), codec.pack_hint(_to_map(self._mine)))
                self._said = True
            if self._turn and self._together():
                return self._found
            if now >= self._my_turn:
                if self._gather():
                    return self._found
                waited_s, pace, look_s = now - self._began, self._store.pace, self._options.log_poll_s
                self._my_turn = now + next_look_s(self._turn, self._whole, waited_s, pace, look_s)
        except (StoreError, Damaged) as error:
            log.warning("the nodes' addresses cannot be exchanged now: %s", error)
            self.pause_s = max(self.pause_s, 0.5)
        if now - self._began > float(self._gang.how("launch", "connect_s")):
            raise CannotStart(75, self._missing())
        return None

    def _key(self, node: int) -> str:
        return keys.address_key(self._options.run, self._gang.epoch, node)

    @property
    def _prefix(self) -> str:
        return keys.addresses_prefix(self._options.run, self._gang.epoch)

    @property
    def _together_key(self) -> str:
        return keys.together_key(self._options.run, self._gang.epoch)

    def _together(self) -> bool:
        """Whether somebody has put them together, with this node's as it is now."""
        try:
            raw = self._store.get(self._together_key, max_bytes=MAX_TOGETHER)
        except NotFound:
            return False
        values = codec.unpack_hint(raw, "the nodes' addresses", max_bytes=MAX_TOGETHER)
        if not isinstance(values, list) or len(values) != self._options.nodes:
            raise Damaged(f"the nodes' addresses are not a list of {self._options.nodes}")
        found = {node: _address(value, self._gang.count) for node, value in enumerate(values)}
        if found[self._options.node] != self._mine:
            return False  # of this node's agent before it was started again
        self._found = found
        return True

    def _gather(self) -> bool:
        def read(node: int) -> Address:
            raw = self._store.get(self._key(node), max_bytes=_MAX_BYTES)
            return _address(codec.unpack_hint(raw, "a node's address", max_bytes=_MAX_BYTES), self._gang.count)

        nodes, prefix = self._options.nodes, self._prefix
        if not self._whole:
            self._whole = len(present(self._store, prefix, nodes)) == nodes
            return False
        if not gather(lambda: present(self._store, prefix, nodes), nodes, self._found, read):
            return False
        if nodes > SMALL:
            together = [_to_map(self._found[node]) for node in range(nodes)]
            self._store.put(self._together_key, codec.pack_hint(together))
        return True

    def _missing(self) -> str:
        there: Container[int] = self._found
        if self._turn:
            try:
                there = present(self._store, self._prefix, self._options.nodes)
            except StoreError as error:
                return f"the nodes' addresses did not come in time (launch.connect_s): {error}"
        names = [str(node) for node in range(self._options.nodes) if node not in there]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        if not names:
            return "nobody put the nodes' addresses together in time (launch.connect_s)"
        return f"no address of node {', '.join(names[:_NAMED])}{more} came in time (launch.connect_s)"


def _to_map(address: Address) -> dict[str, Any]:
    return {"host": address.host, "ports": list(address.ports), **to_map(address.devices)}


def _address(value: Any, count: int) -> Address:
    """A node's address hint, as another agent wrote it; Damaged where it is not one."""
    try:
        host, ports = str(value["host"]), [int(port) for port in value["ports"]]
        devices = from_map(value, count)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"a node's address cannot be read: {error!r}") from error
    if len(ports) != count or not all(0 < port < 65536 for port in ports) or len(host.encode()) > 255:
        raise Damaged(f"a node's address has {len(ports)} ports for {count} ranks, or a bad host or port")
    return Address(host, ports, devices)
