"""The lines of NVIDIA's driver in the kernel's log, and the log itself where it may be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.agent.kernel_log import bus_of, first_xid, kernel_lines, xids

LINES = [
    (10.0, "NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset"),
    (11.0, "usb 1-1: new high-speed USB device"),
    (20.0, "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."),
    (20.1, "NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus."),
    (21.0, "NVRM: Xid (0000:01:00): 3, C 00000005 SC 00000007 M 00001ffc Data ffffffff"),
]  # fmt: skip


def test_the_drivers_lines_are_told_apart() -> None:
    found = xids(LINES)
    assert [(x.bus, x.number, x.at_s) for x in found] == [
        ("0000:10:1c", 63, 10.0), ("0000:3b:00", 79, 20.0), ("0000:3b:00", 79, 20.1), ("0000:01:00", 3, 21.0),
    ]  # fmt: skip
    assert found[1].line.startswith("NVRM: Xid (PCI:0000:3b:00): 79")


def test_the_first_since_then_of_a_ranks_own_device() -> None:
    found = xids(LINES)
    assert first_xid(found, 0.0, ["00000000:3B:00.0"]) == found[1]
    assert first_xid(found, 20.05, ["0000:3b:00"]) == found[2]
    assert first_xid(found, 15.0, [""]) == found[1], "an engine that does not say where its device is"
    assert first_xid(found, 15.0, ["0000:99:00"]) is None
    assert first_xid(found, 99.0, [""]) is None


@given(st.text() | st.text(alphabet="NVRM: Xid(PC0:3b)79,\n\0é"))
def test_any_line_is_taken(text: str) -> None:
    for x in xids([(0.0, text), (0.0, f"NVRM: Xid (PCI:{text}): {text}"), (0.0, f"NVRM: Xid (PCI:0:1:2): 79{text}")]):
        assert len(x.line) <= 200
        assert "\n" not in x.line
    bus_of(text)


def test_a_log_that_is_read_to_its_end(tmp_path: Path) -> None:
    """A pipe gives its records as the kernel does, one a read."""
    with pytest.raises(FileNotFoundError):
        list(kernel_lines(str(tmp_path / "none")))
    record = tmp_path / "one"
    record.write_bytes(b"4,1042,20500000,-;NVRM: Xid (PCI:0000:3b:00): 48, \xff DBE\n SUBSYSTEM=pci\n")
    (line,) = kernel_lines(str(record))
    assert line == (20.5, "NVRM: Xid (PCI:0000:3b:00): 48, \ufffd DBE")
    record.write_bytes(b"nothing that a kernel writes")
    assert list(kernel_lines(str(record))) == [(0.0, "")]
