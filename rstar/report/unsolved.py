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

from rstar.manifest import RoundDir
from rstar.report.results import round_numbers
from rstar.report.show import clean
from rstar.store import read_trees
from rstar.tree import Tree
from rstar.types import Problem


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

    @property
    def given(self) -> str:
        """Its most frequent answer in words."""
        return f"{self.answer} in {100 * self.share:.0f}% of {self.answers} answers" if self.answers else "no answer"


class Votes:
    """The answers of problems without a solved tree; trees come in any order."""

    def __init__(self) -> None:
        self._votes: dict[str, Counter[str]] = {}
        self._problems: dict[str, Problem] = {}
        self._solved: set[str] = set()

    def add(self, tree: Tree) -> None:
        """Count the answers of a tree; a solved one takes its problem out for good."""
        problem = tree.problem
        if tree.solved:
            self._solved.add(problem.id)
        if problem.id in self._solved:
            self._votes.pop(problem.id, None)
            return
        self._problems[problem.id] = problem
        counted = self._votes.setdefault(problem.id, Counter())
        for leaf in tree.answers():
            counted[leaf.answer or ""] += leaf.multiplicity

    def unsolved(self) -> list[Unsolved]:
        """The unsolved problems, the most agreed-on wrong answers first."""
        found = []
        for ident, counted in self._votes.items():
            ((answer, times),) = counted.most_common(1) or [("", 0)]
            total, problem = counted.total(), self._problems[ident]
            found.append(
                Unsolved(ident, problem.level, problem.question, problem.answer, answer, times / max(1, total), total)
            )
        return sorted(found, key=lambda row: (-row.share, -row.answers, row.problem_id))


def unsolved(folder: Path) -> list[Unsolved]:
    """The unsolved problems of a folder of trees; streams the trees."""
    votes = Votes()
    for tree in read_trees(folder):
        votes.add(tree)
    return votes.unsolved()


def unsolved_text(run: Path, *, limit: int = 20) -> str:
    """The unsolved problems of the last finished search of a run; "" where there is none."""
    searched = [n for n in round_numbers(run) if n and RoundDir(run, n).record("search") is not None]
    if not searched:
        return ""
    rows = unsolved(RoundDir(run, searched[-1]).trees)
    head = f"{len(rows)} problems unsolved in round {searched[-1]}, by how often their most frequent answer was given"
    return "\n".join([head, *_lines(rows[:limit]), *([f"  and {n} more"] if (n := len(rows) - limit) > 0 else [])])


def _lines(rows: Sequence[Unsolved]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(clean(f"  {row.problem_id}: reference {row.reference}, given {row.given}").replace("\n", " "))
        lines.append(textwrap.shorten(clean(row.question), 100, initial_indent="    ", placeholder=" ..."))
    return lines
