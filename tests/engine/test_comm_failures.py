"""Frames that are wrong, peers that fall silent or die, and how long who waits (tcp.c)."""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from tests.engine.comm_peer import (
    WAIT_S,
    Gang,
    contents,
    dial,
    dial_when_open,
    drive,
    exactly,
    frame,
    free_ports,
    greet_receiver,
    greet_sender,
    listening,
    to_one,
    two,
    until,
)
from tests.support.wait import wait_for
from trainer import wire


def flipping_proxy(listen: socket.socket, port: int, at: int) -> None:
    """Hands bytes on both ways; flips one bit of byte `at` of what the first side says."""
    left, _ = listen.accept()
    right = dial_when_open(port)

    def pump(source: socket.socket, target: socket.socket, flip: int) -> None:
        seen = 0
        try:
            while data := bytearray(source.recv(65536)):
                if 0 <= flip - seen < len(data):
                    data[flip - seen] ^= 0x10
                seen += len(data)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for s in (source, target):
                s.close()

    threading.Thread(target=pump, args=(right, left, -1), daemon=True).start()
    pump(left, right, at)


@pytest.mark.parametrize(("place", "reason"), [("payload", "damaged on its way"), ("header", "sent no frame")])
def test_a_flipped_bit_is_found(tmp_path: Path, place: str, reason: str) -> None:
    ports = free_ports(3)
    real = Gang(channels=((0, 1, 300_000),), ports=(ports[0], ports[1]))
    greeting = ctypes.sizeof(wire.Hello) + 32
    at = greeting + (ctypes.sizeof(wire.Frame) + 123_456 if place == "payload" else 1)
    with listening(ports[2]) as door:
        threading.Thread(target=flipping_proxy, args=(door, ports[1], at), daemon=True).start()
        with (
            drive(real, tmp_path, 1, "R0.0", "R0.1") as one,
            drive(real.with_(ports=(ports[0], ports[2])), tmp_path, 0, "S0.0"),
        ):
            assert one.wait() == 75
    assert one.says(f"LOST R0.0 {'frame 0' if place == 'payload' else 'rank 0'}")
    assert one.says(reason)
    assert [line for line in one.lines if "LOST R0.1" in line], "a failed communicator refuses further work"


BAD = {
    "microbatch": (frame(0, 1, contents(0, 0, 1000), 0), "of microbatch 1 on channel 0"),
    "sequence": (frame(0, 0, contents(0, 0, 1000), 1), "sent frame 1 of channel 0, not 0"),
    "length": (frame(0, 0, contents(0, 0, 999), 0), "sent 999 bytes"),
    "channel": (frame(1, 0, contents(0, 0, 1000), 0), "no frame of channel 0"),
    "checksum": (frame(0, 0, contents(0, 0, 1000), 0)[:-1] + b"x", "frame 0 of channel 0 from rank 0 was damaged"),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_a_frame_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    bad, reason = BAD[what]
    gang = Gang(channels=((0, 1, 1000),), ports=tuple(free_ports(2)))
    with drive(gang, tmp_path, 1, "R0.0") as one, dial_when_open(gang.ports[1]) as s:
        assert greet_receiver(s, gang, 0)
        s.sendall(bad)
        assert one.wait() == 75
    assert one.says(reason)


@pytest.mark.parametrize("what", [*sorted(BAD), "half"])
def test_what_comes_wrong_while_a_rank_computes_is_found_there(tmp_path: Path, what: str) -> None:
    """The place is open and kernels run: no wait is needed to see it, and whatever is called next says the same."""
    whole = frame(0, 0, contents(0, 0, 1000), 0)
    closed = (whole[:500], "rank 0 is gone: the connection was closed during recv of microbatch 0 on channel 0")
    bad, reason = BAD.get(what, closed)
    gang = to_one()
    with (
        drive(gang, tmp_path, 1, "O0.0", "C", "R1.0") as one,
        dial_when_open(gang.ports[1]) as a,
        dial(gang.ports[1]) as b,
    ):
        assert greet_receiver(a, gang, 0)
        assert greet_receiver(b, gang, 1)
        a.sendall(bad)
        if what == "half":
            a.shutdown(socket.SHUT_WR)
        assert one.wait() == 75
    assert one.says(f"LOST C {reason}" if what in ("half", "checksum") else "LOST C rank 0 sent")
    assert one.says(reason)
    assert [line for line in one.lines if line.startswith("1 LOST R1.0") and reason in line]


def test_a_peer_that_stops_in_the_middle_of_a_message_is_a_stall(tmp_path: Path) -> None:
    """Bytes that move give more time; those of another channel do not."""
    gang = to_one(stall_ms=300)
    whole = frame(0, 3, contents(0, 3, 1000), 0)
    with (
        drive(gang, tmp_path, 1, "O0.3", "O1.0", "G0.3") as one,
        dial_when_open(gang.ports[1]) as a,
        dial(gang.ports[1]) as b,
    ):
        assert greet_receiver(a, gang, 0)
        assert greet_receiver(b, gang, 1)
        a.sendall(whole[:700])
        b.sendall(frame(1, 0, contents(1, 0, 64), 0))
        assert one.wait() == 86
    assert one.says("STALLED G0.3 no byte moved for 300 ms: recv of microbatch 3 on channel 0 with rank 0")


def test_messages_pass_behind_what_a_rank_does(tmp_path: Path) -> None:
    """Longer than any buffer, both ways at once, both send first: each moves in the other's wait."""
    size = 20_000_000
    gang = Gang(channels=((0, 1, size), (1, 0, size), (0, 1, 64)), ports=tuple(free_ports(2)))
    with (
        drive(gang, tmp_path, 0, "O1.0", "B0.0", "O1.1", "B0.1", "S2.0", "G1.0", "W0.2", "G1.1") as zero,
        drive(gang, tmp_path, 1, "B1.0", "B1.1", "O0.0", "O0.1", "R2.0", "W1.1", "G0.0", "G0.1", "W1.2") as one,
    ):
        assert (zero.wait(), one.wait()) == (0, 0), (zero.lines, one.lines)


def test_a_message_that_its_connection_holds_is_away_at_once(tmp_path: Path) -> None:
    """7 MB, whose receiver has no place for it yet. A machine whose limits are lower says so."""
    gang = Gang(channels=((0, 1, 7_000_000), (1, 0, 64)), ports=tuple(free_ports(2)))
    with drive(gang, tmp_path, 0, "S0.0", "R1.0") as zero, drive(gang, tmp_path, 1, "P", "R0.0", "S1.0") as one:
        until(lambda: zero.says("created") and one.says("created"), "the gang")
        wait_for(lambda: zero.says("ok S0.0") or one.logs("connections hold less than a message"), "room, or the word")
        one.go()
        assert (zero.wait(), one.wait()) == (0, 0), (zero.lines, one.lines)


def test_what_fails_behind_a_send_shows_at_the_next_call(tmp_path: Path) -> None:
    gang = two((0, 1, 50_000_000))
    with drive(gang, tmp_path, 0, "B2.5", "P", "R1.0") as zero, drive(gang, tmp_path, 1, "P") as one:
        until(lambda: zero.says("ok B2.5") and one.says("created"), "the send under way")
        one.process.kill()
        one.process.wait()
        zero.go()
        assert zero.wait() == 75
    assert [line for line in zero.lines if line.startswith("0 LOST R1.0 rank 1 is gone")], zero.lines
    gang = two((0, 1, 50_000_000))
    with drive(gang, tmp_path, 0, "B2.5", "C") as zero, drive(gang, tmp_path, 1, "P") as one:
        until(lambda: zero.says("ok B2.5") and one.says("created"), "the send under way")
        one.process.kill()
        assert zero.wait() == 75
    assert zero.says("LOST C rank 1 is gone")
    assert zero.says("during send of microbatch 5 on channel 2")


def test_a_peer_that_dies_ends_the_wait(tmp_path: Path) -> None:
    gang = two()
    with drive(gang, tmp_path, 0, "R1.0") as zero, drive(gang, tmp_path, 1, "P") as one:
        until(lambda: zero.says("created") and one.says("created"), "the gang")
        one.process.kill()
        assert zero.wait() == 75
    assert zero.says("rank 1 is gone: the connection was closed during recv of microbatch 0 on channel 1")


def test_a_sender_sees_that_its_receiver_died(tmp_path: Path) -> None:
    gang = two((0, 1, 50_000_000))
    with drive(gang, tmp_path, 0, "S2.0") as zero, drive(gang, tmp_path, 1, "P") as one:
        until(lambda: zero.says("created") and one.says("created"), "the gang")
        one.process.kill()
        assert zero.wait() == 75
    assert zero.says("rank 1 is gone")


def test_a_silent_peer_is_a_stall(tmp_path: Path) -> None:
    gang = two(stall_ms=300)
    with drive(gang, tmp_path, 0, "R1.4", "S0.0") as zero, drive(gang, tmp_path, 1, "P") as one:
        assert zero.wait() == 86
        assert zero.says("STALLED R1.4 no byte moved for 300 ms: recv of microbatch 4 on channel 1 with rank 1")
        assert zero.says("STALLED S0.0")
        one.process.kill()


def test_a_receiver_that_computes_longer_than_a_stall_keeps_its_sender(tmp_path: Path) -> None:
    """What was sent fits the buffers, so nobody waits; the window stays shut for six times the deadline."""
    size = 400_000
    gang = Gang(channels=((0, 1, size),), ports=tuple(free_ports(2)), stall_ms=250)
    with listening(gang.ports[1]) as door, drive(gang, tmp_path, 0, "S0.0", "P") as zero:
        peer, _ = door.accept()
        with peer:
            peer.settimeout(WAIT_S)
            assert greet_sender(peer, gang, 0)

            def idle_ms() -> int:
                info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                return int.from_bytes(info[52:56], sys.byteorder)  # tcpi_last_data_recv: probes carry none

            wait_for(lambda: zero.says("S0.0") and idle_ms() > 1500, "the window to be shut for long")
            whole = frame(0, 0, contents(0, 0, size), 0)
            assert exactly(peer, len(whole)) == whole
            zero.go()
            assert zero.wait() == 0, zero.lines


def test_a_sender_whose_receiver_takes_nothing_any_more_is_stalled(tmp_path: Path) -> None:
    gang = two((0, 1, 50_000_000), stall_ms=300)
    with drive(gang, tmp_path, 0, "S2.0") as zero, drive(gang, tmp_path, 1, "P"):
        assert zero.wait() == 86, zero.lines
    assert zero.says("no byte moved for 300 ms: send of microbatch 0 on channel 2 with rank 1")


def test_the_supervisors_word_ends_a_wait_and_a_stop_request_does_not(tmp_path: Path) -> None:
    gang = two()
    with drive(gang, tmp_path, 0, "R1.0") as zero, drive(gang, tmp_path, 1, "P"):
        until(lambda: zero.says("created"), "the gang")
        zero.process.send_signal(signal.SIGTERM)
        zero.process.send_signal(signal.SIGUSR1)
        assert zero.wait() == 75
    assert zero.says("the supervisor says that a peer was lost")
    with drive(gang, tmp_path, 0, "R1.0") as zero, drive(gang, tmp_path, 1, "P", "S1.0") as one:
        until(lambda: zero.says("created"), "the gang")
        zero.process.send_signal(signal.SIGTERM)
        one.go()
        assert (zero.wait(), one.wait()) == (0, 0), zero.lines
    with drive(gang, tmp_path, 0) as zero:
        zero.process.send_signal(signal.SIGTERM)
        assert zero.wait() in (143, -signal.SIGTERM)  # the latter where it came before the first instruction
