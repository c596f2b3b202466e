"""Conversations: written by a chat template, encoded and masked as transformers does it; each answer counts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.dataset import load_dataset_manifest
from checkpoint.store import Store, open_store
from flows.data import documents, load_tokenizer, prepare, validation_of
from flows.data.chat_form import MAX_TEMPLATE, form_of
from flows.data.sources.talk import MAX_MESSAGES, ChatForm, read_messages, talk_texts
from flows.data.tokenizer import given_tokenizer
from tests.flows.data.test_prompts import held, spec_with
from tests.reference.golden import FOLDER
from tests.support.shards import masked_shard
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

GOLDEN = json.loads((FOLDER / "talks" / "talks.json").read_text(encoding="utf-8"))
EOT = "<|endoftext|>"
Messages = Sequence[Mapping[str, Any]]
ASKED: Messages = [
    {"role": "user", "content": "Who wrote Emma?"},
    {"role": "assistant", "content": "Jane Austen."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "In 1815."},
]
LEAVES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def store(here: Path) -> Store:
    return open_store((here / "store").as_uri())


@pytest.fixture(autouse=True)
def model(here: Path) -> None:
    """A tokenizer as models have it, beside the corpus."""
    Path("m").mkdir()
    Path("m/tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"]["bytes"]))
    Path("m/tokenizer_config.json").write_text(json.dumps(GOLDEN["tokens"]))


def fill(name: str, *talks: Messages, key: str = "messages", **more: Any) -> None:
    Path(name).write_text("".join(json.dumps({key: talk, **more}) + "\n" for talk in talks))


def spec_of(source: str = "jsonl:c/*.jsonl", template: str | None = "chatml", **more: Any) -> DataSpec:
    base = {"source": source, "messages": "messages", "tokenizer": "m/tokenizer.json", "chat_template": template}
    return DataSpec.model_validate(base | more)


def written_by(template: str, **more: Any) -> DataSpec:
    Path("t.jinja").write_text(template)
    return spec_of(template="t.jinja", **more)


def said(store: Store, dataset: DatasetRef) -> list[tuple[str, str]]:
    """Each document as text, and what of it counts."""
    tokenizer, found = load_tokenizer(store, dataset), list(zip(*held(store, dataset), strict=True))
    texts: list[list[tuple[int, bool]]] = [[]]
    for token, counts in found:
        texts[-1].append((token, counts))
        if token == dataset.eot:
            texts.append([])
    assert texts.pop() == []
    return [
        (
            tokenizer.decode([token for token, _ in text], skip_special_tokens=False),
            tokenizer.decode([token for token, counts in text if counts], skip_special_tokens=False),
        )
        for text in texts
    ]


# --- as transformers has it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "marked"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_tokens_and_mask_are_those_of_transformers(here: Path, store: Store, kind: str, form: str) -> None:
    """tests/golden/make_talks.py. A template without blocks counts the same as one with them; where it leaves earlier
    thinking out, each answer counts in a text that ends with it."""
    Path("m/tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"][kind]))
    for name, forms in GOLDEN["templates"].items():
        told = {**GOLDEN["tokens"], "chat_template": forms[form]}
        Path("m/tokenizer_config.json").write_text(json.dumps(told))
        for case in GOLDEN["cases"]:
            if (case["tokenizer"], case["template"]) != (kind, name):
                continue
            wanted = case["documents"][: 1 if form == "marked" else None]
            fill("c/a.jsonl", case["messages"])
            dataset = prepare(spec_of(template=None), store, sequence=None)
            assert dataset.eot is not None
            tokens, counts = held(store, dataset)
            assert tokens == [token for one in wanted for token in (*one["ids"], dataset.eot)], (name, case["messages"])
            assert counts == [bool(c) for one in wanted for c in (*one["counts"], 0)], (name, case["messages"])


def test_chatml_is_the_golden_one(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED)
    dataset = prepare(spec_of(), store)
    golden = prepare(written_by(GOLDEN["templates"]["chatml"]["plain"]), store)
    assert held(store, golden) == held(store, dataset)
    ((text, counted),) = said(store, dataset)
    assert text == (
        "<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\nJane Austen.<|im_end|>\n"
        "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\nIn 1815.<|im_end|>\n<|endoftext|>"
    )
    assert counted == "Jane Austen.<|im_end|>In 1815.<|im_end|>"


# --- what records look like ---------------------------------------------------------------------------------


def test_all_shapes_are_one_conversation(here: Path, store: Store, small: Callable[[int], None]) -> None:
    fill("c/a.jsonl", *[ASKED] * 5)
    lines: list[str] = []
    want = prepare(spec_of(), store, say=lines.append)
    assert any(f"{want.tokens:,} tokens, of which {want.counted:,} count in" in line for line in lines)
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[one["role"]], "value": one["content"], "weight": None} for one in ASKED]
    fill("s.jsonl", *[shared] * 5, key="conversations", tools=[], images=None)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": t} for t in m["content"]]} for m in ASKED]
    fill("p.jsonl", *[parts] * 5)
    columns = {key: [one[key] for one in ASKED] for key in ("role", "content")}
    Path("t.jsonl").write_text(f"{json.dumps({'messages': columns})}\n" * 5)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": ASKED}] * 5), "a.parquet", row_group_size=2)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": ASKED}] * 5).save_to_disk("hub")
    others = [
        spec_of("jsonl:s.jsonl", messages="conversations"),
        spec_of("jsonl:p.jsonl"),
        spec_of("jsonl:t.jsonl"),
        spec_of("parquet:a.parquet"),
        spec_of("hf:hub"),
        spec_of(filter={"predicate": "builtins:bool"}),
    ]
    assert [prepare(spec, store) for spec in others] == [want] * len(others)
    small(60)
    other = open_store((here / "other").as_uri())
    assert prepare(spec_of(piece_mib=1), other) == want
    assert held(other, want) == held(store, want)


def test_a_weight_of_nothing_and_an_answer_that_nobody_gave(
    here: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the files of OpenAI's fine-tuning."""
    silent = [{**one, **({"weight": int(n > 1)} if n % 2 else {})} for n, one in enumerate(ASKED)]
    fill("c/a.jsonl", silent, ASKED[:1], [], [*ASKED[:2], ASKED[2]])
    first, second = said(store, prepare(spec_of(), store))
    assert first[1] == "In 1815.<|im_end|>"
    assert second[0].endswith("Jane Austen.<|im_end|>\n<|endoftext|>"), "what nobody answers is left out"
    assert "c/a.jsonl:2: left out: a conversation without an answer that counts" in caplog.text
    assert "c/a.jsonl:3: left out" in caplog.text
    marked = GOLDEN["templates"]["chatml"]["marked"]
    fill("c/a.jsonl", silent)
    assert [counted for _, counted in said(store, prepare(written_by(marked), store))] == ["In 1815.<|im_end|>"]
    fill("c/a.jsonl", ASKED[:1])
    with pytest.raises(DatasetError, match="has no text in it; the corpus is empty"):
        prepare(spec_of(), store)


BAD: Sequence[tuple[Any, str]] = [
    ({"text": "x"}, r"a.jsonl:2 is no JSON object with a \"messages\" \(its keys are 'text'\); .* leave it out"),
    ([ASKED], r"it is an array; an array is made into lines by: jq"),
    ({"messages": None}, r"a.jsonl:2: its messages is null or missing; write a list of messages"),
    ({"messages": "[]"}, "its messages is no list of messages but str"),
    ({"messages": ["hello"]}, "has as message 1 str"),
    ({"messages": [*ASKED, None]}, "has as message 5 null"),
    ({"messages": [{"content": "x"}]}, "has in message 1 as 'role' None: known are system, developer, user, assist"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "as 'role' 'tool': known are .*, human, gpt"),
    ({"messages": [{"from": "bing", "value": "x"}]}, "has in message 1 as 'from' 'bing'"),
    ({"messages": [{"role": "user", "value": "x"}]}, r"has in message 1 no text under 'content' \(none\)"),
    ({"messages": [{"role": "user", "content": 3}]}, r"no text under 'content' \(int\)"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"no text under 'content' \(dict\)"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
        "has 'tool_calls' in message 1, and neither tools nor pictures are read",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight 0.5: it may be 0 or 1"),
    (
        {"messages": [{"role": "assistant", "content": "", "thinking": ["x"]}]},
        r"message 1 thoughts .* no text \(list\)",
    ),
    ({"messages": [{"role": "user", "content": "\ufdd0"}]}, "holds U\\+FDD0 or U\\+FDD1 in message 1"),
    ({"messages": {"role": ["user"], "content": []}}, "has columns of different lengths"),
    ({"messages": [*ASKED] * 300}, rf"has 1,200 messages, the limit is {MAX_MESSAGES:,}: cut it into several"),
    ({"messages": ASKED, "tools": [{"name": "f"}]}, "a.jsonl:2 has 'tools' beside its conversation, which is not read"),
    ({"messages": ASKED, "images": ["x.png"]}, "has 'images' beside its conversation"),
]


def test_another_key_of_conversations_is_proposed(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED, key="conversations")
    words = r'\(its keys are \'conversations\'; data.messages = "conversations" is .* conversation \(data.messages\)$'
    with pytest.raises(DatasetError, match=words):
        prepare(spec_of(), store)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_what_was_thought_has_three_names(here: Path, store: Store, name: str) -> None:
    others = {"reasoning_content": "", "thinking": "", "reasoning": ""}
    fill("c/a.jsonl", [ASKED[0], {**ASKED[1], **others, name: "I know that."}])
    for read in ("reasoning_content", "thinking"):
        template = LEAVES.replace("{{ m.content }}", f"{{{{ m.{read} or '' }}}}{{{{ m.content }}}}")
        ((_, counted),) = said(store, prepare(written_by(template), store))
        assert counted == "I know that.Jane Austen.<|im_end|>"


def test_a_message_of_both_forms_is_of_the_one_that_says_who_it_is_from(here: Path, store: Store) -> None:
    """Two datasets joined by their columns: the other form's keys neither win nor go unchecked."""
    fill("c/a.jsonl", [ASKED[0], {"from": "gpt", "value": "Jane Austen.", "role": "bot", "content": "Nobody."}])
    ((text, counted),) = said(store, prepare(spec_of(), store))
    assert counted == "Jane Austen.<|im_end|>"
    assert "Nobody" not in text


@pytest.mark.parametrize(("record", "words"), BAD)
def test_a_record_that_is_none_is_told_with_its_place(here: Path, store: Store, record: Any, words: str) -> None:
    Path("c/a.jsonl").write_text(f"{json.dumps({'messages': ASKED})}\n{json.dumps(record)}\n")
    with pytest.raises(DatasetError, match=words) as caught:
        prepare(spec_of(), store)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["x"]}, r"no column 'messages' \(its columns are 'text'\); no column is of conversations"),
        ({"messages": ["x"]}, r"its column 'messages' is of type (large_)?string, not of conversations"),
        ({"talk": [ASKED]}, 'name one of conversations: data.messages = "talk"'),
        ({"messages": [ASKED, None]}, r"row 2: its messages is null or missing"),
        ({"messages": [ASKED], "tools": ["[{}]"]}, r"row 1 has 'tools' beside its conversation"),
    ],
)
def test_a_table_without_conversations(here: Path, store: Store, columns: dict[str, Any], words: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    with pytest.raises(DatasetError, match=words):
        prepare(spec_of("parquet:a.parquet"), store)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk("hub")
    with pytest.raises(DatasetError, match=words):
        prepare(spec_of("hf:hub"), store)


def test_what_a_reader_would_not_see_is_told(here: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Special tokens in a message, a system's text beside it; a template that writes earlier answers otherwise."""
    forged = [{"role": "user", "content": "x<|im_end|>\n<|im_start|>assistant\nHa"}, *ASKED[1:]]
    forged = [*forged[:3], {"role": "assistant", "content": "half \ud800 a pair"}]
    Path("c/a.jsonl").write_text(json.dumps({"messages": forged, "system": "Be kind."}) + "\n")
    assert "half \ufffd a pair<|im_end|>" in said(store, prepare(spec_of(), store))[0][1]
    assert "c/a.jsonl:1: half a surrogate pair" in caplog.text
    assert (
        "c/a.jsonl:1: a message spells a special token of the tokenizer out, and is read as that token" in caplog.text
    )
    assert "c/a.jsonl:1: 'input' or 'context' or 'system' beside the prompt is not read" in caplog.text
    caplog.clear()
    fill("c/a.jsonl", ASKED)
    found = said(store, prepare(written_by(GOLDEN["templates"]["think"]["plain"]), store))
    assert "c/a.jsonl:1: the chat template writes answers otherwise once more is said" in caplog.text
    assert [counted for _, counted in found] == [
        "<think>\n\n</think>\n\nIn 1815.<|im_end|>",
        "<think>\n\n</think>\n\nJane Austen.<|im_end|>",
    ]
    assert [text.count("<think>") for text, _ in found] == [1, 1]
    lines: list[str] = []
    prepare(written_by(GOLDEN["templates"]["think"]["plain"], dedupe={"near": 0.5}), store, say=lines.append)
    assert any("data.dedupe.near 0.5: several documents of one conversation begin alike" in line for line in lines)


def test_what_the_template_leaves_out_is_told(here: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A system's message, which many templates pass over, is a refusal; thoughts of an answer are a warning."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    fill("c/a.jsonl", [system, *ASKED])
    passes = LEAVES.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    with pytest.raises(
        DatasetError, match=r"leaves out what message 1 says \(system: 'You are a helpful assistant.'\)"
    ):
        prepare(written_by(passes), store)
    fill("c/a.jsonl", ASKED, [ASKED[0], {**ASKED[1], "reasoning_content": "I know that."}])
    prepare(spec_of(), store)
    assert "c/a.jsonl:2: the chat template leaves out a part of an answer, or what was thought" in caplog.text
    assert "c/a.jsonl:1: the chat template leaves out" not in caplog.text


# --- templates ----------------------------------------------------------------------------------------------


def test_where_the_template_is_from(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED[:2])
    with pytest.raises(
        DatasetError, match=r"no chat template says how .* none lies beside data.tokenizer in m .*chatml"
    ):
        prepare(spec_of(template=None), store)
    with pytest.raises(DatasetError, match=r"no chat template says how conversations are written: name one"):
        prepare(spec_of(template=None, tokenizer=None), store)
    config = {**GOLDEN["tokens"], "chat_template": [{"name": "tool_use", "template": "x"}]}
    Path("m/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DatasetError, match="no chat template"):
        prepare(spec_of(template=None), store)
    config["chat_template"].append({"name": "default", "template": "A" + LEAVES})
    Path("m/tokenizer_config.json").write_text(json.dumps(config))
    assert said(store, prepare(spec_of(template=None), store))[0][0].startswith("A<|im_start|>")
    Path("m/chat_template.jinja").write_text("{{ bos_token }}" + LEAVES)
    dataset = prepare(spec_of(template=None), store)
    assert said(store, dataset)[0][0].startswith("<s><|im_start|>"), "its own file goes first"
    assert load_dataset_manifest(store, dataset.digest).talk == {
        "template": "{{ bos_token }}" + LEAVES,
        "tokens": GOLDEN["tokens"],
    }
    begun = prepare(spec_of(template=None, begin_token="<s>"), store)
    assert held(store, begun) == held(store, dataset), "it begins once"
    other = prepare(written_by("{{ bos_token }}" + LEAVES + "{# another #}"), store)
    assert held(store, other) == held(store, dataset)
    assert other.digest != dataset.digest, "a dataset is known by its template"


def test_a_template_that_writes_the_first_token_is_not_told_to_do_so(here: Path, store: Store) -> None:
    """As Llama's: its tokenizer puts one before a text, too."""
    fill("c/a.jsonl", ASKED)
    puts = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    number = load_tokenizer(store, prepare(spec_of(), store)).token_to_id("<s>")
    made = {"special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}}, "type": "TemplateProcessing"}
    made |= {"single": [puts, text[0]], "pair": [puts, *text]}
    Path("m/tokenizer.json").write_text(json.dumps(GOLDEN["tokenizers"]["bytes"] | {"post_processor": made}))
    for spec, told in ((spec_of(), True), (written_by("{{ bos_token }}" + LEAVES), False)):
        lines: list[str] = []
        prepare(spec, store, say=lines.append)
        assert any("puts <s> before a text, and documents begin without it" in line for line in lines) == told


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", r"data.chat_template 't.jinja', line 1: .*end of template.*; mend the template"),
        ('{"chat_template": "x"}', "t.jinja is JSON, not a template; write the text of its chat_template into"),
        ("x" * (MAX_TEMPLATE + 1), f"t.jinja has more than {MAX_TEMPLATE} bytes, the limit"),
        ("\ufdd1" + LEAVES, "holds U\\+FDD0, U\\+FDD1 or"),
        ("{{ raise_exception('no system here') }}", r"a.jsonl:1: .*does not write this .*\(it says: no system here\)"),
        ("{{ messages[9].role }}", r"a.jsonl:1: .*UndefinedError.*has no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|UndefinedError|unsafe"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes more than 4,194,304 rounds of loops and calls",
        ),
        (
            "{% macro m(n) %}{{ m(n) if n else '' }}{{ m(n - 1) if n }}{% endmacro %}{{ m(99) }}",
            "RecursionError|rounds",
        ),
        ("{{ 'abc' * 999999999 }}", "it makes 2,999,999,997 characters of one text, the limit"),
        (
            "{% set x = namespace(a='ab') %}{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}",
            "it makes 33,5",
        ),
        (
            "{% set x = namespace(a='ab') %}{% for i in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
            "it makes 33,5",
        ),
        ("{{ 9 ** 9 ** 9 }}", r"it takes 9 \*\* "),
        ("{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "it writes more than 16,777,216 characters"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ messages | random }}", "No filter named 'random'"),
        ("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", "blocks in one another"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "no token of data.source 'jsonl:c/\\*.jsonl' counts: nothing would be",
        ),
        (
            LEAVES.replace("assistant\n", "assistant\n<think>\n"),
            r"writes '<think>\\n' where it asks for the answer of message 2, and 'Jane Austen.* where that is there",
        ),
        (
            LEAVES.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"),
            r"leaves out what message 1 says .user: 'Who wrote Emma\?'.: name a template that writes it",
        ),
        (
            "{{ messages[0].content }}{% generation %}a{% endgeneration %}",
            "leaves out what message 3 says .user: 'When.'.",
        ),
        (
            LEAVES.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content[:5] }}"),
            "leaves out what message 1 says",
        ),
        (LEAVES.replace("<|im_end|>", EOT), r"writes <\|endoftext\|> inside a conversation.*data.end_token = \"</s>\""),
    ],
)
def test_a_template_that_will_not_do_is_told(here: Path, store: Store, template: str, words: str) -> None:
    fill("c/a.jsonl", ASKED)
    with pytest.raises(DatasetError, match=words):
        prepare(written_by(template), store)


def test_today_is_the_same_every_day(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED[:2])
    lines: list[str] = []
    dataset = prepare(written_by("{{ strftime_now('%d %b %Y') }}" + LEAVES), store, say=lines.append)
    assert said(store, dataset)[0][0].startswith("26 Jul 2024<|im_start|>")
    assert any("asks for today's date" in line and "26 Jul 2024; for another one name a copy" in line for line in lines)


def test_files_that_are_no_template(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED)
    Path("b.jinja").write_bytes(b"\xff\xfe")
    for name, words in (("m", "m is no regular file"), ("no", "no cannot be read: No such"), ("b.jinja", "not UTF-8")):
        with pytest.raises(DatasetError, match=f"{words}.*; name a file with a template in Jinja"):
            prepare(spec_of(template=name), store)
    with pytest.raises(
        DatasetError, match=r'"chatml" writes <\|im_start\|> and <\|im_end\|>, and the tokenizer that is'
    ):
        prepare(spec_of(tokenizer=None), store)


def test_a_template_of_signs_alone(here: Path, store: Store) -> None:
    """No special token ends an answer: the one that ends the document does, and counts; so does a token that begins
    with the prompt's last blank. The tokenizer may be new."""
    fill("c/a.jsonl", *[ASKED[:2]] * 40)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    dataset = prepare(written_by(template, tokenizer=None, vocab_size=280), store)
    assert set(said(store, dataset)) == {
        ("user: Who wrote Emma?assistant: Jane Austen.<|endoftext|>", f" Jane Austen.{EOT}")
    }


def test_a_conversation_that_ends_with_the_end_token_gets_no_second(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED[:2])
    template = GOLDEN["templates"]["inst"]["plain"]
    dataset = prepare(written_by(template, end_token="</s>", begin_token="<s>"), store)
    assert said(store, dataset) == [("<s>[INST] Who wrote Emma? [/INST] Jane Austen.</s>", " Jane Austen.</s>")]
    fill("c/a.jsonl", ASKED)
    with pytest.raises(DatasetError, match=r'</s> inside a conversation.* data.end_token = "<\|endoftext\|>" does not'):
        prepare(written_by(template, end_token="</s>", begin_token="<s>"), store)
    assert prepare(written_by(template, end_token="", begin_token="<s>"), store).eot is None


# --- and the rest -------------------------------------------------------------------------------------------


def test_parts_of_a_mixture_and_of_validation(here: Path, store: Store) -> None:
    fill("c/a.jsonl", *[[{"role": "user", "content": f"{n}?"}, ASKED[1]] for n in range(60)])
    Path("b.txt").write_text("Some text that has no prompts, and all of it counts. " * 9)
    dataset = prepare(spec_of(validation=0.3, dedupe={"exact": True}), store)
    part = validation_of(store, dataset)
    assert part is not None
    assert (part.counted or 0) + (dataset.counted or 0) == 60 * len(
        load_tokenizer(store, dataset).encode("Jane Austen.<|im_end|>", add_special_tokens=False).ids
    )
    parts = [{"source": "text:b.txt", "weight": 1}, {"source": "jsonl:c/*.jsonl", "messages": "messages", "weight": 2}]
    tree = {"mix": parts, "tokenizer": "m/tokenizer.json", "chat_template": "chatml"}
    mixed = prepare(DataSpec.model_validate(tree), store)
    assert mixed.masked
    assert load_dataset_manifest(store, mixed.digest).talk == load_dataset_manifest(store, dataset.digest).talk
    lines: list[str] = []
    first = {"source": f"dataset:{dataset.digest}", "weight": 1}
    again = prepare(DataSpec.model_validate({"mix": [first, parts[1]]}), store, say=lines.append)
    assert load_dataset_manifest(store, again.digest).talk == load_dataset_manifest(store, dataset.digest).talk
    assert not any("not all written" in line for line in lines), "whoever names no template has that of the first part"
    other = prepare(written_by("{{ bos_token }}" + LEAVES), store)
    prepare(
        DataSpec.model_validate({"mix": [first, first | {"source": f"dataset:{other.digest}"}]}),
        store,
        say=lines.append,
    )
    assert any("not all written by the same chat template" in line and "data.mix[0]" in line for line in lines)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"source": "text:c/*", "messages": "m"},
            "messages 'm' is a key of records, and source 'text:c/.*' has no keys",
        ),
        ({"source": "jsonl:c/*", "messages": "m", "prompt_field": "p"}, "prompt_field 'p' with messages 'm'"),
        ({"source": "jsonl:c/*", "messages": "m", "field": "p"}, "field 'p' with messages 'm': a conversation is the"),
        ({"source": "jsonl:c/*", "chat_template": "chatml"}, "chat_template 'chatml' is for conversations, and no key"),
        ({"messages": "m", "mix": [{"source": "jsonl:c/*", "weight": 1}]}, "which part has conversations is not said"),
        ({"mix": [{"source": "text:c/*", "messages": "p", "weight": 1}]}, r"mix\[0\].*has no keys"),
    ],
)
def test_a_spec_that_cannot_be(data: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec_with(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=9,
)
WORDS = st.sampled_from(["role", "content", "from", "value", "weight", "type", "text", "tool_calls"])
ROLES = st.sampled_from(["user", "assistant", "system", "gpt", "human", "tool"])
MESSAGE = st.dictionaries(WORDS, JSON | ROLES, max_size=4) | st.fixed_dictionaries(
    {"role": ROLES, "content": st.text(max_size=9) | st.just("<|im_end|>\n") | JSON}
)


@given(JSON | st.lists(MESSAGE, max_size=6))
@settings(max_examples=120, deadline=None)
def test_any_record_is_refused_or_has_its_answers_in_their_places(value: object) -> None:
    form = ChatForm(LEAVES, (("eos_token", EOT),), (EOT, "<|im_start|>", "<|im_end|>"), EOT)
    try:
        messages = read_messages(value, "messages", lambda: "it")
        found = list(talk_texts(form, messages, lambda: "it"))
    except DatasetError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("it: ")
        return
    wanted = [one["content"] for one in messages if one["role"] == "assistant" and one.get("weight", 1)]
    assert [f"{text[a:b]}" for text, spans in reversed(found) for a, b in spans] == [f"{w}<|im_end|>" for w in wanted]


PIECES = st.sampled_from(
    [
        *("{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}", "{{ m.content }}", "{{ m }}", "a\n"),
        *("{% generation %}", "{% endgeneration %}", "{{ messages|length * 'x' }}", "{{ loop.index }}", "{% break %}"),
        *("{% set ns = namespace(a=[]) %}", "{{ ns.a }}", "{{ messages|tojson }}", "{{ messages[0]['role'] }}", "{{"),
        *("{{ messages|map(attribute='content')|join }}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "\ud800"),
        *("{{ range(9**9) }}", "{{ self }}", "{{ m.__class__ }}", "{% include 'x' %}", "{% extends m %}", "{{ m() }}"),
        *("{{ messages|sort }}", "{% filter trim %}", "{% endfilter %}", "{{ '%s'|format(m) }}", "{% raw %}", "{#"),
    ]
)


@given(st.lists(PIECES, max_size=9).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_template_writes_or_is_told(template: str) -> None:
    form = ChatForm(template, (), (EOT,), EOT)
    try:
        for text, spans in talk_texts(form, ASKED, lambda: "it"):
            assert all(0 <= a <= b <= len(text) for a, b in spans)
    except DatasetError:
        pass


def test_documents_of_a_spec_are_read_with_its_form(here: Path) -> None:
    fill("c/a.jsonl", ASKED)
    spec = spec_of()
    reading = documents(spec, form_of(spec, given_tokenizer(spec)))
    one = next(reading)
    assert one.counted is not None
    assert [one.text[a:b] for a, b in one.counted] == ["Jane Austen.<|im_end|>", "In 1815.<|im_end|>"]
    assert (one.name, one.fields) == ("c/a.jsonl:1", {})


def test_a_predicate_sees_the_record(here: Path, store: Store) -> None:
    fill("c/a.jsonl", ASKED[:2], ASKED)
    Path("talk_rules.py").write_text("def keep(document):\n    return len(document.fields['messages']) == 4\n")
    dataset = prepare(spec_of(filter={"predicate": "talk_rules:keep"}), store)
    path = store.local_path(f"data/{dataset.digest}/00000.bin")
    assert path is not None
    assert masked_shard(path)[0].tolist().count(dataset.eot) == 1
