"""docs/add-a-model.md, followed: the code on the page is the family that trains and agrees with transformers."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.e2e.golden_runs import assert_agrees, spec_of, train_golden
from tests.reference.golden import Golden
from trainer import models
from trainer.dataset import DatasetRef
from trainer.plan.compile import compile_plan
from trainer.spec import parse_spec, what_digest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-model.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def family_from_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's file, from a folder of its own, in the place of the project's."""
    file, name = tmp_path / "qwen3.py", "trainer.models.qwen3"
    file.write_text(block("python"))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return str(file)


def test_the_page_s_code_is_the_project_s() -> None:
    assert block("python") == (ROOT / "trainer" / "models" / "qwen3.py").read_text()


def test_it_is_under_100_lines_and_needs_no_c() -> None:
    assert len(block("python").splitlines()) < 100
    assert "```c\n" not in PAGE


def test_the_page_s_family_trains_like_transformers(family_from_the_page: str, tmp_path: Path) -> None:
    family = models.family("qwen3")
    assert sys.modules[type(family).__module__].__file__ == family_from_the_page
    golden = Golden("qwen3-tied")
    spec = spec_of(golden, stages=2)
    assert_agrees(golden, train_golden(golden, spec, tmp_path), spec.model)


def test_the_page_s_spec_compiles(family_from_the_page: str) -> None:
    dataset = DatasetRef("0" * 64, 1000, 2, (100_000,), "0" * 64)
    spec = parse_spec(tomllib.loads(block("toml"))).resolve(dataset)
    plan = compile_plan(spec, dataset, what_digest(spec, dataset))
    assert {t.name for t in plan.tensors if "_norm.weight" in t.name and "self_attn" in t.name} == {
        f"model.layers.{n}.self_attn.{which}_norm.weight" for n in range(8) for which in "qk"
    }


def test_what_the_page_says_of_hugging_face_holds() -> None:
    family, golden = models.family("qwen3"), Golden("qwen3-tied")
    model = family.from_hf_config(golden.hf_config)
    again = family.to_hf_config(model)
    for key, value in again.items():
        if key in golden.hf_config and key not in ("architectures", "max_window_layers"):
            assert golden.hf_config[key] == value, key
    assert family.from_hf_config(again) == model


def test_every_builder_method_that_the_page_names_is_there() -> None:
    from trainer.models.base import Builder

    for name in re.findall(r"`(\w+)\(", PAGE[PAGE.index("| Builder method") : PAGE.index("A family that needs")]):
        assert callable(getattr(Builder, name)), name
