"""The log of one run in one store: append and fold. Invariants, and the order of calls: `checkpoint.log`."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time as _time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from checkpoint import keys
from checkpoint.errors import Conflict, Damaged, Halted, NotFound, OtherVersion, StoreError, StoreUnavailable
from checkpoint.log.records import FOLD_EVERY, KINDS, MAX_RECORD_BYTES, MAX_STATE_BYTES, FoldTarget, Record, fold_target
from checkpoint.log.state import Fold, RunState
from checkpoint.store.base import Store

logger = logging.getLogger(__name__)

CONDENSE_EVERY = 4
MOST_FOLDS = 32
_WRITER = re.compile(r"[A-Za-z0-9._@-]{1,120}\Z")


def condensed_key(run: str) -> str:
    """Of the state that a writer leaves every few records: a hint, u64le number of its last record, that record's
    SHA-256, and the sealed state after it.
    """
    return keys.run_key(run, "live", "fold")


def fold_base(n: int) -> int:
    """The fold record on whose state that of fold record ``n`` builds, 0 for none.

    Of fold k its lowest set bit says how many folds' rows it holds, `MOST_FOLDS` at most: 1, 2, 1, 4, 1, 2, 1, 8 and so
    on. So a row is written again a few times at most, however long the log is, and a reader follows a few objects.

    >>> [fold_base(k * 256) // 256 for k in (1, 2, 3, 4, 5, 6, 7, 8, 33, 64, 80)]
    [0, 0, 2, 0, 4, 4, 6, 0, 32, 32, 64]
    """
    k = n // FOLD_EVERY
    return (k - min(k & -k, MOST_FOLDS)) * FOLD_EVERY


class RunLog:
    """The log of one run in one store. Safe to use from several threads; keeps no state of its own."""

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        writer: str = "reader",
        clock: Callable[[], float] = _time.time,
        token: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        if _WRITER.match(writer) is None:
            raise ValueError(f"writer {writer!r}: letters, digits and ._@- only, 120 at most")
        self.store = store
        self.run = keys.check_run(run)
        self._writer = writer
        self._clock = clock
        self._token = token  # another one each time, of this writer and no other

    # --- reading ------------------------------------------------------------------------------------------

    def read(self, n: int) -> Record:
        """Record ``n``: NotFound where there is none yet, Damaged or OtherVersion where it cannot be read."""
        return Record.parse(self.store.get(keys.log_key(self.run, n), max_bytes=MAX_RECORD_BYTES), n)

    def records(self, first: int = 1) -> Iterator[Record]:
        """The records from ``first`` on, until one is absent; Damaged or OtherVersion at one that cannot be read."""
        n = first
        while True:
            try:
                yield self.read(n)
            except NotFound:
                return
            n += 1

    def exists(self) -> bool:
        """Whether the run has a record."""
        return self.store.head(keys.log_key(self.run, 1)) is not None

    def fold(self, since: RunState | None = None, *, quick: bool = False) -> RunState:
        """The state now. With the state from before: a request for each new record, and one to see that it is the last
        (``since`` itself where there is none).

        Without, it starts at the newest fold record (found by probing, not by listing) and looks once whether a
        record is missing in the middle. A record that cannot be read ends the fold: ``state.unreadable`` says why.

        ``quick``: without ``since``, start where a writer left the state lately, however long the log is: a handful
        of requests. Records before that point are not read again, as with a state from before.
        """
        state = since if since is not None else (self._condensed() if quick else None) or self._newest_fold()
        fold: Fold | None = None  # made when there is something new: a look that finds nothing copies nothing
        while True:
            n = (fold or state).n + 1
            try:
                record = self.read(n)
                fold = fold or Fold(state)
                fold.add(record)
            except NotFound:
                later = None if since is not None else self._after(n)
                if later is None:
                    break
                if self.store.head(keys.log_key(self.run, n)) is None:
                    why = f"log record {n} is missing, but {later} exists: a record was deleted"
                    return self._halted(fold or Fold(state), why)
            except (Damaged, OtherVersion) as error:
                return self._halted(fold or Fold(state), str(error), newer=isinstance(error, OtherVersion))
        if fold is not None:
            return fold.freeze()
        return state if state.unreadable is None else replace(state, unreadable=None, newer=False)

    def _halted(self, fold: Fold, why: str, *, newer: bool = False) -> RunState:
        mend = "" if newer else " until it is mended (hotstage ckpt verify)"
        logger.error("run %s: %s; nobody may write%s", self.run, why, mend)
        return fold.freeze(unreadable=why, newer=newer)

    def _after(self, n: int) -> str | None:
        """The name of a record later than ``n``, if there is one."""
        for info in self.store.list(keys.log_prefix(self.run), start_after=keys.log_key(self.run, n)):
            return info.key
        return None

    def _condensed(self) -> RunState | None:
        """The state that a writer left lately, where the record that it ends with is that of the log; else None."""
        try:
            raw = self.store.get(condensed_key(self.run), max_bytes=MAX_STATE_BYTES)
            n = int.from_bytes(raw[:8], "little")
            if not 0 < n < 1 << 62:
                return None
            record = self.store.get(keys.log_key(self.run, n), max_bytes=MAX_RECORD_BYTES)
            if hashlib.sha256(record).digest() != raw[8:40]:
                return None
            return RunState.parse(raw[40:], self.run, n, self._load)
        except (NotFound, Damaged, OtherVersion) as error:
            logger.debug("run %s: no condensed state: %s", self.run, error)
            return None

    def _condense(self, state: RunState, record: bytes) -> None:
        head = state.n.to_bytes(8, "little") + hashlib.sha256(record).digest()
        try:
            self.store.put(condensed_key(self.run), head + state.to_bytes(state.n // FOLD_EVERY * FOLD_EVERY))
        except StoreError as error:  # it saves requests, nothing else
            logger.debug("run %s: the condensed state is not written: %s", self.run, error)

    def _newest_fold(self) -> RunState:
        """The state of the newest fold record that can be read: O(log n) looks at names, since records are dense."""

        def there(k: int) -> bool:
            return self.store.head(keys.log_key(self.run, k * FOLD_EVERY)) is not None

        low, high = 0, 1
        while there(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if there(middle) else (low, middle)
        for k in range(low, 0, -1):
            n = k * FOLD_EVERY
            try:
                return self._load(n)
            except (NotFound, Damaged, OtherVersion) as error:
                logger.error("run %s: fold record %d is of no use, reading from an earlier one: %s", self.run, n, error)
        return RunState(self.run)

    def _load(self, n: int, target: FoldTarget | None = None) -> RunState:
        """The state after fold record ``n``: what that names, and the folds that this builds on."""
        state, size, sha256 = target or fold_target(self.read(n))
        data = self.store.get(keys.run_key(self.run, state), max_bytes=size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Damaged(f"folded state {state}: its bytes do not have the digest that log record {n} names")
        return replace(RunState.parse(data, self.run, n - 1, self._load), n=n)  # on earlier ones

    # --- writing ------------------------------------------------------------------------------------------

    def append(self, kind: str, body: Mapping[str, Any], state: RunState, *, epoch: int | None = None) -> RunState:
        """Create record ``state.n + 1`` and return the state with it.

        ``epoch`` is the writer's own: an agent passes its attempt's, and gets Halted once a newer attempt is in the
        log. Without it the record is of the newest epoch (the driver, people). Conflict where another writer won the
        number: its ``state`` has that record folded in. ValueError or Damaged where the body is not what its kind
        needs: nothing is written then.
        """
        if kind == "fold" or kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS[:-1])}")
        if kind == "checkpoint" and epoch is None:
            raise ValueError("a checkpoint record needs the epoch of the attempt that made it")
        self._may_write(state, epoch)
        if (state.n + 1) % FOLD_EVERY == 0:
            state = self._create("fold", self._store_state(state), state, state.epoch, epoch)
        n = state.n + 1
        return self._create(
            kind, body, state, n if kind == "attempt" else state.epoch if epoch is None else epoch, epoch
        )

    def transact(
        self,
        decide: Callable[[RunState], tuple[str, Mapping[str, Any]] | None],
        state: RunState | None = None,
        *,
        epoch: int | None = None,
    ) -> RunState:
        """Fold, ask ``decide`` for a record, append it; on a conflict ask again. None: nothing to write (any more)."""
        state = self.fold(state)
        while (wanted := decide(state)) is not None:
            try:
                return self.append(*wanted, state, epoch=epoch)
            except Conflict as conflict:
                logger.info("run %s: %s", self.run, conflict)
                state = conflict.state
        return state

    def _may_write(self, state: RunState, epoch: int | None) -> None:
        if state.run != self.run:
            raise ValueError(f"state of run {state.run}, log of run {self.run}")
        if state.unreadable is not None:
            raise Halted(f"run {self.run}: {state.unreadable}; no record may follow one that cannot be read", state)
        if epoch is not None and state.epoch > epoch:
            raise Halted(
                f"run {self.run}: this writer belongs to attempt {epoch}, but attempt {state.epoch} holds the run",
                state,
            )

    def _create(
        self, kind: str, body: Mapping[str, Any], state: RunState, record_epoch: int, epoch: int | None
    ) -> RunState:
        n = state.n + 1
        record = Record(n, kind, record_epoch, f"{self._writer}:{self._token()}", self._clock(), dict(body))
        data = record.to_bytes()
        after = state.apply(Record.parse(data, n))  # what readers will see, or Damaged before anything is written
        if self.store.create(keys.log_key(self.run, n), data):
            if n % CONDENSE_EVERY == 0:
                self._condense(after, data)
            logger.debug("run %s: log record %d, %s, epoch %d", self.run, n, kind, record_epoch)
            return after
        newer = self.fold(state)
        self._may_write(newer, epoch)
        if newer.n == state.n:
            raise StoreUnavailable(f"run {self.run}: the store has log record {n}, but does not show it; try again")
        raise Conflict(f"log record {n} was written by another: the log is at {newer.n}", newer)

    def _store_state(self, state: RunState) -> dict[str, Any]:
        base = fold_base(state.n + 1)
        target = self._readable(base) if base else None
        data = state.to_bytes(base if target else 0, target)
        name = keys.fold_name(state.n + 1, self._token())
        digest = hashlib.sha256(data)
        self.store.create(keys.run_key(self.run, name), data, sha256=digest.digest())
        return {"state": name, "bytes": len(data), "sha256": digest.hexdigest()}

    def _readable(self, n: int) -> FoldTarget | None:
        """What fold record ``n`` names, where it and all that it builds on can be read: damage is not built on, so that
        it costs readers time until the next fold and no longer. A look in `FOLD_EVERY` records.
        """
        try:
            target = fold_target(self.read(n))
            self._load(n, target)
        except (NotFound, Damaged, OtherVersion) as error:
            logger.error("run %s: fold record %d is of no use, the next one has all rows: %s", self.run, n, error)
            return None
        return target
