"""PyTorch's pipelining, live, where a python has torch: HOTSTAGE_TORCH, or this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = os.environ.get("HOTSTAGE_TORCH") or (sys.executable if importlib.util.find_spec("torch") else "")


@pytest.mark.slow
@pytest.mark.skipif(
    not TORCH, reason="no python with torch: set HOTSTAGE_TORCH to one (compare_pipelining.py says how)"
)
def test_both_read_what_the_other_wrote() -> None:
    done = subprocess.run(
        [TORCH, "-m", "tests.reference.compare_pipelining"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(": read") >= 100
    assert done.stdout.count(": taken") >= 60
