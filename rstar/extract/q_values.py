"""Q rows: every searched step with its Q-value, for a scorer trained by regression (the paper's PQM, Table 8)."""

from __future__ import annotations

from rstar.extract.trajectories import provenance
from rstar.prompts import segments
from rstar.tree import Node, Tree
from rstar.types import QValueRow, TerminalReason


def q_rows(tree: Tree) -> list[QValueRow]:
    """Rows that cover each step which a return went through exactly once, with its Q in [-1, 1].

    A row is a root-to-leaf path: what an earlier row holds of it is its prompt, the rest are its steps. Left out are
    steps that failed, and those whose only visit is the PPM's own value.
    """
    wanted = {
        node.id
        for node in tree.nodes[1:]
        if node.terminal not in (TerminalReason.CODE_ERROR, TerminalReason.MALFORMED) and _returns(tree, node) > 0
    }
    rows: list[QValueRow] = []
    covered: set[int] = set()
    for leaf in (tree.nodes[i] for i in sorted(wanted) if not wanted.intersection(tree.nodes[i].children)):
        path = tree.path(leaf)
        texts, printed = [], ""
        for node in path:
            printed += node.stdout
            texts.append(tuple(text for text, _ in segments(node.text, printed)))
        new = next(i for i, node in enumerate(path) if node.id not in covered)
        covered.update(node.id for node in path)
        source, node_ids = provenance(tree, [node.id for node in path[new:]])
        prompt = tree.prompt + tuple(text for step in texts[:new] for text in step)
        rows.append(
            QValueRow(
                prompt="".join(prompt),
                completion="".join(text for step in texts[new:] for text in step),
                steps=tuple(texts[new:]),
                q_values=tuple(node.q_value for node in path[new:]),
                problem_id=tree.problem.id,
                tree_id=source,
                node_ids=node_ids,
                prompt_segments=prompt,
            )
        )
    return rows


def _returns(tree: Tree, node: Node) -> int:
    """Returns that were backed up through a node: its visits without the PPM's prior one."""
    if node.ppm_value is None or node.terminal is TerminalReason.ANSWER:
        return node.visit_count
    return node.visit_count - int(node.meta.get("priors", 1)) * int(tree.settings.get("ppm_prior_visits", 1))
