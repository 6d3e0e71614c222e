"""Monte Carlo tree search over solution steps (rStar-Math section 3.2).

A rollout is one walk from the root that expands as it goes, until an expansion yields a terminal. A search is
`rollouts` walks, ended early when nothing is left to select. Several walks of one tree may be in flight; for the others
each counts as one visit of value -1 on every node of its path while it lasts (virtual loss).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

from rstar.search.expand import Expander
from rstar.search.gather import gather
from rstar.tree import Node, Tree
from rstar.types import TerminalReason


def uct(node: Node, parent: Node, c: float, unvisited: float = math.inf) -> float:
    """UCT(s) = Q(s) + c sqrt(ln max(1, N_parent) / N_s) (rStar-Math Eq. 1); `unvisited` at N_s = 0.

    Other walks in flight count as visits of value -1; see others_at for the parent's. The official code scores an
    unvisited child 0 (deviation D1).
    """
    n = node.visit_count + node.virtual_losses
    if n == 0:
        return unvisited
    n_parent = max(1, parent.visit_count + others_at(parent))
    return (node.value_sum - node.virtual_losses) / n + c * math.sqrt(math.log(n_parent) / n)


def puct(node: Node, parent: Node, c: float, prior: float) -> float:
    """PUCT(s) = Q(s) + c P(s) sqrt(N_parent) / (1 + N_s), with the policy's sequence prior P in [0, 1].

    Q = 0 at N_s = 0. Other walks in flight count as in uct.
    """
    n = node.visit_count + node.virtual_losses
    q = (node.value_sum - node.virtual_losses) / n if n else 0.0
    return q + c * prior * math.sqrt(max(1, parent.visit_count + others_at(parent))) / (1 + n)


def others_at(parent: Node) -> int:
    """Virtual losses of other walks on the node where a walk stands; its own, which is not among its children's yet,
    is no evidence for it. Where no walk stands there are none."""
    return max(0, parent.virtual_losses - 1)


def sequence_priors(nodes: Sequence[Node]) -> list[float]:
    """Share of each sibling by sampled probability: multiplicity x exp(mean token log-probability), normalised to 1."""
    weights = [n.multiplicity * math.exp((n.logprob or 0.0) / max(1, n.tokens)) for n in nodes]
    total = sum(weights)
    return [w / total for w in weights]


def select(tree: Tree, node: Node, *, c: float, selection: str = "uct", unvisited: float = math.inf) -> Node:
    """The live, unexhausted child of `node` with the highest score.

    Ties go to the higher PPM value (0 where there is none), then to the child created first.
    """
    children = tree.selectable(node)
    if selection == "puct":
        priors = sequence_priors(children)
        scores = [puct(child, node, c, prior) for child, prior in zip(children, priors, strict=True)]
    else:
        scores = [uct(child, node, c, unvisited) for child in children]
    ranked = zip(scores, children, strict=True)
    return max(ranked, key=lambda entry: (entry[0], entry[1].ppm_value or 0.0, -entry[1].id))[1]


class Mcts:
    """The search of one tree. The tree may be new, or loaded in the middle of its search."""

    def __init__(
        self, expander: Expander, *, c: float = 2.0, selection: str = "uct", unvisited: float = math.inf
    ) -> None:
        self.tree, self.expander = expander.tree, expander
        self.c, self.selection, self.unvisited = c, selection, unvisited
        self._expanding: dict[int, asyncio.Event] = {}

    async def search(self, rollouts: int, *, in_flight: int = 1) -> None:
        """Walk until `tree.rollouts_done` reaches `rollouts`, or the root is exhausted; then no walk is in flight."""
        started, begun = self.tree.rollouts_done, time.monotonic()
        seconds_before = self.tree.seconds

        async def walker() -> None:
            nonlocal started
            while started < rollouts and not self.tree.root.exhausted:
                started += 1
                await self.rollout()
                self.tree.rollouts_done += 1
                self.tree.seconds = seconds_before + time.monotonic() - begun

        await gather(*(walker() for _ in range(min(in_flight, max(0, rollouts - started)))))

    async def rollout(self) -> None:
        """One walk from the root: select, expand, back up."""
        node = self.tree.root
        walked = [node]
        node.virtual_losses += 1
        try:
            while not node.exhausted:
                if not node.expanded:
                    if not await self._expand_once(node):
                        continue  # another walk expanded it: go on below, so that this walk brings evidence of its own
                    if node.exhausted or any(c.terminal is TerminalReason.ANSWER for c in self.tree.children(node)):
                        return  # everything the expansion produced is already backed up
                node = select(self.tree, node, c=self.c, selection=self.selection, unvisited=self.unvisited)
                walked.append(node)
                node.virtual_losses += 1
        finally:
            for visited in walked:
                visited.virtual_losses -= 1

    async def _expand_once(self, node: Node) -> bool:
        """Expand `node`, or await the walk that is already expanding it. True if this walk did it."""
        event = self._expanding.get(node.id)
        if event is not None:
            await event.wait()
            return False
        event = self._expanding[node.id] = asyncio.Event()
        try:
            await self.expander.expand(node)
            self.tree.update_exhausted(node)
        finally:
            del self._expanding[node.id]
            event.set()
        return True
