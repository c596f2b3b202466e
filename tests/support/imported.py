"""Golden folders of other programs (tests/golden/make_import.py), imported by the command, each once a module.

They are of odd sizes: heads that are not key/value heads, head sizes that are not width / heads, vocabularies with more
rows than the tokenizer has tokens; float32, bfloat16 and float16, in one file and in several.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint.store import open_store
from tests.reference.golden import FOLDER
from tests.support.calls import called
from trainer.spec import RunSpec, load_spec, parse_spec

IMPORT = FOLDER / "import"
OPTIMIZER = ("lr", "eps", "weight_decay", "clip")


class Case:
    """A golden folder that was imported by the command, once."""

    def __init__(self, name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.work = IMPORT / name, folder / name
        self.work.mkdir()
        (self.work / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
        patch.chdir(self.work)
        self.url = f"file://{folder}/store"
        arguments = [
            "import",
            str(self.folder),
            "--data",
            f"text:{self.work}/a.txt",
            "--store",
            self.url,
            "--name",
            name,
        ]
        code, said = called([*arguments, "--json"])
        assert code == 0, said
        self.arguments, self.told = arguments, json.loads(said)
        self.spec = load_spec(self.work / self.told["spec"])
        self.store = open_store(self.url)
        self.run = str(self.told["run"])
        self.numbers = json.loads((self.folder / "numbers.json").read_text())
        arrays = load_file(self.folder / "numbers.safetensors")
        self.tokens, self.logits = np.asarray(arrays["tokens"]), np.asarray(arrays["logits"])

    def training(self, **more: Any) -> RunSpec:
        """The spec of the golden numbers: torch's batches, in order."""
        o, sequence = self.numbers["optimizer"], self.numbers["sequence"]
        tree = self.spec.model_dump(mode="json", exclude_none=True)
        tree["train"] = {
            "steps": len(self.numbers["steps"]),
            "batch": self.numbers["batch"],
            "microbatch": 1,
            "sequence": sequence,
            "classifier_chunk": 16,
            "optimizer": {"beta1": o["betas"][0], "beta2": o["betas"][1], **{k: o[k] for k in OPTIMIZER}},
            "schedule": {"kind": "constant"},
        }
        tree["data"] = {**more.pop("data", tree["data"]), "shuffled": False}
        return parse_spec({**tree, "checkpoint": {"every": 0}, "parallel": {"threads": 1}, **more})

    def losses(self) -> list[float]:
        return [step["loss"] for step in self.numbers["steps"]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder, made = tmp_path_factory.mktemp("imported"), dict[str, Case]()

    def case(name: str) -> Case:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                made[name] = Case(name, folder, patch)
        return made[name]

    return case


Imported = Callable[[str], Case]
