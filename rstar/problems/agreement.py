"""The reference answer of a synthetic problem: what enough of its synthesiser's solutions agree on.

rStar-Math lets a large model write problems and 10 solutions of each, and keeps a problem where at least 3 agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_DROPPED = re.compile(r"\\left|\\right|\\[,;! ]|[\s$]+|\.$")
_FRACTION = re.compile(r"(-?)\\frac\{?(\d{1,30}?)\}?\{?(\d{1,30})\}?")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d{1,30})?(\.\d{1,30})?(/\d{1,30})?")


def agreeing_answer(answers: Sequence[str], needed: int) -> str | None:
    """The answer that most of `answers` give, in its first spelling, if at least `needed` do; None otherwise.

    Empty answers count for nothing. A tie has no majority to go by, so it is None too.
    """
    spellings: dict[str, str] = {}
    for answer in answers:
        spellings.setdefault(answer_key(answer), answer.strip())
    votes = Counter(answer_key(answer) for answer in answers if answer.strip()).most_common(2)
    if not votes or votes[0][1] < needed or (len(votes) == 2 and votes[0][1] == votes[1][1]):
        return None
    return spellings[votes[0][0]]


def answer_key(answer: str) -> str:
    """Equal for answers that differ in spacing, dollar signs or the spelling of a number (0.5, 1/2, \\frac12)."""
    text = _DROPPED.sub("", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    if match := _FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}"
    if text and _NUMBER.fullmatch(text):
        try:
            whole, _, below = text.replace(",", "").partition("/")
            return str(Fraction(whole) / Fraction(below or "1"))
        except (ValueError, ZeroDivisionError):  # "." or "1/0": no number, compared as text
            return text
    return text.casefold()
