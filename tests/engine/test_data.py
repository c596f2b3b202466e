"""Shards and the order of samples: the engine's arithmetic against the Python mirror; bad shards refused with 65."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint.layout import read_plan
from tests.e2e import engine_runs
from tests.engine.engine_build import build_preload, engine
from tests.engine.native import build_program
from tests.engine.plans import SEQUENCE, VOCAB, small_plan
from tests.reference.sample_order import MixedOrder, SampleOrder
from tests.support.shards import read_shard
from trainer.dataset import DatasetRef, Mixture, new_shard, write_shard
from trainer.wire.order import MixPhase, Order

__all__ = ["engine"]


def order(engine: Path, folder: Path, dataset: DatasetRef, data: dict[str, object], count: int, seed: int) -> list[int]:
    path = folder / "plan"
    path.write_bytes(small_plan(dataset=dataset, data=data, seed=seed).to_bytes())
    command = [engine, "order", "--plan", path, "--first", "0", "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize(
    ("tokens", "block", "window", "shuffled"),
    [
        ((9,), 1, 1, True),
        ((9, 0, 3, 9), 1, 1, True),
        ((401, 90, 7, 300), 4, 3, True),
        ((401, 90, 7, 300), 1000, 1, True),
        ((401, 90, 7, 300), 1, 1000, True),
        ((2000,), 7, 5, True),
        ((401, 90, 7, 300), 4, 3, False),
    ],
)
def test_the_order_is_the_mirrors_and_every_pass_a_permutation(
    engine: Path, tmp_path: Path, tokens: tuple[int, ...], block: int, window: int, shuffled: bool
) -> None:
    dataset = DatasetRef("0" * 64, VOCAB, 2, tokens, "0" * 64)
    for seed in (0, 1, 2**63 - 1):
        mirror = SampleOrder(dataset, SEQUENCE, seed, shuffled, block, window)
        total = dataset.samples(SEQUENCE)
        used = total // min(block, total) * min(block, total) if shuffled else total
        data: dict[str, object] = {"block": block, "window": window, "shuffled": shuffled}
        samples = order(engine, tmp_path, dataset, data, 3 * used, seed)
        assert samples == [mirror.sample(i) for i in range(3 * used)]
        known = Order((total,), (), 4, seed, shuffled, block, window)  # as the agent counts it out
        assert samples == [known.sample(i) for i in range(3 * used)]
        assert (known.used(0), known.taken(5)) == (used, (20,))
        passes = [samples[i : i + used] for i in range(0, 3 * used, used)]
        for one in passes:
            assert max(Counter(one).values()) == 1
        if shuffled and used > 20:
            assert passes[0] != passes[1]


MIXTURES: list[tuple[tuple[int, ...], list[MixPhase]]] = [
    ((40, 9), [MixPhase(1, (3, 1))]),
    ((40, 9, 25), [MixPhase(1, (3, 0, 2)), MixPhase(4, (0, 1, 0)), MixPhase(5, (7, 5, 1))]),
    ((30,), [MixPhase(1, (1,))]),
    ((12, 12), [MixPhase(1, (50, 20)), MixPhase(9, (1, 1))]),
]


@pytest.mark.parametrize(("parts", "phases"), MIXTURES)
@pytest.mark.parametrize("shuffled", [True, False])
def test_the_order_of_a_mixture(
    engine: Path, tmp_path: Path, parts: tuple[int, ...], phases: list[MixPhase], shuffled: bool
) -> None:
    """Engine, agent and a walk from the start agree; a cycle has each part's weight, a pass no sample twice."""
    shards = [(SEQUENCE * n + 1,) if n < 20 else (SEQUENCE * (n - 7) + 1, 3, SEQUENCE * 7 + 1) for n in parts]
    mix = Mixture(tuple((f"{k:064x}", len(own)) for k, own in enumerate(shards)), tuple(phases))
    dataset = DatasetRef("0" * 64, VOCAB, 2, tuple(t for own in shards for t in own), "0" * 64, mix=mix)
    data: dict[str, object] = {"block": 3, "window": 2, "shuffled": shuffled}
    count = 200
    samples = order(engine, tmp_path, dataset, data, count, 11)
    walk = MixedOrder(parts, tuple((p.from_batch, p.weights) for p in phases), 4, 11, shuffled, 3, 2).walk(count)
    firsts = [sum(parts[:k]) for k in range(len(parts))]
    assert samples == [firsts[part] + number for part, number in walk]
    layout = read_plan(small_plan(dataset=dataset, data=data, seed=11).to_bytes()).data
    assert layout is not None
    assert layout.mixed
    assert samples == [layout.order.sample(i) for i in range(count)]
    for p, phase in enumerate(phases):
        begin = (phase.from_batch - 1) * 4
        end = (phases[p + 1].from_batch - 1) * 4 if p + 1 < len(phases) else count
        for cycle in range(begin, end - phase.cycle + 1, phase.cycle):
            found = Counter(part for part, _ in walk[cycle : cycle + phase.cycle])
            assert [found[part] for part in range(len(parts))] == list(phase.weights)
    for part in range(len(parts)):
        passes: dict[int, list[int]] = {}
        for i in range(count):
            owner, place = layout.order.place(i)
            if owner == part:
                passes.setdefault(place // layout.order.used(part), []).append(walk[i][1])
        assert all(max(Counter(numbers).values()) == 1 for numbers in passes.values())
    for batch in range(count // 4 + 1):
        p = max((n for n, phase in enumerate(phases) if phase.from_batch <= batch), default=0)
        begin = (phases[p].from_batch - 1) * 4
        read = Counter(layout.order.place(i)[0] for i in range(begin, batch * 4))
        known = [base + read[part] for part, base in enumerate(layout.order.bases[p])]
        assert list(layout.order.taken(batch)) == known


def test_a_mixture_of_one_part_reads_as_that_part(engine: Path, tmp_path: Path) -> None:
    alone = DatasetRef("0" * 64, VOCAB, 2, (401, 90, 7, 300), "0" * 64)
    mixed = replace(alone, mix=Mixture((("1" * 64, 4),), (MixPhase(1, (1,)), MixPhase(7, (1,)))))
    data: dict[str, object] = {"block": 4, "window": 3}
    assert order(engine, tmp_path, mixed, data, 300, 5) == order(engine, tmp_path, alone, data, 300, 5)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_a_step_s_samples_in_order(replicas: int) -> None:
    """8 microbatches of 3 samples a step, whatever the number of replicas: none is read twice or left out."""
    command = [build_program("order_drive"), str(replicas), str(8 // replicas), "3", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [int(line) for line in done.stdout.split()] == list(range(0, 5 * 24, 24 // replicas))


def run(folder: Path, engine: Path, size: int = 2) -> tuple[int, str]:
    """One rank on the small plan over ``folder/data`` as it lies there, of tokens of ``size`` bytes; what it printed
    where that is well, else its words.
    """
    plan = small_plan(dataset=DatasetRef("0" * 64, VOCAB, size, (SEQUENCE * 12 + 1,), "0" * 64))
    (folder / "plan").write_bytes(plan.to_bytes())
    (folder / "attempt").write_bytes(engine_runs.attempt_bytes(plan, [0], folder / "data", folder))
    command = [
        engine,
        "rank",
        "--plan",
        folder / "plan",
        "--attempt",
        folder / "attempt",
        "--rank",
        "0",
        "--agent",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr if done.returncode else done.stdout


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "00000.bin"
    write_shard(path, np.random.default_rng(0).integers(0, VOCAB, SEQUENCE * 12 + 1), VOCAB)
    return path


def test_a_good_shard_trains(engine: Path, tmp_path: Path, shard: Path) -> None:
    code, words = run(tmp_path, engine)
    assert code == 0, words


def test_a_mask_is_read_from_tokens_of_either_size(engine: Path, tmp_path: Path, shard: Path) -> None:
    """The same tokens count, and their values are those without it."""
    tokens, mask = read_shard(shard), np.random.default_rng(1).random(SEQUENCE * 12 + 1) < 0.5
    lines = []
    for size in (2, 4):
        data, view = new_shard(tokens.size, VOCAB, size, True)
        view[:] = np.where(mask, tokens, tokens | 1 << (8 * size - 1))
        shard.write_bytes(data)
        code, said = run(tmp_path, engine, size)
        assert code == 0, said
        steps = [json.loads(line) for line in said.splitlines()]
        lines.append([(e["loss"], e["grad_norm"], e["counted"]) for e in steps if e["event"] == "step"])
    assert lines[0] == lines[1]
    assert all(0 < counted < 4 * SEQUENCE for _, _, counted in lines[0])


def test_a_masked_token_beyond_the_vocabulary_is_named_without_its_mask(
    engine: Path, tmp_path: Path, shard: Path
) -> None:
    data, view = new_shard(SEQUENCE * 12 + 1, VOCAB, 2, True)
    view[17] = VOCAB | 1 << 15
    shard.write_bytes(data)
    code, words = run(tmp_path, engine)
    assert code == 65
    assert f"token number 17 is {VOCAB}, the vocabulary ends at {VOCAB}" in words


@pytest.mark.parametrize("cut", [1, 2, 64, 100])
def test_a_shard_cut_short_is_refused(engine: Path, tmp_path: Path, shard: Path, cut: int) -> None:
    shard.write_bytes(shard.read_bytes()[:-cut])
    code, words = run(tmp_path, engine)
    assert code == 65
    assert "00000.bin" in words
    assert f"has {64 + 2 * (SEQUENCE * 12 + 1) - cut} bytes, the plan says" in words


def test_a_shard_cut_short_while_it_is_read_is_named_with_its_place(engine: Path, tmp_path: Path, shard: Path) -> None:
    """Cut after the rank has opened it: an error with file and offset, no SIGBUS."""
    plan = small_plan(dataset=DatasetRef("0" * 64, VOCAB, 2, (SEQUENCE * 12 + 1,), "0" * 64), steps=1 << 30)
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    (tmp_path / "attempt").write_bytes(engine_runs.attempt_bytes(plan, [0], tmp_path / "data", tmp_path))
    command = [engine, "rank", "--plan", tmp_path / "plan", "--attempt", tmp_path / "attempt", "--rank", "0"]
    with subprocess.Popen([*command, "--agent", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            while b'"event":"step"' not in process.stdout.readline():
                assert process.poll() is None
            os.truncate(shard, 64 + 21)
            _, words = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 65, words
    assert b"00000.bin ends at byte 85; 18 bytes were wanted at" in words
    assert b"it was cut after it was opened" in words


def test_more_shards_than_open_files(engine: Path, tmp_path: Path) -> None:
    """The soft limit of open files is no limit for shards; the hard one is named."""
    (tmp_path / "data").mkdir()
    tokens = np.random.default_rng(0).integers(0, VOCAB, SEQUENCE + 1)
    for number in range(60):
        write_shard(tmp_path / "data" / f"{number:05d}.bin", tokens, VOCAB)
    plan = small_plan(dataset=DatasetRef("0" * 64, VOCAB, 2, (SEQUENCE + 1,) * 60, "0" * 64))
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    (tmp_path / "attempt").write_bytes(engine_runs.attempt_bytes(plan, [0], tmp_path / "data", tmp_path))
    rank = f"exec {engine} rank --plan plan --attempt attempt --rank 0 --agent -"
    ends = {}
    for kind in ("-S", "-H"):
        script = f"ulimit -S -n 40 && ulimit {kind} -n 40 && {rank}"
        done = subprocess.run(
            ["/bin/sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        ends[kind] = done
    assert ends["-S"].returncode == 0, ends["-S"].stderr
    assert ends["-H"].returncode == 78
    assert "raise the hard limit (ulimit -Hn), or prepare fewer, larger shards" in ends["-H"].stderr


def test_a_missing_shard_is_refused(engine: Path, tmp_path: Path, shard: Path) -> None:
    shard.unlink()
    code, words = run(tmp_path, engine)
    assert code == 65
    assert "No such file" in words


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 75), (errno.ESTALE, 75), (errno.ENFILE, 75), (errno.EACCES, 65)]
)
def test_a_shard_whose_storage_fails_is_not_bad_data(
    engine: Path, tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """A network file system that was away ended the run for good, with the mend to prepare the data again."""
    monkeypatch.setenv("HS_FAIL_OPEN", shard.name)
    monkeypatch.setenv("HS_FAIL_ERRNO", str(number))
    monkeypatch.setenv("LD_PRELOAD", str(build_preload("failing_open")))
    got, words = run(tmp_path, engine)
    assert (got, f"{shard.name} cannot be opened: {os.strerror(number)}" in words) == (code, True), words


def test_a_token_beyond_the_vocabulary_is_named(engine: Path, tmp_path: Path, shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[64 + 2 * 17 : 64 + 2 * 18] = (VOCAB).to_bytes(2, "little")
    shard.write_bytes(data)
    code, words = run(tmp_path, engine)
    assert code == 65
    assert f"token number 17 is {VOCAB}, the vocabulary ends at {VOCAB}" in words


@pytest.mark.parametrize(("at", "value"), [(0, b"X"), (8, b"\x03"), (12, b"\x04"), (16, b"\x01"), (24, b"\xff\xff")])
def test_a_wrong_header_is_refused(engine: Path, tmp_path: Path, shard: Path, at: int, value: bytes) -> None:
    data = bytearray(shard.read_bytes())
    data[at : at + len(value)] = value
    shard.write_bytes(data)
    code, words = run(tmp_path, engine)
    assert code == 65, words
