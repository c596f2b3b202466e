"""``ckpt pin``, ``unpin``, ``gc`` and what ``ckpt ls`` says of it, in a folder: words, exit codes, and JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.log import RunLog
from checkpoint.store import Store, open_store
from flows.cli.main import exit_code_of
from flows.page.artifacts import files_markdown
from tests.checkpoint.samples import WHAT, attempt_body, point_body
from tests.support.small_checkpoints import RUN, begin, names, save, upload

HOW = {"parallel": {"stages": 2}}
MODEL = {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 8, "vocab": 16}
KEEP: dict[str, Any] = {**HOW, "checkpoint": {"keep": {"last": 2, "every_steps": 40, "grace_s": 3600.0}}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("HOTSTAGE_STORE", str(tmp_path / "store"))
    return open_store((tmp_path / "store").as_uri())


def made(store: Store, run: str = RUN, how: dict[str, Any] | None = None, steps: int = 60) -> RunLog:
    """A run of so many steps, a checkpoint each ten."""
    log = RunLog(store, run, writer="driver")
    store.create(keys.index_key(run), b"")
    what = {"train": {"steps": steps, "optimizer": {}}, "data": {"digest": WHAT.hex()}, "model": MODEL}
    store.create(keys.spec_key(run), pack(what))
    state = begin(log, log.fold(), how or KEEP)
    for step in range(10, steps + 10, 10):
        state = save(store, log, state, step)
    return log


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert exit_code_of(["ckpt", *arguments]) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_what_a_person_sees_of_a_pass(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made(store)
    text = said(capsys, "gc", RUN, "--dry-run")
    assert text.splitlines() == [
        f"{RUN}: keeps 4 checkpoint(s)",
        "       2  one of the newest 2",
        "       2  the first of 40 steps",
        "  would be given up: step 20, 30; the objects go 3600 s later",
    ]
    assert "given up: step 20, 30; the objects go 3600 s later" in said(capsys, "gc")
    text = said(capsys, "gc", RUN, "--json")
    told = json.loads(text)[0]
    assert {row["step"] for row in told["kept"]} == {10, 40, 50, 60}
    assert [(w["step"], w["objects"], w["why"]) for w in told["waiting"]] == [(20, 5, "given up"), (30, 5, "given up")]
    assert all(3000 < w["wait_s"] <= 3601 for w in told["waiting"])
    waiting = r"  waiting: 10 objects, 0.0 MB of step 20, 30 \(given up, the last in 3\d\d\d s\)"
    assert re.search(waiting, said(capsys, "gc", RUN))
    listed = said(capsys, "ls", RUN)
    assert [line.split()[1] for line in listed.splitlines()[1:-1]] == ["10", "40", "50", "60"]
    assert listed.splitlines()[-1] == "and 2 that the rules of the run gave up"


def test_a_run_shows_its_newest_checkpoints_in_order(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits of short steps come in any order, and a run may have thousands."""
    monkeypatch.setattr("flows.cli.runs.CHECKPOINTS_SHOWN", 2)
    log = made(store, steps=0)
    state = log.fold()
    for step in 20, 10, 30:
        state = save(store, log, state, step)
    assert exit_code_of(["runs", "show", RUN, "--store", store.url]) == 0
    text = capsys.readouterr().out
    assert f"  1 older: hotstage ckpt ls {RUN} --store {store.url}" in text
    assert re.findall(r"checkpoint at step +(\d+)", text) == ["20", "30"]
    assert re.findall(r"^step +(\d+)", said(capsys, "ls", RUN), re.MULTILINE) == ["10", "20", "30"]
    assert [c["step"] for c in json.loads(said(capsys, "ls", RUN, "--json"))] == [10, 20, 30]
    back = state.at_step(10)
    assert back is not None
    state = save(store, log, begin(log, state, checkpoint=back.n, step=10), 20)
    assert [line.split()[1] for line in said(capsys, "ls", RUN).splitlines()[1:]] == ["10", "20", "30", "20"]
    page = files_markdown(RUN, store, "", state)
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["20", "30", "20", "10"]


def test_rules_of_the_command_line_and_of_nobody(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    log = made(store, how=HOW)
    assert "keeps every checkpoint (checkpoint.keep is not set)" in said(capsys, "gc", RUN)
    assert "keeps every checkpoint" in said(capsys, "gc", RUN, "--grace-s", "0")  # alone it is no rule
    assert not log.fold().buried
    assert "given up: step 10, 20, 30; the objects go 3600 s later" in said(capsys, "gc", RUN, "--last", "3")
    assert said(capsys, "gc", RUN, "--last", "1", code=2)
    assert said(capsys, "gc", RUN, "--every-s", "-1", code=2)


def test_pins(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made(store)
    assert (
        said(capsys, "pin", RUN, "mine", "--step", "20") == f"{RUN}: the checkpoint of step 20 stays, pinned as mine\n"
    )
    assert "no usable checkpoint at step 25; it has" in said(capsys, "pin", RUN, "other", "--step", "25", code=78)
    assert "the pin 'mine' of run" in said(capsys, "pin", RUN, "mine", code=78)
    assert "must be letters" in said(capsys, "pin", RUN, "a b", code=78)
    said(capsys, "gc", RUN)
    assert "step       20  attempt   1" in said(capsys, "ls", RUN)
    assert "pinned: mine" in said(capsys, "ls", RUN)
    assert "no usable checkpoint at step 30" in said(capsys, "pin", RUN, "late", "--step", "30", code=78)
    assert f"{RUN} has no pin 'none'; its pins: mine" in said(capsys, "unpin", RUN, "none", code=78)
    assert said(capsys, "unpin", RUN, "mine") == f"{RUN}: the pin mine is gone\n"
    assert "given up: step 20;" in said(capsys, "gc", RUN)


def test_a_pin_that_a_fork_begins_from_says_so_when_it_goes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    log = made(store)
    found = log.fold().at_step(50)
    assert found is not None
    child = RunLog(store, "child-0a1b2c", writer="test")
    body = {"kind": "parent", "run": RUN, "checkpoint": found.n, "step": 50, "state_digest": found.state_digest}
    state = child.append("intervention", body, child.fold())
    for words in (
        "child-0a1b2c has saved nothing of its own",
        f"`hotstage ckpt pin {RUN} fork-child-0a1b2c --step 50`",
    ):
        said(capsys, "pin", RUN, "fork-child-0a1b2c", "--step", "50")
        assert words in said(capsys, "unpin", RUN, "fork-child-0a1b2c")
    state = child.append("attempt", attempt_body(), state)
    child.append("checkpoint", point_body(60, state.epoch), state, epoch=state.epoch)
    for name in ("fork-child-0a1b2c", "fork-nobody-0a1b2c"):
        said(capsys, "pin", RUN, name, "--step", "50")
        assert said(capsys, "unpin", RUN, name) == f"{RUN}: the pin {name} is gone\n"


def test_one_run_that_cannot_be_collected_does_not_keep_the_others(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    made(store, "a-0a1b2c", {**HOW, "checkpoint": {"keep": {"moon": 1}}})
    lacking = made(store, "b-0a1b2c")
    made(store, "c-0a1b2c")
    newest = lacking.fold().at_step()
    assert newest is not None
    store.delete(keys.run_key("b-0a1b2c", keys.part_name(60, newest.epoch, 1)))
    store.create(keys.run_key("c-0a1b2c", "chunks/what"), b"")
    upload(store, "c-0a1b2c", 70, 1, 0, 2)
    text = said(capsys, "gc", code=76)
    assert "a-0a1b2c: not collected: checkpoint.keep has the rule 'moon'" in text
    assert "NOTHING IS GIVEN UP: the checkpoint of step 60 stays, but its object manifests/" in text
    assert "left alone, names that hotstage does not know: chunks/what" in text
    assert [bool(RunLog(store, f"{run}-0a1b2c").fold().buried) for run in "abc"] == [False, False, True]
    assert any("000000000070" in name for name in names(store, "c-0a1b2c", "chunks/"))


def test_an_empty_store(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no runs" in said(capsys, "gc")
