"""One table of failure classes: how the end of a rank or a pod is classed, and what follows from its class.

    how a rank, a supervisor or a pod ended  ->  Failure  ->  its row: budget, strikes, memory, exit code, mend

An exit code's class is spelled in ``wire/exit.h`` (here `trainer.wire.EXITS`); what a class means is spelled here, and
the driver (``flows/drive``), its words for people, the diagnosis of pods and the Job's ``podFailurePolicy`` (``k8s/``)
read it. Records hold a class by its value; `Failure.read` takes one that this version does not know as None.

Depends on nothing but ``trainer.wire``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import NamedTuple

from trainer.wire import EXITS

SIGKILL, SIGTERM = 9, 15


class Failure(StrEnum):
    """The classes, from the most to the least causal: of several ends at once, the first explains the others (D3)."""

    SICK = "sick"
    MEMORY = "memory"
    SIGNAL = "signal"
    NUMERIC = "numeric"
    DATA = "data"
    RESTORE = "restore"
    CONFIG = "config"
    BUG = "bug"
    STALL = "stall"
    PREEMPTED = "preempted"
    INFRA = "infra"
    DONE = "done"  # none: it ended well

    @classmethod
    def read(cls, text: object) -> Failure | None:
        """The class that a record names; None for one of another version."""
        return _BY_VALUE.get(text) if isinstance(text, str) else None


CAUSAL: Mapping[Failure, int] = {cls: place for place, cls in enumerate(Failure)}
"""Place in the order of causes: a lower one outranks a higher one."""
_BY_VALUE: Mapping[str, Failure] = {cls.value: cls for cls in Failure}


class Again(Enum):
    """How often a run begins again after a failure, beside the limit on attempts without progress that all share."""

    NEVER = "a person must mend it first"
    ONCE = "once since the run came further"
    ONCE_A_PLACE = "once a machine, then without that machine"
    SAME_STEP = "until it has happened recovery.max_same_step times at one step"
    FREELY = "as long as there is progress"


class Strike(Enum):
    """What it says of the machine where it happened."""

    NONE = "nothing"
    FADES = "a strike, forgotten with newer checkpoints"
    OUT = "left out until a person's word"


class Consequence(NamedTuple):
    """What follows from a class.

    ``from_memory``: the next attempt may start from state in the nodes' memory; ``from_outside``: something else than
    the program ended it (Prefect's Crashed rather than Failed); ``exit_code``: of the command whose run gives up
    because of it; ``mend``: what a person should do then, ``RUN`` for the run's name.
    """

    again: Again
    strike: Strike
    from_memory: bool
    from_outside: bool
    exit_code: int
    mend: str = ""


FAILURES: Mapping[Failure, Consequence] = {
    Failure.SICK: Consequence(
        Again.ONCE_A_PLACE,
        Strike.OUT,
        True,
        True,
        88,
        "take the machine out of service and test it, then `hotstage runs resume RUN`",
    ),
    Failure.MEMORY: Consequence(
        Again.ONCE,
        Strike.NONE,
        True,
        False,
        78,
        "raise the limit (launch.resources.memory on a cluster), or take more stages or smaller microbatches; "
        "what else the container holds counts too (volumes of medium Memory)",
    ),
    Failure.SIGNAL: Consequence(Again.SAME_STEP, Strike.FADES, True, True, 75),
    Failure.NUMERIC: Consequence(
        Again.SAME_STEP,
        Strike.NONE,
        False,
        False,
        87,
        "go back to an earlier checkpoint with a lower rate, `hotstage runs resume RUN --rollback-to N --lr-scale 0.5`,"
        " or past what it reads there (--skip FIRST-LAST)",
    ),
    Failure.DATA: Consequence(
        Again.NEVER,
        Strike.NONE,
        True,
        False,
        65,
        "prepare the data again (`hotstage data prepare SPEC --again`), then `hotstage runs resume RUN`",
    ),
    Failure.RESTORE: Consequence(
        Again.FREELY,
        Strike.FADES,
        False,
        False,
        76,
        "`hotstage ckpt verify RUN` reads every checkpoint again and names the objects; start from one of "
        "another run (`hotstage runs fork`), or begin again with `hotstage runs resume RUN --begin-anew`",
    ),
    Failure.CONFIG: Consequence(
        Again.NEVER,
        Strike.NONE,
        True,
        False,
        78,
        "the message names the value and the limit; with those mended, `hotstage runs resume RUN` goes on (or "
        "start the corrected spec)",
    ),
    Failure.BUG: Consequence(
        Again.SAME_STEP,
        Strike.NONE,
        True,
        False,
        70,
        "this is a bug of hotstage: `hotstage logs RUN` has the last words",
    ),
    Failure.STALL: Consequence(Again.FREELY, Strike.FADES, True, False, 86),
    Failure.PREEMPTED: Consequence(Again.FREELY, Strike.NONE, True, True, 75),
    Failure.INFRA: Consequence(
        Again.FREELY,
        Strike.FADES,
        True,
        True,
        75,
        "look at the machine and the store (room, rights, network), then `hotstage runs resume RUN`",
    ),
    Failure.DONE: Consequence(Again.FREELY, Strike.NONE, True, False, 0),
}


def mend_of(cls: str) -> str:
    """What a person should do about a cause of this class; empty where recovery mends it."""
    known = Failure.read(cls)
    return FAILURES[known].mend if known else ""


# --- how ends are classed ---------------------------------------------------------------------------------------------


def of_code(code: int) -> Failure:
    """Of a rank's exit code; one that is not in the table is a bug."""
    known = EXITS.get(code)
    return Failure(known.cls) if known else Failure.BUG


def of_signal(signal: int) -> Failure:
    """Of the signal that ended a rank: one that was asked to leave had no fault of its own."""
    return Failure.INFRA if signal == SIGTERM else Failure.SIGNAL


NOT_OURS = (1, 2, 126, 127)
"""Codes that no engine ends with: another program did, or none could be run."""
LAST_SIGNAL = 64


def of_supervisor(code: int) -> Failure:
    """Of the exit code of a node's supervisor as a container runtime tells it: 128 + n for signal n.

    A supervisor that was killed (137) or ended early (0) lost its node, which is no verdict on the program; nor is 255,
    which a runtime tells of what it found gone after its machine had started again.
    """
    if code in EXITS and code:
        return of_code(code)
    if code in NOT_OURS:
        return Failure.CONFIG
    if code - 128 not in (SIGKILL, SIGTERM) and 128 < code <= 128 + LAST_SIGNAL:
        return Failure.SIGNAL
    return Failure.INFRA


def from_elsewhere(code: int | None) -> bool:
    """Whether an exit code tells of something that happened elsewhere: to a peer, to the store, or a request to stop.
    Where anything else is known to have been lost, that explains it.

    >>> [from_elsewhere(code) for code in (75, 143, 137, 85, None)]
    [True, True, False, False, False]
    """
    return code is not None and code in EXITS and of_code(code) is Failure.INFRA


class DeviceFault(NamedTuple):
    """A number by which NVIDIA's driver names a fault. ``sick``: the device's, not the program's."""

    text: str
    sick: bool


# After NVIDIA's catalogue of Xid errors (docs.nvidia.com/deploy/xid-errors) and its health checks, November 2026. What
# is not here is told by its number, and says nothing of the device.
XIDS: Mapping[int, DeviceFault] = {
    13: DeviceFault("an exception in a kernel", False),
    31: DeviceFault("a kernel touched memory that is not its own", False),
    43: DeviceFault("the device stopped a program's work after a fault of that program", False),
    45: DeviceFault("the driver took a program's work back, after another fault", False),
    46: DeviceFault("the device stopped working", True),
    48: DeviceFault("uncorrectable error of its memory (double bit ECC)", True),
    61: DeviceFault("its controller halted", True),
    62: DeviceFault("its controller halted", True),
    63: DeviceFault("a row of its memory is to be remapped: reset the device when it is idle", False),
    64: DeviceFault("a row of its memory could not be remapped", True),
    69: DeviceFault("an exception in a kernel", False),
    74: DeviceFault("an error of NVLink", True),
    79: DeviceFault("the device has fallen off the bus", True),
    92: DeviceFault("many corrected errors of its memory", False),
    94: DeviceFault("uncorrectable error of its memory, contained to one program", True),
    95: DeviceFault("uncorrectable error of its memory, not contained", True),
    119: DeviceFault("its firmware (GSP) does not answer", True),
    120: DeviceFault("its firmware (GSP) failed", True),
    140: DeviceFault("uncorrectable error of its memory", True),
}


def xid_text(number: int) -> str:
    """For people.

    >>> xid_text(79)
    'Xid 79: the device has fallen off the bus'
    """
    known = XIDS.get(number)
    return f"Xid {number}: {known.text}" if known else f"Xid {number}, which NVIDIA's catalogue explains"


def of_xid(number: int | None) -> Failure | None:
    """SICK where the driver's word makes the device the cause of whatever its rank ended with; else None."""
    known = XIDS.get(number) if number is not None else None
    return Failure.SICK if known is not None and known.sick else None


# reason or condition of a pod, or of its container, by Kubernetes' names
POD_REASONS: Mapping[str, Failure] = {
    "OOMKilled": Failure.MEMORY,
    "DisruptionTarget": Failure.PREEMPTED,
    "Evicted": Failure.INFRA,
    "NodeLost": Failure.INFRA,
    "OutOfcpu": Failure.INFRA,
    "OutOfmemory": Failure.INFRA,
    "OutOfpods": Failure.INFRA,
    "UnexpectedAdmissionError": Failure.INFRA,
    "NodeAffinity": Failure.INFRA,
    "TopologyAffinityError": Failure.INFRA,
    "StartError": Failure.CONFIG,
    "ContainerCannotRun": Failure.CONFIG,
    "ErrImageNeverPull": Failure.CONFIG,
    "InvalidImageName": Failure.CONFIG,
    "ImageInspectError": Failure.CONFIG,
    "CreateContainerConfigError": Failure.CONFIG,
    "ErrImagePull": Failure.CONFIG,  # where its message says that there is no such image; else it may still come
    "ImagePullBackOff": Failure.CONFIG,
}
CANNOT_RUN = ("StartError", "ContainerCannotRun")
"""Reasons of a container whose image is no engine."""
TURNED_AWAY = (
    "OutOfcpu",
    "OutOfmemory",
    "OutOfpods",
    "UnexpectedAdmissionError",
    "NodeAffinity",
    "TopologyAffinityError",
)
"""Reasons of a pod that its machine did not take."""
FAIL_JOB_CODES = tuple(sorted(code for code in EXITS if of_code(code) is not Failure.DONE))
"""Exit codes of the engine's container that the Job's podFailurePolicy names, so that its condition tells them: the Job
never restarts anything, whatever the class.
"""
FAIL_JOB_CONDITIONS = ("DisruptionTarget",)
"""Conditions of a pod that it names."""
