"""What an agent leaves on its node's disk for the one after it, so that a restart costs the ranks nothing.

    attempt-<epoch>   written at the START of that attempt (``attempt_file.py``): its presence is the mark (A2)
    plan-<digest>     its plan (``fetch.py``)
    agent.json        notes: what the ranks have said so far, and whether the attempt is over here

The slots are not on the disk: the ranks keep their descriptors and hand them back (``Machine._on_rank``).
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from checkpoint.agent.devices import ON_CPU, Devices
from checkpoint.agent.gang import CannotStart
from checkpoint.agent.status import RankStatus
from checkpoint.layout import PlanLayout, PlanRefused, read_plan
from trainer import wire
from trainer.wire.files import write_file

log = logging.getLogger(__name__)


def attempt_path(work: Path, epoch: int) -> Path:
    """The attempt file: where it is there, the attempt was started on this node."""
    return work / f"attempt-{epoch}"


def remember(work: Path, epoch: int, over: bool, ranks: Mapping[int, RankStatus]) -> None:
    """Write the notes; a disk that does not take them costs what the ranks said, nothing else."""
    said = {str(rank): status.to_map() for rank, status in ranks.items()}
    try:
        write_file(work / "agent.json", json.dumps({"epoch": epoch, "over": over, "ranks": said}).encode())
    except OSError as error:
        log.warning("the agent's notes cannot be written: %s", error)


def recall(work: Path, epoch: int) -> tuple[bool, dict[int, RankStatus]]:
    """Whether the attempt was over here, and what the agent before noted of its ranks."""
    try:
        notes = json.loads((work / "agent.json").read_bytes())
        if notes["epoch"] == epoch:
            return bool(notes["over"]), {
                int(rank): RankStatus.from_map(value) for rank, value in notes["ranks"].items()
            }
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info("no notes of attempt %d: what its ranks said before is lost", epoch)
    return False, {}


def found_devices(work: Path, epoch: int, local: range) -> Devices:
    """What the ranks of this node were told that they run on; the CPU where the file does not say it."""
    head, size, one = wire.Attempt(), ctypes.sizeof(wire.Attempt), ctypes.sizeof(wire.AttemptRank)
    try:
        data = attempt_path(work, epoch).read_bytes()
    except OSError:
        return ON_CPU
    if len(data) < size + one * local.stop:
        return ON_CPU
    ctypes.memmove(ctypes.byref(head), data, size)
    if head.version != wire.ATTEMPT_VERSION or head.device_kind != wire.DEVICES["cuda"]:
        return ON_CPU
    ranks = (wire.AttemptRank.from_buffer_copy(data, size + one * rank) for rank in local)
    return Devices("cuda", tuple(rank.device for rank in ranks))


def found_plan(work: Path, digest: str) -> tuple[PlanLayout, Path]:
    """The plan of an attempt that was started before this agent. Raises CannotStart where it is gone."""
    path = work / f"plan-{digest}"
    try:
        return read_plan(path.read_bytes(), digest=bytes.fromhex(digest)), path
    except (OSError, PlanRefused) as error:
        raise CannotStart(75, f"the plan of the attempt that this agent found is gone: {error}") from error
