"""Outcome rows: every finished solution with its label (outcome verifiers, ORM)."""

from __future__ import annotations

from rstar.extract.trajectories import trajectories
from rstar.tree import Tree
from rstar.types import OutcomeRow


def outcome_rows(tree: Tree) -> list[OutcomeRow]:
    """One row per graded answer path: label 1.0 where the final answer is correct, else 0.0."""
    return [
        OutcomeRow(
            prompt="".join(tree.prompt),
            completion="".join(text for text, _ in trajectory.segments),
            segments=trajectory.segments,
            label=1.0 if trajectory.reward == 1.0 else 0.0,
            problem_id=tree.problem.id,
            tree_id=tree.tree_id,
            node_ids=trajectory.node_ids,
            prompt_segments=tree.prompt,
        )
        for trajectory in trajectories(tree)
    ]
