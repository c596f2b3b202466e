"""What a command does not need it does not import: the heavy libraries come with the work that needs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.flows.conftest import Trained
from tests.support.place import ROOT

HEAVY = ("prefect", "boto3", "botocore", "kubernetes", "httpx", "rich", "k8s")
PROGRAM = f"""
import json, sys
from flows.cli.main import exit_code_of
codes = [exit_code_of(arguments) for arguments in json.loads(sys.argv[1])]
found = sorted(set(m.partition(".")[0] for m in sys.modules) & set({HEAVY}))
sys.stderr.write("\\n" + json.dumps([codes, found]))
"""


def imported(folder: Path, env: dict[str, str], *commands: list[str]) -> tuple[list[int], list[str]]:
    """The exit codes of commands that one process runs, and what it has imported of HEAVY after them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=folder,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    codes, found = json.loads(done.stderr.splitlines()[-1])
    return codes, found


def test_help_imports_nothing(tmp_path: Path, trained: Trained) -> None:
    bare = (["--help"], ["train", "--help"], ["demo", "--help"], ["init", "gpt2-demo"])
    assert imported(tmp_path, trained.place.env, *bare) == ([0] * len(bare), [])


def test_a_look_at_a_folder_needs_no_server_s_library(trained: Trained) -> None:
    """Plans and runs of a store that is a folder: neither Prefect nor S3 nor Kubernetes."""
    looks = (
        ["plan", "spec.toml"],
        ["runs", "ls"],
        ["runs", "show", trained.run],
        ["ckpt", "ls", trained.run],
        ["logs", trained.run],
    )
    assert imported(trained.place.folder, trained.place.env, *looks) == ([0] * len(looks), [])


def test_what_is_needed_is_seen(trained: Trained) -> None:
    """The test above can fail: what renders for a cluster brings that room."""
    _, found = imported(trained.place.folder, trained.place.env, ["k8s", "render", "spec.toml"])
    assert found == ["k8s"]
