"""A run in a store and the real agent process, for tests: a compiled plan, its dataset, attempt records, and the
engine's side of the socket in Python where a test must stand between two messages.

Owns the processes that it starts (killed by pid, also when the test fails). Judges nothing.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import hashlib
import hmac
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from checkpoint import codec, keys
from checkpoint.agent.crc32c import crc32c
from checkpoint.errors import Conflict
from checkpoint.layout import PlanLayout, read_plan
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store, open_store
from tests.support.wait import wait_for
from trainer import wire
from trainer.dataset import DatasetRef, write_shard
from trainer.plan import compile_plan
from trainer.spec import RunSpec, how_map, parse_spec, what_bytes, what_digest

ROOT = Path(__file__).resolve().parents[2]


def tiny_spec(**changes: Any) -> RunSpec:
    """A two-layer GPT-2 that a rank steps in a millisecond; ``changes`` are ``--set`` overrides with dots as ``__``."""
    value: dict[str, Any] = {
        "name": "tiny",
        "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 2, "context": 32},
        "train": {"steps": 12, "batch": 4, "microbatch": 2, "sequence": 16, "seed": 7},
        "checkpoint": {"every": 2, "slots": 3},
        "launch": {"connect_s": 60.0, "stall_s": 60.0},
    }
    return parse_spec(value, [f"{name.replace('__', '.')}={json.dumps(v)}" for name, v in changes.items()])


def put_dataset(store: Store) -> DatasetRef:
    """One shard of counting tokens, as ``flows`` would have prepared it."""
    tokens = (np.arange(4001, dtype=np.int64) * 7 % 61).astype(np.uint16)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"shard-{os.getpid()}.bin"
    try:
        write_shard(path, tokens, 61)
        shard = path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
    manifest = codec.pack(
        {
            "v": 1,
            "vocab": 61,
            "token_bytes": 2,
            "eot": None,
            "shards": [{"tokens": len(tokens), "bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}],
            "tokenizer_sha256": "0" * 64,
        }
    )
    digest = hashlib.sha256(manifest).hexdigest()
    store.create(f"data/{digest}/manifest", manifest)
    store.create(f"data/{digest}/00000.bin", shard)
    return DatasetRef(digest, 61, 2, (len(tokens),), "0" * 64)


@dataclass
class Run:
    """A run in a store, with the driver's pen."""

    store: Store
    name: str
    launch: str = "launch-1"
    log: RunLog = field(init=False)
    state: RunState = field(init=False)
    layouts: dict[str, PlanLayout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = RunLog(self.store, self.name, writer="test")
        self.state = self.log.fold()

    def add_plan(self, spec: RunSpec, dataset: DatasetRef) -> str:
        """Compile and store a plan; its digest."""
        plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset))
        data = plan.to_bytes()
        self.store.create(keys.spec_key(self.name), what_bytes(spec, dataset))
        self.store.create(keys.plan_key(self.name, plan.digest), data)
        self.layouts[plan.digest] = read_plan(data)
        return plan.digest

    def attempt(
        self,
        spec: RunSpec,
        plan: str,
        *,
        checkpoint: int | None = None,
        step: int = 0,
        slots: Mapping[str, int] | None = None,
        launch: str | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> int:
        """Append an attempt record; its epoch."""
        layout = self.layouts[plan]
        body = {
            "launch": launch or self.launch,
            "nodes": spec.launch.nodes,
            "ranks": layout.ranks,
            "how": how or how_map(spec),
            "plan": plan,
            "what": layout.what_digest.hex(),
            "restore": {"checkpoint": checkpoint, "step": step, "slots": slots},
            "reason": "a test",
            "cause": None,
        }
        self.state = self._append(body)
        return self.state.epoch

    def _append(self, body: Mapping[str, Any]) -> RunState:
        while True:
            try:
                return self.log.append("attempt", body, self.fold())
            except Conflict:
                continue

    def fold(self) -> RunState:
        self.state = self.log.fold(self.state)
        return self.state

    def status(self, node: int = 0, launch: str | None = None) -> dict[str, Any] | None:
        """The node's live hint."""
        key = keys.run_key(self.name, "live", "nodes", launch or self.launch, str(node))
        if self.store.head(key) is None:
            return None
        found: dict[str, Any] = msgpack.unpackb(self.store.get(key))
        return found


def make_run(tmp_path: Path, spec: RunSpec, url: str | None = None) -> tuple[Run, str]:
    """A run in a folder (or at ``url``) and the digest of its plan."""
    return make_run_in(open_store(url or (tmp_path / "store").as_uri()), spec)


def make_run_in(store: Store, spec: RunSpec) -> tuple[Run, str]:
    """A run in this store and the digest of its plan."""
    dataset = put_dataset(store)
    run = Run(store, f"{spec.name}-{what_digest(spec, dataset).hex()[:6]}")
    return run, run.add_plan(spec, dataset)


# --- the agent --------------------------------------------------------------------------------------------


@dataclass
class AgentProcess:
    """A running agent of a node; ``work`` is its folder, which outlives it."""

    process: subprocess.Popen[bytes]
    work: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return (self.work / "agent.log").read_text()


@contextlib.contextmanager
def agent(
    run: Run,
    folder: Path,
    node: int = 0,
    nodes: int = 1,
    launch: str | None = None,
    env: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
) -> Iterator[AgentProcess]:
    """The real agent for a node, with its folder under ``folder``; killed at the end where it still runs.

    ``more``: further arguments.
    """
    work = folder / f"node{node}"
    work.mkdir(parents=True, exist_ok=True)
    key = folder / "launch.key"
    if not key.exists():
        key.write_bytes(b"k" * 32)
    with open(work / "agent.log", "ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "checkpoint.agent", "--store", run.store.url, "--run", run.name),
                *(
                    "--launch",
                    launch or run.launch,
                    "--node",
                    str(node),
                    "--nodes",
                    str(nodes),
                    "--socket",
                    "agent.sock",
                ),
                *("--work", str(work), "--key-file", str(key), *more),
            ],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdout=log,
            stderr=log,
        )
    try:
        yield AgentProcess(process, work)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


# --- the engine's side of the socket ----------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """A message from the agent."""

    name: str
    rank: int
    epoch: int
    a: int
    b: int
    payload: bytes
    fds: tuple[int, ...]


class Connection:
    """One end of the agent's socket, as a supervisor or a rank speaks it."""

    def __init__(self, work: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            wait_for(lambda: self._connect(here), "the agent's socket")
        finally:
            os.close(here)

    def _connect(self, here: int) -> bool:
        try:
            self.sock.connect(f"/proc/self/fd/{here}/agent.sock")  # short, however deep the test's folder is
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def send(
        self,
        name: str,
        *,
        rank: int = -1,
        epoch: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        head = wire.Msg(wire.MSG_MAGIC, wire.MSGS[name], rank, len(payload), epoch, a, b, c)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([bytes(head) + payload], rights)

    def receive(self, name: str, seconds: float = 60.0) -> Got:
        """The next message, which must be of this name."""
        got = self.next(seconds)
        assert got is not None, f"the agent closed the connection instead of sending {name}"
        assert got.name == name, f"{got} instead of {name}"
        return got

    def next(self, seconds: float = 60.0) -> Got | None:
        self.sock.settimeout(seconds)
        try:
            data, ancillary, _, _ = self.sock.recvmsg(wire.MSG_MAX, socket.CMSG_SPACE(64))
        except ConnectionResetError:
            return None
        if not data:
            return None
        head = wire.Msg.from_buffer_copy(data)
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        names = {number: text for text, number in wire.MSGS.items()}
        return Got(names[head.type], head.rank, head.epoch, head.a, head.b, data[ctypes.sizeof(wire.Msg) :], tuple(fds))

    def close(self) -> None:
        self.sock.close()


class RankPeer:
    """A rank's side: its slots, filled as ``snapshot/snapshot.c`` fills them."""

    def __init__(self, work: Path, rank: int, epoch: int, fds: tuple[int, ...] = ()) -> None:
        self.rank, self.epoch = rank, epoch
        self.link = Connection(work)
        self.fds: tuple[int, ...] = fds
        self.link.send("HELLO", rank=rank, epoch=epoch, a=os.getpid(), fds=fds)
        self.restore = -1
        if not fds:
            slots = self.link.receive("SLOTS")
            self.fds, self.restore = slots.fds, slots.b
            assert slots.a == len(slots.fds)
        self.maps = [mmap.mmap(fd, os.fstat(fd).st_size) for fd in self.fds]

    def header(self, index: int) -> wire.SlotHeader:
        return wire.SlotHeader.from_buffer_copy(self.maps[index])

    def data(self, index: int) -> bytes:
        h = self.header(index)
        return self.maps[index][h.data_offset : h.data_offset + h.data_bytes]

    def free(self) -> int:
        """A slot that the rank may fill: empty, or ready but not its newest, and not held."""
        heads = [self.header(i) for i in range(len(self.maps))]
        newest = max((h.step for h in heads if h.state == wire.SLOT_READY), default=-1)
        for i, h in enumerate(heads):
            if not h.hold and (h.state == wire.SLOT_EMPTY or (h.state == wire.SLOT_READY and h.step != newest)):
                return i
        raise AssertionError("no slot is free")

    def fill(self, step: int, data: bytes, *, final: bool = False, index: int | None = None, tell: bool = True) -> int:
        """A snapshot: into the slot and READY, then the message."""
        index = self.free() if index is None else index
        m, h = self.maps[index], wire.SlotHeader.from_buffer(self.maps[index])
        try:
            assert not h.hold
            assert len(data) == h.data_bytes
            h.generation += 1
            h.state = wire.SLOT_FILLING
            m[h.data_offset : h.data_offset + h.data_bytes] = data
            sums = [zlib.crc32(data[at : at + wire.SLOT_CHUNK]) for at in range(0, len(data), wire.SLOT_CHUNK)]
            struct.pack_into(f"<{len(sums)}Q", m, wire.SLOT_HEADER_BYTES, *sums)
            h.step, h.epoch, h.final, h.persist = step, self.epoch, int(final), 1
            h.checksum_kind = wire.SUM_CRC32
            table = m[wire.SLOT_HEADER_BYTES : wire.SLOT_HEADER_BYTES + 8 * len(sums)]
            h.header_crc = zlib.crc32(m[24:136] + m[140:156] + table)
            h.state = wire.SLOT_READY
        finally:
            del h
        if tell:
            self.link.send("READY", rank=self.rank, epoch=self.epoch, a=index, b=step, c=int(final))
        return index

    def close(self, *, keep: bool = False) -> None:
        self.link.close()
        for m in self.maps:
            m.close()
        if not keep:
            for fd in self.fds:
                os.close(fd)


class NodePeer:
    """A supervisor's side and its ranks'."""

    def __init__(self, work: Path, epoch: int = 0, alive: int = 0) -> None:
        self.work = work
        self.link = Connection(work)
        self.link.send("HELLO", epoch=epoch, a=os.getpid(), b=alive)
        self.ranks: list[RankPeer] = []
        self.first = 0
        self.attempt: wire.Attempt | None = None
        self.plan: Path | None = None

    def start(self) -> list[RankPeer]:
        """PREPARE to SLOTS of every rank."""
        prepare = self.link.receive("PREPARE")
        count = wire.MsgPrepare.from_buffer_copy(prepare.payload).local_ranks
        self.link.send("PORTS", epoch=prepare.epoch, payload=struct.pack(f"<{count}H", *range(20001, 20001 + count)))
        start = self.link.receive("START")
        attempt_path, plan_path, _ = start.payload.split(b"\0")
        raw = Path(os.fsdecode(attempt_path)).read_bytes()
        self.attempt, self.plan = wire.Attempt.from_buffer_copy(raw), Path(os.fsdecode(plan_path))
        assert self.attempt.crc == crc32c(raw[16:])
        assert bytes(self.attempt.key) == hmac.new(b"k" * 32, struct.pack("<Q", start.epoch), hashlib.sha256).digest()
        self.first = start.a
        self.ranks = [RankPeer(self.work, rank, start.epoch) for rank in range(start.a, start.a + start.b)]
        return self.ranks

    def end(self, code: int = 0) -> None:
        """Every rank leaves with this code."""
        for r in self.ranks:
            r.close()
            self.link.send("EXIT", rank=r.rank, epoch=r.epoch, a=code, b=os.getpid())
        self.link.send("IDLE", epoch=self.ranks[0].epoch)
        self.ranks = []

    def close(self) -> None:
        """Once more does nothing."""
        for r in self.ranks:
            r.close()
        self.ranks = []
        self.link.close()


def state_bytes(layout: PlanLayout, rank: int, seed: int) -> bytes:
    """A state for this rank in which every element depends on its tensor's name, its place and the seed alone, not on
    the layout."""
    own = layout.rank(rank)
    data = bytearray(own.data_bytes)
    for s in own.states:
        for kind in range(s.kinds):
            tensor = layout.tensors[s.tensor]
            whole = memoryview(tensor_bytes(tensor.name, tensor.elements, kind, seed))
            at = s.kind_offset(kind)
            data[at : at + 4 * s.elements] = whole[4 * s.first : 4 * (s.first + s.elements)]
    return bytes(data)


@lru_cache(1000)
def tensor_bytes(name: str, elements: int, kind: int, seed: int) -> bytes:
    """Of a tensor of that state."""
    number = int.from_bytes(hashlib.sha256(f"{name}/{kind}/{seed}".encode()).digest()[:8], "little")
    return np.random.default_rng(number).standard_normal(elements).astype("<f4").tobytes()
