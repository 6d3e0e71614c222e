"""Trainings of a stage, with progress, and what can be checked of their settings."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    BootstrapSection,
    EngineSection,
    PpmSection,
    TrainSection,
    WarmupSection,
)
from rstar.report.progress import TrainingProgress, say_dropped
from rstar.types import SftRow, UserError


def fine_tune(rows: Path, base: str, output: Path, section: TrainSection, seed: int, title: str) -> dict[str, Any]:
    """Fine-tune a policy from `base` on a file of rows, with progress; returns the counts for its stage."""
    from rstar.training.data import read_rows
    from rstar.training.sft import train_policy

    with TrainingProgress(title) as progress:
        result = train_policy(read_rows(rows, SftRow), base, output, section, seed=seed, on_progress=progress)
    say_dropped(title, result.dropped, section.max_length)
    return asdict(result)


def scorer_training(rows: Path, base: str, output: Path, section: PpmSection, seed: int, title: str) -> dict[str, Any]:
    """As `fine_tune`, a PPM (or PQM, ORM: ppm.loss) on a file of its rows."""
    from rstar.training.data import read_rows
    from rstar.training.ppm import row_kind, train_ppm

    found: Any = read_rows(rows, row_kind(section.loss))
    with TrainingProgress(title) as progress:
        result = train_ppm(found, base, output, section, seed=seed, on_progress=progress)
    say_dropped(title, result.training.dropped, section.max_length)
    return {"rows": len(found), **asdict(result)}


def warm_up_training(sft: TrainSection, warmup: WarmupSection) -> TrainSection:
    """How the base is warmed up: as policies are fine-tuned, with the warm-up's own epochs, rate and batch."""
    if not warmup.enabled:
        return TrainSection()
    return replace(sft, epochs=warmup.epochs, learning_rate=warmup.learning_rate, batch_size=warmup.batch_size)


def check_loads_checkpoints(engine: EngineSection) -> None:
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
