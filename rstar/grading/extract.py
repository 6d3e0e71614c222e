"""The one reader of answers: how an output, a solution or a reference states its answer.

extract_answer    the final answer of any output
last_line_answer  of a solution in words whose last line names it (GSM8K: "#### 72", "A: 72")
reference_answer  of a data set's answer field, which may hold a whole worked solution
why_unreadable    why no answer can ever equal a reference
"""

from __future__ import annotations

import re

_TAIL_CHARS = 20_000  # the end of an output, where answers are looked for
MAX_PROSE_WORDS = 10  # a reference with more words is prose: another text can only equal it by its spelling

_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\(?:fbox|boxed)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_LINE = re.compile(r"\s*(?:####|A:)\s*(\S.*)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9])")
_HEADING = re.compile(r"(?im)^[ \t]*#{1,6}[ \t]*(?=(?:the[ \t]+)?(?:final[ \t]+)?answer\b)")
_BOLD = re.compile(r"\*\*|__")
_ITALIC = re.compile(r"\*(\w[^*\n]{0,80})\*")
_VERB = r"(?:is|was|are|becomes|equals|(?:would|should|will|must)[ \t]+be|comes[ \t]+out[ \t]+(?:to[ \t]+be|as))"
_STATED = re.compile(
    r"\b(?P<before>(?:if|whether|what|unless|suppose|assume|guess|when)[ \t]+(?:(?:the|my|your|this)[ \t]+)?)?"
    r"(?:final[ \t]+|correct[ \t]+)?\b(?:answer|ans)\b(?:[ \t]*\([^()\n]{0,60}\))?"
    rf"(?:(?:[ \t]+(?:to|of|for)\b[^.:=?!\n]{{0,80}}?)?[ \t]*(?:[:=]|\b{_VERB}\b)|[ \t]*(?=\n))",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:[ \t]*(?:[:=]|\b(?:therefore|thus|hence|then|so|simply|just|indeed|clearly|equal[ \t]+to|given by)\b,?))*\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?<!sq)(?<!cu)[.?](?:\s|$)|<end_of|\n|,\s(?:which|since|but|so|as|where|because)\b|\sbecause\b"
)
_FENCE = re.compile(r"(?:\s*(?:\$\$|\\\[|```\w*|---+)[ \t]*\n)+")  # a line that only opens a displayed answer
_NO_NUMBER = re.compile(r"[-+]?(?:nan|none|null|n/a|undefined value|#n/a)", re.IGNORECASE)
_OBJECT = re.compile(r"\{\s*(?:['\"].*|\})|\[\s*\{\s*['\"].*", re.DOTALL)
_LANGUAGE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?![A-Za-z(])")  # no products of letters, no calls


def extract_answer(text: str) -> str | None:
    """The final answer of an output; None if it states none. Looks at the last 20,000 characters.

    In this order: the last balanced \\boxed{} (or \\fbox{}); the text after the last "####" of a line (GSM8K's form);
    what the last "answer is", "answer:", "answer =" or heading "Final answer" states, up to the end of its sentence or
    line. Markdown around words counts for nothing, nor does "if the answer is". Never "the last number somewhere": an
    output that states no answer has none.
    """
    text = text[-_TAIL_CHARS:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed or None
    plain = _HEADING.sub("", text) if "#" in text else text
    marked = _HASHES.findall(plain)
    if marked:
        return _bare(marked[-1])
    return _stated(plain)


def last_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{} or \\fbox{}; None if there is none. Linear in the length of the text."""
    found = boxes(text)
    return text[found[-1][0] + 1 : found[-1][1]].strip() if found else None


def boxes(text: str) -> list[tuple[int, int]]:
    """Where the braces of each balanced \\boxed{} or \\fbox{} are, in the order in which they open."""
    starts = {match.end() - 1 for match in _BOX.finditer(text)}
    opened, found = list[int](), list[tuple[int, int]]()
    for brace in _BRACE.finditer(text) if starts else ():
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened and (start := opened.pop()) in starts:
            found.append((start, brace.start()))
    return sorted(found)


def last_line_answer(text: str) -> str | None:
    """The answer that the last line names behind "####" or "A:", commas inside numbers dropped; None without one."""
    match = _ANSWER_LINE.match(text.strip().rpartition("\n")[2])
    return _THOUSANDS.sub("", match[1]) if match else None


def reference_answer(text: str) -> str:
    """The answer inside a reference: what extract_answer finds in it, or the text itself if it is no long text.

    "" for prose that states none, and for a \\boxed{} that is not closed. Commas inside GSM8K's numbers are dropped.
    """
    text = text.strip()
    if "####" in text:
        line = text.rpartition("####")[2].strip().partition("\n")[0].strip()
        return _THOUSANDS.sub("", line)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    bare = re.search(r"\\(?:boxed|fbox) +([^{$\s]+)", text)  # MATH writes "\boxed 7" in places
    if bare:
        return bare[1]
    if "\\boxed" in text:
        return ""
    stated = _stated(text[-_TAIL_CHARS:]) if "nswer" in text else None
    return stated or text


def why_unreadable(reference: str) -> str:
    """Why no answer but the same text could equal this reference, in a few words; "" where one could."""
    if _NO_NUMBER.fullmatch(reference):
        return "no value"
    if _OBJECT.fullmatch(reference):
        return "an object"
    if len(_LANGUAGE.findall(reference)) > MAX_PROSE_WORDS:
        return "prose without a stated answer"
    return ""


def _stated(text: str) -> str | None:
    """What the last statement says whose condition is none and that says something."""
    plain = _ITALIC.sub(r"\1", _BOLD.sub("", text)) if "*" in text or "__" in text else text
    for match in reversed(list(_STATED.finditer(plain))):
        if match["before"]:
            continue
        start = _FILLER.match(plain, match.end())
        said = _FENCE.sub("", plain[start.end() if start else match.end() :], count=1).lstrip()
        answer = _bare(_SENTENCE_END.split(said, maxsplit=1)[0])
        if answer:
            return answer
    return None


def _bare(said: str) -> str | None:
    """Without markdown and the full stop around it."""
    said = said.strip().strip("`").strip()
    if said.startswith("**") or said.endswith("**"):
        said = said.strip("*").strip()
    return said or None
