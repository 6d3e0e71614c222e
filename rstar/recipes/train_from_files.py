"""`rstar train` from files: rows or trees of any origin, without a round."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rstar.config import ExtractSection, ModelSection, PpmSection, TrainSection, load
from rstar.recipes import load_config, rstar_math
from rstar.recipes.base_model import base_model
from rstar.recipes.evaluation import problem_trees
from rstar.recipes.rows import own_prompt, policy_rows, scorer_rows
from rstar.report.progress import TrainingProgress
from rstar.types import SftRow, UserError


def train_from_files(options: Namespace) -> str:
    """Train the policy or PPM that the arguments of `rstar train` name from a .jsonl file of rows or a folder of trees.

    Settings are those of options.config, else the paper's. Returns what came out, in words.
    """
    what, source, output = options.what, Path(options.source), Path(options.out)
    if what == "verifier":
        raise UserError(f"rstar train verifier {source}", need="a CONFIG.yaml of recipe outcome_verifier")
    if not (options.model and options.out):
        raise UserError(f"rstar train {what} {source}", need="--model and --out, or a CONFIG.yaml")
    if output.exists() and not (output / "config.json").exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--out {output} holds other things", need="a new folder, or a checkpoint to replace")
    from rstar.training.data import read_rows
    from rstar.training.ppm import row_kind, train_ppm
    from rstar.training.sft import train_policy

    overrides = [f"model.base={options.model}", *options.overrides]
    if options.config:
        config = load_config(options.config, overrides)[1]
    else:
        config = load(rstar_math.Config, None, overrides)
    if not isinstance(config, rstar_math.Config):
        raise UserError(f"{options.config} is of recipe {config.recipe}", need="one of recipe rstar_math")
    section: TrainSection = config.sft if what == "policy" else config.ppm
    loss = section.loss if isinstance(section, PpmSection) else ""
    kind: Any = row_kind(loss) if loss else SftRow
    if source.is_dir():
        extract: ExtractSection = config.extract
        rows: list[Any] = [
            row
            for trees in map(own_prompt, problem_trees(source))
            for row in (scorer_rows(trees, extract, loss) if loss else policy_rows(trees, extract))
        ]
    elif source.is_file():
        rows = read_rows(source, kind)
    else:
        raise UserError(f"no file or folder {source}", need="rows (.jsonl) or a folder with trees-*.jsonl.zst")
    folder = base_model(ModelSection(base=options.model), output.parent, seed=config.run.seed)
    with TrainingProgress(what) as progress:
        more: dict[str, Any] = {"seed": config.run.seed, "on_progress": progress}
        if not isinstance(section, PpmSection):
            result, after = train_policy(rows, folder, output, section, **more), None
        else:
            found = train_ppm(rows, folder, output, section, **more)
            result, after = found.training, found.heldout_after or found.train_after
    text = f"{output}: {result.rows} rows ({result.truncated} truncated, {result.dropped} dropped), "
    text += f"{result.steps} steps, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, {result.seconds:.0f} s\n"
    if after is not None:
        side = "held-out" if found.heldout_after else "training"
        text += f"pair accuracy {after.accuracy:.3f} on {after.pairs} {side} pairs\n"
    return text + f"metrics: {result.metrics}"
