"""A gang of real ranks with real snapshot slots and nothing else of a node: what a rank keeps after a step, and a start
from that. The agent's end of the socket is a test's.

Owns the ranks and the slots; none survives a call. Judges nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from checkpoint import keys
from checkpoint.agent.gang import layouts
from checkpoint.agent.send import segments
from checkpoint.agent.slots import Slot, SlotTable
from checkpoint.chunks import Chunk, Tensor, chunk_pieces, plan_chunks
from checkpoint.layout import PlanLayout, read_plan
from checkpoint.log import CheckpointInfo
from checkpoint.manifest import PartManifest, checkpoint_body, merge
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from tests.e2e.engine_runs import attempt_bytes
from tests.engine.agent_end import agent_at
from trainer.engine_path import engine_binary
from trainer.plan.compiled import Plan

DEADLINE_S = 120.0
EPOCH = 1  # that attempt_bytes writes
Fill = Callable[[Mapping[int, Slot]], None]
"""Fills the slot of every rank that it begins from."""


def train(plan: Plan, data: Path, folder: Path, *, step: int = -1, fill: Fill | None = None) -> dict[int, list[bytes]]:
    """All steps of a plan after ``step``, a process a rank; by step what every rank's slot held then.

    Fails the test with the ranks' words where one does not end with 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout, ranks = read_plan(plan.to_bytes()), range(len(plan.ranks))
    table = SlotTable(layouts(layout, ranks), layout.digest, layout.what_digest, layout.slots)
    for rank in ranks:
        table.create(rank)
    try:
        if fill is not None:
            fill({rank: table.slots[rank][0] for rank in ranks})
        _run(plan, data, folder, table, step)
        found: dict[int, list[bytes]] = {}
        for rank in ranks:
            for seen in table.look(rank):
                if seen.ready and seen.step > step:
                    with table.slots[rank][seen.index].data() as view:
                        found.setdefault(seen.step, []).append(bytes(view))
        return found
    finally:
        assert table.close()


@contextmanager
def shortened(folder: Path) -> Iterator[Path]:
    """A name of the folder for sockets of this process, which may have only 107 bytes, however deep it lies."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{here}")
    finally:
        os.close(here)


def _run(plan: Plan, data: Path, folder: Path, table: SlotTable, step: int) -> None:
    plan_path, attempt_path, words = folder / "plan", folder / "attempt", folder / "words"
    plan_path.write_bytes(plan.to_bytes())
    ranks = range(len(plan.ranks))
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in ranks]
    ports = [listener.getsockname()[1] for listener in listeners]
    attempt_path.write_bytes(attempt_bytes(plan, ports, data, folder, start_step=step))
    processes: list[subprocess.Popen[bytes]] = []
    with shortened(folder) as here, agent_at(here / "agent") as agent, words.open("wb") as log:
        try:
            for rank, listener in enumerate(listeners):
                command = [str(engine_binary()), "rank", "--plan", str(plan_path), "--attempt", str(attempt_path)]
                command += ["--rank", str(rank), "--agent", "agent"]
                command += ["--listen-fd", str(listener.fileno())]
                processes.append(
                    subprocess.Popen(
                        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=log, pass_fds=[listener.fileno()]
                    )
                )
            end, heard = time.monotonic() + DEADLINE_S, 0
            while any(process.poll() is None for process in processes):
                assert time.monotonic() < end, f"the gang does not end\n{words.read_text()}"
                agent.pump()
                for message in agent.messages[heard:]:
                    if message.name == "HELLO":
                        fds = tuple(slot.fd for slot in table.slots[message.rank])
                        start = 0 if step >= 0 else -1
                        agent.tell("SLOTS", message.rank, epoch=EPOCH, a=len(fds), b=start, fds=fds)
                    elif message.name == "READY" and message.c:
                        agent.tell("COMMITTED", message.rank, epoch=EPOCH, a=message.b)
                heard = len(agent.messages)
            assert not any(process.returncode for process in processes), words.read_text()
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for listener in listeners:
                listener.close()


def store_state(
    store: Store, run: str, layout: PlanLayout, step: int, held: Sequence[bytes], incarnation: str
) -> CheckpointInfo:
    """A checkpoint of what every rank's slot held, as one node's agent would store it; its record."""
    saved = []
    for rank, data in enumerate(held):
        for plan in plan_chunks(segments(layout.rank(rank))):
            body = b"".join(data[s.source : s.source + s.bytes] for s in plan.segments)
            chunk = Chunk.of(keys.chunk_name(step, EPOCH, rank, incarnation, plan.index), body)
            assert store.create(keys.run_key(run, chunk.name), body, sha256=chunk.sha256)
            saved.append((chunk, chunk_pieces(plan, body)))
    part = PartManifest.build(
        run=run, step=step, epoch=EPOCH, samples=step * layout.batch, what=layout.what_digest, part=0, parts=1,
        tensors=[Tensor(t.name, t.shape, t.kinds) for t in layout.tensors], saved=saved,
    )  # fmt: skip
    manifest = merge([(keys.part_name(step, EPOCH, 0), part.to_bytes())])
    body = checkpoint_body(manifest, manifest.to_bytes())
    body["manifest"] = f"{body['manifest']}-{incarnation}"
    assert store.create(keys.run_key(run, body["manifest"]), manifest.to_bytes())
    return CheckpointInfo(n=1, epoch=EPOCH, time=0.0, **body)


def filling(store: Store, run: str, info: CheckpointInfo, layout: PlanLayout, epoch: int = EPOCH + 1) -> Fill:
    """Fills slots from a checkpoint, as one node's agent would."""

    def fill(slots: Mapping[int, Slot]) -> None:
        with ThreadPoolExecutor(2) as pool:
            restore_slots(store, run, info, layout, slots, epoch=epoch, pool=pool)

    return fill


def restored(store: Store, run: str, info: CheckpointInfo, layout: PlanLayout) -> list[bytes]:
    """What the slot of every rank holds that was filled from a checkpoint."""
    table = SlotTable(layouts(layout, range(layout.ranks)), layout.digest, layout.what_digest, 1)
    try:
        for rank in table.layouts:
            table.create(rank)
        filling(store, run, info, layout)({rank: slots[0] for rank, slots in table.slots.items()})
        found = []
        for rank in table.layouts:
            with table.slots[rank][0].data() as view:
                found.append(bytes(view))
        return found
    finally:
        assert table.close()
