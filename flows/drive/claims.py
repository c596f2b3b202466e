"""Claims of local launches in the run's store, as ``trainer.local_launch`` asks for them.

A launch works in one folder of one machine. Whoever finds it claimed there attaches, where this machine can; else it
watches, until the launch's nodes have left or have not been heard for a while. Silence is counted by this process's
own monotonic clock, from looks that the store answered; nobody's clock is compared with another's. Of time in which no
look was made `UNWATCHED_S` count: this process was stopped, or the machine, and the nodes maybe with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from checkpoint import codec, keys
from checkpoint.claims import MAX_BYTES, Place, read_token
from checkpoint.errors import Damaged, NotFound, StoreUnavailable
from checkpoint.store import Store
from trainer.errors import LaunchUnknown
from trainer.local_launch import Held

SILENT_S = 30.0
"""Without a word of any of its nodes a launch that cannot be reached is over."""
SILENT_SOON_S = 5.0
"""The same, where it worked on this machine and is not seen here: before its last boot, or another user's."""
LOOK_S = 1.0
UNWATCHED_S = 3.0
_STATUS_CAP = 1 << 20


@dataclass
class _Heard:
    """What the nodes of a launch out of reach say: ``said`` is what was read last, and ``silent_s`` for how long there
    has been nothing new; ``looked``: when the store was asked last, and answered.
    """

    said: tuple[tuple[str, int] | None, ...] = ()
    left: bool = False
    silent_s: float = 0.0
    looked: float | None = None


@dataclass
class StoreClaims:
    """Of one run. ``clock`` may be injected."""

    store: Store
    run: str
    clock: Callable[[], float] = time.monotonic
    _known: dict[str, Place] = field(default_factory=dict)
    _heard: dict[str, _Heard] = field(default_factory=dict)
    _absent: dict[str, float] = field(default_factory=dict)

    def where(self, launch_id: str, own: Path | None) -> Held | None:
        """Who holds the launch; None: nobody has claimed it. ``own``: where the asker has begun it, or would."""
        try:
            claim = self._read(launch_id)
            if claim is not None:
                return self._held(launch_id, claim, own)
            if own is not None and (own / "launch.json").exists():
                return None  # begun here by an older version
            heard = self._listen(launch_id, 1)
        except StoreUnavailable as error:
            raise LaunchUnknown(f"who holds launch {launch_id} cannot be asked now: {error}") from error
        if not any(heard.said):
            return None
        words = "another folder or host, by an older version that did not say which"
        return self._out_of_reach(heard, words, SILENT_S)

    def take(self, launch_id: str, folder: Path, nodes: int) -> Held:
        """Claim the launch for this folder; whoever was first has it."""
        place = Place.of(folder, nodes=nodes)
        self._absent.pop(launch_id, None)
        try:
            if self.store.create(keys.launch_key(self.run, launch_id), place.to_bytes()):
                self._known[launch_id] = place
            claim = self._read(launch_id)
        except StoreUnavailable as error:
            raise LaunchUnknown(f"launch {launch_id} cannot be claimed now: {error}") from error
        if claim is None:
            raise LaunchUnknown(
                f"the claim of launch {launch_id} is made, but the store does not show it; trying again"
            )
        return self._held(launch_id, claim, folder)

    def is_free(self, launch_id: str) -> bool:
        self._absent.pop(launch_id, None)
        try:
            return self._read(launch_id) is None
        except StoreUnavailable as error:
            raise LaunchUnknown(f"who holds launch {launch_id} cannot be asked now: {error}") from error

    # --- inside -------------------------------------------------------------------------------------------

    def _read(self, launch_id: str) -> Place | None:
        """The claim; it never changes, so it is read once, and looked for at most once in `LOOK_S` before."""
        if launch_id not in self._known:
            if self.clock() - self._absent.get(launch_id, -LOOK_S) < LOOK_S:
                return None
            key = keys.launch_key(self.run, launch_id)
            try:
                self._known[launch_id] = Place.parse(self.store.get(key, max_bytes=MAX_BYTES), key)
            except NotFound:
                self._absent[launch_id] = self.clock()
                return None
        return self._known[launch_id]

    def _held(self, launch_id: str, claim: Place, own: Path | None) -> Held:
        folder = self._reachable(claim, own)
        if folder is not None:
            return Held(folder, claim.describe())
        words = claim.describe()
        if claim.here:
            running = ", ".join(map(str, _agents(self.run, launch_id)))
            if running:
                return Held(None, f"{words}, which cannot be read from here; its agents (pid {running}) run on")
            if not os.path.lexists(claim.folder) and _readable(Path(claim.folder)):
                return Held(None, f"{words}, which is gone", over="its folder and its processes are gone")
        soon = max(SILENT_SOON_S, 3 * self.store.pace.beat_s)
        limit = soon if claim.same_machine else SILENT_S
        return self._out_of_reach(self._listen(launch_id, claim.nodes), words, limit)

    def _out_of_reach(self, heard: _Heard, words: str, limit: float) -> Held:
        if heard.left:
            return Held(None, words, left=True)
        if heard.silent_s >= limit:
            return Held(None, words, over=f"no node of it was heard for {limit:.0f} s")
        return Held(None, f"{words} (taken over by itself once nothing was heard of it for {limit:.0f} s)")

    @staticmethod
    def _reachable(claim: Place, own: Path | None) -> Path | None:
        """The claim's folder, where this machine has it with its token; moved, maybe, to where the asker works."""
        if not claim.same_machine:
            return None
        for folder in (Path(claim.folder), own):
            if folder is not None and read_token(folder) == claim.token:
                return folder
        return None

    def _listen(self, launch_id: str, nodes: int) -> _Heard:
        """The nodes' status, at most once in `LOOK_S`. A look that fails begins the silence anew: it tells nothing."""
        heard = self._heard.setdefault(launch_id, _Heard())
        now = self.clock()
        if heard.looked is not None and now - heard.looked < LOOK_S:
            return heard
        try:
            said = [self._status(launch_id, node) for node in range(nodes)]
        except StoreUnavailable:
            heard.looked, heard.silent_s = None, 0.0
            raise
        beats = tuple(s and (s[0], s[1]) for s in said)
        if heard.looked is None or beats != heard.said:
            heard.silent_s = 0.0
        else:
            heard.silent_s += min(now - heard.looked, UNWATCHED_S)
        heard.said, heard.looked = beats, now
        heard.left = all(s is not None and s[2] for s in said)
        return heard

    def _status(self, launch_id: str, node: int) -> tuple[str, int, bool] | None:
        """(incarnation, beat, whether it has left for good) of a node's status; None where there is none to read."""
        key = keys.status_key(self.run, launch_id, node)
        try:
            value = codec.unpack_hint(self.store.get(key, max_bytes=_STATUS_CAP), key, max_bytes=_STATUS_CAP)
            return str(value["incarnation"]), int(value["seq"]), value.get("left") is True
        except (NotFound, Damaged, ValueError, KeyError, TypeError, AttributeError):
            return None


def _readable(folder: Path) -> bool:
    """Whether it could be seen whether the folder is there: what is above it may be read."""
    above = next((p for p in folder.parents if os.path.lexists(p)), folder.parent)
    return os.access(above, os.R_OK | os.X_OK)


def _agents(run: str, launch_id: str) -> list[int]:
    """The agents of a launch that run in this space of process numbers, whoever's they are."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                args = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            pairs = set(pairwise(args))
            if {("-m", "checkpoint.agent"), ("--run", run), ("--launch", launch_id)} <= pairs:
                found.append(int(entry.name))
    return sorted(found)
