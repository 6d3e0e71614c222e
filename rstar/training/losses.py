"""The losses, as functions of tensors. Weights come normalised: summed over an optimizer batch they give its loss.

Shapes: N terms of the loss, P places whose logits were computed, V words of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def float32_scores(hidden_NC: Tensor, head_KC: Tensor) -> Tensor:
    """A linear head in float32, under autocast too: bfloat16 would leave some hundred different scores.

    For a head in FSDP's root unit, which is whole wherever the loss runs; no hook of the head's own is called.
    """
    with torch.autocast(hidden_NC.device.type, enabled=False):
        return functional.linear(hidden_NC.float(), head_KC.float())


def token_loss(logits_PV: Tensor, which_N: Tensor, target_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted cross-entropy, sum_i weight_i * -log softmax(logits[which_i])[target_i]; in float32.

    A place is read by several terms where a tree branches after it. Its normaliser is taken once, with the sum of their
    weights; no index pair occurs twice, so the backward pass adds in a fixed order.
    """
    logits_PV = logits_PV.float()
    weight_P = torch.zeros(len(logits_PV), device=logits_PV.device).index_add_(0, which_N, weight_N)
    return (weight_P * logits_PV.logsumexp(dim=-1)).sum() - (weight_N * logits_PV[which_N, target_N]).sum()


def pairwise_losses(chosen_N: Tensor, rejected_N: Tensor, *, tanh_scale: float = 0.0) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)) for each pair (rStar-Math Eq. 4).

    r is the raw logit, as in the official code; with `tanh_scale` it is tanh(logit / tanh_scale), as in the paper.
    """
    if tanh_scale:
        chosen_N, rejected_N = torch.tanh(chosen_N / tanh_scale), torch.tanh(rejected_N / tanh_scale)
    return functional.softplus(rejected_N - chosen_N)


def q_losses(raw_N: Tensor, label_N: Tensor, *, scale: float) -> Tensor:
    """Squared error between the served score tanh(raw / scale) and a Q-value in [-1, 1] (the paper's PQM)."""
    return (torch.tanh(raw_N / scale) - label_N) ** 2


def outcome_losses(raw_N: Tensor, label_N: Tensor, *, scale: float) -> Tensor:
    """Binary cross-entropy of a label in [0, 1] (the paper's ORM; soft labels allowed).

    The probability is sigmoid(2 raw / scale) = (1 + tanh(raw / scale)) / 2, so the served score is 2p - 1.
    """
    return functional.binary_cross_entropy_with_logits(2 * raw_N / scale, label_N, reduction="none")
