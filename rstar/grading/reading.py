"""Text -> structure: what kind of thing an answer is (number, set, interval, matrix, ...) and what is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from rstar.grading import tables
from rstar.grading.exact import EXACT, Quotient, constant
from rstar.grading.expressions import Hopeless, Unreadable, read
from rstar.grading.text import MAX_ANSWER_CHARS, TEXT, closing, split, units_of
from rstar.grading.work import Exhausted, begin, charge

MAX_ELEMENTS = 64
MAX_NESTING = 8


class Kind(StrEnum):
    """What an answer is."""

    VALUE = "value"  # a closed form or polynomial, exactly known
    LIST = "list"  # `1, 2` (text: ""), {1, 2} (text: "set"), a printed [1, 2] (text: "list"): any order
    TUPLE = "tuple"  # (1, 2), [1, 2), ...: ordered, brackets count
    UNION = "union"  # [0,1] \\cup [2,3]: any order
    MATRIX = "matrix"
    ASSIGNMENT = "assignment"  # x = 5; also x < 5, which is x in (-oo, 5)
    CHAIN = "chain"  # 2 + 3 = 5, x = 10/2 = 5: what is said to be equal, after the name
    EQUATION = "equation"
    RELATION = "relation"  # x < y
    RATIO = "ratio"  # 3:4, also times of day
    WORDS = "words"
    OPAQUE = "opaque"  # mathematics that is not decided here
    HOPELESS = "hopeless"  # beyond the bounds or no mathematics; equal to nothing but itself


@dataclass(frozen=True)
class Form:
    """An answer as read: which fields are set depends on the kind."""

    kind: Kind
    text: str  # cleaned text; the brackets of a tuple, the name of an assignment, the signs of a relation
    parts: tuple[Form, ...] = ()
    value: Quotient | None = None
    unit: str = ""  # a measure, singular: "cm", "square foot", "degree", "percent"; "am", "pm"
    digits: int = 0  # significant digits if written as a decimal
    last_place: float = 0.0  # value of a unit in the last of them


NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_RUN = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+"  # of thousands
_THOUSANDS = re.compile(rf"[+-]?{_RUN}(?:\.[0-9]+)?")
_IN_BRACKETS = re.compile(rf"\(+({_THOUSANDS.pattern})\)+")
_RUN_OR_BRACKET = re.compile(rf"\\?[(\[{{}}\])]|(?<![0-9.,]){_RUN}(?![0-9]|,[0-9])")
_MIXED = re.compile(r"([+-]?)([0-9]+) ([0-9]+)/([0-9]+)")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array|smallmatrix)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CALL = re.compile(r"(Matrix|Eq|Ne|Interval(?:\.[LR]?open)?|Union|FiniteSet|frozenset|set|list|tuple|array)\((.*)\)")
_LETTER = rf"(?:[a-zA-Z]|\\(?:{'|'.join(tables.SYMBOLS)})(?![a-zA-Z]))(?:_(?:[a-zA-Z0-9]|\{{[a-zA-Z0-9]+\}}))?"
_NAME = re.compile(
    rf"{_LETTER}'?(?:\([a-zA-Z]\))?|[a-wA-W]\(-?[0-9]{{1,4}}\)"  # f(3) = 7, but x(3) = 6 is 3x = 6
    rf"|[a-zA-Z]{{4,20}}|\\text ?\{{[^{{}}]*\}}|\({_LETTER}(?:, ?{_LETTER})+\)"
)
_VARIABLE = re.compile(_LETTER)
_UNKNOWN = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|pi|oo|inf|exp|log|ln|e)(?![a-zA-Z]))[a-zA-Z]")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|!=|<|>")
_SIGNS = {"<=": "\\le", ">=": "\\ge", "!=": "\\ne"}
_TURNED = {">": "<", "\\ge": "\\le"}
_TIME = re.compile(r"(?:\\text ?\{)? ?([AaPp])\.? ?[Mm]\.? ?\}?$")
_ENTRY = re.compile(rf"({_LETTER}|[a-zA-Z]+[0-9]*): (.+)")
_SENTENCE = re.compile(r"[A-Za-z][A-Za-z0-9 :'.,/-]*")
_PRINTED_NAMES = re.compile(r"(?<![A-Za-z\\])[IE](?![A-Za-z])|(?<=[0-9])[jJ](?![A-Za-z])")
_PROSE = re.compile(
    r"\\text|(?<![\\A-Za-z])(?:not|no|or|and|than|per|mod|max|min|all|any|the|are|for|but|is|to|of|at|by|as)(?![A-Za-z])"
)
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")


def readings(text: str, *, alone: bool = True) -> tuple[Form, ...]:
    """All readings of a cleaned answer. Begins its budget.

    `70,110` is a number and a list of two, `[1, 2]` a pair and a printed list, I and E in what sympy prints are i and
    e. `alone`: no comma stands in what it is compared with, so that `(1,234)` may be a number.
    """
    begin()
    if len(text) > MAX_ANSWER_CHARS:  # one sign may have become a whole command
        return (Form(Kind.HOPELESS, text),)
    try:
        found = [parse(text)]
        if _THOUSANDS.fullmatch(text) and "." not in text and not re.search(",0", text):
            found.append(Form(Kind.LIST, "", tuple(_number(part) for part in text.split(","))))
        if alone and (inside := _IN_BRACKETS.fullmatch(text)):
            found.append(_number(inside[1].replace(",", "")))
        if text.startswith("[") and closing(text, 0) == len(text) - 1 and "," not in text.replace(", ", ""):
            found.append(_list(split(text[1:-1], (",",)), 0, "list"))
            found += found[-1].parts if len(found[-1].parts) == 1 else ()
        if _PRINTED_NAMES.search(text):
            found.append(parse(_PRINTED_NAMES.sub(lambda m: "e" if m[0] == "E" else "i", text)))
    except Exhausted:
        return (Form(Kind.OPAQUE, text),)
    except Hopeless:  # of a reading beside the first
        pass
    return tuple(found)


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
    if text.startswith("{") and closing(text, 0) == len(text) - 1 and "," not in text and ":" not in text:
        return _parse(text[1:-1].strip(), depth + 1)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [split(row, ("&",)) for row in split(matrix[2], ("\\\\",)) if row.strip()]
        return _matrix(rows, depth, "det" if matrix[1] in ("vmatrix", "Vmatrix") else "matrix")
    call = _CALL.fullmatch(text)
    if call and closing(text, call.start(2) - 1) == len(text) - 1:
        return _call(call[1], call[2], depth)
    for separator in ("\\cup", " | ", " & "):
        parts = split(text, (separator,))
        if len(parts) > 1:
            found = tuple(parse(part, depth + 1) for part in parts)
            return _both(found, text) if separator == " & " else _either(found)
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    if _THOUSANDS.fullmatch(text):
        return _number(text.replace(",", ""))
    elements = split(_joined(text), (",", ";"))
    if len(elements) > 1:
        return _list(elements, depth)
    return _relation(elements[0], depth) or _leaf(elements[0], depth)


def _number(text: str) -> Form:
    value = constant(Fraction(text))
    if "." not in text:
        return Form(Kind.VALUE, text, value=value)
    mantissa, _, exponent = text.lower().partition("e")
    last_place = float(f"1e{int(exponent or 0) - len(mantissa.partition('.')[2])}")  # too large: inf, as is the error
    digits = len(mantissa.replace(".", "").lstrip("+-0"))
    return Form(Kind.VALUE, text, value=value, digits=digits, last_place=last_place)


def _joined(text: str, *, bracketed: bool = False) -> str:
    """Numbers without their thousands commas, except inside brackets, where `(1,234)` is a pair and `1,000` is none."""
    if "," not in text:
        return text
    depth = int(bracketed and ", " not in text)

    def number(found: re.Match[str]) -> str:
        nonlocal depth
        piece = found[0]
        if piece[-1].isdigit():
            return piece.replace(",", "") if depth <= 0 or ",0" in piece else piece
        depth += (piece in ("(", "[", "\\{")) - (piece in (")", "]", "\\}"))
        return piece

    return _RUN_OR_BRACKET.sub(number, text)


def _matrix(rows: Sequence[Sequence[str]], depth: int, kind: str = "matrix") -> Form:
    """(..) and [..] around a matrix mean the same."""
    if sum(map(len, rows)) > MAX_ELEMENTS:
        raise Hopeless("cells")
    cells = (tuple(parse(cell, depth + 1) for cell in row) for row in rows)
    return Form(Kind.MATRIX, kind, tuple(Form(Kind.TUPLE, "()", row) for row in cells))


def _call(name: str, inside: str, depth: int) -> Form:
    """What sympy and Python print as a call."""
    arguments = [argument.strip() for argument in split(inside, (",",))]
    if name == "Matrix":
        rows = [row.strip() for row in split(inside.strip()[1:-1], (",",))]
        return _matrix([split(row[1:-1], (",",)) if row.startswith("[") else [row] for row in rows], depth)
    if name in ("Eq", "Ne") and len(arguments) == 2:
        return _parse((" = " if name == "Eq" else " \\ne ").join(arguments), depth + 1)
    if name.startswith("Interval") and len(arguments) in (2, 3, 4):
        opened = [name.endswith((".open", ".L" + "open")), name.endswith((".open", ".Ropen"))]
        opened = [flag or "True" in arguments[i : i + 1] for i, flag in zip((2, 3), opened, strict=True)]
        ends = tuple(parse(argument, depth + 1) for argument in arguments[:2])
        opened = [flag or "\\infty" in end.text or "oo" in end.text for flag, end in zip(opened, ends, strict=True)]
        return Form(Kind.TUPLE, "[("[opened[0]] + "])"[opened[1]], ends)
    if name == "Union":
        return Form(Kind.UNION, "", tuple(parse(argument, depth + 1) for argument in arguments))
    if name in ("list", "tuple", "array"):
        return _parse(inside, depth + 1)
    inner = inside.strip().removeprefix("[").removesuffix("]") if name == "set" else inside.strip().strip("{}")
    return _list(split(inner, (",",)), depth, "set") if inner else Form(Kind.LIST, "set")


def _either(parts: tuple[Form, ...]) -> Form:
    """A union of sets; `(x < 1) | (x > 2)` is one of x."""
    if all(part.kind is Kind.ASSIGNMENT and part.text == parts[0].text for part in parts):
        return replace(parts[0], parts=(Form(Kind.UNION, "", tuple(part.parts[0] for part in parts)),))
    return Form(Kind.UNION, "", parts)


def _both(parts: Sequence[Form], text: str) -> Form:
    """`(1 < x) & (x < 3)`: one bound from each."""
    bounds = [part.parts[0] for part in parts if part.kind is Kind.ASSIGNMENT and part.parts[0].kind is Kind.TUPLE]
    if len(bounds) != len(parts) or len({part.text for part in parts}) > 1:
        return Form(Kind.OPAQUE, text)
    low = [one for one in bounds if one.parts[0].text != "-\\infty"]
    high = [one for one in bounds if one.parts[-1].text != "\\infty"]
    if len(low) > 1 or len(high) > 1:
        return Form(Kind.OPAQUE, text)
    first, last = (low or bounds)[0], (high or bounds)[0]
    interval = Form(Kind.TUPLE, first.text[0] + last.text[1], (first.parts[0], last.parts[1]))
    return replace(parts[0], parts=(interval,))


def _bracketed(text: str, depth: int) -> Form | None:
    """A tuple, interval or set if one pair of brackets spans the text."""
    for opening, ending, brackets in (("\\{", "\\}", "{}"), ("\\langle", "\\rangle", "<>")):
        if opening and text.startswith(opening) and text.endswith(ending):
            if opening == "\\langle" and opening in text[1:]:
                return None
            text = brackets[0] + text[len(opening) : -len(ending)].strip() + brackets[1]
            break
    if text in ("\\emptyset", "EmptySet", "{}"):
        return Form(Kind.LIST, "set")
    if len(text) < 2 or text[0] not in "([{<" or text[-1] not in ")]}>":
        return None
    if text[0] != "<" and closing(text, 0) != len(text) - 1:
        return None
    elements = split(_joined(text[1:-1], bracketed=True), (",", ";"))
    entries = [_ENTRY.fullmatch(element.strip()) for element in elements]
    if text[0] == "{" and all(entries):  # a printed dict
        equations = [f"{entry[1]} = {entry[2]}" for entry in entries if entry]
        return _list(equations, depth) if len(equations) > 1 else _parse(equations[0], depth + 1)
    if text[0] == "{":
        return _list(elements, depth, "set")
    inside = elements[0].strip()
    if len(elements) == 1 and text[0] != "<" and (text[0] == "(" or _MATRIX.fullmatch(inside) or inside[:1] == "{"):
        return _parse(inside, depth + 1) if text[-1] == ")" or text[0] == "[" else None
    if len(elements) > MAX_ELEMENTS:
        raise Hopeless("elements")
    return Form(Kind.TUPLE, text[0] + text[-1], tuple(parse(element, depth + 1) for element in elements))


def _list(elements: Sequence[str], depth: int, kind: str = "") -> Form:
    if len(elements) > MAX_ELEMENTS:
        raise Hopeless("elements")
    parts: list[Form] = []
    for element in elements:
        part = parse(element, depth + 1)
        parts.extend(part.parts if part.kind is Kind.LIST and "\\pm" in element else (part,))
    return Form(Kind.LIST, kind, tuple(parts))


def _relation(text: str, depth: int) -> Form | None:
    """Equations, inequalities and memberships; what bounds a single name is read as the interval that it lies in."""
    near = split(text, ("\\approx",))
    if len(near) > 1:  # of `\frac56 \approx 0.83` the exact side counts
        named = _NAME.fullmatch(near[0].strip())
        return _parse(f"{near[0]} = {near[1]}" if named and len(near) == 2 else near[0].strip(), depth + 1)
    member = [side.strip() for side in split(text, ("\\in ", "\\in("))]
    if len(member) == 2 and _NAME.fullmatch(member[0]):
        return Form(Kind.ASSIGNMENT, member[0], (parse(text[text.index("\\in") + 3 :], depth + 1),))
    signs = _RELATION.findall(text)
    sides = [side.strip() for side in (_RELATION.split(text) if signs else split(text, ("=",)))]
    if len(sides) < 2:
        return None
    if signs:
        mixed = "=" in re.sub("[<>!]=", "", text) or len(sides) > 3
        return Form(Kind.OPAQUE, text) if mixed else _inequality(sides, [_SIGNS.get(s, s) for s in signs], depth)
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):
        sides.reverse()
    if _NAME.fullmatch(sides[0]):
        name = re.sub(r"\\text|[\s{}]", "", sides[0])
        inner = parse(sides[1], depth + 1) if len(sides) == 2 else _chain(sides[1:], depth)
        return Form(Kind.ASSIGNMENT, name, (inner,), _difference(*sides) if len(sides) == 2 else None)
    difference = _difference(*sides) if len(sides) == 2 else None
    known = difference is not None and (not difference.numerator or difference.real() is not None)
    if len(sides) > 2 or known or not _UNKNOWN.search(text):
        return _chain(sides, depth)
    return Form(Kind.OPAQUE, text) if difference is None else Form(Kind.EQUATION, text, value=difference)


def _chain(sides: Sequence[str], depth: int) -> Form:
    charge(10 * len(sides))
    if len(sides) > MAX_NESTING:
        raise Hopeless("sides")
    return Form(Kind.CHAIN, "", tuple(parse(side, depth + 1) for side in sides))


def _inequality(sides: list[str], signs: list[str], depth: int) -> Form:
    if signs[0] in _TURNED:
        signs, sides = [_TURNED.get(sign, "") for sign in reversed(signs)], sides[::-1]
    if "" in signs or (len(signs) > 1 and not set(signs) <= {"<", "\\le"}):
        raise Hopeless("signs that differ")
    compared = [parse(side, depth + 1) for side in sides]
    name = next((side for side in sides if _VARIABLE.fullmatch(side) and side not in ("e", "\\pi", "\\infty")), "")
    if not name or any(_UNKNOWN.search(side) for side in sides if side != name) or sides.index(name) == len(signs) > 1:
        return Form(Kind.RELATION, " ".join(signs), tuple(compared))
    low, high = (Form(Kind.VALUE, sign + "\\infty", value=read(sign + "\\infty", EXACT)) for sign in ("-", ""))
    if signs == ["\\ne"]:
        point = compared[1 - sides.index(name)]
        ends = Form(Kind.TUPLE, "()", (low, point)), Form(Kind.TUPLE, "()", (point, high))
        return Form(Kind.ASSIGNMENT, name, (Form(Kind.UNION, "", ends),))
    place = sides.index(name)
    left = "(" if place == 0 or signs[0] == "<" else "["
    right = ")" if place == len(signs) or signs[-1] == "<" else "]"
    ends = compared[0] if place else low, compared[-1] if place < len(signs) else high
    return Form(Kind.ASSIGNMENT, name, (Form(Kind.TUPLE, left + right, ends),))


def _difference(left: str, right: str) -> Quotient | None:
    try:
        return read(left, EXACT) - read(right, EXACT)
    except (Unreadable, Hopeless):
        return None


def _leaf(text: str, depth: int) -> Form:
    mixed = _MIXED.fullmatch(text)
    if mixed and 0 < int(mixed[3]) < int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return Form(Kind.VALUE, text, value=constant(-value if mixed[1] == "-" else value))
    time = _TIME.search(text, max(0, len(text) - 16))
    ratio = split(text[: time.start()] if time else text, (":",))
    if len(ratio) > 1 and not any(c.isalpha() for c in "".join(ratio).replace("\\frac", "")):
        parts = tuple(parse(part, depth + 1) for part in ratio)
        return Form(Kind.RATIO, "", parts, unit=f"{time[1].lower()}m" if time else "")
    for body, unit, factor in units_of(text):
        inner = parse(body, depth + 1)
        if inner.kind in (Kind.WORDS, Kind.HOPELESS) or inner.unit:
            continue
        if factor != 1:
            if inner.value is None or (number := inner.value.rational()) is None:
                continue
            inner = Form(Kind.VALUE, text, value=constant(number * factor))
        return replace(inner, unit=unit)
    if "\\pm" in text:
        if text.count("\\pm") != 1:
            return Form(Kind.OPAQUE, text)
        return Form(Kind.LIST, "", tuple(parse(text.replace("\\pm", sign), depth + 1) for sign in ("+", "-")))
    plain = " ".join(TEXT.sub(r"\1", text).split())
    words = plain.replace(".", "").casefold()
    longest = max(map(len, re.findall("[A-Za-z]+", plain)), default=0)
    short = longest < 3 and words not in ("no", "on", "in", "up", "or", "is", "if", "am", "pm", "we", "he")
    if _SENTENCE.fullmatch(plain) and not (short and plain == text) and plain not in tables.PLAIN_SYMBOLS:
        return Form(Kind.WORDS, words)
    try:
        return Form(Kind.VALUE, text, value=read(text, EXACT))
    except Unreadable:
        prose = _PROSE.search(text) or any(word not in tables.FUNCTIONS for word in _LONG_WORD.findall(text))
        return Form(Kind.WORDS, words) if prose else Form(Kind.OPAQUE, text)
