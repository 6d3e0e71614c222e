"""GSM8K's calculator: arithmetic inside `<<48/2=24>>`, computed exactly while a model writes it.

An expression is read by a grammar of our own (numbers, + - * / //, brackets, signs; commas between digits are dropped)
and computed in fractions. Text and sizes are bounded, so no expression a model can write costs more than microseconds;
what the grammar does not take has no result, and sampling goes on as if there were no calculator. Training Verifiers to
Solve Math Word Problems (Cobbe et al. 2021), section 4 and appendix C.
"""

from __future__ import annotations

import re
from fractions import Fraction

OPEN, CLOSE = "<<", ">>"
MAX_CHARS = 200  # of an expression; GSM8K's longest has 64
MAX_DEPTH = 20  # open brackets and signs
MAX_DIGITS = 60  # of a result's numerator or denominator, on the way too
SHOWN_CHARS = 32  # a longer result is not written

_TOKEN = re.compile(r"\s*(//|[-+*/()]|[0-9]+\.?[0-9]*|\.[0-9]+)")
_NUMBER = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_PLAIN = re.compile(
    rf"(?<![0-9.<])(?P<left>[-(]*[$€£]?{_NUMBER}\)*(?:\s*[-+*/]\s*\(*[$€£]?{_NUMBER}\)*)+)"
    rf"\s*=\s*[$€£]?(?P<right>-?{_NUMBER})(?!\.?[0-9])"
)


class _NoResult(Exception):
    """The text is no expression of the grammar, or has no bounded value."""


def calculate(text: str) -> Fraction | None:
    """Value of the annotation that `text` has just ended with "="; None where there is nothing to calculate.

    The annotation is what follows the last `<<`; it must not be closed, and what stands before its first "=" counts.
    """
    _, opened, inside = text.rpartition(OPEN)
    if not opened or "=" not in inside or CLOSE in inside:
        return None
    return evaluate(inside.partition("=")[0])


def completion(text: str) -> str | None:
    """What is written for the model after `text`, which ends with "=": the result and `>>`; None for nothing."""
    value = calculate(text)
    shown = None if value is None else written(value)
    return None if shown is None else shown + CLOSE


def filled_in(text: str, known: int = 0) -> str | None:
    """What stands in the place of `text`, whose last part, from `known` on, a model has just written.

    The text up to the first new "=" that ends the expression of an open annotation, then the result and `>>`: what the
    model wrote behind that "=" is dropped, wherever its tokens end. None where no new "=" has a result. Every engine
    asks this one function, so all of them make the same text of what a model wants to write.
    """
    end = text.find("=", known) + 1
    while end:
        if (result := completion(text[:end])) is not None:
            return text[:end] + result
        end = text.find("=", end) + 1
    return None


def evaluate(expression: str) -> Fraction | None:
    """Exact value of an arithmetic expression; None where it is none, divides by zero or is out of bounds."""
    if len(expression) > MAX_CHARS:
        return None
    text, tokens, place = expression.replace(",", "").strip(), list[str](), 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        tokens.append(match[1])
        place = match.end()
    tokens.reverse()  # the next token is the last one
    try:
        value = _sum(tokens, MAX_DEPTH)
    except _NoResult:
        return None
    return None if tokens else value


def written(value: Fraction) -> str | None:
    """A value as GSM8K writes it: 24, 0.2; all digits of a decimal that ends, else as a float prints; None: too long.

    The original calculator prints Python's own floats (24.0, 0.30000000000000004).
    """
    shown = str(value.numerator) if value.denominator == 1 else _decimal(value)
    return shown if len(shown) <= SHOWN_CHARS else None


def annotate(text: str) -> str:
    """`text` with `<<...>>` before the result of each plain calculation that comes out; other text is left as it is.

    "48/2 = 24 clips" becomes "48/2 = <<48/2=24>>24 clips". A line that has annotations already keeps them.
    """

    def insert(match: re.Match[str]) -> str:
        left, right = re.sub(r"[\s,$€£]", "", match["left"]), match["right"]
        if evaluate(left) is None or evaluate(left) != evaluate(right):
            return match[0]
        return match[0].removesuffix(right) + f"{OPEN}{left}={right.replace(',', '')}{CLOSE}{right}"

    return "\n".join(line if OPEN in line else _PLAIN.sub(insert, line) for line in text.split("\n"))


def _decimal(value: Fraction) -> str:
    rest, digits = value.denominator, 0
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest, digits = rest // (10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5), digits + 1
    if rest != 1:
        return repr(float(value))
    scaled = abs(value.numerator) * 10**digits // value.denominator
    whole, part = divmod(scaled, 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{digits}d}".rstrip("0")


def _sum(tokens: list[str], depth: int) -> Fraction:
    value = _product(tokens, depth)
    while tokens and tokens[-1] in "+-":
        sign = tokens.pop()
        value = _bounded(value + _product(tokens, depth) if sign == "+" else value - _product(tokens, depth))
    return value


def _product(tokens: list[str], depth: int) -> Fraction:
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in ("*", "/", "//"):
        sign, other = tokens.pop(), _factor(tokens, depth)
        if sign != "*" and not other:
            raise _NoResult
        value = _bounded(value * other if sign == "*" else value / other if sign == "/" else Fraction(value // other))
    return value


def _factor(tokens: list[str], depth: int) -> Fraction:
    token = tokens.pop() if tokens else ")"
    if token in "+-" and depth:
        value = _factor(tokens, depth - 1)
        return value if token == "+" else -value
    if token == "(" and depth:
        value = _sum(tokens, depth - 1)
        if not tokens or tokens.pop() != ")":
            raise _NoResult
        return value
    if token[0] not in "0123456789.":
        raise _NoResult
    return _bounded(Fraction(token))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise _NoResult
    return value
