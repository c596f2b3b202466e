"""What agents and a driver ask of an S3 server while nothing happens, and what a checkpoint of many nodes asks.

Idle, by the server's own access log: one run trains with the real engine, agent and driver; of another one the ranks
have ended and its agent waits for a driver. The agents ask as one identity, the driver as another, and the runs lie
under prefixes of their own. Of many nodes: simulated (tests/support/gangs.py), every request but the looks at the log
that an idle agent takes anyway; the worst of a few cases. ``python -m tests.bench store``.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from checkpoint.store import open_store
from flows.drive.begin import prepare_run
from flows.drive.train import Run as Driven
from flows.drive.train import cancel, make_driver
from tests.support.agents import NodePeer, agent, make_run, tiny_spec
from tests.support.gangs import ManyAgents
from tests.support.s3_server import S3Server, s3_server
from tests.support.wait import wait_for
from trainer.spec import RunSpec, parse_spec

SETTLE_S, WINDOW_S = 60.0, 60.0
NODES = 1000


def training_spec(folder: Path) -> RunSpec:
    """Two ranks that step several times a second, report each step, and save nothing for long."""
    corpus = folder / "a.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog. " * 20_000)
    return parse_spec(
        {
            "name": "steady",
            "model": {"family": "gpt2", "layers": 4, "width": 256, "heads": 4, "context": 128},
            "train": {"steps": 1_000_000, "batch": 8, "microbatch": 4, "sequence": 128},
            "data": {"vocab_size": 300, "source": f"text:{corpus}"},
            "parallel": {"stages": 2},
            "checkpoint": {"every": 1_000_000},
        }
    )


def many_nodes() -> dict[str, float]:
    """Requests a node of a checkpoint (one node's upload a minute late, or the first committer dead) and of a start."""
    rng = random.Random(0)
    times = {node: rng.random() * 5.0 for node in range(NODES)}
    step = 7 * NODES  # node 0 is the first in order
    late = ManyAgents(NODES)
    late.checkpoint(step, {**times, NODES - 1: 60.0})

    def strike(node: int, verb: str, key: str) -> str:
        return "before" if (node, verb) == (0, "create") and "/log/" in key else ""

    died = ManyAgents(NODES, strike=strike)
    died.checkpoint(step, times)
    for agents in (late, died):
        assert all(agent.state.find(step, 1) for agent in agents.alive)
    begun = ManyAgents(NODES)
    begun.meet(times)
    return {
        "checkpoint": max(late.asked.total, died.asked.total) / NODES,
        "start": begun.asked.total / NODES,
    }


def idle() -> dict[str, float]:
    """Requests a second of: an agent whose gang trains, an agent that waits, a driver that watches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        access_log = folder / "access.log"
        with s3_server(folder / "s3", access_log=access_log) as server:
            with server.identity("root"):
                store = open_store(server.url("trains"))
                prepared = prepare_run(training_spec(folder), store)
                assert store.head("probe") is None  # the driver's client keeps this identity
            with server.identity("trainer"):
                run = Driven(prepared, store, make_driver(prepared, store, out=folder / "out")).start()
                try:
                    waiting, plan = make_run(folder, spec := tiny_spec(), server.url("waits"))
                    with agent(waiting, folder / "waits") as process:
                        node = NodePeer(process.work)
                        waiting.attempt(spec, plan)
                        node.start()
                        node.end(75)
                        wait_for(lambda: (s := waiting.status()) and s["phase"] == "idle", "the gang's end")
                        time.sleep(SETTLE_S)
                        before = counted(access_log, server)
                        time.sleep(WINDOW_S)
                        asked = counted(access_log, server)
                        node.close()
                finally:
                    cancel(store, prepared.run)
                    run.wait(60)
    asked.subtract(before)
    return {what: count / WINDOW_S for what, count in asked.items()}


def counted(access_log: Path, server: S3Server) -> Counter[str]:
    """Requests so far, by who made them."""
    found: Counter[str] = Counter({"agent trains": 0, "agent waits": 0, "driver": 0})
    root, _ = server.identities["root"]
    for line in access_log.read_text().splitlines():
        if "trains/" in line or "prefix=trains" in line:
            found["driver" if f" {root} " in line else "agent trains"] += 1
        elif "waits/" in line or "prefix=waits" in line:
            found["agent waits"] += 1
    return found


if __name__ == "__main__":
    for what, each in idle().items():
        print(f"{what:<24} {each:.2f} requests a second")
    for what, each in many_nodes().items():
        print(f"{what:<24} {each:.2f} requests a node")
