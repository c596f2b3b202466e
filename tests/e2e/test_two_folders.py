"""One run, two commands from two folders of one machine: one gang, whoever began it, and the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from checkpoint.claims import Place as Claimed
from checkpoint.store import open_store
from flows.drive.live import MetricsReader
from tests.support.chaos import caught
from tests.support.place import Place, finish
from tests.support.wait import wait_for

pytestmark = pytest.mark.long_run


def supervisors(place: Place) -> list[str]:
    """The folders in which a supervisor works."""
    found = [os.readlink(f"/proc/{pid}/cwd") for pid, line in place.left().items() if "hotstage-engine node" in line]
    return sorted(set(found))  # a shell that is about to become it, and what that forks, have its words too


def steps(place: Place, run: str) -> list[int]:
    """The steps of the first attempt, in the order in which they were told."""
    store = open_store(f"file://{place.folder / 'store'}")
    lines = MetricsReader(store, run).poll([1])
    return [int(line["step"]) for line in lines if line.get("event") == "step"]


def begun(place: Place) -> list[Path]:
    return sorted(place.folder.glob("*/runs/*/*/launch.json"))


def test_at_once_one_of_them_starts_the_gang(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    both = [place.start("train", "spec.toml", "--no-prefect", "--json", "--out", out) for out in ("a", "b")]
    home = wait_for(lambda: supervisors(place), "a supervisor", 60)
    results = [finish(process) for process in both]
    assert [r.code for r in results] == [0, 0], results
    told = [r.json() for r in results]
    assert [(t["run"], t["attempts"], t["state_digest"]) for t in told] == [(run, 1, digest)] * 2
    (only,) = begun(place)
    assert home == [str(only.parent / "node0")]
    assert steps(place, run) == sorted(set(steps(place, run)))


def test_a_later_one_attaches_and_outlives_the_first(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    first = place.start("train", "spec.toml", "--no-prefect", "--json", "--out", "a")
    manifests = place.run_folder(run) / "manifests"
    with caught(place.folder, lambda: any(manifests.glob("*/manifest")), "a checkpoint"):
        with open(place.folder / "words", "wb") as words:
            second = place.start("train", "spec.toml", "--no-prefect", "--json", "--out", "b", err=words)
        said = place.folder / "words"
        wait_for(lambda: "attached: this run works in " in said.read_text(), "it to say where the run works", 60)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        (only,) = begun(place)
        assert str(only.parent) in said.read_text()
        assert supervisors(place) == [str(only.parent / "node0")]
    told = finish(second).json()
    assert (told["outcome"], told["attempts"], told["state_digest"]) == ("succeeded", 1, digest)
    assert steps(place, run) == sorted(set(steps(place, run)))
    place.all_gone()


def test_a_run_of_another_machine_is_watched_and_left_alone(place: Place, undisturbed: tuple[str, str]) -> None:
    """The machine's name and boot in the claim are another's; its gang goes on meanwhile, and ends the run."""
    run, digest = undisturbed
    first = place.start("train", "spec.toml", "--no-prefect", "--json", "--out", "a")
    manifests = place.run_folder(run) / "manifests"
    with caught(place.folder, lambda: any(manifests.glob("*/manifest")), "a checkpoint"):
        (claim,) = (place.run_folder(run) / "live" / "launch").iterdir()
        mine = Claimed.parse(claim.read_bytes(), "the claim")
        other = Claimed("far-away", "another boot", mine.space, mine.folder, mine.token)
        claim.chmod(0o600)
        claim.write_bytes(other.to_bytes())
        said = place.folder / "words"
        with open(said, "wb") as words:
            second = place.start("train", "spec.toml", "--no-prefect", "--json", "--out", "b", err=words)
        wait_for(lambda: "nothing is started here" in said.read_text(), "it to say where the run works", 60)
        assert f"host far-away, folder {mine.folder}" in said.read_text()
        second.send_signal(signal.SIGINT)
        out, _ = second.communicate(timeout=60)
        assert (second.returncode, json.loads(out)["reason"]) == (85, "the gang trains on")
        assert "detaching: the gang trains on where it works" in said.read_text()
        assert len(supervisors(place)) == 1
        assert len(begun(place)) == 1
    told = finish(first).json()
    assert (told["outcome"], told["attempts"], told["state_digest"]) == ("succeeded", 1, digest)


def test_a_run_that_was_ended_elsewhere_goes_on_here(place: Place, undisturbed: tuple[str, str]) -> None:
    """What the command says: cancel it, resume it here. Its nodes said that they have left: nobody waits."""
    run, digest = undisturbed
    first = place.start("train", "spec.toml", "--no-prefect", "--json", "--out", "a")
    manifests = place.run_folder(run) / "manifests"
    with caught(place.folder, lambda: any(manifests.glob("*/manifest")), "a checkpoint"):
        place.said("runs", "cancel", run)
    assert finish(first).code == 1
    place.all_gone()
    (claim,) = (place.run_folder(run) / "live" / "launch").iterdir()
    mine = Claimed.parse(claim.read_bytes(), "the claim")
    claim.chmod(0o600)
    claim.write_bytes(Claimed("far-away", "another boot", mine.space, mine.folder, mine.token).to_bytes())
    done = place.call("runs", "resume", run, "--no-prefect", "--json", "--out", "b")
    assert done.code == 0, done.err
    told = done.json()
    assert (told["outcome"], told["attempts"], told["state_digest"]) == ("succeeded", 2, digest)
    assert "elsewhere" not in done.err
    assert [str(p.relative_to(place.folder)).split("/")[0] for p in begun(place)] == ["a", "b"]
