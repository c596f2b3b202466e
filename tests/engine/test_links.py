"""Messages from device to device (``trainer/engine/comm/ways.c``) on emulated ones: by memory that processes share, by
an emulated NCCL, through the host; what each wait and each write is for, and what is said where they cannot.
"""

from __future__ import annotations

import ctypes
import json
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import engine_runs
from tests.engine import cuda_lib
from tests.engine.comm_peer import Driver, Gang, dial, drive, exactly, free_ports, greet_receiver, until
from tests.engine.engine_build import engine
from tests.engine.plans import GPT2, LLAMA, small_plan
from trainer import wire
from trainer.plan.compiled import Plan

__all__ = ["engine"]

WAYS = ("ipc", "nccl", "tcp")


@pytest.fixture(scope="session")
def library() -> Path:
    return cuda_lib.build()


@pytest.fixture(autouse=True)
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSTAGE_CUDA", str(library))
    monkeypatch.setenv("HS_EMULATED_KERNELS", "cpu")
    monkeypatch.setenv("HS_EMULATED_DEVICES", "4")


def only(rank: int, **environment: str) -> list[str]:
    """A command that ranks run under, which gives the environment to one of them."""
    sets = " ".join(f"{name}={value!r}" for name, value in environment.items())
    return ["/bin/sh", "-c", f'case " $* " in *" --rank {rank} "*) export {sets};; esac; exec "$@"', "sh"]


class Runs:
    """Runs of one plan."""

    def __init__(self, engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> None:
        self.engine, self.folder, self.patch, self.count = engine, folder, monkeypatch, 0
        self.plan: Plan = small_plan(folder, **plan)

    def state(
        self, device: str, way: str = "ipc", prefix: Sequence[str] = (), dump: bool = True, **environment: str
    ) -> dict[str, Any]:
        """Losses, norms, gradients and weights of every step."""
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        ranks = range(len(self.plan.ranks))
        with self.patch.context() as patch:
            patch.setenv("HOTSTAGE_ENGINE_CHANNELS", way)
            for name, value in environment.items():
                patch.setenv(f"HS_EMULATED_{name}", value)
            gang = engine_runs.train(
                self.plan,
                self.folder / "data",
                folder,
                engine=self.engine,
                device=device,
                devices=ranks if device == "cuda" else (),
                prefix=prefix,
                dump=dump,
            )
        if device == "cuda":
            start = json.loads((folder / "stdout-0").read_text().splitlines()[0])
            assert {name for name, count in start["ways"].items() if count} == set(way.split(","))
        return engine_runs.dumped(gang, folder)

    def shows(self, sound: dict[str, Any], **more: Any) -> bool:
        """Whether a fault does."""
        return engine_runs.shows(lambda: self.state("cuda", **more), sound)


MakeRuns = Callable[..., Runs]


@pytest.fixture
def runs(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRuns:
    def make(**plan: Any) -> Runs:
        return Runs(engine, tmp_path, monkeypatch, **plan)

    return make


AHEAD = {"stages": 2, "schedule": "gpipe", "optimizer": "optimistic"}
CHUNKS = {"stages": 4, "chunks": 2, "schedule": "interleaved-1f1b"}
CASES = {"2": (LLAMA, {"stages": 2}), "4": (GPT2, {"stages": 4}), "2x2": (LLAMA, CHUNKS), "2 ahead": (GPT2, AHEAD)}


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_same_bits(runs: MakeRuns, case: str) -> None:
    model, parallel = CASES[case]
    some = runs(model=model | {"layers": 4}, parallel=parallel, batch=8, steps=3)
    sound = some.state("cpu")
    for way, order in [("tcp", 0), ("ipc", 0), ("ipc", 9), ("ipc", 31), ("nccl", 7), ("nccl", 32)]:
        assert some.state("cuda", way, ORDER=str(order)) == sound, (way, order)
    assert some.state("cuda", "ipc", LAZY="1", ORDER="13") == sound
    told = {name: sound[name] for name in ("losses", "norms")}
    assert some.state("cuda", "ipc", dump=False, ORDER="33") == told  # a dump waits for the device


@pytest.mark.parametrize("way", ["ipc", "nccl"])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_rank_that_is_gone_ends_its_peers(runs: MakeRuns, way: str, stages: int) -> None:
    """In the middle of the second step or the third, while their devices wait: with 75, and a word of who is gone."""
    some = runs(model=GPT2 | {"layers": 4}, parallel={"stages": stages}, batch=8, steps=3)
    with pytest.raises(AssertionError) as ended:
        some.state("cuda", way, prefix=only(1, HS_EMULATED_DIE="19"))
    said = str(ended.value)
    assert "rank 1: exit -9" in said
    for rank in set(range(stages)) - {1}:
        assert f"rank {rank}: exit 75" in said, said
    words = r"rank 1 is gone: the connection was closed while this rank's device waited \(channel \d+, "
    assert re.search(words + way, said), said


def pair(**changes: object) -> Gang:
    """Rank 0 sends on channel 0, rank 1 on channel 1."""
    return Gang(channels=((0, 1, 3000), (1, 0, 64)), ports=tuple(free_ports(2))).with_(**changes)


@contextmanager
def both(
    gang: Gang, path: Path, zero: Sequence[str], one: Sequence[str], way: str = "ipc", *more: dict[str, str]
) -> Iterator[tuple[Driver, Driver]]:
    """Two ranks, which end; ``more``: the environment of each."""
    first, second = (*more, *({}, {})[len(more) :])
    ways = {"HOTSTAGE_ENGINE_CHANNELS": way}
    with (
        drive(gang, path, 0, *zero, mode="device", **ways | first) as a,
        drive(gang, path, 1, *one, mode="device", **ways | second) as b,
    ):
        a.wait()
        b.wait()
        yield a, b


def codes(a: Driver, b: Driver) -> tuple[int, int]:
    return a.process.returncode, b.process.returncode


def told(*drivers: Driver) -> str:
    return "\n".join(line for driver in drivers for line in [*driver.lines, *driver.errors])


ZERO, ONE = ["S0.0", "R1.0", "S0.1", "S0.2", "R1.1"], ["R0.0", "S1.0", "R0.1", "R0.2", "S1.1"]


@pytest.mark.parametrize("way", WAYS)
def test_messages_arrive_in_order(tmp_path: Path, way: str) -> None:
    with both(pair(), tmp_path, ZERO, ONE, way) as (a, b):
        assert codes(a, b) == (0, 0), told(a, b)
        counts = ",".join(f'"{w}":{2 * (w == way)}' for w in WAYS)
        assert a.logs(f'"ways of device memory",{counts}')


def test_each_wait_that_is_left_out_shows(tmp_path: Path) -> None:
    """A place that is written to before it is free; a message that is read before it is there."""
    early = {"HS_EMULATED_UNWAITED": "3"}  # rank 0 waits for channel 0, 1, then 0 again
    with both(pair(), tmp_path, ZERO, ONE, "ipc", early, {"HS_EMULATED_HOLD": "3"}) as (a, b):
        assert b.says("what passes between processes failed"), told(a, b)
    hasty = {"HS_EMULATED_UNWAITED": "3", "HS_EMULATED_LAZY": "1"}
    with both(pair(stall_ms=400), tmp_path, ZERO, ONE, "ipc", {}, hasty) as (a, b):
        assert b.says("1 BUG R0.1 byte 0 differs"), told(a, b)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_write_that_is_left_out_shows(tmp_path: Path, rank: int) -> None:
    """Nobody goes on, and it is said who waits for what."""
    lost = ({"HS_EMULATED_UNWRITTEN": "3"}, {})
    with both(pair(stall_ms=400), tmp_path, ZERO, ONE, "ipc", *lost[:: 1 - 2 * rank]) as (a, b):
        words = r"moved for 400 ms: channel 0 (from rank 0|to rank 1) has come to message (\d), and waits for (\d)"
        found = re.search(
            words, re.sub(r" \(microbatch \d\)", "", told(a, b))
        )  # whoever waits for longer says so first
        assert found, told(a, b)
        assert int(found[3]) == int(found[2]) + 1
        assert {86} <= {*codes(a, b)} <= {86, 75}


def test_a_message_out_of_turn_lets_nobody_go_on(tmp_path: Path) -> None:
    with both(pair(stall_ms=400), tmp_path, ["S0.0", "S0.5"], ["R0.0", "R0.1"]) as (a, b):
        assert {86} <= {*codes(a, b)} <= {86, 75}
        one = "channel 0 to rank 1 has come to message 2 (microbatch 1), and waits for 2 (microbatch 5)"
        other = "channel 0 from rank 0 has come to message 1 (microbatch 0), and waits for 2 (microbatch 1)"
        assert one in told(a) or other in told(b), told(a, b)


def test_replicas_talk_through_the_host_beside_their_own_ways(runs: MakeRuns) -> None:
    some = runs(parallel={"stages": 2, "replicas": 2}, batch=8, reduction_groups=2, steps=2)
    sound = some.state("cpu")
    for way, order in [("ipc", 9), ("nccl", 32)]:
        assert some.state("cuda", f"{way},tcp", ORDER=str(order)) == sound, (way, order)


def test_another_fabric_than_tcp_rules_replicas_out(tmp_path: Path) -> None:
    """What passes between replicas goes over tcp alone."""
    gang = Gang(channels=((0, 0, 3000, 1),), ports=tuple(free_ports(2)))
    with both(gang, tmp_path, ["X0.0"], ["X0.0"], "ipc,tcp") as (a, b):
        assert codes(a, b) == (0, 0), told(a, b)
        assert a.logs("messages between replicas pass through the host")
    fabric = {"HOTSTAGE_ENGINE_FABRIC": "nvl72"}
    with both(gang, tmp_path, ["X0.0"], ["X0.0"], "", fabric, fabric) as (a, b):
        assert codes(a, b) == (78, 78)
        assert 'which launch.fabric = "nvl72" rules out; set launch.fabric = "tcp", or parallel.replicas = 1' in told(a)


def test_what_cannot_be_shared_goes_through_the_host_and_says_so(tmp_path: Path) -> None:
    with both(pair(), tmp_path, ZERO, ONE, "ipc,tcp", {"HS_EMULATED_SHARE": "no"}) as (a, b):
        assert codes(a, b) == (0, 0), told(a, b)
        for driver in (a, b):
            said = [json.loads(line) for line in driver.errors if "pass through the host" in line]
            assert [line["channel"] for line in said] == [0, 1]
            assert {line["ipc"] for line in said} == {
                "the driver here has no memory that processes share (CUDA IPC)"
            } or "rank 0 cannot: the driver here has no memory" in said[0]["ipc"]


def test_another_fabric_than_tcp_rules_tcp_out(tmp_path: Path) -> None:
    fabric = {"HOTSTAGE_ENGINE_FABRIC": "infiniband", "HS_EMULATED_SHARE": "no"}
    with both(pair(), tmp_path, ZERO, ONE, "", fabric, fabric) as (a, b):
        assert codes(a, b) == (0, 0), told(a, b)
        assert a.logs('"ipc":0,"nccl":2,"tcp":0')
    poor = fabric | {"HS_EMULATED_NCCL": "no"}
    with both(pair(), tmp_path, ZERO, ONE, "", fabric, poor) as (a, b):
        assert codes(a, b) == (78, 78)
        said = 'channel 0 from rank 0 to rank 1 could only go over tcp, which launch.fabric = "infiniband" rules out'
        for driver in (a, b):
            assert f"{said} (ipc: " in told(driver)
            assert "nccl: rank 1 cannot: " in told(driver)
            assert "libnccl.so.2 is not found; install hotstage[cuda]" in told(driver)
            assert 'or set launch.fabric = "tcp"' in told(driver)


def test_two_ranks_on_one_device_under_nccl(tmp_path: Path) -> None:
    one = {"HS_EMULATED_DEVICES": "1"}
    with both(pair(), tmp_path, ZERO, ONE, "nccl", one, one) as (a, b):
        assert codes(a, b) == (78, 78)
        for driver in (a, b):
            assert "ranks 0 and 1 are on one device, between which NCCL carries nothing (channel 0" in told(driver)
            assert "HOTSTAGE_DEVICES" in told(driver)
    with both(pair(), tmp_path, ZERO, ONE, "ipc,nccl", one, one) as (a, b):
        assert codes(a, b) == (0, 0), told(a, b)


UNHANDLED_CUDA, SYSTEM, INTERNAL, INVALID_USAGE, REMOTE = 1, 2, 3, 5, 6


@pytest.mark.parametrize(
    ("error", "code"), [(UNHANDLED_CUDA, 70), (SYSTEM, 75), (INTERNAL, 70), (INVALID_USAGE, 70), (REMOTE, 75)]
)
def test_what_nccl_fails_with_makes_no_machine_sick(tmp_path: Path, error: int, code: int) -> None:
    """But its device, where it says so itself."""
    failing = {"HS_EMULATED_NCCL": str(error)}
    with both(pair(), tmp_path, ZERO, ONE, "nccl", failing, {}) as (a, b):
        assert codes(a, b) == (code, 75)
        assert "over NCCL: NCCL, carrying messages: " in told(a)
        assert ": said to" in told(a)


@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_the_supervisor_s_word_ends_a_wait_for_the_device(tmp_path: Path, way: str) -> None:
    gang, ways = pair(), {"HOTSTAGE_ENGINE_CHANNELS": way}
    with (
        drive(gang, tmp_path, 0, "S0.0", "R1.0", mode="device", **ways) as zero,
        drive(gang, tmp_path, 1, "R0.0", "P", mode="device", **ways),
    ):
        until(lambda: zero.says("0 ok S0.0"), "the first message")
        zero.process.send_signal(signal.SIGUSR1)
        assert zero.wait() == 75
        assert zero.says("0 LOST R1.0 the supervisor says that a peer was lost"), told(zero)


def test_a_rank_that_is_done_stays_until_its_peers_are(tmp_path: Path) -> None:
    """Its memory is theirs too; they do not take its goodbye for a loss."""
    gang, ways = pair(), {"HOTSTAGE_ENGINE_CHANNELS": "ipc"}
    with (
        drive(gang, tmp_path, 0, "S0.0", "P", mode="device", **ways) as zero,
        drive(gang, tmp_path, 1, "R0.0", mode="device", **ways) as one,
    ):
        until(lambda: one.says("1 ok R0.0"), "the message")
        assert one.process.poll() is None
        zero.go()
        assert (zero.wait(), one.wait()) == (0, 0), told(zero, one)


def offer(gang: Gang, channel: int = 0, /, **changes: Any) -> bytes:
    """Rank 0's, of a machine like this one where nothing says otherwise."""
    o = wire.Offer()
    o.magic[:], o.version, o.channel, o.rank = wire.OFFER_MAGIC, wire.OFFER_VERSION, channel, 0
    o.allowed = o.able = 1 << wire.WAYS["tcp"] | 1 << wire.WAYS["ipc"]
    o.bytes, o.boot = gang.channels[channel][2], Path("/proc/sys/kernel/random/boot_id").read_bytes()
    o.flags[72:80] = (4096).to_bytes(8, "little")
    for name, value in changes.items():
        setattr(o, name, value)
    return bytes(o)


@contextmanager
def greeted(gang: Gang, path: Path) -> Iterator[tuple[Driver, socket.socket]]:
    """Rank 1 receives; the test is rank 0, greeted, and has its offer."""
    found: list[socket.socket] = []

    def connected() -> bool:
        try:
            found.append(dial(gang.ports[1]))
        except OSError:
            return False
        return True

    ways = {"HOTSTAGE_ENGINE_CHANNELS": "ipc,tcp"}
    with drive(gang, path, 1, "R0.0", mode="device", **ways) as one:
        until(connected, "a listener")
        with found[0] as s:
            assert greet_receiver(s, gang, 0)
            theirs = wire.Offer.from_buffer_copy(exactly(s, ctypes.sizeof(wire.Offer)))
            assert (bytes(theirs.magic), theirs.rank, theirs.bytes) == (wire.OFFER_MAGIC, 1, gang.channels[0][2])
            yield one, s


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bytes": 999}, "its messages have 999 bytes, this rank's 3000"),
        ({"channel": 1}, "its offer is rank 0's for channel 1"),
        ({"rank": 7}, "its offer is rank 7's for channel 0"),
        ({"version": 9}, "it sent no offer of a way"),
        ({"flag": 4090}, "its flag lies outside of what it shares"),
        ({"boot": b"x" * 40}, "its offer has a text without an end"),
    ],
)
def test_an_offer_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    gang = pair(channels=((0, 1, 3000),))
    with greeted(gang, tmp_path) as (one, s):
        s.sendall(offer(gang, **changes))
        assert one.wait() == 75
        assert f"1 LOST create rank 0 and this one do not agree on channel 0: {words}" in told(one)


def test_memory_that_is_not_there_goes_through_the_host(tmp_path: Path) -> None:
    gang = pair(channels=((0, 1, 3000),))
    with greeted(gang, tmp_path) as (one, s):
        s.sendall(offer(gang))
        answer = wire.Answer.from_buffer_copy(exactly(s, ctypes.sizeof(wire.Answer)))
        assert (answer.way, answer.can) == (wire.WAYS["ipc"], 0)
        assert b"does not reach its peer's memory" in answer.why
        s.sendall(bytes(wire.Answer(wire.ANSWER_MAGIC, 0, wire.WAYS["nccl"], 1)))
        assert one.wait() == 75
        assert "rank 0 answered for channel 0 and the way nccl, not for channel 0 and ipc" in told(one)
