"""How bytes of this project are refused, whoever reads them: what does not hold, and what a newer version wrote."""

from __future__ import annotations

from collections.abc import Callable


class Unreadable(ValueError):
    """Bytes that are not what they should be. Each package's reader turns it into an error of its own."""


class NewerVersion(Unreadable):
    """Bytes that a newer version wrote."""


def check_version(
    what: str,
    found: int,
    known: int,
    error: Callable[[str], Exception],
    mend: str = "use the hotstage that wrote it, or a newer one",
) -> None:
    """Raise ``error`` with both versions, where ``found`` is not one of 1 to ``known``, which this program reads.

    >>> check_version("manifest 5", 2, 1, ValueError)
    Traceback (most recent call last):
    ValueError: manifest 5 has version 2, this hotstage reads version 1: use the hotstage that wrote it, or a newer one
    """
    if not 1 <= found <= known:
        ours = f"version {known}" if known == 1 else f"versions 1 to {known}"
        raise error(f"{what} has version {found}, this hotstage reads {ours}: {mend}")
