"""The last words of a rank that has no time to look: told of a lost peer while it computes, or aborting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.agent_end import WAIT_S, Agent, agent_at, only_rank
from tests.engine.engine_build import engine
from tests.engine.plans import small_plan
from trainer import wire

__all__ = ["engine"]


@pytest.fixture
def running(engine: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Agent]]:
    """A rank in the middle of a training that does not end, alone, so that it waits for nobody; and its agent."""
    plan = small_plan(tmp_path, steps=1 << 30)
    command = only_rank(engine, plan, tmp_path)
    with agent_at(tmp_path / "agent.sock") as agent:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            agent.tell("SLOTS", rank=0, a=0, b=-1)
            agent.until(lambda: len(agent.of("METRICS")) > 5, "the first steps")
            yield process, agent
        finally:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], agent: Agent) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Its code, the words that the agent heard, and those of its log."""
    words = json.loads(agent.hears("WORDS", 0).payload)
    _, err = process.communicate(timeout=WAIT_S)
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    (said,) = [line for line in lines if line["event"] == "last words"]
    return process.returncode, words, json.loads(said["words"])


def test_a_rank_that_computes_hears_that_a_peer_was_lost(running: tuple[subprocess.Popen[str], Agent]) -> None:
    process, agent = running
    process.send_signal(signal.SIGUSR1)
    code, words, logged = ended(process, agent)
    assert code == 75
    assert words == logged
    assert (words["code"], words["status"]) == (75, "LOST")
    assert "a peer was lost" in words["why"]
    assert words["step"] > 3
    assert words["action"][0] == "0" or words["action"] in ("sumsq", "adamw", "report", "data", "combine", "apply")


def test_a_rank_that_aborts_says_so(running: tuple[subprocess.Popen[str], Agent]) -> None:
    process, agent = running
    process.send_signal(signal.SIGABRT)
    code, words, logged = ended(process, agent)
    assert code == 70
    assert words == logged
    assert (words["code"], words["status"]) == (70, "BUG")
    assert words["step"] > 3


def test_a_stop_before_the_first_step_saved_nothing(engine: Path, tmp_path: Path) -> None:
    """The agent hands over no slots: the rank waits for them when it is asked to stop."""
    plan = small_plan(tmp_path)
    command = only_rank(engine, plan, tmp_path)
    with agent_at(tmp_path / "agent.sock") as agent:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            agent.hears("HELLO", 0)
            process.send_signal(signal.SIGTERM)
            code, words, _ = ended(process, agent)
        finally:
            process.kill()
            process.communicate()
    assert code == 143
    assert words["why"] == "stopped on request before the first step"
    assert wire.EXITS[code].text == "stopped on request, this attempt saved nothing"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HOTSTAGE_ENGINE_FABRIC", "TCP", "is 'TCP'; it is what launch.fabric says: tcp, infiniband, roce"),
        ("HOTSTAGE_ENGINE_CHANNELS", "ipc,rdma", "is 'ipc,rdma'; it lists ways between devices, of ipc, nccl and tcp"),
        ("HOTSTAGE_ENGINE_AGENT_AWAY_S", "0", "is '0'; it is the seconds that a supervisor waits for its agent"),
        ("HOTSTAGE_ENGINE_AGENT_AWAY_S", "soon", "above 0 and at most 604800 (360 where it is not set)"),
        ("HOTSTAGE_ENGINE_AGENT_AWAY_S", "nan", "is 'nan'"),
    ],
)
@pytest.mark.parametrize("command", ["node", "rank"])
def test_an_environment_that_cannot_be_honoured_is_refused(
    engine: Path, tmp_path: Path, command: str, name: str, value: str, words: str
) -> None:
    arguments = {
        "node": ["--agent", "agent.sock"],
        "rank": ["--plan", "p", "--attempt", "a", "--rank", "0", "--agent", "-"],
    }[command]
    done = subprocess.run(
        [engine, command, *arguments],
        env={**os.environ, name: value},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 78
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
