"""The paper's own figures (rStar-Math, arXiv 2501.04519), accuracy in percent, by the columns of its tables.

Shown beside ours only for a benchmark that was evaluated whole, and always marked as theirs. Figures that could not be
seen in a copy of the paper's tables are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLUMNS = ("MATH", "AIME24", "AMC23", "Olympiad", "College", "GSM8K", "Gaokao")
"""Headings of the paper's tables, in its order. Its MATH is MATH-500."""


@dataclass(frozen=True)
class Published:
    """One row of the paper."""

    system: str
    method: str
    accuracy: Mapping[str, float]  # column -> percent
    source: str


def _row(system: str, method: str, source: str, *figures: float | None) -> Published:
    known = {column: value for column, value in zip(COLUMNS, figures, strict=True) if value is not None}
    return Published(system, method, known, source)


PUBLISHED = (
    _row("Qwen2.5-Math-7B", "pass@1", "Table 3", 58.8, 0.0, 22.5, 21.8, 41.6, 91.6, 51.7),
    _row("rStar-Math 7B SLM-r1", "pass@1", "Table 3", 69.6, 3.3, 30.0, 34.7, 44.5, 88.4, 57.4),
    _row("rStar-Math 7B SLM-r2", "pass@1", "Table 3", 73.6, 10.0, 35.0, 39.0, 45.7, 89.1, 59.7),
    _row("rStar-Math 7B SLM-r3", "pass@1", "Table 3", 75.8, 16.7, 45.0, 44.1, 49.6, 89.3, 62.8),
    _row("rStar-Math 7B SLM-r4", "pass@1", "Table 3", 78.4, 26.7, 47.5, 47.1, 52.5, 89.7, 65.7),
    _row("rStar-Math 1.5B SLM-r4", "greedy", "Table 10", 74.8, 13.3, 47.5, 42.5, 50.1, 83.1, 58.7),
    _row("rStar-Math 7B SLM", "best-of-n ORM", "Table 8", 82.6, 26.7, 65.0, 55.1, 55.5, 92.3, 72.5),
    _row("rStar-Math 7B SLM", "mcts, PQM", "Table 8", 88.2, 46.7, 85.0, 62.9, 57.6, 94.6, 79.5),
    _row("rStar-Math 7B SLM + 7B PPM", "mcts @8", "Table 5", 89.4, 50.0, 87.5, 65.3, 59.0, 95.0, 80.5),
    _row("rStar-Math 7B SLM + 7B PPM", "mcts @64", "Table 5", 90.0, 53.3, None, 65.6, 60.5, None, None),
    _row("rStar-Math 1.5B SLM + 7B PPM", "mcts @64", "Table 5", 88.6, 46.7, 85.0, 64.6, 59.3, 94.8, 79.5),
    _row("rStar-Math Phi3-mini 3.8B + 7B PPM", "mcts @64", "Table 5", 86.4, 43.3, 80.0, 60.3, 59.1, 94.7, 77.7),
    _row("Qwen2.5-Math-72B-Instruct + 72B ORM", "best-of-n ORM", "Table 5", 85.8, 36.7, 72.5, 54.5, 50.6, 96.4, 76.9),
    _row("OpenAI o1-mini", "-", "Table 5", 90.0, 56.7, 95.0, 65.3, 57.8, 94.8, 78.4),
)
