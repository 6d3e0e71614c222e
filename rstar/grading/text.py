"""Answers as text: pulling them out of an output, and one spelling for what is spelt in many ways."""

from __future__ import annotations

import re

from rstar.prompts import last_boxed

MAX_ANSWER_CHARS = 4000  # an answer beyond this is compared as text only
_TAIL_CHARS = 20_000  # the end of an output, where answers are looked for

_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(r"(?:final\s+answer|answer)\s*(?:is|:|=|was)\s*(?::\s*)?([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[^0-9\s])\.(?:\s|$)|(?<=[0-9])\.(?:\s|$)|<end_of")


def extract_answer(text: str) -> str | None:
    """The final answer of an output; None if it states none. Looks at the last 20,000 characters.

    In this order: the last balanced \\boxed{} (or \\fbox{}); the text after the last "####" of a line (GSM8K's form);
    the text after the last "answer is", "answer:" or "answer =" up to the end of its sentence or line. Never "the last
    number somewhere": an output that states no answer has none.
    """
    text = text[-_TAIL_CHARS:]
    boxed = last_boxed(text.replace("\\fbox{", "\\boxed{").replace("\\boxed {", "\\boxed{"))
    if boxed is not None:
        return boxed or None
    marked = _HASHES.findall(text)
    if marked:
        return marked[-1].strip() or None
    stated = _ANSWER_IS.findall(text)
    if not stated:
        return None
    sentence = _SENTENCE_END.split(stated[-1], maxsplit=1)[0]
    return sentence.strip().strip("*").strip() or None


_CHARACTERS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-", "\u2014": "-",
        "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2028": " ", "\u2029": " ", "\t": " ", "\n": " ", "\r": " ",
        "\uff0c": ",", "\uff08": "(", "\uff09": ")", "\u221e": "\\infty ", "\u03c0": "\\pi ",
        "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ",
        "\u2208": "\\in ", "\u00b1": "\\pm ", "\u00b0": "\\text{degrees}",
        "\u00b2": "^2", "\u00b3": "^3", "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}",
        "\u2205": "\\emptyset ", "\u20ac": "\\text{euros}", "\u00a3": "\\text{pounds}", "\u200b": "", "\ufeff": "",
    }
)  # fmt: skip
_ROOT_SIGN = re.compile("\u221a\\s*(\\([^()]*\\)|[0-9]+|[a-z])")
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg|displaystyle|textstyle|limits|mathstrut|hfill)(?![a-zA-Z])"
    r"|(?<!\\)\\!|\\phantom\{[^{}]*\}"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;: >]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|hspace\{[^{}]*\}|enspace(?![a-zA-Z]))|~")
_SAME_COMMANDS = re.compile(
    r"\\(dfrac|tfrac|cfrac|leq|leqslant|geq|geqslant|neq|lt|gt|varnothing|lbrace|rbrace|lbrack|rbrack)(?![a-zA-Z])"
)
_SAME = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leq": "\\le", "leqslant": "\\le", "geq": "\\ge",
    "geqslant": "\\ge", "neq": "\\ne", "lt": "<", "gt": ">", "varnothing": "\\emptyset", "lbrace": "\\{",
    "rbrace": "\\}", "lbrack": "[", "rbrack": "]",
}  # fmt: skip
_TEXT_COMMANDS = re.compile(
    r"\\(?:mathrm|textbf|textit|mathbf|mathit|mbox|textrm|operatorname|textnormal|hbox|textsf|rm)\s*\{"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])")
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND_OR = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", re.IGNORECASE)
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\s?\\!|\\[,!:;])(?=[0-9]{3}(?![0-9]))")
_MATH_MODE = re.compile(r"(?<!\\)\\[()\[\]]|\$")
_PERCENT = re.compile(r"\\?%")


def clean(text: str) -> str:
    """One spelling of an answer: delimiters, sizing and spacing commands, synonyms and Unicode signs unified.

    Units and words stay (as \\text{...} where they were marked as text); numbers are not evaluated.
    """
    text = text.strip().translate(_CHARACTERS)
    if text.endswith("\\") and not text.endswith("\\\\"):
        text = text[:-1]  # of a trailing "\\ "
    if "\u221a" in text:
        text = _ROOT_SIGN.sub(lambda m: "\\sqrt{" + m[1].strip("()") + "}", text)
    if "\\" in text or "$" in text or "%" in text or "~" in text or "{,}" in text:
        text = _clean_latex(text)
    text = " ".join(text.split())
    while text and text[-1] in ".,;:":
        text = text[:-1].rstrip()
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole:
        text = " ".join(whole[1].split()).rstrip(".")
    return _AND_OR.sub(", ", text) if " and " in text or " or " in text or "{and" in text or "{or" in text else text


def _clean_latex(text: str) -> str:
    dollars = "\\$" in text
    text = text.replace("\\$", "")
    dollars = dollars or (text.startswith("$") and text.count("$") % 2 == 1)
    text = _MATH_MODE.sub("", text)
    text = _THIN_THOUSANDS.sub("", text)
    text = _DROPPED.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _SAME_COMMANDS.sub(lambda m: _SAME[m[1]], text)
    text = _TEXT_COMMANDS.sub(r"\\text{", text)
    text = _DEGREES.sub(r"\\text{degrees}", text)
    text = _PERCENT.sub(r"\\text{percent}", text)
    return text.rstrip(" .") + "\\text{dollars}" if dollars else text
