"""Whom a step's messages and gradients point to: three positions, two replicas, planted differences."""

from __future__ import annotations

import pytest

from checkpoint.layout import Owned, PlanLayout, PositionLayout, TensorInfo
from flows.replay.recorded import StepLine
from flows.replay.suspects import by_step, shares_head
from tests.engine.plans import small_plan

TENSORS = tuple(TensorInfo(f"t{n}", (8,), 8) for n in range(6))


def layout(replicas: int = 1) -> PlanLayout:
    """Position p keeps tensors 2p and 2p + 1."""
    positions = tuple(PositionLayout(p, 0, 0, (Owned(2 * p, 0, 8), Owned(2 * p + 1, 512, 8))) for p in range(3))
    nothing = bytes(32)
    return PlanLayout(
        digest=nothing,
        what_digest=nothing,
        dataset_digest=nothing,
        replicas=replicas,
        steps=8,
        slots=2,
        batch=4,
        shards=(),
        token_bytes=2,
        tensors=TENSORS,
        positions=positions,
        numerics=1,
    )


def line(*changed: str) -> StepLine:
    """f1: what position 1 sent forward is another one; b1: backward; t3: the gradient of tensor 3; loss."""
    sent = "".join(f"{p:07d}{int(f'{way}{p}' in changed)}" for p in range(3) for way in "fb")
    sums = "".join(f"{t:07d}{int(f't{t}' in changed)}" for t in range(6))
    return StepLine(5, 1, 4.0 + ("loss" in changed), 1.0, sums, sent)


ALL = tuple(f"t{t}" for t in range(6))


@pytest.mark.parametrize(
    ("changed", "ranks"),
    [
        (("f1", "b2", "b1", "loss", *ALL), (1,)),  # a forward: all that follows differs
        (("f0", "f1", "b2", "b1", "loss", *ALL), (0,)),
        (("b2", "b1", "loss", *ALL), (2,)),  # the head: what it got is the same
        (("b1", *ALL[:4]), (1,)),  # the way back, from position 1 on
        (("b2", "b1", *ALL[:5]), (2,)),
        (("t3",), (1,)),  # one tensor's gradient, which nobody sends
        (("t0",), (0,)),
    ],
)
def test_one_rank_is_named(changed: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    found, why = by_step(layout(), line(), line(*changed), messages=True)
    assert found == ranks, why
    assert why


def test_of_other_layouts_gradients_alone_are_compared() -> None:
    """Whose gradient is the first other one on the way back; of a forward nothing is known."""
    other = line("b1", *ALL[:4])._replace(sent="")
    assert by_step(layout(), line(), other, messages=True)[0] == (1,)
    assert by_step(layout(), line(), line("f0", "loss", *ALL), messages=False) == ((), "")
    assert by_step(layout(), line(), line()._replace(sums="", sent=""), messages=True)[0] == ()


def test_other_replicas_are_never_ruled_out_by_the_first_ones_messages() -> None:
    assert by_step(layout(2), line(), line("f1", "loss", *ALL), messages=True)[0] == (1,)
    assert by_step(layout(2), line(), line("loss", *ALL), messages=True)[0] == (2, 3, 4, 5)
    assert by_step(layout(2), line(), line("t3"), messages=True)[0] == (1, 4)


def test_a_head_that_ranks_share_points_to_nobody() -> None:
    shared = small_plan(stages=2, parallel={"vocab_stages": 2}, vocab_blocks=2)
    assert shares_head(shared.to_bytes())
    assert not shares_head(small_plan(stages=2, vocab_blocks=2, parallel={"vocab_stages": 1}).to_bytes())
