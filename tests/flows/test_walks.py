"""The two walks of ARCHITECTURE.md, followed in a real run: their stations in their order, and no room twice."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import Api
from tests.support.place import LEARNT, ROOT, Place, finish
from tests.support.wait import wait_for
from tests.test_layering import ROOMS

WALKER = ROOT / "tests" / "support" / "walker"
SPEC, LOSS = "A spec, from", "A loss, from"
RANK = re.compile(r"hotstage-engine rank --plan \S*plan-([0-9a-f]{64}) --attempt \S+ --rank \d+ ")


@dataclass(frozen=True)
class Station:
    """A line of a walk. ``takes`` and ``gives``: names of types; none of a function of C."""

    path: str
    function: str
    takes: tuple[str, ...] = ()
    gives: str = ""


def walk(text: str, name: str) -> list[Station]:
    """The stations of the walk whose paragraph begins with ``name``."""
    lines = text.partition(f"\n{name}")[2].partition("```\n")[2].partition("```")[0].splitlines()
    found = []
    for line in lines:
        path, function, *rest = re.split(r" {2,}", line)
        typed = path.endswith(".py")
        takes, _, gives = rest[0].partition("->") if typed else ("", "", "")
        found.append(Station(path, function, tuple(re.findall(r"\w+", takes)), gives.strip()))
    return found


def rooms_twice(stations: list[Station]) -> list[str | None]:
    """Rooms that a walk comes back to after it has left them."""
    rooms = [ROOMS.of(station.path) for station in stations]
    passed = [room for n, room in enumerate(rooms) if n == 0 or room != rooms[n - 1]]
    return sorted({room for room in passed if passed.count(room) > 1}, key=str)


TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
WALKS = {name: walk(TEXT, name) for name in (SPEC, LOSS)}


def names_in(annotation: ast.expr | None) -> set[str]:
    return set(re.findall(r"\w+", ast.unparse(annotation))) if annotation is not None else set()


def function_of(station: Station) -> ast.FunctionDef:
    body: list[Any] = ast.parse((ROOT / station.path).read_text(encoding="utf-8")).body
    for name in station.function.split("."):
        (node,) = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_is_in_no_room_twice(name: str) -> None:
    stations = WALKS[name]
    assert 7 <= len(stations) <= 10
    assert not rooms_twice(stations)
    back = [*stations, stations[1]]
    assert rooms_twice(back) == [ROOMS.of(stations[1].path)]


@pytest.mark.parametrize("station", [s for stations in WALKS.values() for s in stations], ids=lambda s: s.function)
def test_a_station_takes_and_gives_what_is_drawn(station: Station) -> None:
    if not station.path.endswith(".py"):
        text = (ROOT / station.path).read_text(encoding="utf-8")
        assert re.search(rf"^\w[\w *]*\b{station.function}\(", text, re.MULTILINE)
        return
    function = function_of(station)
    given = function.args
    takes = {name for argument in (*given.args, *given.kwonlyargs) for name in names_in(argument.annotation)}
    assert set(station.takes) <= takes or "Any" in takes
    assert not station.gives or {station.gives, "Any"} & names_in(function.returns)


def test_a_real_run_walks_so(prefect: Api, hosted: Place, tmp_path: Path) -> None:
    """Every call of the stations, in the command and in the agent that it starts, and the command line of a rank."""
    out = tmp_path / "walk"
    python = [station for stations in WALKS.values() for station in stations if station.path.endswith(".py")]
    hosted.env |= {
        "PYTHONPATH": f"{WALKER}:{ROOT}",
        "WALK_STATIONS": json.dumps([[station.path, station.function] for station in python]),
        "WALK_OUT": str(out),
    }
    (hosted.folder / "spec.toml").write_text(LEARNT)  # what its first steps say is read while it trains
    command = hosted.command("train", "spec.toml", "--set", "train.steps=120", "--set", "train.microbatch=1")
    process = subprocess.Popen(
        command, cwd=hosted.folder, env=hosted.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    ranks = wait_for(lambda: [RANK.search(line) for line in hosted.left().values() if RANK.search(line)], "a rank", 60)
    done = finish(process)
    assert done.code == 0, done.out + done.err
    calls = [json.loads(line) for line in out.read_text().splitlines()]

    followed = [first(calls, station) for station in WALKS[SPEC] if station in python]
    assert_in_order(followed)
    digest = next(call for call in followed if call["station"] == "fetch_plan")["text"]
    assert ranks[0] is not None
    assert ranks[0][1] in digest

    begun = next(c for c in calls if c["station"] == "Hints.metrics" and '"step":1,' in c["text"])
    loss = re.search(r'"loss":([0-9.]+)', begun["text"])
    assert loss is not None
    spelled = (loss[1], f"{float(loss[1]):.4f}")
    carrying = [call for call in calls if any(text in call["text"] for text in spelled)]
    assert_in_order([first(carrying, station) for station in WALKS[LOSS] if station in python])


def first(calls: list[dict[str, Any]], station: Station) -> dict[str, Any]:
    """The first call of a station as it is drawn, and when it was passed: where it gives something, when it had."""
    kinds = {"Mapping": "dict"}
    takes, gives = {kinds.get(name, name) for name in station.takes}, kinds.get(station.gives, station.gives)
    drawn = [
        call
        for call in calls
        if call["station"] == station.function and takes <= set(call["takes"]) and gives in ("", call["gives"])
    ]
    assert drawn, f"{station} is not passed"
    call = min(drawn, key=lambda call: call["called"])
    return {**call, "passed": call["returned"] if gives else call["called"]}


def assert_in_order(followed: list[dict[str, Any]]) -> None:
    assert [call["station"] for call in sorted(followed, key=lambda call: call["passed"])] == [
        call["station"] for call in followed
    ]
