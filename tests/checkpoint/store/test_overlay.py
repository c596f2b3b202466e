"""A store over another: one run's objects in front, all else read from the back, where nothing is ever written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from checkpoint.errors import NotFound, StoreRefused
from checkpoint.store import OverlayStore, open_store

OWN = "replay-0a1b2c3d"


@pytest.fixture
def over(tmp_path: Path) -> OverlayStore:
    front, back = (open_store((tmp_path / name).as_uri()) for name in ("a front & more", "back"))
    back.create("runs/demo-0a1b2c/spec", b"theirs")
    back.create("data/x/00000.bin", b"tokens")
    return OverlayStore(OWN, front, back)


def test_it_opens_again_by_its_address(over: OverlayStore) -> None:
    again = open_store(over.url)
    assert isinstance(again, OverlayStore)
    assert (again.url, again.describe()) == (over.url, over.describe())
    assert again.create(f"runs/{OWN}/spec", b"ours")
    assert over.get(f"runs/{OWN}/spec") == b"ours"


def test_one_run_is_the_front_stores_and_all_else_is_read_behind_it(over: OverlayStore) -> None:
    over.put(f"runs/{OWN}/live/1/x", b"hint")
    assert over.get("data/x/00000.bin", first=2, length=3) == b"ken"
    out = bytearray(3)
    over.read_into("data/x/00000.bin", [memoryview(out)], first=1)
    assert out == b"oke"
    assert over.holds("data/x/00000.bin", b"tokens", sha256=hashlib.sha256(b"tokens").digest())
    assert [i.key for i in over.list(f"runs/{OWN}/")] == [f"runs/{OWN}/live/1/x"]
    assert [i.key for i in over.list("runs/demo")] == ["runs/demo-0a1b2c/spec"]
    assert over.local_path("data/x/00000.bin") == over.back.local_path("data/x/00000.bin")
    assert over.head(f"runs/{OWN}/spec") is None
    with pytest.raises(NotFound):
        over.get(f"runs/{OWN}0/spec")
    over.delete(f"runs/{OWN}/live/1/x")
    assert not list(over.list(f"runs/{OWN}/"))


@pytest.mark.parametrize("key", ["runs/demo-0a1b2c/log/1", f"runs/{OWN}0/spec", "data/x/1", "index/x"])
def test_nothing_is_written_behind_it(over: OverlayStore, key: str) -> None:
    before = [i.key for prefix in ("runs/d", "data/", "index/") for i in over.back.list(prefix)]
    for write in (over.create, over.put):
        with pytest.raises(StoreRefused, match="is only read here"):
            write(key, b"x")
    with pytest.raises(StoreRefused, match="is only read here"):
        over.delete(key)
    assert [i.key for prefix in ("runs/d", "data/", "index/") for i in over.back.list(prefix)] == before


def test_a_listing_over_both_is_refused(over: OverlayStore) -> None:
    with pytest.raises(StoreRefused, match="in two stores"):
        over.list("runs/")


@pytest.mark.parametrize("text", ["over:", "over:?own=a", "over:?own=a&front=memory:&back=memory:&own=b"])
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(StoreRefused, match="names one run"):
        open_store(text)


def test_not_more_than_two() -> None:
    inner = OverlayStore(OWN, open_store("memory:"), open_store("memory:"))
    with pytest.raises(StoreRefused, match="one store lies over another"):
        open_store(OverlayStore(OWN, open_store("memory:"), inner).url)
