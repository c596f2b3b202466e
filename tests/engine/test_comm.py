"""Ranks talk: the handshake and its refusals, frames, lost and silent peers (tcp.c), and rendezvous order (loop.c)."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.comm_peer import (
    WAIT_S,
    Gang,
    channels,
    contents,
    dial,
    drive,
    exactly,
    frame,
    free_ports,
    greet_receiver,
    greet_sender,
    until,
)
from tests.engine.native import build_program
from tests.support.wait import wait_for
from tests.trainer.plan.test_columns import random_schedule
from trainer import wire
from trainer.errors import PlanError
from trainer.plan.channels import MessageEnd, check_channels
from trainer.plan.messages import insert_messages
from trainer.plan.places import Position, Stage
from trainer.plan.rows import Action, Row
from trainer.plan.schedules import stage_positions


def two(*more: tuple[int, int, int], **changes: object) -> Gang:
    """Ranks 0 and 1 with a channel each way, and more."""
    return Gang(channels=((0, 1, 300_000), (1, 0, 64), *more), ports=tuple(free_ports(2))).with_(**changes)


def to_one(**changes: object) -> Gang:
    """Rank 1 receives on channels 0 and 1; the test is rank 0."""
    return Gang(channels=((0, 1, 1000), (0, 1, 64)), ports=tuple(free_ports(2))).with_(**changes)


def dial_when_open(port: int) -> socket.socket:
    """A connection to a listener that may not be there yet."""
    found: list[socket.socket] = []

    def attempt() -> bool:
        try:
            found.append(dial(port))
        except OSError:
            return False
        return True

    until(attempt, f"a listener on port {port}")
    return found[0]


def test_two_ranks_exchange_in_order(tmp_path: Path) -> None:
    gang = two(hosts=("127.0.0.1", "localhost"))
    with (
        drive(gang, tmp_path, 0, "S0.0", "S0.1", "R1.0", "S0.2", "R1.1") as zero,
        drive(gang, tmp_path, 1, "R0.0", "S1.0", "R0.1", "R0.2", "S1.1") as one,
    ):
        assert (zero.wait(), one.wait()) == (0, 0), (zero.lines, one.lines, zero.errors, one.errors)


def test_the_handshake_as_the_page_says_it(tmp_path: Path) -> None:
    gang = to_one()
    with (
        drive(gang, tmp_path, 1, "R0.0", "R1.3", "R0.1") as one,
        dial_when_open(gang.ports[1]) as a,
        dial(gang.ports[1]) as b,
    ):
        assert greet_receiver(a, gang, 0)
        assert greet_receiver(b, gang, 1)
        a.sendall(frame(0, 0, contents(0, 0, 1000), 0) + frame(0, 1, contents(0, 1, 1000), 1))
        b.sendall(frame(1, 3, contents(1, 3, 64), 0))
        assert one.wait() == 0, one.lines


WRONG = {
    "key": ({"key": b"x" * 32}, "does not hold this attempt's key"),
    "epoch": ({"epoch": 6}, "its epoch is 6, this attempt's is 7"),
    "plan": ({"plan": b"q" * 32}, "another plan"),
    "nonce": ({"nonce": b"m" * 16}, "another gang of this epoch"),
    "run": ({"run": b"other-000000"}, "of the run 'other-000000'"),
    "step": ({"start_step": 11}, "starts after step 11, this rank after 12"),
    "ends": ({"channels": ((0, 1, 1000), (0, 1, 64), (0, 1, 64))}, "channel 2 does not end at this rank"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_stranger_is_turned_away_and_the_attempt_goes_on(tmp_path: Path, what: str) -> None:
    changes, reason = WRONG[what]
    gang = to_one()
    with drive(gang, tmp_path, 1) as one, dial_when_open(gang.ports[1]) as stranger:
        assert not greet_receiver(stranger, gang.with_(**changes), 2 if what == "ends" else 0)
        until(lambda: one.logs(reason), reason)
        with dial(gang.ports[1]) as a, dial(gang.ports[1]) as b:
            assert greet_receiver(a, gang, 0)
            assert greet_receiver(b, gang, 1)
            assert one.wait() == 0, one.errors


def test_each_replica_talks_to_itself(tmp_path: Path) -> None:
    """Channels join positions; ranks 2 and 3 are positions 0 and 1 of the second replica."""
    gang = Gang(channels=((0, 1, 30_000), (1, 0, 64)), ports=tuple(free_ports(4)))
    up, down = ("S0.0", "R1.0", "S0.1", "R1.1"), ("R0.0", "S1.0", "R0.1", "S1.1")
    with (
        drive(gang, tmp_path, 0, *up) as a,
        drive(gang, tmp_path, 1, *down) as b,
        drive(gang, tmp_path, 2, *up) as c,
        drive(gang, tmp_path, 3, *down) as d,
    ):
        ends = [rank.wait() for rank in (a, b, c, d)]
        assert ends == [0, 0, 0, 0], (a.lines, b.lines, c.lines, d.lines)
    code, out = run_loop(tmp_path, gang, " ".join(up), " ".join(down), " ".join(up), " ".join(down))
    assert code == 0, out


def test_a_rank_of_another_replica_is_turned_away(tmp_path: Path) -> None:
    """The hello names processes, so channel 0 of one replica is never taken for that of the other."""
    gang = Gang(channels=((0, 1, 1000),), ports=tuple(free_ports(4)), connect_ms=20000)
    ranks = gang.with_(channels=((2, 3, 1000),))
    with drive(gang, tmp_path, 3, "R0.0") as three, dial_when_open(gang.ports[3]) as a, dial(gang.ports[3]) as b:
        assert not greet_receiver(a, gang, 0)  # says rank 0 to 1
        until(lambda: three.logs("it says channel 0 from rank 0 to 1, not 0 from 2 to 3"), "the refusal")
        assert greet_receiver(b, ranks, 0)
        b.sendall(frame(0, 0, contents(0, 0, 1000), 0))
        assert three.wait() == 0, three.lines
    short = gang.with_(connect_ms=300)
    with drive(short, tmp_path, 3) as three:
        assert three.wait() == 86
    assert three.says("rank 2 has not connected channel 0")


def test_a_second_process_of_a_rank_is_turned_away(tmp_path: Path) -> None:
    gang = to_one()
    with (
        drive(gang, tmp_path, 1, "R0.0") as one,
        dial_when_open(gang.ports[1]) as first,
        dial(gang.ports[1]) as second,
        dial(gang.ports[1]) as other,
    ):
        assert greet_receiver(first, gang, 0)
        assert not greet_receiver(second, gang, 0)
        assert greet_receiver(other, gang, 1)
        first.sendall(frame(0, 0, contents(0, 0, 1000), 0))
        assert one.wait() == 0, one.lines
        until(lambda: one.logs("channel 0 is already connected: a second process of rank 0?"), "the refusal")


def test_garbage_and_half_greetings_do_not_hold_up_the_others(tmp_path: Path) -> None:
    gang = to_one()
    with drive(gang, tmp_path, 1) as one, dial_when_open(gang.ports[1]) as garbage, dial(gang.ports[1]) as half:
        garbage.sendall(b"GET / HTTP/1.1\r\n" * 40)
        half.sendall(bytes(gang.hello(0))[:100])
        with dial(gang.ports[1]) as a:
            assert greet_receiver(a, gang, 0)
            assert exactly(half, 1) == b""  # dropped, in its time
            wait_for(lambda: one.logs("did not finish its greeting"), "the word about half a greeting")
            wait_for(lambda: one.logs("does not speak this protocol"), "the word about garbage")
            with dial(gang.ports[1]) as b:
                assert greet_receiver(b, gang, 1)
                assert one.wait() == 0, one.errors


def test_more_silent_strangers_than_places(tmp_path: Path) -> None:
    gang = to_one()
    with drive(gang, tmp_path, 1) as one:
        silent = [dial_when_open(gang.ports[1]) for _ in range(80)]
        with dial(gang.ports[1]) as a, dial(gang.ports[1]) as b:
            assert greet_receiver(a, gang, 0)
            assert greet_receiver(b, gang, 1)
            assert one.wait() == 0, one.errors
        for s in silent:
            s.close()
    assert one.logs("too many unfinished greetings")


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
        s.listen()
        s.settimeout(WAIT_S)
        yield s


def test_a_sender_turns_a_false_receiver_away_and_finds_the_right_one(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 64),), ports=tuple(free_ports(2)))
    with drive(gang, tmp_path, 0, "S0.5") as zero, listening(gang.ports[1]) as door:
        for false in (gang.with_(key=b"x" * 32), gang.with_(epoch=6)):
            s, _ = door.accept()
            with s:
                assert not greet_sender(s, false, 0)
        s, _ = door.accept()
        with s:
            assert greet_sender(s, gang, 0)
            whole = frame(0, 5, contents(0, 5, 64), 0)
            assert exactly(s, len(whole)) == whole
            assert zero.wait() == 0
    assert zero.logs("does not hold this attempt's key")


def test_peers_that_never_come_are_named(tmp_path: Path) -> None:
    gang = two(connect_ms=300)
    with drive(gang, tmp_path, 0) as zero:
        assert zero.wait() == 86
    assert zero.says("not complete after 300 ms: rank 1 at 127.0.0.1")
    assert zero.says("Connection refused")
    lonely = to_one(connect_ms=300)
    with drive(lonely, tmp_path, 1) as one:
        assert one.wait() == 86
    assert one.says("rank 0 has not connected channel 0")


def test_a_name_that_does_not_exist_is_named(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 64),), ports=tuple(free_ports(2)), hosts=("127.0.0.1", "nowhere.invalid"))
    with drive(gang.with_(connect_ms=700), tmp_path, 0) as zero:
        assert zero.wait() == 86
    assert zero.says("nowhere.invalid")


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    gang = to_one()
    with listening(gang.ports[1]), drive(gang, tmp_path, 1) as one:
        assert one.wait() == 78
    assert one.says(f"cannot listen on 127.0.0.1:{gang.ports[1]}: Address already in use; stop what listens there")


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


def run_loop(path: Path, gang: Gang, *ranks: str, mode: str = "loop") -> tuple[int, str]:
    done = subprocess.run(
        [str(build_program("comm_drive")), mode, str(gang.file(path / "attempt")), channels(gang), *ranks],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return done.returncode, done.stdout


def test_rendezvous_passes_the_right_order_and_stalls_the_wrong_one(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 4096), (1, 0, 64)), ports=(1, 2), stall_ms=400, connect_ms=5000)
    code, out = run_loop(tmp_path, gang, "S0.0 S0.1 R1.0 R1.1", "R0.0 R0.1 S1.0 S1.1")
    assert code == 0, out
    code, out = run_loop(tmp_path, gang, "S0.0 R1.0", "S1.0 R0.0")  # both send first: needs a buffer
    assert code in (75, 86)  # both stall; who is second may see that the first has left
    assert re.search(r"[01] STALLED S([01]).0 send of microbatch 0 on channel \1 .* passed its deadline", out), out


def test_rendezvous_sees_what_does_not_fit_and_who_left(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 4096),), ports=(1, 2), stall_ms=20000, connect_ms=5000)
    code, out = run_loop(tmp_path, gang, "S0.0", "R0.1")
    assert code == 75
    assert "1 LOST R0.1 rank 0, channel 0: 4096 bytes of microbatch 0 were sent, 4096 of 1 awaited" in out
    code, out = run_loop(tmp_path, gang, "S0.0 S0.1", "R0.0")
    assert code == 75
    assert "0 LOST S0.1 rank 1 is gone" in out


def test_messages_as_late_as_they_may_be(tmp_path: Path) -> None:
    """Both send first, which passes; a wait that can never end is seen at once; that a rank left, too."""
    gang = Gang(channels=((0, 1, 4096), (1, 0, 64)), ports=(1, 2), stall_ms=20000, connect_ms=5000)
    for seed in range(4):
        code, out = run_loop(tmp_path, gang, "B0.0 O1.0 G1.0 W0.1", "B1.0 O0.0 W1.1 G0.0", mode=f"late.{seed}")
        assert code == 0, out
    code, out = run_loop(tmp_path, gang, "R1.0 B0.0", "R0.0 B1.0", mode="late.1")
    assert code in (75, 86)
    assert re.search(
        r"[01] STALLED R([01]).0 recv of microbatch 0 on channel \1 .* can never pass: every rank waits", out
    )
    code, out = run_loop(tmp_path, gang, "B0.0", "O0.0 G0.0", mode="late.1")
    assert code == 75
    assert "1 LOST G0.0 rank 0 is gone" in out


def test_the_four_rank_pipeline_as_threads(tmp_path: Path) -> None:
    forward = [(i, i + 1, 70_000) for i in range(3)]
    backward = [(i + 1, i, 70_000) for i in range(3)]
    gang = Gang(channels=(*forward, *backward), ports=(1, 2, 3, 4), connect_ms=5000)
    lists = []
    for rank in range(4):
        steps = []
        for m in range(5):
            steps += [f"R{rank - 1}.{m}"] if rank else []
            steps += [f"S{rank}.{m}"] if rank < 3 else []
        for m in range(5):
            steps += [f"R{3 + rank}.{m}"] if rank < 3 else []
            steps += [f"S{2 + rank}.{m}"] if rank else []
        lists.append(" ".join(steps))
    code, out = run_loop(tmp_path, gang, *lists)
    assert code == 0, out


def disordered(rows: list[list[Action]], source: random.Random) -> None:
    """Moves, mostly, or loses or doubles a message of a rank."""
    row = source.choice([row for row in rows if row])
    at, to = source.randrange(len(row)), source.randrange(len(row))
    kind = source.randrange(10)
    if kind < 4:
        row[at], row[to] = row[to], row[at]
    elif kind < 8:
        row.insert(to, row.pop(at))
    elif kind == 8:
        del row[at]
    else:
        row.insert(to, row[at])


def agreed(folder: Path, rows: list[list[Action]], rank_of: Mapping[Stage, Position]) -> str:
    """What the checker says of rows of messages, and what happens on comm/loop.c: "runs", "stalls" or "breaks"."""
    edges = sorted({(a.op[-1], a.edge) for row in rows for a in row})
    ends = [[MessageEnd((a.op[-1], a.edge), a.is_send, a.microbatch, str(a)) for a in row] for row in rows]
    try:
        check_channels(ends)
        verdict = "runs"
    except PlanError as error:
        verdict = "stalls" if str(error).startswith("deadlock") else "breaks"
    lists = [
        " ".join(f"{'S' if a.is_send else 'R'}{edges.index((a.op[-1], a.edge))}.{a.microbatch}" for a in row)
        for row in rows
    ]
    gang = Gang(
        channels=tuple((rank_of[edge[0]], rank_of[edge[1]], 64) for _, edge in edges),
        ports=tuple(range(1, 1 + len(rows))),
        stall_ms=20_000 if verdict == "runs" else 100,
    )
    code, out = run_loop(folder, gang, *lists)
    assert (code == 0) == (verdict == "runs"), (verdict, lists, out)
    if verdict != "breaks":  # what breaks may stall before it
        assert (" STALLED " in out) == (verdict == "stalls"), (verdict, lists, out)
    return verdict


def test_the_checker_says_of_messages_what_the_engine_does(tmp_path: Path) -> None:
    """Random schedules, some with messages out of order: refused where a rank fails, a deadlock where one stalls."""
    source = random.Random(11)
    seen = set()
    for _ in range(int(os.environ.get("HOTSTAGE_FUZZ_MESSAGES", "40"))):
        computed, stages = random_schedule(source)
        rows = [[a for a in row if not a.is_compute] for row in insert_messages(computed, stages)]
        if not any(rows):
            continue
        for _ in range(source.randrange(4)):
            if any(rows):
                disordered(rows, source)
        if any(rows):
            seen.add(agreed(tmp_path, rows, stage_positions(computed)))
    assert seen == {"runs", "stalls", "breaks"}


def own_orders(source: random.Random) -> tuple[list[list[Action]], list[int]]:
    """Rows in which each position looks at itself alone: its forwards, I and W (or B) in any order that its own stages
    allow. The positions may wait for one another for ever. Where the stages are, too."""
    stages, microbatches = source.randint(2, 4), source.randint(1, 3)
    positions = source.randint(2, stages)
    rank_of = [*range(positions), *(source.randrange(positions) for _ in range(stages - positions))]
    source.shuffle(rank_of)
    rows: list[list[Action]] = []
    for here in range(positions):
        mine = [stage for stage in range(stages) if rank_of[stage] == here]
        parts = {stage: source.choice((("F", "B"), ("F", "I", "W"))) for stage in mine}
        done = {(stage, op): 0 for stage in mine for op in parts[stage]}
        row: list[Action] = []
        while min(done.values()) < microbatches:
            ready = []
            for stage, op in done:
                back = parts[stage][1]
                after = {"F": [(stage - 1, "F")], "W": [(stage, "I")]}.get(op)
                if after is None:
                    above = parts.get(stage + 1, ("", ""))[1]
                    after = [(stage, "F"), (stage + 1, above)]
                if done[stage, op] < microbatches and all(done[stage, op] < done.get(a, microbatches) for a in after):
                    ready.append((stage, op, back))
            stage, op, _ = source.choice(ready)
            row.append(Action(Stage(stage), op, done[stage, op]))
            done[stage, op] += 1
        rows.append(row)
    return rows, rank_of


def with_messages(row: list[Action], rank_of: list[int]) -> list[Action]:
    """Each receive right before what needs it, each send right behind what made it."""
    out, here = [], rank_of[row[0].stage]
    for action in row:
        kind, step = ("F", 1) if action.op == "F" else ("B", -1)
        source, target = action.stage - step, action.stage + step
        if action.op != "W" and 0 <= source < len(rank_of) and rank_of[source] != here:
            out.append(Action(action.stage, f"RECV_{kind}", action.microbatch))
        out.append(action)
        if action.op != "W" and 0 <= target < len(rank_of) and rank_of[target] != here:
            out.append(Action(action.stage, f"SEND_{kind}", action.microbatch))
    return out


def test_the_checker_says_of_computations_what_the_engine_does(tmp_path: Path) -> None:
    """Positions that look at themselves alone: where the checker sees no way through the computations (S5) the engine
    stalls, with messages as they come; where it places the messages, the engine runs."""
    source = random.Random(5)
    seen = set()
    for _ in range(int(os.environ.get("HOTSTAGE_FUZZ_MESSAGES", "40")) // 2):
        rows, rank_of = own_orders(source)
        placed: list[Row] = []
        said = ""
        try:
            placed = insert_messages(rows, len(rank_of))
        except PlanError as error:
            said = str(error)
        assert placed or said.startswith("S5"), said
        positions = {Stage(stage): Position(position) for stage, position in enumerate(rank_of)}
        as_they_come = [[a for a in with_messages(row, rank_of) if not a.is_compute] for row in rows]
        naive = agreed(tmp_path, as_they_come, positions)
        assert naive == "stalls" or placed, rows
        if placed:
            assert agreed(tmp_path, [[a for a in row if not a.is_compute] for row in placed], positions) == "runs"
        seen.add((naive, bool(placed)))
    assert seen >= {("stalls", False), ("stalls", True), ("runs", True)}
