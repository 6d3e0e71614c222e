"""What the results of a run depend on beside its sections: its seed, and what the files that they name hold."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from rstar.config import BootstrapSection, EngineSection, ModelSection, ProblemsSection, RunSection
from rstar.recipes.base_model import absolute
from rstar.store import file_digest
from rstar.types import UserError


def seed_of(run: RunSection) -> dict[str, int]:
    """The part of the run section that a training reads, for its stage's settings."""
    return {"seed": run.seed}


def serves_checkpoints(engine: EngineSection) -> None:
    """Refuse an engine that could not run what the rounds train. Raises UserError."""
    if engine.kind == "openai":
        raise UserError(
            f"engine.kind=openai, whose server has {engine.model or 'one model'} in every round",
            need="an engine that loads what the rounds train: hf or vllm",
            how="recipe rstar_math lets a server search round 1: see bootstrap.* in `rstar config`",
        )


def check_bootstrap(section: BootstrapSection) -> None:
    """Refuse a server of round 1's solutions that could not be asked. Raises UserError."""
    if section.enabled and section.engine.kind == "openai":
        from rstar.engines.openai import check_server

        check_server(section.engine, "bootstrap.engine")


def travelling(model: ModelSection) -> ModelSection:
    """The model's section for workers, which run in another folder."""
    return replace(model, few_shot=absolute(model.few_shot)) if model.few_shot else model


def files_read(problems: ProblemsSection, model: ModelSection) -> dict[str, str]:
    """Digests of the files of problems (a line more would move the held-out set) and of worked examples in the prompt.

    {} where none are named.
    """
    named = {"problems.path": problems.path, "problems.heldout_path": problems.heldout_path}
    named["model.few_shot"] = model.few_shot
    files = {key: Path(path).expanduser() for key, path in named.items() if path}
    return {key: _digest(file, file.stat().st_mtime_ns) for key, file in files.items() if file.is_file()}


@lru_cache
def _digest(file: Path, changed: int) -> str:
    return file_digest(file)
