"""Opens folders that hotstage exported in Hugging Face transformers, as their readers do, and says what it warns of.

    /tmp/compare/bin/python -m tests.reference.open_export FOLDER...      # the environment of compare_transformers

Exits with 1 where anything is warned of, a tensor is missing or too much, a text does not come back from the tokenizer,
or the tokenizer gives what the model would take for more than tokens (transformers 4 gives types of tokens by default).
"""

from __future__ import annotations

import io
import logging
import sys
import warnings

import transformers

TEXT = "The quick über fox;  12\n"


def problems(folder: str) -> list[str]:
    """What is not as it should be."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            asked = tokenizer(TEXT, return_tensors="pt")
            model.generate(**asked, max_new_tokens=3, do_sample=False)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    found = [str(warning.message) for warning in caught] + log.getvalue().splitlines()
    found += [f"{kind}: {keys}" for kind, keys in report.items() if keys]
    if tokenizer.decode(asked["input_ids"][0], skip_special_tokens=True) != TEXT:
        found.append("a text does not come back from the tokenizer")
    if set(asked) != {"input_ids", "attention_mask"}:
        found.append(f"the tokenizer gives {sorted(asked)}")
    return found


def main(folders: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    wrong = {folder: found for folder in folders if (found := problems(folder))}
    for folder, found in wrong.items():
        print(f"{folder}:", *found, sep="\n  ")
    print(f"transformers {transformers.__version__}: {len(folders) - len(wrong)} of {len(folders)} open as they should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
