"""The toy model of the tests; the builder itself is shipped, because `model.base: tiny` needs it too."""

from __future__ import annotations

from pathlib import Path

from rstar.training.tiny import build_tiny_model


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A folder with a tiny Llama and its tokenizer (chat template, distinct bos, eos and pad)."""
    return build_tiny_model(folder, seed=seed)
