"""The search core: formulas against golden numbers, the table of terminals, properties.

Whole trees against an independent reference are in test_reference_search.py.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from rstar.config import SearchSection
from rstar.engines.base import ContextOverflow, EngineError
from rstar.engines.simulated import SimulatedPolicy, SimulatedScorer, arithmetic_score, arithmetic_script
from rstar.search.expand import Expander, path_prompt
from rstar.search.mcts import Mcts, puct, select, sequence_priors, uct
from rstar.search.merge import rescore
from rstar.search.sample import sample
from rstar.tree import Node, Tree
from rstar.types import Generation, PromptText, SamplingParams, TerminalReason
from tests.fakes import answer, branching, depth_of, finish, grow, problem, step


def tree_with(*children: str, values: dict[str, list[float]] | None = None) -> tuple[Tree, dict[str, Node]]:
    tree = Tree(tree_id="t", problem=problem(), prompt=("q",))
    return tree, {name: tree.add_child(tree.root, text=name) for name in children}


def test_g1_terminal_guided_q_and_uct() -> None:
    tree, nodes = tree_with("A", "B")
    for name, reward in [("A", 1), ("A", -1), ("B", -1), ("A", 1)]:
        tree.backpropagate(nodes[name], reward)
    assert (tree.root.value_sum, tree.root.visit_count) == (0, 4)
    assert nodes["A"].q_value == pytest.approx(0.333333, abs=1e-6)
    assert nodes["B"].q_value == -1
    assert uct(nodes["A"], tree.root, 2.0) == pytest.approx(1.692889, abs=1e-6)
    assert uct(nodes["B"], tree.root, 2.0) == pytest.approx(1.354820, abs=1e-6)
    assert select(tree, tree.root, c=2.0) is nodes["A"]


def test_deviation_D2_ppm_value_counts_as_one_visit_of_its_own_node() -> None:
    """G2: A starts at 0.6, B at -0.2, their ancestors at nothing."""
    tree, nodes = tree_with("A", "B")
    for name, value in (("A", 0.6), ("B", -0.2)):
        nodes[name].visit_count, nodes[name].value_sum = 1, value
    for name, reward in [("A", 1), ("A", -1), ("B", -1), ("A", 1)]:
        tree.backpropagate(nodes[name], reward)
    assert tree.root.visit_count == 4
    assert nodes["A"].q_value == pytest.approx(0.4)
    assert nodes["B"].q_value == pytest.approx(-0.6)
    assert uct(nodes["A"], tree.root, 2.0) == pytest.approx(1.577410, abs=1e-6)
    assert uct(nodes["B"], tree.root, 2.0) == pytest.approx(1.065109, abs=1e-6)


async def test_deviation_D2_switch_keeps_the_prior_outside_n() -> None:
    """G2's literal reading of Eq. 3: Q = (PPM + sum of rewards) / N."""
    expander = grow(branching(3, lambda made: True), score=lambda text: 0.6, prior_visits=0)
    children = await expander.expand(expander.tree.root)
    assert [(c.visit_count, c.value_sum) for c in children] == [(0, 0.6), (0, 0.6)]
    for reward in (1, -1, 1):
        expander.tree.backpropagate(children[0], reward)
    assert children[0].q_value == pytest.approx(0.533333, abs=1e-6)


def test_deviation_D1_unvisited_children_come_first() -> None:
    """G2b: the official rule scores C 0 and would pick A again."""
    tree, nodes = tree_with("A", "C")
    for _ in range(3):
        tree.backpropagate(nodes["A"], 1.0)
    assert uct(nodes["C"], tree.root, 2.0) == math.inf
    assert select(tree, tree.root, c=2.0) is nodes["C"]


def test_ties_go_to_the_child_created_first() -> None:
    tree, nodes = tree_with("A", "B", "C")
    assert select(tree, tree.root, c=2.0) is nodes["A"]
    for node in nodes.values():
        tree.backpropagate(node, 1.0)
    assert select(tree, tree.root, c=2.0) is nodes["A"]


def test_ties_go_to_the_higher_ppm_value_before_that() -> None:
    tree, nodes = tree_with("A", "B", "C")
    nodes["A"].ppm_value, nodes["B"].ppm_value, nodes["C"].ppm_value = -0.5, 0.5, 0.5
    assert select(tree, tree.root, c=2.0) is nodes["B"]
    assert select(tree, tree.root, c=2.0, selection="puct") is nodes["B"]


@pytest.mark.parametrize("unvisited", [math.inf, 0.0])
def test_unvisited_children_with_a_prior_outside_n_go_by_their_prior(unvisited: float) -> None:
    tree, nodes = tree_with("A", "B")
    for node, value in zip(nodes.values(), (-0.9, 0.9), strict=True):
        tree.set_ppm_value(node, value, prior_visits=0)
    assert select(tree, tree.root, c=2.0, unvisited=unvisited) is nodes["B"]


def test_a_walk_alone_selects_by_eq_1_and_other_walks_count_as_losses() -> None:
    """With its own visit in N_parent the walk would explore B: ln(1 + 1) > 0."""
    tree, nodes = tree_with("A", "B")
    for name, value in (("A", 0.05), ("B", 0.04)):
        tree.set_ppm_value(nodes[name], value)
    tree.backpropagate(nodes["A"], 1.0)
    tree.root.virtual_losses = 1  # the walk that selects
    assert (tree.root.visit_count, nodes["A"].q_value) == (1, pytest.approx(0.525))
    assert uct(nodes["A"], tree.root, 2.0) == pytest.approx(0.525)
    assert uct(nodes["B"], tree.root, 2.0) == pytest.approx(0.04)
    assert select(tree, tree.root, c=2.0) is nodes["A"]
    tree.root.virtual_losses, nodes["A"].virtual_losses = 2, 1  # another one went to A
    assert uct(nodes["A"], tree.root, 2.0) == pytest.approx(0.05 / 3 + 2 * math.sqrt(math.log(2) / 3))
    assert uct(nodes["B"], tree.root, 2.0) == pytest.approx(0.04 + 2 * math.sqrt(math.log(2)))
    assert puct(nodes["A"], tree.root, 2.0, 0.5) == pytest.approx(0.05 / 3 + 2 * 0.5 * math.sqrt(2) / 4)
    assert select(tree, tree.root, c=2.0) is nodes["B"]


def test_puct_weights_exploration_by_the_sequence_prior() -> None:
    tree, nodes = tree_with("A", "B")
    nodes["A"].logprob, nodes["A"].tokens = -10.0, 10
    nodes["B"].logprob, nodes["B"].tokens = -1.0, 10
    priors = sequence_priors([nodes["A"], nodes["B"]])
    assert sum(priors) == pytest.approx(1.0)
    assert priors[1] / priors[0] == pytest.approx(math.exp(-0.1) / math.exp(-1.0))
    assert select(tree, tree.root, c=2.0, selection="puct") is nodes["B"]
    tree.backpropagate(nodes["B"], -1.0)
    assert puct(nodes["B"], tree.root, 2.0, 0.5) == pytest.approx(-1 + 2 * 0.5 * 1 / 2)


async def test_wrong_answer_lowers_every_ancestor_by_exactly_one() -> None:
    expander = grow(branching(2, lambda made: False), candidates=1)
    await Mcts(expander).search(1)
    leaf = expander.tree.answers()[0]
    assert leaf.reward == -1
    for node in [expander.tree.root, *expander.tree.path(leaf)]:
        assert (node.visit_count, node.value_sum) == (1, -1.0)


async def test_failed_step_is_kept_as_record_never_a_parent_and_changes_no_ancestor() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return step(1, "boom()") if index == 0 else branching(1, lambda m: True)(prompt, seed, index)

    expander = grow(script)
    await Mcts(expander).search(6)
    failed = [n for n in expander.tree.nodes if n.terminal is TerminalReason.CODE_ERROR]
    assert failed and all(not n.children and n.visit_count == 0 and "boom" in n.error for n in failed)
    assert (
        expander.tree.root.value_sum == expander.tree.root.visit_count > 0
    )  # nothing but correct answers was backed up


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n", "cut off"),
        ("<end_of_step>", "empty"),
        ("a\n<output>5<end_of_output>\nb<end_of_step>", "imitates"),
        ("a\n<answer>\\boxed{1}<end_of_step>", "imitates"),
        ("\\boxed{1}<end_of_answer>", "answer before"),
    ],
)
async def test_malformed_text_is_recorded_and_never_backed_up(text: str, reason: str) -> None:
    expander = grow(lambda prompt, seed, index: text if index else step(1, "x1 = 0"))
    children = await expander.expand(expander.tree.root)
    assert children[1].terminal is TerminalReason.MALFORMED
    assert reason in children[1].error
    assert expander.tree.root.visit_count == 0


async def test_token_limit_makes_a_candidate_malformed_even_when_it_looks_whole() -> None:
    expander = grow(lambda prompt, seed, index: step(1, "x" * 400))
    expander = type(expander)(expander.tree, expander.tools, SearchSection(candidates=2, max_step_tokens=5))
    (child,) = await expander.expand(expander.tree.root)
    assert child.terminal is TerminalReason.MALFORMED


async def test_deviation_D3_expansion_without_a_way_on_is_a_dead_end_backed_up_once() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return step(1, f"x1 = {index}") if depth_of(prompt) == 0 else step(2, f"boom({index})")

    expander = grow(script)
    await Mcts(expander).search(10)
    tree = expander.tree
    first, second = tree.children(tree.root)
    assert [n.terminal for n in (first, second)] == [TerminalReason.DEAD_END] * 2
    assert [(n.visit_count, n.value_sum) for n in (first, second)] == [(1, -1.0)] * 2
    # both branches are dead; the root has nothing left, so the search ends before its 10 rollouts
    assert tree.root.exhausted and tree.rollouts_done == 2
    assert (tree.root.visit_count, tree.root.value_sum) == (2, -2.0)


async def test_root_whose_expansion_fails_whole_is_a_dead_end() -> None:
    expander = grow(lambda prompt, seed, index: f"boom({index})<end_of_step>")
    await Mcts(expander).search(5)
    assert expander.tree.root.terminal is TerminalReason.DEAD_END
    assert expander.tree.rollouts_done == 1


async def test_deviation_D4_max_depth_is_backed_up_as_minus_one() -> None:
    expander = grow(branching(9, lambda made: True), candidates=1, max_depth=3)
    await Mcts(expander).search(4)
    tree = expander.tree
    (leaf,) = [n for n in tree.nodes if n.terminal is TerminalReason.MAX_DEPTH]
    assert tree.depth(leaf) == 3 and leaf.reward == -1
    assert (tree.root.visit_count, tree.root.value_sum) == (1, -1.0)
    assert tree.root.exhausted


async def test_answer_step_at_max_depth_is_an_answer() -> None:
    expander = grow(branching(1, lambda made: True), candidates=1, max_depth=3)
    await Mcts(expander).search(1)
    assert [n.terminal for n in expander.tree.nodes[1:]] == [None, None, TerminalReason.ANSWER]


async def test_deviation_D5_all_distinct_answer_siblings_are_kept() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return answer(str(index % 3)) if "<end_of_code>" in prompt else finish("v")

    expander = grow(script, candidates=6)
    await Mcts(expander).search(1)
    found = expander.tree.answers()
    assert [(n.answer, n.multiplicity, n.reward) for n in found] == [("0", 2, -1.0), ("1", 2, 1.0), ("2", 2, -1.0)]
    assert expander.tree.root.visit_count == 3  # the root counts back-ups, not rollouts


async def test_deviation_D13_answer_steps_may_get_fewer_samples() -> None:
    expander = grow(branching(1, lambda made: True))
    expander = type(expander)(expander.tree, expander.tools, SearchSection(candidates=4, answer_candidates=2))
    await Mcts(expander).search(1)
    sampled = [sum(c.multiplicity for c in expander.tree.children(n)) for n in expander.tree.nodes if n.expanded]
    assert sampled == [4, 4, 2]


async def test_duplicates_become_one_node_with_a_multiplicity_and_are_run_once() -> None:
    expander = grow(lambda prompt, seed, index: step(1, "x1 = 0"), candidates=5)
    (child,) = await expander.expand(expander.tree.root)
    assert child.multiplicity == 5
    assert len(expander._session.runs) == 1  # type: ignore[attr-defined]


async def test_ppm_scores_only_live_candidates_in_data_generation() -> None:
    scored: list[str] = []

    def score(text: str) -> float:
        scored.append(text)
        return 0.25

    expander = grow(branching(0, lambda made: True), score=score)
    await Mcts(expander).search(1)
    code, leaf = expander.tree.nodes[1:]
    assert (code.ppm_value, code.visit_count, code.value_sum) == (0.25, 2, 1.25)
    assert leaf.ppm_value is None and leaf.reward == 1
    assert len(scored) == 1 and scored[0].endswith("<output>v<end_of_output>\n<answer>")


async def test_at_test_time_an_answer_returns_its_ppm_score_and_no_reward() -> None:
    expander = grow(branching(0, lambda made: True), score=lambda text: 0.5, test_time=True)
    await Mcts(expander).search(1)
    leaf = expander.tree.answers()[0]
    assert leaf.reward is None and leaf.ppm_value == 0.5
    assert expander.tree.root.q_value == 0.5


async def test_prompt_shows_printed_output_only_after_the_last_code_step() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if depth_of(prompt) == 0:
            return step(1, "print('hidden')")
        return answer("1") if "<end_of_code>" in prompt else finish("7")

    expander = grow(script, candidates=1)
    await Mcts(expander).search(1)
    tree = expander.tree
    assert path_prompt(tree, tree.nodes[1]).text == "Q: q\n<code>\n# Step 1: s\nprint('hidden')\n<end_of_step>\n"
    assert path_prompt(tree, tree.nodes[2]).text.endswith("<end_of_code>\n<output>hidden\n7<end_of_output>\n<answer>")


async def test_printed_text_that_imitates_a_delimiter_is_malformed() -> None:
    expander = grow(
        lambda prompt, seed, index: finish("<end_of_output><answer>\\boxed{1}<end_of_answer>"), candidates=1
    )
    (child,) = await expander.expand(expander.tree.root)
    assert child.terminal is TerminalReason.MALFORMED and "imitates" in child.error


def check_statistics(tree: Tree) -> None:
    """Returns through a node = its own + those of its children (prior visits aside), and |Q| <= 1."""
    for node in tree.nodes:
        own_n, own_sum = 0, 0.0
        if node.reward is not None:
            own_n, own_sum = 1, node.reward
        prior_n, prior_sum = (1, node.ppm_value) if node.ppm_value is not None else (0, 0.0)
        children = tree.children(node)
        below = [(c.visit_count - (c.ppm_value is not None), c.value_sum - (c.ppm_value or 0.0)) for c in children]
        assert node.visit_count - prior_n == own_n + sum(n for n, _ in below)
        assert node.value_sum - prior_sum == pytest.approx(own_sum + sum(v for _, v in below))
        assert abs(node.q_value) <= 1 + 1e-9
        assert node.virtual_losses == 0


@pytest.mark.parametrize("with_ppm", [False, True])
@pytest.mark.parametrize("in_flight", [1, 4])
async def test_returns_are_conserved_and_q_is_bounded(with_ppm: bool, in_flight: int) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        script = branching(rng.randint(1, 4), lambda made: sum(made) % 2 == 0)

        def faulty(prompt: str, seed: int, index: int, script=script) -> str:
            text = script(prompt, seed, index)
            roll = random.Random(f"{prompt}{seed}{index}").random()
            return text.replace("x", "boom", 1) if roll < 0.2 and "x" in text else text[:-3] if roll > 0.9 else text

        expander = grow(faulty, candidates=3, seed=seed, score=arithmetic_score if with_ppm else None, max_depth=4)
        await Mcts(expander).search(25, in_flight=in_flight)
        check_statistics(expander.tree)


async def test_search_stops_when_everything_has_been_seen() -> None:
    expander = grow(branching(2, lambda made: made == [1, 1]))
    await Mcts(expander).search(1000)
    assert expander.tree.root.exhausted
    assert len(expander.tree.answers()) == 4  # 2 x 2 paths
    assert expander.tree.rollouts_done == 4
    assert expander.tree.solved


async def test_saved_tree_continues_as_if_it_had_not_been_interrupted() -> None:
    script = branching(3, lambda made: sum(made) == 2)
    whole = grow(script, candidates=3)
    await Mcts(whole).search(12)
    first = grow(script, candidates=3)
    await Mcts(first).search(5)
    second = grow(script, candidates=3)
    second.tree = Tree.from_rows(list(first.tree.to_rows()))
    await Mcts(second).search(12)
    assert [strip(row) for row in second.tree.to_rows()] == [strip(row) for row in whole.tree.to_rows()]


def strip(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "seconds"}


async def test_sixteen_problems_beside_each_other_give_the_trees_they_give_alone() -> None:
    def expander(seed: int):
        return grow(arithmetic_script, candidates=4, seed=seed, max_depth=6)

    alone = []
    for seed in range(16):
        one = expander(seed)
        await Mcts(one).search(8)
        alone.append([strip(row) for row in one.tree.to_rows()])
    together = [expander(seed) for seed in range(16)]
    await asyncio.gather(*(Mcts(one).search(8) for one in together))
    assert [[strip(row) for row in one.tree.to_rows()] for one in together] == alone


async def test_walks_in_flight_spread_over_branches_and_take_their_losses_back() -> None:
    expander = grow(branching(3, lambda made: True), candidates=4)
    await Mcts(expander).search(4, in_flight=4)
    visited = [child.visit_count for child in expander.tree.children(expander.tree.root)]
    assert visited == [1, 1, 1, 1]
    check_statistics(expander.tree)


async def test_sampling_draws_n_solutions_and_counts_shared_texts() -> None:
    expander = grow(branching(1, lambda made: made == [0]), candidates=1)
    await sample(expander, 4)
    found = expander.tree.answers()
    assert sum(n.multiplicity for n in found) == 4
    assert expander.tree.rollouts_done == 4


async def test_greedy_is_one_sample_at_temperature_zero() -> None:
    expander = grow(branching(2, lambda made: made == [0, 0]))
    expander = type(expander)(
        expander.tree, expander.tools, SearchSection(candidates=1, temperature=0.0, max_step_tokens=99)
    )
    await sample(expander, 1)
    (leaf,) = expander.tree.answers()
    assert leaf.reward == 1
    assert len(expander.tree.nodes) == 5


class Slow(SimulatedPolicy):
    """Answers at once until `stuck` calls, then never; counts the requests that wait in it."""

    def __init__(self, script, stuck: int) -> None:
        super().__init__(script)
        self.stuck, self.waiting, self.cancelled = stuck, 0, 0

    async def generate(self, prompt, params):
        self.stuck -= 1
        if self.stuck >= 0:
            return await super().generate(prompt, params)
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1


def slow(stuck: int) -> tuple[Expander, Slow]:
    expander = grow(branching(3, lambda made: True), candidates=3)
    policy = Slow(branching(3, lambda made: True), stuck)
    expander.tools = replace(expander.tools, policy=policy)
    return expander, policy


@pytest.mark.parametrize("search", ["mcts", "sample"])
async def test_cancelled_search_leaves_nothing_in_the_engine(search: str) -> None:
    expander, policy = slow(1)
    work = Mcts(expander).search(9, in_flight=3) if search == "mcts" else sample(expander, 3)
    task = asyncio.create_task(work)
    while policy.waiting < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (policy.waiting, policy.cancelled) == (0, 3)
    assert all(node.virtual_losses == 0 for node in expander.tree.nodes)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    check_statistics(expander.tree)


async def test_failed_engine_call_is_raised_as_it_is_and_the_other_walks_are_cancelled() -> None:
    expander, policy = slow(1)
    generate = policy.generate

    async def fail_later(prompt, params):
        if policy.waiting == 2:
            raise EngineError("gone")
        return await generate(prompt, params)

    policy.generate = fail_later  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="gone"):
        await Mcts(expander).search(9, in_flight=3)
    assert (policy.waiting, policy.cancelled) == (0, 2)
    assert all(node.virtual_losses == 0 for node in expander.tree.nodes)


async def test_interrupted_tree_goes_on_where_it_was() -> None:
    """A search that is cancelled in an expansion has lost that expansion and nothing else."""
    whole, _ = slow(10**6)
    await Mcts(whole).search(12)
    expander, policy = slow(7)
    task = asyncio.create_task(Mcts(expander).search(12))
    while not policy.waiting:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    policy.stuck = 10**6
    expander.tree = Tree.from_rows(list(expander.tree.to_rows()))
    await Mcts(expander).search(12)
    assert [strip(row) for row in expander.tree.to_rows()][1:] == [strip(row) for row in whole.tree.to_rows()][1:]


async def test_dead_end_and_exhausted_root_send_no_more_requests() -> None:
    expander = grow(lambda prompt, seed, index: step(1, "boom()"))
    await Mcts(expander).search(50, in_flight=4)
    assert expander.tree.engine_calls == 1 and expander.tree.rollouts_done <= 4


class ShortContext:
    """A policy or a scorer that takes no more than `limit` characters."""

    def __init__(self, inner: SimulatedPolicy | SimulatedScorer, limit: int) -> None:
        self.inner, self.limit = inner, limit

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        self._check(prompt.text)
        return await self.inner.generate(prompt, params)  # type: ignore[union-attr]

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        self._check(prompt.text + max(("".join(c) for c in completions), key=len))
        return await self.inner.score(prompt, completions)  # type: ignore[union-attr]

    def _check(self, text: str) -> None:
        if len(text) > self.limit:
            raise ContextOverflow.of(len(text), self.limit)


async def test_path_that_outgrows_the_context_is_a_dead_end_and_its_search_goes_on() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer("1")
        return finish("x" * 500) if index == 0 else finish("1")

    expander = grow(script)
    policy = ShortContext(SimulatedPolicy(script), 400)
    expander.tools = replace(expander.tools, policy=policy)  # type: ignore[arg-type]
    await Mcts(expander, c=2.0, selection="uct").search(4)
    long, short = expander.tree.children(expander.tree.root)
    assert long.terminal is TerminalReason.DEAD_END and long.q_value == -1.0 and "no room" in long.error
    assert expander.tree.solved and short.q_value == 1.0


async def test_candidate_too_long_for_the_scorer_leaves_the_others_their_scores() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return finish("x" * 500) if index == 0 else finish("1")

    expander = grow(script, score=lambda text: 0.5)
    scorer = ShortContext(SimulatedScorer(lambda text: 0.5), 400)
    expander.tools = replace(expander.tools, scorer=scorer)  # type: ignore[arg-type]
    long, short = await expander.expand(expander.tree.root)
    assert long.terminal is TerminalReason.MALFORMED and "too long" in long.error
    assert short.terminal is None and short.ppm_value == 0.5


async def test_finished_answer_too_long_for_a_verifier_stays_unscored_and_the_others_are_scored() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer("1")
        return finish("x" * 500) if index == 0 else finish("1")

    expander = grow(script, test_time=True, score=lambda text: 0.5)
    scorer = ShortContext(SimulatedScorer(lambda text: 0.5), 600)
    expander.tools = replace(expander.tools, scorer=scorer)  # type: ignore[arg-type]
    await sample(expander, 2)
    long, short = expander.tree.answers()
    assert (long.ppm_value, short.ppm_value) == (None, 0.5) and short.q_value == 0.5
    again = await rescore(expander.tree, ShortContext(SimulatedScorer(lambda text: -0.5), 600))  # type: ignore[arg-type]
    assert [leaf.ppm_value for leaf in again.answers()] == [None, -0.5]


async def test_scores_that_do_not_fit_the_candidates_are_the_engine_s_failure() -> None:
    """Elsewhere a score that is missing silently becomes 0."""

    class Short(SimulatedScorer):
        async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
            return [0.5] * (len(completions) - 1)

    expander = grow(branching(2, lambda made: True), candidates=3)
    expander.tools = replace(expander.tools, scorer=Short(arithmetic_score))
    with pytest.raises(EngineError, match="2 scores for 3 completions"):
        await Mcts(expander).search(1)
