"""Which model a run starts from, for every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rstar.config import ModelSection, RunSection, WarmupSection
from rstar.rounds import RunDir


class WarmedUp(Protocol):
    """A recipe's config, as far as the base of its rounds goes."""

    @property
    def run(self) -> RunSection: ...
    @property
    def model(self) -> ModelSection: ...
    @property
    def warmup(self) -> WarmupSection: ...


def base_checkpoint(config: WarmedUp, run: RunDir) -> str:
    """What every round is trained from: the warm-up where there is one, else the base model itself."""
    if config.warmup.enabled:
        return str(run.round(0).policy)
    if config.model.step_tokens:
        return str(with_delimiters(run))
    return base_model(config.model, run.path, seed=config.run.seed)


def with_delimiters(run: RunDir) -> Path:
    """The base model with the step delimiters in its vocabulary, where model.step_tokens asks for that."""
    return run.round(0).path / "start"


def base_model(section: ModelSection, run: Path, *, seed: int = 0) -> str:
    """Folder or hub id of the model that `model.base` names; checked, converted or built where it is ours to make.

    "smollm2" is converted once into the cache folder, "tiny" is built in the run's folder.
    """
    from rstar.tokens import check_model_folder

    match section.base:
        case "smollm2":
            from rstar.training.models import SMOLLM2_FOLDER, cache_folder, smollm2_checkpoint

            folder = cache_folder()
            if not (folder / SMOLLM2_FOLDER).exists():
                print("converting SmolLM2-135M-Instruct to a plain checkpoint (once, half a minute)", flush=True)
            return str(smollm2_checkpoint(folder))
        case "tiny":
            from rstar.training.tiny import build_tiny_model

            folder = run / "tiny_model"
            return str(folder if folder.exists() else build_tiny_model(folder, seed=seed))
        case path_or_id:
            if Path(path_or_id).exists() or path_or_id.startswith((".", "/", "~")):
                check_model_folder(Path(path_or_id).expanduser())
                return str(Path(path_or_id).expanduser())
            return path_or_id


def absolute(path_or_id: str) -> str:
    """Workers run in another folder: local paths travel absolute, hub ids as they are."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else path_or_id
