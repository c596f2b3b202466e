"""The table of failure classes is whole, and agrees with the engine's exit codes (test_wire.py: with wire/exit.h)."""

from __future__ import annotations

import signal

import pytest

from k8s.render import failure_rules
from trainer.failures import CAUSAL, FAIL_JOB_CODES, FAILURES, POD_REASONS, Failure, of_code, of_signal, of_supervisor
from trainer.wire import EXITS


def test_every_class_has_its_row_and_every_row_a_known_exit_code() -> None:
    assert list(FAILURES) == list(Failure) == sorted(Failure, key=CAUSAL.__getitem__)
    assert {row.exit_code for row in FAILURES.values()} <= set(EXITS)
    for cls, row in FAILURES.items():  # a class of one code of its own ends the command with that code
        codes = {code for code in EXITS if of_code(code) is cls}
        assert row.exit_code in codes or cls in (Failure.MEMORY, Failure.SIGNAL, Failure.PREEMPTED), cls


@pytest.mark.parametrize("code", EXITS)
def test_a_code_has_the_class_that_exit_h_says(code: int) -> None:
    assert of_code(code) == EXITS[code].cls
    assert (code in FAIL_JOB_CODES) == (code != 0)
    if code:
        assert of_supervisor(code) is of_code(code)


def test_classes_of_other_ends() -> None:
    assert (of_code(1), of_code(255)) == (Failure.BUG, Failure.BUG)
    assert (of_signal(signal.SIGTERM), of_signal(signal.SIGKILL)) == (Failure.INFRA, Failure.SIGNAL)
    told = {code: of_supervisor(code) for code in (0, 1, 2, 126, 127, 137, 139, 143, 255, -1)}
    assert told == {
        0: "infra", 1: "config", 2: "config", 126: "config", 127: "config", 137: "infra", 139: "signal", 143: "infra",
        255: "infra", -1: "infra",
    }  # fmt: skip


def test_the_job_fails_by_every_failing_code_of_the_table() -> None:
    named, conditions, rest = failure_rules()
    assert named["onExitCodes"]["values"] == sorted(code for code in EXITS if code)
    assert [c["type"] for c in conditions["onPodConditions"]] == ["DisruptionTarget"]
    assert all(c["type"] in POD_REASONS for c in conditions["onPodConditions"])
    assert rest["onExitCodes"] == {"containerName": "engine", "operator": "NotIn", "values": [0]}


def test_a_class_of_another_version_is_none() -> None:
    assert [Failure.read(text) for text in ("sick", "haunted", None, 3, "")] == [Failure.SICK, None, None, None, None]
