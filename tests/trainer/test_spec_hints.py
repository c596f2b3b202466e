"""Specs that were meant well: keys by other programs' names, values with units, lines that are no TOML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.errors import SpecError
from trainer.spec import RunSpec, _paths, load_spec
from trainer.spec_hints import _BY_NAME, hint_of

SPEC = """\
name = "small"
[model]
family = "gpt2"
layers = 2
width = 32
heads = 2
context = 16
[data]
source = "text:c/*.txt"
[train]
steps = 3
batch = 4
microbatch = 2
sequence = 16
"""


def refusal(file: Path, text: str, *sets: str) -> str:
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(file, sets)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"text:c/*.txt"', r'"text:C:\data\*.txt"', "in double quotes a backslash begins an escape"),
        ('"text:c/*.txt"', r'"text:C:\Users\*.txt"', "put the text in single quotes"),
        ('"text:c/*.txt"', '"text:c/*.txt', "(at line 9, column 23): 'source = \"text:c/*.txt'; a text in quotes ends"),
        ("steps = 3", "steps: 3", "(at line 11, column 6): 'steps: 3'; a key and its value are joined by ="),
        ("steps = 3", "steps = 03", "does not begin with 0"),
        ("steps = 3", "steps = 3k", "a number stands alone, without a unit"),
        ("steps = 3", "steps = 3,", "nothing follows a value"),
        ("steps = 3", "steps = None", "leave the key out"),
        ('"gpt2"', "gpt2", "text stands in quotes"),
        ("heads = 2", "heads = 2\ntied = True", "true and false are written in lower case"),
        ("heads = 2", "heads = 2\nheads = 2\ntied = true", "a key has one value"),
        ("[train]", "[model]\n[train]", "a section stands once"),
        ("[train]", "[train", "a section's name ends with ]"),
        ("steps = 3", "steps\u00a0= 3", "U+00A0 (no-break space): write it with plain quotes and blanks"),
        ('"small"', "\u201csmall\u201d", "U+201C (left double quotation mark)"),
        ("[train]", "\u200b[train]", "U+200B (zero width space)"),
        ("[train]", "[train]\n\0", "U+0000 (a control character)"),
        ("[train]", "// how\n[train]", "a comment begins with #"),
        ("[model]\nfamily", "[model]\rfamily", "end in CR alone"),
        ('name = "small"', '{"name": "small"}', "that is JSON, and a spec is TOML"),
        ('name = "small"', '---\nname: "small"', "that begins YAML, and a spec is TOML"),
        ("steps = 3", "steps = 3,000", "thousands are written 1_000 or 1000"),
        ("steps = 3", "steps = 3\noptimizer = { lr = 1e-3, }", "no comma stands before the closing brace"),
        ("[model]\nfamily =", "model:\n  family:", "'model:'; a key and its value are joined by ="),
    ],
)
def test_a_line_that_is_no_toml_is_shown_with_its_mend(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in SPEC
    said = refusal(tmp_path / "s.toml", SPEC.replace(old, new, 1))
    assert words in said, said


def test_a_section_at_another_place_is_told_its_own(tmp_path: Path) -> None:
    said = refusal(tmp_path / "s.toml", f"{SPEC}[optimizer]\nlr = 1e-3\n[model.schedule]\nwarmup = 1\n")
    assert "optimizer is an unknown key; it belongs at train.optimizer (" in said
    assert "model.schedule is an unknown key; it belongs at train.schedule (" in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (SPEC.encode("utf-16"), "it is UTF-16, not text in UTF-8; save it as UTF-8; a spec is a TOML file"),
        ((SPEC + "# caf\u00e9\n").encode("latin-1"), "line 15 holds the byte 0xE9, which is no UTF-8"),
    ],
)
def test_a_file_that_is_no_utf8_says_what_it_is(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "s.toml").write_bytes(data)
    with pytest.raises(SpecError, match=words):
        load_spec(tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("train.learning_rate=1e-3", "here that is train.optimizer.lr"),
        ("model.n_layer=3", "here that is model.layers"),
        ("train.seq-len=8", "here that is train.sequence"),
        ("train.dropout=0.1", "trains without dropout: leave it out"),
        ("parallel.tp=2", "runs stages and replicas"),
        ("TRAIN.STEPS=3", "did you mean train.steps"),
        ("checkpoint.deadline_s=10m", "'10m' is not a number; write a number of seconds"),
        ("launch.memory_gib=16GB", "write a number of GiB"),
        ("train.steps=1e3", "1000.0 is not a whole number; write 1000"),
        ("train.batch='4'", "write 4, without quotes"),
        ("train.batch=04", "write 4, without quotes"),
        ("train.batch=1e300", "write a whole number"),
        ("train.batch=1_0k", "write a whole number"),
        ("train.batch='1_000'", "write 1000"),
        ("train.batch=1,000", "write 1000"),
        ("train.batch=1,00", "write a whole number"),
        ("train.batch='1e3'", "write 1000"),
        ("train.batch=4k", "write it without a unit: 4000 (or 4096)"),
        ("train.batch=1.5K", "without a unit: 1500 (or 1536)"),
        ("train.steps=1B", "without a unit: 1000000000"),
        ("checkpoint.every=10m", "write a whole number"),
        ("train.optimizer.lr=0.1%", "write 0.001"),
        ("train.optimizer.lr=0,001", "write 0.001"),
        ("train.schedule.warmup=10%", "write a whole number"),
        ("train.warmup_ratio=0.1", "here that is train.schedule.warmup, a number of steps"),
        ("train.betas=[0.9,0.95]", "here that is train.optimizer.beta1 and train.optimizer.beta2"),
        ("train.eval_steps=5", "here that is validation.every"),
        ("train.max_tokens=1000", "here that is train.steps, each of train.batch * train.sequence tokens"),
        ("train.fp16=true", 'here that is train.precision = "bf16"'),
        ("eval.command=echo", "eval has no keys: it is set whole, or as a table [[eval]] of the file"),
        ("recovery.layouts.stages=1", "recovery.layouts has no keys"),
        ("checkpoint.keep=3", "it is one table, [checkpoint.keep], with some of last, every_steps"),
        ("parallel.recompute=true", "[parallel.recompute], with some of kind, layers"),
        ("model.family=Llama", "take one of gpt2, llama, mistral, qwen3: write 'llama'"),
        ("model.family=GPT2LMHeadModel", ": write 'gpt2'"),
        ("model.rope_base=5e5", "rope_base 500000: gpt2 learns its positions"),
        ("launch.target=k8s", ": write 'kubernetes'"),
        ("parallel.schedule=1F1B", ": write '1f1b'"),
        ("train.schedule.kind=warmup_stable_decay", ": write 'wsd'"),
        ("train.precision=bfloat16", "'bf16' or 'fp8': write 'bf16'"),
        ("train.precision=float16", ": write 'bf16'"),
        ("train.precision=bf16-mixed", ": write 'bf16'"),
        ("train.optimizer.name=AdamW", "'adamw' or 'muon': write 'adamw'"),
        ("launch.host=''", "launch.host is empty"),
        ("launch.host=localhost", "launch.host 'localhost' is no address, and ranks do not listen on a name: write"),
        ("launch.queue='" + "q" * 64 + "'", "launch.queue has 64 characters, at most 63; shorten it"),
    ],
)
def test_a_key_or_value_of_elsewhere_is_told_as_it_is_here(tmp_path: Path, asked: str, words: str) -> None:
    said = refusal(tmp_path / "s.toml", SPEC, asked)
    assert words in said, said
    key, _, value = asked.partition("=")
    if "." in key and words.startswith(("here", "trains")):  # the same in the file
        section, _, name = key.partition(".")
        text = SPEC.replace(f"[{section}]", f'[{section}]\n"{name}" = {value}')
        assert words in refusal(tmp_path / "s.toml", text)


def test_what_a_hint_names_is_a_key() -> None:
    keys = {".".join(path[:n]) for path in _paths(RunSpec) for n in (1, 2, 3)}
    named = re.findall(r"\b(?:model|data|train|parallel|checkpoint)\.[a-z_.0-9]+", " ".join(_BY_NAME.values()))
    assert len(named) > 30
    assert not {name.rstrip(".") for name in named} - keys
    assert not {name for names in _BY_NAME for name in names.split() if hint_of(name) is None}
