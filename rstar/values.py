"""What a setting may be beside its type: one of some words, or a number from a least one on.

A wrong word would otherwise be found by the stage that reads it, hours later, or stand for a default without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rstar.types import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "EngineSection.kind": ("hf", "vllm", "openai", "simulated"),
    "EngineSection.dtype": ("auto", "float32", "bfloat16", "float16"),
    "WarmupSection.source": ("families", "pool", "gsm8k"),
    "SearchSection.method": ("mcts", "beam", "dvts", "sample", "flow"),
    "SearchSection.form": ("steps", "text", "stated"),
    "SearchSection.selection": ("uct", "puct"),
    "ExtractSection.sft_by": ("mean_q", "random"),
    "TrainSection.schedule": ("linear", "cosine", "constant"),
    "TrainSection.dtype": ("auto", "float32", "bfloat16"),
    "TrainSection.launcher": ("torchrun", "ray"),
    "PpmSection.loss": ("pairwise", "mse", "bce"),
    "VerifierSection.level": ("token", "solution"),
    "DpoSection.dtype": ("auto", "float32", "bfloat16"),
}
"""Section and key -> the words it may be."""
LEAST: dict[str, dict[str, int]] = {
    "RunSection": {"rounds": 0},
    "ClusterSection": {"workers": 1},
    "EngineSection": {"max_batch": 1, "max_context": 1, "score_batch_tokens": 1, "concurrency": 1},
    "SandboxSection": {"processes": 0, "memory_mib": 1, "output_kib": 1},
    "SearchSection": {
        "rollouts": 1, "second_pass": 0, "candidates": 1, "answer_candidates": 0, "temperature": 0, "max_depth": 1,
        "max_step_tokens": 1, "beam_width": 1, "rollouts_in_flight": 1, "trees_in_flight": 1, "checkpoint_rollouts": 0,
        "c": 0,
    },
    "ExtractSection": {"sft_top": 0, "positives": 1, "negatives": 1, "max_pairs_per_problem": 0},
    "TrainSection": {
        "epochs": 0, "learning_rate": 0, "batch_size": 1, "micro_batch_tokens": 1, "max_length": 1, "processes": 1,
        "lora_rank": 0, "frozen_layers": 0, "save_steps": 0, "tree_rows": 0,
    },
    "DpoSection": {"batch_size": 1, "micro_batch_tokens": 1, "max_length": 1, "lora_rank": 1},
    "EvalSection": {
        "problems": 0, "search_problems": 0, "samples": 1, "rollouts": 1, "candidates": 1, "trajectories": 1,
        "top_k": 1, "temperature": 0,
    },
}  # fmt: skip
"""Section -> key -> the least number it may be."""
METHODS = ("greedy", "sample", "beam", "dvts", "mcts")  # of an evaluation


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse what no stage could use. `prefix`: before the keys of a round's overlay. Raises UserError."""
    for key, section in _sections(config):
        kinds = [kind.__name__ for kind in type(section).__mro__]
        for name, value in vars(section).items():
            where = f"{prefix}{key}{name}={value}"
            words = next((CHOICES[f"{kind}.{name}"] for kind in kinds if f"{kind}.{name}" in CHOICES), None)
            if words is not None and value not in words:
                raise UserError(where, need=f"one of {', '.join(words)}")
            least = next((LEAST[kind][name] for kind in kinds if name in LEAST.get(kind, {})), None)
            if least is not None and not value >= least:  # nan is refused too
                raise UserError(where, need=f"{least} or more")
        if "SearchSection" in kinds and (not section.seeds or len(set(section.seeds)) < len(section.seeds)):
            raise UserError(f"{prefix}{key}seeds={section.seeds}", need="one or more, each once")
        if "SearchSection" in kinds and any(more < 1 for more in section.escalate):
            raise UserError(f"{prefix}{key}escalate={section.escalate}", need="rollouts to add, 1 or more each")
        if "SearchSection" in kinds and not 0 < section.top_p <= 1:
            raise UserError(f"{prefix}{key}top_p={section.top_p}", need="more than 0, at most 1")
        if "EvalSection" in kinds and (unknown := set(section.methods) - set(METHODS)):
            raise UserError(f"{prefix}{key}methods: {', '.join(sorted(unknown))}", need=f"of {', '.join(METHODS)}")


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key with its dot, section) of a config and of all sections below."""
    yield prefix, config
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            yield from _sections(value, f"{prefix}{name}.")
