"""The demo as `make demo` runs it, right after `make setup`: how long to its first step, and to its end.

A real ``hotstage demo`` in a fresh folder with a user's folders of its own. Cold: the data (documents, tokenizer,
shards), the plan, the store, Prefect's home with its database. Warm, as the setup leaves it: the environment, the
engine, and what of them the system keeps in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def measure() -> dict[str, float]:
    """Seconds from the start of the command: ``first_step`` to the end of step 1, ``all`` to the end of the command."""
    with tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "HOTSTAGE"))}
        env |= {
            "XDG_CACHE_HOME": f"{folder}/cache",
            "XDG_DATA_HOME": f"{folder}/data",
            "PREFECT_HOME": f"{folder}/home",
        }
        env["PYTHONPATH"] = str(ROOT)
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "demo", "--json"],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        events = [json.loads(line) for line in process.stderr]
        if process.wait():
            raise SystemExit(f"the demo failed: {events[-1]}")
        ended = time.time()
    first = next(event for event in events if event["event"] == "step" and event["step"] == 1)
    return {"first_step": float(first["time"]) - began, "all": ended - began}
