"""Is an answer equal to the reference? An explicit, strict policy, bounded in time and size, never eval in our process.

    extract.py      the one reader of answers: outputs, solutions, references
    text.py         one spelling; units; tables.py holds what they know by name
    reading.py      what kind of thing an answer is; expressions.py parses the mathematics in it
    equivalence.py  the comparison and the Grader; exact.py its arithmetic, work.py its budget
    symbolic.py     the same comparison in the sandbox, with sympy and math-verify

Policy
    * Exact. Integers, decimals, fractions, mixed numbers (`1\\frac12`, `1 1/2`), repeating decimals, roots, pi, i,
      polynomials and their quotients are compared without rounding. 0.333 is not 1/3, and integers have no tolerance.
    * Floats. A decimal with a point and ten or more significant digits equals an integer or fraction that it differs
      from by less than a relative 1e-9 (2.0000000000000004 is 2), and an irrational number cut or rounded to its last
      digit; a printed float (15 digits) may be off by a relative 1e-14.
    * Percent. No factor of 100. A percent sign is a unit: 50% is 50 (and 50\\%), never 0.5.
    * Units. What tables.py names is a unit: measures, currencies, counted things. Units are ignored if one side lacks
      them (18 dollars is 18, 45^\\circ is 45, \\$40 is 40); two measures must be the same (5 cm is not 5 m). Letters
      that are no known unit are variables (5xy is not 5), other words make another answer (`5 or more`, `5 squared`).
      A single letter is a unit only inside \\text{} or after "per". Thousand and million multiply.
    * Commas. 1,000 is a thousand, whatever stands beside it (\\$1,234, x = 1,234, 12,345^\\circ). `70,110` alone may
      also be a list of two, and `(1,234)` is a pair unless it is compared with a number without a comma.
    * Numbers. 1e3 and 1.2e2 are numbers: programs print them. `1(2)` is 2, as in algebra; two numbers side by side are
      no number. Infinity is a value, arithmetic with it is none.
    * Brackets. Tuples and intervals are ordered, their brackets count: (1,2) is not [1,2], \\langle 1,2 \\rangle is
      neither. Bare lists `1, 2` and sets {1, 2} are unordered; repeated elements count. A printed list `[1, 2]` (with
      its space) is also the bare list. Matrices go by entry, their brackets do not count.
    * Intervals and inequalities. x > 3 is (3,\\infty), in both directions; unions are compared as sets.
    * Names and equations. `x = 5` is 5; two assignments need the same name. Equations are equal up to a rational
      factor. A chain `a = b = 5` is 5 only if all its sides agree; of `5/6 \\approx 0.83` the exact side counts.
    * Choices. A reference that is one capital letter is a choice: `E`, `(E)`, `E. 12`, `E - text` choose it. `B) 72
      apples` is chosen by B and by 72. Words ignore case and dots.
    * Angles. Degrees inside functions are angles (\\sin 30^\\circ is a half); elsewhere they are a unit.
    * Python and sympy. What they print is read as such: powers, sqrt, exp, log (the natural one), I and j, E, oo,
      Matrix, Fraction, Eq, Interval, Union, sets, dicts.
    * Digits in a stated base (443_5) equal only themselves. Ratios 3:4 are not fractions; times of day are compared
      with their am and pm where both have it.
    * Beyond the bounds (4,000 characters; exponents, factorials and expressions that explode) and for what is no
      mathematics (1/0, open brackets), only identical text is equal.
    * What is left (trigonometry, logarithms, higher roots, `1/2x`, what costs more than work.BUDGET) is decided by
      sympy and math-verify inside the sandbox with a hard limit; a time-out or crash there is "not equal". Without a
      sandbox they are equal only if their text is.
"""

from __future__ import annotations

from rstar.grading.equivalence import Grader, is_equivalent_fast, normalise
from rstar.grading.extract import extract_answer, reference_answer, why_unreadable

__all__ = ["Grader", "extract_answer", "is_equivalent_fast", "normalise", "reference_answer", "why_unreadable"]
