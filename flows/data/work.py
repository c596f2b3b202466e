"""What a piece's work came to, in the store: ``data/work/<sight>/<stage>/<piece>[.<part>]``.

The sight is the digest of what one look at the corpus showed and of what is to be made of it, the cutting included. An
object's bytes follow from its name: it is created once, whoever does the work twice finds it, and a killed worker loses
the part that it was at. When the dataset is in the store all of it is removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.errors import NotFound, StoreRefused
from checkpoint.store import Store
from trainer.errors import DatasetError
from trainer.wire.packed import unpack
from trainer.wire.unreadable import Unreadable

log = logging.getLogger(__name__)

_CAP = 1 << 32


class WorkGone(DatasetError):
    """What was kept is gone: another preparation of the same data has finished, and removed it."""


@dataclass(frozen=True)
class KeptWork:
    """The folder of one preparation."""

    store: Store
    sight: str

    def key(self, *names: str) -> str:
        return keys.work_key(self.sight, *names)

    def there(self, *names: str) -> bool:
        return self.store.head(self.key(*names)) is not None

    def put(self, data: bytes | bytearray | memoryview, *names: str) -> None:
        """Create it. Whoever was there first saw the same, and made the same bytes of it."""
        self.store.create(self.key(*names), data)

    def put_map(self, value: dict[str, Any], *names: str) -> None:
        self.put(pack(value), *names)

    def get(self, *names: str, first: int | None = None, length: int | None = None) -> bytes:
        try:
            return self.store.get(self.key(*names), first=first, length=length)
        except NotFound:
            raise WorkGone(
                f"{self.key(*names)} was removed while the dataset was made; another preparation of the same data may "
                "have finished: start again"
            ) from None

    def get_map(self, *names: str) -> dict[str, Any]:
        data = self.get(*names)
        try:
            value = unpack(data, max_bytes=_CAP)
        except Unreadable as error:
            raise DatasetError(f"{self.key(*names)} is damaged ({error}); `--again` makes it anew") from error
        if not isinstance(value, dict):
            raise DatasetError(f"{self.key(*names)} is damaged; `--again` makes it anew")
        return value

    def find_map(self, *names: str) -> dict[str, Any] | None:
        return self.get_map(*names) if self.there(*names) else None

    def names(self) -> Iterator[str]:
        return (info.key for info in self.store.list(keys.work_key(self.sight) + "/"))

    def forget(self) -> None:
        """All of it, before it is made anew; StoreRefused where this identity may not delete it."""
        for key in list(self.names()):
            self.store.delete(key)

    def remove(self) -> None:
        """All of it, when it has served. Where this identity may not delete it stays, and costs room alone."""
        try:
            self.forget()
        except StoreRefused as error:
            log.warning("what the preparation kept beside it stays under %s: %s", keys.work_key(self.sight), error)


def piece_name(piece: int, part: int | None = None) -> str:
    return f"{piece:06d}" if part is None else f"{piece:06d}.{part:06d}"
