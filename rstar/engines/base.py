"""The two engine protocols. The search submits and awaits; batching is the engine's own business."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rstar.types import Generation, PromptText, SamplingParams, UserError


class EngineError(RuntimeError):
    """The engine itself failed (died, out of memory, unreachable): an infrastructure failure, never a model's fault."""


class ContextOverflow(UserError):
    """A prompt or a path that is longer than the model's context. It fails alone: a search goes on without it."""

    @classmethod
    def of(cls, tokens: int, limit: int) -> ContextOverflow:
        """The error of an engine that knows both numbers."""
        return cls(
            f"{tokens} tokens",
            need=f"1 to {limit} (engine.max_context and the model's own)",
            how="raise engine.max_context, or lower search.max_depth or search.max_step_tokens",
        )


class Policy(Protocol):
    """Writes continuations."""

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """Return `params.n` samples of a continuation of `prompt`, in no promised order of quality.

        Raises EngineError when the engine failed, ContextOverflow when the prompt leaves no room in the context.
        """
        ...

    async def close(self) -> None:
        """Give back memory and processes. Idempotent."""
        ...


class Scorer(Protocol):
    """Scores paths: the process preference model, or a verifier."""

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        """Score each `prompt + completion` at the completion's last token; squashed to [-1, 1] (see squash).

        A completion is a sequence of one or more segments, tokenised as in PromptText (never one bare string). Raises
        as Policy.generate.
        """
        ...

    async def close(self) -> None:
        """Give back memory and processes. Idempotent."""
        ...


def squash(raw: float, scale: float) -> float:
    """Map a raw PPM logit to [-1, 1]: tanh(raw / scale). The one place where the squash stands.

    The paper has tanh in the head (rStar-Math section 3.3); the official code trains on the raw logit and scores with
    tanh(raw / 5). `scale` is stored with each checkpoint (config key `rstar_score_scale`). Raises UserError for NaN: it
    would outlive its search in the trees.
    """
    if math.isnan(raw):
        raise UserError(
            "the PPM gave NaN for a score", need="finite scores", how="engine.dtype=float32 or bfloat16, or another PPM"
        )
    return math.tanh(raw / scale)


def native_bf16() -> bool:
    """Whether this CPU computes in bfloat16; where it has no such instructions, emulation is slower than float32."""
    import torch

    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


VALUE_HEAD_KEY = "rstar_value_head"  # of a verifier's config.json


@dataclass(frozen=True)
class ValueHead:
    """An outcome verifier's head (Cobbe et al. 2021, appendix E): value = gain * logit of `token` + bias.

    The value estimates the chance that a solution ends in the right answer; it is not bounded. The end token closes the
    solution, and the value after it is the score: 2 value - 1, squashed with scale 1, which keeps every order.
    """

    token: int
    gain: float
    bias: float


def value_head(model_path: str) -> ValueHead | None:
    """The head of the verifier in a checkpoint folder; None for any other checkpoint."""
    config = Path(model_path) / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get(VALUE_HEAD_KEY) if config.is_file() else None
    return ValueHead(**found) if found is not None else None
