"""The embedded engines: a policy and a scorer on transformers, in this process; they start in seconds, on CPU or CUDA.

Continuous batching: every tick is one forward pass in which running samples get their next token and new prompts are
read in; of the scorer, a pass over the paths that wait. The keys and values of prompts and finished samples are kept in
a tree by token ids (PrefixCache), so a step's prompt, which is its parent's prompt and the parent's step, is mostly
there already. A prompt with n samples is read once.

All engines of a process share one torch thread: on a CPU the policy and the PPM cannot run faster side by side than in
turns, and a tick is short. Linear layers have their weights laid out once for oneDNN: a decode step multiplies few rows
by every weight matrix, and laying the matrix out then costs about as much as multiplying. Measured on a whole decode
step of a 135M model in float32 (2 busy cores with AVX-512, least CPU time of 8 steps): 1.4 times as fast at 4 rows, 1.8
at 16, 1.6 at 32, 1.2 at 64.
"""

from __future__ import annotations

import asyncio
import hashlib
import platform
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from rstar.calculator import filled_in
from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow, EngineError, ValueHead, native_bf16, squash, value_head
from rstar.engines.hf_attention import ATTENTION, SHARED_WORTH_WAITING, Match, PrefixCache, RowBuffer, common_prefix
from rstar.tokens import SegmentEncoder, TextStream, check_model_folder, load_tokenizer
from rstar.types import Generation, PromptText, SamplingParams, Usage, UserError

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


_ROWS = 64  # the batch size that oneDNN optimises the layout for; any other is computed correctly
_SMALLEST = 64  # output features; a scorer's head stays as it is


class PackedLinear(torch.nn.Module):
    """Inference-only copy of a linear layer; the layer it was made from can be dropped."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        with torch.inference_mode():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return result


def pack_linears(model: torch.nn.Module) -> bool:
    """Replace the model's linear layers where the machine and the data type gain from it; whether it was done."""
    weight = next(model.parameters())
    known = weight.dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or not (known and x86 and built_in):
        return False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.out_features >= _SMALLEST:
                setattr(parent, name, PackedLinear(child))
    return True


_NUCLEUS_FIRST = 1024  # tokens looked at before a whole vocabulary is sorted


def sample_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, top_ps: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw by inverting the cumulative distribution: one uniform number a row, so a row depends on its own number only.

    Args:
        logits: (rows, vocabulary).
        temperatures: (rows,); 0 takes the most likely token.
        top_ps: (rows,) in (0, 1]; the smallest set of tokens with at least this mass is drawn from.
        uniforms: (rows,) in [0, 1).

    Returns:
        tokens (rows,), and their log-probabilities (rows,) under the model itself: temperature 1, all tokens.
    """
    logits = logits.float()
    normaliser = torch.logsumexp(logits, dim=-1)
    greedy = temperatures == 0
    tokens = logits.argmax(dim=-1)
    if not bool(greedy.all()):
        divisors = torch.where(greedy, 1.0, temperatures)
        weights = logits - logits.gather(1, tokens[:, None])
        if not bool((divisors == 1).all()):
            weights /= divisors[:, None]
        weights.exp_()
        if bool((top_ps < 1).any()):
            weights = _nucleus(weights, top_ps)
        cumulative = weights.cumsum(dim=-1)
        total = cumulative[:, -1:]
        # below the total: rounding up to it would pick the last token of the vocabulary whatever its probability
        drawn = torch.minimum(uniforms[:, None].to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.where(greedy, tokens, torch.searchsorted(cumulative, drawn, right=True)[:, 0])
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - normaliser


def _nucleus(weights: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """`weights` (rows, vocabulary) with 0 outside each row's smallest set of at least `top_ps` of the mass."""
    wanted = top_ps[:, None] * weights.sum(dim=-1, keepdim=True)
    for count in (min(_NUCLEUS_FIRST, weights.shape[1]), weights.shape[1]):
        values, indices = weights.topk(count, dim=-1)
        before = values.cumsum(dim=-1) - values
        kept = (before < wanted) | (top_ps[:, None] >= 1)
        if not bool((kept[:, -1] & (top_ps < 1)).any()):
            break
    nucleus = torch.zeros_like(weights).scatter_(1, indices, values * kept)
    return torch.where(top_ps[:, None] >= 1, weights, nucleus)


@dataclass(eq=False)
class _Prompt(Request):
    """A generate() call."""

    ids: tuple[int, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    limit: int = 0  # tokens a sample may have
    seed: bytes = b""
    started: int = 0  # samples that have or had a row
    results: dict[int, Generation] = field(default_factory=dict)  # by sample index


@dataclass(eq=False)
class _Sample:
    """A row of the batch: one sample of a prompt on its way."""

    prompt: _Prompt
    index: int  # among the prompt's samples
    ids: list[int]  # prompt and generated ids; all but the last one have keys and values
    stream: TextStream
    uniforms: random.Random
    logprob: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.ids) - len(self.prompt.ids)


@dataclass(eq=False)
class _Batch:
    """The samples of one adapter: they share weights, keys and values."""

    rows: RowBuffer
    prefixes: PrefixCache
    samples: list[_Sample] = field(default_factory=list)


@dataclass(frozen=True)
class _Admitted:
    """A prompt that enters the batch: what is known of it, and how many of its samples start."""

    prompt: _Prompt
    match: Match
    samples: int


class HfPolicy(Engine[_Prompt]):
    """A causal language model as a policy.

    Args:
        model_path: Checkpoint folder or hub id.
        section: Engine settings; `cache_mib` bounds the kept prefixes; rows in work come on top.
        adapters: LoRA adapters by name, folders in PEFT's format; SamplingParams.adapter names one.
        seed: Of the samples. Together with the request's own seed, its prompt, and how often both were asked before.
    """

    def __init__(
        self, model_path: str, section: EngineSection, *, adapters: dict[str, str] | None = None, seed: int = 0
    ) -> None:
        super().__init__(section)
        self.tokenizer = load_tokenizer(model_path)
        self.encoder = SegmentEncoder(self.tokenizer)
        self.model_path = model_path
        self.model = load_model(AutoModelForCausalLM, model_path, section)
        self._packed = not adapters and pack_linears(self.model)
        self.max_context = max_context(self.model.config, section)
        self.seed = seed
        self._asked: dict[bytes, int] = {}
        self._queue: list[_Prompt] = []
        self._batches: dict[str | None, _Batch] = {}
        self._adapters: set[str] = set()
        self._ends = _end_ids(self.model, self.tokenizer)
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a LoRA adapter (PEFT format) under a name that SamplingParams.adapter can give; while idle only.

        Loading under a name that is taken replaces that adapter.
        """
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds no LoRA adapter", need="adapter_config.json and its weights")
        if self._packed:  # an adapter wraps plain layers
            self.model, self._packed = load_model(AutoModelForCausalLM, self.model_path, self.section), False
            self._batches.clear()
        if name in self._adapters:
            self.model.delete_adapter(name)
            self._batches.pop(name, None)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list the other adapters' weights as missing
        try:
            self.model.load_adapter(folder, adapter_name=name)
        finally:
            logging.set_verbosity(verbosity)
        self._adapters.add(name)

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """As Policy.generate; continuations may be shorter than `max_tokens` where the context ends."""
        if params.adapter is not None and params.adapter not in self._adapters:
            have = ", ".join(sorted(self._adapters)) or "none"
            raise UserError(f"adapter {params.adapter}", need=f"a loaded adapter ({have})", how="load_adapter first")
        ids = tuple(self.encoder.encode(prompt.segments))
        limit = min(params.max_tokens, self.max_context - len(ids))
        if limit < 1 or not ids:
            raise ContextOverflow.of(len(ids), self.max_context - 1)
        if params.n < 1:
            return []
        future = asyncio.get_running_loop().create_future()
        request = _Prompt(future=future, ids=ids, params=params, limit=limit, seed=self._request_seed(ids, params))
        results: list[Generation] = await self._submit(request)
        return results

    def _request_seed(self, ids: tuple[int, ...], params: SamplingParams) -> bytes:
        key = hashlib.blake2b(repr((self.seed, params.seed, params.adapter, ids)).encode(), digest_size=16).digest()
        if params.temperature > 0:  # asking again gives other samples; a greedy pass before does not change them
            self._asked[key] = self._asked.get(key, 0) + 1
        return key + self._asked.get(key, 0).to_bytes(4, "big")

    def _tick(self, new: Sequence[_Prompt]) -> list[tuple[_Prompt, Any]]:
        self._queue.extend(new)
        finished: list[tuple[_Prompt, Any]] = [(prompt, []) for prompt in self._queue if prompt.cancelled]
        self._queue = [prompt for prompt in self._queue if not prompt.cancelled]
        for batch in self._batches.values():
            for row in reversed(range(len(batch.samples))):
                if batch.samples[row].prompt.cancelled:
                    finished.append((self._drop(batch, row).prompt, []))
        for adapter in dict.fromkeys([*self._batches, *(prompt.params.adapter for prompt in self._queue)]):
            batch = self._batch(adapter)
            admitted = self._admit(adapter, batch)
            if batch.samples or admitted:
                self._select(adapter)
                for prompt in self._step(batch, admitted):
                    finished.append((prompt, [prompt.results[i] for i in range(prompt.params.n)]))
        return finished

    def _batch(self, adapter: str | None) -> _Batch:
        if adapter not in self._batches:
            rows, kept = memory_limits(self.section)
            self._batches[adapter] = _Batch(RowBuffer(self.model, rows), PrefixCache(kept))
        return self._batches[adapter]

    def _select(self, adapter: str | None) -> None:
        if self._adapters:
            if adapter is None:
                self.model.disable_adapters()
            else:
                self.model.enable_adapters()
                self.model.set_adapter(adapter)

    def _admit(self, adapter: str | None, batch: _Batch) -> list[_Admitted]:
        """Take from the queue what has room, in order, in rising order of the tokens to compute."""
        admitted: list[_Admitted] = []
        rows, budget = len(batch.samples), self.section.score_batch_tokens
        longest = max((len(s.prompt.ids) + s.prompt.limit for s in batch.samples), default=0)
        for prompt in [prompt for prompt in self._queue if prompt.params.adapter == adapter]:
            longest = max(longest, len(prompt.ids) + prompt.limit)
            room = self.section.max_batch - rows
            while room > 0 and not batch.rows.fits(rows + room, longest):
                room -= 1
            if room < 1 or budget <= 0:
                break
            match = batch.prefixes.match(prompt.ids[:-1])
            shared = max((common_prefix(prompt.ids, other.prompt.ids) for other in admitted), default=0)
            if shared > match.length + SHARED_WORTH_WAITING:
                continue  # next tick, when what they share is computed
            samples = min(room, prompt.params.n - prompt.started)
            admitted.append(_Admitted(prompt, match, samples))
            budget -= len(prompt.ids) - match.length
            rows += samples
            if prompt.started + samples == prompt.params.n:
                self._queue.remove(prompt)
        return sorted(admitted, key=lambda entry: len(entry.prompt.ids) - entry.match.length)

    def _step(self, batch: _Batch, admitted: Sequence[_Admitted]) -> list[_Prompt]:
        """One token for every sample, the first one for those of new prompts; returns the prompts that are done."""
        rows, old = batch.rows, len(batch.samples)
        for entry in admitted:
            rows.add(entry.match.pieces)
        suffixes = [sample.ids[length:] for sample, length in zip(batch.samples, rows.lengths, strict=False)]
        suffixes += [list(entry.prompt.ids[entry.match.length :]) for entry in admitted]
        output, _ = rows.forward(self.model, suffixes, logits_to_keep=0)
        self.usage.prompt_tokens += sum(map(len, suffixes[old:]))
        source = list(range(len(suffixes)))  # row of the logits that each sample draws from
        for row, entry in enumerate(admitted, start=old):
            batch.prefixes.insert(entry.prompt.ids, partial(rows.read, row))
            batch.samples.append(self._start(entry.prompt))
        for row, entry in enumerate(admitted, start=old):
            for _ in range(entry.samples - 1):
                rows.copy(row)
                batch.samples.append(self._start(entry.prompt))
                source.append(row)
        self._append_tokens(batch.samples, output.logits[0][source])
        return self._finish(batch)

    def _start(self, prompt: _Prompt) -> _Sample:
        index = prompt.started
        prompt.started += 1
        uniforms = random.Random(prompt.seed + index.to_bytes(4, "big"))
        return _Sample(prompt, index, list(prompt.ids), TextStream(self.tokenizer, prompt.ids), uniforms)

    def _append_tokens(self, samples: Sequence[_Sample], logits: torch.Tensor) -> None:
        params = [sample.prompt.params for sample in samples]
        device = logits.device
        tokens, logprobs = sample_tokens(
            logits,
            torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            torch.tensor([sample.uniforms.random() for sample in samples], dtype=torch.float64, device=device),
        )
        for sample, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            sample.ids.append(token)
            sample.logprob += logprob
        self.usage.generated_tokens += len(samples)

    def _finish(self, batch: _Batch) -> list[_Prompt]:
        done = []
        for row in reversed(range(len(batch.samples))):
            generation = self._ended(batch.samples[row])
            if generation is not None:
                sample = self._drop(batch, row)
                sample.prompt.results[sample.index] = generation
                if len(sample.prompt.results) == sample.prompt.params.n:
                    done.append(sample.prompt)
        return done

    def _ended(self, sample: _Sample) -> Generation | None:
        params, stream = sample.prompt.params, sample.stream
        before = len(stream.text)
        if sample.ids[-1] in self._ends:
            stream.finish()
            return Generation(stream.text, sample.tokens, sample.logprob, stop=None, cut_off=False)
        stream.push(sample.ids[-1])
        last = sample.tokens >= sample.prompt.limit
        if last:
            stream.finish()
        stop, end = _first_stop(stream.text, params.stop, before) or (None, len(stream.text))
        filled = filled_in(stream.text[:end], before) if params.calculator else None
        if filled is not None and not last:
            self._respell(sample, before, filled)
            return None
        if filled is not None:  # no room for the result
            stop, end = None, filled.rindex("=") + 1
        if stop is None and not last:
            return None
        return Generation(stream.text[:end], sample.tokens, sample.logprob, stop=stop, cut_off=stop is None)

    def _respell(self, sample: _Sample, known: int, text: str) -> None:
        """Let the sample's text be `text`: in place of its last token, which brought what is behind the first `known`
        characters, come tokens of ours. They go into the next forward pass; at least one token stays for the model."""
        del sample.ids[-1]
        stream = sample.stream = TextStream(self.tokenizer, sample.ids, sample.stream.text[:known])
        room = sample.prompt.limit - sample.tokens - 1
        for token in self.encoder.within(text[known:])[:room]:
            sample.ids.append(token)
            stream.push(token)

    def _drop(self, batch: _Batch, row: int) -> _Sample:
        """Take a sample out of the batch and keep its keys and values; the last sample takes its row."""
        sample = batch.samples[row]
        known = sample.ids[: batch.rows.lengths[row]]
        batch.prefixes.insert(known, partial(batch.rows.read, row))
        batch.rows.remove(row)
        batch.samples[row] = batch.samples[-1]
        batch.samples.pop()
        return sample

    def _abandon(self) -> None:
        self._queue.clear()
        self._batches.clear()

    def _release(self) -> None:
        self._abandon()
        self.model = None


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a sequence: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _first_stop(text: str, stops: Sequence[str], known: int) -> tuple[str, int] | None:
    """The stop string that ends first in `text` and where it ends; the first `known` characters hold none."""
    found = []
    for stop in stops:
        start = text.find(stop, max(0, known - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), stop))
    if not found:
        return None
    end, stop = min(found)
    return stop, end


@dataclass(eq=False)
class _Paths(Request):
    """A score() call."""

    ids: list[tuple[int, ...]] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)  # by index in ids


class HfScorer(Engine[_Paths]):
    """A sequence classifier with one output, or a verifier, as a scorer: its raw output at the last token, squashed.

    The last token is the last one of the ids, whatever the padding token is: the head is applied here, because stock
    classes look for the last token that is not padding and go wrong where padding and end token are the same.

    Args:
        model_path: Checkpoint folder; `rstar_score_scale` in its config is the squash's scale (5.0 where it is absent).
        section: Engine settings; `score_batch_tokens` bounds one forward pass.
    """

    def __init__(self, model_path: str, section: EngineSection) -> None:
        super().__init__(section)
        self.encoder = SegmentEncoder(load_tokenizer(model_path))
        head = value_head(model_path)
        self._end: tuple[int, ...] = ()
        if head is not None:
            self.model = load_model(AutoModelForCausalLM, model_path, section)
            self.model.score = _score_layer(self.model, head)
            self._end = (self.encoder.tokenizer.eos_token_id,)
        else:
            self.model = load_model(AutoModelForSequenceClassification, model_path, section)
        if head is None and (self.model.config.num_labels != 1 or not hasattr(self.model, "score")):
            raise UserError(
                f"{model_path} is a classifier of {self.model.config.num_labels} labels",
                need="num_labels=1 and a head named score",
                how="give a checkpoint of the PPM trainer",
            )
        self.max_context = max_context(self.model.config, section)
        self.scale = 1.0 if head is not None else float(getattr(self.model.config, "rstar_score_scale", 5.0))
        self.model.score.float()  # bfloat16 would leave some hundred different scores
        pack_linears(self.model.base_model)
        rows, kept = memory_limits(section)
        self._rows = RowBuffer(self.model, rows)
        self._prefixes = PrefixCache(kept)
        self._queue: list[tuple[_Paths, int]] = []

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        """As Scorer.score. Completions are segments after the prompt's; a verifier reads the end token behind them."""
        if not completions:
            return []
        ids = [(*self.encoder.encode((*prompt.segments, *completion)), *self._end) for completion in completions]
        longest = max(map(len, ids))
        if longest > self.max_context or min(map(len, ids)) < 1:
            raise ContextOverflow.of(longest, self.max_context)
        request = _Paths(future=asyncio.get_running_loop().create_future(), ids=ids)
        scores: list[float] = await self._submit(request)
        return scores

    def _tick(self, new: Sequence[_Paths]) -> list[tuple[_Paths, Any]]:
        self._queue.extend((request, i) for request in new for i in range(len(request.ids)))
        finished: dict[_Paths, Any] = {request: [] for request, _ in self._queue if request.cancelled}
        self._queue = [entry for entry in self._queue if not entry[0].cancelled]
        chosen = self._admit()
        if chosen:
            for _, _, match in chosen:
                self._rows.add(match.pieces)
            suffixes = [request.ids[i][match.length :] for request, i, match in chosen]
            output, last = self._rows.forward(self.model.base_model, suffixes)
            raw = self.model.score(output.last_hidden_state[0, last].float())[:, 0].tolist()
            for row, ((request, i, _), value) in enumerate(zip(chosen, raw, strict=True)):
                self._prefixes.insert(request.ids[i], partial(self._rows.read, row))
                request.scores[i] = squash(value, self.scale)
                if len(request.scores) == len(request.ids):
                    finished[request] = [request.scores[j] for j in range(len(request.ids))]
            self._rows.clear()
            self.usage.prompt_tokens += sum(map(len, suffixes))
            self.usage.scored += len(chosen)
        return list(finished.items())

    def _admit(self) -> list[tuple[_Paths, int, Match]]:
        """Take paths from the queue for one forward pass, in rising order of the tokens to compute."""
        chosen: list[tuple[_Paths, int, Match]] = []
        left: list[tuple[_Paths, int]] = []
        budget, longest = self.section.score_batch_tokens, 0
        for request, i in self._queue:
            ids = request.ids[i]
            match = self._prefixes.match(ids[:-1])
            shared = max((common_prefix(ids, other.ids[j]) for other, j, _ in chosen), default=0)
            longest = max(longest, len(ids))
            fits = len(ids) - match.length <= budget and self._rows.fits(len(chosen) + 1, longest)
            if chosen and (not fits or shared > match.length + SHARED_WORTH_WAITING):
                left.append((request, i))
                continue
            chosen.append((request, i, match))
            budget -= len(ids) - match.length
        self._queue = left
        return sorted(chosen, key=lambda entry: len(entry[0].ids[entry[1]]) - entry[2].length)

    def _abandon(self) -> None:
        self._queue.clear()
        self._rows.clear()
        self._prefixes.clear()

    def _release(self) -> None:
        self._abandon()
        self.model = None


def _score_layer(model: Any, head: ValueHead) -> torch.nn.Linear:
    """A verifier's 2 value - 1 as a layer over the last hidden states."""
    layer = torch.nn.Linear(model.config.hidden_size, 1, device=model.device)
    with torch.inference_mode():
        layer.weight.copy_(2 * head.gain * model.get_output_embeddings().weight[head.token])
        layer.bias.fill_(2 * head.bias - 1)
    return layer
