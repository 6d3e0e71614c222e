"""Training from files: rows or trees of any origin instead of a round's. What `rstar train` does without a round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rstar.config import ExtractSection, ModelSection, PpmSection, TrainSection
from rstar.extract.outcomes import outcome_rows
from rstar.extract.preferences import preference_rows
from rstar.extract.q_values import q_rows
from rstar.extract.sft import sft_rows
from rstar.recipes.base_model import base_model
from rstar.recipes.measuring import problem_trees
from rstar.report.progress import TrainingProgress
from rstar.search.tree_operations import merge
from rstar.tree import Tree
from rstar.types import SftRow, UserError


def policy_rows(trees: Sequence[Tree], section: ExtractSection) -> list[SftRow]:
    """SFT rows of one problem's trees."""
    return sft_rows(trees, top=section.sft_top, min_synthetic_accuracy=section.min_synthetic_accuracy)


def scorer_rows(trees: Sequence[Tree], section: ExtractSection, loss: str) -> list[Any]:
    """One problem's rows for a loss of `ppm.loss`: pairs (PPM), Q rows (PQM) or outcomes (ORM)."""
    if loss != "pairwise":
        return [row for tree in trees for row in (q_rows(tree) if loss == "mse" else outcome_rows(tree))]
    return [
        row
        for tree in trees
        for row in preference_rows(
            tree,
            positives=section.positives,
            negatives=section.negatives,
            min_margin=section.min_margin,
            min_edit_distance=section.min_edit_distance,
            answer_pairs=section.answer_pairs,
            max_pairs=section.max_pairs_per_problem,
        )
    ]


def train_from_files(what: str, source: Path, model: str, output: Path, config: Any) -> str:
    """Train a policy or PPM from `model` on `source`, a .jsonl file of rows or a folder of trees, into `output`.

    `config` gives the sections sft, ppm and extract, and run.seed. Returns what came out, in words.
    """
    from rstar.training.data import read_rows
    from rstar.training.ppm import row_kind, train_ppm
    from rstar.training.sft import train_policy

    section: TrainSection = config.sft if what == "policy" else config.ppm
    loss = section.loss if isinstance(section, PpmSection) else ""
    kind: Any = row_kind(loss) if loss else SftRow
    if source.is_dir():
        extract: ExtractSection = config.extract
        groups = (
            [merge(trees)] if extract.merge_seeds and len(trees) > 1 else trees for trees in problem_trees(source)
        )
        rows: list[Any] = [
            row
            for trees in groups
            for row in (scorer_rows(trees, extract, loss) if loss else policy_rows(trees, extract))
        ]
    elif source.is_file():
        rows = read_rows(source, kind)
    else:
        raise UserError(f"no file or folder {source}", need="rows (.jsonl) or a folder with trees-*.jsonl.zst")
    folder = base_model(ModelSection(base=model), output.parent, seed=config.run.seed)
    with TrainingProgress(what) as progress:
        options: dict[str, Any] = {"seed": config.run.seed, "on_progress": progress}
        if not isinstance(section, PpmSection):
            result, after = train_policy(rows, folder, output, section, **options), None
        else:
            found = train_ppm(rows, folder, output, section, **options)
            result, after = found.training, found.heldout_after or found.train_after
    text = f"{output}: {result.rows} rows ({result.truncated} truncated), {result.steps} steps, "
    text += f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}, {result.seconds:.0f} s\n"
    if after is not None:
        side = "held-out" if result.rows < len(rows) else "training"
        text += f"pair accuracy {after.accuracy:.3f} on {after.pairs} {side} pairs\n"
    return text + f"metrics: {result.metrics}"
