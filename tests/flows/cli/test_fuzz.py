"""The command line and the spec with random values: always a message and an exit code of the table, never a traceback.

In this process, through click, with the commands' real code up to where they would train, serve or wait: the store, the
data, the plan and the log are real. ``HOTSTAGE_FUZZ_SEED`` and ``HOTSTAGE_FUZZ_CALLS`` change what is drawn; a failure
prints the seed and the call.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from checkpoint.doctor import Effort
from flows.cli import watch
from flows.cli.main import cli
from flows.drive.run import NoBoard, Prepared
from flows.recurring.sweep import pointed_specs
from tests.flows.conftest import Trained
from tests.support.calls import called
from tests.support.place import SPEC, TEXT
from trainer.dataset import DatasetRef
from trainer.errors import LaunchError, SpecError
from trainer.spec import RunSpec, _paths, how_map, parse_spec
from trainer.wire import EXITS
from trainer.wire.packed import RECORD_DEPTH, pack

SEED = int(os.environ.get("HOTSTAGE_FUZZ_SEED", "8"))
LOG = os.environ.get("HOTSTAGE_FUZZ_LOG")  # each call before it is made, for one that never returns
CALLS = int(os.environ.get("HOTSTAGE_FUZZ_CALLS", "1000"))
ALLOWED = (set(EXITS) - {70}) | {1, 2, 66, 130}

WORDS = [
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "2",
        "7",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "0x10",
        "1_0",
        "٣",
        "½",
    ),
    *(
        "true",
        "null",
        "None",
        "[]",
        "{}",
        "a=b",
        "=",
        "a.b.c",
        "..",
        "/",
        "~",
        "~nobody/x",
        "%41",
        "%zz",
        "#",
        "?",
        "*",
        "[",
    ),
    *(
        "é",
        "字",
        "\U0001f600",
        "\u202e",
        "\x1b[31m",
        "a\nb",
        "\t",
        "a\0b",
        "\udce9",
        "x" * 300,
        "x" * 5000,
        "'",
        '"',
        "\\",
    ),
    *(
        "2147483647",
        "2147483648",
        "9223372036854775808",
        "1" + "0" * 30,
        "9" * 5000,
        "1.5",
        "-0.0",
        "1e-9",
        ";",
        "$(x)",
    ),
]
NUMBERS: list[Any] = [
    *(
        -1,
        0,
        1,
        2,
        3,
        5,
        16,
        31,
        2**31 - 1,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        16**5000,
        0.0,
        0.5,
        1.5,
        1e-300,
        1e300,
    ),
    *(16**5000, math.nan, math.inf, -math.inf, True, False),
]
DATASET = DatasetRef("0" * 64, 300, 2, (100_000,), "0" * 64)
STRUCTURES: list[Any] = [
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
    {"a": {"b": [1, {"c": "d"}]}},
    {"": ""},
    {"a": "x" * 3000},
    {"a": 16**5000},
]


def values(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of a spec with their values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= values(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return out


class Dice:
    """What is drawn, from one seed."""

    def __init__(self, seed: int, folder: Path, runs: list[str]) -> None:
        self.dice = random.Random(seed)
        self.folder, self.runs = folder, runs
        self.now = values(parse_spec(tomllib.loads(SPEC)).model_dump(mode="json"))
        self.keys = [".".join(path) for path in _paths(RunSpec)]

    def value(self) -> Any:
        """A value of a spec's key: often of the right type, seldom a right one."""
        pool = self.dice.choice(
            [NUMBERS, NUMBERS, WORDS, STRUCTURES, ["gpt2", "llama", "qwen3", "bf16", "gpipe", "wsd"]]
        )
        return self.dice.choice(pool)

    def key(self) -> str:
        return self.dice.choice([key for key in self.keys if self.dice.random() < 0.8 or key.startswith("data.")])

    def of_key(self, key: str) -> Any:
        if self.dice.random() < 0.3:  # the type of today, or the value itself
            return self.dice.choice([self.now.get(key), self.now.get(key), *NUMBERS[:6], *WORDS[:9]])
        if key == "data.source" and self.dice.random() < 0.8:
            return self.dice.choice(
                [f"{k}:{p}" for k in ("text", "jsonl", "csv") for p in self.patterns()] + ["dataset:" + "0" * 64]
            )
        if key == "data.tokenizer" and self.dice.random() < 0.8:
            return self.dice.choice(self.patterns())
        return self.value()

    def patterns(self) -> list[str]:
        return ["corpus/*.txt", "corpus", "corpus/", "none/*", "[x]", "a\0b", "corpus/../spec.toml", "~", ".", "binary",
                "corpus/a.txt", "lines.jsonl", "t.json", "/dev/null", "/dev/full", "x" * 5000, "\udce9"]  # fmt: skip

    def spec(self) -> str:
        if self.dice.random() < 0.1:
            return self.dice.choice(
                ["none.toml", "corpus", "binary", "", "a\0b", "/dev/null", "/", "\udce9.toml", "x" * 300]
            )
        if self.dice.random() < 0.5:
            return "spec.toml"
        lines = [self.key() for _ in range(self.dice.choice([1, 1, 2]))]
        (self.folder / "drawn.toml").write_text(drawn(SPEC, {key: self.of_key(key) for key in lines}), errors="replace")
        return "drawn.toml"

    def set(self) -> str:
        if self.dice.random() < 0.1:
            return str(self.dice.choice(WORDS))
        key = self.key()
        key = (
            key
            if self.dice.random() < 0.9
            else self.dice.choice([key + ".x", key.partition(".")[2], key.upper(), "." + key])
        )
        value = self.of_key(key)
        return f"{key}={value if isinstance(value, str) and self.dice.random() < 0.5 else toml(value)}"

    def path(self) -> str:
        return str(self.dice.choice(
            ["made/x", "made", "corpus", "spec.toml", "spec.toml/x", "", "a\0b", "/proc/none/x", "/dev/full", "\udce9",
             "x" * 300, "a\nb", "~"]))  # fmt: skip

    def store(self) -> str:
        return str(self.dice.choice(
            [*["store"] * 30, "empty", "spec.toml", "spec.toml/x", "", "/", "a\0b", "file:///", "file:///%zz",
             "s3://", "s3://b", "s3://bucket/p", "s3://u:p@bucket/p", "s3://bucket/p?endpoint=x", "s3://[x", "memory:",
             "memory:x", "ftp://x", "file://host/x", "\udce9", "x" * 300, *WORDS[:9]]))  # fmt: skip

    def run(self) -> str:
        if self.dice.random() < 0.7:
            return self.dice.choice(self.runs)
        return str(self.dice.choice([*(run[:4] for run in self.runs), *WORDS]))

    def argument(self, parameter: click.Parameter) -> str:
        named: dict[str, Callable[[], str]] = {
            "store": self.store, "spec": self.spec, "run": self.run, "sets": self.set, "out": self.path,
            "config": self.path,
        }  # fmt: skip
        if parameter.name in named and self.dice.random() < 0.95:
            return named[parameter.name]()
        if isinstance(parameter.type, click.Path):
            return self.path()
        if isinstance(parameter.type, click.Choice) and self.dice.random() < 0.7:
            return str(self.dice.choice(list(parameter.type.choices)))
        if parameter.name == "cron" and self.dice.random() < 0.5:
            return " ".join(self.dice.choice(["*", "0", "31", "2", "*/5", "60", "L"]) for _ in range(5))
        if parameter.name == "tokens":
            return str(self.dice.choice([1, 2, *WORDS[:12]]))  # a large number is a long text
        return str(self.dice.choice([*WORDS, *map(toml, NUMBERS)]))

    def call(self) -> list[str]:
        """A command with random options."""
        words, command = self.dice.choice(COMMANDS)
        out = list(words)
        for parameter in command.params:
            must = isinstance(parameter, click.Argument) or parameter.required
            if not must and self.dice.random() < 0.7:
                continue
            for _ in range(self.dice.choice([1, 1, 2]) if parameter.multiple else 1):
                if isinstance(parameter, click.Option):
                    out.append(parameter.opts[0])
                    if parameter.is_flag or parameter.count:
                        continue
                out.append(self.argument(parameter))
        if self.dice.random() < 0.02:
            out.append(str(self.dice.choice(WORDS)))
        return [word.replace("\0", "") for word in out]  # no command line holds one; a spec's file may


def commands() -> Iterator[tuple[list[str], click.Command]]:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from (([name, inner], below) for inner, below in command.commands.items())
        else:
            yield [name], command


COMMANDS = sorted(commands(), key=lambda item: item[0])
DEEP = (["train"], ["data", "prepare"], ["plan"], ["k8s", "render"], ["runs", "fork"], ["runs", "resume"])
COMMANDS += [item for item in COMMANDS if item[0] in DEEP] * 8  # that is where the spec's keys are


def toml(value: Any) -> str:
    """A value as TOML, as well as it can be."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return hex(value) if isinstance(value, int) and value.bit_length() > 1000 else repr(value)


def drawn(base: str, changes: dict[str, Any]) -> str:
    """The base spec with some keys changed."""
    tree = tomllib.loads(base)
    for key, value in changes.items():
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = value
    return "\n".join(f"{key} = {toml(value)}" for key, value in tree.items())


@pytest.fixture
def place(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder with a corpus, a spec and a store with a run that has ended; nothing trains, serves or waits."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("PREFECT", "AWS", "KUBE", "HOTSTAGE")):
            monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "HOTSTAGE_STORE": str(tmp_path / "store"), "KUBECONFIG": "/none",
                        "AWS_EC2_METADATA_DISABLED": "true", "XDG_DATA_HOME": str(tmp_path)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT[:4000])
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "lines.jsonl").write_text('{"text": "' + TEXT[:1000] + '"}\n{"text": 7}\n')
    (tmp_path / "t.json").write_text('{"model": {"type": "BPE", "vocab": {"q": 0}, "merges": []}}')
    shutil.copytree(trained.place.folder / "store", tmp_path / "store")

    def host(make: Callable[..., Prepared], *_: object, **__: object) -> int:
        make(NoBoard(), lambda _: None)
        return 0

    sleep = time.sleep

    def wait(seconds: float) -> None:
        """Ctrl-C of the command; threads that an earlier test has left behind sleep on."""
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        sleep(seconds)

    def start(*_: object, **__: object) -> None:
        raise LaunchError("no process is started here")

    monkeypatch.setattr("flows.cli.train.host", host)
    monkeypatch.setattr("trainer.local_launch.LocalLauncher._ensure_node", start)  # of `replay`
    monkeypatch.setattr("flows.flow.prepare_flow", start)  # of `data prepare --dask`: servers of Prefect and Dask
    monkeypatch.setattr("flows.demo.demo", lambda *_, **__: SimpleNamespace())
    little = Effort(data_bytes=1 << 16, races=((1, 2, 8),), objects=2, small=1)
    monkeypatch.setattr("checkpoint.doctor.Effort", lambda **_: little)  # of `ckpt doctor --mb`
    monkeypatch.setattr("flows.cli.runs.time.sleep", wait)
    monkeypatch.setattr("flows.cli.schedule.serve_until_signal", lambda *_, **__: None)
    monkeypatch.setattr("flows.sweeping.drive_sweep", lambda spec, points, *_, **__: pointed_specs(spec, points)[:0])
    real = watch._watch  # `runs watch --all` goes on until Ctrl-C: one look is enough here
    monkeypatch.setattr(
        watch, "_watch", lambda board, stop, *rest, **more: (stop.set(), real(board, stop, *rest, **more))
    )
    monkeypatch.setattr("flows.care.Care.run", lambda *_, **__: None)
    return tmp_path, [trained.run]


@pytest.mark.parametrize(("calls", "seed"), [(CALLS, SEED), pytest.param(4000, SEED + 1, marks=pytest.mark.slow)])
def test_no_call_ends_in_a_bug(calls: int, seed: int, place: tuple[Path, list[str]]) -> None:
    folder, runs = place
    dice = Dice(seed, folder, runs)
    codes: dict[int, int] = {}
    slow: list[tuple[float, list[str]]] = []
    wrong = []
    print(f"HOTSTAGE_FUZZ_SEED={seed}")
    for number in range(calls):
        arguments = dice.call()
        (folder / "spec.toml").write_text(SPEC)  # a call may have written its output there
        begin = time.perf_counter()
        code, said = called(arguments)
        if LOG:
            with open(LOG, "a") as log:
                log.write(f"{arguments!a} {code} {said[:200]!a}\n")
        slow.append((time.perf_counter() - begin, arguments))
        codes[code] = codes.get(code, 0) + 1
        if code not in ALLOWED | {0} or "Traceback" in said or (code and not said.strip()):
            spec = (folder / "drawn.toml").read_text() if "drawn.toml" in arguments else ""
            wrong.append(f"call {number}: {arguments!r}: exit {code}\n{spec}\n{said[-1500:]}")
            if len(wrong) == 20:
                break
    print(dict(sorted(codes.items())), *(f"{s:.2f} {a!r}"[:200] for s, a in sorted(slow)[-5:]), sep="\n")
    assert not wrong, "\n\n".join(wrong)
    assert set(codes) >= {0, 2, 78} or calls < 500


@pytest.mark.parametrize("section", ["", *(name for name in RunSpec.model_fields if name not in ("name", "eval"))])
def test_every_key_takes_or_refuses_every_value(section: str, tmp_path: Path) -> None:
    """Each value at each key: a refusal of few lines that names the key, or a spec whose both halves can be written."""
    refused, taken = [], 0
    base = tomllib.loads(SPEC)
    for path in _paths(RunSpec):
        if (path[0] if len(path) > 1 else "") != section:
            continue
        key = ".".join(path)
        for value in [*NUMBERS, *WORDS, *STRUCTURES]:
            tree = json.loads(json.dumps(base))
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
            try:
                spec = parse_spec(tree)
                pack(how_map(spec), RECORD_DEPTH)
                pack(spec.model_dump(mode="json"), RECORD_DEPTH)
                spec.resolve(DATASET)
                taken += 1
            except SpecError as error:
                refused.append((key, value, str(error)))
    assert taken
    assert refused
    for key, value, text in refused:
        assert key.rpartition(".")[2] in text or key.partition(".")[0] in text, (key, value, text)
        assert 0 < len(text) < 700, (key, value, text)


def test_every_key_takes_what_its_schema_says() -> None:
    """The generator draws from the keys that the spec has, and its base is a good spec."""
    keys = [".".join(path) for path in _paths(RunSpec)]
    assert len(keys) > 60
    base = parse_spec(tomllib.loads(SPEC))
    assert parse_spec(tomllib.loads(drawn(SPEC, {"train.steps": 9}))) == parse_spec(
        base.model_dump(mode="json"), ["train.steps=9"]
    )
