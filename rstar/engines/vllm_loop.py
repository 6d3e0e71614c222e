"""vLLM's engine as the policy and the scorer see it: `start(...)`, then await requests, weights, adapters, the end.

CUDA: vLLM's `AsyncLLM`, engine core and workers in processes of their own. CPU: one thread of this process owns the
engine and steps it, which starts in 5-10 s instead of 30-50. New requests join between two steps either way
(continuous batching), and a cancelled one leaves the batch.

Waiting OpenMP threads sleep (they would eat the cores of the sandbox otherwise); that and the other settings here are
defaults, which the environment overrides. They count only where this module is imported before torch.
"""

# ruff: noqa: E402 - the settings must stand before torch and vLLM are loaded
from __future__ import annotations

import os

for _name, _value in {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",  # many workers read large checkpoints from shared storage at once
}.items():
    os.environ.setdefault(_name, _value)

import asyncio
import gc
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from vllm import AsyncEngineArgs, EngineArgs, LLMEngine, PoolingParams, TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.v1.engine import core as engine_core
from vllm.v1.engine.async_llm import AsyncLLM

from rstar.config import EngineSection
from rstar.engines.base import EngineError
from rstar.types import UserError

T = TypeVar("T")


class _Turns:
    """A lock that is granted in the order in which it was asked for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last, self._now = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            ticket, self._last = self._last, self._last + 1
            self._changed.wait_for(lambda: self._now == ticket)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()


_CPU_BLOCK = 32  # tokens of a cached block; CPU attention takes multiples of 32, its default of 128 hides short trunks
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing
_open_in_process: set[int] = set()
_turns = _Turns()  # vLLM's CPU kernels share scratch memory within a process: two engines at once corrupt the heap


def start(args: dict[str, Any], section: EngineSection) -> Engine:
    """Build the engine for this machine's platform. `args` are vLLM's engine arguments that hold on any."""
    args = {**args, "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"}
    if current_platform.is_cpu():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return _ThreadEngine(args | cpu_arguments(section), section.threads)
    share = {"gpu_memory_utilization": section.gpu_memory, "tensor_parallel_size": section.tensor_parallel}
    with visible_gpus(section.device, section.tensor_parallel):
        return AsyncEngine(args | share)


@contextmanager
def visible_gpus(device: str, count: int) -> Iterator[None]:
    """Processes started inside see `count` of this process's GPUs, from `device` ("cuda:1") on; else all of them."""
    name = "CUDA_VISIBLE_DEVICES"
    before, (_, _, index) = os.environ.get(name), device.partition(":")
    if index:
        first = int(index)
        ours = before.split(",") if before else [str(i) for i in range(first + count)]
        chosen = ours[first : first + count]
        if len(chosen) < count:
            raise UserError(f"engine device {device} x {count}", need=f"GPUs among the {len(ours)} this worker sees")
        os.environ[name] = ",".join(chosen)
    try:
        yield
    finally:
        if index:
            del os.environ[name]
            os.environ.update({name: before} if before is not None else {})


def cpu_arguments(section: EngineSection) -> dict[str, Any]:
    """vLLM's engine arguments on CPU: an explicit KV space and no compilation, so that nothing is warmed up."""
    return {"kv_cache_memory_bytes": section.cache_mib << 20, "block_size": _CPU_BLOCK, "enforce_eager": True}


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


class Engine(Protocol):
    async def run(self, ids: list[int], params: object, adapter: LoRARequest | None) -> Any: ...
    async def load_checkpoint(self, folder: str) -> None: ...
    async def add_adapter(self, adapter: LoRARequest) -> None: ...
    def unfinished(self) -> int: ...
    async def close(self) -> None: ...


class AsyncEngine:
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


@contextmanager
def _process_group_of_others() -> Iterator[None]:
    """vLLM's shutdown tears the process's group down (a trainer of this process then starts its own); as long as other
    engines of this process live by it, it stays."""
    tear_down = engine_core.cleanup_dist_env_and_memory
    if _open_in_process:
        engine_core.cleanup_dist_env_and_memory = lambda: None
    try:
        yield
    finally:
        engine_core.cleanup_dist_env_and_memory = tear_down


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
            with _turns:
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
                    with _turns:
                        outputs = engine.step()
                    for output in outputs:
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
        with _turns:
            _open_in_process.discard(id(self))
            with _process_group_of_others():
                engine.engine_core.shutdown()
            del engine
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
                with _turns:
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
