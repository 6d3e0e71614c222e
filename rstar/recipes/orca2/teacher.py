"""Asking a teacher, or the student: one answer to each problem under a system message, kept as a tree of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rstar.config import ClusterSection, EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.extract.explanations import Explanation, explanation
from rstar.recipes.base_model import absolute, base_model, own_folder_paths
from rstar.recipes.evaluation import search_passes
from rstar.run import Here
from rstar.search.worker import SearchJob, SearchTask
from rstar.store import read_trees, shards
from rstar.types import Problem


@dataclass(frozen=True)
class TeacherSection:
    """Who answers. `model` words the prompts (its base: for its chat template only); its system message is not read."""

    engine: EngineSection = field(default_factory=lambda: EngineSection(kind="openai"))
    model: ModelSection = field(default_factory=lambda: ModelSection(base="", template="{question}\n"))


@dataclass(frozen=True)
class AnswerSet:
    """Problems that are answered under one system message, and the folder of their trees."""

    folder: Path
    system: str
    problems: Sequence[Problem]


def ask(
    here: Here,
    who: TeacherSection,
    sets: Sequence[AnswerSet],
    search: SearchSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
    title: str,
    *,
    checkpoint: str = "",
    graded: bool = True,
) -> None:
    """Let `who` answer every problem of the sets that has no answer yet.

    Args:
        checkpoint: Folder or hub id of the student's weights; empty for a teacher, whose model.base is taken.
        graded: The answers are compared with the reference answers, which an evaluation must not do here.
    """
    passes = [SearchTask(one.folder.resolve(), search, test_time=not graded, system=one.system) for one in sets]
    base = base_model(who.model, here.round.root) if who.model.base and not checkpoint else checkpoint
    job = SearchJob(
        passes=tuple(passes),
        engine=who.engine,
        sandbox=sandbox,
        model=own_folder_paths(who.model),
        policy=base and absolute(base),
        recipe="orca2",
    )
    search_passes(job, [one.problems for one in sets], cluster, title)


def explanations(round_folder: Path, name: str, *, only_correct: bool) -> Iterator[Explanation]:
    """The usable answers below the folder `name` of a round; their ids of trees begin with their own folder's name."""
    for folder in sorted({shard.parent for shard in shards_below(round_folder / name)}):
        for tree in read_trees(folder):
            if one := explanation(tree, only_correct=only_correct):
                yield replace(one, tree_id=f"{folder.relative_to(round_folder)}/{one.tree_id}")


def share_solved(folder: Path) -> float:
    """Share of the trees of a folder that have a correct answer, in [0, 1]."""
    solved = [tree.solved for tree in read_trees(folder)]
    return sum(solved) / max(1, len(solved))


def shards_below(folder: Path) -> list[Path]:
    """The shards of a folder and of all folders in it."""
    return sorted(path for one in [folder, *folder.rglob("*")] if one.is_dir() for path in shards(one))
