"""The unsolved problems of a search with what they were answered instead: the paper's stop rule, for a person to judge.

rStar-Math stops when most of the unsolved problems have a wrong reference answer (19 of 20 that its authors looked at).
One answer that most solutions agree on, and that is not the reference, is the sign of that.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rstar.report.results import round_numbers
from rstar.report.show import clean
from rstar.rounds import RoundDir
from rstar.store import read_trees


@dataclass(frozen=True)
class Unsolved:
    """A problem without a correct answer in a search."""

    problem_id: str
    level: str
    question: str
    reference: str
    answer: str  # the most frequent one; "" where nothing was answered
    share: float  # of the samples that ended in an answer, in [0, 1]
    answers: int  # those samples


def unsolved(folder: Path) -> list[Unsolved]:
    """The unsolved problems of a folder of trees, the most agreed-on wrong answers first; streams the trees."""
    votes: dict[str, Counter[str]] = {}
    rows: dict[str, tuple[str, str, str]] = {}
    solved: set[str] = set()
    for tree in read_trees(folder):
        problem = tree.problem
        if tree.solved:
            solved.add(problem.id)
        if problem.id in solved:
            votes.pop(problem.id, None)
            continue
        rows[problem.id] = (problem.level, problem.question, problem.answer)
        counted = votes.setdefault(problem.id, Counter())
        for leaf in tree.answers():
            counted[leaf.answer or ""] += leaf.multiplicity
    found = []
    for ident, counted in votes.items():
        ((answer, times),) = counted.most_common(1) or [("", 0)]
        total = counted.total()
        found.append(Unsolved(ident, *rows[ident], answer, times / max(1, total), total))
    return sorted(found, key=lambda row: (-row.share, -row.answers, row.problem_id))


def unsolved_text(run: Path, *, limit: int = 20, width: int = 100) -> str:
    """The unsolved problems of the last finished search of a run; "" where there is none."""
    searched = [n for n in round_numbers(run) if n and RoundDir(run, n).record("search") is not None]
    if not searched:
        return ""
    rows = unsolved(RoundDir(run, searched[-1]).trees)
    head = f"{len(rows)} problems unsolved in round {searched[-1]}, by how often their most frequent answer was given"
    return "\n".join(
        [head, *_lines(rows[:limit], width), *([f"  and {n} more"] if (n := len(rows) - limit) > 0 else [])]
    )


def _lines(rows: Sequence[Unsolved], width: int) -> list[str]:
    lines = []
    for row in rows:
        given = f"{row.answer} in {100 * row.share:.0f}% of {row.answers} answers" if row.answers else "no answer"
        lines.append(clean(f"  {row.problem_id}: reference {row.reference}, given {given}").replace("\n", " "))
        lines.append(textwrap.shorten(clean(row.question), width, initial_indent="    ", placeholder=" ..."))
    return lines
