"""The Unix socket between the agent and its node's engine: connections, messages, descriptors.

``trainer/engine/wire/agent.h`` is the manual. One message a packet (SOCK_SEQPACKET), descriptors as SCM_RIGHTS. The
loop of the agent owns this object; only `wake` may be called from other threads. A peer that breaks the format is
turned away and logged. Sending never blocks: what the socket does not take is queued, at most `_QUEUE` messages a peer.
"""

from __future__ import annotations

import array
import ctypes
import logging
import os
import selectors
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from trainer import wire

log = logging.getLogger(__name__)

_HEADER = ctypes.sizeof(wire.Msg)
_NAMES = {number: name for name, number in wire.MSGS.items()}
_MAX_FDS = 64
_QUEUE = 256
_BURST = 128  # packets taken from one peer before the others get their turn
_LEFT = 4096  # of a rank that has ended: more than a socket holds


@dataclass(frozen=True)
class Message:
    """A packet: ``name`` as in ``wire.MSGS``; descriptors in ``fds`` belong to the receiver."""

    name: str
    rank: int
    epoch: int
    a: int
    b: int
    c: int
    payload: bytes
    fds: tuple[int, ...] = ()


class Peer:
    """A connection, by its ``number``. ``rank`` is None until its HELLO, -1 for the supervisor."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.rank: int | None = None
        self.queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        cred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", cred)[0]
        """As the kernel says; 0 where the peer lives in another process namespace."""


@dataclass(frozen=True)
class Arrival:
    """A message, or with ``message`` None the end of a connection."""

    peer: Peer
    message: Message | None


class Link:
    """The listening socket and its peers.

    The path is bound as given: a relative one keeps below the 107 bytes that a socket's name may have.
    """

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > 107:
            raise OSError(f"the socket path {path} has more than 107 bytes; give a relative or a shorter one")
        self.path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(mask)
        self._listener.listen(64)
        self._wake: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waking = threading.RLock()  # of _wake; a signal's handler may come upon its own thread in it
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._accepted = 0
        self.peers: list[Peer] = []

    def wake(self) -> None:
        """From any thread, also of one that has not heard of `close`: make a `poll` in progress return."""
        with self._waking:
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)

    def poll(self, timeout: float) -> list[Arrival]:
        """Wait at most ``timeout`` seconds; everything that came, in each peer's order, and what a rank said before the
        supervisor's word that it has ended.
        """
        events: list[Arrival] = []
        for key, mask in self._selector.select(max(0.0, timeout)):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd == self._wake:
                os.eventfd_read(key.fd)
            else:
                peer: Peer = key.data
                if mask & selectors.EVENT_WRITE:
                    self._flush(peer)
                if mask & selectors.EVENT_READ:
                    self._receive(peer, events)
        return self._ranks_first(events)

    def send(
        self,
        peer: Peer,
        name: str,
        *,
        rank: int = -1,
        epoch: int = 0,
        a: int = 0,
        b: int = 0,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        """Queue a message. The descriptors are copied: the caller keeps its own."""
        if len(payload) + _HEADER > wire.MSG_MAX:
            raise ValueError(f"a {name} of {len(payload)} bytes is beyond the {wire.MSG_MAX} of a message")
        head = wire.Msg(wire.MSG_MAGIC, wire.MSGS[name], rank, len(payload), epoch, a, b, 0)
        if len(peer.queue) >= _QUEUE:
            log.warning("a peer does not read; its oldest message is dropped", extra={"rank": peer.rank})
            self._pop(peer)
        peer.queue.append((bytes(head) + payload, tuple(os.dup(fd) for fd in fds)))
        self._flush(peer)

    def drop(self, peer: Peer) -> None:
        """Close a connection."""
        if peer in self.peers:
            self.peers.remove(peer)
            self._selector.unregister(peer.sock)
            peer.sock.close()
            while peer.queue:
                self._pop(peer)

    def flush(self, seconds: float) -> None:
        """Before leaving: wait at most this long for queued messages to go out."""
        for peer in list(self.peers):
            if peer.queue:
                peer.sock.settimeout(seconds)
                try:
                    while peer.queue:
                        self._transmit(peer)
                except OSError:
                    log.warning("a message was not sent before the agent left", extra={"rank": peer.rank})

    def close(self) -> None:
        for peer in list(self.peers):
            self.drop(peer)
        self._selector.close()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._waking:
            if self._wake is not None:
                os.close(self._wake)
            self._wake = None

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self._accepted += 1
            peer = Peer(sock, self._accepted)
            self.peers.append(peer)
            self._selector.register(sock, selectors.EVENT_READ, peer)

    def _ranks_first(self, events: list[Arrival]) -> list[Arrival]:
        """A rank's last words lie in its own socket when the supervisor says EXIT in another one: they were said first,
        and who reads of the end must read them beside it.
        """
        at = next((n for n, e in enumerate(events) if e.message is not None and e.message.name == "EXIT"), None)
        if at is None:
            return events
        supervisor = events[at].peer
        self._accept()
        for peer in list(self.peers):
            if peer is not supervisor:
                self._receive(peer, events, _LEFT)
        late = events[at:]
        return events[:at] + sorted(late, key=lambda arrival: arrival.peer is supervisor)

    def _receive(self, peer: Peer, events: list[Arrival], most: int = _BURST) -> None:
        for _ in range(most):
            try:
                data, ancillary, flags, _ = peer.sock.recvmsg(
                    wire.MSG_MAX, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, ancillary, flags = b"", [], 0
            fds = _descriptors(ancillary)
            if not data:
                self._end(peer, events)
                return
            message = _parse(data, flags, fds)
            if message is None:
                log.error("a message is malformed; its connection is closed", extra={"rank": peer.rank})
                for fd in fds:
                    os.close(fd)
                self._end(peer, events)
                return
            events.append(Arrival(peer, message))

    def _end(self, peer: Peer, events: list[Arrival]) -> None:
        self.drop(peer)
        events.append(Arrival(peer, None))

    def _flush(self, peer: Peer) -> None:
        try:
            while peer.queue:
                self._transmit(peer)
        except BlockingIOError:
            pass
        except OSError:
            return  # the reading side sees the end of the connection and reports it
        if peer in self.peers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.queue else 0)
            self._selector.modify(peer.sock, wanted, peer)

    def _transmit(self, peer: Peer) -> None:
        data, fds = peer.queue[0]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        peer.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        self._pop(peer)

    @staticmethod
    def _pop(peer: Peer) -> None:
        for fd in peer.queue.popleft()[1]:
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return tuple(found)


def _parse(data: bytes, flags: int, fds: tuple[int, ...]) -> Message | None:
    if len(data) < _HEADER or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return None
    head = wire.Msg.from_buffer_copy(data)
    name = _NAMES.get(head.type)
    if head.magic != wire.MSG_MAGIC or name is None or head.bytes != len(data) - _HEADER:
        return None
    return Message(name, head.rank, head.epoch, head.a, head.b, head.c, data[_HEADER:], fds)
