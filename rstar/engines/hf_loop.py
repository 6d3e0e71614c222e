"""What both embedded engines share: loading a model, and ticks in the torch thread while there is work.

All engines of a process share one torch thread: on a CPU the policy and the PPM cannot run faster side by side than in
turns, and a tick is short.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from rstar.config import EngineSection
from rstar.engines.base import EngineError, native_bf16
from rstar.engines.hf_rows import ATTENTION
from rstar.tokens import check_model_folder
from rstar.types import Usage, UserError

_TORCH_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")

_ROWS_MIB = 1024  # rows in work may always take this much: keeping no prefixes must not make batches small

Work = TypeVar("Work", bound="Request")


@dataclass(eq=False)
class Request:
    """Something that was asked for, from submission until its future is set."""

    future: asyncio.Future[Any]
    cancelled: bool = False


class Engine(Generic[Work]):
    """Runs ticks in the torch thread while there is work; requests come and go between ticks."""

    def __init__(self, section: EngineSection) -> None:
        self.section = section
        self.usage = Usage()
        self.busy_seconds = 0.0
        self._waiting: list[Work] = []
        self._inside: set[Work] = set()
        self._driver: asyncio.Task[None] | None = None
        self._closed = False

    async def close(self) -> None:
        """Fail what is in flight and give the model's memory back. Idempotent."""
        self._closed = True
        self._fail(EngineError("the engine was closed"))
        if self._driver is not None and not self._driver.done():
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(_TORCH_THREAD, self._release)

    async def _submit(self, request: Work) -> Any:
        if self._closed:
            raise EngineError("the engine is closed")
        self.usage.engine_calls += 1
        self._waiting.append(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        try:
            return await request.future
        except asyncio.CancelledError:
            request.cancelled = True
            raise

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await asyncio.sleep(0)  # let callers that are ready submit too
                new, self._waiting = self._waiting, []
                self._inside.update(new)
                if not self._inside:
                    return
                try:
                    finished = await loop.run_in_executor(_TORCH_THREAD, self._timed_tick, new)
                except (RuntimeError, MemoryError) as error:  # torch's own failures, out of memory among them
                    self._fail(EngineError(f"{type(error).__name__}: {error}"))
                    continue
                except Exception as error:  # a bug: whoever waits must see it, or would wait for ever
                    self._fail(error)
                    continue
                for request, result in finished:
                    self._inside.discard(request)
                    if not request.future.done():
                        request.future.set_result(result)
        finally:  # reached with work inside only when the event loop is being shut down
            for request in self._inside:
                request.cancelled = True
            self._inside.clear()

    def _timed_tick(self, new: Sequence[Work]) -> list[tuple[Work, Any]]:
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                return self._tick(new)
        except BaseException:
            self._abandon()
            raise
        finally:
            self.busy_seconds += time.perf_counter() - start

    def _fail(self, error: Exception) -> None:
        for request in (*self._inside, *self._waiting):
            if not request.future.done() and not request.future.get_loop().is_closed():
                request.future.set_exception(error)
        self._inside.clear()
        self._waiting.clear()

    def _tick(self, new: Sequence[Work]) -> list[tuple[Work, Any]]:
        """One forward pass; returns the requests that ended, cancelled ones included. In the torch thread."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Drop all work after a failure. In the torch thread."""
        raise NotImplementedError

    def _release(self) -> None:
        """Give memory back. In the torch thread."""
        raise NotImplementedError


def load_model(loader: Any, model_path: str, section: EngineSection) -> Any:
    """A model of transformers' auto class `loader`, ready for RowBuffer. Raises UserError unless it is whole."""
    if Path(model_path).is_dir():
        check_model_folder(model_path)
    device = section.device if section.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    _, _, number = device.partition(":")
    if device.startswith("cuda") and int(number or 0) >= (there := torch.cuda.device_count()):
        raise UserError(
            f"engine.device={device}, and torch sees {there} GPUs here",
            need="a GPU with that number",
            how="see `rstar doctor`; or engine.device=auto, cluster.gpus_per_worker",
        )
    if section.threads:
        torch.set_num_threads(section.threads)
    try:
        model, info = loader.from_pretrained(
            model_path, dtype=_dtype(section, device), attn_implementation=ATTENTION, output_loading_info=True
        )
    except (OSError, ValueError) as error:  # transformers' way to say that there is no such model
        raise UserError(
            f"{model_path} could not be loaded: {str(error).strip().splitlines()[0]}",
            need="a model folder or a hub id",
            how="check model.base; without network, give a local folder",
        ) from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"{model_path} lacks the weights {names}",
            need=f"a checkpoint of {type(model).__name__}",
            how="give the policy's folder to the policy and the PPM's to the scorer",
        )
    return model.to(device).eval()


def memory_limits(section: EngineSection) -> tuple[int, int]:
    """Bytes of keys and values: of the rows in work, and of the prefixes that are kept."""
    return max(section.cache_mib, _ROWS_MIB) << 20, section.cache_mib << 20


def _dtype(section: EngineSection, device: str) -> torch.dtype:
    """auto is bfloat16 where the hardware computes in it, else float32."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if section.dtype == "auto":
        return torch.bfloat16 if device != "cpu" or native_bf16() else torch.float32
    if section.dtype not in names:
        raise UserError(f"engine.dtype={section.dtype}", need="one of auto, " + ", ".join(names))
    return names[section.dtype]


def max_context(config: Any, section: EngineSection) -> int:
    """Tokens of a sequence. Raises UserError for a sliding window that is narrower: rows attend to everything."""
    longest = min(section.max_context, getattr(config, "max_position_embeddings", None) or section.max_context)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < longest:
        raise UserError(
            f"engine.max_context={longest} with a sliding window of {window} tokens",
            need=f"at most {window}",
            how=f"set engine.max_context={window}, or engine.kind=vllm",
        )
    return longest
