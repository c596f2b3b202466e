"""The end of a step: losses in the groups' tree, reports of positions and replicas, one decision with the same bits."""

from __future__ import annotations

import itertools
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine.native import build_program

TENSORS = 11


def numbers(groups: int, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses by group and row, of many magnitudes, so that the order of their sum shows; squared norms."""
    rng = np.random.default_rng([groups, rows])
    return rng.normal(size=(groups, rows)) * 10.0 ** rng.integers(-6, 7, (groups, rows)), rng.random(TENSORS)


def decide(path: Path, groups: int, replicas: int, positions: int, *fault: str) -> tuple[int, list[list[str]], str]:
    losses, norms = numbers(groups, 24 // groups)
    sizes = np.array([losses.shape[1], TENSORS], np.uint64)
    path.write_bytes(sizes.tobytes() + losses.tobytes() + norms.tobytes())
    command = [build_program("reports_drive"), str(groups), str(replicas), str(positions), str(path), *fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [line.split() for line in done.stdout.splitlines()], done.stderr


def tree(sums: list[float]) -> float:
    """The balanced tree, from its top."""
    half = len(sums) // 2
    return sums[0] if len(sums) == 1 else tree(sums[:half]) + tree(sums[half:])


def test_losses_have_the_same_bits_on_any_number_of_replicas(tmp_path: Path) -> None:
    for groups in (1, 2, 4, 8):
        losses, norms = numbers(groups, 24 // groups)
        wanted = tree([list(itertools.accumulate(group, initial=0.0))[-1] for group in losses.tolist()])
        norm = math.sqrt(list(itertools.accumulate(norms.tolist(), initial=0.0))[-1])
        for replicas, positions in itertools.product((1, 2, 4, 8), (1, 2, 3)):
            if replicas > groups:
                continue
            code, lines, _ = decide(tmp_path / "numbers", groups, replicas, positions)
            assert code == 0
            assert len(lines) == replicas
            for line in lines:
                assert float.fromhex(line[0]) == wanted
                assert float.fromhex(line[1]) == norm
                assert line[2:] == lines[0][2:]
            assert lines[0][2] == "24"
            full = any(r + p == 3 for r in range(replicas) for p in range(positions))
            assert lines[0][3] == str(int(not full))  # one slot that is not free is enough
            assert lines[0][4] == str(int(replicas > 1 and positions > 1))  # and one that was asked to stop


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("step", "a replica reports step 8, this is step 7"),
        ("norm", "the squared norm of the gradient of tensor 10 is"),
    ],
)
def test_replicas_that_drifted_apart_end_the_gang(tmp_path: Path, fault: str, reason: str) -> None:
    code, _, words = decide(tmp_path / "numbers", 8, 4, 2, fault)
    assert code == 70
    assert reason in words


def test_norms_that_are_not_finite_are_no_drift(tmp_path: Path) -> None:
    """NaN or infinity, by which replica added which first; all of them see that the step is not finite."""
    code, lines, words = decide(tmp_path / "numbers", 8, 4, 2, "nan")
    assert code == 0, words
    assert [line[5] for line in lines] == ["1"] * 4


@pytest.mark.parametrize(
    ("every", "persist", "free", "wanted"),
    [
        (1, 0, "111", "110 110 110"),
        (2, 0, "1111", "000 110 000 110"),
        (2, 4, "11111111", "000 100 000 110 000 100 000 110"),
        (2, -1, "11111111", "000 100 000 100 000 100 000 110"),  # the last step alone
        (0, 0, "11111111", "000 000 000 000 000 000 000 110"),
        (2, 0, "10101111", "000 001 000 001 000 110 000 110"),  # skipped, and counted
        (1, 2, "10111111", "100 001 110 110 100 110 100 110"),  # what was to be stored is owed: the next one is
        (1, 3, "110000s0", "100 100 001 001 001 001 110 110"),  # a stop and the last step save in any case
    ],
)
def test_the_gang_saves_or_skips_by_one_decision(every: int, persist: int, free: str, wanted: str) -> None:
    command = [build_program("saves_drive"), str(every), str(persist), "8", free]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == wanted.split()
