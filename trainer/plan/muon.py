"""Muon: how a hidden matrix's step is made, as kernel calls (docs/adr/0025, ``engine/kernels/muon.h``).

The momentum (with Nesterov's step) is brought to norm 1 and then, by five Newton-Schulz steps of a quintic, near the
closest matrix whose singular values are all 1. A step is three products on the smaller side of the matrix:

    p = x x',  q = a + b p + c p p',  x = q x        (of a tall matrix p = x' x and x = x q)

They are linear layers' products in float32, so threads, paths and libraries of devices do with them what they do with
a model's, in the order of sums that those have; the norm is summed as gradients' norms are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer import wire
from trainer.plan.memory import align
from trainer.plan.records import BoundCall, Ref

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c: the slope at 0, which is what small singular values grow by a step, is as large as keeps the others
between 0.7 and 1.2 (Keller Jordan, 2024)."""
STEPS = 5
EPS = 1e-7
"""Added to the norm, so that a gradient of zero stays zero."""
RMS = 0.2
"""Of a step's elements at a learning rate of 1, which is AdamW's about: one rate serves both (Moonlight, 2025)."""


@dataclass(frozen=True)
class HiddenMatrix:
    """A matrix that Muon takes, and from where on it is made orthogonal: twice the matrix, twice the square of its
    smaller side, the square of its norm and the partial sums of that."""

    rows: int
    columns: int
    start: int = 0

    @property
    def side(self) -> int:
        """The smaller one."""
        return min(self.rows, self.columns)

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def _sizes(self) -> tuple[int, ...]:
        matrix, square = 4 * self.elements, 4 * self.side * self.side
        return matrix, matrix, square, square, 8, 8 * -(-self.elements // wire.SUMSQ_BLOCK)

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(map(align, self._sizes))

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The matrix, the one that it becomes, both squares, the norm's square, its partial sums."""
        at, found = self.start, []
        for size in self._sizes:
            found.append(Ref(wire.SPACE_STATIC, at, size))
            at += align(size)
        return tuple(found)

    def orthogonal(self, momentum: Ref, gradient: Ref, control: Ref, beta: float) -> tuple[list[BoundCall], Ref]:
        """What makes the direction of the step, and where that lies then."""
        x, y, p, q, norm, parts = self.refs
        calls = [
            _call("muon_momentum", (x, momentum, gradient, control), (self.elements,), beta),
            _call("sumsq", (norm, x, parts), (self.elements,)),
            _call("muon_scale", (x, norm), (self.elements,), EPS),
        ]
        for _ in range(STEPS):
            calls += [
                self._square(p, x),
                _call("linear_fwd", (q, p, p, None, None), (self.side,) * 6),
                _call("muon_poly", (q, p), (self.side,), *COEFFICIENTS),
                self._product(y, q, x),
            ]
            x, y = y, x
        return calls, x

    def _square(self, to: Ref, x: Ref) -> BoundCall:
        rows, columns = self.rows, self.columns
        if rows <= columns:
            return _call("linear_fwd", (to, x, x, None, None), (rows, rows, columns, rows, columns, rows))
        return _call("linear_wgrad", (to, None, x, x), (rows, columns, columns, columns, columns, 0))

    def _product(self, to: Ref, q: Ref, x: Ref) -> BoundCall:
        rows, columns = self.rows, self.columns
        if rows <= columns:
            return _call("linear_igrad", (to, q, x), (rows, rows, columns, columns, rows, 0))
        return _call("linear_fwd", (to, x, q, None, None), (rows, columns, columns, columns, columns, columns))

    @property
    def products(self) -> int:
        """Multiply-adds that make it orthogonal."""
        return STEPS * self.side * (2 * self.elements + self.side * self.side)

    @property
    def calls(self) -> int:
        """How many calls a step of it is."""
        return 4 + STEPS * 4

    @property
    def scale(self) -> float:
        """What the orthogonal matrix, whose elements' RMS is 1 / sqrt(larger side), is multiplied with."""
        return RMS * math.sqrt(max(self.rows, self.columns))


def _call(kernel: str, ptr: tuple[Ref | None, ...], dim: tuple[int, ...], *real: float) -> BoundCall:
    return BoundCall(kernel, wire.F32, ptr, dim, real, None, "O")
