"""Step delimiters as tokens of their own, for base models whose tokenizer spells them in many pieces.

SmolLM2 spells `<end_of_step>` and its line break with 8 tokens; a solution of three steps spends some 50 tokens on
delimiters. As added tokens they cost one each, in generation and in training. They are ordinary, not special, tokens:
decoding shows them, so stop strings and stock tools see the same text as without them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from transformers import AddedToken, AutoModelForCausalLM

from rstar.prompts import STEP_TOKENS
from rstar.tokens import load_tokenizer
from rstar.training.models import save_model


def with_step_tokens(base: str, output: Path) -> Path:
    """Write a copy of `base` that has STEP_TOKENS in its vocabulary; returns `output`.

    A new token starts as a mean of the embeddings of the pieces that spelled it, weighted by 1 / (delimiters that share
    the piece)^2. With a plain mean `<end_of_step>` and `<end_of_code>` start as good as equal, and a short warm-up does
    not tell them apart.
    """
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pieces = {text: tokenizer.encode(text, add_special_tokens=False) for text in STEP_TOKENS}
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in STEP_TOKENS])
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shared = Counter(piece for ids in pieces.values() for piece in set(ids))
    with torch.no_grad():
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
        for text, ids in pieces.items():
            (new,) = tokenizer.encode(text, add_special_tokens=False)
            weights = torch.tensor([1.0 / shared[piece] ** 2 for piece in ids])[:, None]
            for table in tables:
                table[new] = (weights * table[ids]).sum(dim=0) / weights.sum()
    save_model(model, tokenizer, output)
    return output
