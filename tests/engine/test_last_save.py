"""The last state of an attempt, where the agent holds every slot: the rank waits for one, and its messages go on
meanwhile. Where that agent dies it tells the next one which slots there are. Else each would wait for the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

from checkpoint.agent.slots import Slot
from checkpoint.layout import read_plan
from tests.e2e import engine_runs
from tests.engine.agent_end import WAIT_S, agent_at, only_rank
from tests.engine.engine_build import build_preload, engine
from tests.engine.plans import GPT2, small_plan
from trainer import wire

__all__ = ["engine"]


def test_a_rank_that_waits_for_a_slot_greets_the_next_agent(engine: Path, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, steps=1, every=1)
    command = only_rank(engine, plan, tmp_path)
    layout = read_plan(plan.to_bytes())
    slot = Slot.create(layout.rank(0), layout.digest, layout.what_digest)
    slot._header.hold = 1
    path = tmp_path / "agent.sock"
    with agent_at(path) as first:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            first.tell("SLOTS", rank=0, a=1, b=-1, fds=(slot.fd,))
            first.until(lambda: "start" in [json.loads(m.payload)["event"] for m in first.of("METRICS")], "the start")
            first.close()
            with agent_at(path) as second:
                (handed,) = second.hears("HELLO", 0).fds
                assert os.path.sameopenfile(handed, slot.fd)
                os.close(handed)
                slot.release()
                ready = second.hears("READY", 0)
                assert (ready.a, ready.b, ready.c) == (0, 1, 1)
                second.tell("COMMITTED", rank=0, a=1)
                second.until(lambda: process.poll() is not None, "the rank to end")
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.communicate()
            slot.close()


def test_messages_go_on_while_a_rank_waits_for_a_slot(engine: Path, tmp_path: Path) -> None:
    """The other one has its slot. Before it asks for its commit it waits for the tied weights, which take several
    sends; it waits for nobody longer than stall_ms, and whoever waits for a slot may wait for commit_ms.
    """
    model, parallel = GPT2 | {"width": 128}, {"optimizer": "checked"}  # weights leave right before the snapshot
    plan = small_plan(tmp_path, stages=2, steps=1, every=1, vocab=2048, model=model, parallel=parallel)
    (sender,) = {c.source for c in plan.channels if c.kind == wire.CH_TIED_WEIGHT}
    layout = read_plan(plan.to_bytes())
    slots = [Slot.create(layout.rank(rank), layout.digest, layout.what_digest) for rank in (0, 1)]
    slots[sender]._header.hold = 1
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in slots]
    ports = [listener.getsockname()[1] for listener in listeners]
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    (tmp_path / "attempt").write_bytes(engine_runs.attempt_bytes(plan, ports, tmp_path / "data", tmp_path))
    command = [engine, "rank", "--plan", tmp_path / "plan", "--attempt", tmp_path / "attempt"]
    command += ["--agent", tmp_path / "agent.sock"]
    env = {**os.environ, "LD_PRELOAD": str(build_preload("short_sends"))}
    processes: list[subprocess.Popen[bytes]] = []
    with agent_at(tmp_path / "agent.sock") as agent:
        try:
            for rank, listener in enumerate(listeners):
                fd = listener.fileno()
                own = [*command, "--rank", str(rank), "--listen-fd", str(fd)]
                processes.append(subprocess.Popen(own, stdout=subprocess.DEVNULL, pass_fds=[fd], env=env))
                agent.tell("SLOTS", rank=rank, a=1, b=-1, fds=(slots[rank].fd,))
            for rank in (1 - sender, sender):
                agent.hears("READY", rank)
                agent.tell("COMMITTED", rank=rank, a=1)
                agent.until(lambda process=processes[rank]: process.poll() is not None, f"rank {rank} to end")
                assert processes[rank].returncode == 0
                slots[sender].release()
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for listener in listeners:
                listener.close()
            for slot in slots:
                slot.close()
