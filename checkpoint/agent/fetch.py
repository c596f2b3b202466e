"""What an attempt needs from the store before it can start: the plan file and the token shards, verified.

Both are content-addressed, so what lies in the node's folder already is used again; only their digests decide.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgpack

from checkpoint import keys
from checkpoint.errors import Damaged, NotFound
from checkpoint.layout import PlanLayout, read_plan
from checkpoint.store import Store

log = logging.getLogger(__name__)

MAX_PLAN_BYTES = 1 << 30
_MAX_MANIFEST_BYTES = 64 << 20
_RANGE_BYTES = 32 << 20


def fetch_plan(store: Store, run: str, digest: str, folder: Path) -> tuple[PlanLayout, Path]:
    """The plan of this hex digest as a file in ``folder``, and its layout. Raises PlanRefused, NotFound, StoreError."""
    path = folder / f"plan-{digest}"
    if path.exists():
        return read_plan(path.read_bytes(), digest=bytes.fromhex(digest)), path
    data = store.get(keys.plan_key(run, digest), max_bytes=MAX_PLAN_BYTES)
    layout = read_plan(data, digest=bytes.fromhex(digest))
    write_file(path, data)
    return layout, path


def fetch_data(store: Store, layout: PlanLayout, folder: Path) -> Path:
    """The folder that holds the plan's shards as ``00000.bin`` …: the store's own where it is a folder of this machine,
    else ``folder/<digest>``, downloaded once and verified. Raises NotFound, Damaged, StoreError."""
    digest = layout.dataset_digest.hex()
    prefix = f"data/{digest}"
    names = [f"{number:05d}.bin" for number in range(len(layout.shards))]
    local = store.local_path(f"{prefix}/manifest")
    if local is not None:
        for name in names:
            if not (local.parent / name).is_file():
                raise NotFound(f"{prefix}/{name}", store.describe())
        return local.parent
    target = folder / digest
    if (target / "complete").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    raw = store.get(f"{prefix}/manifest", max_bytes=_MAX_MANIFEST_BYTES)
    if hashlib.sha256(raw).digest() != layout.dataset_digest:
        raise Damaged(
            f"{prefix}/manifest in {store.describe()} does not have the digest in its name; prepare the data again"
        )
    shards = _shards(raw, f"{prefix}/manifest", len(names))
    with ThreadPoolExecutor(4, thread_name_prefix="data") as pool:
        list(
            pool.map(
                lambda item: _fetch_shard(store, f"{prefix}/{item[0]}", target / item[0], *item[1]),
                zip(names, shards, strict=True),
            )
        )
    write_file(target / "complete", b"")
    return target


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Whole or not at all, as a reader sees it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def _shards(raw: bytes, what: str, count: int) -> list[tuple[int, bytes]]:
    """(bytes, SHA-256) of each shard, from a manifest whose own digest has been checked."""
    try:
        manifest = cast(Mapping[str, Any], msgpack.unpackb(raw))
        shards = []
        for shard in manifest["shards"]:
            sha256 = shard["sha256"]
            shards.append((int(shard["bytes"]), bytes.fromhex(sha256) if isinstance(sha256, str) else bytes(sha256)))
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise Damaged(f"{what} is not a dataset's manifest: {error!r}") from error
    if len(shards) != count:
        raise Damaged(f"{what} names {len(shards)} shards, the plan has {count}")
    return shards


def _fetch_shard(store: Store, key: str, path: Path, size: int, sha256: bytes) -> None:
    if path.exists():
        return  # renamed into place only after it was verified
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as file:
            for first in range(0, size, _RANGE_BYTES):
                data = store.get(key, first=first, length=min(_RANGE_BYTES, size - first))
                digest.update(data)
                file.write(data)
        if digest.digest() != sha256:
            raise Damaged(f"shard {key} in {store.describe()} does not have the digest that its manifest names")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
