"""The ``hotstage`` command. Every subcommand is a thin layer over plain functions; errors of the packages become one
readable message and their own exit code here, and nowhere else."""

from __future__ import annotations

from flows.cli.main import main

__all__ = ["main"]
