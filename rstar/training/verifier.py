"""Training an outcome verifier (Cobbe et al. 2021, sections 4.2-4.3, appendix E).

A verifier is a language model whose logit of one reserved token, times a gain plus a bias, is a value: how likely the
solution so far ends in the right answer. It is trained by squared error to the outcome, at every token of a solution
or at its last one, and goes on learning to write the reference solutions. What is saved is a plain language model;
gain, bias and the token's id stand in its config.json (rstar.engines.base.ValueHead).

The completions of a problem and its reference solution share their prompt: with tree packing it is computed once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rstar.config import VerifierSection
from rstar.engines.base import VALUE_HEAD_KEY, ValueHead
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import MicroBatch
from rstar.training.data import EncodedRow, encode_sft, nothing_to_train, read_rows, too_long
from rstar.training.launch import in_processes, must_launch
from rstar.training.loop import LossModule, TrainResult, metrics_path, no_progress, train
from rstar.training.losses import float32_scores, token_loss
from rstar.training.models import HEAD_INIT_STD, load_policy, spare_token, transformers_model
from rstar.types import OutcomeRow, SftRow, TrainProgress, UserError

LEVELS = ("token", "solution")


@dataclass(frozen=True)
class VerifierResult:
    """The run and the head that it ended with."""

    training: TrainResult
    labelled: int  # distinct labelled solutions
    correct: float  # share of the samples behind them that are correct
    head: dict[str, float]


class ValueLoss(LossModule):
    """Squared error of the values plus `lm_weight` times the language model's loss, each a mean over its own tokens."""

    def __init__(self, model: nn.Module, token: int, bias: float, lm_weight: float) -> None:
        super().__init__(model)
        self.token, self.lm_weight = token, lm_weight
        self.gain, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), bias))

    def values(self, hidden: Tensor) -> Tensor:
        """Values (N,) after the tokens whose last hidden states (N, width) are given, float32."""
        row = transformers_model(self.model).get_output_embeddings().weight[self.token]
        return self.gain * float32_scores(hidden, row) + self.bias

    def forward(self, batch: MicroBatch) -> Tensor:
        model = transformers_model(self.model)
        hidden = getattr(model, model.base_model_prefix)(**self.inputs(batch)).last_hidden_state[0, batch.places]
        words, scores = slice(batch.token_terms), slice(batch.token_terms, None)
        value_loss = value_losses(self.values(hidden[batch.which[scores]]), batch.label[scores]) @ batch.weight[scores]
        read, which = torch.unique(batch.which[words], return_inverse=True)
        logits = model.get_output_embeddings()(hidden[read]).float()
        reserved = torch.arange(logits.shape[-1], device=logits.device) == self.token
        logits = logits.masked_fill(reserved, float("-inf"))  # the other logits alone are the language model
        return value_loss + self.lm_weight * token_loss(logits, which, batch.other[words], batch.weight[words])

    def head(self) -> ValueHead:
        """The head as it is now."""
        gain, bias = (
            float(cast(Any, p).full_tensor() if hasattr(p, "full_tensor") else p.detach())
            for p in (self.gain, self.bias)
        )
        return ValueHead(self.token, gain, bias)


def value_losses(values_N: Tensor, label_N: Tensor) -> Tensor:
    """Squared errors (N,) of values against outcomes 0 or 1; no sigmoid stands between (none is reported)."""
    return (values_N - label_N) ** 2


def train_verifier(
    outcomes: Sequence[OutcomeRow],
    references: Sequence[SftRow],
    body: str,
    output: Path,
    section: VerifierSection,
    *,
    seed: int,
    on_progress: Callable[[TrainProgress], None] = no_progress,
) -> VerifierResult:
    """Train a verifier from the language model `body` (the generator, or any other) and write it to `output`.

    Args:
        outcomes: Labelled completions; a row's weight is the number of samples that were exactly this.
        references: Reference solutions, for the language-model loss; used where their problem has completions.
        section: `level`, `lm_weight` (0: values only) and `dropout`; a `batch_size` counts completions and as many
            copies of their problems' reference solutions.

    Raises:
        UserError: nothing to train on, or as `train_policy` does.
    """
    if section.level not in LEVELS:
        raise UserError(f"verifier.level={section.level}", need="token or solution")
    if not outcomes:
        raise nothing_to_train("labelled solutions")
    if must_launch(section):
        return in_processes(
            section, _one_process, {"outcomes": outcomes, "references": references}, (body, output, section, seed),
            returns=VerifierResult, metrics=metrics_path(output), on_progress=on_progress,
        )  # fmt: skip
    tokenizer = load_tokenizer(body)
    rows = verifier_rows(outcomes, references if section.lm_weight else (), SegmentEncoder(tokenizer), section)
    torch.manual_seed(seed)
    samples = sum(row.weight for row in outcomes)
    correct = sum(row.weight * row.label for row in outcomes) / samples
    loaded = load_policy(body, section, tokenizer)
    model = transformers_model(loaded.model)
    token = reserve_token(model, tokenizer)
    with suppress(AttributeError):  # a verifier that is trained on starts as a language model
        delattr(model.config, VALUE_HEAD_KEY)
    module = ValueLoss(loaded.model, token, correct, section.lm_weight)
    if torch.cuda.is_available():
        module.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")

    def keep_head() -> None:
        setattr(model.config, VALUE_HEAD_KEY, asdict(module.head()))

    result = train(
        module, loaded, rows, section, output=output, seed=seed, on_progress=on_progress, before_saving=keep_head
    )
    labelled = sum(len(row.scored) > 0 for row in rows)
    return VerifierResult(replace(result, dropped=len(outcomes) - labelled), labelled, correct, asdict(module.head()))


def _one_process(
    outcomes: Path, references: Path, body: str, output: Path, section: VerifierSection, seed: int
) -> VerifierResult:
    rows, solutions = read_rows(outcomes, OutcomeRow), read_rows(references, SftRow)
    return train_verifier(rows, solutions, body, output, section, seed=seed)


def verifier_rows(
    outcomes: Sequence[OutcomeRow], references: Sequence[SftRow], encoder: SegmentEncoder, section: VerifierSection
) -> list[EncodedRow]:
    """Each labelled completion, followed by its problem's reference solution with the same weight (1:1 mix).

    The question carries no loss. The end token belongs to a solution: the value after it is the final one. The copies
    of a reference are rows of its problem's tree, so that they cost one. A completion that is too long is cut off at
    its right end (training.data); with `level: solution`, where only its end would be scored, it is dropped.
    """
    limit = section.max_length
    written = {row.problem_id: path for row in references if (path := encode_sft(row, encoder, limit)) is not None}

    def encoded() -> Iterator[EncodedRow]:
        for row in outcomes:
            solution = encode_sft(row, encoder, limit)
            if solution is None or (solution.truncated and section.level == "solution"):
                continue
            places = np.flatnonzero(solution.trained)
            places = places if section.level == "token" else places[-1:]
            yield replace(
                solution, trained=np.zeros(0, dtype=np.bool_), scored=places, labels=np.full(len(places), row.label)
            )
            if row.problem_id in written:
                yield replace(written[row.problem_id], tree_id=row.tree_id, weight=row.weight)

    rows = list(encoded())
    if not rows:
        raise too_long(len(outcomes), limit)
    return rows


def reserve_token(model: Any, tokenizer: Any) -> int:
    """Id of a special token that no text holds, its logit close to 0: a spare one, else a new one.

    A logit that means something else already would start the values far from their range.
    """
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    name = spare_token(tokenizer, used)
    if name is None:
        name = "<|value|>"
        tokenizer.add_tokens([name], special_tokens=True)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    token = int(tokenizer.convert_tokens_to_ids(name))
    nn.init.normal_(model.get_output_embeddings().weight.data[token], std=HEAD_INIT_STD)
    return token
