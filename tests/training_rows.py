"""Rows of made-up search trees for the training tests: solutions of one question that share their first steps."""

from __future__ import annotations

import random

from rstar.types import OutcomeRow, PreferenceRow, SftRow, UserError

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


def make_a_mistake() -> None:
    """What a process of a distributed training may do."""
    raise UserError("a mistake", need="none", how="mend it")
