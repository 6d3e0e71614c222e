"""Which model a run starts from, for every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rstar.config import ModelSection, RunSection, WarmupSection
from rstar.rounds import RunDir, run_dir
from rstar.tokens import check_model_folder, check_tokenizer, load_tokenizer


class Based(Protocol):
    """A recipe's config, as far as its base model goes."""

    @property
    def run(self) -> RunSection: ...
    @property
    def model(self) -> ModelSection: ...


class WarmedUp(Based, Protocol):
    """A recipe's config, as far as the base of its rounds goes."""

    @property
    def warmup(self) -> WarmupSection: ...


def base_checkpoint(config: WarmedUp, run: RunDir) -> str:
    """What every round is trained from: the warm-up where there is one, else the base model itself."""
    return str(run.round(0).policy) if config.warmup.enabled else start_checkpoint(config, run)


def start_checkpoint(config: Based, run: RunDir) -> str:
    """The base model as `start_of` has left it."""
    if config.model.step_tokens:
        return str(with_delimiters(run))
    return base_model(config.model, run.path, seed=config.run.seed)


def start_of(config: Based, run: RunDir) -> tuple[str, list[Path]]:
    """What round 0 begins with (the base model, given the step delimiters where model.step_tokens says so), and its
    folder where it is a new one."""
    base = base_model(config.model, run.path, seed=config.run.seed)
    if not config.model.step_tokens:
        return base, []
    from rstar.training.vocabulary import with_step_tokens

    return str(with_step_tokens(base, with_delimiters(run))), [with_delimiters(run)]


def check_base(config: Based) -> None:
    """Raise UserError unless the base model is there and its tokenizer serves."""
    base = base_model(config.model, run_dir(config.run).path, seed=config.run.seed)
    check_tokenizer(load_tokenizer(base), template=config.model.template, name=base)


def with_delimiters(run: RunDir) -> Path:
    """The base model with the step delimiters in its vocabulary, where model.step_tokens asks for that."""
    return run.round(0).path / "start"


def base_model(section: ModelSection, run: Path, *, seed: int = 0) -> str:
    """Folder or hub id of the model that `model.base` names; checked, converted or built where it is ours to make.

    "smollm2" is converted once into the cache folder, "tiny" is built in the run's folder.
    """
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
