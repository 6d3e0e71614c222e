"""The sandbox entry "grade": are two closed forms equal? math-verify, run behind the wall with the wall's limits.

Only pairs that rstar.grading cannot decide exactly come here. math-verify's own timers are off: they need the main
thread's alarm, and the sandbox bounds CPU time, wall time and memory anyway. Rounding is far finer than its defaults
(6 digits would take 0.333333 for 1/3).
"""

from __future__ import annotations

import json
import logging

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

DIGITS = 12
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]


def grade(payload: str) -> str:
    """ "1" if the answer in the JSON list [answer, reference] equals the reference, else "0"."""
    answer, reference = json.loads(payload)
    given, wanted = _expression(answer), _expression(reference)
    if given is None or wanted is None:
        return "0"
    same = verify(wanted, given, float_rounding=DIGITS, numeric_precision=DIGITS + 8, strict=True, timeout_seconds=None)
    return "1" if same else "0"


def _expression(text: str) -> Basic | MatrixBase | None:
    if text.count("{") != text.count("}"):
        return None
    found = parse(f"$\\boxed{{{text}}}$", extraction_config=_CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    return next((item for item in found if isinstance(item, Basic | MatrixBase)), None)


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
    ("\\{1, \\sin 2\\}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
)
for pair in _WARM_UP:
    grade(json.dumps(pair))
