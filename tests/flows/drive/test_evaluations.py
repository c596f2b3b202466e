"""Which checkpoints are evaluated beside training, and that nothing that goes wrong there costs the run anything."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from checkpoint.evaluated import Evaluation, Evaluations, Ran
from checkpoint.keys import evaluated_key
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from checkpoint.store.memory import MemoryStore
from flows.drive.child import ChildProcess
from flows.drive.evaluations import Evaluating, due, lacking, result_of
from flows.drive.events import Event
from flows.drive.live import load_evaluations
from flows.evaluate.command import numbers_of, of_metrics, read_result
from flows.show.lines import Lines
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.place import ROOT, SPEC
from tests.support.wait import wait_for
from trainer.errors import SpecError
from trainer.spec import RunSpec, how_map, load_spec, parse_spec

RUN = "demo-0a1b2c"
BOTH = ("validation.every=2", 'eval=[{name="a", command=["x", "{model}"], every=1}]')


def spec(*sets: str) -> RunSpec:
    return parse_spec(tomllib.loads(SPEC), ("checkpoint.every=10", "validation.source=text:held/*", *sets))


def line(store: Store, *steps: int) -> RunState:
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    for step in steps:
        state = log.append("checkpoint", point_body(step, state.epoch), state, epoch=state.epoch)
    return state


def python(program: str) -> tuple[str, ...]:
    """A stand-in for the command: what it gets after its own words it sees in sys.argv."""
    return (sys.executable, "-c", program)


TELLS = """
import json, sys
a = sys.argv
step = int(a[a.index("--step") + 1])
print("some warning")
said = {"validation": f"step {step}: fine", "a": f"step {step}: a: it broke"}
print(json.dumps({"step": step, "epoch": 1, "loss": 2.5, "numbers": {"validation/loss": 2.5}, "ran": [],
                  "failed": {"a": "it broke"}, "said": said}))
"""


def test_which_are_due() -> None:
    assert [step for step in range(1, 61) if due(3, step, 10, 55)] == [30, 55, 60]
    assert [step for step in range(1, 61) if due(1, step, 0, 60)] == list(range(1, 61))  # whatever was stored
    assert not any(due(0, step, 10, 60) for step in range(61))


def test_what_a_checkpoint_still_lacks() -> None:
    whole = spec(*BOTH)
    assert lacking(whole, 20, 60, None) == ["validation", "a"]
    assert lacking(whole, 30, 60, None) == ["a"]
    assert lacking(whole, 60, 60, Evaluation(60, 1, loss=2.0)) == ["a"]
    assert lacking(whole, 60, 60, Evaluation(60, 1, commands={"a": Ran({}, 1.0, "it failed")})) == ["validation"]
    assert lacking(spec(), 20, 60, None) == []


def test_the_newest_is_evaluated_once_and_a_failure_is_told_once() -> None:
    store = MemoryStore()
    told: list[Any] = []
    at_work = Evaluating(store, RUN, tell=told.append, command=python(TELLS), cpus=1)
    whole, state = spec("validation.every=1"), line(store, 10, 20, 30)

    def hears(count: int) -> bool:
        at_work.look(whole, state, 60)
        return len(told) >= count

    wait_for(lambda: hears(1), "the newest checkpoint's")
    assert (told[0]["step"], told[0]["loss"]) == (30, 2.5)
    assert told[0]["text"] == "step 30: fine\nstep 30: a: it broke"
    at_work.look(whole, state, 60)
    assert not at_work.busy  # 10 and 20 were passed over
    log = RunLog(store, RUN, writer="test")
    state = log.append("checkpoint", point_body(40, state.epoch), state, epoch=state.epoch)
    wait_for(lambda: hears(2), "the next one's")
    assert (told[1]["step"], told[1]["text"], told[1]["failed"]) == (40, "step 40: fine", {})


def test_what_was_evaluated_before_this_driver_is_not_again() -> None:
    store = MemoryStore()
    state = line(store, 10, 20)
    there = Evaluations()
    there.add(Evaluation(20, state.epoch, loss=1.0))
    store.put(evaluated_key(RUN), there.to_bytes())
    at_work = Evaluating(store, RUN, command=python(TELLS), cpus=1)
    at_work.look(spec("validation.every=1"), state, 60)
    assert not at_work.busy


def test_a_process_that_fails_is_told_once_and_not_tried_for_ever() -> None:
    store = MemoryStore()
    told: list[Any] = []
    fails = python('import sys; print(\'{"text": "hotstage: no such thing"}\'); sys.exit(78)')
    at_work = Evaluating(store, RUN, tell=told.append, command=fails, cpus=1)
    whole, log, state = spec("validation.every=1"), RunLog(store, RUN, writer="test"), line(store, 10)
    for step in (20, 30, 40):
        at_work.look(whole, state, 60)
        assert at_work.busy
        wait_for(lambda state=state: at_work.look(whole, state, 60) or not at_work.busy, "its end")
        state = log.append("checkpoint", point_body(step, state.epoch), state, epoch=state.epoch)
    at_work.look(whole, state, 60)
    assert not at_work.busy
    texts = [facts["text"] for facts in told]
    assert texts[0] == "step 10 could not be evaluated (validation): no such thing"
    assert texts[-1].endswith("it is not tried again")


def test_one_that_hangs_is_ended_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.drive.evaluations.MORE_S", 0.1)
    told: list[Any] = []
    store = MemoryStore()
    hangs = python("import time; time.sleep(600)")
    at_work = Evaluating(store, RUN, tell=told.append, command=hangs, cpus=1)
    state, whole = line(store, 10), spec("validation.every=1", "validation.timeout_s=0.1")
    wait_for(lambda: at_work.look(whole, state, 60) or told, "the end of what hangs")
    assert "the process ended with -15" in told[0]["text"]


def test_what_works_beside_ends_with_the_driver() -> None:
    store = MemoryStore()
    at_work = Evaluating(store, RUN, command=python("import sys; sys.stdin.read(); sys.exit(3)"), cpus=1)
    at_work.look(spec("validation.every=1"), line(store, 10), 60)
    (child,) = [lane.child for lane in at_work._lanes if lane.child is not None]
    at_work.close()
    assert child.process.wait(60) in (3, -15)  # it saw the end of its input, or the signal first


def test_at_the_run_s_end_the_last_checkpoint_comes_first_and_at_once() -> None:
    """What is at work on an older one, starved by whatever else the machine does, gives way."""
    store, told = MemoryStore(), list[Any]()
    log, state = RunLog(store, RUN, writer="test"), line(store, 10)
    waits = "import sys\nif '10' in sys.argv: sys.stdin.read()\n" + TELLS
    at_work = Evaluating(store, RUN, tell=told.append, command=python(waits), cpus=1)
    whole = spec("validation.every=1")
    at_work.look(whole, state, 60)
    (old,) = [lane.child for lane in at_work._lanes if lane.child is not None]
    state = log.append("checkpoint", point_body(60, state.epoch), state, epoch=state.epoch)
    at_work.finish(whole, state, 60, lambda: False)
    assert [facts["step"] for facts in told] == [60]
    old.process.wait(60)
    nice, ordinary = (ChildProcess.begin(python("import os; print(os.nice(0))"), low=low) for low in (True, False))
    wait_for(lambda: nice.ended() == ordinary.ended() == 0, "their ends")
    assert (int(nice.said()), int(ordinary.said())) == (19, os.nice(0))


def test_commands_and_the_validation_do_not_wait_for_each_other() -> None:
    store = MemoryStore()
    at_work = Evaluating(store, RUN, command=python("import sys; sys.stdin.read()"), cpus=1)
    at_work.look(spec(*BOTH), line(store, 20), 60)
    assert [lane.what for lane in at_work._lanes] == [("validation",), ("a",)]
    at_work.close()


def test_commands_that_an_order_adds_are_run_by_the_driver_that_is_there() -> None:
    at_work = Evaluating(MemoryStore(), RUN, command=python("import sys; sys.stdin.read()"), cpus=1)
    state = line(at_work.store, 20)
    at_work.look(spec(BOTH[0]), state, 60)
    at_work.look(spec(*BOTH), state, 60)
    assert [lane.what for lane in at_work._lanes] == [("validation",), ("a",)]
    at_work.close()


def test_a_result_is_found_behind_whatever_was_said() -> None:
    assert result_of('{"a": 1}\nwords\n{"b": 2}\n{broken\n') == {"b": 2}
    assert result_of("") == {}
    assert result_of("[" * 100_000) == {}


def test_a_hint_that_does_not_hold_is_nothing() -> None:
    store = MemoryStore()
    store.put(evaluated_key(RUN), b"\xc0")
    assert load_evaluations(store, RUN).rows == {}


def test_a_how_without_them_is_written_as_before_and_one_with_them_is_read() -> None:
    assert set(how_map(parse_spec(tomllib.loads(SPEC)))) == {"parallel", "checkpoint", "launch", "recovery"}
    how = how_map(spec(*BOTH, "track.tensorboard=tb"))
    assert (how["validation"]["every"], how["eval"][0]["name"], how["track"]["tensorboard"]) == (2, "a", "tb")
    assert how_map(parse_spec({**tomllib.loads(SPEC), **how})) == how


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ('eval=[{command=["lm_eval"]}]', "names no {model}"),
        ('eval=[{command=["a", "{model}"]}, {command=["b", "{model}"]}]', "twice; results are found by name"),
        ('eval=[{name="validation", command=["a", "{model}"]}]', "that of [validation]"),
        ("validation.every=-1", "at least 0"),
        ("validation.source=''", "nothing to validate on: set data.validation"),
    ],
)
def test_refusals(sets: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        spec("validation.every=1", sets)
    assert words in str(refused.value)


def test_the_example_reads_what_the_harness_writes(tmp_path: Path) -> None:
    """examples/evaluate.toml, and a results file of lm-evaluation-harness 0.4.13 in its form."""
    whole = load_spec(ROOT / "examples" / "evaluate.toml")
    (harness,) = whole.eval
    form = {
        "results": {
            "hellaswag": {"alias": "hellaswag", "acc,none": 0.29, "acc_stderr,none": 0.004, "acc_norm,none": 0.31},
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.42, "acc_stderr,none": 0.01},
        },
        "configs": {"hellaswag": {"num_fewshot": 0}},
        "versions": {"hellaswag": 1.0},
        "config": {"model": "hf", "random_seed": 0, "limit": None},
        "total_evaluation_time_seconds": "12.5",
    }
    (tmp_path / "__model").mkdir()
    (tmp_path / "__model" / "results_2026-11-27T06-00-00.000000.json").write_text(json.dumps(form))
    ran = of_metrics(harness, numbers_of(read_result(harness, tmp_path, "|Tasks|Version|")), 12.5)
    assert ran == Ran({"hellaswag/acc_norm,none": 0.31, "arc_easy/acc,none": 0.42}, 12.5)


def test_lines_of_it() -> None:
    said: list[str] = []
    shown = Lines(said.append, 100)
    shown.tell(Event("evaluated", {"found": "numbers", "failed": {}, "text": "step 10: validation loss 2.5"}))
    shown.tell(Event("evaluated", {"found": "numbers", "failed": {"a": "no"}, "text": "step 10: a: failed: no"}))
    shown.tell(Event("evaluated", {"found": "none", "text": "no validation where this driver runs"}))
    assert said == [
        "step 10: validation loss 2.5",
        "WARNING: step 10: a: failed: no",
        "no validation where this driver runs",
    ]
    assert json.dumps(said)
