"""A three-valued comparison of two answers: equal, different, or not to be decided here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from rstar.grading.exact import Hopeless, price
from rstar.grading.forms import TEXT, Form, Kind
from rstar.grading.work import charge

LONG_DECIMAL_DIGITS = 10  # a decimal with so many significant digits may stand for a number that has no end
FLOAT_DIGITS, FLOAT_ERROR = 15, 1e-14  # what a program prints of a float, and the noise in it
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_CHOSEN = re.compile(r"(?:\((?P<closed>[A-Z])\)|(?P<marked>[A-Z])[).:])(?P<rest>\s.*)?|(?P<bare>[A-Z])", re.DOTALL)
_LETTER = re.compile(r"\b[A-Z]\b")


def choice_matches(answer: str, reference: str) -> bool | None:
    """For a reference that is one capital letter, (E) or E: whether the answer chooses it; None for others."""
    wanted = _CHOICE.fullmatch(TEXT.sub(r"\1", reference))
    if wanted is None:
        return None
    chosen = _CHOSEN.fullmatch(TEXT.sub(r"\1", answer).strip())
    if chosen is None or _LETTER.search(chosen["rest"] or ""):  # "(A) (B)" chooses nothing
        return False
    return wanted[1] in (chosen["closed"], chosen["marked"], chosen["bare"])


def compare(answer: Form, reference: Form) -> bool | None:
    """Whether the answer is the reference; None if this is not decided here."""
    kinds = {answer.kind, reference.kind}
    if Kind.HOPELESS in kinds:
        return False
    if answer.unit and reference.unit and answer.unit != reference.unit:
        return False
    if answer.kind is reference.kind and answer.kind in _SAME_KIND:
        return _SAME_KIND[answer.kind](answer, reference)
    if Kind.ASSIGNMENT in kinds:
        first, second = (answer, reference) if answer.kind is Kind.ASSIGNMENT else (reference, answer)
        if second.kind is Kind.EQUATION:
            return _equation(answer, reference)
        return compare(first.parts[0], second) if second is reference else compare(second, first.parts[0])
    if Kind.OPAQUE in kinds or (Kind.RELATION in kinds and kinds & {Kind.TUPLE, Kind.UNION}):
        return False if Kind.WORDS in kinds else None
    return False


def _value(answer: Form, reference: Form) -> bool | None:
    assert answer.value is not None and reference.value is not None
    try:
        if answer.value.equals(reference.value):
            return True
    except Hopeless:
        return None
    return _stands_for(answer, reference)


def _stands_for(answer: Form, reference: Form) -> bool:
    """Whether a long decimal is the reference cut or rounded to its last digit, or a float's print of it."""
    assert answer.value is not None and reference.value is not None
    if answer.digits < LONG_DECIMAL_DIGITS or reference.digits >= LONG_DECIMAL_DIGITS:
        return False
    exact, wanted, known = answer.value.rational(), reference.value.real(), reference.value.rational()
    if exact is None or wanted is None or (known is not None and known.denominator == 1):
        return False
    if not math.isfinite(wanted) or not math.isfinite(answer.last_place):
        return False
    charge(10 + price(exact, known if known is not None else Fraction(wanted)))
    error = abs(exact - (known if known is not None else Fraction(wanted)))
    return error < 0.999 * answer.last_place or (answer.digits >= FLOAT_DIGITS and error <= FLOAT_ERROR * abs(wanted))


def _equation(answer: Form, reference: Form) -> bool | None:
    if answer.value is None or reference.value is None:
        return None
    try:
        return answer.value.proportional(reference.value) or None
    except Hopeless:
        return None


def _assignment(answer: Form, reference: Form) -> bool | None:
    return compare(answer.parts[0], reference.parts[0]) if answer.text == reference.text else False


def _ordered(answer: Form, reference: Form) -> bool | None:
    if answer.text != reference.text or len(answer.parts) != len(reference.parts):
        return False
    charge(len(answer.parts))
    return _all(compare(a, r) for a, r in zip(answer.parts, reference.parts, strict=True))


def _unordered(answer: Form, reference: Form) -> bool | None:
    """A pairing of equal elements; undecided only if undecided pairs could complete it."""
    if len(answer.parts) != len(reference.parts):
        return False
    left = list(answer.parts)
    rest: list[Form] = []
    for wanted in reference.parts:
        match = next((i for i, part in enumerate(left) if _tried(part, wanted)), None)
        if match is None:
            rest.append(wanted)
        else:
            left.pop(match)
    if not rest:
        return True
    return None if all(any(_tried(part, wanted) is None for part in left) for wanted in rest) else False


def _tried(part: Form, wanted: Form) -> bool | None:
    """Sets of sets of sets are compared each with each."""
    charge(2)
    return compare(part, wanted)


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


def _same_text(answer: Form, reference: Form) -> bool | None:
    return answer.text == reference.text


def _maybe(answer: Form, reference: Form) -> bool | None:
    return True if answer.text == reference.text else None


_SAME_KIND: dict[Kind, Callable[[Form, Form], bool | None]] = {
    Kind.VALUE: _value,
    Kind.LIST: _unordered,
    Kind.UNION: _unordered,
    Kind.TUPLE: _ordered,
    Kind.MATRIX: _ordered,
    Kind.RATIO: _ordered,
    Kind.RELATION: _ordered,
    Kind.ASSIGNMENT: _assignment,
    Kind.EQUATION: _equation,
    Kind.WORDS: _same_text,
    Kind.OPAQUE: _maybe,
}
