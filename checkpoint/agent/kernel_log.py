"""What NVIDIA's driver wrote into the kernel's log: its Xid numbers, each a kind of fault (``trainer/failures.py`` says
which mean that a device is sick). Where the log may not be read, as in most containers, nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

KMSG = "/dev/kmsg"
OFF_THE_BUS = 79
_RECORD = 8192  # the kernel gives at most this much at a time
_MOST = 200_000  # records: no kernel keeps as many
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<bus>[0-9A-Fa-f:.]{1,20})\): (?P<number>\d{1,5})(?:, )?(?P<text>.*)")
_GONE = re.compile(r"NVRM: GPU (?:at )?(?:PCI:)?(?P<bus>[0-9A-Fa-f:.]{1,20}).{0,80}has fallen off the bus")


@dataclass(frozen=True)
class Xid:
    """One line of the driver: the device (PCI domain:bus:device, without function), the number, the line."""

    bus: str
    number: int
    line: str
    at_s: float = 0.0
    """Since the machine's start."""


def xids(lines: Iterable[tuple[float, str]]) -> list[Xid]:
    """The driver's lines among these (seconds since the start, text); any text is taken.

    >>> [(x.bus, x.number) for x in xids([(1.0, "NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus.")])]
    [('0000:3b:00', 79)]
    """
    found = []
    for at_s, line in lines:
        clean = "".join(c if c.isprintable() else " " for c in line[:400])
        m = _XID.search(clean)
        if m is not None:
            found.append(Xid(bus_of(m["bus"]), int(m["number"]), clean[m.start() :][:200], at_s))
        elif (gone := _GONE.search(clean)) is not None:
            found.append(Xid(bus_of(gone["bus"]), OFF_THE_BUS, clean[gone.start() :][:200], at_s))
    return found


def bus_of(text: str) -> str:
    """A device's place on the bus in one form, whoever wrote it.

    >>> bus_of("00000000:3B:00.0"), bus_of("0000:3b:00"), bus_of("3b:00.0")
    ('0000:3b:00', '0000:3b:00', '0000:3b:00')
    """
    parts = text.lower().partition(".")[0].split(":")
    domain, *rest = parts if len(parts) > 2 else ["0", *parts]
    return ":".join([domain.lstrip("0").rjust(4, "0"), *rest])


def first_xid(found: Iterable[Xid], since_s: float, buses: Iterable[str]) -> Xid | None:
    """The first of these since then (those after it follow from it), of one of these devices where they are known."""
    known = {bus_of(bus) for bus in buses if bus}
    return next((x for x in found if x.at_s >= since_s and (not known or x.bus in known)), None)


def kernel_lines(path: str = KMSG) -> Iterator[tuple[float, str]]:
    """Every line that the kernel keeps, oldest first. Never blocks. Raises OSError where it may not be read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for _ in range(_MOST):
            try:
                record = os.read(fd, _RECORD)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten while it was read: go on with what is there
                continue
            if not record:
                return
            head, _, text = record.decode(errors="replace").partition(";")
            fields = head.split(",")
            at_s = 0.0
            with contextlib.suppress(IndexError, ValueError):
                at_s = int(fields[2]) / 1e6
            yield at_s, text.partition("\n")[0]
    finally:
        os.close(fd)
