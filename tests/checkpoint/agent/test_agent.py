"""The real agent process, driven over its socket by the engine's side in Python: between any two messages."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from pathlib import Path

import pytest

from checkpoint import keys
from checkpoint.agent.algorithms import Table
from checkpoint.agent.fetch import room_words
from checkpoint.agent.gang import DEFAULTS
from checkpoint.read import StateReader, load_manifest
from tests.checkpoint.agent.started import Started, committed, fill_all, idle
from tests.support.agents import NodePeer, RankPeer, agent, make_run, put_dataset, state_bytes, tiny_spec, wait_for
from trainer import wire
from trainer.spec import HOW_OF_WHAT, RunSpec, how_map
from trainer.spec_how import LATER


@pytest.mark.parametrize(("said", "first"), [((), 9001), (("--port-base", "7400"), 7400)])
def test_where_a_nodes_ranks_listen(tmp_path: Path, said: tuple[str, ...], first: int) -> None:
    """Nodes of one machine share the run's range; a node with an address of its own begins with its own base."""
    spec = tiny_spec(parallel__stages=2, launch__nodes=2, launch__port_base=9000)
    run, plan = make_run(tmp_path, spec)
    with agent(run, tmp_path, node=1, nodes=2, more=said) as process:
        node = NodePeer(process.work)
        run.attempt(spec, plan)
        prepare = wire.MsgPrepare.from_buffer_copy(node.link.receive("PREPARE").payload)
        assert (prepare.local_ranks, prepare.port_base) == (1, first)
        node.close()


def test_an_engine_cannot_have_the_agents_own_files_published(one: Started) -> None:
    """It may name its trace, and no other file: neither by a path nor by a link in the folder that they share."""
    work, (rank,) = one.agents[0].work, one.ranks
    secret, link, honest = work.parent / "token", work / "trace-0.json", work / "trace-1.json"
    secret.write_text("of the agent alone")
    link.symlink_to(secret)
    honest.write_text('{"traceEvents":[]}')
    for number, path in enumerate([honest, secret, link, Path(f"{work}/../token")]):
        rank.link.send("TRACE", rank=number, epoch=one.epoch, payload=bytes(path))
    fill_all(one.nodes[0], one.run, one.plan, 4, final=True)
    assert rank.link.receive("COMMITTED").a == 4
    one.nodes[0].end(0)
    one.run.log.append("ended", {"outcome": "cancelled", "reason": "enough", "step": 4}, one.run.fold())
    assert one.agents[0].process.wait(60) == 0
    folder = keys.run_key(one.run.name, "live", str(one.epoch), "trace")
    assert [(info.key, one.run.store.get(info.key)) for info in one.run.store.list(f"{folder}/")] == [
        (f"{folder}/0", honest.read_bytes())
    ]
    assert one.agents[0].log().count("cannot be read") == 3


def test_whole_cycle(tmp_path: Path) -> None:
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    layout = run.layouts[plan]
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        epoch = run.attempt(spec, plan)
        ranks = node.start()
        assert node.attempt is not None
        assert (node.attempt.epoch, node.attempt.start_step, node.attempt.ranks) == (epoch, -1, 2)
        assert node.attempt.run == run.name.encode()
        assert bytes(node.attempt.plan_digest) == layout.digest
        assert Path(node.attempt.data_dir.decode(), "00000.bin").exists()
        assert [r.restore for r in ranks] == [-1, -1]

        ranks[0].link.send("METRICS", rank=0, epoch=epoch, payload=b'{"event":"step","step":2,"loss":1.5}')
        node.link.send("OUTPUT", rank=1, epoch=epoch, a=2, payload=b"hello from rank 1\n")
        fill_all(node, run, plan, 2)
        first = committed(run, 2)
        fill_all(node, run, plan, 4, final=True)
        for rank in ranks:
            assert rank.link.receive("COMMITTED").a == 4
        last = run.fold().checkpoints[-1]
        assert last.step == 4
        assert last.epoch == epoch
        assert last.data_position == 4 * 4
        node.end(0)

        status = idle(run, epoch)
        assert status["epoch"] == epoch
        assert {r: v["code"] for r, v in status["ranks"].items()} == {"0": 0, "1": 0}
        assert status["durable"] == 4
        assert {"step": 4, "epoch": epoch} in status["slots"]

        run.log.append(
            "ended",
            {"outcome": "succeeded", "reason": "done", "step": 4, "state_digest": last.state_digest},
            run.fold(),
        )
        assert node.link.receive("END").name == "END"
        assert process.process.wait(60) == 0
        assert (process.work / "done").read_text() == "ended"
        node.close()
    assert first is not None
    assert b"hello from rank 1" in run.store.get(keys.run_key(run.name, "live", str(epoch), "logs", "1", "00"))
    assert b'"step":2' in run.store.get(keys.run_key(run.name, "live", str(epoch), "metrics", "0000000000"))
    manifest = load_manifest(run.store, run.name, last)
    reader = StateReader(run.store, manifest)
    for rank in range(layout.ranks):
        data = state_bytes(layout, rank, 4)
        for state in layout.rank(rank).states:
            name = layout.tensors[state.tensor].name
            for kind in range(3):
                at = state.kind_offset(kind)
                assert reader.read(name, kind) == data[at : at + 4 * state.elements]


def test_how_a_rank_was_killed_is_in_the_status(tmp_path: Path) -> None:
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        epoch = run.attempt(spec, plan)
        ranks = node.start()
        limit = struct.pack("<Q", 256 << 20)
        node.link.send("EXIT", rank=0, epoch=epoch, a=-9, b=ranks[0].rank, c=wire.ENDED_BY_OOM, payload=limit)
        node.link.send("EXIT", rank=1, epoch=epoch, a=-9, b=ranks[1].rank, c=wire.ENDED_BY_SUPERVISOR)
        node.link.send("IDLE", epoch=epoch)
        status = idle(run, epoch)
        ends = {rank: (view["signal"], view["killed"], view["memory"]) for rank, view in status["ranks"].items()}
        assert ends == {"0": (9, False, 256 << 20), "1": (9, True, None)}
        node.close()


def test_the_agents_defaults_are_the_specs() -> None:
    spec = how_map(tiny_spec())
    for name, value in DEFAULTS.items():
        section, key = name.split(".")
        if key != "stop_after":
            assert RunSpec.model_fields[section].default.model_dump(mode="json")[key] == value, name
            later = (*LATER.get(section, ()), *(k for s, k in HOW_OF_WHAT if s == section))
            assert key in spec.get(section, {}) or key in later  # so every record has it that is not as here


def test_words_of_a_full_folder(tmp_path: Path) -> None:
    size = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize >> 20
    words = room_words(OSError(errno.ENOSPC, "No space left on device", "plan-1"), tmp_path)
    assert f"{tmp_path} has too little room, " in words
    assert f"of its {size} MiB are free" in words
    assert "sizeLimit of its volume `work`" in words
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, limits[1]))
    try:
        words = room_words(OSError(errno.EFBIG, "File too large"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "have 1099511627776 bytes at most; raise the limit (ulimit -f unlimited)" in words
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    words = room_words(OSError(errno.EMFILE, "Too many open files"), tmp_path)
    assert words.endswith(f"may have {files}; raise the limit (ulimit -n, a service's LimitNOFILE)")
    assert room_words(OSError(errno.EACCES, "Permission denied"), tmp_path) == "[Errno 13] Permission denied"


def test_a_second_pod_of_the_same_index_stands_by(tmp_path: Path) -> None:
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    (tmp_path / "second").mkdir()
    with (
        agent(run, tmp_path) as first,
        agent(run, tmp_path / "second", more=("--host", "127.0.0.2")) as second,
    ):
        twin = NodePeer(second.work)
        wait_for(lambda: "the supervisor is here" in second.log(), "the second agent to have an engine")
        second.process.send_signal(signal.SIGSTOP)  # the first one has the attempt
        node = NodePeer(first.work)
        epoch = run.attempt(spec, plan)
        node.start()
        mine = wait_for(lambda: (s := run.status()) and s["epoch"] == epoch and s["incarnation"], "the first's status")
        second.process.send_signal(signal.SIGCONT)
        wait_for(lambda: f"node 0 of attempt {epoch} is held by 127.0.0.1" in second.log(), "the second to stand by")
        fill_all(node, run, plan, 2)
        committed(run, 2)
        status = run.status()
        assert status is not None
        assert (status["incarnation"], status["epoch"]) == (mine, epoch)

        # the first is gone for good: the next attempt's node is the second, and it hears nothing before
        node.close()
        first.kill()
        after = run.attempt(spec, plan, checkpoint=run.fold().checkpoints[0].n, step=2)
        twin.start()
        assert twin.attempt is not None
        assert (twin.attempt.epoch, twin.attempt.start_step) == (after, 2)
        wait_for(lambda: (run.status() or {})["epoch"] == after, "the second's status")
        twin.close()


def test_attempt_in_place_restores_from_slots_and_makes_them_durable(tmp_path: Path) -> None:
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    layout = run.layouts[plan]
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        first = run.attempt(spec, plan)
        node.start()
        fill_all(node, run, plan, 2)
        committed(run, 2)
        fill_all(node, run, plan, 4)
        node.ranks[0].fill(6, state_bytes(layout, 0, 6), tell=False)  # rank 1 died before it had filled its own
        wait_for(lambda: {"step": 4, "epoch": first} in (run.status() or {"slots": []})["slots"], "step 4 in the slots")
        node.end(75)

        second = run.attempt(
            spec, plan, checkpoint=run.fold().checkpoints[0].n, step=4, slots={"step": 4, "epoch": first}
        )
        ranks = node.start()
        assert node.attempt is not None
        assert node.attempt.start_step == 4
        for rank in ranks:
            h = rank.header(rank.restore)
            assert (h.step, h.epoch) == (4, first)
            assert rank.data(rank.restore) == state_bytes(layout, rank.rank, 4)
            assert all(rank.header(i).step <= 4 or rank.header(i).state == 0 for i in range(len(rank.maps)))
        # what it starts from becomes a checkpoint of its own, unless the attempt before had stored it
        found = committed(run, 4)
        assert getattr(found, "epoch", None) in (first, second)
        node.close()


def test_restores_from_the_manifest_onto_another_number_of_positions(tmp_path: Path) -> None:
    spec = tiny_spec(parallel__stages=2)
    run, two = make_run(tmp_path, spec)
    wider = tiny_spec(parallel__stages=4)
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        run.attempt(spec, two)
        node.start()
        fill_all(node, run, two, 2)
        info = wait_for(lambda: next(iter(run.fold().checkpoints), None), "a checkpoint")
        node.end(75)

        four = run.add_plan(wider, put_dataset(run.store))
        epoch = run.attempt(wider, four, checkpoint=info.n, step=2)
        ranks = node.start()
        assert len(ranks) == 4
        assert node.attempt is not None
        assert node.attempt.start_step == 2
        for rank in ranks:
            assert rank.restore == 0
            h = rank.header(0)
            assert (h.step, h.epoch, h.checksum_kind, h.state) == (2, epoch, wire.SUM_CRC32, wire.SLOT_READY)
            assert rank.data(0) == state_bytes(run.layouts[four], rank.rank, 2)
        fill_all(node, run, four, 4)
        again = wait_for(lambda: next((c for c in run.fold().checkpoints if c.step == 4), None), "step 4")
        assert again.epoch == epoch
        assert [c.step for c in run.fold().checkpoints] == [2, 4]  # what came from the store did not go there again
        node.close()


def test_agent_killed_between_chunks_and_commit(two: Started, tmp_path: Path) -> None:
    """Two nodes, so that a commit needs the other one's part: the agent dies after its part, before the commit."""
    run, epoch, layout = two.run, two.epoch, two.layout
    r0, r1 = two.ranks
    nonces = [bytes(node.attempt.nonce) for node in two.nodes if node.attempt is not None]
    assert len(nonces) == 2
    assert nonces[0] == nonces[1]
    r0.fill(2, state_bytes(layout, 0, 2))
    part = keys.run_key(run.name, keys.part_name(2, epoch, 0))
    wait_for(lambda: run.store.head(part), "the part of node 0")
    two.agents[0].kill()
    two.nodes[0].link.close()
    r0.link.close()
    assert not run.fold().checkpoints
    with agent(run, tmp_path, 0, 2) as again:
        n0 = NodePeer(again.work, epoch, alive=1)
        back = RankPeer(again.work, 0, epoch, fds=r0.fds)
        r1.fill(2, state_bytes(layout, 1, 2))
        assert committed(run, 2)
        back.fill(4, state_bytes(layout, 0, 4), final=True)
        r1.fill(4, state_bytes(layout, 1, 4), final=True)
        assert back.link.receive("COMMITTED").a == 4
        assert r1.link.receive("COMMITTED").a == 4
        assert len(run.fold().checkpoints) == 2
        assert not run.fold().void
        n0.close()


@pytest.mark.parametrize("survivor", [0, 1])
def test_either_agent_commits(two: Started, survivor: int) -> None:
    run, ranks, gone = two.run, two.ranks, 1 - survivor
    ranks[gone].fill(2, state_bytes(two.layout, gone, 2))
    wait_for(lambda: run.store.head(keys.run_key(run.name, keys.part_name(2, two.epoch, gone))), "its part")
    two.agents[gone].kill()
    ranks[survivor].fill(2, state_bytes(two.layout, survivor, 2))
    assert committed(run, 2)


def test_ranks_agree_on_algorithms(two: Started) -> None:
    """Over the socket of two nodes: the first one's choice is the run's; what cannot be kept is told."""

    def proposed(rank: RankPeer, choice: int) -> bytes:
        entry = wire.Algorithm(key=wire.AlgorithmKey(m=1, n=2, k=3), microseconds=choice)
        table = Table(b"GPU", b"cuBLASLt 13.1.0", 90, {bytes(entry.key): bytes(entry)}).to_bytes()
        rank.link.send("ALGORITHMS", rank=rank.rank, epoch=two.epoch, payload=table)
        got = rank.link.receive("ALGORITHMS")
        assert (got.rank, got.epoch, got.a) == (rank.rank, two.epoch, 0)
        assert (two.run.store.get(keys.algorithms_key(two.run.name, 0)) == table) == (choice == 5)
        return got.payload

    one, other = two.ranks
    assert proposed(one, 5) == proposed(other, 6)
    one.link.send("ALGORITHMS", rank=one.rank, epoch=two.epoch, payload=b"nonsense")
    refused = one.link.receive("ALGORITHMS")
    assert refused.a == 78
    assert b"is not a table of algorithms" in refused.payload
