"""What the terminal says: lines for people from events, and a command that starts fast and says so where nothing is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from checkpoint.store import open_store
from flows.loop import CALM_SHARE, POLL_MOST_S, Event, calm_pause_s
from flows.peak import measured_peak
from flows.run import prepare_run
from flows.sink import Lines, loss_markdown
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


def test_the_end_says_why_once() -> None:
    """Why a run gave up is long, and the command says it last, with the mend."""
    facts = {"outcome": "gave_up", "reason": "config: " + "x" * 500, "step": 8, "digest": None}
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


def test_the_loss_is_a_mermaid_chart_of_bounded_size() -> None:
    text = loss_markdown("r", {n: 1.0 / n for n in range(1, 5000)})
    assert "```mermaid\nxychart-beta\n" in text
    assert text.count(",") < 200
    assert "loss 1.0000 → 0.0002 at step 4999" in text
    assert "no steps yet" in loss_markdown("r", {})


def test_the_peak_is_measured_not_guessed() -> None:
    assert 1e8 < measured_peak() < 1e15
    assert measured_peak() == measured_peak()


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
    done = place.call("logs", run)
    assert (done.code, done.out) == (0, "")
    assert "no attempt yet" in done.err
    (row,) = json.loads(place.run("runs", "ls", "--json"))
    assert (row["run"], row["state"], row["attempts"]) == (run, "planned", 0)
    assert place.call("logs", "nothing").code == 78


def test_logs_of_an_attempt_by_its_number(trained: Trained) -> None:
    assert trained.place.run("logs", trained.run, "--attempt", "1", "--tail", "1").startswith("{")
    done = trained.place.call("logs", trained.run, "--attempt", "2")
    assert done.code == 2
    assert "has had 1 attempt(s), not 2" in done.err


def test_looking_costs_a_fixed_share_of_a_core_while_all_is_well() -> None:
    for look in (0.002, 0.01, 0.03):  # a folder, a store across the network, a large gang
        pause = calm_pause_s(look, 0.05)
        assert look / (look + pause) == pytest.approx(CALM_SHARE)
    assert calm_pause_s(0.0001, 0.05) == 0.05
    assert calm_pause_s(3.0, 0.05) == POLL_MOST_S
