"""Which rows are taken from one problem's trees, as `extract` says; rows of reference solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rstar.config import ExtractSection, ProblemsSection, SandboxSection, WarmupSection
from rstar.extract.outcomes import outcome_rows
from rstar.extract.preferences import capped, preference_rows
from rstar.extract.q_values import q_rows
from rstar.extract.sft import sft_rows
from rstar.problems import ProblemSet
from rstar.problems.worked import solution_text
from rstar.prompts import step_prompt
from rstar.search.merge import merge
from rstar.tree import Tree
from rstar.types import Problem, PromptText, SftRow, UserError


def reference_rows(
    problems: Sequence[Problem],
    form: str,
    sandbox: SandboxSection,
    wrap: Callable[[str], str],
    *,
    annotated: bool = False,
) -> list[SftRow]:
    """Reference solutions of problems in the form of search.form: in words, or the programs of those that have one.

    `wrap` makes a prompt of a question; `annotated` keeps the calculator annotations of solutions in words.
    """
    if form == "steps":
        from rstar.warmup import warmup_rows

        pool = ProblemSet(tuple(problems), ())
        return warmup_rows(WarmupSection(source="pool"), ProblemsSection(), pool, sandbox, wrap)
    return [
        reference_row(one, step_prompt(wrap(one.question), "text"), solution_text(one, annotated=annotated))
        for one in problems
    ]


def reference_row(problem: Problem, prompt: PromptText, text: str) -> SftRow:
    """A row whose whole completion is to be learnt."""
    return SftRow(
        prompt=prompt.text, completion=text, segments=((text, True),), problem_id=problem.id,
        tree_id=f"reference/{problem.id}", node_ids=(), prompt_segments=prompt.segments,
    )  # fmt: skip


def own_prompt(trees: Sequence[Tree]) -> Sequence[Tree]:
    """The trees, if their prompt is the one of the model that is trained (D16).

    Raises UserError for those that a bootstrap model has written: only its round's extract stage exchanges the prompt.
    """
    for tree in trees:
        if tree.settings.get("bootstrap"):
            raise UserError(
                f"tree {tree.tree_id} was written by bootstrap.model, with a prompt of its own",
                need="the prompt of the model that is trained",
                how="take the rows of that round: sft.jsonl, pairs.jsonl",
            )
    return trees


def policy_rows(trees: Sequence[Tree], section: ExtractSection) -> list[SftRow]:
    """SFT rows of one problem's trees."""
    return sft_rows(
        _merged(trees, section),
        top=section.sft_top,
        by=section.sft_by,
        min_synthetic_accuracy=section.min_synthetic_accuracy,
    )


def scorer_rows(trees: Sequence[Tree], section: ExtractSection, loss: str) -> list[Any]:
    """One problem's rows for a loss of `ppm.loss`: pairs (PPM), Q rows (PQM) or outcomes (ORM)."""
    trees = _merged(trees, section)
    if loss != "pairwise":
        return [row for tree in trees for row in (q_rows(tree) if loss == "mse" else outcome_rows(tree))]
    pairs = [
        preference_rows(
            tree,
            positives=section.positives,
            negatives=section.negatives,
            widen=section.widen_pairs,
            min_margin=section.min_margin,
            min_edit_distance=section.min_edit_distance,
            answer_pairs=section.answer_pairs,
        )
        for tree in trees
    ]
    return capped(pairs, section.max_pairs_per_problem)


def _merged(trees: Sequence[Tree], section: ExtractSection) -> Sequence[Tree]:
    return [merge(trees)] if section.merge_seeds and len(trees) > 1 else trees
