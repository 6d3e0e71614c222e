"""Rows of a teacher's answers: <system message, question, answer>, with the instruction erased (Orca 2, section 3).

A teacher's answer is a tree with one leaf; `settings["system"]` of the tree is the teacher's system message. With
prompt erasing every row carries one generic message instead; the teacher's message is kept in the row's provenance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rstar.tree import Tree
from rstar.types import Problem, SftRow, TerminalReason

DEMONSTRATIONS = (3, 5)  # of a few-shot row, both included

Turn = tuple[str, str]
"""(question, answer)."""
Wrap = Callable[[str, str, Sequence[Turn]], str]
"""(system message, question, earlier turns) -> the text before the answer."""


@dataclass(frozen=True)
class Explanation:
    """A teacher's answer, and the system message that it was given."""

    task: str  # the problem's `sub_category`
    teacher_system: str
    question: str
    answer: str  # as the teacher wrote it
    problem_id: str
    tree_id: str
    node_id: int


@dataclass(frozen=True)
class ExplanationRow(SftRow):
    """An SFT row with its provenance; trainers read the columns of SftRow alone."""

    task: str = ""
    teacher_system: str = ""  # never part of an erased row's prompt
    demonstrations: tuple[str, ...] = ()  # problem ids of the earlier turns


def explanation(tree: Tree, *, only_correct: bool) -> Explanation | None:
    """The first usable answer of a teacher's tree: correct by the grader, or else any that is whole; None without."""
    for leaf in tree.children(tree.root):
        stated = leaf.terminal is TerminalReason.ANSWER
        whole = bool(leaf.text.strip()) and leaf.error != "cut off"
        if leaf.reward == 1.0 if only_correct else stated or whole:
            problem, system = tree.problem, str(tree.settings.get("system", ""))
            task = sub_category(problem)
            return Explanation(task, system, problem.question, leaf.text, problem.id, tree.tree_id, leaf.id)
    return None


def sub_category(problem: Problem) -> str:
    """The kind of task that a strategy is chosen for: the problem's category, or its level where it has none."""
    return problem.category or problem.level


def explanation_row(
    one: Explanation, wrap: Wrap, *, system: str | None, shown: Sequence[Explanation] = ()
) -> ExplanationRow:
    """The row of an answer under `system` (None: the teacher's own), after the turns `shown`.

    The answer is the only segment with a loss; the trainer adds the end token, which is a target too.
    """
    message = one.teacher_system if system is None else system
    prompt = wrap(message, one.question, [(demo.question, demo.answer) for demo in shown])
    return ExplanationRow(
        prompt=prompt,
        completion=one.answer,
        segments=((one.answer, True),),
        prompt_segments=(prompt,),
        problem_id=one.problem_id,
        tree_id=one.tree_id,
        node_ids=(one.node_id,),
        task=one.task,
        teacher_system=one.teacher_system,
        demonstrations=tuple(demo.problem_id for demo in shown),
    )


def few_shot_rows(
    found: Sequence[Explanation], wrap: Wrap, *, system: str | None, share: float, seed: int
) -> list[ExplanationRow]:
    """Rows with 3 to 5 earlier turns of the same task under the same instruction, never of the target's problem.

    `share`: few-shot rows per answer, in [0, 1]; their targets are drawn at random in each group. Groups of fewer than
    four problems give none.
    """
    groups: dict[tuple[str, str], list[Explanation]] = {}
    for one in found:
        groups.setdefault((one.task, one.teacher_system), []).append(one)
    rows, draw = list[ExplanationRow](), random.Random(seed)
    for group in groups.values():
        for target in draw.sample(group, k=round(share * len(group))):
            others = [one for one in group if one.problem_id != target.problem_id]
            if len(others) >= DEMONSTRATIONS[0]:
                count = draw.randint(DEMONSTRATIONS[0], min(DEMONSTRATIONS[1], len(others)))
                rows.append(explanation_row(target, wrap, system=system, shown=draw.sample(others, k=count)))
    return rows
