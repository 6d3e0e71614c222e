"""The embedded scorer: a preference model or an outcome verifier in this process, on transformers.

A tick is one forward pass over the paths that wait; what they share is computed once and kept, as in hf.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rstar.config import EngineSection
from rstar.engines.base import ContextOverflow, ValueHead, squash, value_head
from rstar.engines.hf_loop import Engine, Request, load_model, max_context, memory_limits
from rstar.engines.hf_packed import pack_linears
from rstar.engines.hf_prefix import SHARED_WORTH_WAITING, Match, PrefixCache, common_prefix
from rstar.engines.hf_rows import RowBuffer
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.types import PromptText, UserError


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
