"""Stores by address: ``file:///abs/folder``, ``s3://bucket/prefix[?endpoint=…&region=…&path_style=1]``, ``memory:``."""

from __future__ import annotations

from checkpoint.errors import StoreRefused
from checkpoint.store.address import address, endpoint_of, folder_of
from checkpoint.store.base import Data, Info, Pace, Store
from checkpoint.store.file import FileStore
from checkpoint.store.memory import MemoryStore
from checkpoint.store.overlay import SCHEME, OverlayStore, open_overlay

__all__ = ["Data", "Info", "OverlayStore", "Pace", "Store", "address", "endpoint_of", "open_store"]


def open_store(url: str, *, begun: bool = False) -> Store:
    """The store at this address; no request is made yet. ``memory:`` gives a new, empty one each time. ``begun``: it
    has a run, as whoever opens it knows: a folder without any is waited for, not begun.

    >>> open_store("memory:").create("probe/a", b"1")
    True
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "memory":
        if url != "memory:":
            raise StoreRefused(f"store {url!r}: a memory store has no name, write memory:")
        return MemoryStore()
    if scheme == "s3":
        from checkpoint.store.s3_address import open_s3  # boto3 takes 0.3 s to import: only where it is used

        return open_s3(url)
    if scheme == "file":
        return FileStore(folder_of(url), begun=begun)
    if scheme == SCHEME:
        return open_overlay(url, open_store)
    raise StoreRefused(
        f"store {url[:80].split('@')[-1]!r}: the schemes are file:///absolute/path and s3://bucket/prefix"
    )
