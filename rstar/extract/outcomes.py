"""Outcome rows: every finished solution with its label (outcome verifiers, ORM)."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from rstar.extract.trajectories import provenance, trajectories
from rstar.tree import Tree
from rstar.types import OutcomeRow


def outcome_rows(tree: Tree, *, samples: int = 0) -> list[OutcomeRow]:
    """One row per graded answer path: label 1.0 where the final answer is correct, else 0.0.

    Its weight is the number of samples that ended there. With `samples`, only so many of the tree's, drawn at random
    (smaller draws are parts of larger ones); those without an answer count too, and give no row.
    """
    found = trajectories(tree)
    counts = [tree.nodes[trajectory.node_ids[-1]].multiplicity for trajectory in found]
    if samples:
        drawn = random.Random(tree.tree_id).sample(range(tree.rollouts_done), k=tree.rollouts_done)
        ends = list(accumulate(counts))
        kept = Counter(bisect_right(ends, sample) for sample in drawn[:samples])
        counts = [kept[i] for i in range(len(found))]
    rows: list[OutcomeRow] = []
    for trajectory, count in zip(found, counts, strict=True):
        if not count:
            continue
        source, node_ids = provenance(tree, trajectory.node_ids)
        rows.append(
            OutcomeRow(
                prompt="".join(tree.prompt),
                completion="".join(text for text, _ in trajectory.segments),
                segments=trajectory.segments,
                label=1.0 if trajectory.reward == 1.0 else 0.0,
                problem_id=tree.problem.id,
                tree_id=source,
                node_ids=node_ids,
                prompt_segments=tree.prompt,
                weight=float(count),
            )
        )
    return rows
