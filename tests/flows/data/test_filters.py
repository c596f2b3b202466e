"""Which documents stay: filters, duplicates, and those that are held back for validation."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.store import open_store
from flows.data import prepare, validation_of
from tests.flows.data.test_pieces import decoded, never
from tests.flows.data.test_sources import TEXTS, lines, spec_of
from tests.support.place import Place
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec


def test_a_filter_chooses_by_length_language_and_predicate(here: Path, small: Callable[[int], None]) -> None:
    tags = ["en", "en-GB", "EN_us", "eng", "de", None, "", 7]
    rows = [{"text": f"{'x' * (20 + n)} {n}", "lang": tags[n % 8], "n": n} for n in range(64)]
    Path("c/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rules.py").write_text("def even(document):\n    return document.fields['n'] % 2 == 0\n")
    stay = [r for r in rows if 30 <= len(r["text"]) <= 70 and r["lang"] in tags[:3] and r["n"] % 2 == 0]  # type: ignore[arg-type,operator]
    Path("c/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stay))
    rule = {"min_length": 30, "max_length": 70, "language": ["en"], "language_field": "lang", "predicate": "rules:even"}
    want = prepare(spec_of("jsonl:c/b.jsonl"), open_store("memory:"))
    for size in (1 << 20, 300):
        small(size)
        said: list[str] = []
        got = prepare(spec_of("jsonl:c/a.jsonl", filter=rule), open_store("memory:"), say=said.append, clock=never)
        assert got == want
        assert f"leaves {len(stay)} of 64 documents" in said[0]
        assert "without a language tag" in said[0]
    sys.modules.pop("rules", None)


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ({"min_length": 900}, DatasetError, "leaves no text of .*: 30 documents, of them 30 too short; loosen it"),
        ({"language": ["en"]}, DatasetError, "30 without a language tag; loosen it"),
        ({"predicate": "rules_x:none"}, SpecError, "rules_x has no 'none'; it has answers, leaves, raises, refuses"),
        ({"predicate": "rules_y:f"}, SpecError, "there is no module 'rules_y'"),
        ({"predicate": "rules_z:f"}, SpecError, "importing 'rules_z' raised SyntaxError"),
        ({"predicate": "rules_w:f"}, SpecError, "importing 'rules_w' raised SystemExit: 3"),
        ({"predicate": "rules_x:leaves"}, DatasetError, r"raised SystemExit for c/a.jsonl:1: 4 \(line 5 of it\)"),
        ({"predicate": "rules_x:VALUE"}, SpecError, "is int, nothing to call"),
        ({"predicate": "rules_x:raises"}, DatasetError, r"raised KeyError for c/a.jsonl:1: 'x' \(line 2 of it\)"),
        ({"predicate": "rules_x:answers"}, DatasetError, "answered NoneType for c/a.jsonl:1; it must answer True"),
        ({"predicate": "rules_x:refuses"}, DatasetError, "30 refused by the predicate; loosen it"),
    ],
)
def test_a_filter_that_cannot_be(
    here: Path,
    rule: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    Path("c/a.jsonl").write_bytes(lines(TEXTS))
    Path("rules_x.py").write_text(
        "def raises(document):\n    return document.fields['x']\ndef answers(document): ...\n"
        "def leaves(document):\n    raise SystemExit(4)\n"
        "def refuses(document):\n    return False\nVALUE = 7\n"
    )
    Path("rules_w.py").write_text("import sys\nsys.exit(3)\n")
    Path("rules_z.py").write_text("def f(:\n")
    try:
        with pytest.raises(error, match=words):
            prepare(spec_of("jsonl:c/a.jsonl", filter=rule), open_store("memory:"))
    finally:
        sys.modules.pop("rules_x", None)
        sys.path.remove(str(here)) if str(here) in sys.path else None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"filter": {"min_length": 9, "max_length": 3}}, "max_length 3 is below min_length 9"),
        ({"filter": {"predicate": "rules"}}, "is no import path; write package.module:function"),
        ({"source": "text:*", "filter": {"language": ["en"]}}, "plain text has none"),
        ({"source": "dataset:" + "0" * 64, "dedupe": {}}, "dedupe is for a corpus that is prepared"),
        ({"source": "parquet:"}, "is unknown; take"),
        ({"source": "csv:a"}, "is unknown; csv is not read, so write its texts as JSON lines first"),
        ({"validation": 0.9}, "less than or equal to 0.5"),
        ({"dedupe": {"near": 0.2}}, "greater than or equal to 0.5"),
    ],
)
def test_keys_that_contradict_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataSpec.model_validate(data)


def test_the_command_exits_with_what_is_wrong(place: Place) -> None:
    (place.folder / "corpus" / "a.jsonl").write_bytes(lines(TEXTS))
    (place.folder / "corpus" / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-5])
    source = "data.source='jsonl:corpus/a.jsonl'"
    for code, words, *sets in (
        (65, "it was cut short", "data.source='jsonl:corpus/*.jsonl*'"),
        (78, "there is no module 'none'", source, "data.filter.predicate='none:f'"),
        (65, "loosen it", source, "data.filter.min_length=5000"),
        (78, "model.vocab 100 is smaller than the vocabulary of", source, "model.vocab=100"),
        (0, "dataset", source, "data.filter.min_length=50", "data.dedupe.exact=true", "data.validation=0.3"),
    ):
        done = place.here("data", "prepare", "spec.toml", *(word for s in sets for word in ("--set", s)))
        assert done.code == code, done.err
        assert words in done.err + done.out
        assert "Traceback" not in done.err


# --- duplicates ---------------------------------------------------------------------------------------------


def phrases_of(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def test_duplicates_are_those_that_a_slow_search_finds(
    here: Path,
    small: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exact ones by comparing all; near ones by the true Jaccard index of all pairs: all above 0.9 are joined, none of
    those that stay is, and nothing goes that has none above 0.65 to a document before it."""
    dice = random.Random(4)
    words = ["".join(dice.choices("abcdefgh", k=dice.randrange(2, 9))) for _ in range(900)]
    docs: list[str] = []
    for number in range(220):
        kind = dice.random()
        if docs and kind < 0.15:
            docs.append(dice.choice(docs))
        elif docs and kind < 0.6:
            base = dice.choice(docs).split(" ")
            for _ in range(dice.choice([1, 1, 2, 4, 9, 20])):
                base[dice.randrange(len(base))] = dice.choice(words)
            docs.append(" ".join(base))
        else:
            docs.append(" ".join([str(number), *dice.choices(words, k=160)]))
    docs += ["", "", "?!", "?!", "one two", "one two three"]
    Path("c/a.jsonl").write_bytes(lines(docs))
    exact = list(dict.fromkeys(docs))
    assert len(exact) < len(docs) - 20

    def kept(near: float | None, size: int) -> list[str]:
        small(size)
        store = open_store("memory:")
        spec = spec_of("jsonl:c/a.jsonl", dedupe={"near": near}, vocab_size=2000)
        made = prepare(spec, store, clock=never)
        return decoded(store, made)

    monkeypatch.setattr("flows.data.duplicates._SORTED", 64)
    assert kept(None, 5000) == exact
    left = kept(0.8, 1 << 20)
    assert left == kept(0.8, 5000)
    assert set(left) < set(exact)
    known = {text: phrases_of(text) for text in exact}

    def alike(one: str, other: str) -> float:
        return len(known[one] & known[other]) / len(known[one] | known[other])

    gone = [text for text in exact if text not in set(left)]
    assert len(gone) > 20
    for text in gone:
        assert max(alike(text, before) for before in exact[: exact.index(text)]) > 0.65
    for number, text in enumerate(left):
        if text.split():
            assert all(alike(text, before) < 0.9 for before in left[:number] if before.split())


def test_a_signature_is_what_it_was() -> None:
    """Of November 2026: datasets whose near duplicates were left out stay what they are."""
    from flows.data.near import bands, signature

    made = signature("the quick brown fox jumps over the lazy dog and runs into the dark wood")
    assert made is not None
    assert (made[:4].tolist(), bands(0.8)) == ([137905809, 310832666, 660828224, 64184630], (21, 6))


def test_validation_has_no_text_of_the_training(here: Path) -> None:
    """The same text is on one side, wherever and how often it stands."""
    Path("c/a.jsonl").write_bytes(lines(TEXTS + TEXTS[::-1]))
    Path("c/b.jsonl").write_bytes(lines([*TEXTS[:15], "another one"]))
    store, sides = open_store("memory:"), []
    for source in ("jsonl:c/a.jsonl", "jsonl:c/b.jsonl"):
        train = prepare(spec_of(source, validation=0.3), store)
        held = validation_of(store, train)
        assert held is not None
        sides.append((set(decoded(store, train)), set(decoded(store, held))))
    assert not (sides[0][0] | sides[1][0]) & (sides[0][1] | sides[1][1])
