"""The reference answer of a synthetic problem: what enough of its synthesiser's solutions agree on.

rStar-Math lets a large model write problems and 10 solutions of each, and keeps a problem where at least 3 agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rstar.grading import is_equivalent_fast


def agreeing_answer(answers: Sequence[str], needed: int) -> str | None:
    """The answer that most of `answers` give, in its first spelling, if at least `needed` do; None otherwise.

    Empty answers count for nothing. A tie has no majority to go by, so it is None too.
    """
    votes: dict[str, int] = {}
    for answer in filter(None, map(str.strip, answers)):
        same = next((known for known in votes if is_equivalent_fast(answer, known)), answer)
        votes[same] = votes.get(same, 0) + 1
    ranked = Counter(votes).most_common(2)
    if not ranked or ranked[0][1] < needed or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]
