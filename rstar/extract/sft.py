"""SFT rows: the best correct trajectories of each problem by mean Q (rStar-Math section 3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from rstar.extract.trajectories import ranked, trajectories
from rstar.tree import Tree
from rstar.types import SftRow


def sft_rows(trees: Sequence[Tree], *, top: int = 2) -> list[SftRow]:
    """Rows of one problem from all its trees (several seeds): the `top` distinct correct trajectories.

    Distinct means by their whole text. Every step of an answer path ran without an error, so nothing has to be
    dropped afterwards (the official code drops texts that contain "error", good ones too).
    """
    by_id = {tree.tree_id: tree for tree in trees}
    correct = [t for tree in trees for t in trajectories(tree) if t.reward == 1.0]
    rows: list[SftRow] = []
    seen: set[str] = set()
    for trajectory in ranked(correct):
        completion = "".join(text for text, _ in trajectory.segments)
        if completion in seen or len(rows) == top:
            continue
        seen.add(completion)
        tree = by_id[trajectory.tree_id]
        rows.append(
            SftRow(
                prompt="".join(tree.prompt),
                completion=completion,
                segments=trajectory.segments,
                prompt_segments=tree.prompt,
                problem_id=tree.problem.id,
                tree_id=tree.tree_id,
                node_ids=trajectory.node_ids,
            )
        )
    return rows
