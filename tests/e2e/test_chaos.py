"""Whole runs through the real command, killed at seeded places: they go on by themselves and end with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos import (
    PLACES,
    Fault,
    ask_to_stop,
    caught,
    draw,
    kill_between_attempts,
    rank_step,
    spoil_arenas,
    spoil_slots,
    standing_still,
    unleashed,
)
from tests.support.place import LONG, Place, finish
from tests.support.place import LONG_STEPS as STEPS
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.wait import wait_for

SEED = int(os.environ.get("HOTSTAGE_CHAOS_SEED", "20"))


pytestmark = pytest.mark.long_run


TWELVE = draw(SEED, (*PLACES, "driver", "store"), ranks=2, steps=range(9, STEPS // 2))
"""Kills of real processes, one at each named place (HOTSTAGE_CHAOS_SEED draws other ranks and steps)."""
CADENCES = ("checkpoint.snapshot_every=2", "checkpoint.persist_every=8", "checkpoint.slots=2")
"""Most of what a gang starts again from is in memory alone, in as few slots as there may be."""


@pytest.mark.parametrize("fault", TWELVE[:-2], ids=str)
def test_a_kill_anywhere_ends_with_the_same_bits(place: Place, undisturbed: tuple[str, str], fault: Fault) -> None:
    run, digest = undisturbed
    with unleashed(fault, place.run_folder(run), place.folder / "out") as watcher:
        result = place.train(*(CADENCES if fault.place in ("report", "snapshot", "upload") else ()))
        assert watcher.wait(60) == 0, f"{fault}: the place was never seen"
    assert (result["run"], result["outcome"], result["step"]) == (run, "succeeded", STEPS)
    assert result["state_digest"] == digest
    if fault.place not in ("upload", "commit", "agent"):
        assert result["attempts"] > 1
    else:
        assert result["attempts"] == 1, place.said("runs", "show", run)  # a lost agent costs no attempt


def test_a_driver_killed_while_a_checkpoint_is_told_of_loses_nothing(
    place: Place, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    fault = TWELVE[-2]
    with unleashed(fault, place.run_folder(run), place.folder) as watcher:
        process = place.start_train()
        assert watcher.wait(60) == 0, f"{fault}: the place was never seen"
        assert finish(process).code == -signal.SIGKILL
    result = place.train()
    assert (result["outcome"], result["attempts"], result["state_digest"]) == ("succeeded", 1, digest)


def test_a_store_killed_while_a_checkpoint_comes_costs_no_step(
    tmp_path: Path, server: S3Server, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    fault = TWELVE[-1]
    made = Place(tmp_path / "p", LONG, store=server.url("chaos"), env=server.environment("trainer"))
    try:
        saved = server.data / BUCKET / "chaos" / "runs" / run
        with unleashed(fault, saved, server.data, gang=made.folder / "out") as watcher:
            process = made.start_train()
            assert watcher.wait(60) == 0, f"{fault}: the place was never seen"
        assert server.process.wait() == -signal.SIGKILL
        left_at = rank_step(made.folder / "out", 0)
        wait_for(lambda: (rank_step(made.folder / "out", 0) or STEPS) > min(STEPS - 1, (left_at or STEPS) + 8), "steps")
        server.restart()
        result = finish(process)
        assert result.code == 0, result.err
        told = result.json()
    finally:
        made.stop_all()
    assert (told["outcome"], told["attempts"], told["state_digest"]) == ("succeeded", 1, digest)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as running:
        yield running


def test_what_an_attempt_leaves_in_memory_never_shows_in_the_next(place: Place, undisturbed: tuple[str, str]) -> None:
    """The pages of the arenas are kept for the next attempt: rubbish in them changes nothing."""
    run, digest = undisturbed
    process, work = place.start_train(), place.folder / "out"
    spoiled: list[int] = []
    with caught(work, lambda: (rank_step(work, 0) or 0) >= 10, "step 10"):
        kill_between_attempts(work, 1, lambda: spoiled.append(spoil_arenas(work)))
    result = finish(process)
    assert result.code == 0, result.err
    told = result.json()
    assert (told["run"], told["attempts"], told["state_digest"]) == (run, 2, digest)
    assert spoiled[0] > 100_000


def test_a_bit_that_flips_in_memory_is_found_and_the_store_has_the_state(
    place: Place, undisturbed: tuple[str, str]
) -> None:
    """In every snapshot of every rank: no attempt goes on from it, nothing of it gets into the store."""
    run, digest = undisturbed
    process, work = place.start_train(*CADENCES, "checkpoint.slots=3"), place.folder / "out"
    manifests = place.run_folder(run) / "manifests"
    spoiled: list[int] = []
    with caught(
        work, lambda: any(manifests.glob("*/manifest")) and (rank_step(work, 0) or 0) >= 20, "step 20 and a checkpoint"
    ):
        kill_between_attempts(work, 1, lambda: spoiled.append(spoil_slots(work)), ahead=8)
    result = finish(process)
    assert result.code == 0, result.err
    told = result.json()
    assert (told["run"], told["outcome"], told["state_digest"]) == (run, "succeeded", digest)
    assert told["attempts"] > 2
    assert spoiled[0] >= 4
    assert "is damaged (checksum)" in place.said("runs", "show", run)
    assert place.here("ckpt", "verify", run).code == 0


def test_a_driver_killed_again_and_again_loses_nothing(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    log = place.run_folder(run) / "log"
    with standing_still(place.folder / "out", lambda: True):  # the gang trains on without a driver
        for _ in range(4):
            process = place.start("train", "spec.toml", "--no-prefect", "--json")
            before = len(list(log.glob("*")))
            wait_for(lambda n=before: len(list(log.glob("*"))) > n, "a new log record", 60)  # type: ignore[misc]
            process.kill()
            process.communicate()
    result = place.train()
    assert (result["outcome"], result["attempts"], result["state_digest"]) == ("succeeded", 1, digest)


def test_stop_then_resume_on_other_layouts(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    saved: list[int] = []
    manifests = place.run_folder(run) / "manifests"
    chunked = ("parallel.stages=4", "parallel.chunks=2", "parallel.schedule='interleaved-1f1b'")
    for layout, number in ((chunked, signal.SIGINT), (("parallel.stages=3",), signal.SIGTERM)):
        sets = [word for text in layout for word in ("--set", text)]
        process = place.start("train", "spec.toml", "--no-prefect", "--json", *sets)
        newest = saved[-1] if saved else 0
        with caught(
            place.folder,
            lambda n=newest: any(int(p.name.split("-")[0]) > n for p in manifests.glob("*")),  # type: ignore[misc]
            "a newer checkpoint",
        ):
            ask_to_stop(process, number, place.folder / "out")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 85, err.decode()
        saved.append(json.loads(out)["step"])
    assert saved[0] < saved[1] < STEPS
    told = json.loads(place.run("runs", "resume", run, "--no-prefect", "--json", "--set", "parallel.stages=1"))
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)


def test_a_second_train_attaches(place: Place, undisturbed: tuple[str, str]) -> None:
    _, digest = undisturbed
    first, second = (place.start("train", "spec.toml", "--no-prefect", "--json") for _ in range(2))
    told = [p.communicate(timeout=120) for p in (first, second)]
    results = [json.loads(out) for out, _ in told]
    assert [r["state_digest"] for r in results] == [digest, digest]
    assert [r["attempts"] for r in results] == [1, 1]
    third = place.start("train", "spec.toml", "--no-prefect", "--json").communicate(timeout=120)
    assert json.loads(third[0])["state_digest"] == digest
    assert b"this run had ended before (succeeded): nothing is trained" in third[1]


def test_cancel_ends_it_for_good_and_resume_opens_it_again(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    process = place.start("train", "spec.toml", "--no-prefect", "--json")
    manifests = place.folder / "store" / "runs" / run / "manifests"
    with caught(place.folder, lambda: any(manifests.glob("*/manifest")), "a checkpoint"):
        place.said("runs", "cancel", run)
        wait_for(lambda: process.poll() is not None, "the driver to leave", 60)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["outcome"]) == (1, "cancelled")
    assert json.loads(place.said("runs", "show", run, "--json"))["state"] == "cancelled"
    told = json.loads(place.run("runs", "resume", run, "--no-prefect", "--json"))
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)


def test_a_fork_with_the_same_what_has_the_same_bits(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    place.train()
    steps = [c["step"] for c in json.loads(place.said("ckpt", "ls", run, "--json"))]
    out = place.run("runs", "fork", run, "--step", str(steps[1]), "--no-prefect", "--json",
                    "--set", "name=again", "--set", "parallel.stages=3")  # fmt: skip
    told = json.loads(out)
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)
    shown = json.loads(place.said("runs", "show", told["run"], "--json"))
    assert shown["attempts_list"][0]["step"] == steps[1]  # it began there, not from the start
    pins = {c["step"]: c["pins"] for c in json.loads(place.said("ckpt", "ls", run, "--json")) if c["pins"]}
    assert pins == {steps[1]: [f"fork-{told['run']}"]}
    refused = place.here("runs", "fork", run, "--step", str(steps[0]), "--no-prefect", "--json", "--set", "name=again")
    assert refused.code == 78
    assert f"{told['run']} is there already, a fork of step {steps[1]} of {run}" in refused.told


def test_output_is_kept_after_the_processes_are_gone(place: Place, undisturbed: tuple[str, str]) -> None:
    run, _ = undisturbed
    place.train()
    lines = place.said("logs", run, "--rank", "0", "--tail", "8").splitlines()
    assert len(lines) == 8
    assert "end" in [json.loads(line)["event"] for line in lines]  # stdout and stderr are two pipes: no fixed order
    steps = [json.loads(line) for line in place.said("logs", run).splitlines() if '"event":"step"' in line]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))


def test_nothing_is_left_running(place: Place) -> None:
    place.train("train.steps=4")
    place.all_gone()


LLAMA = (
    "model.family=llama", "model.tied=false", "model.heads=4", "model.kv_heads=2", "train.precision=bf16",
    "train.steps=120",
)  # fmt: skip


def test_bf16_and_an_untied_head_through_a_kill_and_another_number_of_stages(place: Place, tmp_path: Path) -> None:
    plain = Place(tmp_path / "plain", LONG)
    try:
        told = plain.train(*LLAMA, "parallel.stages=1")
    finally:
        plain.stop_all()
    assert (told["outcome"], told["attempts"]) == ("succeeded", 1)
    run = told["run"]
    with unleashed(Fault("backward", 1, 9), place.run_folder(run), place.folder / "out") as watcher:
        process = place.start_train(*LLAMA, "parallel.stages=3")
        manifests = place.run_folder(run) / "manifests"
        with caught(
            place.folder, lambda: watcher.poll() is not None and any(manifests.glob("*/manifest")), "the kill", step=12
        ):
            assert watcher.returncode == 0
            ask_to_stop(process, signal.SIGTERM, place.folder / "out")
        first = finish(process)
    assert first.code == 85, first.err
    again = json.loads(place.run("runs", "resume", run, "--no-prefect", "--json", "--set", "parallel.stages=2"))
    assert again["attempts"] > 1
    assert (again["outcome"], again["state_digest"]) == ("succeeded", told["state_digest"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault("send", 3, 20),
        *(pytest.param(Fault(*f), marks=pytest.mark.slow) for f in (("forward", 0, 12), ("agent", 0, 14))),
    ],
    ids=str,
)
def test_two_nodes_and_a_kill_in_one(place: Place, undisturbed: tuple[str, str], fault: Fault) -> None:
    """Four stages on two nodes, each with its supervisor and agent; the parts of both make one checkpoint."""
    run, digest = undisturbed
    with unleashed(fault, place.run_folder(run), place.folder / "out") as watcher:
        result = place.train("parallel.stages=4", "launch.nodes=2")
        assert watcher.wait(60) == 0, f"{fault}: the place was never seen"
    assert (result["run"], result["outcome"], result["step"]) == (run, "succeeded", STEPS)
    assert result["state_digest"] == digest
    shown = json.loads(place.said("ckpt", "ls", run, "--json"))
    assert STEPS in [saved["step"] for saved in shown]  # one of an earlier step may be committed behind it
    place.all_gone()
