"""What the terminal says: lines for people from events, and a command that starts fast and says so where nothing is."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from rich.console import Console

from checkpoint.store import open_store
from flows.cli.voice import ToType, Voice
from flows.drive.begin import prepare_run
from flows.drive.events import Event
from flows.drive.loop import CALM_SHARE, POLL_MOST_S, calm_pause_s
from flows.show.lines import JsonLines, Lines
from flows.show.live_view import LiveView, spark, wanted
from flows.show.peak import measured_peak
from tests.flows.conftest import Trained
from tests.support.place import ROOT, Place
from trainer.spec import load_spec


def lines_of(*events: Event, every_s: float = 0.0, peak: float = 0.0) -> list[str]:
    said: list[str] = []
    lines = Lines(said.append, 100, every_s=every_s, flops_per_token=2e6, peak_flops=peak, clock=lambda: 0.0)
    for event in events:
        lines.tell(event)
    return said


def step(number: int, seconds: float = 0.5) -> Event:
    facts = {"step": number, "loss": 2.5, "grad_norm": 0.5, "step_us": seconds * 1e6, "tokens_per_s": 1000.0}
    return Event("step", facts)


def test_a_step_line_has_all_that_people_ask_for() -> None:
    (_, line) = lines_of(Event("checkpoint", {"step": 8, "n": 3, "epoch": 1}), step(9), step(10), peak=4e9)
    assert " ".join(line.split()) == "step 10/100 loss 2.5000 |g| 0.500 1,000 tok/s MFU 50% ETA 0:45 saved 8"


def test_the_eta_does_not_jump_with_one_slow_step() -> None:
    said = lines_of(*[step(n) for n in range(1, 50)], step(50, 5.0))
    assert "ETA 0:47" in said[-1]  # 50 steps of 0.5 s, a little more for the slow one; not of 5 s


def test_step_lines_are_thinned_but_the_last_one_is_told() -> None:
    said = lines_of(*[step(n) for n in range(1, 101)], every_s=10.0)
    assert [line.split()[1] for line in said] == ["1/100", "100/100"]


def test_a_phase_is_told_once_until_there_are_steps_again() -> None:
    phases = [Event("phase", {"phase": "launching", "text": text}) for text in ("0 of 2 nodes", "1 of 2 nodes")]
    assert lines_of(*phases, *phases) == ["launching: 0 of 2 nodes"]
    assert len(lines_of(phases[0], step(1), phases[1])) == 3
    warnings = [Event("phase", {"phase": "warning", "text": f"node {node}: no space"}) for node in (0, 1)]
    assert lines_of(*warnings) == ["warning: node 0: no space", "warning: node 1: no space"]


def test_the_end_says_why_once() -> None:
    """Why a run gave up is long, and the command says it last, with the mend."""
    facts = {"outcome": "gave_up", "reason": "config: " + "x" * 500, "step": 8, "state_digest": None}
    assert lines_of(Event("ended", facts)) == ["gave up: step 8"]
    assert lines_of(Event("ended", facts | {"outcome": "stopped", "reason": "state saved"})) == [
        "stopped (state saved): step 8"
    ]


def test_a_run_that_was_there_before_is_said() -> None:
    facts = {"attempts": 2, "step": 8, "ended": None}
    assert "begun before: attempt 2, step 8 saved" in lines_of(Event("known", facts))[0]
    (line,) = lines_of(Event("known", facts | {"ended": "gave_up"}))
    assert "ended before (gave up)" in line
    assert "runs resume" in line


def test_json_lines_are_json_whatever_happens() -> None:
    written: list[str] = []
    lines = JsonLines(written.append, 10, clock=lambda: 0.0)
    for event in (step(1), step(2), step(10), Event("phase", {"phase": "warning", "text": 'a "quote"\nand é'})):
        lines.tell(event)
    lines.tell(Event("step", {**step(10).facts, "loss": float("nan"), "grad_norm": float("inf")}))
    told = [json.loads(line) for line in written]
    assert [t["event"] for t in told] == ["step", "step", "phase", "step"]  # thinned, the last step never
    assert told[3]["loss"] is None
    assert all("\n" not in line for line in written)


@pytest.mark.parametrize("width", [80, 40, 20])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    view = LiveView(100, 2e6, 4e9, console)
    view.tell(Event("attempt", {"number": 2, "step": 8, "from": "memory", "cause": {"text": "rank 1 was killed"}}))
    for number in range(9, 51):
        view.tell(step(number))
    view.tell(Event("checkpoint", {"step": 48}))
    screen.truncate(0)
    screen.seek(0)
    console.print(view)
    drawn = screen.getvalue().splitlines()
    assert all(len(line) <= width for line in drawn), drawn
    if width >= 40:
        text = " ".join(drawn)
        for word in (
            "training 50/100 50%",
            "loss 2.5000",
            "1,000 tok/s",
            "MFU 50%",
            "ETA 0:25",
            "saved 48",
            "attempt 2",
        ):
            assert word in text
        assert "━" in text


def test_a_curve_in_a_line() -> None:
    assert spark([1.0, 2.0, 3.0, 4.0], 4) == "▁▃▅█"
    assert len(spark([float(n) for n in range(1000)], 12)) == 12
    assert spark([1.0], 5) == ""


def test_no_live_view_where_the_terminal_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, expected in (("xterm-256color", True), ("dumb", False), ("", False)):
        monkeypatch.setenv("TERM", name)
        assert wanted(Terminal()) is expected
    monkeypatch.setenv("TERM", "xterm")
    assert not wanted(io.StringIO())


@pytest.mark.parametrize("columns", [80, 40])
def test_at_a_terminal_a_run_is_watched(place: Place, columns: int) -> None:
    """The real command in a real terminal: the view comes and goes, lines stay, no colour where none is wanted."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = place.env | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "1"}
    sets = ["--set", "parallel.stages=1", "--set", "model.layers=1", "--set", f"name='tty{columns}'"]
    process = subprocess.Popen(
        place.command("train", "spec.toml", "--no-prefect", *sets),
        cwd=place.folder,
        env=env,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    screen = b""
    while chunk := _read(mine):
        screen += chunk
    os.close(mine)
    assert process.wait(60) == 0, screen.decode()
    text = screen.decode()
    assert "━" in text
    assert "tok/s" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is there again
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)
    assert "succeeded: step" in text


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # the other side has closed
        return b""


def test_plain_lines_where_the_terminal_is_dumb_and_json_where_asked(place: Place) -> None:
    """At TERM=dumb no control sequence; with --json nothing but JSON, also of what is refused."""
    place.env["TERM"] = "dumb"
    done = place.call("train", "spec.toml", "--no-prefect", "--set", "parallel.stages=1", "--set", "model.layers=1")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert re.search(r"^attempt 1: at step 0 from the start$", done.out, re.MULTILINE)
    assert "nodes know" not in done.out
    refused = place.here("train", "spec.toml", "--no-prefect", "--json", "--set", "parallel.stages=99")
    assert refused.code == 78
    assert refused.out == ""
    (line,) = refused.err.splitlines()
    assert json.loads(line)["exit_code"] == 78


def test_the_peak_is_measured_not_guessed() -> None:
    assert 1e8 < measured_peak() < 1e15
    assert measured_peak() == measured_peak()


def test_a_run_is_shown_without_mfu_where_the_yardstick_cannot_be_measured(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured beside the gang's start, by processes of its own: no trace of theirs lands between the lines."""

    def no_process(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    spec, sets = place.folder / "spec.toml", [f"data.source='text:{place.folder}/corpus/*.txt'"]
    prepared = prepare_run(load_spec(spec, sets), open_store("memory:"))
    measured_peak.cache_clear()
    monkeypatch.setattr(subprocess, "Popen", no_process)
    shown = Voice(as_json=False).sink(prepared)
    for thread in threading.enumerate():
        if thread.name == "yardstick":
            thread.join()
    assert isinstance(shown, ToType)
    assert isinstance(shown.sink, Lines)
    assert shown.sink.meter.mfu is None  # and no thread raised: pytest is told to fail then


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from flows.cli.main import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.stderr.write(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Exit codes" in done.stdout
    assert not {"prefect", "numpy", "pydantic", "boto3", "tokenizers", "kubernetes"} & set(done.stderr.split())


def test_logs_before_anything_ran(place: Place) -> None:
    spec = place.folder / "spec.toml"
    sets = [f"data.source='text:{place.folder}/corpus/*.txt'"]
    run = prepare_run(load_spec(spec, sets), open_store(f"file://{place.folder / 'store'}")).run
    done = place.here("logs", run)
    assert (done.code, done.out) == (0, "")
    assert "no attempt yet" in done.err
    (row,) = json.loads(place.said("runs", "ls", "--json"))
    assert (row["run"], row["state"], row["attempts"]) == (run, "planned", 0)
    assert place.here("logs", "nothing").code == 78


def test_logs_of_an_attempt_by_its_number(trained: Trained) -> None:
    assert trained.place.said("logs", trained.run, "--attempt", "1", "--tail", "1").startswith("{")
    done = trained.place.here("logs", trained.run, "--attempt", "2")
    assert done.code == 2
    assert "has 1 attempt(s); there is no attempt 2" in done.err


def test_looking_costs_a_fixed_share_of_a_core_while_all_is_well() -> None:
    for look in (0.002, 0.01, 0.03):  # a folder, a store across the network, a large gang
        pause = calm_pause_s(look, 0.05)
        assert look / (look + pause) == pytest.approx(CALM_SHARE)
    assert calm_pause_s(0.0001, 0.05) == 0.05
    assert calm_pause_s(3.0, 0.05) == POLL_MOST_S
