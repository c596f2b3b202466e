"""``engine/wire/*.h``, as the engine prints them, and ``trainer/wire`` say the same."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.engine.engine_build import engine
from trainer import wire
from trainer.plan.memory import workspace_bytes
from trainer.spec_how import KernelPath

__all__ = ["engine"]


@pytest.fixture(scope="module")
def printed(engine: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subprocess.run([engine, "wire"], capture_output=True, check=True).stdout)
    return found


def c_name(name: str) -> str:
    return "hs_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


RECORDS = {
    c_name(name): value
    for name, value in vars(wire).items()
    if isinstance(value, type) and issubclass(value, ctypes.Structure) and value.__module__ == wire.__name__
}


def test_records_have_the_same_fields_at_the_same_places(printed: dict[str, Any]) -> None:
    assert set(printed["structs"]) == set(RECORDS)
    for name, record in RECORDS.items():
        fields = {f[0].rstrip("_"): [getattr(record, f[0]).offset, getattr(record, f[0]).size] for f in record._fields_}
        assert printed["structs"][name] == {"size": ctypes.sizeof(record), "fields": fields}, name


def test_tables_are_the_same(printed: dict[str, Any]) -> None:
    assert printed["kernels"] == {
        name: [*kernel[:-1], [list(operand) for operand in kernel.operands]] for name, kernel in wire.KERNELS.items()
    }
    assert printed["paths"] == wire.PATHS == {name: i for i, name in enumerate(get_args(KernelPath))}
    assert printed["exits"] == {str(code): list(row) for code, row in wire.EXITS.items()}
    assert printed["messages"] == wire.MSGS


def test_the_workspace_of_a_thread_is_what_the_plan_counts(printed: dict[str, Any]) -> None:
    assert printed["workspace_bytes"] == [workspace_bytes(1), workspace_bytes(3)]


def test_numbers_are_the_same(printed: dict[str, Any]) -> None:
    special = {"HS_SECTION_COUNT": len(wire.SECTIONS)}
    for name, number in printed["numbers"].items():
        ours = special.get(name, getattr(wire, name.removeprefix("HS_").replace("SLOT_SUM", "SUM"), None))
        assert ours == number, name
