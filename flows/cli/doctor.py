"""``hotstage doctor``: what this machine can train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import click

from flows.cli.main import json_option, say, show

_MARKS = {"ok": "ok     ", "warn": "warning", "bad": "BAD    ", "unknown": "?      "}


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Say what this machine can train on, and how to mend what is wrong: engine, GPUs, driver, libraries.

    Of a cluster: `hotstage k8s doctor`. Exits 0 where nothing is bad, else 78.
    """
    from flows.show.machine import examine_machine

    return tell_checks(examine_machine(), as_json)


class Told(Protocol):
    """What a doctor found: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def verdict(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def mend(self) -> str: ...


def tell_checks(checks: Sequence[Told], as_json: bool) -> int:
    """What a doctor found, for people or programs; its exit code."""
    if as_json:
        show([asdict(check) for check in checks])
    else:
        for check in checks:
            say(f"{_MARKS[check.verdict]}  {check.name:<10} {check.text}")
            if check.mend and check.verdict != "ok":
                say(f"{'':>20} mend: {check.mend}")
    return 78 if any(check.verdict == "bad" for check in checks) else 0
