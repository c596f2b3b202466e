"""Schedules: the generators' shape, PyTorch's text form, and the place of every message."""

from __future__ import annotations

import doctest
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.plan.message_ends import MessageEnd, check_channels
from trainer.errors import PlanError
from trainer.plan import messages, rows, schedules
from trainer.plan.check import check_lowered, check_schedule
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Pipeline
from trainer.plan.rows import COMPUTE, MESSAGES, Action, F, Row, parse_action
from trainer.plan.schedules import GENERATORS, gpipe, in_flight, interleaved, one_f_one_b, rows_for

SIZES = [(p, m) for p in range(1, 17) for m in (1, 2, 3, 4, 7, 8, 15, 16, 17, 32)]


@pytest.mark.parametrize("module", [schedules, rows, messages])
def test_examples_in_the_docstrings_run(module: object) -> None:
    failed, ran = doctest.testmod(module)  # type: ignore[arg-type]
    assert ran > 0
    assert failed == 0


def test_text_form_is_pytorch_pipelining_s() -> None:
    rows = insert_messages(one_f_one_b(3, 2), 3)
    # The rows that torch.distributed.pipelining's text form gives for the same actions.
    assert ",".join(map(str, rows[0])) == "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1"


@given(st.integers(0, 9999), st.sampled_from(COMPUTE + MESSAGES), st.integers(0, 9999))
def test_every_action_reads_back(stage: int, op: str, microbatch: int) -> None:
    action = Action(stage, op, microbatch)
    assert parse_action(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X0", "-1F0", "0F0 1F0", "1UNSHARD", "0send_f1"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="cannot read the action"):
        parse_action(text)


def test_zero_sizes_are_refused() -> None:
    with pytest.raises(PlanError, match="0 stages"):
        gpipe(0, 1)
    with pytest.raises(PlanError, match="0 microbatches"):
        one_f_one_b(2, 0)


def test_warm_up_and_in_flight_bounds() -> None:
    for stages, microbatches in SIZES:
        assert in_flight(gpipe(stages, microbatches)) == [microbatches] * stages
        expected = [min(stages - stage, microbatches) for stage in range(stages)]
        assert in_flight(one_f_one_b(stages, microbatches)) == expected


def assert_lowered_well(name: str, stages: int, microbatches: int) -> None:
    rows = GENERATORS[name](stages, microbatches)
    check_schedule(rows, stages, microbatches, in_flight(rows))
    lowered = insert_messages(rows, stages)
    check_lowered(lowered)  # every message where it must be, in order, and no deadlock under rendezvous
    assert [each.take(each.compute) for each in map(Row.of, lowered)] == rows
    assert in_flight(lowered) == in_flight(rows), "a receive takes no buffer early"
    for row in lowered:
        for place, action in enumerate(row):
            if action.is_send:  # right after what made it: before any other computation
                before = next(a for a in reversed(row[:place]) if a.is_compute)
                assert (before.op, before.microbatch) == (action.op[-1], action.microbatch)
            elif not action.is_compute:  # right before what needs it
                after = next(a for a in row[place:] if a.is_compute)
                assert (after.op, after.microbatch) == (action.op[-1], action.microbatch)


def test_interleaved_by_hand() -> None:
    """Two positions, two stages each, four microbatches in two rounds."""
    assert [" ".join(map(str, row)) for row in interleaved(2, 2, 4)] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(0, 7))
def test_interleaved_runs_within_its_bound(positions: int, chunks: int, rounds: int, more: int) -> None:
    microbatches = rounds * (positions + more % positions) if rounds > 1 else 1 + more
    if microbatches % max(1, microbatches // positions):
        with pytest.raises(PlanError, match="rounds that are not equal") as refused:
            interleaved(positions, chunks, microbatches)
        for take in re.findall(r"take (\d+) or (\d+) microbatches", str(refused.value))[0]:
            interleaved(positions, chunks, int(take))
        return
    rows = interleaved(positions, chunks, microbatches)
    check_schedule(rows, positions * chunks, microbatches)
    lowered = insert_messages(rows, positions * chunks)
    check_lowered(free_slots_early(lowered))
    each = microbatches // max(1, microbatches // positions)
    for position, row in enumerate(rows):
        held = np.where(row.op == F, 1, -1).cumsum().max()
        assert held <= min((chunks - 1) * each + 2 * (positions - position - 1) + 1, chunks * microbatches)


def test_interleaved_with_one_stage_a_position_orders_as_1f1b_does() -> None:
    """Its warm-up is longer by one forward a position further back; the last position is the same."""
    for positions, microbatches in ((1, 3), (2, 4), (4, 8)):
        assert interleaved(positions, 1, microbatches)[-1] == one_f_one_b(positions, microbatches)[-1]


def test_what_a_schedule_cannot_place_is_refused_with_the_mend() -> None:
    with pytest.raises(PlanError, match=r"5 microbatches on 2 positions make 2 rounds .* take 4 or 6 microbatches"):
        interleaved(2, 2, 5)
    with pytest.raises(PlanError, match=r"takes 1 stage a position, parallel\.chunks is 2; take interleaved-1f1b"):
        rows_for("1f1b", Pipeline.in_turn(4, 2), 4)
    for pipeline in (Pipeline.in_turn(5, 2), Pipeline.there_and_back(4, 2)):
        with pytest.raises(PlanError, match=r"in turn, as many at each: make parallel\.stages a multiple"):
            rows_for("interleaved-1f1b", pipeline, 4)


def test_gpipe_with_several_stages_a_position() -> None:
    rows = rows_for("gpipe", Pipeline.there_and_back(4, 2), 2)
    assert [" ".join(map(str, row)) for row in rows] == [
        "0F0 0F1 3F0 3F1 3B0 3B1 0B0 0B1",
        "1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1",
    ]
    check_lowered(insert_messages(rows, 4))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(GENERATORS)), st.integers(1, 16), st.integers(1, 32))
def test_messages_never_deadlock_under_rendezvous(name: str, stages: int, microbatches: int) -> None:
    assert_lowered_well(name, stages, microbatches)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_messages_never_deadlock_at_the_corners(name: str) -> None:
    for stages in (1, 2, 3, 16):
        for microbatches in (1, 2, stages - 1, stages, stages + 1, 32):
            if microbatches > 0:
                assert_lowered_well(name, stages, microbatches)


def row(text: str) -> list[Action]:
    return [parse_action(word) for word in text.split()]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.data())
def test_any_schedule_that_can_run_gets_messages_that_can(stages: int, microbatches: int, data: st.DataObject) -> None:
    """Random valid schedules with split backwards: still no deadlock (sends may then come later)."""
    done: list[list[Action]] = [[] for _ in range(stages)]
    todo = {
        (s, op): list(range(microbatches)) for s in range(stages) for op in ("F", "I", "W")
    }  # each ascending; forwards too, for the sake of a short generator
    seen: set[tuple[int, str, int]] = set()
    while any(todo.values()):
        ready = []
        for (stage, op), left in todo.items():
            if not left:
                continue
            m = left[0]
            needs = {
                "F": [(stage - 1, "F", m)] if stage else [],
                "I": [(stage, "F", m)] + ([(stage + 1, "I", m)] if stage < stages - 1 else []),
                "W": [(stage, "I", m)],
            }[op]
            if all(need in seen for need in needs):
                ready.append((stage, op))
        stage, op = data.draw(st.sampled_from(ready))
        m = todo[stage, op].pop(0)
        seen.add((stage, op, m))
        done[stage].append(Action(stage, op, m))
    check_lowered(insert_messages(done, stages))


def test_two_stages_at_a_position_exchange_no_message() -> None:
    rows = [row("0F0 1F0 1B0 0B0"), row("2F0 2B0")]
    with pytest.raises(PlanError, match="S5"):  # position 0 wants its backward before stage 2 has done it
        check_schedule([row("0F0 1F0 1B0 0B0"), row("3F0 3B0 2F0 2B0")])
    lowered = insert_messages(rows, 3)
    check_lowered(lowered)
    assert [str(a) for a in lowered[0]] == ["0F0", "1F0", "1SEND_F0", "1RECV_B0", "1B0", "0B0"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0F0 0B0", "0F1 0B1"], "position 1, 0F1: stage 0 already runs at position 0"),
        (["0F0 0B0", "2F0 2B0"], "S1: stage 1 is missing"),
        (["0F0 0B0", "1F0 1B0 1F0"], "S2: position 1, action 2, 1F0: F of stage 1, microbatch 0 was already done"),
        (["0F0 0B0 0F1 0B1", "1F0 1B0"], r"S2: position 1: F of stage 1, microbatch 1 is missing"),
        (["0F0", "1F0 1B0"], r"S2: position 0: I \(or B\) of stage 0, microbatch 0 is missing"),
        (["0F0 0I0", "1F0 1B0"], r"S2: position 0: W \(or B\) of stage 0, microbatch 0 is missing"),
        (["0B0 0F0", "1F0 1B0"], "S3: position 0, action 0, 0B0: before its forward 0F0"),
        (["0F0 0W0 0I0", "1F0 1B0"], "S3: position 0, action 1, 0W0: before its input gradient 0I0"),
        (["0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"], "S4: position 0, action 3, 0B0: after microbatch 1"),
        (["0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"], "S5: position 0 can never start 0B0"),
    ],
)
def test_bad_schedules_are_refused(rows: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        check_schedule([row(text) for text in rows])


def test_in_flight_bound_is_named() -> None:
    with pytest.raises(PlanError, match="S6: position 1, stage 1: 4 microbatches in flight, the bound is 1"):
        check_schedule(gpipe(2, 4), bound=[4, 1])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0F0 0SEND_F0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"], "position 0, action 2, 0B0: needs 0RECV_B0 before it"),
        (["0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0"], "position 1: 1B0 is never sent on: 1SEND_B0 is missing"),
        (
            ["0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"],
            "position 0, action 0, 0SEND_F0: before 0F0 has made",
        ),
        (["0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1SEND_B0 1B0"], "before the backward of stage 1 has made"),
        (["0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"], "0SEND_F0: was already done"),
        (
            [
                "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
                "1RECV_F1 1RECV_F0 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
            ],
            r"message 0, 0SEND_F0: is number 0 on channel \('F', 0, 1\), where position 1 \(message 0\) has 1RECV_F1",
        ),
        (
            [
                "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
                "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
            ],
            "deadlock under rendezvous-only channels: position 0 at message 1, 0SEND_F1, waits for position 1; "
            "position 1 at message 1, 1SEND_B0, waits for position 0",
        ),
    ],
)
def test_bad_messages_are_refused(rows: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        check_lowered([row(text) for text in rows])


def test_channels_of_any_kind_are_checked() -> None:
    def send(channel: int, label: str) -> MessageEnd:
        return MessageEnd(channel, True, label, f"send {label}")

    def receive(channel: int, label: str) -> MessageEnd:
        return MessageEnd(channel, False, label, f"receive {label}")

    check_channels([[send(1, "report"), receive(2, "control")], [receive(1, "report"), send(2, "control")]])
    with pytest.raises(PlanError, match="deadlock"):
        check_channels([[send(1, "a"), receive(2, "b")], [send(2, "b"), receive(1, "a")]])
    with pytest.raises(PlanError, match="no receive matches it: channel 1 has 1 of them"):
        check_channels([[send(1, "a"), send(1, "b")], [receive(1, "a")]])
    with pytest.raises(PlanError, match="the sending end of channel 1 belongs to position 0"):
        check_channels([[send(1, "a")], [send(1, "a")]])
    with pytest.raises(PlanError, match="a position sends to itself"):
        check_channels([[send(1, "a"), receive(1, "a")]])
