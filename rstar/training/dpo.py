"""Direct preference optimisation of LoRA adapters on one base, step by step (Flow-DPO, arXiv 2410.22304, sec. 3).

The adapters share a frozen base, which is also the reference: no second model. A step touches one adapter and its own
optimizer. Chosen and rejected completions are packed behind their shared prompt (training.packing).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from rstar.config import DpoSection, TrainSection
from rstar.store import complete_or_absent
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.data import too_long
from rstar.training.losses import pairwise_losses
from rstar.training.models import autocast_dtype, load_policy, transformers_model
from rstar.training.packing import FLEX_BLOCK, Ids, TreeAttention, pack
from rstar.types import PreferenceRow, UserError

OPTIMIZERS = "optimizers.pt"


@dataclass(frozen=True)
class Pair:
    """Token paths of a row: its completions begin at `start`."""

    chosen: Ids
    rejected: Ids
    start: int

    @property
    def tokens(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.start


@dataclass(frozen=True)
class DpoStep:
    """One optimizer step of an adapter, with the figures before it. `margin`: mean reward(chosen) - reward(rejected),
    in nats, reward = beta (log pi - log pi_ref); `accuracy`: share of pairs with a positive margin."""

    adapter: str
    step: int  # of this adapter, from 1
    pairs: int
    loss: float
    margin: float
    accuracy: float
    grad_norm: float
    tokens: int
    seconds: float
    dropped: int = 0  # pairs that were left out: longer than dpo.max_length


@dataclass(frozen=True)
class Margins:
    """Mean figures of pairs under an adapter; as in DpoStep."""

    pairs: int
    loss: float
    margin: float
    accuracy: float
    chosen: float  # mean log pi(chosen), in nats
    rejected: float


def encode_pair(row: PreferenceRow, encoder: SegmentEncoder, max_length: int) -> Pair | None:
    """Both completions behind the prompt; where an output ended by itself, the end token belongs to it.

    None where one is over `max_length`: neither a part of the question nor the end of an output may be missing.
    """
    prompt = row.prompt_segments or (row.prompt,)
    end = encoder.tokenizer.eos_token_id

    def path(segments: tuple[str, ...], ends: bool) -> list[int]:
        return encoder.encode((*prompt, *segments)) + [end] * ends

    chosen = path(row.chosen_segments or (row.chosen,), row.chosen_ends)
    rejected = path(row.rejected_segments or (row.rejected,), row.rejected_ends)
    if max(len(chosen), len(rejected)) > max_length:
        return None
    return Pair(np.array(chosen), np.array(rejected), len(encoder.encode(prompt)))


def dpo_losses(chosen_N: Tensor, rejected_N: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) (Rafailov et al. 2023, Eq. 7); both are log pi - log pi_ref, in nats."""
    return pairwise_losses(beta * chosen_N, beta * rejected_N)


class AdapterTrainer:
    """LoRA adapters by name on one base model, each with its own Adam.

    Args:
        base: Folder or hub id of a causal language model.
        adapters: Their names.
        section: Hyper-parameters, the same for all.
        seed: Of the adapters' first weights and of dropout.
    """

    def __init__(self, base: str, adapters: Sequence[str], section: DpoSection, *, seed: int) -> None:
        gpus = torch.cuda.device_count()  # the last one: an engine on the first is left alone
        self.device = torch.device(f"cuda:{gpus - 1}" if gpus else "cpu")
        self.section, self.seed = section, seed
        self.encoder = SegmentEncoder(load_tokenizer(base))
        loaded = load_policy(base, TrainSection(), self.encoder.tokenizer)
        config = LoraConfig(
            r=section.lora_rank, lora_alpha=section.lora_alpha, lora_dropout=section.lora_dropout,
            target_modules="all-linear", task_type="CAUSAL_LM",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(cast(Any, loaded.model), config, adapter_name=adapters[0])
            for name in adapters[1:]:
                self.model.add_adapter(name, config)
        self.model.to(self.device)
        self.steps = dict.fromkeys(adapters, 0)
        self.optimizers = {name: torch.optim.Adam(self.parameters(name), lr=section.learning_rate) for name in adapters}

    def parameters(self, adapter: str) -> list[nn.Parameter]:
        """The parameters of one adapter."""
        found = [value for name, value in self.model.named_parameters() if f".{adapter}." in name and "lora_" in name]
        return [value.requires_grad_() for value in found]

    def step(self, adapter: str, rows: Sequence[PreferenceRow]) -> DpoStep:
        """One optimizer step of `adapter` on the mean loss of the `rows` that fit.

        Raises UserError where none fits, or the loss is not finite.
        """
        began, section = time.monotonic(), self.section
        pairs = self._encode(rows)
        optimizer = self.optimizers[adapter]
        optimizer.zero_grad(set_to_none=True)
        losses, margins = list[float](), list[float]()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed + 1 + sum(self.steps.values()))  # dropout is a function of the step alone
            for part in self._micro_batches(pairs):
                reference = self._reference(part)
                log_ratio = self._logprobs(part, adapter, training=True) - reference
                loss = dpo_losses(log_ratio[:, 0], log_ratio[:, 1], beta=section.beta)
                (loss.sum() / len(pairs)).backward()  # type: ignore[no-untyped-call]
                losses += loss.tolist()
                margins += (section.beta * (log_ratio[:, 0] - log_ratio[:, 1])).tolist()
        if not np.isfinite(losses).all():
            raise UserError(f"the DPO loss of {adapter} became {np.mean(losses)}", how="lower dpo.learning_rate")
        norm = nn.utils.clip_grad_norm_(self.parameters(adapter), section.max_grad_norm)
        optimizer.step()
        self.steps[adapter] += 1
        return DpoStep(
            adapter, self.steps[adapter], len(pairs), float(np.mean(losses)), float(np.mean(margins)),
            float(np.mean(np.array(margins) > 0)), float(norm), sum(pair.tokens for pair in pairs),
            round(time.monotonic() - began, 3), len(rows) - len(pairs),
        )  # fmt: skip

    @torch.no_grad()
    def margins(self, adapter: str, rows: Sequence[PreferenceRow]) -> Margins:
        """How `adapter` tells the rows' completions apart, without dropout."""
        pairs = self._encode(rows)
        parts = list(self._micro_batches(pairs))
        logprobs = torch.cat([self._logprobs(part, adapter) for part in parts])
        log_ratio = logprobs - torch.cat([self._reference(part) for part in parts])
        margins = self.section.beta * (log_ratio[:, 0] - log_ratio[:, 1])
        loss = dpo_losses(log_ratio[:, 0], log_ratio[:, 1], beta=self.section.beta)
        chosen, rejected = logprobs.mean(0).tolist()
        return Margins(
            len(pairs), float(loss.mean()), float(margins.mean()), float((margins > 0).float().mean()), chosen, rejected
        )

    @torch.no_grad()
    def logprobs(self, adapter: str | None, rows: Sequence[PreferenceRow]) -> list[tuple[float, float]]:
        """(log pi(chosen), log pi(rejected)) of each row that fits, without dropout; None is the reference."""
        parts = list(self._micro_batches(self._encode(rows)))
        found = [self._reference(p) if adapter is None else self._logprobs(p, adapter) for p in parts]
        return [(chosen, rejected) for chosen, rejected in torch.cat(found).tolist()]

    def save(self, folder: Path) -> None:
        """Write adapters (a folder each, in PEFT's format) and optimizers, complete or not at all."""
        with complete_or_absent(folder) as temporary:
            self.model.save_pretrained(temporary, selected_adapters=list(self.steps), save_embedding_layers=False)
            (temporary / "README.md").unlink(missing_ok=True)
            for name in self.steps:
                (temporary / name / "README.md").unlink(missing_ok=True)
            states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            torch.save({"steps": self.steps, "optimizers": states}, temporary / OPTIMIZERS)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(folder / OPTIMIZERS, map_location=self.device, weights_only=True)
        self.steps = state["steps"]
        for name, optimizer in self.optimizers.items():
            weights = load_file(folder / name / "adapter_model.safetensors", device=str(self.device))
            set_peft_model_state_dict(self.model, weights, adapter_name=name)
            optimizer.load_state_dict(state["optimizers"][name])

    def _encode(self, rows: Sequence[PreferenceRow]) -> list[Pair]:
        limit = self.section.max_length
        pairs = [pair for row in rows if (pair := encode_pair(row, self.encoder, limit)) is not None]
        if not pairs:
            raise too_long(len(rows), limit, "dpo.max_length")
        return pairs

    def _micro_batches(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """In order, as many pairs as fit into the budget; one pair always does."""
        part, used = list[Pair](), 0
        for pair in pairs:
            if part and used + pair.tokens > self.section.micro_batch_tokens:
                yield part
                part, used = [], 0
            part.append(pair)
            used += pair.tokens
        if part:
            yield part

    def _reference(self, pairs: Sequence[Pair]) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            return self._forward(pairs, training=False)

    def _logprobs(self, pairs: Sequence[Pair], adapter: str, *, training: bool = False) -> Tensor:
        self.model.set_adapter(adapter)
        return self._forward(pairs, training=training)

    def _forward(self, pairs: Sequence[Pair], *, training: bool) -> Tensor:
        """(pairs, 2) sums of the completions' log-probabilities under the active adapter, float32."""
        flex = self.device.type == "cuda"
        packed = pack([[p.chosen, p.rejected] for p in pairs], multiple_of=FLEX_BLOCK if flex else 1)
        places = [
            (path[p.start - 1 : -1], path[p.start :])
            for p, both in zip(pairs, packed.where, strict=False)
            for path in both
        ]
        before, index = np.unique(np.concatenate([b for b, _ in places]), return_inverse=True)
        owner = np.repeat(np.arange(len(places)), [len(b) for b, _ in places])
        targets = packed.ids[np.concatenate([t for _, t in places])]

        def tensor(array: Ids) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        dtype = autocast_dtype(TrainSection(dtype=self.section.dtype))
        self.model.train(training)
        half = torch.autocast(self.device.type, dtype) if dtype is not torch.float32 else nullcontext()
        with half:
            logits = transformers_model(self.model)(
                input_ids=tensor(packed.ids)[None], position_ids=tensor(packed.depth)[None],
                tree=TreeAttention.of(packed, self.device), use_cache=False, logits_to_keep=tensor(before),
            ).logits[0].float()  # fmt: skip
        normaliser, which = logits.logsumexp(-1), tensor(index)
        logprobs = logits[which, tensor(targets)] - normaliser[which]
        sums = torch.zeros(len(places), device=self.device).index_add(0, tensor(owner), logprobs)
        return sums.view(-1, 2)
