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

from rstar.grading.equivalence import Grader, is_equivalent_fast, normalise
from rstar.grading.extract import extract_answer, reference_answer, why_unreadable

__all__ = ["Grader", "extract_answer", "is_equivalent_fast", "normalise", "reference_answer", "why_unreadable"]
