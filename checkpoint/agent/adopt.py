"""What an agent leaves on its node's disk for the one after it, so that a restart costs the ranks nothing.

    attempt-<epoch>   written at the START of that attempt (``attempt_file.py``): its presence is the mark (A2)
    plan-<digest>     its plan (``fetch.py``)
    agent.json        notes: what the ranks have said so far, and whether the attempt is over here

The slots are not on the disk: the ranks keep their descriptors and hand them back (``Service._on_rank``).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from checkpoint.agent.gang import CannotStart, Gang
from checkpoint.agent.status import RankStatus
from checkpoint.layout import PlanLayout, PlanRefused, read_plan
from trainer.wire.files import write_file

log = logging.getLogger(__name__)


def attempt_path(work: Path, epoch: int) -> Path:
    """The attempt file: where it is there, the attempt was started on this node."""
    return work / f"attempt-{epoch}"


def remember(work: Path, gang: Gang) -> None:
    """Write the notes; a disk that does not take them costs what the ranks said, nothing else."""
    ranks = {str(rank): status.to_map() for rank, status in gang.ranks.items()}
    text = json.dumps({"epoch": gang.epoch, "over": gang.phase == "idle", "ranks": ranks})
    try:
        write_file(work / "agent.json", text.encode())
    except OSError as error:
        log.warning("the agent's notes cannot be written: %s", error)


def recall(work: Path, gang: Gang) -> bool:
    """Into ``gang.ranks`` what the agent before noted of them; whether the attempt was over here."""
    try:
        notes = json.loads((work / "agent.json").read_bytes())
        if notes["epoch"] == gang.epoch:
            gang.ranks.update({int(rank): RankStatus.from_map(value) for rank, value in notes["ranks"].items()})
            return bool(notes["over"])
    except (OSError, ValueError, KeyError, TypeError):
        log.info("no notes of attempt %d: what its ranks said before is lost", gang.epoch)
    return False


def found_plan(work: Path, gang: Gang) -> tuple[PlanLayout, Path]:
    """The plan of an attempt that was started before this agent. Raises CannotStart where it is gone."""
    path = work / f"plan-{gang.attempt.plan}"
    try:
        return read_plan(path.read_bytes(), digest=bytes.fromhex(gang.attempt.plan)), path
    except (OSError, PlanRefused) as error:
        raise CannotStart(75, f"the plan of the attempt that this agent found is gone: {error}") from error
