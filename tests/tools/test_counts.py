"""What `make check` says of the kernels' instructions: more, fewer, and cases that came or went."""

from __future__ import annotations

import json

from tests.tools.counts import KEPT, compared


def test_more_than_three_percent_and_other_cases_are_wrong() -> None:
    kept = {"a": 1000, "b": 1000, "gone": 5}
    assert compared({"a": 1030, "b": 10, "gone": 5}, kept) == []
    assert compared({"a": 1031, "b": 10, "new": 7}, kept) == [
        "new: 7 instructions, not kept",
        "gone: is kept, and there is no such case",
        "a: 1031 instructions, +3.1% of the 1000 that are kept",
    ]


def test_the_kept_figures_are_of_the_bench_s_small_calls() -> None:
    source = KEPT.parents[1].joinpath("bench", "bench_kernels.c").read_text()
    small = source[source.index("static const call small[]") : source.index("/* Operands of the sizes")]
    kept = json.loads(KEPT.read_text())
    assert all(n > 0 for n in kept.values())
    for name in kept:
        kernel, text = name.split(" ", 1)
        by_macro = kernel.startswith(("linear_", "attention_"))
        assert f'"{name}"' in small or (by_macro and f'"{text}"' in small), name
