"""Calls of kernels with operands of all shapes, and how close to the oracle a set must come.

A sum of K terms in f32 may be off by gamma_K = K 2^-24 times the sum of the terms' magnitudes; that sum is taken from
``ref`` itself (which computes in double), called on absolute values, where the kernel is linear. Attention in bf16 has
a bound of its own (attention_bound.py). Other kernels are compared with a stated fraction of the largest output. A
result stored as bf16 may be the neighbour: 2^-7 relative more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.engine.attention_bound import outputs_of, whole_of
from tests.engine.kernel_lib import Array, KernelLib, Kernels, acc_of, decode, encode
from trainer import wire

EPS = 2.0**-24  # half a unit in the last place of an f32


@dataclass(frozen=True)
class Case:
    kernel: str
    dims: tuple[int, ...]
    reals: tuple[float, ...] = ()
    absent: tuple[int, ...] = ()
    rel: float = 4e-6  # of the largest magnitude of the outputs, where no sharper bound stands below
    f32_only: bool = False
    documents: bool = False

    @property
    def name(self) -> str:
        mark = "-no" + "".join(map(str, self.absent)) if self.absent else ""
        return f"{self.kernel}-{'x'.join(map(str, self.dims))}{mark}{'-documents' * self.documents}"


def attention_cases(
    b: int, t: int, h: int, g: int, d: int, pad: int = 0, window: int = 0, documents: bool = False
) -> list[Case]:
    q, k, last = h * d + pad, g * d + 2 * pad, (window,) if window else ()
    scale = d**-0.5
    fwd, igrad = (q, q + pad, k, k + pad), (q, k, k + pad, q, q + pad, q, k, k + pad)
    return [
        Case("attention_fwd", (b, t, h, g, d, *fwd, *last), (scale,), rel=1e-5, documents=documents),
        Case("attention_igrad", (b, t, h, g, d, *igrad, *last), (scale,), rel=4e-5, documents=documents),
    ]


CASES = [
    Case("embed_fwd", (12, 20, 17, 6)),
    Case("embed_fwd", (3, 96, 50, 3), absent=(3,)),
    Case("embed_wgrad", (12, 20, 5, 6)),
    Case("embed_wgrad", (300, 130, 7, 300), absent=(1,)),
    Case("embed_fwd", (60, 20, 17, 30), documents=True),
    Case("embed_wgrad", (60, 20, 5, 30), documents=True),
    Case("embed_wgrad_tied", (12, 20, 5, 6)),
    Case("embed_wgrad_tied", (300, 130, 7, 300), absent=(1,)),
    Case("embed_wgrad_tied", (60, 20, 90, 30), documents=True),
    *(
        case
        for rows, c in ((1, 1), (3, 16), (5, 20), (2, 33), (40, 770), (3, 4200))
        for case in (
            Case("layernorm_fwd", (rows, c), (1e-5,), rel=1e-5),
            Case("layernorm_igrad", (rows, c, 0), absent=(6,), rel=1e-5),
            Case("layernorm_igrad", (rows, c, 1), absent=(6,), rel=1e-5),
            Case("layernorm_igrad", (rows, c, 1), rel=1e-5),
            Case("layernorm_wgrad", (rows, c), rel=1e-5),
        )
    ),
    *(
        case
        for rows, n, c, pad in ((1, 1, 1, 0), (3, 4, 20, 5), (33, 1, 768, 0), (7, 3, 128, 1), (3, 1, 4200, 0))
        for case in (
            Case("rmsnorm_fwd", (rows, n, c, n * c + pad, n * c + 2 * pad), (1e-6,)),
            Case("rmsnorm_igrad", (rows, n, c, n * c + pad, n * c, n * c + 2 * pad, 0), absent=(5,), rel=1e-5),
            Case("rmsnorm_igrad", (rows, n, c, n * c + pad, n * c, n * c + 2 * pad, 1), absent=(5,), rel=1e-5),
            Case("rmsnorm_igrad", (rows, n, c, n * c + pad, n * c, n * c + 2 * pad, 1), rel=1e-5),
            Case("rmsnorm_wgrad", (rows, n, c, n * c + pad, n * c + 2 * pad), rel=1e-5),
        )
    ),
    *(
        case
        for r, n, k, pad in (
            (1, 1, 1, 0),
            (1, 40, 48, 0),
            (5, 17, 33, 3),
            (12, 32, 384, 0),
            (13, 65, 400, 1),
            (31, 100, 1, 0),
            (300, 97, 130, 7),
            (7, 33, 1200, 16),
        )
        for case in (
            Case("linear_fwd", (r, n, k, n + pad, k + 2 * pad, n + 3 * pad)),
            Case("linear_fwd", (r, n, k, n, k, n), absent=(3, 4)),
            Case("linear_fwd", (r, n, k, n + pad, k, n), absent=(4,)),
            Case("linear_igrad", (r, n, k, k + pad, n + 2 * pad, 0)),
            Case("linear_igrad", (r, n, k, k + pad, n + 2 * pad, 1)),
            Case("linear_wgrad", (r, n, k, n + pad, k + 2 * pad, 1)),
            Case("linear_wgrad", (r, n, k, n + pad, k + 2 * pad, 0)),
            Case("linear_wgrad", (r, n, k, n, k, 1), absent=(1,)),
        )
    ),
    Case("layernorm_wgrad", (600, 70), rel=1e-5),  # rows beyond a part of the CUDA set's column sums
    Case("rmsnorm_wgrad", (300, 3, 24, 72, 80), rel=1e-5),
    Case("linear_wgrad", (900, 33, 7, 40, 7, 1)),
    Case("linear_wgrad", (64, 13, 40, 13, 40, 1)),  # a tile of 7 rows before one of 6, where a tile has 12
    Case("linear8_wgrad", (528, 48, 16, 48)),
    *attention_cases(1, 1, 1, 1, 16),
    *attention_cases(2, 3, 2, 1, 2, 1),
    *attention_cases(2, 17, 4, 2, 20, 3),
    *attention_cases(1, 65, 3, 3, 24),
    *attention_cases(1, 130, 4, 1, 64),
    *attention_cases(1, 200, 2, 2, 128, 8),
    *attention_cases(1, 259, 2, 1, 32),
    *attention_cases(1, 5, 1, 1, 256),
    *attention_cases(2, 17, 4, 2, 20, 3, documents=True),
    *attention_cases(1, 130, 2, 1, 24, window=1),
    *attention_cases(1, 259, 4, 2, 16, 1, window=70),
    *attention_cases(2, 460, 2, 1, 16, documents=True),
    *attention_cases(1, 460, 1, 1, 24, window=33, documents=True),
    Case("rope_table", (7, 20), (10000.0,), rel=1e-7, f32_only=True),
    Case("rope_table", (130, 128), (500000.0,), rel=1e-7, f32_only=True),
    *(
        Case(kernel, (r, t, n, d, n * d + pad), rel=1e-6)
        for kernel in ("rope_fwd", "rope_igrad")
        for r, t, n, d, pad in ((1, 1, 1, 2, 0), (6, 3, 2, 20, 5), (64, 32, 3, 128, 0))
    ),
    *(Case(kernel, (66, 33, 2, 20, 45), rel=1e-6, documents=True) for kernel in ("rope_fwd", "rope_igrad")),
    *(Case("borders", dims, f32_only=True) for dims in ((1, 1, 1, 0), (3, 7, 3, 2), (2, 700, 9, 4), (1, 259, 5, 5))),
    *(Case(kernel, (n,), rel=1e-6) for kernel in ("gelu_fwd", "gelu_igrad") for n in (1, 15, 16, 17, 4097, 40000)),
    *(
        Case(kernel, dims, rel=1e-6)
        for kernel in ("swiglu_fwd", "swiglu_igrad")
        for dims in ((1, 1), (3, 20), (40, 515))
    ),
    *(
        case
        for r, c, v, chunk in ((1, 1, 1, 1), (1, 8, 5, 4), (5, 20, 33, 2), (20, 48, 517, 8), (70, 64, 1003, 64))
        for case in (
            Case("classifier_fwd", (r, c, v, chunk), rel=2e-6),
            Case("classifier_grad", (r, c, v, chunk, 1), (0.125,), rel=1e-5),
            Case("classifier_grad", (r, c, v, chunk, 0), (0.125,), rel=1e-5),
        )
    ),
    *(
        case
        for r, c, v, chunk, n, block in (
            (1, 1, 1, 1, 1, 1),
            (1, 8, 5, 4, 2, 3),
            (5, 20, 33, 2, 4, 9),
            (20, 48, 517, 8, 8, 65),
            (70, 64, 1003, 64, 2, 512),
            (7, 33, 65, 7, 64, 1),
        )
        for case in (
            Case("vocab_head", (r, c, v, chunk, n, block, 1), (0.125,), rel=1e-5),
            Case("vocab_head", (r, c, v, chunk, n, block, 0), (0.125,), rel=1e-5),
            Case("vocab_sums", (r, c, v, n, block, 3, v + 5), rel=2e-6),
            Case("vocab_part", (r, c, v, chunk, n, block, 1, 0, v, 0), (0.125,), rel=1e-5),
            Case("vocab_part", (r, c, v, chunk, n, block, 4, 2, v + 7, 1), (0.125,), absent=(0,), rel=1e-5),
        )
    ),
    Case("logits", (1, 48, 5)),
    Case("logits", (9, 40, 517)),
    Case("delay", (1000,), f32_only=True),
    Case("add_acc", (1,), f32_only=True),
    Case("add_acc", (40001,), f32_only=True),
    Case("sumsq", (1,), rel=1e-14, f32_only=True),
    Case("sumsq", (65536 * 3 + 17,), rel=1e-12, f32_only=True),
    Case("sumsq", (65536 * 4,), rel=1e-12, f32_only=True),
    Case("fold", (1,), f32_only=True),
    Case("fold", (40001,), f32_only=True),
    Case("sumsq_parts", (1,), rel=1e-14, f32_only=True),
    Case("sumsq_parts", (65536 * 3 + 17,), rel=1e-12, f32_only=True),
    *(Case("sum", (n,), rel=1e-12, f32_only=True) for n in (1, 2, 7, 600)),
    Case("adamw", (1, 1), (0.9, 0.95, 1e-8, 0.1), rel=1e-6),
    Case("adamw", (20001, 0), (0.9, 0.999, 1e-8, 0.0), absent=(4,), rel=1e-6),
    Case("adamw", (20001, 1), (0.9, 0.999, 1e-5, 0.1), rel=1e-6),
    Case("adamw", (524288 + 4096 + 17, 1), (0.9, 0.999, 1e-8, 0.1), rel=1e-6),  # its copy goes past the caches
    Case("adamw_copy", (1,), (0.9, 0.95, 1e-8, 0.1), rel=1e-6),
    Case("adamw_copy", (20001,), (0.9, 0.999, 1e-5, 0.1), rel=1e-6),
    Case("muon_momentum", (1,), (0.95,), rel=1e-6, f32_only=True),
    Case("muon_momentum", (20001,), (0.9,), rel=1e-6, f32_only=True),
    Case("muon_scale", (1,), (1e-7,), rel=1e-6, f32_only=True),
    Case("muon_scale", (20001,), (1e-7,), rel=1e-6, f32_only=True),
    *(Case("muon_poly", (s,), (3.4445, -4.775, 2.0315), rel=1e-6, f32_only=True) for s in (1, 17, 150)),
    Case("muon", (1,), (0.95, 0.2, 0.1), rel=1e-6),
    Case("muon", (20001,), (0.9, 5.0, 0.0), absent=(4,), rel=1e-6),
    Case("muon", (20001,), (0.95, 5.0, 0.1), rel=1e-6),
    Case("muon_copy", (1,), (0.2, 0.1), rel=1e-6),
    Case("muon_copy", (20001,), (5.0, 0.1), rel=1e-6),
    Case("zero", (1,), f32_only=True),
    Case("zero", (70001,), f32_only=True),
    Case("init_normal", (1, 3, 7), (0.0, 0.02), rel=1e-6, f32_only=True),
    Case("init_normal", (63, 3, -7), (1.0, 0.5), rel=1e-6, f32_only=True),
    Case("init_normal", (100003, 30, 2**40 + 7), (0.0, 1.0), rel=2e-6, f32_only=True),
    Case("init_const", (20001,), (1.0,), f32_only=True),
    Case("cast", (1,)),
    Case("cast", (20001,)),
    *(
        Case("quantise", (r, c, c + pad, e5m2), absent=absent)
        for r, c, pad in ((1, 1, 0), (5, 17, 3), (64, 96, 0), (48, 160, 16), (130, 33, 7), (1500, 20, 0))
        for e5m2, absent in ((0, ()), (1, ()), (0, (1,)))
    ),
    *(
        case
        for r, n, k, pad in ((1, 1, 1, 0), (5, 17, 33, 3), (13, 65, 400, 1), (130, 97, 130, 7), (32, 48, 64, 8))
        for case in (
            Case("linear8_fwd", (r, n, k, n + pad, n + 3 * pad)),
            Case("linear8_fwd", (r, n, k, n, n), absent=(5, 6)),
            Case("linear8_igrad", (r, n, k, k + pad, 0)),
            Case("linear8_igrad", (r, n, k, k + pad, 1)),
            Case("linear8_wgrad", (r, n, k, n + pad)),
            Case("linear8_wgrad", (r, n, k, n), absent=(1,)),
            Case("linear8_wgrad", (r, n, k, 0), absent=(1, 6)),
        )
    ),
]

WITH_DTYPE = [
    pytest.param(case, dtype, id=f"{case.name}-{label}")
    for case in CASES
    for label, dtype in (("f32", wire.F32), ("bf16", wire.BF16))
    if dtype == wire.F32 or not case.f32_only
]


@dataclass
class Call:
    """A kernel's operands, and copies of them to run on."""

    case: Case
    dtype: int
    inputs: list[Array | None] = field(default_factory=list)

    @staticmethod
    def make(lib: KernelLib, case: Case, dtype: int) -> Call:
        rng = np.random.default_rng([ord(c) for c in case.name] + [dtype])
        kinds = [(operand.role, operand.kind) for operand in wire.KERNELS[case.kernel].operands]
        absent = [i for i, kind in enumerate(kinds) if kind == ("read", "places") and not case.documents]
        inputs = lib.operands(case.kernel, dtype, case.dims, rng, (*case.absent, *absent))
        call = Call(case, dtype, inputs)
        call._mend(lib)
        return call

    def _mend(self, lib: KernelLib) -> None:
        """Operands that another kernel makes get its values: statistics of norms, attention's output."""
        a, d, acc = self.inputs, self.case.dims, acc_of(self.dtype)
        if self.case.kernel.startswith("layernorm") and not self.case.kernel.endswith("fwd"):
            x, mean, rstd = (a[3], a[4], a[5]) if self.case.kernel == "layernorm_wgrad" else (a[2], a[4], a[5])
            assert x is not None
            assert mean is not None
            assert rstd is not None
            rows = decode(x, self.dtype).reshape(d[0], d[1])
            mean[:] = encode(rows.mean(axis=1), acc)
            rstd[:] = encode(1 / np.sqrt(rows.var(axis=1) + 1e-5), acc)
        if self.case.kernel.startswith("rmsnorm") and not self.case.kernel.endswith("fwd"):
            rstd = a[4 if self.case.kernel == "rmsnorm_igrad" else 3]
            assert rstd is not None
            rstd[:] = np.abs(rstd) + np.float32(0.5)
        if self.case.kernel.startswith("linear8"):  # the NaNs among random codes become others
            for x, operand in zip(a, wire.KERNELS[self.case.kernel].operands, strict=True):
                if operand.kind == "byte":
                    assert x is not None
                    x[(x & 0x7F) >= (0x7C if operand.name.startswith("dy") else 0x7F)] = 0x3A
        if self.case.kernel == "attention_igrad":
            b, t, h, g, head = d[:5]
            ldo, ldq, ldk, ldv = d[9:13]
            lib.call(
                "attention_fwd", self.dtype, [a[4], a[8], *a[5:8], a[10]],
                (b, t, h, g, head, ldo, ldq, ldk, ldv, *d[13:]), self.case.reals,
            )  # fmt: skip
        if self.case.kernel in ("classifier_grad", "vocab_head", "vocab_sums", "vocab_part") and d[0] > 2:
            target = a[5]
            assert target is not None
            target[1] = -1
        if self.case.kernel == "vocab_part":
            e, tops, sums = a[6], a[7], a[8]
            assert e is not None
            assert tops is not None
            assert sums is not None
            e[:] = np.exp(-np.abs(e))
            of = sums.reshape(d[6], 3, d[0])
            of[:, 0] = tops.reshape(d[4], d[0]).max(axis=0)  # no part's largest is below its blocks'
            of[:, 1] = np.abs(of[:, 1]) + d[2]

    def run(self, lib: Kernels, set_name: str, threads: int = 1, guard: str | None = None) -> list[Array | None]:
        arrays = [None if x is None else x.copy() for x in self.inputs]
        lib.call(
            self.case.kernel, self.dtype, arrays, self.case.dims, self.case.reals,
            set_name=set_name, threads=threads, guard=guard,
        )  # fmt: skip
        return arrays

    def outputs(self) -> list[tuple[int, int]]:
        """(operand, dtype) of what the kernel writes, scratch left out."""
        out = []
        for i, operand in enumerate(wire.KERNELS[self.case.kernel].operands):
            if operand.role in ("write", "update") and self.inputs[i] is not None:
                kinds = {"dt": self.dtype, "acc": acc_of(self.dtype), "f64": wire.F64, "byte": 0, "places": 0}
                out.append((i, kinds[operand.kind]))
        return out


def _magnitudes(lib: KernelLib, call: Call) -> list[Array | None] | None:
    """The sum of the terms' magnitudes behind each output element of a linear kernel: ref on absolute values."""
    if not call.case.kernel.startswith(("linear", "logits", "embed", "add_acc", "fold")):
        return None
    inputs: list[Array | None] = []
    for x, operand in zip(call.inputs, wire.KERNELS[call.case.kernel].operands, strict=True):
        if x is None or operand.kind in ("tokens", "places"):
            inputs.append(x)
            continue
        if operand.kind == "byte":  # FP8: its sign
            inputs.append(x & 0x7F)
            continue
        kind = call.dtype if operand.kind == "dt" else acc_of(call.dtype)
        inputs.append(encode(np.abs(decode(x, kind)), kind))
    lib.call(call.case.kernel, call.dtype, inputs, call.case.dims, call.case.reals)
    return inputs


def _terms(case: Case) -> int:
    d = case.dims
    inner = {"linear_fwd": 2, "linear_igrad": 1, "linear_wgrad": 0, "logits": 1}
    inner |= {"linear8_fwd": 2, "linear8_igrad": 1, "linear8_wgrad": 0, "embed_wgrad": 0, "embed_wgrad_tied": 0}
    return d[inner[case.kernel]] + 3 if case.kernel in inner else 3


def assert_close_to_ref(lib: KernelLib, call: Call, got: list[Array | None]) -> None:
    """What a set made of the call lies within the bounds of what ref makes of it."""
    case = call.case
    if call.dtype == wire.BF16 and case.kernel.startswith("attention"):
        whole = whole_of(call)
        for i, (x, w, bound) in enumerate(zip(outputs_of(call, got), whole.want, whole.bound, strict=True)):
            assert np.max(np.abs(x - w) - bound) <= 0, f"operand {i}: {np.max(np.abs(x - w) / bound):.3g} of the bound"
        return
    want, magnitudes = call.run(lib, "ref"), _magnitudes(lib, call)
    pairs = [(i, kind, want[i], got[i]) for i, kind in call.outputs()]
    largest = max((np.abs(decode(w, kind)).max() for _, kind, w, _ in pairs if kind and w is not None), default=0.0)
    for i, kind, w, x in pairs:
        assert w is not None
        assert x is not None
        if kind == 0:
            assert np.array_equal(w, x)
            continue
        w, x = decode(w, kind), decode(x, kind)
        assert np.isfinite(x).all()
        if magnitudes is not None:
            m = magnitudes[i]
            assert m is not None
            bound = 2 * _terms(case) * EPS * np.abs(decode(m, kind))
        else:
            bound = np.full(w.shape, case.rel * largest)
        if kind == wire.BF16:
            bound = bound + 2.0**-7 * np.abs(w)
        worst = np.max(np.abs(x - w) - bound)
        assert worst <= 0, f"operand {i}: off by {np.abs(x - w).max():.3g}, beyond the bound by {worst:.3g}"


WEIGHTS = ("linear_wgrad", "classifier_grad", "vocab_head", "vocab_part")
WRITING = [case for case in CASES if case.kernel in WEIGHTS and case.dims[-1] == 0 and min(case.dims[:3]) > 1]


def assert_written_as_added_to_zero(lib: Kernels, call: Call, set_name: str) -> None:
    """A weight's gradient that is written (ACCUM 0) has the bits of one that is added to +0, whatever was there."""
    at = [operand.name for operand in wire.KERNELS[call.case.kernel].operands].index("dw")
    found = []
    for accum, old in ((1, 0.0), (0, np.nan)):
        gradient = call.inputs[at]
        assert gradient is not None
        gradient[...] = encode(np.full(gradient.shape, old), wire.F32)
        made = replace(call, case=replace(call.case, dims=(*call.case.dims[:-1], accum))).run(lib, set_name)
        found.append([x.tobytes() for x in (made[i] for i, _ in call.outputs()) if x is not None])
    assert found[0] == found[1]


def head_in_place(lib: Kernels, set_name: str, in_place: bool, threads: int = 1) -> list[bytes]:
    """What the head's gradient writes, its dlogits on top of its logits or beside them."""
    r, c, v, chunk = 20, 48, 517, 8
    rng = np.random.default_rng(8)
    x, w, dw = (rng.normal(size=(n, c)).astype(np.float32) for n in (r, v, v))
    target = rng.integers(-1, v, r).astype(np.int32)
    loss, dx, logits = np.empty(r, np.float32), np.empty_like(x), np.empty((chunk, v), np.float32)
    dlogits = logits if in_place else np.empty_like(logits)
    ptrs = [loss, dx, dw, x, w, target, logits, dlogits]
    lib.call("classifier_grad", wire.F32, ptrs, (r, c, v, chunk, 1), (0.125,), set_name=set_name, threads=threads)
    return [array.tobytes() for array in (loss, dx, dw)]


def head_in_parts(lib: KernelLib, set_name: str, dtype: int, parts: int, blocks: int = 8) -> tuple[bytes, ...]:
    """Loss and gradients of a head whose blocks are shared by so many parts; 0: by the kernel of all of them."""
    rng = np.random.default_rng(11)
    r, c, v, block, chunk = 19, 24, 250, 32, 7
    x, w = encode(rng.normal(size=(r, c)), dtype), encode(rng.normal(size=(v, c)), dtype)
    target = rng.integers(0, v, r).astype(np.int32)
    target[5] = -1
    loss, dx, dw = np.empty(r, np.float32), np.empty_like(x), np.ones((v, c), np.float32)
    logits, dlogits = np.empty((chunk, v), np.float32), encode(np.zeros((chunk, v)), dtype)
    scratch = np.empty((blocks, chunk, c), np.float32)
    if not parts:
        arrays = [loss, dx, dw, x, w, target, logits, dlogits, scratch]
        lib.call("vocab_head", dtype, arrays, (r, c, v, chunk, blocks, block, 1), (0.5,), set_name=set_name)
        return loss.tobytes(), dx.tobytes(), dw.tobytes()
    each, sums = blocks // parts, np.empty((parts, 3, r), np.float32)
    rows = [(p * each * block, min(v, (p + 1) * each * block)) for p in range(parts)]
    kept = [(np.empty((r, end - first), np.float32), np.empty((each, r), np.float32)) for first, end in rows]
    for p, (first, end) in enumerate(rows):
        arrays = [*kept[p], sums[p], x, w[first:end], target]
        lib.call("vocab_sums", dtype, arrays, (r, c, end - first, each, block, first, v), set_name=set_name)
    shares = [np.empty((r, c), np.float32) for _ in rows]
    for p, (first, end) in enumerate(rows):
        own = dlogits.reshape(-1)[: chunk * (end - first)].reshape(chunk, -1)
        operands: list[Array | None] = [loss if p == 0 else None, shares[p], dw[first:end], x, w[first:end], target]
        lib.call(
            "vocab_part", dtype, [*operands, *kept[p], sums, own, scratch[:each].copy()],
            (r, c, end - first, chunk, each, block, parts, first, v, 1), (0.5,), set_name=set_name,
        )  # fmt: skip
    while len(shares) > 1:
        shares = [a + b for a, b in zip(shares[::2], shares[1::2], strict=True)]
    lib.call("cast", dtype, [dx, shares[0]], (dx.size,), set_name=set_name)
    return loss.tobytes(), dx.tobytes(), dw.tobytes()


def bits_by_chunk(lib: KernelLib, set_name: str) -> list[tuple[bytes, ...]]:
    """Loss and gradients of the classifier, of one batch in chunks of several sizes."""
    rng = np.random.default_rng(4)
    r, c, v = 23, 40, 301
    x, w = rng.normal(size=(r, c)).astype(np.float32), rng.normal(size=(v, c)).astype(np.float32)
    target = rng.integers(0, v, r).astype(np.int32)
    results = []
    for chunk in (1, 5, 23, 64):
        loss, dx, dw = np.empty(r, np.float32), np.empty((r, c), np.float32), np.ones((v, c), np.float32)
        scratch = [np.empty((chunk, v), np.float32) for _ in range(2)]
        arrays = [loss, dx, dw, x, w, target, *scratch]
        lib.call("classifier_grad", wire.F32, arrays, (r, c, v, chunk, 1), (0.5,), set_name=set_name)
        results.append((loss.tobytes(), dx.tobytes(), dw.tobytes()))
    return results
