"""Training the process preference model (rStar-Math section 3.3), and its ablations PQM and ORM.

The PPM is the round's policy with a scalar head, a plain sequence classifier with one label. It is trained on the raw
logit; the score that is served is tanh(raw / scale), see rstar.engines.base.squash. PQM and ORM are the same model
under another loss: squared error to the Q-value of every step, cross-entropy of a whole solution's outcome.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rstar.config import PpmSection
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import MicroBatch, by_tree, micro_batches
from rstar.training.data import (
    EncodedRow,
    encode_outcome,
    encode_pair,
    encode_q_values,
    encode_rows,
    nothing_to_train,
    read_rows,
)
from rstar.training.launch import in_processes, must_launch
from rstar.training.loop import LossModule, TrainResult, memory_advice, metrics_path, no_progress, train
from rstar.training.losses import float32_scores, outcome_losses, pairwise_losses, q_losses
from rstar.training.models import autocast_dtype, load_ppm, transformers_model
from rstar.training.packing import FLEX_BLOCK
from rstar.types import OutcomeRow, PreferenceRow, QValueRow, TrainProgress, UserError

ScorerRow = PreferenceRow | QValueRow | OutcomeRow

CALIBRATION_BINS = 10
MIN_PROBLEMS_FOR_HELDOUT = 10
MEASURED_TRAIN_ROWS = 256  # enough for +-3 points, and little beside a round's training


@dataclass(frozen=True)
class PairMetrics:
    """How well scores order pairs: of a PPM the rows, else any two labels of a tree that differ.

    Shares in [0, 1]; a tie counts as half right. So PPM, PQM and ORM are measured alike.
    """

    pairs: int
    accuracy: float
    loss: float  # weighted mean of -log sigmoid(chosen - rejected), raw logits
    calibration_error: float  # |confidence - accuracy| in equal bins of sigmoid(|difference|), weighted by their pairs


@dataclass(frozen=True)
class PpmResult:
    """The run, and pair accuracy before and after it; None where there are no pairs, or no held-out problems."""

    training: TrainResult
    heldout_problems: int
    heldout_before: PairMetrics | None
    heldout_after: PairMetrics | None
    train_before: PairMetrics | None  # on a sample of the training rows
    train_after: PairMetrics | None


class ScoreLoss(LossModule):
    """Loss on the raw scores of paths, read at their last tokens."""

    def __init__(self, model: torch.nn.Module, section: PpmSection) -> None:
        super().__init__(model)
        self.section = section

    def scores(self, batch: MicroBatch) -> Tensor:
        """Raw logits (P,) at the batch's places, float32."""
        model = transformers_model(self.model)
        body = getattr(model, model.base_model_prefix)
        hidden = body(**self.inputs(batch)).last_hidden_state[0, batch.places]
        return float32_scores(hidden, model.score.weight)[:, 0]

    def forward(self, batch: MicroBatch, *, scores_only: bool = False) -> Tensor:
        """The loss; with `scores_only` the raw scores of the batch's places."""
        scores = self.scores(batch)
        if scores_only:
            return scores
        raw = scores[batch.which]
        match self.section.loss:
            case "pairwise":
                scale = self.section.score_scale if self.section.tanh_in_loss else 0.0
                losses = pairwise_losses(raw, scores[batch.other], tanh_scale=scale)
            case "mse":
                losses = q_losses(raw, batch.label, scale=self.section.score_scale)
            case _:
                losses = outcome_losses(raw, batch.label, scale=self.section.score_scale)
        return (batch.weight * losses).sum()


def row_kind(loss: str) -> type[ScorerRow]:
    """The rows that a loss of `ppm.loss` is trained on."""
    kinds: dict[str, type[ScorerRow]] = {"pairwise": PreferenceRow, "mse": QValueRow, "bce": OutcomeRow}
    if loss not in kinds:
        raise UserError(f"ppm.loss {loss!r}", need=", ".join(kinds))
    return kinds[loss]


def encoded_rows(rows: Sequence[ScorerRow], loss: str, encoder: SegmentEncoder, max_length: int) -> list[EncodedRow]:
    """Rows of one kind as the trainer sees them. Raises UserError for rows that are not the loss's."""
    kind = row_kind(loss)
    wrong = next((row for row in rows if not isinstance(row, kind)), None)
    if wrong is not None:
        raise UserError(f"ppm.loss={loss} with a {type(wrong).__name__}", need=f"rows of kind {kind.__name__}")
    encode = {PreferenceRow: encode_pair, QValueRow: encode_q_values, OutcomeRow: encode_outcome}[kind]
    return encode_rows(cast(Any, rows), cast(Any, encode), encoder, max_length)


def train_ppm(
    rows: Sequence[ScorerRow],
    body: str,
    output: Path,
    section: PpmSection,
    *,
    seed: int,
    on_progress: Callable[[TrainProgress], None] = no_progress,
) -> PpmResult:
    """Train a scorer from the policy `body` and write it to `output`; plain transformers and vLLM load it.

    `loss: pairwise` takes PreferenceRows (weighted mean of the pairs' losses, Eq. 4), `mse` QValueRows, `bce`
    OutcomeRows (a plain mean). Rows that are too long are dropped and counted (training.data). A share `heldout` of the
    problems (none below ten problems) is kept for pair accuracy. Raises UserError as `train_policy` does.
    """
    row_kind(section.loss)
    if not rows:
        raise nothing_to_train("pairs" if section.loss == "pairwise" else "labelled solutions")
    if must_launch(section):
        return in_processes(
            section, _one_process, {"rows": rows}, (body, output, section, seed), returns=PpmResult,
            metrics=metrics_path(output), on_progress=on_progress,
        )  # fmt: skip
    tokenizer = load_tokenizer(body)
    encoded = encoded_rows(rows, section.loss, SegmentEncoder(tokenizer), section.max_length)
    heldout = held_out_problems([row.problem_id for row in encoded], section.heldout, seed)
    train_rows = [row for row in encoded if row.problem_id not in heldout]
    heldout_rows = [row for row in encoded if row.problem_id in heldout]
    measured = sample_of_trees(train_rows, MEASURED_TRAIN_ROWS, seed)
    torch.manual_seed(seed)  # the new head
    loaded = load_ppm(body, section, tokenizer)
    module = ScoreLoss(loaded.model, section)
    if torch.cuda.is_available():
        module.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")

    def measure() -> tuple[PairMetrics | None, PairMetrics | None]:
        return pair_metrics(module, heldout_rows, section), pair_metrics(module, measured, section)

    with memory_advice(section):
        before = measure()
    after: list[tuple[PairMetrics | None, PairMetrics | None]] = []
    result = train(
        module, loaded, train_rows, section, output=output, seed=seed, on_progress=on_progress,
        before_saving=lambda: after.append(measure()),
    )  # fmt: skip
    result = replace(result, dropped=len(rows) - len(encoded))
    return PpmResult(result, len(heldout), before[0], after[0][0], before[1], after[0][1])


def _one_process(rows: Path, body: str, output: Path, section: PpmSection, seed: int) -> PpmResult:
    found: Any = read_rows(rows, row_kind(section.loss))
    return train_ppm(found, body, output, section, seed=seed)


def held_out_problems(problem_ids: Sequence[str], share: float, seed: int) -> set[str]:
    """A random `share` of the distinct problems, at least one; none where there are fewer than ten."""
    problems = sorted(set(problem_ids))
    if share <= 0 or len(problems) < MIN_PROBLEMS_FOR_HELDOUT:
        return set()
    count = max(1, round(share * len(problems)))
    return set(np.random.default_rng(seed).permutation(problems)[:count].tolist())


def sample_of_trees(rows: Sequence[EncodedRow], count: int, seed: int) -> list[EncodedRow]:
    """About `count` rows of randomly chosen trees, whole as long as they fit; all rows where there are no more."""
    trees = by_tree(rows)
    chosen: list[EncodedRow] = []
    for name in np.random.default_rng(seed).permutation(sorted(trees)):
        chosen += trees[str(name)]
    return chosen[:count]


@torch.no_grad()
def pair_metrics(module: ScoreLoss, rows: Sequence[EncodedRow], section: PpmSection) -> PairMetrics | None:
    """Pair accuracy, loss and calibration of the raw scores, in training's dtype; None without pairs."""
    training = module.training
    module.eval()
    device = next(module.parameters()).device
    multiple_of = FLEX_BLOCK if device.type == "cuda" else 1
    dtype = autocast_dtype(section)
    half = torch.autocast(device.type, dtype) if dtype is not torch.float32 else nullcontext()
    differences, weights = [np.zeros(0)], [np.zeros(0)]
    for group in [rows] if section.loss == "pairwise" else by_tree(rows).values():
        scores, labels = [], []
        for batch in micro_batches(group, section.micro_batch_tokens, tree_packing=True, multiple_of=multiple_of)[0]:
            on_device = batch.to(device)
            with half:  # after training the module has an autocast of its own, before it none
                raw = module(on_device, scores_only=True).double().cpu().numpy()
            if section.loss == "pairwise":
                differences.append(raw[batch.which.numpy()] - raw[batch.other.numpy()])
                weights.append(batch.weight.numpy())
            else:
                scores.append(raw[batch.which.numpy()])
                labels.append(batch.label.numpy())
        if scores:
            score, label = np.concatenate(scores), np.concatenate(labels)
            better, worse = np.nonzero(label[:, None] > label[None, :])
            differences.append(score[better] - score[worse])
            weights.append(np.ones(len(better)))
    module.train(training)
    difference, weight = np.concatenate(differences), np.concatenate(weights)
    if not len(difference):
        return None
    right = np.where(difference == 0, 0.5, difference > 0)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs((confidence[bins == b] - right[bins == b]).sum()) for b in range(CALIBRATION_BINS)]
    return PairMetrics(
        pairs=len(right),
        accuracy=float(right.mean()),
        loss=float((weight * np.logaddexp(0, -difference)).sum() / weight.sum()),
        calibration_error=float(sum(gaps) / len(right)),
    )
