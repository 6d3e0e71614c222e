"""How the flow and the single model are run over problems, and how right their answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rstar.config import EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.recipes.base_model import checkpoint, own_folder_paths
from rstar.recipes.evaluation import problem_trees
from rstar.recipes.verification import evaluated
from rstar.run import Artifact
from rstar.search.worker import SearchJob, SearchTask
from rstar.store import read_json
from rstar.tree import ANSWER, STOP, Tree

ROLES = (ANSWER, STOP)
"""Names of the two adapters."""


def flow_pass(search: SearchSection, folder: Path, *, graded: bool = False) -> SearchTask:
    """Base chains alone: one prediction of the flow for each problem."""
    return SearchTask(folder.resolve(), replace(search, deviations=False), test_time=not graded)


def single_pass(search: SearchSection, folder: Path, *, graded: bool = False, samples: int = 0) -> SearchTask:
    """The single model's greedy solutions, with as many tokens as the flow has; or `samples` drawn ones.

    In words it is a flow of one piece, so that answers are read alike.
    """
    drawn, n = search.temperature if samples else search.chain_temperature, max(1, samples)
    if search.form == "text":
        whole = search.max_step_tokens * search.max_depth
        one = replace(search, max_depth=1, max_step_tokens=whole, chain_temperature=drawn, deviations=False)
        one = replace(one, seeds=list(range(n)))
    else:
        one = replace(search, method="sample", temperature=drawn, rollouts=n)
    return SearchTask(folder.resolve(), one, test_time=not graded)


def search_job(
    passes: Sequence[SearchTask],
    policy: Artifact,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    adapters: Artifact | None = None,
) -> SearchJob:
    """What a search worker needs to run `passes` with a policy, or with the stream's adapters on it."""
    folders = {role: str(adapters.path / role) for role in ROLES} if adapters is not None else {}
    return SearchJob(
        passes=tuple(passes),
        engine=engine,
        sandbox=sandbox,
        model=own_folder_paths(model),
        policy=checkpoint(policy, model),
        recipe="flow_dpo",
        adapters=folders,
        lora_rank=read_json(Path(folders[ANSWER]) / "adapter_config.json")["r"] if folders else 0,
    )


def trees_of(folder: Path) -> list[Tree]:
    """The trees of a folder with one tree a problem."""
    return [tree for (tree,) in problem_trees(folder)]


def measured_accuracy(folder: Path, sandbox: SandboxSection) -> dict[str, Any]:
    """A method of eval.json: the accuracy of the greedy solutions in a folder, one answer a problem."""
    one = evaluated(folder, sandbox, oracle_only=True)
    return {**one, "measures": {"accuracy": one["measures"]["oracle"]}}
