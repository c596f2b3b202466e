"""Before an attempt starts on a node: its plan, its data, its slots, and what its ranks restore from.

Plan and data are fetched and verified (``fetch.py``). The restore point is what the attempt record names: slots that
every rank of the node still holds, else a checkpoint that is read into slots, else nothing. Who lacks it says why.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.agent.ahead import FOLDER, Ahead, There, ahead_of
from checkpoint.agent.fetch import fetch_data, fetch_plan, room_words
from checkpoint.agent.gang import CannotStart, Gang, Options, layouts
from checkpoint.agent.slots import SlotTable
from checkpoint.errors import CheckpointError
from checkpoint.layout import PlanLayout, PlanRefused
from checkpoint.log import AttemptInfo, CheckpointInfo, RunLog, RunState
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from trainer import wire

PREFAULT_FIRST_BYTES = 64 << 20
"""Slots of up to this size have their pages made here; larger ones while the ranks start."""


@dataclass(frozen=True)
class Provisions:
    """What a node has for an attempt: what its preparation found and made.

    ``restore``: rank -> index of the slot to restore from, empty on a fresh start. ``from_slot``: (step, epoch) of
    slots that it starts from, uploaded as its own checkpoint where not durable yet. ``ahead``: what brings its data,
    where that comes while the ranks run.
    """

    layout: PlanLayout
    plan_path: Path
    table: SlotTable
    data_dir: Path | None = None
    restore: Mapping[int, int] = field(default_factory=dict)
    start_step: int = -1
    from_slot: tuple[int, int] | None = None
    ahead: Ahead | None = None


class Preparer:
    """Prepares one attempt after another; the plans that it has read are kept in ``layouts``, by their digest."""

    def __init__(
        self, store: Store, options: Options, pool: Executor, tell: Callable[[int, There], None] = lambda *_: None
    ) -> None:
        """``tell`` hears of an epoch, in a thread of its data's, how far that is there."""
        self._store, self._options, self._pool, self._tell = store, options, pool, tell
        self.layouts: dict[str, tuple[PlanLayout, Path]] = {}
        self.ahead: Ahead | None = None
        """Of the attempt that was prepared or found last."""

    def prepare(self, gang: Gang, state: RunState, table: SlotTable | None, cancelled: threading.Event) -> Provisions:
        """What ``gang`` needs; ``table``: slots of the attempt before, used again where they fit.

        For a thread of its own, while no rank of the node runs (A3). Raises CannotStart, CheckpointError, OSError; soon
        where it is ``cancelled``, since the next preparation waits for this one.
        """

        def go_on() -> None:
            if cancelled.is_set():
                raise CannotStart(75, f"attempt {gang.epoch} is over: nobody waits for its preparation")

        attempt, options = gang.attempt, self._options
        if attempt.nodes != options.nodes:
            raise CannotStart(
                78, f"the attempt is for {attempt.nodes} nodes, this launch has {options.nodes}; launch anew"
            )
        if attempt.plan not in self.layouts:
            self.layouts[attempt.plan] = fetch_plan(self._store, options.run, attempt.plan, options.work)
        layout, plan_path = self.layouts[attempt.plan]
        if attempt.ranks != layout.ranks or attempt.ranks % attempt.nodes:
            raise CannotStart(
                78,
                f"the attempt has {attempt.ranks} ranks on {attempt.nodes} nodes, its plan is for "
                f"{layout.ranks}; the driver must write another attempt",
            )
        go_on()
        data_dir = self._data(gang, layout)
        go_on()
        with contextlib.ExitStack() as failed:
            if table is None or table.plan_digest != layout.digest or set(table.layouts) != set(gang.local):
                table = SlotTable(layouts(layout, gang.local), layout.digest, layout.what_digest, layout.slots)
                failed.callback(table.close)  # nobody else has it: its memory would stay until the agent ends
            for rank in gang.local:
                table.create(rank)
            if table.total_bytes <= PREFAULT_FIRST_BYTES:
                table.prefault()
            restore, start_step, from_slot = self._restore(gang, state, layout, table, go_on)
            ahead = self.bring_ahead(gang, layout, max(0, start_step) + 1)
            if ahead is not None:
                ahead.first(go_on)
                ahead.start()
            failed.pop_all()
        return Provisions(layout, plan_path, table, data_dir, restore, start_step, from_slot, ahead)

    def _data(self, gang: Gang, layout: PlanLayout) -> Path:
        """Where the ranks find their shards: whole ones, or such as are filled while they run."""
        folder, data = self._options.work / "data", layout.data
        if data is None or not data.replicas_of(gang.local, len(layout.positions)):
            return folder  # no rank of this node reads any
        if gang.how("data", "cache_gib"):
            cache = self._options.work / FOLDER
            return cache if data.mixed else cache / data.parts[0].digest
        found = fetch_data(self._store, layout, folder)
        if (long := len(os.fsencode(found))) > wire.FOLDER_MOST:
            raise CannotStart(
                78,
                f"the data are in {found}, a name of {long} bytes, and ranks are told names of at most "
                f"{wire.FOLDER_MOST}: have the store in a folder of a shorter name",
            )
        return found

    @property
    def figures(self) -> tuple[int, int, int]:
        """Of data that comes ahead: bytes from the store, requests for them, bytes that are held."""
        return self.ahead.figures if self.ahead is not None else (0, 0, 0)

    def bring_ahead(self, gang: Gang, layout: PlanLayout, first: int | None) -> Ahead | None:
        """What brings an attempt's data, not begun yet; what brought that of the one before has ended."""
        before, epoch = self.ahead, gang.epoch
        if before is not None:
            before.stop()
            before.join()
        self.ahead = ahead_of(
            self._store, layout, gang, self._options.work, first, lambda there: self._tell(epoch, there)
        )
        return self.ahead

    def _restore(
        self, gang: Gang, state: RunState, layout: PlanLayout, table: SlotTable, go_on: Callable[[], None]
    ) -> tuple[dict[int, int], int, tuple[int, int] | None]:
        attempt = gang.attempt
        info = state.checkpoint(attempt.checkpoint) if attempt.checkpoint is not None else None
        source = self._options.run
        if attempt.slots is not None:
            point = attempt.slots["step"], attempt.slots["epoch"]
            held = table.held_by_all().get(point)
            if held is not None:
                table.keep_up_to(point)
                return {rank: seen.index for rank, seen in held.items()}, point[0], point
            if info is None or info.step != point[0]:
                raise CannotStart(
                    76,
                    f"this node does not hold step {point[0]} of attempt {point[1]} in its slots; the attempt names "
                    "no checkpoint of that step; restore from an older checkpoint",
                )
        table.clear()
        if info is None:
            if attempt.checkpoint is not None:
                raise CannotStart(76, f"record {attempt.checkpoint} is no valid checkpoint")
            info, source = self._parent(attempt)
            if info is None:
                return {}, -1, None
        restore_slots(
            self._store,
            source,
            info,
            layout,
            {rank: table.slots[rank][0] for rank in gang.local},
            epoch=gang.epoch,
            pool=self._pool,
            same_what=source == self._options.run,
            go_on=go_on,
        )
        return dict.fromkeys(gang.local, 0), info.step, None

    def _parent(self, attempt: AttemptInfo) -> tuple[CheckpointInfo | None, str]:
        """The checkpoint of another run that a forked run begins from, and that run's name; None: from the start."""
        named = attempt.body["restore"].get("parent")
        if not isinstance(named, Mapping):
            return None, self._options.run
        run, number = str(named.get("run")), named.get("checkpoint")
        info = RunLog(self._store, run).fold().checkpoint(number) if isinstance(number, int) else None
        if info is None:
            raise CannotStart(76, f"record {number} of run {run}, which this fork begins from, is no valid checkpoint")
        return info, run


def exit_of(error: CannotStart | CheckpointError | OSError, work: Path) -> tuple[int, str]:
    """Why an attempt cannot be prepared: exit code for its ranks, and words."""
    if isinstance(error, CannotStart):
        return error.code, str(error)
    if isinstance(error, OSError):
        return 78, f"this node cannot hold the attempt: {room_words(error, work)}"
    # 66 (no such object) is the store's word; a rank that cannot have what it needs is refused
    code = {66: 78, 70: 78}.get(error.exit_code, error.exit_code)
    return 78 if isinstance(error, PlanRefused) else code, str(error)
