"""The fast CPU kernels: against the oracle within bounds, and against themselves bit for bit.

Closeness: every kernel, f32 and bf16, odd shapes, against ``ref``, by the bounds of kernel_calls.py.

Equality: portable, AVX2, AVX-512 without and with BF16; gcc and clang; 1, 2, 3 and 4 threads; a row alone or among
others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.chains import chain_of, least_numbers
from tests.engine.kernel_calls import (
    CASES,
    WITH_DTYPE,
    WRITING,
    Call,
    Case,
    assert_close_to_ref,
    assert_written_as_added_to_zero,
    bits_by_chunk,
    head_in_parts,
    head_in_place,
)
from tests.engine.kernel_lib import (
    CPU_PATHS,
    Array,
    KernelLib,
    build,
    decode,
    encode,
)
from tests.support.compilers import other_than
from trainer import wire


def test_every_kernel_has_cases() -> None:
    assert {case.kernel for case in CASES} == set(wire.KERNELS)


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


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_linear_is_one_chain(kernels: KernelLib, dtype: int) -> None:
    """The order contract of linear.h to the last bit: one fma chain, then bias, then residual, then one rounding."""
    r, n, k = 15, 37, 1101
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


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_sums_that_wait_for_all_rows_are_the_same(kernels: KernelLib, dtype: int) -> None:
    """More weights than the scratch holds, and more than a block of rows: blocks of k are the outer loop. A few rows
    alone are computed in the usual order."""
    rng = np.random.default_rng(10)
    r, n, k = 265, 900 if dtype == wire.F32 else 1700, 1539
    x, w, res = (encode(rng.standard_normal(s, np.float32), dtype) for s in ((r, k), (n, k), (r, n)))
    b = rng.standard_normal(n, np.float32)

    def rows(begin: int, end: int) -> Array:
        y, m = np.empty_like(res[begin:end]), end - begin
        arrays = [y, x[begin:end].copy(), w, b, res[begin:end].copy()]
        kernels.call("linear_fwd", dtype, arrays, (m, n, k, n, k, n), set_name=kernels.sets[-1])
        return y

    whole = rows(0, r)
    for begin, end in ((0, 2), (131, 134), (264, 265)):
        assert rows(begin, end).tobytes() == whole[begin:end].tobytes(), begin


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
