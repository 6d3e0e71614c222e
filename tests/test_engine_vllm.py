"""vLLM against plain transformers on a tiny float32 model: same texts, same log-probabilities, same scores, also after
new weights or a new adapter went into the running engine. Engines start once a module: each costs some ten seconds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from rstar.config import EngineSection
from rstar.engines.base import EngineError, squash
from rstar.types import Generation, PromptText, SamplingParams, UserError

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/run.sh --vllm")
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from rstar.engines import vllm_loop  # noqa: E402
from rstar.engines.openai import OpenAIPolicy  # noqa: E402
from rstar.engines.vllm import VllmPolicy, VllmScorer  # noqa: E402
from rstar.tokens import SegmentEncoder, load_tokenizer  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

SECTION = EngineSection(
    kind="vllm", dtype="float32", max_batch=16, max_context=512, cache_mib=64, score_batch_tokens=512
)
TRUNK = "user\nTom has 12 apples and buys 7 more. How many apples does he have now?\n"
PROMPT = PromptText((TRUNK, "<code>\n# Step 1: Start with the apples Tom has\napples = 12\n<end_of_step>\n"))
SCALE = 3.0


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies, the same untied, two PPMs, two adapters. Heads are 32 wide: vLLM's CPU attention takes no less."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("vllm_checkpoints")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    made: dict[str, Path] = {}

    def config(**changes: Any) -> LlamaConfig:
        values = json.loads((tiny_model / "config.json").read_text())
        return LlamaConfig(**{**values, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, **changes})

    def save(name: str, model: Any) -> None:
        made[name] = root / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])

    for seed, name in enumerate(["policy", "other"]):
        torch.manual_seed(seed)
        save(name, AutoModelForCausalLM.from_config(config()))
        torch.manual_seed(seed)
        save(f"untied_{name}", AutoModelForCausalLM.from_config(config(tie_word_embeddings=False)))
        torch.manual_seed(seed)
        ppm = AutoModelForSequenceClassification.from_config(config(num_labels=1))
        ppm.config.rstar_score_scale = SCALE + seed
        save(f"ppm_{name}", ppm)
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(made["policy"])
        adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        made[f"adapter_{name}"] = root / f"adapter_{name}"
        adapter.save_pretrained(made[f"adapter_{name}"])
    torch.manual_seed(0)
    save("wide", AutoModelForCausalLM.from_config(config(intermediate_size=160)))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def policy(checkpoints: dict[str, Path]) -> AsyncIterator[VllmPolicy]:
    engine = VllmPolicy(checkpoints["policy"], SECTION, lora_rank=4)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(checkpoints: dict[str, Path]) -> AsyncIterator[VllmScorer]:
    engine = VllmScorer(checkpoints["ppm_policy"], SECTION)
    yield engine
    await engine.close()


def greedy_by_transformers(model: Any, folder: Path, prompt: PromptText, count: int) -> tuple[str, float]:
    """Text and log-probability of `count` greedy tokens, by the plain definition. Half a character at the end is left
    out, as vLLM does."""
    tokenizer = load_tokenizer(folder)
    ids = SegmentEncoder(tokenizer).encode(prompt.segments)
    start, total = len(ids), 0.0
    with torch.inference_mode():
        while len(ids) < start + count:
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
            ids.append(int(logprobs.argmax()))
            total += float(logprobs[ids[-1]])
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).rstrip("\ufffd"), total


def scores_by_transformers(folder: Path, prompt: PromptText, completions: list[tuple[str, ...]]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = SegmentEncoder(load_tokenizer(folder))
    with torch.inference_mode():
        paths = [encoder.encode((*prompt.segments, *completion)) for completion in completions]
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in paths]


async def greedy(policy: VllmPolicy, count: int = 12, adapter: str | None = None) -> Generation:
    (sample,) = await policy.generate(PROMPT, SamplingParams(temperature=0, max_tokens=count, adapter=adapter))
    return sample


async def assert_equals_transformers(policy: VllmPolicy, folder: Path) -> Generation:
    sample = await greedy(policy)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text, logprob = greedy_by_transformers(model, folder, PROMPT, 12)
    assert sample.text.rstrip("\ufffd") == text
    assert sample.logprob == pytest.approx(logprob, abs=1e-3)
    return sample


async def test_greedy_text_and_logprob_equal_transformers(policy: VllmPolicy, checkpoints: dict[str, Path]) -> None:
    sample = await assert_equals_transformers(policy, checkpoints["policy"])
    again = await greedy(policy)  # now on cached blocks
    assert (again.text, again.logprob) == (sample.text, pytest.approx(sample.logprob, abs=1e-4))


async def test_a_changed_checkpoint_in_the_running_engine_equals_transformers(
    policy: VllmPolicy, checkpoints: dict[str, Path]
) -> None:
    before = await greedy(policy)
    await policy.load_weights(checkpoints["other"])
    after = await assert_equals_transformers(policy, checkpoints["other"])
    assert after.logprob != pytest.approx(before.logprob, abs=1e-2)
    await policy.load_weights(checkpoints["policy"])
    assert (await greedy(policy)).logprob == pytest.approx(before.logprob, abs=1e-4)


async def test_a_changed_adapter_of_the_same_name_and_folder_is_really_reloaded(
    policy: VllmPolicy, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    plain = await greedy(policy)
    folder = tmp_path / "answer"
    folder.mkdir()
    for name in ("adapter_policy", "adapter_other"):
        for file in checkpoints[name].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        await policy.load_adapter("answer", folder)
        sample = await greedy(policy, adapter="answer")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoints["policy"]), folder).eval()
        text, logprob = greedy_by_transformers(model, checkpoints["policy"], PROMPT, 12)
        assert sample.text.rstrip("\ufffd") == text
        assert sample.logprob == pytest.approx(logprob, abs=1e-3)
        assert sample.logprob != pytest.approx(plain.logprob, abs=1e-2)
    assert (await greedy(policy)).logprob == pytest.approx(plain.logprob, abs=1e-4)


async def test_an_adapter_nobody_loaded_is_refused(policy: VllmPolicy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter"):
        await greedy(policy, adapter="unknown")
    with pytest.raises(UserError, match="adapter_config"):
        await policy.load_adapter("empty", tmp_path)


async def test_weights_of_another_architecture_are_refused(policy: VllmPolicy, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="intermediate_size"):
        await policy.load_weights(checkpoints["wide"])
    await assert_equals_transformers(policy, checkpoints["policy"])


async def test_samples_of_one_request_are_distinct_and_counted(policy: VllmPolicy) -> None:
    before = policy.usage.generated_tokens
    samples = await policy.generate(PROMPT, SamplingParams(n=8, temperature=1.0, max_tokens=16))
    assert len({sample.text for sample in samples}) == 8
    assert all(sample.logprob < 0 and 0 < sample.tokens <= 16 for sample in samples)
    assert policy.usage.generated_tokens - before == sum(sample.tokens for sample in samples)


async def test_greedy_requests_for_several_samples_repeat_one(policy: VllmPolicy) -> None:
    samples = await policy.generate(PROMPT, SamplingParams(n=3, temperature=0, max_tokens=4))
    assert len(samples) == 3
    assert len({sample.text for sample in samples}) == 1


async def test_a_stop_string_ends_the_text_and_is_named(policy: VllmPolicy) -> None:
    whole = (await greedy(policy, 24)).text
    stop = whole[5:8]
    (sample,) = await policy.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop=("never so", stop)))
    assert sample.text == whole[: whole.index(stop) + len(stop)]
    assert (sample.stop, sample.cut_off) == (stop, False)
    assert sample.tokens < 24
    assert (await greedy(policy, 3)).cut_off


async def test_requests_join_while_others_run(policy: VllmPolicy) -> None:
    alone = await greedy(policy)
    # Several samples: one alone may meet the end token early (about 1 in 600 a token), all of them hardly ever do.
    long = asyncio.create_task(policy.generate(PROMPT, SamplingParams(n=4, max_tokens=400)))
    await asyncio.sleep(0.05)
    first = await greedy(policy)
    assert not long.done()
    together = await asyncio.gather(*(greedy(policy) for _ in range(20)))  # more than max_batch
    assert {sample.text for sample in (first, *together)} == {alone.text}
    await long


async def test_a_cancelled_request_leaves_the_engine(policy: VllmPolicy) -> None:
    params = SamplingParams(n=4, max_tokens=400)
    tasks = [asyncio.create_task(policy.generate(PROMPT, params)) for _ in range(3)]
    while policy._engine.unfinished() < 3:
        await asyncio.sleep(0.005)
    with pytest.raises(EngineError, match="3 unfinished"):
        await policy.load_weights(policy_folder(policy))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)
    await greedy(policy, 2)  # behind the cancellations in the queue
    assert policy._engine.unfinished() == 0
    assert await policy._engine._call(lambda engine: engine.get_num_unfinished_requests()) == 0  # type: ignore[attr-defined]


def policy_folder(policy: VllmPolicy) -> str:
    return str(policy._encoder.tokenizer.name_or_path)


async def test_a_prompt_longer_than_the_context_is_the_users(policy: VllmPolicy) -> None:
    with pytest.raises(UserError, match="max_context"):
        await policy.generate(PromptText(("7 " * 600,)), SamplingParams())


async def test_scores_equal_transformers(scorer: VllmScorer, checkpoints: dict[str, Path]) -> None:
    steps = [
        ("total = 12 + 7\n<end_of_step>\n",),
        ("total = 12\n", "print(total)\n<end_of_code>\n"),
        ("x",),
        ("y = 0\n",),
    ]
    expected = scores_by_transformers(checkpoints["ppm_policy"], PROMPT, steps)
    assert await scorer.score(PROMPT, steps) == pytest.approx([squash(raw, SCALE) for raw in expected], abs=1e-4)
    again = await scorer.score(PROMPT, steps)  # now on cached blocks
    assert again == pytest.approx([squash(raw, SCALE) for raw in expected], abs=1e-4)
    assert max(expected) - min(expected) > 0.05  # four different scores, not one constant


async def test_a_changed_ppm_in_the_running_engine_equals_transformers(
    scorer: VllmScorer, checkpoints: dict[str, Path]
) -> None:
    await scorer.load_weights(checkpoints["ppm_other"])
    (raw,) = scores_by_transformers(checkpoints["ppm_other"], PROMPT, [("x = 1\n",)])
    (score,) = await scorer.score(PROMPT, [("x = 1\n",)])
    assert score == pytest.approx(squash(raw, SCALE + 1), abs=1e-4)
    await scorer.load_weights(checkpoints["ppm_policy"])
    (raw,) = scores_by_transformers(checkpoints["ppm_policy"], PROMPT, [("x = 1\n",)])
    assert await scorer.score(PROMPT, [("x = 1\n",)]) == [pytest.approx(squash(raw, SCALE), abs=1e-4)]


async def test_policy_and_scorer_at_work_together_give_what_each_gives_alone(
    policy: VllmPolicy, scorer: VllmScorer
) -> None:
    """Their kernels share scratch memory: stepped at the same time they corrupt the heap or each other's results."""
    steps = [("x = 1\n" * i,) for i in range(1, 16)]
    sample, scores = await greedy(policy, 40), await scorer.score(PROMPT, steps)
    for round_ in range(10):
        other = PromptText((f"a = {round_}\n",))  # not cached: real work for both
        *samples, together, _ = await asyncio.gather(
            *(greedy(policy, 40) for _ in range(4)), scorer.score(PROMPT, steps), scorer.score(other, steps)
        )
        assert together == pytest.approx(scores, abs=1e-4)
        assert [s.logprob for s in samples] == pytest.approx([sample.logprob] * 4, abs=1e-3)


def stalled(engine: object) -> list[Any]:
    """An engine's step that finishes nothing: its requests stay in flight."""
    time.sleep(0.01)
    return []


async def test_an_untied_head_is_reloaded_too_and_a_closed_engine_says_so(
    checkpoints: dict[str, Path], policy: VllmPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    engine = VllmPolicy(checkpoints["untied_policy"], SECTION)
    await assert_equals_transformers(engine, checkpoints["untied_policy"])
    await engine.load_weights(checkpoints["untied_other"])
    await assert_equals_transformers(engine, checkpoints["untied_other"])
    with monkeypatch.context() as patch:
        patch.setattr(vllm.LLMEngine, "step", stalled)
        pending = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=400)))
        await asyncio.sleep(0.05)
        await engine.close()
        await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await pending
    with pytest.raises(EngineError, match="closed"):
        await greedy(engine)
    await assert_equals_transformers(policy, checkpoints["policy"])  # another engine of this process lives on
    torch.set_num_threads(threads + 1)  # vLLM's CPU worker turns this into a no-op for the whole process
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


async def test_an_engine_that_dies_fails_all_its_requests_and_leaves_others_alone(
    checkpoints: dict[str, Path], policy: VllmPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step = VllmPolicy(checkpoints["policy"], SECTION), vllm.LLMEngine.step
    monkeypatch.setattr(vllm.LLMEngine, "step", stalled)
    pending = [asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=400))) for _ in range(3)]
    await asyncio.sleep(0.05)

    def out_of_memory(self: object) -> None:
        monkeypatch.setattr(vllm.LLMEngine, "step", step)  # one death
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm.LLMEngine, "step", out_of_memory)
    for request in pending:
        with pytest.raises(EngineError, match="vLLM died: OutOfMemoryError: CUDA out of memory"):
            await request
    with pytest.raises(EngineError, match="vLLM died"):
        await greedy(engine)  # never waited for, as a dead engine's requests can be
    await engine.close()
    await assert_equals_transformers(policy, checkpoints["policy"])


async def test_a_policy_checkpoint_is_no_scorer(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="ForCausalLM"):
        VllmScorer(checkpoints["policy"], SECTION)


async def test_steps_and_siblings_are_computed_on_cached_trunks(
    policy: VllmPolicy, scorer: VllmScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 32 tokens: of the parent's prompt at most the rest of its last block may be computed again."""
    trunk = PromptText((TRUNK, "# A trunk that no other test has put into the cache before.\n" * 8))
    step = "total = 12 + 7\n<end_of_step>\n"
    for engine in (policy, scorer):
        cached: list[int] = []
        run = engine._engine.run

        async def watched(ids: list[int], params: object, adapter: Any, run: Any = run, cached: Any = cached) -> Any:
            output = await run(ids, params, adapter)
            cached.append(output.num_cached_tokens)
            return output

        monkeypatch.setattr(engine._engine, "run", watched)
        known = len(engine._encoder.encode(trunk.segments)) // 32 * 32
        if isinstance(engine, VllmPolicy):
            await engine.generate(trunk, SamplingParams(max_tokens=1))
            await engine.generate(trunk.plus(step), SamplingParams(max_tokens=1))
            first, *later = cached
        else:
            await engine.score(trunk, [(f"x = {i}\n{step}",) for i in range(4)])
            first, *later = sorted(cached)
        assert first < 32 <= known
        assert len(later) and min(later) >= known


async def test_the_config_places_the_engine_on_its_gpus(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's GPU engine is built with, seen from where its processes would start."""
    seen: list[tuple[int, float, str | None]] = []

    def built(args: Any) -> None:
        seen.append((args.tensor_parallel_size, args.gpu_memory_utilization, os.environ.get("CUDA_VISIBLE_DEVICES")))

    monkeypatch.setattr(vllm_loop.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(vllm_loop.AsyncLLM, "from_engine_args", built)
    section = replace(SECTION, gpu_memory=0.3, tensor_parallel=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    for device in ("auto", "cuda", "cuda:0", "cuda:2"):
        vllm_loop.start({"model": str(checkpoints["policy"])}, replace(section, device=device))
    assert seen == [(2, 0.3, seen_gpus) for seen_gpus in ("4,5,6,7", "4,5,6,7", "4,5", "6,7")]
    with pytest.raises(UserError, match="GPUs among the 4"):
        vllm_loop.start({"model": str(checkpoints["policy"])}, replace(section, device="cuda:3"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    vllm_loop.start({"model": str(checkpoints["policy"])}, replace(section, device="cuda:1"))
    assert seen[-1][2] == "1,2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


async def test_a_scorer_on_a_gpu_computes_in_what_it_was_trained_in(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own choice for float32 weights is bfloat16 of a policy, but float16 of a pooling model."""
    dtypes: list[str] = []
    monkeypatch.setattr(vllm_loop, "start", lambda args, section: dtypes.append(args["dtype"]))
    for capability in (75, 80):
        platform = SimpleNamespace(
            is_cpu=lambda: False, is_cuda=lambda: True, has_device_capability=lambda need, has=capability: has >= need
        )
        monkeypatch.setattr("rstar.engines.vllm.current_platform", platform)
        for dtype in ("auto", "float16"):
            VllmScorer(checkpoints["ppm_policy"], replace(SECTION, dtype=dtype))
    assert dtypes == ["auto", "float16", "bfloat16", "float16"]


async def test_an_engine_may_take_an_hour_to_start() -> None:
    """Many workers read large checkpoints from shared storage; the environment may say otherwise."""
    import vllm.envs

    assert int(os.environ["VLLM_ENGINE_READY_TIMEOUT_S"]) == vllm.envs.VLLM_ENGINE_READY_TIMEOUT_S >= 3600


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run this engine already")
async def test_the_engine_of_gpus_behaves_the_same(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(args: dict[str, Any], section: EngineSection) -> vllm_loop.Engine:
        extension = {"worker_extension_cls": "rstar.engines.vllm_loop.WorkerExtension"}
        return vllm_loop.AsyncEngine(args | extension | vllm_loop.cpu_arguments(section))

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(vllm_loop, "start", start)
    engine = VllmPolicy(checkpoints["policy"], SECTION, lora_rank=4)
    try:
        first = await assert_equals_transformers(engine, checkpoints["policy"])
        await engine.load_adapter("answer", checkpoints["adapter_policy"])
        assert (await greedy(engine, adapter="answer")).logprob != pytest.approx(first.logprob, abs=1e-2)
        task = asyncio.create_task(engine.generate(PROMPT, SamplingParams(n=4, max_tokens=400)))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine._engine.unfinished() == 0
        await engine.load_weights(checkpoints["other"])
        await assert_equals_transformers(engine, checkpoints["other"])
        with pytest.raises(UserError, match="max_context"):
            await engine.generate(PromptText(("7 " * 600,)), SamplingParams())
    finally:
        await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await greedy(engine)


@contextmanager
def vllm_server(folder: Path, log: Path) -> Iterator[str]:
    """vLLM's own OpenAI server on this machine; yields its base URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(port), "--served-model-name", "toy", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager", "--max-num-seqs", "8", "--disable-log-stats"]
    if not torch.cuda.is_available():
        command += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):  # ended by itself
            os.killpg(server.pid, signal.SIGTERM)  # the engine is a process of its own
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.mark.slow
async def test_the_openai_policy_on_vllms_own_server_equals_transformers(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["policy"], dtype=torch.float32).eval()
    whole = PromptText((PROMPT.text,))  # the server tokenises the text in one piece
    text, logprob = greedy_by_transformers(model, checkpoints["policy"], whole, 12)
    with vllm_server(checkpoints["policy"], tmp_path / "server.log") as url:
        client = OpenAIPolicy(replace(SECTION, url=url, model="toy", retries=1))
        (sample,) = await client.generate(whole, SamplingParams(temperature=0, max_tokens=12))
        assert sample.text.rstrip("\ufffd") == text
        assert sample.logprob == pytest.approx(logprob, abs=1e-3)
        assert sample.tokens <= 12
        stop = text[3:6]
        (ended,) = await client.generate(whole, SamplingParams(temperature=0, max_tokens=12, stop=("never so", stop)))
        assert (ended.text, ended.stop) == (text[: text.index(stop) + len(stop)], stop)
        samples = await client.generate(whole, SamplingParams(n=4, max_tokens=8))
        assert len({s.text for s in samples}) == 4
        with pytest.raises(UserError, match="max_tokens"):
            await client.generate(whole, SamplingParams(max_tokens=100_000))
        with pytest.raises(UserError, match="404"):
            await client.generate(whole, SamplingParams(adapter="unknown"))
        await client.close()
