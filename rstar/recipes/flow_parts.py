"""What the stages of Flow-DPO share: config, rows of reference solutions, passes of the flow and their figures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rstar.config import (
    ClusterSection,
    DpoSection,
    EngineSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    WarmupSection,
    to_dict,
)
from rstar.manifest import RunDir
from rstar.prompts import NO, STOP_SYSTEM, YES, split_stop_question, stop_asked
from rstar.recipes.base_model import absolute
from rstar.recipes.measuring import problem_trees
from rstar.recipes.rows import reference_row
from rstar.recipes.verification import evaluated
from rstar.search.collect import SearchJob, SearchPass
from rstar.store import read_json
from rstar.tokens import question_wrapper
from rstar.tree import Tree
from rstar.types import Problem, SftRow


@dataclass(frozen=True)
class FlowSection:
    """The stream."""

    window: int = 1  # problems searched at once with the same parameters
    overlap: bool = False  # search a window while the one before it is learned from (more than one device)


@dataclass(frozen=True)
class CompileSection:
    """The comparison of training solutions."""

    problems: int = 1500  # of each arm
    samples: int = 8  # draws of the single model for the self-generated arm
    judge: EngineSection = field(default_factory=lambda: EngineSection(kind="openai"))
    judged: int = 0  # problems whose flow and reference solutions a judge compares; 0: no judge


@dataclass(frozen=True)
class Config:
    """Everything a run of this recipe reads."""

    recipe: str = "flow_dpo"
    run: RunSection = field(default_factory=lambda: RunSection(rounds=2))
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=lambda: ProblemsSection(name="gsm8k"))
    warmup: WarmupSection = field(default_factory=WarmupSection)
    search: SearchSection = field(
        default_factory=lambda: SearchSection(
            method="flow", form="text", max_depth=6, max_step_tokens=160, candidates=4, temperature=1.0
        )
    )
    flow: FlowSection = field(default_factory=FlowSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    compile: CompileSection = field(default_factory=CompileSection)
    sft: TrainSection = field(
        default_factory=lambda: TrainSection(
            epochs=3,
            learning_rate=2e-4,
            batch_size=16,
            warmup_ratio=0.1,
            weight_decay=0.0,
            lora_rank=16,
            lora_alpha=16,
            lora_dropout=0.05,
        )
    )
    rounds: dict[str, Any] = field(default_factory=dict)


def stop_rows(config: Config, base: str, solution: SftRow, problem: Problem) -> list[SftRow]:
    """What a Stop model should say of the whole solution, and of a part of it."""
    wrap = question_wrapper(base, replace(config.model, system=STOP_SYSTEM, few_shot=""))
    borders, whole = split_stop_question(wrap, problem.question), [text for text, _ in solution.segments]
    draw = random.Random(problem.id)
    if len(whole) > 1:
        part = whole[: draw.randrange(1, len(whole))]
    else:
        part = [whole[0][: draw.randrange(1, max(2, len(whole[0]) - 1))]]
    return [reference_row(problem, stop_asked(borders, text), word) for text, word in ((whole, YES), (part, NO))]


def flow_pass(config: Config, folder: Path, *, graded: bool = False) -> SearchPass:
    """Base chains alone: one prediction of the flow for each problem."""
    one = replace(config.search, deviations=False, rollouts=1)
    return SearchPass(folder.resolve(), one, test_time=not graded)


def single_pass(config: Config, folder: Path, *, graded: bool = False, samples: int = 0) -> SearchPass:
    """The single model's greedy solutions, with as many tokens as the flow has; or `samples` drawn ones.

    In words it is a flow of one piece, so that answers are read alike.
    """
    search, drawn = config.search, config.search.temperature if samples else config.search.chain_temperature
    if search.form == "text":
        whole = search.max_step_tokens * search.max_depth
        one = replace(search, max_depth=1, max_step_tokens=whole, chain_temperature=drawn, deviations=False, rollouts=1)
        one = replace(one, seeds=list(range(max(1, samples))))
    else:
        one = replace(search, method="sample", temperature=drawn, rollouts=max(1, samples))
    return SearchPass(folder.resolve(), one, test_time=not graded)


def search_job(config: Config, model: str, passes: Sequence[SearchPass], adapters: Path | None = None) -> SearchJob:
    """What a search worker needs; `adapters` is a checkpoint of training.dpo."""
    folders = {role: str((adapters / role).resolve()) for role in ("answer", "stop")} if adapters else {}
    return SearchJob(
        passes=tuple(passes), engine=config.engine, sandbox=config.sandbox, model=config.model, policy=absolute(model),
        recipe=config.recipe, adapters=folders, lora_rank=config.dpo.lora_rank if adapters else 0,
    )  # fmt: skip


def settings_of(config: Config, *more: str) -> dict[str, Any]:
    """The sections that every stage with a search reads, and `more`."""
    found = {name: to_dict(getattr(config, name)) for name in ("search", "problems", "model", *more)}
    for key in ("trees_in_flight", "rollouts"):  # change nothing that comes out
        del found["search"][key]
    return found


def trees_of(folder: Path) -> list[Tree]:
    """The trees of a folder with one tree a problem."""
    return [tree for (tree,) in problem_trees(folder)]


def measured_accuracy(config: Config, folder: Path) -> dict[str, Any]:
    """Accuracy of the greedy solutions in a folder: one answer a problem."""
    one = evaluated(folder, config.sandbox, oracle_only=True)
    return {**one, "measures": {"accuracy": one["measures"]["oracle"]}}


def adapters_of(run: RunDir) -> Path:
    """The folder of the adapters that the stream ended with."""
    here = run.round(1).path
    return here / str(read_json(here / "stream.json")["checkpoint"])
