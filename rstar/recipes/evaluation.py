"""What every recipe does with trees: grow them, read counts off them, and the methods of an evaluation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rstar.config import (
    ClusterSection,
    EngineSection,
    EvalSection,
    ModelSection,
    ProblemsSection,
    SandboxSection,
    SearchSection,
)
from rstar.evaluation import EvalRecord, by_level, eval_record, measures
from rstar.grading import Grader, is_equivalent_fast
from rstar.problems import load_problems
from rstar.recipes.base_model import absolute, checkpoint, own_folder_paths
from rstar.report.progress import SearchProgress
from rstar.run import Artifact, Counts, Here
from rstar.sandbox import Sandbox
from rstar.search.failures import infrastructure_failures
from rstar.search.worker import SearchJob, SearchTask, check_search, unfinished
from rstar.store import index, read_frame, read_trees, shards, write_json
from rstar.tree import Tree
from rstar.types import Problem, UserError
from rstar.workers import most_expensive_first, search_all


def search_passes(
    job: SearchJob, sets: Sequence[Sequence[Problem]], cluster: ClusterSection, name: str, *, before: Path | None = None
) -> None:
    """Run the passes of a job, each on its own problems, from where they stand; `name` is what the progress shows.

    `before`: a folder of trees of the same problems; those that took most tokens there come first.
    """
    todo = [item for i, problems in enumerate(sets) for item in unfinished(problems, job, i)]
    total = sum(map(len, sets))
    with SearchProgress(name, total=total, already=total - len(todo)) as progress:
        search_all(job, most_expensive_first(todo, before) if before else todo, cluster, progress)


def problem_trees(folder: Path) -> Iterator[list[Tree]]:
    """The complete trees of a folder, all seeds of a problem together, one problem in memory at a time."""
    complete = [ref for ref in index(folder).values() if ref.complete]
    by_problem = sorted(complete, key=lambda ref: ref.tree_id.rpartition("#")[0])
    for _, group in groupby(by_problem, key=lambda ref: ref.tree_id.rpartition("#")[0]):
        yield [read_frame(ref) for ref in group]


def unsolved(problems: Iterable[Problem], folder: Path, revision: int = 0) -> list[Problem]:
    """The problems for which no finished tree of a folder has a correct answer.

    `revision`, where it is not 0: of a search that takes up unsolved problems' trees again. A problem of which one tree
    has reached it was unsolved when that search began, so it stays on the list until all its trees are there.
    """
    solved = {trees[0].problem.id for trees in problem_trees(folder) if any(tree.solved for tree in trees)}
    if revision:
        taken_up = (name for name, ref in index(folder).items() if ref.revision >= revision)
        solved -= {name.rpartition("#")[0] for name in taken_up}
    return [problem for problem in problems if problem.id not in solved]


def tree_counts(pool: Sequence[Problem], folder: Path) -> dict[str, Any]:
    """What the trees of a folder hold in all; streams them."""
    solved: dict[str, bool] = {}
    outcomes: Counter[str] = Counter()
    executions: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    sandbox: set[str] = set()
    for tree in read_trees(folder):
        solved[tree.problem.id] = solved.get(tree.problem.id, False) or tree.solved
        sandbox.add(str(tree.settings.get("sandbox", "")))
        outcomes.update(node.terminal.value if node.terminal else "live" for node in tree.nodes[1:])
        executions.update(node.status for node in tree.nodes if node.status)
        totals.update(
            trees=1, nodes=len(tree.nodes) - 1, rollouts=tree.rollouts_done, tokens=tree.tokens, calls=tree.engine_calls
        )
    levels = by_level((problem, solved.get(problem.id, False)) for problem in pool)
    counts = {"problems": len(pool), "solved_by_level": levels, "outcomes": dict(outcomes), "sandbox": sorted(sandbox)}
    failed = {"executions": dict(executions), "infrastructure": infrastructure_failures(folder)}
    return counts | failed | totals


def eval_search(method: str, section: EvalSection, search: SearchSection, *, with_scorer: bool) -> SearchSection:
    """How an evaluation method makes its answers. Searches need a PPM; a verifier scores finished samples."""
    base = replace(search, escalate=[], checkpoint_rollouts=0, seeds=[0], use_ppm=False, method="sample")
    match method:
        case "greedy":
            return replace(base, rollouts=1, temperature=0.0)
        case "sample":
            return replace(base, rollouts=section.samples, temperature=section.temperature, use_ppm=with_scorer)
        case "beam" | "dvts" | "mcts":
            return replace(
                base,
                method=method,
                use_ppm=True,
                rollouts=section.rollouts,
                candidates=section.candidates,
                temperature=section.temperature,
                seeds=list(range(section.trajectories)),
            )
    raise UserError(f"evaluation method {method!r}", need="greedy, sample, beam, dvts, mcts")


def eval_search_settings(search: SearchSection, *, guided: bool = True) -> SearchSection:
    """The search settings that an evaluation reads; the others, which it has itself or has no use for, are at their
    defaults, so that they can change without disowning it. `guided`: it searches, and does not only sample."""
    if guided:
        own = ("method", "rollouts", "candidates", "temperature", "seeds", "use_ppm", "ppm", "escalate", "second_pass")
        plain = SearchSection()
        return replace(search, **{name: getattr(plain, name) for name in own})
    return SearchSection(
        form=search.form,
        top_p=search.top_p,
        max_depth=search.max_depth,
        max_step_tokens=search.max_step_tokens,
        calculator=search.calculator,
        drop_failed_steps=search.drop_failed_steps,
        trees_in_flight=search.trees_in_flight,
    )


def eval_passes(section: EvalSection, search: SearchSection, folder: Path, *, with_ppm: bool) -> dict[str, SearchTask]:
    """One search pass per evaluation method; searches need a PPM and are left out without one."""
    return {
        method: SearchTask((folder / method).resolve(), one, test_time=True)
        for method in section.methods
        if (one := eval_search(method, section, search, with_scorer=with_ppm)).method == "sample" or with_ppm
    }


def check_searches(search: SearchSection, section: EvalSection) -> None:
    """Refuse settings that a search, or one of its evaluation, could not be grown with. Raises UserError."""
    for one in (search, *(eval_search(method, section, search, with_scorer=True) for method in section.methods)):
        check_search(one)


def problem_limit(method: str, section: EvalSection) -> int | None:
    """How many of the held-out problems a method is measured on; None: all."""
    limits = (section.problems, section.search_problems if method in ("beam", "dvts", "mcts") else 0)
    return min(filter(None, limits), default=None)


def measure(method: str, folder: Path, section: EvalSection, sandbox: SandboxSection) -> dict[str, Any]:
    """Grade the trees of one method and measure them."""
    records = asyncio.run(eval_records(problem_trees(folder), sandbox))
    return {
        "measures": {name: asdict(m) for name, m in measures(method, records, top_k=section.top_k).items()},
        **costs(records),
    }


def costs(records: Sequence[EvalRecord]) -> dict[str, Any]:
    """What every method of eval.json says beside its measures: its costs and its records."""
    return {
        "problems": len(records),
        "tokens": sum(r.tokens for r in records),
        "engine_calls": sum(r.engine_calls for r in records),
        "seconds": round(sum(r.seconds for r in records), 2),
        "records": [asdict(r) for r in records],
    }


def write_evaluation(
    here: Here, methods: dict[str, Any], folders: Iterable[Path], **shown: list[dict[str, Any]]
) -> Counts:
    """Write eval.json, with the curves and tables that the report draws, name the shards of `folders` as outputs too,
    and return the counts of the stage."""
    write_json(here.output("eval.json"), {"round": here.round.number, "methods": methods, **shown})
    here.outputs.extend(shard for folder in folders for shard in shards(folder))
    counts = {name: {k: v for k, v in one.items() if k != "records"} for name, one in methods.items()}
    return counts | {k: v for k, v in shown.items() if k == "tables"}


def evaluate(
    here: Here,
    policy: Artifact,
    ppm: Artifact | None,
    eval: EvalSection,
    search: SearchSection,
    problems: ProblemsSection,
    model: ModelSection,
    engine: EngineSection,
    sandbox: SandboxSection,
    cluster: ClusterSection,
) -> Counts:
    """Measure a round's models on the held-out problems; searches only where there is a PPM."""
    folder = here.round.eval
    here.resume(folder)
    heldout = load_problems(problems).heldout
    passes = eval_passes(eval, search, folder, with_ppm=ppm is not None)
    job = SearchJob(
        passes=tuple(passes.values()),
        engine=engine,
        sandbox=sandbox,
        model=own_folder_paths(model),
        policy=checkpoint(policy, model),
        ppm=absolute(str(ppm.path)) if ppm is not None else "",
    )
    sets = [heldout[: problem_limit(method, eval)] for method in passes]
    search_passes(job, sets, cluster, f"round {here.round.number} evaluation")
    measured = {method: measure(method, one.folder, eval, sandbox) for method, one in passes.items()}
    return write_evaluation(here, measured, [folder / method for method in passes])


async def eval_records(groups: Iterable[Sequence[Tree]], section: SandboxSection) -> list[EvalRecord]:
    """A record per group of trees (those of one problem); the sandbox starts only for answers that need algebra."""
    async with AsyncExitStack() as stack:
        grader: Grader | None = None

        async def same(answer: str, reference: str) -> bool:
            nonlocal grader
            quick = is_equivalent_fast(answer, reference)
            if quick is not None:
                return quick
            if grader is None:
                grader = Grader(await stack.enter_async_context(Sandbox(section)))
            return await grader.is_equivalent(answer, reference)

        return [await eval_record(trees, same) for trees in groups]
