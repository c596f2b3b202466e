"""Ranks talk: the handshake, and who is turned away or never comes (tcp.c)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.comm_peer import (
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
    run_loop,
    to_one,
    two,
    until,
)
from tests.support.wait import wait_for


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
