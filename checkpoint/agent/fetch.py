"""What an attempt needs from the store before it can start: the plan file and the token shards, verified.

Both are content-addressed, so what lies in the node's folder already is used again; only their digests decide.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint import keys
from checkpoint.agent.gang import CannotStart
from checkpoint.dataset import DatasetManifest, ShardRow, dataset_manifest_bytes, parse_dataset_manifest
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.layout import DataPart, PlanLayout, PlanRefused, read_plan
from checkpoint.store import Store
from trainer.wire.files import kept, write_file

log = logging.getLogger(__name__)

MAX_PLAN_BYTES = 1 << 30
_RANGE_BYTES = 32 << 20


class DataRefused(CheckpointError):
    """The training data is missing or damaged: prepare it again."""

    exit_code = 65


def fetch_plan(store: Store, run: str, digest: str, folder: Path) -> tuple[PlanLayout, Path]:
    """The plan of this hex digest as a file in ``folder``, and its layout. Raises PlanRefused, NotFound, StoreError."""
    path = folder / f"plan-{digest}"
    if path.exists():
        try:
            return read_plan(path.read_bytes(), digest=bytes.fromhex(digest)), path
        except PlanRefused as error:
            log.warning("%s is damaged and fetched anew: %s", path, error)
    key = keys.plan_key(run, digest)
    data = store.get(key, max_bytes=MAX_PLAN_BYTES)
    try:
        layout = read_plan(data, digest=bytes.fromhex(digest))
    except PlanRefused as error:
        raise PlanRefused(
            f"plan {key} in {store.describe()} does not hold: {error}; remove that object and start again"
        ) from error
    write_file(path, data)
    return layout, path


def fetch_data(store: Store, layout: PlanLayout, folder: Path) -> Path:
    """The folder that holds the plan's shards as ``00000.bin`` …, verified against the manifest and that by its digest;
    of a mixture the one that holds a folder of them for each part.

    A store that is a folder of this machine is used as it is; else the shards are downloaded to ``folder/<digest>``.
    Once a node: ``folder/<digest>/verified`` says that it was done. Raises DataRefused, StoreError, CannotStart.
    """
    assert layout.data is not None
    homes = [_fetch_part(store, part, folder) for part in layout.data.parts]
    return homes[0].parent if layout.data.mixed else homes[0]


def _fetch_part(store: Store, part: DataPart, folder: Path) -> Path:
    digest, target = part.digest, folder / part.digest
    local = store.local_path(keys.dataset_manifest_key(digest))
    home = target if local is None else local.parent
    if (target / "verified").exists():
        return home
    target.mkdir(parents=True, exist_ok=True)
    shards = part_manifest(store, part).shards
    if local is None:
        _check_room(target, shards)
    with ThreadPoolExecutor(4, thread_name_prefix="data") as pool:
        futures = [
            pool.submit(
                _fetch_shard,
                store,
                keys.dataset_key(digest, keys.shard_name(number)),
                target / keys.shard_name(number) if local is None else None,
                shard.bytes,
                shard.sha256,
            )
            for number, shard in enumerate(shards)
        ]
        for future in futures:
            future.result()
    write_file(target / "verified", b"")
    return home


def room_bytes(folder: Path) -> int:
    """That this process may still write below a folder."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def _check_room(target: Path, shards: Sequence[ShardRow]) -> None:
    """Said before hours of downloading: whether the shards that are missing fit."""
    missing = sum(row.bytes for n, row in enumerate(shards) if not (target / keys.shard_name(n)).exists())
    free = room_bytes(target)
    if free < missing:
        raise CannotStart(
            78,
            f"the token shards take {missing / (1 << 30):.3g} GiB more, and {target} has {free / (1 << 30):.3g} GiB "
            "free: make room there, or set data.cache_gib: the node then keeps so much of what it reads next",
        )


def part_manifest(store: Store, part: DataPart, kept: Path | None = None) -> DatasetManifest:
    """Of a part of a plan's data. ``kept``: where a copy lies, or will. Raises DataRefused, StoreError."""
    digest = part.digest
    try:
        try:
            manifest = parse_dataset_manifest(kept.read_bytes() if kept is not None else b"", digest)
        except (OSError, Damaged):
            data = dataset_manifest_bytes(store, digest)
            manifest = parse_dataset_manifest(data, digest)
            if kept is not None:
                write_file(kept, data)
    except NotFound as error:
        raise DataRefused(f"dataset {digest} is not in {store.describe()}; prepare the data there") from error
    except Damaged as error:
        raise DataRefused(f"{error}, in {store.describe()}; prepare the data again") from error
    if len(manifest.shards) != part.shards:
        raise DataRefused(
            f"dataset {digest} has {len(manifest.shards)} shards, the plan has {part.shards}; compile the plan again"
        )
    return manifest


def room_words(error: OSError, folder: Path) -> str:
    """A failure to write below ``folder``, in words; where that is full, with its size and the mend."""
    if error.errno == errno.EFBIG and (most := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        return f"{error}: files of this process have {most} bytes at most; raise the limit (ulimit -f unlimited)"
    if error.errno == errno.EMFILE:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"{error}: this process may have {files}; raise the limit (ulimit -n, a service's LimitNOFILE)"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    room = os.statvfs(folder)
    unit, name = (20, "MiB") if room.f_blocks * room.f_frsize >= 1 << 20 else (10, "KiB")
    size, free = (blocks * room.f_frsize >> unit for blocks in (room.f_blocks, room.f_bavail))
    return (
        f"{folder} has too little room, {free} of its {size} {name} are free ({error}): make room there, or raise "
        "the sizeLimit of its volume `work` (launch.pod_patch)"
    )


def _fetch_shard(store: Store, key: str, path: Path | None, size: int, sha256: str) -> None:
    """Read and verify a shard; with ``path`` keep it there."""
    if path is not None and path.exists():
        return  # renamed into place only after it was verified
    digest = hashlib.sha256()
    try:
        with kept(path) if path is not None else contextlib.nullcontext() as file:
            for first in range(0, size, _RANGE_BYTES):
                data = store.get(key, first=first, length=min(_RANGE_BYTES, size - first))
                digest.update(data)
                if file is not None:
                    file.write(data)
            found = store.head(key)
            if digest.hexdigest() != sha256 or found is None or found.bytes != size:
                raise DataRefused(f"shard {key} in {store.describe()} is damaged; prepare the data again")
    except (NotFound, Damaged) as error:
        raise DataRefused(
            f"shard {key} is missing or cut short in {store.describe()}; prepare the data again"
        ) from error
