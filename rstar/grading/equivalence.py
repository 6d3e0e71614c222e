"""A three-valued comparison of two answers, equal, different or undecided, and the grader that settles what it leaves.

The comparison is exact and fast. What it cannot decide is decided by the same comparison in the sandbox, where sympy
answers for the parts (rstar.grading.symbolic).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from rstar.grading.exact import price
from rstar.grading.expressions import Hopeless
from rstar.grading.reading import Form, Kind, readings
from rstar.grading.text import MAX_ANSWER_CHARS, TEXT, clean
from rstar.grading.work import Exhausted, charge
from rstar.types import ExecutionStatus

if TYPE_CHECKING:
    from rstar.sandbox import Sandbox

LONG_DECIMAL_DIGITS = 10  # a decimal with so many significant digits may stand for a number that has no end
NEAR = Fraction(1, 10**9)  # how far, relative to it, such a decimal may be from a rational number that it stands for
FLOAT_DIGITS, FLOAT_ERROR = 15, 1e-14  # what a program prints of a float, and the noise in it
MAX_BITS = 14_000  # of an integer that Python writes in decimal: it refuses more than 4,300 digits
MAX_VERDICTS = 20_000  # that a grader keeps
SYMBOLIC_CPU_SECONDS = 2.0  # usual gradings take a twentieth of it

Decide = Callable[[Form, Form], bool | None]


def normalise(text: str) -> str:
    """One spelling of an answer, for votes and tables: equal for answers that differ in style only."""
    if len(text) > MAX_ANSWER_CHARS:
        return text.strip()
    cleaned = clean(text)
    forms = readings(cleaned)
    compact = re.sub(r"\s*([-+*/=<>,;:^()\[\]{}|])\s*", r"\1", cleaned)
    try:
        number = forms[0].value.rational() if forms[0].value is not None else None
    except Exhausted:
        return compact
    if number is not None and len(forms) == 1 and number.numerator.bit_length() < MAX_BITS:
        return str(number) if number.denominator == 1 or number.denominator < 10**9 else compact
    return forms[0].text if forms[0].kind is Kind.WORDS else compact


def is_equivalent_fast(answer: str, reference: str) -> bool | None:
    """Whether `answer` equals `reference` by the package's policy; None if only the symbolic path can tell.

    Microseconds for numbers, well below a millisecond for the usual closed forms, some 10 ms at worst.
    """
    answer, reference = answer.strip(), reference.strip()
    if not answer or not reference:
        return False
    if answer == reference:
        return True
    if len(answer) > MAX_ANSWER_CHARS or len(reference) > MAX_ANSWER_CHARS:
        return False
    if answer.isascii() and answer.isdigit() and reference.isascii() and reference.isdigit():
        return int(answer) == int(reference)
    return compare_texts(clean(answer), clean(reference), lambda *_: None)


def compare_texts(given: str, wanted: str, decide: Decide) -> bool | None:
    """Compare two cleaned answers; `decide` is asked about what exact arithmetic leaves open."""
    if given == wanted:
        return True
    chosen = _choice(given, wanted, decide)
    if chosen is not None:
        return chosen
    wanted_forms = _read(wanted, "," not in given)
    given_forms = readings(given, alone="," not in wanted)
    try:
        verdicts = [compare(form, other, decide) for form in given_forms for other in wanted_forms]
    except (Exhausted, Hopeless):
        return None
    return True if True in verdicts else None if None in verdicts else False


@lru_cache(maxsize=4096)
def _read(reference: str, alone: bool) -> tuple[Form, ...]:
    """References recur for every sample of a problem."""
    return readings(reference, alone=alone)


_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(
    r"(?:\((?P<closed>[A-Z])\)|(?P<marked>[A-Z])(?:[).:]| -(?= ?[A-Za-z0-9]{2})))(?P<rest>\s?\S.*)?|(?P<bare>[A-Z])",
    re.DOTALL,
)
_CAPITAL = re.compile(r"\b[A-Z]\b")


def _choice(answer: str, reference: str, decide: Decide) -> bool | None:
    """For a reference that is a choice, (E), E or `E) 12`: whether the answer chooses it; None for others.

    Where the reference gives the choice's text, the answer may give that text alone.
    """
    answer, reference = TEXT.sub(r"\1", answer).strip(), TEXT.sub(r"\1", reference).strip()
    letter, chosen = _LETTER.fullmatch(reference), _CHOICE.fullmatch(answer)
    full = None if letter else _CHOICE.fullmatch(reference)
    if letter is None and (full is None or not full["rest"]):
        return None
    wanted = letter[1] if letter else full["closed"] or full["marked"] if full else ""
    if chosen is None:
        return compare_texts(answer, full["rest"].strip(), decide) if full else False
    if _CAPITAL.search(chosen["rest"] or "") and not full:  # "(A) (B)" chooses nothing
        return False
    return wanted in (chosen["closed"], chosen["marked"], chosen["bare"])


def compare(answer: Form, reference: Form, decide: Decide) -> bool | None:
    """Whether the answer is the reference; None if neither exact arithmetic nor `decide` can tell."""
    kinds = {answer.kind, reference.kind}
    if Kind.HOPELESS in kinds or (answer.unit and reference.unit and answer.unit != reference.unit):
        return False
    for one, other in ((answer, reference), (reference, answer)):
        if one.kind is Kind.CHAIN and other.kind is not Kind.CHAIN:
            sides = _all(compare(a, b, decide) for a, b in zip(one.parts, one.parts[1:], strict=False))
            return _all([sides, compare(one.parts[-1], other, decide)]) if sides is not False else False
    if answer.kind is reference.kind:
        return _SAME_KIND[answer.kind](answer, reference, decide)
    for one, other in ((answer, reference), (reference, answer)):
        if one.kind is Kind.ASSIGNMENT:
            equation = other.kind is Kind.EQUATION
            return _equation(answer, reference, decide) if equation else compare(one.parts[0], other, decide)
    for one, other in ((answer, reference), (reference, answer)):
        if one.kind is Kind.LIST and _all_named(one):
            if other.kind is Kind.TUPLE and len({part.text for part in one.parts}) == len(one.parts):
                return _ordered(Form(Kind.TUPLE, "()", tuple(part.parts[0] for part in one.parts)), other, decide)
            if other.kind is Kind.UNION:
                return _union(Form(Kind.UNION, "", tuple(part.parts[0] for part in one.parts)), other, decide)
        if one.kind is Kind.MATRIX and other.kind is Kind.TUPLE and other.text == "[]":
            rows = all(part.kind is Kind.TUPLE and part.text == "[]" for part in other.parts)
            inner = Form(Kind.MATRIX, "matrix", tuple(Form(Kind.TUPLE, "()", part.parts) for part in other.parts))
            return _ordered(one, inner, decide) if rows else False
    if Kind.WORDS in kinds:
        return False
    sets = kinds <= {Kind.UNION, Kind.TUPLE, Kind.LIST}
    return decide(answer, reference) if Kind.OPAQUE in kinds or (sets and Kind.UNION in kinds) else False


def _all_named(form: Form) -> bool:
    return all(part.kind is Kind.ASSIGNMENT for part in form.parts) and bool(form.parts)


def _value(answer: Form, reference: Form, decide: Decide) -> bool | None:
    assert answer.value is not None and reference.value is not None
    try:
        if answer.value.equals(reference.value):
            return True
    except Hopeless:
        return decide(answer, reference)
    return any(
        stands_for(one, other.value.real(), other.value.rational(), short=other.digits < LONG_DECIMAL_DIGITS)
        for one, other in ((answer, reference), (reference, answer))
        if other.value is not None and one.digits >= LONG_DECIMAL_DIGITS
    )


def stands_for(decimal: Form, wanted: float | None, known: Fraction | None, *, short: bool = True) -> bool:
    """Whether a long decimal is what a program prints of another number, whose exact value may be `known`.

    It may be the other with the noise of a float. Beside that it may be off by a billionth of a rational number, or be
    another number cut or rounded to its last digit, unless the other is a long decimal itself (not `short`).
    """
    exact = decimal.value.rational() if decimal.value is not None and decimal.digits >= LONG_DECIMAL_DIGITS else None
    if exact is None or wanted is None or not math.isfinite(wanted) or not math.isfinite(decimal.last_place):
        return False
    target = known if known is not None else Fraction(wanted)
    charge(10 + price(exact, target))
    error = abs(exact - target)
    if decimal.digits >= FLOAT_DIGITS and error <= FLOAT_ERROR * abs(wanted):
        return True
    return short and (error < NEAR * abs(known) if known is not None else error < 0.999 * decimal.last_place)


def _equation(answer: Form, reference: Form, decide: Decide) -> bool | None:
    """Equal up to a rational factor."""
    if answer.value is not None and reference.value is not None and answer.value.proportional(reference.value):
        return True
    return decide(answer, reference)


def _assignment(answer: Form, reference: Form, decide: Decide) -> bool | None:
    if answer.text == reference.text:
        return compare(answer.parts[0], reference.parts[0], decide)
    if answer.value is None or reference.value is None:
        return False
    return answer.value.proportional(reference.value)  # y = x and x = y


def _ordered(answer: Form, reference: Form, decide: Decide) -> bool | None:
    if answer.text != reference.text or len(answer.parts) != len(reference.parts):
        return False
    charge(len(answer.parts))
    return _all(compare(a, r, decide) for a, r in zip(answer.parts, reference.parts, strict=True))


def _unordered(answer: Form, reference: Form, decide: Decide) -> bool | None:
    """A pairing of equal elements; undecided only if undecided pairs could complete it."""
    if len(answer.parts) != len(reference.parts) or {answer.text, reference.text} == {"list", "set"}:
        return False
    left = list(answer.parts)
    rest: list[Form] = []
    for wanted in reference.parts:
        match = next((i for i, part in enumerate(left) if _tried(part, wanted, decide)), None)
        if match is None:
            rest.append(wanted)
        else:
            left.pop(match)
    if not rest:
        return True
    return None if all(any(_tried(part, wanted, decide) is None for part in left) for wanted in rest) else False


def _tried(part: Form, wanted: Form, decide: Decide) -> bool | None:
    """Sets of sets of sets are compared each with each."""
    charge(2)
    return compare(part, wanted, decide)


def _union(answer: Form, reference: Form, decide: Decide) -> bool | None:
    """[0,1] and [1,2] together are [0,2]: unlike parts need not make another set."""
    return _unordered(answer, reference, decide) or decide(answer, reference)


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


def _same_text(answer: Form, reference: Form, decide: Decide) -> bool | None:
    return answer.text == reference.text


def _opaque(answer: Form, reference: Form, decide: Decide) -> bool | None:
    return True if answer.text == reference.text else decide(answer, reference)


_SAME_KIND: dict[Kind, Callable[[Form, Form, Decide], bool | None]] = {
    Kind.VALUE: _value,
    Kind.LIST: _unordered,
    Kind.UNION: _union,
    Kind.TUPLE: _ordered,
    Kind.MATRIX: _ordered,
    Kind.RATIO: _ordered,
    Kind.RELATION: _ordered,
    Kind.CHAIN: _ordered,
    Kind.ASSIGNMENT: _assignment,
    Kind.EQUATION: _equation,
    Kind.WORDS: _same_text,
    Kind.OPAQUE: _opaque,
}


class Grader:
    """Grades answers: the fast path here, the rest behind the sandbox's wall.

    Verdicts are kept (the latest MAX_VERDICTS), since samples of one problem repeat each other's answers.
    """

    def __init__(self, sandbox: Sandbox | None, *, cpu_seconds: float = SYMBOLIC_CPU_SECONDS) -> None:
        self._sandbox = sandbox
        self._cpu_seconds = cpu_seconds  # of one symbolic grading
        self._verdicts: dict[tuple[str, str], bool] = {}
        self.symbolic_calls = 0
        self.ungradable = 0  # symbolic gradings that hit a limit or failed; they count as "not equal"

    async def is_equivalent(self, answer: str, reference: str) -> bool:
        """Whether `answer` equals `reference` by the package's policy. Never raises for any text."""
        verdict = is_equivalent_fast(answer, reference)
        if verdict is not None:
            return verdict
        if self._sandbox is None:
            return False
        key = (answer.strip(), reference.strip())
        known = self._verdicts.get(key)
        if known is None:
            known = await self._symbolic(self._sandbox, clean(answer), clean(reference))
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.pop(next(iter(self._verdicts)))
            self._verdicts[key] = known
        return known

    async def _symbolic(self, sandbox: Sandbox, answer: str, reference: str) -> bool:
        self.symbolic_calls += 1
        execution = await sandbox.call(
            "grade",
            json.dumps([answer, reference]),
            cpu_seconds=self._cpu_seconds,
            wall_seconds=3 * self._cpu_seconds,  # a backstop; CPU time decides
        )
        if execution.status is not ExecutionStatus.OK:
            self.ungradable += 1
            return False
        return execution.stdout.strip() == "1"
