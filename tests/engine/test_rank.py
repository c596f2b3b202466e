"""A rank as a process: its lines, traces and exits. Real plans, real TCP on loopback, no agent."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.amendments import NONE, Amendments
from tests.e2e import engine_runs
from tests.engine.engine_build import build_preload, engine
from tests.engine.plans import GPT2, LLAMA, SEQUENCE, small_plan
from trainer import wire
from trainer.plan.compiled import Plan

__all__ = ["engine"]

Change = Callable[[wire.Attempt], None]


def last_words(err: str) -> dict[str, Any]:
    """The last words in a rank's log."""
    line = json.loads(err.splitlines()[-1])
    assert line["event"] == "last words"
    words: dict[str, Any] = json.loads(line["words"])
    return words


class Gang:
    """Ranks of a plan as processes; none survives the test."""

    def __init__(self, engine: Path, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.processes: list[subprocess.Popen[str]] = []
        self.sockets: list[socket.socket] = []

    def prepare(
        self, plan: Plan, change: Change | None = None, ports: list[int] | None = None, amended: Amendments = NONE
    ) -> None:
        """Writes plan and attempt; ``change`` edits the attempt."""
        if ports is None:
            self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in plan.positions]
            ports = [s.getsockname()[1] for s in self.sockets]
        (self.folder / "plan").write_bytes(plan.to_bytes())
        data = engine_runs.attempt_bytes(plan, ports, self.folder / "data", self.folder, amended=amended)
        if change:
            head, rest = wire.Attempt.from_buffer_copy(data), data[ctypes.sizeof(wire.Attempt) :]
            change(head)
            head.crc = engine_runs._crc32c(bytes(head)[wire.Attempt.run.offset :] + rest)
            data = bytes(head) + rest
        (self.folder / "attempt").write_bytes(data)

    def start(
        self, rank: int = 0, *more: str, env: dict[str, str] | None = None, fds: Sequence[int] = ()
    ) -> subprocess.Popen[str]:
        command = [str(self.engine), "rank", "--plan", str(self.folder / "plan"), "--rank", str(rank), "--agent", "-"]
        command += ["--attempt", str(self.folder / "attempt"), *more]
        if self.sockets:
            command += ["--listen-fd", str(self.sockets[rank].fileno())]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
            pass_fds=[*fds, *([self.sockets[rank].fileno()] if self.sockets else [])],
        )
        self.processes.append(process)
        return process

    def run(
        self, rank: int = 0, *more: str, env: dict[str, str] | None = None, fds: Sequence[int] = ()
    ) -> tuple[int, list[dict[str, Any]], str]:
        """One rank to its end: code, the lines of its standard output, its standard error."""
        process = self.start(rank, *more, env=env, fds=fds)
        out, err = process.communicate(timeout=60)
        return process.returncode, [json.loads(line) for line in out.splitlines()], err

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for one in self.sockets:
            one.close()


@pytest.fixture
def gang(engine: Path, tmp_path: Path) -> Iterator[Gang]:
    made = Gang(engine, tmp_path)
    yield made
    made.close()


def test_lines_of_a_run(gang: Gang, tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    gang.prepare(plan)
    code, lines, err = gang.run()
    assert code == 0, err
    assert [line["event"] for line in lines] == ["start", "step", "step", "step", "end"]
    start, first, end = lines[0], lines[1], lines[-1]
    assert start["start_step"] == 0
    assert start["threads"] == 1
    assert start["arena_bytes"] == plan.positions[0].arena_bytes
    assert start["kernel_path"] in ("portable", "avx2", "avx512", "avx512_bf16")
    assert (first["step"], first["tokens"], first["snapshot"], first["skipped"]) == (1, 4 * SEQUENCE, 0, 0)
    assert set(first["us"]) == {"F", "B", "opt", "send", "recv", "data", "snapshot"}
    assert sum(first["us"].values()) <= first["step_us"]
    assert first["rss_bytes"] > 0
    assert 3.0 < first["loss"] < 4.0  # log 30 = 3.4
    assert (end["code"], end["step"]) == (0, 3)
    assert all((line["run"], line["epoch"], line["rank"]) == ("test", 1, 0) for line in lines)
    assert all(line["time"] > 1.7e9 for line in lines)


def test_stop_after_leaves_early_with_done(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path), lambda a: setattr(a, "stop_after", 2))
    code, lines, _ = gang.run()
    assert code == 0
    assert lines[-1]["step"] == 2


def test_learning_rates_follow_the_schedule(gang: Gang, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-2, "min_lr": 1e-3}
    expected = {
        "constant": [5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2],
        "cosine": [5e-3, 1e-2, *(1e-3 + 9e-3 * (1 + np.cos(np.pi * x / 4)) / 2 for x in (1, 2, 3, 4))],
        "wsd": [5e-3, 1e-2, 1e-2, 1e-2, 5.5e-3, 1e-3],
    }
    for kind, start in [*((kind, 0) for kind in expected), ("cosine", 3), ("wsd", 3)]:
        schedule = {"kind": kind, "warmup": 2, "decay": 2 if kind == "wsd" else 0, "start": start}
        rates = [5e-3] * start + expected[kind]  # nothing trains before the start of its schedule
        gang.prepare(small_plan(tmp_path, steps=start + 6, optimizer=optimizer, schedule=schedule), ports=[0])
        for one in gang.sockets:
            one.close()
        gang.sockets = []
        code, lines, err = gang.run()
        assert code == 0, err
        assert [line["lr"] for line in lines[1:-1]] == pytest.approx(rates, rel=1e-12)


BOTH = pytest.mark.parametrize(
    "parallel", [{"optimizer": "checked"}, {"optimizer": "optimistic"}], ids=lambda p: p["optimizer"]
)


@BOTH
def test_a_trace_holds_every_instruction_of_the_last_steps_and_every_call(
    gang: Gang, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    plan = small_plan(tmp_path, stages=2, steps=10, parallel=parallel, optimizer={"clip": 0.0})
    gang.prepare(plan, lambda a: setattr(a, "trace", wire.TRACE_CALLS))
    processes = [gang.start(rank) for rank in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    for rank in range(2):
        both = json.loads((tmp_path / f"trace-{rank}.json").read_text())["traceEvents"]
        events = [e for e in both if "call" not in e["args"]]
        assert {e["args"]["step"] for e in events} >= set(range(4, 11))
        names = [e["name"] for e in events if e["args"]["step"] == 10 and "wait" not in e["args"]]
        position = plan.positions[rank]
        assert len(names) == len(position.step)
        waited = {e["name"] for e in events if "wait" in e["args"]}
        assert all(name.startswith((f"{rank}RECV_", f"{rank}SEND_")) for name in waited)
        assert {f"{rank}F0", f"{rank}F1", f"{rank}B0", f"{rank}B1", "adamw", "data"} <= set(names)
        assert all(e["ph"] == "X" and e["pid"] == rank and e["dur"] >= 0 for e in both)
        ends = [e["ts"] + e["dur"] for e in events]
        assert all(a <= b["ts"] + 0.01 for a, b in zip(ends, events[1:], strict=False))
        made = [e["name"] for e in both if e["args"]["step"] == 10 and "call" in e["args"]]
        run = [position.programs[action.program].calls for action in position.step if action.program is not None]
        assert sorted(made) == sorted(call.kernel for calls in run for call in calls)


@BOTH
def test_sigterm_to_one_rank_stops_all_after_the_same_step(
    gang: Gang, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    gang.prepare(small_plan(tmp_path, stages=2, steps=1_000_000, parallel=parallel))
    ranks = [gang.start(rank) for rank in range(2)]
    assert ranks[0].stdout
    while '"step":3,' not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[1].send_signal(signal.SIGTERM)
    ended = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [85, 85]
    last = json.loads(ended[0][0].splitlines()[-1])
    assert last["code"] == 85
    words = [last_words(err) for _, err in ended]
    assert {w["step"] for w in words} == {last["step"]}


def test_a_lost_peer_is_named(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path, stages=2, steps=1_000_000))
    ranks = [gang.start(rank) for rank in range(2)]
    assert ranks[0].stdout
    while '"step":2,' not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 75
    words = last_words(err)
    assert words["status"] == "LOST"
    assert words["step"] >= 2


def test_a_peer_that_stops_moving_is_a_stall_with_a_name(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path, stages=2, steps=1_000_000), lambda a: setattr(a, "stall_ms", 700))
    ranks = [gang.start(rank) for rank in range(2)]
    assert ranks[0].stdout
    while '"step":2,' not in ranks[0].stdout.readline():
        assert ranks[0].poll() is None
    ranks[1].send_signal(signal.SIGSTOP)
    _, err = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 86
    words = last_words(err)
    assert words["status"] == "STALLED"
    assert words["peer"] == 1
    assert words["action"].startswith(("0RECV_", "0SEND_"))
    assert words["waited_us"] >= 700_000


@BOTH
def test_diverged_numbers_end_every_rank_before_they_are_applied(
    gang: Gang, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    plan = small_plan(tmp_path, stages=2, parallel=parallel)
    gang.prepare(plan)
    ones = {t.name: np.ones(t.shape, np.float32) for t in plan.tensors}
    first = plan.tensors[0].name
    ones[first] = np.full(plan.tensors[0].shape, np.nan, np.float32)
    weights = engine_runs.weights_file(plan, ones, tmp_path / "weights")
    ranks = [gang.start(rank, "--weights", str(weights)) for rank in range(2)]
    ended = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [87, 87]
    for _, err in ended:
        assert "nothing of this step was applied" in err
        assert last_words(err)["step"] == 1
    assert '"event":"step"' not in ended[0][0]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_nothing_allocates_after_start_up(gang: Gang, tmp_path: Path, stages: int, model: dict[str, Any]) -> None:
    optimizer = "optimistic" if model == LLAMA else "checked"
    gang.prepare(small_plan(tmp_path, stages=stages, model=model, steps=5, parallel={"optimizer": optimizer}))
    env = {"LD_PRELOAD": str(build_preload()), "HS_ALLOC_FORBID": "1"}
    others = [gang.start(rank) for rank in range(1, stages)]
    code, lines, err = gang.run(0, env=env)
    assert code == 0, err
    assert lines[-1]["event"] == "end"
    assert [other.wait(60) for other in others] == [0] * (stages - 1)


def test_every_failed_allocation_is_a_refusal(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path), ports=[0])
    preload = str(build_preload())
    for number in range(200):
        code, _, err = gang.run(0, env={"LD_PRELOAD": preload, "HS_ALLOC_FAIL": str(number)})
        if code == 0:
            break
        assert code in (70, 78), (number, code, err)
        assert "memory" in err or "start" in err, (number, err)
    else:
        pytest.fail("a rank makes more than 200 allocations")
    assert number > 10


def test_memory_beyond_the_limit_on_files_is_refused(gang: Gang, tmp_path: Path) -> None:
    """The supervisor's memfd is a file: the signal that a limit sends by itself ended a rank without a word."""
    gang.prepare(small_plan(tmp_path), ports=[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with os.fdopen(os.memfd_create("arena"), "wb") as arena:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            code, _, err = gang.run(0, "--arena-fd", str(arena.fileno()), fds=[arena.fileno()])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 78, err
    assert "bytes long: File too large; raise the limit on files (ulimit -f unlimited)" in last_words(err)["why"]


def test_a_port_in_use_is_refused(gang: Gang, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gang.prepare(small_plan(tmp_path, stages=2), ports=[port, port])
        code, _, err = gang.run(0)
    assert code == 78
    assert str(port) in err
    assert "in use" in err


def test_a_peer_that_never_comes_passes_the_deadline(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path, stages=2), lambda a: setattr(a, "connect_ms", 300))
    code, _, err = gang.run(0)
    assert code in (75, 86), err
    assert "1" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: setattr(a, "ranks", 1), "1 ranks, 0 skips and 0 rates do not go with"),
        (lambda a: setattr(a, "skips", 3), "3 skips and 0 rates do not go with"),
        (lambda a: a.magic.__setitem__(0, 0), "is not an attempt file"),
        (lambda a: setattr(a, "version", 1), "is of version 1, this engine reads version 4"),
        (lambda a: setattr(a, "device_kind", 3), "no device of kind 3 (1 is the CPU, 2 is CUDA)"),
        (lambda a: setattr(a, "run", b""), "does not end"),
        (lambda a: setattr(a, "stall_ms", 0), "deadline of 0 ms"),
        (lambda a: setattr(a, "start_step", 99), "starts after step 99, the run ends at 3"),
        (lambda a: setattr(a, "start_step", 2), "without an agent there are no slots"),
        (lambda a: a.plan_digest.__setitem__(0, a.plan_digest[0] ^ 1), "is not the one that attempt"),
        (lambda a: setattr(a, "kernel_path", 9), "there is no kernel path 9"),
        (lambda a: setattr(a, "kernel_path", wire.PATHS["cuda"]), "kernel path cuda runs on CUDA devices"),
    ],
)
def test_bad_attempts_are_refused(gang: Gang, tmp_path: Path, change: Change, words: str) -> None:
    gang.prepare(small_plan(tmp_path, stages=2), change)
    code, _, err = gang.run(0)
    assert code == 78, err
    assert words in err


def test_an_attempt_for_a_device_that_is_not_here_is_refused(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path), lambda a: setattr(a, "device_kind", wire.DEVICES["cuda"]))
    code, _, err = gang.run(0, env={"HOTSTAGE_CUDA": "/nowhere/libhs_cuda.so"})
    assert code == 78, err
    assert "/nowhere/libhs_cuda.so" in err
    gang.prepare(small_plan(tmp_path))
    ranks = bytearray((tmp_path / "attempt").read_bytes())
    last = wire.AttemptRank.from_buffer(ranks, len(ranks) - ctypes.sizeof(wire.AttemptRank))
    last.device = 3
    head = wire.Attempt.from_buffer(ranks)
    head.crc = engine_runs._crc32c(bytes(ranks[wire.Attempt.run.offset :]))
    (tmp_path / "attempt").write_bytes(ranks)
    code, _, err = gang.run(0)
    assert code == 78, err
    assert "there is no device 3" in err


def test_a_flipped_attempt_is_refused(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path))
    data = bytearray((tmp_path / "attempt").read_bytes())
    data[200] ^= 1
    (tmp_path / "attempt").write_bytes(data)
    code, _, err = gang.run()
    assert code == 78
    assert "checksum" in err


def test_weights_of_another_size_are_refused(gang: Gang, tmp_path: Path) -> None:
    gang.prepare(small_plan(tmp_path))
    (tmp_path / "weights").write_bytes(bytes(100))
    code, _, err = gang.run(0, "--weights", str(tmp_path / "weights"))
    assert code == 78
    assert "have 100 bytes, this model's take" in err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["rank"],
        ["rank", "--plan"],
        ["rank", "--wings", "2"],
        ["rank", "--plan", "p", "--attempt", "a", "--rank", "-1", "--agent", "-"],
        ["check-plan"],
        ["infer", "--plan", "x"],
    ],
)
def test_a_wrong_command_line_is_usage(engine: Path, command: list[str]) -> None:
    done = subprocess.run([engine, *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert done.stderr
