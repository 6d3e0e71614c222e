"""Flow-DPO: golden cases of the worked chain and of the loss, adapters, the online stream, a whole tiny run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rstar.engines.simulated import SimulatedPolicy
from rstar.extract.flow_pairs import chain, flow_outcome, flow_pairs
from rstar.prompts import split_stop_question
from rstar.search.expand import Expander, Sampling, Tools
from rstar.search.flow import flow
from rstar.tree import Tree
from rstar.types import TerminalReason
from tests.fakes import LiteralSession, answer, exact_grade, finish, problem, step

ASKED = "Is this the complete"
Script = Callable[[str, int, int], str]


def grow(script: Script, *, chunks: int = 6, tokens: int = 1000, form: str = "chunks", **options: object) -> Tree:
    """A flow's tree over scripted models; tokens are characters."""
    tools = Tools(
        policy=SimulatedPolicy(script, count_tokens=len),
        scorer=None,
        open_session=lambda seed: LiteralSession(),  # type: ignore[arg-type,return-value]
        grade=exact_grade,
    )
    tree = Tree(tree_id="p#0", problem=problem("1"), prompt=("Q: q\n",), searcher="flow")
    tree.settings["stop_borders"] = split_stop_question(lambda text: f"[{text}]", "q")
    sampling = Sampling(candidates=3, temperature=1.0, form=form, max_depth=chunks, max_step_tokens=tokens)
    asyncio.run(flow(Expander(tree, tools, sampling), **options))  # type: ignore[arg-type]
    return tree


def solution(prompt: str) -> str:
    """The partial solution that a prompt of either model holds."""
    if ASKED in prompt:
        return prompt.partition("Solution so far:\n")[2].partition(f"\n\n{ASKED}")[0]
    return prompt.removeprefix("Q: q\n")


def worked(prompt: str, seed: int, index: int) -> str:
    """a1 "first ", s1 No, a2 "answer: 1", s2 Yes; a1' ends wrong, a2' right; after s2's flip the answer is spoilt."""
    done = solution(prompt)
    if ASKED in prompt:
        return "Yes" if "answer" in done else "No"
    if not done:
        return "first " if index == 0 else "other "
    if "answer" in done:
        return ", no. answer: 3"
    return ("answer: 1" if index == 0 else "the answer: 1") if done == "first " else "answer: 2"


def test_the_worked_chain_gives_one_answer_pair_and_two_stop_pairs() -> None:
    tree = grow(worked)
    base = chain(tree, tree.root)
    assert [(n.role, n.text) for n in base[1:]] == [
        ("answer", "first "), ("stop", "No"), ("answer", "answer: 1"), ("stop", "Yes"),
    ]  # fmt: skip
    assert flow_outcome(tree).correct and flow_outcome(tree).stopped and flow_outcome(tree).chunks == 2
    rows = flow_pairs(tree)
    assert [(r.kind, r.chosen, r.rejected) for r in rows] == [
        ("answer", "first ", "other "), ("stop", "No", "Yes"), ("stop", "Yes", "No"),
    ]  # fmt: skip
    assert rows[0].prompt == "Q: q\n"
    assert [solution(r.prompt) for r in rows[1:]] == ["first ", "first answer: 1"]
    assert all(len(tree.children(node)) <= 2 for node in tree.nodes)


def test_a_right_deviation_of_a_wrong_base_is_the_chosen_one() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Yes" if ASKED in prompt else f"answer: {index}"

    (row,) = flow_pairs(grow(script))
    assert (row.kind, row.chosen, row.rejected) == ("answer", "answer: 1", "answer: 0")


def test_a_deviation_that_is_identical_to_the_original_is_rejected() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Yes" if ASKED in prompt else "answer: 1. "

    tree = grow(script)
    assert len(tree.root.children) == 1  # no other text was drawn
    assert [(r.kind, r.chosen) for r in flow_pairs(tree)] == []
    assert tree.rollouts_done == 2  # the base chain and the flipped Yes


def test_a_chunk_as_long_as_the_answer_leaves_one_answer_node_and_a_limit_cuts_into_pieces() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        whole = "a long way to answer: 1"
        return ("Yes" if whole in prompt else "No") if ASKED in prompt else whole.removeprefix(solution(prompt))

    assert flow_outcome(grow(script)).chunks == 1
    tree = grow(script, tokens=6, deviations=False)
    pieces = [node for node in tree.nodes if node.role == "answer"]
    assert [node.text for node in pieces] == ["a long", " way t", "o answ", "er: 1"] and tree.solved
    assert [node.meta.get("ended", False) for node in pieces] == [False, False, False, True]


def test_the_last_piece_counts_as_the_answer_so_far_and_stop_is_not_asked_about_it() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "No" if ASKED in prompt else "answer: 1. "

    tree = grow(script, chunks=6)
    base = chain(tree, tree.root)
    assert [n.role for n in base[1:]] == ["answer", "stop"] * 5 + ["answer"]  # 11 outputs, at most 12
    assert base[-1].terminal is TerminalReason.ANSWER and tree.solved and not flow_outcome(tree).stopped
    assert (
        grow(lambda p, s, i: "No" if ASKED in p else "hm ", chunks=2, deviations=False).nodes[-1].terminal
        is TerminalReason.MAX_DEPTH
    )


def test_an_empty_piece_ends_the_flow_and_an_unreadable_word_is_a_no() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Maybe" if ASKED in prompt else "" if solution(prompt) else "answer: 1"

    tree = grow(script, deviations=False)
    assert [n.text for n in tree.nodes[1:]] == ["answer: 1", "No", ""] and tree.solved
    assert tree.nodes[2].meta["written"] == "Maybe" and tree.nodes[2].logprob is None


def test_code_steps_flow_too_and_end_with_the_answer_step() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        done = solution(prompt).removeprefix("<code>\n")
        if ASKED in prompt:
            return "No"
        if not done:
            return step(1, "x = 1")
        if "end_of_code" not in done:
            return finish("1") if index == 0 else finish("2")
        return answer("2" if "print('2')" in done else "1")

    tree = grow(script, form="steps")
    base = chain(tree, tree.root)
    assert [n.role for n in base[1:]] == ["answer", "stop", "answer", "stop", "answer"] and tree.solved
    rows = flow_pairs(tree)
    assert [(r.kind, r.chosen_segments) for r in rows if r.kind == "answer"] == [("answer", (finish("1") + "\n",))]
    assert "<output>1<end_of_output>" in rows[-1].prompt
    flipped = [r for r in rows if r.kind == "stop"]  # Yes before the answer step leaves no answer
    assert [(r.chosen, r.rejected) for r in flipped] == [("No", "Yes"), ("No", "Yes")]


def test_trees_of_flows_survive_the_disk_and_do_not_depend_on_what_was_ready_first() -> None:
    rows = list(grow(worked).to_rows())
    assert [flow_pairs(Tree.from_rows(rows))] == [flow_pairs(grow(worked))]
    assert [row["id"] for row in rows[1:]] == list(range(len(rows) - 1))
    assert all(row["parent"] is None or row["parent"] < row["id"] for row in rows[1:])
