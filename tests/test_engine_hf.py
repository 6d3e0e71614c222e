"""The embedded engines say what plain transformers says, whatever else is in the batch or in the cache."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rstar.config import EngineSection, SearchSection
from rstar.engines.base import EngineError, squash
from rstar.engines.hf import HfPolicy, HfScorer, PackedLinear, pack_linears, sample_tokens
from rstar.engines.hf_attention import PrefixCache, _group, common_prefix
from rstar.search.expand import Expander, Tools
from rstar.search.mcts import Mcts
from rstar.tokens import load_tokenizer
from rstar.tree import Tree
from rstar.types import PromptText, SamplingParams, UserError
from tests.fakes import LiteralSession, exact_grade, problem

SECTION = EngineSection(dtype="float32", device="cpu", max_batch=8)
PROMPTS = [
    PromptText(("What is 12 + 7?\n", "<code>\n")),
    PromptText(("What is 12 + 7?\n", "<code>\n", "x = 12\n<end_of_step>\n")),
    PromptText(("What is 2 + 7?\n", "<code>\n", "print(2 + 7)\n<end_of_code>\n", "<output>9<end_of_output>\n<answer>")),
    PromptText(("Compute the least common multiple of the numbers 12 and 18, then add 345 to it.\n", "<code>\n")),
    PromptText(("é∑𝔘?",)),
]  # fmt: skip
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def reference(tiny_model: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def policy(tiny_model: Path):
    return HfPolicy(str(tiny_model), SECTION)


@pytest.fixture(scope="module")
def ppm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPM whose padding token is its end token: the case that stock pooling gets wrong."""
    folder = tmp_path_factory.mktemp("ppm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.config.pad_token_id = model.config.eos_token_id
    model.config.rstar_score_scale = 2.5
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


def fresh(tiny_model: Path, **settings) -> HfPolicy:
    return HfPolicy(str(tiny_model), EngineSection(**{"dtype": "float32", "device": "cpu", **settings}))


def greedy_ids(reference, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        whole = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, use_cache=False)
    return whole[0, len(ids) :].tolist()


def greedy_text(reference, policy: HfPolicy, prompt: PromptText, count: int) -> str:
    ids = greedy_ids(reference, policy.encoder.encode(prompt.segments), count)
    ids = ids[:-1] if ids[-1] == policy.tokenizer.eos_token_id else ids
    return policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


async def test_greedy_text_equals_plain_generate_for_every_prompt_alone_and_together(reference, tiny_model, policy):
    expected = [greedy_text(reference, policy, prompt, 24) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected), "a model that always says the same would prove nothing"
    for prompt, text in zip(PROMPTS, expected, strict=True):
        (generation,) = await fresh(tiny_model).generate(prompt, GREEDY)
        assert generation.text == text
    together = await asyncio.gather(*(policy.generate(prompt, GREEDY) for prompt in PROMPTS))
    assert [generations[0].text for generations in together] == expected


async def test_requests_that_come_and_go_in_the_middle_do_not_change_greedy_text(reference, policy):
    expected = {prompt: greedy_text(reference, policy, prompt, 24) for prompt in PROMPTS}
    noise = random.Random(0)

    async def one(number: int) -> None:
        await asyncio.sleep(noise.random() * 0.2)
        prompt = PROMPTS[number % len(PROMPTS)]
        kind = number % 3
        params = GREEDY if kind == 0 else SamplingParams(n=1 + kind, max_tokens=3 + number, seed=number)
        generations = await policy.generate(prompt, params)
        assert len(generations) == params.n
        if kind == 0:
            assert generations[0].text == expected[prompt]

    await asyncio.gather(*(one(number) for number in range(40)))


async def test_sampled_logprobs_equal_a_teacher_forced_forward(reference, policy, monkeypatch):
    kept = []
    drop = policy._drop
    monkeypatch.setattr(policy, "_drop", lambda batch, row: kept.append(batch.samples[row]) or drop(batch, row))
    params = SamplingParams(n=5, temperature=0.7, top_p=0.9, max_tokens=16, seed=5)
    generations = await policy.generate(PROMPTS[1], params)
    assert len(kept) == 5
    by_index = {sample.index: sample for sample in kept}
    for index, generation in enumerate(generations):
        ids = by_index[index].ids
        start = len(by_index[index].prompt.ids)
        with torch.no_grad():
            logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert generation.logprob == pytest.approx(expected, abs=1e-4 * generation.tokens)
        assert generation.tokens == len(ids) - start


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-3), ("bfloat16", 0.1)])
async def test_devices_and_data_types_agree_up_to_their_noise(
    reference, tiny_model, ppm, monkeypatch, device: str, dtype: str, noise: float
):
    """Samples and scores of the engine against plain float32 on the CPU; `noise` of a token's log-probability."""
    engine, kept = fresh(tiny_model, device=device, dtype=dtype), []
    drop = engine._drop
    monkeypatch.setattr(engine, "_drop", lambda batch, row: kept.append(batch.samples[row]) or drop(batch, row))
    await engine.generate(PROMPTS[0], SamplingParams(n=4, max_tokens=16))
    assert str(next(engine.model.parameters()).dtype) == f"torch.{dtype}"
    for sample in kept:
        start = len(sample.prompt.ids)
        with torch.no_grad():
            logprobs = reference(torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[i - 1, sample.ids[i]].item() for i in range(start, len(sample.ids)))
        assert sample.logprob == pytest.approx(expected, abs=noise * sample.tokens)
    steps = [("x = 1\n",), ("print(12 + 7)\n<end_of_code>\n",), ("y",)]
    plain, scorer = (
        HfScorer(str(ppm), EngineSection(device=place, dtype=kind))
        for place, kind in (("cpu", "float32"), (device, dtype))
    )
    expected_scores = await plain.score(PROMPTS[1], steps)
    assert max(expected_scores) - min(expected_scores) > noise / 2, "scores that are all alike would prove nothing"
    assert await scorer.score(PROMPTS[1], steps) == pytest.approx(expected_scores, abs=noise / 5)


async def test_a_step_after_a_step_reads_in_only_what_is_new(reference, tiny_model, policy, monkeypatch):
    engine, prompt, seen = fresh(tiny_model), PROMPTS[0], []
    drop = engine._drop
    monkeypatch.setattr(
        engine, "_drop", lambda batch, row: seen.append(batch.samples[row].ids[:-1]) or drop(batch, row)
    )
    for _ in range(4):
        ids = engine.encoder.encode(prompt.segments)
        known = max((common_prefix(ids, other) for other in seen), default=0)
        before = engine.usage.prompt_tokens
        (generation,) = await engine.generate(prompt, GREEDY)
        assert generation.text == greedy_text(reference, policy, prompt, 24)
        assert engine.usage.prompt_tokens - before == max(1, len(ids) - known)
        prompt = prompt.plus(generation.text + "\n")
    before = engine.usage.prompt_tokens
    await engine.generate(PROMPTS[0], SamplingParams(n=8, max_tokens=2))
    assert engine.usage.prompt_tokens == before + 1


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_compute_what_plain_ones_do(rows, bias):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(96, 192, bias=bias), "head": torch.nn.Linear(96, 1)})
    inputs = torch.randn(1, rows, 96)
    with torch.inference_mode():
        expected = model["body"](inputs)
        assert pack_linears(model) == isinstance(model["body"], PackedLinear)
        assert torch.allclose(model["body"](inputs), expected, atol=1e-5)
    assert isinstance(model["head"], torch.nn.Linear)


async def test_a_cache_too_small_for_anything_still_gives_the_right_text(reference, tiny_model, policy):
    for limit in (0, 1 << 14):
        engine = fresh(tiny_model, cache_mib=0, max_batch=3)
        engine._batch(None).prefixes.limit_bytes = limit
        results = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS * 2))
        expected = [greedy_text(reference, policy, prompt, 24) for prompt in PROMPTS * 2]
        assert [generations[0].text for generations in results] == expected


async def test_prompts_that_arrive_together_compute_their_common_part_once(tiny_model):
    engine = fresh(tiny_model)
    trunk = "Tom has 12 apples and buys 7 more. " * 10
    prompts = [PromptText((trunk, f"Question {i}\n")) for i in range(6)]
    await asyncio.gather(*(engine.generate(prompt, SamplingParams(n=2, max_tokens=4)) for prompt in prompts))
    assert engine.usage.prompt_tokens < len(engine.encoder.encode([trunk])) + 6 * 20


async def test_text_ends_right_after_the_stop_string_even_inside_a_token(reference, tiny_model, policy):
    text = greedy_text(reference, policy, PROMPTS[0], 24)
    for start in range(0, len(text) - 3, 3):
        stop = text[start : start + 2]
        if "\ufffd" in stop:
            continue
        (generation,) = await policy.generate(
            PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop=("@@", stop))
        )
        assert generation.text == text[: text.index(stop) + 2]
        assert (generation.stop, generation.cut_off) == (stop, False)
        assert generation.tokens <= 24


async def test_a_sample_that_met_its_stop_costs_nothing_more_while_its_siblings_go_on(tiny_model):
    engine = fresh(tiny_model)
    generations = await engine.generate(PROMPTS[0], SamplingParams(n=8, max_tokens=400, stop=("e", "1"), seed=3))
    lengths = [generation.tokens for generation in generations]
    assert all(generation.stop for generation in generations)
    assert len(set(lengths)) > 2
    assert engine.usage.generated_tokens == sum(lengths) < 8 * max(lengths)


async def test_max_tokens_cuts_off_and_the_context_bounds_max_tokens(tiny_model):
    engine = fresh(tiny_model, max_context=40)
    size = len(engine.encoder.encode(PROMPTS[0].segments))
    (generation,) = await engine.generate(PROMPTS[0], SamplingParams(max_tokens=5))
    assert (generation.tokens, generation.stop, generation.cut_off) == (5, None, True)
    (generation,) = await engine.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=500))
    assert (generation.tokens, generation.cut_off) == (40 - size, True)
    with pytest.raises(UserError, match="max_context"):
        await engine.generate(PromptText(("apples " * 60,)), SamplingParams())


async def test_the_end_token_ends_a_sample_and_is_no_text(reference, tiny_model, policy):
    engine = fresh(tiny_model)
    ids = greedy_ids(reference, engine.encoder.encode(PROMPTS[0].segments), 6)
    engine._ends = frozenset({ids[3]})
    first = ids.index(ids[3])
    (generation,) = await engine.generate(PROMPTS[0], GREEDY)
    assert generation.text == engine.tokenizer.decode(ids[:first], clean_up_tokenization_spaces=False)
    assert (generation.stop, generation.cut_off, generation.tokens) == (None, False, first + 1)


async def test_more_samples_than_rows_are_all_returned_and_differ(tiny_model):
    engine = fresh(tiny_model, max_batch=3)
    params = SamplingParams(n=10, max_tokens=8, seed=1)
    generations = await engine.generate(PROMPTS[0], params)
    assert len({generation.text for generation in generations}) == 10
    assert engine._batches[None].rows.lengths == []
    wide = await fresh(tiny_model, max_batch=64).generate(PROMPTS[0], params)
    assert [g.text for g in wide] == [g.text for g in generations], "a sample depends on the batch it was in"
    again = await engine.generate(PROMPTS[0], params)
    assert {g.text for g in again} != {g.text for g in generations}, "asking again must give new samples"


async def test_a_greedy_pass_does_not_change_what_a_later_pass_draws(tiny_model):
    """After a kill, a resumed job that has its greedy trees draws the same samples as one that made them."""
    greedy, sampled = SamplingParams(temperature=0.0, max_tokens=8), SamplingParams(n=4, max_tokens=8)
    alone = await fresh(tiny_model).generate(PROMPTS[0], sampled)
    engine = fresh(tiny_model)
    await engine.generate(PROMPTS[0], greedy)
    assert [g.text for g in await engine.generate(PROMPTS[0], sampled)] == [g.text for g in alone]


async def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(reference, tiny_model, policy):
    engine = fresh(tiny_model)
    doomed = asyncio.create_task(engine.generate(PROMPTS[3], SamplingParams(n=4, max_tokens=1500)))
    queued = asyncio.create_task(engine.generate(PROMPTS[1], SamplingParams(n=70, max_tokens=1500)))
    while not engine._batches or not engine._batches[None].samples:
        await asyncio.sleep(0.01)
    doomed.cancel()
    queued.cancel()
    (generation,) = await engine.generate(PROMPTS[0], GREEDY)
    assert generation.text == greedy_text(reference, policy, PROMPTS[0], 24)
    await engine._driver
    assert (engine._batches[None].samples, engine._queue, engine._inside) == ([], [], set())
    assert engine.usage.generated_tokens < 3000


async def test_a_search_that_ends_early_takes_its_requests_out_of_the_engine(tiny_model):
    engine = fresh(tiny_model)
    tools = Tools(engine, None, lambda seed: LiteralSession(), exact_grade)
    trees = [Tree(f"p#{i}", problem(), PROMPTS[i].segments) for i in range(2)]
    searches = [Mcts(Expander(tree, tools, SearchSection(candidates=3, max_step_tokens=1500))) for tree in trees]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(search.search(8, in_flight=2)) for search in searches]
        while not engine._batches or len(engine._batches[None].samples) < 6:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
    await engine._driver
    assert (engine._batches[None].samples, engine._queue, engine._inside) == ([], [], set())
    assert engine.usage.generated_tokens < 6 * 1500


async def test_a_failed_tick_is_an_engine_error_and_the_engine_lives_on(reference, tiny_model, policy, monkeypatch):
    engine = fresh(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_finish", lambda batch: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(EngineError, match="out of memory"):
            await engine.generate(PROMPTS[0], GREEDY)
    (generation,) = await engine.generate(PROMPTS[0], GREEDY)
    assert generation.text == greedy_text(reference, policy, PROMPTS[0], 24)


def test_an_engine_outlives_the_event_loop_that_was_shut_down_with_work_inside(reference, tiny_model, policy):
    engine = fresh(tiny_model)

    async def abandon() -> None:
        task = asyncio.create_task(engine.generate(PROMPTS[1], SamplingParams(n=4, max_tokens=1500)))
        await asyncio.sleep(0.05)
        assert not task.done()

    asyncio.run(abandon())
    (generation,) = asyncio.run(engine.generate(PROMPTS[0], GREEDY))
    assert generation.text == greedy_text(reference, policy, PROMPTS[0], 24)
    assert engine._batches[None].samples == []


async def test_closing_fails_what_is_in_flight(tiny_model):
    engine = fresh(tiny_model)
    task = asyncio.create_task(engine.generate(PROMPTS[0], SamplingParams(n=4, max_tokens=1500)))
    await asyncio.sleep(0.05)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(PROMPTS[0], GREEDY)


async def test_scores_equal_the_stock_classifier_on_single_sequences(ppm: Path):
    scorer = HfScorer(str(ppm), SECTION)
    stock = AutoModelForSequenceClassification.from_pretrained(ppm).eval()
    end = scorer.encoder.tokenizer.eos_token
    completions = ["x = 12\n<end_of_step>\n", "y\n", "# Step 1: add\nprint(12 + 7)\n<end_of_code>\n", f"x{end}", "y\n"]
    segments = [[text] for text in completions]
    calls = await asyncio.gather(*(scorer.score(prompt, segments) for prompt in PROMPTS))
    for prompt, scores in zip(PROMPTS, calls, strict=True):
        for completion, score in zip(completions, scores, strict=True):
            ids = torch.tensor([scorer.encoder.encode((*prompt.segments, completion))])
            with torch.no_grad():
                hidden = stock.model(ids).last_hidden_state[0, -1]
                raw = stock.score(hidden).item()
                if not completion.endswith(end):  # stock pooling skips an end token where it is the padding too
                    assert raw == pytest.approx(stock(ids).logits.item(), abs=1e-5)
            assert score == pytest.approx(squash(raw, 2.5), abs=1e-5)
    again = await scorer.score(PROMPTS[2], segments)
    assert again == pytest.approx(calls[2], abs=1e-5)
    assert scorer.usage.scored == 30
    assert len({round(score, 6) for scores in calls for score in scores}) > 15


async def test_siblings_share_the_computation_of_their_prompt(ppm: Path):
    scorer = HfScorer(str(ppm), SECTION)
    prompt = PromptText(("Tom has 12 apples and buys 7 more. " * 10,))
    completions = [[f"x = {i}\n<end_of_step>\n"] for i in range(8)]
    await scorer.score(prompt, completions)
    own = sum(len(scorer.encoder.encode(completion)) for completion in completions)
    assert scorer.usage.prompt_tokens <= len(scorer.encoder.encode(prompt.segments)) + own
    assert await scorer.score(prompt, []) == []


async def test_small_score_batches_give_the_same_scores(ppm: Path):
    completions = [[f"x = {i}\n" * (1 + i), "end\n"] for i in range(12)]
    whole = await HfScorer(str(ppm), SECTION).score(PROMPTS[3], completions)
    small = HfScorer(str(ppm), EngineSection(dtype="float32", device="cpu", score_batch_tokens=10, cache_mib=1))
    assert await small.score(PROMPTS[3], completions) == pytest.approx(whole, abs=1e-5)


def test_a_policy_checkpoint_is_no_scorer(tiny_model: Path):
    with pytest.raises(UserError, match=r"score\.weight"):
        HfScorer(str(tiny_model), SECTION)


def test_a_wrong_folder_or_dtype_is_a_user_error(tmp_path: Path, tiny_model: Path):
    with pytest.raises(UserError, match="no model folder"):
        HfPolicy(str(tmp_path / "nothing"), SECTION)
    with pytest.raises(UserError, match="float32"):
        fresh(tiny_model, dtype="fp8")


async def test_adapters_change_the_text_and_do_not_leak_into_each_other(reference, tiny_model, policy, tmp_path):
    peft = pytest.importorskip("peft")
    expected = {None: greedy_text(reference, policy, PROMPTS[0], 12)}
    for name in ("answer", "stop"):
        torch.manual_seed(len(name))
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        )
        adapted.save_pretrained(tmp_path / name)
        with torch.no_grad():
            ids = torch.tensor([policy.encoder.encode(PROMPTS[0].segments)])
            out = adapted.eval().generate(input_ids=ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        out = out[: out.index(policy.tokenizer.eos_token_id)] if policy.tokenizer.eos_token_id in out else out
        expected[name] = policy.tokenizer.decode(out, clean_up_tokenization_spaces=False)
    assert len(set(expected.values())) == 3
    engine = fresh(tiny_model)
    assert (await engine.generate(PROMPTS[0], GREEDY))[0].text.startswith(expected[None])
    for name, folder in (("answer", "stop"), ("stop", "stop"), ("answer", "answer")):  # the last one replaces the first
        engine.load_adapter(name, str(tmp_path / folder))
        await engine.generate(PROMPTS[0], SamplingParams(max_tokens=2, adapter=name))
    for _ in range(2):
        texts = await asyncio.gather(
            *(engine.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, adapter=a)) for a in expected)
        )
        assert [generations[0].text for generations in texts] == list(expected.values())
    with pytest.raises(UserError, match="answer, stop"):
        await engine.generate(PROMPTS[0], SamplingParams(adapter="other"))
    with pytest.raises(UserError, match="adapter_config"):
        engine.load_adapter("none", str(tmp_path))


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=20), st.integers(20, 2000))
def test_the_prefix_tree_returns_what_was_put_in_and_keeps_its_limit(sequences, limit):
    """KV of a token is made to depend on all tokens before it, so any mix-up of edges shows."""

    def kv(ids: list[int]) -> torch.Tensor:
        values = [float(hash(tuple(ids[: i + 1])) % 1000003) for i in range(len(ids))]
        return torch.tensor(values).view(1, 1, 1, -1, 1)

    small, large = PrefixCache(limit), PrefixCache(1 << 20)
    for ids in sequences:
        for cache in (small, large):
            cache.insert(ids, lambda start, end, ids=ids: kv(ids)[:, :, :, start:end].clone())
            assert cache.bytes <= cache.limit_bytes
            assert cache.bytes == sum(edge.kv.numel() * 4 for edge in cache._edges())
    for ids in sequences:
        assert large.match([*ids, 7]).length == len(ids)
        for cache in (small, large):
            match = cache.match([*ids, 7])
            if match.pieces:
                assert torch.equal(torch.cat(match.pieces, dim=3), kv(ids)[:, :, :, : match.length])


def test_the_prefix_tree_forgets_the_least_recently_used_first():
    cache = PrefixCache(100)
    for first in range(3):
        cache.insert([first] * 8, lambda start, end: torch.zeros(1, 1, 1, end - start, 1))
    cache.match([0] * 8)
    cache.insert([9] * 8, lambda start, end: torch.zeros(1, 1, 1, end - start, 1))
    assert [cache.match([first] * 8).length for first in (0, 1, 2, 9)] == [8, 0, 0, 8]


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix_is_the_longest(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_attention_groups_cover_all_rows_with_little_padding(counts):
    counts = [1] * (len(counts) // 3) + sorted(counts)
    groups = _group(counts)
    assert [row for group in groups for row in range(len(counts))[group]] == list(range(len(counts)))
    for group in groups:
        own = counts[group]
        assert max(own) * len(own) <= 2 * sum(own)
        assert min(own) > 1 or max(own) == 1


def test_sampling_follows_the_tempered_distribution_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    count = 4000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        tokens, logprobs = sample_tokens(
            logits.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_p), uniforms
        )
        probabilities = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities * (before < top_p)
            probabilities /= probabilities.sum()
        frequencies = torch.bincount(tokens, minlength=5) / count
        assert torch.allclose(frequencies, probabilities, atol=2e-3)
        assert torch.allclose(logprobs, logits[0].log_softmax(-1)[tokens], atol=1e-6)


def test_sampling_mixes_greedy_rows_and_never_draws_impossible_tokens():
    logits = torch.tensor([[0.0, 3.0, -math.inf], [5.0, 0.0, -math.inf], [0.0, 0.0, -math.inf]])
    tokens, _ = sample_tokens(
        logits, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.99, 0.99, 1 - 2**-60])
    )
    assert tokens.tolist() == [1, 0, 1]


def test_top_p_over_a_flat_vocabulary_larger_than_the_first_look():
    logits = torch.zeros(500, 5000)
    tokens, _ = sample_tokens(logits, torch.ones(500), torch.full((500,), 0.9), torch.arange(500) / 500)
    assert len(set(tokens.tolist())) == 500
