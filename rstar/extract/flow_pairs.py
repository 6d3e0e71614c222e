"""Preference pairs of a flow (Flow-DPO, arXiv 2410.22304, section 3): two outputs at one node, one of which led right.

For each output of the base chain and its deviation: where one ends in the right answer and the other does not, they are
a pair for the model that wrote them; its prompt is what that model read there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from rstar.extract.trajectories import path_segments
from rstar.prompts import YES, stop_asked
from rstar.tree import ANSWER, STOP, Node, Tree
from rstar.types import PreferenceRow


@dataclass(frozen=True)
class FlowOutcome:
    """What the base chain of a flow's tree did."""

    correct: bool  # graded; False where nothing was
    stopped: bool  # by the Stop model's Yes, not by the last piece or an empty one
    chunks: int


def chain(tree: Tree, node: Node) -> list[Node]:
    """`node` and what the flow wrote after it: along the first children to the end."""
    nodes = [node]
    while nodes[-1].children:
        nodes.append(tree.nodes[nodes[-1].children[0]])
    return nodes


def flow_outcome(tree: Tree) -> FlowOutcome:
    """The base chain's figures."""
    base = chain(tree, tree.root)
    said_yes = base[-1].role == STOP and base[-1].text == YES
    return FlowOutcome(base[-1].reward == 1.0, said_yes, sum(node.role == ANSWER for node in base))


def flow_pairs(tree: Tree) -> list[PreferenceRow]:
    """One row per node of the base chain whose deviation ends with the other correctness; `kind` is the role."""
    base = chain(tree, tree.root)
    right = base[-1].reward == 1.0
    rows = []
    for parent, node in pairwise(base):
        for other in tree.children(parent)[1:]:
            if (chain(tree, other)[-1].reward == 1.0) == right:
                continue
            chosen, rejected = (node, other) if right else (other, node)
            prompt = _asked(tree, parent, node.role)
            rows.append(
                PreferenceRow(
                    prompt="".join(prompt),
                    chosen=chosen.text,
                    rejected=rejected.text,
                    prompt_segments=prompt,
                    chosen_segments=_written(tree, chosen),
                    rejected_segments=_written(tree, rejected),
                    q_margin=2.0,
                    weight=1.0,
                    kind=node.role,
                    problem_id=tree.problem.id,
                    tree_id=tree.tree_id,
                    node_ids=(chosen.id, rejected.id),
                    chosen_ends=bool(chosen.meta.get("ended")),
                    rejected_ends=bool(rejected.meta.get("ended")),
                )
            )
    return rows


def _asked(tree: Tree, parent: Node, role: str) -> tuple[str, ...]:
    """The prompt of the output that follows `parent`."""
    solution = tuple(text for text, _ in path_segments(tree, parent))
    return stop_asked(tree.settings["stop_borders"], solution).segments if role == STOP else tree.prompt + solution


def _written(tree: Tree, node: Node) -> tuple[str, ...]:
    """The segment that a model wrote at `node`, as it stands in prompts."""
    if node.role == STOP:
        return (node.text,)
    before = len(path_segments(tree, tree.nodes[node.parent or 0]))
    return tuple(text for text, own in path_segments(tree, node)[before:] if own)
