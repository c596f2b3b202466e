"""Two checkpoints side by side: which elements differ, by how much; equal blocks are not read, memory stays small."""

from __future__ import annotations

import re
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from checkpoint import diff as blocks
from checkpoint import keys
from checkpoint.digest import BLOCK_ELEMENTS
from checkpoint.errors import Damaged
from checkpoint.manifest import Manifest, merge
from checkpoint.store import Store, open_store
from flows.show.differ import KindDiff, diff, ordered
from tests.checkpoint.samples import TENSORS, state_bytes, write_parts

RUN = "demo-0a1b2c"


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def saved(
    run: str, state: list[list[bytes]], owners: Any = ((0, 1), (2, 3, 4)), step: int = 5
) -> tuple[Store, Manifest]:
    store = open_store("memory:")
    return store, merge(write_parts(store, run, state, owners, step=step, epoch=1))


def numbers() -> list[list[bytearray]]:
    """Ones everywhere."""
    return [[bytearray(f32(1.0) * t.elements) for _ in range(3)] for t in TENSORS]


def sides(change: Any) -> list[tuple[str, tuple[KindDiff, ...]]]:
    """What differs between ones and a copy with a change."""
    state, other = numbers(), numbers()
    change(other)
    pair = [saved(RUN, [[bytes(k) for k in t] for t in s]) for s in (state, other)]
    found = diff(pair[0][0], pair[0][1], pair[1][0], pair[1][1])
    return [(one.name, kinds) for one, kinds in found if kinds]


def put(state: list[list[bytearray]], tensor: int, kind: int, at: int, value: bytes) -> None:
    state[tensor][kind][4 * at : 4 * at + 4] = value


def test_equal_checkpoints_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their chunks: other owners cut the same state otherwise."""
    state = state_bytes(3)
    (store, a), (other, b) = saved(RUN, state), saved("other-0a1b2c", state, [[0], [1, 2], [3, 4]])
    monkeypatch.setattr(blocks.StateReader, "read", lambda *_: pytest.fail("a block of an equal digest is read"))
    assert all(pair.comparable and not kinds for pair, kinds in diff(store, a, other, b))


@pytest.mark.parametrize("at", [0, 1, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, 1000 * 300 - 1])
def test_one_bit_anywhere_is_found_with_its_place(at: int) -> None:
    ((name, (kind,)),) = sides(lambda s: put(s, 0, 1, at, bytes([1, 0, 0x80, 0x3F])))
    assert name == "wte.weight"
    assert (kind.kind, kind.elements, kind.first) == ("exp_avg", 1, divmod(at, 300))
    assert (kind.max_ulp, kind.max_abs, kind.not_finite) == (1, 2.0**-23, 0)
    assert kind.values == (1.0, 1.0 + 2.0**-23)


def test_the_largest_difference_and_the_ulps_over_the_sign() -> None:
    def change(s: list[list[bytearray]]) -> None:
        put(s, 2, 0, 5, f32(1.5))
        put(s, 2, 0, 599_999, f32(-1.0))
        put(s, 2, 0, 300_000, f32(float("nan")))

    ((_, (kind,)),) = sides(change)
    assert (kind.elements, kind.first, kind.values) == (3, (0, 5), (1.0, 1.5))
    assert (kind.max_abs, kind.max_ulp, kind.not_finite) == (2.0, 2 * 0x3F800000, 1)


def test_zeros_of_two_signs_differ_by_no_ulp() -> None:
    zero, minus = (np.frombuffer(f32(x), "<u4") for x in (0.0, -0.0))
    assert (ordered(zero) == ordered(minus)).all()
    smallest = np.array([1, 0x80000001], dtype="<u4")
    assert ordered(smallest).tolist() == [1, -1]


def test_tensors_of_one_side_and_of_another_shape() -> None:
    state = state_bytes(3)
    (store, a), (other, b) = saved(RUN, state), saved(RUN, state)
    table = (*b.tensors[:3], replace(b.tensors[3], name="ln.bias"), replace(b.tensors[4], shape=(1024, 256)))
    renamed = replace(b, tensors=table)
    told = {pair.name: pair for pair, _ in diff(store, a, other, renamed)}
    assert (told["ln.weight"].only, told["ln.bias"].only) == ("a", "b")
    assert told["whole.block"].shapes == ((512, 512), (1024, 256))
    assert not told["whole.block"].comparable


def test_memory_stays_small_where_everything_differs() -> None:
    (store, a), (other, b) = saved(RUN, state_bytes(3)), saved(RUN, state_bytes(4))
    whole = sum(t.elements * 4 for t in TENSORS) * 3
    assert whole > 12 << 20
    tracemalloc.start()
    try:
        told = list(diff(store, a, other, b))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [len(kinds) for _, kinds in told] == [3] * len(TENSORS)
    assert peak < 25 * blocks.READ_BYTES


def test_a_damaged_block_is_named() -> None:
    (store, a), (other, b) = saved(RUN, state_bytes(3)), saved(RUN, state_bytes(4))
    key = keys.run_key(RUN, a.chunks[0].name)
    data = bytearray(store.get(key))
    data[100] ^= 4
    store.delete(key)
    store.create(key, data)
    with pytest.raises(Damaged, match=re.escape(key)):
        list(diff(store, a, other, b))
