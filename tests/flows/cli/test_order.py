"""``runs order`` and what ``runs show`` and ``ckpt show`` tell of it, on a copy of a run that has ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import Damaged
from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.cli.main import _names_store, exit_code_of, to_type
from flows.drive.run import find_run
from tests.flows.conftest import Trained
from tests.support.calls import outcome
from tests.support.place import STEPS
from trainer.errors import SpecError


class Copy:
    def __init__(self, folder: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(trained.place.folder / "store", folder)
        self.url, self.run, self.capsys = folder.as_uri(), trained.run, capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command says."""
        found = exit_code_of([*words[:2], self.run, *words[2:], "--store", self.url])
        said = self.capsys.readouterr()
        assert found == code, said
        return said.out if code == 0 else said.err

    @property
    def late(self) -> int:
        """A step late in the run that the store has: a slow upload leaves some out."""
        return max(c.step for c in RunLog(open_store(self.url), self.run).fold().checkpoints if c.step < 50)

    @property
    def records(self) -> int:
        return RunLog(open_store(self.url), self.run).fold().n


@pytest.fixture
def copy(tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> Copy:
    return Copy(tmp_path / "store", trained, capsys)


def test_a_broken_run_beside_others(copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One row of the list; and what lies beside the names of runs is none."""
    store, run = tmp_path / "store", copy.run

    def rows(*more: str) -> dict[str, tuple[str, int]]:
        code, said, _ = outcome(["runs", "ls", "--json", "--store", copy.url, *more])
        assert code == 0
        return {row["run"]: (row["state"], row["steps"]) for row in json.loads(said)}

    unread = f"no-log-{'x' * 33}-bbbbbb"
    before = rows()  # other tests have runs there too
    assert before[run] == ("succeeded", STEPS)
    for other, broken in (("no-spec-aaaaaa", "spec"), (unread, f"log/{1:020}")):
        shutil.copytree(store / "runs" / run, store / "runs" / other)
        (store / "runs" / other / broken).unlink()
        shutil.copy(store / "index" / run, store / "index" / other)
    (store / "runs" / unread / f"log/{1:020}").write_bytes(b"no record")
    shutil.copy(store / "index" / run, store / "index" / f"{run}_copy")
    shutil.copy(store / "index" / run, store / "index" / "removed-cccccc")  # by hand, and its name was left
    (store / "runs/removed-cccccc/live").mkdir(parents=True)
    (store / "runs/removed-cccccc/live/collected").touch()
    unreadable = {unread: ("unreadable", STEPS)}
    assert rows() == {**before, "no-spec-aaaaaa": ("succeeded", 0), "removed-cccccc": ("gone", 0), **unreadable}
    assert outcome(["runs", "show", "removed-cccccc", "--store", copy.url])[0] == 78
    assert rows("--state", "unreadable") == unreadable
    caplog.clear()
    for words in ((), ("--json",)):
        code, said, _ = outcome(["runs", "show", unread, "--store", copy.url, *words])
        assert code == Damaged.exit_code
        assert "unreadable" in said
    assert caplog.text.count("nobody may write") == 2
    head, *lines = outcome(["runs", "ls", "--store", copy.url])[1].splitlines()  # columns, however long a name is
    states = {name: state for name, (state, _) in rows().items()}
    assert {line.index(f" {states[line.split()[0]]} ") + 1 for line in lines} == {head.index("state")}


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--skip", "x"], 2, "'x' is no range of batches; write it as 121-140"),
    ([], 2, "say what to order"),
    (["--skip", "3-4"], 78, "has read the batches up to 60; go back before them (--rollback-to 0)"),
    (["--rollback-to", "9"], 78, "no usable checkpoint of that step; it can go back to 0, 4, "),
    (["--lr-scale", "2", "--rollback-to", "4"], 78, "A higher rate is another run: hotstage runs fork "),
    (["--steps", "90"], 78, "the cosine's rate is 0 from step 60 on"),
    (["--set", "train.steps=90"], 78, "or, to end it at another step, --steps N"),
    (["--set", "train.lr=3"], 78, "or, to lower its rate, --lr-scale FACTOR"),
    (["--set", "lr=1e-2"], 78, "changes what is trained, and a run's What is fixed"),
    (["--set", "stages=2", "--set", "seed=5"], 78, "--set seed=5 changes what is trained"),
    (["--set", '"train".seed=5'], 78, "changes what is trained"),
])  # fmt: skip
def test_what_cannot_be_ordered_is_refused_and_nothing_is_written(
    copy: Copy, words: list[str], code: int, says: str
) -> None:
    before = copy.records
    assert says in copy("runs", "order", *words, code=code)
    assert copy.records == before


def test_a_rollback_that_was_ordered_twice_is_so_already(copy: Copy) -> None:
    words = ["--rollback-to", str(copy.late), "--lr-scale", "0.5"]
    assert f"goes on from step {copy.late}" in copy("runs", "order", *words)
    assert "nothing to order, it is so already" in copy("runs", "order", *words)


def test_the_name_in_a_spec_is_a_runs_name_also_where_others_begin_with_it(copy: Copy) -> None:
    store, name = open_store(copy.url), copy.run.rpartition("-")[0]
    store.create(f"index/{name}-import-0a1b2c", b"")
    assert find_run(store, name) == copy.run
    store.create(f"index/{name}-0a1b2c", b"")
    with pytest.raises(SpecError, match="write more of the name"):
        find_run(store, name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_beginning_of_the_only_run(copy: Copy, name: str) -> None:
    """``hotstage runs cancel "$RUN"``, where the shell has no such variable."""
    with pytest.raises(SpecError, match="the name of the run is empty: write it; is a variable of the shell unset"):
        find_run(open_store(copy.url), name)


def test_who_looks_writes_no_plan(copy: Copy, tmp_path: Path) -> None:
    """An identity that may only read exports, generates and reports."""
    store = open_store(copy.url)
    for info in list(store.list(f"runs/{copy.run}/plans/")):
        store.delete(info.key)
    copy("ckpt", "export", "-o", str(tmp_path / "out"))
    assert exit_code_of(["generate", copy.run, "--prompt", "a", "--tokens", "1", "--store", copy.url]) == 0
    assert exit_code_of(["report", copy.run, "-o", str(tmp_path / "r.html"), "--store", copy.url]) == 0
    assert not list(store.list(f"runs/{copy.run}/plans/"))


def test_damage_is_told_with_what_to_do(copy: Copy, tmp_path: Path) -> None:
    store = open_store(copy.url)
    for info in list(store.list(f"runs/{copy.run}/chunks/")):
        path = Path(copy.url.removeprefix("file://")) / info.key
        path.write_bytes(bytes(path.stat().st_size))
    said = copy("ckpt", "export", "-o", str(tmp_path / "out"), code=76)
    assert f"are not what was saved; `hotstage ckpt verify RUN --store {copy.url}` names all" in said


def test_a_step_that_is_not_there_is_told_with_some_that_are(copy: Copy) -> None:
    said = copy("ckpt", "digest", "--step", "7", code=78)
    assert "no usable checkpoint at step 7; it has 4, " in said
    assert copy("ckpt", "verify", "--full") == copy("ckpt", "verify")


def test_an_order_is_told_and_repeated_it_is_none(copy: Copy) -> None:
    assert "has succeeded, and nothing is left to do" in copy("runs", "order", "--set", "checkpoint.every=8")
    assert json.loads(copy("runs", "order", "--steps", str(STEPS), "--json")) is None
    late = copy.late
    words = ["--skip", "50", "--skip", "52-53", "--rollback-to", str(late), "--steps", "58"]
    said = copy("runs", "order", *words)
    assert f"{copy.run}: goes on from step {late}, skips batches 50, 52-53, ends at step 58" in said
    assert f"hotstage runs resume {copy.run} --store {copy.url}\n" in said  # not that of another store
    # from here on that is the run, for whoever looks
    told: dict[str, Any] = json.loads(copy("runs", "show", "--json"))
    assert (told["state"], told["saved_step"], told["steps"], told["reason"]) == ("open", late, 58, "")
    assert told["orders"][0]["amends"] == f"goes on from step {late}, skips batches 50, 52-53, ends at step 58"
    assert [c["step"] for c in told["checkpoints"] if c["left"]] == [
        c["step"] for c in told["checkpoints"] if c["step"] > late
    ]
    assert "(left: the run went on from an earlier step)" in copy("runs", "show")
    assert json.loads(copy("ckpt", "show", "--json"))["step"] == late
    assert "batches 50, 52-53 are skipped already" in copy("runs", "order", "--skip", "50-53", code=78)


def test_what_is_to_be_typed_next_names_the_store(copy: Copy) -> None:
    """Also where the words come from a package that knows neither the store nor quotes."""
    refused = copy("runs", "order", "--set", "train.optimizer.weight_decay=0.2", code=78)
    asked = f"hotstage runs fork {copy.run} --store {copy.url} --step N --set train.optimizer.weight_decay=0.2"
    assert asked in refused
    rate = copy("runs", "order", "--lr-scale", "2", code=78)
    assert f"hotstage runs fork {copy.run} --store {copy.url} --set train.optimizer.lr=…" in rate


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("`hotstage ckpt verify RUN` names it", "`hotstage ckpt verify a-0a1b2c --store 's t'` names it"),
        ("hotstage data prepare SPEC --again", "hotstage data prepare SPEC --store 's t' --again"),
        ("hotstage logs a-0a1b2c-2 -f", "hotstage logs a-0a1b2c-2 --store 's t' -f"),
        ("`hotstage runs resume a-0a1b2c --store x --out y`", "`hotstage runs resume a-0a1b2c --store x --out y`"),
        ("hotstage runs resume, or hotstage reconcile", "hotstage runs resume, or hotstage reconcile"),
        ("hotstage k8s doctor; hotstage runs ls says it", "hotstage k8s doctor; hotstage runs ls says it"),
    ],
)
def test_commands_in_texts(text: str, said: str) -> None:
    _names_store[0] = "s t"  # each command sets its own
    assert to_type(text, "a-0a1b2c") == said
