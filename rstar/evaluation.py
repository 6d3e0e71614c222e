"""Accuracy from trees: greedy, pass@k, maj@k, best-of-k, PPM-guided search; intervals, paired tests, token accounting.

Evaluation reads trees and nothing else, so it is repeatable from the files, and every generated token is counted.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rstar.grading import normalise
from rstar.tree import Tree
from rstar.types import Problem

EXACT_DRAWS = 1000  # different draws of k of a problem's samples that are all looked at
SUBSETS = 200  # random draws where there are more; they estimate a problem's share with a standard error below .036

Equivalent = Callable[[str, str], Awaitable[bool]]
"""(answer, reference) -> same."""


@dataclass(frozen=True)
class Candidate:
    """A finished answer of a problem."""

    answer: str  # in one spelling (grading.normalise): what votes are counted by
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


Pick = Callable[[Sequence[Candidate]], Candidate | None]
"""How one answer is chosen among candidates."""


def bootstrap(
    values: Sequence[float], weights: Sequence[float] = (), *, resamples: int = 1000, seed: int = 0
) -> Measure:
    """Mean of per-problem values with a 95% percentile bootstrap interval over problems.

    With `weights` the values are totals of as many items per problem, and the mean is one over items.
    """
    if not values:
        return Measure(0.0, 0.0, 0.0, 0)
    rng, n = np.random.default_rng(seed), len(values)
    totals, counts = np.asarray(values, dtype=float), np.asarray(weights or [1.0] * n, dtype=float)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(n, size=n)
        means.append(totals[drawn].sum() / max(counts[drawn].sum(), 1e-12))
    means.sort()
    mean = float(totals.sum() / counts.sum())
    return Measure(mean, float(means[int(0.025 * resamples)]), float(means[int(0.975 * resamples) - 1]), n)


@dataclass(frozen=True)
class Paired:
    """Two methods on the same problems."""

    difference: Measure  # of the means, with a paired bootstrap interval; in [-1, 1]
    wins: int  # problems where the first method did better
    losses: int
    p_value: float | None  # McNemar's exact test, two-sided; None where a value is a mean over subsets of samples


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare per-problem values in [0, 1] with those of a baseline, problem by problem."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    plain = all(v in (0.0, 1.0) for v in (*values, *baseline))
    return Paired(bootstrap(differences), wins, losses, mcnemar(wins, losses) if plain else None)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p value of McNemar's exact test: discordant pairs are fair coin tosses if the methods are equal."""
    n = wins + losses
    return float(min(1.0, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased pass@k of `samples` draws of which `correct` were right (Chen et al. 2021, Eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def rank(candidate: Candidate) -> float:
    """Sorts by score, best first; those without a score come last. Sorting keeps equals in their order."""
    return 2.0 if candidate.score is None else -candidate.score


def top_score(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate with the highest score; ties go to the earlier one."""
    return min(candidates, key=rank, default=None)


def vote(candidates: Sequence[Candidate], *, top_k: int = 0, weighted: bool = False) -> Candidate | None:
    """Majority over the answers of the `top_k` best-scored candidates (0: all); `weighted` votes weigh (1 + score) / 2.

    So no vote counts against its answer. Answers are the same when their text is. A tie goes to the answer whose best
    score is higher, then to the earlier one (G6).
    """
    ranked = sorted(candidates, key=rank)
    voters = ranked[:top_k] if top_k else ranked
    totals: dict[str, float] = defaultdict(float)
    for voter in voters:
        totals[voter.answer] += voter.count * ((1 + (voter.score or 0.0)) / 2 if weighted else 1.0)
    if not totals:
        return None
    best = max(totals.values())
    return next(voter for voter in voters if totals[voter.answer] == best)


def chosen_share(record: EvalRecord, k: int, pick: Pick) -> float:
    """How often `pick` chooses a correct answer among `k` of the record's samples, in [0, 1].

    The mean over all sets of k samples, in which candidates keep the record's order (it decides the last ties). Exact
    for `top_score` and `vote`, and for any other `pick` where the sets are of at most EXACT_DRAWS different kinds; else
    an estimate from SUBSETS random sets, the same ones for every `pick` and nested for rising k.
    """
    if k >= record.samples or not record.passed:
        best = pick(record.candidates)
        return float(best is not None and best.correct)
    sets = math.comb(record.samples, k)
    if pick is top_score:
        return _best_is_right(record, k) / sets
    if pick is vote:
        return _majority_is_right(record, k) / sets
    counts = [c.count for c in record.candidates]
    counts.append(record.samples - sum(counts))  # samples without an answer
    draws = _kinds_of_sets(counts, k)
    if draws is None:
        rng, draws, sets = random.Random(record.problem_id), [], SUBSETS
        pool = [i for i, count in enumerate(counts) for _ in range(count)]
        for _ in range(SUBSETS):
            rng.shuffle(pool)
            chosen = Counter(pool[:k])
            draws.append((1, tuple(chosen[i] for i in range(len(counts)))))
    right = 0
    for ways, drawn in draws:
        best = pick([replace(c, count=n) for c, n in zip(record.candidates, drawn, strict=False) if n])
        right += ways * (best is not None and best.correct)
    return right / sets


def _best_is_right(record: EvalRecord, k: int) -> int:
    """Sets of k samples whose best-scored candidate is correct: it is drawn, and none that ranks before it."""
    right, left = 0, record.samples
    for candidate in sorted(record.candidates, key=rank):
        without = left - candidate.count
        right += candidate.correct * (math.comb(left, k) - math.comb(without, k))
        left = without
    return right


def _majority_is_right(record: EvalRecord, k: int) -> int:
    """Sets of k samples in which `vote` chooses a correct answer.

    Counted by the votes of the answer that wins and by its candidate that ranks first among the drawn ones. Any other
    answer then has fewer votes, or as many and none of them ranks before that candidate.
    """
    sizes: dict[str, int] = Counter()
    for candidate in record.candidates:
        sizes[candidate.answer] += candidate.count
    right = 0
    for votes in range(1, k + 1):
        left = dict(sizes)  # samples of each answer that do not rank before the present candidate
        known: dict[tuple[object, ...], int] = {}
        for candidate in sorted(record.candidates, key=rank):
            own = candidate.answer
            first = math.comb(left[own], votes)
            left[own] -= candidate.count
            first -= math.comb(left[own], votes)
            if not candidate.correct or not first:
                continue
            rivals = [answer for answer, size in sizes.items() if size >= votes and answer != own]
            key = (own, *(left[answer] for answer in rivals))
            if key not in known:
                rest = record.samples - sizes[own] - sum(sizes[answer] for answer in rivals)
                ways = [math.comb(rest, n) for n in range(k - votes + 1)]  # by how many of the others are drawn
                for answer in rivals:
                    few = [*(math.comb(sizes[answer], n) for n in range(votes)), math.comb(left[answer], votes)]
                    ways = [sum(few[m] * ways[n - m] for m in range(min(n, votes) + 1)) for n in range(k - votes + 1)]
                known[key] = ways[-1]
            right += first * known[key]
    return right


def _kinds_of_sets(counts: Sequence[int], k: int) -> list[tuple[int, tuple[int, ...]]] | None:
    """The ways to draw k samples by how many are drawn of each of `counts`: (sets of that kind, those numbers).

    None where there are more than EXACT_DRAWS kinds.
    """
    found: list[tuple[int, int, tuple[int, ...]]] = [(1, k, ())]  # (sets, samples still to draw, numbers drawn)
    behind = sum(counts)
    for count in counts:
        behind -= count
        found = [
            (sets * math.comb(count, n), left - n, (*drawn, n))
            for sets, left, drawn in found
            for n in range(max(0, left - behind), min(count, left) + 1)
        ]
        if len(found) > EXACT_DRAWS:
            return None
    return [(sets, drawn) for sets, _, drawn in found]


async def eval_record(trees: Sequence[Tree], same: Equivalent) -> EvalRecord:
    """Grade the answers of one problem's trees after the search (the ground truth did not guide it).

    With several trees (independent trajectories) each gives its best-scored answer as a candidate.
    """
    problem = trees[0].problem
    candidates: list[Candidate] = []
    for tree in trees:
        found = [
            Candidate(
                normalise(leaf.answer or ""),
                leaf.ppm_value,
                leaf.multiplicity,
                await same(leaf.answer or "", problem.answer),
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
        found = {
            "pass@1": share(lambda r: sum(c.count for c in r.candidates if c.correct) / max(1, r.samples)),
            f"pass@{k}": share(
                lambda r: pass_at_k(r.samples, sum(c.count for c in r.candidates if c.correct), min(k, r.samples))
            ),
            f"maj@{k}": chosen(vote),
        }
        if any(c.score is not None for record in records for c in record.candidates):
            found[f"best-of-{k}"] = chosen(top_score)
        return found
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
