"""The compile stage of Flow-DPO: a fresh base is fine-tuned on solutions of the same problems from three sources."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from rstar.config import (
    to_dict,
)
from rstar.extract.sft import sft_rows
from rstar.manifest import RunDir, Stage, StageResult, input_digest
from rstar.problems import load_problems
from rstar.recipes.base_model import base_checkpoint
from rstar.recipes.flow_figures import accuracy_table
from rstar.recipes.flow_parts import (
    Config,
    adapters_of,
    flow_pass,
    measured_accuracy,
    search_job,
    settings_of,
    single_pass,
)
from rstar.recipes.judging import judge
from rstar.recipes.measuring import finished_eval, problem_trees, search_passes
from rstar.recipes.rows import reference_rows
from rstar.recipes.starting import seed_of
from rstar.recipes.training import fine_tune
from rstar.store import read_json, shards, write_rows
from rstar.types import SftRow, UserError

ARMS = ("reference", "self", "flow")


def compile_stages(config: Config, run: RunDir, number: int) -> list[Stage]:
    """Solutions of the training problems, the arms' rows, a model for each arm, and their evaluation."""
    models = [policy_stage(config, run, number, arm) for arm in ARMS]
    return [
        solutions_stage(config, run, number),
        arms_stage(config, run, number),
        *models,
        compiled_stage(config, run, number),
    ]


# -- round 2: compile ------------------------------------------------------------------------------------------------


def solutions_stage(config: Config, run: RunDir, number: int) -> Stage:
    """The trained flow's solutions of the training problems, and the single model's own."""
    here = run.round(number)

    def work() -> StageResult:
        pool, base = load_problems(config.problems).train, base_checkpoint(config, run)
        mine = single_pass(config, here.path / "self", graded=True, samples=config.compile.samples)
        search_passes(search_job(config, base, [mine]), [pool], config.cluster, "self-generated solutions")
        flow = flow_pass(config, here.path / "flow", graded=True)
        job = search_job(config, base, [flow], adapters_of(run))
        search_passes(job, [pool], config.cluster, "the flow's solutions")
        found = {name: list(problem_trees(here.path / name)) for name in ("self", "flow")}
        solved = {name: sum(any(tree.solved for tree in trees) for trees in one) for name, one in found.items()}
        return StageResult(
            (*shards(here.path / "self"), *shards(here.path / "flow")), {"problems": len(pool), "solved": solved}
        )

    settings = settings_of(config) | {"compile": {"samples": config.compile.samples}}
    return Stage(
        here,
        "solutions",
        settings,
        lambda: {"stream": input_digest(run.round(1), "stream")},
        work,
        resumes=True,
        trees=(here.path / "self", here.path / "flow"),
    )


def arms_stage(config: Config, run: RunDir, number: int) -> Stage:
    """The rows of every arm: the same problems, a correct solution each."""
    here = run.round(number)

    def work() -> StageResult:
        pool = load_problems(config.problems).train
        rows = {"reference": reference_rows(config, base_checkpoint(config, run), pool)}
        for arm in ("self", "flow"):
            rows[arm] = [
                _whole(row) if config.search.form == "text" else row
                for trees in problem_trees(here.path / arm)
                for row in sft_rows(trees, top=1)
            ]
        arms = {arm: {row.problem_id: row for row in found} for arm, found in rows.items()}
        shared = [p.id for p in pool if all(p.id in one for one in arms.values())][: config.compile.problems]
        if not shared:
            raise UserError(
                "no problem has a correct solution of every arm", need="one", how="more problems or samples"
            )
        if len(shared) < config.compile.problems:
            few = f"{len(shared)} of the {config.compile.problems} problems that compile.problems asks for"
            print(f"compile: {few} have a correct solution of every arm", flush=True)
        for arm, one in arms.items():
            write_rows(here.path / f"{arm}.jsonl", [one[key] for key in shared])
        found = {arm: len(one) for arm, one in arms.items()}
        return StageResult(tuple(here.path / f"{arm}.jsonl" for arm in ARMS), {"rows": len(shared), "solutions": found})

    settings = {"compile": {"problems": config.compile.problems}}
    return Stage(here, "extract", settings, lambda: {"solutions": input_digest(here, "solutions")}, work)


def _whole(row: SftRow) -> SftRow:
    """A solution in words without its borders: what is fine-tuned writes it in one go."""
    return replace(row, segments=((row.completion, True),))


def policy_stage(config: Config, run: RunDir, number: int, arm: str) -> Stage:
    """A fresh base fine-tuned on one arm, LoRA merged."""
    here = run.round(number)

    def work() -> StageResult:
        rows, output, title = here.path / f"{arm}.jsonl", here.path / f"policy-{arm}", f"fine-tuning on {arm} solutions"
        result = fine_tune(rows, base_checkpoint(config, run), output, config.sft, config.run.seed, title)
        return StageResult((output,), result)

    settings = {"sft": to_dict(config.sft), "run": seed_of(config.run)}
    return Stage(here, f"policy-{arm}", settings, lambda: {"rows": input_digest(here, "extract")}, work)


def compiled_stage(config: Config, run: RunDir, number: int) -> Stage:
    """The arms' models on the held-out problems; a judge's opinion of the flow's solutions where one is asked for."""
    here = run.round(number)

    def work() -> StageResult:
        heldout, methods = load_problems(config.problems).heldout, dict[str, Any]()
        for arm in ARMS:
            folder = here.eval / arm
            job = search_job(config, str(here.path / f"policy-{arm}"), [single_pass(config, folder)])
            search_passes(job, [heldout], config.cluster, f"fine-tuned on {arm} solutions")
            methods[f"SFT on {arm}"] = measured_accuracy(config, folder)
        untrained = read_json(run.round(0).eval_json)["methods"]["greedy"]
        record = here.record("extract")
        rows = record.counts["rows"] if record else 0
        note = f"one greedy solution of the single model, fine-tuned on {rows} solutions of the same problems"
        tables = [accuracy_table("Compiled models", {"no fine-tuning": untrained, **methods}, note)]
        verdicts = asyncio.run(_judged(config, here.path)) if config.compile.judged else None
        if verdicts:
            heads = ["flow solutions against reference solutions", *verdicts]
            tables.append(
                {"title": "Judge, both orders", "heads": heads, "rows": [["problems", *map(str, verdicts.values())]]}
            )
        return finished_eval(here, methods, [s for arm in ARMS for s in shards(here.eval / arm)], tables=tables)

    def inputs() -> dict[str, str]:
        return {arm: input_digest(here, f"policy-{arm}") for arm in ARMS}

    settings = settings_of(config) | {"compile": {"judged": config.compile.judged}}
    return Stage(here, "eval", settings, inputs, work, resumes=True, trees=(here.eval,))


async def _judged(config: Config, folder: Path) -> dict[str, int]:
    """Won, lost and tied comparisons of the flow's solutions with the reference ones."""
    from rstar.engines.build import build_policy
    from rstar.training.data import read_rows

    questions = {problem.id: problem.question for problem in load_problems(config.problems).train}
    ours, theirs = (
        read_rows(folder / f"{arm}.jsonl", SftRow)[: config.compile.judged] for arm in ("flow", "reference")
    )
    duels = [(questions[a.problem_id], a.completion, b.completion) for a, b in zip(ours, theirs, strict=True)]
    policy = build_policy(config.compile.judge, "")
    try:
        return await judge(policy, duels)
    finally:
        await policy.close()
