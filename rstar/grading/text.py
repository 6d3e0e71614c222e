"""One spelling of an answer, cutting it at signs outside its brackets, and taking its unit off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from rstar.grading import tables
from rstar.grading.extract import last_boxed
from rstar.grading.work import charge

MAX_ANSWER_CHARS = 4000  # an answer beyond this is compared as text only
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_BRACKET = re.compile(r"[(\[{}\])]")
_ROOT_SIGN = re.compile("\u221a\\s*(\\([^()]*\\)|[0-9]+|[a-z])")
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg|displaystyle|textstyle|limits|mathstrut|hfill)(?![a-zA-Z])"
    r"|(?<!\\)\\!|\\phantom\{[^{}]*\}"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;: >]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|hspace\{[^{}]*\}|enspace(?![a-zA-Z]))|~")
_SAME_COMMANDS = re.compile(rf"\\({'|'.join(tables.SAME_COMMANDS)})(?![a-zA-Z])")
_TEXT_COMMANDS = re.compile(
    r"\\(?:mathrm|textbf|textit|mathbf|mathit|mbox|textrm|operatorname|textnormal|hbox|textsf|rm)\s*\{"
)
_REALS = re.compile(
    r"\\(?:mathbb|Bbb)\s*(?:\{\s*R\s*\}|R(?![a-zA-Z]))|\bReals\b|\ball real(?: number)?s\b", re.IGNORECASE
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])")
_REPEATING = re.compile(r"([0-9]{0,30})\.([0-9]{0,30})\\(?:overline|bar|dot)\s*\{?([0-9]{1,30})\}?")
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_TEXT_NUMBER = re.compile(r"\\text\s*\{\s*([-+]?[0-9][0-9.,]*)\s*\}")
_AND_OR = re.compile(r"(,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*)|\\text\s*\{[^{}]*\}", re.IGNORECASE)
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\s?\\!|\\[,!:;])(?=[0-9]{3}(?![0-9]))")
_MATH_MODE = re.compile(r"(?<!\\)\\[()\[\]]|\$")
_PRINTED_NUMBER = re.compile(r"\b(?:np\.(?:float|int)[0-9]+|mpf)\('?([^()']*)'?\)")


def clean(text: str) -> str:
    """One spelling of an answer: markdown, delimiters, sizing and spacing commands, synonyms and Unicode signs unified.

    Units and words stay (as \\text{...} where they were marked as text); numbers are not evaluated.
    """
    text = text.strip()
    for mark in ("**", "__", "`", "**"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    boxed = last_boxed(text) if text.startswith("\\boxed") else None
    text = (boxed if boxed is not None and len(boxed) + 8 >= len(text) else text).translate(tables.CHARACTERS)
    if text.endswith("\\") and not text.endswith("\\\\"):
        text = text[:-1]  # of a trailing "\\ "
    if "\u221a" in text:
        text = _ROOT_SIGN.sub(lambda m: "\\sqrt{" + m[1].strip("()") + "}", text)
    if "np." in text or "mpf" in text:
        text = _PRINTED_NUMBER.sub(r"\1", text)
    money = next((name for sign, name in tables.CURRENCIES.items() if sign in text), "")
    if any(sign in text for sign in "\\$%~") or "{,}" in text:
        if money == "dollars" and "\\$" not in text and text.count("$") % 2 == 0:
            money = ""  # math mode
        text = _clean_latex(text)
    if money:
        for sign in tables.CURRENCIES:
            text = text.replace(sign, "")
        text = text.rstrip(" .") + f"\\text{{{money}}}"
    text = " ".join(text.split())
    while text and text[-1] in ".,;:":
        text = text[:-1].rstrip()
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole:
        text = " ".join(whole[1].split()).rstrip(".")
    text = _REALS.sub(r"(-\\infty,\\infty)", text) if "R" in text or "real" in text else text
    either = " and " in text or " or " in text or "{and" in text or "{or" in text
    return _AND_OR.sub(lambda m: ", " if m[1] else m[0], text) if either else text


def _clean_latex(text: str) -> str:
    text = _MATH_MODE.sub("", text.replace("\\$", ""))
    text = _THIN_THOUSANDS.sub("", text)
    text = _DROPPED.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _SAME_COMMANDS.sub(lambda m: tables.SAME_COMMANDS[m[1]], text)
    text = _TEXT_COMMANDS.sub(r"\\text{", text)
    text = _TEXT_NUMBER.sub(r"\1", text)
    text = _DEGREES.sub(r"\\degree ", text)
    text = _REPEATING.sub(_as_fraction, text)
    return re.sub(r"\\?%", r"\\text{percent}", text)


def _as_fraction(found: re.Match[str]) -> str:
    """0.1\\overline{6} is 1/6."""
    whole, once, again = found.groups()
    below = 10 ** len(once) * (10 ** len(again) - 1)
    return f"\\frac{{{int(whole + once + again) - int(whole + once or '0')}}}{{{below}}}"


def closing(text: str, start: int) -> int:
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


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Cut at separators outside all brackets and environments."""
    if not any(separator in text for separator in separators):
        return [text]
    charge(len(text) // 4)
    parts, depth, start = list[str](), 0, 0
    for match in _cutter(separators).finditer(text):
        found = match[0]
        if depth <= 0 and found in separators:
            parts.append(text[start : match.start()])
            start = match.end()
        elif found in ("(", "[", "{", "\\begin", "\\langle"):
            depth += 1
        elif found in (")", "]", "}", "\\end", "\\rangle"):
            depth -= 1
    charge(8 * len(parts))  # each will be read
    return [*parts, text[start:]]


@cache
def _cutter(separators: tuple[str, ...]) -> re.Pattern[str]:
    """What _split looks at; a double backslash is one sign: the second opens no command."""
    signs = ("\\\\", "\\begin", "\\end", "\\langle", "\\rangle")
    return re.compile("|".join(map(re.escape, sorted({*signs, *"([{}])", *separators}, key=len, reverse=True))))


# -- units -------------------------------------------------------------------------------------------------------------

UNIT_CHARS = 100  # at the end of an answer, where a unit is looked for
_UNIT = r"\s*(?:\\text ?\{[^{}]*+\}|\\degree(?![a-zA-Z])|(?<![A-Za-z\\])[A-Za-z]++\.?|/|\^ ?\{? ?[23] ?\}?)"
_UNITS = re.compile(rf"(?>{_UNIT})+$")
_UNIT_PART = re.compile(_UNIT)
_ANGLE_OF = re.compile(r"(?<!arc)(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def units_of(text: str) -> list[tuple[str, str, int]]:
    """Ways to take a unit off the end, the longest first: (rest, measure, multiplier).

    The measure is "" for what is counted (18 apples).
    """
    start = max(0, len(text) - UNIT_CHARS)
    tail = _UNITS.search(text, start)
    if tail is None or tail.start() == 0:
        return []
    charge(100)
    parts = [(match.start(), match[0]) for match in _UNIT_PART.finditer(text, tail.start())]
    found: list[tuple[str, str, int]] = []
    for k, (place, part) in enumerate(parts[:12]):
        charge(10 + place // 64)
        before, word = text[:place], part.strip()
        last = before.rstrip()[-1:]
        marked = word.startswith("\\")
        if not (last.isalnum() or last in tuple(")}]|!")) or (before[-1:].isspace() and not last):
            continue
        attached = not marked and not part[0].isspace() and not before[-1:].isspace()
        if attached and (last.isalpha() or word.rstrip(".") not in tables.ATTACHED):
            continue
        if "degree" in part and _ANGLE_OF.search(before):
            continue
        measure = _measure([one for _, one in parts[k:]])
        if measure is not None:
            found.append((before.rstrip(), *measure))
    return found


def _measure(parts: Sequence[str]) -> tuple[str, int] | None:
    """(measure in one spelling, multiplier) of the words of a unit; None if one of them is no unit."""
    found, prefix, factor, complete = list[str](), "", 1, False
    speed = re.search("[a-z]/[sh](?![a-z])", "".join(part.strip() for part in parts))
    for part in parts:
        marked = TEXT.fullmatch(part.strip())
        for written in re.findall(
            r"[A-Za-z\u00a2]+|/|\^ ?\{? ?[23] ?\}?|[^\s.\w]", marked[1] if marked else part.replace("\\", "")
        ):
            word = written.lower()
            forms = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
            single = next((tables.MEASURES[form] for form in forms if form in tables.MEASURES), "")
            if written[0] == "^" and complete:
                found[-1:] = [("square " if "2" in written else "cubic ") + one for one in found[-1:]]
            elif word in ("square", "sq", "cubic", "cu"):
                prefix, complete = {"sq": "square ", "cu": "cubic "}.get(word, word + " "), False
            elif word in ("per", "/", "of") and complete:
                found, complete = [*found, "per"] if word != "of" else found, False
            elif word in tables.COMPOUND:
                found, complete = [*found, *tables.COMPOUND[word]], True
            elif word in tables.MULTIPLIERS and not found:
                factor, complete = factor * tables.MULTIPLIERS[word], True
            elif single and (len(word) > 1 or marked or speed):
                found, prefix, complete = [*found, prefix + single], "", True
            elif not tables.COUNTED.isdisjoint(forms):
                prefix, complete = "", True
            elif word in tables.DESCRIBING:
                complete = False
            else:
                return None
    return (" ".join(found), factor) if complete else None
