"""Supervised fine-tuning of the policy on the model's own tokens (rStar-Math section 3.4, appendix A.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rstar.config import TrainSection
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import MicroBatch
from rstar.training.data import encode_rows, encode_sft, nothing_to_train, read_rows
from rstar.training.launch import in_processes, must_launch
from rstar.training.loop import LossModule, TrainResult, metrics_path, no_progress, train
from rstar.training.losses import token_loss
from rstar.training.models import load_policy, transformers_model
from rstar.types import SftRow, TrainProgress


class TokenLoss(LossModule):
    """Cross-entropy, a weighted mean over all target tokens of the optimizer batch."""

    def forward(self, batch: MicroBatch) -> Tensor:
        model = transformers_model(self.model)
        logits = model(**self.inputs(batch), logits_to_keep=batch.places).logits[0]  # (P, V): no others are computed
        return token_loss(logits, batch.which, batch.other, batch.weight)


def train_policy(
    rows: Sequence[SftRow],
    base: str,
    output: Path,
    section: TrainSection,
    *,
    seed: int,
    on_progress: Callable[[TrainProgress], None] = no_progress,
) -> TrainResult:
    """Fine-tune `base` (a folder or hub id) on `rows` and write a plain checkpoint with its tokenizer to `output`.

    The loss is the mean over an optimizer batch's target tokens, each times its row's weight: the model's own segments,
    and the end token after a solution that ends with one. Rows whose question does not fit are dropped and counted
    (training.data). Raises UserError for empty rows (before the model is loaded), a loss that is not finite (naming the
    rows), and a GPU out of memory.
    """
    if not rows:
        raise nothing_to_train("solutions")
    if must_launch(section):
        return in_processes(
            section, _one_process, {"rows": rows}, (base, output, section, seed), returns=TrainResult,
            metrics=metrics_path(output), on_progress=on_progress,
        )  # fmt: skip
    tokenizer = load_tokenizer(base)
    encoded = encode_rows(rows, encode_sft, SegmentEncoder(tokenizer), section.max_length)
    torch.manual_seed(seed)  # the adapters' first weights
    loaded = load_policy(base, section, tokenizer)
    module = TokenLoss(loaded.model)
    result = train(module, loaded, encoded, section, output=output, seed=seed, on_progress=on_progress)
    return replace(result, dropped=len(rows) - len(encoded))


def _one_process(rows: Path, base: str, output: Path, section: TrainSection, seed: int) -> TrainResult:
    return train_policy(read_rows(rows, SftRow), base, output, section, seed=seed)
