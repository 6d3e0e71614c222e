"""Extractors against the golden cases, and their provenance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rstar.extract.outcomes import outcome_rows
from rstar.extract.preferences import capped, outcome_counts, preference_rows, sibling_pairs
from rstar.extract.q_values import q_rows
from rstar.extract.sft import accuracy, sft_rows
from rstar.extract.trajectories import content, path_segments, provenance, ranked
from rstar.problems.records import SYNTHETIC
from rstar.search.mcts import Mcts
from rstar.search.merge import merge
from rstar.store import write_rows
from rstar.tree import Node, Tree
from rstar.types import Problem, TerminalReason, Trajectory, UserError
from tests.fakes import branching, grow, step


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


def solved(*paths: tuple[str, str, dict[str, float]], reward: float = 1.0) -> Tree:
    """A tree of paths (program, answer step, fields of the answer's node) below the root, all with Q = `reward`."""
    tree = Tree("p#0", Problem("p", "q", "5"), ("q", "<code>\n"))
    for program, answer, fields in paths:
        code = tree.add_child(
            tree.root, text=f"{program}<end_of_code>", code=program, visit_count=1, value_sum=reward, logprob=-1.0
        )
        tree.add_child(
            code, text=f"{answer}<end_of_answer>", answer="5", terminal=TerminalReason.ANSWER, reward=reward,
            visit_count=1, value_sum=reward, **fields,
        )  # fmt: skip
    return tree


def answers_of(tree: Tree, **options: int) -> list[str]:
    return [row.segments[-1][0].removesuffix("<end_of_answer>") for row in sft_rows([tree], **options)]


def test_rows_of_a_problem_are_different_programs() -> None:
    tree = solved(
        ("# Step 1\nx = 2 + 3\nprint(x)\n", "\\boxed{5}.", {}),
        ("# Add them\n\nx = 2+3  # sum\n\nprint( x )", "So \\boxed{5}.", {}),
        ("x = 5\nprint(x)\n", "We get \\boxed{5}.", {}),
        ("if True:\n    x = 5\n\n    # done\n    print(x)\n", "It is \\boxed{5}.", {}),
        ("if True:\n  x = 5\n  print(x)\n", "It has to be \\boxed{5}.", {}),
    )
    assert answers_of(tree, top=9) == ["\\boxed{5}.", "We get \\boxed{5}.", "It is \\boxed{5}."]
    assert len(sft_rows([tree], top=9, by="random")) == 3


def test_cut_of_a_program_into_steps_makes_no_second_program() -> None:
    assert content(["x = 1\n", "# Step 2\ny = 2\n"], "a") == content(["x = 1\ny = 2"], "b")
    assert content(["x = 1"], "") != content(["x = '1'"], "")
    assert content(["x = (1"], "") == content(["x  =  (1"], "") != content(["x = [1"], "")  # no Python


def test_solutions_in_words_differ_by_their_words() -> None:
    assert content([], "Two and  three\nis 5.") == content([], "two and three is 5.") != content([], "It is 5.")


def test_equal_q_ranks_by_multiplicity_then_log_probability_then_creation() -> None:
    tree = solved(
        ("print(5)", "a \\boxed{5}", {"multiplicity": 1, "logprob": -0.5}),
        ("print(4+1)", "b \\boxed{5}", {"multiplicity": 3, "logprob": -2.0}),
        ("print(3+2)", "c \\boxed{5}", {"multiplicity": 1, "logprob": -0.1}),
        ("print(1+4)", "d \\boxed{5}", {"multiplicity": 1}),
        ("print(2+3)", "e \\boxed{5}", {"multiplicity": 1}),
    )
    assert [text[0] for text in answers_of(tree, top=9)] == list("bcade")
    tree.nodes[-1].value_sum = 2.0  # the mean Q stays first
    assert answers_of(tree, top=1) == ["e \\boxed{5}"]


def test_answer_that_goes_on_is_a_row_only_where_there_is_no_cleaner_one() -> None:
    going_on = ("print(5)", "\\boxed{5}. That is it.", {"multiplicity": 9})
    assert answers_of(solved(going_on)) == ["\\boxed{5}. That is it."]
    assert answers_of(solved(going_on, ("print(2+3)", "\\boxed{5}.", {}))) == ["\\boxed{5}."]


def test_answers_of_old_trees_that_are_malformed_now_give_no_rows() -> None:
    tree = solved(("print(5)", "\\boxed{5}.of_the_answer_to_", {}))
    assert sft_rows([tree]) == [] and outcome_rows(tree) == [] and outcome_counts(tree)[0] == (0, 0)


def test_pairs_have_different_programs_on_their_sides() -> None:
    tree = solved(("# a\nprint(6-1)", "\\boxed{5}.", {}))
    for program, answer in (("#  b\nprint(6 - 1)", "\\boxed{6}."), ("print(6)", "\\boxed{6}.")):
        other = solved((program, answer, {}), reward=-1.0)
        code = tree.add_child(tree.root, **{k: getattr(other.nodes[1], k) for k in ("text", "code", "value_sum")})
        code.visit_count = 1
        leaf = ("text", "answer", "value_sum", "visit_count", "reward", "terminal")
        tree.add_child(code, **{k: getattr(other.nodes[2], k) for k in leaf})
    for rows in (
        preference_rows(tree, min_edit_distance=0, answer_pairs=False),
        [row for row in preference_rows(tree, min_margin=9, min_edit_distance=0) if row.kind == "answer"],
    ):
        assert len(rows) == 1 and "print(6)" in rows[0].rejected


def test_chosen_answers_are_clean_where_there_are_clean_ones() -> None:
    tree = solved(("print(5)", "\\boxed{5}. That is it.", {}))
    for text, reward in (("\\boxed{5}.", 1.0), ("\\boxed{6}.", -1.0), ("\\boxed{5}.of_the", 1.0)):
        tree.add_child(
            tree.nodes[1], text=f"{text}<end_of_answer>", answer=text[7], terminal=TerminalReason.ANSWER,
            reward=reward, visit_count=1, value_sum=reward,
        )  # fmt: skip
    assert [r.chosen for r in preference_rows(tree, min_edit_distance=0)] == ["\\boxed{5}.<end_of_answer>"]


async def test_random_choice_takes_correct_solutions_regardless_of_q_and_the_same_ones_every_time() -> None:
    tree = await searched()
    every = {row.completion for row in sft_rows([tree], top=99)}
    drawn = [row.completion for row in sft_rows([tree], top=99, by="random")]
    assert set(drawn) == every and drawn != [row.completion for row in sft_rows([tree], top=99)]
    assert [row.completion for row in sft_rows([tree], top=2, by="random")] == drawn[:2]
    with pytest.raises(UserError, match="mean_q or random"):
        sft_rows([tree], by="q")


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
    left = capped([everything], 3)
    assert [r.q_margin for r in left] == sorted((r.q_margin for r in everything), reverse=True)[:3]


async def test_pair_cap_is_of_the_problem_and_leaves_every_prefix_its_whole_weight() -> None:
    pairs = preference_rows(await searched(), min_margin=0, min_edit_distance=0)
    for most in range(1, 2 * len(pairs) + 2):
        left = capped([pairs, pairs], most)  # two trees of one problem
        assert len(left) == min(most, 2 * len(pairs))
        weights: Counter[tuple[str, ...]] = Counter()
        for row in left:
            weights[row.kind, row.prompt] += row.weight
        # each prefix that is left counts once in each tree that has pairs of it left
        assert all(total == pytest.approx(1.0) or total == pytest.approx(2.0) for total in weights.values())
    assert capped([pairs], 0) == pairs


async def test_outcome_rows_label_every_graded_answer() -> None:
    tree = await searched()
    rows = outcome_rows(tree)
    assert len(rows) == len(tree.answers())
    assert [row.label for row in rows] == [float(leaf.reward == 1) for leaf in tree.answers()]


async def test_q_rows_hold_every_searched_step_once_with_its_q() -> None:
    tree = await searched()
    rows = q_rows(tree)
    found = {ident: q for row in rows for ident, q in zip(row.node_ids, row.q_values, strict=True)}
    visited = [node for node in tree.nodes[1:] if node.visit_count]
    assert sum(len(row.node_ids) for row in rows) == len(found) == len(visited)
    assert found == {node.id: node.q_value for node in visited}
    for row in rows:
        assert len(row.steps) == len(row.q_values) and row.completion == "".join(t for s in row.steps for t in s)
        assert "".join(row.prompt_segments) == row.prompt
        whole = row.prompt + row.completion
        assert whole == "".join(tree.prompt) + "".join(t for t, _ in path_segments(tree, tree.nodes[row.node_ids[-1]]))


async def test_q_rows_leave_out_failures_and_the_ppm_s_own_opinion() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return step(1, "boom()") if index == 0 else branching(1, lambda made: True)(prompt, seed, index)

    expander = grow(script, candidates=4, score=lambda text: 0.9)
    await Mcts(expander).search(1)
    tree = expander.tree
    ids = {ident for row in q_rows(tree) for ident in row.node_ids}
    assert any(node.terminal is TerminalReason.CODE_ERROR for node in tree.nodes)
    only_prior = [node.id for node in tree.nodes if node.visit_count == 1 and node.ppm_value is not None]
    assert only_prior and not ids & set(only_prior)
    assert ids == {node.id for node in tree.path(tree.answers()[0])}


def mixed(right: int, wrong: int, source: str) -> Tree:
    tree = Tree("p#0", Problem("p", "q", "1", source=source), ("q",))
    for reward, count in ((1.0, right), (-1.0, wrong)):
        tree.add_child(
            tree.root, text=f"{reward}<end_of_answer>", terminal=TerminalReason.ANSWER, reward=reward, answer="1",
            multiplicity=count, visit_count=1, value_sum=reward,
        )  # fmt: skip
    return tree


@pytest.mark.parametrize(("right", "wrong", "kept"), [(5, 5, 1), (4, 5, 0), (9, 1, 1)])
def test_synthetic_problems_below_half_accuracy_give_no_sft_row(right: int, wrong: int, kept: int) -> None:
    tree = mixed(right, wrong, SYNTHETIC)
    assert accuracy([tree]) == right / (right + wrong)
    assert len(sft_rows([tree])) == kept
    assert len(sft_rows([tree], min_synthetic_accuracy=0.0)) == 1
    assert len(sft_rows([mixed(right, wrong, "gsm8k")])) == 1


async def test_one_correct_solution_gives_one_row() -> None:
    expander = grow(branching(2, lambda made: made == [0, 0]))
    await Mcts(expander).search(8)
    assert len(sft_rows([expander.tree], top=2)) == 1


async def test_row_files_load_as_data_sets_with_the_ecosystem_s_columns(tmp_path: Path) -> None:
    """Preference rows are step-DPO rows as they stand: prompt up to the step, chosen and rejected step."""
    datasets = pytest.importorskip("datasets")
    tree = await searched()
    pairs = preference_rows(tree, min_margin=0, min_edit_distance=0)
    files = {"sft": sft_rows([tree]), "pairs": pairs, "orm": outcome_rows(tree), "pqm": q_rows(tree)}
    columns = {
        "sft": {"prompt", "completion"},
        "pairs": {"prompt", "chosen", "rejected"},
        "orm": {"prompt", "completion", "label"},
        "pqm": {"prompt", "completion", "q_values"},
    }
    for name, rows in files.items():
        path = tmp_path / f"{name}.jsonl"
        assert write_rows(path, rows) == len(rows) > 0
        table = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
        assert len(table) == len(rows)
        assert columns[name] | {"problem_id", "tree_id", "node_ids"} <= set(table.column_names)
    step_rows = [row for row in pairs if row.kind == "step"]
    assert all(row.chosen.count("<end_of_step>") + row.chosen.count("<end_of_code>") <= 1 for row in step_rows)
    assert "margin" not in datasets.load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"), split="train"
    ).column_names  # fmt: skip


async def test_rows_of_a_tree_do_not_depend_on_the_prompt_it_was_searched_with() -> None:
    """D16: what a bootstrap policy wrote is trained under the prompt of the trained model."""
    tree = await searched()
    other = replace(tree, prompt=("Other: q\n", "<code>\n"))
    assert [r.completion for r in sft_rows([other])] == [r.completion for r in sft_rows([tree])]
    assert {r.prompt for r in sft_rows([other])} == {"Other: q\n<code>\n"}
    assert all(
        r.prompt.startswith("Other: q\n<code>\n") for r in [*preference_rows(other, min_margin=0), *q_rows(other)]
    )


def two_starts(prompt: str, seed: int, index: int) -> str:
    """Seed 0 begins with choices 0 and 1, seed 5 with 1 and 2; only choice 1 leads to the answer."""
    text = branching(1, lambda made: made == [1])(prompt, seed, index)
    return text if "<end_of_step>" in prompt or seed == 0 else text.replace(f"x1 = {index}", f"x1 = {index + 1}")


async def test_deviation_D19_siblings_of_all_seeds_face_each_other_and_rows_say_where_they_are() -> None:
    trees = []
    for seed in (0, 5):
        expander = grow(two_starts, seed=seed)
        await Mcts(expander).search(4)
        trees.append(expander.tree)
    merged = merge(trees)
    options = {"min_margin": 0.0, "min_edit_distance": 0, "answer_pairs": False}
    alone = [(r.chosen, r.rejected) for tree in trees for r in preference_rows(tree, **options)]
    rows = preference_rows(merged, **options)
    assert len(alone) == 2 and {(r.chosen, r.rejected) for r in rows} == set(alone)
    assert [r.tree_id for r in rows] == ["p#0", "p#5"] or [r.tree_id for r in rows] == ["p#5", "p#0"]
    by_id = {tree.tree_id: tree for tree in trees}
    for row in rows:
        chosen, rejected = (by_id[row.tree_id].nodes[i] for i in row.node_ids)
        assert row.chosen == chosen.text + "\n" and row.rejected == rejected.text + "\n"
    (solution,) = sft_rows([merged])
    path = [by_id[solution.tree_id].nodes[i] for i in solution.node_ids]
    assert path == by_id[solution.tree_id].path(path[-1]) and path[-1].reward == 1
    assert len(q_rows(merged)) == 3 and all(row.tree_id in by_id for row in [*q_rows(merged), *outcome_rows(merged)])


def test_nodes_of_different_seeds_are_named_by_the_merged_tree() -> None:
    tree = Tree("p#0+5", Problem("p", "q", "1"), ("q",))
    for source in (["p#0", 4], ["p#5", 7]):
        tree.add_child(tree.root, text="s", meta={"sources": [source]})
    assert provenance(tree, [1]) == ("p#0", (4,)) and provenance(tree, [2]) == ("p#5", (7,))
    assert provenance(tree, [1, 2]) == ("p#0+5", (1, 2))
