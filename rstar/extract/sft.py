"""SFT rows: the best correct trajectories of each problem by mean Q (rStar-Math section 3.4.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rstar.extract.trajectories import distinct, graded_answers, provenance, ranked, trajectories
from rstar.problems.records import SYNTHETIC
from rstar.tree import Tree
from rstar.types import SftRow, UserError


def sft_rows(
    trees: Sequence[Tree], *, top: int = 2, by: str = "mean_q", min_synthetic_accuracy: float = 0.5
) -> list[SftRow]:
    """Rows of one problem from all its trees (several seeds): the `top` distinct correct trajectories.

    They are the best `by` "mean_q", or taken at "random": the same ones every time, each answer leaf as likely as any.
    Where some answer steps are clean, the others are left out (prompts.clean_answer).

    Distinct means different programs, whatever their comments, spacing and answer sentences; solutions that run nothing
    differ by their words (trajectories.content). Every step of an answer path ran without an error, so nothing has to
    be dropped afterwards (the official code drops texts that contain "error", good ones too). Rows that share a prefix
    count in full, each with weight 1: training computes the prefix once and sums its loss over the rows.

    A synthetic problem with a smaller share of correct answers than `min_synthetic_accuracy` gives none: its reference
    answer may be the wrong one (App. A.1).
    """
    if trees and trees[0].problem.source == SYNTHETIC and accuracy(trees) < min_synthetic_accuracy:
        return []
    by_id = {tree.tree_id: tree for tree in trees}
    correct = [t for tree in trees for t in trajectories(tree) if t.reward == 1.0]
    correct = [t for t in correct if t.clean] or correct
    match by:
        case "mean_q":
            correct = ranked(correct)
        case "random":
            random.Random(trees[0].problem.id if trees else "").shuffle(correct)
        case _:
            raise UserError(f"extract.sft_by={by}", need="mean_q or random")
    rows: list[SftRow] = []
    for trajectory in distinct(correct)[:top]:
        tree = by_id[trajectory.tree_id]
        source, node_ids = provenance(tree, trajectory.node_ids)
        rows.append(
            SftRow(
                prompt="".join(tree.prompt),
                completion="".join(text for text, _ in trajectory.segments),
                segments=trajectory.segments,
                prompt_segments=tree.prompt,
                problem_id=tree.problem.id,
                tree_id=source,
                node_ids=node_ids,
            )
        )
    return rows


def accuracy(trees: Sequence[Tree]) -> float:
    """Share of correct ones among the graded answers of one problem's trees, each sample counted; 0 without answers."""
    graded = [leaf for tree in trees for leaf in graded_answers(tree)]
    correct = sum(leaf.multiplicity for leaf in graded if leaf.reward == 1.0)
    return correct / max(1, sum(leaf.multiplicity for leaf in graded))
