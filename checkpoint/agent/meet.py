"""Who is a node of an attempt, and where the ranks of a gang listen.

``runs/<run>/live/<epoch>/node/<node>`` is created by the first agent that comes, with its place
(checkpoint/claims.py): a second one, a pod of the same index or an agent of another folder, finds another's there.
Then each node says its addresses and waits for everybody's: hints, ``…/addr/<node>``, a map of ``host`` and ``ports``.
Nothing trusts them; the handshake of the engine decides who is who.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from checkpoint import codec, keys
from checkpoint.agent.gang import CannotStart, Gang, Options
from checkpoint.claims import MAX_BYTES, Place
from checkpoint.errors import Damaged, NotFound, StoreError
from checkpoint.store import Store

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 16
Address = tuple[str, list[int]]
"""A node's host, and the port of each of its ranks."""


def claim(store: Store, options: Options, gang: Gang) -> Place | None:
    """The place that has this node of the attempt: our own where nobody was first; None where the attempt was
    cancelled.

    Blocks until the store answers, for a thread of its own.
    """
    key = keys.node_key(options.run, gang.epoch, options.node)
    while not gang.cancelled.is_set():
        try:
            if store.create(key, options.place.to_bytes()):
                return options.place
            return Place.parse(store.get(key, max_bytes=MAX_BYTES), key)
        except (StoreError, Damaged) as error:
            log.warning("the node's place in attempt %d cannot be claimed now: %s", gang.epoch, error)
            gang.cancelled.wait(0.5)
    return None


def meet(store: Store, options: Options, gang: Gang, ports: list[int]) -> dict[int, Address] | None:
    """The address of every node, once all are there; None where the attempt was cancelled meanwhile.

    Blocks until then, for a thread of its own. Raises CannotStart after ``launch.connect_s``.
    """
    mine = codec.pack_hint({"host": options.host, "ports": ports})
    deadline = time.monotonic() + float(gang.how("launch", "connect_s"))
    said, found = False, {options.node: (options.host, ports)}
    while not gang.cancelled.wait(options.log_poll_s if said else 0):
        try:
            if not said:
                store.put(keys.address_key(options.run, gang.epoch, options.node), mine)
                said = True
            for node in range(options.nodes):
                if node not in found:
                    key = keys.address_key(options.run, gang.epoch, node)
                    found[node] = _address(store.get(key, max_bytes=_MAX_BYTES), gang.count)
        except NotFound:
            pass
        except (StoreError, Damaged) as error:
            log.warning("the nodes' addresses cannot be exchanged now: %s", error)
            gang.cancelled.wait(0.5)
        if len(found) == options.nodes:
            return found
        if time.monotonic() > deadline:
            raise CannotStart(75, _missing(found, options.nodes))
    return None


def _address(raw: bytes, count: int) -> Address:
    """A node's address hint, as another agent wrote it; Damaged where it is not one."""
    value = codec.unpack_hint(raw, "a node's address", max_bytes=_MAX_BYTES)
    try:
        host, ports = str(value["host"]), [int(port) for port in value["ports"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"a node's address is not one: {error!r}") from error
    if len(ports) != count or not all(0 < port < 65536 for port in ports) or len(host.encode()) > 255:
        raise Damaged(f"a node's address has {len(ports)} ports for {count} ranks, or a bad host or port")
    return host, ports


def _missing(found: Mapping[int, object], nodes: int) -> str:
    names = ", ".join(str(node) for node in range(nodes) if node not in found)
    return f"no address of node {names} came in time (launch.connect_s)"
