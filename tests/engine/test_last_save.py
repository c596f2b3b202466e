"""The last state of an attempt, where the agent holds every slot and dies: the rank waits for a slot, and tells the
next agent meanwhile which slots there are. Else each would wait for the other.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from checkpoint.agent.slots import Slot
from checkpoint.layout import read_plan
from tests.engine.agent_end import WAIT_S, agent_at, only_rank
from tests.engine.engine_build import engine
from tests.engine.plans import small_plan

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
