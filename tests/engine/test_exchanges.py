"""Messages between replicas: both ends send at once, over the channel's one connection, and nobody waits for ever."""

from __future__ import annotations

import random
from contextlib import ExitStack
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
    run_loop,
    until,
)

MOST = 1000


def lists(replicas: int, positions: int, seed: int) -> tuple[Gang, list[list[str]]]:
    """A gang, and by rank what it does: messages of a pipeline and exchanges of its replicas in one random order.

    Each position's list is the same in all replicas; lengths of exchanges differ from one to the next.
    """
    dice = random.Random(seed)
    channels: list[tuple[int, ...]] = []
    for p in range(positions - 1):
        channels += [(p, p + 1, 4096), (p + 1, p, 64)]
    across = 1
    while across < replicas:
        channels += [(p, p, MOST, k) for p in range(positions) for k in range(across, 2 * across)]
        across *= 2
    did = [0] * len(channels)
    does: list[list[str]] = [[] for _ in range(positions)]
    for _ in range(60):
        c = dice.randrange(len(channels))
        source, target = channels[c][:2]
        if source == target:
            does[source].append(f"X{c}.{did[c]}.{dice.randint(1, MOST)}")
        else:
            does[source].append(f"S{c}.{did[c]}")
            does[target].append(f"R{c}.{did[c]}")
        did[c] += 1
    gang = Gang(channels=tuple(channels), ports=tuple(free_ports(replicas * positions)))
    return gang, [does[p] for _ in range(replicas) for p in range(positions)]


@pytest.mark.parametrize("mode", ["loop", "late.1", "late.2"])
@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_replicas_exchange_in_any_order_that_is_one(tmp_path: Path, replicas: int, mode: str) -> None:
    for seed in range(6):
        gang, ranks = lists(replicas, 1 + seed % 2, seed)
        code, out = run_loop(tmp_path, gang, *map(" ".join, ranks), mode=mode)
        assert code == 0, (seed, out)


@pytest.mark.parametrize(("replicas", "positions"), [(2, 2), (4, 1)])
def test_replicas_exchange_over_tcp(tmp_path: Path, replicas: int, positions: int) -> None:
    gang, ranks = lists(replicas, positions, replicas)
    with ExitStack() as stack:
        drivers = [stack.enter_context(drive(gang, tmp_path, r, *does)) for r, does in enumerate(ranks)]
        assert [d.wait() for d in drivers] == [0] * len(drivers), [(d.lines, d.errors) for d in drivers]


def test_an_exchange_is_longer_than_any_buffer(tmp_path: Path) -> None:
    """Both send first, on one connection; no byte of either is taken before the other has begun."""
    gang = Gang(channels=((0, 0, 20_000_000, 1),), ports=tuple(free_ports(2)))
    with drive(gang, tmp_path, 0, "X0.0", "X0.1") as zero, drive(gang, tmp_path, 1, "X0.0", "X0.1") as one:
        assert (zero.wait(), one.wait()) == (0, 0), (zero.lines, one.lines)


def to_one(**changes: object) -> tuple[Gang, Gang]:
    """Rank 1 exchanges with rank 0, which the test is: the gang, and what its greetings say."""
    gang = Gang(channels=((0, 0, MOST, 1),), ports=tuple(free_ports(2))).with_(**changes)
    return gang, gang.with_(channels=((0, 1, MOST),))


def test_the_lower_rank_opens_the_one_connection_of_both_ways(tmp_path: Path) -> None:
    gang, greeting = to_one()
    with drive(gang, tmp_path, 1, "X0.3", "X0.4.10") as one, dial_when_open(gang.ports[1]) as a:
        assert greet_receiver(a, greeting, 0)
        first, second = frame(0, 3, contents(0, 3, MOST), 0), frame(0, 4, contents(0, 4, 10), 1)
        a.sendall(first + second)
        assert exactly(a, len(first) + len(second)) == first + second  # the same both ways
        assert one.wait() == 0, one.lines


WRONG = {
    "length": (frame(0, 3, contents(0, 3, MOST - 1), 0), "sent 999 bytes of microbatch 3 on channel 0, not 1000 of 3"),
    "microbatch": (frame(0, 4, contents(0, 4, MOST), 0), "sent 1000 bytes of microbatch 4 on channel 0, not 1000 of 3"),
    "again": (frame(0, 3, contents(0, 3, MOST), 7), "sent frame 7 of channel 0, not 0"),
    "channel": (frame(1, 3, contents(0, 3, MOST), 0), "sent no frame of channel 0"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_the_half_of_an_exchange_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    sent, reason = WRONG[what]
    gang, greeting = to_one()
    with drive(gang, tmp_path, 1, "X0.3") as one, dial_when_open(gang.ports[1]) as a:
        assert greet_receiver(a, greeting, 0)
        a.sendall(sent)
        assert one.wait() == 75
    assert one.says("LOST X0.3 rank 0 " + reason), one.lines


def test_a_peer_that_stops_in_the_middle_of_an_exchange_is_a_stall(tmp_path: Path) -> None:
    gang, greeting = to_one(stall_ms=300)
    with drive(gang, tmp_path, 1, "X0.3") as one, dial_when_open(gang.ports[1]) as a:
        assert greet_receiver(a, greeting, 0)
        a.sendall(frame(0, 3, contents(0, 3, MOST), 0)[:600])
        assert one.wait() == 86
    assert one.says("STALLED X0.3 no byte moved for 300 ms: recv of microbatch 3 on channel 0 with rank 0"), one.lines


@pytest.mark.parametrize("half", [0, 600])
def test_a_peer_that_dies_in_an_exchange_ends_it(tmp_path: Path, half: int) -> None:
    gang, greeting = to_one()
    with drive(gang, tmp_path, 1, "X0.3") as one:
        with dial_when_open(gang.ports[1]) as a:
            assert greet_receiver(a, greeting, 0)
            a.sendall(frame(0, 3, contents(0, 3, MOST), 0)[:half])
        assert one.wait() == 75
    assert one.says("LOST X0.3 rank 0 is gone"), one.lines


STRANGERS = {
    "plan": ({"plan": b"q" * 32}, "it runs another plan"),
    "epoch": ({"epoch": 6}, "its epoch is 6, this attempt's is 7"),
    "step": ({"start_step": 11}, "it starts after step 11, this rank after 12"),
    "turned": ({"channels": ((1, 0, MOST),)}, "it says channel 0 from rank 1 to 0, not 0 from 0 to 1"),
    "replica": ({"channels": ((2, 1, MOST),)}, "it says channel 0 from rank 2 to 1, not 0 from 0 to 1"),
}


@pytest.mark.parametrize("what", sorted(STRANGERS))
def test_a_replica_that_disagrees_is_turned_away(tmp_path: Path, what: str) -> None:
    changes, reason = STRANGERS[what]
    gang, greeting = to_one()
    with drive(gang, tmp_path, 1) as one, dial_when_open(gang.ports[1]) as stranger:
        assert not greet_receiver(stranger, greeting.with_(**changes), 0)
        until(lambda: one.logs(reason), reason)
        with dial(gang.ports[1]) as a:
            assert greet_receiver(a, greeting, 0)
            assert one.wait() == 0, one.errors


def test_two_lengths_break_an_exchange_in_memory(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 0, MOST, 1),), ports=(1, 2))
    code, out = run_loop(tmp_path, gang, "X0.0.10", "X0.0.20")
    assert code == 75
    assert "bytes of microbatch 0 were sent, " in out
