"""The sandbox's side of grading: sympy and math-verify decide what exact arithmetic leaves open.

Runs behind the wall with the wall's limits. Two closed forms are equal if they agree to 40 digits wherever they are
evaluated, at random points for variables; two sets, if sympy finds no difference. What our parser does not read is
math-verify's, with its own timers off (they need the main thread's alarm) and rounding far finer than its defaults
(6 digits would take 0.333333 for 1/3).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from fractions import Fraction

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, MatrixBase

from rstar.grading.equivalence import compare_texts, stands_for
from rstar.grading.expressions import Algebra, Hopeless, Unreadable, read
from rstar.grading.reading import Form, Kind

DIGITS = 12  # math-verify's rounding
PRECISION, AGREE = 60, sympy.Float("1e-40")  # digits of an evaluation; relative difference that is none
_POINTS = ((37, 23), (101, 47), (-29, 31), (7, 53), (-113, 59))
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]


def grade(payload: str) -> str:
    """ "1" if the answer in the JSON list [answer, reference] (cleaned texts) equals the reference, else "0"."""
    answer, reference = json.loads(payload)
    verdict = compare_texts(answer, reference, decide)
    return "1" if (_verified(answer, reference) if verdict is None else verdict) else "0"


def decide(answer: Form, reference: Form) -> bool | None:
    """Whether two forms are the same value, equation or set; None where they cannot be read."""
    kinds = {answer.kind, reference.kind}
    if Kind.UNION in kinds:
        left, right = _as_set(answer), _as_set(reference)
        return None if left is None or right is None else bool(left == right or (left ^ right).is_empty)
    singles = [_single(form) for form in (answer, reference) if form.kind in (Kind.VALUE, Kind.OPAQUE)]
    if kinds <= {Kind.VALUE, Kind.OPAQUE}:
        left, right = singles
        if left is None or right is None:
            return _verified(answer.text, reference.text)
        return _same(left, right) or _printed(answer, right) or _printed(reference, left)
    return None if all(value is None for value in singles) else False  # a number is no tuple


def _single(form: Form) -> Expr | None:
    try:
        return read(form.text, SYMPY)
    except (Unreadable, Hopeless):
        return None


def _same(left: Expr, right: Expr) -> bool | None:
    names = sorted(left.free_symbols | right.free_symbols, key=str)
    for shift in range(len(_POINTS) if names else 1):
        point = {name: sympy.Rational(*_POINTS[(shift + k) % len(_POINTS)]) + k for k, name in enumerate(names)}
        values = [expression.subs(point).evalf(PRECISION) for expression in (left, right)]
        if not all(value.is_number and value.is_finite for value in values):
            return None
        if abs(values[0] - values[1]) > AGREE * max(1, abs(values[0])):
            return False
    return True


def _printed(decimal: Form, exact: Expr) -> bool:
    """Whether a long decimal stands for a number that is irrational (the rule of equivalence)."""
    value = exact.evalf(PRECISION)
    return bool(value.is_Float) and stands_for(decimal, float(value), None)


def _as_set(form: Form) -> sympy.Set | None:
    if form.kind is Kind.ASSIGNMENT:
        return _as_set(form.parts[0])
    if form.kind is Kind.UNION:
        parts = [_as_set(part) for part in form.parts]
        return None if None in parts else sympy.Union(*parts)
    try:
        numbers = [read(part.text, SYMPY) for part in form.parts]
    except (Unreadable, Hopeless):
        return None
    if not all(number.is_extended_real for number in numbers):
        return None
    if form.kind is Kind.LIST:
        return sympy.FiniteSet(*numbers)
    if form.kind is not Kind.TUPLE or len(numbers) != 2:
        return None
    return sympy.Interval(*numbers, form.text[0] == "(", form.text[1] == ")")


def _verified(answer: str, reference: str) -> bool:
    """math-verify's verdict on two texts without words, which it would drop."""
    given, wanted = _expression(answer), _expression(reference)
    if given is None or wanted is None:
        return False
    same = verify(wanted, given, float_rounding=DIGITS, numeric_precision=DIGITS + 8, strict=True, timeout_seconds=None)
    return bool(same)


def _expression(text: str) -> Basic | MatrixBase | None:
    if text.count("{") != text.count("}") or "\\text" in text:
        return None
    found = parse(f"$\\boxed{{{text}}}$", extraction_config=_CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    return next((item for item in found if isinstance(item, Basic | MatrixBase)), None)


_CONSTANTS = {"i": sympy.I, "e": sympy.E, "\\pi": sympy.pi, "\\infty": sympy.oo}


def _symbol(name: str) -> Expr:
    return _CONSTANTS[name] if name in _CONSTANTS else sympy.Symbol(name)


def _rational(value: Expr) -> Fraction | None:
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else None


def _function(name: str, values: Sequence[Expr]) -> Expr:
    if name == "root":
        value, degree = values
        odd = value.is_number and value.is_negative and degree.is_odd
        return -sympy.root(-value, degree) if odd else sympy.root(value, degree)
    names = {"abs": "Abs", "ceil": "ceiling", "ln": "log"}
    return getattr(sympy, names.get(name, name))(*values)


SYMPY = Algebra[Expr](
    lambda value: sympy.Rational(value.numerator, value.denominator),
    _symbol,
    lambda base, exponent: base**exponent,
    _function,
    _rational,
)

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
_WARM_UP = (  # loads what these import lazily and fills the parser's and sympy's tables, once instead of in every fork
    ("\\frac{\\sin 30}{2}", "\\log_2 8"),
    ("\\sin 4x", "\\cos 3x"),
    ("\\cos\\frac{\\pi}{6}", "\\frac{1}{2}"),
    ("2-\\sqrt{x-2}", "-\\sqrt{x-3}+2"),
    ("2 \\cdot 2^x", "2^{x+1}"),
    ("\\sqrt[3]{17}", "2\\sqrt[3]{2}"),
    ("x + y > 3", "(0, \\infty)"),
    ("(\\sin 1, 2)", "(2, \\ln 3)"),
    ("x^2 + y = 3", "y = \\tan x"),
    ("[0,1]\\cup[1,2]", "[0,3]"),
    ("\\sum_{n=1}^{3} n", "7"),
    ("\\{1, \\sin 2\\}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
)
for pair in _WARM_UP:
    grade(json.dumps(pair))
