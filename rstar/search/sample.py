"""Plain sampling on the same Tree: n independent solutions, step by step, with executed code.

A text that several samples share becomes one node with a multiplicity m, and m continuations are drawn below it. So the
distribution is that of n independent samples, shared prefixes are stored and paid for once, and the multiplicities of
the answers add up to the finished samples. n = 1 at temperature 0 is greedy decoding.
"""

from __future__ import annotations

import asyncio
import time

from rstar.search.expand import Expander
from rstar.tree import Node


async def sample(expander: Expander, n: int) -> None:
    """Draw `n` solutions of the expander's tree from its root to their ends."""
    begun = time.monotonic()
    await _continue(expander, expander.tree.root, n)
    expander.tree.rollouts_done = n
    expander.tree.seconds += time.monotonic() - begun


async def _continue(expander: Expander, node: Node, n: int) -> None:
    children = await expander.expand(node, n)
    live = [child for child in children if child.terminal is None]
    await asyncio.gather(*(_continue(expander, child, child.multiplicity) for child in live))
