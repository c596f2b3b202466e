"""Quantities by Kubernetes' own rules: equal to its own parser, exact, and the same after writing them again."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s.quantity import amount, spelled

# (text, what apimachinery v0.35.4's resource.ParseQuantity makes of it: "unscaled scale", or null where it refuses)
ORACLE = json.loads((Path(__file__).parent / "quantities.json").read_text())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("16GB", "(is 16Gi meant, or 16G?)"),
        ("16 g", "(is 16Gi meant, or 16G?)"),
        ("1.5Gib", "(is 1.5Gi meant?)"),
        ("64K", "(is 64Ki meant, or 64k?)"),
        ("16 cores", "16Gi"),
    ],
)
def test_units_as_they_are_written_elsewhere(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match="is no quantity") as caught:
        amount(written)
    assert str(caught.value).endswith(meant)


def test_every_answer_of_the_api_servers_own_parser() -> None:
    for text, answer in ORACLE:
        if answer is None:
            with pytest.raises(ValueError, match="is no quantity; write for example 4, 500m, 16Gi"):
                amount(text)
        else:
            unscaled, scale = map(int, answer.split())
            assert amount(text) == Fraction(unscaled) / Fraction(10) ** scale, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", Fraction(1, 2)),
        ("1e3", 1000),
        ("1E3", 1000),  # an exponent
        ("1E", 10**18),  # exa
        ("1.5Gi", 3 << 29),
        ("-5k", -5000),
        ("0.1", Fraction(1, 10)),
        ("1e-10", Fraction(1, 10**9)),  # never rounded to nothing
        ("9Ei", (1 << 63) - 1),
        ("9007199254740993", 2**53 + 1),  # no float on the way
    ],
)
def test_forms(text: str, value: Fraction) -> None:
    assert amount(text) == value


@pytest.mark.parametrize(
    "text", ["", " ", "many", "1 Gi", "1Gi ", "1K", "1KB", "1mi", "1e", "1e1.5", "0x1", "1_0", "١", "½", "inf", "nan",
             "-", "+", ".", "Ki", "m", "e3", "1e101", "1" * 101, "1e99999999999", "1\n", "\x00"]
)  # fmt: skip
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no quantity.*write for example"):
        amount(text)


SUFFIXES = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18, "e5": 5, "E-7": -7}


@given(
    st.integers(-(10**20), 10**20),
    st.one_of(st.just(""), st.from_regex(r"\.[0-9]{0,6}", fullmatch=True)),
    st.sampled_from(sorted(SUFFIXES)),
)
def test_decimal_ones_are_their_digits_times_a_power_of_ten(whole: int, part: str, unit: str) -> None:
    exact = Fraction(f"{abs(whole)}{part}0" if part else abs(whole)) * Fraction(10) ** SUFFIXES[unit]
    told = amount(f"{whole}{part}{unit}")
    assert told.denominator <= 10**9
    assert 0 <= abs(told) - exact < Fraction(1, 10**9)
    assert told == 0 or (told < 0) == (whole < 0 or f"{whole}" == "-0")


@given(st.integers(0, 1 << 40), st.sampled_from(["", "Ki", "Mi", "Gi"]), st.sampled_from(["pods", "limits.memory"]))
def test_what_is_written_is_read_again(number: int, unit: str, resource: str) -> None:
    value = amount(f"{number}{unit}")
    assert amount(spelled(value, resource)) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 9))
def test_small_ones_are_written_without_loss(number: int, places: int) -> None:
    value = Fraction(number, 10**places)
    assert amount(spelled(value)) == value


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    try:
        value = amount(text)
    except ValueError:
        return
    assert value.denominator <= 10**9
