"""The calculator of GSM8K's annotations: golden cases, bounds, the written form, annotations made by rule."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies

from rstar.calculator import annotate, calculate, completion, evaluate, written


@pytest.mark.parametrize(
    ("text", "value"),
    [("<<48/2=", 24.0), ("<<1,000*3=", 3000), ("<<16-3-4=", 9), ("<<2*0.5=", 1.0), ("so <<1+1=2>>2, then <<.5*4=", 2)],
)
def test_golden_results(text: str, value: float) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    ["<<50%*3=", "<<2x3=", "<<5/0=", "<<2+3=5>> so =", "no =", "<<3+4", "<<=", "<<9**9**9=", "<<2(3)=", "<<1.2.3="],
)
def test_no_result_where_there_is_nothing_to_calculate(text: str) -> None:
    assert calculate(text) is None and completion(text) is None


@pytest.mark.parametrize(
    ("expression", "shown"),
    [("48/2", "24"), ("0.1+0.2", "0.3"), ("1/3", "0.3333333333333333"), ("1/8", "0.125"), ("3-5", "-2"),
     ("1/40-1", "-0.975"), ("560//10", "56"), ("-(2+3)*4", "-20"), ("2*(3+4)-5/2", "11.5"), ("1,200.50*2", "2401"),
     ("7//2", "3")],
)  # fmt: skip
def test_results_are_exact_and_written_as_the_data_writes_them(expression: str, shown: str) -> None:
    value = evaluate(expression)
    assert value is not None and written(value) == shown
    assert completion(f"x <<{expression}=") == shown + ">>"


@settings(max_examples=300, deadline=None)
@given(strategies.text(alphabet="0123456789.+-*/() ,", max_size=40))
def test_agrees_with_python_wherever_both_have_a_value(text: str) -> None:
    value = evaluate(text)
    if value is None or "**" in text:
        return
    plain = text.replace(",", "").strip()
    try:
        expected = eval(plain)
    except SyntaxError:  # leading zeros are numbers here and a mistake in Python
        return
    assert float(value) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["9" * 5000, "(" * 5000, "-" * 190 + "1", "*".join(["99999999"] * 22), "1/" * 100 + "3"]
)
def test_hostile_expressions_cost_nothing(text: str) -> None:
    begun = time.perf_counter()
    assert evaluate(text) is None
    assert time.perf_counter() - begun < 0.05


def test_plain_calculations_are_annotated_and_everything_else_is_left_alone() -> None:
    assert annotate("He has 48 / 2 = 24 clips.") == "He has 48 / 2 = <<48/2=24>>24 clips."
    assert annotate("It costs 1,000*3 = $3,000.") == "It costs 1,000*3 = $<<1000*3=3000>>3,000."
    assert annotate("5+(2*3)=11, 2 + 2 = 5") == "5+(2*3)=<<5+(2*3)=11>>11, 2 + 2 = 5"
    for text in ("x = 5", "48/2 = <<48/2=24>>24", "3 x 4 = 12", "1/3 = 0.33", "#### 72"):
        assert annotate(text) == text


def test_value_is_a_fraction() -> None:
    assert evaluate("1/3") == Fraction(1, 3)
