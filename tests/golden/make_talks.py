"""Conversations as Hugging Face transformers writes, encodes and masks them: what ``data.messages`` is compared with.

usage: make_talks.py OUT
Writes OUT/talks.json: ``tokenizers`` (tokenizer.json of two kinds), ``templates`` (each plain, as models have it, and
``marked`` by generation blocks, from which transformers tells what is an answer), and ``cases``: a tokenizer, a
template, messages, and the documents that they make (``ids``, ``counts``).

    python3 -m venv /tmp/talks && /tmp/talks/bin/pip install transformers==5.24.0
    /tmp/talks/bin/python tests/golden/make_talks.py tests/golden/talks
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "user assistant system Who wrote Emma? Jane Austen wrote Emma in 1815. And what is 2 + 2? It is 4. Say it in "
    "German: Das weiß ich nicht. [INST] be brief [/INST] the quick brown fox jumps over the "
    "lazy dog <think> well </think> so"
] * 9
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|role|>", "<|turn|>", "<unk>"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
ROLES = """{{- bos_token }}
{%- for message in messages %}
    {%- set said = message.content | trim %}
    {{- '<|role|>' ~ message.role ~ '\\n\\n' }}
    {%- if message.role == 'assistant' %}OPEN{{ said ~ '<|turn|>' }}CLOSE
    {%- else %}{{ said ~ '<|turn|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|role|>assistant\\n\\n' }}{% endif %}
"""
INST = """{% if messages[0]['role'] == 'system' %}
    {% set first = messages[0]['content'] %}{% set rest = messages[1:] %}
{% else %}
    {% set first = none %}{% set rest = messages %}
{% endif %}
{{- bos_token -}}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') -}}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' + (first + '\\n\\n' if loop.first and first else '') + message['content'] + ' [/INST]' -}}
    {% else %}
        OPEN{{- ' ' + message['content'].strip() + eos_token -}}CLOSE
    {% endif %}
{% endfor %}
"""
THINK = """{%- set last = namespace(question=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set last.question = messages | length - loop.index %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- set thought = '<think>\\n' + thought + '\\n</think>\\n\\n' if loop.index0 > last.question else '' %}
        {%- set said = thought + message.content + '<|im_end|>' %}
        {%- if loop.last %}OPEN{{- said }}CLOSE{% else %}{{- said }}{% endif %}
    {%- else %}
        {{- (message.meta | tojson + '\\n' if message.meta else '') + message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: a blank before a text, bytes for what it does not know."""
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*SPECIAL, *fallback])
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    pieces.train_from_iterator(TEXT, trainer)
    tree = json.loads(pieces.to_str())
    tree["pre_tokenizer"] = None
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(tree))


def both(template: str) -> dict[str, str]:
    plain = template.replace("OPEN", "").replace("CLOSE", "")
    marked = template.replace("OPEN", "{%- generation -%}").replace("CLOSE", "{%- endgeneration -%}")
    return {"plain": plain, "marked": marked}


def main(out: str) -> None:
    made = {"bytes": byte_level(), "pieces": sentence_piece()}
    templates = {"chatml": {"plain": CHATML, "marked": CHATML_MARKED}}
    templates |= {name: both(text) for name, text in (("roles", ROLES), ("inst", INST), ("think", THINK))}
    said = [
        {"role": "system", "content": "Be brief; 短く."},
        {"role": "user", "content": "Who wrote Emma? 🦊"},
        {"role": "assistant", "content": "Jane Austen.", "reasoning_content": "I know that."},
        {"role": "user", "content": "In German?", "meta": {"ü": [1, None], "a": "<b>"}},
        {"role": "assistant", "content": "Das weiß ich nicht. 🦊é"},
    ]
    talks = [said, said[1:3], [said[1], {"role": "assistant", "content": "It is 4.\n\n  So it is."}]]
    cases = []
    for kind, tokenizer in made.items():
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)
        for name, forms in templates.items():
            for messages in talks:
                ends = [n + 1 for n, one in enumerate(messages) if one["role"] == "assistant"]
                documents = []
                for end in reversed(ends) if name == "think" else ends[-1:]:
                    found = fast.apply_chat_template(
                        messages[:end],
                        chat_template=forms["marked"],
                        tokenize=True,
                        return_dict=True,
                        return_assistant_tokens_mask=True,
                    )
                    plain = fast.apply_chat_template(messages[:end], chat_template=forms["plain"], tokenize=True)
                    assert list(plain["input_ids"]) == list(found["input_ids"]), (kind, name)
                    assert any(found["assistant_masks"])
                    documents.append({"ids": list(found["input_ids"]), "counts": list(found["assistant_masks"])})
                case = {"tokenizer": kind, "template": name, "messages": messages, "documents": documents}
                cases.append(case)
    tokenizers = {kind: json.loads(tokenizer.to_str()) for kind, tokenizer in made.items()}
    tree = {"tokens": TOKENS, "tokenizers": tokenizers, "templates": templates, "cases": cases}
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n"
    (pathlib.Path(out) / "talks.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
