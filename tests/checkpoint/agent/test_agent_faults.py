"""An agent among what goes wrong: damage, a store that refuses, other attempts and supervisors, torn slots."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint import keys
from checkpoint.agent.slots import Slot, SlotChanged
from tests.checkpoint.agent.started import Started, committed, idle
from tests.support.agents import Connection, NodePeer, agent, make_run, state_bytes, tiny_spec, wait_for
from trainer import wire


def test_a_flipped_byte_is_damage_that_names_the_object(one: Started) -> None:
    run = one.run
    one.ranks[0].fill(2, state_bytes(one.layout, 0, 2))
    info = wait_for(lambda: next(iter(run.fold().checkpoints), None), "a checkpoint")
    one.nodes[0].end(75)
    chunk = next(iter(run.store.list(keys.run_key(run.name, "chunks") + "/")))
    path = run.store.local_path(chunk.key)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    epoch = run.attempt(one.spec, one.plan, checkpoint=info.n, step=2)
    status = idle(run, epoch)
    assert status["ranks"]["0"]["code"] == 76
    assert chunk.key in status["ranks"]["0"]["words"]


def test_damaged_data_is_refused_before_the_start(tmp_path: Path) -> None:
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    shard = run.store.local_path(f"data/{run.layouts[plan].dataset_digest.hex()}/00000.bin")
    assert shard is not None
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        run.attempt(spec, plan)
        status = wait_for(lambda: (s := run.status()) and s["ranks"].get("0", {}).get("code") and s, "the refusal")
        assert status["ranks"]["0"]["code"] == 65
        assert "00000.bin" in status["ranks"]["0"]["words"]
        node.close()


def test_a_refusal_is_said_once_the_node_could_be_claimed(tmp_path: Path) -> None:
    """Only the node's holder speaks for it (A6): the claim is sought on although the attempt is over here already."""
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    shard = run.store.local_path(f"data/{run.layouts[plan].dataset_digest.hex()}/00000.bin")
    claims = run.store.local_path(keys.node_key(run.name, 1, 0))
    assert shard is not None
    assert claims is not None
    shard.write_bytes(b"not tokens")
    claims.parent.parent.mkdir(parents=True)
    claims.parent.write_bytes(b"")  # where the folder of the claims belongs
    with agent(run, tmp_path) as process:
        assert run.attempt(spec, plan) == 1
        wait_for(lambda: "attempt 1 cannot run here (65)" in process.log(), "the refusal")
        wait_for(lambda: "cannot be claimed now" in process.log(), "the claim to fail")
        assert (run.status() or {"epoch": 0})["epoch"] == 0
        claims.parent.unlink()
        status = wait_for(lambda: (s := run.status()) and s["epoch"] == 1 and s, "the status")
        assert status["ranks"]["0"]["code"] == 65


def test_a_store_that_refuses_writes_costs_checkpoints_only(one: Started) -> None:
    run, (rank,) = one.run, one.ranks
    # a file where the chunks' folder belongs: no rights are asked of root, yet nothing can be written there
    blocked = run.store.local_path(keys.run_key(run.name, "chunks"))
    assert blocked is not None
    blocked.write_bytes(b"")
    for step in (2, 4, 6):
        rank.fill(step, state_bytes(one.layout, 0, step))
    status = wait_for(lambda: (s := run.status()) and s["error"] and s, "the error in the status")
    assert "chunks" in status["error"]
    assert one.agents[0].process.poll() is None
    assert not run.fold().checkpoints
    blocked.unlink()
    rank.fill(8, state_bytes(one.layout, 0, 8), final=True)
    assert rank.link.receive("COMMITTED").a == 8
    wait_for(lambda: (s := run.status()) and s["error"] is None, "the error to go away")


def test_a_zombie_never_commits(one: Started) -> None:
    """An agent that was stopped while a newer launch took the run kills its gang and commits nothing."""
    run, (process,) = one.run, one.agents
    process.process.send_signal(signal.SIGSTOP)
    one.ranks[0].fill(2, state_bytes(one.layout, 0, 2))
    new = run.attempt(one.spec, one.plan, launch="launch-2")
    process.process.send_signal(signal.SIGCONT)
    assert one.nodes[0].link.receive("END").name == "END"
    assert process.process.wait(60) == 75
    assert new > one.epoch
    assert not run.fold().checkpoints
    assert (process.work / "done").read_text() == "fenced"


def test_a_newer_attempt_of_the_same_launch_ends_the_older_one(one: Started) -> None:
    (node,) = one.nodes
    second = one.run.attempt(one.spec, one.plan)
    kill = node.link.receive("KILL")
    assert kill.epoch == one.epoch
    node.end(75)
    node.start()
    assert node.ranks[0].epoch == second
    late = Connection(node.work)  # a rank of the first attempt is turned away
    late.send("HELLO", rank=0, epoch=one.epoch)
    assert late.next() is None
    late.close()


def test_an_unreadable_record_halts(one: Started) -> None:
    run, (rank,) = one.run, one.ranks
    run.store.create(keys.log_key(run.name, run.fold().n + 1), b"not a record")
    wait_for(lambda: (s := run.status()) and s["error"], "the error in the status")
    rank.fill(2, state_bytes(one.layout, 0, 2))
    wait_for(lambda: (s := run.status()) and {"step": 2, "epoch": rank.epoch} in s["slots"], "the snapshot")
    assert not list(run.store.list(keys.log_prefix(run.name), start_after=keys.log_key(run.name, run.state.n + 1)))
    assert one.agents[0].process.poll() is None


def test_supervisor_lost_ends_the_attempt_here(one: Started) -> None:
    one.nodes[0].close()
    status = idle(one.run, one.epoch)
    assert status["ranks"]["0"]["code"] == 75
    assert status["supervisor"] is None


def test_a_header_that_does_not_hold_is_given_up_with_a_word(one: Started) -> None:
    """Its CRC stays wrong, and nobody refills the slot: a few looks with pauses, then the next snapshot goes up."""
    (rank,), run = one.ranks, one.run
    index = rank.fill(2, state_bytes(one.layout, 0, 2), tell=False)
    header = wire.SlotHeader.from_buffer(rank.maps[index])
    header.header_crc ^= 1
    del header
    rank.link.send("READY", rank=0, epoch=one.epoch, a=index, b=2)
    status = wait_for(
        lambda: (s := run.status()) and "is damaged in memory" in (s["error"] or "") and s, "the error to be said"
    )
    assert "the snapshot of step 2 is damaged in memory" in status["error"]
    assert one.agents[0].log().count("the upload of step 2 is void") == 5
    rank.fill(4, state_bytes(one.layout, 0, 4))
    committed(run, 4)
    wait_for(lambda: (run.status() or {})["error"] is None, "the error to go")
    assert [c.step for c in run.fold().checkpoints] == [4]
    assert one.agents[0].log().count("the upload of step 2 is void") == 5


def test_a_slot_that_is_refilled_while_held_is_void(tmp_path: Path) -> None:
    """A rank that breaks the hold (it must not) costs that upload, not the truth of a checkpoint."""
    run, plan = make_run(tmp_path, tiny_spec())
    layout = run.layouts[plan]
    position = layout.rank(0)
    slot = Slot.create(position, layout.digest, layout.what_digest)
    with ThreadPoolExecutor(2) as pool:
        view = slot.begin_fill()
        view[:4] = b"\1\2\3\4"
        view.release()
        slot.finish_fill(3, 9, pool)
        seen = slot.look(0)
        assert (seen.step, seen.epoch, seen.ready) == (3, 9, True)
        slot.hold(seen)
        slot.begin_fill().release()
        with pytest.raises(SlotChanged):
            slot.check(seen)
        slot.finish_fill(4, 9, pool)
        with pytest.raises(SlotChanged):
            slot.hold(seen)
    assert slot.close()
