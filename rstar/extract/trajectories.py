"""Root-to-answer paths of trees, which every extractor starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rstar.prompts import render
from rstar.tree import Node, Tree
from rstar.types import Trajectory


def path_segments(tree: Tree, node: Node) -> tuple[tuple[str, bool], ...]:
    """Segments of the path that ends in `node`: (text, whether the model wrote it)."""
    return render([(n.text, n.stdout) for n in tree.solution(node)])


def trajectories(tree: Tree) -> list[Trajectory]:
    """All graded answer paths of a tree in creation order of their answers."""
    found = []
    for leaf in tree.answers():
        if leaf.reward is None:
            continue
        path = tree.path(leaf)
        found.append(
            Trajectory(
                tree_id=tree.tree_id,
                node_ids=tuple(n.id for n in path),
                segments=path_segments(tree, leaf),
                q_values=tuple(n.q_value for n in path),
                answer=leaf.answer or "",
                reward=leaf.reward,
            )
        )
    return found


def provenance(tree: Tree, node_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Where nodes come from, as rows name it: (tree id, node ids).

    For a merged tree these are of the first source that has all of the nodes; where none has, they are of the merged
    tree, which merging the sources in id order gives again.
    """
    sources = [dict(tree.nodes[i].meta.get("sources", ())) for i in node_ids]
    shared = next((name for name in sources[0] if all(name in one for one in sources)), None)
    if shared is None:
        return tree.tree_id, tuple(node_ids)
    return shared, tuple(one[shared] for one in sources)


def ranked(found: Iterable[Trajectory]) -> list[Trajectory]:
    """Best first: by mean Q over the steps (root excluded, answer step included), ties by the smallest Q (G5)."""
    return sorted(found, key=lambda t: (t.mean_q, min(t.q_values)), reverse=True)
