"""Which model a run starts from, and the checkpoints of its stages, for every recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rstar.config import ModelSection, ProblemsSection, RunSection, SandboxSection, TrainSection, WarmupSection
from rstar.manifest import run_dir
from rstar.problems import load_problems
from rstar.recipes.training import fine_tune
from rstar.run import Artifact, Counts, Here
from rstar.store import write_rows
from rstar.tokens import check_model_folder, check_tokenizer, load_tokenizer, question_wrapper


def base_model(section: ModelSection, run: Path, *, seed: int = 0) -> str:
    """Folder or hub id of the model that `model.base` names; checked, converted or built where it is ours to make.

    "smollm2" is converted once into the cache folder, "tiny" is built in the run's folder.
    """
    match section.base:
        case "smollm2":
            from rstar.store import cache_folder
            from rstar.training.models import SMOLLM2_FOLDER, smollm2_checkpoint

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


def check_base(model: ModelSection, run: RunSection) -> None:
    """Raise UserError unless the base model is there and its tokenizer serves."""
    base = base_model(model, run_dir(run).path, seed=run.seed)
    check_tokenizer(load_tokenizer(base), template=model.template, name=base)


def start_model(here: Here, model: ModelSection, run_seed: int) -> str:
    """What round 0 begins with: the base model, given the step delimiters where model.step_tokens asks for them (then
    an output of the stage)."""
    base = base_model(model, here.round.root, seed=run_seed)
    if not model.step_tokens:
        return base
    from rstar.training.vocabulary import with_step_tokens

    return str(with_step_tokens(base, here.output("start")))


def prepare_base(
    here: Here,
    model: ModelSection,
    problems: ProblemsSection,
    warmup: WarmupSection,
    sft: TrainSection,
    sandbox: SandboxSection,
    run_seed: int,
) -> Counts:
    """The base of all rounds: the model as it is, given the step delimiters, or warmed up on worked solutions (D14)."""
    policy = [here.output("policy")] if warmup.enabled else []
    start, pool = start_model(here, model, run_seed), load_problems(problems)
    found = {"train": len(pool.train), "heldout": len(pool.heldout), "dropped": dict(pool.dropped)}
    base = base_model(model, here.round.root, seed=run_seed)
    counts: dict[str, Any] = {"base": base, "problems": found | {"contaminated": pool.contaminated}}
    for output in policy:
        from rstar.warmup import warmup_rows

        rows = warmup_rows(warmup, problems, pool, sandbox, question_wrapper(start, model))
        write_rows(here.round.path / "warmup.jsonl", rows)
        counts |= fine_tune(here.round.path / "warmup.jsonl", start, output, sft, run_seed, "warm-up")
    return counts


def checkpoint(artifact: Artifact, model: ModelSection) -> str:
    """Folder or hub id of the model that a stage has made; of a base stage that made none, what `model.base` names."""
    if (artifact.path / "config.json").exists():
        return str(artifact.path)
    return absolute(base_model(model, artifact.folder.parent))


def absolute(path_or_id: str) -> str:
    """Workers run in another folder: local paths travel absolute, hub ids as they are."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else path_or_id


def own_folder_paths(model: ModelSection) -> ModelSection:
    """The model's section with absolute paths, for workers that run in another folder."""
    return replace(model, few_shot=absolute(model.few_shot)) if model.few_shot else model
