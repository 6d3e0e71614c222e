"""From a config section to an engine: the one place where the kinds are told apart. Heavy imports happen here, late.

Where policy and PPM run:

* one GPU for both (the default): vLLM gives each `engine.gpu_memory` of it, hf takes what each needs;
* GPUs of their own: `engine.scorer_device=cuda:1`, counted among the GPUs that the worker sees; with
  `engine.tensor_parallel=2` vLLM's policy takes two from `engine.device` on, and so does its scorer from its own;
* a CPU: in turns, one forward pass at a time, in one process (hf: one torch thread; vLLM: a lock between the engines).

Replicas are search workers, each with a policy and a PPM of its own: `cluster.workers`, `cluster.gpus_per_worker`.
"""

from __future__ import annotations

from dataclasses import replace

from rstar.config import EngineSection
from rstar.engines.base import Policy, Scorer, value_head
from rstar.types import UserError

KINDS = ("hf", "vllm", "openai", "simulated")


def build_policy(section: EngineSection, model_path: str, *, lora_rank: int = 0) -> Policy:
    """A policy engine for the checkpoint at `model_path` (openai: `section.model` on the server is what generates).

    `lora_rank`: of the LoRA adapters to come, which vLLM wants to know beforehand.
    """
    match section.kind:
        case "hf":
            from rstar.engines.hf import HfPolicy

            return HfPolicy(model_path, section)
        case "vllm":
            from rstar.engines.vllm import VllmPolicy

            return VllmPolicy(model_path, section, lora_rank=lora_rank)
        case "openai":
            from rstar.engines.openai import OpenAIPolicy

            return OpenAIPolicy(section, model_path or None)
        case "simulated":
            from rstar.engines.simulated import SimulatedPolicy, arithmetic_script
            from rstar.engines.worked_teacher import teacher_script

            script = {"": arithmetic_script, "worked_teacher": teacher_script}.get(section.model)
            if script is None:
                raise UserError(f"engine.model={section.model} of a simulated engine", need="worked_teacher, or none")
            return SimulatedPolicy(script, tokens_per_second=section.tokens_per_second)
    raise UserError(f"engine.kind={section.kind}", need="one of " + ", ".join(KINDS))


def build_scorer(section: EngineSection, model_path: str) -> Scorer:
    """A scorer engine for the PPM or verifier at `model_path`; beside an openai policy it runs in hf.

    So does a verifier beside vLLM, whose pooling runner has no place for its bias.
    """
    section = replace(section, device=section.scorer_device or section.device)
    match "hf" if section.kind == "vllm" and value_head(model_path) else section.kind:
        case "hf" | "openai":
            from rstar.engines.hf import HfScorer

            return HfScorer(model_path, section)
        case "vllm":
            from rstar.engines.vllm import VllmScorer

            return VllmScorer(model_path, section)
        case "simulated":
            from rstar.engines.simulated import SimulatedScorer, arithmetic_score

            return SimulatedScorer(arithmetic_score)
    raise UserError(f"engine.kind={section.kind}", need="one of " + ", ".join(KINDS))
