"""Rows of made-up search trees for the training tests: solutions of one question that share their first steps. And
trees that a search has really grown, with a scripted policy."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

from rstar.config import SearchSection
from rstar.engines.simulated import SimulatedPolicy, arithmetic_script
from rstar.prompts import step_prompt
from rstar.search.expand import Expander, Tools
from rstar.search.mcts import Mcts
from rstar.tree import Tree
from rstar.types import Execution, ExecutionStatus, OutcomeRow, PreferenceRow, Problem, QValueRow, SftRow, UserError

Segments = tuple[tuple[str, bool], ...]


def prompt_of(tree: int) -> tuple[str, ...]:
    return (f"<|im_start|>user\nWhat is {tree} plus {tree + 3}?<|im_end|>\n<|im_start|>assistant\n", "<code>\n")


def solutions(tree: int, count: int = 4) -> list[Segments]:
    """`count` distinct solutions; those with the same k // 2 share the first step, all share the opening."""
    found = []
    for k in range(count):
        first = f"# Step 1: way {k // 2}\nx = {tree} + {k // 2}\n<end_of_step>\n"
        last = f"# Step 2: print\nprint(x + {k})\n<end_of_code>\n"
        shown = f"<output>{tree + k}<end_of_output>\n<answer>"
        found.append(((first, True), (last, True), (shown, False), (f"So \\boxed{{{tree + k}}}.<end_of_answer>", True)))
    return found


def sft_rows(trees: int = 3, count: int = 4, *, weights: bool = False) -> list[SftRow]:
    return [
        SftRow(
            prompt="".join(prompt_of(tree)),
            completion="".join(text for text, _ in segments),
            segments=segments,
            problem_id=f"p{tree}",
            tree_id=f"t{tree}",
            node_ids=(1, 2 + k),
            weight=0.5 + k if weights else 1.0,
            prompt_segments=prompt_of(tree),
        )
        for tree in range(trees)
        for k, segments in enumerate(solutions(tree, count))
    ]


def pair_rows(trees: int = 3, count: int = 4) -> list[PreferenceRow]:
    """Every ordered pair of a tree's whole solutions and of its first steps, with uneven weights."""
    rows = []
    for tree in range(trees):
        paths = [tuple(text for text, _ in segments) for segments in solutions(tree, count)]
        pairs = [(a, b) for a in paths for b in paths if a < b] + [(paths[0][:1], paths[-1][:1])]
        for k, (chosen, rejected) in enumerate(pairs):
            rows.append(
                PreferenceRow(
                    prompt="".join(prompt_of(tree)),
                    chosen="".join(chosen),
                    rejected="".join(rejected),
                    prompt_segments=prompt_of(tree),
                    chosen_segments=chosen,
                    rejected_segments=rejected,
                    q_margin=1.0,
                    weight=1 / (1 + k),
                    kind="answer",
                    problem_id=f"p{tree}",
                    tree_id=f"t{tree}",
                    node_ids=(k, 100 + k),
                )
            )
    return rows


def outcome_rows(trees: int = 3, count: int = 4) -> list[OutcomeRow]:
    chance = random.Random(0)
    return [
        OutcomeRow(row.prompt, row.completion, row.segments, chance.choice([0.0, 1.0]), row.problem_id, row.tree_id,
                   row.node_ids, row.prompt_segments)
        for row in sft_rows(trees, count)
    ]  # fmt: skip


def q_rows(trees: int = 3, count: int = 4) -> list[QValueRow]:
    """Three steps each, what follows the second one's code belongs to it; a path's Q depends on its text alone."""
    rows = []
    for row in sft_rows(trees, count):
        first, last, shown, answer = (text for text, _ in row.segments)
        steps = ((first,), (last, shown), (answer,))
        prefixes = [row.prompt + "".join(text for step in steps[: k + 1] for text in step) for k in range(3)]
        values = tuple(random.Random(prefix).uniform(-1, 1) for prefix in prefixes)
        rows.append(
            QValueRow(row.prompt, row.completion, steps, values, row.problem_id, row.tree_id, (1, 2, 3),
                      row.prompt_segments)
        )  # fmt: skip
    return rows


def search_trees(problems: int = 3, rollouts: int = 16) -> list[Tree]:
    """Trees of an MCTS over sums, solved by the scripted policy; only the execution of its code is played."""

    async def run(parent: str, code: str) -> tuple[str, Execution]:
        failed = "table[0]" in code
        lines = [line for line in f"{parent}\n{code}".splitlines() if line.startswith("total = ")]
        scope: dict[str, int] = {}
        exec("" if failed else "\n".join(lines), {}, scope)  # the scripted policy's own sums
        printed = f"{scope.get('total', 0)}\n" if "print(" in code and not failed else ""
        status = ExecutionStatus.ERROR if failed else ExecutionStatus.OK
        return f"{parent}\n{code}", Execution(status, stdout=printed)

    async def right(answer: str, problem: Problem) -> bool:
        return answer == problem.answer

    async def grow(question: str, answer: int) -> Tree:
        session = SimpleNamespace(state=lambda codes: "\n".join(codes), run=run)
        tools = Tools(SimulatedPolicy(arithmetic_script), None, lambda seed: session, right)  # type: ignore[arg-type]
        problem = Problem(id=question, question=question, answer=str(answer))
        tree = Tree(tree_id=f"{question}#0", problem=problem, prompt=step_prompt(f"{question}\n").segments)
        await Mcts(Expander(tree, tools, SearchSection(candidates=8, temperature=1.0))).search(rollouts)
        return tree

    sums = [(12 + k, 3, 7 + k, 20, 4) for k in range(problems)]
    return [asyncio.run(grow(f"{a} * {b} + {c} + {d} - {e}", a * b + c + d - e)) for a, b, c, d, e in sums]


def make_a_mistake() -> None:
    """What a process of a distributed training may do."""
    raise UserError("a mistake", need="none", how="mend it")
