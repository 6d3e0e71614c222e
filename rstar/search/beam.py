"""Step beam search guided by the PPM, and DVTS, on the same Tree and Expander.

Step beam search (rStar-Math's code): up to `width` nodes by PPM value, each expanded; a finished one leaves and takes
its place in the beam with it. DVTS (diverse verifier tree search, Beeching et al. 2024) splits the beam into
independent subtrees that keep their best child each, so that one good-looking start cannot take over the beam.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rstar.search.expand import Expander
from rstar.tree import Node
from rstar.types import TerminalReason


@dataclass(frozen=True)
class _Beam:
    width: int  # places left
    live: tuple[Node, ...]  # at most `width`


async def beam_search(expander: Expander, width: int) -> None:
    """Step beam search: `width` places, `expander.sampling.candidates` samples for each node of the beam."""
    await _descend(expander, width=width, subtrees=1)


async def dvts(expander: Expander, subtrees: int) -> None:
    """Diverse verifier tree search: `subtrees` independent greedy descents.

    The root is expanded with `subtrees` times the candidates and its distinct children are dealt out in turn, so the
    subtrees share nothing but the root; each then keeps its best child only.
    """
    await _descend(expander, width=1, subtrees=subtrees)


async def _descend(expander: Expander, *, width: int, subtrees: int) -> None:
    begun, tree = time.monotonic(), expander.tree
    first = await expander.expand(tree.root, subtrees * expander.sampling.candidates)
    starts = _able(first)  # dealt out without the failures, or a subtree might get nothing else
    beams = [_keep(starts[i::subtrees], width) for i in range(subtrees)]
    while live := [node for beam in beams for node in beam.live]:
        await expander.expand_all(live)
        below = [[child for node in beam.live for child in tree.children(node)] for beam in beams]
        beams = [_keep(children, beam.width) for children, beam in zip(below, beams, strict=True)]
    tree.rollouts_done = width * subtrees
    tree.seconds += time.monotonic() - begun


def _keep(children: Sequence[Node], width: int) -> _Beam:
    """The `width` best of all children; answers among them have their place for good, the others go on.

    Ties go to the node created first. The released selector slices the unfiltered list, so there finished nodes keep
    places and prompts are matched with the wrong parents.
    """
    best = sorted(_able(children), key=_value, reverse=True)[:width]
    live = tuple(node for node in best if node.terminal is None)
    return _Beam(width - (len(best) - len(live)), live)


def _able(children: Sequence[Node]) -> list[Node]:
    """Those that go on, or are answers."""
    return [child for child in children if child.terminal in (None, TerminalReason.ANSWER)]


def _value(node: Node) -> float:
    """What a node is ranked by: its PPM value; a graded answer's reward, because the PPM does not judge those."""
    return node.ppm_value if node.ppm_value is not None else node.reward or 0.0
