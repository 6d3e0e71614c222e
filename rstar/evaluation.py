"""Accuracy from trees: greedy, pass@k, maj@k, PPM-guided search; confidence intervals; token accounting.

Evaluation reads trees and nothing else, so it is repeatable from the files, and every generated token is counted.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rstar.tree import Tree
from rstar.types import Problem

Equivalent = Callable[[str, str], Awaitable[bool]]
"""(answer, reference) -> same."""


@dataclass(frozen=True)
class Candidate:
    """A finished answer of a problem."""

    answer: str
    score: float | None  # PPM score in [-1, 1]; None without a PPM
    count: int  # samples that ended here
    correct: bool


@dataclass(frozen=True)
class EvalRecord:
    """One problem under one method."""

    problem_id: str
    level: str
    source: str
    candidates: tuple[Candidate, ...]
    samples: int  # solutions that were started
    tokens: int
    engine_calls: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether any candidate is correct (pass@all)."""
        return any(c.correct for c in self.candidates)


@dataclass(frozen=True)
class Measure:
    """An accuracy with its 95% bootstrap interval, all in [0, 1]."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> Measure:
    """Mean of per-problem values with a 95% percentile bootstrap interval over problems."""
    if not values:
        return Measure(0.0, 0.0, 0.0, 0)
    rng = random.Random(seed)
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    return Measure(sum(values) / n, means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1], n)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased pass@k of `samples` draws of which `correct` were right (Chen et al. 2021, Eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def top_score(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate with the highest score; ties go to the earlier one."""
    return max(candidates, key=lambda c: c.score if c.score is not None else -2.0, default=None)


def vote(candidates: Sequence[Candidate], *, top_k: int = 0, weighted: bool = False) -> Candidate | None:
    """Majority over the answers of the `top_k` best-scored candidates (0: all); `weighted` sums scores instead.

    Answers are the same when their text is. A tie goes to the answer whose best score is higher, then to the earlier
    one (G6).
    """
    ranked = sorted(candidates, key=lambda c: -(c.score if c.score is not None else -2.0))
    voters = ranked[:top_k] if top_k else ranked
    totals: dict[str, float] = defaultdict(float)
    for voter in voters:
        totals[voter.answer] += (voter.score or 0.0) if weighted else voter.count
    if not totals:
        return None
    best = max(totals.values())
    return next(voter for voter in voters if totals[voter.answer] == best)


async def eval_record(trees: Sequence[Tree], same: Equivalent) -> EvalRecord:
    """Grade the answers of one problem's trees after the search (the ground truth did not guide it).

    With several trees (independent trajectories) each gives its best-scored answer as a candidate.
    """
    problem = trees[0].problem
    candidates: list[Candidate] = []
    for tree in trees:
        found = [
            Candidate(
                leaf.answer or "", leaf.ppm_value, leaf.multiplicity, await same(leaf.answer or "", problem.answer)
            )
            for leaf in tree.answers()
        ]
        if tree.searcher == "sample":
            candidates.extend(found)
        elif (best := top_score(found)) is not None:
            candidates.append(Candidate(best.answer, best.score, 1, best.correct))
    return EvalRecord(
        problem_id=problem.id,
        level=problem.level,
        source=problem.source,
        candidates=tuple(candidates),
        samples=sum(tree.rollouts_done if tree.searcher == "sample" else 1 for tree in trees),
        tokens=sum(tree.tokens for tree in trees),
        engine_calls=sum(tree.engine_calls for tree in trees),
        seconds=sum(tree.seconds for tree in trees),
    )


def measures(method: str, records: Sequence[EvalRecord], *, top_k: int = 8) -> dict[str, Measure]:
    """The figures of one method over its problems; every problem counts, unanswered ones as wrong."""

    def share(judge: Callable[[EvalRecord], float]) -> Measure:
        return bootstrap([judge(record) for record in records])

    def chosen(pick: Callable[[Sequence[Candidate]], Candidate | None]) -> Measure:
        return share(lambda record: float((best := pick(record.candidates)) is not None and best.correct))

    if method == "greedy":
        return {"accuracy": chosen(top_score)}
    if method == "sample":
        k = max((record.samples for record in records), default=1)
        return {
            "pass@1": share(lambda r: sum(c.count for c in r.candidates if c.correct) / max(1, r.samples)),
            f"pass@{k}": share(
                lambda r: pass_at_k(r.samples, sum(c.count for c in r.candidates if c.correct), min(k, r.samples))
            ),
            f"maj@{k}": chosen(vote),
        }
    return {
        "accuracy": chosen(top_score),
        "majority": chosen(lambda cs: vote(cs, top_k=top_k)),
        "weighted": chosen(lambda cs: vote(cs, top_k=top_k, weighted=True)),
        "pass": share(lambda record: float(record.passed)),
    }


def by_level(values: Iterable[tuple[Problem, bool]]) -> Mapping[str, tuple[int, int]]:
    """(solved, all) per level, in level order, with "all" last."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for problem, solved in values:
        for level in (problem.level or "-", "all"):
            counts[level][0] += solved
            counts[level][1] += 1
    order = sorted(counts, key=lambda level: (level == "all", level))
    return {level: (counts[level][0], counts[level][1]) for level in order}
