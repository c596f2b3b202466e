"""Ctrl-C, SIGTERM and a terminal that closes, at any time: nothing is lost, and the next command goes on to the same
bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.support.answers import STOPPED, stopped_after
from tests.support.chaos import caught
from tests.support.place import LONG_STEPS, Done, Place, finish
from tests.support.wait import wait_for

SEED = int(os.environ.get("HOTSTAGE_STOP_SEED", "7"))


def stop_at(place: Place, look: Callable[[], object], what: str, number: int) -> Done:
    """Start, wait for the moment, signal."""
    process = place.start_train()
    wait_for(lambda: look() or process.poll() is not None, what, 60)
    process.send_signal(number)
    return finish(process)


def test_stopped_while_data_is_prepared(place: Place, undisturbed: tuple[str, str]) -> None:
    corpus = place.folder / "corpus"
    words = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = " ".join("".join(words.choices(letters, k=words.randint(2, 9))) for _ in range(400_000))
    (corpus / "big.text").write_text(text)
    temporary = place.folder / "tmp"
    temporary.mkdir()
    place.env["TMPDIR"] = str(temporary)
    for number in (signal.SIGTERM, signal.SIGINT):
        for command in (["train", "spec.toml", "--no-prefect"], ["data", "prepare", "spec.toml"]):
            process = place.start(*command, "--set", "data.source=text:corpus/*.text", "--set", "data.vocab_size=30000")
            assert process.stdout is not None
            while b"training a byte-level BPE" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(number)
            done = finish(process)
            assert done.code == STOPPED, done.err
            assert "the same command goes on" in done.err
            assert not place.left()
            assert not list(temporary.iterdir())
    assert not (place.folder / "store" / "runs").exists()
    assert place.train()["state_digest"] == undisturbed[1]


@pytest.mark.long_run
def test_stopped_at_named_moments(place: Place, undisturbed: tuple[str, str]) -> None:
    """While starting, mid step, while draining, at the very end: each leaves a run that the next command takes up."""
    run, digest = undisturbed
    store = place.run_folder(run)

    def records() -> int:
        return len(list((store / "log").glob("*")))

    def steps() -> int:
        return sum(1 for s in store.glob("live/*/metrics/*") if s.stat().st_size)

    done = stop_at(place, records, "the attempt's record", signal.SIGINT)
    assert done.code == STOPPED, done.err
    assert "nothing was saved yet" in done.err or done.json()["step"] >= 0
    place.all_gone()

    before = steps()
    done = stopped_after(place, lambda: steps() > before, "a step")
    assert done.code == STOPPED, done.err
    middle = done.json()["step"]
    assert 0 < middle < LONG_STEPS
    place.all_gone()

    # draining: the gang saves, and a second signal makes the command leave; the gang ends by itself, and all its node
    process = place.start_train()
    before = steps()
    with caught(place.folder, lambda: steps() > before, "a step"):
        stop_twice(process, process.stderr)
    done = finish(process)
    assert done.code in (128 + signal.SIGTERM, STOPPED), done.err
    place.all_gone()
    assert json.loads(place.said("runs", "show", run, "--json"))["saved_step"] > middle

    # the very end
    done = stop_at(place, lambda: b"ended" in _newest(store / "log"), "the run's end", signal.SIGINT)
    assert done.code == 0, done.err
    assert (done.json()["outcome"], done.json()["state_digest"]) == ("succeeded", digest)
    place.all_gone()
    assert json.loads(place.said("runs", "show", run, "--json"))["state"] == "succeeded"


def stop_twice(process: subprocess.Popen[bytes], said: IO[bytes] | None) -> None:
    """Again once it says that the gang is stopping."""
    process.send_signal(signal.SIGTERM)
    assert said is not None
    while b"stopping: the gang" not in said.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)


def test_a_sweep_that_is_left_at_once_has_all_its_gangs_save_and_end(place: Place) -> None:
    grid = ("--grid", "train.seed=1,2", "--at-once", "2", "--set", "train.steps=1000000")
    process = place.start("sweep", "spec.toml", *grid, "--no-prefect")
    runs = place.folder / "store" / "runs"

    def steps() -> bool:
        return len({one.parts[-5] for one in runs.glob("*/live/*/metrics/*") if one.stat().st_size}) == 2

    wait_for(lambda: steps() or process.poll() is not None, "steps of both", 60)
    stop_twice(process, process.stdout)
    done = finish(process)
    assert done.code in (128 + signal.SIGTERM, STOPPED), done.err
    place.all_gone()
    rows = json.loads(place.said("runs", "ls", "--json"))
    assert [row["saved_step"] > 0 for row in rows] == [True, True], rows


def _newest(log: Path) -> bytes:
    names = sorted(log.glob("[0-9]*"))
    return names[-1].read_bytes() if names else b""


@pytest.mark.slow
def test_stopped_at_seeded_moments(place: Place, undisturbed: tuple[str, str]) -> None:
    """Whenever a signal comes, from the interpreter's start to the end: the next command goes on to the same bits."""
    run, digest = undisturbed
    dice = random.Random(SEED)
    print(f"HOTSTAGE_STOP_SEED={SEED}")
    begin = time.monotonic()
    place.run("plan", "spec.toml")
    about = 2 * (time.monotonic() - begin)  # of the order of a whole run here, however busy the machine is
    for _ in range(4):
        process = place.start_train()
        delay, number = dice.uniform(0, about), dice.choice([signal.SIGINT, signal.SIGTERM])
        print(f"signal {number} after {delay:.3f} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(number)
        done = finish(process)
        print(f"exit code {done.code}")
        # 130 and a death by the signal itself: before the command had begun its work
        assert done.code in (0, STOPPED, 130, -signal.SIGINT, -signal.SIGTERM), done.out + done.err
        place.all_gone()
    result = place.train()
    assert (result["run"], result["outcome"], result["state_digest"]) == (run, "succeeded", digest)


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, place: Place, *args: str) -> None:
        self.ours, theirs = pty.openpty()

        def prepare() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup have it ignored

        env = place.env | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        self.process = subprocess.Popen(
            place.command(*args), cwd=place.folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=prepare,
        )  # fmt: skip
        os.close(theirs)
        self.said = b""

    def read_until(self, words: bytes) -> None:
        while words not in self.said:
            self.said += os.read(self.ours, 4096)

    def read_to_its_end(self) -> int:
        with contextlib.suppress(OSError):  # the end of the terminal
            while block := os.read(self.ours, 4096):
                self.said += block
        return self.process.wait(60)

    def close(self) -> int:
        """As somebody who closes the window; the exit code."""
        os.close(self.ours)
        return self.process.wait(60)


@pytest.fixture
def terminal(place: Place) -> Iterator[Callable[..., Terminal]]:
    """What opens one, of a command in the place."""
    opened: list[Terminal] = []

    def opener(*args: str) -> Terminal:
        opened.append(Terminal(place, *args))
        return opened[-1]

    yield opener
    for one in opened:
        with contextlib.suppress(OSError):
            os.close(one.ours)
        one.process.kill()
        one.process.wait()


TRAIN = ("train", "spec.toml", "--no-prefect")


@pytest.mark.long_run
def test_two_ctrl_c_at_a_terminal_leave_it_running(
    place: Place, undisturbed: tuple[str, str], terminal: Callable[..., Terminal]
) -> None:
    run, digest = undisturbed
    one = terminal(*TRAIN)
    store = place.run_folder(run)
    with caught(place.folder, lambda: any(store.glob("live/*/metrics/*")), "a step"):
        one.process.send_signal(signal.SIGINT)
        one.read_until(b"again within")
        one.process.send_signal(signal.SIGINT)
        assert one.read_to_its_end() == 128 + signal.SIGINT, one.said.decode()
    assert b"the run goes on by itself" in one.said
    result = place.train()
    assert (result["outcome"], result["attempts"], result["state_digest"]) == ("succeeded", 1, digest)


@pytest.mark.long_run
def test_a_terminal_that_closes_takes_its_command_and_not_the_run(
    place: Place, undisturbed: tuple[str, str], terminal: Callable[..., Terminal]
) -> None:
    """Neither the one that attached nor the one that began it."""
    run, digest = undisturbed
    first = terminal(*TRAIN)
    with caught(place.folder, lambda: any(place.run_folder(run).glob("live/*/metrics/*")), "a step"):
        second = terminal(*TRAIN)
        second.read_until(run.encode())
        assert second.close() == 128 + signal.SIGHUP
        assert first.process.poll() is None
        assert first.close() == 128 + signal.SIGHUP
    result = place.train()
    found = (result["outcome"], result["attempts"], result["state_digest"])
    assert found == ("succeeded", 1, digest), place.said("runs", "show", run)
