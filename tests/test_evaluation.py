"""Evaluation from trees: votes, pass@k, intervals, token accounting."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest

from rstar.evaluation import (
    Candidate,
    EvalRecord,
    Pick,
    bootstrap,
    by_level,
    chosen_share,
    eval_record,
    mcnemar,
    measures,
    paired,
    pass_at_k,
    top_score,
    vote,
)
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


def test_weighted_votes_count_samples_and_never_count_against_an_answer() -> None:
    assert (best := vote([Candidate("1", 0.2, 3, True), Candidate("2", 0.9, 1, False)], weighted=True))
    assert best.answer == "1"  # 3 x 0.6 against 0.95
    poor = [Candidate("1", -0.3, 4, True), Candidate("2", -0.2, 1, False)]
    assert (best := vote(poor, weighted=True)) and best.answer == "1"  # sums of raw scores would say -1.2 against -0.2


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


def test_bootstrap_over_items_resamples_whole_problems() -> None:
    assert bootstrap([9, 0], [9, 1]).mean == pytest.approx(0.9)
    clustered = bootstrap([10.0, 0.0] * 10, [10] * 20)
    assert clustered.low < 0.4 and clustered.high > 0.6  # 200 independent items would give [0.43, 0.57]


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (10, 2, 158 / 4096), (3, 3, 1.0)])
def test_mcnemar_is_exact(wins: int, losses: int, p: float) -> None:
    assert mcnemar(wins, losses) == mcnemar(losses, wins) == pytest.approx(p)


def test_paired_comparison_sees_what_two_separate_intervals_cannot() -> None:
    hard = [0.0, 1.0] * 20
    better = [1.0] * 6 + hard[6:]
    found = paired(better, hard)
    assert (found.wins, found.losses) == (3, 0) and found.p_value == pytest.approx(0.25)
    assert found.difference.mean == pytest.approx(3 / 40) and found.difference.low >= 0
    assert bootstrap(better).low < bootstrap(hard).mean
    assert paired([0.5], [1.0]).p_value is None


def scored(*table: tuple[str, float | None, int], samples: int) -> EvalRecord:
    found = tuple(Candidate(answer, score, count, answer == "7") for answer, score, count in table)
    return EvalRecord("p", "1", "", found, samples, 100, 10, 1.0)


def by_enumeration(record: EvalRecord, k: int, pick: Pick) -> float:
    """The share over every set of k samples, one by one."""
    pool = [i for i, c in enumerate(record.candidates) for _ in range(c.count)]
    pool += [-1] * (record.samples - len(pool))
    right = []
    for drawn in combinations(pool, k):
        best = pick([replace(c, count=drawn.count(i)) for i, c in enumerate(record.candidates) if i in drawn])
        right.append(best is not None and best.correct)
    return sum(right) / len(right)


PICKS: dict[str, Pick] = {
    "top score": top_score,
    "majority": vote,
    "weighted": partial(vote, weighted=True),
    "majority of the top 3": partial(vote, top_k=3),
}


@pytest.mark.parametrize("name", PICKS)
def test_share_of_right_choices_is_that_of_all_sets_of_samples(name: str) -> None:
    rng, pick = random.Random(name), PICKS[name]
    for _ in range(60):
        scores = rng.choice(((None,), (0.5, -0.5), tuple(rng.uniform(-1, 1) for _ in range(9))))
        answers = rng.choice(("75", "753", "7531"))
        found = [(rng.choice(answers), rng.choice(scores), rng.randint(1, 3)) for _ in range(rng.randint(1, 5))]
        while sum(count for _, _, count in found) > 9:
            found.pop()
        record = scored(*found, samples=sum(count for _, _, count in found) + rng.randint(0, 2))
        for k in range(1, record.samples + 1):
            assert chosen_share(record, k, pick) == pytest.approx(by_enumeration(record, k, pick), abs=1e-12)


def test_majority_of_hundred_samples_is_exact_and_soon_counted() -> None:
    """Two answers: the majority of k is right where more than half of the drawn are, ties go to the better score."""
    record = scored(("7", 0.9, 1), *(("7", 0.0, 1) for _ in range(39)), ("5", 0.5, 60), samples=100)
    begun = time.process_time()
    for k in (1, 4, 16, 51, 64):
        sets = [math.comb(40, n) * math.comb(60, k - n) for n in range(min(40, k) + 1)]
        tied = math.comb(39, k // 2 - 1) * math.comb(60, k // 2) if k % 2 == 0 else 0  # with the best one among them
        expected = sum(ways for n, ways in enumerate(sets) if 2 * n > k) + tied
        assert chosen_share(record, k, vote) == pytest.approx(expected / math.comb(100, k), rel=1e-12)
    assert time.process_time() - begun < 2


def test_what_cannot_be_counted_is_estimated() -> None:
    """Single votes: the answer with the best score wins wherever it is drawn."""
    record = scored(("7", 0.9, 1), *((f"not {i}", i / 50, 1) for i in range(39)), samples=40)
    found = [chosen_share(record, k, PICKS["weighted"]) for k in (10, 20)]
    assert found == pytest.approx([0.25, 0.5], abs=0.1)


def test_fewer_samples_than_drawn_stand_for_all_sets_of_as_many() -> None:
    record = scored(("7", 0.9, 1), ("5", 0.1, 2), samples=8)  # five samples found no answer
    shares = [chosen_share(record, k, top_score) for k in range(1, 9)]
    assert shares == pytest.approx([k / 8 for k in range(1, 9)])  # it wins wherever it is drawn
    assert chosen_share(record, 8, vote) == 0.0 < chosen_share(record, 2, vote)
    assert chosen_share(scored(("5", 0.1, 2), samples=8), 2, vote) == 0.0


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


async def test_votes_are_counted_by_value_and_not_by_spelling() -> None:
    script = branching(1, lambda made: True)
    expander = grow(
        lambda prompt, seed, i: script(prompt, seed, i).replace("{1}", "{0.50}" if "x1 = 0" in prompt else "{1/2}"),
        test_time=True,
        answer="1/2",
    )
    expander.tree.searcher = "sample"
    await sample(expander, 2)
    record = await eval_record([expander.tree], same)
    assert {c.answer for c in record.candidates} == {"1/2"} and len(record.candidates) == 2


async def test_samples_with_scores_have_a_best_of_n() -> None:
    expander = grow(branching(1, lambda made: made == [0]), test_time=True, score=lambda text: 0.5 * ("x1 = 0" in text))
    expander.tree.searcher = "sample"
    await sample(expander, 2)
    assert measures("sample", [await eval_record([expander.tree], same)])["best-of-2"].mean == 1.0


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
