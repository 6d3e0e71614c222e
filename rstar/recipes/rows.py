"""Which rows are taken from one problem's trees, as `extract` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rstar.config import ExtractSection
from rstar.extract.outcomes import outcome_rows
from rstar.extract.preferences import capped, preference_rows
from rstar.extract.q_values import q_rows
from rstar.extract.sft import sft_rows
from rstar.search.tree_operations import merge
from rstar.tree import Tree
from rstar.types import SftRow, UserError


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
