"""Bad input through the real command: a readable message, an exit code of its own, nothing lost, nothing left running.

Where a run had begun, it is mended and resumed to the undisturbed run's bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint.codec import pack
from checkpoint.store import open_store
from tests.support.answers import DATA, LOST, REFUSED, STOPPED, refused, resumed, stopped_after
from tests.support.chaos import caught
from tests.support.hostile_s3 import hostile_s3
from tests.support.place import LEARNT, STEPS, Done, Place, finish
from tests.support.undisturbed import undisturbed_run
from tests.support.wait import wait_for
from trainer.dataset import write_shard


def train(place: Place, *sets: str) -> Done:
    return finish(place.start_train(*sets))


# --- the spec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["train.stepz=3"], ["no key train.stepz", "did you mean train.steps"]),
        (["model.width=-64"], ["model.width -64", "at least 1"]),
        (["model.heads=3"], ["model.heads 3", "width 32", "take heads = 2"]),
        (["parallel.stages=9"], ["parallel.stages 9", "model.layers 4", "at most 4 stages"]),
        (["train.microbatch=3"], ["train.batch 8", "microbatch 3", "take microbatch = 2"]),
        (
            ["train.batch=30000000", "train.microbatch=1"],
            ["30000000 microbatches", "limit is 65536", "microbatch = 480"],
        ),
        (["train.batch=2147483646", "train.microbatch=1048573"], ["microbatch 1048573", "= 1015839"]),
        (["train.sequence=100000"], ["train.sequence 100000", "context 64"]),
        (["checkpoint.every=-1"], ["checkpoint.every -1", "at least 0"]),
        (["model.family=gpt9"], ["gpt9", "gpt2"]),
        (["launch.fabric=efa"], ["launch.fabric = 'efa' is for ranks on GPUs alone", "set launch.fabric = 'tcp'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_spec_that_cannot_be(place: Place, sets: list[str], words: list[str]) -> None:
    refused(place.refused_train(*sets), REFUSED, *words)
    assert not (place.folder / "store").exists()  # refused before anything is written
    assert not (place.folder / "out").exists()


def test_a_file_that_is_no_spec(place: Place) -> None:
    spec = place.folder / "spec.toml"
    text = spec.read_text()
    spec.write_text(text + "[train]\n")
    refused(place.refused_train(), REFUSED, "spec.toml")
    spec.write_text(text.replace("steps", "stepz"))
    refused(place.refused_train(), REFUSED, "spec.toml", "train.stepz", "train.steps")
    refused(place.here("train", "nothing.toml", "--no-prefect"), REFUSED, "nothing.toml")


def test_names_that_do_not_exist(place: Place) -> None:
    for command in (["runs", "resume"], ["ckpt", "ls"]):
        done = place.here(*command, "nobody-123456")
        refused(done, REFUSED, "nobody-123456", "--store")


def test_a_file_for_a_result_that_cannot_be_written(place: Place) -> None:
    (place.folder / "file").write_text("not a folder")
    for command in (
        ("plan", "spec.toml", "--svg", "file/plan.svg"),
        ("plan", "spec.toml", "--trace", "/proc/none/plan.json"),
        ("demo", "--no-prefect", "--out", "file"),
    ):
        refused(place.here(*command), REFUSED, command[-1], "cannot be written", "choose another")
    refused(place.here("train", "spec.toml", "--no-prefect", "--out", "file"), REFUSED, "file", "with --out")
    assert (place.folder / "file").read_text() == "not a folder"


# --- the corpus --------------------------------------------------------------------------------------------


def test_a_corpus_that_is_not_there_or_empty(place: Place) -> None:
    refused(place.refused_train("data.source=text:none/*.txt"), DATA, "none/*.txt", "matches no file")
    (place.folder / "corpus" / "empty.text").write_text(" \n\n")
    refused(place.refused_train("data.source=text:corpus/*.text"), DATA, "corpus/*.text", "empty")
    (place.folder / "corpus" / "a.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    refused(place.refused_train("data.source=jsonl:corpus/*.jsonl"), DATA, "a.jsonl:2", "mend the line")
    refused(place.refused_train(f"data.source=dataset:{'0' * 64}"), DATA, "000000", "data prepare")
    (place.folder / "corpus" / "short.text").write_text("abc")
    refused(place.refused_train("data.source=text:corpus/*.text"), REFUSED, "train.sequence 16", "add text")


def foreign_dataset(place: Place, tokens: np.ndarray, vocab: int) -> str:
    """A dataset whose every digest holds, as another program may have written it."""
    store = open_store((place.folder / "store").as_uri())
    path = place.folder / "shard"
    write_shard(path, tokens, int(tokens.max()) + 1)
    shard = bytearray(path.read_bytes())
    honest = place.folder / "honest"
    write_shard(honest, np.zeros_like(tokens), vocab)
    shard[: len(shard) - tokens.nbytes] = honest.read_bytes()[: len(shard) - tokens.nbytes]  # the header tells of vocab
    digest = hashlib.sha256(shard).hexdigest()
    tokenizer = b"{}"
    manifest = pack(
        {
            "v": 1,
            "source": "text:elsewhere",
            "inputs": "0" * 64,
            "vocab": vocab,
            "token_bytes": 2,
            "eot": None,
            "shards": [{"tokens": len(tokens), "bytes": len(shard), "sha256": digest}],
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        }
    )
    name = hashlib.sha256(manifest).hexdigest()
    store.create(f"data/{name}/00000.bin", bytes(shard))
    store.create(f"data/{name}/tokenizer.json", tokenizer)
    store.create(f"data/{name}/manifest", manifest)
    return name


def test_a_token_beyond_the_vocabulary(place: Place) -> None:
    tokens = (np.arange(4001) * 7 % 61).astype(np.uint16)
    tokens[2000:2200] = 99
    name = foreign_dataset(place, tokens, 61)
    done = train(place, f"data.source=dataset:{name}", "train.steps=40")
    refused(done, DATA, "99", "61")
    place.all_gone()


def test_a_shard_cut_short_or_changed(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    place.said("data", "prepare", "spec.toml")
    shard = next((place.folder / "store" / "data").glob("*/00000.bin"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-100])
    refused(place.refused_train(), DATA, "00000.bin", "data prepare SPEC --again")
    shard.write_bytes(good[:-2] + b"\xff\xff")
    refused(train(place), DATA, "00000.bin", "damaged", "data prepare SPEC --again", "runs resume")
    place.all_gone()
    place.said("data", "prepare", "spec.toml", "--again")  # what the message says to do
    assert shard.read_bytes() == good
    resumed(place, run, digest)


# --- the plan ----------------------------------------------------------------------------------------------


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def _version(data: bytes) -> bytes:
    return data[:8] + (7).to_bytes(4, "little") + data[12:]


@pytest.mark.parametrize("damage", [_cut, _flip, _version])
def test_a_plan_object_that_does_not_hold(
    place: Place, undisturbed: tuple[str, str], damage: Callable[[bytes], bytes]
) -> None:
    """Damaged under the driver's nose (the agent refuses it), then before the next command (which says so)."""
    run, digest = undisturbed
    store = place.run_folder(run)
    # the attempt is there, but no node: the agent fetches the plan when the next command launches it
    process = place.start_train("recovery.backoff_s=0.01")
    wait_for(lambda: any((store / "plans").glob("*")), "the plan", 60)
    plan = next((store / "plans").glob("*"))
    good = plan.read_bytes()
    plan.write_bytes(damage(good))
    done = finish(process)
    if done.code != 0:  # else the agent was faster
        refused(done, REFUSED, f"plans/{plan.name}", "does not hold", "remove that object")
    place.all_gone()
    if done.code != 0:
        refused(place.here("runs", "resume", run, "--no-prefect"), REFUSED, f"plans/{plan.name}", "damaged", "remove")
        plan.unlink()
        resumed(place, run, digest)


# --- the checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["chunks", "manifests"])
@pytest.mark.long_run
def test_a_damaged_checkpoint_is_said_loudly_and_the_one_before_is_used(
    place: Place, undisturbed: tuple[str, str], what: str
) -> None:
    run, digest = undisturbed
    store = place.run_folder(run)
    done = stopped_after(place, lambda: len(list(store.glob("manifests/*/manifest"))) > 1, "two checkpoints")
    assert done.code == STOPPED, done.err
    place.all_gone()
    newest = max((store / what).iterdir(), key=lambda folder: folder.name)
    victim = min((path for path in newest.rglob("*") if path.is_file() and "parts" not in path.parts), key=str)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    told = place.here("ckpt", "verify", run)
    assert told.code == 76, told.out + told.err
    assert (told.out + told.err).count("DAMAGED") == told.out.count("DAMAGED") == 1, told.out + told.err
    assert victim.name in told.out
    again = place.call("runs", "resume", run, "--no-prefect", "--json")
    assert again.code == 0, again.err
    assert (again.json()["outcome"], again.json()["state_digest"]) == ("succeeded", digest)
    assert re.search(r"WARNING: checkpoint record \d+ is damaged .*an older one is used", again.err), again.err


@pytest.mark.long_run
def test_a_run_without_a_sound_checkpoint_does_not_begin_again_by_itself(
    place: Place, undisturbed: tuple[str, str]
) -> None:
    run, digest = undisturbed
    store = place.run_folder(run)
    spec = place.folder / "spec.toml"
    spec.write_text(spec.read_text().replace("every = 4", "every = 20"))  # few checkpoints: each is read twice
    done = stopped_after(place, lambda: list(store.glob("manifests/*/manifest")), "a checkpoint")
    assert done.code == STOPPED, done.err
    place.all_gone()
    for manifest in store.glob("manifests/*/manifest"):
        manifest.write_bytes(_flip(manifest.read_bytes()))
    done = place.call("runs", "resume", run, "--no-prefect")
    assert done.code == 76, done.out + done.err
    for word in ("log records", "step 0", "ckpt verify", "runs fork", "--begin-anew"):
        assert word in done.told, done.err
    assert place.here("runs", "resume", run, "--no-prefect").code == 76  # nor does the next command
    resumed(place, run, digest, "--begin-anew")


# --- the store ---------------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_written(place: Place) -> None:
    (place.folder / "file").write_text("not a folder")
    for url in ("file", "file/deeper"):
        place.env["HOTSTAGE_STORE"] = str(place.folder / url)
        refused(place.refused_train(), REFUSED, "file", "correct --store")
    place.env["HOTSTAGE_STORE"] = "ftp://somewhere"
    refused(place.refused_train(), REFUSED, "ftp://somewhere", "file:///", "s3://")
    assert (place.folder / "file").read_text() == "not a folder"


def test_a_store_whose_name_holds_anything(place: Place, undisturbed: tuple[str, str]) -> None:
    """Command, driver and agents mean the same folder."""
    _, digest = undisturbed
    name = "a%41 #1?x=y&z:~\n[ü]"
    place.env["HOTSTAGE_STORE"] = str(place.folder / name)
    done = train(place)
    assert done.code == 0, done.err
    assert done.json()["state_digest"] == digest
    assert (place.folder / name / "runs").is_dir()
    assert not [path.name for path in place.folder.iterdir() if path.name.startswith("a") and path.name != name]
    place.all_gone()


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs at the folder; gives what mounts it anew with other options. Skips where this user may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")

    def again(changed: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{changed}", str(folder)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filled(rest: Path, pages: int) -> None:
    """The file takes what its file system has but for so many pages."""
    with contextlib.suppress(OSError), open(rest, "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    os.truncate(rest, rest.stat().st_size - pages * 4096)


def test_a_store_that_is_read_only(place: Place) -> None:
    with mounted(place.folder / "ro", "size=8m,ro"):
        place.env["HOTSTAGE_STORE"] = str(place.folder / "ro")
        refused(place.refused_train(), REFUSED, str(place.folder / "ro"), "Read-only", "mount it writable")
        place.stop_all()


def test_a_work_folder_whose_disk_is_full(place: Place) -> None:
    """Not even the mark of an agent that starts can be kept there: the command says why."""
    tiny = place.folder / "tiny"
    with mounted(tiny, "size=256k"):
        filled(tiny / "rest", 4)  # the launch's own files
        done = place.call("train", "spec.toml", "--no-prefect", "--json", "--out", str(tiny))
        refused(done, LOST, str(tiny), "that folder's disk is full: free space, or choose another with --out")
        place.stop_all()


def test_a_store_that_fills_up_costs_checkpoints_and_nothing_else(place: Place, undisturbed: tuple[str, str]) -> None:
    """Training goes on; the terminal says why nothing is saved; with room again the same attempt ends well. Full to the
    last byte: no agent can say what it lacks, and nothing at all was said then.
    """
    _, digest = undisturbed
    small = place.folder / "small"
    with mounted(small, "size=8m") as remount:
        place.env["HOTSTAGE_STORE"] = str(small)
        process = place.start_train()
        try:
            with caught(place.folder, lambda: list(small.glob("runs/*/manifests/*/manifest")), "a checkpoint"):
                filled(small / "rest", 0)  # not by checkpoints: how many there are depends on the machine
            said = b""
            assert process.stderr is not None
            while b"is full" not in said:
                line = process.stderr.readline()
                assert line, said.decode()
                said += line
            assert b"free space and it goes on" in said
            remount("size=256m")
            done = finish(process)
            assert done.code == 0, done.err
            assert (done.json()["attempts"], done.json()["state_digest"]) == (1, digest)
        finally:
            place.stop_all()


@pytest.mark.long_run
def test_a_stop_that_could_not_save_says_so(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    with mounted(place.folder / "small", "size=6m") as remount:
        place.env["HOTSTAGE_STORE"] = str(place.folder / "small")
        process = place.start_train("checkpoint.commit_s=1")
        try:
            assert process.stderr is not None
            while b"is full" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            done = finish(process)
            if done.code == STOPPED:  # else the last step had come before the signal
                assert "will be trained again" in done.json()["reason"]
            place.all_gone()
            remount("size=256m")
            resumed(place, run, digest, "--set", "checkpoint.commit_s=60")
        finally:
            place.stop_all()


@pytest.mark.slow
def test_a_store_that_stays_full(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The last state cannot be saved: that is no success, and it says so. With room again the run goes on.

    Its chunks are larger than what a checkpoint leaves of the store: records of the log have room there to the end.
    """
    _, run, digest = undisturbed_run(tmp_path_factory, LEARNT)
    place = Place(tmp_path / "p", LEARNT)
    with mounted(place.folder / "small", "size=6m") as remount:
        place.env["HOTSTAGE_STORE"] = str(place.folder / "small")
        try:
            done = train(place, "checkpoint.commit_s=0.3", "recovery.backoff_max_s=0.05")
            refused(done, LOST, "is full", "step 60", "runs resume")
            assert done.json()["outcome"] == "gave_up"
            assert done.json()["step"] < STEPS
            place.all_gone()
            remount("size=256m")
            resumed(place, run, digest, "--set", "checkpoint.commit_s=60")
        finally:
            place.stop_all()


def test_a_store_that_cannot_order_writers(place: Place) -> None:
    with hostile_s3() as server:
        server.ignore_conditions = True
        place.env |= {"HOTSTAGE_STORE": server.url(), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        refused(place.refused_train(), REFUSED, "cannot order writers", "racing creators", "--store")
        assert not [name for name in server.objects if "/runs/" in name or "/data/" in name]


# --- the machine -------------------------------------------------------------------------------------------


def test_a_port_in_use(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = train(place, f"launch.port_base={port}")
    refused(done, REFUSED, f"127.0.0.1:{port}", "in use", "launch.port_base", "runs resume")
    place.all_gone()
    resumed(place, run, digest, "--set", "launch.port_base=0")


def test_a_checkpoint_of_another_model(place: Place) -> None:
    run = place.train("train.steps=8")["run"]
    before = json.loads(place.said("ckpt", "digest", run, "--json"))
    done = place.here("runs", "fork", run, "--no-prefect", "--json", "--set", "name=wide", "--set", "model.width=48")
    refused(done, REFUSED, "model", "start a new run")
    # the context is a tensor's shape for GPT-2
    done = place.here(
        *("runs", "fork", run, "--no-prefect", "--json", "--set", "name=long", "--set", "train.steps=20"),
        *("--set", "model.context=128"),
    )
    refused(done, REFUSED, "wpe", "(64, 32)", "start a new run")
    place.all_gone()
    assert json.loads(place.said("ckpt", "digest", run, "--json")) == before
