"""The ``hotstage`` command. Every subcommand is a thin layer over plain functions; errors of the packages become one
readable message and their own exit code here, and nowhere else."""

from __future__ import annotations

import sys

from flows.cli.shadow import shadow

try:
    from flows.cli.main import main
except Exception as error:
    if (found := shadow(error)) is None:
        raise
    sys.stderr.write(f"hotstage: {found}\n")
    raise SystemExit(78) from None

__all__ = ["main"]
