"""The calculator on engines that cannot be stepped token by token: stop at "=", write the result, go on.

Costs a request per "=" of a sample, most of whose prompt the engine has cached. The text so far is tokenised again as
one segment; where the model had spelled it in other tokens, the continuation is drawn after the usual spelling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rstar.calculator import filled_in
from rstar.types import Generation, PromptText, SamplingParams

Generate = Callable[[PromptText, SamplingParams], Awaitable[list[Generation]]]


async def stop_and_continue(
    generate: Generate, count_tokens: Callable[[str], int], prompt: PromptText, params: SamplingParams
) -> list[Generation]:
    """Samples of `params` in which the results of annotations are ours; their tokens count as the sample's.

    An engine may give text behind the "=" too: one that ignores stop strings, or looks for another one first.
    """
    plain = replace(params, calculator=False, stop=(*params.stop, "="))

    async def finish(first: Generation) -> Generation:
        text, tokens, logprob, last = "", 0, 0.0, first
        while True:
            filled = filled_in(text + last.text, len(text))
            text, tokens, logprob = text + last.text, tokens + last.tokens, logprob + last.logprob
            if filled is not None:
                text, tokens = filled, tokens + count_tokens(filled[filled.rindex("=") + 1 :])
            elif last.stop != "=":
                return replace(last, text=text, tokens=tokens, logprob=logprob)
            left = params.max_tokens - tokens
            if left < 1:
                return Generation(text, tokens, logprob, stop=None, cut_off=True)
            (last,) = await generate(prompt.plus(text), replace(plain, n=1, max_tokens=left))

    return await asyncio.gather(*map(finish, await generate(prompt, plain)))
