"""The embedded policy: transformers in this process, starts in seconds, CPU or CUDA. Its scorer is in hf_scorer.py.

Continuous batching: every tick is one forward pass in which running samples get their next token and new prompts are
read in. The keys and values of prompts and finished samples are kept in a tree by token ids (PrefixCache), so a step's
prompt, which is its parent's prompt and the parent's step, is mostly there already. A prompt with n samples is read
once.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from rstar.calculator import filled_in
from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow
from rstar.engines.hf_loop import Engine, Request, load_model, max_context, memory_limits
from rstar.engines.hf_packed import pack_linears
from rstar.engines.hf_prefix import SHARED_WORTH_WAITING, Match, PrefixCache, common_prefix
from rstar.engines.hf_rows import RowBuffer
from rstar.engines.hf_sampling import sample_tokens
from rstar.tokens import SegmentEncoder, TextStream, load_tokenizer
from rstar.types import Generation, PromptText, SamplingParams, UserError


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
        self._asked[key] = self._asked.get(key, 0) + 1  # asking again gives other samples
        return key + self._asked[key].to_bytes(4, "big")

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
