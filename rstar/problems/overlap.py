"""When two problems are the same: text keys, number keys, 13-gram overlap with a benchmark, image dependence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rstar.types import Problem

NGRAM = 13  # words; the usual length for decontamination (GPT-3, arXiv 2005.14165, appendix C)

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SKELETON = re.compile(r"[0-9]+(?:\.[0-9]+)?|[-+*/()=^]")
_IMAGE = re.compile(r"!\[[^\]]*\]\(|<img\b|<image|\\includegraphics|\[image\]", re.IGNORECASE)
_FIGURE = re.compile(
    r"\b(?:figure|diagram|picture|image|chart)s?\b[^.]{0,20}\b(?:below|above|shown|at right|on the right)\b"
    r"|\b(?:shown|pictured)\s+(?:in the (?:figure|diagram|picture|image)|below|above)\b",
    re.IGNORECASE,
)


def text_key(question: str) -> str:
    """Equal for questions that differ in case and whitespace only."""
    return " ".join(question.casefold().split())


def skeleton_key(question: str) -> tuple[str, ...]:
    """Numbers and operators of a generated question, in order: equal for one template with the same numbers."""
    return tuple(_SKELETON.findall(question))


def numbers_key(question: str) -> tuple[str, ...]:
    """Numbers of a question in any order: the stricter key that keeps generated held-out problems apart."""
    return tuple(sorted(_NUMBER.findall(question)))


def needs_image(question: str) -> bool:
    """Whether the question cannot be answered without a picture that is not in its text ([asy] drawings are text)."""
    if _IMAGE.search(question):
        return True
    return "[asy]" not in question and "\\begin{tabular}" not in question and bool(_FIGURE.search(question))


class Overlap:
    """A set of problems that training must not touch: exact text and shared 13-grams of words."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.name = name
        self._texts: set[str] = set()
        self._grams: set[int] = set()
        for problem in problems:
            self._texts.add(_bare(problem.question))
            self._grams.update(_grams(problem.question))

    def touches(self, question: str) -> bool:
        """Whether `question` equals one of the set's or shares a run of 13 words with one."""
        return _bare(question) in self._texts or any(gram in self._grams for gram in _grams(question))


def _bare(question: str) -> str:
    """Letters, digits and signs alone: 'x+1' and 'x-1' stay different, spacing and punctuation do not count."""
    return re.sub(r"[\s,.;:!?$'\"`]+", "", question.casefold())


def _grams(question: str) -> Iterator[int]:
    words = _WORD.findall(question.casefold())
    for i in range(len(words) - NGRAM + 1):
        yield hash(tuple(words[i : i + NGRAM]))
