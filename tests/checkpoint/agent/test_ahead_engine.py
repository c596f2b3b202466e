"""Agents and engines, both real, over data that comes ahead: a whole dataset's bits, and true last words."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from checkpoint.store import open_store
from tests.checkpoint.agent.test_agent_engine import idle, last, launched, newest_in_slots, reached
from tests.support.agents import Run
from tests.support.token_data import held_bytes, put_mixture, put_tokens
from tests.support.wait import wait_for
from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.spec import RunSpec, parse_spec, what_digest
from trainer.wire.order import MixPhase

STEPS = 200
CACHE = 32 * 4096
SHARDS = (220_000, 3_000, 220_000, 215_000)
SPEC: dict[str, Any] = {
    "name": "ahead",
    "model": {"family": "gpt2", "layers": 3, "width": 32, "heads": 2, "context": 32},
    "data": {"block": 4, "window": 4},
    "train": {"steps": STEPS, "batch": 8, "microbatch": 2, "sequence": 16, "seed": 7},
    "parallel": {"threads": 1},
    "checkpoint": {"every": 25, "slots": 3},
}
CACHED = f"data.cache_gib={CACHE / (1 << 30)!r}"


def made(folder: Path, *sets: str, mixed: bool = False) -> tuple[Run, RunSpec, str, DatasetRef]:
    """A run over random tokens, in a store of its own, and its plan's digest; ``mixed``: of two parts, one masked."""
    store, spec = open_store((folder / "store").as_uri()), parse_spec(SPEC, sets)
    dataset = put_tokens(store, SHARDS)
    if mixed:
        phases = MixPhase(1, (3, 1)), MixPhase(90, (1, 2))
        parts = put_tokens(store, SHARDS[:2]), put_tokens(store, SHARDS[2:], seed=1, share=0.3)
        dataset = put_mixture(store, parts, phases)
    run = Run(store, f"ahead-{what_digest(spec, dataset).hex()[:6]}")
    return run, spec, run.add_plan(spec, dataset), dataset


def said(node: Path) -> list[str]:
    """What the node's agents have logged."""
    return [json.loads(line)["text"] for line in (node / "agent.log").read_text().splitlines() if line.startswith("{")]


def test_a_corpus_of_ten_times_the_cache_gives_the_same_bits_whoever_is_killed(tmp_path: Path) -> None:
    whole, spec, plan, _ = made(tmp_path / "whole", mixed=True)
    with launched(whole, spec, tmp_path / "whole" / "out"):
        whole.attempt(spec, plan)
        digest = last(whole, STEPS).state_digest
    assert sum(2 * tokens for tokens in SHARDS) > 10 * CACHE

    run, spec, plan, _ = made(tmp_path, CACHED, "parallel.stages=3", "launch.nodes=3", mixed=True)
    with launched(run, spec, tmp_path / "out") as (launcher, launch):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 60) as status:
            os.kill(status["ranks"]["0"]["pid"], signal.SIGKILL)
        slots = newest_in_slots(idle(run, first, 3))
        point = run.fold().at_step()
        second = run.attempt(spec, plan, checkpoint=point.n if point else None, step=slots["step"], slots=slots)
        with reached(run, tmp_path, 100) as status:
            assert status["epoch"] == second
            os.kill(status["pid"], signal.SIGKILL)
        wait_for(lambda: launcher.observe(launch.launch_id).state == "partial", "the agent's death to be seen")
        launcher.ensure(launch)
        found = last(run, STEPS)
        assert (found.state_digest, found.epoch) == (digest, second)
        assert {r["code"] for s in idle(run, second, 3) for r in s["ranks"].values()} == {0}
        run.log.append("ended", {"outcome": "succeeded", "reason": "", "step": STEPS}, run.fold())
        nodes = [tmp_path / "out" / "runs" / run.name / run.launch / f"node{node}" for node in range(3)]
        wait_for(lambda: (nodes[0] / "done").exists() and (nodes[2] / "done").exists(), "the nodes to leave")
    for node in (nodes[0], nodes[2]):  # which read tokens and targets
        files = list((node / "data-cache").glob("*/*.bin"))
        assert len(files) == len(SHARDS)
        assert sum(map(held_bytes, files)) <= CACHE
        assert any("of data came ahead" in text for text in said(node))
        assert not (node / "data").exists()
    assert not (nodes[1] / "data").exists()  # the one between reads none
    assert not (nodes[1] / "data-cache").exists()


def test_data_that_does_not_come_is_lost_in_the_end_and_damaged_data_refused(tmp_path: Path) -> None:
    # so many steps that the rank is never at its end, where it waits for its agent, when that is stopped
    run, spec, plan, dataset = made(tmp_path, CACHED, "launch.stall_s=2.0", "train.steps=4000")
    with launched(run, spec, tmp_path / "out"):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 20) as status:
            agent, rank = status["pid"], status["ranks"]["0"]["pid"]
            os.kill(agent, signal.SIGSTOP)
        wait_for(lambda: not Path(f"/proc/{rank}").exists(), "the rank to give up")
        os.kill(agent, signal.SIGCONT)
        (status,) = idle(run, first)
        end = status["ranks"]["0"]
        assert end["code"] == 75
        words = json.loads(end["words"])
        assert words["action"] == "data"
        assert words["why"].startswith(f"the data of step {words['step']} is not here after ")
        for number in range(len(SHARDS)):
            path = run.store.local_path(f"data/{dataset.digest}/{number:05d}.bin")
            assert path is not None
            path.chmod(0o644)
            path.write_bytes(bytes(path.stat().st_size))
        point = run.fold().restore_candidates()
        second = run.attempt(spec, plan, checkpoint=point[0].n if point else None, step=point[0].step if point else 0)
        (status,) = idle(run, second)
        end = status["ranks"]["0"]
        assert end["code"] == 65
        assert "does not have its digest at byte" in end["words"]
        assert "`hotstage data prepare SPEC --again` writes both anew" in end["words"]


@pytest.mark.parametrize("key", ["data.cache_gib=-1.0", "data.cache_gib=2e6", 'data.cache_gib="big"'])
def test_a_cache_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(SpecError, match=r"data\.cache_gib"):
        parse_spec(SPEC, [key])
