"""The programs of a part of the head (``head_rows.py`` says what a part is): logits and sums, then gradients.

Its forward keeps e to the power of the logits, so that its backward makes one product less than a whole head's does;
``StagePrograms.received`` is the head's input, ``gradient_sent`` the part's share of its gradient. ``sums`` are all
parts', one after the other, 3 rows of numbers each; a part writes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models.base import Buffer, Call, Given, View, Weight
from trainer.plan.expand import StagePrograms
from trainer.plan.places import Stage
from trainer.spec import ModelSpec
from trainer.spec_sections import vocab_block

INPUT, SUMS, GRADIENT = "head input", "sums", "gradient"


@dataclass(frozen=True)
class Share:
    """The rows of the vocabulary that a part has, and its blocks of them."""

    first: int
    rows: int
    blocks: int


def share(vocab: int, blocks: int, parts: int, part: int) -> Share:
    """Which a part has.

    >>> share(250, 8, 4, 3)
    Share(first=192, rows=58, blocks=2)
    """
    each = blocks // parts
    size = each * vocab_block(vocab, blocks)
    return Share(part * size, min(vocab, (part + 1) * size) - part * size, each)


def expand_part(
    model: ModelSpec, tensor: str, rows: int, chunk: int, scale: float, blocks: int, parts: int, part: int, stage: Stage
) -> StagePrograms:
    """Part ``part`` of a head of ``parts``: of a microbatch of ``rows`` tokens. ``tensor``: its matrix."""
    mine, width, chunk = share(model.vocab, blocks, parts, part), model.width, min(chunk, rows)
    buffers: dict[str, Buffer] = {}

    def new(name: str, count: int, cols: int, kind: str) -> View:
        buffers[name] = Buffer(name, count * cols, kind)  # type: ignore[arg-type]
        return View(name, 0, count, cols, cols)

    x, e = new(INPUT, rows, width, "dt"), new("e", rows, mine.rows, "acc")
    tops, sums = new("tops", mine.blocks, rows, "acc"), new(SUMS, 3 * parts, rows, "acc")
    given, own = new(GRADIENT, rows, width, "acc"), View(SUMS, 3 * part * rows, 3, rows, rows)
    dlogits = new("dlogits", chunk, mine.rows, "dt")
    products = new("products", mine.blocks * chunk, width, "acc")
    weight, gradient, targets = Weight(tensor, "head"), Weight(tensor, "head_gradient"), Given("targets")
    block = vocab_block(model.vocab, blocks)
    of = (mine.first, model.vocab)
    forward = Call("vocab_sums", (e, tops, own, x, weight, targets), (rows, width, mine.rows, mine.blocks, block, *of))
    loss = None if part else Given("loss")
    ptr = (loss, given, gradient, x, weight, targets, e, tops, sums, dlogits, products)
    dim = (rows, width, mine.rows, chunk, mine.blocks, block, parts, *of, 1)
    backward = Call("vocab_part", ptr, dim, (scale,), None, "I")
    return StagePrograms(
        index=stage,
        layers=range(model.layers, model.layers),
        first=False,
        last=False,
        buffers=buffers,
        forward=(forward,),
        backward=(backward,),
        received=x,
        sent=None,
        gradient_received=None,
        gradient_sent=given,
    )
