"""Names of objects: what belongs to a store is told from a corpus that lies beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from checkpoint import keys
from checkpoint.probe import ensure_probed
from checkpoint.store import open_store

RUN, DIGEST = "demo-0a1b2c", "0" * 64
WORDS = {"run": RUN, "digest": DIGEST, "name": "tracker", "manifest": keys.manifest_name(1, 1)}
NO_KEYS = ("run_key", "shard_name")  # of whatever is below a run; relative to a dataset
MAKERS = [
    make
    for name, make in inspect.getmembers(keys, inspect.isfunction)
    if name.endswith(("_key", "_prefix", "_name")) and name not in NO_KEYS
]


def made(make: Callable[..., str]) -> str:
    """A key that it makes; below a run where it is relative to one."""
    kinds = inspect.signature(make).parameters
    values = [1 if kind.annotation == "int" else WORDS.get(name, "some") for name, kind in kinds.items()]
    key = make(*values)
    return key if "run" in kinds or key.startswith("data/") else keys.run_key(RUN, key)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_key_is_a_store_s_own(make: Callable[..., str]) -> None:
    key = made(make)
    assert keys.is_of_store(key + "x" if key.endswith("/") else key), key


def test_what_a_probe_leaves_is_a_store_s_own() -> None:
    store = open_store("memory:")
    ensure_probed(store)
    left = [info.key for info in store.list("")]
    assert left
    assert all(map(keys.is_of_store, left))


@pytest.mark.parametrize(
    "path",
    ["data/part-0.jsonl", "data/inputs.jsonl", "runs/a.txt", "runs/log/a.txt", "runs/demo/spec.txt", "runs/demo/spec/a",
     "indexes/a", "probe/a.txt", "corpus/runs/demo/log/1"],
)  # fmt: skip
def test_a_corpus_beside_it_is_not(path: str) -> None:
    assert not keys.is_of_store(path)
