"""Attention of one call of bf16 in float64, and the bound of docs/numerics.md for what rounds p and ds to bf16:
tensor cores (flash.h), and pairs on CPUs (kernels/cpu/attention.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.engine.kernel_lib import Array, decode
from trainer import wire

if TYPE_CHECKING:
    from tests.engine.kernel_calls import Call

U16, F32 = 2.0**-8, 2.0**-24  # half a unit in the last place


@dataclass
class Whole:
    """Attention of one call in float64, and how far from it what rounds p and ds to bf16 may be."""

    want: list[Array]
    bound: list[Array]


def rows(flat: Array, b: int, t: int, heads: int, d: int, ld: int) -> Array:
    """[b, heads, t, d] of an operand whose rows are ld apart."""
    padded = np.zeros(b * t * ld)
    padded[: flat.size] = decode(flat, wire.BF16)
    return padded.reshape(b, t, ld)[:, :, : heads * d].reshape(b, t, heads, d).transpose(0, 2, 1, 3)


def read(call: Call) -> Array:
    """[b, 1, t, t]: which keys a query reads."""
    b, t = call.case.dims[:2]
    window = dict(enumerate(call.case.dims)).get(9 if call.case.kernel == "attention_fwd" else 13) or t
    first, place = call.inputs[-1], np.arange(t)
    low = np.maximum(place - window + 1, np.zeros((b, t), int) if first is None else first.reshape(b, t))
    return (low[..., None] <= place)[:, None] & np.tril(np.ones((t, t), bool))


def whole_of(call: Call) -> Whole:
    """The bounds: every p, and every ds, is rounded to bf16 once (U16); sums of n
    products in f32, in any order, rounded or cut off: 2 n F32 of their magnitudes; the result is rounded to bf16."""
    backward = call.case.kernel == "attention_igrad"
    b, t, h, g, d = call.case.dims[:5]
    lds = call.case.dims[5:]
    heads = (h, g, g, h, h, h, g, g) if backward else (h, 0, h, g, g)
    a = call.inputs
    scale = call.case.reals[0]
    if backward:
        dy, y, q, k, v = (rows(a[i], b, t, heads[i], d, lds[i]) for i in range(3, 8))  # type: ignore[arg-type]
    else:
        q, k, v = (rows(a[i], b, t, heads[i], d, lds[i - 1]) for i in range(2, 5))  # type: ignore[arg-type]
    k, v = (np.repeat(x, h // g, axis=1) for x in (k, v))
    seen = read(call)
    s = np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf)
    off = 2 * d * F32 * scale * np.abs(q) @ np.abs(k).swapaxes(-1, -2)  # of a score, and so of p relatively
    if not backward:
        off = np.where(seen, off, 0)
        top = s.max(-1, keepdims=True)
        total = np.exp(s - top).sum(-1, keepdims=True)
        lse = top + np.log(total)
        p = np.exp(s - lse)
        worst = off.max(-1, keepdims=True) + 4e-6 + 2 * t * F32
        o = p @ v
        return Whole(
            [o, lse[..., 0]],
            [(p * (U16 + 2 * worst)) @ np.abs(v) + U16 * np.abs(o), (worst + 2 * F32 * np.abs(lse))[..., 0]],
        )
    lse = a[8].astype(np.float64).reshape(b, h, t, 1)  # type: ignore[union-attr]
    p = np.where(seen, np.exp(s - lse), 0)
    rel = off + 4e-6 + 4 * F32 * np.abs(lse) + 2 * t * F32
    delta = (dy * y).sum(-1, keepdims=True)
    dp = dy @ v.swapaxes(-1, -2)
    ds = p * (dp - delta)
    off_dp = 2 * d * F32 * (np.abs(dy) @ np.abs(v).swapaxes(-1, -2) + (np.abs(dy) * np.abs(y)).sum(-1, keepdims=True))
    off_ds = np.abs(ds) * (U16 + rel) + p * off_dp
    off_p = p * (U16 + rel)

    def grouped(x: Array) -> Array:
        return np.asarray(x.reshape(b, g, h // g, t, d).sum(2))

    want = [scale * ds @ k, grouped(scale * ds.swapaxes(-1, -2) @ q), grouped(p.swapaxes(-1, -2) @ dy)]
    bound = [
        scale * off_ds @ np.abs(k),
        grouped(scale * off_ds.swapaxes(-1, -2) @ np.abs(q)),
        grouped(off_p.swapaxes(-1, -2) @ np.abs(dy)),
    ]
    return Whole(want, [x + U16 * np.abs(w) + 1e-30 for x, w in zip(bound, want, strict=True)])


def outputs_of(call: Call, arrays: list[Array | None]) -> list[Array]:
    b, t, h, g, d = call.case.dims[:5]
    lds = call.case.dims[5:]
    if call.case.kernel == "attention_fwd":
        o, lse = arrays[:2]
        assert o is not None
        assert lse is not None
        return [rows(o, b, t, h, d, lds[0]), lse.reshape(b, h, t)]
    return [rows(x, b, t, n, d, ld) for x, n, ld in zip(arrays[:3], (h, g, g), lds, strict=False) if x is not None]
