"""The fast CPU kernels: against the oracle within bounds, and against themselves bit for bit.

Closeness: every kernel, f32 and bf16, odd shapes, against ``ref`` (which computes in double). A sum of K terms in f32
may be off by gamma_K = K 2^-24 times the sum of the terms' magnitudes; that sum is taken from ``ref`` itself, called on
absolute values, where the kernel is linear. Other kernels are compared with a stated fraction of the largest output.
A result stored as bf16 may be the neighbour: 2^-7 relative more.

Equality: portable, AVX2, AVX-512 without and with BF16; gcc and clang; 1, 2, 3 and 4 threads; a row alone or among
others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.engine.kernel_lib import (
    CPU_PATHS,
    Array,
    KernelLib,
    Kernels,
    acc_of,
    build,
    decode,
    encode,
    to_bf16,
)
from tests.support.compilers import other_than
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


def test_every_kernel_has_cases() -> None:
    assert {case.kernel for case in CASES} == set(wire.KERNELS)


def assert_close_to_ref(lib: KernelLib, call: Call, got: list[Array | None]) -> None:
    """What a set made of the call lies within the bounds of what ref makes of it."""
    case = call.case
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


@pytest.mark.parametrize(("case", "dtype"), WITH_DTYPE)
def test_right_and_equal(kernels: KernelLib, other: KernelLib, case: Case, dtype: int) -> None:
    """Close to ref; equal bits of every build, both compilers, any number of threads; and nothing outside the operands
    is touched."""
    call = Call.make(kernels, case, dtype)
    fast = [name for name in kernels.sets if name != "ref"]
    runs: list[tuple[str, list[Array | None]]] = [("first", call.run(kernels, fast[-1]))]
    assert_close_to_ref(kernels, call, runs[0][1])
    runs += [(f"{name} guarded", call.run(kernels, name, guard="after")) for name in fast]
    runs += [("guarded before", call.run(kernels, fast[-1], guard="before"))]
    runs += [(f"{fast[-1]} {n} threads", call.run(kernels, fast[-1], threads=n)) for n in (2, 3, 4)]
    runs += [(f"{fast[0]} 2 threads", call.run(kernels, fast[0], threads=2))]
    runs += [(f"{name} other compiler", call.run(other, name)) for name in fast]
    for i, _ in call.outputs():
        first = runs[0][1][i]
        assert first is not None
        for label, arrays in runs[1:]:
            x = arrays[i]
            assert x is not None
            assert x.tobytes() == first.tobytes(), f"operand {i} differs: {label}"


@pytest.fixture(scope="module")
def other() -> KernelLib:
    """The kernels by the compiler that the main fixture did not use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOTSTAGE_TEST_CC", other_than(os.environ.get("HOTSTAGE_TEST_CC", "cc")))
        return KernelLib(build())


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


def test_gradients_of_logits_in_their_place(kernels: KernelLib) -> None:
    for set_name in kernels.sets:
        apart = head_in_place(kernels, set_name, False)
        assert all(head_in_place(kernels, set_name, True, threads) == apart for threads in (1, 2)), set_name


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_adamw_copy_has_the_bits_that_adamw_copies(kernels: KernelLib, dtype: int) -> None:
    """The optimistic step runs on what adamw_copy made before adamw itself runs."""
    call = Call.make(kernels, Case("adamw", (20001, 1), (0.9, 0.95, 1e-8, 0.1)), dtype)
    w, m, v, g, wc, ctl = call.inputs
    for set_name in kernels.sets:
        assert wc is not None
        foreseen = np.empty_like(wc)
        kernels.call(
            "adamw_copy", dtype, [foreseen, w, m, v, g, ctl], (20001,), call.case.reals, set_name=set_name, threads=2
        )
        copied = call.run(kernels, set_name)[4]
        assert copied is not None
        assert foreseen.tobytes() == copied.tobytes(), set_name


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_gradients_of_a_tied_embedding_have_the_bits_of_two(kernels: KernelLib, dtype: int) -> None:
    """The head's gradient and one of the embedding's own, added up, are what one takes that has the head's already."""
    call = Call.make(kernels, Case("embed_wgrad_tied", (300, 130, 70, 100)), dtype)
    head, dwpe, dy, tok, *_ = call.inputs
    for set_name in kernels.sets:
        own, places = np.zeros((70, 130), np.float32), None if dwpe is None else dwpe.copy()
        both = None if head is None else head.copy()
        kernels.call("embed_wgrad", dtype, [own, places, dy, tok], call.case.dims, set_name=set_name)
        kernels.call("add_acc", wire.F32, [both, own], (own.size,), set_name=set_name)
        for threads in (1, 3):
            one = call.run(kernels, set_name, threads)
            for mine, other in ((one[0], both), (one[1], places)):
                assert mine is not None
                assert other is not None
                assert mine.tobytes() == other.tobytes(), (set_name, threads)


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_muon_copy_has_the_bits_that_muon_copies(kernels: KernelLib, dtype: int) -> None:
    call = Call.make(kernels, Case("muon", (20001,), (0.95, 5.0, 0.1)), dtype)
    w, _, _, o, wc, ctl = call.inputs
    for set_name in kernels.sets:
        assert wc is not None
        foreseen = np.empty_like(wc)
        kernels.call("muon_copy", dtype, [foreseen, w, o, ctl], (20001,), (5.0, 0.1), set_name=set_name, threads=2)
        copied = call.run(kernels, set_name)[4]
        assert copied is not None
        assert foreseen.tobytes() == copied.tobytes(), set_name


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """fma in f32, correctly rounded: exact product in f64, the sum rounded to odd, then to f32."""
    p, x = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + x
    t = s - p
    e = (p - (s - t)) + (x - t)
    bits = s.view(np.int64).copy()
    even = (e != 0) & (bits & 1 == 0)
    bits += np.where(even, np.where((e > 0) == (s > 0), 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _fma32_flushed(a: Array, b: Array, c: Array) -> Array:
    """The same, where denormal operands and results are zero of their sign. What is denormal is said after rounding to
    24 bits of whatever exponent: there the sum is computed 2^100 times as large.
    """
    a, b, c = _flushed(a), _flushed(b), _flushed(c)
    small = np.abs(a.astype(np.float64) * b + c) < 2.0**-100
    up = np.float32(2.0**50)
    with np.errstate(over="ignore", invalid="ignore"):
        large = _fma32(a * up, b * up, c * up * up)
    low = np.where(np.abs(large) < 2.0**-26, np.copysign(np.float32(0), large), (large / up) / up)
    return np.where(small, low, _fma32(a, b, c))


def chain_of(a: Array, b: Array, start: Array, dtype: int) -> Array:
    """gemm.h's contract: start[m, n] + a[m, k] times b[n, k], one fma after the other."""
    k = a.shape[1]
    a, b = a.astype(np.float32), b.astype(np.float32)
    order = list(range(k)) if dtype == wire.F32 else [i ^ 1 for i in range((k + 1) // 2 * 2)]
    if k % 2:
        a, b = (np.concatenate([x, np.zeros((len(x), 1), np.float32)], 1) for x in (a, b))
    chain, fma = start, _fma32 if dtype == wire.F32 else _fma32_flushed
    for i in order:
        chain = fma(np.broadcast_to(a[:, i][:, None], start.shape), np.broadcast_to(b[:, i], start.shape), chain)
    return chain


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_linear_is_one_chain(kernels: KernelLib, dtype: int) -> None:
    """The order contract of linear.h to the last bit: one fma chain, then bias, then residual, then one rounding."""
    r, n, k = 15, 37, 801
    rng = np.random.default_rng(5)
    x, w = (encode(rng.normal(size=s), dtype) for s in ((r, k), (n, k)))
    b, res = rng.normal(size=n).astype(np.float32), encode(rng.normal(size=(r, n)), dtype)
    xf, wf, rf = (decode(v, dtype).astype(np.float32) for v in (x, w, res))
    chain = chain_of(xf, wf, np.zeros((r, n), np.float32), dtype)
    y = np.empty_like(res)
    fast = kernels.sets[-1]
    kernels.call("linear_fwd", dtype, [y, x, w, b, res], (r, n, k, n, k, n), set_name=fast, threads=2)
    assert y.tobytes() == encode((chain + b) + rf, dtype).tobytes()

    dy = encode(rng.normal(size=(r, n)), dtype)
    df = decode(dy, dtype).astype(np.float32)
    dw = rng.normal(size=(n, k)).astype(np.float32)
    db = rng.normal(size=n).astype(np.float32)
    want_w, want_b = chain_of(df.T, xf.T, dw, dtype), db.copy()
    for i in range(r):
        want_b = want_b + df[i]
    kernels.call("linear_wgrad", dtype, [dw, db, dy, x], (r, n, k, n, k, 1), set_name=fast, threads=2)
    assert dw.tobytes() == want_w.tobytes()
    assert db.tobytes() == want_b.tobytes()


def least_numbers(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """bf16 with exponents from low to high, and some that are denormal or zero, of both signs."""
    x = np.ldexp(1 + rng.integers(0, 128, shape) / 128, rng.integers(low, high, shape))
    x = np.where(rng.random(shape) < 0.1, rng.integers(0, 3, shape) * 2.0**-130, x)
    return to_bf16((x * rng.choice([-1.0, 1.0], shape)).astype(np.float32))


@pytest.mark.parametrize("set_name", list(CPU_PATHS))
def test_denormal_numbers_of_bf16_products_are_zero(kernels: KernelLib, set_name: str) -> None:
    """Sums about the least normal number, from old ones that are denormal too: what VDPBF16PS gives, on every path, and
    the mode ends with the product.
    """
    if set_name not in kernels.sets:
        pytest.skip(f"this CPU has no {set_name}")
    rng = np.random.default_rng(12)
    r, n, k = 33, 96, 200
    dy, x = least_numbers(rng, (r, n), -70, -55), least_numbers(rng, (r, k), -75, -60)
    dw = np.ldexp(rng.normal(size=(n, k)), rng.integers(-135, -120, (n, k))).astype(np.float32)
    want = chain_of(decode(dy, wire.BF16).T, decode(x, wire.BF16).T, dw, wire.BF16)
    kernels.call("linear_wgrad", wire.BF16, [dw, None, dy, x], (r, n, k, n, k, 1), set_name=set_name)
    assert dw.tobytes() == want.tobytes()
    assert (np.abs(want) < 2.0**-120).any()
    assert (np.float32(2.0**-130) * np.float32(2.0)) > 0, "the process's own mode is as it was"
    dw, old = np.full((n, k), 2.0**-140, np.float32), np.full((n, k), 2.0**-140, np.float32)
    zero = [np.zeros((r, n), np.float32), np.zeros((r, k), np.float32)]
    kernels.call("linear_wgrad", wire.F32, [dw, None, *zero], (r, n, k, n, k, 1), set_name=set_name)
    assert dw.tobytes() == old.tobytes(), "products of float32 keep them"


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


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
@pytest.mark.parametrize("case", WRITING, ids=lambda case: case.name)
def test_a_gradient_that_is_written(kernels: KernelLib, case: Case, dtype: int) -> None:
    for set_name in kernels.sets:
        assert_written_as_added_to_zero(kernels, Call.make(kernels, case, dtype), set_name)


def _alone(
    kernels: KernelLib, kernel: str, arrays: Sequence[Array], dims: Sequence[int], reals: Sequence[float]
) -> Array:
    kernels.call(kernel, wire.F32, arrays, dims, reals, set_name=kernels.sets[-1])
    return arrays[0]


def test_a_row_does_not_know_its_neighbours(kernels: KernelLib) -> None:
    rng = np.random.default_rng(9)
    r, n, k = 29, 70, 500
    x, w = rng.normal(size=(r, k)).astype(np.float32), rng.normal(size=(n, k)).astype(np.float32)
    b, c = rng.normal(size=k).astype(np.float32), rng.normal(size=k).astype(np.float32)

    def linear(rows: Array) -> Array:
        m, y = len(rows), np.empty((len(rows), n), np.float32)
        kernels.call("linear_fwd", wire.F32, [y, rows, w, None, None], (m, n, k, n, k, n), set_name=kernels.sets[-1])
        return y

    def norm(rows: Array) -> Array:
        m, y = len(rows), np.empty_like(rows)
        stats = [np.empty(m, np.float32) for _ in range(2)]
        return _alone(kernels, "layernorm_fwd", [y, *stats, rows, b, c], (m, k), (1e-5,))

    def loss(rows: Array) -> Array:
        m = len(rows)
        target = np.full(m, 3, np.int32)
        out = [np.empty(m, np.float32), rows, w, target, np.empty((4, n), np.float32)]
        return _alone(kernels, "classifier_fwd", out, (m, k, n, 4), ())

    for op in (linear, norm, loss):
        whole = op(x)
        for i in (0, 11, 12, 28):
            assert op(x[i : i + 1].copy()).tobytes() == whole[i : i + 1].tobytes(), (op.__name__, i)


def test_attention_of_a_prefix(kernels: KernelLib) -> None:
    """A row's output depends on the keys up to it: a longer sequence begins with the same bits."""
    rng = np.random.default_rng(2)

    def fwd(t: int, h: int, d: int) -> Array:
        o, lse, ld = np.empty((t, h * d), np.float32), np.empty((h, t), np.float32), h * d
        arrays = [o, lse, *(x[:t].copy() for x in (q, k, v))]
        return _alone(kernels, "attention_fwd", arrays, (1, t, h, h, d, ld, ld, ld, ld), (d**-0.5,))

    # keys and values of 1250 rows of 512 do not fit a worker's scratch, of 700 they do
    for most, h, d, shorter in ((300, 2, 24, (1, 63, 64, 65, 192, 250)), (1250, 1, 512, (700,))):
        q, k, v = (rng.normal(size=(most, h * d)).astype(np.float32) for _ in range(3))
        whole = fwd(most, h, d)
        for t in shorter:
            assert fwd(t, h, d).tobytes() == whole[:t].tobytes(), (most, t)


@pytest.mark.parametrize("window", [0, 100])
def test_attention_does_not_know_other_documents(kernels: KernelLib, window: int) -> None:
    """A row's bits depend on what it reads, and on its place: with other documents around its own they are the same,
    forward and back."""
    rng = np.random.default_rng(6)
    t, h, g, d = 700, 2, 1, 24
    dy, q, k, v = (rng.normal(size=(t, n * d)).astype(np.float32) for n in (h, h, g, g))
    fwd, igrad = (h * d, h * d, g * d, g * d), (h * d, g * d, g * d, h * d, h * d, h * d, g * d, g * d)
    many = [0, 30, 64, 65, 190, 210, 420, 699]

    def of(starts: Sequence[int]) -> list[Array]:
        first = np.zeros(t, np.int32)
        for start in starts:
            first[start:] = start
        o, lse = np.empty((t, h * d), np.float32), np.empty((h, t), np.float32)
        _alone(kernels, "attention_fwd", [o, lse, q, k, v, first], (1, t, h, g, d, *fwd, window), (d**-0.5,))
        grads = [np.empty((t, n * d), np.float32) for n in (h, g, g)]
        arrays = [*grads, dy, o, q, k, v, lse, np.empty_like(lse), first]
        _alone(kernels, "attention_igrad", arrays, (1, t, h, g, d, *igrad, window), (d**-0.5,))
        return [o, lse.T.copy(), *grads]

    whole = of(many)
    for begin, end in zip(many, [*many[1:], t], strict=True):
        alone = of([0, begin, end] if end < t else [0, begin])
        for x, y in zip(alone, whole, strict=True):
            assert x[begin:end].tobytes() == y[begin:end].tobytes(), (begin, end)
    if not window:  # the one document that there is when nothing is said
        o, lse = np.empty((t, h * d), np.float32), np.empty((h, t), np.float32)
        _alone(kernels, "attention_fwd", [o, lse, q, k, v], (1, t, h, g, d, *fwd), (d**-0.5,))
        assert [x.tobytes() for x in of([0])[:2]] == [o.tobytes(), lse.T.tobytes()]


def test_attention_of_more_than_the_scratch_has_the_same_gradient(kernels: KernelLib) -> None:
    """Of 400 rows of 512 keys and values are kept, of 700 the running dk and dv fit; of 1,100 and
    2,000 dk and dv are made in two and three spans of keys. Rows without a gradient of their own add nothing: the bits
    of the first 400 are the same."""
    rng = np.random.default_rng(3)
    most, h, d = 400, 2, 512
    q, y, dy = (rng.normal(size=(2000, h * d)).astype(np.float32) for _ in range(3))
    k, v = (rng.normal(size=(2000, d)).astype(np.float32) for _ in range(2))
    dy[most:] = 0

    def first(t: int) -> list[bytes]:
        lse, delta = np.full((h, t), np.log(t), np.float32), np.empty((h, t), np.float32)
        lse[:, :most] = np.log(most)
        out, dk, dv = np.empty((t, h * d), np.float32), np.empty((t, d), np.float32), np.empty((t, d), np.float32)
        arrays = [out, dk, dv, *(x[:t].copy() for x in (dy, y, q, k, v)), lse, delta]
        ld = h * d
        _alone(kernels, "attention_igrad", arrays, (1, t, h, 1, d, ld, d, d, ld, ld, ld, d, d), (d**-0.5,))
        return [x[:most].tobytes() for x in (out, dk, dv)]

    kept = first(most)
    for t in (700, 1100, 2000):
        assert first(t) == kept, t


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


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_a_head_in_parts_has_the_bits_of_the_whole(kernels: KernelLib, dtype: int) -> None:
    for set_name in kernels.sets[1:]:
        whole = head_in_parts(kernels, set_name, dtype, 0)
        assert all(head_in_parts(kernels, set_name, dtype, parts) == whole for parts in (1, 2, 4, 8)), set_name


def test_a_head_in_blocks_computes_what_one_in_one_piece_does(kernels: KernelLib) -> None:
    """In double, where both are exact to all that a loss could show."""
    rng = np.random.default_rng(12)
    r, c, v, chunk = 9, 12, 100, 4
    x, w, target = rng.normal(size=(r, c)), rng.normal(size=(v, c)), rng.integers(-1, v, r).astype(np.int32)
    found = []
    for kernel, dims in (("classifier_grad", (r, c, v, chunk, 1)), ("vocab_head", (r, c, v, chunk, 8, 13, 1))):
        loss, dx, dw, logits, dlogits = (np.ones(s) for s in (r, (r, c), (v, c), (chunk, v), (chunk, v)))
        scratch = [logits, dlogits, np.empty((8, chunk, c))][: 2 if kernel == "classifier_grad" else 3]
        kernels.call(kernel, wire.F64, [loss, dx, dw, x, w, target, *scratch], dims, (0.5,))
        found.append((loss, dx, dw))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


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


def test_chunks_do_not_change_bits(kernels: KernelLib) -> None:
    results = bits_by_chunk(kernels, kernels.sets[-1])
    assert all(x == results[0] for x in results)


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_in_place(kernels: KernelLib, dtype: int) -> None:
    """What the contracts call "may be": the output on top of an input gives the same bits."""
    rng = np.random.default_rng(6)
    fast = kernels.sets[-1]
    n, r, c = 5000, 37, 50
    x, dy = (encode(rng.normal(size=n), dtype) for _ in range(2))
    y = np.empty_like(x)
    kernels.call("gelu_igrad", dtype, [y, dy, x], (n,), set_name=fast, threads=2)
    kernels.call("gelu_igrad", dtype, [dy, dy, x], (n,), set_name=fast, threads=2)
    assert y.tobytes() == dy.tobytes()

    gu, g = encode(rng.normal(size=(r, 2 * c)), dtype), encode(rng.normal(size=(r, c)), dtype)
    dgu = np.empty_like(gu)
    kernels.call("swiglu_igrad", dtype, [dgu, g, gu], (r, c), set_name=fast, threads=2)
    kernels.call("swiglu_igrad", dtype, [gu, g, gu], (r, c), set_name=fast, threads=2)
    assert dgu.tobytes() == gu.tobytes()

    a, w = encode(rng.normal(size=(r, c)), dtype), encode(rng.normal(size=(c, c)), dtype)
    res = encode(rng.normal(size=(r, c)), dtype)
    out = np.empty_like(res)
    kernels.call("linear_fwd", dtype, [out, a, w, None, res], (r, c, c, c, c, c), set_name=fast, threads=2)
    kernels.call("linear_fwd", dtype, [res, a, w, None, res], (r, c, c, c, c, c), set_name=fast, threads=2)
    assert out.tobytes() == res.tobytes()


@pytest.mark.parametrize("set_name", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_bf16_rounds_to_nearest_even(kernels: KernelLib, set_name: str) -> None:
    if set_name not in kernels.sets:
        pytest.skip(f"this CPU has no {set_name}")
    rng = np.random.default_rng(8)
    bits = np.concatenate([
        rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32),
        np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001, 0x80000000,
                  0x7F800001, 0x7FC00000, 0xFFFFFFFF], np.uint32),
    ])  # fmt: skip
    src, got = bits.view(np.float32), np.empty(bits.size, np.uint16)
    want = np.empty_like(got)
    kernels.call("cast", wire.BF16, [got, src], (src.size,), set_name=set_name)
    kernels.call("cast", wire.BF16, [want, src], (src.size,))
    assert got.tobytes() == want.tobytes()


def test_not_finite_comes_through(kernels: KernelLib) -> None:
    """A NaN or an overflow shows in the loss and in the squared norm: nothing turns it into a number."""
    fast = kernels.sets[-1]
    r, c, v = 5, 32, 40
    for bad in (np.nan, np.inf):
        x, w = np.ones((r, c), np.float32), np.ones((v, c), np.float32)
        x[2, 3] = bad
        loss, target, scratch = np.empty(r, np.float32), np.zeros(r, np.int32), np.empty((4, v), np.float32)
        kernels.call("classifier_fwd", wire.F32, [loss, x, w, target, scratch], (r, c, v, 4), set_name=fast)
        assert not np.isfinite(loss[2])
        assert np.isfinite(np.delete(loss, 2)).all()
        q = np.ones((r, c), np.float32)
        q[3, 0] = bad
        o, lse = np.empty_like(q), np.empty((1, r), np.float32)
        dims = (1, r, 1, 1, c, c, c, c, c)
        kernels.call("attention_fwd", wire.F32, [o, lse, q, q, np.ones_like(q)], dims, (1.0,), set_name=fast)
        assert not np.isfinite(o[3]).all()
        assert np.isfinite(o[:3]).all()
        for kernel in ("gelu_fwd", "swiglu_fwd"):
            z = np.ones(2 * r, np.float32)
            z[1] = bad
            y = np.empty(2 * r if kernel == "gelu_fwd" else r, np.float32)
            flat = (2 * r,) if kernel == "gelu_fwd" else (1, r)
            kernels.call(kernel, wire.F32, [y, z], flat, set_name=fast)
            assert not np.isfinite(y[1])
        out, part = np.empty(1), np.empty(1)
        kernels.call("sumsq", wire.F32, [out, x.reshape(-1), part], (x.size,), set_name=fast)
        assert not np.isfinite(out[0])


def test_f64_is_refused(kernels: KernelLib) -> None:
    x = np.ones(4)
    with pytest.raises(AssertionError, match="status -6"):
        kernels.call("gelu_fwd", wire.F64, [x.copy(), x], (4,), set_name=kernels.sets[-1])
