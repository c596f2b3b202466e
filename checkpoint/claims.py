"""Who holds a launch, and a node of an attempt: one place, named when it is claimed and never changed.

    runs/<run>/live/launch/<launch>         a launch of local nodes, by its folder (trainer/local_launch.py)
    runs/<run>/live/<epoch>/node/<node>     a node of an attempt, by its agent (agent/machine.py, A6)

A claim is created once (create-if-absent), so whoever comes second reads who was first. It names the machine, its boot
and its space of process numbers, and the folder with a token that was made in it: equal addresses and equal paths of
two machines, containers or boots, or a folder that was deleted and made again, are told apart. A pod's node works in a
volume of its own, so its token is the pod's.

The value is a msgpack map (``v`` 1); before it, a claim was the bare address of the node's ranks, and is still read.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from checkpoint import codec
from checkpoint.errors import Damaged
from trainer.wire.boot import boot_id
from trainer.wire.files import create_file
from trainer.wire.unreadable import check_version

VERSION = 1
MAX_BYTES = 16 << 10
TOKEN_FILE = "place.id"
_TEXTS = ("host", "boot", "space", "folder", "token", "address")


@dataclass(frozen=True)
class Place:
    """Where a launch or a node is. Without a token: an older version's claim, of which only the address is known."""

    host: str
    """The machine's name."""
    boot: str
    """Of its kernel: another one after every boot."""
    space: str
    """Of process numbers: another one in each container."""
    folder: str
    token: str
    """Made together with the folder, and kept in it."""
    address: str = ""
    """By which others reach its ranks."""
    nodes: int = 1

    @classmethod
    def of(cls, folder: Path, *, address: str = "", nodes: int = 1) -> Place:
        """This machine's folder, with its token, which is made where it has none. Raises OSError."""
        token = read_token(folder) or _make_token(folder)
        return cls(socket.gethostname(), boot_id(), process_space(), str(folder.resolve()), token, address, nodes)

    def same(self, other: Place) -> bool:
        """Whether both name one place; with an older version's claim the addresses alone decide."""
        if self.token and other.token:
            return self.token == other.token
        return self.address == other.address

    @property
    def here(self) -> bool:
        """Whether its processes would be seen from this one: same boot, same space of process numbers."""
        return seen_from_here(self.boot, self.space)

    @property
    def same_machine(self) -> bool:
        """Whether it is this machine by name, maybe before its last boot."""
        return of_this_machine(self.host, self.boot, self.space)

    def describe(self) -> str:
        """For people; begins with what the claim is known by."""
        if not self.token:
            return self.address or "an unknown host"
        return f"host {self.host}, folder {self.folder}"

    def to_bytes(self) -> bytes:
        texts = {name: getattr(self, name) for name in _TEXTS}
        return codec.pack_hint({"v": VERSION, **texts, "nodes": self.nodes})

    @classmethod
    def parse(cls, raw: bytes, what: str) -> Place:
        """The place of these bytes. Damaged where they are a map that is not one or of a newer version."""
        try:
            value = codec.unpack_hint(raw, what, max_bytes=MAX_BYTES)
        except Damaged:
            value = None
        if not isinstance(value, dict):
            return cls("", "", "", "", "", raw.decode(errors="replace"))
        check_version(what, codec.Fields(value, what).integer("v", 1), VERSION, Damaged)
        texts = [value.get(name) for name in _TEXTS]
        nodes = value.get("nodes")
        if not all(isinstance(text, str) for text in texts) or not isinstance(nodes, int) or not 0 < nodes <= 1 << 20:
            raise Damaged(f"{what}: it names no host and folder")
        return cls(**dict(zip(_TEXTS, cast(list[str], texts), strict=True)), nodes=nodes)


def read_token(folder: Path) -> str:
    """The folder's token; empty where it has none, or cannot be read."""
    try:
        return (folder / TOKEN_FILE).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _make_token(folder: Path) -> str:
    """Of two that do it at once one is first, and both read that one's."""
    path = folder / TOKEN_FILE
    create_file(path, secrets.token_hex(16).encode())
    return path.read_text(encoding="ascii").strip()


def seen_from_here(boot: str, space: str) -> bool:
    """Whether processes of that boot and space of process numbers are seen from this one."""
    return bool(boot) and (boot, space) == (boot_id(), process_space())


def of_this_machine(host: str, boot: str, space: str) -> bool:
    """Whether that is this machine by name, maybe before its last boot."""
    return seen_from_here(boot, space) or (host == socket.gethostname() and boot != boot_id())


def process_space() -> str:
    """In which this process has its number: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
