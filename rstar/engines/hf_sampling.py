"""One token per row from logits: temperature, top-p, and the token's own log-probability."""

from __future__ import annotations

import torch

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
