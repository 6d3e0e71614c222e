"""What can be done with finished trees without generating or running anything again: merge and re-score.

Both return new trees and keep what every tree promises: the returns through a node are its own plus those of its
children, PPM priors aside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rstar.engines.base import ContextOverflow, Scorer
from rstar.search.expand import completion, path_prompt, scores
from rstar.search.gather import gather
from rstar.tree import Node, Tree
from rstar.types import TerminalReason, UserError

_SCORED = (None, TerminalReason.DEAD_END)  # live when they were created
_OPENNESS = (
    TerminalReason.ANSWER, TerminalReason.DEAD_END, None, TerminalReason.MAX_DEPTH, TerminalReason.CODE_ERROR,
    TerminalReason.MALFORMED,
)  # fmt: skip


def merge(trees: Sequence[Tree]) -> Tree:
    """One tree of several of the same problem, merged by prefix.

    Steps with the same text and the same printed output after the same prefix become one node. Visits, value sums and
    multiplicities add up, so each source's PPM prior counts as often as it did there; `ppm_value` is their mean and
    `meta["priors"]` their number. `meta["sources"]` lists [tree id, node id] of each source. Where the sources disagree
    on what became of a node, the most open one counts: one that was searched below before a dead end, a dead end
    before one that nobody has expanded, and any of them before a failure (a time-out need not repeat).

    Raises UserError where the trees are not of one problem and one prompt.
    """
    first = trees[0]
    for other in trees[1:]:
        if (other.problem, other.prompt) != (first.problem, first.prompt):
            raise UserError(
                f"trees {first.tree_id} and {other.tree_id} cannot be merged", need="trees of one problem and prompt"
            )
    merged = replace(
        first,
        tree_id="+".join([first.tree_id, *(t.tree_id.rpartition("#")[2] for t in trees[1:])]),
        policy=_names(tree.policy for tree in trees),
        ppm=_names(tree.ppm for tree in trees),
        worker=_names(tree.worker for tree in trees),
        settings=dict(first.settings),
        rollouts_done=sum(tree.rollouts_done for tree in trees),
        tokens=sum(tree.tokens for tree in trees),
        engine_calls=sum(tree.engine_calls for tree in trees),
        seconds=sum(tree.seconds for tree in trees),
        complete=all(tree.complete for tree in trees),
        nodes=[Node(id=0, parent=None)],
    )
    sources: list[list[tuple[Tree, Node]]] = [[]]
    known: dict[tuple[int, str, str], int] = {}
    for tree in trees:
        place: list[int] = []  # of each node of `tree` in the merged tree
        for node in tree.nodes:
            here = 0
            if node.parent is not None:
                key = (place[node.parent], node.text, node.stdout)
                if key not in known:
                    known[key] = merged.add_child(merged.nodes[key[0]]).id
                    sources.append([])
                here = known[key]
            place.append(here)
            sources[here].append((tree, node))
    for node, found in zip(merged.nodes, sources, strict=True):
        merged.nodes[node.id] = _merge_node(node, found)
    merged.settle_exhausted()
    return merged


def _names(names: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(name for name in names if name))


def _merge_node(node: Node, found: Sequence[tuple[Tree, Node]]) -> Node:
    nodes = [source for _, source in found]
    kept = min(nodes, key=lambda n: -1 if n.terminal is None and n.expanded else _OPENNESS.index(n.terminal))
    priors = [(n.ppm_value, n.meta.get("priors", 1)) for n in nodes if n.ppm_value is not None]
    weight = sum(count for _, count in priors)
    origins = [origin for tree, n in found for origin in n.meta.get("sources", [[tree.tree_id, n.id]])]
    return replace(
        kept,
        id=node.id,
        parent=node.parent,
        children=node.children,
        visit_count=sum(n.visit_count for n in nodes),
        value_sum=sum(n.value_sum for n in nodes),
        multiplicity=sum(n.multiplicity for n in nodes) if node.parent is not None else 1,
        ppm_value=sum(value * count for value, count in priors) / weight if priors else None,
        meta={**kept.meta, "sources": origins, **({"priors": weight} if priors else {})},
    )


async def rescore(tree: Tree, scorer: Scorer, *, ppm: str = "") -> Tree:
    """The tree with the PPM values of another PPM; `ppm` is its name.

    The prior of each node that was live at its creation is exchanged, and the returns stay. A tree that was
    terminal-guided gets the priors (and their visits: the tree's `ppm_prior_visits`) as if it had been PPM-augmented
    from its start; where its walks went stays as it was. Answers are scored only where they have no reward (test
    time): their score is their return, so it is exchanged on the whole path. What is too long for the scorer keeps
    the score it has.
    """
    new = copy.deepcopy(tree)
    wanted = [
        [
            child
            for child in new.children(parent)
            if child.terminal in _SCORED or (child.terminal is TerminalReason.ANSWER and child.reward is None)
        ]
        for parent in new.nodes
    ]
    found = await gather(
        *(
            scores(scorer, path_prompt(new, parent), [completion(new, child) for child in children])
            for parent, children in zip(new.nodes, wanted, strict=True)
            if children
        )
    )
    for children, values in zip(filter(None, wanted), found, strict=True):
        for child, value in zip(children, values, strict=True):
            if not isinstance(value, ContextOverflow):
                new.set_ppm_value(child, value, new.settings.get("ppm_prior_visits", 1))
    new.ppm = ppm
    new.settings["use_ppm"] = True
    return new
