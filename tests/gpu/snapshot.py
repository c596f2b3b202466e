"""What a snapshot costs the steps around it: a rank with an agent's end of the socket and slots in memory, saving every
few steps. Blocked is what a step with a snapshot and the one after it take longer than the others, or what the engine
itself counts as waiting, whichever is more."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e import engine_runs
from tests.engine.agent_end import Agent, agent_at
from tests.gpu.workloads import plan_of, workload
from trainer import wire
from trainer.plan.compiled import Plan

EVERY, STEPS = 4, 14
WAIT_S = 120.0
SEALS = 0x1 | 0x2 | 0x4  # SEAL, SHRINK, GROW: as the agent makes slots


@contextmanager
def slots(count: int, size: int) -> Iterator[tuple[int, ...]]:
    """Memory files of this size."""
    fds = tuple(os.memfd_create(f"slot-{i}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for i in range(count))
    try:
        for fd in fds:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, 1033, SEALS)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def blocked_ms(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a run's step lines: the median step far from any snapshot, and what those beside one take more.

    >>> lines = [{"step": n, "step_us": 1000 + 500 * (n % 4 == 0), "us": {"snapshot": 9}} for n in range(1, 13)]
    >>> blocked_ms(lines)["blocks_ms"]
    0.5
    """
    settled = [e for e in events if int(e["step"]) > 2]
    near = [e for e in settled if int(e["step"]) % EVERY in (0, 1) and int(e["step"]) > EVERY]
    plain = [e for e in settled if int(e["step"]) % EVERY not in (0, 1)]
    usual = statistics.median(float(e["step_us"]) for e in plain)
    longer = max(0.0, max(float(e["step_us"]) for e in near if int(e["step"]) < len(events)) - usual)
    counted = max(float(e.get("us", {}).get("snapshot", 0)) for e in near)
    return {"blocks_ms": max(longer, counted) / 1e3, "longer_ms": longer / 1e3, "counted_ms": counted / 1e3,
            "step_ms": usual / 1e3}  # fmt: skip


@contextmanager
def rank_with_slots(
    plan: Plan,
    folder: Path,
    fds: Sequence[int],
    *,
    kernel_path: str,
    start: int = -1,
    stop: int = -1,
    dump: bool = False,
    algorithms: list[bytes] | None = None,
) -> Iterator[Agent]:
    """A rank from the slot 0 (after step ``start``; -1: from its beginning) to the end or to ``stop``, with its last
    snapshot in a slot; ``folder.parent / "data"`` holds the tokens. What it said is in the agent's messages.
    ``algorithms``: the run's choice (wire/algorithms.h), which the first rank makes.
    """
    data = engine_runs.attempt_bytes(plan, [0], folder.parent / "data", folder, kernel_path=kernel_path, device="cuda")
    head, rest = wire.Attempt.from_buffer_copy(data), data[ctypes.sizeof(wire.Attempt) :]
    head.start_step, head.stop_after = start, stop
    head.crc = engine_runs._crc32c(bytes(head)[wire.Attempt.run.offset :] + rest)
    (folder / "plan").write_bytes(plan.to_bytes())
    (folder / "attempt").write_bytes(bytes(head) + rest)
    command = [os.environ["HOTSTAGE_ENGINE"], "rank", "--plan", f"{folder}/plan", "--attempt", f"{folder}/attempt"]
    command += ["--rank", "0", "--agent", f"{folder}/agent", *(["--dump", str(folder)] if dump else [])]
    with agent_at(folder / "agent") as agent:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as rank:
            try:
                agent.hears("HELLO", 0)
                agent.tell("SLOTS", 0, a=len(fds), b=0 if start >= 0 else -1, fds=tuple(fds), epoch=1)
                agent.until(lambda: bool(agent.left or agent.of("ALGORITHMS") or agent.of("READY")), "a word", WAIT_S)
                if asked := agent.of("ALGORITHMS"):
                    choice = algorithms if algorithms is not None else []
                    choice.extend([asked[0].payload] if not choice else [])
                    agent.tell("ALGORITHMS", 0, payload=choice[0])
                agent.until(lambda: any(m.c for m in agent.of("READY")) or bool(agent.left), "the last slot", WAIT_S)
                if not agent.left:
                    agent.tell("COMMITTED", 0, a=stop if stop >= 0 else plan.config.steps)
                said = rank.communicate(timeout=60)[1]
            finally:
                rank.kill()
        if rank.returncode != 0:
            raise AssertionError(f"the rank ended with {rank.returncode}: {said[-1500:]}")
        yield agent


def measure(tiny: bool) -> dict[str, Any]:
    """The stage."""
    w = workload("llama-1b", tiny)
    with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        plan = plan_of(w, "bf16", STEPS, Path(scratch), every=EVERY)
        state = plan.positions[0].slot_bytes
        size = -(-(ctypes.sizeof(wire.SlotHeader) + state + (1 << 20)) // 4096) * 4096
        with slots(2, size) as fds, rank_with_slots(plan, folder, fds, kernel_path="cuda") as agent:
            events = [json.loads(m.payload) for m in agent.of("METRICS")]
            saved = [m.b for m in agent.of("READY")]
    found: dict[str, Any] = blocked_ms([e for e in events if e.get("event", "step") == "step"])
    found["bytes"] = state
    notes = [f"a state of {state / 1e9:.1f} GB, saved after steps {saved}: {found['blocks_ms']:.1f} ms"]
    return {"figures": found, "notes": notes}
