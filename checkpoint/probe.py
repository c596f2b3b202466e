"""Does this store keep the one promise that everything rests on? Asked before a run's first write (all that a store is
good for: ``doctor.py``).

A store that takes ``If-None-Match: *`` and ignores it lets two drivers own one run; several do. So: 16 threads create
one object at the same moment, a few rounds; exactly one may win, every loser must be told, all must read the winner's
bytes, a late creator must lose, and an object must be seen by name and in the listing once its create has answered.

The objects lie under ``probe/`` of the root; they are tiny. The collector deletes them a day later (collect/probes.py).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from checkpoint.errors import NotFound, StoreRefused, StoreUnavailable
from checkpoint.store.base import Store

logger = logging.getLogger(__name__)

CREATORS = 16
ROUNDS = 4


def probe(store: Store, *, rounds: int = ROUNDS, creators: int = CREATORS) -> None:
    """Return where the store keeps its promise; Unordered with what went wrong where not.

    StoreUnavailable where it does not answer: that says nothing about it.
    """
    token = secrets.token_hex(8)
    with ThreadPoolExecutor(creators, thread_name_prefix="probe") as pool:
        for number in range(rounds):
            race(store, pool, f"probe/{token}/{number:04d}", creators)
    logger.info("store %s: %d rounds of %d racing creators had one winner each", store.describe(), rounds, creators)


def ensure_probed(store: Store) -> None:
    """``probe`` once a store address: a marker object says that it passed.

    The marker is named by the address, so a copy of the store elsewhere is probed anew.
    """
    marker = f"probe/passed-{hashlib.sha256(store.url.encode()).hexdigest()[:32]}"
    try:
        store.get(marker, max_bytes=1 << 10)  # not head: S3 says there only that it refuses, not why
    except NotFound:
        probe(store)
    else:
        return
    store.create(marker, b"one winner each\n")


def race(store: Store, pool: ThreadPoolExecutor, key: str, creators: int, size: int = 64) -> None:
    """``creators`` threads (as many as ``pool`` must have) create one object of this many bytes at the same moment.

    Unordered where not exactly one of them won, or what it made is not kept and shown; StoreUnavailable where the
    store did not answer.
    """
    refuse = partial(Unordered, store)
    if store.head(key) is not None:
        raise refuse(f"object {key} exists before anybody has created it")
    start = threading.Barrier(creators)
    tokens = [f"{number:04d} {secrets.token_hex(16)}".encode().ljust(size) for number in range(creators)]

    def create(data: bytes) -> bool:
        start.wait()
        return store.create(key, data)

    waiting: list[Future[bool]] = []
    try:
        waiting += [pool.submit(create, data) for data in tokens]
    except RuntimeError:  # no thread more may be started: those that are would wait for ever
        start.abort()
        raise
    unclear: StoreUnavailable | None = None
    won: list[bytes] = []
    for data, future in zip(tokens, waiting, strict=True):
        try:
            if future.result():
                won.append(data)
        except StoreUnavailable as error:
            unclear = error
    if len(won) > 1:
        raise refuse(f"{len(won)} of {creators} racing creators of one object were told that they made it")
    if unclear is not None:
        raise unclear
    if not won:
        raise refuse(f"none of {creators} racing creators of one object made it")
    if store.get(key, max_bytes=max(size, 1 << 10)) != won[0]:
        raise refuse("the object does not hold the bytes of the creator that was told that it made it")
    if store.create(key, b"late " + secrets.token_hex(16).encode()):
        raise refuse("a second create of an object that exists was told that it made it")
    if store.get(key, max_bytes=max(size, 1 << 10)) != won[0]:
        raise refuse("a create that lost changed the object")
    if [info.key for info in store.list(key)] != [key]:
        raise refuse("an object that was just created is not in the listing")


class Unordered(StoreRefused):
    """The store does not keep its promise; ``why``: what was seen."""

    def __init__(self, store: Store, why: str) -> None:
        super().__init__(
            f"store {store.describe()} cannot order writers: {why}. hotstage needs atomic create-if-absent "
            "(S3: PutObject with If-None-Match: *; a folder: link(2)): use a store that has it, with --store (what "
            "others were found to be like: docs/stores.md; all that one can do: `hotstage ckpt doctor STORE_URL`)"
        )
        self.why = why
