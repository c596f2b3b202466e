"""A rank and the algorithms of its run's products (``run/algorithms.c``), on the emulated CUDA: chosen where nobody
has, kept in the folder or by the agent, and never chosen again.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.agent.algorithms import Table
from tests.e2e import engine_runs
from tests.engine.agent_end import agent_at
from tests.engine.engine_build import engine
from tests.engine.plans import small_plan
from tests.engine.test_agent_link import slots
from tests.engine.test_device import emulated, library
from trainer import wire
from trainer.plan.compiled import Plan

__all__ = ["emulated", "engine", "library"]

STEADY = {"schedule": {"kind": "constant"}}


@pytest.fixture(autouse=True)
def kernels(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HS_EMULATED_KERNELS", "cuda")


def said(folder: Path, event: str, rank: int = 0) -> list[dict[str, Any]]:
    lines = map(
        json.loads, filter(lambda line: line.startswith("{"), (folder / f"stderr-{rank}").read_text().splitlines())
    )
    return [line for line in lines if event in line.get("event", "")]


def parsed(data: bytes) -> list[Table]:
    """The tables that follow each other in a file."""
    found = []
    while data:
        head = wire.Algorithms.from_buffer_copy(data)
        size = ctypes.sizeof(wire.Algorithms) + head.count * ctypes.sizeof(wire.Algorithm)
        found.append(Table.parse(data[:size], "a table"))
        data = data[size:]
    return found


def other_choice(table: Table) -> Table:
    """The emulated library's other algorithm for every product."""
    entries = {}
    for key, entry in table.entries.items():
        changed = wire.Algorithm.from_buffer_copy(entry)
        changed.algorithm[0] = 1 - changed.algorithm[0]
        entries[key] = bytes(changed)
    return Table(table.device, table.library, table.capability, entries)


# --- without an agent -------------------------------------------------------------------------------------


def trained(engine: Path, plan: Plan, folder: Path, path: str = "cuda") -> list[float]:
    return engine_runs.train(
        plan, folder.parent / "data", folder, engine=engine, device="cuda", kernel_path=path
    ).losses


def test_a_folder_keeps_them_and_they_decide(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share what they choose; later runs of the folder go by it, whatever would be faster now."""
    plan, folder = small_plan(tmp_path, stages=2, **STEADY), tmp_path / "run"
    losses = trained(engine, plan, folder)
    kept = (folder / "algorithms").read_bytes()
    keys = [key for table in parsed(kept) for key in table.entries]
    assert len(keys) == len(set(keys)), "two ranks chose for one product"
    assert sum(line["products"] for rank in (0, 1) for line in said(folder, "algorithms chosen", rank)) == len(keys)
    for fastest in (0, 1):
        monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"fastest {fastest}")
        assert trained(engine, plan, folder) == losses
        assert said(folder, "algorithms chosen") == said(folder, "algorithms chosen", 1) == []
    assert (folder / "algorithms").read_bytes() == kept
    (folder / "algorithms").write_bytes(b"".join(other_choice(table).to_bytes() for table in parsed(kept)))
    assert trained(engine, plan, folder) != losses
    assert trained(engine, plan, tmp_path / "exact", "cuda-exact") != losses
    assert not (tmp_path / "exact" / "algorithms").exists()


def test_products_that_the_library_has_none_for_are_the_plain_kernel_s(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that offers split-K alone: said once a run, and kept; what the library can do later changes nothing."""
    plan, folder = small_plan(tmp_path, steps=2, **STEADY), tmp_path / "run"
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", "only 3")
    losses = trained(engine, plan, folder)
    (warning,) = said(folder, "a plain kernel computes them")
    (table,) = parsed((folder / "algorithms").read_bytes())
    assert (warning["level"], warning["products"]) == ("warn", len(table.entries))
    assert {wire.Algorithm.from_buffer_copy(entry).candidates for entry in table.entries.values()} == {0}
    monkeypatch.delenv("HS_EMULATED_CUBLASLT")
    assert trained(engine, plan, folder) == losses
    assert said(folder, "a plain kernel computes them") == []


def test_another_version_of_the_library_chooses_anew_and_says_so(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = small_plan(tmp_path, steps=1), tmp_path / "run"
    trained(engine, plan, folder)
    before = (folder / "algorithms").read_bytes()
    assert said(folder, "its bits change") == []
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", "version 130200")
    trained(engine, plan, folder)
    (warning,) = said(folder, "its bits change")
    assert (warning["level"], warning["library"]) == ("warn", "cuBLASLt 13.2.0")
    after = (folder / "algorithms").read_bytes()
    assert after.startswith(before)
    assert [table.library for table in parsed(after)] == [b"cuBLASLt 13.1.0", b"cuBLASLt 13.2.0"]


def harmed(at: int, by: int = 1) -> Callable[[Path], None]:
    def harm(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= by
        file.write_bytes(data)

    return harm


@pytest.mark.parametrize(
    ("harm", "cublas", "words"),
    [
        (harmed(300), "", "a table of algorithms in .*/algorithms is damaged .15 algorithms, "),
        (harmed(0), "", "does not hold tables of algorithms: remove it if no run needs it"),
        (
            harmed(8, 8),
            "",
            "tables of algorithms of version 9, this engine reads version 1: use the release",
        ),
        (lambda file: None, "refuse 1", "refuses the algorithm that this run has for a product of"),
        (lambda file: None, "missing", "said to be missing"),
    ],
    ids=["damaged", "foreign", "newer", "refused", "missing"],
)
def test_what_does_not_do_is_refused(
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    cublas: str,
    words: str,
) -> None:
    plan, folder = small_plan(tmp_path, steps=1), tmp_path / "run"
    trained(engine, plan, folder)
    harm(folder / "algorithms")
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", cublas)
    with pytest.raises(AssertionError, match=words) as ended:
        trained(engine, plan, folder)
    assert "rank 0: exit 78" in str(ended.value)


# --- with one ---------------------------------------------------------------------------------------------


class Attempts:
    """Attempts of one rank with an agent that is driven by hand."""

    def __init__(self, engine: Path, folder: Path, plan: Plan, fds: tuple[int, ...]) -> None:
        self.engine, self.folder, self.plan, self.fds, self.count = engine, folder, plan, fds, 0

    def run(
        self,
        start: int,
        stop: int,
        *,
        table: bytes = b"",
        digest: bytes | None = None,
        answer: Callable[[Table], tuple[int, bytes]] | None = None,
    ) -> tuple[int, str, dict[str, bytes]]:
        """Exit code, standard error, what was dumped. ``answer``: to the rank's proposal; None: it must make none."""
        self.count += 1
        folder = self.folder / f"attempt-{self.count}"
        folder.mkdir()
        (folder / "plan").write_bytes(self.plan.to_bytes())
        if table:
            (folder / "algorithms").write_bytes(table)
        data = engine_runs.attempt_bytes(
            self.plan, [0], self.folder / "data", folder, device="cuda", kernel_path="cuda"
        )
        head, rest = wire.Attempt.from_buffer_copy(data), data[ctypes.sizeof(wire.Attempt) :]
        head.start_step, head.stop_after = start, stop
        head.algorithms_digest[:] = digest or (hashlib.sha256(table).digest() if table else bytes(32))
        head.crc = engine_runs._crc32c(bytes(head)[wire.Attempt.run.offset :] + rest)
        (folder / "attempt").write_bytes(bytes(head) + rest)
        command = [str(self.engine), "rank", "--plan", f"{folder}/plan", "--attempt", f"{folder}/attempt"]
        command += ["--rank", "0", "--agent", f"{folder}/agent", "--dump", str(folder)]
        with (
            agent_at(folder / "agent") as agent,
            (folder / "stderr-0").open("wb") as err,
            subprocess.Popen(command, stderr=err) as rank,
        ):
            try:
                agent.tell("SLOTS", 0, a=len(self.fds), b=0 if start >= 0 else -1, fds=self.fds, epoch=1)
                if answer is not None:
                    code, payload = answer(Table.parse(agent.hears("ALGORITHMS", 0).payload, "proposed"))
                    agent.tell("ALGORITHMS", 0, a=code, payload=payload, epoch=1)
                agent.until(lambda: bool(agent.of("READY", 0)) or rank.poll() is not None, "READY or an end")
                if rank.poll() is None:
                    agent.tell("COMMITTED", 0, a=stop)
                code = rank.wait(60)
                assert answer is not None or not agent.of("ALGORITHMS")
            finally:
                rank.kill()
        dumped = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".grads", ".weights")}
        return code, (folder / "stderr-0").read_text(), dumped


@pytest.fixture
def attempts(engine: Path, tmp_path: Path) -> Any:
    with slots(2) as fds:
        yield Attempts(engine, tmp_path, small_plan(tmp_path, steps=4, **STEADY), fds)


def test_a_resume_goes_by_what_the_run_has(attempts: Attempts) -> None:
    """Another rank was first: its choice is used, and the next attempt, which finds it, has the bits of one run."""
    mine: list[bytes] = []

    def first(table: Table) -> tuple[int, bytes]:
        mine.append(other_choice(table).to_bytes())
        return 0, mine[0]

    code, _, whole = attempts.run(-1, 4, answer=first)
    assert code == 0
    assert attempts.run(-1, 4, answer=lambda table: (0, table.to_bytes()))[2] != whole
    code, _, start = attempts.run(-1, 2, answer=lambda table: (0, mine[0]))
    assert code == 0
    one = Table.parse(mine[0], "the run's")
    foreign = Table(b"another device", one.library, one.capability, other_choice(one).entries).to_bytes()
    code, err, rest = attempts.run(2, 4, table=foreign + mine[0])
    assert code == 0, err
    assert start | rest == whole


def test_a_table_that_is_not_the_attempt_s_is_refused(attempts: Attempts) -> None:
    kept: list[Table] = []

    def keep(table: Table) -> tuple[int, bytes]:
        kept.append(table)
        return 0, table.to_bytes()

    assert attempts.run(-1, 1, answer=keep)[0] == 0
    digest = hashlib.sha256(kept[0].to_bytes()).digest()
    code, err, _ = attempts.run(-1, 1, table=other_choice(kept[0]).to_bytes(), digest=digest)
    assert code == 78
    assert "is not what attempt 1 names: somebody changed it; start the attempt again, which brings it anew" in err
    code, err, _ = attempts.run(-1, 1, digest=digest)
    assert code == 78
    assert "the run's algorithms cannot be opened" in err


def test_what_the_agent_cannot_keep_ends_the_rank_with_its_words(attempts: Attempts) -> None:
    code, err, _ = attempts.run(-1, 1, answer=lambda table: (78, b"the run's algorithms cannot be kept: no room"))
    assert code == 78
    assert "the run's algorithms cannot be kept: no room" in err


def test_a_product_that_the_answer_leaves_out_is_a_bug(attempts: Attempts) -> None:
    def short(table: Table) -> tuple[int, bytes]:
        some = dict(list(table.entries.items())[1:])
        return 0, Table(table.device, table.library, table.capability, some).to_bytes()

    code, err, _ = attempts.run(-1, 1, answer=short)
    assert code == 70
    assert "1 of 15 products were left out of the run's choice" in err
