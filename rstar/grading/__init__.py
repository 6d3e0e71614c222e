"""Is an answer equal to the reference? An explicit, strict policy, bounded in time and size, never eval in our process.

Policy
    * Exact. Integers, decimals, fractions, mixed numbers (`1\\frac12`, `1 1/2`), roots, pi, i, polynomials and their
      quotients are compared without rounding. 12.0000001 is not 12; 0.333 is not 1/3. The one tolerance: a decimal
      of ten or more significant digits stands for a reference that is no integer (1/3, \\sqrt2) if it is that number
      cut or rounded to its last digit; a printed float (15 digits) may be off by a relative 1e-14.
    * No factor of 100. A percent sign is a unit: 50% is 50 (and 50\\%), never 0.5.
    * Units are ignored if one side lacks them (18 dollars is 18, 45^\\circ is 45, \\$40 is 40); two known measures must
      be the same (5 cm is not 5 m). A single letter is a unit only inside \\text{}. Words such as thousand and million
      multiply.
    * 1e3 and 1.2e2 are numbers: programs print them. 1,000 is a thousand; `70,110` may also be a list of two.
    * `1(2)` is 2, as in algebra; two numbers side by side are no number.
    * Tuples and intervals are ordered, their brackets count: (1,2) is not [1,2]. Bare lists `1, 2` and sets {1, 2} are
      unordered; repeated elements count. Unions of intervals are unordered. Matrices go by entry, their brackets do not
      count.
    * `x = 5` is 5; two assignments need the same name. Equations are equal up to a rational factor.
    * A reference that is one capital letter is a choice: `E`, `(E)`, `E. 12` choose it. Words ignore case and dots.
    * Digits in a stated base (443_5) equal only themselves. Ratios 3:4 are not fractions.
    * Beyond the bounds (4,000 characters; exponents, factorials and expressions that explode) and for what is no
      mathematics (1/0, open brackets), only identical text is equal.
    * What is left (trigonometry, logarithms, higher roots, `1/2x`, what costs more than work.BUDGET) is decided by
      math-verify inside the sandbox with a hard limit; a time-out or crash there is "not equal". Without a sandbox
      they are equal only if their text is.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from rstar.grading.comparing import choice_matches, compare
from rstar.grading.forms import Form, readings
from rstar.grading.text import MAX_ANSWER_CHARS, clean, extract_answer
from rstar.grading.work import Exhausted
from rstar.types import ExecutionStatus

if TYPE_CHECKING:
    from rstar.sandbox import Sandbox

__all__ = ["Grader", "extract_answer", "is_equivalent_fast", "normalise"]

MAX_BITS = 14_000  # of an integer that Python writes in decimal: it refuses more than 4,300 digits
MAX_VERDICTS = 20_000  # that a grader keeps
SYMBOLIC_CPU_SECONDS = 2.0  # usual gradings take a twentieth of it


def normalise(text: str) -> str:
    """One spelling of an answer, for votes and tables: equal for answers that differ in LaTeX style only."""
    if len(text) > MAX_ANSWER_CHARS:
        return text.strip()
    cleaned = clean(text)
    forms = readings(cleaned)
    try:
        number = forms[0].value.rational() if forms[0].value is not None else None
    except Exhausted:
        return cleaned
    if number is not None and len(forms) == 1 and number.numerator.bit_length() < MAX_BITS:
        return str(number) if number.denominator == 1 or number.denominator < 10**9 else cleaned
    return cleaned


def is_equivalent_fast(answer: str, reference: str) -> bool | None:
    """Whether `answer` equals `reference` by the policy above; None if only the symbolic path can tell.

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
    wanted_text, wanted_forms = _read(reference)
    given = clean(answer)
    if given == wanted_text:
        return True
    chosen = choice_matches(given, wanted_text)
    if chosen is not None:
        return chosen
    given_forms = readings(given)
    try:
        verdicts = [compare(form, wanted) for form in given_forms for wanted in wanted_forms]
    except Exhausted:
        return None
    return True if True in verdicts else None if None in verdicts else False


@lru_cache(maxsize=4096)
def _read(reference: str) -> tuple[str, tuple[Form, ...]]:
    """References recur for every sample of a problem."""
    cleaned = clean(reference)
    return cleaned, readings(cleaned)


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
        """Whether `answer` equals `reference` by the module's policy. Never raises for any text."""
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
