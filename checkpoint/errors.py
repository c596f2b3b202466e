"""What can go wrong with checkpoints, drawn as a tree; a class says what the caller should do.

    CheckpointError
      StoreError                the store did not do what was asked; nothing was lost
        StoreUnavailable        wait and try again (time-outs, 5xx)                           exit 75
          StoreFull             a full disk, a quota: a person frees space, training goes on
          CredentialsExpired    the session token is past its end: renewed, the same call works; training goes on
        StoreRefused            a person must mend it (rights, address, a store without create-if-absent)   exit 78
          CredentialsRefused    the server does not take these credentials: at the start wrong, later on rotated
        NotFound                no such object
      Conflict                  another writer won this log number: read its ``state``, decide again
      Damaged                   bytes are not what their digest, size or schema says: go to an older one    exit 76
      OtherVersion              a newer hotstage wrote it: not damaged, and not readable here; write nothing    exit 78
      Halted                    stop writing: a newer epoch holds the run, or the log has an unreadable record
      PinRefused                a checkpoint that was given up, or a pin's name that is taken: take another    exit 78

Everything that boto3, the file system or msgpack can raise is turned into one of these at one boundary each
(``store/s3_answers.py``, ``store/file.py``, ``codec.py`` over ``trainer/wire/packed.py``); the cause stays attached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint.log import RunState


class CheckpointError(Exception):
    """Base of this package's errors; ``exit_code`` is what a process that ends because of it should say."""

    exit_code = 70


class StoreError(CheckpointError):
    """The store did not do what was asked."""

    exit_code = 75


class StoreUnavailable(StoreError):
    """Not now: the same call may work later. ``word``: why, for counting."""

    exit_code = 75
    word = "other"


class StoreFull(StoreUnavailable):
    """There is no room: nobody who has something to say can say it through the store."""


class CredentialsExpired(StoreUnavailable):
    """The session token has expired and no newer one was found; the text names where it comes from and how to renew."""


class StoreRefused(StoreError):
    """Not until somebody mends it; the text says how."""

    exit_code = 78


class CredentialsRefused(StoreRefused):
    """The server does not know these credentials, or there are none; not a question of rights.

    Whoever has worked with this store before should wait as for StoreUnavailable: they are looked for again at each
    call. At the start of a command it is a refusal like any other.
    """


class NotFound(StoreError):
    """There is no object of this name."""

    exit_code = 66

    def __init__(self, key: str, store: str = "") -> None:
        super().__init__(f"no object {key!r}" + (f" in {store}" if store else ""))
        self.key = key


class Damaged(CheckpointError):
    """Bytes that are not what they should be; said loudly, never used."""

    exit_code = 76


class OtherVersion(CheckpointError):
    """Bytes of a newer version: they are as they should be, and this program cannot read them. Use a newer one.

    Never taken for damage: whoever goes to an older checkpoint because of it would lose steps.
    """

    exit_code = 78


class Conflict(CheckpointError):
    """Another writer created this log record first; ``state`` is the run folded up to now."""

    exit_code = 75

    def __init__(self, message: str, state: RunState) -> None:
        super().__init__(message)
        self.state = state


class Halted(CheckpointError):
    """This writer must not write any more; ``state`` is the run as far as it can be read."""

    exit_code = 78

    def __init__(self, message: str, state: RunState | None = None) -> None:
        super().__init__(message)
        self.state = state


class PinRefused(CheckpointError):
    """This checkpoint cannot be pinned under this name: it was given up before, or the name is another one's."""

    exit_code = 78
