"""Runs the real engine for tests: a plan, its ranks as processes on loopback, no agent; what they print and dump, back.

Owns the attempt file, the ranks' life (none survives a call, also when it fails) and the way from Hugging Face weights
to the engine's files and back. Judges nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.agent.attempt_file import amendment_bytes
from checkpoint.amendments import NONE, Amendments
from trainer import models, wire
from trainer.dataset import DatasetRef, token_bytes_for, write_shard
from trainer.engine_path import engine_binary
from trainer.models.base import hf_table
from trainer.plan.compiled import Plan
from trainer.spec import ModelSpec
from trainer.wire.plan import piece_elements

DEADLINE_S = 120.0

F32 = NDArray[np.float32]


# --- weights ------------------------------------------------------------------------------------------------


def from_hf(model: ModelSpec, hf: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Our tensors, by name, from Hugging Face's, through the family's mapping; every HF tensor is used exactly once."""
    parts: dict[str, list[tuple[int, NDArray[Any]]]] = {}
    used = set()
    for entry in hf_table(models.family(model.family), model):
        value = hf[entry.name]
        assert value.shape == entry.shape, f"{entry.name}: {value.shape} is not {entry.shape}"
        parts.setdefault(entry.tensor, []).append((entry.first, value.T if entry.transpose else value))
        used.add(entry.name)
    assert used == set(hf), f"not mapped: {sorted(set(hf) ^ used)}"
    return {
        name: np.concatenate([value for _, value in sorted(found, key=lambda f: f[0])]) for name, found in parts.items()
    }


def to_hf(model: ModelSpec, ours: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The way back."""
    out: dict[str, NDArray[Any]] = {}
    for entry in hf_table(models.family(model.family), model):
        part = ours[entry.tensor][entry.first : entry.first + entry.rows]
        out[entry.name] = part.T if entry.transpose else part
    return out


def weights_file(plan: Plan, tensors: Mapping[str, NDArray[Any]], path: Path) -> Path:
    """f32 of every tensor in the table's order, each at the next multiple of 64 bytes (``run/weights.h``)."""
    with path.open("wb") as file:
        for tensor in plan.tensors:
            file.write(b"\0" * (-file.tell() % 64))
            file.write(np.ascontiguousarray(tensors[tensor.name], "<f4").tobytes())
    return path


def read_dump(plan: Plan, folder: Path, step: int, what: str) -> dict[str, F32]:
    """All tensors of a step's dump (``what``: grads or weights), joined over positions and pieces. What every replica
    has is the same in each."""
    parts: dict[str, list[F32]] = {}
    for rank in plan.ranks.all:
        flat, at = np.fromfile(folder / f"{step}-{rank}.{what}", "<f4"), 0
        replica = plan.ranks.replica(rank)
        for state in plan.positions[plan.ranks.position(rank)].states:
            tensor = plan.tensors[state.tensor]
            count = tensor.elements
            if state.pieces > 1:
                size = piece_elements(count, state.pieces)
                count = max(0, min(size, count - replica * size))
            part, at = flat[at : at + count], at + count
            if state.pieces > 1 or replica == 0:
                parts.setdefault(tensor.name, []).append(part)
            else:
                np.testing.assert_array_equal(part, parts[tensor.name][0], f"{tensor.name}, replica {replica}")
        assert at == flat.size
    return {tensor.name: np.concatenate(parts[tensor.name]).reshape(tensor.shape) for tensor in plan.tensors}


# --- data ---------------------------------------------------------------------------------------------------


def bits_tree(
    name: str, model: dict[str, Any], precision: str, steps: int, sequence: int, parallel: dict[str, Any]
) -> dict[str, Any]:
    """The spec of a small run whose bits are compared: every part of a step, in few steps."""
    return {
        "name": name,
        "model": model,
        "data": {"block": 2, "window": 3},
        "train": {
            "steps": steps,
            "batch": 6,
            "microbatch": 1,
            "sequence": sequence,
            "precision": precision,
            "seed": 11,
            "classifier_chunk": 8,
            "optimizer": {"lr": 3e-3, "clip": 0.5},
            "schedule": {"kind": "cosine", "warmup": 2},
        },
        "parallel": parallel,
        "checkpoint": {"every": 0},
    }


def dumped(gang: Gang, folder: Path) -> dict[str, Any]:
    """Losses and norms, and of what the ranks dumped, gradients and weights of every step."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".grads", ".weights")}
    return {"losses": gang.losses, "norms": gang.norms} | files


def shows(state: Callable[[], dict[str, Any]], sound: dict[str, Any]) -> bool:
    """Whether a planted fault does: other numbers, or a rank that ends with a word."""
    try:
        return state() != sound
    except AssertionError as ended:
        said = str(ended)
    assert "last words" in said
    return True


def write_samples(
    folder: Path, samples: NDArray[np.int64], vocab: int, counts: NDArray[np.bool_] | None = None
) -> DatasetRef:
    """One shard a sample of T+1 tokens, so that the order of the shards is the order of the samples. ``counts``: which
    tokens' prediction counts; None: without a mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        write_shard(folder / f"{number:05d}.bin", sample, vocab, None if counts is None else counts[number])
    size, counted = token_bytes_for(vocab, counts is not None), None if counts is None else int(counts.sum())
    lengths = (samples.shape[1],) * len(samples)
    return DatasetRef("0" * 64, vocab, size, lengths, "0" * 64, counted=counted)


# --- processes ----------------------------------------------------------------------------------------------


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def attempt_bytes(
    plan: Plan,
    ports: Sequence[int],
    data: Path,
    work: Path,
    *,
    kernel_path: str = "auto",
    trace: int = 0,
    device: str = "cpu",
    devices: Sequence[int] = (),
    start_step: int = -1,
    amended: Amendments = NONE,
) -> bytes:
    """A start of all ranks on this machine, by default a fresh one. ``devices``: the index of each rank's; all 0 where
    left out.
    """
    head = wire.Attempt(
        version=wire.ATTEMPT_VERSION,
        run=b"test",
        epoch=1,
        ranks=len(ports),
        kernel_path=wire.PATHS[kernel_path],
        start_step=start_step,
        stop_after=-1,
        connect_ms=30_000,
        stall_ms=60_000,
        commit_ms=30_000,
        trace=trace,
        device_kind=wire.DEVICES[device],
        total_steps=amended.steps,
        skips=len(amended.skip),
        rates=len(amended.rate),
        data_dir=str(data).encode(),
        work_dir=str(work).encode(),
    )
    head.magic[:] = wire.ATTEMPT_MAGIC
    head.plan_digest[:] = bytes.fromhex(plan.digest)
    head.key[:] = secrets.token_bytes(32)
    head.nonce[:] = secrets.token_bytes(16)
    indices = devices or [0] * len(ports)
    ranks = b"".join(
        bytes(wire.AttemptRank(host=b"127.0.0.1", port=port, node=0, device=index))
        for port, index in zip(ports, indices, strict=True)
    )
    rest = ranks + amendment_bytes(amended)
    checked = wire.Attempt.run.offset
    head.crc = _crc32c(bytes(head)[checked:] + rest)
    assert ctypes.sizeof(head) + len(rest) == len(bytes(head) + rest)
    return bytes(head) + rest


@dataclass(frozen=True)
class Gang:
    """What a run left: its step events by step (from position 0's stdout) and the folder of its dumps and traces.
    ``took_s``: from before the first process until rank 0 said that all its steps are done.
    """

    plan: Plan
    steps: list[dict[str, Any]]
    folder: Path
    took_s: float

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.steps]

    @property
    def norms(self) -> list[float]:
        return [event["grad_norm"] for event in self.steps]

    def grads(self, step: int) -> dict[str, F32]:
        """Before clipping, by our names; step from 1."""
        return read_dump(self.plan, self.folder, step, "grads")

    def weights(self, step: int) -> dict[str, F32]:
        return read_dump(self.plan, self.folder, step, "weights")


def train(
    plan: Plan,
    data: Path,
    folder: Path,
    *,
    weights: Path | None = None,
    kernel_path: str = "auto",
    dump: bool = True,
    trace: int = 0,
    engine: Path | None = None,
    device: str = "cpu",
    devices: Sequence[int] = (),
    prefix: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
    amended: Amendments = NONE,
) -> Gang:
    """All steps of ``plan``, a process a rank; fails the test with the ranks' words where one does not end with 0.
    ``prefix``: a command that each rank runs under.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_path, attempt_path = folder / "plan", folder / "attempt"
    plan_path.write_bytes(plan.to_bytes())
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in plan.ranks.all]
    ports = [listener.getsockname()[1] for listener in listeners]
    attempt_path.write_bytes(
        attempt_bytes(
            plan,
            ports,
            data,
            folder,
            kernel_path=kernel_path,
            trace=trace,
            device=device,
            devices=devices,
            amended=amended,
        )
    )
    arenas = [os.memfd_create("hotstage-arena") for _ in plan.ranks.all]  # as the supervisor does
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [(folder / f"stdout-{rank}", folder / f"stderr-{rank}") for rank in range(len(ports))]
    began = time.time()
    try:
        for rank, listener in enumerate(listeners):
            command = [*prefix, str(engine or engine_binary()), "rank"]
            command += ["--plan", str(plan_path), "--attempt", str(attempt_path)]
            command += ["--rank", str(rank), "--agent", "-", "--listen-fd", str(listener.fileno())]
            command += ["--arena-fd", str(arenas[rank])]
            command += ["--dump", str(folder)] if dump else []
            command += ["--weights", str(weights)] if weights is not None else []
            with outputs[rank][0].open("wb") as out, outputs[rank][1].open("wb") as err:
                fds = [listener.fileno(), arenas[rank]]
                processes.append(subprocess.Popen(command, stdout=out, stderr=err, pass_fds=fds))
        codes = [process.wait(deadline_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for listener, arena in zip(listeners, arenas, strict=True):
            listener.close()
            os.close(arena)
    if any(codes):
        words = "\n".join(
            f"rank {rank}: exit {codes[rank]}\n{outputs[rank][1].read_text()}" for rank in range(len(ports))
        )
        raise AssertionError(f"the gang did not end well\n{words}")
    events = [json.loads(line) for line in outputs[0][0].read_text().splitlines()]
    took_s = events[-1]["time"] - began
    return Gang(plan, [event for event in events if event["event"] == "step"], folder, took_s)


def infer(
    plan: Plan,
    weights: Path,
    tokens: NDArray[np.int64],
    folder: Path,
    engine: Path | None = None,
    device: str = "cpu",
    targets: NDArray[np.int64] | None = None,
) -> F32:
    """Logits [n, microbatch, T, V] of requests ``tokens`` [n, microbatch, T]; with ``targets``, of a plan for that,
    losses [n, microbatch, T].
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_path = folder / "plan-infer"
    plan_path.write_bytes(plan.to_bytes())
    command = [str(engine or engine_binary()), "infer", "--plan", str(plan_path), "--weights", str(weights)]
    done = subprocess.run(
        [*command, "--device-kind", str(wire.DEVICES[device])],
        input=(tokens if targets is None else np.stack([tokens, targets], axis=1)).astype("<i4").tobytes(),
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = np.frombuffer(done.stdout, "<f4")
    return found.reshape(tokens.shape if targets is not None else (*tokens.shape, plan.config.vocab))
