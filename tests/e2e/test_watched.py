"""A run that is watched in every way, and loses a rank meanwhile: its bits are the undisturbed one's, training waits
for nothing, and every number is where a person looks."""

from __future__ import annotations

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.chaos import Fault, unleashed
from tests.support.place import LONG_STEPS as STEPS
from tests.support.place import Place, finish

WATCH = """
[validation]
every = 30
source = "text:held/*.txt"
windows = 3
sample = "the quick"
sample_tokens = 4
[[eval]]
name = "count"
command = ["sh", "-c", "ls {model} > {out}/listed; echo '{\\"files\\": 5, \\"step\\": {step}}'", "{model}"]
every = 30
[[eval]]
name = "fails"
command = ["sh", "-c", "echo no such task >&2; exit 3", "{model}"]
every = 30
[[eval]]
name = "hangs"
command = ["sh", "-c", "sleep 600", "{model}"]
every = 30
timeout_s = 0.5
[track]
tensorboard = "tb"
"""


@pytest.mark.long_run
def test_every_number_is_where_a_person_looks(place: Place, undisturbed: tuple[str, str]) -> None:
    place.hide_queue()
    run, digest = undisturbed
    (place.folder / "held").mkdir()
    (place.folder / "held" / "a.txt").write_text("a lazy dog and a quick fox, one as brown as the other. " * 40)
    spec = place.folder / "spec.toml"
    spec.write_text(spec.read_text() + WATCH)
    with unleashed(Fault("forward", 1, 30), place.run_folder(run), place.folder) as watcher:
        done = finish(place.start_train())
        assert watcher.wait(60) == 0
    result = done.json()
    assert (done.code, result["run"], result["state_digest"]) == (0, run, digest), done.told
    assert result["attempts"] == 2
    said = done.told
    assert len(re.findall(r"fails: failed: it exited with 3; it said last: no such task", said)) == 1, said
    assert len(re.findall(r"hangs: failed: it had not ended after 0.5 s \(timeout_s\), and was killed", said)) == 1, (
        said
    )
    found = EventAccumulator(str(place.folder / "tb" / run), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in found.Scalars("train/loss")] == list(range(1, STEPS + 1))
    losses = {e.step: e.value for e in found.Scalars("validation/loss")}
    assert max(losses) == STEPS
    assert found.Scalars("eval/count/step")[-1].value == STEPS
    told = json.loads(place.said("runs", "show", run, "--json"))
    newest = told["evaluations"][0]
    assert (newest["step"], float(newest["validation/loss"])) == (str(STEPS), float(f"{losses[STEPS]:.6g}"))
    assert newest["count/files"] == "5"
    assert newest["failed"].startswith("fails: it exited with 3; it said last: no such task; hangs: it had not ended")
    shown = place.said("runs", "show", run)
    assert f"evaluated at step {STEPS:>6}  validation/loss {newest['validation/loss']}" in shown
    assert f"validation {newest['validation/loss']}" in place.said("runs", "watch", run)
    place.said("report", run, "-o", "report.html")
    page = (place.folder / "report.html").read_text()
    assert f"at step {STEPS}</title></circle>" in page
    assert "<h2>Evaluations</h2>" in page
    (line,) = place.run("evaluate", run, "--only", "count").splitlines()
    assert line.startswith(f"step {STEPS}: count: files 5, step {STEPS} (")
    place.all_gone()
