"""What a verifier is worth: its best of n beside the vote and the best possible choice, and the curves behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rstar.config import SandboxSection
from rstar.evaluation import Candidate, EvalRecord, Measure, Pick, bootstrap, chosen_share, pass_at_k, top_score, vote
from rstar.recipes.evaluation import costs, eval_records, problem_trees

Curve = dict[str, Any]
"""{title, x_name, series: {name: [[x, mean, low, high], ...]}}: what eval.json keeps and the report draws."""


def evaluated(
    folder: Path,
    sandbox: SandboxSection,
    *,
    voters: Sequence[int] = (),
    sizes: Sequence[int] = (),
    oracle_only: bool = False,
) -> dict[str, Any]:
    """The trees of a folder graded and measured: a method of eval.json, and its `curves` and `ranking`.

    `oracle_only`: the one measure is whether any of the samples is right (test@N).
    """
    records = asyncio.run(eval_records(problem_trees(folder), sandbox))
    if oracle_only:
        n = max((record.samples for record in records), default=0)
        return {"measures": {"oracle": asdict(_oracle(records, n))}, **costs(records)}
    measures = verification_measures(records, voters[1])
    return {
        "measures": {name: asdict(measure) for name, measure in measures.items()},
        "ranking": ranking(records),
        **costs(records),
        "curves": verification_curves(records, sizes, voters),
    }


def verification_measures(records: Sequence[EvalRecord], voters: int) -> dict[str, Measure]:
    """Accuracy of the best-scored solution, of the vote of all, of the vote of the best `voters`, and of an oracle.

    Every problem counts; a problem without a finished solution is wrong.
    """
    n = max((record.samples for record in records), default=0)
    return {
        "accuracy": _accuracy(records, n, top_score),
        f"vote of best {voters}": _accuracy(records, n, partial(top_vote, k=voters)),
        f"majority of {n}": _accuracy(records, n, vote),
        f"oracle of {n}": _oracle(records, n),
        "one sample": _oracle(records, 1),
    }


def verification_curves(records: Sequence[EvalRecord], sizes: Sequence[int], voters: Sequence[int]) -> list[Curve]:
    """Accuracy by number of completions (nested subsets of the same samples) and by number of voters."""
    n = max((record.samples for record in records), default=0)
    sizes = sorted({size for size in sizes if size < n} | {n})
    picks: dict[str, Callable[[int], Measure]] = {
        "verifier": lambda k: _accuracy(records, k, top_score),
        "majority": lambda k: _accuracy(records, k, vote),
        "oracle": lambda k: _oracle(records, k),
    }
    by_size = {name: [_point(k, measure(k)) for k in sizes] for name, measure in picks.items()}
    voting = [_point(k, _accuracy(records, n, partial(top_vote, k=k))) for k in sorted(set(voters)) if k <= n]
    return [
        curve("Accuracy by number of completions, %", "completions per problem", by_size),
        curve(f"Accuracy by number of voters among {n} completions, %", "best-scored voters", {"verifier": voting}),
    ]


def curve(title: str, x_name: str, series: dict[str, list[list[float]]]) -> Curve:
    return {"title": title, "x_name": x_name, "series": series}


def top_vote(candidates: Sequence[Candidate], *, k: int) -> Candidate | None:
    """Majority of the `k` best-scored samples (a text that m samples share is m of them); ties as in `vote`."""
    ranked = sorted(candidates, key=lambda c: -(c.score if c.score is not None else -2.0))
    chosen, left = [], k
    for candidate in ranked:
        if left:
            chosen.append(replace(candidate, count=min(left, candidate.count)))
            left -= chosen[-1].count
    return vote(chosen)


def ranking(records: Sequence[EvalRecord]) -> dict[str, float | int | None]:
    """How scores tell right from wrong solutions, each weighted by its samples.

    `auc`: over all pairs of solutions; `auc_within`: over pairs of one problem, the mean of the problems that have both
    kinds (0.5 is chance). `false_positives`: share of the wrong solutions with a value of 0.5 or more, a score of 0.
    """
    everything = [c for record in records for c in record.candidates]
    within = [a for record in records if (a := auc(record.candidates)) is not None]
    wrong = sum(c.count for c in everything if not c.correct)
    trusted = sum(c.count for c in everything if not c.correct and (c.score or 0.0) >= 0)
    return {
        "auc": auc(everything),
        "auc_within": sum(within) / len(within) if within else None,
        "problems_with_both": len(within),
        "false_positives": trusted / wrong if wrong else None,
    }


def auc(candidates: Sequence[Candidate]) -> float | None:
    """Chance that a correct solution's score is above a wrong one's, ties half; None unless there are both."""
    right = [(c.score or 0.0, c.count) for c in candidates if c.correct]
    wrong = sorted((c.score or 0.0, c.count) for c in candidates if not c.correct)
    if not right or not wrong:
        return None
    scores = np.array([score for score, _ in wrong])
    below = np.concatenate([[0], np.cumsum([count for _, count in wrong])])
    total = sum(
        count * (below[np.searchsorted(scores, s, "left")] + below[np.searchsorted(scores, s, "right")]) / 2
        for s, count in right
    )
    return float(total / (below[-1] * sum(count for _, count in right)))


def _accuracy(records: Sequence[EvalRecord], k: int, pick: Pick) -> Measure:
    return bootstrap([chosen_share(record, k, pick) for record in records])


def _oracle(records: Sequence[EvalRecord], k: int) -> Measure:
    counts = [sum(c.count for c in record.candidates if c.correct) for record in records]
    return bootstrap([pass_at_k(r.samples, right, min(k, r.samples)) for r, right in zip(records, counts, strict=True)])


def _point(x: float, measure: Measure) -> list[float]:
    return [x, measure.mean, measure.low, measure.high]
