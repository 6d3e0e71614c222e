"""What the stages of Orca 2 share: config, asking a teacher or the student, what was answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    ClusterSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    to_dict,
)
from rstar.extract.explanations import Explanation, explanation
from rstar.recipes.base_model import absolute
from rstar.recipes.measuring import search_passes
from rstar.search.collect import SearchJob, SearchPass
from rstar.store import read_trees, shards
from rstar.types import Problem

ARMS = ("erased", "visible", "plain")
CAUTIOUS = "You are a careful assistant. Think about which way of working suits the question, then answer it."


@dataclass(frozen=True)
class TeacherSection:
    """Who answers. `model` words the prompts (its base: for its chat template only); its system message is not read."""

    engine: EngineSection = field(default_factory=lambda: EngineSection(kind="openai"))
    model: ModelSection = field(default_factory=lambda: ModelSection(base="", template="{question}\n"))


@dataclass(frozen=True)
class ProgressSection:
    """A progressive stage before the last one."""

    epochs: float = 1.0  # 0 leaves the stage out
    problems: ProblemsSection = field(default_factory=ProblemsSection)


@dataclass(frozen=True)
class OrcaSection:
    """Strategies, and which rows are made of the teacher's answers."""

    strategies: str = "configs/orca2/strategies.yaml"
    cautious: str = CAUTIOUS  # the system message of every erased row
    arm: str = "erased"  # erased, visible, plain
    development: int = 16  # training problems of a sub-category that strategies are chosen on
    student: bool = True  # the choice counts the student's accuracy as well
    only_correct: bool = True
    few_shot: float = 0.1  # few-shot rows per answer


@dataclass(frozen=True)
class MeasureSection:
    """What is measured beside the held-out problems."""

    problems: int = 0  # use the first N held-out problems; 0: all
    benchmarks: dict[str, str] = field(default_factory=dict)  # name -> local file, or "" for the hub


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads. `rounds` holds the arms."""

    recipe: str = "orca2"
    run: RunSection = field(default_factory=lambda: RunSection(rounds=3))
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=ProblemsSection)
    flan: ProgressSection = field(default_factory=lambda: ProgressSection(1.0, ProblemsSection(name="flan", heldout=0)))
    weaker: ProgressSection = field(default_factory=lambda: ProgressSection(3.0))
    weaker_teacher: TeacherSection = field(default_factory=TeacherSection)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    search: SearchSection = field(
        default_factory=lambda: SearchSection(
            method="sample", form="stated", rollouts=1, temperature=0.0, max_step_tokens=1024
        )
    )
    orca: OrcaSection = field(default_factory=OrcaSection)
    sft: TrainSection = field(default_factory=lambda: TrainSection(epochs=4, in_order=True, tree_packing=False))
    eval: MeasureSection = field(default_factory=MeasureSection)
    rounds: dict[str, Any] = field(
        default_factory=lambda: {"r2": {"orca": {"arm": "visible"}}, "r3": {"orca": {"arm": "plain"}}}
    )


def by_task(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.level, []).append(problem)
    return found


def tree_share(folder: Path) -> float:
    """Share of correctly answered problems among the trees of a folder."""
    solved = [tree.solved for tree in read_trees(folder)]
    return sum(solved) / max(1, len(solved))


Told = tuple[Path, str, Sequence[Problem]]
"""(folder of the trees, system message, problems)."""


def ask(
    config: Config, who: TeacherSection, policy: str, told: Sequence[Told], name: str, *, graded: bool = True
) -> None:
    """One greedy-or-sampled answer to each problem under each system message, as one-leaf trees."""
    search = replace(config.search, rollouts=1)
    job = SearchJob(
        passes=tuple(SearchPass(folder.resolve(), search, not graded, system=text) for folder, text, _ in told),
        engine=who.engine,
        sandbox=config.sandbox,
        model=who.model,
        policy=absolute(name_of) if (name_of := policy or who.model.base) else "",
        recipe=config.recipe,
    )
    search_passes(job, [problems for _, _, problems in told], config.cluster, name)


def answers(config: Config, root: Path, name: str) -> Iterator[Explanation]:
    """The usable answers in the folders below `root / name`; ids of trees begin with their folder below `root`."""
    for path in sorted({shard.parent for shard in shards_below(root / name)}):
        for tree in read_trees(path):
            if one := explanation(tree, only_correct=config.orca.only_correct):
                yield replace(one, tree_id=f"{path.relative_to(root)}/{one.tree_id}")


def shards_below(folder: Path) -> list[Path]:
    return sorted(path for one in [folder, *folder.rglob("*")] if one.is_dir() for path in shards(one))


def teacher_settings(config: Config, who: TeacherSection, **more: Any) -> dict[str, Any]:
    engine = {"kind": who.engine.kind, "model": who.engine.model}
    return {"search": to_dict(config.search), "teacher": {"engine": engine, "model": to_dict(who.model)}, "orca": more}
