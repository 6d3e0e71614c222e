"""The scripted engines: pure, countable, timed, and a solver of sums whose steps are what they claim to be."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from rstar import prompts
from rstar.engines.simulated import (
    SimulatedPolicy,
    SimulatedScorer,
    Throughput,
    arithmetic_score,
    arithmetic_script,
)
from rstar.types import PromptText, SamplingParams, Step, StepKind

QUESTIONS = [f"What is {a} + {b} * 3 - {c}?" for a in (12, 345) for b in (4, 70) for c in range(1, 26)]


def _prompt(question: str) -> PromptText:
    return prompts.step_prompt(f"Q: 9 + 9?\n{prompts.OPENING}total = + 9\n\nQ: {question}\n")


def _solve(question: str, seed: int) -> tuple[str | None, list[str]]:
    """One walk, sample 0 of each step, programs run in this process: (boxed answer, texts)."""
    prompt, steps, code, after = _prompt(question), [], "", None
    while True:
        text = arithmetic_script(prompt.text, seed, 0)
        step = prompts.parse(text, after=after)
        steps.append(text)
        if not isinstance(step, Step):
            return None, steps
        if step.answer is not None:
            return step.answer, steps
        code += step.code or ""
        printed: list[str] = []
        try:
            exec(code, {"print": lambda value, printed=printed: printed.append(str(value))})
        except NameError:
            return None, steps
        prompt, after = prompt.plus(*(s for s, _ in prompts.segments(text, "\n".join(printed)))), step.kind


async def test_a_sample_depends_on_prompt_seed_and_index_alone():
    params = SamplingParams(n=6, stop=prompts.stops(None), seed=3)
    alone = await SimulatedPolicy(arithmetic_script).generate(_prompt(QUESTIONS[0]), params)
    shared = SimulatedPolicy(arithmetic_script)
    beside = await asyncio.gather(*(shared.generate(_prompt(q), params) for q in QUESTIONS[:16]))
    assert beside[0] == alone
    other = await shared.generate(_prompt(QUESTIONS[0]), SamplingParams(n=6, stop=prompts.stops(None), seed=4))
    assert other != alone
    assert len({g.text for g in alone}) > 1


async def test_greedy_samples_are_all_equal():
    params = SamplingParams(n=4, temperature=0, stop=prompts.stops(None))
    samples = await SimulatedPolicy(arithmetic_script).generate(_prompt(QUESTIONS[1]), params)
    assert samples == [samples[0]] * 4


async def test_text_is_cut_after_the_first_stop_string_and_at_max_tokens():
    policy = SimulatedPolicy(lambda prompt, seed, index: "a" * 40 + "STOP" + "b" * 40)
    (sample,) = await policy.generate(PromptText(("p",)), SamplingParams(stop=("END", "STOP")))
    assert (sample.text, sample.stop, sample.cut_off, sample.tokens) == ("a" * 40 + "STOP", "STOP", False, 12)
    (sample,) = await policy.generate(PromptText(("p",)), SamplingParams(stop=("STOP",), max_tokens=3))
    assert (sample.text, sample.stop, sample.cut_off, sample.tokens) == ("a" * 11, None, True, 3)
    (sample,) = await policy.generate(PromptText(("p",)), SamplingParams(stop=()))
    assert (sample.stop, sample.cut_off) == (None, False)


async def test_usage_counts_what_was_generated_and_scored():
    policy = SimulatedPolicy(lambda prompt, seed, index: "x", count_tokens=len)
    await policy.generate(PromptText(("abc", "d")), SamplingParams(n=5))
    await policy.generate(PromptText(("abc",)), SamplingParams(n=1))
    assert (policy.usage.generated_tokens, policy.usage.prompt_tokens, policy.usage.engine_calls) == (6, 7, 2)
    scorer = SimulatedScorer(lambda text: len(text) / 10)
    assert await scorer.score(PromptText(("ab",)), [["c"], ["d", "e"]]) == [0.3, 0.4]
    assert (scorer.usage.scored, scorer.usage.engine_calls) == (2, 1)


def test_a_full_batch_has_the_stated_throughput_and_a_single_sample_is_slower_in_all():
    speed = Throughput(640.0, max_batch=64)
    assert 64 / speed.step_seconds(64) == pytest.approx(640.0)
    assert 1 / speed.step_seconds(1) < 64 / speed.step_seconds(64)
    assert speed.step_seconds(1) < speed.step_seconds(64)


async def test_samples_beyond_the_batch_wait_for_a_place():
    policy = SimulatedPolicy(lambda p, s, i: "x", tokens_per_second=100.0, max_batch=2, count_tokens=lambda text: 5)
    seen: list[int] = []  # samples in the batch as each one begins
    real = policy.throughput.step_seconds
    policy.throughput.step_seconds = lambda batch: seen.append(batch) or real(batch)
    start = time.perf_counter()
    await policy.generate(PromptText(("p",)), SamplingParams(n=6))
    assert len(seen) == 6 and max(seen) == 2
    assert time.perf_counter() - start > 3 * 5 * real(1) * 0.9  # three batches one after another; a clock may be coarse


def test_the_solver_is_right_wrong_failing_and_malformed_in_turn():
    ends: Counter[str] = Counter()
    for question in QUESTIONS:
        answer, steps = _solve(question, seed=1)
        expected = str(eval(question.removeprefix("What is ").removesuffix("?")))
        ends["right" if answer == expected else "wrong" if answer else "failed"] += 1
        if answer == expected:
            kinds = [prompts.kind_of(text) for text in steps]
            assert kinds == [StepKind.STEP] * 3 + [StepKind.CODE, StepKind.ANSWER]
    assert min(ends["right"], ends["wrong"], ends["failed"]) >= 8, ends


def test_first_steps_cover_every_kind_and_repeat_some_texts():
    texts = [arithmetic_script(_prompt(q).text, seed, i) for q in QUESTIONS[:20] for seed in (0, 1) for i in range(8)]
    parsed = [prompts.parse(text) for text in texts]
    reasons = Counter("step" if isinstance(p, Step) else p.reason for p in parsed)
    assert set(reasons) == {"step", "empty", "imitates a delimiter"}, reasons
    assert sum("table" in text for text in texts) > 5
    per_question = [texts[i : i + 8] for i in range(0, len(texts), 8)]
    assert any(len(set(group)) < 8 for group in per_question)


def test_the_judge_prefers_right_paths_on_average_and_stays_in_bounds():
    right, wrong = [], []
    for question in QUESTIONS:
        prompt = _prompt(question).text
        for i in range(8):
            text = arithmetic_script(prompt, 0, i)
            if "Estimate" in text:
                wrong.append(arithmetic_score(prompt + text + "\n"))
            elif text.startswith("# Step 1") and "table" not in text and "<output>" not in text:
                right.append(arithmetic_score(prompt + text + "\n"))
    assert all(-1 <= value <= 1 for value in right + wrong)
    assert sum(right) / len(right) > 0.4 > -0.4 > sum(wrong) / len(wrong)
