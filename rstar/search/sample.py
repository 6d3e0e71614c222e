"""Plain sampling on the same Tree: n independent solutions, step by step, with executed code.

A text that several samples share becomes one node with a multiplicity m, and m continuations are drawn below it. So the
distribution is that of n independent samples, shared prefixes are stored and paid for once, and the multiplicities of
the answers add up to the finished samples. n = 1 at temperature 0 is greedy decoding. A PPM guides nothing here; at
test time it scores the finished answers, all of them in one call: best-of-n.
"""

from __future__ import annotations

import time
from dataclasses import replace

from rstar.engines.base import ContextOverflow, Scorer
from rstar.prompts import render
from rstar.search.expand import Expander, scores
from rstar.tree import Tree
from rstar.types import PromptText


async def sample(expander: Expander, n: int) -> None:
    """Draw `n` solutions of the expander's tree from its root to their ends."""
    begun, tree, tools = time.monotonic(), expander.tree, expander.tools
    expander.tools = replace(tools, scorer=None)
    live, counts = [tree.root], [n]
    while live:
        live = [child for child in await expander.expand_all(live, counts) if child.terminal is None]
        counts = [child.multiplicity for child in live]
    expander.tools = tools
    if tools.scorer is not None and tools.grade is None:
        await score_answers(tree, tools.scorer)
    tree.rollouts_done = n
    tree.seconds += time.monotonic() - begun


async def score_answers(tree: Tree, scorer: Scorer) -> None:
    """Give every finished answer its score, all of them in one call; an earlier score is exchanged.

    An answer whose path is too long for the scorer stays without one: it can be voted for, and ranks last.
    """
    found = tree.answers()
    paths = [[text for text, _ in render([(n.text, n.stdout) for n in tree.path(leaf)])] for leaf in found]
    for leaf, score in zip(found, await scores(scorer, PromptText(tree.prompt), paths), strict=True):
        if not isinstance(score, ContextOverflow):
            tree.set_ppm_value(leaf, score)
