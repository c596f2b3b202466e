"""Canonical msgpack and sealed maps: one way to write, and hostile bytes end in Damaged, nothing else."""

from __future__ import annotations

import hashlib
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import codec
from checkpoint.errors import Damaged

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_round_trip(value: object) -> None:
    try:
        data = codec.pack(value)
    except ValueError:
        return  # nested too deep
    again = codec.unpack(data, "x", max_bytes=1 << 20)
    assert again == value
    assert codec.pack(again) == data


@given(st.dictionaries(st.text(max_size=8).filter(lambda k: k != "digest"), values, max_size=14))
def test_sealed_round_trip_is_plain_msgpack_with_the_digest_inside(value: dict[str, object]) -> None:
    try:
        data = codec.seal(value)
    except ValueError:
        return
    assert codec.unseal(data, "x", max_bytes=1 << 20) == value
    plain = msgpack.unpackb(data, strict_map_key=True)
    assert plain.pop("digest") == hashlib.sha256(codec.pack(value)).digest()
    assert plain == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "msgpack"),
        (b"\x81\xa1a", "msgpack"),
        (b"\xc0\xc0", "msgpack"),
        (b"\xc1", "msgpack"),
        (b"\x82\xa1b\x01\xa1a\x01", "ascending"),
        (b"\x82\xa1a\x01\xa1a\x01", "twice"),
        (b"\x81\x01\x01", "msgpack"),
        (b"\x81\xc4\x01a\x01", "not text"),
        (b"\xcd\x00\x01", "canonical"),
        (b"\xca\x3f\x80\x00\x00", "canonical"),
        (b"\xcb\x7f\xf8" + bytes(6), "finite"),
        (b"\xcb\x7f\xf0" + bytes(6), "finite"),
        (b"\xd9\x01a", "canonical"),
        (b"\xa1\xff", "msgpack"),
        (b"\xc7\x00\x05", "msgpack"),
        (b"\xd4\x05a", "msgpack"),
        (b"\xd6\xff" + bytes(4), "x:"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (b"\xdb\xff\xff\xff\xff", "msgpack"),
        (b"\x91" * 8 + b"\x91\x01", "deeper"),
        (b"\x91" * 200000 + b"\x01", "x:"),
        (b"\x81\xa1a" * 5000 + b"\x01", "x:"),
    ],
)
def test_other_forms_are_damaged(data: bytes, says: str) -> None:
    with pytest.raises(Damaged, match=says):
        codec.unpack(data, "x", max_bytes=1 << 20)


def test_size_is_checked_first() -> None:
    with pytest.raises(Damaged, match="limit is 10"):
        codec.unpack(bytes(11), "x", max_bytes=10)
    sealed = codec.seal({"a": b"x" * 100})
    with pytest.raises(Damaged, match="must have"):
        codec.unseal(sealed, "x", max_bytes=100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1 << 64, -(1 << 63) - 1, {1: 2}, {1, 2}, object()])
def test_values_without_a_form_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"canonical|64 bits|must be text"):
        codec.pack(value)


def test_every_flipped_bit_and_every_cut_of_a_sealed_map_is_found() -> None:
    data = codec.seal({"a": 1, "body": {"x": [1, 2, b"bytes"], "y": None}, "n": 77})
    for at in range(len(data) * 8):
        torn = bytearray(data)
        torn[at // 8] ^= 1 << at % 8
        with pytest.raises(Damaged):
            codec.unseal(bytes(torn), "x", max_bytes=1 << 16)
    for size in range(len(data)):
        with pytest.raises(Damaged):
            codec.unseal(data[:size], "x", max_bytes=1 << 16)
    with pytest.raises(Damaged):
        codec.unseal(data + b"\0", "x", max_bytes=1 << 16)


def test_random_bytes_end_in_damaged() -> None:
    rng = random.Random(11)
    for _ in range(4000):
        data = rng.randbytes(rng.randrange(200))
        try:
            value = codec.unpack(data, "x", max_bytes=1 << 10)
        except Damaged:
            continue
        assert codec.pack(value) == data


def test_fields_name_what_is_wrong() -> None:
    f = codec.Fields({"a": 1, "b": True, "c": "x" * 10, "d": b"12", "e": [1, 2], "g": "AB"}, "record 5")
    for call, says in (
        (lambda: f.integer("zz", 0), "record 5: no 'zz'"),
        (lambda: f.integer("a", 2), "'a' is 1, must be 2 to"),
        (lambda: f.integer("b", 0), "'b' must be int, found bool"),
        (lambda: f.text("c", 5), "longer than 5"),
        (lambda: f.raw("d", 3), "has 2 bytes, must have 3"),
        (lambda: f.array("e", 1), "has 2 entries, the limit is 1"),
        (lambda: f.hex("g", 1), "lower-case hex"),
        (lambda: f.map("a"), "must be dict"),
        (lambda: f.real("c"), "must be float"),
    ):
        with pytest.raises(Damaged) as caught:
            call()
        assert says in str(caught.value)
    with pytest.raises(Damaged, match="a map was expected"):
        codec.Fields([], "record 5")
    with pytest.raises(Damaged, match="unknown entry"):
        codec.Fields({"q": 1}, "record 5").done()


def test_a_large_map_is_looked_at_entry_by_entry_and_as_strictly() -> None:
    """Its bytes are not packed once more to see whether they are in canonical form."""
    value = {"a": bytes(2 << 20), "b": b"xyz", "c": [1, {"d": "e"}], "f": 7}
    good = codec.pack(value)
    assert codec.unpack(good, "large", max_bytes=4 << 20) == value
    for old, new in (
        (b"\xc4\x03xyz", b"\xc5\x00\x03xyz"),  # a head that is longer than it must be
        (b"\xc4\x03xyz", b"\xc6\x00\x00\x00\x03xyz"),
        (b"\xa1f\x07", b"\xa1f\xcc\x07"),
        (b"\xa1f\x07", b"\xd9\x01f\x07"),
        (b"\x92\x01\x81", b"\xdc\x00\x02\x01\x81"),
        (good[:1], b"\xde\x00\x04"),
    ):
        assert good.count(old) == 1 or old == good[:1]
        with pytest.raises(Damaged, match="canonical"):
            codec.unpack(good.replace(old, new, 1), "large", max_bytes=4 << 20)
    with pytest.raises(Damaged):
        codec.unpack(good + b"\x00", "large", max_bytes=4 << 20)


@given(values)
def test_a_stream_has_the_bytes_of_the_whole(value: object) -> None:
    entries = {"v": 1, "rows": [[value, 1], [value, 2]], "raw": b"abc" * 50, "text": "x"}
    rows = codec.Stream.rows([1, 2], lambda n: [value, n], at_once=1)
    streamed = {**entries, "rows": rows, "raw": codec.Stream.raw(150, [b"abc" * 49, b"abc"])}
    try:
        whole = codec.seal(entries)
    except ValueError:
        return  # nested too deep
    assert b"".join(codec.seal_stream(streamed)) == whole
