"""Evaluation from trees: votes, pass@k, intervals, token accounting."""

from __future__ import annotations

import pytest

from rstar.evaluation import Candidate, bootstrap, by_level, eval_record, measures, pass_at_k, top_score, vote
from rstar.search.mcts import Mcts
from rstar.search.sample import sample
from rstar.types import Problem
from tests.fakes import branching, grow


def runs() -> list[Candidate]:
    table = [(0.91, "5"), (0.90, "7"), (0.88, "7"), (0.80, "5"), (0.79, "5")]
    return [Candidate(answer, score, 1, answer == "7") for score, answer in table]


def test_deviation_D10_g6_votes() -> None:
    found = runs()
    top = top_score(found)
    assert top is not None and top.answer == "5"
    answers = {k: vote(found, top_k=k) for k in (1, 3, 4, 5)}
    assert {k: c.answer for k, c in answers.items() if c} == {1: "5", 3: "7", 4: "5", 5: "5"}
    weighted = vote(found, top_k=4, weighted=True)
    assert weighted is not None and weighted.answer == "7"  # 1.78 > 1.71


def test_verifier_votes_of_the_other_golden_case() -> None:
    found = [Candidate(a, s, 1, False) for s, a in [(0.95, "18"), (0.90, "26"), (0.88, "26"), (0.60, "18"), (0.5, "9")]]
    chosen = {k: vote(found, top_k=k) for k in (1, 3, 5)}
    assert {k: c.answer for k, c in chosen.items() if c} == {1: "18", 3: "26", 5: "18"}


def test_vote_of_nobody_is_nothing() -> None:
    assert vote([]) is None and top_score([]) is None


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(4, 0, 2, 0.0), (4, 4, 2, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6)]
)
def test_pass_at_k_is_unbiased(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_bootstrap_interval_holds_the_mean_and_narrows() -> None:
    few, many = bootstrap([0, 1] * 10), bootstrap([0, 1] * 1000)
    assert few.low < 0.5 < few.high and few.n == 20
    assert many.high - many.low < few.high - few.low
    assert bootstrap([1.0] * 5) == bootstrap([1.0] * 5)
    assert bootstrap([]).n == 0


async def same(answer: str, reference: str) -> bool:
    return answer == reference


async def test_samples_count_with_their_multiplicity_and_unanswered_ones_as_wrong() -> None:
    expander = grow(branching(1, lambda made: made == [0]), candidates=1, test_time=True)
    expander.tree.searcher = "sample"
    await sample(expander, 4)
    record = await eval_record([expander.tree], same)
    assert record.samples == 4 and sum(c.count for c in record.candidates) == 4
    assert sum(c.count for c in record.candidates if c.correct) == 1
    found = measures("sample", [record])
    assert found["pass@1"].mean == pytest.approx(0.25)
    assert found["pass@4"].mean == 1.0
    assert record.tokens == expander.tree.tokens > 0


async def test_search_at_test_time_answers_with_the_highest_ppm_score() -> None:
    expander = grow(
        branching(1, lambda made: made == [1]),
        test_time=True,
        score=lambda text: 0.9 if "x1 = 1" in text else -0.9,
    )
    await Mcts(expander).search(4)
    record = await eval_record([expander.tree], same)
    assert len(record.candidates) == 1 and record.candidates[0].correct
    assert measures("mcts", [record])["accuracy"].mean == 1.0


async def test_problem_without_an_answer_counts_as_wrong() -> None:
    expander = grow(lambda prompt, seed, index: "nothing", test_time=True)
    await sample(expander, 1)
    record = await eval_record([expander.tree], same)
    assert measures("greedy", [record])["accuracy"].mean == 0.0


def test_levels_are_counted_in_order_with_all_last() -> None:
    values = [
        (Problem(str(i), "q", "1", level=level), ok)
        for i, (level, ok) in enumerate([("2", True), ("1", False), ("2", False)])
    ]
    assert by_level(values) == {"1": (0, 1), "2": (1, 2), "all": (1, 3)}
    assert list(by_level(values)) == ["1", "2", "all"]
