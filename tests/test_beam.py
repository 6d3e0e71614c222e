"""Step beam search and DVTS on scripted trees; best-of-n."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from rstar.config import SearchSection
from rstar.engines.simulated import SimulatedPolicy
from rstar.evaluation import eval_record
from rstar.search.beam import beam_search, dvts
from rstar.search.expand import Expander
from rstar.search.sample import sample
from rstar.tree import Node
from rstar.types import TerminalReason
from tests.fakes import answer, branching, choices, depth_of, exact_grade, finish, grow, step


def expanded(expander: Expander) -> list[list[int]]:
    """The choices that lead to each expanded node, in creation order."""
    nodes = [node for node in expander.tree.nodes if node.expanded]
    return [choices("".join(n.text + "\n" for n in expander.tree.path(node))) for node in nodes]


def by_choices(values: dict[tuple[int, ...], float], default: float = -0.5) -> Callable[[str], float]:
    return lambda text: values.get(tuple(choices(text)), default)


async def test_beam_keeps_the_best_nodes_of_all_parents_together() -> None:
    """Both places go to the children of 0 where those are the best, whatever 1 leads to."""
    scores = {(0,): 0.9, (1,): 0.8, (2,): 0.1, (0, 1): 0.7, (0, 2): 0.6, (1, 0): 0.5}
    expander = grow(branching(2, lambda made: True), candidates=3, score=by_choices(scores))
    await beam_search(expander, 2)
    assert expanded(expander)[:5] == [[], [0], [1], [0, 1], [0, 2]]
    assert sum(node.terminal is TerminalReason.ANSWER for node in expander.tree.nodes) == 2


async def test_finished_candidate_gives_its_place_up_and_the_other_is_expanded_under_itself() -> None:
    """The released selector's bug: beam 2, the best candidate is an answer."""

    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer(str(index))
        if depth_of(prompt) == 0:
            return finish("v") if index == 0 else step(1, f"x1 = {index}")
        return step(2, f"x2 = {10 * choices(prompt)[-1] + index}") if depth_of(prompt) == 1 else finish("v")

    def score(text: str) -> float:
        made = choices(text)
        return 0.9 if "boxed{0}" in text else 0.5 if made == [1, 10] else 0.4 if made == [1] or not made else 0.1

    expander = grow(script, candidates=2, score=score, test_time=True)
    await beam_search(expander, 2)
    tree = expander.tree
    code, other = tree.children(tree.root)
    first, second = tree.children(code)
    assert (first.ppm_value, second.ppm_value) == (0.9, 0.4)  # the best of the four below takes its place along
    kept, left = tree.children(other)
    assert [choices(node.text) for node in (kept, left)] == [[10], [11]]
    assert kept.expanded and not left.expanded and not first.expanded
    assert all(choices(tree.nodes[child.parent or 0].text) == [10] for child in tree.children(kept))


async def test_beam_shrinks_by_one_for_each_answer_among_the_best() -> None:
    """Width 3 at the second depth: two answers take two places, one node goes on."""

    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer(str(index))
        if depth_of(prompt) < 1:
            return finish("v") if index == 0 else step(1, f"x1 = {index}")
        return step(2, f"x2 = {index}") if depth_of(prompt) == 1 else finish("v")

    def score(text: str) -> float:
        return 0.5 if "boxed" in text else 0.0

    expander = grow(script, candidates=3, score=score, test_time=True)
    expander.sampling = SearchSection(candidates=3, answer_candidates=2, max_step_tokens=99)
    await beam_search(expander, 3)
    tree = expander.tree
    at_depth_two = [node for node in tree.nodes if tree.depth(node) == 2 and node.terminal is None]
    assert len(tree.children(tree.nodes[1])) == 2 and len(at_depth_two) == 6
    assert sum(node.expanded for node in at_depth_two) == 1


async def test_answers_below_the_beam_are_kept_but_take_no_place() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer(str(index))
        return finish(str(index))

    expander = grow(script, candidates=4, score=lambda text: -0.5 if "boxed" in text else 0.5, test_time=True)
    await beam_search(expander, 2)
    assert len(expander.tree.answers()) == 8
    record = await eval_record([expander.tree], _same)
    assert len(record.candidates) == 1 and record.candidates[0].score == -0.5


async def _same(answer: str, reference: str) -> bool:
    return answer == reference


async def test_beam_in_data_generation_ranks_answers_by_their_reward_and_live_nodes_by_the_ppm() -> None:
    expander = grow(branching(1, lambda made: made == [1]), candidates=2, score=by_choices({(0,): 0.4, (1,): 0.3}))
    await beam_search(expander, 2)
    assert sorted(leaf.reward or 0 for leaf in expander.tree.answers()) == [-1, 1]
    assert all(leaf.ppm_value is None for leaf in expander.tree.answers())
    assert expander.tree.root.visit_count == 2


async def test_beam_ends_where_nothing_is_left() -> None:
    expander = grow(lambda prompt, seed, index: step(1, "boom()"), score=lambda text: 0.0)
    await beam_search(expander, 4)
    assert expander.tree.root.terminal is TerminalReason.DEAD_END
    deep = grow(branching(9, lambda made: True), score=lambda text: 0.0, max_depth=3)
    await beam_search(deep, 2)
    assert max(map(deep.tree.depth, deep.tree.nodes)) == 3


def starts(expander: Expander, nodes: list[Node]) -> set[int]:
    return {expander.tree.path(node)[0].id for node in nodes}


async def test_dvts_subtrees_share_nothing_but_the_root() -> None:
    """One start looks best everywhere: a beam of 2 goes there twice, two subtrees must not."""
    scores = {(i, j): 0.9 if i == 0 else 0.1 for i in range(4) for j in range(4)}
    scores |= {(0,): 0.9, (1,): 0.2, (2,): 0.3, (3,): 0.1}
    beam = grow(branching(2, lambda made: True), candidates=4, score=by_choices(scores), test_time=True)
    await beam_search(beam, 2)
    assert len(starts(beam, beam.tree.answers())) == 1
    diverse = grow(branching(2, lambda made: True), candidates=2, score=by_choices(scores), test_time=True)
    await dvts(diverse, 2)
    tree = diverse.tree
    assert len(tree.children(tree.root)) == 4  # 2 subtrees x 2 candidates
    assert starts(diverse, tree.answers()) == {tree.children(tree.root)[0].id, tree.children(tree.root)[1].id}
    live = [node for node in tree.nodes[1:] if node.expanded]
    assert len(live) == 2 * 3  # each keeps one child a depth: step, step, code


async def test_dvts_needs_as_many_starts_as_subtrees() -> None:
    expander = grow(lambda prompt, seed, index: step(1, "x1 = 0") if depth_of(prompt) == 0 else step(2, "boom()"))
    await dvts(expander, 3)  # one distinct start: two subtrees are empty
    assert len(expander.tree.nodes) == 3 and expander.tree.nodes[1].terminal is TerminalReason.DEAD_END


async def test_dvts_deals_out_what_can_be_followed_and_no_failures() -> None:
    """Starts 1 and 3 fail: dealt out in turn with the others, both would be the second subtree's."""

    def script(prompt: str, seed: int, index: int) -> str:
        if depth_of(prompt) == 0:
            return step(1, f"x1 = {index}" if index % 2 == 0 else f"boom({index})")
        return branching(2, lambda made: True)(prompt, seed, index)

    expander = grow(script, candidates=2, score=lambda text: 0.5)
    await dvts(expander, 2)
    first = expander.tree.children(expander.tree.root)
    assert [child.terminal is None for child in first] == [True, False, True, False]
    assert first[0].expanded and first[2].expanded


class Counted:
    def __init__(self, score: Callable[[str], float]) -> None:
        self.score_text, self.calls = score, 0

    async def score(self, prompt, completions):
        self.calls += 1
        return [self.score_text(prompt.text + "".join(parts)) for parts in completions]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("test_time", [True, False])
async def test_best_of_n_scores_all_answers_in_one_call_and_steps_never(test_time: bool) -> None:
    seen: list[str] = []

    def score(text: str) -> float:
        seen.append(text)
        return 0.75 if "x1 = 2" in text else -0.25

    expander = grow(branching(1, lambda made: made == [2]), candidates=1, test_time=test_time)
    scorer = Counted(score)
    expander.tools = expander.tools.__class__(
        expander.tools.policy, scorer, expander.tools.open_session, None if test_time else exact_grade
    )
    await sample(expander, 4)
    tree = expander.tree
    assert all(node.ppm_value is None for node in tree.nodes if node.terminal is None)
    if not test_time:  # the ground truth judges, the PPM guides nothing
        assert scorer.calls == 0 and {leaf.reward for leaf in tree.answers()} == {1.0, -1.0}
        return
    assert scorer.calls == 1 and len(seen) == 4
    assert seen[0] == (
        "Q: q\n<code>\n# Step 1: s\nx1 = 0\n<end_of_step>\n# Now print the final answer\nprint('v')\n<end_of_code>\n"
        "<output>v<end_of_output>\n<answer>The answer is \\boxed{0}.<end_of_answer>"
    )
    assert [leaf.ppm_value for leaf in tree.answers()] == [-0.25, -0.25, 0.75, -0.25]
    assert (tree.root.visit_count, tree.root.value_sum) == (4, 0.0)
    record = await eval_record([tree], _same)
    assert max(record.candidates, key=lambda c: c.score or -9).answer == "1"


class Jumbled(SimulatedPolicy):
    """Answers when it likes: later requests may be done first."""

    def __init__(self, script, seed: int) -> None:
        super().__init__(script)
        self.luck = random.Random(seed)

    async def generate(self, prompt, params):
        for _ in range(self.luck.randrange(20)):
            await asyncio.sleep(0)
        return await super().generate(prompt, params)


@pytest.mark.parametrize("search", [lambda e: beam_search(e, 4), lambda e: dvts(e, 3), lambda e: sample(e, 12)])
async def test_trees_do_not_depend_on_who_is_answered_first(search) -> None:
    grown = []
    for seed in range(4):
        script = branching(2, lambda made: sum(made) % 2 == 0)
        expander = grow(script, candidates=3, score=lambda text: random.Random(text).uniform(-1, 1), test_time=True)
        expander.tools = replace(expander.tools, policy=Jumbled(script, seed))
        await search(expander)
        grown.append([{k: v for k, v in row.items() if k != "seconds"} for row in expander.tree.to_rows()])
    assert all(rows == grown[0] for rows in grown[1:]) and len(grown[0]) > 20
