"""Flow (Flow-DPO, arXiv 2410.22304): an Answer model writes a solution piece by piece, a Stop model ends it.

The tree is a base chain of outputs, answer and stop in turns, and at each of them one differing output (a deviation)
that the current flow follows to an end of its own: not a tree of rollouts, one sibling at each output. The base chain
goes along the first children, a deviation is the second child of its parent. What was right is the reward at the ends.

In words (search.form=text) a piece is as many tokens as fit, and the answer is read off the solution when it ends: at
Yes, at the last piece, or at an empty one. In code steps a piece is a step, and the answer step ends the flow.
"""

from __future__ import annotations

import asyncio
import time
from copy import copy
from dataclasses import replace

from rstar.engines.base import ContextOverflow
from rstar.grading import extract_answer
from rstar.prompts import NO, YES, stop_asked
from rstar.search.expand import Candidate, Expander, path_prompt
from rstar.tree import ANSWER, STOP, Node
from rstar.types import SamplingParams, TerminalReason

STOP_TOKENS = 8  # the Stop model's room for its word


async def flow(expander: Expander, *, chain_temperature: float = 0.0, deviations: bool = True) -> None:
    """Grow the expander's tree: the base chain, then the deviations, each of `sampling.candidates` tries.

    `tree.settings["stop_borders"]` are the texts around the partial solution in the Stop model's prompt
    (prompts.split_stop_question); `sampling.max_depth` is the number of pieces at most.
    """
    begun, current = time.monotonic(), _Flow(expander, chain_temperature)
    tree = expander.tree
    base = await current.follow(tree.root)
    leaves = 1
    if deviations:
        ends = await asyncio.gather(*(current.deviate(node) for node in tree.path(base)))
        leaves += sum(end is not None for end in ends)
        tree.renumber()
    tree.rollouts_done = leaves
    tree.seconds += time.monotonic() - begun


class _Flow:
    def __init__(self, expander: Expander, temperature: float) -> None:
        self.tree, self.sampling, self.tools = expander.tree, expander.sampling, expander.tools
        self.temperature, self.words = temperature, expander.in_pieces
        endless = replace(expander.sampling, max_depth=1 << 30)  # the last piece is ours to judge
        self.chain, self.deviating = copy(expander), copy(expander)
        self.chain.sampling, self.deviating.sampling = replace(endless, temperature=temperature), endless

    async def follow(self, node: Node) -> Node:
        """Let the flow go on from `node`; returns the end."""
        while node.terminal is None:
            if node.role == ANSWER:
                node = await self._judge(node)
            else:
                drawn = await self.chain.draw(node, 1)
                if drawn:
                    node = await self._write(node, drawn[0])
                    continue
                if node is self.tree.root:
                    node = self.tree.add_child(node, text="", role=ANSWER)
                await self._end(node, TerminalReason.DEAD_END)  # no room to go on
        return node

    async def deviate(self, node: Node) -> Node | None:
        """Give `node` a sibling that differs and follow it; None where no other text was drawn."""
        parent = self.tree.parent(node)
        assert parent is not None
        if node.role == STOP:
            return await self.follow(await self._say(parent, NO if node.text == YES else YES, flipped=True))
        drawn = await self.deviating.draw(parent, self.sampling.candidates)
        other = next((one for one in drawn if one.generation.text != node.text), None)
        return None if other is None else await self.follow(await self._write(parent, other))

    async def _write(self, parent: Node, drawn: Candidate) -> Node:
        node = self.chain.add(parent, drawn)
        node.role, node.multiplicity = ANSWER, 1
        if self.words and not drawn.generation.cut_off:
            node.meta["ended"] = True  # by the model itself: an end token belongs to this output
        if node.terminal is None and len(self.tree.solution(node)) >= self.sampling.max_depth:
            await self._end(node, TerminalReason.MAX_DEPTH)
        elif self.words and not node.text:
            await self._end(node, TerminalReason.MALFORMED)
        return node

    async def _judge(self, node: Node) -> Node:
        """Ask the Stop model; what is neither word counts as No."""
        params = SamplingParams(
            temperature=self.temperature,
            max_tokens=STOP_TOKENS,
            stop=(YES, NO),
            seed=self.tree.seed,
            adapter=STOP if self.chain.adapter else None,
        )
        solution = path_prompt(self.tree, node).segments[len(self.tree.prompt) :]
        try:
            asked = stop_asked(self.tree.settings["stop_borders"], solution)
            (said,) = await self.tools.policy.generate(asked, params)
        except ContextOverflow:
            return await self._say(node, NO, flipped=False)
        self.tree.engine_calls += 1
        self.tree.tokens += said.tokens
        child = await self._say(node, said.stop or NO, flipped=False)
        child.tokens = said.tokens
        if said.text == child.text:
            child.logprob = said.logprob
        else:
            child.meta["written"] = said.text
        return child

    async def _say(self, parent: Node, word: str, *, flipped: bool) -> Node:
        node = self.tree.add_child(parent, text=word, role=STOP, meta={"flipped": True} if flipped else {})
        if word == YES:
            await self._end(node, TerminalReason.MALFORMED)
        return node

    async def _end(self, node: Node, without: TerminalReason) -> None:
        """The solution ends here with the answer that it states; without one it is wrong, and ends by `without`."""
        text = "".join(one.text for one in self.tree.solution(node))
        answer = extract_answer(text) if self.words else None
        node.terminal, node.answer = (TerminalReason.ANSWER, answer) if answer else (without, None)
        node.error = "" if answer else "no answer"
        if self.tools.grade is not None:
            right = answer is not None and await self.tools.grade(answer, self.tree.problem)
            node.reward = 1.0 if right else -1.0
        self.tree.backpropagate(node, node.reward or 0.0)
