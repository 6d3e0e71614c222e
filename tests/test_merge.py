"""Merged, re-scored and continued trees keep what every tree promises, and generate nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from rstar.engines.simulated import SimulatedScorer, arithmetic_score
from rstar.search.expand import Expander, path_prompt
from rstar.search.mcts import Mcts
from rstar.search.merge import merge, rescore
from rstar.tree import Node, Tree
from rstar.types import Problem, TerminalReason, UserError
from tests.fakes import answer, branching, choices, depth_of, finish, grow, step


def faulty(prompt: str, seed: int, index: int) -> str:
    """`branching` of depth 2 (3 below choice 2: too deep), where some steps fail and some texts are cut short; another
    seed makes other mistakes."""
    if choices(prompt)[1:] == [1]:
        return step(3, "boom()")  # a dead end
    depth = 3 if choices(prompt)[:1] == [2] else 2
    text = branching(depth, lambda made: sum(made) % 2 == 0)(prompt, seed, index)
    roll = random.Random(f"{prompt}{seed}{index}").random()
    return text.replace("x", "boom", 1) if roll < 0.3 and "x" in text else text[:-3] if roll > 0.85 else text


def judge(text: str) -> float:
    return random.Random(text).uniform(-1, 1)


async def grown(
    seed: int, *, rollouts: int = 8, score=None, prior_visits: int = 1, test_time: bool = False
) -> Expander:
    expander = grow(
        faulty, candidates=3, seed=seed, score=score, prior_visits=prior_visits, max_depth=4, test_time=test_time
    )
    expander.tree.settings = {"ppm_prior_visits": prior_visits, "use_ppm": score is not None}
    await Mcts(expander).search(rollouts)
    expander.tree.complete = True
    return expander


def own(node: Node) -> tuple[int, float]:
    """Back-ups that began at a node of an unmerged tree, and their sum."""
    if node.reward is not None:
        return 1, node.reward
    return (1, node.ppm_value or 0.0) if node.terminal is TerminalReason.ANSWER else (0, 0.0)


def check(tree: Tree, sources: list[Tree] | None = None, prior_visits: int = 1) -> None:
    """Returns through a node = its own + those of its children, PPM priors aside; |Q| <= 1."""
    by_id = {t.tree_id: t for t in sources or [tree]}

    def prior(node: Node) -> tuple[int, float]:
        if node.ppm_value is None or node.terminal is TerminalReason.ANSWER:
            return 0, 0.0
        count = node.meta.get("priors", 1)
        return count * prior_visits, count * node.ppm_value * max(1, prior_visits)

    for node in tree.nodes:
        begun = [own(by_id[t].nodes[i]) for t, i in node.meta.get("sources", [[tree.tree_id, node.id]])]
        below = [(c.visit_count - prior(c)[0], c.value_sum - prior(c)[1]) for c in tree.children(node)]
        assert node.visit_count - prior(node)[0] == sum(n for n, _ in begun + below)
        assert node.value_sum - prior(node)[1] == pytest.approx(sum(v for _, v in begun + below))
        assert abs(node.q_value) <= 1 + 1e-9 or not prior_visits
        assert node.exhausted == (node.expanded and not tree.selectable(node))


def texts(tree: Tree, node: Node) -> list[str]:
    return [n.text for n in tree.path(node)]


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [None, judge], ids=["terminal-guided", "ppm-augmented"])
@pytest.mark.parametrize("seed", range(0, 24, 3))
async def test_merged_trees_add_up_and_every_node_says_where_it_comes_from(seed: int, score) -> None:
    trees = [(await grown(seed + i, score=score)).tree for i in range(3)]
    merged = merge(trees)
    check(merged, trees)
    assert merged.root.visit_count == sum(t.root.visit_count for t in trees)
    assert merged.root.value_sum == pytest.approx(sum(t.root.value_sum for t in trees))
    assert merged.rollouts_done == sum(t.rollouts_done for t in trees)
    assert sum(len(t.nodes) for t in trees) > len(merged.nodes) > max(len(t.nodes) for t in trees)
    by_id = {t.tree_id: t for t in trees}
    origins = [(tuple(origin), node) for node in merged.nodes for origin in node.meta["sources"]]
    assert len(origins) == sum(len(t.nodes) for t in trees) == len({origin for origin, _ in origins})
    for (tree_id, i), node in origins:
        assert texts(merged, node) == texts(by_id[tree_id], by_id[tree_id].nodes[i])
    for node in merged.nodes:
        paths = [tuple(texts(merged, child)) for child in merged.children(node)]
        assert len(paths) == len(set(paths))
    assert [strip(row) for row in Tree.from_rows(list(merged.to_rows())).to_rows()] == [
        strip(row) for row in merged.to_rows()
    ]


def strip(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "seconds"}


async def test_merged_in_two_steps_is_merged_at_once() -> None:
    trees = [(await grown(seed, score=judge)).tree for seed in range(3)]
    whole, halves = merge(trees), merge([merge(trees[:2]), trees[2]])
    assert whole.tree_id == halves.tree_id == "p#0+1+2"
    figures = [
        [(n.text, n.visit_count, pytest.approx(n.value_sum), n.terminal, n.meta) for n in t.nodes]
        for t in (whole, halves)
    ]
    assert figures[0] == figures[1]


async def test_tree_merged_with_itself_has_each_node_once_and_everything_twice() -> None:
    tree = (await grown(4, score=judge)).tree
    twice = merge([tree, tree])
    assert [(n.text, n.terminal, n.ppm_value) for n in twice.nodes] == [
        (n.text, n.terminal, n.ppm_value) for n in tree.nodes
    ]
    assert [(n.visit_count, n.value_sum) for n in twice.nodes] == [
        (2 * n.visit_count, 2 * n.value_sum) for n in tree.nodes
    ]
    assert [n.q_value for n in twice.nodes] == [pytest.approx(n.q_value) for n in tree.nodes]


def pair(*makes) -> Tree:
    """Merge of trees with one step "a" each, made by the given functions."""
    trees = []
    for i, make in enumerate(makes):
        tree = Tree(tree_id=f"p#{i}", problem=Problem("p", "q", "1"), prompt=("q",), seed=i)
        make(tree, tree.add_child(tree.root, text="a"))
        trees.append(tree)
    return merge(trees)


def dead(tree: Tree, node: Node) -> None:
    tree.add_child(node, text="bad", terminal=TerminalReason.CODE_ERROR)
    node.terminal, node.reward = TerminalReason.DEAD_END, -1.0
    tree.backpropagate(node, -1.0)


def alive(tree: Tree, node: Node) -> None:
    leaf = tree.add_child(node, text="good", terminal=TerminalReason.ANSWER, reward=1.0)
    tree.add_child(node, text="more")
    tree.backpropagate(leaf, 1.0)


def failed(tree: Tree, node: Node) -> None:
    node.terminal, node.error = TerminalReason.CODE_ERROR, "timeout"


def untouched(tree: Tree, node: Node) -> None:
    pass


def printed(tree: Tree, node: Node) -> None:
    node.stdout = "0.371"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("makes", "expected"),
    [
        ((dead, alive), None),  # somebody found a way on
        ((dead, untouched), TerminalReason.DEAD_END),  # somebody looked and found nothing
        ((failed, alive), None),  # a time-out need not repeat
        ((failed, untouched), None),
        ((failed, dead), TerminalReason.DEAD_END),
    ],
)
def test_most_open_source_decides_what_a_merged_node_is(makes, expected, order: int) -> None:
    tree = pair(*makes[::order])
    assert len(tree.root.children) == 1
    node = tree.nodes[tree.root.children[0]]
    assert node.terminal is expected and (node.reward == -1) == (expected is TerminalReason.DEAD_END)
    assert node.visit_count == sum(make in (dead, alive) for make in makes)
    assert tree.root.exhausted == (expected is TerminalReason.DEAD_END)


def test_same_text_with_other_printed_output_is_another_prefix() -> None:
    assert len(pair(untouched, printed).root.children) == 2


async def test_trees_of_different_problems_are_not_merged() -> None:
    tree = (await grown(0)).tree
    other = replace(tree, problem=Problem("p2", "q2", "1"), tree_id="p2#0")
    with pytest.raises(UserError, match="p2#0"):
        merge([tree, other])


async def test_merged_tree_can_be_searched_further() -> None:
    trees = [(await grown(seed, rollouts=3, score=judge)).tree for seed in (0, 1)]
    expander = await grown(0, rollouts=0, score=judge)
    before = expander.tree = merge(trees)
    merged_nodes = len(before.nodes)
    await Mcts(expander).search(before.rollouts_done + 6)
    assert len(before.nodes) > merged_nodes
    check(Tree.from_rows(list(before.to_rows())), [*trees, before])


# -- re-score ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_visits", [0, 1])
@pytest.mark.parametrize("seed", range(6))
async def test_rescoring_exchanges_the_priors_and_nothing_else(seed: int, prior_visits: int) -> None:
    tree = (await grown(seed, score=judge, prior_visits=prior_visits)).tree
    before = [strip(row) for row in tree.to_rows()]
    new = await rescore(tree, SimulatedScorer(lambda text: 0.5 * judge(text)), ppm="ppm-2")
    check(new, prior_visits=prior_visits)
    assert new.ppm == "ppm-2" and [strip(row) for row in tree.to_rows()] == before  # the old tree is as it was
    for old, node in zip(tree.nodes, new.nodes, strict=True):
        assert node.visit_count == old.visit_count
        assert (node.ppm_value is None) == (old.ppm_value is None)
        if old.ppm_value is not None:
            assert node.ppm_value == pytest.approx(0.5 * old.ppm_value)
            assert node.value_sum - old.value_sum == pytest.approx(node.ppm_value - old.ppm_value)
        else:
            assert node.value_sum == old.value_sum
    back = await rescore(new, SimulatedScorer(judge))
    assert [n.value_sum for n in back.nodes] == [pytest.approx(n.value_sum) for n in tree.nodes]


@pytest.mark.parametrize("prior_visits", [0, 1])
async def test_terminal_guided_tree_gets_the_priors_of_a_ppm_augmented_one(prior_visits: int) -> None:
    tree = (await grown(3, prior_visits=prior_visits)).tree
    new = await rescore(tree, SimulatedScorer(judge))
    check(new, prior_visits=prior_visits)
    scored = [n for n in new.nodes if n.ppm_value is not None]
    assert {n.id for n in scored} == {
        n.id for n in tree.nodes[1:] if n.terminal in (None, TerminalReason.DEAD_END)
    }  # what was live at its creation; answers are judged by their reward
    assert any(n.terminal is TerminalReason.DEAD_END for n in scored)
    for node in scored:
        assert node.visit_count == tree.nodes[node.id].visit_count + prior_visits
        assert node.value_sum == pytest.approx(tree.nodes[node.id].value_sum + (node.ppm_value or 0.0))
    assert new.root.visit_count == tree.root.visit_count and new.settings["use_ppm"]


async def test_rescored_terminal_guided_tree_is_the_ppm_augmented_tree_where_the_walks_are_the_same() -> None:
    """One candidate a step: there is one walk, so the PPM cannot lead elsewhere."""
    for prior_visits in (0, 1):
        plain, scored = (
            grow(branching(2, lambda made: True), candidates=1, score=score, prior_visits=prior_visits)
            for score in (None, judge)
        )
        for expander in (plain, scored):
            expander.tree.settings = {"ppm_prior_visits": prior_visits, "use_ppm": True}
            await Mcts(expander).search(1)
        rescored = await rescore(plain.tree, SimulatedScorer(judge))
        assert [strip(row) for row in rescored.to_rows()] == [strip(row) for row in scored.tree.to_rows()]


async def test_scorer_reads_what_it_read_when_the_node_was_made() -> None:
    seen: list[str] = []

    def score(text: str) -> float:
        seen.append(text)
        return 0.1

    expander = await grown(1, score=score)
    first, seen[:] = sorted(seen), []
    await rescore(expander.tree, SimulatedScorer(score))
    assert sorted(seen) == first and any("<output>v<end_of_output>" in text for text in first)


async def test_at_test_time_the_scores_of_the_answers_are_their_returns() -> None:
    tree = (await grown(5, score=judge, test_time=True)).tree
    new = await rescore(tree, SimulatedScorer(lambda text: 0.25 if text.endswith("<end_of_answer>") else -0.5))
    check(new)
    assert tree.answers() and {leaf.ppm_value for leaf in new.answers()} == {0.25}
    lost = [n for n in new.nodes if n.reward is not None]
    assert new.root.value_sum == pytest.approx(0.25 * len(new.answers()) - len(lost))


async def test_merged_trees_are_rescored_with_as_many_priors_as_they_have() -> None:
    trees = [(await grown(seed, score=judge)).tree for seed in (0, 1)]
    new = await rescore(merge(trees), SimulatedScorer(arithmetic_score))
    check(new, trees)
    assert any(n.meta.get("priors") == 2 for n in new.nodes)


# -- continue ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [None, judge], ids=["terminal-guided", "ppm-augmented"])
async def test_tree_continued_in_three_goes_is_the_tree_of_one(score) -> None:
    whole = (await grown(2, rollouts=30, score=score)).tree
    expander = await grown(2, rollouts=4, score=score)
    for rollouts in (11, 30):
        expander.tree = Tree.from_rows(list(expander.tree.to_rows()))
        expander.tree.complete = False
        await Mcts(expander).search(rollouts)
    expander.tree.complete = True
    assert [strip(row) for row in expander.tree.to_rows()] == [strip(row) for row in whole.to_rows()]
    check(expander.tree)


async def test_rescored_tree_is_continued_by_the_new_ppm() -> None:
    """Two starts, seen once each; the new PPM likes the other one, so the next walk goes there."""

    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer(str(index))
        return step(depth_of(prompt) + 1, f"x{depth_of(prompt) + 1} = {index}") if depth_of(prompt) < 4 else finish("v")

    for liked in (0, 1):
        expander = grow(script, candidates=2, score=lambda text: 0.0)
        expander.tree.settings = {"ppm_prior_visits": 1, "use_ppm": True}
        await Mcts(expander).search(2)
        scorer = SimulatedScorer(lambda text, liked=liked: 1.0 if choices(text)[:1] == [liked] else -1.0)
        before = expander.tree = await rescore(expander.tree, scorer)
        visits = [child.visit_count for child in before.children(before.root)]
        await Mcts(Expander(before, expander.tools, expander.sampling), c=0.1).search(3)
        grew = [c.visit_count > n for c, n in zip(before.children(before.root), visits, strict=True)]
        assert grew == [liked == 0, liked == 1]
        assert path_prompt(before, before.root).text == "Q: q\n<code>\n"
