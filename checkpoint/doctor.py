"""What a store is good for, found out by asking it: `hotstage ckpt doctor STORE_URL`.

Everything is asked through the seam that runs use (``store/base.py``), on objects of its own under ``probe/doctor-…``
(or, where this identity may not write there, ``runs/doctor-…``), which are removed again where it may delete. A finding
says what was seen, never what a product is known for; docs/stores.md is a table of such findings.
"""

from __future__ import annotations

import hashlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from checkpoint import keys
from checkpoint.errors import CheckpointError, CredentialsRefused, Damaged, NotFound, StoreRefused, StoreUnavailable
from checkpoint.probe import Unordered, race
from checkpoint.store.base import MAX_KEY_BYTES, Store

Verdict = Literal["ok", "warn", "bad", "unknown"]

BLOCK = 8 << 20
THREADS = 4
KEPT_BYTES = 16 << 20
"""Written at most to find the speed, where it cannot be removed again."""
CREATORS = 16
HINTS = 8
NAMES = ("A", "a", "Z-9", "_", "a+b=c@d", "a-b", "a.b", "a0", "x" * 200)
"""Every kind of letter that keys are made of, in names that differ in little."""
READING = "reading runs (show, verify, export)"
DRIVING = "driving runs (the log, several drivers)"
SAVING = "saving checkpoints"
COLLECTING = "collecting old checkpoints"
WORDS = {"drive": "creates runs", "save": "creates checkpoints", "delete": "deletes"}
ROLES = {
    frozenset(("drive", "save", "delete")): "may do everything; give agents and drivers one that cannot delete",
    frozenset(("drive", "save")): "right for agents and drivers in one",
    frozenset(("drive",)): "right for a driver",
    frozenset(("save",)): "right for an agent",
    frozenset(("delete",)): "right for the collector",
    frozenset(): "right for who only looks",
}
"""What rights make of an identity (docs/policies)."""
PROMISES = {"races", "conditions", "visible"}
"""What nothing can be trusted without."""
CLOCK_S = 60.0
"""A store's clock may be off by so much before it is worth a word; S3 refuses signatures from 15 minutes on."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is asked."""

    data_bytes: int = 64 << 20
    """Written and read to find the speed."""
    races: tuple[tuple[int, int, int], ...] = ((12, CREATORS, 64), (4, 8, 1 << 20))
    """Rounds, creators, bytes: small bodies as records have them, and such as take a while to arrive."""
    objects: int = 40
    """Looked for and listed right after they were made."""
    small: int = 12
    """Small creates that are timed."""


@dataclass(frozen=True, slots=True)
class StoreFact:
    """One thing that was asked of a store. ``name``: of the list in docs/stores.md."""

    verdict: Verdict
    name: str
    text: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, in the order in which it was asked, and what the store is good for with these rights."""

    store: str
    findings: tuple[StoreFact, ...]
    good_for: tuple[str, ...]
    bad_for: tuple[str, ...]
    left: int
    """Probe objects that could not be removed."""

    @property
    def ok(self) -> bool:
        """Whether runs may rest on it, as far as it was asked: nothing is bad, and nothing stayed without an answer."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """78 where something is bad, 75 where the store did not answer, else 0."""
        verdicts = {f.verdict for f in self.findings}
        return 78 if "bad" in verdicts else 75 if "unknown" in verdicts else 0

    def verdict(self, name: str) -> Verdict:
        return next((f.verdict for f in self.findings if f.name == name), "unknown")


def examine_store(
    store: Store,
    effort: Effort | None = None,
    *,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.perf_counter,
) -> Diagnosis:
    """Ask everything; never raises for what the store does."""
    return _Doctor(store, effort or Effort(), now, clock).examine()


@dataclass
class _Doctor:
    store: Store
    effort: Effort
    now: Callable[[], float]
    clock: Callable[[], float]
    findings: list[StoreFact] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    run: str = field(default_factory=lambda: f"doctor-{secrets.token_hex(8)}")
    base: str = ""
    may: set[str] = field(default_factory=set)
    removes: bool = False
    timeless: bool = False

    def examine(self) -> Diagnosis:
        with ThreadPoolExecutor(CREATORS, thread_name_prefix="doctor") as self.pool:
            if self.reads():
                writes = self.writes()
                self.rights(writes)
                if writes:
                    for check in (self.races, self.conditions, self.visible, self.names, self.ranges, self.hints,
                                  self.checksums, self.times, self.speed):  # fmt: skip
                        self.guard(check)
            left = self.clear()
        uses = self.uses()
        good = tuple(name for name, is_good in uses if is_good)
        bad = tuple(name for name, is_good in uses if not is_good)
        return Diagnosis(self.store.describe(), tuple(self.findings), good, bad, left)

    def uses(self) -> tuple[tuple[str, bool], ...]:
        """What the store and this identity are good for."""
        bad = {f.name for f in self.findings if f.verdict in ("bad", "unknown")}
        sound = not any(f.verdict == "bad" for f in self.findings)
        orders = sound and not bad & PROMISES
        return (
            (READING, sound),
            (DRIVING, orders and "drive" in self.may),
            (SAVING, orders and "save" in self.may),
            (COLLECTING, sound and "delete" in self.may and not self.timeless),
        )

    # --- asking -------------------------------------------------------------------------------------------

    def tell(self, verdict: Verdict, name: str, text: str, mend: str = "") -> None:
        self.findings.append(StoreFact(verdict, name, text, mend))

    def guard(self, check: Callable[[], None]) -> None:
        """What the store refuses, or does not answer, inside a check is that check's finding."""
        name = check.__name__
        try:
            check()
        except StoreUnavailable as error:
            self.tell("unknown", name, f"the store did not answer: {error}", "ask again when it does")
        except Unordered as error:
            self.tell("bad", name, error.why, "use a store that has create-if-absent (PutObject with If-None-Match: *)")
        except CheckpointError as error:
            self.tell("bad", name, str(error))

    def own(self, key: str) -> str:
        self.made.add(key)
        return key

    def key(self, name: str) -> str:
        return self.own(f"{self.base}/{name}")

    def create(self, name: str, data: bytes, *, sha256: bytes | None = None) -> bool:
        return self.store.create(self.key(name), data, sha256=sha256)

    # --- rights -------------------------------------------------------------------------------------------

    def reads(self) -> bool:
        """Whether it answers, and shows what it holds; finds out where this identity may look."""
        refusal: CheckpointError | None = None
        for base in (f"probe/{self.run}", keys.run_key(self.run, "log")):
            self.base = base
            try:
                self.store.get(f"{self.base}/none", max_bytes=1)
            except NotFound:
                break
            except StoreUnavailable as error:
                self.tell("bad", "answers", str(error), "look at the address, and whether the store runs")
                return False
            except CheckpointError as error:
                refusal = refusal or error
            else:
                self.tell("bad", "answers", "shows an object that nobody has created", "what answers there is no store")
                return False
        else:
            self.tell("bad", "credentials" if isinstance(refusal, CredentialsRefused) else "answers", str(refusal))
            return False
        here = self.store.local_path("probe")
        if here is not None and not here.parent.exists():
            mend = "a run makes it; to have the place examined before, make it (mkdir), or correct the name"
            self.tell("bad", "answers", f"there is no folder {here.parent}", mend)
            return False
        try:
            next(self.store.list(f"{self.base}/"), None)
        except CheckpointError as error:
            self.tell("bad", "answers", f"objects can be read, but not listed: {error}",
                      "give this identity s3:ListBucket on the bucket")  # fmt: skip
            return False
        self.tell("ok", "answers", "answers, reads and lists")
        return True

    def writes(self) -> bool:
        """Whether it may create objects, somewhere."""
        refusal: CheckpointError | None = None
        for base in dict.fromkeys((self.base, keys.run_key(self.run, "log"))):
            self.base = base
            try:
                made = self.create("first", b"first")
            except StoreUnavailable as error:
                self.tell("unknown", "writes", f"the store did not answer: {error}", "ask again when it does")
                return False
            except CheckpointError as error:
                refusal = refusal or error
                continue
            if not made or self.store.get(self.key("first"), max_bytes=99) != b"first":
                self.tell("bad", "writes", "an object that was just created is not there, or holds something else")
                return False
            return True
        self.tell("ok", "writes", f"it is only read by whoever asks here; a write: {refusal}")
        return False

    def rights(self, writes: bool) -> None:
        """Which of docs/policies' identities this one may be; what it does not show is not asked for."""
        asked: dict[str, Callable[[], object]] = {
            "drive": lambda: self.store.create(self.own(keys.plan_key(self.run, "0" * 64)), b"plan"),
            "save": lambda: self.store.create(self.own(keys.run_key(self.run, "chunks", "a")), b"chunk"),
            "delete": lambda: self.store.delete(keys.run_key(self.run, "chunks", "none")),
        }
        for right, ask in asked.items() if writes else ():  # to delete what is not there shows nothing, and a collector
            with suppress(CheckpointError):  # also writes what it gives up
                ask()
                self.may.add(right)
        if writes:
            with suppress(CheckpointError):  # what was made here, to be removed at the end
                self.store.delete(self.key("first"))
                self.removes = True
        if self.removes and (self.store.head(self.key("first")) or any(self.store.list(self.key("first")))):
            self.tell(
                "bad", "rights", "an object that was deleted is still shown", "is there a cache before the store?"
            )
            return
        does = [word for right, word in WORDS.items() if right in self.may]
        role = ROLES.get(frozenset(self.may), "no identity of docs/policies")
        self.tell("ok", "rights", f"this identity {', '.join(['reads', *does])}: {role}")

    def clear(self) -> int:
        """Remove what was made; how many stayed."""
        with suppress(CheckpointError):
            if self.removes:
                list(self.pool.map(self.store.delete, sorted(self.made)))
            return sum(self.store.head(key) is not None for key in sorted(self.made))
        return len(self.made)

    # --- what order and truth rest on ---------------------------------------------------------------------

    def races(self) -> None:
        done = 0
        for rounds, creators, size in self.effort.races:
            for number in range(rounds):
                race(self.store, self.pool, self.key(f"race-{size}-{number}"), creators, size)
            done += rounds
        self.tell("ok", "races", f"{done} races of up to {max(r[1] for r in self.effort.races)} creators had one "
                  "winner each")  # fmt: skip

    def conditions(self) -> None:
        self.create("taken", b"first")
        if self.create("taken", b"other") or self.create("taken", b""):
            raise StoreRefused("a create of a name that was taken was told that it made the object")
        if not self.create("taken", b"first"):
            raise StoreRefused("a create that came twice was not known again as one's own")
        if self.store.get(self.key("taken"), max_bytes=99) != b"first":
            raise StoreRefused("a create that lost changed the object")
        if not self.create("empty", b"") or self.create("empty", b"x") or self.store.get(self.key("empty")) != b"":
            raise StoreRefused("an empty object does not keep its name")
        self.tell("ok", "conditions", "what exists is never created again, nor changed")

    def visible(self) -> None:
        names = [f"seen/{number:03d}" for number in range(self.effort.objects)]
        middle = len(names) // 2
        late, wrong = [], []

        def one(name: str) -> None:
            self.create(name, name.encode())
            key = self.key(name)
            info = self.store.head(key)
            if info is None or key not in [i.key for i in self.store.list(key)]:
                late.append(name)
            elif info.bytes != len(name):
                wrong.append(name)

        list(self.pool.map(one, names))
        if late:
            raise StoreRefused(f"{len(late)} of {len(names)} objects were not shown or listed right after their create")
        if wrong:
            raise StoreRefused(f"{len(wrong)} of {len(names)} objects were shown with a wrong size")
        named = [self.key(name) for name in names]
        if [i.key for i in self.store.list(f"{self.base}/seen/")] != named:
            raise StoreRefused("a listing does not show every object once, in the order of the names' bytes")
        if [i.key for i in self.store.list(f"{self.base}/seen/", start_after=named[middle])] != named[middle + 1 :]:
            raise StoreRefused("a listing that shall begin after a name does not (StartAfter)")
        self.tell("ok", "visible", f"{len(names)} objects were seen and listed at once, in order")

    def names(self) -> None:
        longest = "/".join(["y" * 200] * 4)
        names = [f"n/{name}" for name in (*NAMES, longest[: MAX_KEY_BYTES - 100 - len(self.base)].rstrip("/"))]
        for name in names:
            if not self.create(name, name.encode()):
                raise StoreRefused(
                    f"{name[2:40]!r} and another name are one to this store (letters' case, or + and @?)"
                )
        for name in names:
            if self.store.get(self.key(name), max_bytes=1 << 10) != name.encode():
                raise StoreRefused(f"the object {name[2:40]!r} holds another one's bytes")
        if [i.key for i in self.store.list(f"{self.base}/n/")] != sorted(self.key(name) for name in names):
            raise StoreRefused("names come back from a listing changed, or out of the order of their bytes")
        self.tell("ok", "names", "names of every kind stay apart and come back as they were")

    def ranges(self) -> None:
        data = hashlib.sha256(b"ranges").digest() * 4096
        self.create("ranges", data)
        key = self.key("ranges")
        for first, length in ((0, 1), (0, len(data)), (1000, 70_000), (len(data) - 1, 1)):
            if self.store.get(key, first=first, length=length) != data[first : first + length]:
                raise StoreRefused(f"bytes {first} to {first + length} of an object came back wrong")
        try:
            self.store.get(key, first=len(data) - 1, length=2)
        except Damaged:
            pass
        else:
            raise StoreRefused("a range beyond an object's end was answered as if it were there")
        self.tell("ok", "ranges", "ranges of an object are what they should be")

    def hints(self) -> None:
        key = keys.live_key(self.run, "doctor")
        stale = 0
        for number in range(HINTS):
            try:
                self.store.put(key, b"%d" % number)
            finally:
                self.made.add(key)
            stale += self.store.get(key, max_bytes=99) != b"%d" % number
        if stale:
            self.tell(
                "warn",
                "hints",
                f"{stale} of {HINTS} times an object that was replaced was read as it was before",
                "nothing is lost by it, but what people see comes late; is there a cache before the store?",
            )
        else:
            self.tell("ok", "hints", "what is replaced is read anew at once")

    def checksums(self) -> None:
        data = b"what was sent"
        try:
            made = self.create("checksum", data, sha256=hashlib.sha256(b"something else").digest())
        except (StoreRefused, StoreUnavailable):
            if self.store.head(self.key("checksum")) is not None:
                raise StoreRefused("bytes that do not have the digest that came with them were kept") from None
            self.tell("ok", "checksums", "bytes that do not have the SHA-256 that comes with them are not taken")
            return
        if made:
            self.tell("warn", "checksums", "the SHA-256 that comes with an object is not compared with its bytes",
                      "what is damaged on its way is found when it is read, not when it is written; run "
                      "`hotstage ckpt verify` now and then")  # fmt: skip
        else:
            raise StoreRefused("a create with a wrong SHA-256 was answered as if another object had the name")

    # --- time and speed -----------------------------------------------------------------------------------

    def times(self) -> None:
        """How far the store's clock is from this one's, as far as it tells."""
        before = self.now()
        self.create("clock", b"clock")
        after = self.now()
        info = self.store.head(self.key("clock"))
        told = None if info is None else info.modified
        self.timeless = told is None
        if told is None:
            self.tell("warn", "times", "does not say when an object was written",
                      "the collector cannot wait by its clock: nothing is ever removed there")  # fmt: skip
            return
        off = told - before if told < before else told - after if told > after else 0.0
        words = f"its clock is within {abs(off):.0f} s of this machine's"
        if abs(off) <= 2:
            words = "its clock is this machine's, within 2 s"
        if abs(off) <= CLOCK_S:
            self.tell("ok", "times", words)
            return
        self.tell(
            "warn",
            "times",
            f"its clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's",
            "set the clock that is wrong: S3 refuses signatures from 15 minutes on; hotstage orders nothing by clocks",
        )

    def speed(self) -> None:
        waits = []
        for number in range(self.effort.small):
            begun = self.clock()
            self.create(f"small-{number}", b"%d" % number)
            waits.append(self.clock() - begun)
        total = self.effort.data_bytes if self.removes else min(self.effort.data_bytes, KEPT_BYTES)
        count = max(1, total // BLOCK)
        block = secrets.token_bytes(min(BLOCK, total))
        named = [self.key(f"speed-{number}") for number in range(count)]

        def data(number: int) -> bytes:
            return number.to_bytes(8, "little") + block[8:]

        def write(number: int) -> None:
            own = data(number)
            self.store.create(named[number], own, sha256=hashlib.sha256(own).digest())

        with ThreadPoolExecutor(THREADS) as pool:
            with self.timed() as wrote:
                list(pool.map(write, range(count)))
            with self.timed() as read:
                for same in pool.map(lambda number: self.store.get(named[number]) == data(number), range(count)):
                    if not same:
                        raise StoreRefused("an object came back with other bytes than were written")
        size = count * len(block) / 1e6
        self.tell("ok", "speed", f"{size / wrote[0]:.0f} MB/s written, {size / read[0]:.0f} MB/s read by {THREADS} "
                  f"threads; a small object takes {1e3 * statistics.median(waits):.0f} ms")  # fmt: skip

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        took = [0.0]
        begun = self.clock()
        yield took
        took[0] = max(self.clock() - begun, 1e-9)
