"""A command of the user's on a model's folder: its numbers, and every way in which it gives none."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoint.evaluated import Ran
from flows.evaluate.command import numbers_of, run_command
from tests.support.processes import alive
from tests.support.wait import wait_for
from trainer.spec_watch import EvalSpec

FACTS = {"step": "40", "run": "demo-0a1b2c"}


def ran(folder: Path, script: str, **more: object) -> Ran:
    spec = EvalSpec(command=("sh", "-c", script, "{model}"), **more)  # type: ignore[arg-type]
    return run_command(spec, folder, FACTS, threading.Event())


@pytest.mark.parametrize(
    ("script", "numbers"),
    [
        ("""echo working; echo '{"acc": 0.5, "name": "x"}'""", {"acc": 0.5}),
        ("""echo '{"results": {"a": {"acc,none": 1, "alias": "a"}}, "versions": {"a": 2}}' > {out}/r.json; echo bye""",
         {"a/acc,none": 1.0}),
        ("""mkdir {out}/deep; echo '{"metrics": {"x": 2}}' > {out}/deep/b.json; echo '{"x": 3}'""", {"x": 2.0}),
        ("""test "$0" -ef . || true; echo "{\\"step\\": {step}, \\"words\\": $(echo {run} | wc -w)}" """,
         {"step": 40.0, "words": 1.0}),
    ],
)  # fmt: skip
def test_its_numbers(tmp_path: Path, script: str, numbers: dict[str, float]) -> None:
    found = ran(tmp_path, script)
    assert (found.numbers, found.why) == (numbers, "")


def test_a_named_file_and_named_numbers(tmp_path: Path) -> None:
    script = """echo '{"a": 1, "b": 2}' > {out}/mine-1.json; echo '{"c": 3}' > {out}/other.json"""
    assert ran(tmp_path, script, results="mine-*.json", metrics=("b",)).numbers == {"b": 2.0}
    lacks = ran(tmp_path, script, results="mine-*.json", metrics=("acc",))
    assert lacks.why == "it gave no number 'acc' (metrics); it has a, b"
    assert "no file 'no.json'" in ran(tmp_path, script, results="no.json").why


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo half; echo it broke >&2; exit 3", "it exited with 3; it said last: it broke"),
        ("kill -9 $$", "it was killed by SIGKILL"),
        ("true", "it ended without a word"),
        ("echo no numbers", "its last line is no JSON"),
        ("echo '[1]'", "its result is a list"),
        ("""echo '{"a": "b"}'""", "it gave no number"),
        ("echo '{' > {out}/a.json", "a.json is no JSON"),
    ],
)
def test_what_fails_says_why(tmp_path: Path, script: str, why: str) -> None:
    found = ran(tmp_path, script)
    assert found.numbers == {}
    assert found.why.startswith(why)


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    spec = EvalSpec(command=("no-such-program", "{model}"))
    found = run_command(spec, tmp_path, FACTS, threading.Event())
    assert found.why == "no-such-program cannot be started: there is no such program in PATH"


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! > {tmp_path}/pid; wait"
    found = ran(tmp_path, script, timeout_s=0.3)
    assert "had not ended after 0.3 s (timeout_s), and was killed" in found.why
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(pid), "the end of what the command had started")


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    found = ran(tmp_path, f"""sleep 600 > /dev/null 2>&1 & echo $! > {tmp_path}/pid; echo '{{"a": 1}}'""")
    assert found.numbers == {"a": 1.0}
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(pid), "the end of what the command left behind")


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also where that is killed, with what it started itself; it has no child that it did not start."""
    script = f"sleep 600 & echo $$ $! > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/pids; wait"
    work = (
        "import threading; from pathlib import Path; from flows.evaluate.command import run_command\n"
        "from trainer.spec_watch import EvalSpec\n"
        f"run_command(EvalSpec(command=('sh', '-c', {script!r}, '{{model}}')), Path('.'), {{}}, threading.Event())"
    )
    parent = subprocess.Popen([sys.executable, "-c", work])
    try:
        wait_for((tmp_path / "pids").exists, "the command")
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children")
        wait_for(lambda: children.read_text().split() == [str(pids[1])], "the end of mv, and of nothing else")
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(alive, pids)), "the end of the command and of what it started")


def test_it_is_left_on_request(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    spec = EvalSpec(command=("sh", "-c", "sleep 600", "{model}"))
    assert run_command(spec, tmp_path, FACTS, stop).why.startswith("stopped on request")


def test_maps_without_end_are_no_trouble() -> None:
    deep: dict[str, object] = {"x": 1}
    for _ in range(200):
        deep = {"d": deep}
    assert numbers_of(deep) == {}
