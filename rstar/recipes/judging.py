"""A judge model compares two solutions of a problem, in both orders (Flow-DPO, arXiv 2410.22304, section 4)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from rstar.engines.base import Policy
from rstar.types import PromptText, SamplingParams

JUDGE_PROMPT = """Two students solved the same mathematical problem.

Problem:
{question}

Solution A:
{first}

Solution B:
{second}

Which solution is better: correct, clearly explained, every step justified? Compare them briefly, then close with a line
"Verdict: A" or "Verdict: B", or "Verdict: tie" where neither is better.
"""
_VERDICT = re.compile(r"verdict:?[\s*]*(a|b|tie)\b", re.IGNORECASE)


async def judge(policy: Policy, duels: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """Judge each (question, ours, theirs) in both orders: how often ours won, lost, and neither.

    A win counts where both orders agree: a judge that prefers what comes first, or names nobody, gives a tie.
    """
    params = SamplingParams(temperature=0.0, max_tokens=512)

    async def better(question: str, first: str, second: str) -> str:
        text = JUDGE_PROMPT.format(question=question, first=first, second=second)
        (said,) = await policy.generate(PromptText((text,)), params)
        verdicts = _VERDICT.findall(said.text)
        return verdicts[-1].lower() if verdicts else "tie"

    async def duel(question: str, ours: str, theirs: str) -> str:
        verdicts = await asyncio.gather(better(question, ours, theirs), better(question, theirs, ours))
        return {("a", "b"): "won", ("b", "a"): "lost"}.get((verdicts[0], verdicts[1]), "tied")

    found = await asyncio.gather(*(duel(*one) for one in duels))
    return {word: found.count(word) for word in ("won", "lost", "tied")}
