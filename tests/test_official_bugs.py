"""The bugs of the official rStar-Math code that change results: one test each, named for the right behaviour.

 1  unvisited children score 0: test_deviations.py test_deviation_D1_standard_uct_visits_every_branch
 2  beam search attaches continuations to the wrong parent: test_beam.py
    test_finished_candidate_gives_its_place_up_and_the_other_is_expanded_under_itself
 3  the interpreter's state leaks between candidates and questions: here
 4  output is rounded, lost, or made twice: here, and test_sandbox.py test_output_is_what_the_code_printed
 5  the grader calls different numbers equal: here, and the labelled cases of test_grading.py
 6  a time-out loses an expansion and counts its nodes twice: here
 7  weights are taken before the filters, and losses depend on the micro-batch: here, and test_training_packing.py
    test_score_loss_and_gradients_equal_those_of_plain_rows
 8  truncation from the right removes the scored step: here, and test_training_ppm.py
    test_pairs_and_outcomes_that_are_too_long_are_dropped_and_counted
 9  siblings of an answer are thrown away: test_mcts.py test_deviation_D5_all_distinct_answer_siblings_are_kept
10  the words "error" and "boxed" are taken for events: here, and test_extract.py
    test_word_error_in_a_solution_does_not_drop_it
11  output is wrapped twice: here
12  code failures are not backed up: test_mcts.py
    test_deviation_D3_expansion_without_a_way_on_is_a_dead_end_backed_up_once
13  problems are keyed by their text, and SFT trains on outputs: here, and test_deviations.py
    test_deviation_D11_only_the_model_s_own_text_carries_loss
14  searches cannot be repeated: here, and test_mcts.py test_ties_go_to_the_child_created_first
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path

import pytest

from rstar.config import ModelSection, PpmSection, SandboxSection
from rstar.engines.simulated import arithmetic_script
from rstar.extract.preferences import preference_rows
from rstar.extract.trajectories import path_segments
from rstar.grading import is_equivalent_fast
from rstar.problems import load_benchmark
from rstar.sandbox import Sandbox
from rstar.search.expand import Expander
from rstar.search.mcts import Mcts
from rstar.search.worker import tree_id
from rstar.tokens import SegmentEncoder, load_tokenizer, question_wrapper
from rstar.types import Execution, ExecutionStatus, Problem, TerminalReason
from tests.fakes import LiteralSession, answer, branching, finish, grow, step
from tests.training_rows import pair_rows

HERE = Path(__file__).parent


def test_the_tests_that_are_named_above_exist() -> None:
    named = re.findall(r"(test_\w+\.py)\s+(test_\w+)", __doc__ or "")
    assert len(named) == 10
    for file, function in named:
        assert f"def {function}(" in (HERE / file).read_text(), f"{file} has no {function}"


def executed(*paths: tuple[str, ...]) -> list[Execution]:
    """The last execution of each path of codes, all in one sandbox, a session for each."""

    async def run() -> list[Execution]:
        found = []
        async with Sandbox(SandboxSection(processes=1)) as sandbox:
            for path in paths:
                session = sandbox.session(0)
                state = session.root
                for code in path:
                    state, execution = await session.run(state, code)
                found.append(execution)
        return found

    return asyncio.run(run())


def test_bug_03_04_names_stay_in_their_path_and_output_is_whole_exact_and_made_once() -> None:
    lost = "try:\n    print('in try')\nfinally:\n    pass\nfor i in range(2):\n    print(i)\nx = 3"
    twice = "calls = []\ndef f():\n    calls.append(1)\n    print(len(calls))\n    raise ValueError('here')\nf()"
    first, leaked, tiny, whole, once, word = executed(
        ("secret = 41\nimport math as m\nprint(secret)",),
        ("print(secret + 1)",),
        ("print(0.00001234)",),
        (lost,),
        (twice,),
        ("print('standard error is 3')",),
    )
    assert first.stdout == "41\n"
    assert leaked.status is ExecutionStatus.ERROR and "secret" in leaked.error and leaked.stdout == ""
    assert tiny.stdout == "1.234e-05\n"
    assert whole.stdout == "in try\n0\n1\n"
    assert once.stdout == "1\n" and "ValueError: here" in once.error
    assert word.status is ExecutionStatus.OK


@pytest.mark.parametrize(
    ("a", "b"), [("1", "100"), ("0.5", "50"), ("10001", "10000"), ("(1,2)", "[1,2]"), ("1(2)", "12")]
)
def test_bug_05_different_answers_are_not_equal_in_either_order(a: str, b: str) -> None:
    assert is_equivalent_fast(a, b) is False and is_equivalent_fast(b, a) is False


async def test_bug_06_a_timed_out_program_fails_alone_and_nothing_counts_twice() -> None:
    class Slow(LiteralSession):
        async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
            if "= 1" in code:
                return parent, Execution(ExecutionStatus.TIMEOUT, error="time limit")
            return await super().run(parent, code)

    expander = grow(branching(1, lambda made: True), candidates=3)
    tools = dataclasses.replace(expander.tools, open_session=lambda seed: Slow())  # type: ignore[arg-type,return-value]
    expander = Expander(expander.tree, tools, expander.sampling)
    await Mcts(expander).search(2)
    tree = expander.tree
    slow = [node for node in tree.nodes if node.status == ExecutionStatus.TIMEOUT]
    assert [(node.terminal, node.visit_count) for node in slow] == [(TerminalReason.CODE_ERROR, 0)]
    assert [node.visit_count for node in tree.children(tree.root)] == [1, 0, 1]  # its siblings were kept and searched
    assert (tree.root.visit_count, tree.root.value_sum) == (2, 2.0)


async def test_bug_07_weights_count_the_pairs_that_are_left() -> None:
    expander = grow(branching(1, lambda made: made[0] < 2), candidates=4)
    await Mcts(expander).search(12)
    everything = preference_rows(expander.tree, min_margin=0, min_edit_distance=0, answer_pairs=False)
    (first, *_) = everything
    siblings = [row for row in everything if row.prompt == first.prompt]
    assert len(siblings) == 4 and all(row.weight == 0.25 for row in siblings)
    expander.tree.nodes[first.node_ids[0]].text += " " * 30  # of the four pairs only its two are far enough apart
    left = preference_rows(expander.tree, min_margin=0, min_edit_distance=20, answer_pairs=False)
    assert len(left) == 2 and all(row.weight == 0.5 for row in left)


def test_bug_07_a_single_pair_is_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    from rstar.training.ppm import train_ppm

    section = PpmSection(batch_size=1, dtype="float32", heldout=0.0)
    result = train_ppm(pair_rows(trees=1)[:1], str(tiny_model), tmp_path / "ppm", section, seed=0)
    assert result.training.steps == 1 and result.training.first_loss == pytest.approx(0.6931, abs=0.05)


def test_bug_08_the_scored_step_survives_any_truncation(tiny_model: Path) -> None:
    from rstar.training.data import encode_pair

    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = pair_rows(trees=1)[0]
    whole = encode_pair(row, encoder, 4096)
    assert whole is not None
    for length in range(2, max(map(len, whole.paths)) + 1):
        cut = encode_pair(row, encoder, length)
        assert (cut is None) == (length < max(map(len, whole.paths)))
        assert cut is None or [path.tolist() for path in cut.paths] == [path.tolist() for path in whole.paths]


async def test_bug_10_words_are_no_events() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer("1")
        if "<end_of_step>" not in prompt:
            return step(1, "# the \\boxed{7} comes later; margin of error\nerror = 1")
        return finish("standard error is 3")

    expander = grow(script, candidates=1)
    await Mcts(expander).search(1)
    nodes = expander.tree.nodes[1:]
    assert [node.terminal for node in nodes] == [None, None, TerminalReason.ANSWER]
    assert nodes[-1].answer == "1" and nodes[-1].reward == 1


async def test_bug_11_output_is_wrapped_once() -> None:
    expander = grow(branching(1, lambda made: True), candidates=1)
    await Mcts(expander).search(1)
    text = "".join(part for part, _ in path_segments(expander.tree, expander.tree.answers()[0]))
    for tag in ("<output>", "<end_of_output>", "<answer>", "<end_of_answer>", "<end_of_code>"):
        assert text.count(tag) == 1


def test_bug_13_one_text_under_two_ids_is_two_problems(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n' * 2)
    problems = load_benchmark("amc23", path=str(tmp_path / "b.jsonl"))
    assert len(problems) == 2 and len({tree_id(problem, 0) for problem in problems}) == 2
    assert tree_id(problems[0], 0) != tree_id(problems[0], 1) != tree_id(Problem("x", "2+2?", "4"), 1)


async def test_bug_14_a_search_at_temperature_one_repeats_and_worked_examples_keep_their_order(tmp_path: Path) -> None:
    trees = []
    for seed in (3, 3, 4):
        expander = grow(arithmetic_script, candidates=4, seed=seed, max_depth=6)
        assert expander.sampling.temperature == 1.0
        await Mcts(expander).search(8)
        trees.append([(node.parent, node.text, node.visit_count, node.value_sum) for node in expander.tree.nodes])
    assert trees[0] == trees[1] != trees[2]
    examples = tmp_path / "few.yaml"
    examples.write_text("".join(f"- {{question: q{n}, solution: s{n}}}\n" for n in range(9)))
    wrap = question_wrapper("", ModelSection(base="", template="{question}\n", few_shot=str(examples)))
    assert wrap("q") == wrap("q") == "".join(f"q{n}\ns{n}\n\n" for n in range(9)) + "q\n"
