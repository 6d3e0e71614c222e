"""Extractors against the golden cases, and their provenance."""

from __future__ import annotations

import pytest

from rstar.extract.outcomes import outcome_rows
from rstar.extract.preferences import outcome_counts, preference_rows, sibling_pairs
from rstar.extract.sft import sft_rows
from rstar.extract.trajectories import ranked
from rstar.search.mcts import Mcts
from rstar.tree import Node, Tree
from rstar.types import Problem, TerminalReason, Trajectory
from tests.fakes import branching, grow


def test_g3_pairs_are_two_highest_that_lead_right_times_two_lowest_that_lead_wrong() -> None:
    table = {
        "a": (0.8, 2, 0),
        "b": (0.5, 1, 1),
        "c": (0.1, 1, 0),
        "d": (-0.3, 0, 1),
        "e": (-0.6, 0, 3),
        "f": (-1.0, 0, 0),
    }
    nodes = [
        Node(id=i, parent=0, text=k, visit_count=10, value_sum=q * 10) for i, (k, (q, _, _)) in enumerate(table.items())
    ]
    counts = [(right, wrong) for _, right, wrong in table.values()]
    pairs = sibling_pairs(nodes, counts)
    found = {g.text + b.text: pytest.approx(g.q_value - b.q_value) for g, b in pairs}
    assert found == {"ae": 1.4, "ad": 1.1, "be": 1.1, "bd": 0.8}


def test_one_positive_may_face_four_negatives_and_the_other_way_round() -> None:
    nodes = [
        Node(id=i, parent=0, visit_count=1, value_sum=v) for i, v in enumerate([1.0, -0.2, -0.4, -0.6, -0.8, -1.0])
    ]
    counts = [(1, 0), *[(0, 1)] * 5]
    assert [(g.id, b.id) for g, b in sibling_pairs(nodes, counts)] == [(0, 5), (0, 4), (0, 3), (0, 2)]
    flipped = [
        Node(id=i, parent=0, visit_count=1, value_sum=-v) for i, v in enumerate([1.0, -0.2, -0.4, -0.6, -0.8, -1.0])
    ]
    counts = [(0, 1), *[(1, 0)] * 5]
    assert [(g.id, b.id) for g, b in sibling_pairs(flipped, counts)] == [(5, 0), (4, 0), (3, 0), (2, 0)]


def test_g5_trajectories_rank_by_mean_q() -> None:
    table = {"t1": [0.333333, 1], "t2": [0.333333, 0.2, 1], "t3": [-0.5, 0.9, 1], "t4": [0.333333, 0.7, 1]}
    found = [Trajectory(k, (), (), tuple(v), "", 1.0) for k, v in table.items()]
    best = ranked(found)
    assert [t.tree_id for t in best[:2]] == ["t4", "t1"]
    assert [round(t.mean_q, 6) for t in best] == [0.677778, 0.666667, 0.511111, 0.466667]


def test_equal_means_rank_by_the_smallest_q() -> None:
    rough, smooth = (Trajectory(k, (), (), v, "", 1.0) for k, v in (("rough", (0.0, 1.0)), ("smooth", (0.5, 0.5))))
    assert [t.tree_id for t in ranked([rough, smooth])] == ["smooth", "rough"]


async def searched(depth: int = 2, rollouts: int = 30) -> Tree:
    expander = grow(branching(depth, lambda made: made[0] == 1 or made == [0, 2]), candidates=3)
    await Mcts(expander).search(rollouts)
    return expander.tree


async def test_sft_rows_are_distinct_correct_and_carry_borders_and_provenance() -> None:
    tree = await searched()
    rows = sft_rows([tree], top=2)
    assert len(rows) == 2 and len({row.completion for row in rows}) == 2
    for row in rows:
        assert "".join(text for text, _ in row.segments) == row.completion
        assert row.prompt == "".join(tree.prompt) == "".join(row.prompt_segments)
        leaf = tree.nodes[row.node_ids[-1]]
        assert leaf.reward == 1 and [n.id for n in tree.path(leaf)] == list(row.node_ids)
        ours = [text for text, model in row.segments if not model]
        assert ours == ["<output>v<end_of_output>\n<answer>"]
    assert len(sft_rows([tree, tree], top=9)) == len(sft_rows([tree], top=9))  # the same text twice is one row


async def test_word_error_in_a_solution_does_not_drop_it() -> None:
    """The official code drops every trace that contains "error", a margin of error too."""
    expander = grow(branching(1, lambda made: True), candidates=1)
    await Mcts(expander).search(1)
    expander.tree.nodes[1].text = "# Step 1: the standard error\nx1 = 0\n<end_of_step>"
    assert len(sft_rows([expander.tree])) == 1


async def test_pairs_share_their_prefix_and_weights_count_the_survivors() -> None:
    tree = await searched()
    rows = preference_rows(tree, min_margin=0.5, min_edit_distance=0, answer_pairs=False)
    assert rows and all(row.kind == "step" for row in rows)
    by_prefix: dict[str, list] = {}
    for row in rows:
        chosen, rejected = (tree.nodes[i] for i in row.node_ids)
        assert chosen.parent == rejected.parent
        assert row.q_margin == pytest.approx(chosen.q_value - rejected.q_value) and row.q_margin >= 0.5
        assert row.chosen.startswith(chosen.text) and row.rejected.startswith(rejected.text)
        by_prefix.setdefault(row.prompt, []).append(row)
    for group in by_prefix.values():
        assert sum(row.weight for row in group) == pytest.approx(1.0)


async def test_deviation_D8_margin_and_edit_distance_filters_have_switches() -> None:
    tree = await searched()
    options = {"answer_pairs": False}
    everything = preference_rows(tree, min_margin=0.0, min_edit_distance=0, **options)
    assert len(preference_rows(tree, min_margin=1.99, min_edit_distance=0, **options)) < len(everything)
    assert (
        preference_rows(tree, min_margin=0.0, min_edit_distance=20, **options) == []
    )  # the toy steps differ by one digit
    assert len(preference_rows(tree, min_margin=0.0, min_edit_distance=1, **options)) == len(everything)


async def test_deviation_D9_answer_pairs_compare_whole_trajectories() -> None:
    tree = await searched()
    rows = [r for r in preference_rows(tree, min_margin=0, min_edit_distance=0) if r.kind == "answer"]
    assert len(rows) == 4
    for row in rows:
        good, bad = (tree.nodes[i] for i in row.node_ids)
        assert (good.reward, bad.reward) == (1.0, -1.0)
        assert row.prompt_segments == tree.prompt
        assert row.chosen.endswith("<end_of_answer>") and row.rejected.endswith("<end_of_answer>")
    assert not [r for r in preference_rows(tree, answer_pairs=False) if r.kind == "answer"]


async def test_problem_with_one_sided_outcomes_gives_no_pair() -> None:
    expander = grow(branching(2, lambda made: True))
    await Mcts(expander).search(8)
    assert preference_rows(expander.tree, min_margin=0, min_edit_distance=0) == []


def test_failed_steps_count_as_neither_outcome() -> None:
    tree = Tree("t", Problem("p", "q", "1"), ("q",))
    child = tree.add_child(tree.root, text="s")
    tree.add_child(child, text="e", terminal=TerminalReason.CODE_ERROR)
    tree.add_child(child, text="d", terminal=TerminalReason.MAX_DEPTH, reward=-1.0)
    tree.add_child(child, text="r", terminal=TerminalReason.ANSWER, reward=1.0)
    assert outcome_counts(tree)[1] == (1, 0)


async def test_pair_cap_keeps_the_widest_margins() -> None:
    tree = await searched()
    everything = preference_rows(tree, min_margin=0, min_edit_distance=0)
    capped = preference_rows(tree, min_margin=0, min_edit_distance=0, max_pairs=3)
    assert [r.q_margin for r in capped] == sorted((r.q_margin for r in everything), reverse=True)[:3]


async def test_outcome_rows_label_every_graded_answer() -> None:
    tree = await searched()
    rows = outcome_rows(tree)
    assert len(rows) == len(tree.answers())
    assert [row.label for row in rows] == [float(leaf.reward == 1) for leaf in tree.answers()]
