"""Answers as structures: what kind of thing an answer is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import cache
from string import ascii_letters

from rstar.grading.exact import Hopeless, Quotient, Unreadable, constant
from rstar.grading.reading import read
from rstar.grading.text import MAX_ANSWER_CHARS
from rstar.grading.work import Exhausted, begin, charge

MAX_ELEMENTS = 64
MAX_NESTING = 8


class Kind(StrEnum):
    """What an answer is."""

    VALUE = "value"  # a closed form or polynomial, exactly known
    LIST = "list"  # `1, 2`: any order; also {1, 2}
    TUPLE = "tuple"  # (1, 2), [1, 2), ...: ordered, brackets count
    UNION = "union"  # [0,1] \\cup [2,3]: any order
    MATRIX = "matrix"
    ASSIGNMENT = "assignment"  # x = 5
    EQUATION = "equation"
    RELATION = "relation"  # x < 5
    RATIO = "ratio"  # 3:4
    WORDS = "words"
    OPAQUE = "opaque"  # mathematics that is not decided here
    HOPELESS = "hopeless"  # beyond the bounds or no mathematics; equal to nothing but itself


@dataclass(frozen=True)
class Form:
    """An answer as read: which fields are set depends on the kind."""

    kind: Kind
    text: str  # cleaned text; the brackets of a tuple, the name of an assignment, the sign of a relation
    parts: tuple[Form, ...] = ()
    value: Quotient | None = None
    unit: str = ""  # a measure, singular: "cm", "square foot", "degree", "percent"
    digits: int = 0  # significant digits if written as a decimal
    last_place: float = 0.0  # value of a unit in the last of them


NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_FRACTION = re.compile(r"([+-]?[0-9]+) ?/ ?([0-9]+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac ?\{([0-9]+)\} ?\{([0-9]+)\}")
_MIXED = re.compile(r"([+-]?)([0-9]+) ([0-9]+)/([0-9]+)")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_INNER_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array|smallmatrix)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_NAME = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]+\}))?'?(?:\([a-zA-Z]\))?")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|!=|<|>")
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_WORD = re.compile(r"([A-Za-z]{2,})\.?")
_POWER = re.compile(r"\^ ?(?:([23])|\{ ?([23]) ?\})$")
_BRACKET = re.compile(r"[(\[{}\])]")
_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 :'.,-]*")

_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "pi sqrt inf oo infinity sin cos tan cot sec csc log ln exp mod frac infty cdot times text le ge ne cup cap "
        "and or no am pm",
    )
)
_MEASURES = {
    "cm": "cm", "centimeter": "cm", "centimetre": "cm", "mm": "mm", "millimeter": "mm", "m": "m", "meter": "m",
    "metre": "m", "km": "km", "kilometer": "km", "kilometre": "km", "in": "inch", "inch": "inch", "inche": "inch",
    "ft": "foot", "feet": "foot", "foot": "foot", "yd": "yard", "yard": "yard", "mile": "mile", "mi": "mile",
    "dollar": "dollar", "usd": "dollar", "buck": "dollar", "cent": "cent", "euro": "euro", "pound": "pound",
    "lb": "pound", "ounce": "ounce", "oz": "ounce", "gram": "gram", "g": "gram", "kg": "kilogram",
    "kilogram": "kilogram", "second": "second", "sec": "second", "s": "second", "minute": "minute", "min": "minute",
    "hour": "hour", "hr": "hour", "h": "hour", "day": "day", "week": "week", "month": "month", "year": "year",
    "degree": "degree", "radian": "radian", "rad": "radian", "percent": "percent", "liter": "liter", "litre": "liter",
    "ml": "ml", "milliliter": "ml", "gallon": "gallon", "mph": "mph", "dozen": "dozen",
}  # fmt: skip


def parse(text: str, depth: int = 0) -> Form:
    """The structure of a cleaned answer."""
    try:
        return _parse(text.strip(), depth)
    except Hopeless:
        return Form(Kind.HOPELESS, text)


def _parse(text: str, depth: int) -> Form:
    if depth > MAX_NESTING:
        return Form(Kind.HOPELESS, text)
    if NUMBER.fullmatch(text):
        return _number(text)
    charge(10 + len(text) // 32)
    if text.startswith("{") and _closing(text, 0) == len(text) - 1 and "," not in text:
        return _parse(text[1:-1].strip(), depth + 1)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[1], matrix[2], depth)
    unions = _split(text, ("\\cup",))
    if len(unions) > 1:
        return Form(Kind.UNION, "", tuple(parse(part, depth + 1) for part in unions))
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    if _THOUSANDS.fullmatch(text):
        return _number(text.replace(",", ""))
    if ", " in text:
        text = _INNER_THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    elements = _split(text, (",", ";"))
    if len(elements) > 1:
        return _list(elements, depth)
    return _relation(text, depth) or _leaf(text, depth)


def readings(text: str) -> tuple[Form, ...]:
    """All readings of an answer: `70,110` is a number and a list of two. Begins the answer's budget."""
    begin()
    if len(text) > MAX_ANSWER_CHARS:  # one sign may have become a whole command
        return (Form(Kind.HOPELESS, text),)
    try:
        first = parse(text)
    except Exhausted:
        return (Form(Kind.OPAQUE, text),)
    if _THOUSANDS.fullmatch(text) and "." not in text:
        parts = text.split(",")
        if not any(part.startswith("0") for part in parts[1:]):
            return first, Form(Kind.LIST, text, tuple(_number(part) for part in parts))
    return (first,)


def _number(text: str) -> Form:
    value = constant(Fraction(text))
    if "." not in text:
        return Form(Kind.VALUE, text, value=value)
    mantissa, _, exponent = text.lower().partition("e")
    last_place = float(f"1e{int(exponent or 0) - len(mantissa.partition('.')[2])}")  # too large: inf, as is the error
    digits = len(mantissa.replace(".", "").lstrip("+-0"))
    return Form(Kind.VALUE, text, value=value, digits=digits, last_place=last_place)


def _matrix(name: str, body: str, depth: int) -> Form:
    rows = [row for row in _split(body, ("\\\\",)) if row.strip()]
    written = [_split(row, ("&",)) for row in rows]
    if sum(map(len, written)) > MAX_ELEMENTS:
        raise Hopeless("cells")
    cells = [[parse(cell, depth + 1) for cell in row] for row in written]
    kind = "det" if name in ("vmatrix", "Vmatrix") else "matrix"  # (..) and [..] around a matrix mean the same
    return Form(Kind.MATRIX, kind, tuple(Form(Kind.TUPLE, "()", tuple(row)) for row in cells))


def _bracketed(text: str, depth: int) -> Form | None:
    """A tuple, interval or set if one pair of brackets spans the text."""
    if text.startswith("\\{") and text.endswith("\\}"):
        inside = text[2:-2].strip()
        return _list(_split(inside, (",", ";")), depth) if inside else Form(Kind.LIST, "")
    if text == "\\emptyset":
        return Form(Kind.LIST, "")
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}" or _closing(text, 0) != len(text) - 1:
        return None
    elements = _split(text[1:-1], (",", ";"))
    if text[0] == "{":
        return _list(elements, depth)
    if len(elements) == 1 and _MATRIX.fullmatch(elements[0].strip()):
        return _parse(elements[0].strip(), depth + 1)
    if len(elements) == 1 and text[0] == "(":
        return _parse(elements[0].strip(), depth + 1) if text[-1] == ")" else None
    if len(elements) > MAX_ELEMENTS:
        raise Hopeless("elements")
    return Form(Kind.TUPLE, text[0] + text[-1], tuple(parse(element, depth + 1) for element in elements))


def _list(elements: Sequence[str], depth: int) -> Form:
    if len(elements) > MAX_ELEMENTS:
        raise Hopeless("elements")
    parts: list[Form] = []
    for element in elements:
        part = parse(element, depth + 1)
        parts.extend(part.parts if part.kind is Kind.LIST and "\\pm" in element else (part,))
    return Form(Kind.LIST, "", tuple(parts))


def _relation(text: str, depth: int) -> Form | None:
    sides = _split(text, ("=",)) if not _RELATION.search(text) else [text]
    member = _split(text, ("\\in ",))
    if len(member) == 2 and _NAME.fullmatch(member[0].strip()):
        sides = member
    if len(sides) == 2:
        left, right = (side.strip() for side in sides)
        if _NAME.fullmatch(left):
            return Form(Kind.ASSIGNMENT, left, (parse(right, depth + 1),), _difference(left, right))
        difference = _difference(left, right)
        return Form(Kind.OPAQUE, text) if difference is None else Form(Kind.EQUATION, text, value=difference)
    signs = _RELATION.findall(text)
    if len(signs) != 1 or len(sides) > 2:
        return Form(Kind.OPAQUE, text) if signs or len(sides) > 2 else None
    compared = [parse(side, depth + 1) for side in _RELATION.split(text)]
    sign = {"<=": "\\le", ">=": "\\ge", "!=": "\\ne"}.get(signs[0], signs[0])
    if sign in (">", "\\ge"):
        compared.reverse()
        sign = "<" if sign == ">" else "\\le"
    return Form(Kind.RELATION, sign, tuple(compared))


def _difference(left: str, right: str) -> Quotient | None:
    try:
        return read(left) - read(right)
    except Unreadable:
        return None


def _leaf(text: str, depth: int) -> Form:
    fraction = _FRACTION.fullmatch(text)
    if fraction and int(fraction[2]):
        return Form(Kind.VALUE, text, value=constant(Fraction(int(fraction[1]), int(fraction[2]))))
    fraction = _LATEX_FRACTION.fullmatch(text)
    if fraction and int(fraction[3]):
        return Form(Kind.VALUE, text, value=constant(Fraction(int(fraction[1] + fraction[2]), int(fraction[3]))))
    mixed = _MIXED.fullmatch(text)
    if mixed and 0 < int(mixed[3]) < int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return Form(Kind.VALUE, text, value=constant(-value if mixed[1] == "-" else value))
    body, unit, factor = _without_unit(text)
    if body != text:
        inner = _parse(body, depth + 1)
        if factor != 1:
            if inner.value is None or (number := inner.value.rational()) is None:
                return Form(Kind.OPAQUE, text)
            inner = Form(Kind.VALUE, text, value=constant(number * factor))
        return replace(inner, unit=unit or inner.unit)
    if "\\pm" in text:
        return _plus_minus(text, depth)
    ratio = _split(text, (":",))
    if len(ratio) > 1 and not any(c.isalpha() for c in text.replace("\\frac", "")):
        return Form(Kind.RATIO, "", tuple(parse(part, depth + 1) for part in ratio))
    words = _words(text)
    if words:
        return Form(Kind.WORDS, words)
    try:
        return Form(Kind.VALUE, text, value=read(text))
    except Unreadable:
        return Form(Kind.OPAQUE, text)


def _plus_minus(text: str, depth: int) -> Form:
    if text.count("\\pm") != 1:
        return Form(Kind.OPAQUE, text)
    both = tuple(parse(text.replace("\\pm", sign), depth + 1) for sign in ("+", "-"))
    return Form(Kind.LIST, "", both)


def _words(text: str) -> str:
    """Plain language, casefolded without dots and \\text{}; empty if the text is mathematics."""
    plain = TEXT.sub(r"\1", text)
    marked = plain != text
    plain = " ".join(plain.split())
    if not _WORDS.fullmatch(plain) and not (marked and re.fullmatch(r"[0-9A-Za-z :'.,-]*", plain)):
        return re.sub(r"\.", "", plain).casefold() if re.fullmatch(r"[0-9: ]+ ?[AaPp]\.?[Mm]\.?", plain) else ""
    letters = re.sub(r"[^A-Za-z]", "", plain)
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", plain)), default=0)
    known = plain.lower() in ("no", "on", "in", "up", "or", "is", "if", "am", "pm", "we", "he")
    if not letters or (not marked and longest < 3 and not known):
        return ""
    if any(word in plain.split() for word in ("sqrt", "pi", "inf")):
        return ""
    return plain.replace(".", "").casefold()


def _without_unit(text: str) -> tuple[str, str, int]:
    """(text without trailing units, measure, multiplier). A measure is empty for other words ("18 apples")."""
    body, measures, factor = text, list[str](), 1
    for _ in range(8):
        match, power = _last_word(body)
        if match is None:
            break
        marked = match.re is TEXT
        before = body[: match.start()].rstrip()
        word = match[1].strip().rstrip(".").lower()
        ahead = before.rstrip("/ ").removesuffix(" per")
        attached = before[-1:].isalnum() and not marked and body[match.start() - 1 : match.start()] != " "
        if not ahead or body[: match.start()].endswith("\\") or (not marked and word in _NOT_UNITS):
            break
        if (attached and not before[-1].isdigit()) or (marked and _is_base(before)):
            break
        if word in _MULTIPLIERS:
            factor *= _MULTIPLIERS[word]
        else:
            measures[:0] = [_measure(part, power) for part in word.replace("/", " per ").split()]
            measures[:0] = ["per"] if ahead != before and ahead else []
        body = ahead.rstrip()
    mathematical = any(c.isdigit() for c in body) or "\\pi" in body or re.fullmatch(r"[a-z]", body)
    if (
        body == text
        or not mathematical
        or re.search(r"(?<!\\)\b(?!sqrt\b|pi\b)[A-Za-z]{3,}", body.replace("\\text", ""))
    ):
        return text, "", 1
    known = [measure for measure in measures if measure]
    return body, " ".join(known), factor


def _last_word(body: str) -> tuple[re.Match[str] | None, str]:
    """The word or \\text{...} that ends the text, without its square or cube; looked for from the end."""
    raised = _POWER.search(body, max(0, len(body) - 7))
    end = raised.start() if raised else len(body)
    if body.endswith("}", 0, end):
        start, pattern = body.rfind("\\text", 0, max(0, body.rfind("{", 0, end))), TEXT
    else:
        start, pattern = len(body[:end].removesuffix(".").rstrip(ascii_letters)), _WORD
    match = pattern.fullmatch(body, start, end) if start >= 0 else None
    return match, (raised[1] or raised[2]) if raised else ""


def _is_base(before: str) -> bool:
    return before.endswith("_") or before.endswith("_{")


def _measure(word: str, power: str) -> str:
    if word in ("square", "sq", "cubic", "cu"):
        return {"sq": "square", "cu": "cubic"}.get(word, word)
    single = _MEASURES.get(word) or _MEASURES.get(word.removesuffix("s")) or ("per" if word == "per" else "")
    return {"2": "square ", "3": "cubic "}.get(power, "") + single if single else ""


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; -1 if none. (0,1] counts as a pair."""
    charge(len(text) // 8)
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        if bracket[0] in "([{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return bracket.start()
    return -1


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Cut at separators outside all brackets and environments."""
    if not any(separator in text for separator in separators):
        return [text]
    charge(len(text) // 4)
    parts, depth, start = list[str](), 0, 0
    for match in _cutter(separators).finditer(text):
        found = match[0]
        if found in ("(", "[", "{", "\\begin"):
            depth += 1
        elif found in (")", "]", "}", "\\end"):
            depth -= 1
        elif depth <= 0 and found in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    charge(8 * len(parts))  # each will be read
    return [*parts, text[start:]]


@cache
def _cutter(separators: tuple[str, ...]) -> re.Pattern[str]:
    """What _split looks at; a double backslash is one sign: the second opens no command."""
    return re.compile("|".join(map(re.escape, ("\\\\", "\\begin", "\\end", *"([{}])", *separators))))
